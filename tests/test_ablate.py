"""Proves what ablate.py runs, counts and prints: rows keyed by their flags, statistics, tables, failures.

Run: python -m pytest -q tests/test_ablate.py
"""
import csv
import io
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import ablate
import common
import distill
from analyses import plan as plans
from analyses import rows
from analyses.papers import TABLES, Row, Table
from conftest import QUICK_STUDENT, QUICK_TEACHER
from parts.machine import init_ranks
from prepare.world import demo_xtext

QUICK = {"student": QUICK_STUDENT, "teacher": QUICK_TEACHER,
         "adapt": dict(max_steps=2, batch_size=8, eval_blocks=6, device="cpu", cross_layers=1, log_every=1),
         "finetune": dict(tasks="mishap,before_after", max_steps=2, device="cpu")}


@pytest.fixture
def plan(demo, tmp_path):
    """Plan of the demo's quick runs; more flags of a stage as keywords."""
    def make(tune_seeds=1, second="", given=(), **more):
        base = {stage: script.Config(**QUICK[stage] | where(stage, demo) | more.get(stage, {}))
                for stage, script in ablate.SCRIPTS.items()}
        return ablate.Plan(base, tune_seeds, tmp_path / "ablate", second, given=given)
    return make


def where(stage, demo):
    return {"data_dir": str(demo)} if stage == "student" else {}


def quick_flags(demo):
    """The same as ablate.py's flags."""
    return [f"--{stage}=" + shlex.join(f"--{name}={value}" for name, value in (QUICK[stage] | where(stage, demo)).items())
            for stage in QUICK]


def run_here(jobs, needs, workers, logs, seconds):
    """side_by_side in this process: what the commands of the stages do."""
    modules = {Path(script.__file__).name: script for script in ablate.SCRIPTS.values()}
    failed = {}
    for name, argv in jobs.items():
        module = modules[Path(argv[1]).name]
        try:
            assert not set(needs[name]) & failed.keys()
            module.main(common.parse_cli(module.Config, module.PRESETS, argv[2:], module.NEEDS))
        except (SystemExit, AssertionError) as error:
            failed[name] = str(error) or "needs another"
    seconds |= {name: 1.0 for name in jobs if name not in failed}
    return failed


# ---------------------------------------------------------------------------- statistics and text


