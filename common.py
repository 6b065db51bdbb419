"""Plumbing without PyTorch: flags, progress, keyed random numbers, files, tables."""
import argparse
import contextlib
import dataclasses
import difflib
import glob
import gzip
import inspect
import io
import itertools
import json
import math
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import zipfile
import zlib
from pathlib import Path
from pickletools import genops

import numpy as np

# ---------------------------------------------------------------------------- flags


FARTHEST = 10 ** 15  # from 0, of any number that is given: what is computed from it stays within 64 bits
# least and most of flags of any script: shares, and what takes memory or time before the first step
LIMITS = {"batch_size": (1, 10 ** 6), "grad_accum": (1, 10 ** 6), "log_every": (1, 10 ** 6),
          "block_size": (3, 10 ** 6), "max_frames": (1, 10 ** 6), "segments": (1, 10 ** 4),
          "video_layers": (0, 1000), "cross_layers": (0, 1000), "schedule_steps": (0, FARTHEST),
          "mask_rate": (0, 1), "cliptc_rate": (0, 1), "crd_momentum": (0, 1), "crd_tokens": (0, 10 ** 9),
          "crd_negatives": (1, 10 ** 7), "crd_dim": (1, 10 ** 5), "crd_bank_size": (0, 10 ** 11)}


class Switch(str):
    """Type of a flag that is false, true (also bare) or auto."""


def parse_cli(Config, presets, argv=None, needs={}):
    """Command line -> Config. Each field is a flag, `--name value` or `--name=value`; dashes are underscores.

    Config: frozen dataclass of int, float, str, bool and Switch fields, one of them `preset`; the comment
    behind a field is its help. presets: {name: {field: value}, or a function from the given flags to that};
    flags beat the preset. A text is converted by the field's type, never evaluated; a bare flag means true.
    needs: see check_needs. A mistake ends the program with one line that names the flag.
    """
    fields = {f.name: f for f in dataclasses.fields(Config)}
    args, given = list(sys.argv[1:] if argv is None else argv), {}
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print(cli_help(Config, presets))
            raise SystemExit(0)
        name, equals, text = arg[2:].partition("=")
        name = name.replace("-", "_")
        if not arg.startswith("--") or name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise SystemExit(f"unknown flag {arg}; {hint}")
        if name in given:
            raise SystemExit(f"--{name} is given twice; keep one")
        kind = fields[name].type
        if not equals:
            bare = not args or args[0].startswith("--")
            if bare and kind not in (bool, Switch):
                raise SystemExit(f"--{name} needs a value ({kind.__name__})")
            text = "true" if bare else args.pop(0)
        given[name] = convert(name, text, kind)
    preset = given.get("preset", fields["preset"].default)
    if preset not in presets:
        raise SystemExit(f"--preset {preset}: choose one of {', '.join(presets)}")
    values = presets[preset]
    try:
        cfg = Config(**((values(given) if callable(values) else values) | given))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    check_needs(cfg, given, needs)
    return cfg


def check_needs(cfg, given, needs):
    """SystemExit where a flag was given, with another value than its default, that nothing will read.

    needs: {flag: (another flag, the values of that with which the first is read)}; of values joined by +,
    such as objectives, one is enough. The other flag's own needs hold, too. --epochs needs --max_steps 0 in
    every script.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
    for name in (name for name in given if given[name] != defaults[name]):
        if missed := missed_need(cfg, name, needs):
            at, values = missed
            way = f"it out, or give --{at} {' or '.join(values).lower()}" if any(values) else "one out"
            raise SystemExit(f"--{name} {given[name]}: is not read with --{at} {getattr(cfg, at)}; leave "
                             f"{way}")


def missed_need(cfg, name, needs):
    """(another flag, values) that flag `name` is not read without, None where it is read; see check_needs."""
    needs = needs | {"epochs": ("max_steps", ("0",))}
    while name in needs:
        name, values = needs[name]
        if set(str(getattr(cfg, name)).split("+")).isdisjoint(values):
            return name, values
    return None


def without_unread(cfg, needs):
    """The Config with the flags that nothing reads at their defaults."""
    return dataclasses.replace(cfg, **{f.name: f.default for f in dataclasses.fields(cfg)
                                       if missed_need(cfg, f.name, needs)})


def spelled(arg, mark):
    """A flag's name with `mark`, - or _, in place of the other: --clip_vocab=a_b -> --clip-vocab=a_b; other
    text as it is."""
    name, equals, value = arg.partition("=")
    if not name.startswith("--") or " " in name:
        return arg
    return "--" + name[2:].replace("-", mark).replace("_", mark) + equals + value


def convert(name, text, kind):
    """The text of flag `name` as its type; SystemExit names the flag where that fails."""
    if kind in (bool, Switch):
        word = {"1": "true", "yes": "true", "0": "false", "no": "false"}.get(text.lower(), text.lower())
        if word in ("true", "false") or kind is Switch and word == "auto":
            return word == "true" if kind is bool else word
        raise SystemExit(f"--{name} {text}: write true or false" + " or auto" * (kind is Switch))
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError:
        hint = " (a whole number, without point or exponent)" if kind is int else ""
        raise SystemExit(f"--{name} {text}: not a valid {kind.__name__}{hint}") from None
    if kind in (int, float) and abs(value) > FARTHEST:
        raise SystemExit(f"--{name} {text}: must lie between -10^15 and 10^15")
    return value


def stored_config(Config, flags, path):
    """Config of the flags in a run's config.json at `path`; those that it no longer has are left out.

    SystemExit where a value is none that the command line would take.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    try:
        return Config(**{name: convert(name, str(flags[name]), kinds[name]) for name in flags.keys() & kinds})
    except (ValueError, SystemExit) as error:
        raise SystemExit(f"{path}: {error}; make the run again") from None


