"""Measures: retrieval and probes of what a model learned, scores of the tasks, SQuAD's official scores.

A model comes as a function from token ids, some with a mask, to states. Nothing here reads files or prints.
"""
import functools
import math
import numbers
import re
import string
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F

from parts.machine import generator_of, move

# ---------------------------------------------------------------------------- retrieval


def tiles(x, size):
    """Unit rows of x (n, C), `size` at a time: yields (how many of them were in the tile before, rows).

    All tiles are equally large, so the last may begin in the one before: products of one shape round alike,
    and equal rows stay equal.
    """
    size = min(size, len(x))
    for i in range(0, len(x), size):
        start = min(i, len(x) - size)
        yield i - start, F.normalize(x[start:start + size].float(), dim=-1)


def ranks(query, target, chunk=2048):
    """Rank of each query's own target among all by cosine, 1 = the nearest; ties count against the query.

    query, target: (n, C), row i of one belongs to row i of the other. -> int64 (n,); the median of ranks by
    chance is (n + 1) / 2. chunk: queries, and targets, that are compared at a time, which bounds the memory.
    """
    found = []
    for (seen, q), (_, mine) in zip(tiles(query, chunk), tiles(target, chunk)):
        own = (q @ mine.T).diagonal()[:, None]
        below = sum((q @ t.T < own)[:, old:].sum(1) for old, t in tiles(target, chunk))
        found.append((len(target) - below)[seen:])  # NaN is not below: it counts against the query, too
    return torch.cat(found)


def recall(query, target, ks=(1, 5, 10), chunk=2048):
    """Share of the queries whose own target is among the k nearest, see ranks.

    -> {"1": share, ...}; chance is k / n.
    """
    found = ranks(query, target, chunk)
    return {str(k): (found <= k).float().mean().item() for k in ks}


class Top:
    """The k targets of highest cosine for each query (n, C), best first, of equal ones the earlier: cosine,
    index (n, k). Targets are added in parts, so that memory does not grow with their number."""

    def __init__(self, query, k):
        self.query, self.k, self.seen = F.normalize(query.float(), dim=-1), k, 0
        self.cosine, self.index = self.query[:, :0], self.query[:, :0].long()

    def add(self, target):
        """More targets (m, C), the ones that follow in number."""
        scores = self.query @ F.normalize(target.float(), dim=-1).T
        place = torch.arange(self.seen, self.seen + len(target), device=scores.device).expand_as(scores)
        best, order = torch.cat([self.cosine, scores], 1).sort(dim=1, descending=True, stable=True)
        self.index = torch.cat([self.index, place], 1).gather(1, order[:, :self.k])
        self.cosine, self.seen = best[:, :self.k], self.seen + len(target)


def top(query, target, k):
    """Cosines and indices (n, k) of the Top of queries (n, C) among targets (m, C)."""
    found = Top(query, k)
    for part in target.split(4096):
        found.add(part)
    return found.cosine, found.index


def nearest(query, target, chunk=2048):
    """Index of the target of highest cosine, of equal ones the first: (n, C), (m, C) -> int64 (n,).

    chunk: queries, and targets, that are compared at a time, which bounds the memory.
    """
    found = []
    for seen, q in tiles(query, chunk):
        best, index, first = q.new_full((len(q),), -math.inf), q.new_zeros(len(q), dtype=torch.long), 0
        for old, t in tiles(target, chunk):
            value, place = (q @ t.T)[:, old:].max(1)
            better = (value > best) | value.isnan() & ~best.isnan()  # as argmax does
            best, index = torch.where(better, value, best), torch.where(better, place + first, index)
            first += len(t) - old
        found.append(index[seen:])
    return torch.cat(found)


