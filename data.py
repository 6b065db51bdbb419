"""Data: the demo world, vocabularies, packed text, text pairs and videos, and the batches drawn from them.

    python data.py demo                                            # the built-in micro-world in data/demo-s0
    python data.py vocab TEXT... --size 30522 --out vocab.txt      # train a WordPiece vocabulary
    python data.py text TEXT... --vocab vocab.txt --out corpus.h5  # pack text of any size
    python data.py xtext TEXT... --vocab vocab.txt --clip_vocab bpe_simple_vocab_16e6.txt.gz \\
        --out xcorpus.h5                                           # the same with CLIP's tokens beside it
    python data.py videos --captions caption.json --feat2d DIR --feat3d DIR --csv FILE --vocab vocab.txt \\
        --out videos.h5                                            # pack HowTo100M's layout

Packed files are HDF5 with contiguous datasets, read through memory maps. A batch is a pure function of (seed,
step, position in the global batch): no order of data has to be stored, and ranks only take their slices.
"""
import glob
import hashlib
import json
import os
from pathlib import Path

import h5py
import numpy as np
import torch

from common import hash64, keyed_integers, keyed_uniform
from parts.vocab import CLIPVocab, Vocab, load_vocab

FORMAT = 1  # of the packed files; another number is refused, never guessed at

# ---------------------------------------------------------------------------- packed files


def write_packed(part, kind, vocab, arrays, **attributes):
    """Writes an HDF5 file of contiguous datasets, the vocabulary among them, with the hash of all it holds.

    arrays: {name: array, or (raw file, dtype, shape)}; a raw file is copied piece by piece, as a contiguous
    dataset cannot grow while its length is not known.
    """
    digest = hashlib.sha256(json.dumps([kind, FORMAT, vocab.hash, attributes]).encode())
    with h5py.File(part, "w") as f:
        for name, value in arrays.items():
            if not isinstance(value, tuple):
                f[name] = value
                digest.update(np.ascontiguousarray(value))
                continue
            raw, dtype, shape = value
            data = f.create_dataset(name, shape, dtype)
            rows, at = max(1, (1 << 24) // max(1, dtype.itemsize * int(np.prod(shape[1:])))), 0
            with open(raw, "rb") as source:
                while at < shape[0]:
                    n = min(rows, shape[0] - at)
                    piece = np.fromfile(source, dtype, n * int(np.prod(shape[1:]))).reshape(n, *shape[1:])
                    data[at:at + n] = piece
                    digest.update(piece)
                    at += n
            raw.unlink()
        f["vocab"] = np.frombuffer("\n".join(vocab.tokens).encode(), np.uint8)
        f.attrs.update({"kind": kind, "format": FORMAT, "vocab_hash": vocab.hash, "lower": vocab.lower,
                        "strip_accents": vocab.strip_accents, "hash": digest.hexdigest(), **attributes})


def open_packed(path, kind="", vocab=None):
    """-> (attributes, Vocab, {name: read-only memory map}) of a packed file; one line where it is not one.

    The maps cost address space only: pages are read when touched and dropped when memory is short. vocab: a
    Vocab that is returned in place of an equal new one (building a tokenizer takes a tenth of a second).
    """
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"{path}: no such file; pack it with `python data.py {kind or 'text'} ...`")
    try:
        with h5py.File(path, "r") as f:
            attributes, tokens = dict(f.attrs), bytes(f["vocab"][:]).decode().split("\n")
            places = {name: (d.id.get_offset(), d.dtype, d.shape) for name, d in f.items() if name != "vocab"}
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}: not a packed file, or damaged ({error}); pack it anew") from None
    if attributes.get("format") != FORMAT:
        raise SystemExit(f"{path}: format {attributes.get('format')}, this code reads {FORMAT}; pack it anew")
    if kind and attributes["kind"] != kind:
        raise SystemExit(f"{path}: holds packed {attributes['kind']}, not {kind}; pack it with "
                         f"`python data.py {kind} ...`")
    if vocab is None or vocab.hash != attributes["vocab_hash"]:
        vocab = Vocab(tokens, bool(attributes["lower"]), bool(attributes["strip_accents"]), str(path))
    if vocab.hash != attributes["vocab_hash"]:
        raise SystemExit(f"{path}: damaged (the vocabulary is not the one it was packed with); pack it anew")
    size, maps = path.stat().st_size, {}
    for name, (offset, dtype, shape) in places.items():
        if int(np.prod(shape)) == 0:
            maps[name] = np.zeros(shape, dtype)
        elif offset is None or offset + int(np.prod(shape)) * dtype.itemsize > size:
            raise SystemExit(f"{path}: dataset {name} is not contiguous or cut off; pack the file anew")
        else:
            maps[name] = np.memmap(path, dtype, "r", offset, shape)
    return attributes, vocab, maps


