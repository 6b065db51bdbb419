"""parts/vocab.py: ids are BERT's and CLIP's, vocabularies survive every file, others end in one line.

Run: python -m pytest -q tests/test_vocab.py
"""
import codecs
import gzip
import html
import json
import re
import unicodedata

import numpy as np
import pytest
from conftest import stop_line

import data
from parts.vocab import OPENAI_CLIP, SPECIALS, CLIPVocab, Vocab, load_clip_vocab, load_vocab
from prepare.packing import pack_text

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


# ---------------------------------------------------------------------------- WordPiece


def test_ids_equal_berts_on_difficult_text(bert_vocab):
    assert bert_vocab.encode(HARD) == HARD_IDS and bert_vocab.lower and bert_vocab.strip_accents
    assert bert_vocab.encode(HARD * 30) == HARD_IDS * 30  # the threaded path
    assert bert_vocab.specials == [0, 100, 101, 102, 103]
    assert bert_vocab.specials == [getattr(bert_vocab, name) for name in ("pad", "unk", "cls", "sep", "mask")]


def test_ids_equal_tokenizers_berts_cased_and_uncased(real_data, bert_vocab):
    from tokenizers import BertWordPieceTokenizer
    text = (real_data / "text" / "wiki.valid.raw").read_text(encoding="utf-8").split("\n")[:300] + HARD
    for lower in (True, False):
        theirs = BertWordPieceTokenizer(str(real_data / "vocab" / "bert-base-uncased-vocab.txt"),
                                        lowercase=lower)
        ours = Vocab(bert_vocab.tokens, lower, lower)
        assert ours.encode(text) == [e.ids for e in theirs.encode_batch(text, add_special_tokens=False)]


def test_vocab_survives_every_file_it_is_kept_in(vocab, tmp_path):
    cased = Vocab(vocab.tokens + ["The"], lower=False, strip_accents=False)
    for v in (vocab, cased):
        v.save(tmp_path / v.hash)
        (tmp_path / v.hash[:9]).mkdir()
        v.tokenizer.save(str(tmp_path / v.hash[:9] / "tokenizer.json"))
        (tmp_path / v.hash[:8]).mkdir()
        for name in ("vocab.txt", "tokenizer_config.json"):  # as another system may write them
            text = (tmp_path / v.hash / name).read_text().replace("\n", "\r\n")
            (tmp_path / v.hash[:8] / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        (tmp_path / f"{v.hash}.txt").write_text("the cat")
        pack_text([tmp_path / f"{v.hash}.txt"], v, tmp_path / f"{v.hash}.h5")
        for place in (v.hash, f"{v.hash}/vocab.txt", v.hash[:9], v.hash[:8], f"{v.hash}.h5"):
            again = data.open_vocab(tmp_path / place)
            assert (again.tokens, again.lower, again.strip_accents, again.hash) == (
                v.tokens, v.lower, v.strip_accents, v.hash)
    assert vocab.hash != Vocab(vocab.tokens, lower=False).hash != Vocab(vocab.tokens[::-1]).hash
    assert vocab.decode(vocab.encode(["the cats , sat"])[0]) == "the cats, sat"


def test_of_a_token_that_stands_twice_the_last_line_counts(tmp_path, capsys):
    """Ids are line numbers; removing a line would shift all later ones."""
    path = tmp_path / "vocab.txt"
    path.write_bytes(codecs.BOM_UTF8 + "\n".join([*SPECIALS, "the", "cat", "the", "dog"]).encode())
    v = load_vocab(path)
    assert v.size == 9 and v.encode(["the cat the dog"]) == [[7, 6, 7, 8]]
    assert "the token 'the' stands there twice; the last one counts" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, says", [
    ("vocab.txt", b"[PAD]\nthe\ncat\n", "has no [UNK] [CLS]"),
    ("vocab.txt", b"\xff\xff\x00", "line 1: not UTF-8"), ("vocab.txt", b"\n", "is empty"),
    ("tokenizer.json", b"{", "line 1: broken JSON"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}', "WordPiece"),
    ("config.json", b"[]", "no object"), ("x.h5", b"\x89HDF", "not a packed file"),
    ("none.txt", None, "cannot be read"), ("gone/", b"", "neither vocab.txt"),
])
def test_vocab_that_is_none_ends_in_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.mkdir() if name.endswith("/") else path.write_bytes(content)
    line = stop_line(data.open_vocab, path)
    assert says in line and str(path) in line


@pytest.mark.parametrize("model", ["[1]", '"x"', '{"merges": [1]}', '{"merges": [], "vocab": {}, '
                                   '"end_of_word_suffix": "</w>"}'])
def test_tokenizer_json_of_another_form_is_one_line(tmp_path, model):
    path = tmp_path / "tokenizer.json"
    for more in ("", ', "added_tokens": null', ', "added_tokens": [1]'):
        path.write_text(f'{{"model": {model}, "normalizer": "Lowercase", "pre_tokenizer": ["ByteLevel"]'
                        f'{more}}}')
        for load in (load_clip_vocab, load_vocab):
            assert "tokenizer.json: " in stop_line(load, path)


def test_tokenizer_json_of_others_is_refused_where_ids_would_differ(vocab, tmp_path):
    vocab.tokenizer.save(str(tmp_path / "tokenizer.json"))
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    for key, value, says in (("normalizer", {"type": "NFKC"}, "normalizer"),
                             ("pre_tokenizer", None, "pre-tokenizer"),
                             ("model", good["model"] | {"max_input_chars_per_word": 200}, "100 characters"),
                             ("added_tokens", [{"id": 99, "content": "<new>"}], "<new>")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | {key: value}))
        assert says in stop_line(load_vocab, tmp_path)


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
    assert openai.encode(list(CLIP_IDS) * 30) == list(CLIP_IDS.values()) * 30  # the threaded path
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


@pytest.mark.parametrize("name, change, says", [
    ("gone.txt.gz", None, "https://github.com/openai/CLIP"),
    ("gone.txt", None, "https://github.com/openai/CLIP"),
    ("empty/", None, "no vocabulary of CLIP"),
    ("m.txt.gz", lambda _: b"\x1f\x8bnothing", "not a vocabulary"),
    ("m.txt.gz", lambda lines: gzip.compress(lines)[:-9], "not a vocabulary"),
    ("m.txt", lambda lines: lines + b"ca t</w>\n", "merge 11, 'ca t</w>'"),
    ("m.txt", lambda lines: lines + b"qq q</w>\n", "merge 11, 'qq q</w>'"),
    ("m.txt", lambda lines: lines + b"t\n", "merge 11, 't'"),
    ("m.txt", lambda _: b"#version: 0.2\nt h\nth e\n", "[PAD]"),  # no ends of words: GPT-2's
    ("tokenizer.json", lambda _: b"[]", "no object"),
    ("tokenizer.json", {"end_of_word_suffix": None}, "</w>"),
    ("tokenizer.json", {"vocab": {"a": 0}}, "not the 524 that its merges make"),
    ("tokenizer.json", {"merges": MERGES[:-1]}, "not the 523 that its merges make"),
    ("tokenizer.json", {"vocab": None}, "a vocabulary"),
])
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
