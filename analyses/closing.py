"""What finished runs have learned, as text: closing tables, beside a teacher, over seeds and tasks.

Everything is measured from saved runs: a run can be looked at again at any time, beside any other.
"""
import glob
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import distill
from analyses.figures import clip_states, describe
from common import parse_json, peek_json, print0, read_json, read_settings, read_text, write_json
from finetune import run_name
from model import DistillHead
from parts.machine import Ranks, init_ranks
from parts.metrics import PERCEPTUAL, mean_state, probes, retrieval, shared_neighbours
from parts.tasks import DEMO_TASKS, TASKS
from parts.weights import config_and_vocab, load_bert, load_mlm_head, load_video_encoder, read_tensors
from run import file_hash, model_folder, read_run


def open_clips(videos, teacher, vocab):
    """The training and the held-out clips of a packed file, cut as the teacher's; None where there are none.

    teacher: its model's folder; vocab: the students' Vocab.
    """
    if not videos or not (teacher / "video_encoder.json").exists():
        return None
    kinds = {"T": int, "max_frames": int, "vision": str, "val_clips": int, "feat_norm": bool}
    advice = "train the teacher again"
    options = read_settings(teacher / "clips.json", kinds, advice)
    options = {name: options[name] for name in kinds}
    features = read_settings(teacher / "video_encoder.json", {"features": int}, advice)["features"]
    clips = [data.VideoClips(videos, part=part, **options) for part in ("train", "val")]
    if clips[0].vocab.hash != vocab.hash or clips[0].features != features:
        raise SystemExit(f"--videos {videos}: its vocabulary or its {clips[0].features} channels a frame are "
                         f"not the teacher's ({features}); give the file it was trained on")
    return clips


def open_judge(folder, device):
    """What a distillation is measured beside: its teacher, texts and clips, as a namespace.

    A text-only run takes the teacher that lies beside it. bert, mlm, video, clips, latents and
    teacher, the folder of the teacher's model, are None where there are none, or where it reads other tokens.
    """
    config, _ = read_run(folder)
    cfg = SimpleNamespace(**config["config"])
    if not {"train", "val", "block_size", "seed", "videos", "teacher"} <= vars(cfg).keys():
        raise SystemExit(f"{folder}: not a distillation; give the folder of a finished run of distill.py")
    changed = f"{folder}: was made from another {{}} than is there now; make the run again"
    if not (Path(cfg.train).exists() or glob.glob(cfg.train)):
        raise SystemExit(f"{folder}: was made from {cfg.train}, which is not here; call from the folder in "
                         "which it was made, or make that file again")
    train, val = (data.TextBlocks(cfg.train, cfg.block_size, part, cfg.val) for part in ("train", "val"))
    recorded = config.get("hashes") if isinstance(config.get("hashes"), dict) else {}
    if recorded.get("corpus", train.hash) != train.hash:
        raise SystemExit(changed.format(cfg.train))
    latents = Path(cfg.train).parent / "raw" / "latents.json"
    judge = SimpleNamespace(cfg=cfg, train=train, val=val, bert=None, mlm=None, video=None, clips=None,
                            teacher=None,
                            latents=read_json(latents) if latents.exists() else None)
    path = cfg.teacher or Path(folder).parent / f"teacher-mlm+ct-s{cfg.seed}"
    if not Path(path).exists() or distill.is_paired(path, train.vocab):  # it cannot read the student's words
        return judge
    judge.teacher = path = model_folder(path, "--teacher")
    if recorded.get("teacher", own := file_hash(path)) != own:
        raise SystemExit(changed.format(path))
    judge.bert = load_bert(path).to(device)
    judge.mlm = load_mlm_head(path, judge.bert, needed=False)
    if judge.mlm:
        judge.mlm.to(device)
    if (path / "video_encoder.safetensors").exists():
        judge.video = load_video_encoder(path).to(device)
        judge.clips = open_clips(cfg.videos, path, train.vocab)
    if judge.clips and judge.latents and len(judge.clips[0].files) > 1:
        judge.latents["clips"] = []  # they are in the order of the demo's one file
    return judge


def newest_run(out="out"):
    """The folder of the latest distillation with a closing table, by its stored finish time; of a text-only
    one where there is no other."""
    found = []
    for path in Path(out).glob("distill-*/table.json"):
        results = peek_json(path.with_name("results.json"))
        if isinstance(results.get("finished"), (int, float)):
            found.append((results.get("objective") != "none", results["finished"], path.parent))
    if not found:
        raise SystemExit(f"{out}: no finished distillation; run torchrun distill.py --objective nst+crd")
    run = max(found)[2]
    print0(f"the newest distillation: {run}")
    return run


