"""Proves the scripts whole: every objective, exact resume, clean interruption, one clear line for a mistake.

Run: python -m pytest -q tests/test_scripts.py
"""
import functools
import gc
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from conftest import QUICK_STUDENT, QUICK_TEACHER, stop_at, stop_line, widened
from safetensors.torch import load_file, save_file
from test_ddp import flat, log_lines

import adapt_xdbert
import ablate
import analyze
from analyses import closing
from analyses.papers import TABLES
from prepare import chain, commands
import bench
import common
import data
import distill
import features
import finetune
import teacher
from model import model_config
from parts import feed
from parts.machine import Ranks
from parts.vocab import load_vocab
from parts.weights import config_and_vocab, load_bert, load_mlm_head, save_bert
from prepare.packing import pack_text
from run import Interrupt, lr_at, run_script, set_seed, steps_of

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = [name for name in distill.ITEMS if name != "mlm"]
EVERY = "+".join(OBJECTIVES)
COMBINATIONS = ["none"] + ["+".join(chosen) for n in range(1, 6)
                           for chosen in itertools.combinations(OBJECTIVES, n)]
COMBINATIONS = [name if name.count("+") in (0, 4) or name == "nst+crd" else
                pytest.param(name, marks=pytest.mark.slow) for name in COMBINATIONS]


def saved(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def assert_same(one, two, leave_out=("config", "seconds")):
    """Two checkpoints, bit for bit."""
    a, b = (flat({k: v for k, v in state.items() if k not in leave_out}) for state in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
        assert same, key


def refused(match, run):
    with pytest.raises(SystemExit, match=match) as error:
        run()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("objective", COMBINATIONS)
def test_objective_takes_a_step_and_moves_every_parameter(distill_config, objective):
    cfg = distill_config(objective=objective, max_steps=1)
    distill.main(replace(cfg, teacher="") if objective == "none" else cfg)
    line = next(line for line in log_lines(Path(cfg.out_dir)) if "grad_norm" in line)
    gradients = next(line for line in log_lines(Path(cfg.out_dir)) if "gradient_mlm" in line)
    for term in {"mlm", *objective.split("+")} - {"none"}:
        assert line[term] > 0 and gradients["gradient_" + term] > 0
    optimizer = saved(cfg.out_dir)["optimizer"]
    assert len(optimizer["state"]) == sum(len(group["params"]) for group in optimizer["param_groups"])
    assert all(state["exp_avg_sq"].sum() > 0 for state in optimizer["state"].values())


@pytest.mark.parametrize("flags", [
    dict(head="none", objective="nst+crd"), dict(nst_kernel="poly", objective="nst"),
    dict(nst_kernel="linear", objective="nst"), dict(crd_level="sentence", objective="crd"),
    dict(crd_loss="infonce", objective="crd"), dict(crd_views="different", objective="nst+crd"),
    dict(crd_bank_dtype="bfloat16", crd_bank_size=10, objective="crd"),
    dict(dtype="bfloat16", objective=EVERY), dict(dtype="float16", objective="nst+crd", max_steps=12),
    dict(mask_split="100/0/0", objective="none"),
    dict(model="1L-48H-3A", objective=EVERY),
    dict(max_steps=0, epochs=0.001, objective="none")], ids=lambda flags: ",".join(map(str, flags)))
def test_option_takes_a_step(distill_config, flags):
    results = distill.main(distill_config(**(dict(max_steps=2) | flags)))
    assert results["steps"] >= 1 and 0 < results["mlm_loss"] < 20


# ---------------------------------------------------------------------------- compiled, recomputed, padded


def same_losses(one, two, rel):
    """Whether the logs of two run folders tell the same, but for speed and memory."""
    one, two = log_lines(Path(one)), log_lines(Path(two))
    assert [line["step"] for line in one] == [line["step"] for line in two] and len(one) > 3
    for a, b in zip(one, two):
        for key in a.keys() - {"tokens_per_s", "mfu", "memory_mb"}:
            assert b[key] == pytest.approx(a[key], rel=rel, abs=1e-5), (a["step"], key)


def compiles(stage, make, folder, monkeypatch, most, backend="eager", **flags):
    """Proves a run with --compile_model equal to one without, of at most so many graphs, none of them broken."""
    graphs, compile_module = [], torch.nn.Module.compile

    def count(graph, inputs):
        graphs.append([tuple(x.shape) for x in inputs if torch.is_tensor(x)])
        return torch._dynamo.lookup_backend(backend)(graph, inputs)
    flags = dict(dropout=0.0, max_steps=2, log_every=1, eval_every=2, save_every=2) | flags
    stage.main(make(**flags, out_dir=str(folder / "eager")))
    torch._dynamo.reset()
    # fullgraph: a break of the graph is an error, and so is the limit of recompilations
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=count, fullgraph=True))
    stage.main(make(**flags, compile_model=True, out_dir=str(folder / "compiled")))
    assert 1 < len(graphs) <= most, graphs
    same_losses(folder / "eager", folder / "compiled", 1e-3)


@pytest.mark.parametrize("flags", [dict(objective=EVERY, grad_every=2), pytest.param(
    dict(objective="nst+crd", grad_checkpoint=True, grad_every=2, grad_accum=2, max_steps=6, backend="aot_eager"),
    marks=pytest.mark.slow)])
def test_compiled_distillation_equals_the_eager_one(distill_config, tmp_path, monkeypatch, flags):
    """Teacher and student; the student with and without a graph for gradients, in batches of two sizes."""
    compiles(distill, distill_config, tmp_path, monkeypatch, 6, **flags)


@pytest.mark.parametrize("flags", [dict(), pytest.param(
    dict(objective="clip", val_clips=43, grad_checkpoint=True, max_steps=6, backend="aot_eager"), marks=pytest.mark.slow)])
def test_compiled_teacher_equals_the_eager_one(teacher_config, tmp_path, monkeypatch, flags):
    """Two encoders, clips of any length: once a size has changed, it is dynamic."""
    compiles(teacher, teacher_config, tmp_path, monkeypatch, 8, **flags)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("again", [False, True])
def test_run_that_pytorch_compiles_to_machine_code_equals_the_eager_one(distill_config, tmp_path, monkeypatch, again):
    compiles(distill, distill_config, tmp_path, monkeypatch, 6, "inductor", objective="nst+crd", grad_every=2,
             grad_checkpoint=again)


