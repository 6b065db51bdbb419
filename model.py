"""BERT and CLIP's text tower by hand, and what stands around them: cross-modal encoder, heads, video encoder.

BERT: Devlin et al. 2019 (post-LayerNorm, erf GELU, learned positions); ELECTRA's encoder is one, too. CLIP:
Radford et al. 2021 (pre-LayerNorm, causal). XDBERT: Hsu et al. 2022, both beside each other. Query, key and
value maps are fused in one. The folders that are read and written are Hugging Face's, CLIP's files OpenAI's,
too; the tables of names are at the end of this file.
"""
import dataclasses
import io
import json
import math
import os
import re
import shutil
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from common import print0

# ---------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """Shape of a BERT. `dropout` is that of embeddings, attention weights and sub-layer outputs alike.

    embedding: width of the embeddings, mapped to `hidden` then; 0 = as wide as `hidden`. model_type: "bert"
    or "electra", which are one but for the pooler and the names in Hugging Face's folders.
    """
    vocab_size: int = 30522
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    max_positions: int = 512
    type_vocab: int = 2
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    pad_id: int = 0
    init_std: float = 0.02
    embedding: int = 0
    model_type: str = "bert"

    def __post_init__(self):
        check_shape(self, "vocab_size", "layers", "hidden", "heads", "intermediate", "max_positions",
                    "type_vocab")
        if self.embedding < 0:
            raise SystemExit(f"--embedding {self.embedding}: must not be negative")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Shape of CLIP's text tower, by default ViT-B/32's; `dropout` and `init_std` are for a task's head."""
    vocab_size: int = 49408
    layers: int = 12
    hidden: int = 512
    heads: int = 8
    intermediate: int = 2048
    positions: int = 77
    projection: int = 512
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        check_shape(self, "vocab_size", "layers", "hidden", "heads", "intermediate", "positions",
                    "projection")


def check_shape(config, *sizes):
    """SystemExit where one of the sizes, the dropout or the number of heads cannot be."""
    for name in sizes:
        most = 1000 if name == "layers" else 2 ** 31  # or a damaged file would have us build for hours
        if not 1 <= getattr(config, name) < most:
            raise SystemExit(f"--{name} {getattr(config, name)}: must be at least 1 and below {most}")
    if not 0 <= config.dropout < 1:
        raise SystemExit(f"--dropout {config.dropout}: must be at least 0 and below 1")
    if config.hidden % config.heads:
        raise SystemExit(f"--hidden {config.hidden} cannot be split into --heads {config.heads} equal parts; "
                         "choose a multiple (BERT and CLIP have 64 a head)")


# 6L-512H is the ablation model of VidLanKD, 12L-768H is BERT-base
SHAPES = {
    "demo": dict(layers=2, hidden=128, heads=4, intermediate=512, init_std=0.05),  # 0.02 suits wider models
    "6L-512H": dict(layers=6, hidden=512, heads=8, intermediate=2048),
    "12L-768H": dict(layers=12, hidden=768, heads=12, intermediate=3072),
}
# the pre-trained language encoders of XDBERT
LANGUAGE = {
    "bert-base": BERTConfig(),
    "electra-base": BERTConfig(model_type="electra"),
    "electra-large": BERTConfig(layers=24, hidden=1024, heads=16, intermediate=4096, model_type="electra"),
}


def model_config(shape, vocab_size, layers=0, hidden=0, heads=0, intermediate=0, dropout=0.1):
    """BERTConfig of a named shape, with what is not 0 in its place.

    Another width than the shape's brings heads 64 wide and a feed-forward 4 times as wide where not given.
    """
    if shape not in SHAPES:
        raise SystemExit(f"--model {shape}: choose one of {', '.join(SHAPES)}")
    if hidden and not heads and hidden % 64:
        raise SystemExit(f"--hidden {hidden} is no multiple of 64; give --heads too")
    values = dict(SHAPES[shape])
    if hidden:
        values |= dict(hidden=hidden, heads=heads or hidden // 64, intermediate=4 * hidden)
    given = dict(layers=layers, heads=heads, intermediate=intermediate)
    values |= {name: value for name, value in given.items() if value}
    return BERTConfig(vocab_size=vocab_size, dropout=dropout, **values)


# ---------------------------------------------------------------------------- attention and layers


def dropout(x, p, training):
    """x with each element zeroed with probability p and the others scaled by 1 / (1 - p), for x of any shape.

    On the CPU p is rounded to a multiple of 2^-16, and the scale with it, so that the mean stays: four
    draws of 16 bits from each 64 random bits take less than half of F.dropout's time.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # the compiler fuses PyTorch's own
        return F.dropout(x, p)
    zeroed = round(p * 2 ** 16)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    keep = torch.empty(x.numel(), dtype=x.dtype)
    torch.ge(bits[:x.numel()], zeroed - 2 ** 15, out=keep)  # 0 or 1 at once in x's own dtype
    return x * keep.mul_(1 / (1 - zeroed / 2 ** 16)).view(x.shape)


def attend(q, k, v, heads, mask=None, p=0.0):
    """Multi-head attention: softmax(q k' / sqrt(D)) v in each of the heads, D = C / H.

    q (B, T, C); k, v (B, S, C); mask bool, to broadcast to (B, H, T, S), True = seen, at least one for each
    query, None = all; p: dropout of the weights -> (B, T, C).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, D)
    if q.device.type != "cpu":
        y = F.scaled_dot_product_attention(q, k, v, mask, p)
    else:
        # the fused kernel is no faster on a CPU in training, and slower in bf16
        weights = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, H, T, S)
        if mask is not None:
            weights.masked_fill_(~mask, -math.inf)
        y = dropout(weights.softmax(-1), p, True) @ v
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention over the real tokens, between maps C -> C."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """x (B, T, C), mask bool (B or 1, 1, T or 1, T) or None where every token is seen -> (B, T, C)."""
        p = self.dropout if self.training else 0.0
        return self.out(attend(*self.qkv(x).chunk(3, -1), self.heads, mask, p))


class CrossAttention(nn.Module):
    """Attention of one stream to another, whose keys and values are mapped to the width of the first."""

    def __init__(self, width, other, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(other, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, other, mask=None):
        """x (B, T, C), other (B, S, C'), mask bool (B, 1, 1, S) or None -> (B, T, C)."""
        p = self.dropout if self.training else 0.0
        return self.out(attend(self.query(x), *self.key_value(other).chunk(2, -1), self.heads, mask, p))


class Layer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm (post-LN)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.attention = Attention(config.hidden, config.heads, config.dropout)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.expand = nn.Linear(config.hidden, config.intermediate)
        self.contract = nn.Linear(config.intermediate, config.hidden)
        self.output_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)

    def forward(self, x, mask=None):
        x = self.attention_norm(x + dropout(self.attention(x, mask), self.dropout, self.training))
        y = self.contract(F.gelu(self.expand(x)))
        return self.output_norm(x + dropout(y, self.dropout, self.training))


# ---------------------------------------------------------------------------- BERT and ELECTRA


def first_positions(position, T, name):
    """(T, C): the rows of the position embedding for T tokens; SystemExit where it has fewer."""
    if T > len(position.weight):
        raise SystemExit(f"sequences of {T} tokens, but {name} has {len(position.weight)} positions; "
                         "lower --block_size, --segment_length or --max_length")
    return position.weight[:T]


