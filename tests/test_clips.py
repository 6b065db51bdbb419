"""Proves that retrieval, vokens and nearest words are what plain loops find, that clips are shown as they are,
that examples follow from the predictions, and that bad inputs end in one line.

Run: python -m pytest -q tests/test_clips.py
"""
import functools
import json
import math
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK_STUDENT, fine_tuned, stop_line, written
from matplotlib.image import imsave

import analyze
import distill
import losses
from analyses import clips, figures
from parts.metrics import Top, ranks, recall, top
from parts.tasks import TASKS, find_file
from parts.weights import read_tensors


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x, y):
    """By the definition, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y))


@pytest.fixture(scope="module")
def run(demo, teacher_run, tmp_path_factory):
    """Folder of a distillation of a few steps by CRD, its text-only twin beside it."""
    folder, world = tmp_path_factory.mktemp("clips"), demo / "demo-s0"
    for objective in ("none", "crd"):
        paths = dict(train=str(world / "corpus.h5"), videos=str(world / "videos.h5"),
                     teacher="" if objective == "none" else str(teacher_run),
                     out_dir=str(folder / f"distill-{objective}-s0"))
        distill.main(distill.Config(**(QUICK_STUDENT | paths | dict(objective=objective))))
    return folder / "distill-crd-s0"


@pytest.fixture(scope="module")
def opened(run):
    """(run, judge, gallery, readers)."""
    run, judge = clips.open_run(run)
    readers = clips.open_readers(run, judge)
    clips.fit_spaces(readers, judge, fit=200)
    return run, judge, clips.Gallery(judge), readers


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ridge maps from few clips, as they take seconds."""
    monkeypatch.setattr(clips, "fit_spaces", functools.partial(clips.fit_spaces, fit=200))


# ---------------------------------------------------------------------------- measures


def test_ranks_equal_a_plain_loop_and_ties_count_against_the_query():
    query, target = randn(50, 6), randn(50, 6, seed=1)
    target[7] = target[3]  # query 3's own and query 7's own tie
    found = ranks(query, target, chunk=8).tolist()
    for i in range(50):
        scores = [cosine(query[i], target[j]) for j in range(50)]
        assert found[i] == sum(s >= scores[i] - 1e-9 for s in scores)  # its own is one of them
    assert recall(query, target, ks=(5,))["5"] == pytest.approx(np.mean([r <= 5 for r in found]))
    assert ranks(torch.full_like(query, float("nan")), target).tolist() == [50] * 50


def test_top_is_a_plain_sort_whatever_the_parts_and_the_first_of_equals_wins():
    query, target = randn(5, 6), randn(97, 6, seed=1)
    target[90] = target[11]
    wanted = [sorted(range(97), key=lambda j: -cosine(q, target[j]))[:3] for q in query]
    for size in (1, 7, 50, 97):
        found = Top(query, 3)
        for part in target.split(size):
            found.add(part)
        assert [[11 if j == 90 else j for j in row] for row in found.index.tolist()] == [
            [11 if j == 90 else j for j in row] for row in wanted]
        np.testing.assert_allclose(found.cosine, [[cosine(q, target[j]) for j in row]
                                            for q, row in zip(query, wanted)], atol=1e-6)
    equal = torch.ones(9, 2)
    assert top(equal[:1], equal, 3)[1].tolist() == [[0, 1, 2]]
    assert top(equal[:1], equal[:2], 3)[1].shape == (1, 2)  # no more than there are


def test_top_never_holds_the_scores_of_all(monkeypatch):
    seen, sort, query, target = [], torch.Tensor.sort, randn(2, 4), randn(60000, 4, seed=1)
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, **kw: seen.append(x.shape[1]) or sort(x, **kw))
    index = top(query, target, 3)[1]
    assert len(seen) == 15 and max(seen) == 4096 + 3
    monkeypatch.undo()
    whole = Top(query, 3)
    whole.add(target)
    assert index.tolist() == whole.index.tolist()


# ---------------------------------------------------------------------------- retrieval


