"""Distils a teacher into a student on text alone (VidLanKD sections 3.3 and 3.4).

    torchrun distill.py --objective nst+crd                             # the demo world, from nothing
    python distill.py --preset paper --train "wiki*.h5" --teacher out/teacher-mlm+ct-s0
    torchrun --nproc_per_node 8 distill.py --preset small --train wiki103.h5 --teacher bert-base-uncased/
    python distill.py --objective crd --crd_level sentence --preset small --train pairs.h5 --teacher clip/

L^S = L_MLM + sum of w_k L_k over the chosen objectives (Eq. 4): soft (Eq. 5), l2 (Eq. 6), nst (Eq. 7), crd
(Eq. 8), voken (Eq. 9), or none = text only. For l2, nst and crd the teacher may read other tokens, CLIP's or
another BERT's, of the same text, which data.py xtext packs side by side. The run leaves
out/distill-<objective>-s<seed>/ with model/, a Hugging Face folder; heads.safetensors in it holds the heads
of the objectives.
"""
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import losses
from common import Switch, check_fields, duration, keyed_integers, print0, read_json
from model import BERT, DistillHead, MLMHead, masked_mean, model_config, param_groups, recompute
from parts.machine import flops_per_token, init_ranks, memory_report
from parts.metrics import gradient_norms, masked_word_scores, probes
from parts.weights import (check_tower, config_and_vocab, is_clip, load_bert, load_mlm_head, open_clip,
                           read_tensors, save_bert, save_tensors, start_from, vocab_of)
from run import Run, file_hash, lr_at, micro_batch_size, model_folder, run_script, set_seed, steps_of


