"""losses.py: every objective equals a plain float64 loop over its paper's equation, in value and gradient.

Beyond that: divisor and half precision of each; NST's sigma = 1 trap, padding, widths, kernels and memory;
CRD's Eq. 8 in its literal exp form, the law of its shared negatives, its bank; the hinge's draws.

    pytest -q tests/test_losses.py
"""
import contextlib
import functools
import json
import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from common import keyed_integers

LENGTHS = (6, 4, 5)  # of the B = 3 sequences of the small cases


def randn(*shape, seed=0, grad=False, scale=1.0):
    x = scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def lengths_mask(lengths, T):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def partners(mask, seed, step, positions):
    return losses.hinge_partners(mask, keyed_integers, seed, step, positions)


def draw(bank, step, seed=0):
    return bank.draw(keyed_integers, seed, step)


def peak_bytes(function, folder):
    """Highest sum of torch's live CPU allocations made inside `function`."""
    cpu, path = torch.profiler.ProfilerActivity.CPU, folder / "trace.json"
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    return max(np.cumsum([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]))


# ---------------------------------------------------------------------------- the equations as loops


def cos(x, y):
    return (x @ y) / (x.norm() * y.norm())


def plain_mlm(logits, targets):
    return sum(torch.logsumexp(row, 0) - row[k] for row, k in zip(logits, targets))


def plain_hinge(h, v, mask, partner, partner_v, partner_token, margin):
    total = 0
    for b, i in mask.nonzero().tolist():
        other = h[partner[b], partner_token[b, i]]
        total = total + (margin - cos(h[b, i], v[b]) + cos(other, v[b])).clamp(min=0)
        total = total + (margin - cos(h[b, i], v[b]) + cos(h[b, i], v[partner_v[b]])).clamp(min=0)
    return total


def plain_hinge_all(h, v, mask, margin):
    total, B = 0, len(v)
    for b, i in mask.nonzero().tolist():
        own = cos(h[b, i], v[b])
        texts = [(margin - own + cos(h[c, i], v[b])).clamp(min=0) for c in range(B) if c != b and mask[c, i]]
        videos = [(margin - own + cos(h[b, i], v[c])).clamp(min=0) for c in range(B) if c != b]
        total = total + sum(texts) / max(1, len(texts)) + sum(videos) / len(videos)
    return total


def plain_infonce(h, v, mask, temperature):
    def e(b, i, c):
        return torch.exp(cos(h[b, i], v[c]) / temperature)
    total, B = 0, len(v)
    for b, i in mask.nonzero().tolist():
        total = total - torch.log(e(b, i, b) / sum(e(b, i, c) for c in range(B))) / 2
        total = total - torch.log(e(b, i, b) / sum(e(c, i, b) for c in range(B) if mask[c, i])) / 2
    return total


def plain_clip(z_text, z_video, log_scale):
    def e(b, c):
        return torch.exp(log_scale.exp() * cos(z_text[b], z_video[c]))
    total, B = 0, len(z_text)
    for b in range(B):
        total = total - torch.log(e(b, b) / sum(e(b, c) for c in range(B))) / 2
        total = total - torch.log(e(b, b) / sum(e(c, b) for c in range(B))) / 2
    return total


def plain_soft(h_s, W_s, b_s, h_t, W_t, b_t, tau):
    total = 0
    for x, y in zip(h_s, h_t):
        e_s, e_t = torch.exp((W_s @ x + b_s) / tau), torch.exp((W_t @ y + b_t) / tau)
        total = total - sum(e_t[z] / e_t.sum() * torch.log(e_s[z] / e_s.sum()) for z in range(len(b_s)))
    return total


def plain_voken(h_s, W, b, h_t, videos):
    total = 0
    for x, y in zip(h_s, h_t):
        k = max(range(len(videos)), key=lambda k: cos(y, videos[k]).item())
        total = total - torch.log_softmax(W @ x + b, 0)[k]
    return total


def plain_l2(s, t, mask):
    return sum((s[b, i] - t[b, i]).norm() ** 2 for b, i in mask.nonzero().tolist())


def plain_nst(s, t, mask, kernel="gaussian", sigma=1.0, normalize=True):
    k = {"gaussian": lambda x, y: torch.exp(-((x - y) ** 2).sum() / (2 * sigma ** 2)),
         "poly": lambda x, y: (x @ y) ** 2, "linear": lambda x, y: x @ y}[kernel]
    total = 0
    for b in range(len(s)):
        S, T = s[b][mask[b]].T, t[b][mask[b]].T  # one row a neuron
        if normalize:
            S, T = (torch.stack([x / x.norm() if x.norm() > 0 else x for x in y]) for y in (S, T))
        for X, Y, factor in ((S, S, 1), (T, T, 1), (S, T, -2)):
            total = total + factor * sum(k(x, y) for x in X for y in Y) / (len(X) * len(Y))
    return total


def plain_crd(z_s, z_t, slots, bank, negatives, loss="nce"):
    """Eq. 8 in its printed form, h = e / (e + N/M) with e = exp(z_s.z_t / tau) / Z; both directions."""
    N, M, total = len(negatives), bank.rows, 0
    for anchors, others, rows, log_z in ((z_s, z_t, bank.z_t, bank.log_z[0]),
                                         (z_t, z_s, bank.z_s, bank.log_z[1])):
        for a, b, slot in zip(anchors, others, slots):
            drawn = [rows[n].double() for n in negatives if n != slot]
            if loss == "infonce":
                e = [torch.exp(a @ x / bank.tau) for x in [b, *drawn]]
                total = total - torch.log(e[0] / sum(e))
                continue
            e = [torch.exp(a @ x / bank.tau) / math.exp(log_z) for x in [b, *drawn]]
            h = [x / (x + N / M) for x in e]
            total = total - torch.log(h[0]) - sum(torch.log(1 - x) for x in h[1:])
    return total