def plain_vectors(judge, reader, heads, clip):
    """(sentence, video) of a held-out clip in CRD's space, each by itself and by the formulas."""
    batch = judge.clips[1].clips([clip])
    n = int(batch["mask"].sum())
    h = reader.bert(batch["ids"][:, :n])[0]  # no padding, no mask
    z = F.linear(h, heads["heads.crd.0.weight"], heads["heads.crd.0.bias"]).relu()
    z = F.linear(z, heads["heads.crd.2.weight"], heads["heads.crd.2.bias"])
    z = F.linear(z, heads["f1.weight"], heads["f1.bias"]).mean(0)
    v = judge.video(batch["frames"])[0]
    return z, F.linear(v, heads["f2.weight"], heads["f2.bias"])


@torch.no_grad()
def test_scores_of_the_held_out_clips_are_those_of_a_plain_loop(opened):
    run, judge, _, readers = opened
    assert list(readers) == ["teacher", "crd", "text-only"]
    rows = clips.held_out_scores(readers, judge)
    assert [(row["model"], row["space"]) for row in rows[:3]] == [
        ("teacher", "mean state as it is"), ("teacher", "after one ridge map"), ("crd", "aligned space")]
    heads, n = read_tensors(run / "model" / "heads.safetensors"), len(judge.clips[1])
    pairs = [plain_vectors(judge, readers["crd"], heads, i) for i in range(n)]
    found = []
    for i in range(n):
        scores = [cosine(pairs[i][0], pairs[j][1]) for j in range(n)]
        found.append(sum(s >= scores[i] for s in scores))
    assert rows[2]["median"] == np.median(found)
    assert all(rows[2][str(k)] == pytest.approx(np.mean([r <= k for r in found])) for k in (1, 5, 10))


def test_retrieval_draws_the_clips_of_highest_cosine(opened, tmp_path, capsys):
    run, judge, gallery, readers = opened
    out = tmp_path / "retrieval.png"
    held_out = judge.clips[1]
    state = gallery.states[held_out.captions([0])[0]]
    analyze.main(["retrieval", str(run), "--sentence", f"the bishop blessed the {state['noun']} .", "--sentence",
                  "in the northern valley .", "--out", str(out)])
    found, text = written(out), capsys.readouterr().out
    assert found["held_out"] == found["searched"] == len(held_out) and "R@10" in text
    assert found["chance_median"] == (len(held_out) + 1) / 2
    for one in found["sentences"]:
        ids, mask = clips.encode_texts([one["sentence"]], held_out.vocab, readers, "x")
        with torch.no_grad():
            query = readers["teacher"].bert(ids, mask)[0].mean(0)
            v = {int(c): judge.video(gallery.clips.clips([c])["frames"])[0]
                 for c in held_out.captions(np.arange(len(held_out)))}
        best = sorted(v, key=lambda c: -cosine(query, v[c]))[:3]
        assert [clip["caption"] for clip in one["clips"]["teacher"]] == best
        assert one["clips"]["teacher"][0]["cosine"] == pytest.approx(cosine(query, v[best[0]]), abs=1e-5)
        nouns = [state["noun"]] * (one is found["sentences"][0])
        for clip in one["clips"]["crd"]:
            fits = gallery.states[clip["caption"]]["noun"] in nouns if nouns else None
            assert clip["fits"] is fits
            assert figures.describe(gallery.states[clip["caption"]]) in clip["clip"]


