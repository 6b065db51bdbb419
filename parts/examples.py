"""Rows of a task -> tokens -> batches -> answers."""
import hashlib
import math
import unicodedata
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import data
from common import atomic, hash64, keyed_uniform, print0, progress, sweep

# ---------------------------------------------------------------------------- tokens

FORMAT = 1  # of the cached tokens


def tokenize(texts, vocab, cache="", source="input", spans=False):
    """List of str -> {"ids": int32, "bounds": int64 (n + 1,)}: text i has ids bounds[i] to bounds[i + 1].

    spans: also "starts" and "ends", int32, of each token in the characters of its text. cache: a folder that
    keeps the arrays under the hash of the texts and the vocabulary, or "". source is named in errors.
    """
    try:
        content = "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise SystemExit(f"{source}: holds half of a surrogate pair behind "
                         f"{error.object[max(0, error.start - 30):error.start]!r}; remove it") from None
    head = f"{FORMAT} {vocab.hash} {spans} {[len(text) for text in texts]}"
    path = Path(cache) / f"{hashlib.sha256(head.encode() + content).hexdigest()}.npz"
    if cache and path.is_file():
        sweep(path)  # another rank may have written it beside one that was killed
        with suppress(Exception), np.load(path, allow_pickle=False) as file:  # damaged: it is made anew
            return {name: file[name] for name in ("ids", "bounds", "starts", "ends")[:4 if spans else 2]}
    parts = {"ids": [], "bounds": [[0]], "starts": [], "ends": []}
    with progress(None, len(texts), " texts", "tokenize") as bar:
        for i in range(0, len(texts), 20000):
            some = texts[i:i + 20000]
            if spans:
                found = vocab.tokenizer.encode_batch(some, add_special_tokens=False)
                offsets = flat(chain.from_iterable(e.offsets) for e in found).reshape(-1, 2)
                parts["starts"].append(offsets[:, 0])
                parts["ends"].append(offsets[:, 1])
            ids = [e.ids for e in found] if spans else vocab.encode(some)
            parts["ids"].append(flat(ids))
            parts["bounds"].append([len(x) for x in ids])
            bar.update(len(ids))
    tokens = {name: np.concatenate(part) for name, part in parts.items() if part}
    tokens["bounds"] = np.cumsum(tokens["bounds"], dtype=np.int64)
    if cache:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as part:
                np.savez(part, **tokens)
        except (OSError, SystemExit) as error:
            print0(f"{error}; the run goes on without its cache of tokens")
    return tokens


def flat(lists):
    """Iterable of lists of int -> one int32 array."""
    return np.fromiter(chain.from_iterable(lists), np.int32)