def ridge(x, y, strength=0.01):
    """Ridge regression with intercept, (n, C) -> (n, E); returns the map as a function.

    The penalty is strength x the mean variance of x's channels: a model's scale does not matter.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean) / len(x)
    gram += strength * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean) / len(x))
    return lambda new: (new.double() - x_mean) @ weight + y_mean


def mean_state(h, mask):
    """(B, T, C) -> (B, C): mean over the real tokens (VidLanKD, Appendix E)."""
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def vectors(encode, cut, index, device, batch_size=128):
    """encode(batch) -> tuple of (b, C), over the batches cut(index) of samples `index` -> tuple of (n, C)."""
    parts = [encode(move(cut(index[i:i + batch_size]), device))
             for i in range(0, len(index), batch_size)]
    return tuple(torch.cat([x.float().cpu() for x in column]) for column in zip(*parts))


@torch.no_grad()
def retrieval(bert, video, train, val, device, aligned=None, fit=4000):
    """Text-to-video recall@1/5/10 on the held-out clips, a sentence each, in three spaces (VidLanKD Fig. 4).

    bert: ids, mask -> (B, T, C); video: frames, mask -> (B, C_v); train, val: data.VideoClips. aligned: the
    maps (text, clip), of h, mask and of v, into the space in which the objective compares them, or None.
    -> {"aligned": recall there, "mean state": the paper's recipe, "ridge": after a ridge map from mean state
    to v, fitted on `fit` training clips, "nearest": first clip of each caption, aligned or else by ridge}.
    """
    def encode(batch):
        h = bert(batch["ids"], batch["mask"])
        v = video(batch["frames"], batch["frame_mask"])
        query, target = (aligned[0](h, batch["mask"]), aligned[1](v)) if aligned else (v, v)
        return mean_state(h, batch["mask"]), v, query, target

    fit_index = np.linspace(0, len(train) - 1, min(fit, len(train))).astype(np.int64)
    x_fit, v_fit, *_ = vectors(encode, train.clips, fit_index, device)
    x, v, query, target = vectors(encode, val.clips, np.arange(len(val)), device)
    mapped = ridge(x_fit, v_fit)(x)
    if not aligned:
        query, target = mapped, v
    return {"aligned": recall(query, target) if aligned else None,
            "mean state": recall(x, v) if x.shape == v.shape else None,  # None: the widths differ
            "ridge": recall(mapped, v), "nearest": nearest(query, target).tolist()}


# ---------------------------------------------------------------------------- probes

PERCEPTUAL = ("material", "colour", "size", "order")  # what the demo's videos show and its text never says


def linear_probe(x_train, labels_train, x_test, labels_test):
    """Accuracy of a linear classifier (ridge on one-hot labels) on held-out items."""
    onehot = F.one_hot(labels_train, int(max(labels_train.max(), labels_test.max())) + 1).double()
    return (ridge(x_train, onehot, 0.1)(x_test).argmax(1) == labels_test).float().mean().item()


def neighbour_probe(x_train, labels_train, x_test, labels_test, k=5):
    """(share of the k nearest training items, by centred cosine, with the test item's label, by chance)."""
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
    for noun, word in zip(nouns, pieces):
        parts = np.lib.stride_tricks.sliding_window_view(ids, len(word), axis=1)  # (n, T', pieces)
        rows, columns = (parts == word).all(-1).nonzero()
        if not len(rows):
            raise SystemExit(f"the first {len(ids):,} blocks of the corpus do not hold {noun}")
        places.append((rows[:occurrences], columns[:occurrences]))
    needed = np.unique(np.concatenate([rows for rows, _ in places]))
    states = {}
    for i in range(0, len(needed), batch_size):
        chosen = needed[i:i + batch_size]
        states |= dict(zip(chosen.tolist(), encode(torch.from_numpy(ids[chosen])).float().cpu()))
    return torch.stack([torch.stack([states[r][c:c + len(word)].mean(0) for r, c in zip(*place)]).mean(0)
                        for place, word in zip(places, pieces)])


def probes(bert, blocks, latents, device):
    """How far a noun's vector tells its perceptual properties, on nouns that the probe was not fitted on.

    bert: ids (b, T) -> (b, T, C). -> {property: {"linear": accuracy, "linear_chance": 1 / values,
    "neighbours": share of the 5 nearest nouns of the other split that have it, "neighbours_chance"}}.
    """
    nouns = sorted(latents["nouns"])
    x = noun_vectors(lambda ids: bert(ids.to(device)), blocks, blocks.vocab, nouns)
    test = torch.tensor([latents["nouns"][noun]["split"] == "dev" for noun in nouns])
    found = {}
    for name in PERCEPTUAL:
        values = latents["properties"][name]
        labels = torch.tensor([values.index(latents["nouns"][noun][name]) for noun in nouns])
        split = x[~test], labels[~test], x[test], labels[test]
        near, chance = neighbour_probe(*split)
        found[name] = {"linear": linear_probe(*split), "linear_chance": 1 / len(values), "neighbours": near,
                       "neighbours_chance": chance}
    return found


def gradient_norms(model, batch, divisor):
    """{term: norm of the gradient that it sends, weighted, into the last hidden states}; a pass of its own.

    model: with states(batch) -> (h (B, T, C), ...), terms(h, ..., batch, divisor) and weights.
    """
    scale = 2.0 ** 10  # keeps small gradients in float16's range; changes no bit in the other dtypes
    generator = generator_of(batch["inputs"].device)
    before = generator.get_rng_state()
    with torch.no_grad():
        h, *beside = model.states(batch)
    h.requires_grad_()
    terms = model.terms(h, *beside, batch, divisor)
    generator.set_rng_state(before)
    norms = {}
    for name, term in terms.items():
        gradient, = torch.autograd.grad(scale * model.weights[name] * term, h, retain_graph=True)
        norms[name] = gradient.float().norm().item() / scale
    return norms


@torch.no_grad()
def masked_word_scores(bert, head, batches, ranks, dtype=torch.float32):
    """{"mlm_loss", "mlm_accuracy"} over all masked words of the batches of all ranks.

    bert: a module, ids -> (B, T, C); head: a module, (n, C) -> (n, V); batches: of data.masked_words, this
    rank's, a target of -100 is padding; dtype: of the passes, as in training.
    """
    training = {part: part.training for part in (bert, head)}
    for part in training:
        part.eval()
    total = torch.zeros(3, dtype=torch.float64)  # summed loss, right words, masked words
    for batch in batches:
        batch = move(batch, ranks.device)
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            logits = head(bert(batch["inputs"]).flatten(0, 1)[batch["mlm_index"]]).float()
        targets = batch["mlm_targets"]
        counts = F.cross_entropy(logits, targets, reduction="sum"), logits.argmax(1) == targets, targets >= 0
        total += torch.stack([x.sum().float() for x in counts]).cpu()
    for part, mode in training.items():
        part.train(mode)
    loss, right, n = ranks.sum(total).tolist()
    return {"mlm_loss": loss / n, "mlm_accuracy": right / n}


@torch.no_grad()
def shared_neighbours(bert, other, blocks, device, k=10, n=1000):
    """Share of a block's k nearest, by centred cosine of mean states, on which two models of any width agree.

    bert, other: ids (b, T) -> (b, T, C). It takes the first n blocks; None where there are below k + 2.
    """
    n = min(n, len(blocks))
    if n < k + 2:
        return None

    def neighbours(encode):
        x = torch.cat([encode(blocks.batch(part)["ids"].to(device)).float().mean(1).cpu()
                       for part in np.array_split(np.arange(n), math.ceil(n / 64))])
        x = F.normalize(x - x.mean(0), dim=-1)
        scores = (x @ x.T).fill_diagonal_(-2)
        return torch.zeros_like(scores).scatter_(1, scores.topk(k, 1).indices, 1)
    return (neighbours(bert) * neighbours(other)).sum(1).mean().item() / k


# ---------------------------------------------------------------------------- scores of the tasks


def accuracy(predictions, labels):
    """Share of items whose class is right."""
    return float(np.mean(np.equal(predictions, labels)))


def f1(predictions, labels):
    """F1 of class 1: 2 TP / (2 TP + FP + FN), 0 where class 1 occurs in neither."""
    predicted, true = np.equal(predictions, 1), np.equal(labels, 1)
    either = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / either) if either else 0.0


