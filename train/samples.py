"""The samples of a run, in order, and their collation into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .data import Mixture, Packed, Stream


class Samples(Dataset):
    """All `count` samples of a run. Sample g is a block, and `sequence_ids` = g, which seeds `normal` initial states.

    A block that may end in padding also has `num_tokens`.

    streams: by source.   beside: more arrays [n, ...] with a row for each block, by input name.   recurrences: R of a
    sample from its number and the mean of its block, where blocks have one.
    """

    def __init__(
        self,
        blocks: Packed,
        streams: dict[int, Stream],
        order: Mixture,
        count: int,
        beside: dict[str, np.ndarray],
        recurrences: Callable[[int, int], int],
    ):
        self.blocks, self.streams, self.order, self.count, self.beside = blocks, streams, order, count, beside
        self.recurrences = recurrences

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample: int) -> dict[str, Any]:
        source, place = self.order.where(sample)
        if source in self.streams:
            found: dict[str, Any] = {"sequence_ids": sample, **self.streams[source].row(place)}
        else:
            row = self.order[sample]
            more = {name: array[row] for name, array in self.beside.items()}
            found = {"sequence_ids": sample, **self.blocks.sample(row), **more}
        if "num_recurrences" in found:
            found["num_recurrences"] = self.recurrences(sample, int(found["num_recurrences"]))
        return found


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """sequence_ids and num_recurrences [B], input_ids and labels [B, T], and all other entries, stacked."""
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
