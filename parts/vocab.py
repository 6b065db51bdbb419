"""Tokenizers: BERT's WordPiece and CLIP's byte-level BPE."""
import dataclasses
import gzip
import hashlib
import html
import json
import zlib
from array import array
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from common import atomic, hub_advice, print0, read_json, read_text, write_json

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
OPENAI_CLIP = "ba973045f396e62c227cd34bb2b425324c450557f07898a7e9876075a0fb58d7"  # hash of OpenAI's own
BERT_NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS))
# Hugging Face's classes that are BERT's tokenizer, and those that do what tokenizer.json says
BERT_CLASSES = [name + fast for name in ("BertTokenizer", "ElectraTokenizer", "DistilBertTokenizer")
                for fast in ("", "Fast")]
JSON_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# settings that change ids, and the values with which they are BERT's own
BERT_RULES = {"do_lower_case": (True, False), "strip_accents": (None, True, False), "never_split": (None, []),
              "do_basic_tokenize": (True,), "tokenize_chinese_chars": (True,), "clean_text": (True,),
              "split_special_tokens": (False,), "auto_map": (None,)}
BERT_SOURCE = "give a BERT vocab.txt or tokenizer.json, or train one with `python data.py vocab`"
CLIP_SOURCE = "OpenAI's is clip/bpe_simple_vocab_16e6.txt.gz of https://github.com/openai/CLIP"


class Tokens:
    """What both vocabularies have: `tokens` in id order, a `tokenizer`, and its `rules`, a str."""

    @property
    def size(self):
        return len(self.tokens)

    @property
    def dtype(self):
        """The integer type of packed ids."""
        return np.dtype(np.uint16 if self.size <= 2 ** 16 else np.uint32)

    @cached_property
    def hash(self):
        """SHA-256 of the tokens in id order and the rules, without names that `padded` gave."""
        size = self.size
        while size and self.tokens[size - 1] == f"[unused{size - 1}]":
            size -= 1
        return hashlib.sha256("\n".join([*self.tokens[:size], self.rules]).encode()).hexdigest()

    def encode(self, texts: list) -> list:
        """List of str -> list of lists of ids, without a start and an end token."""
        if sum(map(len, texts)) < 8192:  # threads cost more than they save
            return [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]


# ---------------------------------------------------------------------------- WordPiece


