"""bench.py: the plain forms mean what the equations say, unlike things get no ratio, memory is counted to the
byte, rows in bf16 follow the CPU, examples are as long as real ones, growth is fitted, what ranks send is
counted, docs/scale.md is what its script prints, and the command runs through at small sizes. No test asserts
a speed.

Run: python -m pytest -q tests/test_bench.py
"""
import copy
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import stop_line

import adapt_xdbert
import bench
import distill
import losses
import teacher
from benches import feed, jobs, plain, scale
from common import parse_cli
from data import VideoClips
from model import BERT, BERTConfig, CLIPConfig, CLIPText, CrossEncoder, model_config
from parts.examples import load_examples
from parts.tasks import TASKS, find_file
from parts.vocab import load_vocab

CPU = torch.device("cpu")
STEPS = "step,finetune,xdbert"
SMALL = bench.Config(batch=4, tokens=8, model="1L-64H", vocab=300, anchors=3, negatives=16, dim=8, rows=120,
                     rounds=1)
BOTH = {"nst": ("nst.ratio_loop", "nst.ratio_bmm", "nst.peak_mb"),  # of every machine
        "crd": ("crd.ratio_gather", "crd.update_ms.4", "crd.update_ms.120"),
        "mlm_head": ("mlm_head.ratio_all",), "hinge": (),
        "step": ("step.ratio_fp32", "step.kd_share_fp32", "step.kd_share"),
        "finetune": tuple(f"finetune.ratio_fp32.{name}" for name in bench.LENGTHS),
        "xdbert": tuple(f"xdbert.{name}.{used}" for used in (7, 4) for name in ("empty", "ratio_fp32")),
        "text": ("text.mb_per_s", "text.encode_batch_mb_per_s")}
BF16 = ("step.ratio_bf16", "step.kd_share_bf16",
        *(f"finetune.{number}.{name}" for number in ("ratio_bf16", "bf16") for name in bench.LENGTHS),
        *(f"xdbert.{number}.{used}" for number in ("ratio_bf16", "ratio_bf16_equal") for used in (7, 4)))
LANGUAGE = BERTConfig(vocab_size=100, layers=2, hidden=48, heads=3, intermediate=64, max_positions=80)
CLIP = CLIPConfig(vocab_size=90, layers=2, hidden=32, heads=2, intermediate=64, positions=18, projection=24)
SHORT = replace(CLIP, positions=6)
XDBERT = partial(bench.bench_xdbert, language=LANGUAGE, clip=CLIP, T=80)


def run(monkeypatch, instructions, **changes):
    """bench.main at small sizes on a CPU of these instruction sets."""
    monkeypatch.setattr(bench, "cpu", lambda: ("a CPU", instructions))
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: 1e11)
    monkeypatch.setitem(bench.SECTIONS, "xdbert", (XDBERT, 55))
    monkeypatch.setitem(bench.SECTIONS, "text", (partial(bench.bench_text, size=50_000), 5))
    return bench.main(replace(SMALL, **changes))


def test_every_section_runs_and_writes_its_numbers(tmp_path, capsys, monkeypatch):
    kept, inside = {}, []
    monkeypatch.setattr(bench, "keep_freed_memory", lambda keep=True: inside.append(keep))
    show = bench.show
    monkeypatch.setattr(bench, "show", lambda title, *args: (kept.update({title.split()[0]: inside[-1]}),
                                                             show(title, *args)))
    path = tmp_path / "bench.json"
    out = run(monkeypatch, {"avx512_bf16"}, only=",".join(BOTH), json=str(path))
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    numbers = {*sum(BOTH.values(), ()), *BF16}
    assert numbers == set(out) - {"machine", "table"}
    assert all(math.isfinite(out[name]) and out[name] > 0 and written[name] == out[name] for name in numbers)
    rows = [row for section in out["table"].values() for row in section.values()]
    assert len(rows) >= 20 and all(0 < row["low"] <= row["ms"] <= row["high"] for row in rows)
    assert torch.__version__ in printed and "a CPU" in printed and "no AMX" in printed
    assert "scaled to the batch" in printed and "no rows in bf16" not in printed
    assert "nst: 0 % done, about 3m" in printed and "text: 9" in printed
    # freed memory goes back to the system but in the steps as the scripts run them
    assert kept == {"nst,": False, "crd:": False, "mlm_head:": False, "hinge,": False, "step:": True,
                    "finetune:": True, "xdbert:": True}

    def section(title):
        return next(rows for name, rows in out["table"].items() if name.startswith(title))
    loop, *_, ours = section("nst, gaussian").values()
    assert out["nst.ratio_loop"] == loop["ms"] / ours["ms"] and out["nst.peak_mb"] == ours["peak_mb"]
    plain, ours = (section("finetune")[name] for name in ("all padded to 8, fp32", "ours, sst2, fp32"))
    assert out["finetune.ratio_fp32.sst2"] == ours["ratio"] == plain["ms"] / ours["ms"]
    assert ours["examples_per_s"] == 1e3 * SMALL.batch / ours["ms"] and "ratio" not in plain
    plain, ours = (section("step")[name] for name in ("released structure, fp32", "ours, bf16"))
    assert out["step.ratio_bf16"] == plain["ms"] / ours["ms"]


