"""Videos -> the pictures and clips that towers read (paper, section 4.2). Decodes by PyAV, which is FFmpeg.

2D features take 1 picture a second, a row each; 3D features 24, a row for 16 of them. Picture n is the last
frame with time < (n + 1/2) / fps, and there are floor(end * fps + 1/2), at least one, as FFmpeg's fps filter
rounds. A track that begins late repeats its first frame. Sizes and crops are those of HowTo100M's extractor
(github.com/antoine77340/video_feature_extractor) and of OpenAI's CLIP. Different from both: pictures are
turned upright first, and where pixels are not square the width is scaled.

What nobody can see: damage inside of VP8 and VP9, which decode any bits; a hole in a .mkv or .webm, behind
which the times go on; a cut of what holds no duration (.ts, live recordings of browsers).
"""
import contextlib
import queue
import threading
from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import torch
import torch.nn.functional as F

from prepare.captions import clock

FPS = {2: 1, 3: 24}  # pictures a second, by the rank of the tower
LENGTH = {2: 1, 3: 16}  # pictures that make a row of features; clips do not overlap
# what FFmpeg may read a file as: containers, and no playlist, which names other files and hosts
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
MISSING = 2  # seconds that may be missing at the end
DAMAGED = 0.01  # share of the frames that may be lost or corrupt
LATE = 60  # seconds that frames may last behind the end that the file tells
LONGEST = 100 * 3600  # seconds; a longer one has a broken time, and would be repeated rows
NARROWEST = 16  # times that a picture may be as long as it is wide, or the reverse


class BadVideo(Exception):
    """(kind, text) of a video whose features would not be what they claim to be."""