def check_fields(cfg, choices, positive):
    """For a Config's __post_init__: ValueError where a field has no allowed value.

    choices: {field: allowed values}; positive: fields that must be above 0. The fields that every script has
    are checked, too.
    """
    choices = choices | {"dtype": ("float32", "bfloat16", "float16"), "resume": ("false", "true", "auto")}
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"--{name} {getattr(cfg, name)}: choose one of {', '.join(allowed)}")
    for name in positive:
        if getattr(cfg, name) <= 0:
            raise ValueError(f"--{name} {getattr(cfg, name)}: must be above 0")
    for name in ("grad_clip", "weight_decay", "max_minutes", "save_every", "save_minutes", "max_steps",
                 "warmup_steps", "epochs"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"--{name} {getattr(cfg, name):g}: must not be negative")
    if cfg.device == "mps" and cfg.grad_checkpoint:  # PyTorch would draw another dropout in backward
        raise ValueError("--grad_checkpoint: not with --device mps; raise --grad_accum instead")
    if not (cfg.save_every or cfg.save_minutes):
        raise ValueError("--save_every 0 needs --save_minutes")
    if type(cfg).max_steps and not cfg.max_steps and not cfg.epochs:  # finetune.py's tasks have their own
        raise ValueError("--max_steps 0 needs --epochs")
    for name, (least, most) in LIMITS.items():
        if not least <= getattr(cfg, name, least) <= most:
            raise ValueError(f"--{name} {getattr(cfg, name)}: must be from {least} to {most:,}")
    if not (0 <= cfg.dropout < 1 or cfg.dropout < 0 > type(cfg).dropout):  # finetune.py's is below 0
        raise ValueError(f"--dropout {cfg.dropout:g}: must be at least 0 and below 1")
    if not 0 <= cfg.beta2 < 1:
        raise ValueError(f"--beta2 {cfg.beta2:g}: must be at least 0 and below 1")
    if cfg.warmup_steps > 1 and cfg.warmup_steps % 1:
        raise ValueError(f"--warmup_steps {cfg.warmup_steps:g}: a whole number of steps, or a share below 1")
    if 0 < cfg.max_steps < cfg.warmup_steps:
        raise ValueError(f"--warmup_steps {cfg.warmup_steps:g}: at most --max_steps ({cfg.max_steps})")
    for name in ("grad_every", "eval_every", "save_every"):
        if getattr(cfg, name, 0) % cfg.log_every:
            raise ValueError(f"--{name} {getattr(cfg, name)}: must be a multiple of --log_every "
                             f"({cfg.log_every})")


