"""Speed and memory of losses and of training steps, each beside the plain form that it replaces.

    python bench.py                         # 6L-512H, B 32, T 128: under 4 minutes on 2 CPU cores
    python bench.py --only nst,crd --json bench.json
    python bench.py --device cuda --preset base

Leave the machine alone meanwhile. The plain forms are in benches/plain.py, for comparison only. The same
rules hold for them and for ours. Before a form is timed, its value and gradients are compared with ours on a
few samples; that warms it up. A first run gives the memory. If it takes 2 seconds or more on a CPU, it is
also the only round; else it is thrown away, and the forms of a section take turns. On a CPU, freed memory
goes back to the system, as is the C library's way, but our whole step keeps it as the scripts do
(keep_freed_memory); --kept times the released structure's step this way, too. Fine-tuning and xdbert keep it,
plain and ours.

nst, crd, hinge: forward and backward of one loss (the others cost next to nothing). mlm_head: head and loss.
step: teacher forward, student forward and backward, clipping, AdamW, bank; the batch is in memory.
"distillation alone" is its part of the step: heads, losses and bank, forward and backward, no teacher.
finetune: batch, forward and backward, clipping, AdamW, on examples as long as those of real tasks. xdbert: a
step of adapt_xdbert.py at the paper's shapes, whatever the flags: BERT-base and ViT-B/32's text tower on 2
texts of 512 words and 9 x 77 of CLIP's tokens, some of whose 9 segments are empty; 11 GB. text: packing.

Only where --only names them: feed, whether the CPU makes batches as fast as a GPU eats them. scale, how time
and memory grow, 3 minutes. launches, operators of a loss. gpu, the step at the papers' shapes, part by part:

    python bench.py --device cuda --only gpu,launches --batch 256
"""
import contextlib
import copy
import itertools
import math
import os
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import adapt_xdbert
import distill
import finetune
import losses
from common import (duration, keyed_integers, keyed_uniform, one_line_end, parse_cli, print0, table,
                    write_json)
from benches.feed import bench_feed, made_vocab
from benches.plain import (DISTANCES, KERNELS, Released, ReleasedXDBERT, crd_gather, crd_shared, eager,
                           hinge_batched, hinge_loop, nst_batched, nst_loop)
from benches.scale import bench_scale
from data import masked_words
from model import (BERT, BERTConfig, CLIPConfig, CLIPText, MLMHead, TaskModel, model_config, param_groups)
from parts.examples import POOL, tokenized
from parts.machine import Ranks, flops_per_token, init_ranks, keep_freed_memory, move, peak_flops
from parts.tasks import TASKS, Rows
from parts.vocab import SPECIALS, Vocab
from prepare.packing import pack_text, train_vocab
from run import out_of_memory, set_seed


@dataclass(frozen=True)
class Config:
    preset: str = "small"  # small = 6L-512H, base = 12L-768H
    only: str = "nst,crd,mlm_head,hinge,step,finetune,xdbert,text"  # sections to run
    # sizes
    batch: int = 32  # B, sequences
    tokens: int = 128  # T, tokens of a sequence
    model: str = "6L-512H"  # shape of teacher and student alike, C = d_s = d_t; finetune's is 3/4 as wide
    vocab: int = 30522  # V
    anchors: int = 32  # A of crd
    negatives: int = 4096  # N of crd
    dim: int = 128  # E of crd
    rows: int = 1_000_000  # M of crd's bank
    # measuring
    rounds: int = 3  # timed rounds; at most 2 where a run takes half a second, 1 where it takes 2 seconds
    kept: bool = False  # step: the released structure with freed memory kept, too: 15 GB and half a minute
    device: str = "cpu"  # cpu, cuda or auto
    json: str = ""  # file for the same numbers; empty = none

    def __post_init__(self):
        if self.device not in ("cpu", "cuda", "auto"):
            raise ValueError(f"--device {self.device}: times are taken on cpu or cuda")
        if not set(self.only.split(",")) <= set(SECTIONS):
            raise ValueError(f"--only {self.only}: write some of {','.join(SECTIONS)}")
        for name, (least, most) in dict(batch=(2, 10 ** 4), tokens=(5, 10 ** 4), vocab=(10, 10 ** 6),
                                        anchors=(1, 10 ** 4), negatives=(1, 10 ** 6), dim=(1, 10 ** 4),
                                        rounds=(1, 10 ** 3),
                                        rows=(max(self.batch, self.anchors), 10 ** 8)).items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"--{name} {getattr(self, name)}: must be from {least} to {most:,}")
        if not Path(self.json).parent.is_dir():
            raise ValueError(f"--json {self.json}: its folder does not exist; make it first")
        model_config(self.model, self.vocab)


