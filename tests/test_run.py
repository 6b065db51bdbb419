"""Proves the books of a run: schedule, atomic checkpoints, resume, window of terms, what a killed run leaves.

Run: python -m pytest -q tests/test_run.py
"""
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stop_line
from torch.utils.flop_counter import FlopCounterMode

from common import Switch, birth, write_json
from model import BERT, BERTConfig, MLMHead, model_config
from parts.checkpoints import checkpoint_nbytes, load_checkpoint, save_checkpoint
from parts.machine import (PEAK_TFLOPS, Ranks, cores, flops_per_token, generator_of, init_ranks, keep_freed_memory,
                           memory_report, move, peak_flops, peak_memory_mb, return_freed_memory, side_by_side)
from run import FORMAT, Interrupt, Run, file_hash, lr_at, model_folder, read_run, run_script, steps_of

TINY = BERTConfig(vocab_size=40, layers=2, hidden=24, heads=3, intermediate=32, max_positions=16)
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 1.0
    batch_size: int = 4
    warmup_steps: float = 0.0
    max_steps: int = 40
    epochs: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    resume: Switch = "false"
    eval_only: bool = False
    max_minutes: float = 0.0
    log_every: int = 10
    eval_every: int = 10
    save_every: int = 10
    save_minutes: float = 0.0


