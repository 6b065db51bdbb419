"""Adapts a pre-trained language encoder beside CLIP's text tower (XDBERT section 2.3, Appendices B and C.1).

    python adapt_xdbert.py                                              # the demo world, from nothing
    torchrun --nproc_per_node 8 adapt_xdbert.py --language bert-base-uncased/ --clip ViT-B-32.pt \\
        --train wiki103.h5 --dtype bfloat16
    python adapt_xdbert.py --objective mlm+itc --cross_layers 0         # what CLIP knows, at the least cost
    python adapt_xdbert.py --objective mlm --no_clip --language bert-base-uncased/ --train wiki103.h5
    python adapt_xdbert.py --preset paper --language electra-large --clip random --dry_run

Both encoders read the same text, each with its tokenizer, and a small cross-modal encoder joins them. Masked
words (MLM), whether both texts are the same (MATCH) and CLIP's tokens (CLIPTC) are predicted from its output.
ITC, which the paper does not have, draws the language encoder's own states to CLIP's vector of the text.
The run leaves the language encoder, of unchanged size: out/xdbert-<objective>-s<seed>/model, a Hugging Face
folder. clip/ and cross.* beside its weights are the rest of the model, for finetune.py --cross.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import losses
from common import Switch, check_fields, duration, keyed_integers, print0, read_json, table
from model import (BERT, FIRST_LOGIT_SCALE, XDBERT, BERTConfig, CLIPConfig, CLIPText, MLMHead, init_weights,
                   param_groups, recompute)
from parts.machine import Ranks, flops_per_token, init_ranks, memory_report, move
from parts.metrics import gradient_norms, probes
from parts.weights import (check_tower, load_bert, load_mlm_head, open_clip, save_bert, save_xdbert,
                           vocab_of)
from run import Run, file_hash, lr_at, micro_batch_size, model_folder, run_script, set_seed, steps_of


@dataclass(frozen=True)
class Config:
    preset: str = "auto"  # demo without --train, base with it; or demo, base, paper; flags beat it
    # data
    data_dir: str = "data"  # where the demo world is kept (data_dir/demo-s<seed>)
    train: str = ""  # pairs of data.py xtext: files, or a glob; empty = the demo world
    val: str = ""  # pairs to evaluate on; empty = the last 1 % of the blocks
    block_size: int = 24  # tokens of a sequence of the language encoder, [CLS] and [SEP] included
    segments: int = 2  # of CLIP's tokens for a sequence; what does not fit is cut
    eval_blocks: int = 500  # validation blocks that are read
    # models
    language: str = ""  # a run, a Hugging Face folder, or bert-base .. = random weights; empty = the demo's
    clip: str = ""  # OpenAI's file, a folder, a run of teacher.py, or random = ViT-B/32; empty = the demo's
    quick_gelu: bool = False  # a --clip file that does not tell its activation has OpenAI's
    cross_layers: int = 2  # of the cross-modal encoder; 0 = none: mlm and itc read the language encoder
    no_clip: bool = False  # the language encoder alone, with --objective mlm: the fair baseline
    freeze: str = "auto"  # what is not trained: none, clip, language, clip,language; auto = clip with itc
    dropout: float = 0.1  # of language and cross-modal encoder; CLIP's tower has none
    # objective
    objective: str = "mlm+match+cliptc"  # any of mlm, match, cliptc, itc joined by +
    w_mlm: float = 1.0  # weight of masked words
    w_match: float = 1.0  # of MATCH
    w_cliptc: float = 1.0  # of CLIP's tokens
    w_itc: float = 3.0  # of the contrast with CLIP's vector of the text; measured on the demo
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
    warmup_steps: float = 0.05  # linear warm-up; below 1 = a share of the planned steps
    max_steps: int = 400  # steps that are run; 0 = as many as --epochs takes
    epochs: float = 0.0  # passes over the data, where max_steps is 0
    schedule_steps: int = 0  # steps that the learning rate is planned for; 0 = those that are run
    # system
    seed: int = 0  # of weights, order, masks, and of the demo world
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # of the passes: float32, bfloat16 or float16
    compile_model: bool = False  # torch.compile the encoders
    grad_checkpoint: bool = False  # recompute the layers' activations in backward: less memory, slower
    out_dir: str = ""  # run folder; empty = out/xdbert-<objective>-s<seed>
    resume: Switch = "false"  # go on from the newest checkpoint: false, true, or auto = where there is one
    eval_only: bool = False  # measure the folder's newest checkpoint and stop
    dry_run: bool = False  # print the parts and their parameters and stop
    table: bool = True  # on the demo: fine-tune, beside the encoder adapted on as much text alone
    max_minutes: float = 0.0  # save and stop after so long; 0 = no limit
    # logging
    log_every: int = 25  # steps a log line
    grad_every: int = 100  # steps between measurements of each term's gradient; a multiple of log_every
    eval_every: int = 100  # steps between evaluations
    save_every: int = 200  # steps between checkpoints; 0 = by save_minutes alone
    save_minutes: float = 0.0  # minutes between checkpoints; 0 = by save_every alone

    def __post_init__(self):
        chosen = self.objective.split("+")
        if not set(chosen) <= set(ITEMS) or len(set(chosen)) < len(chosen):
            raise ValueError(f"--objective {self.objective}: some of {'+'.join(ITEMS)}")
        check_fields(self, CHOICES, POSITIVE)
        if self.no_clip and (self.objective != "mlm" or self.freeze not in ("auto", "none")):
            raise ValueError("--no_clip trains the language encoder alone: it needs --objective mlm, and no "
                             "--freeze")
        if not (self.cross_layers or self.no_clip or self.objective in ("mlm+itc", "itc+mlm", "itc")):
            raise ValueError("--cross_layers 0: match and cliptc read the cross-modal encoder, without it "
                             "only itc reads CLIP; give --objective mlm+itc or itc")
        if self.freeze not in (*FREEZE, ""):  # "": none, in runs of before
            raise ValueError(f"--freeze {self.freeze}: write one of {' '.join(FREEZE)}")
        if not (self.no_clip or has_cross(self)) and self.freeze not in ("auto", "clip"):
            raise ValueError(f"--freeze {self.freeze}: without a cross-modal encoder CLIP's tower is never "
                             "trained and the language encoder always; leave --freeze out")
        if self.preset in ("base", "paper") and not self.train and not self.dry_run:
            raise ValueError(f"--preset {self.preset} needs --train, text packed by data.py xtext")
        data.parse_split(self.mask_split)


LANGUAGE = {  # shapes of the papers' language encoders, for random weights
    "bert-base": BERTConfig(),
    "electra-base": BERTConfig(model_type="electra"),
    "electra-large": BERTConfig(layers=24, hidden=1024, heads=16, intermediate=4096, model_type="electra"),
}
# every term of the loss, and how many items of it a micro-batch has
ITEMS = {"mlm": lambda batch: (batch["mlm_targets"] >= 0).sum(),
         "match": lambda batch: len(batch["match_targets"]),
         "cliptc": lambda batch: len(batch["cliptc_targets"]), "itc": lambda batch: batch["itc_mask"].sum()}
FREEZE = ("auto", "none", "clip", "language", "clip,language")
CHOICES = {"reduction": ("mean", "sum")}
POSITIVE = ("eval_blocks", "mask_rate", "cliptc_rate", "lr", "grad_every", "eval_every")
# flags that nothing reads but with some values of another one, see common.check_needs
NEEDS = {f"w_{name}": ("objective", (name,)) for name in ITEMS}
NEEDS |= {"cliptc_rate": ("objective", ("cliptc",)), "clip": ("no_clip", ("False",)),
          "cross_layers": ("no_clip", ("False",)), "data_dir": ("train", ("",))}
# what a resumed run cannot change
FIXED = ("block_size", "segments", "cross_layers", "no_clip", "freeze", "objective", "mask_rate",
         "mask_split", "cliptc_rate", "reduction", "batch_size", "weight_decay", "beta2",
         "schedule_steps", "seed")
# flags that change no result: hashes tell what data and models are
FREE = ("preset", "train", "val", "language", "clip", "quick_gelu", "table")

# XDBERT C.1: 1e-4, warm-up 5 %, one epoch, at 512 words and 9 x 77 tokens (Appendix B). The paper planned its
# learning rate for 40 epochs of about 800 steps of 256 and stopped early: `paper`; `base` plans the one epoch
BASE = dict(block_size=512, segments=9, batch_size=256, lr=1e-4, beta2=0.999, max_steps=0, epochs=1.0,
            grad_every=200, eval_every=200, save_every=0, save_minutes=15.0, log_every=10)
PRESETS = {"auto": lambda given: BASE if "train" in given else {}, "demo": {}, "base": BASE,
           "paper": BASE | dict(schedule_steps=32_000)}


def has_cross(cfg):
    """Whether a cross-modal encoder is built: itc reads the encoders themselves."""
    return not cfg.no_clip and cfg.cross_layers > 0 and cfg.objective != "itc"


def freezing(cfg):
    """--freeze with `auto` resolved, and why it is so."""
    if cfg.freeze != "auto":
        return cfg.freeze, "as asked"
    if "itc" in cfg.objective.split("+"):
        return "clip", "auto: a tower that is trained along forgets what itc draws from it"
    return "none", "auto: nothing is, as in the paper"


class Adapter(nn.Module):
    """Encoders, cross-modal encoder and heads: all that is trained, so that DDP sees every gradient.

    language: BERT; tower: CLIPText, or None for the baseline; mlm: the language encoder's MLMHead, or None;
    ranks: whose pairs are ITC's negatives.
    """

    def __init__(self, cfg, language, tower, mlm, ranks=Ranks(0, 1, torch.device("cpu"))):
        super().__init__()
        config, chosen = language.config, cfg.objective.split("+")
        self.weights = {name: getattr(cfg, f"w_{name}") for name in ITEMS if name in chosen}
        self.crossed, self.ranks = has_cross(cfg), ranks
        self.encoder = XDBERT(language, tower, cfg.cross_layers) if self.crossed else language
        self.beside = None if self.crossed else tower
        self.frozen = [part for name, part in (("language", language), ("clip", tower))
                       if part and name in cfg.freeze.split(",")]
        self.reads = {"text": not {"mlm", "match"}.isdisjoint(self.weights), "clip": "cliptc" in self.weights}
        if language.pooler:
            language.pooler.requires_grad_(False)  # MATCH has a pooler of its own
        if tower:  # DDP would wait for the gradient of what no term reads
            tower.logit_scale.requires_grad_(False)
        if self.crossed:
            for name, halves in (("text", self.encoder.cross.text), ("clip", self.encoder.cross.clip)):
                halves[-1].requires_grad_(self.reads[name])
        if "mlm" in self.weights:
            self.mlm = mlm or MLMHead(config.hidden, language.embeddings.word.weight, config.layer_norm_eps,
                                      config.init_std)
        if "match" in self.weights:
            self.encoder.pooler = nn.Linear(config.hidden, config.hidden)
            self.match = nn.Linear(config.hidden, 2)
            for part in (self.encoder.pooler, self.match):
                init_weights(part, config.init_std)
        if "cliptc" in self.weights:
            self.cliptc = MLMHead(tower.width, tower.embeddings.word.weight, config.layer_norm_eps,
                                  config.init_std)
        if "itc" in self.weights:
            self.itc = nn.Linear(config.hidden, tower.width)
            init_weights(self.itc, config.init_std)
            self.itc_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))
        for part in self.frozen:
            part.requires_grad_(False)
        if cfg.grad_checkpoint:
            recompute(self)

    @property
    def language(self):
        return self.encoder.language if self.crossed else self.encoder

    @property
    def tower(self):
        return self.encoder.clip if self.crossed else self.beside

    def train(self, mode=True):
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, batch, divisor):
        """One micro-batch -> {term: sum / divisor[term]}."""
        return self.terms(*self.states(batch), batch, divisor)

    def states(self, batch):
        """The encoders' own states: the language encoder's (B, T, C), and CLIP's (n, l, P) or None."""
        return self.language(batch["inputs"]), self.tower(batch["clip_ids"]) if self.tower else None

    def terms(self, h, c, batch, divisor):
        """Every term from the encoders' states; ITC's negatives are all pairs of the global batch."""
        # HACK HERE: the objective
        terms = {name: losses.mlm(logits, batch[f"{name}_targets"], divisor[name])
                 for name, logits in self.logits(h, c, batch).items()}
        if "itc" in self.weights:
            pairs = self.pairs(h, c, batch)
            others = batch.get("others", ())
            if not others and self.ranks.size > 1:
                others, = exchange([pairs], self.ranks)
            z, z_clip, mask = (x.flatten(0, 1) for x in pairs)
            terms["itc"] = losses.itc(z, z_clip, self.itc_scale, mask, divisor["itc"], others)
        return terms

    def logits(self, h, c, batch):
        """{term: (items, classes)}: of masked words, of [CLS], and of CLIP's chosen tokens, there alone."""
        if self.crossed:
            h, c = self.encoder.join(h, c, None, batch["clip_place"], batch["clip_mask"], **self.reads)
        found = {}
        if "mlm" in self.weights:
            found["mlm"] = self.mlm(h.flatten(0, 1)[batch["mlm_index"]])
        if "match" in self.weights:
            found["match"] = self.match(self.encoder.pool(h))
        if "cliptc" in self.weights:
            found["cliptc"] = self.cliptc(c.flatten(0, 1)[batch["cliptc_index"]])
        return found

    def pairs(self, h, c, batch):
        """ITC's pairs, one for each of CLIP's segments: z (B, S, P), of the mean state of the words that it
        covers; CLIP's state at its end (B, S, P); and which are real (B, S)."""
        words = batch["segment_words"]  # (B, S, T)
        mean = (words.to(h.dtype) @ h).float() / words.sum(-1, keepdim=True).clamp(min=1)  # (B, S, C)
        ends = F.embedding(batch["clip_end"], c.flatten(0, 1))  # (B, S, P)
        return self.itc(mean).float(), ends.float(), batch["itc_mask"]


