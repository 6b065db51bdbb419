"""Proves the measures of the closing table on cases worked out by hand, and that the figures are drawn.

Run: python -m pytest -q tests/test_analyze.py
"""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
from parts.metrics import linear_probe, neighbour_probe, noun_vectors, recall, ridge, shared_neighbours


def test_recall_counts_ranks_and_ties_against_the_query():
    target = torch.eye(4)
    query = torch.tensor([[1.0, 0, 0, 0], [1, 0.9, 0, 0], [1, 0.9, 0.8, 0], [1, 1, 1, 1]])  # the last: all tie
    found = recall(query, target, ks=(1, 2, 3, 4), chunk=3)  # ranks 0, 1, 2, 3
    assert found == {"1": 0.25, "2": 0.5, "3": 0.75, "4": 1.0}


def test_recall_of_nan_and_of_constants_is_no_better_than_nothing():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert recall(torch.full_like(x, float("nan")), x)["10"] == 0
    assert recall(x, torch.ones_like(x))["10"] == 0
    assert recall(x, x)["1"] == 1


def test_ridge_approaches_least_squares_and_shrinks():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 5, generator=g, dtype=torch.float64)
    y = x @ torch.randn(5, 3, generator=g, dtype=torch.float64) + 2 + 0.1 * torch.randn(200, 3, generator=g)
    ones = torch.cat([x, torch.ones(200, 1)], 1)
    exact = ones @ torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(ridge(x, y, 1e-10)(x), exact, rtol=1e-6, atol=1e-6)
    strong = ridge(x, y, 1e6)(x)
    torch.testing.assert_close(strong, y.mean(0).expand_as(y), rtol=0, atol=1e-3)


def test_ridge_does_not_depend_on_the_scale_of_a_model():
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(50, 6, generator=g), torch.randn(50, 2, generator=g)
    torch.testing.assert_close(ridge(x, y)(x), ridge(100 * x, y)(100 * x))


def test_probes_find_what_is_there_and_chance_where_nothing_is():
    g = torch.Generator().manual_seed(3)
    labels = torch.arange(60) % 3
    centres = 5 * torch.randn(3, 16, generator=g)
    known, unknown = centres[labels] + torch.randn(60, 16, generator=g), torch.randn(60, 16, generator=g)
    split = slice(0, 40), slice(40, 60)
    for x, low, high in ((known, 0.95, 1.0), (unknown, 0.0, 0.6)):
        parts = x[split[0]], labels[split[0]], x[split[1]], labels[split[1]]
        near, chance = neighbour_probe(*parts)
        assert low <= near <= high and chance == pytest.approx(1 / 3, abs=0.02)
        assert low <= linear_probe(*parts) <= high


def test_neighbour_probe_by_hand():
    x_train = torch.tensor([[1.0, 0], [0.9, 0.1], [-1, 0], [-0.9, -0.1]])
    near, chance = neighbour_probe(x_train, torch.tensor([0, 1, 1, 1]), torch.tensor([[1.0, 0]]),
                                           torch.tensor([0]), k=2)
    assert near == 0.5 and chance == 0.25


class Blocks:
    """Blocks of 6 tokens in which noun 5 stands whole and noun (7, 8) in two pieces."""
    vocab = SimpleNamespace(encode=lambda words: [{"mug": [5], "goblet": [7, 8]}[word] for word in words])
    ids = torch.tensor([[2, 5, 9, 7, 8, 3], [2, 7, 8, 9, 9, 3], [2, 7, 9, 8, 5, 3]])

    def __len__(self):
        return len(self.ids)

    def batch(self, index):
        return {"ids": self.ids[index]}


def test_noun_vectors_average_occurrences_and_pieces():
    def encode(ids):
        place = torch.arange(ids.shape[1]).expand_as(ids)
        return torch.stack([ids, place], -1).double()  # (b, T, 2): the id and its place
    found = noun_vectors(encode, Blocks(), Blocks.vocab, ["mug", "goblet"])
    assert found.tolist() == [[5, 2.5], [7.5, (3.5 + 1.5) / 2]]
    with pytest.raises(KeyError):
        noun_vectors(encode, Blocks(), Blocks.vocab, ["vase"])


