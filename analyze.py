"""Looks into finished runs: closing tables, retrieval, learning curves, words.

    python analyze.py table out/distill-*   # several distillations, a row each
    python analyze.py curves                # docs/curves.png: losses and gradients of the newest run
    python analyze.py clips                 # docs/clips.png: captions and the clips that are retrieved
    python analyze.py attention out/xdbert-mlm+match+cliptc-s0 out/xdbert-mlm+match-s0  # cross-modal maps
    python analyze.py drift out/distill-none-s0 out/xdbert-*   # how far adapting has moved the weights
    python analyze.py neurons               # activation patterns of teacher and student that NST matches
    python analyze.py pwcca MODEL MODEL     # how near their word embeddings are (XDBERT Table 2)
    python analyze.py grounded A B          # is what B answers better more visual? (XDBERT Figure 4)

Everything is measured from saved runs: a run can be looked at again at any time, beside any other.
"""
import argparse

import torch

import common
from analyses.closing import newest_run, open_judge, read_table, table
from analyses.curves import curves
from analyses.figures import clip_states, draw_clip, grid, save
from analyses.inside import attention, drift, neurons
from analyses.words import grounded, pwcca


def clips(run="", out="", rows=6):
    """PNG of held-out captions of the demo, each with its own clip and what every model retrieves first.

    A frame is green where the clip is the caption's own, blue where it shows the same noun, grey elsewhere.
    """
    run = run or newest_run()
    closing, judge = read_table(run), open_judge(run, torch.device("cpu"))
    if not judge.latents or not judge.clips:
        raise SystemExit(f"{run}: not a distillation on the demo world; only its clips can be drawn")
    states = clip_states(judge.latents, judge.clips[1])
    chosen = [i for i, state in enumerate(states) if state["noun"] in state["text"]]
    chosen = chosen[::max(1, len(chosen) // rows)][:rows]
    models = {name: column["retrieval"]["nearest"] for name, column in closing["columns"].items()}
    figure, axes = grid(rows, 1 + len(models), 3.4, 1.1)
    for row, i in enumerate(chosen):
        draw_clip(axes[row, 0], states[i], "green")
        axes[row, 0].set_title(f'"{states[i]["text"]}"', fontsize=8, loc="left")
        for column, (name, found) in enumerate(models.items(), 1):
            state = states[found[i]]
            draw_clip(axes[row, column], state, "green" if found[i] == i else
                      "blue" if state["noun"] == states[i]["noun"] else "lightgrey")
            if row == 0:
                axes[row, column].set_title(f"{name} retrieves", fontsize=8)
    save(figure, out, {"run": str(run), "clips": models})


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

    add = command(table, "the results of several distillations, a row each", figure=False)
    add("runs", nargs="+", help="folders of finished runs")
    add = command(curves, "losses, gradients, learning rate and speed of runs of any stage, overlaid")
    add("runs", nargs="*", help="folders of finished runs; default: the newest distillation in out/")
    add = command(clips, "figure of the clips that each model retrieves for held-out captions")
    add("run", nargs="?", help="folder of a finished run; default: the newest in out/")
    add = command(attention, "figure and table of the attention of cross-modal encoders")
    add("runs", nargs="+", help="folders of adapt_xdbert.py's runs")
    add("--sentence", default="", help="what they read; default: the held-out text of the first run")
    add = command(drift, "figure and table of the distance of adapted weights from the original ones")
    add("original", help="run or folder of the model that was adapted")
    add("adapted", nargs="+", help="runs or folders of what became of it")
    add = command(neurons, "figure and table of the activation patterns that NST matches")
    add("run", nargs="?", help="folder of a finished run; default: the newest in out/")
    add("--sentence", default="", help="what they read; default: the run's held-out text")
    add = command(pwcca, "PWCCA of models' word embeddings, a bar a pair")
    add("models", nargs="+", metavar="MODEL", help="runs, folders of BERT, ELECTRA or CLIP, OpenAI's file")
    add("--words", default="", help="file of words, one a line; default: those that both hold whole")
    add("--clip_vocab", default="", help="vocabulary of an OpenAI file, bpe_simple_vocab_16e6.txt.gz")
    add = command(grounded, "visually-grounded ratio of examples that B improves or worsens against A")
    add("a", metavar="A", help="folder of finetune.py's runs: of a task, or of a model with several")
    add("b", metavar="B", help="the same of what is compared with it")
    add("--task", default="", help="one task; default: all that both have")
    add("--captions", default="", help="COCO's json, text with a caption a line, or caption.json; "
                                       "default: the demo world's")
    add("--min_count", type=float, help="a grounded piece occurs more often in the captions; "
                                        "default: 100 per 591,753 captions")
    add("--data_dir", default="", help="of the tasks' files; default: that of the runs")
    flags = vars(parser.parse_args(argv))
    del flags["command"]
    return flags.pop("function"), flags


@common.one_line_end()
def main(argv=None):
    function, flags = parse(argv)
    function(**flags)


if __name__ == "__main__":
    main()