@torch.no_grad()
def share_pairs(model, batches, ranks):
    """Before a step of several micro-batches: gives each the pairs of all others, by a pass of its own, with
    its own dropout."""
    pairs = [model.pairs(*model.states(batch), batch) for batch in batches]
    for batch, others in zip(batches, exchange(pairs, ranks)):
        batch["others"] = others


@torch.no_grad()
def exchange(pairs, ranks):
    """ITC's pairs of each micro-batch of this rank -> for each of them those of all ranks, flattened, in
    which its own are masked."""
    z, z_clip, mask = (ranks.gather(torch.stack(x).detach()) for x in zip(*pairs))  # (all, B, S, ..)
    found = []
    for own in range(ranks.rank * len(pairs), (ranks.rank + 1) * len(pairs)):
        rest = mask.clone()
        rest[own] = False
        found.append((z.flatten(0, 2), z_clip.flatten(0, 2), rest.flatten()))
    return found


CLIP_KEYS = ("clip_ids", "clip_place", "clip_mask")


def make_batch(blocks, cfg, index, *keys, text=None, pad=False):
    """Blocks `index` as a micro-batch: masked inputs, CLIP's side, targets.

    keys: of the random draws, (seed, step, positions in the global batch), or ("val", index) for evaluation.
    text: the blocks whose text CLIP's side holds; None: with MATCH half of them are others, drawn.
    pad: see data.masked_words.
    """
    batch = blocks.batch(index)  # HACK HERE: the batch
    found = data.masked_words(batch, blocks.vocab, cfg.mask_rate, cfg.mask_split, *keys, pad=pad)
    if cfg.no_clip:
        return found
    if text is None:
        text = data.match_texts(index, len(blocks), *keys) if "match" in cfg.objective else index
    found |= blocks.clip_batch(text)
    # by its word pieces, not by index: a text may stand in the corpus twice
    found["match_targets"] = (blocks.batch(text)["ids"] == batch["ids"]).all(1).long()
    found["cliptc_index"], found["cliptc_targets"] = data.clip_targets(
        *(found[key] for key in CLIP_KEYS), blocks.clip_vocab, cfg.cliptc_rate, *keys)
    if "itc" in cfg.objective.split("+"):
        found["segment_words"] = words = blocks.segment_words(index)
        found["itc_mask"] = words.any(-1) & found["match_targets"].bool()[:, None]
    return found


