"""BERT by hand, and what stands around it: masked-word and distillation head, fine-tuning, video encoder.

Devlin et al. 2019 (post-LayerNorm, erf GELU, learned positions), with query, key and value maps fused in one.
The folders that it reads and writes are Hugging Face's; the table of names is at the end of this file.
"""
import dataclasses
import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# ---------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """Shape of a BERT. `dropout` is that of embeddings, attention weights and sub-layer outputs alike."""
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

    def __post_init__(self):
        sizes = ("vocab_size", "layers", "hidden", "heads", "intermediate", "max_positions", "type_vocab")
        for name in sizes:
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise SystemExit(f"--dropout {self.dropout}: must be at least 0 and below 1")
        if self.hidden % self.heads:
            raise SystemExit(f"--hidden {self.hidden} cannot be split into --heads {self.heads} equal parts; "
                             "choose a multiple (BERT has 64 a head)")


# 6L-512H is the ablation model of VidLanKD, 12L-768H is BERT-base
SHAPES = {
    "demo": dict(layers=2, hidden=128, heads=4, intermediate=512, init_std=0.05),  # 0.02 suits wider models
    "6L-512H": dict(layers=6, hidden=512, heads=8, intermediate=2048),
    "12L-768H": dict(layers=12, hidden=768, heads=12, intermediate=3072),
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


# ---------------------------------------------------------------------------- the encoder


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


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k' / sqrt(D)) v, D = C / H, over the real tokens."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(self, x, mask=None):
        """x (B, T, C), mask bool (B, 1, 1, T) or None where every token is real -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if x.device.type != "cpu":
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        else:
            # the fused kernel is no faster on a CPU in training, and slower in bf16
            weights = q * (C // self.heads) ** -0.5 @ k.transpose(-2, -1)  # (B, H, T, T)
            if mask is not None:
                weights.masked_fill_(~mask, -math.inf)
            y = dropout(weights.softmax(-1), self.dropout, self.training) @ v
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Layer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm (post-LN)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.expand = nn.Linear(config.hidden, config.intermediate)
        self.contract = nn.Linear(config.intermediate, config.hidden)
        self.output_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)

    def forward(self, x, mask=None):
        x = self.attention_norm(x + dropout(self.attention(x, mask), self.dropout, self.training))
        y = self.contract(F.gelu(self.expand(x)))
        return self.output_norm(x + dropout(y, self.dropout, self.training))


class Embeddings(nn.Module):
    """Word, position and segment vectors, summed and normalised."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        self.position = nn.Embedding(config.max_positions, config.hidden)
        self.segment = nn.Embedding(config.type_vocab, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)

    def forward(self, ids, segments=None):
        T = ids.shape[1]
        if T > len(self.position.weight):
            raise SystemExit(f"sequences of {T} tokens, but BERT has {len(self.position.weight)} positions; "
                             "lower --block_size or --max_length")
        segment = self.segment.weight[0] if segments is None else self.segment(segments)
        x = self.word(ids) + (self.position.weight[:T] + segment)
        return dropout(self.norm(x), self.dropout, self.training)


class BERT(nn.Module):
    """Token ids -> hidden states. 12L-768H with pooler has 109,482,240 parameters (BERT-base)."""

    def __init__(self, config, pooler=False):
        super().__init__()
        self.config = config
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

    def pool(self, h):
        """(B, T, C) -> (B, C): tanh of a linear map of the [CLS] state; for a BERT made with pooler=True."""
        return torch.tanh(self.pooler(h[:, 0]))

    @classmethod
    def from_pretrained(cls, folder, pooler=False, dropout=None):
        """The BERT of a Hugging Face folder, fine-tuned or not, in float32 and eval mode.

        pooler: with pooler, the file's where it was trained, else a fresh one (N(0, init_std), bias 0) from
        torch's global generator, which is left alone otherwise. Every tensor of the file must be known, and
        every one of ours in it with the shape that config.json tells; SystemExit names the file and the
        tensor where that is not so. Hugging Face's two dropout rates become one: `dropout`, or where that is
        None, that of the hidden states.
        """
        config = load_config(folder)
        if dropout is not None:
            config = dataclasses.replace(config, dropout=dropout)
        path, tensors = read_weights(folder, config)
        trained = (any(name.startswith("pooler.") for name in tensors)
                   and read_settings(Path(folder) / "config.json").get("pooler_trained", True))
        with torch.device("meta"):
            bert = cls(config, pooler and trained)
        fill(bert, hf_names(config), tensors, path)
        if pooler and not trained:
            bert.pooler = nn.Linear(config.hidden, config.hidden)
            init_weights(bert.pooler, config.init_std)
        return bert.eval()

    def save_pretrained(self, folder, vocab, head=None):
        """Writes a folder that `from_pretrained`, and Hugging Face's AutoModel and AutoTokenizer, open.

        vocab: the data.Vocab of the ids; head: the MLMHead, if there is a trained one. A model without pooler
        gets a fresh one (N(0, 0.02), seed 0), since Hugging Face's BertModel wants one; "pooler_trained" in
        config.json tells which it is. Other files of the folder stay. All is written into a folder inside
        first, then renamed, config.json last: interrupted, it leaves the old weights or the new ones, whole,
        and a new folder without config.json.
        """
        state = head.state_dict() if head else {}
        state.pop("weight", None)  # tied: it is among the embeddings
        write_bert(folder, self, vocab, {HEAD_NAMES[ours][0]: value for ours, value in state.items()},
                   {"architectures": ["BertForMaskedLM" if head else "BertModel"]})


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


# ---------------------------------------------------------------------------- heads


class MLMHead(nn.Module):
    """Hidden states -> logits over the vocabulary: dense, GELU, LayerNorm, word embeddings transposed.

    embedding_weight: `bert.embeddings.word.weight` (V, C), shared, not copied.
    """

    def __init__(self, config, embedding_weight):
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.apply(partial(init_weights, std=config.init_std))
        self.weight = embedding_weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, h):
        """(..., C) -> (..., C): what the decoder's rows are compared with."""
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