def test_comparison_is_the_paired_t_test():
    values, others = {0: 60.0, 1: 71.0, 2: 65.0, 5: 1.0}, {2: 61.0, 0: 58.0, 1: 66.0, 7: 9.0}
    assert rows.compare(values, others) == pytest.approx(stats.ttest_rel([60, 71, 65], [58, 66, 61]).pvalue)
    by_hand = np.mean([2, 5, 4]) / (np.std([2, 5, 4], ddof=1) / 3 ** 0.5)  # t with two degrees of freedom
    assert rows.compare(values, others) == pytest.approx(2 * stats.t.sf(by_hand, 2))
    always = rows.statistics({s: {"x": 60.0 + s} for s in range(3)}, {s: {"x": 50.0 + s} for s in range(3)})["x"]
    assert always["p"] is None and rows.cell(always) == "61.0 ± 1.0 "  # no spread: no test, whatever rounding leaves
    assert rows.compare({0: 0.3, 1: 1.1}, {0: 0.2, 1: 1.0}) is None
    assert rows.compare({0: 1.0}, {0: 2.0}) is None and rows.compare({0: 1.0, 1: 2.0}, {3: 1.0}) is None
    assert rows.compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == 1 and rows.compare({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) is None


def test_statistics_of_a_row_are_those_of_its_seeds():
    seeds = {0: {"a": 1.0, "b": 5.0}, 1: {"a": 3.0}, 2: {"a": 8.0}}
    found = rows.statistics(seeds, {0: {"a": 1.0}, 1: {"a": 1.0}, 2: {"b": 3.0}})
    assert found["a"]["mean"] == 4 and found["a"]["median"] == 3 and found["a"]["difference"] == 1
    assert found["a"]["deviation"] == pytest.approx(np.std([1, 3, 8], ddof=1))
    assert found["b"]["deviation"] is None and found["b"]["p"] is None and found["b"]["difference"] is None


ASKED = Table("a table", ("SST-2", "QNLI"), (Row("plain", (88.0, 84.0)), Row("+ KD", (90.0, None)), Row("ours & own")))


def example_rows():
    seeds = [{0: {"x": 50.0, "average": 50.0}, 1: {"x": 51.0, "average": 51.0}, 2: {"x": 52.5, "average": 52.5}},
             {0: {"x": 70.0, "average": 70.0}, 1: {"x": 71.0, "average": 71.5}, 2: {"x": 72.0, "average": 73.0}}, {}]
    return [{"name": row.name, "paper": list(row.paper), "columns": rows.statistics(found, seeds[0])}
            for row, found in zip(ASKED.rows, seeds)]


def test_text_shows_ours_beside_the_papers():
    ours, beside = rows.as_text(ASKED, example_rows()).split("\n\n")
    for text in (ours, beside):
        assert len({len(line) for line in text.splitlines()}) == 1
    assert [line.split()[0] for line in ours.splitlines()[2:]] == ["plain", "+"]  # what was not run is left out
    assert re.search(r"\+ KD +3 +71.0 ± 1.0\* +71.5 ± 1.5\*", ours) and "50.0" not in ours
    head, _, plain, kd, own = beside.splitlines()
    assert re.search(r"ours: average +median +difference +p +\| paper: +SST-2 +QNLI +average +difference", head)
    assert re.search(r"plain +51.2 ± 1.3 +51.0 +- +- +\| +88.0 +84.0 +86.0 +-$", plain)
    assert re.search(r"\+ KD +71.5 ± 1.5\* +71.5 +\+20.3 +(0.00\d|<.001) +\| +90.0 +- +- +\+2.0$", kd)  # of what both have
    assert re.search(r"ours & own( +-){4} +\|( +-){4}$", own)


def test_csv_and_latex_hold_the_same_numbers():
    found = list(csv.DictReader(io.StringIO(rows.as_csv(ASKED, example_rows()))))
    assert [row["row"] for row in found] == ["plain", "+ KD", "ours & own"]
    assert float(found[1]["average, mean"]) == 71.5 and found[1]["paper: SST-2"] == "90.0" and found[2]["x, p"] == ""
    lines = rows.as_latex(ASKED, example_rows()).splitlines()
    assert lines[0].startswith("% *: differs from plain") and lines[1] == r"\begin{tabular}{lrrrr}" and (
        lines[-1] == r"\end{tabular}")
    assert r"+ KD & 71.0 $\pm$ 1.0$^*$ & 71.5 $\pm$ 1.5$^*$ & 90.0 & - \\" in lines
    assert r"ours \& own & - & - & - & - \\" in lines


def test_numbers_are_shown_with_the_digits_that_tell():
    assert [rows.number(x) for x in (109482240, 71.53, 0.0064, 1.0)] == ["109,482,240", "71.5", "0.0064", "1.0000"]
    assert rows.number(-0.04, 71.5, "+") == "-0.0" and rows.number(0.0021, 0.5, "+") == "+0.0021"


# ---------------------------------------------------------------------------- the papers' tables


def test_printed_numbers_give_the_printed_averages_and_differences():
    """Table 1's column Avg. and the differences that Tables 7 and 8 print, with the slips that are known."""
    assert [round(np.mean(row.paper), 1) for row in TABLES["1"].rows] == [78.6, 81.4, 78.9, 81.7, 82.3, 82.4, 82.6]
    plain, nst, _ = TABLES["7"].rows
    assert np.round(np.subtract(nst.paper, plain.paper), 1).tolist() == [0.3, -0.5, 0.3, 4.6, 3.1, 3.3]
    _, nst, crd, _, no_nst, no_crd, _ = TABLES["8"].rows
    assert np.round(np.subtract(no_nst.paper, nst.paper), 1).tolist() == [-1.7, -0.2, -0.7, -1.4]  # printed: -0.7
    assert np.round(np.subtract(no_crd.paper, crd.paper), 1).tolist() == [-1.1, -0.4, -0.7, -0.5]  # printed: -0.1
    assert TABLES["13"].rows[1].paper[0] - TABLES["13"].rows[0].paper[0] == pytest.approx(3.3)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_every_table_is_a_plan(plan, name):
    table, one = TABLES[name], plan()
    assert all(len(row.paper) in (0, len(table.columns)) for row in table.rows)
    for row in table.rows:
        if row.model and table.by != "parameters":
            one.folders(row, 3, table.by)
    for job, needs in one.needs.items():
        assert set(needs) <= set(list(one.jobs)[:list(one.jobs).index(job)])  # an order in which they can run
    for stage, cfg in one.jobs.values():
        script, argv = ablate.SCRIPTS[stage], ablate.command(ablate.SCRIPTS[stage], cfg)[2:]
        assert common.parse_cli(script.Config, script.PRESETS, argv, script.NEEDS) == cfg and cfg.seed == 3
    if name in ("2", "4"):  # at equal tokens and steps
        like = one.base["student"]
        video = [cfg for stage, cfg in one.jobs.values() if stage == "teacher"][0]
        same = ("max_steps", "batch_size", "block_size", "model", "lr", "warmup_steps", "dropout", "grad_clip", "beta2",
                "mask_split")
        assert [getattr(video, flag) for flag in same] == [getattr(like, flag) for flag in same]
        assert video.eval_every >= video.max_steps  # so the last weights are kept, as a student's are


def test_tables_share_runs_and_every_flag_is_a_key(plan):
    one = plan()
    for name in ("5", "6"):
        for row in TABLES[name].rows:
            one.folders(row, 0, "tasks")
    stages = [stage for stage, _ in one.jobs.values()]
    # text-only, six objectives and three more of the image teacher; two teachers
    assert (stages.count("student"), stages.count("teacher"), stages.count("finetune")) == (10, 2, 10)
    folder = one.add("student", one.base["student"])
    for flags in ({"lr": 3e-3}, {"seed": 1}, {"w_nst": 7.0}, {"teacher": "elsewhere"}):
        assert one.add("student", distill.Config(**QUICK["student"] | flags)) != folder
    same = distill.Config(**QUICK["student"] | {"resume": "true", "device": "auto", "log_every": 2, "out_dir": "x"})
    assert Path(one.add("student", same)).name == Path(one.add("student", distill.Config(**QUICK["student"]))).name


def test_packed_text_of_ones_own_is_part_of_the_key(plan, demo, tmp_path):
    own = tmp_path / "own.h5"
    keys = []
    demo_xtext(demo / "demo-s0", init_ranks("cpu"))
    for source in ("demo-s0/corpus.h5", "demo-s0/corpus.h5", "demo-s0/xcorpus.h5"):
        own.write_bytes((demo / source).read_bytes())
        keys.append(Path(plan(student={"train": str(own)}).student(Row("", student={"objective": "none"}), 0)).name)
    assert keys[0] == keys[1] != keys[2]


def test_longer_adaptations_have_that_many_steps(plan):
    one, table = plan(), TABLES["xdbert-3"]
    steps = {row.name: one.jobs[Path(one.folders(row, 0, "tasks")["adapted"]).name][1].max_steps for row in table.rows}
    assert steps["MLM"] == 2 and steps["2 epochs (2x)"] == 4
    assert steps["20 epochs (20x)"] == steps["larger text, same steps as above"] == 40
    assert [row.name for row in table.rows if row.one_seed] == ["20 epochs (20x)", "larger text, same steps as above"]


def test_second_features_are_made_noisier_or_given(plan, demo):
    one, row = plan(), Row("", second=True)
    noisy = one.jobs[Path(one.teacher(row, 0)).name][1].videos
    assert noisy != one.jobs[Path(one.teacher(Row(""), 0)).name][1].videos and noisy in one.makers
    own = str(demo / "demo-s0" / "videos.h5")
    one = plan(teacher={"videos": own}, second=own)
    assert one.jobs[Path(one.teacher(row, 0)).name][1].videos == own and not one.makers


def test_what_lies_outside_is_part_of_the_key(plan, tmp_path, teacher_run):
    """Task files, and a teacher that is replaced under the same path."""
    keys = []
    for label in ("entailment", "not_entailment"):
        folder = tmp_path / label / "RTE"
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / f"{split}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t{label}\n")
        one = plan(finetune={"tasks": "rte", "data_dir": str(tmp_path / label)})
        keys.append(Path(one.add("finetune", one.base["finetune"])).name)
    with pytest.raises(SystemExit, match="rte|RTE"):
        one = plan(finetune={"tasks": "rte", "data_dir": str(tmp_path / "nowhere")})
        one.add("finetune", one.base["finetune"])
    own = tmp_path / "teacher"
    for seed in range(2):
        shutil.copytree(teacher_run, own)
        if seed:
            path = own / "model" / "vokens.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        plans.model_hash.cache_clear()
        keys.append(Path(plan(student={"teacher": str(own)}).student(Row("", student={"objective": "nst"}), 0)).name)
        shutil.rmtree(own)
    assert len(set(keys)) == 4


