"""Words: how near two models' word embeddings are (PWCCA), and whether what can be seen has improved."""
import codecs
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

import common
from analyses.answers import shared_answers
from analyses.closing import short_names
from analyses.figures import COLOURS, grid, save
from common import decode_json, keyed_uniform, open_text, print0, read_text
from parts.examples import flat
from parts.tasks import TASKS
from parts.vocab import Vocab, byte_letters, load_clip_vocab
from parts.weights import config_and_vocab, is_clip, load_bert, open_clip
from prepare.packing import read_pieces
from run import model_folder

# ---------------------------------------------------------------------------- PWCCA

# XDBERT Table 2; the paper names no word set
PAPER = {"BERT / ELECTRA": 0.5498, "BERT / CLIP": 0.4980, "ELECTRA / CLIP": 0.4645, "BERT / random": 0.3569}
SINGULAR = 1e-6  # of the largest singular value: what is below is rounding of float32 weights


def view(x):
    """x (n, d), a row a word -> (u (n, r), c (r, d)): the centred x is u c, u has orthonormal columns.

    By SVD; directions with a singular value below SINGULAR of the largest are dropped: r is the rank.
    """
    u, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    kept = s > SINGULAR * s[0]
    return u[:, kept], s[kept, None] * v[kept]


def projection_weighted_cca(first, second):
    """(PWCCA, canonical correlations rho (min r,)) of two views of the same words, as `view` makes them.

    Morcos, Raghu, Bengio 2018, Eq. 1 and section 3: PWCCA = sum_i alpha_i rho_i / sum_i alpha_i with
    alpha_i = sum_j |<h_i, x_j>|: h_i (n,) are the canonical directions of the view x of fewer dimensions, x_j
    (n,) its centred neurons. Of equally many dimensions the first view weighs, so that swapping changes the
    value a little. It is 1 where one view is an invertible linear map of the other. The correlations do not
    change under invertible maps of either view, PWCCA not under those of the view that does not weigh, nor
    under scaling; a rotation of the view that weighs changes its neurons and so the weights.
    """
    (u, c), (w, _) = sorted((first, second), key=lambda view: view[0].shape[1])
    a, rho, _ = np.linalg.svd(u.T @ w, full_matrices=False)  # directions h = u a
    alpha, rho = np.abs(a.T @ c).sum(1), np.minimum(rho, 1)
    return float(alpha @ rho / alpha.sum()), rho


def independent_level(n, width, other):
    """The PWCCA that is expected of independent Gaussians: n words, views of these widths.

    The canonical directions of a view against an independent Gaussian one are a uniformly drawn rotation,
    independent of the correlations, so the weights do not matter: PWCCA is in expectation the mean of rho,
    also where only one view is Gaussian. In the limit rho^2 follow Wachter's law (Ann. Statist. 8, 1980):
    with a = d_min / (n - 1), b = d_max / (n - 1) the density on (l-, l+) is

        sqrt((l+ - l) (l - l-)) / (2 pi a l (1 - l)),   l+- = (sqrt(a (1 - b)) +- sqrt(b (1 - a)))^2,

    and a share (a + b - 1) / a of them is 1 where that is above 0. The mean of rho^2 is b; this is the mean
    of rho, by the midpoint rule in the angle t, l = (l+ + l-) / 2 + (l+ - l-) / 2 cos t.
    """
    a, b = sorted((width / (n - 1), other / (n - 1)))
    if b >= 1:
        return 1.0
    low, high = ((math.sqrt(a * (1 - b)) + sign * math.sqrt(b * (1 - a))) ** 2 for sign in (-1, 1))
    t = (np.arange(1 << 14) + 0.5) * math.pi / (1 << 14)
    rho2, half = (high + low) / 2 + (high - low) / 2 * np.cos(t), (high - low) / 2
    below_1 = np.mean((half * np.sin(t)) ** 2 / (np.sqrt(rho2) * (1 - rho2))) / (2 * a)
    return float(below_1 + max(0.0, (a + b - 1) / a))


