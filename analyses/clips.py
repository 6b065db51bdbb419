"""The clips to which sentences, single words and a task's questions lead: in the teacher, and in students."""
import math
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
from analyses.answers import mcnemar, shared_answers
from analyses.closing import aligned_space, open_judge, students_of
from analyses.figures import COLOURS, describe, draw_clip, grid, save
from analyses.sentences import encode, sample_sentences
from common import hash64, keyed_uniform, progress, read_settings
from finetune import UNKNOWN
from parts.machine import init_ranks
from parts.metrics import Top, mean_state, noun_vectors, ranks, recall, ridge, top, vectors
from parts.tasks import TASKS
from parts.weights import load_bert, read_tensors
from run import read_run

# ---------------------------------------------------------------------------- models


class Reader:
    """A language model whose states are compared with clips.

    spaces: {title: (text, clip)}, the maps of h (B, T, C), mask (B, T) and of v (n, C_v) into a space of
    width E in which their cosine tells how well they fit; in the first one its clips are found.
    """

    def __init__(self, bert, aligned=None):
        self.bert, self.spaces = bert, {"aligned space": aligned} if aligned else {}
        self.device = next(bert.parameters()).device

    @torch.no_grad()
    def vectors(self, ids, mask):
        """Texts ids, mask (n, T) -> (n, E) in the first space."""
        mask = mask.to(self.device)
        return self.spaces[self.title][0](self.bert(ids.to(self.device), mask), mask).float().cpu()

    @torch.no_grad()
    def token_vectors(self, ids, mask):
        """A text's ids, mask (1, T) -> (n, E) of its n tokens between [CLS] and [SEP], in the first space;
        each is mapped as a text of one state."""
        h = self.bert(ids.to(self.device), mask.to(self.device))[0, 1:int(mask.sum()) - 1, None]  # (n, 1, C)
        one = torch.ones(h.shape[:2], dtype=torch.bool, device=self.device)
        return self.spaces[self.title][0](h, one).float().cpu()

    @property
    def title(self):
        """The first space's."""
        return next(iter(self.spaces))

    @torch.no_grad()
    def clip(self, v):
        """Vectors of the video encoder (n, C_v) -> (n, E) in the first space."""
        return self.spaces[self.title][1](v.to(self.device)).float().cpu()


def open_run(run):
    """(folder of a distillation, its judge) whose teacher watches clips; SystemExit where it has none."""
    run, device = Path(run), init_ranks().device
    if not {"train", "videos", "objective", "teacher"} <= read_run(run)[0]["config"].keys():
        raise SystemExit(f"{run}: not a run of distill.py; give one, such as out/distill-nst+crd-s0")
    judge = open_judge(run, device)
    if not judge.clips:
        raise SystemExit(f"{run}: no teacher that watches clips, or no packed clips; give a distillation "
                         "from a run of teacher.py, and its --videos")
    judge.device = device
    return run, judge


def as_it_is(v):
    return v


def open_readers(run, judge):
    """{name: Reader}: the teacher, the run's student, and the text-only student where that lies beside it."""
    found = {"teacher": Reader(judge.bert)}
    for name, folder in students_of(run, judge).items():
        space = None if name == "text-only" else aligned_space(folder, name, judge.device)
        found[name] = Reader(load_bert(folder / "model").to(judge.device), space)
    return found


def fit_spaces(readers, judge, fit=4000):
    """Gives each Reader two more spaces, for the teacher in this order: the paper's own recipe (Appendix E:
    the mean of the last hidden states against v) where the widths allow it, and the mean state after one
    ridge map to v, fitted on `fit` training clips, alike for every model."""
    def read(batch):
        return watch(judge, batch), *(mean_state(reader.bert(batch["ids"], batch["mask"]), batch["mask"])
                                      for reader in readers.values())
    train = judge.clips[0]
    index = np.linspace(0, len(train) - 1, min(fit, len(train))).astype(np.int64)
    v, *states = over_clips("fit", read, train, index, judge.device)
    for (name, reader), x in zip(readers.items(), states):
        mapped = {"after one ridge map": (
            lambda h, mask, to_video=ridge(x, v): to_video(mean_state(h, mask).cpu()), as_it_is)}
        plain = {"mean state as it is": (mean_state, as_it_is)} if x.shape == v.shape else {}
        reader.spaces |= plain | mapped if name == "teacher" else mapped | plain