def test_rows_in_bf16_are_left_out_where_the_cpu_has_no_instructions(capsys, monkeypatch):
    out = run(monkeypatch, {"avx2"}, only=STEPS, kept=True)
    assert capsys.readouterr().out.count("no rows in bf16: this CPU has no instructions for it") == 1
    assert {*sum((BOTH[name] for name in STEPS.split(",")), ())} == set(out) - {"machine", "table"}
    assert "bf16" not in json.dumps(out["table"])
    step = next(rows for name, rows in out["table"].items() if name.startswith("step"))
    assert step["the released, freed memory kept"]["ratio"] > 0  # --kept


def test_bf16_is_asked_of_the_cpu(monkeypatch, tmp_path):
    for names, wanted in (({"avx512f", "avx2"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True),
                          ({"asimd", "bf16"}, True)):
        monkeypatch.setattr(bench, "cpu", lambda: ("", names))
        assert ("bf16" in bench.kinds_of(CPU)) == wanted
        assert "bf16" in bench.kinds_of(torch.device("cuda"))
    monkeypatch.undo()
    for word in ("flags", "Features"):
        path = tmp_path / word
        path.write_text(f"processor\t: 0\nmodel name\t: A CPU\n{word}\t\t: fpu some_bf16\n\n")
        monkeypatch.setattr(bench, "Path", lambda name: path)
        name, instructions = bench.cpu()
        assert name == "A CPU" and {"fpu", "some_bf16"} <= instructions
    known = {"arm_bf16": True, "sve": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert "arm_bf16" in bench.cpu()[1] and "sve" not in bench.cpu()[1]


def test_text_is_of_the_size_asked_and_has_words_as_frequent_as_in_english(tmp_path):
    bench.write_text(tmp_path / "text.txt", 1_000_000)
    words = (tmp_path / "text.txt").read_text().lower().replace(",", "").replace(".", "").split()
    counts = np.sort(np.unique(words, return_counts=True)[1])[::-1]
    assert 800_000 < (tmp_path / "text.txt").stat().st_size < 1_100_000
    assert 0.88 < counts[:10_000].sum() / counts.sum() < 0.96


def test_nst_forms_equal_the_equation():
    s, t = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    wanted = 0.0
    for S, T in zip(F.normalize(s, dim=1), F.normalize(t, dim=1)):
        def k(x, y):
            return math.exp(-float((x - y).square().sum()) / 2)
        S, T = S.T, T.T
        wanted += sum(k(a, b) for a in S for b in S) / 9 + sum(k(a, b) for a in T for b in T) / 9
        wanted -= 2 * sum(k(a, b) for a in S for b in T) / 9
    assert bench.nst_loop(s, t, bench.KERNELS["gaussian"]).item() == pytest.approx(wanted / 2, rel=1e-12)
    for distances in bench.DISTANCES.values():
        assert bench.nst_batched(s, t, distances).item() == pytest.approx(wanted / 2, rel=1e-12)


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
    ours = BERT(model_config(SMALL.model, SMALL.vocab)).eval()
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
                                CLIPText(SHORT), None)
    return bench.ReleasedXDBERT(ours), ours


@pytest.mark.parametrize("used", [4, 7, 9])
def test_released_xdbert_has_our_loss_and_our_gradient(used):
    """Also the gradient of the maps that we join and it has apart."""
    released, ours = pair_models()
    theirs, batch = bench.made_pairs(LANGUAGE, SHORT, 12, 9, used, CPU)
    wanted = sum(ours(batch, {name: adapt_xdbert.ITEMS[name](batch) for name in ours.weights}).values())
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}
    ours.zero_grad()
    loss = released(theirs)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for name, wanted in gradients.items():
        if name not in found:  # a joined map: its parts are in the released model's twin of its module
            *path, kind = name.removeprefix("encoder.").replace("layer.attention", "attention").split(".")
            twin = released.get_submodule(".".join(path[:-1]))
            maps = twin.maps[1:] if path[-1] == "key_value" else twin.maps
            found[name] = torch.cat([getattr(part, kind).grad for part in maps])
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6, msg=lambda m: f"{name}: {m}")
    assert len(gradients) > 100


