"""Networks, heads and parameter groups. parts/weights.py reads and writes their files.

BERT         Devlin et al. 2019: post-LayerNorm, erf GELU, learned positions; ELECTRA's encoder is one, too
CLIPText     text tower of CLIP, Radford et al. 2021: pre-LayerNorm, causal
XDBERT       Hsu et al. 2022: BERT and CLIPText, and a cross-modal encoder on both
VideoEncoder frame features -> a vector, Tang et al. 2021 (VidLanKD)

Shapes: B sequences, T tokens, C hidden, H heads, D = C / H, F frames, V vocabulary. Masks: bool, True = real
token; at padded positions the states mean nothing.
"""
import dataclasses
import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------- configuration


def check_shape(config):
    """ValueError for a size, a dropout or a number of heads that makes no model."""
    for name in (field.name for field in dataclasses.fields(config) if field.type is int):
        least = 0 if name in ("embedding", "pad_id") else 1
        most = 1000 if name == "layers" else 2 ** 31  # a damaged file must not have us build for hours
        if not least <= getattr(config, name) < most:
            raise ValueError(f"{name} {getattr(config, name)}: must be at least {least} and below {most}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout {config.dropout:g}: must be at least 0 and below 1")
    if not 0 <= config.init_std <= 1:
        raise ValueError(f"init_std {config.init_std:g}: must be at least 0 and at most 1")
    if config.hidden % config.heads:
        raise ValueError(f"hidden {config.hidden} cannot be split into {config.heads} heads of equal width; "
                         "choose a multiple (BERT and CLIP have 64 a head)")


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """Shape of a BERT or ELECTRA."""
    vocab_size: int = 30522
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    max_positions: int = 512
    type_vocab: int = 2
    dropout: float = 0.1  # of embeddings, attention weights and outputs of sub-layers
    layer_norm_eps: float = 1e-12
    pad_id: int = 0
    init_std: float = 0.02
    embedding: int = 0  # width of the embeddings, which are then mapped to `hidden`; 0 = `hidden`, no map
    model_type: str = "bert"  # or "electra": another pooler, other names in Hugging Face's folders

    __post_init__ = check_shape


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

    __post_init__ = check_shape


SHAPES = {"demo": dict(layers=2, hidden=128, heads=4, intermediate=512, init_std=0.05)}  # wider ones: 0.02


