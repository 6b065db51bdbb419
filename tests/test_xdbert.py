"""Proves the adaptation of adapt_xdbert.py: targets, ablations, resume, export, and what bad input gets.

Run: python -m pytest -q tests/test_xdbert.py
"""
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adapt_xdbert
import common
import data
import finetune
import teacher
from conftest import QUICK_TEACHER, widened
from data import open_vocab
from model import BERT, BERTConfig, CLIPConfig, CLIPText, MLMHead
from parts.machine import init_ranks
from parts.vocab import SPECIALS, Vocab, load_vocab
from parts.weights import (config_and_vocab, load_bert, load_clip, load_mlm_head, load_xdbert, save_bert,
                           save_clip)
from prepare import chain
from prepare.packing import pack_xtext
from prepare.world import demo_xtext
from run import model_folder
from test_scripts import compiles

# a run of a second on packed pairs of the demo
QUICK = dict(max_steps=4, batch_size=8, log_every=1, eval_every=4, save_every=2, eval_blocks=6, device="cpu",
             block_size=24, segments=2, cross_layers=1, lr=1e-3, table=False)


@pytest.fixture(scope="module")
def parts(demo, tmp_path_factory):
    """{flag: path} of the demo's pairs, a random language encoder and a CLIP tower of teacher.py."""
    out, world = tmp_path_factory.mktemp("xdbert"), demo / "demo-s0"
    pairs = demo_xtext(world, init_ranks("cpu"))
    vocab = open_vocab(world / "corpus.h5")
    torch.manual_seed(0)
    save_bert(BERT(BERTConfig(vocab.size, layers=1, hidden=32, heads=2, intermediate=64, max_positions=32)),
              out / "language", vocab)
    teacher.main(teacher.Config(**QUICK_TEACHER | dict(objective="clip", stop_on="recall"),
                                videos=str(world / "videos.h5"), out_dir=str(out / "clip")))
    return {"train": str(pairs), "language": str(out / "language"), "clip": str(out / "clip")}


@pytest.fixture
def config(parts, tmp_path):
    """adapt_xdbert.Config for a run of a second; flags as keywords."""
    def make(**flags):
        return adapt_xdbert.Config(**(QUICK | parts | dict(out_dir=str(tmp_path / "run")) | flags))
    return make


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- teacher.py --objective clip


def test_teacher_trains_a_text_tower_that_loads_as_clip(parts):
    clip = load_clip(model_folder(parts["clip"], "--clip"))
    assert (clip.config.positions, clip.config.hidden, clip.width) == (24, 32, 32)
    results = json.loads((common.Path(parts["clip"]) / "results.json").read_text())
    assert {"clip", "t2v_r10"} <= results.keys()
    losses = [line["clip"] for line in log_of(common.Path(parts["clip"])) if "clip" in line]
    assert losses and all(np.isfinite(losses))


# ---------------------------------------------------------------------------- the batch


def blocks_of(parts, **sizes):
    return data.PairBlocks(parts["train"], **dict(block_size=24, segments=2, length=24) | sizes)


def test_targets_are_the_words_and_tokens_that_stand_there(parts, config):
    blocks, index = blocks_of(parts), np.arange(40)
    batch = adapt_xdbert.make_batch(blocks, config(), index, 0, 0, index, text=index)
    ids = blocks.batch(index)["ids"].flatten()
    assert torch.equal(ids[batch["mlm_index"]], batch["mlm_targets"])
    assert not torch.isin(batch["mlm_targets"], torch.tensor(blocks.vocab.specials)).any()
    tokens = batch["clip_ids"].flatten()[batch["clip_place"]].flatten()
    assert torch.equal(tokens[batch["cliptc_index"]], batch["cliptc_targets"])
    assert batch["clip_mask"].flatten()[batch["cliptc_index"]].all()
    ends = torch.tensor([blocks.clip_vocab.start, blocks.clip_vocab.end])
    assert len(batch["cliptc_targets"]) > 50 and not torch.isin(batch["cliptc_targets"], ends).any()
    assert batch["match_targets"].all()


