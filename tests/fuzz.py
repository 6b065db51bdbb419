"""Damages the files that users may have got from elsewhere, and looks how each reader takes it.

    python tests/fuzz.py --cases 100000 --seed 0            # shared out over all readers
    python tests/fuzz.py --reader SQuAD --case 17 --seed 0  # one case again; its files stay

Case 0 reads the valid files. Each other case is one of them, damaged by the mutators of its format
(tests/mutators.py), beside the others. It passes where the reader returns, or ends the program with one line.
Any other exception, a signal, more than 20 s, more than 2 GB above the warmed process, and a pickle that
makes a file are failures. Cases run in forks of one process. The exit status is 0 where all passed; the last
line is a summary.
"""
import argparse
import concurrent.futures
import contextlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
import h5py  # noqa: F401
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401  the way to the sources, and no fsync
import mutators
from conftest import TINY_WORDS, tiny_clip_vocab, tiny_squad, tiny_tower, write_table
from make_videos import captions as write_subtitles
from make_videos import scenes, sentences
from test_run import Config as RunConfig
from test_towers import OpenAIClip, clip_folder, hugging_face, visual_state
from test_towers import small as small_tower
from test_weights import IMAGE, OpenAIText

import data
import features
import finetune
from analyses import closing
from common import one_line_end
from model import BERT, XDBERT, BERTConfig, CLIPConfig, MLMHead, TaskModel, VideoEncoder
from parts import tasks, vocab, weights
from parts.examples import load_examples, tokenized
from parts.checkpoints import save_checkpoint
from parts.machine import Ranks
from parts.towers import load_tower
from prepare import captions, chain, packing, video
from run import Run, model_folder, read_run

SECONDS, MEMORY, BATCH = 20, 2 << 30, 200
ALONE = Ranks(0, 1, torch.device("cpu"))
VOCAB = vocab.Vocab([*vocab.SPECIALS, *TINY_WORDS, "##s", "story", "event"])
TEXT = "the cat ran and the dog sat .\nthen a bird slept at noon\n\nnight fell ; the horse ran (two dogs)\n"
CLIP = tiny_clip_vocab()

# ---------------------------------------------------------------------------- valid files


