"""Sentences: whole ones of a run's held-out text, and given ones as tokens."""
import numpy as np

from common import cut, keyed_integers
from data import permuted


def sample_sentences(blocks, most, seed=None, nouns_in=None):
    """Up to `most` different whole sentences of 6 to 16 words in the first 4,000 blocks: one a block, drawn
    by (seed, block); without a seed the first ones that follow another one.

    nouns_in: text -> its nouns; a sentence must name one, and none of those of another one.
    """
    vocab, found, used = blocks.vocab, [], set()
    marks = [i for i, token in enumerate(vocab.tokens) if token in (".", "!", "?")]
    order = np.arange(min(4000, len(blocks)))
    for block in order if seed is None else permuted(order, len(blocks), seed):
        ids, fresh = blocks.batch([block])["ids"][0].numpy()[1:-1], {}
        stops = np.flatnonzero(np.isin(ids, [*marks, vocab.sep, vocab.cls]))
        for a, b in zip(stops, stops[1:]):
            text = vocab.decode(ids[a + 1:b + 1])
            whole = ids[b] in marks and (ids[a] in marks or seed is not None)
            if whole and 6 <= len(text.split()) <= 16 and b - a <= 20 and vocab.unk not in ids[a:b]:
                fresh[text] = nouns_in(text) if nouns_in else [text]
        fresh = [(text, nouns) for text, nouns in fresh.items() if nouns and used.isdisjoint(nouns)]
        if fresh and seed is not None:
            fresh = [fresh[int(keyed_integers(len(fresh), "sentence", seed, block))]]
        for text, nouns in fresh:
            found.append(text)
            used.update(nouns)
        if len(found) >= most:
            return found[:most]
    if not found:
        raise SystemExit(f"{blocks.files[0]}: no whole sentence of 6 to 16 words in its held-out blocks of "
                         f"{blocks.block_size} tokens; give one by --sentence")
    return found


def encode(texts, vocab, source, unknown):
    """Texts -> a list of ids each; SystemExit where one is not UTF-8, holds no token, or more than the share
    `unknown` of unknown ones. source: what they are, for errors."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SystemExit(f"{source}: {ascii(text)[:80]} is not UTF-8; write it anew") from None
    pieces = vocab.encode(texts)
    for text, ids in zip(texts, pieces):
        if not ids:
            raise SystemExit(f"{source} {text!r}: holds no word; give a text")
        if np.mean(np.equal(ids, vocab.unk)) > unknown:
            raise SystemExit(f"{source} {cut(text, 80)!r}: the run's vocabulary does not know these words; "
                             "give some of its corpus, or another run")
    return pieces