def test_shared_flags_reach_the_commands_whatever_the_preset(tmp_path):
    """A flag that beats its preset stays, also where it gives back the default of the script."""
    for script, text in ((ablate.SCRIPTS["student"],
                          "--preset small --batch_size 96 --max_steps 540 --warmup_steps 60 --epochs 0"),
                         (ablate.SCRIPTS["teacher"], "--preset paper --max_steps 300 --warmup_steps 30 --negatives infonce"),
                         (ablate.SCRIPTS["finetune"], "--preset xdbert-base --layer_decay 1 --epochs 0"),
                         (ablate.SCRIPTS["adapt"], "--preset base --train x.h5 --max_steps 400 --epochs 0 --lr 1e-3"),
                         (ablate.SCRIPTS["adapt"], "--train x.h5 --block_size 24 --batch_size 64")):
        cfg = common.parse_cli(script.Config, script.PRESETS, shlex.split(text))
        assert common.parse_cli(script.Config, script.PRESETS, ablate.command(script, cfg)[2:]) == cfg


def test_a_flag_of_one_row_may_be_shared_and_one_of_none_is_told(plan):
    one = plan(student={"soft_tau": 4.0, "w_voken": 2.0})
    for row in TABLES["5"].rows[:2]:
        one.folders(row, 0, "tasks")
    students = {cfg.objective: cfg for stage, cfg in one.jobs.values() if stage == "student"}
    assert students["soft"].soft_tau == 4 and students["none"].soft_tau == 2  # so that text-only is the same run as ever
    assert "--student: --w_voken 2.0" in one.unread() and not [flag for flag in one.unread() if "soft_tau" in flag]


