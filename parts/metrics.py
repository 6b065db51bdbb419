"""Measures: recall and probes of what a model learned, scores of the tasks, SQuAD's official scores."""
import functools
import math
import numbers
import re
import string
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from common import print0, read_json, table
from run import move

# ---------------------------------------------------------------------------- retrieval and probes


def recall(query, target, ks=(1, 5, 10), chunk=1024):
    """Share of the queries whose own target is among the k nearest by cosine; ties count against the query.

    query, target: (n, C), row i of both belong together. Returns {"1": share, ...}; by chance it is k / n.
    """
    query, target = F.normalize(query.float(), dim=-1), F.normalize(target.float(), dim=-1)
    ranks = []
    for i in range(0, len(query), chunk):
        scores = query[i:i + chunk] @ target.T  # (chunk, n)
        own = scores.gather(1, torch.arange(i, i + len(scores))[:, None])
        ranks.append((~(scores < own)).sum(1) - 1)  # NaN counts against it, too
    ranks = torch.cat(ranks)
    return {str(k): (ranks < k).float().mean().item() for k in ks}


def nearest(query, target):
    """Index of the target of highest cosine for each query: (n, C), (m, C) -> (n,)."""
    return (F.normalize(query.float(), dim=-1) @ F.normalize(target.float(), dim=-1).T).argmax(1)


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
    """Share of the k nearest training items (cosine, centred) with the test item's label; and by chance."""
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
            raise SystemExit(f"the first {len(ids):,} blocks of the corpus do not hold {nouns[len(places)]}")
        places.append((rows[:occurrences], columns[:occurrences]))
    needed = np.unique(np.concatenate([rows for rows, _ in places]))
    states = {}
    for i in range(0, len(needed), batch_size):
        chosen = needed[i:i + batch_size]
        states |= dict(zip(chosen.tolist(), encode(torch.from_numpy(ids[chosen])).float().cpu()))
    return torch.stack([torch.stack([states[r][c:c + len(word)].mean(0) for r, c in zip(*place)]).mean(0)
                        for place, word in zip(places, pieces)])


PERCEPTUAL = ("material", "colour", "size", "order")  # what the demo's videos show and its text never says


def mean_state(h, mask):
    """(B, T, C) -> (B, C): mean over the real tokens (VidLanKD, Appendix E)."""
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def vectors(encode, clips, index, device, batch_size=128):
    """encode(batch) -> tuple of (b, C), over the clips `index` with one caption each -> tuple of (n, C)."""
    parts = [encode(move(clips.clips(index[i:i + batch_size]), device))
             for i in range(0, len(index), batch_size)]
    return tuple(torch.cat([x.float().cpu() for x in column]) for column in zip(*parts))


@torch.no_grad()
def retrieval(bert, video, train, val, device, aligned=None, fit=4000):
    """Text-to-video recall@1/5/10 on the held-out clips, in three spaces (Fig. 4 of VidLanKD).

    bert: ids, mask -> (B, T, C); video: frames, mask -> (B, C_v); train, val: data.VideoClips. aligned: the
    maps (text, clip) from h, mask and from v into the space in which the objective compares them, or None.
    -> {"aligned": ..., "mean state": the paper's recipe, None where the widths differ, "ridge": after one
    ridge map from mean state to v, fitted on `fit` training clips, alike for every model}, each {k: share},
    and "nearest": each caption's first clip, aligned where there is such a space, else after the ridge map.
    """
    def encode(batch):
        h = bert(batch["ids"], batch["mask"])
        v = video(batch["frames"], batch["frame_mask"])
        query, target = (aligned[0](h, batch["mask"]), aligned[1](v)) if aligned else (v, v)
        return mean_state(h, batch["mask"]), v, query, target

    fit_index = np.linspace(0, len(train) - 1, min(fit, len(train))).astype(np.int64)
    x_fit, v_fit, *_ = vectors(encode, train, fit_index, device)
    x, v, query, target = vectors(encode, val, np.arange(len(val)), device)
    mapped = ridge(x_fit, v_fit)(x)
    found = {"aligned": None, "mean state": recall(x, v) if x.shape == v.shape else None,
             "ridge": recall(mapped, v), "nearest": nearest(mapped, v).tolist()}
    if aligned:
        found |= {"aligned": recall(query, target), "nearest": nearest(query, target).tolist()}
    return found


