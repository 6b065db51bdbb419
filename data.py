"""Data: packed text, text pairs and videos, and the batches that training draws from them.

    python data.py demo                                            # the built-in micro-world in data/demo-s0
    python data.py vocab TEXT... --size 30522 --out vocab.txt      # train a WordPiece vocabulary
    python data.py text TEXT... --vocab vocab.txt --out corpus.h5  # pack text of any size
    python data.py xtext TEXT... --vocab vocab.txt --clip_vocab bpe_simple_vocab_16e6.txt.gz \\
        --out xcorpus.h5                                           # the same with CLIP's tokens beside it
    python data.py videos --captions caption.json --feat2d DIR --feat3d DIR --csv FILE --vocab vocab.txt \\
        --out videos.h5                                            # pack HowTo100M's layout

Packed files are HDF5 with contiguous datasets, read through memory maps. A batch is a dict of CPU tensors, a
pure function of (seed, step, position in the global batch): no order of data has to be stored, and ranks only
take their slices. What it holds:

  ids, mask (B, T), index (B,)                 blocks and clips: words, True = real, sample
  frames (B, F, D), frame_mask (B, F)          VideoClips
  clip_ids, clip_place, clip_mask, clip_end    PairBlocks: CLIP's side of the text, see clip_batch
  inputs (B, T), mlm_index, mlm_targets (M,)   masked_words: what the model reads and is to predict
  anchors, slots (A,), first (B,), inputs_t    distill.make_batch: CRD's anchors (rows of the flattened B T),
                                               their rows of the bank, each sequence's first anchor (which the
                                               bank stores), the teacher's own view of the words
  h_t, h_t_crd (B, T, C_t), negatives (N,)     distill's loop: the teacher's states, drawn rows of the bank
  word (B, T), clip_word (B, R), aligned       distill.make_batch, with a teacher of other tokens: alignment,
                                               and rows of the flattened B T that both read
  sentence_t (B, C_t)                          distill's loop: that teacher's vectors of the texts
  text_mask, partner, partner_video, ..        teacher.make_batch: the hinge's words, Eq. 3's negatives
  match_targets, cliptc_index, cliptc_targets  adapt_xdbert.make_batch: the other terms' places and targets
  segment_words (B, S, T), itc_mask (B, S)     the same: words of each CLIP segment, and which pairs are real
  others                                       adapt_xdbert.share_pairs: pairs of the other micro-batches
"""
import errno
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import weakref
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import clear_up_on_sigterm, hash64, keyed_integers, keyed_uniform, update_hash
from parts.vocab import CLIPVocab, Vocab, load_vocab

FORMAT = 1  # of the packed files; raise it with any change of what they hold


def tensors(**arrays) -> dict:
    """Arrays -> {name: tensor of the same memory}. Only batches need torch, packing does not."""
    import torch
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------------------- packed files


def write_packed(part, kind, vocab, arrays, **attributes):
    """Writes an HDF5 file of contiguous datasets, among them the vocabulary, and the hash of its content.

    arrays: {name: array, or (raw file, dtype, shape of a row)}. A contiguous dataset cannot grow, so data of
    unknown length comes as a raw file. The hash is SHA-256 of kind, format, vocabulary and attributes, and of
    each array as common.update_hash reads it: of more than 1 GiB only blocks.
    """
    import h5py
    digest = hashlib.sha256(json.dumps([kind, FORMAT, vocab.hash, attributes]).encode())
    with h5py.File(part, "w") as f:
        for name, value in arrays.items():
            if isinstance(value, tuple):
                raw, dtype, shape = value
                value = np.memmap(raw, dtype, "r") if raw.stat().st_size else np.zeros(0, dtype)
                value = value.reshape(-1, *shape)
            f[name] = value
            content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            update_hash(digest, len(content), lambda first, last: content[first:last])
        f["vocab"] = np.frombuffer("\n".join(vocab.tokens).encode(), np.uint8)
        attributes |= {"kind": kind, "format": FORMAT, "vocab_hash": vocab.hash, "lower": vocab.lower,
                       "strip_accents": vocab.strip_accents, "hash": digest.hexdigest()}
        for name, value in attributes.items():  # text as bytes: HDF5 hangs on a damaged heap of strings
            f.attrs[name] = np.bytes_(value) if isinstance(value, str) else value


def open_packed(path, kind="", vocab=None):
    """A packed file -> (attributes, Vocab, {name: read-only memory map}); SystemExit where it is damaged.

    kind: text, xtext or videos; "" allows all. vocab: a Vocab to return instead of an equal new one, because
    building a tokenizer takes a tenth of a second. The maps take no memory: pages are read when touched and
    dropped when memory is short.
    """
    import h5py
    if not Path(path).is_file():
        what = "is a folder, no packed file" if Path(path).is_dir() else "no such file"
        raise SystemExit(f"{path}: {what}; pack it with `python data.py {kind or 'text'} ...`")
    try:
        with h5py.File(path, "r") as f:
            attributes = {name: read_attribute(f.attrs, name) for name in f.attrs}
            content = np.memmap(path, np.uint8, "r")  # one for all: each map keeps a file open
            maps = {name: map_dataset(content, f, name) for name in f}
        tokens = bytes(maps.pop("vocab")).decode().split("\n")
        if "clip_vocab" in maps:
            maps["clip_vocab"] = bytes(maps["clip_vocab"]).decode().split("\n")
        for name, wanted in (ATTRIBUTES | KINDS.get(attributes["kind"], {})).items():
            if not isinstance(attributes[name], wanted):
                raise ValueError(f"{name} is {attributes[name]!r}"[:80])
        held, form = attributes["kind"], attributes["format"]
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        refuse_more_files(path, error)
        raise SystemExit(f"{path}: not a packed file, or damaged ({error}); pack it anew") from None
    if kind and held != kind and (kind, held) != ("text", "xtext"):  # pairs hold the text, too
        raise SystemExit(f"{path}: holds packed {held}, not {kind}; pack it with `python data.py {kind} ...`")
    if form != FORMAT:
        raise SystemExit(f"{path}: has format {form}, this code reads {FORMAT}; pack it again with "
                         f"`python data.py {held} ...`")
    if vocab is None or vocab.hash != attributes["vocab_hash"]:
        vocab = Vocab(tokens, bool(attributes["lower"]), bool(attributes["strip_accents"]), str(path))
    if vocab.hash != attributes["vocab_hash"]:
        raise SystemExit(f"{path}: damaged (the vocabulary is not the one it was packed with); pack it anew")
    return attributes, vocab, maps


