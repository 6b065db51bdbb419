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
import argparse
import codecs
import csv
import dataclasses
import glob
import gzip
import hashlib
import html
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from array import array
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common import duration, hash64, keyed_integers, keyed_uniform, print0, progress, write_json

FORMAT = 1  # of the packed files; another number is refused, never guessed at
WORLD = 2  # of the demo world, to be raised with any change of what it holds
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
OPENAI_CLIP = "ba973045f396e62c227cd34bb2b425324c450557f07898a7e9876075a0fb58d7"  # hash of OpenAI's own

# ---------------------------------------------------------------------------- vocabulary


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
    """Vocab from a vocab.txt, a tokenizer.json, a folder that holds one of them, or a packed .h5 file.

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
    if path.suffix == ".h5":
        return open_packed(path)[1]
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


def train_vocab(sources, out, size=30522, lower=True) -> Vocab:
    """Trains a WordPiece vocabulary of `size` tokens on text or caption.json files -> Vocab and file `out`.

    Deterministic: the trainer numbers continuing letters in the order of a hash map, so a first pass collects
    them and the second is given them in sorted order. (At most 1,000 different characters are kept, the most
    frequent.)
    """
    check_sources(sources)
    refuse_existing(out)

    total = sum(Path(path).stat().st_size for path in sources)

    def lines(bar):
        for path in sources:
            for text, size in read_text(path):
                bar.update(size)
                yield from text.split("\n")  # lines, so that all cores have work

    def train(what, first, size):
        tokenizer = wordpiece(models.WordPiece(unk_token="[UNK]"), lower, lower)
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, limit_alphabet=1000,
                                            show_progress=False)
        with progress(None, total, "B", f"vocab: {what}", unit_scale=True) as bar:
            tokenizer.train_from_iterator(lines(bar), trainer)
        return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)

    letters = train("letters", list(SPECIALS), 0)
    if size <= len(letters):
        raise SystemExit(f"--size {size}: the characters alone take {len(letters)} tokens; give more")
    tokens = train("words", list(SPECIALS) + sorted(t for t in letters if t.startswith("##")), size)
    with staged(out) as (_, part):
        part.write_text("".join(token + "\n" for token in tokens), encoding="utf-8")
    print0(f"vocab: {len(tokens):,} word pieces from {total / 1e6:.1f} MB of text -> {Path(out).name}"
           + ("" if len(tokens) == size else f"; the text has no more than these of the {size:,} asked for"))
    return Vocab(tokens, lower, lower, str(out))


# ---------------------------------------------------------------------------- reading sources


def check_sources(paths):
    """Ends the program, naming them all, where some of the files are not there."""
    missing = [str(p) for p in paths if not Path(p).is_file()]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: no such file")


def read_text(path):
    """Yields (text, bytes read) of a text file, or of a caption.json (a document a video); memory stays flat.

    A piece has about 1 MB and ends at the end of a line or, where a line is longer, behind a space. (A run of
    4 million characters without either is cut.) Text that is not UTF-8 ends the program with the byte's
    position.
    """
    if Path(path).suffix == ".json":
        for video, row, size in read_captions(path):
            _, _, texts, problem = caption_rows(row)
            if problem:
                raise SystemExit(f"{path}: {video}: {problem}")
            yield "".join(text.replace("\n", " ") + "\n" for text in texts) + "\n", size
        return
    decoder, rest = codecs.getincrementaldecoder("utf-8-sig")(), ""
    with open(path, "rb") as f:
        while True:
            chunk = f.read(1 << 20)
            try:
                text = rest + decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = f.tell() - len(chunk) + error.start
                raise SystemExit(f"{path}: not UTF-8 near byte {at}; convert it first, for instance with "
                                 "`iconv -f latin1 -t utf-8`") from None
            cut = text.rfind("\n") + 1 or text.rfind(" ") + 1 or (len(text) if len(text) > 1 << 22 else 0)
            if not chunk:
                yield text + "\n", 0
                return
            yield text[:cut], len(chunk)
            rest = text[cut:]


def read_captions(path):
    """Yields (video id, value, bytes read) of a JSON file {video id: value} one by one; memory stays flat.

    HowTo100M's caption.json has values {"start": [s], "end": [s], "text": [...]}; the caller checks them. A
    file that is malformed or cut off ends the program with the byte near which it is.
    """
    head = re.compile(r'\s*([{,])\s*("(?:[^"\\]|\\.)*")\s*:\s*')  # { "id":   or   , "id":
    limit = 1 << 24  # characters; no video has so many, so what does not parse by then never will
    decoder, decode = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
    text, opening, size = "", "{", 0
    with open(path, "rb") as f:
        try:
            while (chunk := f.read(1 << 20)) and len(text) < limit:
                text, size, at = text + decoder.decode(chunk), size + len(chunk), 0
                while (match := head.match(text, at)) and match[1] == opening:
                    try:
                        value, end = decode(text, match.end())
                    except json.JSONDecodeError:  # not whole in the buffer yet
                        break
                    yield json.loads(match[2]), value, size
                    opening, size, at = ",", 0, end
                text = text[at:]
        except UnicodeDecodeError:
            text = "not UTF-8"
        if "".join(text.split()) != ("}" if opening == "," else "{}"):
            at = max(0, f.tell() - len(chunk) - len(text))
            raise SystemExit(f"{path}: not a JSON object {{video id: captions}}, or malformed or cut off "
                             f"behind byte {at}; fetch or write it anew")


# ---------------------------------------------------------------------------- packed files


def refuse_existing(out):
    """Ends the program before the work where the output is there already or its folder is not."""
    if Path(out).exists():
        raise SystemExit(f"{out} exists; remove it or give another --out")
    if not Path(out).parent.is_dir():
        raise SystemExit(f"{out}: there is no folder {Path(out).parent}; make it first")


@contextmanager
def staged(out):
    """Yields (scratch folder beside `out`, file in it that becomes `out` when the block ends well).

    Whatever interrupts the block, nothing is ever left under the final name.
    """
    out = Path(out)
    scratch = Path(tempfile.mkdtemp(prefix=out.name + ".", suffix=".tmp", dir=out.parent))
    try:
        yield scratch, scratch / out.name
        os.replace(scratch / out.name, out)
    except OSError as error:
        raise SystemExit(f"{out}: was not written ({error}); nothing was left there") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_space(out, need):
    """Ends the program where the disk of `out` has less than `need` bytes free."""
    free = shutil.disk_usage(Path(out).parent).free
    if free < need:
        raise SystemExit(f"{out}: needs about {need / 1e9:.1f} GB of disk (a raw copy included), "
                         f"{free / 1e9:.1f} GB are free; free some or give another --out")


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
    with open(part, "rb") as f:
        os.fsync(f.fileno())


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


# ---------------------------------------------------------------------------- packing text


def pack_text(sources, vocab, out) -> dict:
    """Text files -> one stream of ids in `out`, [SEP] between documents (blank lines); memory stays constant.

    sources: paths of UTF-8 files, or caption.json files (a document a video). vocab: Vocab, or a path for
    load_vocab. Returns {"tokens", "documents", "bytes", "seconds", "mb_per_s"}; MB/s = 1e6 input bytes a
    second until the last id. Ids equal Vocab.encode of every line: see cached_words.
    """
    check_sources(sources)
    refuse_existing(out)
    vocab = vocab if isinstance(vocab, Vocab) else load_vocab(vocab)
    cache = {"\n": np.array([vocab.sep], vocab.dtype).tobytes()}

    def encode(words):
        return [b"".join(cached_words(words, vocab.encode_words, cache))]

    return pack_words("text", sources, vocab, out, {"tokens": vocab.dtype}, separate, encode, {})


def separate(text):
    """Puts spaces around frequent punctuation and for tabs and returns: BERT splits there anyway.

    Not around brackets, so that a literal "[SEP]" stays one word.
    """
    for c in ",.()\":;'-":
        text = text.replace(c, f" {c} ")
    return spaced(text)


def spaced(text):
    """Spaces for tabs and returns, white space to every tokenizer here; line ends stay."""
    return text.replace("\t", " ").replace("\r", " ")


def pack_xtext(sources, vocab, clip_vocab, out) -> dict:
    """Text files -> the same text in two streams of ids in `out`, for XDBERT; memory stays constant.

    tokens: as pack_text's. clip_tokens: by clip_vocab (CLIPVocab, Vocab, or a path for load_clip_vocab) from
    the ORIGINAL words, text between ASCII white space, of which both tokenizers see one at a time; so ids
    equal encoding whole lines. clip_counts, uint16, one for each of tokens: how many of clip_tokens start
    with it. A word's CLIP tokens stand at its first word piece, those of a word without any at the next one
    there is ([SEP] at the latest), and what exceeds 65,535 at the one behind it. Returns pack_text's counts
    and those of clip_tokens and of clip_cut, for which no word piece was left.
    """
    check_sources(sources)
    refuse_existing(out)
    vocab = vocab if isinstance(vocab, Vocab) else load_vocab(vocab)
    clip = clip_vocab if isinstance(clip_vocab, (Vocab, CLIPVocab)) else load_clip_vocab(clip_vocab)
    cache, most = {"\n": (np.array([vocab.sep], vocab.dtype).tobytes(), b"")}, 2 ** 16 - 1
    left = 0  # CLIP tokens behind the last word piece so far

    def both(words):
        return zip(vocab.encode_words(words), clip.encode_words(words))

    def encode(words):
        nonlocal left
        found = cached_words(words, both, cache)
        ids, clip_ids = ([pair[side] for pair in found] for side in (0, 1))
        pieces, size = (np.fromiter(map(len, part), np.int64, len(words)) // v.dtype.itemsize
                        for part, v in ((ids, vocab), (clip_ids, clip)))
        first = np.cumsum(pieces) - pieces  # word piece of each word, or the next one there is
        counts = np.bincount(first, size, pieces.sum() + 1).astype(np.int64)
        counts[0] += left
        while len(over := np.flatnonzero(counts[:-1] > most)):
            excess, counts[over] = counts[over] - most, most
            counts[over + 1] += excess
        left = int(counts[-1])
        return b"".join(ids), b"".join(clip_ids), counts[:-1].astype(np.uint16).tobytes()

    is_clip = isinstance(clip, CLIPVocab)
    lines = "\n".join(clip.merges if is_clip else clip.tokens)
    attributes = {"clip_hash": clip.hash} | (
        {} if is_clip else {"clip_lower": clip.lower, "clip_strip_accents": clip.strip_accents})
    dtypes = {"tokens": vocab.dtype, "clip_tokens": clip.dtype, "clip_counts": np.dtype(np.uint16)}
    counts = pack_words("xtext", sources, vocab, out, dtypes, spaced, encode,
                        {"clip_vocab": np.frombuffer(lines.encode(), np.uint8)}, **attributes)
    if left:
        print0(f"xtext: the last {left:,} CLIP tokens are cut: there is no word piece behind them")
    return counts | {"clip_cut": left}


def pack_words(kind, sources, vocab, out, dtypes, split, encode, arrays, **attributes) -> dict:
    """The loop of pack_text and pack_xtext over files, lines and documents.

    split(text) puts spaces between words. encode(words) -> bytes of each stream in `dtypes` {name: dtype}; a
    line end among the words ends a document. arrays, attributes: what else write_packed shall write.
    """
    sources = [Path(p) for p in sources]
    total = sum(p.stat().st_size for p in sources)
    # English has 4 to 5 bytes a token
    check_space(out, 2 * sum(dtype.itemsize for dtype in dtypes.values()) * total // 3)
    documents, start = 0, time.perf_counter()
    with staged(out) as (scratch, part), ExitStack() as stack:
        raw = [stack.enter_context(open(scratch / name, "wb")) for name in dtypes]

        def write(words):
            for f, ids in zip(raw, encode(words)):
                f.write(ids)

        bar = progress(None, total, "B", f"{kind} -> {Path(out).name}", unit_scale=True)
        for path in sources:
            line_start, inside = True, False  # of a line, of a document
            for text, size in read_text(path):
                words, lines = [], split(text).split("\n")
                for i, line in enumerate(lines):
                    if line and not line.isspace():
                        words += line.split(" ")
                        inside = True
                    elif inside and (i > 0 or line_start) and i < len(lines) - 1:
                        words.append("\n")
                        inside, documents = False, documents + 1
                line_start = not lines[-1]
                if words:
                    write(words)
                bar.update(size)
            if inside:
                write(["\n"])
                documents += 1
        bar.close()
        seconds = time.perf_counter() - start
        sizes = {name: f.tell() // dtypes[name].itemsize for name, f in zip(dtypes, raw)}
        if not sizes["tokens"]:
            raise SystemExit(f"{', '.join(map(str, sources))}: no text in it")
        stack.close()
        check_space(out, sum(f.stat().st_size for f in scratch.iterdir()))
        counts = {name: n for name, n in sizes.items() if name.endswith("tokens")}
        counts |= {"documents": documents, "bytes": total}
        write_packed(part, kind, vocab, {
            name: (scratch / name, dtypes[name], (n,)) for name, n in sizes.items()} | arrays | {
            "sources": np.frombuffer(json.dumps([p.name for p in sources]).encode(), np.uint8)},
            **attributes, **counts)
    rate = total / seconds / 1e6
    print0(f"{kind}: {counts['tokens']:,} tokens "
           + f"and {counts.get('clip_tokens', 0):,} of CLIP " * ("clip_tokens" in counts)
           + f"in {documents:,} documents from {total / 1e6:.1f} MB in {duration(seconds)} "
           f"({rate:.1f} MB/s) -> {Path(out).name}")
    return counts | {"seconds": seconds, "mb_per_s": rate}


def cached_words(words, encode, cache, longest=32, most=1 << 18):
    """Words (text between spaces) -> list of what encode(new words) makes of each; most are in the cache.

    Tokenizers never look across a space, so what they make of a word can be kept. The cache is bounded:
    `most` words of up to `longest` characters.
    """
    new = list(set(words).difference(cache))
    cache.update(zip(new, encode(new)))
    out = [cache[word] for word in words]
    for word in new if len(cache) > most else [word for word in new if len(word) > longest]:
        del cache[word]
    return out


# ---------------------------------------------------------------------------- packing videos


def pack_videos(captions, feat2d, csv_file, vocab, out, feat3d="", skip_bad=False) -> dict:
    """HowTo100M's layout -> one file: float16 frames at 1 per second, caption tokens with their seconds, ids.

    captions: caption.json {video id: {"start": [s], "end": [s], "text": [...]}}. csv_file: with the columns
    video_id and task_id; only its videos are packed, in the order of the captions. feat2d, feat3d: folders of
    <video id>.npy, (n, D) at 1 and at 1.5 per second; 3D is resampled to 1 per second at index floor(1.5 t)
    and put behind 2D on the channel axis (paper 4.2). Every problem is listed at once (the whole list in
    OUT.problems.txt) and ends the program, with skip_bad it is left out instead. Returns the counts.
    """
    folders = [Path(folder) for folder in (feat2d, feat3d) if folder]
    check_sources([captions, csv_file])
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"{folder}: no such folder of features")
    refuse_existing(out)
    vocab = vocab if isinstance(vocab, Vocab) else load_vocab(vocab)
    tasks = read_tasks(csv_file)
    widths, seconds = sample_features(folders, list(tasks))
    check_space(out, int(2 * 2 * sum(widths) * seconds * len(tasks)))
    problems, done, unnamed, silent = [], set(), 0, 0
    names, task, frame_offsets, caption_offsets, tokens = [], [], [0], [0], 0
    kinds = {"frames": np.dtype(np.float16), "tokens": vocab.dtype, "token_offsets": np.dtype(np.int64),
             "start": np.dtype(np.float64), "end": np.dtype(np.float64)}
    with staged(out) as (scratch, part), ExitStack() as stack:
        raw = {name: stack.enter_context(open(scratch / name, "wb")) for name in kinds}
        raw["token_offsets"].write(np.int64(0).tobytes())
        bar = progress(None, len(tasks), "video", f"videos -> {Path(out).name}")
        for video, row, _ in read_captions(captions):
            if video not in tasks:
                unnamed += 1
                continue
            bar.update()
            if video in done:
                problems.append(("captions", f"{video}: stands twice in {captions}"))
                continue
            done.add(video)
            frames, found = video_frames(folders, video, widths)
            start, end, texts, problem = caption_rows(row)
            problems += found + ([("captions", f"{video}: {problem}")] if problem else [])
            if found or problem:
                continue
            beyond = (start >= len(frames)) | (end > len(frames) + 2)
            if beyond.any():
                problems.append(("times", f"{video}: {beyond.sum()} of {len(start)} captions lie beyond the "
                                          f"features, which end at {len(frames)} s"))
            ids = vocab.encode(texts)
            keep = [c for c in range(len(ids)) if ids[c] and not beyond[c]]
            silent += sum(not i for i in ids)
            if not any(ids):
                problems.append(("no captions", f"{video}: no word in the {len(ids)} captions"))
            if keep and (skip_bad or not problems):  # once nothing will be packed, only look for problems
                lengths = np.cumsum([len(ids[c]) for c in keep])
                for name, value in (("frames", frames), ("tokens", [i for c in keep for i in ids[c]]),
                                    ("token_offsets", tokens + lengths),
                                    ("start", start[keep]), ("end", end[keep])):
                    raw[name].write(np.asarray(value, kinds[name]).tobytes())
                tokens += int(lengths[-1])
                frame_offsets.append(frame_offsets[-1] + len(frames))
                caption_offsets.append(caption_offsets[-1] + len(keep))
                names.append(video.encode())
                task.append(tasks[video])
        bar.close()
        problems += [("no captions", f"{video}: in {csv_file}, not in {captions}") for video in tasks
                     if video not in done]
        report(problems, f"{out}.problems.txt", skip_bad, len(tasks))
        if not names:
            raise SystemExit(f"{out}: no video is left to pack")
        for f in raw.values():
            f.close()
        n, m = caption_offsets[-1], frame_offsets[-1]
        counts = {"videos": len(names), "captions": n, "frames": m, "tokens": tokens}
        shapes = {"frames": (m, sum(widths)), "tokens": (tokens,), "token_offsets": (n + 1,), "start": (n,),
                  "end": (n,)}
        check_space(out, sum(f.stat().st_size for f in scratch.iterdir()))
        write_packed(part, "videos", vocab, {
            "video_id": np.array(names), "task": np.array(task, np.int64),
            "frame_offsets": np.array(frame_offsets), "caption_offsets": np.array(caption_offsets)} | {
            name: (scratch / name, kinds[name], shapes[name]) for name in kinds},
            d2=widths[0], d3=sum(widths[1:]), **counts)
    print0(f"videos: {len(names):,} videos, {n:,} captions, {m:,} frames of {' + '.join(map(str, widths))} "
           f"channels -> {Path(out).name}"
           + (f"; {silent:,} captions without a word left out" if silent else "")
           + (f"; {unnamed:,} videos with captions are not in {csv_file}" if unnamed else ""))
    return counts | {"problems": len(problems)}


def read_tasks(path):
    """{video id: task id} of a csv in HowTo100M_v1's columns; a video under several tasks keeps the first."""
    tasks = {}
    with open(path, newline="", encoding="utf-8-sig") as f:
        try:
            reader = csv.DictReader(f)
            if not {"video_id", "task_id"} <= set(reader.fieldnames or []):
                raise SystemExit(f"{path}: no columns video_id and task_id in its first line")
            for row in reader:
                if not row["video_id"]:
                    raise SystemExit(f"{path}: line {reader.line_num}: no video_id")
                tasks.setdefault(row["video_id"], int(row["task_id"]))
        except (ValueError, TypeError, csv.Error) as error:
            raise SystemExit(f"{path}: line {reader.line_num}: task_id: {error}") from None
    if not tasks:
        raise SystemExit(f"{path}: names no video")
    return tasks


