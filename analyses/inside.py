"""What happens inside of models: attention maps, distances of weights, activation patterns of neurons."""
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
import data
from analyses.closing import open_judge, read_heads, short_names, students_of
from analyses.figures import STYLES, grid, save
from analyses.sentences import encode, sample_sentences
from parts.vocab import OPENAI_CLIP
from parts.weights import config_and_vocab, is_clip, load_bert, load_xdbert, open_clip
from run import model_folder, read_run

# ---------------------------------------------------------------------------- what models read

LONGEST = 40  # tokens of a sentence, so that a figure can name them


def read_words(text, vocab, room):
    """Ids of a text (n,), and for each the word between spaces that it is of (n,); at most `room`."""
    pieces = encode(text.split(), vocab, "--sentence", 0)
    lengths = [len(ids) for ids in pieces]
    if not 0 < sum(lengths) <= room:
        raise SystemExit(f"--sentence: has {sum(lengths)} tokens; give one that has 1 to {room}")
    return np.concatenate(pieces), np.repeat(np.arange(len(pieces)), lengths)


def means_over(texts):
    """The line under a table that says so."""
    return f"\nmeans over {len(texts)} sentence" + "s" * (len(texts) > 1)


def tick_tokens(axis, x=(), y=()):
    """Names the columns and rows of a map by tokens, or leaves them without names."""
    axis.set_xticks(range(len(x)), x, fontsize=7, rotation=90, parse_math=False)
    axis.set_yticks(range(len(y)), y, fontsize=7, parse_math=False)
    axis.tick_params(length=0)


# ---------------------------------------------------------------------------- attention

DIRECTIONS = {"text": "words over CLIP", "clip": "CLIP over words"}


def attention_map(module, x, other, mask=None):
    """Weights of a model.CrossAttention, which its fused kernel hides: softmax(q k' / sqrt(D)) in each head.

    x (B, T, C): the queries' stream; other (B, S, C'): the keys'; mask bool (B, 1, 1, S) or None = all real
    -> (B, H, T, S). Rows sum to 1, padding gets 0.
    """
    q, k = module.query(x), module.key_value(other).chunk(2, -1)[0]
    q, k = (y.unflatten(-1, (module.heads, -1)).transpose(1, 2) for y in (q, k))  # (B, H, T or S, D)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


