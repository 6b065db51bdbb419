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
import json
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

import adapt_xdbert
import common
import data
import distill
import finetune
import teacher
from analyses import figures
from analyses.answers import read_answers
from analyses.inside import distances, open_encoder
from analyses.papers import TABLES, Row, Table
from analyses.rows import as_csv, as_latex, as_text, draw, main_column, statistics
from analyses.words import compare_embeddings, word_embeddings
from common import (atomic, convert, duration, parse_cli, peek_json, print0, without_unread,
                    write_json)
from model import model_config
from parts.machine import cores, flops_per_token, init_ranks, peak_flops, side_by_side
from parts.tasks import TASKS, find_file
from prepare.chain import command, text_only_run
from prepare.world import ACTIONS, WORLD, demo_world, demo_xtext, larger_text, noisy_videos
from run import FORMAT, FREE, steps_of

SCRIPTS = {"teacher": teacher, "student": distill, "adapt": adapt_xdbert, "finetune": finetune}
EFFICIENCY = 0.5  # of the peak that the estimates assume until a run of the stage has been timed

# ---------------------------------------------------------------------------- what is run


class Plan:
    """The runs that rows need, each once: jobs {name: (stage, Config)}, needs {name: names}.

    base: {stage: Config that all rows share}; files: what must be made first, {path: function that does}.
    """

    def __init__(self, base, tune_seeds, second, out):
        self.base, self.tune_seeds, self.second, self.out = base, tune_seeds, second, Path(out)
        self.jobs, self.needs, self.files = {}, {}, {}

    def add(self, stage, cfg, *needs):
        """Puts a run on the plan; -> its folder, whose name tells its stage and its key."""
        script = SCRIPTS[stage]
        if stage != "finetune":  # what all rows share may be of no use to one
            cfg = without_unread(cfg, script.NEEDS)
        read = {name: text for name, text in asdict(cfg).items() if name not in FREE}
        packed = [data.open_packed(path)[0]["hash"] for name in ("train", "val", "videos")
                  if (text := read.get(name)) and text not in self.files for path in data.find_shards(text)]
        key = hashlib.sha256(json.dumps([stage, read, packed, FORMAT, WORLD]).encode()).hexdigest()[:8]
        if stage == "finetune":
            name = f"finetune-{Path(cfg.cross or cfg.model or cfg.like).name}{'-cross' * bool(cfg.cross)}"
        else:
            name = script.run_folder(replace(cfg, out_dir="")).name
        name = f"{name}-{key}"
        self.jobs[name] = stage, replace(cfg, out_dir=str(self.out / name))
        self.needs[name] = [need for need in map(Path, needs) for need in [need.name] if need in self.jobs]
        return str(self.out / name)

    def configure(self, stage, flags, seed):
        """The stage's Config of a row's flags, on the world of the seed where the base names no data."""
        flags = {name: convert(name, str(x), {f.name: f.type for f in fields(self.base[stage])}[name])
                 for name, x in flags.items()}
        try:
            return replace(self.base[stage], **flags, seed=seed, resume="auto")
        except ValueError as error:
            raise SystemExit(str(error)) from None

    def world(self, seed):
        """The demo world's folder of a seed."""
        folder = Path(self.base["student"].data_dir, f"demo-s{seed}")
        for name in ("corpus.h5", "videos.h5"):
            self.files[str(folder / name)] = lambda: demo_world(folder.parent, seed, init_ranks())
        return folder

    def teacher(self, flags, seed, **more):
        """Folder of a teacher. videos = second: the other set of features, see VidLanKD's Table 1."""
        flags = dict(flags)
        second = flags.pop("videos", "") == "second"
        cfg = self.configure("teacher", flags | more, seed)
        if second and cfg.videos and not self.second:
            raise SystemExit("--table 1 compares two 2D encoders: give the features of the second, packed, "
                             "as --videos2 FILE")
        if not cfg.videos:
            videos = self.world(seed) / "videos.h5"
            if second and not self.second:
                world, videos = videos.parent, self.out / f"noisy-s{seed}.h5"
                self.files[str(videos)] = lambda: noisy_videos(world, videos)
            cfg = replace(cfg, videos=str(videos))
        return self.add("teacher", replace(cfg, videos=self.second) if second and self.second else cfg)

    def student(self, row, seed):
        """Folder of a row's student."""
        flags = dict(row.student)
        from_teacher = flags.get("init_from") == "teacher" and flags.pop("init_from")
        cfg, needs = self.configure("student", flags, seed), []
        if not cfg.train:
            cfg = replace(cfg, train=str(self.world(seed) / "corpus.h5"))
        if cfg.objective == "none":
            cfg = replace(text_only_run(cfg, self.out), init_from=cfg.init_from)
        if cfg.teacher and row.teacher:
            raise SystemExit("--student: this table trains teachers of its own; leave --teacher "
                             f"{cfg.teacher} out")
        if from_teacher or cfg.objective != "none" and not cfg.teacher:
            needs = [self.teacher(row.teacher, seed)]
            cfg = replace(cfg, **{"init_from" if from_teacher else "teacher": needs[0]})
        return self.add("student", cfg, *needs)

    def video(self, row, seed):
        """Folder of a teacher that is trained for as many steps, and tokens a step, as a student."""
        like = self.configure("student", {}, seed)
        steps = like.max_steps or steps_of(like, len(data.TextBlocks(like.train, like.block_size)))[0]
        same = {name: getattr(like, name) for name in (
            "model", "block_size", "batch_size", "lr", "warmup_steps", "weight_decay", "beta2")}
        return self.teacher(row.teacher, seed, **same, max_steps=steps, patience=steps)

    def adaptation(self, row, seed):
        """{"language", "tower", "adapted"}: folders of what a row adapts, beside what, and of the run."""
        flags, base = dict(row.adapt), self.base["adapt"]
        steps, larger = str(flags.pop("max_steps", "")), flags.pop("train", "") == "larger"
        if steps.endswith("x"):
            blocks = 0 if base.max_steps else len(data.PairBlocks(base.train, base.block_size))
            flags["max_steps"] = int(steps[:-1]) * steps_of(base, blocks)[0]
        elif steps:
            flags["max_steps"] = steps
        cfg = self.configure("adapt", flags, seed)
        # as a command: --train alone would choose another preset
        cfg = replace(cfg, table=False, preset="base" if cfg.train and cfg.preset == "auto" else
                      "demo" if cfg.preset == "auto" else cfg.preset)
        language = cfg.language or self.student(Row("", student={"objective": "none"}), seed)
        tower = cfg.clip or cfg.no_clip or self.teacher({"objective": "clip"}, seed)
        if larger and cfg.train:
            raise SystemExit("--table xdbert-3: its row of a larger text is the demo's; run that row with "
                             "adapt_xdbert.py --train LARGER --max_steps N")
        if not cfg.train:
            world = self.world(seed)
            path = self.out / f"larger-s{seed}.h5" if larger else world / "xcorpus.h5"
            self.files[str(path)] = ((lambda: larger_text(world, path)) if larger else
                                     (lambda: demo_xtext(world, init_ranks())))
            cfg = replace(cfg, train=str(path))
        if cfg.no_clip:
            run = self.add("adapt", replace(cfg, language=language), language)
            return {"language": language, "adapted": run}
        run = self.add("adapt", replace(cfg, language=language, clip=tower), language, tower)
        return {"language": language, "tower": tower, "adapted": run}

    def folders(self, row, seed, tune):
        """{what: folder} of a row's models on a seed's world, and "tuned" where they shall be fine-tuned."""
        model = row.model.split("/")[0]
        if model == "video":
            found = {"video": self.video(row, seed)}
        elif model in ("student", "fresh"):
            found = dict.fromkeys(("student", "fresh"), self.student(row, seed))
        else:
            found = self.adaptation(row, seed)
            found["cross"] = found["adapted"]
        if tune:
            flags = ({"model": "none", "like": found[model]} if model == "fresh" else
                     {"cross" if model == "cross" else "model": found[model]})
            cfg = self.configure("finetune", row.finetune | flags, seed)
            cfg = replace(cfg, seeds=self.tune_seeds, save_models=False)
            found["tuned"] = self.add("finetune", cfg, found[model])
        return found

    def left(self):
        """Names of the jobs that are not finished, in an order in which they can run."""
        return [name for name, (stage, cfg) in self.jobs.items() if not finished(stage, cfg)]


