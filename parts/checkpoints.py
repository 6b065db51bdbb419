"""Checkpoints of a run: written whole or not at all, mapped when they are read, and what they take."""
import contextlib
import os
import time
import zipfile
from pathlib import Path

import torch

from common import atomic, check_archive, print0, remove
from parts.machine import generator_of

CHECKPOINTS = ("checkpoint.pt", "checkpoint.pt.prev")


def checkpoint_nbytes(parts):
    """Bytes of a checkpoint of {name: part}: each tensor once, and AdamW's moments, which a step makes."""
    held = {x.data_ptr(): x.nbytes for name, part in parts.items() if name != "optimizer"
            for x in part.state_dict().values() if torch.is_tensor(x)}
    groups = parts["optimizer"].param_groups if "optimizer" in parts else []
    return sum(held.values()) + sum(2 * p.nbytes for group in groups for p in group["params"])


def disk_rate(folder, nbytes=1 << 26):
    """Bytes a second that a folder's disk takes, by writing some."""
    with atomic(folder / "disk_rate") as part:
        began = time.perf_counter()
        with part.open("wb") as f:
            f.write(bytes(nbytes))
            os.fsync(f.fileno())
        rate = nbytes / (time.perf_counter() - began)
    remove(folder / "disk_rate")
    return rate


def machine_of(ranks):
    """What a run must have in common with another to go on bit for bit."""
    return {"ranks": ranks.size, "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "device": ranks.device.type, "instructions": torch.backends.cpu.get_cpu_capability()}


def save_checkpoint(folder, state, ranks, name="checkpoint.pt"):
    """Atomic; the one before is kept as *.prev.

    state: tensors and plain containers only. Each rank's RNG state is added, so that dropout goes on as if
    nothing had happened.
    """
    rng = ranks.gather(generator_of(ranks.device).get_rng_state()[None])
    if not ranks.main:
        return
    path = Path(folder) / name
    try:
        with atomic(path, keep=".prev") as part:
            try:  # given a path, torch 2.4 says nothing where the disk is full at the end of the file
                with part.open("wb") as f:
                    torch.save(state | {"rng": rng} | machine_of(ranks), f)
            except RuntimeError as error:
                raise OSError(str(error).partition("\n")[0]) from None
    except SystemExit as error:
        kept = next((p for p in (path, Path(f"{path}.prev")) if p.exists()), None)
        raise SystemExit(f"{error}; then " + (f"go on with --resume from {kept}" if kept else
                                              "start the run again: it has no checkpoint yet")) from None
    Path(f"{path}.damaged").unlink(missing_ok=True)


def load_checkpoint(folder, ranks, name="checkpoint.pt"):
    """The newest checkpoint of the run that reads whole, its tensors mapped from the file, on the CPU.

    The main rank alone reads it all and looks whether it is whole; it says so where the newest is damaged,
    and the others take the same file. A damaged one becomes *.damaged until the next save, which else would
    push out the good one with it.
    """
    paths, found = [Path(folder) / name, Path(folder) / (name + ".prev")], -1
    if ranks.main:
        found = next((i for i, path in enumerate(paths) if path.exists() and is_whole(path, i == 0)), -1)
    found = int(ranks.of_main({"found": found})["found"])
    if found < 0:
        raise SystemExit(f"no readable checkpoint in {folder}; start anew without --resume or --eval_only "
                         "(finetune.py: with --resume false)")
    try:
        return torch.load(paths[found], map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:  # of another rank, whose file is not the main one's
        raise SystemExit(f"{paths[found]}: rank {ranks.rank} cannot read it ({str(error).splitlines()[0]})"
                         ) from None


def is_whole(path, newest):
    """Whether a checkpoint's file has the bytes that were written, and nothing hostile; says why not."""
    if path.is_dir():
        raise SystemExit(f"{path}: is a folder, where the run writes a file; remove it")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"checksum of {broken} differs")
        check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(saved, dict):
            raise ValueError(f"it holds a {type(saved).__name__}")
        return True
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print0(f"{path} is damaged ({reason}); trying the one before it")
        if newest:
            os.replace(path, f"{path}.damaged")
        return False


def check_started(cfg, folder):
    """SystemExit before any work where a run shall go on or be measured that has no checkpoint."""
    found = any(Path(folder, name).exists() for name in CHECKPOINTS)
    if (cfg.resume == "true" or cfg.eval_only) and not found:
        raise SystemExit(f"no checkpoint in {folder}: start the run without --resume and --eval_only; what "
                         "was made for it is kept")


@contextlib.contextmanager
def of_this_run(folder):
    """A block that takes over a checkpoint; SystemExit where it does not hold what such a run saves."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(f"{folder}: its checkpoint is none of such a run ({reason}); start anew without "
                         "--resume (finetune.py: with --resume false)") from None


def last_good(folder):
    """What to do after a NaN: names the checkpoint to go on from."""
    kept = next((Path(folder, name) for name in CHECKPOINTS if Path(folder, name).exists()), None)
    return (f"the last good checkpoint is {kept}; go on from it with --resume and a lower --lr" if kept else
            "start anew with a lower --lr")


def restore_rng(saved, ranks):
    """RNG of this rank from a checkpoint; a note where the run cannot go on bit for bit."""
    changed = [f"{k} {saved[k]} -> {v}" for k, v in machine_of(ranks).items() if saved[k] != v]
    if changed:
        print0(f"resume: {', '.join(changed)}: the run goes on, but not bit for bit")
    if saved["device"] != ranks.device.type or saved["ranks"] != ranks.size:
        return
    generator_of(ranks.device).set_rng_state(saved["rng"][ranks.rank].clone())