@dataclass(frozen=True)
class Config:
    preset: str = "demo"  # demo, small (6L-512H), base (12L-768H), paper or paper-6l; flags beat it
    # data
    data_dir: str = "data"  # where the demo world is kept (data_dir/demo-s<seed>)
    train: str = ""  # packed text: files of data.py text, or a glob; empty = the demo world
    val: str = ""  # packed text to evaluate on; empty = the last 1 % of the blocks
    videos: str = ""  # packed clips for the closing table's retrieval; empty = the demo world's, or none
    block_size: int = 24  # tokens of a sequence, [CLS] and [SEP] included
    eval_blocks: int = 2000  # validation blocks that are read
    # models
    teacher: str = ""  # a run of teacher.py, a BERT folder, a CLIP folder or file; empty = the demo's teacher
    segments: int = 2  # of a block for a teacher of other tokens, each as long as it reads; the rest is cut
    quick_gelu: bool = False  # a CLIP file that does not tell its activation has OpenAI's
    init_from: str = ""  # start the student from this model (two-stage pre-training); empty = from scratch
    model: str = "demo"  # shape of the student: demo, or layers and width: 6L-512H, 12L-768H
    dropout: float = 0.1  # of hidden states and attention
    # objective
    objective: str = "nst+crd"  # none, or any of soft, l2, voken, nst, crd joined by +
    head: str = "mlp"  # distillation head of l2, nst and crd: mlp (section 4.3) or none (Table 8)
    w_mlm: float = 1.0  # weight of masked words; the demo's weights were measured, the paper preset's are 1
    w_soft: float = 1.0  # of Eq. 5
    w_l2: float = 1.0  # of Eq. 6
    w_voken: float = 1.0  # of Eq. 9
    w_nst: float = 100.0  # of Eq. 7
    w_crd: float = 1.0  # of Eq. 8
    soft_tau: float = 2.0  # temperature of Eq. 5
    nst_kernel: str = "gaussian"  # k of Eq. 7: gaussian (sigma 1), poly or linear
    nst_normalize: bool = True  # L2-normalise a neuron's pattern; false = Eq. 7 as printed: gradient vanishes
    crd_level: str = "token"  # an anchor is a token, or a sentence = the mean over its real tokens
    crd_tokens: int = 384  # anchors of the global batch, token level
    crd_negatives: int = 512  # N of Eq. 8, shared by the batch
    crd_dim: int = 128  # E: width of f_1 and f_2
    crd_tau: float = 0.07  # temperature
    crd_momentum: float = 0.5  # of a bank row, sentence level; token rows are replaced
    crd_bank_size: int = 0  # M: rows of the bank, at most one for each block of the corpus; 0 = so many
    crd_bank_dtype: str = "float32"  # float32, or bfloat16 = half the memory
    crd_loss: str = "nce"  # nce (Eq. 8) or infonce over the same negatives
    crd_views: str = "same"  # same, or different = the teacher gets its own masks (a second teacher pass)
    mask_rate: float = 0.15  # share of the tokens to predict
    mask_split: str = "80/10/10"  # of these: [MASK] / random / kept; the paper's text has 100/0/0
    reduction: str = "mean"  # of every term over its items: mean, or sum as the papers write
    # optimizer
    batch_size: int = 96  # sequences a step, over all ranks and accumulation
    grad_accum: int = 1  # micro-batches a rank runs for one step
    lr: float = 2e-3  # peak learning rate of AdamW
    weight_decay: float = 0.01  # not on biases and LayerNorm
    beta2: float = 0.98  # AdamW's second momentum
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    warmup_steps: float = 60  # linear warm-up; below 1 = a share of the steps
    max_steps: int = 540  # steps; the learning rate falls to 0 at the last; 0 = as many as --epochs takes
    epochs: float = 0.0  # passes over the data, where max_steps is 0
    # system
    seed: int = 0  # of weights, order, masks, and of the demo world
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    compile_model: bool = False  # torch.compile student and teacher
    grad_checkpoint: bool = False  # recompute the layers' activations in backward: less memory, slower
    out_dir: str = ""  # run folder; empty = out/distill-<objective>-s<seed>
    resume: Switch = "false"  # go on from the newest checkpoint: false, true, or auto = where there is one
    eval_only: bool = False  # measure the folder's newest checkpoint and stop
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    # logging
    log_every: int = 25  # steps a log line
    grad_every: int = 100  # steps between measurements of each term's gradient; a multiple of log_every
    eval_every: int = 100  # steps between evaluations
    save_every: int = 100  # steps between checkpoints; 0 = by save_minutes alone
    save_minutes: float = 0.0  # minutes between checkpoints; 0 = by save_every alone

    def __post_init__(self):
        chosen, known = self.objective.split("+"), [name for name in ITEMS if name != "mlm"]
        if chosen != ["none"] and (not set(chosen) <= set(known) or len(set(chosen)) < len(chosen)):
            raise ValueError(f"--objective {self.objective}: none, or some of {'+'.join(known)}")
        check_fields(self, CHOICES, POSITIVE)
        if "crd" in chosen and min(self.batch_size, self.crd_bank_size or 2) < 2:
            raise ValueError("--objective crd: no negatives where --batch_size or --crd_bank_size is below 2")
        if "crd" in chosen and self.crd_level == "token" and self.crd_tokens < self.batch_size:
            raise ValueError(f"--crd_tokens {self.crd_tokens}: at least --batch_size {self.batch_size}")
        if self.block_size > (most := model_config(self.model, 1, self.dropout).max_positions):
            raise ValueError(f"--block_size {self.block_size}: at most the model's {most} positions")
        data.parse_split(self.mask_split)


def tokens(batch):
    """How many tokens a micro-batch has that student and teacher read both."""
    return batch["mask"].sum()


# every term of the loss, and how many items of it a micro-batch has
ITEMS = {"mlm": lambda batch: (batch["mlm_targets"] >= 0).sum(),
         "soft": tokens, "l2": tokens, "voken": tokens, "nst": lambda batch: len(batch["ids"]),
         "crd": lambda batch: len(batch["slots"])}
HEADLESS = ("soft", "voken")  # objectives that compare words or videos, not hidden states
CHOICES = {"head": ("mlp", "none"), "nst_kernel": ("gaussian", "poly", "linear"),
           "crd_level": ("token", "sentence"), "crd_bank_dtype": ("float32", "bfloat16"),
           "crd_loss": ("nce", "infonce"), "crd_views": ("same", "different"), "reduction": ("mean", "sum")}
