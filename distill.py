"""Distils a teacher into a student on text alone (VidLanKD sections 3.3 and 3.4).

    torchrun distill.py --objective nst+crd                             # the demo world, from nothing
    python distill.py --preset paper --train "wiki*.h5" --teacher out/teacher-mlm+ct-s0
    torchrun --nproc_per_node 8 distill.py --preset small --train wiki103.h5 --teacher bert-base-uncased/

L^S = L_MLM + sum of w_k L_k over the chosen objectives (Eq. 4): soft (Eq. 5), l2 (Eq. 6), nst (Eq. 7), crd
(Eq. 8), voken (Eq. 9), or none = text only. The run leaves out/distill-<objective>-s<seed>/ with model/, a
Hugging Face folder.
"""
import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import losses
import teacher as teacher_script
from analyze import clip_states, closing_table, describe, fill_in
from common import check_fields, duration, print0, write_json
from model import (BERT, SHAPES, DistillHead, MLMHead, flops_per_token, memory_report, model_config,
                   param_groups)
from parts.metrics import mean_state, probes, retrieval, shared_neighbours
from parts.vocab import load_vocab
from parts.weights import load_bert, load_mlm_head, load_video_encoder, save_bert
from prepare.world import demo_world
from run import (Interrupt, Log, check_finite, check_resume, check_weights, file_hash, finished_run,
                 init_world, load_checkpoint, lr_at, micro_batch_size, model_folder, move, open_run,
                 peak_flops, peak_memory_mb, restore_rng, run_script, save_checkpoint, set_seed, step_line,
                 unfinished_run)


@dataclass(frozen=True)
class Config:
    preset: str = "demo"  # demo, small (6L-512H), base (12L-768H) or paper; flags beat it
    # data
    data_dir: str = "data"  # where the demo world is kept (data_dir/demo-s<seed>)
    train: str = ""  # packed text: files of data.py text, or a glob; empty = the demo world
    val: str = ""  # packed text to evaluate on; empty = the last 1 % of the blocks
    videos: str = ""  # packed clips for the closing table's retrieval; empty = the demo world's, or none
    block_size: int = 24  # tokens of a sequence, [CLS] and [SEP] included
    eval_blocks: int = 2000  # validation blocks that are read
    # models
    teacher: str = ""  # a run of teacher.py or a Hugging Face BERT folder; empty = the demo world's teacher
    init_from: str = ""  # start the student from this model (two-stage pre-training); empty = from scratch
    model: str = "demo"  # a shape of model.py: demo, 6L-512H, 12L-768H
    layers: int = 0  # overrides the shape; 0 = as it is
    hidden: int = 0  # overrides the shape
    heads: int = 0  # overrides the shape; hidden / 64 where only hidden is given
    intermediate: int = 0  # overrides the shape; 4 x hidden where only hidden is given
    dropout: float = 0.1  # of hidden states and attention
    # objective
    objective: str = "nst+crd"  # none, or any of soft, l2, voken, nst, crd joined by +
    head: str = "mlp"  # distillation head of l2, nst and crd: mlp (section 4.3) or none (Table 8)
    w_mlm: float = 1.0  # weight of each term; the demo's were measured to work, the paper preset's are 1
    w_soft: float = 1.0
    w_l2: float = 1.0
    w_voken: float = 1.0
    w_nst: float = 100.0
    w_crd: float = 1.0
    soft_tau: float = 2.0  # temperature of Eq. 5
    nst_kernel: str = "gaussian"  # k of Eq. 7: gaussian (sigma 1), poly or linear
    nst_normalize: bool = True  # L2-normalise a neuron's pattern; false = Eq. 7 as printed: gradient vanishes
    crd_level: str = "token"  # an anchor is a token, or a sentence = the mean over its real tokens
    crd_tokens: int = 192  # anchors of the global batch, token level
    crd_negatives: int = 512  # N of Eq. 8, shared by the batch
    crd_dim: int = 128  # E: width of f_1 and f_2
    crd_tau: float = 0.07  # temperature
    crd_momentum: float = 0.5  # of a bank row, sentence level; token rows are replaced
    crd_bank_size: int = 0  # M: rows of the bank; 0 = one for each block of the corpus
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
    warmup_steps: int = 60  # linear warm-up
    max_steps: int = 600  # then linearly to 0; 0 = as many as --epochs takes
    epochs: float = 0.0  # passes over the corpus, where max_steps is 0
    # system
    seed: int = 0  # of weights, order, masks, and of the demo world
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    compile_model: bool = False  # torch.compile student and teacher
    out_dir: str = ""  # run folder; empty = out/distill-<objective>-s<seed>
    resume: bool = False  # go on from the folder's newest checkpoint
    eval_only: bool = False  # measure the folder's newest checkpoint and stop
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    # logging
    log_every: int = 25  # steps a log line
    grad_every: int = 200  # steps between measurements of each term's gradient; a multiple of log_every
    eval_every: int = 200  # steps between evaluations
    save_every: int = 200  # steps between checkpoints

    def __post_init__(self):
        chosen = self.objective.split("+")
        known = set(chosen) <= set(OBJECTIVES) and len(set(chosen)) == len(chosen)
        if self.objective != "none" and not known:
            raise ValueError(f"--objective {self.objective}: write none, or some of {', '.join(OBJECTIVES)} "
                             "joined by +")
        check_fields(self, CHOICES, POSITIVE)
        if not self.max_steps and not self.epochs:
            raise ValueError("--max_steps 0 needs --epochs")
        if self.max_steps and not 1 <= self.warmup_steps <= self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps}: must lie in 1 .. --max_steps "
                             f"({self.max_steps})")
        for name in ("grad_every", "eval_every", "save_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"--{name} {getattr(self, name)}: must be a multiple of --log_every "
                                 f"({self.log_every})")
        if "crd" in chosen and min(self.batch_size, self.crd_bank_size or 2) < 2:
            raise ValueError("--objective crd: no negatives where --batch_size or --crd_bank_size is below 2")
        if "crd" in chosen and self.crd_level == "token" and self.crd_tokens < self.batch_size:
            raise ValueError(f"--crd_tokens {self.crd_tokens}: at least one anchor a sequence, so "
                             f"{self.batch_size} or more")
        data.parse_split(self.mask_split)


