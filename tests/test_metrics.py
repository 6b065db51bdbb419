"""Proves retrieval's measures and probes on cases worked out by hand, the tasks' metrics against scipy and
other definitions, and SQuAD's scores against what the official scripts gave for the same texts.

Run: python -m pytest -q tests/test_metrics.py
"""
import csv
import itertools
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from common import keyed_integers, keyed_uniform
from parts.metrics import (METRICS, PERCEPTUAL, collapse, diagnostic_scores, linear_probe, mean_state,
                           median_run, nearest, neighbour_probe, normalise, noun_vectors, probes, ranks, recall,
                           retrieval, ridge, shared_neighbours, squad_score)

# ---------------------------------------------------------------------------- retrieval


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_recall_counts_ranks_and_ties_against_the_query():
    query = torch.tensor([[1.0, 0, 0, 0], [1, 0.9, 0, 0], [1, 0.9, 0.8, 0], [1, 1, 1, 1]])  # last: all tie
    found = recall(query, torch.eye(4), ks=(1, 2, 3, 4), chunk=3)  # ranks 0, 1, 2, 3
    assert found == {"1": 0.25, "2": 0.5, "3": 0.75, "4": 1.0}


def test_recall_of_nan_and_of_constants_is_no_better_than_nothing():
    x = randn(40, 8)
    assert recall(torch.full_like(x, float("nan")), x)["10"] == recall(x, torch.ones_like(x))["10"] == 0
    assert recall(x, x)["1"] == 1


def test_ridge_approaches_least_squares_and_shrinks():
    x = randn(200, 5)
    y = x @ randn(5, 3, seed=1) + 2 + 0.1 * randn(200, 3, seed=2)
    ones = torch.cat([x, torch.ones(200, 1, dtype=x.dtype)], 1)
    exact = ones @ torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(ridge(x, y, 1e-10)(x), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ridge(x, y, 1e6)(x), y.mean(0).expand_as(y), rtol=0, atol=1e-3)
    torch.testing.assert_close(ridge(x, y)(x), ridge(100 * x, y)(100 * x))  # whatever the scale of a model


@pytest.mark.parametrize("chunk", [1, 7, 16, 2048])
def test_ranks_and_nearest_are_those_of_all_products_at_once(chunk):
    """With equal rows, zeros and NaN, whatever the parts."""
    query, target = randn(50, 6).double(), randn(50, 6, seed=1)
    target[7], target[49], query[4], query[6], target[5] = target[3].clone(), target[2].clone(), 0, math.nan, math.nan
    cosine = F.normalize(query.float(), dim=-1) @ F.normalize(target, dim=-1).T
    assert torch.equal(ranks(query, target, chunk), (~(cosine < cosine.diagonal()[:, None])).sum(1))
    assert torch.equal(nearest(query, target, chunk), cosine.argmax(1))
    assert nearest(query[:2], target[:1]).tolist() == [0, 0]


def test_search_takes_memory_that_does_not_grow_with_the_targets():
    query, peaks = randn(40, 4), []
    for n in (1000, 4000):
        target = randn(n, 4)
        for search in (lambda: nearest(query, target, 64), lambda: ranks(target, target, 64)):
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                search()
            sizes = [event.nbytes() for event in sorted(profile.kineto_results.events(), key=lambda x: x.start_ns())
                     if event.name() == "[memory]"]
            peaks.append(max(itertools.accumulate(sizes)))
    assert peaks[2] < peaks[0] + 100 and peaks[3] < peaks[1] + 8 * 4 * 4000  # the ranks themselves
    assert max(peaks) < 4 * 4000 * 4000 / 100


class Clips:
    """Clips whose "text" and "video" are vectors."""

    def __init__(self, text, video):
        self.text, self.video = text, video

    def __len__(self):
        return len(self.text)

    def clips(self, index):
        ones = torch.ones(len(index), 2, dtype=torch.bool)
        return {"ids": self.text[index][:, None].expand(-1, 2, -1), "mask": ones, "frames": self.video[index],
                "frame_mask": ones}