def write(folder, **files):
    """Texts, or values as JSON; "__" in a name is its dot."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


CAPTIONS = {f"v{i}": {"start": [0, 2.5, 3], "end": [2, 4, 5.5], "text": ["the cat ran", "a dog sat", "two"]}
            for i in range(4)}


def make_texts(folder):
    write(folder, a__txt=TEXT, lines__jsonl=4 * (json.dumps({"text": TEXT}) + "\n"), captions__json=CAPTIONS,
          wiki__txt=f'<doc id="1" title="a">\n{TEXT}</doc>\n' * 3,
          wikitext__txt=f" = Cat = \n\n{TEXT} = Dog = \n{TEXT}")
    (folder / "b.txt.gz").write_bytes(mutators.gzip.compress(TEXT.encode()))


def make_videos(folder):
    write(folder, captions__json=CAPTIONS,
          videos__csv="video_id,task_id,url\n" + "".join(f"v{i},{i % 2},x\n" for i in range(4)))
    for i in range(4):
        path = folder / "caps" / f"v{i}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("start,end,text\n0,2,the cat ran\n2.5,4,a dog sat\n3,5.5,two\n")
        for name, rows, width in (("f2", 6, 5), ("f3", 9, 3)):
            (folder / name).mkdir(exist_ok=True)
            array = np.linspace(0, 1, rows * width, dtype=np.float32)
            np.save(folder / name / f"v{i}.npy", array.reshape(rows, width))


def pack(folder, captions="captions.json", out="videos.h5"):
    captions, csv, f2, f3, out = (str(folder / name) for name in (captions, "videos.csv", "f2", "f3", out))
    packing.pack_videos(captions, f2, csv, VOCAB, out, f3)


def make_packed(folder):
    make_videos(folder)
    pack(folder)
    (folder / "long.txt").write_text(TEXT * 9)
    packing.pack_text([str(folder / "long.txt")], VOCAB, str(folder / "text.h5"))
    packing.pack_xtext([str(folder / "long.txt")], VOCAB, CLIP, str(folder / "pairs.h5"))


def make_vocabs(folder):
    VOCAB.save(folder)
    (folder / "bert").mkdir()
    VOCAB.tokenizer.save(str(folder / "bert" / "tokenizer.json"))
    CLIP.save(folder / "clip")
    lines = "\n".join(["#version: 0.2", *CLIP.merges]) + "\n"
    (folder / "merges.txt").write_text(lines)
    (folder / "bpe.txt.gz").write_bytes(mutators.gzip.compress(lines.encode()))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(CLIP.tokens)}))


def small(cls=BERTConfig, **sizes):
    torch.manual_seed(0)
    return cls(**(dict(vocab_size=VOCAB.size, layers=1, hidden=16, heads=2, intermediate=24) | sizes))


def make_bert(folder, **sizes):
    bert = BERT(small(max_positions=20, **sizes))
    weights.save_bert(bert, folder, VOCAB, MLMHead(bert.width, bert.embeddings.word.weight, 1e-12))
    tensors = weights.read_tensors(folder / "model.safetensors")
    (folder / "bin").mkdir()
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, folder / "bin")
    shutil.copytree(folder / "bin", folder / "old")
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    torch.save(tensors, folder / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def make_clip(folder):
    clip, words = tiny_tower(9)
    weights.save_clip(clip, folder / "clip", words)
    model = OpenAIText(small(CLIPConfig, hidden=64, heads=1, positions=9, projection=8)).eval()
    torch.save(model.state_dict(), folder / "state.pt")
    torch.jit.save(torch.jit.trace(model, (IMAGE, torch.zeros(1, 9, dtype=torch.long))), folder / "ViT.pt")


def make_models(folder):
    make_bert(folder / "bert")
    bert, (clip, words) = weights.load_bert(folder / "bert"), tiny_tower(9)
    weights.save_xdbert(XDBERT(bert, clip, 1), folder / "cross", VOCAB, words)
    weights.save_video_encoder(folder / "video", VideoEncoder(small(max_positions=9), 5, max_frames=9))
    for kind, labels in (("classify", ["yes", "no"]), ("span", [])):
        encoder = BERT(small(max_positions=20), pooler=kind == "classify")
        weights.save_task_model(TaskModel(encoder, kind, len(labels), "cls"), folder / kind, VOCAB,
                                {"task": "rte" if labels else "squad1", "labels": labels, "max_length": 16})
    path = folder / "heads" / "model"
    sizes = {"f1": (4, 8), "f2": (4, 8), "heads.crd.0": (8, 8), "heads.crd.2": (8, 8)}
    state = {f"{name}.weight": torch.zeros(size) for name, size in sizes.items()}
    state |= {f"{name}.bias": torch.zeros(size[0]) for name, size in sizes.items()}
    path.mkdir(parents=True)
    weights.save_file(state, path / "heads.safetensors")


def make_teacher(folder):
    make_packed(folder)
    weights.save_video_encoder(folder / "teacher", VideoEncoder(small(max_positions=9), 8, max_frames=9))
    write(folder / "teacher", clips__json={"T": 9, "max_frames": 9, "vision": "video", "val_clips": 2,
                                           "feat_norm": False})


def make_runs(folder):
    folder.mkdir(parents=True)
    os.chdir(folder)
    run, part = Run(RunConfig(), folder / "run", ALONE, {"train": "x"}), torch.nn.Linear(3, 2)
    run.restore(4, model=part, optimizer=torch.optim.AdamW(part.parameters()))
    run.begin(["loss"])
    run.feed(lambda step: (None, []))
    run.log(step=1, loss=1.0)
    run.save_due(4, True, best={"score": None})
    save_checkpoint(run.folder, {"model": part.state_dict(), "step": 4}, ALONE, "best.pt")
    run.leave_loop()
    run.finish({"objective": "nst", "vocabulary": VOCAB.hash, "seconds": 1.0, "median": "s0"})
    out = folder / "out" / "distill-nst-s0"
    shutil.copytree(folder / "run", out)
    config = json.loads((out / "config.json").read_text())
    config["config"] |= {"teacher": "out/teacher-mlm+ct-s0", "objective": "nst", "train": "corpus.h5"}
    columns = dict.fromkeys(("text-only", "nst"), {"mlm_loss": 1.0, "mlm_accuracy": 0.5, "neighbours": None})
    write(out, config__json=config, table__json={"columns": columns, "clips": 0})


def make_tasks(folder):
    folder.mkdir()
    rows = {"sst2": ("index sentence label", "{i} cat~ran {b}"),
            "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "{i} 1 2 cat dog {b}"),
            "mnli": ("index sentence1 sentence2 gold_label", "{i} cat~ran dog {three}"),
            "stsb": ("index sentence1 sentence2 score", "{i} cat dog {i}"),
            "mrpc": ("Quality #1~ID #2~ID #1~String #2~String", "{b} 1 2 cat dog"),
            "qnli": ("index question sentence label", "{i} cat dog {word}")}
    words, three = tasks.ENTAILMENT, ("entailment", "neutral", "-")
    fill = [{"i": i, "b": i % 2, "three": three[i % 3], "word": words[i % 2]} for i in range(5)]
    for name, (header, row) in rows.items():
        table = [[field.replace("~", " ") for field in line.split()]
                 for line in (header, *(row.format(**values) for values in fill))]
        write_table(folder / f"{name}.tsv", *table)
    categories = ["Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge"]
    write_table(folder / "diagnostic.tsv", [*categories, "Domain", "Premise", "Hypothesis", "Label"],
                *([*"a" * 4, "News", "the cat", "a dog", "not_entailment" if i else "neutral"]
                  for i in range(4)))
    write_table(folder / "cola.tsv", *(["gj04", str(i % 2), "", "the cat ran"] for i in range(4)))
    write_table(folder / "swag.csv", ["", "sent1", "sent2", *(f"ending{i}" for i in range(4)), "label"],
                *([str(i), "the cat", "he", "ran", "sat", "fell", "slept", str(i % 4)] for i in range(5)),
                dialect="excel")
    write_table(folder / "read.csv", ["id", "excerpt", "target"],
                *([f"r{i}", "the cat, ran", str(i - 2)] for i in range(30)), dialect="excel")
    line = "event: cat ran starts before dog sat story: night fell\tanswer: "
    write(folder, tracie__txt=f"{line}negative\n{line}positive\n",
          piqa__jsonl=4 * (json.dumps({"goal": "the cat", "sol1": "ran", "sol2": "sat"}) + "\n"))
    (folder / "piqa-labels.lst").write_text("0\n1\n0\n1\n")
    gold = tiny_squad(random.Random(0), 4, True)
    write(folder, squad1__json=tiny_squad(random.Random(0), 4, False), squad2__json=gold, gold__json=gold,
          predictions__json={f"q{i}": "one" for i in range(4)}, odds__json={f"q{i}": 0.5 for i in range(4)})
    write(folder, stdin__txt="the cat ran\tthe dog\nhe sat\tnight\tfell\n")


def make_subtitles(folder):
    folder.mkdir()
    for name in ("a.srt", "b.vtt", "c.en-US.vtt", "d.json3", "e.json", "f.csv"):
        (folder / f"{name[0]}.mp4").touch()
        write_subtitles(folder / name, sentences(scenes(name, 12)))


def make_films(folder):
    from test_video import film  # needs av
    folder.mkdir()
    for name, codec in (("a.mp4", "libx264"), ("b.mkv", "mpeg4"), ("c.webm", "libvpx"), ("d.avi", "mpeg4"),
                        ("e.ts", "libx264"), ("f.mov", "mpeg4")):
        film(folder / name, 40, codec=codec, sound=1 if name in ("a.mp4", "b.mkv") else 0)


def make_image_towers(folder):
    folder.mkdir()
    torch.save(small_tower("2d"), folder / "resnet.pth")
    torch.save({"state_dict": {f"module.{name}": x for name, x in small_tower("next").items()}}, folder / "next3d.pth",
               _use_new_zipfile_serialization=False)
    state = visual_state(OpenAIClip())
    torch.save(state | {"input_resolution": torch.tensor(12)}, folder / "clip.pt")
    clip_folder(folder / "hf", hugging_face(state))


def extractor(folder):
    return features.Extractor(folder / "clip.pt", folder / "f2", 2, True, ALONE.device, 4, False)


def make_settings(folder):
    make_image_towers(folder)
    extractor(folder).claim_folder()
    np.save(folder / "f2" / "a.npy", np.zeros((3, 20), np.float16))


# ---------------------------------------------------------------------------- readers


def read_blocks(path):
    for part in ("train", "val"):
        blocks = data.TextBlocks(str(path), 8, part)
        blocks.batch(np.arange(len(blocks)))
    data.open_vocab(path).encode([TEXT])


def read_pairs(path):
    for part in ("train", "val"):
        blocks = data.PairBlocks(str(path), 8, part, segments=2, length=5)
        blocks.batch(np.arange(len(blocks)))
        blocks.clip_batch(np.arange(len(blocks)))
        blocks.segment_words(np.arange(len(blocks)))
        blocks.alignment(np.arange(len(blocks)))


def read_clips(path):
    for vision, part in (("video", "train"), ("image", "val")):
        clips = data.VideoClips(path, 9, vision=vision, part=part, val_clips=2, feat_norm=True)
        clips.batch(np.arange(len(clips)))
        clips.clips(np.arange(len(clips)))
        if part == "train":
            clips.voken_clips(3, 0)


def read_model(path):
    """A model's folder as the scripts open it."""
    folder = model_folder(path.parent, "--model")
    finetune.config_and_vocab(folder)
    bert = weights.load_bert(folder, pooler=True)
    weights.load_mlm_head(folder, bert)
    bert(torch.zeros(1, 4, dtype=torch.long))


