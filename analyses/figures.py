"""How figures look: panels, colours, bars, drawn clips of the demo; and how they are saved."""
from pathlib import Path

import numpy as np

from common import atomic, print0, write_json

# Okabe and Ito 2008: told apart by colour-blind eyes, and by their greys; lines have styles, too
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":")


def grid(rows, columns, width, height, frame=True):
    """A matplotlib figure of rows x columns panels of width x height inches, without a screen; its axes.

    frame: whether panels are closed at the top and on the right.
    """
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "axes.spines.top": frame,
        "axes.spines.right": frame, "axes.titlesize": 10, "figure.titlesize": 10, "figure.labelsize": 8,
        "legend.fontsize": 8, "legend.frameon": False})
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), constrained_layout=True,
                        squeeze=False)


def save(figure, out, found, text=""):
    """Writes the figure as the PNG `out` and what it shows, `found`, as the json beside it; prints `text`."""
    import matplotlib.pyplot as plt
    out = check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
    write_json(out.with_suffix(".json"), found)
    if text:
        print0(f"\n{text}\n")
    print0(f"wrote {out} and {out.with_suffix('.json')}")


def check_out(out, suffix=".png"):
    """--out as a Path; one line where its name ends otherwise."""
    if Path(out).suffix != suffix:
        raise SystemExit(f"--out {out}: is written as {suffix[1:].upper()}; give a name that ends in "
                         f"{suffix}")
    return Path(out)


def bars(axis, title, groups, values, chance):
    """Grouped bars: a group a measure, a bar a model, a line at chance. values: {model: [one a group]}."""
    width = 0.8 / len(values)
    for i, (model, heights) in enumerate(values.items()):
        axis.bar(np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width, heights, width, label=model)
    for x, level in enumerate(chance):
        axis.plot([x - 0.42, x + 0.42], [level, level], "k:", label="chance" if x == 0 else None)
    axis.set(title=title, xticks=range(len(groups)), xticklabels=groups, ylim=(0, 125),
             yticks=range(0, 101, 20))


# how a clip is drawn: the material as a form (corners, 0 polygon or 1 star), the size as its size
FORMS = {"glass": (3, 0), "ceramic": (4, 0), "metal": (5, 0), "wood": (6, 0), "stone": (8, 0),
         "cloth": (3, 1), "paper": (4, 1), "plastic": (5, 1), "rubber": (6, 1), "wax": (8, 1)}
SIZES = {"small": 60, "medium": 160, "large": 340}


def draw_clip(axis, state, mark):
    """A clip of the demo as six frames: form = material, colour, size; it turns (spins) or leans (tilts)
    around the middle, and pales from the fourth second on where the action has an effect."""
    for second in range(6):
        turn = {2: 20, 3: 40, 4: 60}.get(second, 0)
        spins = state["order"] == "spins first"
        axis.scatter(second, 0 if spins else turn / 150, SIZES[state["size"]], state["colour"],
                     edgecolors="k", linewidths=0.5, marker=(*FORMS[state["material"]], turn if spins else 0),
                     alpha=0.4 if state["effect"] and second > 2 else 0.9)
    axis.set(xlim=(-0.7, 5.7), ylim=(-0.8, 1.0), xticks=[], yticks=[])
    axis.set_xlabel(describe(state), fontsize=6.5, labelpad=2)
    for side in axis.spines.values():
        side.set_color(mark)


def clip_states(latents, clips):
    """The latent state of each of the demo's clips, by the caption that it begins with."""
    return [latents["clips"][c] for c in clips.captions(np.arange(len(clips)))]


def describe(state):
    """One line on a clip's latent state."""
    effect = f", it {state['effect']}" if state["effect"] else ""
    return (f"{state['size']} {state['colour']} {state['material']} {state['noun']}, {state['scene']}: "
            f"{state['action']}{effect} ({state['order']})")
