"""What bench.py compares ours with: plain forms of the losses, and the structures of the released codes.

Not for training. bench.py checks that their values and gradients are ours.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import BERT, CLIPLayer, CrossAttention, CrossLayer, DistillHead, MLMHead

# ---------------------------------------------------------------------------- plain forms of the losses


# x, y (d, T) -> (d, d), by way of all (d, d, T) differences (sigma 1) or products (degree 2), as released
KERNELS = {"gaussian": lambda x, y: (-(x[:, None] - y[None]).square().sum(-1) / 2).exp(),
           "poly": lambda x, y: (x[:, None] * y[None]).sum(-1).square()}
# x, y (B, d, T) -> squared distances (B, d, d)
DISTANCES = {"cdist": lambda x, y: torch.cdist(x, y).square(),
             "bmm": lambda x, y: (x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
                                  - 2 * torch.bmm(x, y.transpose(1, 2)))}


def nst_loop(s, t, kernel, teacher_term=True):
    """Eq. 7, sample by sample; s, t (B, T, d). The released code leaves the teacher's (constant) term out."""
    total = 0.0
    for S, T in zip(s, t):
        S, T = (F.normalize(x, dim=0, eps=1e-6).T for x in (S, T))              # (d, T)
        total = total + kernel(S, S).mean() - 2 * kernel(S, T).mean()
        if teacher_term:
            total = total + kernel(T, T).mean()
    return total / len(s)


def nst_batched(s, t, distances):
    """Eq. 7 for the whole batch, gradient by autograd."""
    S, T = (F.normalize(x, dim=1, eps=1e-6).transpose(1, 2) for x in (s, t))    # (B, d, T)
    ss, tt, st = ((-distances(x, y) / 2).exp().mean() for x, y in ((S, S), (T, T), (S, T)))
    return ss + tt - 2 * st


def crd_gather(z_s, z_t, slots, bank, drawn):
    """Eq. 8 as in RepDistiller: every anchor gathers its own negatives, drawn (A, N); exp, then log."""
    A, N = drawn.shape
    total, noise = 0.0, N / bank.rows
    for z, other, rows, log_z in ((z_s, z_t, bank.z_t, bank.log_z[0]), (z_t, z_s, bank.z_s, bank.log_z[1])):
        negatives = rows.index_select(0, drawn.flatten()).view(A, N, -1)
        positive = ((z * other).sum(-1) / bank.tau).exp() / math.exp(log_z)
        negative = (torch.bmm(negatives, z[:, :, None])[..., 0] / bank.tau).exp() / math.exp(log_z)
        negative = negative * (drawn != slots[:, None])
        total = total - (positive / (positive + noise)).log().sum() - (noise / (negative + noise)).log().sum()
    return total / A


def crd_shared(z_s, z_t, slots, bank, negatives):
    """Eq. 8 with negatives (N,) that all anchors share, gradient by autograd."""
    total, positive = 0.0, (z_s * z_t).sum(-1) / bank.tau
    for z, rows, log_z in ((z_s, bank.z_t, bank.log_z[0]), (z_t, bank.z_s, bank.log_z[1])):
        shift = log_z + math.log(len(negatives) / bank.rows)
        scores = z @ rows[negatives].T / bank.tau - shift                       # (A, N)
        scores = scores.masked_fill(slots[:, None] == negatives, -math.inf)
        total = total + F.softplus(shift - positive).sum() + F.softplus(scores).sum()
    return total / len(z_s)


def hinge_loop(h, v, texts):
    """Eq. 3 against all others, pair by pair, for the first `texts` of h (B, T, C); v (B, C), margin 1."""
    total = 0.0
    for b in range(texts):
        own = F.cosine_similarity(h[b], v[b], dim=-1)                           # (T,)
        for c in range(len(v)):
            if c != b:
                total = total + (1 - own + F.cosine_similarity(h[c], v[b], dim=-1)).clamp(min=0).sum()
                total = total + (1 - own + F.cosine_similarity(h[b], v[c], dim=-1)).clamp(min=0).sum()
    return total / (texts * h.shape[1] * (len(v) - 1))


def hinge_batched(h, v):
    """The same for the whole batch by way of a (B, B, T, C) tensor, gradient by autograd."""
    B = len(v)
    cos = F.cosine_similarity(h[:, None], v[None, :, None], dim=-1)             # (B text, B video, T)
    own, others = cos.diagonal().T, ~torch.eye(B, dtype=torch.bool, device=h.device)
    video = (1 - own[:, None] + cos).clamp(min=0)[others].sum()
    text = (1 - own[None] + cos).clamp(min=0)[others].sum()                     # text x' against video v
    return (text + video) / (own.numel() * (B - 1))


# ---------------------------------------------------------------------------- released structures


