"""Books of a training run: processes, seeds, schedule, folder, log, checkpoints, interruption.

It never calls a model: each script writes out its own loop.
"""
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import duration, hash64, parse_cli, print0, write_json

# ---------------------------------------------------------------------------- processes and device


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all: rank of world, and its device. `main` is the one that prints and writes."""
    rank: int
    size: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        if self.size > 1:
            self.sum(torch.zeros(1))

    def sum(self, tensor):
        """Sum over the ranks, in place (CPU tensors by gloo, CUDA tensors by nccl); returns the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """(n, ...) of each rank, n alike -> (size n, ...) in the order of ranks, equal on all of them."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def any(self, flag):
        """True on every rank where it is true on one of them, so that all leave the loop at the same step."""
        return bool(self.sum(torch.tensor([float(flag)])).item() > 0)


def init_world(device="auto"):
    """torchrun's environment -> World; one process without torchrun. Called again it finds the same group."""
    if device not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if not use_cuda:
        keep_freed_memory()
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    if use_cuda:
        if local >= torch.cuda.device_count():
            raise SystemExit(f"torchrun started process {local} but there are {torch.cuda.device_count()} "
                             "GPUs; lower --nproc_per_node")
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = True
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, torch.device("cuda", local) if use_cuda else torch.device("cpu"))


def keep_freed_memory(keep=True):
    """Has glibc keep what is freed, or not, its default: then large tensors return to the system, and every
    step faults their pages in again."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0 if keep else 2 ** 16)
    mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1 if keep else 2 ** 17)


def return_freed_memory():
    """Gives what is freed back to the system once: between runs, whose tensors have other sizes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def end_world():
    """Leaves the process group; for the end of a script."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_script(main, Config, presets):
    """A script as a command: flags, main, end of the process group; one line where memory or disk is full."""
    cfg = parse_cli(Config, presets)
    try:
        main(cfg)
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except Exception as error:
        text = str(error)
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or \
                "can't allocate memory" in text or "not enough memory" in text:
            raise SystemExit(f"out of memory: lower --batch_size {cfg.batch_size}, or raise --grad_accum to "
                             "run it in smaller parts; --resume goes on from the checkpoint") from None
        if "No space left on device" in text:
            raise SystemExit(f"disk full ({text}): free space, then go on with --resume") from None
        if isinstance(error, BrokenPipeError):  # of `| head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        if isinstance(error, OSError) and error.filename:
            raise SystemExit(f"{error.filename}: {error.strerror}") from None
        raise
    finally:
        end_world()


# ---------------------------------------------------------------------------- seeds, schedule and speed


def set_seed(seed, rank):
    """Seeds torch: with rank 0 before the weights are drawn, with 1 + the rank before the loop (dropout)."""
    torch.manual_seed(int(hash64("torch", seed, rank) >> np.uint64(1)))


def lr_at(step, lr, warmup_steps, max_steps):
    """Linear warm-up from lr / warmup to lr, then linear decay to 0 at max_steps (Devlin et al. 2019)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))


# dense peak of one device in TFLOP/s: (name in torch.cuda.get_device_name, bf16 or fp16, fp32 through TF32)
PEAK_TFLOPS = (("GH200", 989, 494), ("H200", 989, 494), ("H100 PCIe", 756, 378), ("H100", 989, 494),
               ("B200", 2250, 1100), ("A100", 312, 156), ("A800", 312, 156), ("L40S", 362, 183),
               ("L4", 121, 60), ("A10", 125, 62), ("RTX 4090", 165, 83), ("RTX 3090", 71, 36),
               ("V100", 125, 15.7), ("T4", 65, 8.1), ("2080 Ti", 54, 13.4))


@functools.cache
def peak_flops(device, dtype):
    """FLOP/s that MFU is counted against: a GPU's data sheet, or a matmul timed now on a CPU; 0 = unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, half, single in PEAK_TFLOPS:
            if part in name:
                return 1e12 * (single if dtype == torch.float32 else half)
        return 0.0
    a, best = torch.randn(768, 768, dtype=dtype, generator=torch.Generator().manual_seed(0)), math.inf
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768 ** 3 / best


def move(batch, device):
    """Dict of CPU tensors -> the device, from pinned memory and without waiting where that is a GPU."""
    if device.type == "cpu":
        return batch
    return {k: v.pin_memory().to(device, non_blocking=True) if torch.is_tensor(v) else v
            for k, v in batch.items()}


def peak_memory_mb(device):
    """Highest memory so far: allocated on the GPU, or the process's resident set, in MB (1e6 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def step_line(step, terms, lr, speed, tokens, mfu, seconds_left):
    """The line printed after a window. terms: {name: mean}; speed in steps a second, 0 while warming up."""
    parts = [f"step {step:6d}", *(f"{name} {value:.4f}" for name, value in terms.items()), f"lr {lr:.1e}"]
    if speed:
        parts += [f"{1e3 / speed:.0f} ms", f"{speed * tokens / 1e3:.1f}k tokens/s", f"mfu {100 * mfu:.0f}%"]
    return "  ".join([*parts, f"eta {duration(seconds_left)}"])


