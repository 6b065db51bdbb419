"""Ids from file names, captions of five kinds of files, and the caption.json and csv that both come to.

Text stays natural: stop words are kept. (HowTo100M's own caption.json has lost them: do not mix the two.)
Needs neither torch nor av.
"""
import csv
import html
import io
import json
import math
import os
import re
from pathlib import Path

from common import atomic, one_line, progress, read_json, read_text

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv",
          ".wmv", ".3gp", ".ogv")
CAPTIONS = (".srt", ".vtt", ".json3", ".json", ".csv")
LONGEST_ID = 160  # bytes; .npy and the names of host and process stand behind it while features are written

# ---------------------------------------------------------------------------- names

YT_DLP = re.compile(r"\[([A-Za-z0-9_-]{11})\]$")  # YouTube's ids; [2019] or [1080p] behind a title is none
LANG = re.compile(r"\.([A-Za-z]{2,3}(?:[_-][A-Za-z0-9_-]+)?)$")  # .en, .en-US, .en-orig, .zh-Hans, .pt_BR


def video_id(path):
    """Id of a video or a caption file: its stem, or YouTube's id where yt-dlp put it last, `talk [ID].mp4`.

    The stem of captions ends before their language: talk.en.vtt, talk.en-US.srt, talk [ID].de.json3.
    """
    path = Path(path)
    return id_of(LANG.sub("", path.stem) if path.suffix.lower() in CAPTIONS else path.stem)


def id_of(stem):
    """Id of a stem: the whole, or YouTube's id at its end."""
    found = YT_DLP.search(stem)
    return found[1] if found else stem


def walk(folder, endings):
    """Paths of the files with these endings in a folder and its sub-folders, sorted.

    Hidden ones are left out: `._talk.mp4` is what macOS leaves beside talk.mp4, and no video. Links to
    folders are followed, but no folder is entered twice: a link may lead back to where it is.
    """
    def stop(error):
        raise error
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder}: no such folder of videos")
    paths, entered = [], set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        # sorted: of two ways to a folder the same counts everywhere
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(place, name) for name in files
                  if not name.startswith(".") and Path(name).suffix.lower() in endings]
    return sorted(paths)


def find_videos(folder):
    """-> ({id: path} of the videos in a folder and its sub-folders, {id: (kind, text)} of those refused).

    Both are sorted. Refused are files of one id, and names too long or not UTF-8, which no JSON can hold.
    """
    found, videos, refused = {}, {}, {}
    for path in walk(folder, VIDEOS):
        found.setdefault(video_id(path), []).append(path)
    if not found:
        raise SystemExit(f"{folder}: no video in it, none of {' '.join(VIDEOS)}")
    for video, paths in sorted(found.items()):
        if re.search("[\ud800-\udfff]", str(paths[0].relative_to(folder))):  # Python's mark of other bytes
            refused[video] = "unreadable", one_line(f"{paths[0]}: its name is not UTF-8; rename it")
        elif len(video.encode()) > LONGEST_ID:
            refused[video] = "unreadable", one_line(f"{paths[0]}: its name is too long; rename it")
        elif len(paths) > 1:
            refused[video] = "duplicate", one_line(f"{video}: the id of {both(paths)}; rename or remove one")
        else:
            videos[video] = paths[0]
    return videos, refused


def both(paths):
    """'a and b', with ' (and 3 more)' where there are more."""
    return f"{paths[0]} and {paths[1]}" + (f" (and {len(paths) - 2} more)" if len(paths) > 2 else "")


# ---------------------------------------------------------------------------- reading

ADVICE = "mend it or fetch it anew"
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<\d+:[\d:.]+>|\{\\[^{}]*\}")  # <i>, </c>, <00:00:01.000>, {\an8}
ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|\w{1,31});", re.A)  # "AT&T" and "R&D" have none
CLOCK = re.compile(r"(-?)(?:(\d+):)?(\d+):(\d+(?:[.,]\d*)?)", re.A)  # 01:02:03,004 or 02:03.004
SCREEN = 100  # lines that a cue may show: bounds the search for repeated ones
LAST = 5  # seconds of a last caption without an end


