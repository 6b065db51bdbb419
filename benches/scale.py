"""How time and memory grow with the size of a job. Each size runs in a process of its own.

    python bench.py --only scale --json scale.json

Time is that of the CPU, on one core: other work does not count, nor does waiting for a disk. Memory is what
the process's own (anonymous) resident memory grows by at most: pages of memory maps, which the system drops
when memory is short, do not count. Exponents are slopes of least squares in log-log.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import distill
import losses
from benches.feed import CHANNELS, ONE, made_vocab, times, write_clips, write_sparse, write_tokens
from common import keyed_integers, print0, progress, table
from data import TextBlocks, VideoClips, step_batches
from model import BERT, MLMHead, VideoEncoder, model_config
from parts.machine import keep_freed_memory, peak_memory_mb
from parts.metrics import nearest
from parts.weights import save_bert
from prepare.packing import pack_videos, read_captions

ROOT = Path(__file__).resolve().parent.parent
NOISE = 0.002  # seconds: runs below are not fitted
LINEAR, FLAT = 1.1, 0.1  # exponents up to these count as linear, and as flat
CORPUS = ("start", "tokens", "clips", "videos")  # what must take the same memory for a corpus of any size
LEAST = 16.0  # MB: what is below, buffers and the allocator's rounding, counts as much


class Growth:
    """`mb` after the block: by how many MB the process's own memory had grown at most."""

    def __enter__(self):
        self.before, self.most, self.over = own_mb(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.005):
            self.most = max(self.most, own_mb())

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        self.mb = max(self.most, own_mb()) - self.before


def own_mb():
    """MB of anonymous resident memory; on systems that do not tell, the peak of all resident memory."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6
    except (OSError, StopIteration):
        return peak_memory_mb(ONE.device)


# ---------------------------------------------------------------------------- what grows
#
# make_<what>(folder, n) writes what a job reads; <what>(folder, n) -> {what grows: {"units": into which its
# time is divided, "seconds" of the CPU, "mb"}}

cpu_times = partial(times, clock=time.process_time)


def make_tokens(folder, n):
    vocab = made_vocab(30522)
    write_sparse(folder / "text.h5", "text", vocab, {}, {"tokens": (vocab.dtype, (n,))})


def tokens(folder, n, steps=40):
    """Packed text: opening it, reading the file once, then all its tokens by distill.py's batches.

    `steps` batches are timed and scaled; once the file has been read it is in memory, as from the second
    epoch on where it fits.
    """
    path = folder / "text.h5"
    cfg = distill.Config(**distill.PRESETS["paper"], objective="nst+crd", train=str(path))
    with Growth() as memory:
        start = time.process_time()
        blocks = TextBlocks(cfg.train, cfg.block_size)
        opened = time.process_time() - start
        with open(path, "rb", 0) as f:
            part = bytearray(1 << 20)
            while f.readinto(part):
                pass
        read = time.process_time() - start
        step = cpu_times(partial(step_batches, blocks, cfg, ONE, distill.make_batch), 0.5, steps).min()
    return {"start": {"units": 1, "seconds": opened, "mb": memory.mb},
            "tokens": {"units": n, "seconds": read + n * step / (cfg.batch_size * cfg.block_size),
                       "mb": memory.mb}}


def bank(folder, n, batch=256, anchors=512, dim=128, steps=20):
    """CRD's bank of n rows: a step's draw, loss with gradients, and update, at the paper preset's sizes."""
    with Growth() as memory:
        rows = losses.CRDBank(n, dim, 4096)
        for start in range(0, n, 1024):
            index = np.arange(start, min(start + 1024, n))
            rows.update(index, *torch.randn(2, len(index), dim))
        z = [F.normalize(x, dim=-1).requires_grad_() for x in torch.randn(2, anchors, dim)]

        def step(i):
            slots = keyed_integers(n, "scale", i, np.arange(anchors))
            drawn = rows.draw(keyed_integers, 0, i)
            if rows.log_z is None:
                rows.set_z(*(x.detach() for x in z), slots, drawn)
            torch.autograd.grad(losses.crd(*z, slots, rows, drawn), z)
            rows.update(slots[:batch], *(x.detach()[:batch] for x in z))
        took = cpu_times(step, 0.5, steps).min()
    return {"bank": {"units": 1, "seconds": took, "mb": memory.mb}}  # a step's


def clips(folder, n, queries=256, dim=64):
    """Exact search for the nearest of n clips; its memory is on top of queries and clips."""
    query, target = torch.randn(min(n, queries), dim), torch.randn(n, dim)
    nearest(query[:2], target[:2])
    with Growth() as memory:
        took = cpu_times(lambda i: nearest(query, target), 0.5, 2, 1).min()
    return {"clips": {"units": len(query) * n, "seconds": took, "mb": memory.mb}}


def make_frames(folder, n, channels=CHANNELS, videos=32):
    write_clips(folder / "videos.h5", videos, n, made_vocab(1000), channels)


