"""Trains the teacher: a BERT and a video transformer from scratch on videos and captions (VidLanKD 3.2).

    python teacher.py                                                   # the demo world, on a laptop
    python teacher.py --preset paper --videos howto100m.h5              # HowTo100M, packed by data.py videos
    torchrun --nproc_per_node 4 teacher.py --preset base --videos howto100m.h5
    python teacher.py --objective clip                                  # a small text tower like CLIP's

L^T = L_CT + L_MLM (section 3.2), with L_CT the token-level hinge of Eq. 3. The run leaves
out/teacher-<objective>-s<seed>/ with model/: the language model as a Hugging Face folder, the video encoder,
and the vectors of the clips that serve as vokens. With --objective clip the language model is a text tower
like CLIP's, whose end-of-text state is matched with its clip among those of the batch (Radford et al. 2021).
"""
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import losses
from common import check_fields, duration, print0, write_json

from model import (BERT, SHAPES, CLIPConfig, CLIPText, MLMHead, VideoEncoder, flops_per_token, memory_report,
                   model_config, param_groups)
from parts.metrics import mean_state, recall, vectors
from parts.weights import save_bert, save_clip, save_video_encoder
from prepare.world import demo_world
from run import (Interrupt, Log, check_finite, check_resume, check_weights, finished_run, init_world,
                 load_checkpoint, lr_at, micro_batch_size, move, open_run, peak_flops, peak_memory_mb,
                 restore_rng, run_script, save_checkpoint, set_seed, step_line, unfinished_run)


@dataclass(frozen=True)
class Config:
    preset: str = "demo"  # demo, small (6L-512H), base (12L-768H) or paper; flags beat it
    # data
    data_dir: str = "data"  # where the demo world is kept (data_dir/demo-s<seed>)
    videos: str = ""  # a file of data.py videos; empty = the demo world
    val_clips: int = 500  # clips held out, by video
    block_size: int = 24  # tokens of the joined captions, [CLS] and [SEP] included
    max_frames: int = 18  # frames of a clip, one a second
    vision: str = "video"  # video, or image = the 2D feature of the middle frame
    feat_norm: bool = False  # L2-normalise the 2D and the 3D part of each frame
    # model
    model: str = "demo"  # a shape of model.py: demo, 6L-512H, 12L-768H
    layers: int = 0  # overrides the shape; 0 = as it is
    hidden: int = 0  # overrides the shape
    heads: int = 0  # overrides the shape; hidden / 64 where only hidden is given
    intermediate: int = 0  # overrides the shape; 4 x hidden where only hidden is given
    video_layers: int = 1  # layers of the video encoder; 0 = as many as the language model's
    dropout: float = 0.1  # of hidden states and attention
    # objective
    objective: str = "mlm+ct"  # mlm, ct, mlm+ct, or clip = a text tower like CLIP's, one vector a text
    negatives: str = "infonce"  # one (Eq. 3), all (same expectation, less variance), or infonce: see README
    ct_input: str = "masked"  # the contrastive term sees the masked text, or clean = a second pass
    margin: float = 1.0  # alpha of Eq. 3
    temperature: float = 0.1  # of --negatives infonce
    w_mlm: float = 1.0  # weight of the masked-language term
    w_ct: float = 1.0  # weight of the contrastive term
    mask_rate: float = 0.15  # share of the tokens to predict
    mask_split: str = "80/10/10"  # of these: [MASK] / random / kept; the paper's text has 100/0/0
    reduction: str = "mean"  # of every term over its items: mean, or sum as the papers write
    # optimizer
    batch_size: int = 64  # clips a step, over all ranks and accumulation
    grad_accum: int = 1  # micro-batches a rank runs for one step
    lr: float = 1e-3  # peak learning rate of AdamW
    weight_decay: float = 0.01  # not on biases and LayerNorm
    beta2: float = 0.98  # AdamW's second momentum
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    warmup_steps: int = 30  # linear warm-up
    max_steps: int = 300  # then linearly to 0
    stop_on: str = "auto"  # early stopping on loss (paper) or recall@10; auto = recall where clips are seen
    patience: int = 5  # evaluations without a better one before it stops
    vokens: int = 30000  # K clips kept for voken retrieval (Appendix A), fewer where the corpus has fewer
    # system
    seed: int = 0  # of weights, order, masks, and of the demo world
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    compile_model: bool = False  # torch.compile both encoders
    out_dir: str = ""  # run folder; empty = out/teacher-<objective>-s<seed>
    resume: bool = False  # go on from the folder's newest checkpoint
    eval_only: bool = False  # measure the folder's best weights and stop
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    # logging
    log_every: int = 20  # steps a log line
    eval_every: int = 100  # steps between evaluations
    save_every: int = 100  # steps between checkpoints

    def __post_init__(self):
        if self.objective not in ("mlm", "ct", "mlm+ct", "clip"):
            raise ValueError(f"--objective {self.objective}: choose mlm, ct, mlm+ct or clip")
        check_fields(self, CHOICES, POSITIVE)
        if not 1 <= self.warmup_steps <= self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps}: must lie in 1 .. --max_steps "
                             f"({self.max_steps})")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"--{name} {getattr(self, name)}: must be a multiple of --log_every "
                                 f"({self.log_every})")
        if self.stop_on == "recall" and self.objective == "mlm":
            raise ValueError("--stop_on recall needs the contrastive term; use --stop_on loss")
        data.parse_split(self.mask_split)


