"""bench.py: the plain forms mean what the equations say, unlike things get no ratio, memory is counted to the
byte, examples are as long as real ones, and the command runs through at small sizes. No test asserts a speed.

Run: python -m pytest -q tests/test_bench.py
"""
import copy
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adapt_xdbert
import bench
import losses
from model import BERT, BERTConfig, CLIPConfig, CLIPText, CrossEncoder
from parts.examples import load_examples
from parts.tasks import TASKS, find_file
from parts.vocab import load_vocab

CPU = torch.device("cpu")
SMALL = bench.Config(batch=4, tokens=8, layers=1, hidden=64, vocab=300, anchors=3, negatives=16, dim=8,
                     rows=120, megabytes=1, rounds=1, step_rounds=1)
NUMBERS = {"nst": ("nst.ratio_loop", "nst.ratio_bmm", "nst.peak_mb"),
           "crd": ("crd.ratio_gather", "crd.update_ms.4", "crd.update_ms.120"),
           "mlm_head": ("mlm_head.ratio_all",), "hinge": (), "soft": (), "voken": (),
           "step": ("step.ratio_fp32", "step.ratio_bf16", "step.kd_share"),
           "finetune": ("finetune.ratio_fp32.rte", "finetune.ratio_bf16.cola", "finetune.bf16.sst2"),
           "xdbert": tuple(f"xdbert.{name}.{used}" for used in (7, 4)
                           for name in ("ratio_fp32", "ratio_bf16", "ratio_bf16_equal", "empty"))}
LANGUAGE = BERTConfig(vocab_size=100, layers=2, hidden=48, heads=3, intermediate=64, max_positions=80)
CLIP = CLIPConfig(vocab_size=90, layers=2, hidden=32, heads=2, intermediate=64, positions=6, projection=24)
XDBERT = partial(bench.bench_xdbert, language=LANGUAGE, clip=CLIP, T=80)


def test_every_section_runs_and_writes_its_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SECTIONS, "xdbert", XDBERT)
    path = tmp_path / "bench.json"
    out = bench.main(replace(SMALL, only=",".join(NUMBERS), json=str(path)))
    written = json.loads(path.read_text())
    for name in sum(NUMBERS.values(), ()):
        assert math.isfinite(out[name]) and out[name] > 0 and written[name] == out[name], name
    rows = [row for section in out["table"].values() for row in section.values()]
    assert len(rows) >= 20 and all(0 < row["low"] <= row["ms"] <= row["high"] for row in rows)
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "AMX" in printed and "scaled to the batch" in printed
    loop, *_, ours = out["table"]["nst, gaussian kernel: B 4, T 8, d 64"].values()
    assert out["nst.ratio_loop"] == loop["ms"] / ours["ms"] and out["nst.peak_mb"] == ours["peak_mb"]
    rows = next(section for title, section in out["table"].items() if title.startswith("finetune"))
    plain, ours = rows["all padded to 8, fp32"], rows["ours, sst2, fp32"]
    assert out["finetune.ratio_fp32.sst2"] == ours["ratio"] == plain["ms"] / ours["ms"]
    assert ours["examples_per_s"] == 1e3 * SMALL.batch / ours["ms"] and "ratio" not in plain


def test_text_prints_both_rates(tmp_path, capsys):
    source = tmp_path / "text.txt"
    bench.write_text(source, 200_000)
    assert 150_000 < source.stat().st_size < 250_000
    out = bench.main(replace(SMALL, only="text", text=str(source)))
    assert out["text.mb_per_s"] > 0 and out["text.encode_batch_mb_per_s"] > 0
    assert "encode_batch" in capsys.readouterr().out


def test_nst_forms_equal_the_equation():
    s, t = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    wanted = 0.0
    for S, T in zip(F.normalize(s, dim=1), F.normalize(t, dim=1)):
        def k(x, y):
            return math.exp(-float((x - y).square().sum()) / 2)
        S, T = S.T, T.T
        wanted += sum(k(a, b) for a in S for b in S) / 9 + sum(k(a, b) for a in T for b in T) / 9
        wanted -= 2 * sum(k(a, b) for a in S for b in T) / 9
    assert bench.nst_loop(s, t, bench.gaussian_broadcast).item() == pytest.approx(wanted / 2, rel=1e-12)
    assert bench.nst_batched(s, t, bench.squared_distances).item() == pytest.approx(wanted / 2, rel=1e-12)


