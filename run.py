"""Bookkeeping of a training run: seeds, schedule, folder, log, interruption, resume.

Nothing here calls a model: each script writes out its own loop.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import (atomic, birth, clear_up_on_sigterm, duration, hash64, hub_advice, one_line_end, parse_cli,
                    parse_json, peek_json, print0, progress, read_json, read_settings, remove, sweep,
                    update_hash, write_json)
from parts.checkpoints import (CHECKPOINTS, checkpoint_nbytes, disk_rate, last_good, load_checkpoint,
                               of_this_run, restore_rng, save_checkpoint)
from parts.feed import Feed
from parts.machine import end_ranks, peak_flops, peak_memory_mb

FORMAT = 3  # of run folders
LATE = 60  # seconds until NFS shows a new file on another machine, at most
SKIPS = 25  # float16: so many overflows in a row halve GradScaler's first scale to 2^-9


def run_script(main, Config, presets, needs={}):
    """A script as a command: flags, main, end of the process group; one line where memory or disk is full."""
    try:
        with one_line_end():
            cfg = parse_cli(Config, presets, needs=needs)
            clear_up_on_sigterm()  # a training loop has a handler of its own, see Interrupt
            with one_line_for_the_machine(cfg):
                main(cfg)
    finally:
        end_ranks()


@contextlib.contextmanager
def one_line_for_the_machine(cfg):
    """A block that ends in one line, too, where memory or disk is full or another process has ended."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if out_of_memory(error):
            raise SystemExit(f"out of memory: lower --batch_size {cfg.batch_size}, or raise --grad_accum to "
                             "run it in smaller parts; --resume goes on from the checkpoint") from None
        if dist.is_initialized() and isinstance(error, RuntimeError) and PEER_LOST.search(text):
            raise SystemExit(f"rank {dist.get_rank()}: another process of the group has ended, its own "
                             "message tells why; --resume goes on from the checkpoint") from None
        if "No space left on device" in text:
            raise SystemExit(f"disk full ({text}): free space, then go on with --resume") from None
        raise


def out_of_memory(error):
    """Whether PyTorch or Python could not have the memory that they asked for."""
    return (isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
            or re.search("can't allocate memory|not enough memory|size calculation overflowed", str(error)))


PEER_LOST = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed|"
                       r"gloo|NCCL|nccl|Timed? ?out")


# ---------------------------------------------------------------------------- seeds, schedule and speed


def set_seed(seed, rank):
    """Seeds torch: with rank 0 before the weights are drawn, with 1 + the rank before the loop (dropout)."""
    torch.manual_seed(int(hash64("torch", seed, rank) >> np.uint64(1)))


def micro_batch_size(cfg, ranks):
    """Samples of a micro-batch: cfg.batch_size by ranks and cfg.grad_accum, which must divide it."""
    parts = ranks.size * cfg.grad_accum
    if cfg.batch_size % parts:
        raise SystemExit(f"--batch_size {cfg.batch_size} is not a multiple of {ranks.size} ranks x "
                         f"{cfg.grad_accum} micro-batches; try {math.ceil(cfg.batch_size / parts) * parts}")
    return cfg.batch_size // parts


def steps_of(cfg, samples):
    """(steps to run, steps of the warm-up) of a Config over that many samples.

    --max_steps, or as many steps as --epochs takes; a --warmup_steps below 1 is a share of them.
    """
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * samples / cfg.batch_size)
    warmup = cfg.warmup_steps
    if warmup > max_steps:
        raise SystemExit(f"--warmup_steps {warmup:g} is more than the {max_steps} steps of this run; "
                         "lower it")
    return max_steps, round(warmup * max_steps) if warmup < 1 else int(warmup)


def lr_at(step, lr, warmup_steps, max_steps):
    """Linear warm-up from lr / warmup to lr, then linear decay to 0 at max_steps (Devlin et al. 2019)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))


# ---------------------------------------------------------------------------- folders of runs and models


def model_folder(path, flag):
    """The model's folder, given a run's folder or the model's own; `flag` is named where there is neither."""
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").exists() and not (folder / "log.jsonl").exists():
            return folder
    raise SystemExit(f"{flag} {path}: no model there; "
                     + hub_advice(path, "give the folder of a finished run, or one with config.json and "
                                    "model.safetensors"))


WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder):
    """Paths of the weights in a model's folder, of shards behind their index; SystemExit where one lacks."""
    path = next((Path(folder, name) for name in WEIGHTS if Path(folder, name).is_file()), None)
    if path is None:
        raise SystemExit(f"{folder}: has no {' and no '.join(WEIGHTS[::2])}; fetch one of them")
    if path.suffix != ".json":
        return [path]
    shards = read_json(path).get("weight_map")
    shards = list(dict.fromkeys(shards.values())) if isinstance(shards, dict) else []
    for name in shards or [None]:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name):
            raise SystemExit(f"{path}: {str(name)[:80]!r} is no file of weights in its folder; fetch it anew")
        if not path.with_name(name).is_file():
            raise SystemExit(f"{path}: the file {name} is missing beside it; fetch that, too")
    return [path, *map(path.with_name, shards)]


def file_hash(path):
    """SHA-256 of a file, or of a model folder's weights and of the video encoder and vokens beside them; of
    more than 1 GiB it reads blocks, see common.update_hash."""
    digest, files = hashlib.sha256(), [Path(path)]
    if not files[0].is_file():
        beside = (Path(path, name) for name in ("video_encoder.safetensors", "vokens.safetensors"))
        files = [*weight_files(path), *filter(Path.is_file, beside)]
    for file in files:
        with file.open("rb") as f:
            update_hash(digest, os.fstat(f.fileno()).st_size,
                        lambda first, last: os.pread(f.fileno(), last - first, first))
    return digest.hexdigest()


def read_run(folder):
    """(config.json, results.json) of a finished run of this format; SystemExit says how to make it again."""
    folder = Path(folder)
    advice = "give the folder of a finished run"
    if not (folder / "config.json").exists() and (runs := [*folder.glob("*/log.jsonl"),
                                                           *folder.glob("*/*/log.jsonl")]):
        raise SystemExit(f"{folder}: holds several runs; give one of them, such as {min(runs).parent}")
    if folder.name == "model" and (folder.parent / "log.jsonl").exists():
        advice = f"give the folder above, {folder.parent}"
    config = read_settings(folder / "config.json", {"config": dict}, advice)
    if config.get("format") != FORMAT:
        command = config.get("command")
        raise SystemExit(f"{folder}: a run of format {config.get('format', 1)}, this code reads {FORMAT}; "
                         f"make it again: {' '.join(map(str, command)) if isinstance(command, list) else ''}")
    return config, read_json(folder / "results.json", advice)


def same_run(before, cfg, hashes, free):
    """Whether a run's config.json has the same format, data, and flags of those that change its result."""
    return before.get("format") == FORMAT and before.get("hashes") == hashes and not changed_flags(
        before.get("config"), cfg, free)


# flags of no influence on the result in any script
FREE = ("out_dir", "resume", "eval_only", "device", "max_minutes", "log_every", "save_every", "save_minutes",
        "data_dir", "grad_checkpoint")


def changed_flags(before, cfg, free=()):
    """["--lr was 0.1", ...]: flags that differ from a run's and can change its result. A flag that
    the run did not know had its default; before: what its file holds, perhaps no flags at all."""
    free, before = {*FREE, *free}, before if isinstance(before, dict) else {}
    before = {field.name: field.default for field in dataclasses.fields(cfg)} | before
    return [f"--{name} was {before[name]}" for name, value in dataclasses.asdict(cfg).items()
            if name not in free and before[name] != value]


def lock(folder):
    """Notes in folder/run.lock which process writes there; SystemExit where another one does that lives.

    A dead process of this host has lost its lock; whether one of another host lives cannot be seen.
    """
    path, own = folder / "run.lock", {"host": socket.gethostname(), "pid": os.getpid()}
    own["birth"] = birth(own["pid"])
    with path.open("a+") as f:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)  # two processes that look at once do it one by one
        f.seek(0)
        try:
            holder = parse_json(f.read())
            here = holder["host"] == own["host"]
            free = holder == own or here and birth(holder["pid"]) != holder["birth"]
        except (ValueError, KeyError, TypeError):  # empty, or cut by a full disk
            free = True
        if not free:
            raise SystemExit(f"{folder}: process {holder['pid']} of {holder['host']} is writing there; wait, "
                             "or give another --out_dir" + f"; if it has died, delete {path}" * (not here))
        f.truncate(0)
        f.write(json.dumps(own))