def word_embeddings(path, clip_vocab=""):
    """(vocabulary, word embeddings (V, width)) of a run, a folder of BERT, ELECTRA or CLIP, or OpenAI's file,
    whose vocabulary is `clip_vocab`: that or its path.

    Those of BERT and ELECTRA before any projection, without position, segment and LayerNorm.
    """
    if is_clip(path, "MODEL"):
        model, _, vocab = open_clip(path, "MODEL", quick_gelu=True)  # embeddings come before any activation
        if vocab is None and not clip_vocab:
            raise SystemExit(f"{path}: a file without its vocabulary; give that as --clip_vocab, OpenAI's is "
                             "bpe_simple_vocab_16e6.txt.gz")
        if vocab is None:
            vocab = load_clip_vocab(clip_vocab) if isinstance(clip_vocab, str) else clip_vocab
    else:
        folder = model_folder(path, "MODEL")
        vocab, model = config_and_vocab(folder)[1], load_bert(folder)
    table = model.embeddings.word.weight.detach().numpy()
    if vocab.size != len(table):
        raise SystemExit(f"--clip_vocab {clip_vocab}: {vocab.size:,} tokens, {path} has {len(table):,}; give "
                         "the vocabulary of its training")
    if not np.isfinite(table).all():
        raise SystemExit(f"{path}: a word embedding is not finite; fetch or save the model again")
    return vocab, table


def whole_words(vocab):
    """What a vocabulary holds whole: texts that it reads as one piece, in the order of ids.

    Without special tokens and [unusedN]; pieces that continue a word or, of CLIP, do not end one are none.
    """
    texts = vocab.tokens
    if not isinstance(vocab, Vocab):  # its letters stand for bytes
        byte = {letter: b for b, letter in byte_letters().items()}
        texts = [bytes(map(byte.get, token.removesuffix("</w>"))).decode(errors="replace") for token in texts]
    return [text for i, (text, ids) in enumerate(zip(texts, vocab.encode(texts)))
            if ids == [i] and i not in vocab.specials]


def unread_words(words, vocab):
    """Those that a vocabulary cannot write without special tokens."""
    return {word for word, ids in zip(words, vocab.encode(words))
            if not ids or not set(ids).isdisjoint(vocab.specials)}


def vectors_of(words, vocab, table):
    """Words -> (n, width), float64: of a word of several pieces the mean of theirs."""
    return np.stack([table[ids].mean(0, dtype=np.float64) for ids in vocab.encode(words)])


def compare_embeddings(first, second, words=None, number=0):
    """{"pwcca", "random": [each against a Gaussian matrix as wide as the other], "level", "words", ..} of two
    models, each (name, vocabulary, embeddings (V, width)); words: default those that both hold whole."""
    models = (first, second)
    if words is None:
        other = set(whole_words(second[1]))
        words = [word for word in whole_words(first[1]) if word in other]
    name = f"{first[0]} / {second[0]}"
    if unread := unread_words(words, first[1]) | unread_words(words, second[1]):
        print0(f"{name}: {len(unread):,} of the words are left out, such as {min(unread)!r}: not both can "
               "read them")
        words = [word for word in words if word not in unread]
    n, widths = len(words), [table.shape[1] for *_, table in models]
    if n < max(widths) + 2:
        raise SystemExit(f"{name}: {n:,} words for a width of {max(widths)}, and with so few PWCCA is 1 "
                         f"between any two models; at least {max(widths) + 2:,} are needed, and several "
                         "times that to tell something: give others as --words")
    if n - 1 < sum(widths):
        print0(f"{name}: {n:,} words for widths of {widths[0]} and {widths[1]}: so few that "
               f"{min(min(widths), sum(widths) - n + 1)} correlations are 1 between any two models")
    rng = np.random.default_rng([0, number])
    x, y = (view(vectors_of(words, *model[1:])) for model in models)
    if not (x[0].size and y[0].size):
        raise SystemExit(f"{name}: the word embeddings of one are all the same; give a trained model")
    noise = [view(rng.standard_normal((n, width))) for width in widths]
    value, rho = projection_weighted_cca(x, y)
    ranks = [x[0].shape[1], y[0].shape[1]]
    return {"pwcca": value, "random": [projection_weighted_cca(x, noise[1])[0],
                                       projection_weighted_cca(noise[0], y)[0]],
            "level": independent_level(n, *ranks), "words": n, "widths": widths, "ranks": ranks,
            "mean_squared_correlation": float(np.mean(rho ** 2)), "mean_squared_level": max(ranks) / (n - 1)}


