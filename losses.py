"""Every objective of teacher and student. A loss returns its sum over items / divisor, in float32.

teacher (VidLanKD, Tang et al. 2021; c(x, y): cosine, a: margin, x': another text, v': another video)
  mlm             - log softmax(logits)[target]                                          per masked position
  hinge           [a - c(h_i, v) + c(h'_i, v)]_+ + [a - c(h_i, v) + c(h_i, v')]_+        Eq. 3, per token
  hinge_all       the same, mean over every other item of the batch
  infonce_tokens  mean of two cross-entropies of c(h_i, v) / temperature, over videos and over texts
  clip            mean of two cross-entropies of r c(text, video), over videos and over texts
student (s, t: states of student and teacher, d_s and d_t wide; the teacher is frozen)
  soft            - sum_z P_t(z) log P_s(z), P = softmax(logits / tau)                   Eq. 5, per token
  l2              |s - t|^2                                                              Eq. 6, per token
  nst             squared MMD of the neurons s_i and t_j under a Gaussian kernel         Eq. 7, per sequence
  crd             softplus(-l_positive) + sum softplus(l_negative), both directions      Eq. 8, per anchor
  voken           - log softmax(head(s))[argmax_k c(t, video_k)]                         Eq. 9, per token
adaptation (XDBERT, Hsu et al. 2022; cross-entropies beside)
  itc             clip, between a text's mean state and CLIP's fixed vector of it        ours, per segment

divisor: None = the number of items present, which makes the mean. A script passes the items of the GLOBAL
batch / number of ranks: ranks and micro-batches together then make the step of one process on the whole
batch. 1 / number of ranks makes the papers' sums. float64 stays float64. nst, crd, soft and voken compute
their gradient with their value: no large intermediate is kept, backward only scales, once.

Shapes: B sequences, T tokens, C hidden, V vocabulary, K vokens, A anchors, N negatives, E projection, M bank
rows. mask: bool (B, T), True = real token. _s student, _t teacher.
"""
import contextlib
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------- precision, gradients, divisor


def float32(loss):
    """Decorator: autocast is off inside; half-precision tensors are upcast, and their gradients cast back."""
    def upcast(x):
        return x.float() if torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16) else x

    @functools.wraps(loss)
    def run(*args, **kwargs):
        device = next(x.device for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(upcast, args), **{name: upcast(x) for name, x in kwargs.items()})
    return run