class Embeddings(nn.Module):
    """Word, position and segment vectors, summed and normalised; where they are narrower, mapped to C."""

    def __init__(self, config):
        super().__init__()
        self.dropout, width = config.dropout, config.embedding or config.hidden
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_positions, width)
        self.segment = nn.Embedding(config.type_vocab, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.project = nn.Linear(width, config.hidden) if config.embedding else nn.Identity()

    def forward(self, ids, segments=None):
        segment = self.segment.weight[0] if segments is None else self.segment(segments)
        x = self.word(ids) + (first_positions(self.position, ids.shape[1], "BERT") + segment)
        return self.project(dropout(self.norm(x), self.dropout, self.training))


class BERT(nn.Module):
    """Token ids -> hidden states. 12L-768H with pooler has 109,482,240 parameters (BERT-base).

    Of model_type electra it is ELECTRA's discriminator (Clark et al. 2020), whose pooler is that of Hugging
    Face's classifier: it is in no pre-trained folder. electra-large has 334,092,288 parameters without.
    """

    def __init__(self, config, pooler=False):
        super().__init__()
        self.config, self.width = config, config.hidden
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.hidden, config.hidden) if pooler else None
        self.apply(partial(init_weights, std=config.init_std))

    def forward(self, ids, mask=None, segments=None, all_states=False):
        """Hidden states of a batch of sequences.

        ids (B, T) int64; mask (B, T) bool, True = real token (at least one each), None = all real, which is
        faster; segments (B, T) int64, None = all 0. -> (B, T, C), or with all_states the list of L + 1 of
        them, embeddings first. What stands at padded positions means nothing.
        """
        mask = None if mask is None else mask[:, None, None, :]
        states = [self.embeddings(ids, segments)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states if all_states else states[-1]

    def pool(self, h, mask=None):
        """(B, T, C) -> (B, C): tanh of a linear map of the [CLS] state; for a BERT made with pooler=True.

        ELECTRA: its dropout, linear map, GELU. mask is not used: [CLS] is always real.
        """
        if self.config.model_type == "electra":
            return F.gelu(self.pooler(dropout(h[:, 0], self.config.dropout, self.training)))
        return torch.tanh(self.pooler(h[:, 0]))

    def for_task(self, pooled):
        """Drops the pooler where nothing is pooled by it: DDP would wait for its gradient."""
        if not pooled:
            self.pooler = None
        assert not pooled or self.pooler is not None, "pool cls needs a BERT made with pooler=True"

    @classmethod
    def from_pretrained(cls, folder, pooler=False, dropout=None):
        """The BERT or ELECTRA of a Hugging Face folder, fine-tuned or not, in float32 and eval mode.

        pooler: with pooler, the file's where it was trained, else a fresh one (N(0, init_std), bias 0) from
        torch's global generator, which is left alone otherwise; "trained" = the file's or none. Every tensor
        of the file must be known, and every one of ours in it with the shape that config.json tells;
        SystemExit names the file and the tensor where that is not so. Hugging Face's two dropout rates
        become one: `dropout`, or where that is None, that of the hidden states.
        """
        config = load_config(folder)
        if dropout is not None:
            config = dataclasses.replace(config, dropout=dropout)
        path, tensors = read_weights(folder, config)
        names = {name for _, name, _ in HF_CLASSES[config.model_type].values() if name}
        stored = next((name for name in names if any(t.startswith(f"{name}.") for t in tensors)), "")
        trained = stored and read_settings(Path(folder) / "config.json").get("pooler_trained", True)
        with torch.device("meta"):
            bert = cls(config, pooler and trained)
        fill(bert, hf_names(config, stored), tensors, path)
        if pooler is True and not trained:
            bert.pooler = nn.Linear(config.hidden, config.hidden)
            init_weights(bert.pooler, config.init_std)
        return bert.eval()

    def save_pretrained(self, folder, vocab, head=None):
        """Writes a folder that `from_pretrained`, and Hugging Face's AutoModel and AutoTokenizer, open.

        vocab: the data.Vocab of the ids; head: the MLMHead, if there is a trained one. A BERT without pooler
        gets a fresh one (N(0, 0.02), seed 0), since Hugging Face's BertModel wants one; "pooler_trained" in
        config.json tells which it is. An ELECTRA is written without: ElectraModel has none. Other files of
        the folder stay. All is written into a folder inside first, then renamed, config.json last:
        interrupted, it leaves the old weights or the new ones, whole, and a new folder without config.json.
        """
        state = head.state_dict() if head else {}
        state.pop("weight", None)  # tied: it is among the embeddings
        head = renamed(state, head_names(self.config))
        write_bert(folder, self, vocab, "mlm" if head else "encoder", head, {})


def init_weights(module, std):
    """Weights N(0, std), biases 0 (Devlin et al. 2019: 0.02); for `.apply`. LayerNorm stays 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def masked_mean(x, mask=None):
    """x (B, T, C), mask (B, T) bool, True = counts (at least one each), None = all -> (B, C)."""
    if mask is None:
        return x.mean(1)
    real = mask[..., None].to(x.dtype)  # (B, T, 1)
    return (x * real).sum(1) / real.sum(1)


# ---------------------------------------------------------------------------- CLIP's text tower

FIRST_LOGIT_SCALE = math.log(1 / 0.07)


class CLIPLayer(nn.Module):
    """Attention and quick-GELU feed-forward, each of the normalised state and added to it (pre-LN)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.attention = Attention(config.hidden, config.heads)
        self.output_norm = nn.LayerNorm(config.hidden)
        self.expand = nn.Linear(config.hidden, config.intermediate)
        self.contract = nn.Linear(config.intermediate, config.hidden)

    def forward(self, x, mask=None):
        x = x + self.attention(self.attention_norm(x), mask)
        y = self.expand(self.output_norm(x))
        return x + self.contract(F.silu(1.702 * y) / 1.702)  # quick-GELU: y sigmoid(1.702 y)


class CLIPEmbeddings(nn.Module):
    """Word and position vectors, summed."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        self.position = nn.Embedding(config.positions, config.hidden)

    def forward(self, ids):
        return self.word(ids) + first_positions(self.position, ids.shape[1], "CLIP's text tower")


class CLIPText(nn.Module):
    """CLIP's text tower: token ids -> states in the space that texts and images share.

    ViT-B/32's has 63,428,097 parameters, the logit scale (log of 1 / temperature) among them.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.projection
        self.embeddings = CLIPEmbeddings(config)
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.project = nn.Linear(config.hidden, config.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))
        self.init_weights()

    def init_weights(self):
        """As in OpenAI's code; the biases of the feed-forward stay PyTorch's."""
        width, depth = self.config.hidden ** -0.5, (2 * self.config.layers) ** -0.5
        stds = {self.embeddings.word: 0.02, self.embeddings.position: 0.01, self.project: width}
        for layer in self.layers:
            stds |= {layer.attention.qkv: width, layer.attention.out: width * depth,
                     layer.expand: width * 2 ** -0.5, layer.contract: width * depth}
            nn.init.zeros_(layer.attention.qkv.bias)
            nn.init.zeros_(layer.attention.out.bias)
        for module, std in stds.items():
            nn.init.normal_(module.weight, std=std)

    def forward(self, ids, mask=None, segments=None):
        """ids (n, l) int64 -> (n, l, P): at EVERY token the state after final LayerNorm and projection.

        mask and segments, as BERT takes them, are not used: no token sees a later one, so padding, which
        stands behind, changes nothing. What stands at padded positions means nothing.
        """
        x, l = self.embeddings(ids), ids.shape[1]
        causal = torch.ones(l, l, dtype=torch.bool, device=ids.device).tril()
        for layer in self.layers:
            x = layer(x, causal)
        return self.project(self.norm(x))

    def pool(self, h, mask=None):
        """(n, l, P) -> (n, P): the state of the last real token, which is the end of the text."""
        return h[:, -1] if mask is None else h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]

    def for_task(self, pooled):
        """No head reads the logit scale: DDP would wait for its gradient."""
        self.logit_scale.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path, dropout=None):
        """CLIP's text tower in float32 and eval mode, from a Hugging Face folder or from OpenAI's file.

        A folder: of CLIPModel (its image tower is ignored), CLIPTextModelWithProjection, or CLIPTextModel,
        which has no projection: the identity then. A file: OpenAI's state dict (.pt, .pth, .bin,
        .safetensors) or TorchScript archive. Every tensor must be known, as in `BERT.from_pretrained`.
        """
        config, path, tensors, names = read_clip(path)
        if dropout is not None:
            config = dataclasses.replace(config, dropout=dropout)
        with torch.device("meta"):
            clip = cls(config)
        return fill(clip, names, tensors, path).eval()

    def save_pretrained(self, folder, vocab):
        """Writes a folder that `from_pretrained` and Hugging Face's CLIPTextModelWithProjection open.

        The logit scale is in it, too. vocab: of the ids, with start and end. As safe as BERT's.
        """
        write_clip(folder, self, vocab, {}, {})