def test_lr_rises_to_the_peak_and_falls_to_zero():
    lr = [lr_at(step, 2.0, 10, 100) for step in range(101)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == pytest.approx(2.0) == lr[10]
    assert lr[55] == pytest.approx(1.0) and lr[100] == 0
    assert all(np.diff(lr[:10]) > 0) and all(np.diff(lr[10:]) < 0)


def test_steps_follow_from_epochs_and_a_share_is_a_warmup():
    assert steps_of(Config(max_steps=50, warmup_steps=0.1), 0) == (50, 5)
    assert steps_of(Config(max_steps=0, epochs=1.5, warmup_steps=3), 41) == (16, 3)
    with pytest.raises(SystemExit, match="--warmup_steps 20 is more than the 16 steps"):
        steps_of(Config(max_steps=0, epochs=1.5, warmup_steps=20), 41)


def test_peak_table_finds_the_longer_name_first():
    for i, (name, *_) in enumerate(PEAK_TFLOPS):
        assert not any(earlier in name for earlier, *_ in PEAK_TFLOPS[:i]), name
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_flops_equal_torch_counter():
    bert, ids = BERT(TINY), torch.arange(24).view(3, 8)
    head = MLMHead(TINY.hidden, bert.embeddings.word.weight)
    with FlopCounterMode(display=False) as counter:
        h = bert(ids)
    tokens, T = ids.numel(), ids.shape[1]
    assert counter.get_total_flops() == tokens * flops_per_token(TINY, T)
    with FlopCounterMode(display=False) as counter:
        head(h[:, :2])
    share = flops_per_token(TINY, T, mlm=0.25) - flops_per_token(TINY, T)
    assert counter.get_total_flops() == tokens * share
    c = model_config("6L-512H", 30522)
    assert 39.2e6 < flops_per_token(c, 128) < 39.4e6


def test_memory_report_counts_what_autograd_keeps():
    config, kept = model_config("4L-128H-4A", 50), {}
    bert = BERT(config)
    weights = {p.data_ptr() for p in bert.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        bert(torch.randint(50, (32, 64))).sum()
    expected = sum(kept.values()) + 16 * sum(p.numel() for p in bert.parameters())
    said = float(memory_report(bert, config, 32, 64).split("about ")[1].split(" GB")[0]) * 1e9
    assert 0.8 < said / expected < 1.25


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

    for error in (OSError(28, "No space left on device"), RuntimeError("unexpected pos\nframe #0")):
        def full(state, file):
            file.write(b"half")
            raise error
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(SystemExit, match="not written .(No space left|unexpected pos.;).*--resume") as stop:
            save_checkpoint(tmp_path, {"step": 2}, ALONE)
        assert "\n" not in str(stop.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(tmp_path, ALONE)["step"] == 1


def test_kill_while_saving_leaves_a_readable_checkpoint(tmp_path):
    script = ("import sys, torch; sys.path.insert(0, sys.argv[1])\n"
              "from parts.machine import Ranks\nfrom parts.checkpoints import save_checkpoint\n"
              "ranks, step = Ranks(0, 1, torch.device('cpu')), 0\n"
              "while True:\n"
              "    step += 1\n"
              "    state = {'step': step, 'w': torch.full((400_000,), float(step))}\n"
              "    save_checkpoint(sys.argv[2], state, ranks)\n"
              "    print(step, flush=True)\n")
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for delay in range(3):  # let some saves pass, then kill at an arbitrary moment of one
        done = int(process.stdout.readline())
    time.sleep(0.0123)
    process.send_signal(signal.SIGKILL)
    done = max([done, *map(int, process.stdout.read().split())])
    process.wait()
    saved = load_checkpoint(tmp_path, ALONE)
    assert saved["step"] in (done, done + 1) and (saved["w"] == saved["step"]).all()


@pytest.fixture
def run(tmp_path):
    """A Run of the Config above in tmp_path / "run"; flags as keywords."""
    def make(hashes=None, **flags):
        return Run(Config(**flags), tmp_path / "run", ALONE, hashes or {"corpus": "a"}, ("batch_size",))
    return make


def part():
    """What stands for a model, an optimizer and a scaler in a Run."""
    return dict(model=torch.nn.Linear(2, 2))


def begun(run, names=("mlm", "crd")):
    step = run.restore(40, **part())
    run.begin(names)
    run.feed(lambda step: (None, []))
    return step


def test_resume_refuses_what_cannot_change_and_prints_what_did(run, capsys):
    first = run()
    begun(first)
    first.save_due(10, True)
    first.leave_loop()
    assert begun(run(resume="true", lr=2.0)) == 10 and "--lr was 1.0, is 2.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--batch_size was 4"):
        begun(run(resume="true", batch_size=8))
    with pytest.raises(SystemExit, match="corpus is not what"):
        begun(run(resume="true", hashes={"corpus": "b"}))


def test_resume_auto_goes_on_only_where_all_is_equal(run):
    first = run()
    begun(first)
    assert not run(resume="auto").resumes  # no checkpoint yet
    first.save_due(10, True)
    assert run(resume="auto").resumes and not run().resumes
    assert run(resume="auto", log_every=5, max_minutes=1.0).resumes
    for other in (run(resume="auto", lr=3.0), run(resume="auto", hashes={"corpus": "b"})):
        assert not other.resumes


def test_checkpoint_and_run_of_another_format_are_refused_with_the_command(run, tmp_path):
    first = run()
    begun(first)
    first.save_due(10, True)
    first.finish({"score": 1})
    path = tmp_path / "run" / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"format": 1}, path)
    with pytest.raises(SystemExit, match="a checkpoint of format 1, this code reads 3; start anew"):
        begun(run(resume="true"))
    assert read_run(tmp_path / "run")[1]["score"] == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    write_json(tmp_path / "run" / "config.json", config | {"format": 1, "command": ["distill.py", "--lr", "1"]})
    with pytest.raises(SystemExit, match="run: a run of format 1, this code reads 3; make it again: distill.py --lr 1"):
        read_run(tmp_path / "run")
    assert not run(resume="auto").resumes and run(resume="auto").finished() is None


@pytest.mark.parametrize("change", [
    lambda state: [1, 2], lambda state: {"format": FORMAT}, lambda state: state | {"model": {"other": torch.ones(3)}},
    lambda state: state | {"model": 3}, lambda state: state | {"step": "ten"}, lambda state: state | {"hashes": None},
    lambda state: state | {"rng": torch.ones(2)}, lambda state: state | {"config": []}])
