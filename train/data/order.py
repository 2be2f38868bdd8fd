"""The order of a run's samples, as a pure function of (seed, sample)."""

from __future__ import annotations

import numpy as np


class Order:
    """The block of each sample. Every pass over the blocks has its own order, a function of (seed, pass)."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, sample: int) -> int:
        """The block's number, 0 .. `count` - 1."""
        epoch, place = divmod(sample, self.count)
        if epoch != self._epoch:
            # numpy guarantees the stream of raw generator output across releases, but not that of `permutation`.
            keys = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.count)
            self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
        return int(self._order[place])


class Mixture:
    """The block of each of `count` samples over several sources.

    parts: number of blocks of each source; the sources stand one after the other.   phases: (share of the run, weight
    of each source), in order. The source of sample g is drawn by weight, a function of (seed, g). A source's blocks
    come in its own order, each once before any comes twice, across all phases.
    """

    def __init__(self, parts: list[int], phases: list[tuple[float, list[float]]], count: int, seed: int):
        self.first = np.cumsum([0, *parts])
        self.orders = [Order(blocks, seed + i) for i, blocks in enumerate(parts)]
        self.chosen = np.zeros(count, np.int16)  # source of each sample
        ends = np.round(np.cumsum([share for share, _ in phases]) * count).astype(int)
        uniform = (
            np.random.Philox(key=np.array([seed, 2**63], np.uint64)).random_raw(count) >> np.uint64(11)
        ) / 2.0**53
        begin = 0
        for end, (_, weights) in zip(ends, phases, strict=True):
            bounds = np.cumsum(weights) / np.sum(weights)
            self.chosen[begin:end] = np.searchsorted(bounds[:-1], uniform[begin:end], side="right")
            begin = end
        self.places = np.zeros(count, np.int64)  # number of earlier samples of the same source
        for i in range(len(parts)):
            of_source = self.chosen == i
            self.places[of_source] = np.arange(of_source.sum())

    def where(self, sample: int) -> tuple[int, int]:
        """(source of a sample, number of earlier samples of that source)."""
        return int(self.chosen[sample]), int(self.places[sample])

    def taken(self, samples: int) -> list[int]:
        """The number of the first `samples` that come from each source."""
        return np.bincount(self.chosen[:samples], minlength=len(self.orders)).tolist()

    def __getitem__(self, sample: int) -> int:
        """The block's number over all sources."""
        source, place = self.where(sample)
        return int(self.first[source]) + self.orders[source][place]