OBJECTIVES = ("soft", "l2", "voken", "nst", "crd")
CHOICES = {"model": tuple(SHAPES), "head": ("mlp", "none"), "nst_kernel": ("gaussian", "poly", "linear"),
           "crd_level": ("token", "sentence"), "crd_bank_dtype": ("float32", "bfloat16"),
           "crd_loss": ("nce", "infonce"), "crd_views": ("same", "different"), "reduction": ("mean", "sum"),
           "dtype": ("float32", "bfloat16", "float16")}
POSITIVE = ("eval_blocks", "soft_tau", "crd_negatives", "crd_dim", "crd_tau", "mask_rate", "batch_size",
            "grad_accum", "lr", "log_every", "grad_every", "eval_every", "save_every")
# what a resumed run cannot change
FIXED = ("block_size", "model", "layers", "hidden", "heads", "intermediate", "objective", "head", "crd_level",
         "crd_tokens", "crd_negatives", "crd_dim", "crd_tau", "crd_momentum", "crd_bank_size",
         "crd_bank_dtype", "crd_loss", "crd_views", "mask_rate", "mask_split", "reduction", "batch_size",
         "weight_decay", "beta2", "seed")

# VidLanKD 4.3: 40 epochs of Wiki103 for 6L-512H, 500,000 steps for 12L-768H; batch 256: released code
SMALL = dict(model="6L-512H", crd_tokens=512, crd_negatives=4096, block_size=128, batch_size=256, lr=2e-4,
             beta2=0.999, warmup_steps=10_000, max_steps=0, epochs=40.0, eval_every=2000, save_every=2000,
             grad_every=1000, log_every=100)
BASE = SMALL | dict(model="12L-768H", warmup_steps=5000, max_steps=500_000, epochs=0.0)
PRESETS = {"demo": {}, "small": SMALL, "base": BASE, "paper": BASE | dict(w_nst=1.0)}


