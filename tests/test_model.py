"""model.py: BERT, ELECTRA and the cross-modal encoder equal float64 loops that stand here, CLIP's text tower
stored outputs of transformers. Padding changes nothing, initial weights and parameter counts are as published,
heads and groups do what fine-tuning and DDP need, costs equal torch's counts.

    pytest -q tests/test_model.py
"""
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import model
from adapt_xdbert import LANGUAGE
from losses import no_tf32
from model import (BERT, SHAPES, XDBERT, BERTConfig, CLIPConfig, CLIPText, CrossEncoder,
                   DistillHead, MLMHead, TaskModel, VideoEncoder, dropout, model_config, param_groups, recompute)
from parts.vocab import Vocab
from parts.weights import hollow, load_bert, load_mlm_head, model_type

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


ELECTRAS = {"equal": ELECTRA, "narrow": NARROW, "deep": replace(NARROW, layers=3, heads=1, embedding=40)}


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


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("config", [TINY, *ELECTRAS.values()], ids=["bert", *ELECTRAS])
def test_encoder_and_mlm_head_equal_naive_float64(tmp_path, config, prefix):
    tensors, kind = hf_tensors(config), config.model_type
    bert = load_bert(hf_folder(tmp_path, tensors, prefix=f"{kind}." * prefix, config=config), kind == "bert")
    assert bert.config == config and model_type(tmp_path) == kind
    head, h = load_mlm_head(tmp_path, bert).double(), torch.randn(7, config.hidden, dtype=torch.float64)
    torch.testing.assert_close(head(h), naive_logits(tensors, h), rtol=0, atol=1e-11)
    states = bert.double()(IDS, MASK, SEGMENTS, all_states=True)
    assert len(states) == config.layers + 1 and (bert.pooler is None) == (kind == "electra")
    for b in range(len(IDS)):
        n = int(MASK[b].sum())
        expected = naive_bert(tensors, config, IDS[b, :n], SEGMENTS[b, :n])
        for ours, theirs in zip(states, expected):
            torch.testing.assert_close(ours[b, :n], theirs, rtol=0, atol=1e-11)
        if kind == "bert":
            weight, bias = (tensors[f"pooler.dense.{part}"].double() for part in ("weight", "bias"))
            torch.testing.assert_close(bert.pool(states[-1])[b], torch.tanh(weight @ expected[-1][0] + bias),
                                       rtol=0, atol=1e-11)


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


SMALL = dict(hidden=4, heads=2, intermediate=6, dropout=0.0)


@pytest.mark.parametrize("layer", [model.Layer(BERTConfig(**SMALL)), model.CLIPLayer(CLIPConfig(**SMALL)),
                                   model.CrossLayer(BERTConfig(**SMALL), 6)], ids=["bert", "clip", "cross"])
def test_layer_gradients_with_mask(layer):
    x, other = (torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True) for width in (4, 6))
    mask = torch.tensor([[True, True, False], [True, True, True]])[:, None, None, :]
    inputs = (x, other) if isinstance(layer, model.CrossLayer) else (x,)
    masks = (True,) if isinstance(layer, model.CLIPLayer) else (mask, mask.flip(0))[:len(inputs)]
    assert torch.autograd.gradcheck(lambda *args: layer(*args[:len(inputs)], *masks),
                                    (*inputs, *layer.double().parameters()))


def test_causal_attention_on_a_gpu_builds_no_mask():
    """The device meta takes a GPU's way; what it computes is proven in test_gpu."""
    class Seen(torch.overrides.TorchFunctionMode):
        calls = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                self.calls.append(args[3:])
            return function(*args, **(kwargs or {}))
    with Seen():
        CLIPText(CLIP).to("meta")(torch.empty(2, 5, dtype=torch.long, device="meta"))
        BERT(TINY).eval().to("meta")(IDS.to("meta"))
    assert Seen.calls == [(None, 0.0, True)] * CLIP.layers + [(None, 0.0, False)] * TINY.layers