CHOICES = {"model": tuple(SHAPES), "vision": ("video", "image"), "negatives": ("one", "all", "infonce"),
           "ct_input": ("masked", "clean"), "reduction": ("mean", "sum"),
           "stop_on": ("auto", "loss", "recall"), "dtype": ("float32", "bfloat16", "float16")}
POSITIVE = ("val_clips", "max_frames", "temperature", "mask_rate", "batch_size", "grad_accum", "lr",
            "max_steps", "patience", "vokens", "log_every", "eval_every", "save_every")
# what a resumed run cannot change
FIXED = ("val_clips", "block_size", "max_frames", "vision", "feat_norm", "model", "layers",
         "hidden", "heads", "intermediate", "video_layers", "objective", "mask_rate", "mask_split",
         "reduction", "batch_size", "weight_decay", "beta2", "seed")

# section 4.3 of the paper: tokens, frames, held-out clips, optimizer, margin, depth of the video encoder
PAPER = dict(block_size=128, max_frames=512, val_clips=10_000, lr=2e-4, weight_decay=0.01, margin=1.0,
             video_layers=0)
# not in the paper: batch and warm-up of the released code; steps ("until it converges") and the rest are ours
SMALL = PAPER | dict(model="6L-512H", negatives="all", batch_size=256, beta2=0.999, warmup_steps=5000,
                     max_steps=200_000, eval_every=2000, save_every=2000, log_every=100)
BASE = SMALL | dict(model="12L-768H")
PRESETS = {"demo": {}, "small": SMALL, "base": BASE, "paper": BASE | dict(negatives="one", stop_on="loss")}


def video_config(cfg, config):
    """Shape of the video encoder: the language model's, with layers of its own where the flag says so."""
    return replace(config, layers=cfg.video_layers or config.layers)


class Teacher(nn.Module):
    """Language model and video encoder: all that is trained, so that DDP sees every gradient."""

    def __init__(self, cfg, config, features):
        super().__init__()
        self.cfg = cfg
        if cfg.objective == "clip":
            self.clip = CLIPText(CLIPConfig(
                config.vocab_size, config.layers, config.hidden, config.heads, config.intermediate,
                positions=cfg.block_size, projection=config.hidden))
        else:
            self.bert = BERT(config)
        if "mlm" in cfg.objective:
            self.mlm = MLMHead(config.hidden, self.bert.embeddings.word.weight, std=config.init_std)
        if cfg.objective != "mlm":
            self.video = VideoEncoder(video_config(cfg, config), features, cfg.max_frames)

    def encode(self, batch):
        """Clips of data.VideoClips -> vectors (B, C) of texts and videos, as retrieval compares them."""
        v = self.video(batch["frames"], batch["frame_mask"])
        if self.cfg.objective == "clip":
            return self.clip.pool(self.clip(batch["ids"]), batch["mask"]), v
        return mean_state(self.bert(batch["ids"], batch["mask"]), batch["mask"]), v

    def forward(self, batch, count):
        """One micro-batch -> {term: sum / count[term]}."""
        cfg, terms = self.cfg, {}
        if cfg.objective == "clip":
            return {"clip": losses.clip(*self.encode(batch), self.clip.logit_scale, count["clip"])}
        h = self.bert(batch["inputs"], batch["mask"])  # (B, T, C)
        if "mlm" in cfg.objective:
            picked = h.flatten(0, 1)[batch["target_index"]]  # (n, C): logits at masked positions only
            terms["mlm"] = losses.mlm(self.mlm(picked), batch["targets"], count["mlm"])
        if "ct" in cfg.objective:
            if cfg.ct_input == "clean":
                h = self.bert(batch["ids"], batch["mask"])
            v = self.video(batch["frames"], batch["frame_mask"])  # (B, C)
            if cfg.negatives == "one":
                terms["ct"] = losses.hinge(h, v, batch["text_mask"], batch["partner"], batch["partner_video"],
                                           batch["partner_token"], cfg.margin, count["ct"])
            elif cfg.negatives == "all":
                terms["ct"] = losses.hinge_all(h, v, batch["text_mask"], cfg.margin, count["ct"])
            else:
                terms["ct"] = losses.infonce_tokens(h, v, batch["text_mask"], cfg.temperature, count["ct"])
        return terms