def unlock(folder):
    """Gives the folder free."""
    (folder / "run.lock").unlink(missing_ok=True)


def check_shared(path, flag, ranks):
    """SystemExit on all ranks where one of them does not see what rank 0 writes in `path`, which `flag`
    gives, or in the next folder above that is there: they run on machines without a common file system."""
    if ranks.size == 1:
        return

    def near():
        return next(folder for folder in (path, *path.parents) if folder.is_dir())
    path = Path(path).absolute()
    own = f"shared.{socket.gethostname()[:64]}.{os.getpid()}.tmp"  # as common.sweep looks for it
    if ranks.main:
        sweep(near() / "shared")
        (near() / own).touch()
    names = ranks.gather(torch.tensor([[*own.encode().ljust(99)]]))
    name, end = bytes(names[0].tolist()).decode().strip(), time.monotonic() + LATE
    while not (seen := (near() / name).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    seen = ranks.gather(torch.tensor([seen])).tolist()
    if ranks.main:
        (near() / own).unlink()
    if not all(seen):
        raise SystemExit(f"{near()}: rank {seen.index(False)} does not see what rank 0 writes there; give a "
                         f"{flag} on a file system that all machines share")


@functools.cache
def code_hash():
    """SHA-256 of all sources of the house but the tests."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("parts/*.py"), *root.glob("prepare/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def git_state():
    """{commit, dirty} of the code, or nothing outside a git checkout."""
    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout
    if shutil.which("git") is None or not (commit := git("rev-parse", "HEAD").strip()):
        return {}
    return {"commit": commit, "dirty": bool(git("status", "--porcelain").strip())}


# ---------------------------------------------------------------------------- the run


class Run:
    """Folder, log, window of terms, progress line, checkpoints, interruption and resume of one training run.

        run = Run(cfg, folder, ranks, hashes, FIXED)    # finished, unfinished or new?
        step = run.restore(max_steps, model=model, optimizer=optimizer, scaler=scaler)
        run.begin(terms)
        run.feed(make, items)
        while True:
            if run.eval_due(step, last): run.note(step, "val", scores)
            run.save_due(step, last)                       # may end the program: interrupted
            if last: break
            index, batches, items = run.take(step)
            run.add(step, terms); step += 1; run.tick(step, lr, norm)
        seconds = run.leave_loop()
        run.finish(results)

    cfg: a Config; hashes: {what: hash} of the data and models that the run reads; fixed: flags that a resumed
    run cannot change; free: flags that change no result, beside those of changed_flags.
    """

    def __init__(self, cfg, folder, ranks, hashes, fixed=(), free=()):
        self.cfg, self.folder, self.ranks, self.hashes = cfg, Path(folder), ranks, hashes
        self.fixed, self.free = fixed, free
        self.saved, self.lines, self.parts = None, 0, {}
        self.check_ranks()
        if not cfg.eval_only:
            check_shared(folder, "--out_dir", ranks)
        self.resumes = cfg.resume == "true" or cfg.resume == "auto" and self.agreed(self.unfinished())

    def check_ranks(self):
        """Stops where the ranks do not have the same flags, code and data; paths and devices may differ."""
        flags = {name: value for name, value in dataclasses.asdict(self.cfg).items()
                 if name not in (*FREE, *self.free)}
        for what, content in {"flags": flags, "data or models": self.hashes, "code": code_hash()}.items():
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
            own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
            others = self.ranks.gather(own[None].to(self.ranks.device))
            for rank, other in enumerate(others.cpu()):
                if not torch.equal(other, others[0].cpu()):
                    raise SystemExit(f"rank {rank} has other {what} than rank 0; start every process with "
                                     "the same command, code and files")

    def agreed(self, flag):
        """What the main rank says, on every rank."""
        return self.ranks.any(self.ranks.main and bool(flag))

    def same(self):
        """Whether the folder's run has the same flags and data."""
        return same_run(peek_json(self.folder / "config.json"), self.cfg, self.hashes, self.free)

    def unfinished(self):
        """Whether the folder holds a checkpoint of the same flags and data, from which a run can go on."""
        return self.same() and any((self.folder / name).exists() for name in CHECKPOINTS)

    def finished(self):
        """Results of a FINISHED run of the same flags and data in the folder, else None."""
        results = peek_json(self.folder / "results.json")
        return results if self.agreed("finished" in results and self.same()) else None

    # ------------------------------------------------------------------------ start

    def restore(self, max_steps, **parts):
        """Loads the checkpoint into `parts` where the run goes on; returns the step to begin with.

        parts: {name: what has state_dict and load_state_dict}, saved from now on; None is left out.
        """
        self.max_steps, self.start = max_steps, 0
        self.parts = {name: part for name, part in parts.items() if part is not None}
        if self.resumes or self.cfg.eval_only:
            self.saved = self.read_checkpoint()
        set_seed(self.cfg.seed, 1 + self.ranks.rank)
        if self.saved:
            with of_this_run(self.folder):
                check_resume(self.saved, self.cfg, self.hashes, self.fixed)
                for name, part in self.parts.items():  # one by one, each given free at once
                    state = self.saved.pop(name)
                    if self.ranks.device.type == "cpu":  # an optimizer keeps the tensors that it is given
                        state = copy.deepcopy(state)
                    if state:  # the scaler's is empty but in float16
                        part.load_state_dict(state)
                self.start, self.lines = int(self.saved["step"]), int(self.saved["log_lines"])
                if self.resumes:
                    restore_rng(self.saved, self.ranks)
                del self.saved["rng"]  # the last of the file, which else stays mapped
        return self.start

    def load_best(self, model, step=0):
        """Loads the model that was saved as best.pt at `step` or later."""
        saved = load_checkpoint(self.folder, self.ranks, "best.pt")
        with of_this_run(self.folder):
            if saved["step"] < step:  # the one before it
                raise SystemExit(f"{self.folder}/best.pt: the best weights, of step {step}, cannot be read; "
                                 "start anew with --resume false")
            model.load_state_dict(saved["model"])

    def read_checkpoint(self):
        """The newest checkpoint; where none is readable --resume auto starts anew, and None is returned."""
        saved = None
        try:
            saved = load_checkpoint(self.folder, self.ranks)
        except SystemExit as error:
            if self.cfg.resume != "auto" or self.cfg.eval_only:
                raise
            print0(f"{error}; so the run starts anew")
            self.resumes = False
        if self.ranks.any(bool(saved)) != bool(saved):
            raise SystemExit(f"{self.folder}: rank {self.ranks.rank} reads no checkpoint, another one does; "
                             "give all ranks the same files")
        return saved

    def begin(self, terms, unit="tokens", units=0, flops=0.0, bar=""):
        """Makes the folder, and catches signals from now on.

        terms: names of the losses in their order; units a step, and floating-point operations; bar: title of
        a progress bar in place of a line for each window.
        """
        cfg, device = self.cfg, self.ranks.device
        if self.ranks.main:
            self.check_room()
        self.open_folder()
        self.interrupt = Interrupt(cfg.max_minutes)
        self.terms, self.unit, self.units, self.flops = list(terms), unit, units, flops
        self.peak = peak_flops(device, getattr(torch, cfg.dtype)) * self.ranks.size if flops else 0.0
        self.window = torch.zeros(cfg.log_every, len(self.terms), device=device)
        self.first, self.added = self.start, -1  # first step of the window, last step that was added
        # float16: steps of the window, and the last ones in a row, that GradScaler left out
        self.scaled = cfg.dtype == "float16"
        self.skipped = self.in_a_row = torch.zeros((), device=device)
        self.clock = None  # when the window began, pauses left out; None while warming up
        self.began = time.monotonic() - (self.saved or {}).get("seconds", 0.0) * self.resumes
        self.written = time.monotonic()  # when the last checkpoint was
        self.bar = None
        if bar:
            self.bar = progress(None, self.max_steps, " steps", bar, leave=False, initial=self.start)
        self.paused = None  # when the loop was left for an evaluation

    def open_folder(self):
        """Takes the folder's lock, writes config.json and cuts the log; an older run of the name is moved to
        folder.1, .2, ..., but not one that the same command began and that has no checkpoint yet."""
        folder, cfg = self.folder, self.cfg
        if self.ranks.main:
            if folder.is_file():
                raise SystemExit(f"{folder}: is a file; give another --out_dir")
            if folder.exists():
                lock(folder)
            began = cfg.resume == "auto" and self.same() and not (folder / "results.json").exists()
            empty = all(path.name == "run.lock" or path.suffix == ".tmp" for path in folder.glob("*"))
            if folder.exists() and not self.resumes and not began and not empty:
                n = next(i for i in range(1, 10 ** 6) if not folder.with_name(f"{folder.name}.{i}").exists())
                before = peek_json(folder / "config.json")
                changed = changed_flags(before["config"], cfg) if "config" in before else []
                unlock(folder)
                folder.rename(folder.with_name(f"{folder.name}.{n}"))
                because = f" ({', '.join(changed)})" if changed else ""
                print0(f"{folder} exists: moved to {folder}.{n}{because}")
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            for name in ("config.json", "log.jsonl", "results.json", "best.pt", *CHECKPOINTS):
                if (folder / name).is_dir():
                    raise SystemExit(f"{folder / name}: is a folder, where the run writes a file; remove it")
            if (folder / "model").is_file():
                raise SystemExit(f"{folder}/model: is a file, where the run makes a folder; remove it")
            for rest in list(folder.rglob("*.tmp")):  # of a killed save, also on another host
                remove(rest)
            write_json(folder / "config.json", {
                "format": FORMAT, "config": dataclasses.asdict(cfg), "command": sys.argv, "git": git_state(),
                "hashes": self.hashes,
                "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__),
                             "numpy": np.__version__},
                "device": torch.cuda.get_device_name(self.ranks.device)
                if self.ranks.device.type == "cuda" else self.ranks.device.type,
                "ranks": self.ranks.size, "threads": torch.get_num_threads()})
            path = folder / "log.jsonl"
            old = path.read_text().splitlines(keepends=True) if path.exists() else []
            with atomic(path) as part:
                part.write_text("".join(old[:self.lines]))
        self.ranks.barrier()

    def feed(self, make, items={}):
        """Makes the loop's batches ahead from now on; make, items: see parts.feed.Feed."""
        items = {name: count for name, count in items.items() if name in self.terms}
        self.batches = Feed(make, self.ranks, self.start, self.max_steps, items, self.wishes)

    def wishes(self):
        """(is this rank to stop, is it time for a checkpoint by the main rank's clock)."""
        minutes = (time.monotonic() - self.written) / 60
        return self.interrupt.due(), self.ranks.main and 0 < self.cfg.save_minutes <= minutes

    def check_room(self):
        """Prints what checkpoints take of disk and time, where that is much; SystemExit without the room.

        Three exist for a moment: the newest, the one before, and the one in writing.
        """
        nbytes = checkpoint_nbytes(self.parts)
        held = sum(path.stat().st_size for path in self.folder.glob("checkpoint.pt*")) * self.resumes
        place = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(place).free
        if 3 * nbytes > free + held:
            raise SystemExit(f"{self.folder}: checkpoints take {3 * nbytes / 1e9:.2g} GB of disk, "
                             f"{free / 1e9:.2g} GB are free; free some or give another --out_dir")
        if nbytes >= 1e8:
            rate = disk_rate(place)
            print0(f"checkpoint: {nbytes / 1e9:.2g} GB in about {duration(math.ceil(nbytes / rate))}, at the "
                   f"{rate / 1e6:,.0f} MB/s of this disk; {3 * nbytes / 1e9:.2g} GB while one is written")

    # ------------------------------------------------------------------------ inside of the loop

    def take(self, step):
        """(samples of the global batch, micro-batches on the device, {term: items of the global batch, at
        least 1}) of the coming step."""
        return self.batches.take(step)

    def eval_due(self, step, last):
        """Is an evaluation due before this step? The clock stops until `save_due`."""
        self.paused = time.monotonic()
        return (step % self.cfg.eval_every == 0 or last) and not (step == self.start and self.resumes)

    def note(self, step, what, scores, shown=""):
        """Logs scores as <what>_<name>, prints a line of them, or `shown`. A NaN of "val" ends the run."""
        bad = [name for name, value in scores.items() if not math.isfinite(value)]
        if bad and what == "val":
            self.check(step)  # the weights' fault?
            raise SystemExit(f"{what} {bad[0]} is {scores[bad[0]]} at step {step}, while losses and weights "
                             f"are finite; look for NaN in the data; {last_good(self.folder)}")
        self.log(step=step, **{f"{what}_{name}": value for name, value in scores.items()})
        print0(f"step {step:6d}  {what}  "
               + (shown or "  ".join(f"{name} {value:.3f}" for name, value in scores.items())))

    def note_gradients(self, step, norms, weights):
        """Logs {term: norm of the gradient that it sends}, and says which term teaches next to nothing."""
        self.note(step, "gradient", norms, "into the last hidden states: "
                  + "  ".join(f"{name} {norm:.1e}" for name, norm in norms.items()))
        words = norms.get("mlm", 0.0)
        for name in [name for name, norm in norms.items() if norm < 0.01 * words and weights[name]]:
            print0(f"step {step:6d}  {name} sends {norms[name] / words:.1e} of the gradient that mlm does: "
                   f"at --w_{name} {weights[name]:g} it teaches next to nothing; raise it")

    def save_due(self, step, last, **more):
        """Saves a checkpoint where one is due; ends the program where it was interrupted.

        more: plain values beside the states of the parts.
        """
        began, self.paused = self.paused or time.monotonic(), None
        stop, late = self.batches.wished()
        every = self.cfg.save_every or math.inf
        regular = step % every == 0 or late and step % self.cfg.log_every == 0
        if regular and step > self.start or last or stop:
            self.check(step)
            save_checkpoint(self.folder, {name: part.state_dict() for name, part in self.parts.items()} | {
                "format": FORMAT, "step": step, "log_lines": self.lines, "hashes": self.hashes,
                "config": dataclasses.asdict(self.cfg), "seconds": time.monotonic() - self.began} | more,
                self.ranks)
            self.written = time.monotonic()
        if stop and not last:
            self.batches.close()
            if self.ranks.main:
                unlock(self.folder)
            print0(f"{self.interrupt.reason or 'stopped'}: saved step {step} in {self.folder}; go on with "
                   + ("the same command" if self.cfg.resume == "auto" else "--resume"))
            raise SystemExit(0)
        if self.clock:
            self.clock += time.monotonic() - began

    def check(self, step):
        """Stops the run where a loss or a weight is not finite: it must not be saved as good."""
        self.check_window(self.ranks.sum(self.window.clone()))
        bad = [name for name, p in self.parts["model"].named_parameters() if not p.isfinite().all()]
        if bad:
            raise SystemExit(f"the weight {bad[0]} is not finite after step {step}; {last_good(self.folder)}")

    def check_window(self, values):
        """values: (window, terms), row = step % window."""
        bad = (~torch.isfinite(values)).nonzero().tolist()
        if bad:
            row, column = bad[0]
            step = self.first + (row - self.first) % len(values)
            term = self.terms[column].removesuffix("loss")
            raise SystemExit(f"the {f'{term} loss'.strip()} is {values[row, column].item()} at step {step}; "
                             f"{last_good(self.folder)}")

    def check_skipped(self, most=SKIPS):
        """Stops a run in float16 whose last `most` steps were all skipped."""
        if self.scaled and 0 < most <= self.in_a_row.item():
            raise SystemExit(f"the gradient overflowed in float16 at each of the last {most} steps: nothing "
                             f"was learned; use --dtype bfloat16 or float32; {last_good(self.folder)}")

    @contextlib.contextmanager
    def pause(self):
        """A block whose time counts in no speed."""
        began = time.monotonic()
        yield
        if self.clock:
            self.clock += time.monotonic() - began

    def add(self, step, terms):
        """Adds a micro-batch's terms, {name: 0-d tensor}, to the window's row of this step."""
        row = self.window[step % len(self.window)]
        if step != self.added:
            row.zero_()
            self.added = step
        row += torch.stack([terms[name].detach() for name in self.terms])

    def tick(self, step, lr, norm):
        """After a step: a line on the screen and in the log once a window.

        step: how many are done; norm: the gradient's, a tensor. The window's only read of the device.
        """
        if self.bar is not None:
            self.bar.update()
        if self.scaled:
            overflow = ~norm.isfinite()
            self.skipped, self.in_a_row = self.skipped + overflow, (self.in_a_row + 1) * overflow
        if step % len(self.window):
            return
        values = self.ranks.sum(self.window.clone()) / self.ranks.size
        self.check_window(values)
        self.check_skipped()
        means = dict(zip(self.terms, values[self.first % len(self.window):].mean(0).tolist()))
        now = time.monotonic()
        speed = (step - self.first) / (now - self.clock) if self.clock else 0.0  # steps a second
        rate = {f"{self.unit}_per_s": speed * self.units} if speed else {}
        if speed and self.peak:
            rate["mfu"] = speed * self.flops / self.peak
        if skipped := int(self.skipped.item()) if self.scaled else 0:
            rate["skipped"] = skipped
            print0(f"step {step:6d}  {skipped} of {step - self.first} steps overflowed in float16: skipped")
        self.skipped = torch.zeros_like(self.skipped)
        self.log(step=step, **means, lr=lr, grad_norm=norm.item(), **rate,
                 memory_mb=peak_memory_mb(self.ranks.device))
        if self.bar is None:
            left = (now - self.began) / step * (self.max_steps - step)
            parts = [f"step {step:6d}", *(f"{name} {value:.4f}" for name, value in means.items()),
                     f"lr {lr:.1e}"]
            if speed:
                parts += [f"{1e3 / speed:.0f} ms", f"{speed * self.units / 1e3:.1f}k {self.unit}/s"]
                parts += [f"mfu {100 * rate['mfu']:.0f}%"] if "mfu" in rate else []
            print0("  ".join([*parts, f"eta {duration(left)}"]))
        self.first, self.clock = step, now

    def log(self, **values):
        """A line of log.jsonl."""
        self.lines += 1
        if self.ranks.main:
            values = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(values, allow_nan=False) + "\n")

    # ------------------------------------------------------------------------ end

    def leave_loop(self):
        """Signals end the program from now on; returns the seconds that the loop took, resumed parts too."""
        self.check_skipped(min(SKIPS, self.added + 1 - self.start))
        self.batches.close()
        self.interrupt.release()
        if self.bar is not None:
            self.bar.close()
        return time.monotonic() - self.began

    def finish(self, results):
        """Writes results.json, with the time at which the run was finished; returns it."""
        results = {"folder": str(self.folder), **results, "format": FORMAT, "finished": time.time()}
        if self.ranks.main:
            unlock(self.folder)  # first: nobody looks for a lock where results are
            write_json(self.folder / "results.json", results)
        self.ranks.barrier()
        return results