# ---------------------------------------------------------------------------- XDBERT's cross-modal encoder


class CrossLayer(nn.Module):
    """One stream's half of a cross-modal layer: attention to the other, then a BERT layer (post-LN)."""

    def __init__(self, config, other):
        super().__init__()
        self.dropout = config.dropout
        self.cross = CrossAttention(config.hidden, other, config.heads, config.dropout)
        self.cross_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.layer = Layer(config)

    def forward(self, x, other, mask=None, other_mask=None):
        x = self.cross_norm(x + dropout(self.cross(x, other, other_mask), self.dropout, self.training))
        return self.layer(x, mask)


class CrossEncoder(nn.Module):
    """Text and CLIP stream, each attending to the other, then to itself (XDBERT section 2.1, as LXMERT).

    text: the language encoder's BERTConfig; clip: the CLIPConfig. Both halves of a layer read the layer's
    inputs. Each stream has the heads of its own encoder; the feed-forward is as wide as the text's in both.
    """

    def __init__(self, text, clip, layers=2):
        super().__init__()
        if layers < 1:
            raise SystemExit(f"--cross_layers {layers}: must be at least 1")
        beside = dataclasses.replace(text, hidden=clip.projection, heads=clip.heads)
        self.text = nn.ModuleList(CrossLayer(text, clip.projection) for _ in range(layers))
        self.clip = nn.ModuleList(CrossLayer(beside, text.hidden) for _ in range(layers))
        self.apply(partial(init_weights, std=text.init_std))

    def forward(self, h, c, mask=None, clip_mask=None, text=True, clip=True):
        """h (B, T, C), c (B, R, P), masks bool (B, T) and (B, R), True = real, None = all -> both anew.

        A stream that is not wanted (text=False, clip=False) is not run in the last layer, and returned as
        None. What stands at padded positions means nothing.
        """
        mask, clip_mask = (m if m is None else m[:, None, None, :] for m in (mask, clip_mask))
        for text_half, clip_half in zip(self.text[:-1], self.clip[:-1]):
            h, c = text_half(h, c, mask, clip_mask), clip_half(c, h, clip_mask, mask)
        return (self.text[-1](h, c, mask, clip_mask) if text else None,
                self.clip[-1](c, h, clip_mask, mask) if clip else None)


class XDBERT(nn.Module):
    """Language encoder and CLIP's text tower, and on both the cross-modal encoder: states of both streams.

    BERT-base (its pooler counted), ViT-B/32's text tower and 2 layers have 202,059,009 parameters. pooler:
    None, or the linear map of `pool`; who trains one sets it.
    """

    def __init__(self, language, clip, layers=2):
        super().__init__()
        self.config, self.width = language.config, language.width
        self.language, self.clip = language, clip
        self.cross = CrossEncoder(language.config, clip.config, layers)
        self.pooler = None

    def streams(self, ids, mask=None, segments=None, *, clip_ids, clip_place, clip_mask, text=True,
                clip=True):
        """(h (B, T, C), c (B, R, P)) of a batch of sequences, with None in place of what is not wanted.

        ids, mask, segments: as for BERT. clip_ids (n, l) int64: the batch's CLIP segments, none of them
        empty, so that no empty one is run. clip_place (B, R) int64: where among their n l states the r-th
        real CLIP token of row b stands; clip_mask (B, R) bool, True = there is one (at least one each).
        """
        h = self.language(ids, mask, segments)
        c = F.embedding(clip_place, self.clip(clip_ids).flatten(0, 1))  # (B, R, P)
        return self.cross(h, c, mask, clip_mask, text, clip)

    def forward(self, ids, mask=None, segments=None, **clip):
        """The text stream (B, T, C): what fine-tuning reads. clip: clip_ids, clip_place, clip_mask."""
        return self.streams(ids, mask, segments, **clip, clip=False)[0]

    def pool(self, h, mask=None):
        """(B, T, C) -> (B, C): tanh of a linear map of the [CLS] state."""
        return torch.tanh(self.pooler(h[:, 0]))

    def for_task(self, pooled):
        """Leaves what the text stream needs: DDP would wait for the gradient of the rest. A fresh pooler."""
        self.language.pooler = None
        self.clip.logit_scale.requires_grad_(False)
        self.cross.clip[-1].requires_grad_(False)
        if not pooled:
            self.pooler = None
        elif self.pooler is None:
            self.pooler = nn.Linear(self.width, self.width)
            init_weights(self.pooler, self.config.init_std)

    def own(self):
        """What is in neither of the two encoders: the cross-modal encoder, and the pooler if there is one."""
        parts = {"cross": self.cross, "pooler": self.pooler}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    @classmethod
    def from_pretrained(cls, folder, dropout=None):
        """The XDBERT that `save_pretrained` wrote, in float32 and eval mode; the RNG is left alone."""
        folder = Path(folder)
        path = folder / "cross.json"
        settings = read_settings(path)
        layers, pooler = settings.get("layers"), settings.get("pooler")
        if type(layers) is not int or layers < 1 or type(pooler) is not bool:
            raise SystemExit(f"{path}: not that of an XDBERT; adapt it again")
        language = BERT.from_pretrained(folder, dropout=dropout)
        clip = CLIPText.from_pretrained(folder / "clip")
        with torch.device("meta"):
            model = cls(language, clip, layers)
            model.pooler = nn.Linear(model.width, model.width) if pooler else None
        fill_own(model.own(), folder / "cross.safetensors", "adapt it again", ignored="classifier.")
        return model.eval()

    def save_pretrained(self, folder, vocab, clip_vocab, head=None):
        """Writes the language encoder as `BERT.save_pretrained` does, so that `folder` is an ordinary one.

        Beside it: clip/ (`CLIPText.save_pretrained`), cross.safetensors and cross.json. The language
        encoder's config.json is written last.
        """
        self.save_beside(folder, clip_vocab, {})
        self.language.save_pretrained(folder, vocab, head)

    def save_beside(self, folder, clip_vocab, head):
        """All but the language encoder; head: {name: tensor} of a task's, into cross.safetensors."""
        self.clip.save_pretrained(Path(folder) / "clip", clip_vocab)
        write_folder(folder, "cross.safetensors", self.own().state_dict() | head, "cross.json",
                     {"layers": len(self.cross.text), "pooler": self.pooler is not None})