@torch.no_grad()
def evaluate(model, blocks, cfg, ranks):
    """Loss and accuracy of every term on the first eval_blocks blocks, all draws fixed by block; over all
    ranks. With MATCH each block is read twice, beside its own text and beside another."""
    model.eval()
    index, dtype = np.arange(min(len(blocks), cfg.eval_blocks)), getattr(torch, cfg.dtype)
    sides, names = {"matched": index}, [name for name in model.weights if name != "itc"]
    if "match" in model.weights and len(blocks) > 1:
        sides["mismatched"] = (index + 1 + keyed_integers(len(blocks) - 1, "val other", index)) % len(blocks)
    # (sides, terms) x (summed loss, right, items)
    total = torch.zeros(len(sides), len(names), 3, dtype=torch.float64)
    parts = np.array_split(index, math.ceil(len(index) * ranks.size * cfg.grad_accum / cfg.batch_size))
    pairs = []  # ITC's of all blocks, 0 where another rank has them
    if "itc" in model.weights:
        pairs = [torch.zeros(len(index), cfg.segments, *width, device=ranks.device)
                 for width in ([model.tower.width], [model.tower.width], [])]
    for row, (side, text) in enumerate(sides.items()):
        for part in parts[ranks.rank::ranks.size]:
            batch = move(make_batch(blocks, cfg, part, "val", part, text=text[part]), ranks.device)
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                h, c = model.states(batch)
                found = model.logits(h, c, batch)
                if pairs and side == "matched":
                    for x, new in zip(pairs, model.pairs(h, c, batch)):
                        x[part] = new.to(x.dtype)
            for term, (name, logits) in enumerate(found.items()):
                targets = batch[f"{name}_targets"]
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                right = (logits.argmax(1) == targets).sum()
                total[row, term] += torch.tensor([loss.item(), right.item(), len(targets)],
                                                 dtype=torch.float64)
    model.train()
    ranks.sum(total)
    scores = {}
    for name, (loss, right, n) in zip(names, total.sum(0).tolist()):
        scores |= {name: loss / max(1, n), f"{name}_accuracy": right / max(1, n)}
    if len(sides) > 1 and "mlm" in model.weights:
        of_mlm = total[:, 0].tolist()  # the first of ITEMS
        scores |= {f"mlm_accuracy_{side}": right / max(1, n) for side, (_, right, n) in zip(sides, of_mlm)}
    return scores | (contrast(model, pairs, cfg, ranks) if pairs else {})


