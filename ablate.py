"""Runs every row of a table of the papers, or a grid of flags, and prints ours beside the paper's numbers.

    python ablate.py --table 5                                          # VidLanKD's Tables 1 to 9 and 13
    python ablate.py --table xdbert-3 --seeds 1                         # XDBERT's Tables 1, 2, 3, 6, 7, 8
    python ablate.py --vary w_nst=0,10,100 --vary head=mlp,none         # a grid of any flags
    python ablate.py --table 5 --dry_run                                # the commands, and how long they take
    python ablate.py --table 5 --teacher "--preset small --videos howto100m.h5" \\
        --student "--preset small --train wiki103.h5" \\
        --finetune "--preset vidlankd --data_dir nlu --tasks sst2,qnli,qqp,mnli"

Each seed is a whole chain: demo world, teacher, student or adaptation, fine-tuning. Rows are commands of the
stages, keyed by all their flags: what two rows or two tables share is run once, finished runs are kept,
killed ones go on. A row is compared with the table's baseline by a paired t test over the seeds, as both saw
the same worlds. out/ablate/ gets <table>.json and <table>.png.
"""
import argparse
import hashlib
import itertools
import math
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

import adapt_xdbert
import common
import data
import finetune
from analyses import figures
from analyses.answers import shared_answers
from analyses.inside import distances, open_encoder
from analyses.papers import TABLES, Row, Table
from analyses.plan import SCRIPTS, TAKEN, Plan, finished
from analyses.rows import as_csv, as_latex, as_text, columns_of, draw, main_column, seen_by, statistics
from analyses.times import estimates
from analyses.words import compare_embeddings, word_embeddings
from common import atomic, duration, parse_cli, peek_json, print0, read_json, write_json
from parts.machine import cores, init_ranks, side_by_side
from parts.tasks import DEMO_TASKS, TASKS
from prepare.chain import command
from prepare.world import ACTIONS
from run import git_state

# ---------------------------------------------------------------------------- what came out


def measure(table, row, seed, plan, folders):
    """{column: value} of a row on a seed's world."""
    if table.by == "parameters":
        return {"parameters": parameters(row.model)}
    if table.by == "pwcca":
        one, other = row.model.split("/")
        names = folders[one], folders.get(other) or plan.tower(row, seed)
        path = data.find_shards(plan.pairs(row, seed))[0]
        vocab = data.stored_clip_vocab(path, *data.open_packed(path, "xtext"))
        found = compare_embeddings(*((name, *word_embeddings(name, vocab)) for name in names))
        return {"PWCCA": found["random"][0] if other == "random" else found["pwcca"]}
    cfg = plan.jobs[Path(folders["tuned"]).name][1]
    scores = scores_of(cfg)
    if table.by == "categories":
        asked = [TASKS[name].title for name in ("piqa", "tracie", "two_choices", "before_after")]
        scores = categories_of(cfg) | {title: scores[title] for title in asked if title in scores}
    if table.by == "drift":
        original, adapted = (open_encoder(folders[name])[0] for name in ("language", row.model))
        scores = {"distance": distances(original, adapted)["all"]["rms"]} | scores
    return scores


def runs_of(cfg, task):
    """Results of a task's runs, of as many as cfg.seeds."""
    return read_json(Path(cfg.out_dir, task.name, "results.json"))["runs"][:cfg.seeds]


def scores_of(cfg):
    """{column: value} of a fine-tuned run: each task's main score, the mean over its seeds; their average,
    without READ's error; the demo's accuracy on nouns that were seen, and the probe of the model's nouns."""
    scores, averaged, seen = {}, [], []
    for task in finetune.chosen_tasks(cfg):
        runs = runs_of(cfg, task)
        values = [math.nan if run["score"] is None else run["score"] for run in runs]
        scores[task.title] = float(np.mean(values))
        averaged += [scores[task.title]] * (task.metrics[0] != "rmse")
        seen += [run["scores"]["seen"]["accuracy"] for run in runs if "seen" in run["scores"]]
    scores["average"] = float(np.mean(averaged)) if averaged else math.nan
    if seen:
        scores["seen nouns"] = float(np.mean(seen))
    if cfg.model and (probes := peek_json(Path(cfg.model, "results.json")).get("probes")):
        scores["material probe"] = 100 * probes["material"]["linear"]
    return scores


def collapsed(cfg):
    """Names of the tasks' runs that learned nothing, see parts.metrics.collapse."""
    return [f"{task.title} s{run['seed']}" for task in finetune.chosen_tasks(cfg)
            for run in runs_of(cfg, task) if run["collapsed"]]


