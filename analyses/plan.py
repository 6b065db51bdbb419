"""What ablate.py runs: the rows of a table as commands of the stages, each of them once."""
import functools
import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import adapt_xdbert
import data
import distill
import finetune
import teacher
from common import convert, peek_json, without_unread
from parts.machine import init_ranks
from parts.tasks import content_hash, evaluation_files, find_file
from prepare.chain import preset_values, text_alone_run, text_only_run
from prepare.world import WORLD, demo_world, demo_xtext, larger_text, noisy_videos
from run import FORMAT, FREE, changed_flags, file_hash, model_folder, steps_of

SCRIPTS = {"teacher": teacher, "student": distill, "adapt": adapt_xdbert, "finetune": finetune}
# flags that ablate.py sets itself, for every run
TAKEN = {stage: {"seed", "out_dir", "resume", "eval_only", "max_minutes"} for stage in SCRIPTS}
TAKEN["teacher"] |= {"data_dir"}
TAKEN["adapt"] |= {"data_dir", "table", "dry_run"}
TAKEN["finetune"] |= {"model", "cross", "like", "seeds", "save_models", "predict", "score", "gold",
                      "no_answer"}
MODELS = ("teacher", "init_from", "language", "clip", "model", "cross", "like")  # flags that name a model

finetune_hash = functools.cache(content_hash)
model_hash = functools.cache(file_hash)


