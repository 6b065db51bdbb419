"""The scripts as commands: makes what the demo lacks, runs the stage, and closes with a table.

The first four functions are what the scripts run under their main guards; the others make what these need.
With real data nothing is made.
"""
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import adapt_xdbert as adapt_script
import distill as distill_script
import finetune as finetune_script
import teacher as teacher_script
from analyses.closing import close, close_adaptation, newest_run, open_clips, tasks_table
from common import peek_json, print0, read_settings, stored_config, write_json
from data import open_vocab
from parts.checkpoints import check_started
from parts.machine import init_ranks, side_by_side
from parts.tasks import TASKS
from parts.vocab import OPENAI_CLIP, load_clip_vocab, load_vocab
from parts.weights import is_clip
from prepare.world import demo_world, demo_xtext
from run import model_folder


def teacher(cfg):
    """teacher.py."""
    if not cfg.videos:
        world = demo_world(cfg.data_dir, cfg.seed, init_ranks(cfg.device))
        cfg = replace(cfg, videos=str(world / "videos.h5"))
    elif cfg.preset == "demo":
        print0(f"--preset demo is meant for the demo world: {cfg.block_size} tokens and {cfg.max_frames} "
               "frames a clip; for real videos give --preset base, or small, which has 6 layers")
    return teacher_script.main(cfg)


def distill(cfg):
    """distill.py; on the demo with its teacher and the text-only student; then the closing table."""
    ranks, asked = init_ranks(cfg.device), cfg.videos
    folder, beside = distill_script.run_folder(cfg), []
    check_started(cfg, folder)
    if not cfg.train:
        world = demo_world(cfg.data_dir, cfg.seed, ranks)
        cfg = on_demo(cfg, folder.parent, world)
        if cfg.objective != "none":
            text_only = text_only_run(cfg, folder.parent)
            if distill_script.is_paired(cfg.teacher, vocab := distill_script.vocab_of_text(cfg.train)):
                check_reader("teacher", cfg.teacher, vocab)
                cfg = replace(cfg, train=str(demo_xtext(world, ranks)))
            # what does not fit is said before the text-only student is trained
            distill_script.open_parts(cfg, "cpu", torch.float32)
            if cfg.init_from:
                model_folder(cfg.init_from, "--init_from")
            distill_script.main(text_only)
            beside = [text_only.out_dir]
    if cfg.objective != "none" and not cfg.teacher:
        raise SystemExit(f"--objective {cfg.objective} needs a teacher: --teacher FOLDER, made by teacher.py "
                         "--videos FILE, or any Hugging Face BERT or CLIP")
    if cfg.videos and cfg.teacher:  # what the closing table needs must fit before the training
        paired = distill_script.is_paired(cfg.teacher, distill_script.vocab_of_text(cfg.train))
        model = None if paired else model_folder(cfg.teacher, "--teacher")
        if not (model and open_clips(cfg.videos, model, load_vocab(model))) and asked:
            raise SystemExit(f"--videos {asked}: nothing reads them, as --teacher {cfg.teacher} has no video "
                             "encoder or reads other tokens; leave --videos out, or give a run of teacher.py")
    results = distill_script.main(cfg)
    if not cfg.eval_only and ranks.main:
        close(folder, beside, ranks.device)
    ranks.barrier()
    return results