def short_names(paths):
    """Names of runs and of models' folders and files; the path itself of those that would be equal."""
    paths = [Path(path) for path in paths]
    names = [path.stem if path.is_file() else run_name(path / "model" if (path / "model").is_dir() else path)
             for path in paths]
    times = Counter(dict(zip(paths, names)).values())
    return [name if times[name] == 1 else str(path) for name, path in zip(names, paths)]


def students_of(run, judge):
    """{name: folder} of a distillation and of its text-only twin where that lies beside it and read the same
    text."""
    found = {}
    for folder in dict.fromkeys((Path(run), Path(run).parent / f"distill-none-s{judge.cfg.seed}")):
        if not (folder / "results.json").exists():
            continue
        config, results = read_run(folder)
        text = (config.get("hashes") or {}).get("corpus", judge.train.hash)
        words = config_and_vocab(folder / "model", weights=False)[1].hash
        if (text, words) != (judge.train.hash, judge.val.vocab.hash):
            print0(f"{folder}: has another text or vocabulary, so it is left out")
            continue
        objective = results["objective"]
        found["text-only" if objective == "none" else objective] = folder
    return found


def saved_table(run):
    """(text of a distillation's closing table, how many clips were held out), from its table.json."""
    path = Path(run) / "table.json"
    advice = "give the folder of a finished run of distill.py"
    found = read_settings(path, {"columns": dict, "clips": int}, advice)
    try:
        return closing_table(found["columns"], found["clips"]), found["clips"]
    except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise SystemExit(f"{path}: not in the form of distill.py ({error!r}); measure the run again, by its "
                         "command with --resume auto") from None


def read_heads(folder, device="cpu"):
    """({name: tensor} of a distillation's own maps, head): head(term) is that term's distillation head as a
    function of h, the identity where it has none."""
    tensors = {key: x.to(device)
               for key, x in read_tensors(Path(folder) / "model" / "heads.safetensors").items()}

    def head(term):
        parts = {key.removeprefix(f"heads.{term}."): x for key, x in tensors.items()
                 if key.startswith(f"heads.{term}.")}
        if not parts:
            return lambda h: h
        head = DistillHead(parts["0.weight"].shape[1], parts["2.weight"].shape[0]).to(device)
        head.load_state_dict(parts)
        return head
    return tensors, head


def aligned_space(folder, objective, device="cpu"):
    """The maps (text, clip) from h, mask and from v into the objective's space, or None.

    crd: mean over real tokens of f_1(head(h)), and f_2(v); l2: mean of head(h), and v.
    """
    tensors, head = read_heads(folder, device)

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
    if "crd" in objective.split("+"):
        return (lambda h, mask: mean_state(linear("f1", head("crd")(h)), mask)), lambda v: linear("f2", v)
    if "l2" in objective.split("+"):
        return (lambda h, mask: mean_state(head("l2")(h), mask)), lambda v: v
    return None


def measure(folder, judge, device):
    """{mlm_loss, mlm_accuracy, probes} of a run's results, and neighbours and retrieval beside its judge."""
    config, results = read_run(folder)
    bert = load_bert(Path(folder) / "model").to(device)
    found = {name: results.get(name) for name in ("mlm_loss", "mlm_accuracy", "probes")}
    if judge.bert:
        found["neighbours"] = shared_neighbours(bert, judge.bert, judge.val, device)
    if judge.clips:
        space = aligned_space(folder, config["config"]["objective"], device)
        found["retrieval"] = retrieval(bert, judge.video, *judge.clips, device, space)
    return found


def measure_teacher(judge, device):
    """The same of the judge itself."""
    found = {"mlm_loss": None, "mlm_accuracy": None}
    if judge.mlm:
        found = distill.evaluate(judge, judge.val, judge.cfg, Ranks(0, 1, device))
    if judge.clips:
        found["retrieval"] = retrieval(judge.bert, judge.video, *judge.clips, device,
                                       (mean_state, lambda v: v))
    if judge.latents:
        found["probes"] = probes(judge.bert, judge.train, judge.latents, device)
    return found