def read_captions_file(path, length=None):
    """[(start, end, text)] of a caption file, by start; seconds, rounded to milliseconds.

    .srt, .vtt   cues; what a rolling file (see `unrolled`) repeats is dropped
    .json3       YouTube's events: tStartMs, dDurationMs, segs of utf8
    .json        Whisper's segments: start, end, text (or YouTube's events)
    .csv         columns start, end, text; seconds or 01:02:03,5

    Text is without tags, its entities are unescaped once, white space is one space, empty captions are
    dropped. An end that is missing is the next later start; the last one's is 5 s behind its start. Ends are
    cut to `length`, seconds of the video, but not to before their starts. An end that the FILE puts before
    its start, or a time before 0, stays: `collect` tells. SystemExit names what cannot be read.
    """
    path = Path(path)
    read = {".json": json_cues, ".json3": json_cues, ".csv": csv_cues}.get(path.suffix.lower(), timed_cues)
    cues = sorted((cue for cue in read(path) if cue[2]), key=lambda cue: cue[0])
    if far := [t for start, end, _ in cues for t in (start, end or 0) if not abs(t) < 1e9]:
        raise SystemExit(f"{path}: a time is {far[0]:g} s; {ADVICE}")
    whole, later, after = [], None, None  # after: the start behind; later: the nearest that is larger
    for start, end, text in reversed(cues):
        if after is not None and after > start:
            later = after
        after = start
        if end is None:
            end = start + LAST if later is None else later
        if length is not None:
            end = min(end, max(start, length))
        whole.append((round(start, 3), round(end, 3), text))
    return whole[::-1]


def plain(text):
    """Text without tags, with its entities unescaped once and single spaces."""
    text = TAG.sub(lambda tag: " " if tag[0].lower().startswith("<br") else "", text)
    return " ".join(ENTITY.sub(lambda entity: html.unescape(entity[0]), text).split())


def clock(text):
    """'1:02:03,5', '02:03.5' -> seconds; ValueError where it is no time."""
    match = CLOCK.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text.strip()!r} is no time")
    sign, hours, minutes, rest = match.groups()
    value = 3600 * float(hours or 0) + 60 * float(minutes) + float(rest.replace(",", "."))
    return -value if sign else value


def timed_cues(path):
    """(start, end, text) of each cue of a .srt or .vtt file.

    In .vtt an empty line ends a cue (one of a space does not), and what stands before the next times is a
    name or a note. In .srt only the next number and times do: the text of some has empty lines.
    """
    text = read_text(path, ADVICE)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    times = {}  # of the lines that hold them
    for i, line in enumerate(lines):
        start, arrow, rest = line.partition("-->")
        try:
            if arrow:
                times[i] = clock(start), clock((rest.split() or [""])[0])  # settings may stand behind
        except ValueError as error:
            if re.search(r"\d:\d", line):  # else an arrow in the text
                raise SystemExit(f"{path}, line {i + 1}: {error}; {ADVICE}") from None
    vtt, cues = text.startswith("WEBVTT"), []
    if not times and not vtt:
        raise SystemExit(f"{path}: has no line such as 00:00:01,000 --> 00:00:02,500; {ADVICE}")
    for i, behind in zip(times, [*times, len(lines)][1:]):
        shown = lines[i + 1:behind]
        if vtt and "" in shown:
            shown = shown[:shown.index("")]
        elif shown and shown[-1].strip().isdecimal() and behind < len(lines):
            shown.pop()  # the next cue's number
        cues.append((*times[i], [line for line in map(plain, shown) if line]))
    return [(start, end, " ".join(shown)) for start, end, shown in unrolled(cues, text)]