def test_sample_of_clips_is_of_the_held_out_ones_or_of_the_whole_file(opened):
    _, judge, gallery, _ = opened
    held_out = judge.clips[1].captions(np.arange(40))
    some = gallery.sample(judge, 25, 0)
    assert len(set(some.tolist())) == 25 and set(some) < set(held_out)
    assert set(gallery.sample(judge, 60000, 0)) == set(held_out)
    assert some.tolist() != gallery.sample(judge, 25, 1).tolist()
    real = clips.Gallery(SimpleNamespace(**vars(judge) | {"latents": None}))
    many = real.sample(judge, 3000, 0)
    assert len(set(many.tolist())) == 3000 and many.max() > 7000 and not set(many) <= set(held_out)
    assert len(real.sample(judge, 60000, 0)) == len(judge.latents["clips"])
    v = real.vectors(judge, many[:5])  # the clip that a number stands for is the one whose caption has it
    with h5py.File(judge.clips[0].path) as f:
        for c, vector in zip(many[:5], v):
            video = np.searchsorted(f["caption_offsets"][:], c, "right") - 1
            assert real.video(c)[0] == f["video_id"][video].decode()
            first = f["frame_offsets"][video] + math.floor(f["start"][c])
            frames = f["frames"][first:first + math.ceil(f["end"][c]) - math.floor(f["start"][c])]
            with torch.no_grad():
                wanted = judge.video(torch.from_numpy(frames.astype(np.float32))[None])[0]
            torch.testing.assert_close(vector, wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------- thumbnails


def image(path, width=40, height=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.full((height, width, 3), 120, np.uint8))
    return path


def test_thumbnails_are_found_in_each_of_the_layouts(tmp_path):
    flat = [image(tmp_path / f"abc_{second}.{kind}") for second, kind in ((3, "jpg"), (5, "png"), (9, "jpg"))]
    assert clips.frame_files(tmp_path, "abc", 3.2, 5.4) == flat[:2]
    assert clips.frame_files(tmp_path, "abc", 6.0, 8.0) == []
    inside = [image(tmp_path / "xyz" / f"{second}.jpg") for second in range(30)]
    found = clips.frame_files(tmp_path, "xyz", 2.0, 22.0)
    assert found[0] == inside[2] and found[-1] == inside[21] and len(found) == 6 and found == sorted(
        found, key=inside.index)
    one = image(tmp_path / "whole.png")
    assert clips.frame_files(tmp_path, "whole", 100.0, 120.0) == [one]
    assert clips.frame_files(tmp_path, "nothing", 0.0, 9.0) == []


def test_real_clips_are_shown_as_thumbnails_or_as_text(run, tmp_path, monkeypatch, capsys):
    opening = clips.open_judge
    monkeypatch.setattr(clips, "open_judge",
                        lambda *args: SimpleNamespace(**vars(opening(*args)) | {"latents": None}))
    drawn = []
    monkeypatch.setattr(clips, "draw_images", lambda axis, images: drawn.append(images))
    folder = tmp_path / "thumbnails"
    folder.mkdir()
    flags = ["retrieval", str(run), "--sentence", "the bishop blessed the vase .", "--clips", "300",
             "--thumbnails", str(folder), "--out", str(tmp_path / "a.png")]
    analyze.main(flags)
    found, text = written(tmp_path / "a.png"), capsys.readouterr().out
    assert not drawn and f"{folder}: has no thumbnail of these clips" in text and found["searched"] == 300
    shown = found["sentences"][0]["clips"]["teacher"]
    judge, = [clips.open_run(run)[1]]
    gallery = clips.Gallery(judge)
    assert gallery.text(shown[0]["caption"]) in shown[0]["clip"] and shown[0]["fits"] is None
    video, start, _ = gallery.video(shown[0]["caption"])
    path = image(folder / f"{video}_{int(start)}.jpg")
    analyze.main(flags)
    assert [path] in drawn and "no thumbnail" not in capsys.readouterr().out
    monkeypatch.undo()
    _, ((axis,),) = figures.grid(1, 1, 3, 1)
    clips.draw_images(axis, [image(tmp_path / "b.png", 400, 1000), path])
    assert len(axis.images) == 2 and axis.images[0].get_array().shape[0] <= 200
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    assert "cannot be read as an image" in stop_line(clips.draw_images, axis, [tmp_path / "broken.png"])


# ---------------------------------------------------------------------------- tokens


@torch.no_grad()
def test_vokens_of_the_tokens_are_those_of_equation_9(opened):
    """With W = 0 and b = 0, 1, .., K - 1 the loss of one token tells its label: logsumexp(b) - b[label]."""
    _, judge, gallery, readers = opened
    captions, vokens = clips.voken_captions(judge, gallery)
    assert len(captions) == len(vokens) == 9
    ids, mask = clips.encode_texts(["the bishop blessed the vase in the valley ."], judge.val.vocab, readers, "x")
    scores, index = clips.token_clips(readers["teacher"], ids, mask, vokens)
    h = readers["teacher"].bert(ids)[0, 1:-1]
    videos, b = F.normalize(vokens, dim=-1), torch.arange(9.0)
    for state, k, c in zip(h, index.tolist(), scores.tolist()):
        loss = losses.voken(torch.zeros(1, 4), torch.zeros(9, 4), b, state[None], videos)
        assert k == round((b.logsumexp(0) - loss).item())
        assert c == pytest.approx(max(cosine(state, v) for v in vokens), abs=1e-5)
    # the student: a token's state in CRD's space
    aligned = readers["crd"].spaces["aligned space"]
    states = readers["crd"].bert(ids)[0, 1:-1]
    found = clips.token_clips(readers["crd"], ids, mask, vokens)[1].tolist()
    for state, k in zip(states, found):
        z = aligned[0](state[None, None], torch.ones(1, 1))[0]
        every = [cosine(z, v) for v in aligned[1](vokens)]
        assert k == every.index(max(every))


def test_nearest_words_equal_a_plain_loop():
    x, words = randn(8, 5), list("abcdef")  # 6 words and two others
    found = clips.nearest_words(x, words, [2, 7], k=3)
    centre = x[:6].mean(0)
    for row, i in zip(found, (2, 7)):
        every = {w: cosine(x[i] - centre, x[j] - centre) for j, w in enumerate(words) if j != i}
        best = sorted(every, key=every.get, reverse=True)[:3]
        assert [w for w, _ in row] == best and [c for _, c in row] == pytest.approx([every[w] for w in best])


def test_share_of_own_material_is_counted_over_all_words(opened, monkeypatch):
    """Two kinds of vectors, and of three wax nouns one that looks like stone."""
    _, judge, _, readers = opened
    x = torch.tensor([[1, 0.1], [1, 0.2], [0, 1.0], [0, 1.1], [0.1, 1.0]])
    monkeypatch.setattr(clips, "noun_vectors", lambda *args, **kw: x)
    words, kinds = list("abcde"), dict(zip("abcde", ("wax", "wax", "wax", "stone", "stone")))
    _, shares = clips.word_neighbours({"teacher": readers["teacher"]}, judge, words, ["a"], kinds, 9)
    assert shares == {"teacher": pytest.approx((3 * 2 + 2 * 1) / 20)}  # of 4 neighbours each, all the others
    monkeypatch.setattr(clips, "nearest_words", functools.partial(clips.nearest_words, k=1))
    _, shares = clips.word_neighbours({"teacher": readers["teacher"]}, judge, words, ["a"], kinds, 9)
    assert shares == {"teacher": pytest.approx(4 / 5)}  # c's nearest is a stone


def test_frequent_words_are_whole_words_by_their_frequency(opened):
    _, judge, _, _ = opened
    ids = judge.train.batch(np.arange(300))["ids"].numpy()
    found = clips.frequent_words(judge.train, 300, most=20)
    counts = [int((ids == judge.train.vocab.tokens.index(word)).sum()) for word in found]
    assert len(found) == 20 and found[0] == "the" and counts == sorted(counts, reverse=True)
    assert all(word.isalpha() for word in found)
    assert clips.frequent_words(judge.train, 300, most=10 ** 6, least=counts[9]) == [
        word for word, n in zip(found, counts) if n >= counts[9]]
    assert "holds no two words" in stop_line(clips.frequent_words, judge.train, 300, least=10 ** 6)


def test_tokens_are_drawn_with_the_words_asked_for(opened, tmp_path, capsys):
    run, judge, gallery, readers = opened
    out = tmp_path / "tokens.png"
    analyze.main(["tokens", str(run), "--sentence", "the bishop blessed the vase .", "--word", "Candle", "--word",
                  "bishop", "--out", str(out)])
    found, text = written(out), capsys.readouterr().out
    vocab = judge.val.vocab
    assert [token["token"] for token in found["tokens"]["crd"]] == [
        vocab.tokens[i] for i in vocab.encode(["the bishop blessed the vase ."])[0]]
    assert list(found["neighbours"]["teacher"]) == ["candle", "bishop"] and found["vokens"] == 9
    assert all(len(row) == 5 for rows in found["neighbours"].values() for row in rows.values())
    assert "candle (" in text and "own material, all 100 nouns" in text
    assert all(0 <= share <= 1 for share in found["own_material"].values())
    analyze.main(["tokens", str(run), "--out", str(out)])  # a sentence and words of the corpus
    found = written(out)
    assert gallery.nouns_in(found["sentence"])[0] in found["neighbours"]["teacher"]
    assert len(found["neighbours"]["teacher"]) == 3


def test_vokens_of_other_clips_are_refused(opened, teacher_run, tmp_path):
    _, judge, gallery, _ = opened
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_run, folder)
    other = SimpleNamespace(**vars(judge) | {"teacher": folder / "model"})
    content = json.loads((folder / "config.json").read_text())
    for flags, line in (({"seed": 5}, "not the vectors of the clips"), ({"vokens": 8}, "not the vectors of"),
                        ({"vokens": "all"}, "not a run of teacher.py")):
        (folder / "config.json").write_text(json.dumps(content | {"config": content["config"] | flags}))
        assert line in stop_line(clips.voken_captions, other, gallery)
    (folder / "config.json").unlink()
    assert "keep its model in its folder" in stop_line(clips.voken_captions, other, gallery)
    (folder / "model" / "vokens.safetensors").unlink()
    assert "has no vokens.safetensors" in stop_line(clips.voken_captions, other, gallery)