# how many items of each term a batch has
ITEMS = {"mlm": lambda batch: len(batch["targets"]), "ct": lambda batch: batch["text_mask"].sum().item(),
         "clip": lambda batch: len(batch["ids"])}


def term_weights(cfg):
    """{term: weight} of the terms that are on, in the order of the log."""
    return {name: getattr(cfg, "w_" + name, 1.0) for name in cfg.objective.split("+")}


def prepare(batch, vocab, cfg, step, rows):
    """Adds the masked inputs, their targets and Eq. 3's drawn negatives to a batch of data.VideoClips.

    rows: what each clip's draws are keyed by beside (seed, step): its position in the global batch, or its
    index with step -1 for evaluation. The partners x' and v' come from this rank's own micro-batch.
    """
    if cfg.objective == "clip":
        return batch
    ids, mask = batch["ids"], batch["mask"]
    inputs, labels = data.mask_tokens(ids, mask, vocab, cfg.mask_rate, cfg.mask_split, cfg.seed, step, rows)
    target_index = (labels.flatten() != -100).nonzero()[:, 0]
    batch |= {"inputs": inputs, "target_index": target_index, "targets": labels.flatten()[target_index],
              "text_mask": mask & (ids != vocab.cls) & (ids != vocab.sep)}
    if cfg.negatives == "one":
        batch["partner"], batch["partner_video"], batch["partner_token"] = losses.hinge_partners(
            batch["text_mask"], cfg.seed, step, rows)
    return batch