def categories_of(cfg):
    """{column: accuracy} by category: of GLUE's diagnostics where MNLI was fine-tuned on, and of the demo's
    entailment by the action that its question is about. The mean over the runs."""
    found = {}
    for task in finetune.chosen_tasks(cfg):
        if task.name == "mnli":
            runs = [run["scores"].get("diagnostic", {}) for run in runs_of(cfg, task)]
            for name in (name for name in runs[0] if name.endswith(", accuracy")):
                found[name.removesuffix(", accuracy")] = float(np.mean([run[name] for run in runs]))
        if task.name == "entailment":
            answers, _ = shared_answers(*2 * [Path(cfg.out_dir, task.name)], [task.kind])[task.name]
            for action, (past, _) in ACTIONS.items():
                about = [past in text.split() for text in answers.rows.first]
                found[f"entailment: {action}"] = 100 * float(answers.right[:, about].mean())
    return found


def parameters(model):
    """Parameters of a shape of adapt_xdbert.LANGUAGE, with /cross of the whole cross-modal model."""
    name, _, whole = model.partition("/")
    cfg = adapt_xdbert.Config(language=name, clip="random", no_clip=not whole, dry_run=True,
                              objective=adapt_xdbert.Config.objective if whole else "mlm")
    return sum(adapt_xdbert.part_sizes(adapt_xdbert.empty_model(cfg)).values())


# ---------------------------------------------------------------------------- the command


def grid_of(vary):
    """Table of all combinations of --vary's values; the first is the baseline."""
    names, choices = [], []
    for text in vary:
        name, _, values = text.partition("=")
        stage, _, flag = name.rpartition(".")
        flag = flag.replace("-", "_")
        having = [s for s, script in SCRIPTS.items() if flag in {f.name for f in fields(script.Config)}]
        stage = stage or ("student" if "student" in having else having[0] if len(having) == 1 else "")
        values = values.split("|" if "|" in values else ",")
        if "" in values or stage not in having:
            raise SystemExit(f"--vary {text}: write FLAG=VALUE,VALUE of distill.py, or STAGE.FLAG=VALUE,"
                             f"VALUE, STAGE one of {' '.join(SCRIPTS)}; "
                             f"{flag} is a flag of {' and '.join(having) or 'none'}")
        if flag in TAKEN[stage] | {"preset"}:
            raise SystemExit(f"--vary {text}: --{flag} is not a flag that rows may differ in; give presets "
                             f"by --{stage} \"--preset NAME\"")
        if len(set(values)) < len(values) or (stage, flag) in names:
            raise SystemExit(f"--vary {text}: gives a value or a flag twice; keep one")
        names.append((stage, flag))
        choices.append(values)
    rows = []
    for values in itertools.product(*choices):
        flags = {stage: {} for stage in SCRIPTS}
        for (stage, flag), value in zip(names, values):
            flags[stage][flag] = value
        name = " ".join(f"{text.partition('=')[0]}={value}" for text, value in zip(vary, values))
        rows.append(Row(name, model="adapted" if flags["adapt"] else "student", **flags))
    return Table("grid of " + ", ".join(text.partition("=")[0] for text in vary), (), tuple(rows))


