"""The downstream tasks of both papers: their files, labels, metrics and submissions."""
import csv
import functools
import hashlib
import io
import math
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import atomic, parse_json, print0, read_json, read_text, table, write_json
from parts.metrics import METRICS, collapse, diagnostic_scores, squad_questions, squad_score

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
    ragged: bool = False  # rows that lack columns are left out, as in the reference code
    metrics: tuple = ("accuracy",)  # names in METRICS, the first is the one that tables show
    train: str = "train.tsv"
    evals: dict = field(default_factory=lambda: {"": "dev.tsv"})  # the first is required, others if there
    tests: dict = field(default_factory=dict)  # unlabelled sets, if there
    instead: dict = field(default_factory=dict)  # {file: another one, where the folder has none of the keys}
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
    demo: bool = False  # of the demo world

    @property
    def words(self):
        """Names of the classes or of the candidates, () for regress and span."""
        return self.labels or tuple(map(str, range(len(self.text) - 1) if self.kind == "choice" else ()))

    @functools.cached_property
    def numbers(self):
        """{a label as a file may write it: class id}."""
        return {word: i for i, word in enumerate(self.words)} | {str(i): i for i in range(len(self.words))}

    def label_of(self, text, where):
        """Class id or score of a label in a file; SystemExit names the place of a wrong one."""
        text, (low, high) = text.strip(), self.bounds
        if self.kind == "regress":
            with suppress(ValueError):
                if low <= float(text) <= high and math.isfinite(float(text)):
                    return float(text)
            allowed = f"numbers from {low:g} to {high:g}" if high < math.inf else "numbers"
        elif text in self.numbers:
            return self.numbers[text]
        else:
            allowed = ", ".join(self.words) + f" (or 0 to {len(self.words) - 1})" * bool(self.labels)
        raise SystemExit(f"{where}: label {text!r}; those of {self.title} are {allowed}")


@dataclass
class Rows:
    """What a file holds. second: None for single texts, for choice a list of candidates each.

    labels: class ids or scores, for span (first character, the one behind the last), None where unlabelled.
    skipped: rows that were left out because their annotators did not agree; short: because they lack columns.
    """
    first: list
    second: list
    labels: list
    ids: list
    extra: dict = field(default_factory=dict)
    skipped: int = 0
    short: int = 0


# ---------------------------------------------------------------------------- readers


def reader(items):
    """Makes a reader, (task, path, labelled) -> Rows, of a generator (task, path) of a file's rows.

    A row is (where: its place for errors, id or None = its number from 0, texts or None where it lacks some,
    label or None, {extra}).
    """
    @functools.wraps(items)
    def read(task, path, labelled):
        found = Rows([], [] if len(task.text) > 1 else None, [] if labelled else None, [])
        for number, (where, name, texts, label, extra) in enumerate(items(task, path)):
            if texts is None and labelled:
                found.short += 1
                continue
            if texts is None:
                raise SystemExit(f"{where}: lacks columns, but a test set must be whole; fetch it anew")
            if labelled and label is None:
                raise SystemExit(f"{where}: has no {task.label}, so it is an unlabelled test split; train "
                                 f"and evaluate {task.title} on files with labels")
            if labelled and task.unsure and label == task.unsure:
                found.skipped += 1
                continue
            if labelled:
                found.labels.append(label if task.kind == "span" else task.label_of(label, where))
            found.ids.append(str(number) if name is None else name)
            first, *others = texts
            found.first.append(first)
            if others:
                found.second.append(others if task.kind == "choice" else others[0])
            for key, value in extra.items():
                found.extra.setdefault(key, []).append(value)
        if not found.first:
            raise SystemExit(f"{path}: holds no row" + " with a gold label" * bool(found.skipped))
        if not labelled and "{id}" in task.form[1] and len(twice := Counter(found.ids)) < len(found.ids):
            raise SystemExit(f"{path}: two rows have the id {twice.most_common(1)[0][0]}; a submission tells "
                             "rows apart by it, so give each its own")
        return found
    return read