def encoders():
    """{name: (an encoder of several layers, its inputs)}, with dropout."""
    text = replace(TINY, layers=4, dropout=0.3)
    clip = dict(clip_ids=IDS, clip_place=torch.arange(24).view(3, 8), clip_mask=MASK)
    return {"bert": (BERT(text), dict(ids=IDS, mask=MASK)), "clip": (CLIPText(replace(CLIP, layers=4)), dict(ids=IDS)),
            "cross": (XDBERT(BERT(text), CLIPText(CLIP)), dict(ids=IDS, mask=MASK, **clip)),
            "video": (VideoEncoder(text, 6, 8), dict(frames=torch.randn(3, 8, 6), mask=MASK))}


@pytest.mark.parametrize("name", encoders())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_equal_gradients_with_less_memory(name, dtype):
    found, kept = [], []
    for again in (False, True):
        torch.manual_seed(0)
        encoder, inputs = encoders()[name]
        if again:
            recompute(encoder)

        def keep(x):
            kept[-1][x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        kept.append({p.untyped_storage().data_ptr(): 0 for p in encoder.parameters()})
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                h = encoder(**inputs)
        h.square().float().mean().backward()
        found.append([h.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None), torch.get_rng_state()])
    assert len(found[0]) > 10 and all(map(torch.equal, *found))
    assert encoder.state_dict().keys() == encoders()[name][0].state_dict().keys()
    small = 0.5 if dtype == torch.float32 else 0.8  # autocast's copies of the weights count, too
    assert sum(kept[1].values()) < small * sum(kept[0].values())


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
    base, large = hollow(BERT, LANGUAGE["bert-base"], True), hollow(BERT, LANGUAGE["electra-large"])
    clip = hollow(CLIPText, CLIPConfig())
    assert (count(base), count(large), count(clip)) == (109_482_240, 334_092_288, 63_428_097)
    assert count(hollow(BERT, LANGUAGE["electra-base"])) == 108_891_648
    # XDBERT Table 6, to the unit
    assert [count(hollow(XDBERT, text, clip)) for text in (base, large)] == [202_059_009, 442_671_617]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@no_tf32()
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


@pytest.mark.parametrize("module, name", [
    (BERT(TINY), "BERT has 16"), (CLIPText(CLIP), "CLIP's text tower has 10"),
    (VideoEncoder(TINY, 5, max_frames=9), "VideoEncoder has 9")], ids=["bert", "clip", "video"])
def test_too_many_positions_is_one_clear_line(module, name):
    with pytest.raises(ValueError, match=f"{name} positions, not enough for a sequence of 17"):
        module(torch.zeros(1, 17, 5) if "Video" in name else torch.zeros(1, 17, dtype=torch.int64))


def test_shape_is_one_string():
    assert model_config("demo", 99) == BERTConfig(vocab_size=99, **SHAPES["demo"])
    for shape, layers, hidden, heads in (("6L-512H", 6, 512, 8), ("12L-768H", 12, 768, 12),
                                         ("3L-64H", 3, 64, 1), ("1L-32H-2A", 1, 32, 2)):
        assert model_config(shape, 99, 0.0) == BERTConfig(99, layers, hidden, heads, 4 * hidden, dropout=0.0)
    form = "write demo, or layers and width as in 6L-512H .*or heads too as in 1L-32H-2A"
    for wrong in ("huge", "6L", "1L-32H", "6L-512H-", "-6L-512H", "6L-512H-8", "6l-512h", ""):
        with pytest.raises(ValueError, match=f"^model {wrong}: {form}"):
            model_config(wrong, 99)