def parse(argv=None):
    """The flags as a namespace; dashes and underscores in their names are equal."""
    argv = [common.spelled(text, "_") for text in (sys.argv[1:] if argv is None else argv)]
    for stage in SCRIPTS:  # argparse takes --student "--lr=1" for two flags
        if f"--{stage}" in argv[:-1]:
            at = argv.index(f"--{stage}")
            argv[at:at + 2] = [f"--{stage}={argv[at + 1]}"]
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", help=f"one of {', '.join(TABLES)}")
    what.add_argument("--vary", action="append", metavar="FLAG=VALUE,VALUE",
                      help="of distill.py, or STAGE.FLAG=VALUE,VALUE (teacher, student, adapt, finetune); | "
                           "stands between values that have commas; the first is the baseline; repeat it for "
                           "a grid")
    add("--seeds", type=int, default=3, help="whole chains: world, teacher, student, fine-tuning (default 3)")
    add("--first_seed", type=int, default=0, help="the first of these (default 0)")
    add("--tune_seeds", type=int, default=1, help="fine-tuning runs of each chain's model (default 1)")
    for stage, script in SCRIPTS.items():
        add(f"--{stage}", default="", metavar="FLAGS",
            help=f"flags for every {Path(script.__file__).name}, in quotes")
    add("--second_videos", default="", metavar="FILE",
        help="table 1 on own data: the packed features of the weaker 2D encoder")
    add("--larger_text", default="", metavar="FILE",
        help="table xdbert-3 on own data: more text, packed by data.py xtext")
    add("--against", type=int, default=0, metavar="N",
        help="compare with the table's N-th row instead of its baseline (<table>-against-N.json)")
    add("--jobs", type=int, default=0, help="processes at once (default: cores; on GPUs one each)")
    add("--dry_run", action="store_true", help="print the commands and how long they may take")
    add("--show", action="store_true", help="run nothing: the table of what is finished")
    add("--csv", action="store_true", help="write <table>.csv, too")
    add("--latex", action="store_true", help="write <table>.tex, too")
    add("--out", default="out/ablate", help="folder of runs and results (default %(default)s)")
    args, rest = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    if rest:  # told before what is missing: it may be this, mistyped
        raise SystemExit(f"ablate.py: unknown {rest[0]}; see ablate.py --help")
    if not (args.table or args.vary):
        raise SystemExit("ablate.py: give --table, or --vary; see ablate.py --help")
    if args.table and args.table not in TABLES:
        raise SystemExit(f"--table {args.table}: choose one of {', '.join(TABLES)}")
    if args.seeds > 100:
        raise SystemExit(f"--seeds {args.seeds}: at most 100")
    if args.second_videos and args.table != "1" or args.larger_text and args.table != "xdbert-3":
        raise SystemExit("--second_videos is for table 1 and --larger_text for table xdbert-3; leave it out")
    for name, least in (("seeds", 1), ("tune_seeds", 1), ("first_seed", 0), ("against", 0), ("jobs", 0)):
        if getattr(args, name) < least:
            raise SystemExit(f"--{name} {getattr(args, name)}: at least {least}")
    return args


def configs(args, table):
    """{stage: Config} of what every run of a stage shares; one line where it gives what rows set."""
    base = {}
    for stage, script in SCRIPTS.items():
        try:
            words = shlex.split(getattr(args, stage))
        except ValueError as error:
            raise SystemExit(f"--{stage} {getattr(args, stage)}: {error}") from None
        base[stage] = cfg = parse_cli(script.Config, script.PRESETS, words)
        of_rows = {name for row in table.rows for name in getattr(row, stage)} if args.table else set()
        if stage == "student" and any(row.two_stage for row in table.rows):
            of_rows.add("init_from")
        for name in sorted(TAKEN[stage] | of_rows):
            if getattr(cfg, name) != getattr(script.Config, name):
                raise SystemExit(f"--{stage}: --{name} {getattr(cfg, name)} is what ablate.py or the rows of "
                                 "the table set themselves; leave it out")
    return base


def left_out(row, args, base):
    """Why a row cannot be run on own data, or ""."""
    if row.second and base["teacher"].videos and not args.second_videos:
        return "needs features of a second 2D encoder; give them as --second_videos FILE"
    if row.larger and base["adapt"].train and not args.larger_text:
        return "needs more text; give it as --larger_text FILE"
    if row.model == "tower" and (clip := base["adapt"].clip) and not Path(clip).is_dir():
        return f"needs a tower that can be fine-tuned; give a folder of CLIP in place of --clip {clip}"
    return ""


def show(name, plan):
    """A job as the command line that anyone can repeat."""
    stage, cfg = plan.jobs[name]
    script, *flags = command(SCRIPTS[stage], cfg)[1:]
    return shlex.join(["python", Path(script).name, *flags])


