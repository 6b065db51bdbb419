"""One HTML file on a run, for a class: everything is in it, nothing is fetched."""
import base64
import contextlib
import html
import io
import re
import shlex
import tempfile
import time
from pathlib import Path

from analyses.clips import retrieval
from analyses.closing import saved_table
from analyses.curves import curves
from analyses.figures import check_out
from common import atomic, print0
from run import read_run

STYLE = """
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; } pre { overflow-x: auto; background: #f6f6f6; padding: 0.8rem; font-size: 13px; }
table { border-collapse: collapse; font-size: 14px; } td { padding: 0.1rem 1.2rem 0.1rem 0; }
td + td { word-break: break-all; }
"""
WHAT = {  # what a run is, by a flag that only its stage's Config has
    "crd_tau": "a student, distilled on text alone (VidLanKD section 3.3)",
    "ct_input": "a teacher, trained on videos and their captions (VidLanKD section 3.2)",
    "cliptc_rate": "a language encoder, adapted beside CLIP's text tower (XDBERT section 2.3)",
    "layer_decay": "{model}, fine-tuned on {task}, seed {seed}"}
# what its parts show
CURVES = """Each term of the loss over the steps, relative to where it began; the gradient that each sends
into the last hidden states, by which terms can be compared; the learning rate, and the speed."""
TABLE = """What the teacher, a student that read text alone and this student know. Retrieval: is a caption's
own clip among the 1, 5, 10 nearest? Probes: does a noun's vector tell its property, of nouns that the probe
was not fitted on? The demo's texts say nothing of these properties."""
CLIPS = """On the demo a clip is six frames: the form is the material, size and colour are the thing's; it
turns or rises, and pales where the action has an effect. No student has seen a clip."""


def element(tag, text):
    """<tag>text</tag>, the text escaped."""
    return f"<{tag}>{html.escape(str(text))}</{tag}>"


def drawn(words, command, *args, **flags):
    """What a command of analyze.py shows: its picture as a data: source, and the text that it prints; `words`
    tell what it is."""
    text = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figure.png"
        with contextlib.redirect_stdout(text):
            command(*args, out=out, **flags)
        picture = base64.b64encode(out.read_bytes()).decode()
    text = re.sub(r"\nwrote .*", "", text.getvalue()).strip("\n")
    image = f'<img alt="{html.escape(words)}" src="data:image/png;base64,{picture}"/>'
    return "\n".join([element("p", words), image, element("pre", text)])


def page(run, thumbnails="", out=""):
    """A self-contained HTML page on a run: curves, closing table, retrieved clips, flags, command line."""
    run, out = Path(run), check_out(out, ".html")
    config, results = read_run(run)
    flags = config["config"]
    what = next((text for flag, text in WHAT.items() if flag in flags), "a run").format_map(
        {"model": "a model", "task": "a task", "seed": "?"} | results)
    if "crd_tau" in flags and flags.get("objective") == "none":
        what = "a student that read text alone, the baseline"
    parts = [element("h1", f"{run.name}: {what}"), element("h2", "Learning curves"),
             drawn(CURVES, curves, [run])]
    if (run / "table.json").exists() and flags.get("objective") != "none" and "crd_tau" in flags:
        table, clips = saved_table(run)
        parts += [element("h2", "What was learned"), element("p", TABLE), element("pre", table)]
        if clips:
            parts += [element("h2", "Sentences and the clips that they retrieve"),
                      drawn(CLIPS, retrieval, run, thumbnails=thumbnails)]
    parts.append(element("h2", "Results"))
    parts.append(rows({name: x for name, x in flat(results).items()
                       if name not in ("folder", "format", "finished", "vocabulary")}))
    parts.append(element("h2", "How it was made"))
    command = config.get("command")
    parts.append(element("pre", shlex.join(map(str, command)) if isinstance(command, list) else "unknown"))
    known = ("git", "versions", "device", "threads", "hashes")
    parts += [rows(flat({name: config[name] for name in known if name in config})),
              element("h2", "Configuration"), rows(flags),
              element("p", f"Made by analyze.py page on {time.strftime('%Y-%m-%d')}.")]
    head = f'<meta charset="utf-8"/>\n{element("title", run.name)}\n<style>{STYLE}</style>'
    text = "\n".join(["<!DOCTYPE html>", '<html lang="en">', f"<head>\n{head}\n</head>", "<body>", *parts,
                      "</body>", "</html>", ""])
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as part:
        part.write_text(text, encoding="utf-8")
    print0(f"wrote {out}: {len(text) / 1e6:.1f} MB, with all that it shows in it")


def flat(values, prefix=""):
    """{"a": {"b": 1}} -> {"a b": 1}; lists as one text."""
    found = {}
    for name, value in values.items():
        name = f"{prefix}{name}"
        found |= flat(value, f"{name} ") if isinstance(value, dict) else {name: value}
    return found


def rows(values):
    """An HTML table of names and values."""
    lines = [f"<tr>{element('td', name)}{element('td', f'{x:.4g}' if isinstance(x, float) else x)}</tr>"
             for name, x in values.items()]
    return "\n".join(["<table>", *lines, "</table>"])
