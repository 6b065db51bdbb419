"""Proves what a run does on several machines, here two torchrun agents on one over loopback.

Run: python -m pytest -q tests/test_nodes.py; with -m slow also the agents
"""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK_STUDENT, ROOT, stop_line
from test_ddp import log_lines, tensors_of

import run
from run import check_shared

LINE = "does not see what rank 0 writes there; give a --out_dir on a file system that all machines share"


def rank_of_two(rank, folder, other_sees=True):
    """Ranks of which the other one is played: it is called as a file in `folder` is, and sees, or does not."""
    def gather(own):
        if own.dtype == torch.bool:
            other = torch.tensor([other_sees])
        else:
            names = [path.name for path in folder.glob("shared.*.tmp")] or ["shared.elsewhere.1.tmp"]
            other = torch.tensor([[*names[0].encode().ljust(99)]])
        return torch.cat([other, own] if rank else [own, other])
    return SimpleNamespace(rank=rank, size=2, main=rank == 0, gather=gather)


@pytest.mark.parametrize("path", ["run", "out/new/run"])
def test_main_rank_shows_a_file_beside_the_folder_and_takes_it_away(tmp_path, path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"shared.{socket.gethostname()}.{dead.pid}.tmp"
    left.touch()  # of a process that was killed
    check_shared(tmp_path / path, "--out_dir", rank_of_two(0, tmp_path))
    assert not list(tmp_path.iterdir())
    line = stop_line(check_shared, tmp_path / path, "--out_dir", rank_of_two(0, tmp_path, other_sees=False))
    assert line == f"{tmp_path}: rank 1 {LINE}" and not list(tmp_path.iterdir())


def test_other_rank_waits_for_the_file_and_names_what_to_do_where_it_never_comes(tmp_path, monkeypatch):
    shown = tmp_path / "shared.host.12.tmp"
    shown.touch()
    ranks = rank_of_two(1, tmp_path)
    check_shared(tmp_path / "run", "--out_dir", ranks)
    names = ranks.gather(torch.tensor([[*b"".ljust(99)]]))
    shown.unlink()
    late = threading.Timer(0.3, shown.touch)  # as NFS does
    late.start()
    ranks.gather = lambda own: torch.tensor([True, *own]) if own.dtype == torch.bool else names
    check_shared(tmp_path / "run", "--out_dir", ranks)
    shown.unlink()
    monkeypatch.setattr(run, "LATE", 0.2)
    assert stop_line(check_shared, tmp_path / "run", "--out_dir", ranks) == f"{tmp_path}: rank 1 {LINE}"


# ---------------------------------------------------------------------------- two agents of torchrun

# distill.py, after a line or two of a test
DISTILL = """import os, signal
from pathlib import Path
import distill, run
from prepare import chain
{}
run.run_script(chain.distill, distill.Config, distill.PRESETS, distill.NEEDS)
"""
QUICK = "run.LATE = 2"  # a machine without the other one's files says so after two seconds, not a minute
# in folder b the worker, or its agent with it, ends by SIGKILL after step 3, once
KILL = """
tick = run.Run.tick
def killed(self, step, *values):
    tick(self, step, *values)
    if step == 3 and Path.cwd().name == "b" and not Path("killed").exists():
        Path("killed").touch()
        for pid in ({}):
            os.kill(pid, signal.SIGKILL)
run.Run.tick = killed
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def agents(folders, flags, options, first=""):
    """distill.py, after the lines `first`, under an agent of torchrun in each folder -> [(exit status, what it said)]."""
    script = folders[0].parent / "script.py"
    script.write_text(DISTILL.format(first))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/data.md
    started = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        own = [option.format(rank=rank, host=1 - rank) for option in options]
        started.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *own, str(script),
             *(f"--{name}={value}" for name, value in flags.items())], cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True))
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
    return [(process.returncode, text) for process, text in zip(started, said)]


def two_nodes():
    return ["--nnodes=2", "--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
            f"--master_port={free_port()}"]


@pytest.fixture(scope="module")
def flags(demo, teacher_run):
    return QUICK_STUDENT | dict(objective="nst+crd", train=demo / "demo-s0" / "corpus.h5", teacher=teacher_run,
                                max_steps=6, save_every=2, eval_every=2, grad_every=2, resume="auto")


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Folder of a run by two processes of one agent."""
    folder = tmp_path_factory.mktemp("whole")
    ended = agents([folder / "a"], flags | {"out_dir": folder / "run"}, ["--standalone", "--nproc_per_node=2"])
    assert ended[0][0] == 0, ended
    return folder / "run"


def assert_same(one, two):
    one, two = tensors_of(one), tensors_of(two)
    assert len(one) > 20 and one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.slow
def test_two_agents_train_what_two_processes_of_one_do(flags, whole, tmp_path):
    """Bit for bit: weights, optimizer and log."""
    ended = agents([tmp_path / "a"] * 2, flags | {"out_dir": tmp_path / "run"}, two_nodes())
    assert [status for status, text in ended] == [0, 0], ended
    assert "step" in ended[0][1] and "step" not in ended[1][1]  # only rank 0 speaks
    assert_same(whole, tmp_path / "run")
    one, two = (log_lines(folder) for folder in (whole, tmp_path / "run"))
    speed = {"tokens_per_s", "mfu", "memory_mb"}
    assert [{k: x for k, x in line.items() if k not in speed} for line in one] == [
        {k: x for k, x in line.items() if k not in speed} for line in two]


@pytest.mark.slow
@pytest.mark.parametrize("nodes, killed", [("2", "os.getpid(),"), ("1:2", "os.getppid(), os.getpid()")])
def test_elastic_agents_go_on_from_the_checkpoint(flags, whole, tmp_path, nodes, killed):
    """After the death of a worker both start it again; after that of a machine the other one goes on alone."""
    options = [f"--nnodes={nodes}", "--nproc_per_node=1", "--rdzv_backend=c10d", "--max_restarts=1",
               f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_conf=last_call_timeout=15,is_host={host}"]
    alone = ":" in nodes
    ended = agents([tmp_path / "a", tmp_path / "b"], flags | {"out_dir": tmp_path / "run"}, options,
                   KILL.format(killed))
    assert [status for status, text in ended] == [0, -9 if alone else 0], ended
    text = "".join(text for status, text in ended)
    assert "another process of the group has ended" in text and "failed to connect" not in text
    assert ("resume: ranks 2 -> 1" in text) == alone
    assert [line["step"] for line in log_lines(tmp_path / "run") if "lr" in line] == [1, 2, 3, 4, 5, 6]
    if not alone:
        assert_same(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("flag, dropped", [("--out_dir", ()), ("--data_dir", ("train", "teacher"))])
def test_agent_without_the_files_of_the_first_ends_both_in_one_line(flags, tmp_path, flag, dropped):
    """With data, before a run's folder is made; on the demo before its world is."""
    folders = [tmp_path / "a", tmp_path / "b"]
    flags = {name: value for name, value in flags.items() if name not in dropped}
    for folder, (status, text) in zip(folders, agents(folders, flags, two_nodes(), QUICK)):
        lines = [line for line in text.splitlines() if "does not see" in line]
        assert status and lines == [f"{folder}: rank 1 {LINE.replace('--out_dir', flag)}"], text
        assert text.count("Traceback") <= 1 and not list(folder.iterdir())  # torchrun's own
