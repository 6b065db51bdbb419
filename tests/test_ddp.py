"""Proves that 2 processes compute what 1 does: weights, optimizer, bank, evaluation, also with accumulation.

One spawned gloo group runs all jobs; the same jobs are then run in this process. Dropout is 0.
Run: python -m pytest -q tests/test_ddp.py
"""
import functools
import gc
import json
import os
import re
import shutil
import socket
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import QUICK_STUDENT, QUICK_TEACHER, QUICK_TUNING, stop_at
from safetensors.torch import load_file

import adapt_xdbert
import data
import distill
import finetune
import teacher
from parts import examples as examples_room
from data import open_vocab
from model import CLIPConfig, CLIPText
from parts.examples import load_examples
from parts.machine import Ranks, end_ranks, init_ranks
from parts.tasks import TASKS, find_file
from parts.vocab import load_vocab
from parts.weights import load_task_model, save_clip
from prepare.world import demo_xtext
from run import Run

SCRIPTS = {"adapt": adapt_xdbert, "distill": distill, "teacher": teacher, "finetune": finetune}
TUNED = ("mnli", "squad2", "swag", "stsb")  # a task of each kind


def jobs(corpus, videos, teacher_run, out):
    """{name: (script, flags with 2 ranks, flags with 1)}: what must give the same run."""
    shape = dict(dropout=0.0, batch_size=12)
    student = QUICK_STUDENT | shape | dict(train=corpus, teacher=teacher_run, eval_blocks=13, grad_every=2,
                                           crd_tokens=31, crd_negatives=64)
    clips = QUICK_TEACHER | shape | dict(videos=videos, val_clips=37)
    every = "soft+l2+voken+nst+crd"
    found = {
        "all objectives": ("distill", student | dict(objective=every), {}),
        "accumulation": ("distill", student | dict(objective="nst+crd", grad_accum=3), dict(grad_accum=1)),
        "sentence level, small bank": ("distill", student | dict(
            objective="crd", crd_level="sentence", crd_bank_size=20, crd_views="different"), {}),
        "sums": ("distill", student | dict(objective=every, reduction="sum", lr=1e-5), {}),
        # in-batch negatives come from the micro-batch: two ranks are like two micro-batches of one process
        "teacher": ("teacher", clips, dict(grad_accum=2)),
        "teacher, one negative": ("teacher", clips | dict(negatives="one", ct_input="clean"),
                                  dict(grad_accum=2)),
        "teacher, clip": ("teacher", clips | dict(objective="clip"), dict(grad_accum=2)),
        "teacher, clip, accumulation": ("teacher", clips | dict(objective="clip", grad_accum=3),
                                        dict(grad_accum=6))}
    return in_both(found, out)


# a run of a second, with empty segments
QUICK_ADAPTATION = dict(device="cpu", batch_size=12, segments=4, eval_blocks=13, max_steps=3, log_every=1,
                        eval_every=3, save_every=3, table=False)


def pairs_and_tower(world, out):
    """(packed pairs of texts of the demo world, folder of a random CLIP tower of 9 positions for them)."""
    vocab = open_vocab(world / "corpus.h5")
    torch.manual_seed(0)
    tower = CLIPText(CLIPConfig(vocab.size, layers=1, hidden=32, heads=2, intermediate=64, positions=9,
                                projection=24))
    save_clip(tower, out / "clip", vocab)
    return str(demo_xtext(world, Ranks(0, 1, torch.device("cpu")))), str(out / "clip")