def cli_help(Config, presets):
    """The flags with type, default and the comment that stands behind each field in the source."""
    source = inspect.getsource(Config)
    lines = [(sys.modules[Config.__module__].__doc__ or "").strip(), "",
             f"presets: {', '.join(presets)} (the values are at the top of the file)", ""]
    for f in dataclasses.fields(Config):
        comment = re.search(rf"^ +{f.name}:.*?  # (.*)$", source, re.M)
        default, text = '""' if f.default == "" else f.default, comment.group(1) if comment else ""
        lines.append(f"  --{f.name:<20} {f.type.__name__.lower():<6} {default!s:<14} {text}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- the end of a program


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line."""

    def error(self, message):
        raise SystemExit(f"{self.prog}: {message}; see {self.prog} --help")


@contextlib.contextmanager
def one_line_end():
    """Around a program, or as its decorator: where a user or a file stops it, it ends in one line.

    What is no user's mistake keeps its traceback.
    """
    try:
        yield
    except SystemExit as end:
        raise SystemExit(one_line(end.code) if isinstance(end.code, str) else end.code) from None
    except KeyboardInterrupt as end:
        raise SystemExit(str(end) or "interrupted") from None
    except BrokenPipeError:  # of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if not error.filename:
            raise
        raise SystemExit(one_line(f"{error.filename}: {error.strerror}")) from None


def one_line(text, most=300):
    """A message as one printable line of at most `most` characters; its beginning and its end stay.

    What is too long loses the middle of its longest words first, mostly paths and values, then its own.
    """
    text = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
    if len(text) > most:
        text = " ".join(cut(word, most // 4) for word in text.split(" "))
    return cut(text, most)


def cut(text, most):
    """A text of at most `most` characters, in the middle of which "..." stands for what is left out."""
    return text if len(text) <= most else text[:(most - 3) // 2] + "..." + text[len(text) - (most - 2) // 2:]


# ---------------------------------------------------------------------------- processes and device


def print0(*text, **kw):
    """print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*text, flush=True, **kw)


def progress(iterable, total, unit, desc, **kw):
    """tqdm on rank 0 with an ETA; silent on the other ranks and for what takes under a second."""
    from tqdm import tqdm
    return tqdm(iterable, total=total, unit=unit, desc=desc, delay=1, dynamic_ncols=True, mininterval=0.5,
                disable=int(os.environ.get("RANK", 0)) != 0, **kw)