@dataclasses.dataclass
class Vocab(Tokens):
    """A BERT WordPiece vocabulary (Devlin et al. 2019); ids as from BERT's own tokenizer on any text.

    tokens: list of str in id order. lower, strip_accents: as in BERT's tokenizer; strip_accents None = as
    lower. As in Hugging Face's, a special token that stands literally in a text ("[SEP]") becomes that id.
    """
    tokens: list
    lower: bool = True
    strip_accents: bool | None = True
    source: str = "vocabulary"  # named in errors

    def __post_init__(self):
        ids = {token: i for i, token in enumerate(self.tokens)}
        if len(ids) < len(self.tokens):  # ids are line numbers, so no line may go; as Google's loader
            double = Counter(self.tokens).most_common(1)[0][0]
            print0(f"{self.source}: the token {double!r} stands there twice; the last one counts")
        missing = [token for token in SPECIALS if token not in ids]
        if missing:
            raise SystemExit(f"{self.source}: has no {' '.join(missing)}; give a BERT vocabulary")
        self.strip_accents = self.lower if self.strip_accents is None else self.strip_accents
        self.rules = f"lower {self.lower} strip_accents {self.strip_accents}"
        self.pad, self.unk, self.cls, self.sep, self.mask = self.specials = [ids[token] for token in SPECIALS]
        self.start, self.end = self.cls, self.sep  # of a segment, where a CLIP-like tower has this vocabulary
        self.tokenizer = wordpiece(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100),
                                   self.lower, self.strip_accents)
        self.tokenizer.add_special_tokens(list(SPECIALS))
        # the ids that a masked token may be replaced by
        self.ordinary = np.setdiff1d(np.arange(len(self.tokens)), self.specials)

    def encode_words(self, words) -> list:
        """Words (text between spaces) -> the ids of each, as bytes of dtype.

        BERT's tokenizer never looks across a space, so the words are joined by [SEP] and encoded many at a
        time: 2.5 times faster than one by one.
        """
        code, width = self.dtype.char, self.dtype.itemsize
        single = [word for word in words if "[" in word]  # may hold a special token
        found = {word: array(code, ids).tobytes() for word, ids in zip(single, self.encode(single))}
        joined = [word for word in words if "[" not in word]
        groups = [joined[i:i + 256] for i in range(0, len(joined), 256)]
        for group, ids in zip(groups, self.encode([" [SEP] ".join(group) for group in groups])):
            ids = np.array([*ids, self.sep], self.dtype)
            ends = np.flatnonzero(ids == self.sep) * width
            starts, ids = [0] + (ends[:-1] + width).tolist(), ids.tobytes()
            for word, a, b in zip(group, starts, ends.tolist()):
                found[word] = ids[a:b]
        return [found[word] for word in words]

    def decode(self, ids) -> str:
        """Ids -> text, special tokens included."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def padded(self, rows):
        """The same with names for a model's further rows. No text has them, so the hash is the same."""
        names = [f"[unused{i}]" for i in range(self.size, rows)]
        return dataclasses.replace(self, tokens=self.tokens + names) if names else self

    def save(self, folder):
        """Writes vocab.txt and tokenizer_config.json, as Hugging Face's AutoTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / "vocab.txt") as part:
            part.write_text("".join(token + "\n" for token in self.tokens), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", BERT_NAMES | {
            "tokenizer_class": "BertTokenizer", "do_lower_case": self.lower,
            "strip_accents": self.strip_accents, "model_max_length": 512})


def wordpiece(model, lower, strip_accents):
    """The `tokenizers` pipeline of BERT around a WordPiece model."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def load_vocab(path) -> Vocab:
    """Vocab from a vocab.txt, a tokenizer.json, or a folder that holds one of them.

    In a model's folder the ids are those of Hugging Face's AutoTokenizer, and SystemExit says which setting
    would make others. Casing: by tokenizer_config.json, as there. Without a class of tokenizer by
    tokenizer.json, or lower case unless some token of vocab.txt has an upper-case letter.
    """
    path = file_in(path, ("tokenizer.json", "vocab.txt"), "neither vocab.txt nor tokenizer.json", BERT_SOURCE)
    settings, kind, rows = settings_beside(path)
    if path.suffix == ".json":
        content = read_json(path, BERT_SOURCE)
        named = SPECIALS if kind in BERT_CLASSES else [BERT_NAMES[x] for x in settings if x in BERT_NAMES]
        try:
            tokens, *casing = read_wordpiece(path, content, named)
        except (TypeError, AttributeError, KeyError):  # lists for objects, numbers for texts
            raise SystemExit(f"{path}: not in the form of a tokenizer.json; {BERT_SOURCE}") from None
    else:
        # Hugging Face's reader, too, drops white space at the end of a line, in Rust's sense
        tokens = [line.rstrip(SPACE) for line in read_text(path, BERT_SOURCE).removesuffix("\n").split("\n")]
        casing = [all(token == token.lower() for token in tokens if not token.startswith("[")), None]
        if kind in JSON_CLASSES:
            raise SystemExit(f"{path}: its {kind} needs a tokenizer.json; fetch that, too")
    if kind in BERT_CLASSES and not casing[0] and "do_lower_case" not in settings:
        raise SystemExit(f"{path}: is cased, but no tokenizer_config.json says so, and then transformers "
                         'lowers the case; write {"do_lower_case": false}, or true, into one beside it')
    if kind in BERT_CLASSES or path.suffix != ".json":
        casing = settings.get("do_lower_case", casing[0]), settings.get("strip_accents")
    if rows is not None and rows < len(tokens):
        raise SystemExit(f"{path.parent}: {len(tokens):,} tokens in its vocabulary, {rows:,} in its "
                         f"config.json: the last have no vectors; give the {path.name} of its training")
    return Vocab(tokens, *casing, str(path))


SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200b)))


def settings_beside(path):
    """(settings, class of tokenizer or "", rows of the model's table or None) from the json files beside a
    vocabulary; SystemExit where AutoTokenizer would take other ids from them than BERT's."""
    def beside(name):
        other = path.with_name(name)
        return read_json(other) if other.is_file() and other != path else {}
    model, settings = beside("config.json"), beside("tokenizer_config.json")
    kind = settings.get("tokenizer_class") or model.get("tokenizer_class") or (
        "BertTokenizer" if model.get("model_type") in ("bert", "electra") else "")
    wrong = [("tokenizer_config.json or config.json", "tokenizer_class", kind)] * (
        kind not in ("", *BERT_CLASSES, *JSON_CLASSES))
    wrong += [("added_tokens.json", token, number) for token, number in beside("added_tokens.json").items()]
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings |= (found := beside(file))
        wrong += [(file, name, value) for name, value in found.items() if not is_berts(name, value)]
    for file, name, value in wrong:
        raise SystemExit(f"{path.parent}/{file}: {name[:40]} is {repr(value)[:80]}, which makes other ids "
                         "than those of a plain BERT tokenizer; choose another model")
    rows = model.get("vocab_size")
    return settings, kind, rows if type(rows) is int else None


def is_berts(name, value):
    """Whether a setting of a tokenizer leaves the ids of a text those of BERT's."""
    if name in BERT_RULES:
        return any(value is allowed or value == allowed == [] for allowed in BERT_RULES[name])
    if name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        return all(map(is_special, value.values() if isinstance(value, dict) else value or []))
    if name in BERT_NAMES or name.endswith("_token") and isinstance(value, (str, dict)):
        return is_special(value, BERT_NAMES.get(name))
    return True


def is_special(token, name=None):
    """Whether a token of a settings file, a str or a dict, is one of SPECIALS (the one of that name), found
    in texts as it stands: not as a word of its own alone, and not behind the change to lower case."""
    token = token if isinstance(token, dict) else {"content": token, "special": True}
    return token.get("content") in ([name] if name else SPECIALS) and not token.get("single_word") and not (
        token.get("normalized", not token.get("special")))


def file_in(path, names, missing, source):
    """The path; of a folder the first of `names` that it holds. missing: said where it holds none of them;
    source: where to get one."""
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"{path}: cannot be read (no such file or folder); {hub_advice(path, source)}")
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).exists():
            return path / name
    raise SystemExit(f"{path}: holds {missing}; {source}")


def check_parts(path, whose, parts, advice):
    """SystemExit names the first of {what a tokenizer.json must have: whether it does} that is missing."""
    for what, there in parts.items():
        if not there:
            raise SystemExit(f"{path}: not {whose} tokenizer, which has {what}; {advice}")