def refuse_more_files(path, error):
    """SystemExit where the system lets a process have no more files open."""
    if getattr(error, "errno", None) == errno.EMFILE:
        raise SystemExit(f"{path}: too many files are open; allow more, such as by `ulimit -n 4096`"
                         ) from None


# what packed files hold: {dataset: (numpy's kinds of numbers, dimensions)}
DATASETS = {"vocab": ("u", 1), "sources": ("u", 1), "tokens": ("u", 1), "clip_tokens": ("u", 1),
            "clip_counts": ("u", 1), "clip_vocab": ("u", 1), "video_id": ("S", 1), "task": ("i", 1),
            "frames": ("f", 2), "frame_offsets": ("i", 1), "caption_offsets": ("i", 1),
            "token_offsets": ("i", 1), "start": ("f", 1), "end": ("f", 1)}


# and of attributes that are read: all, and those of a kind
ATTRIBUTES = {"kind": str, "format": int, "hash": str, "vocab_hash": str, "lower": int, "strip_accents": int}
KINDS = {"xtext": {"clip_hash": str}, "videos": {"d2": int, "d3": int}}


def read_attribute(attributes, name):
    """Number, or text, of an open file; ValueError for strings of HDF5's heap, which older versions wrote."""
    if attributes.get_id(name).dtype.kind == "O":
        raise ValueError(f"{name} is a string of an older version")
    value = attributes[name]
    return value.decode() if isinstance(value, bytes) else value.item()


def map_dataset(content, file, name):
    """The array of a dataset of an open h5py.File in the map of its bytes; ValueError where it is not ours or
    not in it."""
    import h5py
    link, (kinds, dimensions) = file.get(name, getlink=True), DATASETS.get(name, ("", 0))
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if (not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in kinds
            or dataset.ndim != dimensions):
        raise ValueError(f"{name} is not the dataset that it should be")
    if dataset.size == 0:
        return np.zeros(dataset.shape, dataset.dtype)
    layout, offset = dataset.id.get_create_plist().get_layout(), dataset.id.get_offset()
    if (layout != h5py.h5d.CONTIGUOUS or dataset.external or offset is None
            or offset + dataset.nbytes > len(content)):
        raise ValueError(f"{name} does not lie in the file in one piece")
    return np.ndarray(dataset.shape, dataset.dtype, content, offset)


def check_ids(ids, vocab, what):
    """SystemExit where packed ids are none of the vocabulary."""
    if ids.size and ids.max() >= vocab.size:
        raise SystemExit(f"{what}: damaged (the id {ids.max()}, its vocabulary has {vocab.size:,} tokens); "
                         "pack it anew")


def open_vocab(path):
    """The Vocab of a packed file, or of a file or folder that load_vocab reads."""
    return open_packed(path)[1] if Path(path).suffix == ".h5" else load_vocab(path)


# ---------------------------------------------------------------------------- order and masks


def permuted(g, n, seed):
    """Position g of an endless stream of epochs over n samples -> sample index, int64; memory is O(sqrt(n)).

    Epoch e = g // n visits every sample once, in its own order: a Feistel network of six rounds permutes the
    integers below the next power of 4, and what comes out at n or above is permuted again until it is below.
    """
    g = np.asarray(g, np.int64)
    epoch, out = (x.ravel() for x in divmod(g, n))
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    for e in np.unique(epoch):
        rows = np.flatnonzero(epoch == e)
        while len(rows):
            left, right = out[rows] >> half, out[rows] & (2 ** half - 1)
            for mixed in feistel_rounds(seed, int(e), half):
                left, right = right, left ^ mixed[right]
            out[rows] = left << half | right
            rows = rows[out[rows] >= n]
    return out.reshape(g.shape)


@functools.lru_cache(maxsize=8)
def feistel_rounds(seed, epoch, half):
    """What each round of `permuted` makes of every right half, (6, 2^half) int64."""
    mixed = hash64("permute", seed, epoch, np.arange(6)[:, None], np.arange(2 ** half))
    return (mixed & np.uint64(2 ** half - 1)).astype(np.int64)


def micro_rows(batch_size, rank, ranks, micro, grad_accum):
    """Positions in the global batch of `rank`'s micro-batch `micro`, int64: a contiguous slice, by rank."""
    size = batch_size // (ranks * grad_accum)  # run.micro_batch_size has checked that nothing is left
    return np.arange(size, dtype=np.int64) + (rank * grad_accum + micro) * size


