"""Proves PWCCA against cases with known answers and a plain loop, and the visually-grounded ratio against the
examples that XDBERT's Appendix D prints; that both commands write what they say, and how bad input ends.

Run: python -m pytest -q tests/test_words.py
"""
import json
import math
import shutil

import numpy as np
import pytest
import torch

import analyze
from analyses import words
from conftest import TINY_WORDS, fine_tuned, stop_line, written
from model import BERT, BERTConfig, CLIPConfig, CLIPText
from parts.tasks import TASKS, find_file
from parts.vocab import SPECIALS, Vocab, load_clip_vocab, load_vocab
from parts.weights import load_bert, save_bert, save_clip


def gaussian(*key_and_shape):
    key, *shape = key_and_shape
    return np.random.default_rng(key).standard_normal(shape)


def pwcca(x, y):
    return words.projection_weighted_cca(words.view(x), words.view(y))[0]


# ---------------------------------------------------------------------------- PWCCA


def plain_pwcca(x, y):
    """The formula in loops, by way of the covariances' eigenvectors: x weighs, and is the narrower view."""
    x, y = x - x.mean(0), y - y.mean(0)
    xx, yy, xy = x.T @ x, y.T @ y, x.T @ y
    rho2, a = np.linalg.eig(np.linalg.inv(xx) @ xy @ np.linalg.inv(yy) @ xy.T)
    top = bottom = 0.0
    for i in range(x.shape[1]):
        h = x @ a[:, i].real
        h /= math.sqrt(sum(value * value for value in h))
        alpha = sum(abs(sum(h[k] * x[k, j] for k in range(len(x)))) for j in range(x.shape[1]))
        top, bottom = top + alpha * math.sqrt(rho2[i].real), bottom + alpha
    return top / bottom


def test_pwcca_equals_a_plain_loop_and_the_narrower_view_weighs():
    x = gaussian(1, 60, 4) * [1, 2, 5, 9]
    y = np.hstack([x[:, :2], gaussian(2, 60, 5)]) + gaussian(3, 60, 7)
    assert pwcca(x, y) == pytest.approx(plain_pwcca(x, y), abs=1e-10)
    assert pwcca(y, x) == pytest.approx(plain_pwcca(x, y), abs=1e-10)  # whichever comes first
    z = y[:, :4]
    assert pwcca(x, z) == pytest.approx(plain_pwcca(x, z), abs=1e-10)
    assert pwcca(z, x) == pytest.approx(plain_pwcca(z, x), abs=1e-10)  # of equal widths the first
    assert abs(pwcca(x, z) - pwcca(z, x)) > 1e-3


def test_pwcca_is_1_for_the_same_and_for_any_invertible_linear_map_of_it():
    x = gaussian(1, 80, 6)
    assert pwcca(x, x) == pytest.approx(1, abs=1e-12)
    assert pwcca(x, x @ gaussian(2, 6, 6) + 3) == pytest.approx(1, abs=1e-9)
    assert pwcca(x, x @ gaussian(2, 6, 9)) == pytest.approx(1, abs=1e-9)  # embedded in more dimensions
    assert pwcca(x, gaussian(3, 80, 6)) < 0.5


def test_pwcca_is_invariant_to_what_it_says():
    x, y = gaussian(1, 80, 5) * [1, 1, 1, 5, 9], gaussian(2, 80, 8)
    y[:, :2] += x[:, 3:]
    q = np.linalg.qr(gaussian(3, 8, 8))[0]
    for same in (pwcca(7 * x + 2, y), pwcca(x, 0.01 * y - 5), pwcca(x, y @ q), pwcca(x, y @ gaussian(4, 8, 8))):
        assert same == pytest.approx(pwcca(x, y), abs=1e-9)
    q = np.linalg.qr(gaussian(5, 5, 5))[0]
    rho, turned = (words.projection_weighted_cca(words.view(z), words.view(y))[1] for z in (x, x @ q))
    np.testing.assert_allclose(rho, turned, atol=1e-10)
    assert abs(pwcca(x @ q, y) - pwcca(x, y)) > 1e-4  # other neurons, other weights


