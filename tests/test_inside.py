"""Proves that attention maps are what the models compute, and distances of weights and matches of neurons on
cases whose answer is known; that each command writes what it says, and ends in one line where it cannot.

Run: python -m pytest -q tests/test_inside.py
"""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import stop_line, written

import analyze
import losses
from analyses import closing, inside
from model import BERT, CrossAttention, DistillHead, model_config
from parts.vocab import load_vocab
from parts.weights import load_bert, save_bert, save_tensors
from run import FORMAT


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write_run(folder, results=(), **flags):
    """The settings of a finished run around a model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, "config": flags}))
    (folder / "results.json").write_text(json.dumps(dict(results)))
    return folder


# ---------------------------------------------------------------------------- attention


def test_maps_times_values_are_what_the_module_computes_and_padding_gets_nothing():
    torch.manual_seed(0)
    module = CrossAttention(12, 8, heads=3).double()
    x, other = randn(2, 5, 12), randn(2, 7, 8, seed=1)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    for seen in (None, mask[:, None, None]):
        maps = inside.attention_map(module, x, other, seen)  # (2, 3, 5, 7)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
        values = module.key_value(other).chunk(2, -1)[1].unflatten(-1, (3, 4)).transpose(1, 2)
        ours = module.out((maps @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(ours, module(x, other, seen))
    assert (maps[1, ..., 4:] == 0).all() and (maps[1, ..., :4] > 0).all()
    # a plain loop
    q, k = module.query(x)[1, 2, 4:8], module.key_value(other)[1, :4, 4:8]  # head 2, query 3 of row 2
    weights = [math.exp(sum(a * b for a, b in zip(q.tolist(), key)) / 2) for key in k.tolist()]
    torch.testing.assert_close(maps[1, 1, 2, :4], torch.tensor(weights, dtype=torch.float64) / sum(weights))


def cross_run(tiny_cross, folder, **flags):
    shutil.copytree(tiny_cross, folder)
    flags = {"objective": "mlm+match", "train": "nowhere.h5"} | flags
    return write_run(folder, block_size=30, val="", cross_layers=2, **flags)


def test_maps_of_a_model_are_those_of_every_layer_and_leave_it_as_it_was(tiny_cross, tmp_path):
    opened = inside.open_cross(cross_run(tiny_cross, tmp_path / "run"))
    batch, tokens, same = inside.read_pair("the dog ran and the cat slept at noon .", opened)
    assert tokens["text"] == "[CLS] the dog ran and the cat slept at noon . [SEP]".split()
    # the tower has 9 positions: two segments
    assert tokens["clip"][:3] == ["<|startoftext|>", "the", "dog"] and len(tokens["clip"]) == 10 + 4
    expected = [[a == b and i > 0 for b in tokens["clip"]] for i, a in enumerate(tokens["text"])]
    expected[1][5] = expected[5][1] = False  # the first "the" is not the second
    assert same.tolist() == expected
    before = opened.model.streams(**batch)
    maps = inside.attention_maps(opened.model, **batch)
    assert [len(x) for x in maps.values()] == [2, 2]
    assert maps["text"][1].shape == (1, 2, 12, 14) and maps["clip"][1].shape == (1, 2, 14, 12)
    h, c = opened.model.language(batch["ids"]), opened.model.clip(batch["clip_ids"])
    c = c.flatten(0, 1)[batch["clip_place"]]
    first = inside.attention_map(opened.model.cross.clip[0].cross, c, h)
    torch.testing.assert_close(maps["clip"][0], first)
    for one, again in zip(before, opened.model.streams(**batch)):
        assert torch.equal(one, again)
    assert not any(module._forward_hooks for module in opened.model.modules())


def test_spread_by_hand():
    maps = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0]], [[0.25] * 4] * 2, [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]])
    same = torch.tensor([[False, True, True, False], [False] * 4])  # the second query is no word
    found = {name: x.tolist() for name, x in inside.spread(maps, same).items()}
    assert found["entropy"] == pytest.approx([0, math.log(4), math.log(2)])
    assert found["share"] == pytest.approx([0, 1, 0.5])
    assert found["mutual"] == pytest.approx([math.log(2), 0, 0], abs=1e-6)
    assert found["top"] == [0.5, 0.25, 0.5] and found["key"] == [0, 0, 0]
    assert found["same"] == [0, 0.5, 0.5] and found["uniform"] == [0.5] * 3


def test_attention_draws_runs_side_by_side_and_tells_what_nobody_trained(tiny_cross, tmp_path, capsys):
    runs = [cross_run(tiny_cross, tmp_path / "one"),
            cross_run(tiny_cross, tmp_path / "two", objective="mlm+match+cliptc")]
    out = tmp_path / "attention.png"
    analyze.main(["attention", *map(str, runs), "--sentence", "the dog ran .", "--out", str(out)])
    found = written(out)
    assert len(found["maps"]) == 2 * 2 * 2 * 2  # runs, directions, layers, heads
    for one in found["maps"]:
        weights = np.array(one["weights"])
        assert weights.shape == (len(one["queries"]), len(one["keys"]))
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2 * 3  # heads 1, 2 and all
    assert {(row["run"], row["layer"], row["direction"]) for row in rows if not row["trained"]} == {
        ("one", 2, "CLIP over words")}
    heads = [row["entropy"] for row in rows[:2]]
    assert rows[2]["head"] == "all" and rows[2]["entropy"] == pytest.approx(np.mean(heads))
    text = capsys.readouterr().out
    assert text.count(", untrained") == 3 and "means over 1 sentence\n" in text


def test_attention_ends_in_one_line(tiny_cross, tiny_bert, tmp_path):
    run = cross_run(tiny_cross, tmp_path / "run")

    def says(*argv, run=run):
        text = stop_line(analyze.main, ["attention", str(run), "--out", str(tmp_path / "a.png"), *argv])
        assert not (tmp_path / "a.png").exists() and not (tmp_path / "a.json").exists()
        return text
    assert "--sentence 'ñandú': the run's vocabulary does not know" in says("--sentence", "the ñandú ran")
    assert "has 0 tokens" in says("--sentence", " ")
    assert "has 29 tokens; give one that has 1 to 28" in says("--sentence", "dog " * 29)
    assert "not UTF-8" in says("--sentence", "dog \udc80")
    assert "nowhere.h5: no such file" in says()
    assert "give the folder of a finished run" in says(run=tmp_path / "none")
    shutil.copytree(tiny_bert, tmp_path / "plain" / "model")
    assert "has no cross-modal encoder" in says(run=write_run(tmp_path / "plain", cross_layers=2))
    assert "has no cross-modal encoder" in says(run=write_run(run, task="RTE"))  # fine-tuned with all of it


# ---------------------------------------------------------------------------- drift


def test_distances_by_hand_and_by_a_plain_loop():
    a = {"embeddings.word.weight": torch.tensor([[3.0, 4.0]]), "layers.0.x": torch.tensor([1.0, 2.0]),
         "layers.10.x": torch.tensor([2.0]), "pooler.weight": torch.tensor([5.0])}
    b = {"embeddings.word.weight": torch.tensor([[3.0, 1.0]]), "layers.0.x": torch.tensor([1.0, 2.0]),
         "layers.10.x": torch.tensor([3.0]), "norm.bias": torch.tensor([9.0])}
    found = inside.distances(a, b)
    assert list(found) == ["embeddings", "layer 1", "layer 11", "all"]  # not what one of them alone has
    assert found["embeddings"] == {"rms": pytest.approx(math.sqrt(9 / 2)), "relative": pytest.approx(3 / 5),
                                   "parameters": 2}
    assert found["layer 1"]["rms"] == found["layer 1"]["relative"] == 0
    assert found["all"] == {"rms": pytest.approx(math.sqrt(10 / 5)), "relative": pytest.approx(math.sqrt(10 / 34)),
                            "parameters": 5}
    a, noise = {"layers.0.x": randn(3, 4)}, randn(3, 4, seed=1)
    one, ten = (inside.distances(a, {"layers.0.x": a["layers.0.x"] + scale * noise})["all"] for scale in (1, 10))
    assert ten["rms"] == pytest.approx(10 * one["rms"]) and ten["relative"] == pytest.approx(10 * one["relative"])
    loop = math.sqrt(sum(x * x for x in noise.flatten().tolist()) / 12)
    assert one["rms"] == pytest.approx(loop)
    both = [inside.distances({"layers.0.x": c * a["layers.0.x"]}, {"layers.0.x": c * (a["layers.0.x"] + noise)})
            ["all"]["relative"] for c in (1, 3)]
    assert both[0] == pytest.approx(both[1])
    assert inside.distances({"layers.0.x": torch.zeros(2)}, {"layers.0.x": torch.ones(2)})["all"]["relative"] is None


def moved(folder, target, by, part):
    """A copy of a model's folder, every parameter under `part` moved by a constant."""
    bert = load_bert(folder, "trained")
    with torch.no_grad():
        for name, p in bert.named_parameters():
            p.add_(by * name.startswith(part))
    save_bert(bert, target, load_vocab(folder))
    return target