def contrast(model, pairs, cfg, ranks):
    """Loss and accuracy of ITC among as many blocks as a step has; pairs: (n, S, ..), see evaluate."""
    z, z_clip, mask = map(ranks.sum, pairs)
    loss = right = items = 0.0
    for begin in range(0, len(z), cfg.batch_size):
        x, y, real = (found[begin:begin + cfg.batch_size].flatten(0, 1) for found in (z, z_clip, mask > 0))
        if not real.any():
            continue
        loss += losses.itc(x, y, model.itc_scale, real, 1.0).item()
        cos = F.normalize(x[real], dim=-1) @ F.normalize(y[real], dim=-1).T
        right += (cos.argmax(1) == torch.arange(len(cos), device=cos.device)).sum().item()
        items += len(cos)
    return {"itc": loss / max(1, items), "itc_accuracy": right / max(1, items)}


# ---------------------------------------------------------------------------- what a run starts from


def open_language(cfg, vocab):
    """(BERT, its MLMHead or None, hash of its weights, its Vocab) of --language; vocab: the packed text's."""
    if cfg.language in LANGUAGE:
        print0(f"--language {cfg.language}: random weights; a folder of that model brings trained ones")
        config = replace(LANGUAGE[cfg.language], vocab_size=vocab.size, dropout=cfg.dropout)
        return BERT(config, pooler=config.model_type == "bert"), None, cfg.language, vocab
    folder = model_folder(cfg.language, "--language")
    own = vocab_of(folder, "--language", vocab)
    language = load_bert(folder, pooler="trained", dropout=cfg.dropout)
    head = load_mlm_head(folder, language, needed="mlm" in cfg.objective)
    if head is None and "mlm" in cfg.objective:
        print0(f"{folder}: has no masked-word head; MLM begins with a random one")
    return language, head, file_hash(folder), own