# ---------------------------------------------------------------------------- one small case of each loss


def filled_bank(rows=20, dim=4, negatives=7, log_z=(2.5, 1.5), tau=0.5, **kw):
    bank = losses.CRDBank(rows, dim, negatives, tau=tau, **kw)
    bank.update(np.arange(rows), randn(rows, dim, seed=21).float(), randn(rows, dim, seed=22).float())
    bank.log_z = log_z and list(log_z)
    return bank


@functools.cache
def make_cases(teacher_dtype):
    """{name: (loss(*inputs, divisor=), plain(*inputs), inputs, items)}, inputs float64 with gradient.

    The plain form sees the teacher's tensors as rounded to teacher_dtype, but in float64.
    """
    B, T, C = 3, 6, 4
    mask = lengths_mask(LENGTHS, T)
    text_mask = mask & (torch.arange(T) > 0) & (torch.arange(T) < torch.tensor(LENGTHS)[:, None] - 1)
    tokens = int(text_mask.sum())
    h, v = randn(B, T, C, seed=1, grad=True), randn(B, C, seed=2, grad=True)
    s = randn(B, T, 5, seed=3, grad=True)
    t, t_wide, t_narrow = (randn(B, T, d, seed=d).to(teacher_dtype) for d in (5, 9, 3))
    rows, W, b = randn(7, C, seed=7, grad=True), randn(11, C, seed=8, grad=True), randn(11, seed=9, grad=True)
    teacher = [x.to(teacher_dtype) for x in (randn(7, 5, seed=10), randn(11, 5, seed=11), randn(11, seed=12))]
    videos, targets = F.normalize(randn(11, 5, seed=13), dim=1), torch.tensor([3, 0, 10, 5, 5, 1, 2])
    draws = partners(text_mask, 0, 0, np.arange(B))
    pairs = [v, randn(B, C, seed=14, grad=True), torch.tensor(1.2, dtype=torch.float64).requires_grad_()]
    seen, keep = randn(B, C, seed=19).to(teacher_dtype), torch.tensor([True, False, True])
    z = [F.normalize(randn(5, C, seed=k), dim=1).requires_grad_() for k in (15, 16)]
    crd = np.array([2, 9, 2, 5, 11]), filled_bank(), np.array([4, 2, 9, 9, 17, 0, 3])
    cases = {
        "mlm": (lambda x, **kw: losses.mlm(x, targets, **kw),
                lambda x: plain_mlm(x, targets), [randn(7, 11, seed=17, grad=True)], 7),
        "hinge": (lambda h, v, **kw: losses.hinge(h, v, text_mask, *draws, margin=0.6, **kw),
                  lambda h, v: plain_hinge(h, v, text_mask, *draws, 0.6), [h, v], tokens),
        "hinge_all": (lambda h, v, **kw: losses.hinge_all(h, v, text_mask, margin=0.6, **kw),
                      lambda h, v: plain_hinge_all(h, v, text_mask, 0.6), [h, v], tokens),
        "infonce_tokens": (lambda h, v, **kw: losses.infonce_tokens(h, v, text_mask, 0.3, **kw),
                           lambda h, v: plain_infonce(h, v, text_mask, 0.3), [h, v], tokens),
        "clip": (losses.clip, plain_clip, pairs, B),
        "itc": (lambda z, k, **kw: losses.itc(z, seen, k, keep, **kw),
                lambda z, k: plain_clip(z[keep], seen.double()[keep], k), pairs[::2], 2),
        "soft": (lambda h, W, b, **kw: losses.soft(h, W, b, *teacher, tau=1.7, chunk=3, **kw),
                 lambda h, W, b: plain_soft(h, W, b, *(x.double() for x in teacher), 1.7), [rows, W, b], 7),
        "voken": (lambda h, W, b, **kw: losses.voken(h, W, b, teacher[0], videos, chunk=3, **kw),
                  lambda h, W, b: plain_voken(h, W, b, teacher[0].double(), videos), [rows, W, b], 7),
        "l2": (lambda s, **kw: losses.l2(s, t, mask, **kw),
               lambda s: plain_l2(s, t.double(), mask), [s], sum(LENGTHS)),
        "crd": (lambda *z, **kw: losses.crd(*z, *crd, **kw), lambda *z: plain_crd(*z, *crd), z, 5),
        "crd infonce": (lambda *z, **kw: losses.crd(*z, *crd, loss="infonce", **kw),
                        lambda *z: plain_crd(*z, *crd, loss="infonce"), z, 5)}
    for kernel in losses.MMD:
        for normalize, t_nst in ((True, t_wide), (True, t_narrow), (False, t)):
            options = {"kernel": kernel, "sigma": 1.3, "normalize": normalize}
            cases[f"nst {kernel} {t_nst.shape[-1]}"] = (
                lambda s, t=t_nst, o=options, **kw: losses.nst(s, t, mask, **o, **kw),
                lambda s, t=t_nst, o=options: plain_nst(s, t.double(), mask, **o), [s], B)
    return cases


