"""Proves that what fine-tuned models answered is read back as it was written, that counts of two models follow
from it, and how folders and files that do not fit end.

Run: python -m pytest -q tests/test_answers.py
"""
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from conftest import fine_tuned, stop_line

from analyses import answers
from parts.examples import rows_of
from parts.tasks import TASKS, Rows, find_file
from run import FORMAT

ALL = ("classify", "choice", "span")


@pytest.mark.parametrize("name", ("rte", "sst2", "mnli", "swag", "piqa", "tracie", "squad1", "squad2"))
def test_answers_are_read_back_as_they_were_written(tiny_tasks, tmp_path, name):
    task = TASKS[name]
    rows = task.read(task, find_file(task, tiny_tasks, task.evals[""]), True)
    if task.kind == "span":
        gold = [context[a:b] if a >= 0 else "" for context, (a, b) in zip(rows.second, rows.labels)]
        predictions = [gold[:3] + [f"{gold[3]} of it"] + gold[4:], ["nothing of it"] * 21]
        right = [[i != 3 for i in range(21)], [False] * 21]
    else:
        predictions = np.random.default_rng(0).integers(len(task.words), size=(2, 21))
        right = predictions == np.array(rows.labels)
    for model in "ab":
        fine_tuned(tmp_path / model / name, name, tiny_tasks, dict(zip((0, 7), predictions)))
    found, other = answers.shared_answers(tmp_path / "a", tmp_path / "b" / name, ALL)[name]
    assert list(found.runs) == ["s0", "s7"] and (found.model, other.model) == ("a", "b")
    assert (found.predictions == np.array(predictions)).all()
    assert found.right.dtype == bool and (found.right == np.array(right)).all()
    assert found.rows.first == rows.first and found.rows.second == rows.second
    texts, choice = found.texts(3), task.kind == "choice"
    assert texts == [rows.first[3], *(rows.second[3] if choice else [rows.second[3]] if rows.second else [])]
    if name == "tracie":
        assert found.context(3) == rows.second[3] and found.hypotheses(3) == [rows.first[3]]
    else:
        assert found.context(3) == rows.first[3] and found.hypotheses(3) == texts[1:]
    if choice:
        assert found.sentence(3) == f"{rows.first[3]} {rows.second[3][rows.labels[3]]}" and found.word(1) == "(b)"
    elif name in ("rte", "sst2", "mnli"):
        assert found.sentence(3) == " ".join(texts) and found.word(1) == task.words[1]


def test_seeds_and_tasks_of_both_are_compared(tiny_tasks, tmp_path):
    right = [0, 1] * 10 + [0]
    for model, name, seeds in (("a", "rte", (0, 1, 5)), ("b", "rte", (1, 0, 6)), ("a", "stsb", (0,)),
                               ("b", "stsb", (0,)), ("a", "sst2", (0,)), ("d", "rte", (3,)),
                               ("a", "squad1", (0,)), ("b", "squad1", (0,))):
        values = [""] * 21 if name == "squad1" else right
        fine_tuned(tmp_path / model / name, name, tiny_tasks, dict.fromkeys(seeds, values))
    a, b = tmp_path / "a", tmp_path / "b"
    for model in (a, b):  # a run of other flags that s0 has replaced is no seed
        shutil.copytree(model / "rte" / "s0", model / "rte" / "s0.1")
    found = answers.shared_answers(a, b, ALL)
    assert list(found) == ["squad1", "rte"] and list(answers.shared_answers(a, b, ALL[:2])) == ["rte"]
    assert [list(one.runs) for one in found["rte"]] == [["s0", "s1"]] * 2

    def line(*args, **kw):
        return stop_line(answers.shared_answers, a, *args, **kw)
    assert "no finished run of finetune.py" in line(tmp_path / "nowhere", ALL)
    assert "no finished run of finetune.py" in line(tmp_path, ALL)
    assert "no task with runs of both (rte, squad1, sst2, stsb; rte)" in line(tmp_path / "d", ALL, "sst2")
    assert "no seed of RTE in both" in line(tmp_path / "d", ALL)
    assert "STS-B has scores" in line(b, ALL, "stsb") and "SQuAD 1.1 has spans" in line(b, ALL[:2], "squad1")
    assert "choose one of sst2" in line(b, ALL, "chess")