def read_lines_of(path):
    """[(line number, line)] of the lines that are not blank."""
    # splitlines would also cut at separators inside of texts, such as U+2028
    return [(n, line.rstrip("\r")) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def read_fields(path):
    """[(line number, fields)] of a .csv file, or of a .tsv file, in which quotes mean nothing."""
    if Path(path.name.removesuffix(".gz")).suffix != ".csv":
        return [(n, line.split("\t")) for n, line in read_lines_of(path)]
    rows, line = [], 1
    table = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for fields in table:
            if fields:
                rows.append((line, fields))
            line = table.line_num + 1
    except csv.Error as error:
        raise SystemExit(f"{path}, line {line}: {error}; mend the quotes of that row") from None
    return rows


DIAGNOSTIC = ("Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge")


@reader
def read_table(task, path):
    """A .tsv or .csv file whose columns are found by name (GLUE, SWAG, READ); an id is "index" or "id".

    GLUE's diagnostics have other names for MNLI's columns. Their two-way label not_entailment counts as
    neutral; extra["Label"] keeps the words.
    """
    rows, header, text, label = read_fields(path), task.header, task.text, task.label
    if not header or set(text) <= set(rows[0][1]):  # CoLA: only the test set has a first line of names
        (_, header), *rows = rows
    diagnostic = "Premise" in header
    if diagnostic:
        text, label = ("Premise", "Hypothesis"), "Label"
    missing = [name for name in (*text, task.stem) if name and name not in header]
    if missing:
        raise SystemExit(f"{path}: has no column {', '.join(missing)}, its first line is "
                         f"{' '.join(header)[:80]!r}; give the official file of {task.title}")
    wrong = [(line, len(fields)) for line, fields in rows
             if len(fields) != len(header) and not (task.ragged and len(fields) < len(header))]
    if wrong:
        raise SystemExit(f"{path}, line {wrong[0][0]}: {wrong[0][1]} fields where the header has "
                         f"{len(header)}, and {len(wrong) - 1} more such lines; mend or delete them (for a "
                         f".tsv file `awk -F'\\t' 'NF == {len(header)}'` prints the others)")
    for line, fields in rows:
        if len(fields) < len(header):
            yield f"{path}, line {line}", None, None, None, {}
            continue
        row = dict(zip(header, fields))
        first, *others = [row[name] for name in text]
        if task.stem:
            others = [f"{row[task.stem]} {other}" for other in others]
        word = row.get(label)
        if diagnostic and word == "not_entailment":
            word = "neutral"
        yield (f"{path}, line {line}", row.get("index", row.get("id")), [first, *others], word,
               {name: row[name] for name in task.extra if name in row})


def labels_beside(path):
    """Path of PIQA's labels of X.jsonl or X.jsonl.gz: X-labels.lst."""
    return path.with_name(f"{Path(path.name.removesuffix('.gz')).stem}-labels.lst")


@reader
def read_piqa(task, path):
    """PIQA: a JSON object a line, and beside the file another one with a label a line."""
    lines, beside = read_lines_of(path), labels_beside(path)
    labels = read_lines_of(beside) if beside.exists() else [(0, None)] * len(lines)
    if len(labels) != len(lines):
        raise SystemExit(f"{beside}: {len(labels)} labels for the {len(lines)} lines of {path.name}; fetch "
                         "both anew")
    for (number, line), (label_line, label) in zip(lines, labels):
        try:
            content = parse_json(line)
            texts = [content[key] for key in task.text]
            "".join(texts)  # all are str
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: not a JSON object with the texts "
                             f"{', '.join(task.text)} ({error})") from None
        where = f"{path} without {beside.name}" if label is None else f"{beside}, line {label_line}"
        yield where, None, texts, label, {}


@reader
def read_tracie(task, path):
    """TRACIE: `event: .. story: ..`, tab, `answer: ..`; extra["comparator"] is starts or ends."""
    for number, line in read_lines_of(path):
        where = f"{path}, line {number}"
        match = re.fullmatch(r"event: (.*?) story: (.*?)(?:\tanswer: (.*))?", line)
        if not match:
            raise SystemExit(f"{where}: not of the form `event: .. story: ..`, tab, `answer: ..`")
        comparator = "starts" if re.search("starts (before|after)", match[1]) else "ends"
        yield where, None, match.groups()[:2], match[3], {"comparator": comparator}