def adapt_xdbert(cfg):
    """adapt_xdbert.py; on the demo with text-only student and CLIP-like tower, then a table of tasks."""
    if cfg.train or cfg.dry_run:
        return adapt_script.main(cfg)
    ranks, folder = init_ranks(cfg.device), adapt_script.run_folder(cfg)
    check_started(cfg, folder)
    world = demo_world(cfg.data_dir, cfg.seed, ranks)
    vocab = open_vocab(world / "corpus.h5")
    for flag in ("language", "clip"):
        if getattr(cfg, flag) not in ("", *adapt_script.LANGUAGE, "random"):
            check_reader(flag, getattr(cfg, flag), vocab)
    cfg = replace(cfg, train=str(demo_xtext(world, ranks)))
    if not cfg.language:
        student = distill_script.Config(seed=cfg.seed, data_dir=cfg.data_dir, device=cfg.device,
                                        block_size=cfg.block_size)
        student = text_only_run(on_demo(replace(student, objective="none"), folder.parent, world),
                                folder.parent)
        distill_script.main(student)
        cfg = replace(cfg, language=student.out_dir)
    if not cfg.clip and not cfg.no_clip:
        cfg = replace(cfg, clip=make_teacher(cfg, folder.parent, objective="clip"))
    results = adapt_script.main(cfg)
    if cfg.table and not cfg.no_clip and not cfg.eval_only:
        adaptation_rows(replace(cfg, out_dir=str(folder)), ranks)
    return results


def finetune(cfg):
    """finetune.py; without --model the demo's rows, each in several worlds, and their table."""
    asked = cfg.score or cfg.predict
    chosen = [] if asked else finetune_script.chosen_tasks(cfg)
    on_demo = any(task.demo for task in chosen)
    if on_demo:
        demo_world(cfg.data_dir, cfg.seed, init_ranks(cfg.device))
    if asked or cfg.model or cfg.cross or not all(task.demo for task in chosen):
        return finetune_script.main(cfg)
    return demo_rows(cfg)


# ---------------------------------------------------------------------------- what analyze.py looks at


def any_distillation():
    """Folder of the newest distillation in out/; makes the demo's where there is none."""
    if not list(Path("out").glob("distill-*/table.json")):
        print0("no finished distillation in out/ yet: the demo's main job comes first")
        distill(distill_script.Config(resume="auto"))
    return newest_run()


def demo_adaptations(n=2):
    """Folders of the first n of the demo's adaptations: by the paper's objectives, and without CLIPTC."""
    return [adapt_xdbert(adapt_script.Config(objective=objective, table=False, resume="auto"))["folder"]
            for objective in (adapt_script.Config.objective, "mlm+match")[:n]]


def demo_fine_tuned():
    """Folders of the demo's distilled and text-only students' runs on its tasks."""
    distilled = distill(distill_script.Config(resume="auto"))["folder"]
    found = []
    for folder in (distilled, str(Path(distilled).with_name("distill-none-s0"))):
        tuned = finetune_script.Config(model=folder, out_dir=f"out/finetune/{Path(folder).name}")
        finetune(tuned)
        found.append(tuned.out_dir)
    return found


# ---------------------------------------------------------------------------- the demo's prerequisites


def make_teacher(cfg, out, name="", **flags):
    """A teacher of the demo world of a stage's Config, in the folder `out`; trains it where there is none.

    -> its folder, whose name is `name` or teacher.py's own.
    """
    world = Path(cfg.data_dir, f"demo-s{cfg.seed}")
    run = teacher_script.Config(seed=cfg.seed, data_dir=cfg.data_dir, device=cfg.device, resume="auto",
                                videos=str(world / "videos.h5"), block_size=cfg.block_size, **flags)
    run = replace(run, out_dir=str(out / (name or teacher_script.run_folder(run).name)))
    teacher_script.main(run)
    return run.out_dir


def on_demo(cfg, out, world):
    """distill.Config with the demo world's files and, where it distils, a teacher in the folder `out`."""
    files = {"train": str(world / "corpus.h5"), "videos": cfg.videos or str(world / "videos.h5")}
    if cfg.objective != "none" and not cfg.teacher:
        files["teacher"] = make_teacher(cfg, out)
    return replace(cfg, **files)


def check_reader(flag, path, vocab):
    """One line where the model that a flag gives cannot read the demo world, whose Vocab is `vocab`."""
    load = load_clip_vocab if is_clip(path, f"--{flag}") else load_vocab
    own = OPENAI_CLIP if Path(path).is_file() else load(model_folder(path, f"--{flag}")).hash
    if own != vocab.hash:
        raise SystemExit(f"--train is missing: --{flag} {path} cannot read the demo world; pack text with "
                         "`python data.py xtext`")


