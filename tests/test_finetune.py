"""Proves fine-tuning whole: every head learns on every encoder, runs resume and are reused, results, tables,
predictions and submissions are what they say, and a mistake is one clear line.

Run: python -m pytest -q tests/test_finetune.py
"""
import contextlib
import functools
import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (QUICK_STUDENT, QUICK_TEACHER, QUICK_TUNING, stop_at, tiny_tower, tuning_config,
                      widened, write_table)
from safetensors.torch import load_file, save_file
from test_ddp import log_lines
from test_scripts import refused

import common
import distill
import finetune
import run as run_room
import teacher
from model import BERT, XDBERT, BERTConfig, CLIPText, VideoEncoder
from parts.examples import decide, load_examples
from parts.machine import Ranks
from parts.tasks import DEMO_TASKS, DIAGNOSTIC, TASKS, find_file, measure, write_predictions
from parts.vocab import CLIPVocab, load_clip_vocab, load_vocab
from parts.weights import (load_bert, load_clip, load_clip_config, load_config, load_task_model, load_xdbert,
                           save_bert, save_clip, save_video_encoder)
from prepare import chain

ONE = Ranks(0, 1, torch.device("cpu"))
SHORT = dict(max_steps=8, log_every=2, save_every=2)
# with BERT every kind of task, in no order of the papers; with the others each kind once, beside those that
# have two sets or an odd form
LEARNED = {"bert": "read,tracie,piqa,squad2,swag,sst2,mnli,stsb,rte,squad1", "electra": "stsb,piqa,squad2",
           "clip": "mnli,read,piqa", "cross": "stsb,swag,sst2"}


@pytest.fixture(scope="module")
def learn(request):
    """Function encoder -> ({task: its summary}, what was printed) of one command that learns its tasks."""
    @functools.cache
    def learn(encoder):
        folder = request.getfixturevalue("tmp_path_factory").mktemp(f"trained_{encoder}")
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.chdir(folder)
            flags = dict(max_steps=60) if encoder == "cross" else {}
            summaries = finetune.main(tuning_config(request, LEARNED[encoder], encoder, **flags,
                                                    out_dir=str(folder / "runs")))
        return {summary["task"]: summary for summary in summaries}, printed.getvalue()
    return learn


@pytest.fixture(scope="module")
def trained(learn):
    """Function (task, encoder) -> the results of its run."""
    return lambda task, encoder="bert": only([learn(encoder)[0][task]])


@pytest.fixture
def tune(finetune_config):
    """Function (task, encoder, flags) -> the results of its only run."""
    return lambda *args, **flags: only(finetune.main(finetune_config(*args, **flags)))


def only(summaries):
    """The results of the only run of the only task."""
    (summary,) = summaries
    (run,) = summary["runs"]
    return run


def spy(monkeypatch, name, what):
    """Notes what(arguments) of each call of finetune.<name>."""
    seen, function = [], getattr(finetune, name)

    def noted(*args, **kw):
        seen.append(what(*args, **kw))
        return function(*args, **kw)
    monkeypatch.setattr(finetune, name, noted)
    return seen


@contextlib.contextmanager
def nothing_is_trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.Objective, "forward", None)
        yield


def weights(run):
    return Path(run["folder"], "model", "model.safetensors").read_bytes()


def tensors(run):
    return load_file(Path(run["folder"], "model", "model.safetensors"))


def outcome(run):
    """What a run computed, without its place and time."""
    return {k: v for k, v in run.items() if k not in ("folder", "seconds", "examples_per_s", "finished")}


def curve(run):
    """The lines of a run's log, without speed and memory."""
    return [{k: v for k, v in line.items() if k not in ("memory_mb", "examples_per_s", "mfu")}
            for line in log_lines(Path(run["folder"]))]


def column(path, name):
    """A column of a .tsv file with names in its first line."""
    header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [row[header.index(name)] for row in rows]


def learned(run):
    """Every metric of every set is perfect, as far as it can be."""
    for found in run["scores"].values():
        for metric, value in found.items():
            if metric == "rmse":
                assert value < 0.3, found
            elif metric in ("pearson", "spearman"):  # the ranks of equal labels are ties, those of scores not
                assert value > (99 if metric == "pearson" else 95), found
            elif "thresh" not in metric and "total" not in metric:
                assert value == pytest.approx(100), (metric, found)
    assert run["collapsed"] == ""


def evaluated(run, tiny_tasks):
    """(model, the task's dev set) of a run's own folder."""
    folder, task = Path(run["folder"], "model"), TASKS[run["task"]]
    model, settings = load_task_model(folder)
    beside = finetune.config_and_vocab(folder / "clip") if isinstance(model.encoder, XDBERT) else ()
    return model, load_examples(task, find_file(task, tiny_tasks, task.evals[""]),
                                finetune.config_and_vocab(folder)[1], settings["max_length"], "", "dev",
                                beside=beside)


# ---------------------------------------------------------------------------- learning


@pytest.mark.parametrize("encoder, task", [(encoder, task) for encoder, tasks in LEARNED.items()
                                           for task in sorted(tasks.split(","))])
def test_head_learns_its_task(learn, trained, tiny_tasks, encoder, task):
    """On BERT, ELECTRA, CLIP's text tower, and X-BERT, in which the sentences fill segments of both kinds."""
    run = trained(task, encoder)
    learned(run)
    assert run["score"] == run["scores"][""][TASKS[task].metrics[0]]
    first, *_, last = curve(run)
    assert last["loss"] < first["loss"] / 4
    model, examples = evaluated(run, tiny_tasks)
    assert run["model"] == {"bert": "tiny", "cross": "tiny-cross"}.get(encoder, f"tiny_{encoder}")
    assert type(model.encoder) is {"clip": CLIPText, "cross": XDBERT}.get(encoder, BERT)
    if (encoder, task) == ("cross", "sst2"):  # sentences of one segment, of two, and some that are cut
        second = examples.clip[2][:, 1] >= 0
        assert second.any() and not second.all() and examples.clip_truncated == 5
        assert re.search(r"SST-2: .*, \d+ cut to twice 9 of CLIP's tokens a sentence\n", learn("cross")[1])


@pytest.mark.parametrize("encoder, task", [("bert", "sst2"), ("bert", "swag"), ("clip", "rte"),
                                           ("cross", "rte")])
def test_mean_pooling_learns(tune, encoder, task):
    run = tune(task, encoder, pool="mean")
    learned(run)
    model, _ = load_task_model(Path(run["folder"], "model"))
    assert model.pool == "mean" and not any("pooler" in name for name in model.state_dict())


@pytest.mark.parametrize("task", ["rte", "stsb", "squad2"])
def test_bfloat16_learns(tune, trained, task):
    run = tune(task, dtype="bfloat16")
    learned(run)
    mine, exact = (curve(run)[0]["loss"] for run in (run, trained(task)))
    assert mine != exact and mine == pytest.approx(exact, rel=0.1)


@pytest.fixture
def changes(request, tune):
    """Function (task, encoder, flags) -> (tensors of the encoder that five steps began with and ended with,
    tensors of the head)."""
    def changes(task, encoder, **flags):
        start = Path(flags.get("model") or request.getfixturevalue(f"tiny_{encoder}"))
        load = {"bert": load_bert, "clip": load_clip, "cross": load_xdbert}[encoder]
        before = load(start / "model" if encoder == "cross" else start)
        model, _ = load_task_model(Path(tune(task, encoder, **flags, max_steps=5)["folder"], "model"))
        return before.state_dict(), model.encoder.state_dict(), model.classifier.state_dict()
    return changes


@pytest.mark.parametrize("encoder, pool, trains", [
    ("bert", "cls", {"pooler.weight", "pooler.bias"}), ("bert", "mean", set()), ("clip", "cls", set()),
    ("cross", "cls", {"pooler.weight", "pooler.bias"})])
def test_frozen_encoder_is_bit_equal_to_the_start(changes, encoder, pool, trains):
    before, after, head = changes("rte", encoder, freeze=True, pool=pool)
    assert len(before) > 15 and after.keys() - before.keys() == trains
    assert all(torch.equal(before[name], after[name]) for name in before)
    for bias in (head["bias"], *(after[name] for name in trains if name.endswith("bias"))):
        assert bias.abs().max() > 0  # they start at 0
    assert head["bias"].abs().min() > 0