def open_tower(cfg):
    """(CLIPText, hash of its weights, its vocabulary or None where the file has none) of --clip; the tower is
    None where it is random or unused."""
    if cfg.no_clip or cfg.clip == "random":
        return None, "" if cfg.no_clip else cfg.clip, None
    return open_clip(cfg.clip, "--clip", cfg.quick_gelu)


def open_parts(cfg):
    """(PairBlocks to train on and to evaluate on, BERT, its MLMHead or None, CLIPText or None, both's
    vocabularies, hashes) that the flags name; one line where they do not fit each other."""
    tower, tower_hash, own = open_tower(cfg)
    positions = tower.config.positions if tower else CLIPConfig.positions
    train, val = (data.PairBlocks(cfg.train, cfg.block_size, part, cfg.val, cfg.segments, positions)
                  for part in ("train", "val"))
    vocab, clip_vocab = train.vocab, train.clip_vocab
    if (val.vocab.hash, val.clip_vocab.hash) != (vocab.hash, clip_vocab.hash):
        raise SystemExit(f"--val {cfg.val} is packed with other vocabularies than --train {cfg.train}; pack "
                         "it again")
    if "match" in cfg.objective and len(train) < 2:
        raise SystemExit(f"--train {cfg.train}: one block, but MATCH needs another text; lower --block_size "
                         "or pack more text")
    language, mlm, language_hash, words = open_language(cfg, vocab)
    if cfg.block_size > language.config.max_positions:
        raise SystemExit(f"--block_size {cfg.block_size}: {cfg.language} has {language.config.max_positions} "
                         "positions; give that or less")
    if tower:
        check_tower("--clip", cfg.clip, tower, own, clip_vocab, cfg.train)
    if cfg.clip == "random" and not cfg.no_clip:
        tower = CLIPText(CLIPConfig(vocab_size=clip_vocab.size))
    return train, val, language, mlm, tower, (words, own or clip_vocab), {
        "corpus": train.hash, "validation text": val.hash, "vocabulary": vocab.hash,
        "language encoder": language_hash, "CLIP": tower_hash}


