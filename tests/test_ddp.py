"""Proves that 2 processes compute what 1 does: weights, optimizer, bank, evaluation, also with accumulation.

One spawned gloo group runs all jobs; the same jobs are then run in this process. Dropout is 0.
Run: python -m pytest -q tests/test_ddp.py
"""
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK_STUDENT, QUICK_TEACHER

import common
import data
import distill
import teacher

SCRIPTS = {"distill": distill, "teacher": teacher}


def jobs(corpus, videos, teacher_run, out):
    """{name: (script, flags with 2 ranks, flags with 1)}: what must give the same run."""
    shape = dict(dropout=0.0, batch_size=12)
    student = QUICK_STUDENT | shape | dict(train=corpus, teacher=teacher_run, eval_blocks=13, grad_every=2,
                                           crd_tokens=31, crd_negatives=64)
    clips = QUICK_TEACHER | shape | dict(videos=videos, val_clips=37)
    every = "soft+l2+voken+nst+crd"
    found = {
        "all objectives": ("distill", student | dict(objective=every), {}),
        "accumulation": ("distill", student | dict(objective="nst+crd", grad_accum=3), dict(grad_accum=1)),
        "sentence level, small bank": ("distill", student | dict(
            objective="crd", crd_level="sentence", crd_bank_size=20, crd_views="different"), {}),
        "sums": ("distill", student | dict(objective=every, reduction="sum", lr=1e-5), {}),
        # in-batch negatives come from the micro-batch: two ranks are like two micro-batches of one process
        "teacher": ("teacher", clips, dict(grad_accum=2)),
        "teacher, one negative": ("teacher", clips | dict(negatives="one", ct_input="clean"),
                                  dict(grad_accum=2))}
    return {name: (script, flags | {"out_dir": f"{out}/two/{name}"},
                   flags | alone | {"out_dir": f"{out}/one/{name}"})
            for name, (script, flags, alone) in found.items()}


def worker(rank, port, todo):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    update, banks = distill.update_bank, []

    def kept(student, *args):
        banks.append(student.bank)
        return update(student, *args)
    distill.update_bank = kept
    for script, flags, _ in todo.values():
        banks.clear()
        SCRIPTS[script].main(SCRIPTS[script].Config(**flags))
        world = common.init_world("cpu")
        for bank in banks[-1:]:  # bit for bit the same rows on both ranks
            for rows in (bank.z_s, bank.z_t):
                both = world.gather(rows[None])
                assert torch.equal(both[0], both[1]) and both[0].abs().sum() > 0
    common.end_world()


@pytest.fixture(scope="module")
def both(demo, teacher_run, tmp_path_factory):
    out, world = tmp_path_factory.mktemp("ddp"), demo / "demo-s0"
    todo = jobs(str(world / "corpus.h5"), str(world / "videos.h5"), str(teacher_run), out)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, todo), nprocs=2)
    for script, _, flags in todo.values():
        SCRIPTS[script].main(SCRIPTS[script].Config(**flags))
    return Path(out)


JOBS = list(jobs("", "", "", ""))


def flat(value, name=""):
    """Nested dicts and lists of a checkpoint -> {path: tensor or number}."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{name}/{i}").items()}
    return {name: value}


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_what_one_does(both, job):
    one, two = (torch.load(both / ranks / job / "checkpoint.pt", weights_only=True)
                for ranks in ("one", "two"))
    compared = 0
    for part in ("student", "model", "bank", "optimizer"):
        if part not in one:
            continue
        a, b = flat(one[part]), flat(two[part])
        assert a.keys() == b.keys()
        for key in a:
            if torch.is_tensor(a[key]):
                torch.testing.assert_close(a[key], b[key], rtol=2e-3, atol=2e-5,
                                           msg=lambda m: f"{part}{key}: {m}")
                compared += 1
    assert compared > 20


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_log_and_evaluate_what_one_does(both, job):
    one, two = (log_lines(both / ranks / job) for ranks in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert any(key.startswith("val_") for line in one for key in line)
    for a, b in zip(one, two):
        for key in a.keys() - {"tokens_per_s", "mfu", "memory_mb"}:
            if not key.startswith("gradient_"):  # of one micro-batch, and those differ in size
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)


def test_first_step_gradient_equals_one_process(both):
    """The norm of the whole gradient at step 1, to float precision: nothing was lost or added twice."""
    for job in JOBS:
        one, two = (next(line["grad_norm"] for line in log_lines(both / ranks / job) if "grad_norm" in line)
                    for ranks in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-5), job


def test_micro_rows_cover_the_global_batch_once():
    for world, accum in ((1, 1), (2, 1), (2, 3), (4, 2)):
        rows = [data.micro_rows(24, rank, world, micro, accum)
                for rank in range(world) for micro in range(accum)]
        assert sorted(np.concatenate(rows)) == list(range(24))
