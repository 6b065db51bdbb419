"""features.py: features are those of the pictures, whatever the batch; they are made once, whole, by one setting;
what cannot be trusted is listed and leaves no file; shards are disjoint; and the way from videos to a teacher.

Run: python -m pytest -q tests/test_features.py
"""
import itertools
import json
import os
import signal
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUICK_TEACHER, ROOT, stop_line
from test_towers import PIXELS, RANKS, pixels_of, small

import data
import features
from common import write_json
from features import main
from parts.towers import ResNet, ResNetConfig, load_tower
from parts.vocab import SPECIALS, Vocab
from prepare.captions import find_videos
from prepare.packing import pack_videos

av = pytest.importorskip("av", reason="needs PyAV, of requirements-video.txt; new ones need Python 3.11")
from test_video import film, flipped, gray, half, head, noise, sound_alone, spoiled  # noqa: E402  (needs av)


class Tiny(torch.nn.Module):
    """A tower whose features are means of the pixels of the picture, of its left half and of its top."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.name, self.width, self.size = rank, f"Tiny{rank}D", 6, 16
        self.crop, self.resize = ("none", "pillow") if rank == 2 else ("center", "ffmpeg")
        self.scale, self.mean, self.std = 255.0, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)
        self.shapes = []

    def forward(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        x, shape = pixels.float() / self.scale, (1, 3) + (1,) * self.rank
        mean, std = (torch.tensor(values, device=x.device).view(shape) for values in (self.mean, self.std))
        x = (x - mean) / std
        return torch.cat([x.flatten(2).mean(2), x[..., :8].flatten(2).mean(2)], 1)


@pytest.fixture
def towers(monkeypatch, tmp_path):
    """Tiny towers for any weights, which are files of a byte; returns those that were loaded."""
    loaded = []
    monkeypatch.setattr(features, "load_tower", lambda path, rank, quick_gelu: loaded.append(Tiny(rank)) or loaded[-1])
    for name in ("w2.pt", "w3.pt"):
        (tmp_path / name).write_bytes(name.encode())
    return loaded


def colours(i):
    """Gray to the left, another one to the right."""
    picture = gray(i)
    picture[:, 32:] = gray(3 * i + 7)[:, 32:] // 2
    return picture


@pytest.fixture
def folder(tmp_path):
    """Six videos of 1 to 3.5 s, some of them in a sub-folder."""
    videos = tmp_path / "videos"
    (videos / "cook").mkdir(parents=True)
    for v in range(6):
        name = f"{'cook/' * (v % 2)}v{v}.{'mp4' if v < 4 else 'mkv'}"
        film(videos / name, 30 + 15 * v, picture=lambda i, v=v: colours(i + 5 * v))
    return videos


def flags(folder, out="", both=True, **more):
    """Command line of `features.py videos` with folders beside the videos."""
    place = folder.parent
    line = ["videos", str(folder), "--weights2d", str(place / "w2.pt"), "--feat2d", str(place / f"{out}f2")]
    if both:
        line += ["--weights3d", str(place / "w3.pt"), "--feat3d", str(place / f"{out}f3")]
    return [*line, "--device", "cpu", *(part for name, value in more.items() for part in (f"--{name}", str(value)))]


def small_towers(place, kind2d):
    """Writes weights for the flags above: small networks of the true kinds."""
    for rank, kind in ((2, kind2d), (3, "next")):
        torch.save(small(kind), place / f"w{rank}.pt")


def process(argv, first=""):
    """features.py, ended, in a process of its own; first: what is done there before. Peak memory comes last.

    Not ru_maxrss: that of a process that was started by a larger one is the larger one's.
    """
    code = f"{first}\nimport features, torch\ntorch.set_num_threads(1)\nfeatures.main({argv!r})\n" \
           "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def files(place):
    return {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}


def arrays(place):
    return {path.stem: np.load(path) for path in sorted(Path(place).glob("*.npy"))}


# ---------------------------------------------------------------------------- values


def test_features_are_those_of_the_pictures(towers, folder, tmp_path, capsys):
    main(flags(folder))
    main(flags(folder, "raw-", normalize="false"))
    for rank, out in ((2, "f2"), (3, "f3")):
        normed, raw = arrays(tmp_path / out), arrays(tmp_path / f"raw-{out}")
        assert list(normed) == list(raw) == [f"v{v}" for v in range(6)]
        for v in range(6):
            seconds, a, b = 1 + v / 2, normed[f"v{v}"], raw[f"v{v}"]
            assert a.dtype == b.dtype == np.float16
            assert a.shape == b.shape == (int(seconds + 0.5) if rank == 2 else int(np.ceil(1.5 * seconds)), 6)
            assert np.allclose(a, b / np.linalg.norm(b.astype(np.float32), axis=1, keepdims=True), atol=1e-3)
    picture = colours(14 + 15).astype(np.float32) / 255  # of v3's row 0: the last one before 0.5 s
    x = (picture - (0.5, 0.4, 0.3)) / (0.2, 0.2, 0.25)
    expected = np.r_[x.mean((0, 1)), x[:, :24].mean((0, 1))]  # 8 of the 21 columns of the scaled one
    assert np.allclose(arrays(tmp_path / "raw-f2")["v3"][0], expected, atol=0.05)
    said = capsys.readouterr().out
    assert "2D: Tiny2D -> " in said and "1.5 rows of 6 a second, of length 1; pictures: short side 16, the middle" in said
    assert "pixels: (x / 255 - mean 0.5 0.4 0.3) / std 0.2 0.2 0.25" in said
    assert f"videos: 6 in {folder}: 0 are done, 6 to do on cpu" in said
    assert "videos: 6 done, 15s in " in said and "times as fast as they play" in said  # 1 + 2 + 2 + 3 + 3 + 4 rows


@pytest.mark.parametrize("both", [True, False])
def test_the_batch_changes_nothing(towers, folder, tmp_path, both):
    for size in (1, 3, 64):
        main(flags(folder, f"{size}-", both, batch_size=size))
    assert max(shape[0] for shape in towers[0].shapes) == 1
    assert max(shape[0] for shape in towers[-2 if both else -1].shapes) == 4  # a batch is of one video
    for out in ("f2", "f3")[:1 + both]:
        one, three, most = (arrays(tmp_path / f"{size}-{out}") for size in (1, 3, 64))
        for name in one:
            assert np.allclose(one[name], three[name], atol=2e-3) and np.allclose(one[name], most[name], atol=2e-3)


@pytest.mark.parametrize("kind", RANKS)
def test_a_batch_of_64_equals_64_of_one(tmp_path, kind):
    torch.save(small(kind), tmp_path / "w.pt")
    rows, calls = {}, []
    for size in (1, 64):
        one = features.Extractor(tmp_path / "w.pt", tmp_path / "f", RANKS[kind], True, torch.device("cpu"), size, False)
        one.claim_folder()
        one.tower.register_forward_hook(lambda tower, given, out: calls.append(len(given[0])))
        for item in pixels_of((70, *PIXELS[kind][1:])):
            one.add(item)
        rows[size] = one.finish()
    assert calls == [1] * 70 + [64, 6] and rows[1].shape == (70, one.tower.width)
    assert np.allclose(rows[1], rows[64], atol=1e-3) and rows[1].std(0).max() > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["2d", "clip"])
def test_a_gpu_gives_the_features_of_the_cpu_and_only_2d_in_bfloat16(folder, tmp_path, monkeypatch, kind):
    small_towers(tmp_path, kind)
    kinds = set()

    def load(*given):
        tower = load_tower(*given)
        first = next(part for part in tower.modules() if isinstance(part, (torch.nn.Conv2d, torch.nn.Conv3d)))
        first.register_forward_hook(lambda part, given, out: kinds.add((out.device.type, tower.rank, out.dtype)))
        return tower
    monkeypatch.setattr(features, "load_tower", load)
    main(flags(folder, "cpu-"))
    main(flags(folder, "gpu-", device="cuda"))
    assert kinds == {("cpu", 2, torch.float32), ("cpu", 3, torch.float32), ("cuda", 2, torch.bfloat16),
                     ("cuda", 3, torch.float32)}
    for out in ("f2", "f3"):
        for cpu, gpu in zip(arrays(tmp_path / f"cpu-{out}").values(), arrays(tmp_path / f"gpu-{out}").values()):
            assert np.allclose(cpu, gpu, atol=0.02)


def test_pictures_of_another_shape_begin_a_batch(towers, folder, tmp_path, monkeypatch):
    def read(path, of):
        for width in (20, 20, 24, 20):
            yield 0, torch.full((3, 16, width), width, dtype=torch.uint8)
    monkeypatch.setattr(features, "read_video", read)
    main(flags(folder, both=False, normalize="false"))
    assert towers[0].shapes[:3] == [(2, 3, 16, 20), (1, 3, 16, 24), (1, 3, 16, 20)]
    rows = arrays(tmp_path / "f2")["v0"]
    assert (rows[0] == rows[3]).all() and (rows[0] != rows[2]).all()


def test_progress_tells_hours_and_frames_a_second(towers, folder, monkeypatch):
    class Bar:
        def __init__(self, iterable, total, unit, desc):
            assert (iterable, total, unit) == (None, 6, "video")
            self.videos, self.said = 0, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self):
            self.videos += 1

        def set_postfix_str(self, text):
            self.said.append(text)
    bars = []
    monkeypatch.setattr(features, "progress", Bar)
    monkeypatch.setattr(features.time, "perf_counter", itertools.count(0, 2).__next__)
    main(flags(folder))
    (bar,) = bars
    assert bar.videos == 6 and len(bar.said) == 15 + 23 + 6  # rows of 2D, clips, ends of videos
    assert bar.said[-1] == f"0.0 h, {(15 + 16 * 23) / (2 * 44):.0f} frames/s"


# ---------------------------------------------------------------------------- once, whole, by one setting


def test_what_is_done_is_skipped_and_what_is_damaged_is_made_again(towers, folder, tmp_path, capsys, monkeypatch):
    main(flags(folder))
    before = {out: files(tmp_path / out) for out in ("f2", "f3")}
    (tmp_path / "f2" / "v0.npy").write_bytes(before["f2"]["v0.npy"][:-5])
    np.save(tmp_path / "f3" / "v1.npy", np.zeros((3, 7), np.float16))  # of another width
    np.save(tmp_path / "f3" / "v2.npy", np.zeros((3, 6)))  # float64
    (tmp_path / "f2" / "v3.npy").unlink()
    read, asked = features.read_video, []
    monkeypatch.setattr(features, "read_video", lambda path, of: asked.append((path.stem, [t.rank for t in of])) or read(
        path, of))
    capsys.readouterr()
    main(flags(folder))
    assert "2 are done, 4 to do" in capsys.readouterr().out
    assert asked == [("v0", [2]), ("v1", [3]), ("v2", [3]), ("v3", [2])]
    assert {out: files(tmp_path / out) for out in ("f2", "f3")} == before


def test_a_second_start_after_a_kill_ends_byte_for_byte_alike(towers, folder, tmp_path, monkeypatch):
    main(flags(folder, "whole-"))
    save, saved = np.save, []

    def killed(path, array):
        saved.append(path)
        save(path, array[:1] if len(saved) == 6 else array)  # half-written
        if len(saved) == 6:
            raise KeyboardInterrupt("terminated")
    monkeypatch.setattr(np, "save", killed)
    assert stop_line(main, flags(folder)) == (
        "features.py: terminated; what is written is whole, and the same command goes on from there")
    assert sorted(files(tmp_path / "f2")) == ["settings.json", "v0.npy", "v1.npy", "v2.npy"]
    assert sorted(files(tmp_path / "f3")) == ["settings.json", "v0.npy", "v1.npy"]
    monkeypatch.undo()
    monkeypatch.setattr(features, "load_tower", lambda path, rank, quick_gelu: Tiny(rank))
    main(flags(folder))
    for out in ("f2", "f3"):
        assert files(tmp_path / out) == files(tmp_path / f"whole-{out}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_second_start_after_sigkill_ends_byte_for_byte_alike(folder, tmp_path):
    small_towers(tmp_path, "clip")
    torn = """