@pytest.mark.parametrize("stage, config, flags", [
    (teacher, "teacher_config", {}), (distill, "distill_config", dict(objective="nst+crd", grad_every=2)),
    (finetune, "finetune_config", dict(tasks="stsb", log_every=2))], ids=["teacher", "distill", "finetune"])
def test_recomputed_activations_change_no_bit_of_a_run(request, tmp_path, stage, config, flags):
    """With dropout; and such a run goes on with the flag or without."""
    make, weights = request.getfixturevalue(config), []
    for again in (False, True):
        folder = tmp_path / str(again)
        stage.main(make(**dict(max_steps=4, save_every=2) | flags, out_dir=str(folder), grad_checkpoint=again))
        weights.append(load_file(next(folder.rglob("model.safetensors"))))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    if stage is distill:
        assert_same(*(saved(tmp_path / name) for name in ("False", "True")))


def test_padded_masked_words_change_no_score(distill_config, tmp_path, monkeypatch):
    """In training and in the evaluation, as a GPU gets them."""
    flags, masked_words = dict(objective="none", teacher="", max_steps=4, eval_every=2, log_every=1), data.masked_words
    distill.main(distill_config(**flags, out_dir=str(tmp_path / "plain")))
    monkeypatch.setattr(data, "masked_words", lambda *args, pad: masked_words(*args, pad=True))
    with pytest.raises(TypeError):  # the evaluation does not ask for padding
        distill.main(distill_config(**flags, out_dir=str(tmp_path / "stopped")))
    monkeypatch.setattr(data, "masked_words", lambda *args, pad=False: masked_words(*args, pad=True))
    distill.main(distill_config(**flags, out_dir=str(tmp_path / "padded")))
    same_losses(tmp_path / "plain", tmp_path / "padded", 1e-5)


@pytest.mark.parametrize("stage, config, flags", [
    (teacher, "teacher_config", {}), (teacher, "teacher_config", dict(grad_checkpoint=True)),
    (distill, "distill_config", dict(objective=EVERY, crd_tokens=64))], ids=["teacher", "recomputed", "distill"])
def test_memory_that_is_said_is_what_a_run_takes(request, monkeypatch, capsys, stage, config, flags):
    """Frames, video encoder, teacher and KD included; the peak is of PyTorch's own allocations in this thread."""
    class Here(ThreadPoolExecutor):
        def submit(self, *work):
            (done := Future()).set_result(work[0](*work[1:]))
            return done
    monkeypatch.setattr(feed, "ThreadPoolExecutor", Here)
    cfg = request.getfixturevalue(config)(**flags, model="4L-128H", batch_size=64, max_steps=2)
    capsys.readouterr()  # a teacher was made
    gc.collect()  # what is freed meanwhile would count as less
    peak = bench.first_run(lambda: stage.main(cfg), torch.device("cpu"))[1]
    said = 1e3 * float(re.search(r"about ([\d.e-]+) GB for weights", capsys.readouterr().out)[1])
    assert 0.7 < said / peak < 1.4, (said, peak)


def test_nst_without_normalisation_is_called_out_in_the_log(distill_config, capsys):
    flags = dict(objective="nst", head="none", seed=1, block_size=64, max_steps=1)
    distill.main(distill_config(**flags))
    assert "raise it" not in capsys.readouterr().out
    distill.main(distill_config(**flags, nst_normalize=False))
    assert re.search(r"nst sends .* of the gradient that mlm does: at --w_nst 100 .* raise it",
                     capsys.readouterr().out)


@pytest.mark.parametrize("flags", [
    dict(objective="mlm"), dict(objective="ct", stop_on="recall"), dict(vision="image"),
    dict(negatives="all"), dict(negatives="one", ct_input="clean"), dict(feat_norm=True),
    dict(dtype="bfloat16"), dict(dtype="float16")],
    ids=lambda flags: ",".join(map(str, flags.values())))
def test_teacher_option_trains_both_encoders(teacher_config, tmp_path, flags):
    cfg = teacher_config(**flags, max_steps=2)
    results = teacher.main(cfg)
    after = saved(cfg.out_dir)
    optimizer = after["optimizer"]
    assert len(optimizer["state"]) == sum(len(group["params"]) for group in optimizer["param_groups"])
    assert all(state["exp_avg_sq"].sum() > 0 for state in optimizer["state"].values())
    assert any(k.startswith("video.") for k in after["model"]) == ("ct" in cfg.objective)
    assert (tmp_path / "run" / "model" / "vokens.safetensors").exists() == ("ct" in cfg.objective)
    load_bert(tmp_path / "run" / "model")
    assert results["loss"] > 0


def test_video_encoder_weights_move(teacher_run):
    """The released code left the video encoder out of the optimizer."""
    run = saved(teacher_run)
    cfg = teacher.Config(**run["config"])
    set_seed(cfg.seed, 0)
    clips = data.VideoClips(cfg.videos, cfg.block_size, cfg.max_frames, val_clips=cfg.val_clips)
    config = load_bert(teacher_run / "model").config
    fresh = teacher.Teacher(cfg, replace(config, dropout=cfg.dropout), clips.features).state_dict()
    assert fresh.keys() == run["model"].keys()
    assert torch.equal(fresh["mlm.norm.weight"], torch.ones(32))  # what never moved would be found
    assert not [k for k in fresh if k.startswith("video.") and torch.equal(fresh[k], run["model"][k])]


def test_teacher_stops_when_validation_no_longer_improves(teacher_config, capsys):
    cfg = teacher_config(lr=1e-9, eval_every=1, patience=2, max_steps=50, warmup_steps=50, stop_on="recall")
    results = teacher.main(cfg)
    assert results["steps"] == results["best_step"] + 2 < 50
    assert "no better for 2 of 2" in capsys.readouterr().out


def test_teacher_of_few_held_out_clips_stops_on_loss(teacher_config, capsys):
    """Of up to 10 clips recall@10 is always 100 %: the untrained model would be the best."""
    results = teacher.main(teacher_config(stop_on="auto", val_clips=6, eval_every=2, lr=1e-2))
    assert results["clips"] == 6 and results["best_step"] == 4 and results["t2v_r10"] == 1
    assert re.search(r"\nchance +16.7 +83.3 +100.0\n", capsys.readouterr().out)