def test_of_a_dev_set_that_is_drawn_from_a_file_its_rows_are_read(tiny_tasks, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "rte", dataclasses.replace(TASKS["rte"], dev_share=0.5))
    rows = TASKS["rte"].read(TASKS["rte"], tiny_tasks / "glue" / "RTE" / "dev.tsv", True)
    keep = rows_of(TASKS["rte"], rows, "dev").tolist()
    assert 3 < len(keep) < 18
    for model in "ab":
        fine_tuned(tmp_path / model / "rte", "rte", tiny_tasks, {0: [rows.labels[i] for i in keep]})
    found, _ = answers.shared_answers(tmp_path / "a", tmp_path / "b", ALL)["rte"]
    assert found.right.all() and found.rows.first == [rows.first[i] for i in keep]
    assert found.rows.ids == [rows.ids[i] for i in keep] and found.right.shape == (1, len(keep))


def by_hand(right):
    """Answers of one class whose runs are right where `right` (runs, n) says so."""
    right = np.array(right, bool)
    rows = Rows([""] * right.shape[1], None, np.zeros(right.shape[1], int), [])
    return answers.Answers(TASKS["rte"], {f"s{i}": None for i in range(len(right))}, None, rows,
                           (~right).astype(int), right)


def test_counts_follow_the_majority_of_the_runs_and_mcnemars_test():
    """Six items: A right in 3, 2, 2, 2, 1, 0 of 3 runs; B, of 2 runs, in 2, 1, 0, 0, 0, 2."""
    a = by_hand([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    b = by_hand([[1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1]])
    found = answers.mcnemar(a, b)
    # half of the runs is not most of them: item 1 is only A's; p = 2 (C(4, 0) + C(4, 1)) / 2^4
    assert found == {"items": 6, "both": 1, "only a": 3, "only b": 1, "neither": 1, "p": pytest.approx(0.625)}
    assert answers.mcnemar(a, a)["p"] == 1
    many = answers.mcnemar(by_hand([[1] * 12 + [0] * 3]), by_hand([[0] * 12 + [1] * 3]))
    assert many["p"] == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2 ** 15)
    assert [b.majority(i) for i in range(6)] == [0, 0, 1, 1, 1, 0]


def test_files_that_do_not_fit_their_task_are_refused(tiny_tasks, tmp_path):
    for model in "ab":
        fine_tuned(tmp_path / model / "rte", "rte", tiny_tasks, {0: [0] * 21})
        fine_tuned(tmp_path / model / "squad1", "squad1", tiny_tasks, {0: ["cat"] * 21})

    def line(name="rte", data_dir=""):
        return stop_line(answers.shared_answers, tmp_path / "a", tmp_path / "b", ALL, name, data_dir)
    run = tmp_path / "b" / "rte" / "s0"
    path = run / "predictions" / "RTE.tsv"
    lines = path.read_text().splitlines()
    for content, words in (
            (lines[:-1], "20 answers to 21 questions"), (lines[1:], "its first line is"),
            ([*lines[:3], "2\tmaybe", *lines[4:]], "line 4: '2\\tmaybe' is no answer to item 2"),
            ([*lines[:4], lines[4].replace("3\t", "99\t"), *lines[5:]], "is no answer to item 3"),
            ([lines[0], *lines[2:], lines[1]], "is no answer to item 0")):
        path.write_text("\n".join(content) + "\n")
        assert words in line()
    path.unlink()
    assert "RTE.tsv: cannot be read" in line() and "evaluate the run again" in line()
    texts = tmp_path / "b" / "squad1" / "s0" / "predictions" / TASKS["squad1"].outputs[""]
    written = json.loads(texts.read_text())
    name = next(iter(written))
    for content in (written | {"more": ""}, written | {name: 3}, {k: x for k, x in written.items() if k != name}):
        texts.write_text(json.dumps(content))
        assert "holds not one text for each of the 21 questions" in line("squad1")
    assert "no such file" in line(data_dir=tmp_path).lower()
    changed = tmp_path / "glue" / "RTE" / "dev.tsv"
    changed.parent.mkdir(parents=True)
    changed.write_text((tiny_tasks / "glue" / "RTE" / "dev.tsv").read_text().replace("cat", "dog"))
    assert "the dev file of RTE there is not that of" in line(data_dir=tmp_path)
    (run / "results.json").write_text(json.dumps({"model": "b", "hashes": {"dev": "another"}}))
    assert "evaluated on another dev file of RTE" in line()
    for results in ({}, {"hashes": {"dev": "x"}}, {"model": "b", "hashes": []}, {"model": "b", "hashes": {}}):
        (run / "results.json").write_text(json.dumps(results))
        assert "no run of finetune.py" in line()
    for name in ("mine", ["rte"], None):
        (run / "config.json").write_text(json.dumps({"format": FORMAT, "config": {"tasks": name}}))
        assert "no run of finetune.py" in line()