def adaptations(pairs, clip, language, out):
    """The same for adapt_xdbert.py: every choice of terms leaves other parameters without a gradient."""
    flags = QUICK_ADAPTATION | dict(train=pairs, language=language, clip=clip, dropout=0.0)
    objectives = ("mlm", "match", "cliptc", "mlm+match", "mlm+cliptc", "match+cliptc")
    found = {f"adapt, {objective}": ("adapt", flags | dict(objective=objective), {})
             for objective in objectives}
    found |= {"adapt": ("adapt", flags, {}),
              "adapt, accumulation": ("adapt", flags | dict(grad_accum=3), dict(grad_accum=1)),
              "adapt, sums": ("adapt", flags | dict(reduction="sum", lr=1e-5), {}),
              "adapt, frozen": ("adapt", flags | dict(freeze="clip,language", cross_layers=1), {}),
              "adapt, itc": ("adapt", flags | dict(objective="mlm+match+cliptc+itc"), {}),
              "adapt, itc, accumulation": ("adapt", flags | dict(
                  objective="match+itc", grad_accum=3, freeze="none", w_itc=2.0), dict(grad_accum=1)),
              "adapt, itc alone": ("adapt", flags | dict(objective="itc"), {}),
              "adapt, itc, no cross": ("adapt", flags | dict(objective="mlm+itc", cross_layers=0), {}),
              "adapt, no clip": ("adapt", flags | dict(objective="mlm", no_clip=True, clip=""), {})}
    student = QUICK_STUDENT | dict(train=pairs, teacher=clip, dropout=0.0, batch_size=12, eval_blocks=13, grad_every=2,
                                   crd_tokens=31, segments=2)
    found |= {"other tokens": ("distill", student | dict(objective="l2+nst+crd"), {}),
              "other tokens, sentences": ("distill", student | dict(
                  objective="crd", crd_level="sentence", grad_accum=3), dict(grad_accum=1))}
    return in_both(found, out)


def tunings(bert, clip, cross, tasks, out):
    """The same for fine-tuning."""
    flags = QUICK_TUNING | dict(dropout=0.0, batch_size=12, lr=1e-3, max_steps=5, log_every=1, save_every=1,
                                data_dir=tasks)
    frozen = dict(model=bert, tasks="rte,stsb", grad_accum=3, freeze=True)
    return in_both({"tuned": ("finetune", flags | dict(model=bert, tasks=",".join(TUNED)), {}),
                    "frozen, accumulation": ("finetune", flags | frozen, dict(grad_accum=1)),
                    "clip": ("finetune", flags | dict(model=clip, tasks="mnli"), {}),
                    "cross": ("finetune", flags | dict(cross=cross, tasks="stsb,swag"), {})}, out)


RESUMED = ("all objectives", "teacher, one negative", "adapt, itc, accumulation", "clip")  # one of each script


def resumptions(todo, out):
    """{name: (script, flags with 2 ranks, flags with 1)} of RESUMED, long enough for two interruptions."""
    found = {}
    for name in RESUMED:
        script, *both = todo[name]
        longer = dict(max_steps=6, log_every=1, save_every=2)
        if script != "finetune":
            longer["eval_every"] = 2
        found[name] = (script, *(flags | longer for flags in both))
    return found


def part_of(script, flags, folder, resume="false", stop=None):
    """Runs a script in a folder, with `stop` until SIGTERM seems to come when the loop has asked so often."""
    run = functools.partial(SCRIPTS[script].main, SCRIPTS[script].Config(
        **flags | dict(out_dir=folder, resume=resume)))
    if stop is None:
        return run()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_at(patch, stop)
        run()
    assert end.value.code == 0


def in_both(found, out):
    """The two commands of each job, in folders of their own."""
    return {name: (script, flags | {"out_dir": f"{out}/two/{name}"},
                   flags | alone | {"out_dir": f"{out}/one/{name}"})
            for name, (script, flags, alone) in found.items()}


def logits_of(folder, tasks, ranks):
    """{(task, EVAL_TOKENS): logits of its dev set} by evaluate, of folder's runs, in many batches and one."""
    found, before = {}, examples_room.EVAL_TOKENS
    for name in TUNED:
        task, run = TASKS[name], Path(folder, name, "s0", "model")
        model, settings = load_task_model(run)
        path = find_file(task, tasks, task.evals[""])
        examples = load_examples(task, path, load_vocab(run), settings["max_length"], "", "dev")
        assert len(examples) % 2 == 1
        for examples_room.EVAL_TOKENS in (150, before):
            found[name, examples_room.EVAL_TOKENS] = finetune.evaluate(model, examples, torch.float32, ranks)
    return found


