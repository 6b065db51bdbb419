"""prepare/packing.py and the commands of data.py: packers keep every token and frame, need no torch and no
more memory for more text, and refuse what is broken in one line, leaving nothing behind.

Run: python -m pytest -q tests/test_packing.py
"""
import csv
import gzip
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import stop_line

import data
from parts.vocab import SPECIALS, Vocab, load_vocab
from prepare import packing
from prepare.commands import main
from prepare.packing import (cached_words, in_order, pack_text, pack_videos, pack_xtext, read_captions, texts_of,
                             train_vocab)
from test_vocab import HARD, clip, openai, vocab

ROOT = Path(__file__).resolve().parent.parent


def packed(path):
    return {name: np.array(a) for name, a in data.open_packed(path)[2].items()}


def stop(*_, **__):
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------- vocabulary


def test_trained_vocabulary_is_deterministic_and_complete(tmp_path):
    text = "".join(f"{a}{b} likes {b}{a}tion , {a} and {b} .\n"
                   for a in ("moor", "tal", "quin", "be") for b in "xyzab")
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "c.json").write_text(json.dumps({"v": {"start": [0], "end": [1], "text": ["Größe jazz"]}}))
    sources = [tmp_path / "a.txt", tmp_path / "c.json"]
    # the trainer's own order is another one each time, also within a process
    first, *_ = (train_vocab(sources, tmp_path / f"v{i}.txt", 90) for i in (1, 2, 3))
    files = [(tmp_path / f"v{i}.txt").read_bytes() for i in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
    assert first.hash == load_vocab(tmp_path / "v1.txt").hash and first.size == 90
    assert first.unk not in sum(first.encode(text.split("\n") + ["grosse jazz"]), [])
    assert "--size 20" in stop_line(train_vocab, sources, tmp_path / "v4.txt", 20)
    assert "exists" in stop_line(train_vocab, sources, tmp_path / "v1.txt", 90)


# ---------------------------------------------------------------------------- text


def by_line(vocab, text):
    """What pack_text must make of a text, the plain way: encode each line, [SEP] behind each document."""
    out, inside = [], False
    for line in text.split("\n"):
        if line.strip():
            out, inside = out + vocab.encode([line])[0], True
        elif inside:
            out, inside = out + [vocab.sep], False
    return out + [vocab.sep] * inside


def test_packed_text_equals_encoding_line_by_line(bert_vocab, tmp_path):
    rng = np.random.default_rng(0)
    text = "\n".join("".join(rng.permutation(HARD)[:4]) + rng.choice(["", "\n", " \n \n", "\r\n\t\r\n"])
                     for _ in range(300))
    (tmp_path / "t.txt").write_bytes(("\n\n" + text).encode())
    counts = pack_text([tmp_path / "t.txt"], bert_vocab, tmp_path / "t.h5")
    plain = by_line(bert_vocab, text)
    attributes, vocab, maps = data.open_packed(tmp_path / "t.h5", "text")
    assert maps["tokens"].tolist() == plain and maps["tokens"].dtype == np.uint16
    assert counts["tokens"] == len(plain)
    assert counts["documents"] == plain.count(vocab.sep) - text.count("[SEP]")
    assert attributes["vocab_hash"] == vocab.hash == bert_vocab.hash
    assert bytes(maps["sources"]) == b'["t.txt"]'
    assert attributes["bytes"] == (tmp_path / "t.txt").stat().st_size


@pytest.mark.parametrize("least", [1, 40, 3000])
def test_texts_that_are_encoded_apart_make_one_stream(bert_vocab, tmp_path, monkeypatch, least):
    rng = np.random.default_rng(least)
    text = "\n\n" + "\n".join("".join(rng.permutation(HARD)[:4]) + rng.choice(["", "\n", " \n \n", "\n\n\n", "\r\n\t"])
                               for _ in range(200))
    lines = text.split("\n")
    monkeypatch.setattr(packing, "read_pieces", lambda path: ((line + "\n", 1) for line in lines))
    monkeypatch.setattr(texts_of, "__defaults__", (least,))
    (tmp_path / "t.txt").write_text("of this only the size is read")
    counts = pack_text([tmp_path / "t.txt"], bert_vocab, tmp_path / "t.h5")
    plain = by_line(bert_vocab, text)
    assert packed(tmp_path / "t.h5")["tokens"].tolist() == plain
    assert counts["documents"] == plain.count(bert_vocab.sep) - text.count("[SEP]")
    texts = list(texts_of(tmp_path / "t.txt"))
    assert sum(size for *_, size in texts) == len(lines) and len(texts) > 100 * (least == 1)


def test_any_number_of_jobs_packs_the_same_bytes(vocab, clip, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(texts_of, "__defaults__", (500,))
    text = "\n".join([ODD, *("".join(rng.permutation(HARD)[:4]) + rng.choice(["", "\n"]) for _ in range(100))])
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(as_json_lines().encode() * 40))
    rows = {f"v{i}": {"start": [0], "end": [1], "text": [HARD[i % len(HARD)]]} for i in range(50)}
    (tmp_path / "c.json").write_text(json.dumps(rows))
    sources = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.json")]
    (tmp_path / "latin.txt").write_bytes(b"the cat\n" * 999 + b"caf\xe9\n")
    assert "latin.txt: not UTF-8 near byte 7995" in stop_line(pack_text, [*sources, tmp_path / "latin.txt"], vocab,
                                                             tmp_path / "o.h5", 2)
    assert "--jobs -1: must be" in stop_line(pack_text, sources, vocab, tmp_path / "o.h5", -1)
    assert sorted(tmp_path.iterdir()) == sorted([*sources, tmp_path / "latin.txt"])
    for kind, pack, jobs in (("text", pack_text, 3), ("pairs", lambda *a: pack_xtext(*a[:2], clip, *a[2:]), 2)):
        one, many = tmp_path / f"{kind}1.h5", tmp_path / f"{kind}n.h5"
        counts, same = pack(sources, vocab, one), pack(sources, vocab, many, jobs)
        assert one.read_bytes() == many.read_bytes()
        assert [counts[k] == same[k] for k in ("tokens", "documents", "bytes")] == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("sent, to_all", [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False),
                                          (signal.SIGKILL, False)])