def open_vocab(path):
    """The Vocab of a packed file; or of what load_vocab opens."""
    return open_packed(path)[1] if Path(path).suffix == ".h5" else load_vocab(path)


# ---------------------------------------------------------------------------- order and masks


def permuted(g, n, seed):
    """Position g of an endless stream of epochs over n samples -> sample index, int64; memory constant in n.

    Epoch e = g // n visits every sample once, in an order of its own: a Feistel network keyed by (seed, e)
    permutes the next power of 4 above n, and results beyond n are permuted again until they fall below it.
    """
    g = np.asarray(g, np.int64)
    epoch, out = g // n, g % n
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    left_to_do = np.ones(g.shape, bool)
    while left_to_do.any():
        left, right = out >> half, out & (2 ** half - 1)
        for r in range(6):
            mixed = hash64("permute", seed, epoch, r, right) & np.uint64(2 ** half - 1)
            left, right = right, left ^ mixed.astype(np.int64)
        out = np.where(left_to_do, left << half | right, out)
        left_to_do = out >= n
    return out


def micro_rows(batch_size, rank, world, micro, grad_accum):
    """Positions in the global batch of `rank`'s micro-batch `micro`, int64: a contiguous slice, by rank."""
    parts = world * grad_accum
    if batch_size % parts:
        raise SystemExit(f"--batch_size {batch_size} is not divisible by {world} processes x {grad_accum} "
                         f"accumulated micro-batches; use {max(1, batch_size // parts) * parts}")
    size = batch_size // parts
    return np.arange(size, dtype=np.int64) + (rank * grad_accum + micro) * size