def test_layer_decay_moves_the_lower_layers_less(changes, tiny_bert):
    vocab = load_vocab(tiny_bert)
    save_bert(BERT(BERTConfig(vocab.size, layers=2, hidden=32, heads=2, intermediate=64)), "two", vocab)
    before, after, head = changes("sst2", "bert", model="two", layer_decay=0.01)
    embeddings, lower, upper = ((after[name] - before[name]).abs().max() for name in (
        # these start at 0, where small steps are not rounded away
        "embeddings.norm.bias", "layers.0.output_norm.bias", "layers.1.output_norm.bias"))
    assert 0 < embeddings < lower / 10 and lower < upper / 10
    assert upper < 0.1 * QUICK_TUNING["lr"] < head["bias"].abs().max()


def test_layer_decay_spares_the_cross_modal_layers(changes):
    before, after, _ = changes("rte", "cross", layer_decay=0.01)
    moved = {name: (after[name] - x).abs().max() for name, x in before.items()}
    for side, norm in (("language", "embeddings.norm.bias"), ("clip", "embeddings.position.weight")):
        embeddings, layer = moved[f"{side}.{norm}"], moved[f"{side}.layers.0.output_norm.bias"]
        assert 0 < embeddings < layer / 10 and layer < moved["cross.text.0.layer.output_norm.bias"] / 10
    for name in ("cross.text.0.cross_norm.bias", "cross.text.1.layer.output_norm.bias",
                 "cross.clip.0.layer.output_norm.bias"):
        assert moved[name] > 0.1 * QUICK_TUNING["lr"]
    # what the text stream never reads stays
    assert moved["clip.logit_scale"] == moved["cross.clip.1.layer.output_norm.bias"] == 0


def test_limit_draws_so_many_examples_anew_for_each_seed(finetune_config, monkeypatch):
    seen = spy(monkeypatch, "fine_tune", lambda cfg, task, start, train, *_: train.ids)
    first, second = finetune.main(finetune_config("rte", limit=7, seeds=2, max_steps=2))[0]["runs"]
    assert first["examples"] == second["examples"] == 7
    assert [len(set(ids)) for ids in seen] == [7, 7] and set(seen[0]) != set(seen[1])
    finetune.main(finetune_config("rte", limit=7, seed=1, max_steps=2))
    assert seen[2] == seen[1]


def test_steps_are_epochs_and_the_rate_rises_and_falls(tune):
    run = tune("rte", max_steps=0, epochs=2.5, warmup_steps=0.25, log_every=1, lr=1e-3)
    assert run["steps"] == 10 == math.ceil(2.5 * 64 / 16)
    rates = [line["lr"] for line in curve(run)]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * (10 - step) / 8 for step in range(2, 10))])


@pytest.mark.parametrize("encoder, task", [("bert", "mnli"), ("bert", "stsb"), ("bert", "swag"),
                                           ("bert", "squad2"), ("clip", "swag"), ("cross", "swag")])
def test_accumulation_takes_the_same_steps(tune, encoder, task):
    flags = dict(dropout=0.0, max_steps=3, log_every=1, save_every=1, lr=1e-3, save_models=False)
    one, four = (curve(tune(task, encoder, **flags, grad_accum=parts, out_dir=str(parts)))
                 for parts in (1, 4))
    assert len(one) == len(four) == 3
    for a, b in zip(one, four):
        assert [a[k] for k in ("loss", "grad_norm")] == pytest.approx([b[k] for k in ("loss", "grad_norm")],
                                                                      rel=1e-4)


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("encoder, task", [
    ("bert", "mnli"), ("bert", "stsb"), ("bert", "swag"), ("bert", "squad2"), ("clip", "mnli"),
    ("clip", "piqa"), ("cross", "sst2"), ("cross", "swag")])
def test_evaluation_equals_one_example_at_a_time(trained, tiny_tasks, encoder, task, monkeypatch):
    """In batches, in the file's order; what is loaded from the run's folder predicts what its results say."""
    run, close = trained(task, encoder), functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    model, examples = evaluated(run, tiny_tasks)
    model.train()
    whole = finetune.evaluate(model, examples, torch.float32, ONE)
    assert model.training
    model.eval()
    for i, row in enumerate(whole):
        alone = model(**finetune.inputs(examples.batch([i]))).detach()[0]
        if task == "squad2":
            assert (row[len(alone):] == -math.inf).all()
            row = row[:len(alone)]
        close(row, alone)
    monkeypatch.setattr("parts.examples.EVAL_TOKENS", 100)  # other batches
    close(finetune.evaluate(model, examples, torch.float32, ONE), whole)
    scores, _ = measure(TASKS[task], examples, decide(TASKS[task], examples, whole))
    assert scores == pytest.approx(run["scores"][""])


