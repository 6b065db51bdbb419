"""Proves the plumbing: flags, keyed randomness, schedule, atomic checkpoints, what a killed run leaves.

Run: python -m pytest -q tests/test_common.py
"""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import parse_cli
from run import (PEAK_TFLOPS, Interrupt, Log, World, check_finite, check_resume, finished_run,
                 keep_freed_memory, load_checkpoint, lr_at, model_folder, open_run, peak_flops,
                 return_freed_memory, save_checkpoint)

ALONE = World(0, 1, torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "demo"  # the preset
    lr: float = 1e-3  # learning rate
    max_steps: int = 10  # how many
    out_dir: str = ""  # where
    use_head: bool = True  # a switch
    resume: bool = False  # go on

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: must be 1 or more")


PRESETS = {"demo": {}, "paper": {"lr": 2e-4, "max_steps": 500}}


@pytest.mark.parametrize("argv, field, value", [
    (["--lr", "1"], "lr", 1.0), (["--lr=1e-4"], "lr", 1e-4), (["--max-steps", "7"], "max_steps", 7),
    (["--max_steps=7"], "max_steps", 7), (["--use_head", "false"], "use_head", False),
    (["--use-head=0"], "use_head", False), (["--resume"], "resume", True),
    (["--resume", "--lr", "2"], "resume", True), (["--out_dir", "123"], "out_dir", "123"),
    (["--out_dir=a=b"], "out_dir", "a=b"), (["--out_dir="], "out_dir", ""),
    (["--preset", "paper"], "lr", 2e-4), (["--lr", "3", "--preset", "paper"], "lr", 3.0),
    (["--preset=paper"], "max_steps", 500)])
def test_cli_converts_by_the_fields_type(argv, field, value):
    got = getattr(parse_cli(Config, PRESETS, argv), field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argv, word", [
    (["--lrr", "1"], "did you mean --lr"), (["lr", "1"], "unknown flag lr"), (["--lr", "fast"], "--lr fast"),
    (["--max_steps", "1e5"], "without point or exponent"), (["--lr", "1", "--lr", "2"], "given twice"),
    (["--lr"], "needs a value"), (["--out_dir", "--resume"], "needs a value"),
    (["--resume", "maybe"], "true or false"), (["--preset", "big"], "demo, paper"),
    (["--max_steps", "0"], "1 or more"), (["--lr", "__import__('os')"], "not a valid float"),
    (["--lr", "nan"], "not a valid float"), (["--lr=inf"], "not a valid float")])
def test_cli_mistake_ends_in_one_line(argv, word):
    with pytest.raises(SystemExit) as error:
        parse_cli(Config, PRESETS, argv)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_cli_help_shows_every_flag_with_its_comment(capsys):
    with pytest.raises(SystemExit) as error:
        parse_cli(Config, PRESETS, ["--help"])
    out = capsys.readouterr().out
    assert error.value.code == 0
    assert all(f"--{f.name}" in out for f in dataclasses.fields(Config)) and "learning rate" in out


def test_config_is_frozen_and_round_trips():
    cfg = parse_cli(Config, PRESETS, ["--lr", "0.1"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1
    assert Config(**json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


# ---------------------------------------------------------------------------- randomness and schedule


def test_keyed_draws_depend_on_every_key_and_on_nothing_else():
    rows = np.arange(64)
    a = common.keyed_uniform("mask", 0, 3, rows[:, None], np.arange(32))
    assert a.shape == (64, 32) and (a >= 0).all() and (a < 1).all()
    part = common.keyed_uniform("mask", 0, 3, rows[10:20, None], np.arange(32))
    np.testing.assert_array_equal(a[10:20], part)
    for keys in (("order", 0, 3), ("mask", 1, 3), ("mask", 0, 4)):
        assert (common.keyed_uniform(*keys, rows[:, None], np.arange(32)) == a).mean() < 0.01


def test_keyed_draws_are_uniform_and_uncorrelated():
    u = common.keyed_uniform("u", 0, np.arange(1000)[:, None], np.arange(1000))
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 1e6) ** 0.5
    counts = np.bincount((u.ravel() * 100).astype(int), minlength=100)
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 160  # chi-squared, 99 degrees of freedom: 1e-4 beyond
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 4e-3
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 4e-3
    draws = common.keyed_integers(7, "i", np.arange(70000))
    assert draws.min() == 0 and draws.max() == 6 and abs(np.bincount(draws) - 10000).max() < 400


def test_lr_rises_to_the_peak_and_falls_to_zero():
    lr = [lr_at(step, 2.0, 10, 100) for step in range(101)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == pytest.approx(2.0) == lr[10]
    assert lr[55] == pytest.approx(1.0) and lr[100] == 0
    assert all(np.diff(lr[:10]) > 0) and all(np.diff(lr[10:]) < 0)


def test_peak_table_finds_the_longer_name_first():
    for i, (name, *_) in enumerate(PEAK_TFLOPS):
        assert not any(earlier in name for earlier, *_ in PEAK_TFLOPS[:i]), name
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


# ---------------------------------------------------------------------------- checkpoints


def test_checkpoint_keeps_the_one_before_and_loads_safely(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step, "w": torch.full((3,), float(step))}, ALONE)
    assert load_checkpoint(tmp_path, ALONE)["step"] == 2
    assert torch.load(tmp_path / "checkpoint.pt.prev", weights_only=True)["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.prev"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "missing"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step, "w": torch.arange(5000.)}, ALONE)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content = b""
    path.unlink() if damage == "missing" else path.write_bytes(bytes(content))
    assert load_checkpoint(tmp_path, ALONE)["step"] == 1
    assert ("damaged" in capsys.readouterr().out) == (damage != "missing")
    (tmp_path / "checkpoint.pt.prev").unlink()
    with pytest.raises(SystemExit, match="no readable checkpoint"):
        load_checkpoint(tmp_path, ALONE)


def test_hostile_checkpoint_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    torch.save({"step": Hostile()}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="no readable checkpoint"):
        load_checkpoint(tmp_path, ALONE)
    assert not (tmp_path / "owned").exists()


def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"step": 1}, ALONE)

    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="No space left.*--resume"):
        save_checkpoint(tmp_path, {"step": 2}, ALONE)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(tmp_path, ALONE)["step"] == 1


