"""Fine-tunes and evaluates on every task of both papers (VidLanKD section 4.1, XDBERT section 3).

    python finetune.py                                         # the demo world's tasks, a row a student
    python finetune.py --tasks rte,stsb --data_dir glue_data --model bert-base-uncased/ --dtype bfloat16
    torchrun --nproc_per_node 8 finetune.py --preset vidlankd --model out/distill-nst+crd-s0 --data_dir nlu \\
        --tasks sst2,qnli,qqp,mnli,squad1,squad2,swag
    python finetune.py --tasks rte,stsb --data_dir glue_data --cross out/xdbert-mlm+match+cliptc-s0
    python finetune.py --model out/finetune/bert-base-uncased/rte --predict < pairs.tsv
    python finetune.py --score predictions.json --gold dev-v2.0.json

A run leaves out/finetune/<model>/<task>/s<seed>/ with results.json, its predictions, and model/, a Hugging
Face folder. Finished runs are kept and killed ones go on; --resume false makes them anew. The table prints
medians over the seeds and says which runs collapsed.

--model is a BERT, an ELECTRA, or CLIP's text tower alone, whose head reads the state at the end of the text.
--cross is the whole cross-modal model that adapt_xdbert.py left (X-BERT, XDBERT C.3); it and CLIP are for
every task but SQuAD.

Tasks: sst2 qnli qqp mnli (with mm and GLUE's diagnostics) squad1 squad2 swag, rte mrpc stsb cola wnli, piqa
tracie tracie_iid read; the demo's: mishap entailment two_choices four_endings before_after.
"""
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import distill
import teacher
from analyze import METRICS, aligned, collapse, diagnostic_scores, median_run, score, squad_score
from common import (Interrupt, Log, check_fields, check_finite, check_weights, duration, file_hash,
                    finished_run, hash64, init_world, keyed_uniform, load_checkpoint, lr_at,
                    micro_batch_size, model_folder, move, open_run, peak_memory_mb, print0, progress,
                    restore_rng, return_freed_memory, run_script, save_checkpoint, set_seed, unfinished_run,
                    write_json)
from model import (BERT, XDBERT, BERTConfig, CLIPConfig, CLIPText, TaskModel, load_clip_config, load_config,
                   memory_report, model_config, model_type, param_groups)


