"""Proves what ablate.py runs, counts and prints: rows keyed by their flags, statistics, tables, failures.

Run: python -m pytest -q tests/test_ablate.py
"""
import csv
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import ablate
import common
import distill
from analyses import rows
from analyses.papers import TABLES, Row, Table
from conftest import QUICK_STUDENT, QUICK_TEACHER

QUICK = {"student": QUICK_STUDENT, "teacher": QUICK_TEACHER,
         "adapt": dict(max_steps=2, batch_size=8, eval_blocks=6, device="cpu", cross_layers=1, log_every=1),
         "finetune": dict(tasks="mishap,before_after", max_steps=2, device="cpu")}


@pytest.fixture
def plan(demo, tmp_path):
    """Plan of the demo's quick runs; more flags of a stage as keywords."""
    def make(tune_seeds=1, second="", **more):
        base = {stage: script.Config(**QUICK[stage] | {"data_dir": str(demo)} | more.get(stage, {}))
                for stage, script in ablate.SCRIPTS.items()}
        return ablate.Plan(base, tune_seeds, second, tmp_path / "ablate")
    return make


def quick_flags(demo, **more):
    """The same as ablate.py's flags."""
    return [f"--{stage}=" + shlex.join(f"--{name}={value}" for name, value in (
        QUICK[stage] | {"data_dir": str(demo)} | more.get(stage, {})).items()) for stage in QUICK]


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
    assert rows.compare({0: 1.0}, {0: 2.0}) is None and rows.compare({0: 1.0, 1: 2.0}, {3: 1.0}) is None
    assert rows.compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == 1 and rows.compare({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) == 0


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
    assert re.search(r"\+ KD +71.0 ± 1.0\* +71.5 ± 1.5\*", ours) and "50.0" not in ours
    head, _, plain, kd, own = beside.splitlines()
    assert re.search(r"ours: average +median +difference +p +\| paper: +SST-2 +QNLI +average +difference", head)
    assert re.search(r"plain +51.2 ± 1.3 +51.0 +- +- +\| +88.0 +84.0 +86.0 +-$", plain)
    assert re.search(r"\+ KD +71.5 ± 1.5\* +71.5 +\+20.3 +0.00\d +\| +90.0 +- +- +-$", kd)
    assert re.search(r"ours & own( +-){4} +\|( +-){4}$", own)


def test_csv_and_latex_hold_the_same_numbers():
    found = list(csv.DictReader(io.StringIO(rows.as_csv(ASKED, example_rows()))))
    assert [row["row"] for row in found] == ["plain", "+ KD", "ours & own"]
    assert float(found[1]["average, mean"]) == 71.5 and found[1]["paper: SST-2"] == "90.0" and found[2]["x, p"] == ""
    lines = rows.as_latex(ASKED, example_rows()).splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrr}" and lines[-1] == r"\end{tabular}"
    assert r"+ KD & 71.0 $\pm$ 1.0$^*$ & 71.5 $\pm$ 1.5$^*$ & 90.0 & - \\" in lines
    assert r"ours \& own & - & - & - & - \\" in lines


def test_numbers_are_shown_with_the_digits_that_tell():
    assert [rows.number(x) for x in (109482240, 71.53, 0.0064, 1.0)] == ["109,482,240", "71.5", "0.0064", "1.0000"]
    assert rows.number(-0.04, 71.5, "+") == "-0.0" and rows.number(0.0021, 0.5, "+") == "+0.0021"


# ---------------------------------------------------------------------------- the papers' tables


def test_printed_numbers_give_the_printed_averages_and_differences():
    """Table 1's column Avg. and the differences that Tables 7 and 8 print, with the slips that are known."""
    assert [round(rows.mean_of(row.paper), 1) for row in TABLES["1"].rows] == [78.6, 81.4, 78.9, 81.7, 82.3, 82.4, 82.6]
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
            one.folders(row, 3, tune=table.by != "pwcca")
    for job, needs in one.needs.items():
        assert set(needs) <= set(list(one.jobs)[:list(one.jobs).index(job)])  # an order in which they can run
    for stage, cfg in one.jobs.values():
        script, argv = ablate.SCRIPTS[stage], ablate.command(ablate.SCRIPTS[stage], cfg)[2:]
        assert common.parse_cli(script.Config, script.PRESETS, argv, script.NEEDS) == cfg and cfg.seed == 3
    if name in ("2", "4"):  # at equal tokens and steps
        like = one.base["student"]
        video = next(cfg for stage, cfg in one.jobs.values() if stage == "teacher" and cfg.patience == like.max_steps)
        assert (video.max_steps, video.batch_size, video.block_size) == (like.max_steps, like.batch_size, like.block_size)