def test_span_loss_is_the_mean_of_start_and_end_over_real_tokens(trained, tiny_tasks):
    model, examples = evaluated(trained("squad2"), tiny_tasks)
    batch = examples.batch(np.arange(6))
    loss = finetune.Objective(model)(batch, {"loss": 6})["loss"]
    expected = 0.0
    for i in range(6):
        n = batch["mask"][i].sum()
        alone = model(batch["ids"][i:i + 1, :n], None, batch["segments"][i:i + 1, :n])[0]
        for end in (0, 1):
            expected -= alone[:, end].log_softmax(0)[batch["labels"][i, end]] / 12
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder, task", [("bert", "squad2"), ("clip", "stsb"), ("cross", "piqa")])
def test_eval_only_measures_again_and_changes_nothing_else(finetune_config, encoder, task):
    cfg = finetune_config(task, encoder, max_steps=5)
    run = only(finetune.main(cfg))
    before = {p: p.read_bytes() for p in Path(run["folder"]).rglob("*") if p.is_file()}
    shutil.rmtree(Path(run["folder"], "predictions"))
    with nothing_is_trained():
        assert only(finetune.main(replace(cfg, eval_only=True))) == run
    assert {p: p.read_bytes() for p in Path(run["folder"]).rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("labels", [("entailment", "neutral", "contradiction"),
                                    ("entailment", "not_entailment", "not_entailment")])
def test_diagnostics_are_scored_by_category(trained, tune, tiny_tasks, labels):
    """With three-way labels, and with two-way ones, where neutral and contradiction are one."""
    three = ["entailment", "neutral", "contradiction"]
    shutil.copytree(tiny_tasks / "glue" / "MNLI", "data/MNLI")
    source = tiny_tasks / "glue" / "diagnostic" / "diagnostic-full.tsv"
    header, *rows = [line.split("\t") for line in source.read_text().splitlines()]
    rows = [[*row[:-1], labels[three.index(row[-1])]] for row in rows]
    rows[0][-2] = "the cat not ran"  # the model will be wrong here
    write_table(Path("data/diagnostic/diagnostic-full.tsv"), header, *rows)
    shutil.copytree(trained("mnli")["folder"], "runs/mnli/s0")
    found = tune("mnli", data_dir="data", eval_only=True, out_dir="runs")["scores"]["diagnostic"]
    assert len(found) == 8
    for i, name in enumerate(DIAGNOSTIC):
        tagged = [row for row in rows if row[i]]
        wrong = rows[0] in tagged
        assert found[f"{name}, accuracy"] == pytest.approx(100 * (1 - wrong / len(tagged)))
        assert (found[f"{name}, r3"] == pytest.approx(100)) != wrong


def test_tracie_is_scored_by_comparator(trained, tiny_tasks):
    _, examples = evaluated(trained("tracie"), tiny_tasks)
    predictions = examples.labels.copy()
    ends = np.array(["ends" in row for row in examples.extra["comparator"]])
    predictions[np.flatnonzero(ends)[:2]] ^= 1
    scores, _ = measure(TASKS["tracie"], examples, predictions)
    assert scores == pytest.approx({"accuracy": 100 * 19 / 21, "accuracy of starts": 100,
                                    "accuracy of ends": 100 * (1 - 2 / ends.sum())})
    assert trained("tracie")["scores"][""].keys() == scores.keys()


# ---------------------------------------------------------------------------- resume and reuse


@pytest.mark.parametrize("flags", [
    dict(tasks="sst2", seeds=2), dict(tasks="stsb", dtype="float16", grad_accum=2),
    dict(tasks="squad2", dtype="bfloat16", limit=20), dict(tasks="swag", pool="mean"),
    dict(tasks="mnli", freeze=True, layer_decay=0.5), dict(tasks="rte", encoder="cross", dtype="bfloat16"),
    dict(tasks="piqa", encoder="clip", layer_decay=0.5)], ids=lambda flags: flags["tasks"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(finetune_config, monkeypatch, flags, capsys):
    whole, parts = (finetune_config(**flags, **SHORT, out_dir=name) for name in ("whole", "parts"))
    (expected,) = finetune.main(whole)
    finished = len(expected["runs"]) - 1
    with monkeypatch.context() as patch:
        stop_at(patch, 9 * finished + 5)  # in the last run, in the middle of a window of the log
        with pytest.raises(SystemExit) as stop:
            finetune.main(parts)
    folder = Path("parts", flags["tasks"], f"s{finished}")
    assert stop.value.code == 0 and not (folder / "results.json").exists()
    assert f"saved step 5 in {folder}; go on with the same command" in capsys.readouterr().out
    (found,) = finetune.main(parts)
    assert f"{folder}: goes on from step 5" in capsys.readouterr().out
    assert not list(folder.parent.glob("s*.1")) and not list(folder.parent.rglob("checkpoint*"))
    assert len(found["runs"]) == len(expected["runs"])
    for a, b in zip(expected["runs"], found["runs"]):
        assert outcome(a) == outcome(b) and weights(a) == weights(b)
        for path in Path(a["folder"], "predictions").iterdir():
            assert path.read_bytes() == Path(b["folder"], "predictions", path.name).read_bytes()
        for one, two in zip(curve(a), curve(b)):
            if two["step"] == 6 and b is found["runs"][-1]:  # its line is on what came after the interruption
                assert 0.6 < two.pop("loss") / one.pop("loss") < 1.6
            assert one == two
        assert len(curve(a)) == len(curve(b)) == 4


def test_killed_run_goes_on_also_where_the_newest_checkpoint_is_damaged(finetune_config, monkeypatch, capsys):
    cfg = finetune_config("sst2", **SHORT)
    whole = only(finetune.main(replace(cfg, out_dir="whole")))
    save = run_room.save_checkpoint

    def killed(folder, state, ranks):
        save(folder, state, ranks)
        if state["step"] == 4:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_room, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune.main(cfg)
    folder = Path("out/finetune/tiny/sst2/s0")
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with (folder / "log.jsonl").open("a") as f:
        f.write('{"step": 6, "lo')
    run = only(finetune.main(cfg))
    out = capsys.readouterr().out
    assert "is damaged" in out and f"{folder}: goes on from step 2" in out
    path.write_bytes(b"of a process that was killed before it removed them")
    assert only(finetune.main(cfg)) == run and not path.exists()
    assert weights(run) == weights(whole) and outcome(run) == outcome(whole) and curve(run) == curve(whole)


def test_run_without_a_readable_checkpoint_starts_anew(finetune_config, monkeypatch, capsys):
    cfg = finetune_config("sst2", **SHORT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 1)
        finetune.main(cfg)
    path = Path("out/finetune/tiny/sst2/s0/checkpoint.pt")
    path.write_bytes(b"PK")
    refused("no readable checkpoint in .*--resume false", lambda: finetune.main(replace(cfg, resume="true")))
    path.write_bytes(b"PK")
    assert only(finetune.main(cfg))["steps"] == SHORT["max_steps"]
    assert "so the run starts anew" in capsys.readouterr().out


def test_max_minutes_saves_and_the_same_command_goes_on(finetune_config, capsys, monkeypatch):
    """The runs of a command share them."""
    cfg = finetune_config("sst2", **SHORT)
    with pytest.raises(SystemExit) as stop:
        finetune.main(replace(cfg, max_minutes=1e-9))
    assert stop.value.code == 0 and "--max_minutes: saved step 0 in out" in capsys.readouterr().out
    minutes = spy(monkeypatch, "fine_tune", lambda cfg, *_: cfg.max_minutes)
    finetune.main(replace(cfg, max_minutes=9.0, seeds=2))
    assert "goes on from step 0" in capsys.readouterr().out and 8 < minutes[1] < minutes[0] < 9


def test_finished_run_is_reused_and_run_anew_when_asked(finetune_config, tiny_bert, capsys):
    cfg = finetune_config("sst2", **SHORT)
    run = only(finetune.main(cfg))
    bert = shutil.copytree(tiny_bert, "copy")  # the same weights by another path, and settings that are free
    with nothing_is_trained():
        for again in (cfg, replace(cfg, log_every=4, save_every=4), replace(cfg, max_minutes=9.0),
                      replace(cfg, model=f"{tiny_bert}/"),
                      replace(cfg, model=str(bert), out_dir="out/finetune/tiny")):
            capsys.readouterr()
            assert only(finetune.main(again)) == run and f"reused {run['folder']}" in capsys.readouterr().out
    old = weights(run)
    anew = only(finetune.main(replace(cfg, resume="false")))
    assert weights(anew) == old == Path(run["folder"] + ".1", "model", "model.safetensors").read_bytes()
    assert anew["finished"] > run["finished"]
    other = only(finetune.main(replace(cfg, lr=1e-4)))
    assert weights(other) != old and Path(run["folder"] + ".2").exists()


def test_changed_dev_set_is_evaluated_and_changed_data_or_model_trained_anew(finetune_config, tiny_tasks,
                                                                             tiny_bert):
    def append(split):
        with open(f"glue_data/RTE/{split}.tsv", "a") as f:
            f.write("99\tthe cat ran\tyes the cat ran\tentailment\n")
    bert = shutil.copytree(tiny_bert, "copy")
    cfg = finetune_config("rte", data_dir=".", model=str(bert), out_dir="runs", **SHORT)
    shutil.copytree(tiny_tasks / "glue" / "RTE", "glue_data/RTE")
    first = only(finetune.main(cfg))
    append("dev")
    with nothing_is_trained():
        second = only(finetune.main(cfg))
    assert second["finished"] == first["finished"]
    assert len(Path("runs/rte/s0/predictions/RTE.tsv").read_text().splitlines()) == 1 + 22
    assert round(22 * second["score"], 6) % 100 == 0 and second["score"] != first["score"]
    assert only(finetune.main(cfg)) == second == json.loads(Path("runs/rte/s0/results.json").read_text())
    append("train")
    third = only(finetune.main(cfg))
    assert third["finished"] > second["finished"] and third["examples"] == 65
    torch.manual_seed(9)
    save_bert(BERT(load_bert(bert).config), bert, load_vocab(bert))
    fourth = only(finetune.main(cfg))
    assert fourth["finished"] > third["finished"] and Path("runs/rte/s0.2").exists()


def test_more_seeds_later_run_only_those_that_are_missing(finetune_config, monkeypatch):
    cfg = finetune_config("sst2", **SHORT)
    first = only(finetune.main(cfg))
    seeds = spy(monkeypatch, "Order", lambda lengths, batch_size, max_steps, seed: seed)
    (summary,) = finetune.main(replace(cfg, seeds=3))
    assert seeds == [1, 2] and summary["runs"][0] == first
    assert len({weights(run) for run in summary["runs"]}) == 3
    assert json.loads(Path("out/finetune/tiny/sst2/results.json").read_text()) == summary
    assert [run["seed"] for run in summary["runs"]] == [0, 1, 2]
    (later,) = finetune.main(replace(cfg, seeds=2, seed=2))
    assert seeds == [1, 2, 3] and [run["seed"] for run in later["runs"]] == [2, 3]


def test_run_leaves_what_it_was_and_no_checkpoint(learn):
    for task, summary in learn("bert")[0].items():
        run = only([summary])
        folder = Path(run["folder"])
        assert folder.name == "s0" and folder.parent.name == task
        assert json.loads((folder / "results.json").read_text()) == run
        assert json.loads((folder.parent / "results.json").read_text()) == summary
        settings = json.loads((folder / "config.json").read_text())
        assert settings["config"]["tasks"] == task and settings["config"]["seed"] == 0
        assert {p.name for p in folder.iterdir()} == {
            "config.json", "log.jsonl", "model", "predictions", "results.json",
            *(["submission"] if TASKS[task].tests else [])}


def test_run_without_a_saved_model_has_results_all_the_same(finetune_config, capsys):
    cfg = finetune_config("sst2", **SHORT, save_models=False)
    run = only(finetune.main(cfg))
    assert not Path(run["folder"], "model").exists() and not Path(run["folder"], "submission").exists()
    finetune.main(cfg)
    assert f"reused {run['folder']}" in capsys.readouterr().out
    refused("--model .*no model there", lambda: predict("out/finetune/tiny/sst2", ["x"]))


# ---------------------------------------------------------------------------- seeds, tables and settings


def test_seeds_make_runs_of_their_own_and_a_median(finetune_config, capsys):
    (summary,) = finetune.main(finetune_config("stsb", seeds=3, max_steps=12))
    runs = sorted(summary["runs"], key=lambda run: run["score"])
    assert len({run["score"] for run in runs}) == 3
    assert summary["median"] == f"s{runs[1]['seed']}" == Path(runs[1]["folder"]).name
    shown = [f"{run['score']:.1f}{'*' * bool(run['collapsed'])}" for run in summary["runs"]]
    line = re.search("^STS-B pearson .*$", capsys.readouterr().out, re.M)[0]
    assert line.split() == ["STS-B", "pearson", f"{runs[1]['score']:.1f}", *shown]
    submissions = [run["seed"] for run in runs if Path(run["folder"], "submission").exists()]
    assert submissions == [runs[1]["seed"]]  # the median run's


def test_median_of_two_runs_is_the_worse_one_also_where_less_is_better(finetune_config):
    (summary,) = finetune.main(finetune_config("read", seeds=2, max_steps=4, log_every=2, save_every=2))
    worse = max(summary["runs"], key=lambda run: run["scores"][""]["rmse"])
    assert summary["median"] == f"s{worse['seed']}"


def test_table_has_the_papers_order_and_an_average_without_rmse(learn):
    summaries, text = learn("bert")
    table = text[text.index("median"):].splitlines()
    names = [re.match(r"(.+?)  ", line).group(1) for line in table[2:] if "  " in line]
    titles = list(dict.fromkeys(next(task.title for task in TASKS.values() if name.startswith(task.title))
                                for name in names if not name.startswith("average")))
    assert titles == ["SST-2", "MNLI", "SQuAD 1.1", "SQuAD 2.0", "SWAG", "RTE", "STS-B", "PIQA", "TRACIE",
                      "READ"]
    main = [summary["runs"][0]["score"] for task, summary in summaries.items() if task != "read"]
    assert re.search(rf"average of 9 tasks +{np.mean(main):.1f}", text)
    assert re.search(r"READ rmse +0\.\d\d\d +0\.\d\d\d\n", text)


def made_summary(task, *scores, collapsed=()):
    return {"task": task, "model": "m", "median": "", "runs": [
        {"seed": i, "scores": {"": {TASKS[task].metrics[0]: value}}, "score": value, "seconds": 1.0,
         "collapsed": "it did" if i in collapsed else ""} for i, value in enumerate(scores)]}


def test_table_shows_medians_and_marks_collapsed_runs():
    text = finetune.results_table([made_summary("rte", 60.0, 53.0, 70.0, 55.0, 66.0, collapsed=[1]),
                                   made_summary("stsb", 80.0, 90.0), made_summary("read", 0.5, 0.7, 0.6)])
    assert re.search(r"^RTE accuracy +60\.0 +60\.0 53\.0\* 70\.0 55\.0 66\.0$", text, re.M)
    assert re.search(r"^STS-B pearson +80\.0 +80\.0 90\.0$", text, re.M)  # the lower of an even number
    assert re.search(r"^READ rmse +0\.600 +0\.500 0\.700 0\.600$", text, re.M)
    assert re.search(r"^average of 2 tasks +70\.0", text, re.M)
    assert "* RTE s1 collapsed: it did" in text
    assert "average" not in finetune.results_table([made_summary("rte", 60.0)])
    unknown = finetune.results_table([made_summary("read", 0.5, None, 0.6)])  # None: NaN in results.json
    assert re.search(r"^READ rmse +0\.600 +0\.500 nan 0\.600", unknown, re.M)
    # of a loss the lower median is the larger one, as in the choice of the median run
    assert re.search(r"^READ rmse +0\.700 ", finetune.results_table([made_summary("read", 0.5, 0.7)]), re.M)


def test_collapsed_run_is_marked(finetune_config, capsys):
    """A rate at which nothing is learned: one class for all."""
    summaries = finetune.main(finetune_config("sst2,rte", lr=1e-9, seeds=2, **SHORT))
    out, starred = capsys.readouterr().out, 0
    for summary in summaries:
        title = TASKS[summary["task"]].title
        for run in summary["runs"]:
            if run["collapsed"]:
                starred += 1
                assert re.search(rf"{title} s{run['seed']}  accuracy .*COLLAPSED: {run['collapsed']}", out)
                assert f"* {title} s{run['seed']} collapsed: {run['collapsed']}" in out
                assert f"{run['score']:.1f}*" in re.search(rf"{title} accuracy .*", out)[0]
    assert starred >= 3


def own_settings(cfg, task):
    """(Config, number of seeds) of a task's runs, from a model of 512 positions."""
    own, seeds = finetune.own_settings(cfg, TASKS[task], SimpleNamespace(config=BERTConfig(), name="m"))
    assert (own.tasks, own.seeds, seeds[0]) == (task, 1, cfg.seed)
    return own, len(seeds)


@pytest.mark.parametrize("preset, small, others, rte, runs", [
    ("vidlankd", 1e-4, 1e-4, 1, 1), ("xdbert-base", 1e-4, 2e-5, 9, 5), ("xdbert-large", 5e-5, 1e-5, 9, 5)])
def test_preset_has_the_papers_values_and_flags_beat_it(preset, small, others, rte, runs):
    cfg = common.parse_cli(finetune.Config, finetune.PRESETS, ["--preset", preset])
    for name in TASKS:
        own, seeds = own_settings(cfg, name)
        if name in DEMO_TASKS:
            assert own.lr == 1e-3  # from a model of two layers
            continue
        assert own.lr == (small if name in ("rte", "mrpc", "stsb") else others), name
        assert seeds == (rte if name == "rte" else runs), name
        assert (own.epochs, own.max_steps, own.batch_size, own.max_length) == (3.0, 0, 32, 128)
        assert own.warmup_steps == 0.1 and own.layer_decay == (1.0 if preset == "vidlankd" else 0.9)
        assert own.weight_decay == 0.01
    flags = dict(lr=3e-5, seeds=2, max_length=256, layer_decay=0.8, epochs=2.0, batch_size=16,
                 warmup_steps=0.2, weight_decay=0.1)
    cfg = common.parse_cli(finetune.Config, finetune.PRESETS,
                           ["--preset", preset, *(f"--{k}={v}" for k, v in flags.items())])
    for name in ("rte", "sst2"):
        own, seeds = own_settings(cfg, name)
        assert seeds == 2 and {k: getattr(own, k) for k in flags} == flags | {"seeds": 1}


@pytest.mark.parametrize("name", [*DEMO_TASKS, "rte"])
def test_demo_tasks_keep_their_own_settings_and_flags_beat_them(name):
    def values(**flags):
        own, seeds = own_settings(finetune.Config(**flags), name)
        return own.lr, own.max_steps, own.epochs, own.max_length, seeds
    if name in DEMO_TASKS:
        assert values() == (1e-3, TASKS[name].steps, 3.0, 48, 3) and 200 <= TASKS[name].steps <= 500
    else:
        assert values() == (1e-4, 0, 3.0, 128, 3)
    assert values(lr=1e-4, epochs=2.0, max_length=40, seeds=1) == (1e-4, 0, 2.0, 40, 1)
    assert values(max_steps=7)[1] == 7


# ---------------------------------------------------------------------------- predictions and submissions


def lines_of(run, folder, name):
    return Path(run["folder"], folder, name).read_text().splitlines()


def gold_of(task, tiny_tasks, which=""):
    path = find_file(TASKS[task], tiny_tasks, TASKS[task].evals[which])
    return TASKS[task].read(TASKS[task], path, True)


def test_predictions_are_the_right_labels_in_each_benchmarks_form(trained, tiny_tasks, tmp_path):
    """All are right, so that the files are known to the letter."""
    for task in ("sst2", "mnli", "rte", "swag", "piqa", "tracie"):
        for which, file in TASKS[task].outputs.items():
            gold = gold_of(task, tiny_tasks, which)
            write_predictions(TASKS[task], gold, gold.labels, tmp_path / task / file)
            expected = (tmp_path / task / file).read_text().splitlines()
            assert lines_of(trained(task), "predictions", file) == expected and len(expected) > 20
    for task, file, form in (("stsb", "STS-B.tsv", r"index\tprediction(,\d+\t[0-5]\.\d{3}){21}"),
                             ("read", "submission.csv", r"id,target(,r\d+,-?\d\.\d{6})+")):
        lines = lines_of(trained(task), "predictions", file)
        assert re.fullmatch(form, ",".join(lines))
        if task == "stsb":
            assert [float(line.split("\t")[1]) for line in lines[1:]] == \
                pytest.approx(gold_of(task, tiny_tasks).labels, abs=0.9)
    for task in ("squad1", "squad2"):
        folder = Path(trained(task)["folder"], "predictions")
        gold = json.loads((tiny_tasks / "squad" / TASKS[task].evals[""]).read_text())["data"][0]["paragraphs"]
        answers = {q["id"]: (q["answers"] or [{"text": ""}])[0]["text"] for p in gold for q in p["qas"]}
        assert json.loads((folder / "predictions.json").read_text()) == answers
        assert (folder / "null_odds.json").exists() == (task == "squad2")
    odds, whole = (json.loads((folder / name).read_text()) for name in ("null_odds.json", "answers.json"))
    assert odds.keys() == whole.keys() == answers.keys() and all(whole.values())
    assert all((odds[i] > 0) == (not text) for i, text in answers.items())


def test_scores_are_clipped_in_the_file_and_whole_in_the_metric(trained, tune):
    run = trained("stsb")
    shutil.copytree(run["folder"], "runs/stsb/s0")
    raised = tensors(run)
    raised["classifier.bias"] += 2.5
    save_file(raised, "runs/stsb/s0/model/model.safetensors")
    found = tune("stsb", out_dir="runs", eval_only=True)
    assert found["scores"][""] == pytest.approx(run["scores"][""], abs=1e-3)
    scores = [float(score) for score in column(Path("runs/stsb/s0/predictions/STS-B.tsv"), "prediction")]
    assert max(scores) == 5 and 5 < scores.count(5) < len(scores)


@pytest.mark.parametrize("encoder", ["bert", "cross"])
def test_test_sets_are_labelled_for_submission(trained, tiny_tasks, encoder):
    """The texts of the test sets are as easily told as those of the dev sets, and in the same order."""
    def written(task, file):
        return lines_of(trained(task, encoder), "submission", file)
    words = column(tiny_tasks / "glue" / "SST-2" / "test.tsv", "sentence")
    assert written("sst2", "SST-2.tsv") == [
        "index\tprediction", *(f"{i}\t{int('good' in text)}" for i, text in enumerate(words))]
    assert len(written("stsb", "STS-B.tsv")) == len(written("swag", "predictions.csv")) == 6
    if encoder == "cross":
        return
    header, *lines = written("rte", "RTE.tsv")
    assert len(lines) == 5 and {line.split("\t")[1] for line in lines} == {"entailment", "not_entailment"}
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):
        header, *lines = written("mnli", name)
        assert header == "index\tprediction"
        assert [line.split("\t")[1] for line in lines] == \
            ["entailment", "neutral", "contradiction", "entailment", "neutral"]
    tests = [json.loads(line) for line in (tiny_tasks / "piqa" / "tests.jsonl").read_text().splitlines()]
    assert written("piqa", "predictions.lst") == [str(int("good" in row["sol2"])) for row in tests]
    assert [line.split(",")[0] for line in written("read", "submission.csv")] == ["id", "r0", "r1", "r2"]
    assert not Path(trained("squad1")["folder"], "submission").exists()


def test_interrupted_submission_is_completed(finetune_config, monkeypatch):
    cfg = finetune_config("mnli", **SHORT)

    def killed(task, examples, predictions, path):
        if path.parent.name == "submission" and path.name == "MNLI-mm.tsv":
            raise KeyboardInterrupt
        write_predictions(task, examples, predictions, path)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "write_predictions", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune.main(cfg)
    run = only(finetune.main(cfg))
    names = {path.name for path in Path(run["folder"], "submission").iterdir()}
    assert names == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}


def test_score_of_the_predictions_equals_the_results(tune, tiny_tasks, capsys):
    """Also where they are half wrong; for 2.0 with the null scores."""
    for task, steps in (("squad1", 8), ("squad2", 30)):
        run = tune(task, max_steps=steps, save_models=False)
        scores, folder = run["scores"][""], Path(run["folder"], "predictions")
        assert 5 < scores["exact"] < 100
        gold = str(tiny_tasks / "squad" / TASKS[task].evals[""])
        capsys.readouterr()
        found = finetune.main(finetune.Config(score=str(folder / "predictions.json"), gold=gold))
        assert found == pytest.approx({k: v for k, v in scores.items() if "best" not in k})
        assert f"{scores['exact']:.4f}" in capsys.readouterr().out
    found = finetune.main(finetune.Config(score=str(folder / "answers.json"), gold=gold,
                                          no_answer=str(folder / "null_odds.json")))
    best = [name for name in scores if name.startswith("best")]
    assert len(best) == 4 and {k: found[k] for k in best} == pytest.approx({k: scores[k] for k in best})


# ---------------------------------------------------------------------------- standard input


def predict(model, lines, **flags):
    """What --predict prints for lines of standard input: a list of the fields of each line."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        finetune.main(finetune.Config(model=str(model), predict=True, device="cpu", **flags))
    return [line.split("\t") for line in printed.getvalue().splitlines()]


def foreign(run, target):
    """A run's model as Hugging Face's library would have written it, without our settings."""
    shutil.copytree(Path(run["folder"], "model"), target)
    settings = json.loads((target / "config.json").read_text())
    del settings["nanoground"], settings["pooler_trained"]
    (target / "config.json").write_text(json.dumps(settings))
    return target


def lines_and_answers(task, tiny_tasks):
    """The dev set as lines of standard input, and the gold label of each."""
    gold = gold_of(task, tiny_tasks)
    second = gold.second or [[]] * len(gold.first)
    lines = ["\t".join([a, *([b] if isinstance(b, str) else b)]) for a, b in zip(gold.first, second)]
    if task in ("squad1", "squad2"):
        return lines, [context[a:b] for context, (a, b) in zip(gold.second, gold.labels)]
    if task == "stsb":
        return lines, gold.labels
    return lines, [TASKS[task].labels[i] if TASKS[task].labels else str(i) for i in gold.labels]


@pytest.mark.parametrize("encoder, task", [
    *(("bert", task) for task in sorted(LEARNED["bert"].split(",")) if task != "read"), ("electra", "squad2"),
    ("clip", "mnli"), ("clip", "piqa"), ("cross", "stsb"), ("cross", "swag")])
def test_predict_labels_lines_in_order(trained, tiny_tasks, tmp_path, encoder, task):
    """With the task's folder, the run's, the model's, and a folder that does not know of us: all alike."""
    run = trained(task, encoder)
    lines, answers = lines_and_answers(task, tiny_tasks)
    found = predict(Path(run["folder"]).parent, lines)
    assert len(found) == len(lines)
    if task == "stsb":
        assert [float(value) for (value,) in found] == pytest.approx(answers, abs=0.9)
    else:
        for (label, p), answer in zip(found, answers):
            assert re.fullmatch(r"[01]\.\d{4}", p)
            if answer:
                assert label == answer and 0.5 < float(p) <= 1
            else:  # squad2's best guess where there is no answer
                assert float(p) < 0.5
    assert predict(Path(run["folder"], "model"), lines) == found
    if encoder == "bert":
        assert predict(run["folder"], lines) == predict(foreign(run, tmp_path / "hf"), lines) == found


@pytest.mark.parametrize("encoder", ["bert", "cross"])
def test_predict_takes_any_number_of_candidates_of_any_length(trained, encoder):
    long = ["the cat ran\tbad" + " noon" * 99 + "\tgood\tbad"] * (encoder == "cross")
    found = predict(trained("swag", encoder)["folder"], [
        "the cat ran\the then bad\the good\the bad at noon", "the cat ran\tbad\tbad\tgood", *long])
    assert [label for label, _ in found] == ["1", "2", *["1"] * len(long)]


def test_predict_finds_the_median_run_from_any_folder(finetune_config, tmp_path, monkeypatch):
    (summary,) = finetune.main(finetune_config("stsb", seeds=3, max_steps=6))
    lines = ["the cat ran\tgood good bad", "the dog sat\tbad"]
    task = (tmp_path / "out/finetune/tiny/stsb").resolve()
    median = predict(task / summary["median"], lines)
    runs = [predict(run["folder"], lines) for run in summary["runs"]]
    assert runs.count(median) == 1 and predict(task, lines) == median
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert predict(task, lines) == median


def test_predict_takes_many_lines_and_names_the_bad_one(trained, capsys):
    folder = trained("sst2")["folder"]
    lines = [["a good night", "bad he"][i * i % 7 % 2] for i in range(2100)]
    found = predict(folder, lines)
    assert [label for label, _ in found] == [["negative", "positive"]["good" in line] for line in lines]
    for at in (0, 999, 1000, 2050):
        wrong = [*lines[:at], "two\tfields", *lines[at + 1:]]
        refused(f"standard input, line {at + 1}: 2 fields where 1 are wanted", lambda: predict(folder, wrong))
    refused("standard input, line 3: .*empty", lambda: predict(folder, ["good", "bad", " ", "good"]))


@pytest.mark.parametrize("encoder, task", [("bert", "rte"), ("bert", "squad1"), ("bert", "swag"),
                                           ("electra", "rte")])
def test_padded_model_of_one_segment_is_fine_tuned_and_predicts(tune, tiny_tasks, request, tmp_path, encoder,
                                                               task):
    """Two kinds of models that others made: a table of more rows than words, and one segment for all."""
    folder = widened(request.getfixturevalue(f"tiny_{encoder}"), tmp_path / "wide")
    tensors = load_file(folder / "model.safetensors")
    name = "embeddings.token_type_embeddings.weight"
    save_file(tensors | {name: tensors[name][:1].clone()}, folder / "model.safetensors")
    rewritten("config.json", settings_with(type_vocab_size=1))(folder)
    run = tune(task, model=str(folder), max_steps=2, log_every=1, save_every=2)
    saved = Path(run["folder"], "model")
    assert load_config(saved).vocab_size == load_vocab(saved).size == load_vocab(folder).size + 6
    lines, _ = lines_and_answers(task, tiny_tasks)
    assert len(predict(run["folder"], lines)) == len(lines)
    fresh = tune(task, model="none", like=str(folder), max_steps=1, log_every=1, save_every=1)
    assert load_config(Path(fresh["folder"], "model")).vocab_size == load_vocab(folder).size + 6


def test_predict_on_a_context_without_tokens_has_no_answer(trained):
    for task in ("squad1", "squad2"):
        found = predict(trained(task)["folder"], ["which number ?\tat noon five", "which number ?\t\x7f"])
        assert [answer for answer, _ in found] == ["five", ""]


def test_predict_on_a_foreign_model_follows_its_kind_and_its_positions(trained, tmp_path):
    span, text = (foreign(trained(task), tmp_path / task) for task in ("squad1", "sst2"))
    refused("standard input, line 1: 1 fields where 2", lambda: predict(span, ["which number ?"]))
    ((label, _),) = predict(text, ["good" + " noon" * 90])  # of 64 positions
    assert label == "positive"


# ---------------------------------------------------------------------------- what a run starts from


def test_start_without_pre_training_draws_its_weights_by_seed(finetune_config, tiny_bert):
    cfg = finetune_config("sst2", model="none", like=str(tiny_bert), seeds=2, max_steps=1, lr=1e-9)
    (summary,) = finetune.main(cfg)
    assert summary["model"] == "none-tiny" and Path("out/finetune/none-tiny/sst2/s1/model").exists()
    name = "embeddings.word_embeddings.weight"
    one, two = (tensors(run)["bert." + name] for run in summary["runs"])
    given = load_file(tiny_bert / "model.safetensors")[name]
    assert one.shape == given.shape and not torch.equal(one, two) and (one - given).abs().max() > 0.1
    assert one.std() == pytest.approx(0.1, rel=0.1)  # init_std of the folder


def test_untrained_pooler_is_drawn_anew_and_a_trained_one_is_kept(finetune_config, trained, tune):
    flags, name = dict(max_steps=1, lr=1e-9), "bert.pooler.dense.weight"
    again = tune("rte", model=trained("sst2")["folder"], **flags)
    assert again["model"] == "runs-sst2-s0"
    torch.testing.assert_close(tensors(trained("sst2"))[name], tensors(again)[name], rtol=0, atol=1e-6)
    one, two = finetune.main(finetune_config("rte", seeds=2, **flags))[0]["runs"]
    assert not torch.equal(tensors(one)[name], tensors(two)[name])


def test_teacher_and_student_runs_are_models_to_start_from(tune, teacher_config, demo, teacher_run):
    """A language model, and the text tower like CLIP's, whose vocabulary is of word pieces."""
    teacher.main(teacher_config(objective="clip", out_dir="tower"))
    for task, model in (("two_choices", teacher_run), ("before_after", teacher_run), ("mishap", "tower")):
        run = tune(task, model=str(model), data_dir=str(demo), max_length=0, max_steps=2, log_every=2,
                   save_every=2)
        assert set(run["scores"]) == {"", "seen"} and run["model"] == Path(model).name
        names = {path.name for path in Path(run["folder"], "predictions").iterdir()}
        assert names == {"predictions.txt", "seen.txt"}
    settings = json.loads(Path(run["folder"], "model", "config.json").read_text())
    assert settings["nanoground"]["max_length"] == 24  # the tower's positions; the task's own are 48
    assert settings["model_type"] == "clip_text_model"


def test_x_bert_has_folders_of_its_own_beside_the_adapted_encoder(tune, tiny_cross, capsys):
    """One run of adapt_xdbert.py serves both: --cross takes all of it, --model the language encoder."""
    both = tune("rte", "cross", **SHORT)
    alone = tune("rte", model=str(tiny_cross), **SHORT)
    assert [run["folder"] for run in (both, alone)] == [
        f"out/finetune/{name}/rte/s0" for name in ("tiny-cross", "tiny")]
    one, two = (load_task_model(Path(run["folder"], "model"))[0] for run in (both, alone))
    assert type(one.encoder) is XDBERT and type(two.encoder) is BERT
    assert both["hashes"]["weights"] != alone["hashes"]["weights"]
    assert curve(both)[0]["loss"] != curve(alone)[0]["loss"]
    again = tune("rte", cross=str(tiny_cross / "model"), model="", **SHORT)
    assert again == both and "reused out/finetune/tiny-cross/rte/s0" in capsys.readouterr().out


def test_fine_tuned_x_bert_is_a_start_with_its_pooler(tune, trained):
    before = trained("stsb", "cross")
    flags = dict(max_steps=1, lr=1e-9, log_every=1, save_every=1)
    after = tune("rte", "cross", cross=before["folder"], **flags)
    assert after["model"] == "runs-stsb-s0-cross"
    one, two = (load_task_model(Path(run["folder"], "model"))[0].encoder.pooler.weight
                for run in (before, after))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert tune("rte", model=before["folder"], **flags)["model"] == "runs-stsb-s0"


def test_hash_of_x_bert_is_that_of_all_it_reads(tiny_cross, tmp_path):
    def hashed(change=lambda folder: None):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        change(shutil.copytree(tiny_cross / "model", tmp_path / "x"))
        return finetune.open_start(str(tmp_path / "x"), flag="--cross").hash

    def one_weight(name):
        def change(folder):
            content = load_file(folder / name)
            save_file(content | {key: content[key] + 1 for key in list(content)[:1]}, folder / name)
        return change

    def vocabulary(folder):
        CLIPVocab([*tiny_tower(9)[1].merges[:-1], "z z"]).save(folder / "clip")
    assert hashed() == hashed() == finetune.open_start(str(tiny_cross), flag="--cross").hash
    changed = [hashed(change) for change in (
        vocabulary, *map(one_weight, ("model.safetensors", "cross.safetensors", "clip/model.safetensors")),
        *(rewritten(name, settings_with(num_attention_heads=1)) for name in (
            "config.json", "clip/config.json")))]
    assert len({hashed(), *changed}) == 7


# ---------------------------------------------------------------------------- mistakes


def without(name):
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return change


def rewritten(name, change):
    """change: bytes of the file -> what they become."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def replaced(name, old, new):
    return rewritten(name, lambda content: content.replace(old, new, 1))


def settings_with(**values):
    return lambda content: json.dumps(json.loads(content) | values).encode()


def bert_with(**values):
    return rewritten("bert/config.json", settings_with(**values))


def sst2_with(text):
    rows = "".join(f"{i}\t{text}\t{i % 2}\n" for i in range(9)) if text else ""
    return rewritten("glue/SST-2/train.tsv", lambda content: f"index\tsentence\tlabel\n{rows}".encode())


def bert(change):
    return rewritten("bert/config.json", change)


def sst2(text):
    """Nine rows of a text as SST-2's training set."""
    rows = "".join(f"{i}\t{text}\t{i % 2}\n" for i in range(9))
    return rewritten("glue/SST-2/train.tsv", lambda content: f"index\tsentence\tlabel\n{rows}".encode())


BROKEN = [
    ("sst2", replaced("glue/SST-2/dev.tsv", b"\t1\n", b"\tgood\n"),
     r"dev\.tsv, line 3: label 'good'; those of SST-2 are negative, positive"),
    ("stsb", replaced("glue/STS-B/train.tsv", b"\t5\n", b"\t7.5\n"),
     r"train\.tsv, line 7: label '7\.5'; .*numbers from 0 to 5"),
    ("rte", rewritten("glue/RTE/dev.tsv", lambda content: b"index\tsentence1\tsentence2\n0\ta\tb\n"),
     r"dev\.tsv.*: has no label, so it is an unlabelled test split"),
    ("piqa", without("piqa/valid-labels.lst"), r"valid.*: .*unlabelled test split"),
    ("sst2", rewritten("glue/SST-2/train.tsv", lambda content: b"\n"), r"train\.tsv: is empty"),
    ("sst2", rewritten("glue/SST-2/train.tsv", lambda content: content[:21]), "train.tsv: holds no row"),
    ("sst2", sst2("καλή μέρα κόσμε"), "--model bert: its vocabulary does not know 100 % of SST-2's tokens"),
    ("sst2", sst2("今天天气很好"), "--model bert: its vocabulary"),
    ("sst2", without("glue/SST-2/dev.tsv"), r"dev\.tsv: no such file; get SST-2 from https://"),
    ("swag", replaced("swag/train.csv", b"he,", b'"he,'), r"train\.csv, line 2"),
    ("squad1", rewritten("squad/dev-v1.1.json", lambda content: content[:-9]),
     r"dev-v1\.1\.json, line 1: broken JSON"),
    ("sst2", rewritten("bert/vocab.txt", lambda content: content + b"more\n"),
     r"bert: \d+ tokens in its vocabulary, \d+ in"),
    ("sst2", without("bert/vocab.txt"), r"bert.*: holds neither vocab\.txt nor tokenizer\.json"),
    ("sst2", without("bert/model.safetensors"), r"no model\.safetensors"),
    ("sst2", rewritten("bert/model.safetensors", lambda content: content[:5000]),
     r"model\.safetensors: not readable"),
    ("sst2", without("bert/config.json"), "--model .*bert: no model there"),
    ("sst2", bert(lambda content: content[:50]), r"config\.json, line \d+: broken JSON"),
    ("sst2", bert(settings_with(model_type="roberta")), "config.json: model_type is 'roberta'"),
    ("sst2", bert(settings_with(num_hidden_layers=2)), "model.safetensors: .* is missing"),
    ("sst2", bert(settings_with(vocab_size=99)), r"bert: \d+ tokens in its vocabulary, 99 in"),
    ("sst2", bert(settings_with(max_position_embeddings=9)), "--max_length 32: .* 9 positions")]


@pytest.mark.parametrize("task, change, says", BROKEN)
def test_broken_file_is_one_line_before_anything_is_trained(tune, tiny_tasks, tiny_bert, task, change, says):
    shutil.copytree(tiny_tasks, "data")
    shutil.copytree(tiny_bert, "data/bert")
    change(Path("data"))
    refused(says, lambda: tune(task, data_dir="data", model="data/bert", max_steps=1))
    assert not list(Path("out").glob("finetune/*/*/s*"))


def other_vocabulary(folder):
    CLIPVocab(tiny_tower(9)[1].merges[:-5]).save(folder / "clip")


def other_tower(folder):
    """Wider than the one that the cross-modal encoder was trained beside."""
    config, vocab = load_clip_config(folder / "clip"), load_clip_vocab(folder / "clip")
    save_clip(CLIPText(replace(config, projection=32)), folder / "clip", vocab)


NO_CROSS = r"--cross \S+: has no cross-modal encoder \({}\); give a run of adapt_xdbert\.py without --no_clip"
BROKEN_CROSS = [
    (without("cross.json"), NO_CROSS.format("cross.json")),
    (without("cross.safetensors"), NO_CROSS.format("cross.safetensors")),
    (without("clip"), NO_CROSS.format("clip")),
    (without("clip/tokenizer.json"), "clip: holds no vocabulary of CLIP"),
    (without("clip/model.safetensors"), "clip: has no model.safetensors"),
    (rewritten("cross.safetensors", lambda content: content[:3000]), "cross.safetensors: not readable"),
    (rewritten("cross.json", settings_with(layers=1)), "cross.safetensors: the tensor .* is unknown"),
    (rewritten("cross.json", settings_with(layers=3)), "cross.safetensors: the tensor .* is missing"),
    (rewritten("clip/config.json", settings_with(max_position_embeddings=77)),
     "model.safetensors: the shape of .*position_embedding"),
    (rewritten("clip/config.json", settings_with(hidden_act="gelu")), "config.json: hidden_act is 'gelu'"),
    (rewritten("config.json", settings_with(max_position_embeddings=9)), "--max_length 32: .* 9 positions"),
    (other_vocabulary, r"clip: \d+ tokens in its vocabulary, \d+ in its config.json"),
    (other_tower, "cross.safetensors: the shape of")]


@pytest.mark.parametrize("change, says", BROKEN_CROSS)
def test_broken_cross_folder_is_one_line_before_anything_is_trained(tune, tiny_cross, change, says):
    shutil.copytree(tiny_cross, "run")
    change(Path("run/model"))
    refused(says, lambda: tune("rte", "cross", cross="run"))
    assert not list(Path("out").glob("finetune/*/*/s*"))


@pytest.mark.parametrize("encoder, flags, says", [
    ("bert", dict(tasks="rtee"), "--tasks rtee: choose from sst2, qnli"),
    ("bert", dict(tasks="rte,x"), "--tasks x: choose"),
    ("bert", dict(data_dir="nowhere"),
     r"nowhere/RTE/train\.tsv: no such file; get RTE from https://gluebenchmark"),
    ("bert", dict(model="nowhere"), "--model nowhere: no model there"),
    ("bert", dict(model=""), "--model is missing"),
    ("bert", dict(model="none"), "--model none needs --like"),
    ("bert", dict(model="none", like="nowhere"), "--like nowhere: no model there"),
    ("bert", dict(model="none", like="{tiny_clip}"), "config.json: model_type is 'clip_text_model', only"),
    ("bert", dict(model="", cross="{tiny_bert}"), NO_CROSS.format("cross.json")),
    ("cross", dict(cross="nowhere"), "--cross nowhere: no model there"),
    ("bert", dict(max_length=65), "--max_length 65: tiny has 64 positions"),
    ("clip", dict(max_length=41), "--max_length 41: tiny_clip has 40 positions; give 40 or less"),
    ("cross", dict(max_length=65), "--max_length 65: tiny-cross has 64 positions"),
    ("bert", dict(max_length=4), "--max_length 4: must be at least 5"),
    ("bert", dict(tasks="squad1", max_length=6), "--max_length 6: .*room"),
    ("bert", dict(batch_size=15, grad_accum=2), "--batch_size 15 is not a multiple"),
    ("bert", dict(max_steps=0, epochs=1.0, warmup_steps=9.0), "--warmup_steps 9 is more than the 4 steps"),
    ("bert", dict(device="tpu"), "--device tpu"), ("bert", dict(eval_only=True), "no finished run"),
    ("cross", dict(tasks="rte,squad2"), "--tasks squad2: .* not by tiny-cross; leave SQuAD out"),
    ("clip", dict(tasks="squad1,rte"), "--tasks squad1: .* not by tiny_clip; leave SQuAD out"),
    *((encoder, dict(tasks="mishap", data_dir="{demo}"), f"{flag} .*its vocabulary is not that of .*demo-s0")
      for encoder, flag in (("bert", "--model"), ("clip", "--model"), ("cross", "--cross")))],
    ids=lambda value: ",".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "")
def test_wrong_flag_is_one_line(request, tune, encoder, flags, says):
    flags = {name: str(request.getfixturevalue(value[1:-1])) if str(value).startswith("{") else value
             for name, value in ({"tasks": "rte"} | flags).items()}
    refused(says, lambda: tune(encoder=encoder, **flags))
    assert not Path("out/finetune").exists()


@pytest.mark.parametrize("flags, says", [
    ("--epoch 3", "unknown flag --epoch; did you mean --epochs"),
    ("--preset bert", "--preset bert: choose one of"),
    *((flag, flag.replace("=", " ")) for flag in (
        "--pool max", "--dtype half", "--lr nan", "--lr=-1", "--limit=-1", "--seeds=-1", "--max_length=-1",
        "--warmup_steps 1.5", "--warmup_steps=-1", "--layer_decay 0", "--layer_decay 1.1", "--dropout 1",
        "--batch_size 0", "--grad_accum 0", "--log_every 0", "--beta2 1", "--grad_clip=-1",
        "--weight_decay=-1", "--resume maybe")),
    ("--max_steps 5 --warmup_steps 6", "--warmup_steps 6"),
    ("--save_every 7", "--save_every 7: must be a multiple of --log_every"),
    ("--score p.json", "--score .* and --gold .* go together"), ("--gold d.json", "go together"),
    ("--cross a --model b", "--cross is given in place of --model"),
    *((flags, "--predict needs --model") for flags in (
        "--predict", "--predict --cross x", "--predict --model none"))])
def test_wrong_value_is_one_line_that_names_the_flag(flags, says):
    refused(says, lambda: common.parse_cli(finetune.Config, finetune.PRESETS, flags.split()))


def test_model_of_another_kind_is_refused(tune, tiny_bert, tmp_path):
    save_video_encoder(tmp_path / "video", VideoEncoder(BERTConfig(vocab_size=10, layers=1, hidden=8, heads=1,
                                                                   intermediate=8), 4))
    refused("--model .*video: no model there", lambda: tune("rte", model="video"))
    refused("no fine-tuned model .*make one: python finetune.py --model", lambda: predict(tiny_bert, ["x"]))
    refused("--model nowhere: no model there", lambda: predict("nowhere", ["x"]))


@pytest.mark.parametrize("poison, says", [
    (False, r"(the .*loss|the weight \S+) is (nan|inf|not finite).*--lr"),
    (True, "weight .* is not finite after step 8")])
def test_nan_in_the_loss_or_in_the_last_update_leaves_no_model(tune, monkeypatch, poison, says):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *args):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == SHORT["max_steps"]:
            parameters[0].grad[0] = float("nan")
        return clip(parameters, *args)
    if poison:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    flags = SHORT if poison else dict(lr=1e30, grad_clip=0.0)
    refused(says, lambda: tune("sst2", **flags))
    assert Path("out/finetune/tiny/sst2/s0/config.json").exists()
    assert not list(Path("out").rglob("results.json")) and not list(Path("out").rglob("model"))