def model_config(shape, vocab_size, dropout=0.1):
    """BERTConfig of a shape: a name in SHAPES, or layers and width as in "6L-512H".

    6L-512H is the ablation model of VidLanKD, 12L-768H is BERT-base. Heads are 64 wide, or as many as a third
    part says ("1L-32H-2A"); the feed-forward is 4 times as wide as the states.
    """
    if shape in SHAPES:
        return BERTConfig(vocab_size=vocab_size, dropout=dropout, **SHAPES[shape])
    form = re.fullmatch(r"(\d{1,3})L-(\d+)H(?:-(\d+)A)?", shape)
    if not form or not form[3] and int(form[2]) % 64:
        raise ValueError(f"model {shape}: write {', '.join(SHAPES)}, or layers and width as in 6L-512H (a "
                         "multiple of 64), or heads too as in 1L-32H-2A")
    layers, hidden = int(form[1]), int(form[2])
    return BERTConfig(vocab_size, layers, hidden, int(form[3] or hidden // 64), 4 * hidden, dropout=dropout)


# ---------------------------------------------------------------------------- attention and layers


def dropout(x, p, training):
    """x with each element zeroed with probability p, the others scaled by 1 / (1 - p).

    On the CPU 16 random bits decide each element, which halves F.dropout's time: p is rounded to a multiple
    of 2^-16, and the scale with it, so that the mean stays.
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


def attend(q, k, v, heads, mask=None, p=0.0, causal=False):
    """Multi-head attention: softmax(q k' / sqrt(D)) v in each head.

    q (B, T, C); k, v (B, S, C); mask bool, broadcasts to (B, H, T, S), True = seen, each query sees at least
    one, None = all; causal, in place of a mask: none sees a later one; p: dropout of the weights
    -> (B, T, C).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, D)
    if q.device.type != "cpu":
        y = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
    else:
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        # the fused kernel is no faster on a CPU in training, and slower in bf16
        weights = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, H, T, S)
        if mask is not None:
            weights.masked_fill_(~mask, -math.inf)
        y = dropout(weights.softmax(-1), p, True) @ v
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention over the real tokens; query, key and value are one map."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, causal=False):
        """x (B, T, C); mask bool that broadcasts to (B, H, T, T), causal or neither -> (B, T, C)."""
        return self.out(attend(*self.qkv(x).chunk(3, -1), self.heads, mask, self.dropout * self.training,
                               causal))


class CrossAttention(nn.Module):
    """Attention of one stream to another; keys and values are mapped to the width of the first."""

    def __init__(self, width, other, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(other, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, other, mask=None):
        """x (B, T, C), other (B, S, C'), mask bool (B, 1, 1, S) or None -> (B, T, C)."""
        k, v = self.key_value(other).chunk(2, -1)
        return self.out(attend(self.query(x), k, v, self.heads, mask, self.dropout * self.training))


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


def recompute(module):
    """Backward computes what is inside of each layer anew (Chen et al. 2016): of a layer its input alone is
    kept. Values and gradients stay equal, with their dropout, and a step takes a third longer."""
    torch._dynamo.config.optimize_ddp = False  # PyTorch 2.4 cannot split a graph with such layers for DDP
    for stack in module.modules():
        for layer in stack if isinstance(stack, nn.ModuleList) else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# ---------------------------------------------------------------------------- BERT and ELECTRA


def first_positions(position, T, name):
    """(T, C): the first T rows of a position embedding; ValueError where it has fewer."""
    if T > len(position.weight):
        raise ValueError(f"{name} has {len(position.weight)} positions, not enough for a sequence of {T}")
    return position.weight[:T]


class Embeddings(nn.Module):
    """Word, position and segment vectors, summed and normalised; narrower ones are mapped to C."""

    def __init__(self, config):
        super().__init__()
        self.dropout, width = config.dropout, config.embedding or config.hidden
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_positions, width)
        self.segment = nn.Embedding(config.type_vocab, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.project = nn.Linear(width, config.hidden) if config.embedding else nn.Identity()

    def forward(self, ids, segments=None):
        one = segments is None or len(self.segment.weight) == 1  # then all tokens are of segment 0
        segment = self.segment.weight[0] if one else self.segment(segments)
        x = self.word(ids) + (first_positions(self.position, ids.shape[1], "BERT") + segment)
        return self.project(dropout(self.norm(x), self.dropout, self.training))


class BERT(nn.Module):
    """Token ids -> hidden states. 12L-768H with pooler is BERT-base: 109,482,240 parameters.

    With model_type electra: ELECTRA's discriminator (Clark et al. 2020). Its pooler is that of Hugging Face's
    classifier, no pre-trained folder has one; electra-large without has 334,092,288 parameters.
    """

    def __init__(self, config, pooler=False):
        super().__init__()
        self.config, self.width = config, config.hidden
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.hidden, config.hidden) if pooler else None
        self.apply(partial(init_weights, std=config.init_std))

    def forward(self, ids, mask=None, segments=None, all_states=False):
        """ids (B, T) int64 -> (B, T, C), or with all_states the list of L + 1 of them, embeddings first.

        mask (B, T), a real token in each row, None = all real, which is faster; segments (B, T) int64,
        None = all 0.
        """
        mask = None if mask is None else mask[:, None, None, :]
        states = [self.embeddings(ids, segments)]
        for layer in self.layers:
            states = [*(states if all_states else ()), layer(states[-1], mask)]
        return states if all_states else states[-1]

    def pool(self, h, mask=None):
        """(B, T, C) -> (B, C), needs pooler=True: tanh of a linear map of the [CLS] state.

        ELECTRA: dropout, linear map, GELU. CLIPText uses mask, here [CLS] is always real.
        """
        if self.config.model_type == "electra":
            return F.gelu(self.pooler(dropout(h[:, 0], self.config.dropout, self.training)))
        return torch.tanh(self.pooler(h[:, 0]))

    def for_task(self, pooled):
        """Drops a pooler that the task does not use: DDP would wait for its gradient."""
        self.pooler = self.pooler if pooled else None
        assert self.pooler or not pooled, "pool cls needs a BERT made with pooler=True"


def init_weights(module, std):
    """For `.apply`: weights N(0, std), biases 0 (Devlin et al. 2019: 0.02). LayerNorm stays 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def masked_mean(x, mask=None):
    """x (B, T, C), mask (B, T), at least one True in each row, None = all -> (B, C)."""
    if mask is None:
        return x.mean(1)
    real = mask[..., None].to(x.dtype)  # (B, T, 1)
    return (x * real).sum(1) / real.sum(1)


# ---------------------------------------------------------------------------- CLIP's text tower

FIRST_LOGIT_SCALE = math.log(1 / 0.07)


class CLIPLayer(nn.Module):
    """Attention and quick-GELU feed-forward, each on the normalised state, its result added (pre-LN)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.attention = Attention(config.hidden, config.heads)
        self.output_norm = nn.LayerNorm(config.hidden)
        self.expand = nn.Linear(config.hidden, config.intermediate)
        self.contract = nn.Linear(config.intermediate, config.hidden)

    def forward(self, x, causal=False):
        x = x + self.attention(self.attention_norm(x), causal=causal)
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
    """Token ids -> states in the space that texts and images share. ViT-B/32's: 63,428,097 parameters."""

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.projection
        self.embeddings = CLIPEmbeddings(config)
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.project = nn.Linear(config.hidden, config.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))  # log(1 / temperature)
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

        mask and segments are BERT's and not used: no token sees a later one, and padding comes last.
        """
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.project(self.norm(x))

    def pool(self, h, mask=None):
        """(n, l, P) -> (n, P): the state of the last real token, the end of the text."""
        return h[:, -1] if mask is None else h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]

    def for_task(self, pooled):
        """No task uses the logit scale: DDP would wait for its gradient."""
        self.logit_scale.requires_grad_(False)


# ---------------------------------------------------------------------------- XDBERT's cross-modal encoder


class CrossLayer(nn.Module):
    """One stream's half of a cross-modal layer: attention to the other stream, then a BERT layer."""

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
    """Text and CLIP stream: each attends to the other, then to itself (XDBERT section 2.1, as LXMERT).

    text: the language encoder's BERTConfig. Both halves of a layer read the layer's inputs. Each stream has
    the heads of its own encoder; both feed-forwards are as wide as the text's.
    """

    def __init__(self, text, clip, layers=2):
        super().__init__()
        beside = dataclasses.replace(text, hidden=clip.projection, heads=clip.heads)
        self.text = nn.ModuleList(CrossLayer(text, clip.projection) for _ in range(layers))
        self.clip = nn.ModuleList(CrossLayer(beside, text.hidden) for _ in range(layers))
        self.apply(partial(init_weights, std=text.init_std))

    def forward(self, h, c, mask=None, clip_mask=None, text=True, clip=True):
        """h (B, T, C), c (B, R, P), masks (B, T) and (B, R), None = all real -> (new h, new c).

        text=False or clip=False: the last layer leaves that stream out and returns None for it.
        """
        mask, clip_mask = (m if m is None else m[:, None, None, :] for m in (mask, clip_mask))
        for text_half, clip_half in zip(self.text[:-1], self.clip[:-1]):
            h, c = text_half(h, c, mask, clip_mask), clip_half(c, h, clip_mask, mask)
        return (self.text[-1](h, c, mask, clip_mask) if text else None,
                self.clip[-1](c, h, clip_mask, mask) if clip else None)