def read_clip(path):
    source = path.parent if path.suffix in (".json", ".safetensors") else path
    if source != path:
        finetune.config_and_vocab(source)
    clip = weights.load_clip(source)
    clip(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)) if source != path else None


def read_checkpoint(path):
    part = torch.nn.Linear(3, 2)
    run = Run(RunConfig(resume="true"), path.parent, ALONE, {"train": "x"})
    if path.stem == "best":
        run.load_best(part, 4)
    else:
        run.restore(4, model=part, optimizer=torch.optim.AdamW(part.parameters()))
    torch.set_num_threads(1)


def read_run_folder(path):
    os.chdir(path.parents[2])
    read_run(path.parent)
    closing.saved_table(path.parent)
    closing.newest_run()
    finetune.median_run_of(path.parent)
    chain.newest_student(finetune.Config(), VOCAB)
    Run(RunConfig(resume="auto"), path.parent, ALONE, {"train": "x"}).finished()


def read_predictions(path):
    tasks.score(*(str(path.with_name(f"{name}.json")) for name in ("predictions", "gold", "odds")))


def read_stdin(path):
    """Lines for --predict, which Python decodes."""
    lines = path.read_text(errors="surrogateescape").splitlines(keepends=True) if path.is_file() else []
    for line in lines or ["a\n"]:
        task = tasks.TASKS[("rte", "squad1", "piqa")[line.count("\t") % 3]]
        tokenized(task, tasks.read_lines(task, [line]), VOCAB, 16)