def test_checkpoint_that_is_none_of_such_a_run_is_one_line(run, tmp_path, change):
    first, path = run(), tmp_path / "run" / "checkpoint.pt"
    begun(first)
    first.save_due(10, True)
    torch.save(change(torch.load(path, weights_only=True)), path)
    says = stop_line(begun, run(resume="true"))
    assert str(tmp_path / "run") in says and "start anew without --resume" in says
    torch.save({"model": {}}, tmp_path / "run" / "best.pt")
    assert "its checkpoint is none of such a run" in stop_line(first.load_best, part()["model"])


@pytest.mark.parametrize("text", ["[]", "3", '{"finished": 1}', '{"config": [], "hashes": 3}', "[" * 9999, "\0"])
def test_files_of_a_run_that_hold_something_else_are_no_run(run, tmp_path, text):
    first = run()
    begun(first)
    first.finish({"score": math.nan})
    assert run().finished()["score"] is None
    (tmp_path / "run" / "config.json").write_text(text)
    assert run(resume="auto").finished() is None and not run(resume="auto").resumes
    (tmp_path / "run" / "results.json").write_text(text)
    assert run().finished() is None
    begun(run())
    assert (tmp_path / "run.1").is_dir()


def test_second_run_moves_the_first_aside(run, tmp_path):
    for n in range(3):
        begun(run(max_steps=n + 1))
    steps = {folder.name: json.loads((folder / "config.json").read_text())["config"]["max_steps"]
             for folder in tmp_path.iterdir()}
    assert steps == {"run": 3, "run.1": 1, "run.2": 2}


def test_finished_run_is_found_only_when_all_is_equal(run):
    first = run()
    begun(first)
    assert first.finished() is None
    first.finish({"score": 1})
    assert run().finished()["score"] == run(resume="auto").finished()["score"] == 1
    assert run(lr=2.0).finished() is None and run(hashes={"corpus": "b"}).finished() is None


def test_log_is_cut_to_the_checkpoint(run, tmp_path):
    first, path = run(), tmp_path / "run" / "log.jsonl"
    begun(first)
    for step in (10, 20):
        first.log(step=step)
    first.save_due(20, True)
    first.log(step=30)
    with path.open("a") as f:
        f.write('{"step": 4')  # a kill in the middle of a line
    again = run(resume="true")
    begun(again)
    again.log(step=25)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 25]


def test_nothing_of_a_resumed_run_lies_in_the_checkpoints_file(run, tmp_path):
    """The file is mapped, not read: what is kept must be copied."""
    def parts():
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        return dict(model=model, optimizer=optimizer)
    first = run()
    first.restore(40, **(made := parts()))
    first.begin(("mlm",))
    first.feed(lambda step: (None, []))
    first.save_due(10, True)
    again = run(resume="true")
    assert again.restore(40, **(new := parts())) == 10 and not {"model", "optimizer"} & again.saved.keys()
    path = tmp_path / "run" / "checkpoint.pt"
    if (maps := Path("/proc/self/maps")).exists():
        assert str(path) not in maps.read_text()
    size = path.stat().st_size
    with path.open("r+b") as f:  # in place: what is mapped would change
        f.write(b"\xff" * size)
    state, wanted = (flat_state(part["optimizer"]) for part in (new, made))
    assert len(state) == 6 and all(map(torch.equal, state, wanted))
    assert torch.equal(new["model"].weight, made["model"].weight)


def flat_state(optimizer):
    return [x for state in optimizer.state_dict()["state"].values() for x in state.values()]


