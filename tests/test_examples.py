"""Proves that batches, truncation and SQuAD's windows equal their plain constructions, that answers are cut
out exactly, and that the orders of training and evaluation visit each example once.

Run: python -m pytest -q tests/test_examples.py
"""
import dataclasses
import errno
import json
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune
from common import keyed_integers, keyed_uniform
from conftest import stop_line, tiny_clip_vocab
from model import BERT, XDBERT, BERTConfig, CLIPConfig, CLIPText, TaskModel
from parts.examples import (ANSWER_TOKENS, EVAL_TOKENS, QUESTION_TOKENS, WINDOW_STRIDE, Order,
                            batches_by_length, load_examples, tokenized, truncate)
from parts.tasks import TASKS, Rows, read_lines
from parts.vocab import SPECIALS, Vocab
from test_metrics import squad
from test_tasks import GLUE, MNLI_HEAD, put, rows, table

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-:;()汶川"
VOCAB = Vocab([*SPECIALS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "cat", "dog", "sat", "ran",
               "mat"])

# ---------------------------------------------------------------------------- tokens and batches


def random_words(most, *keys):
    """A text of up to `most` words of the vocabulary's letters, the same for the same keys."""
    n = int(keyed_integers(most + 1, "words", *keys))
    sizes = 1 + keyed_integers(5, "sizes", *keys, np.arange(n))
    return " ".join("".join(LETTERS[i] for i in keyed_integers(36, "letters", *keys, k, np.arange(size)))
                    for k, size in enumerate(sizes))


def make_rows(name, n, most=12, labelled=True):
    task, second = TASKS[name], None
    texts = [[random_words(most, name, i, k) for k in range(len(task.text))] for i in range(n)]
    if task.kind == "choice":
        second = [row[1:] for row in texts]
    elif len(task.text) == 2:
        second = [row[1] for row in texts]
    labels = [i % 5 / 2 if task.kind == "regress" else i % len(task.words) for i in range(n)]
    return Rows([row[0] for row in texts], second, labels if labelled else None, [str(i) for i in range(n)])


def words_of(examples):
    """Ids of each example without [CLS], [SEP] and padding."""
    batch = examples.batch(np.arange(len(examples)))
    return [ids[mask][1:-1].tolist() for ids, mask in zip(batch["ids"], batch["mask"])]


def cut_plainly(first, second, room):
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


def test_truncation_equals_the_plain_loop():
    first, second = (x.ravel() for x in np.meshgrid(np.arange(24), np.arange(24)))
    for room in (0, 1, 2, 5, 10, 11, 23, 46, 60):
        found = np.stack(truncate(first, second, room), 1).tolist()
        assert found == [list(map(len, cut_plainly(range(a), range(b), room))) for a, b in zip(first, second)]


@pytest.mark.parametrize("name", ["sst2", "rte", "stsb", "swag", "piqa"])
@pytest.mark.parametrize("max_length", [5, 12, 23, 200])
def test_batch_equals_its_plain_construction(name, max_length):
    task, n = TASKS[name], 23
    found = make_rows(name, n)
    examples = tokenized(task, found, VOCAB, max_length)
    plain, cut = [], 0
    for i in range(n):
        second = found.second[i] if found.second else None
        candidates = second if task.kind == "choice" else [second]
        row, was_cut = [], False
        for text in candidates:
            a, b = VOCAB.encode([found.first[i], text or ""])
            short = cut_plainly(a, b, max_length - 3) if text is not None else (a[:max_length - 2], [])
            was_cut |= short != (a, b)
            a, b = short
            ids = [VOCAB.cls, *a, VOCAB.sep] + ([*b, VOCAB.sep] if text is not None else [])
            row.append((ids, [0] * (len(a) + 2) + [1] * (len(ids) - len(a) - 2)))
        plain.append(row)
        cut += was_cut
    assert len(examples) == n and examples.truncated == cut
    assert examples.lengths.tolist() == [max(len(ids) for ids, _ in row) for row in plain]
    for index in (np.arange(n), np.array([22, 3, 3]), [5]):
        batch = examples.batch(index)
        T = max(examples.lengths[index])
        expected = np.array([[(ids + [VOCAB.pad] * (T - len(ids)), segments + [0] * (T - len(ids)),
                               [True] * len(ids) + [False] * (T - len(ids))) for ids, segments in plain[i]]
                             for i in index])  # (b, K, 3, T)
        if task.kind != "choice":
            expected = expected[:, 0]
        for k, key in enumerate(("ids", "segments", "mask")):
            assert batch[key].numpy().tolist() == expected[..., k, :].tolist()
        dtypes = [batch[key].dtype for key in ("ids", "segments", "mask")]
        assert dtypes == [torch.int64, torch.int64, torch.bool]
        labels = torch.tensor([found.labels[i] for i in index])
        assert batch["labels"].tolist() == labels.tolist()
        assert batch["labels"].dtype == (torch.float32 if name == "stsb" else torch.int64)
    assert "labels" not in tokenized(task, make_rows(name, 3, labelled=False), VOCAB, 12).batch([0])