def size(part):
    """Parameters of a module."""
    return sum(p.numel() for p in part.parameters())


def part_sizes(model):
    """{part of an Adapter: its parameters}, without heads, as in the paper's Table 6."""
    parts = {"language encoder": size(model.language)}
    if model.tower:
        parts["CLIP's text tower"] = size(model.tower)
    if model.crossed:
        cross = model.encoder.cross
        parts[f"cross-modal encoder, {len(cross.text)} layers"] = size(cross)
    return parts


def parts_table(model):
    """Text of a table: the parameters of each part; heads are not in the total."""
    parts = part_sizes(model)
    rows = [[name, f"{n:,}"] for name, n in parts.items()] + [["total", f"{sum(parts.values()):,}"]]
    # tied weights count once, with their encoder
    rows.append(["heads, not in the total", f"{size(model) - sum(parts.values()):,}"])
    return table([["", "parameters"], *rows])


def dry_run(cfg):
    """Builds the model from configurations alone, without weights or data, and prints its parts."""
    if cfg.language not in LANGUAGE or not cfg.no_clip and cfg.clip != "random":
        raise SystemExit(f"--dry_run builds from configurations: give --language {', '.join(LANGUAGE)} and "
                         "--clip random (or --no_clip)")
    model = empty_model(cfg)
    print0(parts_table(model))
    return model


