"""Proves that every official file layout is read as it stands, that mistakes in files end in one line, that
files are found where they lie, and that submissions have their benchmark's form.

Run: python -m pytest -q tests/test_tasks.py
"""
import csv
import gzip
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stop_line

from parts.tasks import (DIAGNOSTIC, TASKS, Task, evaluation_files, find_answer, find_file, read_lines,
                         read_table, score, unlabelled_files, write_predictions)
from prepare.world import draw_nouns, write_tasks
from test_metrics import squad


def put(path, text):
    """Writes a file and the folders above it; bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(name, path, labelled=True):
    return TASKS[name].read(TASKS[name], path, labelled)


def table(*lines):
    return "".join("\t".join(line) + "\n" for line in lines)


def squad_text(answers):
    """SQuAD 2.0's json with one question, q1."""
    return json.dumps(squad({"q1": answers}, "v2.0"))


# ---------------------------------------------------------------------------- readers

MNLI_HEAD = ["index", "promptID", "pairID", "genre", "Sentence1_binary_parse", "Sentence2_binary_parse",
             "Sentence1_parse", "Sentence2_parse", "sentence1", "sentence2"]
STSB_HEAD = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
             "sentence2"]
GLUE = {  # header, rows, texts (first, second), labels, ids
    "sst2": (["sentence", "label"], [["a cat ", "1"], ['a "dog', "0"]],
             (["a cat ", 'a "dog'], None), [1, 0], ["0", "1"]),
    "qnli": (["index", "question", "sentence", "label"],
             [["7", "who ?", 'me "', "entailment"], ["9", "when ?", "now", "not_entailment"]],
             (["who ?", "when ?"], ['me "', "now"]), [0, 1], ["7", "9"]),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            [["3", "1", "2", "who ?", "what ?", "0"], ["5", "3", "4", "a", "b", "1"]],
            (["who ?", "a"], ["what ?", "b"]), [0, 1], ["3", "5"]),
    "mnli": ([*MNLI_HEAD, "label1", "gold_label"],
             [["0", *"abcdefg", "one", "two", "neutral", "contradiction"],
              ["1", *"abcdefg", "three", "four", "neutral", "entailment"]],
             (["one", "three"], ["two", "four"]), [2, 0], ["0", "1"]),
    "rte": (["index", "sentence1", "sentence2", "label"],
            [["0", "one", "two", "not_entailment"], ["1", "x", "y", "entailment"]],
            (["one", "x"], ["two", "y"]), [1, 0], ["0", "1"]),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
             [["1", "70", "71", "one", '" two'], ["0", "72", "73", "x", "y"]],
             (["one", "x"], ['" two', "y"]), [1, 0], ["0", "1"]),
    "stsb": ([*STSB_HEAD, "score"],
             [["0", *"abcdef", "one", "two", "5.000"], ["1", *"abcdef", "x", "y", "2.5"]],
             (["one", "x"], ["two", "y"]), [5.0, 2.5], ["0", "1"]),
    "wnli": (["index", "sentence1", "sentence2", "label"], [["0", "one", "two", "1"], ["1", "x", "y", "0"]],
             (["one", "x"], ["two", "y"]), [1, 0], ["0", "1"]),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_layout_is_read_by_column_names(name, tmp_path):
    header, lines, (first, second), labels, ids = GLUE[name]
    plain = put(tmp_path / "train.tsv", table(header, *lines))
    # a byte-order mark, carriage returns and blank lines change nothing
    odd = put(tmp_path / "odd.tsv", "\ufeff" + table(header, lines[0]).replace("\n", "\r\n") + "\r\n\n"
              + table(lines[1]).rstrip("\n"))
    for path in (plain, odd):
        found = rows(name, path)
        assert (found.first, found.second, found.labels, found.ids) == (first, second, labels, ids)
    index = 0 if name == "mrpc" else -1
    test = put(tmp_path / "test.tsv", table(*([*line[:index], *line[index + 1:]] if index == 0 else line[:-1]
                                              for line in [header, *lines])))
    found = rows(name, test, labelled=False)
    assert (found.first, found.second, found.labels) == (first, second, None)
    says = stop_line(rows, name, test)
    assert "unlabelled test split" in says and str(test) in says


