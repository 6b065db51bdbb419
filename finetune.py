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
import json
import math
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import distill
import teacher
from common import check_fields, duration, print0, progress, table, write_json
from data import open_vocab
from model import BERT, XDBERT, BERTConfig, CLIPConfig, TaskModel, memory_report, model_config, param_groups
from parts.examples import Order, batches_by_length, decide, load_examples, tokenized
from parts.metrics import median_run, score
from parts.tasks import (DEMO_TASKS, TASKS, Task, content_hash, evaluation_files, find_file, measure,
                         read_lines, unlabelled_files, write_predictions)
from parts.vocab import Vocab, load_clip_vocab, load_vocab
from parts.weights import (load_bert, load_clip, load_clip_config, load_config, load_task_model, load_xdbert,
                           model_type, save_task_model)
from prepare.world import demo_world
from run import (Interrupt, Log, check_finite, check_weights, file_hash, finished_run, init_world,
                 load_checkpoint, lr_at, micro_batch_size, model_folder, move, open_run, peak_memory_mb,
                 restore_rng, return_freed_memory, run_script, save_checkpoint, set_seed, unfinished_run)


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

# ---------------------------------------------------------------------------- order, loss and evaluation


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
                                     "adapt_xdbert.py without --no_clip, or this one as --model")
            name, beside = f"{name}-cross", config_and_vocab(folder / "clip")
            read += [beside[0], file_hash(folder / "clip"), file_hash(folder / "cross.safetensors"),
                     beside[1].hash]
        weights = hashlib.sha256(" ".join(map(str, read)).encode()).hexdigest()
        return Start(name, folder, config, own, weights, beside)
    if like:
        folder = model_folder(like, "--like")
        return fresh_start(run_name(folder), load_config(folder), load_vocab(folder))
    if demo:
        return fresh_start(demo.name, model_config("demo", vocab.size), vocab)
    raise SystemExit("--model none needs --like FOLDER, whose config.json and vocab.txt are taken")


def config_and_vocab(folder):
    """Of a Hugging Face folder: of BERT or ELECTRA, or of CLIP's text tower."""
    if model_type(folder) == "clip":
        config, vocab = load_clip_config(folder), load_clip_vocab(folder)
    else:
        config, vocab = load_config(folder), load_vocab(folder)
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
    and of each file; interrupt: the command's Interrupt.
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
        model, _ = load_task_model(folder / "model")
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
            save_task_model(model, folder / "model", start.vocab, {
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
             for name, path in unlabelled_files(task, data_dir).items()}
    left = {out: path for out, path in tests.items() if cfg.eval_only or not out.exists()}
    world.barrier()  # every rank has looked before the first file is written
    if left and not (best / "model").exists():
        print0(f"{best}: no model to label the test set with; leave --save_models on for that")
    elif left:
        model = load_task_model(best / "model")[0].to(world.device)
        for out, path in left.items():
            examples = load(path, "test")
            predictions = decide(task, examples, evaluate(model, examples, getattr(torch, cfg.dtype), world))
            if world.main:
                write_predictions(task, examples, predictions, out)
    return summary


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
    return "\n".join([table(rows), *notes])


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
        vocab = open_vocab(demo / "corpus.h5")
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
    first = demo_world(cfg.data_dir, cfg.seed, world)
    newest = newest_student(cfg, open_vocab(first / "corpus.h5"))
    for row, runs in rows.items():
        for seed in seeds:
            demo = demo_world(cfg.data_dir, seed, world)
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
    return table(lines)


# ---------------------------------------------------------------------------- labels for standard input


def label_lines(cfg, world):
    """Prints label and probability of each line of standard input, in order: the other side of --predict.

    Texts of a pair are separated by a tab, as are a context and its candidates. A span's probability is
    that it beats "no answer".
    """
    if world.size > 1:
        raise SystemExit("--predict reads one standard input: start it without torchrun")
    folder = model_folder(median_run_of(cfg.model), "--model")
    model, settings = load_task_model(folder)
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
        demo = demo_world(cfg.data_dir, cfg.seed, world) if chosen & set(DEMO_TASKS) else None
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
