"""Adapts a pre-trained language encoder beside CLIP's text tower (XDBERT section 2.3, Appendices B and C.1).

    python adapt_xdbert.py                                              # the demo world, from nothing
    torchrun --nproc_per_node 8 adapt_xdbert.py --language bert-base-uncased/ --clip ViT-B-32.pt \\
        --train wiki103.h5 --dtype bfloat16
    python adapt_xdbert.py --objective mlm --no_clip --language bert-base-uncased/ --train wiki103.h5
    python adapt_xdbert.py --preset paper --language electra-large --clip random --dry_run

Both encoders read the same text, each with its tokenizer, and a small cross-modal encoder joins them. Masked
words (MLM), whether both texts are the same (MATCH) and CLIP's tokens (CLIPTC) are predicted from its output.
What is left is the language encoder, of unchanged size: out/xdbert-<objective>-s<seed>/model, a Hugging Face
folder. clip/ and cross.* beside its weights are the rest of the model, for finetune.py --cross.
"""
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import distill
import finetune
import losses
import teacher
from common import check_fields, duration, keyed_integers, print0, table, write_json
from data import open_vocab
from model import (BERT, LANGUAGE, XDBERT, CLIPConfig, CLIPText, MLMHead, flops_per_token, init_weights,
                   memory_report, param_groups)
from parts.tasks import DEMO_TASKS, TASKS
from parts.vocab import OPENAI_CLIP, load_clip_vocab, load_vocab
from parts.weights import load_bert, load_clip, load_mlm_head, save_bert, save_xdbert
from prepare.world import demo_world, demo_xtext
from run import (Interrupt, Log, check_finite, check_resume, check_weights, file_hash, finished_run,
                 init_world, load_checkpoint, lr_at, micro_batch_size, model_folder, move, open_run,
                 peak_flops, peak_memory_mb, restore_rng, run_script, save_checkpoint, set_seed, step_line,
                 unfinished_run)