def test_empty_texts_and_unknown_tokens():
    found = Rows(["", "汶 x é"], ["", ""], None, ["0", "1"])
    examples = tokenized(TASKS["rte"], found, VOCAB, 12)
    batch = examples.batch([0, 1])
    assert batch["ids"][0].tolist() == [VOCAB.cls, VOCAB.sep, VOCAB.sep, 0, 0, 0]
    assert batch["segments"][0].tolist() == [0, 0, 1, 0, 0, 0]
    found = Rows(["cat ☃ dog ☃"], None, None, ["0"])
    assert tokenized(TASKS["sst2"], found, VOCAB, 12).unknown == 0.5
    assert "--max_length 4" in stop_line(tokenized, TASKS["sst2"], found, VOCAB, 4)


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    path = put(tmp_path / "train.jsonl", '{"goal": "g \\ud83d", "sol1": "a", "sol2": "b"}\n')
    put(tmp_path / "train-labels.lst", "0\n")
    says = stop_line(load_examples, TASKS["piqa"], path, VOCAB, 32, "", "dev")
    assert str(path) in says and "surrogate" in says


def test_rows_without_gold_label_are_counted(tmp_path):
    row = ["0", *"abcdefg", "one", "two"]
    path = put(tmp_path / "dev.tsv", table([*MNLI_HEAD, "gold_label"], [*row, "neutral"], [*row, "-"]))
    examples = load_examples(TASKS["mnli"], path, VOCAB, 32, "", "dev")
    assert len(examples) == 1 and examples.skipped == 1


def test_what_is_not_trained_on_is_said(tmp_path, capsys):
    header, lines = GLUE["qqp"][:2]
    path = put(tmp_path / "train.tsv", table(header, *lines, ["4", "8", "9", "why"]))
    qqp = load_examples(TASKS["qqp"], path, VOCAB, 32, "", "train")
    finetune.check_examples(TASKS["qqp"], SimpleNamespace(beside=(), name="x"), qqp, {"": qqp}, finetune.Config())
    assert "QQP: 2 training examples, 2 to evaluate on, 2 rows that lack columns left out\n" in capsys.readouterr().out
    path = put(tmp_path / "msr_paraphrase_test.txt", table(GLUE["mrpc"][0], *GLUE["mrpc"][1]))
    mrpc = load_examples(TASKS["mrpc"], path, VOCAB, 32, "", "dev")
    finetune.check_examples(TASKS["mrpc"], SimpleNamespace(beside=(), name="x"), mrpc, {"": mrpc}, finetune.Config())
    assert ", evaluated on msr_paraphrase_test.txt\n" in capsys.readouterr().out


def test_lines_of_standard_input_become_batches():
    found = read_lines(TASKS["piqa"], ["goal\tx\ty\tz\n", "other\tu\tv\tw\n"])
    assert tokenized(TASKS["piqa"], found, VOCAB, 12).batch([0, 1])["ids"].shape[:2] == (2, 3)
    examples = tokenized(TASKS["squad1"], read_lines(TASKS["squad1"], ["who ?\tThe cat sat."]), VOCAB, 24)
    assert examples.answers(*logits_for(examples))[0]["1"] in "The cat sat."


# ---------------------------------------------------------------------------- CLIP's tokens

CLIP_VOCAB = tiny_clip_vocab()
TOWER = CLIPConfig(CLIP_VOCAB.size, layers=1, hidden=16, heads=2, intermediate=32, positions=9, projection=8)


def segments_plainly(text, positions):
    """The two segments of a sentence: lists of ids, None = not in use; and whether the rest was cut."""
    (ids,), room = CLIP_VOCAB.encode([text]), positions - 2
    parts = [ids[:room], ids[room:2 * room]]
    parts = [[CLIP_VOCAB.start, *part, CLIP_VOCAB.end] if part or i == 0 else None
             for i, part in enumerate(parts)]
    return parts, len(ids) > 2 * room


