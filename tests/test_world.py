"""prepare/world.py: the demo world is a function of its seed, has real data's layouts, and its texts leak
nothing that the tasks ask for.

Run: python -m pytest -q tests/test_world.py
"""
import csv
import json
from collections import Counter

import h5py
import numpy as np
import pytest
from conftest import stop_line

import data
from parts.vocab import load_vocab
from prepare import world
from prepare.world import ACTIONS, EFFECTS, MISHAPS, PROPERTIES, TASK_SIZES, demo_xtext, make_demo
from test_packing import packed, stop


class OneRank:
    main = True

    def barrier(self):
        pass


@pytest.fixture
def small_world(monkeypatch):
    sizes = {"train": 40, "dev": 20, "dev_seen": 20}
    for name, value in (("VIDEOS", 100), ("SENTENCES", 900), ("TASK_SIZES", sizes)):
        monkeypatch.setattr(world, name, value)


def test_demo_is_a_function_of_its_seed(small_world, tmp_path):
    a, b, c = (make_demo(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()) and len(names) > 200
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    for name in ("corpus.h5", "videos.h5", "raw/latents.json", "raw/tasks/entailment/train.tsv",
                 "raw/feat2d/demo0000.npy"):
        assert (a / name).read_bytes() != (c / name).read_bytes()
    worlds = [json.loads((folder / "raw" / "latents.json").read_text())["nouns"] for folder in (a, c)]
    both = set(worlds[0]) & set(worlds[1])
    assert any(worlds[0][n]["split"] != worlds[1][n]["split"] for n in both)
    assert any(worlds[0][n]["order"] != worlds[1][n]["order"] for n in both)
    before = (a / "world.json").stat().st_mtime_ns
    assert make_demo(a, 3) == a and (a / "world.json").stat().st_mtime_ns == before
    assert "not the demo world of seed 5" in stop_line(make_demo, a, 5)


def test_demo_pairs_are_made_once_from_the_worlds_text(small_world, tmp_path, capsys):
    folder = make_demo(tmp_path / "w", 3)
    path = demo_xtext(folder, OneRank())
    assert path == folder / "xcorpus.h5" and f"no {path} yet" in capsys.readouterr().out
    pairs, text = packed(path), packed(folder / "corpus.h5")
    assert np.array_equal(pairs["tokens"], text["tokens"])
    blocks = data.PairBlocks(path, 24)
    assert blocks.vocab is blocks.clip_vocab
    assert blocks.vocab.hash == data.open_vocab(folder / "corpus.h5").hash
    only_words = text["tokens"][text["tokens"] != blocks.vocab.sep]
    assert np.array_equal(pairs["clip_tokens"], only_words)
    before = path.stat().st_mtime_ns
    assert demo_xtext(folder, OneRank()) == path and path.stat().st_mtime_ns == before
    assert f"reused {path}" in capsys.readouterr().out
    with h5py.File(path, "a") as f:
        f.attrs["format"] = 0
    demo_xtext(folder, OneRank())
    assert f"no {path} yet" in capsys.readouterr().out
    assert data.open_packed(path)[0]["format"] == data.FORMAT
    blocks = data.PairBlocks(path, 48, segments=2, length=48)
    assert blocks.cut == 0 and blocks.used < 0.6  # a word that a block's end cuts is whole on CLIP's side


def test_interrupted_demo_leaves_nothing(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "pack_videos", stop)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "demo", 0)
    assert not list(tmp_path.iterdir())