def test_nst_alone_has_a_weight_of_its_own_in_the_demos_tables(plan):
    """And nowhere else: not in a grid, not with other objectives, not where a weight is given to all."""
    def weight(one, row):
        return one.jobs[Path(one.student(row, 0)).name][1].w_nst
    nst, both = (next(row for row in TABLES["5"].rows if row.student["objective"] == name) for name in ("nst", "nst+crd"))
    assert weight(plan(), nst) == 1000 and weight(plan(), both) == 100
    assert weight(plan(student={"w_nst": 7.0}, given={"w_nst"}), nst) == 7
    assert weight(plan(given={"w_nst"}), nst) == 100  # given as the default: it is kept, too
    assert {weight(plan(), row) for row in ablate.grid_of(["objective=nst,nst+crd"]).rows} == {100}


def test_more_fine_tuning_runs_are_added_to_the_first(plan):
    names = [Path(plan(tune_seeds).folders(TABLES["5"].rows[0], 0, "tasks")["tuned"]).name for tune_seeds in (1, 3)]
    assert names[0] == names[1]


def test_alone_row_ignores_what_is_for_clip(plan):
    one = plan(adapt={"freeze": "clip", "segments": 1})
    for row in TABLES["xdbert-1"].rows:
        one.folders(row, 0, "tasks")
    alone = next(cfg for stage, cfg in one.jobs.values() if stage == "adapt" and cfg.no_clip)
    assert (alone.freeze, alone.segments, alone.clip) == ("auto", 2, "")


def test_grid_is_every_combination_of_values():
    table = ablate.grid_of(["w_nst=0,10", "head=mlp,none", "teacher.lr=1e-3,2e-3"])
    assert [row.name for row in table.rows][:3] == [
        "w_nst=0 head=mlp teacher.lr=1e-3", "w_nst=0 head=mlp teacher.lr=2e-3", "w_nst=0 head=none teacher.lr=1e-3"]
    assert len(table.rows) == 8 and table.rows[5].student == {"w_nst": "10", "head": "mlp"}
    assert table.rows[5].teacher == {"lr": "2e-3"} and {row.model for row in table.rows} == {"student"}
    assert {row.model for row in ablate.grid_of(["w_itc=1,3"]).rows} == {"adapted"}  # only one stage has it


def test_grids_run_what_their_rows_are_called(plan, demo):
    """Files and switches too, which tables set by what a row is."""
    one, world = plan(), demo / "demo-s0"
    table = ablate.grid_of([f"train={world / 'corpus.h5'},{world / 'xcorpus.h5'}", "objective=none"])
    demo_xtext(world, init_ranks("cpu"))
    assert [one.jobs[Path(one.student(row, 0)).name][1].train for row in table.rows] == [
        str(world / "corpus.h5"), str(world / "xcorpus.h5")]
    (world.parent / "other.h5").write_bytes((world / "videos.h5").read_bytes())
    table = ablate.grid_of([f"teacher.videos={world / 'videos.h5'},{world.parent / 'other.h5'}"])
    teachers = [one.jobs[Path(one.teacher(row, 0)).name][1].videos for row in table.rows]
    assert teachers == [str(world / "videos.h5"), str(world.parent / "other.h5")]
    for row, alone in zip(ablate.grid_of(["no_clip=false,true"]).rows, (False, True)):
        assert one.jobs[Path(one.adaptation(row, 0)).name][1].no_clip is alone