def pwcca(models, words="", clip_vocab="", out=""):
    """Projection-weighted CCA of the models' word embeddings, each pair a row and a bar (XDBERT Table 2).

    models: paths as for --model. words: a file, one a line; default those that both vocabularies hold whole.
    Beside each pair stand its random baselines (each model against a Gaussian matrix as wide as the other)
    and `independent_level`.
    """
    if len(models) < 2:
        raise SystemExit(f"MODEL {models[0]}: is alone; give two or more to compare")
    names = short_names(models)
    opened = [word_embeddings(path, clip_vocab) for path in models]
    lines = map(str.strip, read_text(words).split("\n")) if words else ()
    chosen = list(dict.fromkeys(filter(None, lines))) or None
    pairs, found = list(itertools.combinations(range(len(models)), 2)), {}
    for number, (i, j) in enumerate(common.progress(pairs, len(pairs), " pairs", "PWCCA")):
        both = [(names[k], *opened[k]) for k in (i, j)]
        found[f"{names[i]} / {names[j]}"] = compare_embeddings(*both, chosen, number)
    rows = [["word embeddings", "PWCCA", "random 1st / 2nd", "independent", "words", "widths"]]
    rows += [[name, f"{row['pwcca']:.4f}", " / ".join(f"{value:.4f}" for value in row["random"]),
              f"{row['level']:.4f}", f"{row['words']:,}", " / ".join(map(str, row["widths"]))]
             for name, row in found.items()]
    rows += [[f"the paper's {name}", f"{value:.4f}", "", "", "", ""] for name, value in PAPER.items()]
    note = ("random: the first, the second model against a Gaussian matrix as wide as the other\n"
            "independent: expected of two Gaussians, from the number of words and the widths alone\n"
            "the paper names no words: its figures are shown, not matched")
    save(draw_pwcca(found), out, {"pairs": found, "paper": PAPER}, f"{common.table(rows)}\n\n{note}")


def draw_pwcca(found):
    """Bars of the pairs with their random baselines and levels, and those of the paper."""
    height = max(len(found), len(PAPER))  # in bars
    figure, axes = grid(1, 2, 5.6, 1.5 + 0.55 * height, frame=False)
    for axis, title, values in zip(axes[0], ("measured", "XDBERT Table 2 (its words are not named)"),
                                   ({name: row["pwcca"] for name, row in found.items()}, PAPER)):
        places = np.arange(len(values))
        axis.barh(places, list(values.values()), 0.55, color=COLOURS[4], edgecolor="white", label="PWCCA",
                  hatch="//" if values is PAPER else "")
        for y, value in enumerate(values.values()):
            axis.text(1.02, y, f"{value:.3f}", va="center", fontsize=9)
        axis.set(title=title, yticks=places, yticklabels=[name.replace(" / ", " /\n") for name in values],
                 xlim=(0, 1.16), xticks=np.linspace(0, 1, 6), ylim=(height - 0.5, -0.5),
                 xlabel="PWCCA (1 = equal up to a linear map)")
        axis.tick_params(labelsize=8)
    for y, row in enumerate(found.values()):
        axes[0, 0].plot(row["random"], [y, y], "D", color=COLOURS[5], markersize=5,
                        label="each against random" if y == 0 else None)
        axes[0, 0].plot([row["level"]] * 2, [y - 0.38, y + 0.38], "k--", linewidth=1.5,
                        label="independent Gaussians" if y == 0 else None)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# ---------------------------------------------------------------------------- visually-grounded ratio

# English function words. The list holds every word that XDBERT's Appendix D prints in brackets and none that
# it prints without, such as "also", "would", "one", "every" or "across"
STOP_WORDS = frozenset("""
a an the this that these those some any all both each few more most other such same own no nor not only
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her
hers herself it its itself they them their theirs themselves who whom whose which what when where why how
about above after against at before below between by down during for from in into of off on out over through
to under until up with and but or if as because while than so then
am is are was were be been being have has had having do does did doing can will should
again further here there now once just too very s t d ll m re ve don
""".split())
COCO_CAPTIONS = 591753  # in COCO's 2014 training and validation sets, to which 100 occurrences belong