@dataclass(frozen=True)
class Config:
    preset: str = "auto"  # demo without --train, base with it; or demo, base, paper; flags beat it
    # data
    data_dir: str = "data"  # where the demo world is kept (data_dir/demo-s<seed>)
    train: str = ""  # pairs of data.py xtext: files, or a glob; empty = the demo world
    val: str = ""  # pairs to evaluate on; empty = the last 1 % of the blocks
    block_size: int = 24  # tokens of a sequence of the language encoder, [CLS] and [SEP] included
    segments: int = 2  # of CLIP's tokens for a sequence; what does not fit is cut
    segment_length: int = 0  # tokens of a segment, start and end included; 0 = as many as CLIP has positions
    eval_blocks: int = 500  # validation blocks that are read
    # models
    language: str = ""  # a run, a Hugging Face folder, or bert-base .. = random weights; empty = the demo's
    clip: str = ""  # OpenAI's file, a folder, a run of teacher.py, or random = ViT-B/32; empty = the demo's
    cross_layers: int = 2  # of the cross-modal encoder
    no_clip: bool = False  # the language encoder alone, with --objective mlm: the fair baseline
    freeze: str = ""  # parts that are not trained: clip, language, or clip,language
    dropout: float = 0.1  # of language and cross-modal encoder; CLIP's tower has none
    # objective
    objective: str = "mlm+match+cliptc"  # any of them joined by +
    mask_rate: float = 0.15  # share of the words to predict
    mask_split: str = "80/10/10"  # of these: [MASK] / random / kept
    cliptc_rate: float = 0.15  # share of CLIP's tokens to predict
    reduction: str = "mean"  # of every term over its items: mean or sum
    # optimizer
    batch_size: int = 64  # sequences a step, over all ranks and accumulation
    grad_accum: int = 1  # micro-batches a rank runs for one step
    lr: float = 1e-3  # peak learning rate of AdamW
    weight_decay: float = 0.01  # not on biases and LayerNorm
    beta2: float = 0.98  # AdamW's second momentum
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    warmup: float = 0.05  # share of the planned steps, linear
    max_steps: int = 400  # 0 = as many as --epochs takes
    epochs: float = 0.0  # passes over the text, where max_steps is 0
    schedule_steps: int = 0  # steps that the learning rate is planned for; 0 = those that are run
    # system
    seed: int = 0  # of weights, order, masks, and of the demo world
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    compile_model: bool = False  # torch.compile the encoders
    out_dir: str = ""  # run folder; empty = out/xdbert-<objective>-s<seed>
    resume: bool = False  # go on from the folder's newest checkpoint
    eval_only: bool = False  # measure the folder's newest checkpoint and stop
    dry_run: bool = False  # print the parts and their parameters and stop
    table: bool = True  # on the demo: fine-tune, beside the encoder adapted on as much text alone
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    # logging
    log_every: int = 25  # steps a log line
    eval_every: int = 100  # steps between evaluations
    save_every: int = 200  # steps between checkpoints

    def __post_init__(self):
        chosen = self.objective.split("+")
        if not set(chosen) <= set(OBJECTIVES) or len(set(chosen)) < len(chosen):
            raise ValueError(f"--objective {self.objective}: write some of {', '.join(OBJECTIVES)} joined by "
                             "+")
        check_fields(self, CHOICES, POSITIVE)
        if self.no_clip and self.objective != "mlm":
            raise ValueError("--no_clip needs --objective mlm: the others read CLIP's tokens")
        if self.no_clip and self.freeze:
            raise ValueError("--no_clip trains the language encoder alone: leave --freeze out")
        if self.preset in ("base", "paper") and not self.train and not self.dry_run:
            raise ValueError(f"--preset {self.preset} needs --train, text packed by data.py xtext")
        if min(self.segments, self.cross_layers) < 1:
            raise ValueError("--segments and --cross_layers: at least 1 (--no_clip leaves CLIP out)")
        if unknown := set(filter(None, self.freeze.split(","))) - {"clip", "language"}:
            raise ValueError(f"--freeze {min(unknown)}: write clip, language or clip,language")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup {self.warmup:g}: a share of the steps, at least 0 and below 1")
        for name in ("segment_length", "max_steps", "epochs", "schedule_steps", "dropout"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name):g}: must not be negative")
        if max(self.mask_rate, self.cliptc_rate) > 1 or self.dropout >= 1:
            raise ValueError("--mask_rate and --cliptc_rate are shares, at most 1; --dropout is below 1")
        if not self.max_steps and not self.epochs:
            raise ValueError("--max_steps 0 needs --epochs")
        if self.max_steps and self.schedule_steps and self.max_steps > self.schedule_steps:
            raise ValueError(f"--schedule_steps {self.schedule_steps}: the learning rate would be 0 for the "
                             f"last of --max_steps {self.max_steps}; give as many or more")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"--{name} {getattr(self, name)}: must be a multiple of --log_every "
                                 f"({self.log_every})")
        data.parse_split(self.mask_split)


OBJECTIVES = ("mlm", "match", "cliptc")
CHOICES = {"reduction": ("mean", "sum"), "dtype": ("float32", "bfloat16", "float16")}
POSITIVE = ("eval_blocks", "mask_rate", "cliptc_rate", "batch_size", "grad_accum", "lr", "log_every",
            "eval_every", "save_every")
# what a resumed run cannot change
FIXED = ("block_size", "segments", "segment_length", "cross_layers", "no_clip", "freeze", "objective",
         "mask_rate", "mask_split", "cliptc_rate", "reduction", "batch_size", "weight_decay", "beta2",
         "schedule_steps", "seed")
# flags that change no result: hashes tell what the models and the data are
FREE = ("preset", "train", "val", "language", "clip", "table")