def whole(batch, rows, segments, length):
    """What a compact batch stands for: ids (rows, segments, length), 0 = padding, and which of them are real.

    A segment goes from a start to its end; the first ones of a row are in use.
    """
    ids, mask = np.zeros((rows, segments, length), np.int64), np.zeros((rows, segments, length), bool)
    flat = batch["clip_ids"].flatten()[batch["clip_place"]]
    for row in range(rows):
        real = flat[row][batch["clip_mask"][row]].tolist()
        ends = [i for i, token in enumerate(real) if token == CLIP_VOCAB.end]
        assert len(ends) <= segments and ends[-1] == len(real) - 1
        for s, (a, b) in enumerate(zip([0, *(end + 1 for end in ends)], ends)):
            ids[row, s, :b + 1 - a], mask[row, s, :b + 1 - a] = real[a:b + 1], True
    return ids, mask


@pytest.mark.parametrize("name", ["sst2", "rte", "stsb", "swag", "piqa"])
@pytest.mark.parametrize("positions", [3, 9, 40])
def test_clip_batch_equals_its_plain_construction(name, positions):
    """Two segments a sentence: (B, 2, L) for one sentence, (B, 4, L) for a pair, (B K, 4, L) for choice."""
    task, n = TASKS[name], 23
    found = make_rows(name, n)
    found.first[4] = ""
    config = dataclasses.replace(TOWER, positions=positions)
    examples = tokenized(task, found, VOCAB, 24, beside=(config, CLIP_VOCAB))
    alone, cut = tokenized(task, found, VOCAB, 24), 0
    rows = []  # of each example: of each sequence: its segments in use
    for first, second in zip(found.first, found.second or [None] * n):
        one, was_cut = segments_plainly(first, positions)
        candidates = []
        for text in second if task.kind == "choice" else [second]:
            two, too = ([], False) if text is None else segments_plainly(text, positions)
            candidates.append([part for part in [*one, *two] if part is not None])
            was_cut |= too
        rows.append(candidates)
        cut += was_cut
    assert examples.clip_truncated == cut and (cut > 0) == (positions < 40)
    for index in (np.arange(n), np.array([22, 4, 4]), [4], [5]):
        batch, plain = examples.batch(index), [sequence for i in index for sequence in rows[i]]
        for key, value in alone.batch(index).items():  # beside it nothing changes
            assert torch.equal(batch[key], value)
        segments = 2 if name == "sst2" else 4
        assert batch["clip_place"].shape[0] == len(plain) == batch["ids"].flatten(0, -2).shape[0]
        assert len(batch["clip_ids"]) == sum(map(len, plain)) <= segments * len(plain)
        ids, mask = whole(batch, len(plain), segments, positions)
        assert batch["clip_ids"].shape[1] == max(len(part) for row in plain for part in row) <= positions
        assert [[part[real].tolist() for part, real in zip(row, m) if real.any()]
                for row, m in zip(ids, mask)] == plain
        assert mask[:, 0, 0].all()  # never empty
        dtypes = [batch[f"clip_{key}"].dtype for key in ("ids", "place", "mask")]
        assert dtypes == [torch.int64, torch.int64, torch.bool]


def full_batch(batch, rows, segments, length):
    """The same with every segment of (rows, segments, length) run, empty ones and padding, under a mask."""
    ids, mask = map(torch.from_numpy, whole(batch, rows, segments, length))
    place = torch.arange(rows * segments * length).view(rows, -1)
    return batch | {"clip_ids": ids.flatten(0, 1), "clip_place": place, "clip_mask": mask.flatten(1)}


@pytest.mark.parametrize("name", ["sst2", "rte", "swag"])
def test_segments_that_are_not_run_change_no_logit(name):
    """The compact batch against the whole (B, 2, 77) or (B, 4, 77) under its mask; with noise behind it."""
    torch.manual_seed(0)
    config = BERTConfig(VOCAB.size, layers=1, hidden=16, heads=2, intermediate=32, max_positions=40,
                        init_std=0.2)
    tower = dataclasses.replace(TOWER, positions=77)
    task, found = TASKS[name], make_rows(name, 7, most=25)
    model = TaskModel(XDBERT(BERT(config), CLIPText(tower)), task.kind, len(task.labels)).double().eval()
    examples = tokenized(task, found, VOCAB, 24, beside=(tower, CLIP_VOCAB))
    batch = examples.batch(np.arange(7))
    del batch["labels"]
    logits, sequences = model(**batch), batch["ids"].flatten(0, -2).shape[0]
    full = full_batch(batch, sequences, 2 if name == "sst2" else 4, 77)
    assert full["clip_ids"].numel() > 1.5 * batch["clip_ids"].numel()
    torch.testing.assert_close(model(**full), logits)
    padding = ~full["clip_mask"].view(full["clip_ids"].shape)
    full["clip_ids"][padding] = torch.randint(CLIP_VOCAB.size, (int(padding.sum()),))
    torch.testing.assert_close(model(**full), logits)
    for key in ("clip_ids", "ids"):  # and what is real does count
        torch.testing.assert_close(model(**batch), logits, rtol=0, atol=0)
        other = batch | {key: batch[key].clone()}
        other[key][..., 1] = 40
        assert (model(**other) - logits).abs().max() > 1e-6, key