PRESETS = {"small": {}, "base": dict(model="12L-768H")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKED = 0.15  # share of the tokens at which the masked-language loss is taken
SAMPLES = 2  # samples on which a loop over the batch is timed; its time is scaled to the batch
LOOP = "loop over samples (*)"
PAPERS = ("6L-512H", "12L-768H")  # shapes of the papers' students, which gpu measures
USED = (7, 4)  # segments of CLIP's in use in xdbert: what 512 words of plain text take, and about half of it
# Tokens of an example, [CLS] and [SEP] included: quantiles 0, 0.05 .. 1 over GLUE's train.tsv under
# bert-base-uncased's vocabulary, cut at 128
LENGTHS = {
    "rte": (13, 29, 33, 37, 40, 43, 45, 47, 50, 53, 56, 59, 62, 67, 72, 85, 103, 120, 128, 128, 128),
    "sst2": (3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 13, 14, 16, 18, 20, 23, 27, 33, 66),
    "cola": (4, 6, 7, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 12, 12, 13, 14, 15, 17, 20, 47)}
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some versions of the profiler print each start and stop


# ---------------------------------------------------------------------------- measuring


def cpu():
    """(name, set of the names of its instruction sets), as the system and PyTorch tell them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return (info.get("model name", platform.processor() or platform.machine()),
            {*info.get("flags", info.get("Features", "")).split(), *(name for name in known if known[name])})


def kinds_of(device):
    """Names of the rows' dtypes. A CPU without bf16 instructions would take minutes for a step in bf16."""
    bf16 = device.type == "cuda" or any("bf16" in name for name in cpu()[1])
    return ["fp32", "bf16"] if bf16 else ["fp32"]


def autocast(device, kind):
    return torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16")


def seconds(run, device, repeats=1):
    """Mean wall time of a run."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


def first_run(run, device):
    """(seconds, MB) of a run: MB (1e6 bytes) is the most memory held at once, on top of what was held before.

    CUDA: torch.cuda.max_memory_allocated. CPU: every allocation and release of PyTorch's allocator, as its
    profiler records them, added up: exact to the byte, but blind to what MKL or oneDNN take for themselves.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return seconds(run, device), (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        took = seconds(run, device)
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return took, max(itertools.accumulate(sizes, initial=0)) / 1e6


def measure(forms, device, rounds, scale={}):
    """{name: run} -> {name: {ms, low, high, peak_mb}}. Short runs are repeated to 50 ms a round.

    scale: {name: whole time over that of the part which the run does}, where it is not 1.
    """
    rows, times, plan = {}, {}, {}
    for name, run in forms.items():
        took, peak = first_run(run, device)
        on_cpu = device.type == "cpu"  # a GPU's first run loads kernels
        rows[name], times[name] = {"peak_mb": peak}, [took] if took >= 2 and on_cpu else []
        if took < 0.5 or not on_cpu:
            took = seconds(run, device)
        plan[name] = (0 if times[name] else rounds if took < 0.5 else min(rounds, 2),
                      max(1, round(0.05 / took)))
    for i in range(rounds):
        for name, (count, repeats) in plan.items():
            if i < count:
                times[name].append(seconds(forms[name], device, repeats))
    for name, row in rows.items():
        ms = [1e3 * scale.get(name, 1) * took for took in times[name]]
        row |= {"ms": float(np.median(ms)), "low": min(ms), "high": max(ms)}
    return rows


def same(what, plain, ours, inputs, tolerance=1e-3):
    """Compares two losses and their gradients to `inputs`: a ratio must not compare unlike things."""
    (value, *grads), (wanted, *wanted_grads) = ((loss.detach(), *torch.autograd.grad(loss, inputs))
                                                for loss in (plain(), ours()))
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip([value, *grads], [wanted, *wanted_grads]))
    if not worst < tolerance:
        raise SystemExit(f"{what}: plain form and ours differ by {worst:.1e} in value or gradient, allowed "
                         f"are {tolerance:.0e}; a ratio would compare unlike things")
    return f"{what} {worst:.0e}"


def training_step(module, loss, **options):
    """A form of measure: backward of loss(*args), clipping, AdamW of these options."""
    optimizer = torch.optim.AdamW(param_groups(module, 0.01), lr=1e-4, **options)

    def run(*args):
        loss(*args).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return run


def keep_memory(device, nbytes):
    """On a CPU, keeps freed memory from now on, and fetches nbytes, for which the first form would wait."""
    if device.type == "cpu":
        keep_freed_memory()
        torch.ones(nbytes // 4)


def show(title, rows, checks, out, count=0, unit="tokens"):
    """Prints a section and keeps it in out["table"]. count: units of a run; checks: what `same` found."""
    lines = [["", "ms", "min .. max", f"{unit}/s", "peak MB", "ratio"]]
    for name, row in rows.items():
        rate = row[f"{unit}_per_s"] = 1e3 * count / row["ms"]
        lines.append([name, f"{row['ms']:.2f}", f"{row['low']:.2f} .. {row['high']:.2f}",
                      f"{rate:,.1f}" if count else "-", f"{row['peak_mb']:.1f}",
                      f"{row['ratio']:.2f}x" if "ratio" in row else "-"])
    print0(f"{title}\n{table(lines)}")
    if checks:
        print0(f"largest difference from ours in value and gradients: {', '.join(checks)}")
    out["table"][title] = rows


def compare(cfg, device, out, title, forms, inputs, whole, few, loop=None, tokens=0):
    """Checks, measures and shows forms of a loss. The last is ours; ratio = time over that of ours.

    forms: {name: loss of an argument}: `few` in the check, `whole` when timed, `loop` for the loop.
    """
    *plain, ours = forms
    checks = [same(name, partial(forms[name], few), partial(forms[ours], few), inputs) for name in plain]

    def backward(name):
        return torch.autograd.grad(forms[name](loop if name == LOOP else whole), inputs)
    rows = measure({name: partial(backward, name) for name in forms}, device, cfg.rounds,
                   {LOOP: cfg.batch / SAMPLES})
    for row in rows.values():
        row["ratio"] = row["ms"] / rows[ours]["ms"]
    show(title, rows, checks, out, tokens)
    return rows


# ---------------------------------------------------------------------------- sections: losses


def bench_nst(cfg, device, out):
    """NST against the loop over samples, and against cdist and bmm with autograd."""
    B, T, d = cfg.batch, cfg.tokens, model_config(cfg.model, cfg.vocab).hidden
    s, t = torch.randn(B, T, d, device=device, requires_grad=True), torch.randn(B, T, d, device=device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    batched = {f"{name} + autograd": lambda n, by=by: nst_batched(s[:n], t[:n], by)
               for name, by in DISTANCES.items()}
    for kernel, plain in (("poly", {}), ("gaussian", batched)):
        forms = {LOOP: lambda n: nst_loop(s[:n], t[:n], KERNELS[kernel]), **plain,
                 "ours": lambda n: losses.nst(s[:n], t[:n], mask[:n], kernel)}
        rows = compare(cfg, device, out, f"nst, {kernel} kernel: B {B}, T {T}, d {d}", forms, [s], B, SAMPLES,
                       SAMPLES, B * T)
    print0(f"ours is to hold at most 3 B T d 4 bytes + 32 MB = {3 * B * T * d * 4 / 1e6 + 32:.0f} MB")
    out |= {"nst.ratio_loop": rows[LOOP]["ratio"], "nst.ratio_bmm": rows["bmm + autograd"]["ratio"],
            "nst.peak_mb": rows["ours"]["peak_mb"]}


def full_bank(rows, cfg, device):
    """A bank whose every row is written, with random states that repeat."""
    bank = losses.CRDBank(rows, cfg.dim, cfg.negatives, 0.07, 0.0, torch.float32, device)
    z_s, z_t = torch.randn(2, 1024, cfg.dim, device=device)  # few at a time: it is faster
    for start in range(0, rows, 1024):
        index = np.arange(start, min(start + 1024, rows))
        bank.update(index, z_s[:len(index)], z_t[:len(index)])
    return bank


def bench_crd(cfg, device, out):
    """CRD against RepDistiller's gather for each anchor; each draws its negatives; and the bank's update."""
    A, N, M = cfg.anchors, cfg.negatives, cfg.rows
    bank, slots = full_bank(M, cfg, device), keyed_integers(M, "bench anchors", np.arange(A))
    z = [F.normalize(x, dim=-1).requires_grad_() for x in torch.randn(2, A, cfg.dim, device=device)]
    first = bank.draw(keyed_integers, 0, 0)
    bank.set_z(*(x.detach() for x in z), slots, first)
    slots_there, first = (torch.from_numpy(x).to(device) for x in (slots, first))

    def drawn(fixed, *shape):
        """Negatives: all the bank's draw where the forms are compared, new ones where they are timed."""
        return first.expand(shape) if fixed else torch.randint(M, shape, device=device)
    title = f"crd: {A} anchors, N {N}, E {cfg.dim}, M {M:,}, negatives drawn each time"
    rows = compare(cfg, device, out, title, {
        "gather for each anchor + bmm": lambda fixed: crd_gather(*z, slots_there, bank, drawn(fixed, A, N)),
        "one gather + autograd": lambda fixed: crd_shared(*z, slots_there, bank, drawn(fixed, N)),
        "ours": lambda fixed: losses.crd(*z, slots, bank, bank.draw(keyed_integers, 0, 0))}, z, False, True)

    def update(bank):
        """Of other rows each time, as in training: the same ones would come from the cache."""
        rows = keyed_integers(bank.rows, "bench update", np.arange(256)[:, None], np.arange(A))
        touched = itertools.cycle(rows)
        return lambda: bank.update(next(touched), z[0].detach(), z[1].detach())
    small = max(A, cfg.batch, M // 100)
    updates = measure({f"M {m:,}": update(bank if m == M else full_bank(m, cfg, device)) for m in (small, M)},
                      device, cfg.rounds)
    show(f"crd: the bank's update of {A} rows", updates, [], out)
    out |= {"crd.ratio_gather": rows["gather for each anchor + bmm"]["ratio"]}
    out |= {f"crd.update_ms.{m}": updates[f"M {m:,}"]["ms"] for m in (small, M)}


def bench_mlm_head(cfg, device, out):
    """Masked-word head and loss at all positions against the masked ones."""
    B, T, C, V = cfg.batch, cfg.tokens, model_config(cfg.model, cfg.vocab).hidden, cfg.vocab
    h = torch.randn(B, T, C, device=device, requires_grad=True)
    head = MLMHead(C, nn.Parameter(0.02 * torch.randn(V, C))).to(device)
    few, whole = (made_batch(replace(cfg, batch=n), device) for n in (min(4, B), B))

    def everywhere(batch):
        return F.cross_entropy(head(h[:len(batch["inputs"])]).flatten(0, 1), batch["labels"].flatten())

    def ours(batch):
        return losses.mlm(head(h.flatten(0, 1)[batch["mlm_index"]]), batch["mlm_targets"])
    title = f"mlm_head: {B * T} positions, {len(whole['mlm_targets'])} of them masked, C {C}, V {V}"
    rows = compare(cfg, device, out, title, {"logits at all positions": everywhere, "ours": ours},
                   [h, *head.parameters()], whole, few, tokens=B * T)
    out["mlm_head.ratio_all"] = rows["logits at all positions"]["ratio"]


def bench_hinge(cfg, device, out):
    """The teacher's contrastive loss against the loop over pairs, and against one broadcast with autograd."""
    B, T, C = cfg.batch, cfg.tokens, model_config(cfg.model, cfg.vocab).hidden
    h, v = (torch.randn(shape, device=device, requires_grad=True) for shape in ((B, T, C), (B, C)))
    mask, few = torch.ones(B, T, dtype=torch.bool, device=device), min(4, B)
    # arguments of the forms: (samples, the loop's share of them)
    compare(cfg, device, out, f"hinge, all negatives: B {B}, T {T}, C {C}", {
        LOOP: lambda size: hinge_loop(h[:size[0]], v[:size[0]], size[1]),
        "B x B x T x C broadcast + autograd": lambda size: hinge_batched(h[:size[0]], v[:size[0]]),
        "ours": lambda size: losses.hinge_all(h[:size[0]], v[:size[0]], mask[:size[0]])},
        [h, v], (B, B), (few, few), (B, SAMPLES), B * T)


# ---------------------------------------------------------------------------- sections: training steps


def made_batch(cfg, device, each=1):
    """A batch as distill.py makes it: ids, 15 % targets, and `each` anchor tokens of a sequence."""
    B, T = cfg.batch, cfg.tokens
    place, anchor = np.arange(B * T), np.arange(B * each)
    ids = torch.from_numpy(keyed_integers(cfg.vocab, "bench ids", place))
    target = torch.from_numpy(keyed_uniform("bench targets", place) < MASKED)
    anchors = torch.from_numpy(anchor // each * T + keyed_integers(T, "bench anchors", anchor))
    batch = {"inputs": ids.view(B, T), "mask": torch.ones(B, T, dtype=torch.bool), "mlm_targets": ids[target],
             "labels": ids.where(target, torch.tensor(-100)).view(B, T), "anchors": anchors,
             "first": torch.arange(B) * each, "mlm_index": target.nonzero()[:, 0]}
    samples = keyed_integers(cfg.rows, "bench samples", np.arange(B))
    return {name: x.to(device) for name, x in batch.items()} | {
        "samples": samples, "slots": np.repeat(samples, each)}


def distilling(student, teachers, device):
    """The losses of distill.py's step, nst+crd, and its bank's update, as (loss, alone).

    loss(batch, kind, h=None): from the states h (B, T, C) on where they are given. alone(batch, kind): a run
    of distillation alone, forward and backward: no masked words, given states do for the student's.
    """
    def loss(batch, kind, h=None):
        batch = batch | {"negatives": student.bank.draw(keyed_integers, 0, 0)}
        with autocast(device, kind):
            if h is None:
                batch["h_t"], h = teachers[kind](batch["inputs"]), student.bert(batch["inputs"])
            terms = student.terms(h, batch, dict.fromkeys(("mlm", "nst", "crd")))
        distill.update_bank(student, batch["samples"], Ranks(0, 1, device))
        return terms["mlm"] + 100 * terms["nst"] + terms["crd"]

    def alone(batch, kind):
        with torch.no_grad(), autocast(device, kind):
            dtype = student.bert.layers[0](batch["h_t"][:1].float()).dtype  # of the states in this autocast
        h, none = batch["h_t"].to(dtype, copy=True).requires_grad_(), batch["mlm_index"][:0]
        given = batch | {"mlm_index": none, "mlm_targets": none, "h_t": batch["h_t"].to(DTYPES[kind])}
        heads = [p for part in (student.heads, student.f1, student.f2) for p in part.parameters()]
        return lambda: torch.autograd.grad(loss(given, kind, h), [h, *heads])
    return loss, alone


def bench_step(cfg, device, out):
    """The whole distillation step, nst+crd: released structure in float32, ours in float32 and bfloat16."""
    config, bank = model_config(cfg.model, cfg.vocab), full_bank(cfg.rows, cfg, device)
    B, T, C, kinds = cfg.batch, cfg.tokens, config.hidden, kinds_of(device)
    teacher = BERT(config).to(device).eval().requires_grad_(False)
    teachers = {kind: copy.deepcopy(teacher).to(DTYPES[kind]) for kind in kinds}
    student = distill.Distiller(distill.Config(objective="nst+crd", crd_dim=cfg.dim), config,
                                SimpleNamespace(width=C), bank).to(device).eval()
    two, batch = (made_batch(replace(cfg, batch=n), device) for n in (2, B))

    # the losses are unlike: states are compared here, the forms of the losses in their own sections
    twin, direction = eager(student.bert).eval(), torch.randn(C, device=device)
    both = set(twin.parameters())  # all but the maps that one has joined
    check = same("states", lambda: (twin(two["inputs"]) @ direction).mean(),
                 lambda: (student.bert(two["inputs"]) @ direction).mean(),
                 [p for p in student.bert.parameters() if p in both])
    batch["h_t"] = teacher(batch["inputs"])
    with torch.no_grad():
        bank.set_z(*student.project(batch["h_t"], batch), batch["slots"], bank.draw(keyed_integers, 0, 0))

    loss, alone = distilling(student, teachers, device)
    student.train()
    released = Released(config, teacher).to(device).train()
    released_step = training_step(released, released, foreach=False)
    step = training_step(student, loss, fused=True)
    released_step(two)  # a small step makes AdamW's moments
    with FlopCounterMode(display=False) as counter:
        step(two, "fp32")

    plain, steps = "released structure, fp32", {f"ours, {kind}": partial(step, batch, kind) for kind in kinds}
    if cfg.kept:
        steps["the released, freed memory kept"] = partial(released_step, batch)
    kd = {f"distillation alone, {kind}": alone(batch, kind) for kind in kinds}
    rows = measure({plain: partial(released_step, batch)} | kd, device, cfg.rounds)
    keep_memory(device, (340 if cfg.kept else 120) * B * T * config.layers * C)
    rows |= measure(steps, device, cfg.rounds)
    for name in steps:
        rows[name]["ratio"] = rows[plain]["ms"] / rows[name]["ms"]
    show(f"step: {cfg.model}, B {B}, T {T}, V {cfg.vocab}, nst+crd; ratio = speed-up over released",
         rows, [check], out, B * T)
    flops = counter.get_total_flops() / two["inputs"].numel()
    print0("the released code runs NT-Xent over positions in CRD's place: another loss, not compared\n"
           f"ours takes {flops / 1e6:.1f} MFLOP a token")
    for kind in kinds:
        row, peak = rows[f"ours, {kind}"], peak_flops(device, DTYPES[kind]) or math.nan
        share = rows[f"distillation alone, {kind}"]["ms"] / row["ms"]
        out |= {f"step.ratio_{kind}": row["ratio"], f"step.kd_share_{kind}": share}
        print0(f"{kind}: distillation is {100 * share:.1f} % of the step; MFU "
               f"{100 * flops * row['tokens_per_s'] / peak:.0f} % of {peak / 1e12:.3g} TFLOP/s")
    out["step.kd_share"] = max(out[f"step.kd_share_{kind}"] for kind in kinds)


def made_examples(lengths, cfg):
    """Examples of one random text each, `lengths` (n,) tokens with [CLS] and [SEP]."""
    words, n = [f"w{i}" for i in range(cfg.vocab - len(SPECIALS))], len(lengths)
    drawn = iter(keyed_integers(len(words), "bench words", np.arange(lengths.sum())).tolist())
    texts = [" ".join(words[i] for i in itertools.islice(drawn, length - 2)) for length in lengths.tolist()]
    rows = Rows(texts, None, keyed_integers(2, "bench labels", np.arange(n)), [""] * n)
    return tokenized(TASKS["sst2"], rows, Vocab([*SPECIALS, *words]), cfg.tokens)


def bench_gpu(cfg, device, out):
    """distill.py's step in bf16 at the papers' two shapes (on a CPU at --model), nst+crd with 2 anchors a
    sequence, as it is and compiled, and its parts, each by itself."""
    kind, shapes = kinds_of(device)[-1], PAPERS if device.type == "cuda" else (cfg.model,)
    for shape, compiled in itertools.product(shapes, (False, True)):
        config, bank = model_config(shape, cfg.vocab), full_bank(cfg.rows, cfg, device)
        teacher = BERT(config).to(device, DTYPES[kind]).eval().requires_grad_(False)
        student = distill.Distiller(distill.Config(objective="nst+crd", crd_dim=cfg.dim), config,
                                    SimpleNamespace(width=config.hidden), bank).to(device)
        if compiled:
            torch._dynamo.reset()  # each shape has its own graphs, of which a module may have few
            teacher.compile(), student.bert.compile()
        batch, (loss, alone) = made_batch(cfg, device, 2), distilling(student, {kind: teacher}, device)
        words = {name: batch[name].cpu() for name in ("inputs", "mask")}
        words = masked_words(words | {"ids": words["inputs"]}, made_vocab(cfg.vocab), MASKED, "100/0/0", 0, 0,
                             np.arange(cfg.batch), pad=True)  # as for a GPU
        batch |= move(words, device)
        batch["h_t"] = teacher(batch["inputs"])
        batch["negatives"] = bank.draw(keyed_integers, 0, 0)
        with torch.no_grad():
            bank.set_z(*student.project(batch["h_t"].float(), batch), batch["slots"], batch["negatives"])
        step = partial(training_step(student, loss, fused=True), batch, kind)
        step()  # compiles, and makes AdamW's moments
        forms = {"step": step, **step_parts(student, teacher, batch, kind, device),
                 "distillation alone": alone(batch, kind)}
        rows = measure(forms, device, cfg.rounds)
        rows["backward"] = {name: rows["forward and backward"][name] - rows["forward"][name]
                            for name in ("ms", "low", "high")} | {"peak_mb": math.nan}
        launch = min(launched(step, device) for _ in range(cfg.rounds))
        for row in rows.values():
            row["ratio"] = row["ms"] / rows["step"]["ms"]
        name = f"{shape}{', compiled' * compiled}"
        show(f"gpu: {name}, B {cfg.batch}, T {cfg.tokens}, V {cfg.vocab}, {kind}; ratio = part of the step",
             rows, [], out, cfg.batch * cfg.tokens)
        T, peak = cfg.tokens, peak_flops(device, DTYPES[kind]) or math.nan
        flops = 3 * flops_per_token(config, T, MASKED) + flops_per_token(config, T)  # as distill.py counts
        found = {"tokens_per_s": rows["step"]["tokens_per_s"], "launch_ms": launch,
                 "mfu": flops * rows["step"]["tokens_per_s"] / peak,
                 "kd_share": rows["distillation alone"]["ratio"], "peak_mb": rows["step"]["peak_mb"]}
        print0(f"{found['tokens_per_s']:,.0f} tokens/s; MFU {100 * found['mfu']:.1f} % of {peak / 1e12:.3g} "
               f"TFLOP/s; distillation is {100 * found['kd_share']:.1f} % of the step; the host takes "
               f"{launch:.1f} ms to launch it")
        out |= {f"gpu.{shape}{'.compiled' * compiled}.{key}": value for key, value in found.items()}


def launched(run, device):
    """Milliseconds until a run has been handed to the device, which may still be at work."""
    seconds(run, device)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def step_parts(student, teacher, batch, kind, device):
    """{part of a distillation step: a run of it alone}; those of the objective forward and backward."""
    words, bank = list(student.bert.parameters()), student.bank
    with torch.no_grad(), autocast(device, kind):
        h = student.bert(batch["inputs"])
        s, z = student.heads["nst"](h), student.project(h, batch)
    h, s, *z = (x.detach().requires_grad_() for x in (h, s, *z))
    along = torch.randn_like(h)

    def gradients(forward, inputs):
        """A run of forward() and its gradients; outputs that are no losses are weighted at random."""
        def run():
            with autocast(device, kind):
                outputs = forward()
            return torch.autograd.grad(outputs, inputs, [along.flatten()[:y.numel()].view_as(y).to(y.dtype)
                                                         for y in outputs])
        return run

    def forward():
        with autocast(device, kind):
            return student.bert(batch["inputs"]),

    def crd():
        drawn = bank.draw(keyed_integers, 0, 0)
        return losses.crd(*z, batch["slots"], bank, drawn),

    def update():
        first = batch["first"]
        student.fresh.append((z[0].detach()[first], z[1].detach()[first]))
        distill.update_bank(student, batch["samples"], Ranks(0, 1, device))
    twins = [p.detach().clone() for p in student.parameters()]  # their gradients stay from run to run
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    optimizer = torch.optim.AdamW(twins, lr=1e-4, fused=True)

    def optimize():
        nn.utils.clip_grad_norm_(twins, 1.0)
        optimizer.step()
    heads = [p for part in (student.heads, student.f1, student.f2) for p in part.parameters()]
    masked = h.flatten(0, 1)[batch["mlm_index"]].detach().requires_grad_()
    return {"teacher": lambda: teacher(batch["inputs"]), "forward": forward,
            "forward and backward": gradients(forward, words),
            "masked-word head": gradients(lambda: (losses.mlm(student.mlm(masked), batch["mlm_targets"]),),
                                          [masked, *student.mlm.parameters()]),
            "heads": gradients(lambda: (student.heads["nst"](h), *student.project(h, batch)), [h, *heads]),
            "nst": gradients(lambda: (losses.nst(s, batch["h_t"], batch["mask"]),), [s]),
            "crd": gradients(crd, z), "bank's update": update, "optimizer": optimize}


class Operators(TorchDispatchMode):
    """Counts the operators of the block, but views, those of the backward pass among them, in `count`."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = (x.alias_info and not x.alias_info.is_write for x in function._schema.returns)
        self.count += function.namespace == "aten" and not any(views)
        return function(*args, **(kwargs or {}))


def bench_launches(cfg, device, out, B=256, T=128, C=768, V=30522, memory=141e9):
    """Operators of a loss, forward and backward, at 12L-768H's batch, in chunks as on an H200, or on the GPU
    in use. They are counted on tensors without values, so the numbers are the same on every machine."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else int(memory)
    chunk_rows, gpu = losses.chunk_rows, SimpleNamespace(type="cuda", total_memory=memory)

    def x(*shape):
        return torch.empty(shape, requires_grad=True)
    n, slots, drawn = B * T, np.arange(2 * B), np.arange(cfg.negatives)
    with (FakeTensorMode(allow_non_fake_inputs=True),
          patch.object(torch.cuda, "get_device_properties", lambda device: gpu),
          patch.object(losses, "chunk_rows", lambda device, *args: chunk_rows(gpu, *args))):
        mask, bank = torch.ones(B, T, dtype=torch.bool), losses.CRDBank(10 ** 6, cfg.dim, cfg.negatives)
        bank.log_z = [0.0, 0.0]
        for name, loss in {
                "nst": lambda: losses.nst(x(B, T, C), x(B, T, C), mask),
                "soft": lambda: losses.soft(x(n, C), x(V, C), x(V), x(n, C), x(V, C), x(V)),
                "voken": lambda: losses.voken(x(n, C), x(V, C), x(V), x(n, C), x(V, C)),
                "crd": lambda: losses.crd(x(2 * B, cfg.dim), x(2 * B, cfg.dim), slots, bank, drawn)}.items():
            with Operators() as operators:
                loss().backward()
            out[f"launches.{name}"] = operators.count
    print0(f"operators, B {B}, T {T}, d {C}, V {V}, a GPU of {memory / 1e9:.0f} GB: "
           + ", ".join(f"{name} {out[f'launches.{name}']:,}" for name in ("nst", "soft", "voken", "crd")))


def bench_finetune(cfg, device, out):
    """Training steps of fine-tuning: every example padded to T tokens against batches of like lengths."""
    B, T, kinds, whole = cfg.batch, cfg.tokens, kinds_of(device), model_config(cfg.model, cfg.vocab)
    shape = f"{whole.layers}L-{64 * max(1, 3 * whole.hidden // 256)}H"  # 6L-384H: MiniLM's
    model = TaskModel(BERT(model_config(shape, cfg.vocab), pooler=True), "classify", 2).to(device).eval()
    objective = finetune.Objective(model)

    def padded(batch):
        """All sequences T long; [PAD], False and segment 0 are zeros."""
        return {name: x if name == "labels" else F.pad(x, (0, T - x.shape[1])) for name, x in batch.items()}

    def loss(batch, kind="fp32"):
        with autocast(device, kind):
            return objective(move(batch, device), {"loss": B})["loss"]
    batches, lengths, checks = {}, [], []
    for name, quantiles in LENGTHS.items():
        # finetune.py sorts a pool by length and cuts it in batches, (POOL, B). Timed are the middle ones of
        # both halves: about the mean length of all
        share = (np.arange(POOL * B) + 0.5) / (POOL * B)
        pool = np.interp(share, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int)
        pool = pool.clip(max=T).reshape(POOL, B)
        timed = pool[[POOL // 4, 3 * POOL // 4]]
        examples = made_examples(timed.flatten(), cfg)
        batches[name] = [partial(examples.batch, np.arange(B) + start) for start in (0, B)]
        lengths.append(f"{name} {timed[:, -1].mean():.1f} ({pool[:, -1].mean():.1f})")
        few = examples.batch([0, 2 * B - 1])
        with losses.no_tf32():
            checks.append(same(name, lambda: loss(padded(few)), lambda: loss(few), list(model.parameters())))

    # one model and optimizer for all, so that no form's state grows into memory that another one keeps
    step = training_step(model.train(), loss, fused=True)
    step(few)  # makes AdamW's moments

    def steps(makers, kind):
        """finetune.py's training step on each of the batches that `makers` return."""
        for make in makers:
            step(make(), kind)
    forms = {}
    for kind in kinds:
        # when padded to T, a batch costs the same whatever its task
        forms[f"all padded to {T}, {kind}"] = partial(steps, [lambda: padded(batches["rte"][0]())], kind)
        forms |= {f"ours, {name}, {kind}": partial(steps, makers, kind) for name, makers in batches.items()}
    keep_memory(device, 90 * B * T * whole.layers * whole.hidden)
    rows = measure(forms, device, cfg.rounds, {name: 1 / 2 for name in forms if name.startswith("ours")})
    for kind, name in itertools.product(kinds, batches):
        row, plain = rows[f"ours, {name}, {kind}"], rows[f"all padded to {T}, {kind}"]
        out[f"finetune.ratio_{kind}.{name}"] = row["ratio"] = plain["ms"] / row["ms"]
        if kind == "bf16":
            out[f"finetune.bf16.{name}"] = rows[f"ours, {name}, fp32"]["ms"] / row["ms"]
    show(f"finetune: {shape}, B {B}, V {cfg.vocab}; ratio = speed-up over padding", rows, checks, out, B,
         "examples")
    print0(f"mean length of the batches timed (of a pool of {POOL}): {', '.join(lengths)}")


def made_pairs(language, clip, T, S, used, device):
    """Two texts as (batch of ReleasedXDBERT, the same as a batch of adapt_xdbert.Adapter).

    T words; `used` of CLIP's S segments are full, the others empty; 15 % of words and tokens are targets.
    """
    B, L, R, none = 2, clip.positions, used * clip.positions, torch.tensor(-100)
    words = torch.from_numpy(keyed_integers(language.vocab_size, "bench ids", np.arange(B * T)))
    tokens = torch.from_numpy(keyed_integers(clip.vocab_size, "bench tokens", np.arange(B * R)))
    target, clip_target = (torch.from_numpy(keyed_uniform(key, np.arange(n)) < MASKED)
                           for key, n in (("bench targets", B * T), ("bench clip targets", B * R)))
    place, empty = torch.arange(B * R), (0, S * L - R)
    clip_target &= (place % L > 0) & (place % L < L - 1)  # never start or end
    ours = {"inputs": words.view(B, T), "mlm_index": target.nonzero()[:, 0], "mlm_targets": words[target],
            "match_targets": torch.arange(B) % 2, "clip_ids": tokens.view(-1, L),
            "clip_place": place.view(B, R), "clip_mask": torch.ones(B, R, dtype=torch.bool),
            "cliptc_index": clip_target.nonzero()[:, 0], "cliptc_targets": tokens[clip_target]}
    released = {"inputs": ours["inputs"], "labels": words.where(target, none).view(B, T),
                "clip_ids": F.pad(tokens.view(B, R), empty).view(-1, L),
                "clip_mask": F.pad(ours["clip_mask"], empty), "matched": ours["match_targets"],
                "clip_labels": F.pad(tokens.where(clip_target, none).view(B, R), empty, value=-100)}
    return move(released, device), move(ours, device)


def bench_xdbert(cfg, device, out, language=BERTConfig(), clip=CLIPConfig(), T=512, S=9):
    """A step of adapt_xdbert.py at the paper's shapes, two texts: the released structure against ours."""
    model = adapt_xdbert.Adapter(adapt_xdbert.Config(), BERT(language, pooler=True), CLIPText(clip), None)
    plain, kinds = ReleasedXDBERT(model.to(device)), kinds_of(device)  # it shares the model's memory

    def released(batch, kind="fp32"):
        with autocast(device, kind):
            return plain(batch)

    def ours(batch, kind="fp32"):
        with autocast(device, kind):
            divisor = {name: adapt_xdbert.ITEMS[name](batch) for name in model.weights}
            return sum(model(batch, divisor).values())
    plain.eval(), model.eval()
    both, checks = set(plain.parameters()), []  # all but the maps that one has joined
    inputs = [p for p in model.parameters() if p in both and p.requires_grad]
    short = replace(clip, positions=clip.positions // 3)
    with losses.no_tf32():
        for used in USED:
            theirs, batch = made_pairs(language, short, T // 8, S, used, device)
            checks.append(same(f"{used} of {S}", partial(released, theirs), partial(ours, batch), inputs))
    # one optimizer serves both dtypes; a small step makes its moments
    step = training_step(plain.train(), released, foreach=False)
    our_step = training_step(model.train(), ours, fused=True)
    step(theirs), our_step(batch)

    pairs, forms = {used: made_pairs(language, clip, T, S, used, device) for used in USED}, {}
    for kind in kinds:
        # it runs the empty segments, too: their number changes nothing
        forms[f"released structure, {kind}"] = partial(step, pairs[USED[0]][0], kind)
        for used in USED:
            forms[f"ours, {used} of {S} segments, {kind}"] = partial(our_step, pairs[used][1], kind)
    states = T * language.layers * language.hidden + S * clip.positions * clip.layers * clip.hidden
    keep_memory(device, 2 * 240 * states)
    rows = measure(forms, device, cfg.rounds)
    for row in rows.values():
        row["ratio"] = rows["released structure, fp32"]["ms"] / row["ms"]
    show(f"xdbert: {language.layers}L-{language.hidden}H, CLIP {clip.layers}L-{clip.hidden}H, B 2, T {T} and "
         f"{S} x {clip.positions}; ratio = speed-up over released, fp32", rows, checks, out, 2 * T)
    for used, kind in itertools.product(USED, kinds):
        row = rows[f"ours, {used} of {S} segments, {kind}"]
        out |= {f"xdbert.empty.{used}": 1 - used / S, f"xdbert.ratio_{kind}.{used}": row["ratio"]}
        if kind == "bf16":
            out[f"xdbert.ratio_bf16_equal.{used}"] = rows["released structure, bf16"]["ms"] / row["ms"]


# ---------------------------------------------------------------------------- section: text


def write_text(path, size):
    """About `size` bytes with the word frequencies of English: rank r has 1 / ((r + 2.7) (1 + r / 12000)).

    That is Zipf's law, steeper in the tail: in 2.6 M words 90,000 different ones, and the first 10,000 cover
    92 %; in 14 MB of Wikipedia it is 91,000 and 91 %. A packer that remembers words gains on both alike.
    """
    syllables = [c + v for c in "bdfghklmnprstvwz" for v in "aeiou"]
    names = ["".join(parts) for n in (1, 2, 3) for parts in itertools.product(syllables, repeat=n)]
    rank = np.arange(500_000)
    share = np.cumsum(1 / (rank + 2.7) / (1 + rank / 12_000))
    words = np.searchsorted(share / share[-1], keyed_uniform("bench text", np.arange(size // 5))).tolist()
    with open(path, "w") as f:
        for start in range(0, len(words), 18):  # sentences of 18 words, documents of 10 sentences
            first, second = (" ".join(names[r] for r in words[a:a + 9]) for a in (start, start + 9))
            f.write(f"{first.capitalize()}, {second}.\n" + "\n" * (start % 180 == 162))


def bench_text(cfg, device, out, size=4_000_000):
    """data.py text, which remembers the ids of words, against plain encode_batch, on 4 MB of made text."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.txt"
        write_text(source, size)
        vocab = train_vocab([source], Path(folder) / "vocab.txt", cfg.vocab)
        lines, start = source.read_text().splitlines(), time.perf_counter()
        for i in range(0, len(lines), 1000):
            vocab.encode(lines[i:i + 1000])
        plain = source.stat().st_size / 1e6 / (time.perf_counter() - start)
        packed = pack_text([source], vocab, Path(folder) / "text.h5")["mb_per_s"]
    print0(f"encode_batch {plain:.1f} MB/s; data.py text {packed:.1f} MB/s = {packed / plain:.1f}x")
    out |= {"text.mb_per_s": packed, "text.encode_batch_mb_per_s": plain}


# ---------------------------------------------------------------------------- main


# beside each section its seconds on two cores of an AVX2-only EPYC, for the time left
SECTIONS = {"nst": (bench_nst, 17), "crd": (bench_crd, 4), "mlm_head": (bench_mlm_head, 10),
            "hinge": (bench_hinge, 8), "step": (bench_step, 79), "finetune": (bench_finetune, 12),
            "xdbert": (bench_xdbert, 80), "text": (bench_text, 14), "feed": (bench_feed, 40),
            "scale": (bench_scale, 240), "gpu": (bench_gpu, 60), "launches": (bench_launches, 5)}


def main(cfg):
    """Runs the sections of cfg.only, prints the table; returns {number's name: value, "table": every row}."""
    device, start, (name, words) = init_ranks(cfg.device).device, time.monotonic(), cpu()
    set_seed(0, 0)
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    machine = (f"{gpu}{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
               f"{torch.backends.cpu.get_cpu_capability()}, {'with' if 'amx_bf16' in words else 'no'} AMX; "
               f"torch {torch.__version__}")
    print0(f"{machine}\n(*) timed on {SAMPLES} samples and scaled to the batch; memory of these {SAMPLES}\n"
           "peak MB: on top of weights and inputs, in the first run")
    if "bf16" not in kinds_of(device):
        print0("no rows in bf16: this CPU has no instructions for it")
    out, chosen, done = {"machine": machine, "table": {}}, cfg.only.split(","), 0
    whole = sum(SECTIONS[name][1] for name in chosen)
    for name in chosen:
        section, share = SECTIONS[name]
        pace = (time.monotonic() - start) / done if done else 1
        print0(f"\n{name}: {100 * done / whole:.0f} % done, about {duration(pace * (whole - done))} left")
        keep_freed_memory(False)  # the C library's own policy, for plain and ours
        # losses.py computes without TF32, so its plain forms do; the steps as the scripts run them
        with contextlib.nullcontext() if name in ("step", "finetune", "xdbert", "gpu") else losses.no_tf32():
            section(cfg, device, out)
        done += share
    print0(f"\n{duration(time.monotonic() - start)}")
    if cfg.json:
        write_json(cfg.json, out)
    return out


if __name__ == "__main__":
    with one_line_end():
        try:
            main(parse_cli(Config, PRESETS))
        except Exception as error:
            if out_of_memory(error):
                raise SystemExit("out of memory: lower --batch, --tokens, --rows or --model") from None
            raise