def frames(folder, n, clips=96):
    """A batch of 96 clips of n frames: of 64 frames on, more than a CPU's cache holds."""
    packed = VideoClips(str(folder / "videos.h5"), 16)
    with Growth() as memory:
        took = cpu_times(lambda i: packed.batch(np.arange(clips) % len(packed)), 0.5, 10).min()
    return {"frames": {"units": clips * n, "seconds": took, "mb": memory.mb}}


def make_packing(folder, n, channels=CHANNELS, videos=8):
    for name, count in (("feat2d", n), ("feat3d", -(-3 * n // 2))):
        (folder / name).mkdir()
        for video in range(videos):
            np.save(folder / name / f"v{video}.npy", np.ones((count, channels // 2), np.float32))
    rows = {f"v{i}": {"start": [0], "end": [n], "text": ["w1 w2 w3"]} for i in range(videos)}
    (folder / "caption.json").write_text(json.dumps(rows))
    (folder / "videos.csv").write_text("video_id,task_id\n" + "".join(f"{name},1\n" for name in rows))


def packing(folder, n, videos=8):
    """8 videos of n frames into one file."""
    vocab = made_vocab(1000)
    sources = folder / "caption.json", folder / "feat2d", folder / "videos.csv"
    with Growth() as memory:
        took = cpu_times(lambda i: pack_videos(*sources, vocab, folder / f"{i}.h5", folder / "feat3d"), 0, 2,
                         1).min()
    return {"packing": {"units": videos * n, "seconds": took, "mb": memory.mb}}


def encoder(folder, n, shape="6L-512H"):
    """The video encoder forward on one clip of n frames."""
    model, clip = VideoEncoder(model_config(shape, 30522), CHANNELS, n).eval(), torch.randn(1, n, CHANNELS)
    with Growth() as memory, torch.no_grad():
        took = cpu_times(lambda i: model(clip), 0.5, 3).min()
    return {"encoder": {"units": n, "seconds": took, "mb": memory.mb}}


def make_videos(folder, n):
    row = json.dumps({"start": [0.5, 4.25], "end": [4.0, 9.5],
                      "text": ["so now we are going to", "put the dough into the pan"]})
    with open(folder / "caption.json", "w") as f:
        f.write("{")
        f.writelines(f'{"," * (i > 0)} "v{i:010d}": {row}' for i in range(n))
        f.write("}")


def videos(folder, n):
    """One caption.json of n videos, read to its end."""
    with Growth() as memory:
        start = time.process_time()
        found = sum(1 for _ in read_captions(folder / "caption.json"))
        took = time.process_time() - start
    assert found == n, f"{found} videos of {n}"
    return {"videos": {"units": n, "seconds": took, "mb": memory.mb}}


GROWING = {"tokens": (10 ** 6, 10 ** 7, 10 ** 8, 10 ** 9, 3 * 10 ** 9), "bank": (10 ** 4, 10 ** 5, 10 ** 6),
           "clips": (10 ** 3, 10 ** 4, 10 ** 5, 10 ** 6), "frames": (1, 8, 64, 256, 512),
           "packing": (1, 8, 64, 256, 512), "encoder": (64, 256, 512),
           "videos": (10 ** 3, 10 ** 4, 10 ** 5, 1_200_000)}  # what: its sizes
MAKE = {"tokens": make_tokens, "frames": make_frames, "packing": make_packing, "videos": make_videos}
JOBS = {"tokens": tokens, "bank": bank, "clips": clips, "frames": frames, "packing": packing,
        "encoder": encoder, "videos": videos}
# of what grows: what its size counts, and of what the time is told
NAMES = {"start": ("opening packed text, tokens", "start"), "tokens": ("reading all of it, tokens", "token"),
         "bank": ("CRD's bank, rows", "step"),
         "clips": ("exact search, clips", "query and clip"), "frames": ("reading clips, frames", "frame"),
         "packing": ("packing videos, frames", "frame"), "videos": ("one caption file, videos", "video"),
         "encoder": ("video encoder, frames", "frame")}


def exponents(rows):
    """(of time, of memory): the slopes of their logarithms over that of the size, by least squares.

    rows: {size: {"seconds", "mb"}}. Time: over the sizes that take NOISE or more, but at least the three
    largest. Memory: over the three largest, since buffers fill up before; below LEAST it counts as LEAST.
    """
    sizes = np.log(list(rows))
    time, memory = (np.array([row[key] for row in rows.values()]) for key in ("seconds", "mb"))
    first = min(int((time < NOISE).sum()), max(0, len(rows) - 3))
    return (float(np.polyfit(sizes[first:], np.log(time[first:]), 1)[0]),
            float(np.polyfit(sizes[-3:], np.log(np.maximum(memory[-3:], LEAST)), 1)[0]))


# ---------------------------------------------------------------------------- communication


def counted_steps(folder, steps):
    """distill.py's run of so many steps -> Counter of its collectives, and of the bytes that a rank gives."""
    found = Counter()

    def note(name, tensor):
        found[f"{name}s"] += 1
        found[f"{name} bytes"] += tensor.nbytes

    def counting(name, function, place):
        def run(*args, **kwargs):
            note(name, args[place])
            return function(*args, **kwargs)
        return run

    def gradients(group, bucket):
        note("gradient", bucket.buffer())
        found.subtract({"all_reduces": 1, "all_reduce bytes": bucket.buffer().nbytes})  # the hook's own
        return allreduce_hook(group, bucket)

    class Counted(distill.DistributedDataParallel):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_comm_hook(None, gradients)
    kept = [(dist, name, getattr(dist, name)) for name in ("all_reduce", "all_gather", "broadcast")]
    kept.append((distill, "DistributedDataParallel", distill.DistributedDataParallel))
    try:
        for _, name, function in kept[:-1]:
            setattr(dist, name, counting(name, function, name == "all_gather"))
        distill.DistributedDataParallel = Counted
        distill.main(distill.Config(
            objective="nst+crd", train=str(folder / "text.h5"), teacher=str(folder / "teacher"),
            model="1L-64H", block_size=16, batch_size=32, crd_tokens=64, crd_negatives=16, eval_blocks=8,
            max_steps=steps, warmup_steps=1, log_every=1000, grad_every=1000, eval_every=1000,
            save_every=1000, device="cpu",
            out_dir=str(folder / f"run-{dist.get_world_size() if dist.is_initialized() else 1}-{steps}")))
    finally:
        for place, name, function in kept:
            setattr(place, name, function)
    return found


def make_ranks(folder):
    """Packed text and a teacher for counted_steps."""
    vocab, config = made_vocab(300), model_config("1L-64H", 300)
    write_tokens(folder / "text.h5", 20_000, vocab)
    bert = BERT(config)
    save_bert(bert, folder / "teacher", vocab, MLMHead(config.hidden, bert.embeddings.word.weight))


def ranks(folder, n):
    """What a step of distill.py sends, in a group of n processes: the longer of two runs less the shorter."""
    few, many = (counted_steps(folder, steps) for steps in (2, 6))
    return {"ranks": {name: (many[name] - few[name]) / 4 for name in sorted(many) if many[name] > few[name]}}


# ---------------------------------------------------------------------------- section


def children(what, n, folder, processes=1):
    """What `python -m benches.scale` of these arguments found, in a group of so many processes."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [subprocess.Popen([sys.executable, "-m", "benches.scale", what, str(n), str(folder)], cwd=ROOT,
                                env=environment | {"RANK": str(rank)} if processes > 1 else environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for rank in range(processes)]
    said = [process.communicate() for process in started]
    for process, (_, error) in zip(started, said):
        if process.returncode:
            raise SystemExit(f"scale: {what} of {n:,} failed: {(error.strip().splitlines() or ['?'])[-1]}")
    return json.loads(said[0][0].splitlines()[-1])


def scaled(seconds):
    """A time in the unit that suits it."""
    unit, size = next(((unit, size) for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6))
                       if seconds >= size), ("ns", 1e-9))
    return f"{seconds / size:.3g} {unit}"


def bench_scale(cfg, device, out, growing=GROWING, run=children):
    """Sizes of `growing`, {what: sizes}, and what 1 and 2 ranks send in a step."""
    found, jobs = {}, [(what, n) for what, sizes in growing.items() for n in sizes]
    for what, n in progress(jobs, len(jobs), " sizes", "scale"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if what in MAKE:
                MAKE[what](folder, n)
            for part, row in run(what, n, folder).items():
                found.setdefault(part, {})[n] = row
    lines = [["", "size", "CPU time", "for one", "", "memory MB"]]
    for part, rows in found.items():
        name, unit = NAMES[part]
        for n, row in rows.items():
            lines.append([name, f"{n:,}", scaled(row["seconds"]), scaled(row["seconds"] / row["units"]), unit,
                          f"{row['mb']:.1f}"])
            name = ""
        time_slope, memory_slope = exponents(rows)
        lines.append(["", "exponent", f"{time_slope:.2f}", "", "", f"{round(memory_slope, 2) + 0.0:.2f}"])
        out |= {f"scale.{part}.time_exponent": time_slope, f"scale.{part}.memory_exponent": memory_slope,
                f"scale.{part}.sizes": {str(n): row for n, row in rows.items()}}
    worse = [f"{what} of {NAMES[part][0]}" for part in found for what, most, judged in (
        ("time", LINEAR, part != "encoder"), ("memory", FLAT, part in CORPUS))
        if judged and out[f"scale.{part}.{what}_exponent"] > most]
    print0(f"{table(lines)}\nabove {LINEAR} in time, or above {FLAT} in memory that grows with a corpus: "
           + (", ".join(worse) or "nothing"))
    with tempfile.TemporaryDirectory() as name:
        make_ranks(Path(name))
        for n in (1, 2):
            sent = run("ranks", n, Path(name), n)["ranks"]
            out[f"scale.ranks.{n}"] = sent
            print0(f"{n} rank{'s' * (n > 1)}: a step sends " + (", ".join(
                f"{value:,.0f} {key}" for key, value in sent.items()) or "nothing"))


if __name__ == "__main__":
    keep_freed_memory()  # as the scripts do
    found = JOBS.get(sys.argv[1], ranks)(Path(sys.argv[3]), int(sys.argv[2]))
    print(json.dumps(found, default=float), flush=True)
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)  # gloo's threads could abort the process's end