class FrozenTeacher:
    """The teacher as the student sees it: hidden states, word distributions, vokens, clip vectors; frozen."""

    def __init__(self, folder, vocab, cfg, device, dtype):
        self.folder = model_folder(folder, "--teacher")
        theirs = load_vocab(self.folder)
        if theirs.hash != vocab.hash:
            raise SystemExit(f"--teacher {folder} reads another vocabulary ({theirs.size:,} tokens) than the "
                             f"corpus ({vocab.size:,}); pack it again with --vocab {self.folder}/vocab.txt")
        self.bert = load_bert(self.folder)
        self.head = load_mlm_head(self.folder, self.bert)
        self.width = self.bert.config.hidden
        if "soft" in cfg.objective and self.head is None:
            raise SystemExit(f"--objective soft: {self.folder} has no masked-word head, so no word "
                             "distributions; leave soft out or choose another teacher")
        has_video = (self.folder / "video_encoder.safetensors").exists()
        self.video = load_video_encoder(self.folder).to(device).eval() if has_video else None
        if has_video:  # how the teacher cut its clips
            self.clip_options = json.loads((self.folder / "clips.json").read_text())
        self.vokens = None  # (K, C_t), rows of length 1
        if "voken" in cfg.objective:
            if not has_video:
                raise SystemExit(f"--objective voken: {self.folder} has no video encoder; a teacher of "
                                 "teacher.py has one")
            vectors = F.normalize(load_file(self.folder / "vokens.safetensors")["vectors"], dim=-1)
            self.vokens = vectors.to(device, dtype if device.type == "cuda" else torch.float32)
        for part in (self.bert, self.head):
            if part is not None:
                part.to(device, dtype).eval().requires_grad_(False)  # cast once: it is never updated

    @torch.no_grad()
    def __call__(self, batch):
        """Adds to a micro-batch what the student is to match: h_t (B, T, C_t), and h_crd for other views."""
        batch["h_t"] = self.bert(batch["inputs"])
        if "inputs_t" in batch:
            batch["h_crd"] = self.bert(batch["inputs_t"])


class Distiller(nn.Module):
    """The student, its heads and CRD's f_1 and f_2: all that is trained, so that DDP sees every gradient."""

    def __init__(self, cfg, config, teacher, bank):
        super().__init__()
        self.cfg = cfg
        self.bert = BERT(config)
        self.mlm = MLMHead(config.hidden, self.bert.embeddings.word.weight, std=config.init_std)
        chosen = cfg.objective.split("+")
        self.kd = [name for name in OBJECTIVES if name in chosen]
        width_t = teacher.width if teacher else 0
        with_head = [name for name in ("l2", "nst", "crd") if name in self.kd and cfg.head == "mlp"]
        self.heads = nn.ModuleDict({name: DistillHead(config.hidden, width_t) for name in with_head})
        if "l2" in self.kd and cfg.head == "none" and width_t != config.hidden:
            raise SystemExit(f"--head none with l2: student and teacher are {config.hidden} and {width_t} "
                             "wide; use --head mlp")
        if "voken" in self.kd:
            self.voken = nn.Linear(config.hidden, len(teacher.vokens))
            self.vokens = teacher.vokens  # a plain attribute: not trained, not in the checkpoint
        if "soft" in self.kd:
            self.soft = (teacher.head.transform, teacher.head.weight.detach(), teacher.head.bias.detach())
        if "crd" in self.kd:
            self.f1 = nn.Linear(width_t if cfg.head == "mlp" else config.hidden, cfg.crd_dim)
            self.f2 = nn.Linear(width_t, cfg.crd_dim)
            self.bank = bank  # not a buffer: DDP would overwrite the other ranks' rows with rank 0's
        self.fresh = []  # (z_s, z_t) of the step's micro-batches, a row a sequence: what the bank stores next

    def distil(self, name, h):
        """The student's states as objective `name` compares them: through its head, or as they are."""
        return self.heads[name](h) if name in self.heads else h

    def forward(self, batch, count):
        """One micro-batch -> {term: sum / count[term]}."""
        return self.terms(self.bert(batch["inputs"]), batch, count)

    def terms(self, h, batch, count):
        """Every term from the student's last hidden states h (B, T, C_s)."""
        cfg, terms = self.cfg, {}
        h_rows = h.flatten(0, 1)  # (B T, C_s)
        terms["mlm"] = losses.mlm(self.mlm(h_rows[batch["target_index"]]), batch["targets"], count["mlm"])
        h_t = batch.get("h_t")
        if "soft" in self.kd:
            transform, weight_t, bias_t = self.soft
            terms["soft"] = losses.soft(self.mlm.transform(h_rows), self.mlm.weight, self.mlm.bias,
                                        transform(h_t.flatten(0, 1)), weight_t, bias_t, cfg.soft_tau,
                                        count["tokens"])
        if "l2" in self.kd:
            terms["l2"] = losses.l2(self.distil("l2", h), h_t, batch["mask"], count["tokens"])
        if "voken" in self.kd:
            terms["voken"] = losses.voken(h_rows, self.voken.weight, self.voken.bias, h_t.flatten(0, 1),
                                          self.vokens, count["tokens"])
        if "nst" in self.kd:
            terms["nst"] = losses.nst(self.distil("nst", h), h_t, batch["mask"], cfg.nst_kernel,
                                      normalize=cfg.nst_normalize, count=count["sequences"])
        if "crd" in self.kd:
            z_s, z_t, first = self.project(h, batch)
            self.fresh.append((z_s[first].detach(), z_t[first].detach()))
            terms["crd"] = losses.crd(z_s, z_t, batch["slots"], self.bank, batch["negatives"],
                                      count["anchors"], cfg.crd_loss)
        return terms

    def project(self, h, batch):
        """f_1 of the student's and f_2 of the teacher's anchors, unit rows (A, E); each sequence's first."""
        h_t = batch.get("h_crd", batch["h_t"])
        if self.cfg.crd_level == "token":
            h, h_t = (x.flatten(0, 1)[batch["anchors"]] for x in (h, h_t))  # (A, C)
            s = self.distil("crd", h)
        else:  # every real token of a block counts: [CLS], [SEP] and all between
            s, h_t = self.distil("crd", h).mean(1), h_t.mean(1)  # (B, C)
        z_s, z_t = self.f1(s).float(), self.f2(h_t.to(s.dtype)).float()
        return F.normalize(z_s, dim=-1), F.normalize(z_t, dim=-1), batch["first"]


