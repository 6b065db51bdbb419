"""The commands of data.py: demo, vocab, text, xtext and videos."""
import argparse
import sys
from functools import partial

import data
from common import Parser, convert, one_line_end, spelled
from prepare.packing import pack_text, pack_videos, pack_xtext, train_vocab
from prepare.world import make_demo


@one_line_end()
def main(argv=None):
    """Runs the command in `argv`; dashes and underscores in flags are equal."""
    parser = Parser(prog="data.py", description=data.__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|vocab|text|xtext|videos")

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False).add_argument

    number = {name: partial(convert, name, kind=int) for name in ("seed", "size", "jobs")}
    jobs = {"type": number["jobs"], "default": 1,
            "help": "processes, 0 = one a core; the file is the same, byte for byte (default 1)"}
    add = command("demo", "build and pack the demo world")
    add("--seed", type=number["seed"], default=0, help="every seed is another world (default 0)")
    add("--out", default="", help="its folder (default data/demo-s<seed>)")
    add = command("vocab", "train a WordPiece vocabulary on text")
    add("text", nargs="+", help="text files, gzipped or not; see docs/data.md for their layouts")
    add("--size", type=number["size"], default=30522, help="tokens (default 30522)")
    add("--cased", action="store_true", help="keep upper case and accents")
    add("--out", required=True, help="vocab.txt to write")
    add = command("text", "pack text files into one stream of tokens")
    add("text", nargs="+", help="text, gzipped or not: blank lines between documents, JSON lines, and more")
    add("--vocab", required=True, help="vocab.txt, tokenizer.json, or a folder or packed .h5 that holds one")
    add("--jobs", **jobs)
    add("--out", required=True, help=".h5 file to write")
    add = command("xtext", "pack text files as two streams of tokens, word pieces and CLIP's, for XDBERT")
    add("text", nargs="+", help="as for text")
    add("--vocab", required=True, help="as for text: of the language encoder that shall be adapted")
    add("--clip-vocab", required=True, help="bpe_simple_vocab_16e6.txt.gz, or a folder of CLIP's text tower")
    add("--jobs", **jobs)
    add("--out", required=True, help=".h5 file to write")
    add = command("videos", "pack captions and features in HowTo100M's layout")
    add("--captions", required=True, help="caption.json: {video id: {start, end, text}}, or a folder of .csv")
    add("--feat2d", required=True, help="folder of <video id>.npy, (seconds, channels), 1 per second")
    add("--feat3d", default="", help="the same at 1.5 per second (default: 2D alone)")
    add("--csv", required=True, help="videos to pack, with columns video_id and task_id")
    add("--vocab", required=True, help="as for text; the teacher and its students share one vocabulary")
    add("--skip-bad", action="store_true", help="leave out what is missing or broken instead of stopping")
    add("--shard", default="1/1", metavar="I/N",
        help="the I-th of N parts of the videos, to OUT-0000I-of-0000N.h5; one that is there is kept, and "
             "nothing is done, so that a loop may be started again (default: all to OUT)")
    add("--out", required=True, help=".h5 file to write")
    args = parser.parse_args([spelled(arg, "-") for arg in (sys.argv[1:] if argv is None else argv)])
    try:
        if args.command == "demo":
            make_demo(args.out or f"data/demo-s{args.seed}", args.seed)
        elif args.command == "vocab":
            train_vocab(args.text, args.out, args.size, not args.cased)
        elif args.command == "text":
            pack_text(args.text, args.vocab, args.out, args.jobs)
        elif args.command == "xtext":
            pack_xtext(args.text, args.vocab, args.clip_vocab, args.out, args.jobs)
        else:
            pack_videos(args.captions, args.feat2d, args.csv, args.vocab, args.out, args.feat3d,
                        args.skip_bad, args.shard)
    except KeyboardInterrupt as end:
        kept = "" if getattr(args, "shard", "1/1") == "1/1" else "; finished shards are kept"
        sys.exit(f"data.py: {str(end) or 'interrupted'}; no file was left under --out{kept}")