def step_batches(samples, cfg, ranks, make_batch, step):
    """(samples (b,) of the step's global batch, this rank's micro-batches): a pure function of the step.

    samples: TextBlocks, PairBlocks or VideoClips; make_batch(samples, cfg, index, seed, step, positions).
    """
    index = samples.index(cfg.seed, step, cfg.batch_size, np.arange(cfg.batch_size))
    parts = (micro_rows(cfg.batch_size, ranks.rank, ranks.size, micro, cfg.grad_accum)
             for micro in range(cfg.grad_accum))
    return index, [make_batch(samples, cfg, index[rows], cfg.seed, step, rows) for rows in parts]


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
    """Keys per row (b,) -> (b, 1), to broadcast against token positions; scalars and texts stay."""
    return [key if np.ndim(key) == 0 else np.asarray(key)[:, None] for key in keys]


def mask_tokens(ids, mask, vocab, rate, split, *keys):
    """BERT's masking (Devlin et al. 2019) -> (inputs, labels), int64 (B, T); labels are -100 off the targets.

    One uniform number a token, a pure function of (keys, position in the sequence), decides everything: below
    `rate` the token is a target, and by `split` a target becomes [MASK], an id drawn uniformly from all but
    the special ones, or stays. The rate is exact in expectation, so a sequence may get no target. Special
    tokens and padding are never targets. ids, mask: CPU tensors (B, T). keys: (seed, step, positions) in
    training, ("val", index) in evaluation; arrays are (B,).
    """
    to_mask, to_random, _ = parse_split(split)
    inputs, (B, T) = ids.numpy().copy(), ids.shape
    labels, words = np.full_like(inputs, -100), inputs.ravel()  # words: a view
    u = keyed_uniform("mask", *columns(keys), np.arange(T))  # (B, T)
    target = np.flatnonzero((u < rate) & mask.numpy())
    target = target[~np.isin(words[target], vocab.specials)]
    u = np.broadcast_to(u, (B, T)).ravel()[target]
    labels.ravel()[target] = words[target]
    swap = target[(u >= rate * to_mask) & (u < rate * (to_mask + to_random))]
    words[target[u < rate * to_mask]] = vocab.mask
    row, token = divmod(swap, T)
    drawn = keyed_integers(len(vocab.ordinary), "random token",
                           *(key if np.ndim(key) == 0 else np.asarray(key)[row] for key in keys), token)
    words[swap] = vocab.ordinary[drawn]
    return tuple(tensors(inputs=inputs, labels=labels).values())