# ---------------------------------------------------------------------------- the run's folder


def micro_batch_size(cfg, world):
    """Samples of a micro-batch: cfg.batch_size by ranks and cfg.grad_accum, which must divide it."""
    parts = world.size * cfg.grad_accum
    if cfg.batch_size % parts:
        raise SystemExit(f"--batch_size {cfg.batch_size} is not a multiple of {world.size} ranks x "
                         f"{cfg.grad_accum} micro-batches; try {math.ceil(cfg.batch_size / parts) * parts}")
    return cfg.batch_size // parts


def open_run(folder, cfg, world, hashes):
    """Makes the run's folder with config.json; an older run of the same name is moved to folder.1, .2, ...

    cfg: the Config (with cfg.resume the folder stays); hashes: {what: hash} of the data and models it reads.
    """
    folder = Path(folder)
    if world.main:
        if folder.exists() and not cfg.resume:
            n = next(i for i in range(1, 10 ** 6) if not folder.with_name(f"{folder.name}.{i}").exists())
            try:
                changed = changed_flags(json.loads((folder / "config.json").read_text())["config"], cfg)
            except (OSError, ValueError, KeyError):
                changed = []
            folder.rename(folder.with_name(f"{folder.name}.{n}"))
            because = f" ({', '.join(changed)})" if changed else ""
            print0(f"{folder} exists: moved to {folder}.{n}{because}")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {
            "config": dataclasses.asdict(cfg), "command": sys.argv, "git": git_state(), "hashes": hashes,
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__),
                         "numpy": np.__version__},
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            "ranks": world.size, "threads": torch.get_num_threads()})
    world.barrier()
    return folder


def finished_run(folder, cfg, hashes, free=()):
    """The run's results where `folder` holds a FINISHED run of the same configuration and data, else None.

    free: flags that may differ, beside those of `same_run`.
    """
    try:
        results = json.loads((Path(folder) / "results.json").read_text())
        before = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return results if "finished" in results and same_run(before, cfg, hashes, free) else None


def unfinished_run(folder, cfg, hashes, free=()):
    """Whether `folder` holds a checkpoint of the same flags and data, from which a killed run can go on."""
    try:
        before = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return same_run(before, cfg, hashes, free) and any(Path(folder).glob("checkpoint.pt*"))


def same_run(before, cfg, hashes, free=()):
    """Whether a run's config.json has the same data and the same flags of those that change its result."""
    return before["hashes"] == hashes and not changed_flags(before["config"], cfg, free)


def changed_flags(before, cfg, free=()):
    """["--lr was 0.1", ...]: flags that differ from a run's and can change its result."""
    free = {"out_dir", "resume", "eval_only", "device", "max_minutes", "log_every", "save_every", "data_dir",
            "save_models", *free}
    return [f"--{name} was {before.get(name)}" for name, value in dataclasses.asdict(cfg).items()
            if name not in free and before.get(name) != value]


def git_state():
    """{commit, dirty} of the code, or nothing outside a git checkout."""
    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout
    if shutil.which("git") is None or not (commit := git("rev-parse", "HEAD").strip()):
        return {}
    return {"commit": commit, "dirty": bool(git("status", "--porcelain").strip())}


def model_folder(path, flag):
    """The model's folder from a run's folder or the model's own; `flag` is named where there is neither."""
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").exists() and not (folder / "log.jsonl").exists():
            return folder
    raise SystemExit(f"{flag} {path}: no model there; give the folder of a finished run, or one with "
                     "config.json and model.safetensors")


def file_hash(folder):
    """SHA-256 of a model folder's weights, or of a file, for what a run was trained with."""
    names = "", "model.safetensors", "pytorch_model.bin"
    path = next((Path(folder) / name for name in names if (Path(folder) / name).is_file()), None)
    if path is None:
        raise SystemExit(f"{folder}: has no {' and no '.join(names[1:])}; fetch one of them")
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


class Log:
    """log.jsonl, one line a window of steps. lines: how many a resumed run keeps, those of its checkpoint."""

    def __init__(self, folder, world, lines=0):
        self.path, self.main, self.lines = Path(folder) / "log.jsonl", world.main, lines
        if self.main:
            old = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            self.path.write_text("".join(old[:lines]))

    def write(self, **values):
        self.lines += 1
        if self.main:
            with self.path.open("a") as f:
                f.write(json.dumps(values) + "\n")