POSITIVE = ("eval_blocks", "soft_tau", "crd_tau", "mask_rate", "lr", "grad_every", "eval_every")
NEEDS = {name: ("objective", (term,)) for name in Config.__annotations__ for term in list(ITEMS)[1:]
         if f"{name}_".startswith((f"{term}_", f"w_{term}_"))}  # see common.check_needs
NEEDS |= {"head": ("objective", ("l2", "nst", "crd")), "crd_momentum": ("crd_level", ("sentence",)),
          "crd_tokens": ("crd_level", ("token",)), "data_dir": ("train", ("",))}
# what a resumed run cannot change
FIXED = ("block_size", "model", "objective", "head", "crd_level", "crd_tokens", "crd_negatives", "crd_dim",
         "crd_tau", "crd_momentum", "crd_bank_size", "crd_bank_dtype", "crd_loss", "crd_views", "mask_rate",
         "mask_split", "reduction", "batch_size", "weight_decay", "beta2", "segments", "seed")
# flags that change no result: hashes tell what data and models are
FREE = ("preset", "train", "val", "videos", "teacher", "quick_gelu")

# VidLanKD 4.3: tokens, AdamW; released code: epochs of Wiki103, steps, batch, warm-up, beta2; the rest: ours
# a bank of English Wikipedia's 22.8 M blocks would take 23 GB: what bounds it costs, see docs/objectives.md
SMALL = dict(model="6L-512H", crd_tokens=512, crd_negatives=4096, crd_bank_size=2 ** 20,
             crd_bank_dtype="bfloat16", block_size=128, batch_size=256, lr=2e-4,
             beta2=0.999, warmup_steps=10_000, max_steps=0, epochs=40.0, eval_every=2000, save_every=0,
             save_minutes=15.0, grad_every=1000, log_every=100)
BASE = SMALL | dict(model="12L-768H", warmup_steps=5000, max_steps=500_000, epochs=0.0)
PAPER = dict(w_nst=1.0, mask_split="100/0/0")  # L^S is a plain sum (3.3); 15 % become [MASK] (3.2)
PRESETS = {"demo": {}, "small": SMALL, "base": BASE, "paper": BASE | PAPER, "paper-6l": SMALL | PAPER}


def is_paired(path, vocab):
    """Whether the teacher at `path` reads other tokens than the student, whose Vocab is `vocab`."""
    return is_clip(path, "--teacher") or config_and_vocab(model_folder(path, "--teacher"), weights=False)[
        1].hash != vocab.hash