# ---------------------------------------------------------------------------- heads


class MLMHead(nn.Module):
    """States -> logits over a vocabulary: dense, GELU, LayerNorm, word embeddings transposed.

    hidden: the states' width C. embedding_weight (V, E), e.g. `bert.embeddings.word.weight`: shared, not
    copied. eps, std: LayerNorm's and of the initial weights.
    """

    def __init__(self, hidden, embedding_weight, eps=1e-12, std=0.02):
        super().__init__()
        words, width = embedding_weight.shape
        self.dense = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.apply(partial(init_weights, std=std))
        self.weight = embedding_weight
        self.bias = nn.Parameter(torch.zeros(words))

    def transform(self, h):
        """(..., C) -> (..., E): what the decoder's rows are compared with."""
        return self.norm(F.gelu(self.dense(h)))

    def forward(self, h):
        """(n, C) -> (n, V). Give it the rows that count, `head(h[labels >= 0])`: all cost 6-9 times more."""
        return F.linear(self.transform(h), self.weight, self.bias)


class DistillHead(nn.Sequential):
    """Student states -> the teacher's width: linear, ReLU, linear (VidLanKD section 4.3).

    The paper does not tell its initial weights; PyTorch's own keep the scale of the states.
    """

    def __init__(self, hidden_s, hidden_t):
        super().__init__(nn.Linear(hidden_s, hidden_s), nn.ReLU(), nn.Linear(hidden_s, hidden_t))


# ---------------------------------------------------------------------------- fine-tuning


class TaskModel(nn.Module):
    """An encoder with the head of a task: token ids -> logits.

        kind      ids        logits        head
        classify  (B, T)     (B, labels)   pooled state, dropout, linear map
        regress   (B, T)     (B,)          the same
        choice    (B, K, T)  (B, K)        the same for each of K candidates, one map C -> 1 for all
        span      (B, T)     (B, T, 2)     linear map of every last state to start and end, also of padding

    encoder: BERT, CLIPText or XDBERT; what the task has no use for is dropped from it or needs no gradient.
    pool: what is pooled, "mean" = the mean of the last states over real tokens, "cls" = BERT's
    pooler (made with pooler=True), XDBERT's, which is fresh where none was trained, or CLIP's state at the
    end of the text.
    """

    def __init__(self, encoder, kind, labels=1, pool="cls"):
        super().__init__()
        self.encoder, self.kind, self.pool, self.frozen = encoder, kind, pool, False
        encoder.for_task(pooled=kind != "span" and pool == "cls")
        self.classifier = nn.Linear(encoder.width, {"classify": labels, "span": 2}.get(kind, 1))
        init_weights(self.classifier, encoder.config.init_std)

    def forward(self, ids, mask=None, segments=None, **clip):
        """ids, mask, segments as for BERT, with K candidates a row where kind is choice -> float32 logits.

        clip: what `XDBERT.forward` takes; a candidate is a row there.
        """
        shape = ids.shape
        if self.kind == "choice":
            ids, mask, segments = (x if x is None else x.flatten(0, 1) for x in (ids, mask, segments))
        h = self.encoder(ids, mask, segments, **clip)  # (B, T, C)
        if self.kind != "span":
            h = self.encoder.pool(h, mask) if self.pool == "cls" else masked_mean(h, mask)  # (B, C)
            h = dropout(h, self.encoder.config.dropout, self.training)
        with torch.autocast(h.device.type, enabled=False):  # bf16 would tie close scores
            logits = self.classifier(h.to(self.classifier.weight.dtype))
        if self.kind == "choice":
            return logits.view(shape[:2])
        return logits[:, 0] if self.kind == "regress" else logits

    def freeze_encoder(self):
        """Leaves pooler and head to train; the rest has no gradient (nor graph), no dropout in train mode."""
        self.frozen = True
        for name, p in self.encoder.named_parameters():
            if not name.startswith("pooler."):
                p.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    @classmethod
    def from_pretrained(cls, folder):
        """(model, settings) of a fine-tuned folder, ours or Hugging Face's, as strict as BERT's.

        In float32 and eval mode; the RNG is left alone. settings: see `load_task`.
        """
        settings, folder = load_task(folder), Path(folder)
        kind, pool, head = settings["kind"], settings["pool"], "classifier"
        if settings.get("encoder") == "xdbert":
            encoder, path = XDBERT.from_pretrained(folder), folder / "cross.safetensors"
            tensors = read_tensors(path)
        elif model_type(folder) == "clip":
            encoder = CLIPText.from_pretrained(folder)
            path, tensors = read_folder(folder)
        else:
            config = load_config(folder)
            path, tensors = read_weights(folder, config)
            _, pooler, head = HF_CLASSES[config.model_type][kind]
            with torch.device("meta"):
                encoder = BERT(config, kind != "span" and pool == "cls")
            fill(encoder, hf_names(config, pooler), tensors, path)
        with torch.device("meta"):
            model = cls(encoder, kind, len(settings["labels"]), pool)
        names = {part: (f"{head}.{part}",) for part in ("weight", "bias")}
        fill(model.classifier, names, tensors, path)
        return model.eval(), settings

    def save_pretrained(self, folder, vocab, settings, clip_vocab=None):
        """Writes a folder for `from_pretrained`, as safely as BERT's; the encoder's own opens it too.

        settings: kept in config.json under "nanoground", with at least task (its name), labels (the words of
        the classes, in order; else []) and max_length (tokens). Of a BERT or ELECTRA, Hugging Face's
        AutoModelFor... of the kind computes the same logits, but with pool="mean": it has no such class, so
        architectures is BertModel or ElectraModel. A model without pooler is written without. clip_vocab: of
        an XDBERT, whose head goes into cross.safetensors.
        """
        content = {"nanoground": settings | {"kind": self.kind, "pool": self.pool}}
        if self.kind in ("classify", "regress"):
            words = settings["labels"] if self.kind == "classify" else ["LABEL_0"]
            assert len(words) == self.classifier.out_features, f"{words} for {self.classifier}"
            content |= {"id2label": dict(enumerate(words)), "label2id": {w: i for i, w in enumerate(words)},
                        "problem_type": "regression" if self.kind == "regress" else
                        "single_label_classification"}
        name, encoder = "classifier", self.encoder
        if isinstance(encoder, BERT):
            name = HF_CLASSES[encoder.config.model_type][self.kind][2]
        head = {f"{name}.{ours}": value for ours, value in self.classifier.state_dict().items()}
        if isinstance(encoder, CLIPText):
            write_clip(folder, encoder, vocab, head, content)
        elif isinstance(encoder, XDBERT):
            content["nanoground"]["encoder"] = "xdbert"
            encoder.save_beside(folder, clip_vocab, head)
            write_bert(folder, encoder.language, vocab, "encoder", {}, content)
        else:
            write_bert(folder, encoder, vocab, self.kind if self.pool == "cls" else "encoder", head, content)


