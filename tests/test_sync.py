"""Proves what the sources must have in common and what none of them may contain.

Run: python -m pytest -q tests/test_sync.py
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["teacher.py", "distill.py", "finetune.py", "adapt_xdbert.py"]
SOURCES = sorted(ROOT.glob("*.py"))


def step_block(name):
    lines = (ROOT / name).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "---- optimizer step: these lines are the same" in line)
    end = next(i for i, line in enumerate(lines) if "---- end of the optimizer step ----" in line)
    return lines[start:end]


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_step_block_is_the_same_text_in_every_script(name):
    assert step_block(name) == step_block(SCRIPTS[0])
    assert len(step_block(name)) > 12


@pytest.mark.parametrize("name", SCRIPTS)
def test_step_block_never_waits_for_the_device(name):
    assert not re.search(r"\.item\(\)|\.tolist\(\)|\.cpu\(\)|print", "\n".join(step_block(name)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_source_has_no_banned_construct(path):
    text = path.read_text()
    for banned in (r"\bexec\(", r"(?<![.\w])eval\(", r"import \*", r"except:", r"strict=False", r"\.module\b",
                   r"torch\.cuda\.amp", r"\bapex\b", r"np\.random\.(?!default_rng|Generator)",
                   r"allow_pickle=True", r"weights_only=False", r"^import pickle",
                   r"^(import|from) transformers"):
        assert not re.search(banned, text, re.M), banned
    assert max(map(len, text.splitlines())) <= 110


def test_requirements_are_the_allowed_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.match(r"[\w-]+", line).group() for line in lines} <= {
        "torch", "numpy", "tokenizers", "h5py", "scipy", "pytest", "safetensors", "matplotlib", "tqdm"}