@torch.no_grad()
def attention_maps(model, **batch):
    """Of each cross-modal layer {"text": [(B, H, T, R), words over CLIP's tokens], "clip": [(B, H', R, T)]}.

    model: XDBERT; batch: what its `streams` reads.
    """
    maps, hooks = {side: [] for side in DIRECTIONS}, []
    for side, found in maps.items():
        for half in getattr(model.cross, side):
            hooks.append(half.cross.register_forward_hook(
                lambda module, args, output, found=found: found.append(attention_map(module, *args))))
    try:
        model.streams(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def spread(maps, same):
    """How each head spends its attention. maps (H, T, S); same (T, S) bool: tokens of the same word.

    -> {"entropy": -sum_s a ln a in nats, mean over the queries; "share": of ln S, 1 = uniform; "mutual":
    information of query and key in nats, the entropy of the mean row less "entropy", 0 = all queries attend
    alike; "top": the largest sum_t a / T, what all queries together spend on one key; "key": which; "same":
    on the tokens of the query's own word, mean over queries that are words; "uniform": the same of uniform
    attention}, (H,) each.
    """
    mean = maps.mean(1)  # (H, S)
    entropy, (top, key) = torch.special.entr(maps).sum(-1).mean(-1), mean.max(-1)
    words = same.any(-1)
    return {"entropy": entropy, "share": entropy / math.log(maps.shape[-1]),
            "mutual": torch.special.entr(mean).sum(-1) - entropy, "top": top, "key": key,
            "same": (maps * same).sum(-1)[:, words].mean(-1),
            "uniform": same[words].float().mean().expand(len(maps))}


def open_cross(run):
    """A run of adapt_xdbert.py: its model, both vocabularies, its flags."""
    config, _ = read_run(run)
    folder = Path(run) / "model"
    needed = {"cross_layers", "objective", "train", "val", "block_size"}
    if not needed <= config["config"].keys() or not (folder / "cross.json").exists():
        raise SystemExit(f"{run}: has no cross-modal encoder; give a run of adapt_xdbert.py that has one, so "
                         "without --no_clip and --cross_layers 0")
    vocab, tower = (config_and_vocab(path, weights=False)[1] for path in (folder, folder / "clip"))
    return SimpleNamespace(model=load_xdbert(folder), vocab=vocab, tower=tower,
                           cfg=SimpleNamespace(**config["config"]))


def read_pair(text, opened):
    """A sentence -> (what XDBERT.streams reads, {side: its tokens as text}, same word (T, R) bool)."""
    vocab, tower, positions = opened.vocab, opened.tower, opened.model.clip.config.positions
    ids, word = read_words(text, vocab, min(LONGEST, opened.cfg.block_size) - 2)
    clip_ids, clip_word = read_words(text, tower, LONGEST)
    begin = np.arange(0, len(clip_ids), positions - 2)  # of CLIP's segments
    batch = data.segment_batch(clip_ids, begin[None], len(clip_ids) - begin[None], tower, positions)
    ids, word = np.array([vocab.cls, *ids, vocab.sep]), np.array([-1, *word, -1])
    clip_word = np.concatenate([[-1, *clip_word[a:a + positions - 2], -1] for a in begin])
    same = (word[:, None] == clip_word) & (clip_word >= 0)
    if not same.any():
        raise SystemExit("--sentence: has no word that both tokenizers read; give another one")
    read = batch["clip_ids"].flatten()[batch["clip_place"][0]]
    tokens = {"text": [vocab.decode([i]) for i in ids], "clip": [tower.decode([i]) for i in read]}
    return {"ids": torch.from_numpy(ids)[None], **batch}, tokens, torch.from_numpy(same)


def measure_attention(name, opened, texts):
    """Means of `spread` over texts -> (a row for each layer, direction and head, and one for all heads; the
    first text's tokens and maps)."""
    measured, first, rows = {}, None, []
    for text in common.progress(texts, len(texts), " sentences", name):
        batch, tokens, same = read_pair(text, opened)
        maps = attention_maps(opened.model, **batch)
        first = first or (tokens, maps)
        for layer in range(len(maps["text"])):
            for side, other, own in (("text", "clip", same), ("clip", "text", same.T)):
                found = {key: x.tolist() for key, x in spread(maps[side][layer][0], own).items()}
                found["key"] = [tokens[other][key] for key in found["key"]]
                measured.setdefault((layer, side), []).append(found)
    # a last layer that no term reads keeps its first, random weights: adapt_xdbert.Adapter
    reads = {"text": {"mlm", "match"}, "clip": {"cliptc"}}
    chosen, last = set(opened.cfg.objective.split("+")), len(opened.model.cross.text) - 1
    for (layer, side), every in measured.items():
        means = {key: np.mean([found[key] for found in every], 0) for key in every[0] if key != "key"}
        heads = len(every[0]["key"])
        for head in (*range(heads), slice(None)):
            keys = Counter(np.ravel([np.array(found["key"])[head] for found in every]).tolist())
            key, often = keys.most_common(1)[0]
            rows.append({"run": name, "layer": layer + 1, "direction": DIRECTIONS[side],
                         "trained": layer < last or not chosen.isdisjoint(reads[side]),
                         "head": "all" if isinstance(head, slice) else head + 1,
                         **{key: float(np.mean(x[head])) for key, x in means.items()},
                         "key": key, "key_share": often / keys.total()})
    return rows, first


def attention(runs, sentence=None, out=""):
    """Table and PNG of the attention between both streams of XDBERTs (section 5 and Table 9 of the paper).

    The paper's claim: without CLIPTC it settles on common trivial words. The table's numbers are means over
    the sentence, or over 100 sentences of the first run's held-out text, whose first is drawn.
    """
    texts, rows, drawn = [sentence][:sentence is not None], [], {}
    for name, run in dict(zip(short_names(runs), runs)).items():
        opened = open_cross(run)
        cfg = opened.cfg
        texts = texts or sample_sentences(data.TextBlocks(cfg.train, cfg.block_size, "val", cfg.val), 100)
        found, drawn[name] = measure_attention(name, opened, texts)
        rows += found
    figure, maps = draw_maps(drawn, rows)
    text = "\n".join([
        "\n\n".join(attention_table(name, [row for row in rows if row["run"] == name]) for name in drawn)
        + means_over(texts),
        "entropy: of a query's attention, in nats and as a share of the uniform one's",
        "by query: what it tells of the key, in nats, 0 = all queries attend alike",
        "on one key: the share of the key that gets most, and which that is most often",
        "same word: the share of the query's own word; untrained: no term of the run reads this half"])
    save(figure, out, {"sentences": texts, "rows": rows, "maps": maps}, text)


def attention_table(run, rows):
    """Text of a run's rows of measure_attention."""
    lines = [[run, "layer", "head", "entropy", "of uniform", "by query", "on one key", "most often",
              "same word", "if uniform"]]
    for row in rows:
        lines.append([row["direction"] + ", untrained" * (not row["trained"]), str(row["layer"]),
                      str(row["head"]), f"{row['entropy']:.2f}", f"{row['share']:.0%}",
                      f"{row['mutual']:.2f}", f"{row['top']:.0%}", f"{row['key']} {row['key_share']:.0%}",
                      f"{row['same']:.0%}", f"{row['uniform']:.0%}"])
    return common.table(lines)


def draw_maps(drawn, rows):
    """(figure, [what its panels show]) of {run: (tokens, maps)}: a row a run, direction and layer, a column a
    head."""
    other, panels = {"text": "clip", "clip": "text"}, {}
    for row in rows:
        if row["head"] != "all":
            tokens, maps = drawn[row["run"]]
            side = next(side for side in DIRECTIONS if DIRECTIONS[side] == row["direction"])
            panels.setdefault((row["run"], side, row["layer"]), []).append(
                row | {"queries": tokens[side], "keys": tokens[other[side]],
                       "weights": maps[side][row["layer"] - 1][0, row["head"] - 1].tolist()})
    runs = list(drawn)
    panels = [panels[key] for key in sorted(panels, key=lambda x: (runs.index(x[0]), x[1] == "clip", x[2]))]
    flat = [panel for row in panels for panel in row]
    most = max(14, *(len(panel["keys"]) for panel in flat))
    figure, axes = grid(len(panels), max(map(len, panels)), 0.9 + 0.11 * most, 0.9 + 0.11 * most)
    # a single weight near 1 would pale all others
    peak = np.quantile(np.concatenate([np.ravel(panel["weights"]) for panel in flat]), 0.995)
    for i, (line, row) in enumerate(zip(axes, panels)):
        for axis in line[len(row):]:
            axis.set_visible(False)
        last = panels[i + 1:i + 2] == [] or panels[i + 1][0]["keys"] != row[0]["keys"]
        for axis, panel in zip(line, row):
            image = axis.imshow(panel["weights"], cmap="Blues", vmin=0, vmax=peak, aspect="auto")
            tick_tokens(axis, panel["keys"] if last else (), panel["queries"] if axis is line[0] else ())
            axis.set_title(f"layer {panel['layer']}, head {panel['head']}"
                           + ", untrained" * (not panel["trained"]), fontsize=8)
        line[0].set_ylabel(f"{row[0]['run']}\n{row[0]['direction']}", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention weight (a row sums to 1)", shrink=0.4, extend="max")
    figure.suptitle("Cross-modal attention: rows are queries, columns keys")
    return figure, [{key: panel[key] for key in ("run", "direction", "layer", "head", "queries", "keys",
                                                 "weights")} for panel in flat]


# ---------------------------------------------------------------------------- drift

# "Diff. to BERT weight" of visual-text transformers, XDBERT Table 7 after Tan and Bansal 2020; the metric is
# not printed there, so they are shown beside ours and cannot be matched
TABLE_7 = {"VL-BERT": 6.4e-3, "VisualBERT": 6.5e-3, "Oscar": 41.6e-3, "LXMERT": 42.0e-3}


def open_encoder(path):
    """(state dict, hash of the vocabulary) of a BERT, an ELECTRA or a CLIP text tower, ours or others'."""
    if is_clip(path, "model"):
        model, _, vocab = open_clip(path, "model", quick_gelu=True)  # no matter for weights
        return model.state_dict(), vocab.hash if vocab else OPENAI_CLIP
    folder = model_folder(path, "model")
    return load_bert(folder, "trained").state_dict(), config_and_vocab(folder, weights=False)[1].hash


def distances(original, adapted):
    """{part: {"rms", "relative", "parameters"}} of the tensors that both state dicts have.

    rms = |B - A| / sqrt(n), the root mean square of the parameters' differences; relative = |B - A| / |A|,
    Frobenius norms. Parts: embeddings, layer 1 .., pooler, output (CLIP's last norm and projection), all.
    """
    sums = {}
    for name in sorted(original.keys() & adapted.keys()):  # in order: equal sums to the bit
        a, b = original[name].double(), adapted[name].double()
        head, *rest = name.split(".")
        part = f"layer {int(rest[0]) + 1}" if head == "layers" else (
            head if head in ("embeddings", "pooler") else "output")
        for key in (part, "all"):
            sums[key] = sums.get(key, 0) + np.array([(b - a).square().sum(), a.square().sum(), a.numel()])

    def order(part):
        names = ("embeddings", "layer", "output", "pooler", "all")
        return names.index(part.split()[0]), int((part.split() + ["0"])[1])
    return {part: {"rms": math.sqrt(gap / n), "relative": math.sqrt(gap / own) if own else None,
                   "parameters": int(n)}
            for part, (gap, own, n) in ((part, sums[part].tolist()) for part in sorted(sums, key=order))}


def drift(original, adapted, out=""):
    """Table and PNG of the distance of adapted from original weights by layer (after XDBERT Table 7).

    original: a run or a model's folder; adapted: several. What only one of two models has, as a pooler, does
    not count.
    """
    weights, vocab = open_encoder(original)
    found, models = {}, dict(zip(short_names(adapted), adapted))
    for name, path in common.progress(models.items(), len(models), " models", "drift"):
        other, other_vocab = open_encoder(path)
        for key in sorted(weights.keys() | other.keys()):
            shapes = [tuple(x[key].shape) if key in x else "missing" for x in (weights, other)]
            if shapes[0] != shapes[1] and not (key.startswith("pooler.") and "missing" in shapes):
                raise SystemExit(f"{path}: not of the shape of {original} ({key} is {shapes[1]}, there "
                                 f"{shapes[0]}); compare a model with what it was adapted from")
        if other_vocab != vocab:
            raise SystemExit(f"{path}: has another vocabulary than {original}; compare a model with what it "
                             "was adapted from")
        found[name] = distances(weights, other)
    parts = [part for part in max(found.values(), key=len) if part != "all"]

    rows = [["", "part", "parameters", "root mean square", "relative"]]
    for name, one in found.items():
        for part, x in one.items():
            relative = "-" if x["relative"] is None else f"{x['relative']:.2%}"
            rows.append([name, part, f"{x['parameters']:,}", f"{x['rms']:.2e}", relative])
    rows += [[f"{name}, XDBERT Table 7", "all", "-", f"{value:.2e}", "-"] for name, value in TABLE_7.items()]

    figure, (axes,) = grid(1, 2, 5.2, 3.6, frame=False)
    titles = {"rms": "root mean square of B - A", "relative": "|B - A| / |A|, %"}
    for axis, (key, title) in zip(axes, titles.items()):
        for i, (name, one) in enumerate(found.items()):
            at = [x for x, part in enumerate(parts) if one.get(part, {}).get(key) is not None]
            axis.plot(at, [one[parts[x]][key] * (100 if key == "relative" else 1) for x in at],
                      STYLES[i % len(STYLES)], marker="osv^Dx+*"[i % 8], label=name)
        axis.set(title=f"A = {short_names([original])[0]}", ylabel=title, ylim=(0, None))
        axis.set_xticks(range(len(parts)), parts, rotation=0 if len(parts) < 6 else 90, fontsize=8)
    axes[0].legend()
    save(figure, out, {"original": str(original), "adapted": found, "paper": TABLE_7}, common.table(rows))


# ---------------------------------------------------------------------------- neurons


def patterns(h):
    """(T, C) -> (T, C): each neuron's activations over the tokens, L2-normalised as in losses.nst."""
    return h / h.norm(dim=0).clamp(min=1e-6)


def kernel(s, t):
    """exp(-|s_i - t_j|^2 / 2), VidLanKD's Gaussian kernel of sigma 1: patterns (T, d), (T, d') -> (d, d')."""
    return torch.cdist(s.T, t.T, compute_mode="donot_use_mm_for_euclid_dist").square().div(-2).exp()


def match(s, t):
    """Squared MMD of two samples of patterns (VidLanKD Eq. 7), and the nearest of s to each of t.

    s (T, d_s), t (T, d_t) -> (MMD^2, kernel values of the nearest (d_t,), which they are (d_t,)).
    """
    between = kernel(s, t)
    mmd = kernel(s, s).mean() + kernel(t, t).mean() - 2 * between.mean()
    return mmd.item(), *between.max(0)


@torch.no_grad()
def neurons(run, sentence=None, out=""):
    """Table and PNG of what NST matches (VidLanKD section 3.4, Eq. 7): activation patterns over a sentence.

    Of the teacher the neurons that vary most between the tokens; below each the neuron of the distilled
    student, behind its distillation head, and of the text-only student whose pattern has the highest kernel
    value: NST matches distributions of patterns, not one neuron with another. The numbers are means over the
    sentence, or over 100 sentences of the held-out text, whose first is drawn; chance: the student's tokens
    are rotated by half of the sentence.
    """
    judge = open_judge(run, torch.device("cpu"))
    if not judge.bert:
        raise SystemExit(f"{run}: no teacher beside it that reads the same words; give a run of distill.py "
                         "whose --teacher does")
    texts = sample_sentences(judge.val, 100) if sentence is None else [sentence]
    models = {name: (load_bert(folder / "model"), read_heads(folder)[1]("nst"))
              for name, folder in students_of(run, judge).items()}
    vocab, measured, drawn = judge.val.vocab, {name: [] for name in models}, None
    for text in common.progress(texts, len(texts), " sentences", "patterns"):
        ids, _ = read_words(text, vocab, min(LONGEST, judge.cfg.block_size) - 2)
        ids = torch.tensor([[vocab.cls, *ids, vocab.sep]])
        h = judge.bert(ids)[0].double()
        t, students = patterns(h), {name: patterns(head(bert(ids))[0].double())
                                    for name, (bert, head) in models.items()}
        found = {name: match(s, t) for name, s in students.items()}
        drawn = drawn or ([vocab.decode([i]) for i in ids[0]], h, t, students, found)
        for name, (mmd, value, _) in found.items():
            chance = kernel(students[name].roll(len(t) // 2, 0), t).max(0).values
            measured[name].append([mmd, value.mean().item(), chance.mean().item()])
    means = {name: dict(zip(("mmd", "nearest", "chance"), np.mean(x, 0).tolist()))
             for name, x in measured.items()}
    lines = [["to the teacher's", "squared MMD", "kernel value of the nearest neuron", "by chance"]]
    lines += [[name, f"{x['mmd']:.2e}", f"{x['nearest']:.3f}", f"{x['chance']:.3f}"]
              for name, x in means.items()]

    tokens, h, t, students, found = drawn
    panels = []
    for j in h.var(0).topk(min(6, h.shape[1])).indices.tolist():
        panels.append([{"model": "teacher", "neuron": j, "pattern": t[:, j].tolist()}])
        for name, (_, value, nearest) in found.items():
            i = nearest[j].item()
            panels[-1].append({"model": name, "neuron": i, "kernel": value[j].item(),
                               "pattern": students[name][:, i].tolist()})
    figure, axes = grid(len(panels), 1, 2.6 + 0.3 * len(tokens), 0.75)
    peak = max(np.abs(row["pattern"]).max() for panel in panels for row in panel)
    for axis, panel in zip(axes[:, 0], panels):
        image = axis.imshow([row["pattern"] for row in panel], cmap="PuOr", vmin=-peak, vmax=peak,
                            aspect="auto")
        tick_tokens(axis, tokens if panel is panels[-1] else (), [
            f"{row['model']} {row['neuron']}" + (f" (k = {row['kernel']:.2f})" if "kernel" in row else "")
            for row in panel])
    axes[-1, 0].set_xlabel("tokens", fontsize=8)
    figure.colorbar(image, ax=axes, label="activation, L2 norm 1 over the tokens", shrink=0.8)
    figure.suptitle("Neurons of the teacher, and the nearest of each student")
    save(figure, out, {"run": str(run), "sentences": texts, "models": means, "tokens": tokens,
                       "neurons": panels}, common.table(lines) + means_over(texts) + (
        "\nkernel: exp(-|s - t|^2 / 2) of two patterns, 1 = equal; by chance: with the student's tokens "
        "rotated"))
