"""From one's own videos to features in HowTo100M's layout (paper, section 4.2), which data.py videos packs.

    python features.py captions videos/ --out caption.json --csv_out videos.csv
    python features.py videos videos/ --weights2d ViT-B-32.pt --feat2d feat2d/

--weights3d FILE --feat3d feat3d/ adds 3D features. A video is decoded once for both towers, in a thread that
runs ahead of them; memory does not grow with its length, but for its rows. What is done is skipped: after an
end of any kind the same command goes on, and n machines share a folder of videos by --shard 1/n to n/n. Needs
PyAV: pip install -r requirements-video.txt. See docs/your-videos.md.
"""
import argparse
import contextlib
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import (Parser, atomic, clear_up_on_sigterm, convert, duration, one_line, one_line_end, peek_json,
                    print0, progress, spelled, write_json)
from parts.machine import init_ranks
from parts.towers import load_tower
from prepare.captions import collect, find_videos, write_captions, write_tasks
from prepare.packing import check_files, in_shard, parse_shard, read_features, report
from prepare.video import FPS, LENGTH, BadVideo, ahead, load_av, read_video, seconds_of
from run import file_hash, out_of_memory

# ---------------------------------------------------------------------------- captions


def captions(folder, out, csv_out, lang="", skip_bad=False):
    """Captions beside the videos of a folder -> caption.json and a csv of videos and tasks; see collect."""
    for path in (out, csv_out):
        check_files([], path)
    if Path(out).resolve() == Path(csv_out).resolve():
        raise SystemExit(f"--csv_out {csv_out}: is --out, too; give another")
    load_av()
    videos, refused = find_videos(folder)
    bar = progress(videos.items(), len(videos), "video", "lengths")
    lengths = {video: seconds for video, path in bar if (seconds := seconds_of(path))}
    found, rows, problems = collect(folder, videos, lengths, lang)
    problems = [*refused.values(), *problems]
    report(problems, f"{out}.problems.txt", skip_bad, len(videos), "nothing was written")
    if not found:
        raise SystemExit(f"{folder}: no video with captions is left")
    write_captions(found, out)
    write_tasks(rows, csv_out)
    print0(f"captions: {len(found):,} videos, {sum(len(row['text']) for row in found.values()):,} captions, "
           f"{len({task for _, task in rows}):,} tasks -> {Path(out).name}, {Path(csv_out).name}")


# ---------------------------------------------------------------------------- features of videos