CASES = make_cases(torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_plain_loop(name):
    loss, plain, inputs, items = CASES[name]
    ours, reference = loss(*inputs), plain(*inputs) / items
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(reference, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_loss_passes_gradcheck(name):
    loss, _, inputs, _ = CASES[name]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", CASES)
def test_sum_is_divided_by_the_divisor(name):
    loss, plain, inputs, items = CASES[name]
    torch.testing.assert_close(loss(*inputs, divisor=2.5), loss(*inputs) * items / 2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    """Against float64 on the same rounded inputs, under autocast: only float32's rounding may differ."""
    loss, plain, inputs, items = make_cases(dtype)[name]
    half = [x.detach().to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss(*half)
    reference = plain(*exact) / items
    assert ours.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, half), torch.autograd.grad(reference, exact)):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


def test_gradient_scales_with_what_follows():
    """GradScaler, weights and the per-term gradient norms: upstream factors, and backward twice."""
    for name in ("soft", "voken", "crd", "nst gaussian 9"):
        loss, _, inputs, _ = CASES[name]
        value = loss(*inputs)
        once = torch.autograd.grad(value, inputs, retain_graph=True)
        for a, b in zip(torch.autograd.grad(3 * value, inputs), once):
            torch.testing.assert_close(a, 3 * b, rtol=1e-12, atol=0)


def test_parts_of_a_contrastive_batch_add_up_to_the_whole():
    """Each part sees the others' pairs as constants; masked pairs are nobody's negatives."""
    inputs = [randn(7, 4, seed=1, grad=True), randn(7, 4, seed=2, grad=True),
              torch.tensor(1.2, dtype=torch.float64).requires_grad_()]
    mask = torch.tensor([True, False, True, True, True, False, True])
    kept = [x[mask].detach().requires_grad_() for x in inputs[:2]] + inputs[2:]
    wanted = losses.clip(*kept, 1.0)
    gradients = torch.autograd.grad(wanted, kept)
    total = 0.0
    for own in (slice(0, 2), slice(2, 6), slice(6, 7)):
        rest = mask.clone()
        rest[own] = False
        total += losses.clip(*(x[own] for x in inputs[:2]), inputs[2], 1.0, mask[own],
                             (inputs[0].detach(), inputs[1].detach(), rest))
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=0)
    for found, gradient in zip(torch.autograd.grad(total, inputs), gradients):
        found = found[mask] if found.dim() else found
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def test_a_batch_without_pairs_gives_zero_and_no_nan():
    z, scale = randn(3, 4, seed=1, grad=True), torch.tensor(1.0, dtype=torch.float64).requires_grad_()
    loss = losses.itc(z, randn(3, 4, seed=2), scale, torch.zeros(3, dtype=torch.bool))
    assert loss == 0 and not any(x.any() for x in torch.autograd.grad(loss, [z, scale]))


def test_micro_batches_with_the_global_divisor_equal_the_whole_batch():
    mask, s, t = lengths_mask((6, 4, 5, 2), 6), randn(4, 6, 5, seed=1), randn(4, 6, 7, seed=2)
    whole = losses.nst(s, t, mask), losses.l2(s, t[..., :5], mask)
    for loss, total, divisor, width in ((losses.nst, whole[0], 4, 7), (losses.l2, whole[1], mask.sum(), 5)):
        parts = [loss(s[i], t[i, :, :width], mask[i], divisor=divisor) for i in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(sum(parts), total)


def test_teacher_gets_no_gradient():
    s, t = (randn(2, 5, 4, seed=k, grad=True) for k in (1, 2))
    mask = torch.ones(2, 5, dtype=torch.bool)
    W, b, videos = randn(6, 4, seed=3, grad=True), randn(6, seed=4, grad=True), randn(6, 4, seed=5)
    total = losses.nst(s, t, mask) + losses.l2(s, t, mask) + losses.voken(s[mask], W, b, t[mask], videos)
    W_t, b_t = randn(6, 4, seed=6, grad=True), randn(6, seed=7, grad=True)
    (total + losses.soft(s[mask], W, b, t[mask], W_t, b_t)).backward()
    assert t.grad is None and W_t.grad is None and b_t.grad is None
    assert all(x.grad.abs().sum() > 0 for x in (s, W, b))


# ---------------------------------------------------------------------------- mlm, hinge, clip


def test_mlm_without_targets_is_zero_with_a_graph():
    W = randn(11, 4, grad=True)
    loss = losses.mlm(randn(0, 4) @ W.T, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and torch.equal(W.grad, torch.zeros_like(W))


def test_hinge_partners_are_pure_and_never_the_item_itself():
    mask = lengths_mask((7, 3, 5, 2, 6), 7) & (torch.arange(7) > 0)
    place, kept = np.arange(40, 45), 0
    for step in range(60):
        partner, partner_v, token = partners(mask, 3, step, place)
        assert all(map(torch.equal, (partner, partner_v, token), partners(mask, 3, step, place)))
        own = torch.arange(5)
        assert (partner != own).all() and (partner_v != own).all()
        assert mask[partner[:, None], token].all()
        same = mask[partner]
        assert torch.equal(token[same], torch.arange(7).expand(5, 7)[same])
        kept += int((partner == partner_v).sum())
    assert 40 < kept < 110  # two independent draws agree in 1 of 4: 75 of 300 expected, 5 sigma


def test_hinge_partners_draw_uniformly():
    mask = torch.tensor([[True] * 6, [False, True, False, True, True, False], [True] * 6])
    draws = (partners(mask, 0, step, np.arange(3)) for step in range(1500))
    partner, _, token = map(torch.cat, zip(*draws))
    share = torch.bincount(partner.view(-1, 3)[:, 0], minlength=3) / 1500
    assert share[0] == 0 and abs(share[1] - 0.5) < 0.04
    drawn = token.view(-1, 3, 6)[:, 0, 0][partner.view(-1, 3)[:, 0] == 1]  # token 0 of text 1 is not real
    share = torch.bincount(drawn, minlength=6) / len(drawn)
    assert share[[0, 2, 5]].sum() == 0 and (share[[1, 3, 4]] - 1 / 3).abs().max() < 0.06


def test_hinge_all_is_the_mean_of_hinge_over_all_partners():
    B, T = 5, 4
    h, v, mask = randn(B, T, 3, seed=1), randn(B, 3, seed=2), torch.ones(B, T, dtype=torch.bool)
    token = torch.arange(T).expand(B, T)
    shifts = [(torch.arange(B) + k) % B for k in range(1, B)]
    one = [losses.hinge(h, v, mask, p, q, token, margin=0.4) for p in shifts for q in shifts]
    torch.testing.assert_close(losses.hinge_all(h, v, mask, margin=0.4), torch.stack(one).mean())


def test_infonce_has_finite_gradient_where_a_position_is_empty():
    h, v = randn(2, 4, 3, seed=1, grad=True), randn(2, 3, seed=2, grad=True)
    losses.infonce_tokens(h, v, lengths_mask((2, 3), 4)).backward()
    assert h.grad.isfinite().all() and h.grad[:, 3].abs().sum() == 0 and h.grad[0, 2].abs().sum() == 0


def test_clip_scale_is_clamped_at_100():
    x, y = randn(4, 3, seed=1), randn(4, 3, seed=2)
    at, above = (losses.clip(x, y, torch.tensor(k, dtype=torch.float64)) for k in (math.log(100), 9.0))
    torch.testing.assert_close(at, above)


def test_padding_of_mlm_is_no_item_and_gets_no_gradient():
    x, targets = randn(5, 11, seed=1), torch.tensor([3, 0, 10, 7, 7])
    padded, place = F.pad(targets, (0, 3), value=-100), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    for divisor in (None, 2.5):
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain, ours = losses.mlm(one, targets, divisor), losses.mlm(two[place], padded, divisor)
        torch.testing.assert_close(ours, plain, rtol=1e-14, atol=0)
        for a, b in zip(torch.autograd.grad(ours, two), torch.autograd.grad(plain, one)):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------- chunks on a GPU


class Operators(TorchDispatchMode):
    """Counts what a GPU would have to start: views are free."""
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


def on_gpu_of(monkeypatch, gigabytes):
    """Tensors of the device meta, which has no numbers, are from now on on a GPU with so much memory."""
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=int(gigabytes * 1e9)))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


@pytest.mark.parametrize("gigabytes, most", [(141, (70, 80, 100)), (24, (200, 400, 550)), (11, (400, 850, 1150))])
def test_kd_at_the_papers_size_takes_few_operators_on_a_gpu(monkeypatch, gigabytes, most):
    """256 x 128 tokens, 768 wide, 30,522 words and videos; with chunks of fixed size: 4,653, 2,188 and 2,952."""
    on_gpu_of(monkeypatch, gigabytes)
    tokens, h, W, b = (torch.empty(*shape, device="meta") for shape in (
        (256, 128, 768), (256 * 128, 768), (30522, 768), (30522,)))
    for leaf in (tokens, h):
        leaf.requires_grad_()
    mask = torch.ones(256, 128, dtype=torch.bool, device="meta")
    forms = (lambda: losses.nst(tokens, tokens, mask), lambda: losses.soft(h, W, b, h, W, b),
             lambda: losses.voken(h, W, b, h, W))
    for run, bound in zip(forms, most):
        with Operators() as operators:
            run()
        assert 0 < operators.count < bound


def test_chunks_on_a_gpu_take_a_share_of_its_memory(monkeypatch):
    gpu, kernel = torch.device("cuda"), 768 * 1536 + 4 * 128 * 1536
    for gigabytes, nst, soft in ((141, 256, 8000), (11, 36, 600)):
        on_gpu_of(monkeypatch, gigabytes)
        for floats, least in ((kernel, nst), (4 * 30522, soft)):
            rows = losses.chunk_rows(gpu, floats, 1)
            assert least <= rows and gigabytes * 1e9 / 64 < 4 * floats * rows <= gigabytes * 1e9 / 32
    assert losses.chunk_rows(gpu, 10 ** 12, 1) == 1 == losses.chunk_rows(torch.device("cpu"), 1, 0)
    assert losses.chunk_rows(torch.device("cpu"), 5, 256) == 256
    assert losses.chunk_rows(torch.device("mps"), 2 ** 13, 1) == 2 ** 13


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_size_of_the_chunks_changes_no_value_and_no_gradient(monkeypatch, dtype, rtol):
    mask = lengths_mask((9, 4, 6, 1, 9, 7, 2, 5, 3, 8, 9), 9)
    s, t = randn(11, 9, 12, seed=1).to(dtype), randn(11, 9, 8, seed=2).to(dtype)
    h, W, b, h_t = (x.to(dtype) for x in (randn(70, 6, seed=3), randn(40, 6, seed=4), randn(40, seed=5),
                                          randn(70, 6, seed=6)))
    videos = F.normalize(W, dim=1)
    forms = [(lambda *x: losses.soft(*x, h_t, W, b), (h, W, b)), (lambda *x: losses.voken(*x, h_t, videos), (h, W, b)),
             *((lambda x, kernel=kernel: losses.nst(x, t, mask, kernel), (s,)) for kernel in losses.MMD)]
    for form, inputs in forms:
        found = []
        for rows in (1, 4, 10 ** 6):
            monkeypatch.setattr(losses, "chunk_rows", lambda *_, rows=rows: rows)
            leaves = [x.clone().requires_grad_() for x in inputs]
            value = form(*leaves)
            found.append([value, *torch.autograd.grad(value, leaves)])
        for other in found[1:]:
            for x, y in zip(other, found[0]):
                torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * y.abs().max().item())