def prepare(blocks, cfg, step, rows):
    """The micro-batch of `step` at `rows` of the global batch: masked inputs, targets and CRD's anchors."""
    index = blocks.index(cfg.seed, step, cfg.batch_size, rows)
    batch = blocks.batch(index)
    ids, mask = batch["ids"], batch["mask"]
    masking, keys = (ids, mask, blocks.vocab, cfg.mask_rate, cfg.mask_split), (cfg.seed, step, rows)
    inputs, labels = data.mask_tokens(*masking, *keys)
    target_index = (labels.flatten() != -100).nonzero()[:, 0]
    batch |= {"inputs": inputs, "target_index": target_index, "targets": labels.flatten()[target_index]}
    if "crd" in cfg.objective:
        if cfg.crd_views == "different":
            batch["inputs_t"], _ = data.mask_tokens(*masking, "teacher", *keys)
        sequence = torch.arange(len(rows))
        if cfg.crd_level == "token":
            per_row = data.anchors_per_row(cfg.crd_tokens, cfg.batch_size, rows)
            sequence, token = data.anchor_tokens(mask, per_row, *keys)
            batch["anchors"] = sequence * ids.shape[1] + token  # rows of the flattened batch
        batch["slots"] = index[sequence.numpy()] % (cfg.crd_bank_size or len(blocks))
        batch["first"] = torch.searchsorted(sequence.contiguous(), torch.arange(len(rows)))
    return batch


@torch.no_grad()
def evaluate(bert, head, blocks, cfg, world):
    """Masked-word loss and accuracy of the first eval_blocks blocks, masks fixed by block; over all ranks."""
    training, dtype = bert.training, next(bert.parameters()).dtype
    bert.eval()
    total = torch.zeros(3, dtype=torch.float64)  # summed loss, right words, masked words
    index = np.arange(min(len(blocks), cfg.eval_blocks))
    for part in np.array_split(index, max(1, math.ceil(len(index) / cfg.batch_size)))[world.rank::world.size]:
        batch = blocks.batch(part)
        inputs, labels = data.mask_tokens(batch["ids"], batch["mask"], blocks.vocab, cfg.mask_rate,
                                          cfg.mask_split, "val", part)
        target_index = (labels.flatten() != -100).nonzero()[:, 0]
        targets = labels.flatten()[target_index].to(world.device)
        logits = head(bert(inputs.to(world.device)).flatten(0, 1)[target_index.to(world.device)]).float()
        total += torch.tensor([F.cross_entropy(logits, targets, reduction="sum").item(),
                               (logits.argmax(1) == targets).sum().item(), len(targets)], dtype=torch.float64)
    bert.train(training)
    loss, right, n = world.sum(total).tolist()
    return {"mlm_loss": loss / n, "mlm_accuracy": right / n}