def watch(judge, batch):
    """The teacher's vectors (b, C_v) of a batch of clips."""
    return judge.video(batch["frames"], batch["frame_mask"])


def over_clips(what, encode, clips, index, device):
    """parts.metrics.vectors over samples of data.VideoClips, one caption each, with a progress bar."""
    with progress(None, len(index), " clips", what) as bar:
        def cut(some):
            bar.update(len(some))
            return clips.clips(some)
        return vectors(encode, cut, index, device)


def held_out_scores(readers, judge):
    """Text-to-video retrieval on the held-out clips, a sentence each (VidLanKD Fig. 4, in numbers).

    -> [{"model", "space", "1", "5", "10": shares found among the k nearest, "median": median rank from 1}].
    """
    def read(batch):
        columns = [watch(judge, batch)]
        for reader in readers.values():
            h = reader.bert(batch["ids"], batch["mask"])
            columns += [text(h, batch["mask"]) for text, _ in reader.spaces.values()]
        return tuple(columns)
    val, rows = judge.clips[1], []
    v, *queries = over_clips("held-out clips", read, val, np.arange(len(val)), judge.device)
    for name, reader in readers.items():
        for title, (_, clip) in reader.spaces.items():
            query = queries.pop(0)
            with torch.no_grad():
                target = clip(v.to(judge.device)).cpu()
            rows.append({"model": name, "space": title} | recall(query, target)
                        | {"median": float(np.median(ranks(query, target)))})
    return rows


# ---------------------------------------------------------------------------- how clips are shown


