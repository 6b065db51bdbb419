"""Feeds a training loop: its batches, made ahead by a thread, and one message a step between the ranks."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.distributed as dist

from parts.machine import move

AHEAD = 3  # steps whose batches are made, or being made, while one runs


class Feed:
    """The batches of a loop, made while the steps before run, and what all ranks must agree on at each step.

        feed = Feed(make, ranks, first, last, items, wishes)
        wish, = feed.wished()                       # before each step: first, first + 1, ..
        index, batches, items = feed.take(step)

    make(step) -> (index, [micro-batch, ..]) of CPU tensors, a pure function of the step: neither resume nor
    the number of ranks needs anything of the feed. items: {term: function of a micro-batch -> how many items
    of the term it has}. wishes() -> numbers, of this rank, now.

    Several ranks add up items and wishes in one message a step, which is sent a step ahead and so waits for
    nobody; a wish then counts at the step after the next. What `make` raises comes out of `take`, or of the
    step before.
    """

    def __init__(self, make, ranks, first, last, items={}, wishes=list):
        self.make, self.ranks, self.last, self.items, self.wishes = make, ranks, last, items, wishes
        # page-locked memory belongs to a device; without this all ranks would take the first one's
        begin = partial(torch.cuda.set_device, ranks.device) if ranks.device.type == "cuda" else None
        self.thread, self.sent = ThreadPoolExecutor(1, "feed", begin), None
        self.waiting = deque(self.thread.submit(self.batches, step)
                             for step in range(first, min(first + AHEAD, last)))
        self.send()

    def batches(self, step):
        """(index, micro-batches in page-locked memory where there is a GPU, items of each term)."""
        index, batches = self.make(step)
        items = [float(sum(count(batch) for batch in batches)) for count in self.items.values()]
        if self.ranks.device.type == "cuda":
            batches = [{name: x.pin_memory() if torch.is_tensor(x) else x for name, x in batch.items()}
                       for batch in batches]
        return index, batches, items

    def send(self):
        """Sends the next step's message; behind the last step it has no items."""
        if self.ranks.size > 1:
            own = self.waiting[0].result()[2] if self.waiting else [0.0] * len(self.items)
            self.message = torch.tensor([*own, *map(float, self.wishes())], dtype=torch.float64)
            self.sent = dist.all_reduce(self.message, async_op=True)

    def received(self):
        """The next step's message, summed over the ranks, as a list."""
        if self.sent:
            self.sent.wait()
            self.sent = None
        return self.message.tolist()

    def wished(self):
        """The ranks' wishes, summed: of one rank now, of several as the step before the coming one began."""
        return self.received()[len(self.items):] if self.ranks.size > 1 else self.wishes()

    def take(self, step):
        """(index, micro-batches on the device, {term: items of the global batch, at least 1})."""
        index, batches, counts = self.waiting.popleft().result()
        if self.ranks.size > 1:
            counts = self.received()
        if step + AHEAD < self.last:
            self.waiting.append(self.thread.submit(self.batches, step + AHEAD))
        self.send()
        items = {name: max(1.0, n) for name, n in zip(self.items, counts)}
        return index, [move(batch, self.ranks.device) for batch in batches], items

    def close(self):
        """Ends the thread. The last message has no reader, but every rank has sent it."""
        if self.sent:
            self.received()
        self.thread.shutdown(cancel_futures=True)
        self.make = self.wishes = None  # they hold the run, which holds this: it would outlive its use