def test_crd_gather_equals_a_literal_eq_8():
    bank = bench.full_bank(SMALL.rows, SMALL, CPU)
    z_s, z_t = (F.normalize(x, dim=-1) for x in torch.randn(2, 3, SMALL.dim))
    slots, drawn = torch.tensor([5, 6, 7]), torch.randint(SMALL.rows, (3, 16))
    drawn[1, 2] = 6                                        # its own row: left out
    bank.set_z(z_s, z_t, slots.numpy(), drawn[0].numpy())
    wanted, ratio = 0.0, 16 / SMALL.rows
    for a in range(3):
        for z, other, rows, log_z in ((z_s, z_t, bank.z_t, bank.log_z[0]),
                                      (z_t, z_s, bank.z_s, bank.log_z[1])):
            def h(row):
                e = math.exp(float(z[a] @ row) / 0.07) / math.exp(log_z)
                return e / (e + ratio)
            wanted -= math.log(h(other[a]))
            wanted -= sum(math.log(1 - h(rows[i])) for i in drawn[a].tolist() if i != slots[a])
    assert bench.crd_gather(z_s, z_t, slots, bank, drawn).item() == pytest.approx(wanted / 3, rel=1e-4)


def test_eager_bert_equals_ours_and_trains_its_own_weights():
    ours = BERT(bench.bert_config(SMALL)).eval()
    eager = bench.eager(copy.deepcopy(ours)).eval()
    ids = torch.randint(SMALL.vocab, (2, 8))
    assert torch.allclose(eager(ids), ours(ids), atol=1e-5)
    eager(ids).square().sum().backward()
    assert all(p.grad is not None for layer in eager.layers for p in layer.parameters())
    assert sum(p.numel() for p in eager.parameters()) == sum(p.numel() for p in ours.parameters())


def pair_models():
    """(ReleasedXDBERT, adapt_xdbert.Adapter), on the same weights, without dropout."""
    torch.manual_seed(0)
    ours = adapt_xdbert.Adapter(adapt_xdbert.Config(), BERT(replace(LANGUAGE, dropout=0.0), pooler=True),
                                CLIPText(CLIP), None)
    return bench.ReleasedXDBERT(ours), ours


def loss_of(ours, batch):
    return sum(ours(batch, {name: len(batch[f"{name}_targets"]) for name in ours.names}).values())


@pytest.mark.parametrize("used", [4, 7, 9])
def test_released_xdbert_has_our_loss_and_our_gradient(used):
    """Also the gradient of the maps that we join and it has apart."""
    released, ours = pair_models()
    theirs, batch = bench.made_pairs(LANGUAGE, CLIP, 12, 9, used, CPU)
    wanted = loss_of(ours, batch)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}
    ours.zero_grad()
    loss = released(theirs)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for name, wanted in gradients.items():
        if name not in found:  # a joined map: its parts are in the released model's twin of its module
            *path, kind = name.removeprefix("encoder.").split(".")
            twin = released.get_submodule(".".join(path[:-1]))
            maps = twin.maps[1:] if path[-1] == "key_value" else twin.maps
            found[name] = torch.cat([getattr(part, kind).grad for part in maps])
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6, msg=lambda m: f"{name}: {m}")
    assert len(gradients) > 100


def test_released_xdbert_shares_our_memory_and_leaves_our_layers():
    released, ours = pair_models()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    step = bench.training_step(released, lambda: released(bench.made_pairs(LANGUAGE, CLIP, 12, 9, 4, CPU)[0]))
    step()
    still = [name for name, value in ours.state_dict().items() if torch.equal(value, before[name])]
    assert sorted(still) == ["encoder.clip.logit_scale", "encoder.language.pooler.bias",
                             "encoder.language.pooler.weight"]  # what no term reads
    assert not [m for m in ours.modules() if isinstance(m, bench.EagerLayer)]