def test_match_says_whether_the_clip_side_holds_the_same_text(parts, config):
    blocks, index = blocks_of(parts), np.arange(400)
    text = data.match_texts(index, len(blocks), 0, 0, index)
    assert 0.4 < (text == index).mean() < 0.6
    batch = adapt_xdbert.make_batch(blocks, config(), index, 0, 0, index, text=text)
    same = batch["match_targets"].bool().numpy()
    assert np.array_equal(same, text == index)
    own = blocks.clip_batch(index)

    def row(side, i):
        return side["clip_ids"].flatten()[side["clip_place"][i][side["clip_mask"][i]]].tolist()
    for i in range(40):
        assert (row(batch, i) == row(own, i)) == same[i]


def test_a_mismatched_text_that_is_equal_counts_as_matched(parts, config):
    blocks = blocks_of(parts)
    blocks.batch = lambda index: {"ids": torch.full((len(index), 24), 7), "mask": torch.ones(len(index), 24).bool()}
    batch = adapt_xdbert.make_batch(blocks, config(), np.arange(4), 0, 0, np.arange(4), text=np.arange(4)[::-1])
    assert batch["match_targets"].all()


# ---------------------------------------------------------------------------- the model


def adapter(parts, cfg):
    torch.manual_seed(0)
    language = load_bert(parts["language"], pooler="trained", dropout=0.0)
    clip = None if cfg.no_clip else load_clip(model_folder(parts["clip"], "--clip"))
    return adapt_xdbert.Adapter(cfg, language, clip, None).eval()


@pytest.mark.parametrize("objective", ["mlm+match+cliptc", "mlm+match", "mlm+cliptc", "match", "cliptc", "mlm",
                                       "mlm+match+cliptc+itc", "cliptc+itc"])
@pytest.mark.parametrize("freeze", ["none", "clip,language"])
def test_every_trainable_parameter_gets_a_gradient(parts, config, objective, freeze):
    cfg = config(objective=objective, freeze=freeze, cross_layers=2)
    model, index = adapter(parts, cfg), np.arange(8)
    text = data.match_texts(index, 100, 0, 0, index)
    batch = adapt_xdbert.make_batch(blocks_of(parts), cfg, index, 0, 0, index, text=text)
    sum(model(batch, dict.fromkeys(model.weights, 1.0)).values()).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    trained = {name.split(".")[1] for name, p in model.named_parameters()
               if p.grad is not None and name.startswith("encoder.")}
    assert trained - {"pooler"} == (
        {"cross"} if freeze != "none" else {"language", "clip", "cross"})