import os, signal, numpy
save, saved = numpy.save, []
def half_written(path, array):
    saved.append(path)
    save(path, array if len(saved) < 6 else array[:1])
    if len(saved) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
numpy.save = half_written"""
    assert process(flags(folder), torn).returncode == -signal.SIGKILL
    assert [name[:6] for name in os.listdir(tmp_path / "f3") if name.endswith(".tmp")] == ["v2.npy"]
    assert process(flags(folder)).returncode == 0
    assert process(flags(folder, "whole-")).returncode == 0
    for out in ("f2", "f3"):
        assert files(tmp_path / out) == files(tmp_path / f"whole-{out}")
        assert list(arrays(tmp_path / out)) == [f"v{v}" for v in range(6)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_10_and_100_seconds_take_equal_memory(tmp_path):
    peaks = []
    for seconds in (10, 100):
        folder = tmp_path / f"{seconds}" / "videos"
        folder.mkdir(parents=True)
        small_towers(folder.parent, "clip")
        film(folder / "a.mp4", 5 * seconds, Fraction(1, 5))
        ended = process(flags(folder, batch_size=2))
        assert ended.returncode == 0, ended.stderr
        assert len(arrays(folder.parent / "f3")["a"]) == 1.5 * seconds
        peaks.append(int(ended.stdout.split()[-1]) / 1024)  # MiB
    assert abs(peaks[1] - peaks[0]) < 20, peaks  # the pictures of 3D alone are 9 MiB for each 10 s


def test_shards_are_disjoint_and_complete(towers, folder, tmp_path):
    main(flags(folder, "whole-"))
    seen = []
    for i in (1, 2, 3):
        before = set(arrays(tmp_path / "f2")) if i > 1 else set()
        main(flags(folder, shard=f"{i}/3"))
        new = set(arrays(tmp_path / "f2")) - before
        assert new == {f"v{v}" for v in range(6) if zlib.crc32(b"v%d" % v) % 3 == i - 1}
        seen += new
    assert sorted(seen) == [f"v{v}" for v in range(6)] and len({zlib.crc32(b"v%d" % v) % 3 for v in range(6)}) == 3
    for out in ("f2", "f3"):
        assert files(tmp_path / out) == files(tmp_path / f"whole-{out}")


def test_two_that_begin_at_once_with_different_settings_do_not_mix(towers, folder, tmp_path, monkeypatch):
    read, path = features.read_video, tmp_path / "f2" / "settings.json"

    def meanwhile(*given):
        write_json(path, json.loads(path.read_text()) | {"normalize": False})
        return read(*given)
    monkeypatch.setattr(features, "read_video", meanwhile)
    assert f"{path}: normalize of the features here is False, not True" in stop_line(main, flags(folder))
    assert not arrays(tmp_path / "f2") and not arrays(tmp_path / "f3")


def test_other_settings_are_refused(towers, folder, tmp_path, monkeypatch):
    main(flags(folder))
    settings = json.loads((tmp_path / "f2" / "settings.json").read_text())
    assert settings["tower"] == "Tiny2D" and settings["size"] == 16 and settings["normalize"] is True
    assert settings["mean"] == [0.5, 0.4, 0.3] and len(settings["weights"]) == 64
    before = files(tmp_path / "f2")
    assert stop_line(main, flags(folder, normalize="false")) == (
        f"{tmp_path}/f2/settings.json: normalize of the features here is True, not False; give another --feat2d")
    (tmp_path / "w3.pt").write_bytes(b"other weights")
    line = stop_line(main, flags(folder))
    assert f"{tmp_path}/f3/settings.json: weights of the features here is " in line and line.endswith("--feat3d")
    for name, attribute, here, value in (("tower", "name", "Tiny2D", "Tiny4D"), ("size", "size", 16, 24)):
        other = Tiny(2)
        setattr(other, attribute, value)
        with monkeypatch.context() as patch:
            patch.setattr(features, "load_tower", lambda *given: other)
            line = stop_line(main, flags(folder, both=False))
        assert f"{tmp_path}/f2/settings.json: {name} of the features here is {here}, not {value}; give" in line
    assert files(tmp_path / "f2") == before
    (tmp_path / "f2" / "settings.json").write_text("{")
    assert "weights of the features here is None" in stop_line(main, flags(folder, both=False))
    (tmp_path / "f2" / "settings.json").unlink()
    assert f"{tmp_path}/f2: holds features, and no settings.json" in stop_line(main, flags(folder, both=False))
    assert f"{tmp_path}/w2.pt: a file; --feat2d is a folder" in stop_line(
        features.videos, folder, tmp_path / "w2.pt", tmp_path / "w2.pt")


# ---------------------------------------------------------------------------- faults and mistakes


def test_faults_are_listed_and_leave_no_file(towers, folder, tmp_path, capsys):
    (folder / "v0.mp4").write_bytes(b"cat")
    cut = film(folder / "cut.mkv", 150, picture=noise)
    cut.write_bytes(half(cut.read_bytes()))
    film(folder / "v5.mp4", 30)
    (tmp_path / "f2").mkdir()
    settings = flags(folder)
    line = stop_line(main, settings)
    assert line == ("videos: 3 problems in 6 videos (1 duplicate, 1 truncated, 1 unreadable); the others' features are "
                    f"written. All are listed in {tmp_path}/f2/problems.txt; mend them, or leave them out with --skip-bad")
    for out in ("f2", "f3"):
        assert list(arrays(tmp_path / out)) == ["v1", "v2", "v3", "v4"]
    listed = (tmp_path / "f2" / "problems.txt").read_text()
    assert f"unreadable: {folder}/v0.mp4: " in listed and f"truncated: {cut}: " in listed
    assert f"{folder}/cook/v5.mkv" in listed and f"{folder}/v5.mp4" in listed
    (tmp_path / "f2" / "v0.npy").write_bytes(b"of a killed machine")
    main([*settings, "--skip-bad"])
    assert "left out 3 problems in 6 videos" in capsys.readouterr().out and "v0" not in arrays(tmp_path / "f2")
    for path in (folder / "v0.mp4", cut, folder / "v5.mp4"):
        path.unlink()
    main(settings)
    assert not (tmp_path / "f2" / "problems.txt").exists() and "v5" in arrays(tmp_path / "f3")


def test_every_kind_of_damage_leaves_no_file(towers, tmp_path):
    folder = tmp_path / "videos"
    (folder / "copy").mkdir(parents=True)
    film(folder / "whole.mp4", 30)
    (folder / "page.mp4").write_text("<html>")
    for path in (folder / f"{'x' * 240}.mp4", folder / "twin.mp4", folder / "copy" / "twin.mkv"):
        film(path, 30)
    sound_alone(folder / "sound.mp4")
    spoiled(film(folder / "head.webm", 150, codec="libvpx", picture=noise), head)
    spoiled(film(folder / "cut.mkv", 150, picture=noise), half)
    spoiled(film(folder / "cut too.webm", 150, codec="libvpx", picture=noise), half)
    spoiled(film(folder / "flipped.mp4", 60, picture=noise), flipped(1 / 2000))
    line = stop_line(main, flags(folder))
    assert ("8 problems in 7 videos (1 duplicate, 2 unreadable, 2 truncated, 1 damaged, 1 no frames, 1 no video track); the "
            "others' features are written") in line
    main([*flags(folder), "--skip_bad"])
    for out in ("f2", "f3"):
        assert list(arrays(tmp_path / out)) == ["whole"] and sorted(files(tmp_path / out))[-2:] == [
            "settings.json", "whole.npy"]


def test_features_of_an_id_that_two_files_have_had_are_made_anew(towers, folder, tmp_path):
    main(flags(folder))
    film(folder / "v5.mp4", 30)
    assert "1 problems in 5 videos (1 duplicate)" in stop_line(main, flags(folder))
    assert "v5" not in arrays(tmp_path / "f2") and "v5" not in arrays(tmp_path / "f3")
    (folder / "cook" / "v5.mkv").unlink()
    main(flags(folder))
    assert len(arrays(tmp_path / "f2")["v5"]) == 1  # not the other's 4


def test_a_fault_of_one_video_is_not_the_next_ones(towers, folder, tmp_path):
    whole = film(folder / "a.mkv", 150, picture=noise)
    main(flags(folder, "whole-"))
    whole.write_bytes(half(whole.read_bytes()))  # its rows so far must not be v0's
    stop_line(main, flags(folder))
    expected = arrays(tmp_path / "whole-f2") | {}
    expected.pop("a")
    found = arrays(tmp_path / "f2")
    assert list(found) == list(expected) and all((found[name] == expected[name]).all() for name in found)


def test_features_that_are_no_numbers_are_not_written(towers, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "forward", lambda self, pixels: torch.full((len(pixels), 6), 1e6))
    assert "(6 not finite)" in stop_line(main, flags(folder, both=False, normalize="false"))
    assert not arrays(tmp_path / "f2")


def test_mistakes_end_in_one_line(towers, folder, tmp_path, monkeypatch):
    for shard in ("0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"):
        assert stop_line(main, [*flags(folder), f"--shard={shard}"]) == (
            f"--shard {shard}: write i/n, such as 1/8, the first of 8 shards")
    assert "--batch_size 0: must be from 1" in stop_line(main, flags(folder, batch_size=0))
    assert "--normalize perhaps: write true or false" in stop_line(main, flags(folder, normalize="perhaps"))
    assert "belong together" in stop_line(main, flags(folder, both=False, feat3d="f3"))
    assert "is --feat2d, too" in stop_line(main, flags(folder, feat3d=tmp_path / "f2"))
    assert "no such folder of videos" in stop_line(main, ["videos", "none", *flags(folder)[2:]])
    assert "see features.py videos --help" in stop_line(main, ["videos", str(folder)])
    assert "--device gpu: choose auto, cpu, cuda or mps" in stop_line(main, [*flags(folder), "--device", "gpu"])
    out = str(tmp_path / "c.json")
    assert stop_line(main, ["captions", str(folder), "--out", out, "--csv_out", f"{tmp_path}/./c.json"]) == (
        f"--csv_out {tmp_path}/./c.json: is --out, too; give another")
    with monkeypatch.context() as patch:
        patch.setattr(features, "init_ranks", lambda device: SimpleNamespace(size=2, device=torch.device(device)))
        assert stop_line(main, flags(folder)) == (
            "torchrun started 2 processes, which would do the same; start n without it, with --shard i/n, each with its "
            "CUDA_VISIBLE_DEVICES")
    assert not towers
    assert not (tmp_path / "f2").exists()

    def full(self, pixels):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(Tiny, "forward", full)
    assert stop_line(main, flags(folder, both=False)) == (
        "--batch_size 64: Tiny2D needs more memory for 1 x 3 x 16 x 21 pixels than there is; lower it")


def test_without_pyav_nothing_begins(towers, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(features.sys.modules, "av", None)
    assert "pip install -r requirements-video.txt" in stop_line(main, flags(folder))
    assert not towers and not (tmp_path / "f2").exists()
    assert "requirements-video.txt" in stop_line(main, ["captions", str(folder), "--out", str(
        tmp_path / "c.json"), "--csv-out", str(tmp_path / "c.csv")])


# ---------------------------------------------------------------------------- captions, and the whole way


def told(folder, seconds):
    """Writes captions beside the videos: one a second, the last one too long."""
    for video, path in find_videos(folder)[0].items():
        lines = [f"00:0{s}.000 --> 00:0{s + 2}.000\n{NOUNS[s % 4]} number {video} .\n" for s in range(seconds[video])]
        path.with_name(f"{video}.en.vtt").write_text("WEBVTT\n\n" + "\n".join(lines))


NOUNS = ("cat", "dog", "moon", "cup")


def test_captions_are_cut_to_the_videos_and_tasks_are_folders(folder, tmp_path, capsys):
    told(folder, {f"v{v}": 1 + v // 2 for v in range(6)})
    (folder / "v0.de.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nKatze\n")
    line = ["captions", str(folder), "--out", str(tmp_path / "c.json"), "--csv-out", str(tmp_path / "v.csv"), "--lang", "en"]
    main(line)
    rows = json.loads((tmp_path / "c.json").read_text())
    assert rows["v1"] == {"start": [0], "end": [1.5], "text": ["cat number v1 ."]}
    assert rows["v4"]["end"] == [2, 3, 3] and list(rows) == [f"v{v}" for v in range(6)]
    table = (tmp_path / "v.csv").read_text().splitlines()
    assert table[0].startswith("video_id,task_id") and len({row.split(",")[1] for row in table[1:]}) == 4
    assert "captions: 6 videos, 12 captions, 4 tasks -> c.json, v.csv" in capsys.readouterr().out
    assert f"{tmp_path}/c.json exists" in stop_line(main, line)
    for name in ("c.json", "v.csv"):
        (tmp_path / name).unlink()
    (folder / "v2.en.vtt").unlink()
    (folder / "v5.mp4").touch()
    line_of = stop_line(main, line)
    assert "2 problems in 5 videos (1 duplicate, 1 no captions); nothing was written" in line_of
    assert not (tmp_path / "c.json").exists()
    main([*line, "--skip-bad"])
    assert list(json.loads((tmp_path / "c.json").read_text())) == ["v0", "v1", "v3", "v4"]


def test_from_videos_with_subtitles_to_steps_of_a_teacher(folder, tmp_path, monkeypatch):
    import teacher
    torch.manual_seed(0)
    for rank, kernel in ((2, (7, 7)), (3, (7, 7, 7))):
        config = ResNetConfig(kernel, blocks=(1, 1, 1, 1), stem=4, inner=2, outer=8)
        net = ResNet(config)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
        torch.save(net.state_dict(), tmp_path / f"w{rank}.pt")
    told(folder, {f"v{v}": 1 + v // 2 for v in range(6)})
    captions, table = tmp_path / "caption.json", tmp_path / "videos.csv"
    main(["captions", str(folder), "--out", str(captions), "--csv_out", str(table)])
    main(flags(folder))
    vocab = Vocab([*SPECIALS, *NOUNS, "number", ".", *(f"v{v}" for v in range(6))])
    quick = QUICK_TEACHER | dict(max_steps=2, eval_every=2, save_every=2, block_size=12)
    # 2D alone is enough, for videos and for images
    for vision, feat3d, width in (("video", tmp_path / "f3", 128), ("video", "", 64), ("image", "", 64)):
        packed, out = tmp_path / f"{vision}{width}.h5", tmp_path / f"{vision}{width}"
        counts = pack_videos(captions, tmp_path / "f2", table, vocab, packed, feat3d)
        assert counts == {"videos": 6, "captions": 12, "frames": sum((1, 2, 2, 3, 3, 4)), "tokens": 48, "problems": 0}
        assert data.open_packed(packed)[2]["frames"].shape == (15, width)
        teacher.main(teacher.Config(**quick, videos=str(packed), vision=vision, out_dir=str(out)))
        assert [json.loads(line)["step"] for line in (out / "log.jsonl").open() if '"step"' in line][-1] == 2
