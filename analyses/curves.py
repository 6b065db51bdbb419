"""Learning curves of runs of any stage, one or several overlaid."""
import math
from pathlib import Path

import numpy as np

from analyses.closing import newest_run, read_table, short_names
from analyses.figures import COLOURS, STYLES, bars, grid, save
from common import parse_json, read_text, table
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
        first = next(line for line in lines if "lr" in line)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SystemExit(f"{path}: is no log of a run; give the folder of a finished run") from None
    except StopIteration:
        raise SystemExit(f"{path}: too few steps to draw; train for more than --log_every") from None
    terms = list(first)[1:list(first).index("lr")]
    parts = {key: {name.removeprefix(prefix): columns[name] for name in columns if name.startswith(prefix)}
             for key, prefix in (("gradients", "gradient_"), ("validation", "val_"))}
    return parts | {"terms": {name: columns[name] for name in terms}, "lr": columns["lr"],
                    "norm": columns["grad_norm"], "speed": columns[unit], "unit": unit.removesuffix("_per_s")}


def curves(runs=(), out=""):
    """Figure of runs: losses, gradients of each term, learning rate, speed; of one distillation also what
    each model of its closing table has learned. Prints a row a run.

    With several runs a colour is a run and a style a term.
    """
    runs = [Path(run) for run in runs or [newest_run()]]
    logs = {name: read_log(run) for name, run in zip(short_names(runs), runs)}
    closing = read_table(runs[0]) if len(runs) == 1 and (runs[0] / "table.json").exists() else None
    columns = closing["columns"] if closing else {}
    learned = [key for key in ("retrieval", "probes")
               if columns and all(column.get(key) for column in columns.values())]
    figure, axes = grid(2, 2 + bool(learned), 4.3, 3.3, frame=False)
    for i, (run, log) in enumerate(logs.items()):
        for j, (term, (steps, values)) in enumerate(log["terms"].items()):
            colour, name = (i, f"{run}: {term}") if len(logs) > 1 else (j, term)
            look = {"color": COLOURS[colour % len(COLOURS)], "ls": STYLES[j % len(STYLES)]}
            axes[0, 0].plot(steps, np.array(values) / values[0], label=f"{name} (from {values[0]:.3g})",
                            **look)
            if term in log["gradients"]:
                axes[0, 1].plot(*log["gradients"][term], marker="o", ms=3, label=name, **look)
        if len(logs) == 1 and "mlm_loss" in log["validation"] and "mlm" in log["terms"]:
            steps, values = log["validation"]["mlm_loss"]
            axes[0, 0].plot(steps, np.array(values) / log["terms"]["mlm"][1][0], "k.--",
                            label="mlm, held-out text")
        look = {"color": COLOURS[i % len(COLOURS)], "label": run}
        axes[1, 0].plot(*log["lr"], **look)
        axes[1, 1].plot(log["speed"][0], np.array(log["speed"][1]) / 1e3, **look)
    axes[0, 0].set(title="terms, relative to their start", ylabel="share", ylim=(0, 1.15))
    axes[0, 1].set(title="weighted gradient into the last states", ylabel="norm")
    if any(log["gradients"] for log in logs.values()):
        axes[0, 1].set_yscale("log")
    else:
        axes[0, 1].text(0.5, 0.5, "not logged by this stage", ha="center", transform=axes[0, 1].transAxes)
    axes[1, 0].set(title="learning rate", xlabel="step", ylabel="of AdamW", ylim=(0, None))
    units = list(dict.fromkeys(log["unit"] for log in logs.values()))
    axes[1, 1].set(title="speed", xlabel="step", ylim=(0, 1.3 * axes[1, 1].get_ylim()[1]),
                   ylabel=f"thousand {' or '.join(units)} a second")
    for key in learned:
        axis = axes[learned.index(key), 2]
        if key == "retrieval":
            bars(axis, "text-to-video recall after one ridge map, %", [f"R@{k}" for k in (1, 5, 10)],
                 {model: [100 * column["retrieval"]["ridge"][str(k)] for k in (1, 5, 10)]
                  for model, column in columns.items()}, [100 * k / closing["clips"] for k in (1, 5, 10)])
        else:
            own = next(iter(columns.values()))["probes"]
            bars(axis, "linear probe of held-out nouns, %", list(own),
                 {model: [100 * found["linear"] for found in column["probes"].values()]
                  for model, column in columns.items()},
                 [100 * found["linear_chance"] for found in own.values()])
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0] and (len(logs) > 1 or axis not in axes[1, :2]):
            axis.legend(fontsize=7, loc="upper right", ncols=2 if axis in axes[:, 2:] else 1)
    for axis in axes[len(learned):, 2:].flat:
        axis.axis("off")
    terms = list(dict.fromkeys(term for log in logs.values() for term in log["terms"]))
    rows = [["last window", "steps", *terms, "lr", "gradient norm", *(f"{unit}/s" for unit in units)]]
    for run, log in logs.items():
        last = [f"{log['terms'][term][1][-1]:.4f}" if term in log["terms"] else "-" for term in terms]
        speed = [f"{np.median(log['speed'][1]):,.0f}" if unit == log["unit"] else "-" for unit in units]
        rows.append([run, str(log["lr"][0][-1]), *last, f"{log['lr'][1][-1]:.1e}",
                     f"{log['norm'][1][-1]:.3f}", *speed])
    save(figure, out, {"runs": logs, "columns": columns}, table(rows))
