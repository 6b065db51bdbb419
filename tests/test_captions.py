"""prepare/captions.py: ids of names, captions of every kind of file, whose oddities are mended or told, and the
caption.json and csv that prepare/packing.py reads back.

Run: python -m pytest -q tests/test_captions.py
"""
import csv
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import stop_line

import data
import prepare.captions
from prepare.captions import CAPTIONS, VIDEOS, find_videos, read_captions_file, video_id, write_captions, write_tasks
from prepare.packing import caption_rows, pack_videos, read_captions, read_tasks
from test_vocab import vocab

SRT = "1\n00:00:01,000 --> 00:00:02,500\nthe cat sat\n"
# as yt-dlp fetches YouTube's generated captions: a cue that speaks, one of 10 ms that shows, and so on
ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.160 --> 00:00:02.149 align:start position:0%
 
hello<00:00:00.480><c> and</c><00:00:00.640><c> welcome</c>

00:00:02.149 --> 00:00:02.159 align:start position:0%
hello and welcome
 

00:00:02.159 --> 00:00:04.069 align:start position:0%
hello and welcome
to<00:00:02.399><c> the</c><00:00:02.600><c> show</c>

00:00:04.069 --> 00:00:04.079 align:start position:0%
to the show
 

00:00:04.079 --> 00:00:06.000 align:start position:0%
to the show
to<00:00:04.399><c> the</c><00:00:04.600><c> show</c>
"""
ROLLED = [(0.16, 2.149, "hello and welcome"), (2.159, 4.069, "to the show"), (4.079, 6.0, "to the show")]


def read(folder, name, content, **kw):
    """read_captions_file of a file with this content, text, bytes or what JSON can hold."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return read_captions_file(path, **kw)