# ---------------------------------------------------------------------------- the demo's table


def test_newest_student_is_the_last_one_finished_of_this_world(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vocab = SimpleNamespace(hash="v")
    default = chain.newest_student(finetune.Config(seed=3), vocab)
    assert default == distill.Config(seed=3) and "no distilled student" in capsys.readouterr().out
    for name, finished, changes in (("a", 5, {}), ("b", 7, {}), ("c", 9, dict(vocabulary="other")),
                                    ("d", 8, dict(objective="none")), ("e", 10, dict(teacher="out/t"))):
        config = distill.Config(objective=changes.get("objective", "nst"), seed=1,
                                teacher=changes.pop("teacher", "out/teacher-mlm+ct-s1"))
        Path("out", name).mkdir(parents=True)
        common.write_json(Path("out", name, "config.json"), {"config": vars(config)})
        common.write_json(Path("out", name, "results.json"), {
            "objective": "nst", "vocabulary": "v", "finished": finished} | changes)
    for name, text in (("f", "{}"), ("g", "broken")):
        Path("out", name).mkdir()
        Path("out", name, "results.json").write_text(text)
    found = chain.newest_student(finetune.Config(), vocab)
    assert found.out_dir == "out/b" and found.objective == "nst"
    printed = capsys.readouterr().out
    assert "newest student: out/b" in printed and "passed over out/e" in printed


@pytest.mark.slow
def test_demo_table_makes_what_it_lacks_and_reuses_what_it_has(demo, tmp_path, monkeypatch, capsys):
    """Everything cut short: the four rows from one distilled student, and then nothing is made again."""
    monkeypatch.chdir(tmp_path)
    few_steps = {k: v for k, v in QUICK_TEACHER.items() if k not in ("device", "block_size")}
    monkeypatch.setattr(teacher, "Config", functools.partial(teacher.Config, **few_steps))
    chain.distill(distill.Config(**QUICK_STUDENT, objective="nst", data_dir=str(demo)))
    capsys.readouterr()
    cfg = finetune.Config(data_dir=str(demo), seeds=1, max_steps=4, log_every=2, save_every=2, device="cpu")
    rows = chain.finetune(cfg)
    out = capsys.readouterr().out
    assert "newest student: out/distill-nst-s0" in out
    assert list(rows) == ["no pre-training", "text-only", "distilled", "distilled from images"]
    assert all(list(runs) == list(DEMO_TASKS) for runs in rows.values())
    assert {p.name for p in Path("out").iterdir()} == {
        "distill-nst-s0", "distill-none-s0", "teacher-mlm+ct-s0", "teacher-image-s0", "distill-nst-image-s0",
        "finetune", "tokens"}
    assert {p.name for p in Path("out/finetune").iterdir()} == {
        "none-distill-none-s0", "distill-none-s0", "distill-nst-s0", "distill-nst-image-s0", "demo.json"}
    shape = json.loads(Path("out/finetune/none-distill-none-s0/mishap/s0/model/config.json").read_text())
    assert (shape["num_hidden_layers"], shape["hidden_size"]) == (1, 32)  # as the students
    assert json.loads(Path("out/finetune/demo.json").read_text()) == rows
    table = out[out.rindex("median of 1"):].splitlines()
    assert table[0].split("  ")[0] == "median of 1: held-out / seen" and len(table) >= 7
    for line, (row, runs) in zip(table[2:], rows.items()):
        scores = [runs[task][0]["scores"] for task in DEMO_TASKS]
        cells = [f"{s['']['accuracy']:.1f} / {s['seen']['accuracy']:.1f}" for s in scores]
        average = " / ".join(f"{np.mean([s[name]['accuracy'] for s in scores]):.1f}" for name in ("", "seen"))
        assert line.startswith(row) and re.split("  +", line)[1:] == [*cells, average]
    assert re.split("  +", table[6]) == ["chance", "50.0", "50.0", "50.0", "25.0", "50.0", "45.0"]
    for module, name in ((finetune, "Objective"), (distill, "Distiller"), (teacher, "Teacher")):
        monkeypatch.setattr(getattr(module, name), "forward", None)
    assert chain.finetune(cfg) == rows
    assert not list(Path("out").rglob("*.1"))
