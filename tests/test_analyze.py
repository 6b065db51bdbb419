"""Proves that the closing table shows what was measured, and that the figures are drawn.

Run: python -m pytest -q tests/test_analyze.py
"""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import written

import analyze
from analyses import closing
from prepare import chain
from run import FORMAT


def example(scale):
    share = {"1": 0.1 * scale, "5": 0.2 * scale, "10": 0.3 * scale}
    probe = {"linear": 0.5, "linear_chance": 0.1, "neighbours": 0.4, "neighbours_chance": 0.1}
    return {"mlm_loss": 2.0, "mlm_accuracy": 0.5, "neighbours": 0.7,
            "probes": {"material": probe, "order": probe},
            "retrieval": {"aligned": None, "mean state": share, "ridge": share, "nearest": [0]}}


def test_closing_table_is_aligned_and_shows_chance():
    text = closing.closing_table({"text-only": example(1), "nst+crd": example(2)}, 500)
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.search(r"ridge map +10.0 / 20.0 / 30.0 +20.0 / 40.0 / 60.0 +0.2 / 1.0 / 2.0", text)
    assert "aligned space" in text
    assert re.search(r"order of held-out nouns: linear probe +50.0 +50.0 +10.0", text)
    bare = closing.closing_table({"text-only": {"mlm_loss": 3.0, "mlm_accuracy": 0.1}}, 0)
    assert "3.000" in bare and "text-to-video" not in bare


LOG = [{"step": 0, "gradient_mlm": 1.0, "gradient_nst": 0.1}, {"step": 0, "val_mlm_loss": 6.0},
       {"step": 10, "mlm": 5.0, "nst": 0.1, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 900.0, "memory_mb": 7.0},
       {"step": 20, "mlm": 4.0, "nst": None, "lr": 5e-4, "grad_norm": 0.5, "tokens_per_s": 1100.0, "memory_mb": 7.0}]


def write_run(folder, log=LOG, **results):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, "config": {}}))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_curves_of_runs_are_drawn_and_told(tmp_path, capsys):
    run = write_run(tmp_path / "distill-nst+crd-s0", finished=1.0)
    (run / "table.json").write_text(json.dumps({
        "columns": {"text-only": example(1), "nst+crd": example(2)}, "clips": 500}))
    other = write_run(tmp_path / "s1", [line | {"loss": 2.0} for line in LOG[2:]])  # as of finetune.py: no gradients
    out = tmp_path / "figures" / "curves.png"
    for runs in ([run], [run, other], [other]):
        analyze.main(["curves", *map(str, runs), "--out", str(out)])
        found = written(out)
        assert list(found["runs"]) == [path.name for path in runs]
        out.unlink()
    assert list(found["runs"]["s1"]["terms"]) == ["mlm", "nst"] and found["runs"]["s1"]["unit"] == "tokens"
    assert found["runs"]["s1"]["terms"]["nst"] == [[10, 20], [0.1, None]] and found["runs"]["s1"]["gradients"] == {}
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"last window +to step +mlm +nst +lr +gradient norm +tokens/s", "\n".join(lines))
    assert re.search(r"distill-nst\+crd-s0 +20 +4.0000 +nan +5.0e-04 +0.500 +1,000", "\n".join(lines))


def test_short_names_tell_paths_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = Path("out/finetune/bert/rte/s1")
    for folder in (tuned / "model", Path("out/nst/model"), Path("more/nst/model")):
        folder.mkdir(parents=True)
    Path("clip.pt").touch()
    assert closing.short_names([tuned, "out/nst/", "out/nst", "clip.pt", "."]) == [
        "bert-rte-s1", "nst", "nst", "clip", tmp_path.name]
    assert closing.short_names(["out/nst", "more/nst", "out/nst/model", str(tuned / "model")]) == [
        "out/nst", "more/nst", "out/nst/model", "bert-rte-s1"]