def test_drift_draws_and_prints_the_papers_beside(tiny_bert, tmp_path, capsys):
    out, far = tmp_path / "drift.png", moved(tiny_bert, tmp_path / "far" / "model", 0.5, "layers.")
    analyze.main(["drift", str(tiny_bert), str(tiny_bert), str(far.parent), "--out", str(out)])
    found = written(out)
    assert found["paper"]["Oscar"] == 41.6e-3
    assert all(x["rms"] == x["relative"] == 0 for x in found["adapted"]["tiny"].values())
    assert found["adapted"]["far"]["layer 1"]["rms"] == pytest.approx(0.5, rel=1e-6)
    assert found["adapted"]["far"]["embeddings"]["rms"] == 0 and "pooler" not in found["adapted"]["far"]
    assert "4.16e-02" in capsys.readouterr().out


def test_drift_counts_a_pooler_that_both_have_and_reads_towers(tiny_bert, tiny_clip, tmp_path):
    pooled = load_bert(tiny_bert, pooler=True)
    save_bert(pooled, tmp_path / "pooled", load_vocab(tiny_bert))
    assert "pooler.weight" in inside.open_encoder(tmp_path / "pooled")[0]
    out = tmp_path / "drift.png"
    analyze.main(["drift", str(tmp_path / "pooled"), str(tmp_path / "pooled"), str(tiny_bert), "--out", str(out)])
    found = written(out)["adapted"]
    assert "pooler" in found["pooled"] and "pooler" not in found["tiny"]
    analyze.main(["drift", str(tiny_clip), str(tiny_clip), "--out", str(out)])
    found = written(out)["adapted"]["tiny_clip"]
    assert list(found) == ["embeddings", "layer 1", "output", "all"]


