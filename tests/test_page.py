"""Proves that a run's page is one well-formed file that needs nothing from elsewhere.

Run: python -m pytest -q tests/test_page.py
"""
import base64
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

import analyze
from analyses import page
from test_analyze import example, write_run


class Reader(HTMLParser):
    """Collects the attributes and checks that every element is closed in its order."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def student(tmp_path):
    """The folder of a distillation without clips; its flags hold what HTML must escape."""
    run = write_run(tmp_path / "distill-nst+crd-s0", finished=1.0, objective="nst+crd", mlm_loss=2.0)
    (run / "config.json").write_text(json.dumps({
        "format": 3, "config": {"objective": "nst+crd", "crd_tau": 0.07, "train": "<script>alert('&')</script>"},
        "command": ["distill.py", "--train", "a b.h5"], "git": {"commit": "abc", "dirty": False},
        "versions": {"torch": "2.13.0"}, "device": "cpu", "threads": 2}))
    columns = {name: example(1) | {"retrieval": None} for name in ("text-only", "nst+crd")}
    (run / "table.json").write_text(json.dumps({"columns": columns, "clips": 0}))
    return run


def test_page_is_whole_and_needs_nothing_from_elsewhere(student, tmp_path, capsys):
    out = tmp_path / "figures" / "page.html"
    analyze.main(["page", str(student), "--out", str(out)])
    text = out.read_text()
    assert re.search(r"wrote .*page.html: 0.\d MB", capsys.readouterr().out)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    ET.fromstring(text.partition("\n")[2])  # behind the doctype it is well-formed XML, too
    sources = [value for name, value in reader.attributes if name in ("src", "href", "data", "action", "srcset", "poster")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert base64.b64decode(sources[0].partition(",")[2]).startswith(b"\x89PNG")
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?:", text)
    shown = "".join(reader.text)
    for words in ("<script>alert('&')</script>", "distill.py --train 'a b.h5'", "distilled on text alone", "masked words: loss",
                  "gradient norm", "git commit", "abc", "crd_tau", "0.07", "mlm_loss"):
        assert words in shown, words
    assert not list(out.parent.glob("*.png")) and "wrote" not in shown


def test_page_of_any_stage_has_curves_and_flags(tmp_path):
    run = write_run(tmp_path / "s1", task="mishap")
    (run / "config.json").write_text(json.dumps({"format": 3, "config": {"layer_decay": 1.0}}))
    analyze.main(["page", str(run), "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "a model, fine-tuned on mishap, seed ?" in text and "unknown" in text and text.count("<img") == 1


def test_page_of_what_is_none_is_one_line(student, tmp_path):
    with pytest.raises(SystemExit, match="x.png: is written as HTML; give a name that ends in .html"):
        analyze.main(["page", str(student), "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match="give the folder of a finished run"):
        analyze.main(["page", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.html")])
    (student / "table.json").write_text(json.dumps({"columns": {}, "clips": 0}))
    with pytest.raises(SystemExit, match="table.json: not in the form of distill.py"):
        analyze.main(["page", str(student), "--out", str(tmp_path / "x.html")])
    log = student / "log.jsonl"
    log.write_text(log.read_text().replace("grad_norm", "norm"))
    with pytest.raises(SystemExit, match="log.jsonl: is no log of a run"):
        analyze.main(["page", str(student), "--out", str(tmp_path / "x.html")])
    assert not list(tmp_path.glob("x.*"))


def test_nested_results_become_one_row_each():
    assert page.flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a b": 1, "a c d": [2], "e": None}