@common.one_line_end()
def main(argv=None):
    """Plans, runs and shows a table; exit status 1 where a row lacks a run."""
    args = parse(argv)
    common.clear_up_on_sigterm()
    table = TABLES[args.table] if args.table else grid_of(args.vary)
    if args.against > len(table.rows):
        raise SystemExit(f"--against {args.against}: the table has {len(table.rows)} rows")
    if args.against:
        table = replace(table, baseline=args.against - 1)
    base = configs(args, table)
    for flag, stage, name in (("second_videos", "teacher", "videos"), ("larger_text", "adapt", "train")):
        if getattr(args, flag) and not getattr(base[stage], name):
            raise SystemExit(f"--{flag} {getattr(args, flag)}: is for own data, --{stage} \"--{name} FILE\"; "
                             "on the demo it is made")
    given = {word[2:].partition("=")[0].replace("-", "_") for word in shlex.split(args.student)}
    plan = Plan(base, args.tune_seeds, args.out, args.second_videos, args.larger_text, given)
    seeds, runs = range(args.first_seed, args.first_seed + args.seeds), {}
    for i, row in enumerate(table.rows):
        if why := left_out(row, args, base):
            print0(f"left out: {row.name} {why}")
        elif row.model and table.by != "parameters":
            for seed in seeds[:1] if row.one_seed else seeds:
                runs[i, seed] = plan.folders(row, seed, table.by)
    check(plan, table, runs, args)
    left, on_gpu = plan.left(), init_ranks(base["student"].device).device.type == "cuda"
    workers = args.jobs or (torch.cuda.device_count() if on_gpu else cores())
    took = estimates(plan, left, workers) if left else {}
    print0(f"{table.title}: {len(table.rows)} rows, {args.seeds} seeds, {len(plan.jobs)} runs; to be made: "
           f"{len(left)}, in about {duration(sum(took.values()) / min(workers, max(1, len(left))))}, "
           f"{workers} at once")
    if old := of_other_code(plan, left):
        print0(f"{old} of the finished runs are of another commit, or of code with changes that git does not "
               "know; they are kept: give another --out to make all anew")
    if not args.show:
        show_plan(plan, table, runs, took)
    if args.dry_run:
        return
    if args.show:
        failed = dict.fromkeys(left, "is not finished")
    else:
        for make in plan.makers.values() if left else ():
            make()
        failed = run_jobs(plan, left, workers)
    results = {(i, 0): {"parameters": parameters(row.model)} for i, row in enumerate(table.rows)
               if table.by == "parameters"}
    for (i, seed), folders in runs.items():
        if failed.keys().isdisjoint(Path(folder).name for folder in folders.values()):
            try:
                results[i, seed] = measure(table, table.rows[i], seed, plan, folders)
            except SystemExit as error:  # of a file that was damaged since
                failed[f"{table.rows[i].name}, seed {seed}"] = str(error)
    close(table, args, plan, runs, results)
    if args.show:
        print0(f"not finished: {len(left)} of {len(plan.jobs)} runs")
    elif failed:
        for job, why in failed.items():
            print0(f"failed: {job}: {why}" + (f"; all that it said: {plan.out / 'logs' / job}.txt"
                                              if job in plan.jobs else ""))
        raise SystemExit(f"{len(failed)} runs failed; the table has the others. The same command tries them "
                         "again")


def of_other_code(plan, left):
    """How many of the finished runs were not made by the commit that is checked out."""
    made = [next(Path(cfg.out_dir).rglob("config.json"), "") for name, (_, cfg) in plan.jobs.items()
            if name not in left]
    now = git_state() | {"dirty": False}
    return sum(peek_json(path).get("git") != now for path in made) if "commit" in now else 0


def show_plan(plan, table, runs, took):
    """Prints what is made first, then row by row the commands that no row above has printed."""
    for path in plan.makers:
        print0(f"made first: {path}")
    shown = set()
    for i, row in enumerate(table.rows):
        folders = [folder for (j, _), parts in runs.items() if j == i for folder in parts.values()]
        needs = set().union(*(needed(plan, folder) for folder in folders))
        jobs = [job for job in plan.jobs if job in needs]
        print0("\n".join(["", f"{row.name}:", *(
            f"{duration(took[job]) if job in took else 'made':>7}  {show(job, plan)}"
            for job in jobs if job not in shown)]))
        shown |= set(jobs)


def needed(plan, folder):
    """Names of a run's job and of all that it needs."""
    name = Path(folder).name
    if name not in plan.jobs:
        return set()
    return {name}.union(*(needed(plan, need) for need in plan.needs[name]))


def check(plan, table, runs, args):
    """One line where two rows of a grid are the same run; a note where no row reads a shared flag."""
    if args.vary:
        first = {}
        for (i, _), folders in runs.items():
            j = first.setdefault(str(folders["tuned"]), i)
            if i != j:
                raise SystemExit(f"--vary: {table.rows[j].name} and {table.rows[i].name} are the same run, "
                                 "as nothing reads what differs; leave that out, or give what reads it")
    for flag in plan.unread():
        print0(f"{flag} is read by no run of this table")