# XDBERT C.1: 1e-4, warm-up 5 %, one epoch, at 512 words and 9 x 77 tokens (Appendix B). The paper planned its
# learning rate for 40 epochs of about 800 steps of 256 and stopped early: `paper`; `base` plans the one epoch
BASE = dict(block_size=512, segments=9, batch_size=256, lr=1e-4, beta2=0.999, max_steps=0, epochs=1.0,
            eval_every=200, save_every=200, log_every=10)
PRESETS = {"auto": lambda given: BASE if "train" in given else {}, "demo": {}, "base": BASE,
           "paper": BASE | dict(schedule_steps=32_000)}


# ---------------------------------------------------------------------------- model and batch


class Adapter(nn.Module):
    """Encoders, cross-modal encoder and heads: all that is trained, so that DDP sees every gradient.

    language: BERT; clip: CLIPText, or None for the baseline; mlm: the language encoder's own MLMHead or None.
    """

    def __init__(self, cfg, language, clip, mlm):
        super().__init__()
        config, chosen = language.config, cfg.objective.split("+")
        self.names = [name for name in OBJECTIVES if name in chosen]
        self.encoder = XDBERT(language, clip, cfg.cross_layers) if clip else language
        self.frozen = [part for name, part in (("language", language), ("clip", clip))
                       if part and name in cfg.freeze.split(",")]
        self.reads = {"text": not {"mlm", "match"}.isdisjoint(self.names), "clip": "cliptc" in self.names}
        if language.pooler:
            language.pooler.requires_grad_(False)  # it goes through as it is: MATCH has one of its own
        if clip:  # DDP would wait for the gradient of what no term reads
            clip.logit_scale.requires_grad_(False)
            for name, halves in (("text", self.encoder.cross.text), ("clip", self.encoder.cross.clip)):
                halves[-1].requires_grad_(self.reads[name])
        if "mlm" in self.names:
            self.mlm = mlm or MLMHead(config.hidden, language.embeddings.word.weight, config.layer_norm_eps,
                                      config.init_std)
        if "match" in self.names:
            self.encoder.pooler = nn.Linear(config.hidden, config.hidden)
            self.match = nn.Linear(config.hidden, 2)
            for part in (self.encoder.pooler, self.match):
                init_weights(part, config.init_std)
        if "cliptc" in self.names:
            self.cliptc = MLMHead(clip.width, clip.embeddings.word.weight, config.layer_norm_eps,
                                  config.init_std)
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def logits(self, batch):
        """{term: (items, classes)}: of masked words, of [CLS], and of CLIP's chosen tokens, there alone."""
        if isinstance(self.encoder, XDBERT):
            clip = {key: batch[key] for key in CLIP_KEYS}
            h, c = self.encoder.streams(batch["inputs"], **clip, **self.reads)  # (B, T, C), (B, R, P)
        else:
            h = self.encoder(batch["inputs"])  # (B, T, C)
        found = {}
        if "mlm" in self.names:
            found["mlm"] = self.mlm(h.flatten(0, 1)[batch["mlm_index"]])
        if "match" in self.names:
            found["match"] = self.match(self.encoder.pool(h))
        if "cliptc" in self.names:
            found["cliptc"] = self.cliptc(c.flatten(0, 1)[batch["cliptc_index"]])
        return found

    def forward(self, batch, count):
        """One micro-batch -> {term: sum of cross-entropies / count[term]}."""
        return {name: losses.mlm(logits, batch[f"{name}_targets"], count[name])
                for name, logits in self.logits(batch).items()}


CLIP_KEYS = ("clip_ids", "clip_place", "clip_mask")