def close(folder, beside, device):
    """Prints the closing table of a distillation: its teacher, the runs `beside`, itself; and two samples.

    The columns are kept in the run's table.json.
    """
    judge, objective = open_judge(folder, device), read_run(folder)[1]["objective"]
    columns = {}
    if judge.clips:
        print0(f"measuring retrieval on {len(judge.clips[1]):,} held-out clips")
    if judge.bert and objective != "none":
        columns["teacher"] = measure_teacher(judge, device)
    for run in (*beside, folder):
        name = read_run(run)[1]["objective"]
        columns["text-only" if name == "none" else name] = measure(run, judge, device)
    columns = {name: column for name, column in columns.items() if any(column.values())}
    n_clips = len(judge.clips[1]) if judge.clips else 0
    print0(f"\n{closing_table(columns, n_clips)}\n")
    write_json(Path(folder) / "table.json", {"columns": columns, "clips": n_clips})
    if objective == "none" or not judge.latents:
        return
    bert = load_bert(Path(folder) / "model").to(device)
    head, vocab = load_mlm_head(Path(folder) / "model", bert).to(device), judge.val.vocab
    ids, place = judge.val.batch([0])["ids"][0], judge.cfg.block_size // 2
    text, words = fill_in(bert, head, vocab, ids, place, device)
    print0(f"fills in   {text}\n           " + ", ".join(f"{w} {100 * p:.0f}%" for w, p in words)
           + f" (it was {vocab.decode([int(ids[place])])})")
    if judge.clips and judge.latents["clips"]:
        states = clip_states(judge.latents, judge.clips[1])
        found = describe(states[columns[objective]["retrieval"]["nearest"][0]])
        print0(f"retrieves  {states[0]['text']}\n           {found}\n")


@torch.no_grad()
def fill_in(bert, head, vocab, ids, place, device):
    """Text of a sequence ids (T,) with [MASK] at `place`, and the three likeliest words: [(word, share)]."""
    masked = ids.clone()
    masked[place] = vocab.mask
    best = head(bert(masked[None].to(device))[0, place]).float().softmax(-1).topk(3)
    text = vocab.decode(masked[1:-1].tolist())
    return text, [(vocab.decode([i]), p) for p, i in zip(best.values.tolist(), best.indices.tolist())]


def closing_table(columns, n_clips):
    """Text of the closing table.

    columns: {model: {"mlm_loss", "mlm_accuracy", "neighbours", "retrieval", "probes"}}, what was not measured
    missing or None; n_clips: held-out clips, 0 without retrieval. All but the loss in percent.
    """
    def percent(value):
        return "-" if value is None else f"{100 * value:.1f}"

    def shares(found):
        return "-" if found is None else " / ".join(percent(found[k]) for k in ("1", "5", "10"))

    every = list(columns.values())
    loss = ["-" if column.get("mlm_loss") is None else f"{column['mlm_loss']:.3f}" for column in every]
    rows = [["", *columns, "chance"], ["masked words: loss", *loss, "-"],
            ["masked words: accuracy", *(percent(column.get("mlm_accuracy")) for column in every), "-"],
            ["10 nearest blocks shared with the teacher",
             *(percent(column.get("neighbours")) for column in every), "-"]]
    spaces = {"aligned": "aligned space", "mean state": "mean state as it is", "ridge": "after one ridge map"}
    for space, title in spaces.items():
        if n_clips:
            rows.append([f"text-to-video R@1/5/10: {title}",
                         *(shares(column["retrieval"][space]) for column in every),
                         shares({str(k): k / n_clips for k in (1, 5, 10)})])
    for name, chance in (every[-1].get("probes") or {}).items():
        for kind, title in (("linear", "linear probe"), ("neighbours", "5 nearest nouns")):
            rows.append([f"{name} of held-out nouns: {title}",
                         *(percent(column["probes"][name][kind]) for column in every),
                         percent(chance[kind + "_chance"])])
    return common.table(rows)


