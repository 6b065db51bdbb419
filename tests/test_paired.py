"""Proves distillation from a teacher that reads other tokens than the student: CLIP's, or another BERT's.

Run: python -m pytest -q tests/test_paired.py
"""
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import stop_at, stop_line
from test_ddp import log_lines, pairs_and_tower
from test_scripts import assert_same, saved

import analyze
import data
import distill
from model import BERT, BERTConfig, model_config
from parts import weights
from parts.vocab import SPECIALS, Vocab
from parts.weights import load_bert, load_clip, save_bert, save_tensors
from prepare import chain
from prepare.packing import pack_xtext


@pytest.fixture(scope="module")
def clip_pairs(demo, tmp_path_factory):
    """(packed pairs of the demo, folder of a CLIP tower of 9 positions: several segments a block)."""
    return pairs_and_tower(demo / "demo-s0", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def bert_pairs(demo, tmp_path_factory):
    """(packed pairs, folder of a BERT) whose teacher reads the demo's texts letter by letter."""
    out, world = tmp_path_factory.mktemp("letters"), demo / "demo-s0"
    letters = Vocab([*SPECIALS, *"abcdefghijklmnopqrstuvwxyz.,'-", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")])
    torch.manual_seed(0)
    save_bert(BERT(BERTConfig(letters.size, layers=1, hidden=32, heads=2, intermediate=64, max_positions=160)),
              out / "bert", letters)
    text = sorted((world / "raw" / "text").glob("*.txt"))[0]
    (out / "text.txt").write_text("\n".join(text.read_text().splitlines()[:3000]))
    pack_xtext([out / "text.txt"], data.open_vocab(world / "corpus.h5"), letters, out / "pairs.h5")
    return str(out / "pairs.h5"), str(out / "bert")


PAIRS = pytest.mark.parametrize("pairs", ["clip_pairs", "bert_pairs"])


@pytest.fixture
def config(distill_config, request):
    """distill.Config with pairs and teacher of a fixture's name; flags as keywords."""
    def make(pairs, **flags):
        train, folder = request.getfixturevalue(pairs)
        return distill_config(**dict(train=train, teacher=folder, segments=4) | flags)
    return make


def opened(cfg):
    """(FrozenTeacher, PairBlocks)."""
    train, _, teacher, _, _ = distill.open_parts(cfg, torch.device("cpu"), torch.float32)
    return teacher, train


@PAIRS
def test_each_token_goes_with_the_word_whose_letters_it_has(config, pairs):
    """The texts say it themselves: a word's pieces on both sides spell the same."""
    cfg = config(pairs, segments=2, objective="crd")
    blocks, index = opened(cfg)[1], np.arange(80)
    batch = distill.make_batch(blocks, cfg, index, 0, 0, index, paired=True)
    compared = cut = 0
    for b in range(len(index)):
        tokens = batch["clip_ids"].flatten()[batch["clip_place"][b]][batch["clip_mask"][b]].tolist()
        owners = batch["clip_word"][b][batch["clip_mask"][b]].tolist()
        for place in set(batch["word"][b].tolist()) - {-1, 0}:
            own = [i for i, word in zip(batch["ids"][b].tolist(), batch["word"][b].tolist()) if word == place]
            theirs = [token for token, owner in zip(tokens, owners) if owner == place]
            ours, other = (v.decode(ids).replace("##", "") for v, ids in ((blocks.vocab, own), (blocks.clip_vocab, theirs)))
            at_end = batch["word"][b, -2] == place  # the block's end cuts its pieces, not its letters
            assert theirs and (ours.startswith(other) or at_end and other.startswith(ours)), (ours, other)
            compared, cut = compared + 1, cut + (ours != other)
        for token, owner in zip(tokens, owners):
            assert owner != -1 or token in blocks.clip_vocab.specials or blocks.clip_vocab.decode([token]) in ",.'-"
        assert (batch["mask"][b] == (batch["word"][b] >= 0)).all()
    assert compared > 500 and cut < 0.1 * compared


@PAIRS
def test_teacher_gives_means_of_its_own_states_in_any_batch(config, pairs):
    """Against loops over texts, each read alone; CLIP's vector of a text is that of its segments' ends."""
    cfg = config(pairs, objective="l2+crd", crd_level="sentence")
    teacher, blocks = opened(cfg)
    index = np.arange(7)
    batch = distill.make_batch(blocks, cfg, index, 0, 0, index, paired=True)
    teacher(batch)
    for b in range(len(index)):
        one = blocks.clip_batch(index[b:b + 1])
        states, ends = [], []
        for ids in one["clip_ids"]:
            length = (ids == blocks.clip_vocab.end).nonzero()[-1].item() + 1
            states.append(teacher.bert(ids[None, :length])[0])
            ends.append(states[-1][-1])
        states = torch.cat(states)
        wanted = torch.stack(ends).mean(0) if teacher.clip else states.mean(0)
        torch.testing.assert_close(batch["sentence_t"][b], wanted, rtol=1e-4, atol=1e-5)
        owners = batch["clip_word"][b][:len(states)]
        for t, word in enumerate(batch["word"][b].tolist()):
            if word >= 0:
                torch.testing.assert_close(batch["h_t"][b, t], states[owners == word].mean(0), rtol=1e-4, atol=1e-5)
            else:
                assert not batch["h_t"][b, t].any() and not batch["mask"][b, t]


def test_a_block_without_a_common_word_still_has_an_anchor(config, clip_pairs):
    blocks = opened(config("clip_pairs", objective="crd"))[1]
    blocks.tower_counts = [np.zeros_like(counts) for counts in blocks.tower_counts]
    found = blocks.alignment([0, 5])
    assert (found["word"] >= 0).sum(1).tolist() == [1, 1] == (found["clip_word"] >= 0).sum(1).tolist()
    assert not found["word"][:, 0].any() and not found["clip_word"][:, 0].any()


@PAIRS
@pytest.mark.parametrize("flags", [
    dict(objective="crd", crd_level="sentence"), dict(objective="l2+nst+crd"),
    dict(objective="crd", dtype="bfloat16")], ids=str)
def test_student_learns_from_a_teacher_of_other_tokens(config, pairs, flags):
    cfg = config(pairs, max_steps=30, eval_every=30, save_every=30, grad_every=30, **flags)
    distill.main(cfg)
    lines = [line for line in log_lines(distill.run_folder(cfg)) if "lr" in line]
    for term in flags["objective"].split("+"):
        values = [line[term] for line in lines]
        assert np.isfinite(values).all() and (term == "nst" or np.mean(values[-5:]) < np.mean(values[:5])), term
    student = load_bert(distill.run_folder(cfg) / "model")
    assert student.config.vocab_size == data.open_vocab(cfg.train).size


def test_vokens_are_read_where_both_models_read_a_word(config, tmp_path, request):
    """A teacher of other words that has seen videos: the loss is over the aligned pieces alone."""
    train, folder = request.getfixturevalue("bert_pairs")
    shutil.copytree(folder, tmp_path / "seeing")
    torch.manual_seed(0)
    vectors = torch.randn(5, 32)
    save_tensors({"vectors": vectors}, tmp_path / "seeing" / "vokens.safetensors")
    cfg = config("bert_pairs", objective="voken", teacher=str(tmp_path / "seeing"))
    teacher, blocks = opened(cfg)
    batch = distill.make_batch(blocks, cfg, np.arange(6), 0, 0, np.arange(6), paired=True)
    teacher(batch)
    model = distill.Distiller(cfg, model_config("1L-32H-2A", blocks.vocab.size, 0.0), teacher, None).eval()
    h, = model.states(batch)
    found = model.terms(h, batch, {"mlm": 1.0, "voken": 1.0})["voken"]
    labels = F.normalize(batch["h_t"], dim=-1) @ F.normalize(vectors, dim=-1).T
    each = F.cross_entropy(model.voken(h).flatten(0, 1), labels.argmax(-1).flatten(), reduction="none")
    torch.testing.assert_close(found, each[batch["mask"].flatten()].sum(), rtol=1e-4, atol=1e-4)
    assert distill.ITEMS["voken"](batch) == batch["mask"].sum() < batch["mask"].numel()
    distill.main(cfg)


def test_openais_file_teaches(config, tmp_path, clip_pairs, monkeypatch):
    """Its own tokenizer is not in it; the packed pairs must have OpenAI's."""
    clip = load_clip(clip_pairs[1])
    names = {f"{name}": x for name, x in clip.state_dict().items()}
    torch.save(names, tmp_path / "clip.pt")
    line = stop_line(distill.main, config("clip_pairs", objective="crd", teacher=str(tmp_path / "clip.pt")))
    assert str(tmp_path / "clip.pt") in line  # not of OpenAI's names
    monkeypatch.setattr(distill, "open_clip", lambda path, flag, quick: (clip, "hash", None))
    line = stop_line(distill.main, config("clip_pairs", objective="crd", teacher=str(tmp_path / "clip.pt")))
    assert "packed with another tokenizer" in line  # than OpenAI's
    monkeypatch.setattr(weights, "OPENAI_CLIP", data.open_vocab(clip_pairs[0]).hash)
    distill.main(config("clip_pairs", objective="crd", crd_level="sentence", teacher=str(tmp_path / "clip.pt")))


def test_one_text_only_run_serves_every_teacher_and_its_segments(config):
    one, two = (chain.text_only_run(config("clip_pairs", objective="crd", **flags), Path("out")) for flags in (
        {}, dict(segments=1, quick_gelu=True, teacher="other", crd_level="sentence")))
    assert one == two


def test_resume_refuses_other_segments(config):
    distill.main(config("clip_pairs", objective="crd", max_steps=2, eval_every=2, save_every=2))
    with pytest.raises(SystemExit, match="--segments was 4"):
        distill.main(config("clip_pairs", objective="crd", segments=1, resume="true"))


def test_what_is_cut_is_said_and_kept(config, capsys):
    results = distill.main(config("clip_pairs", objective="crd", segments=1, max_steps=1, eval_every=1, save_every=1))
    assert results["teacher_tokens_cut"] > 1000 and results["segments_used"] == 1
    assert f"{results['teacher_tokens_cut']:,} tokens cut" in capsys.readouterr().out


def test_validation_text_may_be_of_either_kind(config, demo, clip_pairs):
    corpus = str(demo / "demo-s0" / "corpus.h5")
    for flags in (dict(val=corpus), dict(train=corpus, val=clip_pairs[0], objective="none", teacher="")):
        distill.main(config("clip_pairs", **dict(objective="crd", crd_level="sentence", max_steps=1, eval_every=1,
                                                 save_every=1) | flags))


def test_student_starts_from_a_bert_of_its_own_words(config, teacher_run):
    cfg = config("clip_pairs", objective="crd", crd_level="sentence", init_from=str(teacher_run), max_steps=1, eval_every=1,
                 save_every=1, warmup_steps=0, lr=1e-9)
    distill.main(cfg)
    before, after = (load_bert(folder / "model").state_dict() for folder in (teacher_run, distill.run_folder(cfg)))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flags", [dict(objective="crd", crd_level="sentence"), dict(objective="l2+nst+crd", grad_accum=2)],
                         ids=str)
def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path, monkeypatch, flags):
    flags |= dict(max_steps=6, save_every=2, eval_every=2, grad_every=2, log_every=2)
    whole, parts = (config("clip_pairs", **flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    distill.main(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(SystemExit):
            distill.main(parts)
    distill.main(replace(parts, resume="true"))
    assert_same(saved(whole.out_dir), saved(parts.out_dir))


def test_text_alone_and_a_teacher_of_the_same_words_read_pairs_as_text(config, teacher_run, demo):
    """The student's side of the pairs is the corpus: only the hash of the data differs."""
    for flags in (dict(objective="none", teacher=""), dict(objective="nst+crd", teacher=str(teacher_run))):
        both = [config("clip_pairs", **flags, **where) for where in (
            dict(out_dir=str(demo / "pairs")), dict(train=str(demo / "demo-s0" / "corpus.h5"), out_dir=str(demo / "text")))]
        for cfg in both:
            distill.main(cfg)
        a, b = (saved(cfg.out_dir) for cfg in both)
        assert_same(*({k: v for k, v in state.items() if k != "hashes"} for state in (a, b)))


def test_demo_distils_a_tower_and_shows_its_row(demo, clip_pairs, config, tmp_path, capsys):
    cfg = config("clip_pairs", objective="crd", crd_level="sentence", train="", data_dir=str(demo),
                 out_dir=str(tmp_path / "out" / "clip"))
    chain.distill(cfg)
    out = capsys.readouterr().out
    assert "text-only" in out and "material of held-out nouns" in out
    analyze.main(["table", str(tmp_path / "out" / "clip"), str(tmp_path / "out" / "distill-none-s0")])
    head, _, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert "material" in head and [row.split()[0] for row in rows] == ["clip", "distill-none-s0"]


@pytest.mark.parametrize("flags, words", [
    (dict(objective="soft"), "--objective soft: compares the same words, but --teacher .* reads other tokens"),
    (dict(objective="voken+crd"), "--objective voken: .* no video encoder"),
    (dict(objective="crd", crd_views="different"), "--crd_views different"),
    (dict(objective="crd", segments=0), "--segments 0")])
def test_what_a_teacher_of_other_tokens_cannot_give_is_one_line(config, flags, words):
    with pytest.raises((SystemExit, ValueError), match=words):
        distill.main(config("clip_pairs", **flags))


def test_text_that_is_not_packed_for_both_is_one_line(config, demo, clip_pairs, bert_pairs):
    corpus = str(demo / "demo-s0" / "corpus.h5")
    for pairs in ("clip_pairs", "bert_pairs"):
        line = stop_line(distill.main, config(pairs, objective="crd", train=corpus))
        assert "reads another vocabulary than the packed text" in line and "data.py xtext" in line
    line = stop_line(distill.main, config("bert_pairs", objective="crd", train=clip_pairs[0]))
    assert "packed with another tokenizer" in line and "--clip_vocab" in line