def test_checkpoints_by_time_stand_at_the_end_of_a_window(run, tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    for minutes, saved in ((1000.0, False), (1e-9, True)):
        one = run(save_every=0, save_minutes=minutes)
        begun(one)
        time.sleep(0.01)
        for step in range(11):
            one.save_due(step, False)
            assert path.exists() == (saved and step == 10)
    written = path.stat().st_mtime_ns
    one.save_due(20, False)  # a moment later it is time again
    assert path.stat().st_mtime_ns > written


def test_large_checkpoints_are_told_and_refused_without_room_before_the_start(run, tmp_path, monkeypatch, capsys):
    model = torch.nn.Linear(6000, 2000)  # 48 MB; AdamW's moments make 144 MB
    parts = dict(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    assert checkpoint_nbytes(parts) == 3 * 4 * 2000 * 6001
    one = run()
    one.restore(40, **parts)
    one.begin(("mlm",))
    assert re.search(r"checkpoint: 0.14 GB in about \d+s, at the [\d,]+ MB/s of this disk; 0.43 GB while one is",
                     capsys.readouterr().out)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "log.jsonl", "run.lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 ** 8))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="checkpoints take 0.43 GB of disk, 0.1 GB are free; free some or give"):
        one.begin(("mlm",))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was moved


def test_damaged_checkpoint_is_never_rotated_over_the_good_one(run, tmp_path):
    first, folder = run(), tmp_path / "run"
    begun(first)
    for step in (10, 20):
        first.save_due(step, True)
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    again = run(resume="true")
    assert begun(again) == 10
    assert torch.load(folder / "checkpoint.pt.prev", weights_only=True)["step"] == 10
    again.save_due(20, True)
    for name, step in (("checkpoint.pt", 20), ("checkpoint.pt.prev", 10)):
        assert torch.load(folder / name, weights_only=True)["step"] == step
    assert not list(folder.glob("*.damaged"))


def test_auto_starts_anew_in_its_folder_where_no_checkpoint_is_readable(run, tmp_path, capsys):
    """Killed before the first save, in it, or with a damaged one: the same command starts again."""
    for broken in (None, "checkpoint.pt.x1.tmp", "checkpoint.pt"):
        first = run(resume="auto")
        assert begun(first) == 0
        first.log(step=10)
        if broken:
            (tmp_path / "run" / broken).write_bytes(b"half")
        again = run(resume="auto")
        assert begun(again) == 0 and not again.resumes
        again.log(step=10)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 10}\n'
    assert "so the run starts anew" in capsys.readouterr().out
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(SystemExit, match="no readable checkpoint.*; start anew"):
        begun(run(resume="true"))


def test_log_is_cut_aside(run, tmp_path, monkeypatch):
    """A kill while the log is cut leaves it whole."""
    first = run()
    begun(first)
    first.log(step=10)
    first.save_due(10, True)

    def killed(self, *args):
        raise KeyboardInterrupt
    again = run(resume="true")
    again.restore(40, **part())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write = Path.write_text
        patch.setattr(Path, "write_text", lambda path, text: killed(path) if path.name == "log.jsonl" else
                      write(path, text))
        again.begin(("mlm",))
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 10}\n'


def test_folder_belongs_to_the_process_that_writes_it(run, tmp_path):
    lock = tmp_path / "run" / "run.lock"
    begun(run())
    holder = json.loads(lock.read_text())
    assert (holder["pid"], holder["birth"]) == (os.getpid(), birth(os.getpid()))
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.write_text(json.dumps(holder | {"pid": other.pid, "birth": birth(other.pid)}))
    for flags in ({}, dict(resume="auto")):
        with pytest.raises(SystemExit, match=f"run: process {other.pid} of .* is writing there; wait, or give"):
            begun(run(**flags))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # not moved
    other.communicate(b"")
    begun(run(resume="auto"))  # the dead have no folder
    lock.write_text(json.dumps(holder | {"birth": "1"}))  # another process had this number once
    begun(run(resume="auto"))
    lock.write_text(json.dumps(holder | {"host": "elsewhere"}))
    with pytest.raises(SystemExit, match="of elsewhere is writing there; .*if it has died, delete .*run.lock"):
        begun(run(resume="auto"))
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:  # a zombie: nobody has asked how it ended
        lock.write_text(json.dumps(holder | {"pid": dead.pid, "birth": birth(dead.pid)}))
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        begun(run(resume="auto"))
    lock.write_text("{")
    last = run(resume="auto")
    begun(last)
    last.finish({})
    assert not lock.exists()