def test_tables_share_runs_and_every_flag_is_a_key(plan):
    one = plan()
    for name in ("5", "6"):
        for row in TABLES[name].rows:
            one.folders(row, 0, tune=True)
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
    for source in ("demo-s0/corpus.h5", "demo-s0/corpus.h5", "demo-s0/xcorpus.h5"):
        from parts.machine import init_ranks
        from prepare.world import demo_xtext
        demo_xtext(demo / "demo-s0", init_ranks("cpu"))
        own.write_bytes((demo / source).read_bytes())
        keys.append(Path(plan(student={"train": str(own)}).student(Row("", student={"objective": "none"}), 0)).name)
    assert keys[0] == keys[1] != keys[2]


def test_longer_adaptations_have_that_many_steps(plan):
    one, table = plan(), TABLES["xdbert-3"]
    steps = {row.name: one.jobs[Path(one.folders(row, 0, True)["adapted"]).name][1].max_steps for row in table.rows}
    assert steps["MLM"] == 2 and steps["2 epochs (2x)"] == 4
    assert steps["20 epochs (20x)"] == steps["larger text, same steps as above"] == 40
    assert [row.name for row in table.rows if row.one_seed] == ["20 epochs (20x)", "larger text, same steps as above"]


def test_second_features_are_made_noisier_or_given(plan, demo):
    one, flags = plan(), {"videos": "second"}
    noisy = one.jobs[Path(one.teacher(flags, 0)).name][1].videos
    assert noisy != one.jobs[Path(one.teacher({}, 0)).name][1].videos and noisy in one.files
    own = str(demo / "demo-s0" / "videos.h5")
    with pytest.raises(SystemExit, match="give the features of the second, packed, as --videos2 FILE"):
        plan(teacher={"videos": own}).teacher(flags, 0)
    one = plan(teacher={"videos": own}, second=own)
    assert one.jobs[Path(one.teacher(flags, 0)).name][1].videos == own and not one.files


def test_grid_is_every_combination_of_values():
    table = ablate.grid_of(["w_nst=0,10", "head=mlp,none", "teacher.lr=1e-3,2e-3"], None)
    assert [row.name for row in table.rows][:3] == [
        "w_nst=0 head=mlp teacher.lr=1e-3", "w_nst=0 head=mlp teacher.lr=2e-3", "w_nst=0 head=none teacher.lr=1e-3"]
    assert len(table.rows) == 8 and table.rows[5].student == {"w_nst": "10", "head": "mlp"}
    assert table.rows[5].teacher == {"lr": "2e-3"} and {row.model for row in table.rows} == {"student"}
    assert {row.model for row in ablate.grid_of(["w_itc=1,3"], None).rows} == {"adapted"}  # only one stage has it


