"""Answers: runs of learned tokens in conversations, and the groups that they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopwise.errors import UserError

from .packing import Bins, Packed, pieces
from .reader import Reader
from .tokens import LEARN, START, Corpus


@dataclass
class Grouped(Reader):
    """Reads pairs: the document, and the record's field `group`. Texts have no group, and None stands for it."""

    group: str | None = None

    @property
    def columns(self) -> list[str]:
        return [*super().columns, *([self.group] if self.group else [])]

    def document(self, record: Any, where: str) -> Any:
        document = super().document(record, where)
        if not document or self.group is None or not self.chat:
            return document and (document, None)
        if self.group not in record:
            fields = ", ".join(map(repr, record))
            self.reject(UserError(f"{where}: no field {self.group!r} to group by among {fields}"))
            return None
        return document, record[self.group]


def runs(learned: np.ndarray, group: Any, where: str) -> list[tuple[int, int, str | None]]:
    """(first, last, group) of the runs of learned tokens in a document, without EOS. The first token is not predicted.

    learned: mask [T].   group: one for all runs, or a list with one for each. Raises UserError, led by `where`, for a
    list of another length.
    """
    edges = np.flatnonzero(np.diff(learned, prepend=False, append=False))
    found = list(zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True))
    groups = group if isinstance(group, list) else [group] * len(found)
    if len(groups) != len(found):
        raise UserError(f"{where}: {len(groups)} groups for {len(found)} answers; give one for all, or one for each")
    return [
        (first, last, None if value is None else str(value))
        for (first, last), value in zip(found, groups, strict=True)
        if first
    ]


@dataclass
class Answers:
    """The answers of blocks.

    numbers [n, T] int32: the answer that a token belongs to, from 1; 0 for none.   groups: of each answer.   alone: the
    blocks of `numbers`, each the beginning of one document; None for the blocks whose loss is measured.
    """

    numbers: np.ndarray
    groups: list[str | None]
    alone: Packed | None = None


@dataclass
class Numbered:
    """The answers of a corpus.

    numbers [N] int32: the answer that a token belongs to, from 1; 0 for none.   groups: of each answer.   sizes
    [answers]: tokens of each answer, also of those that `kept` has cut.
    """

    numbers: np.ndarray
    groups: list[str | None]
    sizes: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, groups: Sequence[Any], name: str) -> Numbered:
        """The answers of `corpus`. groups: of each document, as for `runs`; without any, there are none.

        A text is one run of learned tokens from its first token on, and so has no answer.
        """
        numbers, found = np.zeros(len(corpus.tokens), np.int32), []
        begin = 0
        for number, (end, group) in enumerate(
            zip(corpus.ends.tolist(), groups or [None] * len(corpus.ends), strict=True)
        ):
            learned = (corpus.marks[begin : end - 1] & LEARN) > 0
            for first, last, value in runs(learned, group, f"{name} record {number}"):
                found.append(value)
                numbers[begin + first : begin + last + 1] = len(found)
            begin = end
        return cls(numbers, found, np.bincount(numbers, minlength=len(found) + 1)[1:])

    def kept(self, mask: np.ndarray) -> Numbered:
        """The same answers, with the tokens of `mask` [N]."""
        return Numbered(self.numbers[mask], self.groups, self.sizes)

    def begun(self, corpus: Corpus, length: int) -> np.ndarray:
        """`numbers` [N], but 0 for tokens behind the first `length` of a document, and where its beginning is cut off.

        corpus: of these answers.
        """
        sizes = np.diff(corpus.ends, prepend=0)
        starts = corpus.ends - sizes
        places = np.arange(len(corpus.tokens)) - np.repeat(starts, sizes)
        whole = np.repeat((corpus.marks[starts] & START) > 0, sizes)
        return np.where(whole & (places < length), self.numbers, 0)

    @classmethod
    def joined(cls, parts: Sequence[Numbered]) -> Numbered:
        """The answers of all `parts` in one."""
        before = np.cumsum([0, *(len(part.groups) for part in parts)])
        numbers = [np.where(p.numbers > 0, p.numbers + start, 0) for p, start in zip(parts, before[:-1], strict=True)]
        groups = [group for part in parts for group in part.groups]
        return cls(np.concatenate(numbers).astype(np.int32), groups, np.concatenate([part.sizes for part in parts]))

    def in_blocks(self, blocks: np.ndarray) -> Answers | None:
        """The answers that stand whole in one block, and not at its beginning; None if there are none.

        blocks [n, T]: `numbers`, packed.
        """
        count = len(self.groups) + 1
        rows, places = np.nonzero(blocks)
        ids = blocks[rows, places]
        kept = np.bincount(ids, minlength=count) == [0, *self.sizes]
        kept &= np.bincount(np.unique(rows * count + ids) % count, minlength=count) == 1
        kept[blocks[:, 0]] = False
        if not kept.any():
            return None
        new = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
        return Answers(new[blocks], [self.groups[i - 1] for i in np.flatnonzero(kept)])


def alone(corpus: Corpus, numbers: np.ndarray, sequence_length: int, long: str, name: str) -> Bins:
    """A block for each document that has answers of `numbers` [N], for `fill`: its beginning, without EOS.

    long: as for `pieces`. Raises UserError, led by `name`, as `pieces` does.
    """
    found = pieces(corpus, sequence_length, False, long, name)
    last = {*corpus.ends.tolist()}
    return [[(begin, end - (end in last))] for begin, end in found if numbers[begin:end].any()]


def accuracy(groups: Sequence[str | None], right: Sequence[bool]) -> dict[str, Any]:
    """Share of right answers with its standard error, over all answers and by group.

    Returns {"accuracy", "accuracy_error", "groups": {name: {"answers", "accuracy", "accuracy_error"}}}.
    """
    of_group: dict[str, list[bool]] = {}
    for group, good in zip(groups, right, strict=True):
        if group is not None:
            of_group.setdefault(group, []).append(good)
    found = {
        name: {"answers": len(of_group[name]), **_share(of_group[name])}
        for name in sorted(of_group, key=_numbers_first)
    }
    return {**_share(right), "groups": found}


def _share(right: Sequence[bool]) -> dict[str, float | None]:
    count = len(right)
    p = sum(right) / count
    return {"accuracy": p, "accuracy_error": math.sqrt(p * (1 - p) / (count - 1)) if count > 1 else None}


def _numbers_first(name: str) -> tuple[bool, float, str]:
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name
