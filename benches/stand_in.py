"""For a day: what data.step_batches and parts.feed.Feed will be, for benches/feed.py and benches/scale.py."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import losses
from data import micro_rows

AHEAD = 2


def step_batches(samples, cfg, ranks, make_batch, step):
    index = samples.index(cfg.seed, step, cfg.batch_size, np.arange(cfg.batch_size))
    parts = (micro_rows(cfg.batch_size, ranks.rank, ranks.size, micro, cfg.grad_accum)
             for micro in range(cfg.grad_accum))
    return index, [make_batch(samples, cfg, index[rows], cfg.seed, step, rows) for rows in parts]


class Feed:
    def __init__(self, make, ranks, first, last, items={}, wishes=list):
        self.make, self.last, self.thread = make, last, ThreadPoolExecutor(1)
        self.waiting = deque(self.thread.submit(make, i) for i in range(first, min(first + AHEAD, last)))

    def take(self, step):
        index, batches = self.waiting.popleft().result()
        if step + AHEAD < self.last:
            self.waiting.append(self.thread.submit(self.make, step + AHEAD))
        return index, batches, {}

    def close(self):
        self.thread.shutdown(cancel_futures=True)


if not hasattr(losses, "chunk_rows"):
    losses.chunk_rows = lambda device, floats, on_cpu: max(1, on_cpu)