class EagerAttention(nn.Module):
    """Attention of model.py the eager way: three maps, a mask that is always added, F.dropout."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.dropout, self.out = attention.heads, attention.dropout, attention.out
        crossed = isinstance(attention, CrossAttention)
        self.maps, joined = nn.ModuleList(), attention.key_value if crossed else attention.qkv
        for weight, bias in zip(*(x.data.chunk(3 - crossed) for x in (joined.weight, joined.bias))):
            part = nn.Linear(weight.shape[1], len(weight), device="meta")
            part.weight, part.bias = nn.Parameter(weight), nn.Parameter(bias)  # on the same memory
            self.maps.append(part)
        if crossed:
            self.maps.insert(0, attention.query)

    def forward(self, x, other, mask=None):
        """x (B, T, C), other (B, S, C'), mask bool, to broadcast to (B, H, T, S), None = all -> (B, T, C)."""
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part, y in zip(self.maps, (x, other, other)))
        unseen = x.new_zeros(1, other.shape[1]) if mask is None else -10_000 * (1 - mask.to(x.dtype))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + unseen
        y = F.dropout(scores.softmax(-1), self.dropout, self.training) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class EagerLayer(nn.Module):
    """model.Layer, model.CLIPLayer or model.CrossLayer the eager way."""

    def __init__(self, layer):
        super().__init__()
        self.pre_norm, self.cross = isinstance(layer, CLIPLayer), None
        if isinstance(layer, CrossLayer):
            self.cross, self.cross_norm, layer = EagerAttention(layer.cross), layer.cross_norm, layer.layer
        self.attention = EagerAttention(layer.attention)
        self.attention_norm, self.output_norm = layer.attention_norm, layer.output_norm
        self.expand, self.contract = layer.expand, layer.contract

    def forward(self, x, *masks, causal=False):
        """masks: mask, or for a CrossLayer other, mask, other_mask; each may be left out. causal: CLIP's."""
        if causal:
            masks = torch.ones(2 * x.shape[1:2], dtype=torch.bool, device=x.device).tril(),

        def dropout(y):
            return F.dropout(y, self.attention.dropout, self.training)
        if self.cross:
            other, mask, other_mask = masks
            x = self.cross_norm(x + dropout(self.cross(x, other, other_mask)))
            masks = mask,
        if self.pre_norm:
            y = self.attention_norm(x)
            x = x + self.attention(y, y, *masks)
            y = self.expand(self.output_norm(x))
            return x + self.contract(y * torch.sigmoid(1.702 * y))
        x = self.attention_norm(x + dropout(self.attention(x, x, *masks)))
        return self.output_norm(x + dropout(self.contract(F.gelu(self.expand(x)))))


def eager(encoder):
    """A twin of a BERT, CLIPText or CrossEncoder whose layers run the eager way; its weights are the same."""
    twin = copy.copy(encoder)
    twin._modules = {name: nn.ModuleList(map(EagerLayer, part)) if isinstance(part, nn.ModuleList) else part
                     for name, part in encoder._modules.items()}
    return twin


def contrast_at(z_s, z_t, temperature=0.5):
    """In-batch NT-Xent at one position, which runs in CRD's place in the released code: z_s, z_t (B, C)."""
    z, B = torch.cat([z_s, z_t]), len(z_s)
    scores = F.cosine_similarity(z[:, None], z[None], dim=-1) / temperature     # by way of (2B, 2B, C)
    scores = scores.masked_fill(torch.eye(2 * B, dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(scores, torch.arange(2 * B, device=z.device).roll(B))


class Released(nn.Module):
    """Student, heads and loss with the released code's structure (VidLanKD at 46bae35).

    Loops over samples (NST, polynomial, d x d x T) and positions (NT-Xent, where the paper has CRD), logits
    at all positions, eager attention, teacher outputs in float32 by way of the CPU. Heads as ours.
    """

    def __init__(self, config, teacher):
        super().__init__()
        self.bert, self.teacher = eager(BERT(config)), [eager(teacher)]  # in a list: it is not trained
        self.mlm = MLMHead(config.hidden, self.bert.embeddings.word.weight, std=config.init_std)
        self.nst, self.crd_s, self.crd_t = (DistillHead(config.hidden, config.hidden) for _ in range(3))

    def forward(self, batch):
        ids = batch["inputs"]
        with torch.no_grad():
            h_t = self.teacher[0].eval()(ids).cpu().to(ids.device)
        h, T = self.bert(ids), ids.shape[1]
        mlm = F.cross_entropy(self.mlm(h).flatten(0, 1), batch["labels"].flatten())
        nst = nst_loop(self.nst(h), h_t, KERNELS["poly"], teacher_term=False)
        z_s, z_t = self.crd_s(h), self.crd_t(h_t)
        return mlm + nst + sum(contrast_at(z_s[:, i], z_t[:, i]) for i in range(T)) / T


class ReleasedXDBERT(nn.Module):
    """The model of XDBERT's released code (ddd08e2), its structure on the weights of an adapt_xdbert.Adapter.

    All segments of CLIP's are run, whether they are empty or not, and all their positions go through the
    cross-modal encoder; masks are added; logits of words and of CLIP's tokens at all positions.
    """

    def __init__(self, ours):
        super().__init__()
        encoder = ours.encoder
        self.language, self.clip, self.cross = map(eager, (encoder.language, encoder.clip, encoder.cross))
        self.pooler, self.mlm, self.match, self.cliptc = encoder.pooler, ours.mlm, ours.match, ours.cliptc

    def forward(self, batch):
        """inputs, labels (B, T), clip_ids (B S, L), clip_mask, clip_labels (B, S L), matched (B,) -> loss."""
        h = self.language(batch["inputs"])                                      # (B, T, C)
        c = self.clip(batch["clip_ids"]).view(*batch["clip_mask"].shape, -1)    # (B, S L, P)
        h, c = self.cross(h, c, None, batch["clip_mask"])
        matched = self.match(torch.tanh(self.pooler(h[:, 0])))
        return (F.cross_entropy(self.mlm(h).flatten(0, 1), batch["labels"].flatten())
                + F.cross_entropy(self.cliptc(c).flatten(0, 1), batch["clip_labels"].flatten())
                + F.cross_entropy(matched, batch["matched"]))