class NoDoubles(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            assert not torch.is_tensor(x) or x.dtype != torch.float64, operator
        return found


def test_no_loss_computes_in_float64_where_mps_would(monkeypatch):
    """What a Mac's GPU refuses; never run on one."""
    assert [losses.wide(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [
        torch.float64, torch.float64, torch.float32]
    given = {name: (loss, [x.detach().float().requires_grad_() for x in inputs])
             for name, (loss, _, inputs, _) in make_cases(torch.float32).items()}
    # that case has videos in float64
    given["voken"] = lambda h, W, b: losses.voken(h, W, b, h.detach(), F.normalize(W.detach())), given["voken"][1]
    wanted = {name: loss(*inputs).item() for name, (loss, inputs) in given.items()}
    with NoDoubles(), pytest.raises(AssertionError, match="aten"):
        given["nst gaussian 5"][0](*given["nst gaussian 5"][1])
    monkeypatch.setattr(losses, "wide", lambda device, wide=losses.wide: wide(torch.device("mps")))
    for name, (loss, inputs) in given.items():
        with NoDoubles():
            value = loss(*inputs)
            value.backward()
        assert value.item() == pytest.approx(wanted[name], rel=1e-3), name


# ---------------------------------------------------------------------------- soft, voken


@pytest.mark.parametrize("chunk", [1, 4, 9, 64])
def test_chunked_losses_equal_autograd_on_whole_logits(chunk):
    h, W, b = randn(9, 4, seed=1, grad=True), randn(13, 4, seed=2, grad=True), randn(13, seed=3, grad=True)
    h_t, W_t, b_t, videos = randn(9, 6, seed=4), randn(13, 6, seed=5), randn(13, seed=6), randn(13, 6, seed=7)
    P_t, labels = ((h_t @ W_t.T + b_t) / 2).softmax(1), F.normalize(h_t) @ F.normalize(videos).T
    pairs = ((losses.soft(h, W, b, h_t, W_t, b_t, chunk=chunk), F.cross_entropy((h @ W.T + b) / 2, P_t)),
             (losses.voken(h, W, b, h_t, F.normalize(videos), chunk=chunk),
              F.cross_entropy(h @ W.T + b, labels.argmax(1))))
    for ours, whole in pairs:
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=0)
        for x, y in zip(torch.autograd.grad(ours, (h, W, b)), torch.autograd.grad(whole, (h, W, b))):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-14)


def test_soft_and_voken_never_hold_all_logits(tmp_path):
    n, V, C = 1024, 1500, 8
    h, W, b = randn(n, C, seed=1).float(), randn(V, C, seed=2).float(), randn(V, seed=3).float()
    for x in (h, W, b):
        x.requires_grad_()
    videos = F.normalize(randn(V, C, seed=4).float())

    def both():
        losses.soft(h, W, b, h.detach(), W.detach(), b.detach(), chunk=64).backward()
        losses.voken(h, W, b, h.detach(), videos, chunk=64).backward()
    assert peak_bytes(both, tmp_path) < 0.5 * n * V * 4


class FewBits(torch.overrides.TorchFunctionMode):
    """Products by @ have the operands of bfloat16: fewer bits than TF32's, which a GPU takes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            args = [x.bfloat16().float() for x in args]
        return function(*args, **(kwargs or {}))


def test_vokens_are_chosen_with_all_bits():
    h_t = randn(300, 64, seed=1).float()
    videos = F.normalize(randn(2000, 64, seed=2).float() + 20 * randn(64, seed=3).float(), dim=-1)
    exact = (h_t.double() @ videos.double().T).argmax(1)
    certain = 100 * F.one_hot(exact, 2000).float()  # a student that is certain of the exact labels
    with FewBits():
        assert ((h_t @ videos.T).argmax(1) != exact).float().mean() > 0.03
        assert losses.voken(certain, torch.eye(2000), torch.zeros(2000), h_t, videos).item() < 1e-6


def test_voken_takes_bf16_videos():
    h, W, b = randn(9, 4, seed=1).float(), randn(13, 4, seed=2).float(), randn(13, seed=3).float()
    videos = F.normalize(randn(13, 4, seed=4).float())
    h_t = videos[[3, 1, 4, 1, 5, 9, 2, 6, 5]]  # each its own nearest, so bf16 cannot change the label
    torch.testing.assert_close(losses.voken(h, W, b, 3 * h_t, videos.bfloat16()),
                               losses.voken(h, W, b, h_t, videos))


# ---------------------------------------------------------------------------- nst


def layernorm_states(B, T, d_s, d_t):
    return (F.layer_norm(randn(B, T, d, seed=k), (d,)).float() for k, d in enumerate((d_s, d_t)))


def test_nst_sigma_1_is_alive_on_normalised_patterns_and_dead_on_raw_states():
    s, t = layernorm_states(2, 128, 64, 48)
    mask, s = torch.ones(2, 128, dtype=torch.bool), s.requires_grad_()
    S, T = F.normalize(s.detach(), dim=1).mT, F.normalize(t, dim=1).mT
    cross = torch.exp(-torch.cdist(S, T) ** 2 / 2).mean().item()
    assert 0.05 < cross < 0.95
    (alive,) = torch.autograd.grad(losses.nst(s, t, mask), s)
    assert alive.square().mean().sqrt() > 1e-8
    raw = losses.nst(s, t, mask, normalize=False)
    (dead,) = torch.autograd.grad(raw, s)
    assert dead.abs().max() < 1e-25
    torch.testing.assert_close(raw.item(), 1 / 64 + 1 / 48, rtol=1e-4, atol=0)  # every neuron is alone


@pytest.mark.parametrize("kernel", losses.MMD)
@pytest.mark.parametrize("normalize", [True, False])
def test_nst_with_padding_equals_truncation(kernel, normalize):
    lengths, T = (7, 3, 5), 8
    s, t, mask = randn(3, T, 4, seed=1, grad=True), randn(3, T, 6, seed=2), lengths_mask(lengths, T)
    options = {"kernel": kernel, "normalize": normalize}
    padded = losses.nst(s, t, mask, **options)
    alone = [losses.nst(s[b:b + 1, :n], t[b:b + 1, :n], mask[b:b + 1, :n], **options)
             for b, n in enumerate(lengths)]
    torch.testing.assert_close(padded, sum(alone) / 3, rtol=1e-12, atol=1e-14)
    g, g_alone = (torch.autograd.grad(x, s)[0] for x in (padded, sum(alone) / 3))
    torch.testing.assert_close(g, g_alone, rtol=1e-10, atol=1e-14)
    assert g[~mask].abs().max() == 0


@pytest.mark.parametrize("T, d_s, d_t", [(5, 12, 9), (24, 6, 10)])
def test_nst_poly_gram_form_equals_neuron_form(T, d_s, d_t):
    """Gram form |SS'/d_s - TT'/d_t|^2 against the mean squared inner products of neurons, T < C and T > C."""
    s, t = randn(3, T, d_s, seed=1, grad=True), randn(3, T, d_t, seed=2)
    mask = torch.ones(3, T, dtype=torch.bool)
    S, T_ = F.normalize(s, dim=1), F.normalize(t, dim=1)

    def mean(x, y):
        return (x.mT @ y).square().mean((1, 2))
    neurons = (mean(S, S) + mean(T_, T_) - 2 * mean(S, T_)).mean()
    ours = losses.nst(s, t, mask, kernel="poly")
    torch.testing.assert_close(ours, neurons, rtol=1e-11, atol=1e-15)
    grads = (torch.autograd.grad(x, s)[0] for x in (ours, neurons))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)


def test_nst_in_several_chunks_equals_one_sequence_at_a_time():
    s, t = (randn(6, 5, d, seed=d).float() for d in (256, 384))
    s, mask = s.requires_grad_(), lengths_mask((5, 4, 3, 5, 2, 5), 5)
    assert 1 < 2 ** 19 // (256 * (256 + 384)) < 6, "the case must need several chunks of several sequences"
    whole = losses.nst(s, t, mask)
    alone = [losses.nst(s[b:b + 1], t[b:b + 1], mask[b:b + 1]) for b in range(6)]
    torch.testing.assert_close(whole, sum(alone) / 6)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (whole, sum(alone) / 6)))


def test_nst_of_equal_states_is_zero():
    s, mask = randn(2, 16, 32, seed=1).float().requires_grad_(), torch.ones(2, 16, dtype=torch.bool)
    loss = losses.nst(s, s.detach().clone(), mask)
    loss.backward()
    assert abs(loss.item()) < 1e-7 and s.grad.abs().max() < 1e-8


def test_nst_zero_pattern_stays_zero_without_nan():
    s, t, mask = randn(1, 5, 4, seed=1), randn(1, 5, 3, seed=2), torch.ones(1, 5, dtype=torch.bool)
    s[:, :, 2], t[:, :, 0] = 0, 0
    s.requires_grad_()
    for kernel in losses.MMD:
        loss = losses.nst(s, t, mask, kernel=kernel)
        torch.testing.assert_close(loss, plain_nst(s, t, mask, kernel))
        (g,) = torch.autograd.grad(loss, s)
        assert g.isfinite().all() and g[:, :, 2].abs().max() == 0 and g[:, :, 0].abs().max() > 0


def test_nst_float32_gradient_is_exact_close_to_the_teacher():
    """bf16 products are off by half at 3 % noise; float32's must not be."""
    t = F.layer_norm(randn(2, 64, 96, seed=1), (96,))
    s, mask = t + 0.03 * randn(2, 64, 96, seed=2), torch.ones(2, 64, dtype=torch.bool)
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = s.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(losses.nst(x, t.to(dtype), mask), x)[0].double())
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-3


