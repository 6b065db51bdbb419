"""Proves on a CUDA device what the other files prove on a CPU; skipped where there is none.

Training in three precisions, resume with the loss scaler's state, losses and encoder equal to the CPU's in
chunks of any size, compiled and recomputed runs equal to plain ones, and a step that never waits for the device.
Run: python -m pytest -q tests/test_gpu.py
"""
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_ddp import QUICK_ADAPTATION, flat, log_lines, pairs_and_tower, seen
from test_scripts import EVERY, saved, stop_at

import adapt_xdbert
import distill
import finetune
import losses
import teacher
from analyses import closing
from common import keyed_integers, read_json
from model import BERT, BERTConfig, CLIPConfig, CLIPText, CrossEncoder, recompute
from run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = ["float32", "bfloat16", "float16"]


def assert_close_runs(one, two):
    """Weights, optimizer, bank and scaler of two checkpoints, up to the order of the GPU's sums."""
    for part in ("model", "optimizer", "bank", "scaler"):
        a, b = flat(one.get(part, {})), flat(two.get(part, {}))
        assert a.keys() == b.keys()
        for key in a:
            if torch.is_tensor(a[key]):
                torch.testing.assert_close(seen(key, a[key]), seen(key, b[key]), rtol=1e-2, atol=1e-4,
                                           msg=lambda m: f"{part}{key}: {m}")
            else:
                assert a[key] == pytest.approx(b[key]), part + key


def steps_of(cfg):
    """The log's lines on training steps."""
    return [line for line in log_lines(Path(cfg.out_dir)) if "grad_norm" in line]


@pytest.mark.parametrize("dtype", DTYPES)
def test_student_learns_on_the_gpu(distill_config, dtype):
    cfg = distill_config(objective=EVERY, device="cuda", dtype=dtype, max_steps=40, eval_every=40,
                         save_every=40, grad_every=40, grad_accum=2)
    results = distill.main(cfg)
    lines = steps_of(cfg)
    for term in distill.ITEMS:
        values = [line[term] for line in lines]
        assert all(map(math.isfinite, values))
        # this teacher's word distributions are nearly uniform: there is nothing in them to learn
        assert term == "soft" or np.mean(values[-5:]) < np.mean(values[:5]), term
    assert 0 < results["mlm_loss"] < 7
    gradients = next(line for line in log_lines(Path(cfg.out_dir)) if "gradient_nst" in line)
    assert all(gradients[f"gradient_{term}"] > 0 for term in distill.ITEMS)


@pytest.mark.parametrize("objective", ["nst+crd", "l2"])
def test_closing_table_is_measured_on_the_gpu(distill_config, teacher_run, demo, capsys, objective):
    cfg = distill_config(objective=objective, videos=str(demo / "demo-s0" / "videos.h5"), device="cuda")
    distill.main(cfg)
    closing.close(cfg.out_dir, [], torch.device("cuda"))
    columns = read_json(Path(cfg.out_dir) / "table.json")["columns"]
    assert columns["teacher"]["mlm_loss"] > 0 and columns["teacher"]["probes"]
    assert all(columns[objective]["retrieval"][space] for space in ("aligned", "ridge"))
    out = capsys.readouterr().out
    assert "fills in" in out and "retrieves" in out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective, term", [("mlm+ct", "mlm"), ("clip", "clip")])
def test_teacher_learns_on_the_gpu(teacher_config, objective, term, dtype):
    cfg = teacher_config(objective=objective, device="cuda", dtype=dtype, max_steps=40, eval_every=40,
                         save_every=40)
    teacher.main(cfg)
    values = [line[term] for line in steps_of(cfg)]
    assert all(map(math.isfinite, values)) and np.mean(values[-5:]) < np.mean(values[:5])