# ---------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder, state, world, name="checkpoint.pt"):
    """Atomic: written beside, flushed, renamed; the one before is kept as *.prev.

    state: tensors and plain containers only. Each rank's RNG state is added, so that dropout goes on as if
    nothing had happened.
    """
    rng = torch.get_rng_state() if world.device.type == "cpu" else torch.cuda.get_rng_state(world.device)
    rng = world.gather(rng[None])
    if not world.main:
        return
    path = Path(folder) / name
    part = path.with_name(name + ".tmp")
    state = state | {"rng": rng, "ranks": world.size, "threads": torch.get_num_threads(),
                     "torch": str(torch.__version__), "device": world.device.type,
                     "instructions": torch.backends.cpu.get_cpu_capability()}
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            os.replace(path, path.with_name(name + ".prev"))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # a full disk comes as either, by torch version
        part.unlink(missing_ok=True)
        kept = next((p for p in (path, path.with_name(name + ".prev")) if p.exists()), None)
        raise SystemExit(f"{path}: could not be written ({error}); free disk space, then go on with --resume"
                         + (f" from {kept}" if kept else "")) from None


def load_checkpoint(folder, world, name="checkpoint.pt"):
    """The newest checkpoint of the run that reads whole, on the CPU; says so where the newest was damaged."""
    folder = Path(folder)
    for path in (folder / name, folder / (name + ".prev")):
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise ValueError(f"checksum of {broken} differs")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes torch raise
            print0(f"{path} is damaged ({str(error).splitlines()[0]}); trying the one before it")
    raise SystemExit(f"no readable checkpoint in {folder}; start anew without --resume or --eval_only "
                     "(finetune.py: with --resume false)")


def check_finite(values, first, names, folder):
    """Stops the run where a loss is NaN or infinite.

    values: (window, terms), row = step % window; first: the window's first step.
    """
    bad = (~torch.isfinite(values)).nonzero().tolist()
    if bad:
        row, column = bad[0]
        step, value = first + (row - first) % len(values), values[row, column].item()
        raise SystemExit(f"the {names[column]} loss is {value} at step {step}; {last_good(folder)}")


def check_weights(model, step, folder):
    """Stops the run where an update left NaN or infinity in the weights: they must not be saved as good."""
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise SystemExit(f"the weight {bad[0]} is not finite after step {step}; {last_good(folder)}")


def last_good(folder):
    """What to do after a NaN: names the checkpoint to go on from."""
    paths = Path(folder) / "checkpoint.pt", Path(folder) / "checkpoint.pt.prev"
    kept = next((path for path in paths if path.exists()), None)
    return (f"the last good checkpoint is {kept}; go on from it with --resume and a lower --lr" if kept else
            "start anew with a lower --lr")


def restore_rng(state, world):
    """RNG of this rank from a checkpoint; a note where the run cannot go on bit for bit."""
    now = {"ranks": world.size, "threads": torch.get_num_threads(), "torch": str(torch.__version__),
           "device": world.device.type, "instructions": torch.backends.cpu.get_cpu_capability()}
    changed = [f"{k} {state[k]} -> {v}" for k, v in now.items() if state[k] != v]
    if changed:
        print0(f"resume: {', '.join(changed)}: the run goes on, but not bit for bit")
    if state["device"] != world.device.type or state["ranks"] != world.size:
        return
    if world.device.type == "cpu":
        torch.set_rng_state(state["rng"][world.rank])
    else:
        torch.cuda.set_rng_state(state["rng"][world.rank], world.device)


def check_resume(before, cfg, hashes_before, hashes, fixed):
    """Prints what changed since the checkpoint; refuses a change of the data or of a field in `fixed`."""
    now = dataclasses.asdict(cfg)
    changed = {k: (before.get(k), v) for k, v in now.items()
               if before.get(k) != v and k not in ("resume", "eval_only")}
    for k, (old, new) in changed.items():
        print0(f"resume: --{k} was {old}, is {new}")
    refused = [k for k in fixed if k in changed]
    if refused:
        raise SystemExit(f"--resume: --{refused[0]} was {before.get(refused[0])} in the checkpoint and "
                         "cannot change; give the old value, or start anew without --resume")
    for what, old in hashes_before.items():
        if hashes.get(what) != old:
            raise SystemExit(f"--resume: {what} is not what the checkpoint was trained on; start anew "
                             "without --resume")


class Interrupt:
    """SIGTERM, Ctrl-C or --max_minutes: the loop asks `due` once a step, saves and leaves. A second kills."""

    def __init__(self, max_minutes=0.0):
        self.reason, self.deadline = "", time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self.before = {}
        try:
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: no handlers, the run just cannot be interrupted gently
            pass

    def note(self, number, frame):
        self.reason = signal.Signals(number).name
        self.release()

    def release(self):
        """Puts the former handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def due(self, world):
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "--max_minutes"
        return world.any(bool(self.reason))
