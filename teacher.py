"""Trains the teacher: a BERT and a video transformer from scratch on videos and captions (VidLanKD 3.2).

    python teacher.py                                                   # the demo world, on a laptop
    python teacher.py --preset paper --videos howto100m.h5              # HowTo100M, packed by data.py videos
    torchrun --nproc_per_node 4 teacher.py --preset base --videos howto100m.h5
    python teacher.py --objective clip                                  # a small text tower like CLIP's

L^T = L_CT + L_MLM (section 3.2), with L_CT the token-level hinge of Eq. 3. The run leaves
out/teacher-<objective>-s<seed>/ with model/: the language model as a Hugging Face folder, the video encoder,
and the vectors of the clips that serve as vokens. With --objective clip the language model is a text tower
like CLIP's: its end-of-text state is matched with its clip among those of the batch (Radford et al. 2021).
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import losses
from common import Switch, check_fields, duration, keyed_integers, print0, table, write_json
from model import BERT, CLIPConfig, CLIPText, MLMHead, VideoEncoder, model_config, param_groups, recompute
from parts.checkpoints import save_checkpoint
from parts.feed import AHEAD
from parts.machine import flops_per_token, init_ranks, memory_report, move
from parts.metrics import mean_state, recall, vectors
from parts.weights import save_bert, save_clip, save_tensors, save_video_encoder
from run import Run, lr_at, micro_batch_size, run_script, set_seed, steps_of


@dataclass(frozen=True)
class Config:
    preset: str = "demo"  # demo, small (6L-512H), base (12L-768H), paper or paper-6l; flags beat it
    # data
    data_dir: str = "data"  # where the demo world is kept (data_dir/demo-s<seed>)
    videos: str = ""  # a file of data.py videos; empty = the demo world
    val_clips: int = 500  # clips held out, by the hash of their video's id, at most two of a video
    block_size: int = 24  # tokens of the joined captions, [CLS] and [SEP] included
    max_frames: int = 18  # frames of a clip, one a second
    vision: str = "video"  # video, or image = the 2D feature of the middle frame
    feat_norm: bool = False  # L2-normalise the 2D and the 3D part of each frame
    # model
    model: str = "demo"  # shape of the language model: demo, or layers and width: 6L-512H, 12L-768H
    video_layers: int = 1  # layers of the video encoder; 0 = as many as the language model's
    dropout: float = 0.1  # of hidden states and attention
    # objective
    objective: str = "mlm+ct"  # mlm, ct, mlm+ct, or clip = a text tower like CLIP's, one vector a text
    negatives: str = "infonce"  # one (Eq. 3), all (same expectation, less variance), or infonce
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
    warmup_steps: float = 30  # linear warm-up; below 1 = a share of the steps
    max_steps: int = 300  # steps; the learning rate falls to 0 at the last; 0 = as many as --epochs takes
    epochs: float = 0.0  # passes over the data, where max_steps is 0
    stop_on: str = "auto"  # early stopping on loss (paper) or recall@10; auto = recall of more than 10 clips
    patience: int = 5  # evaluations without a better one before it stops
    vokens: int = 30000  # K clips kept for voken retrieval (Appendix A), fewer where the corpus has fewer
    # system
    seed: int = 0  # of weights, order, masks, and of the demo world
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    compile_model: bool = False  # torch.compile the encoders
    grad_checkpoint: bool = False  # recompute the layers' activations in backward: less memory, slower
    out_dir: str = ""  # run folder; empty = out/teacher-<objective>-s<seed>
    resume: Switch = "false"  # go on from the newest checkpoint: false, true, or auto = where there is one
    eval_only: bool = False  # measure the folder's best weights and stop
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    # logging
    log_every: int = 20  # steps a log line
    eval_every: int = 100  # steps between evaluations
    save_every: int = 100  # steps between checkpoints; 0 = by save_minutes alone
    save_minutes: float = 0.0  # minutes between checkpoints; 0 = by save_every alone

    def __post_init__(self):
        check_fields(self, CHOICES, POSITIVE)
        if self.stop_on == "recall" and self.objective == "mlm":
            raise ValueError("--stop_on recall needs the contrastive term; use --stop_on loss")
        if self.block_size > (most := model_config(self.model, 1, self.dropout).max_positions):
            raise ValueError(f"--block_size {self.block_size}: at most the model's {most} positions")
        data.parse_split(self.mask_split)


CHOICES = {"objective": ("mlm", "ct", "mlm+ct", "clip"), "vision": ("video", "image"),
           "negatives": ("one", "all", "infonce"), "ct_input": ("masked", "clean"),
           "reduction": ("mean", "sum"), "stop_on": ("auto", "loss", "recall")}
POSITIVE = ("val_clips", "temperature", "mask_rate", "lr", "patience", "vokens", "eval_every")
# flags that nothing reads but with some values of another one, see common.check_needs
NEEDS = {"w_mlm": ("objective", ("mlm",)), "mask_rate": ("objective", ("mlm", "ct")),
         "mask_split": ("objective", ("mlm", "ct")), "margin": ("negatives", ("one", "all")),
         "temperature": ("negatives", ("infonce",)), "video_layers": ("objective", ("ct", "clip")),
         "data_dir": ("videos", ("",)),
         **dict.fromkeys(("w_ct", "negatives", "ct_input", "vokens"), ("objective", ("ct",)))}
# what a resumed run cannot change
FIXED = ("val_clips", "block_size", "max_frames", "vision", "feat_norm", "model", "video_layers", "objective",
         "mask_rate", "mask_split", "reduction", "batch_size", "weight_decay", "beta2", "seed")
# flags that change no result: hashes tell what data and models are
FREE = ("preset", "videos")

# not in the paper: released code's batch, warm-up and beta2; steps (an upper bound) and the rest are ours
BASE = dict(model="12L-768H", block_size=128, max_frames=512, val_clips=10_000, video_layers=0, lr=2e-4,
            weight_decay=0.01, margin=1.0, negatives="all", batch_size=256, beta2=0.999, warmup_steps=5000,
            max_steps=200_000, eval_every=2000, save_every=0, save_minutes=15.0,
            log_every=100)
# section 4.3: tokens, frames, held-out clips, optimizer, margin, "until it converges on validation data";
# 3.2: 15 % become [MASK]; Eq. 3: one negative; footnote 3: the shapes, of the video encoder, too
PAPER = BASE | dict(mask_split="100/0/0", negatives="one", stop_on="loss")
PRESETS = {"demo": {}, "small": BASE | dict(model="6L-512H"), "base": BASE, "paper": PAPER,
           "paper-6l": PAPER | dict(model="6L-512H")}


class Teacher(nn.Module):
    """Language model and video encoder: all that is trained, so that DDP sees every gradient."""

    def __init__(self, cfg, config, features):
        super().__init__()
        self.cfg = cfg
        self.weights = {name: getattr(cfg, f"w_{name}", 1.0) for name in cfg.objective.split("+")}
        if cfg.objective == "clip":
            self.tower = CLIPText(CLIPConfig(
                config.vocab_size, config.layers, config.hidden, config.heads, config.intermediate,
                positions=cfg.block_size, projection=config.hidden))
        else:
            self.bert = BERT(config)
        if "mlm" in cfg.objective:
            self.mlm = MLMHead(config.hidden, self.bert.embeddings.word.weight, std=config.init_std)
        if cfg.objective != "mlm":
            self.video = VideoEncoder(replace(config, layers=cfg.video_layers or config.layers), features,
                                      cfg.max_frames)
        if cfg.grad_checkpoint:
            recompute(self)

    def encode(self, batch):
        """Clips of data.VideoClips -> vectors (B, C) of texts and videos, as retrieval compares them."""
        v = self.video(batch["frames"], batch["frame_mask"])
        if self.cfg.objective == "clip":
            return self.tower.pool(self.tower(batch["ids"]), batch["mask"]), v
        return mean_state(self.bert(batch["ids"], batch["mask"]), batch["mask"]), v

    def forward(self, batch, divisor):
        """One micro-batch -> {term: sum / divisor[term]}."""
        cfg, terms = self.cfg, {}
        # HACK HERE: the objective
        if cfg.objective == "clip":
            return {"clip": losses.clip(*self.encode(batch), self.tower.logit_scale, divisor["clip"])}
        h = self.bert(batch["inputs"], batch["mask"])  # (B, T, C)
        if "mlm" in cfg.objective:
            masked = h.flatten(0, 1)[batch["mlm_index"]]  # (M, C): logits at masked positions only
            terms["mlm"] = losses.mlm(self.mlm(masked), batch["mlm_targets"], divisor["mlm"])
        if "ct" in cfg.objective:
            if cfg.ct_input == "clean":
                h = self.bert(batch["ids"], batch["mask"])
            v = self.video(batch["frames"], batch["frame_mask"])  # (B, C)
            if cfg.negatives == "one":
                terms["ct"] = losses.hinge(h, v, batch["text_mask"], batch["partner"], batch["partner_video"],
                                           batch["partner_token"], cfg.margin, divisor["ct"])
            elif cfg.negatives == "all":
                terms["ct"] = losses.hinge_all(h, v, batch["text_mask"], cfg.margin, divisor["ct"])
            else:
                terms["ct"] = losses.infonce_tokens(h, v, batch["text_mask"], cfg.temperature, divisor["ct"])
        return terms


# every term of the loss, and how many items of it a micro-batch has
ITEMS = {"mlm": lambda batch: (batch["mlm_targets"] >= 0).sum(),
         "ct": lambda batch: batch["text_mask"].sum(), "clip": lambda batch: len(batch["ids"])}


def make_batch(clips, cfg, index, *keys, pad=False):
    """Clips `index` as a micro-batch: masked inputs, targets, and Eq. 3's drawn negatives.

    keys: of the random draws, (seed, step, positions in the global batch), or ("val", index) for evaluation.
    pad: see data.masked_words.
    The partners x' and v' come from this rank's own micro-batch.
    """
    batch, vocab = clips.batch(index), clips.vocab  # HACK HERE: the batch
    if cfg.objective == "clip":
        return batch
    batch |= data.masked_words(batch, vocab, cfg.mask_rate, cfg.mask_split, *keys, pad=pad)
    batch["text_mask"] = batch["mask"] & (batch["ids"] != vocab.cls) & (batch["ids"] != vocab.sep)
    if cfg.negatives == "one":
        batch["partner"], batch["partner_video"], batch["partner_token"] = losses.hinge_partners(
            batch["text_mask"], keyed_integers, *keys)
    return batch


@torch.no_grad()
def evaluate(model, clips, cfg, ranks):
    """Validation terms over every held-out clip and, with a video encoder, recall on them; over all ranks."""
    model.eval()
    dtype, sees = getattr(torch, cfg.dtype), cfg.objective != "mlm"
    total = torch.zeros(len(ITEMS), 2, dtype=torch.float64)  # term x (sum, items)
    if sees:  # texts and videos as retrieval compares them; 0 where another rank has them
        found = torch.zeros(2, len(clips), model.video.config.hidden, device=ranks.device)
    # as large as in training, but with a negative
    count = min(math.ceil(len(clips) * ranks.size * cfg.grad_accum / cfg.batch_size), len(clips) // 2)
    parts = np.array_split(np.arange(len(clips)), max(1, count))
    for index in parts[ranks.rank::ranks.size]:
        batch = move(make_batch(clips, cfg, index, "val", index), ranks.device)
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            terms = model(batch, dict.fromkeys(ITEMS, 1.0))
            if sees:
                found[:, index] = torch.stack(model.encode(batch)).float()
        for i, (name, items) in enumerate(ITEMS.items()):
            if name in terms:
                total[i] += torch.tensor([terms[name].item(), items(batch)], dtype=torch.float64)
    ranks.sum(total)
    scores = {name: (total[i, 0] / total[i, 1]).item() for i, name in enumerate(ITEMS) if total[i, 1]}
    scores["loss"] = sum(scores[name] * weight for name, weight in model.weights.items())
    if sees:
        text, video = ranks.sum(found).cpu()
        recalls = {f"t2v_r{k}": v for k, v in recall(text, video).items()}
        recalls |= {f"v2t_r{k}": v for k, v in recall(video, text).items()}
        scores |= ranks.of_main(recalls)  # when to save and stop hangs on them
    model.train()
    return scores


def save(model, clips, folder, cfg, ranks):
    """The model's folder: Hugging Face's files, the video encoder, its way of cutting clips, and vokens."""
    if cfg.objective == "clip":
        save_clip(model.tower, folder, clips.vocab)
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
    found, = vectors(lambda b: (model.video(b["frames"], b["frame_mask"]),), clips.clips, index, ranks.device)
    save_tensors({"vectors": found}, folder / "vokens.safetensors")
    print0(f"vokens: {len(index):,} clips")


def recall_table(scores, n):
    """Text of a table: recall on n held-out clips."""
    rows = [[f"held-out clips: {n}", "R@1", "R@5", "R@10"]]
    for name, key in (("text to video", "t2v"), ("video to text", "v2t")):
        rows.append([name, *(f"{100 * scores[f'{key}_r{k}']:.1f}" for k in (1, 5, 10))])
    return table([*rows, ["chance", *(f"{100 * min(1, k / n):.1f}" for k in (1, 5, 10))]])


def memory(model, cfg, config, micro_size):
    """The line on parameters and memory, video encoder and frames included."""
    text, beside, more = replace(config, vocab_size=1), [], 0
    if cfg.objective != "mlm":
        frames = micro_size * cfg.max_frames
        beside = [(replace(model.video.config, vocab_size=1), micro_size, cfg.max_frames)]
        more = 4 * frames * (model.video.features + 2 * config.hidden)  # and their map, before and after norm
    if "ct" in cfg.objective:
        beside += [(text, micro_size, cfg.block_size)] * (cfg.ct_input == "clean" and "mlm" in cfg.objective)
        more += 4 * 8 * micro_size ** 2 * cfg.block_size  # cosines of each token with each clip, and the like
    share = cfg.mask_rate * ("mlm" in cfg.objective)
    report = memory_report(model, config, micro_size, cfg.block_size, share, beside, cfg.grad_checkpoint,
                           more)
    if cfg.objective == "mlm":
        return report
    host = (AHEAD + 2) * cfg.grad_accum * 2 * frames * model.video.features
    return f"{report}; {host / 1e9:.2g} GB of the host's for frames read ahead"


def run_folder(cfg):
    """--out_dir, or out/teacher-<objective>-s<seed>."""
    return Path(cfg.out_dir or f"out/teacher-{cfg.objective}-s{cfg.seed}")


def main(cfg):
    """Trains and saves the model of `cfg`; returns what its results.json holds."""
    ranks, dtype = init_ranks(cfg.device, cfg.dtype), getattr(torch, cfg.dtype)
    micro_size, sees = micro_batch_size(cfg, ranks), cfg.objective != "mlm"
    if sees and micro_size < 2:
        raise SystemExit(f"--batch_size {cfg.batch_size}: a micro-batch has {micro_size} clip, so no "
                         "negatives; raise it")

    # ---- data
    train, val = (data.VideoClips(cfg.videos, cfg.block_size, cfg.max_frames, cfg.vision if sees else "none",
                                  part, cfg.val_clips, cfg.feat_norm, pinned=ranks.device.type == "cuda")
                  for part in ("train", "val"))
    hashes = {"videos": train.hash, "vocabulary": train.vocab.hash}
    run = Run(cfg, run_folder(cfg), ranks, hashes, FIXED, FREE)
    if cfg.resume == "auto" and (results := run.finished()):
        print0(f"reused {run.folder}")
        return results
    max_steps, warmup_steps = steps_of(cfg, len(train))
    print0(f"teacher: {len(train):,} training clips, {len(val):,} held out, {train.features} channels a "
           f"frame, vocabulary {train.vocab.size:,}")

    # ---- models
    set_seed(cfg.seed, 0)
    config = model_config(cfg.model, train.vocab.size, cfg.dropout)
    model = Teacher(cfg, config, train.features).to(ranks.device)
    print0(memory(model, cfg, config, micro_size))
    weights, names = model.weights, list(model.weights)

    # ---- optimizer
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    # ---- resume
    step = run.restore(max_steps, model=model, optimizer=optimizer, scaler=scaler)
    best = run.saved["best"] if run.saved else {"score": None, "step": 0, "bad": 0}
    if cfg.eval_only:
        run.load_best(model)
        scores = evaluate(model, val, cfg, ranks)
        print0(recall_table(scores, len(val)) if sees else f"validation mlm {scores['mlm']:.4f}")
        return scores
    tokens, frames = cfg.batch_size * cfg.block_size, cfg.batch_size * cfg.max_frames
    flops = 3 * tokens * flops_per_token(config, cfg.block_size, cfg.mask_rate * ("mlm" in names))
    if sees:
        flops += 3 * frames * flops_per_token(model.video.config, cfg.max_frames)
    run.begin(names, "tokens", tokens, flops)
    if cfg.compile_model:
        for part in (getattr(model, name, None) for name in ("bert", "tower", "video")):
            if part:
                part.compile()
    ddp = DistributedDataParallel(model) if ranks.size > 1 else model
    model.train()
    make = partial(make_batch, pad=cfg.compile_model or ranks.device.type != "cpu")
    run.feed(partial(data.step_batches, train, cfg, ranks, make), ITEMS)

    # ==== training loop ====
    while True:
        last = step >= max_steps or best["bad"] >= cfg.patience
        if run.eval_due(step, last):
            scores = evaluate(model, val, cfg, ranks)
            by_recall = cfg.stop_on == "recall" or cfg.stop_on == "auto" and sees and len(val) > 10
            score = scores["t2v_r10"] if by_recall else -scores["loss"]
            better = best["score"] is None or score > best["score"]
            best = {"score": score, "step": step, "bad": 0} if better else best | {"bad": best["bad"] + 1}
            last = last or best["bad"] >= cfg.patience
            if better:
                run.check(step)
                save_checkpoint(run.folder, {"model": model.state_dict(), "step": step}, ranks, "best.pt")
            run.note(step, "val", scores, "  ".join(
                f"{k} {v:.3f}" for k, v in scores.items() if k in (*names, "t2v_r10", "v2t_r10"))
                + ("  best so far" if better else f"  no better for {best['bad']} of {cfg.patience}"))
        run.save_due(step, last, best=best)
        if last:
            break

        # the step's micro-batches; each term's divisor: its global items / ranks, as DDP averages gradients
        _, batches, items = run.take(step)
        divisor = {name: (n if cfg.reduction == "mean" else 1) / ranks.size for name, n in items.items()}
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
    run.load_best(model, best["step"])
    results = {"objective": cfg.objective, "vision": cfg.vision, "steps": step, "best_step": best["step"],
               "vocabulary": train.vocab.hash, "clips": len(val)}
    results |= evaluate(model, val, cfg, ranks)
    model.eval()
    if ranks.main:
        save(model, train, run.folder / "model", cfg, ranks)
    print0(f"best at step {best['step']}" + (f"\n\n{recall_table(results, len(val))}\n" if sees else ""))
    print0(f"made {run.folder}/model in {duration(seconds)}")
    return run.finish(results)


if __name__ == "__main__":
    from prepare import chain
    run_script(chain.teacher, Config, PRESETS, NEEDS)
