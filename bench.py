"""Speed and memory of losses and of training steps, each beside the plain form that it replaces.

    python bench.py                         # 6L-512H, B 32, T 128: under 5 minutes on 2 CPU cores
    python bench.py --only nst,crd --json bench.json
    python bench.py --device cuda --preset base

Let it be alone on the machine. Everything runs in one process: after a warm-up, which is thrown away, the
variants of a section take turns, and the table has their medians and spread. What takes ten seconds or more
is timed once, a released structure's step from its first run on. Before a loss is timed, its value and
gradients are compared with ours. The plain forms are written here, for comparison only. On a CPU, freed
memory goes back to the system, as is the C library's way, but in our whole step, which keeps it as the
scripts do (keep_freed_memory); --kept times the released structure's step this way, too. Fine-tuning
and xdbert keep it, plain and ours.

nst, crd, hinge, soft and voken: forward and backward of one loss (the other losses cost next to nothing).
mlm_head: head and loss. step: teacher forward, student forward and backward, clipping, AdamW, bank; the batch
is in memory. "distillation alone" is its part of the step: heads, losses and bank, forward and backward,
without the teacher. finetune: batch, forward and backward, clipping, AdamW, on examples as long as those of
real tasks. xdbert: forward and backward, clipping, AdamW of adapt_xdbert.py at the paper's shapes, whatever
the flags: BERT-base and ViT-B/32's text tower on 2 texts of 512 words and 9 x 77 of CLIP's tokens, some of
whose 9 segments are empty; the check that both losses are equal is the warm-up. It takes 11 GB. text: packing
a corpus.
"""
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import adapt_xdbert
import finetune
import losses
from common import duration, keyed_integers, keyed_uniform, parse_cli, print0, progress, write_json
from model import (BERT, LANGUAGE, BERTConfig, CLIPConfig, CLIPLayer, CLIPText, CrossAttention, CrossLayer,
                   DistillHead, MLMHead, TaskModel, flops_per_token, param_groups)
from parts.examples import POOL, Order, tokenized
from parts.tasks import TASKS, Rows
from parts.vocab import SPECIALS, Vocab
from prepare.packing import pack_text, train_vocab
from run import init_ranks, keep_freed_memory, move, peak_flops, set_seed


@dataclass(frozen=True)
class Config:
    preset: str = "small"  # small = 6L-512H, base = 12L-768H, teacher and student alike
    only: str = "nst,crd,mlm_head,hinge,soft,voken,step,finetune,xdbert,text"  # sections to run
    # sizes
    batch: int = 32  # B, sequences
    tokens: int = 128  # T, tokens of a sequence
    layers: int = 6  # of teacher and student
    hidden: int = 512  # C = d_s = d_t; heads are 64 wide; three quarters of it for finetune
    vocab: int = 30522  # V, and the K of voken
    anchors: int = 32  # A of crd
    negatives: int = 4096  # N of crd
    dim: int = 128  # E of crd
    rows: int = 1_000_000  # M of crd's bank
    text: str = ""  # a text file to pack; empty = synthetic English-like text
    megabytes: int = 4  # of that text
    # measuring
    rounds: int = 3  # timed rounds of a loss; at most 2 where a run takes half a second or more
    step_rounds: int = 2  # timed rounds of the steps; xdbert has one less
    kept: bool = False  # step: the released structure with freed memory kept, too: 15 GB and half a minute
    threads: int = 0  # CPU threads; 0 = PyTorch's own choice
    device: str = "cpu"  # cpu, cuda or auto
    json: str = ""  # file for the same numbers; empty = none


PRESETS = {"small": {}, "base": dict(layers=12, hidden=768)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKED = 0.15  # share of the tokens at which the masked-language loss is taken
SAMPLES = 2  # samples on which a loop over the batch is timed; its time is scaled to the batch
LOOP = "loop over samples (*)"
USED = (7, 4)  # segments of CLIP's in use in xdbert: what 512 words of plain text take, and about half of it
# Tokens of an example, [CLS] and [SEP] included: quantiles 0, 0.05 .. 1 over GLUE's train.tsv under
# bert-base-uncased's vocabulary, cut at 128. Before them how many batches are timed
LENGTHS = {
    "rte": (4, (13, 29, 33, 37, 40, 43, 45, 47, 50, 53, 56, 59, 62, 67, 72, 85, 103, 120, 128, 128, 128)),
    "sst2": (6, (3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 13, 14, 16, 18, 20, 23, 27, 33, 66)),
    "cola": (4, (4, 6, 7, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 12, 12, 13, 14, 15, 17, 20, 47))}


# ---------------------------------------------------------------------------- plain forms of the losses


def gaussian_broadcast(x, y):
    """x, y (d, T) -> (d, d) kernel, sigma 1, by way of all (d, d, T) differences."""
    return (-(x[:, None] - y[None]).square().sum(-1) / 2).exp()


def poly_broadcast(x, y):
    """x, y (d, T) -> (d, d) kernel, degree 2, no constant, by way of all (d, d, T) products, as released."""
    return (x[:, None] * y[None]).sum(-1).square()


def nst_loop(s, t, kernel, teacher_term=True):
    """Eq. 7, sample by sample; s, t (B, T, d). The released code leaves the teacher's (constant) term out."""
    total = 0.0
    for S, T in zip(s, t):
        S, T = (F.normalize(x, dim=0, eps=1e-6).T for x in (S, T))              # (d, T)
        total = total + kernel(S, S).mean() - 2 * kernel(S, T).mean()
        if teacher_term:
            total = total + kernel(T, T).mean()
    return total / len(s)


def squared_distances(x, y):
    """x, y (B, d, T) -> (B, d, d), by one product."""
    return x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None] - 2 * torch.bmm(x, y.transpose(1, 2))


def nst_batched(s, t, distances):
    """Eq. 7 for the whole batch, gradient by autograd."""
    S, T = (F.normalize(x, dim=1, eps=1e-6).transpose(1, 2) for x in (s, t))    # (B, d, T)

    def kernel(x, y):
        return (-distances(x, y) / 2).exp().mean()
    return kernel(S, S) + kernel(T, T) - 2 * kernel(S, T)