def r3(predictions, labels):
    """Gorodkin's R_K (Comp. Biol. Chem. 28, 2004), the correlation of two labellings in K classes.

    (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)): s items, c of them right, class k
    predicted p_k and true t_k times; 0 where either holds one class only. For two classes it is Matthews'.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    classes = np.union1d(predictions, labels)[:, None]
    p, t = ((x == classes).sum(1, dtype=float) for x in (predictions, labels))  # (K,); s^4 would overflow int
    s, c = len(labels), (predictions == labels).sum()
    spread = math.sqrt((s * s - p @ p) * (s * s - t @ t))
    return float((c * s - p @ t) / spread) if spread else 0.0


def correlation(name, predictions, labels):
    """scipy.stats.<name>(predictions, labels); 0 where undefined: a constant, a value not finite."""
    from scipy import stats  # takes a second: not for the scripts that only pre-train
    columns = [np.asarray(x, float) for x in (predictions, labels)]
    if not all(np.isfinite(x).all() and np.ptp(x) > 0 for x in columns):
        return 0.0
    return float(getattr(stats, name)(*columns).statistic)


def rmse(predictions, labels):
    """Root of the mean squared error, in the unit of the labels."""
    return float(np.sqrt(np.mean(np.subtract(predictions, labels, dtype=float) ** 2)))


# name -> f(predictions (n,), labels (n,)), a fraction but for rmse
METRICS = {"accuracy": accuracy, "f1": f1, "matthews": r3, "r3": r3, "rmse": rmse,
           "pearson": functools.partial(correlation, "pearsonr"),
           "spearman": functools.partial(correlation, "spearmanr")}


def diagnostic_scores(predictions, labels, categories):
    """GLUE diagnostics -> {category: {"accuracy", "r3", "n"}}, categories without an item left out.

    predictions, labels: MNLI's words, (n,). Where a label is "not_entailment" the file is two-way: neutral
    and contradiction become that. categories: {name: a cell per item}; an item counts in every category whose
    cell is not empty.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if "not_entailment" in labels:
        predictions, labels = (np.where(x == "entailment", x, "not_entailment")
                               for x in (predictions, labels))
    scores = {}
    for name, cells in categories.items():
        tagged = np.array([bool(cell.strip()) for cell in cells])
        if tagged.any():
            pair = predictions[tagged], labels[tagged]
            scores[name] = {"accuracy": accuracy(*pair), "r3": r3(*pair), "n": int(tagged.sum())}
    return scores


