"""Kills, starves and damages real runs, starts them again, and compares what they leave with whole ones.

    python tests/faults.py --rounds 100 --seed 0                         # of every kind, two at once
    python tests/faults.py --rounds 20 --script distill --ranks 2 --kind save
    python tests/faults.py --rounds 1 --seed 0 --first 37                # round 37 of seed 0 again
    python tests/faults.py --rounds 20 --device cuda --ranks 1
    python tests/faults.py --rounds 50 --script features                 # features.py, which has no steps

A round starts one of the four scripts, with 24 steps and 4 saves, and disturbs it once to three times:
    moment     a signal to one process, or to all, at any time
    operation  a signal to one, all or the other, exactly before an operation of the first on a file
    save       SIGKILL before an operation on a checkpoint or a model, or with half of the file written
    torn       SIGKILL with half a line in a text file that was just opened, or with half of a tensor file
    full       no space left at an operation that needs some
    damage     a signal as above; then the newest checkpoint is damaged in one of nine ways, or some features
Then the same command is started again (--resume auto, at times --resume), with or without the dead processes
still in the table of processes. In the end weights, checkpoint, log, results and the list of files must equal
those of a run that nobody disturbed, bit for bit but for times; nothing may be trained again that was saved;
and each process that was not killed must end by itself, in one line. Processes are forks of this one, which
has PyTorch loaded; of moment and damage a share (--real) starts `python` or `torchrun` instead. features.py is
played only where --script names it, by one process. Linux only.
"""
import argparse
import collections
import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  what an optimizer imports: seconds
import torch.distributed as dist  # noqa: E402
from conftest import QUICK_STUDENT, QUICK_TEACHER  # noqa: E402  sets one thread, too
from test_ddp import QUICK_ADAPTATION, flat, pairs_and_tower  # noqa: E402

from parts.checkpoints import CHECKPOINTS  # noqa: E402
from parts.machine import peak_flops  # noqa: E402
from prepare import chain  # noqa: E402, F401  what the scripts import
from prepare.world import make_demo  # noqa: E402
from run import code_hash  # noqa: E402

STEPS = dict(max_steps=24, save_every=6, eval_every=6, log_every=1, batch_size=8)
SCRIPTS = {"distill": 3, "teacher": 2, "adapt_xdbert": 2, "finetune": 2}  # how often
KINDS = {"moment": 4, "operation": 4, "save": 4, "torn": 2, "full": 3, "damage": 5}
SIGNALS = {"SIGKILL": 3, "SIGTERM": 2, "SIGINT": 1}
WAYS = ("empty", "half", "last byte", "bit of a tensor", "bytes of the directory", "zeros", "text",
        "another script's", "missing record")
NEEDS_SPACE = ("open", "os.mkdir", "os.rename", "save")
HEARD = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync", "save")
LIMIT = 60  # seconds in which a process must end when another one of its group has
TIMES = ("seconds", "finished", "examples_per_s", "tokens_per_s", "mfu", "memory_mb")


def pick(rng, weights):
    """A key of {key: how often}."""
    return rng.choices(list(weights), list(weights.values()))[0]


def belongs_to_save(path):
    """Whether an operation is one on a checkpoint or a model, or on what will become one."""
    return any(part in path for part in ("checkpoint.pt", "best.pt", "/model/", ".npy"))