def test_released_xdbert_shares_our_memory_and_leaves_our_layers():
    released, ours = pair_models()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    bench.training_step(released, lambda: released(bench.made_pairs(LANGUAGE, SHORT, 12, 9, 4, CPU)[0]))()
    still = [name for name, value in ours.state_dict().items() if torch.equal(value, before[name])]
    assert sorted(still) == ["encoder.clip.logit_scale", "encoder.language.pooler.bias",
                             "encoder.language.pooler.weight"]  # what no term reads
    assert not [m for m in ours.modules() if isinstance(m, plain.EagerLayer)]


def test_made_pairs_are_two_forms_of_the_same_texts():
    theirs, ours = bench.made_pairs(LANGUAGE, SHORT, 12, 9, 7, CPU)
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


def test_released_nst_has_the_polynomial_gradient():
    s, t = torch.randn(3, 6, 4, requires_grad=True), torch.randn(3, 6, 4)
    released = bench.nst_loop(s, t, bench.KERNELS["poly"], teacher_term=False)
    ours = losses.nst(s, t, torch.ones(3, 6, dtype=torch.bool), "poly")
    assert torch.allclose(*(torch.autograd.grad(x, s)[0] for x in (released, ours)), atol=1e-6)


@pytest.mark.parametrize("only, wrong, message", [
    ("nst", "nst", r"loop over samples \(\*\)"), ("crd", "crd", "gather for each anchor"),
    ("mlm_head", "mlm", "logits at all positions"), ("hinge", "hinge_all", r"loop over samples \(\*\)")])
def test_a_loss_unlike_its_plain_form_gets_no_ratio(only, wrong, message, monkeypatch):
    loss = getattr(losses, wrong)
    monkeypatch.setattr(losses, wrong, lambda *args, **kwargs: 1.01 * loss(*args, **kwargs))
    with pytest.raises(SystemExit, match=f"{message}.*: plain form and ours differ"):
        run(monkeypatch, set(), only=only)


def test_a_step_unlike_its_plain_form_gets_no_ratio(monkeypatch):
    """Other states; and padding that only one of the two forms sees."""
    eager, bert, cross = plain.EagerLayer.forward, BERT.forward, CrossEncoder.forward
    for only, model, forward, what in (
            ("step", plain.EagerLayer, lambda self, *args: 1.01 * eager(self, *args), "states"),
            ("finetune", BERT, lambda self, ids, mask, segments: bert(self, ids, None, segments), "sst2"),
            ("xdbert", CrossEncoder, lambda self, h, c, mask, clip_mask, *wanted:
             cross(self, h, c, mask, None, *wanted), "7 of 9")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"{what}: plain form and ours"):
            patch.setattr(model, "forward", forward)
            run(patch, set(), only=only, tokens=32)


def test_made_examples_are_as_long_as_told():
    lengths = np.array([5, 7, 12, 40])
    examples = bench.made_examples(lengths, replace(SMALL, tokens=20))
    assert examples.lengths.tolist() == [5, 7, 12, 20] and examples.unknown == 0