@dataclass(frozen=True)
class Config:
    preset: str = "demo"  # demo, vidlankd, xdbert-base or xdbert-large; flags beat it
    # data
    tasks: str = ""  # names from TASKS joined by commas; empty = the demo world's
    data_dir: str = "data"  # folder of the tasks in their official layouts; the demo world is kept there, too
    limit: int = 0  # training examples that are used, drawn by the seed; 0 = all
    max_length: int = 0  # tokens of a sequence; 0 = the task's own (real tasks: 128), at most the positions
    # model
    model: str = ""  # a run, a Hugging Face folder, or none = no pre-training; empty = the demo's table
    cross: str = ""  # in place of --model: a run of adapt_xdbert.py, whose whole cross-modal model is taken
    like: str = ""  # --model none: a folder whose shape and vocabulary are taken; empty = the demo's
    pool: str = "cls"  # what the head reads: cls = pooled [CLS], CLIP: end of text; mean = of all states
    freeze: bool = False  # train pooler and head alone
    dropout: float = -1.0  # of encoder and head; below 0 = as the model's
    # optimizer
    batch_size: int = 32  # examples a step, over all ranks and accumulation; of SQuAD, windows
    grad_accum: int = 1  # micro-batches a rank runs for one step
    lr: float = 0.0  # peak learning rate of AdamW; 0 = the task's own, see PER_TASK
    layer_decay: float = 1.0  # factor on the learning rate from each layer to the one below it
    weight_decay: float = 0.01  # not on biases and LayerNorm
    beta2: float = 0.999  # AdamW's second momentum
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    warmup: float = 0.1  # share of the steps, linear
    epochs: float = 0.0  # passes over the training set; 0 = the task's own (real tasks: 3)
    max_steps: int = 0  # steps instead of epochs
    # runs
    seeds: int = 0  # runs of each task, from --seed on; 0 = the preset's, see PER_TASK
    seed: int = 0  # of head, order and dropout, and of the demo world
    # system
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    out_dir: str = ""  # where <task>/s<seed> go; empty = out/finetune/<model>
    save_models: bool = True  # leave model/ in each run; false saves disk
    resume: bool = True  # keep finished runs, go on with killed ones; false = run anew
    eval_only: bool = False  # evaluate the finished runs' models again
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    log_every: int = 50  # steps a log line
    save_every: int = 500  # steps between checkpoints
    # other jobs
    predict: bool = False  # label lines of standard input with the fine-tuned --model
    score: str = ""  # a SQuAD predictions.json to score
    gold: str = ""  # the SQuAD file to score it against
    no_answer: str = ""  # null_odds.json, for 2.0's best thresholds; then --score the answers.json beside it

    def __post_init__(self):
        check_fields(self, CHOICES, POSITIVE)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup {self.warmup:g}: a share of the steps, at least 0 and below 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay:g}: above 0 and at most 1 (1 = off)")
        if self.dropout >= 1:
            raise ValueError(f"--dropout {self.dropout:g}: below 1")
        if self.save_every % self.log_every:
            raise ValueError(f"--save_every {self.save_every}: must be a multiple of --log_every "
                             f"({self.log_every})")
        for name in ("limit", "max_length", "lr", "epochs", "max_steps", "seeds"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if bool(self.score) != bool(self.gold):
            raise ValueError("--score predictions.json and --gold dev.json go together")
        if self.predict and self.model in ("", "none"):
            raise ValueError("--predict needs --model, the folder of a fine-tuned model")
        if self.cross == "none" or self.cross and self.model:
            raise ValueError("--cross is given in place of --model: the folder of a run of adapt_xdbert.py")


CHOICES = {"pool": ("cls", "mean"), "dtype": ("float32", "bfloat16", "float16")}
POSITIVE = ("batch_size", "grad_accum", "log_every", "save_every")
# preset: (lr of RTE, MRPC and STS-B, lr of the other tasks, runs of RTE, runs of the others)
PER_TASK = {"demo": (1e-4, 1e-4, 3, 3),
            "vidlankd": (1e-4, 1e-4, 1, 1),  # VidLanKD 4.3, which tells no number of runs
            "xdbert-base": (1e-4, 2e-5, 9, 5),  # XDBERT Table 5 and C.2
            "xdbert-large": (5e-5, 1e-5, 9, 5)}
# warm-up of both and VidLanKD's weight decay: released code; XDBERT's "decay of 0.9" is read as layer-wise
AS_XDBERT = dict(epochs=3.0, batch_size=32, warmup=0.1, layer_decay=0.9)
PRESETS = {"demo": {},
           "vidlankd": dict(epochs=3.0, batch_size=32, warmup=0.1, weight_decay=0.0),
           "xdbert-base": AS_XDBERT, "xdbert-large": AS_XDBERT}
UNKNOWN = 0.3  # share of unknown tokens from which a vocabulary cannot be the texts'

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
    metrics: tuple = ("accuracy",)  # names in analyze.METRICS, the first is the one that tables show
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


def read_text(path):
    """Text of a UTF-8 file without its byte-order mark; one line where it is empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"{path}, line {line}: not UTF-8; convert the file first, for instance with `iconv "
                         "-f latin1 -t utf-8`") from None
    if not text.strip():
        raise SystemExit(f"{path}: is empty; fetch it anew")
    return text


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


def test_files(task, data_dir):
    """{set: path} of the unlabelled sets that are there."""
    paths = {which: find_file(task, data_dir, name, required=False) for which, name in task.tests.items()}
    return {which: path for which, path in paths.items() if path}


# ---------------------------------------------------------------------------- tokens

FORMAT = 1  # of the cached tokens


def tokenize(texts, vocab, cache="", source="input", spans=False):
    """List of str -> {"ids": int32, "bounds": int64 (n + 1,)}: text i has ids bounds[i] to bounds[i + 1].

    spans: also "starts" and "ends", int32, of each token in the characters of its text. cache: a folder that
    keeps the arrays under the hash of the texts and the vocabulary, or "". source is named in errors.
    """
    try:
        content = "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise SystemExit(f"{source}: holds half of a surrogate pair behind "
                         f"{error.object[max(0, error.start - 30):error.start]!r}; remove it") from None
    head = f"{FORMAT} {vocab.hash} {spans} {[len(text) for text in texts]}"
    path = Path(cache) / f"{hashlib.sha256(head.encode() + content).hexdigest()}.npz"
    if cache and path.is_file():
        with suppress(Exception), np.load(path, allow_pickle=False) as file:  # damaged: it is made anew
            return {name: file[name] for name in ("ids", "bounds", "starts", "ends")[:4 if spans else 2]}
    parts = {"ids": [], "bounds": [[0]], "starts": [], "ends": []}
    with progress(None, len(texts), " texts", "tokenize") as bar:
        for i in range(0, len(texts), 20000):
            some = texts[i:i + 20000]
            if spans:
                found = vocab.tokenizer.encode_batch(some, add_special_tokens=False)
                offsets = flat(chain.from_iterable(e.offsets) for e in found).reshape(-1, 2)
                parts["starts"].append(offsets[:, 0])
                parts["ends"].append(offsets[:, 1])
            ids = [e.ids for e in found] if spans else vocab.encode(some)
            parts["ids"].append(flat(ids))
            parts["bounds"].append([len(x) for x in ids])
            bar.update(len(ids))
    tokens = {name: np.concatenate(part) for name, part in parts.items() if part}
    tokens["bounds"] = np.cumsum(tokens["bounds"], dtype=np.int64)
    if cache:
        keep_tokens(path, tokens)
    return tokens


def flat(lists):
    """Iterable of lists of int -> one int32 array."""
    return np.fromiter(chain.from_iterable(lists), np.int32)


def keep_tokens(path, tokens):
    """Writes a cache file whole or not at all; a run does without where the disk is full or read-only."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # ranks may write the same file at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.savez(file, **tokens)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        print0(f"{path.parent}: tokens cannot be kept there ({error.strerror or error}); the run goes on")


def truncate(first, second, room):
    """Lengths of pairs after their longer text, of equal ones the second, has lost tokens until both fit."""
    second = np.minimum(second, np.maximum(room // 2, room - first))
    return np.minimum(first, room - second), second


# ---------------------------------------------------------------------------- examples and batches


class Examples:
    """Tokenised rows; an example is [CLS] first [SEP], or [CLS] first [SEP] second [SEP] with segments 0, 1.

    keep: numbers of the rows to take (default all). For choice an example has K candidates. labels: int64 or
    float32 (n,), None without. lengths: tokens of each example with [CLS] and [SEP], int64 (n,), of choice
    the longest candidate's. truncated: examples that were cut; unknown: share of [UNK] among all tokens.
    beside: (CLIPConfig, vocabulary) of the tower that reads the texts, too, if there is one: `lay_out_clip`.
    """
    clip, clip_truncated = None, 0

    def __init__(self, task, rows, vocab, max_length, cache="", keep=None, source="input", beside=()):
        n, choice = len(rows.first), task.kind == "choice"
        keep = np.arange(n) if keep is None else keep
        second = list(chain.from_iterable(rows.second)) if choice else rows.second or []
        texts = [*rows.first, *second]
        tokens = tokenize(texts, vocab, cache, source)
        begin, count = tokens["bounds"][:-1], np.diff(tokens["bounds"])
        if choice:  # the candidates of all rows stand behind all contexts
            first = keep[:, None].repeat(len(second) // n, axis=1)  # (n, K) numbers of texts
            other = n + first * first.shape[1] + np.arange(first.shape[1])
        else:
            first, other = keep, n + keep  # (n,)
        if second:
            special, whole = 3, (count[first], count[other])
            sizes = truncate(*whole, max_length - special)
        else:
            special, other, whole = 2, first, (count[first], np.zeros_like(first))
            sizes = np.minimum(whole[0], max_length - special), whole[1]
        self.lay_out(tokens["ids"], vocab, (begin[first], begin[other]), sizes, special)
        cut = sum(sizes) < sum(whole)
        self.truncated = int((cut.any(1) if choice else cut).sum())
        if beside:
            sentences = np.stack([first, other] if second else [first], -1)
            self.lay_out_clip(tokenize(texts, beside[1], cache, source), sentences, *beside)
        self.labels = None if rows.labels is None else np.array(
            rows.labels, np.float32 if task.kind == "regress" else np.int64)[keep]
        self.ids = [rows.ids[i] for i in keep]
        self.extra = {name: [values[i] for i in keep] for name, values in rows.extra.items()}
        self.skipped, self.source = rows.skipped, source

    def lay_out(self, ids, vocab, begin, sizes, special):
        """begin, sizes: (first, second) places in the flat ids and lengths, (n,) or (n, K) each."""
        self.tokens, self.vocab = np.append(ids, vocab.pad), vocab  # one more, so that it is never empty
        self.begin, self.sizes, self.length = begin, sizes, sizes[0] + sizes[1] + special
        self.lengths = self.length if self.length.ndim == 1 else self.length.max(1)
        self.unknown = float((ids == vocab.unk).mean()) if len(ids) else 0.0

    def lay_out_clip(self, tokens, sentences, config, vocab):
        """CLIP's input: two segments for each sentence, of as many tokens as the tower has positions, start
        and end included (XDBERT Appendix B): (n, 2 or 4, 77), of choice (n, K, 4, 77).

        sentences: numbers of texts (n, 1 or 2), of choice (n, K, 2). What does not fit in a sentence's first
        segment goes on in the second, and the rest is cut, in `clip_truncated` examples. The first is in use
        also where the sentence is empty; a second one without a token (-1 of them) is not run.
        """
        room = config.positions - 2
        whole = np.diff(tokens["bounds"])[sentences][..., None]
        left = whole - [0, room]  # (n, .., sentences, 2)
        count = np.where(left > 0, np.minimum(left, room), [0, -1])
        begin = tokens["bounds"][sentences][..., None] + [0, room]
        shape = *sentences.shape[:-1], -1
        self.clip = tokens["ids"], begin.reshape(shape), count.reshape(shape), vocab, config.positions
        self.clip_truncated = int((whole > 2 * room).reshape(len(sentences), -1).any(1).sum())

    def __len__(self):
        return len(self.length)

    def batch(self, index):
        """{"ids", "mask" (True = real), "segments"}: (b, T), of choice (b, K, T); and "labels" if there are.

        T is the length of the longest in this batch. For a tower beside, what data.segment_batch gives for
        the sequences, one after the other, is among them.
        """
        index = np.asarray(index)
        shape = self.length[index].shape
        (begin, begin_second), (size, _) = ([x[index].reshape(-1, 1) for x in pair]
                                            for pair in (self.begin, self.sizes))  # (b K, 1) each
        length = self.length[index].reshape(-1, 1)
        t = np.arange(length.max())
        mask, second = t < length, t > size + 1
        ids = self.tokens.take(np.where(second, begin_second - size - 2, begin - 1) + t, mode="clip")
        ids[:, 0] = self.vocab.cls
        np.put_along_axis(ids, np.hstack([size + 1, length - 1]), self.vocab.sep, 1)
        ids[~mask] = self.vocab.pad
        batch = {"ids": ids.astype(np.int64), "mask": mask, "segments": (second & mask).astype(np.int64)}
        batch = {name: torch.from_numpy(x.reshape(*shape, -1)) for name, x in batch.items()}
        if self.clip:
            tokens, begin, count, *tower = self.clip
            begin, count = (x[index].reshape(-1, x.shape[-1]) for x in (begin, count))
            batch |= data.segment_batch(tokens, begin, count, *tower)
        return batch if self.labels is None else batch | {"labels": torch.from_numpy(self.labels[index])}


def load_examples(task, path, vocab, max_length, cache, split, limit=0, seed=0, beside=()):
    """A file -> Examples (SquadExamples for span). split: train, dev or test, which needs no labels.

    cache: folder for tokens, or "". limit: that many examples, drawn by (seed, row), 0 = all; of SQuAD that
    many questions. beside: as for Examples.
    """
    rows = task.read(task, Path(path), split != "test")
    keep = np.arange(len(rows.first))
    if task.dev_share and split != "test":
        # by id: the same rows are held out however the file is sorted
        drawn = np.array([keyed_uniform("dev", row) for row in rows.ids])
        keep = keep[(drawn < task.dev_share) == (split == "dev")]
    if split == "train" and "answer" in rows.extra:
        keep = keep[np.array(rows.extra["answer"]) != "missing"]
    if limit:
        order = np.argsort(keyed_uniform("limit", seed, keep), kind="stable")
        keep = np.sort(keep[order[:limit]])
    if not len(keep):
        raise SystemExit(f"{path}: has no example that could be used for {split}; give a longer file")
    return tokenized(task, rows, vocab, max_length, cache, keep, path, beside)


def tokenized(task, rows, vocab, max_length, cache="", keep=None, source="standard input", beside=()):
    """Rows -> Examples, or SquadExamples for span."""
    if max_length < 5:
        raise SystemExit(f"--max_length {max_length}: must be at least 5, [CLS] and two [SEP] included")
    if task.kind == "span":
        return SquadExamples(task, rows, vocab, max_length, cache, keep, source)
    return Examples(task, rows, vocab, max_length, cache, keep, source, beside)


# ---------------------------------------------------------------------------- SQuAD

QUESTION_TOKENS, WINDOW_STRIDE, ANSWER_TOKENS = 64, 64, 30


class SquadExamples(Examples):
    """Questions whose contexts are cut in overlapping windows; an example is a window (Devlin et al. 2019).

    A question keeps 64 tokens; windows start every min(64, room) tokens of the context. labels: (windows, 2)
    first and last position of the answer, (0, 0) = [CLS] where the window does not hold it whole. ids: the
    question's, for each window; questions: each id once. truncated: questions that were cut; moved, missing:
    questions of the file whose first answer is not at its answer_start, or nowhere in the context.
    """

    def __init__(self, task, rows, vocab, max_length, cache="", keep=None, source="input"):
        n, contexts = len(rows.first), {}  # a context is tokenised once for all of its questions
        keep = np.arange(n) if keep is None else keep
        context = n + np.array([contexts.setdefault(text, len(contexts)) for text in rows.second])[keep]
        texts = [*rows.first, *contexts]
        tokens = tokenize(texts, vocab, cache, source, spans=True)
        begin, count = tokens["bounds"][:-1], np.diff(tokens["bounds"])
        size, total = np.minimum(count[keep], QUESTION_TOKENS), count[context]  # (questions,)
        room = max_length - 3 - size
        if room.min() < 1:
            raise SystemExit(f"--max_length {max_length}: leaves no room for the context behind a question "
                             f"of {size.max()} tokens; give at least {size.max() + 4}, better 384")
        stride = np.minimum(WINDOW_STRIDE, room)
        windows = 1 + np.maximum(0, -(-(total - room) // stride))
        self.first_window = np.cumsum(windows) - windows  # (questions,)
        self.question = of = np.repeat(np.arange(len(keep)), windows)  # (windows,)
        self.offset = (np.arange(len(of)) - self.first_window[of]) * stride[of]  # in the context's tokens
        self.lay_out(tokens["ids"], vocab, (begin[keep][of], begin[context][of] + self.offset),
                     (size[of], np.minimum(room[of], total[of] - self.offset)), 3)
        self.truncated = int((count[keep] > QUESTION_TOKENS).sum())
        self.questions, self.contexts = ([values[i] for i in keep] for values in (rows.ids, rows.second))
        self.ids = [self.questions[i] for i in of]
        self.total, self.starts, self.ends = total, tokens["starts"], tokens["ends"]
        self.unanswerable, self.source = task.unanswerable, source
        self.extra, self.skipped, self.labels = {}, 0, None
        states = rows.extra.get("answer", [])
        self.moved, self.missing = states.count("moved"), states.count("missing")
        if rows.labels is not None:
            characters = np.array([len(text) for text in texts])
            characters = np.cumsum(characters) - characters  # of all texts behind one another
            shift = np.repeat(characters, count)
            first, behind = (np.array(rows.labels)[keep] + characters[context][:, None]).T
            # the first token that ends behind the answer's start, the last one that starts before its end
            first = np.searchsorted(self.ends + shift, first, "right") - begin[context]
            last = np.searchsorted(self.starts + shift, behind, "left") - 1 - begin[context]
            place = np.stack([first, last], 1)[of] - self.offset[:, None]  # (windows, 2)
            # no answer, (-1, -1), ends in front of every window
            inside = (0 <= place[:, 0]) & (place[:, 0] <= place[:, 1]) & (place[:, 1] < self.sizes[1])
            self.labels = np.where(inside[:, None], place + size[of][:, None] + 2, 0)

    def answers(self, start, end, null_threshold=0.0):
        """Logits (windows, T), padded with -inf -> ({question id: text}, {question id: null score}).

        The answer is the span of at most 30 tokens in one window with the highest sum of start and end logit,
        among those whose first token has its most context in that window. The null score is the lowest sum of
        [CLS]'s logits over the question's windows less the best span's sum; in SQuAD 2.0 the answer is ""
        where it is above null_threshold. A text is cut out of the context as it stands there.
        """
        start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
        null = np.minimum.reduceat(start[:, 0] + end[:, 0], self.first_window)
        inside, most = self.context_masks(start.shape[1])
        start, end = np.where(most, start, -np.inf), np.where(inside, end, -np.inf)
        window = np.arange(len(start))
        best = np.full(len(start), -np.inf, np.float32)
        first, last = np.zeros_like(window), np.zeros_like(window)
        for more in range(min(ANSWER_TOKENS, start.shape[1])):  # tokens behind the first
            both = start[:, :start.shape[1] - more] + end[:, more:]
            at = both.argmax(1)
            score = both[window, at]
            better = score > best
            best[better], first[better], last[better] = score[better], at[better], at[better] + more
        window = np.lexsort((-best, self.question))[self.first_window]  # the best of each question
        best, texts, scores = best[window], {}, {}
        behind = self.begin[1][window] - self.sizes[0][window] - 2  # what a position lacks to its token
        first, last = first[window] + behind, last[window] + behind
        for i, (name, context) in enumerate(zip(self.questions, self.contexts)):
            # a context without a token has no span: no infinity, which JSON cannot hold
            scores[name] = float(null[i] - max(best[i], np.finfo(np.float32).min))
            if best[i] == -np.inf or self.unanswerable and scores[name] > null_threshold:
                texts[name] = ""
                continue
            a, b = self.starts[first[i]], self.ends[last[i]]
            while b < len(context) and unicodedata.category(context[b]) == "Mn":
                b += 1  # an accent that follows its letter has no token, but belongs to it
            texts[name] = context[a:b]
        return texts, scores

    def context_masks(self, T):
        """Two (windows, T) bool: a token of the context; and one that has its most context in this window.

        Most is the highest min(tokens to the left, to the right) of all windows that hold the token; of equal
        ones the first counts. (BERT's own code adds 0.01 x the window's size, which changes no order: sizes
        differ by less than the stride of 64, and it is the last window that may be smaller.)
        """
        place = np.arange(T) - self.sizes[0][:, None] - 2  # in the window's part of the context
        inside = (place >= 0) & (place < self.sizes[1][:, None])
        window, t = inside.nonzero()
        place = place[window, t]
        score = np.minimum(place, self.sizes[1][window] - 1 - place)
        score = score * len(inside) - window  # so that no two are equal and the first is the highest
        token = (np.cumsum(self.total) - self.total)[self.question[window]] + self.offset[window] + place
        highest = np.full(self.total.sum(), np.iinfo(np.int64).min)
        np.maximum.at(highest, token, score)
        most = inside.copy()
        most[window, t] = score == highest[token]
        return inside, most


# ---------------------------------------------------------------------------- input and output


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


# ---------------------------------------------------------------------------- order, loss and evaluation

POOL = 50  # training batches whose examples are sorted by length together
EVAL_TOKENS = 1 << 14  # of an evaluation batch, padding included


class Order:
    """The examples of each step's global batch: a pure function of (seed, step), alike on all ranks.

    Each epoch visits every example once, in an order of its own. It is cut in equal pools of up to POOL
    batches, in which examples are sorted by length, so that a batch needs little padding; then the batches
    of a pool are shuffled. A batch across two epochs belongs to both.
    """

    def __init__(self, lengths, batch_size, max_steps, seed):
        self.lengths, self.batch_size, self.max_steps, self.seed = lengths, batch_size, max_steps, seed
        epoch = len(lengths) / batch_size  # in batches
        self.size = max(1, round(epoch / math.ceil(epoch / POOL)))  # of a pool: equal parts of an epoch
        self.pool, self.batches = -1, None

    def __call__(self, step):
        pool = step // self.size
        if pool != self.pool:
            first, size = pool * self.size, min(self.size, self.max_steps - pool * self.size)
            stream = np.arange(first * self.batch_size, (first + size) * self.batch_size)
            index = data.permuted(stream, len(self.lengths), self.seed)
            order = np.lexsort((self.lengths[index], stream // len(self.lengths)))  # epochs stay apart
            self.batches = index[order].reshape(size, self.batch_size)
            self.batches = self.batches[np.argsort(hash64("batches", self.seed, pool, np.arange(size)))]
            self.pool = pool
        return self.batches[step - pool * self.size]


class Objective(nn.Module):
    """The loss around a task's model, as DDP calls it: a mean over the examples of the global batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, count):
        """Cross-entropy; squared error for regress; the mean of start's and end's cross-entropy for span."""
        logits, labels = self.model(**inputs(batch)), batch["labels"]
        if self.model.kind == "regress":
            loss = F.mse_loss(logits, labels, reduction="sum")
        elif self.model.kind == "span":  # logits (B, T, 2), labels (B, 2)
            logits = logits.masked_fill(~batch["mask"][..., None], -math.inf)
            loss = F.cross_entropy(logits, labels, reduction="sum") / 2
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"task": loss / count}


def inputs(batch):
    """What of a batch the model reads."""
    return {name: x for name, x in batch.items() if name != "labels"}


def batches_by_length(examples):
    """Index arrays of one pass, longest examples first, up to EVAL_TOKENS tokens each."""
    order, start = np.argsort(-examples.lengths, kind="stable"), 0
    candidates = examples.length[0].size  # sequences of an example
    while start < len(order):
        size = max(1, EVAL_TOKENS // (candidates * int(examples.lengths[order[start]])))
        yield order[start:start + size]
        start += size


@torch.no_grad()
def evaluate(model, examples, dtype, world):
    """Logits of every example, float32 (n, ...), in the file's order, alike on all ranks; -inf at padding.

    Batches are shared out whole, so that any number of ranks computes what one process does, bit for bit.
    """
    training = model.training
    shape = {"classify": (model.classifier.out_features,), "regress": (), "choice": examples.length.shape[1:],
             "span": (int(examples.lengths.max()), 2)}
    logits = torch.zeros(len(examples), *shape[model.kind])
    parts = list(batches_by_length(examples))[world.rank::world.size]
    model.eval()
    for index in progress(parts, len(parts), " batches", "evaluate", leave=False):
        batch = move(examples.batch(index), world.device)
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            part = model(**inputs(batch))
        index = torch.from_numpy(index)
        if model.kind == "span":
            part = part.masked_fill(~batch["mask"][..., None], -math.inf)
            logits[index] = -math.inf
            logits[index, :part.shape[1]] = part.cpu()
        else:
            logits[index] = part.cpu()
    model.train(training)
    return world.sum(logits)


def decide(task, examples, logits):
    """Predictions from the logits: classes or candidates, scores, or {question id: text} of spans.

    For span (texts, null scores), the texts as if every question had an answer; see `with_threshold`.
    """
    if task.kind == "span":
        return examples.answers(logits[..., 0], logits[..., 1], math.inf)
    return logits.numpy() if task.kind == "regress" else logits.argmax(1).numpy()


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


# ---------------------------------------------------------------------------- what a run starts from


@dataclass(frozen=True)
class Start:
    """The encoder that runs start from: that of `folder`, or without one fresh weights of shape `config`."""
    name: str  # below out/finetune
    folder: Path  # or None
    config: BERTConfig  # or CLIPConfig, for CLIP's text tower alone
    vocab: data.Vocab  # or data.CLIPVocab
    hash: str  # of shapes and weights, or of shape and vocabulary
    beside: tuple = ()  # X-BERT: (CLIPConfig, vocabulary) of the tower beside the language encoder

    def encoder(self, cfg, pooler):
        """The encoder with the flags' dropout; what is not loaded is drawn from torch's generator."""
        dropout = self.config.dropout if cfg.dropout < 0 else cfg.dropout
        if self.beside:
            return XDBERT.from_pretrained(self.folder, dropout)
        if isinstance(self.config, CLIPConfig):
            return CLIPText.from_pretrained(self.folder, dropout)
        if self.folder:
            return BERT.from_pretrained(self.folder, pooler, dropout)
        return BERT(replace(self.config, dropout=dropout), pooler)

    def check(self, tasks):
        """One line where one of the tasks is not for this encoder."""
        spans = [task.name for task in tasks if task.kind == "span"]
        if spans and (self.beside or isinstance(self.config, CLIPConfig)):
            raise SystemExit(f"--tasks {spans[0]}: a span of the context is found by BERT and ELECTRA alone, "
                             f"not by {self.name}; leave SQuAD out")


def open_start(model, like="", demo=None, flag="--model"):
    """Start of --model, or of --cross where `flag` says so; demo: the demo world's folder, whose vocabulary a
    model for its tasks must have."""
    vocab = data.load_vocab(demo / "corpus.h5") if demo else None
    if model != "none":
        folder = model_folder(median_run_of(model), flag)
        config, own = config_and_vocab(folder)
        if demo and own.hash != vocab.hash:
            raise SystemExit(f"{flag} {model}: its vocabulary is not that of {demo}; give the --seed of the "
                             "world that it was trained on, or other --tasks and their --data_dir")
        name, read, beside = run_name(folder), [config, file_hash(folder)], ()
        if flag == "--cross":
            for part in ("cross.json", "cross.safetensors", "clip"):
                if not (folder / part).exists():
                    raise SystemExit(f"--cross {model}: has no cross-modal encoder ({part}); give a run of "
                                     "adapt_xdbert.py without --no_clip, or this one as --model")
            name, beside = f"{name}-cross", config_and_vocab(folder / "clip")
            read += [beside[0], file_hash(folder / "clip"), file_hash(folder / "cross.safetensors"),
                     beside[1].hash]
        weights = hashlib.sha256(" ".join(map(str, read)).encode()).hexdigest()
        return Start(name, folder, config, own, weights, beside)
    if like:
        folder = model_folder(like, "--like")
        return fresh_start(run_name(folder), load_config(folder), data.load_vocab(folder))
    if demo:
        return fresh_start(demo.name, model_config("demo", vocab.size), vocab)
    raise SystemExit("--model none needs --like FOLDER, whose config.json and vocab.txt are taken")


def config_and_vocab(folder):
    """Of a Hugging Face folder: of BERT or ELECTRA, or of CLIP's text tower."""
    if model_type(folder) == "clip":
        config, vocab = load_clip_config(folder), data.load_clip_vocab(folder)
    else:
        config, vocab = load_config(folder), data.load_vocab(folder)
    if vocab.size != config.vocab_size:
        raise SystemExit(f"{folder}: {vocab.size:,} tokens in its vocabulary, {config.vocab_size:,} in its "
                         "config.json; fetch or save the model again")
    return config, vocab


def positions_of(config):
    """The longest sequence that an encoder takes."""
    return config.positions if isinstance(config, CLIPConfig) else config.max_positions


def fresh_start(name, config, vocab):
    """Start without pre-training."""
    shape = hashlib.sha256(f"{config} {vocab.hash}".encode()).hexdigest()
    return Start(f"none-{name}", None, config, vocab, shape)


def run_name(folder):
    """distill-nst+crd-s0 of out/distill-nst+crd-s0/model; bert-mnli-s1 of out/finetune/bert/mnli/s1/model."""
    folder = folder.resolve()
    if folder.name != "model":
        return folder.name
    run = folder.parent
    fine_tuned = re.fullmatch(r"s\d+", run.name)
    return f"{run.parents[1].name}-{run.parent.name}-{run.name}" if fine_tuned else run.name


def median_run_of(path):
    """The median run's folder where `path` is that of a task's runs, else the path itself."""
    try:
        summary = json.loads((Path(path) / "results.json").read_text())
        return Path(path) / summary["median"]
    except (OSError, ValueError, KeyError):
        return Path(path)


# ---------------------------------------------------------------------------- one run


# flags that change no result: hashes tell what the model and the data are
FREE = ("model", "cross", "like", "preset", "predict", "score", "gold", "no_answer")


def finetune(cfg, task, start, train, evals, hashes, folder, world, interrupt):
    """Fine-tunes `start` once and evaluates; returns what results.json of the run's folder holds.

    A finished run is kept; where the evaluation sets have changed, or with --eval_only, its model is
    evaluated again. cfg: of own_settings; train: Examples; evals: {set: Examples}; hashes: of the weights
    and of each file; interrupt: the command's common.Interrupt.
    """
    micro_size, dtype = micro_batch_size(cfg, world), getattr(torch, cfg.dtype)
    trained_on = {what: hashes[what] for what in ("weights", "vocabulary", "train")}
    before = finished_run(folder, cfg, trained_on, FREE)
    has_model = (folder / "model").exists()
    keep = before and (cfg.resume or cfg.eval_only) and (has_model or not cfg.save_models)
    current = before and before.get("hashes") == hashes
    if world.any(world.main and bool(keep and current and not cfg.eval_only)):
        print0(f"reused {folder}")
        return before | {"folder": str(folder)}
    if world.any(world.main and bool(keep and has_model)):
        model, _ = TaskModel.from_pretrained(folder / "model")
        results = before | assess(model.to(world.device), task, evals, dtype, world, folder)
        results |= {"hashes": hashes, "folder": str(folder)}
        if world.main:
            write_json(folder / "results.json", results)
        world.barrier()
        return results
    if cfg.eval_only:
        raise SystemExit(f"--eval_only: {folder} holds no finished run with its model, of these flags and "
                         "this training set; leave --eval_only out to make it")
    go_on = cfg.resume and unfinished_run(folder, cfg, trained_on, FREE)
    cfg = replace(cfg, resume=world.any(world.main and go_on))
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)

    set_seed(cfg.seed, 0)
    encoder = start.encoder(cfg, pooler=task.kind != "span" and cfg.pool == "cls")
    model = TaskModel(encoder, task.kind, len(task.labels), cfg.pool).to(world.device)
    if task.name not in DEMO_TASKS:
        print0(memory(model, micro_size * train.length[0].size, train))
    if cfg.freeze:
        model.freeze_encoder()
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay, cfg.layer_decay), lr=cfg.lr,
                                  betas=(0.9, cfg.beta2), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    begin, lines, seconds = 0, 0, 0.0
    if cfg.resume:
        saved = load_checkpoint(folder, world)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty but in float16
            scaler.load_state_dict(saved["scaler"])
        begin, lines, seconds = saved["step"], saved["log_lines"], saved["seconds"]
        print0(f"{folder}: goes on from step {begin}")
    open_run(folder, cfg, world, trained_on)
    log = Log(folder, world, lines)
    objective = Objective(model)
    ddp = DistributedDataParallel(objective) if world.size > 1 else objective
    set_seed(cfg.seed, 1 + world.rank)
    if cfg.resume:
        restore_rng(saved, world)

    order = Order(train.lengths, cfg.batch_size, max_steps, cfg.seed)
    names, weights, count = ["task"], {"task": 1.0}, cfg.batch_size / world.size
    warmup_steps = round(cfg.warmup * max_steps)
    window = torch.zeros(cfg.log_every, 1, device=world.device)
    began = time.monotonic() - seconds
    model.train()
    for step in progress(range(begin, max_steps), max_steps - begin, " steps", f"{task.name} s{cfg.seed}",
                         leave=False):
        stop = interrupt.due(world)
        if step > begin and step % cfg.save_every == 0 or stop:
            check_finite(world.sum(window.clone()), step - step % cfg.log_every, names, folder)
            check_weights(model, step, folder)
            save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                     "scaler": scaler.state_dict(), "step": step, "log_lines": log.lines,
                                     "seconds": time.monotonic() - began}, world)
        if stop:
            print0(f"{interrupt.reason}: saved step {step} in {folder}; go on with the same command, but "
                   "without --resume false")
            raise SystemExit(0)
        index = order(step)
        rows = [data.micro_rows(cfg.batch_size, world.rank, world.size, micro, cfg.grad_accum)
                for micro in range(cfg.grad_accum)]
        batches = [move(train.batch(index[part]), world.device) for part in rows]
        lr = lr_at(step, cfg.lr, warmup_steps, max_steps)

        # ---- optimizer step: these lines are the same in every script (tests/test_sync.py) ----
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        window[step % cfg.log_every] = 0
        for micro, batch in enumerate(batches):
            if world.size > 1:  # gradients travel once a step
                ddp.require_backward_grad_sync = micro == cfg.grad_accum - 1
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                terms = ddp(batch, count)
            loss = sum(weights[name] * terms[name] for name in names)
            scaler.scale(loss).backward()
            window[step % cfg.log_every] += torch.stack([terms[name].detach() for name in names])
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(ddp.parameters(), cfg.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # ---- end of the optimizer step ----
        if (step + 1) % cfg.log_every == 0:
            first = step + 1 - cfg.log_every  # of the window; a resumed run may begin inside of it
            values = world.sum(window.clone()) / world.size  # the window's only read of the device
            check_finite(values, first, names, folder)
            log.write(step=step + 1, loss=values[max(0, begin - first):].mean().item(), lr=lr,
                      grad_norm=norm.item(), memory_mb=peak_memory_mb(world.device))
    seconds = time.monotonic() - began
    check_finite(world.sum(window.clone()), max_steps - max_steps % cfg.log_every, names, folder)
    check_weights(model, max_steps, folder)

    results = {"task": task.name, "model": start.name, "seed": cfg.seed, "folder": str(folder),
               "examples": len(train), "steps": max_steps, "seconds": seconds, "hashes": hashes,
               "examples_per_s": max_steps * cfg.batch_size / seconds}
    results |= assess(model, task, evals, dtype, world, folder) | {"finished": time.time()}
    if world.main:
        if cfg.save_models:
            model.save_pretrained(folder / "model", start.vocab, {
                "task": task.name, "labels": list(task.labels), "max_length": cfg.max_length},
                *start.beside[1:])
        write_json(folder / "results.json", results)
        for path in folder.glob("checkpoint.pt*"):  # three times the model, and no longer needed
            path.unlink()
    world.barrier()
    return_freed_memory()
    return results


def memory(model, sequences, train):
    """The line on parameters and memory; X-BERT's cross-modal layers count as 1.5 in each of its streams."""
    config, beside = model.encoder.config, []
    if train.clip:
        clip, count = model.encoder.clip.config, train.clip[2]
        more = math.ceil(1.5 * len(model.encoder.cross.text))
        segments = round(sequences * (count >= 0).sum(-1).mean())
        config = replace(config, layers=config.layers + more)
        beside = [(replace(clip, layers=clip.layers + more), segments, int(count.max()) + 2)]
    return memory_report(model, config, sequences, int(train.lengths.max()), logits=0.0, beside=beside)


def assess(model, task, evals, dtype, world, folder):
    """{"scores": {set: {metric: value}}, "score": the main one, "collapsed": why, or ""}; predictions go to
    folder/predictions, in the benchmark's own form."""
    scores, reasons = {}, []
    for name, examples in evals.items():
        predictions = decide(task, examples, evaluate(model, examples, dtype, world))
        scores[name], reason = measure(task, examples, predictions)
        reasons.append(reason)
        if world.main:
            file = task.outputs.get(name, f"{name}.txt")
            write_predictions(task, examples, predictions, folder / "predictions" / file)
    return {"scores": scores, "score": scores[""][task.metrics[0]], "collapsed": reasons[0]}


# ---------------------------------------------------------------------------- the runs of a task


def own_settings(cfg, task):
    """(Config of a task's runs, their number): what was left at 0 becomes the preset's or the task's own."""
    lr_small, lr, seeds_rte, seeds = PER_TASK[cfg.preset]
    lr = lr_small if task.name in ("rte", "mrpc", "stsb") else lr
    return replace(cfg, tasks=task.name, seeds=1, lr=cfg.lr or task.lr or lr,
                   max_length=cfg.max_length or task.max_length or 128, epochs=cfg.epochs or 3.0,
                   max_steps=cfg.max_steps or (0 if cfg.epochs else task.steps)
                   ), cfg.seeds or (seeds_rte if task.name == "rte" else seeds)


def run_task(cfg, task, start, data_dir, world, interrupt, seeds=None):
    """Fine-tunes `start` with each seed; returns what results.json of the task's folder holds.

    {"task", "model", "runs": results of each, "median": name of the median run's folder}. After the last
    seed the median run's model labels the test sets that are there, into its folder's submission/.
    """
    root, positions = Path(cfg.out_dir or f"out/finetune/{start.name}", task.name), positions_of(start.config)
    if cfg.max_length > positions:
        raise SystemExit(f"--max_length {cfg.max_length}: {start.name} has {positions} positions; give "
                         f"{positions} or less")
    cfg, count = own_settings(cfg, task)
    cfg = replace(cfg, max_length=min(cfg.max_length, positions))
    seeds = seeds or range(cfg.seed, cfg.seed + count)
    train_file, eval_files = find_file(task, data_dir, task.train), evaluation_files(task, data_dir)
    hashes = {"weights": start.hash, "vocabulary": start.vocab.hash, "train": content_hash(train_file)}
    hashes |= {name or "dev": content_hash(path) for name, path in eval_files.items()}

    def load(path, split, **drawn):
        return load_examples(task, path, start.vocab, cfg.max_length, "out/tokens", split,
                             beside=start.beside, **drawn)

    for turn in (True, False):  # the other ranks find the tokens that the first one has cached
        if world.main == turn:
            evals = {name: load(path, "dev") for name, path in eval_files.items()}
            train = load(train_file, "train", limit=cfg.limit, seed=seeds[0])
        world.barrier()
    check_examples(task, start, train, evals, cfg)
    runs = []
    for seed in seeds:
        if cfg.limit and runs:
            train = load(train_file, "train", limit=cfg.limit, seed=seed)
        runs.append(finetune(replace(cfg, seed=seed), task, start, train, evals, hashes, root / f"s{seed}",
                             world, interrupt))
        print0(run_line(task, runs[-1]))
    best = root / f"s{seeds[middle(task.metrics[0], [run['score'] for run in runs])]}"
    summary = {"task": task.name, "model": start.name, "median": best.name, "runs": runs}
    if world.main:
        write_json(root / "results.json", summary)
    tests = {best / "submission" / task.outputs[name]: path
             for name, path in test_files(task, data_dir).items()}
    left = {out: path for out, path in tests.items() if cfg.eval_only or not out.exists()}
    world.barrier()  # every rank has looked before the first file is written
    if left and not (best / "model").exists():
        print0(f"{best}: no model to label the test set with; leave --save_models on for that")
    elif left:
        model = TaskModel.from_pretrained(best / "model")[0].to(world.device)
        for out, path in left.items():
            examples = load(path, "test")
            predictions = decide(task, examples, evaluate(model, examples, getattr(torch, cfg.dtype), world))
            if world.main:
                write_predictions(task, examples, predictions, out)
    return summary


def content_hash(path):
    """SHA-256 of a task's file, and of the file of its labels where that is another (PIQA)."""
    digest = hashlib.sha256(path.read_bytes())
    labels = path.with_name(f"{path.stem}-labels.lst")
    if labels.exists():
        digest.update(labels.read_bytes())
    return digest.hexdigest()


def middle(metric, values):
    """Index of the median value of a metric; of an even number the worse of the middle two."""
    return median_run([-value for value in values] if metric == "rmse" else values)


def check_examples(task, start, train, evals, cfg):
    """Says what a task is trained on; one line where the model's vocabulary cannot be that of the texts."""
    if train.unknown > UNKNOWN:
        flag = "--cross" if start.beside else "--model"
        raise SystemExit(f"{flag} {start.name}: its vocabulary does not know {100 * train.unknown:.0f} % of "
                         f"{task.title}'s tokens; choose a model for these texts")
    skipped = sum(examples.skipped for examples in (train, *evals.values()))
    notes = [f"{train.truncated:,} cut to {cfg.max_length} tokens" if train.truncated else "",
             f"{train.clip_truncated:,} cut to twice {start.beside[0].positions} of CLIP's tokens a sentence"
             if train.clip_truncated else "",
             f"{skipped:,} without gold label left out" if skipped else ""]
    if task.kind == "span":
        notes += [f"{train.moved:,} answers not at their answer_start",
                  f"{train.missing:,} not in their context, left out"]
    print0(f"{task.title}: {len(train):,} training {'windows' if task.kind == 'span' else 'examples'}, "
           + ", ".join(f"{len(examples):,} {name or 'to evaluate on'}" for name, examples in evals.items())
           + "".join(f", {note}" for note in notes if note))


def shown(scores):
    """{metric: text} of what tables show: no counts and no thresholds."""
    return {metric: f"{value:.{3 if metric == 'rmse' else 1}f}" for metric, value in scores.items()
            if not metric.endswith(("total", "thresh"))}


def run_line(task, run):
    """One line on a run: every score, and whether it collapsed."""
    sets = [(f"{name}: " if name else "") + ", ".join(map(" ".join, shown(scores).items()))
            for name, scores in run["scores"].items()]
    collapsed = f"  COLLAPSED: {run['collapsed']}" if run["collapsed"] else ""
    return f"{task.title} s{run['seed']}  {'; '.join(sets)}  ({duration(run['seconds'])}){collapsed}"


def results_table(summaries):
    """Text of a table: each metric of each task, its median and its runs; a star marks collapsed runs."""
    rows, averaged, notes = [["", "median", "runs"]], [], []
    for summary in summaries:
        task, runs = TASKS[summary["task"]], summary["runs"]
        notes += [f"* {task.title} s{run['seed']} collapsed: {run['collapsed']}"
                  for run in runs if run["collapsed"]]
        for name, scores in runs[0]["scores"].items():
            for metric in shown(scores):
                texts = [shown(run["scores"][name])[metric] for run in runs]
                values = [run["scores"][name][metric] for run in runs]
                median = middle(metric, values)
                rows.append([" ".join(filter(None, (task.title, name, metric))), texts[median],
                             " ".join(text + "*" * bool(run["collapsed"]) for text, run in zip(texts, runs))])
                if not name and metric == task.metrics[0] != "rmse":
                    averaged.append(values[median])
    if len(averaged) > 1:
        rows.append([f"average of {len(averaged)} tasks", f"{np.mean(averaged):.1f}", ""])
    return "\n".join([aligned(rows), *notes])


# ---------------------------------------------------------------------------- the demo world's table


def newest_student(cfg, vocab):
    """distill.Config of the student of `vocab` that was distilled last; the default where there is none.

    Students with a --teacher of their own are passed over: the other seeds' worlds have no such teacher.
    """
    found = {}
    for path in Path("out").glob("*/results.json"):
        with suppress(OSError, ValueError, KeyError):  # no distillation, or not a finished one
            results = json.loads(path.read_text())
            flags = json.loads(path.with_name("config.json").read_text())["config"]
            if results["objective"] == "none" or results["vocabulary"] != vocab.hash:
                continue
            if not flags["teacher"]:
                found[results["finished"]] = path.parent, flags
            elif "-image-" not in path.parent.name:
                print0(f"passed over {path.parent}: its --teacher belongs to its own world alone")
    if not found:
        print0("no distilled student of this world yet: the default one will be made")
        return distill.Config(seed=cfg.seed)
    folder, flags = found[max(found)]
    print0(f"newest student: {folder}")
    known = distill.Config.__dataclass_fields__
    return distill.Config(**{name: value for name, value in flags.items() if name in known}
                          | {"out_dir": str(folder)})


def demo_start(row, newest, cfg, seed, demo):
    """Start of a row of the demo's table in the world of `seed`; a missing student is made."""
    if row == "no pre-training":
        vocab = data.load_vocab(demo / "corpus.h5")
        return fresh_start(demo.name, model_config(newest.model, vocab.size, newest.layers, newest.hidden,
                                                   newest.heads, newest.intermediate, newest.dropout), vocab)
    own = newest.out_dir if seed == newest.seed else ""
    run = replace(newest, seed=seed, data_dir=cfg.data_dir, device=cfg.device, out_dir=own, resume=False,
                  eval_only=False, max_minutes=0.0)
    if row == "text-only":
        run = distill.text_only_run(run, f"out/distill-none-s{seed}")
    elif row == "distilled from images":
        seeing = f"out/teacher-image-s{seed}"
        teacher.main(teacher.Config(vision="image", seed=seed, data_dir=cfg.data_dir, device=cfg.device,
                                    block_size=run.block_size, out_dir=seeing), reuse=True)
        run = replace(run, teacher=seeing, out_dir=f"out/distill-{run.objective}-image-s{seed}")
    return open_start(distill.main(run, reuse=True)["folder"], demo=demo)


def demo_table(cfg, tasks, world, interrupt):
    """Fine-tunes what the demo compares; each seed is a world with teachers and students of its own.

    No pre-training, the text-only and the distilled student, and one distilled from a teacher that saw the
    middle frame alone.
    """
    rows = {"no pre-training": {}, "text-only": {}, "distilled": {}, "distilled from images": {}}
    seeds = range(cfg.seed, cfg.seed + (cfg.seeds or PER_TASK[cfg.preset][3]))
    first = data.demo_world(cfg.data_dir, cfg.seed, world)
    newest = newest_student(cfg, data.load_vocab(first / "corpus.h5"))
    for row, runs in rows.items():
        for seed in seeds:
            demo = data.demo_world(cfg.data_dir, seed, world)
            start = demo_start(row, newest, cfg, seed, demo)
            one = replace(cfg, out_dir=str(Path(cfg.out_dir or "out/finetune", start.name)))
            for task in tasks:
                summary = run_task(one, task, start, demo / "raw" / "tasks", world, interrupt, [seed])
                runs.setdefault(task.name, []).extend(summary["runs"])
        if row == "distilled":
            print0(f"\n{compared(rows, tasks, len(seeds))}\n")
    print0(f"\n{compared(rows, tasks, len(seeds))}\n")
    if world.main:
        write_json(Path(cfg.out_dir or "out/finetune", "demo.json"), rows)
    return rows


def compared(rows, tasks, seeds):
    """Text of the demo's table: accuracy on held-out / seen nouns, medians over the seeds."""
    lines = [[f"median of {seeds}: held-out / seen", *(task.title for task in tasks), "average"]]
    for row, runs in rows.items():
        if runs:
            cells = [[sorted(run["scores"][name]["accuracy"] for run in runs[task.name])[(seeds - 1) // 2]
                      for task in tasks] for name in ("", "seen")]  # (2, tasks)
            lines.append([row, *(f"{held:.1f} / {seen:.1f}" for held, seen in
                                 zip(*([*x, np.mean(x)] for x in cells)))])
    chance = [100 / len(task.words) for task in tasks]
    lines.append(["chance", *(f"{x:.1f}" for x in [*chance, np.mean(chance)])])
    return aligned(lines)


# ---------------------------------------------------------------------------- labels for standard input


def label_lines(cfg, world):
    """Prints label and probability of each line of standard input, in order: the other side of --predict.

    Texts of a pair are separated by a tab, as are a context and its candidates. A span's probability is
    that it beats "no answer".
    """
    if world.size > 1:
        raise SystemExit("--predict reads one standard input: start it without torchrun")
    folder = model_folder(median_run_of(cfg.model), "--model")
    model, settings = TaskModel.from_pretrained(folder)
    model.to(world.device)
    config, vocab = config_and_vocab(folder)
    beside = config_and_vocab(folder / "clip") if isinstance(model.encoder, XDBERT) else ()
    length = min(cfg.max_length or settings["max_length"], positions_of(config))
    task, number = TASKS.get(settings["task"]), 1
    ahead = 1 if sys.stdin.isatty() else 64  # lines in a batch; somebody who types sees each answer
    try:
        while lines := list(islice(sys.stdin, ahead)):
            if task is None:  # fine-tuned elsewhere
                pair = settings["kind"] in ("span", "choice") or "\t" in lines[0]
                texts = ("text", "second text")[:1 + pair]
                task = Task("", folder.name, settings["kind"], "", texts, None, "")
            rows = read_lines(task, lines, number)
            examples = tokenized(task, rows, vocab, length, beside=beside)
            logits = evaluate(model, examples, getattr(torch, cfg.dtype), world)
            if task.kind == "span":
                texts, null = decide(task, examples, logits)
                found = [(text, 1 / (1 + math.exp(min(700, null[key])))) for key, text in texts.items()]
            elif task.kind == "regress":
                found = [(f"{value:.4f}",) for value in logits.tolist()]
            else:
                best, index = logits.softmax(1).max(1)
                words = settings["labels"] or range(logits.shape[1])
                found = [(str(words[i]), p) for i, p in zip(index.tolist(), best.tolist())]
            for label, *p in found:
                print("\t".join([label, *(f"{x:.4f}" for x in p)]), flush=True)
            number += len(lines)
    except UnicodeDecodeError:
        raise SystemExit("standard input: not UTF-8; convert it first, for instance with `iconv`") from None
    if number == 1:
        raise SystemExit("standard input: holds no line; give a text in each")


def main(cfg):
    """Fine-tunes, or does what else the flags ask for; returns the tasks' summaries or the demo's rows."""
    if cfg.score:
        return score(cfg.score, cfg.gold, cfg.no_answer)
    world = init_world(cfg.device)
    if cfg.predict:
        return label_lines(cfg, world)
    chosen = {name.strip() for name in cfg.tasks.split(",") if name.strip()} or set(DEMO_TASKS)
    if unknown := chosen - set(TASKS):
        raise SystemExit(f"--tasks {min(unknown)}: choose from {', '.join(TASKS)}")
    given = cfg.cross or cfg.model
    if not given and not chosen <= set(DEMO_TASKS):
        raise SystemExit("--model is missing: give a run's folder, a Hugging Face folder, or none")
    tasks = [task for name, task in TASKS.items() if name in chosen]
    interrupt = Interrupt(cfg.max_minutes)
    try:
        if not given:
            return demo_table(cfg, tasks, world, interrupt)
        demo = data.demo_world(cfg.data_dir, cfg.seed, world) if chosen & set(DEMO_TASKS) else None
        start = open_start(given, cfg.like, demo, "--cross" if cfg.cross else "--model")
        start.check(tasks)
        summaries = []
        for task in tasks:
            folder = demo / "raw" / "tasks" if task.name in DEMO_TASKS else cfg.data_dir
            summaries.append(run_task(cfg, task, start, folder, world, interrupt))
    finally:
        interrupt.release()
    print0(f"\n{start.name}\n{results_table(summaries)}\n")
    return summaries


if __name__ == "__main__":
    run_script(main, Config, PRESETS)