def commands(data):
    """{script: its flags}, on files in the folder `data`, which are made where it is new."""
    if (data / "commands.json").exists():
        return json.loads((data / "commands.json").read_text())
    demo, world, teacher = make_demo(data / "demo" / "demo-s0", 0), data / "world", data / "teacher"
    pairs, clip = pairs_and_tower(demo, data)
    world.mkdir()
    for name in ("corpus.h5", "videos.h5", Path(pairs).name):  # without raw/ beside them nothing is probed
        shutil.copy(demo / name, world)
    tasks = data / "glue" / "SST-2"
    tasks.mkdir(parents=True)
    for split, source, n in (("train", "train", 96), ("dev", "dev", 24), ("test", "dev_seen", 8)):
        rows = (demo / "raw" / "tasks" / "mishap" / f"{source}.tsv").read_text().splitlines()[1:n + 1]
        head = "sentence\tlabel"
        if split == "test":
            head, rows = "index\tsentence", [f"{i}\t{row.split(chr(9))[0]}" for i, row in enumerate(rows)]
        (tasks / f"{split}.tsv").write_text("\n".join([head, *rows, ""]))
    found = {"teacher": QUICK_TEACHER | STEPS | dict(videos=world / "videos.h5"),
             "distill": QUICK_STUDENT | STEPS | dict(
                 grad_every=6, train=world / "corpus.h5", teacher=teacher),
             "adapt_xdbert": QUICK_ADAPTATION | STEPS | dict(
                 block_size=24, train=world / Path(pairs).name, language=teacher, clip=clip),
             "finetune": {name: value for name, value in STEPS.items() if name != "eval_every"} | dict(
                 tasks="sst2", data_dir=tasks.parent, model=teacher, lr=1e-3, max_length=32,
                 seeds=2)}
    found = {script: [f"--{name}={value}" for name, value in flags.items()]
             for script, flags in found.items()}
    launch = Launch("teacher", [*found["teacher"], f"--out_dir={teacher}"], 1, data / "made")
    assert launch.wait() == [0], launch.output()
    (data / "commands.json").write_text(json.dumps(found))
    return found


def features_command(data):
    """{"features": its flags}, on short videos and small towers in the folder `data`."""
    from make_videos import make_towers
    from test_video import film, noise  # needs av
    (data / "videos").mkdir(parents=True)
    make_towers(data, False)
    for i in range(5):
        film(data / "videos" / f"v{i}.mp4", 40 + 10 * i, picture=lambda frame, i=i: noise(100 * i + frame))
    return {"features": ["videos", str(data / "videos"), "--device=cpu", "--batch_size=3",
                         f"--weights2d={data / 'small2d.pt'}", "--feat2d=run/2d",
                         f"--weights3d={data / 'small3d.pth'}", "--feat3d=run/3d"]}


# ---------------------------------------------------------------------------- a process and its faults


class Faults:
    """Notes operations on files below the working folder, a line each, and strikes at the n-th or the next
    of `events`. how: torn, full, or anything else for a signal alone."""

    def __init__(self, log, n=0, events=HEARD, how="", number=signal.SIGKILL, to="one"):
        self.log, self.n, self.events, self.how = log, n, events, how
        self.number, self.to = number, to
        self.count, self.inside, self.root = 0, False, f"{os.getcwd()}/"

    def arm(self):
        """Hears Python's audit events, and makes such of what has none: writers of tensors, and fsync."""
        torch.save = self.writer(torch.save)
        safetensors.torch.serialize_file = self.writer(safetensors.torch.serialize_file)
        os.fsync = lambda f: self.hear("os.fsync", [os.readlink(f"/proc/self/fd/{f}")])
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if self.inside or event not in HEARD or isinstance(args[0], int):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = os.path.join(self.root, os.fsdecode(args[0]))
        if path.startswith(self.root) and self.due(event, path):
            if self.how == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if self.how == "torn":
                with open(path, "a") as f:
                    f.write('{"step": 4')
            self.kill()

    def writer(self, save):
        """torch.save or safetensors' writer, of which a fault leaves half a file."""
        def call(value, to, **kw):
            path = os.path.join(self.root, getattr(to, "name", to))
            if not self.due("save", path):
                return save(value, to, **kw)
            if self.how not in ("torn", "full"):
                self.kill()
                return save(value, to, **kw)
            save(value, f"{self.log}.size", **kw)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            half = os.path.getsize(f"{self.log}.size") // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))  # the kernel refuses what is beyond
            try:
                return save(value, to, **kw)
            finally:
                if self.how == "torn":
                    self.kill()
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return call

    def due(self, event, path):
        self.count += 1
        struck = bool(self.n) and self.count >= self.n and event in self.events
        self.inside = True
        with open(f"{self.log}.journal", "a") as f:
            f.write(f"{event} {path.removeprefix(self.root)}{' STRUCK' * struck}\n")
        self.inside = False
        if struck:
            self.n = 0
        return struck

    def kill(self):
        me, *others = map(int, Path(f"{self.log}.pids").read_text().split())
        for pid in {"one": [me], "all": [*others, me], "the other": others or [me]}[self.to]:
            os.kill(pid, self.number)