def test_labels_are_read_as_words_and_as_numbers(tmp_path):
    for name, task in TASKS.items():
        for i, word in enumerate(task.labels):
            assert task.label_of(word, "f") == task.label_of(str(i), "f") == i
    assert TASKS["mnli"].words == ("entailment", "neutral", "contradiction")
    assert TASKS["rte"].words == TASKS["qnli"].words == ("entailment", "not_entailment")
    assert TASKS["wnli"].words == ("not_entailment", "entailment")
    path = put(tmp_path / "train.tsv", table(GLUE["rte"][0], [*"0ab", "1"], [*"1ab", "entailment"]))
    assert rows("rte", path).labels == [1, 0]


def test_only_line_feeds_end_a_row(tmp_path):
    text = "one\u2028two\x85three\x0bfour\x1cfive"
    path = put(tmp_path / "train.tsv", table(["sentence", "label"], [text, "1"]))
    assert rows("sst2", path).first == [text]


def test_cola_is_read_with_and_without_header(tmp_path):
    path = put(tmp_path / "train.tsv", table(["gj04", "1", "", 'He "won\'t'], ["gj04", "0", "*", "Him do."]))
    found = rows("cola", path)
    assert (found.first, found.second, found.labels) == (['He "won\'t', "Him do."], None, [1, 0])
    path = put(tmp_path / "test.tsv", table(["index", "sentence"], ["8", "Bill whistled."]))
    found = rows("cola", path, labelled=False)
    assert (found.first, found.labels, found.ids) == (["Bill whistled."], None, ["8"])
    assert "unlabelled test split" in stop_line(rows, "cola", path)


def test_mnli_of_16_columns_leaves_out_rows_without_gold_label(tmp_path):
    five = [f"label{i}" for i in range(1, 6)]
    path = put(tmp_path / "dev.tsv", table(
        [*MNLI_HEAD, *five, "gold_label"], ["0", *"abcdefg", "one", "two", *["neutral"] * 5, "entailment"],
        ["1", *"abcdefg", "three", "four", *["neutral"] * 5, "-"],
        ["2", *"abcdefg", "five", "six", *["entailment"] * 5, "neutral"]))
    found = rows("mnli", path)
    assert (found.first, found.labels, found.ids, found.skipped) == (["one", "five"], [0, 1], ["0", "2"], 1)
    only = put(tmp_path / "only.tsv", table([*MNLI_HEAD, "gold_label"], ["0", *"abcdefg", "one", "two", "-"]))
    assert "no row with a gold label" in stop_line(rows, "mnli", only)


@pytest.mark.parametrize("words, labels", [(["entailment", "contradiction"], [0, 2]),
                                           (["not_entailment", "entailment"], [1, 0])])
def test_diagnostics_keep_their_categories(words, labels, tmp_path):
    path = put(tmp_path / "diagnostic-full.tsv", table(
        [*DIAGNOSTIC, "Domain", "Premise", "Hypothesis", "Label"],
        ["", "", "Negation;Double negation", "", "News", "It is.", "It is not.", words[0]],
        ["Lexical entailment", "", "", "Common sense", "", "A dog.", "A pet.", words[1]]))
    found = rows("mnli", path)
    assert (found.first, found.second) == (["It is.", "A dog."], ["It is not.", "A pet."])
    assert found.labels == labels
    assert found.extra["Logic"] == ["Negation;Double negation", ""] and found.extra["Label"] == words
    assert found.extra["Knowledge"] == ["", "Common sense"] and len(found.extra) == 5