def test_clip_reads_the_original_text_and_keeps_its_tokens_apart(tmp_path):
    """Its own clean-up (HTML, white space, case), in a cache of its own vocabulary's."""
    texts = ["The &amp;amp; cat\u3000SAT", "汶 <|endoftext|> cat's 42", " "]
    found = Rows(texts, None, None, ["0", "1", "2"])
    for _ in range(2):  # made, then read
        examples = tokenized(TASKS["sst2"], found, VOCAB, 40, tmp_path,
                             beside=(dataclasses.replace(TOWER, positions=77), CLIP_VOCAB))
        batch = examples.batch([0, 1, 2])
        flat = batch["clip_ids"].flatten()[batch["clip_place"]]
        ids = [row[mask].tolist() for row, mask in zip(flat, batch["clip_mask"])]
        assert ids == [[CLIP_VOCAB.start, *text, CLIP_VOCAB.end] for text in CLIP_VOCAB.encode(texts)]
        assert words_of(examples) == VOCAB.encode(texts) and len(list(tmp_path.iterdir())) == 2
    assert CLIP_VOCAB.end in ids[1][1:-1] and ids[2] == CLIP_VOCAB.specials
    assert ids[0][1:4] == CLIP_VOCAB.encode(["the & cat"])[0]


def test_clip_alone_reads_start_first_end_second_end():
    found = Rows(["the cat", "a"], ["sat", ""], [0, 1], ["0", "1"])
    examples = tokenized(TASKS["rte"], found, CLIP_VOCAB, 12)
    batch, (the, cat, sat) = examples.batch([0, 1]), CLIP_VOCAB.encode(["the cat sat"])[0]
    start, end = CLIP_VOCAB.start, CLIP_VOCAB.end
    assert batch["ids"].tolist()[0] == [start, the, cat, end, sat, end]
    assert batch["ids"][1, [0, 2, 3]].tolist() == [start, end, end]
    assert batch["mask"].sum(1).tolist() == [6, 4] and examples.unknown == 0 and "clip_ids" not in batch


# ---------------------------------------------------------------------------- the cache of tokens, limits


@pytest.fixture
def count_encoding(monkeypatch):
    """Counts how often VOCAB is asked."""
    calls, encode = [], VOCAB.encode

    def counting(texts):
        calls.append(len(texts))
        return encode(texts)
    monkeypatch.setattr(VOCAB, "encode", counting)
    return calls


def test_cache_is_read_again_remade_when_damaged_and_follows_the_content(tmp_path, count_encoding):
    path = put(tmp_path / "train.tsv", table(["sentence", "label"], ["the cat sat", "1"], ["a dog", "0"]))
    cache = tmp_path / "cache"

    def load(max_length=8, vocab=VOCAB):
        examples = load_examples(TASKS["sst2"], path, vocab, max_length, cache, "train")
        return examples.batch([0, 1])["ids"].tolist(), len(count_encoding), len(list(cache.iterdir()))
    ids, *counts = load()
    assert counts == [1, 1] and load() == (ids, 1, 1)
    assert load(max_length=200) == (ids, 1, 1) and load(max_length=5)[1:] == (1, 1)  # independent of the cut
    kept = next(cache.iterdir())
    whole = kept.read_bytes()
    flipped = whole.replace(ids[0][1].to_bytes(4, "little"), b"\x07\0\0\0", 1)  # "the" is another token
    for n, damaged in enumerate((b"", whole[:100], whole[:-40], b"\x80\x04N.", flipped)):
        assert damaged != whole
        kept.write_bytes(damaged)
        assert load() == (ids, 2 + n, 1) and kept.read_bytes() == whole
    # of a rank that was killed while another one wrote the same
    kept.with_name(f"{kept.name}.{socket.gethostname()}.99999999.tmp").mkdir()
    assert load() == (ids, 6, 1)
    put(path, table(["sentence", "label"], ["the cat ran", "1"], ["a dog", "0"]))
    other, *counts = load()
    assert other != ids and counts == [7, 2]
    cased = dataclasses.replace(VOCAB, lower=False)
    assert load(vocab=cased)[2] == 3
    assert not list(cache.glob("*.tmp"))