def test_demo_has_the_layouts_of_real_data(demo):
    raw = demo / "demo-s0" / "raw"
    captions = json.loads((raw / "caption.json").read_text())
    with open(raw / "videos.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["video_id", "category_1", "category_2", "rank", "task_id"]
    assert len(rows) == 2000 == len(captions)
    assert np.load(raw / "feat2d" / "demo0007.npy").shape == (24, 64)
    assert np.load(raw / "feat3d" / "demo0007.npy").shape == (36, 64)
    latents = json.loads((raw / "latents.json").read_text())
    assert [c["text"] for c in latents["clips"][28:32]] == captions["demo0007"]["text"]
    assert len(latents["nouns"]) == 100 and len(latents["clips"]) == 8000
    materials = Counter((n["material"], n["split"]) for n in latents["nouns"].values())
    assert all(materials[m, "train"] + materials[m, "dev"] == 10 and materials[m, "dev"] in (3, 4)
               for m in EFFECTS)
    for split, size in (("train", 65), ("dev", 35)):
        orders = Counter(n["order"] for n in latents["nouns"].values() if n["split"] == split)
        assert sum(orders.values()) == size and abs(orders["spins first"] - orders["tilts first"]) == 1
    vocab = load_vocab(raw / "vocab.txt")
    whole = sum(noun in vocab.tokens for noun in latents["nouns"])
    assert 60 <= whole < 100  # most nouns are one piece, some are split


def test_demo_texts_never_tell_a_property(demo):
    raw = demo / "demo-s0" / "raw"
    latents = json.loads((raw / "latents.json").read_text())
    nouns = set(latents["nouns"])
    outcomes = {e for of in EFFECTS.values() for e in of.values()} | {"spins", "tilts"}
    never = {value for name in ("material", "colour", "size") for value in PROPERTIES[name]}
    for clip in latents["clips"]:
        words = clip["text"].split()
        assert not set(words) & (outcomes | never) and set(words) & nouns <= {clip["noun"]}
        assert len(words) <= 14
    sentences = [line.split() for path in (raw / "text").iterdir() for line in path.read_text().split("\n")
                 if line]
    assert len(sentences) == 32_000 and max(map(len, sentences)) <= 17
    named = 0
    for words in map(set, sentences):
        assert not words & never and not (words & nouns and words & outcomes)
        named += bool(words & nouns)
    assert 0.77 < named / 32_000 < 0.83
    assert outcomes <= set().union(*sentences)  # so that the tasks' words are known


def test_demo_order_shows_in_motion_only(demo):
    latents = json.loads((demo / "demo-s0" / "raw" / "latents.json").read_text())["clips"]
    frames = packed(demo / "demo-s0" / "videos.h5")["frames"].astype(np.float32).reshape(8000, 6, 128)
    order = np.array([clip["order"] == "spins first" for clip in latents]).astype(int)
    material = np.array([list(EFFECTS).index(clip["material"]) for clip in latents])
    nouns = sorted({clip["noun"] for clip in latents})
    noun = np.array([nouns.index(clip["noun"]) for clip in latents])

    def held_out_accuracy(x, y):  # nearest class mean, fitted on half of the nouns
        fit = noun % 2 == 0
        means = np.stack([x[fit & (y == value)].mean(0) for value in range(y.max() + 1)])
        return (np.argmin(((x[~fit, None] - means) ** 2).sum(2), 1) == y[~fit]).mean()

    middle, edges = frames[:, 2:5].mean(1), frames[:, [0, 1, 5]].mean(1)
    assert held_out_accuracy(middle[:, 64:], order) > 0.99
    assert 0.4 < held_out_accuracy(middle[:, :64], order) < 0.6
    assert held_out_accuracy(edges[:, 64:], order) < 0.6
    assert held_out_accuracy(frames[:, :, :64].mean(1), material) > 0.9
    assert held_out_accuracy(middle[:, 64:], material) < 0.3


def read_task(folder, task, split):
    """Rows (text fields..., label) of a demo task, read from its official layout."""
    base = folder / task
    if task in ("mishap", "entailment"):
        rows = [line.split("\t") for line in (base / f"{split}.tsv").read_text().splitlines()]
        return [tuple(row) if task == "mishap" else tuple(row[1:]) for row in rows[1:]]
    if task == "two_choices":
        name = {"train": "train", "dev": "valid", "dev_seen": "valid_seen"}[split]
        rows = [json.loads(line) for line in (base / f"{name}.jsonl").read_text().splitlines()]
        labels = (base / f"{name}-labels.lst").read_text().split()
        return [(row["goal"], row["sol1"], row["sol2"], label)
                for row, label in zip(rows, labels, strict=True)]
    if task == "four_endings":
        name = {"train": "train", "dev": "val", "dev_seen": "val_seen"}[split]
        with open(base / f"{name}.csv", newline="") as f:
            return [(row["sent1"], *[row[f"ending{i}"] for i in range(4)], row["label"])
                    for row in csv.DictReader(f)]
    name = {"train": "tracie_train", "dev": "tracie_test", "dev_seen": "tracie_test_seen"}[split]
    rows = []
    for line in (base / f"{name}.txt").read_text().splitlines():
        text, answer = line.split("\t")
        event, story = text.removeprefix("event: ").split(" story: ")
        rows.append((event, story, answer.removeprefix("answer: ")))
    return rows


@pytest.mark.parametrize("task", ["mishap", "entailment", "two_choices", "four_endings", "before_after"])
def test_tasks_are_true_balanced_and_split_by_noun(demo, task):
    raw = demo / "demo-s0" / "raw"
    nouns = json.loads((raw / "latents.json").read_text())["nouns"]
    past = {text: action for action, (text, _) in ACTIONS.items()}
    seen = set()

    def effect(noun, action):
        return EFFECTS[nouns[noun]["material"]][action]

    for split, size in TASK_SIZES.items():
        rows = read_task(raw / "tasks", task, split)
        assert len(rows) == size == len(set(rows)) and not seen & set(rows)
        seen |= set(rows)
        wordings = {}
        for *texts, label in rows:
            words = " ".join(texts).split()
            named = [word for word in words if word in nouns]
            assert named and all((nouns[noun]["split"] == "dev") == (split == "dev") for noun in named)
            action = next((past[word] for word in words if word in past), None)
            if task == "mishap":
                true, wording = int(label) == (effect(named[0], action) in MISHAPS), action
            elif task == "entailment":
                true = (label == "entailment") == (effect(named[0], action) == texts[1].split()[1])
                wording = action, texts[1]
            elif task == "two_choices":
                said, action = texts[0].split()[2], texts[0].split()[5]
                true = [effect(noun, action) == said for noun in named] == [label == "0", label == "1"]
                wording = texts[0]
            elif task == "four_endings":
                right = [ending == f"{effect(named[0], action)} ." for ending in texts[1:]]
                true, wording = right == [label == str(i) for i in range(4)], "all"
            else:
                motion, relation = wording = texts[0].split()[2], texts[0].split()[4]
                is_first = nouns[named[0]]["order"] == f"{motion} first"
                true = (label == "positive") == (is_first == (relation == "before"))
            assert true, (texts, label)
            wordings.setdefault(wording, Counter())[label] += 1
        for wording, labels in wordings.items():
            assert len(labels) == (4 if task == "four_endings" else 2), (wording, labels)
            assert len(set(labels.values())) == 1, (wording, labels)


def test_demo_topics_say_nothing_about_materials(demo):
    nouns = json.loads((demo / "demo-s0" / "raw" / "latents.json").read_text())["nouns"]
    pairs = Counter((n["material"], n["topic"]) for n in nouns.values())
    assert max(pairs.values()) <= 6  # 10 nouns over 8 topics, drawn independently


# ---------------------------------------------------------------------------- beside the world, for tables of the papers


def test_noisier_features_are_of_the_same_clips(small_world, tmp_path):
    """Noise of deviation 1.5 on the 2D channels; 3D channels and captions stay, and so does the world."""
    folder = make_demo(tmp_path / "w", 3)
    before = (folder / "world.json").read_bytes()
    path = world.noisy_videos(folder, tmp_path / "more" / "noisy.h5")
    clean, noisy = (data.VideoClips(file, 24, part="val", val_clips=40) for file in (folder / "videos.h5", path))
    index = np.arange(len(clean))
    a, b = (clips.clips(index) for clips in (clean, noisy))
    assert a["ids"].equal(b["ids"]) and clean.features == noisy.features and clean.hash != noisy.hash
    gap = (b["frames"] - a["frames"]).float()[a["frame_mask"]]
    assert gap[:, :64].std() == pytest.approx(1.5, rel=0.02) and gap[:, 64:].abs().max() == 0
    made = path.stat().st_mtime_ns
    assert world.noisy_videos(folder, path) == path and path.stat().st_mtime_ns == made
    assert (folder / "world.json").read_bytes() == before


def test_larger_text_is_more_of_the_same_language(small_world, tmp_path):
    folder = make_demo(tmp_path / "w", 3)
    path = world.larger_text(folder, tmp_path / "more" / "larger.h5", times=3)
    larger, own = (data.PairBlocks(file, 24, "train") for file in (path, demo_xtext(folder, OneRank())))
    assert larger.vocab.hash == own.vocab.hash and larger.hash != own.hash
    assert len(larger) == pytest.approx(3 * len(own), rel=0.05)
    assert not (larger.batch(np.arange(len(larger)))["ids"] == larger.vocab.unk).any()
