"""Looks into trained models: retrieval, probes of perceptual properties, learning curves.

    python analyze.py curves --out docs/demo.png            # the newest demo run: losses, gradients, what it learned
    python analyze.py clips --out docs/clips.png            # sentences and the clips that the student retrieves
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import move


def recall(query, target, ks=(1, 5, 10), chunk=1024):
    """Share of the queries whose own target is among the k nearest by cosine; equal scores count against the query.

    query, target: (n, C), row i of both belong together. Returns {"1": share, ...}; by chance it is k / n.
    """
    query, target = F.normalize(query.float(), dim=-1), F.normalize(target.float(), dim=-1)
    ranks = []
    for i in range(0, len(query), chunk):
        scores = query[i:i + chunk] @ target.T  # (chunk, n)
        own = scores.gather(1, torch.arange(i, i + len(scores))[:, None])
        ranks.append((scores >= own).sum(1) - 1)
    ranks = torch.cat(ranks)
    return {str(k): (ranks < k).float().mean().item() for k in ks}


def ridge(x, y, strength=0.01):
    """Ridge regression with intercept: (n, C) -> (n, E); returns the map as a function.

    Penalty = strength x the mean variance of a channel of x, so that it does not depend on the model's scale.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean) / len(x)
    gram += strength * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean) / len(x))
    return lambda new: (new.double() - x_mean) @ weight + y_mean


def linear_probe(x_train, labels_train, x_test, labels_test):
    """Accuracy of a linear classifier (ridge on one-hot labels) of held-out items."""
    onehot = F.one_hot(labels_train, int(max(labels_train.max(), labels_test.max())) + 1).double()
    return (ridge(x_train, onehot, 0.1)(x_test).argmax(1) == labels_test).float().mean().item()


def neighbour_probe(x_train, labels_train, x_test, labels_test, k=5):
    """Share of the k nearest training items (cosine of centred vectors) that have the test item's label; and by chance."""
    mean = x_train.mean(0)
    scores = F.normalize(x_test - mean, dim=-1) @ F.normalize(x_train - mean, dim=-1).T
    near = labels_train[scores.topk(k, 1).indices]  # (n_test, k)
    same = (labels_test[:, None] == labels_train[None]).float().mean().item()
    return (near == labels_test[:, None]).float().mean().item(), same


@torch.no_grad()
def noun_vectors(encode, blocks, vocab, nouns, occurrences=20, scan=4000, batch_size=64):
    """Mean last hidden state of each noun over its first `occurrences` in the corpus -> (nouns, C) float32.

    encode: ids (b, T) -> (b, T, C). A noun of several word pieces is the mean of their states.
    """
    ids = blocks.batch(np.arange(min(scan, len(blocks))))["ids"].numpy()  # (n, T)
    pieces = vocab.encode(list(nouns))
    places = []
    for word in pieces:
        hit = np.ones((ids.shape[0], ids.shape[1] - len(word) + 1), bool)
        for i, piece in enumerate(word):
            hit &= ids[:, i:ids.shape[1] - len(word) + 1 + i] == piece
        rows, columns = hit.nonzero()
        if not len(rows):
            raise SystemExit(f"the noun {nouns[len(places)]} does not occur in the first {len(ids):,} blocks of the corpus")
        places.append((rows[:occurrences], columns[:occurrences]))
    needed = np.unique(np.concatenate([rows for rows, _ in places]))
    states = {}
    for i in range(0, len(needed), batch_size):
        chosen = needed[i:i + batch_size]
        states |= dict(zip(chosen.tolist(), encode(torch.from_numpy(ids[chosen])).float().cpu()))
    return torch.stack([torch.stack([states[r][c:c + len(word)].mean(0) for r, c in zip(*place)]).mean(0)
                        for place, word in zip(places, pieces)])


# ---------------------------------------------------------------------------- what a model learned

PERCEPTUAL = ("material", "colour", "size", "order")  # what the demo's videos show and its text never says


