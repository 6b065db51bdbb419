"""Shared fixtures. Run from the project's root: python -m pytest -q"""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models here are tiny: a second thread costs more than it brings


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than a few seconds; runs where CI is set, or with -m slow")


def pytest_collection_modifyitems(config, items):
    if os.environ.get("CI") or config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: set CI=1 or give -m slow"))


@pytest.fixture(scope="session")
def real_data():
    """Folder of real corpora in their official layouts; tests that need it are skipped without it."""
    folder = Path(os.environ.get("NANOGROUND_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set NANOGROUND_DATA")
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo world of seed 0, built once for the whole suite; returns the folder that holds demo-s0."""
    import data
    folder = tmp_path_factory.mktemp("data")
    data.make_demo(folder / "demo-s0", seed=0)
    return folder


# a run that takes a second: every step logged, nothing evaluated but at the ends
QUICK = dict(max_steps=4, warmup_steps=1, log_every=1, eval_every=4, save_every=4, device="cpu", batch_size=8,
             layers=1, hidden=32, heads=2, intermediate=64, block_size=24)
QUICK_TEACHER = QUICK | dict(val_clips=40, stop_on="loss", vokens=9)
QUICK_STUDENT = QUICK | dict(eval_blocks=11, grad_every=4, crd_tokens=19, crd_negatives=32, crd_dim=16)


@pytest.fixture(scope="session")
def teacher_run(demo, tmp_path_factory):
    """A teacher of a few steps on the demo world; returns its run folder."""
    import teacher
    folder = tmp_path_factory.mktemp("teacher") / "run"
    teacher.main(teacher.Config(**QUICK_TEACHER, videos=str(demo / "demo-s0" / "videos.h5"),
                                out_dir=str(folder)))
    return folder


@pytest.fixture
def teacher_config(demo, tmp_path):
    """teacher.Config for a run of a second on the demo's packed clips; flags as keywords."""
    import teacher

    def config(**flags):
        paths = dict(videos=str(demo / "demo-s0" / "videos.h5"), out_dir=str(tmp_path / "run"))
        return teacher.Config(**(QUICK_TEACHER | paths | flags))
    return config


@pytest.fixture
def distill_config(demo, teacher_run, tmp_path):
    """distill.Config for a run of a second on the demo's packed text, with teacher_run; flags as keywords."""
    import distill

    def config(**flags):
        paths = dict(train=str(demo / "demo-s0" / "corpus.h5"), teacher=str(teacher_run),
                     out_dir=str(tmp_path / "run"))
        return distill.Config(**(QUICK_STUDENT | paths | flags))
    return config
