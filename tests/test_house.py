"""Proves the import law, what the sources must have in common, and what none of them may contain.

The law: rooms stand in a row (ROW below), and a room may import only rooms on its left; model, losses and
common import none of the house, and no stage imports another. Only what stands under a script's
`if __name__ == "__main__"` may import any room.

Run: python -m pytest -q tests/test_house.py
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("teacher", "distill", "adapt_xdbert", "finetune")
SCRIPTS = [f"{stage}.py" for stage in STAGES]
ROW = ("model", "losses", "common", "parts.machine", "parts.checkpoints", "parts.feed", "run",
       "parts.vocab", "parts.metrics", "parts.weights", "parts.towers", "data", "parts.tasks",
       "parts.examples", *STAGES, "prepare.captions", "prepare.packing", "prepare.video", "features",
       "prepare.world", "analyses.figures", "analyses.closing", "analyses.curves", "analyses.answers",
       "analyses.sentences", "analyses.clips", "analyses.words", "analyses.inside", "analyses.page",
       "prepare.chain", "analyze", "prepare.commands", "analyses.papers", "analyses.rows",
       "analyses.plan", "analyses.times", "ablate", "benches.plain", "benches.feed", "benches.scale",
       "benches.jobs", "bench")
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
SOURCES = [path for path in SOURCES if path.parent.name != "tests"]


def imported(path):
    """Rooms that a source imports, at its top or inside of a function, but not under its main guard."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (
        isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(ROW)


def test_every_source_has_its_place_in_the_row():
    assert sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES) == sorted(ROW)


@pytest.mark.parametrize("place, room", list(enumerate(ROW)))
def test_room_imports_only_rooms_on_its_left(place, room):
    names = imported(ROOT / f"{room.replace('.', '/')}.py")
    assert names <= set(ROW[:place])
    if room in ("model", "losses", "common"):
        assert not names
    if room in STAGES:
        assert not names & set(STAGES)


def test_no_function_is_longer_than_120_lines():
    long = [(path.name, node.name) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 120]
    assert not long


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
def test_every_stage_says_where_to_hack(name):
    text = (ROOT / name).read_text()
    for what in ("objective", "batch", "schedule"):
        assert text.count(f"# HACK HERE: the {what}") == 1
    headings = ["# ---- models", "# ---- optimizer", "# ---- resume", "# ==== training loop ====",
                "# ---- finish"]
    places = [text.find(f"    {heading}\n") for heading in headings]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("name", SCRIPTS)
def test_step_block_never_waits_for_the_device(name):
    assert not re.search(r"\.item\(\)|\.tolist\(\)|\.cpu\(\)|print", "\n".join(step_block(name)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
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
    assert re.fullmatch(r"av>=\d+\n", (ROOT / "requirements-video.txt").read_text())