def test_cache_tells_apart_texts_that_join_alike(tmp_path):
    for texts in (["the cat", "sat"], ["the ca", "tsat"]):
        examples = tokenized(TASKS["sst2"], Rows(texts, None, None, ["0", "1"]), VOCAB, 20, tmp_path)
        assert words_of(examples) == VOCAB.encode(texts)


def test_cache_that_cannot_be_written_is_one_printed_line(tmp_path, capsys, monkeypatch):
    def full(*args, **kw):
        raise OSError(errno.ENOSPC, "No space left on device")
    put(tmp_path / "file", "x")
    monkeypatch.setattr(np, "savez", full)
    for folder in (tmp_path / "file", tmp_path / "full"):
        examples = tokenized(TASKS["sst2"], make_rows("sst2", 3), VOCAB, 20, folder)
        out = capsys.readouterr().out
        assert len(examples) == 3 and out.count("\n") == 1 and str(folder) in out
    assert not list((tmp_path / "full").iterdir())
    monkeypatch.undo()
    tokenized(TASKS["sst2"], make_rows("sst2", 3), VOCAB, 20, tmp_path / "cache")
    assert capsys.readouterr().out == ""


def test_limit_draws_by_key_and_keeps_the_order(tmp_path):
    lines = [[f"x{i}", str(i % 2)] for i in range(50)]
    path = put(tmp_path / "train.tsv", table(["sentence", "label"], *lines))

    def ids(limit, seed=0):
        examples = load_examples(TASKS["sst2"], path, VOCAB, 8, "", "train", limit, seed)
        return [int(i) for i in examples.ids]
    assert ids(0) == ids(50) == ids(99) == list(range(50))
    assert len(ids(10)) == 10 and ids(10) == sorted(ids(10)) and ids(10) == ids(10) and ids(10) != ids(10, 1)
    assert set(ids(10)) < set(ids(11))
    smallest = np.argsort(keyed_uniform("limit", 0, np.arange(50)))[:10]
    assert ids(10) == sorted(smallest.tolist())
    examples = load_examples(TASKS["sst2"], path, VOCAB, 8, "", "train", 10)
    assert examples.labels.tolist() == [i % 2 for i in ids(10)]


def test_read_holds_out_a_tenth_of_its_rows_by_id(tmp_path):
    lines = [f"c{i},text {i},{i}" for i in range(400)]
    path = put(tmp_path / "train.csv", "\n".join(["id,excerpt,target", *lines]))
    train, dev = (load_examples(TASKS["read"], path, VOCAB, 9, "", split) for split in ("train", "dev"))
    assert len(train) + len(dev) == 400 and not set(train.ids) & set(dev.ids) and 25 < len(dev) < 55
    put(path, "\n".join(["id,excerpt,target", *lines[::-1]]))
    again = load_examples(TASKS["read"], path, VOCAB, 9, "", "dev")
    assert set(again.ids) == set(dev.ids) and again.labels.tolist() == [float(i[1:]) for i in again.ids]


def steps_of(lengths, batch_size, steps):
    order = Order(lengths, batch_size, steps, seed=0)
    return [order(step) for step in range(steps)]


def test_training_order_visits_each_example_once_an_epoch_with_little_padding():
    lengths = 5 + keyed_integers(100, "lengths", np.arange(1000))
    steps = steps_of(lengths, 8, 375)  # three epochs of 125 batches
    stream = np.concatenate(steps)
    assert np.bincount(stream).tolist() == [3] * 1000
    assert sum(len(part) * lengths[part].max() for part in steps) < 1.06 * lengths[stream].sum()
    assert abs(np.corrcoef(np.arange(3000), lengths[stream])[0, 1]) < 0.1  # no drift from short to long
    again = Order(lengths, 8, 375, seed=0)
    assert again(260).tolist() == steps[260].tolist()  # a resumed run needs no history
    assert Order(lengths, 8, 375, seed=1)(0).tolist() != steps[0].tolist()
    # other partners in every epoch, even where no two lengths are equal
    batches = [frozenset(part.tolist()) for part in steps_of(np.arange(1000), 8, 250)]
    assert not {*batches[:125]} & {*batches[125:]}


