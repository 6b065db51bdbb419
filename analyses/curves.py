"""Learning curves of runs of any stage, one or several overlaid."""
import math
from pathlib import Path

import numpy as np

from analyses.closing import short_names
from analyses.figures import COLOURS, STYLES, bars, grid, save
from common import parse_json, peek_json, read_text, table
from run import read_run


def read_log(run):
    """A run's log.jsonl as {"terms", "gradients", "validation": {name: (steps, values)}; "lr", "norm",
    "speed": (steps, values); "unit": of the speed}."""
    read_run(run)  # says what is no finished run
    path, columns, unit = Path(run) / "log.jsonl", {}, ""
    try:
        lines = [parse_json(line) for line in read_text(path).splitlines()]
        for line in lines:
            for name, value in line.items():
                steps, values = columns.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(math.nan if value is None else float(value))
        unit = next(name for name in columns if name.endswith("_per_s"))
        first = list(next(line for line in lines if "lr" in line))
        terms = {name: columns[name] for name in first[1:first.index("lr")]}
        if not terms:
            raise ValueError
        found = {"terms": terms, "lr": columns["lr"], "norm": columns["grad_norm"], "speed": columns[unit]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SystemExit(f"{path}: is no log of a run; give the folder of a finished run") from None
    except StopIteration:
        raise SystemExit(f"{path}: too few steps to draw; train for more than --log_every") from None
    parts = {key: {name.removeprefix(prefix): columns[name] for name in columns if name.startswith(prefix)}
             for key, prefix in (("gradients", "gradient_"), ("validation", "val_"))}
    return found | parts | {"unit": unit.removesuffix("_per_s")}


def read_learned(run):
    """[(title, groups, {model: one value a group}, chance)] of a distillation's closing table, in percent:
    recall and probes, as far as every model has them; [] of other runs."""
    closing = peek_json(Path(run) / "table.json")
    columns, found = closing.get("columns", {}), []
    try:
        if columns and all(column.get("retrieval") for column in columns.values()):
            ranks = ("1", "5", "10")
            found.append(("text-to-video recall after one ridge map, %", [f"R@{k}" for k in ranks],
                          {model: [100 * column["retrieval"]["ridge"][k] for k in ranks]
                           for model, column in columns.items()},
                          [100 * int(k) / closing["clips"] for k in ranks]))
        if columns and all(column.get("probes") for column in columns.values()):
            own = next(iter(columns.values()))["probes"]
            found.append(("linear probe of held-out nouns, %", list(own),
                          {model: [100 * column["probes"][name]["linear"] for name in own]
                           for model, column in columns.items()},
                          [100 * own[name]["linear_chance"] for name in own]))
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise SystemExit(f"{run}/table.json: not in the form of distill.py ({error!r}); measure the run "
                         "again, by its command with --resume auto") from None
    return found


def curves(runs, out=""):
    """Figure of runs: losses, gradients of each term, learning rate, speed; of one distillation also what
    each model of its closing table has learned. Prints a row a run.

    With several runs a colour is a run and a style a term.
    """
    runs = list(dict.fromkeys(map(Path, runs)))
    if len(runs) > len(COLOURS):
        raise SystemExit(f"{len(runs)} runs: at most {len(COLOURS)} can be told apart in a picture; give "
                         "fewer")
    logs = {name: read_log(run) for name, run in zip(short_names(runs), runs)}
    alone = len(logs) == 1
    learned = read_learned(runs[0]) if alone else []
    figure, axes = grid(2, 2 + bool(learned), 4.3, 3.3, frame=False)
    for i, (run, log) in enumerate(logs.items()):
        for j, (term, (steps, values)) in enumerate(log["terms"].items()):
            look = {"color": COLOURS[(j if alone else i) % len(COLOURS)], "ls": STYLES[j % len(STYLES)],
                    "label": f"{term} (from {values[0]:.3g})" if alone else f"{run}: {term}"}
            axes[0, 0].plot(steps, np.array(values) / values[0], **look)
            if term in log["gradients"]:
                axes[0, 1].plot(*log["gradients"][term], marker="o", ms=3, **look | {"label": term})
        if alone and "mlm_loss" in log["validation"] and "mlm" in log["terms"]:
            steps, values = log["validation"]["mlm_loss"]
            axes[0, 0].plot(steps, np.array(values) / log["terms"]["mlm"][1][0], "k.--",
                            label="mlm, held-out text")
        look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)]}
        axes[1, 0].plot(*log["lr"], **look)
        axes[1, 1].plot(log["speed"][0], np.array(log["speed"][1]) / 1e3, **look)
    axes[0, 0].set(title="terms, relative to their first window", ylabel="loss / first loss", ylim=(0, None))
    axes[0, 1].set(title="weighted gradient into the last states", ylabel="norm")
    if any(log["gradients"] for log in logs.values()):
        axes[0, 1].set_yscale("log")
    else:
        axes[0, 1].set(xticks=[], yticks=[])
        axes[0, 1].text(0.5, 0.5, "not logged by this stage", ha="center", transform=axes[0, 1].transAxes)
    axes[1, 0].set(title="learning rate", xlabel="step", ylabel="learning rate of AdamW", ylim=(0, None))
    units = list(dict.fromkeys(log["unit"] for log in logs.values()))
    axes[1, 1].set(title="speed", xlabel="step", ylim=(0, None),
                   ylabel=f"thousand {' or '.join(units)} a second")
    for axis, panel in zip(axes[:, 2:].flat, learned):
        bars(axis, *panel)
        axis.legend(fontsize=7, loc="upper right", ncols=2)
    for axis in axes[len(learned):, 2:].flat:
        axis.axis("off")
    if alone:
        for axis in axes[0, :1 + any(log["gradients"] for log in logs.values())]:
            axis.legend(fontsize=7, loc="upper right")
    else:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                      fontsize=7)
    terms = list(dict.fromkeys(term for log in logs.values() for term in log["terms"]))
    rows = [["last window", "to step", *terms, "lr", "gradient norm", *(f"{unit}/s" for unit in units)]]
    for run, log in logs.items():
        last = [f"{log['terms'][term][1][-1]:.4f}" if term in log["terms"] else "-" for term in terms]
        speed = [f"{np.median(log['speed'][1]):,.0f}" if unit == log["unit"] else "-" for unit in units]
        rows.append([run, str(log["lr"][0][-1]), *last, f"{log['lr'][1][-1]:.1e}",
                     f"{log['norm'][1][-1]:.3f}", *speed])
    save(figure, out, {"runs": logs, "learned": [dict(zip(("title", "groups", "models", "chance"), panel))
                                                 for panel in learned]}, table(rows))
