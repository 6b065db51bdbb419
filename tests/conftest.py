"""Shared fixtures. Run from the project's root: python -m pytest -q"""
import csv
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.fsync = lambda file: None  # thousands of small files; test_run kills a process that has the real one
torch.set_num_threads(1)  # the models here are tiny: a second thread costs more than it brings


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than a few seconds; runs where CI is set, or with -m slow")


def pytest_collection_modifyitems(config, items):
    if os.environ.get("CI") or config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: set CI=1 or give -m slow"))


def pytest_runtestloop(session):
    """Runs the files in two processes where there are two cores: the second is a fork that reports to the first."""
    config, hook, files = session.config, session.config.hook, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    if (len(files) < 3 or session.testsfailed or config.option.collectonly or config.option.usepdb
            or config.option.maxfail or hasattr(config, "workerinput")  # of pytest-xdist
            or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2):
        return None
    fork = multiprocessing.get_context("fork")
    files, taken = sorted(files.values(), key=len), fork.Value("i", 0)

    def take():
        """The tests of the longest file that nobody has taken; [] where none is left."""
        with taken.get_lock():
            taken.value += 1
            return files[-taken.value] if taken.value <= len(files) else []

    def run(after_each=lambda: None):
        tests, following = take(), take()
        while tests:
            # pytest must know the next test to tear down what that does not need
            for test, behind in zip(tests, [*tests[1:], following[0] if following else None]):
                hook.pytest_runtest_protocol(item=test, nextitem=behind)
                after_each()
            tests, following = following, take()

    class Sender:
        def pytest_runtest_logreport(self, report):
            print(json.dumps(hook.pytest_report_to_serializable(config=config, report=report)), file=sent,
                  flush=True)

    def second():
        config.pluginmanager.unregister(name="terminalreporter")
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()  # the file behind it is the first process's
        capture.start_global_capturing()
        config.pluginmanager.register(Sender())
        run()

    def receive():
        """Shows what the second process has reported since; half a line waits for its rest."""
        at = received.tell()
        while (line := received.readline()).endswith("\n"):
            report = hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            if report.skipped and isinstance(report.longrepr, list):  # JSON knows no tuples, -rs wants one
                report.longrepr = tuple(report.longrepr)
            hook.pytest_runtest_logreport(report=report)
            at = received.tell()
        received.seek(at)

    with tempfile.NamedTemporaryFile("w") as sent, open(sent.name) as received:
        helper = fork.Process(target=second)
        helper.start()
        run(receive)
        helper.join()
        receive()
    if helper.exitcode:
        raise session.Interrupted(f"the second process ended with exit status {helper.exitcode}")
    return True


def stop_line(function, *args, **kw):
    """The one line with which `function` ends the program."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **kw)
    text = str(stop.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


def written(out):
    """What the json beside a PNG of analyze.py holds."""
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and out.stat().st_size > 10000
    return json.loads(out.with_suffix(".json").read_text())


def stop_at(monkeypatch, step):
    """The run behaves as if SIGTERM had come just before the loop has asked `step` times."""
    from run import Interrupt
    asked = itertools.count()
    monkeypatch.setattr(Interrupt, "due", lambda self: next(asked) == step)
    monkeypatch.setattr(Interrupt, "reason", "SIGTERM", raising=False)


@pytest.fixture(scope="session")
def real_data():
    """Folder of real corpora in their official layouts; tests that need it are skipped without it."""
    folder = Path(os.environ.get("NANOGROUND_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set NANOGROUND_DATA")
    return folder


@pytest.fixture(scope="session")
def bert_vocab(real_data):
    """BERT's own vocabulary, from the real data."""
    from parts.vocab import load_vocab
    return load_vocab(real_data / "vocab" / "bert-base-uncased-vocab.txt")


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo world of seed 0, built once for the whole suite; returns the folder that holds demo-s0."""
    from prepare.world import make_demo
    folder = tmp_path_factory.mktemp("data")
    make_demo(folder / "demo-s0", seed=0)
    return folder


# a run that takes a second: every step logged, nothing evaluated but at the ends
QUICK = dict(max_steps=4, warmup_steps=1, log_every=1, eval_every=4, save_every=4, device="cpu", batch_size=8,
             model="1L-32H-2A", block_size=24)
QUICK_TEACHER = QUICK | dict(val_clips=40, stop_on="loss", vokens=9)
QUICK_STUDENT = QUICK | dict(eval_blocks=11, grad_every=4, crd_tokens=19, crd_negatives=32, crd_dim=16)


@pytest.fixture(scope="session")
def teacher_run(demo, tmp_path_factory):
    """A teacher of a few steps on the demo world; returns its run folder."""
    import teacher
    folder = tmp_path_factory.mktemp("teacher") / "run"
    teacher.main(teacher.Config(**QUICK_TEACHER, videos=str(demo / "demo-s0" / "videos.h5"),
                                out_dir=str(folder)))
    return folder


@pytest.fixture
def teacher_config(demo, tmp_path):
    """teacher.Config for a run of a second on the demo's packed clips; flags as keywords."""
    import teacher

    def config(**flags):
        paths = dict(videos=str(demo / "demo-s0" / "videos.h5"), out_dir=str(tmp_path / "run"))
        return teacher.Config(**(QUICK_TEACHER | paths | flags))
    return config


