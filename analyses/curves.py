"""Learning curves of runs."""
from pathlib import Path

import numpy as np

from analyses.closing import newest_run, read_table
from analyses.figures import bars, grid, save
from common import parse_json, read_text


def curves(run="", out=""):
    """PNG of a distillation: its terms, the gradient that each sends, and what each model has learned."""
    run = run or newest_run()
    closing = read_table(run)
    lines = [parse_json(line) for line in read_text(Path(run) / "log.jsonl").splitlines()]
    terms, gradients, validation = ([line for line in lines if key in line]
                                    for key in ("lr", "gradient_mlm", "val_mlm_loss"))
    if not terms or not gradients:
        raise SystemExit(f"{run}/log.jsonl: too few steps to draw; train for more than --log_every")
    columns = closing["columns"]
    own = list(columns.values())[-1]
    has_retrieval = all(column.get("retrieval") for column in columns.values())
    figure, ((decline, gradient, *rest),) = grid(1, 2 + has_retrieval + bool(own["probes"]), 4.3, 3.8)
    for name in (key.removeprefix("gradient_") for key in gradients[0] if key != "step"):
        values = np.array([line[name] for line in terms])
        decline.plot([line["step"] for line in terms], values / values[0],
                     label=f"{name} (from {values[0]:.3g})")
        gradient.plot([line["step"] for line in gradients], [line["gradient_" + name] for line in gradients],
                      "o-", label=name)
    decline.plot([line["step"] for line in validation],
                 [line["val_mlm_loss"] / terms[0]["mlm"] for line in validation], "k.--",
                 label="mlm, held-out text")
    decline.set(title="terms, relative to their start", xlabel="step", ylim=(0, 1.1))
    gradient.set(title="weighted gradient into the last states", xlabel="step", yscale="log")
    if has_retrieval:
        bars(rest[0], "text-to-video recall after one ridge map, %", [f"R@{k}" for k in (1, 5, 10)],
             {model: [100 * column["retrieval"]["ridge"][str(k)] for k in (1, 5, 10)]
              for model, column in columns.items()}, [100 * k / closing["clips"] for k in (1, 5, 10)])
    if own["probes"]:
        bars(rest[-1], "linear probe of held-out nouns, %", list(own["probes"]),
             {model: [100 * found["linear"] for found in column["probes"].values()]
              for model, column in columns.items()},
             [100 * found["linear_chance"] for found in own["probes"].values()])
    for axis in figure.axes:
        axis.title.set_fontsize(10)
        axis.legend(fontsize=8, frameon=False, loc="upper right", ncols=2 if axis in rest else 1)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, out, {"run": str(run), "columns": columns})