class Launch:
    """One start of a command with 1 or 2 processes in the folder `cwd`; its logs go beside that.

    faults: of the main process. real: as `python` or `torchrun`, not as forks.
    """

    def __init__(self, script, flags, ranks, cwd, faults=None, real=False):
        self.real, self.pids, self.ended = real, [], {}
        cwd.mkdir(parents=True, exist_ok=True)
        self.log = next(f"{cwd}.{n}" for n in itertools.count() if not Path(f"{cwd}.{n}.rank0").exists())
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if real:
            torchrun = ["-m", "torch.distributed.run", f"--master_port={port}", f"--nproc_per_node={ranks}"]
            with open(f"{self.log}.rank0", "w") as f:
                self.process = subprocess.Popen(
                    [sys.executable, *torchrun * (ranks > 1), str(ROOT / f"{script}.py"), *flags], stdout=f,
                    stderr=f, cwd=cwd, start_new_session=True)
            self.pids.append(self.process.pid)
            return
        for rank in range(ranks):
            group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1",
                         MASTER_PORT=port) if ranks > 1 else {}
            pid = os.fork()
            if not pid:
                self.become(script, flags, rank, group, cwd, faults or {})
            self.pids.append(pid)
        Path(f"{self.log}.pids").write_text(" ".join(map(str, self.pids)))

    def become(self, script, flags, rank, group, cwd, faults):
        """The child: runs the script as `python script.py` does, and ends as that would. Never returns."""
        status = 1
        try:
            log = os.open(f"{self.log}.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(cwd)
            os.environ.update({name: str(value) for name, value in group.items()})
            init, sys.argv = dist.init_process_group, [f"{script}.py", *flags]

            def joined(*args, **kw):
                init(*args, **kw)
                Path(f"{self.log}.joined{rank}").touch()
            dist.init_process_group = joined
            if rank == 0:
                Faults(self.log, **faults).arm()
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, flush=True)
        except KeyboardInterrupt:  # before the script could have caught it
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(status)

    def signal(self, seconds, number, to_all, rng):
        """Sends a signal after so many seconds, counted from when the processes know each other."""
        ready = [Path(f"{self.log}.joined{rank}") for rank in range(len(self.pids))] * (len(self.pids) > 1)
        ready, began = [Path(f"{self.log}.rank0")] if self.real else ready, None
        while not began or time.monotonic() < began + seconds:
            if self.poll():
                return ""
            if not began and all(path.exists() and (path.stat().st_size or not self.real) for path in ready):
                began = time.monotonic()
            time.sleep(0.002)
        alive, workers = [pid for pid in self.pids if pid not in self.ended], []
        for path in Path("/proc").glob("[0-9]*/stat") if self.real else ():  # torchrun's
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == self.pids[0]:
                    workers.append(int(path.parent.name))
        for pid in [*alive, *workers] if to_all else [rng.choice(workers or alive)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return f"after {seconds:.2f} s"

    def poll(self):
        """Whether all have ended; they stay in the table of processes."""
        for pid in self.pids:
            if pid not in self.ended and (end := os.waitid(
                    os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                self.ended[pid] = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return len(self.ended) == len(self.pids)

    def wait(self):
        """Exit statuses by rank, negative for a signal; "hung" where this had to end a process."""
        began, first, hung = time.monotonic(), None, []
        while not self.poll():
            first = first or time.monotonic() * bool(self.ended)
            if time.monotonic() > (first + LIMIT if first else began + 4 * LIMIT) and not hung:
                hung = [pid for pid in self.pids if pid not in self.ended]
                for pid in hung:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return ["hung" if pid in hung else self.ended[pid] for pid in self.pids]

    def bury(self):
        while self.pids:
            os.waitpid(self.pids.pop(), 0)

    def output(self):
        return "".join(Path(f"{self.log}.rank{rank}").read_text(errors="replace")
                       for rank in range(2) if Path(f"{self.log}.rank{rank}").exists())

    def journal(self):
        path = Path(f"{self.log}.journal")
        return [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------------------- damage and comparison


def damage(path, way, rng, other):
    """Damages a checkpoint in one of WAYS; other: a whole checkpoint of another script."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    if way == "bit of a tensor":
        at = content.find(records[largest.filename], largest.header_offset)
        content[at + rng.randrange(largest.file_size)] ^= 1 << rng.randrange(8)
    elif way == "bytes of the directory":
        for at in rng.sample(range(content.find(b"PK\x01\x02"), len(content)), 8):
            content[at] ^= rng.randrange(1, 256)
    path.write_bytes({"empty": b"", "half": content[:len(content) // 2], "last byte": content[:-1],
                      "zeros": bytes(len(content)), "text": b"no checkpoint\n",
                      "another script's": other.read_bytes()}.get(way, content))
    if way == "missing record":
        del records[rng.choice([name for name in records if "/data" in name])]
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in records.items():
                archive.writestr(name, part)


def timeless(value):
    """A JSON value without times and speeds."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def content_of(path):
    """What of a file must be equal in every run of a command."""
    if path.name == "config.json" and (path.parent / "log.jsonl").exists():
        found = json.loads(path.read_text())
        return found["hashes"], found["config"] | {"resume": ""}
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [timeless(json.loads(line)) for line in lines]
    if path.suffix not in (".pt", ".prev"):
        return path.read_bytes()
    state = flat(torch.load(path, weights_only=True, map_location="cpu"))  # the one before may be of any step
    return path.suffix == ".pt" and {
        name: x.numpy().tobytes() if torch.is_tensor(x) else x for name, x in state.items()
        if name not in ("/seconds", "/config/resume")}


def leaves(folder):
    """{path: content_of} of all that a run leaves."""
    return {str(path.relative_to(folder)): path.is_file() and content_of(path)
            for path in sorted(folder.rglob("*"))}


# ---------------------------------------------------------------------------- rounds


class Round:
    """One round: see the file's head. Its choices follow from seed and number alone."""

    def __init__(self, args, whole, number):
        self.rng = rng = random.Random(f"{args.seed}/{number}")
        drawn = pick(rng, SCRIPTS), pick(rng, {1: 3, 2: 2}), pick(rng, KINDS), rng.random() < args.real
        self.script, self.ranks, self.kind = (
            asked or found for asked, found in zip((args.script, args.ranks, args.kind), drawn))
        self.ranks = 1 if self.script == "features" else self.ranks
        self.real = drawn[3] and self.kind in ("moment", "damage")
        self.folder, self.whole = args.work / f"round{args.seed}-{number}", whole
        self.own = self.script, self.ranks
        self.cwd, self.told, self.counts, self.launches = self.folder / "cwd", [], collections.Counter(), []

    def run(self):
        """The folder of the run that goes on."""
        if self.script != "finetune":
            return self.cwd / "run"
        first, second = (self.cwd / "run" / "sst2" / f"s{seed}" for seed in (0, 1))
        return second if second.exists() else first

    def start(self, faults=None):
        """The same command; bare --resume at times, where there is a checkpoint to go on from."""
        bare = self.script != "finetune" and self.rng.random() < 0.25 and self.saved() is not None
        flags = list(self.whole["commands"][self.script])
        if self.script != "features":
            flags += ["--out_dir=run", "--resume" + "=auto" * (not bare)]
        self.launches.append(Launch(self.script, flags, self.ranks, self.cwd, faults, self.real))
        return self.launches[-1]

    def bury(self):
        for launch in self.launches:
            launch.bury()

    def saved(self):
        """The step from which an unfinished run must go on, or None."""
        for path in () if (self.run() / "results.json").exists() else map(self.run().joinpath, CHECKPOINTS):
            with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
                if not archive.testzip():
                    return torch.load(path, weights_only=True, map_location="cpu")["step"]
        return None

    def fault(self, kind, name, to):
        """Faults of a Launch: at one of the undisturbed run's operations."""
        events = {"torn": ("open", "save"), "full": NEEDS_SPACE}.get(kind, HEARD)
        n, event = self.rng.choice([
            (n, event) for n, (event, path) in enumerate(self.whole["operations"][self.own], 1)
            if event in events and (kind != "save" or belongs_to_save(path))])
        how = "torn" if kind == "save" and event == "save" and self.rng.random() < 0.5 else kind
        return dict(n=n, events=events, how=how, number=getattr(signal, name), to=to)

    def disturb(self):
        """Starts the command and disturbs it once; whether that struck."""
        rng, kind = self.rng, self.kind
        if kind == "damage":
            kind = rng.choice(["moment", "operation", "save"])
        kind = "moment" if self.real else kind
        name = pick(rng, SIGNALS) if kind in ("moment", "operation") else "SIGKILL"
        to = rng.choice(["one", "all", "the other"]) if kind == "operation" else rng.choice(["one", "all"])
        launch = self.start(None if kind == "moment" else self.fault(kind, name, to))
        if kind == "moment":
            seconds = rng.random() * self.whole["seconds"][self.own]
            struck = launch.signal(seconds, getattr(signal, name), to == "all", rng)
        statuses = launch.wait()
        if kind != "moment":
            struck = next((f"{event} {path.split()[0]}" for event, path in launch.journal()
                           if path.endswith(" STRUCK")), "")
        self.told.append(f"{kind}, {name} to {to}, {struck or 'too late'} -> {statuses}")
        self.check(launch, statuses)
        if struck:
            self.counts.update([f"by {kind}", *["in the save path"] * belongs_to_save(struck),
                                *[name] * (kind != "full")])
        return bool(struck)

    def check(self, launch, statuses):
        """How processes ended: by a signal, well, or in one line."""
        assert "hung" not in statuses, f"a process did not end: {statuses}"
        for rank, status in enumerate(statuses):
            lines = Path(f"{launch.log}.rank{rank}").read_text(errors="replace").splitlines()
            loud = any(line.startswith(("Traceback", "frame #")) for line in lines)
            if status == 1 and not (launch.real and self.ranks > 1):  # torchrun has a traceback of its own
                assert not loud and 0 < len(lines[-1]) <= 300, "no single line: " + "\n".join(lines[-30:])

    def damage(self):
        """Damages the newest checkpoint, if there is one; the words that the next start must say."""
        if self.script == "features":
            return self.damage_features()
        path, way = self.run() / "checkpoint.pt", self.rng.choice(WAYS)
        if not path.exists() or self.saved() is None:
            return ""
        other = self.whole["checkpoint"]["distill" if self.script == "teacher" else "teacher"]
        damage(path, way, self.rng, other)
        self.told.append(f"damaged: {way}")
        self.counts[f"damaged: {way}"] += 1
        if way != "another script's":
            return "" if "directory" in way else "is damaged"
        kept, launch = path.read_bytes(), self.start()
        self.check(launch, statuses := launch.wait())
        assert 0 not in statuses and path.read_bytes() == kept, f"another's checkpoint: {launch.output()}"
        path.unlink()
        return ""

    def damage_features(self):
        """Damages an array, if there is one, so that it can be seen; the words that the next start must say."""
        if arrays := sorted(self.run().glob("*/*.npy")):
            path, way = self.rng.choice(arrays), self.rng.choice(("empty", "half", "last byte", "zeros", "text"))
            content = path.read_bytes()
            path.write_bytes({"empty": b"", "half": content[:len(content) // 2], "last byte": content[:-1],
                              "zeros": bytes(len(content)), "text": b"no array\n"}[way])
            self.told.append(f"damaged: {way}")
            self.counts[f"damaged: {way}"] += 1
        return ""

    def play(self):
        """Plays the round; AssertionError says what went wrong."""
        for _ in range(3):
            struck = self.disturb()
            must = self.damage() if self.kind == "damage" else ""
            if self.rng.random() < 0.5:
                self.bury()
            if must or not struck or self.rng.random() < 0.6:
                break
        step, launch = self.saved(), self.start()
        statuses = launch.wait()
        self.check(launch, statuses)
        output = launch.output()
        assert not any(statuses), f"the last start ended with {statuses}: {output[-1000:]}"
        assert must in output, f"does not say {must}: {output[:2000]}"
        assert not step or "step      1 " not in output and "starts anew" not in output, f"lost step {step}"
        a, b = self.whole["leaves"][self.own], leaves(self.cwd)
        if any("goes on without its cache" in launch.output() for launch in self.launches):  # of a full disk
            a = {name: hash for name, hash in a.items() if name in b or not name.startswith("out/tokens/")}
        assert a == b, (f"missing {sorted(a.keys() - b.keys())}, stray {sorted(b.keys() - a.keys())}, "
                        f"other {[name for name in a.keys() & b.keys() if a[name] != b[name]]}")


def undisturbed(work, sizes, features):
    """{what: of the runs of 1 or 2 processes that all others are compared with}; makes them.

    features: whether of features.py, else of the four scripts.
    """
    whole = {"commands": features_command(work / "features") if features else commands(work),
             "seconds": {}, "checkpoint": {}, "operations": {}, "leaves": {}}
    for own in [("features", 1)] if features else itertools.product(SCRIPTS, sizes):
        script, ranks, began = *own, time.monotonic()
        cwd = Path(tempfile.mkdtemp(prefix=f"whole-{script}-{ranks}-", dir=work)) / "cwd"
        flags = [] if features else ["--out_dir=run", "--resume=auto"]
        launch = Launch(script, [*whole["commands"][script], *flags], ranks, cwd)
        assert launch.wait() == [0] * ranks, launch.output()
        launch.bury()
        whole["seconds"][own], whole["operations"][own] = time.monotonic() - began, launch.journal()
        whole["leaves"][own], whole["checkpoint"][script] = leaves(cwd), cwd / "run" / "checkpoint.pt"
        print(f"{script}, {ranks} processes: {whole['seconds'][own]:.1f} s, {len(launch.journal())} operations "
              "on files", flush=True)
    return whole


def played(number):
    """Plays a round in a process of the pool -> (number, what it was, its counts, what went wrong or "")."""
    one, wrong = Round(*SHARED, number), ""
    try:
        one.play()
    except (AssertionError, OSError, ValueError, RuntimeError) as error:
        wrong = f"{'; '.join(one.told)}: {type(error).__name__}: {error}"
    one.bury()
    if not wrong:
        shutil.rmtree(one.folder)
    one.counts.update([one.script, f"{one.ranks} processes", f"kind {one.kind}", *["real commands"] * one.real])
    what = f"{one.script}, {one.ranks} processes, {one.kind}{', as a command' * one.real}"
    return number, what, one.counts, wrong


def main():
    global SHARED
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at once")
    parser.add_argument("--script", default="", choices=("", *SCRIPTS, "features"))
    parser.add_argument("--ranks", type=int, default=0, choices=(0, 1, 2), help="processes; 0 = either")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--kind", default="", choices=("", *KINDS))
    parser.add_argument("--real", type=float, default=0.1, help="share of moment and damage as commands")
    parser.add_argument("--work", default="", help="folder of the runs, kept; empty = a new one")
    args, began = parser.parse_args(), time.monotonic()
    STEPS["device"] = args.device
    keep, args.work = args.work, Path(args.work or tempfile.mkdtemp(prefix="faults-")).resolve()
    peak_flops(torch.device("cpu"), torch.float32)  # the forks inherit it, as the next
    code_hash()
    SHARED = args, undisturbed(args.work, [args.ranks] if args.ranks else [1, 2], args.script == "features")
    counts, failed = collections.Counter(), []
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        numbers = range(args.first, args.first + args.rounds)
        for done, (number, what, found, wrong) in enumerate(pool.imap_unordered(played, numbers), 1):
            counts += found
            if wrong:
                failed.append(number)
                print(f"FAILED round {number} of seed {args.seed}: {what}: {wrong}", flush=True)
            if done % 50 == 0:
                print(f"{done} rounds, {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)
    if not keep and not failed:
        shutil.rmtree(args.work)
    print(f"seed {args.seed}: {args.rounds} rounds from {args.first} on in {time.monotonic() - began:.0f} s; "
          + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
          + f"; failed: {', '.join(map(str, sorted(failed))) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