class XDBERT(nn.Module):
    """Language encoder, CLIP's text tower, and the cross-modal encoder on both.

    BERT-base with pooler, ViT-B/32's text tower and 2 layers have 202,059,009 parameters. pooler: None until
    somebody trains one, then the linear map of `pool`.
    """

    def __init__(self, language, clip, layers=2):
        super().__init__()
        self.config, self.width = language.config, language.width
        self.language, self.clip = language, clip
        self.cross = CrossEncoder(language.config, clip.config, layers)
        self.pooler = None

    def streams(self, ids, mask=None, segments=None, *, clip_ids, clip_place, clip_mask,
                text=True, clip=True):
        """States of both streams, (h (B, T, C), c (B, R, P)); None for one with text=False or clip=False.

        ids, mask, segments: as for BERT. clip_ids (n, l) int64: the batch's CLIP segments, none empty.
        clip_place (B, R) int64: the place of row b's r-th real CLIP token among the n l states; clip_mask
        (B, R), True = there is one (at least one in each row).
        """
        return self.join(self.language(ids, mask, segments), self.clip(clip_ids), mask, clip_place, clip_mask,
                         text, clip)

    def join(self, h, c, mask, clip_place, clip_mask, text=True, clip=True):
        """`streams` from the encoders' own states, h (B, T, C) and c (n, l, P)."""
        c = F.embedding(clip_place, c.flatten(0, 1))  # (B, R, P)
        return self.cross(h, c, mask, clip_mask, text, clip)

    def forward(self, ids, mask=None, segments=None, **clip):
        """The text stream (B, T, C), which fine-tuning reads. clip: clip_ids, clip_place, clip_mask."""
        return self.streams(ids, mask, segments, **clip, clip=False)[0]

    def pool(self, h, mask=None):
        """(B, T, C) -> (B, C): tanh of a linear map of the [CLS] state."""
        return torch.tanh(self.pooler(h[:, 0]))

    def for_task(self, pooled):
        """Drops or freezes what the text stream does not use: DDP would wait for its gradient."""
        self.language.pooler = None
        self.clip.logit_scale.requires_grad_(False)
        self.cross.clip[-1].requires_grad_(False)
        if not pooled:
            self.pooler = None
        elif self.pooler is None:
            self.pooler = nn.Linear(self.width, self.width)
            init_weights(self.pooler, self.config.init_std)

    def own(self):
        """The parts outside both encoders: the cross-modal encoder and, where there is one, the pooler."""
        return nn.ModuleDict({"cross": self.cross} | ({"pooler": self.pooler} if self.pooler else {}))


