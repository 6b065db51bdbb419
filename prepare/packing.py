"""Packs text, pairs of texts and videos into the files that training reads. Needs no torch."""
import codecs
import csv
import io
import itertools
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import threading
import time
import zlib
from collections import Counter, deque
from contextlib import ExitStack, closing, suppress
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
from tokenizers import models, trainers

from common import atomic, decode_json, duration, open_text, parse_json, print0, progress
from data import open_packed, open_vocab, write_packed
from parts.vocab import SPECIALS, CLIPVocab, Vocab, load_clip_vocab, wordpiece

# ---------------------------------------------------------------------------- sources and output


def check_files(sources, out):
    """SystemExit before the work where sources are missing, `out` exists or its folder does not."""
    if folder := next((path for path in sources if Path(path).is_dir()), None):
        raise SystemExit(f"{folder}: is a folder; give the files in it")
    missing = [str(path) for path in sources if not Path(path).is_file()]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: no such file")
    if Path(out).exists():
        raise SystemExit(f"{out} exists; remove it or give another --out")
    if not Path(out).parent.is_dir():
        raise SystemExit(f"{out}: there is no folder {Path(out).parent}; make it first")


def check_space(out, need):
    """SystemExit where the disk of `out` has less than `need` bytes free."""
    free = shutil.disk_usage(Path(out).parent).free
    if free < need:
        raise SystemExit(f"{out}: needs about {need / 1e9:.1f} GB of disk (a raw copy included), "
                         f"{free / 1e9:.1f} GB are free; free some or give another --out")


ARTICLES = (re.compile(r"</?doc\b.*>\s*"),  # wikiextractor's tags around an article
            re.compile(r" = [^=].*[^=] = \s*"))  # WikiText's title of an article; sections have more of =


def read_pieces(path):
    """Yields (text, bytes read) of a source of text; memory stays flat. Its first bytes tell what it is:

    plain text      blank lines are between documents
    JSON lines      {"text": ...}, a document each
    caption.json    {video id: {"start", "end", "text"}}, a document a video
    wikiextractor   <doc ...> and </doc> lines are between documents, and are dropped
    WikiText        " = Title = " lines begin a document

    Any of them may be gzipped. A piece has about 1 MB and ends at the end of a line or,
    where a line is longer, behind a space. A run of 4 million characters without either is cut. SystemExit
    names the place where the text is not UTF-8 or no JSON.
    """
    with open_text(path) as f:
        head = f.read(1 << 16).removeprefix(codecs.BOM_UTF8)
        f.seek(0)
        if head.lstrip()[:1] == b"{":
            # the value of the first key: of captions it is an object
            captions = re.match(rb'\s*\{\s*("(?:[^"\\]|\\.)*"\s*:\s*\{|\})', head)
            yield from caption_texts(path) if captions else json_lines(path, f)
            return
        if re.match(rb'\s*\[\s*\{\s*"', head):
            raise SystemExit(f"{path}: is one JSON array; write an object a line, for instance with `jq -c "
                             "'.[]'`")
        first = next((line for line in head.decode(errors="replace").split("\n") if line.strip()), "")
        article = next((form for form in ARTICLES if form.fullmatch(first)), None)
        for text, size in plain_pieces(path, f):
            yield (only_between(text, article) if article else text), size


def caption_texts(path):
    """The pieces of a caption.json."""
    for video, row, size in read_captions(path):
        _, _, texts, problem = caption_rows(row)
        if problem and video == "info":
            raise SystemExit(f"{path}: annotations of COCO, not {{video id: captions}}; write its captions "
                             "to a text file, one a line and a blank line behind those of an image")
        if problem:
            raise SystemExit(f"{path}: {video}: {problem}")
        yield "".join(text.replace("\n", " ") + "\n" for text in texts) + "\n", size


LONGEST = 1 << 26  # bytes of a line of JSON