def test_lengths_are_those_of_the_real_training_sets(real_data):
    vocab = load_vocab(real_data / "vocab" / "bert-base-uncased-vocab.txt")
    for name in ("rte", "cola"):  # SST-2 was measured alike; its 67,349 would take seconds
        path = find_file(TASKS[name], real_data, "train.tsv")
        lengths = load_examples(TASKS[name], path, vocab, 128, "", "train").lengths
        assert np.quantile(lengths, np.linspace(0, 1, 21)).round().tolist() == list(bench.LENGTHS[name])


def test_warm_up_is_thrown_away_and_slow_runs_have_fewer_rounds(monkeypatch):
    """And a scaled loop is reported for the batch."""
    clock, calls = {"short": [0.4, 0.02, 0.01, 0.03, 0.02], "half": [0.6, 0.7, 0.8], "slow": [2.0]}, []

    def seconds(run, device, repeats=1):
        calls.append((run(), repeats))
        return clock[run()].pop(0)
    monkeypatch.setattr(bench, "seconds", seconds)
    rows = bench.measure({name: lambda name=name: name for name in clock}, CPU, 3, {"slow": 16})
    assert calls == [("short", 1), ("short", 1), ("half", 1), ("slow", 1), ("short", 2), ("half", 1),
                     ("short", 2), ("half", 1), ("short", 2)]
    assert [[row[key] for key in ("low", "ms", "high")] for row in rows.values()] == [
        [10, 20, 30], [700, 750, 800], [32_000] * 3]


def test_peak_memory_is_exact():
    def run():
        a, b = torch.ones(1_000_000), torch.ones(1_000_000)
        del a
        c = torch.ones(1_000_000)
        del b, c
    assert bench.first_run(run, CPU)[1] == 8.0


# ---------------------------------------------------------------------------- feed, growth, jobs


def test_feed_reads_the_batches_of_both_scripts(capsys):
    """Few tokens and channels; shares and rates are numbers."""
    out = {}
    feed.bench_feed(SMALL, CPU, out, 40_000, 3, 8, 0.02)
    assert set(out) == {"feed.text_mtokens_per_s", "feed.text_mtokens_per_s_needed", "feed.frames_mb_per_s",
                        "feed.frames_mb_per_s_needed", "feed.wait_share", "feed.wait_share_held",
                        "feed.frames_wait_share"}
    assert all(math.isfinite(value) and value >= 0 for value in out.values())
    assert out["feed.frames_mb_per_s_needed"] == pytest.approx(3 * 130 * 8 * 2 / 1e6 / feed.TEACHER_STEP)
    assert "256 x 128 tokens" in capsys.readouterr().out


def test_a_loop_that_is_faster_than_its_batches_waits_and_a_slower_one_does_not():
    def make(step):
        time.sleep(0.02)
        return np.arange(2), [{"ids": torch.zeros(1)}]
    assert feed.paced(make, feed.ONE, {}, 0.0, 5, warm=2) > 0.8
    assert feed.paced(make, feed.ONE, {}, 0.06, 5, warm=2) < 0.3


def test_sparse_files_are_read_like_packed_ones_and_take_no_disk(tmp_path):
    vocab, path = feed.made_vocab(300), tmp_path / "videos.h5"
    feed.write_clips(path, 50, 400, vocab, 2048)
    assert path.stat().st_size > 80e6 > 1000 * path.stat().st_blocks
    clips = VideoClips(str(path), 64)
    batch = clips.batch(np.arange(3))
    assert batch["frames"].shape == (3, 400, 2048) and not batch["frames"].any()
    assert batch["frame_mask"].all() and batch["mask"].sum(1).tolist() == [64, 64, 42]  # 120, 80, 40 words


def test_growth_is_that_of_own_memory():
    with scale.Growth() as memory:
        kept = np.ones(5_000_000)
        gone = np.ones(5_000_000)
        del gone
        time.sleep(0.05)
    assert len(kept) and 39 < memory.mb < 110