def test_curves_of_what_is_no_run_are_one_line(tmp_path):
    empty = write_run(tmp_path / "short", LOG[:2])
    foreign = write_run(tmp_path / "foreign")
    (foreign / "log.jsonl").write_text("[1]\n")
    for run, words in ((tmp_path / "nowhere", "No such file.*give the folder of a finished run"),
                       (empty, "log.jsonl: too few steps to draw"), (foreign, "log.jsonl: is no log of a run")):
        with pytest.raises(SystemExit, match=words):
            analyze.main(["curves", str(run), "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match="x.pdf: is written as PNG"):
        analyze.main(["curves", str(write_run(tmp_path / "run")), "--out", str(tmp_path / "x.pdf")])
    assert not list(tmp_path.glob("x.*"))


def test_difference_counts_above_twice_the_pooled_deviation_of_the_seeds():
    """By hand: deviations 1 and 2, pooled sqrt((1 + 4) / 2) = 1.58."""
    assert closing.differs([1, 2, 3], [4.2, 6.2, 8.2]) and closing.differs([4.2, 6.2, 8.2], [1, 2, 3])
    assert not closing.differs([1, 2, 3], [3.1, 5.1, 7.1]) and not closing.differs([1, 2, 3], [1, 2, 3])
    assert not closing.differs([1], [50]) and not closing.differs([1, 2], [50])


def test_newest_run_is_a_distillation_where_there_is_one(tmp_path, capsys):
    for name, finished, objective in (("a", 1.0, "none"), ("b", 2.0, "nst"), ("c", 3.0, "crd"), ("d", 9.0, "none")):
        run = write_run(tmp_path / f"distill-{name}", finished=finished, objective=objective)
        (run / "table.json").write_text("{}")
    (write_run(tmp_path / "distill-damaged", finished=99.0) / "results.json").write_text("{")
    assert closing.newest_run(tmp_path) == tmp_path / "distill-c" and "distill-c" in capsys.readouterr().out
    for name in "bc":
        (tmp_path / f"distill-{name}" / "table.json").unlink()
    assert closing.newest_run(tmp_path) == tmp_path / "distill-d"


def test_table_has_the_columns_of_every_run(tmp_path, monkeypatch, capsys):
    probe = {"material": {"linear": 0.5, "neighbours": 0.25}}
    found = {"a": {"mlm_loss": 1.0, "mlm_accuracy": 0.5, "retrieval": {"ridge": {"10": 0.75}}, "probes": None},
             "b": {"mlm_loss": 2.0, "mlm_accuracy": 0.25, "probes": probe}}
    monkeypatch.setattr(closing, "open_judge", lambda run, device: None)
    monkeypatch.setattr(closing, "measure", lambda run, judge, device: found[run[-1]])
    analyze.main(["table", "x/a", "x/b"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["a", "1.000", "50.0", "75.0", "-"], ["b", "2.000", "25.0", "-", "50.0", "/", "25.0"]]


def test_dashes_and_underscores_in_flags_are_equal():
    assert analyze.parse(["grounded", "a", "b", "--min-count", "5", "--data-dir=x_y"]) == analyze.parse(
        ["grounded", "a", "b", "--min_count", "5", "--data_dir=x_y"])


def test_table_of_seeds_has_means_deviations_and_stars():
    rows = {"before": {"material": [10.0], "order": [50.0]},
            "text": {"material": [9.0, 10.0, 11.0], "order": [50.0, 60.0, 40.0]},
            "itc": {"material": [70.0, 72.0, 74.0], "order": [60.0, 80.0, 70.0]}}
    text = closing.seeds_table("probe", rows, "text", [10, 50])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == ["probe", "material", "order"]
    assert [line.split() for line in lines[2:]] == [
        ["before", "10.0", "50.0"], ["text", "10.0", "±", "1.0", "50.0", "±10.0"],
        ["itc", "72.0", "±", "2.0*", "70.0", "±10.0"], ["chance", "10.0", "50.0"]]


def test_tasks_table_has_medians_of_both_sets_and_chance():
    tasks = [SimpleNamespace(name="mishap", title="mishap", words=("a", "b")),
             SimpleNamespace(name="four", title="four endings", words=tuple("abcd"))]

    def runs(*pairs):
        return [{"scores": {"": {"accuracy": held}, "seen": {"accuracy": seen}}} for held, seen in pairs]
    text = closing.tasks_table({"distilled": {"mishap": runs((50, 90), (70, 80), (60, 100)),
                                              "four": runs((30, 40), (20, 60), (40, 50))}}, tasks)
    head, _, row, chance = text.splitlines()
    assert head.startswith("median of 3: held-out / seen") and head.endswith("average")
    assert re.search(r"^distilled +60.0 / 90.0 +30.0 / 50.0 +45.0 / 70.0$", row)
    assert re.search(r"^chance +50.0 +25.0 +37.5$", chance)


def test_commands_without_folders_look_at_the_demos_models(monkeypatch):
    """What each gets where it was given nothing; the models themselves are made by the stages."""
    monkeypatch.setattr(analyze, "any_distillation", lambda: "newest")
    monkeypatch.setattr(analyze, "demo_adaptations", lambda n=2: ["with", "without"][:n])
    monkeypatch.setattr(analyze, "demo_fine_tuned", lambda: ["distilled", "text-only"])

    def filled(*argv):
        function, flags = analyze.parse(argv)
        analyze.fill_in(function, flags)
        return flags
    for command in ("retrieval", "tokens", "neurons", "page"):
        assert filled(command)["run"] == "newest" and filled(command, "own")["run"] == "own"
    assert filled("curves")["runs"] == ["newest"] and filled("curves", "a", "b")["runs"] == ["a", "b"]
    assert filled("attention")["runs"] == ["with", "without"] and filled("attention", "own")["runs"] == ["own"]
    assert [filled("examples")[name] for name in ("a", "b", "run")] == ["distilled", "text-only", "newest"]
    assert [filled("grounded")[name] for name in "ab"] == ["text-only", "distilled"]
    assert filled("pwcca")["models"] == ["out/distill-none-s0", "with", "out/teacher-clip-s0"]
    assert [filled("drift")[name] for name in ("original", "adapted")] == ["out/distill-none-s0", ["with", "without"]]
    assert filled("drift", "a", "b")["adapted"] == ["b"]
    for argv, words in ((("examples", "a"), "a: is compared with nothing; give a second folder"),
                        (("drift", "a"), "a: is compared with nothing; give an adapted model")):
        with pytest.raises(SystemExit, match=words):
            filled(*argv)


def test_demos_models_are_made_by_the_stages(monkeypatch, tmp_path):
    """The Configs that the chain is asked to run; a distillation that is there is taken as it is."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def stage(cfg):
        asked.append(cfg)
        return {"folder": f"out/{getattr(cfg, 'objective', '')}"}
    for name in ("distill", "adapt_xdbert", "finetune"):
        monkeypatch.setattr(chain, name, stage)
    monkeypatch.setattr(chain, "newest_run", lambda: "newest")
    assert chain.any_distillation() == "newest" and [cfg.objective for cfg in asked] == ["nst+crd"]
    run = tmp_path / "out" / "distill-x"
    run.mkdir(parents=True)
    (run / "table.json").write_text("{}")
    assert chain.any_distillation() == "newest" and len(asked) == 1
    assert chain.demo_adaptations() == ["out/mlm+match+cliptc", "out/mlm+match"]
    assert [(cfg.objective, cfg.table, cfg.resume) for cfg in asked[1:]] == [
        ("mlm+match+cliptc", False, "auto"), ("mlm+match", False, "auto")]
    assert chain.demo_fine_tuned() == ["out/finetune/nst+crd", "out/finetune/distill-none-s0"]
    assert [cfg.model for cfg in asked[4:]] == ["out/nst+crd", "out/distill-none-s0"]