def parse_split(text):
    """"80/10/10" -> (0.8, 0.1, 0.1): shares of masked tokens that become [MASK], a random token, or stay."""
    try:
        shares = [float(part) / 100 for part in text.split("/")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise SystemExit(f"--mask_split {text}: three percentages that add up to 100, for instance 80/10/10")
    return tuple(shares)


def columns(keys):
    """Keys per row (b,) -> (b, 1), so that they broadcast against token positions; scalars and texts stay."""
    return [key if np.ndim(key) == 0 else np.asarray(key)[:, None] for key in keys]


def mask_tokens(ids, mask, vocab, rate, split, *keys):
    """BERT's masking (Devlin et al. 2019) -> (inputs, labels), int64 (B, T); labels are -100 off the targets.

    One uniform number a token, a pure function of (keys, position in the sequence), decides everything: below
    `rate` the token is a target, and by `split` it becomes [MASK], an id drawn uniformly from all but the
    special ones, or stays. Exact in expectation; never special tokens or padding. keys: (seed, step,
    positions) in training, ("val", index) in evaluation; arrays are (B,). ids, mask: CPU tensors (B, T). A
    sequence may get no target.
    """
    to_mask, to_random, _ = parse_split(split)
    keys, place = columns(keys), np.arange(ids.shape[1])
    u = torch.from_numpy(np.broadcast_to(keyed_uniform("mask", *keys, place), ids.shape).copy())
    special = torch.isin(ids, torch.tensor(vocab.specials))
    u[special | ~mask] = 1.0
    target = u < rate
    inputs, labels = ids.clone(), torch.where(target, ids, -100)
    inputs[u < rate * to_mask] = vocab.mask
    random_ids = vocab.ordinary[keyed_integers(len(vocab.ordinary), "random token", *keys, place)]
    swap = (u >= rate * to_mask) & (u < rate * (to_mask + to_random))
    inputs = torch.where(swap, torch.from_numpy(np.broadcast_to(random_ids, ids.shape).copy()), inputs)
    return inputs, labels


def anchors_per_row(crd_tokens, batch_size, positions):
    """How many of `crd_tokens` anchors each position of the global batch gets, (b,); they differ by one."""
    base, rest = divmod(crd_tokens, batch_size)
    return base + (np.asarray(positions) < rest)


def anchor_tokens(mask, k_per_row, *keys):
    """Draws k real tokens of each sequence, each once -> (row (A,), token (A,)), int64, in order of rows.

    mask: (B, T) bool on the CPU. k_per_row: (B,); a row with fewer real tokens gives all it has. keys: as in
    mask_tokens. The first token of a row is the one that the memory bank stores.
    """
    real = mask.numpy()
    u = np.where(real, keyed_uniform("anchor", *columns(keys), np.arange(mask.shape[1])), 2.0)
    order = np.argsort(u, axis=1, kind="stable")
    count = np.minimum(k_per_row, real.sum(1))
    row, rank = np.nonzero(np.arange(mask.shape[1]) < count[:, None])
    return torch.from_numpy(row), torch.from_numpy(order[row, rank])


# ---------------------------------------------------------------------------- text blocks


class TextBlocks:
    """Blocks of T - 2 consecutive tokens between [CLS] and [SEP], read from packed text through memory maps.

    paths: a glob, or a list of .h5 files (shards; a block does not cross two of them, and what is left at the
    end of each is dropped and counted in `dropped`). part: "train" or "val"; without val_glob the last 1 % of
    the blocks, at least one, is held out.
    """
    kind = "text"

    def __init__(self, paths, block_size, part="train", val_glob=""):
        if block_size < 3:
            raise SystemExit(f"--block_size {block_size}: at least 3 ([CLS], a token, [SEP])")
        shards = find_shards(val_glob if val_glob and part == "val" else paths, self.kind)
        self.block_size, self.tokens, self.vocab, digest = block_size, [], None, hashlib.sha256()
        for path in shards:
            attributes, vocab, maps = open_packed(path, self.kind, self.vocab)
            if self.vocab and vocab.hash != self.vocab.hash:
                raise SystemExit(f"{path}: packed with another vocabulary than {shards[0]}; pack it anew")
            self.vocab = vocab
            self.tokens.append(maps["tokens"])
            self.add_shard(path, attributes, maps)
            digest.update(attributes["hash"].encode())
        self.hash = digest.hexdigest()
        counts = [len(tokens) // (block_size - 2) for tokens in self.tokens]
        self.dropped = sum(len(tokens) for tokens in self.tokens) - sum(counts) * (block_size - 2)
        self.first = np.concatenate([[0], np.cumsum(counts)])  # of each shard
        total = int(self.first[-1])
        held_out = 0 if val_glob else max(1, total // 100)
        if total < held_out + 1:
            raise SystemExit(f"{shards[0]}: {total} blocks of {block_size} tokens are too few; lower "
                             "--block_size or pack more text")
        in_front = part == "train" or val_glob
        self.offset, self.n = (0, total - held_out) if in_front else (total - held_out, held_out)

    def add_shard(self, path, attributes, maps):
        """For a subclass: reads what else the file holds."""

    def __len__(self):
        return self.n

    def index(self, seed, step, batch_size, positions):
        """Sample indices (b,) of `positions` in the global batch of `step`; each epoch has its own order."""
        return permuted(np.int64(step) * batch_size + positions, self.n, seed)

    def batch(self, index) -> dict:
        """Blocks `index` -> {"ids": int64 (b, T), "mask": bool (b, T), all true, "index": int64 (b,)}."""
        ids = np.empty((len(index), self.block_size), np.int64)
        ids[:, 0], ids[:, -1] = self.vocab.cls, self.vocab.sep
        width = self.block_size - 2
        for row, (shard, block) in enumerate(self.places(index)):
            ids[row, 1:-1] = self.tokens[shard][block * width:(block + 1) * width]
        return {"ids": torch.from_numpy(ids), "mask": torch.ones(ids.shape, dtype=torch.bool),
                "index": np.asarray(index, np.int64)}

    def places(self, index):
        """Blocks `index` of this part -> (shard, block in the shard) of each."""
        block = np.asarray(index) + self.offset
        shard = np.searchsorted(self.first, block, side="right") - 1
        return zip(shard.tolist(), (block - self.first[shard]).tolist())


def find_shards(paths, kind="text"):
    """A glob or a list of paths -> sorted list of files; ends the program where there is none."""
    if isinstance(paths, (str, Path)):
        paths = [paths] if Path(paths).exists() else glob.glob(str(paths)) or [paths]
    shards = sorted(map(str, paths))
    missing = [shard for shard in shards if not Path(shard).exists()]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: no such file; pack text with `python data.py {kind} TEXT... "
                         f"--out FILE` (`python data.py {kind} --help` lists its flags)")
    return shards


# ---------------------------------------------------------------------------- text pairs


class PairBlocks(TextBlocks):
    """TextBlocks of packed pairs (data.py xtext) with the CLIP tokens of the same text, for XDBERT.

    A block's CLIP tokens fill up to `segments` segments of `length` tokens one after the other, each with a
    start and an end token of its own, as in the released code; the first is in use even where it is empty.
    What does not fit is cut: `cut` tokens of all blocks of this part. used: mean share of segments in use.
    """
    kind = "xtext"

    def __init__(self, paths, block_size, part="train", val_glob="", segments=9, length=77):
        if segments < 1 or length < 3:
            raise SystemExit(f"--segments {segments} of --segment_length {length}: at least 1 of 3 (start, a "
                             "token, end)")
        self.segments, self.length, self.clip_vocab = segments, length, None
        self.clip_tokens, self.clip_at = [], []  # of each shard: ids, and at which of them each block begins
        super().__init__(paths, block_size, part, val_glob)
        size = np.concatenate([np.diff(at) for at in self.clip_at])[self.offset:self.offset + self.n]
        self.cut = int(np.maximum(size - segments * (length - 2), 0).sum())
        self.used = float(np.clip(-(-size // (length - 2)), 1, segments).mean() / segments)

    def add_shard(self, path, attributes, maps):
        self.clip_vocab = self.clip_vocab or stored_clip_vocab(path, attributes, self.vocab, maps)
        if attributes["clip_hash"] != self.clip_vocab.hash:
            raise SystemExit(f"{path}: its CLIP side was packed with another vocabulary than that of the "
                             "other files; pack it anew")
        if "clip_tokens" not in maps or len(maps.get("clip_counts", ())) != len(maps["tokens"]):
            raise SystemExit(f"{path}: damaged (the CLIP side does not fit the words); pack it anew")
        counts, width = maps["clip_counts"], self.block_size - 2
        at, piece = np.zeros(len(counts) // width + 1, np.int64), 1 + (1 << 22) // width
        for a in range(0, len(at) - 1, piece):  # of blocks, so that memory stays flat
            rows = counts[a * width:min(a + piece, len(at) - 1) * width].reshape(-1, width)
            at[a + 1:a + 1 + len(rows)] = rows.sum(1, dtype=np.int64)
        self.clip_at.append(np.cumsum(at, out=at))
        self.clip_tokens.append(maps["clip_tokens"])

    def counts(self, size):
        """CLIP tokens of each text (b,) -> those in each of its segments (b, S), -1 = not in use."""
        left = np.asarray(size)[:, None] - np.arange(self.segments) * (self.length - 2)
        left[:, 1:][left[:, 1:] <= 0] = -1
        return np.minimum(left, self.length - 2)

    def clip_batch(self, index) -> dict:
        """The CLIP side of blocks `index`; see segment_batch."""
        room, parts = self.segments * (self.length - 2), []
        for shard, block in self.places(index):
            a, b = self.clip_at[shard][block:block + 2]
            parts.append(self.clip_tokens[shard][a:min(b, a + room)])
        size = np.array([len(part) for part in parts])
        begin = (np.cumsum(size) - size)[:, None] + np.arange(self.segments) * (self.length - 2)
        return segment_batch(np.concatenate(parts), begin, self.counts(size), self.clip_vocab, self.length)


def stored_clip_vocab(path, attributes, vocab, maps):
    """The vocabulary of the CLIP side of a packed file; vocab: that of its other side, which may be equal."""
    if attributes["clip_hash"] == vocab.hash:
        return vocab
    lines = bytes(maps["clip_vocab"]).decode().split("\n")
    if "clip_lower" not in attributes:
        clip = CLIPVocab(lines, str(path))
    else:
        clip = Vocab(lines, bool(attributes["clip_lower"]), bool(attributes["clip_strip_accents"]), str(path))
    if clip.hash != attributes["clip_hash"]:
        raise SystemExit(f"{path}: damaged (CLIP's vocabulary is not the one it was packed with); pack it "
                         "anew")
    return clip


def segment_batch(tokens, begin, count, vocab, length) -> dict:
    """Pieces of a flat array of ids -> the CLIP input of B texts of S segments; the empty ones are not in it.

    begin, count: (B, S); a segment holds tokens[begin:begin + count], cut to length - 2, between vocab's
    start and end; count -1 = not in use. Returns {"clip_ids": int64 (n, l), the segments in use row by row,
    padded with 0, which may be a real token, too; "clip_place": int64 (B, R), where in the flattened clip_ids
    the real tokens of row b stand, start and end among them, in order and packed to the left; "clip_mask":
    bool (B, R), True = real}.
    """
    in_use, count = count >= 0, np.minimum(count, length - 2)
    first, size = begin[in_use], count[in_use]  # of each segment in use
    column = np.arange(size.max() + 2)
    segment, at = np.nonzero((column > 0) & (column <= size[:, None]))
    ids = np.zeros((len(size), len(column)), np.int64)
    ids[segment, at] = tokens[first[segment] + at - 1]
    ids[:, 0], ids[np.arange(len(size)), size + 1] = vocab.start, vocab.end
    real = np.where(in_use, count + 2, 0).sum(1)  # tokens of each row
    mask = np.arange(real.max()) < real[:, None]
    place = np.zeros(mask.shape, np.int64)
    place[mask] = np.flatnonzero(column < size[:, None] + 2)
    return {"clip_ids": torch.from_numpy(ids), "clip_place": torch.from_numpy(place),
            "clip_mask": torch.from_numpy(mask)}


def clip_targets(clip_ids, clip_place, clip_mask, vocab, rate, *keys):
    """CLIPTC's targets -> (index (m,) into the flattened (B, R), their ids (m,)), int64.

    clip_ids, clip_place, clip_mask: of segment_batch. Each real token, id 0 among them, is a target with
    probability `rate`; never start or end (or another special token of `vocab`), nor padding. keys: as in
    mask_tokens.
    """
    ids = clip_ids.flatten()[clip_place]
    u = torch.from_numpy(keyed_uniform("clip target", *columns(keys), np.arange(ids.shape[1])))
    target = (u < rate) & clip_mask & ~torch.isin(ids, torch.tensor(vocab.specials))
    return target.flatten().nonzero()[:, 0], ids[target]


def match_texts(index, n, *keys):
    """MATCH's texts: index (b,) of n -> int64 (b,), with probability 1/2 another one, else its own.

    Each of the n - 1 others is equally likely. keys: as in mask_tokens.
    """
    if n < 2:
        raise SystemExit("MATCH needs at least two blocks; lower --block_size or pack more text")
    index = np.asarray(index, np.int64)
    other = keyed_integers(n - 1, "match text", *keys)
    other = other + (other >= index)
    return np.where(keyed_uniform("match", *keys) < 0.5, other, index)


# ---------------------------------------------------------------------------- video clips


class VideoClips:
    """Captions and frames of a packed videos.h5. A sample is a caption, the random start of a longer text.

    T: tokens with [CLS] and [SEP]. max_frames: at most that many of a text's frames. vision: "video" (all
    channels, every frame), or "image" (2D channels of the middle frame only; the paper's image-level
    ablation). part: "train" or "val": whole videos, the last ones, are held out until they have `val_clips`
    captions, at most 10 % of the videos. feat_norm: each frame's 2D part and 3D part to length 1. `task` is
    per video of the part.
    """

    def __init__(self, path, T, max_frames=512, vision="video", part="train", val_clips=10000,
                 feat_norm=False):
        if vision not in ("video", "image"):
            raise SystemExit(f"--vision {vision}: choose video or image")
        if T < 3:
            raise SystemExit(f"--block_size {T}: at least 3 ([CLS], a token, [SEP])")
        attributes, self.vocab, maps = open_packed(path, "videos")
        self.T, self.max_frames, self.vision, self.feat_norm = T, max_frames, vision, feat_norm
        self.hash, self.d2, self.d3 = attributes["hash"], int(attributes["d2"]), int(attributes["d3"])
        self.features = self.d2 if vision == "image" else self.d2 + self.d3
        self.frames, self.tokens = maps["frames"], maps["tokens"]
        first, videos = maps["caption_offsets"], len(maps["task"])
        held_out = int(np.searchsorted(first[-1] - first[::-1], val_clips))
        held_out = min(max(1, held_out), max(1, videos // 10))
        if videos < 2:
            raise SystemExit(f"{path}: holds one video; at least two are needed, one is held out")
        a, b = (0, videos - held_out) if part == "train" else (videos - held_out, videos)
        lo, hi = int(first[a]), int(first[b])
        self.task, self.video_id = maps["task"][a:b], maps["video_id"][a:b]
        self.first = first[a:b + 1] - lo  # of each video, the index of its first caption; then len(self)
        self.frame_at = maps["frame_offsets"][a:b + 1]
        self.start, self.end = maps["start"][lo:hi], maps["end"][lo:hi]
        self.token_at = maps["token_offsets"][lo:hi + 1]

    def __len__(self):
        return len(self.start)

    def index(self, seed, step, batch_size, positions):
        """Sample indices (b,) of `positions` in the global batch of `step`; each epoch has its own order."""
        return permuted(np.int64(step) * batch_size + positions, len(self), seed)

    def batch(self, index) -> dict:
        """Captions joined from `index` on until T - 2 tokens or the end of the video (the last may be cut).

        -> {"ids": int64 (b, T), "mask": bool (b, T), "frames": float32 (b, F, D), "frame_mask": bool (b, F),
        "index"}. Frames: from floor(start of the first) to ceil(end of the last caption), F the longest of
        the batch.
        """
        index = np.asarray(index, np.int64)
        video_end = self.token_at[self.first[self.video_of(index) + 1]]
        stop = np.minimum(self.token_at[index] + self.T - 2, video_end)
        return self.spans(index, stop, np.searchsorted(self.token_at, stop))

    def clips(self, index) -> dict:
        """The same of ONE caption each and its own frames, for retrieval."""
        index = np.asarray(index, np.int64)
        stop = np.minimum(self.token_at[index] + self.T - 2, self.token_at[index + 1])
        return self.spans(index, stop, index + 1)

    def spans(self, index, stop, behind):
        """Batch of the tokens from caption `index` to token `stop`, which lies in caption `behind` - 1."""
        place = np.arange(self.T - 2)
        at = self.token_at[index][:, None] + place
        real = at < stop[:, None]
        ids = np.full((len(index), self.T), self.vocab.pad, np.int64)
        ids[:, 0] = self.vocab.cls
        ids[:, 1:-1] = np.where(real, self.tokens[np.where(real, at, 0)], self.vocab.pad)
        n = real.sum(1)
        ids[np.arange(len(index)), n + 1] = self.vocab.sep
        mask = np.arange(self.T) < n[:, None] + 2
        video = self.video_of(index)
        low, high = self.frame_at[video], self.frame_at[video + 1]
        last = np.array([self.end[a:b].max() for a, b in zip(index, behind)])
        a = low + np.floor(self.start[index]).astype(np.int64)
        b = np.maximum(a + 1, np.minimum(low + np.ceil(last).astype(np.int64), high))
        if self.vision == "image":
            a = (a + b) // 2
            b = a + 1
        b = np.minimum(b, a + self.max_frames)
        at = a[:, None] + np.arange(int((b - a).max()))
        frame_mask = at < b[:, None]
        frames = self.frames[np.where(frame_mask, at, a[:, None])].astype(np.float32)[..., :self.features]
        if self.feat_norm:
            for part in (frames[..., :self.d2], frames[..., self.d2:]):
                part /= np.maximum(np.linalg.norm(part, axis=-1, keepdims=True), 1e-12)
        frames[~frame_mask] = 0.0
        return {"ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask), "index": index,
                "frames": torch.from_numpy(frames), "frame_mask": torch.from_numpy(frame_mask)}

    def video_of(self, index):
        """The video, counted in this part, of captions `index`; task[video_of(index)] is their task."""
        return np.searchsorted(self.first, index, side="right") - 1

    def duration(self, index):
        """Seconds from start to end of captions `index`."""
        return self.end[index] - self.start[index]

    def voken_clips(self, K, seed):
        """Indices of K clips of 1 to 20 s (paper, Appendix A): one of each task, then of random tasks.

        Goes round the tasks in random order, another video of theirs each time and one clip of it, until
        there are K; with fewer videos than K it returns a clip of each.
        """
        video = np.arange(len(self.task))
        draw, pick = keyed_uniform("voken video", seed, video), keyed_uniform("voken clip", seed, video)
        order = np.lexsort((draw, self.task))
        new_task = np.flatnonzero(np.r_[True, np.diff(self.task[order]) != 0])
        turn = np.empty(len(order))  # at which round a video's task is at it
        turn[order] = np.arange(len(order)) - np.repeat(new_task, np.diff(np.r_[new_task, len(order)]))
        clips = []
        for v in np.argsort(turn + draw):
            fit = np.arange(self.first[v], self.first[v + 1])
            fit = fit[(self.duration(fit) >= 1) & (self.duration(fit) <= 20)]
            if len(fit):
                clips.append(fit[int(pick[v] * len(fit))])
            if len(clips) == K:
                break
        if not clips:
            raise SystemExit("voken: no clip lasts 1 to 20 s")
        return np.array(clips)


if __name__ == "__main__":
    import signal
    import sys

    from prepare.commands import main
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("data.py: terminated; no file was left under --out"))
    main()