def read_task(path):
    task = tasks.TASKS[{"diagnostic": "mnli", "piqa-labels": "piqa"}.get(path.stem, path.stem)]
    source = path.with_suffix(".jsonl").with_stem("piqa") if path.suffix == ".lst" else path
    for split in ("train", "dev", "test"):
        examples = load_examples(task, source, VOCAB, 16, "", split)
        examples.batch(np.arange(len(examples)))


def read_words(load):
    """Of a vocabulary's file, and of its folder."""
    def read(path):
        for source in (path, path.parent):
            words = load(source)
            words.decode(words.encode([TEXT])[0])
    return read


def read_subtitles(path):
    """The captions of a folder; what is written of them must be what is packed."""
    out = path.with_name("out.json")
    videos, _ = captions.find_videos(path.parent)
    found, rows, problems = captions.collect(path.parent, videos, {"a": 9.5, "b": 11})
    captions.write_captions(found, out)
    captions.write_tasks(rows, path.with_name("out.csv"))
    for name, row, _ in packing.read_captions(out) if found else ():
        assert name in found and not packing.caption_rows(row)[3], row
    packing.report(problems, path.with_name("out.txt"), False, 6)


FILM_TOWERS = [SimpleNamespace(rank=2, size=16, crop="none", resize="pillow"),
               SimpleNamespace(rank=3, size=16, crop="center", resize="ffmpeg")]


