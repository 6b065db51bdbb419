"""data.py: ids are BERT's and CLIP's, packers keep every token and frame and refuse what is broken, batches
are pure functions of (seed, step, position), masks are 80/10/10, MATCH is half another text, the demo world
is deterministic and leaks nothing.

Run: python -m pytest -q tests/test_data.py
"""

import csv
import gzip
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
from parts.vocab import OPENAI_CLIP, SPECIALS, CLIPVocab, Vocab, load_clip_vocab, load_vocab
from prepare import packing, world
from prepare.commands import main
from prepare.packing import cached_words, pack_text, pack_videos, pack_xtext, read_captions, train_vocab
from prepare.world import ACTIONS, EFFECTS, MISHAPS, PROPERTIES, TASK_SIZES, demo_xtext, make_demo

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the a cat dog sat on mat ran far and near , . ! [ ] ' e m".split()
HARD = [  # accents, CJK, control characters, odd spaces, long words, nothing, special tokens, marks, scripts
    'Hello, World! It\'s a test-case (really); 3.14% of $5.00 & e.g. "quotes".',
    "Ångström café naïve résumé CRÈME BRÛLÉE Zürich İstanbul ΣΊΣΥΦΟΣ ß ﬁne",
    "汶川大地震 Wènchuān 日本語テキスト 한국어 텍스트 中文,字",
    "zero\u200bwidth soft\u00adhyphen bell\x07 nul\x00 bad\ufffd tab\there\x0bvt\x0cff\x1cfs\x85nel",
    "nbsp\u00a0ideographic\u3000space line\u2028sep para\u2029sep\ttab\r",
    "a" * 100 + " " + "b" * 101 + " " + "supercalifragilisticexpialidocious" * 3,
    "",
    "   ",
    "raw [SEP] token x[MASK]y [sep] [ SEP ] [UNK][PAD] [CLS]",
    "e\u0301 combining , \u0301mark \u0301\u0302 .\u0301a \U0001f600 emoji \U0001d4d0 \u202eright-to-left "
    "עברית العربية",
    "don't can't U.S.A. x_y a/b #tag @name ~tilde ^hat `tick` |pipe| <b> {c} \\ ==",
    "，。！？「」 ‘curly’ “quotes” – — … • ¿qué? ¡sí! ±5° ½ ² №",
    "\ufeffBOM inside x\ufeffy and \ue000private \U000e0001tag",
]
# of bert-base-uncased's vocabulary, as transformers 5.23's AutoTokenizer encodes them without special tokens
HARD_IDS = [[int(i) for i in line.split()] for line in """\
7592 1010 2088 999 2009 1005 1055 1037 3231 1011 2553 1006 2428 1007 1025 1017 1012 2403 1003 1997 1002 \
1019 1012 4002 1004 1041 1012 1043 1012 1000 16614 1000 1012
17076 15687 7668 15743 13746 13675 21382 7987 9307 2063 10204 9960 1173 18199 29733 29735 29736 29730 \
29733 1096 1984 2638
100 1835 1810 1802 100 19181 26200 2078 1864 1876 1950 1713 30227 30233 30240 1469 30006 30021 29991 30014 \
30020 29999 30008 1467 30009 30020 29997 30017 30003 30017 1746 1861 1010 100
5717 9148 11927 2232 3730 10536 8458 2368 4330 16371 2140 2919 21628 2182 2615 24475 21807 11877
1050 5910 2361 8909 8780 14773 2686 2240 19802 11498 19802 21628
13360 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 \
11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 \
11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 11057 2050 100 100


6315 102 19204 1060 103 1061 1031 19802 1033 1031 19802 1033 100 0 101
1041 11566 1010 2928 1012 1037 100 7861 29147 2072 100 2157 1011 2000 1011 2187 1259 29789 29811 29796 \
29813 1270 23673 29830 17149 29816 14498 19433
2123 1005 1056 2064 1005 1056 1057 1012 1055 1012 1037 1012 1060 1035 1061 1037 1013 1038 1001 6415 1030 \
2171 1066 18681 3207 1034 6045 1036 16356 1036 1064 8667 1064 1026 1038 1028 1063 1039 1065 1032 1027 1027
1989 1636 1986 1994 1641 1642 1520 17546 1521 1523 16614 1524 1516 1517 1529 1528 1094 10861 1029 1067 \
9033 999 1081 2629 7737 1092 1082 1578
8945 2213 2503 1060 2100 1998 2797 6415
""".split("\n")[:-1]]


@pytest.fixture
def vocab():
    return Vocab(list(SPECIALS) + WORDS + ["##s", "##at"])