def test_singular_views_lose_only_their_empty_directions():
    x, y = gaussian(1, 70, 4), gaussian(2, 70, 9)
    twice = np.hstack([x, x[:, :2], np.full((70, 1), 3.0)]).astype(np.float32).astype(float)  # of rank 4
    assert words.view(twice)[0].shape == (70, 4)
    u, c = words.view(twice)
    np.testing.assert_allclose(u @ c, twice - twice.mean(0), atol=1e-5)
    assert words.projection_weighted_cca((u, c), words.view(y))[1] == pytest.approx(
        words.projection_weighted_cca(words.view(x), words.view(y))[1], abs=1e-5)
    assert words.view(np.ones((5, 3)))[0].size == 0


def test_level_of_independent_gaussians_is_that_of_a_simulation():
    """The mean squared correlation is d_max / (n - 1); PWCCA has the mean of Wachter's law, also where only one
    of the views is Gaussian, and where more dimensions meet than there are words."""
    for n, d, e in ((400, 40, 60), (300, 50, 50), (100, 30, 90), (60, 30, 40)):
        found, squared = [], []
        for key in range(6):
            x, y = gaussian(key, n, d) ** 3 * np.arange(1, d + 1), gaussian(100 + key, n, e)
            value, rho = words.projection_weighted_cca(words.view(x), words.view(y))
            found.append(value)
            squared.append(np.mean(rho ** 2))
        assert np.mean(squared) == pytest.approx(e / (n - 1), abs=0.01)
        assert np.mean(found) == pytest.approx(words.independent_level(n, d, e), abs=0.01)
        assert words.independent_level(n, d, e) == words.independent_level(n, e, d)
    assert words.independent_level(100, 30, 99) == 1
    # equally wide and many words: a quarter circle of radius 2 sqrt(a) with the mean 8 sqrt(a) / (3 pi)
    assert words.independent_level(10 ** 6 + 1, 100, 100) == pytest.approx(8 / (3 * math.pi) * 1e-2, rel=1e-3)


def test_whole_words_of_both_kinds_of_vocabulary(tiny_clip):
    vocab = Vocab([*SPECIALS, "[unused0]", "[", "]", "cat", "##s", "a", "unused", "##0", "é"])
    assert words.whole_words(vocab) == ["[", "]", "cat", "a", "unused"]  # é is read as e
    clip = load_clip_vocab(tiny_clip)
    whole = words.whole_words(clip)
    assert {*TINY_WORDS} - {"before"} <= {*whole}  # its merges leave that in two pieces
    assert not {"<|startoftext|>", "<|endoftext|>", "ca", "before"} & {*whole}
    assert all(clip.tokens[clip.encode([word])[0][0]] == f"{word}</w>" for word in whole if word.isalpha())