def test_folder_without_a_run_in_it_is_taken(run, tmp_path):
    """A process was killed between making it and writing config.json, or a person made it."""
    for flags in ({}, dict(resume="auto")):
        folder = tmp_path / "run"
        (folder / "model" / "config.json.elsewhere.1.tmp").mkdir(parents=True)
        (folder / "model").rename(folder / "config.json.elsewhere.2.tmp")
        (folder / "run.lock").write_text("")
        begun(run(**flags))
        assert [path.name for path in tmp_path.iterdir()] == ["run"] and not list(folder.rglob("*.tmp"))
        folder.rename(tmp_path.with_name(f"{tmp_path.name}-{len(flags)}"))


@pytest.mark.parametrize("error, status, line", [
    (SystemExit("disk full"), 1, "disk full\n"), (SystemExit(0), 0, ""), (ValueError("odd"), 1, "ValueError: odd"),
    (KeyboardInterrupt(), 1, "interrupted\n"), (FileNotFoundError(2, "is not there", "x"), 1, "x: is not there\n")])
def test_error_in_a_group_ends_the_process_at_once(monkeypatch, capsys, error, status, line):
    """In Python's own end the group waits for threads that wait for Python."""
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("run.parse_cli", lambda *args, **needs: Config())
    monkeypatch.setattr("run.clear_up_on_sigterm", lambda: None)
    with pytest.raises(Left) as left:
        run_script(lambda cfg: (_ for _ in ()).throw(error), Config, {})
    assert left.value.args == (status,) and line in capsys.readouterr().err


@pytest.mark.parametrize("main, before", [(lambda cfg: None, ["left the group"]), (lambda cfg: sys.exit(), [])])
def test_a_finished_script_in_a_group_ends_without_pythons_own_end(monkeypatch, main, before):
    """In which a thread of gloo's that lets go of a tensor would abort the process."""
    class Left(BaseException):
        pass
    called = []

    def leave(code):
        called.append(code)
        raise Left
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: called.append("left the group"))
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("run.parse_cli", lambda *args, **needs: Config())
    monkeypatch.setattr("run.clear_up_on_sigterm", lambda: None)
    with pytest.raises(Left):
        run_script(main, Config, {})
    assert called == [*before, 0]


@pytest.mark.parametrize("name, kind", [("checkpoint.pt", "folder"), ("log.jsonl", "folder"), ("model", "file")])
def test_what_stands_in_the_runs_way_is_found_before_training(run, tmp_path, name, kind):
    first = run()
    begun(first)
    first.save_due(10, True)
    path = tmp_path / "run" / name
    if kind == "folder":
        if path.exists():
            path.rename(tmp_path / "run" / "checkpoint.pt.prev")
        path.mkdir()
    else:
        path.write_text("")
    with pytest.raises(SystemExit, match=f"{name}: is a {kind}"):
        begun(run(resume="true"))
    (tmp_path / "file").write_text("kept")
    run = Run(Config(), tmp_path / "file", ALONE, {"corpus": "a"})
    with pytest.raises(SystemExit, match="file: is a file"):
        begun(run)
    assert (tmp_path / "file").read_text() == "kept"


def test_nan_is_null_in_the_log_and_ends_the_run_in_an_evaluation(run, tmp_path):
    one = run()
    begun(one)
    one.log(step=1, loss=math.nan, grad_norm=math.inf)
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text()) == {
        "step": 1, "loss": None, "grad_norm": None}
    with pytest.raises(SystemExit, match="val mlm is nan at step 3, while losses and weights are finite"):
        one.note(3, "val", {"ct": 1.0, "mlm": math.nan})
    one.parts["model"].weight.data[0] = math.inf
    with pytest.raises(SystemExit, match="the weight weight is not finite after step 3"):
        one.note(3, "val", {"mlm": math.nan})