def messages(script, flags):
    """The messages of each whole step between two lines of the log, [(function, asynchronous, device)], of a run."""
    sent, steps, take = [], [], Run.take
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast", "gather", "barrier"):
            def counted(*args, name=name, call=getattr(dist, name), **how):
                sent.append((name, bool(how.get("async_op")), str(args[-1].device)))
                return call(*args, **how)
            patch.setattr(dist, name, counted)

        def noted(self, step):
            steps.append(list(sent))
            sent.clear()
            return take(self, step)
        patch.setattr(Run, "take", noted)
        quiet = dict(max_steps=5, log_every=5, save_every=5) | ({} if script == "finetune" else dict(eval_every=5))
        SCRIPTS[script].main(SCRIPTS[script].Config(**flags | quiet | (
            dict(grad_every=5) if "grad_every" in flags else {}) | dict(out_dir=f"two/messages/{script}")))
    return steps[2:5]


def worker(rank, port, todo, resumed, out, tasks):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    os.chdir(out)
    update, banks = distill.update_bank, []

    def kept(model, *args):
        banks.append(model.bank)
        return update(model, *args)
    distill.update_bank = kept
    for script, flags, _ in todo.values():
        banks.clear()
        SCRIPTS[script].main(SCRIPTS[script].Config(**flags))
        ranks = init_ranks("cpu")
        for bank in banks[-1:]:  # bit for bit the same rows on both ranks
            for rows in (bank.z_s, bank.z_t):
                both = ranks.gather(rows[None])
                assert torch.equal(both[0], both[1]) and both[0].abs().sum() > 0
    torch.save(logits_of("two/tuned", tasks, ranks), f"logits{rank}.pt")
    Path(f"messages{rank}.json").write_text(json.dumps({name: messages(*todo[name][:2]) for name in RESUMED}))
    for name, (script, flags, _) in resumed.items():
        part_of(script, flags, f"whole/two/{name}")
        part_of(script, flags, f"resumed/two/{name}", stop=3)
        part_of(script, flags, f"resumed/two/{name}", "true")
        part_of(script, flags, f"resumed/one/{name}", "true", stop=2)  # begun by one process, see below
    script, flags, _ = todo["teacher"]
    with pytest.MonkeyPatch.context() as patch:
        recall = teacher.recall
        patch.setattr(teacher, "recall", lambda *args: {k: x + 0.1 * rank for k, x in recall(*args).items()})
        part_of(script, flags, "two/unlike")
    lines = []
    for changed in (dict(lr=0.1 + rank), dict(videos=[flags["videos"], flags["videos"] + "2"][rank])):
        with pytest.raises(SystemExit) as stop:
            part_of(script, flags | changed, "two/refused")
        lines.append(str(stop.value))
    Path(f"lines{rank}.json").write_text(json.dumps(lines))
    del stop  # the error holds a model and with it gloo's threads, which abort some ends of a process
    gc.collect()
    end_ranks()