@pytest.mark.parametrize("width", [8, 5])
def test_retrieval_in_each_space(width):
    """Captions from which a linear map leads to their clips; the aligned space turns the order round."""
    text = randn(130, 8)
    video = text @ randn(8, width, seed=2)
    train, val = (Clips(text[part], video[part]) for part in (slice(90), slice(90, 130)))
    models = (lambda ids, mask: ids, lambda frames, mask: frames)
    found = retrieval(*models, train, val, torch.device("cpu"))
    assert found["aligned"] is None and found["ridge"]["1"] == 1 and found["nearest"] == list(range(40))
    assert found["mean state"] is None if width == 5 else found["mean state"]["1"] < 0.5
    turned = (mean_state, lambda v: val.text.flip(0) if len(v) == 40 else v)
    other = retrieval(*models, train, val, torch.device("cpu"), turned)
    assert other["nearest"] == list(range(40))[::-1] and other["aligned"]["1"] == 0
    assert other["mean state"] == found["mean state"] and other["ridge"] == found["ridge"]


def test_mean_state_leaves_padding_out():
    h, mask = randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(mean_state(h, mask), torch.stack([h[0, :2].mean(0), h[1, 0]]))


# ---------------------------------------------------------------------------- probes


def test_probes_find_what_is_there_and_chance_where_nothing_is():
    labels, noise = torch.arange(60) % 3, randn(60, 16)
    for x, low, high in (((5 * randn(3, 16, seed=1))[labels] + noise, 0.95, 1.0), (noise, 0.0, 0.6)):
        parts = x[:40], labels[:40], x[40:], labels[40:]
        near, chance = neighbour_probe(*parts)
        assert low <= near <= high and chance == pytest.approx(1 / 3, abs=0.02)
        assert low <= linear_probe(*parts) <= high


def test_neighbour_probe_by_hand():
    x_train = torch.tensor([[1.0, 0], [0.9, 0.1], [-1, 0], [-0.9, -0.1]])
    near, chance = neighbour_probe(x_train, torch.tensor([0, 1, 1, 1]), torch.tensor([[1.0, 0]]),
                                   torch.tensor([0]), k=2)
    assert near == 0.5 and chance == 0.25


class Blocks:
    """Blocks of 6 tokens in which noun 5 stands whole and noun (7, 8) in two pieces; 6 is nowhere."""
    ids = torch.tensor([[2, 5, 9, 7, 8, 3], [2, 7, 8, 9, 9, 3], [2, 7, 9, 8, 5, 3]])
    vocab = SimpleNamespace(encode=lambda words: [{"mug": [5], "goblet": [7, 8], "vase": [6]}[word]
                                                  for word in words])

    def __len__(self):
        return len(self.ids)

    def batch(self, index):
        return {"ids": self.ids[index]}


def test_noun_vectors_average_occurrences_and_pieces():
    def encode(ids):
        place = torch.arange(ids.shape[1]).expand_as(ids)
        return torch.stack([ids, place], -1).double()  # (b, T, 2): the id and its place
    for size in (1, 64):
        found = noun_vectors(encode, Blocks(), Blocks.vocab, ["mug", "goblet"], batch_size=size)
        assert found.tolist() == [[5, 2.5], [7.5, (3.5 + 1.5) / 2]]
    first = noun_vectors(encode, Blocks(), Blocks.vocab, ["mug", "goblet"], occurrences=1)
    assert first.tolist() == [[5, 1], [7.5, 3.5]]
    with pytest.raises(SystemExit, match="the first 3 blocks of the corpus do not hold vase"):
        noun_vectors(encode, Blocks(), Blocks.vocab, ["mug", "vase"])