# ---------------------------------------------------------------------------- examples


@pytest.fixture
def two_models(demo, tmp_path):
    """(A, B): folders of two models with two tasks; A alone is right on items 0 to 4 of two choices, B on 5."""
    tasks = demo / "demo-s0" / "raw" / "tasks"
    for name in ("two_choices", "mishap"):
        task = TASKS[name]
        gold = np.array(task.read(task, find_file(task, tasks, task.evals[""]), True).labels)
        wrong = {"a": [5], "b": [0, 1, 2, 3, 4]} if name == "two_choices" else {"a": [], "b": []}
        for model, items in wrong.items():
            answered, third = gold.copy(), gold.copy()
            answered[items] = 1 - answered[items]
            third[items[2:3]] = 1 - third[items[2:3]]  # B's third run is wrong on item 2 alone
            fine_tuned(tmp_path / f"model-{model}" / name, name, tasks, {0: answered, 1: answered, 2: third})
    return tmp_path / "model-a", tmp_path / "model-b"


def test_examples_are_the_questions_that_only_one_model_gets_right(two_models, run, demo, tmp_path, capsys):
    a, b = two_models
    out = tmp_path / "examples.png"
    analyze.main(["examples", str(a), str(b), "--rows", "3", "--run", str(run), "--out", str(out)])
    found, text = written(out), capsys.readouterr().out
    counts = found["counts"]["two_choices"]
    n = counts["items"]
    assert counts == {"items": n, "both": n - 6, "only a": 5, "only b": 1, "neither": 0,
                      "p": pytest.approx(2 * (1 + 6) / 64)}
    assert found["counts"]["mishap"]["both"] == found["counts"]["mishap"]["items"]
    # another task has none
    assert len({one["row"] for one in found["examples"]} & set(range(5))) == len(found["examples"]) == 3
    assert found["examples"][0]["row"] == 2  # the clearest first
    task = TASKS["two_choices"]
    rows = task.read(task, demo / "demo-s0" / "raw" / "tasks" / "two_choices" / "valid.jsonl", True)
    for one in found["examples"]:
        i = one["row"]
        assert one["context"] == rows.first[i] and one["hypotheses"] == rows.second[i]
        assert one["truth"] == "(ab)"[0] + "ab"[rows.labels[i]] + ")"
        assert one["a"] == f"{one['truth']} (3/3)" and one["b"] == f"({'ba'[rows.labels[i]]}) ({int(i != 2)}/3)"
    assert "model-a" in text and "(a) " in text
    line = stop_line(analyze.main, ["examples", str(a), str(b), "--task", "mishap", "--run", str(run)])
    assert "model-a: right where model-b is wrong in no question of mishap" in line
    analyze.main(["examples", str(b / "two_choices"), str(a / "two_choices"), "--run", str(run),
                  "--out", str(out)])
    assert [one["row"] for one in written(out)["examples"]] == [5]