class FrozenTeacher:
    """The teacher as the student sees it: hidden states, word distributions, vokens; frozen.

    paired: it reads tokens of its own, unmasked, beside the student's words; see is_paired.
    """

    def __init__(self, cfg, vocab, device, dtype):
        self.paired, self.clip = is_paired(cfg.teacher, vocab), is_clip(cfg.teacher, "--teacher")
        self.mlm, chosen = None, cfg.objective.split("+")
        if self.paired and "soft" in chosen:
            raise SystemExit(f"--objective soft: compares the same words, but --teacher {cfg.teacher} reads "
                             "other tokens; leave soft out, or pack the text with the teacher's vocabulary")
        if self.paired and cfg.crd_views == "different":
            raise SystemExit(f"--crd_views different: --teacher {cfg.teacher} reads tokens of its own, which "
                             "are never masked")
        if self.clip:
            self.bert, self.hash, self.own = open_clip(cfg.teacher, "--teacher", cfg.quick_gelu)
        else:
            folder = model_folder(cfg.teacher, "--teacher")
            self.bert, self.hash, self.own = load_bert(folder), file_hash(folder), config_and_vocab(folder)[1]
        self.width, self.by_word = self.bert.width, chosen != ["crd"] or cfg.crd_level == "token"
        self.positions = self.bert.config.positions if self.clip else self.bert.config.max_positions
        if not self.paired and cfg.block_size > self.positions:
            raise SystemExit(f"--block_size: the teacher has {self.positions} positions")
        if "soft" in chosen:  # no other objective reads it
            self.mlm = load_mlm_head(folder, self.bert)
            if self.mlm is None:
                raise SystemExit(f"--objective soft: {folder} has no masked-word head, so no word "
                                 "distributions; leave soft out or choose another teacher")
        if "voken" in chosen:
            path = Path() if self.clip else folder / "vokens.safetensors"
            if not path.is_file():
                raise SystemExit(f"--objective voken: {cfg.teacher} has no video encoder; teacher.py's have")
            self.vokens = F.normalize(read_tensors(path)["vectors"], dim=-1).to(device)  # (K, C_t)
        for part in (self.bert, self.mlm):
            if part is not None:
                part.to(device, dtype).eval().requires_grad_(False)  # cast once: it is never updated

    @torch.no_grad()
    def __call__(self, batch):
        """Adds to a micro-batch what the student is to match: h_t (B, T, C_t); h_t_crd for other views.

        A teacher of other tokens: at each piece of a word the mean of the word's states; and sentence_t (B,
        C_t), the mean of the text's, of CLIP the mean of the segments' end states.
        """
        if self.paired:
            return self.read_beside(batch)
        batch["h_t"] = self.bert(batch["inputs"])
        if "inputs_t" in batch:
            batch["h_t_crd"] = self.bert(batch["inputs_t"])

    def read_beside(self, batch):
        """`__call__` for a teacher that reads clip_ids."""
        ids, place, real = batch["clip_ids"], batch["clip_place"], batch["clip_mask"]
        # tokens that are no padding; padding of `place` marks the last one, which is none of ids
        seen = torch.zeros(ids.numel() + 1, dtype=torch.bool, device=ids.device)
        seen.scatter_(0, place.masked_fill(~real, ids.numel()).flatten(), True)
        states = self.bert(ids, seen[:-1].view_as(ids)).flatten(0, 1).float()  # (n l, C_t)
        rows = F.embedding(place, states)  # (B, R, C_t)
        ends = batch["clip_end"]  # (B, S)
        batch["sentence_t"] = (masked_mean(F.embedding(ends, states), ends > 0) if self.clip
                               else masked_mean(rows, real))
        if not self.by_word:
            return
        of_word = (batch["word"][..., None] == batch["clip_word"][:, None]) & batch["mask"][..., None]
        of_word = of_word.to(rows.dtype)  # (B, T, R)
        batch["h_t"] = of_word @ rows / of_word.sum(-1, keepdim=True).clamp(min=1)