def tasks_table(rows, tasks):
    """Text of the demo's table of tasks: accuracy on held-out / seen nouns, medians over the runs.

    rows: {model: {task: results of its runs}}.
    """
    def median(runs, name):
        return sorted(run["scores"][name]["accuracy"] for run in runs)[(len(runs) - 1) // 2]
    runs = max(len(found) for row in rows.values() for found in row.values())
    lines = [[f"median of {runs}: held-out / seen", *(task.title for task in tasks), "average"]]
    for row, found in rows.items():
        cells = [[median(found[task.name], name) for task in tasks] for name in ("", "seen")]  # (2, tasks)
        lines.append([row, *(f"{held:.1f} / {seen:.1f}" for held, seen in
                             zip(*([*x, np.mean(x)] for x in cells)))])
    chance = [100 / len(task.words) for task in tasks]
    lines.append(["chance", *(f"{x:.1f}" for x in [*chance, np.mean(chance)])])
    return common.table(lines)


def seeds_table(title, rows, against, chance):
    """Text of a table of means over seeds, with their standard deviation.

    rows: {model: {column: [a value a seed]}}; against: the row that the others are compared with: a star
    marks a mean that differs from its by more than twice the pooled standard deviation, see differs.
    """
    def cell(values, others):
        spread = f" ±{np.std(values, ddof=1):4.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread:6}{'*' if differs(values, others) else ' '}"
    lines = [[title, *rows[against]]]
    lines += [[row, *(cell(values, rows[against][column]) for column, values in columns.items())]
              for row, columns in rows.items()]
    return common.table([*lines, ["chance", *(cell([x], []) for x in chance)]])


def differs(values, others):
    """Whether two means differ by more than twice the pooled standard deviation of single values:
    sqrt((s^2 + s'^2) / 2) of equally many seeds; False below two seeds."""
    if min(len(values), len(others)) < 2:
        return False
    pooled = np.sqrt((np.var(values, ddof=1) + np.var(others, ddof=1)) / 2)
    return bool(abs(np.mean(values) - np.mean(others)) > 2 * pooled)


def close_adaptation(runs, path):
    """Prints what adaptations have passed on: probes of the encoder, and accuracy on the demo's tasks.

    runs: {row: [(folder of the adaptation, folder of its fine-tuning) of each seed]}, the first row without
    CLIP; path: of the json that keeps the numbers.
    """
    against, found, scored = next(iter(runs)), {}, {}
    for row, seeds in runs.items():
        results = [read_run(folder)[1] for folder, _ in seeds]
        found[row] = {name: [100 * run["probes"][name]["linear"] for run in results] for name in PERCEPTUAL}
        tasks = {task.title: [read_json(Path(folder, task.name, "results.json"))["runs"][0]["scores"]
                              for _, folder in seeds] for task in (TASKS[name] for name in DEMO_TASKS)}
        columns = {title: [scores[""]["accuracy"] for scores in values] for title, values in tasks.items()}
        seen = [[scores["seen"]["accuracy"] for scores in values] for values in tasks.values()]
        scored[row] = columns | {"average": np.mean(list(columns.values()), 0).tolist(),
                                 "seen nouns": np.mean(seen, 0).tolist()}
    log = [parse_json(line) for line in read_text(Path(runs[against][0][0], "log.jsonl")).splitlines()]
    start = next(line for line in log if "probe_material" in line)  # before the first step
    before = {"before": {name: [100 * start[f"probe_{name}"]] for name in PERCEPTUAL}}
    any_run = read_run(runs[against][0][0])[1]
    chance = [100 * any_run["probes"][name]["linear_chance"] for name in PERCEPTUAL]
    by_luck = [100 / len(TASKS[name].words) for name in DEMO_TASKS]
    by_luck += [float(np.mean(by_luck))] * 2
    print0("\n" + seeds_table("probe of held-out nouns, %", before | found, against, chance))
    print0("\n" + seeds_table("held-out nouns, accuracy, %", scored, against, by_luck))
    print0(f"\nmean ± standard deviation of {len(runs[against])} seeds; * differs from {against} by more "
           "than twice the pooled standard deviation\n")
    write_json(path, {"probes": before | found, "tasks": scored})


def table(runs):
    """Prints a row a distillation: masked words, retrieval after the ridge map, and probes of held-out nouns
    (linear / 5 nearest), all but the loss in percent."""
    rows, device = [], init_ranks().device
    named = dict(zip(short_names(runs), runs))
    for name, run in common.progress(named.items(), len(named), " runs", "measure"):
        found = measure(run, open_judge(run, device), device)
        try:
            row = {"run": name, "mlm loss": f"{found['mlm_loss']:.3f}",
                   "accuracy": f"{100 * found['mlm_accuracy']:.1f}"}
            if "retrieval" in found:
                row["ridge R@10"] = f"{100 * found['retrieval']['ridge']['10']:.1f}"
            if found.get("neighbours") is not None:
                row["teacher's neighbours"] = f"{100 * found['neighbours']:.1f}"
            for name, probe in (found["probes"] or {}).items():
                row[name] = f"{100 * probe['linear']:.1f} / {100 * probe['neighbours']:.1f}"
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise SystemExit(f"{run}/results.json: not in the form of distill.py ({error!r}); make the run "
                             "again") from None
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print0(common.table([columns, *([row.get(key, "-") for key in columns] for row in rows)]))