def masked_words(batch, vocab, rate, split, *keys, pad=False):
    """mask_tokens of a batch -> {"inputs": (B, T), "mlm_index": rows (M,) of the flattened (B, T) that are
    to be predicted, "mlm_targets": their ids (M,)}.

    pad: for static shapes, M is the mean and 6 standard deviations of B T tokens at `rate`, or what is drawn
    where that is more, rounded up to a multiple of 64; the rows added have the target -100.
    """
    inputs, labels = mask_tokens(batch["ids"], batch["mask"], vocab, rate, split, *keys)
    labels = labels.numpy().ravel()
    place, n = np.flatnonzero(labels != -100), len(labels)
    targets = labels[place]
    if pad:
        most = max(len(place), n * rate + 6 * math.sqrt(n * rate * (1 - rate)))
        added = np.arange(64 * math.ceil(most / 64) - len(place)) % n
        # not one row again and again: a GPU adds up the gradients of equal rows one by one
        place, targets = np.append(place, added), np.append(targets, np.full_like(added, -100))
    return {"inputs": inputs, **tensors(mlm_index=place, mlm_targets=targets)}


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
    u = np.where(real, keyed_uniform("anchor", *columns(keys), np.arange(real.shape[1])), 2.0)
    k = np.minimum(k_per_row, real.sum(1))
    most = max(1, int(k.max()))
    near = u <= np.partition(u, most - 1)[:, most - 1:most]  # the `most` smallest of each row, and ties
    row, token = np.nonzero(near & real)
    order = np.lexsort((u[row, token], row))
    row, token = row[order], token[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    chosen = rank < k[row]
    return tuple(tensors(row=row[chosen], token=token[chosen]).values())


# ---------------------------------------------------------------------------- text blocks


class TextBlocks:
    """Blocks of T - 2 consecutive tokens between [CLS] and [SEP], read from packed text through memory maps.

    paths: a glob, or a list of .h5 files (shards). A block does not cross two shards; the tokens left at the
    end of each are dropped and counted in `dropped`. part: "train" or "val"; without val_glob the last 1 % of
    the blocks, at least one, is held out.
    """
    kind = "text"

    def __init__(self, paths, block_size, part="train", val_glob=""):
        if block_size < 3:
            raise SystemExit(f"--block_size {block_size}: at least 3 ([CLS], a token, [SEP])")
        files = find_shards(val_glob if val_glob and part == "val" else paths, self.kind)
        self.block_size, width, digest = block_size, block_size - 2, hashlib.sha256()
        self.files = files
        self.vocab, self.shards, self.dropped = None, [], 0  # shards: the tokens of each, (blocks, T - 2)
        for path in files:
            attributes, vocab, maps = open_packed(path, self.kind, self.vocab)
            if self.vocab and vocab.hash != self.vocab.hash:
                raise SystemExit(f"{path}: packed with another vocabulary than {files[0]}; pack it anew")
            if "tokens" not in maps:
                raise SystemExit(f"{path}: damaged (it holds no tokens); pack it anew")
            tokens, self.vocab = np.asarray(maps["tokens"]), vocab
            blocks = len(tokens) // width
            self.shards.append(tokens[:blocks * width].reshape(blocks, width))
            self.dropped += len(tokens) - blocks * width
            self.add_shard(path, attributes, maps)
            digest.update(attributes["hash"].encode())
        self.hash = digest.hexdigest()
        self.shard_start = np.cumsum([0, *map(len, self.shards)])  # in blocks
        total = int(self.shard_start[-1])
        held_out = 0 if val_glob else max(1, total // 100)
        if total < held_out + 1:
            raise SystemExit(f"{files[0]}: {total} blocks of {block_size} tokens are too few; lower "
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
        shard, block = self.places(index)
        ids = np.empty((len(block), self.block_size), np.int64)
        ids[:, 0], ids[:, -1] = self.vocab.cls, self.vocab.sep
        for s in np.unique(shard):
            ids[shard == s, 1:-1] = read = self.shards[s][block[shard == s]]
            check_ids(read, self.vocab, self.files[s])
        return tensors(ids=ids, mask=np.ones(ids.shape, bool)) | {"index": np.asarray(index, np.int64)}

    def places(self, index):
        """Blocks `index` of this part -> (shard (b,), block in the shard (b,))."""
        block = np.asarray(index) + self.offset
        shard = np.searchsorted(self.shard_start, block, side="right") - 1
        return shard, block - self.shard_start[shard]


def find_shards(paths, kind="text"):
    """A glob or a list of paths -> sorted list of files; SystemExit where one is missing."""
    if isinstance(paths, (str, Path)):
        paths = [paths] if Path(paths).exists() else glob.glob(str(paths)) or [paths]
    shards = sorted(map(str, paths))
    missing = [shard for shard in shards if not Path(shard).exists()]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: no such file; pack it with `python data.py {kind} ... --out "
                         f"FILE` (`python data.py {kind} --help` lists its flags)")
    return shards


# ---------------------------------------------------------------------------- text pairs


class PairBlocks(TextBlocks):
    """TextBlocks of packed pairs (data.py xtext): the tokens of the same text for a second model come beside.

    They are called CLIP's, which they are for XDBERT; for distill.py they may be another BERT's.
    A block's CLIP tokens fill up to `segments` segments of `length` tokens one after the other, each with its
    own start and end token, as in the released code; the first is in use even where it is empty. cut: how
    many tokens of this part do not fit. used: mean share of segments in use.
    """
    kind = "xtext"

    def __init__(self, paths, block_size, part="train", val_glob="", segments=9, length=77):
        if segments < 1 or length < 3:
            raise SystemExit(f"--segments {segments} of {length} tokens: at least 1 of 3 (start, a token, "
                             "end)")
        self.segments, self.length, self.clip_vocab = segments, length, None
        # of each shard: CLIP's ids; where each block's begin; how many each word piece has, (blocks, T - 2)
        self.tower_tokens, self.tower_start, self.tower_counts = [], [], []
        super().__init__(paths, block_size, part, val_glob)
        size = np.concatenate(list(map(np.diff, self.tower_start)))[self.offset:self.offset + self.n]
        self.cut = int(np.maximum(size - segments * (length - 2), 0).sum())
        self.used = float(np.clip(-(-size // (length - 2)), 1, segments).mean() / segments)

    def add_shard(self, path, attributes, maps):
        self.clip_vocab = self.clip_vocab or stored_clip_vocab(path, attributes, self.vocab, maps)
        if attributes["clip_hash"] != self.clip_vocab.hash:
            raise SystemExit(f"{path}: its CLIP side was packed with another vocabulary; pack it anew")
        if "clip_tokens" not in maps or len(maps.get("clip_counts", ())) != len(maps["tokens"]):
            raise SystemExit(f"{path}: damaged (the CLIP side does not fit the words); pack it anew")
        blocks, width = self.shards[-1].shape
        counts = np.asarray(maps["clip_counts"])[:blocks * width].reshape(blocks, width)
        self.tower_counts.append(counts)
        self.tower_start.append(np.cumsum(np.r_[0, counts.sum(1, dtype=np.int64)]))
        if self.tower_start[-1][-1] > len(maps["clip_tokens"]):
            raise SystemExit(f"{path}: damaged (fewer CLIP tokens than counted); pack it anew")
        self.tower_tokens.append(maps["clip_tokens"])

    def clip_batch(self, index) -> dict:
        """The CLIP side of blocks `index`, see segment_batch; and "clip_end": int64 (b, S), where in the
        flattened clip_ids each segment's end token stands, 0 where it is not in use."""
        room, texts = self.length - 2, []  # room: tokens that fit in a segment
        for shard, block in zip(*self.places(index)):
            a, b = self.tower_start[shard][block:block + 2]
            texts.append(self.tower_tokens[shard][a:min(b, a + self.segments * room)])
            check_ids(texts[-1], self.clip_vocab, self.files[shard])
        size = np.array([[len(text)] for text in texts])  # (b, 1)
        before = np.arange(self.segments) * room
        count = np.where((before > 0) & (before >= size), -1, size - before)
        batch = segment_batch(np.concatenate(texts), np.cumsum(size)[:, None] - size + before, count,
                              self.clip_vocab, self.length)
        n, width = batch["clip_ids"].shape
        end = np.zeros(count.shape, np.int64)
        end[count >= 0] = np.arange(n) * width + np.minimum(count[count >= 0], room) + 1
        return batch | tensors(clip_end=end)

    def word_places(self, index):
        """Of each word piece of blocks `index`, (b, T - 2): the piece at which its word's CLIP tokens are
        counted, -1 = no word (special tokens, no token so far); how many CLIP tokens of the block stand in
        front of these; and how many begin at the piece.

        Pieces that count none go with the piece before them.
        """
        places = list(zip(*self.places(index)))
        ids, counts = (np.stack([part[shard][block] for shard, block in places])
                       for part in (self.shards, self.tower_counts))
        first = np.maximum.accumulate(np.where(counts > 0, np.arange(counts.shape[1]), -1), 1)
        begin = np.take_along_axis(np.cumsum(counts, 1, dtype=np.int64) - counts, np.maximum(first, 0), 1)
        return np.where(np.isin(ids, self.vocab.specials), -1, first), begin, counts

    def segment_words(self, index):
        """bool (b, S, T): which word pieces of blocks `index` a segment covers: their CLIP tokens begin in
        it. Special tokens, and what is cut, are in no segment."""
        first, begin, _ = self.word_places(index)
        segment = np.where(first < 0, -1, begin // (self.length - 2))
        words = segment[:, None] == np.arange(self.segments)[:, None]
        return tensors(words=np.pad(words, ((0, 0), (0, 0), (1, 1))))["words"]

    def alignment(self, index) -> dict:
        """Which CLIP tokens belong to which words of blocks `index`, as places of the words in the block.

        -> {"word": int64 (b, T), of each word piece, -1 = none: special tokens and what is cut; "clip_word":
        int64 (b, R), of each real token of clip_batch, -1 = start, end and padding}. Where a block has no
        word, [CLS] goes with the first segment's start token, so that each block has a token of both.
        """
        room, (first, begin, counts) = self.length - 2, self.word_places(index)
        word = np.where((first >= 0) & (begin < self.segments * room), first + 1, -1)
        word = np.pad(word, ((0, 0), (1, 1)), constant_values=-1)
        tokens = np.minimum(counts.sum(1, dtype=np.int64), self.segments * room)
        real = tokens + 2 * np.maximum(1, -(-tokens // room))  # with start and end of the segments
        clip_word, piece = np.full((len(word), real.max()), -1), np.arange(1, 1 + counts.shape[1])
        for row, n in enumerate(tokens):
            at = np.arange(n)
            clip_word[row, at + 1 + 2 * (at // room)] = np.repeat(piece, counts[row])[:n]
        without = ~(word >= 0).any(1)
        word[without, 0] = clip_word[without, 0] = 0
        return tensors(word=word, clip_word=clip_word)


def stored_clip_vocab(path, attributes, vocab, maps):
    """The vocabulary of a packed file's CLIP side; that is `vocab` where both sides have the same."""
    if attributes["clip_hash"] == vocab.hash:
        return vocab
    lines = maps.get("clip_vocab", [])
    casing = [bool(attributes[name]) for name in ("clip_lower", "clip_strip_accents") if name in attributes]
    found = Vocab(lines, *casing, str(path)) if casing else CLIPVocab(lines, str(path))
    if found.hash != attributes["clip_hash"]:
        raise SystemExit(f"{path}: damaged (CLIP's vocabulary does not fit its hash); pack it anew")
    return found


def segment_batch(tokens, begin, count, vocab, length) -> dict:
    """Pieces of a flat array of ids -> CLIP's input for B texts of S segments each.

    begin, count: (B, S); a segment holds tokens[begin:begin + count], cut to length - 2, between vocab's
    start and end; count -1 = not in use. Returns {"clip_ids": int64 (n, l), the n segments in use row by row,
    padded with 0, which may be a real token, too; "clip_place": int64 (B, R), where in the flattened clip_ids
    the real tokens of row b stand, start and end among them, in order and packed to the left; "clip_mask":
    bool (B, R), True = real}.
    """
    in_use, count = count >= 0, np.minimum(count, length - 2)
    begin, size = begin[in_use], count[in_use]  # (n,)
    column = np.arange(size.max() + 2)
    segment, at = np.nonzero((column > 0) & (column <= size[:, None]))
    ids = np.zeros((len(size), len(column)), np.int64)
    ids[segment, at] = tokens[begin[segment] + at - 1]
    ids[:, 0], ids[np.arange(len(size)), size + 1] = vocab.start, vocab.end
    real = np.where(in_use, count + 2, 0).sum(1)  # tokens of each row
    mask = np.arange(real.max()) < real[:, None]
    place = np.zeros(mask.shape, np.int64)
    place[mask] = np.flatnonzero(column < size[:, None] + 2)
    return tensors(clip_ids=ids, clip_place=place, clip_mask=mask)


def clip_targets(clip_ids, clip_place, clip_mask, vocab, rate, *keys):
    """CLIPTC's targets -> (index (m,) into the flattened (B, R), their ids (m,)), int64.

    clip_ids, clip_place, clip_mask: of segment_batch. Each real token, id 0 among them, is a target with
    probability `rate`; start, end, other special tokens of `vocab` and padding never are. keys: as in
    mask_tokens.
    """
    ids = clip_ids.numpy().ravel()[clip_place.numpy()]
    u = keyed_uniform("clip target", *columns(keys), np.arange(ids.shape[1]))
    index = np.flatnonzero((u < rate) & clip_mask.numpy())
    index = index[~np.isin(ids.ravel()[index], vocab.specials)]
    return tuple(tensors(index=index, ids=ids.ravel()[index]).values())


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


def check_clips(path, attributes, maps):
    """SystemExit where the parts of packed videos do not fit each other."""
    try:
        videos, captions, frames = len(maps["task"]), len(maps["start"]), maps["frames"]
        fits = (frames.shape[1] == attributes["d2"] + attributes["d3"] and len(maps["video_id"]) == videos
                and len(maps["end"]) == captions and len(maps["token_offsets"]) == captions + 1
                and maps["token_offsets"][-1] == len(maps["tokens"]))
        for name, size in (("caption_offsets", captions), ("frame_offsets", len(frames))):
            offsets = maps[name]
            fits = fits and len(offsets) == videos + 1 and (offsets[0], offsets[-1]) == (0, size) and (
                np.diff(offsets) > 0).all()
        shard, shards = (attributes.get(name, 1) for name in ("shard", "shards"))
        fits = fits and videos and frames.dtype == np.float16 and shard in range(1, shards + 1)
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise SystemExit(f"{path}: damaged (its parts do not fit each other); pack it anew")


def open_videos(files):
    """Packed videos -> (Vocab, [(attributes, maps) of each file]).

    SystemExit where they are no set: other vocabularies or channels, a shard that is missing, a video twice.
    """
    vocab, opened = None, []
    for path in files:
        attributes, own, maps = open_packed(path, "videos", vocab)
        check_clips(path, attributes, maps)
        vocab, opened = vocab or own, [*opened, (attributes, maps)]
        if own.hash != vocab.hash:
            raise SystemExit(f"{path}: packed with another vocabulary than {files[0]}; pack it anew")
        widths, first = ([held[name] for name in ("d2", "d3")] for held in (attributes, opened[0][0]))
        if widths != first:
            raise SystemExit(f"{path}: has {widths[0]} + {widths[1]} channels a frame, {files[0]} has "
                             f"{first[0]} + {first[1]}; pack both from the same features")
    found = Counter((held["shards"], held.get("shard", 1)) for held, _ in opened if "shards" in held)
    for n in {n for n, _ in found}:
        sets = max(count for (shards, _), count in found.items() if shards == n)
        gone = list(itertools.islice((i for i in range(1, n + 1) if found[n, i] < sets), 9))
        if gone:
            raise SystemExit(f"{files[0]}: of its {n} shards these are missing: {str(gone[:8])[1:-1]}"
                             f"{', ...' * (len(gone) > 8)}; give them, too, or make them, such as by `python "
                             f"data.py videos ... --shard {gone[0]}/{n}`")
    if len(files) > 1:
        names = np.concatenate([maps["video_id"] for _, maps in opened])
        order = np.argsort(names, kind="stable")
        for i in np.flatnonzero(names[order[1:]] == names[order[:-1]])[:1]:
            ends = np.cumsum([len(maps["video_id"]) for _, maps in opened])
            one, two = (files[np.searchsorted(ends, v, side="right")] for v in order[i:i + 2])
            raise SystemExit(f"{two}: the video {names[order[i]].decode(errors='replace')} is in {one}, too; "
                             "give each video once")
    return vocab, opened


def held_out_windows(video_id, captions, val_clips):
    """Which samples are held out -> (video (n,), caption of that video with which it begins (n,)), shuffled.

    Videos follow each other by the hash of their id, so that the order of the videos and how they are divided
    into files mean nothing. Each gives a sample from the first half of its captions and, where it has two or
    more, one from the second half.
    """
    number = np.fromiter(map(zlib.crc32, video_id), np.int64, len(video_id))
    key = hash64("held out", number)
    order = np.argsort(key, kind="stable")
    ties = np.flatnonzero(key[order[1:]] == key[order[:-1]])  # different ids of one CRC follow by name
    if len(ties):
        tied = np.union1d(ties, ties + 1)
        order[tied] = order[tied][np.lexsort((video_id[order[tied]], key[order[tied]]))]
    n = int(np.searchsorted(np.cumsum(np.minimum(captions[order], 2)), val_clips)) + 1
    video = order[:min(n, max(1, len(order) // 8))]
    half = captions[video] // 2
    first = keyed_integers(np.maximum(half, 1), "first window", number[video])
    second = half + keyed_integers(captions[video] - half, "second window", number[video])
    video = np.r_[video, video[half > 0]][:val_clips]
    window = np.r_[first, second[half > 0]][:val_clips]
    shuffled = np.argsort(hash64("order of windows", number[video], window), kind="stable")
    return video[shuffled], window[shuffled]


class Joined:
    """Arrays as one, of which only what is asked for is read; `add` is added to what is read of each."""

    def __init__(self, parts, add=0):
        self.parts, self.add = parts, np.broadcast_to(add, len(parts))
        self.start, self.dtype = np.cumsum([0, *map(len, parts)]), np.result_type(*parts)

    def __len__(self):
        return int(self.start[-1])

    def __getitem__(self, at):
        at = np.arange(*at.indices(len(self))) if isinstance(at, slice) else np.asarray(at)
        part = np.searchsorted(self.start, at, side="right") - 1
        out = np.empty(at.shape, self.dtype)
        for p in np.unique(part):
            here = part == p
            out[here] = self.parts[p][at[here] - self.start[p]] + self.add[p]
        return out


SMALL = 1 << 22  # bytes of frames for which threads cost more than they save


@functools.cache
def reading_threads():
    """Threads that read frames at the same time."""
    return ThreadPoolExecutor(4, "frames")


class FrameFile:
    """The frames of a packed file; from a cold disk reading is 4 times as fast as a memory map."""

    def __init__(self, path, frames):
        self.path, self.row = path, frames.strides[0]
        self.offset = frames.ctypes.data - frames.base.ctypes.data
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            refuse_more_files(path, error)
            raise
        weakref.finalize(self, os.close, self.file)

    def read(self, first, out):
        """Fills the contiguous array `out` with what begins at row `first`."""
        at, left = self.offset + first * self.row, memoryview(out).cast("B")
        while left:
            try:
                got = os.preadv(self.file, [left], at)
            except OSError as error:
                raise SystemExit(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
            if not got:
                raise SystemExit(f"{self.path}: was cut off while it was in use; pack it anew")
            at, left = at + got, left[got:]


class VideoClips:
    """Captions and frames of packed videos. A sample begins at a caption and may join those behind it.

    paths: a file, a glob or a list of files (shards), which are one set in the order of their names. T:
    tokens with [CLS] and [SEP]. max_frames: at most that many of a sample's frames. vision: "video" (all
    channels, every frame), "image" (2D channels of the middle frame only; the paper's image-level
    ablation), or "none" (batches without frames). part: "train", whose samples begin at every caption, or
    "val": one or two samples of each video that is held out, in an order that has nothing to do with the
    files'. Videos are held out by the hash of their id, until they have `val_clips` samples, and at most an
    eighth of them; how they are divided into files changes nothing. The order of training samples is of
    their places in the files. feat_norm: scales each frame's 2D part and 3D part to length 1. pinned:
    frames lie in page-locked memory, which a GPU reads while the CPU goes on. task, video_id: of each video
    of the part. Several threads may ask for batches at the same time.
    """

    def __init__(self, paths, T, max_frames=512, vision="video", part="train", val_clips=10000,
                 feat_norm=False, pinned=False):
        if vision not in ("video", "image", "none"):
            raise SystemExit(f"--vision {vision}: choose video or image")
        if T < 3:
            raise SystemExit(f"--block_size {T}: at least 3 ([CLS], a token, [SEP])")
        self.path, self.files = paths, find_shards(paths, "videos")
        self.vocab, opened = open_videos(self.files)
        hashes, maps = [attributes["hash"] for attributes, _ in opened], [maps for _, maps in opened]
        self.hash = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        self.T, self.max_frames, self.vision, self.feat_norm = T, max_frames, vision, feat_norm
        self.pinned, self.d2, self.d3 = pinned, opened[0][0]["d2"], opened[0][0]["d3"]
        self.features = {"video": self.d2 + self.d3, "image": self.d2, "none": 0}[vision]
        # of each video: the file that holds it, its first row of frames there, and how many it has
        self.file = np.repeat(np.arange(len(maps)), [len(held["task"]) for held in maps])
        self.frame_start = np.concatenate([held["frame_offsets"][:-1] for held in maps])
        self.length = np.concatenate([np.diff(held["frame_offsets"]) for held in maps])
        captions = np.concatenate([np.diff(held["caption_offsets"]) for held in maps])
        self.caption_start = np.cumsum(np.r_[0, captions])  # of each video
        self.start, self.end = (Joined([held[x] for held in maps]) for x in ("start", "end"))  # seconds
        self.tokens = Joined([held["tokens"] for held in maps])
        # first token of each caption, and the end of the last
        self.token_start = Joined([held["token_offsets"][:-1] for held in maps[:-1]]
                                  + [maps[-1]["token_offsets"]], self.tokens.start[:-1])
        if len(captions) < 2:
            raise SystemExit(f"{self.files[0]}: holds one video; at least two are needed, one is held out")
        self.frames = [FrameFile(path, held["frames"]) for path, held in zip(self.files, maps)]
        video_id, task = (np.concatenate([held[name] for held in maps]) for name in ("video_id", "task"))
        held_out, windows = held_out_windows(video_id, captions, val_clips)
        train = np.ones(len(captions), bool)
        train[held_out] = False
        self.videos = np.flatnonzero(train if part == "train" else ~train)  # of this part, in the files
        self.task, self.video_id = task[self.videos], video_id[self.videos]
        self.sample_start = np.cumsum(np.r_[0, captions[self.videos]])  # of each video, in training
        self.windows = None if part == "train" else self.caption_start[held_out] + windows

    def __len__(self):
        return int(self.sample_start[-1]) if self.windows is None else len(self.windows)

    def index(self, seed, step, batch_size, positions):
        """Sample indices (b,) of `positions` in the global batch of `step`; each epoch has its own order."""
        return permuted(np.int64(step) * batch_size + positions, len(self), seed)

    def captions(self, index):
        """The caption in the files with which each of the samples `index` begins."""
        index = np.asarray(index, np.int64)
        if self.windows is not None:
            return self.windows[index]
        video = np.searchsorted(self.sample_start, index, side="right") - 1
        return self.caption_start[self.videos[video]] + index - self.sample_start[video]

    def video_of(self, index):
        """The video, counted in this part, of samples `index`; task[video_of(index)] is their task."""
        found = np.searchsorted(self.caption_start, self.captions(index), side="right") - 1
        return np.searchsorted(self.videos, found)

    def batch(self, index) -> dict:
        """Captions joined from `index` on until T - 2 tokens or the end of the video; the last may be cut.

        -> {"ids": int64 (b, T), "mask": bool (b, T), "frames": float16 as stored, with feat_norm float32,
        (b, F, D), "frame_mask": bool (b, F), "index"}. Frames: from floor(start of the first) to ceil(end of
        the last caption), F the longest of the batch.
        """
        first, most = self.captions(index), len(self.token_start) - 1
        video_end = self.token_start[self.caption_start[self.videos[self.video_of(index)] + 1]]
        stop = np.minimum(self.token_start[first] + self.T - 2, video_end)
        # each caption has a token, so that the last one begins at most T - 3 captions behind
        begin = self.token_start[np.minimum(first[:, None] + np.arange(self.T - 1), most)]
        return self.spans(index, stop, first + (begin < stop[:, None]).sum(1))

    def clips(self, index) -> dict:
        """The same of ONE caption each and its own frames: for vokens, and for retrieval by a sentence."""
        first = self.captions(index)
        stop = np.minimum(self.token_start[first] + self.T - 2, self.token_start[first + 1])
        return self.spans(index, stop, first + 1)

    def spans(self, index, stop, behind):
        """Batch of the tokens of samples `index` up to token `stop`, which lies in caption `behind` - 1."""
        caption, video = self.captions(index), self.videos[self.video_of(index)]
        begin, following = self.token_start[caption], self.token_start[caption + 1]
        least, most = (self.tokens.start[self.file[video] + i] for i in (0, 1))  # of the file
        fits = ((least <= begin) & (begin < following) & (following <= most) & (begin <= stop)
                & (stop <= most) & (caption < behind))
        if not fits.all():
            raise SystemExit(f"{self.file_of(video[~fits])}: damaged (token_offsets lead out of tokens); "
                             "pack it anew")
        at = begin[:, None] + np.arange(self.T - 2)
        real = at < stop[:, None]
        ids = np.full((len(index), self.T), self.vocab.pad, np.int64)
        ids[:, 0] = self.vocab.cls
        ids[:, 1:-1] = np.where(real, self.tokens[np.where(real, at, begin[:, None])], self.vocab.pad)
        check_ids(ids, self.vocab, self.file_of(video[ids.max(1) == ids.max()]))
        n = real.sum(1)
        ids[np.arange(len(index)), n + 1] = self.vocab.sep
        mask = np.arange(self.T) < n[:, None] + 2
        frames = {} if self.vision == "none" else self.frame_batch(video, caption, behind)
        return tensors(ids=ids, mask=mask) | frames | {"index": np.asarray(index, np.int64)}

    def file_of(self, video):
        """Path of the file that holds the first of `video`."""
        return self.files[self.file[video[0]]]

    def frame_batch(self, video, caption, behind):
        """"frames" and "frame_mask" of captions `caption` to `behind` - 1 of `video`, (b,) each."""
        start, length = np.floor(self.start[caption]), self.length[video]  # seconds
        at = caption[:, None] + np.arange((behind - caption).max())
        within = at < behind[:, None]
        end = np.where(within, self.end[np.where(within, at, caption[:, None])], 0).max(1)
        fits = (0 <= start) & (start < length) & np.isfinite(end)
        if not fits.all():
            raise SystemExit(f"{self.file_of(video[~fits])}: damaged (a caption lies outside of its video); "
                             "pack it anew")
        first = start.astype(np.int64)
        last = np.maximum(np.minimum(np.ceil(end), length).astype(np.int64), first + 1)
        if self.vision == "image":
            first = (first + last) // 2
            last = first + 1
        last = np.minimum(last, first + self.max_frames)
        count = last - first
        frames = self.read_frames(self.file[video], self.frame_start[video] + first, count)
        if self.feat_norm:
            normed = frames.numpy().astype(np.float32)
            for part in (normed[..., :self.d2], normed[..., self.d2:]):
                part /= np.maximum(np.linalg.norm(part, axis=-1, keepdims=True), 1e-12)
            frames = tensors(frames=normed)["frames"]
        return {"frames": frames} | tensors(frame_mask=np.arange(count.max()) < count[:, None])

    def read_frames(self, file, first, count):
        """`count` rows from row `first` of the frames of files, (b,) each -> float16 (b, F, D), zero behind
        them.

        D may be less than a row has where one row is read.
        """
        import torch
        out = torch.empty(len(count), int(count.max()), self.features, dtype=torch.float16,
                          pin_memory=self.pinned)
        rows = out.numpy()

        def read(i):
            self.frames[file[i]].read(int(first[i]), rows[i, :count[i]])
            rows[i, count[i]:] = 0
        list((map if rows.nbytes < SMALL else reading_threads().map)(read, range(len(count))))
        return out

    def duration(self, index):
        """Seconds from start to end of the captions with which the samples `index` begin."""
        caption = self.captions(index)
        return self.end[caption] - self.start[caption]

    def voken_clips(self, K, seed):
        """Indices of K clips of 1 to 20 s (paper, Appendix A): one of each task, then of random tasks.

        Goes round the tasks, in each round in another random order, and takes a clip of a further video of
        theirs, until there are K; with fewer videos than K it returns a clip of each.
        """
        video, clips, turn = np.arange(len(self.task)), [], 0
        draw, pick = keyed_uniform("voken video", seed, video), keyed_uniform("voken clip", seed, video)
        order = np.lexsort((draw, self.task))
        tasks, first = np.unique(self.task[order], return_index=True)
        waiting = [list(videos) for videos in np.split(order, first[1:])]  # of each task: those not yet taken
        while any(waiting) and len(clips) < K:
            for t in np.argsort(hash64("voken task", seed, turn, tasks), kind="stable"):
                while waiting[t]:
                    v = waiting[t].pop()
                    fit = np.arange(self.sample_start[v], self.sample_start[v + 1])
                    fit = fit[(self.duration(fit) >= 1) & (self.duration(fit) <= 20)]
                    if len(fit):
                        clips.append(fit[int(pick[v] * len(fit))])
                        break
            turn += 1
        if not clips:
            raise SystemExit("voken: no clip lasts 1 to 20 s")
        return np.array(clips[:K])


if __name__ == "__main__":
    from prepare.commands import main
    clear_up_on_sigterm()
    main()
