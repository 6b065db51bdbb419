"""Looks into trained models: retrieval, probes, metrics of the tasks, learning curves.

    python analyze.py curves                # docs/curves.png: losses and gradients of the newest run
    python analyze.py clips                 # docs/clips.png: captions and the clips that are retrieved
    python analyze.py table out/distill-*   # results of several runs, a row each
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch

import data
import common

# ---------------------------------------------------------------------------- what a model learned


@torch.no_grad()
def fill_in(bert, head, vocab, ids, place, device):
    """Text of a sequence ids (T,) with [MASK] at `place`, and the three likeliest words: [(word, share)]."""
    masked = ids.clone()
    masked[place] = vocab.mask
    best = head(bert(masked[None].to(device))[0, place]).float().softmax(-1).topk(3)
    text = vocab.decode(masked[1:-1].tolist())
    return text, [(vocab.decode([i]), p) for p, i in zip(best.values.tolist(), best.indices.tolist())]


def clip_states(latents, clips):
    """The latent state of each of the demo's clips, in the order of data.VideoClips `clips`."""
    states = {(state["video_id"], state["caption"]): state for state in latents["clips"]}
    videos = clips.video_of(np.arange(len(clips)))
    number = np.arange(len(clips)) - np.searchsorted(videos, videos)  # of a caption in its video
    return [states[clips.video_id[v].decode(), int(n)] for v, n in zip(videos, number)]


def describe(state):
    """One line on a clip's latent state."""
    effect = f", it {state['effect']}" if state["effect"] else ""
    return (f"{state['size']} {state['colour']} {state['material']} {state['noun']}, {state['scene']}: "
            f"{state['action']}{effect} ({state['order']})")


def closing_table(columns, n_clips):
    """The aligned text of the closing table.

    columns: {model: {"mlm_loss", "mlm_accuracy", "neighbours", "retrieval", "probes"}}, what was not measured
    missing or None; n_clips: held-out clips, 0 without retrieval. All but the loss in percent.
    """
    def percent(value):
        return "-" if value is None else f"{100 * value:.1f}"

    def shares(found):
        return "-" if found is None else " / ".join(percent(found[k]) for k in ("1", "5", "10"))

    every = list(columns.values())
    loss = ["-" if column.get("mlm_loss") is None else f"{column['mlm_loss']:.3f}" for column in every]
    rows = [["", *columns, "chance"], ["masked words: loss", *loss, "-"],
            ["masked words: accuracy", *(percent(column.get("mlm_accuracy")) for column in every), "-"],
            ["10 nearest blocks shared with the teacher",
             *(percent(column.get("neighbours")) for column in every), "-"]]
    spaces = {"aligned": "aligned space", "mean state": "mean state as it is", "ridge": "after one ridge map"}
    for space, title in spaces.items():
        if n_clips:
            rows.append([f"text-to-video R@1/5/10: {title}",
                         *(shares(column["retrieval"][space]) for column in every),
                         shares({str(k): k / n_clips for k in (1, 5, 10)})])
    for name, chance in (every[-1].get("probes") or {}).items():
        for kind, title in (("linear", "linear probe"), ("neighbours", "5 nearest nouns")):
            rows.append([f"{name} of held-out nouns: {title}",
                         *(percent(column["probes"][name][kind]) for column in every),
                         percent(chance[kind + "_chance"])])
    return common.table(rows)


# ---------------------------------------------------------------------------- figures


def newest_run(out="out"):
    """The folder of the latest distillation on the demo with an objective, by its stored finish time."""
    found = []
    for path in Path(out).glob("distill-*/results.json"):
        results = json.loads(path.read_text())
        if "finished" in results and "table" in results and "probes" in results:
            found.append((results["finished"], path.parent))
    if not found:
        raise SystemExit(f"{out}: no finished distillation; run torchrun distill.py --objective nst+crd")
    return max(found)[1]


def finished_results(run):
    """results.json of a finished run, or one line that says what is missing."""
    path = Path(run) / "results.json"
    if not path.exists():
        raise SystemExit(f"{path}: no such file; give the folder of a finished run of distill.py")
    return json.loads(path.read_text())


