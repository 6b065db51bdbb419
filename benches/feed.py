"""What the CPU feeds a GPU with: distill.py's batches of text, and the teacher's frames.

    python bench.py --only feed --json feed.json
"""
import tempfile
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

import distill
import teacher
from common import print0, table
from data import TextBlocks, VideoClips, step_batches, write_packed
from parts.feed import Feed
from parts.machine import Ranks, keep_freed_memory
from parts.vocab import SPECIALS, Vocab

STEP = 0.019  # seconds of a step of 256 x 128 tokens at 1.75 M tokens/s: 6L-512H at 40 % of an H200's peak
HELD = 0.006  # seconds of it in which Python launches kernels
TEACHER_STEP = 0.025  # seconds of the teacher's step of 64 clips
CLIPS, FRAMES, CHANNELS = 64, 130, 4096  # of that step
ONE = Ranks(0, 1, torch.device("cpu"))


def made_vocab(size):
    """A Vocab of the special tokens and made-up words."""
    return Vocab([*SPECIALS, *(f"w{i}" for i in range(size - len(SPECIALS)))])


def write_tokens(path, count, vocab):
    """Packed text of `count` random tokens."""
    rng = np.random.default_rng(0)
    write_packed(path, "text", vocab, {"tokens": rng.integers(5, vocab.size, count, vocab.dtype)})


def write_sparse(path, kind, vocab, arrays, shapes, **attributes):
    """A packed file whose datasets of `shapes`, {name: (dtype, shape)}, are zeros that take no disk."""
    write_packed(path, kind, vocab, arrays, **attributes)
    with h5py.File(path, "a") as f:
        for name, (dtype, shape) in shapes.items():
            how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            h5py.h5d.create(f.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)),
                            h5py.h5s.create_simple(shape), how)


def write_clips(path, videos, frames, vocab, channels=CHANNELS, captions=3):
    """Packed videos of `frames` frames of zeros each, whose every caption lasts as long as the video."""
    n, words = videos * captions, 40
    offsets = np.arange(videos + 1)
    write_sparse(path, "videos", vocab, {
        "video_id": np.array([f"v{i}".encode() for i in range(videos)]), "task": np.arange(videos) % 100,
        "tokens": np.full(n * words, len(SPECIALS), vocab.dtype), "token_offsets": np.arange(n + 1) * words,
        "start": np.zeros(n), "end": np.full(n, float(frames)), "caption_offsets": offsets * captions,
        "frame_offsets": offsets * frames},
        {"frames": (np.float16, (videos * frames, channels))}, d2=channels // 2, d3=channels - channels // 2)


def paced(make, ranks, items, step, steps, held=0.0, warm=5):
    """Share of the time that a loop waits for its batches, where a step takes `step` seconds and Python is
    busy for `held` of them; the first steps are left out."""
    feed, waited = Feed(make, ranks, 0, steps + warm, items), 0.0
    for i in range(steps + warm):
        if i == warm:
            began, waited = time.perf_counter(), 0.0
        start = time.perf_counter()
        feed.take(i)
        waited += time.perf_counter() - start
        start = time.perf_counter()
        while time.perf_counter() - start < held:
            pass
        time.sleep(step - held)
    took = time.perf_counter() - began
    feed.close()
    return waited / took


def times(run, seconds, least=5, warm=2, clock=time.perf_counter):
    """Seconds of each of run(0), run(1), .. for so many seconds, without the first `warm` of them."""
    found, began = [], clock()
    while len(found) < least + warm or clock() - began < seconds:
        start = clock()
        run(len(found))
        found.append(clock() - start)
    return np.array(found[warm:])


def bench_feed(cfg, device, out, count=100_000_000, clips=CLIPS, channels=CHANNELS, seconds=4.0):
    """distill.py's batches, 256 x 128, nst+crd, from 100 M packed tokens; teacher.py's, 64 clips."""
    vocab, ranks = made_vocab(cfg.vocab), Ranks(0, 1, device)
    keep_freed_memory()  # as the scripts do; a GPU's batches lie in page-locked memory, which is kept, too
    with tempfile.TemporaryDirectory() as folder:
        text, videos = Path(folder) / "text.h5", Path(folder) / "videos.h5"
        write_tokens(text, count, vocab)
        write_clips(videos, 4 * clips, FRAMES, vocab, channels)
        student = distill.Config(**distill.PRESETS["paper"], objective="nst+crd", train=str(text))
        pupil = teacher.Config(**teacher.PRESETS["paper"] | dict(batch_size=clips), videos=str(videos))
        words = partial(step_batches, TextBlocks(student.train, student.block_size), student, ranks,
                        partial(distill.make_batch, pad=True))  # as for a GPU
        packed = VideoClips(pupil.videos, pupil.block_size, pinned=device.type == "cuda")
        shown = partial(step_batches, packed, pupil, ranks, teacher.make_batch)
        took, steps = times(words, seconds), max(3, int(seconds / TEACHER_STEP))
        waits = [paced(words, ranks, distill.ITEMS, STEP, steps, held) for held in (0, HELD)]
        took_clips = times(shown, seconds)
        waits.append(paced(shown, ranks, teacher.ITEMS, TEACHER_STEP, steps, HELD))
    tokens, size = student.batch_size * student.block_size, clips * FRAMES * channels * 2
    rows = {"text": (f"{student.batch_size} x {student.block_size} tokens, M tokens/s", tokens, took, STEP),
            "frames": (f"{clips} x {FRAMES} frames x {channels}, MB/s", size, took_clips, TEACHER_STEP)}
    lines = [["a batch", "ms", "min .. max", "reached", "needed"]]
    for name, (what, amount, seconds, step) in rows.items():
        reached, needed = amount / 1e6 / np.median(seconds), amount / 1e6 / step
        ms = 1e3 * seconds
        lines.append([what, f"{np.median(ms):.2f}", f"{ms.min():.2f} .. {ms.max():.2f}", f"{reached:,.1f}",
                      f"{needed:,.1f}"])
        unit = "mtokens" if name == "text" else "mb"
        out |= {f"feed.{name}_{unit}_per_s": float(reached), f"feed.{name}_{unit}_per_s_needed": needed}
    out |= {"feed.wait_share": waits[0], "feed.wait_share_held": waits[1], "feed.frames_wait_share": waits[2]}
    print0(f"{table(lines)}\nMB are of float16, read from memory here: a disk has to deliver as many\n"
           f"share of the time that the loop waits: {100 * waits[0]:.1f} % at steps of {1e3 * STEP:.0f} ms, "
           f"{100 * waits[1]:.1f} % where Python is busy for {1e3 * HELD:.0f} ms of them;\n"
           f"with frames, at steps of {1e3 * TEACHER_STEP:.0f} ms, {100 * waits[2]:.1f} %")