def test_swag_and_read_are_csv_with_quotes_and_newlines(tmp_path):
    header = ["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source",
              *[f"ending{i}" for i in range(4)]]
    line = ["0", "v1", "18", "x", 'He says "hi", then', "She", "gold", "runs, fast.", "sits.", "waves.",
            "is."]
    for name, columns, extra in (("val", ["label"], ["2"]), ("test", [], [])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            csv.writer(f).writerows([header + columns, line + extra, line + extra])
    found = rows("swag", tmp_path / "val.csv")
    assert found.first == ['He says "hi", then'] * 2 and found.labels == [2, 2]
    assert found.second[0] == ["She runs, fast.", "She sits.", "She waves.", "She is."]
    assert rows("swag", tmp_path / "test.csv", labelled=False).labels is None
    assert "unlabelled" in stop_line(rows, "swag", tmp_path / "test.csv")
    path = put(tmp_path / "train.csv", "id,url_legal,license,excerpt,target,standard_error\r\n"
               'c1,,,"One\nand ""two"".",-1.25,0.4\r\n\r\nc2,,,three,0.5,0.5\r\n')
    found = rows("read", path)
    assert (found.first, found.ids) == (['One\nand "two".', "three"], ["c1", "c2"])
    assert found.labels == [-1.25, 0.5] and found.second is None


def test_piqa_and_tracie_lines(tmp_path):
    path = put(tmp_path / "valid.jsonl", '{"goal": "g\\tg", "sol1": "a", "sol2": "b"}\n\n'
               '{"goal": "h", "sol1": "c", "sol2": ""}\n')
    assert "unlabelled test split" in stop_line(rows, "piqa", path)
    put(tmp_path / "valid-labels.lst", "1\n0\n")
    found = rows("piqa", path)
    assert (found.first, found.second, found.labels) == (["g\tg", "h"], [["a", "b"], ["c", ""]], [1, 0])
    path = put(tmp_path / "tracie_test.txt", "event: it ends before noon story: A day. He said story: x.\t"
               "answer: negative\nevent: it starts after one story: B.\tanswer: positive\n")
    found = rows("tracie", path)
    assert found.first == ["it ends before noon", "it starts after one"] and found.labels == [0, 1]
    assert found.second == ["A day. He said story: x.", "B."]
    assert found.extra == {"comparator": ["ends", "starts"]}
    path = put(path, "event: it ends before noon story: A day.\n")
    assert rows("tracie", path, labelled=False).second == ["A day."]
    assert "unlabelled test split" in stop_line(rows, "tracie", path)


def test_demo_tasks_are_read_as_the_demo_writes_them(tmp_path):
    rng = random.Random("tasks")
    write_tasks(tmp_path, rng, draw_nouns(rng))
    demo = [task for task in TASKS.values() if task.steps]
    assert [task.name for task in demo] == ["mishap", "entailment", "two_choices", "four_endings",
                                            "before_after"]
    for task in demo:
        files = {"train": find_file(task, tmp_path, task.train)}
        files |= evaluation_files(task, tmp_path)
        assert list(files) == ["train", "", "seen"]
        for which, path in files.items():
            found = task.read(task, path, True)
            n = 1000 if which == "train" else 500
            assert np.bincount(found.labels).tolist() == [n // len(task.words)] * len(task.words)


def test_files_are_found_in_every_place_and_missing_ones_named(tmp_path):
    header, lines = GLUE["mnli"][:2]
    names = ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"]
    for where in ("a/MNLI", "b/glue/MNLI", "c/glue_data/MNLI", "d/MNLI"):
        for name in names:
            put(tmp_path / where / name, table(header, *lines))
    put(tmp_path / "b/glue/diagnostic/diagnostic-full.tsv", "x")
    task = TASKS["mnli"]
    for folder, where in (("a", "a/MNLI"), ("b", "b/glue/MNLI"), ("c", "c/glue_data/MNLI"),
                          ("d/MNLI", "d/MNLI")):
        assert find_file(task, tmp_path / folder, "train.tsv") == tmp_path / where / "train.tsv"
        found = evaluation_files(task, tmp_path / folder)
        assert found.pop("diagnostic", None) == (
            tmp_path / "b/glue/diagnostic/diagnostic-full.tsv" if folder == "b" else None)
        assert found == {"": tmp_path / where / names[1], "mm": tmp_path / where / names[2]}
        assert unlabelled_files(task, tmp_path / folder) == {}
    # the folder of one task does not serve another that has equal file names
    assert find_file(TASKS["rte"], tmp_path / "d/MNLI", "train.tsv", required=False) is None
    put(tmp_path / "a/MNLI/test_matched.tsv", "x")
    assert list(unlabelled_files(task, tmp_path / "a")) == [""]
    for task in TASKS.values():
        says = stop_line(find_file, task, tmp_path / "none", task.train)
        assert str(tmp_path / "none" / task.folder / task.train) in says and task.source in says
        assert "no such file" in stop_line(evaluation_files, task, tmp_path / "none")


@pytest.mark.parametrize("name, file, content, says", [
    ("sst2", "f.tsv", b"", "is empty"),
    ("sst2", "f.tsv", "\ufeff\n \n", "is empty"),
    ("sst2", "f.tsv", b"sentence\tlabel\ngood\t1\nb\xe9ni\t0\n", "line 3: not UTF-8"),
    ("sst2", "f.tsv", b"\xef\xbb\xbfsentence\tlabel\n\xff\t0\n", "line 2: not UTF-8"),
    ("sst2", "f.tsv", "sentence\tlabel\n", "holds no row"),
    ("sst2", "f.tsv", "sentence\tlabel\ngood\t1\n\nbad\t2\n",
     "line 4: label '2'; those of SST-2 are negative, positive (or 0 to 1)"),
    ("sst2", "f.tsv", "text\tlabel\ngood\t1\n", "has no column sentence"),
    ("rte", "f.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n", "line 2: label 'neutral'"),
    ("rte", "f.tsv", table(GLUE["rte"][0], ["1"] * 4, ["1"] * 3, ["1"] * 2),
     "line 3: 3 fields where the header has 4, and 1 more"),
    ("qqp", "f.tsv", table(GLUE["qqp"][0], ["1"] * 4, ["1"] * 7), "line 3: 7 fields where the header has 6"),
    ("qqp", "f.tsv", table(GLUE["qqp"][0], ["1"] * 4), "holds no row"),
    ("stsb", "f.tsv", table(GLUE["stsb"][0], [*"012345678", "5.5"]),
     "line 2: label '5.5'; those of STS-B are numbers from 0 to 5"),
    ("stsb", "f.tsv", table(GLUE["stsb"][0], [*"012345678", "nan"]), "label 'nan'"),
    ("read", "f.csv", "id,excerpt,target\na,b,inf\n", "line 2: label 'inf'"),
    ("read", "f.csv", 'id,excerpt,target\na,"b\nc",1\nd,"e" e,2\n', "line 4: "),
    ("read", "f.csv", 'id,excerpt,target\na,"b,1\n', "line 2: unexpected end of data"),
    ("swag", "f.csv", "sent1,ending0,ending1,ending2,ending3,label\na,b,c,d,e,0\n", "has no column sent2"),
    ("tracie", "f.txt", "event: a story: b\tanswer: positive\nevent: a\tanswer: positive\n",
     "line 2: not of the"),
    ("tracie", "f.txt", "event: a story: b\tanswer: maybe\n", "line 1: label 'maybe'"),
    ("squad1", "f.json", '{"data": [\n{"a" 1}]}', "line 2: broken JSON"),
    ("squad1", "f.json", "[]", "holds a JSON list"),
    ("squad1", "f.json", '{"data": []}', "holds no question"),
    ("squad1", "f.json", squad_text([("cat",)]), "at question q1 (KeyError('answer_start'))"),
    ("squad1", "f.json", squad_text([("cat", "x")]), "at question q1"),
    ("squad1", "f.json", squad_text([3]), "question q1 (TypeError('3 is no text"),
    ("squad1", "f.json", squad_text([]), "use --tasks squad2"),
    ("squad2", "f.json", squad_text(["cat"]).replace("answers", "hidden"), "unlabelled test split"),
])
def test_mistake_in_a_file_is_one_line_with_its_place(name, file, content, says, tmp_path):
    path = put(tmp_path / file, content)
    line = stop_line(rows, name, path)
    assert line.startswith(str(path)) and says in line


@pytest.mark.parametrize("lines, labels, says", [
    (['{"goal": "g", "sol1": 1, "sol2": "b"}'], "0\n2\n", "train.jsonl, line 2: not a JSON object with the "
     "texts goal, sol1, sol2"),
    (['{"goal": "g", "sol1": "a"'], "0\n1\n", "train.jsonl, line 2: not a JSON object"),
    (["[]"], "0\n1\n", "train.jsonl, line 2: not a JSON object"),
    ([], "2\n", "train-labels.lst, line 1: label '2'; those of PIQA are 0, 1"),
    ([], "\n0\n1\n", "train-labels.lst: 2 labels for the 1 lines of train.jsonl")])
def test_piqa_mistakes_name_file_and_line(lines, labels, says, tmp_path):
    path = put(tmp_path / "train.jsonl", "\n".join(['{"goal": "g", "sol1": "a", "sol2": "b"}', *lines]))
    put(tmp_path / "train-labels.lst", labels)
    assert stop_line(rows, "piqa", path).startswith(f"{tmp_path}/{says}")


def test_qqp_rows_that_lack_columns_are_left_out_and_counted(tmp_path):
    header, lines, (first, second), labels, ids = GLUE["qqp"]
    # a line break inside of a question leaves two short rows
    path = put(tmp_path / "train.tsv", table(header, lines[0], ["4", "8", "9", "why"], ["now ?", "then ?", "1"], lines[1]))
    found = rows("qqp", path)
    assert (found.first, found.second, found.labels, found.ids, found.short) == (first, second, labels, ids, 2)
    test = put(tmp_path / "test.tsv", table(["id", "question1", "question2"], ["0", "a", "b"], ["1", "a"]))
    assert "test.tsv, line 3: lacks columns, but a test set must be whole" in stop_line(rows, "qqp", test, False)


def test_two_rows_of_one_id_are_refused_where_a_submission_is_told_apart_by_it(tmp_path):
    head, (one, two) = GLUE["rte"][:2]
    path = put(tmp_path / "f.tsv", table(head, one, [one[0], *two[1:]]))
    assert rows("rte", path).ids == ["0", "0"]  # nothing is lost where labels are known
    path = put(path, table(head[:3], one[:3], [one[0], *two[1:3]]))
    assert "f.tsv: two rows have the id 0;" in stop_line(rows, "rte", path, labelled=False)
    path = put(tmp_path / "f.csv", "sent1,sent2,ending0,ending1,ending2,ending3\n" + 2 * "a,b,c,d,e,f\n")
    assert rows("swag", path, labelled=False).ids == ["0", "1"]


LAYOUTS = {"sst2": ("train.tsv", "sentence\tlabel\na cat\t1\n"), "swag": (
    "train.csv", "sent1,sent2,ending0,ending1,ending2,ending3,label\na,b,c,d,e,f,1\n"),
    "tracie": ("tracie_train_uniform_prior.txt", "event: a story: b\tanswer: positive\n"),
    "piqa": ("train.jsonl", '{"goal": "g", "sol1": "a", "sol2": "b"}\n'),
    "squad2": ("train-v2.0.json", squad_text(["cat"]))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_tasks_may_be_gzipped_and_what_is_no_text_is_named(name, tmp_path):
    file, content = LAYOUTS[name]
    task, folder = TASKS[name], tmp_path / TASKS[name].folder
    put(folder / "train-labels.lst", "1\n")
    plain = rows(name, put(folder / file, content))
    assert rows(name, put(folder / file, gzip.compress(content.encode()))) == plain  # whatever its name says
    (folder / file).rename(folder / f"{file}.gz")
    path = find_file(task, tmp_path, file)
    assert path == folder / f"{file}.gz" and rows(name, path) == plain
    for bad, says in ((b"PAR1", "is parquet"), (b"PK\x03\x04", "is zip"), (content.encode("utf-16"), "is UTF-16"),
                      (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
                      (b"<!DOCTYPE html>\n<html>\n404", "is a web page"),
                      (gzip.compress(content.encode())[:-9], "damaged gzip")):
        line = stop_line(rows, name, put(path, bad))
        assert line.startswith(f"{path}: ") and says in line


def test_original_mrpc_stands_in_where_there_is_none_of_glues_files(tmp_path):
    header, lines, texts, labels, ids = GLUE["mrpc"]
    task, folder = TASKS["mrpc"], tmp_path / "MRPC"
    for name in ("train", "test"):
        put(folder / f"msr_paraphrase_{name}.txt", "\ufeff" + table(header, *lines).replace("\n", "\r\n"))
    train, dev = find_file(task, tmp_path, task.train), evaluation_files(task, tmp_path)[""]
    assert (train.name, dev.name) == ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
    found = rows("mrpc", dev)
    assert ((found.first, found.second), found.labels, found.ids) == (texts, labels, ids)
    put(folder / "dev.tsv", table(header, *lines))  # GLUE's is a part of the original training set
    assert find_file(task, tmp_path, "dev.tsv") == folder / "dev.tsv"
    assert "train.tsv: no such file" in stop_line(find_file, task, tmp_path, "train.tsv")


def test_folder_in_the_place_of_a_file_and_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "RTE" / "train.tsv").mkdir(parents=True)
    assert "RTE/train.tsv: is a folder; get RTE from" in stop_line(find_file, TASKS["rte"], tmp_path, "train.tsv")
    path = put(tmp_path / "train.tsv", "x")
    assert f"--data_dir {path}: is a file; give the folder that holds RTE/" == stop_line(
        find_file, TASKS["rte"], path, "train.tsv")


COUNTS = {  # rows of the real files; without "-" all of the official ones
    "glue/CoLA": (8551, 1043, 1063), "glue/SST-2": (67349, 872, 1821), "glue/MRPC": (3668, 408, 1725),
    "glue/STS-B": (5749, 1500, 1379), "glue/RTE": (2490, 277, 3000), "glue/WNLI": (635, 71, 146),
    "glue/QNLI": (8999, 5463, 5463), "glue/MNLI": (8999, 1000), "glue/QQP": (8999, 1000)}


def test_real_glue_files_are_read_whole(real_data):
    def sizes(task, folder):
        labelled = [find_file(task, folder, task.train), *evaluation_files(task, folder).values()]
        return tuple(len(task.read(task, path, path in labelled).first)
                     for path in (*labelled, *unlabelled_files(task, folder).values()))
    for task in TASKS.values():
        if task.source == TASKS["sst2"].source:
            assert sizes(task, real_data) == COUNTS[f"glue/{task.folder}"]
            *labelled, test = sizes(task, real_data / "glue_format_samples")
            assert set(labelled) == {2 if task.name == "cola" else 1} and test == 1


def test_other_real_files_are_read_whole(real_data):
    found = rows("mnli", real_data / "diagnostics" / "DERIVED_diagnostic-full_2way.tsv")
    assert len(found.first) == 1104 and set(found.labels) == {0, 1}
    assert sum(map(bool, found.extra["Logic"])) == 364
    assert set(found.extra["Label"]) == {"entailment", "not_entailment"}
    assert len(rows("mnli", real_data / "diagnostics" / "diagnostic.tsv", False).first) == 1104
    found = rows("swag", real_data / "swag" / "swag_val_first11.csv")
    assert len(found.first) == 11 and found.labels[0] == 2
    assert found.second[0][1] == "She turns with two students."
    assert len(rows("piqa", real_data / "piqa" / "valid.jsonl").first) == 1838
    assert len(rows("piqa", real_data / "piqa" / "tests.jsonl", False).first) == 3084
    for name, size in (("tracie", 860), ("tracie_iid", 1174)):
        task = TASKS[name]
        found = rows(name, find_file(task, real_data, task.train))
        assert len(found.first) == size and sum(found.labels) == size / 2
    found = rows("tracie_iid", evaluation_files(TASKS["tracie_iid"], real_data)[""])
    assert len(found.first) == 4248 and found.extra["comparator"].count("starts") == 1924
    assert len(rows("read", real_data / "read" / "train.csv").first) == 4724


def test_moved_and_missing_answers_are_told_apart(tmp_path):
    answers = [("cat", 2), ("cat", 9), ("cat", 13), ("dog", 0), ("", 1), ("a", -4)]
    content = squad({f"q{i}": [answer] for i, answer in enumerate(answers)}, "1.1", "a cat and a cat ran .")
    found = rows("squad1", put(tmp_path / "f.json", json.dumps(content)))
    assert found.labels == [(2, 5), (12, 15), (12, 15), (-1, -1), (-1, -1), (0, 1)]
    assert found.extra["answer"] == ["exact", "moved", "moved", "missing", "missing", "moved"]


def test_nearest_place_of_an_answer_is_that_of_a_plain_search():
    rng = random.Random(0)
    for _ in range(3000):
        context, text = ("".join(rng.choices("ab ", k=rng.randint(low, high))) for low, high in ((0, 12), (1, 4)))
        start = rng.randint(-3, 15)
        places = [i for i in range(len(context)) if context.startswith(text, i)] if text.strip() else []
        nearest = min(places, key=lambda place: abs(place - start), default=-1)
        expected = (nearest, nearest + len(text)) if places else (-1, -1)
        assert find_answer(context, [(text, start)])[0] == expected, (context, text, start)
    long = "a" * 300_000 + "b" + "a" * 300_000
    for text in ("a" * 150_000 + "b", "b" + "a" * 150_000, "a" * 150_000 + "c"):
        find_answer(long, [(text, 250_000)])  # the search is linear, or this takes minutes


# ---------------------------------------------------------------------------- input and output


def test_lines_of_standard_input_become_rows():
    found = read_lines(TASKS["sst2"], ["good one\n", "bad"])
    assert (found.first, found.second, found.labels) == (["good one", "bad"], None, None)
    assert found.ids == ["1", "2"]
    found = read_lines(TASKS["rte"], ["a\tb\r\n", "c\td\n"])
    assert (found.first, found.second) == (["a", "c"], ["b", "d"])
    found = read_lines(TASKS["piqa"], ["goal\tx\ty\tz\n", "other\tu\tv\tw\n"])
    assert (found.first, found.second) == (["goal", "other"], [["x", "y", "z"], ["u", "v", "w"]])
    found = read_lines(TASKS["squad1"], ["who ?\tThe cat sat."])
    assert (found.first, found.second, found.ids) == (["who ?"], ["The cat sat."], ["1"])
    for name, lines, says in (
            ("sst2", ["a\n", "b\tc\n"], "line 2: 2 fields where 1 are wanted: sentence"),
            ("rte", ["a\tb\n", "c\n"], "line 2: 1 fields where 2 are wanted: sentence1 TAB sentence2"),
            ("swag", ["a\tb\tc\n", "a\tb\tc\td\n"], "line 2: 4 fields where 3"),
            ("swag", ["a\tb\n"], "line 1: 2 fields where 3"),
            ("sst2", ["a\n", "\n"], "line 2: 1 fields or an empty one")):
        assert says in stop_line(read_lines, TASKS[name], lines)


@pytest.mark.parametrize("name, predictions, text", [
    ("sst2", [1, 0], "index\tprediction\n0\t1\n1\t0\n"), ("cola", [0, 1], "index\tprediction\n0\t0\n1\t1\n"),
    ("qqp", [0, 1], "index\tprediction\n0\t0\n1\t1\n"), ("mrpc", [1, 1], "index\tprediction\n0\t1\n1\t1\n"),
    ("wnli", [1, 0], "index\tprediction\n0\t1\n1\t0\n"),
    ("mnli", [2, 1], "index\tprediction\n0\tcontradiction\n1\tneutral\n"),
    ("qnli", [1, 0], "index\tprediction\n0\tnot_entailment\n1\tentailment\n"),
    ("rte", [1, 0], "index\tprediction\n0\tnot_entailment\n1\tentailment\n"),
    ("stsb", [5.2, 1.23456], "index\tprediction\n0\t5.000\n1\t1.235\n"), ("piqa", [1, 0], "1\n0\n"),
    ("swag", [3, 0], "pred\n3\n0\n"), ("tracie", [1, 0], "answer: positive\nanswer: negative\n"),
    ("read", [-1.5, 0.25], "id,target\n0,-1.500000\n1,0.250000\n")])
def test_submission_has_the_form_of_its_benchmark(name, predictions, text, tmp_path):
    task, examples = TASKS[name], SimpleNamespace(ids=["0", "1"])
    for values in (np.array(predictions), torch.tensor(predictions)):
        write_predictions(task, examples, values, tmp_path / task.outputs[""])
        assert (tmp_path / task.outputs[""]).read_text() == text


def test_submission_files_have_the_servers_names(tmp_path):
    names = {name for task in TASKS.values() for name in task.outputs.values() if name.endswith(".tsv")}
    assert names == {f"{name}.tsv" for name in (
        "CoLA SST-2 MRPC STS-B MNLI-m MNLI-mm AX QNLI QQP RTE WNLI").split()}
    for task in TASKS.values():
        assert set(task.tests) <= set(task.outputs) and "" in task.evals and task.metrics
    texts, null = {"a": "café", "b": "x"}, {"a": -0.5, "b": 0.5}
    write_predictions(TASKS["squad2"], None, (texts, null), tmp_path / "new" / "p.json")
    assert [json.loads((tmp_path / "new" / f"{name}.json").read_text()) for name in (
        "p", "answers", "null_odds")] == [texts | {"b": ""}, texts, null]


def test_a_new_pair_task_costs_a_few_lines(tmp_path):
    task = Task("boolq", "BoolQ", "classify", "BoolQ", ("question", "passage"), read_table,
                "a friend", labels=("no", "yes"))
    put(tmp_path / "BoolQ" / "train.tsv", table([*task.text, "label"], ["is it ?", "it is", "yes"]))
    found = task.read(task, find_file(task, tmp_path, task.train), True)
    assert (found.first, found.second, found.labels) == (["is it ?"], ["it is"], [1])


def test_table_lists_the_papers_order():
    assert list(TASKS) == ("sst2 qnli qqp mnli squad1 squad2 swag rte mrpc stsb cola wnli piqa tracie "
                           "tracie_iid read mishap entailment two_choices four_endings before_after").split()
    assert all(name == task.name for name, task in TASKS.items())


# ---------------------------------------------------------------------------- --score

@pytest.fixture
def files(tmp_path):
    """[predictions, gold, no-answer scores]."""
    contents = {"predictions": {"a": "One, two", "b": "four", "c": "", "z": ""},
                "gold": squad({"a": ["one two"], "b": ["three"], "c": []}, "v2.0"),
                "no_answer": {"a": -2, "b": 3.5, "c": 9}}
    return [put(tmp_path / f"{name}.json", json.dumps(content)) for name, content in contents.items()]


def test_score_prints_an_aligned_list(files, capsys):
    found = score(*files)
    left_out, *lines = capsys.readouterr().out.splitlines()
    assert left_out == "predictions left out, as gold has no such question: 1"
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(found) == 15
    assert lines[2].split() == ["exact", "66.6667"] and lines[4].split() == ["total", "3"]
    assert lines[-1].split() == ["best_f1_thresh", "-2.0000"]


def test_score_says_which_questions_of_1_1_have_no_prediction(files, capsys):
    gold = squad({"a": ["caf\xe9"], "b": ["three"]}, "1.1")
    put(files[1], "\ufeff" + json.dumps(gold, ensure_ascii=False))
    put(files[0], '{"a": "Caf\\u00e9!"}')
    assert score(*map(str, files[:2])) == {"exact": 50, "f1": 50, "total": 2}
    assert capsys.readouterr().out.startswith(
        "predictions: 1 of 2 questions have none, the first is b; they count 0\n")


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("content, says", [
    (None, "cannot be read (No such file or directory); give"), (b"", "is empty; give"),
    (b'{"a": "x"', "broken JSON"), (b'["x"]', "holds a JSON list, no object; give"),
    (b"[" * 100_000, "broken JSON"), (b"\xff\xff\xff", "not UTF-8"), (b"\xff\xfe\xff", "is UTF-16"),
    ("folder", "cannot be read (Is a directory)")])
def test_score_of_a_wrong_file_names_it(files, which, content, says):
    if content is None:
        files[which].unlink()
    elif content == "folder":
        files[which] = files[which].parent
    else:
        files[which].write_bytes(content)
    line = stop_line(score, *files)
    assert line.startswith(str(files[which])) and says in line