def json_lines(path, f):
    """The pieces of JSON lines."""
    for number, line in enumerate(iter(lambda: f.readline(LONGEST), b""), 1):
        if not line.strip():
            continue
        try:
            text = parse_json(line.decode("utf-8-sig"))["text"]
            lines = [part for part in text.split("\n") if part.strip()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SystemExit(f'{path}, line {number}: not a JSON object with a "text", and the file is no '
                             "caption.json; mend or remove the line") from None
        yield "".join(part + "\n" for part in lines) + "\n", len(line)


def only_between(text, article):
    """Text in which blank lines stand only where a line of the form `article` was; titles stay."""
    *lines, rest = text.split("\n")
    found = []
    for line in lines:
        if article.fullmatch(line):
            found += [""] if line.startswith(("<doc", "</doc")) else ["", line]
        elif line.strip():
            found.append(line)
    return "\n".join([*found, rest])


def plain_pieces(path, f):
    """Yields (text, bytes read) of a binary stream of UTF-8; see read_pieces."""
    decoder, rest, read = codecs.getincrementaldecoder("utf-8-sig")(), "", 0
    while True:
        chunk = f.read(1 << 20)
        try:
            text = rest + decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise SystemExit(f"{path}: not UTF-8 near byte {read + error.start}; convert it first, for "
                             "instance with `iconv -f latin1 -t utf-8`") from None
        read += len(chunk)
        cut = text.rfind("\n") + 1 or text.rfind(" ") + 1 or (len(text) if len(text) > 1 << 22 else 0)
        if not chunk:
            yield text + "\n", 0
            return
        yield text[:cut], len(chunk)
        rest = text[cut:]


def read_captions(path, shard=(1, 1)):
    """Yields (video id, value, bytes read) of a JSON file {video id: value} one by one; memory stays flat.

    HowTo100M's caption.json has values {"start": [s], "end": [s], "text": [...]}; the caller checks them. A
    folder holds the same as <video id>.csv with the columns start, end and text. shard: only of its videos,
    see in_shard. SystemExit names the byte near which the file is malformed or cut off.
    """
    if Path(path).is_dir():
        yield from read_caption_folder(path, shard)
        return
    head = re.compile(r'\s*([{,])\s*("(?:[^"\\]|\\.)*")\s*:\s*')  # { "id":   or   , "id":
    limit = 1 << 24  # characters; no video has so many, so what does not parse by then never will
    decoder, text, opening, size = codecs.getincrementaldecoder("utf-8-sig")(), "", "{", 0
    with open_text(path) as f:
        try:
            while (chunk := f.read(1 << 20)) and len(text) < limit:
                text, size, at = text + decoder.decode(chunk), size + len(chunk), 0
                while (match := head.match(text, at)) and match[1] == opening:
                    try:
                        value, end = decode_json(text, match.end())
                    except json.JSONDecodeError:  # not whole in the buffer yet
                        break
                    if in_shard(video := parse_json(match[2]), shard):
                        yield video, value, size
                        size = 0
                    opening, at = ",", end
                text = text[at:]
        except UnicodeDecodeError:
            text = "not UTF-8"
        except ValueError as error:
            raise SystemExit(f"{path}: the captions of {match[2]}: {error}; mend or remove them") from None
        if "".join(text.split()) != ("}" if opening == "," else "{}"):
            at = max(0, f.tell() - len(chunk) - len(text))
            raise SystemExit(f"{path}: not a JSON object {{video id: captions}}, or malformed or cut off "
                             f"behind byte {at}; fetch or write it anew")


def read_caption_folder(folder, shard):
    """read_captions of a folder of <video id>.csv files, as HowTo100M's raw captions come."""
    paths = sorted(Path(folder).glob("*.csv"))
    if not paths:
        raise SystemExit(f"{folder}: a folder without .csv files; give caption.json, or a folder that holds "
                         "<video id>.csv with the columns start, end and text")
    for path in (path for path in paths if in_shard(path.stem, shard)):
        rows = {"start": [], "end": [], "text": []}
        try:
            with open_text(path) as f:
                for row in csv.DictReader(io.TextIOWrapper(f, "utf-8-sig", newline="")):
                    for name, kind in (("start", float), ("end", float), ("text", str)):
                        rows[name].append(kind(row[name]))
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise SystemExit(f"{path}: not a csv file with the columns start, end and text ({error!r}); "
                             "fetch it anew") from None
        yield path.stem, rows, path.stat().st_size


# ---------------------------------------------------------------------------- vocabulary


UNBROKEN = re.compile(r"\S{1000}")  # no word is so long


def train_vocab(sources, out, size=30522, lower=True) -> Vocab:
    """Trains a WordPiece vocabulary of `size` tokens on text or caption.json files -> Vocab and file `out`.

    Deterministic: the trainer numbers continuing letters in the order of a hash map, so a first pass collects
    them and the second gets them in sorted order. At most 1,000 different characters are kept, the most
    frequent.
    """
    check_files(sources, out)
    if not 0 < size <= 10 ** 6:
        raise SystemExit(f"--size {size}: must be from 1 to 1,000,000")
    total = sum(Path(path).stat().st_size for path in sources)

    def lines(bar):
        for path in sources:
            for text, read in read_pieces(path):
                bar.update(read)
                # lines, so that all cores have work; the trainer's time is quadratic in a word's length
                yield from UNBROKEN.sub(r"\g<0> ", text).split("\n")

    def train(what, given, size):
        tokenizer = wordpiece(models.WordPiece(unk_token="[UNK]"), lower, lower)
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=given, limit_alphabet=1000,
                                            show_progress=False)
        with progress(None, total, "B", f"vocab: {what}", unit_scale=True) as bar:
            tokenizer.train_from_iterator(lines(bar), trainer)
        return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)

    letters = train("letters", list(SPECIALS), 0)
    if size <= len(letters):
        raise SystemExit(f"--size {size}: the characters alone take {len(letters)} tokens; give more")
    tokens = train("words", list(SPECIALS) + sorted(t for t in letters if t.startswith("##")), size)
    with atomic(out) as part:
        part.write_text("".join(token + "\n" for token in tokens), encoding="utf-8")
    print0(f"vocab: {len(tokens):,} word pieces from {total / 1e6:.1f} MB of text -> {Path(out).name}"
           + ("" if len(tokens) == size else f"; the text has no more than these of the {size:,} asked for"))
    return Vocab(tokens, lower, lower, str(out))