def test_nst_peak_memory_stays_below_the_bound(tmp_path):
    B, T, d = 32, 128, 512
    s, t, mask = torch.randn(B, T, d), torch.randn(B, T, d), torch.ones(B, T, dtype=torch.bool)
    s.requires_grad_()

    def every_kernel():
        for kernel in losses.MMD:
            torch.autograd.grad(losses.nst(s, t, mask, kernel=kernel), s)
    assert peak_bytes(every_kernel, tmp_path) < 3 * B * T * d * 4 + 32e6


# ---------------------------------------------------------------------------- crd: the loss


def test_eq_8_without_tau_and_z_says_positive_at_any_cosine():
    """h = e / (e + N/M), e = exp(cosine), is above 0.99 for opposite vectors too. Tau and Z decide."""
    cosine = torch.linspace(-1, 1, 201, dtype=torch.float64)
    e = cosine.exp()
    for N, M in ((256, 868_000), (4096, 23_000_000)):  # the batch and Wiki103; 4096 and English Wikipedia
        assert (e / (e + N / M)).min() > 0.99
    bank = losses.CRDBank(5000, 128, negatives=4096)
    bank.update(np.arange(5000), *(randn(5000, 128, seed=k) for k in (1, 2)))
    bank.set_z(bank.z_s[:64], bank.z_t[:64], np.arange(64), draw(bank, 0))
    h = torch.sigmoid(cosine / bank.tau - bank.log_z[0] - math.log(4096 / 5000))
    assert h[100] < 0.01 and h[-1] > 0.9