def test_made_pairs_are_two_forms_of_the_same_texts():
    theirs, ours = bench.made_pairs(LANGUAGE, CLIP, 12, 9, 7, CPU)
    assert theirs["clip_ids"].shape == (18, 6) and ours["clip_ids"].shape == (14, 6)
    assert theirs["clip_mask"].sum(1).tolist() == [42, 42] == ours["clip_mask"].sum(1).tolist()
    assert torch.equal(theirs["clip_ids"].view(2, 54)[theirs["clip_mask"]], ours["clip_ids"].flatten())
    for labels, name in (("labels", "mlm"), ("clip_labels", "cliptc")):
        place = (theirs[labels] != -100).flatten().nonzero()[:, 0]
        assert torch.equal(theirs[labels].flatten()[place], ours[f"{name}_targets"])
        index = ours[f"{name}_index"]
        assert len(index) and torch.equal(place, index if name == "mlm" else index // 42 * 54 + index % 42)
        ids = ours["inputs" if name == "mlm" else "clip_ids"].flatten()
        assert torch.equal(ids[index], ours[f"{name}_targets"])
    assert not {0, 5} & set((ours["cliptc_index"] % 6).tolist())  # start and end
    assert theirs["matched"].tolist() == [0, 1]


def test_padding_that_the_released_structure_sees_gets_no_ratio(monkeypatch):
    forward = CrossEncoder.forward
    monkeypatch.setattr(CrossEncoder, "forward", lambda self, h, c, mask, clip_mask, *wanted:
                        forward(self, h, c, mask, None, *wanted))
    with pytest.raises(SystemExit, match="7 of 9: plain form and ours differ"):
        XDBERT(SMALL, CPU, {"table": {}})


def test_released_nst_has_the_polynomial_gradient():
    s, t = torch.randn(3, 6, 4, requires_grad=True), torch.randn(3, 6, 4)
    released = bench.nst_loop(s, t, bench.poly_broadcast, teacher_term=False)
    ours = losses.nst(s, t, torch.ones(3, 6, dtype=torch.bool), "poly")
    assert torch.allclose(*(torch.autograd.grad(x, s)[0] for x in (released, ours)), atol=1e-6)


def test_unlike_things_get_no_ratio(monkeypatch):
    nst = losses.nst
    monkeypatch.setattr(losses, "nst", lambda *args, **kwargs: 1.01 * nst(*args, **kwargs))
    with pytest.raises(SystemExit, match="loop: plain form and ours differ"):
        bench.main(replace(SMALL, only="nst"))


def test_padding_that_changes_the_loss_gets_no_ratio(monkeypatch):
    forward = BERT.forward
    monkeypatch.setattr(BERT, "forward", lambda self, ids, mask, segments: forward(self, ids, None, segments))
    with pytest.raises(SystemExit, match="sst2: plain form and ours differ"):
        bench.main(replace(SMALL, only="finetune", tokens=32))


def test_made_examples_are_as_long_as_told():
    lengths = np.array([5, 7, 12, 40])
    for name in ("rte", "sst2"):
        examples = bench.made_examples(TASKS[name], lengths, replace(SMALL, tokens=20))
        assert examples.lengths.tolist() == [5, 7, 12, 20] and examples.unknown < 0.1
        assert examples.batch([2])["segments"].sum() == (3 if name == "rte" else 0)  # 9 words: 7 + 2, [SEP]


def test_lengths_are_those_of_the_real_training_sets(real_data):
    vocab = load_vocab(real_data / "vocab" / "bert-base-uncased-vocab.txt")
    for name in ("rte", "cola"):  # SST-2 was measured alike; its 67,349 would take seconds
        path = find_file(TASKS[name], real_data, "train.tsv")
        lengths = load_examples(TASKS[name], path, vocab, 128, "", "train").lengths
        assert np.quantile(lengths, np.linspace(0, 1, 21)).round().tolist() == list(bench.LENGTHS[name][1])


def test_slow_runs_have_two_rounds_and_a_number_of_repeats_is_kept(monkeypatch):
    calls, taken = [], {"slow": 0.6, "often": 0.6, "short": 0.02, "endless": 10}
    monkeypatch.setattr(bench, "seconds", lambda run, device, repeats=1: calls.append((run(), repeats))
                        or taken[run()])
    variants = {"slow": (lambda: "slow", 1), "often": (lambda: "often", 1, 5), "short": (lambda: "short", 1),
                "endless": (lambda: "endless", 1)}
    wanted = (("slow", 1), ("often", 5), ("short", 2), ("endless", 1))
    bench.measure("x", variants, CPU, 3)
    assert [calls.count(call) for call in wanted] == [4, 2, 3, 2]  # the warm-up's runs among them
    calls.clear()
    bench.measure("x", variants, CPU, 3, warm=["slow", "short", "endless"])
    assert [calls.count(call) for call in wanted] == [2, 2, 2, 1]


def test_peak_memory_is_exact():
    def run():
        a, b = torch.ones(1_000_000), torch.ones(1_000_000)
        del a
        c = torch.ones(1_000_000)
        del b, c
    assert bench.peak_mb(run, CPU) == 8.0


def test_a_scaled_loop_is_reported_for_the_batch(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda run, device, repeats=1: 0.25)
    row = bench.measure("x", {"loop": (lambda: None, 16)}, CPU, 3)["loop"]
    assert row["ms"] == row["low"] == row["high"] == 4000.0


@pytest.mark.parametrize("wrong, message", [(dict(only="nst,foo"), "--only"), (dict(rounds=0), "--rounds"),
                                            (dict(batch=1), "--batch"), (dict(rows=2), "--rows"),
                                            (dict(only="finetune", tokens=4), "--tokens 4")])
def test_bad_flags_are_named(wrong, message):
    with pytest.raises(SystemExit, match=message):
        bench.main(replace(SMALL, **wrong))