def grid(rows, columns, width, height):
    """A matplotlib figure of rows x columns panels of width x height inches, without a screen; its axes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), constrained_layout=True,
                        squeeze=False)


def curves(run, out):
    """PNG of a distillation: its terms, the gradient that each sends, and what each model has learned."""
    results = finished_results(run)
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    terms, gradients, validation = ([line for line in lines if key in line]
                                    for key in ("lr", "gradient_mlm", "val_mlm_loss"))
    if not terms or not gradients:
        raise SystemExit(f"{run}/log.jsonl: too few steps to draw; train for more than --log_every")
    table = results.get("table", {results["objective"]: results})
    has_retrieval = all(column.get("retrieval") for column in table.values())
    figure, ((decline, gradient, *rest),) = grid(1, 2 + has_retrieval + ("probes" in results), 4.3, 3.8)
    for name in (name for name in ("mlm", "soft", "l2", "voken", "nst", "crd") if name in terms[0]):
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
              for model, column in table.items()},
             [100 * k / results["clips"] for k in (1, 5, 10)])
    if "probes" in results:
        bars(rest[-1], "linear probe of held-out nouns, %", list(results["probes"]),
             {model: [100 * found["linear"] for found in column["probes"].values()]
              for model, column in table.items()},
             [100 * found["linear_chance"] for found in results["probes"].values()])
    for axis in figure.axes:
        axis.title.set_fontsize(10)
        axis.legend(fontsize=8, frameon=False, loc="upper right", ncols=2 if axis in rest else 1)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}: {run}")


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
                     marker=(*FORMS[state["material"]], turn if spins else 0),
                     alpha=0.4 if state["effect"] and second > 2 else 0.9)
    axis.set(xlim=(-0.7, 5.7), ylim=(-0.8, 0.8), xticks=[], yticks=[])
    axis.set_xlabel(describe(state), fontsize=6.5, labelpad=2)
    for side in axis.spines.values():
        side.set_color(mark)


def clips(run, out, rows=6):
    """PNG of held-out captions of the demo, each with its own clip and what every model retrieves first.

    A frame is green where the clip is the caption's own, blue where it shows the same noun, grey elsewhere.
    """
    results, config = finished_results(run), json.loads((Path(run) / "config.json").read_text())["config"]
    world = Path(config["data_dir"]) / f"demo-s{config['seed']}"
    if config["train"] or "table" not in results:
        raise SystemExit(f"{run}: not a distillation on the demo world; only its clips can be drawn")
    held_out = data.VideoClips(world / "videos.h5", config["block_size"], part="val",
                               val_clips=results["clips"])
    states = clip_states(json.loads((world / "raw" / "latents.json").read_text()), held_out)
    chosen = [i for i, state in enumerate(states) if state["noun"] in state["text"]]
    chosen = chosen[::max(1, len(chosen) // rows)][:rows]
    models = {name: column["retrieval"]["nearest"] for name, column in results["table"].items()}
    figure, axes = grid(rows, 1 + len(models), 3.4, 1.1)
    for row, i in enumerate(chosen):
        draw_clip(axes[row, 0], states[i], "green")
        axes[row, 0].set_title(f'"{states[i]["text"]}"', fontsize=8, loc="left")
        for column, (name, found) in enumerate(models.items(), 1):
            state = states[found[i]]
            draw_clip(axes[row, column], state, "green" if found[i] == i else
                      "blue" if state["noun"] == states[i]["noun"] else "lightgrey")
            if row == 0:
                axes[row, column].set_title(f"{name} retrieves", fontsize=8)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}: {run}")


def table(runs):
    """Prints one aligned row a run: masked words, retrieval after the ridge map, and probes of held-out nouns
    (linear / 5 nearest), all but the loss in percent."""
    rows = []
    for run in runs:
        results = finished_results(run)
        row = {"run": Path(run).name, "mlm loss": f"{results['mlm_loss']:.3f}",
               "accuracy": f"{100 * results['mlm_accuracy']:.1f}"}
        if "retrieval" in results:
            row["ridge R@10"] = f"{100 * results['retrieval']['ridge']['10']:.1f}"
        if results.get("neighbours") is not None:
            row["teacher's neighbours"] = f"{100 * results['neighbours']:.1f}"
        for name, found in results.get("probes", {}).items():
            row[name] = f"{100 * found['linear']:.1f} / {100 * found['neighbours']:.1f}"
        rows.append(row)
    print(common.table([list(rows[0]), *([row.get(key, "-") for key in rows[0]] for row in rows)]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("curves", "figure of a distillation's curves and of what was learned"),
                       ("clips", "figure of the clips that each model retrieves for held-out captions")):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", nargs="?", help="folder of a finished run; default: the newest in out/")
        command.add_argument("--out", default=f"docs/{name}.png", help="the PNG to write")
    command = commands.add_parser("table", help="the results of several runs, a row each")
    command.add_argument("runs", nargs="+", help="folders of finished runs")
    args = parser.parse_args(argv)
    if args.command == "table":
        table(args.runs)
    else:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        {"curves": curves, "clips": clips}[args.command](args.run or newest_run(), args.out)


if __name__ == "__main__":
    main()