# ---------------------------------------------------------------------------- resume, interruption


def check_resume(saved, cfg, hashes, fixed):
    """Prints what changed since the checkpoint; refuses another format, other data, or a changed flag of
    `fixed`."""
    if saved.get("format") != FORMAT:
        raise SystemExit(f"--resume: a checkpoint of format {saved.get('format', 1)}, this code reads "
                         f"{FORMAT}; start anew without --resume")
    before, now = saved["config"], dataclasses.asdict(cfg)
    changed = {k: (before.get(k), v) for k, v in now.items()
               if before.get(k) != v and k not in ("resume", "eval_only")}
    for k, (old, new) in changed.items():
        print0(f"resume: --{k} was {old}, is {new}")
    refused = [k for k in fixed if k in changed]
    if refused:
        raise SystemExit(f"--resume: --{refused[0]} was {before.get(refused[0])} in the checkpoint and "
                         "cannot change; give the old value, or start anew without --resume")
    for what, old in saved["hashes"].items():
        if hashes.get(what) != old:
            raise SystemExit(f"--resume: the checkpoint belongs to another run: {what} is not what it was "
                             "trained on; move it away, or start anew without --resume")


class Interrupt:
    """SIGTERM, Ctrl-C or --max_minutes: the loop asks `due` once a step, saves, leaves. A second kills."""

    def __init__(self, max_minutes=0.0):
        self.reason, self.deadline = "", time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self.handlers = {}  # those that were there
        try:
            self.handlers = {s: signal.signal(s, self.catch) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: no handlers, the run just cannot be interrupted gently
            pass

    def catch(self, number, frame):
        self.reason = signal.Signals(number).name
        self.release()

    def release(self):
        """Puts the former handlers back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def due(self):
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "--max_minutes"
        return bool(self.reason)