def probes(bert, blocks, latents, device):
    """How far a noun's vector tells its perceptual properties, for nouns held out from the probe.

    -> {property: {"linear": accuracy of a linear classifier, "neighbours": share of the same property among
    the 5 nearest nouns of the other split, "linear_chance": 1 / values, "neighbours_chance": of any}}.
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


@torch.no_grad()
def shared_neighbours(bert, other, blocks, device, k=10, n=1000):
    """Share of the k nearest blocks, by cosine of centred mean states, on which two models agree; n blocks,
    None where there are fewer than k + 2.

    bert, other: ids (b, T) -> (b, T, C); it compares what two models hold alike, whatever their widths.
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
    """Gorodkin's R_K (Comp. Biol. Chem. 28, 2004): the correlation of two labellings in K classes, K found in
    them; for two classes it is Matthews'.

    (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)) with s items, c of them right, p_k times
    class k predicted, t_k times true; 0 where either holds one class only.
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


# name -> f(predictions, labels): classes (n,) for accuracy, f1, matthews and r3, numbers (n,) for the others;
# fractions, not percent
METRICS = {"accuracy": accuracy, "f1": f1, "matthews": r3,
           "pearson": functools.partial(correlation, "pearsonr"),
           "spearman": functools.partial(correlation, "spearmanr"), "rmse": rmse, "r3": r3}


def diagnostic_scores(predictions, labels, categories):
    """GLUE diagnostics -> {category: {"accuracy", "r3", "n"}}, categories without an item left out.

    predictions, labels: MNLI's words, (n,), as the order of the classes differs from model to model; where a
    label is "not_entailment" the file is two-way, and neutral and contradiction become that. categories:
    {name: cell per item}; an item counts in every category whose cell is not empty.
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
    """"" or the reason in words why a run learned nothing.

    kind: "classify", "choice" and "span" collapse where one prediction stands for more than 98 % of the items
    (span: the texts, or a number for each different one; labels are not read); the first two also where
    accuracy is not above the best constant's + 1 point; "regress" where the predictions have less than 1 % of
    the labels' standard deviation, or are not finite.
    """
    n = len(predictions)
    if kind == "regress":
        if not np.isfinite(predictions).all():
            return "a prediction is not a finite number"
        spread, true = np.std(predictions, dtype=float), np.std(labels, dtype=float)
        if spread < 0.01 * true:
            return f"the predictions have {100 * spread / true:.2g} % of the labels' spread"
        return ""
    often = np.unique(predictions, return_counts=True)[1].max()
    if often > 0.98 * n:
        return f"{100 * often / n:.1f} % of the predictions are the same"
    if kind == "span":
        return ""
    constant, right = np.unique(labels, return_counts=True)[1].max(), np.equal(predictions, labels).sum()
    if right <= constant + n / 100:
        return f"accuracy {100 * right / n:.1f} %, and {100 * constant / n:.1f} % by the best constant"
    return ""