def mean_state(h, mask):
    """(B, T, C) -> (B, C): mean over the real tokens (VidLanKD, Appendix E)."""
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def vectors(encode, clips, index, device, batch_size=128):
    """encode(batch) -> (b, C), over the clips `index`, each with its own caption alone -> (n, C) float32 on the CPU."""
    parts = [encode(move(clips.clips(index[i:i + batch_size]), device)).float().cpu()
             for i in range(0, len(index), batch_size)]
    return torch.cat(parts)


def retrieval(bert, video, train, val, device, aligned=None, fit=4000):
    """Text-to-video recall@1/5/10 on the held-out clips, in three spaces (Fig. 4 of VidLanKD).

    bert: ids, mask -> (B, T, C); video: frames, mask -> (B, C_v); train, val: data.VideoClips. aligned: (text, clip), the
    maps from h, mask and from v into the space in which the model's objective compares them, or None.
    -> {"aligned": ..., "mean state": the paper's recipe, None where the widths differ, "ridge": after one ridge map
    from mean state to v, fitted on `fit` training clips, the same for every model}, each {k: share}.
    """
    fit_index = np.linspace(0, len(train) - 1, min(fit, len(train))).astype(np.int64)
    index = np.arange(len(val))
    v_fit, v = (vectors(lambda b: video(b["frames"], b["frame_mask"]), c, i, device)
                for c, i in ((train, fit_index), (val, index)))
    x_fit, x = (vectors(lambda b: mean_state(bert(b["ids"], b["mask"]), b["mask"]), c, i, device)
                for c, i in ((train, fit_index), (val, index)))
    found = {"aligned": None, "mean state": recall(x, v) if x.shape == v.shape else None, "ridge": recall(ridge(x_fit, v_fit)(x), v)}
    if aligned:
        text, clip = aligned
        query = vectors(lambda b: text(bert(b["ids"], b["mask"]), b["mask"]), val, index, device)
        with torch.no_grad():
            found["aligned"] = recall(query, clip(v.to(device)).cpu())
    return found


def probes(bert, blocks, latents, device):
    """How far a noun's vector tells its perceptual properties, for nouns held out from the probe.

    -> {property: {"linear": accuracy of a linear classifier, "neighbours": share of the same property among the 5 nearest
    nouns of the other split, "linear_chance": 1 / values, "neighbours_chance": of any noun of the other split}}.
    """
    nouns = sorted(latents["nouns"])
    x = noun_vectors(lambda ids: bert(ids.to(device)), blocks, blocks.vocab, nouns)
    held_out = torch.tensor([latents["nouns"][noun]["split"] == "dev" for noun in nouns])
    found = {}
    for name in PERCEPTUAL:
        values = latents["properties"][name]
        labels = torch.tensor([values.index(latents["nouns"][noun][name]) for noun in nouns])
        split = x[~held_out], labels[~held_out], x[held_out], labels[held_out]
        near, chance = neighbour_probe(*split)
        found[name] = {"linear": linear_probe(*split), "linear_chance": 1 / len(values), "neighbours": near,
                       "neighbours_chance": chance}
    return found


def closing_table(columns, n_clips):
    """The aligned text of the closing table. columns: {model: {"mlm_loss", "mlm_accuracy", "retrieval", "probes"}}."""
    def percent(value):
        return "-" if value is None else f"{100 * value:.1f}"

    def shares(found):
        return "-" if found is None else " / ".join(percent(found[k]) for k in ("1", "5", "10"))

    rows = [["", *columns, "chance"],
            ["masked words: loss", *(f"{c['mlm_loss']:.3f}" if c["mlm_loss"] is not None else "-" for c in columns.values()), "-"],
            ["masked words: accuracy", *(percent(c["mlm_accuracy"]) for c in columns.values()), "-"]]
    if n_clips:
        by_chance = shares({str(k): k / n_clips for k in (1, 5, 10)})
        for space, title in (("aligned", "aligned space"), ("mean state", "mean state, as it is"), ("ridge", "after one ridge map")):
            rows.append([f"text-to-video R@1/5/10: {title}", *(shares(c["retrieval"][space]) for c in columns.values()), by_chance])
    found = next(iter(columns.values())).get("probes", {})
    for name in found:
        for kind, title in (("linear", "linear probe"), ("neighbours", "5 nearest nouns")):
            rows.append([f"{name} of held-out nouns: {title}", *(percent(c["probes"][name][kind]) for c in columns.values()),
                         percent(found[name][kind + "_chance"])])
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(row[1:], width[1:]))]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------- figures