def finished(stage, cfg):
    """Whether a run's folder holds its results; the folder's name tells that they are of these flags."""
    if stage != "finetune":
        return "finished" in peek_json(Path(cfg.out_dir, "results.json"))
    return all(peek_json(Path(cfg.out_dir, task.name, "results.json")).get("runs")
               for task in finetune.chosen_tasks(cfg))


# ---------------------------------------------------------------------------- how long it takes


def flops_of(stage, cfg, shape):
    """Floating-point operations of a run, about; shape: the student's, as --model gives it."""
    def training(model, tokens, mlm=0.0):
        return 3 * tokens * flops_per_token(model_config(model, 1000 if model == "demo" else 30_000), 64, mlm)

    if stage == "finetune":
        tasks, total = finetune.chosen_tasks(cfg), 0
        for task in tasks:
            steps = cfg.max_steps or (0 if cfg.epochs else task.steps)
            examples = steps * cfg.batch_size or (cfg.epochs or 3) * rows_of(task, cfg)
            candidates = len(task.text) - 1 if task.kind == "choice" else 1
            total += examples * candidates * (cfg.max_length or task.max_length or 128)
        return cfg.seeds * training(shape, total)
    samples = cfg.max_steps * cfg.batch_size
    if not samples:  # the corpus tells
        samples = cfg.epochs * (len(data.TextBlocks(cfg.train, cfg.block_size)) if stage != "teacher" else
                                len(data.VideoClips(cfg.videos, cfg.block_size, cfg.max_frames)))
    passes = {"teacher": 2, "student": 4 / 3, "adapt": 3}[stage]  # the language model's own is one
    return passes * training(getattr(cfg, "model", shape), samples * cfg.block_size, cfg.mask_rate)