def empty_model(cfg):
    """The Adapter of --dry_run's configurations, whose parameters take no memory."""
    with torch.device("meta"):
        config = LANGUAGE[cfg.language]
        return Adapter(cfg, BERT(config, pooler=config.model_type == "bert"),
                       None if cfg.no_clip else CLIPText(CLIPConfig()), None)


def flops_of(model, cfg, length, used):
    """Floating-point operations of training on a sequence, of a frozen tower forward alone; used: mean share
    of segments in use."""
    T, config = cfg.block_size, model.language.config
    total = 3 * T * flops_per_token(config, T, cfg.mask_rate * ("mlm" in model.weights))  # backward: 2
    if cfg.no_clip:
        return total
    tower, R = model.tower.config, used * cfg.segments * length
    passes = 1 if "clip" in cfg.freeze else 3
    total += passes * R * flops_per_token(tower, length, cfg.cliptc_rate * ("cliptc" in model.weights))
    if not model.crossed:
        return total
    cross = model.encoder.cross
    # each cross-modal layer: its linear maps, counted as if all read the stream's own tokens, and attention
    # to its own tokens and to the other stream's
    streams = (cross.text, T, R, config.hidden), (cross.clip, R, T, tower.projection)
    for halves, own, other, width in streams:
        maps = 2 * sum(p.numel() for p in halves.parameters())
        total += 3 * own * (maps + len(halves) * 4 * (own + other) * width)
    return total


def memory(model, cfg, micro_size, length, used):
    """The line on parameters and memory; a cross-modal layer counts as one and a half."""
    config = model.language.config
    if cfg.no_clip:
        return memory_report(model, config, micro_size, cfg.block_size, cfg.mask_rate,
                             anew=cfg.grad_checkpoint)
    tower, segments = model.tower.config, max(1, round(micro_size * used * cfg.segments))
    beside = [] if "clip" in cfg.freeze else [(tower, segments, length)]
    if model.crossed:
        halves = dict(layers=math.ceil(1.5 * cfg.cross_layers), intermediate=config.intermediate,
                      vocab_size=1)
        beside += [(replace(config, **halves), micro_size, cfg.block_size),
                   (replace(tower, **halves), micro_size, max(1, round(used * cfg.segments * length)))]
    return memory_report(model, config, micro_size, cfg.block_size, cfg.mask_rate, beside,
                         cfg.grad_checkpoint)


def probed(model, blocks, latents, device):
    """`probes` of the demo's language encoder, in the midst of training."""
    model.eval()
    found = probes(model.language, blocks, latents, device)
    model.train()
    return found


def schedule_of(cfg, blocks):
    """(steps to run, steps that the learning rate is planned for, steps of its warm-up)."""
    planned, max_steps = cfg.schedule_steps, steps_of(cfg, blocks)[0]
    if planned and max_steps > planned:
        raise SystemExit(f"--schedule_steps {planned}: the learning rate would be 0 for the last of "
                         f"{max_steps} steps; give as many or more")
    return max_steps, *steps_of(replace(cfg, max_steps=planned or max_steps), blocks)


def run_folder(cfg):
    """--out_dir, or out/xdbert-<objective>-s<seed>, with noclip in it for the baseline."""
    return Path(cfg.out_dir or f"out/xdbert-{cfg.objective}{'-noclip' * cfg.no_clip}-s{cfg.seed}")