def newest_run(out="out"):
    """The folder of the latest finished distillation with an objective, by its stored finish time."""
    found = []
    for path in Path(out).glob("distill-*/results.json"):
        results = json.loads(path.read_text())
        if results.get("objective", "none") != "none" and "finished" in results:
            found.append((results["finished"], path.parent))
    if not found:
        raise SystemExit(f"{out}: no finished distillation; run torchrun distill.py --objective nst+crd first")
    return max(found)[1]


def finished_results(run):
    """results.json of a finished run, or one line that says what is missing."""
    path = Path(run) / "results.json"
    if not path.exists():
        raise SystemExit(f"{path}: no such file; give the folder of a finished run of distill.py")
    return json.loads(path.read_text())


def curves(run, out):
    """PNG of a distillation: its terms, the gradient that each sends, and what student, text-only and teacher know."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = finished_results(run)
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    terms = [line for line in lines if "lr" in line]
    gradients = [line for line in lines if "gradient_mlm" in line]
    names = [name for name in ("mlm", "soft", "l2", "voken", "nst", "crd") if name in terms[0]]
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), constrained_layout=True)
    colours = dict(zip(("mlm", "soft", "l2", "voken", "nst", "crd"), plt.cm.tab10.colors))
    for name in names:
        values = np.array([line[name] for line in terms])
        axes[0].plot([line["step"] for line in terms], values / values[0], label=f"{name} (from {values[0]:.3g})", color=colours[name])
        axes[1].plot([line["step"] for line in gradients], [line["gradient_" + name] for line in gradients], "o-", label=name,
                     color=colours[name])
    validation = [line for line in lines if "val_mlm_loss" in line]
    axes[0].plot([line["step"] for line in validation], [line["val_mlm_loss"] / terms[0]["mlm"] for line in validation], "k.--",
                 label="mlm, held-out text", linewidth=1)
    axes[0].set(title="terms, relative to their start", xlabel="step", ylim=(0, None))
    axes[1].set(title="weighted gradient into the last hidden states", xlabel="step", yscale="log")
    table = results["table"]
    bars(axes[2], "text-to-video recall after one ridge map, %", [f"R@{k}" for k in (1, 5, 10)],
         {model: [100 * column["retrieval"]["ridge"][str(k)] for k in (1, 5, 10)] for model, column in table.items()},
         [100 * k / results["clips"] for k in (1, 5, 10)])
    properties = list(results["probes"])
    bars(axes[3], "linear probe of held-out nouns, %", properties,
         {model: [100 * column["probes"][p]["linear"] for p in properties] for model, column in table.items()},
         [100 * results["probes"][p]["linear_chance"] for p in properties])
    for axis in axes:
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}: {run}")


def bars(axis, title, groups, values, chance):
    """Grouped bars, one group a measure and one bar a model, with a tick at chance. values: {model: [a value a group]}."""
    width = 0.8 / len(values)
    for i, (model, heights) in enumerate(values.items()):
        axis.bar(np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width, heights, width, label=model)
    for x, level in enumerate(chance):
        axis.plot([x - 0.42, x + 0.42], [level, level], "k:", linewidth=1.2, label="chance" if x == 0 else None)
    axis.set(title=title, xticks=range(len(groups)), xticklabels=groups)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (("curves", "figure of a distillation's curves and results"),
                       ("clips", "figure of the clips that teacher and student retrieve for held-out captions")):
        command = commands.add_parser(name, help=help)
        command.add_argument("run", nargs="?", help="folder of a finished run; default: the newest in out/")
        command.add_argument("--out", default=f"docs/{name}.png", help="the PNG to write")
    args = parser.parse_args(argv)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    {"curves": curves, "clips": clips}[args.command](args.run or newest_run(), args.out)


if __name__ == "__main__":
    main()