def unrolled(cues, text):
    """Cues (start, end, lines) without the lines that a rolling file repeats; of others all.

    YouTube's generated captions roll: a line shows up in a cue of its own, and again above the next one.
    A file rolls where it has times inside of lines, or more than half of its cues begin with the last line of
    the cue before. Of each cue the longest run of leading lines goes that ends the cue before.
    """
    befores = [[], *(shown for *_, shown in cues)]
    repeats = sum(shown[:1] == before[-1:] != [] for before, (*_, shown) in zip(befores, cues))
    if not re.search(r"<\d+:[\d:.]+>", text) and 2 * repeats <= len(cues):
        return cues
    kept = []
    for before, (start, end, shown) in zip(befores, cues):
        runs = range(min(len(shown), len(before), SCREEN), 0, -1)
        kept.append((start, end, shown[next((n for n in runs if shown[:n] == before[-n:]), 0):]))
    return kept


def json_cues(path):
    """(start, end or None, text) of YouTube's events or Whisper's segments."""
    value = read_json(path, ADVICE)
    kind = next((kind for kind in ("events", "segments") if isinstance(value.get(kind), list)), None)
    if not kind:
        raise SystemExit(f"{path}: neither YouTube's (events) nor Whisper's (segments); {ADVICE}")
    cues = []
    for i, item in enumerate(value[kind]):
        try:
            if kind == "segments":
                text, start, end = item["text"], item["start"], item.get("end")
                cues.append((number(start), None if end is None else number(end), plain(text)))
            elif text := plain("".join(part.get("utf8", "") for part in item.get("segs") or [])):
                start, lasts = number(item.get("tStartMs")) / 1000, item.get("dDurationMs")
                cues.append((start, None if lasts is None else start + number(lasts) / 1000, text))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise SystemExit(f"{path}: {kind}, number {i + 1}: {type(error).__name__} {error}; "
                             f"{ADVICE}") from None
    return cues


def number(value):
    """A number of a JSON file as float; ValueError where it is none."""
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.40} is no time")
    return float(value)


def csv_cues(path):
    """(start, end or None, text) of the rows of a .csv file."""
    rows, cues = csv.DictReader(io.StringIO(read_text(path, ADVICE), newline=""), strict=True), []
    try:
        if not {"start", "text"} <= set(rows.fieldnames):
            raise ValueError("no columns start, end and text")
        for row in rows:
            if None in row or row["text"] is None or row["start"] is None:
                raise ValueError("has more or fewer cells than the first line; text with commas needs quotes")
            start, end = (clock(time) if ":" in time else float(time.replace(",", ".")) if time else None
                          for time in (row["start"].strip(), (row.get("end") or "").strip()))
            if start is None:
                raise ValueError("no start")
            cues.append((start, end, plain(row["text"])))
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{path}, line {rows.line_num}: {error}; {ADVICE}") from None
    return cues


# ---------------------------------------------------------------------------- a folder


def collect(folder, videos, lengths=None, lang=""):
    """Captions of `videos` (see find_videos), anywhere in the folder -> (captions, rows, problems).

    captions: {id: {"start": [s], "end": [s], "text": [...]}}, as prepare.packing.pack_videos reads them, for
    `write_captions`. rows: [(id, task)] of the same videos, for `write_tasks`. A task is the sub-folder
    (a/b/talk.mp4: a/b/), or the id of a video that is in none: vokens are clips of one task each as long as
    there are any (data.VideoClips.voken_clips), so videos of one kind belong into a folder of their own.
    lengths: {id: seconds}; where there is none, nothing is cut. lang: of several files of a video only those
    in this language count, en also where there is only en-US or no language is named.

    problems: [(kind, text)], kinds "duplicate" (two caption files), "no captions", and "captions" for a file
    that cannot be read, and for captions that end before they start, begin before 0 or more than 2 s behind
    the video's end. Only these captions are left out, and in any case those that begin behind the last row of
    features, floor(length + 0.5).
    """
    problems, captions, rows = [], {}, []
    files = caption_files(folder, videos)
    for video, path in progress(videos.items(), len(videos), "video", "captions"):
        chosen = in_language(files.get(video, []), lang)
        if not chosen:
            why = (f"none in --lang {lang}, but {files[video][0][1].name}" if video in files else
                   f"no {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]} file of this name")
            problems.append(("no captions", one_line(f"{path}: {why}")))
        elif len(chosen) > 1:
            problems.append(("duplicate", one_line(f"{video}: has captions {both(chosen)}; remove one, or "
                                                   "choose a language, such as --lang en")))
        if len(chosen) != 1:
            continue
        length = (lengths or {}).get(video)
        try:
            cues = read_captions_file(chosen[0], length)
        except SystemExit as end:
            problems.append(("captions", one_line(str(end))))
            continue
        row, found = checked(cues, length)
        problems += [(kind, one_line(f"{chosen[0]}: {text}")) for kind, text in found]
        if row["text"]:
            captions[video] = row
            task = path.parent.relative_to(folder).as_posix()
            rows.append((video, video if task == "." else f"{task}/"))  # talk.mp4 is none of the folder talk
    return captions, rows, problems