# ---------------------------------------------------------------------------- video


class VideoEncoder(nn.Module):
    """Frame features -> one vector a clip: linear map, frame positions, BERT layers, mean over real frames.

    config: a BERTConfig (its vocabulary is not used); features: channels D of a frame; max_frames: how many
    frame positions there are to learn.
    """

    def __init__(self, config, features, max_frames=512):
        super().__init__()
        self.config, self.features, self.max_frames = config, features, max_frames
        self.project = nn.Linear(features, config.hidden)
        self.position = nn.Embedding(max_frames, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.apply(partial(init_weights, std=config.init_std))

    def forward(self, frames, mask=None):
        """frames (B, F, D), mask (B, F) bool, True = real frame (at least one each), None = all -> (B, C)."""
        count = frames.shape[1]
        if count > self.max_frames:
            raise SystemExit(f"clips of {count} frames, but the encoder has {self.max_frames} positions; "
                             "lower --max_frames")
        x = self.norm(self.project(frames) + self.position.weight[:count])
        x = dropout(x, self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, None if mask is None else mask[:, None, None, :])  # (B, F, C)
        return masked_mean(x, mask)


# ---------------------------------------------------------------------------- optimiser groups and cost


def param_groups(module, weight_decay, layer_decay=1.0):
    """The groups that AdamW takes: matrices with weight decay; biases, LayerNorm and scalars without.

    Every trainable parameter is in exactly one group, and once, tied or not. "scale" is its factor on the
    learning rate, decayed by layer as in ELECTRA (Clark et al. 2020): 1 for heads, pooler and cross-modal
    layers, d^(L - i) for layer i = 0 .. L - 1 of a BERT or CLIP's text tower, d^(L + 1) for its embeddings,
    where d = layer_decay; 1 makes two groups. (ELECTRA's released code has one d more in all but the head:
    its last layer gets d^2.)
    """
    scales = {}
    for encoder in module.modules():
        if isinstance(encoder, (BERT, CLIPText)):
            for i, part in enumerate([encoder.embeddings, *encoder.layers]):
                scales |= dict.fromkeys(part.parameters(), layer_decay ** (len(encoder.layers) + 1 - i))
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if scales.get(p, 1.0) == scale and (p.ndim >= 2) == matrix],
             "weight_decay": weight_decay if matrix else 0.0, "scale": scale}
            for scale in sorted({1.0, *scales.values()}, reverse=True) for matrix in (True, False)]


def flops_per_token(config, T, mlm=0.0):
    """Floating-point operations (2 a multiply-add) of one token's forward pass in sequences of T tokens.

    A layer: 2 (4 C^2 + 2 C I) for its linear maps and 4 T C for q k' and the weighted sum. mlm: share of the
    tokens at which the MLM head is computed, 2 (C^2 + C V) each, its embeddings taken to be C wide. Training
    is 3 times this: backward takes each product twice. Look-ups, norms, softmax and GELU are left out, as is
    usual for MFU.
    """
    C = config.hidden
    layer = 2 * (4 * C * C + 2 * C * config.intermediate) + 4 * T * C
    return config.layers * layer + mlm * 2 * (C * C + C * config.vocab_size)


def memory_report(model, config, batch, T, logits=0.15, beside=()):
    """One line on what training takes: parameters, memory at `batch` sequences of T tokens, checkpoint size.

    An estimate in float32: weights, gradients and AdamW's two moments (16 bytes a parameter); what a BERT of
    this shape keeps for backward, 11 C + 2 I numbers a token and layer, and on a CPU 3 H T for attention;
    three times the MLM head's logits, at the share `logits` of the tokens. beside: further (config,
    sequences, T) that are run in the same step.
    """
    parameters = sum(p.numel() for p in model.parameters())
    on_cpu, total = next(model.parameters()).device.type == "cpu", 16 * parameters
    for shape, sequences, tokens in ((config, batch, T), *beside):
        kept = 11 * shape.hidden + 2 * shape.intermediate + on_cpu * 3 * shape.heads * tokens
        total += 4 * sequences * tokens * (shape.layers * kept + logits * 3 * shape.vocab_size)
    return (f"{parameters / 1e6:.2f} M parameters; about {total / 1e9:.2g} GB for weights, AdamW and the "
            f"activations of {batch} x {T} tokens; {12 * parameters / 1e6:.0f} MB a checkpoint")


# ---------------------------------------------------------------------------- Hugging Face folders of BERT

HF_CONFIG = {"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "hidden",
             "num_attention_heads": "heads", "intermediate_size": "intermediate",
             "max_position_embeddings": "max_positions", "type_vocab_size": "type_vocab",
             "hidden_dropout_prob": "dropout", "layer_norm_eps": "layer_norm_eps", "pad_token_id": "pad_id",
             "initializer_range": "init_std"}
# the only values that our BERT can represent; a config.json may leave them out
HF_SETTINGS = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
# {model_type: {kind of task: (class, its name of the pooler, of the head)}}
HF_CLASSES = {
    "bert": {"encoder": ("BertModel", "pooler.dense", ""),
             "mlm": ("BertForMaskedLM", "pooler.dense", ""),
             "classify": ("BertForSequenceClassification", "pooler.dense", "classifier"),
             "regress": ("BertForSequenceClassification", "pooler.dense", "classifier"),
             "choice": ("BertForMultipleChoice", "pooler.dense", "classifier"),
             "span": ("BertForQuestionAnswering", "", "qa_outputs")},
    "electra": {"encoder": ("ElectraModel", "", ""),
                "mlm": ("ElectraForMaskedLM", "", ""),
                "classify": ("ElectraForSequenceClassification", "classifier.dense", "classifier.out_proj"),
                "regress": ("ElectraForSequenceClassification", "classifier.dense", "classifier.out_proj"),
                "choice": ("ElectraForMultipleChoice", "sequence_summary.summary", "classifier"),
                "span": ("ElectraForQuestionAnswering", "", "qa_outputs")},
}
TASK_KINDS = ("classify", "regress", "choice", "span")

LAYER_NAMES = {  # one map of ours is the concatenation of those on its right
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "expand": ("intermediate.dense",),
    "contract": ("output.dense",),
    "output_norm": ("output.LayerNorm",),
}
HEAD_NAMES = {
    "bert": {"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm",
             "bias": "cls.predictions.bias"},
    "electra": {"dense": "generator_predictions.dense", "norm": "generator_predictions.LayerNorm",
                "bias": "generator_lm_head.bias"},
}
# known and not part of the encoder: a buffer of older versions, copies of the tied decoder, next-sentence and
# replaced-token prediction, heads of fine-tuned models, and those of the released VidLanKD checkpoints
# (visual_hinge_head, kd1_student_head, kd2_teacher_head, ...)
DECODER_COPIES = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
                  "cls.predictions.decoder.bias": "cls.predictions.bias",
                  "generator_lm_head.weight": "embeddings.word_embeddings.weight"}