def stop_line(function, *args, **kw):
    """The one line with which `function` ends the program."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **kw)
    text = str(stop.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


def by_line(vocab, text):
    """What pack_text must make of a text, the plain way: encode each line, [SEP] behind each document."""
    out, inside = [], False
    for line in text.split("\n"):
        if line.strip():
            out, inside = out + vocab.encode([line])[0], True
        elif inside:
            out, inside = out + [vocab.sep], False
    return out + [vocab.sep] * inside


def packed(path):
    return {name: np.array(a) for name, a in data.open_packed(path)[2].items()}


# ---------------------------------------------------------------------------- vocabulary


def test_ids_equal_berts_on_difficult_text(bert_vocab):
    assert bert_vocab.encode(HARD) == HARD_IDS and bert_vocab.lower and bert_vocab.strip_accents
    assert bert_vocab.encode(HARD * 9) == HARD_IDS * 9  # the threaded path
    assert [bert_vocab.pad, bert_vocab.unk, bert_vocab.cls, bert_vocab.sep, bert_vocab.mask] == [
        0,
        100,
        101,
        102,
        103,
    ]


def test_ids_equal_tokenizers_berts_cased_and_uncased(real_data, bert_vocab):
    from tokenizers import BertWordPieceTokenizer

    text = (real_data / "text" / "wiki.valid.raw").read_text(encoding="utf-8").split("\n")[:300] + HARD
    for lower in (True, False):
        theirs = BertWordPieceTokenizer(
            str(real_data / "vocab" / "bert-base-uncased-vocab.txt"), lowercase=lower
        )
        ours = Vocab(bert_vocab.tokens, lower, lower)
        assert ours.encode(text) == [e.ids for e in theirs.encode_batch(text, add_special_tokens=False)]


def test_vocab_survives_every_file_it_is_kept_in(vocab, tmp_path):
    cased = Vocab(vocab.tokens + ["The"], lower=False, strip_accents=False)
    for v in (vocab, cased):
        v.save(tmp_path / v.hash)
        (tmp_path / v.hash[:9]).mkdir()
        v.tokenizer.save(str(tmp_path / v.hash[:9] / "tokenizer.json"))
        (tmp_path / f"{v.hash}.txt").write_text("the cat")
        pack_text([tmp_path / f"{v.hash}.txt"], v, tmp_path / f"{v.hash}.h5")
        for place in (v.hash, f"{v.hash}/vocab.txt", v.hash[:9], f"{v.hash}.h5"):
            again = data.open_vocab(tmp_path / place)
            assert (again.tokens, again.lower, again.strip_accents, again.hash) == (
                v.tokens,
                v.lower,
                v.strip_accents,
                v.hash,
            )
    assert vocab.hash != Vocab(vocab.tokens, lower=False).hash != Vocab(vocab.tokens[::-1]).hash
    assert vocab.decode(vocab.encode(["the cats , sat"])[0]) == "the cats, sat"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("vocab.txt", b"[PAD]\nthe\ncat\n", "has no [UNK] [CLS]"),
        ("vocab.txt", b"a\na\n", "twice"),
        ("vocab.txt", b"\xff\xfe\x00", "not a vocabulary"),
        ("tokenizer.json", b"{", "not a vocabulary"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}', "WordPiece"),
        ("config.json", b"[]", "WordPiece"),
        ("x.h5", b"\x89HDF", "not a packed file"),
        ("gone/", b"", "neither vocab.txt"),
    ],
)
def test_vocab_that_is_none_ends_in_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.write_bytes(content)
    assert says in stop_line(data.open_vocab, path) and str(path) in stop_line(data.open_vocab, path)


@pytest.mark.parametrize("model", ["[1]", '"x"', '{"merges": [1]}', '{"merges": [], "vocab": {}, '
                                   '"end_of_word_suffix": "</w>"}'])
def test_tokenizer_json_of_another_form_is_one_line(tmp_path, model):
    path = tmp_path / "tokenizer.json"
    for more in ("", ', "added_tokens": null', ', "added_tokens": [1]'):
        path.write_text(f'{{"model": {model}, "normalizer": "Lowercase", "pre_tokenizer": ["ByteLevel"]{more}}}')
        for load in (load_clip_vocab, load_vocab):
            assert "tokenizer.json: " in stop_line(load, path)


def test_tokenizer_json_of_others_is_refused_where_ids_would_differ(vocab, tmp_path):
    vocab.tokenizer.save(str(tmp_path / "tokenizer.json"))
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    for change, says in (
        (("normalizer", {"type": "NFKC"}), "normalizer"),
        (("pre_tokenizer", None), "pre-tokenizer"),
        (("model", good["model"] | {"max_input_chars_per_word": 200}), "100 characters"),
        (("added_tokens", [{"id": 99, "content": "<new>"}]), "<new>"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | dict([change])))
        assert says in stop_line(load_vocab, tmp_path)


def test_trained_vocabulary_is_deterministic_and_complete(tmp_path):
    text = "".join(
        f"{a}{b} likes {b}{a}tion , {a} and {b} .\n" for a in ("moor", "tal", "quin", "be") for b in "xyzab"
    )
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "c.json").write_text(json.dumps({"v": {"start": [0], "end": [1], "text": ["Größe jazz"]}}))
    sources = [tmp_path / "a.txt", tmp_path / "c.json"]
    first = train_vocab(sources, tmp_path / "v1.txt", 90)
    # another process has another hash seed, which is what makes the trainer's own order change
    subprocess.run(
        [sys.executable, ROOT / "data.py", "vocab", *sources, "--size", "90", "--out", tmp_path / "v2.txt"],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "v1.txt").read_bytes() == (tmp_path / "v2.txt").read_bytes()
    assert first.hash == load_vocab(tmp_path / "v1.txt").hash and first.size == 90
    assert first.unk not in sum(first.encode(text.split("\n") + ["grosse jazz"]), [])
    assert "--size 20" in stop_line(train_vocab, sources, tmp_path / "v3.txt", 20)
    assert "exists" in stop_line(train_vocab, sources, tmp_path / "v1.txt", 90)


# ---------------------------------------------------------------------------- CLIP's vocabulary

# OpenAI's simple_tokenizer itself (its lines run with regex 2026.11, ftfy left out) on published examples and
# on contractions, digits, HTML, emoji, final sigma, dotted I, long s, iota below, literal tokens, white space
CLIP_IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a diagram": [320, 22697],
    "a dog": [320, 1929],
    "It's we'RE I'd they'LL can't 've 'Tis o'clock":
        [585, 568, 649, 982, 328, 1896, 889, 1342, 753, 713, 1200, 713, 533, 334, 262, 6716],
    "2024 costs 3.14 \xbd x\xb2 \u2167 \u0663":
        [273, 271, 273, 275, 7628, 274, 269, 272, 275, 33613, 343, 41175, 158, 227, 371, 149, 352],
    "&amp;lt;b&amp;gt; AT&amp;T &#x1F600; &nbsp; &copy &bogus;":
        [283, 321, 285, 536, 261, 339, 7334, 5811, 261, 42907, 282],
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467!? :-) \xe9 na\xefve":
        [12832, 25023, 26304, 48938, 6004, 4223, 4166, 1097, 35689, 563],
    "\u4e2d\u6587 \u65e5\u672c \ud55c\uad6d":
        [19759, 255, 29032, 485, 39121, 19277, 361, 15197, 250, 31871, 511],
    "\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3 \u0130stanbul Stra\xdfe \ufb01 '\u017f \u1fd6 \u03b9\u0345":
        [139, 225, 138, 107, 139, 225, 139, 227, 139, 228, 138, 123, 139, 480, 328, 16384, 11231, 1894, 127,
         253, 324, 171, 105, 479, 6, 129, 379, 157, 123, 500, 138, 373],
    "<|endoftext|><|StartOfText|>x!<|endoftext|>'s<|endoftext|>":
        [49407, 49406, 343, 0, 27, 347, 40786, 4160, 91, 29, 262, 338, 49407],
    " \t a\u00a0b\u3000c\u2028d\u200be\x85f\x0bg\n": [320, 321, 322, 323, 9844, 324, 325, 326],
    "supercalifragilisticexpialidocious" * 2:
        [1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 698, 1987, 1642, 2857, 13093, 2076, 5868, 26850, 835,
         639, 38466],
}
MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "s a", "sa t</w>", "o n</w>", "d o", "do g</w>", "' s</w>"]


@pytest.fixture
def clip():
    return CLIPVocab(MERGES)


@pytest.fixture(scope="module")
def openai(real_data):
    """OpenAI's own vocabulary, from the real data."""
    return load_clip_vocab(real_data / "vocab" / "bpe_simple_vocab_16e6.txt.gz")