def collapse(predictions, labels, kind):
    """The reason in words why a run learned nothing, or "".

    classify, choice and span (texts; labels are not read): one prediction stands for more than 98 % of the
    items. classify and choice: accuracy is at most the best constant's + 1 point. regress: the predictions
    have less than 1 % of the labels' standard deviation, or are not finite.
    """
    n = len(predictions)
    if kind == "regress":
        if not np.isfinite(predictions).all():
            return "a prediction is not a finite number"
        spread, true = np.std(predictions, dtype=float), np.std(labels, dtype=float)
        if spread >= 0.01 * true:
            return ""
        return f"the predictions have {100 * spread / true:.2g} % of the labels' spread"
    often = np.unique(predictions, return_counts=True)[1].max()
    if often > 0.98 * n:
        return f"{100 * often / n:.1f} % of the predictions are the same"
    if kind == "span":
        return ""
    constant, right = np.unique(labels, return_counts=True)[1].max(), np.equal(predictions, labels).sum()
    if right > constant + n / 100:
        return ""
    return f"accuracy {100 * right / n:.1f} %, and {100 * constant / n:.1f} % by the best constant"


def median_run(scores):
    """Index of the median of scores, larger = better; of an even number the lower of the middle two.

    NaN and None are the worst; of equal runs the earlier comes first.
    """
    scores = np.asarray(scores, float)
    return int(np.argsort(np.where(np.isnan(scores), -np.inf, scores), kind="stable")[(len(scores) - 1) // 2])


# ---------------------------------------------------------------------------- SQuAD

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only: a typographic quote stays
Question = namedtuple("Question", "id text context answers impossible")


def squad_questions(content, source):
    """SQuAD's parsed json -> list of Question; SystemExit names `source` where it is not in SQuAD's form.

    answers: [(text, first character)], None in a test split; impossible: 2.0's mark, None in 1.1.
    """
    found, where = [], "the first question"
    try:
        for paragraph in (p for article in content["data"] for p in article["paragraphs"]):
            for question in paragraph["qas"]:
                where = f"question {question['id']}"
                texts, answers = [question["id"], question["question"], paragraph["context"]], None
                if "answers" in question:
                    answers = [(gold["text"], int(gold["answer_start"])) for gold in question["answers"]]
                found.append(Question(*texts, answers, question.get("is_impossible")))
                for value in (*texts, *(text for text, _ in answers or ())):
                    if not isinstance(value, str):
                        raise TypeError(f"{value!r} is no text")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SystemExit(f"{source}: not in SQuAD's form at {where} ({error!r}); fetch it anew") from None
    if not found:
        raise SystemExit(f"{source}: holds no question; fetch it anew")
    if len(twice := Counter(question.id for question in found)) < len(found):
        raise SystemExit(f"{source}: two questions have the id {twice.most_common(1)[0][0]}; predictions are "
                         "told apart by it, so give each its own")
    return found


def normalise(text):
    """An answer as SQuAD compares it: lower case, then no punctuation, then no articles, then single blanks.

    The order matters: "a.b" becomes "ab" and keeps its a.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def token_f1(prediction, answer):
    """F1 of two bags of words (lists); 0 where they share none.

    Rounded as the official scripts do, by way of precision and recall: the best threshold hangs on ties.
    """
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def answer_score(prediction, answers, version_2):
    """(exact match, F1) of a predicted text, each the best over the gold answers.

    2.0 drops gold answers that normalise to nothing, takes "" where none is left, and gives two empty texts
    F1 1; 1.1 gives them 0, though they match exactly.
    """
    prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    if version_2:
        answers = [answer for answer in answers if answer] or [""]
    exact = float(prediction in answers)
    if version_2 and not prediction:
        return exact, exact
    return exact, max(token_f1(prediction.split(), answer.split()) for answer in answers)


def squad_score(gold, predictions, no_answer=None, threshold=1.0):
    """SQuAD's official scores in percent: equal to evaluate-v2.0.py and, for a file of 1.1, evaluate-v1.1.py.

    gold: the parsed official json. predictions: {id: text}, "" = no answer. no_answer (2.0): {id: score,
    larger = less answerable}; a prediction whose score is above threshold counts as "".
    -> {"exact", "f1", "total"}; for 2.0 also HasAns_* and NoAns_* where there are such questions; with
    no_answer also best_exact, best_exact_thresh, best_f1, best_f1_thresh: the highest score where all
    questions up to that threshold keep their predictions; ties stand in the order of no_answer, as there.
    A missing prediction counts 0 in 1.1; in 2.0 it is an error. Predictions of other ids are left out.
    """
    questions = squad_questions(gold, "gold")
    version_2 = re.match("v?2", str(gold.get("version"))) is not None or any(
        question.impossible is not None or not question.answers for question in questions)
    n, ids = len(questions), [question.id for question in questions]
    check_predictions(questions, predictions, no_answer, version_2)
    raw = np.array([answer_score(predictions[i], [text for text, _ in question.answers], version_2)
                    if i in predictions else (0.0, 0.0) for i, question in zip(ids, questions)])  # (n, 2)
    has_answer = np.array([bool(question.answers) for question in questions])
    scores = raw
    if no_answer is not None:
        doubt = np.array([no_answer[i] for i in ids], float)
        scores = np.where((doubt > threshold)[:, None], ~has_answer[:, None], raw)

    parts = {"": slice(None)} | ({"HasAns_": has_answer, "NoAns_": ~has_answer} if version_2 else {})
    found = {}
    for name, part in parts.items():
        if size := len(scores[part]):
            exact, overlap = (100 * scores[part].mean(0)).tolist()
            found |= {f"{name}exact": exact, f"{name}f1": overlap, f"{name}total": size}
    if no_answer is not None:
        row = {i: k for k, i in enumerate(ids)}
        order = [row[i] for i in sorted((i for i in no_answer if i in row), key=no_answer.get)]  # stable
        answered = np.array([bool(predictions[i]) for i in ids])
        for name, column in zip(("exact", "f1"), raw.T):
            change = np.where(has_answer, column, -1.0 * answered)[order]  # of the sum when one more answers
            total = np.cumsum([(~has_answer).sum(), *change])
            best = total.argmax()  # the first
            found[f"best_{name}"] = float(100 * total[best] / n)
            found[f"best_{name}_thresh"] = float(doubt[order[best - 1]]) if best else 0.0
    return found


def check_predictions(questions, predictions, no_answer, version_2):
    """SystemExit where predictions or no-answer scores do not fit the gold questions."""
    missing = [question.id for question in questions if question.id not in predictions]
    if missing and (version_2 or len(missing) == len(questions)):
        raise SystemExit(f"predictions: {len(missing):,} of gold's {len(questions):,} questions have none, "
                         f'the first is {missing[0]}; give what was predicted for it, "" for no answer')
    if no_answer is not None and not version_2:
        raise SystemExit("no-answer scores: gold is SQuAD 1.1, which has no unanswerable questions; leave "
                         "them out")
    for question in questions:
        i, text = question.id, predictions.get(question.id, "")
        if question.answers is None:
            raise SystemExit(f"gold: question {i} has no answers; give a file with answers, such as "
                             "dev-v2.0.json")
        if not isinstance(text, str):
            raise SystemExit(f"predictions: the answer to {i} is no text but {type(text).__name__}; give "
                             "{id: text}")
        doubt = 0.0 if no_answer is None else no_answer.get(i, "none")
        if not isinstance(doubt, numbers.Real) or math.isnan(doubt):
            raise SystemExit(f"no-answer scores: {doubt} for question {i}; give a number for each question")