def crd_gather(z_s, z_t, slots, bank, drawn):
    """Eq. 8 as in RepDistiller: every anchor gathers its own negatives, drawn (A, N); exp, then log."""
    A, N = drawn.shape
    total, noise = 0.0, N / bank.rows
    for z, other, rows, log_z in ((z_s, z_t, bank.z_t, bank.log_z[0]), (z_t, z_s, bank.z_s, bank.log_z[1])):
        negatives = rows.index_select(0, drawn.flatten()).view(A, N, -1)
        positive = ((z * other).sum(-1) / bank.tau).exp() / math.exp(log_z)
        negative = (torch.bmm(negatives, z[:, :, None])[..., 0] / bank.tau).exp() / math.exp(log_z)
        negative = negative * (drawn != slots[:, None])
        total = total - (positive / (positive + noise)).log().sum() - (noise / (negative + noise)).log().sum()
    return total / A


def crd_shared(z_s, z_t, slots, bank, negatives):
    """Eq. 8 with negatives (N,) that all anchors share, gradient by autograd."""
    total, positive = 0.0, (z_s * z_t).sum(-1) / bank.tau
    for z, rows, log_z in ((z_s, bank.z_t, bank.log_z[0]), (z_t, bank.z_s, bank.log_z[1])):
        shift = log_z + math.log(len(negatives) / bank.rows)
        scores = z @ rows[negatives].T / bank.tau - shift                       # (A, N)
        scores = scores.masked_fill(slots[:, None] == negatives, -math.inf)
        total = total + F.softplus(shift - positive).sum() + F.softplus(scores).sum()
    return total / len(z_s)


def hinge_loop(h, v, texts):
    """Eq. 3 against all others, pair by pair, for the first `texts` of h (B, T, C); v (B, C), margin 1."""
    total = 0.0
    for b in range(texts):
        own = F.cosine_similarity(h[b], v[b], dim=-1)                           # (T,)
        for c in range(len(v)):
            if c != b:
                total = total + (1 - own + F.cosine_similarity(h[c], v[b], dim=-1)).clamp(min=0).sum()
                total = total + (1 - own + F.cosine_similarity(h[b], v[c], dim=-1)).clamp(min=0).sum()
    return total / (texts * h.shape[1] * (len(v) - 1))


def hinge_batched(h, v):
    """The same for the whole batch by way of a (B, B, T, C) tensor, gradient by autograd."""
    B = len(v)
    cos = F.cosine_similarity(h[:, None], v[None, :, None], dim=-1)             # (B text, B video, T)
    own, others = cos.diagonal().T, ~torch.eye(B, dtype=torch.bool, device=h.device)
    video = (1 - own[:, None] + cos).clamp(min=0)[others].sum()
    text = (1 - own[None] + cos).clamp(min=0)[others].sum()                     # text x' against video v
    return (text + video) / (own.numel() * (B - 1))


def soft_whole(h_s, W_s, b_s, h_t, W_t, b_t, tau=2.0):
    """Eq. 5 through the whole (n, V) logits, gradient by autograd."""
    wanted = ((h_t @ W_t.T + b_t) / tau).softmax(-1)
    return -(wanted * ((h_s @ W_s.T + b_s) / tau).log_softmax(-1)).sum(-1).mean()


def voken_whole(h_s, W, b, h_t, videos):
    """Eq. 9 through the whole (n, K) scores and logits, gradient by autograd."""
    return F.cross_entropy(h_s @ W.T + b, (h_t @ videos.T).argmax(-1))


# ---------------------------------------------------------------------------- the step as released