def main(cfg):
    """Trains and saves the model of `cfg`; returns what its results.json holds."""
    frozen, why = freezing(cfg)
    cfg = replace(cfg, freeze=frozen)
    if cfg.dry_run:
        return dry_run(cfg)
    ranks, dtype = init_ranks(cfg.device, cfg.dtype), getattr(torch, cfg.dtype)
    micro_size = micro_batch_size(cfg, ranks)
    for flag in ("train", "language", "clip")[:2 if cfg.no_clip else 3]:
        if not getattr(cfg, flag):
            raise SystemExit(f"--{flag} is missing; --help tells what it may be")

    # ---- data
    set_seed(cfg.seed, 0)
    train, val, language, mlm, tower, vocabs, hashes = open_parts(cfg)
    run = Run(cfg, run_folder(cfg), ranks, hashes, FIXED, FREE)
    if cfg.resume == "auto" and (results := run.finished()):
        print0(f"reused {run.folder}")
        return results
    max_steps, planned, warmup_steps = schedule_of(cfg, len(train))
    latents = Path(cfg.train).parent / "raw" / "latents.json"
    latents = read_json(latents) if latents.exists() else None

    # ---- models
    model = Adapter(cfg, language, tower, mlm, ranks).to(ranks.device)
    print0(parts_table(model))
    print0(f"freeze: {frozen} ({why})")
    print0(memory(model, cfg, micro_size, train.length, train.used))
    weights, names = model.weights, list(model.weights)

    # ---- optimizer
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    # ---- resume
    step = run.restore(max_steps, model=model, optimizer=optimizer, scaler=scaler)
    if cfg.eval_only:
        scores = evaluate(model, val, cfg, ranks)
        print0(f"step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        return scores
    print0(f"adapt: {cfg.objective}, {len(train):,} blocks of {cfg.block_size} tokens"
           + ("" if cfg.no_clip else f" beside {cfg.segments} x {train.length} of CLIP's "
              f"({100 * train.used:.0f} % of the segments in use, {train.cut:,} of CLIP's tokens cut)")
           + f", {train.dropped:,} tokens of the tail dropped, {max_steps:,} steps of {cfg.batch_size} "
           f"({max_steps * cfg.batch_size / len(train):.2f} epochs)")
    run.begin(names, "tokens", cfg.batch_size * cfg.block_size,
              cfg.batch_size * flops_of(model, cfg, train.length, train.used))
    if cfg.compile_model:
        for part in filter(None, (language, tower)):
            part.compile()
    ddp = DistributedDataParallel(model) if ranks.size > 1 else model
    model.train()
    make = partial(make_batch, pad=cfg.compile_model or ranks.device.type != "cpu")
    run.feed(partial(data.step_batches, train, cfg, ranks, make), ITEMS)

    # ==== training loop ====
    while True:
        last = step >= max_steps
        if run.eval_due(step, last):
            run.note(step, "val", evaluate(model, val, cfg, ranks))
            if latents:  # the demo world
                found = probed(model, train, latents, ranks.device)
                run.note(step, "probe", {name: probe["linear"] for name, probe in found.items()})
        run.save_due(step, last)
        if last:
            break

        # the step's micro-batches; each term's divisor: its global items / ranks, as DDP averages gradients
        _, batches, items = run.take(step)
        divisor = {name: (n if cfg.reduction == "mean" else 1) / ranks.size for name, n in items.items()}
        lr = lr_at(step, cfg.lr, warmup_steps, planned)  # HACK HERE: the schedule
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            if "itc" in weights and cfg.grad_accum > 1:
                share_pairs(model, batches, ranks)
            if step % cfg.grad_every == 0:
                with run.pause():
                    run.note_gradients(step, gradient_norms(model, batches[0], divisor), weights)

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
    results = {"objective": cfg.objective, "no_clip": cfg.no_clip, "steps": step,
               "vocabulary": train.vocab.hash, "clip_tokens_cut": train.cut, "segments_used": train.used,
               "tokens_dropped": train.dropped}
    results |= evaluate(model, val, cfg, ranks)
    if latents:
        results["probes"] = probed(model, train, latents, ranks.device)
    if ranks.main:
        model.eval()
        if model.crossed:  # a head that was trained on cross-modal states is not the language encoder's
            save_xdbert(model.encoder, run.folder / "model", *vocabs, None if "mlm" in weights else mlm)
        else:
            save_bert(language, run.folder / "model", vocabs[0], model.mlm if "mlm" in weights else None)
    print0(f"made {run.folder}/model in {duration(seconds)}")
    return run.finish(results)


if __name__ == "__main__":
    from prepare import chain
    run_script(chain.adapt_xdbert, Config, PRESETS, NEEDS)