# ---------------------------------------------------------------------------- text


def pack_text(sources, vocab, out, jobs=1) -> dict:
    """Text files -> one stream of ids in `out`, [SEP] between documents (blank lines); memory stays constant.

    sources: paths of UTF-8 files, or caption.json files (a document a video). vocab: Vocab, or a path for
    open_vocab. jobs: processes that share the work, 0 = one a core; the output is the same, byte for byte.
    Returns {"tokens", "documents", "bytes", "seconds", "mb_per_s"}; MB/s = 1e6 input bytes a second until the
    last id. Ids equal Vocab.encode of every line: see cached_words.
    """
    check_files(sources, out)
    vocab = vocab if isinstance(vocab, Vocab) else open_vocab(vocab)
    return pack_words("text", sources, TextEncoder(vocab), out, jobs, {"tokens": vocab.dtype}, {})


def separate(text):
    """Puts spaces around frequent punctuation and for tabs and returns: BERT splits there anyway.

    Not around brackets, so that a literal "[SEP]" stays one word.
    """
    for c in ",.()\":;'-":
        text = text.replace(c, f" {c} ")
    return spaced(text)


def spaced(text):
    """Spaces for tabs and returns, which are white space to every tokenizer here; line ends stay."""
    return text.replace("\t", " ").replace("\r", " ")