def caption_lines(path):
    """Yields ([caption], bytes read) of a file of captions; memory stays flat.

    COCO's annotations ({"annotations": [{"caption"}]}), or what packing.read_pieces reads: text with one a
    line, HowTo100M's caption.json, JSON lines.
    """
    with open_text(path) as f:
        head = f.read(1 << 12)
    if re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"(info|images|licenses|annotations|type)"\s*:', head):
        yield from coco_captions(path)
        return
    for text, size in read_pieces(path):
        yield [line for line in text.split("\n") if line.strip()], size


def coco_captions(path):
    """caption_lines of COCO's annotations, which are read one by one."""
    decoder, text, inside = codecs.getincrementaldecoder("utf-8-sig")(), "", False
    begin, item = re.compile(r'"annotations"\s*:\s*\['), re.compile(r"[\s,]*(?=\{)")
    advice = "give COCO's captions_train2014.json, or text with a caption a line"
    with open_text(path) as f:
        try:
            while (chunk := f.read(1 << 20)) and len(text) < 1 << 24:  # no annotation is so long
                text, found, at = text + decoder.decode(chunk), [], 0
                if not inside and (match := begin.search(text)):
                    inside, at = True, match.end()
                while inside and (match := item.match(text, at)):
                    try:
                        value, at = decode_json(text, match.end())
                    except json.JSONDecodeError:  # not whole in the buffer yet
                        break
                    found.append(" ".join(value["caption"].split()))
                yield found, len(chunk)
                text = text[at:] if inside else text[-1000:]
                if inside and text.lstrip().startswith("]"):
                    return
        except (ValueError, KeyError, AttributeError) as error:
            raise SystemExit(f"{path}: an annotation without a caption ({error!r}); {advice}") from None
    raise SystemExit(f"{path}: has no whole list of annotations; {advice}")


def count_pieces(path, vocab):
    """(occurrences of each piece of the vocabulary (V,), number of captions) of a file of captions."""
    counts, n = np.zeros(vocab.size, np.int64), 0
    with common.progress(None, os.path.getsize(path), "B", "captions", unit_scale=True) as bar:
        for texts, size in caption_lines(path):
            counts += np.bincount(flat(vocab.encode(texts)), minlength=vocab.size)
            n += len(texts)
            bar.update(size)
    if not counts.any():
        raise SystemExit(f"--captions {path}: holds no caption; give a caption a line")
    return counts, n


def mark(text, vocab, seen):
    """[(piece, "grounded", "other" or "")] of a text; "" are stop words, punctuation and special tokens.

    seen: bool (V,), the pieces that captions hold often enough. A stop word is a whole word: the pieces of
    other words are none.
    """
    words = []
    for i in vocab.encode([text])[0]:
        if vocab.tokens[i].startswith("##") and words:
            words[-1].append(i)
        else:
            words.append([i])
    marked = []
    for ids in words:
        word = "".join(vocab.tokens[i].removeprefix("##") for i in ids)
        neither = (word.lower() in STOP_WORDS or not any(map(str.isalnum, word))
                   or not set(ids).isdisjoint(vocab.specials))
        marked += [(vocab.tokens[i], "" if neither else "grounded" if seen[i] else "other") for i in ids]
    return marked


def grounded_ratio(marked):
    """grounded / (grounded + other) over word pieces (XDBERT Figure 4, Appendix D); NaN where both are 0."""
    kinds = [kind for _, kind in marked]
    grounded, other = kinds.count("grounded"), kinds.count("other")
    return grounded / (grounded + other) if grounded + other else math.nan


