"""The rows of each step: a pure function of (seed, step), read ahead where they do not fit the memory.

Each epoch is a new order of all rows, cut into batches; what is left after the last whole batch is dropped. Of many rows
the order is one of shuffled blocks: a block's rows lie side by side in the files, so that a disk reads them in one go. The
order is the same whether rows are resident or not.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from hyma.seeds import seeded_generator

BLOCK_ROWS = 2048  # side by side in the files: 1.5 to 4 MB of an encoder
WINDOW_ROWS = 65536  # of shuffled blocks, whose rows are then shuffled among each other


@lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """The order [count] of an epoch's rows: blocks in random order, then the rows of each window of blocks."""
    random = seeded_generator("rows", seed, epoch)
    if count <= WINDOW_ROWS:
        return torch.randperm(count, generator=random)
    blocks = torch.arange(count).split(BLOCK_ROWS)
    shuffled = torch.cat([blocks[k] for k in torch.randperm(len(blocks), generator=random)])
    windows = []
    for window in shuffled.split(WINDOW_ROWS):
        windows.append(window[torch.randperm(len(window), generator=random)])
    return torch.cat(windows)


def draw_rows(step, seed, rows, batch_size):
    """The rows [B] of a step."""
    epoch, place = divmod(step, len(rows) // batch_size)
    order = epoch_order(len(rows), seed, epoch)
    return rows[order[place * batch_size : (place + 1) * batch_size]]


class Batches:
    """The rows of one step after the other, on the device. Where a RowStore is not resident, it gets the vectors of these rows
    too: those of a window of steps at a time, while the ones after them are being read."""

    def __init__(self, store, seed, rows, batch_size):
        """store: a RowStore. rows [n]: to draw from."""
        self.store, self.seed, self.batch_size = store, seed, batch_size
        self.rows = rows
        self.steps_per_epoch = len(rows) // batch_size
        self.epoch = None  # whose rows are on the device
        self.epoch_rows = None
        self.steps_per_window = max(1, WINDOW_ROWS // batch_size)
        self.window = None  # the first step of the window in use
        self.next_window = None  # a Future of the window after it
        self.reader = None if store.is_resident else ThreadPoolExecutor(1)

    def rows_of(self, step):
        """The rows [B] of a step (`draw_rows`)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:  # once an epoch, so that a step copies no indices to the device
            self.epoch = epoch
            order = epoch_order(len(self.rows), self.seed, epoch)
            self.epoch_rows = self.rows[order].to(self.store.device)
        batch = self.epoch_rows[place * self.batch_size : (place + 1) * self.batch_size]
        if self.reader:
            self.move_window(step)
            start = (step - self.window) * self.batch_size
            self.store.batch = batch
            self.store.places = self.places[start : start + self.batch_size]
        return batch

    def close(self):
        """Frees the windows."""
        if self.reader:
            self.reader.shutdown(cancel_futures=True)
            self.next_window = None
            self.store.window = {}

    def move_window(self, step):
        """Sees to it that the step is in the window, and that the next one is being read."""
        first = step - step % self.steps_per_window
        if first == self.window:
            return
        if self.window is None or first != self.window + self.steps_per_window:  # the first window of this process
            self.next_window = self.reader.submit(self.read_window, first)
        self.window = first
        self.store.window, self.places = self.next_window.result()
        self.next_window = self.reader.submit(self.read_window, first + self.steps_per_window)

    def read_window(self, first):
        """({encoder: vectors of all rows of the window [n, dim]}, where each step's rows are among them [n]), on the device."""
        batches = []
        for step in range(first, first + self.steps_per_window):
            batches.append(draw_rows(step, self.seed, self.rows, self.batch_size))
        rows = torch.cat(batches)
        in_file = rows.argsort()
        places = torch.empty_like(in_file)
        places[in_file] = torch.arange(len(rows))
        vectors = {}
        for name, tensor in self.store.tensors.items():
            vectors[name] = tensor[rows[in_file]].to(self.store.device)
        return vectors, places.to(self.store.device)
