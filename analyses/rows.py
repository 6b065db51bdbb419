"""Rows of a table over seeds: their statistics, the table as text, CSV and LaTeX, the bar chart.

A row is {"name", "paper": its printed numbers or [], "columns": {column: statistics}}; `asked` is the table,
an analyses.papers.Table.
"""
import csv
import io

import numpy as np

from analyses import figures
from common import table

# ---------------------------------------------------------------------------- statistics


def compare(values, others):
    """p of a paired t test, two-sided: do two rows differ, over the seeds that both have?

    values, others: {seed: value}. t = mean(d) / (s(d) / sqrt(n)) with n - 1 degrees of freedom, d the
    differences on the same seed, whose world both rows saw. None below two seeds, and where all differ by as
    much: a spread of 0 is one of rounding.
    """
    difference = np.array([values[seed] - others[seed] for seed in values.keys() & others.keys()])
    if len(difference) < 2:
        return None
    if np.ptp(difference) < 1e-9:
        return None if abs(difference[0]) > 1e-9 else 1.0
    from scipy import stats  # takes a second
    return float(stats.ttest_1samp(difference, 0).pvalue)


def seen_by(n):
    """How many of their standard deviations the mean of n differences must be for p < .05: t / sqrt(n)."""
    from scipy import stats
    return float(stats.t.ppf(0.975, n - 1) / n ** 0.5)


def statistics(seeds, baseline):
    """{column: statistics of a row}; seeds, baseline: {seed: {column: value}} of the row and the baseline."""
    found = {}
    for column in dict.fromkeys(column for scores in seeds.values() for column in scores):
        values, others = ({seed: scores[column] for seed, scores in rows.items() if column in scores}
                          for rows in (seeds, baseline))
        x, shared = np.array(list(values.values())), values.keys() & others.keys()
        found[column] = {
            "seeds": values, "mean": float(x.mean()), "median": float(np.median(x)),
            "deviation": float(x.std(ddof=1)) if len(x) > 1 else None,
            "difference": float(np.mean([values[s] - others[s] for s in shared])) if shared else None,
            "p": compare(values, others)}
    return found


def columns_of(rows):
    """Our columns, in their order."""
    return list(dict.fromkeys(column for row in rows for column in row["columns"]))


def main_column(asked, rows):
    """Our column that stands beside the paper's."""
    return next((name for name in asked.of if name in columns_of(rows)), "average")


def printed(asked, row, like=None):
    """The paper's number of a row: of the table's main column, or the mean of all; None where one is missing.

    like: another row; the mean is then over the columns that both have.
    """
    if asked.printed in asked.columns:
        return row["paper"][asked.columns.index(asked.printed)] if row["paper"] else None
    pairs = list(zip(row["paper"], (like or row)["paper"]))
    shared = [x for x, other in pairs if x is not None and other is not None]
    return float(np.mean(shared)) if shared and (like or len(shared) == len(pairs)) else None


# ---------------------------------------------------------------------------- text


def number(x, beside=None, sign=""):
    """Text of a number: counts whole, percents with one digit, what is below 2 with four; as one `beside`."""
    scale = abs(x if beside is None else beside)
    return f"{x:{sign}{',.0f' if scale >= 1000 else '.1f' if scale >= 2 else '.4f'}}"


def differs(column):
    """Whether a column's difference to the baseline is beyond p = .05."""
    return column["p"] is not None and column["p"] < 0.05


def cell(column):
    """mean ±deviation, with a star where it differs from the baseline (p < .05); - where it is missing."""
    if column is None:
        return "-"
    spread = "" if column["deviation"] is None else f" ±{number(column['deviation'], column['mean']):>4}"
    return number(column["mean"]) + spread + (" *"[differs(column)])


def paper_cell(x):
    """A printed number."""
    return "-" if x is None else f"{x:,}"


def as_text(asked, rows):
    """Two tables: ours, a column a measure; and the main one of these beside the paper's numbers."""
    base, main = rows[asked.baseline], main_column(asked, rows)
    ours = [["ours", "seeds", *columns_of(rows)]]
    ours += [[row["name"], str(max(len(column["seeds"]) for column in row["columns"].values())),
              *(cell(row["columns"].get(name)) for name in ours[0][2:])] for row in rows if row["columns"]]
    several, has_paper = len(asked.columns) > 1 and asked.printed == "average", bool(asked.columns)
    beside = [["", f"ours: {main}", "median", "difference", "p", *["| paper:"] * has_paper, *asked.columns,
               *["average"] * several, *["difference"] * has_paper]]
    for row in rows:
        line, column = [row["name"]], row["columns"].get(main)
        line += ["-"] * 4 if column is None else [cell(column), number(column["median"], column["mean"]), *(
            ["-", "-"] if row is base or column["difference"] is None else
            [number(column["difference"], column["mean"], "+"),
             "-" if column["p"] is None else f"{column['p']:.3f}".replace("0.000", "<.001")])]
        line += ["|"] * has_paper + [paper_cell(x) for x in row["paper"] or [None] * len(asked.columns)]
        line += [paper_cell(mean and round(mean, 1)) for mean in [printed(asked, row)]] * several
        pair = printed(asked, row, base), printed(asked, base, row)
        line += ["-" if row is base or None in pair else number(pair[0] - pair[1], pair[0], "+")] * has_paper
        beside.append(line)
    return f"{table(ours)}\n\n{table(beside)}"