def sample_features(folders, videos):
    """-> (most frequent width in each folder, mean seconds a video), from up to 100 files over the list."""
    widths, lengths = [], []
    for folder in folders:
        found = Counter()
        for video in videos[::len(videos) // 100 + 1]:
            array, _ = read_features(folder / f"{video}.npy", mmap_mode="r")
            if array is not None:
                found[array.shape[1]] += 1
                lengths += [len(array)] if folder == folders[0] else []
        widths.append(found.most_common(1)[0][0] if found else 0)
    return widths, float(np.mean(lengths)) if lengths else 0.0


def read_features(path, mmap_mode=None):
    """-> ((n, D) array, None), or (None, (kind, text)) of a missing, empty, damaged or mis-shaped file."""
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        return None, ("missing", str(path))
    except Exception as error:  # whatever a damaged file makes numpy raise
        if path.is_file() and not path.stat().st_size:
            return None, ("empty", str(path))
        return None, ("damaged", f"{path}: {(str(error) or type(error).__name__).splitlines()[0]}")
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        return None, ("mis-shaped", f"{path}: {what}, not float (seconds, channels)")
    if not array.size:
        return None, ("empty", f"{path}: shape {array.shape}")
    return array, None


def video_frames(folders, video, widths):
    """-> ((F, sum of widths) float16 at 1 per second, []), or (None, problems) of a video's feature files.

    F: the seconds that 2D has and that 3D covers; a difference above 2 s is a problem.
    """
    parts, problems = [], []
    for folder, width in zip(folders, widths):
        path = folder / f"{video}.npy"
        array, problem = read_features(path)
        if array is not None and array.shape[1] != width:
            problem = ("mis-shaped", f"{path}: {array.shape[1]} channels, the others have {width}")
        if not problem:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
            if bad := int((~np.isfinite(array)).sum()):
                problem = ("not finite", f"{path}: {bad} of {array.size} values are NaN or beyond 65504")
        parts.append(array)
        problems += [problem] if problem else []
    if problems:
        return None, problems
    if len(parts) == 2:
        seconds = [len(parts[0]), len(parts[1]) / 1.5]
        if abs(seconds[0] - seconds[1]) > 2:
            return None, [("mis-shaped", f"{video}: {seconds[0]} s of 2D features, {seconds[1]:.1f} s of 3D "
                                         f"({len(parts[1])} rows at 1.5 a second)")]
        frames = min(len(parts[0]), int(np.ceil(seconds[1])))
        parts = [parts[0][:frames], parts[1][np.arange(frames) * 3 // 2]]
    return np.concatenate(parts, axis=1), []


def caption_rows(row):
    """A video's captions -> (start, end, texts, "") sorted by start, or (None, None, None, what is wrong)."""
    wrong = (None, None, None)
    if not isinstance(row, dict) or not all(isinstance(row.get(k), list) for k in ("start", "end", "text")):
        return *wrong, "not three lists start, end and text"
    if not len(row["start"]) == len(row["end"]) == len(row["text"]):
        return *wrong, f"{len(row['start'])} starts, {len(row['end'])} ends, {len(row['text'])} texts"
    if not all(type(t) in (int, float) and 0 <= t < 1e9 for t in row["start"] + row["end"]):
        return *wrong, "a time is no number of seconds"
    if not all(isinstance(t, str) for t in row["text"]):
        return *wrong, "a text is no string"
    start, end = (np.array(row[k], np.float64) for k in ("start", "end"))
    if (start > end).any():
        return *wrong, "a caption ends before it starts"
    order = np.argsort(start, kind="stable")
    return start[order], end[order], [row["text"][i] for i in order], ""


def report(problems, path, skip_bad, videos):
    """Lists problems, 20 of each kind on the screen, all in `path`; ends the program unless skip_bad."""
    if not problems:
        Path(path).unlink(missing_ok=True)
        return
    Path(path).write_text("".join(f"{kind}: {text}\n" for kind, text in problems), encoding="utf-8")
    kinds = Counter(kind for kind, _ in problems)
    for kind, count in kinds.items():
        listed = [text for k, text in problems if k == kind]
        print0("\n".join(f"{kind}: {text}" for text in listed[:20]))
        if count > 20:
            print0(f"{kind}: ... and {count - 20:,} more")
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    summary = f"{len(problems):,} problems in {videos:,} videos ({by_kind})"
    if not skip_bad:
        raise SystemExit(f"videos: {summary}; nothing was packed. All are listed in {path}; mend them, or "
                         "leave them out with --skip-bad")
    print0(f"videos: left out {summary}; all are listed in {path}")


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


# ---------------------------------------------------------------------------- the demo world

# what dropping, soaking, ... does to a material: seen in the videos, never said of a noun in any text
EFFECTS = {
    "glass": dict(drop="shatters", soak="sinks", heat="cracks", press="resists", cut="resists"),
    "ceramic": dict(drop="shatters", soak="sinks", heat="glows", press="resists", cut="resists"),
    "metal": dict(drop="clangs", soak="sinks", heat="glows", press="bends", cut="resists"),
    "wood": dict(drop="thuds", soak="floats", heat="burns", press="resists", cut="splits"),
    "stone": dict(drop="thuds", soak="sinks", heat="cracks", press="resists", cut="resists"),
    "cloth": dict(drop="flutters", soak="absorbs", heat="burns", press="crumples", cut="parts"),
    "paper": dict(drop="flutters", soak="absorbs", heat="burns", press="crumples", cut="parts"),
    "plastic": dict(drop="bounces", soak="floats", heat="melts", press="bends", cut="splits"),
    "rubber": dict(drop="bounces", soak="floats", heat="melts", press="squishes", cut="parts"),
    "wax": dict(drop="dents", soak="floats", heat="melts", press="squishes", cut="parts")}
MISHAPS = {"shatters", "dents", "absorbs", "cracks", "burns", "melts", "crumples", "bends"}
# a world draws 10 nouns of each material
NOUNS = {material: text.split() for material, text in {
    "glass": "goblet vase jar mirror lens bottle beaker tumbler decanter flask window bulb prism carafe",
    "ceramic": "mug teapot plate bowl tile saucer pitcher urn crock basin ramekin figurine casserole vessel",
    "metal": "wrench kettle anvil spoon hammer coin bolt chain key ladle skillet trumpet sword hinge",
    "wood": "log chair table plank crate ladder broom barrel stool oar fence drawer easel cabinet",
    "stone": "brick boulder pebble statue paver slab cobble gravestone pillar hearth menhir cairn sill",
    "cloth": "pillow curtain towel scarf blanket shirt apron sock quilt flag glove sheet coat banner",
    "paper": "book letter map newspaper poster envelope notebook ticket memo card stamp receipt diary",
    "plastic": "bucket comb toothbrush straw lunchbox hanger frisbee syringe funnel ruler tray visor tub peg",
    "rubber": "tire ball boot eraser hose mat balloon gasket plunger duck stopper tube raft bumper",
    "wax": "candle crayon seal taper lipstick honeycomb votive tealight balm torch pastel soap salve rind",
}.items()}
PROPERTIES = {"material": list(EFFECTS), "colour": ["red", "green", "blue", "yellow"],
              "size": ["small", "medium", "large"], "order": ["spins first", "tilts first"],
              "topic": ["trade", "law", "war", "faith", "music", "sport", "court", "science"]}
SCENES = ["kitchen", "workshop", "garden", "studio", "garage", "beach"]
# action: its past tense, and where
ACTIONS = {"drop": ("dropped", ["on the floor", "onto the ground", "from up here"]),
           "soak": ("soaked", ["in the water", "under the tap", "until it is wet"]),
           "heat": ("heated", ["over the fire", "on the stove", "in the oven"]),
           "press": ("pressed", ["with both hands", "under my palm", "very hard"]),
           "cut": ("cut", ["with the knife", "with this saw", "in the middle"])}
NEUTRAL = "lift carry wipe show hold move place find keep wrap count weigh stack touch".split()
OPENINGS = ["so now we", "okay next i", "then you just", "and here we", "now let me", "all right we",
            "first you", "so i am going to"]
# topic: who, what they do (a past tense that is a participle too), when or what for
TOPICS = {
    "trade": ("merchant banker broker pedlar", "taxed traded imported priced auctioned", "for a good profit"),
    "law": ("lawyer judge notary clerk", "inspected claimed disputed seized", "by the new statute"),
    "war": ("soldier general captain spy", "captured guarded smuggled defended", "during the long siege"),
    "faith": ("priest monk bishop pilgrim", "blessed venerated donated revered", "before the evening prayer"),
    "music": ("singer drummer composer fiddler", "praised rehearsed recorded sampled", "after the concert"),
    "sport": ("runner coach referee champion", "awarded raffled pledged wagered", "at the final match"),
    "court": ("queen duke herald jester", "presented admired inherited bestowed", "at the royal banquet"),
    "science": ("chemist doctor scholar surveyor", "measured studied examined described", "in the report")}
PLACES = [f"{a} {b}" for a in "northern southern old quiet distant busy".split()
          for b in "valley market harbour village castle bridge".split()]
TIMES = ["last winter", "in the spring", "on sunday", "every autumn", "that morning", "years ago"]
OTHERS = "crowd voice fog price rumor army road moon river night choir wind".split()  # have effects
PEOPLE = ["someone", "the man", "the woman", "a child", "my neighbour", "the guest"]
# share of each latent in a frame; its vector has length about 4, noise is 0.5 a channel. The material leads:
# where actions are as strong, the teacher aligns on actions alone and has nothing to teach about nouns
APPEARANCE = {"material": 1.0, "noun": 0.4, "colour": 0.6, "size": 0.6, "scene": 0.4}
EFFECT_2D, ACTION_3D, EFFECT_3D, ORDER_3D, NOISE = 0.5, 0.1, 0.1, 1.0, 0.5
VIDEOS, CLIPS, SECONDS, CHANNELS, SENTENCES, PIECES = 2000, 4, 6, 64, 32000, 760
TASK_SIZES = {"train": 1000, "dev": 500, "dev_seen": 500}


def make_demo(folder="data/demo-s0", seed=0) -> Path:
    """Builds the micro-world of `seed` in real data's layouts and packs it with the commands for real data.

    Material, size, colour and order of a noun show in the videos and are said in no text; the tasks ask for
    them, of nouns that their training sets do not have. raw/ holds caption.json, videos.csv, feat2d/,
    feat3d/, text/, vocab.txt, tasks/ and latents.json (every noun's properties and every clip's state, so
    that it can be drawn); beside it corpus.h5, videos.h5 and, last, world.json. A folder that holds this
    world already is kept. The world is built in a scratch folder and renamed: a build that was interrupted
    leaves nothing under the name.
    """
    folder = Path(folder)
    if folder.exists():
        try:
            world = json.loads((folder / "world.json").read_text())
        except (OSError, ValueError):
            world = {}
        if (world.get("seed"), world.get("format")) != (seed, WORLD):
            raise SystemExit(f"{folder} exists and is not the demo world of seed {seed}, format {WORLD}; "
                             "remove it or give another folder")
        return folder
    start = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    print0(f"demo: building the world of seed {seed} in {folder}")
    with staged(folder) as (_, built):
        raw = built / "raw"
        raw.mkdir(parents=True)
        rng = random.Random(f"demo world {seed}")
        nouns = draw_nouns(rng)
        clips = draw_clips(rng, nouns)
        write_videos(raw, clips, nouns, seed)
        write_corpus(raw / "text", rng, nouns)
        write_tasks(raw / "tasks", rng, nouns)
        (raw / "latents.json").write_text(json.dumps({
            "nouns": nouns, "clips": clips, "properties": PROPERTIES, "scenes": SCENES,
            "actions": [*ACTIONS, *NEUTRAL], "effects": EFFECTS}))
        texts = sorted((raw / "text").glob("*.txt"))
        vocab = train_vocab([*texts, raw / "caption.json"], raw / "vocab.txt", PIECES)
        pack_text(texts, vocab, built / "corpus.h5")
        pack_videos(raw / "caption.json", raw / "feat2d", raw / "videos.csv", vocab, built / "videos.h5",
                    feat3d=raw / "feat3d")
        write_json(built / "world.json", {
            "seed": seed, "format": WORLD, "vocab_hash": vocab.hash,
            "corpus_hash": open_packed(built / "corpus.h5")[0]["hash"],
            "videos_hash": open_packed(built / "videos.h5")[0]["hash"]})
    print0(f"demo: {folder} in {duration(time.perf_counter() - start)}")
    return folder


def demo_world(data_dir, seed, world):
    """The folder of the demo world, made by rank 0 where it is missing, while the others wait; says which."""
    folder = Path(data_dir) / f"demo-s{seed}"
    if world.main:
        print0(f"reused {folder}" if folder.exists() else f"no {folder} yet")
        make_demo(folder, seed)
    world.barrier()
    return folder


def demo_xtext(folder, world):
    """xcorpus.h5 of a demo world, its vocabulary on both sides, packed by rank 0 where it is missing or of
    another format, while the others wait; says which."""
    folder = Path(folder)
    path = folder / "xcorpus.h5"
    if world.main:
        vocab = load_vocab(folder / "raw" / "vocab.txt")
        try:
            found = path.exists() and open_packed(path, "xtext", vocab)[1].hash == vocab.hash
        except SystemExit:
            found = False
        print0(f"reused {path}" if found else f"no {path} yet")
        if not found:
            path.unlink(missing_ok=True)
            pack_xtext(sorted((folder / "raw" / "text").glob("*.txt")), vocab, vocab, path)
    world.barrier()
    return path


def effects_of(action):
    """What an action can do to the ten materials, sorted."""
    return sorted({effects[action] for effects in EFFECTS.values()})


def draw_nouns(rng):
    """{noun: its properties and split}: 10 nouns of each material, 65 % of them for the tasks' training sets.

    Within each split colour, size and order take their values equally often, and independently of the
    material.
    """
    nouns = {}
    for m, (material, pool) in enumerate(NOUNS.items()):
        for i, noun in enumerate(rng.sample(pool, 10)):
            nouns[noun] = {"material": material, "topic": rng.choice(PROPERTIES["topic"]),
                           "split": "train" if i < 6 + m % 2 else "dev"}
    for split in ("train", "dev"):
        members = [n for n in nouns if nouns[n]["split"] == split]  # material by material
        for name in ("colour", "size", "order"):
            values = PROPERTIES[name]
            for at in range(0, len(members), len(values)):
                for noun, value in zip(members[at:], rng.sample(values, len(values))):
                    nouns[noun][name] = value
    return nouns


def draw_clips(rng, nouns):
    """Latent state and caption of every clip; a video shows one thing (a noun) in one scene."""
    things = [noun for noun in nouns for _ in range(VIDEOS // len(nouns))]
    rng.shuffle(things)
    clips = []
    for v, noun in enumerate(things):
        thing, scene = nouns[noun], rng.choice(SCENES)
        colour = thing["colour"] if rng.random() < 0.8 else rng.choice(PROPERTIES["colour"])
        for c in range(CLIPS):
            action = rng.choice(list(ACTIONS)) if rng.random() < 0.7 else rng.choice(NEUTRAL)
            if rng.random() < 0.1:  # a digression: the caption names neither what is seen nor what is done
                agents, _, end = TOPICS[rng.choice(PROPERTIES["topic"])]
                text = f"{rng.choice(OPENINGS)} talk about the {rng.choice(agents.split())} {end}"
            else:
                where = ACTIONS[action][1] if action in ACTIONS else ["right here", "once more", "like this"]
                text = f"{rng.choice(OPENINGS)} {action} the {noun} {rng.choice(where)}"
            clips.append({
                "video_id": f"demo{v:04d}", "caption": c, "text": text, "start": float(SECONDS * c),
                "end": float(SECONDS * (c + 1)), "noun": noun, "action": action, "scene": scene,
                "effect": EFFECTS[thing["material"]].get(action, ""), "material": thing["material"],
                "colour": colour, "size": thing["size"], "order": thing["order"]})
    return clips


def write_videos(raw, clips, nouns, seed):
    """caption.json, videos.csv (task = the noun) and features: 2D at 1 per second, 3D at 1.5 per second.

    Appearance (2D) = sum of APPEARANCE's latents, + the effect from the 4th second; motion (3D) = a little
    action and effect, and around the middle the order: a direction of change, of which 2D has no trace.
    """
    rng = np.random.default_rng(seed)
    values = PROPERTIES | {"noun": list(nouns), "scene": SCENES, "action": [*ACTIONS, *NEUTRAL],
                           "effect": [f"{a} {effect}" for a in ACTIONS for effect in effects_of(a)]}

    def latent(name, states):
        """(clips, CHANNELS): each value of a latent has a random vector of length about 4, others have 0."""
        vectors = {v: rng.normal(0, 4 / CHANNELS ** 0.5, CHANNELS).astype(np.float32) for v in values[name]}
        return np.stack([vectors.get(state, np.zeros(CHANNELS, np.float32)) for state in states])

    def noisy(still, rows, changes):
        """(clips, CHANNELS) still + changes in slices of a clip's rows + noise: (videos, time, CHANNELS)."""
        frames = rng.normal(0, NOISE, (len(clips), rows, CHANNELS)).astype(np.float32) + still[:, None]
        for where, change in changes:
            frames[:, where] += change[:, None]
        return frames.reshape(-1, CLIPS * rows, CHANNELS).astype(np.float16)

    appearance = sum(share * latent(name, [clip[name] for clip in clips])
                     for name, share in APPEARANCE.items())
    effect_2d, effect_3d = (latent("effect", [f"{clip['action']} {clip['effect']}" for clip in clips])
                            for _ in range(2))
    action, order = (latent(name, [clip[name] for clip in clips]) for name in ("action", "order"))
    # rows 3 to 6 of a clip's 9 become the frames 2, 3 and 4 of its 6 when 3D is resampled to 1 per second
    features = {"feat2d": noisy(appearance, SECONDS, [(slice(3, 6), EFFECT_2D * effect_2d)]),
                "feat3d": noisy(ACTION_3D * action, SECONDS * 3 // 2,
                                [(slice(4, 9), EFFECT_3D * effect_3d), (slice(3, 7), ORDER_3D * order)])}
    captions = {}
    for clip in clips:
        video = captions.setdefault(clip["video_id"], {"start": [], "end": [], "text": []})
        for key in video:
            video[key].append(clip[key])
    for name, arrays in features.items():
        (raw / name).mkdir()
        for video, array in zip(captions, arrays):
            np.save(raw / name / f"{video}.npy", array)
    (raw / "caption.json").write_text(json.dumps(captions))
    with open(raw / "videos.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["video_id", "category_1", "category_2", "rank", "task_id"])
        for i, clip in enumerate(clips[::CLIPS]):
            task = values["noun"].index(clip["noun"])
            rows.writerow([clip["video_id"], "Demo", clip["scene"], i + 1, task])


def write_corpus(folder, rng, nouns):
    """SENTENCES sentences in documents of 4 to 8 about different nouns: 70 % facts of the noun's topic, 10 %
    actions without an outcome, 20 % about other things, where alone the effect words and the tasks' phrases
    stand."""
    effects = sorted({effect for of in EFFECTS.values() for effect in of.values()})

    def sentence(noun):
        kind, place, when = rng.random(), rng.choice(PLACES), rng.choice(TIMES)
        if kind < 0.7:
            agents, verbs, end = TOPICS[nouns[noun]["topic"]]
            agent, verb = rng.choice(agents.split()), rng.choice(verbs.split())
            return rng.choice([f"the {noun} was {verb} by the {agent} in the {place} .",
                               f"{when} the {agent} {verb} the {noun} {end} .",
                               f"in the {place} a {agent} {verb} one more {noun} {when} .",
                               f"the {agent} of the {place} {verb} the {noun} ."])
        if kind < 0.8:
            past, where = rng.choice(list(ACTIONS.values()))
            return f"{rng.choice(PEOPLE)} {past} the {noun} {rng.choice([*where, 'near the ' + place])} ."
        (thing, other), (one, two) = rng.sample(OTHERS, 2), rng.sample(["spins", "tilts"], 2)
        effect, action = rng.choice(effects), rng.choice(list(ACTIONS))
        relation = rng.choice(["before", "after"])
        return rng.choice([f"the {thing} {effect} near the {place} {when} .",
                           f"{rng.choice(PEOPLE)} heard the {thing} and it {effect} .",
                           f"something that {effect} when you {action} it is like the {thing} .",
                           f"the {thing} {one} starts {relation} it {two} near the {other} .",
                           f"in the story {rng.choice(PEOPLE)} nudged the {thing} and the {other} {one} ."])

    folder.mkdir()
    documents, count = [], 0
    while count < SENTENCES:
        about = rng.sample(list(nouns), min(rng.randint(4, 8), SENTENCES - count))
        documents.append("".join(sentence(noun) + "\n" for noun in about))
        count += len(about)
    half = len(documents) // 2
    for name, part in (("part0.txt", documents[:half]), ("part1.txt", documents[half:])):
        (folder / name).write_text("\n".join(part))


def write_tasks(folder, rng, nouns):
    """The downstream tasks in official layouts, each with a training set, dev (of held-out nouns) and
    dev_seen.

    mishap: SST-2's tsv. entailment: RTE's tsv. two_choices: PIQA's jsonl and lst. four_endings: SWAG's csv.
    before_after: TRACIE's lines, decided by the noun's order alone; the others by its material. Every
    hypothesis, goal and wording has its labels equally often.
    """
    def where(action):
        return f"{rng.choice(PEOPLE)} {ACTIONS[action][0]} the {{}} {rng.choice(ACTIONS[action][1])} ."

    def noun_of(members, fits):
        return rng.choice([noun for noun in members if fits(nouns[noun])])

    def does(action, effect):
        return lambda noun: EFFECTS[noun["material"]][action] == effect

    def mishap(members):
        action = rng.choice(["drop", "soak", "heat", "press"])
        bad = [noun_of(members, lambda noun: (EFFECTS[noun["material"]][action] in MISHAPS) == label)
               for label in (False, True)]
        return [(where(action).format(noun), label) for label, noun in enumerate(bad)]

    def entailment(members):
        action = rng.choice(list(ACTIONS))
        effect = rng.choice(effects_of(action))
        fits = does(action, effect)
        return [(where(action).format(noun_of(members, lambda noun: fits(noun) == holds)), f"it {effect} .",
                 "entailment" if holds else "not_entailment") for holds in (True, False)]

    def two_choices(members):
        action = rng.choice(list(ACTIONS))
        effect = rng.choice(effects_of(action))
        fits = does(action, effect)
        out = []
        for label in (0, 1):
            right, wrong = noun_of(members, fits), noun_of(members, lambda noun: not fits(noun))
            out.append((f"something that {effect} when you {action} it", *[f"the {noun}" for noun in (
                (right, wrong) if label == 0 else (wrong, right))], label))
        return out

    def four_endings(members):
        action = rng.choice(["drop", "heat", "press"])  # the ones with at least four effects
        effects = effects_of(action)
        out = []
        for label in range(4):
            effect = rng.choice(effects)
            endings = rng.sample([e for e in effects if e != effect], 3)
            endings.insert(label, effect)
            noun = noun_of(members, does(action, effect))
            out.append((where(action).format(noun), *[f"{e} ." for e in endings], label))
        return out

    def before_after(members):
        relation = rng.choice(["before", "after"])
        story = f"{rng.choice(PEOPLE)} nudged the {{}} near the {rng.choice(PLACES)} ."
        out = []
        for first in ("spins", "tilts"):
            noun = noun_of(members, lambda noun: noun["order"] == f"{first} first")
            answer = "positive" if (first == "spins") == (relation == "before") else "negative"
            out.append((f"the {noun} spins starts {relation} it tilts", story.format(noun), answer))
        return out

    def tsv(path, header, rows):
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]))

    def write(task, split, rows):
        base = folder / task
        name = {"train": "train", "dev": "valid", "dev_seen": "valid_seen"}[split]
        if task == "mishap":
            tsv(base / f"{split}.tsv", ("sentence", "label"), rows)
        elif task == "entailment":
            tsv(base / f"{split}.tsv", ("index", "sentence1", "sentence2", "label"),
                [(i, *row) for i, row in enumerate(rows)])
        elif task == "two_choices":
            (base / f"{name}.jsonl").write_text("".join(
                json.dumps({"goal": goal, "sol1": one, "sol2": two}) + "\n" for goal, one, two, _ in rows))
            (base / f"{name}-labels.lst").write_text("".join(f"{row[-1]}\n" for row in rows))
        elif task == "four_endings":
            with open(base / f"{name.replace('valid', 'val')}.csv", "w", newline="") as f:
                table = csv.writer(f, lineterminator="\n")
                table.writerow(["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source",
                                *[f"ending{i}" for i in range(4)], "label"])
                table.writerows([i, f"demo_{i}", i, f"{row[0]} it", row[0], "it", "gold", *row[1:]]
                                for i, row in enumerate(rows))
        else:
            name = {"train": "tracie_train", "dev": "tracie_test", "dev_seen": "tracie_test_seen"}[split]
            (base / f"{name}.txt").write_text("".join(
                f"event: {event} story: {story}\tanswer: {answer}\n" for event, story, answer in rows))

    for draw in (mishap, entailment, two_choices, four_endings, before_after):
        (folder / draw.__name__).mkdir(parents=True)
        used = set()
        for split, size in TASK_SIZES.items():
            members = [noun for noun in nouns if (nouns[noun]["split"] == "dev") == (split == "dev")]
            rows = []
            while len(rows) < size:
                group = draw(members)  # one row of each label
                if len(used.union(group)) == len(used) + len(group):
                    used.update(group)
                    rows += group
            rng.shuffle(rows)
            write(draw.__name__, split, rows)


# ---------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line."""

    def error(self, message):
        raise SystemExit(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv=None):
    """The commands demo, vocab, text, xtext and videos; dashes and underscores in flags are equal."""
    argv = [re.match("[^=]*", arg)[0].replace("_", "-") + "".join(arg.partition("=")[1:])
            if arg.startswith("--") else arg for arg in (sys.argv[1:] if argv is None else argv)]
    parser = Parser(prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|vocab|text|xtext|videos")

    def command(name, text):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        return sub.add_argument

    add = command("demo", "build and pack the demo world")
    add("--seed", type=int, default=0, help="every seed is another world (default 0)")
    add("--out", default="", help="its folder (default data/demo-s<seed>)")
    add = command("vocab", "train a WordPiece vocabulary on text")
    add("text", nargs="+", help="UTF-8 text files, or caption.json")
    add("--size", type=int, default=30522, help="tokens (default 30522)")
    add("--cased", action="store_true", help="keep upper case and accents")
    add("--out", required=True, help="vocab.txt to write")
    add = command("text", "pack text files into one stream of tokens")
    add("text", nargs="+", help="UTF-8 text files with blank lines between documents, or caption.json")
    add("--vocab", required=True, help="vocab.txt, tokenizer.json, or a folder or packed .h5 that holds one")
    add("--out", required=True, help=".h5 file to write")
    add = command("xtext", "pack text files as two streams of tokens, word pieces and CLIP's, for XDBERT")
    add("text", nargs="+", help="as for text")
    add("--vocab", required=True, help="as for text: of the language encoder that shall be adapted")
    add("--clip-vocab", required=True, help="bpe_simple_vocab_16e6.txt.gz, or a folder of CLIP's text tower")
    add("--out", required=True, help=".h5 file to write")
    add = command("videos", "pack captions and features in HowTo100M's layout")
    add("--captions", required=True, help="caption.json: {video id: {start, end, text}}")
    add("--feat2d", required=True, help="folder of <video id>.npy, (seconds, channels), 1 per second")
    add("--feat3d", default="", help="the same at 1.5 per second (default: 2D alone)")
    add("--csv", required=True, help="videos to pack, with columns video_id and task_id")
    add("--vocab", required=True, help="as for text; the teacher and its students share one vocabulary")
    add("--skip-bad", action="store_true", help="leave out what is missing or broken instead of stopping")
    add("--out", required=True, help=".h5 file to write")
    args = parser.parse_args(argv)
    try:
        if args.command == "demo":
            make_demo(args.out or f"data/demo-s{args.seed}", args.seed)
        elif args.command == "vocab":
            train_vocab(args.text, args.out, args.size, not args.cased)
        elif args.command == "text":
            pack_text(args.text, args.vocab, args.out)
        elif args.command == "xtext":
            pack_xtext(args.text, args.vocab, args.clip_vocab, args.out)
        else:
            pack_videos(args.captions, args.feat2d, args.csv, args.vocab, args.out, args.feat3d,
                        args.skip_bad)
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; no file was left under --out")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("data.py: terminated; no file was left under --out"))
    main()
