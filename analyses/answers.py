"""What fine-tuned models answered: a task's texts and gold labels, and the predictions of each run."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import read_settings, read_text
from parts.examples import rows_of
from parts.tasks import TASKS, Task, content_hash, find_file

ADVICE = "give a folder that finetune.py wrote, of a model or of one of its tasks, such as out/finetune/bert"


@dataclass(frozen=True)
class Answers:
    """A task's evaluation set of n items, and what the runs of a model answered.

    first, second: texts as in parts.tasks.Rows; labels (n,) and predictions (runs, n): class ids, or
    candidates of choice, int64; seeds: of the runs; model: its name.
    """
    task: Task
    model: str
    first: list
    second: list
    labels: np.ndarray
    predictions: np.ndarray
    seeds: list

    @property
    def right(self):
        """(runs, n) bool."""
        return self.predictions == self.labels

    @property
    def mostly_right(self):
        """(n,) bool: right in more than half of the runs."""
        return 2 * self.right.sum(0) > len(self.seeds)

    def majority(self, i):
        """The most frequent answer to item i, the lower one of equals."""
        return int(np.bincount(self.predictions[:, i]).argmax())

    @property
    def turned(self):
        """Whether the context stands behind the hypothesis, as TRACIE names the event before the story."""
        return self.task.text[0] == "event"

    def context(self, i):
        """The text that is given."""
        return (self.second if self.turned else self.first)[i]

    def hypotheses(self, i):
        """Texts that stand against the context: the candidates, the other text of a pair, or none."""
        if self.task.kind == "choice":
            return list(self.second[i])
        return [] if self.second is None else [(self.first if self.turned else self.second)[i]]

    def word(self, label):
        """An answer as tables show it: a class by its name, a candidate as (a), (b), .."""
        return f"({chr(97 + label)})" if self.task.kind == "choice" else self.task.words[label]

    def sentence(self, i):
        """The context and its right answer; of pairs both texts."""
        texts = self.hypotheses(i)
        texts = [texts[self.labels[i]]] if self.task.kind == "choice" else texts
        return " ".join([self.context(i), *texts])


def task_folders(folder):
    """{task: folder of its runs} of one task's folder, or of a model's that holds one for each task."""
    folder = Path(folder)
    found = {}
    for path in [folder / "results.json", *sorted(folder.glob("*/results.json"))]:
        if path.is_file():
            summary = read_settings(path, {}, ADVICE)
            if str(summary.get("task")) in TASKS and isinstance(summary.get("runs"), list):
                found.setdefault(summary["task"], path.parent)
    if not found:
        raise SystemExit(f"{folder}: holds no finished task; {ADVICE}")
    return found


def read_answers(folder, which=""):
    """Answers of a task's finished runs, folder/s0, s1, ..; which: the evaluation set, "" = the dev set.

    SystemExit where the file of the set is not the one that they were evaluated on, where predictions do not
    fit it, and for tasks without right and wrong (a score, a span).
    """
    folder = Path(folder)
    summary = read_settings(folder / "results.json", {"task": str, "model": str, "runs": list}, ADVICE)
    task = TASKS.get(summary["task"])
    if task is None or task.kind not in ("classify", "choice"):
        raise SystemExit(f"{folder}: {summary['task']} has no classes or candidates of which one is right; "
                         "choose another task")
    try:
        seeds = [int(run["seed"]) for run in summary["runs"]]
        hashes = {run["hashes"][which or "dev"] for run in summary["runs"]}
    except (TypeError, KeyError, ValueError) as error:
        raise SystemExit(f"{folder}/results.json: not in the form of finetune.py ({error!r}); fine-tune "
                         "again") from None
    if not seeds:
        raise SystemExit(f"{folder}/results.json: holds no run; fine-tune again")
    flags = read_settings(folder / f"s{seeds[0]}" / "config.json", {"config": dict}, ADVICE)["config"]
    data_dir = str(flags.get("data_dir", ""))
    if task.demo:  # all runs read the world of the first one's seed
        data_dir = Path(data_dir, f"demo-s{seeds[0]}", "raw", "tasks")
    path = find_file(task, data_dir, task.evals[which])
    if hashes != {content_hash(path)}:
        raise SystemExit(f"{path}: is not the file that {folder} was evaluated on; evaluate its runs again "
                         "with finetune.py --eval_only")
    rows = task.read(task, path, True)
    keep = rows_of(task, rows, "dev")
    ids = [rows.ids[i] for i in keep]
    file = task.outputs.get(which, f"{which}.txt")
    predictions = [read_predictions(task, ids, folder / f"s{seed}" / "predictions" / file) for seed in seeds]
    first, second = (texts and [texts[i] for i in keep] for texts in (rows.first, rows.second))
    return Answers(task, summary["model"], first, second, np.array(rows.labels, np.int64)[keep],
                   np.stack(predictions), seeds)


def read_predictions(task, ids, path):
    """Class ids int64 (n,) from a file of parts.tasks.write_predictions; ids: those of the n items."""
    advice = "evaluate the run again with finetune.py --eval_only"
    (header, form), lines = task.form, read_text(path, advice).removesuffix("\n").split("\n")
    if header and lines[0] != header:
        raise SystemExit(f"{path}: its first line is {lines[0][:40]!r}, not {header!r}; {advice}")
    lines, found = lines[bool(header):], []
    if len(lines) != len(ids):
        raise SystemExit(f"{path}: {len(lines):,} answers to {len(ids):,} questions; {advice}")
    for number, (name, line) in enumerate(zip(ids, lines), 1 + bool(header)):
        # what write_predictions would have written for each class
        known = {form.format(id=name, label=i, word=word, score=0): i for i, word in enumerate(task.words)}
        if line not in known:
            raise SystemExit(f"{path}, line {number}: {line[:60]!r} is no answer to item {name}; {advice}")
        found.append(known[line])
    return np.array(found, np.int64)


def compare(a, b):
    """{"items", "both", "only a", "only b", "neither", "p"}: on how many items two models' Answers are mostly
    right, and McNemar's exact test.

    p: two-sided, of the items on which one alone is right as flips of a fair coin (McNemar 1947).
    """
    from scipy import stats  # takes a second
    x, y = a.mostly_right, b.mostly_right
    cells = {"items": len(x), "both": x & y, "only a": x & ~y, "only b": ~x & y, "neither": ~x & ~y}
    cells = {name: int(np.sum(cell)) for name, cell in cells.items()}
    flips = cells["only a"] + cells["only b"]
    return cells | {"p": float(stats.binomtest(cells["only a"], flips).pvalue) if flips else 1.0}