def test_run_of_other_flags_in_its_folder_is_not_finished(plan):
    one = plan()
    folder = Path(one.student(TABLES["5"].rows[0], 0))
    stage, cfg = one.jobs[folder.name]
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"finished": 1}')
    for lr, there in ((cfg.lr, True), (2 * cfg.lr, False)):
        flags = dataclasses.asdict(dataclasses.replace(cfg, lr=lr, out_dir="elsewhere", device="auto"))
        (folder / "config.json").write_text(json.dumps({"config": flags}))
        assert plans.finished(stage, cfg) is there


def test_job_that_ends_early_is_not_taken_for_done(plan, tmp_path, monkeypatch):
    """As a stage that is asked to stop: it saves and ends with status 0. What it took counts when it goes on."""
    one = plan()
    name = Path(one.student(TABLES["5"].rows[0], 0)).name
    (tmp_path / "ablate" / name).mkdir(parents=True)
    checkpoint = tmp_path / "ablate" / name / "checkpoint.pt"
    checkpoint.write_text("half of it")
    for total in (10.0, 20.0):
        monkeypatch.setattr(ablate, "side_by_side",
                            lambda jobs, needs, workers, logs, seconds: seconds.update({name: 10.0}) or {})
        assert ablate.run_jobs(one, [name], 1) == {name: "did not come to its end"}
        assert checkpoint.exists() and json.loads((tmp_path / "ablate" / "times.json").read_text()) == {name: total}
    shutil.rmtree(checkpoint.parent)  # then it starts anew
    ablate.run_jobs(one, [name], 1)
    assert json.loads((tmp_path / "ablate" / "times.json").read_text()) == {name: 10.0}


def test_runs_of_other_code_are_counted(plan, tmp_path, monkeypatch):
    one = plan()
    monkeypatch.setattr(ablate, "git_state", lambda: {"commit": "b", "dirty": True})
    for row, git in zip(TABLES["5"].rows, ({"commit": "a", "dirty": False}, {"commit": "b", "dirty": True},
                                           {"commit": "b", "dirty": False})):
        folder = Path(one.student(row, 0))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"git": git}))
    left = [name for name in one.jobs if "teacher" in name]
    assert ablate.of_other_code(one, left) == 2
    monkeypatch.setattr(ablate, "git_state", dict)  # no git: nothing can be told
    assert ablate.of_other_code(one, left) == 0