def load_av():
    """PyAV; SystemExit where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise SystemExit(f"PyAV, which decodes videos, cannot be imported ({error}); `pip install -r "
                         "requirements-video.txt`") from None
    return av


# ---------------------------------------------------------------------------- frames and their times


def open_video(path):
    """(container, its video track) of a file; BadVideo where it has none that can be read."""
    av = load_av()
    try:
        only = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(f"file:{path}", options=only, metadata_errors="replace")  # titles of any encoding
    except (av.error.FFmpegError, ValueError) as error:  # the latter of a path with a NUL
        raise BadVideo("unreadable", getattr(error, "strerror", None) or str(error)) from None
    cover = av.stream.Disposition.attached_pic
    track = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
    if track is None or track.codec_context is None:
        covers = len(container.streams.video)
        container.close()
        if track is None:
            raise BadVideo("no video track", "a picture that stands for sound" if covers else "sound at most")
        raise BadVideo("unreadable", "nothing here decodes its video")
    track.thread_type = "AUTO"
    return container, track


def first_tick(container, track):
    """Start of the container in ticks of the track: its microseconds are rounded to them, as FFmpeg does."""
    return floor(Fraction(container.start_time or 0, 10 ** 6) / track.time_base + Fraction(1, 2))


def timed_frames(container, track):
    """Yields (seconds, frame) in order, and (seconds at the end, None) at last; BadVideo where faults are.

    Seconds are exact Fractions from the start of the container. The end is that of the last frame, whose
    duration, where unknown, is the median distance of frames. A frame whose time lies before that of the one
    before it is left out, and counts as corrupt.
    """
    tick, frames, errors, corrupt = track.time_base, 0, 0, 0
    start, avi = first_tick(container, track), container.format.name == "avi"
    expected = expected_end(container, track, start)
    latest = min(expected + LATE, LONGEST) if expected else LONGEST
    last, end, distances = None, start, Counter()  # of frames, in ticks
    for frame in decoded(container, track):
        if frame is None:
            errors += 1
            continue
        frames += 1
        time = frame.dts if avi else frame.pts  # an .avi stores no pts: what stands there is a guess
        time = end if time is None else time
        backwards = last is not None and time < last
        corrupt += frame.is_corrupt or backwards
        if backwards:
            continue
        if last is not None:
            distances[time - last] += 1
        last, end = time, time + (frame.duration or 0)
        if (end - start) * tick > latest:
            raise BadVideo("damaged", f"a frame lasts to {float((end - start) * tick):.0f} s")
        yield (time - start) * tick, frame
    if not frames:
        raise BadVideo("no frames", "none can be decoded" + f", {errors} errors" * (errors > 0))
    seconds = (end + (median(distances) if end == last else 0) - start) * tick
    if seconds < expected - MISSING:
        raise BadVideo("truncated", f"{float(seconds):.1f} of {float(expected):.1f} s can be decoded")
    if errors + corrupt > DAMAGED * (errors + frames):
        raise BadVideo("damaged", f"{errors} errors and {corrupt} corrupt frames of {errors + frames}")
    yield seconds, None


def decoded(container, track):
    """Yields the frames of a track, and None for each error; behind one of the container nothing is read."""
    packets, error, ended = packets_of(container, track), load_av().error.FFmpegError, False
    while not ended:  # a decoder that cannot be opened has the same error for ever
        try:
            packet = next(packets, None)
            ended = packet is None
            if packet is not None and not packet.size and packet.dts is not None:
                continue  # the frame before it once more, in an .avi; it would end the decoder
            frames = track.decode(packet)  # None, or the empty last one: what the decoder holds back
        except EOFError:
            return
        except error:
            yield None
            continue
        yield from frames


def packets_of(container, track):
    """Yields the packets of a track, and an empty one at last."""
    with contextlib.suppress(IndexError):  # PyAV's, at the end of a .ts in which another track began midway
        yield from container.demux(track)


def median(counts):
    """The lower median of a Counter of numbers, 0 where it is empty."""
    half = sum(counts.values()) / 2
    for value in sorted(counts):
        half -= counts[value]
        if half <= 0:
            return value
    return 0


def expected_end(container, track, start):
    """Seconds at which the track must end: the earliest of what container and track tell; 0 = unknown.

    start: of the container, in ticks. Sound may be longer than the picture: .mp4 tells it of each track, .mkv
    and .webm in a tag (DURATION, mkvmerge's is DURATION-eng); in an .flv sound counts. An .avi that is cut
    tells no more than the number of its frames.
    """
    if container.format.name == "avi" and track.frames and track.average_rate:
        return track.frames / track.average_rate
    known = [Fraction(container.duration or 0, 10 ** 6)]
    if track.duration:
        known.append((track.duration + (track.start_time or 0) - start) * track.time_base)
    for name, text in track.metadata.items():
        with contextlib.suppress(ValueError, OverflowError):  # the latter of endless digits
            if name.startswith("DURATION"):
                known.append(Fraction(clock(text)) - start * track.time_base)
    return min((seconds for seconds in known if seconds > 0), default=Fraction(0))


def seconds_of(path):
    """Seconds of a video: what its file tells, or where its last packets end, whichever is less, so that the
    features reach there. Nothing is decoded. None where neither is known, or where it cannot be read."""
    try:
        container, track = open_video(path)
    except BadVideo:
        return None
    with container:
        start = first_tick(container, track)
        known = [expected_end(container, track, start)]
        with contextlib.suppress(load_av().error.FFmpegError, OverflowError):  # the latter of broken times
            container.seek(start + floor(known[0] / track.time_base), stream=track)
            end = max((packet.pts + (packet.duration or 0) for packet in packets_of(container, track)
                       if packet.pts is not None), default=start)
            known.append((end - start) * track.time_base)
    return float(min((seconds for seconds in known if seconds > 0), default=0)) or None


# ---------------------------------------------------------------------------- pictures


def upright(frame):
    """(whether rows and columns change places, axes of the result that are reversed) of a frame's display.

    Its display matrix [[a, b], [c, d]] puts what lies at (x, y) to (a x + c y, b x + d y); phones record a
    turned picture and write how to turn it back, and some mirror it.
    """
    try:
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    except KeyError:
        return False, ()
    a, b, c, d = matrix[[0, 1, 3, 4]].tolist()
    turned = abs(b) > abs(a)
    down, right = (b, c) if turned else (d, a)
    return turned, (0,) * (down < 0) + (1,) * (right < 0)


def side_lengths(width, height, short):
    """(width, height) with a short side of `short` and the other in proportion, truncated."""
    if max(width, height) > NARROWEST * min(width, height):
        raise BadVideo("unreadable", f"its pictures are {round(width)} x {height} pixels, one side more than "
                                     f"{NARROWEST} times the other")
    if width < height:
        return short, floor(Fraction(height) * short / width)
    return floor(Fraction(width) * short / height), short


class Pictures:
    """Frames of one track -> a tower's pictures, uint8 (3, H, W); see parts.towers.Tower for its wishes.

    Upright, the short side `size` pixels, the middle cut out or not. resize "ffmpeg": FFmpeg's scale filter,
    bicubic; the middle begins at floor((W - size) / 2). "pillow": bicubic with antialias, shrunk pictures are
    within 1 of Pillow's; of two places next to the middle it begins at the even one, as in torchvision.
    aspect: width of a pixel by its height.
    """

    def __init__(self, tower, aspect):
        self.tower, self.aspect = tower, aspect
        self.form, self.graph = None, None
        self.to_rgb = load_av().video.reformatter.VideoReformatter()  # a new one costs more than its work

    def __call__(self, frame):
        turned, reversed_axes = upright(frame)
        stored_size = side_lengths(frame.width * self.aspect, frame.height, self.tower.size)
        width, height = stored_size[::-1] if turned else stored_size
        pillow = self.tower.resize == "pillow"
        picture = self.to_rgb.reformat(frame, format="rgb24") if pillow else self.scaled(frame, *stored_size)
        picture = picture.to_ndarray()  # (H, W, 3)
        picture = np.flip(picture.swapaxes(0, 1) if turned else picture, reversed_axes)
        picture = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
        if pillow:
            picture = F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
        if self.tower.crop == "center":
            top, left = ((side - self.tower.size) / 2 for side in (height, width))
            top, left = (round(top), round(left)) if pillow else (floor(top), floor(left))
            picture = picture[:, top:top + self.tower.size, left:left + self.tower.size]
        return picture.contiguous()

    def scaled(self, frame, width, height):
        """The frame as RGB of that size by FFmpeg's scale filter; its graph serves all frames of one form."""
        form = frame.width, frame.height, frame.format.name, width, height
        if form != self.form:
            graph = load_av().filter.Graph()
            graph.link_nodes(
                graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name,
                                 time_base=frame.time_base),
                graph.add("scale", f"{width}:{height}:flags=bicubic"), graph.add("format", "pix_fmts=rgb24"),
                graph.add("buffersink")).configure()
            self.form, self.graph = form, graph
        self.graph.vpush(frame)
        return self.graph.vpull()