@pytest.fixture
def adapt_config(demo, teacher_run, tmp_path):
    """adapt_xdbert.Config for a run of a second on the GPU; flags as keywords."""
    train, clip = pairs_and_tower(demo / "demo-s0", tmp_path)
    paths = dict(train=train, clip=clip, language=str(teacher_run), out_dir=str(tmp_path / "run"))
    return lambda **flags: adapt_xdbert.Config(**(QUICK_ADAPTATION | dict(device="cuda") | paths | flags))


@pytest.fixture
def paired_config(demo, distill_config, tmp_path):
    """distill.Config for a run of a second on the GPU with a CLIP tower as the teacher; flags as keywords."""
    train, clip = pairs_and_tower(demo / "demo-s0", tmp_path)
    return lambda **flags: distill_config(**dict(device="cuda", train=train, teacher=clip) | flags)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaptation_learns_on_the_gpu(adapt_config, dtype):
    cfg = adapt_config(dtype=dtype, max_steps=60, eval_every=60, save_every=60, grad_accum=2, grad_every=30,
                       objective="mlm+match+cliptc+itc", freeze="none")
    results = adapt_xdbert.main(cfg)
    lines = steps_of(cfg)
    for term in adapt_xdbert.ITEMS:
        values = [line[term] for line in lines]
        assert len(values) == 60 and all(map(math.isfinite, values))
        # whether two texts are the same takes more than 60 steps
        assert term == "match" or np.mean(values[-5:]) < np.mean(values[:5]), term
    assert results["mlm_accuracy_matched"] > 0


STAGES = pytest.mark.parametrize("stage, config, flags", [
    (distill, "distill_config", dict(objective="nst+crd", grad_every=2)), (adapt_xdbert, "adapt_config", {}),
    (adapt_xdbert, "adapt_config", dict(objective="mlm+match+cliptc+itc", grad_accum=2, grad_every=2)),
    (distill, "paired_config", dict(objective="l2+crd", crd_level="sentence", grad_every=2))],
    ids=["distill", "adapt", "adapt itc", "distill paired"])