def prepare(blocks, cfg, index, text, *keys):
    """The micro-batch of blocks `index`, whose CLIP side holds the texts of blocks `text`: inputs, targets.

    keys: of the random draws, (seed, step, positions in the global batch), or ("val", index) for evaluation.
    """
    batch = blocks.batch(index)
    inputs, labels = data.mask_tokens(batch["ids"], batch["mask"], blocks.vocab, cfg.mask_rate,
                                      cfg.mask_split, *keys)
    place = (labels.flatten() != -100).nonzero()[:, 0]
    found = {"inputs": inputs, "mlm_index": place, "mlm_targets": labels.flatten()[place]}
    if cfg.no_clip:
        return found
    found |= blocks.clip_batch(text)
    # by its word pieces, not by index: a text may stand in the corpus twice
    found["match_targets"] = (blocks.batch(text)["ids"] == batch["ids"]).all(1).long()
    found["cliptc_index"], found["cliptc_targets"] = data.clip_targets(
        *(found[key] for key in CLIP_KEYS), blocks.clip_vocab, cfg.cliptc_rate, *keys)
    return found


@torch.no_grad()
def evaluate(model, blocks, cfg, world):
    """Loss and accuracy of every term on the first eval_blocks blocks, all draws fixed by block; over all
    ranks. With MATCH each block is read twice, beside its own text and beside another: MLM's accuracy is
    told for both."""
    model.eval()
    index = np.arange(min(len(blocks), cfg.eval_blocks))
    sides = {"matched": index}
    if "match" in model.names and len(blocks) > 1:
        sides["mismatched"] = (index + 1 + keyed_integers(len(blocks) - 1, "val other", index)) % len(blocks)
    # (sides, terms) x (summed loss, right, items)
    total = torch.zeros(len(sides), len(model.names), 3, dtype=torch.float64)
    parts = np.array_split(index, max(1, len(index) * world.size * cfg.grad_accum // cfg.batch_size))
    for side, text in enumerate(sides.values()):
        for part in parts[world.rank::world.size]:
            batch = move(prepare(blocks, cfg, part, text[part], "val", part), world.device)
            for term, (name, logits) in enumerate(model.logits(batch).items()):
                targets = batch[f"{name}_targets"]
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                right = (logits.argmax(1) == targets).sum()
                total[side, term] += torch.tensor([loss.item(), right.item(), len(targets)],
                                                  dtype=torch.float64)
    model.train()
    world.sum(total)
    scores = {}
    for name, (loss, right, n) in zip(model.names, total.sum(0).tolist()):
        scores |= {name: loss / max(1, n), f"{name}_accuracy": right / max(1, n)}
    if len(sides) > 1 and "mlm" in model.names:
        of_mlm = total[:, model.names.index("mlm")].tolist()
        scores |= {f"mlm_accuracy_{side}": right / max(1, n) for side, (_, right, n) in zip(sides, of_mlm)}
    return scores


# ---------------------------------------------------------------------------- what a run starts from


def open_language(cfg, vocab):
    """(BERT, its MLMHead or None, hash of its weights) of --language; vocab: that of the packed words."""
    if cfg.language in LANGUAGE:
        print0(f"--language {cfg.language}: random weights; a folder of that model brings trained ones")
        config = replace(LANGUAGE[cfg.language], vocab_size=vocab.size, dropout=cfg.dropout)
        return BERT(config, pooler=config.model_type == "bert"), None, cfg.language
    folder = model_folder(cfg.language, "--language")
    own = load_vocab(folder)
    if own.hash != vocab.hash:
        raise SystemExit(f"--train {cfg.train}: packed with another vocabulary ({vocab.size:,} tokens) than "
                         f"that of --language {cfg.language} ({own.size:,}); pack it again with --vocab "
                         f"{folder}")
    language = load_bert(folder, pooler="trained", dropout=cfg.dropout)
    return language, load_mlm_head(folder, language), file_hash(folder)


def open_clip(cfg):
    """(CLIPText, hash of its weights, hash of its vocabulary) of --clip."""
    if Path(cfg.clip).is_file():  # OpenAI's comes without its tokenizer
        return load_clip(cfg.clip), file_hash(cfg.clip), OPENAI_CLIP
    folder = model_folder(cfg.clip, "--clip")
    return load_clip(folder), file_hash(folder), load_clip_vocab(folder).hash


def open_parts(cfg):
    """(PairBlocks to train on and to evaluate on, BERT, its MLMHead or None, CLIPText or None, hashes) that
    the flags name; one line where they do not fit each other."""
    clip, clip_hash, clip_vocab_hash = None, "", ""
    if cfg.clip == "random":
        clip_hash = cfg.clip
    elif not cfg.no_clip:
        clip, clip_hash, clip_vocab_hash = open_clip(cfg)
    positions = clip.config.positions if clip else CLIPConfig.positions
    length = cfg.segment_length or positions
    if length > positions:
        raise SystemExit(f"--segment_length {length}: CLIP's tower has {positions} positions; give that or "
                         "less")
    train, val = (data.PairBlocks(cfg.train, cfg.block_size, part, cfg.val, cfg.segments, length)
                  for part in ("train", "val"))
    vocab, clip_vocab = train.vocab, train.clip_vocab
    if (val.vocab.hash, val.clip_vocab.hash) != (vocab.hash, clip_vocab.hash):
        raise SystemExit(f"--val {cfg.val} is packed with other vocabularies than --train {cfg.train}; pack "
                         "it again")
    if "match" in cfg.objective and len(train) < 2:
        raise SystemExit(f"--train {cfg.train}: one block, but MATCH needs another text; lower --block_size "
                         "or pack more text")
    language, mlm, language_hash = open_language(cfg, vocab)
    if cfg.block_size > language.config.max_positions:
        raise SystemExit(f"--block_size {cfg.block_size}: {cfg.language} has {language.config.max_positions} "
                         "positions; give that or less")
    if clip and (clip_vocab_hash, clip.config.vocab_size) != (clip_vocab.hash, clip_vocab.size):
        raise SystemExit(f"--train {cfg.train}: packed with another tokenizer ({clip_vocab.size:,} tokens) "
                         f"than that of --clip {cfg.clip} ({clip.config.vocab_size:,}); pack it again with "
                         "its --clip_vocab")
    if cfg.clip == "random" and not cfg.no_clip:
        clip = CLIPText(CLIPConfig(vocab_size=clip_vocab.size))
    return train, val, language, mlm, clip, {
        "corpus": train.hash, "validation text": val.hash, "vocabulary": vocab.hash,
        "language encoder": language_hash, "CLIP": clip_hash}


def demo_parts(cfg, folder, demo, world):
    """cfg with what the demo adapts: packed pairs of texts, the text-only student, a CLIP-like tower."""
    for flag, load in (("language", load_vocab), ("clip", load_clip_vocab)):
        path = getattr(cfg, flag)
        if path and path not in (*LANGUAGE, "random"):
            own = OPENAI_CLIP if Path(path).is_file() else load(model_folder(path, f"--{flag}")).hash
            if own != open_vocab(demo / "corpus.h5").hash:
                raise SystemExit(f"--train is missing: --{flag} {path} cannot read the demo world; pack text "
                                 "with `python data.py xtext`")
    made = {"train": str(demo_xtext(demo, world))}
    if not cfg.language:
        student = distill.Config(seed=cfg.seed, data_dir=cfg.data_dir, device=cfg.device,
                                 block_size=cfg.block_size)
        made["language"] = str(folder.parent / f"distill-none-s{cfg.seed}")
        distill.main(distill.text_only_run(student, made["language"]), reuse=True, alone=True)
    if not cfg.clip and not cfg.no_clip:
        made["clip"] = str(folder.parent / f"teacher-clip-s{cfg.seed}")
        teacher.main(teacher.Config(objective="clip", seed=cfg.seed, data_dir=cfg.data_dir, device=cfg.device,
                                    block_size=cfg.block_size, out_dir=made["clip"]), reuse=True)
    return replace(cfg, **made)


def parts_table(model):
    """Text of a table: the parameters of each part; heads are not in the total, as in the paper's Table 6."""
    def size(part):
        return sum(p.numel() for p in part.parameters())
    encoder = model.encoder
    parts = {"language encoder": size(encoder)}
    if isinstance(encoder, XDBERT):
        parts = {"language encoder": size(encoder.language), "CLIP's text tower": size(encoder.clip),
                 f"cross-modal encoder, {len(encoder.cross.text)} layers": size(encoder.cross)}
    rows = [[name, f"{n:,}"] for name, n in parts.items()] + [["total", f"{sum(parts.values()):,}"]]
    # tied weights count once, with their encoder
    rows.append(["heads, not in the total", f"{size(model) - sum(parts.values()):,}"])
    return table([["", "parameters"], *rows])


def dry_run(cfg):
    """Builds the model from configurations alone, without weights or data, and prints its parts."""
    if cfg.language not in LANGUAGE or not cfg.no_clip and cfg.clip != "random":
        raise SystemExit(f"--dry_run builds from configurations: give --language {', '.join(LANGUAGE)} and "
                         "--clip random (or --no_clip)")
    with torch.device("meta"):
        config = LANGUAGE[cfg.language]
        model = Adapter(cfg, BERT(config, pooler=config.model_type == "bert"),
                        None if cfg.no_clip else CLIPText(CLIPConfig()), None)
    print0(parts_table(model))
    return model


def flops_of(model, cfg, length, used):
    """Floating-point operations of a sequence's forward pass; used: mean share of segments in use."""
    T, config = cfg.block_size, model.encoder.config
    total = T * flops_per_token(config, T, cfg.mask_rate * ("mlm" in model.names))
    if cfg.no_clip:
        return total
    clip, cross, R = model.encoder.clip.config, model.encoder.cross, used * cfg.segments * length
    total += R * flops_per_token(clip, length, cfg.cliptc_rate * ("cliptc" in model.names))
    # a cross-modal layer: a layer of each stream, and attention to the other: query and output map its own
    # tokens, key and value the other's
    for halves, own, other, width in ((cross.text, T, R, config.hidden), (cross.clip, R, T, clip.projection)):
        for half in halves:
            total += 2 * own * sum(p.numel() for p in half.layer.parameters()) + 4 * own * own * width
            total += 4 * own * width * width + 4 * other * own * width
            total += 4 * other * (clip.projection + config.hidden - width) * width
    return total


def memory(model, cfg, micro_size, length, used):
    """The line on parameters and memory; a cross-modal layer counts as one and a half."""
    config = model.encoder.config
    if cfg.no_clip:
        return memory_report(model, config, micro_size, cfg.block_size)
    clip, segments = model.encoder.clip.config, max(1, round(micro_size * used * cfg.segments))
    halves = dict(layers=math.ceil(1.5 * cfg.cross_layers), intermediate=config.intermediate, vocab_size=1)
    return memory_report(model, config, micro_size, cfg.block_size, cfg.mask_rate, [
        (clip, segments, length), (replace(config, **halves), micro_size, cfg.block_size),
        (replace(clip, **halves), micro_size, max(1, round(used * cfg.segments * length)))])


# ---------------------------------------------------------------------------- the run


def run_folder(cfg):
    """out/xdbert-<objective>-s<seed>, with noclip in it for the baseline."""
    return Path(cfg.out_dir or f"out/xdbert-{cfg.objective}{'-noclip' * cfg.no_clip}-s{cfg.seed}")


def main(cfg, reuse=False):
    """Adapts and saves; returns the results.

    reuse: where a finished run of the same flags and data exists, it returns that one's results.
    """
    if cfg.dry_run:
        return dry_run(cfg)
    world, given = init_world(cfg.device), cfg
    dtype = getattr(torch, cfg.dtype)
    micro_size = micro_batch_size(cfg, world)
    folder = run_folder(cfg)
    saved = load_checkpoint(folder, world) if cfg.resume or cfg.eval_only else None

    # data, and on the demo what is missing: world, pairs, text-only student, CLIP-like tower
    demo = None if cfg.train else demo_world(cfg.data_dir, cfg.seed, world)
    if demo:
        cfg = demo_parts(cfg, folder, demo, world)
    for flag in ("language", "clip")[:1 if cfg.no_clip else 2]:
        if not getattr(cfg, flag):
            raise SystemExit(f"--{flag} is missing; --help tells what it may be")
    set_seed(cfg.seed, 0)
    train, val, language, mlm, clip, hashes = open_parts(cfg)
    vocab, clip_vocab, length = train.vocab, train.clip_vocab, train.length
    if reuse:
        if before := finished_run(folder, cfg, hashes, FREE):
            print0(f"reused {folder}")
            return before
        if unfinished_run(folder, cfg, hashes, FREE):
            cfg, saved = replace(cfg, resume=True), load_checkpoint(folder, world)
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    schedule_steps = cfg.schedule_steps or max_steps
    warmup_steps = round(cfg.warmup * schedule_steps)
    if max_steps > schedule_steps:
        raise SystemExit(f"--schedule_steps {schedule_steps}: the learning rate would be 0 for the last of "
                         f"{max_steps} steps; give as many or more")

    # model and optimizer
    model = Adapter(cfg, language, clip, mlm).to(world.device)
    print0(parts_table(model))
    flops = flops_of(model, cfg, length, train.used)
    print0(memory(model, cfg, micro_size, length, train.used))
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    names, weights = model.names, dict.fromkeys(model.names, 1.0)

    # resume
    start = 0
    if cfg.resume or cfg.eval_only:
        check_resume(saved["config"], cfg, saved["hashes"], hashes, FIXED)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty but in float16
            scaler.load_state_dict(saved["scaler"])
        start = saved["step"]
    if cfg.eval_only:
        scores = evaluate(model, val, cfg, world)
        print0(val_line(start, scores))
        return scores
    folder = open_run(folder, cfg, world, hashes)
    log = Log(folder, world, saved["log_lines"] if cfg.resume else 0)
    interrupt = Interrupt(cfg.max_minutes)
    if cfg.compile_model:
        for part in (language, clip):
            if part:
                part.compile()
    ddp = DistributedDataParallel(model) if world.size > 1 else model
    set_seed(cfg.seed, 1 + world.rank)
    if cfg.resume:
        restore_rng(saved, world)

    tokens, peak = cfg.batch_size * cfg.block_size, peak_flops(world.device, dtype) * world.size
    window = torch.zeros(cfg.log_every, len(names), device=world.device)
    first, clock = start, None  # first step of the window; when it began, pauses left out; None: warming up
    began, step = time.monotonic(), start
    print0(f"adapt: {cfg.objective}, {len(train):,} blocks of {cfg.block_size} tokens"
           + ("" if cfg.no_clip else f" beside {cfg.segments} x {length} of CLIP's ({100 * train.used:.0f} % "
              f"of the segments in use, {train.cut:,} of CLIP's tokens cut)")
           + f", {train.dropped:,} tokens of the tail dropped"
           + f", {max_steps:,} steps of {cfg.batch_size} ({max_steps * cfg.batch_size / len(train):.2f} "
           "epochs)")
    model.train()
    while True:
        pause = time.monotonic()
        last = step >= max_steps
        if (step % cfg.eval_every == 0 or last) and not (step == start and cfg.resume):
            scores = evaluate(model, val, cfg, world)
            log.write(step=step, **{f"val_{k}": v for k, v in scores.items()})
            print0(val_line(step, scores))
        stop = interrupt.due(world)
        if (step % cfg.save_every == 0 and step > start) or last or stop:
            check_finite(world.sum(window.clone()), first, names, folder)
            check_weights(model, step, folder)
            save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                     "scaler": scaler.state_dict(), "step": step, "log_lines": log.lines,
                                     "hashes": hashes, "config": asdict(cfg)}, world)
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
            index = train.index(cfg.seed, step, cfg.batch_size, rows)
            keys = cfg.seed, step, rows
            # without MATCH both sides always hold the same text
            text = data.match_texts(index, len(train), *keys) if "match" in names else index
            batch = prepare(train, cfg, index, text, *keys)
            items += torch.tensor([len(batch[f"{name}_targets"]) for name in names])
            batches.append(move(batch, world.device))
        items = world.sum(items).clamp(min=1) if cfg.reduction == "mean" else torch.ones(len(names))
        count = dict(zip(names, (items / world.size).tolist()))
        lr = lr_at(step, cfg.lr, warmup_steps, schedule_steps)

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
            mfu = speed * 3 * cfg.batch_size * flops / peak if peak else 0.0
            rate = {"tokens_per_s": speed * tokens, "mfu": mfu} if speed else {}
            log.write(step=step, **mean, lr=lr, grad_norm=norm.item(), **rate,
                      memory_mb=peak_memory_mb(world.device))
            left = (now - began) / (step - start) * (max_steps - step)
            print0(step_line(step, mean, lr, speed, tokens, mfu, left))
            first, clock = step, now

    interrupt.release()
    if step == start:  # resumed behind its last step
        scores = evaluate(model, val, cfg, world)
    results = {"objective": cfg.objective, "no_clip": cfg.no_clip, "folder": str(folder), "steps": step,
               "vocabulary": vocab.hash, "clip_tokens_cut": train.cut, "segments_used": train.used,
               "tokens_dropped": train.dropped} | scores | {"finished": time.time()}
    if world.main:
        if cfg.no_clip:
            save_bert(language, folder / "model", vocab, mlm)
        else:
            save_xdbert(model.encoder, folder / "model", vocab, clip_vocab, mlm)
        write_json(folder / "results.json", results)
    print0(f"made {folder}/model in {duration(time.monotonic() - began)}")
    world.barrier()
    if demo and cfg.table and not cfg.no_clip and not reuse:
        compare(given, folder, demo, world)
    return results