def put(folder, **files):
    """Makes files; of a name __ is a dot, and ___ a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def collect(folder, lengths=None, lang=""):
    """Captions of all videos of a folder."""
    return prepare.captions.collect(folder, find_videos(folder)[0], lengths, lang)


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("name, video", [
    ("talk.mp4", "talk"), ("a talk.webm", "a talk"), ("talk.en.mp4", "talk.en"), ("talk.v2.MKV", "talk.v2"),
    ("talk [abcDEF12345].mp4", "abcDEF12345"), ("talk-[-bcDEF1234_].mp4", "-bcDEF1234_"), ("[abcDEF12345].mp4",
    "abcDEF12345"), ("-bcDEF12345.mp4", "-bcDEF12345"), ("-bcDEF12345.en.vtt", "-bcDEF12345"),
    ("holiday [2019].mp4", "holiday [2019]"), ("holiday [Full Movie].mp4", "holiday [Full Movie]"),
    ("[abcDEF12345] talk.mp4", "[abcDEF12345] talk"), ("talk, part 2.mp4", "talk, part 2"),
    ("talk.srt", "talk"), ("talk.en.vtt", "talk"), ("talk.en-US.srt", "talk"), ("talk.en-orig.vtt", "talk"),
    ("talk.zh-Hans-en.json3", "talk"), ("talk.es-419.csv", "talk"), ("talk.pt_BR.srt", "talk"), ("talk.fil.VTT", "talk"),
    ("talk.en-eEY6OEp-aP_.vtt", "talk"), ("talk [abcDEF12345].de.json3", "abcDEF12345"), ("talk.json", "talk"),
    ("talk [abcDEF12345].json", "abcDEF12345"), ("talk.v2.srt", "talk.v2"), ("3.5.srt", "3.5"),
    ("talk.info.json", "talk.info"), ("talk.live_chat.json", "talk.live_chat")])
def test_id_is_the_stem_or_the_one_that_yt_dlp_puts_last(name, video):
    assert video_id(Path("folder.en") / name) == video_id(name) == video


def test_videos_of_all_sub_folders_are_found_and_sorted_by_id(tmp_path):
    for i, ending in enumerate(VIDEOS):
        put(tmp_path, **{f"{'s' * (i % 3)}{'___' * bool(i % 3)}v{20 - i}{ending}": ""})
    put(tmp_path, deep___er___UP__MP4="", notes__txt="", talk__en__vtt="", __hidden__mp4="", __cache___x__mp4="",
        half__mp4__part="")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "-d [-bcDEF12345].mp4").touch()
    (tmp_path / "._talk.mp4").touch()
    found, refused = find_videos(tmp_path)
    assert list(found) == sorted(found) and len(found) == len(VIDEOS) + 2 and not refused
    assert found["UP"] == tmp_path / "deep" / "er" / "UP.MP4" and found["v20"] == tmp_path / "v20.mp4"
    assert found["-bcDEF12345"] == tmp_path / "-d [-bcDEF12345].mp4"
    assert find_videos(str(tmp_path)) == (found, {})


def test_two_videos_of_one_id_are_both_named_and_none_is_taken(tmp_path):
    put(tmp_path, a___talk__mp4="", b___talk__webm="", c___talk__mkv="", other__mp4="")
    videos, refused = find_videos(tmp_path)
    assert list(videos) == ["other"] and refused == {"talk": ("duplicate", (
        f"talk: the id of {tmp_path}/a/talk.mp4 and {tmp_path}/b/talk.webm (and 1 more); rename or remove one"))}


def test_linked_folders_are_followed_and_no_folder_is_entered_twice(tmp_path):
    put(tmp_path, v___cook___a__mp4="", v___cook___a__srt=SRT, disk___b__mp4="", disk___c___c__mp4="")
    links = {"z": tmp_path / "disk", "cook/up": tmp_path / "v", "cook/self": tmp_path / "v" / "cook", "y": tmp_path / "disk"}
    for name, target in links.items():
        (tmp_path / "v" / name).symlink_to(target)
    videos, refused = find_videos(tmp_path / "v")
    assert not refused and [path.relative_to(tmp_path).as_posix() for path in videos.values()] == [
        "v/cook/a.mp4", "v/y/b.mp4", "v/y/c/c.mp4"]
    assert collect(tmp_path / "v")[1] == [("a", "cook/")]


def test_names_too_long_to_stand_in_those_of_other_files_are_refused(tmp_path):
    fits, long, id_alone = "\u732b" * 53, "\u732b" * 54, "x" * 180 + " [abcDEF12345]"  # 159, 162 and 11 bytes
    put(tmp_path, **{f"{name}__mp4": "" for name in (fits, long, id_alone)})
    videos, refused = find_videos(tmp_path)
    assert list(videos) == ["abcDEF12345", fits] and list(refused) == [long] and refused[long][0] == "unreadable"
    assert refused[long][1].startswith(f"{tmp_path}") and refused[long][1].endswith("its name is too long; rename it")


def test_folders_that_are_none_or_hold_no_video_are_one_line(tmp_path):
    assert stop_line(find_videos, tmp_path / "no") == f"{tmp_path}/no: no such folder of videos"
    put(tmp_path, talk__srt=SRT)
    assert stop_line(find_videos, tmp_path / "talk.srt").endswith("no such folder of videos")
    assert "no video in it, none of .mp4 .m4v" in stop_line(find_videos, tmp_path)


@pytest.mark.skipif(sys.platform == "darwin", reason="names of macOS are UTF-8")
def test_names_that_are_not_utf8_are_told_and_printable(tmp_path):
    put(tmp_path, talk__mp4="", talk__srt=SRT)
    (tmp_path / os.fsdecode(b"M\xfcller.mp4")).touch()
    (tmp_path / os.fsdecode(b"M\xfcller.srt")).write_text(SRT)
    videos, refused = find_videos(tmp_path)
    assert list(videos) == ["talk"] and list(refused.values()) == [
        ("unreadable", f"{tmp_path}/M\\udcfcller.mp4: its name is not UTF-8; rename it")]
    assert list(collect(tmp_path)[0]) == ["talk"]


# ---------------------------------------------------------------------------- kinds of files


def test_every_kind_of_file_gives_the_same_captions(tmp_path):
    want = [(1.0, 2.5, "the cat sat"), (3662.25, 3664.0, "on the mat")]
    srt = SRT + "\n2\n01:01:02,250 --> 01:01:04,000\non the\nmat\n"
    assert read(tmp_path, "a.srt", srt) == want
    assert read(tmp_path, "a.vtt", "WEBVTT\n\nNOTE a --\nnote\n\nSTYLE\n::cue {}\n\nname\n00:01.000 --> 00:02.500 line:0\n"
                "<v Ann>the <i.loud>cat</i></v> sat\n\n7\n01:01:02.250 --> 01:01:04.000\non\nthe mat\n\nNOTE the end") == want
    events = [{"tStartMs": 0, "dDurationMs": 9999, "id": 1, "wpWinPosId": 1},
              {"tStartMs": 1000, "dDurationMs": 1500, "segs": [{"utf8": "the"}, {"utf8": " cat", "tOffsetMs": 9},
                                                               {"utf8": "\nsat"}, {"tOffsetMs": 3}]},
              {"tStartMs": 2000, "dDurationMs": 500, "aAppend": 1, "segs": [{"utf8": "\n"}]},
              {"tStartMs": 3662250, "dDurationMs": 1750, "segs": [{"utf8": "on the mat"}]}, {"tStartMs": 1, "segs": None}]
    for name in ("a.json3", "a.en.json"):
        assert read(tmp_path, name, {"wireMagic": "pb3", "events": events}) == want
    assert read(tmp_path, "a.json", {"text": " the cat ...", "language": "en", "segments": [
        {"id": 0, "start": 1.0, "end": 2.5, "text": " the cat sat", "tokens": [1]},
        {"id": 1, "start": 3662.25, "end": 3664, "text": " on the mat"}]}) == want
    assert read(tmp_path, "a.csv", "text,start,end,x\nthe cat sat,1.0,2.5,\n\"on\nthe mat\",1:01:02.25,\"3664,0\",y\n") == want


@pytest.mark.parametrize("times", ["00:00:01,000 --> 00:00:02,500", "00:00:01.000 --> 00:00:02.500", "00:01,0 --> 00:02.5",
                                   "0:00:01 --> 0:0:2,5", "00:00:01,000-->00:00:02,500", "  00:01.000   -->  00:02.500 ",
                                   "00:00:01,000 --> 00:00:02,500 X1:10 X2:20", "00:01.000 --> 00:02.500 align:start"])
def test_times_of_every_form_are_read(tmp_path, times):
    for head in ("", "WEBVTT\n\n"):
        assert read(tmp_path, "a.srt", f"{head}{times}\nhi\n") == [(1.0, 2.5, "hi")]


@pytest.mark.parametrize("shown, text", [
    ("<i>the</i> <font color=\"#ff0000\">cat</font>", "the cat"), ("{\\an8}the {\\i1}cat{\\i0}", "the cat"),
    ("the<br>cat<BR />sat", "the cat sat"), ("<v Ann &amp; Bob>the cat</v>", "the cat"),
    ("the<00:00:01.500><c> cat</c>", "the cat"), ("Tom &amp; Ann &lt;3&nbsp;&#39;it&#x27;s&quot;", "Tom & Ann <3 'it's\""),
    ("&amp;lt;b&amp;gt; &amp;amp;", "&lt;b&gt; &amp;"), ("&lt;i&gt;", "<i>"), ("AT&T R&D 3 < 4 > 2 I <3 you {x}",
     "AT&T R&D 3 < 4 > 2 I <3 you {x}"), ("  the \t cat\u00a0sat  ", "the cat sat"), ("[Music] ♪ Ünï 猫",
     "[Music] ♪ Ünï 猫"), ("what is the cat that was on it", "what is the cat that was on it"),
    ("this --> that", "this --> that"), ("&copyx &notit; &unknown; &#xD800;", "&copyx ¬it; &unknown; \ufffd")])
def test_text_is_natural_without_tags_and_unescaped_once(tmp_path, shown, text):
    assert read(tmp_path, "a.srt", f"1\n00:01,000 --> 00:02,000\n{shown}\n") == [(1.0, 2.0, text)]
    assert read(tmp_path, "a.vtt", f"WEBVTT\n\n00:01.000 --> 00:02.000\n{shown}\n") == [(1.0, 2.0, text)]
    assert read(tmp_path, "a.json", {"segments": [{"start": 1, "end": 2, "text": shown}]}) == [(1.0, 2.0, text)]
    assert read(tmp_path, "a.json3", {"events": [{"tStartMs": 1000, "dDurationMs": 1000, "segs": [
        {"utf8": shown}]}]}) == [(1.0, 2.0, text)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["start", "end", "text"], [1, 2, shown]])
    assert read_captions_file(tmp_path / "a.csv") == [(1.0, 2.0, text)]


@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: t.replace(
    "\n", "\r"), lambda t: "\ufeff" + t.replace("\n", "\r\n"), lambda t: t + "\n\n\n", lambda t: t.rstrip("\n")])
def test_byte_order_marks_and_ends_of_lines_change_nothing(tmp_path, change):
    srt = SRT + "\n2\n00:00:03,000 --> 00:00:04,000\non\nit\n"
    table = 'start,end,text\n1,2.5,the cat sat\n3,4,"on\nit"\n'
    assert read(tmp_path, "a.srt", change(srt)) == [(1, 2.5, "the cat sat"), (3, 4, "on it")]
    assert read(tmp_path, "a.csv", change(table)) == [(1, 2.5, "the cat sat"), (3, 4, "on it")]
    assert read(tmp_path, "a.vtt", change(ROLLING)) == ROLLED


def test_numbers_empty_lines_and_empty_cues_of_srt(tmp_path):
    number = "2\n00:00:03,000 --> 00:00:04,000\n"
    want = [(1.0, 2.5, "the cat sat"), (3.0, 4.0, "10")]
    for between in ("\n", "", " \n", "\n\n\n"):  # also where no empty line parts them
        assert read(tmp_path, "a.srt", f"{SRT}{between}{number}10\n") == want
    assert read(tmp_path, "a.srt", f"{SRT}\nand ran\n\n{number}10\n\n") == [(1.0, 2.5, "the cat sat and ran"), want[1]]
    assert read(tmp_path, "a.srt", "00:01,0 --> 00:02,0\n10\n\n00:02,0 --> 00:03,0\n9") == [
        (1.0, 2.0, "10"), (2.0, 3.0, "9")]  # a count-down without numbers
    assert read(tmp_path, "a.srt", f"{SRT}\n2\n00:05,0 --> 00:06,0\n<i> </i>&nbsp;\n\n3\n00:07,0 --> 00:08,0\n") == want[:1]
    assert read(tmp_path, "a.vtt", "WEBVTT\n\n") == read(tmp_path, "a.json", {"segments": []}) == []


def test_captions_come_in_the_order_of_their_starts(tmp_path):
    assert read(tmp_path, "a.srt", "1\n00:09,0 --> 00:10,0\nc\n\n2\n00:01,0 --> 00:03,0\na\n\n3\n00:01,0 --> 00:02,0\nb\n") == [
        (1.0, 3.0, "a"), (1.0, 2.0, "b"), (9.0, 10.0, "c")]


# ---------------------------------------------------------------------------- rolling files


def test_rolling_file_keeps_each_line_once_also_one_that_is_said_twice(tmp_path):
    assert read(tmp_path, "a.vtt", ROLLING) == ROLLED
    assert read(tmp_path, "a.vtt", ROLLING.replace(" \n", "\n").replace("%\n\n", "%\n")) == ROLLED


def test_space_line_does_not_end_a_cue(tmp_path):
    vtt = "WEBVTT\n\n00:01.000 --> 00:02.000\n \nthe cat\n \nsat\n\nnot text\n\n00:03.000 --> 00:04.000\n\nnor this\n"
    assert read(tmp_path, "a.vtt", vtt) == [(1.0, 2.0, "the cat sat")]


def cues(*texts, head=""):
    return head + "".join(f"{i}\n00:00:{i:02},000 --> 00:00:{i + 1:02},000\n{text}\n\n" for i, text in enumerate(texts))


def test_file_without_inline_times_rolls_where_most_cues_begin_with_the_last_line_before(tmp_path):
    for name, head in (("a.srt", ""), ("a.vtt", "WEBVTT\n\n")):
        rolling = cues("a", "a\nb", "b\nc", "c\nd", "x\ny", head=head)  # 3 of 5
        assert [text for *_, text in read(tmp_path, name, rolling)] == ["a", "b", "c", "d", "x y"]
        half = cues("a", "a\nb", "b\nc", "x\ny", head=head)  # 2 of 4 are not more than half
        assert [text for *_, text in read(tmp_path, name, half)] == ["a", "a b", "b c", "x y"]
    for texts in (["no", "no", "yes", "the cat", "sat"], ["no", "no", "<i></i>", "<i></i>", "<i></i>"]):
        assert [text for *_, text in read(tmp_path, "a.srt", cues(*texts))] == [text for text in texts if text != "<i></i>"]


def test_longest_run_of_leading_lines_that_ends_the_cue_before_is_dropped(tmp_path):
    head = "WEBVTT\n\n"
    for texts, want in (
            (("a\nb\nc", "b\nc\n<00:00:01.500>d", "d\ne"), ["a b c", "d", "e"]),
            (("a\na", "a\na\n<00:00:01.500>a"), ["a a", "a"]),  # both, not one
            (("a\nb", "a\n<00:00:01.500>b\nc"), ["a b", "c"]),
            (("a\nb", "a\n<00:00:01.500>c"), ["a b", "a c"]),  # a does not end the cue before
            (("a", "<00:00:01.500>b\na", "a\nc"), ["a", "b a", "c"]),
            (("a", "<00:00:01.500>a", "a", "a\nb"), ["a", "b"]),  # of lines as shown, not of what was kept
            (("a\nb", " ", "b\n<00:00:01.500>c"), ["a b", "b c"])):  # an empty screen is no repeat
        assert [text for *_, text in read(tmp_path, "a.vtt", cues(*texts, head=head))] == want, texts


def test_json_and_csv_never_roll(tmp_path):
    rows = [{"start": i, "end": i + 1, "text": "Thank you."} for i in range(4)]
    assert len(read(tmp_path, "a.json", {"segments": rows})) == 4
    assert len(read(tmp_path, "a.csv", "start,end,text\n" + "".join(f"{i},{i + 1},yes\n" for i in range(4)))) == 4


def test_huge_cues_take_no_quadratic_time(tmp_path):
    begin = time.perf_counter()
    lines = "a\n" * 60000
    assert len(read(tmp_path, "a.vtt", cues(lines + "<00:00:01.000>b", lines, "<" * 50000, "&" * 50000 + "{\\" * 20000,
                                            "1" * 50000 + ":", head="WEBVTT\n\n"))) == 5
    assert time.perf_counter() - begin < 3


# ---------------------------------------------------------------------------- times


def test_missing_ends_are_the_next_later_start_and_the_last_a_few_seconds(tmp_path):
    table = "start,end,text\n1,,a\n3,4,\n7,,b\n7, ,c\n9,20,d\n30,,e\n"
    assert [end for _, end, _ in read(tmp_path, "a.csv", table)] == [7, 9, 9, 20, 35]  # an empty caption is no next one
    assert read(tmp_path, "a.csv", table, length=31.5)[-1] == (30.0, 31.5, "e")
    assert [end for _, end, _ in read(tmp_path, "a.csv", "start,text\n1,a\n3,b\n")] == [3, 8]
    events = [{"tStartMs": t, "segs": [{"utf8": "a"}]} for t in (500, 1750)] + [{"tStartMs": 900}]
    assert [end for _, end, _ in read(tmp_path, "a.json3", {"events": events})] == [1.75, 6.75]
    segments = [{"start": 1, "end": None, "text": "a"}, {"start": 2.5, "text": "b"}]
    assert [end for _, end, _ in read(tmp_path, "a.json", {"segments": segments})] == [2.5, 7.5]


def test_ends_are_cut_to_the_videos_end_and_times_rounded_to_milliseconds(tmp_path):
    table = "start,end,text\n1,2,a\n3,99,b\n20,21,c\n0.12345,0.99999,d\n1e1,1.0e1,e\n"
    assert read(tmp_path, "a.csv", table, length=10.4) == [(0.123, 1.0, "d"), (1, 2, "a"), (3, 10.4, "b"), (10, 10, "e"),
                                                           (20, 20, "c")]
    assert read(tmp_path, "a.csv", table)[2] == (3, 99, "b")


def test_negative_durations_and_captions_of_another_video_are_problems_and_left_out_alone(tmp_path):
    put(tmp_path, a__mp4="", b__mp4="", c__mp4="", d__mp4="", e__mp4="",
        a__csv="start,end,text\n1,2,ok\n5,4.5,back\n7,6,back\n",
        b__json3=json.dumps({"events": [{"tStartMs": 2000, "dDurationMs": -5, "segs": [{"utf8": "a"}]}]}),
        c__srt="1\n-00:00:01,000 --> 00:00:02,000\nearly\n\n2\n00:00:03,000 --> 00:00:03,000\nno time\n",
        d__srt=SRT + "\n2\n00:00:10,100 --> 00:00:12,000\nlast\n\n3\n00:00:12,500 --> 00:00:13,000\nother\n",
        e__srt=SRT + "\n2\n00:00:10,100 --> 00:00:12,000\nlast\n\n3\n00:00:12,300 --> 00:00:13,000\nother\n")
    captions, rows, problems = collect(tmp_path, {"a": 6.0, "d": 10.4, "e": 10.4})
    assert captions == {"a": {"start": [1], "end": [2], "text": ["ok"]}, "c": {"start": [3], "end": [3], "text": ["no time"]},
                        "d": {"start": [1], "end": [2.5], "text": ["the cat sat"]},
                        "e": {"start": [1], "end": [2.5], "text": ["the cat sat"]}}
    assert problems == [
        ("captions", f"{tmp_path}/a.csv: 2 of 3 captions end before they start, or begin before 0, the first at 5 s; mend "
                     "them"),
        ("captions", f"{tmp_path}/b.json3: 1 of 1 captions end before they start, or begin before 0, the first at 2 s; "
                     "mend them"),
        ("captions", f"{tmp_path}/c.srt: 1 of 2 captions end before they start, or begin before 0, the first at -1 s; mend "
                     "them"),
        ("captions", f"{tmp_path}/d.srt: 1 of 3 captions begin behind the video's end (10.4 s), the first at 12.5 s; are "
                     "they another's?")]
    assert [video for video, _ in rows] == ["a", "c", "d", "e"]
    # 10.4 s have 10 rows of features: what begins at 10.1 s has none; 10.5 s have 11
    assert collect(tmp_path, {"d": 10.5})[0]["d"]["end"] == [2.5, 10.5]
    assert collect(tmp_path)[0]["d"]["end"] == [2.5, 12, 13]  # of unknown length
    put(tmp_path, e__srt="1\n00:00,300 --> 00:00,400\nshort\n\n2\n00:01,000 --> 00:01,100\nlate\n")
    assert collect(tmp_path, {"e": 0.4})[0]["e"]["start"] == [0.3]  # a video has at least one row
    put(tmp_path, e__srt="1\n00:01,000 --> 00:01,100\nlate\n")
    assert collect(tmp_path, {"e": 0.4})[2][-1] == ("no captions", f"{tmp_path}/e.srt: holds none within the video")


# ---------------------------------------------------------------------------- what cannot be read

DEEP = '{"segments": ' + "[" * 200 + "]" * 200 + "}"


@pytest.mark.parametrize("name, content, says", [
    ("a.srt", "", "is empty"), ("a.srt", "the cat\nsat\n", "has no line such as 00:00:01,000 --> 00:00:02,500"),
    ("a.srt", b"1\n00:01,0 --> 00:02,0\nM\xfcller\n", "line 3: not UTF-8; convert the file first"),
    ("a.srt", SRT.encode("utf-16"), "is UTF-16"), ("a.vtt", "<html><body>", "is a web page"),
    ("a.srt", SRT + "\n2\n00:00:0x,000 --> 00:00:09,000\nhi\n", "line 6: '00:00:0x,000' is no time"),
    ("a.srt", f"00:0x{'a' * 999} --> 00:02\nhi\n", "is no time"),
    ("a.srt", "00:00:01,000 -->\nhi\n", "line 1: '' is no time"), ("a.vtt", b"\x1f\x8bxx", "damaged gzip"),
    ("a.srt", "00:00:20:500 --> 00:00:21:000\nhi\n", "line 1: '00:00:20:500' is no time"),
    ("a.srt", f"{'9' * 400}:00:00 --> 00:01\nhi\n", "a time is inf s"), ("a.srt", "9999999:00:00 --> 00:01\nhi\n", "a time is"),
    ("a.json3", "{", "broken JSON"), ("a.json", '{"segments": [{"start": 1}', "broken JSON"), ("a.json", "[]", "JSON list"),
    ("a.json", DEEP, "nested too deep"), ("a.json", '{"segments": ' + "[" * 10 ** 5, "nested too deep"),
    ("a.json", '{"segments": {}}', "neither YouTube's (events) nor Whisper's (segments)"),
    ("a.json", {"segments": [{"start": 1, "end": 2, "text": "a"}, {"start": 1}]}, "segments, number 2: KeyError 'text'"),
    ("a.json", {"segments": [{"start": "1", "end": 2, "text": "a"}]}, "number 1: ValueError '1' is no time"),
    ("a.json", {"segments": [{"start": True, "end": 2, "text": "a"}]}, "number 1: ValueError True is no time"),
    ("a.json", {"segments": [{"start": 1, "end": 2, "text": None}]}, "number 1: TypeError"),
    ("a.json", {"segments": [3]}, "number 1: TypeError"), ("a.json3", {"events": ["x"]}, "events, number 1: AttributeError"),
    ("a.json", '{"segments": [{"start": NaN, "end": 2, "text": "a"}]}', "None is no time"),
    ("a.json", '{"segments": [{"start": 1, "end": 1e999, "text": "a"}]}', "a time is inf s"),
    ("a.json", '{"segments": [{"start": 1, "end": 2, "text": "\\ud800"}]}', "broken JSON"),
    ("a.json", '{"segments": [{"start": 1' + "0" * 400 + ', "end": 2, "text": "a"}]}', "OverflowError"),
    ("a.json3", {"events": [{"segs": [{"utf8": "a"}]}]}, "None is no time"),
    ("a.json3", {"events": [{"tStartMs": 1, "dDurationMs": "2", "segs": [{"utf8": "a"}]}]}, "'2' is no time"),
    ("a.json3", {"events": [{"tStartMs": 1, "segs": [{"utf8": 3}]}]}, "TypeError"),
    ("a.csv", "begin;end;text\n1;2;hi\n", "line 1: no columns start, end and text"),
    ("a.csv", "start,end,text\n1,2,hello, world\n", "line 2: has more or fewer cells"),
    ("a.csv", "start,end,text\n1,2\n", "line 2: has more or fewer cells"), ("a.csv", "start,end,text\n,2,hi\n", "no start"),
    ("a.csv", "start,end,text\nsoon,2,hi\n", "line 2: could not convert"), ("a.csv", "start,end,text\nnan,2,a\n", "is nan s"),
    ("a.csv", 'start,end,text\n1,2,"hi\n3,4,there\n', "unexpected end of data"),
    ("a.csv", "start,end,text\n1:x,2,a\n", "line 2: '1:x' is no time"),
    ("a.csv", f"start,end,text\n1,2,{'a' * 200000}\n", "field limit")])
def test_unreadable_file_is_one_line_and_one_problem(tmp_path, name, content, says):
    line = stop_line(read, tmp_path, name, content)
    assert line.startswith(f"{tmp_path / name}") and says in line
    put(tmp_path, a__mp4="", b__mp4="", b__srt=SRT)
    captions, rows, problems = collect(tmp_path)
    assert list(captions) == ["b"] and rows == [("b", "b")] and [kind for kind, _ in problems] == ["captions"]
    assert says in problems[0][1] and len(problems[0][1]) <= 300


def test_missing_file_is_one_line(tmp_path):
    assert "a.srt: cannot be read (No such file" in stop_line(read_captions_file, tmp_path / "a.srt")


# ---------------------------------------------------------------------------- a folder


def test_folder_of_videos_with_captions_of_every_name(tmp_path):
    names = {"a__srt": "a", "sub___b__en__vtt": "b", "c__de-DE__json3": "c", "-d__json": "-d", "e__CSV": "e",
             "elsewhere___f__srt": "f", "g [abcDEF12345]__en__srt": "abcDEF12345", "h__en__srt": "h.en"}
    content = {".vtt": "WEBVTT\n\n" + SRT, ".srt": SRT, ".csv": "start,end,text\n1,2.5,the cat sat\n", ".json3": json.dumps(
        {"events": [{"tStartMs": 1000, "dDurationMs": 1500, "segs": [{"utf8": "the cat sat"}]}]}), ".json": json.dumps(
        {"segments": [{"start": 1, "end": 2.5, "text": "the cat sat"}]})}
    assert set(content) == set(CAPTIONS)
    put(tmp_path, **{name: content[Path(name.replace("__", ".")).suffix.lower()] for name in names})
    put(tmp_path, a__mp4="", sub___b__mp4="", sub___sub___c__mkv="", **{"-d__webm": "", "g [abcDEF12345]__mp4": ""}, e__MOV="",
        f__mp4="", h__en__mp4="", caption__json="{", videos__csv="", a__info__json="{", a__live_chat__json="{")
    captions, rows, problems = collect(tmp_path)
    assert problems == [] and list(captions) == sorted(names.values())
    assert all(row == {"start": [1.0], "end": [2.5], "text": ["the cat sat"]} for row in captions.values())
    assert rows == [(video, {"b": "sub/", "c": "sub/sub/"}.get(video, video)) for video in captions]


def test_a_video_and_a_folder_of_one_name_are_two_tasks(tmp_path):
    put(tmp_path, cook__mp4="", cook__srt=SRT, cook___a__mp4="", cook___a__srt=SRT, cook___b__mp4="", cook___b__srt=SRT)
    write_tasks(collect(tmp_path)[1], tmp_path / "v.csv")
    tasks = read_tasks(tmp_path / "v.csv")
    assert tasks["a"] == tasks["b"] != tasks["cook"]


def test_videos_without_captions_are_told(tmp_path):
    put(tmp_path, a__mp4="", b__mp4="", c__mp4="", c__vtt="WEBVTT\n\n", b__mp4__srt=SRT, sub___zz__srt=SRT)
    captions, rows, problems = collect(tmp_path)
    none = "no .srt, .vtt, .json3, .json or .csv file of this name"
    assert (captions, rows) == ({}, []) and problems == [
        ("no captions", f"{tmp_path}/a.mp4: {none}"),
        ("no captions", f"{tmp_path}/b.mp4: {none}"),
        ("no captions", f"{tmp_path}/c.vtt: holds none within the video")]


def test_captions_in_several_files_are_a_problem_unless_one_is_in_the_language(tmp_path):
    put(tmp_path, a__mp4="", a__en__srt=SRT, a__de__srt=SRT.replace("cat", "Katze"), a__en_US__srt=SRT.replace("cat", "CAT"),
        sub___b__mp4="", sub___b__en_US__srt=SRT, sub___b__srt=SRT, c__mp4="", c__srt=SRT, d__mp4="", d__de__vtt="x")
    captions, _, problems = collect(tmp_path)
    assert list(captions) == ["c"] and [kind for kind, _ in problems] == ["duplicate", "duplicate", "captions"]
    assert problems[0][1] == (f"a: has captions {tmp_path}/a.de.srt and {tmp_path}/a.en.srt (and 1 more); remove one, or "
                              "choose a language, such as --lang en")
    assert f"{tmp_path}/sub/b.en_US.srt and {tmp_path}/sub/b.srt; remove" in problems[1][1]
    captions, _, problems = collect(tmp_path, lang="EN")
    assert {video: row["text"] for video, row in captions.items()} == {video: ["the cat sat"] for video in "abc"}
    assert problems == [("no captions", f"{tmp_path}/d.mp4: none in --lang EN, but d.de.vtt")]
    assert collect(tmp_path, lang="en_US")[0]["a"]["text"] == ["the CAT sat"]
    assert collect(tmp_path, lang="de")[0]["a"]["text"] == ["the Katze sat"]
    assert ("no captions", f"{tmp_path}/a.mp4: none in --lang e, but a.de.srt") in collect(tmp_path, lang="e")[2]
    put(tmp_path, a__en__vtt="WEBVTT\n\n" + SRT)  # two kinds in one language
    assert f"{tmp_path}/a.en.srt and {tmp_path}/a.en.vtt; remove one" in collect(tmp_path, lang="en")[2][0][1]


# ---------------------------------------------------------------------------- what packing reads

AWKWARD = ["-bcDEF12345", "a, b", 'c "d"', "Ünï 猫", "e\nf", " g ", "h\u2028i", "j😀", "k\\l"]


def test_awkward_ids_and_texts_survive_the_way_to_packing(tmp_path):
    for i, video in enumerate(AWKWARD):
        folder = tmp_path / "v" / ("x, \"y\"" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{video}.mp4").touch()
        segments = [{"start": i, "end": i + 0.1, "text": video + " } ] \" {"}]
        (folder / f"{video}.json").write_text(json.dumps({"segments": segments}))
    captions, rows, problems = collect(tmp_path / "v")
    assert problems == [] and list(captions) == sorted(AWKWARD)
    write_captions(captions, tmp_path / "c.json")
    write_tasks(rows, tmp_path / "v.csv")
    assert {video: row for video, row, _ in read_captions(tmp_path / "c.json")} == captions
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == captions
    assert "Ünï 猫 }" in (tmp_path / "c.json").read_text(encoding="utf-8")  # to be looked through
    for row in captions.values():
        start, end, texts, wrong = caption_rows(row)
        assert not wrong and texts == row["text"] and len(start) == len(end) == 1
    tasks = read_tasks(tmp_path / "v.csv")
    assert list(tasks) == list(captions) and len(set(tasks.values())) == 6
    assert len({tasks[video] for video in AWKWARD[1::2]}) == 1
    with open(tmp_path / "v.csv", newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    assert [(row["video_id"], row["task"]) for row in table] == rows
    names = [name for _, name in sorted({(int(row["task_id"]), row["task"]) for row in table})]
    assert names == sorted(set(names)) and 'x, "y"/' in names


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_captions({}, tmp_path / "c.json")
    assert list(read_captions(tmp_path / "c.json")) == []
    for write, value in ((write_captions, {"a": {"start": [0.5]}, "b": {"start": [object()]}}), (write_tasks, [("a", 1), 2])):
        with pytest.raises(TypeError):
            write(value, tmp_path / "c.json")
        assert (tmp_path / "c.json").read_text() == "{}\n" and os.listdir(tmp_path) == ["c.json"]
    assert "no/c.json: was not written" in stop_line(write_captions, {}, tmp_path / "no" / "c.json")
    assert "no/v.csv: was not written" in stop_line(write_tasks, [], tmp_path / "no" / "v.csv")


def test_folder_is_packed_with_its_features_and_gives_vokens_of_its_tasks(vocab, tmp_path):
    (tmp_path / "f2").mkdir()
    for video in ("cooking/a", "cooking/-b", "c", "d"):
        folder = tmp_path / "v" / video
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_suffix(".mp4").touch()
        folder.with_suffix(".en.vtt").write_text(ROLLING)
        np.save(tmp_path / "f2" / f"{folder.name}.npy", np.tile(np.arange(5, dtype=np.float32)[:, None], 4))
    captions, rows, problems = collect(tmp_path / "v", dict.fromkeys(["a", "-b", "c", "d"], 5.3))
    write_captions(captions, tmp_path / "c.json")
    write_tasks(rows, tmp_path / "v.csv")
    counts = pack_videos(tmp_path / "c.json", tmp_path / "f2", tmp_path / "v.csv", vocab, tmp_path / "v.h5")
    assert problems == [] and counts == {"videos": 4, "captions": 12, "frames": 20, "problems": 0, "tokens": counts["tokens"]}
    maps = data.open_packed(tmp_path / "v.h5")[2]
    assert maps["video_id"].tolist() == [b"-b", b"a", b"c", b"d"] and maps["task"].tolist() == [1, 1, 0, 2]
    assert maps["start"][:3].tolist() == [0.16, 2.159, 4.079] and maps["end"][:3].tolist() == [2.149, 4.069, 5.3]
    clips = data.VideoClips(tmp_path / "v.h5", 12, val_clips=1)
    chosen = clips.video_of(clips.voken_clips(len(set(clips.task)), 0))
    assert sorted(clips.task[chosen]) == sorted(set(clips.task))