@STAGES
@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_run_equals_an_uninterrupted_one_on_the_gpu(request, tmp_path, monkeypatch, stage, config,
                                                            flags, dtype):
    config = request.getfixturevalue(config)
    flags = flags | dict(device="cuda", dtype=dtype, max_steps=6, save_every=2, eval_every=2, log_every=2)
    whole, parts = (config(**flags, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    stage.main(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(SystemExit):
            stage.main(parts)
    stage.main(replace(parts, resume="true"))
    assert_close_runs(saved(whole.out_dir), saved(parts.out_dir))
    assert bool(saved(parts.out_dir)["scaler"]) == (dtype == "float16")


@STAGES
def test_gpu_run_equals_cpu_run_without_dropout(request, tmp_path, stage, config, flags):
    flags, runs = flags | dict(dropout=0.0, max_steps=3, eval_every=3, save_every=3), []
    for device in ("cpu", "cuda"):
        cfg = request.getfixturevalue(config)(**flags, device=device, out_dir=str(tmp_path / device))
        stage.main(cfg)
        runs.append(steps_of(cfg))
    assert len(runs[0]) == len(runs[1]) == 3
    for a, b in zip(*runs):
        for key in (*cfg.objective.split("+"), "mlm", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-2), (a["step"], key)


@pytest.mark.parametrize("stage, config, flags", [
    (teacher, "teacher_config", {}), (distill, "distill_config", dict(objective=EVERY, grad_every=3)),
    (adapt_xdbert, "adapt_config", dict(objective="mlm+match+cliptc+itc", grad_every=3))],
    ids=["teacher", "distill", "adapt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [False, True])
def test_compiled_run_on_the_gpu_equals_the_eager_one(request, tmp_path, stage, config, flags, dtype, again):
    make, runs = request.getfixturevalue(config), []
    flags = flags | dict(device="cuda", dtype=dtype, dropout=0.0, max_steps=3, log_every=1, eval_every=3, save_every=3)
    for name, more in {"eager": {}, "compiled": dict(compile_model=True, grad_checkpoint=again)}.items():
        torch._dynamo.reset()
        cfg = make(**flags | more, out_dir=str(tmp_path / name))
        stage.main(cfg)
        runs.append(steps_of(cfg))
    assert len(runs[0]) == len(runs[1]) == 3
    for a, b in zip(*runs):
        for key in (*cfg.objective.split("+"), "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-2 if dtype == "float32" else 1e-1), (a["step"], key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_activations_on_the_gpu_take_less_memory_for_equal_gradients(dtype):
    """With dropout, whose generator's state is kept."""
    found, peaks = [], []
    for again in (False, True):
        torch.manual_seed(0)
        bert = BERT(BERTConfig(vocab_size=V, layers=8, hidden=256, heads=4, intermediate=1024, dropout=0.1)).cuda()
        if again:
            recompute(bert)
        ids = (torch.arange(64 * 128) * 7 % V).view(64, 128).cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32"):
            h = bert(ids)
        h.float().square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([h.detach(), *(p.grad for p in bert.parameters() if p.grad is not None)])
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    assert peaks[1] < 0.5 * peaks[0]


# ---------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_learns_on_the_gpu(finetune_config, dtype):
    for summary in finetune.main(finetune_config("rte,stsb,swag,squad2", device="cuda", dtype=dtype)):
        assert summary["runs"][0]["score"] > 99, summary["task"]


def test_fine_tuning_on_the_gpu_equals_the_cpus_without_dropout(finetune_config, tmp_path):
    flags = dict(dropout=0.0, max_steps=3, log_every=1, save_every=1, lr=1e-3)
    for device in ("cpu", "cuda"):
        finetune.main(finetune_config("rte,stsb,swag,squad2", **flags, device=device,
                                      out_dir=str(tmp_path / device)))
    for task in ("rte", "stsb", "swag", "squad2"):
        one, two = (log_lines(tmp_path / device / task / "s0") for device in ("cpu", "cuda"))
        for a, b in zip(one, two):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2), task
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-2), task


@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_fine_tuning_equals_an_uninterrupted_one_on_the_gpu(finetune_config, tmp_path, monkeypatch,
                                                                   dtype):
    flags = dict(device="cuda", dtype=dtype, max_steps=6, log_every=2, save_every=2)
    whole, parts = (finetune_config("sst2", **flags, out_dir=str(tmp_path / name))
                    for name in ("whole", "parts"))
    finetune.main(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(SystemExit):
            finetune.main(parts)
    assert bool(saved(tmp_path / "parts" / "sst2" / "s0")["scaler"]) == (dtype == "float16")
    finetune.main(parts)
    one, two = (load_file(tmp_path / name / "sst2" / "s0" / "model" / "model.safetensors")
                for name in ("whole", "parts"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-2, atol=1e-4, msg=lambda m: f"{key}: {m}")


# ---------------------------------------------------------------------------- losses and encoder


def both_devices(loss, *inputs):
    """loss(device, inputs) with its gradients to the floating-point inputs, on the CPU and on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        moved = [x.to(device).requires_grad_(x.is_floating_point()) for x in inputs]
        value = loss(device, *moved)
        wanted = [x for x in moved if x.requires_grad]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
        found.append([value.detach().cpu(), *(g.cpu() for g in gradients if g is not None)])
    return found


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def crd_on(kind, device, z_s, z_t):
    bank = losses.CRDBank(60, 16, 32, device=device)
    bank.update(np.arange(50), unit(50, 16, seed=3).to(device), unit(50, 16, seed=4).to(device))
    slots, negatives = np.arange(12), bank.draw(keyed_integers, 0, 0)
    bank.set_z(z_s.detach(), z_t.detach(), slots, negatives)
    return losses.crd(z_s, z_t, slots, bank, negatives, loss=kind)


B, T, C, V = 12, 10, 16, 50
MASK = torch.arange(T) < torch.arange(B)[:, None] % 7 + 4
ROWS = torch.arange(B) * 5 % V
CASES = {
    "mlm": (lambda _, x, y: losses.mlm(x, y), normal(B, V), ROWS),
    "hinge_all": (lambda _, h, v, m: losses.hinge_all(h, v, m), normal(B, T, C), normal(B, C, seed=1), MASK),
    "infonce_tokens": (lambda _, h, v, m: losses.infonce_tokens(h, v, m), normal(B, T, C),
                       normal(B, C, seed=1), MASK),
    "soft": (lambda _, h, W, b, g: losses.soft(h, W, b, g, W.detach(), b.detach(), chunk=5), normal(B, C),
             normal(V, C, seed=1), normal(V, seed=2), normal(B, C, seed=3)),
    "voken": (lambda _, h, W, b, g: losses.voken(h, W, b, g, W.detach(), chunk=5), normal(B, C),
              unit(V, C, seed=1), normal(V, seed=2), normal(B, C, seed=3)),
    "l2": (lambda _, s, t, m: losses.l2(s, t.detach(), m), normal(B, T, C), normal(B, T, C, seed=1), MASK),
    **{f"nst {kernel}": (lambda _, s, t, m, kernel=kernel: losses.nst(s, t.detach(), m, kernel),
                         normal(B, T, C), normal(B, T, 24, seed=1), MASK)
       for kernel in ("gaussian", "poly", "linear")},
    **{f"crd {kind}": (lambda device, s, t, kind=kind: crd_on(kind, device, s, t), unit(B, C),
                       unit(B, C, seed=1)) for kind in ("nce", "infonce")}}


@pytest.mark.parametrize("name", CASES)
@losses.no_tf32()
def test_loss_and_gradient_equal_the_cpus(name):
    loss, *inputs = CASES[name]
    for a, b in zip(*both_devices(loss, *inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@losses.no_tf32()
def test_size_of_the_chunks_changes_no_loss_on_the_gpu(monkeypatch):
    """By default all rows are one chunk there."""
    soft_in, voken_in, nst_in = (CASES[name][1:] for name in ("soft", "voken", "nst gaussian"))
    forms = [(lambda h, W, b, g: losses.soft(h, W, b, g, W.detach(), b.detach()), soft_in),
             (lambda h, W, b, g: losses.voken(h, W, b, g, W.detach()), voken_in),
             (lambda s, t, m: losses.nst(s, t.detach(), m), nst_in)]
    for form, inputs in forms:
        found = []
        for rows in (None, 1, 5):
            with monkeypatch.context() as patch:
                if rows:
                    patch.setattr(losses, "chunk_rows", lambda *_, rows=rows: rows)
                moved = [x.cuda().requires_grad_(x.is_floating_point()) for x in inputs]
                value = form(*moved)
                gradients = torch.autograd.grad(value, [x for x in moved if x.requires_grad], allow_unused=True)
                found.append([value, *(g for g in gradients if g is not None)])
        for other in found[1:]:
            for x, y in zip(other, found[0]):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@losses.no_tf32()
def test_fused_attention_equals_plain_matmuls(padded):
    """The GPU takes scaled_dot_product_attention, the CPU matmuls: values at real tokens, and gradients."""
    torch.manual_seed(0)
    bert = BERT(BERTConfig(vocab_size=V, layers=2, hidden=32, heads=2, intermediate=64, dropout=0.0))
    ids = (torch.arange(B * T) * 7 % V).view(B, T)
    found = []
    for device in ("cpu", "cuda"):
        bert.zero_grad()  # before the move, which takes gradients along
        bert.to(device)
        h = bert(ids.to(device), MASK.to(device) if padded else None)
        h = h * MASK[..., None].to(device)
        h.square().mean().backward()
        found.append([h.detach().cpu(), bert.embeddings.word.weight.grad.cpu(),
                      bert.layers[0].attention.qkv.weight.grad.cpu()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@losses.no_tf32()
def test_clip_text_on_the_gpu_equals_the_cpus():
    """Causal, there without a mask: values at every position, and gradients."""
    torch.manual_seed(0)
    clip = CLIPText(CLIPConfig(V, layers=2, hidden=32, heads=2, intermediate=64, positions=T, projection=24))
    ids, found = (torch.arange(B * T) * 7 % V).view(B, T), []
    for device in ("cpu", "cuda"):
        clip.zero_grad()  # before the move, which takes gradients along
        clip.to(device)
        h = clip(ids.to(device))
        h.square().mean().backward()
        found.append([h.detach().cpu(), clip.pool(h, MASK.to(device)).detach().cpu(),
                      *(clip.get_parameter(name).grad.cpu() for name in (
                          "embeddings.word.weight", "embeddings.position.weight",
                          "layers.0.attention.qkv.weight", "project.weight"))])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@losses.no_tf32()
def test_cross_modal_encoder_on_the_gpu_equals_the_cpus():
    """Both streams masked: values at real tokens, and gradients of both inputs."""
    torch.manual_seed(0)
    text = BERTConfig(V, layers=1, hidden=32, heads=2, intermediate=64, dropout=0.0, init_std=0.2)
    cross = CrossEncoder(text, CLIPConfig(V, hidden=24, heads=3, projection=24))
    clip_mask, found = MASK.flip(0)[:, :7], []
    for device in ("cpu", "cuda"):
        cross.to(device)
        h, c = (x.to(device).requires_grad_() for x in (normal(B, T, 32), normal(B, 7, 24, seed=1)))
        masks = MASK.to(device), clip_mask.to(device)
        seen_h, seen_c = (x[mask] for x, mask in zip(cross(h, c, *masks), masks))
        (seen_h.square().mean() + seen_c.square().mean()).backward()
        found.append([x.detach().cpu() for x in (seen_h, seen_c, h.grad, c.grad)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------- speed


@pytest.fixture
def strict_steps(monkeypatch):
    """From the third step on, any wait for the device is an error, but in log lines, saves and evaluations; a
    list with an entry a step. The first steps set up cuBLAS and the optimizer's state."""
    steps = []

    def patched(name):
        method = getattr(Run, name)

        def relaxed(self, step, *args, **more):
            torch.cuda.set_sync_debug_mode("default")
            found = method(self, step, *args, **more)
            if name == "tick":
                steps.append(step)
            last = name == "save_due" and args[0]
            if len(steps) >= 2 and name != "eval_due" and not last:
                torch.cuda.set_sync_debug_mode("error")
            return found
        monkeypatch.setattr(Run, name, relaxed)
    for name in ("eval_due", "save_due", "tick"):
        patched(name)
    yield steps
    torch.cuda.set_sync_debug_mode("default")


FIVE = dict(device="cuda", max_steps=5, log_every=5, save_every=5)


@STAGES
@pytest.mark.parametrize("dtype", DTYPES)
def test_optimizer_step_never_waits_for_the_device(request, strict_steps, stage, config, flags, dtype):
    more = dict(grad_every=5) | (dict(objective=EVERY) if config == "distill_config" else {})
    stage.main(request.getfixturevalue(config)(**(flags | FIVE | more), eval_every=5, dtype=dtype))
    assert len(strict_steps) == 5


@pytest.mark.parametrize("flags", [dict(), dict(negatives="one", ct_input="clean"), dict(negatives="all"),
                                   dict(objective="clip"), dict(objective="mlm", stop_on="loss")],
                         ids=lambda flags: ",".join(map(str, flags.values())) or "infonce")
def test_teachers_step_never_waits_for_the_device(teacher_config, strict_steps, flags):
    teacher.main(teacher_config(**flags | FIVE, eval_every=5, dtype="float16"))
    assert len(strict_steps) == 5


@pytest.mark.parametrize("task", ["rte", "stsb", "swag", "squad2"])
def test_fine_tuning_step_never_waits_for_the_device(finetune_config, strict_steps, task):
    finetune.main(finetune_config(task, **FIVE, dtype="float16"))
    assert len(strict_steps) == 5