def median_run(scores):
    """Index of the median of scores, larger = better (give a loss its minus); of an even number the lower
    middle one. NaN and None are the worst; of equal runs the earlier comes first."""
    scores = np.asarray(scores, float)
    return int(np.argsort(np.where(np.isnan(scores), -np.inf, scores), kind="stable")[(len(scores) - 1) // 2])


# ---------------------------------------------------------------------------- SQuAD


ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only: a typographic quote stays


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


def squad_questions(gold):
    """SQuAD's parsed json -> ([(id, [text of each gold answer])], whether it is of version 2.0).

    It is where its version says so, or where a question has "is_impossible" or no answer, of which 1.1 knows
    nothing.
    """
    questions, version_2 = [], False
    try:
        for article in gold["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = [answer["text"] for answer in question["answers"]]
                    if not all(isinstance(text, str) for text in (question["id"], *answers)):
                        raise TypeError("an id or answer that is no text")
                    questions.append((question["id"], answers))
                    version_2 |= "is_impossible" in question or not answers
    except (KeyError, TypeError) as error:
        after = f" after question {questions[-1][0]}" if questions else ""
        raise SystemExit(f"gold: not in SQuAD's layout{after} ({error!r}); give the official json with "
                         "answers, such as dev-v2.0.json") from None
    if not questions:
        raise SystemExit('gold: "data" holds no question; give the official json with answers')
    return questions, version_2 or re.match("v?2", str(gold.get("version"))) is not None


def squad_score(gold, predictions, no_answer=None, threshold=1.0):
    """SQuAD's official scores in percent: equal to evaluate-v2.0.py and, for a file of 1.1, evaluate-v1.1.py.

    gold: the parsed official json. predictions: {id: text}, "" = no answer. no_answer (2.0): {id: score,
    larger = less answerable}, whose order breaks ties as in the official script. threshold: a prediction
    whose no_answer score is above it counts as ""; 1 is the official default, meant for probabilities.
    -> {"exact", "f1", "total"}; for 2.0 also HasAns_* and NoAns_* of these where there are such questions;
    with no_answer also best_exact, best_exact_thresh, best_f1, best_f1_thresh: the score where every question
    up to that threshold keeps its prediction and the others count as "".
    A missing prediction counts 0 in 1.1, which is said; in 2.0 it is an error, as the official script has no
    score then. Other ids are left out.
    """
    questions, version_2 = squad_questions(gold)
    if version_2:
        questions = list(dict(questions).items())  # by id, as there; 1.1 counts each occurrence
    n, ids = len(questions), [i for i, _ in questions]
    check_predictions(predictions, ids, version_2)
    raw = np.array([answer_score(predictions[i], answers, version_2) if i in predictions else (0.0, 0.0)
                    for i, answers in questions])  # (n, 2): exact, f1
    has_answer = np.array([bool(answers) for _, answers in questions])
    scores = raw
    if no_answer is not None:
        doubt = no_answer_scores(no_answer, ids, version_2)
        scores = np.where((doubt > threshold)[:, None], ~has_answer[:, None], raw)

    parts = {"": slice(None)} | ({"HasAns_": has_answer, "NoAns_": ~has_answer} if version_2 else {})
    found = {}
    for name, part in parts.items():
        if len(scores[part]):
            exact, overlap = 100 * scores[part].mean(0)
            found |= {name + "exact": float(exact), name + "f1": float(overlap),
                      name + "total": len(scores[part])}
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


def check_predictions(predictions, ids, version_2):
    """SystemExit where predictions cannot be scored; says how many are missing in 1.1, and left out."""
    given = [i for i in ids if i in predictions]
    if not given:
        raise SystemExit(f"predictions: none for any question of gold, of which the first is {ids[0]}; give "
                         "the file that was predicted for this gold file")
    wrong = [i for i in given if not isinstance(predictions[i], str)]
    if wrong:
        raise SystemExit(f"predictions: the answer to {wrong[0]} is no text but "
                         f"{type(predictions[wrong[0]]).__name__}; give {{id: text}}")
    if len(given) < len(ids):
        first = next(i for i in ids if i not in predictions)
        missing = (f"predictions: {len(ids) - len(given):,} of {len(ids):,} questions have none, the first "
                   f"is {first}")
        if version_2:
            raise SystemExit(f'{missing}; SQuAD 2.0 needs a text for each, "" for no answer')
        print0(f"{missing}; they count 0")
    if superfluous := len(predictions.keys() - set(ids)):
        print0(f"predictions left out, as gold has no such question: {superfluous:,}")


def no_answer_scores(no_answer, ids, version_2):
    """{id: score} -> (n,) in the order of ids; SystemExit names the id that has no number."""
    if not version_2:
        raise SystemExit("no-answer scores: gold is SQuAD 1.1, where every question has an answer; leave "
                         "them out")
    for i in ids:
        if not isinstance(no_answer.get(i), numbers.Real) or math.isnan(no_answer[i]):
            raise SystemExit(f"no-answer scores: {no_answer.get(i, 'none')} for question {i}; give a number "
                             "for each question")
    return np.array([no_answer[i] for i in ids], float)


def score(predictions_path, gold_path, no_answer_path=""):
    """Prints SQuAD's official scores of a predictions.json against the official json; see squad_score."""
    predictions = read_json(predictions_path, "give predictions, {id: text}")
    gold = read_json(gold_path, "give SQuAD's official json with answers, such as dev-v2.0.json")
    no_answer = read_json(no_answer_path, "give no-answer scores, {id: number}") if no_answer_path else None
    found = squad_score(gold, predictions, no_answer)
    print(table([["SQuAD", "score"], *([name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}"]
                                         for name, value in found.items())]))
    return found