class Gallery:
    """How the clips of a packed file are shown; a clip goes by the number of its caption in the file.

    On the demo they are drawn from their latent states. Else as thumbnails, in a folder as <video>_<second>,
    <video>/<second> or <video> with .jpg, .jpeg or .png, and without one as the caption's text.
    """

    def __init__(self, judge, thumbnails=""):
        if thumbnails and not Path(thumbnails).is_dir():
            raise SystemExit(f"--thumbnails {thumbnails}: no such folder; give one of images, such as "
                             "<video_id>_<second>.jpg")
        train = judge.clips[0]
        # nothing is held out, so sample i begins with caption i of the file
        self.clips = data.VideoClips(train.path, train.T, train.max_frames, train.vision, "train", 0,
                                     train.feat_norm)
        self.states = judge.latents["clips"] if judge.latents else []
        if len(self.states) != len(self.clips):  # the text is the demo's, the videos are not
            self.states = []
        self.nouns = {state["noun"] for state in self.states}
        self.folder, self.with_images = thumbnails and Path(thumbnails), 0
        self.framed = False  # whether a clip has been drawn that fits its text

    def sample(self, judge, most, seed):
        """Numbers of up to `most` random clips: of the demo's held-out ones, else of all in the file."""
        if most < 1:
            raise SystemExit(f"--clips {most}: must be at least 1")
        held_out = judge.clips[1]
        n = len(held_out) if self.states else len(self.clips)
        chosen = np.sort(data.permuted(np.arange(min(most, n)), n, seed))
        return np.sort(held_out.captions(chosen)) if self.states else chosen

    def vectors(self, judge, captions):
        """The teacher's vectors of clips, (n, C_v)."""
        return over_clips("watch", lambda batch: (watch(judge, batch),), self.clips, captions,
                          judge.device)[0]

    def search(self, judge, captions, readers, ids, mask, k):
        """{name: metrics.Top of k} among clips, for texts ids, mask (n, T) as each Reader sees them."""
        found = {name: Top(reader.vectors(ids, mask), k) for name, reader in readers.items()}

        def compare(batch):
            v = watch(judge, batch)
            for name, reader in readers.items():
                found[name].add(reader.clip(v))
            return ()  # so that no vectors are kept
        over_clips("watch", compare, self.clips, captions, judge.device)
        return found

    def video(self, caption):
        """(id, first second, last second)."""
        name = self.clips.video_id[self.clips.video_of([caption])[0]].decode(errors="replace")
        return name, float(self.clips.start[caption]), float(self.clips.end[caption])

    def text(self, caption):
        """The caption's text."""
        first, last = self.clips.token_start[caption:caption + 2]
        return self.clips.vocab.decode(self.clips.tokens[first:last])

    def describe(self, caption):
        """One line on a clip."""
        name, start, end = self.video(caption)
        what = describe(self.states[caption]) if self.states else self.text(caption)
        return f"{name}, {start:.0f}-{end:.0f} s: {what}"

    def brief(self, caption):
        """A few words on a clip, for a cell of a table."""
        state = self.states[caption] if self.states else None
        return f"{state['material']} {state['noun']}: {state['action']}" if state else shorten(
            self.text(caption), 34)

    def nouns_in(self, text):
        """Words of a text that the demo's clips show."""
        return [word for word in dict.fromkeys(re.findall(r"\w+", text.lower())) if word in self.nouns]

    def fits(self, caption, text):
        """Whether a clip of the demo shows a noun of the text; None where nothing tells."""
        nouns = self.nouns_in(text)
        return self.states[caption]["noun"] in nouns if nouns else None

    def draw(self, axis, caption, text, note=""):
        """Shows a clip in a panel, its frame thick and with a tick where it fits the text."""
        fits = self.fits(caption, text)
        self.framed |= bool(fits)
        images = frame_files(self.folder, *self.video(caption)) if self.folder else []
        if images:
            self.with_images += 1
            draw_images(axis, images)
            axis.set_xlabel(shorten(self.describe(caption), 78), fontsize=6.5, labelpad=2,
                            parse_math=False)
        elif self.states:
            draw_clip(axis, self.states[caption], COLOURS[7])
        else:
            name, start, end = self.video(caption)
            lines = textwrap.wrap(self.text(caption), 46, max_lines=3)
            axis.text(0.02, 0.5, "\n".join([*lines, f"{name}, {start:.0f}-{end:.0f} s"]), fontsize=7,
                      va="center", transform=axis.transAxes, parse_math=False)
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set(color=COLOURS[2] if fits else COLOURS[7], linewidth=2.5 if fits else 0.6)
        axis.set_ylabel(f"{note} ✓" if fits else note, rotation=0, ha="right", va="center", fontsize=8,
                        parse_math=False)
        return {"caption": int(caption), "clip": self.describe(caption), "fits": fits}

    def note(self):
        """What is to be said below a figure and its table, a line each."""
        lines = ["a clip: form = material, size and colour the thing's; it turns (spins) or rises (tilts), "
                 "and pales where the action has an effect"] * bool(self.states)
        lines += ["✓ and a thick frame: the clip shows a noun of the text"] * self.framed
        lines += [f"{self.folder}: has no thumbnail of these clips"] * (
            bool(self.folder) and not self.with_images)
        return "\n".join(lines)


def shorten(text, most):
    """A text's first words, of at most `most` characters."""
    return textwrap.shorten(text, most, placeholder=" ..")


def frame_files(folder, video, start, end, most=6):
    """Paths of up to `most` thumbnails between two seconds of a video, evenly spread; of the whole video
    where a folder has only that; [] where it has none."""
    def there(stem):
        paths = (Path(folder, f"{stem}{ending}") for ending in (".jpg", ".jpeg", ".png"))
        return next((path for path in paths if path.is_file()), None)
    seconds = range(math.floor(start), max(math.ceil(end), math.floor(start) + 1))
    found = [path for second in seconds if (path := there(f"{video}_{second}") or there(f"{video}/{second}"))]
    if not found:
        found = [path for path in [there(video)] if path]
    return [found[i] for i in np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)]