class Extractor:
    """A tower, the folder of its features, and the features of the video at hand."""

    def __init__(self, path, folder, rank, normalize, device, batch_size, quick_gelu):
        self.tower = load_tower(path, rank, quick_gelu).to(device)
        self.rank, self.folder, self.flag, self.normalize = rank, Path(folder), f"--feat{rank}d", normalize
        self.device, self.batch_size = device, batch_size
        self.settings = {"weights": file_hash(path), "normalize": normalize} | {
            "tower": self.tower.name, "width": self.tower.width, "size": self.tower.size,
            "crop": self.tower.crop, "resize": self.tower.resize, "scale": self.tower.scale,
            "mean": list(self.tower.mean), "std": list(self.tower.std)}
        self.waiting, self.features = [], []  # pictures or clips; arrays of a batch each

    def __str__(self):
        tower, size = self.tower, self.tower.size
        crop = f", the middle {size} taken" if tower.crop == "center" else ", uncropped"
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (tower.mean, tower.std))
        rows = FPS[self.rank] / LENGTH[self.rank]  # a second
        return (f"{self.rank}D: {tower.name} -> {self.folder}: {rows:g} row{'s' * (rows != 1)} of "
                f"{tower.width} a second, {'of length 1' if self.normalize else 'not normalised'}; pictures: "
                f"short side {size}{crop}; pixels: (x / {tower.scale:g} - mean {mean}) / std {std}")

    def claim_folder(self):
        """Makes the folder; SystemExit where it holds features of other settings."""
        path = self.folder / "settings.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise SystemExit(f"{self.folder}: a file; {self.flag} is a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(self.folder.glob("*.npy")):
                raise SystemExit(f"{self.folder}: holds features, and no settings.json that tells of which "
                                 f"weights; give another {self.flag}")
            write_json(path, self.settings)
        self.check_settings()

    def check_settings(self):
        """SystemExit where the folder is, perhaps since a moment ago, of other settings."""
        path = self.folder / "settings.json"
        found = peek_json(path)
        for name, value in self.settings.items():
            if found.get(name) != value:
                raise SystemExit(f"{path}: {name} of the features here is {found.get(name)}, not {value}; "
                                 f"give another {self.flag}")

    def path(self, video):
        return self.folder / f"{video}.npy"

    def done(self, video):
        """Whether the features of a video are there, readable and of the right width."""
        array, _ = read_features(self.path(video), mmap_mode="r")
        return array is not None and array.dtype == np.float16 and array.shape[1] == self.tower.width

    def add(self, item):
        """Takes the next picture or clip; features are computed in batches of one shape and one video."""
        if self.waiting and (len(self.waiting) == self.batch_size or item.shape != self.waiting[0].shape):
            self.compute()
        self.waiting.append(item)

    def compute(self):
        """Features of what waits: in bfloat16 on a GPU, but for 3D, whose pixels may be from 0 to 255."""
        pixels = torch.stack(self.waiting)
        kind = self.device.type
        half = torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and self.rank == 2)
        try:
            with torch.inference_mode(), half:
                features = self.tower(pixels.to(self.device)).float()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise SystemExit(f"--batch_size {self.batch_size}: {self.tower.name} needs more memory for "
                             f"{' x '.join(map(str, pixels.shape))} pixels than there is; lower it") from None
        if self.normalize:
            features = F.normalize(features, dim=1)
        self.features.append(features.half().cpu().numpy())
        self.waiting = []

    def finish(self):
        """Features of the video at hand, float16 (rows, D); BadVideo where they are not finite."""
        self.check_settings()  # of two that began at once with different ones, the last to write them stays
        self.compute()
        features, self.features = np.concatenate(self.features), []
        if not np.isfinite(features).all():
            raise BadVideo("not finite", f"{self.tower.name} gives values that are NaN or beyond 65504")
        return features

    def drop(self, video):
        """Forgets the video at hand and removes its features, which are damaged if there are any."""
        self.waiting, self.features = [], []
        self.path(video).unlink(missing_ok=True)


def items_of(todo):
    """Yields (place in `todo`, place of its extractor, picture or clip); behind a video (place, None, fault).

    todo: [(video, path, extractors)]. fault: BadVideo or None.
    """
    for at, (_, path, extractors) in enumerate(todo):
        fault = None
        try:
            for place, item in read_video(path, [extractor.tower for extractor in extractors]):
                yield at, place, item
        except BadVideo as bad:
            fault = bad
        yield at, None, fault


def extract(todo, batch_size):
    """Writes the features of the videos in `todo`, see items_of -> (problems [(kind, text)], seconds)."""
    problems, seconds, pictures, begin, shown = [], 0.0, 0, time.perf_counter(), 0.0
    items = ahead(items_of(todo), 2 * batch_size)
    with progress(None, len(todo), "video", "features") as bar, contextlib.closing(items):
        for at, place, item in items:
            video, path, extractors = todo[at]
            if place is not None:
                rank = extractors[place].rank
                extractors[place].add(item)
                pictures += LENGTH[rank]
                seconds += LENGTH[rank] / FPS[rank] * (place == 0)
            else:
                try:
                    if item is not None:
                        raise item
                    made = [extractor.finish() for extractor in extractors]
                    for extractor, features in zip(extractors, made):
                        with atomic(extractor.path(video)) as part:
                            np.save(part, features)
                except BadVideo as bad:
                    kind, text = bad.args
                    problems.append((kind, one_line(f"{path}: {text}")))
                    for extractor in extractors:
                        extractor.drop(video)
                bar.update()
            if (lasted := time.perf_counter() - begin) > shown + 1:
                bar.set_postfix_str(f"{seconds / 3600:.1f} h, {pictures / lasted:.0f} frames/s")
                shown = lasted
    return problems, seconds