def as_csv(asked, rows):
    """The rows as a spreadsheet: five statistics of each of our columns, then the paper's numbers."""
    parts, text = ("mean", "deviation", "median", "difference", "p"), io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", *(f"{name}, {part}" for name in columns_of(rows) for part in parts),
                    *(f"paper: {name}" for name in asked.columns)])
    for row in rows:
        lines.writerow([row["name"], *(row["columns"].get(name, {}).get(part, "") for name in columns_of(rows)
                                       for part in parts), *(row["paper"] or [""] * len(asked.columns))])
    return text.getvalue()


LATEX = {"±": r"$\pm$", "*": "$^*$", "^": r"\^{}", "~": r"\~{}", "\\": r"\textbackslash{}", "<": "$<$",
         ">": "$>$", **{c: f"\\{c}" for c in "%&_#${}"}}


def as_latex(asked, rows):
    """The rows as a LaTeX tabular: mean and deviation of each of our columns, then the paper's numbers."""
    def line(cells):
        return " & ".join("".join(LATEX.get(c, c) for c in text.strip()) for text in cells) + r" \\"
    names = columns_of(rows)
    lines = [f"% *: differs from {rows[asked.baseline]['name']}, paired t test over the seeds, p < .05",
             rf"\begin{{tabular}}{{l{'r' * (len(names) + len(asked.columns))}}}", r"\hline",
             line(["", *names, *(f"paper: {name}" for name in asked.columns)]), r"\hline"]
    lines += [line([row["name"], *(cell(row["columns"].get(name)) for name in names),
                    *(paper_cell(x) for x in row["paper"] or [None] * len(asked.columns))]) for row in rows]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


# ---------------------------------------------------------------------------- figure


def draw(asked, rows, chance=None):
    """Figure: bars of our main column, a dot a seed, and beside it the paper's; chance: a line."""
    ours = [row["columns"].get(main_column(asked, rows)) for row in rows]
    unit = "" if asked.by in ("pwcca", "parameters", "drift") else ", % right"
    panels = [(f"ours: {main_column(asked, rows)}{unit}", [column and column["mean"] for column in ours])]
    if any(printed(asked, row) is not None for row in rows):
        title = asked.columns[0] if len(asked.columns) == 1 else asked.printed
        panels.append((f"the paper: {title}", [printed(asked, row) for row in rows]))
    names = [row["name"] for row in rows]
    figure, (axes,) = figures.grid(1, len(panels), 4.4 + 0.035 * max(map(len, names)), 1.2 + 0.3 * len(rows),
                                   frame=False)
    for axis, (title, means), colour in zip(axes, panels, (figures.COLOURS[4], figures.COLOURS[1])):
        own = axis is axes[0]
        ends = [max([x or 0, *(column["seeds"].values() if own and column else ())])
                for x, column in zip(means, ours)]
        most = max(ends) or 1
        for y, (x, end, column) in enumerate(zip(means, ends, ours)):
            axis.barh(y, x or 0, color=colour, height=0.7)
            star = "*" if own and column and differs(column) else ""
            axis.text(end + 0.02 * most, y, "-" if x is None else number(x) + star, va="center", fontsize=8)
        axis.set(xlabel=title, xlim=(0, most * 1.18), yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6),
                 yticklabels=names if own else [])
    label = "a seed"
    for y, column in enumerate(ours):
        if column and len(column["seeds"]) > 1:
            dots = list(column["seeds"].values())
            axes[0].plot(dots, y + np.linspace(-0.2, 0.2, len(dots)), "o", color="k", ms=2.5, label=label)
            label = None
    if chance is not None:
        axes[0].axvline(chance, color="k", ls=":", label="chance")
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8,
                      frameon=False)
    starred = any(column and differs(column) for column in ours)
    figure.suptitle(asked.title + f" (*: p < .05 against {rows[asked.baseline]['name']})" * starred)
    return figure