def plain_clip(vocab):
    """OpenAI's algorithm written anew, a function of a text: its pattern as a walk over Unicode categories,
    then the best merge again and again."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = dict(zip(printable + [b for b in range(256) if b not in printable], vocab.tokens))
    rank = {tuple(merge.split()): i for i, merge in enumerate(vocab.merges)}
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    special = ("<|startoftext|>", "<|endoftext|>")

    def words_of(text):
        text = re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip().lower()
        kinds = "".join(" " if c.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "-")
                        for c in text)
        at = 0
        while at < len(text):
            found = [literal for literal in (*special, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
                     if text.startswith(literal, at)]
            end = at + (len(found[0]) if found else 1)
            while not found and kinds[at] in "L-" and kinds[end:end + 1] == kinds[at]:
                end += 1
            if kinds[at] != " ":
                yield text[at:end]
            at = end

    def encode(text):
        out = []
        for word in words_of(text):
            parts = [letters[b] for b in word.encode()]
            parts[-1] += "</w>"
            while word not in special and len(parts) > 1:
                best = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair, len(rank)))
                if best not in rank:
                    break
                for i in range(len(parts) - 1):
                    if tuple(parts[i:i + 2]) == best:
                        parts[i:i + 2] = ["".join(best)]
            out += [ids[word]] if word in special else [ids[part] for part in parts]
        return out

    return encode


def test_clip_ids_equal_openais(openai):
    assert openai.encode(list(CLIP_IDS)) == list(CLIP_IDS.values())
    assert openai.encode(list(CLIP_IDS) * 9) == list(CLIP_IDS.values()) * 9  # the threaded path
    assert openai.hash == OPENAI_CLIP and openai.size == 49408 and openai.dtype == np.uint16
    assert [openai.start, openai.end, openai.cls, openai.sep] == [49406, 49407] * 2
    assert openai.specials == [49406, 49407] and (openai.pad, openai.unk) == (0, -1)
    assert openai.tokens[0] == "!" and openai.tokens[49406:] == ["<|startoftext|>", "<|endoftext|>"]
    ids = [openai.start, *openai.encode(["It's  a NAÏVE 😀 dog"])[0], openai.end]
    assert openai.decode(ids) == "<|startoftext|> it 's a naïve 😀 dog <|endoftext|>"


def test_clip_ids_equal_a_plain_reimplementation(real_data, openai, clip):
    real = (real_data / "text" / "wiki.valid.raw").read_text(encoding="utf-8").split("\n")[:60]
    like_ftfy = [text for text in HARD if not re.search("[\x1c-\x1f]", text)]  # which ftfy removes
    rng = np.random.default_rng(0)
    parts = ["'s", "'RE", "'", "&amp;", "&#39;", "&amp;lt;", "<|endoftext|>", "<|", "|>", " ", "\t", "\u2003",
             "12", "½", "Ⅷ", "Σ", "İ", "é", "e\u0301", "\u200d", "中", "😀", "!", "...", "The", "cat", "ß", "_"]
    mixed = ["".join(rng.choice(parts, rng.integers(1, 12))) for _ in range(800)]
    for vocab in (openai, clip):
        plain = plain_clip(vocab)
        for text in [*real, *like_ftfy, *mixed, "the" * 300, "", " "]:
            assert vocab.encode([text])[0] == plain(text), ascii(text)


def test_clip_vocab_survives_every_file_it_is_kept_in(clip, vocab, tmp_path):
    lines = '"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "".join(f"{merge}\n" for merge in MERGES)
    (tmp_path / "plain.txt").write_text(lines)
    (tmp_path / "dos.txt").write_bytes(lines.replace("\n", "\r\n").encode())
    (tmp_path / "m.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "merges.txt").write_text(lines)
    clip.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    saved["model"]["merges"] = MERGES  # as older versions write them
    (tmp_path / "older.json").write_text(json.dumps(saved))
    for name in ("plain.txt", "dos.txt", "m.txt.gz", "theirs", "slow", "saved", "saved/tokenizer.json",
                 "older.json"):
        again = load_clip_vocab(tmp_path / name)
        assert (again.hash, again.tokens) == (clip.hash, clip.tokens) and again.hash != OPENAI_CLIP
        assert again.encode(["the cat's Dog"]) == clip.encode(["the cat's Dog"])
    assert clip.size == 514 + len(MERGES) and clip.decode(clip.encode(["The  cat"])[0]) == "the cat"
    vocab.save(tmp_path / "words")
    for name in ("words", "words/vocab.txt"):
        assert load_clip_vocab(tmp_path / name).hash == vocab.hash
    assert (vocab.start, vocab.end) == (vocab.cls, vocab.sep)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("gone.txt.gz", None, "https://github.com/openai/CLIP"),
        ("empty/", None, "no vocabulary of CLIP"),
        ("m.txt.gz", lambda _: b"\x1f\x8bnothing", "not a vocabulary"),
        ("m.txt.gz", lambda lines: gzip.compress(lines)[:-9], "not a vocabulary"),
        ("m.txt", lambda lines: lines + b"ca t</w>\n", "merge 11, 'ca t</w>'"),
        ("m.txt", lambda lines: lines + b"qq q</w>\n", "merge 11, 'qq q</w>'"),
        ("m.txt", lambda lines: lines + b"t\n", "merge 11, 't'"),
        ("m.txt", lambda _: b"#version: 0.2\nt h\nth e\n", "[PAD]"),  # no ends of words: GPT-2's
        ("tokenizer.json", lambda _: b"[]", "WordPiece"),
        ("tokenizer.json", {"end_of_word_suffix": None}, "</w>"),
        ("tokenizer.json", {"vocab": {"a": 0}}, "not the 524 that its merges make"),
        ("tokenizer.json", {"merges": MERGES[:-1]}, "not the 523 that its merges make"),
        ("tokenizer.json", {"vocab": None}, "a vocabulary"),
    ],
)
def test_clip_vocab_that_is_none_ends_in_one_line(clip, tmp_path, name, change, says):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif callable(change):
        path.write_bytes(change(("#version\n" + "\n".join(MERGES) + "\n").encode()))
    elif change:
        clip.save(tmp_path)
        content = json.loads(path.read_text())
        content["model"] |= change
        path.write_text(json.dumps(content))
    line = stop_line(load_clip_vocab, path)
    assert says in line and str(path) in line


def test_clip_vocab_opens_in_transformers(openai, real_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    openai.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = (real_data / "text" / "wiki.valid.raw").read_text(encoding="utf-8").split("\n")[:400]
    assert theirs(text)["input_ids"] == [[49406, *ids, 49407] for ids in openai.encode(text)]
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_clip_vocab(tmp_path / "theirs").hash == openai.hash


# ---------------------------------------------------------------------------- packed text


def test_packed_text_equals_encoding_line_by_line(bert_vocab, tmp_path):
    rng = np.random.default_rng(0)
    text = "\n".join(
        "".join(rng.permutation(HARD)[:4]) + rng.choice(["", "\n", " \n \n", "\r\n\t\r\n"])
        for _ in range(300)
    )
    (tmp_path / "t.txt").write_bytes(("\n\n" + text).encode())
    counts = pack_text([tmp_path / "t.txt"], bert_vocab, tmp_path / "t.h5")
    plain = by_line(bert_vocab, text)
    attributes, vocab, maps = data.open_packed(tmp_path / "t.h5", "text")
    assert (
        maps["tokens"].tolist() == plain
        and counts["tokens"] == len(plain)
        and maps["tokens"].dtype == np.uint16
    )
    assert attributes["vocab_hash"] == vocab.hash == bert_vocab.hash
    assert (
        bytes(maps["sources"]) == b'["t.txt"]' and attributes["bytes"] == (tmp_path / "t.txt").stat().st_size
    )


def test_packed_real_text_equals_encode_batch(real_data, bert_vocab, tmp_path, monkeypatch):
    source = real_data / "text" / "wiki.valid.raw"
    monkeypatch.setattr(
        cached_words, "__defaults__", (8, 2000)
    )  # a full cache, and words it does not keep
    pack_text([source], bert_vocab, tmp_path / "t.h5")
    lines = source.read_text(encoding="utf-8").split("\n")
    plain, inside = [], False
    for line, ids in zip(lines, bert_vocab.encode(lines)):
        if line.strip():
            plain, inside = plain + [ids], True
        elif inside:
            plain, inside = plain + [[bert_vocab.sep]], False
    plain += [[bert_vocab.sep]] * inside
    assert np.array_equal(data.open_packed(tmp_path / "t.h5")[2]["tokens"], np.concatenate(plain))


def test_long_lines_and_pieces_do_not_change_ids(vocab, tmp_path):
    line = "the cat sat " * 200_000  # 2.4 MB without a line end
    (tmp_path / "t.txt").write_text(line + "\n\n" + line)
    pack_text([tmp_path / "t.txt"], vocab, tmp_path / "t.h5")
    one = vocab.encode(["the cat sat"])[0] * 200_000 + [vocab.sep]
    assert data.open_packed(tmp_path / "t.h5")[2]["tokens"].tolist() == one + one


def test_captions_pack_as_text_one_document_a_video(vocab, tmp_path):
    rows = {
        "b": {"start": [3, 1], "end": [4, 2], "text": ["cat ran", "the\ndog"]},
        "a": {"start": [], "end": [], "text": []},
    }
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pack_text([tmp_path / "c.json"], vocab, tmp_path / "c.h5")
    assert data.open_packed(tmp_path / "c.h5")[2]["tokens"].tolist() == vocab.encode(["the dog cat ran"])[
        0
    ] + [vocab.sep]


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
    out = tmp_path / "out.h5"
    assert "not UTF-8 near byte 75" in stop_line(pack_text, [tmp_path / "latin.txt"], vocab, out)
    assert "no text" in stop_line(pack_text, [tmp_path / "empty.txt"], vocab, out)
    gone = stop_line(
        pack_text, [tmp_path / "x.txt", tmp_path / "good.txt", tmp_path / "y.txt"], vocab, out
    )
    assert "x.txt" in gone and "y.txt" in gone and "good.txt" not in gone
    assert "no folder" in stop_line(
        pack_text, [tmp_path / "good.txt"], vocab, tmp_path / "no" / "out.h5"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert "GB are free" in stop_line(pack_text, [tmp_path / "good.txt"], vocab, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "good.txt", "latin.txt"]
    monkeypatch.undo()
    pack_text([tmp_path / "good.txt"], vocab, out)
    assert "exists" in stop_line(pack_text, [tmp_path / "good.txt"], vocab, out)


def test_terminated_packing_leaves_nothing(tmp_path):
    (tmp_path / "v.txt").write_text("\n".join(SPECIALS) + "\nthe\n")
    (tmp_path / "t.txt").write_text("the the\n" * 1000)
    os.mkfifo(tmp_path / "late.txt")  # a pipe that never ends: the packer waits in the middle of its work
    code = (
        "import data, runpy, sys; from pathlib import Path; Path.is_file = Path.exists; "
        f"sys.argv[0] = {str(ROOT / 'data.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "text",
            tmp_path / "t.txt",
            tmp_path / "late.txt",
            "--vocab",
            tmp_path / "v.txt",
            "--out",
            tmp_path / "out.h5",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with open(tmp_path / "late.txt", "wb") as pipe:  # opens once the packer has come to the second file
        assert list(tmp_path.glob("out.h5.*.tmp"))
        run.terminate()
        message = run.communicate(timeout=20)[1]
        pipe.close()
    assert run.returncode == 1 and message.splitlines()[-1].startswith("data.py: terminated")
    assert "Traceback" not in message and not list(tmp_path.glob("out.h5*"))


def test_ctrl_c_while_packing_leaves_nothing(vocab, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    vocab.save(tmp_path)
    (tmp_path / "t.txt").write_text("the cat")
    monkeypatch.setattr(packing, "write_packed", stop)
    before = sorted(tmp_path.iterdir())
    line = stop_line(
        main, ["text", f"{tmp_path}/t.txt", "--vocab", f"{tmp_path}", "--out", f"{tmp_path}/o.h5"]
    )
    assert "interrupted" in line and sorted(tmp_path.iterdir()) == before


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
    blocks = np.concatenate([s[: len(s) // 10 * 10].reshape(-1, 10) for s in streams])
    assert (
        [len(s) for s in streams] == [1003, 502]
        and train.dropped == 3 + 2
        and len(train) == 149
        and len(val) == 1
    )
    whole = torch.cat([train.batch(np.arange(149))["ids"], val.batch([0])["ids"]])
    assert whole.dtype == torch.int64 and torch.equal(
        whole[:, 1:-1], torch.from_numpy(blocks.astype(np.int64))
    )
    assert (whole[:, 0] == vocab.cls).all() and (whole[:, -1] == vocab.sep).all()
    assert train.batch([3])["mask"].all() and train.hash == val.hash
    apart = data.TextBlocks(shards, 12, "val", val_glob=shards.replace("?", "1"))
    assert (
        len(apart) == 50
        and len(data.TextBlocks(shards.replace("?", "0"), 12, "train", val_glob=shards)) == 100
    )
    assert torch.equal(apart.batch([7])["ids"], train.batch([107])["ids"])
    assert apart.hash != train.hash


def test_val_is_the_last_percent(demo):
    train, val = (data.TextBlocks(demo / "demo-s0" / "corpus.h5", 48, part) for part in ("train", "val"))
    total = len(train) + len(val)
    assert len(val) == total // 100 and total == len(train.tokens[0]) // 46
    assert torch.equal(
        val.batch([0])["ids"][0, 1:-1],
        torch.from_numpy(train.tokens[0][len(train) * 46 : len(train) * 46 + 46].astype(np.int64)),
    )


def test_blocks_refuse_what_they_cannot_read(shards, vocab, tmp_path):
    other = Vocab(vocab.tokens, lower=False)
    pack_text([tmp_path / "s1.txt"], other, tmp_path / "s2.h5")
    assert "s2.h5: packed with another vocabulary" in stop_line(data.TextBlocks, shards, 12)
    assert "no such file" in stop_line(data.TextBlocks, str(tmp_path / "x*.h5"), 12)
    assert "too few" in stop_line(data.TextBlocks, str(tmp_path / "s0.h5"), 1003)
    assert "too few" in stop_line(data.TextBlocks, str(tmp_path / "s0.h5"), 1100, "val")
    assert "--block_size 2" in stop_line(data.TextBlocks, shards, 2)
    assert "not videos" in stop_line(data.VideoClips, tmp_path / "s0.h5", 12)
    whole = (tmp_path / "s0.h5").read_bytes()
    for damage in (
        whole[: len(whole) // 2],
        whole[:1],
        b"",
        whole[:64] + bytes(len(whole) - 64),
        b"the cat sat",
    ):
        (tmp_path / "bad.h5").write_bytes(damage)
        assert "bad.h5" in stop_line(data.TextBlocks, str(tmp_path / "bad.h5"), 12)
    (tmp_path / "bad.h5").write_bytes(whole)
    with h5py.File(tmp_path / "bad.h5", "a") as f:
        f.attrs["format"] = 99
    assert "format 99" in stop_line(data.TextBlocks, str(tmp_path / "bad.h5"), 12)
    with h5py.File(tmp_path / "bad.h5", "a") as f:
        f.attrs["format"] = data.FORMAT
        f["vocab"][-1] = 65
    assert "damaged" in stop_line(data.TextBlocks, str(tmp_path / "bad.h5"), 12)


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
    assert len(ours) > 200 and ours in theirs + " "  # the same text, but for words that a block's ends cut


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
    def stop(*_, **__):
        raise KeyboardInterrupt

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
    assert "not text" in stop_line(data.TextBlocks, pairs, 12)
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
        assert (orders[0] != orders[1]).any() and (
            orders[1] != data.permuted(np.arange(n, 2 * n), n, seed=6)
        ).any()
    assert np.array_equal(data.permuted(np.array([2 * n, 0]), n, 5), [orders[2, 0], orders[0, 0]])


def test_permuted_mixes_evenly():
    n, epochs = 40, 4000
    first = data.permuted(np.arange(epochs) * n, n, 0)  # the sample that each epoch begins with
    counts = np.bincount(first, minlength=n)
    assert (
        (counts - epochs / n) ** 2 / (epochs / n)
    ).sum() < 80  # chi-square with 39 degrees: 80 is p = 1e-4
    order = data.permuted(np.arange(10**5), 10**5, 1)
    assert abs(np.corrcoef(order, np.arange(10**5))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02


def test_ranks_share_each_batch_and_the_order_ignores_their_number(shards):
    blocks = data.TextBlocks(shards, 12)

    def visits(world, accum, steps=range(12)):
        return np.stack(
            [
                np.concatenate(
                    [
                        blocks.index(3, step, 12, data.micro_rows(12, rank, world, micro, accum))
                        for rank in range(world)
                        for micro in range(accum)
                    ]
                )
                for step in steps
            ]
        )

    one = visits(1, 1)
    assert all(np.array_equal(one, visits(world, accum)) for world, accum in ((2, 1), (3, 2), (1, 4), (6, 2)))
    assert np.unique(one).size == 144 == one.size  # 12 steps of 12 are within the first epoch of 149
    assert not np.array_equal(one, visits(1, 1, range(13, 25)))
    assert np.array_equal(visits(1, 1, [7]), one[7:8])  # no state: any step by itself
    assert "--batch_size 12" in stop_line(data.micro_rows, 12, 0, 5, 0, 1)


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
    counts = torch.bincount(swapped, minlength=vocab.size)
    assert counts[vocab.specials].sum() == 0
    assert ((counts.float() - len(swapped) / ordinary) ** 2).sum() / (
        len(swapped) / ordinary
    ) < ordinary + 5 * (2 * ordinary) ** 0.5
    column = target.float().mean(0)[1:39]
    assert column.min() > 0.1 and column.max() < 0.2  # no favoured position


def test_masks_are_a_pure_function_of_their_keys(demo):
    blocks = data.TextBlocks(demo / "demo-s0" / "corpus.h5", 48)
    batch, positions = blocks.batch(np.arange(8)), np.arange(8)

    def masked(rows, *keys, rate=0.15, split="80/10/10"):
        return data.mask_tokens(batch["ids"][rows], batch["mask"][rows], blocks.vocab, rate, split, *keys)

    whole = masked(slice(0, 8), 1, 2, positions)
    part = masked(slice(4, 8), 1, 2, positions[4:])
    assert all(torch.equal(a[4:], b) for a, b in zip(whole, part))
    assert all(
        not torch.equal(whole[1], masked(slice(0, 8), *keys)[1])
        for keys in ((1, 3, positions), (2, 2, positions), ("val", positions), (1, 2, positions + 8))
    )
    assert (
        masked(slice(0, 8), 1, 2, positions, split="100/0/0")[0][whole[1] != -100] == blocks.vocab.mask
    ).all()
    assert (masked(slice(0, 8), 1, positions, rate=0.0)[1] == -100).all()
    for text in ("80/10", "a/b/c", "80/10/20", "110/-20/10"):
        assert f"--mask_split {text}" in stop_line(data.parse_split, text)


def test_anchors_are_real_tokens_drawn_once():
    mask = torch.arange(20) < torch.tensor([[20], [3], [1], [20]])
    k = np.array([5, 5, 5, 0])
    row, token = data.anchor_tokens(mask, k, 0, 1, np.arange(4))
    assert (
        row.tolist() == [0] * 5 + [1] * 3 + [2]
        and mask[row, token].all()
        and row.dtype == token.dtype == torch.int64
    )
    assert len(set(zip(row.tolist(), token.tolist()))) == 9
    again = data.anchor_tokens(mask[1:], k[1:], 0, 1, np.arange(1, 4))
    assert again[1].tolist() == token[5:].tolist()  # the same in another micro-batch
    first = [
        int(data.anchor_tokens(mask[:1], np.array([1]), 0, step, np.array([0]))[1]) for step in range(4000)
    ]
    counts = np.bincount(first, minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 52  # chi-square, 19 degrees, p = 1e-4
    assert data.anchors_per_row(512, 96, np.arange(96)).sum() == 512
    assert data.anchors_per_row(10, 4, np.array([1, 3])).tolist() == [3, 2]


# ---------------------------------------------------------------------------- packed videos


def howto(folder, videos=("v0", "v1", "v2", "v3"), seconds=10, d2=4, d3=3):
    """HowTo100M's layout; frame t of 2D is all t + 100 v, row r of 3D r + 100 v. Returns the arguments."""
    for name in ("f2", "f3"):
        (folder / name).mkdir(parents=True)
    captions = {}
    for v, video in enumerate(videos):
        np.save(
            folder / "f2" / f"{video}.npy",
            np.tile(np.arange(seconds, dtype=np.float32)[:, None] + 100 * v, d2),
        )
        np.save(folder / "f3" / f"{video}.npy", np.tile(np.arange(seconds * 3 // 2)[:, None] + 100.0 * v, d3))
        captions[video] = {
            "start": [0.5, 2.2, 6.0],
            "end": [2.0, 5.9, 7.5],
            "text": ["the cat sat", "on the mat , the mat", "a dog ran"],
        }
    (folder / "caption.json").write_text(json.dumps(captions))
    (folder / "videos.csv").write_text(
        "video_id,category_1,category_2,rank,task_id\n"
        + "".join(f"{video},,,1,{7 + v % 2}\n" for v, video in enumerate(videos))
    )
    return {
        "captions": folder / "caption.json",
        "feat2d": folder / "f2",
        "csv_file": folder / "videos.csv",
        "out": folder / "videos.h5",
        "feat3d": folder / "f3",
    }


def test_packed_videos_hold_what_the_files_hold(vocab, tmp_path):
    counts = pack_videos(vocab=vocab, **howto(tmp_path))
    assert counts == {"videos": 4, "captions": 12, "frames": 40, "tokens": 4 * 12, "problems": 0}
    maps = packed(tmp_path / "videos.h5")
    assert maps["frames"].dtype == np.float16 and maps["frames"].shape == (40, 7)
    assert np.array_equal(maps["frames"][10:20, 0], 100 + np.arange(10))
    assert maps["frames"][:10, 4].tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13]  # floor(1.5 t)
    assert maps["video_id"].tolist() == [b"v0", b"v1", b"v2", b"v3"] and maps["task"].tolist() == [7, 8, 7, 8]
    assert maps["frame_offsets"].tolist() == [0, 10, 20, 30, 40] and maps["caption_offsets"].tolist() == [
        0,
        3,
        6,
        9,
        12,
    ]
    assert maps["token_offsets"][:4].tolist() == [0, 3, 9, 12] and maps["start"][:3].tolist() == [
        0.5,
        2.2,
        6.0,
    ]
    assert vocab.decode(maps["tokens"][3:9]) == "on the mat, the mat"


def test_captions_join_and_bring_their_frames(vocab, tmp_path):
    pack_videos(vocab=vocab, **howto(tmp_path))
    train = data.VideoClips(tmp_path / "videos.h5", 11, val_clips=1)
    assert (train.d2, train.d3, train.features, len(train)) == (4, 3, 7, 9) and train.vocab.hash == vocab.hash
    batch = train.batch([0, 1, 5])
    texts = [vocab.decode(row[m]) for row, m in zip(batch["ids"], batch["mask"])]
    assert texts == [
        "[CLS] the cat sat on the mat, the mat [SEP]",
        "[CLS] on the mat, the mat a dog ran [SEP]",
        "[CLS] a dog ran [SEP]",
    ]
    # 0.5-5.9 s, 2.2-7.5 s, and 6.0-7.5 s of the second video
    assert [f[m, 0].tolist() for f, m in zip(batch["frames"], batch["frame_mask"])] == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7],
        [106, 107],
    ]
    assert (
        batch["frames"][0, :, 4].tolist() == [0, 1, 3, 4, 6, 7]
        and (batch["frames"][~batch["frame_mask"]] == 0).all()
    )
    assert batch["frames"].dtype == torch.float32 and batch["ids"].shape == (3, 11)
    cut = data.VideoClips(tmp_path / "videos.h5", 7, max_frames=3, val_clips=1).batch(
        [0]
    )  # cut inside a caption
    assert vocab.decode(cut["ids"][0]) == "[CLS] the cat sat on the [SEP]" and cut["frames"][
        0, :, 0
    ].tolist() == [0, 1, 2]
    one = train.clips([0, 4])
    assert [vocab.decode(row[m]) for row, m in zip(one["ids"], one["mask"])] == [
        "[CLS] the cat sat [SEP]",
        "[CLS] on the mat, the mat [SEP]",
    ]
    assert [f[m, 0].tolist() for f, m in zip(one["frames"], one["frame_mask"])] == [
        [0, 1],
        [102, 103, 104, 105],
    ]
    image = data.VideoClips(tmp_path / "videos.h5", 11, vision="image", val_clips=1)
    assert image.features == 4 and image.batch([0, 5])["frames"].tolist() == [[[3.0] * 4], [[107.0] * 4]]
    normed = data.VideoClips(tmp_path / "videos.h5", 11, val_clips=1, feat_norm=True).batch([5])["frames"]
    assert torch.allclose(normed[..., :4].norm(dim=-1), torch.ones(1, 2)) and torch.allclose(
        normed[..., 4:].norm(dim=-1), torch.ones(1, 2)
    )
    assert np.allclose(train.duration([0, 1]), [1.5, 3.7])
    assert "--vision film" in stop_line(data.VideoClips, tmp_path / "videos.h5", 11, vision="film")