def split(joined, parts):
    """A linear map of several at once -> each of them, on the same memory."""
    maps = [nn.Linear(joined.in_features, joined.out_features // parts, device="meta") for _ in range(parts)]
    for part, weight, bias in zip(maps, joined.weight.data.chunk(parts), joined.bias.data.chunk(parts)):
        part.weight, part.bias = nn.Parameter(weight), nn.Parameter(bias)
    return maps


class EagerAttention(nn.Module):
    """Attention of model.py the eager way: three maps, a mask that is always added, F.dropout."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.dropout, self.out = attention.heads, attention.dropout, attention.out
        crossed = isinstance(attention, CrossAttention)
        self.maps = nn.ModuleList([attention.query, *split(attention.key_value, 2)] if crossed else
                                  split(attention.qkv, 3))

    def forward(self, x, other, mask=None):
        """x (B, T, C), other (B, S, C'), mask bool, to broadcast to (B, H, T, S), None = all -> (B, T, C)."""
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part, y in zip(self.maps, (x, other, other)))
        unseen = x.new_zeros(1, other.shape[1]) if mask is None else -10_000 * (1 - mask.to(x.dtype))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + unseen
        y = F.dropout(scores.softmax(-1), self.dropout, self.training) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class EagerLayer(nn.Module):
    """model.Layer or model.CLIPLayer the eager way."""

    def __init__(self, layer):
        super().__init__()
        self.attention, self.pre_norm = EagerAttention(layer.attention), isinstance(layer, CLIPLayer)
        self.attention_norm, self.output_norm = layer.attention_norm, layer.output_norm
        self.expand, self.contract = layer.expand, layer.contract

    def forward(self, x, mask=None):
        if self.pre_norm:
            y = self.attention_norm(x)
            x = x + self.attention(y, y, mask)
            y = self.expand(self.output_norm(x))
            return x + self.contract(y * torch.sigmoid(1.702 * y))
        y = F.dropout(self.attention(x, x, mask), self.attention.dropout, self.training)
        x = self.attention_norm(x + y)
        y = F.dropout(self.contract(F.gelu(self.expand(x))), self.attention.dropout, self.training)
        return self.output_norm(x + y)


class EagerCrossLayer(nn.Module):
    """model.CrossLayer the eager way."""

    def __init__(self, half):
        super().__init__()
        self.cross, self.cross_norm = EagerAttention(half.cross), half.cross_norm
        self.layer = EagerLayer(half.layer)

    def forward(self, x, other, mask=None, other_mask=None):
        y = F.dropout(self.cross(x, other, other_mask), self.cross.dropout, self.training)
        return self.layer(self.cross_norm(x + y), mask)


def eager(encoder):
    """A twin of a BERT, CLIPText or CrossEncoder whose layers run the eager way; its weights are the same."""
    twin = copy.copy(encoder)
    twin._modules = {
        name: nn.ModuleList((EagerCrossLayer if isinstance(layer, CrossLayer) else EagerLayer)(layer)
                            for layer in part) if isinstance(part, nn.ModuleList) else part
        for name, part in encoder._modules.items()}
    return twin


def contrast_at(z_s, z_t, temperature=0.5):
    """In-batch NT-Xent at one position, which runs in CRD's place in the released code: z_s, z_t (B, C)."""
    z, B = torch.cat([z_s, z_t]), len(z_s)
    scores = F.cosine_similarity(z[:, None], z[None], dim=-1) / temperature     # by way of (2B, 2B, C)
    scores = scores.masked_fill(torch.eye(2 * B, dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(scores, torch.arange(2 * B, device=z.device).roll(B))


class Released(nn.Module):
    """Student, heads and loss with the released code's structure (VidLanKD at 46bae35).

    Loops over samples (NST, polynomial, d x d x T) and positions (NT-Xent, where the paper has CRD), logits
    at all positions, eager attention, teacher outputs in float32 by way of the CPU. Heads as ours.
    """

    def __init__(self, config):
        super().__init__()
        self.bert = eager(BERT(config))
        self.mlm = MLMHead(config.hidden, self.bert.embeddings.word.weight, std=config.init_std)
        self.nst, self.crd_s, self.crd_t = (DistillHead(config.hidden, config.hidden) for _ in range(3))

    def forward(self, ids, labels, teacher):
        with torch.no_grad():
            h_t = teacher(ids).cpu().to(ids.device)
        h, T = self.bert(ids), ids.shape[1]
        mlm = F.cross_entropy(self.mlm(h).flatten(0, 1), labels.flatten())
        nst = nst_loop(self.nst(h), h_t, poly_broadcast, teacher_term=False)
        z_s, z_t = self.crd_s(h), self.crd_t(h_t)
        return mlm + nst + sum(contrast_at(z_s[:, i], z_t[:, i]) for i in range(T)) / T


class ReleasedXDBERT(nn.Module):
    """The model of XDBERT's released code (ddd08e2), its structure on the weights of an adapt_xdbert.Adapter.

    All segments of CLIP's are run, whether they are empty or not, and all their positions go through the
    cross-modal encoder; masks are added; logits of words and of CLIP's tokens at all positions.
    """

    def __init__(self, ours):
        super().__init__()
        encoder = ours.encoder
        self.language, self.clip, self.cross = map(eager, (encoder.language, encoder.clip, encoder.cross))
        self.pooler, self.mlm, self.match, self.cliptc = encoder.pooler, ours.mlm, ours.match, ours.cliptc

    def forward(self, batch):
        """ids, labels (B, T), clip_ids (B S, L), clip_mask and clip_labels (B, S L), matched (B,) -> loss."""
        h = self.language(batch["ids"])                                         # (B, T, C)
        c = self.clip(batch["clip_ids"]).view(*batch["clip_mask"].shape, -1)    # (B, S L, P)
        h, c = self.cross(h, c, None, batch["clip_mask"])
        matched = self.match(torch.tanh(self.pooler(h[:, 0])))
        return (F.cross_entropy(self.mlm(h).flatten(0, 1), batch["labels"].flatten())
                + F.cross_entropy(self.cliptc(c).flatten(0, 1), batch["clip_labels"].flatten())
                + F.cross_entropy(matched, batch["matched"]))


# ---------------------------------------------------------------------------- our step


class Ours(nn.Module):
    """Student, heads and loss as in distill.py with --objective nst+crd, one anchor token a sequence."""

    def __init__(self, config, bank):
        super().__init__()
        self.bert, self.bank = BERT(config), bank
        self.mlm = MLMHead(config.hidden, self.bert.embeddings.word.weight, std=config.init_std)
        self.nst, self.crd = (DistillHead(config.hidden, config.hidden) for _ in range(2))
        self.f1, self.f2 = (nn.Linear(config.hidden, bank.z_s.shape[1]) for _ in range(2))

    def forward(self, batch, h_t):
        h = self.bert(batch["ids"])
        rows = h.flatten(0, 1)[batch["target_index"]]
        return losses.mlm(self.mlm(rows), batch["targets"]) + self.distil(h, h_t, batch)

    def distil(self, h, h_t, batch):
        """All that distillation adds behind the states h: heads, NST, CRD, the bank's draw and update."""
        z_s, z_t = self.project(h, h_t, batch)
        nst = losses.nst(self.nst(h), h_t, batch["mask"])
        crd = losses.crd(z_s, z_t, batch["slots"], self.bank, self.bank.draw(0))
        self.bank.update(batch["index"], z_s.detach(), z_t.detach())
        return 100 * nst + crd

    def project(self, h, h_t, batch):
        """f_1 and f_2 of the anchors, (A, E) each, of length 1."""
        s, t = (x.flatten(0, 1)[batch["anchors"]] for x in (h, h_t))            # (A, C)
        return tuple(F.normalize(x.float(), dim=-1) for x in (self.f1(self.crd(s)), self.f2(t.to(s.dtype))))


# ---------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def silent_stderr():
    """Nothing reaches file descriptor 2: some versions of torch.profiler log each start and stop there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_mb(run, device):
    """Runs it; the most memory that it held at once, on top of what was there before, in MB (1e6 bytes).

    CUDA: torch.cuda.max_memory_allocated. CPU: every allocation and release of PyTorch's allocator, recorded
    by torch.profiler, added up: exact to the byte, but blind to what MKL or oneDNN take for themselves.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        cpu = torch.profiler.ProfilerActivity.CPU
        with silent_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            run()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in sorted((e for e in events if e.get("name") == "[memory]"),
                                                        key=lambda e: e["ts"])]
    return max(itertools.accumulate(sizes, initial=0)) / 1e6


def seconds(run, device, repeats=1):
    """Mean wall time of a run; by CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def measure(section, variants, device, rounds, warm=()):
    """{name: (run, scale)} -> {name: {ms, low, high, peak_mb}}; the variants take turns in each round.

    scale: whole time of a loop over that of the part which `run` does. The first run is the warm-up and gives
    the memory; short ones get a second, and are repeated to 50 ms a round, or as often as a variant's third
    entry tells. Runs of half a second or more have two rounds at most, of ten seconds or more one. warm:
    names of what was warmed up before, so that its first run is the first round, too.
    """
    results, took, repeats, times = {}, {}, {}, {name: [] for name in variants}
    order = [(first, name) for first in (True, *[False] * rounds) for name in variants]
    for first, name in progress(order, len(order), "run", section):
        run, scale, *fixed = variants[name]
        if first:
            spent = []
            results[name] = {"peak_mb": peak_mb(lambda: spent.append(seconds(run, device)), device)}
            took[name], = spent
            if name in warm:
                times[name].append(1e3 * scale * took[name])
            elif took[name] < 1:
                took[name] = seconds(run, device)
            repeats[name] = sum(fixed) or max(1, round(0.05 / took[name]))
        elif len(times[name]) < (rounds if took[name] < 0.5 else min(rounds, 2 if took[name] < 10 else 1)):
            times[name].append(1e3 * scale * seconds(run, device, repeats[name]))
    return {name: results[name] | {"ms": statistics.median(ms), "low": min(ms), "high": max(ms)}
            for name, ms in times.items()}


def same(what, plain, ours, inputs, tolerance=1e-3):
    """Relative difference of two losses' values and gradients to `inputs`: no ratio of unlike things."""
    (value, *grads), (wanted, *wanted_grads) = ((loss.detach(), *torch.autograd.grad(loss, inputs))
                                                for loss in (plain(), ours()))
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip([value, *grads], [wanted, *wanted_grads]))
    if not worst < tolerance:
        raise SystemExit(f"{what}: plain form and ours differ by {worst:.1e} in value or gradient, allowed "
                         f"are {tolerance:.0e}; a ratio would compare unlike things")
    return f"{what} {worst:.0e}"


def backward(loss, inputs):
    """A run of measure: value and gradients of loss()."""
    return lambda: torch.autograd.grad(loss(), inputs)


def training_step(module, loss, **options):
    """A run of measure: backward of loss(*args), clipping, AdamW of these options."""
    optimizer = torch.optim.AdamW(param_groups(module, 0.01), lr=1e-4, **options)

    def run(*args):
        loss(*args).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return run


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def show(title, rows, checks, out, count=0, unit="tokens"):
    """Prints a section and keeps it in out["table"]. count: units of a run; checks: what `same` found."""
    print0(f"\n{title}")
    for name, row in rows.items():
        rate = row[f"{unit}_per_s"] = 1e3 * count / row["ms"]
        print0(f"  {name:<36}{row['ms']:11.2f}  {row['low']:9.2f} .. {row['high']:<9.2f}"
               + (f"{rate:11,.{0 if unit == 'tokens' else 1}f}" if count else f"{'-':>11}")
               + f"{row['peak_mb']:10.1f}" + (f"{row['ratio']:8.2f}x" if "ratio" in row else ""))
    if checks:
        print0(f"  largest difference from ours in value and gradients: {', '.join(checks)}")
    out["table"][title] = rows


def loss_section(cfg, device, out, title, variants, checks, tokens=0):
    """Measures and shows a loss; the last variant is ours, ratio = how many times its time one takes."""
    rows = measure(title.split(":")[0], variants, device, cfg.rounds)
    for row in rows.values():
        row["ratio"] = row["ms"] / list(rows.values())[-1]["ms"]
    show(title, rows, checks, out, tokens)
    return rows


# ---------------------------------------------------------------------------- sections


def bench_nst(cfg, device, out):
    """NST against the loop over samples, and against cdist and bmm with autograd."""
    B, T, d = cfg.batch, cfg.tokens, cfg.hidden
    s, t = torch.randn(B, T, d, device=device, requires_grad=True), torch.randn(B, T, d, device=device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    few = min(SAMPLES, B)

    def bench(kernel, broadcast, batched):
        def loop():
            return nst_loop(s[:few], t[:few], broadcast)

        def ours(n=B):
            return losses.nst(s[:n], t[:n], mask[:n], kernel)
        variants = {LOOP: (backward(loop, s), B / few)}
        variants |= {name: (backward(loss, s), 1) for name, loss in (batched | {"ours": ours}).items()}
        checks = [same("loop", loop, lambda: ours(few), [s])]
        checks += [same(name, loss, ours, [s]) for name, loss in batched.items()]
        title = f"nst, {kernel} kernel: B {B}, T {T}, d {d}"
        return loss_section(cfg, device, out, title, variants, checks, B * T)

    rows = bench("gaussian", gaussian_broadcast, {
        "cdist + autograd": lambda: nst_batched(s, t, lambda x, y: torch.cdist(x, y).square()),
        "bmm + autograd": lambda: nst_batched(s, t, squared_distances)})
    print0(f"  ours is to hold at most 3 B T d 4 bytes + 32 MB = {3 * B * T * d * 4 / 1e6 + 32:.0f} MB")
    bench("poly", poly_broadcast, {})
    out |= {"nst.ratio_loop": rows[LOOP]["ratio"], "nst.ratio_bmm": rows["bmm + autograd"]["ratio"],
            "nst.peak_mb": rows["ours"]["peak_mb"]}


def full_bank(rows, cfg, device):
    """A bank whose every row is written, with random samples."""
    bank, part = losses.CRDBank(rows, cfg.dim, cfg.negatives, 0.07, 0.0, torch.float32, device, 0), 1 << 10
    for start in range(0, rows, part):  # small parts are faster
        index = np.arange(start, min(start + part, rows))
        bank.update(index, *torch.randn(2, len(index), cfg.dim, device=device))
    return bank


def bench_crd(cfg, device, out):
    """CRD against RepDistiller's gather for each anchor; each draws its negatives; and the bank's update."""
    A, N, M = cfg.anchors, cfg.negatives, cfg.rows
    bank = full_bank(M, cfg, device)
    z = [F.normalize(x, dim=-1).requires_grad_() for x in torch.randn(2, A, cfg.dim, device=device)]
    slots = keyed_integers(M, "bench anchors", np.arange(A))
    slots_there, shared = torch.from_numpy(slots).to(device), torch.from_numpy(bank.draw(0)).to(device)
    bank.set_z(*(x.detach() for x in z), slots, bank.draw(0))

    def gather(drawn):
        return crd_gather(*z, slots_there, bank, drawn)

    def autograd(negatives):
        return crd_shared(*z, slots_there, bank, negatives)

    def ours():
        return losses.crd(*z, slots, bank, bank.draw(0))
    checks = [same("gather", lambda: gather(shared.expand(A, N)), ours, z),
              same("one gather + autograd", lambda: autograd(shared), ours, z)]

    def drawn(*shape):
        return torch.randint(M, shape, device=device)
    title = f"crd: {A} anchors, N {N}, E {cfg.dim}, M {M:,}, negatives drawn each time"
    rows = loss_section(cfg, device, out, title, {
        "gather for each anchor + bmm": (backward(lambda: gather(drawn(A, N)), z), 1),
        "one gather + autograd": (backward(lambda: autograd(drawn(N)), z), 1),
        "ours": (backward(ours, z), 1)}, checks)

    # other rows each time, as in training: the same ones would come from the cache
    def update(bank):
        touched = [keyed_integers(bank.rows, "bench update", i, np.arange(A)) for i in range(256)]
        touched = itertools.cycle(touched)
        return lambda: bank.update(next(touched), z[0].detach(), z[1].detach())
    small = max(A, cfg.batch, M // 100)
    updates = loss_section(cfg, device, out, f"crd: the bank's update of {A} rows", {
        f"M {small:,}": (update(full_bank(small, cfg, device)), 1), f"M {M:,}": (update(bank), 1)}, [])
    out |= {"crd.ratio_gather": rows["gather for each anchor + bmm"]["ratio"]}
    out |= {f"crd.update_ms.{m}": updates[f"M {m:,}"]["ms"] for m in (small, M)}


def bert_config(cfg):
    return BERTConfig(vocab_size=cfg.vocab, layers=cfg.layers, hidden=cfg.hidden,
                      heads=max(1, cfg.hidden // 64), intermediate=4 * cfg.hidden,
                      max_positions=max(512, cfg.tokens))


def make_batch(cfg, device):
    """A batch as distill.py makes it: ids, 15 % targets, and one anchor token of each sequence."""
    B, T = cfg.batch, cfg.tokens
    place = np.arange(B * T)
    index = torch.from_numpy(np.flatnonzero(keyed_uniform("bench targets", place) < MASKED))
    ids = torch.from_numpy(keyed_integers(cfg.vocab, "bench ids", place)).view(B, T)
    labels = torch.full((B * T,), -100).index_copy(0, index, ids.flatten()[index]).view(B, T)
    sample = keyed_integers(cfg.rows, "bench samples", np.arange(B))
    batch = {"ids": ids, "mask": torch.ones(B, T, dtype=torch.bool), "labels": labels, "target_index": index,
             "targets": ids.flatten()[index],
             "anchors": torch.from_numpy(np.arange(B) * T + keyed_integers(T, "bench anchors", np.arange(B)))}
    return {name: x.to(device) for name, x in batch.items()} | {"index": sample, "slots": sample % cfg.rows}


def bench_mlm_head(cfg, device, out):
    """Masked-word head and loss at all positions against the masked ones."""
    config, batch = bert_config(cfg), make_batch(cfg, device)
    h = torch.randn(cfg.batch, cfg.tokens, cfg.hidden, device=device, requires_grad=True)
    head = MLMHead(cfg.hidden, nn.Parameter(0.02 * torch.randn(cfg.vocab, cfg.hidden))).to(device)
    inputs = [h, *head.parameters()]

    def everywhere():
        return F.cross_entropy(head(h).flatten(0, 1), batch["labels"].flatten())

    def ours():
        return losses.mlm(head(h.flatten(0, 1)[batch["target_index"]]), batch["targets"])
    tokens, masked = cfg.batch * cfg.tokens, len(batch["targets"])
    title = f"mlm_head: {tokens} positions, {masked} of them masked, C {cfg.hidden}, V {cfg.vocab}"
    rows = loss_section(cfg, device, out, title, {
        "logits at all positions": (backward(everywhere, inputs), 1), "ours": (backward(ours, inputs), 1)},
        [same("all positions", everywhere, ours, inputs)], tokens)
    out["mlm_head.ratio_all"] = rows["logits at all positions"]["ratio"]


def bench_hinge(cfg, device, out):
    """The teacher's contrastive loss against the loop over pairs, and against one broadcast with autograd."""
    B, T, C = cfg.batch, cfg.tokens, cfg.hidden
    h, v = (torch.randn(shape, device=device, requires_grad=True) for shape in ((B, T, C), (B, C)))
    mask = torch.ones(B, T, dtype=torch.bool, device=device)

    def batched():
        return hinge_batched(h, v)

    def ours():
        return losses.hinge_all(h, v, mask)
    few, four = min(SAMPLES, B), (h[:4], v[:4])
    checks = [same("loop", lambda: hinge_loop(*four, len(four[1])),
                   lambda: losses.hinge_all(*four, mask[:4]), [h, v]),
              same("broadcast", batched, ours, [h, v])]
    loss_section(cfg, device, out, f"hinge, all negatives: B {B}, T {T}, C {C}", {
        LOOP: (backward(lambda: hinge_loop(h, v, few), [h, v]), B / few),
        "B x B x T x C broadcast + autograd": (backward(batched, [h, v]), 1),
        "ours": (backward(ours, [h, v]), 1)}, checks, B * T)


def bench_soft(cfg, device, out):
    """Soft labels through whole logits against chunks; a quarter of the batch."""
    n, C, V = max(1, cfg.batch * cfg.tokens // 4), cfg.hidden, cfg.vocab
    (h_s, h_t), (W_s, W_t) = torch.randn(2, n, C, device=device), 0.02 * torch.randn(2, V, C, device=device)
    b_s, b_t = torch.zeros(2, V, device=device)
    inputs = [x.detach().requires_grad_() for x in (h_s, W_s, b_s)]

    def whole():
        return soft_whole(*inputs, h_t, W_t, b_t)

    def ours():
        return losses.soft(*inputs, h_t, W_t, b_t)
    loss_section(cfg, device, out, f"soft: {n} tokens, C {C}, V {V}", {
        "whole logits + autograd": (backward(whole, inputs), 1), "ours": (backward(ours, inputs), 1)},
        [same("whole", whole, ours, inputs)], n)


def bench_voken(cfg, device, out):
    """Vokens through whole scores and logits against chunks; a quarter of the batch, K = V."""
    n, C, K = max(1, cfg.batch * cfg.tokens // 4), cfg.hidden, cfg.vocab
    (h_s, h_t), (W, videos) = torch.randn(2, n, C, device=device), torch.randn(2, K, C, device=device)
    videos = F.normalize(videos, dim=-1)
    inputs = [x.detach().requires_grad_() for x in (h_s, 0.02 * W, torch.zeros(K, device=device))]

    def whole():
        return voken_whole(*inputs, h_t, videos)

    def ours():
        return losses.voken(*inputs, h_t, videos)
    loss_section(cfg, device, out, f"voken: {n} tokens, C {C}, K {K}", {
        "whole scores + autograd": (backward(whole, inputs), 1), "ours": (backward(ours, inputs), 1)},
        [same("whole", whole, ours, inputs)], n)


def bench_step(cfg, device, out):
    """The whole distillation step, nst+crd: released structure in float32, ours in float32 and bfloat16."""
    config, batch, bank = bert_config(cfg), make_batch(cfg, device), full_bank(cfg.rows, cfg, device)
    B, T, C, N, E = cfg.batch, cfg.tokens, cfg.hidden, cfg.negatives, cfg.dim
    teachers = {"fp32": BERT(config).to(device).eval().requires_grad_(False)}
    teachers["bf16"] = copy.deepcopy(teachers["fp32"]).to(torch.bfloat16)
    teachers["eager"] = eager(teachers["fp32"]).eval()
    h_t, h_eager = teachers["fp32"](batch["ids"]), teachers["eager"](batch["ids"])
    worst = ((h_t - h_eager).norm() / h_t.norm()).item()
    if not worst < 1e-3:
        raise SystemExit(f"step: eager and our states differ by {worst:.1e}; no ratio of unlike things")

    def kept(run):
        """The same with freed memory kept, as the scripts do on a CPU."""
        def run_kept():
            keep_freed_memory(device.type == "cpu")
            run()
            keep_freed_memory(False)
        return run_kept

    def ours(teacher, dtype):
        """The step, and what distillation alone adds to it."""
        student = Ours(config, bank).to(device).train()
        if bank.log_z is None:
            with torch.no_grad():
                bank.set_z(*student.project(h_t, h_t, batch), batch["slots"], bank.draw(0))

        def cast(run):
            with autocast(device, dtype):
                return run()
        with torch.no_grad():
            h, states = cast(lambda: student.bert(batch["ids"])), teacher(batch["ids"])
        kd = [p for part in (student.nst, student.crd, student.f1, student.f2) for p in part.parameters()]
        alone = backward(lambda: cast(lambda: student.distil(h, states, batch)), [h.requires_grad_(), *kd])
        run = training_step(student, lambda: cast(lambda: student(batch, teacher(batch["ids"]))), fused=True)
        return (kept(run), 1), (alone, 1)

    released = Released(config).to(device).train()
    step = training_step(
        released, lambda: released(batch["ids"], batch["labels"], teachers["eager"]), foreach=False)
    name = "released structure, fp32"
    variants = {name: (step, 1)}
    for key, dtype in DTYPES.items():
        variants[f"ours, {key}"], variants[f"distillation alone, {key}"] = ours(teachers[key], dtype)
    # half a minute, whose first 0.1 s goes into AdamW's moments; the teacher above was its warm-up
    rows = measure("step", variants, device, cfg.step_rounds, warm=[name])
    if cfg.kept:  # last: what it leaves in the process would speed up the others
        rows |= measure("step", {"the released, freed memory kept": (kept(step), 1)}, device, 1)
    for key in (key for key in rows if not key.startswith("distillation")):
        rows[key]["ratio"] = rows[name]["ms"] / rows[key]["ms"]
    show(f"step: {cfg.layers}L-{C}H, B {B}, T {T}, V {cfg.vocab}, nst+crd; ratio = speed-up over released",
         rows, [f"eager hidden states {worst:.0e}"], out, B * T)
    print0("  the released code runs NT-Xent over positions in CRD's place: another loss, not compared")

    # floating-point operations a token; NST: T x d times d x d, d x 2d and 2d x d
    forward = flops_per_token(config, T)
    mlm = 3 * (flops_per_token(config, T, MASKED) - forward)
    parts = {"teacher": forward, "student": 3 * forward, "MLM": mlm,
             "heads": 12 * C * C + (12 * C * C + 12 * C * E) / T, "NST": 10 * C * C, "CRD": 8 * N * E / T}
    parts["all"] = flops = sum(parts.values())
    print0("  MFLOP a token: " + ", ".join(f"{name} {value / 1e6:.1f}" for name, value in parts.items()))
    for key, dtype in DTYPES.items():
        row, peak, rate = rows[f"ours, {key}"], peak_flops(device, dtype), matmul_flops(device, dtype)
        share = rows[f"distillation alone, {key}"]["ms"] / row["ms"]
        out |= {f"step.ratio_{key}": row["ratio"], f"step.kd_share_{key}": share}
        mfu = 100 * flops * row["tokens_per_s"] / peak if peak else math.nan
        print0(f"  {key}: distillation is {100 * share:.1f} % of the step; "
               f"MFU {mfu:.0f} % of {peak / 1e12:.3g} TFLOP/s; "
               f"floor {1e3 * B * T * flops / rate:.3g} ms\n        = {rate / flops:,.0f} tokens/s "
               f"({0.4 * rate / flops:,.0f} at 40 %) at the {rate / 1e12:.3g} TFLOP/s of one large product")
    out["step.kd_share"] = max(out["step.kd_share_fp32"], out["step.kd_share_bf16"])


def matmul_flops(device, dtype):
    """FLOP/s of one large square product, measured: what the floor is counted against."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    a @ a
    return 2 * n ** 3 / min(seconds(lambda: a @ a, device) for _ in range(8))


def made_examples(task, lengths, cfg):
    """finetune.Examples of random words, `lengths` (n,) tokens each; a pair's second text has a quarter."""
    vocab = Vocab([*SPECIALS, *(f"w{i}" for i in range(len(SPECIALS), cfg.vocab))])
    n, pair = len(lengths), len(task.text) == 2
    words = iter(keyed_integers(cfg.vocab, "bench words", np.arange(lengths.sum())).tolist())
    second = (lengths - 3) // 4 * pair

    def texts(sizes):
        return [" ".join(f"w{i}" for i in itertools.islice(words, size)) for size in sizes]
    rows = Rows(texts(lengths - 2 - pair - second), texts(second) if pair else None,
                         keyed_integers(2, "bench labels", np.arange(n)), [""] * n)
    return tokenized(task, rows, vocab, cfg.tokens)


def bench_finetune(cfg, device, out):
    """Training steps of fine-tuning: every example padded to T tokens against batches of like lengths."""
    if cfg.tokens < 5 or cfg.vocab < 10:
        raise SystemExit(f"--tokens {cfg.tokens} --vocab {cfg.vocab}: finetune needs at least 5 tokens and a "
                         "vocabulary of 10; raise them or leave it out of --only")
    B, T, pool = cfg.batch, cfg.tokens, POOL
    config = bert_config(replace(cfg, hidden=64 * max(1, 3 * cfg.hidden // 256)))  # 6L-384H: MiniLM's
    model = TaskModel(BERT(config, pooler=True), "classify", 2).to(device).eval()
    objective, parameters = finetune.Objective(model), list(model.parameters())

    def padded(batch):
        """All sequences T long; [PAD], False and segment 0 are zeros."""
        return {name: x if name == "labels" else F.pad(x, (0, T - x.shape[1])) for name, x in batch.items()}

    def loss(batch, dtype=torch.float32):
        with autocast(device, dtype):
            return sum(objective(move(batch, device), B).values())

    batches, lengths, checks, n = {}, [], [], B * pool
    for name, (count, quantiles) in LENGTHS.items():
        tokens = np.interp((np.arange(n) + 0.5) / n, np.linspace(0, 1, len(quantiles)), quantiles)
        examples = made_examples(TASKS[name], tokens.round().astype(np.int64), cfg)
        order = Order(examples.lengths, B, pool, 0)
        every = [order(i) for i in range(pool)]
        longest = np.array([examples.lengths[index].max() for index in every])
        # the longest first; in each of `count` equal parts the middle one: about the mean length of all
        timed = np.argsort(-longest, kind="stable")[(2 * np.arange(count) + 1) * pool // (2 * count) - 1]
        batches[name] = [partial(examples.batch, every[i]) for i in timed]
        lengths.append(f"{name} {longest[timed].mean():.1f} ({longest.mean():.1f})")
        few = examples.batch(np.arange(4) * n // 4)
        with losses.no_tf32():
            checks.append(same(name, lambda: loss(padded(few)), lambda: loss(few), parameters))

    # one model and optimizer for all, so that no variant's state grows into memory that another one keeps
    step = training_step(model.train(), lambda make, dtype: loss(make(), dtype), fused=True)
    variants = {}

    def steps(makers, dtype):
        """A variant of measure: finetune.py's training step on the batches that `makers` return, in turn."""
        turn = itertools.cycle(makers)
        return lambda: step(next(turn), dtype), 1, len(makers)
    for key, dtype in DTYPES.items():
        # when padded to T, a batch costs the same whatever its task
        variants[f"all padded to {T}, {key}"] = steps([lambda: padded(batches["rte"][0]())], dtype)
        variants |= {f"ours, {name}, {key}": steps(makers, dtype) for name, makers in batches.items()}
    keep_freed_memory(device.type == "cpu")  # for all of them, as the script does
    rows = measure("finetune", variants, device, cfg.step_rounds)
    keep_freed_memory(False)
    for key in DTYPES:
        for name in batches:
            row, plain = rows[f"ours, {name}, {key}"], rows[f"all padded to {T}, {key}"]
            out[f"finetune.ratio_{key}.{name}"] = row["ratio"] = plain["ms"] / row["ms"]
    show(f"finetune: {cfg.layers}L-{config.hidden}H, B {B}, V {cfg.vocab}; examples/s, not tokens/s; ratio = "
         "speed-up over padding", rows, checks, out, B, "examples")
    print0(f"  mean length of the batches timed (of a pool of {pool}): {', '.join(lengths)}")
    for name in batches:
        out[f"finetune.bf16.{name}"] = rows[f"ours, {name}, fp32"]["ms"] / rows[f"ours, {name}, bf16"]["ms"]
    print0("  bf16 over fp32, both ours: "
           + ", ".join(f"{name} {out[f'finetune.bf16.{name}']:.2f}x" for name in batches))


def made_pairs(language, clip, T, S, used, device):
    """Two texts as (batch of ReleasedXDBERT, the same as a batch of adapt_xdbert.Adapter).

    T words; `used` of CLIP's S segments are full, the others empty; 15 % of words and tokens are targets.
    """
    B, L, R = 2, clip.positions, used * clip.positions
    words = torch.from_numpy(keyed_integers(language.vocab_size, "bench ids", np.arange(B * T)))
    tokens = torch.from_numpy(keyed_integers(clip.vocab_size, "bench tokens", np.arange(B * R)))
    target, clip_target = (torch.from_numpy(keyed_uniform(key, np.arange(n)) < MASKED)
                           for key, n in (("bench targets", B * T), ("bench clip targets", B * R)))
    place = torch.arange(B * R)
    clip_target &= (place % L > 0) & (place % L < L - 1)  # never start or end
    ours = {"inputs": words.view(B, T), "mlm_index": target.nonzero()[:, 0], "mlm_targets": words[target],
            "match_targets": torch.arange(B) % 2, "clip_ids": tokens.view(-1, L),
            "clip_place": place.view(B, R), "clip_mask": torch.ones(B, R, dtype=torch.bool),
            "cliptc_index": clip_target.nonzero()[:, 0], "cliptc_targets": tokens[clip_target]}
    clip_labels, empty = tokens.where(clip_target, torch.tensor(-100)).view(B, R), (0, S * L - R)
    released = {"ids": ours["inputs"], "labels": words.where(target, torch.tensor(-100)).view(B, T),
                "clip_ids": F.pad(tokens.view(B, R), empty).view(-1, L),
                "clip_mask": F.pad(ours["clip_mask"], empty),
                "clip_labels": F.pad(clip_labels, empty, value=-100), "matched": ours["match_targets"]}
    return move(released, device), move(ours, device)


def bench_xdbert(cfg, device, out, language=LANGUAGE["bert-base"], clip=CLIPConfig(), T=512, S=9):
    """A step of adapt_xdbert.py at the paper's shapes, two texts: the released structure against ours."""
    model = adapt_xdbert.Adapter(adapt_xdbert.Config(), BERT(language, pooler=True), CLIPText(clip), None)
    plain = ReleasedXDBERT(model.to(device))  # where the weights lie: it shares their memory
    pairs = {used: made_pairs(language, clip, T, S, used, device) for used in USED}

    def released(batch, dtype=torch.float32):
        with autocast(device, dtype):
            return plain(batch)

    def ours(batch, dtype=torch.float32):
        with autocast(device, dtype):
            return sum(model(batch, {name: len(batch[f"{name}_targets"]) for name in model.names}).values())
    keep_freed_memory(device.type == "cpu")  # for all of them, as the script does
    plain.eval(), model.eval()
    both, checks = set(plain.parameters()), []  # all but the maps that one has joined
    inputs = [p for p in model.parameters() if p in both and p.requires_grad]
    with losses.no_tf32():
        for used, (theirs, batch) in pairs.items():
            checks.append(same(f"{used} of {S}", lambda: released(theirs), lambda: ours(batch), inputs))
            inputs = list(model.match.parameters())  # all gradients once are enough: they take a whole step
    plain.train(), model.train()

    # the check was fp32's warm-up, but for AdamW's moments; one optimizer serves both dtypes
    step, our_step = training_step(plain, released, foreach=False), training_step(model, ours, fused=True)
    for run, batch in zip((step, our_step), made_pairs(language, clip, T // 8, 1, 1, device)):
        run(batch)
    variants = {}
    for key, dtype in DTYPES.items():
        # it runs the empty segments, too: their number changes nothing
        variants[f"released structure, {key}"] = partial(step, pairs[USED[0]][0], dtype), 1
        for used in USED:
            variants[f"ours, {used} of {S} segments, {key}"] = partial(our_step, pairs[used][1], dtype), 1
    fp32 = [name for name in variants if name.endswith("fp32")]
    rows = measure("xdbert", variants, device, max(1, cfg.step_rounds - 1), warm=fp32)
    keep_freed_memory(False)
    for row in rows.values():
        row["ratio"] = rows["released structure, fp32"]["ms"] / row["ms"]
    show(f"xdbert: {language.layers}L-{language.hidden}H, CLIP {clip.layers}L-{clip.hidden}H, B 2, T {T} and "
         f"{S} x {clip.positions}; ratio = speed-up over released, fp32", rows, checks, out, 2 * T)
    for used in USED:
        fp32, bf16 = (rows[f"ours, {used} of {S} segments, {key}"] for key in DTYPES)
        found = {"empty": 1 - used / S, "ratio_fp32": fp32["ratio"], "ratio_bf16": bf16["ratio"],
                 "ratio_bf16_equal": rows["released structure, bf16"]["ms"] / bf16["ms"]}
        out |= {f"xdbert.{name}.{used}": value for name, value in found.items()}
        print0(f"  {used} of {S} segments in use, {100 * found['empty']:.0f} % empty: "
               f"{found['ratio_fp32']:.2f}x in fp32, {found['ratio_bf16_equal']:.2f}x in bf16, "
               f"{found['ratio_bf16']:.2f}x ours bf16 over released fp32")


def write_text(path, size):
    """About `size` bytes with the word frequencies of English: rank r has 1 / ((r + 2.7) (1 + r / 12000)).

    That is Zipf's law, steeper in the tail: in 2.6 M words 90,000 different ones, and the first 10,000 cover
    92 %; in 14 MB of Wikipedia it is 91,000 and 91 %. A packer that remembers words gains on both alike.
    """
    syllables = [c + v for c in "bdfghklmnprstvwz" for v in "aeiou"]
    rank = np.arange(500_000)
    share = np.cumsum(1 / (rank + 2.7) / (1 + rank / 12_000))
    words = np.searchsorted(share / share[-1], keyed_uniform("bench text", np.arange(size // 5)))
    names = {}
    for r in np.unique(words).tolist():
        name, rest = syllables[r % 80], r // 80
        while rest:
            name, rest = name + syllables[rest % 80], rest // 80
        names[r] = name
    text = [names[r] for r in words.tolist()]
    with open(path, "w") as f:
        for start in range(0, len(text), 18):  # sentences of 18 words, documents of 10 sentences
            first, second = (" ".join(text[a:a + 9]) for a in (start, start + 9))
            f.write(f"{first.capitalize()}, {second}.\n" + "\n" * (start % 180 == 162))


def bench_text(cfg, device, out):
    """data.py text, which remembers the ids of words, against plain encode_batch, on the first megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.txt"
        if cfg.text:
            with open(cfg.text, "rb") as f:
                source.write_bytes(f.read(cfg.megabytes * 10 ** 6).decode(errors="ignore").encode())
        else:
            write_text(source, cfg.megabytes * 10 ** 6)
        size = source.stat().st_size
        print0(f"\ntext: {cfg.text or 'synthetic English'}, {size / 1e6:.1f} MB")
        vocab = train_vocab([source], Path(folder) / "vocab.txt", cfg.vocab)
        lines, start = source.read_text().splitlines(), time.perf_counter()
        for i in progress(range(0, len(lines), 1000), None, "batch", "encode_batch"):
            vocab.encode(lines[i:i + 1000])
        plain = size / 1e6 / (time.perf_counter() - start)
        packed = pack_text([source], vocab, Path(folder) / "text.h5")["mb_per_s"]
    print0(f"  encode_batch {plain:.1f} MB/s; data.py text {packed:.1f} MB/s = {packed / plain:.1f}x")
    out |= {"text.mb_per_s": packed, "text.encode_batch_mb_per_s": plain}


# ---------------------------------------------------------------------------- main


SECTIONS = {"nst": bench_nst, "crd": bench_crd, "mlm_head": bench_mlm_head, "hinge": bench_hinge,
            "soft": bench_soft, "voken": bench_voken, "step": bench_step, "finetune": bench_finetune,
            "xdbert": bench_xdbert, "text": bench_text}


def machine(device):
    """What the figures depend on, in one line."""
    cpu, flags = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        cpu, flags = info.get("model name", cpu), info.get("flags", "")
    amx = "with AMX" if "amx_bf16" in flags else "no AMX (bf16 gains less)"
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return (f"{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, {amx}; torch {torch.__version__}")


def main(cfg):
    """Runs the sections of cfg.only, prints the table; returns {number's name: value, "table": every row}."""
    chosen = cfg.only.split(",")
    if not set(chosen) <= set(SECTIONS):
        raise SystemExit(f"--only {cfg.only}: write some of {','.join(SECTIONS)}")
    for name in ("batch", "tokens", "layers", "hidden", "vocab", "anchors", "negatives", "dim", "rows",
                 "rounds", "step_rounds", "megabytes"):
        if getattr(cfg, name) < 1:
            raise SystemExit(f"--{name} {getattr(cfg, name)}: must be 1 or more")
    if cfg.batch < 2 or cfg.rows < max(cfg.batch, cfg.anchors):
        raise SystemExit(f"--batch {cfg.batch} --rows {cfg.rows}: at least 2 sequences, and a row for each "
                         f"of them and of --anchors {cfg.anchors}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device, start = init_ranks(cfg.device).device, time.monotonic()
    keep_freed_memory(False)  # plain and ours under the C library's own policy; the steps as the scripts run
    set_seed(0, 0)
    print0(machine(device))
    print0(f"{'median of the rounds':<38}{'ms':>11}  {'min':>9} .. {'max':<9}{'tokens/s':>11}{'peak MB':>10}"
           f"{'ratio':>9}")
    print0(f"(*) timed on {SAMPLES} samples and scaled to the batch; memory of these {SAMPLES}")
    print0("peak MB: on top of weights and inputs, in the first run (that of step: AdamW's moments too), by "
           + ("torch.cuda.max_memory_allocated" if device.type == "cuda" else "torch.profiler"))
    out = {"machine": machine(device), "table": {}}
    for name in chosen:
        # losses.py computes without TF32, so its plain forms do; the steps as the scripts run them
        with contextlib.nullcontext() if name in ("step", "finetune", "xdbert") else losses.no_tf32():
            SECTIONS[name](cfg, device, out)
    print0(f"\n{duration(time.monotonic() - start)}")
    if cfg.json:
        write_json(cfg.json, out)
    return out


if __name__ == "__main__":
    main(parse_cli(Config, PRESETS))