def gradient_norms(student, batch, count, weights):
    """Norm of the gradient that each weighted term of a micro-batch sends into the student's last states.

    A pass of its own, every so many steps, that leaves the run as it was: what a weight of 1 means differs by
    orders of magnitude between the terms.
    """
    scale = 2.0 ** 10  # keeps small gradients in float16's range; changes no bit in the other dtypes
    device = batch["inputs"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        h = student.bert(batch["inputs"])
        terms = student.terms(h, batch, count)
    student.fresh.clear()
    norms = {}
    for name, term in terms.items():
        gradient, = torch.autograd.grad(scale * weights[name] * term, h, retain_graph=True)
        norms[name] = gradient.float().norm().item() / scale
    return norms


def update_bank(student, index, world):
    """Writes the step's z, gathered from all ranks, into the bank.

    data.micro_rows goes rank after rank, so that they come in the order of the global batch.
    """
    z_s, z_t = (world.gather(torch.cat(z)) for z in zip(*student.fresh))
    student.fresh.clear()
    student.bank.update(index, z_s, z_t)
    return z_s, z_t


@torch.no_grad()
def first_rows(student, batches, index, world):
    """Before the first step: the first global batch fills the bank, and its similarities fix Eq. 8's Z."""
    student.eval()
    for batch in batches:
        z_s, z_t, first = student.project(student.bert(batch["inputs"]), batch)
        student.fresh.append((z_s[first], z_t[first]))
    z_s, z_t = update_bank(student, index, world)
    student.bank.set_z(z_s, z_t, index % student.bank.rows, student.bank.draw(0))
    student.train()


def open_clips(path, teacher, vocab):
    """The training and the held-out clips of a packed file, cut as the teacher's; [] where there are none."""
    if not path or not teacher or not teacher.video:
        return []
    clips = [data.VideoClips(path, part=part, **teacher.clip_options) for part in ("train", "val")]
    if clips[0].vocab.hash != vocab.hash or clips[0].features != teacher.video.features:
        raise SystemExit(f"--videos {path}: its vocabulary or its {clips[0].features} channels a frame are "
                         f"not the teacher's ({teacher.video.features}); give the file it was trained on")
    return clips


def beside_teacher(folder, teacher, val, clips, device):
    """What a report measures against the teacher, for the text-only student of `folder`."""
    bert = load_bert(model_folder(folder, "text-only")).to(device)
    out = {"neighbours": shared_neighbours(bert, teacher.bert, val, device)}
    if clips:
        out["retrieval"] = retrieval(bert, teacher.video, *clips, device)
    return out


def text_only_run(cfg, folder):
    """Config of the text-only student of the same shape, tokens and steps.

    What only distillation reads is at its default, so that one such run serves all objectives, weights and
    teachers.
    """
    unused = {field.name: field.default for field in fields(cfg)
              if field.name in ("head", "init_from", "teacher", *("w_" + name for name in OBJECTIVES))
              or field.name.startswith(("soft_", "nst_", "crd_"))}
    return replace(cfg, **unused, objective="none", resume=False, eval_only=False, out_dir=str(folder))


def report(student, teacher, text_only, train, val, clips, demo, cfg, world, show):
    """What the student learned: {mlm_loss, mlm_accuracy, neighbours, retrieval, probes}, and where it was
    distilled the closing table's columns and the number of clips.

    show: print the table, with the teacher's and on the demo the text-only student's column. clips: of
    open_clips; demo: the demo world's folder, or None.
    """
    own = evaluate(student.bert, student.mlm, val, cfg, world)
    theirs = {"mlm_loss": None, "mlm_accuracy": None}
    if teacher and teacher.head:
        theirs = evaluate(teacher.bert, teacher.head, val, cfg, world)
    if not world.main:
        return own
    student.eval()
    if teacher:
        own["neighbours"] = shared_neighbours(student.bert, teacher.bert, val, world.device)
    if clips:
        print0(f"measuring retrieval on {len(clips[1]):,} held-out clips")
        space = None
        if "crd" in student.kd:
            space = (lambda h, mask: mean_state(student.f1(student.distil("crd", h)), mask), student.f2)
        elif "l2" in student.kd:
            space = (lambda h, mask: mean_state(student.distil("l2", h), mask), lambda v: v)
        own["retrieval"] = retrieval(student.bert, teacher.video, *clips, world.device, space)
        if student.kd:
            theirs["retrieval"] = retrieval(lambda ids, mask: teacher.bert(ids, mask).float(), teacher.video,
                                            *clips, world.device, (mean_state, lambda v: v))
    if demo:
        latents = json.loads((demo / "raw" / "latents.json").read_text())
        own["probes"] = probes(student.bert, train, latents, world.device)
        if student.kd:
            theirs["probes"] = probes(teacher.bert, train, latents, world.device)
    columns = {"teacher": theirs if student.kd else None, "text-only": text_only,
               cfg.objective if student.kd else "text-only": own}
    columns = {name: column for name, column in columns.items() if column and any(column.values())}
    n_clips = len(clips[1]) if clips else 0
    if show:
        print0("\n" + closing_table(columns, n_clips) + "\n")
    if student.kd:
        own = own | {"table": columns, "clips": n_clips}
    if student.kd and demo:
        ids, place = val.batch([0])["ids"][0], cfg.block_size // 2
        text, words = fill_in(student.bert, student.mlm, val.vocab, ids, place, world.device)
        print0(f"fills in   {text}\n           " + ", ".join(f"{w} {100 * p:.0f}%" for w, p in words)
               + f" (it was {val.vocab.decode([int(ids[place])])})")
        if clips:
            states = clip_states(latents, clips[1])
            found = describe(states[own["retrieval"]["nearest"][0]])
            print0(f"retrieves  {states[0]['text']}\n           {found}\n")
    student.train()
    return own


def main(cfg, reuse=False, beside="", alone=False):
    """Trains, measures and saves the student of `cfg`; returns the results.

    reuse: where a finished run of the same flags and data exists, it returns that one's results. beside: a
    teacher to measure a text-only student against, instead of the demo's own; alone: against none.
    """
    world = init_world(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    micro_size = micro_batch_size(cfg, world)
    folder = Path(cfg.out_dir or f"out/distill-{cfg.objective}-s{cfg.seed}")
    names = ["mlm"] + [name for name in OBJECTIVES if name in cfg.objective.split("+")]
    weights = {name: getattr(cfg, "w_" + name) for name in names}

    # data, and on the demo what is missing: world, teacher, text-only student
    demo = None if cfg.train else demo_world(cfg.data_dir, cfg.seed, world)
    train, val = (data.TextBlocks(cfg.train or demo / "corpus.h5", cfg.block_size, part, cfg.val)
                  for part in ("train", "val"))
    vocab = train.vocab
    if val.vocab.hash != vocab.hash:
        raise SystemExit(f"--val {cfg.val} is packed with another vocabulary than --train {cfg.train}; "
                         "pack it again")
    hashes = {"corpus": train.hash, "validation text": val.hash, "vocabulary": vocab.hash}
    teacher_folder, text_only = cfg.teacher or beside, None
    if not teacher_folder and demo and not alone:
        teacher_folder = str(folder.parent / f"teacher-mlm+ct-s{cfg.seed}")
        teacher_script.main(teacher_script.Config(
            data_dir=cfg.data_dir, seed=cfg.seed, device=cfg.device, block_size=cfg.block_size,
            out_dir=teacher_folder), reuse=True)
    elif not teacher_folder and len(names) > 1:
        raise SystemExit(f"--objective {cfg.objective} needs a teacher: --teacher FOLDER, made by teacher.py "
                         "--videos FILE, or any Hugging Face BERT of the same vocabulary")
    if demo and len(names) > 1:
        text_only = main(text_only_run(cfg, folder.parent / f"distill-none-s{cfg.seed}"), reuse=True,
                         beside=cfg.teacher)
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    if cfg.warmup_steps > max_steps:
        raise SystemExit(f"--warmup_steps {cfg.warmup_steps} is more than the {max_steps} steps of --epochs "
                         f"{cfg.epochs:g} on this corpus; lower it")

    # models and optimizer
    teacher = FrozenTeacher(teacher_folder, vocab, cfg, world.device, dtype) if teacher_folder else None
    if teacher and len(names) > 1:  # it changes nothing in what a text-only student learns
        hashes["teacher"] = file_hash(teacher.folder)
    clips = open_clips(cfg.videos or (demo and demo / "videos.h5"), teacher, vocab)
    if reuse:
        if before := finished_run(folder, cfg, hashes):
            print0(f"reused {folder}")
            return before
        cfg = replace(cfg, resume=unfinished_run(folder, cfg, hashes))
    set_seed(cfg.seed, 0)
    config = model_config(cfg.model, vocab.size, cfg.layers, cfg.hidden, cfg.heads, cfg.intermediate,
                          cfg.dropout)
    bank = None
    if "crd" in names:
        M, bank_dtype = cfg.crd_bank_size or len(train), getattr(torch, cfg.crd_bank_dtype)
        momentum = cfg.crd_momentum if cfg.crd_level == "sentence" else 0.0
        print0(f"crd bank: {M:,} rows x {cfg.crd_dim} x 2 models take "
               f"{losses.CRDBank.nbytes(M, cfg.crd_dim, bank_dtype) / 1e6:,.0f} MB on each rank and in a "
               "checkpoint; --crd_bank_size and --crd_bank_dtype bound it")
        bank = losses.CRDBank(M, cfg.crd_dim, cfg.crd_negatives, cfg.crd_tau, momentum, bank_dtype,
                              world.device, cfg.seed)
    student = Distiller(cfg, config, teacher, bank)
    if cfg.init_from:
        source = model_folder(cfg.init_from, "--init_from")
        start_from = load_bert(source)
        if load_vocab(source).hash != vocab.hash:
            raise SystemExit(f"--init_from {cfg.init_from} reads another vocabulary than the corpus; pack it "
                             f"again with --vocab {source}/vocab.txt")
        if replace(start_from.config, dropout=config.dropout, init_std=config.init_std) != config:
            raise SystemExit(f"--init_from {cfg.init_from}: its shape is not the student's ({config.layers} "
                             f"layers of {config.hidden}); give --layers, --hidden and --heads to match")
        student.bert.load_state_dict(start_from.state_dict())
        if head := load_mlm_head(source, start_from):
            student.mlm.load_state_dict(head.state_dict())
    student.to(world.device)
    print0(memory_report(student, config, micro_size, cfg.block_size))
    optimizer = torch.optim.AdamW(param_groups(student, cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)

    # resume
    start = 0
    if cfg.resume or cfg.eval_only:
        saved = load_checkpoint(folder, world)
        check_resume(saved["config"], cfg, saved["hashes"], hashes, FIXED)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty but in float16
            scaler.load_state_dict(saved["scaler"])
        if bank:
            bank.load_state_dict(saved["bank"])
        start = saved["step"]
    # it was measured beside the demo's own teacher, or alone
    if text_only and (cfg.teacher or "neighbours" not in text_only) and world.main:
        text_only |= beside_teacher(text_only["folder"], teacher, val, clips, world.device)
    if cfg.eval_only:
        return report(student, teacher, text_only, train, val, clips, demo, cfg, world, not reuse)
    folder = open_run(folder, cfg, world, hashes)
    log = Log(folder, world, saved["log_lines"] if cfg.resume else 0)
    interrupt = Interrupt(cfg.max_minutes)
    if cfg.compile_model:
        student.bert.compile()
        if teacher:
            teacher.bert.compile()
    ddp = DistributedDataParallel(student) if world.size > 1 else student
    set_seed(cfg.seed, 1 + world.rank)
    if cfg.resume:
        restore_rng(saved, world)

    tokens = cfg.batch_size * cfg.block_size
    flops = tokens * 3 * flops_per_token(config, cfg.block_size, cfg.mask_rate)
    if len(names) > 1:
        flops += tokens * flops_per_token(teacher.bert.config, cfg.block_size)
    peak = peak_flops(world.device, dtype) * world.size
    window = torch.zeros(cfg.log_every, len(names), device=world.device)
    first, clock = start, None  # first step of the window; when it began, pauses left out; None: warming up
    began, step = time.monotonic(), start
    print0(f"student: {cfg.objective}, {len(train):,} blocks of {cfg.block_size} tokens, {max_steps:,} steps "
           f"of {cfg.batch_size}, {max_steps * cfg.batch_size / len(train):.2f} epochs")
    student.train()
    while True:
        pause = time.monotonic()
        last = step >= max_steps
        if (step % cfg.eval_every == 0 or last) and not (step == start and cfg.resume):
            scores = evaluate(student.bert, student.mlm, val, cfg, world)
            log.write(step=step, **{f"val_{k}": v for k, v in scores.items()})
            print0(f"step {step:6d}  val  mlm {scores['mlm_loss']:.4f}  "
                   f"accuracy {scores['mlm_accuracy']:.3f}")
        stop = interrupt.due(world)
        if (step % cfg.save_every == 0 and step > start) or last or stop:
            check_finite(world.sum(window.clone()), first, names, folder)
            check_weights(student, step, folder)
            save_checkpoint(folder, {"student": student.state_dict(), "optimizer": optimizer.state_dict(),
                                     "scaler": scaler.state_dict(), "bank": bank.state_dict() if bank else {},
                                     "step": step, "log_lines": log.lines, "hashes": hashes,
                                     "config": asdict(cfg), "model_config": asdict(config)}, world)
        if stop and not last:
            print0(f"{interrupt.reason}: saved step {step} in {folder}; go on with "
                   + ("the same command" if reuse else "--resume"))
            raise SystemExit(0)
        if last:
            break
        clock = clock and clock + time.monotonic() - pause

        # the step's micro-batches, and the items of each term over all ranks: one step on the whole batch
        batches, items = [], torch.zeros(2)
        for micro in range(cfg.grad_accum):
            rows = data.micro_rows(cfg.batch_size, world.rank, world.size, micro, cfg.grad_accum)
            batch = prepare(train, cfg, step, rows)
            items += torch.tensor([len(batch["targets"]), len(batch.get("anchors", rows))])
            batches.append(move(batch, world.device))
            if len(names) > 1:
                teacher(batches[-1])
        if cfg.reduction == "mean":
            masked, anchors = (world.sum(items).clamp(min=1) / world.size).tolist()
            count = {"mlm": masked, "anchors": anchors, "tokens": tokens / world.size,
                     "sequences": cfg.batch_size / world.size}
        else:
            count = dict.fromkeys(("mlm", "tokens", "sequences", "anchors"), 1 / world.size)
        if bank:
            index = train.index(cfg.seed, step, cfg.batch_size, np.arange(cfg.batch_size))
            if step == 0:
                first_rows(student, batches, index, world)
            negatives = bank.draw(step)
            for batch in batches:
                batch["negatives"] = negatives
        if step % cfg.grad_every == 0:
            pause = time.monotonic()
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                norms = gradient_norms(student, batches[0], count, weights)
            log.write(step=step, **{f"gradient_{k}": v for k, v in norms.items()})
            print0(f"step {step:6d}  gradient into the last hidden states: "
                   + "  ".join(f"{k} {v:.1e}" for k, v in norms.items()))
            for name in [k for k, v in norms.items() if v < 0.01 * norms["mlm"]]:
                print0(f"step {step:6d}  {name} sends {norms[name] / norms['mlm']:.1e} of the gradient that "
                       f"mlm does: at --w_{name} {weights[name]:g} it teaches next to nothing; raise it")
            clock = clock and clock + time.monotonic() - pause
        lr = lr_at(step, cfg.lr, cfg.warmup_steps, max_steps)

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

        if bank:
            update_bank(student, index, world)
        step += 1
        if step % cfg.log_every == 0:
            values = world.sum(window.clone()) / world.size  # the window's only read of the device
            check_finite(values, first, names, folder)
            mean = dict(zip(names, values[first % cfg.log_every:].mean(0).tolist()))
            now = time.monotonic()
            speed = (step - first) / (now - clock) if clock else 0.0  # steps a second
            mfu = speed * flops / peak if peak else 0.0
            rate = {"tokens_per_s": speed * tokens, "mfu": mfu} if speed else {}
            log.write(step=step, **mean, lr=lr, grad_norm=norm.item(), **rate,
                      memory_mb=peak_memory_mb(world.device))
            left = (now - began) / (step - start) * (max_steps - step)
            print0(step_line(step, mean, lr, speed, tokens, mfu, left))
            first, clock = step, now

    interrupt.release()
    results = {"objective": cfg.objective, "folder": str(folder), "steps": step, "vocabulary": vocab.hash}
    if world.main:
        save_bert(student.bert, folder / "model", vocab, student.mlm)
    results |= report(student, teacher, text_only, train, val, clips, demo, cfg, world, not reuse)
    results["finished"] = time.time()
    if world.main:
        write_json(folder / "results.json", results)
    print0(f"made {folder}/model in {duration(time.monotonic() - began)}")
    world.barrier()
    return results


if __name__ == "__main__":
    run_script(main, Config, PRESETS)
