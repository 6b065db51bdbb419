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
                             ("normalizer", good["normalizer"] | {"lowercase": 1}, "true or false for lower case"),
                             ("normalizer", good["normalizer"] | {"strip_accents": {}}, "true or false for"),
                             ("pre_tokenizer", None, "pre-tokenizer"),
                             ("model", good["model"] | {"max_input_chars_per_word": 200}, "100 characters"),
                             ("added_tokens", [{"id": 99, "content": "<new>"}], "<new>")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | {key: value}))
        assert says in stop_line(load_vocab, tmp_path)


# ---------------------------------------------------------------------------- settings beside a vocabulary

SMALL = [*SPECIALS, "the", "The", "cat", "##s", "中", "国", "中国", "é", "e", "[", "]", "sep", "##p", "mask",
         "!", "<", "unk", ">", "<unk>", "##at", "c"]
TEXT = "The the é cats 中国 中 [SEP] [sep] x[MASK]y <unk>!"
REST = [7, 8, 9, 10, 9, 3, 14, 16, 15, 1, 4, 1, 20, 21, 22, 19]
UNCASED, CASED = [5, 5, 13, *REST], [6, 5, 12, *REST]
HF = {"config": {"model_type": "bert", "vocab_size": len(SMALL)}}


def says(**settings):
    return HF | {"tokenizer_config": settings}


def token(content="[SEP]", **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            **flags}


LOWER = says(do_lower_case=True)


def tokenizer_json(lower, change=lambda content: content):
    return change(json.loads(Vocab(SMALL, lower, lower).tokenizer.to_str()))


def written(folder, files, vocabulary=SMALL):
    """A folder of `<name>.json` with that content, and of a vocab.txt where there is no tokenizer.json."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if "tokenizer" not in files:
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    return folder


def with_added(content):
    return content | {"added_tokens": [*content["added_tokens"], token("cat", id=7, special=False)]}


# files beside a vocabulary: the ids of TEXT, as transformers 5.24's AutoTokenizer has them, or what is said
BESIDE = [
    (LOWER, UNCASED), (says(do_lower_case=False), CASED), ({}, CASED),
    (HF, "is cased, but no tokenizer_config.json says so"),
    (says(do_lower_case=False, strip_accents=True), [6, 5, 13, *REST]),
    (says(do_lower_case=True, strip_accents=False), [5, 5, 12, *REST]),
    *((says(do_lower_case=False, tokenizer_class=name), CASED) for name in (
        "BertTokenizer", "BertTokenizerFast", "ElectraTokenizer", "ElectraTokenizerFast",
        "DistilBertTokenizer")),
    *((says(do_lower_case=False, tokenizer_class=name), f"tokenizer_class is '{name}'") for name in (
        "BertJapaneseTokenizer", "RobertaTokenizer", "Foo")),
    (says(do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast"), "needs a tokenizer.json"),
    ({"config": HF["config"] | {"tokenizer_class": "BertJapaneseTokenizer"}}, "tokenizer_class is"),
    (says(do_lower_case=False, tokenize_chinese_chars=False), "tokenize_chinese_chars is False"),
    (says(do_lower_case=False, do_basic_tokenize=False), "do_basic_tokenize is False"),
    (says(do_lower_case=False, do_basic_tokenize=True, never_split=None, tokenize_chinese_chars=True), CASED),
    (says(do_lower_case=False, never_split=["The"]), "never_split is ['The']"),
    (says(do_lower_case="false"), "do_lower_case is 'false'"),
    (says(do_lower_case=None), "do_lower_case is None"),
    (says(do_lower_case=False, split_special_tokens=True), "split_special_tokens is True"),
    (says(do_lower_case=True, unk_token="<unk>"), "unk_token is '<unk>'"),
    (says(do_lower_case=True, pad_token=None), "pad_token is None"),
    (says(do_lower_case=True, bos_token="[CLS]", eos_token=None), UNCASED),
    (says(do_lower_case=True, bos_token="cat"), "bos_token is 'cat'"),
    (says(do_lower_case=True, additional_special_tokens=["cat"]), "additional_special_tokens is ['cat']"),
    (says(do_lower_case=True, additional_special_tokens=[]), UNCASED),
    (says(do_lower_case=True, added_tokens_decoder={"3": token(special=True, rstrip=True)}), UNCASED),
    (says(do_lower_case=True, added_tokens_decoder={"7": token("cat", special=True)}),
     "added_tokens_decoder is"),
    (LOWER | {"special_tokens_map": {"unk_token": "[UNK]", "sep_token": token(lstrip=True)}}, UNCASED),
    (LOWER | {"special_tokens_map": {"unk_token": "<unk>"}}, "special_tokens_map.json: unk_token is '<unk>'"),
    *((LOWER | {"special_tokens_map": {"sep_token": token(**{flag: True})}}, "sep_token is {")
      for flag in ("normalized", "single_word")),
    (LOWER | {"added_tokens": {"<new>": len(SMALL)}}, "added_tokens.json: <new> is 26"),
    (LOWER | {"added_tokens": {}}, UNCASED),
    # of a tokenizer.json AutoTokenizer takes but the vocabulary, where a class of BERT's is said
    (LOWER | {"tokenizer": tokenizer_json(False)}, UNCASED),
    (says(do_lower_case=False) | {"tokenizer": tokenizer_json(True)}, CASED),
    (says(tokenizer_class="PreTrainedTokenizerFast") | {"tokenizer": tokenizer_json(False)}, CASED),
    ({"tokenizer": tokenizer_json(False)}, CASED), (HF | {"tokenizer": tokenizer_json(True)}, UNCASED),
    (HF | {"tokenizer": tokenizer_json(False)}, "is cased, but no tokenizer_config.json says so"),
    (LOWER | {"tokenizer": tokenizer_json(True, with_added)}, "tokens were added to it (cat)"),
    ({"tokenizer": tokenizer_json(True) | {"added_tokens": []}}, "special tokens in added_tokens"),
    ({"tokenizer": tokenizer_json(True) | {"added_tokens": [1]}}, "not in the form of a tokenizer.json"),
    (LOWER | {"tokenizer": tokenizer_json(True) | {"added_tokens": []}}, UNCASED),
]


@pytest.mark.parametrize("files, expected", BESIDE)
def test_settings_beside_a_vocabulary_are_honoured_or_refused(tmp_path, files, expected):
    written(tmp_path, files)
    if isinstance(expected, str):
        line = stop_line(load_vocab, tmp_path)
        assert expected in line and len(line) <= 300 and ";" in line
    else:
        assert load_vocab(tmp_path).encode([TEXT]) == [expected]


def test_accepted_folders_have_the_ids_of_autotokenizer(tmp_path):
    """Those above, and 300 whose settings are drawn: each is refused, or equal on nasty texts."""
    transformers = pytest.importorskip("transformers")
    rng, accepted = np.random.default_rng(0), 0
    parts = [*SMALL, *HARD, "\u0301", "ß", "İ", "[ SEP ]", "😀", "\x1c", "\u3000", "\t", "a" * 101]
    settings = [files["tokenizer_config"] for files, _ in BESIDE if "tokenizer_config" in files]
    drawn = [files for files, _ in BESIDE if "config" in files]
    for _ in range(300):
        chosen = {"do_lower_case": bool(rng.random() < 0.5)}
        for i in rng.integers(0, len(settings), rng.integers(0, 3)):
            chosen |= settings[i]
        files = says(**chosen)
        if rng.random() < 0.4:
            files["tokenizer"] = tokenizer_json(bool(rng.random() < 0.5))
        if rng.random() < 0.3:
            files["special_tokens_map"] = {"sep_token": token(), "unk_token": "[UNK]"}
        drawn.append(files)
    for i, files in enumerate(drawn):
        folder = written(tmp_path / str(i), files)
        try:
            ours = load_vocab(folder)
        except SystemExit:
            continue
        texts = [TEXT, *("".join(rng.choice(parts, rng.integers(1, 9))) for _ in range(20))]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode(texts), files
        accepted += 1
    assert accepted > 100


def test_end_of_a_line_is_no_part_of_a_token(tmp_path):
    """As in Hugging Face's reader, whose ids these are."""
    (tmp_path / "vocab.txt").write_text(" \n".join(SMALL) + "\t\u3000\n", encoding="utf-8")
    assert load_vocab(tmp_path / "vocab.txt").tokens == SMALL