def test_vectors_of_words_are_means_of_their_pieces():
    vocab = Vocab([*SPECIALS, "cat", "##s", "a"])
    table = gaussian(1, vocab.size, 3).astype(np.float32)
    found = words.vectors_of(["a", "cats", "cat a"], vocab, table)
    np.testing.assert_allclose(found, [table[7], (table[5] + table[6]) / 2, (table[5] + table[7]) / 2], rtol=1e-6)
    assert words.unread_words(["a", "dog", "[MASK]"], vocab) == {"dog", "[MASK]"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A BERT, the same with linearly mapped embeddings, an ELECTRA with narrow ones and a CLIP text tower."""
    folder, vocab = tmp_path_factory.mktemp("models"), Vocab([*SPECIALS, *TINY_WORDS, "##s"])
    torch.manual_seed(0)
    shape = dict(layers=1, heads=2, intermediate=16, max_positions=8, init_std=0.1)
    bert = BERT(BERTConfig(vocab.size, hidden=8, **shape))
    save_bert(bert, folder / "bert", vocab)
    with torch.no_grad():
        bert.embeddings.word.weight.copy_(bert.embeddings.word.weight @ torch.randn(8, 8))
    save_bert(bert, folder / "mapped", vocab)
    electra = BERT(BERTConfig(vocab.size, hidden=8, embedding=6, model_type="electra", **shape))
    save_bert(electra, folder / "electra", vocab)
    clip = CLIPText(CLIPConfig(vocab.size, layers=1, hidden=8, heads=2, intermediate=16, positions=8,
                               projection=8))
    save_clip(clip, folder / "clip", vocab)
    return folder


def test_pwcca_command_writes_pairs_and_baselines(models, tmp_path, capsys):
    out = tmp_path / "figures" / "pwcca.png"
    paths = [str(models / name) for name in ("bert", "mapped", "electra", "clip")]
    analyze.main(["pwcca", *paths, "--out", str(out)])
    found = written(out)
    pairs, n = found["pairs"], len(set(TINY_WORDS))
    assert list(pairs) == ["bert / mapped", "bert / electra", "bert / clip", "mapped / electra", "mapped / clip",
                           "electra / clip"]
    assert pairs["bert / mapped"]["pwcca"] == pytest.approx(1, abs=1e-5)
    one = pairs["bert / electra"]
    assert one["words"] == n and one["widths"] == [8, 6] and one["level"] == words.independent_level(n, 8, 6)
    x, y = (load_bert(models / name).embeddings.word.weight.detach().double().numpy()[5:-1]
            for name in ("bert", "electra"))
    assert one["pwcca"] == pytest.approx(plain_pwcca(y, x), abs=1e-6) and one["pwcca"] < 0.8
    assert all(0.2 < value < 0.9 for pair in pairs.values() for value in pair["random"])
    text = capsys.readouterr().out
    assert f"{one['pwcca']:.4f}" in text and "the paper's BERT / CLIP" in text and "0.4980" in text
    assert found["paper"]["BERT / random"] == 0.3569


def test_pwcca_over_a_file_of_words(models, tmp_path):
    chosen = ["cats", *TINY_WORDS[:20], "dogs", "cats"]
    (tmp_path / "words.txt").write_text("\n".join(chosen) + "\n\n")
    paths = [str(models / name) for name in ("bert", "clip")]
    analyze.main(["pwcca", *paths, "--words", str(tmp_path / "words.txt"), "--out", str(tmp_path / "a.png")])
    found = written(tmp_path / "a.png")["pairs"]["bert / clip"]
    assert found["words"] == len(set(chosen))


def test_pwcca_ends_in_one_line(models, tmp_path, capsys):
    bert, out, few = str(models / "bert"), ["--out", str(tmp_path / "a.png")], tmp_path / "few.txt"

    def line(*more):
        return stop_line(analyze.main, ["pwcca", bert, *more, *out])
    assert "two or more" in line()
    assert "nowhere: no model there" in line("nowhere")
    few.write_text("\n".join(TINY_WORDS[:9]))
    assert "9 words for a width of 8" in line(bert, "--words", str(few))
    few.write_text("\n".join([*TINY_WORDS[:9], "xylophone", "zebra"]))
    assert "9 words for a width of 8" in line(bert, "--words", str(few))  # what cannot be read is left out, and said
    assert "2 of the words are left out, such as 'xylophone'" in capsys.readouterr().out
    few.write_text("\n")
    assert "is empty" in line(bert, "--words", str(few))
    constant = load_bert(bert)
    torch.nn.init.ones_(constant.embeddings.word.weight)
    save_bert(constant, tmp_path / "constant", load_vocab(bert))
    assert "all the same" in line(str(tmp_path / "constant"))
    constant.embeddings.word.weight.data[7, 0] = math.nan
    save_bert(constant, tmp_path / "nan", load_vocab(bert))
    assert "not finite" in line(str(tmp_path / "nan"))
    torch.save({}, tmp_path / "clip.pt")
    assert "clip.pt" in line(str(tmp_path / "clip.pt"))
    assert not (tmp_path / "a.png").exists()


def test_pwcca_warns_of_few_words_for_the_widths(models, tmp_path, capsys):
    few = tmp_path / "few.txt"
    few.write_text("\n".join(TINY_WORDS[:14]))
    paths = [str(models / name) for name in ("bert", "clip")]
    words.pwcca(paths, str(few), out=str(tmp_path / "a.png"))
    assert "3 correlations are 1 between any two models" in capsys.readouterr().out  # 8 + 8 - 13
    found = written(tmp_path / "a.png")["pairs"]["bert / clip"]
    vectors = [words.vectors_of(TINY_WORDS[:14], *words.word_embeddings(models / name))
               for name in ("bert", "clip")]
    rho = words.projection_weighted_cca(*map(words.view, vectors))[1]
    assert (rho > 1 - 1e-9).sum() == 3 and found["pwcca"] < 1


# ---------------------------------------------------------------------------- visually-grounded ratio

# XDBERT Appendix D: every word that stands in brackets
BRACKETS = """a about after all an and are as been before between both but by for from has have he his in into is it
its more now of on other over some than that the their there they this to under up was were which who will
with""".split()
# D.1 examples 1 to 3 as the paper marks them, its line breaks and lost blanks mended
PRINTED = ["""hands across (the) divide (was) formed (in) march 2001 (,) (and) one (of) (its) immediate aims (was)
(to) press (for) (more) freedom (of) contact (and) communication right away (between) (the) two parts (of) cyprus
(,) (and) (for) early progress towards (a) solution (to) (') (the) cyprus problem (') (.) cyprus (was) divided
(into) two parts (in) march 2001 (.)""", """(it) (is) hoped (that) women (,) (who) constitute (more) (than) half
(of) (the) population (,) (will) vote (for) (other) women (and) ensure (that) (their) issues (are) represented
(in) parliament (.) women (are) poorly represented (in) parliament (.)""", """ho ##dler claimed (there) (were)
also irregularities (in) (the) campaigns organized (by) atlanta (for) (the) 1996 summer games (,) sydney (for)
(the) summer olympics (in) 2000 (and) salt lake city (for) (the) 2002 winter games (.) (before) salt lake city (,)
winter olympic games took place (in) naga ##no (.)"""]


def unmarked(text):
    return text.replace("(", "").replace(")", "").replace(" ##", "")


def brackets_of(marked):
    return " ".join(f"({piece})" if not kind else piece for piece, kind in marked)


def test_stop_words_agree_with_appendix_d():
    assert set(BRACKETS) <= words.STOP_WORDS
    content = {word for text in PRINTED for word in text.split() if not word.startswith("(")}
    assert not (content | {"would", "every", "often", "per", "along", "someone", "back"}) & words.STOP_WORDS


@pytest.mark.parametrize("text, printed, counted", [*zip(PRINTED, (27, 14, 30), (30, 15, 31))])
def test_brackets_of_the_examples_in_print_are_found(text, printed, counted):
    """The paper's denominators are short of its own text: 11 + 16 of 30 pieces, 4 + 10 of 15, 13 + 17 of 31."""
    vocab = Vocab([*SPECIALS, *dict.fromkeys(word.strip("()") for word in text.split())])
    marked = words.mark(unmarked(text), vocab, np.zeros(vocab.size, bool))
    assert brackets_of(marked) == " ".join(text.split())
    assert sum(kind == "other" for _, kind in marked) == counted >= printed


def test_ratios_of_appendix_d_follow_from_its_counts():
    """Two slips: D.2 example 1 prints .1375 for 6/38, and D.3 example 2 has the counts of example 1 before the
    ratio .4167: its text has 24 pieces, and 10/24 = .4167."""
    for grounded, other, ratio in ((11, 16, .4074), (4, 10, .2857), (13, 17, .4333), (6, 32, .1579), (5, 16, .2381),
                                   (8, 16, .3333), (11, 29, .2750), (10, 14, .4167), (32, 55, .3678)):
        marked = [("x", "grounded")] * grounded + [("y", "other")] * other + [("the", "")] * 9
        assert words.grounded_ratio(marked) == pytest.approx(ratio, abs=5e-5)
    assert math.isnan(words.grounded_ratio([("the", "")]))


def test_appendix_d_on_rte_and_captions_of_coco(real_data, bert_vocab):
    """The nine examples from RTE itself, with 25,000 of COCO's captions: each ratio is near the printed one."""
    counts, n = words.count_pieces(real_data / "coco" / "testall_caps.txt", bert_vocab)
    seen = counts > 100 * n / words.COCO_CAPTIONS
    rows = [line.split("\t") for split in ("dev", "train")
            for line in (real_data / "glue" / "RTE" / f"{split}.tsv").read_text().split("\n")[1:-1]]
    printed = {("Hands Across", "Cyprus was"): .4074, ("It is hoped that women", ""): .2857,
               ("Hodler claimed", ""): .4333, ("On October 1 2001", "In 2001, the EU introduced a pass"): .1579,
               ("Security forces were on high", ""): .2381, ("In 1979, the leaders", "The Israel"): .3333,
               ("Jean-Claude Trichet, the", "Antonio"): .2750, ("About half were along", "The coast"): .4167,
               ("Cairo is now home", "15"): .3678}
    for (first, second), ratio in printed.items():
        texts = next(row[1:3] for row in rows if row[1].startswith(first) and row[2].startswith(second))
        marked = [piece for text in texts for piece in words.mark(text, bert_vocab, seen)]
        assert words.grounded_ratio(marked) == pytest.approx(ratio, abs=0.11), first
        assert {piece for piece, kind in marked if not kind and piece.isalpha()} <= {*BRACKETS}


def test_words_are_marked_by_whole_words_and_pieces_are_counted():
    vocab = Vocab([*SPECIALS, "the", "in", "##s", "cat", "[", "]", ".", "5"])
    seen = np.zeros(vocab.size, bool)
    seen[[5, 7, 9]] = True  # the, ##s, [
    assert words.mark("The ins [ ] cats . cat 5 zebra in", vocab, seen) == [
        ("the", ""), ("in", "other"), ("##s", "grounded"), ("[", ""), ("]", ""), ("cat", "other"),
        ("##s", "grounded"), (".", ""), ("cat", "other"), ("5", "other"), ("[UNK]", ""), ("in", "")]
    cased = Vocab([*SPECIALS, "The", "Cat"], lower=False)
    assert words.mark("The Cat", cased, seen) == [("The", ""), ("Cat", "other")]


CAPTIONS = ["a cat ran", "the cat sat .", "two dogs"]


@pytest.mark.parametrize("kind", ("text", "howto", "coco", "coco long"))
def test_captions_of_every_kind_are_counted_alike(kind, tmp_path):
    vocab, path, n = Vocab([*SPECIALS, *TINY_WORDS, "##s"]), tmp_path / "captions", 1
    if kind == "text":
        path.write_text("\n\n".join(CAPTIONS))
    elif kind == "howto":
        path.write_text(json.dumps({f"v{i}": {"start": [0, 1], "end": [1, 2], "text": [text, ""]}
                                    for i, text in enumerate(CAPTIONS)}))
    else:
        n = 8000 if kind == "coco long" else 1  # above 1 MB: read in several pieces
        rows = [{"image_id": 7, "id": 1, "caption": text.replace(" ", "\n")} for text in CAPTIONS * n]
        path.write_text(json.dumps({"info": {"year": 2014}, "images": [{"id": 7}], "annotations": rows,
                                    "licenses": []}))
    counts, captions = words.count_pieces(path, vocab)
    found = {vocab.tokens[i]: int(counts[i]) for i in np.flatnonzero(counts)}
    assert captions == 3 * n and found == {
        word: n * k for word, k in {"cat": 2, "a": 1, "ran": 1, "the": 1, "sat": 1, ".": 1, "two": 1, "dog": 1,
                                    "##s": 1}.items()}


def test_captions_that_cannot_be_read_end_in_one_line(tmp_path):
    vocab, path = Vocab([*SPECIALS, "cat"]), tmp_path / "captions.json"
    for content, expected in (('{"info": {}, "annotations": [{"caption": "cat"}', "no whole list of annotations"),
                              ('{"info": {}, "images": []}', "no whole list"),
                              ('{"annotations": [{"bbox": [0]}]}', "annotation without a caption"),
                              ('{"info": {}, "annotations": []}', "holds no caption"), (" \n", "no caption"),
                              ('{"v": {"text": ["cat"]}}', "not three lists")):
        path.write_text(content)
        assert expected in stop_line(words.count_pieces, path, vocab)


def test_permutation_p_is_that_of_all_divisions():
    """Of the 20 divisions of 1..6 in threes 2 are as far apart as 123 and 456; equal means always are."""
    assert words.permutation_p([1., 2, 3], [4., 5, 6]) == pytest.approx(2 / 20, abs=0.01)
    assert words.permutation_p([1., 4], [4., 1]) == 1
    assert words.permutation_p(np.arange(30.), np.arange(30.) + 40) == 1 / 10000
    assert math.isnan(words.permutation_p([], [1.0]))
    assert words.permutation_p([1., 2, 9], [4., 5]) == words.permutation_p([1., 2, 9], [4., 5])


@pytest.fixture
def runs(tiny_tasks, tiny_bert, tmp_path):
    """make(model, task, {seed: predictions}): folder of a model as finetune.py leaves it."""
    def make(model, name, predictions):
        folder = tmp_path / "finetune" / model
        fine_tuned(folder / name, name, tiny_tasks, predictions, model=str(tiny_bert), cross="")
        return folder
    return make


def gold(tiny_tasks, name):
    task = TASKS[name]
    return task.read(task, find_file(task, tiny_tasks, task.evals[""]), True)


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("the cat ran\nthe cat ran\n")
    return str(path)


def test_grounded_command_groups_examples_by_right_runs(runs, tiny_tasks, tiny_bert, captions, tmp_path, capsys):
    rows = gold(tiny_tasks, "rte")
    right, wrong = np.array(rows.labels), 1 - np.array(rows.labels)
    a, b = right.copy(), right.copy()
    a[:6], b[6:10] = wrong[:6], wrong[6:10]  # B improves 0 to 5, worsens 6 to 9: 6 and 7 in one run of two
    runs("a", "rte", {0: a, 1: a, 5: wrong})  # seeds 5 and 6 have no partner
    runs("b", "rte", {0: b, 1: np.concatenate([right[:8], b[8:]]), 6: wrong})
    shutil.copytree(tiny_bert, tmp_path / "finetune" / "a" / "rte" / "s0" / "model")
    out, folders = tmp_path / "grounded.png", [str(tmp_path / "finetune" / model) for model in "ab"]
    analyze.main(["grounded", *folders, "--captions", captions, "--min_count", "1", "--out", str(out)])
    found = written(out)
    result = found["tasks"]["rte"]
    assert result["runs"] == 2 and found["n_captions"] == 2 and found["min_count"] == 1
    assert {group: result["groups"][group]["examples"] for group in words.GROUPS} == {
        "improved": list(range(6)), "worsened": list(range(6, 10)), "on par": list(range(10, len(right)))}
    for group in words.GROUPS:  # by hand: of the tiny world's words cat and ran are grounded
        for i, ratio in zip(*result["groups"][group].values()):
            content = [word for word in f"{rows.first[i]} {rows.second[i]}".split()
                       if word not in words.STOP_WORDS]
            assert ratio == pytest.approx(sum(word in ("cat", "ran") for word in content) / len(content))
    assert result["shown"]["improved"]["A"] == 0 and result["shown"]["improved"]["B"] == 2
    text = capsys.readouterr().out
    assert "RTE, improved: example 1, answered correctly: A 0/2, B 2/2" in text and "(the)" in text
    assert "RTE, worsened: example 9, answered correctly: A 2/2, B 0/2" in text and "\033" not in text
    ratios = result["groups"]["worsened"]["ratios"]
    assert f"4: {np.mean(ratios):.4f} / {np.median(ratios):.4f}" in text
    analyze.main(["grounded", f"{folders[0]}/rte", folders[1], "--captions", captions, "--out", str(out)])
    assert written(out)["min_count"] == pytest.approx(200 / 591753)
    words.grounded(*folders, captions=captions, min_count=2, out=str(out))  # cat and ran do not occur more often
    groups = written(out)["tasks"]["rte"]["groups"]
    assert not any(ratio for group in groups.values() for ratio in group["ratios"])


def test_shown_text_is_bold_on_a_terminal():
    one = {"example": 4, "A": 0, "B": 3, "ratio": 0.5, "grounded": 1, "other": 1,
           "texts": [[("the", ""), ("cat", "grounded"), ("##s", "other")], [(".", "")]]}
    plain, bold = (words.shown_text("RTE", "improved", one, 3, bold) for bold in (False, True))
    assert plain == ("RTE, improved: example 5, answered correctly: A 0/3, B 3/3; visually-grounded ratio 1/(1+1) = "
                     "0.5000\n  (the) *cat* ##s\n  (.)")
    assert "(the) \033[1mcat\033[0m ##s" in bold


def test_grounded_ends_in_one_line(runs, tiny_tasks, captions, tmp_path):
    labels = np.array(gold(tiny_tasks, "rte").labels)
    a = str(runs("a", "rte", {0: labels}))
    b = runs("b", "rte", {0: labels})
    scores = np.array(gold(tiny_tasks, "stsb").labels)
    runs("a", "stsb", {0: scores}), runs("b", "stsb", {0: scores})
    out = ["--captions", captions, "--out", str(tmp_path / "a.png")]

    def line(*more):
        return stop_line(analyze.main, ["grounded", a, *map(str, more), *out])
    assert "no finished run of finetune.py" in line("nowhere")
    assert "choose one of sst2" in line(b, "--task", "chess")
    assert "must be 0 or more" in line(b, "--min_count", "-3") and "nan" in line(b, "--min_count", "nan")
    assert "STS-B has scores" in line(b, "--task", "stsb")
    assert "--captions is missing" in stop_line(analyze.main, ["grounded", a, str(b), *out[2:]])
    assert "no such file" in line(b, "--data_dir", tmp_path).lower()
    assert not (tmp_path / "a.png").exists()