def test_entailment_is_told_by_action(demo, tmp_path, monkeypatch):
    """By hand from the predictions: a model that always answers the same is right in half of each action."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(demo)
    cfg = ablate.finetune.Config(tasks="entailment,mishap", model="none", max_steps=1, warmup_steps=0, seeds=1,
                                 save_models=False,
                                 device="cpu", out_dir=str(tmp_path / "run"))
    ablate.finetune.main(cfg)
    found = ablate.categories_of(cfg)
    assert list(found) == [f"entailment: {action}" for action in ("drop", "soak", "heat", "press", "cut")]
    rows = [line.split("\t") for line in (demo / "demo-s0/raw/tasks/entailment/dev.tsv").read_text().splitlines()[1:]]
    path = tmp_path / "run" / "entailment" / "s0" / "predictions" / "predictions.txt"
    answers = [line.rpartition("\t")[2] for line in path.read_text().splitlines()[-len(rows):]]
    names = {"0": "entailment", "1": "not_entailment"}
    right = [names.get(answer, answer) == row[3] for answer, row in zip(answers, rows) if "dropped" in row[1]]
    assert 0 < len(right) < len(rows) and found["entailment: drop"] == pytest.approx(100 * np.mean(right))


def test_mnli_is_told_by_the_categories_of_glues_diagnostics(tmp_path):
    runs = [{"scores": {"": {"accuracy": 1.0}, "diagnostic": {"Logic, accuracy": x, "Logic, r3": 0.0}}} for x in (40.0, 60.0)]
    (tmp_path / "mnli").mkdir()
    (tmp_path / "mnli" / "results.json").write_text(json.dumps({"runs": [*runs, {}]}))  # one more than asked for
    assert ablate.categories_of(ablate.finetune.Config(tasks="mnli", out_dir=str(tmp_path), seeds=2)) == {"Logic": 50.0}


def test_average_is_without_the_error_of_read_and_collapsed_runs_are_named(tmp_path):
    for task, scores in (("rte", (50.0, 60.0)), ("read", (0.6, 0.7)), ("sst2", (None, 90.0))):
        (tmp_path / task).mkdir()
        runs = [{"score": x, "seed": i, "scores": {"": {}}, "collapsed": "" if x and x > 50 else "one class"}
                for i, x in enumerate(scores)]
        (tmp_path / task / "results.json").write_text(json.dumps({"runs": runs}))
    cfg = ablate.finetune.Config(tasks="rte,read", out_dir=str(tmp_path), seeds=2)
    assert ablate.scores_of(cfg) == {"RTE": 55.0, "READ": pytest.approx(0.65), "average": 55.0}
    assert ablate.collapsed(cfg) == ["RTE s0", "READ s0", "READ s1"]
    assert np.isnan(ablate.scores_of(dataclasses.replace(cfg, tasks="sst2"))["average"])  # NaN in results.json is None


def test_parameters_are_those_of_table_6():
    printed = {row.model: row.paper[0] for row in TABLES["xdbert-6"].rows if "electra-base" not in row.model}
    assert {model: ablate.parameters(model) for model in printed} == printed


# ---------------------------------------------------------------------------- the command


def test_table_runs_and_is_not_run_again(demo, tmp_path, monkeypatch, capsys):
    """Two seeds of a small table, from nothing: everything is written, and the second time nothing is run."""
    monkeypatch.setitem(TABLES, "13", Table("small", ("TRACIE",), TABLES["13"].rows[:2], of=("before/after",), note="a note"))
    asked, worlds = [], tmp_path / "worlds"
    monkeypatch.setattr(ablate, "side_by_side", lambda jobs, *more: asked.append(list(jobs)) or run_here(jobs, *more))
    monkeypatch.setattr(plans, "demo_world", lambda data_dir, seed, ranks: None)
    monkeypatch.chdir(tmp_path)
    worlds.mkdir()
    for seed in range(2):  # one world is enough here
        (worlds / f"demo-s{seed}").symlink_to(demo / "demo-s0")
    argv = ["--table", "13", "--seeds", "2", *quick_flags(worlds), "--csv", "--latex", "--out", str(tmp_path / "ablate")]
    ablate.main(argv)
    out = capsys.readouterr().out
    assert re.search(r"small: 2 rows, 2 seeds, 10 runs; to be made: 10, in about", out) and "a note" in out
    assert len(asked) == 1 and len(asked[0]) == 10
    found = json.loads(next((tmp_path / "ablate").glob("13-*.json")).read_text())  # of own flags: a name of its own
    plain, nst = found["rows"]
    assert nst["columns"]["before/after"]["seeds"].keys() == {"0", "1"} and nst["steps"]["student"] == 4
    assert nst["steps"]["tuned"] == {"mishap": 2, "before_after": 2} and found["seconds_of_its_runs"] == 10
    score = json.loads((next(Path(tmp_path, "ablate").glob("finetune-distill-nst-s1-*")) / "before_after" / "results.json"
                        ).read_text())
    assert nst["columns"]["before/after"]["seeds"]["1"] == score["runs"][0]["score"]
    assert plain["columns"]["before/after"]["difference"] == 0 and nst["failed seeds"] == []
    # two steps teach nothing: every run of both rows, of two tasks and two seeds
    assert "collapsed runs, which the json names: BERT 6L/512H 4, + KD-NST 4" in out and found["notes"][0] == "a note"
    assert nst["collapsed"] == ["mishap s0", "before/after s0", "mishap s1", "before/after s1"]
    assert not list((tmp_path / "ablate").glob("*/*.pt*"))  # checkpoints
    for command in nst["commands"]:
        assert command.startswith(("python teacher.py ", "python distill.py ", "python finetune.py ")) and command in out
    assert {path.suffix for path in Path(tmp_path, "ablate").glob("13-*.*")} == {".json", ".png", ".csv", ".tex"}
    ablate.main(argv)
    assert asked[1:] == [[]] and "to be made: 0" in capsys.readouterr().out
    ablate.main([*argv, "--against", "2"])  # the same runs, seen from the other row
    other = json.loads(next((tmp_path / "ablate").glob("13-*-against-2.json")).read_text())
    assert other["baseline"] == nst["name"] and "paired t test over the seeds against + KD-NST" in capsys.readouterr().out
    assert other["rows"][0]["columns"]["average"]["difference"] == -nst["columns"]["average"]["difference"]


def test_row_that_fails_leaves_the_others(demo, tmp_path, monkeypatch, capsys):
    def fails(jobs, needs, *more):
        failed = run_here({name: argv for name, argv in jobs.items() if "-nst-" not in name}, needs, *more)
        return failed | {name: "out of luck" for name in jobs if "-nst-" in name}
    monkeypatch.setattr(ablate, "side_by_side", fails)
    monkeypatch.chdir(tmp_path)
    argv = ["--table", "13", "--seeds", "1", *quick_flags(demo), "--out", "ablate"]
    with pytest.raises(SystemExit, match="2 runs failed; the table has the others"):
        ablate.main(argv)
    out = capsys.readouterr().out
    monkeypatch.setattr(ablate, "side_by_side", None)
    ablate.main([*argv, "--show"])  # runs nothing
    shown = capsys.readouterr().out
    assert "not finished: 2 of 7 runs" in shown and re.search(r"\+ KD-NST\+CRD +1 +50.0", shown)
    assert re.search(r"failed: distill-nst-s0-\w+: out of luck; all that it said: ablate/logs/distill-nst-s0-\w+.txt", out)
    found = json.loads(next(Path("ablate").glob("13-*.json")).read_text())["rows"]
    assert [bool(row["columns"]) for row in found] == [True, False, True] and found[1]["failed seeds"] == [0]


def test_dry_run_prints_commands_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ablate.main(["--vary", "w_nst=0,10", "--vary", "head=mlp,none", "--seeds", "1", "--dry_run", "--jobs", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("grid of w_nst, head: 4 rows, 1 seeds, 9 runs; to be made: 9, in about ") and (
        lines[0].endswith("3 at once"))
    assert lines[1] == "made first: data/demo-s0" and len(lines) == 19
    rows = [i for i, line in enumerate(lines) if line.endswith(":")]  # each row with what no row above has: 3, 2, 2, 2
    assert [lines[i] for i in rows] == [f"w_nst={w} head={head}:" for w in (0, 10) for head in ("mlp", "none")]
    assert np.diff([*rows, len(lines) + 1]).tolist() == [5, 4, 4, 4]
    assert all(re.match(r" +\S+  python (teacher|distill|finetune).py --", lines[i + 1]) for i in rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, words", [
    (["--table", "10"], "--table 10: choose one of 1, 2, 3"),
    (["--table", "5", "--vary", "lr=1"], "not allowed with"), ([], "give --table, or --vary"),
    (["--tabel", "5"], "unknown --tabel"),
    (["--table", "5", "--seeds", "0"], "--seeds 0: at least 1"), (["--table", "5", "--seeds", "x"], "invalid int"),
    (["--vary", "w_nst"], "write FLAG=VALUE,VALUE"), (["--vary", "w_nst="], "write FLAG=VALUE,VALUE"),
    (["--vary", "wnst=1"], "wnst is a flag of none"), (["--vary", "layer_decay=x"], "--layer_decay x: not a valid float"),
    (["--vary", "cross.lr=1"], "lr is a flag of teacher and student and adapt and finetune"),
    (["--vary", "head=mlp,nine"], "head"), (["--table", "5", "--student", "--lrr 1"], "unknown flag --lrr"),
    (["--table", "3", "--student", "--teacher somewhere"], "leave --teacher somewhere out"),
    (["--vary", "w_nst=1,1"], "gives a value or a flag twice"), (["--vary", "lr=1,2", "--vary", "lr=3,4"], "a flag twice"),
    (["--vary", "seed=0,1"], "--seed is not a flag that rows may differ in"),
    (["--vary", "preset=small,demo"], "--preset is not"),
    (["--vary", "soft_tau=1,2"], "soft_tau=1 and soft_tau=2 are the same run"),
    (["--table", "13", "--against", "4"], "--against 4: the table has 3 rows"),
    (["--table", "5", "--jobs", "-1"], "--jobs -1: at least 0"),
    (["--table", "5", "--student=--seed=3"], "--seed 3 is what ablate.py"),
    (["--table", "5", "--student", "--objective=nst"], "--objective nst is what ablate.py or the rows of the table"),
    (["--table", "5", "--finetune", "--seeds 5"], "--seeds 5 is what ablate.py"),
    (["--table", "1", "--second-videos", "v.h5"], "is for own data, --teacher"),
    (["--table", "xdbert-3", "--larger_text=x.h5"], "is for own data, --adapt"),
    (["--table", "4", "--student", "--init_from somewhere"], "--init_from somewhere is what ablate.py or the rows"),
    (["--table", "xdbert-1", "--adapt", "--w_itc 2 --w_match 2 --mask_rate 0.2 --train own.h5"], "--language FOLDER"),
    (["--table", "5", "--student", "--w_itc 1"], "unknown flag --w_itc"),
    (["--table", "5", "--student", "--train nowhere.h5"], "nowhere.h5")])
def test_mistake_is_one_line(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablate.main(argv)
    assert words in str(end.value) and "\n" not in str(end.value).strip()
    assert not list(tmp_path.iterdir())


def test_own_text_needs_own_clips_and_tasks(demo, tmp_path, monkeypatch):
    """Said before anything is run: what would be made of the demo does not fit."""
    monkeypatch.chdir(tmp_path)
    text, clips = (demo / "demo-s0" / name for name in ("corpus.h5", "videos.h5"))
    (tmp_path / "RTE").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "RTE" / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    for flags, words in (([f"--teacher=--videos={clips}"], "the demo's tasks are in the words of its own world"),
                         (["--finetune=--tasks=rte --data_dir=."], "--videos FILE.* is missing")):
        with pytest.raises(SystemExit, match=words):
            ablate.main(["--table", "13", "--seeds", "1", "--dry_run", f"--student=--train={text}", *flags])


def test_rows_that_lack_a_file_of_ones_own_are_left_out(demo, tmp_path, monkeypatch, capsys):
    """Table 1 and xdbert-3 on packed files of one's own, RTE in place of the demo's tasks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RTE").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "RTE" / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    world = demo / "demo-s0"
    demo_xtext(world, init_ranks("cpu"))
    tune = "--finetune=--tasks=rte --data_dir=."
    ablate.main(["--table", "1", "--seeds", "2", "--dry_run", f"--student=--train={world / 'corpus.h5'}",
                 f"--teacher=--videos={world / 'videos.h5'}", tune])
    out = capsys.readouterr().out
    assert out.count("left out:") == 2 and "give them as --second_videos FILE" in out and "made first" not in out
    assert re.search(r"7 rows, 2 seeds, 20 runs", out)  # a seed: two teachers, four students, four fine-tunings
    ablate.main(["--table", "xdbert-3", "--seeds", "1", "--dry_run", tune, "--adapt",
                 f"--train {world / 'xcorpus.h5'} --language bert-base --clip random --max_steps 5"])
    out = capsys.readouterr().out
    assert out.count("left out:") == 1 and "give it as --larger_text FILE" in out
    assert re.search(r"--preset=base .*--max_steps=100 ", out) and out.count("adapt_xdbert.py") == 8