@pytest.fixture(scope="module")
def both(demo, teacher_run, tiny_bert, tiny_clip, tiny_cross, tiny_tasks, tmp_path_factory):
    out, world = tmp_path_factory.mktemp("ddp"), demo / "demo-s0"
    todo = jobs(str(world / "corpus.h5"), str(world / "videos.h5"), str(teacher_run), out)
    other = h5py.File(shutil.copy(world / "videos.h5", world / "videos.h52"), "r+")
    other.attrs["hash"] = np.bytes_("0" * 64)
    other.close()
    todo |= tunings(str(tiny_bert), str(tiny_clip), str(tiny_cross), str(tiny_tasks), out)
    todo |= adaptations(*pairs_and_tower(world, out), str(teacher_run), out)
    resumed = resumptions(todo, out)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        for name, (script, _, flags) in resumed.items():
            part_of(script, flags, f"resumed/one/{name}", stop=2)
        torch.multiprocessing.spawn(worker, (port, todo, resumed, str(out), str(tiny_tasks)), nprocs=2)
        for name, (script, _, flags) in resumed.items():
            part_of(script, flags, f"resumed/one/{name}", "true")
            part_of(script, flags, f"whole/one/{name}")
        for script, _, flags in todo.values():
            SCRIPTS[script].main(SCRIPTS[script].Config(**flags))
    return Path(out)


JOBS = [*jobs("", "", "", ""), *adaptations("", "", "", "")]
TUNINGS = [(job, task) for job, (_, flags, _) in tunings("", "", "", "", "").items()
           for task in flags["tasks"].split(",")]


def flat(value, name=""):
    """Nested dicts and lists of a checkpoint -> {path: tensor or number}."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{name}/{i}").items()}
    return {name: value}


def seen(name, x):
    """Without the bias of keys: a softmax takes no notice of it, and its gradient is rounding alone."""
    if name.endswith("qkv.bias"):
        query, _, value = x.chunk(3)
        return torch.cat([query, value])
    if name.endswith(("k_proj.bias", "key.bias")):
        return x[:0]
    return x.chunk(2)[1] if name.endswith("key_value.bias") else x


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_what_one_does(both, job):
    one, two = (torch.load(both / ranks / job / "checkpoint.pt", weights_only=True)
                for ranks in ("one", "two"))
    compared = 0
    for part in ("model", "bank", "optimizer"):
        if part not in one:
            continue
        a, b = flat(one[part]), flat(two[part])
        assert a.keys() == b.keys()
        for key in a:
            if torch.is_tensor(a[key]):
                torch.testing.assert_close(seen(key, a[key]), seen(key, b[key]), rtol=2e-3, atol=2e-5,
                                           msg=lambda m: f"{part}{key}: {m}")
                compared += 1
    assert compared > 20


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_log_and_evaluate_what_one_does(both, job):
    one, two = (log_lines(both / ranks / job) for ranks in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert any(key.startswith("val_") for line in one for key in line)
    for a, b in zip(one, two):
        for key in a.keys() - {"tokens_per_s", "examples_per_s", "mfu", "memory_mb"}:
            if not key.startswith("gradient_"):  # of one micro-batch, and those differ in size
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)


def test_first_step_gradient_equals_one_process(both):
    """The norm of the whole gradient at step 1, to float precision: nothing was lost or added twice."""
    for job in JOBS:
        one, two = (next(line["grad_norm"] for line in log_lines(both / ranks / job) if "grad_norm" in line)
                    for ranks in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-5), job


def tensors_of(folder):
    """{path: tensor} of what a run leaves: checkpoint and exported weights."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": x for name, x in load_file(path).items()}
    if (folder / "checkpoint.pt").exists():
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        found |= {name: x for name, x in flat({part: state[part] for part in ("model", "optimizer")}).items()
                  if torch.is_tensor(x)}
    return found


@pytest.mark.parametrize("name", RESUMED)
def test_run_resumed_with_two_processes_equals_uninterrupted_run_bit_for_bit(both, name):
    whole, parts = (tensors_of(both / folder / "two" / name) for folder in ("whole", "resumed"))
    assert len(whole) > 20 and whole.keys() == parts.keys()
    for key in whole:
        assert torch.equal(whole[key], parts[key]), key


@pytest.mark.parametrize("name", RESUMED)
def test_run_goes_on_with_two_processes_and_again_with_one(both, name):
    whole, parts = (tensors_of(both / folder / "one" / name) for folder in ("whole", "resumed"))
    assert len(whole) > 20 and whole.keys() == parts.keys()
    for key in whole:
        torch.testing.assert_close(seen(key, whole[key]), seen(key, parts[key]), rtol=2e-3, atol=2e-5,
                                   msg=lambda m: f"{key}: {m}")


