"""What fine-tuned models answered: a task's dev set, and the predictions of each run on it."""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import read_json, read_text
from parts.examples import rows_of
from parts.metrics import answer_score, squad_questions
from parts.tasks import TASKS, Rows, Task, content_hash, find_file
from run import read_run

AGAIN = "evaluate the run again with finetune.py --eval_only"


@dataclass(frozen=True)
class Answers:
    """What the runs of a model answered to the n items of a task's dev set.

    runs: {s0: (folder, flags, results)}; path: of the dev set's file; rows: its items, labels (n,) int64, of
    SQuAD the gold answers. predictions (runs, n): class ids, candidates of choice, or SQuAD's texts; right
    (runs, n) bool: the right class or candidate, of SQuAD an exact match.
    """
    task: Task
    runs: dict
    path: Path
    rows: Rows
    predictions: np.ndarray
    right: np.ndarray

    @property
    def model(self):
        """Its name."""
        return next(iter(self.runs.values()))[2]["model"]

    @property
    def mostly_right(self):
        """(n,) bool: right in more than half of the runs."""
        return 2 * self.right.sum(0) > len(self.runs)

    def majority(self, i):
        """The most frequent answer to item i, the lower one of equals."""
        return int(np.bincount(self.predictions[:, i]).argmax())

    @property
    def turned(self):
        """Whether the context stands behind the hypothesis, as TRACIE names the event before the story."""
        return self.task.text[0] == "event"

    def texts(self, i):
        """The texts of item i in the order of the file; of a choice its context and every candidate."""
        first, second = self.rows.first[i], self.rows.second and self.rows.second[i]
        return [first, *(second if isinstance(second, list) else [] if second is None else [second])]

    def context(self, i):
        """The text that is given."""
        return self.texts(i)[self.turned]

    def hypotheses(self, i):
        """Texts that stand against the context: the candidates, the other text of a pair, or none."""
        texts = self.texts(i)
        del texts[self.turned]
        return texts

    def word(self, label):
        """An answer as tables show it: a class by its name, a candidate as (a), (b), .."""
        return f"({chr(97 + label)})" if self.task.kind == "choice" else self.task.words[label]

    def sentence(self, i):
        """The context and its right answer; of pairs both texts."""
        texts = self.hypotheses(i)
        texts = [texts[self.rows.labels[i]]] if self.task.kind == "choice" else texts
        return " ".join([self.context(i), *texts])


def shared_answers(a, b, kinds, task="", data_dir=""):
    """{task: [A's Answers, B's]} of two folders of finetune.py, of a model or of one of its tasks.

    Of each task of these kinds that both hold, or of `task` alone: the seeds that both have. data_dir: of the
    tasks' files, default that of the runs. SystemExit where something does not fit.
    """
    if task and task not in TASKS:
        raise SystemExit(f"--task {task}: choose one of {', '.join(TASKS)}")
    both = [open_runs(path) for path in (a, b)]
    shared = [TASKS[name] for name in TASKS if all(name in runs for runs in both) and task in ("", name)]
    chosen = [one for one in shared if one.kind in kinds]
    if not chosen:
        why = (f"{shared[0].title} has {'spans' if shared[0].kind == 'span' else 'scores'}, which cannot be "
               "compared here" if shared else
               f"no task with runs of both ({', '.join(both[0])}; {', '.join(both[1])})")
        raise SystemExit(f"{a}, {b}: {why}; give others or another --task")
    found = {}
    for one in chosen:
        seeds = sorted(both[0][one.name].keys() & both[1][one.name].keys())
        if not seeds:
            raise SystemExit(f"{a}, {b}: no seed of {one.title} in both; fine-tune with the same --seeds")
        pair = [{seed: runs[one.name][seed] for seed in seeds} for runs in both]
        path = dev_file(one, [run for runs in pair for run in runs.values()], data_dir)
        rows = dev_rows(one, path)
        found[one.name] = [read_answers(one, runs, path, rows) for runs in pair]
    return found