def pack_xtext(sources, vocab, clip_vocab, out, jobs=1) -> dict:
    """Text files -> the same text in two streams of ids in `out`, for XDBERT; memory stays constant.

    tokens: as pack_text's. clip_tokens: by clip_vocab (CLIPVocab, Vocab, or a path for load_clip_vocab) from
    the ORIGINAL words, text between ASCII white space. Both tokenizers see one word at a time, and ids equal
    encoding whole lines. clip_counts, uint16, one for each of tokens: how many of clip_tokens start with it.
    A word's CLIP tokens stand at its first word piece. Those of a word without any stand at the next word
    piece ([SEP] at the latest), and what exceeds 65,535 stands at the one behind. jobs: as in pack_text.
    Returns pack_text's counts and those of clip_tokens and of clip_cut, for which no word piece was left.
    """
    check_files(sources, out)
    vocab = vocab if isinstance(vocab, Vocab) else open_vocab(vocab)
    tower = clip_vocab if isinstance(clip_vocab, (Vocab, CLIPVocab)) else load_clip_vocab(clip_vocab)
    most, waiting = 2 ** 16 - 1, 0  # waiting: CLIP tokens behind the last word piece so far

    def carry(tokens, clip_tokens, counts):
        nonlocal waiting
        counts[0] += waiting
        while len(over := np.flatnonzero(counts[:-1] > most)):
            excess, counts[over] = counts[over] - most, most
            counts[over + 1] += excess
        waiting = int(counts[-1])
        return tokens, clip_tokens, counts[:-1].astype(np.uint16)

    if isinstance(tower, CLIPVocab):
        lines, attributes = tower.merges, {"clip_hash": tower.hash}
    else:
        lines, attributes = tower.tokens, {"clip_hash": tower.hash, "clip_lower": tower.lower,
                                           "clip_strip_accents": tower.strip_accents}
    dtypes = {"tokens": vocab.dtype, "clip_tokens": tower.dtype, "clip_counts": np.dtype(np.uint16)}
    merges = np.frombuffer("\n".join(lines).encode(), np.uint8)
    counts = pack_words("xtext", sources, PairEncoder(vocab, tower), out, jobs, dtypes,
                        {"clip_vocab": merges}, carry, **attributes)
    if waiting:
        print0(f"xtext: the last {waiting:,} CLIP tokens are cut: there is no word piece behind them")
    return counts | {"clip_cut": waiting}