def test_float16_that_takes_no_step_is_no_success(run, tmp_path, capsys):
    def trained(norms, **flags):
        one = run(dtype="float16", log_every=10, **flags)
        one.restore(len(norms), **part())
        one.begin(("mlm",))
        one.feed(lambda step: (None, []))
        for step, norm in enumerate(norms):
            one.add(step, {"mlm": torch.tensor(1.0)})
            one.tick(step + 1, 0.1, torch.tensor(norm))
        one.leave_loop()
    trained([math.inf] * 9 + [1.0] * 11)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [9, None]
    assert "9 of 10 steps overflowed" in capsys.readouterr().out
    for norms in ([math.nan] * 4, [1.0] * 5 + [math.inf] * 30):
        with pytest.raises(SystemExit, match=f"overflowed .* each of the last {min(25, len(norms))} steps"):
            trained(norms)


def test_window_logs_means_and_names_the_term_the_step_and_the_checkpoint(run, tmp_path, capsys):
    one = run(log_every=4)
    begun(one)
    for step in range(4):
        for _ in range(2):  # micro-batches of a step add up
            one.add(step, {"mlm": torch.tensor(step / 2), "crd": torch.tensor(1.0)})
        one.tick(step + 1, 0.1, torch.tensor(3.0))
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert (line["step"], line["mlm"], line["crd"], line["lr"], line["grad_norm"]) == (4, 1.5, 2.0, 0.1, 3.0)
    assert "step      4  mlm 1.5000  crd 2.0000  lr 1.0e-01" in capsys.readouterr().out
    one.add(4, {"mlm": torch.tensor(1.0), "crd": torch.tensor(1.0)})
    one.add(5, {"mlm": torch.tensor(1.0), "crd": torch.tensor(math.nan)})
    with pytest.raises(SystemExit, match="crd loss is nan at step 5; start anew"):
        one.save_due(6, True)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"x")
    with pytest.raises(SystemExit, match="at step 5; the last good checkpoint is .*checkpoint.pt"):
        one.save_due(6, True)


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    one = run()
    begun(one)
    one.parts["model"].weight.data[0] = math.inf
    with pytest.raises(SystemExit, match="the weight weight is not finite after step 10"):
        one.save_due(10, True)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_interrupt_is_due_after_a_signal_and_after_the_time():
    interrupt = Interrupt()
    assert not interrupt.due()
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.due() and interrupt.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == interrupt.handlers[signal.SIGTERM]
    late = Interrupt(max_minutes=1e-9)
    time.sleep(0.01)
    assert late.due() and late.reason == "--max_minutes"
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