def read_film(path):
    """A video as features.py does, but for what is said and made; times that lie may make it long."""
    video.seconds_of(path)
    try:
        for _ in itertools.islice(video.read_video(path, FILM_TOWERS), 500):
            pass
    except video.BadVideo as bad:
        raise SystemExit(": ".join(bad.args)) from None


def read_tower(path):
    tower = load_tower(path.parent if path.parent.name == "hf" else path, 3 if "3d" in path.name else 2)
    tower(torch.zeros(1, 3, *[16] * (tower.rank == 3), tower.size, tower.size, dtype=torch.uint8))


def read_settings_of(path):
    one = extractor(path.parents[1])
    one.claim_folder()
    one.done("a")


# {name: (function that writes valid files, which of them are damaged, function that reads the damaged one)}
READERS = {
    "text": (make_texts, "*", lambda path: packing.pack_text([path], VOCAB, path.with_name("out.h5"))),
    "text pairs": (make_texts, "*",
                   lambda path: packing.pack_xtext([path], VOCAB, CLIP, path.with_name("out.h5"))),
    "text for a vocabulary": (make_texts, "*",
                              lambda path: packing.train_vocab([path], path.with_name("out.txt"), 60)),
    "captions": (make_videos, "captions.json", lambda path: pack(path.parent, out="out.h5")),
    "captions' folder": (make_videos, "caps/*", lambda path: pack(path.parents[1], "caps", "out.h5")),
    "list of videos": (make_videos, "videos.csv", lambda path: pack(path.parent, out="out.h5")),
    "features": (make_videos, "f?/*", lambda path: pack(path.parents[1], out="out.h5")),
    "packed text": (make_packed, "text.h5", read_blocks),
    "packed pairs": (make_packed, "pairs.h5", read_pairs),
    "packed videos": (make_packed, "videos.h5", read_clips),
    "vocab.txt": (make_vocabs, "vocab.txt", read_words(vocab.load_vocab)),
    "tokenizer_config.json": (make_vocabs, "tokenizer_config.json",
                              lambda path: read_words(vocab.load_vocab)(path.with_name("vocab.txt"))),
    "tokenizer.json": (make_vocabs, "bert/tokenizer.json", read_words(vocab.load_vocab)),
    "CLIP's tokenizer.json": (make_vocabs, "clip/tokenizer.json", read_words(vocab.load_clip_vocab)),
    "CLIP's merges": (make_vocabs, "*[sp]*.txt*", read_words(vocab.load_clip_vocab)),
    "config.json": (make_bert, "config.json", read_model),
    "model.safetensors": (make_bert, "model.safetensors", read_model),
    "pytorch_model.bin": (make_bert, "bin/*.bin", read_model),
    "older pytorch_model.bin": (make_bert, "old/*.bin", read_model),
    "electra": (lambda folder: make_bert(folder, embedding=8, model_type="electra"), "[cmt]*", read_model),
    "CLIP's folder": (make_clip, "clip/[cm]*", read_clip),
    "OpenAI's archive": (make_clip, "ViT.pt", read_clip),
    "OpenAI's state dict": (make_clip, "state.pt", read_clip),
    "cross-modal model": (make_models, "cross/cross.*", lambda path: weights.load_xdbert(path.parent)),
    "video encoder": (make_models, "video/*", lambda path: weights.load_video_encoder(path.parent)),
    "teacher's clips": (make_teacher, "teacher/*.json",
                        lambda path: closing.open_clips(path.parents[1] / "videos.h5", path.parent, VOCAB)),
    "fine-tuned model": (make_models, "[cs][lp]a*/[cm]*", lambda path: weights.load_task_model(path.parent)),
    "heads": (make_models, "heads/model/*", lambda path: closing.aligned_space(path.parents[1], "mlm+crd")),
    "checkpoint": (make_runs, "run/*.pt", read_checkpoint),
    "run folder": (make_runs, "out/*/*.json", read_run_folder),
    "GLUE's tables": (make_tasks, "*.tsv", read_task),
    "csv tables": (make_tasks, "*.csv", read_task),
    "TRACIE": (make_tasks, "tracie.txt", read_task),
    "PIQA": (make_tasks, "piqa*", read_task),
    "SQuAD": (make_tasks, "squad*", read_task),
    "SQuAD's predictions": (make_tasks, "[gpo][ord][dle]*.json", read_predictions),
    "standard input": (make_tasks, "stdin.txt", read_stdin),
    "subtitles": (make_subtitles, "*.[svjc]*", read_subtitles),
    "towers": (make_image_towers, "**/*", read_tower),
    "settings of features": (make_settings, "f2/*", read_settings_of),
}
if importlib.util.find_spec("av"):
    READERS["videos"] = make_films, "*.*", read_film