def rows_of(task, cfg):
    """Training rows of a real task: the lines of its file."""
    path = find_file(task, cfg.data_dir, task.train, required=False)
    rows = sum(1 for _ in open(path, "rb")) if path else 0
    return min(cfg.limit or rows, rows)


def estimates(plan, names):
    """{name: seconds}: by operations, at the speed of the runs of the stage that have been timed."""
    timed, rates = peek_json(plan.out / "times.json"), {}
    shape, device = plan.base["student"].model, init_ranks(plan.base["student"].device).device
    for stage in SCRIPTS:
        done = [name for name in timed if name in plan.jobs and plan.jobs[name][0] == stage]
        seconds = sum(timed[name] for name in done)
        flops = sum(flops_of(*plan.jobs[name], shape) for name in done)
        rates[stage] = flops / seconds if seconds else EFFICIENCY * peak_flops(device, torch.float32)
    return {name: flops_of(*plan.jobs[name], shape) / rates[plan.jobs[name][0]] for name in names}


# ---------------------------------------------------------------------------- what came out


def measure(table, row, plan, folders):
    """{column: value} of a row on a seed's world."""
    if table.by == "parameters":
        return {"parameters": parameters(row.model)}
    if table.by == "pwcca":
        one, other = row.model.split("/")
        names = folders[one], folders["tower" if other == "random" else other]
        found = compare_embeddings(*((name, *word_embeddings(name)) for name in names))
        return {"PWCCA": found["random"][0] if other == "random" else found["pwcca"]}
    cfg = plan.jobs[Path(folders["tuned"]).name][1]
    scores = scores_of(cfg)
    if table.by == "categories":
        scores = categories_of(cfg) | scores
    if table.by == "drift":
        original, adapted = (open_encoder(folders[name])[0] for name in ("language", row.model))
        scores = {"distance": distances(original, adapted)["all"]["rms"]} | scores
    return scores