# {kind of task: (Hugging Face's class, its name of the head)}
TASK_HEADS = {"classify": ("BertForSequenceClassification", "classifier"),
              "regress": ("BertForSequenceClassification", "classifier"),
              "choice": ("BertForMultipleChoice", "classifier"),
              "span": ("BertForQuestionAnswering", "qa_outputs")}


class TaskModel(nn.Module):
    """BERT with the head of a task: token ids -> logits.

        kind      ids        logits        head
        classify  (B, T)     (B, labels)   pooled state, dropout, linear map
        regress   (B, T)     (B,)          the same
        choice    (B, K, T)  (B, K)        the same for each of K candidates, one map C -> 1 for all
        span      (B, T)     (B, T, 2)     linear map of every last state to start and end, also of padding

    bert: made with pooler=True; the pooler is dropped where the task has no use for it.
    pool: what is pooled, "cls" = BERT's pooler, "mean" = the mean of the last states over real tokens.
    """

    def __init__(self, bert, kind, labels=1, pool="cls"):
        super().__init__()
        self.bert, self.kind, self.pool, self.frozen = bert, kind, pool, False
        if kind == "span" or pool == "mean":
            bert.pooler = None  # DDP would wait for its gradient
        else:
            assert bert.pooler is not None, "pool cls needs a BERT made with pooler=True"
        self.classifier = nn.Linear(bert.config.hidden, {"classify": labels, "span": 2}.get(kind, 1))
        init_weights(self.classifier, bert.config.init_std)

    def forward(self, ids, mask=None, segments=None):
        """ids, mask, segments as for BERT, with K candidates a row where kind is choice -> float32 logits."""
        shape = ids.shape
        if self.kind == "choice":
            ids, mask, segments = (x if x is None else x.flatten(0, 1) for x in (ids, mask, segments))
        h = self.bert(ids, mask, segments)  # (B, T, C)
        if self.kind != "span":
            h = self.bert.pool(h) if self.pool == "cls" else masked_mean(h, mask)  # (B, C)
            h = dropout(h, self.bert.config.dropout, self.training)
        with torch.autocast(h.device.type, enabled=False):  # bf16 would tie close scores
            logits = self.classifier(h.to(self.classifier.weight.dtype))
        if self.kind == "choice":
            return logits.view(shape[:2])
        return logits[:, 0] if self.kind == "regress" else logits

    def freeze_encoder(self):
        """Leaves pooler and head to train; the rest has no gradient (nor graph), no dropout in train mode."""
        self.frozen = True
        self.bert.embeddings.requires_grad_(False)
        self.bert.layers.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    @classmethod
    def from_pretrained(cls, folder):
        """(model, settings) of a fine-tuned folder, ours or Hugging Face's, as strict as BERT's.

        In float32 and eval mode; the RNG is left alone. settings: see `load_task`.
        """
        config, settings = load_config(folder), load_task(folder)
        path, tensors = read_weights(folder, config)
        with torch.device("meta"):
            model = cls(BERT(config, pooler=True), settings["kind"], len(settings["labels"]),
                        settings["pool"])
        head = TASK_HEADS[model.kind][1]
        names = {"bert." + ours: theirs for ours, theirs in hf_names(config).items()}
        names |= {f"classifier.{part}": (f"{head}.{part}",) for part in ("weight", "bias")}
        return fill(model, names, tensors, path).eval(), settings

    def save_pretrained(self, folder, vocab, settings):
        """Writes a folder for `from_pretrained`, as safely as BERT's; `BERT.from_pretrained` opens it too.

        settings: kept in config.json under "nanoground", with at least task (its name), labels (the words of
        the classes, in order; else []) and max_length (tokens). Hugging Face's AutoModelFor... of the kind
        computes the same logits, but with pool="mean": it has no such class, so architectures is BertModel.
        A model without pooler is written without.
        """
        architecture, name = TASK_HEADS[self.kind]
        content = {"architectures": ["BertModel" if self.pool == "mean" else architecture],
                   "nanoground": settings | {"kind": self.kind, "pool": self.pool}}
        if self.kind in ("classify", "regress"):
            words = settings["labels"] if self.kind == "classify" else ["LABEL_0"]
            assert len(words) == self.classifier.out_features, f"{words} for {self.classifier}"
            content |= {"id2label": dict(enumerate(words)), "label2id": {w: i for i, w in enumerate(words)},
                        "problem_type": "regression" if self.kind == "regress" else
                        "single_label_classification"}
        head = {f"{name}.{ours}": value for ours, value in self.classifier.state_dict().items()}
        write_bert(folder, self.bert, vocab, head, content)


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
    learning rate, decayed by layer as in ELECTRA (Clark et al. 2020): 1 for heads and pooler, d^(L - i) for
    layer i = 0 .. L - 1 of a BERT, d^(L + 1) for its embeddings, where d = layer_decay; 1 makes two groups.
    (ELECTRA's released code has one d more in all but the head: its last layer gets d^2.)
    """
    scales = {}
    for bert in module.modules():
        if isinstance(bert, BERT):
            for i, part in enumerate([bert.embeddings, *bert.layers]):
                scales |= dict.fromkeys(part.parameters(), layer_decay ** (len(bert.layers) + 1 - i))
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if scales.get(p, 1.0) == scale and (p.ndim >= 2) == matrix],
             "weight_decay": weight_decay if matrix else 0.0, "scale": scale}
            for scale in sorted({1.0, *scales.values()}, reverse=True) for matrix in (True, False)]


def flops_per_token(config, T, mlm=0.0):
    """Floating-point operations (2 a multiply-add) of one token's forward pass in sequences of T tokens.

    A layer: 2 (4 C^2 + 2 C I) for its linear maps and 4 T C for q k' and the weighted sum. mlm: share of the
    tokens at which the MLM head is computed, 2 (C^2 + C V) each. Training is 3 times this: backward takes
    each product twice. Look-ups, norms, softmax and GELU are left out, as is usual for MFU.
    """
    C = config.hidden
    layer = 2 * (4 * C * C + 2 * C * config.intermediate) + 4 * T * C
    return config.layers * layer + mlm * 2 * (C * C + C * config.vocab_size)


def memory_report(model, config, batch, T, logits=0.15):
    """One line on what training takes: parameters, memory at `batch` sequences of T tokens, checkpoint size.

    An estimate in float32: weights, gradients and AdamW's two moments (16 bytes a parameter); what a BERT of
    this shape keeps for backward, 11 C + 2 I numbers a token and layer, and on a CPU 3 H T for attention;
    three times the MLM head's logits, at the share `logits` of the tokens.
    """
    parameters = sum(p.numel() for p in model.parameters())
    on_cpu = next(model.parameters()).device.type == "cpu"
    kept = 11 * config.hidden + 2 * config.intermediate + on_cpu * 3 * config.heads * T
    total = 16 * parameters + 4 * batch * T * (config.layers * kept + logits * 3 * config.vocab_size)
    return (f"{parameters / 1e6:.2f} M parameters; about {total / 1e9:.2g} GB for weights, AdamW and the "
            f"activations of {batch} x {T} tokens; {12 * parameters / 1e6:.0f} MB a checkpoint")


# ---------------------------------------------------------------------------- Hugging Face folders

HF_CONFIG = {"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "hidden",
             "num_attention_heads": "heads", "intermediate_size": "intermediate",
             "max_position_embeddings": "max_positions", "type_vocab_size": "type_vocab",
             "hidden_dropout_prob": "dropout", "layer_norm_eps": "layer_norm_eps", "pad_token_id": "pad_id",
             "initializer_range": "init_std"}
# the only values that our BERT can represent; but model_type, a config.json may leave them out
HF_SETTINGS = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
               "is_decoder": False}

LAYER_NAMES = {  # one map of ours is the concatenation of those on its right
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "expand": ("intermediate.dense",),
    "contract": ("output.dense",),
    "output_norm": ("output.LayerNorm",),
}
HEAD_NAMES = {
    "dense.weight": ("cls.predictions.transform.dense.weight",),
    "dense.bias": ("cls.predictions.transform.dense.bias",),
    "norm.weight": ("cls.predictions.transform.LayerNorm.weight",),
    "norm.bias": ("cls.predictions.transform.LayerNorm.bias",),
    "weight": ("embeddings.word_embeddings.weight",),
    "bias": ("cls.predictions.bias",),
}
# known and not part of the encoder: a buffer of older versions, copies of the tied decoder, next-sentence
# prediction, heads of fine-tuned models, and those of the released VidLanKD checkpoints (visual_hinge_head,
# kd1_student_head, kd2_teacher_head, ...)
DECODER_COPIES = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
                  "cls.predictions.decoder.bias": "cls.predictions.bias"}
IGNORED = re.compile(r"embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|"
                     r"(cls\.seq_relationship|classifier|qa_outputs)\.(weight|bias)|"
                     r"(visual_\w+|kd[12]_(student|teacher))_head\..+")


def hf_names(config):
    """{our tensor: Hugging Face's, several where ours is their concatenation}, without the prefix `bert.`."""
    names = {"embeddings.word.weight": ("embeddings.word_embeddings.weight",),
             "embeddings.position.weight": ("embeddings.position_embeddings.weight",),
             "embeddings.segment.weight": ("embeddings.token_type_embeddings.weight",)}
    for kind in ("weight", "bias"):
        names[f"embeddings.norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
        names[f"pooler.{kind}"] = (f"pooler.dense.{kind}",)
        for i in range(config.layers):
            for ours, theirs in LAYER_NAMES.items():
                names[f"layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{t}.{kind}" for t in theirs)
    return names


def load_config(folder):
    """BERTConfig of a Hugging Face folder; SystemExit where it is no BERT that this file can represent."""
    path = Path(folder) / "config.json"
    settings = read_settings(path)
    for key, wanted in HF_SETTINGS.items():
        value = settings.get(key, None if key == "model_type" else wanted)
        if value != wanted:
            raise SystemExit(f"{path}: {key} is {value!r}, only {wanted!r} can be read; choose another model")
    values = {ours: settings.get(theirs) for theirs, ours in HF_CONFIG.items()}
    return make_config({name: value for name, value in values.items() if value is not None}, path)


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


def make_config(values, path):
    """BERTConfig from the values in a file, each a number of its field's type."""
    for field in dataclasses.fields(BERTConfig):
        value = values.get(field.name, field.default)
        if isinstance(value, bool) or not isinstance(value, (int, field.type)):
            raise SystemExit(f"{path}: {value!r} is no value for {field.name}; fetch or save the model again")
    try:
        return BERTConfig(**values)
    except SystemExit as error:
        raise SystemExit(f"{path}: {error}") from None


def read_tensors(path):
    """{name: tensor} of a .safetensors or .bin file; nothing that stands in a .bin is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError("it holds other things than tensors")
        return dict(tensors)
    except Exception as error:  # whatever a damaged or hostile file makes the two libraries raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemExit(f"{path}: not readable ({reason}); fetch or save the model again") from None


def read_weights(folder, config):
    """(path, {name: tensor}) of a Hugging Face BERT, all names known; without `bert.`, gamma and beta."""
    paths = [Path(folder) / name for name in ("model.safetensors", "pytorch_model.bin")]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        raise SystemExit(f"{folder}: has no model.safetensors and no pytorch_model.bin; fetch one of them")
    known = {name for names in (hf_names(config) | HEAD_NAMES).values() for name in names}
    tensors = {}
    for stored, tensor in read_tensors(path).items():
        name = stored.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in tensors or name not in known and not IGNORED.fullmatch(name):
            wrong = "there twice" if name in tensors else "unknown"
            raise SystemExit(f"{path}: the tensor {stored} is {wrong}; "
                             f"choose a plain BERT, of {config.layers} layers by its config.json")
        tensors[name] = tensor
    return path, tensors


def fill(module, names, tensors, path):
    """`module`, made on the meta device, with the tensors under `names` ({ours: theirs}), as float32."""
    state = {}
    for ours, value in module.state_dict().items():
        shape = torch.Size((value.shape[0] // len(names[ours]), *value.shape[1:]))
        for name in names[ours]:
            if name not in tensors:
                raise SystemExit(f"{path}: the tensor {name} is missing; fetch or save the model again")
            if tensors[name].shape != shape:
                raise SystemExit(f"{path}: the shape of {name} is {tuple(tensors[name].shape)}, by the "
                                 f"settings {tuple(shape)}; fetch or save the model again")
        state[ours] = torch.cat([tensors[name].float() for name in names[ours]])
    module.load_state_dict(state, assign=True)
    return module


def load_mlm_head(folder, bert):
    """The MLMHead of a Hugging Face folder, in eval mode, tied to its `bert`; None where it has none."""
    path, tensors = read_weights(folder, bert.config)
    if not any(name.startswith("cls.predictions.") for name in tensors):
        return None
    for copy, original in DECODER_COPIES.items():
        if copy in tensors and original in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise SystemExit(f"{path}: {copy} differs from {original}, but only a tied decoder can be read; "
                             "choose another model")
    with torch.device("meta"):
        head = MLMHead(bert.config, bert.embeddings.word.weight)
    fill(head, HEAD_NAMES, tensors, path)
    head.weight = bert.embeddings.word.weight
    return head.eval()


def load_task(folder):
    """What the config.json of a fine-tuned folder tells of its task; SystemExit where it is not fine-tuned.

    {"task": name, "kind": of TASK_HEADS, "labels": the words of the classes, "pool", "max_length": tokens},
    and what else `TaskModel.save_pretrained` was given. Hugging Face's folders tell kind and labels; their
    task is "", their max_length 128.
    """
    path = Path(folder) / "config.json"
    content = read_settings(path)
    if "nanoground" in content:
        settings = content["nanoground"]
        types = {"task": str, "kind": str, "labels": list, "pool": str, "max_length": int}
        if (not isinstance(settings, dict)
                or not all(isinstance(settings.get(key), wanted) for key, wanted in types.items())
                or settings["kind"] not in TASK_HEADS or settings["pool"] not in ("cls", "mean")):
            raise SystemExit(f'{path}: "nanoground" does not describe a fine-tuned model; fine-tune it again')
        return settings
    kind = next((k for k, (theirs, _) in TASK_HEADS.items() if content.get("architectures") == [theirs]), "")
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


def write_bert(folder, bert, vocab, head, settings):
    """Writes a BERT, `head` ({Hugging Face's name: tensor}) and `settings` beside the BERT's own."""
    config, prefix = bert.config, "bert." if head else ""
    assert vocab.size == config.vocab_size, f"{vocab.size} tokens in vocab, {config.vocab_size} in model"
    tensors, names = dict(head), hf_names(config)
    for ours, value in bert.state_dict().items():
        parts = value.chunk(len(names[ours]))
        tensors |= {prefix + name: part for name, part in zip(names[ours], parts)}
    if bert.pooler is None and "nanoground" not in settings:  # a task without shall not seem to have one
        noise = torch.randn(config.hidden, config.hidden, generator=torch.Generator().manual_seed(0))
        tensors |= {prefix + "pooler.dense.weight": 0.02 * noise,
                    prefix + "pooler.dense.bias": torch.zeros(config.hidden)}
    settings = {**settings, **HF_SETTINGS,
                **{theirs: getattr(config, ours) for theirs, ours in HF_CONFIG.items()},
                "attention_probs_dropout_prob": config.dropout, "pooler_trained": bert.pooler is not None}
    write_folder(folder, "model.safetensors", tensors, "config.json", settings, vocab)


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
    path = Path(folder) / "video_encoder.safetensors"
    tensors = read_tensors(path)
    names = {name: (name,) for name in encoder.state_dict()}
    for name in tensors:
        if name not in names:
            raise SystemExit(f"{path}: the tensor {name} is unknown; train the teacher again")
    return fill(encoder, names, tensors, path).eval()
