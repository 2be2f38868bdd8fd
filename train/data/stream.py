"""Sources that are read while training: blocks of a `datasets` stream, in an order that a resumed run finds again.

A stream is taken window by window: so many documents are tokenised, packed behind what the window before left over,
and their blocks are put in an order that is a function of (seed, window). A checkpoint keeps where the window of its
next block begins; every process reads the whole stream and picks its own samples, so ranks do not enter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopwise.errors import UserError

from . import tasks
from .data import Packed, reader_of, tokenise
from .files import records
from .recipe import Data
from .snapshot import kind_of
from .sources import TABLES, Reader, check_exists, files_of, is_empty, of_source, saved, told

MARKS = "streams.json"


@dataclass
class Mark:
    """Where a window begins. first: number of its first block.   source, row, state: the source that is read, its next
    row, and where `datasets` is in it (None: at the beginning).   rest: tokens and marks that fill no block yet."""

    first: int = 0
    window: int = 0
    source: int = 0
    row: int = 0
    state: dict[str, Any] | None = None
    rest: tuple[list[int], list[int]] = ([], [])


class Stream:
    """The blocks of `sources`, read one after the other and then again, packed as `data` says.

    behind: how many blocks before the newest one that was asked for `mark` may be asked for.
    """

    def __init__(self, sources: list[str], data: Data, tokenizer: Any, seed: int, mark: Mark | None, behind: int = 0):
        self.sources, self.data, self.tokenizer, self.seed, self.behind = sources, data, tokenizer, seed, behind
        self.reader = reader_of(data, tokenizer)
        self._start(mark or Mark())

    def _start(self, mark: Mark) -> None:
        self.marks = [mark]  # of the present window last, and of those before that may be asked for
        self.blocks = self._empty()
        self.next = mark
        self.dataset: Any = None
        self.rows: Iterator[Any] = iter(())

    def _empty(self) -> Packed:
        return Packed(*(np.zeros((0, self.data.sequence_length), t) for t in (np.int32, np.uint8)), separate=False)

    def row(self, block: int) -> dict[str, np.ndarray]:
        """Block number `block`, as `Packed.row`. Going back costs reading from the beginning."""
        if block < self.marks[-1].first:
            self._start(Mark())
        while block >= self.next.first:
            self._read()
        while len(self.marks) > 1 and self.marks[1].first <= block - self.behind:
            self.marks.pop(0)
        return self.blocks.row(block - self.marks[-1].first)

    def first_window(self) -> Packed:
        """The blocks of the first window that has any."""
        self.row(0)
        return self.blocks

    def mark(self, block: int) -> Mark:
        """Where the window begins that holds `block`, or an earlier one."""
        return next((mark for mark in reversed(self.marks) if mark.first <= block), Mark())

    def _read(self) -> None:
        """The next window."""
        begin = self.next
        corpus = tokenise(self._documents(), self.tokenizer)
        tokens, marks = (
            np.concatenate([np.array(rest, kind), new])
            for rest, kind, new in zip(begin.rest, (np.int32, np.uint8), (corpus.tokens, corpus.marks), strict=True)
        )
        length = self.data.sequence_length
        count = len(tokens) // length
        keys = np.random.Philox(key=np.array([self.seed, begin.window], np.uint64)).random_raw(count)
        order = np.argsort(keys, kind="stable")
        cut = (part[: count * length].reshape(count, length)[order] for part in (tokens, marks))
        self.blocks = Packed(*cut, separate=self.data.separate_documents)
        if self.marks[-1] is not begin:
            self.marks.append(begin)
        rest = tuple(part[count * length :].tolist() for part in (tokens, marks))
        state = None if self.dataset is None else self.dataset.state_dict()
        self.next = Mark(begin.first + count, begin.window + 1, self.place, self.number, state, rest)

    def _documents(self) -> Iterator[Any]:
        """Those of one window: `data.window` of them."""
        passes, found = 0, 0
        begin = self.next
        self.place, self.number = begin.source, begin.row
        if self.dataset is None:
            self._open(begin.state)
        while found < self.data.window:
            record = next(self.rows, None)
            if record is None:
                self.place, self.number = (self.place + 1) % len(self.sources), 0
                self._open(None)
                passes += self.place == 0
                if passes == 2:  # not one document in a whole pass
                    raise UserError(f"{', '.join(self.sources)}: no text in it")
                continue
            number = self.number
            self.number += 1
            source = self.sources[self.place]
            where = self.dataset.where if isinstance(self.dataset, Files) else f"{source} row {number}"
            document = of_source(source, self.reader).take(record, where)
            if document:
                passes, found = 0, found + 1
                yield document

    def _open(self, state: dict[str, Any] | None) -> None:
        source = self.sources[self.place]
        with told(source):
            self.dataset = stream_of(source, self.reader)
            if state is not None:
                self.dataset.load_state_dict(state)
        self.rows = _told_rows(self.dataset, source)


def first_blocks(data: Data, tokenizer: Any) -> list[Packed]:
    """The first window of every streamed source, in no particular order: to see that it can be read."""
    opened = open_all(data, tokenizer, seed=0, checkpoint=None, behind=0).values()
    return [stream.first_window() for stream in opened]


def open_all(data: Data, tokenizer: Any, seed: int, checkpoint: Path | None, behind: int) -> dict[int, Stream]:
    """The streams of `data` by their place among its parts, where `checkpoint` has left them."""
    file = checkpoint / MARKS if checkpoint else None
    kept = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    return {
        i: Stream(sources, data, tokenizer, seed + i, Mark(**kept[str(i)]) if str(i) in kept else None, behind)
        for i, (sources, streamed) in enumerate(zip(data.parts(), data.streamed(), strict=True))
        if streamed
    }


def save_marks(streams: dict[int, Stream], taken: list[int], directory: Path) -> None:
    """Leave in `directory` where the streams go on after so many blocks of each source."""
    if streams:
        (directory / MARKS).write_text(
            json.dumps({i: asdict(x.mark(taken[i])) for i, x in streams.items()}), encoding="utf-8"
        )


class Files:
    """The records of `files` as a stream that goes on where its state says.

    They are those that `files.records` finds, as for a source that is read before training. where: place of the last.
    """

    def __init__(self, files: list[Path], reader: Reader, strict: bool):
        self.files, self.reader, self.strict = files, reader, strict
        self.file, self.line, self.where = 0, 0, ""

    def __iter__(self) -> Iterator[Any]:
        options = (self.reader.field, self.reader.chat, self.strict, self.reader.bad)
        while self.file < len(self.files):
            for found in records(self.files[self.file], *options, after=self.line):
                self.line, self.where = found.number, found.where
                yield found.record
            self.file, self.line = self.file + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"file": self.file, "line": self.line}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if set(state) != {"file", "line"}:
            raise UserError("the checkpoint is of an earlier release, which read this stream otherwise; start anew")
        self.file, self.line = state["file"], state["line"]


def _told_rows(dataset: Any, source: str) -> Iterator[Any]:
    with told(source):
        yield from dataset


def stream_of(source: str, reader: Reader) -> Any:
    """The stream of a source: a generated task, local files, or of `datasets` a hub id, a saved dataset.

    Raises UserError where it is none of these.
    """
    if tasks.is_task(source):
        return tasks.Rows(source)
    import datasets

    files = files_of(source, reader.split, reader.subset)
    if files is None:
        path = Path(source).expanduser()
        check_exists(source, path)
        if path.is_dir():
            return saved(source, path, reader.split).to_iterable_dataset()
        return datasets.load_dataset(source, reader.subset, split=reader.split, streaming=True)
    if not files:
        raise UserError(f"{source}: no files there")
    kinds = {TABLES.get(kind_of(file, strict=False), "") for file in files}
    if kinds == {""}:
        return Files(files, reader, strict=Path(source).expanduser().is_file())
    if len(kinds) != 1:
        found = ", ".join(sorted({kind_of(file, strict=False) or file.name for file in files}))
        raise UserError(f"{source}: a stream reads parquet or arrow files alone, no other files beside them: {found}")
    paths = [str(file) for file in files if not is_empty(file)]
    if not paths:
        raise UserError(f"{source}: no text in it")
    return datasets.load_dataset(kinds.pop(), data_files=paths, split="train", streaming=True)