def test_early_stop_continues_over_a_resume(teacher_config, tmp_path, monkeypatch):
    """Patience counted before the interruption counts after it."""
    flags = dict(lr=1e-9, eval_every=1, patience=3, max_steps=50, warmup_steps=50, stop_on="recall")
    whole, parts = (teacher_config(**flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    steps = teacher.main(whole)["steps"]
    with monkeypatch.context() as patch:
        stop_at(patch, steps - 1)
        with pytest.raises(SystemExit):
            teacher.main(parts)
    assert teacher.main(replace(parts, resume="true"))["steps"] == steps
    assert_same(saved(whole.out_dir), saved(parts.out_dir))


def test_two_stage_student_starts_from_the_other_models_weights(distill_config, teacher_run):
    cfg = distill_config(objective="none", init_from=str(teacher_run), lr=1e-9, max_steps=1)
    distill.main(cfg)
    bert = load_bert(teacher_run / "model")
    start = {f"bert.{k}": v for k, v in bert.state_dict().items()}
    start |= {f"mlm.{k}": v for k, v in load_mlm_head(teacher_run / "model", bert).state_dict().items()}
    student = saved(cfg.out_dir)["model"]
    assert start.keys() == student.keys()
    for key in start:
        torch.testing.assert_close(student[key], start[key], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------- resume


@pytest.mark.parametrize("flags", [
    dict(objective="none"), dict(objective="nst+crd"), dict(objective="nst+crd", grad_accum=2),
    dict(objective="crd", crd_level="sentence", crd_bank_size=30), dict(objective="crd", dtype="float16"),
    dict(objective=EVERY, crd_views="different")], ids=lambda flags: ",".join(map(str, flags.values())))
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(distill_config, tmp_path, monkeypatch, flags):
    flags |= dict(max_steps=6, save_every=2, eval_every=2, grad_every=2, log_every=2)
    whole, parts = (distill_config(**flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    distill.main(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # in the middle of a window of the log
        with pytest.raises(SystemExit) as stop:
            distill.main(parts)
    assert stop.value.code == 0 and saved(parts.out_dir)["step"] == 3
    distill.main(replace(parts, resume="true"))
    assert_same(saved(whole.out_dir), saved(parts.out_dir))
    one, two = (json.loads((Path(cfg.out_dir) / "results.json").read_text()) for cfg in (whole, parts))
    assert one["mlm_loss"] == two["mlm_loss"]
    if "dtype" in flags:
        assert saved(parts.out_dir)["scaler"]["scale"] > 1


def test_resumed_teacher_equals_uninterrupted_teacher_bit_for_bit(teacher_config, tmp_path, monkeypatch):
    flags = dict(max_steps=6, eval_every=2, save_every=2, grad_accum=2)
    whole, parts = (teacher_config(**flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    teacher.main(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(SystemExit):
            teacher.main(parts)
    teacher.main(replace(parts, resume="true"))
    assert_same(saved(whole.out_dir), saved(parts.out_dir))


def test_resume_from_a_damaged_checkpoint_goes_on_from_the_one_before(distill_config, tmp_path, capsys):
    flags = dict(objective="crd", max_steps=4, save_every=2, eval_every=2, grad_every=2)
    whole, parts = (distill_config(**flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    distill.main(whole)
    distill.main(parts)
    path = tmp_path / "parts" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with (tmp_path / "parts" / "log.jsonl").open("a") as f:
        f.write('{"step": 4, "ml')  # a kill in the middle of a line
    capsys.readouterr()
    distill.main(replace(parts, resume="true"))
    assert "is damaged" in capsys.readouterr().out
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert [line["step"] for line in log_lines(tmp_path / "parts")] == \
        [line["step"] for line in log_lines(tmp_path / "whole")]


def test_resume_with_another_dtype_or_fewer_steps_goes_on(distill_config):
    cfg = distill_config(objective="nst", max_steps=4)
    distill.main(cfg)
    distill.main(replace(cfg, resume="true", dtype="float16", max_steps=6))
    assert saved(cfg.out_dir)["step"] == 6
    distill.main(replace(cfg, resume="true", max_steps=5))  # already there: measured, and left
    assert saved(cfg.out_dir)["step"] == 6


def test_eval_only_measures_what_training_reported(distill_config, teacher_config, tmp_path):
    cfg = distill_config(objective="l2")
    results = distill.main(cfg)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = distill.main(replace(cfg, eval_only=True))
    assert all(results[k] == again[k] for k in ("mlm_loss", "mlm_accuracy"))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    cfg = teacher_config(out_dir=str(tmp_path / "teacher"))
    results = teacher.main(cfg)
    again = teacher.main(replace(cfg, eval_only=True))
    assert all(results[k] == again[k] for k in again)


def test_full_disk_is_one_line_and_the_run_goes_on_from_before(distill_config, tmp_path, monkeypatch):
    flags = dict(objective="crd", max_steps=6, save_every=2, eval_every=2, grad_every=2)
    whole, parts = (distill_config(**flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    distill.main(whole)
    save, calls = torch.save, itertools.count()

    def full(state, f):
        if next(calls) == 1:
            f.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, f)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        refused("No space left.*--resume from .*checkpoint.pt", lambda: distill.main(parts))
    assert saved(parts.out_dir)["step"] == 2
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"checkpoint.pt", "config.json", "log.jsonl",
                                                                "run.lock"}  # of this process, which lives
    distill.main(replace(parts, resume="true"))
    assert_same(saved(whole.out_dir), saved(parts.out_dir))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_elsewhere_and_full_memory_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill.py"])
    run = functools.partial(run_script, Config=distill.Config, presets=distill.PRESETS)
    refused("disk full .*--resume", lambda: run(lambda cfg: Path("/dev/full").write_text("x")))
    refused("--batch_size 96", lambda: run(lambda cfg: torch.empty(10 ** 15)))
    with monkeypatch.context() as patch:
        def lost(cfg):
            raise RuntimeError("[/pytorch/third_party/gloo/x.cc:9] Connection closed by peer [127.0.0.1]:4321")
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        patch.setattr(os, "_exit", sys.exit)
        refused("1", lambda: run(lost))
    assert capsys.readouterr().err.startswith("rank 1: another process of the group has ended")
    with pytest.raises(ValueError):  # what is no user's mistake keeps its traceback
        run(lambda cfg: int("x"))


def test_every_program_ends_in_one_short_line_whatever_it_is_given(monkeypatch, tmp_path):
    odd = "\x1b[2J" + "no\nsuch\tname " * 9000 + "end"
    ends = [functools.partial(commands.main, argv) for argv in (
        [odd], ["text", odd, "--vocab", "v", "--out", "o.h5"], ["vocab", odd, "--out", odd],
        ["videos", *(x for name in ("captions", "feat2d", "csv", "vocab", "out") for x in (f"--{name}", odd))],
        ["demo", "--out", odd], ["demo", "--seed", odd], ["demo", "--seed", str(10 ** 22)],
        ["vocab", __file__, "--size", str(10 ** 9), "--out", str(tmp_path / "v")],
        ["vocab", __file__, "--size=-5", "--out", str(tmp_path / "v")])]
    ends += [functools.partial(analyze.main, argv) for argv in (
        [odd], ["table", odd], ["curves", odd, "--out", str(tmp_path / "x.png")], ["curves", "--out", f"{odd}/x"])]
    ends += [functools.partial(features.main, argv) for argv in (
        [odd], ["captions", odd, "--out", odd, "--csv_out", odd], ["videos", odd, "--weights2d", odd, "--feat2d", odd],
        ["videos", str(tmp_path), "--weights2d", odd, "--feat2d", odd, "--shard", odd])]

    def script(main, module, argv):
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        run_script(main, module.Config, module.PRESETS)
    for main, module, flags in (
            (chain.teacher, teacher, ("videos", "objective", "model")), (chain.distill, distill, ("objective", "lr")),
            (chain.distill, distill, ("train",)), (chain.adapt_xdbert, adapt_xdbert, ("language", "freeze")),
            (chain.finetune, finetune, ("tasks", "score", "warmup_steps"))):
        for flag in flags:
            more = [f"--gold={odd}"] * (flag == "score") + ["--objective=none"] * (flag == "train")
            ends.append(functools.partial(script, main, module, [f"--{flag}", odd, *more]))
        ends.append(functools.partial(script, main, module, [odd]))
    for end in ends:
        assert len(line := stop_line(end)) <= 300 and line.isprintable()


# ---------------------------------------------------------------------------- the main job


def test_main_job_makes_what_it_lacks_and_reuses_what_it_has(tmp_path, monkeypatch, capsys):
    """World, teacher, text-only and distilled student from nothing; results do not tell what there was."""
    few_steps = {k: v for k, v in QUICK_TEACHER.items() if k not in ("device", "block_size")}
    monkeypatch.setattr(teacher, "Config", functools.partial(teacher.Config, **few_steps))
    cfg = distill.Config(**QUICK_STUDENT, objective="nst+crd", data_dir=str(tmp_path / "data"),
                         out_dir=str(tmp_path / "out" / "first"))
    first = chain.distill(cfg)
    out = capsys.readouterr().out
    assert "building the world" in out and "teacher: 7," in out and "student: none" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"first", "teacher-mlm+ct-s0", "distill-none-s0"}
    for text in ("teacher +text-only +nst.crd +chance\n", "masked words: accuracy", "after one ridge map",
                 "material of held-out nouns", "fills in", "retrieves"):
        assert re.search(text, out), text
    closing = json.loads((tmp_path / "out" / "first" / "table.json").read_text())
    assert closing["clips"] == 40 and set(closing["columns"]) == {"teacher", "text-only", "nst+crd"}
    own = closing["columns"]["nst+crd"]
    assert own["mlm_loss"] == first["mlm_loss"] and own["probes"] == first["probes"]
    assert first["probes"]["material"].keys() == {"linear", "linear_chance", "neighbours", "neighbours_chance"}
    assert own["retrieval"]["aligned"] and not closing["columns"]["text-only"]["retrieval"]["aligned"]

    chain.distill(replace(cfg, out_dir=str(tmp_path / "out" / "second")))
    out = capsys.readouterr().out
    for made in ("data/demo-s0", "out/teacher-mlm+ct-s0", "out/distill-none-s0"):
        assert f"reused {tmp_path}/{made}" in out
    assert_same(saved(tmp_path / "out" / "first"), saved(tmp_path / "out" / "second"))
    assert json.loads((tmp_path / "out" / "second" / "table.json").read_text()) == closing

    # another weight needs no other text-only student, another learning rate does
    chain.distill(replace(cfg, objective="nst", w_nst=1.0, out_dir=str(tmp_path / "out" / "third")))
    assert f"reused {tmp_path}/out/distill-none-s0" in capsys.readouterr().out
    chain.distill(replace(cfg, objective="nst", lr=1e-4, out_dir=str(tmp_path / "out" / "fourth")))
    assert f"reused {tmp_path}/out/distill-none-s0" not in capsys.readouterr().out
    assert (tmp_path / "out" / "distill-none-s0.1" / "results.json").exists()

    # any run can be measured again, beside any other
    analyze.main(["table", *(str(tmp_path / "out" / name) for name in ("distill-none-s0.1", "first", "third"))])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[-3:]] == ["distill-none-s0.1", "first", "third"]
    assert f"{100 * own['retrieval']['ridge']['10']:.1f}" in rows[-2]


def test_teacher_of_ones_own_videos_names_the_preset_meant_for_them(monkeypatch, capsys):
    monkeypatch.setattr(chain, "demo_world", lambda *args: Path("demo"))
    monkeypatch.setattr(teacher, "main", lambda cfg: cfg.videos)
    for preset, videos, said in (("demo", "mine.h5", True), ("base", "mine.h5", False), ("demo", "", False)):
        cfg = teacher.Config(**teacher.PRESETS[preset] | dict(preset=preset, videos=videos))
        assert chain.teacher(cfg) == (videos or "demo/videos.h5")
        out = capsys.readouterr().out
        assert ("24 tokens and 18 frames a clip; for real videos give --preset base" in out) == said == bool(out)


def test_demo_with_a_teacher_that_saw_no_video_prints_its_table(demo, teacher_config, tmp_path, capsys):
    teacher.main(teacher_config(objective="mlm", out_dir=str(tmp_path / "mlm")))
    results = chain.distill(distill.Config(**QUICK_STUDENT, objective="nst", teacher=str(tmp_path / "mlm"),
                                           data_dir=str(demo), out_dir=str(tmp_path / "run")))
    out = capsys.readouterr().out
    assert "material" in results["probes"] and "fills in" in out and "text-to-video" not in out
    videos = str(demo / "demo-s0" / "videos.h5")
    cfg = distill.Config(**QUICK_STUDENT, objective="nst", teacher=str(tmp_path / "mlm"), videos=videos,
                         data_dir=str(demo), out_dir=str(tmp_path / "other"))
    refused(f"--videos {videos}: nothing reads them, as --teacher .* has no video encoder", lambda: chain.distill(cfg))


@pytest.mark.parametrize("flags, says", [
    (dict(teacher="bert-base-uncased"), "--teacher bert-base-uncased: no model there.*"),
    (dict(init_from="nowhere"), "--init_from nowhere: no model there.*"),
    (dict(resume="true"), "no checkpoint in .*run: start the run without --resume.*"),
    (dict(eval_only=True), "no checkpoint in .*")])
def test_demo_makes_nothing_for_a_run_that_cannot_begin(demo, teacher_run, tmp_path, flags, says):
    cfg = distill.Config(**dict(QUICK_STUDENT, teacher=str(teacher_run)) | flags, objective="nst",
                         data_dir=str(demo), out_dir=str(tmp_path / "run"))
    refused(says, lambda: chain.distill(cfg))
    if flags.keys() <= {"resume", "eval_only"}:
        cfg = adapt_xdbert.Config(**flags, data_dir=str(demo), device="cpu", out_dir=str(tmp_path / "run"))
        refused(says, lambda: chain.adapt_xdbert(cfg))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- commands


def environment():
    """What a command needs to compute what this process does: its number of threads."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.slow
def test_sigterm_saves_and_torchrun_goes_on_with_resume(distill_config, tmp_path):
    """As commands: python distill.py, SIGTERM, torchrun distill.py --resume; it ends as a whole run does."""
    cfg = distill_config(objective="crd", max_steps=60, save_every=60, eval_every=60, grad_every=60,
                         log_every=2, out_dir=str(tmp_path / "parts"))
    flags = [str(ROOT / "distill.py"), *(f"--{k}={v}" for k, v in asdict(cfg).items() if k != "resume")]
    process = subprocess.Popen([sys.executable, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=environment())
    for line in process.stdout:
        if line.startswith("step      6  mlm"):
            process.send_signal(signal.SIGTERM)
            break
    out = process.stdout.read()
    assert process.wait() == 0 and "SIGTERM: saved step" in out, out
    assert 6 <= saved(tmp_path / "parts")["step"] < 60
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    done = subprocess.run([*torchrun, *flags, "--resume"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    distill.main(replace(cfg, out_dir=str(tmp_path / "whole")))
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


def test_help_and_mistake_as_commands():
    script = str(ROOT / "distill.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert all(f"--{name}" in done.stdout for name in asdict(distill.Config()))
    done = subprocess.run([sys.executable, script, "--objektive", "nst"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "unknown flag --objektive; did you mean --objective?\n"


def readme_commands():
    """The commands of README and docs that run a script: [script, flags]."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = re.sub(r"\\\n\s*", "", "\n".join(page.read_text() for page in pages))
    found = re.findall(r"^ +(?:python|torchrun)[^\n]*? (\w+\.py)((?: [^\n#<]*)?)", text, re.M)
    found += re.findall(r"^ +(?:python|torchrun) (\w+\.py)((?: [^\n#<]*)?)", text, re.M)
    return sorted({(script, flags.replace("...", "").strip()) for script, flags in found})


# what the papers print, by preset: VidLanKD 3.2, 3.3, 4.3, Eq. 3 and footnote 3; XDBERT Appendix B and C.1
TEACHER = dict(block_size=128, max_frames=512, val_clips=10_000, lr=2e-4, weight_decay=0.01, margin=1.0, w_mlm=1.0,
               w_ct=1.0, objective="mlm+ct", negatives="one", mask_rate=0.15, mask_split="100/0/0", stop_on="loss",
               video_layers=0, vokens=30_000, reduction="mean", vision="video")
STUDENT = dict(block_size=128, lr=2e-4, weight_decay=0.01, objective="nst+crd", head="mlp", mask_rate=0.15,
               mask_split="100/0/0", soft_tau=2.0, crd_views="same", nst_kernel="gaussian", batch_size=256,
               **{f"w_{name}": 1.0 for name in ("mlm", "soft", "l2", "voken", "nst", "crd")})
PAPERS = [
    (teacher, "paper", TEACHER | dict(model="12L-768H")), (teacher, "paper-6l", TEACHER | dict(model="6L-512H")),
    (distill, "paper", STUDENT | dict(model="12L-768H", max_steps=500_000, warmup_steps=5000)),
    (distill, "paper-6l", STUDENT | dict(model="6L-512H", max_steps=0, epochs=40.0, warmup_steps=10_000)),
    (adapt_xdbert, "paper", dict(block_size=512, segments=9, lr=1e-4, warmup_steps=0.05, epochs=1.0, max_steps=0,
                                 schedule_steps=32_000, objective="mlm+match+cliptc", mask_rate=0.15,
                                 cliptc_rate=0.15, mask_split="80/10/10", cross_layers=2, freeze="auto")),
    (finetune, "vidlankd", dict(epochs=3.0, batch_size=32, weight_decay=0.01, layer_decay=1.0)),
    (finetune, "xdbert-base", dict(epochs=3.0, batch_size=32, warmup_steps=0.1, layer_decay=0.9)),
    (finetune, "xdbert-large", dict(epochs=3.0, batch_size=32, warmup_steps=0.1, layer_decay=0.9))]


@pytest.mark.parametrize("module, preset, values", PAPERS, ids=lambda x: x if isinstance(x, str) else "")
def test_papers_presets_are_the_papers_recipes(module, preset, values):
    cfg = common.parse_cli(module.Config, module.PRESETS, [
        "--preset", preset, *["--train", "corpus.h5"] * (module is adapt_xdbert)])
    assert {name: getattr(cfg, name) for name in values} == values


def test_small_and_base_are_the_papers_shapes_with_measured_weights():
    for module in (teacher, distill):
        for preset, paper in (("small", "paper-6l"), ("base", "paper")):
            ours, theirs = (asdict(common.parse_cli(module.Config, module.PRESETS, ["--preset", name]))
                            for name in (preset, paper))
            differ = {name for name in ours if ours[name] != theirs[name]}
            assert differ == {"preset", "mask_split"} | (
                {"negatives", "stop_on"} if module is teacher else {"w_nst"})


@pytest.mark.parametrize("script, flags", readme_commands())
def test_readme_command_is_understood(monkeypatch, script, flags):
    """Every flag exists and takes the value that it is given there; nothing is run."""
    flags = shlex.split(flags)
    scripts = {"distill.py": distill, "teacher.py": teacher, "finetune.py": finetune, "bench.py": bench,
               "adapt_xdbert.py": adapt_xdbert}
    if module := scripts.get(script):
        assert common.parse_cli(module.Config, module.PRESETS, flags, getattr(module, "NEEDS", {}))
        return
    if script == "analyze.py":
        assert analyze.parse(flags)
        return
    if script == "ablate.py":
        args = ablate.parse(flags)
        assert ablate.configs(args, TABLES[args.table] if args.table else ablate.grid_of(args.vary))
        return
    called = []
    if script == "features.py":
        for command in (features.captions, features.videos):
            monkeypatch.setattr(features, command.__name__, functools.wraps(command)(lambda **flags: called.append(flags)))
        features.main(flags)
        assert called
        return
    assert script == "data.py"
    for name in ("make_demo", "train_vocab", "pack_text", "pack_xtext", "pack_videos"):
        monkeypatch.setattr(commands, name, lambda *args, name=name: called.append(name))
    commands.main(flags)
    assert called


def test_readme_names_every_script():
    scripts = {script for script, _ in readme_commands()}
    assert scripts >= {"data.py", "features.py", "ablate.py", "teacher.py", "distill.py", "adapt_xdbert.py", "finetune.py",
                       "analyze.py"}


# ---------------------------------------------------------------------------- mistakes


NUMBERS = [(module, f.name, f.type) for module in (teacher, distill, adapt_xdbert, finetune, bench)
           for f in fields(module.Config) if f.type in (int, float)]


@pytest.mark.parametrize("module, name, kind", NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_number_of_absurd_size_is_one_line(module, name, kind):
    for value in ("1" + "0" * 22, "-1" + "0" * 22, "9" * 5000, *["1e22", "-1e22", "1e400", "1e-400x"] * (kind is float)):
        says = stop_line(common.parse_cli, module.Config, module.PRESETS, [f"--{name}={value}"])
        assert says.startswith(f"--{name} ")


@pytest.mark.parametrize("ranks, accum, sizes", [(1, 1, {13, 14}), (1, 4, {4}), (2, 2, {4})])
def test_teacher_evaluates_in_parts_as_large_as_it_trains_on(teacher_config, monkeypatch, ranks, accum, sizes):
    """Each with a negative, and of several ranks only its own; the scores of retrieval do not hang on it."""
    cfg, seen = teacher_config(batch_size=16, grad_accum=accum), []
    clips = data.VideoClips(cfg.videos, cfg.block_size, cfg.max_frames, part="val", val_clips=40)
    torch.manual_seed(0)
    model = teacher.Teacher(cfg, model_config(cfg.model, clips.vocab.size), clips.features)
    make = teacher.make_batch
    monkeypatch.setattr(teacher, "make_batch", lambda *args: seen.append(len(args[2])) or make(*args))
    whole = teacher.evaluate(model, clips, replace(cfg, grad_accum=1), Ranks(0, 1, torch.device("cpu")))
    seen.clear()
    part = Ranks(1, ranks, torch.device("cpu")) if ranks > 1 else Ranks(0, 1, torch.device("cpu"))
    monkeypatch.setattr(Ranks, "sum", lambda self, x: x)
    scores = teacher.evaluate(model, clips, cfg, part)
    assert set(seen) == sizes and sum(seen) == 40 // ranks
    if ranks == 1:
        assert all(scores[name] == pytest.approx(whole[name]) for name in whole if "_r" in name)


def test_recomputed_activations_on_an_apple_gpu_are_refused():
    line = stop_line(common.parse_cli, distill.Config, distill.PRESETS, ["--device", "mps", "--grad_checkpoint"])
    assert line == "--grad_checkpoint: not with --device mps; raise --grad_accum instead"


def test_numbers_that_would_take_all_memory_or_run_over_are_one_line():
    for module in (teacher, distill, adapt_xdbert, finetune):
        for name, (least, most) in common.LIMITS.items():
            for value in (least - 1, most + 1) if hasattr(module.Config, name) else ():
                says = stop_line(common.parse_cli, module.Config, module.PRESETS, [f"--{name}={value:.0f}"])
                assert f"--{name} " in says
        for name in ("max_steps", "max_minutes", "warmup_steps", "epochs", "weight_decay", "grad_clip"):
            assert f"--{name} " in stop_line(common.parse_cli, module.Config, module.PRESETS, [f"--{name}=-1"])
        # what is the largest that may be given stays within numbers, clock and text
        cfg = common.parse_cli(module.Config, module.PRESETS, ["--max_steps=0", f"--epochs={10 ** 15}",
                                                               f"--max_minutes={10 ** 15}", f"--seed={-10 ** 15}"])
        steps, _ = steps_of(cfg, 10 ** 12)
        assert Interrupt(cfg.max_minutes).deadline > 1e15 and common.duration(1e3 * steps) and lr_at(3, cfg.lr, 9, steps) >= 0
        set_seed(cfg.seed, 0)


IGNORED = [(teacher, "--objective mlm --w_ct 2"), (teacher, "--objective clip --mask_rate 0.2"),
           (teacher, "--margin 2"), (teacher, "--negatives one --temperature 2"), (teacher, "--epochs 3"),
           (distill, "--objective nst --w_crd 2"), (distill, "--objective crd --nst_kernel poly"),
           (distill, "--objective none --head none"), (distill, "--crd_momentum 0.9"), (distill, "--epochs 2"),
           (distill, "--objective nst --soft_tau 3"), (adapt_xdbert, "--objective mlm --no_clip --clip x"),
           (adapt_xdbert, "--objective mlm --cliptc_rate 0.2"), (finetune, "--model x --like y"),
           (finetune, "--cross x --like y"), (finetune, "--max_steps 9 --epochs 2"),
           (distill, "--objective nst --crd_tokens 500"), (distill, "--crd_level sentence --crd_tokens 500"),
           (distill, "--train x --data_dir y"), (teacher, "--videos x --data_dir y"),
           (finetune, "--model x --predict --tasks rte"), (finetune, "--score x --gold y --model z"),
           (finetune, "--score x --gold y --seeds 2")]


@pytest.mark.parametrize("module, flags", IGNORED, ids=lambda x: getattr(x, "__name__", x))
def test_flag_that_would_be_ignored_is_refused(module, flags):
    assert " is not read with --" in stop_line(common.parse_cli, module.Config, module.PRESETS, flags.split(),
                                               module.NEEDS)


def test_needs_name_flags_and_values_that_exist():
    for module in (teacher, distill, adapt_xdbert, finetune):
        for name, (other, values) in module.NEEDS.items():
            assert hasattr(module.Config, name)
            for value in values:
                flags = [f"--{other}={value}", *["--no_clip", "--objective=mlm"] * (value == "True")]
                assert common.parse_cli(module.Config, module.PRESETS, flags)


@pytest.mark.parametrize("flags, match", [
    (dict(objective="nst+nst"), "--objective"), (dict(objective="kd"), "--objective kd"),
    (dict(head="big"), "--head big"), (dict(warmup_steps=100), "--warmup_steps 100"),
    (dict(log_every=3), "multiple of --log_every"), (dict(crd_tokens=2, objective="crd"), "--crd_tokens 2"),
    (dict(mask_split="80/10"), "mask_split"), (dict(max_steps=0), "--epochs"),
    (dict(log_every=0), "--log_every 0"), (dict(batch_size=0), "--batch_size 0"), (dict(model="big"), "model big"),
    (dict(block_size=513), "--block_size 513: at most the model's 512 positions"),
    (dict(grad_accum=0), "--grad_accum 0"), (dict(lr=-1.0), "--lr -1"),
    (dict(mask_rate=0.0), "--mask_rate 0"), (dict(crd_tau=0.0), "--crd_tau 0"),
    (dict(grad_clip=-1.0), "--grad_clip -1"), (dict(weight_decay=-1.0), "--weight_decay"), (dict(beta2=1.0), "--beta2 1"),
    (dict(objective="crd", batch_size=1), "--batch_size"),
    (dict(objective="crd", crd_bank_size=1), "--crd_bank_size")])
def test_wrong_flag_is_refused_before_anything_runs(distill_config, flags, match):
    with pytest.raises((ValueError, SystemExit), match=match):
        distill_config(**flags)


@pytest.mark.parametrize("flags, match", [
    (dict(objective="nst"), "--objective nst"), (dict(negatives="some"), "--negatives some"),
    (dict(objective="mlm", stop_on="recall"), "--stop_on"), (dict(eval_every=0), "--eval_every 0"),
    (dict(save_every=3, log_every=2, eval_every=2), "--save_every 3"), (dict(val_clips=0), "--val_clips 0"),
    (dict(max_steps=-1), "--max_steps -1"), (dict(patience=0), "--patience 0")])
def test_wrong_teacher_flag_is_refused_before_anything_runs(teacher_config, flags, match):
    with pytest.raises(ValueError, match=match):
        teacher_config(**flags)


def test_wrong_models_and_files_are_refused(distill_config, teacher_run, tmp_path):
    refused("batch_size 8 .* try 9", lambda: distill.main(distill_config(grad_accum=3)))
    refused("--teacher .*nowhere", lambda: distill.main(distill_config(teacher=str(tmp_path / "nowhere"))))
    refused("needs a teacher", lambda: chain.distill(distill_config(teacher="")))
    refused("missing.h5", lambda: distill.main(distill_config(train=str(tmp_path / "missing.h5"))))
    refused("missing.h5", lambda: chain.distill(distill_config(videos=str(tmp_path / "missing.h5"))))
    refused("--head none", lambda: distill.main(distill_config(objective="l2", head="none", model="1L-64H")))
    refused("no readable checkpoint", lambda: distill.main(distill_config(resume="true")))
    wider = distill_config(init_from=str(teacher_run), model="1L-64H")
    refused("--init_from .*shape", lambda: distill.main(wider))
    assert not (tmp_path / "run").exists()
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 400)
    pack_text([tmp_path / "text.txt"], vocab, tmp_path / "other.h5")
    refused("text.txt: not a packed file", lambda: distill.main(distill_config(train=str(tmp_path / "text.txt"))))
    other = distill_config(train=str(tmp_path / "other.h5"))
    refused("--teacher .*another vocabulary.*data.py xtext", lambda: distill.main(other))
    other = replace(other, objective="none", teacher="", init_from=str(teacher_run))
    refused("--init_from .*another vocabulary", lambda: distill.main(other))


def test_clips_of_other_features_are_refused_before_training(distill_config, teacher_config, tmp_path):
    """A teacher that saw 2D alone cannot be asked for clips of 2D + 3D, and not after hours of training."""
    teacher.main(teacher_config(vision="image", max_steps=1))
    settings = tmp_path / "run" / "model" / "clips.json"
    settings.write_text(settings.read_text().replace("image", "video"))
    cfg = distill_config(teacher=str(tmp_path / "run"), videos=teacher_config().videos,
                         out_dir=str(tmp_path / "student"))
    refused("--videos .*128 channels", lambda: chain.distill(cfg))
    assert not (tmp_path / "student").exists()


def test_resume_refuses_another_corpus_model_or_batch(distill_config, demo, tmp_path):
    cfg = distill_config(objective="none", teacher="", max_steps=1)
    distill.main(cfg)
    for name, value in (("batch_size", 4), ("model", "1L-64H"), ("seed", 1), ("weight_decay", 0.5)):
        changed = replace(cfg, resume="true", **{name: value})
        refused(f"--resume: --{name} was", lambda: distill.main(changed))
    raw = demo / "demo-s0" / "raw"
    pack_text([raw / "text" / "part0.txt"], raw / "vocab.txt", tmp_path / "half.h5")
    other = replace(cfg, resume="true", train=str(tmp_path / "half.h5"))
    refused("corpus is not what", lambda: distill.main(other))
    moved = replace(cfg, resume="true", train=str(demo / "demo-s0" / "corp*.h5"))  # the same text
    assert distill.main(moved)["steps"] == 1


def test_nan_in_the_last_update_is_not_saved_as_a_result(distill_config, monkeypatch):
    """The losses are still finite then; the weights are not."""
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def poisoned(parameters, *args):
        parameters = list(parameters)
        if next(calls) == 4:
            parameters[0].grad[0] = float("nan")
        return clip(parameters, *args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    cfg = distill_config(objective="none", save_every=2, eval_every=2)
    refused("weight .* is not finite after step 4; the last good checkpoint", lambda: distill.main(cfg))
    assert saved(cfg.out_dir)["step"] == 2 and not (Path(cfg.out_dir) / "results.json").exists()


def test_killed_prerequisite_goes_on_with_the_same_command(distill_config, monkeypatch, capsys):
    cfg = distill_config(objective="none", save_every=2, eval_every=2, resume="auto")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(SystemExit):
            distill.main(cfg)
    assert "go on with the same command" in capsys.readouterr().out
    distill.main(cfg)
    assert not Path(cfg.out_dir + ".1").exists()  # it went on, nothing was moved aside
    distill.main(replace(cfg, out_dir=cfg.out_dir + "-whole"))
    assert_same(saved(cfg.out_dir), saved(cfg.out_dir + "-whole"))


def test_teacher_whose_best_weights_are_damaged_does_not_take_older_ones(teacher_config, monkeypatch):
    """They are read again at the end, and by a run that was killed there."""
    cfg, scores = teacher_config(eval_every=2, save_every=2), itertools.count()
    monkeypatch.setattr(teacher, "evaluate", lambda *args: {"loss": -next(scores)})  # each is the best
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "save", lambda *args: sys.exit("killed"))
        refused("killed", lambda: teacher.main(cfg))
    path = Path(cfg.out_dir) / "best.pt"
    path.write_bytes(path.read_bytes()[:-1])
    refused("best.pt: the best weights, of step 4, cannot be read; start anew",
            lambda: teacher.main(replace(cfg, resume="auto")))


def test_teacher_without_heads_refuses_what_needs_them(distill_config, teacher_run, tmp_path):
    vocab = load_vocab(teacher_run / "model")
    save_bert(load_bert(teacher_run / "model"), tmp_path / "bare", vocab)
    bare = functools.partial(distill_config, teacher=str(tmp_path / "bare"), max_steps=1)
    refused("no masked-word head", lambda: distill.main(bare(objective="soft")))
    refused("no video encoder", lambda: distill.main(bare(objective="voken")))
    distill.main(bare(objective="nst+crd"))


@pytest.mark.parametrize("objective", ["soft", "nst+crd", "none"])
def test_models_with_more_rows_than_words_distil_and_start_a_student(distill_config, teacher_run, tmp_path,
                                                                     objective):
    """The student has the size of the teacher's table, else of the one that it starts from."""
    model, small = teacher_run / "model", load_vocab(teacher_run / "model")
    wide = widened(model, tmp_path / "wide")
    begins = (model, widened(model, tmp_path / "wider", 9)) if objective == "soft" else (wide,)
    for begin in begins:
        cfg = distill_config(objective=objective, teacher="" if objective == "none" else str(wide), max_steps=1,
                             init_from=str(begin), lr=1e-9, out_dir=str(tmp_path / begin.name / "run"))
        distill.main(cfg)
        config, vocab = config_and_vocab(Path(cfg.out_dir) / "model")
        assert config.vocab_size == vocab.size == small.size + 6 and vocab.hash == small.hash
        table = load_bert(Path(cfg.out_dir) / "model").embeddings.word.weight[:small.size]
        torch.testing.assert_close(table, load_bert(model).embeddings.word.weight, rtol=0, atol=1e-6)
    if objective == "soft":
        device = torch.device("cpu")
        results = closing.measure_teacher(closing.open_judge(cfg.out_dir, device), device)
        assert results["mlm_loss"] > 0


def test_fewer_rows_than_words_are_one_line_before_any_work(distill_config, teacher_run, tmp_path):
    shutil.copytree(teacher_run / "model", tmp_path / "model")
    path = tmp_path / "model" / "vocab.txt"
    n = len(path.read_text().splitlines())
    path.write_text(path.read_text() + "\n")  # a blank line
    for flags in (dict(teacher=str(tmp_path / "model")),
                  dict(objective="none", teacher="", init_from=str(tmp_path / "model"))):
        refused(f"{n + 1:,} tokens in its vocabulary, {n:,} in its config.json",
                lambda: distill.main(distill_config(**flags)))
    assert not (tmp_path / "run").exists()


def test_teachers_head_counts_only_where_words_are_compared(distill_config, teacher_run, tmp_path):
    shutil.copytree(teacher_run / "model", tmp_path / "untied")
    path = tmp_path / "untied" / "model.safetensors"
    tensors = load_file(path)
    table = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"cls.predictions.decoder.weight": table + 1}, path)
    flags = dict(teacher=str(tmp_path / "untied"), max_steps=1)
    refused("only a tied decoder can be read", lambda: distill.main(distill_config(objective="soft", **flags)))
    cfg = distill_config(objective="nst+crd", **flags)
    distill.main(cfg)
    assert closing.open_judge(cfg.out_dir, torch.device("cpu")).mlm is None


def test_student_that_starts_from_a_model_without_head_says_so(distill_config, teacher_run, tmp_path, capsys):
    save_bert(load_bert(teacher_run / "model"), tmp_path / "bare", load_vocab(teacher_run / "model"))
    distill.main(distill_config(objective="none", init_from=str(tmp_path / "bare"), max_steps=1))
    assert "bare: has no masked-word head; the student's begins with random weights" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-small-discriminator"])
def test_name_of_the_hub_is_one_line_that_says_how_to_fetch(distill_config, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(f"--teacher {name}: no model there; nothing is fetched .*huggingface-cli download {name} "
            f"--local-dir {name.split('/')[-1]}`", lambda: distill.main(distill_config(teacher=name)))
    Path("here").mkdir()
    refused("--teacher here: no model there; give the folder", lambda: distill.main(distill_config(teacher="here")))


def test_nan_loss_stops_with_step_and_term(distill_config):
    cfg = distill_config(lr=1e30, grad_clip=0.0, objective="nst", max_steps=20, save_every=20, eval_every=20,
                         grad_every=20)
    refused(r"the \w+ loss is (nan|inf) at step \d+; .*--lr", lambda: distill.main(cfg))
    assert not (Path(cfg.out_dir) / "model").exists()


def test_nan_names_its_own_term_and_the_checkpoint_before(distill_config, monkeypatch):
    crd, calls = distill.losses.crd, itertools.count()
    factor = (float("nan") if call == 5 else 1.0 for call in calls)  # call 0 measures gradients, 5 is step 4
    monkeypatch.setattr(distill.losses, "crd", lambda *args: crd(*args) * next(factor))
    cfg = distill_config(objective="nst+crd", max_steps=8, log_every=4, save_every=4, eval_every=4,
                         grad_every=8)
    refused(r"the crd loss is nan at step 4; .*checkpoint.pt; .*--resume", lambda: distill.main(cfg))
    assert saved(cfg.out_dir)["step"] == 4


def test_too_small_a_batch_for_negatives_is_refused(teacher_config, tmp_path):
    refused("no negatives", lambda: teacher.main(teacher_config(batch_size=2, grad_accum=2)))
    assert not (tmp_path / "run").exists()
