"""Looks into finished runs: every figure and analysis of both papers, from saved files alone.

    python analyze.py table out/distill-*       # what distillations have learned, a row each
    python analyze.py curves                    # losses, gradients, learning rate, speed of runs
    python analyze.py retrieval                 # a sentence's clips by teacher and student (Fig. 4, 5)
    python analyze.py tokens                    # each token's clip, a word's neighbours (Fig. 2, Eq. 9)
    python analyze.py examples A B              # what A answers right and B wrong (Tables 10 to 12)
    python analyze.py neurons                   # what NST matches (section 3.4)
    python analyze.py pwcca MODEL MODEL         # how near word embeddings are (XDBERT Table 2)
    python analyze.py grounded A B              # is what B answers better more visual? (XDBERT Fig. 4)
    python analyze.py drift MODEL ADAPTED       # how far adapting has moved the weights (XDBERT Table 7)
    python analyze.py attention RUN RUN         # maps of the cross-modal encoder (XDBERT Table 9)
    python analyze.py page                      # one HTML file on a run, for a class

All but table write a picture, out/figures/<command>.png, and a json of what it shows. Where no folder is
given they look at the demo's models, and train these first where they are missing, which takes minutes. The
papers' tables of results are ablate.py's.
"""
import argparse
import sys
from functools import partial

import common
from analyses.clips import examples, retrieval, tokens
from analyses.closing import newest_run, table
from analyses.curves import curves
from analyses.figures import check_out
from analyses.inside import attention, drift, neurons
from analyses.page import page
from analyses.words import grounded, pwcca
from prepare.chain import any_distillation, demo_adaptations, demo_fine_tuned

NEWEST = "folder of a finished run; default: the newest distillation in out/, else the demo's, made now"