# ---------------------------------------------------------------------------- one case


def damage(rng, path):
    """Damages a valid file as its format allows; in one of forty cases something else stands in its place."""
    content, suffix = path.read_bytes(), path.suffix
    path.unlink()
    if rng.random() < 1 / 40:
        kind = rng.randrange(5)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            path.symlink_to(path.name)
        elif kind > 2:
            path.write_bytes(rng.choice(mutators.OTHERS) or b"\x80\x02" + mutators.hostile(rng) + b".")
        return False
    mutate = mutators.MUTATORS[suffix] if rng.random() < 0.75 else mutators.bytes_of
    try:
        content = mutate(rng, content)
    except Exception:  # a damage that its own format cannot hold
        content = mutators.bytes_of(rng, content)
    path.write_bytes(content)
    return mutators.valid_outside(suffix, content)


OUT_OF_MEMORY = re.compile("MemoryError|unable to allocate|can't allocate memory|(not enough|out of) memory",
                           re.I)


def run_case(name, case, seed, folder, valid):
    """-> (whether the outer layer was valid, "" = returned, "line" = refused, or what went wrong)."""
    _, pattern, read = READERS[name]
    rng = random.Random(f"{seed} {name} {case}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid, folder)
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    if case:
        paths = [rng.choice(paths)]
    outer = not case or damage(rng, paths[0])
    try:
        for path in paths:
            with one_line_end():
                read(path)
            for made in folder.glob("out.*"):
                made.unlink()
        ended = ""
    except SystemExit as stop:
        text = stop.code
        ended = "line" if isinstance(text, str) and text.strip() else f"SystemExit({text!r})"
        if not case:
            ended = f"refuses a valid file: {text}"
        if OUT_OF_MEMORY.search(str(text)) or isinstance(stop.__context__, MemoryError):
            ended = f"memory: {text}"[:300]
    except BaseException:
        ended = traceback.format_exc(limit=-4)
    if os.path.exists(mutators.PLANTED):
        os.unlink(mutators.PLANTED)
        ended = "a pickle made a file"
    return outer, ended


def run_cases(name, cases, seed, folder, valid, shared, report):
    """The work of a fork: cases under limits; `shared` holds the case at hand and the counts."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    for case in cases:
        shared[0] = case
        signal.alarm(SECONDS)
        outer, ended = run_case(name, case, seed, folder, valid)
        signal.alarm(0)
        shared[1] += ended == ""
        shared[2] += ended == "line"
        shared[3] += outer
        if ended not in ("", "line"):
            with report.open("a") as f:
                f.write(json.dumps([case, ended]) + "\n")
    shared[0] = cases.stop


def make(name, folder):
    """Writes the valid files of a reader, without a word."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        READERS[name][0](folder)


def fuzz(name, cases, seed, root):
    """Runs the cases of a reader in forks -> {"name", "cases", "accepted", "refused", "outer", "seconds",
    "failures": [[case, what]]}."""
    work = root / re.sub(r"\W", "-", name)
    report, valid, began = work / "report", work / "valid", time.monotonic()
    work.mkdir()
    make(name, valid)
    shared = np.frombuffer(mmap.mmap(-1, 4 * 8), np.int64)
    report.touch()
    while (first := int(shared[0])) < cases:
        if not (child := os.fork()):
            status = 1
            try:
                run_cases(name, range(first, min(cases, first + BATCH)), seed, work / "case", valid, shared,
                          report)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)  # minus the signal
            what = f"{SECONDS} s are over" if code == -signal.SIGALRM else f"ended with {code}"
            with report.open("a") as f:
                f.write(json.dumps([int(shared[0]), what]) + "\n")
            shared[0] += 1
    failures = [json.loads(line) for line in report.read_text().splitlines()]
    found = dict(zip(("accepted", "refused", "outer"), shared[1:].tolist()))
    shutil.rmtree(work)
    return dict(name=name, cases=cases, **found, failures=failures, seconds=time.monotonic() - began)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(READERS) * 100, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append",
                        help="one reader; may be given again (default: all)")
    parser.add_argument("--case", type=int, help="this case of --reader alone")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = args.reader or list(READERS)
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    mutators.PLANTED = str(root / "planted")
    if args.case is not None:
        make(names[0], root / "valid")
        outer, ended = run_case(names[0], args.case, args.seed, root / "case", root / "valid")
        print(f"{ended or 'accepted'}\nouter layer valid: {outer}; files: {root / 'case'}")
        return int(ended not in ("", "line"))
    share, began = math.ceil(args.cases / len(names)), time.monotonic()
    form = "{:<24}{:>7}{:>10}{:>9}{:>7}{:>8}{:>7}".format
    print(form("reader", "cases", "accepted", "refused", "outer", "failed", "ms"), flush=True)
    total, failures = dict.fromkeys(("cases", "accepted", "refused", "outer"), 0), 0
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        for found in pool.map(fuzz, names, *zip(*[(share, args.seed, root)] * len(names))):
            print(form(*(found[key] for key in ("name", *total)), len(found["failures"]),
                       f"{1e3 * found['seconds'] / share:.1f}"), flush=True)
            for case, what in found["failures"][:9]:
                print(f'--reader "{found["name"]}" --case {case} --seed {args.seed}: {what.strip()}')
            total = {key: total[key] + found[key] for key in total}
            failures += len(found["failures"])
    shutil.rmtree(root)
    print(f"seed {args.seed}: {len(names)} readers, "
          + ", ".join(f"{count:,} {name}" for name, count in total.items()).replace("outer", "valid outside")
          + f", {failures} failures, {time.monotonic() - began:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