def draw_images(axis, paths):
    """Images side by side, each as high as the panel's strip."""
    from matplotlib.image import imread
    at = 0.0
    for path in paths:
        try:
            image = imread(path)
        except (OSError, ValueError, SyntaxError) as error:  # the last of a damaged PNG
            raise SystemExit(f"{path}: cannot be read as an image ({error}); mend or remove it") from None
        width = image.shape[1] / image.shape[0]
        step = max(1, image.shape[0] // 160)  # rows of pixels: a panel shows no more
        axis.imshow(image[::step, ::step], cmap="gray", extent=(at, at + width, 0, 1))
        at += width + 0.03
    axis.set(xlim=(0, at), ylim=(0, 1), aspect="equal")


# ---------------------------------------------------------------------------- sentences


def encode_texts(texts, vocab, readers, source):
    """Texts -> ids, mask (n, T) with [CLS] and [SEP], cut to what every Reader reads; source: of encode."""
    pieces = encode(texts, vocab, source, UNKNOWN)
    most = min(reader.bert.config.max_positions for reader in readers.values())
    lengths = np.minimum([len(ids) for ids in pieces], most - 2)
    ids = np.full((len(texts), lengths.max() + 2), vocab.pad, np.int64)
    for row, (some, n) in enumerate(zip(pieces, lengths)):
        ids[row, :n + 2] = [vocab.cls, *some[:n], vocab.sep]
    mask = np.arange(ids.shape[1]) < lengths[:, None] + 2
    return torch.from_numpy(ids), torch.from_numpy(mask)


def chosen_sentences(given, rows, seed, judge, gallery, readers):
    """(texts, ids, mask) of the --sentence flags, else of `rows` sentences of the run's corpus."""
    nouns_in = gallery.nouns_in if gallery.states else None
    texts = list(given) or sample_sentences(judge.val, rows, seed, nouns_in)
    return texts, *encode_texts(texts, judge.val.vocab, readers, "--sentence")


# ---------------------------------------------------------------------------- retrieval


def retrieval(run, sentence=(), rows=4, clips=60000, thumbnails="", seed=0, out=""):
    """The three clips that teacher and students retrieve for sentences, side by side, and recall, median rank
    (VidLanKD Fig. 4 and 5).

    Appendix E: sentences of the text corpus, 60,000 clips, the mean of the last hidden states, cosine. A
    student is compared in the space in which its objective aligned it, or after one ridge map.
    """
    run, judge = open_run(run)
    gallery, readers = Gallery(judge, thumbnails), open_readers(run, judge)
    texts, ids, mask = chosen_sentences(sentence, rows, seed, judge, gallery, readers)
    pool = gallery.sample(judge, clips, seed)
    fit_spaces(readers, judge)
    scores, k = held_out_scores(readers, judge), min(3, len(pool))
    best = gallery.search(judge, pool, readers, ids, mask, k)
    figure, axes = grid(k * len(texts), len(readers), 3.8, 0.95)
    found = []
    for row, text in enumerate(texts):
        title = textwrap.fill(f"“{text}”", 48 * len(readers))
        # it runs over all columns, so no panel may make room for its width; blank lines keep its height free
        axes[k * row, 0].annotate(title, (0, 1), (0, 18), "axes fraction", "offset points", fontsize=8.5,
                                  parse_math=False).set_in_layout(False)
        found.append({"sentence": text, "clips": {name: [] for name in readers}})
        for column, (name, its) in enumerate(best.items()):
            for place in range(k):
                axis, clip = axes[k * row + place, column], pool[its.index[row, place]]
                shown = gallery.draw(axis, clip, text, f"{place + 1}.")
                found[-1]["clips"][name].append(shown | {"cosine": its.cosine[row, place].item()})
            axes[k * row, column].set_title("\n" * (1 + title.count("\n")) + f"{name}, {readers[name].title}",
                                            fontsize=8.5, loc="left")
    figure.supxlabel(gallery.note())
    n, kind = len(judge.clips[1]), "held-out clips" if gallery.states else "clips"
    lines = [[f"{n:,} held-out clips, a caption each", "space", "R@1", "R@5", "R@10", "median rank"]]
    lines += [[row["model"], row["space"], *(f"{100 * row[key]:.1f}" for key in ("1", "5", "10")),
               f"{row['median']:g}"] for row in scores]
    lines.append(["chance", "", *(f"{100 * i / n:.1f}" for i in (1, 5, 10)), f"{(n + 1) / 2:g}"])
    shown = [[f"found among {len(pool):,} {kind}", *readers]]
    for one in found:
        shown.append([shorten(one["sentence"], 70), *[""] * len(readers)])
        shown += [[f"  {place}.", *(cell(gallery, clip) for clip in row)]
                  for place, row in enumerate(zip(*one["clips"].values()), 1)]
    save(figure, out, {"run": str(run), "recall": scores, "held_out": n, "chance_median": (n + 1) / 2,
                       "searched": len(pool), "sentences": found},
         f"{common.table(lines)}\n\n{common.table(shown)}\n{gallery.note()}")


# ---------------------------------------------------------------------------- tokens


def voken_captions(judge, gallery):
    """(the captions of the clips that serve as the teacher's vokens (K,), their vectors (K, C_v)).

    Which clips they are is drawn again, as teacher.py drew them; the first vectors must be the stored ones.
    """
    path = judge.teacher / "vokens.safetensors"
    if not path.is_file():
        raise SystemExit(f"{judge.teacher}: has no vokens.safetensors; give a distillation from a run of "
                         "teacher.py with --objective mlm+ct or ct")
    advice = "vokens are drawn by the flags of the teacher's run; keep its model in its folder"
    flags = read_settings(judge.teacher.parent / "config.json", {"config": dict}, advice)["config"]
    if not all(isinstance(flags.get(name), int) for name in ("vokens", "seed")):
        raise SystemExit(f"{judge.teacher.parent}: not a run of teacher.py; {advice}")
    stored, train = read_tensors(path)["vectors"], judge.clips[0]
    captions = train.captions(train.voken_clips(flags["vokens"], flags["seed"]))
    few = gallery.vectors(judge, captions[:8])
    if len(captions) != len(stored) or (F.cosine_similarity(few, stored[:8]) < 0.99).any():
        raise SystemExit(f"{path}: not the vectors of the clips in {train.path}; give the --videos of the "
                         "teacher's training")
    return captions, stored


def token_clips(reader, ids, mask, vokens):
    """The voken of each token between [CLS] and [SEP]: the k of highest cosine, in the reader's first space;
    for the teacher argmax_k cos(h_t, v_k), VidLanKD Eq. 9.

    ids, mask: (1, T); vokens: (K, C_v) -> cosines, indices (n,).
    """
    return tuple(x[:, 0] for x in top(reader.token_vectors(ids, mask), reader.clip(vokens), 1))


def frequent_words(blocks, scan, most=2000, least=5):
    """The up to `most` most frequent whole words of letters in the first `scan` blocks, that stand there at
    least `least` times."""
    vocab, counts = blocks.vocab, np.zeros(blocks.vocab.size, np.int64)
    goes_on = np.array([token.startswith("##") for token in vocab.tokens])
    for start in range(0, min(scan, len(blocks)), 500):
        ids = blocks.batch(np.arange(start, min(start + 500, scan, len(blocks))))["ids"].numpy()
        whole = ~goes_on[ids[:, 1:]]  # what stands behind is no piece of the same word
        counts += np.bincount(ids[:, :-1][whole], minlength=vocab.size)
    found = []
    for i in np.argsort(-counts, kind="stable"):
        word = vocab.tokens[i]
        if len(found) == most or counts[i] < least:
            break
        if word.isalpha() and vocab.encode([word]) == [[i]]:
            found.append(word)
    if len(found) < 2:
        raise SystemExit(f"{blocks.files[0]}: holds no two words of which one could be nearest to the other")
    return found


def nearest_words(x, words, asked, k=5):
    """The k nearest of n `words`, itself left out, by centred cosine: [[(word, cosine)] for each of asked].

    x: mean states (m, C), first of the words, then of others; asked: rows of x. The mean of the n words'
    states is taken off first.
    """
    n, asked = len(words), torch.as_tensor(list(asked))
    x = F.normalize(x - x[:n].mean(0), dim=-1)
    scores = x[asked] @ x[:n].T
    scores[asked[:, None] == torch.arange(n)] = -2
    best, index = scores.topk(min(k, n - 1), 1)
    return [[(words[i], s) for i, s in zip(*row)] for row in zip(index.tolist(), best.tolist())]


@torch.no_grad()
def word_neighbours(readers, judge, words, asked, materials, scan):
    """({model: nearest_words of the asked}, {model: share of the neighbours of all words that have the word's
    own material}, {} where there are no materials); the states are of the first `scan` blocks."""
    rows, found, shares = [*words, *(word for word in asked if word not in words)], {}, {}
    for name, reader in progress(readers.items(), len(readers), " models", "read words"):
        x = noun_vectors(lambda ids: reader.bert(ids.to(judge.device)), judge.train, judge.train.vocab, rows,
                         scan=scan)
        found[name] = nearest_words(x, words, [rows.index(word) for word in asked])
        if materials:
            near = nearest_words(x, words, range(len(words)))
            shares[name] = float(np.mean([materials[other] == materials[word]
                                          for word, row in zip(words, near) for other, _ in row]))
    return found, shares


def tokens(run, sentence=None, word=(), thumbnails="", seed=0, out=""):
    """The clip that each token of a sentence retrieves (VidLanKD Fig. 2, Eq. 9), and the nearest words of a
    word, in teacher and students.

    A token's clip is its voken: that of the highest cosine with its last hidden state. A word is the mean of
    its last hidden states in the corpus; its neighbours, by centred cosine, are the demo's nouns, or else
    the most frequent words.
    """
    run, judge = open_run(run)
    gallery, vocab = Gallery(judge, thumbnails), judge.val.vocab
    (captions, vokens), readers = voken_captions(judge, gallery), open_readers(run, judge)
    (text,), ids, mask = chosen_sentences([sentence][:sentence is not None], 1, seed, judge, gallery, readers)
    # states of at most a quarter of a GiB
    widest = max(reader.bert.width for reader in readers.values())
    scan = min(4000, max(1, 2 ** 26 // (judge.train.block_size * widest)))
    nouns = judge.latents["nouns"] if judge.latents else {}
    materials = {noun: values["material"] for noun, values in nouns.items()}
    words = sorted(nouns) or frequent_words(judge.train, scan)
    if word:
        asked = list(dict.fromkeys(w.lower() if vocab.lower else w for w in word))
    else:  # the longest of the sentence, then some at random
        inside = sorted((w for w in set(re.findall(r"\w+", text)) if w in words and (nouns or len(w) > 3)),
                        key=lambda w: (-len(w), w))
        drawn = sorted(words, key=lambda w: keyed_uniform("word", seed, w))
        asked = list(dict.fromkeys([*inside, *drawn]))[:3]
    for w, pieces in zip(asked, encode(asked, vocab, "--word", UNKNOWN)):
        if len(pieces) > judge.train.block_size - 2:
            raise SystemExit(f"--word {shorten(w, 60)}: has {len(pieces)} word pieces, more than a block of "
                             "the corpus; give one word")
    near, shares = word_neighbours(readers, judge, words, asked, materials, scan)
    fit_spaces(readers, judge)
    pieces = [vocab.tokens[i] for i in ids[0, 1:int(mask.sum()) - 1].tolist()]
    clips = {}
    for name, reader in readers.items():
        cosine, index = (x.tolist() for x in token_clips(reader, ids, mask, vokens))
        clips[name] = [{"token": piece, "voken": k, "caption": int(captions[k]), "cosine": c,
                        "clip": gallery.describe(captions[k]), "fits": gallery.fits(captions[k], text)}
                       for piece, k, c in zip(pieces, index, cosine)]
    figure = draw_tokens(gallery, readers, text, clips, near, asked, materials)

    lines = [["token", *readers]]
    lines += [[piece, *(cell(gallery, clip) for clip in row)] for piece, *row in zip(pieces, *clips.values())]
    if gallery.nouns_in(text):
        lines.append(["share with a noun of the text", *(
            f"{100 * np.mean([clip['fits'] for clip in row]):.0f} %" for row in clips.values())])
    rows = [["word and its nearest", *readers]]
    for i, w in enumerate(asked):
        rows.append([w + with_material(w, materials), *[""] * len(readers)])
        rows += [["", *(f"{other}{with_material(other, materials)} {c:.2f}" for other, c in place)]
                 for place in zip(*(near[name][i] for name in readers))]
    if shares:
        pairs = [materials[one] == materials[other] for one in words for other in words if one != other]
        rows.append([f"own material, all {len(words)} nouns (chance {100 * np.mean(pairs):.0f} %)",
                     *(f"{100 * share:.0f} %" for share in shares.values())])
    save(figure, out, {"run": str(run), "sentence": text, "vokens": len(vokens), "tokens": clips,
                       "neighbours": {name: dict(zip(asked, row)) for name, row in near.items()},
                       "own_material": shares},
         f"“{text}”: the clip of each token, of {len(vokens):,} vokens\n\n{common.table(lines)}\n"
         f"{gallery.note()}\n\n{common.table(rows)}")


def cell(gallery, clip):
    """A clip in a table: a few words, with a tick where it fits."""
    return "✓ " * bool(clip["fits"]) + gallery.brief(clip["caption"])


def draw_tokens(gallery, readers, text, clips, near, asked, materials, most=20):
    """The figure of `tokens`: a column a model; the first `most` tokens with their clips, then the words."""
    rows = min(most, len(next(iter(clips.values()))))
    figure, axes = grid(rows + len(asked), len(readers), 4.3, 0.95)
    axes[0, 0].get_gridspec().set_height_ratios([1] * rows + [1.7] * len(asked))
    for column, (name, found) in enumerate(clips.items()):
        axes[0, column].set_title(f"{name}, {readers[name].title}", fontsize=9)
        for axis, clip in zip(axes[:rows, column], found):
            gallery.draw(axis, clip["caption"], text, clip["token"])
        for axis, word, row in zip(axes[rows:, column], asked, near[name]):
            draw_neighbours(axis, word, row, materials)
    count = len(next(iter(clips.values())))
    figure.supxlabel(f"the first {rows} of {count} tokens\n" * (count > rows) + gallery.note())
    return figure


def with_material(word, materials):
    """" (wax)" of one of the demo's nouns, "" of another word."""
    return f" ({materials[word]})" if word in materials else ""


def draw_neighbours(axis, word, near, materials):
    """A bar a neighbour, hatched where it is of the word's own material."""
    own = [word in materials and materials.get(other) == materials[word] for other, _ in near]
    axis.barh(range(len(near)), [c for _, c in near], color=[COLOURS[2] if x else COLOURS[7] for x in own],
              hatch=["//" if x else "" for x in own], edgecolor="white")
    axis.set(yticks=range(len(near)), xlim=(min(0, *(c for _, c in near)), 1))
    axis.set_yticklabels([f"{other}{with_material(other, materials)}" for other, _ in near], fontsize=7)
    axis.set_xlabel("centred cosine", fontsize=7, labelpad=1)
    axis.tick_params(axis="x", labelsize=7)
    hint = ", hatched: same material" if word in materials else ""
    axis.set_title(f"nearest to {word}{with_material(word, materials)}{hint}", fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------- examples


def examples(a, b, run, task="", rows=6, clips=60000, thumbnails="", seed=0, data_dir="", out=""):
    """Questions that one model gets right and another wrong, with the nearest clip (VidLanKD Tables 10-12).

    Right: in more than half of A's runs, and in no more than half of B's, of the seeds that both have. The
    clip: what the teacher of --run finds for the context with its right answer, as in `retrieval`. p:
    McNemar's exact test on the questions of which one of the two alone is right.
    """
    pairs = shared_answers(a, b, ("classify", "choice"), task, data_dir)
    names = [answers.model for answers in next(iter(pairs.values()))]
    names = names if names[0] != names[1] else [str(a), str(b)]
    counts, found_in = {}, {}
    for name, (one, other) in pairs.items():
        counts[name] = mcnemar(one, other)
        margin = one.right.mean(0) - other.right.mean(0)
        only = np.flatnonzero(one.mostly_right & ~other.mostly_right)
        order = np.lexsort((hash64("example", seed, only), -margin[only]))
        found_in[name] = only[order][:rows].tolist()
    # one of each task in turn, so that all are seen; then task by task
    turns = [(turn, name, i) for name, some in found_in.items() for turn, i in enumerate(some)]
    turns = sorted(turns, key=lambda x: x[0])[:rows]
    chosen = [(name, i) for name in pairs for _, other, i in turns if name == other]
    lines = [["task", "questions", "both right", f"only {names[0]}", f"only {names[1]}", "neither", "p"]]
    lines += [[TASKS[name].title, *(f"{value:,}" for key, value in row.items() if key != "p"),
               f"{row['p']:.2g}"] for name, row in counts.items()]
    if not chosen:
        raise SystemExit(f"{names[0]}: right where {names[1]} is wrong in no question of "
                         f"{', '.join(pairs)}; choose another --task, or turn the two round")
    run, judge = open_run(run)
    gallery, teacher = Gallery(judge, thumbnails), Reader(judge.bert)
    if judge.bert.width != judge.video.config.hidden:
        raise SystemExit(f"{run}: the states of its teacher are not as wide as its clips' vectors")
    teacher.spaces["mean state as it is"] = mean_state, as_it_is  # Appendix E
    sentences = [pairs[name][0].sentence(i) for name, i in chosen]
    encoded = encode_texts(sentences, judge.val.vocab, {"teacher": teacher}, f"--run {run}")
    pool = gallery.sample(judge, clips, seed)
    nearest = gallery.search(judge, pool, {"teacher": teacher}, *encoded, 1)["teacher"]

    cells, found, panels = [["context", "hypotheses", "GT", *names]], [], []
    for number, (name, i) in enumerate(chosen, 1):
        one, other = pairs[name]
        said = [f"{x.word(x.majority(i))} ({x.right[:, i].sum()}/{len(x.runs)})" for x in (one, other)]
        said.insert(0, one.word(one.rows.labels[i]))
        letters = [f"{one.word(j)} " * (one.task.kind == "choice") for j in range(len(one.task.words))]
        texts = [f"{number}. {one.context(i)}", *map("".join, zip(letters, one.hypotheses(i)))]
        cells += table_rows(texts, said)
        answers = [f"{who}: {what}" for who, what in zip((f"{one.task.title}, truth", *names), said)]
        panels.append("\n".join(textwrap.fill(text, 80, max_lines=2) for text in (*texts, *answers)))
        found.append({"task": name, "row": i, "context": one.context(i), "hypotheses": one.hypotheses(i),
                      "truth": said[0], "a": said[1], "b": said[2]})
    figure, axes = grid(len(chosen), 2, 5.4, 0.3 + 0.135 * max(panel.count("\n") + 1 for panel in panels))
    axes[0, 1].set_title("the teacher's nearest clip", fontsize=9)
    for row, (left, right) in enumerate(axes):
        left.axis("off")
        left.text(0, 0.5, panels[row], fontsize=8, va="center", transform=left.transAxes, parse_math=False)
        found[row] |= gallery.draw(right, pool[nearest.index[row, 0]], sentences[row]) | {
            "cosine": nearest.cosine[row, 0].item()}
    figure.supxlabel(gallery.note())
    save(figure, out, {"run": str(run), "a": names[0], "b": names[1], "counts": counts, "examples": found},
         f"{common.table(lines)}\np: McNemar's exact test\n\n{common.table(cells)}\n"
         f"in brackets: in how many runs it is right\n{gallery.note()}")


def table_rows(texts, said, width=38):
    """Rows of a table of which the first cells are texts, wrapped: context, hypotheses; then short cells."""
    context = textwrap.wrap(texts[0], width)
    hypotheses = [line for text in texts[1:] for line in textwrap.wrap(text, width, max_lines=4)]
    lines = max(len(context), len(hypotheses), 1)
    context, hypotheses = ([line.ljust(width) for line in part] + [" " * width] * (lines - len(part))
                           for part in (context, hypotheses))
    return [[first, second, *(said if i == 0 else [""] * len(said))]
            for i, (first, second) in enumerate(zip(context, hypotheses))]