class Distiller(nn.Module):
    """The student, its heads and CRD's f_1 and f_2: all that is trained, so that DDP sees every gradient."""

    def __init__(self, cfg, config, teacher, bank):
        super().__init__()
        self.cfg = cfg
        self.bert = BERT(config)
        self.mlm = MLMHead(config.hidden, self.bert.embeddings.word.weight, std=config.init_std)
        self.kd = [name for name in ITEMS if name in cfg.objective.split("+")]
        self.weights = {name: getattr(cfg, f"w_{name}") for name in ("mlm", *self.kd)}
        width_t = teacher.width if teacher else 0
        self.heads = nn.ModuleDict({
            name: DistillHead(config.hidden, width_t) if cfg.head == "mlp" else nn.Identity()
            for name in self.kd if name not in HEADLESS})
        if "l2" in self.kd and cfg.head == "none" and width_t != config.hidden:
            raise SystemExit(f"--head none with l2: student and teacher are {config.hidden} and {width_t} "
                             "wide; use --head mlp")
        if "voken" in self.kd:
            self.voken = nn.Linear(config.hidden, len(teacher.vokens))
            self.vokens = teacher.vokens  # a plain attribute: not trained, not in the checkpoint
        if "soft" in self.kd:
            self.soft = (teacher.mlm.transform, teacher.mlm.weight.detach(), teacher.mlm.bias.detach())
        if "crd" in self.kd:
            self.f1 = nn.Linear(width_t if cfg.head == "mlp" else config.hidden, cfg.crd_dim)
            self.f2 = nn.Linear(width_t, cfg.crd_dim)
            self.bank = bank  # not a buffer: DDP would overwrite the other ranks' rows with rank 0's
        if cfg.grad_checkpoint:
            recompute(self)
        self.fresh = []  # (z_s, z_t) of the step's micro-batches, a row a sequence: what the bank stores next

    def forward(self, batch, divisor):
        """One micro-batch -> {term: sum / divisor[term]}."""
        return self.terms(*self.states(batch), batch, divisor)

    def states(self, batch):
        """(the student's last hidden states (B, T, C_s),)."""
        return (self.bert(batch["inputs"]),)

    def terms(self, h, batch, divisor):
        """Every term from the student's last hidden states h (B, T, C_s)."""
        cfg, terms, h_t = self.cfg, {}, batch.get("h_t")
        h_rows, both = h.flatten(0, 1), batch.get("aligned", slice(None))  # (B T, C_s), of them where h_t is
        # HACK HERE: the objective
        terms["mlm"] = losses.mlm(self.mlm(h_rows[batch["mlm_index"]]), batch["mlm_targets"], divisor["mlm"])
        if "soft" in self.kd:
            transform, weight_t, bias_t = self.soft
            terms["soft"] = losses.soft(self.mlm.transform(h_rows), self.mlm.weight, self.mlm.bias,
                                        transform(h_t.flatten(0, 1)), weight_t, bias_t, cfg.soft_tau,
                                        divisor["soft"])
        if "l2" in self.kd:
            terms["l2"] = losses.l2(self.heads["l2"](h), h_t, batch["mask"], divisor["l2"])
        if "voken" in self.kd:
            terms["voken"] = losses.voken(h_rows[both], self.voken.weight, self.voken.bias,
                                          h_t.flatten(0, 1)[both], self.vokens, divisor["voken"])
        if "nst" in self.kd:
            terms["nst"] = losses.nst(self.heads["nst"](h), h_t, batch["mask"], cfg.nst_kernel,
                                      normalize=cfg.nst_normalize, divisor=divisor["nst"])
        if "crd" in self.kd:
            z_s, z_t = self.project(h, batch)
            self.fresh.append((z_s[batch["first"]].detach(), z_t[batch["first"]].detach()))
            terms["crd"] = losses.crd(z_s, z_t, batch["slots"], self.bank, batch["negatives"], divisor["crd"],
                                      cfg.crd_loss)
        return terms

    def project(self, h, batch):
        """CRD's anchors: f_1 of the student's and f_2 of the teacher's states, unit rows (A, E)."""
        h_t = batch.get("h_t_crd", batch.get("h_t"))
        if self.cfg.crd_level == "token":
            h, h_t = (x.flatten(0, 1)[batch["anchors"]] for x in (h, h_t))  # (A, C)
            s = self.heads["crd"](h)
        elif "sentence_t" in batch:  # the mean over the words that both read
            s, h_t = masked_mean(self.heads["crd"](h), batch["mask"]), batch["sentence_t"]  # (B, C)
        else:  # over a block's tokens, which are all real
            s, h_t = self.heads["crd"](h).mean(1), h_t.mean(1)  # (B, C)
        z_s, z_t = self.f1(s).float(), self.f2(h_t.to(s.dtype)).float()
        return F.normalize(z_s, dim=-1), F.normalize(z_t, dim=-1)


def make_batch(blocks, cfg, index, *keys, paired=False, pad=False):
    """Blocks `index` as a micro-batch: masked inputs, targets, anchors. keys: (seed, step, positions).

    paired: with the tokens of a FrozenTeacher of other tokens; mask is then True where both read a word.
    pad: see data.masked_words.
    """
    # HACK HERE: the batch
    batch, how = blocks.batch(index), (blocks.vocab, cfg.mask_rate, cfg.mask_split)
    batch |= data.masked_words(batch, *how, *keys, pad=pad)
    if paired:
        batch |= blocks.clip_batch(index) | blocks.alignment(index)
        batch["mask"] = batch["word"] >= 0
        batch["aligned"] = batch["mask"].flatten().nonzero()[:, 0]
    ids, mask = batch["ids"], batch["mask"]
    if "crd" in cfg.objective.split("+"):
        if cfg.crd_views == "different":
            batch["inputs_t"], _ = data.mask_tokens(ids, mask, *how, "teacher", *keys)
        sequence = torch.arange(len(ids))
        if cfg.crd_level == "token":
            per_row = data.anchors_per_row(cfg.crd_tokens, cfg.batch_size, keys[-1])
            sequence, token = data.anchor_tokens(mask, per_row, *keys)
            batch["anchors"] = sequence * ids.shape[1] + token  # rows of the flattened batch
        batch["slots"] = index[sequence.numpy()] % (cfg.crd_bank_size or len(blocks))
        batch["first"] = torch.searchsorted(sequence.contiguous(), torch.arange(len(ids)))
    return batch