def permutation_p(x, y, rounds=9999):
    """Two-sided p of the difference of two means, NaN without both: the share of random divisions of x and y
    together into groups of the same sizes whose means differ at least as much, the given one counted in."""
    both, n = np.concatenate([x, y]), len(x)
    if not (len(x) and len(y)):
        return math.nan
    observed, as_far = abs(np.mean(x) - np.mean(y)), 1
    chunk = max(1, (1 << 20) // len(both))
    for start in range(0, rounds, chunk):
        draw = np.arange(start, min(rounds, start + chunk))[:, None]
        order = np.argsort(keyed_uniform("permutation", draw, np.arange(len(both))), axis=1)
        shuffled = both[order]
        far = np.abs(shuffled[:, :n].mean(1) - shuffled[:, n:].mean(1))
        as_far += int((far >= observed - 1e-12).sum())
    return as_far / (rounds + 1)


GROUPS = ("improved", "on par", "worsened")


def ratios_by_gain(one, other, vocab, seen):
    """The ratios of a task's examples by GROUPS, from two models' Answers of as many runs.

    -> {"runs", "groups": {group: {"examples": numbers, "ratios"}}, "p", "shown": {group: an example}}. Shown
    is the first of those with the largest difference, of those on par the first. Examples without a word have
    no ratio and are in no group.
    """
    right = one.right.sum(0), other.right.sum(0)  # (n,) each
    gain = right[1] - right[0]
    ratios = [grounded_ratio([piece for text in one.texts(i) for piece in mark(text, vocab, seen)]) for i in
              common.progress(range(len(gain)), len(gain), " examples", f"pieces of {one.task.title}")]
    groups, shown = {}, {}
    for group, sign in zip(GROUPS, (1, 0, -1)):
        chosen = [i for i in np.flatnonzero(np.sign(gain) == sign).tolist() if not math.isnan(ratios[i])]
        groups[group] = {"examples": chosen, "ratios": [ratios[i] for i in chosen]}
        if chosen:
            i = max(chosen, key=lambda i: abs(gain[i]))
            marked = [mark(text, vocab, seen) for text in one.texts(i)]
            kinds = [kind for text in marked for _, kind in text]
            shown[group] = {"example": i, "A": int(right[0][i]), "B": int(right[1][i]), "ratio": ratios[i],
                            "grounded": kinds.count("grounded"), "other": kinds.count("other"),
                            "texts": marked}
    return {"runs": len(one.runs), "groups": groups, "shown": shown,
            "p": permutation_p(groups["improved"]["ratios"], groups["worsened"]["ratios"])}


def shown_text(title, group, one, runs, bold):
    """An example as in the paper's Appendix D: grounded pieces bold or in stars, stop words in brackets."""
    left, right = ("\033[1m", "\033[0m") if bold else ("*", "*")
    form = {"grounded": f"{left}{{}}{right}", "other": "{}", "": "({})"}
    count = f"{one['grounded']}/({one['grounded']}+{one['other']})"
    return "\n  ".join([
        f"{title}, {group}: example {one['example'] + 1}, answered correctly: A {one['A']}/{runs}, B "
        f"{one['B']}/{runs}; visually-grounded ratio {count} = {one['ratio']:.4f}",
        *(" ".join(form[kind].format(piece) for piece, kind in text) for text in one["texts"])])


def grounded(a, b, task="", captions="", min_count=None, data_dir="", out=""):
    """Visually-grounded ratio of the examples that B improves on A and of those that it worsens (XDBERT
    Figure 4, Appendix D): a box plot, a row and three marked-up examples a task.

    a, b: folders of finetune.py's runs, of a task or a model; compared are the seeds that both have. task:
    one; default all that both have. An example is improved where B is right in more runs than A, worsened
    where in fewer. A piece is grounded if it is no stop word and occurs more than `min_count` times in the
    captions; default 100 per COCO's 591,753, in proportion where the file has fewer. captions: see
    caption_lines; default the demo world's own. Pieces are those of the vocabulary of A's runs. The dev set
    is the task's main one, on the demo that of held-out nouns.
    """
    if min_count is not None and not 0 <= min_count < math.inf:
        raise SystemExit(f"--min_count {min_count:g}: must be 0 or more")
    if Path(a).resolve() == Path(b).resolve():
        raise SystemExit(f"{a}: is given twice; give the runs of two models to compare")
    pairs = shared_answers(a, b, ("classify", "choice", "span"), task, data_dir)
    first, _ = next(iter(pairs.values()))
    if not (captions or first.task.demo):
        raise SystemExit("--captions is missing: give COCO's captions_train2014.json, or text with a caption "
                         "a line")
    captions = captions or first.path.parents[2] / "caption.json"
    run, flags, _ = next(iter(first.runs.values()))
    folder = run / "model" if (run / "model").exists() else str(flags.get("model") or flags.get("cross"))
    vocab = config_and_vocab(model_folder(folder, str(run)), weights=False)[1]
    if not isinstance(vocab, Vocab):
        raise SystemExit(f"{a}: reads CLIP's pieces, the ratio counts BERT's; give the runs of a BERT as A")
    counts, n = count_pieces(captions, vocab)
    least = 100 * min(1, n / COCO_CAPTIONS) if min_count is None else min_count
    print0(f"grounded: no stop word, and more than {round(least, 2):g} occurrences in the {n:,} captions of "
           f"{captions}" + f" (100 per {COCO_CAPTIONS:,})" * (min_count is None))
    results = {name: ratios_by_gain(*pair, vocab, counts > least) for name, pair in pairs.items()}
    legend = (f"A = {a}, B = {b}; improved: B is right in more of the runs\np: permutation test of the means "
              "of improved and worsened; below, *grounded* pieces and (stop words)")
    examples = [shown_text(TASKS[name].title, group, one, result["runs"], sys.stdout.isatty())
                for name, result in results.items() for group, one in result["shown"].items()]
    found = {"A": str(a), "B": str(b), "captions": str(captions), "n_captions": n, "min_count": least,
             "tasks": results}
    save(draw_grounded(results), out, found, "\n\n".join([grounded_table(results), legend, *examples]))


def grounded_table(results):
    """Text of the table: examples, mean and median ratio of each group."""
    def cell(ratios):
        return f"{len(ratios):,}: {np.mean(ratios):.4f} / {np.median(ratios):.4f}" if ratios else "0: - / -"
    rows = [["n: mean / median ratio", "runs", *GROUPS, "p"]]
    for name, result in results.items():
        p = "-" if math.isnan(result["p"]) else f"{result['p']:.4f}"
        rows.append([TASKS[name].title, str(result["runs"]),
                     *(cell(result["groups"][group]["ratios"]) for group in GROUPS), p])
    return common.table(rows)


def draw_grounded(results):
    """A panel a task: box, mean and points of the ratios of improved and of worsened examples."""
    columns = min(4, len(results))
    figure, axes = grid(-(-len(results) // columns), columns, max(2.9, 5 / columns), 3.6, frame=False)
    for axis in axes.flat[len(results):]:
        axis.set_axis_off()
    for axis, (name, result) in zip(axes.flat, results.items()):
        p = "" if math.isnan(result["p"]) else f" (p = {result['p']:.2g})"
        axis.set(title=f"{TASKS[name].title}{p}", ylim=(-0.03, 1.03))
        for x, (group, colour, marker) in enumerate(zip(GROUPS[::2], COLOURS[::5], "o^")):
            ratios = np.array(result["groups"][group]["ratios"])
            jitter = 0.3 * (keyed_uniform("jitter", x, np.arange(len(ratios))) - 0.5)
            axis.plot(x + jitter, ratios, marker, color=colour, markersize=3, alpha=0.35, zorder=1)
            if len(ratios):
                axis.boxplot(ratios, positions=[x], widths=0.5, showmeans=True, showfliers=False,
                             manage_ticks=False, medianprops={"color": "black", "linewidth": 2}, meanprops={
                                 "marker": "D", "markerfacecolor": "white", "markeredgecolor": "black"})
        axis.set(xlim=(-0.5, 1.5), xticks=[0, 1], xticklabels=[
            f"{group}\nn = {len(result['groups'][group]['ratios']):,}" for group in GROUPS[::2]])
    for axis in axes[:, 0]:
        axis.set_ylabel("visually-grounded ratio")
    axes.flat[0].plot([], [], "D", color="black", markerfacecolor="white", label="mean")
    axes.flat[0].plot([], [], "-", color="black", linewidth=2, label="median")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