def truncate(first, second, room):
    """Lengths of pairs after their longer text, of equal ones the second, has lost tokens until both fit."""
    second = np.minimum(second, np.maximum(room // 2, room - first))
    return np.minimum(first, room - second), second


# ---------------------------------------------------------------------------- examples and batches


class Examples:
    """Tokenised rows; an example is [CLS] first [SEP], or [CLS] first [SEP] second [SEP] with segments 0, 1.

    For choice an example has K candidates, each such a pair. keep: numbers of the rows to take.
    beside: (CLIPConfig, vocabulary) of a tower that reads the texts, too: `lay_out_clip`.
    labels: int64 or float32 (n,), or None; lengths: tokens of each example, [CLS] and [SEP] included, of
    choice the longest candidate's, int64 (n,); truncated: number of examples that were cut; unknown: share of
    [UNK] among all tokens.
    """
    clip, clip_truncated = None, 0

    def __init__(self, task, rows, vocab, max_length, cache, keep, source, beside):
        n, choice = len(rows.first), task.kind == "choice"
        second = list(chain.from_iterable(rows.second)) if choice else rows.second or []
        texts = [*rows.first, *second]
        tokens = tokenize(texts, vocab, cache, source)
        begin, count = tokens["bounds"][:-1], np.diff(tokens["bounds"])
        if choice:  # the candidates of all rows stand behind all contexts
            first = keep[:, None].repeat(len(second) // n, axis=1)  # (n, K) numbers of texts
            other = n + first * first.shape[1] + np.arange(first.shape[1])
        else:
            first, other = keep, n + keep if second else keep  # (n,)
        special = 3 if second else 2
        whole = count[first], count[other] if second else np.zeros_like(first)
        sizes = truncate(*whole, max_length - special)
        self.lay_out(tokens["ids"], vocab, (begin[first], begin[other]), sizes, special)
        cut = sum(sizes) < sum(whole)
        self.truncated = int((cut.any(1) if choice else cut).sum())
        if beside:
            sentences = np.stack([first, other] if second else [first], -1)
            self.lay_out_clip(tokenize(texts, beside[1], cache, source), sentences, *beside)
        self.labels = None if rows.labels is None else np.array(
            rows.labels, np.float32 if task.kind == "regress" else np.int64)[keep]
        self.ids = [rows.ids[i] for i in keep]
        self.extra = {name: [values[i] for i in keep] for name, values in rows.extra.items()}
        self.skipped, self.short, self.source = rows.skipped, rows.short, source

    def lay_out(self, ids, vocab, begin, sizes, special):
        """begin, sizes: (first, second) places in the flat ids and lengths, (n,) or (n, K) each."""
        self.tokens, self.vocab = np.append(ids, vocab.pad), vocab  # one more, so that it is never empty
        self.begin, self.sizes, self.length = begin, sizes, sizes[0] + sizes[1] + special
        self.lengths = self.length if self.length.ndim == 1 else self.length.max(1)
        self.unknown = float((ids == vocab.unk).mean()) if len(ids) else 0.0

    def lay_out_clip(self, tokens, sentences, config, vocab):
        """CLIP's input: two segments a sentence, each as long as the tower has positions, with its own start
        and end (XDBERT Appendix B): (n, 2 or 4, 77), of choice (n, K, 4, 77).

        sentences: numbers of texts (n, 1 or 2), of choice (n, K, 2). What the first segment cannot hold goes
        on in the second; the rest is cut, in `clip_truncated` examples. An empty sentence has one segment of
        start and end; a second segment without tokens (count -1) is not run.
        """
        room = config.positions - 2
        whole = np.diff(tokens["bounds"])[sentences][..., None]
        left = whole - [0, room]  # (n, .., sentences, 2)
        count = np.where(left > 0, np.minimum(left, room), [0, -1])
        begin = tokens["bounds"][sentences][..., None] + [0, room]
        shape = *sentences.shape[:-1], -1
        self.clip = tokens["ids"], begin.reshape(shape), count.reshape(shape), vocab, config.positions
        self.clip_truncated = int((whole > 2 * room).reshape(len(sentences), -1).any(1).sum())

    def __len__(self):
        return len(self.length)

    def batch(self, index):
        """{"ids", "mask" (True = real), "segments"}: (b, T), of choice (b, K, T); and "labels" if there are.

        T is the length of the longest in this batch. With CLIP beside, data.segment_batch of the b (K)
        sequences is among them.
        """
        index = np.asarray(index)
        shape = self.length[index].shape
        (begin, begin_second), (size, _) = ([x[index].reshape(-1, 1) for x in pair]
                                            for pair in (self.begin, self.sizes))  # (b K, 1) each
        length = self.length[index].reshape(-1, 1)
        t = np.arange(length.max())
        mask, second = t < length, t > size + 1
        ids = self.tokens.take(np.where(second, begin_second - size - 2, begin - 1) + t, mode="clip")
        ids[:, 0] = self.vocab.cls
        np.put_along_axis(ids, np.hstack([size + 1, length - 1]), self.vocab.sep, 1)
        ids[~mask] = self.vocab.pad
        batch = {"ids": ids.astype(np.int64), "mask": mask, "segments": (second & mask).astype(np.int64)}
        batch = {name: torch.from_numpy(x.reshape(*shape, -1)) for name, x in batch.items()}
        if self.clip:
            tokens, begin, count, *tower = self.clip
            begin, count = (x[index].reshape(-1, x.shape[-1]) for x in (begin, count))
            batch |= data.segment_batch(tokens, begin, count, *tower)
        return batch if self.labels is None else batch | {"labels": torch.from_numpy(self.labels[index])}


def rows_of(task, rows, split):
    """Numbers of a file's rows that belong to a split: all, but where the dev set is drawn from the file."""
    keep = np.arange(len(rows.first))
    if task.dev_share and split != "test":
        # by id: the same rows are held out however the file is sorted
        drawn = np.array([keyed_uniform("dev", row) for row in rows.ids])
        keep = keep[(drawn < task.dev_share) == (split == "dev")]
    return keep


def load_examples(task, path, vocab, max_length, cache, split, limit=0, seed=0, beside=()):
    """A file -> Examples (SquadExamples for span). split: train, dev or test, which needs no labels.

    cache: folder for tokens, or "". limit: examples (SQuAD: questions) to draw by (seed, row); 0 = all.
    """
    rows = task.read(task, Path(path), split != "test")
    keep = rows_of(task, rows, split)
    if split == "train" and "answer" in rows.extra:
        keep = keep[np.array(rows.extra["answer"]) != "missing"]
    if limit:
        order = np.argsort(keyed_uniform("limit", seed, keep), kind="stable")
        keep = np.sort(keep[order[:limit]])
    if not len(keep):
        raise SystemExit(f"{path}: has no example that could be used for {split}; give a longer file")
    return tokenized(task, rows, vocab, max_length, cache, keep, path, beside)


def tokenized(task, rows, vocab, max_length, cache="", keep=None, source="standard input", beside=()):
    """Rows -> Examples, or SquadExamples for span; the other arguments are theirs."""
    if max_length < 5:
        raise SystemExit(f"--max_length {max_length}: must be at least 5, [CLS] and two [SEP] included")
    keep = np.arange(len(rows.first)) if keep is None else keep
    if task.kind == "span":
        return SquadExamples(task, rows, vocab, max_length, cache, keep, source)
    return Examples(task, rows, vocab, max_length, cache, keep, source, beside)


# ---------------------------------------------------------------------------- SQuAD

QUESTION_TOKENS, WINDOW_STRIDE, ANSWER_TOKENS = 64, 64, 30


class SquadExamples(Examples):
    """Questions whose contexts are cut in overlapping windows; an example is a window (Devlin et al. 2019).

    A question keeps 64 tokens; windows start every min(64, room) tokens of the context. labels: (windows, 2)
    first and last position of the answer, (0, 0) = [CLS] where the window does not hold it whole. ids: the
    question's, for each window; questions: each id once. truncated: questions that were cut; moved, missing:
    questions of the file whose first answer is not at its answer_start, or nowhere in the context.
    """

    def __init__(self, task, rows, vocab, max_length, cache, keep, source):
        n, contexts = len(rows.first), {}  # a context is tokenised once for all of its questions
        context = n + np.array([contexts.setdefault(text, len(contexts)) for text in rows.second])[keep]
        texts = [*rows.first, *contexts]
        tokens = tokenize(texts, vocab, cache, source, spans=True)
        begin, count = tokens["bounds"][:-1], np.diff(tokens["bounds"])
        size, total = np.minimum(count[keep], QUESTION_TOKENS), count[context]  # (questions,)
        room = max_length - 3 - size
        if room.min() < 1:
            raise SystemExit(f"--max_length {max_length}: leaves no room for the context behind a question "
                             f"of {size.max()} tokens; give at least {size.max() + 4}, better 384")
        stride = np.minimum(WINDOW_STRIDE, room)
        windows = 1 + np.maximum(0, -(-(total - room) // stride))
        self.first_window = np.cumsum(windows) - windows  # (questions,)
        self.question = of = np.repeat(np.arange(len(keep)), windows)  # (windows,)
        self.offset = (np.arange(len(of)) - self.first_window[of]) * stride[of]  # in the context's tokens
        self.lay_out(tokens["ids"], vocab, (begin[keep][of], begin[context][of] + self.offset),
                     (size[of], np.minimum(room[of], total[of] - self.offset)), 3)
        self.truncated = int((count[keep] > QUESTION_TOKENS).sum())
        self.questions, self.contexts = ([values[i] for i in keep] for values in (rows.ids, rows.second))
        self.ids = [self.questions[i] for i in of]
        self.total, self.starts, self.ends = total, tokens["starts"], tokens["ends"]
        self.unanswerable, self.source = task.unanswerable, source
        self.extra, self.skipped, self.short, self.labels = {}, 0, 0, None
        states = rows.extra.get("answer", [])
        self.moved, self.missing = states.count("moved"), states.count("missing")
        if rows.labels is None:
            return
        characters = np.array([len(text) for text in texts])
        characters = np.cumsum(characters) - characters  # of all texts behind one another
        shift = np.repeat(characters, count)
        first, behind = (np.array(rows.labels)[keep] + characters[context][:, None]).T
        # the first token that ends behind the answer's start, the last one that starts before its end
        first = np.searchsorted(self.ends + shift, first, "right") - begin[context]
        last = np.searchsorted(self.starts + shift, behind, "left") - 1 - begin[context]
        place = np.stack([first, last], 1)[of] - self.offset[:, None]  # (windows, 2)
        # no answer, (-1, -1), ends in front of every window
        inside = (0 <= place[:, 0]) & (place[:, 0] <= place[:, 1]) & (place[:, 1] < self.sizes[1])
        self.labels = np.where(inside[:, None], place + size[of][:, None] + 2, 0)

    def answers(self, start, end, null_threshold=0.0):
        """Logits (windows, T), padded with -inf -> ({question id: text}, {question id: null score}).

        The answer is the span of at most 30 tokens in one window with the highest sum of start and end logit,
        among those whose first token has its most context in that window. The null score is the lowest sum of
        [CLS]'s logits over the question's windows less the best span's sum; in SQuAD 2.0 the answer is ""
        where it is above null_threshold. A text is cut out of the context as it stands there.
        """
        start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
        null = np.minimum.reduceat(start[:, 0] + end[:, 0], self.first_window)
        inside, most = self.context_masks(start.shape[1])
        start, end = np.where(most, start, -np.inf), np.where(inside, end, -np.inf)
        window = np.arange(len(start))
        best = np.full(len(start), -np.inf, np.float32)
        first, last = np.zeros_like(window), np.zeros_like(window)
        for more in range(min(ANSWER_TOKENS, start.shape[1])):  # tokens behind the first
            both = start[:, :start.shape[1] - more] + end[:, more:]
            at = both.argmax(1)
            score = both[window, at]
            better = score > best
            best[better], first[better], last[better] = score[better], at[better], at[better] + more
        window = np.lexsort((-best, self.question))[self.first_window]  # the best of each question
        best, texts, scores = best[window], {}, {}
        behind = self.begin[1][window] - self.sizes[0][window] - 2  # what a position lacks to its token
        first, last = first[window] + behind, last[window] + behind
        for i, (name, context) in enumerate(zip(self.questions, self.contexts)):
            # a context without a token has no span: no infinity, which JSON cannot hold
            scores[name] = float(null[i] - max(best[i], np.finfo(np.float32).min))
            if best[i] == -np.inf or self.unanswerable and scores[name] > null_threshold:
                texts[name] = ""
                continue
            a, b = self.starts[first[i]], self.ends[last[i]]
            while b < len(context) and unicodedata.category(context[b]) == "Mn":
                b += 1  # an accent that follows its letter has no token, but belongs to it
            texts[name] = context[a:b]
        return texts, scores

    def context_masks(self, T):
        """Two (windows, T) bool: a token of the context; and one that has its most context in this window.

        Most = the highest min(tokens to the left, to the right) of all windows that hold the token; of equal
        ones the first counts. (BERT's own code adds 0.01 x the window's size. That changes no order: only the
        last window may be smaller, by less than the stride of 64.)
        """
        place = np.arange(T) - self.sizes[0][:, None] - 2  # in the window's part of the context
        inside = (place >= 0) & (place < self.sizes[1][:, None])
        window, t = inside.nonzero()
        place = place[window, t]
        score = np.minimum(place, self.sizes[1][window] - 1 - place)
        score = score * len(inside) - window  # so that no two are equal and the first is the highest
        token = (np.cumsum(self.total) - self.total)[self.question[window]] + self.offset[window] + place
        highest = np.full(self.total.sum(), np.iinfo(np.int64).min)
        np.maximum.at(highest, token, score)
        most = inside.copy()
        most[window, t] = score == highest[token]
        return inside, most


# ---------------------------------------------------------------------------- order

POOL = 50  # training batches whose examples are sorted by length together
EVAL_TOKENS = 1 << 14  # of an evaluation batch, padding included


class Order:
    """The examples of each step's global batch: a pure function of (seed, step), alike on all ranks.

    Each epoch visits every example once, in an order of its own. It is cut in equal pools of up to POOL
    batches, in which examples are sorted by length, so that a batch needs little padding; then the batches
    of a pool are shuffled. A batch across two epochs belongs to both.
    """

    def __init__(self, lengths, batch_size, max_steps, seed):
        self.lengths, self.batch_size, self.max_steps, self.seed = lengths, batch_size, max_steps, seed
        epoch = len(lengths) / batch_size  # in batches
        self.size = max(1, round(epoch / math.ceil(epoch / POOL)))  # of a pool: equal parts of an epoch
        self.pool, self.batches = -1, None

    def __call__(self, step):
        pool = step // self.size
        if pool != self.pool:
            first, size = pool * self.size, min(self.size, self.max_steps - pool * self.size)
            stream = np.arange(first * self.batch_size, (first + size) * self.batch_size)
            index = data.permuted(stream, len(self.lengths), self.seed)
            order = np.lexsort((self.lengths[index], stream // len(self.lengths)))  # epochs stay apart
            self.batches = index[order].reshape(size, self.batch_size)
            self.batches = self.batches[np.argsort(hash64("batches", self.seed, pool, np.arange(size)))]
            self.pool = pool
        return self.batches[step - pool * self.size]


def batches_by_length(examples):
    """Index arrays of one pass, longest examples first, up to EVAL_TOKENS tokens each."""
    order, start = np.argsort(-examples.lengths, kind="stable"), 0
    candidates = examples.length[0].size  # sequences of an example
    while start < len(order):
        size = max(1, EVAL_TOKENS // (candidates * int(examples.lengths[order[start]])))
        yield order[start:start + size]
        start += size


def decide(task, examples, logits):
    """Predictions from the logits: classes or candidates, scores, or for span (texts, null scores).

    The texts are as if every question had an answer; see tasks.with_threshold.
    """
    if task.kind == "span":
        return examples.answers(logits[..., 0], logits[..., 1], math.inf)
    return logits.numpy() if task.kind == "regress" else logits.argmax(1).numpy()