def evaluate(model, blocks, cfg, ranks):
    """Masked-word loss and accuracy of the first eval_blocks blocks, masks fixed by block; over all ranks."""
    index = np.arange(min(len(blocks), cfg.eval_blocks))
    count = max(1, math.ceil(len(index) * ranks.size * cfg.grad_accum / cfg.batch_size))  # as in training
    parts = np.array_split(index, count)[ranks.rank::ranks.size]
    batches = (data.masked_words(blocks.batch(part), blocks.vocab, cfg.mask_rate, cfg.mask_split, "val", part)
               for part in parts)
    return masked_word_scores(model.bert, model.mlm, batches, ranks, getattr(torch, cfg.dtype))


def update_bank(model, index, ranks):
    """Writes the step's z into the bank: gathered from all ranks, in the order of `index`."""
    z_s, z_t = ranks.gather(torch.cat([torch.stack(z, 1) for z in model.fresh])).unbind(1)
    model.fresh.clear()
    model.bank.update(index, z_s, z_t)
    return z_s, z_t


@torch.no_grad()
def first_rows(model, batches, index, cfg, ranks):
    """Before the first step: the first global batch fills the bank, and its similarities fix Eq. 8's Z."""
    bank = model.eval().bank
    for batch in batches:
        z_s, z_t = model.project(model.bert(batch["inputs"]), batch)
        model.fresh.append((z_s[batch["first"]], z_t[batch["first"]]))
    z_s, z_t = update_bank(model, index, ranks)
    bank.set_z(z_s, z_t, index % bank.rows, bank.draw(keyed_integers, cfg.seed, 0))
    model.train()


def make_bank(cfg, blocks, device):
    """CRD's memory bank, or None; says what it takes."""
    if "crd" not in cfg.objective.split("+"):
        return None
    rows, dtype = min(cfg.crd_bank_size or blocks, blocks), getattr(torch, cfg.crd_bank_dtype)
    print0(f"crd bank: {rows:,} rows x {cfg.crd_dim} x 2 models take "
           f"{losses.CRDBank.nbytes(rows, cfg.crd_dim, dtype) / 1e6:,.0f} MB on each rank's device and in a "
           f"checkpoint, and {12 * rows / 1e6:,.0f} MB of its host; --crd_bank_size and --crd_bank_dtype "
           "bound it")
    momentum = cfg.crd_momentum * (cfg.crd_level == "sentence")
    return losses.CRDBank(rows, cfg.crd_dim, cfg.crd_negatives, cfg.crd_tau, momentum, dtype, device)


def vocab_of_text(paths):
    """The Vocab of packed text."""
    return data.open_packed(data.find_shards(paths)[0], data.TextBlocks.kind)[1]


def open_pairs(cfg, teacher, vocab):
    """PairBlocks to train on beside a teacher of other tokens; one line where it cannot read them."""
    if data.open_packed(data.find_shards(cfg.train)[0])[0]["kind"] != data.PairBlocks.kind:
        raise SystemExit(f"--teacher {cfg.teacher} reads another vocabulary than the packed text "
                         f"({vocab.size:,} tokens); pack it for both, with `python data.py xtext` and the "
                         "teacher's vocabulary as --clip_vocab" + (
                             "" if teacher.clip else ", or for one, with that as --vocab"))
    train = data.PairBlocks(cfg.train, cfg.block_size, "train", cfg.val, cfg.segments, teacher.positions)
    check_tower("--teacher", cfg.teacher, teacher.bert, teacher.own, train.clip_vocab, cfg.train)
    return train