def test_growth_leaves_pages_of_memory_maps_out(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell a process's own memory")
    (tmp_path / "file").write_bytes(bytes(60_000_000))
    with scale.Growth() as memory:
        assert np.memmap(tmp_path / "file", np.uint8, "r").max() == 0
    assert memory.mb < 20


def test_exponents_are_those_of_the_large_sizes():
    rows = {n: {"seconds": max(0.001, 1e-6 * n ** 1.5), "mb": 10 + n ** 0.5} for n in (1, 10, 10 ** 4, 10 ** 6, 10 ** 8)}
    time, memory = scale.exponents(rows)
    assert time == pytest.approx(1.5) and memory == pytest.approx(0.49, abs=0.02)
    flat = {n: {"seconds": 2.0 * n, "mb": mb} for n, mb in ((1, 0.0), (10, 5.0), (100, 7.9))}  # below the noise
    assert scale.exponents(flat) == pytest.approx((1.0, 0.0))


def test_growth_is_measured_of_everything_at_small_sizes(capsys, monkeypatch):
    """In this process, in place of one for each size, and without the runs of two ranks."""
    few = {"tokens": partial(scale.tokens, steps=1), "bank": partial(scale.bank, batch=8, anchors=16, dim=8, steps=1),
           "clips": scale.clips, "frames": scale.frames, "packing": scale.packing,
           "encoder": partial(scale.encoder, shape="1L-64H"), "videos": scale.videos}
    monkeypatch.setattr(scale, "cpu_times", lambda run, seconds, least, warm=0: feed.times(run, 0, 1, 0))
    for what in ("frames", "packing"):
        monkeypatch.setitem(scale.MAKE, what, partial(scale.MAKE[what], channels=8))

    def run(what, n, folder, processes=1):
        return few[what](folder, n) if what in few else {"ranks": {"gradients": float(processes - 1)}}
    sizes = {"tokens": (60_000, 90_000), "bank": (100, 200), "clips": (30, 40), "frames": (1, 3),
             "packing": (1, 3), "encoder": (1, 3), "videos": (5, 9)}
    out = {}
    scale.bench_scale(SMALL, CPU, out, sizes, run)
    parts = {"start", "tokens", "bank", "clips", "frames", "packing", "encoder", "videos"}
    assert set(out) == {f"scale.{part}.{key}" for part in parts for key in ("time_exponent", "memory_exponent",
                                                                            "sizes")} | {"scale.ranks.1", "scale.ranks.2"}
    assert set(out["scale.tokens.sizes"]) == {"60000", "90000"}
    assert all(row["seconds"] > 0 for part in parts for row in out[f"scale.{part}.sizes"].values())
    printed = capsys.readouterr().out
    assert "one caption file, videos" in printed and "2 ranks: a step sends 1 gradients" in printed


def test_growth_that_is_worse_than_linear_is_named(capsys):
    """Made-up sizes: clips take quadratic time, and packed text memory; a batch of frames may take its own."""
    def run(what, n, folder, processes=1):
        rows = {"tokens": {"start": (1.0, 10.0), "tokens": (n, n)}, "clips": {"clips": (n ** 2, 1.0)},
                "frames": {"frames": (n, n)}, "encoder": {"encoder": (n ** 2, n)}, "ranks": {}}[what]
        return {part: {"units": n, "seconds": row[0], "mb": row[1]} for part, row in rows.items()} or {"ranks": {}}
    sizes = dict.fromkeys(("clips", "frames", "encoder"), (10, 100, 1000))
    scale.bench_scale(SMALL, CPU, {}, sizes | {"tokens": (10 ** 4, 10 ** 5, 10 ** 6)}, run)
    assert ("in memory that grows with a corpus: time of exact search, clips, memory of reading all of it, tokens\n"
            in capsys.readouterr().out)


def test_a_size_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit, match="scale: videos of 7 failed: .*caption.json"):
        scale.children("videos", 7, tmp_path)