@pytest.mark.parametrize("n", [96, 860, 2500])
def test_order_keeps_epochs_apart(n):
    """A small set is not repeated within a batch, and its first epoch is nearly all of it."""
    steps = steps_of(5 + keyed_integers(100, "lengths", np.arange(n)), 32, 3 * n // 32)
    assert np.mean([len(set(part.tolist())) for part in steps]) > 30
    assert len(set(np.concatenate(steps)[:n].tolist())) > 0.95 * n


def test_order_of_fewer_examples_than_a_batch_repeats_them_evenly():
    assert np.bincount(np.concatenate(steps_of(np.array([5, 9, 7]), 8, 3))).tolist() == [8, 8, 8]


def test_evaluation_batches_hold_each_example_once_within_the_budget(tmp_path):
    lines = [" ".join(["word"] * int(n)) + "\t0" for n in 1 + keyed_integers(90, "words", np.arange(2003))]
    path = put(tmp_path / "train.tsv", "\n".join(["sentence\tlabel", *lines]))
    examples = load_examples(TASKS["sst2"], path, VOCAB, 128, "", "train")
    parts = list(batches_by_length(examples))
    assert np.sort(np.concatenate(parts)).tolist() == list(range(2003))
    assert (np.diff(examples.lengths[np.concatenate(parts)]) <= 0).all() and len(parts) > 3
    assert all(len(part) * examples.lengths[part].max() <= EVAL_TOKENS for part in parts)


def test_real_sst2_is_tokenised_and_batched(real_data, bert_vocab):
    path = real_data / "glue" / "SST-2" / "dev.tsv"
    batch = load_examples(TASKS["sst2"], path, bert_vocab, 64, "", "dev").batch([0])
    assert bert_vocab.decode(batch["ids"][0]) == "[CLS] it ' s a charming and often affecting journey. [SEP]"
    assert batch["labels"].tolist() == [1]


# ---------------------------------------------------------------------------- SQuAD

HARD = ["The café  costs 3½ €, naïve\n\nZoë paid.",
        "汶川大地震 in 2008年, 日本語テキスト and 한국어 텍스트!",
        "Cafe\u0301 Ångström (Å\u030a) said: \u201cno\u201d \u2014 19th-century e\u0301te\u0301.",
        "a\u200bb  soft\u00adhyphen \U0001f600 and \U0001f468\u200d\U0001f469 x\u0301\u0302y हिन्दी\ttab",
        "literal [SEP] and [MASK] in \u00a0 text\u2028next  line ", "   lead and trail   "]


def span_rows(contexts, questions, spans=None):
    """Rows of SQuAD by hand. spans: (first character, behind the last), or None without labels."""
    extra = {"answer": ["none" if span == (-1, -1) else "exact" for span in spans]} if spans else {}
    ids = [f"q{i}" for i in range(len(contexts))]
    return Rows(list(questions), list(contexts), spans, ids, extra)


def squad_examples(found, max_length, vocab=VOCAB, name="squad2"):
    return tokenized(TASKS[name], found, vocab, max_length)


def windows_plainly(tokens, room):
    """[(start, length)], as BERT's own code goes through a context."""
    found, start = [], 0
    while True:
        length = min(tokens - start, room)
        found.append((start, length))
        if start + length == tokens:
            return found
        start += min(length, WINDOW_STRIDE, room)


def home_plainly(windows, token):
    """Number of the window in which a token has most context, by the formula of BERT's code."""
    scores = [min(token - b, b + n - 1 - token) + 0.01 * n if b <= token < b + n else -1 for b, n in windows]
    return scores.index(max(scores))


def answer_plainly(windows, question, start, end):
    """(best sum, first, last token, null) of one question. start, end: logits of each of its windows."""
    best, null = (-np.inf, 0, 0), min(s[0] + e[0] for s, e in zip(start, end))
    shift = question + 2
    for w, (begin, length) in enumerate(windows):
        for i in range(length):
            if home_plainly(windows, begin + i) != w:
                continue
            for j in range(i, min(length, i + ANSWER_TOKENS)):
                total = np.float32(start[w][shift + i] + end[w][shift + j])
                if total > best[0]:
                    best = total, begin + i, begin + j
    return *best, null


def logits_for(examples, *keys):
    """Random start and end logits (windows, T), -inf on padding."""
    T = int(examples.lengths.max())
    shape = np.arange(len(examples))[:, None], np.arange(T)
    padding = np.arange(T) >= examples.lengths[:, None]
    return [np.where(padding, -np.inf, 6 * keyed_uniform(side, *keys, *shape) - 3).astype(np.float32)
            for side in ("start", "end")]


@pytest.mark.parametrize("max_length", [12, 40, 150, 300])
def test_windows_and_answers_equal_the_plain_loop(max_length):
    contexts = [random_words(120, "context", i) or "x" for i in range(12)]
    contexts += contexts[:2]  # two questions on one context
    questions = [random_words(40, "question", i)[:max_length // 2] for i in range(14)]
    examples = squad_examples(span_rows(contexts, questions), max_length)
    logits, w = logits_for(examples, max_length), 0
    texts, scores = examples.answers(*logits, null_threshold=0.5)
    batch = examples.batch(np.arange(len(examples)))
    spans = [e.offsets for e in VOCAB.tokenizer.encode_batch(contexts, add_special_tokens=False)]
    for q, (question, context) in enumerate(zip(VOCAB.encode(questions), VOCAB.encode(contexts))):
        question = question[:QUESTION_TOKENS]
        windows = windows_plainly(len(context), max_length - 3 - len(question))
        for k, (begin, length) in enumerate(windows):
            ids = [VOCAB.cls, *question, VOCAB.sep, *context[begin:begin + length], VOCAB.sep]
            assert batch["ids"][w + k][batch["mask"][w + k]].tolist() == ids
            assert batch["segments"][w + k].sum() == length + 1 and examples.ids[w + k] == f"q{q}"
        part = slice(w, w + len(windows))
        homes = [home_plainly(windows, token) for token in range(len(context))]
        for k, (begin, length) in enumerate(windows):
            expected = np.zeros((2, batch["ids"].shape[1]), bool)
            expected[0, len(question) + 2:][:length] = True
            expected[1, len(question) + 2:][:length] = [home == k for home in homes[begin:begin + length]]
            assert (np.stack(examples.context_masks(expected.shape[1]))[:, w + k] == expected).all()
        best, first, last, null = answer_plainly(windows, len(question), logits[0][part], logits[1][part])
        assert scores[f"q{q}"] == pytest.approx(null - best, abs=1e-5)
        expected = contexts[q][spans[q][first][0]:spans[q][last][1]]
        assert texts[f"q{q}"] == ("" if null - best > 0.5 else expected)
        w += len(windows)
    assert w == len(examples) and examples.questions == [f"q{i}" for i in range(14)]
    squad1 = squad_examples(span_rows(contexts, questions), max_length, name="squad1")
    assert all(squad1.answers(*logits, null_threshold=-99)[0].values())


def test_predicted_characters_are_always_a_substring_of_the_context(bert_vocab):
    for vocab in (VOCAB, bert_vocab, Vocab(bert_vocab.tokens, lower=False, strip_accents=False)):
        examples = squad_examples(span_rows(HARD, ["who ?"] * len(HARD)), 16, vocab, "squad1")
        for seed in range(40):
            texts, _ = examples.answers(*logits_for(examples, seed))
            for text, context in zip(texts.values(), HARD):
                assert text and text in context and text == text.strip()


@pytest.mark.parametrize("context, answer", [
    (HARD[0], "café"), (HARD[0], "naïve\n\nZoë"), (HARD[0], "3½ €"), (HARD[1], "大地震"), (HARD[1], "한국어"),
    (HARD[2], "Cafe\u0301"), (HARD[2], "19th"), (HARD[2], "e\u0301te\u0301"), (HARD[3], "\U0001f600"),
    (HARD[3], "हिन्दी"), (HARD[4], "text\u2028next"), (HARD[4], "[SEP]"), (HARD[5], "lead and trail")])
def test_marked_answer_comes_back_to_the_character(context, answer, bert_vocab):
    start = context.index(answer)
    found = span_rows([context], ["what ?"], [(start, start + len(answer))])
    examples = squad_examples(found, 30, bert_vocab)
    assert pointed(examples) == {"q0": answer}


def pointed(examples):
    """The texts that come out where the logits point at the labels, and at [CLS] where there is none."""
    T = int(examples.lengths.max())
    start, end = (5.0 * (np.arange(T) == side[:, None]) for side in examples.labels.T)
    start[:, 0] = end[:, 0] = np.where(examples.labels[:, 0] == 0, 5, -5)
    return examples.answers(start, end)[0]


def test_true_answers_of_xquad_are_recovered(real_data, bert_vocab):
    task = TASKS["squad1"]
    path = real_data / "squad" / "xquad.en.json"
    examples = load_examples(task, path, bert_vocab, 384, "", "dev")
    gold = rows("squad1", path)
    assert (len(examples.questions), examples.moved, examples.missing) == (1190, 0, 0)
    texts = pointed(examples)
    expected = [context[a:b] for context, (a, b) in zip(gold.second, gold.labels)]
    differs = [(text, texts[name]) for name, text in zip(gold.ids, expected) if text != texts[name]]
    # the one answer that ends inside of a token comes back with the whole token
    assert differs == [("7,000,000 square kilometres (2,70", "7,000,000 square kilometres (2,700")]


def test_answers_of_squad2_are_recovered_and_unanswerable_ones_empty(real_data, bert_vocab, tmp_path):
    content = json.loads((real_data / "squad" / "dev-v2.0.rebuilt.json").read_text())
    content["data"] = [dict(article, paragraphs=article["paragraphs"][:1]) for article in content["data"]]
    path = put(tmp_path / "dev-v2.0.json", json.dumps(content))
    examples = load_examples(TASKS["squad2"], path, bert_vocab, 128, "", "train", limit=300)
    gold = rows("squad2", path)
    assert len(examples.questions) == 300 and len(examples) > 400
    labels = dict(zip(gold.ids, zip(gold.second, gold.labels)))
    texts = pointed(examples)
    wrong = 0
    for name, text in texts.items():
        context, (a, b) = labels[name]
        wrong += text != (context[a:b] if a >= 0 else "")
    assert set(texts) < set(gold.ids) and sum(map(bool, texts.values())) > 100 and wrong <= 3


def test_labels_stand_only_in_windows_that_hold_the_whole_answer():
    context, n = " ".join(LETTERS[:36]), 36  # 36 tokens of one character, with spaces between
    for size in (1, 3, 7):
        spans = [(2 * i, 2 * (i + size) - 1) for i in range(n - size + 1)]
        examples = squad_examples(span_rows([context] * len(spans), ["who ?"] * len(spans), spans), 16)
        batch = examples.batch(np.arange(len(examples)))
        assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (len(examples), 2)
        held = 0
        for ids, (first, last), name in zip(batch["ids"].tolist(), batch["labels"].tolist(), examples.ids):
            answer = VOCAB.encode([context[slice(*spans[int(name[1:])])]])[0]
            whole = any(ids[i:i + size] == answer for i in range(6, len(ids)))  # behind the question
            assert (ids[first:last + 1] == answer and first >= 6) if whole else (first, last) == (0, 0)
            held += whole
        assert 0 < held < len(examples)
    for span in ((-1, -1), (4, 5)):  # no answer, and one of a character that has no token
        examples = squad_examples(span_rows(["cat \u200b dog"], ["who ?"], [span]), 16)
        assert examples.labels.tolist() == [[0, 0]]


def test_moved_and_missing_answers_are_counted_and_skipped_in_training(tmp_path):
    answers = [("cat", 2), ("cat", 9), ("dog", 0), ("", 1)]
    content = squad({f"q{i}": [answer] for i, answer in enumerate(answers)}, "1.1", "a cat and a cat ran .")
    path = put(tmp_path / "f.json", json.dumps(content))
    for split, size in (("train", 2), ("dev", 4)):
        examples = load_examples(TASKS["squad1"], path, VOCAB, 40, "", split)
        assert (len(examples.questions), examples.moved, examples.missing) == (size, 1, 2)
    unlabelled = load_examples(TASKS["squad1"], path, VOCAB, 40, "", "test")
    assert unlabelled.labels is None and len(unlabelled) == 4
    del content["data"][:2]
    put(path, json.dumps(content))
    assert "no example" in stop_line(load_examples, TASKS["squad1"], path, VOCAB, 40, "", "train")


def test_context_without_tokens_and_narrow_windows():
    examples = squad_examples(span_rows(["\u200b", "cat"], ["\u200b", "who ?"]), 16)
    texts, scores = examples.answers(*logits_for(examples))
    assert texts["q0"] == "" and np.isfinite(list(scores.values())).all() and len(examples) == 2
    says = stop_line(squad_examples, span_rows(["cat"], ["a b c d e f g"]), 10)
    assert "--max_length 10" in says and "at least 11" in says
    assert len(squad_examples(span_rows(["the cat sat"], ["a b c d e f g"]), 11)) == 3
    long = squad_examples(span_rows(["cat"], ["a " * 80]), 100)
    assert long.truncated == 1 and long.lengths.tolist() == [64 + 1 + 3]