def test_held_out_clips_are_whole_videos(demo):
    path = demo / "demo-s0" / "videos.h5"
    train, val = (data.VideoClips(path, 48, part=part, val_clips=498) for part in ("train", "val"))
    assert (len(train), len(val)) == (7500, 500) and not set(train.video_id) & set(val.video_id)
    assert data.VideoClips(path, 48, part="val").video_id.size == 200  # at most a tenth of the videos
    assert np.array_equal(val.video_of(np.arange(500)), np.repeat(np.arange(125), 4))
    index = np.concatenate([train.index(0, step, 50, np.arange(50)) for step in range(300)])
    assert np.array_equal(np.sort(index[:7500]), np.arange(7500)) and not np.array_equal(
        index[:7500], index[7500:]
    )


def test_voken_clips_take_one_of_each_task_first(demo):
    train = data.VideoClips(demo / "demo-s0" / "videos.h5", 48, val_clips=500)
    tasks = set(train.task.tolist())
    for K in (30, len(tasks), 150, 1875):
        clips = train.voken_clips(K, 0)
        videos = train.video_of(clips)
        assert len(clips) == K == len(set(videos.tolist()))
        per_task = Counter(train.task[videos].tolist())
        assert len(per_task) == min(K, len(tasks)) and (
            K > 1000 or max(per_task.values()) <= 1 + K // len(tasks)
        )
    assert len(train.voken_clips(10**4, 0)) == 1875 and not np.array_equal(
        train.voken_clips(30, 0), train.voken_clips(30, 1)
    )


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
    for text in (
        "missing: ",
        "f2/gone.npy",
        "f3/gone.npy",
        "empty: ",
        "nothing.npy",
        "damaged: ",
        "cut.npy",
        "junk.npy",
        "pickled.npy",
        "nan.npy: 1 of 40 values",
        "inf.npy",
        "flat.npy: float32 (40,)",
        "wide.npy: 5 channels, the " "others have 4",
        "long: 13 s of 2D features, 10.0 s of 3D",
        "norows.npy: shape (0, 4)",
        "late: 1 of 3 captions " "lie beyond",
        "times: a time is no number of seconds",
        "uneven: 3 starts, 3 ends, 2 texts",
        "nocaptions: in ",
    ):
        assert text in said, text
    assert (tmp_path / "videos.h5.problems.txt").read_text().count("\n") == 17
    assert not (tmp_path / "videos.h5").exists() and not list(tmp_path.glob("*.tmp"))


