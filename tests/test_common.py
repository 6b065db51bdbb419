"""Proves the plumbing: flags, keyed randomness, atomic files, readers, tables.

Run: python -m pytest -q tests/test_common.py
"""
import dataclasses
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import stop_line

import common
from common import Switch, atomic, parse_cli
from parts import examples
from parts.vocab import SPECIALS, Vocab


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "demo"  # the preset
    lr: float = 1e-3  # learning rate
    max_steps: int = 10  # how many
    out_dir: str = ""  # where
    use_head: bool = True  # a switch
    resume: Switch = "false"  # go on

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: must be 1 or more")


PRESETS = {"demo": {}, "paper": {"lr": 2e-4, "max_steps": 500}}


@pytest.mark.parametrize("argv, field, value", [
    (["--lr", "1"], "lr", 1.0), (["--lr=1e-4"], "lr", 1e-4), (["--max-steps", "7"], "max_steps", 7),
    (["--max_steps=7"], "max_steps", 7), (["--use_head", "false"], "use_head", False),
    (["--use-head=0"], "use_head", False), (["--resume"], "resume", "true"),
    (["--resume", "--lr", "2"], "resume", "true"), (["--resume=auto"], "resume", "auto"),
    (["--resume", "no"], "resume", "false"), (["--out_dir", "123"], "out_dir", "123"),
    (["--out_dir=a=b"], "out_dir", "a=b"), (["--out_dir="], "out_dir", ""),
    (["--preset", "paper"], "lr", 2e-4), (["--lr", "3", "--preset", "paper"], "lr", 3.0),
    (["--preset=paper"], "max_steps", 500)])
def test_cli_converts_by_the_fields_type(argv, field, value):
    got = getattr(parse_cli(Config, PRESETS, argv), field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argv, word", [
    (["--lrr", "1"], "did you mean --lr"), (["lr", "1"], "unknown flag lr"), (["--lr", "fast"], "--lr fast"),
    (["--max_steps", "1e5"], "without point or exponent"), (["--lr", "1", "--lr", "2"], "given twice"),
    (["--lr"], "needs a value"), (["--out_dir", "--resume"], "needs a value"),
    (["--use_head", "maybe"], "true or false"), (["--use_head", "auto"], "true or false"),
    (["--resume", "maybe"], "true or false or auto"), (["--preset", "big"], "demo, paper"),
    (["--max_steps", "0"], "1 or more"), (["--lr", "__import__('os')"], "not a valid float"),
    (["--lr", "nan"], "not a valid float"), (["--lr=inf"], "not a valid float"),
    (["--lr", "1e22"], "--lr 1e22: must lie between -10^15 and 10^15"), (["--lr=-1e22"], "must lie between"),
    (["--max_steps", str(10 ** 22)], "must lie between"), (["--max_steps", "9" * 5000], "not a valid int")])
def test_cli_mistake_ends_in_one_line(argv, word):
    with pytest.raises(SystemExit) as error:
        parse_cli(Config, PRESETS, argv)
    assert word in str(error.value) and "\n" not in str(error.value)


NEEDS = {"use_head": ("out_dir", ("a", "b")), "lr": ("resume", ("false", "auto")),
         "max_steps": ("use_head", ("True",))}


@pytest.mark.parametrize("argv, says", [
    (["--use_head=false", "--out_dir=c+b"], ""), (["--use_head"], ""),  # its default, so nothing is lost
    (["--lr=9", "--resume=auto"], ""), (["--preset=paper", "--resume"], ""),  # not given
    (["--use_head=false", "--out_dir=c"], "--use_head False: is not read with --out_dir c; leave it out, or "
     "give --out_dir a or b"), (["--lr=9", "--resume"], "--lr 9.0: is not read with --resume true"),
    (["--max_steps=9", "--out_dir=c"], "--max_steps 9: is not read with --out_dir c"),  # by way of use_head
    (["--max_steps=9", "--out_dir=a"], "")])
def test_flag_that_nothing_reads_is_refused(argv, says):
    if not says:
        assert parse_cli(Config, PRESETS, argv, NEEDS)
        return
    assert stop_line(parse_cli, Config, PRESETS, argv, NEEDS).startswith(says)


# ---------------------------------------------------------------------------- the end of a program

LONG = "/home/" + "x" * 99_999


@pytest.mark.parametrize("text, begins, ends", [
    ("f.txt: no such file", "f.txt: no such file", "f.txt: no such file"),
    (f"{LONG}: no such file; pack it", "/home/xxx", "xxx: no such file; pack it"),
    (f"{LONG}, {LONG}: no such file", "/home/xxx", "xxx: no such file"),
    (f"--model {LONG}: no model there; give one", "--model /home/", "no model there; give one"),
    (f"--model {'a b ' * 9999}: no model there; give one", "--model a b ", ": no model there; give one"),
    (f"f.txt, line 3: {LONG}; {'advice ' * 30}end", "f.txt, line 3: /home/x", "advice end"),
    ("a\nb\tc\r\x1b[31m\x00 \u2028\ud800 \u202e.txt: e", "a b c \\x1b[31m\\x00  \\ud800 \\u202e.txt", "txt: e"),
    ("a\n" * 5000, "a a a", "a a ")])