def read_wordpiece(path, content, named):
    """(tokens, lower, strip_accents) of a tokenizer.json; SystemExit where it is not BERT's WordPiece.

    named: special tokens that are found in texts also where `added_tokens` leaves them out.
    """
    parts = [content.get(k) for k in ("model", "normalizer", "pre_tokenizer")]
    model, norm, pre = (part if isinstance(part, dict) else {} for part in parts)
    ids = model.get("vocab")
    check_parts(path, "BERT's", {
        "a WordPiece model": model.get("type", "WordPiece") == "WordPiece" and isinstance(ids, dict),
        "continuing pieces that start with ##": model.get("continuing_subword_prefix") == "##",
        "words of at most 100 characters": model.get("max_input_chars_per_word") == 100,
        "[UNK] for unknown words": model.get("unk_token") == "[UNK]",
        "BERT's normalizer": norm.get("type") == "BertNormalizer",
        "true or false for lower case, and perhaps for accents": isinstance(norm.get("lowercase"), bool)
        and isinstance(norm.get("strip_accents"), (bool, type(None))),
        "BERT's cleaning of text": norm.get("clean_text") and norm.get("handle_chinese_chars"),
        "BERT's pre-tokenizer": pre.get("type") == "BertPreTokenizer"}, BERT_SOURCE)
    tokens = sorted(ids, key=ids.get)
    added = content.get("added_tokens", [])
    others = [t["content"] for t in added if ids.get(t["content"]) != t["id"] or not is_special(t)]
    if others or [ids[t] for t in tokens] != list(range(len(tokens))):
        raise SystemExit(f"{path}: its ids are not 0 to {len(tokens) - 1}, or tokens were added to it "
                         f"({' '.join(others[:3])[:80]}); give the vocab.txt instead")
    check_parts(path, "BERT's", {"special tokens in added_tokens": {
        *(t["content"] for t in added), *named} >= set(SPECIALS)}, BERT_SOURCE)
    return tokens, norm["lowercase"], norm.get("strip_accents")


# ---------------------------------------------------------------------------- CLIP's BPE

# OpenAI's pattern, for text in lower case. Theirs ignores case, which has two effects left: a long s is an s,
# and U+0345, a mark whose capital is a letter, is found by none of its parts
CLIP_PATTERN = (r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſtmd]|'(?:re|ve|ll)|\p{L}+|\p{N}|"
                r"[^\s\p{L}\p{N}\x{345}]+")
CLIP_FILES = ("tokenizer.json", "bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt",
              "vocab.txt")


