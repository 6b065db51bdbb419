"""BERT and CLIP's text tower by hand, and what stands around them: cross-modal encoder, heads, video encoder.

BERT: Devlin et al. 2019 (post-LayerNorm, erf GELU, learned positions); ELECTRA's encoder is one, too. CLIP:
Radford et al. 2021 (pre-LayerNorm, causal). XDBERT: Hsu et al. 2022, both beside each other. Query, key and
value maps are fused in one. The folders that are read and written are Hugging Face's, CLIP's files OpenAI's,
too; the tables of names are at the end of this file.
"""
import dataclasses
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

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