IGNORED = re.compile(r"embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|"
                     r"generator_lm_head\.weight|discriminator_predictions\.(dense|dense_prediction)\..+|"
                     r"(cls\.seq_relationship|classifier|qa_outputs)\.(weight|bias)|"
                     r"(classifier\.(dense|out_proj)|sequence_summary\.summary)\.(weight|bias)|"
                     r"(visual_\w+|kd[12]_(student|teacher))_head\..+")


def hf_names(config, pooler="pooler.dense"):
    """{our tensor: Hugging Face's, several where ours joins them}, without the prefix `bert.`, `electra.`."""
    names = {"embeddings.word.weight": ("embeddings.word_embeddings.weight",),
             "embeddings.position.weight": ("embeddings.position_embeddings.weight",),
             "embeddings.segment.weight": ("embeddings.token_type_embeddings.weight",)}
    for kind in ("weight", "bias"):
        names[f"embeddings.norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
        names[f"embeddings.project.{kind}"] = (f"embeddings_project.{kind}",)
        if pooler:
            names[f"pooler.{kind}"] = (f"{pooler}.{kind}",)
        for i in range(config.layers):
            for ours, theirs in LAYER_NAMES.items():
                names[f"layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{t}.{kind}" for t in theirs)
    return names


def head_names(config):
    """{our tensor: Hugging Face's} of the masked-word head; its decoder's is that of the word embeddings."""
    theirs = HEAD_NAMES[config.model_type]
    names = {f"{part}.{kind}": (f"{theirs[part]}.{kind}",)
             for part in ("dense", "norm") for kind in ("weight", "bias")}
    return names | {"bias": (theirs["bias"],), "weight": ("embeddings.word_embeddings.weight",)}


def model_type(folder):
    """What a Hugging Face folder holds: "bert", "electra", "clip" (its text tower), or another's word."""
    name = read_settings(Path(folder) / "config.json").get("model_type")
    return "clip" if name == "clip_text_model" else name


def load_config(folder):
    """BERTConfig of a Hugging Face folder; SystemExit where it is no BERT that this file can represent."""
    path = Path(folder) / "config.json"
    settings = read_settings(path)
    check_setting(path, "model_type", settings.get("model_type"), *HF_CLASSES)
    for key, wanted in HF_SETTINGS.items():
        check_setting(path, key, settings.get(key, wanted), wanted)
    values = {ours: settings.get(theirs) for theirs, ours in HF_CONFIG.items()}
    values["model_type"] = settings["model_type"]
    if settings.get("embedding_size") != settings.get("hidden_size"):
        values["embedding"] = settings.get("embedding_size")
    return make_config(values, path)


def check_setting(path, key, value, *allowed):
    """SystemExit where a setting has none of the values that can be represented."""
    if value not in allowed:
        raise SystemExit(f"{path}: {key} is {value!r}, only {' or '.join(map(repr, allowed))} can be read; "
                         "choose another model")


def read_settings(path):
    """The object in a .json file."""
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file; give the folder of a model") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: not readable ({error}); fetch or save the model again") from None
    if not isinstance(settings, dict):
        raise SystemExit(f"{path}: holds no settings; fetch or save the model again")
    return settings


def make_config(values, path, cls=BERTConfig):
    """Config from the values in a file, each of its field's type; None = its default."""
    values = {name: value for name, value in values.items() if value is not None}
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        wanted = (int, float) if field.type is float else field.type
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise SystemExit(f"{path}: {value!r} is no value for {field.name}; fetch or save the model again")
    try:
        return cls(**values)
    except SystemExit as error:
        raise SystemExit(f"{path}: {error}") from None