def caption_files(folder, videos):
    """{id: [(language or "", path)]} of the caption files of `videos`."""
    files = {}
    for path in walk(folder, CAPTIONS):
        found = LANG.search(path.stem)
        if id_of(path.stem) in videos:  # also of a video that is itself called talk.en.mp4
            files.setdefault(id_of(path.stem), []).append(("", path))
        elif found and video_id(path) in videos:
            files.setdefault(video_id(path), []).append((found[1].lower().replace("_", "-"), path))
    return files


def in_language(files, lang):
    """The paths of [(language, path)] in `lang`: en itself, else en-US and the like, else without a name."""
    lang = lang.lower().replace("_", "-")
    tests = ([lambda name: True] if not lang else
             [lambda name: name == lang, lambda name: name.startswith(f"{lang}-"), lambda name: not name])
    return next((chosen for test in tests if (chosen := [path for name, path in files if test(name)])), [])


def checked(cues, length):
    """A video's captions -> ({"start", "end", "text"}, what is wrong, [(kind, text)]); see `collect`."""
    negative = [start for start, end, _ in cues if end < start or start < 0]
    kept = [cue for cue in cues if cue[1] >= cue[0] >= 0]
    behind, problems = [], []
    if length is not None:
        behind = [start for start, *_ in kept if start > length + 2]
        kept = [cue for cue in kept if cue[0] < max(1, math.floor(length + 0.5))]
    if negative:
        problems.append(("captions", f"{len(negative)} of {len(cues)} captions end before they start, or "
                                     f"begin before 0, the first at {negative[0]:g} s; mend them"))
    if behind:
        problems.append(("captions", f"{len(behind)} of {len(cues)} captions begin behind the video's end "
                                     f"({length:g} s), the first at {behind[0]:g} s; are they another's?"))
    if not kept and not problems:
        problems.append(("no captions", "holds none within the video"))
    return dict(zip(("start", "end", "text"), map(list, zip(*kept) if kept else ((), (), ())))), problems


# ---------------------------------------------------------------------------- writing


def write_captions(captions, out):
    """Writes {id: {"start", "end", "text"}} as caption.json, a video a line."""
    with atomic(out) as part:
        with open(part, "w", encoding="utf-8") as f:
            for i, (video, row) in enumerate(captions.items()):
                f.write(f"{',' if i else '{'}\n{json.dumps(video)}: {json.dumps(row, ensure_ascii=False)}")
            f.write("\n}\n" if captions else "{}\n")


def write_tasks(rows, out):
    """Writes [(id, task)] as a csv with the columns video_id, task_id (0, 1, ... in the order of the tasks'
    names), as prepare.packing.read_tasks reads it, and task, the name."""
    numbers = {task: i for i, task in enumerate(sorted({task for _, task in rows}))}
    with atomic(out) as part:
        with open(part, "w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["video_id", "task_id", "task"])
            writer.writerows((video, numbers[task], task) for video, task in rows)