def open_runs(path):
    """{task: {s0: (folder, flags, results)}} of the finished runs in a task's folder or a model's."""
    found = {}
    folders = [Path(path), *sorted(Path(path).iterdir())] if Path(path).is_dir() else []
    runs = [file.parent for folder in folders for file in sorted(folder.glob("s[0-9]*/results.json"))]
    for run in (run for run in runs if run.name[1:].isdigit()):  # s0.1 has been replaced by s0
        config, results = read_run(run)
        task, hashes = str(config["config"].get("tasks")), results.get("hashes")
        if not (task in TASKS and isinstance(hashes, dict) and "dev" in hashes and "model" in results):
            raise SystemExit(f"{run}: no run of finetune.py; give the folder of a task's or a model's runs")
        found.setdefault(task, {})[run.name] = run, config["config"], results
    if not found:
        raise SystemExit(f"{path}: holds no finished run of finetune.py (s0, s1, ..); give the folder of a "
                         "task's runs, such as out/finetune/MODEL/rte, or of a model's")
    return found


def dev_file(task, runs, data_dir=""):
    """Path of the dev set on which all of the runs were evaluated, told by its hash."""
    run, flags, results = runs[0]
    for other, _, its in runs:
        if its["hashes"]["dev"] != results["hashes"]["dev"]:
            raise SystemExit(f"{other}: evaluated on another dev file of {task.title} than {run}; fine-tune "
                             "one again")
    root = Path(data_dir or str(flags.get("data_dir", "data")))
    for folder in sorted(root.glob("demo-s*/raw/tasks")) if task.demo else [root]:
        path = find_file(task, folder, task.evals[""], required=not task.demo)
        if path and content_hash(path) == results["hashes"]["dev"]:
            return path
    raise SystemExit(f"{root}: the dev file of {task.title} there is not that of {run}; give the folder of "
                     "its data as --data_dir")


def dev_rows(task, path):
    """Rows of a dev set with gold labels: class ids (n,) int64, of SQuAD the answers to each question."""
    rows = task.read(task, path, True)
    keep = rows_of(task, rows, "dev")
    if task.kind == "span":
        questions = squad_questions(read_json(path), path)
        labels = [[text for text, _ in question.answers] for question in questions]
    else:
        labels = np.array(rows.labels, np.int64)[keep]
    first, second, ids = (texts and [texts[i] for i in keep] for texts in (rows.first, rows.second, rows.ids))
    return dataclasses.replace(rows, first=first, second=second, ids=ids, labels=labels)


def read_answers(task, runs, path, rows):
    """Answers of runs, {s0: (folder, flags, results)}, to the `rows` of the dev set at `path`."""
    spans = task.kind == "span"
    read, file = read_texts if spans else read_classes, task.outputs[""]
    predictions = [read(task, rows.ids, folder / "predictions" / file) for folder, *_ in runs.values()]
    right = np.array([[answer_score(text, gold, task.unanswerable)[0] == 1 for text, gold in zip(
        texts, rows.labels)] for texts in predictions]) if spans else np.equal(predictions, rows.labels)
    return Answers(task, runs, path, rows, np.array(predictions), right)


def read_classes(task, ids, path):
    """Class ids (n,) from a file of parts.tasks.write_predictions; ids: those of the n items."""
    (header, form), lines = task.form, read_text(path, AGAIN).removesuffix("\n").split("\n")
    if header and lines[0] != header:
        raise SystemExit(f"{path}: its first line is {lines[0][:40]!r}, not {header!r}; {AGAIN}")
    lines, found = lines[bool(header):], []
    if len(lines) != len(ids):
        raise SystemExit(f"{path}: {len(lines):,} answers to {len(ids):,} questions; {AGAIN}")
    for number, (name, line) in enumerate(zip(ids, lines), 1 + bool(header)):
        # what write_predictions would have written for each class
        known = {form.format(id=name, label=i, word=word, score=0): i for i, word in enumerate(task.words)}
        if line not in known:
            raise SystemExit(f"{path}, line {number}: {line[:60]!r} is no answer to item {name}; {AGAIN}")
        found.append(known[line])
    return found


def read_texts(task, ids, path):
    """The same of SQuAD: a text for each of the n questions, "" = no answer."""
    texts = read_json(path, AGAIN)
    if texts.keys() != set(ids) or not all(isinstance(text, str) for text in texts.values()):
        raise SystemExit(f"{path}: holds not one text for each of the {len(ids):,} questions; {AGAIN}")
    return [texts[name] for name in ids]


def mcnemar(a, b):
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