def test_probes_are_measured_on_the_nouns_of_dev():
    """A noun's vector tells its material and nothing else."""
    class Nouns(Blocks):
        ids = torch.arange(5, 65)[:, None].expand(-1, 6)
        vocab = SimpleNamespace(encode=lambda words: [[int(word[1:])] for word in words])
    nouns = {f"n{i}": {name: "abc"[keyed_integers(3, name, i)] for name in PERCEPTUAL}
             | {"split": "dev" if i % 5 == 0 else "train", "material": "abc"[i % 3]} for i in range(5, 65)}
    states = 0.01 * randn(65, 8) + torch.eye(8, dtype=torch.float64)[torch.arange(65) % 3]
    latents = {"nouns": nouns, "properties": dict.fromkeys(PERCEPTUAL, ["a", "b", "c"])}
    found = probes(lambda ids: states[ids], Nouns(), latents, "cpu")
    assert tuple(found) == PERCEPTUAL and found["material"]["linear"] == found["material"]["neighbours"] == 1
    for name, scores in found.items():
        test, train = ([noun[name] for noun in nouns.values() if (noun["split"] == "dev") == dev]
                       for dev in (True, False))
        chance = np.mean([a == b for a in test for b in train])
        assert scores["linear_chance"] == 1 / 3 and scores["neighbours_chance"] == pytest.approx(chance)
        assert name == "material" or scores["linear"] < 0.8


def test_shared_neighbours_is_one_with_itself_and_none_without_enough():
    class Many(Blocks):
        ids = torch.randint(5, 50, (60, 6), generator=torch.Generator().manual_seed(4))
    one, other = (torch.nn.Embedding(50, width) for width in (8, 4))
    assert shared_neighbours(one, one, Many(), "cpu") == pytest.approx(1)
    assert shared_neighbours(one, other, Many(), "cpu") < 0.6
    assert shared_neighbours(one, one, Blocks(), "cpu") is None


# ---------------------------------------------------------------------------- classes and numbers


def classes(n, k, *keys):
    return keyed_integers(k, "test_metrics", *keys, np.arange(n))


def test_accuracy_and_f1_by_hand():
    labels, predictions = [1, 1, 1, 0, 0], [1, 0, 0, 1, 0]  # TP 1, FN 2, FP 1
    assert METRICS["accuracy"](np.array(predictions), np.array(labels)) == 0.4
    assert METRICS["f1"](np.array(predictions), np.array(labels)) == pytest.approx(2 / 5)
    assert METRICS["f1"](np.zeros(4, int), np.zeros(4, int)) == 0
    assert METRICS["f1"](np.ones(4, int), np.zeros(4, int)) == 0
    assert METRICS["f1"](np.array([0, 2, 1]), np.array([2, 0, 1])) == 1  # of class 1 alone


def test_matthews_is_the_formula_of_two_classes_and_pearson_of_the_bits():
    predictions, labels = classes(300, 2, 0), np.where(keyed_uniform("m", np.arange(300)) < 0.3, 1, 0)
    labels[:100] = predictions[:100]
    tp, fp, fn, tn = (int(((predictions == p) & (labels == t)).sum())
                      for p, t in ((1, 1), (1, 0), (0, 1), (0, 0)))
    formula = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = METRICS["matthews"](predictions, labels)
    assert found == pytest.approx(formula, abs=1e-12)
    assert found == pytest.approx(stats.pearsonr(predictions, labels).statistic, abs=1e-12)
    assert METRICS["matthews"](1 - labels, labels) == -1 and METRICS["matthews"](labels, labels) == 1


@pytest.mark.parametrize("k", [2, 3, 5])
def test_r3_is_gorodkins_correlation_of_indicators(k):
    """His definition: cov(X, Y) / sqrt(cov(X, X) cov(Y, Y)) of the one-hot matrices, summed over classes."""
    predictions, labels = classes(200, k, 1, k), classes(200, k, 2, k)
    predictions[:80] = labels[:80]
    x, y = (np.eye(k)[c] - np.eye(k)[c].mean(0) for c in (predictions, labels))
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert METRICS["r3"](predictions, labels) == pytest.approx(expected, abs=1e-12)
    names = np.array(["entailment", "neutral", "contradiction", "d", "e"])
    assert METRICS["r3"](names[predictions], names[labels]) == pytest.approx(expected, abs=1e-12)


def test_r3_by_hand_and_where_undefined():
    predictions, labels = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])  # c 3, s 4, p 1 1 2, t 1 2 1
    assert METRICS["r3"](predictions, labels) == pytest.approx((12 - 5) / math.sqrt((16 - 6) * (16 - 6)))
    for constant in (np.zeros(4, int), np.full(4, 2)):
        assert METRICS["r3"](constant, labels) == 0 == METRICS["r3"](labels, constant)
        assert METRICS["matthews"](constant, constant) == 0
    many = np.arange(300_000) % 3  # s^4 is 8e21: no overflow
    assert METRICS["r3"](many, many) == pytest.approx(1)


