"""The downstream tasks of both papers: their files, labels, metrics and submissions."""
import csv
import hashlib
import io
import json
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from common import read_text, write_json
from parts.metrics import METRICS, collapse, diagnostic_scores, squad_score

# ---------------------------------------------------------------------------- what a task is


@dataclass(frozen=True)
class Task:
    """One downstream task: where its files lie, how they are read, what is predicted and how it is scored."""
    name: str  # of --tasks
    title: str  # in tables
    kind: str  # classify or regress one text or a pair, choice among candidates, span of a context
    folder: str  # of its files, inside --data_dir
    text: tuple  # columns or keys of the texts; for choice the context, then the candidates
    read: object  # function (task, path, labelled) -> Rows
    source: str  # where the official files come from
    labels: tuple = ()  # words of the classes, in the order of their ids; files hold the words or the ids
    label: str = "label"  # column of the label
    unsure: str = ""  # label of rows on which the annotators did not agree: they are left out
    metrics: tuple = ("accuracy",)  # names in METRICS, the first is the one that tables show
    train: str = "train.tsv"
    evals: dict = field(default_factory=lambda: {"": "dev.tsv"})  # the first is required, others if there
    tests: dict = field(default_factory=dict)  # unlabelled sets, if there
    outputs: dict = field(default_factory=lambda: {"": "predictions.txt"})  # a submission's file, by set
    form: tuple = ("", "{label}")  # of a submission: its first line, and the line of an example
    header: tuple = ()  # columns of a file that does not name them
    stem: str = ""  # column that every candidate continues
    extra: tuple = ()  # further columns to keep where the file has them
    bounds: tuple = (-math.inf, math.inf)  # lowest and highest score
    dev_share: float = 0.0  # of the rows, drawn by their ids, for a task whose dev set is not a file
    unanswerable: bool = False  # span: some questions have no answer
    lr: float = 0.0  # the task's own defaults; 0 = those of the preset
    steps: int = 0
    max_length: int = 0

    @property
    def words(self):
        """Names of the classes or of the candidates, () for regress and span."""
        return self.labels or tuple(map(str, range(len(self.text) - 1) if self.kind == "choice" else ()))

    @cached_property
    def numbers(self):
        """{a label as a file may write it: class id}."""
        return {word: i for i, word in enumerate(self.words)} | {str(i): i for i in range(len(self.words))}

    def label_of(self, text, path, line):
        """Class id or score of a label in a file; one line where the task has no such label."""
        text = text.strip()
        if self.kind != "regress":
            if text in self.numbers:
                return self.numbers[text]
            allowed = ", ".join(self.words) + (f" (or 0 to {len(self.words) - 1})" if self.labels else "")
        else:
            with suppress(ValueError):
                if self.bounds[0] <= float(text) <= self.bounds[1] and math.isfinite(float(text)):
                    return float(text)
            low, high = self.bounds
            allowed = f"numbers from {low:g} to {high:g}" if high < math.inf else "numbers"
        raise SystemExit(f"{path}, line {line}: label {text!r}; those of {self.title} are {allowed}")


@dataclass
class Rows:
    """What a file holds. second: None for single texts, for choice a list of candidates each.

    labels: class ids or scores, for span (first character, the one behind the last), None where unlabelled.
    skipped: rows that were left out because their annotators did not agree.
    """
    first: list
    second: list
    labels: list
    ids: list
    extra: dict = field(default_factory=dict)
    skipped: int = 0


# ---------------------------------------------------------------------------- readers