def val_line(step, scores):
    """The line printed after an evaluation."""
    return f"step {step:6d}  val  " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def baseline_of(cfg, folder):
    """Config of the same encoder adapted on as much text alone; what only CLIP's side reads is at its
    default, so that one such run serves all."""
    unused = ("clip", "segments", "segment_length", "cross_layers", "freeze", "cliptc_rate")
    cfg = replace(cfg, **{name: getattr(Config, name) for name in unused}, objective="mlm", no_clip=True,
                  resume=False, max_minutes=0.0, out_dir="")
    return replace(cfg, out_dir=str(folder.parent / run_folder(cfg).name))


def compare(cfg, folder, demo, world):
    """Fine-tunes the adapted encoder and the baseline, adapted on as much text alone, on the demo's tasks."""
    baseline, tuning = baseline_of(cfg, folder), finetune.Config(data_dir=cfg.data_dir, device=cfg.device)
    main(baseline, reuse=True)
    rows, tasks = {}, [TASKS[name] for name in DEMO_TASKS]
    interrupt = Interrupt()
    for row, run in (("as much text alone", baseline.out_dir), ("adapted", folder)):
        start = finetune.open_start(str(run), demo=demo)
        one = replace(tuning, out_dir=str(folder.parent / "finetune" / start.name))
        rows[row] = {task.name: finetune.run_task(one, task, start, demo / "raw" / "tasks", world,
                                                  interrupt)["runs"] for task in tasks}
    interrupt.release()
    print0(f"\n{finetune.compared(rows, tasks, finetune.PER_TASK[tuning.preset][3])}\n")
    if world.main:
        write_json(folder / "table.json", rows)


if __name__ == "__main__":
    run_script(main, Config, PRESETS)