def test_crd_value_and_gradient_have_the_law_of_draws_per_anchor():
    """Eq. 8's expectation: positive + N times the mean over rows. Draws shared by the anchors keep it."""
    N, bank = 64, filled_bank(rows=40, negatives=64, tau=0.3)
    z = [F.normalize(randn(4, 4, seed=k), dim=1).requires_grad_() for k in (1, 2)]
    slots, expected = np.array([3, 8, 30, 39]), 0

    def flat(value):
        return torch.cat([x.flatten() for x in torch.autograd.grad(value, z)] + [value.detach()[None]])
    for a, b, rows, log_z in ((z[0], z[1], bank.z_t, bank.log_z[0]), (z[1], z[0], bank.z_s, bank.log_z[1])):
        shift = log_z + math.log(N / 40)
        others = torch.from_numpy(slots[:, None] != np.arange(40))
        expected = expected + F.softplus(shift - (a * b).sum(1) / bank.tau).sum()
        expected = expected + N / 40 * (F.softplus(a @ rows.double().T / bank.tau - shift) * others).sum()
    exact = flat(expected)

    def sample(*steps):     # anchors in as many parts as there are steps, each with its own draw
        parts = np.array_split(np.arange(4), len(steps))
        return flat(sum(losses.crd(z[0][i], z[1][i], slots[i], bank, draw(bank, k), divisor=1)
                        for i, k in zip(parts, steps)))

    shared = [sample(k) for k in range(150)]
    own = [sample(*range(1000 + 4 * k, 1004 + 4 * k)) for k in range(150)]
    for drawn in map(torch.stack, (shared, own)):
        error = (drawn.mean(0) - exact).abs() / (drawn.std(0) / 150 ** 0.5)
        assert error.max() < 4.5  # standard errors, 33 entries
        assert abs(drawn[:, -1].mean() / exact[-1] - 1) < 0.02


