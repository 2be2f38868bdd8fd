"""Packing: documents become blocks of equal length.

`wrapped` cuts the row of all tokens at block ends, across documents; an incomplete last block is dropped. `bfd` and
`bfd_split` keep documents whole and pad the blocks. The names are those of TRL's `packing_strategy`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loopwise.errors import UserError

from .tokens import LEARN, PAD, START, Corpus, recurrences_of

Bins = list[list[tuple[int, int]]]  # for each block, (begin, end) of its pieces in the row of all tokens


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


def pieces(corpus: Corpus, sequence_length: int, split_long: bool, long: str, name: str) -> list[tuple[int, int]]:
    """(begin, end) of the documents of `corpus`, none longer than a block.

    split_long: cut a longer document into several pieces, instead of keeping its beginning.   long: `cut`, or `skip` to
    leave longer documents out, or `stop` to raise UserError, led by `name`, for the first of them.
    """
    found: list[tuple[int, int]] = []
    begin = 0
    for number, end in enumerate(corpus.ends.tolist()):
        size = end - begin
        if size > sequence_length and long == "stop":
            raise UserError(
                f"{name}: document {number} has {size} tokens with EOS, and a block sequence_length={sequence_length}; "
                "raise data.sequence_length, or set data.long_documents to cut or skip"
            )
        if size <= sequence_length:
            found.append((begin, end))
        elif long == "cut":
            starts = range(begin, end, sequence_length) if split_long else [begin]
            found += [(start, min(start + sequence_length, end)) for start in starts]
        begin = end
    return found


def longer(corpus: Corpus, sequence_length: int) -> int:
    """The number of documents that are longer than a block."""
    return int((np.diff(corpus.ends, prepend=0) > sequence_length).sum())


def best_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Bins of item numbers whose sizes sum to at most `room`, by best-fit decreasing.

    The longest item comes first; each goes into the bin with the least room that still holds it, or into a new one.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> bins
    rooms: list[int] = []  # keys of `with_room`, sorted
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(rooms, sizes[item])
        if at == len(rooms):
            chosen, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            chosen = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
        bins[chosen].append(item)
        if left := left - sizes[item]:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(chosen)
    return bins


def whole(corpus: Corpus, sequence_length: int, strategy: str, long: str, name: str, may_be_none: bool = False) -> Bins:
    """The blocks of `corpus` under the strategy `bfd` or `bfd_split`, for `fill`.

    long: as for `pieces`.   may_be_none: no document fits, in a part of a text. Raises UserError, led by `name`, if no
    document fits otherwise.
    """
    found = pieces(corpus, sequence_length, strategy == "bfd_split", long, name)
    if not found and not may_be_none:
        raise UserError(
            f"{name}: no document of at most sequence_length={sequence_length} tokens; raise data.sequence_length, or "
            "set data.long_documents=cut"
            if len(corpus.ends)
            else f"{name}: no documents"
        )
    return [[found[i] for i in bin] for bin in best_fit([end - begin for begin, end in found], sequence_length)]


def fill(array: np.ndarray, bins: Bins, sequence_length: int, empty: int) -> np.ndarray:
    """Blocks [n, sequence_length] of `array` [N], with `empty` as padding at their ends."""
    blocks = np.full((len(bins), sequence_length), empty, array.dtype)
    for block, bin in zip(blocks, bins, strict=True):
        at = 0
        for begin, end in bin:
            block[at : at + end - begin] = array[begin:end]
            at += end - begin
    return blocks


def with_starts(marks: np.ndarray, bins: Bins) -> np.ndarray:
    """`marks` [N] with START at the beginning of every piece: a piece of a cut document is a document of its own."""
    marks = np.array(marks)
    marks[[begin for bin in bins for begin, _ in bin]] |= START
    return marks


@dataclass
class Packed:
    """Blocks of tokens [n, T] int32 and their marks [n, T] uint8.

    separate: mask attention between the documents of a block.   padded: blocks may end in padding.   by_record: give R
    of a block, the greatest of its records.
    """

    tokens: np.ndarray
    marks: np.ndarray
    separate: bool
    padded: bool = False
    by_record: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """The number of tokens, without padding."""
        return int((self.marks & PAD == 0).sum()) if self.padded else self.tokens.size

    def real(self, indices: Sequence[int]) -> np.ndarray:
        """True [B, T] for the tokens of several blocks that are no padding."""
        return self.marks[[*indices]] & PAD == 0

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """`row`, and with padding also the block's `num_tokens` [] without it."""
        row = self.row(index)
        if self.padded:
            row["num_tokens"] = np.array((self.marks[index] & PAD == 0).sum(), np.int64)
        return row

    def row(self, index: int) -> dict[str, np.ndarray]:
        """input_ids and labels [T] int64 of a block; labels are -100 outside of the loss.

        With `separate` also position_ids [T], which restart at every document; with `by_record` a scalar
        num_recurrences, 0 if no record of the block has an R.
        """
        ids, marks = self.tokens[index].astype(np.int64), self.marks[index]
        labels = np.where(marks & LEARN, ids, -100)
        more = {"num_recurrences": np.array(recurrences_of(marks).max(), np.int64)} if self.by_record else {}
        if not self.separate:
            return {"input_ids": ids, "labels": labels, **more}
        first = (marks & START) > 0
        labels[first] = -100  # a document does not predict the start of the next one
        places = np.arange(len(ids))
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": places - np.maximum.accumulate(np.where(first, places, 0)),
            **more,
        }

    def rows(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        """`row` of several blocks, stacked: [B, T]."""
        found = [self.row(index) for index in indices]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}