def test_skip_bad_leaves_out_just_the_broken(vocab, tmp_path, capsys):
    counts = pack_videos(vocab=vocab, skip_bad=True, **broken(tmp_path))
    said = capsys.readouterr().out
    assert (
        counts["problems"] == 17
        and "left out 17 problems" in said
        and "1 videos with captions are not in" in said
    )
    maps = packed(tmp_path / "videos.h5")
    assert maps["video_id"].tolist() == [b"good", b"late", b"good2"] and maps["caption_offsets"].tolist() == [
        0,
        3,
        5,
        8,
    ]
    assert np.isfinite(maps["frames"]).all()


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
    assert (
        pack_videos(vocab=vocab, **args)["captions"] == 10
        and "2 captions without a word" in capsys.readouterr().out
    )
    clips = data.VideoClips(tmp_path / "videos.h5", 12, val_clips=1)
    assert (clips.d2, clips.d3, clips.features) == (4, 0, 4)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("captions", '{"v0": {"start": [0], "end"', "cut off"),
        ("captions", "[1, 2]", "not a JSON object"),
        ("captions", '{"v0": 3} x', "malformed"),
        ("captions", '{"v0": 3 "v1": 4}', "malformed"),
        ("captions", "", "not a JSON object"),
        ("captions", "{}", "no video is left"),
        ("csv_file", "video,task\nv0,1\n", "no columns video_id and task_id"),
        ("csv_file", "video_id,task_id\nv0,abc\n", "line 2"),
        ("csv_file", "video_id,task_id\n", "names no video"),
        ("csv_file", "video_id,task_id\n,3\n", "no video_id"),
    ],
)
def test_malformed_lists_end_in_one_line(vocab, tmp_path, name, content, says):
    args = howto(tmp_path)
    args[name].write_text(content)
    line = stop_line(pack_videos, vocab=vocab, skip_bad=True, **args)
    assert says in line and not args["out"].exists() and not list(tmp_path.glob("*.tmp"))