def test_kill_while_saving_leaves_a_readable_checkpoint(tmp_path):
    script = ("import sys, torch; sys.path.insert(0, sys.argv[1])\n"
              "from run import World, save_checkpoint\n"
              "world, step = World(0, 1, torch.device('cpu')), 0\n"
              "while True:\n"
              "    step += 1\n"
              "    state = {'step': step, 'w': torch.full((400_000,), float(step))}\n"
              "    save_checkpoint(sys.argv[2], state, world)\n"
              "    print(step, flush=True)\n")
    command = [sys.executable, "-c", script, str(Path(common.__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for delay in range(3):  # let some saves pass, then kill at an arbitrary moment of one
        done = int(process.stdout.readline())
    time.sleep(0.0123)
    process.send_signal(signal.SIGKILL)
    done = max([done, *map(int, process.stdout.read().split())])
    process.wait()
    saved = load_checkpoint(tmp_path, ALONE)
    assert saved["step"] in (done, done + 1) and (saved["w"] == saved["step"]).all()


def test_resume_refuses_what_cannot_change_and_prints_what_did(capsys):
    before = dataclasses.asdict(Config(lr=1.0, max_steps=5))
    check_resume(before, Config(lr=2.0, max_steps=5), {"corpus": "a"}, {"corpus": "a"}, ("max_steps",))
    assert "--lr was 1.0, is 2.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--max_steps was 5"):
        check_resume(before, Config(lr=1.0, max_steps=6), {}, {}, ("max_steps",))
    with pytest.raises(SystemExit, match="corpus is not what"):
        check_resume(before, Config(lr=1.0, max_steps=5), {"corpus": "a"}, {"corpus": "b"}, ())


def test_second_run_moves_the_first_aside(tmp_path):
    for n in range(3):
        open_run(tmp_path / "run", Config(max_steps=n + 1), ALONE, {})
    steps = {folder.name: json.loads((folder / "config.json").read_text())["config"]["max_steps"]
             for folder in tmp_path.iterdir()}
    assert steps == {"run": 3, "run.1": 1, "run.2": 2}


def test_finished_run_is_found_only_when_all_is_equal(tmp_path):
    cfg, hashes = Config(), {"corpus": "a"}
    folder = open_run(tmp_path / "run", cfg, ALONE, hashes)
    assert finished_run(folder, cfg, hashes) is None
    common.write_json(folder / "results.json", {"score": 1, "finished": 2.0})
    assert finished_run(folder, cfg, hashes)["score"] == 1
    assert finished_run(folder, Config(resume=True), hashes)["score"] == 1
    assert finished_run(folder, Config(lr=2.0), hashes) is None
    assert finished_run(folder, cfg, {"corpus": "b"}) is None


def test_log_cuts_what_came_after_the_checkpoint(tmp_path):
    log = Log(tmp_path, ALONE)
    for step in (10, 20, 30):
        log.write(step=step)
    with log.path.open("a") as f:
        f.write('{"step": 4')  # a kill in the middle of a line
    Log(tmp_path, ALONE, 2).write(step=25)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [10, 20, 25]
    Log(tmp_path, ALONE)
    assert log.path.read_text() == ""


def test_nan_names_the_term_the_step_and_the_checkpoint(tmp_path):
    values = torch.zeros(20, 2)
    check_finite(values, 40, ["mlm", "crd"], tmp_path)
    values[7, 1] = float("nan")
    with pytest.raises(SystemExit, match="crd loss is nan at step 47; start anew"):
        check_finite(values, 40, ["mlm", "crd"], tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"x")
    with pytest.raises(SystemExit, match="at step 47; the last good checkpoint is .*checkpoint.pt"):
        check_finite(values, 45, ["mlm", "crd"], tmp_path)


def test_interrupt_is_due_after_a_signal_and_after_the_time():
    interrupt = Interrupt()
    assert not interrupt.due(ALONE)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.due(ALONE) and interrupt.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == interrupt.before[signal.SIGTERM]
    late = Interrupt(max_minutes=1e-9)
    time.sleep(0.01)
    assert late.due(ALONE) and late.reason == "--max_minutes"
    late.release()


def test_model_folder_takes_either_level(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "log.jsonl").write_text("")
    assert model_folder(tmp_path / "run", "--teacher") == tmp_path / "run" / "model"
    assert model_folder(tmp_path / "run" / "model", "--teacher") == tmp_path / "run" / "model"
    with pytest.raises(SystemExit, match="--teacher"):
        model_folder(tmp_path, "--teacher")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_returns_to_the_system_when_asked():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    keep_freed_memory()
    try:
        tensors = [torch.ones(5_000_000) for _ in range(20)]  # 400 MB
        del tensors[::2]  # holes in the heap, as batches of different lengths leave them
        before = resident()
        return_freed_memory()
        assert resident() < before - 150
    finally:
        keep_freed_memory(False)