def pack_words(kind, sources, encoder, out, jobs, dtypes, arrays, carry=lambda *ids: ids,
               **attributes) -> dict:
    """The work of pack_text and pack_xtext: files -> texts -> streams of ids -> the packed file.

    encoder: of the streams in `dtypes` {name: dtype}. carry(streams of a text) -> what is written of them,
    which may depend on those before. arrays, attributes: what else write_packed shall write.
    """
    if not 0 <= jobs <= 1000:
        raise SystemExit(f"--jobs {jobs}: must be from 1 to 1,000, or 0 for one a core")
    sources, vocab = [Path(p) for p in sources], encoder.vocab
    total = sum(p.stat().st_size for p in sources)
    # English has 4 to 5 bytes a token
    check_space(out, 2 * sum(dtype.itemsize for dtype in dtypes.values()) * total // 3)
    print0(f"{kind}: packing {total / 1e6:.1f} MB with {vocab.size:,} word pieces")
    documents, begin = 0, time.perf_counter()
    bar = progress(None, total, "B", kind, unit_scale=True)
    with atomic(out) as part, bar, ExitStack() as stack:
        raw = {name: stack.enter_context(open(part.with_name(f"{name}.raw"), "wb")) for name in dtypes}
        texts = ((piece, size) for path in sources for *piece, size in texts_of(path))
        for (ended, streams), size in stack.enter_context(closing(in_order(encoder, texts, jobs))):
            documents += ended
            for f, ids in zip(raw.values(), carry(*streams) if streams else ()):
                f.write(ids)
            bar.update(size)
        seconds = time.perf_counter() - begin
        counts = {name: raw[name].tell() // dtypes[name].itemsize for name in raw if name.endswith("tokens")}
        counts |= {"documents": documents, "bytes": total}
        if not counts["tokens"]:
            raise SystemExit(f"{', '.join(map(str, sources))}: no text in it")
        stack.close()
        check_space(out, sum(f.stat().st_size for f in part.parent.iterdir()))
        bar.set_description(f"{kind}: writing {Path(out).name}")
        names = np.frombuffer(json.dumps([p.name for p in sources]).encode(), np.uint8)
        write_packed(part, kind, vocab, {name: (Path(f.name), dtypes[name], ()) for name, f in raw.items()}
                     | arrays | {"sources": names}, **attributes, **counts)
    rate = total / seconds / 1e6
    print0(f"{kind}: {counts['tokens']:,} tokens "
           + f"and {counts.get('clip_tokens', 0):,} of CLIP " * ("clip_tokens" in counts)
           + f"in {documents:,} documents from {total / 1e6:.1f} MB in {duration(seconds)} "
           f"({rate:.1f} MB/s) -> {Path(out).name}")
    return counts | {"seconds": seconds, "mb_per_s": rate}


def texts_of(path, least=1 << 19):
    """Yields (text, whether a line begins with it, whether it begins inside of a document, bytes read) of a
    file: its pieces, joined to `least` characters.

    So texts can be encoded apart from each other. A text of a line end stands behind the last document.
    """
    line_start, inside, pieces, length, size = True, False, [], 0, 0
    for piece, read in itertools.chain(read_pieces(path), [("", None)]):
        pieces, length, size = [*pieces, piece], length + len(piece), size + (read or 0)
        if length < least and read is not None:
            continue
        text, content = (whole := "".join(pieces)), whole.rstrip()
        yield text, line_start, inside, size
        if content:
            line_start, inside = False, True
        inside = inside and text.count("\n", len(content)) < 2 - line_start  # of the line, and of a blank one
        line_start, pieces, length, size = text.endswith("\n"), [], 0, 0
    if inside:
        yield "\n", True, True, 0


def words_of(text, line_start, inside):
    """-> (words of a text with spaces between them, documents that end in it); see texts_of.

    The word "\n" stands behind each document.
    """
    words, ended, lines = [], 0, text.split("\n")
    for i, line in enumerate(lines):
        if line and not line.isspace():
            words += line.split(" ")
            inside = True
        elif inside and (i > 0 or line_start) and i < len(lines) - 1:
            words.append("\n")
            inside, ended = False, ended + 1
    return words, ended


class TextEncoder:
    """Encodes one of texts_of -> (documents that end in it, its streams, bytes of ids, [] without words)."""

    def __init__(self, vocab):
        self.vocab, self.cache = vocab, {"\n": np.array([vocab.sep], vocab.dtype).tobytes()}

    def __call__(self, text, line_start, inside):
        words, ended = words_of(self.split(text), line_start, inside)
        return ended, self.streams(words) if words else []

    def split(self, text):
        return separate(text)

    def streams(self, words):
        return [b"".join(cached_words(words, self.vocab.encode_words, self.cache))]


class PairEncoder(TextEncoder):
    """The same with two tokenizers; the third stream is how many ids of the second begin with each id of the
    first, int64, and behind the last."""

    def __init__(self, vocab, tower):
        super().__init__(vocab)
        self.tower, self.cache = tower, {"\n": (self.cache["\n"], b"")}

    def split(self, text):
        return spaced(text)

    def both(self, words):
        return zip(self.vocab.encode_words(words), self.tower.encode_words(words))

    def streams(self, words):
        sides = list(zip(*cached_words(words, self.both, self.cache)))
        pieces, size = (np.fromiter(map(len, ids), np.int64, len(words)) // v.dtype.itemsize
                        for ids, v in zip(sides, (self.vocab, self.tower)))
        place = np.cumsum(pieces) - pieces  # a word's first word piece, or the next one there is
        return [*map(b"".join, sides), np.bincount(place, size, pieces.sum() + 1).astype(np.int64)]


def cached_words(words, encode, cache, longest=32, most=1 << 18):
    """Words (text between spaces) -> list of what encode(new words) makes of each; most are in the cache.

    Tokenizers never look across a space, so what they make of a word can be kept. The cache is bounded:
    `most` words of up to `longest` characters.
    """
    new = list(set(words).difference(cache))
    cache.update(zip(new, encode(new)))
    out = list(map(cache.__getitem__, words))
    for word in new if len(cache) > most else [word for word in new if len(word) > longest]:
        del cache[word]
    return out


def in_order(encoder, texts, jobs):
    """Yields (encoder(*text), size) of the (text, size), in their order, by `jobs` processes, 0 = one a core.

    Each process has two texts, so that it need not wait for the next, and memory is bounded.
    """
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if jobs == 1:
        yield from ((encoder(*text), size) for text, size in texts)
        return
    pipes, waiting = [], deque()  # to each process; (pipe, size) of the texts under way
    try:
        pipes += (start_worker() for _ in range(jobs))  # all, before the first has read anything
        for pipe in pipes:
            pipe.send(encoder)
        for number, (text, size) in enumerate(texts):
            done = []
            if len(waiting) == 2 * jobs:
                pipe, read = waiting.popleft()
                done = [(pipe.recv(), read)]
            waiting.append((pipes[number % jobs], size))
            waiting[-1][0].send(text)
            yield from done
        for pipe, size in waiting:
            yield pipe.recv(), size
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise SystemExit("one of the processes was ended, perhaps as memory was short; give fewer --jobs"
                         ) from None
    finally:
        for pipe in pipes:
            pipe.close()


def start_worker():
    """A pipe to a new process, see work; it ends when the pipe is closed, from any cause."""
    context = multiprocessing.get_context("spawn")  # a fork would lack the threads of the tokenizer
    ours, theirs = context.Pipe()
    resource_tracker.ensure_running()  # now, as its start unblocks signals
    # Ctrl-C and a scheduler's SIGTERM go to all; the first process ends the others
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        context.Process(target=work, args=(theirs,)).start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours


def work(pipe):
    """A process of start_worker: is sent an encoder, then texts, and sends what that makes of them.

    It reads in a thread, so that sending to it never waits.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    texts = queue.SimpleQueue()

    def read():
        with suppress(EOFError, OSError):  # of a closed pipe
            while True:
                texts.put(pipe.recv())
        texts.put(None)
    with suppress(EOFError, OSError):
        encoder = pipe.recv()
        threading.Thread(target=read, daemon=True).start()
        for text in iter(texts.get, None):
            pipe.send(encoder(*text))


# ---------------------------------------------------------------------------- videos


def parse_shard(shard):
    """"3/8" -> (3, 8); SystemExit where it is none."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise SystemExit(f"--shard {shard}: write i/n, such as 1/8, the first of 8 shards")
    return i, n


def in_shard(video, shard):
    """Whether shard (i, n) holds a video: the CRC-32 of its id is i - 1 modulo n, which no process must be
    told."""
    i, n = shard
    return zlib.crc32(video.encode(errors="surrogateescape")) % n == i - 1


def pack_videos(captions, feat2d, csv_file, vocab, out, feat3d="", skip_bad=False, shard="1/1") -> dict:
    """HowTo100M's layout -> one file: float16 frames at 1 per second, caption tokens with their seconds, ids.

    captions: caption.json {video id: {"start": [s], "end": [s], "text": [...]}}, or a folder, see
    read_captions. csv_file: with the columns
    video_id and task_id; only its videos are packed, in the order of the captions. feat2d, feat3d: folders of
    <video id>.npy, (n, D) at 1 and at 1.5 per second; 3D is resampled to 1 per second at index floor(1.5 t)
    and put behind 2D on the channel axis (paper 4.2). All problems are listed at once, the whole list in
    OUT.problems.txt; they end the program, or with skip_bad are left out. shard: i/n, packs the videos of
    in_shard alone, and "out.h5" becomes out-0000i-of-0000n.h5; where that is there already nothing is done.
    Returns the counts.
    """
    i, n = shard = parse_shard(shard)
    if n > 1:
        out = Path(out).with_name(f"{Path(out).stem}-{i:05d}-of-{n:05d}{Path(out).suffix}")
    folders = [Path(folder) for folder in (feat2d, feat3d) if folder]
    vocab = vocab if isinstance(vocab, Vocab) else open_vocab(vocab)
    if n > 1 and out.exists() and (held := open_packed(out, "videos", vocab))[1].hash == vocab.hash:
        print0(f"{out} is packed already; nothing is done")
        return {name: held[0][name] for name in ("videos", "captions", "frames", "tokens")} | {"problems": 0}
    check_files([csv_file] if Path(captions).is_dir() else [captions, csv_file], out)
    for folder in folders:
        if not folder.is_dir():
            what = "a file; give the folder" if folder.exists() else "no such folder"
            raise SystemExit(f"{folder}: {what} of features, <video id>.npy each")
    tasks = read_tasks(csv_file)
    widths, seconds = sample_features(folders, list(tasks))  # of all, so that shards agree
    tasks = {video: task for video, task in tasks.items() if in_shard(video, shard)}
    check_space(out, int(2 * 2 * sum(widths) * seconds * len(tasks)))
    problems, done, unnamed, silent = [], set(), 0, 0
    names, task, frame_offsets, caption_offsets, tokens = [], [], [0], [0], 0
    dtypes = {"frames": np.dtype(np.float16), "tokens": vocab.dtype, "token_offsets": np.dtype(np.int64),
              "start": np.dtype(np.float64), "end": np.dtype(np.float64)}
    bar = progress(None, len(tasks), "video", "videos")
    with atomic(out) as part, bar, ExitStack() as stack:
        raw = {name: stack.enter_context(open(part.with_name(f"{name}.raw"), "wb")) for name in dtypes}
        raw["token_offsets"].write(np.int64(0).tobytes())
        for video, row, _ in read_captions(captions, shard):
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
                    raw[name].write(np.asarray(value, dtypes[name]).tobytes())
                tokens += int(lengths[-1])
                frame_offsets.append(frame_offsets[-1] + len(frames))
                caption_offsets.append(caption_offsets[-1] + len(keep))
                names.append(video.encode())
                task.append(tasks[video])
        stack.close()
        problems += [("no captions", f"{video}: in {csv_file}, not in {captions}") for video in tasks
                     if video not in done]
        report(problems, f"{out}.problems.txt", skip_bad, len(tasks))
        if not names:
            raise SystemExit(f"{out}: no video is left to pack" + "; make fewer shards" * (n > 1))
        counts = {"videos": len(names), "captions": caption_offsets[-1], "frames": frame_offsets[-1],
                  "tokens": tokens}
        check_space(out, sum(f.stat().st_size for f in part.parent.iterdir()))
        bar.set_description(f"videos: writing {Path(out).name}")
        write_packed(part, "videos", vocab, {
            "video_id": np.array(names), "task": np.array(task, np.int64),
            "frame_offsets": np.array(frame_offsets), "caption_offsets": np.array(caption_offsets)} | {
            name: (Path(f.name), dtypes[name], (sum(widths),) if name == "frames" else ())
            for name, f in raw.items()}, d2=widths[0], d3=sum(widths[1:]),
            **({"shard": i, "shards": n} if n > 1 else {}), **counts)
    print0(f"videos: {len(names):,} videos, {counts['captions']:,} captions, {counts['frames']:,} frames of "
           f"{' + '.join(map(str, widths))} channels -> {Path(out).name}"
           + (f"; {silent:,} captions without a word left out" if silent else "")
           + (f"; {unnamed:,} videos with captions are not in {csv_file}" if unnamed else ""))
    return counts | {"problems": len(problems)}


def read_tasks(path):
    """{video id: task id} of a csv in HowTo100M_v1's columns; a video under several tasks keeps the first."""
    tasks = {}
    with open_text(path) as f:
        try:
            reader = csv.DictReader(io.TextIOWrapper(f, "utf-8-sig", newline=""))
            if not {"video_id", "task_id"} <= set(reader.fieldnames or []):
                raise SystemExit(f"{path}: no columns video_id and task_id in its first line")
            for row in reader:
                if not row["video_id"]:
                    raise SystemExit(f"{path}: line {reader.line_num}: no video_id")
                if abs(task := int(row["task_id"])) >= 2 ** 63:
                    raise ValueError(f"{task} is no number of a task")
                tasks.setdefault(row["video_id"], task)
        except (ValueError, TypeError, csv.Error) as error:
            raise SystemExit(f"{path}: line {reader.line_num}: task_id: {error}") from None
    if not tasks:
        raise SystemExit(f"{path}: names no video")
    return tasks


def sample_features(folders, videos):
    """-> (most frequent width in each folder, mean seconds a video), from about 100 files over the list.

    SystemExit where a folder's arrays agree in their first axis and not in their last: channels come first.
    """
    widths, lengths = [], []
    for folder in folders:
        found = (read_features(feature_file(folder, video), mmap_mode="r")[0]
                 for video in videos[::len(videos) // 100 + 1])
        shapes = [array.shape for array in found if array is not None]
        rows, columns = (Counter(axis).most_common() for axis in zip(*shapes or [(0, 0)]))
        if len(rows) == 1 and 2 * columns[0][1] <= len(shapes):
            raise SystemExit(f"{folder}: all arrays have {rows[0][0]} rows, and from {min(columns)[0]} to "
                             f"{max(columns)[0]} columns; (seconds, channels) is wanted: where channels come "
                             "first, save each array's transpose")
        widths.append(columns[0][0])
        lengths += [shape[0] for shape in shapes] if folder == folders[0] else []
    return widths, float(np.mean(lengths)) if lengths else 0.0


def feature_file(folder, video):
    """Path of a video's features: <video id>.npy, or named after the video's file as <video id>.mp4.npy."""
    paths = [folder / f"{video}{suffix}.npy" for suffix in ("", ".mp4", ".webm", ".mkv")]
    return next((path for path in paths if os.path.exists(path)), paths[0])  # False for names that cannot be


def read_features(path, mmap_mode=None):
    """-> ((n, D) array, None), or (None, (kind, text)) of a missing, empty, damaged or mis-shaped file."""
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        return None, ("missing", str(path))
    except Exception as error:  # whatever a damaged file makes numpy raise
        if os.path.isfile(path) and not os.path.getsize(path):
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
        path = feature_file(folder, video)
        array, problem = read_features(path)
        if array is not None and array.shape[1] != width:
            problem = ("mis-shaped", f"{path}: {array.shape[1]} channels, the others have {width}"
                       + "; its channels come first: transpose it" * (len(array) == width))
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


def report(problems, path, skip_bad, videos, outcome="nothing was packed"):
    """Lists problems, 20 of each kind on the screen, all in `path`; SystemExit unless skip_bad."""
    if not problems:
        Path(path).unlink(missing_ok=True)
        return
    with atomic(path) as part:
        part.write_text("".join(f"{kind}: {text}\n" for kind, text in problems), encoding="utf-8")
    kinds = Counter(kind for kind, _ in problems)
    for kind, count in kinds.items():
        listed = [text for k, text in problems if k == kind]
        print0("\n".join(f"{kind}: {text}" for text in listed[:20]))
        if count > 20:
            print0(f"{kind}: ... and {count - 20:,} more")
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    summary = f"{len(problems):,} problems in {videos:,} videos ({by_kind})"
    if not skip_bad:
        raise SystemExit(f"videos: {summary}; {outcome}. All are listed in {path}; mend them, or leave them "
                         "out with --skip-bad")
    print0(f"videos: left out {summary}; all are listed in {path}")