@reader
def read_squad(task, path):
    """SQuAD's json, a row a question; its label is the place of its first answer, as in BERT's own code.

    extra["answer"] says of each question: "exact", "moved" (not at its answer_start, but found elsewhere in
    the context: the nearest place counts), "missing" (nowhere in the context) or "none" (2.0's unanswerable).
    """
    for question in squad_questions(read_json(path), path):
        where, span, state = f"{path}, question {question.id}", None, "none"
        if question.answers is not None:
            span, state = find_answer(question.context, [] if question.impossible else question.answers)
            if state == "none" and not task.unanswerable:
                raise SystemExit(f"{where}: has no answer, as in SQuAD 2.0; use --tasks squad2")
        yield where, question.id, (question.text, question.context), span, {"answer": state}


def find_answer(context, answers):
    """((first character, the one behind the last), state) of the first answer; see read_squad."""
    if not answers:
        return (-1, -1), "none"
    text, start = answers[0]
    if start >= 0 and text.strip() and context.startswith(text, start):
        return (start, start + len(text)), "exact"
    if not text.strip() or text not in context:
        return (-1, -1), "missing"
    # the nearest in front of start is the first in the reversed text: rfind may take quadratic time
    start = min(max(0, start), len(context))
    turned = context[::-1].find(text[::-1], max(0, len(context) - start - len(text) + 1))
    places = [len(context) - turned - len(text)] * (turned >= 0) + [context.find(text, start)]
    nearest = min((place for place in places if place >= 0), key=lambda place: abs(place - start))
    return (nearest, nearest + len(text)), "moved"