def run_jobs(plan, left, workers):
    """Runs what is left; -> {name: why it failed}. How long each took, in all, is kept in times.json."""
    logs, seconds, folders = plan.out / "logs", {}, {name: Path(plan.jobs[name][1].out_dir) for name in left}
    times = {name: took for name, took in peek_json(plan.out / "times.json").items()
             if name not in left or folders[name].exists()}  # else it starts anew
    logs.mkdir(parents=True, exist_ok=True)
    commands = {name: command(SCRIPTS[plan.jobs[name][0]], plan.jobs[name][1]) for name in left}
    needs = {name: [need for need in plan.needs[name] if need in left] for name in left}
    try:
        failed = side_by_side(commands, needs, workers, logs, seconds)
    finally:  # also where it is interrupted
        if seconds:
            write_json(plan.out / "times.json",
                       times | {name: times.get(name, 0.0) + took for name, took in seconds.items()})
        ended = [name for name in left if finished(*plan.jobs[name])]
        for name in ended:  # several times the model, and nothing goes on from a finished run
            for path in folders[name].glob("*.pt*"):
                path.unlink()
    return dict.fromkeys((name for name in left if name not in ended), "did not come to its end") | failed


def close(table, args, plan, runs, results):
    """Prints the table, and writes the json, the chart and what else was asked for."""
    found = [{seed: scores for (j, seed), scores in results.items() if j == i}
             for i in range(len(table.rows))]
    if not results:
        print0("nothing is finished, so there is no table")
        return
    rows, counts, times = [], [], peek_json(plan.out / "times.json")
    for i, row in enumerate(table.rows):
        seeds = {seed: folders for (j, seed), folders in runs.items() if j == i}
        made = dict.fromkeys(Path(folder).name for folders in seeds.values() for folder in folders.values())
        made = [job for job in made if job in plan.jobs]
        broken = [text for seed in found[i] if "tuned" in seeds.get(seed, {})
                  for text in collapsed(plan.jobs[Path(seeds[seed]["tuned"]).name][1])]
        counts += [f"{row.name} {len(broken)}"] * bool(broken)
        rows.append({"name": row.name, "paper": list(row.paper), "collapsed": broken,
                     "columns": statistics(found[i], found[table.baseline]),
                     "steps": {what: steps_in(folder)
                               for what, folder in next(iter(seeds.values()), {}).items() if what != "fresh"},
                     "commands": [show(job, plan) for job in made],
                     "failed seeds": sorted(seeds.keys() - found[i].keys())})
    notes = [table.note] * bool(table.note)
    notes += [f"collapsed runs, which the json names: {', '.join(counts)}"] * bool(counts)
    n = max(map(len, found))
    test = "" if table.by == "parameters" else "one seed: no test of differences" if n < 2 else (
        f"mean ± standard deviation over the seeds; * and p: paired t test over the seeds against "
        f"{table.rows[table.baseline].name}, two-sided, not corrected for the number of tests: one cell in "
        f"twenty has a star by chance. {n} seeds see differences above {seen_by(n):.1f} times their "
        "deviation")
    print0("\n".join(["", as_text(table, rows), "", *[test] * bool(test), *notes, ""]))
    name = args.table or "vary-" + "-".join(text.partition("=")[0] for text in args.vary)
    own = [getattr(args, stage) for stage in SCRIPTS] + (args.vary or [])
    if any(own):  # results of other flags stand beside each other
        name += "-" + hashlib.sha256(shlex.join(own).encode()).hexdigest()[:6]
    name += f"-against-{args.against}" * bool(args.against)
    for wanted, suffix, write in ((args.csv, "csv", as_csv), (args.latex, "tex", as_latex)):
        if wanted:
            with atomic(plan.out / f"{name}.{suffix}") as part:
                part.write_text(write(table, rows))
            print0(f"wrote {plan.out / name}.{suffix}")
    chances = {TASKS[task].title: 100 / len(TASKS[task].words) for task in DEMO_TASKS
               if TASKS[task].title in columns_of(rows)}  # of real tasks it is not so simple
    if chances:
        chances["average"] = float(np.mean(list(chances.values())))
    chance = chances.get(main_column(table, rows))
    figures.save(draw(table, rows, chance), plan.out / f"{name}.png", {
        "title": table.title, "notes": notes, "test": test, "rows": rows,
        "paper_columns": list(table.columns), "command": shlex.join(["python", "ablate.py", *args.argv]),
        "baseline": table.rows[table.baseline].name, "cores": cores(),
        "seconds_of_its_runs": sum(times.get(job, 0.0) for job in plan.jobs)})


def steps_in(folder):
    """Steps of a run: a number, or of a fine-tuning {task: steps}."""
    if (steps := peek_json(Path(folder, "results.json")).get("steps")) is not None:
        return steps
    paths = sorted(Path(folder).glob("*/results.json"))
    return {path.parent.name: found["runs"][0]["steps"] for path in paths if (found := peek_json(path))}


if __name__ == "__main__":
    main()