@pytest.mark.parametrize("name, reference", [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_correlations_are_scipys(name, reference):
    labels = np.round(5 * keyed_uniform("labels", np.arange(200)), 1)  # with ties, as STS-B
    predictions = (labels + 3 * keyed_uniform("noise", np.arange(200))).astype(np.float32)
    expected = reference(predictions.astype(float), labels).statistic
    assert METRICS[name](predictions, labels) == pytest.approx(expected, abs=1e-12)
    assert METRICS[name](-predictions, labels) == pytest.approx(-expected, abs=1e-12)


def test_spearman_shares_ranks_of_ties_and_is_not_pearson():
    assert METRICS["spearman"]([1, 10, 100, 1000], [1, 2, 3, 4]) == pytest.approx(1)
    assert METRICS["pearson"]([1, 10, 100, 1000], [1, 2, 3, 4]) < 0.9
    ranks = METRICS["pearson"]([1.5, 1.5, 3, 4], [1, 2, 3, 4])
    assert METRICS["spearman"]([7, 7, 8, 9], [1, 2, 3, 4]) == pytest.approx(ranks)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("predictions", [[2.5, 2.5, 2.5], [1, math.nan, 2], [1, math.inf, 2], [math.nan] * 3])
def test_undefined_correlation_is_zero_without_a_warning(name, predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert METRICS[name](np.array(predictions, np.float32), np.array([1.0, 2, 3])) == 0
        assert METRICS[name]([1.0, 2, 3], [4.0, 4, 4]) == 0
        assert METRICS[name]([1.0], [2.0]) == 0


def test_rmse_by_hand_in_the_labels_unit():
    assert METRICS["rmse"](np.array([1.0, 2, 3]), np.array([1.0, 4, 7])) == pytest.approx(math.sqrt(20 / 3))
    assert METRICS["rmse"](np.array([1, 2], np.float32), np.array([1, 2], np.float32)) == 0
    assert math.isnan(METRICS["rmse"](np.array([math.nan, 2]), np.array([1.0, 2])))


# ---------------------------------------------------------------------------- diagnostics

E, N, C = "entailment", "neutral", "contradiction"


def test_diagnostics_count_an_item_in_every_category_it_is_tagged_with():
    labels, predictions = [E, N, C, C], [E, N, C, N]
    found = diagnostic_scores(predictions, labels, {
        "Logic": ["Negation", "", "Disjunction;Negation", "x"], "Knowledge": ["", "World", "Common", ""],
        "Lexical Semantics": ["", " ", "", ""]})
    assert found["Logic"] == {"accuracy": pytest.approx(2 / 3), "n": 3, "r3": pytest.approx(
        (2 * 3 - (1 * 1 + 1 * 2)) / math.sqrt((9 - 3) * (9 - 5)))}  # p: E 1, N 1, C 1; t: E 1, C 2
    assert found["Knowledge"] == {"accuracy": 1, "r3": pytest.approx(1), "n": 2}
    assert list(found) == ["Logic", "Knowledge"]


def test_diagnostics_merge_neutral_and_contradiction_for_two_way_labels():
    predictions, cells = [E, N, C, E, C], {"Logic": ["x"] * 5}
    two = diagnostic_scores(predictions, [E] + ["not_entailment"] * 3 + [E], cells)["Logic"]
    bits = METRICS["matthews"](np.array([1, 0, 0, 1, 0]), np.array([1, 0, 0, 0, 1]))
    assert two == {"accuracy": 0.6, "r3": pytest.approx(bits), "n": 5}
    three = diagnostic_scores(predictions, [E, C, C, N, E], cells)["Logic"]
    assert three["accuracy"] == 0.4 and three["r3"] != pytest.approx(bits)


def test_diagnostics_of_the_real_file(real_data):
    path = real_data / "diagnostics" / "DERIVED_diagnostic-full_2way.tsv"
    if not path.exists():
        pytest.skip(f"no {path}")
    with path.open(encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = list(rows[0])[:4]
    labels = [row["Label"] for row in rows]
    found = diagnostic_scores([E if label == E else C for label in labels], labels,
                                      {name: [row[name] for row in rows] for name in names})
    assert [found[name]["n"] for name in names] == [sum(row[name] != "" for row in rows) for name in names]
    assert sum(score["n"] for score in found.values()) > len(rows)  # some are in several
    assert all(score["accuracy"] == 1 and score["r3"] == pytest.approx(1) for score in found.values())


# ---------------------------------------------------------------------------- collapse and medians


def test_collapse_where_one_class_is_predicted():
    labels = np.arange(200) % 2
    predictions = labels.copy()
    assert collapse(predictions, labels, "classify") == ""
    constant = np.zeros(200, int)
    constant[:4] = 1  # 98 %: not more
    assert "of the predictions" not in collapse(constant, constant, "classify")
    constant[3] = 0
    assert collapse(constant, labels, "choice") == "98.5 % of the predictions are the same"
    assert collapse(constant, None, "span") == "98.5 % of the predictions are the same"
    assert collapse([""] * 50, None, "span") and not collapse(["a", "b"] * 25, None, "span")


def test_collapse_where_accuracy_is_not_above_the_best_constant_and_a_point():
    labels, predictions = np.repeat([0, 1, 2], [50, 30, 20]), np.zeros(100, int)
    predictions[90:95] = 1  # wrong
    predictions[50] = 1
    assert collapse(predictions, labels, "classify") == \
        "accuracy 51.0 %, and 50.0 % by the best constant"
    predictions[51] = 1
    assert collapse(predictions, labels, "choice") == ""


def test_collapse_of_regression_by_its_spread():
    labels = np.linspace(0, 5, 101, dtype=np.float32)
    assert collapse(0.011 * labels + 2, labels, "regress") == ""
    assert collapse(0.005 * labels + 2, labels, "regress") == \
        "the predictions have 0.5 % of the labels' spread"
    assert collapse(np.full(101, 2.5), labels, "regress").startswith("the predictions have 0 %")
    for bad in (math.nan, math.inf):
        assert "finite" in collapse(np.append(labels[1:], bad), labels, "regress")
    assert collapse(labels, np.full(101, 3.0), "regress") == ""


@pytest.mark.parametrize("scores, index", [
    ([0.5], 0), ([0.9, 0.1, 0.5], 2), ([0.4, 0.1, 0.3, 0.2], 3), ([0.5, 0.5, 0.5], 1), ([0.7, 0.2], 1),
    ([0.5, 0.9, 0.5, 0.1, 0.5], 2), ([math.nan, 0.6, 0.8], 1), ([0.6, math.nan, math.nan], 2),
    ([0.6, None, 0.8, 0.7], 0), ([math.nan] * 3, 1), ([-math.inf, 0.0, math.inf], 1)])
def test_median_run_is_the_lower_middle_one_and_nan_is_worst(scores, index):
    assert median_run(scores) == index


@pytest.mark.parametrize("n", [1, 3, 5, 9])
def test_median_run_of_an_odd_number_is_numpys_median(n):
    scores = keyed_uniform("median", n, np.arange(n))
    assert scores[median_run(scores)] == np.median(scores)


# ---------------------------------------------------------------------------- SQuAD, question by question

# prediction, gold answers, then what the official scripts print in percent: exact and F1 by evaluate-v1.1.py
# (None: it cannot read a question without answers), exact and F1 by evaluate-v2.0.py
OFFICIAL = [
    ("the DENVER, broncos!", ["Denver Broncos"], 100, 100, 100, 100),
    ("Broncos Denver", ["Denver Broncos"], 0, 100, 0, 100),
    ("Denver", ["Denver Broncos", "Broncos"], 0, 66.66666666666666, 0, 66.66666666666666),
    ("Denver Denver", ["Denver Broncos"], 0, 50, 0, 50),
    ("new new york", ["New, new city"], 0, 66.66666666666666, 0, 66.66666666666666),  # bags, not sets
    ("Denver", ["Carolina", "Denver Broncos of Denver"], 0, 40, 0, 40),  # each gold answer on its own
    ("a.b", ["ab"], 100, 100, 100, 100),                                 # punctuation goes before articles
    ("a b", ["b"], 100, 100, 100, 100),
    ("a-an", ["aan"], 100, 100, 100, 100),
    ("another", ["other"], 0, 0, 0, 0),                                  # articles are words
    ("th\xe9", ["the th\xe9"], 100, 100, 100, 100),                      # by Unicode's word boundaries
    ("a\u2014b", ["b"], 0, 0, 0, 0),                                     # the a goes, the dash stays
    ("\u201cDenver\u201d", ["Denver"], 0, 0, 0, 0),                      # typographic quotes stay
    ('"Denver"', ["Denver"], 100, 100, 100, 100),
    ("\xa0Denver\u2003 Broncos\n", ["Denver Broncos"], 100, 100, 100, 100),
    ("STRASSE", ["stra\xdfe"], 0, 0, 0, 0),                              # lower case, not case folding
    ("\u0130zmir", ["i\u0307zmir"], 100, 100, 100, 100),
    ("\u6771\u4eac", ["\u6771 \u4eac"], 0, 0, 0, 0),
    ("$1,000", ["1000"], 100, 100, 100, 100),
    ("", ["Denver"], 0, 0, 0, 0),
    ("the", ["The"], 100, 0, 100, 100),                                  # both normalise to nothing
    ("...", ["an", "Denver"], 100, 0, 0, 0),                             # 2.0 drops such a gold answer
    ("Denver", ["the", "Denver"], 100, 100, 100, 100),
    ("Denver", ["the"], 0, 0, 0, 0),
    ("", [], None, None, 100, 100),
    ("the", [], None, None, 100, 100),
    ("Denver", [], None, None, 0, 0),
]


def squad(questions, version, context="c"):
    """{id: [answers]} -> parsed json in SQuAD's layout, an article each; an answer: text or (text, start)."""
    articles = []
    for i, answers in questions.items():
        pairs = [answer if isinstance(answer, tuple) else (answer, 0) for answer in answers]
        question = {"id": i, "question": "who ?",
                    "answers": [dict(zip(("text", "answer_start"), pair)) for pair in pairs]}
        if version == "v2.0":
            question["is_impossible"] = not answers
        articles.append({"title": "t", "paragraphs": [{"context": context, "qas": [question]}]})
    return {"version": version, "data": articles}


@pytest.mark.parametrize("prediction, answers, exact_1, f1_1, exact_2, f1_2", OFFICIAL)
def test_squad_agrees_with_the_official_scripts(prediction, answers, exact_1, f1_1, exact_2, f1_2):
    if answers:
        found = squad_score(squad({"q": answers}, "1.1"), {"q": prediction})
        assert found == {"exact": exact_1, "f1": pytest.approx(f1_1, abs=1e-9), "total": 1}
    found = squad_score(squad({"q": answers}, "v2.0"), {"q": prediction})
    part = "HasAns_" if answers else "NoAns_"
    scores = {"exact": exact_2, "f1": pytest.approx(f1_2, abs=1e-9), "total": 1}
    assert found == scores | {part + name: score for name, score in scores.items()}


@pytest.mark.parametrize("text, expected", [
    ("  The\tCat's  a-b  ", "cats ab"), ("an A the", ""), ("U.S.A.", "usa"), ("the_", ""), ("A.", ""),
    ("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", ""), ("\u2019s \xbf", "\u2019s \xbf"), ("a\u0301", "\u0301")])
def test_normalise_by_hand(text, expected):
    assert normalise(text) == expected


# ---------------------------------------------------------------------------- SQuAD, whole files

GOLD = {"a": ["one two"], "b": ["three"], "c": [], "d": [], "e": ["four five six"]}
PREDICTIONS = {"a": "One, two", "b": "four", "c": "", "d": "something", "e": "five"}  # F1 1, 0, 1, 0, 1/2


def test_squad_2_by_hand_in_the_official_order():
    found = squad_score(squad(GOLD, "v2.0"), PREDICTIONS)
    assert found == {"exact": 40, "f1": 50, "total": 5, "HasAns_exact": pytest.approx(100 / 3),
                     "HasAns_f1": 50, "HasAns_total": 3, "NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2}
    assert list(found) == ["exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total", "NoAns_exact",
                           "NoAns_f1", "NoAns_total"]
    with_scores = squad_score(squad(GOLD, "v2.0"), PREDICTIONS, dict.fromkeys(GOLD, 0.0))
    assert list(with_scores)[9:] == ["best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"]


def test_best_threshold_by_hand():
    doubt = {"a": -2, "b": 3.5, "c": 9, "d": 0.5, "e": -1}  # in this order a, e, d, b, c: +1, +1/2, -1, 0, 0
    found = squad_score(squad(GOLD, "v2.0"), PREDICTIONS, doubt)
    assert found["best_exact"] == 60 and found["best_exact_thresh"] == -2
    assert found["best_f1"] == 70 and found["best_f1_thresh"] == -1
    assert found["exact"] == 40 and found["NoAns_exact"] == 50  # b and c, above 1, count as "": no change
    assert squad_score(squad(GOLD, "v2.0"), PREDICTIONS, doubt, threshold=0)["NoAns_exact"] == 100


def test_best_threshold_is_the_best_of_all_thresholds():
    n = 150
    ids = [f"q{i}" for i in range(n)]
    kinds = keyed_integers(4, "kinds", np.arange(n)).tolist()  # no answer; right, half right, wrong
    gold = squad({i: ["one two"] if kind else [] for i, kind in zip(ids, kinds)}, "v2.0")
    texts = keyed_integers(3, "texts", np.arange(n)).tolist()
    predictions = {i: ("", "one two", "one", "x")[kind] if kind else ("", "x", "one")[text]
                   for i, kind, text in zip(ids, kinds, texts)}
    doubt = dict(zip(ids, (keyed_uniform("doubt", np.arange(n)) * 9 - 2 - np.array(kinds)).tolist()))
    found = squad_score(gold, predictions, doubt)
    every = sorted(doubt.values())
    for name in ("exact", "f1"):
        scores = [squad_score(gold, predictions, doubt, t)[name] for t in every]
        assert found[f"best_{name}"] == pytest.approx(max(scores)) and max(scores) > found[name]
        assert max(scores) > squad_score(gold, predictions, doubt, -math.inf)[name]
        lowest = int(np.argmax(np.round(scores, 9)))  # of equally good ones
        assert found[f"best_{name}_thresh"] == every[lowest]


def test_best_threshold_starts_at_zero_and_ties_keep_the_order_of_the_file():
    gold = squad({"a": ["x"], "c": []}, "v2.0")
    predictions = {"a": "x", "c": "y"}
    first = squad_score(gold, predictions, {"a": 0.5, "c": 0.5})
    assert (first["best_f1"], first["best_f1_thresh"]) == (100, 0.5)  # as official: no threshold does so
    later = squad_score(gold, predictions, {"c": 0.5, "a": 0.5})
    assert (later["best_f1"], later["best_f1_thresh"]) == (50, 0.0)
    punctuated = squad_score(squad({"c": []}, "v2.0"), {"c": "..."}, {"c": 0.5})
    assert punctuated["exact"] == 100 and punctuated["best_exact"] == 100  # it reads the text as it stands
    assert punctuated["best_exact_thresh"] == 0


def test_no_answer_scores_may_be_numpys_or_infinite_and_of_other_ids():
    doubt = {"a": np.float32(0.25), "zzz": "no number", "c": math.inf}
    found = squad_score(squad({"a": ["x"], "c": []}, "v2.0"), {"a": "x", "c": ""}, doubt)
    assert (found["best_exact"], found["best_exact_thresh"]) == (100, 0.25)


@pytest.mark.parametrize("version, marked, is_2", [
    ("1.1", False, False), (1.1, False, False), (None, False, False), ("v1.1", False, False),
    ("v2.0", False, True), ("2.0", False, True), (2, False, True), ("1.1", True, True), (None, True, True)])
def test_squad_format_follows_version_and_is_impossible(version, marked, is_2):
    gold = squad({"q": ["the"]}, version)
    if marked:
        gold["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = False
    found = squad_score(gold, {"q": "a"})
    assert found["f1"] == (100 if is_2 else 0) and ("HasAns_f1" in found) == is_2


def test_missing_predictions_count_zero_in_1_1_and_others_are_left_out():
    gold = squad({"a": ["x"], "b": ["y"], "c": ["z"], "d": ["w"]}, "1.1")
    assert squad_score(gold, {"a": "x", "d": "w", "other": "v"}) == {"exact": 50, "f1": 50, "total": 4}


NO_QUESTION = {"version": "1.1", "data": []}
TEST_SPLIT = {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "q7", "question": "q"}]}]}]}