def read_tensors(path):
    """{name: tensor} of a .safetensors or .bin file; nothing that stands in a .bin is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise ValueError("it holds other things than tensors under their names")
            if value.layout != torch.strided or value.is_meta or value.is_complex():
                raise ValueError(f"{name} is no plain tensor of numbers")
        return dict(tensors)
    except Exception as error:  # whatever a damaged or hostile file makes the two libraries raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnpicklingError):  # PyTorch's text advises to load it without this protection
            reason = "damaged, or it holds more than tensors"
        raise SystemExit(f"{path}: not readable ({reason}); fetch or save the model again") from None


def read_folder(folder):
    """(path, {name: tensor}) of the weights in a Hugging Face folder."""
    paths = [Path(folder) / name for name in ("model.safetensors", "pytorch_model.bin")]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        raise SystemExit(f"{folder}: has no model.safetensors and no pytorch_model.bin; fetch one of them")
    return path, read_tensors(path)


def read_weights(folder, config):
    """(path, {name: tensor}) of a Hugging Face BERT, all names known; without `bert.`, gamma and beta."""
    path, stored_tensors = read_folder(folder)
    names = hf_names(config) | head_names(config)
    known, tensors = {name for parts in names.values() for name in parts}, {}
    for stored, tensor in stored_tensors.items():
        name = stored.removeprefix(config.model_type + ".")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in tensors or name not in known and not IGNORED.fullmatch(name):
            wrong = "there twice" if name in tensors else "unknown"
            raise SystemExit(f"{path}: the tensor {stored} is {wrong}; choose a plain "
                             f"{config.model_type.upper()}, of {config.layers} layers by its config.json")
        tensors[name] = tensor
    return path, tensors


def fill(module, names, tensors, path):
    """`module`, made on the meta device, with the tensors under `names` ({ours: theirs}), as float32."""
    state = {}
    for ours, value in module.state_dict().items():
        parts = len(names[ours])
        shape = value.shape if parts == 1 else torch.Size((value.shape[0] // parts, *value.shape[1:]))
        for name in names[ours]:
            if name not in tensors:
                raise SystemExit(f"{path}: the tensor {name} is missing; fetch or save the model again")
            if tensors[name].shape != shape:
                raise SystemExit(f"{path}: the shape of {name} is {tuple(tensors[name].shape)}, by the "
                                 f"settings {tuple(shape)}; fetch or save the model again")
        whole = torch.cat([tensors[name].float().flatten() for name in names[ours]])
        state[ours] = whole.view(value.shape)
    module.load_state_dict(state, assign=True)
    return module


def load_mlm_head(folder, bert):
    """The MLMHead of a Hugging Face folder, in eval mode, tied to its `bert`; None where it has none."""
    path, tensors = read_weights(folder, bert.config)
    names = head_names(bert.config)
    if not any(name in tensors for ours, (name,) in names.items() if ours != "weight"):
        return None
    for copy, original in DECODER_COPIES.items():
        if copy in tensors and original in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise SystemExit(f"{path}: {copy} differs from {original}, but only a tied decoder can be read; "
                             "choose another model")
    with torch.device("meta"):
        head = MLMHead(bert.width, bert.embeddings.word.weight, bert.config.layer_norm_eps)
    fill(head, names, tensors, path)
    head.weight = bert.embeddings.word.weight
    return head.eval()


def load_task(folder):
    """What the config.json of a fine-tuned folder tells of its task; SystemExit where it is not fine-tuned.

    {"task": name, "kind": of TASK_KINDS, "labels": the words of the classes, "pool", "max_length": tokens},
    with "encoder": "xdbert" where it is one, and what else `TaskModel.save_pretrained` was given. Hugging
    Face's folders tell kind and labels; their task is "", their max_length 128.
    """
    path = Path(folder) / "config.json"
    content = read_settings(path)
    if "nanoground" in content:
        settings = content["nanoground"]
        types = {"task": str, "kind": str, "labels": list, "pool": str, "max_length": int}
        if (not isinstance(settings, dict)
                or not all(isinstance(settings.get(key), wanted) for key, wanted in types.items())
                or settings["kind"] not in TASK_KINDS or settings["pool"] not in ("cls", "mean")):
            raise SystemExit(f'{path}: "nanoground" does not describe a fine-tuned model; fine-tune it again')
        return settings
    kind = next((kind for kind in TASK_KINDS for classes in HF_CLASSES.values()
                 if content.get("architectures") == [classes[kind][0]]), "")
    if not kind:
        raise SystemExit(f"{folder}: no fine-tuned model (architectures is {content.get('architectures')}); "
                         f"make one: python finetune.py --model {folder}")
    words = content.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # Hugging Face leaves these two out
    problem = content.get("problem_type")
    if (problem == "multi_label_classification" or not isinstance(words, dict)
            or words.keys() != {str(i) for i in range(len(words))}):
        raise SystemExit(f"{path}: problem_type {problem} with id2label {words} cannot be read; choose a "
                         "model with one label an example")
    if kind == "classify" and (len(words) == 1 or problem == "regression"):
        kind = "regress"
    labels = [str(words[str(i)]) for i in range(len(words))] if kind == "classify" else []
    return {"task": "", "kind": kind, "labels": labels, "pool": "cls", "max_length": 128}


def write_bert(folder, bert, vocab, kind, head, settings):
    """Writes a BERT for Hugging Face's class of this kind.

    head: {Hugging Face's name: tensor}; settings: beside the BERT's own in config.json.
    """
    config = bert.config
    assert vocab.size == config.vocab_size, f"{vocab.size} tokens in vocab, {config.vocab_size} in model"
    architecture, pooler, _ = HF_CLASSES[config.model_type][kind]
    names = hf_names(config, pooler)
    # ElectraModel has no pooler
    tensors = renamed({ours: value for ours, value in bert.state_dict().items() if ours in names}, names)
    if pooler and bert.pooler is None and "nanoground" not in settings:  # a task shall not seem to have one
        noise = torch.randn(config.hidden, config.hidden, generator=torch.Generator().manual_seed(0))
        tensors |= {"pooler.dense.weight": 0.02 * noise, "pooler.dense.bias": torch.zeros(config.hidden)}
    if head:
        inside = ("embeddings", "encoder.", "pooler.")
        tensors = {f"{config.model_type}." * name.startswith(inside) + name: value
                   for name, value in tensors.items()}
    settings = {"architectures": [architecture], **settings, **HF_SETTINGS, "model_type": config.model_type,
                **{theirs: getattr(config, ours) for theirs, ours in HF_CONFIG.items()},
                "attention_probs_dropout_prob": config.dropout,
                "pooler_trained": bool(pooler) and bert.pooler is not None}
    if config.model_type == "electra":
        settings["embedding_size"] = config.embedding or config.hidden
    write_folder(folder, "model.safetensors", tensors | head, "config.json", settings, vocab)


def renamed(state, names):
    """{theirs: tensor} of {ours: tensor}, what is fused in ours taken apart."""
    tensors = {}
    for ours, value in state.items():
        parts = len(names[ours])
        tensors |= zip(names[ours], [value] if parts == 1 else value.chunk(parts))
    return tensors


def write_folder(folder, weights_name, tensors, settings_name, settings, vocab=None):
    """Weights (float32), settings (json) and vocabulary: written aside, then renamed, the settings last."""
    folder = Path(folder)
    part = folder / ".saving"
    try:
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted save left
        part.mkdir(parents=True)
        whole = {name: value.to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
        save_file(whole, part / weights_name, metadata={"format": "pt"})
        if vocab is not None:
            vocab.save(part)
        (part / settings_name).write_text(json.dumps(settings, indent=2) + "\n")
        for path in sorted(part.iterdir(), key=lambda path: path.name == settings_name):
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            os.replace(path, folder / path.name)
        part.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise SystemExit(f"{folder}: could not be written ({error}); free disk space or take another folder"
                         ) from None


def save_video_encoder(folder, encoder):
    """Writes video_encoder.safetensors and video_encoder.json, as safely as `BERT.save_pretrained`."""
    settings = {"features": encoder.features, "max_frames": encoder.max_frames,
                "config": dataclasses.asdict(encoder.config)}
    write_folder(folder, "video_encoder.safetensors", encoder.state_dict(), "video_encoder.json", settings)


def load_video_encoder(folder):
    """The VideoEncoder that `save_video_encoder` wrote, in eval mode; strict as `BERT.from_pretrained`."""
    path = Path(folder) / "video_encoder.json"
    settings = read_settings(path)
    try:
        config, features, max_frames = (settings[key] for key in ("config", "features", "max_frames"))
        with torch.device("meta"):
            encoder = VideoEncoder(make_config(config, path), features, max_frames)
    except (KeyError, TypeError, RuntimeError) as error:
        raise SystemExit(f"{path}: not those of a video encoder ({error}); train the teacher again") from None
    return fill_own(encoder, Path(folder) / "video_encoder.safetensors", "train the teacher again").eval()


def fill_own(module, path, advice, ignored=()):
    """`fill` from a file under our own names; any other is refused but what starts with `ignored`."""
    names, tensors = {name: (name,) for name in module.state_dict()}, read_tensors(path)
    for name in tensors:
        if name not in names and not name.startswith(ignored):
            raise SystemExit(f"{path}: the tensor {name} is unknown; {advice}")
    return fill(module, names, tensors, path)


# ---------------------------------------------------------------------------- files of CLIP

CLIP_CONFIG = {"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "hidden",
               "num_attention_heads": "heads", "intermediate_size": "intermediate",
               "max_position_embeddings": "positions", "projection_dim": "projection", "dropout": "dropout",
               "initializer_range": "init_std"}
CLIP_SETTINGS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
# ours: (OpenAI's, Hugging Face's without `text_model.`)
CLIP_NAMES = {"embeddings.word.weight": ("token_embedding.weight", "embeddings.token_embedding.weight"),
              "embeddings.position.weight": ("positional_embedding", "embeddings.position_embedding.weight"),
              "norm.weight": ("ln_final.weight", "final_layer_norm.weight"),
              "norm.bias": ("ln_final.bias", "final_layer_norm.bias"),
              "project.weight": ("text_projection", "text_projection.weight"),
              "logit_scale": ("logit_scale", "logit_scale")}
CLIP_LAYER_NAMES = {
    "attention_norm.": (("ln_1.",), ("layer_norm1.",)),
    "attention.qkv.": (("attn.in_proj_",), ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")),
    "attention.out.": (("attn.out_proj.",), ("self_attn.out_proj.",)),
    "output_norm.": (("ln_2.",), ("layer_norm2.",)),
    "expand.": (("mlp.c_fc.",), ("mlp.fc1.",)),
    "contract.": (("mlp.c_proj.",), ("mlp.fc2.",)),
}
# the image tower and three constants; in folders a buffer of older versions and a task's head, too
OPENAI_IGNORED = re.compile(r"visual\..+|input_resolution|context_length|vocab_size")
CLIP_IGNORED = re.compile(r"(vision_model|visual_projection)\..+|embeddings\.position_ids|"
                          r"classifier\.(weight|bias)")


def clip_names(layers, openai=False):
    """{our tensor: OpenAI's, or Hugging Face's without `text_model.`, several where ours joins them}."""
    names = {ours: (theirs[0 if openai else 1],) for ours, theirs in CLIP_NAMES.items()}
    for i in range(layers):
        for ours, theirs in CLIP_LAYER_NAMES.items():
            block = f"transformer.resblocks.{i}." if openai else f"encoder.layers.{i}."
            for kind in ("weight", "bias"):
                names[f"layers.{i}.{ours}{kind}"] = tuple(
                    block + name + kind for name in theirs[0 if openai else 1])
    return names


def load_clip_config(folder):
    """CLIPConfig of the text tower in a Hugging Face folder; SystemExit where it is none of OpenAI's kind."""
    path = Path(folder) / "config.json"
    settings = read_settings(path)
    check_setting(path, "model_type", settings.get("model_type"), "clip", "clip_text_model")
    if settings["model_type"] == "clip":  # both towers
        text = settings.get("text_config")
        if not isinstance(text, dict):
            raise SystemExit(f"{path}: has no text_config; choose another model")
        settings = text | {"projection_dim": settings.get("projection_dim", CLIPConfig.projection)}
    for key, wanted in CLIP_SETTINGS.items():
        check_setting(path, key, settings.get(key, wanted), wanted)
    values = {ours: settings.get(theirs) for theirs, ours in CLIP_CONFIG.items()}
    return make_config(values, path, CLIPConfig)


def read_clip(path):
    """(CLIPConfig, path of the weights, {name: tensor}, {ours: its names}) of the text tower at `path`."""
    path = Path(path)
    openai = not path.is_dir()
    config, path, tensors = read_openai(path) if openai else read_clip_folder(path)
    names, ignored = clip_names(config.layers, openai), OPENAI_IGNORED if openai else CLIP_IGNORED
    known = {name for parts in names.values() for name in parts}
    for name in tensors:
        if name not in known and not ignored.fullmatch(name):
            raise SystemExit(f"{path}: the tensor {name} is unknown; choose a CLIP of OpenAI's architecture, "
                             f"of {config.layers} text layers")
    return config, path, tensors, names


def read_clip_folder(folder):
    """(CLIPConfig, path of the weights, {name without `text_model.`: tensor}) of a Hugging Face folder."""
    config = load_clip_config(folder)
    path, stored = read_folder(folder)
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    tensors.setdefault("logit_scale", torch.tensor(FIRST_LOGIT_SCALE))  # CLIPModel's and ours have one
    if "text_projection.weight" not in tensors:
        if config.projection != config.hidden:
            raise SystemExit(f"{path}: has no text_projection, from {config.hidden} to {config.projection} "
                             "channels; choose a CLIPModel or CLIPTextModelWithProjection")
        print0(f"{path}: has no text_projection: the states are taken as they are")
        tensors["text_projection.weight"] = torch.eye(config.hidden)
    return config, path, tensors


def read_openai(path):
    """(CLIPConfig that the shapes tell, path, {name: tensor}) of OpenAI's file; a head has 64 channels."""
    tensors = read_archive(path) if is_archive(path) else read_tensors(path)
    blocks = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    try:
        words, hidden = tensors["token_embedding.weight"].shape
        positions, _ = tensors["positional_embedding"].shape
        intermediate, _ = tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape
        _, projection = tensors["text_projection"].shape
    except (KeyError, ValueError):
        raise SystemExit(f"{path}: holds no text tower under OpenAI's names; give OpenAI's file or the "
                         "folder of a Hugging Face CLIP") from None
    tensors["text_projection"] = tensors["text_projection"].T  # ours is the weight of a linear map
    values = dict(vocab_size=words, layers=len(blocks), hidden=hidden, heads=hidden // 64,
                  intermediate=intermediate, positions=positions, projection=projection)
    return make_config(values, path, CLIPConfig), path, tensors


def write_clip(folder, clip, vocab, head, settings):
    """Writes CLIP's text tower, `head` ({name: tensor}) and `settings` beside the tower's own."""
    config = clip.config
    assert vocab.size == config.vocab_size, f"{vocab.size} tokens in vocab, {config.vocab_size} in model"
    tensors = {("" if name in ("text_projection.weight", "logit_scale") else "text_model.") + name: part
               for name, part in renamed(clip.state_dict(), clip_names(config.layers)).items()}
    settings = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
                **CLIP_SETTINGS, **{theirs: getattr(config, ours) for theirs, ours in CLIP_CONFIG.items()},
                "bos_token_id": vocab.start, "eos_token_id": vocab.end, "pad_token_id": vocab.pad, **settings}
    write_folder(folder, "model.safetensors", tensors | head, "config.json", settings, vocab)