def test_stopped_jobs_leave_no_process_and_no_file(vocab, tmp_path, sent, to_all):
    vocab.save(tmp_path)
    with open(tmp_path / "t.txt", "w") as f:
        f.writelines(["the cat sat on the mat .\n" * 1000] * 4000)  # 100 MB
    run = subprocess.Popen([sys.executable, ROOT / "data.py", "text", tmp_path / "t.txt", "--vocab", tmp_path, "--jobs",
                            "2", "--out", tmp_path / "o.h5"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    raw = f"o.h5.*.{run.pid}.tmp/tokens.raw"
    while not any(path.stat().st_size for path in tmp_path.glob(raw)):
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, sent) if to_all else run.send_signal(sent)
    said = run.communicate(timeout=60)[1]  # ends when no process holds the pipe
    assert run.returncode == (-9 if sent == signal.SIGKILL else 1) and not (tmp_path / "o.h5").exists()
    if sent != signal.SIGKILL:
        assert said.splitlines()[-1].startswith("data.py: ") and "Traceback" not in said
        assert not list(tmp_path.glob("*.tmp"))


def test_processes_work_in_order_and_end_with_the_first():
    given, others = (((i, 7), i) for i in range(20)), multiprocessing.active_children()  # of pytest
    results = in_order(max, given, 3)
    assert [next(results) for _ in range(9)] == [(max(i, 7), i) for i in range(9)]
    workers = [worker for worker in multiprocessing.active_children() if worker not in others]
    for worker in workers:  # Ctrl-C goes to them, too, and is left to the first
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert next(results) == (9, 9) and next(given)[1] == 16  # two texts a process are under way
    results.close()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0] * 3
    ended = stop_line(list, in_order(os._exit, (((3,), i) for i in range(9)), 2))
    assert ended == "one of the processes was ended, perhaps as memory was short; give fewer --jobs"


def test_packed_real_text_equals_encode_batch(real_data, bert_vocab, tmp_path, monkeypatch):
    source = real_data / "text" / "wiki.valid.raw"
    monkeypatch.setattr(cached_words, "__defaults__", (8, 2000))  # a full cache, and words it does not keep
    pack_text([source], bert_vocab, tmp_path / "t.h5")
    lines = source.read_text(encoding="utf-8").split("\n")
    plain = []
    for line, ids in zip(lines, bert_vocab.encode(lines)):
        if re.fullmatch(" = [^=].*[^=] = ", line) and plain:  # the title of the next article
            plain.append([bert_vocab.sep])
        plain += [ids] if ids else []
    plain.append([bert_vocab.sep])
    assert np.array_equal(data.open_packed(tmp_path / "t.h5")[2]["tokens"], np.concatenate(plain))


def test_long_lines_and_pieces_do_not_change_ids(vocab, tmp_path):
    line = "the cat sat " * 200_000  # 2.4 MB without a line end
    (tmp_path / "t.txt").write_text(line + "\n\n" + line)
    pack_text([tmp_path / "t.txt"], vocab, tmp_path / "t.h5")
    one = vocab.encode(["the cat sat"])[0] * 200_000 + [vocab.sep]
    assert data.open_packed(tmp_path / "t.h5")[2]["tokens"].tolist() == one + one


ARTICLES = [["A cat sat.", "the mat"], ["The dog", "ran on the mat."]]  # lines of two documents


def as_json_lines(blank="\n\n"):
    return "".join(json.dumps({"id": str(i), "text": blank.join(lines)}) + "\n"
                   for i, lines in enumerate(ARTICLES))


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", as_json_lines()), ("wiki_00", as_json_lines("\n")), ("a.txt", "\n" + as_json_lines() + "\n"),
    ("wiki_01", "".join(f'<doc id="{i}" url="x?curid={i}" title="T">\n' + "\n\n".join(lines) + "\n\n</doc>\n"
                        for i, lines in enumerate(ARTICLES))),
    ("wiki.train.tokens", " \n" + "".join(f" = {first} = \n \n = = {second} = = \n \n"
                                          for first, second in ARTICLES))])
@pytest.mark.parametrize("packed_as", ["plain", "gz"])
def test_first_bytes_tell_how_text_is_laid_out(vocab, tmp_path, name, content, packed_as):
    path, out = tmp_path / name, tmp_path / "o.h5"
    path.write_bytes(gzip.compress(content.encode()) if packed_as == "gz" else content.encode())
    assert pack_text([path], vocab, out)["documents"] == 2
    mark = " = {} = ", " = = {} = = "
    lines = [[form.format(line) for form, line in zip(mark, article)] if "train" in name else article
             for article in ARTICLES]
    expected = [[i for ids in vocab.encode(article) for i in ids] + [vocab.sep] for article in lines]
    assert packed(out)["tokens"].tolist() == sum(expected, [])