def read_lines(task, lines, number=1):
    """Rows of lines of standard input: the task's texts separated by tabs; choice: a context and candidates.

    The number of candidates is free, but alike in all lines. number: of the first line, for errors.
    """
    found = [line.rstrip("\r\n").split("\t") for line in lines]
    choice = task.kind == "choice"
    width = max(3, len(found[0])) if choice else len(task.text)
    for line, fields in enumerate(found, number):
        if len(fields) != width or not all(text.strip() for text in fields):
            form = "context TAB candidate TAB candidate .." if choice else " TAB ".join(task.text)
            empty = " or an empty one" if len(fields) == width else ""
            raise SystemExit(f"standard input, line {line}: {len(fields)} fields{empty} where {width} are "
                             f"wanted: {form}")
    first, *others = map(list, zip(*found))
    second = list(map(list, zip(*others))) if choice else others[0] if others else None
    return Rows(first, second, None, [str(i + 1) for i in range(len(found))])


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
DEMO = dict(demo=True, source="`python data.py demo`", lr=1e-3, max_length=48)
SEEN = {"": "dev.tsv", "seen": "dev_seen.tsv"}
TASKS = {task.name: task for task in (
    glue("sst2", "SST-2", ("sentence",), ("negative", "positive")),
    glue("qnli", "QNLI", ("question", "sentence"), ENTAILMENT, form=WORDS),
    glue("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), label="is_duplicate",
         metrics=("accuracy", "f1"), ragged=True),  # line breaks cut some rows of its official files
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
         metrics=("accuracy", "f1"),  # the original corpus has no dev split: its test split is evaluated on
         instead={"train.tsv": "msr_paraphrase_train.txt", "dev.tsv": "msr_paraphrase_test.txt"}),
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
DEMO_TASKS = tuple(name for name, task in TASKS.items() if task.demo)


def find_file(task, data_dir, name, required=True):
    """Path of one of a task's files, gzipped or not: in its folder in data_dir, glue/ or glue_data/, or in
    data_dir itself where that is the task's folder. Without one: None, or if required SystemExit that says
    where to get it.
    """
    folders = [Path(data_dir, above, task.folder) for above in ("", "glue", "glue_data")]
    folders += [Path(data_dir)] if Path(data_dir).resolve().name == Path(task.folder).name else []
    paths = [folder / file for file in (name, f"{name}.gz") for folder in folders]
    paths += [folder / task.instead[name] for folder in folders if name in task.instead
              and not any((folder / file).exists() for file in task.instead)]
    paths = [Path(os.path.normpath(path)) for path in paths]
    path = next((path for path in paths if path.is_file()), None)
    if path is None and required:
        if Path(data_dir).is_file():
            raise SystemExit(f"--data_dir {data_dir}: is a file; give the folder that holds {task.folder}/")
        folder = next((path for path in paths if path.is_dir()), None)
        what = f"{folder}: is a folder" if folder else f"{paths[0]}: no such file"
        raise SystemExit(f"{what}; get {task.title} from {task.source} and give the folder that holds "
                         f"{task.folder}/ as --data_dir")
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
    parts = [part.read_bytes() for part in (path, labels_beside(path)) if part.exists()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


# ---------------------------------------------------------------------------- scores and predictions


def with_threshold(task, texts, null):
    """SQuAD 2.0's answers: "" where the null score is above 0, that is where [CLS] beats the best span."""
    return {key: "" if task.unanswerable and null[key] > 0 else text for key, text in texts.items()}


def measure(task, examples, predictions):
    """({metric: percent, but rmse in the label's unit}, why the run counts as collapsed, or "")."""
    labels, extra = examples.labels, examples.extra
    if task.kind == "span":
        texts, null = predictions
        threshold = dict(no_answer=null, threshold=0.0) if task.unanswerable else {}
        scores = squad_score(read_json(examples.source), texts, **threshold)
        return scores, collapse(list(with_threshold(task, texts, null).values()), None, "span")
    if "Label" in extra:  # GLUE's diagnostics
        found = diagnostic_scores([task.labels[i] for i in predictions], extra["Label"],
                                  {name: extra[name] for name in DIAGNOSTIC})
        return {f"{category}, {metric}": 100 * values[metric] for category, values in found.items()
                for metric in ("accuracy", "r3")}, ""
    scores = {name: (1 if name == "rmse" else 100) * METRICS[name](predictions, labels)
              for name in task.metrics}
    for word in sorted(set(extra.get("comparator", []))):  # TRACIE
        of = np.array(extra["comparator"]) == word
        scores[f"accuracy of {word}"] = 100 * METRICS["accuracy"](predictions[of], labels[of])
    return scores, collapse(predictions, labels, task.kind)


def score(predictions_path, gold_path, no_answer_path=""):
    """Prints and returns SQuAD's official scores of a predictions.json; see squad_score."""
    predictions = read_json(predictions_path, "give predictions, {id: text}")
    gold = read_json(gold_path, "give SQuAD's official json with answers, such as dev-v2.0.json")
    no_answer = read_json(no_answer_path, "give no-answer scores, {id: number}") if no_answer_path else None
    ids = [question.id for question in squad_questions(gold, gold_path)]
    found = squad_score(gold, predictions, no_answer)
    if missing := [i for i in ids if i not in predictions]:
        print0(f"predictions: {len(missing):,} of {len(ids):,} questions have none, the first is {missing[0]}"
               "; they count 0")
    if others := predictions.keys() - set(ids):
        print0(f"predictions left out, as gold has no such question: {len(others):,}")
    print0(table([["SQuAD", "score"], *([name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}"]
                                        for name, value in found.items())]))
    return found


def write_predictions(task, examples, predictions, path):
    """What `decide` found, in the benchmark's own form: task.form, a line an example, or SQuAD's json.

    SQuAD 2.0's also leaves null_odds.json and answers.json, the texts before the threshold: the official
    script's search for the best threshold reads both.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if task.kind == "span":
        texts, null = predictions
        if task.unanswerable:
            write_json(path.with_name("null_odds.json"), null)
            write_json(path.with_name("answers.json"), texts)
        return write_json(path, with_threshold(task, texts, null))
    header, line = task.form
    lines = [header] if header else []
    for name, value in zip(examples.ids, np.asarray(predictions).tolist()):
        value = min(max(value, task.bounds[0]), task.bounds[1])
        word = task.words[value] if task.words else ""
        lines.append(line.format(id=name, label=value, word=word, score=value))
    with atomic(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