@dataclasses.dataclass
class CLIPVocab(Tokens):
    """OpenAI's byte-level BPE of CLIP (Radford et al. 2021); ids as from its own simple_tokenizer on any text
    that ftfy leaves unchanged.

    merges: list of "a b", in order of rank. Tokens in id order: a letter for each of the 256 bytes, the same
    at the end of a word (</w>), what the merges make, start and end of text. A literal "<|endoftext|>" is
    that special token where OpenAI's pattern finds it, so not behind punctuation.
    """
    merges: list
    source: str = "CLIP's vocabulary"  # named in errors
    rules = "byte-level BPE"

    def __post_init__(self):
        letters = list(byte_letters().values())
        ids, pairs = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters)])}, []
        for merge in self.merges:
            pair = tuple(merge.split())
            if len(pair) != 2 or not (pair[0] in ids and pair[1] in ids) or "".join(pair) in ids:
                raise SystemExit(f"{self.source}: merge {len(pairs) + 1}, {merge!r}, does not make a new "
                                 f"token of two that stand before it; {CLIP_SOURCE}")
            ids["".join(pair)] = len(ids)
            pairs.append(pair)
        self.start, self.end = self.specials = [len(ids), len(ids) + 1]
        self.cls, self.sep, self.pad, self.unk = self.start, self.end, 0, -1  # 0 is "!": padding needs a mask
        self.tokens = [*ids, *CLIP_SPECIALS]
        ids |= zip(CLIP_SPECIALS, self.specials)
        self.tokenizer = Tokenizer(models.BPE(ids, pairs, end_of_word_suffix="</w>"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(CLIP_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def encode(self, texts: list) -> list:
        """List of str -> list of lists of ids, without start and end.

        Texts are cleaned as by OpenAI, in Python, whose lower() knows the final sigma.
        """
        texts = [" ".join(html.unescape(html.unescape(text)).split()).lower() for text in texts]
        return [self.encode_literal(text) if "text|>" in text else ids
                for text, ids in zip(texts, super().encode(texts))]

    def encode_literal(self, text):
        """Ids of one clean text that may hold a literal start or end token."""
        special, model = dict(zip(CLIP_SPECIALS, self.specials)), self.tokenizer.model
        pieces = [piece for piece, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [i for piece in pieces for i in (
            [special[piece]] if piece in special else [token.id for token in model.tokenize(piece)])]

    def encode_words(self, words) -> list:
        """Words (text between ASCII white space) -> the ids of each, as bytes of dtype."""
        return [array(self.dtype.char, ids).tobytes() for ids in self.encode(words)]

    def decode(self, ids) -> str:
        """Ids -> text, special tokens included."""
        text = "".join(self.tokens[int(i)] + "</w>" * (int(i) in self.specials) for i in ids)
        byte = {letter: b for b, letter in byte_letters().items()}
        text = bytes(byte[letter] for letter in text).decode("utf-8", errors="replace")
        return text.replace("</w>", " ").strip()

    def save(self, folder):
        """Writes tokenizer.json and tokenizer_config.json, as Hugging Face's AutoTokenizer reads them.

        Its cleaning is theirs (NFC, white space, lower case letter by letter): equal ids on plain text.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        start, end = CLIP_SPECIALS
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        tokenizer.post_processor = processors.RobertaProcessing((end, self.end), (start, self.start),
                                                                trim_offsets=False, add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([start, end])
        with atomic(folder / "tokenizer.json") as part:
            tokenizer.save(str(part))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end, "unk_token": end,
            "pad_token": end, "do_lower_case": True, "model_max_length": 77})


def byte_letters():
    """{byte: the letter that stands for it}, in CLIP's order: printable ones, then the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def load_clip_vocab(path):
    """CLIPVocab from a file or its folder; Vocab where a CLIP-like tower was trained on word pieces.

    path: OpenAI's merges, gzipped or not; Hugging Face's tokenizer.json or merges.txt; a vocab.txt; a folder
    that holds one of them.
    """
    path = file_in(path, CLIP_FILES, f"no vocabulary of CLIP ({', '.join(CLIP_FILES)})", CLIP_SOURCE)
    if path.suffix == ".json":
        content = read_json(path, CLIP_SOURCE)
        model = content.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            return load_vocab(path)
        try:
            return clip_vocab_from_json(path, content)
        except (TypeError, AttributeError, KeyError):  # lists for objects, numbers for texts
            raise SystemExit(f"{path}: not in the form of a tokenizer.json; {CLIP_SOURCE}") from None
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as f:
                text = f.read(1 << 26).decode()  # CLIP's has 1 MB; a gzipped file may hold anything
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise SystemExit(f"{path}: not a vocabulary ({error}); {CLIP_SOURCE}") from None
    else:
        text = read_text(path, CLIP_SOURCE)
    if "</w>" not in text:
        return load_vocab(path)
    # as OpenAI reads it: a header, and only the first merges of the file are CLIP's
    lines = text.split("\n")[1:49152 - 256 - 2 + 1]
    return CLIPVocab([line for line in lines if line.strip()], str(path))


def clip_vocab_from_json(path, content):
    """CLIPVocab from the content of a tokenizer.json; SystemExit where it is not CLIP's."""
    model, cleaning = content["model"], json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    check_parts(path, "CLIP's", {
        "a vocabulary": isinstance(model.get("vocab"), dict),
        "</w> at the end of words": model.get("end_of_word_suffix") == "</w>",
        "text in lower case": '"Lowercase"' in cleaning,
        "bytes for letters": '"ByteLevel"' in cleaning}, CLIP_SOURCE)
    vocab = CLIPVocab([m if isinstance(m, str) else " ".join(m) for m in model["merges"]], str(path))
    ids = model["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if ids != {token: i for i, token in enumerate(vocab.tokens)}:
        raise SystemExit(f"{path}: its {len(ids)} tokens are not the {vocab.size} that its merges make, in "
                         f"their order; {CLIP_SOURCE}")
    return vocab