def test_drift_ends_in_one_line(tiny_bert, tiny_electra, tiny_clip, tmp_path):
    def says(*models):
        text = stop_line(analyze.main, ["drift", *map(str, models), "--out", str(tmp_path / "d.png")])
        assert not (tmp_path / "d.png").exists()
        return text
    assert "no model there" in says(tiny_bert, tmp_path / "none")
    assert "not of the shape" in says(tiny_bert, tiny_electra)
    assert "not of the shape" in says(tiny_bert, tiny_clip)
    vocab = load_vocab(tiny_bert)
    vocab.tokens[-2:] = vocab.tokens[-2:][::-1]
    save_bert(load_bert(tiny_bert), tmp_path / "swapped", vocab)
    assert "has another vocabulary" in says(tiny_bert, tmp_path / "swapped")
    assert "ends in .png" in stop_line(analyze.main, ["drift", str(tiny_bert), str(tiny_bert), "--out", "x.pdf"])


# ---------------------------------------------------------------------------- neurons


def test_model_matches_itself_and_any_order_of_its_neurons():
    x = inside.patterns(randn(9, 20))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for s, which in ((x, torch.arange(20)), (x[:, order], order.argsort())):
        mmd, value, nearest = inside.match(s, x)
        assert abs(mmd) < 1e-12 and torch.equal(nearest, which)
        torch.testing.assert_close(value, torch.ones(20, dtype=torch.float64))
    assert inside.match(inside.patterns(randn(9, 20, seed=1)), x)[0] > 1e-3


def test_match_is_eq_7_in_a_plain_loop_and_what_nst_minimises():
    s, t = (inside.patterns(x) for x in (randn(6, 5), randn(6, 7, seed=1)))
    torch.testing.assert_close(s.square().sum(0), torch.ones(5, dtype=torch.float64))
    assert (inside.patterns(torch.zeros(6, 2)) == 0).all()

    def k(x, y):
        return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y)) / 2)
    S, T = s.T.tolist(), t.T.tolist()
    loop = (sum(k(x, y) for x in S for y in S) / 25 + sum(k(x, y) for x in T for y in T) / 49
            - 2 * sum(k(x, y) for x in S for y in T) / 35)
    mmd, value, nearest = inside.match(s, t)
    assert mmd == pytest.approx(loop, rel=1e-9)
    for j, pattern in enumerate(T):
        values = [k(x, pattern) for x in S]
        assert nearest[j] == values.index(max(values)) and value[j].item() == pytest.approx(max(values))
    raw = [3 * randn(1, 6, 5), 3 * randn(1, 6, 7, seed=1)]  # nst normalises
    assert losses.nst(*(x.float() for x in raw), torch.ones(1, 6)).item() == pytest.approx(mmd, rel=1e-4)


@pytest.fixture
def distilled(demo, teacher_run, tmp_path):
    """Runs as distill.py leaves them: nst whose student is the teacher, and text-only; their head's way out
    turns the order of the neurons around."""
    shutil.copytree(teacher_run, tmp_path / "teacher-mlm+ct-s0")
    vocab = load_vocab(teacher_run / "model")
    student = load_bert(teacher_run / "model")
    width = student.config.hidden
    head = DistillHead(width, width)
    with torch.no_grad():  # ReLU lets pass what the bias has lifted
        head[0].weight.copy_(torch.eye(width))
        head[0].bias.fill_(100)
        head[2].weight.copy_(torch.eye(width).flip(0))
        head[2].bias.fill_(-100)
    torch.manual_seed(0)
    other = BERT(model_config("1L-32H-2A", vocab.size))
    for objective, bert, heads in (("nst", student, {f"heads.nst.{k}": x for k, x in head.state_dict().items()}),
                                   ("none", other, {})):
        run = write_run(tmp_path / f"distill-{objective}-s0", {"objective": objective, "vocabulary": vocab.hash},
                        seed=0, block_size=24, train=str(demo / "demo-s0" / "corpus.h5"), val="", teacher="",
                        videos="", objective=objective)
        save_bert(bert, run / "model", vocab)
        save_tensors(heads, run / "model" / "heads.safetensors")
    return tmp_path