def read_video(path, towers):
    """Yields (place in `towers`, a row of its features before the tower) of a video, which is decoded once.

    uint8: a picture (3, H, W) for a tower of rank 2, a clip (3, 16, H, W) of rank 3, whose last is filled up
    with black pictures. BadVideo where the video has a fault, mostly at the end.
    """
    container, track = open_video(path)
    makers = [Pictures(tower, track.sample_aspect_ratio or 1) for tower in towers]
    clips, taken, former = [[] for _ in towers], [0] * len(towers), None
    with container:
        try:
            for time, frame in timed_frames(container, track):
                for i, tower in enumerate(towers):
                    due = max(floor(time * FPS[tower.rank] + Fraction(1, 2)), 1 if frame is None else 0)
                    if former is None or due <= taken[i]:
                        continue
                    picture = makers[i](former)
                    for _ in range(due - taken[i]):
                        clips[i].append(picture)
                        if len(clips[i]) == LENGTH[tower.rank]:
                            yield i, row_of(clips[i], tower.rank)
                            clips[i] = []
                    taken[i] = due
                former = frame
        except load_av().error.FFmpegError as error:
            raise BadVideo("unreadable", error.strerror) from None
    for i, tower in enumerate(towers):
        if clips[i]:
            black = [torch.zeros_like(clips[i][0])] * (LENGTH[tower.rank] - len(clips[i]))
            yield i, row_of(clips[i] + black, tower.rank)


def row_of(pictures, rank):
    """The picture itself, or the clip (3, 16, H, W) of 16 of them."""
    return pictures[0] if rank == 2 else torch.stack(pictures, 1)


# ---------------------------------------------------------------------------- a thread that decodes


def ahead(items, size):
    """Yields the items of a generator that a thread runs, which is at most `size` of them ahead."""
    full, stop = queue.Queue(size), threading.Event()

    def put(item, error=None):
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return full.put((item, error), timeout=0.1)

    def work():
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # whatever it is, it belongs to who reads
            put(None, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = full.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