@torch.no_grad()
def evaluate(model, clips, cfg, world):
    """Validation terms over every held-out clip and, with a video encoder, recall on them; over all ranks."""
    model.eval()
    total = torch.zeros(len(ITEMS), 2, dtype=torch.float64)  # term x (sum, items)
    batches = np.array_split(np.arange(len(clips)), max(1, len(clips) // cfg.batch_size))
    for n in range(world.rank, len(batches), world.size):
        index = batches[n]
        batch = move(prepare(clips.batch(index), clips.vocab, cfg, -1, index), world.device)
        terms = model(batch, dict.fromkeys(ITEMS, 1.0))
        for i, (name, items) in enumerate(ITEMS.items()):
            if name in terms:
                total[i] += torch.tensor([terms[name].item(), items(batch)], dtype=torch.float64)
    world.sum(total)
    scores = {name: (total[i, 0] / total[i, 1]).item() for i, name in enumerate(ITEMS) if total[i, 1]}
    scores["loss"] = sum(scores[name] * weight for name, weight in term_weights(cfg).items())
    if cfg.objective != "mlm":
        text, video = vectors(model.encode, clips, np.arange(len(clips)), world.device)
        scores |= {f"t2v_r{k}": v for k, v in recall(text, video).items()}
        scores |= {f"v2t_r{k}": v for k, v in recall(video, text).items()}
    model.train()
    return scores


def main(cfg, reuse=False):
    """Trains and saves the teacher of `cfg`; returns the results.

    reuse: where a finished run of the same flags and data exists, it returns that one's results.
    """
    world = init_world(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    micro_size = micro_batch_size(cfg, world)
    if cfg.objective != "mlm" and micro_size < 2:
        raise SystemExit(f"--batch_size {cfg.batch_size}: a micro-batch has {micro_size} clip, so no "
                         "negatives; raise it")
    folder = Path(cfg.out_dir or f"out/teacher-{cfg.objective}-s{cfg.seed}")

    # data
    videos = cfg.videos or demo_world(cfg.data_dir, cfg.seed, world) / "videos.h5"
    train, val = (data.VideoClips(videos, cfg.block_size, cfg.max_frames, cfg.vision, part, cfg.val_clips,
                                  cfg.feat_norm) for part in ("train", "val"))
    hashes = {"videos": train.hash, "vocabulary": train.vocab.hash}
    if reuse:
        if before := finished_run(folder, cfg, hashes):
            print0(f"reused {folder}")
            return before
        cfg = replace(cfg, resume=unfinished_run(folder, cfg, hashes))
    print0(f"teacher: {len(train):,} training clips, {len(val):,} held out, {train.features} channels a "
           f"frame, vocabulary {train.vocab.size:,}")

    # model and optimizer
    set_seed(cfg.seed, 0)
    config = model_config(cfg.model, train.vocab.size, cfg.layers, cfg.hidden, cfg.heads, cfg.intermediate,
                          cfg.dropout)
    model = Teacher(cfg, config, train.features).to(world.device)
    print0(memory_report(model, config, micro_size, cfg.block_size, cfg.mask_rate * ("mlm" in cfg.objective)))
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    weights, sees = term_weights(cfg), cfg.objective != "mlm"
    names = list(weights)

    # resume
    start, best = 0, {"score": None, "step": 0, "bad": 0}
    if cfg.resume or cfg.eval_only:
        saved = load_checkpoint(folder, world)
        check_resume(saved["config"], cfg, saved["hashes"], hashes, FIXED)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty but in float16
            scaler.load_state_dict(saved["scaler"])
        start, best = saved["step"], saved["best"]
    if cfg.eval_only:
        model.load_state_dict(load_checkpoint(folder, world, "best.pt")["model"])
        scores = evaluate(model, val, cfg, world)
        print0(recall_table(scores, len(val)) if sees else f"validation mlm {scores['mlm']:.4f}")
        return scores
    folder = open_run(folder, cfg, world, hashes)
    log = Log(folder, world, saved["log_lines"] if cfg.resume else 0)
    interrupt = Interrupt(cfg.max_minutes)
    if cfg.compile_model:
        (model.clip if cfg.objective == "clip" else model.bert).compile()
        if sees:
            model.video.compile()
    ddp = DistributedDataParallel(model) if world.size > 1 else model
    set_seed(cfg.seed, 1 + world.rank)
    if cfg.resume:
        restore_rng(saved, world)

    tokens = cfg.batch_size * cfg.block_size
    text_flops = 3 * tokens * flops_per_token(config, cfg.block_size, cfg.mask_rate if "mlm" in names else 0)
    peak = peak_flops(world.device, dtype) * world.size
    window = torch.zeros(cfg.log_every, len(names), device=world.device)
    first, clock = start, None  # first step of the window; when it began, pauses left out; None: warming up
    began, step = time.monotonic(), start
    model.train()
    while True:
        pause = time.monotonic()
        last = step >= cfg.max_steps or best["bad"] >= cfg.patience
        if (step % cfg.eval_every == 0 or last) and not (step == start and cfg.resume):
            scores = evaluate(model, val, cfg, world)
            log.write(step=step, **{f"val_{k}": v for k, v in scores.items()})
            on_recall = cfg.stop_on == "recall" or cfg.stop_on == "auto" and sees
            score = scores["t2v_r10"] if on_recall else -scores["loss"]
            better = best["score"] is None or score > best["score"]
            best = {"score": score, "step": step, "bad": 0} if better else best | {"bad": best["bad"] + 1}
            last = last or best["bad"] >= cfg.patience
            if better:
                check_weights(model, step, folder)
                save_checkpoint(folder, {"model": model.state_dict(), "step": step}, world, "best.pt")
            print0(f"step {step:6d}  val  " + "  ".join(
                f"{k} {v:.3f}" for k, v in scores.items() if k in (*names, "t2v_r10", "v2t_r10"))
                + ("  best so far" if better else f"  no better for {best['bad']} of {cfg.patience}"))
        stop = interrupt.due(world)
        if (step % cfg.save_every == 0 and step > start) or last or stop:
            check_finite(world.sum(window.clone()), first, names, folder)
            check_weights(model, step, folder)
            save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                     "scaler": scaler.state_dict(), "step": step, "best": best,
                                     "log_lines": log.lines, "hashes": hashes, "config": asdict(cfg),
                                     "model_config": asdict(config)}, world)
        if stop and not last:
            print0(f"{interrupt.reason}: saved step {step} in {folder}; go on with "
                   + ("the same command" if reuse else "--resume"))
            raise SystemExit(0)
        if last:
            break
        clock = clock and clock + time.monotonic() - pause

        # the step's micro-batches, and the items of each term over all ranks: one step on the whole batch
        batches, items = [], torch.zeros(len(names))
        for micro in range(cfg.grad_accum):
            rows = data.micro_rows(cfg.batch_size, world.rank, world.size, micro, cfg.grad_accum)
            batch = train.batch(train.index(cfg.seed, step, cfg.batch_size, rows))
            batch = prepare(batch, train.vocab, cfg, step, rows)
            items += torch.tensor([ITEMS[name](batch) for name in names])
            batches.append(move(batch, world.device))
        items = world.sum(items).clamp(min=1) if cfg.reduction == "mean" else torch.ones(len(names))
        count = dict(zip(names, (items / world.size).tolist()))
        lr = lr_at(step, cfg.lr, cfg.warmup_steps, cfg.max_steps)

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

        step += 1
        if step % cfg.log_every == 0:
            values = world.sum(window.clone()) / world.size  # the window's only read of the device
            check_finite(values, first, names, folder)
            mean = dict(zip(names, values[first % cfg.log_every:].mean(0).tolist()))
            now = time.monotonic()
            speed = (step - first) / (now - clock) if clock else 0.0  # steps a second
            frames = batch["frames"].shape[1]  # of the longest clip; the others are padded to it
            flops = text_flops + sees * 3 * cfg.batch_size * frames * flops_per_token(
                video_config(cfg, config), frames)
            mfu = speed * flops / peak if peak else 0.0
            rate = {"tokens_per_s": speed * tokens, "mfu": mfu} if speed else {}
            log.write(step=step, **mean, lr=lr, grad_norm=norm.item(), **rate,
                      memory_mb=peak_memory_mb(world.device))
            left = (now - began) / (step - start) * (cfg.max_steps - step)
            print0(step_line(step, mean, lr, speed, tokens, mfu, left))
            first, clock = step, now

    interrupt.release()
    model.load_state_dict(load_checkpoint(folder, world, "best.pt")["model"])
    model.eval()
    print0(f"best at step {best['step']}")
    results = {"objective": cfg.objective, "vision": cfg.vision, "folder": str(folder), "steps": step,
               "best_step": best["step"], "vocabulary": train.vocab.hash} | evaluate(model, val, cfg, world)
    results["finished"] = time.time()
    if world.main:
        export(model, train, folder / "model", cfg, world)
        if sees:
            print0("\n" + recall_table(results, len(val)) + "\n")
        write_json(folder / "results.json", results)
    print0(f"made {folder}/model in {duration(time.monotonic() - began)}")
    world.barrier()
    return results


def export(model, clips, folder, cfg, world):
    """The model's folder: Hugging Face's files, the video encoder, its way of cutting clips, and vokens."""
    if cfg.objective == "clip":
        save_clip(model.clip, folder, clips.vocab)
    else:
        save_bert(model.bert, folder, clips.vocab, getattr(model, "mlm", None))
    if cfg.objective == "mlm":
        return
    save_video_encoder(folder, model.video)
    write_json(folder / "clips.json", {"T": cfg.block_size, "max_frames": cfg.max_frames,
                                       "vision": cfg.vision, "val_clips": cfg.val_clips,
                                       "feat_norm": cfg.feat_norm})
    if cfg.objective == "clip":
        return
    index = clips.voken_clips(cfg.vokens, cfg.seed)  # Appendix A: one of each task, then of random tasks
    found, = vectors(lambda b: (model.video(b["frames"], b["frame_mask"]),), clips, index, world.device)
    save_file({"vectors": found}, folder / "vokens.safetensors")
    print0(f"vokens: {len(index):,} clips")


def recall_table(scores, n):
    """Recall on n held-out clips, aligned text."""
    lines = [f"held-out clips: {n:<6}    R@1    R@5   R@10"]
    for name, key in (("text to video", "t2v"), ("video to text", "v2t")):
        lines.append(f"{name:<22}" + "".join(f"{100 * scores[f'{key}_r{k}']:7.1f}" for k in (1, 5, 10)))
    return "\n".join([*lines, f"{'chance':<22}" + "".join(f"{100 * k / n:7.1f}" for k in (1, 5, 10))])


if __name__ == "__main__":
    run_script(main, Config, PRESETS)