def test_terms_equal_plain_cross_entropies(parts, config):
    cfg, index = config(), np.arange(6)
    model = adapter(parts, cfg)
    batch = adapt_xdbert.make_batch(blocks_of(parts), cfg, index, 0, 0, index, text=index[::-1])
    terms = model(batch, {"mlm": 3.0, "match": 6.0, "cliptc": 2.0})
    for name, count in (("mlm", 3.0), ("match", 6.0), ("cliptc", 2.0)):
        rows = model.logits(*model.states(batch), batch)[name].double().log_softmax(1)
        wanted = -sum(rows[i, t] for i, t in enumerate(batch[f"{name}_targets"])) / count
        torch.testing.assert_close(terms[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_frozen_parts_do_not_change_and_have_no_dropout(parts, config, tmp_path):
    cfg = config(freeze="clip,language", dropout=0.3)
    adapt_xdbert.main(cfg)
    before, after = load_bert(parts["language"]), load_bert(tmp_path / "run" / "model")
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values()):
        assert torch.equal(a, b), name
    model = adapter(parts, cfg).train()
    assert not model.encoder.language.training and not model.encoder.clip.training and model.encoder.cross.training


# ---------------------------------------------------------------------------- itc


def test_itc_compares_means_of_words_with_the_ends_of_matched_segments(parts, config):
    """Against a loop over texts and segments, in float64; a mismatched text has no pair."""
    cfg, index = config(objective="mlm+itc", cross_layers=0), np.arange(6)
    model, blocks = adapter(parts, cfg), blocks_of(parts, length=9)
    text = np.array([0, 1, 9, 3, 4, 8])
    batch = adapt_xdbert.make_batch(blocks, cfg, index, 0, 0, index, text=text)
    h, c = (x.double() for x in model.states(batch))
    ids, at = batch["clip_ids"], 0
    z, z_clip = [], []
    for b in range(6):
        own = int((batch["clip_mask"][b] & (ids.flatten()[batch["clip_place"][b]] == blocks.clip_vocab.end)).sum())
        for s in range(own):  # segments in use
            end = (ids[at] == blocks.clip_vocab.end).nonzero()[-1].item()
            if text[b] == index[b]:
                words = batch["segment_words"][b, s].nonzero()[:, 0]
                assert len(words)
                z.append(F.linear(h[b, words].mean(0), model.itc.weight.double(), model.itc.bias.double()))
                z_clip.append(c[at, end])
            at += 1
    z, z_clip = (F.normalize(torch.stack(x), dim=-1) for x in (z, z_clip))
    assert at == len(ids) and 4 < len(z) == batch["itc_mask"].sum() == adapt_xdbert.ITEMS["itc"](batch)
    scores = z @ z_clip.T / 0.07
    wanted = -(scores.log_softmax(0).diagonal() + scores.log_softmax(1).diagonal()).mean() / 2
    found = model(batch, {"mlm": 1.0, "itc": len(z)})["itc"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_itc_moves_the_language_encoder_and_never_the_tower(parts, config):
    cfg, index = config(objective="match+itc", freeze="none"), np.arange(8)
    model = adapter(parts, cfg)
    batch = adapt_xdbert.make_batch(blocks_of(parts), cfg, index, 0, 0, index, text=index)
    model(batch, dict.fromkeys(model.weights, 1.0))["itc"].backward()
    moved = {name.removeprefix("encoder.").split(".")[0] for name, p in model.named_parameters()
             if p.grad is not None and p.grad.any()}
    assert moved == {"language", "itc", "itc_scale"}


def test_itc_freezes_the_tower_and_says_why(config, tmp_path, capsys):
    adapt_xdbert.main(config(objective="mlm+itc"))
    assert "freeze: clip (auto: a tower that is trained along forgets" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["freeze"] == "clip"
    before, after = (load_clip(folder).state_dict() for folder in (
        model_folder(config().clip, "--clip"), tmp_path / "run" / "model" / "clip"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    adapt_xdbert.main(config(objective="mlm+itc", freeze="none"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["freeze"] == "none"
    after = load_clip(tmp_path / "run" / "model" / "clip").state_dict()
    assert not torch.equal(before["embeddings.word.weight"], after["embeddings.word.weight"])


def test_without_cross_layers_the_run_leaves_an_ordinary_bert(parts, config, tmp_path):
    language = with_head(parts, tmp_path / "language")
    adapt_xdbert.main(config(objective="mlm+itc", cross_layers=0, language=language))
    folder = tmp_path / "run" / "model"
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in Path(language).iterdir())
    head = load_mlm_head(folder, load_bert(folder))
    assert not torch.equal(head.dense.weight, load_mlm_head(language, load_bert(language)).dense.weight)
    adapt_xdbert.main(config(objective="mlm+itc", cross_layers=0))  # a fresh head is trained, and kept
    assert load_mlm_head(folder, load_bert(folder)) is not None
    adapt_xdbert.main(config(objective="itc", language=language))  # the old one is out of date
    assert load_mlm_head(folder, load_bert(folder)) is None


def test_evaluation_in_micro_batches_equals_one_batch_and_takes_the_dtype(parts, config):
    every = dict(objective="mlm+match+cliptc+itc", eval_blocks=24, batch_size=24)
    model, blocks, dtypes = adapter(parts, config(**every)), blocks_of(parts), set()
    model.language.layers[0].register_forward_hook(lambda *x: dtypes.add(x[0].attention.qkv(x[1][0]).dtype))

    def scores(**flags):
        dtypes.clear()
        return adapt_xdbert.evaluate(model, blocks, config(**every | flags), init_ranks("cpu"))
    whole, small, half = scores(), scores(grad_accum=6), scores(dtype="bfloat16")
    assert dtypes == {torch.bfloat16} and len(whole) > 8
    assert small == pytest.approx(whole, rel=1e-5) and half == pytest.approx(whole, rel=0.02, abs=0.05)
    assert half["mlm"] != whole["mlm"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(objective="mlm+match+cliptc+itc", freeze="none", grad_accum=2, grad_every=3),
                                   dict(grad_checkpoint=True, backend="aot_eager")], ids=["itc", "recomputed"])
def test_compiled_adaptation_equals_the_eager_one(config, tmp_path, monkeypatch, flags):
    """Language encoder and tower, each in training, for gradients and in evaluation, with batches of any size."""
    compiles(adapt_xdbert, config, tmp_path, monkeypatch, 9, **dict(max_steps=6, eval_every=3, save_every=6) | flags)


@pytest.mark.slow
def test_recomputed_activations_change_no_bit_of_an_adaptation(config, tmp_path):
    found = []
    for again in (False, True):
        adapt_xdbert.main(config(grad_checkpoint=again, max_steps=2, eval_every=2, out_dir=str(tmp_path / str(again))))
        found.append(load_file(tmp_path / str(again) / "model" / "model.safetensors"))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_evaluation_without_a_pair_counts_nothing(parts, config):
    model = adapter(parts, cfg := config(objective="mlm+itc"))
    nothing = [torch.zeros(5, 2, 32), torch.zeros(5, 2, 32), torch.zeros(5, 2)]
    assert adapt_xdbert.contrast(model, nothing, cfg, init_ranks("cpu")) == {"itc": 0, "itc_accuracy": 0}


def test_log_has_gradients_and_probes_of_the_demo(config, tmp_path):
    results = adapt_xdbert.main(config(objective="mlm+match+cliptc+itc", w_match=0.0, grad_every=2))
    lines = log_of(tmp_path / "run")
    gradients = [line for line in lines if "gradient_itc" in line]
    assert [line["step"] for line in gradients] == [0, 2] and all(
        line["gradient_mlm"] > 0 and line["gradient_itc"] > 0 and line["gradient_match"] == 0 for line in gradients)
    probes = [line for line in lines if "probe_material" in line]
    assert [line["step"] for line in probes] == [0, 4]
    for name in ("material", "colour", "size", "order"):
        assert probes[-1][f"probe_{name}"] == results["probes"][name]["linear"]


# ---------------------------------------------------------------------------- runs


@pytest.mark.parametrize("flags", [
    dict(objective="mlm"), dict(objective="mlm+match"), dict(objective="cliptc"), dict(objective="match"),
    dict(objective="mlm", no_clip=True), dict(cross_layers=3), dict(freeze="clip"), dict(freeze="language"),
    dict(reduction="sum", lr=1e-5), dict(dtype="bfloat16"), dict(segments=1),
    dict(schedule_steps=40), dict(max_steps=0, epochs=0.002), dict(grad_accum=4),
    dict(mask_split="100/0/0", cliptc_rate=0.5), dict(objective="mlm+match+cliptc+itc", grad_accum=2),
    dict(objective="mlm+itc", cross_layers=0, segments=3, dtype="bfloat16"), dict(objective="itc"),
    dict(objective="match+itc", freeze="none", w_itc=0.5)], ids=str)
def test_every_ablation_runs(config, tmp_path, flags):
    results = adapt_xdbert.main(config(**dict(max_steps=2, eval_every=2) | flags))
    lines = [line for line in log_of(tmp_path / "run") if "lr" in line]
    assert set(adapt_xdbert.ITEMS) & lines[0].keys() == set(results["objective"].split("+"))
    assert all(np.isfinite(line[name]) for line in lines for name in results["objective"].split("+"))


@dataclasses.dataclass(frozen=True)
class TinyCLIP(CLIPConfig):
    layers: int = 1
    hidden: int = 32
    heads: int = 2
    intermediate: int = 64
    positions: int = 16
    projection: int = 32


def test_clip_random_takes_the_size_of_the_packed_vocabulary(config, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_xdbert, "CLIPConfig", TinyCLIP)
    adapt_xdbert.main(config(clip="random", segments=3))
    clip = load_xdbert(tmp_path / "run" / "model").clip
    assert (clip.config.vocab_size, clip.config.positions) == (760, 16)


def test_adaptation_leaves_an_ordinary_folder_of_unchanged_size(parts, config, tmp_path):
    adapt_xdbert.main(config())
    before, after = (load_file(common.Path(folder) / "model.safetensors")
                     for folder in (parts["language"], tmp_path / "run" / "model"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    word = "embeddings.word_embeddings.weight"
    assert not torch.equal(before[word], after[word])
    whole = load_xdbert(tmp_path / "run" / "model")
    assert torch.equal(whole.language.embeddings.word.weight, after[word]) and whole.pooler is not None
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"]), name


def with_head(parts, target):
    """The language encoder with a masked-word head of its own."""
    bert = load_bert(parts["language"])
    torch.manual_seed(1)
    save_bert(bert, target, load_vocab(parts["language"]), MLMHead(32, bert.embeddings.word.weight))
    return str(target)


def test_head_trained_on_cross_modal_states_is_not_saved_as_the_encoders(parts, config, tmp_path, capsys):
    language = with_head(parts, tmp_path / "language")
    before = load_mlm_head(language, load_bert(language)).state_dict()

    def head(**flags):
        adapt_xdbert.main(config(language=language, **flags))
        folder = tmp_path / "run" / "model"
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder.rename(tmp_path / "model")
        folder = tmp_path / "model"
        assert json.loads((folder / "config.json").read_text())["architectures"] == [
            "BertForMaskedLM" if load_mlm_head(folder, load_bert(folder)) else "BertModel"]
        return load_mlm_head(folder, load_bert(folder))
    assert head() is None
    alone = head(objective="mlm", no_clip=True)  # on the encoder's own states
    assert not torch.equal(alone.dense.weight, before["dense.weight"])
    kept = head(objective="match+cliptc", freeze="language")  # neither trained nor out of date
    assert all(torch.equal(value, before[name]) for name, value in kept.state_dict().items())
    assert "has no masked-word head" not in capsys.readouterr().out
    adapt_xdbert.main(config())
    assert "has no masked-word head; MLM begins with a random one" in capsys.readouterr().out


def test_padded_language_encoder_and_tower_keep_their_sizes(parts, config, tmp_path):
    language = widened(Path(with_head(parts, tmp_path / "language")), tmp_path / "wide")
    tower = widened(model_folder(parts["clip"], "--clip"), tmp_path / "tower", 3)
    adapt_xdbert.main(config(language=str(language), clip=str(tower)))
    model = load_xdbert(tmp_path / "run" / "model")
    words, clip_words = (config_and_vocab(tmp_path / "run" / "model" / name)[1] for name in ("", "clip"))
    assert model.config.vocab_size == words.size == load_vocab(language).size + 6
    assert model.clip.config.vocab_size == clip_words.size == load_vocab(tower).size + 3
    adapt_xdbert.main(config(language=str(language), objective="mlm", no_clip=True))
    assert config_and_vocab(tmp_path / "run" / "model")[0].vocab_size == words.size


def test_clip_file_that_does_not_tell_its_activation_needs_a_flag(parts, config, tmp_path):
    state = {f"transformer.resblocks.0.{name}": torch.zeros(shape) for name, shape in {
        "attn.in_proj_weight": (192, 64), "attn.in_proj_bias": (192,), "attn.out_proj.weight": (64, 64),
        "attn.out_proj.bias": (64,), "ln_1.weight": (64,), "ln_1.bias": (64,), "ln_2.weight": (64,),
        "ln_2.bias": (64,), "mlp.c_fc.weight": (256, 64), "mlp.c_fc.bias": (256,),
        "mlp.c_proj.weight": (64, 256), "mlp.c_proj.bias": (64,)}.items()}
    state |= {"token_embedding.weight": torch.zeros(49408, 64), "positional_embedding": torch.zeros(77, 64),
              "ln_final.weight": torch.zeros(64), "ln_final.bias": torch.zeros(64),
              "text_projection": torch.zeros(64, 32), "logit_scale": torch.zeros(())}
    torch.save(state, tmp_path / "open.pt")
    with pytest.raises(SystemExit, match="open.pt: does not tell its activation; give --quick_gelu"):
        adapt_xdbert.main(config(clip=str(tmp_path / "open.pt")))
    with pytest.raises(SystemExit, match="another tokenizer"):  # which comes behind
        adapt_xdbert.main(config(clip=str(tmp_path / "open.pt"), quick_gelu=True))


def test_losses_fall(config, tmp_path):
    adapt_xdbert.main(config(objective="mlm+match+cliptc+itc", freeze="none", max_steps=120, log_every=10, eval_every=120,
                             save_every=120, batch_size=16, lr=3e-3))
    lines = [line for line in log_of(tmp_path / "run") if "lr" in line]
    for name in ("mlm", "cliptc", "itc"):
        assert lines[-1][name] < 0.9 * lines[0][name]
    val = [line for line in log_of(tmp_path / "run") if "val_mlm" in line]
    assert {"val_mlm_accuracy_matched", "val_mlm_accuracy_mismatched", "val_match_accuracy"} <= val[-1].keys()
    assert val[-1]["val_itc"] < val[0]["val_itc"] and 0 <= val[-1]["val_itc_accuracy"] <= 1


@pytest.mark.parametrize("flags", [{}, dict(objective="mlm+match+itc", grad_accum=2)], ids=str)
def test_resume_is_bit_for_bit(config, tmp_path, flags):
    adapt_xdbert.main(config(**flags, out_dir=str(tmp_path / "whole")))
    adapt_xdbert.main(config(**flags, max_steps=4))
    run = tmp_path / "run"
    (run / "checkpoint.pt").unlink()  # back to step 2, as if killed before the last checkpoint
    (run / "checkpoint.pt.prev").rename(run / "checkpoint.pt")
    adapt_xdbert.main(config(**flags, resume="true"))
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "run"))
    assert a["step"] == b["step"] == 4
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    same = [[{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu", "memory_mb")} for line in log_of(
        tmp_path / name)] for name in ("whole", "run")]
    assert same[0] == same[1]


@pytest.mark.parametrize("lost", [[], ["results.json"]])
def test_a_run_killed_behind_its_last_step_is_finished_by_resume(config, tmp_path, lost):
    results = adapt_xdbert.main(config())
    for name in lost:
        (tmp_path / "run" / name).unlink()
    again = adapt_xdbert.main(config(resume="true"))
    assert again | {"finished": 0} == results | {"finished": 0}


def test_what_is_cut_stands_in_the_results(config):
    results = adapt_xdbert.main(config(segments=1))
    assert results["clip_tokens_cut"] > 1000 and results["segments_used"] == 1 and results["tokens_dropped"] >= 0


def test_the_baseline_does_not_depend_on_clips_flags(config, tmp_path):
    one, two = (chain.text_alone_run(config(**flags), tmp_path) for flags in (
        {}, dict(cross_layers=3, segments=4, freeze="clip", cliptc_rate=0.5, objective="mlm")))
    assert one == two and one.no_clip and one.out_dir == str(tmp_path / "xdbert-mlm-noclip-s0")


def test_eval_only_prints_the_checkpoints_scores(config, tmp_path):
    results = adapt_xdbert.main(config())
    scores = adapt_xdbert.main(config(eval_only=True))
    assert scores == {name: results[name] for name in scores}


@pytest.mark.parametrize("language, total", [("bert-base", 202_059_009), ("electra-large", 442_671_617)])
def test_dry_run_prints_the_papers_totals(language, total, capsys):
    cfg = common.parse_cli(adapt_xdbert.Config, adapt_xdbert.PRESETS,
                           f"--preset paper --language {language} --clip random --dry_run".split())
    adapt_xdbert.main(cfg)
    assert f"{total:,}" in capsys.readouterr().out


def test_training_flags_choose_the_preset():
    def parse(text):
        return common.parse_cli(adapt_xdbert.Config, adapt_xdbert.PRESETS, text.split())
    assert parse("").block_size == 24
    base = parse("--train x.h5")
    assert (base.block_size, base.segments, base.lr, base.warmup_steps, base.epochs) == (512, 9, 1e-4, 0.05, 1.0)
    assert parse("--preset paper --train x.h5").schedule_steps == 32_000 and base.schedule_steps == 0
    assert parse("--preset demo --train x.h5").block_size == 24


def run_here(jobs, needs):
    """side_by_side in this process: the commands do what they say."""
    modules = {"adapt_xdbert.py": adapt_xdbert, "finetune.py": finetune}
    for argv in jobs.values():
        module = modules[Path(argv[1]).name]
        module.main(common.parse_cli(module.Config, module.PRESETS, argv[2:], module.NEEDS))


def test_demo_compares_seeds_of_text_alone_the_papers_three_and_itc(parts, demo, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chain, "side_by_side", run_here)
    monkeypatch.setattr(finetune, "own_settings", lambda cfg, *args, own=finetune.own_settings: (
        dataclasses.replace(own(cfg, *args)[0], max_steps=1, warmup_steps=0), own(cfg, *args)[1]))
    cfg = config(train="", data_dir=str(demo), table=True, out_dir=str(tmp_path / "out" / "own"), language=parts["language"])
    chain.adapt_xdbert(cfg)
    out = capsys.readouterr().out
    rows = ["as much text alone", "mlm+match+cliptc", "mlm+match+cliptc+itc"]
    for head, names in (("probe of held-out nouns, % +material", ["before", *rows, "chance"]),
                        ("held-out nouns, accuracy, % .*before/after +average", [*rows, "chance"])):
        lines = out[re.search(head, out).start():].splitlines()[2:2 + len(names)]
        assert [re.match(r"\S+( \S+)*", line)[0] for line in lines] == names
    table = json.loads((tmp_path / "out" / "own" / "table.json").read_text())
    assert [len(table["tasks"][row]["average"]) for row in rows] == [3, 3, 3]
    runs = sorted(path.parent.name for path in (tmp_path / "out").glob("*/results.json"))
    assert runs == sorted(name + seed for name in ("own", "xdbert-mlm+match+cliptc+itc-s0", "xdbert-mlm-noclip-s0")
                          for seed in ("", "-seed1", "-seed2"))
    for run in runs:
        settings = json.loads((tmp_path / "out" / run / "config.json").read_text())["config"]
        assert (settings["seed"], settings["block_size"], settings["language"]) == (
            int(run[-1]) if "seed" in run else 0, 24, parts["language"])
    material = [json.loads((tmp_path / "out" / f"own{seed}" / "results.json").read_text())["probes"]["material"]["linear"]
                for seed in ("", "-seed1", "-seed2")]
    assert table["probes"]["mlm+match+cliptc"]["material"] == [100 * x for x in material]


def test_own_objective_is_compared_with_text_alone(config, tmp_path, monkeypatch):
    asked, rows = [], []
    monkeypatch.setattr(chain, "side_by_side", lambda *given: asked.extend(given))
    monkeypatch.setattr(chain, "close_adaptation", lambda runs, path: rows.extend(runs))
    chain.adaptation_rows(config(objective="mlm+itc", cross_layers=0, max_minutes=3.0), init_ranks("cpu"))
    (jobs, needs), (*_, (last, adapt_first)) = asked, asked[1].items()
    assert rows == ["as much text alone", "mlm+itc"] and len(jobs) == 12 and len(needs) == 6
    adapt, tune = jobs[adapt_first[0]], jobs[last]
    assert {"--objective=mlm+itc", "--cross_layers=0", "--seed=2", "--resume=auto", "--preset=demo"} <= set(adapt)
    assert not [flag for flag in adapt if "minutes" in flag] and "--seeds=1" in tune and "--seed=0" not in tune


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, words", [
    (dict(objective="mlm+nst"), "some of mlm"), (dict(objective="mlm+mlm"), "--objective"),
    (dict(no_clip=True), "--no_clip .* needs"), (dict(freeze="video"), "--freeze video"),
    (dict(segments=0), "--segments"), (dict(mask_rate=15.0), "from 0 to 1"), (dict(dropout=1.0), "--dropout"),
    (dict(objective="mlm", no_clip=True, freeze="language"), "--freeze"),
    (dict(cross_layers=0), "--cross_layers 0: .* --objective mlm.itc"), (dict(freeze="auto,clip"), "--freeze auto,clip"),
    (dict(cross_layers=0, objective="mlm"), "--cross_layers 0"), (dict(cross_layers=-1), "--cross_layers"),
    (dict(cross_layers=0, objective="mlm+itc", freeze="none"), "--freeze none: without"),
    (dict(preset="paper", train=""), "--preset paper needs --train"), (dict(warmup_steps=1.5), "--warmup_steps"),
    (dict(max_steps=0), "--epochs"),
    (dict(eval_every=3, log_every=2, save_every=2), "--eval_every"), (dict(mask_split="1/2/3"), "--mask_split")])
def test_wrong_flags_get_one_line(config, flags, words):
    with pytest.raises((ValueError, SystemExit), match=words):
        config(**flags)


@pytest.mark.parametrize("flags, words", [
    (dict(block_size=40), "--block_size 40: .* has 32 positions"),
    (dict(language="nowhere"), "--language nowhere"), (dict(clip="nowhere"), "--clip nowhere"),
    (dict(language=""), "--language is missing"), (dict(clip=""), "--clip is missing"),
    (dict(train="nowhere.h5"), "nowhere.h5: no such file"),
    (dict(max_steps=0, epochs=1.0, schedule_steps=2), "--schedule_steps 2"), (dict(schedule_steps=2), "--schedule_steps 2"),
    (dict(batch_size=9, grad_accum=2), "--batch_size 9"), (dict(resume="true"), "no readable checkpoint")])
def test_bad_input_gets_one_line_before_training(config, tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words):
        adapt_xdbert.main(config(**flags))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_other_vocabularies_are_refused(parts, config, tmp_path):
    other = Vocab([*SPECIALS, *(f"w{i}" for i in range(20))])
    torch.manual_seed(0)
    save_bert(BERT(BERTConfig(other.size, layers=1, hidden=32, heads=2, intermediate=64)),
              tmp_path / "bert", other)
    with pytest.raises(SystemExit, match="another vocabulary"):
        adapt_xdbert.main(config(language=str(tmp_path / "bert")))
    save_clip(CLIPText(CLIPConfig(other.size, 1, 32, 2, 64, 24, 32)), tmp_path / "clip", other)
    with pytest.raises(SystemExit, match="another tokenizer"):
        adapt_xdbert.main(config(clip=str(tmp_path / "clip")))


def test_text_packed_for_one_model_alone_is_refused(demo, config):
    with pytest.raises(SystemExit, match="text, not xtext"):
        adapt_xdbert.main(config(train=str(demo / "demo-s0" / "corpus.h5")))


def test_a_model_of_other_words_needs_text_to_adapt_on(parts, demo, tmp_path):
    other = Vocab([*SPECIALS, "a"])
    torch.manual_seed(0)
    save_bert(BERT(BERTConfig(other.size, layers=1, hidden=32, heads=2, intermediate=64)),
              tmp_path / "bert", other)
    with pytest.raises(SystemExit, match="--train is missing: --language"):
        chain.adapt_xdbert(adapt_xdbert.Config(language=str(tmp_path / "bert"), data_dir=str(demo), device="cpu"))


def test_match_needs_two_texts(demo, config, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("the man dropped the vase on the floor .\n" * 4)
    vocab = open_vocab(demo / "demo-s0" / "corpus.h5")
    pack_xtext([text], vocab, vocab, tmp_path / "few.h5")
    with pytest.raises(SystemExit, match="MATCH needs another text"):
        adapt_xdbert.main(config(train=str(tmp_path / "few.h5")))
    assert not (tmp_path / "run").exists()
    adapt_xdbert.main(config(train=str(tmp_path / "few.h5"), objective="mlm+cliptc"))