def videos(folder, weights2d, feat2d, weights3d="", feat3d="", normalize=True, shard="1/1",
           skip_bad=False, device="auto", batch_size=64, quick_gelu=False):
    """Features of the videos in a folder and its sub-folders -> <id>.npy, float16 (rows, D), by each tower.

    Flags are those of the command line. What cannot be trusted is listed at the end, and has no file; it ends
    the program with an error unless skip_bad.
    """
    load_av()
    i, n = shard = parse_shard(shard)
    if not 1 <= batch_size <= 10 ** 5:
        raise SystemExit(f"--batch_size {batch_size}: must be from 1 to 100,000")
    if bool(weights3d) != bool(feat3d):
        raise SystemExit("--weights3d and --feat3d belong together; give both or none")
    if feat3d and Path(feat3d).resolve() == Path(feat2d).resolve():
        raise SystemExit(f"--feat3d {feat3d}: is --feat2d, too; files of one name would be two things")
    found, refused = find_videos(folder)
    found = {video: path for video, path in found.items() if in_shard(video, shard)}
    ranks = init_ranks(device)
    if ranks.size > 1:
        raise SystemExit(f"torchrun started {ranks.size} processes, which would do the same; start n without "
                         "it, with --shard i/n, each with its CUDA_VISIBLE_DEVICES")
    flags = (normalize, ranks.device, batch_size, quick_gelu)
    extractors = [Extractor(weights2d, feat2d, 2, *flags)]
    if weights3d:
        extractors.append(Extractor(weights3d, feat3d, 3, *flags))
    for extractor in extractors:
        extractor.claim_folder()
        for video, (kind, _) in refused.items():
            if kind == "duplicate":  # made of one of the files before the other came
                extractor.drop(video)
        print0(extractor)
    missing = ((video, path, [extractor for extractor in extractors if not extractor.done(video)])
               for video, path in found.items())
    todo = [(video, path, missed) for video, path, missed in missing if missed]
    print0(f"videos: {len(found):,} in {folder}" + f", shard {i} of {n}" * (n > 1)
           + f": {len(found) - len(todo):,} are done, {len(todo):,} to do on {ranks.device}")
    begin = time.perf_counter()
    faults, seconds = extract(todo, batch_size)
    lasted = time.perf_counter() - begin
    if todo:
        print0(f"videos: {len(todo) - len(faults):,} done, {duration(seconds)} in {duration(lasted)} "
               f"({seconds / lasted:.1f} times as fast as they play)")
    name = f"problems-{i}-of-{n}.txt" if n > 1 else "problems.txt"
    problems = [*refused.values(), *faults]
    report(problems, Path(feat2d) / name, skip_bad, len(found), "the others' features are written")


@one_line_end()
def main(argv=None):
    """Runs the command in `argv`; dashes and underscores in flags are equal."""
    parser = Parser(prog="features.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="captions|videos")

    def command(function, text):
        one = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        one.set_defaults(function=function)
        one.add_argument("folder", help="videos, in sub-folders, too; a sub-folder is a task")
        one.add_argument("--skip_bad", action="store_true",
                         help="end well without what is missing or broken; it is listed in any case")
        return one.add_argument

    def switch(name):
        return dict(type=partial(convert, name, kind=bool), nargs="?", const=True)

    add = command(captions, "collect the captions beside videos: .srt, .vtt, .json3, Whisper's .json, .csv")
    add("--out", required=True, help="caption.json to write")
    add("--csv_out", required=True, help="csv of the videos and their tasks to write")
    add("--lang", default="", help="language of the captions where videos have several, such as en")
    add = command(videos, "compute features of videos by pre-trained towers")
    add("--weights2d", required=True,
        help="ResNet-152 (.pth), or CLIP: OpenAI's ViT-B-32.pt or Hugging Face's folder")
    add("--feat2d", required=True, help="folder to write <id>.npy to, 1 row a second")
    add("--weights3d", default="", help="kenshohara's ResNeXt-101 or ResNet (.pth); default: 2D alone")
    add("--feat3d", default="", help="folder of these, 1.5 rows a second")
    add("--normalize", **switch("normalize"), default=True, help="rows of length 1 (default true)")
    add("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the videos (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--batch_size", type=partial(convert, "batch_size", kind=int), default=64,
        help="pictures or clips that a tower takes at once (default 64)")
    add("--quick_gelu", **switch("quick_gelu"), default=False,
        help="of CLIP, where its file does not tell its activation (default false)")
    flags = vars(parser.parse_args([spelled(arg, "_") for arg in (sys.argv[1:] if argv is None else argv)]))
    function, _ = flags.pop("function"), flags.pop("command")
    try:
        function(**flags)
    except KeyboardInterrupt as end:
        sys.exit(f"features.py: {str(end) or 'interrupted'}; what is written is whole, and the same command "
                 "goes on from there")


if __name__ == "__main__":
    clear_up_on_sigterm()
    main()