@pytest.mark.parametrize("content, says", [
    (b"\xfd7zXZ\x00\x00", "is xz, not text; unpack it"), (b"BZh91AY", "is bzip2"),
    (b"\x28\xb5\x2f\xfd\x00", "zstd"), (b"PK\x03\x04", "is zip"), (b"PAR1\x15", "is parquet"),
    ("cat".encode("utf-16"), "is UTF-16, .*iconv -f utf-16"), ("cat".encode("utf-32"), "is UTF-32"),
    ("the cat and ".encode("utf-16-le"), "iconv -f utf-16le"), ("the cat and ".encode("utf-16-be"), "utf-16be"),
    ("the cat and ".encode("utf-32-le"), "is UTF-32"), (gzip.compress(gzip.compress(b"cat")), "is gzip in gzip"),
    (b"a.txt" + bytes(252) + b"ustar\x0000", "is a tar archive"), (b"%PDF-1.5\n", "is PDF"),
    (gzip.compress(b"a.txt" + bytes(252) + b"ustar  \0"), "is a tar archive"), (b"\x89HDF\r\n", "is HDF5"),
    (b"<mediawiki xmlns=", "is a dump of Wikipedia"), (b"\n<!DOCTYPE html>\n<p>404", "is a web page"),
    (b' [\n {"text": "a cat"}]', "is one JSON array"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs, .*git lfs pull"),
    (gzip.compress(b"the cat " * 999)[:40], "damaged gzip"), (b"\x1f\x8b\x08nothing", "damaged gzip"),
    (b'{"text": "a cat"}\n{"text": 3}\n', 'line 2: not a JSON object with a "text"'),
    (b'{"text": "a cat"}\n{"text": "a', "line 2: not a JSON object"), (b'{"id": 3}\n', "line 1: not a JSON"),
    (b'{"info": {"year": 2014}, "images": [], "annotations": [{"image_id": 1, "id": 2, "caption": "A cat."}]}',
     "annotations of COCO, .*; write its captions to a text file"),
    (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: not a JSON"), (b'{"text": "a \\ud83d"}\n', "line 1: not a JSON"),
    (b'{"v": {"start": [' + b"9" * 5000 + b"]}}", "the captions of \"v\": .*digits"),
    (b'{"v": {"text": ["\\ud83d"]}}', "the captions of \"v\": .*surrogates"),
    (bytes(99), "is zeros"), (gzip.compress(b"cat " * (1 << 22)), "unfolds to more than 100 times its size"),
    (gzip.compress(b'{"text": "' + b"a" * (1 << 24) + b'"}'), "unfolds to more than 100 times its size")])
def test_what_is_no_text_is_named(vocab, tmp_path, content, says):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert re.search(says, stop_line(pack_text, [path], vocab, tmp_path / "o.h5"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_folder_of_captions_packs_as_caption_json_does(vocab, tmp_path):
    files, folder = howto(tmp_path), tmp_path / "csv"
    pack_videos(vocab=vocab, **files)
    folder.mkdir()
    for video, row in json.loads(files["captions"].read_text()).items():
        with open(folder / f"{video}.csv", "w", newline="") as f:
            csv.writer(f).writerows([("start", "end", "text"), *zip(row["start"], row["end"], row["text"])])
    pack_videos(vocab=vocab, **files | {"captions": folder, "out": tmp_path / "o.h5"})
    one, two = packed(files["out"]), packed(tmp_path / "o.h5")
    assert [video for video, *_ in read_captions(folder, (2, 2))] == [
        video for video in ("v0", "v1", "v2", "v3") if zlib.crc32(video.encode()) % 2]
    names = one["video_id"].tolist()
    for name in ("tokens", "start", "end", "task"):  # the order of videos is that of their names
        assert sorted(one[name].tolist()) == sorted(two[name].tolist())
    assert sorted(names) == two["video_id"].tolist()
    (folder / "bad.csv").write_text("start,text\n1,x\n")
    assert "bad.csv: not a csv file with the columns" in stop_line(
        pack_videos, vocab=vocab, **files | {"captions": folder, "out": tmp_path / "p.h5"})
    assert "a folder without .csv files; give caption.json" in stop_line(
        pack_videos, vocab=vocab, **files | {"captions": files["feat2d"], "out": tmp_path / "p.h5"})


def test_captions_pack_as_text_one_document_a_video(vocab, tmp_path):
    rows = {"b": {"start": [3, 1], "end": [4, 2], "text": ["cat ran", "the\ndog"]},
            "a": {"start": [], "end": [], "text": []}}
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pack_text([tmp_path / "c.json"], vocab, tmp_path / "c.h5")
    document = vocab.encode(["the dog cat ran"])[0] + [vocab.sep]
    assert data.open_packed(tmp_path / "c.h5")[2]["tokens"].tolist() == document


def test_large_vocabularies_pack_as_uint32(vocab, tmp_path):
    large = Vocab(vocab.tokens + [f"w{i}" for i in range(70_000)])
    (tmp_path / "t.txt").write_text("the w69999 w3")
    pack_text([tmp_path / "t.txt"], large, tmp_path / "t.h5")
    tokens = data.open_packed(tmp_path / "t.h5")[2]["tokens"]
    assert tokens.dtype == np.uint32 and large.decode(tokens) == "the w69999 w3 [SEP]"


def test_text_mistakes_end_in_one_line_and_leave_nothing(vocab, tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes(b"the cat\n" * 9 + b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "good.txt").write_text("the cat")
    out, good = tmp_path / "out.h5", tmp_path / "good.txt"
    assert "not UTF-8 near byte 75" in stop_line(pack_text, [tmp_path / "latin.txt"], vocab, out)
    assert "no text" in stop_line(pack_text, [tmp_path / "empty.txt"], vocab, out)
    gone = stop_line(pack_text, [tmp_path / "x.txt", good, tmp_path / "y.txt"], vocab, out)
    assert "x.txt" in gone and "y.txt" in gone and "good.txt" not in gone
    assert "no folder" in stop_line(pack_text, [good], vocab, tmp_path / "no" / "out.h5")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert "GB are free" in stop_line(pack_text, [good], vocab, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "good.txt", "latin.txt"]
    monkeypatch.undo()
    pack_text([good], vocab, out)
    assert "exists" in stop_line(pack_text, [good], vocab, out)


# ---------------------------------------------------------------------------- text pairs

# words without a word piece (control characters), without a CLIP token (none: nothing at all), of many pieces
ODD = ("the cat's \x07 dog\tsat\r\non \u200b the\x0bmat , \x07\n\n\x07 ran! 's &amp; x&lt;y\u00a0z [SEP]"
       " far\n \n" + "a" * 120)


def aligned_pairs(text, vocab, clip):
    """What pack_xtext must make of a text, word by word -> (tokens, clip_tokens, clip_counts)."""
    tokens, clip_tokens, counts, waiting, inside = [], [], [], 0, False
    for line in text.split("\n"):
        for word in re.split("[ \t\r]", line) if line.strip() else []:
            inside = True
            pieces, clips = vocab.encode([word])[0], clip.encode([word])[0]
            tokens, clip_tokens, waiting = tokens + pieces, clip_tokens + clips, waiting + len(clips)
            if pieces:
                counts, waiting = counts + [waiting] + [0] * (len(pieces) - 1), 0
        if not line.strip() and inside:
            tokens, counts, waiting, inside = tokens + [vocab.sep], counts + [waiting], 0, False
    if inside:
        tokens, counts, waiting = tokens + [vocab.sep], counts + [waiting], 0
    return tokens, clip_tokens, counts


def test_packed_pairs_are_both_tokenizers_ids_aligned_at_words(vocab, clip, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    text = "\n".join([ODD, *("".join(rng.permutation(HARD)[:4]) + rng.choice(["", "\n", " \n"])
                             for _ in range(100))])
    (tmp_path / "t.txt").write_bytes(text.encode())
    cased = Vocab(vocab.tokens, lower=False, strip_accents=False)
    for name, other in (("bpe", clip), ("words", cased), ("same", vocab)):
        path = tmp_path / f"{name}.h5"
        counts = pack_xtext([tmp_path / "t.txt"], vocab, other, path)
        maps, plain = packed(path), aligned_pairs(text, vocab, other)
        for key, expected in zip(("tokens", "clip_tokens", "clip_counts"), plain):
            assert maps[key].tolist() == expected, key
        assert maps["tokens"].tolist() == by_line(vocab, text) and maps["clip_counts"].dtype == np.uint16
        whole = [i for line in text.split("\n") if line.strip() for i in other.encode([line])[0]]
        assert maps["clip_tokens"].tolist() == whole  # of whole lines: no word sees another
        assert (counts["tokens"], counts["clip_tokens"], counts["clip_cut"]) == (
            len(plain[0]), len(plain[1]), 0)
        assert counts["bytes"] == len(text.encode()) and f"{len(whole):,} of CLIP" in capsys.readouterr().out
        attributes, stored, raw = data.open_packed(path)
        stored = stored, data.stored_clip_vocab(path, attributes, stored, raw)
        assert [v.hash for v in stored] == [vocab.hash, other.hash] and type(stored[1]) is type(other)
        assert stored[1].encode(HARD) == other.encode(HARD)
    monkeypatch.setattr(cached_words, "__defaults__", (8, 40))  # a full cache, words it does not keep
    pack_xtext([tmp_path / "t.txt"], vocab, clip, tmp_path / "again.h5")
    hashes = [data.open_packed(tmp_path / f"{name}.h5")[0]["hash"] for name in ("bpe", "again", "words")]
    assert hashes[0] == hashes[1] != hashes[2]
    pack_text([tmp_path / "t.txt"], vocab, tmp_path / "text.h5")
    assert np.array_equal(packed(tmp_path / "text.h5")["tokens"], packed(tmp_path / "bpe.h5")["tokens"])


def test_packed_pairs_of_real_text(real_data, bert_vocab, openai, tmp_path):
    text = (real_data / "text" / "wiki.valid.raw").read_text(encoding="utf-8")[:200_000]
    (tmp_path / "t.txt").write_bytes(text.encode())
    pack_xtext([tmp_path / "t.txt"], bert_vocab, openai, tmp_path / "t.h5")
    maps, lines = packed(tmp_path / "t.h5"), [line for line in text.split("\n") if line.strip()]
    assert np.array_equal(maps["clip_tokens"], np.concatenate(openai.encode(lines)))
    words, counts = sum(len(line.split()) for line in lines), maps["clip_counts"].astype(int)
    assert counts.sum() == len(maps["clip_tokens"]) and (counts > 0).sum() == words
    blocks = data.PairBlocks(tmp_path / "t.h5", 66, segments=2, length=40)
    batch, pair = blocks.batch([5])["ids"][0], blocks.clip_batch([5])
    ours = blocks.clip_vocab.decode(pair["clip_ids"].flatten()[pair["clip_place"][0]])
    theirs = bert_vocab.decode(batch[1:-1])
    ours, theirs = (re.sub(r"<\S+>|\[SEP\]|[^a-z0-9]", "", text) for text in (ours, theirs))
    assert len(ours) > 150 and ours in theirs + " "  # the same text, but for words that a block's ends cut


def test_clip_tokens_of_an_endless_word_stand_at_the_pieces_behind_it(vocab, clip, tmp_path, capsys):
    most, n = 65535, 100_000
    (tmp_path / "t.txt").write_text("\xe9" * (n // 2) + " the cat")  # one [UNK], two bytes a letter
    counts = pack_xtext([tmp_path / "t.txt"], vocab, clip, tmp_path / "t.h5")
    assert packed(tmp_path / "t.h5")["clip_counts"].tolist() == [most, n - most + 1, 1, 0] and (
        counts["clip_cut"] == 0)
    (tmp_path / "t.txt").write_text("\xe9" * n)
    counts = pack_xtext([tmp_path / "t.txt"], vocab, clip, tmp_path / "cut.h5")
    assert packed(tmp_path / "cut.h5")["clip_counts"].tolist() == [most, most]  # [UNK] [SEP]
    assert counts["clip_cut"] == 2 * n - 2 * most and f"last {2 * n - 2 * most:,}" in capsys.readouterr().out


def test_packing_pairs_needs_no_more_memory_for_more_text(vocab, clip, tmp_path):
    peaks = []
    for size in (3, 5):  # MB
        (tmp_path / "t.txt").write_text(("the cat sat on " + "a" * 200 + " mats\n") * (size * 10 ** 6 // 221))
        tracemalloc.start()
        pack_xtext([tmp_path / "t.txt"], vocab, clip, tmp_path / f"{size}.h5")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_mistakes_while_packing_pairs_end_in_one_line_and_leave_nothing(vocab, clip, tmp_path, monkeypatch):
    vocab.save(tmp_path)
    (tmp_path / "t.txt").write_text("the cat")
    (tmp_path / "empty.txt").write_text("\n")
    before = sorted(tmp_path.iterdir())
    argv = ["xtext", f"{tmp_path}/t.txt", "--vocab", f"{tmp_path}"]
    argv += ["--out", f"{tmp_path}/o.h5", "--clip_vocab"]
    assert "openai/CLIP" in stop_line(main, [*argv, f"{tmp_path}/bpe_simple_vocab_16e6.txt.gz"])
    assert "no text" in stop_line(pack_xtext, [tmp_path / "empty.txt"], vocab, clip, tmp_path / "o.h5")
    assert "no such file" in stop_line(pack_xtext, [tmp_path / "x.txt"], vocab, clip, tmp_path / "o.h5")
    monkeypatch.setattr(packing, "write_packed", stop)
    assert "interrupted" in stop_line(main, [*argv, f"{tmp_path}"])
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert "GB are free" in stop_line(main, [*argv, f"{tmp_path}"])
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == before
    main([*argv, f"{tmp_path}"])
    assert "exists" in stop_line(main, [*argv, f"{tmp_path}"])


# ---------------------------------------------------------------------------- videos


def howto(folder, videos=("v0", "v1", "v2", "v3"), seconds=10, d2=4, d3=3):
    """HowTo100M's layout; frame t of 2D is all t + 100 v, row r of 3D r + 100 v. Returns the arguments."""
    for name in ("f2", "f3"):
        (folder / name).mkdir(parents=True)
    captions = {}
    for v, video in enumerate(videos):
        np.save(folder / "f2" / f"{video}.npy",
                np.tile(np.arange(seconds, dtype=np.float32)[:, None] + 100 * v, d2))
        np.save(folder / "f3" / f"{video}.npy", np.tile(np.arange(seconds * 3 // 2)[:, None] + 100.0 * v, d3))
        captions[video] = {"start": [0.5, 2.2, 6.0], "end": [2.0, 5.9, 7.5],
                           "text": ["the cat sat", "on the mat , the mat", "a dog ran"]}
    (folder / "caption.json").write_text(json.dumps(captions))
    (folder / "videos.csv").write_text("video_id,category_1,category_2,rank,task_id\n" + "".join(
        f"{video},,,1,{7 + v % 2}\n" for v, video in enumerate(videos)))
    return {"captions": folder / "caption.json", "feat2d": folder / "f2", "csv_file": folder / "videos.csv",
            "out": folder / "videos.h5", "feat3d": folder / "f3"}


def test_packed_videos_hold_what_the_files_hold(vocab, tmp_path):
    counts = pack_videos(vocab=vocab, **howto(tmp_path))
    assert counts == {"videos": 4, "captions": 12, "frames": 40, "tokens": 4 * 12, "problems": 0}
    maps = packed(tmp_path / "videos.h5")
    assert maps["frames"].dtype == np.float16 and maps["frames"].shape == (40, 7)
    assert np.array_equal(maps["frames"][10:20, 0], 100 + np.arange(10))
    assert maps["frames"][:10, 4].tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13]  # floor(1.5 t)
    assert maps["video_id"].tolist() == [b"v0", b"v1", b"v2", b"v3"] and maps["task"].tolist() == [7, 8, 7, 8]
    assert maps["frame_offsets"].tolist() == [0, 10, 20, 30, 40]
    assert maps["caption_offsets"].tolist() == [0, 3, 6, 9, 12]
    assert maps["token_offsets"][:4].tolist() == [0, 3, 9, 12]
    assert maps["start"][:3].tolist() == [0.5, 2.2, 6.0] and maps["end"][:3].tolist() == [2.0, 5.9, 7.5]
    assert vocab.decode(maps["tokens"][3:9]) == "on the mat, the mat"


def broken(folder):
    """howto with every kind of broken feature file and caption row; returns the arguments of pack_videos."""
    names = ("good gone nothing cut junk nan inf flat wide long pickled norows late times uneven nocaptions "
             "silent good2").split()
    args, f2 = howto(folder, names), folder / "f2"
    (f2 / "gone.npy").unlink()
    (folder / "f3" / "gone.npy").unlink()
    (f2 / "nothing.npy").write_bytes(b"")
    (f2 / "cut.npy").write_bytes((f2 / "cut.npy").read_bytes()[:-8])
    (f2 / "junk.npy").write_bytes(b"\x93NUMPY\x01\x00 no array at all")
    for name, value in (("nan", np.nan), ("inf", 1e6)):
        array = np.zeros((10, 4))
        array[3, 2] = value
        np.save(f2 / f"{name}.npy", array)
    np.save(f2 / "flat.npy", np.zeros(40, np.float32))
    np.save(f2 / "wide.npy", np.zeros((10, 5), np.float32))
    np.save(f2 / "long.npy", np.zeros((13, 4), np.float32))
    np.save(f2 / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(f2 / "norows.npy", np.zeros((0, 4), np.float32))
    captions = json.loads(args["captions"].read_text())
    captions["late"]["start"][2], captions["late"]["end"][2] = 11, 30
    captions["times"]["end"][0] = "soon"
    captions["uneven"]["text"].pop()
    captions["silent"]["text"] = ["", " ", "\u200b"]
    captions["other"] = captions["good"]
    del captions["nocaptions"]
    args["captions"].write_text(json.dumps(captions))
    return args


def test_every_broken_file_is_reported_at_once(vocab, tmp_path, capsys):
    args = broken(tmp_path)
    line = stop_line(pack_videos, vocab=vocab, **args)
    said = capsys.readouterr().out
    assert line.startswith("videos: 17 problems in 18 videos (")
    for count in ("2 missing", "2 empty", "3 damaged", "2 not finite", "3 mis-shaped", "2 no captions"):
        assert count in line and "1 times, 2 captions" in line
    for text in ("missing: ", "f2/gone.npy", "f3/gone.npy", "empty: ", "nothing.npy", "damaged: ", "cut.npy",
                 "junk.npy", "pickled.npy", "nan.npy: 1 of 40 values", "inf.npy", "flat.npy: float32 (40,)",
                 "wide.npy: 5 channels, the others have 4", "long: 13 s of 2D features, 10.0 s of 3D",
                 "norows.npy: shape (0, 4)", "late: 1 of 3 captions lie beyond",
                 "times: a time is no number of seconds", "uneven: 3 starts, 3 ends, 2 texts",
                 "nocaptions: in "):
        assert text in said, text
    assert (tmp_path / "videos.h5.problems.txt").read_text().count("\n") == 17
    assert not (tmp_path / "videos.h5").exists() and not list(tmp_path.glob("*.tmp"))


def test_skip_bad_leaves_out_just_the_broken(vocab, tmp_path, capsys):
    counts = pack_videos(vocab=vocab, skip_bad=True, **broken(tmp_path))
    said = capsys.readouterr().out
    assert counts["problems"] == 17 and "left out 17 problems" in said
    assert "1 videos with captions are not in" in said
    maps = packed(tmp_path / "videos.h5")
    assert maps["video_id"].tolist() == [b"good", b"late", b"good2"]
    assert maps["caption_offsets"].tolist() == [0, 3, 5, 8] and np.isfinite(maps["frames"]).all()


def test_shards_hold_the_videos_of_one_file(vocab, tmp_path, monkeypatch, capsys):
    args = howto(tmp_path, [f"v{i}" for i in range(24)])
    pack_videos(vocab=vocab, **args)
    whole = packed(args["out"])
    # 2 x 24 x 10 frames x 7 channels x 2 bytes are too much for this disk, a third of it is not
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 6000))
    assert "GB are free" in stop_line(pack_videos, vocab=vocab, **args | {"out": tmp_path / "x.h5"})
    paths = [tmp_path / f"s-{i:05d}-of-00003.h5" for i in (1, 2, 3)]
    sizes = [pack_videos(vocab=vocab, shard=f"{i}/3", **args | {"out": tmp_path / "s.h5"})["videos"] for i in (1, 2, 3)]
    parts = [packed(path) for path in paths]
    assert sum(sizes) == 24 and [len(part["task"]) for part in parts] == sizes and min(sizes) > 4
    for i, part in enumerate(parts):
        assert {zlib.crc32(video) % 3 for video in part["video_id"].tolist()} == {i}
        assert part["video_id"].tolist() == [v for v in whole["video_id"].tolist() if zlib.crc32(v) % 3 == i]
    assert sorted(np.concatenate([p["frames"] for p in parts]).tolist()) == sorted(whole["frames"].tolist())
    assert "not in" not in capsys.readouterr().out  # videos of other shards are no strangers
    before = [path.stat().st_mtime_ns for path in paths]  # the second start of a finished shard does nothing
    again = pack_videos(vocab=vocab, shard="2/3", **args | {"out": tmp_path / "s.h5"})
    assert again["videos"] == sizes[1] and "s-00002-of-00003.h5 is packed already" in capsys.readouterr().out
    other = Vocab(vocab.tokens, lower=False)
    assert "exists; remove it" in stop_line(pack_videos, vocab=other, shard="2/3", **args | {"out": tmp_path / "s.h5"})
    paths[2].unlink()
    monkeypatch.setattr(packing, "write_packed", stop)
    vocab.save(tmp_path)
    line = stop_line(main, ["videos", "--captions", str(args["captions"]), "--feat2d", str(args["feat2d"]), "--csv",
                            str(args["csv_file"]), "--vocab", str(tmp_path), "--shard", "3/3",
                            "--out", str(tmp_path / "s.h5")])
    assert "interrupted" in line and "finished shards are kept" in line
    assert [path.stat().st_mtime_ns for path in paths[:2]] == before[:2] and not list(tmp_path.glob("*.tmp"))
    assert "make fewer shards" in stop_line(pack_videos, vocab=vocab, shard="1/99", skip_bad=True, **args)
    assert "--shard 4/3: write i/n" in stop_line(pack_videos, vocab=vocab, shard="4/3", **args)


def test_features_named_after_the_videos_file_are_read(vocab, tmp_path):
    pack_videos(vocab=vocab, **howto(tmp_path / "a"))
    files = howto(tmp_path / "b")
    for name, suffix in (("v0", ".mp4"), ("v1", ".webm"), ("v2", ".mkv")):
        (files["feat2d"] / f"{name}.npy").rename(files["feat2d"] / f"{name}{suffix}.npy")
    np.save(files["feat2d"] / "v3.mp4.npy", np.zeros(3))  # beside v3.npy, which counts
    pack_videos(vocab=vocab, **files)
    assert (tmp_path / "a" / "videos.h5").read_bytes() == (tmp_path / "b" / "videos.h5").read_bytes()


def test_transposed_features_and_a_file_in_a_folders_place_are_said(vocab, tmp_path, capsys):
    args, f2 = howto(tmp_path), tmp_path / "f2"
    np.save(f2 / "v1.npy", np.zeros((4, 10)))
    assert "(1 mis-shaped)" in stop_line(pack_videos, vocab=vocab, **args)
    assert "v1.npy: 10 channels, the others have 4; its channels come first: transpose it" in capsys.readouterr().out
    for v in range(4):
        np.save(f2 / f"v{v}.npy", np.zeros((4, 10 + v)))
    assert stop_line(pack_videos, vocab=vocab, skip_bad=True, **args) == (
        f"{f2}: all arrays have 4 rows, and from 10 to 13 columns; (seconds, channels) is wanted: where channels "
        "come first, save each array's transpose")
    file = args["captions"]
    assert f"{file}: a file; give the folder of features" in stop_line(
        pack_videos, vocab=vocab, **args | {"feat2d": file})
    assert f"{f2}: is a folder; give the files in it" in stop_line(pack_videos, vocab=vocab, **args | {"csv_file": f2})
    assert f"{f2}: is a folder" in stop_line(pack_text, [f2], vocab, tmp_path / "o.h5")


def test_lists_of_videos_and_captions_may_be_gzipped(vocab, tmp_path):
    pack_videos(vocab=vocab, **howto(tmp_path / "a"))
    files = howto(tmp_path / "b")
    for name in ("captions", "csv_file"):
        files[name].write_bytes(gzip.compress(files[name].read_bytes()))
    pack_videos(vocab=vocab, **files)
    assert (tmp_path / "a" / "videos.h5").read_bytes() == (tmp_path / "b" / "videos.h5").read_bytes()
    assert pack_text([files["captions"]], vocab, tmp_path / "t.h5")["documents"] == 4


def test_problems_on_screen_are_bounded_and_all_in_the_file(vocab, tmp_path, capsys):
    args = howto(tmp_path, [f"v{i}" for i in range(60)])
    for i in range(50):
        (tmp_path / "f2" / f"v{i}.npy").unlink()
    assert "50 missing" in stop_line(pack_videos, vocab=vocab, **args)
    said = capsys.readouterr().out
    assert "and 30 more" in said and said.count("\n") == 21
    assert (tmp_path / "videos.h5.problems.txt").read_text().count("missing: ") == 50


def test_2d_alone_and_videos_without_words(vocab, tmp_path, capsys):
    args = howto(tmp_path) | {"feat3d": ""}
    captions = json.loads(args["captions"].read_text())
    captions["v1"]["text"] = ["", "\u200b", "cat"]
    args["captions"].write_text(json.dumps(captions))
    assert pack_videos(vocab=vocab, **args)["captions"] == 10
    assert "2 captions without a word" in capsys.readouterr().out
    clips = data.VideoClips(tmp_path / "videos.h5", 12, val_clips=1)
    assert (clips.d2, clips.d3, clips.features) == (4, 0, 4)


@pytest.mark.parametrize("name, content, says", [
    ("captions", '{"v0": {"start": [0], "end"', "cut off"), ("captions", "[1, 2]", "not a JSON object"),
    ("captions", '{"v0": 3} x', "malformed"), ("captions", '{"v0": 3 "v1": 4}', "malformed"),
    ("captions", "", "not a JSON object"), ("captions", "{}", "no video is left"),
    ("csv_file", "video,task\nv0,1\n", "no columns video_id and task_id"),
    ("csv_file", "video_id,task_id\nv0,abc\n", "line 2"),
    ("csv_file", "video_id,task_id\n,3\n", "no video_id"),
    ("csv_file", "video_id,task_id\n", "names no video"),
    ("csv_file", "video_id,task_id\n" + "v" * 999 + ",3\n", "no video is left"),
    ("captions", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("captions", "PAR1", "is parquet"),
    ("csv_file", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("csv_file", "PK\x03\x04", "is zip"),
    ("captions", "<!DOCTYPE html>", "is a web page"), ("csv_file", "[{}]", "no columns video_id"),
])
def test_malformed_lists_end_in_one_line(vocab, tmp_path, name, content, says):
    args = howto(tmp_path)
    args[name].write_text(content)
    line = stop_line(pack_videos, vocab=vocab, skip_bad=True, **args)
    assert says in line and not args["out"].exists() and not list(tmp_path.glob("*.tmp"))


def test_caption_file_is_read_in_pieces(tmp_path):
    rows = {f'video "{i}" ü': {"start": [0.0], "end": [1.5],
                               "text": [f'}} {{ \\ " {i} ] \u2028 ' + "ü" * (i % 999)]} for i in range(9000)}
    for indent in (None, 1):
        (tmp_path / "c.json").write_text(json.dumps(rows, ensure_ascii=bool(indent), indent=indent),
                                         encoding="utf-8")
        got = list(read_captions(tmp_path / "c.json"))
        assert {video: row for video, row, _ in got} == rows and len(got) == 9000
        assert (tmp_path / "c.json").stat().st_size - sum(size for *_, size in got) < 1 << 20


def test_howto100m_path_with_real_captions(real_data, bert_vocab, tmp_path, capsys):
    real = real_data / "howto100m"
    captions = json.loads((real / "DERIVED_caption_from_youcook2val.json").read_text())
    with open(real / "DERIVED_videos_like_HowTo100M_v1.csv", newline="") as f:
        rows = [row for row in csv.reader(f)]
    few = [rows[0]] + [row for row in rows[1:] if row[0] in captions][:12]
    with open(tmp_path / "few.csv", "w", newline="") as f:
        csv.writer(f).writerows(few)
    rng = np.random.default_rng(0)
    for name, width, rate in (("2d", 2048, 1), ("3d", 2048, 1.5)):
        (tmp_path / name).mkdir()
        for row in few[1:]:
            seconds = int(np.ceil(max(captions[row[0]]["end"]))) + 1
            np.save(tmp_path / name / f"{row[0]}.npy", rng.random((int(seconds * rate), width), np.float32))
    (tmp_path / "3d" / f"{few[3][0]}.npy").unlink()
    args = (real / "DERIVED_caption_from_youcook2val.json", tmp_path / "2d", tmp_path / "few.csv", bert_vocab,
            tmp_path / "videos.h5", tmp_path / "3d")
    assert "1 problems in 12 videos (1 missing)" in stop_line(pack_videos, *args)
    assert f"{few[3][0]}.npy" in capsys.readouterr().out
    counts = pack_videos(*args, skip_bad=True)
    assert counts["videos"] == 11 and "424 videos with captions are not in" in capsys.readouterr().out
    clips = data.VideoClips(tmp_path / "videos.h5", 128, 512, val_clips=1)
    batch = clips.batch(clips.index(0, 0, 8, np.arange(8)))
    assert batch["frames"].shape[2] == 4096 and batch["mask"].sum(1).min() > 5
    first = clips.video_id[0].decode()
    at, frame = int(captions[first]["start"][0]), clips.batch([0])["frames"][0, 0]
    assert np.allclose(frame[:2048], np.load(tmp_path / "2d" / f"{first}.npy")[at], atol=1e-3)
    assert np.allclose(frame[2048:], np.load(tmp_path / "3d" / f"{first}.npy")[at * 3 // 2], atol=1e-3)


# ---------------------------------------------------------------------------- command line


def test_commands_do_what_the_issue_says(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("the cat sat on the mat .\nthe dog ran .\n\na cat !\n" * 200)
    howto(tmp_path / "h")
    for command in ("vocab {0}/t.txt --size=40 --out {0}/v.txt",
                    "text {0}/t.txt --vocab {0}/v.txt --out {0}/c.h5",
                    "videos --captions {0}/h/caption.json --feat2d {0}/h/f2 --feat3d {0}/h/f3 "
                    "--csv {0}/h/videos.csv --vocab {0}/c.h5 --out={0}/my_videos.h5 --skip_bad"):
        main(command.format(tmp_path).split())
    clips, blocks = data.VideoClips(tmp_path / "my_videos.h5", 12, val_clips=1), data.TextBlocks(
        str(tmp_path / "c.h5"), 12)
    assert clips.vocab.hash == blocks.vocab.hash and "MB/s" in capsys.readouterr().out


@pytest.mark.parametrize("argv, says", [
    ([], "required"), (["tex"], "invalid choice"), (["text", "x.txt"], "--vocab"),
    (["demo", "--seed", "a"], "--seed"), (["demo", "--sead", "1"], "--sead"),
    (["text", "x.txt", "--vocab", "no.txt", "--out", "o.h5"], "x.txt: no such file"),
    (["xtext", "x.txt", "--vocab", "no.txt", "--out", "o.h5"], "--clip-vocab"),
    (["vocab", "x.txt", "--out", "v.txt", "--size", "1e4"], "--size"),
])
def test_command_line_mistakes_are_one_line(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in stop_line(main, argv)


@pytest.fixture
def command(vocab, tmp_path):
    """A command that packs a text to o.h5."""
    vocab.save(tmp_path)
    (tmp_path / "t.txt").write_text("the cat\n" * 1000)
    return ["text", f"{tmp_path}/t.txt", "--vocab", f"{tmp_path}", "--out", f"{tmp_path}/o.h5"]


def test_packing_needs_no_torch(command, tmp_path):
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('data.py', run_name='__main__')"
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, cwd=ROOT)
    assert len(packed(tmp_path / "o.h5")["tokens"]) == 2001


@pytest.mark.parametrize("sent, says", [(signal.SIGTERM, "data.py: terminated"),
                                        (signal.SIGINT, "data.py: interrupted")])
def test_stopped_packing_leaves_nothing(command, tmp_path, monkeypatch, sent, says):
    def stopped(*_, **__):
        assert list(tmp_path.glob("o.h5.*.tmp/tokens.raw"))
        os.kill(os.getpid(), sent)

    before = sorted(tmp_path.iterdir())
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(packing, "write_packed", stopped)
    monkeypatch.setattr(sys, "argv", ["data.py", *command])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        line = stop_line(runpy.run_path, str(ROOT / "data.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handlers[0])
        signal.signal(signal.SIGINT, handlers[1])
    assert line.startswith(says) and sorted(tmp_path.iterdir()) == before