def test_neurons_finds_the_permutation_that_the_head_undoes(distilled, capsys):
    out = distilled / "neurons.png"
    analyze.main(["neurons", str(distilled / "distill-nst-s0"), "--out", str(out), "--sentence",
                  "the bishop donated the bulb before the evening ."])
    found = written(out)
    assert found["tokens"][0] == "[CLS]" and len(found["neurons"]) == 6
    nst, text = found["models"]["nst"], found["models"]["text-only"]
    assert abs(nst["mmd"]) < 1e-8 < text["mmd"]
    assert nst["nearest"] == pytest.approx(1) and nst["chance"] < 0.99 and text["nearest"] < 0.99
    for teacher, student, _ in found["neurons"]:
        assert student["neuron"] == 31 - teacher["neuron"] and student["kernel"] == pytest.approx(1)
        np.testing.assert_allclose(student["pattern"], teacher["pattern"], atol=1e-3)
    # the teacher's most varied come first
    judge = closing.open_judge(distilled / "distill-nst-s0", torch.device("cpu"))
    ids, _ = inside.read_words(found["sentences"][0], judge.val.vocab, 22)
    with torch.no_grad():
        h = judge.bert(torch.tensor([[judge.val.vocab.cls, *ids, judge.val.vocab.sep]]))[0].double()
    assert [rows[0]["neuron"] for rows in found["neurons"]] == h.var(0).sort(descending=True).indices[:6].tolist()
    assert "by chance" in capsys.readouterr().out


def test_neurons_of_a_text_only_run_and_of_the_held_out_text(distilled):
    out = distilled / "neurons.png"
    analyze.main(["neurons", str(distilled / "distill-none-s0"), "--out", str(out)])
    found = written(out)
    assert list(found["models"]) == ["text-only"] and len(found["sentences"]) == 100
    assert [[row["model"] for row in rows] for rows in found["neurons"]] == [["teacher", "text-only"]] * 6


def test_students_are_a_run_and_its_text_only_twin_of_the_same_words(distilled, capsys):
    run, twin = distilled / "distill-nst-s0", distilled / "distill-none-s0"
    judge = closing.open_judge(run, torch.device("cpu"))
    assert closing.students_of(str(run), judge) == {"nst": run, "text-only": twin}
    assert closing.students_of(twin, judge) == {"text-only": twin}
    vocab = load_vocab(run / "model")
    vocab.tokens[-2:] = vocab.tokens[-2:][::-1]
    vocab.save(twin / "model")
    assert closing.students_of(run, judge) == {"nst": run}
    assert f"{twin}: has another text or vocabulary" in capsys.readouterr().out
    vocab.tokens[-2:] = vocab.tokens[-2:][::-1]
    vocab.save(twin / "model")
    assert len(closing.students_of(run, judge)) == 2
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"hashes": {"corpus": "of another text"}}))
    assert closing.students_of(run, judge) == {"nst": run}
    (twin / "results.json").unlink()  # not finished
    assert closing.students_of(run, judge) == {"nst": run}


def test_neurons_ends_in_one_line(distilled, monkeypatch):
    def says(*argv):
        text = stop_line(analyze.main, ["neurons", "--out", str(distilled / "n.png"), *argv])
        assert not (distilled / "n.png").exists()
        return text
    run = str(distilled / "distill-nst-s0")
    assert "'☃': the run's vocabulary does not know" in says(run, "--sentence", "the ☃ ran")
    assert "holds several runs; give one of them, such as" in says(str(distilled))
    assert "not a distillation" in says(str(write_run(distilled / "teacher-mlm+ct-s0", {"objective": "mlm"}, videos="")))
    shutil.rmtree(distilled / "teacher-mlm+ct-s0")
    assert "no teacher beside it" in says(run)
    monkeypatch.chdir(distilled)
    assert "no finished distillation" in stop_line(closing.newest_run)


def test_heads_are_read_as_functions(distilled):
    tensors, head = closing.read_heads(distilled / "distill-nst-s0")
    x = randn(2, 3, 32).float()
    torch.testing.assert_close(head("nst")(x), x.flip(-1), atol=1e-4, rtol=0)
    assert head("crd")(x) is x and len(tensors) == 4