def test_ranks_exchange_one_message_a_step_and_do_not_wait_for_it(both):
    """Besides gradients, and what goes from device to device: CRD's rows and ITC's pairs."""
    for rank in (0, 1):
        for name, steps in json.loads((both / f"messages{rank}.json").read_text()).items():
            more = {"all objectives": [["all_gather", False, "cpu"]],
                    "adapt, itc, accumulation": [["all_gather", False, "cpu"]] * 3}.get(name, [])
            assert len(steps) == 3
            for step in steps:
                assert sorted(step) == sorted([["all_reduce", True, "cpu"], *more]), name


def test_ranks_that_measure_unlike_recall_do_what_the_main_one_does(both):
    """Else one would save and wait for the other, which goes on."""
    one, two = (log_lines(both / "two" / name) for name in ("teacher", "unlike"))
    for a, b in zip(one, two, strict=True):
        speed = {"tokens_per_s", "mfu", "memory_mb"}
        assert {k: a[k] for k in a.keys() - speed} == {k: b[k] for k in b.keys() - speed}


def test_ranks_with_other_flags_or_data_are_refused(both):
    for rank in (0, 1):
        flags, videos = json.loads((both / f"lines{rank}.json").read_text())
        assert flags.startswith("rank 1 has other flags than rank 0; start every process")
        assert videos.startswith("rank 1 has other data or models than rank 0; start every process")
    assert not (both / "two" / "refused").exists()


def test_micro_rows_cover_the_global_batch_once():
    for world, accum in ((1, 1), (2, 1), (2, 3), (4, 2)):
        rows = [data.micro_rows(24, rank, world, micro, accum)
                for rank in range(world) for micro in range(accum)]
        assert sorted(np.concatenate(rows)) == list(range(24))


@pytest.mark.parametrize("job, task", TUNINGS)
def test_two_processes_fine_tune_what_one_does(both, job, task):
    """Weights, log and scores; the predictions as files, too."""
    one, two = (both / ranks / job / task / "s0" for ranks in ("one", "two"))
    a, b = ({f"{path.stem}/{key}": x for path in (folder / "model").rglob("*.safetensors")
             for key, x in load_file(path).items()} for folder in (one, two))
    assert a.keys() == b.keys() and ("cross/pooler.weight" in a) == (job == "cross")
    for key in a:
        # where a softmax takes no notice the gradient is rounding alone, of which AdamW makes whole steps
        unseen = re.search(r"(key|k_proj)\.bias", key) or task in ("swag", "squad2") and re.search(
            r"(classifier|qa_outputs|output\.LayerNorm)\.bias", key)
        if not unseen:
            torch.testing.assert_close(seen(key, a[key]), seen(key, b[key]), rtol=2e-3, atol=2e-5,
                                       msg=lambda m: f"{key}: {m}")
    lines = [log_lines(folder) for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 5
    for x, y in zip(*lines):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    a, b = (json.loads((folder / "results.json").read_text())["scores"] for folder in (one, two))
    for name, scores in a.items():
        assert b[name] == pytest.approx(scores, rel=1e-3, abs=1e-3), name
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix != ".pt")
             for folder in (one, two)]
    assert files[0] == files[1]


@pytest.mark.parametrize("task", TUNED)
def test_evaluation_with_two_processes_is_bit_equal_to_one(both, tiny_tasks, task):
    """An odd number of examples, in many batches, and in a single one that leaves a process without."""
    alone = logits_of(both / "two" / "tuned", tiny_tasks, Ranks(0, 1, torch.device("cpu")))
    for rank in (0, 1):
        found = torch.load(both / f"logits{rank}.pt", weights_only=True)
        for key in alone:
            if key[0] == task:
                assert torch.equal(found[key], alone[key]), key