def test_caption_file_is_read_in_pieces(tmp_path):
    rows = {
        f'video "{i}" ü': {
            "start": [0.0],
            "end": [1.5],
            "text": [f'}} {{ \\ " {i} ] \u2028 ' + "ü" * (i % 999)],
        }
        for i in range(9000)
    }
    for indent in (None, 1):
        (tmp_path / "c.json").write_text(
            json.dumps(rows, ensure_ascii=bool(indent), indent=indent), encoding="utf-8"
        )
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
    args = (
        real / "DERIVED_caption_from_youcook2val.json",
        tmp_path / "2d",
        tmp_path / "few.csv",
        bert_vocab,
        tmp_path / "videos.h5",
        tmp_path / "3d",
    )
    assert "1 problems in 12 videos (1 missing)" in stop_line(pack_videos, *args)
    assert f"{few[3][0]}.npy" in capsys.readouterr().out
    counts = pack_videos(*args, skip_bad=True)
    assert counts["videos"] == 11 and "424 videos with captions are not in" in capsys.readouterr().out
    clips = data.VideoClips(tmp_path / "videos.h5", 128, 512, val_clips=1)
    batch = clips.batch(clips.index(0, 0, 8, np.arange(8)))
    assert batch["frames"].shape[2] == 4096 and batch["mask"].sum(1).min() > 5
    first = clips.video_id[0].decode()
    at = int(captions[first]["start"][0])
    assert np.allclose(
        clips.batch([0])["frames"][0, 0, :2048], np.load(tmp_path / "2d" / f"{first}.npy")[at], atol=1e-3
    )
    assert np.allclose(
        clips.batch([0])["frames"][0, 0, 2048:],
        np.load(tmp_path / "3d" / f"{first}.npy")[at * 3 // 2],
        atol=1e-3,
    )


# ---------------------------------------------------------------------------- the demo world


@pytest.fixture
def small_world(monkeypatch):
    for name, value in (
        ("VIDEOS", 100),
        ("SENTENCES", 900),
        ("TASK_SIZES", {"train": 40, "dev": 20, "dev_seen": 20}),
    ):
        monkeypatch.setattr(world, name, value)


def test_demo_is_a_function_of_its_seed(small_world, tmp_path):
    a, b, c = (make_demo(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()) and len(names) > 200
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    for name in (
        "corpus.h5",
        "videos.h5",
        "raw/latents.json",
        "raw/tasks/entailment/train.tsv",
        "raw/feat2d/demo0000.npy",
    ):
        assert (a / name).read_bytes() != (c / name).read_bytes()
    worlds = [json.loads((w / "raw" / "latents.json").read_text())["nouns"] for w in (a, c)]
    both = set(worlds[0]) & set(worlds[1])
    assert any(worlds[0][n]["split"] != worlds[1][n]["split"] for n in both)
    assert any(worlds[0][n]["order"] != worlds[1][n]["order"] for n in both)
    before = (a / "world.json").stat().st_mtime_ns
    assert make_demo(a, 3) == a and (a / "world.json").stat().st_mtime_ns == before
    assert "not the demo world of seed 5" in stop_line(make_demo, a, 5)


def test_demo_pairs_are_made_once_from_the_worlds_text(small_world, tmp_path, capsys):
    from run import init_world

    world, folder = init_world("cpu"), make_demo(tmp_path / "w", 3)
    path = demo_xtext(folder, world)
    assert path == folder / "xcorpus.h5" and f"no {path} yet" in capsys.readouterr().out
    pairs, text = packed(path), packed(folder / "corpus.h5")
    assert np.array_equal(pairs["tokens"], text["tokens"])
    blocks = data.PairBlocks(path, 24)
    vocab, clip = blocks.vocab, blocks.clip_vocab
    assert vocab is clip and vocab.hash == data.open_vocab(folder / "corpus.h5").hash
    assert np.array_equal(pairs["clip_tokens"], text["tokens"][text["tokens"] != vocab.sep])  # words alone
    before = path.stat().st_mtime_ns
    assert demo_xtext(folder, world) == path and path.stat().st_mtime_ns == before
    assert f"reused {path}" in capsys.readouterr().out
    with h5py.File(path, "a") as f:
        f.attrs["format"] = 0
    demo_xtext(folder, world)
    assert f"no {path} yet" in capsys.readouterr().out and data.open_packed(path)[0]["format"] == data.FORMAT
    blocks = data.PairBlocks(path, 48, segments=2, length=48)
    assert blocks.cut == 0 and blocks.used < 0.6  # a word that a block's end cuts is whole on CLIP's side


def test_interrupted_demo_leaves_nothing(small_world, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "pack_videos", stop)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "demo", 0)
    assert not list(tmp_path.iterdir())


def test_demo_has_the_layouts_of_real_data(demo):
    raw = demo / "demo-s0" / "raw"
    captions = json.loads((raw / "caption.json").read_text())
    with open(raw / "videos.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["video_id", "category_1", "category_2", "rank", "task_id"] and len(
        rows
    ) == 2000 == len(captions)
    assert np.load(raw / "feat2d" / "demo0007.npy").shape == (24, 64) and np.load(
        raw / "feat3d" / "demo0007.npy"
    ).shape == (36, 64)
    latents = json.loads((raw / "latents.json").read_text())
    assert [c["text"] for c in latents["clips"][28:32]] == captions["demo0007"]["text"]
    assert len(latents["nouns"]) == 100 and len(latents["clips"]) == 8000
    materials = Counter((n["material"], n["split"]) for n in latents["nouns"].values())
    assert all(
        materials[m, "train"] + materials[m, "dev"] == 10 and materials[m, "dev"] in (3, 4)
        for m in EFFECTS
    )
    for split, size in (("train", 65), ("dev", 35)):
        orders = Counter(n["order"] for n in latents["nouns"].values() if n["split"] == split)
        assert sum(orders.values()) == size and abs(orders["spins first"] - orders["tilts first"]) == 1
    vocab = load_vocab(raw / "vocab.txt")
    whole = sum(noun in vocab.tokens for noun in latents["nouns"])
    assert 60 <= whole < 100  # most nouns are one piece, some are split


def test_demo_texts_never_tell_a_property(demo):
    raw = demo / "demo-s0" / "raw"
    latents = json.loads((raw / "latents.json").read_text())
    nouns = set(latents["nouns"])
    outcomes = {e for of in EFFECTS.values() for e in of.values()} | {"spins", "tilts"}
    never = {value for name in ("material", "colour", "size") for value in PROPERTIES[name]}
    for clip in latents["clips"]:
        words = set(clip["text"].split())
        assert (
            not words & (outcomes | never)
            and words & nouns <= {clip["noun"]}
            and len(clip["text"].split()) <= 14
        )
    sentences = [
        line.split() for path in (raw / "text").iterdir() for line in path.read_text().split("\n") if line
    ]
    assert len(sentences) == 32_000 and max(map(len, sentences)) <= 17
    named = 0
    for words in map(set, sentences):
        assert not words & never and not (words & nouns and words & outcomes)
        named += bool(words & nouns)
    assert 0.77 < named / 32_000 < 0.83
    assert outcomes <= set().union(*sentences)  # so that the tasks' words are known


def test_demo_order_shows_in_motion_only(demo):
    latents = json.loads((demo / "demo-s0" / "raw" / "latents.json").read_text())["clips"]
    frames = packed(demo / "demo-s0" / "videos.h5")["frames"].astype(np.float32).reshape(8000, 6, 128)
    order = np.array([clip["order"] == "spins first" for clip in latents])
    material = np.array([list(EFFECTS).index(clip["material"]) for clip in latents])
    nouns = sorted({clip["noun"] for clip in latents})
    noun = np.array([nouns.index(clip["noun"]) for clip in latents])

    def held_out_accuracy(x, y):  # nearest class mean, fitted on half of the nouns
        fit = noun % 2 == 0
        means = np.stack([x[fit & (y == value)].mean(0) for value in range(y.max() + 1)])
        return (np.argmin(((x[~fit, None] - means) ** 2).sum(2), 1) == y[~fit]).mean()

    middle, edges = frames[:, 2:5].mean(1), frames[:, [0, 1, 5]].mean(1)
    assert held_out_accuracy(middle[:, 64:], order.astype(int)) > 0.99
    assert 0.4 < held_out_accuracy(middle[:, :64], order.astype(int)) < 0.6
    assert held_out_accuracy(edges[:, 64:], order.astype(int)) < 0.6
    assert (
        held_out_accuracy(frames[:, :, :64].mean(1), material)
        > 0.9
        > 0.3
        > held_out_accuracy(middle[:, 64:], material)
    )


def read_task(folder, task, split):
    """Rows (text fields..., label) of a demo task, read from its official layout."""
    base = folder / task
    if task in ("mishap", "entailment"):
        rows = [line.split("\t") for line in (base / f"{split}.tsv").read_text().splitlines()]
        return [tuple(row) if task == "mishap" else tuple(row[1:]) for row in rows[1:]]
    if task == "two_choices":
        name = {"train": "train", "dev": "valid", "dev_seen": "valid_seen"}[split]
        rows = [json.loads(line) for line in (base / f"{name}.jsonl").read_text().splitlines()]
        labels = (base / f"{name}-labels.lst").read_text().split()
        return [
            (row["goal"], row["sol1"], row["sol2"], label) for row, label in zip(rows, labels, strict=True)
        ]
    if task == "four_endings":
        name = {"train": "train", "dev": "val", "dev_seen": "val_seen"}[split]
        with open(base / f"{name}.csv", newline="") as f:
            return [
                (row["sent1"], *[row[f"ending{i}"] for i in range(4)], row["label"])
                for row in csv.DictReader(f)
            ]
    name = {"train": "tracie_train", "dev": "tracie_test", "dev_seen": "tracie_test_seen"}[split]
    rows = []
    for line in (base / f"{name}.txt").read_text().splitlines():
        text, answer = line.split("\t")
        event, story = text.removeprefix("event: ").split(" story: ")
        rows.append((event, story, answer.removeprefix("answer: ")))
    return rows


@pytest.mark.parametrize("task", ["mishap", "entailment", "two_choices", "four_endings", "before_after"])
def test_tasks_are_true_balanced_and_split_by_noun(demo, task):
    raw = demo / "demo-s0" / "raw"
    nouns = json.loads((raw / "latents.json").read_text())["nouns"]
    past = {text: action for action, (text, _) in ACTIONS.items()}
    seen = set()

    def effect(noun, action):
        return EFFECTS[nouns[noun]["material"]][action]

    for split, size in TASK_SIZES.items():
        rows = read_task(raw / "tasks", task, split)
        assert len(rows) == size == len(set(rows)) and not seen & set(rows)
        seen |= set(rows)
        wordings = {}
        for *texts, label in rows:
            words = " ".join(texts).split()
            named = [word for word in words if word in nouns]
            assert named and all((nouns[noun]["split"] == "dev") == (split == "dev") for noun in named)
            action = next((past[word] for word in words if word in past), None)
            if task == "mishap":
                true, wording = int(label) == (effect(named[0], action) in MISHAPS), action
            elif task == "entailment":
                true = (label == "entailment") == (effect(named[0], action) == texts[1].split()[1])
                wording = action, texts[1]
            elif task == "two_choices":
                said, action = texts[0].split()[2], texts[0].split()[5]
                true = [effect(noun, action) == said for noun in named] == [label == "0", label == "1"]
                wording = texts[0]
            elif task == "four_endings":
                true = [ending == f"{effect(named[0], action)} ." for ending in texts[1:]] == [
                    label == str(i) for i in range(4)
                ]
                wording = "all"
            else:
                first, relation = texts[0].split()[2], texts[0].split()[4]
                is_first = nouns[named[0]]["order"] == f"{first} first"
                true, wording = (label == "positive") == (is_first == (relation == "before")), (
                    first,
                    relation,
                )
            assert true, (texts, label)
            wordings.setdefault(wording, Counter())[label] += 1
        for wording, labels in wordings.items():
            assert len(labels) == (4 if task == "four_endings" else 2) and len(set(labels.values())) == 1, (
                wording,
                labels,
            )


def test_demo_topics_say_nothing_about_materials(demo):
    nouns = json.loads((demo / "demo-s0" / "raw" / "latents.json").read_text())["nouns"]
    pairs = Counter((n["material"], n["topic"]) for n in nouns.values())
    assert max(pairs.values()) <= 6  # 10 nouns over 8 topics, drawn independently


# ---------------------------------------------------------------------------- command line


def test_commands_do_what_the_issue_says(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("the cat sat on the mat .\nthe dog ran .\n\na cat !\n" * 200)
    howto(tmp_path / "h")
    main(["vocab", str(tmp_path / "t.txt"), "--size=40", "--out", str(tmp_path / "v.txt")])
    main(
        ["text", str(tmp_path / "t.txt"), "--vocab", str(tmp_path / "v.txt"), "--out", str(tmp_path / "c.h5")]
    )
    main(
        [
            "videos",
            "--captions",
            str(tmp_path / "h/caption.json"),
            "--feat2d",
            str(tmp_path / "h/f2"),
            "--feat3d",
            str(tmp_path / "h/f3"),
            "--csv",
            str(tmp_path / "h/videos.csv"),
            "--vocab",
            str(tmp_path / "c.h5"),
            f"--out={tmp_path}/my_videos.h5",
            "--skip_bad",
        ]
    )
    assert (
        data.VideoClips(tmp_path / "my_videos.h5", 12, val_clips=1).vocab.hash
        == data.TextBlocks(str(tmp_path / "c.h5"), 12).vocab.hash
    )
    assert "MB/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "required"),
        (["tex"], "invalid choice"),
        (["text", "x.txt"], "--vocab"),
        (["demo", "--seed", "a"], "--seed"),
        (["text", "x.txt", "--vocab", "no.txt", "--out", "o.h5"], "x.txt: no such file"),
        (["xtext", "x.txt", "--vocab", "no.txt", "--out", "o.h5"], "--clip-vocab"),
        (["demo", "--sead", "1"], "--sead"),
        (["vocab", "x.txt", "--out", "v.txt", "--size", "1e4"], "--size"),
    ],
)
def test_command_line_mistakes_are_one_line(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in stop_line(main, argv)
