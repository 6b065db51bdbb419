"""Proves the scripts whole: every objective, exact resume, clean interruption, and one clear line for a user's mistake.

Run: python -m pytest -q tests/test_scripts.py
"""
import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import distill
import teacher
from model import BERT
from test_ddp import flat

ROOT = Path(__file__).resolve().parent.parent
COMBINATIONS = ["none"] + ["+".join(c) for n in range(1, 6) for c in itertools.combinations(distill.OBJECTIVES, n)]


def saved(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def assert_same(one, two):
    """Two checkpoints, bit for bit."""
    a, b = flat({k: v for k, v in one.items() if k != "config"}), flat({k: v for k, v in two.items() if k != "config"})
    assert a.keys() == b.keys()
    for key in a:
        same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
        assert same, key


def stop_at(monkeypatch, step):
    """The run behaves as if SIGTERM had come just before `step`."""
    asked = itertools.count()
    monkeypatch.setattr(common.Interrupt, "due", lambda self, world: next(asked) == step)
    monkeypatch.setattr(common.Interrupt, "reason", "SIGTERM", raising=False)


# ---------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("objective", COMBINATIONS)
def test_objective_takes_a_step_and_moves_every_parameter(distill_config, objective):
    cfg = distill_config(objective=objective, max_steps=1, teacher="" if objective == "none" else distill_config().teacher)
    distill.main(cfg)
    run = saved(cfg.out_dir)
    terms = ["mlm"] + [n for n in distill.OBJECTIVES if n in objective.split("+")]
    line = [json.loads(x) for x in (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines() if "grad_norm" in x][0]
    assert all(line[term] > 0 for term in terms)
    moved = run["optimizer"]["state"]
    count = sum(len(g["params"]) for g in run["optimizer"]["param_groups"])
    assert len(moved) == count and all(s["exp_avg_sq"].sum() > 0 for s in moved.values())


@pytest.mark.parametrize("flags", [
    dict(head="none", objective="nst+crd"), dict(nst_kernel="poly", objective="nst"), dict(nst_kernel="linear", objective="nst"),
    dict(crd_level="sentence", objective="crd"), dict(crd_loss="infonce", objective="crd"),
    dict(crd_views="different", objective="nst+crd"), dict(crd_bank_dtype="bfloat16", crd_bank_size=10, objective="crd"),
    dict(dtype="bfloat16", objective="soft+l2+voken+nst+crd"), dict(mask_split="100/0/0", objective="none"),
    dict(hidden=48, heads=3, intermediate=96, objective="soft+l2+voken+nst+crd"), dict(max_steps=0, epochs=0.001, objective="none")])
def test_option_takes_a_step(distill_config, flags):
    cfg = distill_config(**(dict(max_steps=2) | flags))
    results = distill.main(cfg)
    assert results["steps"] >= 1 and 0 < results["mlm_loss"] < 20


@pytest.mark.parametrize("flags", [dict(objective="mlm"), dict(objective="ct", stop_on="recall"), dict(vision="image"),
                                   dict(negatives="one", ct_input="clean"), dict(negatives="infonce"), dict(feat_norm=True)])
def test_teacher_option_trains_both_encoders(demo, tmp_path, flags):
    cfg = dict(videos=str(demo / "demo-s0" / "videos.h5"), device="cpu", layers=1, hidden=32, heads=2, intermediate=64, batch_size=8,
               max_steps=2, warmup_steps=1, log_every=1, eval_every=2, save_every=2, val_clips=40, stop_on="loss", vokens=9)
    cfg = teacher.Config(**(cfg | flags), out_dir=str(tmp_path / "run"))
    results = teacher.main(cfg)
    common.set_seed(cfg.seed, 0)
    after = saved(cfg.out_dir)
    optimizer = after["optimizer"]
    assert all(s["exp_avg_sq"].sum() > 0 for s in optimizer["state"].values())  # the video encoder's weights among them
    assert len(optimizer["state"]) == sum(len(g["params"]) for g in optimizer["param_groups"])
    assert any(k.startswith("video.") for k in after["model"]) == ("ct" in cfg.objective)
    assert (tmp_path / "run" / "model" / "vokens.safetensors").exists() == ("ct" in cfg.objective)
    BERT.from_pretrained(tmp_path / "run" / "model")
    assert results["loss"] > 0


def test_video_encoder_weights_move(demo, teacher_run):
    """The released code left the video encoder out of the optimizer."""
    run = saved(teacher_run)
    cfg = teacher.Config(**run["config"])
    common.set_seed(cfg.seed, 0)
    clips = teacher.data.VideoClips(cfg.videos, cfg.block_size, cfg.max_frames, cfg.vision, "train", cfg.val_clips, cfg.feat_norm)
    fresh = teacher.Teacher(cfg, teacher.model_config(cfg.model, clips.vocab.size, cfg.layers, cfg.hidden, cfg.heads, cfg.intermediate,
                                                      cfg.dropout), clips.features).state_dict()
    assert fresh.keys() == run["model"].keys()
    still = [k for k in fresh if k.startswith("video.") and torch.equal(fresh[k], run["model"][k])]
    assert not still


# ---------------------------------------------------------------------------- resume


@pytest.mark.parametrize("flags", [dict(objective="none"), dict(objective="nst+crd"), dict(objective="nst+crd", grad_accum=2),
                                   dict(objective="crd", crd_level="sentence", crd_bank_size=30)])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(distill_config, tmp_path, monkeypatch, flags):
    whole, parts = (distill_config(**flags, max_steps=6, save_every=2, eval_every=2, grad_every=2, log_every=2, out_dir=str(tmp_path / name))
                    for name in ("whole", "parts"))
    distill.main(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # in the middle of a window of the log
        with pytest.raises(SystemExit) as stop:
            distill.main(parts)
    assert stop.value.code == 0 and saved(parts.out_dir)["step"] == 3
    distill.main(dataclasses.replace(parts, resume=True))
    assert_same(saved(whole.out_dir), saved(parts.out_dir))
    one, two = (json.loads((Path(c.out_dir) / "results.json").read_text()) for c in (whole, parts))
    assert one["mlm_loss"] == two["mlm_loss"]


def test_resumed_teacher_equals_uninterrupted_teacher_bit_for_bit(demo, tmp_path, monkeypatch):
    flags = dict(videos=str(demo / "demo-s0" / "videos.h5"), device="cpu", layers=1, hidden=32, heads=2, intermediate=64, batch_size=8,
                 max_steps=6, warmup_steps=1, log_every=1, eval_every=2, save_every=2, val_clips=40, stop_on="loss", vokens=9, grad_accum=2)
    whole, parts = (teacher.Config(**flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    teacher.main(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(SystemExit):
            teacher.main(parts)
    teacher.main(dataclasses.replace(parts, resume=True))
    assert_same(saved(whole.out_dir), saved(parts.out_dir))


def test_sigterm_saves_and_resume_goes_on(distill_config, tmp_path):
    """As commands: python distill.py, SIGTERM, --resume; the end is that of an uninterrupted run."""
    cfg = distill_config(objective="crd", max_steps=60, save_every=60, eval_every=60, grad_every=60, log_every=2)
    flags = [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items() if k != "out_dir"]

    def start(name, *more):
        return subprocess.Popen([sys.executable, str(ROOT / "distill.py"), *flags, f"--out_dir={tmp_path / name}", *more],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    whole, process = start("whole"), start("parts")
    for line in process.stdout:
        if line.startswith("step      6  mlm"):
            process.send_signal(signal.SIGTERM)
            break
    out = process.stdout.read()
    assert process.wait() == 0 and "SIGTERM: saved step" in out, out
    step = saved(tmp_path / "parts")["step"]
    assert 6 <= step < 60
    resumed = start("parts", "--resume=true") if "--resume=False" not in flags else None
    if resumed is None:
        flags.remove("--resume=False")
        resumed = start("parts", "--resume")
    out = resumed.communicate()[0]
    assert resumed.returncode == 0, out
    assert whole.wait() == 0, whole.stdout.read()
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


# ---------------------------------------------------------------------------- mistakes


def refused(match, run):
    with pytest.raises(SystemExit, match=match) as error:
        run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, match", [
    (dict(objective="nst+nst"), "--objective"), (dict(objective="kd"), "--objective kd"), (dict(head="big"), "--head big"),
    (dict(warmup_steps=100), "--warmup_steps 100"), (dict(log_every=3), "multiple of --log_every"),
    (dict(crd_tokens=2, objective="crd"), "--crd_tokens 2"), (dict(mask_split="80/10"), "mask_split"), (dict(max_steps=0), "--epochs")])
def test_wrong_flag_is_refused_before_anything_runs(distill_config, flags, match):
    with pytest.raises((ValueError, SystemExit), match=match):
        distill_config(**flags)


def test_wrong_models_and_files_are_refused(distill_config, demo, tmp_path):
    refused("batch_size 8 .* try 9", lambda: distill.main(distill_config(grad_accum=3)))
    refused("--teacher .*nowhere", lambda: distill.main(distill_config(teacher=str(tmp_path / "nowhere"))))
    refused("needs a teacher", lambda: distill.main(distill_config(teacher="")))
    refused("missing.h5", lambda: distill.main(distill_config(train=str(tmp_path / "missing.h5"))))
    refused("--head none", lambda: distill.main(distill_config(objective="l2", head="none", hidden=64)))
    refused("no readable checkpoint", lambda: distill.main(distill_config(resume=True)))
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 400)
    import data
    data.pack_text([tmp_path / "text.txt"], vocab, tmp_path / "other.h5")
    refused("another vocabulary", lambda: distill.main(distill_config(train=str(tmp_path / "other.h5"))))


def test_teacher_without_heads_refuses_what_needs_them(distill_config, teacher_run, tmp_path):
    import data
    vocab = data.load_vocab(teacher_run / "model")
    BERT.from_pretrained(teacher_run / "model").save_pretrained(tmp_path / "bare", vocab)
    refused("no masked-word head", lambda: distill.main(distill_config(objective="soft", teacher=str(tmp_path / "bare"))))
    refused("no video encoder", lambda: distill.main(distill_config(objective="voken", teacher=str(tmp_path / "bare"))))
    distill.main(distill_config(objective="nst+crd", teacher=str(tmp_path / "bare"), max_steps=1))


def test_nan_loss_stops_with_step_and_term(distill_config):
    cfg = distill_config(lr=1e30, clip=0.0, objective="nst", max_steps=20, save_every=20, eval_every=20, grad_every=20)
    refused(r"the \w+ loss is (nan|inf) at step \d+; .*--lr", lambda: distill.main(cfg))
    assert not (Path(cfg.out_dir) / "model").exists()


def test_too_small_a_batch_for_negatives_is_refused(demo, tmp_path):
    cfg = teacher.Config(videos=str(demo / "demo-s0" / "videos.h5"), batch_size=2, grad_accum=2, device="cpu", out_dir=str(tmp_path / "run"))
    refused("no negatives", lambda: teacher.main(cfg))
    assert not (tmp_path / "run").exists()


def test_mistake_on_the_command_line_has_status_1_and_one_line():
    done = subprocess.run([sys.executable, str(ROOT / "distill.py"), "--objektive", "nst"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == "unknown flag --objektive; did you mean --objective?"
