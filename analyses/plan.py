"""What ablate.py runs: the rows of a table as commands of the stages, each of them once."""
import contextlib
import functools
import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import adapt_xdbert
import data
import distill
import finetune
import teacher
from analyses.papers import LARGER, NST_ALONE, OWN, SECOND, Row
from common import convert, peek_json, without_unread
from model import model_config
from parts.machine import flops_per_token, init_ranks, peak_flops
from parts.tasks import content_hash, evaluation_files, find_file
from parts.weights import config_and_vocab
from prepare.chain import preset_values, text_alone_run, text_only_run
from prepare.world import TASK_SIZES, WORLD, demo_world, demo_xtext, larger_text, noisy_videos
from run import FORMAT, FREE, file_hash, model_folder, steps_of

SCRIPTS = {"teacher": teacher, "student": distill, "adapt": adapt_xdbert, "finetune": finetune}
# flags that ablate.py sets itself, for every run
TAKEN = {stage: {"seed", "out_dir", "resume", "eval_only", "max_minutes"} for stage in SCRIPTS}
TAKEN["teacher"] |= {"data_dir"}
TAKEN["adapt"] |= {"data_dir", "table", "dry_run"}
TAKEN["finetune"] |= {"model", "cross", "like", "seeds", "save_models", "predict", "score", "gold",
                      "no_answer"}
MODELS = ("teacher", "init_from", "language", "clip")  # flags that name a model
EFFICIENCY = 0.5  # of the peak that the estimates assume until a run of the stage has been timed

finetune_hash = functools.cache(content_hash)
model_hash = functools.cache(file_hash)


