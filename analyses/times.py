"""How long ablate.py's runs will take: by their operations, at the speed of those that have been timed."""
import contextlib
import glob
from pathlib import Path

import torch

import data
import finetune
from adapt_xdbert import LANGUAGE
from analyses.plan import SCRIPTS, finished
from common import peek_json
from model import model_config
from parts.machine import flops_per_token, init_ranks, peak_flops
from parts.tasks import find_file
from parts.weights import config_and_vocab
from prepare.world import TASK_SIZES
from run import model_folder

EFFICIENCY = 0.5  # of the peak, until a run of the stage has been timed


def shape_of(path, plan):
    """Config of a model's folder, of a shape of adapt_xdbert.LANGUAGE, or of a run to come."""
    if path in LANGUAGE:
        return LANGUAGE[path]
    with contextlib.suppress(SystemExit):
        return config_and_vocab(model_folder(path, "--model"), weights=False)[0]
    stage, cfg = plan.jobs.get(Path(path).name, ("student", plan.base["student"]))
    return shape_of(cfg.language, plan) if stage == "adapt" else model_config(
        cfg.model, 1000 if cfg.model == "demo" else 30_000)


def flops_of(name, plan):
    """Floating-point operations of a run of a Plan, about."""
    stage, cfg = plan.jobs[name]

    def training(shape, tokens, length, mlm=0.0):
        return 3 * tokens * flops_per_token(shape, length, mlm)
    if stage == "finetune":
        shape, total = shape_of(cfg.like or cfg.cross or cfg.model, plan), 0
        for task in finetune.chosen_tasks(cfg):
            steps = cfg.max_steps or (0 if cfg.epochs else task.steps)
            length = cfg.max_length or task.max_length or 128
            examples = steps * cfg.batch_size or (cfg.epochs or 3) * rows_of(task, cfg)
            candidates = len(task.text) - 1 if task.kind == "choice" else 1
            total += training(shape, examples * candidates * length, length)
        return cfg.seeds * total
    samples = cfg.max_steps * cfg.batch_size
    source = cfg.videos if stage == "teacher" else cfg.train
    if not samples and (Path(source).exists() or glob.glob(source)):  # the corpus tells
        samples = cfg.epochs * (len(data.VideoClips(cfg.videos, cfg.block_size, cfg.max_frames))
                                if stage == "teacher" else len(data.TextBlocks(cfg.train, cfg.block_size)))
    passes = {"teacher": 2, "student": 4 / 3, "adapt": 3}[stage]  # the language model's own is one
    shape = shape_of(cfg.language if stage == "adapt" else name, plan)
    return passes * training(shape, samples * cfg.block_size, cfg.block_size, cfg.mask_rate)


def rows_of(task, cfg):
    """Training rows of a task: of a real one the lines of its file."""
    if task.demo:
        return TASK_SIZES["train"]
    with open(find_file(task, cfg.data_dir, task.train), "rb") as f:
        rows = sum(1 for _ in f)
    return min(cfg.limit or rows, rows)


def estimates(plan, names, workers):
    """{name: seconds} of runs of a Plan, of which `workers` run at once and share the CPU's cores."""
    timed, rates = peek_json(plan.out / "times.json"), {}
    device = init_ranks(plan.base["student"].device).device
    usual = EFFICIENCY * (peak_flops(device, torch.float32) or 1e13)  # 1e13: a GPU whose speed is not known
    for stage in SCRIPTS:
        done = [name for name in timed if name in plan.jobs and plan.jobs[name][0] == stage
                and finished(*plan.jobs[name])]
        seconds = sum(timed[name] for name in done)
        rates[stage] = (sum(flops_of(name, plan) for name in done) / seconds if seconds else
                        usual / (workers if device.type == "cpu" else 1))
    return {name: flops_of(name, plan) / rates[plan.jobs[name][0]] for name in names}