def categories_of(cfg):
    """{column: accuracy} by category: of GLUE's diagnostics where MNLI was fine-tuned on, and of the demo's
    entailment by the action that its question is about. The mean over the runs."""
    found = {}
    for task in finetune.chosen_tasks(cfg):
        folder = Path(cfg.out_dir, task.name)
        if task.name == "mnli":
            runs = [run["scores"].get("diagnostic", {}) for run in peek_json(folder / "results.json")["runs"]]
            for name in (name for name in runs[0] if name.endswith(", accuracy")):
                found[name.removesuffix(", accuracy")] = float(np.mean([run[name] for run in runs]))
        if task.name == "entailment":
            answers = read_answers(folder)
            for action, (past, _) in ACTIONS.items():
                about = [past in text.split() for text in answers.first]
                found[f"entailment: {action}"] = 100 * float(answers.right[:, about].mean())
    return found


def parameters(model):
    """Parameters of a shape of adapt_xdbert.LANGUAGE, with /cross of the whole cross-modal model."""
    name, _, whole = model.partition("/")
    cfg = adapt_xdbert.Config(language=name, clip="random", no_clip=not whole, dry_run=True,
                              objective=adapt_xdbert.Config.objective if whole else "mlm")
    return sum(adapt_xdbert.part_sizes(adapt_xdbert.empty_model(cfg)).values())


def scores_of(cfg):
    """{column: value} of a fine-tuned run: each task's main score, the mean over its seeds; their average;
    the demo's accuracy on nouns that were seen, and the probe of the model's nouns."""
    scores, seen = {}, []
    for task in finetune.chosen_tasks(cfg):
        runs = common.read_json(Path(cfg.out_dir, task.name, "results.json"))["runs"]
        scores[task.title] = float(np.mean([run["score"] for run in runs]))
        seen += [run["scores"]["seen"]["accuracy"] for run in runs if "seen" in run["scores"]]
    scores["average"] = float(np.mean(list(scores.values())))
    if seen:
        scores["seen nouns"] = float(np.mean(seen))
    if cfg.model and (probes := peek_json(Path(cfg.model, "results.json")).get("probes")):
        scores["material probe"] = 100 * probes["material"]["linear"]
    return scores


# ---------------------------------------------------------------------------- the command


def grid_of(vary, base):
    """Table of all combinations of --vary's values; the first is the baseline."""
    stages, choices = [], []
    for text in vary:
        name, equals, values = text.partition("=")
        stage, dot, flag = name.rpartition(".")
        stages_of = [s for s in SCRIPTS if flag in {f.name for f in fields(SCRIPTS[s].Config)}]
        if not stage:
            stage = "student" if "student" in stages_of else stages_of[0] if len(stages_of) == 1 else ""
        if not values or stage not in stages_of:
            raise SystemExit(f"--vary {text}: write FLAG=VALUE,VALUE of distill.py, or STAGE.FLAG=VALUE,"
                             f"VALUE, STAGE one of {' '.join(SCRIPTS)}; "
                             f"{flag} is a flag of {' and '.join(stages_of) or 'none'}")
        stages.append((stage, flag, name))
        choices.append(values.split(","))
    adapts = any(stage == "adapt" for stage, *_ in stages)
    rows = []
    for values in itertools.product(*choices):
        flags = {stage: {} for stage in SCRIPTS}
        for (stage, flag, _), value in zip(stages, values):
            flags[stage][flag] = value
        rows.append(Row(" ".join(f"{name}={value}" for (*_, name), value in zip(stages, values)),
                        model="adapted" if adapts else "student", teacher=flags["teacher"],
                        student=flags["student"], adapt=flags["adapt"], finetune=flags["finetune"]))
    return Table("grid of " + ", ".join(name for *_, name in stages), (), tuple(rows))