@pytest.mark.slow
def test_what_two_ranks_send_is_counted(tmp_path):
    """A gradient a parameter, and both rows of each sequence, of which a rank has half the batch's 32."""
    scale.make_ranks(tmp_path)
    assert scale.children("ranks", 1, tmp_path) == {"ranks": {}}
    sent = scale.children("ranks", 2, tmp_path, 2)["ranks"]
    config = model_config("1L-64H", 300)
    model = distill.Distiller(distill.Config(objective="nst+crd"), config, SimpleNamespace(width=64), None)
    assert sent["gradient bytes"] == 4 * sum(p.numel() for p in model.parameters()) and sent["gradients"] >= 1
    assert sent["all_gathers"] == 1 and sent["all_gather bytes"] == 2 * 16 * 128 * 4
    assert sent["all_reduce bytes"] < 200


def test_gpu_measures_every_part_of_the_step(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(BERT, "compile", lambda self: compiled.append(self))
    out = run(monkeypatch, {"avx512_bf16"}, only="gpu")
    names = {f"gpu.1L-64H{kind}.{key}" for kind in ("", ".compiled")
             for key in ("tokens_per_s", "launch_ms", "mfu", "kd_share", "peak_mb")}
    assert names == set(out) - {"machine", "table"} and all(out[name] > 0 for name in names)
    assert len(compiled) == 2 and len(out["table"]) == 2
    for rows in out["table"].values():
        assert {"step", "teacher", "forward", "backward", "masked-word head", "heads", "nst", "crd", "bank's update",
                "optimizer", "distillation alone"} < set(rows)
        assert rows["step"]["ratio"] == 1 and rows["nst"]["ratio"] == rows["nst"]["ms"] / rows["step"]["ms"]
    assert "the host takes" in capsys.readouterr().out


def test_operators_are_counted_without_views():
    x = torch.ones(3, 4, requires_grad=True)
    with bench.Operators() as operators:
        (x.T[1:] * 2).exp_()  # transpose, slice; mul, exp_
    assert operators.count == 2


def test_launches_are_those_of_chunks_that_fit_the_gpu():
    """A GPU with less memory takes more chunks."""
    many, few = {}, {}
    for out, memory in ((few, 1e9), (many, 1e6)):
        bench.bench_launches(SMALL, CPU, out, 8, 16, 32, 500, memory)
        assert set(out) == {f"launches.{name}" for name in ("nst", "soft", "voken", "crd")}
    assert many["launches.crd"] == few["launches.crd"] > 20
    for name in ("nst", "soft", "voken"):
        assert many[f"launches.{name}"] > few[f"launches.{name}"] > 10


def test_jobs_are_counted_as_the_papers_tell_them():
    found = {name: rest for name, *rest in jobs.jobs()}
    samples, length, size, flops = found["student 12L-768H, Wikipedia"]
    assert samples * length == 500_000 * 256 * 128 and size == 5.8e9
    assert flops == pytest.approx(128 * 720e6, rel=0.05)  # PERF: forward 175, backward and MLM head behind it
    assert found["teacher 12L-768H, HowTo100M"][2] == pytest.approx(3.9e12, rel=0.01)
    assert jobs.si(3.898e12, "B") == "3.9 TB" and jobs.si(12) == "12"


def test_a_file_that_is_none_of_benchs_is_one_line(tmp_path):
    assert "nowhere.json: cannot be read" in stop_line(jobs.main, tmp_path / "nowhere.json")
    for content in ("x", "[]", '{"feed.frames_mb_per_s": "fast"}'):
        (tmp_path / "bench.json").write_text(content)
        assert "bench.json" in stop_line(jobs.main, tmp_path / "bench.json")


def test_scale_page_holds_what_its_script_prints(capsys):
    """But for what bench.py measured, the last column of one table."""
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text().splitlines()
    jobs.main()
    printed = [line.rstrip("- ") for line in capsys.readouterr().out.splitlines() if line.strip("- ")]
    assert len(printed) > 25
    for line in printed:
        assert any(found.startswith(f"    {line}") for found in page), line


@pytest.mark.parametrize("wrong", ["--only nst,foo", "--rounds 0", "--batch 1", "--rows 2", "--tokens 4",
                                   "--vocab 9", "--model 6L"])
def test_bad_flags_are_named(wrong):
    flag = wrong.split()[0]
    with pytest.raises(SystemExit, match=flag.removeprefix("--")):
        parse_cli(bench.Config, bench.PRESETS, wrong.split())
