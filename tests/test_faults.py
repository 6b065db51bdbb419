"""Proves that faults.py runs: a few rounds of it. The thousands are counted in docs/reliability.md.

Run: CI=1 python -m pytest -q tests/test_faults.py
"""
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("script", ["", "features"])
def test_disturbed_runs_end_as_undisturbed_ones(script):
    if script:
        pytest.importorskip("av", reason="needs PyAV, of requirements-video.txt; new ones need Python 3.11")
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), "--rounds", "16", "--seed", "0"]
    done = subprocess.run([*command, "--script", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"seed 0: 16 rounds from 0 on .*; failed: none", done.stdout.splitlines()[-1])