@pytest.fixture
def distill_config(demo, teacher_run, tmp_path):
    """distill.Config for a run of a second on the demo's packed text, with teacher_run; flags as keywords."""
    import distill

    def config(**flags):
        paths = dict(train=str(demo / "demo-s0" / "corpus.h5"), teacher=str(teacher_run),
                     out_dir=str(tmp_path / "run"))
        return distill.Config(**(QUICK_STUDENT | paths | flags))
    return config


# ---------------------------------------------------------------------------- fine-tuning

NOUNS, VERBS = ("cat", "dog", "bird", "horse"), ("ran", "sat", "slept", "fell")
NUMBERS = ("one", "two", "three", "four", "five", "six")
FILLERS = ("the", "a", "and", "then", "at", "noon", "night", "he")
TINY_WORDS = (*NOUNS, *VERBS, *NUMBERS, *FILLERS, "good", "bad", "red", "blue", "yes", "maybe", "not",
              "which", "number", "starts", "ends", "before", ".", "?")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A random BERT that knows the words of tiny_tasks; returns its folder."""
    from model import BERT, BERTConfig
    from parts.vocab import SPECIALS, Vocab
    from parts.weights import save_bert
    vocab = Vocab([*SPECIALS, *TINY_WORDS])
    torch.manual_seed(0)
    bert = BERT(BERTConfig(vocab.size, layers=1, hidden=32, heads=2, intermediate=64, max_positions=64,
                           init_std=0.1))
    folder = tmp_path_factory.mktemp("bert") / "tiny"
    save_bert(bert, folder, vocab)
    return folder


@pytest.fixture(scope="session")
def tiny_electra(tiny_bert, tmp_path_factory):
    """The same as an ELECTRA whose embeddings are narrower than its states; returns its folder."""
    from model import BERT, BERTConfig
    from parts.vocab import load_vocab
    from parts.weights import save_bert
    vocab = load_vocab(tiny_bert)
    torch.manual_seed(0)
    bert = BERT(BERTConfig(vocab.size, layers=1, hidden=32, heads=2, intermediate=64, max_positions=64,
                           init_std=0.1, embedding=24, model_type="electra"))
    folder = tmp_path_factory.mktemp("electra") / "tiny_electra"
    save_bert(bert, folder, vocab)
    return folder


def widened(folder, target, rows=6):
    """A copy of a model's folder whose table of words has more rows than its vocabulary, as padded ones have."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name in tensors:
        if name.endswith(("word_embeddings.weight", "predictions.bias", "lm_head.bias", "token_embedding.weight")):
            more = torch.full((rows, *tensors[name].shape[1:]), 0.02)
            tensors[name] = torch.cat([tensors[name], more])
    save_file(tensors, target / "model.safetensors")
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | {"vocab_size": content["vocab_size"] + rows}))
    return target


def tiny_clip_vocab():
    """CLIP's kind of vocabulary whose merges make whole words of TINY_WORDS."""
    from parts.vocab import CLIPVocab
    merges = {}
    for word in TINY_WORDS:
        for i in range(1, len(word)):
            merges[f"{word[:i]} {word[i]}{'</w>' * (i == len(word) - 1)}"] = None
    return CLIPVocab(list(merges))