def parse(argv=None):
    """The flags as a namespace."""
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", help=f"one of {', '.join(TABLES)}")
    what.add_argument("--vary", action="append", metavar="FLAG=VALUE,VALUE",
                      help="of distill.py, or STAGE.FLAG=VALUE,VALUE; repeat it for a grid")
    add("--seeds", type=int, default=3, help="whole chains: world, teacher, student, fine-tuning (default 3)")
    add("--first_seed", type=int, default=0, help="the first of these (default 0)")
    add("--tune_seeds", type=int, default=1, help="fine-tuning runs of each chain (default 1)")
    for stage, script in SCRIPTS.items():
        add(f"--{stage}", default="", metavar="FLAGS",
            help=f"flags for every {Path(script.__file__).name}, quoted")
    add("--videos2", default="", help="Table 1 on real data: packed features of the second 2D encoder")
    add("--jobs", type=int, default=0, help="processes at once (default: cores; on a GPU one)")
    add("--dry_run", action="store_true", help="print the commands and how long they may take")
    add("--csv", action="store_true", help="write <table>.csv, too")
    add("--latex", action="store_true", help="write <table>.tex, too")
    add("--out", default="out/ablate", help="folder of runs and results (default %(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv, argparse.Namespace(argv=argv))
    if args.table and args.table not in TABLES:
        raise SystemExit(f"--table {args.table}: choose one of {', '.join(TABLES)}")
    for name in ("seeds", "tune_seeds"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} {getattr(args, name)}: at least 1")
    return args


def configs(args):
    """{stage: Config} of what every run of a stage shares."""
    return {stage: parse_cli(script.Config, script.PRESETS, shlex.split(getattr(args, stage)), script.NEEDS)
            for stage, script in SCRIPTS.items()}


def show(name, plan):
    """A job as the command line that anyone can repeat."""
    stage, cfg = plan.jobs[name]
    return shlex.join(["python", *(Path(part).name if part.endswith(".py") else part
                                   for part in command(SCRIPTS[stage], cfg)[1:])])


@common.one_line_end()
def main(argv=None):
    """Plans, runs and shows a table; exit status 1 where a row lacks a run."""
    args = parse(argv)
    common.clear_up_on_sigterm()
    base = configs(args)
    table = TABLES[args.table] if args.table else grid_of(args.vary, base)
    name = f"table-{args.table}" if args.table else "vary-" + "-".join(
        text.partition("=")[0] for text in args.vary)
    plan = Plan(base, args.tune_seeds, args.videos2, args.out)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows = {(i, seed): plan.folders(row, seed, table.by not in ("pwcca", "parameters"))
            for i, row in enumerate(table.rows) for seed in (seeds[:1] if row.one_seed else seeds)
            if row.model and table.by != "parameters"}
    left = plan.left()
    took = estimates(plan, left) if left else {}
    on_gpu = left and init_ranks(base["student"].device).device.type == "cuda"
    workers = args.jobs or (1 if on_gpu else cores())
    total = duration(sum(took.values()) / min(workers, max(1, len(left))))
    print0(f"{table.title}: {len(table.rows)} rows, {args.seeds} seeds, {len(plan.jobs)} runs; to be made: "
           f"{len(left)}, in about {total}, {workers} at once")
    for job in left:
        print0(f"{duration(took[job]):>7}  {show(job, plan)}")
    if args.dry_run:
        return
    for path, make in plan.files.items():
        if left and not Path(path).exists():
            make()
    plan.out.mkdir(parents=True, exist_ok=True)
    failed = run_jobs(plan, left, workers)
    results = {}
    for (i, seed), folders in rows.items():
        if not failed.keys() & {Path(folder).name for folder in folders.values()}:
            results.setdefault(i, {})[seed] = measure(table, table.rows[i], plan, folders)
    if table.by == "parameters":
        results = {i: {0: measure(table, row, plan, {})} for i, row in enumerate(table.rows)}
    close(table, name, args, plan, rows, results)
    if failed:
        for job, why in failed.items():
            print0(f"failed: {job}: {why}; all that it said: {plan.out / 'logs' / job}.txt")
        raise SystemExit(f"{len(failed)} runs failed; the table has the others. The same command tries them "
                         "again")


def run_jobs(plan, left, workers):
    """Runs what is left; -> {name: why it failed}. How long each took is kept in times.json."""
    logs = plan.out / "logs"
    logs.mkdir(exist_ok=True)
    commands = {name: command(SCRIPTS[plan.jobs[name][0]], plan.jobs[name][1]) for name in left}
    needs = {name: [need for need in plan.needs[name] if need in left] for name in left}
    seconds = {}
    try:
        return side_by_side(commands, needs, workers, logs, seconds)
    finally:  # also where it is interrupted
        if seconds:
            write_json(plan.out / "times.json", peek_json(plan.out / "times.json") | seconds)


def close(table, name, args, plan, runs, results):
    """Prints the table, and writes the json, the chart and what else was asked for."""
    rows, times = [], peek_json(plan.out / "times.json")
    for i, row in enumerate(table.rows):
        seeds = {seed: folders for (j, seed), folders in runs.items() if j == i}
        made = dict.fromkeys(Path(folder).name for folders in seeds.values() for folder in folders.values())
        made = [job for job in made if job in plan.jobs]
        first = next(iter(seeds.values()), {})
        rows.append({"name": row.name, "paper": list(row.paper),
                     "columns": statistics(results.get(i, {}), results.get(table.baseline, {})),
                     "steps": {what: steps_in(folder) for what, folder in first.items()},
                     "commands": [show(job, plan) for job in made],
                     "failed seeds": sorted(seeds.keys() - results.get(i, {}).keys())})
    seeds = max((len(found) for found in results.values()), default=0)
    test = "one seed: no test of differences" if seeds < 2 else (
        f"mean ± standard deviation of {seeds} seeds; * and p: paired t test over the seeds against "
        f"{table.rows[table.baseline].name}, two-sided, not corrected for the number of tests")
    print0("\n".join(["", as_text(table, rows), "", test, *filter(None, [table.note]), ""]))
    for wanted, suffix, write in ((args.csv, "csv", as_csv), (args.latex, "tex", as_latex)):
        if wanted:
            with atomic(plan.out / f"{name}.{suffix}") as part:
                part.write_text(write(table, rows))
            print0(f"wrote {plan.out / name}.{suffix}")
    chance = None
    if main_column(table.of, rows) == "average" and any("seen nouns" in row["columns"] for row in rows):
        tasks = finetune.chosen_tasks(plan.base["finetune"])
        chance = float(np.mean([100 / len(task.words) for task in tasks]))
    figures.save(draw(table, rows, chance), plan.out / f"{name}.png", {
        "title": table.title, "note": table.note, "test": test, "paper_columns": list(table.columns),
        "command": shlex.join(["python", "ablate.py", *args.argv]), "rows": rows,
        "baseline": table.rows[table.baseline].name, "cores": cores(),
        "seconds_of_its_runs": sum(times.get(job, 0.0) for job in plan.jobs)})


def steps_in(folder):
    """Steps of a run: a number, or of a fine-tuning {task: steps}."""
    if (steps := peek_json(Path(folder, "results.json")).get("steps")) is not None:
        return steps
    return {path.parent.name: peek_json(path)["runs"][0]["steps"]
            for path in Path(folder).glob("*/results.json")}


if __name__ == "__main__":
    main()
