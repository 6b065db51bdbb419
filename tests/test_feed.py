"""Proves how a loop is fed: batches ahead of their steps, one message a step between ranks, no wait for the device.

Run: python -m pytest -q tests/test_feed.py
"""
import gc
import threading
import weakref

import pytest
import torch
from test_ddp import QUICK_ADAPTATION, pairs_and_tower
from torch.utils._python_dispatch import TorchDispatchMode

import adapt_xdbert
import distill
import finetune
import teacher
from parts.feed import AHEAD, Feed
from parts.machine import Ranks
from run import Run

ALONE = Ranks(0, 1, torch.device("cpu"))


def numbered(step):
    """A step of two micro-batches of step + 1 and step + 2 items."""
    return step, [{"x": torch.full((step + 1,), step)}, {"x": torch.full((step + 2,), step)}]


ITEMS = {"x": lambda batch: len(batch["x"]), "none": lambda batch: 0}


@pytest.mark.parametrize("first, last", [(0, 5), (3, 5), (4, 5), (5, 5)])
def test_batches_come_in_order_with_their_items(first, last):
    feed = Feed(numbered, ALONE, first, last, ITEMS)
    for step in range(first, last):
        index, batches, items = feed.take(step)
        assert index == step and [len(batch["x"]) for batch in batches] == [step + 1, step + 2]
        assert items == {"x": 2 * step + 3, "none": 1}  # what divides must not be 0
    feed.close()


def test_batches_are_made_ahead_and_by_one_thread():
    made, go = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread()))
        assert step < AHEAD or go.wait(60)
        return numbered(step)
    feed = Feed(make, ALONE, 0, 9, ITEMS)
    feed.thread.submit(int).result()  # the thread does one after the other
    assert [step for step, _ in made] == list(range(AHEAD))
    go.set()
    for step in range(4):
        feed.take(step)
    feed.thread.submit(int).result()
    assert [step for step, _ in made] == list(range(4 + AHEAD))
    assert {thread for _, thread in made} != {threading.current_thread()} and len({t for _, t in made}) == 1
    feed.close()
    assert not made[0][1].is_alive()


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_what_making_raises_ends_the_loop(wrong):
    def make(step):
        if step == wrong:
            raise SystemExit("corpus.h5: damaged")
        return numbered(step)
    with pytest.raises(SystemExit, match="corpus.h5: damaged"):
        feed = Feed(make, ALONE, 0, 5, ITEMS)
        for step in range(5):
            feed.take(step)


def test_time_and_signals_are_asked_for_once_a_step():
    wishes = iter([(0, 0), (1, 0), (0, 1)])
    feed = Feed(numbered, ALONE, 0, 3, ITEMS, lambda: next(wishes))
    assert feed.wished() == (0, 0)
    feed.take(0)
    assert feed.wished() == (1, 0) and feed.wished() == (0, 1)
    feed.close()


def test_a_run_that_has_left_its_loop_is_let_go_of():
    """Without waiting for the collector of cycles: its model, optimizer and bank are large."""
    class Books:
        def wishes(self):
            return 0, 0

        def make(self, step):
            return numbered(step)
    books = Books()
    books.feed = Feed(books.make, ALONE, 0, 2, ITEMS, books.wishes)
    gone = weakref.ref(books)
    for step in range(2):
        books.feed.take(step)
    books.feed.close()
    gc.disable()
    try:
        del books
        assert gone() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------- whole steps of all scripts


class Reads(TorchDispatchMode):
    """Lists the operators for which a GPU's host would wait for its queue: numbers of tensors, and shapes that hang on
    values. Of this thread alone: the feed's tensors are the host's. A copy to the host is none on a CPU: .cpu(), .tolist()
    and .numpy() are seen by test_gpu.py alone."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = name.startswith("aten::index") and any(
            torch.is_tensor(x) and x.dtype == torch.bool for x in (args[1] if isinstance(args[1], (list, tuple)) else ()))
        if masks or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
                             "aten::unique_consecutive", "aten::_unique2", "aten::repeat_interleave.Tensor"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def scripts(request, demo, teacher_run, tmp_path):
    """{script: function of flags that runs it for six steps, with one line of the log}."""
    six = dict(max_steps=6, log_every=6, save_every=6)

    def run(script, config, **flags):
        return lambda **more: script.main(config(**six | flags | more))

    def adapt(**flags):
        train, clip = pairs_and_tower(demo / "demo-s0", tmp_path)
        return adapt_xdbert.Config(**QUICK_ADAPTATION | dict(train=train, clip=clip, language=str(teacher_run),
                                                             out_dir=str(tmp_path / "adapt")) | flags)
    return {"teacher": run(teacher, request.getfixturevalue("teacher_config"), eval_every=6),
            "distill": run(distill, request.getfixturevalue("distill_config"), eval_every=6, grad_every=6,
                           objective="soft+l2+voken+nst+crd", crd_bank_size=9),
            "adapt": run(adapt_xdbert, adapt, eval_every=6, grad_every=6, objective="mlm+match+cliptc+itc"),
            "finetune": run(finetune, request.getfixturevalue("finetune_config"), tasks="rte")}


@pytest.mark.parametrize("name", ["teacher", "distill", "adapt", "finetune"])
def test_no_operator_of_a_whole_step_waits_for_the_device(scripts, monkeypatch, name):
    """From one step's batch to the next one's, between two lines of the log; the first step measures gradients."""
    reads, seen, take = Reads(), [], Run.take

    def noted(self, step):
        seen.append(list(reads.found))
        reads.found.clear()
        return take(self, step)
    monkeypatch.setattr(Run, "take", noted)
    with reads:
        scripts[name]()
    assert len(seen) == 6
    assert seen[2:] == [[]] * 4, seen