def test_entailment_is_told_by_action(demo, tmp_path, monkeypatch):
    """By hand from the predictions: a model that always answers the same is right in half of each action."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(demo)
    cfg = ablate.finetune.Config(tasks="entailment,mishap", model="none", max_steps=1, warmup_steps=0, seeds=1, save_models=False,
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
    (tmp_path / "mnli" / "results.json").write_text(json.dumps({"runs": runs}))
    assert ablate.categories_of(ablate.finetune.Config(tasks="mnli", out_dir=str(tmp_path))) == {"Logic": 50.0}


def test_parameters_are_those_of_table_6():
    printed = {row.model: row.paper[0] for row in TABLES["xdbert-6"].rows if "electra-base" not in row.model}
    assert {model: ablate.parameters(model) for model in printed} == printed


# ---------------------------------------------------------------------------- the command


def test_table_runs_and_is_not_run_again(demo, tmp_path, monkeypatch, capsys):
    """Two seeds of a small table, from nothing: everything is written, and the second time nothing is run."""
    monkeypatch.setitem(TABLES, "13", Table("small", ("TRACIE",), TABLES["13"].rows[:2], of="before/after", note="a note"))
    asked = []
    monkeypatch.setattr(ablate, "side_by_side", lambda jobs, *more: asked.append(list(jobs)) or run_here(jobs, *more))
    monkeypatch.setattr(ablate, "demo_world", lambda data_dir, seed, ranks: None)
    monkeypatch.setattr(ablate.Plan, "world", lambda self, seed: demo / "demo-s0")  # one world is enough here
    monkeypatch.setattr(ablate.finetune, "open_start", lambda model, like="", world=None, flag="", own=ablate.finetune.open_start:
                        own(model, like, demo / "demo-s0", flag))
    monkeypatch.chdir(tmp_path)
    for seed in (1,):
        (demo / f"demo-s{seed}").exists() or (demo / f"demo-s{seed}").symlink_to(demo / "demo-s0")
    argv = ["--table", "13", "--seeds", "2", *quick_flags(demo), "--csv", "--latex", "--out", str(tmp_path / "ablate")]
    ablate.main(argv)
    out = capsys.readouterr().out
    assert re.search(r"small: 2 rows, 2 seeds, 10 runs; to be made: 10, in about", out) and "a note" in out
    assert len(asked) == 1 and len(asked[0]) == 10
    found = json.loads((tmp_path / "ablate" / "table-13.json").read_text())
    plain, nst = found["rows"]
    assert nst["columns"]["before/after"]["seeds"].keys() == {"0", "1"} and nst["steps"]["student"] == 4
    assert nst["steps"]["tuned"] == {"mishap": 2, "before_after": 2} and found["seconds_of_its_runs"] == 10
    score = json.loads((next(Path(tmp_path, "ablate").glob("finetune-distill-nst-s1-*")) / "before_after" / "results.json").read_text())
    assert nst["columns"]["before/after"]["seeds"]["1"] == score["runs"][0]["score"]
    assert plain["columns"]["before/after"]["difference"] == 0 and nst["failed seeds"] == []
    for command in nst["commands"]:
        assert command.startswith(("python teacher.py ", "python distill.py ", "python finetune.py ")) and command in out
    assert {path.suffix for path in Path(tmp_path, "ablate").glob("table-13.*")} == {".json", ".png", ".csv", ".tex"}
    ablate.main(argv)
    assert asked[1:] == [[]] and "to be made: 0" in capsys.readouterr().out


def test_row_that_fails_leaves_the_others(demo, tmp_path, monkeypatch, capsys):
    def fails(jobs, needs, *more):
        failed = run_here({name: argv for name, argv in jobs.items() if "-nst-" not in name}, needs, *more)
        return failed | {name: "out of luck" for name in jobs if "-nst-" in name}
    monkeypatch.setattr(ablate, "side_by_side", fails)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2 runs failed; the table has the others"):
        ablate.main(["--table", "13", "--seeds", "1", *quick_flags(demo), "--out", "ablate"])
    out = capsys.readouterr().out
    assert re.search(r"failed: distill-nst-s0-\w+: out of luck; all that it said: ablate/logs/distill-nst-s0-\w+.txt", out)
    found = json.loads(Path("ablate/table-13.json").read_text())["rows"]
    assert [bool(row["columns"]) for row in found] == [True, False, True] and found[1]["failed seeds"] == [0]


def test_dry_run_prints_commands_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ablate.main(["--vary", "w_nst=0,10", "--vary", "head=mlp,none", "--seeds", "1", "--dry_run", "--jobs", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("grid of w_nst, head: 4 rows, 1 seeds, 9 runs; to be made: 9, in about ") and lines[0].endswith("3 at once")
    assert all(re.match(r" +\S+  python (teacher|distill|finetune).py --", line) for line in lines[1:]) and len(lines) == 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, words", [
    (["--table", "10"], "--table 10: choose one of 1, 2, 3"),
    (["--table", "5", "--vary", "lr=1"], "not allowed with"), ([], "one of the arguments"),
    (["--table", "5", "--seeds", "0"], "--seeds 0: at least 1"), (["--table", "5", "--seeds", "x"], "invalid int"),
    (["--vary", "w_nst"], "write FLAG=VALUE,VALUE"), (["--vary", "w_nst="], "write FLAG=VALUE,VALUE"),
    (["--vary", "wnst=1"], "wnst is a flag of none"), (["--vary", "layer_decay=x"], "--layer_decay x: not a valid float"),
    (["--vary", "cross.lr=1"], "lr is a flag of teacher and student and adapt and finetune"),
    (["--vary", "head=mlp,nine"], "head"), (["--table", "5", "--student", "--lrr 1"], "unknown flag --lrr"),
    (["--table", "3", "--student", "--teacher somewhere"], "leave --teacher somewhere out"),
    (["--table", "xdbert-3", "--adapt", "--train own.h5 --language x --clip y --max_steps 5"], "own.h5"),
    (["--table", "5", "--student", "--train nowhere.h5"], "nowhere.h5")])
def test_mistake_is_one_line(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablate.main(argv)
    assert words in str(end.value) and "\n" not in str(end.value).strip()
    assert not list(tmp_path.iterdir())