class Plan:
    """The runs that rows need, each once: jobs {name: (stage, Config)}, needs {name: names}.

    base: {stage: Config that all rows share}; second, larger: files of papers.SECOND and papers.LARGER on own
    data; makers: {what must be made first: function that does}; out: folder of the runs.
    """

    def __init__(self, base, tune_seeds, out, second="", larger=""):
        self.base, self.tune_seeds, self.out = base, tune_seeds, Path(out)
        self.second, self.larger = second, larger
        self.jobs, self.needs, self.makers, self.made = {}, {}, {}, set()

    def add(self, stage, cfg, *needs):
        """Puts a run on the plan; -> its folder, whose name tells its stage and its key."""
        script = SCRIPTS[stage]
        if stage != "finetune":  # what all rows share may be of no use to one
            cfg = without_unread(cfg, script.NEEDS)
        read = {name: x for name, x in asdict(cfg).items() if name not in FREE}
        if stage == "finetune":
            read["seeds"] = 1  # more of them only add to the folder
        outside = [data.open_packed(path)[0]["hash"] for name in ("train", "val", "videos")
                   if read.get(name) and read[name] not in self.made for path in data.find_shards(read[name])]
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
        """A file that ablate.py makes first, where it is missing; -> its path as text."""
        self.makers[str(path)] = maker
        self.made.add(str(path))
        return str(path)

    def world(self, seed):
        """The demo world's folder of a seed."""
        folder = Path(self.base["student"].data_dir, f"demo-s{seed}")
        self.makers[str(folder)] = lambda: demo_world(folder.parent, seed, init_ranks())
        self.made |= {str(folder / "corpus.h5"), str(folder / "videos.h5")}
        return folder

    def text(self, seed):
        """The packed text of the students."""
        return self.base["student"].train or str(self.world(seed) / "corpus.h5")

    def teacher(self, flags, seed, **more):
        """Folder of a teacher; --videos SECOND is the other set of features of VidLanKD's Table 1."""
        flags = flags | more
        second = flags.pop("videos", "") == SECOND
        cfg = self.configure("teacher", flags, seed)
        if cfg.videos:
            return self.add("teacher", replace(cfg, videos=self.second) if second else cfg)
        if self.base["student"].train:
            raise SystemExit("--teacher \"--videos FILE\" is missing: with --train of one's own the teacher "
                             "needs clips that are packed with the same vocabulary")
        world = self.world(seed)
        videos = str(world / "videos.h5")
        if second:
            path = self.out / f"noisy-s{seed}-w{WORLD}.h5"
            videos = self.make(path, lambda: noisy_videos(world, path))
        return self.add("teacher", replace(cfg, videos=videos))

    def student(self, row, seed):
        """Folder of a row's student."""
        two_stage, base = row.student.get("init_from") == OWN, self.base["student"]
        flags = {name: x for name, x in row.student.items() if x != OWN}
        if flags.get("w_nst") == NST_ALONE and (base.preset, base.w_nst) != ("demo", distill.Config.w_nst):
            del flags["w_nst"]
        cfg = self.configure("student", flags, seed)
        cfg, needs = replace(cfg, train=self.text(seed)), []
        if cfg.objective == "none":
            cfg = replace(text_only_run(cfg, self.out), init_from=cfg.init_from)
        elif cfg.teacher and row.teacher:
            raise SystemExit("--student: this table trains teachers of its own; leave --teacher "
                             f"{cfg.teacher} out")
        if two_stage or cfg.objective != "none" and not cfg.teacher:
            needs = [self.teacher(row.teacher, seed)]
            cfg = replace(cfg, **{"init_from" if two_stage else "teacher": needs[0]})
        return self.add("student", cfg, *needs)

    def video(self, row, seed):
        """Folder of a teacher that is trained as a student is: for its steps, of as many tokens, to the end.

        It is evaluated at the end alone, so that the last weights are kept, as a student's are.
        """
        like = replace(self.configure("student", {}, seed), train=self.text(seed))
        steps = self.steps(like, data.TextBlocks)
        same = {name: getattr(like, name) for name in (
            "model", "dropout", "block_size", "batch_size", "grad_accum", "lr", "warmup_steps", "beta2",
            "weight_decay", "grad_clip", "mask_rate", "mask_split", "reduction", "dtype")}
        every = self.base["teacher"].log_every
        return self.teacher(row.teacher, seed, **same, max_steps=steps, eval_every=-(-steps // every) * every)

    def steps(self, cfg, kind):
        """Steps of a Config whose packed text data.<kind> reads."""
        if cfg.max_steps:
            return cfg.max_steps
        if cfg.train in self.made and not Path(cfg.train).exists():
            raise SystemExit("--max_steps 0: the demo's steps are asked for before its world is made; give "
                             "--max_steps")
        return steps_of(cfg, len(kind(cfg.train, cfg.block_size)))[0]

    def adaptation(self, row, seed):
        """{"language", "tower", "adapted"}: folders of what a row adapts, beside what, and of the run."""
        flags, base = dict(row.adapt), self.base["adapt"]
        larger, own = flags.pop("train", "") == LARGER, bool(base.train)
        if own and not (base.language and (base.clip or flags.get("no_clip"))):
            raise SystemExit("--adapt \"--language FOLDER --clip FILE\" are missing: with --train of one's "
                             "own they are not made")
        world = None if own else self.world(seed)
        train = base.train or self.make(world / "xcorpus.h5", lambda: demo_xtext(world, init_ranks()))
        steps = str(flags.get("max_steps", ""))
        if steps.endswith("x"):  # so many times the steps of the others
            flags["max_steps"] = int(steps[:-1]) * self.steps(replace(base, train=train), data.PairBlocks)
        if larger:
            path = self.out / f"larger-s{seed}-w{WORLD}.h5"
            train = self.larger if own else self.make(path, lambda: larger_text(world, path))
        if flags.pop("no_clip", False):
            cfg = text_alone_run(self.configure("adapt", {}, seed), self.out / "run")
        else:
            cfg = self.configure("adapt", flags, seed)
        preset = {False: "demo", True: "base"}[own] if cfg.preset == "auto" else cfg.preset
        cfg = replace(cfg, preset=preset, table=False, train=train)
        language = cfg.language or self.student(Row("", student=row.student | {"objective": "none"}), seed)
        cfg = replace(cfg, language=language)
        if cfg.no_clip:
            return {"language": language, "adapted": self.add("adapt", cfg, language)}
        tower = cfg.clip or self.teacher(row.teacher | {"objective": "clip"}, seed)
        run = self.add("adapt", replace(cfg, clip=tower), language, tower)
        return {"language": language, "tower": tower, "adapted": run}

    def folders(self, row, seed, tune):
        """{what: folder} of a row's models on a seed's world, and "tuned" where they shall be fine-tuned."""
        model = row.model.split("/")[0]
        adapts = model in ("language", "adapted", "cross", "tower")
        if adapts:
            found = self.adaptation(row, seed)
            found["cross"] = found["adapted"]
        elif model == "video":
            found = {"video": self.video(row, seed)}
        else:
            found = dict.fromkeys(("student", "fresh"), self.student(row, seed))
        if tune:
            flags = ({"model": "none", "like": found[model]} if model == "fresh" else
                     {"cross" if model == "cross" else "model": found[model]})
            cfg = replace(self.configure("finetune", row.finetune | flags, seed), seeds=self.tune_seeds,
                          save_models=False)
            if any(task.demo for task in finetune.chosen_tasks(cfg)):
                if self.base["adapt" if adapts else "student"].train:
                    raise SystemExit("--finetune \"--tasks .. --data_dir ..\" is missing: the demo's tasks "
                                     "are in the words of its own world")
                cfg = replace(cfg, data_dir=self.base["student"].data_dir)
            found["tuned"] = self.add("finetune", cfg, found[model])
        return found

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
    """Whether a run's folder holds its results; the folder's name tells that they are of these flags."""
    if stage != "finetune":
        return "finished" in peek_json(Path(cfg.out_dir, "results.json"))
    return all(len(peek_json(Path(cfg.out_dir, task.name, "results.json")).get("runs", ())) >= cfg.seeds
               for task in finetune.chosen_tasks(cfg))


# ---------------------------------------------------------------------------- how long it takes


def flops_of(stage, cfg, student):
    """Floating-point operations of a run, about; student: the shape of the students."""
    def training(shape, tokens, length, mlm=0.0):
        return 3 * tokens * flops_per_token(shape, length, mlm)

    def shape_of(path):
        with contextlib.suppress(SystemExit):
            return config_and_vocab(model_folder(path, "--model"), weights=False)[0]
        return model_config(student, 1000 if student == "demo" else 30_000)  # of a run to come

    if stage == "finetune":
        shape, total = shape_of(cfg.model or cfg.like), 0
        for task in finetune.chosen_tasks(cfg):
            steps = cfg.max_steps or (0 if cfg.epochs else task.steps)
            length = cfg.max_length or task.max_length or 128
            examples = steps * cfg.batch_size or (cfg.epochs or 3) * rows_of(task, cfg)
            candidates = len(task.text) - 1 if task.kind == "choice" else 1
            total += training(shape, examples * candidates * length, length)
        return cfg.seeds * total
    samples = cfg.max_steps * cfg.batch_size
    if not samples and Path(cfg.videos if stage == "teacher" else cfg.train).exists():  # the corpus tells
        samples = cfg.epochs * (len(data.VideoClips(cfg.videos, cfg.block_size, cfg.max_frames))
                                if stage == "teacher" else len(data.TextBlocks(cfg.train, cfg.block_size)))
    passes = {"teacher": 2, "student": 4 / 3, "adapt": 3}[stage]  # the language model's own is one
    shape = shape_of(cfg.language) if stage == "adapt" else model_config(
        cfg.model, 1000 if cfg.model == "demo" else 30_000)
    return passes * training(shape, samples * cfg.block_size, cfg.block_size, cfg.mask_rate)


def rows_of(task, cfg):
    """Training rows of a task: of a real one the lines of its file."""
    if task.demo:
        return TASK_SIZES["train"]
    with open(find_file(task, cfg.data_dir, task.train), "rb") as f:
        rows = sum(1 for _ in f)
    return min(cfg.limit or rows, rows)


def estimates(plan, names):
    """{name: seconds}: by operations, at the speed of the runs of the stage that have been timed."""
    timed, rates = peek_json(plan.out / "times.json"), {}
    student, device = plan.base["student"].model, init_ranks(plan.base["student"].device).device
    usual = EFFICIENCY * (peak_flops(device, torch.float32) or 1e13)  # 1e13: a GPU whose speed is not known
    for stage in SCRIPTS:
        done = [name for name in timed if name in plan.jobs and plan.jobs[name][0] == stage]
        seconds = sum(timed[name] for name in done)
        flops = sum(flops_of(*plan.jobs[name], student) for name in done)
        rates[stage] = flops / seconds if seconds else usual
    return {name: flops_of(*plan.jobs[name], student) / rates[plan.jobs[name][0]] for name in names}