def test_shared_neighbours_is_one_with_itself_and_none_without_enough():
    class Many(Blocks):
        ids = torch.randint(5, 50, (60, 6), generator=torch.Generator().manual_seed(4))
    one, other = (torch.nn.Embedding(50, width) for width in (8, 4))
    assert shared_neighbours(one, one, Many(), "cpu") == pytest.approx(1)
    assert shared_neighbours(one, other, Many(), "cpu") < 0.6
    assert shared_neighbours(one, one, Blocks(), "cpu") is None


def results(scale):
    share = {"1": 0.1 * scale, "5": 0.2 * scale, "10": 0.3 * scale}
    probe = {"linear": 0.5, "linear_chance": 0.1, "neighbours": 0.4, "neighbours_chance": 0.1}
    return {"mlm_loss": 2.0, "mlm_accuracy": 0.5, "neighbours": 0.7,
            "probes": {"material": probe, "order": probe},
            "retrieval": {"aligned": None, "mean state": share, "ridge": share, "nearest": [0]}}


def test_closing_table_is_aligned_and_shows_chance():
    text = analyze.closing_table({"text-only": results(1), "nst+crd": results(2)}, 500)
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.search(r"ridge map +10.0 / 20.0 / 30.0 +20.0 / 40.0 / 60.0 +0.2 / 1.0 / 2.0", text)
    assert "aligned space" in text
    assert re.search(r"order of held-out nouns: linear probe +50.0 +50.0 +10.0", text)
    bare = analyze.closing_table({"text-only": {"mlm_loss": 3.0, "mlm_accuracy": 0.1}}, 0)
    assert "3.000" in bare and "text-to-video" not in bare


def test_figures_and_table_are_made_from_a_run(tmp_path, capsys):
    run = tmp_path / "distill-nst+crd-s0"
    run.mkdir()
    columns = {"text-only": results(1), "nst+crd": results(2)}
    (run / "results.json").write_text(json.dumps(results(2) | {
        "table": columns, "clips": 500, "objective": "nst+crd", "finished": 1.0}))
    lines = [{"step": 0, "gradient_mlm": 1.0, "gradient_nst": 0.1}, {"step": 0, "val_mlm_loss": 6.0},
             {"step": 10, "mlm": 5.0, "nst": 0.1, "lr": 1e-3},
             {"step": 20, "mlm": 4.0, "nst": 0.05, "lr": 1e-3}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    analyze.main(["curves", str(run), "--out", str(tmp_path / "figures" / "curves.png")])
    assert (tmp_path / "figures" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    analyze.main(["table", str(run)])
    assert "50.0 / 40.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no such file"):
        analyze.main(["curves", str(tmp_path / "nowhere")])


def test_clips_of_the_demo_are_drawn_and_described(demo, tmp_path):
    held_out = analyze.data.VideoClips(demo / "demo-s0" / "videos.h5", 24, part="val", val_clips=500)
    latents = json.loads((demo / "demo-s0" / "raw" / "latents.json").read_text())
    states = analyze.clip_states(latents, held_out)
    assert len(states) == len(held_out)
    texts = [held_out.vocab.decode(row[mask][1:-1].tolist()) for row, mask in
             zip(*(held_out.clips(np.arange(40))[k] for k in ("ids", "mask")))]
    assert texts == [state["text"] for state in states[:40]]
    assert states[0]["material"] in analyze.describe(states[0])
    run = tmp_path / "run"
    run.mkdir()
    column = results(1) | {"retrieval": {"nearest": list(range(len(held_out)))}}
    (run / "results.json").write_text(json.dumps({"table": {"nst+crd": column}, "clips": len(held_out)}))
    config = {"data_dir": str(demo), "seed": 0, "train": "", "block_size": 24}
    (run / "config.json").write_text(json.dumps({"config": config}))
    analyze.main(["clips", str(run), "--out", str(tmp_path / "clips.png")])
    assert (tmp_path / "clips.png").stat().st_size > 5000