def text_only_run(cfg, out):
    """Config of the text-only student of the same shape, tokens and steps, in the folder `out`.

    Flags that only distillation reads are at their defaults, so that one such run serves all objectives,
    weights and teachers.
    """
    unused = {field.name: field.default for field in fields(cfg)
              if field.name in ("head", "init_from", "teacher", "segments", "quick_gelu")
              or field.name.startswith(("soft_", "nst_", "crd_"))
              or field.name.startswith("w_") and field.name != "w_mlm"}
    cfg = replace(cfg, **unused, objective="none", resume="auto", eval_only=False, out_dir="")
    return replace(cfg, out_dir=str(out / distill_script.run_folder(cfg).name))


def text_alone_run(cfg, out):
    """Config of the same encoder adapted on as much text alone, in the folder `out`; one run serves all flags
    of CLIP's side."""
    unused = ("clip", "segments", "cross_layers", "freeze", "cliptc_rate", "w_match", "w_cliptc", "w_itc")
    cfg = replace(cfg, **{name: getattr(adapt_script.Config, name) for name in unused}, objective="mlm",
                  no_clip=True, resume="auto", max_minutes=0.0, out_dir="")
    return replace(cfg, out_dir=str(out / adapt_script.run_folder(cfg).name))


def adaptation_rows(cfg, ranks, seeds=3):
    """What the demo compares with an adaptation: as much text alone, and ITC where the objective is the
    paper's. Each is adapted with several seeds, on the same world, start and tower, and fine-tuned once."""
    out = Path(cfg.out_dir).parent
    rows = {"as much text alone": text_alone_run(cfg, out), cfg.objective: cfg}
    if cfg.objective == adapt_script.Config.objective:
        with_itc = replace(cfg, objective=f"{cfg.objective}+itc", out_dir="")
        name = adapt_script.run_folder(with_itc).name
        rows[with_itc.objective] = replace(with_itc, out_dir=str(out / name))
    jobs, needs, runs = {}, {}, {}
    for row, run in rows.items():
        for seed in range(cfg.seed, cfg.seed + seeds):
            of_seed = f"-seed{seed}" if seed > cfg.seed else ""
            # as a command: --train alone would choose another preset, and nothing reads --data_dir beside it
            one = replace(run, preset="demo", seed=seed, out_dir=run.out_dir + of_seed, resume="auto",
                          max_minutes=0.0, table=False, data_dir=adapt_script.Config.data_dir)
            tune = finetune_script.Config(
                data_dir=cfg.data_dir, device=cfg.device, seed=cfg.seed, seeds=1, model=one.out_dir,
                out_dir=str(out / "finetune" / Path(one.out_dir).name))
            jobs |= {one.out_dir: (adapt_script, one), tune.out_dir: (finetune_script, tune)}
            needs[tune.out_dir] = [one.out_dir]
            runs.setdefault(row, []).append((one.out_dir, tune.out_dir))
    print0(f"table: {len(rows)} rows of {seeds} seeds, each adapted and fine-tuned on the demo's tasks")
    if ranks.size == 1 and ranks.device.type == "cpu":
        side_by_side({name: command(*job) for name, job in jobs.items()}, needs)
    else:
        for script, one in jobs.values():
            script.main(one)
    if ranks.main:
        close_adaptation(runs, Path(cfg.out_dir, "table.json"))


def preset_values(script, cfg):
    """{flag: value} of a Config's preset alone, without the flags that beat it."""
    values = script.PRESETS[cfg.preset]
    if callable(values):
        values = values({name: x for name, x in asdict(cfg).items() if x != getattr(type(cfg), name)})
    return {field.name: field.default for field in fields(cfg)} | values | {"preset": cfg.preset}