@pytest.mark.parametrize("make, said", [
    (lambda: model_config("1L-64H-3A", 99), "hidden 64 cannot be split into 3 heads"),
    (lambda: model_config("1L-64H-0A", 99), "heads 0: must be at least 1"),
    (lambda: model_config("0L-64H", 99), "layers 0: must be at least 1"),
    (lambda: model_config("1L-0H", 99), "hidden 0: must be at least 1"),
    (lambda: model_config("demo", 99, 1.0), "dropout 1: must be at least 0 and below 1"),
    (lambda: BERTConfig(embedding=-1), "embedding -1: must be at least 0"),
    (lambda: BERTConfig(init_std=-0.02), "init_std -0.02: must be at least 0"),
    # what a damaged file may say: nobody has so many
    (lambda: CLIPConfig(layers=10 ** 7), "layers 10000000: must be .* below 1000"),
    (lambda: BERTConfig(vocab_size=10 ** 30), "vocab_size 10+: must be .* below 2147483648")])
def test_impossible_shape_is_one_clear_line(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ---------------------------------------------------------------------------- ELECTRA


def test_electra_pooler_is_that_of_its_classifier():
    torch.manual_seed(0)
    bert = BERT(replace(NARROW, dropout=0.5), pooler=True)
    h = torch.randn(50, 3, 24)
    pooled, eval_pooled = bert.pool(h), bert.eval().pool(h)
    torch.testing.assert_close(eval_pooled, F.gelu(h[:, 0] @ bert.pooler.weight.T + bert.pooler.bias))
    assert not torch.equal(pooled, eval_pooled)  # dropout of its input


# ---------------------------------------------------------------------------- CLIP's text tower


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
@no_tf32()
def test_xdbert_on_cuda_equals_cpu():
    cross, batch = xdbert(), clip_batch()[0]
    h, c = cross.streams(IDS, MASK, SEGMENTS, **batch)
    cuda = [x.cuda() for x in (IDS, MASK, SEGMENTS)]
    h_cuda, c_cuda = cross.cuda().streams(*cuda, **{name: x.cuda() for name, x in batch.items()})
    torch.testing.assert_close(h_cuda.cpu()[MASK], h[MASK], rtol=0, atol=1e-3)
    torch.testing.assert_close(c_cuda.cpu()[batch["clip_mask"]], c[batch["clip_mask"]], rtol=0, atol=1e-3)


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


# ---------------------------------------------------------------------------- fine-tuning

TASKS = [("classify", "cls"), ("classify", "mean"), ("regress", "cls"), ("regress", "mean"),
         ("choice", "cls"), ("choice", "mean"), ("span", "cls")]
WORDS = ["no", "maybe", "yes"]


def task_model(kind, pool="cls", config=TINY):
    """A TaskModel of BERT or ELECTRA with the weights of `set_weights`."""
    return set_weights(TaskModel(BERT(config, pooler=True), kind, len(WORDS), pool))


def task_batch(kind):
    """(ids, mask, segments) of the kind's shape; for choice two rows of the same candidates, one on."""
    batch = (IDS, MASK, SEGMENTS)
    return tuple(torch.stack([x, x.roll(1, 0)]) for x in batch) if kind == "choice" else batch


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


@pytest.mark.parametrize("encoder", ["bare", "bert", *ENCODERS])
def test_layer_decay_scales_by_depth(encoder):
    bert = BERT(TINY, pooler=True)
    module = (bert if encoder == "bare" else TaskModel(bert, "classify", 2) if encoder == "bert" else
              other_task(encoder, "classify")[0]).requires_grad_(True)
    names = {id(p): name for name, p in module.named_parameters()}
    groups = param_groups(module, 0.01, layer_decay=0.5)
    found = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    towers = ("encoder.language.", "encoder.clip.") if "xdbert" in encoder else ("encoder.", "")
    for name, scale in found.items():
        part = next((name.removeprefix(tower) for tower in towers if name.startswith(tower)), "")
        depths = {"embeddings": 0.125, "layers.0": 0.25, "layers.1": 0.5}  # of two layers; the rest: 1
        assert scale == next((s for start, s in depths.items() if part.startswith(f"{start}.")), 1.0), name
    for group in groups:
        assert group["weight_decay"] in (0.0, 0.01)
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    module.requires_grad_(False)
    assert not any(group["params"] for group in param_groups(module, 0.01, layer_decay=0.5))
