"""Packing: tokens are cut into blocks of equal length, across document ends. An incomplete last block is dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from loopwise.errors import UserError

from .tokens import LEARN, START, Corpus


def split(corpus: Corpus, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks [N] of the training tokens and of the held-out tokens.

    Documents are held out in the order of their keys until they make up `fraction`, so the choice depends on the texts
    alone. With few, long documents that may exceed twice the `fraction`; then the last `fraction` of all tokens is held
    out instead.
    """
    total = len(corpus.tokens)
    wanted = fraction * total
    if wanted < 1:
        return np.ones(total, bool), np.zeros(total, bool)
    lengths = np.diff(corpus.ends, prepend=0)
    order = np.argsort(corpus.keys, kind="stable")
    reached = np.cumsum(lengths[order])
    count = int(np.searchsorted(reached, wanted)) + 1
    if reached[min(count, len(reached)) - 1] > 2 * wanted:
        mask = np.arange(total) >= total - int(wanted)
    else:
        held = np.zeros(len(lengths), bool)
        held[order[:count]] = True
        mask = np.repeat(held, lengths)
    return ~mask, mask


def pack(tokens: np.ndarray, sequence_length: int, name: str) -> np.ndarray:
    """Blocks [n, sequence_length] of `tokens` [N]. Raises UserError, led by `name`, for less than one block."""
    count = len(tokens) // sequence_length
    if not count:
        raise UserError(
            f"{name}: {len(tokens)} tokens do not fill one block of sequence_length={sequence_length}; "
            "give more text or a shorter sequence_length"
        )
    return tokens[: count * sequence_length].reshape(count, sequence_length)


@dataclass
class Packed:
    """Blocks of tokens [n, T] int32 and their marks [n, T] uint8.

    separate: mask attention between the documents of a block.
    """

    tokens: np.ndarray
    marks: np.ndarray
    separate: bool

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """input_ids and labels [T] int64 of a block; labels are -100 outside of the loss.

        With `separate` also position_ids [T], which restart at every document.
        """
        ids, marks = self.tokens[index].astype(np.int64), self.marks[index]
        labels = np.where(marks & LEARN, ids, -100)
        if not self.separate:
            return {"input_ids": ids, "labels": labels}
        first = (marks & START) > 0
        labels[first] = -100  # a document does not predict the start of the next one
        places = np.arange(len(ids))
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": places - np.maximum.accumulate(np.where(first, places, 0)),
        }

    def rows(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        """`row` of several blocks, stacked: [B, T]."""
        found = [self.row(index) for index in indices]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}