def tiny_tower(positions):
    """A random CLIP text tower that knows the words of tiny_tasks, and its vocabulary."""
    from model import CLIPConfig, CLIPText
    vocab = tiny_clip_vocab()
    torch.manual_seed(0)
    return CLIPText(CLIPConfig(vocab.size, layers=1, hidden=32, heads=2, intermediate=64,
                               positions=positions, projection=24)), vocab


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The folder of a CLIP text tower of 40 positions."""
    folder = tmp_path_factory.mktemp("clip") / "tiny_clip"
    from parts.weights import save_clip
    clip, vocab = tiny_tower(40)
    save_clip(clip, folder, vocab)
    return folder


@pytest.fixture(scope="session")
def tiny_cross(tiny_bert, tmp_path_factory):
    """A run as adapt_xdbert.py leaves it: tiny_bert with a tower of 9 positions, which most sentences of
    tiny_tasks fill, and two cross-modal layers; no pooler was trained."""
    from model import XDBERT
    from parts.vocab import load_vocab
    from parts.weights import load_bert, save_xdbert
    folder = tmp_path_factory.mktemp("cross") / "tiny"
    clip, vocab = tiny_tower(9)
    model = XDBERT(load_bert(tiny_bert), clip, layers=2)
    save_xdbert(model, folder / "model", load_vocab(tiny_bert), vocab)
    return folder


def write_table(path, *rows, dialect="excel-tab"):
    """Rows of str to a .tsv file without quotes, or with dialect "excel" to a .csv file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    quoting = {"quoting": csv.QUOTE_NONE, "quotechar": None} if dialect == "excel-tab" else {}
    with open(path, "w", newline="") as f:
        csv.writer(f, dialect, lineterminator="\n", **quoting).writerows(rows)


def filler(rng, least=2, most=6):
    return [rng.choice(FILLERS) for _ in range(rng.randint(least, most))]


def tiny_clause(rng):
    return f"the {rng.choice(NOUNS)} {rng.choice(VERBS)}"


def tiny_squad(rng, n, unanswerable):
    """SQuAD's json: the answer is the one number in the context; every other question of 2.0 has none."""
    questions = []
    for i in range(n):
        words, answers = filler(rng, 4, 14), []
        if not (unanswerable and i % 2):
            number, at = rng.choice(NUMBERS), rng.randrange(len(words))
            words.insert(at, number)
            answers = [{"text": number, "answer_start": len(" ".join([*words[:at], ""]))}]
        question = {"id": f"q{i}", "question": "which number ?", "answers": answers}
        if unanswerable:
            question["is_impossible"] = not answers
        questions.append({"context": " ".join(words), "qas": [question]})
    return {"version": "v2.0" if unanswerable else "1.1", "data": [{"title": "t", "paragraphs": questions}]}


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory):
    """--data_dir with tasks in their official layouts whose labels follow from single words.

    Training sets of 64 rows, dev sets of 21, test sets of 5.
    """
    folder, sizes = tmp_path_factory.mktemp("tasks"), {"train": 64, "dev": 21, "test": 5}
    for split, n in sizes.items():
        rng = random.Random(split)

        def glue(name, header, make, file=split):
            """A file of one of GLUE's tasks; without the last column, the label, where it is a test set."""
            rows = [header, *([str(i), *make(i)] for i in range(n))]
            write_table(folder / "glue" / name / f"{file}.tsv",
                        *([row[:-1] for row in rows] if split == "test" else rows))

        def inference(i, words=("yes", "maybe", "not"), labels=("entailment", "neutral", "contradiction")):
            clause, i = tiny_clause(rng), i % len(words)
            return clause, f"{' '.join(filler(rng))} {words[i]} {clause}", labels[i]

        def similarity(i):
            good = i % 6
            words = ["good"] * good + ["bad"] * (5 - good)
            rng.shuffle(words)
            return tiny_clause(rng), " ".join(words), str(good)

        glue("SST-2", ["index", "sentence", "label"], lambda i: (
            " ".join([*filler(rng), ["bad", "good"][i % 2], *filler(rng, 0, 9)]), str(i % 2)))
        pair = ["index", "sentence1", "sentence2"]
        glue("RTE", [*pair, "label"],
             lambda i: inference(i, ("yes", "not"), ("entailment", "not_entailment")))
        glue("STS-B", [*pair, "score"], similarity)
        for file in ([split] if split == "train" else [f"{split}_matched", f"{split}_mismatched"]):
            glue("MNLI", [*pair, "gold_label"], inference, file)

        def ends(i, k):
            """K endings of which the one with good is right; its number."""
            return [" ".join([*filler(rng, 1, 5), "good" if j == i % k else "bad"]) for j in range(k)], i % k

        header = ["", "sent1", "sent2", *(f"ending{i}" for i in range(4)), "label"]
        rows = [header, *([str(i), tiny_clause(rng), "he", *endings, str(label)]
                          for i, (endings, label) in ((i, ends(i, 4)) for i in range(n)))]
        write_table(folder / "swag" / f"{'val' if split == 'dev' else split}.csv",
                    *([row[:-1] for row in rows] if split == "test" else rows), dialect="excel")
        path = folder / "piqa" / {"train": "train.jsonl", "dev": "valid.jsonl", "test": "tests.jsonl"}[split]
        path.parent.mkdir(exist_ok=True)
        made = [ends(i, 2) for i in range(n)]
        path.write_text("".join(json.dumps({"goal": tiny_clause(rng), "sol1": a, "sol2": b}) + "\n"
                                for (a, b), _ in made))
        if split != "test":
            path.with_name(f"{path.stem}-labels.lst").write_text("".join(f"{i}\n" for _, i in made))
            (folder / "squad").mkdir(exist_ok=True)
            for version in ("1.1", "2.0"):
                (folder / "squad" / f"{split}-v{version}.json").write_text(
                    json.dumps(tiny_squad(rng, n, version == "2.0")))
            path = folder / "tracie" / "uniform-prior" / {"train": "tracie_train_uniform_prior.txt",
                                                          "dev": "tracie_test.txt"}[split]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(
                f"event: {tiny_clause(rng)} {['starts', 'ends'][i // 2 % 2]} before {tiny_clause(rng)} "
                f"story: {' '.join(filler(rng))} {['red', 'blue'][i % 2]} .\t"
                f"answer: {['negative', 'positive'][i % 2]}\n" for i in range(n)))
    rng = random.Random("diagnostic")
    categories = ["Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge"]
    words, labels = ("yes", "maybe", "not"), ("entailment", "neutral", "contradiction")
    rows = [[*("tag" if i % 4 == j or i % 5 == j else "" for j in range(4)), "News", tiny_clause(rng),
             f"the cat {words[i % 3]} ran", labels[i % 3]] for i in range(24)]
    write_table(folder / "glue" / "diagnostic" / "diagnostic-full.tsv",
                [*categories, "Domain", "Premise", "Hypothesis", "Label"], *rows)
    write_table(folder / "glue" / "diagnostic" / "diagnostic.tsv", ["index", "sentence1", "sentence2"],
                *([str(i), *row[5:7]] for i, row in enumerate(rows[:5])))
    rows = [[f"r{i}", " ".join(["good"] * (i % 7) + ["bad"] * (6 - i % 7)), str(i % 7 - 3)]
            for i in range(80)]
    write_table(folder / "read" / "train.csv", ["id", "excerpt", "target"], *rows, dialect="excel")
    write_table(folder / "read" / "test.csv", ["id", "excerpt"], *(row[:2] for row in rows[:3]),
                dialect="excel")
    return folder