def test_mps_is_taken_where_it_is_and_else_refused_in_one_line(monkeypatch):
    """Its logic alone: no Mac has run it."""
    def refused(match, *args):
        with pytest.raises(SystemExit, match=match) as error:
            init_ranks(*args)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused("--device mps: needs an Apple GPU and PyTorch 2.5 .* --device cpu", "mps")
    refused("--device tpu: choose auto, cpu, cuda or mps", "tpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.amp, "is_autocast_available", lambda device: device != "mps")
        refused("--device mps: needs", "mps")
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: True)  # PyTorch 2.4 cannot
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert init_ranks("mps") == Ranks(0, 1, torch.device("mps")) and init_ranks("auto").device.type == "cpu"
    refused("--dtype bfloat16: --device mps computes in float32", "mps", "bfloat16")
    for name, value in {"RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    refused("--device mps: torchrun started 2 processes, but a Mac has one GPU", "mps")


def test_what_a_mac_has_of_its_own_is_asked_of_torch_mps(monkeypatch):
    device, asked = torch.device("mps"), []
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3e6)
    assert generator_of(device) is torch.mps and generator_of(torch.device("cuda")) is torch.cuda
    assert generator_of(torch.device("cpu")) is torch
    assert peak_memory_mb(device) == 3 and peak_flops(device, torch.float32) == 0
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: asked.append("pinned"))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, to, non_blocking: asked.append((to, non_blocking)))
    move({"ids": torch.zeros(2), "name": "x"}, device)
    assert asked == [(device, False)]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_knows_that_there_are_too_few_gpus(monkeypatch, rank):
    """One that had a GPU would wait in the group for one that had none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit, match="started 2 processes, but GPUs: 1; lower --nproc_per_node"):
        init_ranks("auto")


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


def test_jobs_run_side_by_side_each_in_its_order_with_one_thread(tmp_path, monkeypatch):
    """Second commands read what the first wrote; the first job waits for the last command of the second."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")  # as a cluster's scheduler gives them: each job gets one
    code = ("import os, sys, time; a, b = sys.argv[1:]\n"
            f"open({str(tmp_path / 'gpus')!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ')\n"
            f"while os.path.basename(a) == 'a' and not os.path.exists({str(tmp_path / 'b11')!r}): time.sleep(0.01)\n"
            "open(b, 'w').write(open(a).read() + os.environ['OMP_NUM_THREADS'])")
    jobs, needs = {}, {"a2": ["a1"], "b2": ["b1"], "c2": ["c1"]}
    for name in "abc":
        (tmp_path / name).write_text(name)
        jobs |= {f"{name}{i + 1}": [sys.executable, "-c", code, tmp_path / f"{name}{'1' * i}",
                                    tmp_path / f"{name}{'1' * (i + 1)}"]
                 for i in range(2)}
    seconds = {}
    assert side_by_side(jobs, needs, seconds=seconds) == {}
    assert seconds.keys() == jobs.keys() and min(seconds.values()) > 0
    assert set((tmp_path / "gpus").read_text().split()) == {"5", "GPU-7"}
    assert [(tmp_path / f"{name}11").read_text() for name in "abc"] == ["a11", "b11", "c11"]


def test_command_that_fails_ends_the_others_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    waits = f"import time; open({str(tmp_path / 'began')!r}, 'w'); time.sleep(60)"
    fails = (f"import os, sys, time\nwhile not os.path.exists({str(tmp_path / 'began')!r}): time.sleep(0.01)\n"
             "print('so far'); sys.exit('no such thing')")
    began = time.monotonic()
    with pytest.raises(SystemExit, match="no such thing$"):
        side_by_side({"waits": [sys.executable, "-c", waits], "fails": [sys.executable, "-c", fails], "after": ["never"]},
                     {"after": ["fails"]})
    assert time.monotonic() - began < 50


def test_command_that_fails_stops_only_what_needs_it_where_logs_are_kept(tmp_path):
    """One worker: the jobs run in their order, and the log keeps all that one said."""
    jobs = {"fails": [sys.executable, "-c", "import sys; print('so far'); sys.exit('no such thing')"], "silent": ["false"],
            "after": ["never"], "last": ["never"],
            "other": [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]}
    seconds = {}
    failed = side_by_side(jobs, {"after": ["fails"], "last": ["after", "other"]}, workers=1, logs=tmp_path, seconds=seconds)
    assert failed == {"fails": "no such thing", "silent": "exit status 1", "after": "not run, as fails failed",
                      "last": "not run, as after failed"}
    assert list(seconds) == ["fails", "silent", "other"]  # what a killed one took counts when it has gone on
    assert (tmp_path / "fails.txt").read_text() == "so far\nno such thing\n"
    assert int((tmp_path / "other.txt").read_text()) == cores()


def test_hash_of_a_teacher_tells_its_vokens_and_video_encoder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = {file_hash(tmp_path)}
    for name in ("vokens.safetensors", "video_encoder.safetensors"):
        for content in (b"1", b"2"):
            (tmp_path / name).write_bytes(content)
            found.add(file_hash(tmp_path))
    assert len(found) == 5