class Plan:
    """The runs that rows need, each once: jobs {name: (stage, Config)}, needs {name: names}.

    base: {stage: Config that all rows share}; second, larger: files of such rows on own data; given: names of
    the student's flags on the command line; out: folder of the runs; makers: {file or folder that must be
    made first: function that does}.
    """

    def __init__(self, base, tune_seeds, out, second="", larger="", given=()):
        self.base, self.tune_seeds, self.out = base, tune_seeds, Path(out)
        self.second, self.larger, self.given = second, larger, given
        self.jobs, self.needs, self.makers = {}, {}, {}

    def add(self, stage, cfg, *needs):
        """Puts a run on the plan; -> its folder, whose name tells its stage and its key."""
        script = SCRIPTS[stage]
        if stage != "finetune":  # what all rows share may be of no use to one
            cfg = without_unread(cfg, script.NEEDS)
        read = {name: x for name, x in asdict(cfg).items() if name not in FREE}
        if stage == "finetune":
            read["seeds"] = 1  # more of them only add to the folder
        outside = [data.open_packed(path)[0]["hash"] for name in ("train", "val", "videos")
                   if read.get(name) and not self.made(read[name]) for path in data.find_shards(read[name])]
        outside += [model_hash(path if Path(path).is_file() else model_folder(path, f"--{name}"))
                    for name in MODELS if (path := read.get(name)) and Path(path).exists()
                    and Path(path).name not in self.jobs]
        if stage == "finetune":
            outside += self.task_hashes(cfg)
        key = hashlib.sha256(json.dumps([stage, read, outside, FORMAT, WORLD]).encode()).hexdigest()[:8]
        if stage == "finetune":
            like = cfg.cross or cfg.like or cfg.model
            name = f"finetune-{Path(like).name}{'-cross' * bool(cfg.cross)}{'-fresh' * bool(cfg.like)}"
        else:
            name = script.run_folder(replace(cfg, out_dir="")).name
        name = f"{name}-{key}"
        self.jobs[name] = stage, replace(cfg, out_dir=str(self.out / name))
        self.needs[name] = [need for need in (Path(path).name for path in needs) if need in self.jobs]
        return str(self.out / name)

    def task_hashes(self, cfg):
        """Of the files of real tasks; one line where they are missing, before anything is run."""
        return [finetune_hash(path) for task in finetune.chosen_tasks(cfg) if not task.demo for path in (
            find_file(task, cfg.data_dir, task.train), *evaluation_files(task, cfg.data_dir).values())]

    def configure(self, stage, flags, seed):
        """The stage's Config of a row's flags and a seed."""
        kinds = {f.name: f.type for f in fields(self.base[stage])}
        flags = {name: convert(name, str(x), kinds[name]) for name, x in flags.items()}
        try:
            return replace(self.base[stage], **flags, seed=seed, resume="auto")
        except ValueError as error:
            raise SystemExit(str(error)) from None

    def make(self, path, maker):
        """A file, or a folder of files, that ablate.py makes first where it is missing; -> its path."""
        self.makers[str(path)] = maker
        return str(path)

    def made(self, path):
        """Whether a file is one of these."""
        return str(path) in self.makers or str(Path(path).parent) in self.makers

    def world(self, seed):
        """The demo world's folder of a seed."""
        folder = Path(self.base["student"].data_dir, f"demo-s{seed}")
        self.make(folder, lambda: demo_world(folder.parent, seed, init_ranks()))
        return folder

    def text(self, cfg):
        """A student's Config with its packed text."""
        return cfg if cfg.train else replace(cfg, train=str(self.world(cfg.seed) / "corpus.h5"))

    def teacher(self, row, seed, **flags):
        """Folder of a row's teacher; more flags beat those of the row."""
        cfg = self.configure("teacher", row.teacher | flags, seed)
        if cfg.videos:
            return self.add("teacher", replace(cfg, videos=self.second) if row.second else cfg)
        if self.own(row, "student"):
            raise SystemExit("--teacher \"--videos FILE\" is missing: with --train of one's own the teacher "
                             "needs clips that are packed with the same vocabulary")
        world = self.world(seed)
        videos = str(world / "videos.h5")
        if row.second:
            path = self.out / f"noisy-s{seed}-w{WORLD}.h5"
            videos = self.make(path, lambda: noisy_videos(world, path))
        return self.add("teacher", replace(cfg, videos=videos))

    def own(self, row, stage):
        """The packed text of a row's runs of a stage that --train gives; "" = the demo's."""
        return getattr(row, stage).get("train", self.base[stage].train)

    def student(self, row, seed):
        """Folder of a row's student."""
        on_demo = self.base["student"].preset == "demo" and not self.own(row, "student")
        usual = {name: x for name, x in row.demo.items() if on_demo and name not in self.given}
        cfg, needs = self.text(self.configure("student", usual | row.student, seed)), []
        if cfg.objective == "none":
            cfg = replace(text_only_run(cfg, self.out), init_from=cfg.init_from)
        elif cfg.teacher and row.teacher:
            raise SystemExit("--student: this table trains teachers of its own; leave --teacher "
                             f"{cfg.teacher} out")
        if row.two_stage or cfg.objective != "none" and not cfg.teacher:
            needs = [self.teacher(row, seed)]
            cfg = replace(cfg, **{"init_from" if row.two_stage else "teacher": needs[0]})
        return self.add("student", cfg, *needs)

    def video(self, row, seed):
        """Folder of a teacher that is trained as a student is: for its steps, of as many tokens, to the end.

        It is evaluated at the end alone, so that the last weights are kept, as a student's are.
        """
        like = self.text(self.configure("student", {}, seed))
        steps = self.steps(like, data.TextBlocks)
        same = {name: getattr(like, name) for name in (
            "model", "dropout", "block_size", "batch_size", "grad_accum", "lr", "warmup_steps", "beta2",
            "weight_decay", "grad_clip", "mask_rate", "mask_split", "reduction", "dtype")}
        every = self.base["teacher"].log_every
        return self.teacher(row, seed, **same, max_steps=steps, eval_every=-(-steps // every) * every)

    def steps(self, cfg, kind):
        """Steps of a Config whose packed text data.<kind> reads."""
        if cfg.max_steps:
            return cfg.max_steps
        if self.made(cfg.train) and not Path(cfg.train).exists():
            raise SystemExit("--max_steps 0: the demo's steps are asked for before its world is made; give "
                             "--max_steps")
        return steps_of(cfg, len(kind(cfg.train, cfg.block_size)))[0]

    def pairs(self, row, seed):
        """The packed pairs on which a row's encoder is adapted."""
        if own := self.own(row, "adapt"):
            return own
        world = self.world(seed)
        return self.make(world / "xcorpus.h5", lambda: demo_xtext(world, init_ranks()))

    def language(self, row, seed):
        """What a row adapts: --language, on the demo the text-only student."""
        text_only = replace(row, student=row.student | {"objective": "none"})
        return self.base["adapt"].language or self.student(text_only, seed)

    def tower(self, row, seed):
        """Beside what it is adapted: --clip, on the demo a teacher of its kind."""
        return self.base["adapt"].clip or self.teacher(row, seed, objective="clip")

    def adaptation(self, row, seed):
        """Folder of the run that adapts a row's encoder."""
        flags = dict(row.adapt)  # those for CLIP may be shared by a row that has none
        alone = convert("no_clip", str(flags.pop("no_clip", self.base["adapt"].no_clip)), bool)
        cfg = replace(self.configure("adapt", flags, seed), train=self.pairs(row, seed), table=False)
        own = self.own(row, "adapt")
        if own and not (cfg.language and (cfg.clip or alone)):
            raise SystemExit("--adapt \"--language FOLDER --clip FILE\" are missing: with --train of one's "
                             "own they are not made")
        if cfg.preset == "auto":
            cfg = replace(cfg, preset="base" if own else "demo")
        if row.times > 1:
            cfg = replace(cfg, max_steps=row.times * self.steps(cfg, data.PairBlocks))
        if row.larger and own:
            cfg = replace(cfg, train=self.larger)
        elif row.larger:
            path, world = self.out / f"larger-s{seed}-w{WORLD}.h5", self.world(seed)
            cfg = replace(cfg, train=self.make(path, lambda: larger_text(world, path)))
        if alone:
            cfg = text_alone_run(cfg, self.out)
        cfg = replace(cfg, language=cfg.language or self.language(row, seed))
        if not alone:
            cfg = replace(cfg, clip=cfg.clip or self.tower(row, seed))
        return self.add("adapt", cfg, cfg.language, cfg.clip)

    def folders(self, row, seed, by):
        """{what: folder} of the models that a row needs on a seed's world, and "tuned" where they are to be
        fine-tuned; by: what the table measures."""
        make = {"student": self.student, "fresh": self.student, "video": self.video, "tower": self.tower,
                "language": self.language, "adapted": self.adaptation, "cross": self.adaptation}
        models = row.model.split("/") + ["language"] * (by == "drift")
        found = {model: make[model](row, seed) for model in models if model in make}
        if by == "pwcca":
            return found
        model, path = next(iter(found.items()))
        flags = ({"model": "none", "like": path} if model == "fresh" else
                 {"cross" if model == "cross" else "model": path})
        cfg = replace(self.configure("finetune", row.finetune | flags, seed), seeds=self.tune_seeds,
                      save_models=False)
        if any(task.demo for task in finetune.chosen_tasks(cfg)):
            if self.own(row, "adapt" if model in ("tower", "language", "adapted", "cross") else "student"):
                raise SystemExit("--finetune \"--tasks .. --data_dir ..\" is missing: the demo's tasks are "
                                 "in the words of its own world")
            cfg = replace(cfg, data_dir=self.base["student"].data_dir)
        return found | {"tuned": self.add("finetune", cfg, path)}

    def left(self):
        """Names of the jobs that are not finished, in an order in which they can run."""
        return [name for name, (stage, cfg) in self.jobs.items() if not finished(stage, cfg)]

    def unread(self):
        """["--student: --soft_tau 4", ..]: shared flags that no run of the stage reads."""
        found = []
        for stage, script in SCRIPTS.items():
            runs, base = [cfg for own, cfg in self.jobs.values() if own == stage], asdict(self.base[stage])
            usual = preset_values(script, self.base[stage])
            found += [f"--{stage}: --{name} {x}" for name, x in base.items() if x != usual[name]
                      and name not in FREE and all(getattr(cfg, name) != x for cfg in runs)]
        return found


def finished(stage, cfg):
    """Whether a run's folder holds the results of these flags."""
    if stage != "finetune":
        flags = peek_json(Path(cfg.out_dir, "config.json")).get("config")
        chosen = (name for name, x in asdict(cfg).items() if x == "auto")  # by the run
        return ("finished" in peek_json(Path(cfg.out_dir, "results.json"))
                and not changed_flags(flags, cfg, (*SCRIPTS[stage].FREE, *chosen)))
    return all(len(peek_json(Path(cfg.out_dir, task.name, "results.json")).get("runs", ())) >= cfg.seeds
               for task in finetune.chosen_tasks(cfg))