# a fine-tuning of a second that learns tiny_tasks
QUICK_TUNING = dict(max_steps=80, batch_size=16, lr=5e-3, max_length=32, seeds=1, log_every=10, save_every=20,
                    device="cpu")


def tuning_config(request, tasks, encoder="bert", **flags):
    """finetune.Config for a run of a second from tiny_<encoder> on tiny_tasks."""
    import finetune
    model, folder = (request.getfixturevalue(name) for name in (f"tiny_{encoder}", "tiny_tasks"))
    paths = {"cross" if encoder == "cross" else "model": str(model), "data_dir": str(folder)}
    return finetune.Config(**(QUICK_TUNING | paths | dict(tasks=tasks) | flags))


@pytest.fixture
def finetune_config(request, tmp_path, monkeypatch):
    """tuning_config in a folder of its own; flags as keywords."""
    monkeypatch.chdir(tmp_path)  # out/
    return functools.partial(tuning_config, request)


def fine_tuned(folder, name, data_dir, predictions, **flags):
    """What finetune.py leaves in a task's folder; predictions: {seed: classes or SQuAD's texts of the dev set}.
    """
    from parts.examples import rows_of
    from parts.tasks import TASKS, content_hash, find_file, write_predictions
    from run import FORMAT
    task = TASKS[name]
    path = find_file(task, data_dir, task.evals[""])
    rows = task.read(task, path, True)
    ids = [rows.ids[i] for i in rows_of(task, rows, "dev")]
    flags = {"tasks": name, "data_dir": str(data_dir.parents[2] if task.demo else data_dir)} | flags
    for seed, values in predictions.items():
        run = folder / f"s{seed}"
        if task.kind == "span":
            values = dict(zip(ids, values)), dict.fromkeys(ids, -1.0)
        write_predictions(task, SimpleNamespace(ids=ids), values, run / "predictions" / task.outputs[""])
        (run / "config.json").write_text(json.dumps({"format": FORMAT, "config": flags}))
        results = {"model": folder.parent.name, "hashes": {"dev": content_hash(path)}}
        (run / "results.json").write_text(json.dumps(results))
    return rows
