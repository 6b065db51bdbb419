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

from common import write_json

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
OPENAI_CLIP = "ba973045f396e62c227cd34bb2b425324c450557f07898a7e9876075a0fb58d7"  # hash of OpenAI's own

# ---------------------------------------------------------------------------- WordPiece


@dataclasses.dataclass
class Vocab:
    """A BERT WordPiece vocabulary (Devlin et al. 2019); ids as from BERT's own tokenizer on any text.

    tokens: list of str in id order. lower, strip_accents: as in BERT's tokenizer. As in Hugging Face's, a
    special token that stands literally in a text ("[SEP]") becomes that special id.
    """
    tokens: list
    lower: bool = True
    strip_accents: bool = True
    source: str = "vocabulary"  # named in errors

    def __post_init__(self):
        ids = {token: i for i, token in enumerate(self.tokens)}
        if len(ids) < len(self.tokens):
            double = Counter(self.tokens).most_common(1)[0][0]
            raise SystemExit(f"{self.source}: the token {double!r} stands there twice; remove one")
        missing = [token for token in SPECIALS if token not in ids]
        if missing:
            raise SystemExit(f"{self.source}: has no {' '.join(missing)}; give a BERT vocabulary")
        self.pad, self.unk, self.cls, self.sep, self.mask = self.specials = [ids[token] for token in SPECIALS]
        self.start, self.end = self.cls, self.sep  # of a segment, where a CLIP-like tower has this vocabulary
        self.tokenizer = wordpiece(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100),
                                   self.lower, self.strip_accents)
        self.tokenizer.add_special_tokens(list(SPECIALS))
        # the ids that a masked token may be replaced by
        self.ordinary = np.setdiff1d(np.arange(len(self.tokens)), self.specials)

    @property
    def size(self):
        return len(self.tokens)

    @cached_property
    def hash(self):
        """SHA-256 of the tokens in id order plus the casing and accent flags."""
        text = "\n".join(self.tokens) + f"\nlower {self.lower} strip_accents {self.strip_accents}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def dtype(self):
        """The integer type of packed ids."""
        return np.dtype(np.uint16 if self.size <= 2 ** 16 else np.uint32)

    def encode(self, texts: list) -> list:
        """List of str -> list of lists of ids, without [CLS] and [SEP]."""
        if len(texts) < 64:  # threads cost more than they save
            return [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_words(self, words) -> list:
        """Words (text between spaces) -> the ids of each, as bytes of dtype.

        BERT's tokenizer never looks across a space, so they are joined by [SEP] and encoded many at a time:
        2.5 times faster than one by one.
        """
        code, width = self.dtype.char, self.dtype.itemsize
        single = [word for word in words if "[" in word]  # may hold a special token
        found = {word: array(code, ids).tobytes() for word, ids in zip(single, self.encode(single))}
        joined = [word for word in words if "[" not in word]
        groups = [joined[i:i + 256] for i in range(0, len(joined), 256)]
        for group, ids in zip(groups, self.encode([" [SEP] ".join(group) for group in groups])):
            ids = np.array(ids + [self.sep], self.dtype)
            ends = np.flatnonzero(ids == self.sep) * width
            starts, ids = [0] + (ends[:-1] + width).tolist(), ids.tobytes()
            for word, a, b in zip(group, starts, ends.tolist()):
                found[word] = ids[a:b]
        return [found[word] for word in words]

    def decode(self, ids) -> str:
        """Ids -> text, special tokens included."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder):
        """Writes vocab.txt and tokenizer_config.json, as Hugging Face's AutoTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("".join(token + "\n" for token in self.tokens), encoding="utf-8")
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS))
        write_json(folder / "tokenizer_config.json", names | {
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

    Casing: tokenizer.json's normalizer, else the tokenizer_config.json beside vocab.txt, else lower case
    unless some token has an upper-case letter. A tokenizer that is not BERT's ends the program with one line.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
        if not found:
            raise SystemExit(f"{path}: holds neither vocab.txt nor tokenizer.json")
        path = found[0]
    if not path.exists():
        raise SystemExit(f"{path}: no such vocabulary; `python data.py vocab TEXT... --out {path}` makes one")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return vocab_from_json(path, json.loads(text))
        beside = path.with_name("tokenizer_config.json")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    except ValueError as error:
        raise SystemExit(f"{path}: not a vocabulary ({error})") from None
    tokens = text.removesuffix("\n").split("\n")
    cased = any(t != t.lower() for t in tokens if not t.startswith("["))
    lower = config.get("do_lower_case", not cased)
    strip = config.get("strip_accents")
    return Vocab(tokens, lower, lower if strip is None else strip, str(path))


def vocab_from_json(path, content):
    """Vocab from the content of a tokenizer.json; refuses what is not BERT's WordPiece."""
    content = content if isinstance(content, dict) else {}
    parts = [content.get(k) for k in ("model", "normalizer", "pre_tokenizer")]
    model, norm, pre = (part if isinstance(part, dict) else {} for part in parts)
    ids = model.get("vocab")
    is_wordpiece = model.get("type", "WordPiece") == "WordPiece" and isinstance(ids, dict)
    for ok, what in ((is_wordpiece, "a WordPiece model"),
                     (model.get("continuing_subword_prefix") == "##", "continuing pieces that start with ##"),
                     (model.get("max_input_chars_per_word") == 100, "words of at most 100 characters"),
                     (norm.get("type") == "BertNormalizer", "BERT's normalizer"),
                     (norm.get("clean_text") and norm.get("handle_chinese_chars"), "BERT's cleaning of text"),
                     (pre.get("type") == "BertPreTokenizer", "BERT's pre-tokenizer")):
        if not ok:
            raise SystemExit(f"{path}: not BERT's tokenizer, which has {what}; give a BERT vocab.txt or "
                             "tokenizer.json")
    tokens = sorted(ids, key=ids.get)
    added = [t["content"] for t in content.get("added_tokens", []) if ids.get(t["content"]) != t["id"]]
    if added or [ids[t] for t in tokens] != list(range(len(tokens))):
        raise SystemExit(f"{path}: its ids are not 0 to {len(tokens) - 1}, or tokens were added to it "
                         f"({' '.join(added[:3])}); give the vocab.txt instead")
    lower, strip = bool(norm.get("lowercase")), norm.get("strip_accents")
    return Vocab(tokens, lower, lower if strip is None else strip, str(path))


# ---------------------------------------------------------------------------- CLIP's BPE


@dataclasses.dataclass
class CLIPVocab:
    """OpenAI's byte-level BPE of CLIP (Radford et al. 2021); ids as from its own simple_tokenizer on any text
    that ftfy leaves unchanged.

    merges: list of "a b", in order of rank. Tokens in id order: a letter for each of the 256 bytes, the same
    at the end of a word (</w>), what the merges make, start and end of text. A literal "<|endoftext|>" is
    that special token where OpenAI's pattern finds it, so not behind punctuation.
    """
    merges: list
    source: str = "CLIP's vocabulary"  # named in errors

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
        self.tokens = [*ids, *CLIP_SPECIALS]
        self.start, self.end = self.specials = [len(ids), len(ids) + 1]
        self.cls, self.sep, self.pad, self.unk = self.start, self.end, 0, -1  # 0 is "!": padding needs a mask
        ids = {token: i for i, token in enumerate(self.tokens)}
        self.tokenizer = Tokenizer(models.BPE(ids, pairs, end_of_word_suffix="</w>"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(CLIP_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    @property
    def size(self):
        return len(self.tokens)

    @cached_property
    def hash(self):
        """SHA-256 of the tokens in id order plus a name that no WordPiece vocabulary has."""
        return hashlib.sha256("\n".join([*self.tokens, "byte-level BPE"]).encode()).hexdigest()

    @property
    def dtype(self):
        """The integer type of packed ids."""
        return np.dtype(np.uint16 if self.size <= 2 ** 16 else np.uint32)

    def encode(self, texts: list) -> list:
        """List of str -> list of lists of ids, without start and end.

        A text is cleaned as by OpenAI, in Python, whose lower() knows the final sigma.
        """
        texts = [" ".join(html.unescape(html.unescape(text)).split()).lower() for text in texts]
        if len(texts) < 64:  # threads cost more than they save
            out = [self.tokenizer.encode(text).ids for text in texts]
        else:
            out = [e.ids for e in self.tokenizer.encode_batch(texts)]
        for i, text in enumerate(texts):
            if "text|>" in text:
                out[i] = self.encode_literal(text)
        return out

    def encode_literal(self, text):
        """Ids of one clean text in which start or end may stand literally."""
        special, ids = dict(zip(CLIP_SPECIALS, self.specials)), []
        for piece, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text):
            whole = piece in special
            ids += [special[piece]] if whole else [token.id for token in self.tokenizer.model.tokenize(piece)]
        return ids

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

        Its clean-up is theirs (NFC, white space, lower case letter by letter): equal ids on plain text.
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
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end, "unk_token": end,
            "pad_token": end, "do_lower_case": True, "model_max_length": 77})


# OpenAI's pattern, for text in lower case. That theirs ignores case has two effects left: a long s is an s,
# and U+0345, a mark whose capital is a letter, is found by none of its parts
CLIP_PATTERN = (r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſtmd]|'(?:re|ve|ll)|\p{L}+|\p{N}|"
                r"[^\s\p{L}\p{N}\x{345}]+")
CLIP_FILES = ("tokenizer.json", "bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt",
              "vocab.txt")
CLIP_SOURCE = "OpenAI's is clip/bpe_simple_vocab_16e6.txt.gz of https://github.com/openai/CLIP"


def byte_letters():
    """{byte: the letter that stands for it}, in CLIP's order: printable ones, then the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def load_clip_vocab(path):
    """CLIPVocab, or Vocab where a CLIP-like tower was trained on word pieces, from a file or its folder.

    path: OpenAI's merges, gzipped or not; Hugging Face's tokenizer.json or merges.txt; a vocab.txt; a folder
    that holds one of them.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in CLIP_FILES if (path / name).exists()]
        if not found:
            raise SystemExit(f"{path}: holds no vocabulary of CLIP ({', '.join(CLIP_FILES)}); {CLIP_SOURCE}")
        path = found[0]
    if not path.exists():
        raise SystemExit(f"{path}: no such vocabulary; {CLIP_SOURCE}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            text = f.read(1 << 26).decode("utf-8")  # CLIP's has 1 MB; a gzipped file may hold anything
        content = json.loads(text) if path.suffix == ".json" else None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}: not a vocabulary ({error}); {CLIP_SOURCE}") from None
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        try:
            return clip_vocab_from_json(path, content)
        except (TypeError, AttributeError, KeyError):  # lists for objects, numbers for texts
            raise SystemExit(f"{path}: not in the form of a tokenizer.json; {CLIP_SOURCE}") from None
    if content is None and "</w>" in text:
        # as OpenAI reads it: a header, and only the first merges of the file are CLIP's
        lines = text.split("\n")[1:49152 - 256 - 2 + 1]
        return CLIPVocab([line for line in lines if line.strip()], str(path))
    return load_vocab(path)


def clip_vocab_from_json(path, content):
    """CLIPVocab from the content of a tokenizer.json; refuses what is not CLIP's."""
    model, cleaning = content["model"], json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    for ok, what in ((isinstance(model.get("vocab"), dict), "a vocabulary"),
                     (model.get("end_of_word_suffix") == "</w>", "</w> at the end of words"),
                     ('"Lowercase"' in cleaning, "text in lower case"),
                     ('"ByteLevel"' in cleaning, "bytes for letters")):
        if not ok:
            raise SystemExit(f"{path}: not CLIP's tokenizer, which has {what}; {CLIP_SOURCE}")
    vocab = CLIPVocab([m if isinstance(m, str) else " ".join(m) for m in model["merges"]], str(path))
    ids = model["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if ids != {token: i for i, token in enumerate(vocab.tokens)}:
        raise SystemExit(f"{path}: its {len(ids)} tokens are not the {vocab.size} that its merges make, in "
                         f"their order; {CLIP_SOURCE}")
    return vocab