@pytest.mark.parametrize("more", ["", "more\nwords", "[unused0]"])
def test_more_lines_than_rows_is_one_line_with_both_numbers(tmp_path, more):
    written(tmp_path, says(do_lower_case=True), [*SMALL, more])
    n = len(SMALL) + len(more.split("\n"))
    for path in (tmp_path, tmp_path / "vocab.txt"):  # also where it is packed with
        assert f"{n} tokens in its vocabulary, {len(SMALL)} in its config.json" in stop_line(load_vocab, path)


def test_names_of_further_rows_change_neither_ids_nor_hash(vocab, tmp_path):
    wide = vocab.padded(vocab.size + 3)
    assert wide.size == vocab.size + 3 == len(set(wide.tokens)) and wide.tokens[:-3] == vocab.tokens
    assert wide.hash == vocab.hash != Vocab([*vocab.tokens, "more"]).hash
    assert vocab.padded(vocab.size) is vocab
    assert wide.encode([*HARD, *wide.tokens[-3:]]) == vocab.encode([*HARD, *wide.tokens[-3:]])
    wide.save(tmp_path)
    assert load_vocab(tmp_path).tokens == wide.tokens and load_vocab(tmp_path).hash == vocab.hash


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-small-discriminator"])
@pytest.mark.parametrize("load", [load_vocab, load_clip_vocab])
def test_name_of_the_hub_is_one_line_that_says_how_to_fetch(tmp_path, monkeypatch, name, load):
    monkeypatch.chdir(tmp_path)
    line = stop_line(load, name)
    assert f"huggingface-cli download {name} --local-dir {name.split('/')[-1]}" in line and len(line) <= 300


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
