"""Proves that sampled sentences are whole ones of the text, and that what a vocabulary cannot read is refused.

Run: python -m pytest -q tests/test_sentences.py
"""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_WORDS, stop_line

import data
from analyses.sentences import encode, sample_sentences
from parts.vocab import SPECIALS, Vocab


@pytest.fixture(scope="module")
def blocks(demo):
    return data.TextBlocks(str(demo / "demo-s0" / "corpus.h5"), 24, "val", "")


def text_of(blocks):
    """The held-out blocks as one text, a line each."""
    ids = blocks.batch(np.arange(len(blocks)))["ids"][:, 1:-1]
    return "\n".join(blocks.vocab.decode(row.tolist()) for row in ids)


def test_first_sentences_are_those_of_a_plain_search(blocks):
    found = sample_sentences(blocks, 30)
    every = re.findall(r"(?<=\. )[^.\n\[\]]+\.(?= |$)", text_of(blocks), re.M)
    every = [one for one in every if 6 <= len(one.split()) <= 16 and len(blocks.vocab.encode([one])[0]) <= 20]
    assert found == list(dict.fromkeys(every))[:30] and sample_sentences(blocks, 4) == found[:4]


def test_drawn_sentences_are_whole_name_a_noun_and_follow_from_the_seed(blocks, demo):
    nouns = ["vase", "candle", "bulb", "drawer", "tray", "duck", "barrel", "lipstick",
             "stopper", "cobble", "fence", "torch", "mug", "kettle", "ladder"]

    def nouns_in(text):
        return [noun for noun in nouns if re.search(rf"\b{noun}\b", text)]
    text = text_of(blocks)
    found, plain = (sample_sentences(blocks, 5, 3, about) for about in (nouns_in, None))
    assert found == sample_sentences(blocks, 5, 3, nouns_in) != sample_sentences(blocks, 5, 4, nouns_in)
    assert len(set(plain)) == 5 and plain != sample_sentences(blocks, 5, 4)
    assert len(found) == 5 and len({noun for one in found for noun in nouns_in(one)}) >= 5
    for one in [*found, *plain]:
        assert 6 <= len(one.split()) <= 16 and one.endswith(".") and "." not in one[:-1]
        assert f". {one}" in text or f"[SEP] {one}" in text
    assert all(map(nouns_in, found))
    every = [noun for one in sample_sentences(blocks, 100, 3, nouns_in) for noun in nouns_in(one)]
    assert len(set(every)) == len(every) > 5  # no noun twice
    assert "no whole sentence of 6 to 16 words" in stop_line(sample_sentences, blocks, 5, 0, lambda text: [])
    short = data.TextBlocks(str(demo / "demo-s0" / "corpus.h5"), 6, "val", "")
    assert "no whole sentence" in stop_line(sample_sentences, short, 5)


def test_sentences_stand_between_marks_or_documents_and_are_known_words():
    vocab = Vocab([*SPECIALS, *TINY_WORDS, "."])
    known, unknown = "the dog ran and the cat sat .", "the dog ran and the zebra sat ."
    text = f"{known} {unknown} the dog ran . {known.replace('sat', 'slept')} [SEP] {known.replace('sat', 'ran')} the"
    ids = [i for part in text.split("[SEP]") for i in [*vocab.encode([part])[0], vocab.sep]][:-1]
    ids = torch.tensor([[vocab.cls, *ids, vocab.sep]])

    class One(SimpleNamespace):
        def __len__(self):
            return 1
    blocks = One(vocab=vocab, batch=lambda index: {"ids": ids}, files=["x"], block_size=ids.shape[1])
    assert sample_sentences(blocks, 9) == ["the dog ran and the cat slept."]  # the first one follows nothing
    drawn = {sample_sentences(blocks, 9, seed)[0] for seed in range(20)}
    assert drawn == {"the dog ran and the cat slept.", "the dog ran and the cat ran."}


def test_texts_that_cannot_be_read_are_refused():
    vocab = Vocab([*SPECIALS, *TINY_WORDS])
    assert encode(["the dog ran", "dog"], vocab, "--word", 0) == vocab.encode(["the dog ran", "dog"])
    assert vocab.unk in encode(["the zebra ran ."], vocab, "--word", 0.3)[0]
    for text, words in (("zebra ran", "--word 'zebra ran': the run's vocabulary does not know"),
                        (" ", "holds no word"), ("dog \udc80", "not UTF-8")):
        assert words in stop_line(encode, ["dog", text], vocab, "--word", 0.3)