@pytest.mark.parametrize("gold, predictions, no_answer, says", [
    (squad(GOLD, "v2.0"), PREDICTIONS | {"c": None}, None, "answer to c is no text but NoneType"),
    (squad(GOLD, "1.1"), PREDICTIONS | {"b": ["x"]}, None, "answer to b is no text but list"),
    (squad(GOLD, "v2.0"), {"a": "x", "c": ""}, None, "3 of gold's 5 questions have none, the first is b"),
    (squad(GOLD, "v2.0"), {"zzz": "x"}, None, "5 of gold's 5 questions have none, the first is a; give"),
    (squad({"a": ["x"]}, "1.1"), {}, None, "predictions: 1 of gold's 1 questions have none"),
    (squad(GOLD, "v2.0"), PREDICTIONS, {"a": 0.0}, "no-answer scores: none for question b"),
    (squad(GOLD, "v2.0"), PREDICTIONS, dict.fromkeys(GOLD, math.nan), "no-answer scores: nan for question a"),
    (squad(GOLD, "v2.0"), PREDICTIONS, dict.fromkeys(GOLD, "0.5"), "no-answer scores: 0.5 for question a"),
    (squad({"a": ["x"]}, "1.1"), {"a": "x"}, {"a": 0.5}, "gold is SQuAD 1.1"),
    ({"q7": "text"}, PREDICTIONS, None, "gold: not in SQuAD's form at the first question .*'data'"),
    ({"data": {"a": 1}}, PREDICTIONS, None, "gold: not in SQuAD's form"),
    ([1, 2], PREDICTIONS, None, "gold: not in SQuAD's form"),
    (TEST_SPLIT, {"q7": "x"}, None, "gold: question q7 has no answers"),
    (squad({"a": ["x"], "b": [7]}, "1.1"), PREDICTIONS, None, "at question b .*no text"),
    (NO_QUESTION, PREDICTIONS, None, "holds no question")])
