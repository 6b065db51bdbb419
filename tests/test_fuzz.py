"""A few damaged files for every reader, and whether tests/fuzz.py would see what goes wrong.

Run: python -m pytest -q tests/test_fuzz.py
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest


@pytest.mark.slow
def test_damaged_files_end_in_a_result_or_in_one_line():
    found = subprocess.run([sys.executable, fuzz.__file__, "--cases", "1080"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    last = found.stdout.splitlines()[-1]
    assert f"{len(fuzz.READERS)} readers, " in last and " 0 failures" in last


def test_every_kind_of_failure_is_found(monkeypatch, capsys):
    at = []  # the cases of a fork

    def read(path):
        if at[-1] == 1:
            raise KeyError("x")
        if at[-1] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if at[-1] == 3:
            time.sleep(30)
        if at[-1] == 4:
            raise SystemExit(1)
        if at[-1] == 5:
            bytearray(3 << 30)
        if at[-1] == 6:
            Path(fuzz.mutators.PLANTED).write_text("")
        if at[-1] == 7:
            raise SystemExit("x: damaged")

    def run_case(name, case, *rest, original=fuzz.run_case):
        at.append(case)
        return original(name, case, *rest)
    monkeypatch.setattr(fuzz, "run_case", run_case)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz.mutators, "PLANTED", "")  # main sets it
    monkeypatch.setitem(fuzz.READERS, "SQuAD", (fuzz.make_tasks, "squad1.json", read))
    assert fuzz.main(["--reader", "SQuAD", "--cases", "9"]) == 1
    out = capsys.readouterr().out
    for case, said in enumerate(("KeyError", "ended with -9", "1 s are over", "SystemExit(1)", "MemoryError",
                                 "a pickle made a file"), 1):
        assert f"--case {case} --seed 0: " in out and said in out
    assert out.endswith(" s\n") and "9 cases, 2 accepted, 1 refused" in out and "6 failures" in out
