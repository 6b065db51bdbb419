"""The papers' jobs in numbers: the tables of docs/scale.md, by arithmetic, and by what bench.py measured.

    python bench.py --only feed,gpu --device cuda --batch 256 --json bench.json
    python -m benches.jobs bench.json       # without a file: with the numbers of docs/speed.md alone

A job's time is its floating-point operations over those of a GPU; only matrix products count, as in MFU.
"""
import math
import sys
from types import SimpleNamespace

import torch

import adapt_xdbert
import distill
import teacher
from common import one_line_end, print0, read_json, table
from losses import CRDBank
from model import BERT, TaskModel, model_config
from parts.machine import flops_per_token

PEAK = 989e12  # FLOP/s of an H100 or H200, dense, bf16
MEASURED = 91_016.5  # tokens/s of docs/speed.md's step: 12L-768H, batch 32 x 128, bf16, nst+crd, one H100
AIM = 0.4  # MFU that good code reaches
SHAPES = ("12L-768H", "6L-512H")
V, MASKED, T = 30522, 0.15, 128
# HowTo100M (Miech et al. 2019): videos and minutes of one; VidLanKD 4.2: features a second, 2D and 3D
VIDEOS, CLIPS, SECONDS, CHANNELS = 1_220_000, 136_000_000, 6.5 * 60, 4096
FRAMES = 130  # of a sample of 128 tokens: captions without stop words, so about a token a second
WIKIPEDIA, WIKI103 = 2.9e9, 111e6  # tokens (VidLanKD 4.1, after Tan and Bansal 2020)
# examples of the training sets of VidLanKD's Table 2, and tokens of one at most (SWAG: four endings)
TASKS = {"sst2": (67_349, 128), "qnli": (104_743, 128), "qqp": (363_846, 128), "mnli": (392_702, 128),
         "squad1": (87_599, 384), "squad2": (130_319, 384), "swag": (73_546, 4 * 128)}
LINKS = {"NVLink": 450e9, "400 Gb/s a GPU": 50e9, "100 Gb/s a node": 12.5e9}  # bytes/s, one way
DISKS = {"NVMe, 2 GB/s": 2e9, "network, 200 MB/s": 2e8}
USES = ("feed.frames_mb_per_s", "feed.text_mtokens_per_s", "gpu.12L-768H.mfu")  # of bench.py's file
USED = 7 / 9  # segments of CLIP's in use: 512 words of plain text take 7, see bench.py


def student(shape):
    """(Config, model's configuration) of a student of the paper preset."""
    preset = "paper" if shape == "12L-768H" else "paper-6l"
    return distill.Config(**distill.PRESETS[preset], objective="nst+crd"), model_config(shape, V)


def student_flops(shape):
    """FLOPs of a sequence of distillation from a teacher of the same shape."""
    cfg, config = student(shape)
    like = SimpleNamespace(paired=False, bert=SimpleNamespace(config=config))
    return distill.flops_of(cfg, config, like, None) / cfg.batch_size


def teacher_flops(shape):
    """FLOPs of a sample of teacher.py, mlm+ct: text and frames, forward and backward."""
    config = model_config(shape, V)
    frame = flops_per_token(config, FRAMES) + 2 * CHANNELS * config.hidden
    return 3 * (T * flops_per_token(config, T, MASKED) + FRAMES * frame)


def adapter():
    """(Config, model whose parameters take no memory) of XDBERT's paper preset."""
    cfg = adapt_xdbert.Config(**adapt_xdbert.PRESETS["paper"], language="bert-base", clip="random")
    return cfg, adapt_xdbert.empty_model(cfg)


def jobs():
    """[(name, samples, tokens of one, bytes of data, FLOPs of a sample)]."""
    paper, _ = student("12L-768H")
    pupil, (cfg, model) = teacher.Config(**teacher.PRESETS["paper"]), adapter()
    clip = VIDEOS * SECONDS * CHANNELS * 2  # bytes
    texts, length = 800 * cfg.batch_size, cfg.block_size  # XDBERT C.1: steps of an epoch
    tuned = [(n * 3, length, n * 3 * length * 3 * flops_per_token(model_config("12L-768H", V), length))
             for n, length in TASKS.values()]
    examples, words = sum(n for n, *_ in tuned), sum(n * length for n, length, _ in tuned)
    seen = pupil.max_steps * pupil.batch_size
    shown = [(f"teacher {shape}, HowTo100M", seen, T, clip, teacher_flops(shape)) for shape in SHAPES]
    return [*shown,
            ("student 12L-768H, Wikipedia", paper.max_steps * paper.batch_size, T, 2 * WIKIPEDIA,
             student_flops("12L-768H")),
            ("student 6L-512H, Wiki103 x 40", 40 * WIKI103 / (T - 2), T, 2 * WIKI103,
             student_flops("6L-512H")),
            ("XDBERT, base and ViT-B/32", texts, length, 2 * texts * (length + USED * 9 * 75),
             adapt_xdbert.flops_of(model, cfg, 77, USED)),
            ("fine-tuning, 7 tasks x 3 epochs", examples, words / examples, 2 * words / 3,
             sum(f for *_, f in tuned) / examples)]


