"""Rows of a table over seeds: their statistics, the table as text, CSV and LaTeX, the bar chart.

A result holds of each row {"name", "paper": its printed numbers or [], "columns": {column: statistics}}.
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
    differences on the same seed, whose world both rows saw. None below two seeds.
    """
    difference = np.array([values[seed] - others[seed] for seed in values.keys() & others.keys()])
    if len(difference) < 2:
        return None
    if np.ptp(difference) == 0:  # no spread: equal, or always apart by as much
        return float(difference[0] == 0)
    from scipy import stats  # takes a second
    return float(stats.ttest_1samp(difference, 0).pvalue)


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


def mean_of(numbers):
    """Mean of a row's printed numbers, None where one is missing or there are none."""
    return None if not numbers or None in numbers else float(np.mean(numbers))


def columns_of(rows):
    """Our columns, in their order."""
    return list(dict.fromkeys(column for row in rows for column in row["columns"]))


def main_column(of, rows):
    """Our column that stands beside the paper's average: `of`, or the average where no row has that."""
    return of if of in columns_of(rows) else "average"


# ---------------------------------------------------------------------------- text


def number(x, beside=None, sign=""):
    """Text of a number: counts whole, percents with one digit, what is below 2 with four; as one `beside`."""
    scale = abs(x if beside is None else beside)
    return f"{x:{sign}{',.0f' if scale >= 1000 else '.1f' if scale >= 2 else '.4f'}}"


def cell(column, star="*"):
    """mean ±deviation, with a star where it differs from the baseline (p < .05); - where it is missing."""
    if column is None:
        return "-"
    spread = "" if column["deviation"] is None else f" ±{number(column['deviation'], column['mean']):>4}"
    return number(column["mean"]) + spread + (star if (column["p"] or 1) < 0.05 else " " * len(star))


def as_text(asked, rows):
    """Two tables: ours, a column a measure; and the main one of these beside the paper's numbers.

    asked: analyses.papers.Table.
    """
    base, main = rows[asked.baseline], main_column(asked.of, rows)
    ours = [["ours", *columns_of(rows)]]
    ours += [[row["name"], *(cell(row["columns"].get(name)) for name in ours[0][1:])]
             for row in rows if row["columns"]]
    several, printed = len(asked.columns) > 1, bool(asked.columns)
    beside = [["", f"ours: {main}", "median", "difference", "p", *["| paper:"] * printed, *asked.columns,
               *["average"] * several, *["difference"] * printed]]
    for row in rows:
        line, column = [row["name"]], row["columns"].get(main)
        line += ["-"] * 4 if column is None else [cell(column), number(column["median"]), *(
            ["-", "-"] if row is base or column["difference"] is None else
            [number(column["difference"], column["mean"], "+"),
             "-" if column["p"] is None else f"{column['p']:.3f}"])]
        mean, of_base = mean_of(row["paper"]), mean_of(base["paper"])
        line += ["|"] * printed + [paper_cell(x) for x in row["paper"] or [None] * len(asked.columns)]
        line += ["-" if mean is None else f"{mean:.1f}"] * several
        line += ["-" if row is base or None in (mean, of_base) else
                 number(mean - of_base, mean, "+")] * printed
        beside.append(line)
    return f"{table(ours)}\n\n{table(beside)}"


def paper_cell(x):
    """A printed number."""
    return "-" if x is None else f"{x:,}"


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


LATEX = {"±": r"$\pm$", "%": r"\%", "&": r"\&", "_": r"\_", "^": r"\^{}", "*": "$^*$", "#": r"\#"}


def as_latex(asked, rows):
    """The rows as a LaTeX tabular: mean and deviation of each of our columns, then the paper's numbers."""
    def line(cells):
        return " & ".join("".join(LATEX.get(c, c) for c in text.strip()) for text in cells) + r" \\"
    names = columns_of(rows)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(names) + len(asked.columns))}}}", r"\hline",
             line(["", *names, *(f"paper: {name}" for name in asked.columns)]), r"\hline"]
    lines += [line([row["name"], *(cell(row["columns"].get(name)) for name in names),
                    *(paper_cell(x) for x in row["paper"] or [None] * len(asked.columns))]) for row in rows]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


# ---------------------------------------------------------------------------- figure


def draw(asked, rows, chance=None):
    """Figure: bars of our main column, a dot a seed, and beside it the paper's average; chance: a line."""
    main, printed = main_column(asked.of, rows), any(mean_of(row["paper"]) for row in rows)
    figure, (axes,) = figures.grid(1, 1 + printed, 5.0, 1.2 + 0.3 * len(rows))
    ours = [row["columns"].get(main) for row in rows]
    values = [[column and column["mean"] for column in ours], [mean_of(row["paper"]) for row in rows]]
    titles = (f"ours: {main}", f"the paper: {asked.columns[0] if len(asked.columns) == 1 else 'average'}")
    for axis, means, title, colour in zip(axes, values, titles, (figures.COLOURS[4], figures.COLOURS[1])):
        most = max((x for x in means if x is not None), default=1)
        for y, x in enumerate(means):
            axis.barh(y, x or 0, color=colour, height=0.7)
            axis.text(most * 1.03, y, "-" if x is None else number(x), va="center", fontsize=8)
        axis.set(xlabel=title, xlim=(0, most * 1.18), yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6),
                 yticklabels=[row["name"] for row in rows] if axis is axes[0] else [])
        axis.spines[["top", "right"]].set_visible(False)
    for y, column in enumerate(ours):
        if column and len(column["seeds"]) > 1:
            dots = list(column["seeds"].values())
            axes[0].plot(dots, y + np.linspace(-0.2, 0.2, len(dots)), "o", color="k", ms=2.5,
                         label="a seed" if y == 0 else None)
    if chance is not None:
        axes[0].axvline(chance, color="k", ls=":", label="chance")
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8,
                      frameon=False)
    figure.suptitle(asked.title, fontsize=10)
    return figure