def test_wrong_squad_input_ends_in_one_line(gold, predictions, no_answer, says):
    with pytest.raises(SystemExit, match=says) as error:
        squad_score(gold, predictions, no_answer)
    assert "\n" not in str(error.value)


def test_real_dev_files_score_as_the_data_says(real_data):
    """The first gold answer is always right, and "" where 2.0 has none."""
    folder = real_data / "squad"
    for name in ("dev-v1.1.rebuilt.json", "dev-v2.0.rebuilt.json", "xquad.en.json"):
        if not (folder / name).exists():
            pytest.skip(f"no {folder / name}")
        gold = json.loads((folder / name).read_text(encoding="utf-8"))
        answers = {qa["id"]: [a["text"] for a in qa["answers"]] for article in gold["data"]
                   for paragraph in article["paragraphs"] for qa in paragraph["qas"]}
        found = squad_score(gold, {i: texts[0] if texts else "" for i, texts in answers.items()})
        assert found["exact"] == found["f1"] == 100 and found["total"] == len(answers)
        if "v2" in name:
            none = sum(not texts for texts in answers.values())
            empty = squad_score(gold, dict.fromkeys(answers, ""))
            assert empty["exact"] == pytest.approx(100 * none / len(answers)) and empty["NoAns_f1"] == 100
            assert (found["HasAns_total"], found["NoAns_total"]) == (len(answers) - none, none)