def parse(argv=None):
    """(function, its arguments by name) of the command in `argv`."""
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, text, out=".png"):
        one = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        one.set_defaults(function=function)
        if out:
            one.add_argument("--out", default=f"out/figures/{function.__name__}{out}",
                             help="the file to write (default %(default)s)")
        return one.add_argument

    number = {name: partial(common.convert, name, kind=int) for name in ("clips", "seed", "rows")}

    def with_thumbnails(add):
        add("--thumbnails", default="", metavar="FOLDER",
            help="of images <video_id>_<second>, <video_id>/<second> or <video_id> with .jpg or .png")

    def shown(add, clips=True):
        if clips:
            add("--clips", type=number["clips"], default=60000,
                help="search at most so many (default %(default)s)")
        with_thumbnails(add)
        add("--seed", type=number["seed"], default=0, help="of what is drawn at random (default %(default)s)")

    def two_models(add):
        add("a", metavar="A", nargs="?",
            help="folder of finetune.py's runs: of a task, or of a model with several; default: the demo's")
        add("b", metavar="B", nargs="?", help="the same of what is compared with it")
        add("--task", default="", help="one task; default: all that both have")
        add("--data_dir", default="", help="of the tasks' files; default: that of the runs")

    add = command(table, "the results of several distillations, a row each", out="")
    add("runs", nargs="+", help="folders of finished runs")
    add = command(curves, "losses, gradients, learning rate and speed of runs of any stage, overlaid")
    add("runs", nargs="*", help="folders of finished runs, at most 8; default: as for retrieval")
    add = command(retrieval, "figure of the clips that teacher and students retrieve for sentences")
    add("run", nargs="?", help=NEWEST)
    add("--sentence", action="append", default=[], metavar="TEXT",
        help="a sentence; may be repeated; default: --rows of the run's text corpus")
    add("--rows", type=number["rows"], default=4, help="sentences to draw (default %(default)s)")
    shown(add)
    add = command(tokens, "figure of the clip of each token of a sentence, and of a word's nearest words")
    add("run", nargs="?", help=NEWEST)
    add("--sentence", metavar="TEXT", help="default: one of the run's text corpus")
    add("--word", action="append", default=[], help="a word; may be repeated; default: three")
    shown(add, clips=False)
    add = command(examples, "figure of questions that A gets right and B wrong, with their nearest clips")
    two_models(add)
    add("--rows", type=number["rows"], default=6, help="questions to show (default %(default)s)")
    add("--run", default="", help="a distillation; its teacher finds the clips; default: the newest in out/")
    shown(add)
    add = command(neurons, "figure and table of the activation patterns that NST matches")
    add("run", nargs="?", help=NEWEST)
    add("--sentence", help="what they read; default: the run's held-out text")
    add = command(pwcca, "PWCCA of models' word embeddings, a bar a pair")
    add("models", nargs="*", metavar="MODEL", help="runs, folders of BERT, ELECTRA or CLIP, OpenAI's file")
    add("--words", default="", help="file of words, one a line; default: those that both hold whole")
    add("--clip_vocab", default="", help="vocabulary of an OpenAI file, bpe_simple_vocab_16e6.txt.gz")
    add = command(grounded, "visually-grounded ratio of examples that B improves or worsens against A")
    two_models(add)
    add("--captions", default="", help="COCO's json, text with a caption a line, or caption.json; "
                                       "default: the demo world's")
    add("--min_count", type=float, help="a grounded piece occurs more often in the captions; "
                                        "default: 100 per 591,753 captions")
    add = command(drift, "figure and table of the distance of adapted weights from the original ones")
    add("original", nargs="?", help="run or folder of the model that was adapted")
    add("adapted", nargs="*", help="runs or folders of what became of it")
    add = command(attention, "figure and table of the attention of cross-modal encoders")
    add("runs", nargs="*", help="folders of adapt_xdbert.py's runs")
    add("--sentence", help="what they read; default: the held-out text of the first run")
    add = command(page, "one HTML file on a run, with all that it shows in it", out=".html")
    add("run", nargs="?", help=NEWEST)
    with_thumbnails(add)
    argv = [common.spelled(arg, "_") for arg in (sys.argv[1:] if argv is None else argv)]
    args, rest = parser.parse_known_args(argv)
    flags = vars(args)
    name = flags.pop("command")
    if rest:
        raise SystemExit(f"analyze.py {name}: unknown {rest[0]}; see analyze.py {name} --help")
    if not 1 <= flags.get("rows", 1) <= 40:
        raise SystemExit(f"--rows {flags['rows']}: from 1 to 40")
    if "out" in flags:
        check_out(flags["out"], ".html" if name == "page" else ".png")
    return flags.pop("function"), flags


def fill_in(function, flags):
    """Puts folders of the demo's models where a command was given none; makes what is missing."""
    if function is curves and not flags["runs"]:
        flags["runs"] = [any_distillation()]
    if flags.get("a") and not flags["b"]:
        raise SystemExit(f"{flags['a']}: is compared with nothing; give a second folder, B")
    if "run" in flags and not flags["run"]:  # of own models nothing is made
        flags["run"] = newest_run() if flags.get("a") else any_distillation()
    if function in (examples, grounded):
        if not flags["a"]:
            both = demo_fine_tuned()
            flags["a"], flags["b"] = both if function is examples else both[::-1]  # B: what may be better
    if function is attention and not flags["runs"]:
        flags["runs"] = demo_adaptations()
    if function is pwcca and not flags["models"]:
        flags["models"] = ["out/distill-none-s0", *demo_adaptations(1), "out/teacher-clip-s0"]
    if function is drift and not flags["adapted"]:
        if flags["original"]:
            raise SystemExit(f"{flags['original']}: is compared with nothing; give an adapted model, too")
        flags |= {"original": "out/distill-none-s0", "adapted": demo_adaptations()}


@common.one_line_end()
def main(argv=None):
    common.clear_up_on_sigterm()
    function, flags = parse(argv)
    fill_in(function, flags)
    function(**flags)


if __name__ == "__main__":
    main()