def test_crd_leaves_the_anchors_own_sample_out():
    bank, z = filled_bank(), [F.normalize(randn(2, 4, seed=k), dim=1).requires_grad_() for k in (1, 2)]
    slots, negatives = np.array([6, 7]), np.array([6, 6, 6, 6])
    masked = losses.crd(*z, slots, bank, negatives, divisor=1)
    torch.testing.assert_close(masked, plain_crd(*z, slots, bank, negatives))
    g_s, _ = torch.autograd.grad(masked, z)
    alone = plain_crd(z[0][:1], z[1][:1], slots[:1], bank, negatives)   # no negative is left
    torch.testing.assert_close(g_s[0], torch.autograd.grad(alone, z[0])[0][0])


def test_crd_bank_rows_get_no_gradient_and_the_positives_move_both_sides():
    bank, z = filled_bank(), [F.normalize(randn(3, 4, seed=k), dim=1).requires_grad_() for k in (1, 2)]
    losses.crd(*z, np.arange(3), bank, draw(bank, 0)).backward()
    assert not bank.z_s.requires_grad and all(x.grad.abs().min() > 0 for x in z)


def test_crd_with_a_bf16_bank_is_close_and_computed_in_float32():
    z = [F.normalize(randn(3, 8, seed=k), dim=1).float().requires_grad_() for k in (1, 2)]
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        bank = filled_bank(dim=8, negatives=50, dtype=dtype)
        assert (bank.z_t.float().norm(dim=1) - 1).abs().max() < 1e-2
        values.append(losses.crd(*z, np.arange(3), bank, draw(bank, 0)))
    assert values[1].dtype == torch.float32
    torch.testing.assert_close(values[1], values[0], rtol=1e-2, atol=0)


# ---------------------------------------------------------------------------- crd: the bank


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_bank_rows_are_unit_and_untouched_rows_stay_bit_for_bit():
    bank = losses.CRDBank(10, 4, momentum=0.5)
    bank.update(np.arange(8), 5 * randn(8, 4, seed=1), 3 * randn(8, 4, seed=2))
    before, place = bank.z_s.clone(), bank.z_s.data_ptr()
    bank.update(np.array([2, 5, 9]), randn(3, 4, seed=3), randn(3, 4, seed=4))
    assert bank.z_s.data_ptr() == place
    torch.testing.assert_close(bank.z_s.norm(dim=1), torch.ones(10).index_fill(0, torch.tensor([8]), 0))
    assert torch.equal(bank.z_s[[0, 1, 3, 4, 6, 7, 8]], before[[0, 1, 3, 4, 6, 7, 8]])
    assert bank.size == 9 and (bank.sample >= 0).sum() == 9


def test_bank_momentum_has_the_hand_computed_value():
    bank = losses.CRDBank(4, 2, momentum=0.5)
    bank.update(np.array([1]), unit((1, 0)), unit((0, 1)))
    assert torch.equal(bank.z_s[1], torch.tensor([1.0, 0.0]))  # nothing there to blend with
    bank.update(np.array([1]), unit((0, 1)), unit((3, 4)))
    torch.testing.assert_close(bank.z_s[1], torch.tensor([1.0, 1.0]) / 2 ** 0.5)
    torch.testing.assert_close(bank.z_t[1], torch.tensor([0.3, 0.9]) / 0.9 ** 0.5)
    still = losses.CRDBank(4, 2, momentum=0.0)
    for z in ((1, 0), (0, 1)):
        still.update(np.array([1]), unit(z), unit(z))
    assert torch.equal(still.z_s[1], torch.tensor([0.0, 1.0]))


def test_fixed_size_bank_overwrites_and_never_blends_another_sample():
    bank = losses.CRDBank(4, 2, momentum=0.5)
    bank.update(np.array([1]), unit((1, 0)), unit((1, 0)))
    bank.update(np.array([5]), unit((0, 1)), unit((0, 1)))  # 5 mod 4 = 1: sample 5 takes sample 1's slot
    assert torch.equal(bank.z_s[1], torch.tensor([0.0, 1.0])) and bank.size == 1
    bank.update(np.array([5]), unit((1, 0)), unit((1, 0)))  # sample 5 again: now it blends
    torch.testing.assert_close(bank.z_s[1], torch.tensor([1.0, 1.0]) / 2 ** 0.5)


def test_bank_takes_the_last_of_equal_slots():
    bank = losses.CRDBank(4, 2)
    bank.update(np.array([2, 0, 6, 0]), *[unit((1, 0), (1, 0), (0, 1), (3, 4))] * 2)
    assert torch.equal(bank.z_s[2], torch.tensor([0.0, 1.0])) and bank.sample[2] == 6
    torch.testing.assert_close(bank.z_s[0], torch.tensor([0.6, 0.8]))
    assert bank.size == 2