def test_program_ends_in_one_printable_line_that_keeps_name_and_advice(text, begins, ends):
    for _ in range(2):  # once more changes nothing
        with pytest.raises(SystemExit) as end, common.one_line_end():
            raise SystemExit(text)
        text = end.value.code
        assert text.startswith(begins) and text.endswith(ends) and len(text) <= 300 and text.isprintable()


def test_sigterm_ends_those_who_go_on_without_a_file(monkeypatch, tmp_path):
    """A run whose config.json cannot be read starts anew, one without its cache of tokens goes on."""
    def terminated(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    monkeypatch.setattr(common, "read_json", terminated)
    monkeypatch.setattr(examples.np, "savez", terminated)
    before, vocab = signal.getsignal(signal.SIGTERM), Vocab([*SPECIALS, "a"])
    try:
        common.clear_up_on_sigterm()
        for going_on in (lambda: common.peek_json("x"), lambda: examples.tokenize(["a"], vocab, tmp_path)):
            with pytest.raises(SystemExit, match="terminated"), common.one_line_end():
                going_on()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


def test_end_of_a_program_that_is_no_message_stays():
    @common.one_line_end()
    def program(error):
        raise error
    for error, code in ((SystemExit(3), 3), (SystemExit(), None), (KeyboardInterrupt(), "interrupted"),
                        (IsADirectoryError(21, "Is a directory", "a\nb"), "a b: Is a directory")):
        with pytest.raises(SystemExit) as end:
            program(error)
        assert end.value.code == code
    for error in (ValueError("a mistake of ours"), OSError(5, "of no file")):
        with pytest.raises(type(error)):
            program(error)


def test_cli_help_shows_every_flag_with_its_comment(capsys):
    with pytest.raises(SystemExit) as error:
        parse_cli(Config, PRESETS, ["--help"])
    out = capsys.readouterr().out
    assert error.value.code == 0
    assert all(f"--{f.name}" in out for f in dataclasses.fields(Config)) and "learning rate" in out


def test_config_is_frozen_and_round_trips():
    cfg = parse_cli(Config, PRESETS, ["--lr", "0.1"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1
    assert Config(**json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


# ---------------------------------------------------------------------------- randomness


def test_keyed_draws_depend_on_every_key_and_on_nothing_else():
    rows = np.arange(64)
    a = common.keyed_uniform("mask", 0, 3, rows[:, None], np.arange(32))
    assert a.shape == (64, 32) and (a >= 0).all() and (a < 1).all()
    part = common.keyed_uniform("mask", 0, 3, rows[10:20, None], np.arange(32))
    np.testing.assert_array_equal(a[10:20], part)
    for keys in (("order", 0, 3), ("mask", 1, 3), ("mask", 0, 4)):
        assert (common.keyed_uniform(*keys, rows[:, None], np.arange(32)) == a).mean() < 0.01


def test_keyed_draws_are_uniform_and_uncorrelated():
    u = common.keyed_uniform("u", 0, np.arange(1000)[:, None], np.arange(1000))
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 1e6) ** 0.5
    counts = np.bincount((u.ravel() * 100).astype(int), minlength=100)
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 160  # chi-squared, 99 degrees of freedom: 1e-4 beyond
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 4e-3
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 4e-3
    draws = common.keyed_integers(7, "i", np.arange(70000))
    assert draws.min() == 0 and draws.max() == 6 and abs(np.bincount(draws) - 10000).max() < 400


# ---------------------------------------------------------------------------- files and tables


def test_atomic_write_leaves_the_old_file_whatever_happens(tmp_path):
    path = tmp_path / "x.json"
    common.write_json(path, {"a": 1})
    for error, raised in ((OSError(28, "No space left on device"), SystemExit), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(raised):
            with atomic(path) as part:
                part.write_text("half")
                raise error
        assert common.read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with atomic(path, keep=".prev") as part:
        part.write_text("{}")
    assert common.read_json(path) == {} and common.read_json(tmp_path / "x.json.prev") == {"a": 1}
    with atomic(tmp_path / "folder") as part:
        part.mkdir()
        (part / "file").write_text("x")
    assert (tmp_path / "folder" / "file").read_text() == "x"
    with pytest.raises(SystemExit, match="x: was not written"), atomic(tmp_path / "nowhere" / "x"):
        pass


def test_atomic_write_removes_what_killed_processes_of_this_host_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it has ended and nobody has asked: a zombie
    host, other = socket.gethostname(), os.getppid()
    gone = [f"x.json.{host}.{dead.pid}.tmp", f"x.json.{host}.{os.getpid()}.tmp"]
    kept = [f"x.json.{host}.{other}.tmp", f"x.json.elsewhere.{dead.pid}.tmp", f"x.json.{host}.mine.tmp",
            f"y.json.{host}.{dead.pid}.tmp"]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
    (tmp_path / f"x.json.{host}.{dead.pid}.new.tmp").write_text("ready")
    with atomic(tmp_path / "x.json") as part:
        part.write_text("{}")
    dead.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x.json", *kept])


@pytest.mark.parametrize("content, match", [
    (None, "cannot be read .No such file.*; give that"), (b"", "is empty; give that"),
    (b"caf\xe9 {", "line 1: not UTF-8"), (b"{", "line 1: broken JSON"), (b"[" * 100_000, "broken JSON"),
    (b"[1]", "holds a JSON list, no object; give that"),
    (b" <!DOCTYPE html>\n<p>404", "is a web page, not text; perhaps of a failed download"),
    (b"<html lang=en>", "is a web page"), (b"PAR1", "is parquet"), (b"PK\x03\x04", "is zip, not text; unpack it"),
    (b"version https://git-lfs.github.com/spec/v1\noid 1", "a pointer of git-lfs"),
    ("{}".encode("utf-16"), "is UTF-16"), (gzip.compress(b"{}")[:-9], "damaged gzip"),
    (gzip.compress(b" " * 20_000_000), "unfolds to more than 100 times its size"),
    (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "broken JSON .nested too deep.; give that"),
    (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON .*digits"), (b'{"a": "\\ud83d"}', "surrogates not allowed"),
    (b'{"a": 1} 2', "line 1: broken JSON .Extra data"), (b"a folder", "cannot be read .Is a directory.; give")])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, match):
    path = tmp_path / "x.json"
    if content is not None:
        path.mkdir() if content == b"a folder" else path.write_bytes(content)
    with pytest.raises(SystemExit, match=match) as error:
        common.read_json(path, "give that")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert common.peek_json(path) == {}


def test_json_that_people_have_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf \n{"a": [NaN, "\\ud83d\\ude00", "\\\\ud83d"], "b": ' + b"[" * 90 + b"]" * 90 + b"}\n")
    assert common.read_json(path)["a"] == [None, "\U0001f600", "\\ud83d"]


def test_written_json_is_valid_where_numbers_are_not_finite(tmp_path):
    path = tmp_path / "x.json"
    common.write_json(path, {"a": float("nan"), "b": [1.5, float("inf")], "c": (True, {"d": -float("inf")})})
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [1.5, None], "c": [True, {"d": None}]}


def test_settings_have_the_types_that_are_asked_for(tmp_path):
    path, kinds = tmp_path / "x.json", {"layers": int, "pooler": bool, "lr": (int, float)}
    for changes, says in (({}, ""), ({"layers": True}, "layers is True; make it again"), ({"pooler": 1}, "pooler is 1;"),
                          ({"lr": "x" * 99}, "lr is 'x{39};"), ({"layers": None}, "layers is None;")):
        settings = {"layers": 2, "pooler": True, "lr": 1, "more": []} | changes
        common.write_json(path, settings)
        if says:
            with pytest.raises(SystemExit, match=says):
                common.read_settings(path, kinds, "make it again")
        else:
            assert common.read_settings(path, kinds) == settings
    common.write_json(path, {})
    with pytest.raises(SystemExit, match="x.json: layers is missing;"):
        common.read_settings(path, kinds)


def test_stored_flags_are_checked_as_those_of_the_command_line():
    flags = dataclasses.asdict(Config(lr=0.1, resume="auto", use_head=False))
    assert common.stored_config(Config, flags | {"gone": 3}, "c.json") == Config(lr=0.1, resume="auto", use_head=False)
    for wrong, says in (({"lr": [1]}, r"--lr \[1\]: not a valid float"), ({"max_steps": 0}, "must be 1 or more"),
                        ({"use_head": "x"}, "--use_head x: write true or false"), ({"lr": None}, "--lr None")):
        with pytest.raises(SystemExit, match=f"c.json: .*{says}.*; make the run again"):
            common.stored_config(Config, flags | wrong, "c.json")


def test_gzipped_json_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}'))
    assert common.read_json(tmp_path / "x.json") == {"a": 1}


def test_table_is_aligned():
    text = common.table([["", "a", "bcd"], ["first", "10.0", "-"]])
    assert text.splitlines() == ["          a  bcd", "----------------", "first  10.0    -"]
    assert [common.duration(s) for s in (3, 63, 3723)] == ["3s", "1m03s", "1h02m"]
