"""data.py: batches are pure functions of (seed, step, position), blocks hold the packed stream, masks are
80/10/10, MATCH is half another text, clips bring their frames, and files that are not whole are refused.

Run: python -m pytest -q tests/test_data.py
"""
import hashlib
import os
import resource
import tracemalloc
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch
from conftest import stop_line

import common
import data
from common import hash64, update_hash
from parts.vocab import SPECIALS, CLIPVocab, Vocab
from prepare.packing import pack_text, pack_videos, pack_xtext
from run import file_hash
from test_packing import howto, packed
from test_vocab import MERGES, WORDS, clip, vocab

# ---------------------------------------------------------------------------- text blocks


@pytest.fixture
def shards(vocab, tmp_path):
    """Two shards of 1,003 and 502 tokens; token i is an ordinary id, never the same for 17 tokens."""
    for name, n in (("s0", 1002), ("s1", 501)):
        (tmp_path / f"{name}.txt").write_text(" ".join(WORDS[:7][(i * i + i // 7) % 7] for i in range(n)))
        pack_text([tmp_path / f"{name}.txt"], vocab, tmp_path / f"{name}.h5")
    return str(tmp_path / "s?.h5")


def test_blocks_hold_the_stream_between_cls_and_sep(shards, vocab):
    train, val = (data.TextBlocks(shards, 12, part) for part in ("train", "val"))
    streams = [packed(path)["tokens"] for path in data.find_shards(shards)]
    blocks = np.concatenate([s[:len(s) // 10 * 10].reshape(-1, 10) for s in streams])
    assert [len(s) for s in streams] == [1003, 502] and train.dropped == 3 + 2
    assert len(train) == 149 and len(val) == 1
    order = np.random.default_rng(0).permutation(149)  # batches cross the shards
    whole = torch.empty(150, 12, dtype=torch.int64)
    whole[order], whole[149:] = train.batch(order)["ids"], val.batch([0])["ids"]
    assert train.batch(order)["ids"].dtype == torch.int64
    assert torch.equal(whole[:, 1:-1], torch.from_numpy(blocks.astype(np.int64)))
    assert (whole[:, 0] == vocab.cls).all() and (whole[:, -1] == vocab.sep).all()
    assert train.batch([3])["mask"].all() and train.hash == val.hash
    apart = data.TextBlocks(shards, 12, "val", val_glob=shards.replace("?", "1"))
    assert len(apart) == 50 and apart.hash != train.hash
    assert len(data.TextBlocks(shards.replace("?", "0"), 12, "train", val_glob=shards)) == 100
    assert torch.equal(apart.batch([7])["ids"], train.batch([107])["ids"])


def test_val_is_the_last_percent(demo):
    path = demo / "demo-s0" / "corpus.h5"
    train, val = (data.TextBlocks(path, 48, part) for part in ("train", "val"))
    tokens, n = packed(path)["tokens"], len(train)
    assert len(val) == (n + len(val)) // 100 and n + len(val) == len(tokens) // 46
    assert val.batch([0])["ids"][0, 1:-1].tolist() == tokens[n * 46:n * 46 + 46].tolist()


def test_blocks_refuse_what_they_cannot_read(shards, vocab, tmp_path):
    other = Vocab(vocab.tokens, lower=False)
    pack_text([tmp_path / "s1.txt"], other, tmp_path / "s2.h5")
    assert "s2.h5: packed with another vocabulary" in stop_line(data.TextBlocks, shards, 12)
    assert "no such file" in stop_line(data.TextBlocks, str(tmp_path / "x*.h5"), 12)
    assert f"{tmp_path}: is a folder, no packed file; pack it" in stop_line(data.TextBlocks, str(tmp_path), 12)
    assert "too few" in stop_line(data.TextBlocks, str(tmp_path / "s0.h5"), 1003)
    assert "too few" in stop_line(data.TextBlocks, str(tmp_path / "s0.h5"), 1100, "val")
    assert "--block_size 2" in stop_line(data.TextBlocks, shards, 2)
    assert "not videos" in stop_line(data.VideoClips, tmp_path / "s0.h5", 12)
    whole, bad = (tmp_path / "s0.h5").read_bytes(), tmp_path / "bad.h5"
    for damage in (whole[:len(whole) // 2], whole[:1], b"", whole[:64] + bytes(len(whole) - 64),
                   b"the cat sat"):
        bad.write_bytes(damage)
        assert "bad.h5" in stop_line(data.TextBlocks, str(bad), 12)
    bad.write_bytes(whole)
    with h5py.File(bad, "a") as f:
        f.attrs["format"] = 99
    line = stop_line(data.TextBlocks, str(bad), 12)
    assert "format 99" in line and "python data.py text" in line
    with h5py.File(bad, "a") as f:
        f.attrs["format"] = data.FORMAT
        tokens = f["tokens"][:]
        del f["tokens"]
        f.create_dataset("tokens", data=tokens, chunks=True)
    assert "bad.h5" in stop_line(data.TextBlocks, str(bad), 12)  # not contiguous
    bad.write_bytes(whole)
    for name, value, says in (("hash", None, ""), ("lower", None, ""), ("lower", np.bytes_("yes"), "lower is 'yes'"),
                              ("vocab_hash", 3, "vocab_hash is 3"), ("kind", [1, 2], ""),
                              ("hash", "a" * 64, "hash is a string of an older version")):  # in HDF5's heap
        bad.write_bytes(whole)
        with h5py.File(bad, "a") as f:
            f.attrs.pop(name) if value is None else f.attrs.update({name: value})
        assert f"bad.h5: not a packed file, or damaged ({says}" in stop_line(data.TextBlocks, str(bad), 12)
    bad.write_bytes(whole)
    with h5py.File(bad, "a") as f:
        f["vocab"][-1] = 65
    assert "damaged" in stop_line(data.TextBlocks, str(bad), 12)


def object_dtype(f):
    del f["tokens"]
    f.create_dataset("tokens", data=["x"] * 400, dtype=h5py.string_dtype())


def references(f):
    del f["tokens"]
    f.create_dataset("tokens", data=[f.ref] * 400, dtype=h5py.ref_dtype)


def external_link(f):
    del f["tokens"]
    f["tokens"] = h5py.ExternalLink("s1.h5", "/tokens")


def external_storage(f):
    del f["tokens"]
    f.create_dataset("tokens", (400,), np.uint16, external=[("/etc/passwd", 0, 800)])


def virtual(f):
    del f["tokens"]
    layout = h5py.VirtualLayout((400,), np.uint16)
    layout[:] = h5py.VirtualSource("s1.h5", "tokens", (400,))
    f.create_virtual_dataset("tokens", layout)


def compressed(f):
    del f["tokens"]
    f.create_dataset("tokens", data=np.zeros(400, np.uint16), compression="gzip")


def unwritten(f):
    """4 GB of a vocabulary that take no room in the file."""
    del f["vocab"]
    f.create_dataset("vocab", (2 ** 32,), np.uint8, chunks=(2 ** 20,))


def unallocated(f):
    del f["tokens"]
    f.create_dataset("tokens", (2 ** 40,), np.uint16)


def group(f):
    del f["tokens"]
    f.create_group("tokens")


def floats(f):
    del f["tokens"]
    f["tokens"] = np.zeros(400)


def table(f):
    del f["tokens"]
    f["tokens"] = np.zeros((20, 20), np.uint16)


def unknown(f):
    f["more"] = np.zeros(4)


@pytest.mark.parametrize("change", [object_dtype, references, external_link, external_storage, virtual,
                                    compressed, unwritten, unallocated, group, floats, table, unknown])
def test_packed_file_is_mapped_only_where_it_is_of_our_form(shards, tmp_path, change):
    bad = tmp_path / "bad.h5"
    bad.write_bytes((tmp_path / "s0.h5").read_bytes())
    with h5py.File(bad, "a") as f:
        change(f)
    tracemalloc.start()
    line = stop_line(data.TextBlocks, str(bad), 12)
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()
    assert "bad.h5: not a packed file, or damaged" in line and "pack it anew" in line


def test_ids_beyond_the_vocabulary_are_found_as_they_are_read(shards, vocab, tmp_path):
    bad = tmp_path / "bad.h5"
    bad.write_bytes((tmp_path / "s0.h5").read_bytes())
    with h5py.File(bad, "a") as f:
        f["tokens"][25] = vocab.size
    blocks = data.TextBlocks(str(bad), 12)
    assert blocks.batch([1])["ids"].max() < vocab.size
    line = stop_line(blocks.batch, [1, 2])
    assert f"bad.h5: damaged (the id {vocab.size}, its vocabulary has {vocab.size} tokens)" in line


# ---------------------------------------------------------------------------- text pairs


@pytest.fixture
def pairs(vocab, clip, tmp_path):
    """Two shards of pairs; words of 1 to 9 CLIP tokens, some without a word piece."""
    rng = np.random.default_rng(1)
    for name, n in (("p0", 900), ("p1", 500)):
        words = rng.choice(["the", "cat's", "dog", "unknownly", "\x07", "a", "sat", "!", "cats"], n)
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
        pack_xtext([tmp_path / f"{name}.txt"], vocab, clip, tmp_path / f"{name}.h5")
    return str(tmp_path / "p?.h5")


def segments_of(tokens, vocab, segments, length):
    """The plain way: CLIP tokens of a text -> list of its segments with start and end."""
    parts = [tokens[s * (length - 2):(s + 1) * (length - 2)] for s in range(segments)]
    return [[vocab.start, *part, vocab.end] for s, part in enumerate(parts) if len(part) or s == 0]


def test_segments_cover_the_words_whose_clip_tokens_they_hold(vocab):
    """By hand: 5 tokens a segment; the pieces of a word stay together, [SEP] and what is cut are nowhere."""
    blocks = data.PairBlocks.__new__(data.PairBlocks)
    blocks.vocab, blocks.segments, blocks.length = vocab, 2, 7
    blocks.offset, blocks.shard_start = 0, np.array([0, 3])
    word = vocab.ordinary[0]
    blocks.shards = [np.array([[word] * 8, [word] * 3 + [vocab.sep] + [word] * 4, [word] * 8])]
    blocks.tower_counts = [np.array([[2, 2, 3, 0, 0, 1, 4, 1],    # begin at 0 2 4 . . 7 8 12: the last is cut
                                     [0, 1, 1, 0, 0, 1, 1, 1],    # all in the first; no token before piece 1
                                     [0] * 8], np.uint16)]
    found = blocks.segment_words([0, 1, 2]).int().tolist()
    assert found[0] == [[0, 1, 1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]]
    assert found[1] == [[0, 0, 1, 1, 0, 1, 1, 1, 1, 0], [0] * 10]
    assert found[2] == [[0] * 10, [0] * 10]


def test_pair_blocks_bring_the_clip_tokens_of_their_words(pairs, vocab, clip):
    train, val = (data.PairBlocks(pairs, 12, part, segments=2, length=9) for part in ("train", "val"))
    text = data.TextBlocks.__len__(train)
    assert text == len(train) and train.clip_vocab.hash == clip.hash and train.vocab.hash == vocab.hash
    plain = []
    for path in data.find_shards(pairs):
        maps = packed(path)
        at = np.cumsum([0, *maps["clip_counts"]])
        for block in range(len(maps["tokens"]) // 10):
            plain.append((maps["tokens"][block * 10:block * 10 + 10],
                          maps["clip_tokens"][at[block * 10]:at[block * 10 + 10]].tolist()))
    assert len(plain) == len(train) + len(val) and len(val) == 1
    for blocks, expected in ((train, plain[:-1]), (val, plain[-1:])):
        order = np.random.default_rng(0).permutation(len(blocks))
        ids, pair = blocks.batch(order)["ids"], blocks.clip_batch(order)
        real = [pair["clip_ids"].flatten()[place[mask]].tolist()
                for place, mask in zip(pair["clip_place"], pair["clip_mask"])]
        parts = [segments_of(expected[block][1], clip, 2, 9) for block in order]
        assert all(np.array_equal(row[1:-1], expected[block][0]) for row, block in zip(ids, order))
        assert real == [sum(part, []) for part in parts] and len(pair["clip_ids"]) == sum(map(len, parts))
        assert blocks.cut == sum(max(0, len(tokens) - 14) for _, tokens in expected) and (
            np.isclose(blocks.used, np.mean([len(part) / 2 for part in parts])))
        again = blocks.clip_batch(order[:3])  # another batch is another width and no other content
        assert [again["clip_ids"].flatten()[place[mask]].tolist() for place, mask in zip(
            again["clip_place"], again["clip_mask"])] == real[:3]
        for row, tokens in enumerate(segments_of(expected[block][1], clip, 2, 9) for block in order):
            ends = [pair["clip_ids"].flatten()[end].item() for end in pair["clip_end"][row][:len(tokens)]]
            assert ends == [clip.end] * len(tokens) and not pair["clip_end"][row][len(tokens):].any()
            assert [pair["clip_ids"].flatten()[end - len(t) + 1].item() for end, t in zip(
                pair["clip_end"][row], tokens)] == [clip.start] * len(tokens)
    assert train.cut > 0 and train.used > 0.5 and train.hash == val.hash
    wide = data.PairBlocks(pairs, 12, segments=40, length=9)
    assert wide.cut == 0 and wide.used < 0.2
    apart = data.PairBlocks(pairs, 12, "val", pairs.replace("?", "1"), 2, 9)
    first = len(packed(pairs.replace("?", "0"))["tokens"]) // 10
    assert torch.equal(apart.clip_batch([7])["clip_ids"], train.clip_batch([first + 7])["clip_ids"])


def test_a_block_without_clip_tokens_still_has_start_and_end(vocab, clip, tmp_path):
    (tmp_path / "t.txt").write_text("sats cats")  # blocks s, ##at, ##s, ...: a word's first has its tokens
    words = Vocab([*SPECIALS, "s", "##at", "##s", "c"])
    pack_xtext([tmp_path / "t.txt"], words, clip, tmp_path / "t.h5")
    blocks = data.PairBlocks(tmp_path / "t.h5", 3, segments=3, length=5)
    pair = blocks.clip_batch([1, 2])
    assert pair["clip_ids"].tolist() == [[clip.start, clip.end]] * 2 and pair["clip_mask"].all()
    assert pair["clip_place"].tolist() == [[0, 1], [2, 3]]
    both = blocks.clip_batch([1, 0])
    assert both["clip_mask"].sum(1).tolist() == [2, 2 + len(clip.encode(["sats"])[0])]


def test_pair_blocks_refuse_what_they_cannot_read(pairs, vocab, clip, tmp_path):
    source, more = tmp_path / "p1.txt", CLIPVocab([*MERGES, "do o"])
    pack_text([source], vocab, tmp_path / "text.h5")
    line = stop_line(data.PairBlocks, tmp_path / "text.h5", 12)
    assert "holds packed text, not xtext" in line and "data.py xtext" in line
    assert len(data.TextBlocks(pairs, 12)) == len(data.PairBlocks(pairs, 12))  # pairs hold the text, too
    pack_xtext([source], vocab, more, tmp_path / "p2.h5")
    assert "p2.h5: its CLIP side was packed with another" in stop_line(data.PairBlocks, pairs, 12)
    (tmp_path / "p2.h5").unlink()
    pack_xtext([source], Vocab(vocab.tokens, lower=False), clip, tmp_path / "p2.h5")
    assert "p2.h5: packed with another vocabulary" in stop_line(data.PairBlocks, pairs, 12)
    assert "data.py xtext" in stop_line(data.PairBlocks, str(tmp_path / "x.h5"), 12)
    assert "data.py xtext" in stop_line(data.PairBlocks, str(tmp_path / "x*.h5"), 12)
    for segments, length in ((0, 77), (9, 2)):
        assert f"--segments {segments}" in stop_line(
            data.PairBlocks, pairs, 12, segments=segments, length=length)
    with h5py.File(tmp_path / "p0.h5", "a") as f:
        f["clip_vocab"][-5] = ord("q")  # of the last merge, ' s</w>
    assert "damaged" in stop_line(data.PairBlocks, str(tmp_path / "p0.h5"), 12)


def test_segment_batch_equals_a_plain_loop(clip):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, 400).astype(np.uint16)
    for length in (5, 30):
        count = rng.integers(-1, 12, (20, 3))
        count[:, 0] = np.maximum(count[:, 0], 0)
        begin = rng.integers(0, 380, (20, 3))
        batch = data.segment_batch(tokens, begin, count, clip, length)
        rows = [[[clip.start, *tokens[a:a + min(n, length - 2)].tolist(), clip.end]
                 for a, n in zip(*row) if n >= 0] for row in zip(begin, count)]
        segments = sum(rows, [])
        longest = max(map(len, segments))
        assert batch["clip_ids"].tolist() == [part + [0] * (longest - len(part)) for part in segments]
        assert batch["clip_ids"].dtype == batch["clip_place"].dtype == torch.int64
        assert batch["clip_mask"].dtype == torch.bool and longest <= length
        R, at = max(sum(map(len, row)) for row in rows), 0
        for row, place, mask in zip(rows, batch["clip_place"], batch["clip_mask"]):
            where = [(at + s) * longest + j for s, part in enumerate(row) for j in range(len(part))]
            assert place.tolist() == where + [0] * (R - len(where))
            assert mask.tolist() == [True] * len(where) + [False] * (R - len(where))
            at += len(row)


def test_clip_targets_spare_start_end_and_padding_and_count_id_0(clip):
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(60_000) < 0.3, 0, rng.integers(0, clip.size - 2, 60_000))
    count = rng.integers(0, 19, (2000, 2))
    count[::3, 1] = -1
    begin = np.arange(2000)[:, None] * 30 + [0, 12]
    batch = data.segment_batch(tokens, begin, count, clip, 20)
    args = batch["clip_ids"], batch["clip_place"], batch["clip_mask"], clip
    index, targets = data.clip_targets(*args, 0.15, 3, 7, np.arange(2000))
    ids = batch["clip_ids"].flatten()[batch["clip_place"]]
    special = (ids == clip.start) | (ids == clip.end)
    free = batch["clip_mask"] & ~special
    assert index.dtype == targets.dtype == torch.int64 and torch.equal(ids.flatten()[index], targets)
    assert free.flatten()[index].all() and len(index.unique()) == len(index)
    for which in (ids == 0, ids != 0):  # within 4 standard deviations of a binomial
        n, hits = int((free & which).sum()), int(which.flatten()[index].sum())
        assert n > 5000 and abs(hits - 0.15 * n) < 4 * (0.15 * 0.85 * n) ** 0.5
    everything = data.clip_targets(*args, 1.0, 3, 7, np.arange(2000))[0]
    assert torch.equal(everything, free.flatten().nonzero()[:, 0])
    assert not len(data.clip_targets(*args, 0.0, 3, 7, np.arange(2000))[0])
    # a pure function of its keys, whatever stands beside a row
    half = data.segment_batch(tokens, begin[1000:], count[1000:], clip, 20)
    part, _ = data.clip_targets(half["clip_ids"], half["clip_place"], half["clip_mask"], clip, 0.15, 3, 7,
                                np.arange(1000, 2000))
    R, width = ids.shape[1], half["clip_place"].shape[1]
    later = index[index >= 1000 * R] - 1000 * R
    assert torch.equal(later // R * width + later % R, part)
    assert not torch.equal(index, data.clip_targets(*args, 0.15, 3, 8, np.arange(2000))[0])


def test_match_is_half_another_text_and_never_its_own_then():
    index = np.arange(20_000) % 7
    other = data.match_texts(index, 7, 0, 5, np.arange(20_000))
    assert other.dtype == np.int64 and other.min() == 0 and other.max() == 6
    n = int((other != index).sum())  # "another" is never its own, so these are all of them
    assert abs(n - 10_000) < 4 * 5000 ** 0.5
    shift = np.bincount((other - index) % 7, minlength=7)[1:]
    assert ((shift - n / 6) ** 2 / (n / 6)).sum() < 21  # chi-square, 5 degrees, p = 1e-3
    assert np.array_equal(data.match_texts(index[90:99], 7, 0, 5, np.arange(90, 99)), other[90:99])
    assert not np.array_equal(data.match_texts(index, 7, 0, 6, np.arange(20_000)), other)
    assert set(data.match_texts(np.zeros(99, int), 2, 0, 0, np.arange(99))) == {0, 1}
    assert "at least two blocks" in stop_line(data.match_texts, np.zeros(1, int), 1, 0, 0, np.arange(1))


# ---------------------------------------------------------------------------- order and masks


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permuted_is_a_bijection_in_every_epoch(n):
    orders = data.permuted(np.arange(3 * n), n, seed=5).reshape(3, n)
    assert all(np.array_equal(np.sort(order), np.arange(n)) for order in orders)
    if n > 5:
        assert (orders[0] != orders[1]).any()
        assert (orders[1] != data.permuted(np.arange(n, 2 * n), n, seed=6)).any()
    assert np.array_equal(data.permuted(np.array([2 * n, 0]), n, 5), [orders[2, 0], orders[0, 0]])


@pytest.mark.parametrize("n, half", [(5, 2), (300, 5), (10 ** 9, 15)])
def test_permuted_is_the_feistel_network_of_its_docstring(n, half):
    def plain(g):
        place, low = g % n, 2 ** half - 1
        while True:
            left, right = place >> half, place & low
            for r in range(6):
                left, right = right, left ^ int(hash64("permute", 3, g // n, r, right)) & low
            place = left << half | right
            if place < n:
                return place

    g = np.random.default_rng(0).integers(0, 3 * n, 50)
    assert data.permuted(g, n, 3).tolist() == [plain(int(i)) for i in g]


def test_permuted_mixes_evenly():
    n, epochs = 40, 4000
    first = data.permuted(np.arange(epochs) * n, n, 0)  # the sample that each epoch begins with
    counts = np.bincount(first, minlength=n)
    # chi-square with 39 degrees: 80 is p = 1e-4
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 80
    order = data.permuted(np.arange(10 ** 5), 10 ** 5, 1)
    assert abs(np.corrcoef(order, np.arange(10 ** 5))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02


def test_ranks_share_each_batch_and_the_order_ignores_their_number(shards):
    blocks = data.TextBlocks(shards, 12)

    def visits(ranks, accum, steps=range(12)):
        return np.stack([np.concatenate([
            blocks.index(3, step, 12, data.micro_rows(12, rank, ranks, micro, accum))
            for rank in range(ranks) for micro in range(accum)]) for step in steps])

    one = visits(1, 1)
    assert all(np.array_equal(one, visits(ranks, accum)) for ranks, accum in ((2, 1), (3, 2), (1, 4), (6, 2)))
    assert np.unique(one).size == 144 == one.size  # 12 steps of 12 are within the first epoch of 149
    assert not np.array_equal(one, visits(1, 1, range(13, 25)))
    assert np.array_equal(visits(1, 1, [7]), one[7:8])  # no state: any step by itself


def test_masking_is_80_10_10_and_spares_special_tokens(demo):
    blocks = data.TextBlocks(demo / "demo-s0" / "corpus.h5", 48)
    vocab, index = blocks.vocab, np.arange(4000)
    ids = blocks.batch(index)["ids"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, 40:] = False
    inputs, labels = data.mask_tokens(ids, mask, vocab, 0.15, "80/10/10", 0, 9, index)
    target = labels != -100
    special = torch.isin(ids, torch.tensor(vocab.specials))
    assert special[:, 1:-1].any() and not (target & (special | ~mask)).any()
    assert torch.equal(labels[target], ids[target]) and torch.equal(inputs[~target], ids[~target])

    def close(count, n, p):  # within 3 standard deviations of a binomial
        return abs(count - n * p) < 3 * (n * p * (1 - p)) ** 0.5

    n, free = int(target.sum()), int((~special & mask).sum())
    masked, same = int((inputs[target] == vocab.mask).sum()), int((inputs[target] == ids[target]).sum())
    ordinary = vocab.size - 5
    assert close(n, free, 0.15) and close(masked, n, 0.8) and close(same, n, 0.1 + 0.1 / ordinary)
    swapped = inputs[target & (inputs != vocab.mask) & (inputs != ids)]
    counts, mean = torch.bincount(swapped, minlength=vocab.size), len(swapped) / ordinary
    assert counts[vocab.specials].sum() == 0
    chi_square = ((counts.float() - mean) ** 2).sum() / mean
    assert chi_square < ordinary + 5 * (2 * ordinary) ** 0.5
    column = target.float().mean(0)[1:39]
    assert column.min() > 0.1 and column.max() < 0.2  # no favoured position


def test_masks_are_a_pure_function_of_their_keys(demo):
    blocks = data.TextBlocks(demo / "demo-s0" / "corpus.h5", 48)
    batch, positions = blocks.batch(np.arange(8)), np.arange(8)

    def masked(rows, *keys, rate=0.15, split="80/10/10"):
        return data.mask_tokens(batch["ids"][rows], batch["mask"][rows], blocks.vocab, rate, split, *keys)

    everything = slice(0, 8)
    whole = masked(everything, 1, 2, positions)
    part = masked(slice(4, 8), 1, 2, positions[4:])
    assert all(torch.equal(a[4:], b) for a, b in zip(whole, part))
    for keys in ((1, 3, positions), (2, 2, positions), ("val", positions), (1, 2, positions + 8)):
        assert not torch.equal(whole[1], masked(everything, *keys)[1])
    target = whole[1] != -100
    assert (masked(everything, 1, 2, positions, split="100/0/0")[0][target] == blocks.vocab.mask).all()
    assert (masked(everything, 1, positions, rate=0.0)[1] == -100).all()
    for text in ("80/10", "a/b/c", "80/10/20", "110/-20/10"):
        assert f"--mask_split {text}" in stop_line(data.parse_split, text)


@pytest.mark.parametrize("rows, rate, M", [(64, 0.15, 640), (8, 0.15, 128), (1, 0.5, 64), (3, 1.0, 192)])
def test_padding_of_masked_words_makes_their_number_static_and_drops_none(demo, monkeypatch, rows, rate, M):
    """M: by hand; 64 x 48 x 0.15 = 461 and 6 times the root of 461 x 0.85 = 119 more make 10 times 64."""
    blocks = data.TextBlocks(demo / "demo-s0" / "corpus.h5", 48)
    batch, how = blocks.batch(np.arange(rows)), (blocks.vocab, rate, "80/10/10")
    for step in range(20):
        plain, padded = (data.masked_words(batch, *how, 0, step, np.arange(rows), pad=pad) for pad in (False, True))
        n = len(plain["mlm_targets"])
        assert torch.equal(plain["inputs"], padded["inputs"]) and n > 0
        for name, rest in (("mlm_index", torch.arange(M - n) % (48 * rows)), ("mlm_targets", torch.full((M - n,), -100))):
            assert torch.equal(padded[name], torch.cat([plain[name], rest])), (step, name)
    # more than 6 standard deviations
    every = torch.full((rows, 48), 7)
    monkeypatch.setattr(data, "mask_tokens", lambda *_: (every, every))
    found = data.masked_words(batch, blocks.vocab, 0.01, "80/10/10", pad=True)["mlm_targets"]
    assert len(found) == -(-48 * rows // 64) * 64 and (found == 7).sum() == 48 * rows


def test_anchors_are_real_tokens_drawn_once():
    mask = torch.arange(20) < torch.tensor([[20], [3], [1], [20]])
    k = np.array([5, 5, 5, 0])
    row, token = data.anchor_tokens(mask, k, 0, 1, np.arange(4))
    assert row.tolist() == [0] * 5 + [1] * 3 + [2] and mask[row, token].all()
    assert row.dtype == token.dtype == torch.int64
    assert len(set(zip(row.tolist(), token.tolist()))) == 9
    again = data.anchor_tokens(mask[1:], k[1:], 0, 1, np.arange(1, 4))
    assert again[1].tolist() == token[5:].tolist()  # the same in another micro-batch
    steps = np.arange(4000)
    _, first = data.anchor_tokens(mask[:1].expand(4000, 20), np.ones(4000, int), 0, steps, 0 * steps)
    counts = np.bincount(first, minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 52  # chi-square, 19 degrees, p = 1e-4
    assert data.anchors_per_row(512, 96, np.arange(96)).sum() == 512
    assert data.anchors_per_row(10, 4, np.array([1, 3])).tolist() == [3, 2]


def test_anchors_are_the_smallest_draws_of_a_row_in_order(monkeypatch):
    rng = np.random.default_rng(0)
    for distinct in (10 ** 9, 4):  # 4: many draws are equal, and the earlier token comes first
        u = rng.integers(0, distinct, (30, 40)) / distinct
        monkeypatch.setattr(data, "keyed_uniform", lambda *_: u)
        real, k = rng.random((30, 40)) < 0.6, rng.integers(0, 30, 30)
        row, token = data.anchor_tokens(torch.from_numpy(real), k)
        plain = [(r, t) for r in range(30)
                 for t in sorted(np.flatnonzero(real[r]), key=lambda t: u[r, t])[:k[r]]]
        assert list(zip(row.tolist(), token.tolist())) == plain


# ---------------------------------------------------------------------------- videos


def test_captions_join_and_bring_their_frames(vocab, tmp_path):
    pack_videos(vocab=vocab, **howto(tmp_path, videos=("v00", "v01", "v02", "v03")))  # v03 is held out
    path = tmp_path / "videos.h5"

    def texts(batch):
        return [vocab.decode(row[m]) for row, m in zip(batch["ids"], batch["mask"])]

    def seconds(batch):  # the first channel of a frame counts them
        return [f[m, 0].tolist() for f, m in zip(batch["frames"], batch["frame_mask"])]

    train = data.VideoClips(path, 11, val_clips=1)
    assert (train.d2, train.d3, train.features, len(train)) == (4, 3, 7, 9)
    assert train.vocab.hash == vocab.hash
    batch = train.batch([0, 1, 5])
    assert texts(batch) == ["[CLS] the cat sat on the mat, the mat [SEP]",
                            "[CLS] on the mat, the mat a dog ran [SEP]", "[CLS] a dog ran [SEP]"]
    # 0.5-5.9 s, 2.2-7.5 s, and 6.0-7.5 s of the second video
    assert seconds(batch) == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], [106, 107]]
    assert batch["frames"][0, :, 4].tolist() == [0, 1, 3, 4, 6, 7]
    assert (batch["frames"][~batch["frame_mask"]] == 0).all()
    assert batch["frames"].dtype == torch.float16 and batch["ids"].shape == (3, 11)
    cut = data.VideoClips(path, 7, max_frames=3, val_clips=1).batch([0])  # cut inside a caption
    assert texts(cut) == ["[CLS] the cat sat on the [SEP]"] and seconds(cut) == [[0, 1, 2]]
    one = train.clips([0, 4])
    assert texts(one) == ["[CLS] the cat sat [SEP]", "[CLS] on the mat, the mat [SEP]"]
    assert seconds(one) == [[0, 1], [102, 103, 104, 105]]
    image = data.VideoClips(path, 11, vision="image", val_clips=1)
    assert image.features == 4 and image.batch([0, 5])["frames"].tolist() == [[[3.0] * 4], [[107.0] * 4]]
    normed = data.VideoClips(path, 11, val_clips=1, feat_norm=True).batch([5])["frames"]
    assert normed.dtype == torch.float32
    blind = data.VideoClips(path, 11, vision="none", val_clips=1)
    assert blind.features == 0 and blind.batch([0]).keys() == {"ids", "mask", "index"}
    for part in (normed[..., :4], normed[..., 4:]):
        assert torch.allclose(part.norm(dim=-1), torch.ones(1, 2))
    assert np.allclose(train.duration([0, 1]), [1.5, 3.7])
    assert "--vision film" in stop_line(data.VideoClips, path, 11, vision="film")


@pytest.mark.parametrize("name, place, value, when", [
    ("caption_offsets", 1, 0, "open"), ("caption_offsets", -1, 99, "open"), ("frame_offsets", 1, -5, "open"),
    ("token_offsets", -1, 3, "open"), ("token_offsets", 1, 10 ** 9, "read"), ("token_offsets", 1, -9, "read"),
    ("end", 0, np.nan, "read"), ("start", 0, np.nan, "read"), ("start", 0, 1e9, "read"), ("start", 0, -3.0, "read"),
    ("tokens", 2, 60_000, "read")])
def test_clips_that_do_not_fit_each_other_are_one_line(vocab, tmp_path, name, place, value, when):
    pack_videos(vocab=vocab, **howto(tmp_path))
    path = tmp_path / "videos.h5"
    with h5py.File(path, "a") as f:
        f[name][place] = value
    if when == "open":
        assert "videos.h5: damaged" in stop_line(data.VideoClips, path, 11, val_clips=1)
        return
    clips = data.VideoClips(path, 11, val_clips=1)
    assert "videos.h5: damaged" in stop_line(clips.batch, [0])


def test_held_out_clips_are_of_whole_videos_and_shaped_as_in_training(demo):
    path = demo / "demo-s0" / "videos.h5"
    train, val = (data.VideoClips(path, 24, part=part, val_clips=499) for part in ("train", "val"))
    assert (len(train), len(val)) == (7000, 499) and not set(train.video_id) & set(val.video_id)
    assert len({*train.video_id, *val.video_id}) == 2000
    videos = val.video_of(np.arange(499))
    assert Counter(Counter(videos.tolist()).values()) == {2: 249, 1: 1}
    assert len(set(val.captions(np.arange(499)).tolist())) == 499
    assert len(set(videos[:64].tolist())) > 55 and (np.diff(videos) < 0).any()  # one batch: many videos
    for part in "mask", "frame_mask":
        own, shape = (x.batch(np.arange(0, len(x), len(x) // 400))[part].sum(1).float().mean()
                      for x in (val, train))
        assert abs(own - shape) < 0.05 * shape
    assert len(data.VideoClips(path, 24, part="val").video_id) == 250  # at most an eighth of the videos
    index = np.concatenate([train.index(0, step, 50, np.arange(50)) for step in range(280)])
    assert np.array_equal(np.sort(index[:7000]), np.arange(7000))
    assert not np.array_equal(index[:7000], index[7000:])


@pytest.mark.parametrize("numbers", [1 << 32, 50, 1])  # few: ids that have the same CRC
def test_held_out_videos_do_not_depend_on_the_order_of_the_file(monkeypatch, numbers):
    monkeypatch.setattr(data.zlib, "crc32", lambda name, real=zlib.crc32: real(name) % numbers)
    rng = np.random.default_rng(0)
    names, captions = np.array([b"video %d" % i for i in range(3000)]), rng.integers(1, 9, 3000)
    video, window = data.held_out_windows(names, captions, 100)
    order = rng.permutation(3000)
    moved, moved_window = data.held_out_windows(names[order], captions[order], 100)
    assert names[video].tolist() == names[order][moved].tolist()
    assert window.tolist() == moved_window.tolist() and len(video) == 100
    assert (window >= 0).all() and (window < captions[video]).all()
    if numbers < 1 << 32:
        return
    # each place of a caption in its video is as likely: chi-square, 7 degrees, p = 1e-4
    _, window = data.held_out_windows(names, np.full(3000, 8), 700)
    counts = np.bincount(window, minlength=8)
    assert len(window) == 700 and ((counts - 87.5) ** 2 / 87.5).sum() < 30


# ---------------------------------------------------------------------------- sets of videos


def write_clips(path, vocab, names, width=(4, 3), seed=0, **attributes):
    """A packed file of made videos of up to 9 captions, 1 to 3 s each, of 1 to 9 tokens."""
    parts = {name: [] for name in ("frames", "tokens", "sizes", "start", "end")}
    captions, frames = [], []
    for name in names:
        rng = np.random.default_rng([seed, zlib.crc32(name)])  # a video is the same in any file
        captions.append(int(rng.integers(1, 9)))
        frames.append(3 * captions[-1] + 2)
        parts["sizes"].append(rng.integers(1, 10, captions[-1]))
        parts["tokens"].append(rng.choice(vocab.ordinary, parts["sizes"][-1].sum()))
        parts["start"].append(3 * np.arange(captions[-1]) + rng.random(captions[-1]))
        parts["end"].append(parts["start"][-1] + 1 + 2 * rng.random(captions[-1]))
        parts["frames"].append(rng.standard_normal((frames[-1], sum(width))).astype(np.float16))
    parts = {name: np.concatenate(held) for name, held in parts.items()}
    data.write_packed(path, "videos", vocab, {
        "video_id": np.array(names), "task": np.arange(len(names)), "frame_offsets": np.cumsum([0, *frames]),
        "caption_offsets": np.cumsum([0, *captions]), "token_offsets": np.cumsum(np.r_[0, parts.pop("sizes")]),
        **parts | {"tokens": parts["tokens"].astype(vocab.dtype)}}, d2=width[0], d3=width[1], **attributes)


NAMES = [b"v%02d" % i for i in range(40)]


@pytest.fixture
def sharded(vocab, tmp_path):
    """Paths of the same 40 videos: one file, and three shards."""
    write_clips(tmp_path / "one.h5", vocab, NAMES)
    for i in (1, 2, 3):
        write_clips(tmp_path / f"s{i}.h5", vocab, [x for x in NAMES if zlib.crc32(x) % 3 == i - 1], shard=i, shards=3)
    return tmp_path / "one.h5", str(tmp_path / "s?.h5")


def plain_clip(clips, file, sample, joined):
    """(ids, frames) of a sample, the plain way, from the arrays of one packed file."""
    c = int(clips.captions([sample])[0])
    video = int(np.searchsorted(file["caption_offsets"], c, side="right")) - 1
    last = c + 1
    ids = file["tokens"][file["token_offsets"][c]:file["token_offsets"][last]].tolist()
    while joined and len(ids) < clips.T - 2 and last < file["caption_offsets"][video + 1]:
        ids += file["tokens"][file["token_offsets"][last]:file["token_offsets"][last + 1]].tolist()
        last += 1
    a, b = int(np.floor(file["start"][c])), int(np.ceil(file["end"][c:last].max()))
    frames = file["frames"][file["frame_offsets"][video]:file["frame_offsets"][video + 1]][a:b][:clips.max_frames]
    return [clips.vocab.cls, *ids[:clips.T - 2], clips.vocab.sep], frames


@pytest.mark.parametrize("threads", [False, True])
def test_clips_are_what_the_file_holds(sharded, threads, monkeypatch):
    if threads:  # as if the frames were many
        monkeypatch.setattr(data, "SMALL", 0)
    file = packed(sharded[0])
    for T, max_frames in ((20, 512), (9, 4)):
        clips = data.VideoClips(sharded[0], T, max_frames, val_clips=9)
        for joined, cut in ((True, clips.batch), (False, clips.clips)):
            batch = cut(np.arange(len(clips)))
            assert batch["frames"].shape[1] == batch["frame_mask"].sum(1).max()
            for i in range(len(clips)):
                ids, frames = plain_clip(clips, file, i, joined)
                assert batch["ids"][i][batch["mask"][i]].tolist() == ids
                assert np.array_equal(batch["frames"][i][batch["frame_mask"][i]].numpy(), frames)
                assert not batch["frames"][i][~batch["frame_mask"][i]].any()


def test_shards_are_one_set_with_the_held_out_videos_of_one_file(sharded):
    for part in ("train", "val"):
        one, many = (data.VideoClips(paths, 20, part=part, val_clips=7) for paths in sharded)
        assert len(one) == len(many) and one.hash != many.hash and (one.d2, one.d3) == (many.d2, many.d3)
        name, held = ([clips.video_id[clips.video_of(np.arange(len(clips)))] for clips in (one, many)])
        first = [c - clips.caption_start[clips.videos[clips.video_of(np.arange(len(clips)))]]
                 for clips in (one, many) for c in [clips.captions(np.arange(len(clips)))]]
        order = [np.lexsort((first[0], name)), np.lexsort((first[1], held))]
        assert (name[order[0]] == held[order[1]]).all() and (first[0][order[0]] == first[1][order[1]]).all()
        if part == "val":
            assert (order[0] == order[1]).all()  # the same samples in the same order
        for cut in ("batch", "clips"):
            a, b = getattr(one, cut)(order[0]), getattr(many, cut)(order[1])
            for key in ("ids", "mask", "frames", "frame_mask"):
                assert torch.equal(a[key], b[key])
        assert (one.duration(order[0]) == many.duration(order[1])).all()
    assert data.VideoClips([sharded[0]], 20, val_clips=7).hash == one.hash == data.open_packed(sharded[0])[0]["hash"]


def test_files_that_are_no_set_are_refused(sharded, vocab, tmp_path):
    shards = [tmp_path / f"s{i}.h5" for i in (1, 2, 3)]
    line = stop_line(data.VideoClips, shards[1:2], 20)
    assert "s2.h5: of its 3 shards these are missing: 1, 3; give them" in line and "--shard 1/3" in line
    assert "missing: 2; give them" in stop_line(data.VideoClips, [shards[0], shards[2]], 20)
    write_clips(tmp_path / "t.h5", vocab, [b"x", NAMES[5], b"y"])
    line = stop_line(data.VideoClips, [*shards, tmp_path / "t.h5"], 20)
    assert f"t.h5: the video v05 is in {shards[zlib.crc32(NAMES[5]) % 3]}, too; give each video once" in line
    write_clips(tmp_path / "t.h5", vocab, [b"x", b"y"], (3, 4))
    assert "t.h5: has 3 + 4 channels a frame" in stop_line(data.VideoClips, [*shards, tmp_path / "t.h5"], 20)
    write_clips(tmp_path / "t.h5", Vocab(vocab.tokens, lower=False), [b"x", b"y"])
    assert "t.h5: packed with another vocabulary" in stop_line(data.VideoClips, [*shards, tmp_path / "t.h5"], 20)
    write_clips(tmp_path / "t.h5", vocab, [b"x", b"y"])
    assert len(data.VideoClips([*shards, tmp_path / "t.h5"], 20, val_clips=1).video_id) == 41
    write_clips(tmp_path / "t.h5", vocab, [b"x", b"y"], shard=1, shards=3)  # of another set of as many
    assert "missing: 2, 3; give them" in stop_line(data.VideoClips, [*shards, tmp_path / "t.h5"], 20)
    write_clips(tmp_path / "t.h5", vocab, [b"x", b"y"], shard=1, shards=10 ** 9)
    assert "1000000000 shards these are missing: 2, 3, 4, 5, 6, 7, 8, 9, ...; " in stop_line(
        data.VideoClips, tmp_path / "t.h5", 20)
    for attributes in dict(shard="one", shards=2), dict(shard=3, shards=2), dict(shard=1, shards=2.5), dict(shard=2):
        write_clips(tmp_path / "t.h5", vocab, [b"x", b"y"], **attributes)
        assert "t.h5: damaged" in stop_line(data.VideoClips, tmp_path / "t.h5", 20)
    limits, free = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(1)
    os.close(free)
    try:  # no more than are open now
        for more in range(8):  # the file itself, its map, and the one that frames are read from
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, limits[1]))
            try:
                data.VideoClips(shards, 20)
            except SystemExit as end:
                assert ".h5: too many files are open; allow more" in str(end)
            else:
                assert more > 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "python data.py videos" in stop_line(data.VideoClips, str(tmp_path / "no*.h5"), 20)


def test_only_what_a_teacher_sees_is_read(sharded, monkeypatch):
    read = []
    monkeypatch.setattr(data.FrameFile, "read", lambda self, first, out: read.append(out.shape))
    for vision, seen in (("none", []), ("image", [(1, 4)] * 5)):
        data.VideoClips(sharded[1], 20, vision=vision, val_clips=7).batch(np.arange(5))
        assert read == seen


def test_several_threads_may_ask_for_batches(sharded, monkeypatch):
    monkeypatch.setattr(data, "SMALL", 0)
    clips = data.VideoClips(sharded[1], 20, val_clips=7)
    index = [np.arange(i, len(clips), 7) for i in range(7)]
    alone = [clips.batch(i) for i in index]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for a, b in zip(alone, threads.map(clips.batch, index)):
                assert all(torch.equal(a[key], b[key]) for key in ("ids", "frames", "frame_mask"))


def test_frames_that_cannot_be_read_are_one_line(sharded, tmp_path, monkeypatch):
    clips = data.VideoClips(sharded[0], 20, val_clips=7)

    def broken(*_):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(data.os, "preadv", broken)
    assert "one.h5: cannot be read (Input/output error)" in stop_line(clips.batch, [0])
    monkeypatch.setattr(data.os, "preadv", lambda *_: 0)
    assert "one.h5: was cut off while it was in use" in stop_line(clips.batch, [0])


# ---------------------------------------------------------------------------- hashes


def test_hash_of_large_content_is_of_its_size_and_of_blocks(tmp_path, monkeypatch):
    content, path = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8), tmp_path / "a"

    def found(content):
        digest = hashlib.sha256()
        update_hash(digest, len(content), lambda first, last: content[first:last])
        path.write_bytes(content.tobytes())
        assert file_hash(path) == digest.hexdigest()  # of a file as of an array
        return digest.hexdigest()

    assert found(content) == hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(common, "HASHED", (10, 100))
    assert found(content) == hashlib.sha256(content).hexdigest()  # just small enough
    monkeypatch.setattr(common, "HASHED", (10, 4))
    blocks = [0, 330, 660, 990]
    assert found(content) == hashlib.sha256(b"1000" + b"".join(content[i:i + 10] for i in blocks)).hexdigest()
    seen = {found(content)}
    for place in (0, 9, 330, 669, 999):
        other = content.copy()
        other[place] ^= 1
        seen.add(found(other))
    assert len(seen) == 6 and found(content[:-1]) not in seen
    other = content.copy()
    other[500] ^= 1  # between the blocks
    assert found(other) in seen


# ---------------------------------------------------------------------------- vokens


@pytest.fixture
def uneven(vocab, tmp_path):
    """Clips of 40 tasks of 3 videos and 40 of 30; the first caption of each video lasts 0.5 s."""
    size = np.tile([3, 30], 40)
    captions, videos = 2, int(size.sum()) + 80
    task = np.r_[np.repeat(np.arange(80), size), np.full(80, 99)]
    np.random.default_rng(0).shuffle(task)
    start = np.tile([0.0, 0.5], videos)
    data.write_packed(tmp_path / "uneven.h5", "videos", vocab, {
        "video_id": np.array([b"%04d" % v for v in range(videos)]), "task": task,
        "frame_offsets": np.arange(videos + 1) * 2, "caption_offsets": np.arange(videos + 1) * captions,
        "frames": np.zeros((2 * videos, 3), np.float16), "tokens": np.zeros(2 * videos, vocab.dtype),
        "token_offsets": np.arange(2 * videos + 1), "start": start,
        "end": start + np.tile([0.5, 1.5], videos)}, d2=3, d3=0)
    return data.VideoClips(tmp_path / "uneven.h5", 8, val_clips=1)


def test_voken_clips_take_one_of_each_task_then_of_uniformly_drawn_tasks(uneven):
    tasks, small = set(uneven.task.tolist()), 0
    for seed in range(20):
        clips = uneven.voken_clips(len(tasks) + 40, seed)
        assert (uneven.duration(clips) == 1.5).all()
        of = uneven.task[uneven.video_of(clips)]
        assert set(of[:len(tasks)].tolist()) == tasks and len(set(uneven.video_of(clips))) == len(clips)
        extra = of[len(tasks):]
        assert len(set(extra.tolist())) == 40
        small += (extra % 2 == 0).sum()
    assert 340 < small < 460  # of 800, half


def test_voken_clips_are_of_different_videos(demo):
    train = data.VideoClips(demo / "demo-s0" / "videos.h5", 48, val_clips=500)
    tasks = set(train.task.tolist())
    for K in (30, len(tasks), 150, 1750):
        clips = train.voken_clips(K, 0)
        videos = train.video_of(clips)
        assert len(clips) == K == len(set(videos.tolist()))
        per_task = Counter(train.task[videos].tolist())
        assert len(per_task) == min(K, len(tasks))
        assert K > 1000 or max(per_task.values()) <= 1 + K // len(tasks)
    assert len(train.voken_clips(10 ** 4, 0)) == 1750
    assert not np.array_equal(train.voken_clips(30, 0), train.voken_clips(30, 1))
