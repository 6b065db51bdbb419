"""Makes a folder to try features.py on: videos in which a coloured square moves, captions of every kind that say
so, broken videos, and towers of random weights.

    python tests/make_videos.py made            # videos/, broken/, small2d.pt, small3d.pth: seconds, 3 MB
    python tests/make_videos.py made --full     # also long/, a minute of 854 x 480, and towers of the true sizes, 0.4 GB

.ci/run and docs/your-videos.md use it; what the towers give means nothing. Needs requirements-video.txt.
"""
import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401  the way to the sources
import numpy as np
import torch

from parts.towers import ResNet, ResNetConfig
from parts.weights import hollow
from prepare.video import load_av

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
WAYS = {"to the right": (0, 1), "to the left": (0, -1), "down": (1, 0), "up": (-1, 0)}
FPS, TICK, SECONDS = 25, Fraction(1, 25), 2  # seconds of a scene, in which one square moves one way
# video, seconds, its captions: a folder is a task
VIDEOS = (("cook/soup.mp4", 12, "soup.en.vtt"), ("cook/bread [Bm9K2xQ7vLe].webm", 10, "bread [Bm9K2xQ7vLe].en.json3"),
          ("cook/salad.mkv", 11, "salad.srt"), ("garden/roses.mp4", 9, "roses.json"),
          ("garden/-hedge.mov", 10, "-hedge.csv"), ("garden/pond.ts", 12, "pond.en-US.vtt"),
          ("tour.mp4", 8, "tour.en.srt"), ("walk.avi", 10, "walk.vtt"))


def scenes(video, seconds):
    """[(colour, way)] of a video, drawn by its name."""
    rng = np.random.default_rng(list(video.encode()))
    return [(list(COLOURS)[rng.integers(4)], list(WAYS)[rng.integers(4)]) for _ in range(0, seconds, SECONDS)]


def picture(plan, i, width=160, height=120, ground=None):
    """Frame i of the scenes in `plan`: (height, width, 3)."""
    colour, way = plan[min(i // (FPS * SECONDS), len(plan) - 1)]
    share = (i % (FPS * SECONDS)) / (FPS * SECONDS) - 0.5
    y, x = (int(side * (0.5 + 0.6 * share * step)) for side, step in zip((height, width), WAYS[way]))
    side = height // 5
    frame = np.full((height, width, 3), 70, np.uint8) if ground is None else ground(i)
    frame[max(0, y - side):y + side, max(0, x - side):x + side] = COLOURS[colour]
    return frame


def sentences(plan):
    """[(start, end, text)] of the scenes."""
    return [(SECONDS * n, SECONDS * (n + 1), f"and now a {colour} square goes {way} & stops")
            for n, (colour, way) in enumerate(plan)]


def clock(seconds, point="."):
    return f"00:{seconds // 60:02d}:{seconds % 60:02d}{point}000"


def captions(path, cues):
    """Writes [(start, end, text)] as a file of the kind that its suffix names; of "en-US" one that rolls."""
    kind = path.suffix
    if kind == ".srt":
        text = "".join(f"{n}\n{clock(start, ',')} --> {clock(end, ',')}\n<i>{said}</i>\n\n"
                       for n, (start, end, said) in enumerate(cues, 1))
    elif kind == ".vtt":
        above = [said if ".en-US" in path.name else "" for _, _, said in [("", "", " "), *cues]]
        text = "WEBVTT\n\n" + "".join(
            f"{clock(start)} --> {clock(end)}\n" + f"{before}\n" * bool(before) + f"{said.replace('&', '&amp;')}\n\n"
            for (start, end, said), before in zip(cues, above))
    elif kind == ".json3":
        text = json.dumps({"events": [{"tStartMs": 1000 * start, "dDurationMs": 1000 * (end - start),
                                       "segs": [{"utf8": word + " "} for word in said.split()]}
                                      for start, end, said in cues]})
    elif kind == ".json":
        text = json.dumps({"language": "en", "segments": [{"start": float(start), "end": float(end), "text": f" {said}"}
                                                          for start, end, said in cues]})
    else:
        text = "start,end,text\n" + "".join(f"{start},{end},{said}\n" for start, end, said in cues)
    path.write_text(text)


def make_videos(folder):
    """The good videos, and beside them the broken ones."""
    from test_video import film, half, noise, spoiled
    suffixes = {".webm": "libvpx", ".avi": "mpeg4"}
    for name, seconds, beside in VIDEOS:
        path, plan = folder / "videos" / name, scenes(name, seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        film(path, FPS * seconds, TICK, codec=suffixes.get(path.suffix, "libx264"),
             picture=lambda i, plan=plan: picture(plan, i))
        captions(path.parent / beside, sentences(plan))
    broken = folder / "broken"
    (broken / "copy").mkdir(parents=True, exist_ok=True)
    spoiled(film(broken / "cut.mkv", 150, TICK, picture=noise), half)
    film(broken / "whole.mp4", 100, TICK, picture=noise)
    for twin in ("twin.mp4", "copy/twin.mkv"):
        film(broken / twin, 50, TICK)
    (broken / "page.mp4").write_text("<!DOCTYPE html><title>403 Forbidden</title>")
    for name, cues in (("cut", [(0, 2, "it is cut")]), ("whole", [(2, 1, "it ends before it starts")])):
        captions(broken / f"{name}.en.srt", cues)


def make_towers(folder, full):
    """Random weights under the names of OpenAI's CLIP and of 2D and 3D residual networks, in half precision."""
    from test_towers import NEXT, SIZES, OpenAIVisual, seeded
    sizes = {"small2d.pt": (4, 3, 128, 2, 20), "small3d.pth": SIZES["next"]}
    if full:
        sizes |= {"ViT-B-32.pt": (32, 7, 768, 12, 512), "resnet152.pth": ResNetConfig(),
                  "resnext101.pth": ResNetConfig(blocks=(3, 4, 23, 3), **NEXT)}
    for name, size in sizes.items():
        if isinstance(size, tuple):
            with torch.device("meta"):
                shapes = {f"visual.{name}": p for name, p in OpenAIVisual(*size).state_dict().items()}
            tensors = {"input_resolution": torch.tensor(size[0] * size[1])}  # by it OpenAI's are known
        else:
            shapes, tensors = hollow(ResNet, size).state_dict(), {}
        torch.save(tensors | {name: seeded(name, p.shape).half() for name, p in shapes.items()}, folder / name)


def make_long(path):
    """A minute of 854 x 480, 25 frames a second: a ground that pans, some noise, and the squares."""
    from test_video import film
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (61, 217, 3)).astype(np.float32)
    wide = torch.nn.functional.interpolate(torch.from_numpy(coarse).permute(2, 0, 1)[None], (480, 1704), mode="bicubic")
    wide = wide[0].permute(1, 2, 0).clamp(0, 245).numpy().astype(np.uint8)
    grain = rng.integers(0, 10, (480, 1704, 3)).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    plan = scenes("long", 60)
    film(path, 60 * FPS, TICK, codec="libx264", options={"preset": "veryfast", "crf": "26", "qp": "-1"},
         picture=lambda i: picture(plan, i, 854, 480, lambda i: wide[:, i % 850:i % 850 + 854] + grain[:, -i % 850:][:, :854]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="also a minute of video, and towers of the true sizes")
    args = parser.parse_args()
    load_av()
    make_videos(args.folder)
    make_towers(args.folder, args.full)
    if args.full:
        make_long(args.folder / "long" / "film.mp4")
    print(f"made {args.folder}")


if __name__ == "__main__":
    main()