def test_wrapped_rows_hold_every_word_and_fill_their_columns():
    rows = clips.table_rows(["1. " + "word " * 20, "(a) one", "(b) " + "two " * 12], ["(b)", "x", "y"], width=20)
    assert {len(cell) for row in rows for cell in row[:2]} == {20} and rows[0][2:] == ["(b)", "x", "y"]
    assert " ".join(row[0] for row in rows).split() == ["1.", *["word"] * 20]
    assert all(row[2:] == [""] * 3 for row in rows[1:])


# ---------------------------------------------------------------------------- bad input


def test_bad_inputs_end_in_one_line(run, two_models, tmp_path, teacher_run):
    a, b = map(str, two_models)
    examples, out = ["examples", a, b, "--run", str(run)], ["--out", str(tmp_path / "x.png")]
    for flags, line in (
            (["retrieval", str(tmp_path / "nowhere")], "give the folder of a finished run"),
            (["retrieval", str(teacher_run)], "not a run of distill.py"),
            (["tokens", str(run.parent / "distill-none-s0")], "no teacher that watches clips"),
            (["retrieval", str(run), "--sentence", " "], "holds no word"),
            (["retrieval", str(run), "--sentence", "日本 語 qzx"], "does not know these words"),
            (["retrieval", str(run), "--sentence", "the vase \udcff"], "not UTF-8"),
            (["retrieval", str(run), "--rows", "0"], "--rows 0: from 1 to 40"),
            (["retrieval", str(run), "--clips", "0"], "--clips 0: must be at least 1"),
            (["retrieval", str(run), "--thumbnails", str(tmp_path / "none")], "no such folder"),
            (["tokens", str(run), "--word", "日本"], "--word '日本': the run's vocabulary does not know"),
            (["tokens", str(run), "--word", ""], "holds no word"),
            (["tokens", str(run), "--word", "the glass vase " * 9], "word pieces, more than a block of the corpus"),
            (["tokens", str(run), "--sentence", ""], "holds no word"),
            (["retrieval", str(run), "--seed", "1" * 25], "--seed 1111111111111111111111111: must lie between"),
            ([*examples, "--task", "mine"], "choose one of sst2"),
            ([*examples, "--task", "rte"], "no task with runs of both (mishap, two_choices; mishap, two_choices)"),
            ([*examples, "--rows", "0"], "--rows 0"),
            (["examples", a, str(tmp_path), "--run", str(run)], "holds no finished run of finetune.py"),
            ([*examples[:3], "--run", str(tmp_path)], "give the folder of a finished run")):
        assert line in stop_line(analyze.main, [*flags, *out]), flags
        assert not (tmp_path / "x.png").exists()
    assert "ends in .png" in stop_line(analyze.main, [*examples, "--out", str(tmp_path / "x.pdf")])


def test_questions_of_another_vocabulary_find_no_clip(tiny_tasks, run, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "UNKNOWN", -1)  # the demo's vocabulary knows every letter
    right = [0, 1] * 10 + [0]
    for model, answered in (("a", right), ("b", [1 - x for x in right])):
        fine_tuned(tmp_path / model / "rte", "rte", tiny_tasks, {0: answered})
    line = stop_line(analyze.main, ["examples", str(tmp_path / "a"), str(tmp_path / "b"), "--run", str(run),
                                    "--out", str(tmp_path / "x.png")])
    assert f"--run {run}" in line and "vocabulary does not know" in line