def flops_of(cfg, config, teacher, blocks):
    """Floating-point operations of a training step; the teacher reads forward alone."""
    flops = 3 * cfg.block_size * flops_per_token(config, cfg.block_size, cfg.mask_rate)
    if teacher:
        paired = teacher.paired  # it reads segments
        read = blocks.used * cfg.segments * blocks.length if paired else cfg.block_size
        flops += read * flops_per_token(teacher.bert.config, blocks.length if paired else cfg.block_size)
    return cfg.batch_size * flops


def memory(model, cfg, config, teacher, micro_size):
    """The line on parameters and memory. Of the teacher there are weights and last states; of KD what the
    heads keep, the gradients that are made with their values, and the largest chunk."""
    T, C, kd, more, chunks = cfg.block_size, config.hidden, model.kd, 0, [0]
    tokens, device = micro_size * T, next(model.parameters()).device
    outer = teacher.width if teacher and cfg.head == "mlp" else C

    def chunk(rows, floats, on_cpu):
        chunks.append(4 * floats * min(rows, losses.chunk_rows(device, floats, on_cpu)))
    if teacher:
        weights = {p for part in (teacher.bert, teacher.mlm) if part for p in part.parameters()}
        more += sum(p.numel() * p.itemsize for p in weights) + 4 * tokens * teacher.width * cfg.grad_accum
    for name in {"l2", "nst"} & {*kd}:
        more += 4 * tokens * (C + 2 * outer)
    if "nst" in kd:
        entries = max(outer * (outer + teacher.width), T * T)
        chunk(micro_size, entries + 4 * T * (outer + teacher.width), 2 ** 19 // entries)
    for name in {"soft", "voken"} & {*kd}:
        classes = config.vocab_size if name == "soft" else len(teacher.vokens)
        more += 4 * (classes * C + 4 * tokens * C)
        chunk(tokens, 4 * classes, 256)
    if "crd" in kd:
        chunks.append(4 * 4 * micro_size * max(1, cfg.crd_tokens // cfg.batch_size) * cfg.crd_negatives)
    return memory_report(model, config, micro_size, T, cfg.mask_rate, (), cfg.grad_checkpoint,
                         more + max(chunks))


def open_parts(cfg, device, dtype):
    """(TextBlocks to train on and to evaluate on, FrozenTeacher or None, the student's Vocab, hashes)."""
    vocab, teacher = vocab_of_text(cfg.train), None
    if cfg.objective != "none":
        teacher = FrozenTeacher(cfg, vocab, device, dtype)
    val = data.TextBlocks(cfg.train, cfg.block_size, "val", cfg.val)
    if teacher and teacher.paired:
        train = open_pairs(cfg, teacher, vocab)
    else:
        train = data.TextBlocks(cfg.train, cfg.block_size, "train", cfg.val)
    if val.vocab.hash != vocab.hash:
        raise SystemExit(f"--val {cfg.val} has another vocabulary than --train {cfg.train}; pack it again")
    hashes = {"corpus": train.hash, "validation text": val.hash, "vocabulary": vocab.hash}
    if teacher:
        hashes["teacher"] = teacher.hash
    if teacher and not teacher.paired:
        vocab = teacher.own  # their tables have one size
    elif cfg.init_from:
        vocab = vocab_of(model_folder(cfg.init_from, "--init_from"), "--init_from", vocab)
    return train, val, teacher, vocab, hashes


def run_folder(cfg):
    """--out_dir, or out/distill-<objective>-s<seed>."""
    return Path(cfg.out_dir or f"out/distill-{cfg.objective}-s{cfg.seed}")


def main(cfg):
    """Trains and saves the model of `cfg`; returns what its results.json holds."""
    ranks, dtype = init_ranks(cfg.device, cfg.dtype), getattr(torch, cfg.dtype)

    # ---- data
    train, val, teacher, vocab, hashes = open_parts(cfg, ranks.device, dtype)
    run = Run(cfg, run_folder(cfg), ranks, hashes, FIXED, FREE)
    if cfg.resume == "auto" and (results := run.finished()):
        print0(f"reused {run.folder}")
        return results
    max_steps, warmup_steps = steps_of(cfg, len(train))

    # ---- models
    set_seed(cfg.seed, 0)
    config = model_config(cfg.model, vocab.size, cfg.dropout)
    bank = make_bank(cfg, len(train), ranks.device)
    model = Distiller(cfg, config, teacher, bank)
    if cfg.init_from:
        start_from(model.bert, model.mlm, model_folder(cfg.init_from, "--init_from"), vocab)
    model.to(ranks.device)
    print0(memory(model, cfg, config, teacher, micro_batch_size(cfg, ranks)))
    weights, names, paired = model.weights, list(model.weights), bool(teacher) and teacher.paired

    # ---- optimizer
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    # ---- resume
    step = run.restore(max_steps, model=model, optimizer=optimizer, scaler=scaler, bank=bank)
    if cfg.eval_only:
        scores = evaluate(model, val, cfg, ranks)
        print0(f"step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        return scores
    print0(f"student: {cfg.objective}, {len(train):,} blocks of {cfg.block_size} tokens, {max_steps:,} steps "
           f"of {cfg.batch_size}, {max_steps * cfg.batch_size / len(train):.2f} epochs" + (
               f", beside {cfg.segments} x {train.length} tokens of the teacher ({100 * train.used:.0f} % of "
               f"the segments in use, {train.cut:,} tokens cut)" if paired else ""))
    run.begin(names, "tokens", cfg.batch_size * cfg.block_size, flops_of(cfg, config, teacher, train))
    if cfg.compile_model:
        for part in filter(None, (model, teacher)):
            part.bert.compile()
    ddp = DistributedDataParallel(model) if ranks.size > 1 else model
    model.train()
    make = partial(make_batch, paired=paired, pad=cfg.compile_model or ranks.device.type != "cpu")
    run.feed(partial(data.step_batches, train, cfg, ranks, make), ITEMS)

    # ==== training loop ====
    while True:
        last = step >= max_steps
        if run.eval_due(step, last):
            run.note(step, "val", evaluate(model, val, cfg, ranks))
        run.save_due(step, last)
        if last:
            break

        # the step's micro-batches; each term's divisor: its global items / ranks, as DDP averages gradients
        index, batches, items = run.take(step)
        divisor = {name: (n if cfg.reduction == "mean" else 1) / ranks.size for name, n in items.items()}
        if teacher:
            for batch in batches:
                teacher(batch)
        lr = lr_at(step, cfg.lr, warmup_steps, max_steps)  # HACK HERE: the schedule
        if bank:
            if step == 0:
                first_rows(model, batches, index, cfg, ranks)
            for batch in batches:
                batch["negatives"] = bank.draw(keyed_integers, cfg.seed, step)
        if step % cfg.grad_every == 0:
            with run.pause(), torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                run.note_gradients(step, gradient_norms(model, batches[0], divisor), weights)
                model.fresh.clear()

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
        if bank:
            update_bank(model, index, ranks)

    # ---- finish
    seconds = run.leave_loop()
    results = {"objective": cfg.objective, "steps": step, "vocabulary": vocab.hash,
               **evaluate(model, val, cfg, ranks)}
    if paired:
        results |= {"teacher_tokens_cut": train.cut, "segments_used": train.used}
    if ranks.main:
        model.eval()
        save_bert(model.bert, run.folder / "model", vocab, model.mlm)
        heads = {name: x for name, x in model.state_dict().items() if not name.startswith(("bert.", "mlm."))}
        save_tensors(heads, run.folder / "model" / "heads.safetensors")  # of the objectives, and f_1 and f_2
        if (latents := Path(cfg.train).parent / "raw" / "latents.json").exists():  # the demo world
            results["probes"] = probes(model.bert, train, read_json(latents), ranks.device)
    print0(f"made {run.folder}/model in {duration(seconds)}")
    return run.finish(results)


if __name__ == "__main__":
    from prepare import chain
    run_script(chain.distill, Config, PRESETS, NEEDS)
