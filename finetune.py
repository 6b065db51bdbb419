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
import hashlib
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from common import Switch, check_fields, duration, peek_json, print0, progress, table, write_json
from data import open_vocab
from model import BERT, XDBERT, BERTConfig, CLIPConfig, TaskModel, model_config, param_groups, recompute
from parts.examples import Order, batches_by_length, decide, load_examples, tokenized
from parts.machine import init_ranks, memory_report, move, return_freed_memory
from parts.metrics import median_run
from parts.tasks import (DEMO_TASKS, TASKS, Task, content_hash, evaluation_files, find_file, measure,
                         read_lines, score, unlabelled_files, write_predictions)
from parts.vocab import Vocab
from parts.weights import (config_and_vocab, load_bert, load_clip, load_config, load_task_model, load_xdbert,
                           save_task_model)
from run import FORMAT, Run, file_hash, lr_at, micro_batch_size, model_folder, run_script, set_seed, steps_of


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
    warmup_steps: float = 0.1  # linear warm-up; below 1 = a share of the steps
    epochs: float = 0.0  # passes over the training set; 0 = the task's own (real tasks: 3)
    max_steps: int = 0  # steps instead of epochs
    # runs
    seeds: int = 0  # runs of each task, from --seed on; 0 = the preset's, see PER_TASK
    seed: int = 0  # of head, order and dropout, and of the demo world
    # system
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    grad_checkpoint: bool = False  # recompute the layers' activations in backward: less memory, slower
    out_dir: str = ""  # where <task>/s<seed> go; empty = out/finetune/<model>
    save_models: bool = True  # leave model/ in each run; false saves disk
    resume: Switch = "auto"  # keep finished runs and go on with killed ones; false = anew, true = go on
    eval_only: bool = False  # evaluate the finished runs' models again
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    log_every: int = 50  # steps a log line
    save_every: int = 500  # steps between checkpoints; 0 = by save_minutes alone
    save_minutes: float = 0.0  # minutes between checkpoints; 0 = by save_every alone
    # other jobs
    predict: bool = False  # label lines of standard input with the fine-tuned --model
    score: str = ""  # a SQuAD predictions.json to score
    gold: str = ""  # the SQuAD file to score it against
    no_answer: str = ""  # null_odds.json, for 2.0's best thresholds; then --score the answers.json beside it

    def __post_init__(self):
        check_fields(self, {"pool": ("cls", "mean")}, ())
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay:g}: above 0 and at most 1 (1 = off)")
        for name in ("limit", "max_length", "lr", "seeds"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if bool(self.score) != bool(self.gold):
            raise ValueError("--score predictions.json and --gold dev.json go together")
        if self.no_answer and not self.score:
            raise ValueError("--no_answer null_odds.json goes with --score and --gold")
        if self.predict and self.model in ("", "none"):
            raise ValueError("--predict needs --model, the folder of a fine-tuned model")
        if self.cross == "none" or self.cross and self.model:
            raise ValueError("--cross is given in place of --model: the folder of a run of adapt_xdbert.py")


# preset: (lr of RTE, MRPC and STS-B, lr of the other tasks, runs of RTE, runs of the others)
PER_TASK = {"demo": (1e-4, 1e-4, 3, 3),
            "vidlankd": (1e-4, 1e-4, 1, 1),  # VidLanKD 4.3, which tells no number of runs
            "xdbert-base": (1e-4, 2e-5, 9, 5),  # XDBERT Table 5 and C.2
            "xdbert-large": (5e-5, 1e-5, 9, 5)}
# VidLanKD's warm-up: released code; XDBERT's "decay of 0.9" (C.2) is read as layer-wise
AS_XDBERT = dict(epochs=3.0, batch_size=32, layer_decay=0.9)
PRESETS = {"demo": {},
           "vidlankd": dict(epochs=3.0, batch_size=32, weight_decay=0.01),  # VidLanKD 4.3
           "xdbert-base": AS_XDBERT, "xdbert-large": AS_XDBERT}
# flags that nothing reads but with some values of another one, see common.check_needs
NEEDS = {name: ("predict", ("False",)) for name in Config.__annotations__
         if name not in ("preset", "score", "gold", "no_answer")}
NEEDS |= dict.fromkeys(("model", "max_length", "device", "dtype", "predict"), ("score", ("",)))
NEEDS |= {"like": ("model", ("none",))}
# flags that change no result: hashes tell what the model and the data are
FREE = ("model", "cross", "like", "preset", "predict", "score", "gold", "no_answer", "save_models")
UNKNOWN = 0.3  # share of unknown tokens from which a vocabulary cannot be the texts'

# ---------------------------------------------------------------------------- order, loss and evaluation


class Objective(nn.Module):
    """The loss around a task's model, as DDP calls it: a mean over the examples of the global batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, divisor):
        """Cross-entropy; squared error for regress; the mean of start's and end's cross-entropy for span."""
        # HACK HERE: the objective
        logits, labels = self.model(**inputs(batch)), batch["labels"]
        if self.model.kind == "regress":
            loss = F.mse_loss(logits, labels, reduction="sum")
        elif self.model.kind == "span":  # logits (B, T, 2), labels (B, 2)
            logits = logits.masked_fill(~batch["mask"][..., None], -math.inf)
            loss = F.cross_entropy(logits, labels, reduction="sum") / 2
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss / divisor["loss"]}


def inputs(batch):
    """What of a batch the model reads."""
    return {name: x for name, x in batch.items() if name != "labels"}


@torch.no_grad()
def evaluate(model, examples, dtype, ranks):
    """Logits of every example, float32 (n, ...), in the file's order, alike on all ranks; -inf at padding.

    Batches are shared out whole, so that any number of ranks computes what one process does, bit for bit.
    """
    training = model.training
    shape = {"classify": (model.classifier.out_features,), "regress": (), "choice": examples.length.shape[1:],
             "span": (int(examples.lengths.max()), 2)}
    logits = torch.zeros(len(examples), *shape[model.kind])
    parts = list(batches_by_length(examples))[ranks.rank::ranks.size]
    model.eval()
    for index in progress(parts, len(parts), " batches", "evaluate", leave=False):
        batch = move(examples.batch(index), ranks.device)
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            part = model(**inputs(batch))
        index = torch.from_numpy(index)
        if model.kind == "span":
            part = part.masked_fill(~batch["mask"][..., None], -math.inf)
            logits[index] = -math.inf
            logits[index, :part.shape[1]] = part.cpu()
        else:
            logits[index] = part.cpu()
    model.train(training)
    return ranks.sum(logits)


# ---------------------------------------------------------------------------- what a run starts from


@dataclass(frozen=True)
class Start:
    """The encoder that runs start from: that of `folder`, or without one fresh weights of shape `config`."""
    name: str  # below out/finetune
    folder: Path  # or None
    config: BERTConfig  # or CLIPConfig, for CLIP's text tower alone
    vocab: Vocab  # or CLIPVocab
    hash: str  # of shapes and weights, or of shape and vocabulary
    beside: tuple = ()  # X-BERT: (CLIPConfig, vocabulary) of the tower beside the language encoder

    def encoder(self, cfg, pooler):
        """The encoder with the flags' dropout; what is not loaded is drawn from torch's generator."""
        dropout = self.config.dropout if cfg.dropout < 0 else cfg.dropout
        if self.beside:
            return load_xdbert(self.folder, dropout)
        if isinstance(self.config, CLIPConfig):
            return load_clip(self.folder, dropout)
        if self.folder:
            return load_bert(self.folder, pooler, dropout)
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
    vocab = open_vocab(demo / "corpus.h5") if demo else None
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
                                     "adapt_xdbert.py without --no_clip or --cross_layers 0, or give this as "
                                     "--model")
            name, beside = f"{name}-cross", config_and_vocab(folder / "clip")
            read += [beside[0], file_hash(folder / "clip"), file_hash(folder / "cross.safetensors"),
                     beside[1].hash]
        weights = hashlib.sha256(" ".join(map(str, read)).encode()).hexdigest()
        return Start(name, folder, config, own, weights, beside)
    if like:
        folder = model_folder(like, "--like")
        load_config(folder)  # refuses CLIP's
        return fresh_start(run_name(folder), *config_and_vocab(folder, weights=False))
    if demo:
        return fresh_start(demo.name, model_config("demo", vocab.size), vocab)
    raise SystemExit("--model none needs --like FOLDER, whose config.json and vocab.txt are taken")


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
    median = peek_json(Path(path) / "results.json").get("median")
    return Path(path) / median if isinstance(median, str) else Path(path)


# ---------------------------------------------------------------------------- one run


def step_batches(examples, order, cfg, ranks, step):
    """(samples of the step's global batch, this rank's micro-batches): a pure function of the step."""
    index = order(step)
    parts = (data.micro_rows(cfg.batch_size, ranks.rank, ranks.size, micro, cfg.grad_accum)
             for micro in range(cfg.grad_accum))
    return index, [examples.batch(index[rows]) for rows in parts]  # HACK HERE: the batch


def fine_tune(cfg, task, start, train, evals, hashes, folder, ranks):
    """Fine-tunes `start` once and evaluates; returns what results.json of the run's folder holds.

    A finished run is kept; where the evaluation sets have changed, or with --eval_only, its model is
    evaluated again. cfg: of own_settings; train: Examples; evals: {set: Examples}; hashes: of the weights
    and of each file.
    """
    dtype, micro_size = getattr(torch, cfg.dtype), micro_batch_size(cfg, ranks)
    trained_on = {what: hashes[what] for what in ("weights", "vocabulary", "train")}
    run = Run(replace(cfg, eval_only=False), folder, ranks, trained_on, free=FREE)
    kept = run.finished() if cfg.resume == "auto" or cfg.eval_only else None
    has_model = (folder / "model").exists()
    if kept:
        drop_checkpoints(folder, ranks)  # of a process that was killed just before
    if kept and kept["hashes"] == hashes and not cfg.eval_only and (has_model or not cfg.save_models):
        print0(f"reused {folder}")
        return kept
    if kept and has_model:
        model = load_task_model(folder / "model")[0].to(ranks.device)
        kept |= assess(model, task, evals, dtype, ranks, folder) | {"hashes": hashes}
        if ranks.main:
            write_json(folder / "results.json", kept)
        return kept
    if cfg.eval_only:
        raise SystemExit(f"--eval_only: {folder} holds no finished run with its model, of these flags and "
                         "this training set; leave --eval_only out to make it")
    max_steps, warmup_steps = steps_of(cfg, len(train))

    # ---- models
    set_seed(cfg.seed, 0)
    encoder = start.encoder(cfg, pooler=task.kind != "span" and cfg.pool == "cls")
    model = TaskModel(encoder, task.kind, len(task.labels), cfg.pool).to(ranks.device)
    if cfg.grad_checkpoint:
        recompute(model)
    if not task.demo:
        print0(memory(model, micro_size * train.length[0].size, train, cfg.grad_checkpoint))
    if cfg.freeze:
        model.freeze_encoder()
    names, weights = ["loss"], {"loss": 1.0}

    # ---- optimizer
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay, cfg.layer_decay), lr=cfg.lr,
                                  betas=(0.9, cfg.beta2), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    # ---- resume
    step = run.restore(max_steps, model=model, optimizer=optimizer, scaler=scaler)
    if run.resumes:
        print0(f"{folder}: goes on from step {step}")
    run.begin(names, "examples", cfg.batch_size, bar=f"{task.name} s{cfg.seed}")
    objective, order = Objective(model), Order(train.lengths, cfg.batch_size, max_steps, cfg.seed)
    ddp = DistributedDataParallel(objective) if ranks.size > 1 else objective
    model.train()
    run.feed(partial(step_batches, train, order, cfg, ranks))

    # ==== training loop ====
    while True:
        last = step >= max_steps
        run.save_due(step, last)
        if last:
            break

        # the step's micro-batches; the divisor: the global batch / ranks, as DDP averages gradients
        batches, divisor = run.take(step)[1], {"loss": cfg.batch_size / ranks.size}
        lr = lr_at(step, cfg.lr, warmup_steps, max_steps)  # HACK HERE: the schedule

        # ---- optimizer step: these lines are the same in every script (tests/test_house.py) ----
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        for micro, batch in enumerate(batches):
            if ranks.size > 1:  # gradients travel once a step
                ddp.require_backward_grad_sync = micro == cfg.grad_accum - 1
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                terms = ddp(batch, divisor)
            loss = sum(weights[name] * terms[name] for name in names)
            scaler.scale(loss).backward()
            run.add(step, terms)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(ddp.parameters(), cfg.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        run.tick(step, lr, norm)
        # ---- end of the optimizer step ----

    # ---- finish
    seconds = run.leave_loop()
    results = {"task": task.name, "model": start.name, "seed": cfg.seed, "examples": len(train),
               "steps": max_steps, "seconds": seconds, "hashes": hashes,
               "examples_per_s": max_steps * cfg.batch_size / seconds}
    results |= assess(model, task, evals, dtype, ranks, folder)
    if ranks.main and cfg.save_models:
        save_task_model(model, folder / "model", start.vocab, {
            "task": task.name, "labels": list(task.labels), "max_length": cfg.max_length}, *start.beside[1:])
    results = run.finish(results)
    drop_checkpoints(folder, ranks)
    return_freed_memory()
    return results


def drop_checkpoints(folder, ranks):
    """Removes what a finished run no longer needs: three times the model."""
    if ranks.main:
        for path in folder.glob("checkpoint.pt*"):
            path.unlink()


def memory(model, sequences, train, anew=False):
    """The line on parameters and memory; X-BERT's cross-modal layers count as 1.5 in each of its streams."""
    config, beside = model.encoder.config, []
    if train.clip:
        clip, count = model.encoder.clip.config, train.clip[2]
        more = math.ceil(1.5 * len(model.encoder.cross.text))
        segments = round(sequences * (count >= 0).sum(-1).mean())
        config = replace(config, layers=config.layers + more)
        beside = [(replace(clip, layers=clip.layers + more), segments, int(count.max()) + 2)]
    return memory_report(model, config, sequences, int(train.lengths.max()), 0.0, beside, anew)


def assess(model, task, evals, dtype, ranks, folder):
    """{"scores": {set: {metric: value}}, "score": the main one, "collapsed": why, or ""}; predictions go to
    folder/predictions, in the benchmark's own form."""
    scores, reasons = {}, []
    for name, examples in evals.items():
        predictions = decide(task, examples, evaluate(model, examples, dtype, ranks))
        scores[name], reason = measure(task, examples, predictions)
        reasons.append(reason)
        if ranks.main:
            file = task.outputs.get(name, f"{name}.txt")
            write_predictions(task, examples, predictions, folder / "predictions" / file)
    return {"scores": scores, "score": scores[""][task.metrics[0]], "collapsed": reasons[0]}


# ---------------------------------------------------------------------------- the runs of a task


def own_settings(cfg, task, start):
    """(Config of a task's runs, their seeds): what was left at 0 becomes the preset's or the task's own."""
    positions = positions_of(start.config)
    if cfg.max_length > positions:
        raise SystemExit(f"--max_length {cfg.max_length}: {start.name} has {positions} positions; give "
                         f"{positions} or less")
    lr_small, lr, seeds_rte, seeds = PER_TASK[cfg.preset]
    lr = lr_small if task.name in ("rte", "mrpc", "stsb") else lr
    seeds = cfg.seeds or (seeds_rte if task.name == "rte" else seeds)
    return replace(cfg, tasks=task.name, seeds=1, lr=cfg.lr or task.lr or lr,
                   max_length=min(positions, cfg.max_length or task.max_length or 128),
                   epochs=cfg.epochs or 3.0, max_steps=cfg.max_steps or (0 if cfg.epochs else task.steps)
                   ), range(cfg.seed, cfg.seed + seeds)


def open_files(cfg, task, start, folder, ranks):
    """(function that loads Examples, training file, Examples to train on, {set: Examples} to evaluate on,
    hashes) of a task."""
    train_file, eval_files = find_file(task, folder, task.train), evaluation_files(task, folder)
    hashes = {"weights": start.hash, "vocabulary": start.vocab.hash, "train": content_hash(train_file)}
    hashes |= {name or "dev": content_hash(path) for name, path in eval_files.items()}

    def load(path, split, **drawn):
        return load_examples(task, path, start.vocab, cfg.max_length, "out/tokens", split,
                             beside=start.beside, **drawn)

    for turn in (True, False):  # the other ranks find the tokens that the first one has cached
        if ranks.main == turn:
            evals = {name: load(path, "dev") for name, path in eval_files.items()}
            train = load(train_file, "train", limit=cfg.limit, seed=cfg.seed)
        ranks.barrier()
    return load, train_file, train, evals, hashes


def label_test_sets(cfg, task, folder, data_dir, load, ranks):
    """The median run's model labels the unlabelled sets that are there, into `folder`/submission."""
    sets = {folder / "submission" / task.outputs[name]: path
            for name, path in unlabelled_files(task, data_dir).items()}
    left = {out: path for out, path in sets.items() if cfg.eval_only or not out.exists()}
    ranks.barrier()  # every rank has looked before the first file is written
    if left and not (folder / "model").exists():
        print0(f"{folder}: no model to label the test set with; leave --save_models on for that")
    elif left:
        model = load_task_model(folder / "model")[0].to(ranks.device)
        for out, path in left.items():
            examples = load(path, "test")
            predictions = decide(task, examples, evaluate(model, examples, getattr(torch, cfg.dtype), ranks))
            if ranks.main:
                write_predictions(task, examples, predictions, out)


def middle(metric, values):
    """Index of the median value of a metric; of an even number the worse of the middle two."""
    values = np.asarray(values, float)  # None, which stands for NaN in results.json, becomes that
    return median_run(-values if metric == "rmse" else values)


def check_examples(task, start, train, evals, cfg):
    """Says what a task is trained on; one line where the model's vocabulary cannot be that of the texts."""
    if train.unknown > UNKNOWN:
        flag = "--cross" if start.beside else "--model"
        raise SystemExit(f"{flag} {start.name}: its vocabulary does not know {100 * train.unknown:.0f} % of "
                         f"{task.title}'s tokens; choose a model for these texts")
    skipped, short = (sum(getattr(examples, name) for examples in (train, *evals.values()))
                      for name in ("skipped", "short"))
    notes = [f"{train.truncated:,} cut to {cfg.max_length} tokens" if train.truncated else "",
             f"{train.clip_truncated:,} cut to twice {start.beside[0].positions} of CLIP's tokens a sentence"
             if train.clip_truncated else "",
             f"{skipped:,} without gold label left out" if skipped else "",
             f"{short:,} rows that lack columns left out" if short else "",
             *(f"evaluated on {Path(examples.source).name}" for examples in evals.values()
               if Path(examples.source).name in task.instead.values())]
    if task.kind == "span":
        notes += [f"{train.moved:,} answers not at their answer_start",
                  f"{train.missing:,} not in their context, left out"]
    print0(f"{task.title}: {len(train):,} training {'windows' if task.kind == 'span' else 'examples'}, "
           + ", ".join(f"{len(examples):,} {name or 'to evaluate on'}" for name, examples in evals.items())
           + "".join(f", {note}" for note in notes if note))


def shown(scores):
    """{metric: text} of what tables show: no counts and no thresholds. None: NaN, as results.json has it."""
    return {metric: f"{math.nan if value is None else value:.{3 if metric == 'rmse' else 1}f}"
            for metric, value in scores.items()
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
    return "\n".join([table(rows), *notes])


# ---------------------------------------------------------------------------- labels for standard input


def label_lines(cfg, ranks):
    """Prints label and probability of each line of standard input, in order: the other side of --predict.

    Texts of a pair are separated by a tab, as are a context and its candidates. A span's probability is
    that it beats "no answer".
    """
    if ranks.size > 1:
        raise SystemExit("--predict reads one standard input: start it without torchrun")
    folder = model_folder(median_run_of(cfg.model), "--model")
    model, settings = load_task_model(folder)
    model.to(ranks.device)
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
            logits = evaluate(model, examples, getattr(torch, cfg.dtype), ranks)
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


def chosen_tasks(cfg):
    """The Tasks that --tasks names, in the order of the table; the demo's where it is empty."""
    chosen = {name.strip() for name in cfg.tasks.split(",") if name.strip()} or set(DEMO_TASKS)
    if unknown := chosen - set(TASKS):
        raise SystemExit(f"--tasks {min(unknown)}: choose from {', '.join(TASKS)}")
    return [task for name, task in TASKS.items() if name in chosen]


def main(cfg):
    """Fine-tunes on each task with each seed, or does what else the flags ask for; returns the summaries of
    the tasks: {"task", "model", "runs": results of each, "median": name of the median run's folder}."""
    if cfg.score:
        return score(cfg.score, cfg.gold, cfg.no_answer)
    ranks, began = init_ranks(cfg.device, cfg.dtype), time.monotonic()
    if cfg.predict:
        return label_lines(cfg, ranks)
    tasks, summaries = chosen_tasks(cfg), []
    if not (cfg.cross or cfg.model):
        raise SystemExit("--model is missing: give a run's folder, a Hugging Face folder, or none")
    on_demo = any(task.demo for task in tasks)
    demo = Path(cfg.data_dir, f"demo-s{cfg.seed}") if on_demo else None
    start = open_start(cfg.cross or cfg.model, cfg.like, demo, "--cross" if cfg.cross else "--model")
    start.check(tasks)
    for task in tasks:
        root = Path(cfg.out_dir or f"out/finetune/{start.name}", task.name)
        data_dir = demo / "raw" / "tasks" if task.demo else cfg.data_dir
        own, seeds = own_settings(cfg, task, start)
        load, train_file, train, evals, hashes = open_files(own, task, start, data_dir, ranks)
        check_examples(task, start, train, evals, own)
        runs = []
        for seed in seeds:
            if cfg.limit and runs:
                train = load(train_file, "train", limit=cfg.limit, seed=seed)
            left = cfg.max_minutes and max(1e-9, cfg.max_minutes - (time.monotonic() - began) / 60)
            one = replace(own, seed=seed, max_minutes=left)
            runs.append(fine_tune(one, task, start, train, evals, hashes, root / f"s{seed}", ranks))
            print0(run_line(task, runs[-1]))
        best = f"s{seeds[middle(task.metrics[0], [run['score'] for run in runs])]}"
        summaries.append({"format": FORMAT, "task": task.name, "model": start.name, "median": best,
                          "runs": runs})
        if ranks.main:
            write_json(root / "results.json", summaries[-1])
        label_test_sets(own, task, root / best, data_dir, load, ranks)
    print0(f"\n{start.name}\n{results_table(summaries)}\n")
    return summaries


if __name__ == "__main__":
    from prepare import chain
    run_script(chain.finetune, Config, PRESETS, NEEDS)