def duration(seconds):
    """63 -> '1m03s'."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def birth(pid):
    """When a process of this host was started, in ticks since boot, or "" where it does not live."""
    with contextlib.suppress(OSError):
        if Path("/proc/self/stat").exists():
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return "" if state[0] in "ZX" else state[19]  # a zombie has ended, though nobody has asked how
        os.kill(int(pid), 0)  # asks only
        return "alive"
    return ""


def clear_up_on_sigterm():
    """Makes SIGTERM leave through every `finally`, as Ctrl-C does, so that nothing half-written stays.

    As KeyboardInterrupt: SystemExit is what readers raise, and callers go on without the file.
    """
    def leave(number, frame):
        raise KeyboardInterrupt("terminated")
    signal.signal(signal.SIGTERM, leave)


# ---------------------------------------------------------------------------- randomness


def hash64(*keys):
    """Counter-based random bits: uint64 array, a pure function of the keys (str, int, int arrays; broadcast).

    Each key is mixed in by splitmix64's finaliser. Draws keyed by (seed, step, position in the global batch)
    do not depend on rank, number of ranks or history: that makes DDP equal to one process and resume exact.
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for key in keys:
            key = zlib.crc32(key.encode()) if isinstance(key, str) else key
            state = state ^ np.asarray(key).astype(np.int64).view(np.uint64)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def keyed_uniform(*keys):
    """Uniform numbers in [0, 1), float64, one per broadcast element of the keys; see hash64."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


def keyed_integers(high, *keys):
    """Uniform integers in [0, high), int64; `high` broadcasts with the keys."""
    return np.minimum((keyed_uniform(*keys) * high).astype(np.int64), np.asarray(high) - 1)


# ---------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic(path, keep=""):
    """Yields a scratch path that becomes `path`, a file or a folder, when the block ends well.

    Whatever interrupts the block, `path` holds what it held before. keep: suffix under which a former file
    stays beside it. The scratch path is alone in a folder, whose other content is dropped. Those of killed
    processes are removed. SystemExit where the disk is full or read-only.
    """
    path, host = Path(path), socket.gethostname()
    scratch, ready = (path.with_name(f"{path.name}.{host}.{os.getpid()}.{end}") for end in ("tmp", "new.tmp"))
    try:
        sweep(path)
        scratch.mkdir()
        part = scratch / path.name
        yield part
        if part.is_file():
            with open(part, "rb") as f:
                os.fsync(f.fileno())
        os.replace(part, ready)
        remove(scratch)  # now: a process that is killed when `path` is there leaves nothing beside it
        if keep and path.exists():
            os.replace(path, path.with_name(path.name + keep))
        os.replace(ready, path)
    except OSError as error:
        raise SystemExit(f"{path}: was not written ({error.strerror or error}); free disk space or choose "
                         "another folder") from None
    finally:
        for rest in (scratch, ready):
            remove(rest)


def sweep(path):
    """Removes what processes of this host left beside `path` that were killed while they wrote it."""
    name = f"{path.name}.{socket.gethostname()}."
    for rest in path.parent.glob(f"{glob.escape(name)}*.tmp"):
        pid = rest.name.removeprefix(name).partition(".")[0]
        if pid == str(os.getpid()) or pid.isdecimal() and not birth(pid):
            remove(rest)


def remove(path):
    """Removes a file or a folder, as far as that is possible; nothing where there is none."""
    with contextlib.suppress(OSError):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def write_json(path, value):
    """A value as indented JSON, atomically; null for a number that is not finite, which JSON cannot hold."""
    def finite(value):
        if isinstance(value, dict):
            return {key: finite(x) for key, x in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    with atomic(path) as part:
        part.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


HASHED = 1 << 22, 256  # bytes of a block, and of how many at most a hash is made


def update_hash(digest, size, read):
    """Adds a content of `size` bytes to a hash of hashlib; read(first, last) gives its bytes.

    Up to 256 blocks of 4 MiB, 1 GiB, these are all of it. Of more they are the size in decimal digits and 256
    blocks, which begin at byte i (size - 4 MiB) // 255, i = 0 .. 255, so that the first and the last are
    among them: a change between them that leaves the size is not seen.
    """
    block, most = HASHED
    places = range(0, size, block)
    if len(places) > most:
        digest.update(b"%d" % size)
        places = [i * (size - block) // (most - 1) for i in range(most)]
    for first in places:
        digest.update(read(first, min(first + block, size)))


LARGEST = 1 << 32  # bytes of a file that is read at once; corpora are not
DEEPEST = 100  # lists and objects of a JSON inside of each other: what walks through more may fail
DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN is read as it is written


# how files begin that are no text: (bytes, what it is, what to do)
NO_TEXT = [(re.compile(form, re.S | re.I), *words) for form, *words in (
    (rb"\xfd7zXZ", "xz", "unpack it first"), (rb"BZh\d1AY", "bzip2", "unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "unpack it first"), (rb"PK\x03\x04", "zip", "unpack it first"),
    (rb"7z\xbc\xaf", "7z", "unpack it first"), (rb"\x1f\x8b", "gzip in gzip", "unpack it first"),
    (rb".{257}ustar", "a tar archive", "unpack it first"),
    (rb"PAR1|ARROW1", "parquet", "write its text to a text file first"),
    (rb"\x89HDF", "HDF5", "give the text that it was packed from"),
    (rb"\0{8}", "zeros", "perhaps of an unfinished download; fetch it anew"),
    (rb"%PDF-", "PDF", "write its text to a text file first"),
    (rb"\s*<mediawiki\b", "a dump of Wikipedia", "extract its text first, for instance with wikiextractor"),
    (rb"\s*<(!doctype )?html\b", "a web page", "perhaps of a failed download; give the file itself"),
    (rb"version https://git-lfs", "a pointer of git-lfs", "fetch the file itself with `git lfs pull`"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff|([^\0]\0\0\0){8}", "UTF-32", "convert it with `iconv -f utf-32 -t utf-8`"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it with `iconv -f utf-16 -t utf-8`"),
    (rb"([^\0]\0){8}", "UTF-16", "convert it with `iconv -f utf-16le -t utf-8`"),
    (rb"(\0[^\0]){8}", "UTF-16", "convert it with `iconv -f utf-16be -t utf-8`"))]


class Unpacked(io.RawIOBase):
    """A gzipped file; SystemExit where it unfolds to more than 100 times its size: text does to 3 to 10."""

    def __init__(self, path, file):
        self.path, self.file = path, gzip.GzipFile(fileobj=file)
        self.most = 100 * (os.path.getsize(path) + (1 << 16))

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *where):
        return self.file.seek(*where)

    def readinto(self, buffer):
        size = self.file.readinto(buffer)
        if self.tell() > self.most:
            raise SystemExit(f"{self.path}: unfolds to more than 100 times its size, as no text does; unpack "
                             "it first if it is right")
        return size


@contextlib.contextmanager
def open_text(path):
    """A text file as a binary stream, unpacked where it is gzipped; SystemExit names what is no text."""
    try:
        with open(path, "rb") as file:
            packed = file.peek(2).startswith(b"\x1f\x8b")
            f = io.BufferedReader(Unpacked(path, file), 1 << 16) if packed else file
            head = f.peek(1024)
            for form, what, advice in NO_TEXT:
                if form.match(head):
                    raise SystemExit(f"{path}: is {what}, not text; {advice}")
            yield f
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}: damaged gzip ({error}); fetch it anew") from None


def read_text(path, advice="fetch it anew"):
    """Text of a UTF-8 file, gzipped or not, without its byte-order mark; SystemExit where there is none."""
    try:
        with open_text(path) as f:
            pieces = iter(lambda: f.read(1 << 20), b"")  # read(n) takes memory for n bytes first
            text = b"".join(itertools.islice(pieces, (LARGEST >> 20) + 1))
        if len(text) > LARGEST:
            raise SystemExit(f"{path}: is larger than {LARGEST >> 30} GiB; {advice}")
        text = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"{path}, line {line}: not UTF-8; convert the file first, for instance with `iconv "
                         "-f latin1 -t utf-8`") from None
    except (OSError, ValueError) as error:  # the latter of a path with a NUL
        raise SystemExit(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); {advice}") from None
    if not text.strip():
        raise SystemExit(f"{path}: is empty; {advice}")
    return text


def decode_json(text, at=0):
    """(the JSON value that begins at text[at], its end); JSONDecodeError where it is malformed or cut off.

    ValueError where it is nested too deep, or has an integer of thousands of digits or half of a surrogate
    pair, which no text can hold.
    """
    try:
        value, end = DECODER.raw_decode(text, at)
        if "\\u" in text[at:end]:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    level, depth = [[value]], 0
    while level := [x for held in level for x in (held.values() if isinstance(held, dict) else held)
                    if isinstance(x, (dict, list))]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deep")
    return value, end


def parse_json(text):
    """The value of a text that is JSON; ValueError as decode_json."""
    value, end = decode_json(text, len(text) - len(text.lstrip()))
    if text[end:].strip():
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def read_json(path, advice="fetch it anew"):
    """The object in a JSON file; SystemExit where it is missing, damaged or no object."""
    try:
        value = parse_json(read_text(path, advice))
    except ValueError as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise SystemExit(f"{path}{where}: broken JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise SystemExit(f"{path}: holds a JSON {type(value).__name__}, no object; {advice}")
    return value


def read_settings(path, kinds, advice="fetch it anew"):
    """read_json of an object that must have the keys of `kinds` {key: type, or types}, with such values."""
    settings = read_json(path, advice)
    for key, kind in kinds.items():
        value = settings.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            wrong = repr(value)[:40] if key in settings else "missing"
            raise SystemExit(f"{path}: {key} is {wrong}; {advice}")
    return settings


def peek_json(path):
    """The object in a JSON file, {} where none can be read."""
    with contextlib.suppress(SystemExit):
        return read_json(path)
    return {}


def check_archive(path):
    """ValueError where a file of PyTorch's claims more than it holds, so that reading could take any amount
    of memory: parts are compressed, which PyTorch's never are, or see check_pickle."""
    size = Path(path).stat().st_size
    if not zipfile.is_zipfile(path):
        # of before PyTorch 1.6: three short pickles, then the tensors'; a file's read(n) takes n bytes first
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for first in (True, True, True, False):
                check_pickle(content, size, first)
        return
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                raise ValueError(f"{part.filename} is compressed")
            if part.filename.endswith(".pkl"):
                check_pickle(archive.read(part), part.file_size)


def check_pickle(content, size, integers=True):
    """ValueError where the memo of a pickle (bytes or a stream) is longer than `size`, or an integer of it is
    larger, unless `integers` may be.

    From 2^40 on it may be: optimizers of before PyTorch 1.5 stored the addresses of their parameters, and a
    claim of that much fails at once, as no machine has the memory.
    """
    for opcode, value, _ in genops(content):
        memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if isinstance(value, int) and value > size and (memo or not integers and value < 1 << 40):
            raise ValueError(f"its memo has a place {value}" if memo else
                             f"it claims {value} of something, and has {size} bytes")


def hub_advice(path, otherwise):
    """What to do about a path where nothing is: it may be a name of Hugging Face's hub."""
    if Path(path).exists() or not re.fullmatch(r"(\w[\w.-]{,40}/)?\w[\w.-]{,60}", str(path).rstrip("/")):
        return otherwise
    return ("nothing is fetched from the hub; give a run, or the folder that `huggingface-cli download "
            f"{path} --local-dir {Path(path).name}` makes")


# ---------------------------------------------------------------------------- tables


def table(rows):
    """Text of a table: the first column to the left, the others to the right, a line under the head.

    rows: lists of str of one length, the head first.
    """
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(row[1:], width[1:]))])
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
