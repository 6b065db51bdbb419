"""Looks into finished runs: closing tables, learning curves, retrieval, vokens, examples.

    python analyze.py table out/distill-*   # several distillations, a row each
    python analyze.py curves                # losses and gradients of the newest run
    python analyze.py retrieval             # sentences, and the clips that teacher and students retrieve
    python analyze.py tokens                # the clip of each token of a sentence; a word's nearest words
    python analyze.py examples out/finetune/A out/finetune/B  # what A gets right and B wrong, with clips

Everything is measured from saved runs: a run can be looked at again at any time, beside any other.
"""
import argparse

import common
from analyses.clips import examples, retrieval, tokens
from analyses.closing import table
from analyses.curves import curves


def parse(argv=None):
    """(function, its arguments by name) of the command in `argv`."""
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, text, figure=True):
        one = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        one.set_defaults(function=function)
        if figure:
            one.add_argument("--out", default=f"out/figures/{function.__name__}.png",
                             help="the PNG to write, a json beside it (default %(default)s)")
        return one.add_argument

    def shown(add, clips=True):
        if clips:
            add("--clips", type=int, default=60000, help="search at most so many (default %(default)s)")
        add("--thumbnails", default="", metavar="FOLDER",
            help="of images <video_id>_<second>, <video_id>/<second> or <video_id> with .jpg or .png")
        add("--seed", type=int, default=0, help="of what is drawn at random (default %(default)s)")

    add = command(table, "the results of several distillations, a row each", figure=False)
    add("runs", nargs="+", help="folders of finished runs")
    add = command(curves, "figure of a distillation's curves and of what was learned")
    add("run", nargs="?", help="folder of a finished run; default: the newest in out/")
    add = command(retrieval, "figure of the clips that teacher and students retrieve for sentences")
    add("run", nargs="?", help="folder of a finished run; default: the newest in out/")
    add("--sentence", action="append", default=[], metavar="TEXT",
        help="a sentence; may be repeated; default: --rows of the run's text corpus")
    add("--rows", type=int, default=4, help="sentences to draw (default %(default)s)")
    shown(add)
    add = command(tokens, "figure of the clip of each token of a sentence, and of a word's nearest words")
    add("run", nargs="?", help="folder of a finished run; default: the newest in out/")
    add("--sentence", default="", metavar="TEXT", help="default: one of the run's text corpus")
    add("--word", action="append", default=[], help="a word; may be repeated; default: three")
    shown(add, clips=False)
    add = command(examples, "figure of questions that A gets right and B wrong, with their nearest clips")
    add("a", metavar="A", help="folder of finetune.py: of a model, or of one of its tasks")
    add("b", metavar="B", help="the same of another model")
    add("--task", default="", help="default: all that both have")
    add("--rows", type=int, default=6, help="questions to show (default %(default)s)")
    add("--run", default="", help="a distillation; its teacher finds the clips; default: the newest in out/")
    shown(add)
    flags = vars(parser.parse_args(argv))
    del flags["command"]
    return flags.pop("function"), flags


@common.one_line_end()
def main(argv=None):
    function, flags = parse(argv)
    function(**flags)


if __name__ == "__main__":
    main()