# ---------------------------------------------------------------------------- OpenAI's TorchScript archive

# a zip of data.pkl, data/ with one file for each storage, and code/, which is left alone
STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}


class ArchiveUnpickler(Unpickler):
    """Reads the modules of a TorchScript archive as plain namespaces of tensors.

    Nothing that the file names is imported or called: each name that may stand there is mapped to what is
    written here, any other is refused.
    """

    def __init__(self, archive, root):
        self.archive, self.root, self.storages = archive, root, {}
        super().__init__(io.BytesIO(self.read("data.pkl")))

    def read(self, name):
        """The bytes of a part, which PyTorch stores as they are: what is compressed could be of any size."""
        if self.archive.getinfo(self.root + name).compress_type != zipfile.ZIP_STORED:
            raise UnpicklingError(f"{name} is compressed")
        return self.archive.read(self.root + name)

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":  # the modules' classes
            return SimpleNamespace
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: view_of(storage, offset, size, stride)
        if module == "torch.jit._pickle" and re.fullmatch(r"build_\w+list|restore_type_tag", name):
            return lambda value, *_: value  # a typed list is a list
        raise UnpicklingError(f"it names {module}.{name}, which is no part of a stored model")

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid
        if key not in self.storages:  # tensors may share one
            self.storages[key] = torch.frombuffer(bytearray(self.read(f"data/{key}")), dtype=dtype)
        storage = self.storages[key]
        if len(storage) != count or storage.dtype != dtype:
            raise UnpicklingError(f"data/{key} holds {len(storage)} numbers in place of {count}")
        return storage


def view_of(storage, offset, size, stride):
    """The tensor of this size and stride in a flat storage; more numbers than it holds are refused."""
    if math.prod(size) > len(storage):
        raise UnpicklingError(f"a tensor of {size} in a storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


def is_archive(path):
    """Is this file a TorchScript archive, not one of torch.save?"""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # no zip, or a damaged one: reading it will tell
        return False


def read_archive(path):
    """{name: tensor} of a TorchScript archive, as its state dict has them; its code is not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0] + "/"
            stack, seen, tensors = [("", ArchiveUnpickler(archive, root).load())], set(), {}
        while stack:
            prefix, module = stack.pop()
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    tensors[prefix + name] = value
                elif isinstance(value, SimpleNamespace) and id(value) not in seen:
                    seen.add(id(value))  # a hostile file may hold a circle
                    stack.append((f"{prefix}{name}.", value))
        return tensors
    except Exception as error:  # whatever a damaged or hostile file leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemExit(f"{path}: not readable ({reason}); fetch the model again") from None
