"""Conversations to measure: each is one sequence, with its answers and their groups."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..train import tasks
from ..train.data import LEARN, answers, split, tokenise
from ..train.data.documents import documents, some_generated, spread
from .recipe import Evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer(NamedTuple):
    """A run of the assistant's tokens: `first` to `last`, counted from 0, of sequence number `sequence`."""

    sequence: int
    first: int
    last: int
    group: str | None


@dataclass
class Sequences:
    """The sequences to measure.

    ids: token ids [T] int64 of each sequence.   learned: mask [T] of the tokens that count, of each sequence.
    """

    ids: list[np.ndarray]
    learned: list[np.ndarray]
    answers: list[Answer]

    def spread(self, most: int) -> Sequences:
        """At most `most` of the sequences: of text evenly spread; of conversations at random, as groups may take turns.

        It is the same choice at every call.
        """
        count = len(self.ids)
        if not self.answers:
            return self.some(spread(count, most))
        return self.some(sorted(np.random.default_rng(0).permutation(count)[:most].tolist()))

    def some(self, kept: Iterable[int]) -> Sequences:
        """The sequences of these numbers, in this order."""
        kept = [*kept]
        place = {old: new for new, old in enumerate(kept)}
        moved = [a._replace(sequence=place[a.sequence]) for a in self.answers if a.sequence in place]
        return Sequences([self.ids[i] for i in kept], [self.learned[i] for i in kept], moved)


def conversations(recipe: Evaluate, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """The conversations of `recipe`. Names long and skipped records on stderr.

    A generated task with a limit draws only that many records. Files are read whole: their number of records, the
    held-out split and the lengths are unknown before. Raises UserError for a limit of generated tasks and files
    together, and if no conversation is left to measure.
    """
    field = recipe.chat_field or tasks.MESSAGES
    skip = recipe.bad_records == "skip"
    reader = answers.Grouped(
        field, recipe.split, recipe.subset, chat=True, skip=skip, tokenizer=tokenizer, group=recipe.group
    )
    generated = [source for source in recipe.data if tasks.is_task(source)]
    if recipe.limit and 0 < len(generated) < len(recipe.data):
        raise UserError(
            f"limit={recipe.limit} takes the first records of {generated[0]}, but spreads over files: measure them one "
            "by one"
        )
    drawn = recipe.limit and generated and not recipe.eval_fraction
    groups: list[Any] = []

    def kept() -> Iterator[Any]:
        read = some_generated(recipe.data, reader, recipe.limit or 0) if drawn else documents(recipe.data, reader)
        for conversation, group in read:
            groups.append(group)
            yield conversation

    corpus = tokenise(kept(), tokenizer)
    held_out = split(corpus, recipe.eval_fraction)[1] if recipe.eval_fraction else np.ones(len(corpus.tokens), bool)
    found = Sequences([], [], [])
    long = begin = 0
    for number, (end, group) in enumerate(zip(corpus.ends.tolist(), groups, strict=True)):
        own = slice(begin, end - 1)  # without EOS, which only separates documents
        begin = end
        if not held_out[own].all():
            continue
        if end - 1 - own.start > recipe.sequence_length:
            long += 1
            continue
        learned = (corpus.marks[own] & LEARN) > 0
        try:
            where = f"record {number} of {', '.join(recipe.data)}"
            found.answers += [Answer(len(found.ids), *run) for run in answers.runs(learned, group, where)]
        except UserError as error:
            reader.reject(error)
            continue
        found.ids.append(corpus.tokens[own].astype(np.int64))
        found.learned.append(learned)
    if long:
        print(f"left out: {long} records of over sequence_length={recipe.sequence_length} tokens", file=sys.stderr)
    if reader.skipped:
        print(f"{', '.join(recipe.data)}: {reader.skipped} bad records were skipped", file=sys.stderr)
    if not found.answers:
        raise UserError(f"{', '.join(recipe.data)}: no answers to measure in it")
    return found


def accuracy(sequences: Sequences, right: list[bool]) -> dict[str, Any]:
    """`accuracy` of train's answers for those of `sequences`, in order."""
    return answers.accuracy([answer.group for answer in sequences.answers], right)