def command(script, cfg):
    """The command line of a stage with the flags of its Config."""
    usual = preset_values(script, cfg)
    return [sys.executable, script.__file__, f"--preset={cfg.preset}", *(
        f"--{name}={x}" for name, x in asdict(cfg).items() if x != usual[name])]


def newest_student(cfg, vocab):
    """distill.Config of the student of `vocab` that was distilled last; the default where there is none.

    Students with a --teacher of their own are passed over: the other seeds' worlds have no such teacher.
    """
    found = {}
    for path in Path("out").glob("*/results.json"):
        results = peek_json(path)
        if (results.get("objective") in (None, "none") or results.get("vocabulary") != vocab.hash
                or type(results.get("finished")) not in (int, float)):
            continue
        try:
            config = read_settings(path.with_name("config.json"), {"config": dict})["config"]
            student = stored_config(distill_script.Config, config, path.with_name("config.json"))
        except SystemExit as error:
            print0(f"passed over {path.parent}: {error}")
            continue
        if Path(student.teacher).name == f"teacher-mlm+ct-s{student.seed}":
            found[results["finished"]] = path.parent, student
        elif "-image-" not in path.parent.name:
            print0(f"passed over {path.parent}: its --teacher belongs to its own world alone")
    if not found:
        print0("no distilled student of this world yet: the default one will be made")
        return distill_script.Config(seed=cfg.seed)
    folder, student = found[max(found)]
    print0(f"newest student: {folder}")
    return replace(student, out_dir=str(folder), train="", videos="", teacher="")


def demo_rows(cfg):
    """Fine-tunes what the demo compares: no pre-training, the text-only and the distilled student, and one
    distilled from a teacher that saw the middle frame alone. Each seed is a world with its own models."""
    ranks, rows = init_ranks(cfg.device), {}
    seeds = range(cfg.seed, cfg.seed + (cfg.seeds or finetune_script.PER_TASK[cfg.preset][3]))
    newest = newest_student(cfg, open_vocab(Path(cfg.data_dir, f"demo-s{cfg.seed}", "corpus.h5")))
    for row in ("no pre-training", "text-only", "distilled", "distilled from images"):
        for seed in seeds:
            one = replace(cfg, seed=seed, seeds=1)
            world = demo_world(cfg.data_dir, seed, ranks)
            one = replace(one, **model_of(row, newest, one, world))
            if cfg.out_dir:
                one = replace(one, out_dir=str(Path(cfg.out_dir, row.replace(" ", "-") + f"-s{seed}")))
            for summary in finetune_script.main(one):
                rows.setdefault(row, {}).setdefault(summary["task"], []).extend(summary["runs"])
        if row.startswith("distilled"):
            close_tasks(rows, Path(cfg.out_dir or "out/finetune", "demo.json"), ranks)
    return rows


def model_of(row, newest, cfg, world):
    """Flags of finetune.py for a row of the demo's table in a world; makes a missing student."""
    out, seed = Path("out"), cfg.seed
    own = newest.out_dir if seed == newest.seed else out / f"distill-{newest.objective}-s{seed}"
    run = replace(newest, seed=seed, data_dir=cfg.data_dir, device=cfg.device, out_dir=str(own),
                  resume="auto", eval_only=False, max_minutes=0.0)
    if row in ("text-only", "no pre-training"):
        run = text_only_run(on_demo(replace(run, objective="none"), out, world), out)
    elif row == "distilled from images":
        seeing = make_teacher(run, out, f"teacher-image-s{seed}", vision="image")
        run = replace(run, teacher=seeing, out_dir=str(out / f"distill-{run.objective}-image-s{seed}"))
    run = on_demo(run, out, world)
    folder = distill_script.main(run)["folder"]
    return {"model": "none", "like": folder} if row == "no pre-training" else {"model": folder}


def close_tasks(rows, path, ranks):
    """Prints the table of rows fine-tuned on the demo's tasks, and writes their runs."""
    print0(f"\n{tasks_table(rows, [TASKS[name] for name in next(iter(rows.values()))])}\n")
    if ranks.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows)