@pytest.mark.parametrize("rows, momentum", [(64, 0.5), (16, 0.5), (16, 0.0)])
def test_bank_update_equals_out_of_place_reference(rows, momentum):
    bank, reference, holder = losses.CRDBank(rows, 3, momentum=momentum), torch.zeros(rows, 3), {}
    other_rank = losses.CRDBank(rows, 3, momentum=momentum)
    rng = np.random.default_rng(0)
    for step in range(12):
        index = rng.integers(0, 64, 10)
        z_s, z_t = (F.normalize(randn(10, 3, seed=k), dim=1).float() for k in (step, 99))
        new = reference.clone()
        for i in sorted({int(k) % rows for k in index}):
            last = max(p for p in range(10) if index[p] % rows == i)
            m = momentum if holder.get(i) == index[last] else 0.0
            new[i] = F.normalize(m * reference[i] + (1 - m) * z_s[last], dim=0)
            holder[i] = index[last]
        reference = new
        bank.update(index, z_s, z_t)
        other_rank.update(index, z_s, z_t)
        torch.testing.assert_close(bank.z_s, reference)
    assert torch.equal(bank.z_s, other_rank.z_s) and torch.equal(bank.z_t, other_rank.z_t)
    assert sorted(holder) == sorted(bank.filled[:bank.size]) == np.flatnonzero(bank.sample >= 0).tolist()


def test_draws_are_keyed_uniform_and_from_written_rows_only():
    bank, index = losses.CRDBank(1000, 2, negatives=500), np.array([7, 999, 30, 512])
    bank.update(index, randn(4, 2, seed=1), randn(4, 2, seed=2))
    a, b, *others = (draw(bank, step, seed) for step, seed in ((3, 4), (3, 4), (3, 5), (4, 4)))
    assert a.dtype == np.int64 and a.shape == (500,) and np.array_equal(a, b)
    assert not any(np.array_equal(a, other) for other in others)
    many = np.concatenate([draw(bank, k) for k in range(20)])
    slots, counts = np.unique(many, return_counts=True)
    assert slots.tolist() == sorted(index) and abs(counts / len(many) - 0.25).max() < 0.025
    with pytest.raises(AssertionError, match="first update"):
        draw(losses.CRDBank(10, 2), 0)


def test_z_is_the_mean_over_foreign_rows_and_constant():
    bank = filled_bank(log_z=None)
    z = [F.normalize(randn(2, 4, seed=k), dim=1).float() for k in (1, 2)]
    slots, negatives = np.array([3, 5]), np.array([3, 5, 6, 6])
    bank.set_z(*z, slots, negatives)
    for side, (x, rows) in enumerate(((z[0], bank.z_t), (z[1], bank.z_s))):
        e = [math.exp(float(x[i] @ rows[n]) / bank.tau) for i in range(2) for n in negatives if n != slots[i]]
        assert bank.log_z[side] == pytest.approx(math.log(20 * sum(e) / len(e)), rel=1e-5)
    before = list(bank.log_z)
    bank.update(np.arange(5), randn(5, 4, seed=9), randn(5, 4, seed=10))
    with pytest.raises(AssertionError, match="constant"):
        bank.set_z(*z, slots, negatives)
    assert bank.log_z == before


def test_m_cancels():
    values = []
    for rows in (20, 2000):
        bank = losses.CRDBank(rows, 4, negatives=30)
        bank.update(np.arange(20), randn(20, 4, seed=1), randn(20, 4, seed=2))
        z = [F.normalize(randn(3, 4, seed=k), dim=1).float() for k in (3, 4)]
        bank.set_z(*z, np.arange(3), draw(bank, 0))
        values.append(losses.crd(*z, np.arange(3), bank, draw(bank, 0)))
    torch.testing.assert_close(*values)


def test_bank_state_survives_a_file(tmp_path):
    bank = losses.CRDBank(50, 4, negatives=20, momentum=0.5)
    bank.update(np.array([4, 90, 17]), randn(3, 4, seed=1), randn(3, 4, seed=2))
    z = [F.normalize(randn(2, 4, seed=k), dim=1).float() for k in (3, 4)]
    bank.set_z(*z, np.array([4, 17]), draw(bank, 0))
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other = losses.CRDBank(50, 4, negatives=20, momentum=0.5)
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for b in (bank, other):
        b.update(np.array([90, 8]), randn(2, 4, seed=5), randn(2, 4, seed=6))
    assert torch.equal(bank.z_s, other.z_s) and torch.equal(bank.z_t, other.z_t)
    assert np.array_equal(draw(bank, 7), draw(other, 7)) and bank.log_z == other.log_z
    assert torch.equal(*(losses.crd(*z, np.array([4, 17]), b, draw(b, 7)) for b in (bank, other)))
    with pytest.raises(ValueError, match=r"\(50, 4\).*\(40, 4\)"):
        losses.CRDBank(40, 4).load_state_dict(bank.state_dict())


def test_nbytes_is_what_the_rows_take():
    for dtype in (torch.float32, torch.bfloat16):
        bank = losses.CRDBank(30, 8, dtype=dtype)
        assert losses.CRDBank.nbytes(30, 8, dtype) == bank.z_s.nbytes + bank.z_t.nbytes


# ---------------------------------------------------------------------------- docs/losses.md


def test_snippets_of_the_page_on_losses_run_and_print_what_it_shows(tmp_path, monkeypatch, capsys):
    """In order, in one process. Printed lines are compared without their numbers, which depend on the processor."""
    def words(line):
        return " ".join(re.sub(r"-?\b(\d[\d.]*(e[-+]\d+)?|inf|nan)\b", "#", line).split())
    text = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    (tmp_path / "page.py").write_text("\n".join(snippets))
    monkeypatch.setattr(losses, "MMD", dict(losses.MMD))  # an exercise adds a kernel
    with torch.random.fork_rng():
        runpy.run_path(str(tmp_path / "page.py"))
    printed = {words(line) for line in capsys.readouterr().out.splitlines()}
    shown = re.findall(r"^<!-- measured: the snippet .*?-->\n\n((?:    .*\n)+)", text, re.M)
    assert len(snippets) == 10 and len(shown) == 7
    assert not {words(line) for block in shown for line in block.splitlines()} - printed