@contextlib.contextmanager
def no_tf32():
    """CUDA products with all bits of float32: TF32 keeps 10, too few for the differences in nst and crd."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Fused(torch.autograd.Function):
    """apply(value, grads, *inputs) -> value, with grads as its gradients to the inputs."""

    @staticmethod
    def forward(ctx, value, grads, *inputs):
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return None, None, *(upstream * grad for grad in ctx.saved_tensors)


def per_item(total, items, divisor):
    """total / divisor; where that is None, / items (a number or a 0-d tensor; 0 items: total)."""
    return total / (torch.as_tensor(items).clamp(min=1) if divisor is None else divisor)


def to_device(array, device):
    """numpy -> tensor. A blocking copy would wait for all that the GPU has queued."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def chunk_rows(device, floats, on_cpu):
    """Rows that a loss takes at a time, each with `floats` intermediate numbers of 4 bytes, at least 1.

    on_cpu there; on a GPU as many as fill 1/32 of its memory: few, large operators. Asks no driver: PyTorch
    keeps a device's properties. MPS does not tell its memory: 8 GiB, the smallest Mac's.
    """
    if device.type == "cpu":
        return max(1, on_cpu)
    memory = 2 ** 33 if device.type == "mps" else torch.cuda.get_device_properties(device).total_memory
    return max(1, memory // 32 // (4 * floats))


def wide(device):
    """The dtype of sums that cancel: float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---------------------------------------------------------------------------- teacher


@float32
def mlm(logits: Tensor, targets: Tensor, divisor: float | None = None) -> Tensor:
    """Masked-language modelling (Devlin et al. 2019): cross-entropy at n masked positions, its items.

    logits (n, V), targets int64 (n,), -100 = padding, which is no item. n = 0 gives an exact 0 with a graph.
    """
    return per_item(F.cross_entropy(logits, targets, reduction="sum"), (targets >= 0).sum(), divisor)


def hinge_partners(text_mask: Tensor, draw: Callable, *keys) -> tuple:
    """Draws for hinge: x' and v' of each item, independent, each uniform among the micro-batch's OTHER items.

    text_mask (B, T) on the CPU, B >= 2, a real token in each row. draw(high, name, *keys): uniform integers
    below high, a function of the keys; the last of them is (B,) and tells the items apart.
    -> int64 partner (B,), partner_v (B,), partner_token (B, T): i where token i of x' is real, else the place
    of a uniformly drawn real token of x'.
    """
    mask = text_mask.numpy()
    B, T = mask.shape
    assert B > 1 and mask.any(1).all(), f"hinge: needs 2 texts, none empty; got {mask.sum(1).tolist()}"
    partner, partner_v = ((np.arange(B) + 1 + draw(B - 1, name, *keys)) % B
                          for name in ("hinge text", "hinge video"))
    real = mask[partner]
    drawn = draw(real.sum(1)[:, None], "hinge token", *keys[:-1], keys[-1][:, None], np.arange(T))
    real_first = np.argsort(~real, axis=1, kind="stable")
    partner_token = np.where(real, np.arange(T), np.take_along_axis(real_first, drawn, 1))
    return tuple(torch.from_numpy(x) for x in (partner, partner_v, partner_token))


def cosines(h, v):
    """h (B, T, C), v (B, C) -> cos (B, T, B), [b, i, c]: token i of text b, video c; own (B, T): c = b."""
    cos = F.normalize(h, dim=-1) @ F.normalize(v, dim=-1).T
    return cos, cos.diagonal(dim1=0, dim2=2).T


@float32
def hinge(h: Tensor, v: Tensor, text_mask: Tensor, partner: Tensor, partner_v: Tensor, partner_token: Tensor,
          margin: float = 1.0, divisor: float | None = None) -> Tensor:
    """Token-level contrastive hinge with one negative text and one negative video, VidLanKD Eq. 3:

        max(0, a - cos(h_i, v) + cos(h'_i, v)) + max(0, a - cos(h_i, v) + cos(h_i, v'))
    h (B, T, C) token states, v (B, C) videos, text_mask (B, T): real tokens without [CLS] and [SEP].
    partner, partner_v (B,): rows of x' and v'; partner_token (B, T): the token of x' that is h'_i (see
    hinge_partners). items: tokens of text_mask. The released code has the second term only.
    """
    b = torch.arange(len(v), device=v.device)
    cos, own = cosines(h, v)
    text = (margin - own + cos[partner[:, None], partner_token, b[:, None]]).clamp(min=0)
    video = (margin - own + cos[b, :, partner_v]).clamp(min=0)
    return per_item(((text + video) * text_mask).sum(), text_mask.sum(), divisor)


@float32
def hinge_all(h: Tensor, v: Tensor, text_mask: Tensor, margin: float = 1.0,
              divisor: float | None = None) -> Tensor:
    """Eq. 3 with every other item of the batch as a negative: hinge's expectation without its variance.

    First term: mean over the other texts whose token i is real, 0 where there is none (the expectations are
    equal if the texts are equally long). Second: mean over all other videos. Arguments, items: as in hinge.
    """
    B = len(v)
    cos, own = cosines(h, v)
    others = ~torch.eye(B, dtype=torch.bool, device=v.device)[:, None, :]       # (B, 1, B)
    same_place = others & text_mask.T                                           # (B, T, B), last: text c
    text = (margin - own[..., None] + cos.transpose(0, 2)).clamp(min=0)         # (B, T, B), last: text c
    text = (text * same_place).sum(-1) / same_place.sum(-1).clamp(min=1)
    video = (margin - own[..., None] + cos).clamp(min=0)                        # (B, T, B), last: video c
    video = (video * others).sum(-1) / (B - 1)
    return per_item(((text + video) * text_mask).sum(), text_mask.sum(), divisor)


@float32
def infonce_tokens(h: Tensor, v: Tensor, text_mask: Tensor, temperature: float = 0.07,
                   divisor: float | None = None) -> Tensor:
    """Token-level InfoNCE in the hinge's place, e_bic = exp(cos(h_bi, v_c) / temperature):

        - 1/2 log(e_bib / sum_c e_bic) - 1/2 log(e_bib / sum_c e_cib)
    The first sum is over all videos c, the second over the texts c whose token i is real. Arguments, items:
    as in hinge.
    """
    cos, own = cosines(h, v)
    texts = (cos.transpose(0, 2) / temperature).masked_fill(~text_mask.T, -math.inf)    # (B, T, B)
    # where token i is padding in all texts, -inf everywhere would make the gradient NaN
    texts = torch.where(text_mask[..., None], texts, 0.0)
    loss = ((cos / temperature).logsumexp(-1) + texts.logsumexp(-1)) / 2 - own / temperature
    return per_item((loss * text_mask).sum(), text_mask.sum(), divisor)


@float32
def clip(z_text: Tensor, z_video: Tensor, log_scale: Tensor, divisor: float | None = None,
         mask: Tensor | None = None, others: tuple = ()) -> Tensor:
    """Sentence-level symmetric InfoNCE with a learned temperature (Radford et al. 2021), at c = b:

        - 1/2 log softmax_c(r cos(text_b, video_c)) - 1/2 log softmax_c(r cos(text_c, video_b))
    z_text, z_video (B, E), normalised here; log_scale: 0-d, r = min(100, exp(log_scale)); mask (B,): real
    pairs, None = all. items: pairs. others: (z_text, z_video, mask) of the batch's other parts, constants,
    whose pairs are negatives, too. Values and gradients of all parts then add up to the whole batch's.
    Memory: a few matrices of the scores of all pairs.
    """
    B, scale = len(z_text), log_scale.exp().clamp(max=100)
    mask = mask if mask is not None else torch.ones(B, dtype=torch.bool, device=z_text.device)
    items = mask.sum()
    if others:
        z_text, z_video, mask = (torch.cat(both) for both in zip((z_text, z_video, mask), others))
    cos = F.normalize(z_text, dim=-1) @ F.normalize(z_video, dim=-1).T          # (N, N), the own pairs first

    def total(scores, pairs):
        # not -inf: where all are masked its gradient is NaN
        scores = scores.masked_fill(~(mask & mask[:, None]), torch.finfo(scores.dtype).min / 4)
        loss = (scores[pairs].logsumexp(1) + scores[:, pairs].logsumexp(0)) / 2 - scores.diagonal()[pairs]
        return (loss * mask[pairs]).sum()
    loss = total(scale * cos, slice(B))
    if others:  # the own sides are negatives of the others' pairs: gradient alone, they have the value
        pull = total(scale.detach() * cos, slice(B, None))
        loss = loss + (pull - pull.detach())
    return per_item(loss, items, divisor)


# ---------------------------------------------------------------------------- student: soft, voken, l2, nst


@float32
def chunked_cross_entropy(h, W, b, target, chunk):
    """Summed cross-entropy of softmax(h W' + b); at most `chunk` rows of the (n, V) logits exist at once.

    h (n, C), W (V, C), b (V,) get gradients, by d loss / d logits = softmax(logits) - target.
    target(rows): (c, V) probabilities or (c,) labels of a slice of rows. chunk None: see chunk_rows.
    """
    chunk = chunk or chunk_rows(h.device, 4 * len(W), 256)
    with torch.no_grad():
        total, dh, dW, db = h.new_zeros(()), *(torch.zeros_like(x) for x in (h, W, b))
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            wanted = target(rows)
            logits = torch.addmm(b, h[rows], W.T)
            log_sum = logits.logsumexp(1, keepdim=True)
            if wanted.dim() == 2:
                total += log_sum.sum() - torch.einsum("nv,nv->n", wanted, logits).sum()
                delta = logits.sub_(log_sum).exp_().sub_(wanted)
            else:
                total += log_sum.sum() - logits.gather(1, wanted[:, None]).sum()
                delta = logits.sub_(log_sum).exp_()
                delta.scatter_add_(1, wanted[:, None], torch.full_like(log_sum, -1))
            torch.mm(delta, W, out=dh[rows])
            dW.addmm_(delta.T, h[rows])
            db += delta.sum(0)
    return Fused.apply(total, [dh, dW, db], h, W, b)


@float32
def soft(h_s: Tensor, W_s: Tensor, b_s: Tensor, h_t: Tensor, W_t: Tensor, b_t: Tensor, tau: float = 2.0,
         divisor: float | None = None, chunk: int | None = None) -> Tensor:
    """Soft labels: cross-entropy of the teacher's and the student's word distributions, VidLanKD Eq. 5:

        - sum_z P_t(z) log P_s(z),  P = softmax((h W' + b) / tau), without a factor tau^2
    h_s (n, C_s), h_t (n, C_t): n real tokens after the LM heads' dense, GELU and LayerNorm; W_s (V, C_s),
    W_t (V, C_t), b_s, b_t (V,): the heads' decoders. Gradients to h_s, W_s, b_s. items: tokens.
    chunk: rows of logits at a time, None: see chunk_rows; memory peaks at 4 chunk V floats.
    """
    h_t, W_t, b_t = h_t.detach() / tau, W_t.detach(), b_t.detach() / tau

    def teacher(rows):
        return torch.addmm(b_t, h_t[rows], W_t.T).softmax(1)
    return per_item(chunked_cross_entropy(h_s / tau, W_s, b_s / tau, teacher, chunk), len(h_s), divisor)


def voken(h_s: Tensor, W: Tensor, b: Tensor, h_t: Tensor, videos: Tensor,
          divisor: float | None = None, chunk: int | None = None) -> Tensor:
    """Vokens: each token's label is the video nearest to the teacher's state, VidLanKD Eq. 9:

        - log softmax(W h_s + b)[argmax_k cos(h_t, videos_k)]
    h_s (n, C_s), h_t (n, C_t): states of n real tokens; W (K, C_s), b (K,): the voken head; videos (K, C_t):
    L2-normalised rows. A GPU's product has TF32's 10 bits, so the best 8 are compared once more, with all
    bits. Gradients to h_s, W, b. items: tokens. chunk: as in soft.
    """
    h_t, few = h_t.detach().to(videos.dtype), min(8, len(videos))

    def nearest(rows):
        best = (h_t[rows] @ videos.T).topk(few).indices                         # (c, 8)
        return best.gather(1, (h_t[rows, None] * videos[best]).sum(-1).argmax(1, keepdim=True))[:, 0]
    return per_item(chunked_cross_entropy(h_s, W, b, nearest, chunk), len(h_s), divisor)


@float32
def l2(s: Tensor, t: Tensor, mask: Tensor, divisor: float | None = None) -> Tensor:
    """Squared distance of the last hidden states, summed over channels: |s_i - t_i|^2, VidLanKD Eq. 6.

    s, t (B, T, C), equally wide. Gradient to s. items: real tokens.
    """
    return per_item(((s - t.detach()).square().sum(-1) * mask).sum(), mask.sum(), divisor)


def mmd_gaussian(S, T, sigma):
    """k(x, y) = exp(-|x - y|^2 / (2 sigma^2)). S (c, L, d_s), T (c, L, d_t): the columns are the two samples.

    -> MMD^2 (c,), its cancelling sums in float64 (see wide), and d MMD^2 / dS. With g = 1/sigma^2, Z = [S, T]
    and r = d_s/d_t:
        K  = exp(g (S'Z - |s|^2/2 - |z|^2/2))                                       one product, exp in place
        dS = 2g/d_s^2 [S K_ss - r T K_st' - S diag(rowsum K_ss - r rowsum K_st)]    one product
    Distances stay squared: the root's gradient at zero is NaN.
    """
    d_s, d_t, g = S.shape[-1], T.shape[-1], sigma ** -2
    r = d_s / d_t
    Z = torch.cat([S, T], -1)
    bias = Z.square().sum(1, keepdim=True).mul_(-g / 2)                         # (c, 1, d_s + d_t)
    tt = torch.baddbmm(bias[..., d_s:], T.mT, T, alpha=g).add_(bias[..., d_s:].mT).exp_().sum(-1)
    K = torch.baddbmm(bias, S.mT, Z, alpha=g).add_(bias[..., :d_s].mT).exp_()   # (c, d_s, d_s + d_t)
    K.diagonal(dim1=1, dim2=2).fill_(1)     # k(s_i, s_i): its rounding error can outweigh the gradient
    ss, st = K[..., :d_s].sum(-1), K[..., d_s:].sum(-1)                         # (c, d_s)
    total_ss, total_tt, total_st = (x.to(wide(x.device)).sum(-1) for x in (ss, tt, st))     # (c,)
    Z[..., d_s:] *= -r
    dS = torch.bmm(Z, K.mT).addcmul_(S, (r * st - ss)[:, None]).mul_(2 * g / d_s ** 2)
    return total_ss / d_s ** 2 + total_tt / d_t ** 2 - 2 * total_st / (d_s * d_t), dS


def mmd_poly(S, T, sigma):
    """k(x, y) = (x.y)^2 (no constant): MMD^2 = |SS'/d_s - TT'/d_t|_F^2, L x L and never negative."""
    d_s, d_t = S.shape[-1], T.shape[-1]
    D = torch.bmm(S, S.mT).div_(d_s).baddbmm_(T, T.mT, alpha=-1 / d_t)          # (c, L, L)
    return D.square().sum((1, 2)), torch.bmm(D, S).mul_(4 / d_s)


def mmd_linear(S, T, sigma):
    """k(x, y) = x.y: MMD^2 = |mean of S's columns - mean of T's columns|^2."""
    D = S.mean(-1, keepdim=True) - T.mean(-1, keepdim=True)                     # (c, L, 1)
    return D.square().sum((1, 2)), (D * (2 / S.shape[-1])).expand_as(S).clone()


MMD = {"gaussian": mmd_gaussian, "poly": mmd_poly, "linear": mmd_linear}


@float32
@no_tf32()
def nst(s: Tensor, t: Tensor, mask: Tensor, kernel: str = "gaussian", sigma: float = 1.0,
        normalize: bool = True, divisor: float | None = None) -> Tensor:
    """Neuron selectivity transfer: squared MMD of the student's and the teacher's neurons, VidLanKD Eq. 7:

        sum_ij k(s_i, s_j) / d_s^2 + sum_ij k(t_i, t_j) / d_t^2 - 2 sum_ij k(s_i, t_j) / (d_s d_t)
    s (B, T, d_s), t (B, T, d_t): neuron i is the pattern s[b, :, i] over the tokens of ONE sequence; special
    tokens count, padding is zeroed. kernel: gaussian, exp(-|x - y|^2 / (2 sigma^2)); poly, (x.y)^2; linear,
    x.y. normalize: a pattern is divided by max(its norm, 1e-6), as in Huang and Wang 2017 and the released
    code; one below 1e-6 gets no gradient. Eq. 7 has no normalisation, but the squared distance of LayerNorm
    states is about 2T: exp(-T) underflows, and so does the gradient. Gradient to s. items: sequences (the
    released code divides by T and omits the teacher's own sum). Memory: d loss / ds and the kernel of a few
    sequences.
    """
    B, L, d_s, d_t = *s.shape, t.shape[-1]
    entries = max(d_s * (d_s + d_t), L * L)  # of a sequence's kernel; a CPU core's cache holds 2^19
    chunk = chunk_rows(s.device, entries + 4 * L * (d_s + d_t), 2 ** 19 // entries)
    with torch.no_grad():
        total, grad = s.new_zeros((), dtype=wide(s.device)), torch.empty_like(s)
        for start in range(0, B, chunk):
            rows = slice(start, start + chunk)
            S, T = (x[rows] * mask[rows, :, None] for x in (s, t))
            if normalize:
                norm, norm_t = (x.square().sum(1, keepdim=True).sqrt_() for x in (S, T))
                S.div_(norm.clamp(min=1e-6))
                T.div_(norm_t.clamp(min=1e-6))
            mmd, dS = MMD[kernel](S, T, sigma)
            if normalize:
                # through s / |s|: the part along the pattern falls away
                dS.addcmul_(S, (S * dS).sum(1, keepdim=True), value=-1)
                dS.div_(norm.masked_fill_(norm < 1e-6, math.inf))
            grad[rows] = dS
            total += mmd.sum()
    return per_item(Fused.apply(total.to(s.dtype), [grad], s), B, divisor)


# ---------------------------------------------------------------------------- student: crd


class CRDBank:
    """The memory of crd: the latest z_s and z_t of each data sample, M unit rows of E (Tian et al. 2020).

    A sample's slot is its index mod M; in a bank with fewer rows than samples a newcomer overwrites. The CPU
    knows which slots are filled and by which sample (12 M bytes): neither draw nor update waits for a GPU. No
    buffer of a module: DDP would overwrite the other ranks' rows with rank 0's. All ranks gather the global
    batch, make the same update and draw with the same keys.
    """

    def __init__(self, rows: int, dim: int, negatives: int = 4096, tau: float = 0.07, momentum: float = 0.0,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """rows M, dim E, negatives N a step, temperature tau, momentum of a row (0 at token level, 0.5 at
        sentence level), dtype and device of the rows; scores are always float32."""
        self.rows, self.negatives, self.tau, self.momentum = rows, negatives, tau, momentum
        self.z_s, self.z_t = (torch.zeros(rows, dim, dtype=dtype, device=device) for _ in range(2))
        self.sample = np.full(rows, -1, np.int64)   # the sample in a slot; -1: none yet
        self.filled = np.zeros(rows, np.int32)      # [:size]: the slots that hold one, in order of filling
        self.size = 0
        self.log_z = None                           # [student over teacher rows, teacher over student rows]

    @staticmethod
    def nbytes(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the rows of both sides on their device."""
        return 2 * rows * dim * dtype.itemsize

    def draw(self, draw: Callable, seed: int, step: int) -> np.ndarray:
        """The step's negatives: slots (N,) int64, uniform with replacement among the filled ones.

        draw(high, *keys): as in hinge_partners. All ranks and micro-batches get the same.
        """
        assert self.size > 0, "CRDBank.draw before the first update: write the first global batch, then draw"
        return self.filled[draw(self.size, "crd", seed, step, np.arange(self.negatives))].astype(np.int64)

    @torch.no_grad()
    def update(self, index: np.ndarray, z_s: Tensor, z_t: Tensor) -> None:
        """row <- normalise(m row + (1 - m) z) where the slot holds the same sample, else normalise(z).

        index (n,): samples of the WHOLE global batch, in its order; z_s, z_t (n, E), gathered from all ranks.
        The last of equal slots wins. In place on the touched rows: the time does not depend on M.
        """
        slot = index % self.rows
        last = np.sort(len(slot) - 1 - np.unique(slot[::-1], return_index=True)[1])
        slot, index = slot[last], index[last]
        keep = (self.momentum * (self.sample[slot] == index)).astype(np.float32)[:, None]
        new = slot[self.sample[slot] < 0]
        self.filled[self.size:self.size + len(new)] = new
        self.size += len(new)
        self.sample[slot] = index
        slot, last, keep = (to_device(x, self.z_s.device) for x in (slot, last, keep))
        for bank, z in ((self.z_s, z_s), (self.z_t, z_t)):
            row = keep * bank.index_select(0, slot) + (1 - keep) * z.index_select(0, last)
            bank.index_copy_(0, slot, F.normalize(row, dim=1).to(bank.dtype))

    def scores(self, z, side, slots, negatives):
        """z (A, E) against the drawn rows b (N, E) of the OTHER side (side 0: z is the student's).

        -> z.b / tau (A, N), -inf where a row holds the anchor's own sample, and b.
        """
        slots, negatives = (to_device(x, z.device) for x in (slots, negatives))
        rows = (self.z_t, self.z_s)[side].index_select(0, negatives).to(z.dtype)
        return (z / self.tau @ rows.T).masked_fill_(slots[:, None] == negatives, -math.inf), rows

    @torch.no_grad()
    @no_tf32()
    def set_z(self, z_s: Tensor, z_t: Tensor, slots: np.ndarray, negatives: np.ndarray) -> None:
        """Z = M mean exp(z.b / tau), one per direction, from the first GLOBAL batch, then constant.

        z_s, z_t (A, E), slots (A,): its anchors, gathered from all ranks; negatives (N,): drawn after the
        batch was written. M cancels in l = z.b / tau - log Z - log(N / M); the paper writes it.
        """
        assert self.log_z is None, "CRDBank.set_z: Z is set already, and constant"
        self.log_z = []
        for side, z in enumerate((z_s, z_t)):
            scores = self.scores(z.float(), side, slots, negatives)[0].cpu().double()  # MPS has no float64
            scores = scores[scores.isfinite()]
            assert len(scores), "CRDBank.set_z: all rows drawn are the anchor's own; needs 2 samples"
            self.log_z.append(scores.logsumexp(0).item() - math.log(len(scores)) + math.log(self.rows))

    def state_dict(self) -> dict:
        """The live tensors and plain numbers, for torch.save."""
        return {"z_s": self.z_s, "z_t": self.z_t, "sample": torch.from_numpy(self.sample),
                "filled": torch.from_numpy(self.filled), "size": self.size, "log_z": self.log_z}

    def load_state_dict(self, state: dict) -> None:
        """A state_dict of a bank of the same rows and dim, of any device and dtype; else ValueError."""
        if state["z_s"].shape != self.z_s.shape:
            raise ValueError(f"a CRD bank of {tuple(state['z_s'].shape)} is none of {tuple(self.z_s.shape)}")
        self.z_s.copy_(state["z_s"])
        self.z_t.copy_(state["z_t"])
        self.sample[:], self.filled[:] = state["sample"].numpy(), state["filled"].numpy()
        self.size, self.log_z = state["size"], state["log_z"]


@float32
@no_tf32()
def crd(z_s: Tensor, z_t: Tensor, slots: np.ndarray, bank: CRDBank, negatives: np.ndarray,
        divisor: float | None = None, loss: str = "nce") -> Tensor:
    """Contrastive representation distillation, VidLanKD Eq. 8 (Tian et al. 2020), in log space:

        softplus(-l_positive) + sum over N negatives of softplus(l),  l = z_s.z_t / tau - log Z - log(N / M)
    which is -log h(positive) - sum log(1 - h(negative)), h = e / (e + N/M), e = exp(z_s.z_t / tau) / Z. Two
    directions are added: student anchors over teacher rows, teacher anchors over student rows. The paper
    prints no tau and no Z (ours are RepDistiller's); without them h > 0.99 at any cosine and nothing is
    learned.
    z_s, z_t (A, E): f_1 and f_2 of the anchors, L2-normalised. A positive sends gradient into both, a
    negative, a bank row, into the anchor alone. slots (A,): the anchors' own; negatives (N,): bank.draw,
    shared by the anchors, which keeps the expectation; an anchor's own sample is left out. items: anchors.
    loss="infonce": cross-entropy of the positive against the same negatives at the same tau, without Z.
    """
    assert loss in ("nce", "infonce"), f"crd: loss {loss!r}, not nce or infonce"
    assert loss == "infonce" or bank.log_z, "crd before CRDBank.set_z"
    with torch.no_grad():
        positive = (z_s * z_t).sum(-1) / bank.tau                               # (A,)
        total, grads = z_s.new_zeros(()), [torch.zeros_like(z_s), torch.zeros_like(z_t)]
        for side, (anchor, other) in enumerate(((z_s, z_t), (z_t, z_s))):
            negative, rows = bank.scores(anchor, side, slots, negatives)        # (A, N), (N, E)
            if loss == "nce":
                shift = bank.log_z[side] + math.log(len(negatives) / bank.rows)
                l_positive, l_negative = positive - shift, negative.sub_(shift)
                total += F.softplus(-l_positive).sum() + F.softplus(l_negative).sum()
                d_positive, d_negative = -torch.sigmoid(-l_positive), l_negative.sigmoid_()
            else:
                log_sum = torch.logaddexp(positive, negative.logsumexp(1))
                total += (log_sum - positive).sum()
                d_positive, d_negative = (positive - log_sum).expm1(), negative.sub_(log_sum[:, None]).exp_()
            grads[side].addmm_(d_negative, rows, alpha=1 / bank.tau)
            grads[side].addcmul_(d_positive[:, None], other, value=1 / bank.tau)
            grads[1 - side].addcmul_(d_positive[:, None], anchor, value=1 / bank.tau)
    return per_item(Fused.apply(total, grads, z_s, z_t), len(z_s), divisor)


# ---------------------------------------------------------------------------- adaptation


def itc(z: Tensor, z_clip: Tensor, log_scale: Tensor, mask: Tensor, divisor: float | None = None,
        others: tuple = ()) -> Tensor:
    """Image-text contrast (ITC; Li et al. 2021, ALBEF) with CLIP's text in the image's place: clip, in which
    CLIP's side is fixed.

    z (B, E): a map of the language encoder's mean states; z_clip (B, E): CLIP's states at the end of the same
    texts, which stand for images of them (XDBERT Eq. 2 and 3). Gradients to z and log_scale. All else: clip.
    """
    return clip(z, z_clip.detach(), log_scale, divisor, mask, others)
