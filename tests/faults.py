"""Kills, starves and damages real runs, starts them again, and compares what they leave with undisturbed ones.

    python tests/faults.py --rounds 100 --seed 0                         # of every kind, two at once
    python tests/faults.py --rounds 20 --script distill --ranks 2 --kind save
    python tests/faults.py --rounds 1 --seed 0 --first 37                # repeats round 37 of seed 0

A round starts one of the four scripts, each with 24 steps and 4 saves, and disturbs it once to three times:
    moment     a signal to one process or all of them, at any time
    operation  a signal exactly before the n-th operation on a file
    save       SIGKILL before an operation on checkpoint or model, or with half of the file written
    torn       SIGKILL with half a line in a text file that was just opened, or half of a tensor file
    full       no space left at the n-th operation that needs some
    damage     any of these; then the newest checkpoint is damaged, in one of nine ways
After each it starts the same command again (--resume auto, at times --resume). In the end weights,
checkpoint, log, results and the list of files must equal those of a run that nobody disturbed, bit for bit but
for times; on the way each process that was not killed must end by itself, in one line. Processes are forks of
this one, which has PyTorch loaded; --real is the share of rounds that start `python` or `torchrun` instead.
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
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  what an optimizer imports: seconds
import torch.distributed as dist  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
torch.set_num_threads(1)
import safetensors.torch  # noqa: E402
from conftest import QUICK_STUDENT, QUICK_TEACHER  # noqa: E402
from test_ddp import QUICK_ADAPTATION, flat, pairs_and_tower  # noqa: E402

from parts.machine import peak_flops  # noqa: E402
from prepare import chain  # noqa: E402, F401  what the scripts import
from prepare.world import make_demo  # noqa: E402
from run import code_hash  # noqa: E402

STEPS = dict(max_steps=24, save_every=6, log_every=1, batch_size=8, device="cpu")
KINDS = {"moment": 4, "operation": 4, "save": 4, "torn": 2, "full": 3, "damage": 4}  # how often
SCRIPTS = {"distill": 3, "teacher": 2, "adapt_xdbert": 2, "finetune": 2}
SIGNALS = {"SIGKILL": 3, "SIGTERM": 2, "SIGINT": 1}
WAYS = ("empty", "half", "last byte", "bit of a tensor", "bytes of the directory", "zeros", "text",
        "another script's", "missing record")
LIMIT = 60  # seconds in which a process must end when its peer has died
TIMES = ("seconds", "finished", "examples_per_s", "tokens_per_s", "mfu", "memory_mb")


def pick(rng, weights):
    """A key of {key: how often}."""
    return rng.choices(list(weights), list(weights.values()))[0]


# ---------------------------------------------------------------------------- commands


def commands(data):
    """{script: its flags}, on files in the folder `data`, which are made where they are missing."""
    world, teacher = data / "world", data / "teacher"
    if not (data / "commands.json").exists():
        make_demo(data / "demo" / "demo-s0", 0)
        world.mkdir()
        for name in ("corpus.h5", "videos.h5"):  # without raw/ beside them no probes are computed
            shutil.copy(data / "demo" / "demo-s0" / name, world)
        pairs, clip = pairs_and_tower(data / "demo" / "demo-s0", data)
        shutil.copy(pairs, world / "pairs.h5")
        for split, source, rows in (("train", "train", 96), ("dev", "dev", 24), ("test", "dev_seen", 8)):
            lines = (data / f"demo/demo-s0/raw/tasks/mishap/{source}.tsv").read_text().splitlines()[1:rows + 1]
            texts = [line.split("\t")[:2] for line in lines]
            table = [["index", "sentence"], *([str(i), text] for i, (text, _) in enumerate(texts))]
            if split != "test":
                table = [["sentence", "label"], *texts]
            (data / "glue" / "SST-2").mkdir(parents=True, exist_ok=True)
            (data / "glue" / "SST-2" / f"{split}.tsv").write_text(
                "".join("\t".join(row) + "\n" for row in table))
    videos = dict(videos=world / "videos.h5")
    eval_every = dict(eval_every=6)
    found = {
        "teacher": QUICK_TEACHER | STEPS | eval_every | videos,
        "distill": QUICK_STUDENT | STEPS | eval_every | dict(grad_every=6, train=world / "corpus.h5",
                                                             teacher=teacher),
        "adapt_xdbert": QUICK_ADAPTATION | STEPS | eval_every | dict(
            block_size=24, train=world / "pairs.h5", language=teacher, clip=data / "clip"),
        "finetune": STEPS | dict(tasks="sst2", data_dir=data / "glue", model=teacher, lr=1e-3, max_length=32,
                                 seeds=2)}
    found = {script: [f"--{name}={value}" for name, value in flags.items()]
             for script, flags in found.items()}
    if not teacher.exists():
        launch = Launch("teacher", [*found["teacher"], f"--out_dir={teacher}"], 1, data)
        assert launch.wait() == [0], launch.output()
    (data / "commands.json").write_text(json.dumps(found))
    return found


# ---------------------------------------------------------------------------- a process and its faults

SAVES = ("checkpoint.pt", "best.pt", "model.safetensors", "/model/")
NEEDS_SPACE = ("open", "os.mkdir", "os.rename", "save")


class Faults:
    """Counts operations on files below the working folder, and strikes at the n-th.

    how: count, signal, torn or full; journal: a file for a line an operation.
    """

    def __init__(self, journal, n=0, how="count", number=signal.SIGKILL, to_all=False):
        self.journal, self.n, self.how, self.number, self.to_all = journal, n, how, number, to_all
        self.count, self.inside, self.root = 0, False, os.getcwd() + "/"

    def arm(self):
        """Hears Python's audit events, and makes audit events of what has none: torch, safetensors, fsync."""
        torch.save = self.watched(torch.save, 1)
        safetensors.torch.serialize_file = self.watched(safetensors.torch.serialize_file, 1)
        os.fsync = lambda f: self.hear("os.fsync", (os.readlink(f"/proc/self/fd/{f}"),))
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if self.inside or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync"):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR) or isinstance(args[0], int):
            return
        path = os.path.join(self.root, os.fsdecode(args[0]))
        if path.startswith(self.root) and self.due(event, path.removeprefix(self.root)):
            self.strike(lambda: self.half(path) if event == "open" else None)

    def watched(self, save, place):
        def call(*args, **kw):
            path = os.fspath(args[place])
            if not self.due("save", path):
                return save(*args, **kw)
            if self.how == "full":  # what the library makes of it is part of the test
                args = [*args[:place], "/dev/full", *args[place + 1:]]
                return save(*args, **kw)

            def half():
                save(*args, **kw)
                os.truncate(path, os.path.getsize(path) // 2)
            self.strike(half)
            return save(*args, **kw)
        return call

    def half(self, path):
        with open(path, "a") as f:
            f.write('{"step": 4')

    def due(self, event, path):
        self.count += 1
        self.inside = True
        with open(self.journal, "a") as f:
            f.write(f"{event} {path}\n")
        self.inside = False
        return self.count == self.n and self.how != "count"

    def strike(self, half):
        self.inside = True
        Path(f"{self.journal}.struck").touch()
        if self.how == "full":
            self.inside = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.how == "torn":
            half()
        if self.to_all:
            os.killpg(0, self.number)
        os.kill(os.getpid(), self.number)
        self.inside = False


class Launch:
    """One start of a command with 1 or 2 processes, in the folder `cwd`; logs go beside it."""

    def __init__(self, script, flags, ranks, cwd, faults=(), real=False):
        self.cwd, self.real, self.ended = Path(cwd), real, {}
        self.cwd.mkdir(parents=True, exist_ok=True)
        n = next(n for n in itertools.count() if not Path(f"{cwd}.log{n}.0").exists())
        self.log = f"{cwd}.log{n}"
        if real:
            start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run",
                                                         "--standalone", f"--nproc_per_node={ranks}"]
            with open(f"{self.log}.0", "w") as f:
                self.process = subprocess.Popen(
                    [*start, str(ROOT / f"{script}.py"), *flags], stdout=f, stderr=f, cwd=cwd,
                    start_new_session=True)
            self.pids = [self.process.pid]
            return
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pids = []
        for rank in range(ranks):
            alone = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                self.become(script, flags, rank, alone, dict(faults) if rank == 0 else {})
            self.pids.append(pid)
            with contextlib.suppress(OSError):  # both sides do it: neither may be late
                os.setpgid(pid, self.pids[0])

    def become(self, script, flags, rank, environment, faults):
        """The child: runs the script as `python script.py` does, and ends as that would. Never returns."""
        status = 70
        try:
            with contextlib.suppress(OSError):
                os.setpgid(0, self.pids[0] if self.pids else 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log = os.open(f"{self.log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for f in (1, 2):
                os.dup2(log, f)
            os.chdir(self.cwd)
            os.environ.update(environment)
            sys.argv = [f"{script}.py", *flags]
            init = dist.init_process_group

            def joined(*args, **kw):
                init(*args, **kw)
                Path(f"{self.log}.joined{rank}").touch()
            dist.init_process_group = joined
            Faults(f"{self.log}.journal{rank}", **faults).arm()
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, flush=True)
                if "\n" in end.code or len(end.code) > 300 or not end.code:
                    print("NOT ONE LINE", flush=True)
        except KeyboardInterrupt:  # before the script could have caught it
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(status)

    def children(self):
        """The processes that torchrun started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == self.pids[0]:
                    found.append(int(path.parent.name))
        return found

    def disturb(self, seconds, number, to_all, rng):
        """Sends a signal after so many seconds, counted from when the processes know each other."""
        began, first = time.monotonic(), len(self.pids) > 1
        ready = [Path(f"{self.log}.joined{rank}") for rank in range(len(self.pids))] if first else []
        if self.real:
            ready = [Path(f"{self.log}.0")]
        while not all(path.exists() and (not self.real or path.stat().st_size) for path in ready):
            if self.poll() or time.monotonic() - began > LIMIT:
                return False
            time.sleep(0.002)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.poll():
                return False
            time.sleep(0.002)
        alive = [pid for pid in self.pids if pid not in self.ended]
        if self.real:
            workers = self.children()
            alive = [*alive, *workers] if to_all or not workers else [rng.choice(workers)]
        for pid in alive if to_all else [rng.choice(alive)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return True

    def poll(self):
        """Whether all have ended."""
        for pid in self.pids:
            if pid not in self.ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ended[pid] = os.waitstatus_to_exitcode(status)
        return len(self.ended) == len(self.pids)

    def wait(self):
        """Exit statuses by rank, negative for a signal; "hung" where a process had to be killed."""
        began, first, hung = time.monotonic(), None, []
        while not self.poll():
            now = time.monotonic()
            first = first or (now if self.ended else None)
            if now - (first or began) > (LIMIT if first else 4 * LIMIT):
                hung = [pid for pid in self.pids if pid not in self.ended]
                for pid in hung:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return ["hung" if pid in hung else self.ended[pid] for pid in self.pids]

    def output(self):
        return "".join(path.read_text(errors="replace") for rank in range(len(self.pids))
                       if (path := Path(f"{self.log}.{rank}")).exists())

    def journal(self):
        path = Path(f"{self.log}.journal0")
        return [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []

    def struck(self):
        """The operation at which a fault struck, or None."""
        return self.journal()[-1] if Path(f"{self.log}.journal0.struck").exists() else None


# ---------------------------------------------------------------------------- damage and comparison


def damage(path, way, rng, other):
    """Damages a checkpoint in one of WAYS; other: a whole checkpoint of another script."""
    content = bytearray(path.read_bytes())
    if way == "bit of a tensor":
        with zipfile.ZipFile(path) as archive:
            record = max(archive.infolist(), key=lambda record: record.file_size)
        content[record.header_offset + 200 + rng.randrange(record.file_size - 200)] ^= 1 << rng.randrange(8)
    elif way == "bytes of the directory":
        begin = content.find(b"PK\x01\x02")
        for _ in range(8):
            content[rng.randrange(begin, len(content))] ^= rng.randrange(1, 256)
    elif way == "missing record":
        with zipfile.ZipFile(path) as archive:
            records = {record.filename: archive.read(record) for record in archive.infolist()}
        del records[rng.choice([name for name in records if "/data" in name])]
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in records.items():
                archive.writestr(name, part)
        return
    path.write_bytes({"empty": b"", "half": content[:len(content) // 2], "last byte": content[:-1],
                      "zeros": bytes(len(content)), "text": b"no checkpoint\n",
                      "another script's": other.read_bytes()}.get(way, content))


def timeless(value):
    """A JSON value without times and speeds."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def content_of(path):
    """What of a file must be equal in every run of a command."""
    if path.name == "config.json" and (path.parent / "log.jsonl").exists():
        config = json.loads(path.read_text())
        return config["hashes"], {**config["config"], "resume": ""}
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.name == "log.jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".pt":
        state = flat(torch.load(path, weights_only=True))
        return {name: x.numpy().tobytes() if torch.is_tensor(x) else x for name, x in state.items()
                if name not in ("/seconds", "/config/resume")}
    return None if path.suffix == ".prev" else path.read_bytes()


def leaves(folder):
    """{path: content_of} of all that a run leaves."""
    return {str(path.relative_to(folder)): path.is_file() and content_of(path)
            for path in sorted(folder.rglob("*"))}


def unlike(a, b):
    """What of two `leaves` differs, in words; "" where nothing does."""
    if a.keys() != b.keys():
        return f"files: missing {sorted(a.keys() - b.keys())}, stray {sorted(b.keys() - a.keys())}"
    return ", ".join(f"{name} differs" for name in a if a[name] != b[name])


# ---------------------------------------------------------------------------- rounds


class Round:
    """One round: see the file's head. Its choices follow from seed and number alone."""

    def __init__(self, args, whole, number):
        self.rng = rng = random.Random(f"{args.seed}/{number}")
        self.number, self.whole = number, whole
        drawn = pick(rng, SCRIPTS), pick(rng, {1: 3, 2: 2}), pick(rng, KINDS)
        asked = args.script, args.ranks, args.kind
        self.script, self.ranks, self.kind = (a or b for a, b in zip(asked, drawn))
        self.real = rng.random() < args.real
        self.folder = args.work / f"round{args.seed}-{number}"
        self.cwd, self.told, self.counts = self.folder / "cwd", [], collections.Counter()

    def command(self):
        """The flags: --resume auto, or bare where there is a checkpoint to go on from."""
        run = self.run()
        can = any((run / name).exists() for name in ("checkpoint.pt", "checkpoint.pt.prev"))
        begun = can and not (run / "results.json").exists()
        resume = "--resume" if begun and self.script != "finetune" and self.rng.random() < 0.25 else "--resume=auto"
        return [*self.whole["commands"][self.script], "--out_dir=run", resume]

    def run(self):
        """The folder of the run that goes on."""
        if self.script != "finetune":
            return self.cwd / "run"
        first, second = (self.cwd / "run" / "sst2" / f"s{seed}" for seed in (0, 1))
        return second if second.exists() else first

    def tell(self, text):
        self.told.append(text)

    def disturbed(self):
        """Starts the command and disturbs it once; whether something struck."""
        rng, kind = self.rng, self.kind
        if kind == "damage" or self.real:
            kind = "moment" if self.real else pick(rng, {"moment": 1, "operation": 1, "save": 1})
        number, to_all = getattr(signal, name := pick(rng, SIGNALS)), rng.random() < 0.5
        seconds, faults = rng.random() * self.whole["seconds"][self.script, self.ranks], {}
        if kind != "moment":
            operations = [(i, event, path) for i, (event, path) in
                          enumerate(self.whole["operations"][self.script, self.ranks], 1)]
            if kind == "save":
                operations = [x for x in operations if any(name in f"/{x[2]}" for name in SAVES)]
            if kind in ("torn", "full"):
                operations = [x for x in operations if x[1] in (
                    ("open", "save") if kind == "torn" else NEEDS_SPACE)]
            n, event, _ = rng.choice(operations)
            how = kind
            if kind == "save":
                how, number, name = rng.choice(["torn", "signal"]) if event == "save" else "signal", 9, "SIGKILL"
            faults = dict(n=n, how="signal" if kind == "operation" else how,
                          number=9 if kind == "torn" else number, to_all=to_all)
        launch = Launch(self.script, self.command(), self.ranks, self.cwd, faults, self.real)
        if kind == "moment":
            struck = launch.disturb(seconds, number, to_all, rng) and f"after {seconds:.2f} s"
        statuses = launch.wait()
        if kind != "moment":
            struck = launch.struck()
        self.tell(f"{kind} {name if kind in ('moment', 'operation') else ''} {'all' * to_all} {struck} -> {statuses}")
        self.check(launch, statuses)
        if struck:
            self.counts[kind] += 1
            if kind in ("moment", "operation", "save"):
                self.counts[name] += 1
            if kind != "moment" and any(name in f"/{struck[1]}" for name in SAVES):
                self.counts["in the save path"] += 1
        return bool(struck)

    def check(self, launch, statuses):
        """How processes ended: by a signal, well, or in one line."""
        output = launch.output()
        if "hung" in statuses:
            raise AssertionError("a process did not end")
        if "NOT ONE LINE" in output or "Traceback" in output and not (launch.real and self.ranks > 1):
            raise AssertionError(f"no single line: {output[-2000:]}")

    def damaged(self):
        """Damages the newest checkpoint, if there is one; what the next output must hold."""
        path = self.run() / "checkpoint.pt"
        if not path.exists() or (self.run() / "results.json").exists():
            return None
        way, rng = self.rng.choice(WAYS), self.rng
        other = self.whole["work"] / f"whole-{'teacher' if self.script != 'teacher' else 'distill'}-1"
        damage(path, way, rng, other / "run" / "checkpoint.pt")
        self.tell(f"damaged: {way}")
        self.counts[f"damage: {way}"] += 1
        before = path.with_name("checkpoint.pt.prev").exists()
        if way == "another script's":
            kept, launch = path.read_bytes(), Launch(self.script, self.command(), self.ranks, self.cwd)
            statuses = launch.wait()
            self.check(launch, statuses)
            assert 0 not in statuses and path.read_bytes() == kept, f"another's checkpoint: {launch.output()}"
            path.unlink()
            return None
        return "directory" not in way and ("is damaged" if before else "starts anew")

    def play(self):
        """Returns "" or what went wrong."""
        try:
            for turn in range(3):
                struck = self.disturbed()
                must = self.damaged() if self.kind == "damage" else None
                if must or turn == 2 or not struck or self.rng.random() < 0.6:
                    break
            launch = Launch(self.script, [*self.command()[:-1], "--resume=auto"] if must else self.command(),
                            self.ranks, self.cwd, real=self.real)
            statuses = launch.wait()
            self.check(launch, statuses)
            output = launch.output()
            assert statuses == [0] * len(statuses), f"the last start ended with {statuses}: {output[-1000:]}"
            assert not must or must in output and ("starts anew" in output) == ("anew" in must), output
            return unlike(self.whole["leaves"][self.script, self.ranks], leaves(self.cwd))
        except (AssertionError, OSError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"


def undisturbed(args):
    """{what: ...} of the runs that all are compared with."""
    whole = {"commands": commands(args.work), "work": args.work, "seconds": {}, "operations": {}, "leaves": {}}
    peak_flops(torch.device("cpu"), torch.float32)  # kept for all processes, as is the next
    code_hash()
    for script, ranks in itertools.product(SCRIPTS, (1, 2)):
        if args.script in ("", script) and args.ranks in (0, ranks) or ranks == 1 and args.script != script:
            cwd = args.work / f"whole-{script}-{ranks}"
            shutil.rmtree(cwd, ignore_errors=True)
            began = time.monotonic()
            launch = Launch(script, [*whole["commands"][script], "--out_dir=run", "--resume=auto"], ranks, cwd)
            assert launch.wait() == [0] * ranks, launch.output()
            whole["seconds"][script, ranks] = time.monotonic() - began
            whole["operations"][script, ranks] = launch.journal()
            whole["leaves"][script, ranks] = leaves(cwd)
            print(f"{script}, {ranks} processes: {time.monotonic() - began:.1f} s, {len(launch.journal())} "
                  "operations on files", flush=True)
    return whole


def play(number):
    one = Round(*SHARED, number)
    wrong = one.play()
    if not wrong:
        shutil.rmtree(one.folder)
    return one.number, one.script, one.ranks, one.kind, one.real, one.counts, one.told, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at once")
    parser.add_argument("--script", default="", choices=("", *SCRIPTS))
    parser.add_argument("--ranks", type=int, default=0, choices=(0, 1, 2), help="processes; 0 = either")
    parser.add_argument("--kind", default="", choices=("", *KINDS))
    parser.add_argument("--real", type=float, default=0.03, help="share of rounds as commands")
    parser.add_argument("--work", type=Path, default=None, help="folder for runs; empty = a new one")
    args = parser.parse_args()
    own = args.work is None
    args.work = Path(tempfile.mkdtemp(prefix="faults-")) if own else args.work.resolve()
    args.work.mkdir(exist_ok=True)
    began = time.monotonic()
    global SHARED
    SHARED = args, undisturbed(args)
    counts, failed = collections.Counter(), []
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        numbers = range(args.first, args.first + args.rounds)
        for done, (number, script, ranks, kind, real, own_counts, told, wrong) in enumerate(
                pool.imap_unordered(play, numbers), 1):
            counts += own_counts + collections.Counter([script, f"{ranks} ranks", f"{kind} rounds"]
                                                       + ["real commands"] * real)
            if wrong:
                failed.append(number)
                print(f"FAILED round {number} of seed {args.seed}: {script}, {ranks} ranks, {kind}"
                      f"{', real' * real}: {'; '.join(told)}: {wrong}", flush=True)
            if done % 50 == 0:
                print(f"{done} rounds, {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)
    if own and not failed:
        shutil.rmtree(args.work)
    print(f"seed {args.seed}: {args.rounds} rounds from {args.first} on in {time.monotonic() - began:.0f} s; "
          + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
          + f"; failed: {', '.join(map(str, sorted(failed))) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