def read_lines_of(path):
    """[(line number, line)] of the lines that are not blank."""
    # splitlines would also cut at the separators that stand inside of texts, such as U+2028
    return [(n, line.rstrip("\r")) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def read_fields(path):
    """[(line number, fields)] of a .csv file, or of a .tsv file, in which quotes mean nothing."""
    if path.suffix != ".csv":
        return [(n, line.split("\t")) for n, line in read_lines_of(path)]
    rows, line = [], 1
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for fields in reader:
            if fields:
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise SystemExit(f"{path}, line {line}: {error}; mend the quotes of that row") from None
    return rows


DIAGNOSTIC = ("Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge")


def read_table(task, path, labelled):
    """Rows of a .tsv or .csv file whose columns are found by name (GLUE, SWAG, READ).

    The id is the column "index" or "id", else the row's number from 0. GLUE's diagnostics have names of their
    own for MNLI's columns; a two-way label not_entailment counts as neutral there, and extra["Label"] keeps
    the words.
    """
    rows, header, text, label = read_fields(path), task.header, task.text, task.label
    if not header or set(text) <= set(rows[0][1]):  # CoLA: only the test set has a first line of names
        (_, header), *rows = rows
    diagnostic = "Premise" in header
    if diagnostic:
        text, label = ("Premise", "Hypothesis"), "Label"
    needed = [*text, *[task.stem] * bool(task.stem), *[label] * labelled]
    missing = [name for name in needed if name not in header]
    if missing == [label]:
        raise unlabelled(task, path, f"has no column {label}")
    if missing:
        raise SystemExit(f"{path}: has no column {', '.join(missing)}, its first line is "
                         f"{' '.join(header)[:80]!r}; give the official file of {task.title}")
    wrong = [(line, len(fields)) for line, fields in rows if len(fields) != len(header)]
    if wrong:  # QQP's official files have some
        raise SystemExit(f"{path}, line {wrong[0][0]}: {wrong[0][1]} fields where the header has "
                         f"{len(header)}, and {len(wrong) - 1} more such lines; mend or delete them (for a "
                         f".tsv file `awk -F'\\t' 'NF == {len(header)}'` prints the others)")
    at = {name: i for i, name in enumerate(header)}
    key, columns = next((at[name] for name in ("index", "id") if name in at), None), [at[t] for t in text]
    found = Rows([], None if len(text) == 1 else [], [] if labelled else None, [],
                 {name: [] for name in task.extra if name in at})
    for number, (line, fields) in enumerate(rows):
        if labelled:
            word = fields[at[label]]
            if task.unsure and word == task.unsure:
                found.skipped += 1
                continue
            two_way = diagnostic and word == "not_entailment"
            found.labels.append(task.label_of("neutral" if two_way else word, path, line))
        found.ids.append(str(number) if key is None else fields[key])
        first, *others = [fields[i] for i in columns]
        found.first.append(first)
        if task.kind == "choice":
            stem = f"{fields[at[task.stem]]} " if task.stem else ""
            found.second.append([stem + other for other in others])
        elif others:
            found.second.append(others[0])
        for name, values in found.extra.items():
            values.append(fields[at[name]])
    if not found.first:
        raise SystemExit(f"{path}: holds no row" + (" with a gold label" if found.skipped else ""))
    return found


def unlabelled(task, path, why):
    """The error for a file without labels where some are needed."""
    return SystemExit(f"{path}: {why}, so it is an unlabelled test split; train and evaluate {task.title} on "
                      "files with labels")


def string(value):
    """A str from a JSON file; TypeError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def read_piqa(task, path, labelled):
    """Rows of PIQA: a JSON object a line, and the labels beside X.jsonl in X-labels.lst, a line each."""
    lines = read_lines_of(path)
    found = Rows([], [], None, [str(i) for i in range(len(lines))])
    for number, line in lines:
        try:
            content = json.loads(line)
            first, *others = [string(content[key]) for key in task.text]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{path}, line {number}: not a JSON object with the texts "
                             f"{', '.join(task.text)}") from None
        found.first.append(first)
        found.second.append(others)
    if labelled:
        answers = path.with_name(f"{path.stem}-labels.lst")
        if not answers.exists():
            raise unlabelled(task, path, f"has no {answers.name} beside it")
        found.labels = [task.label_of(word, answers, number) for number, word in read_lines_of(answers)]
        if len(found.labels) != len(lines):
            raise SystemExit(f"{answers}: {len(found.labels)} labels for the {len(lines)} lines of "
                             f"{path.name}; fetch both anew")
    return found


def read_tracie(task, path, labelled):
    """Rows of TRACIE: `event: .. story: ..`, tab, `answer: ..`; extra["comparator"] is starts or ends."""
    found = Rows([], [], [] if labelled else None, [], {"comparator": []})
    for number, line in read_lines_of(path):
        match = re.fullmatch(r"event: (.*?) story: (.*?)(?:\tanswer: (.*))?", line)
        if not match:
            raise SystemExit(f"{path}, line {number}: not of the form `event: .. story: ..`, tab, "
                             "`answer: ..`")
        if labelled and match[3] is None:
            raise unlabelled(task, path, f"has no answer in line {number}")
        found.first.append(match[1])
        found.second.append(match[2])
        found.ids.append(str(len(found.ids)))
        found.extra["comparator"].append("starts" if re.search("starts (before|after)", match[1]) else "ends")
        if labelled:
            found.labels.append(task.label_of(match[3], path, number))
    return found


def read_squad(task, path, labelled):
    """Rows of SQuAD's json, one a question; its label is the first answer, as in BERT's own code.

    extra["answer"] says of each question: "exact", "moved" (not at its answer_start, but found elsewhere in
    the context: the nearest place counts), "missing" (nowhere in the context) or "none" (2.0's unanswerable).
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}, line {error.lineno}: broken JSON ({error.msg}); fetch it anew") from None
    found = Rows([], [], [] if labelled else None, [], {"answer": []} if labelled else {})
    where = "the first question"
    try:
        for paragraph in chain.from_iterable(article["paragraphs"] for article in content["data"]):
            for question in paragraph["qas"]:
                where = f"question {question['id']}"
                found.ids.append(string(question["id"]))
                found.first.append(string(question["question"]))
                found.second.append(string(paragraph["context"]))
                if not labelled:
                    continue
                if "answers" not in question:
                    raise unlabelled(task, path, f"has no answers ({where})")
                answers = [] if question.get("is_impossible") else question["answers"]
                if not answers and not task.unanswerable:
                    raise SystemExit(f"{path}: {where} has no answer, as in SQuAD 2.0; use --tasks squad2")
                span, state = (-1, -1), "none"
                if answers:
                    text, start = string(answers[0]["text"]), answers[0]["answer_start"]
                    span, state = find_answer(paragraph["context"], text, start)
                found.labels.append(span)
                found.extra["answer"].append(state)
    except (KeyError, TypeError) as error:
        raise SystemExit(f"{path}: not in SQuAD's form at {where} ({error!r}); fetch it anew") from None
    if not found.first:
        raise SystemExit(f"{path}: holds no question; fetch it anew")
    return found


def find_answer(context, text, start):
    """((first character, the one behind the last), "exact", "moved" or "missing"); see read_squad."""
    if not text.strip():
        return (-1, -1), "missing"
    if start >= 0 and context.startswith(text, start):
        return (start, start + len(text)), "exact"
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    if not places:
        return (-1, -1), "missing"
    nearest = min(places, key=lambda place: abs(place - start))
    return (nearest, nearest + len(text)), "moved"


def read_lines(task, lines, number=1):
    """Rows of lines of standard input: the task's texts separated by tabs; choice: a context and candidates.

    The number of candidates is free, but alike in all lines.
    """
    found = [line.rstrip("\r\n").split("\t") for line in lines]
    choice = task.kind == "choice"
    width = max(3, len(found[0])) if choice else len(task.text)
    form = "context TAB candidate TAB candidate .." if choice else " TAB ".join(task.text)
    for line, fields in enumerate(found, number):
        if len(fields) != width or not all(text.strip() for text in fields):
            empty = " or an empty one" if len(fields) == width else ""
            raise SystemExit(f"standard input, line {line}: {len(fields)} fields{empty} where {width} are "
                             f"wanted: {form}")
    first, *others = map(list, zip(*found))
    second = list(map(list, zip(*others))) if choice else others[0] if others else None
    return Rows(first, second, None, [str(number) for number in range(1, len(found) + 1)])


# ---------------------------------------------------------------------------- the table of tasks


ENTAILMENT = ("entailment", "not_entailment")
NUMBERS, WORDS = ("index\tprediction", "{id}\t{label}"), ("index\tprediction", "{id}\t{word}")


def glue(name, title, text, labels, kind="classify", **fields):
    """A task of GLUE: a folder with train, dev and test.tsv; `form` says how its server wants labels."""
    fields = dict(tests={"": "test.tsv"}, outputs={"": f"{title}.tsv"}, form=NUMBERS) | fields
    return Task(name, title, kind, title, text, read_table, "https://gluebenchmark.com/tasks", labels,
                **fields)


def squad(name, version, **fields):
    """SQuAD 1.1 or 2.0."""
    return Task(name, f"SQuAD {version}", "span", "squad", ("question", "context"), read_squad,
                "https://rajpurkar.github.io/SQuAD-explorer/", metrics=("exact", "f1"),
                train=f"train-v{version}.json", evals={"": f"dev-v{version}.json"},
                outputs={"": "predictions.json"}, **fields)


def tracie(name, title, folder, train, test, **fields):
    """A task in TRACIE's lines, in whose form its evaluator reads answers, too."""
    fields = dict(source="https://github.com/allenai/tracie (data/)") | fields
    return Task(name, title, "classify", folder, ("event", "story"), read_tracie,
                labels=("negative", "positive"), train=train, evals=test, form=("", "answer: {word}"),
                **fields)


# the demo world's tasks: dev sets of nouns that the training set does not have, and of nouns that it has
DEMO = dict(source="`python data.py demo`", lr=1e-3, max_length=48)
SEEN = {"": "dev.tsv", "seen": "dev_seen.tsv"}
TASKS = {task.name: task for task in (
    glue("sst2", "SST-2", ("sentence",), ("negative", "positive")),
    glue("qnli", "QNLI", ("question", "sentence"), ENTAILMENT, form=WORDS),
    glue("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), label="is_duplicate",
         metrics=("accuracy", "f1")),
    glue("mnli", "MNLI", ("sentence1", "sentence2"), ("entailment", "neutral", "contradiction"), form=WORDS,
         label="gold_label", unsure="-", extra=(*DIAGNOSTIC, "Label"),
         evals={"": "dev_matched.tsv", "mm": "dev_mismatched.tsv",
                "diagnostic": "../diagnostic/diagnostic-full.tsv"},
         tests={"": "test_matched.tsv", "mm": "test_mismatched.tsv",
                "diagnostic": "../diagnostic/diagnostic.tsv"},
         outputs={"": "MNLI-m.tsv", "mm": "MNLI-mm.tsv", "diagnostic": "AX.tsv"}),
    squad("squad1", "1.1"),
    squad("squad2", "2.0", unanswerable=True),
    Task("swag", "SWAG", "choice", "swag", ("sent1", *[f"ending{i}" for i in range(4)]), read_table,
         "https://github.com/rowanz/swagaf (data/)", stem="sent2", train="train.csv", evals={"": "val.csv"},
         tests={"": "test.csv"}, outputs={"": "predictions.csv"}, form=("pred", "{label}")),
    glue("rte", "RTE", ("sentence1", "sentence2"), ENTAILMENT, form=WORDS),
    glue("mrpc", "MRPC", ("#1 String", "#2 String"), ("not_equivalent", "equivalent"), label="Quality",
         metrics=("accuracy", "f1")),
    glue("stsb", "STS-B", ("sentence1", "sentence2"), (), "regress", label="score", bounds=(0, 5),
         metrics=("pearson", "spearman"), form=("index\tprediction", "{id}\t{score:.3f}")),
    glue("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), metrics=("matthews",),
         header=("source", "label", "mark", "sentence")),
    glue("wnli", "WNLI", ("sentence1", "sentence2"), ENTAILMENT[::-1]),
    Task("piqa", "PIQA", "choice", "piqa", ("goal", "sol1", "sol2"), read_piqa,
         "https://yonatanbisk.com/piqa/data/", train="train.jsonl", evals={"": "valid.jsonl"},
         tests={"": "tests.jsonl"}, outputs={"": "predictions.lst"}),
    tracie("tracie", "TRACIE", "tracie/uniform-prior", "tracie_train_uniform_prior.txt",
           {"": "tracie_test.txt"}),
    tracie("tracie_iid", "TRACIE iid", "tracie/iid", "tracie_train.txt",  # the two share one test set
           {"": "../uniform-prior/tracie_test.txt"}),
    Task("read", "READ", "regress", "read", ("excerpt",), read_table,
         "https://www.kaggle.com/c/commonlitreadabilityprize/data", label="target",
         metrics=("rmse", "pearson"), train="train.csv", evals={"": "train.csv"}, dev_share=0.1,
         tests={"": "test.csv"}, outputs={"": "submission.csv"}, form=("id,target", "{id},{score:.6f}")),
    Task("mishap", "mishap", "classify", "mishap", ("sentence",), read_table, labels=("harmless", "mishap"),
         evals=SEEN, steps=300, **DEMO),
    Task("entailment", "entailment", "classify", "entailment", ("sentence1", "sentence2"), read_table,
         labels=ENTAILMENT, evals=SEEN, steps=500, **DEMO),
    Task("two_choices", "two choices", "choice", "two_choices", ("goal", "sol1", "sol2"), read_piqa,
         train="train.jsonl", evals={"": "valid.jsonl", "seen": "valid_seen.jsonl"}, steps=250, **DEMO),
    Task("four_endings", "four endings", "choice", "four_endings",
         ("sent1", *[f"ending{i}" for i in range(4)]), read_table, stem="sent2", train="train.csv",
         evals={"": "val.csv", "seen": "val_seen.csv"}, steps=250, **DEMO),
    tracie("before_after", "before/after", "before_after", "tracie_train.txt",
           {"": "tracie_test.txt", "seen": "tracie_test_seen.txt"}, steps=250, **DEMO),
)}
DEMO_TASKS = tuple(name for name, task in TASKS.items() if task.source == DEMO["source"])


def find_file(task, data_dir, name, required=True):
    """Path of one of a task's files: in its folder in data_dir, glue/ or glue_data/, or in data_dir itself
    where that is the task's folder.

    Where it is in none of them: None, or if required one line that says where to get it.
    """
    folders = [Path(data_dir, above, task.folder) for above in ("", "glue", "glue_data")]
    folders += [Path(data_dir)] if Path(data_dir).resolve().name == Path(task.folder).name else []
    paths = [Path(os.path.normpath(folder / name)) for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None and required:
        raise SystemExit(f"{paths[0]}: no such file; get {task.title} from {task.source} and give the folder "
                         f"that holds {task.folder}/ as --data_dir")
    return path


def evaluation_files(task, data_dir):
    """{set: path} of the labelled sets to evaluate on; the first must be there."""
    paths = {which: find_file(task, data_dir, name, required=not which) for which, name in task.evals.items()}
    return {which: path for which, path in paths.items() if path}


def unlabelled_files(task, data_dir):
    """{set: path} of the unlabelled sets that are there."""
    paths = {which: find_file(task, data_dir, name, required=False) for which, name in task.tests.items()}
    return {which: path for which, path in paths.items() if path}


def content_hash(path):
    """SHA-256 of a task's file, and of the file of its labels where that is another (PIQA)."""
    digest = hashlib.sha256(path.read_bytes())
    labels = path.with_name(f"{path.stem}-labels.lst")
    if labels.exists():
        digest.update(labels.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------- predictions


def write_submission(task, examples, predictions, path):
    """Writes predictions in the benchmark's own form: task.form, a line an example, or SQuAD's json.

    predictions: class or candidate ids (n,), scores (n,), or {question id: text} for span.
    """
    if task.kind == "span":
        return write_json(path, predictions)
    header, line = task.form
    lines = [header] if header else []
    for name, value in zip(examples.ids, np.asarray(predictions).tolist()):
        value = min(max(value, task.bounds[0]), task.bounds[1])
        word = task.words[value] if task.words else ""
        lines.append(line.format(id=name, label=value, word=word, score=value))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def with_threshold(task, texts, null):
    """SQuAD 2.0's answers: "" where the null score is above 0, that is where [CLS] beats the best span."""
    return {key: "" if task.unanswerable and null[key] > 0 else text for key, text in texts.items()}


def measure(task, examples, predictions):
    """({metric: percent, but rmse in the label's unit}, why the run counts as collapsed, or "")."""
    if task.kind == "span":
        texts, null = predictions
        threshold = dict(no_answer=null, threshold=0.0) if task.unanswerable else {}
        scores = squad_score(json.loads(read_text(examples.source)), texts, **threshold)
        return scores, collapse(list(with_threshold(task, texts, null).values()), None, "span")
    labels = examples.labels
    if "Label" in examples.extra:  # GLUE's diagnostics
        found = diagnostic_scores([task.labels[i] for i in predictions], examples.extra["Label"],
                                  {name: examples.extra[name] for name in DIAGNOSTIC})
        return {f"{category}, {metric}": 100 * values[metric] for category, values in found.items()
                for metric in ("accuracy", "r3")}, ""
    scores = {name: (1 if name == "rmse" else 100) * METRICS[name](predictions, labels)
              for name in task.metrics}
    for word in sorted(set(examples.extra.get("comparator", []))):  # TRACIE
        of = np.array(examples.extra["comparator"]) == word
        scores[f"accuracy of {word}"] = 100 * METRICS["accuracy"](predictions[of], labels[of])
    return scores, collapse(predictions, labels, task.kind)


def write_predictions(task, examples, predictions, path):
    """Predictions of an evaluation or test set in its benchmark's form.

    Beside SQuAD 2.0's lie null_odds.json and answers.json, the texts before the threshold: what the official
    script wants for its search of the best one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if task.kind == "span":
        texts, null = predictions
        if task.unanswerable:
            write_json(path.with_name("null_odds.json"), null)
            write_json(path.with_name("answers.json"), texts)
        predictions = with_threshold(task, texts, null)
    write_submission(task, examples, predictions, path)