# ---------------------------------------------------------------------------- heads


class MLMHead(nn.Module):
    """States -> logits over a vocabulary: dense, GELU, LayerNorm, word embeddings transposed.

    hidden: the states' width C. embedding_weight (V, E): shared, not copied, e.g.
    `bert.embeddings.word.weight`. eps: LayerNorm's; std: of the initial weights.
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
        """(..., C) -> (..., E), the input of the decoder."""
        return self.norm(F.gelu(self.dense(h)))

    def forward(self, h):
        """(n, C) -> (n, V). Give it the masked rows only: all rows cost 6-9 times more."""
        h = self.transform(h)
        if self.training:
            return F.linear(h, self.weight, self.bias)
        with torch.autocast(h.device.type, enabled=False):  # bf16 would tie close words
            return F.linear(h.to(self.weight.dtype), self.weight, self.bias)


class DistillHead(nn.Sequential):
    """Student states -> the teacher's width: linear, ReLU, linear (VidLanKD section 4.3).

    The paper does not give its initial weights; PyTorch's own keep the scale of the states.
    """

    def __init__(self, hidden_s, hidden_t):
        super().__init__(nn.Linear(hidden_s, hidden_s), nn.ReLU(), nn.Linear(hidden_s, hidden_t))


class TaskModel(nn.Module):
    """An encoder with the head of a task: token ids -> logits.

        kind      ids        logits        head
        classify  (B, T)     (B, labels)   pooled state, dropout, linear map
        regress   (B, T)     (B,)          the same
        choice    (B, K, T)  (B, K)        the same for each of K candidates, one map C -> 1 for all
        span      (B, T)     (B, T, 2)     linear map of every last state to start and end, also of padding

    encoder: BERT, CLIPText or XDBERT; parts that the task does not use are dropped or frozen.
    pool: "mean" = mean of the last states over real tokens; "cls" = the pooler of BERT (made with
    pooler=True) or of XDBERT (fresh where none was trained), CLIP's state at the end of the text.
    """

    def __init__(self, encoder, kind, labels=1, pool="cls"):
        super().__init__()
        self.encoder, self.kind, self.pool, self.frozen = encoder, kind, pool, False
        encoder.for_task(pooled=kind != "span" and pool == "cls")
        self.classifier = nn.Linear(encoder.width, {"classify": labels, "span": 2}.get(kind, 1))
        init_weights(self.classifier, encoder.config.init_std)

    def forward(self, ids, mask=None, segments=None, **clip):
        """ids, mask, segments as for BERT, for choice (B, K, T) -> float32 logits.

        clip: as for XDBERT, where each candidate is a row.
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
        """Trains pooler and head alone; the rest has no gradient, no graph and no dropout."""
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


# ---------------------------------------------------------------------------- video


class VideoEncoder(nn.Module):
    """Frame features -> one vector: linear map, frame positions, BERT layers, mean over the real frames.

    config: a BERTConfig, its vocabulary is not used; features: channels of a frame; max_frames: positions.
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
        """frames (B, F, features), mask (B, F), a real frame in each row, None = all real -> (B, C)."""
        frames = frames.to(self.project.weight.dtype)  # they may come as stored, in float16
        x = self.norm(self.project(frames) + first_positions(self.position, frames.shape[1], "VideoEncoder"))
        x = dropout(x, self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, None if mask is None else mask[:, None, None, :])  # (B, F, C)
        return masked_mean(x, mask)


# ---------------------------------------------------------------------------- optimizer groups


def param_groups(module, weight_decay, layer_decay=1.0):
    """Groups for AdamW: matrices with weight decay; biases, LayerNorm and scalars without.

    Every trainable parameter is in exactly one group, once, tied or not. "scale": factor on the learning
    rate, decayed by layer as in ELECTRA (Clark et al. 2020). With d = layer_decay it is d^(L - i) for layer
    i = 0 .. L - 1 of a BERT or a text tower, d^(L + 1) for its embeddings, 1 for all else; d = 1 makes two
    groups. (ELECTRA's released code has one d more in all but the head.)
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