def test_row_whose_result_cannot_be_read_leaves_the_others(demo, tmp_path, monkeypatch, capsys):
    def damages(jobs, *more):
        failed = run_here(jobs, *more)
        next(Path("ablate").glob("finetune-distill-nst+crd-*/mishap/results.json")).write_text("{")
        return failed
    monkeypatch.setattr(ablate, "side_by_side", damages)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1 runs failed"):
        ablate.main(["--table", "13", "--seeds", "1", *quick_flags(demo), "--out", "ablate"])
    assert re.search(r"failed: finetune-distill-nst\+crd-s0-.*: did not come to its end", capsys.readouterr().out)


def test_table_7_shows_categories_and_the_two_kinds_of_reasoning(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "side_by_side", run_here)
    monkeypatch.chdir(tmp_path)
    flags = [text for text in quick_flags(demo) if not text.startswith("--finetune")]
    ablate.main(["--table", "7", "--seeds", "1", *flags, "--finetune=--max_steps 2 --tasks entailment,two_choices,before_after",
                 "--out", "ablate"])
    assert re.search(r"ours +seeds +entailment: drop .* entailment: cut +two choices +before/after\n", capsys.readouterr().out)


def test_distance_is_the_main_column_of_table_7(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "side_by_side", run_here)
    monkeypatch.chdir(tmp_path)
    ablate.main(["--table", "xdbert-7", "--seeds", "1", *quick_flags(demo), "--out", "ablate"])
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if "ours: distance" in line)
    assert not re.search("average", head) and re.search(r"VL-BERT +- +- +- +- +\| +0.0064 +90.1", out)
    found = json.loads(next(Path("ablate").glob("xdbert-7-*.json")).read_text())["rows"]
    assert 0 < found[1]["columns"]["distance"]["mean"] < 0.1 and found[3]["columns"] == {}


def test_demo_pairs_are_compared_in_table_2(demo, tmp_path, monkeypatch, capsys):
    """Tiny encoder and tower of the demo's words: widths 32; the random row is the encoder against noise."""
    monkeypatch.setattr(ablate, "side_by_side", run_here)
    monkeypatch.chdir(tmp_path)
    ablate.main(["--table", "xdbert-2", "--seeds", "1", *quick_flags(demo)[:3], "--out", "ablate"])
    found = json.loads(next(Path("ablate").glob("xdbert-2-*.json")).read_text())["rows"]
    values = [row["columns"].get("PWCCA", {}).get("mean") for row in found]
    assert values[0] is values[2] is None and all(0.1 < values[i] < 0.5 for i in (1, 3, 4, 5))
    assert "| paper:" in capsys.readouterr().out