def si(x, unit=""):
    """Three digits with a prefix: 3.81 TB."""
    power = max(0, min(4, int(math.log10(max(x, 1)) // 3)))
    return f"{x / 1000 ** power:.3g} {('', 'k', 'M', 'G', 'T')[power]}{unit}".strip()


def job_table(mfu):
    """Tokens, bytes and GPU hours of the jobs, at MFU `mfu` and at AIM."""
    rows = [["", "samples", "tokens", "data", "EFLOP", f"GPU hours at {100 * mfu:.0f} %",
             f"at {100 * AIM:.0f} %"]]
    for name, samples, length, size, flops in jobs():
        hours = samples * flops / PEAK / 3600
        rows.append([name, si(samples), si(samples * length), si(size, "B"), f"{samples * flops / 1e18:,.3g}",
                     f"{hours / mfu:,.1f}", f"{hours / AIM:,.1f}"])
    return table(rows)


def rate_table(found):
    """What a rank of a job eats at AIM: batches of the CPU, bytes of its disk; and what bench.py reached."""
    rows = [["a rank, at 40 %", "samples/s", "tokens/s", "from disk", "bench.py's CPU made"]]
    for name, _, length, _, flops in jobs():
        rate = AIM * PEAK / flops
        if name.startswith("teacher"):
            size, made = rate * FRAMES * CHANNELS * 2, found.get("feed.frames_mb_per_s")
            made = made and si(1e6 * made, "B/s")
        else:
            size, made = 2 * rate * length, found.get("feed.text_mtokens_per_s")
            made = made and name.startswith("student") and f"{si(1e6 * made)} tokens/s"
        rows.append([name, si(rate), si(rate * length), si(size, "B/s"), made or "-"])
    return table(rows)


def parts():
    """{model: (trained parameters, all of them, bytes of its bank)}, without making weights."""
    found = {}
    with torch.device("meta"):
        for shape, text in zip(SHAPES, (WIKIPEDIA, WIKI103)):
            cfg, config = student(shape)
            rows = min(cfg.crd_bank_size, int(text // (T - 2)))  # one for a block
            found[f"student {shape}, nst+crd"] = (distill.Distiller(
                cfg, config, SimpleNamespace(width=config.hidden), None),
                CRDBank.nbytes(rows, cfg.crd_dim, getattr(torch, cfg.crd_bank_dtype)))
            found[f"teacher {shape}"] = teacher.Teacher(
                teacher.Config(**teacher.PRESETS["paper"], objective="mlm+ct"), config, CHANNELS), 0
        found["XDBERT, base and ViT-B/32"] = adapter()[1], 0
        bert = BERT(model_config("12L-768H", V), pooler=True)
        found["fine-tuning 12L-768H"] = TaskModel(bert, "classify", 2), 0
    return {name: (sum(p.numel() for p in model.parameters() if p.requires_grad),
                   sum(p.numel() for p in model.parameters()), bank) for name, (model, bank) in found.items()}


def memory_table():
    """Bytes of weights, AdamW's moments and bank on a rank, of a checkpoint, and seconds to write it."""
    rows = [["", "parameters", "weights, gradients, AdamW", "bank", "checkpoint", *DISKS]]
    for name, (trained, all_, bank) in parts().items():
        size = 4 * all_ + 8 * trained + bank
        rows.append([name, si(all_), si(4 * all_ + 12 * trained, "B"), si(bank, "B") if bank else "-",
                     si(size, "B"), *(f"{size / rate:.1f} s" for rate in DISKS.values())])
    return table(rows)


def rank_table(shape="12L-768H", batch=256, lr=2e-4):
    """A step of the student at AIM on 8, 64 and 512 GPUs: at the paper's batch, with 32 and 128 sequences a
    GPU. lr grows with the root of the batch; steps and warm-up keep the samples."""
    gradients = 4 * parts()[f"student {shape}, nst+crd"][0]
    rows = [["GPUs", "batch", "a GPU", "steps", "warm-up", "lr", "compute ms",
             *(f"{name}: ms" for name in LINKS), "z gathered"]]
    for gpus in (8, 64, 512):
        for size in sorted({max(batch, gpus), 32 * gpus, 128 * gpus}):
            more, ring = size / batch, 2 * (gpus - 1) / gpus * gradients  # bytes that each GPU sends
            compute = size / gpus * student_flops(shape) / (AIM * PEAK)
            # NVLink is within a node, the other links between nodes
            sent = [f"{1e3 * ring / speed:.1f}" if (name == "NVLink") == (gpus == 8) else "-"
                    for name, speed in LINKS.items()]
            rows.append([f"{gpus}", f"{size:,}", f"{size // gpus}", f"{500_000 / more:,.0f}",
                         f"{5000 / more:,.0f}", f"{lr * more ** 0.5:.1e}", f"{1e3 * compute:.1f}", *sent,
                         si(2 * size * 128 * 4, "B")])
    return table(rows)


def main(path=""):
    """Prints the tables; path: a file of bench.py --json."""
    found = read_json(path, "give the file that bench.py --json has written") if path else {}
    if wrong := [name for name in USES if not isinstance(found.get(name) or 0.0, (int, float))]:  # null: NaN
        raise SystemExit(f"{path}: {wrong[0]} is no number; write it anew with bench.py --json")
    measured = found.get("gpu.12L-768H.mfu") or MEASURED / T * student_flops("12L-768H") / PEAK
    for text in (job_table(measured), rate_table(found), memory_table(), rank_table()):
        print0(text + "\n")


if __name__ == "__main__":
    with one_line_end():
        main(*sys.argv[1:2])
