"""Sources that are read during training, in an order that a resumed run reproduces.

A stream is read window by window. The documents of a window are tokenized and packed, under `wrapped` behind the
remainder of the window before. Its blocks are shuffled by a function of (seed, window). A checkpoint stores where the
window of the next block begins, and a digest of what was read there: a source that has changed since is refused.
Every process reads the whole stream and takes its own samples, so the number of ranks does not matter.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loopwise.errors import UserError

from .. import tasks
from ..recipe import Data
from .blocks import name_long, packed_documents, reader_of
from .documents import reader_for
from .files import records
from .packing import Packed
from .reader import Reader
from .snapshot import kind_of
from .sources import check_exists, files_of
from .tables import TABLES, is_empty, load_saved, one_line_errors
from .tokens import Corpus, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = "streams.json"
Rest = tuple[list[int], list[int]]  # tokens and marks that fill no block yet


@dataclass
class Mark:
    """The beginning of a window.

    first: number of its first block.   window: its number.   source, row: the source that is read, and its next row.
    state: position of the `datasets` stream (None: its beginning).   rest: tokens and marks that fill no block yet.
    read: digest of the window's documents, and of the names and sizes of the files before it; None: not known.
    sources: those of the stream; None: not known.
    """

    first: int = 0
    window: int = 0
    source: int = 0
    row: int = 0
    state: dict[str, Any] | None = None
    rest: Rest = ([], [])
    read: str | None = None
    sources: list[str] | None = None


class Stream:
    """The blocks of `sources`, which are read one after the other and then again from the first.

    mark: where to begin (None: at the beginning).   behind: `mark()` is answered for blocks up to this far behind the
    newest one read.   accept: a text that differs from what `mark` was written for is named on stderr, not refused.
    """

    def __init__(
        self,
        sources: list[str],
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        mark: Mark | None,
        behind: int = 0,
        accept: bool = False,
    ):
        self.sources, self.data, self.tokenizer, self.seed, self.behind = sources, data, tokenizer, seed, behind
        self.accept = accept
        self.reader = reader_of(data, tokenizer)
        self.named = False  # True after a line about documents that are too long
        self._start(mark or Mark())

    def _start(self, mark: Mark) -> None:
        self.marks = [mark]  # marks of earlier windows that `mark()` may need, then of the present one
        self.blocks = self._empty()
        self.next = mark
        self.passes = 0  # how often the last source has ended since the last block
        self.dataset: Any = None  # dataset of `stream_of`
        self.rows: Iterator[Any] = iter(())

    def _empty(self) -> Packed:
        return Packed(*(np.zeros((0, self.data.sequence_length), t) for t in (np.int32, np.uint8)), separate=False)

    def row(self, block: int) -> dict[str, np.ndarray]:
        """Block number `block`, as `Packed.sample` gives it. Reads on as needed; going back reads from the beginning.

        Raises UserError if the source cannot be read on, or has changed since the mark.
        """
        if block < self.marks[-1].first:
            self._start(Mark())
        while block >= self.next.first:
            self._read()
        while len(self.marks) > 1 and self.marks[1].first <= block - self.behind:
            self.marks.pop(0)
        return self.blocks.sample(block - self.marks[-1].first)

    def first_window(self) -> Packed:
        """The blocks of the first window that has any."""
        self.row(0)
        return self.blocks

    def mark(self, block: int) -> Mark:
        """The beginning of the window that holds `block`, or of an earlier window."""
        return next((mark for mark in reversed(self.marks) if mark.first <= block), Mark())

    def _read(self) -> None:
        """Read the next window."""
        begin = self.next
        files = self._files_before(begin)
        corpus = tokenise(self._documents(), self.tokenizer)
        self._compare(begin, _digest(corpus, files))
        cut, rest = self._packed(corpus, begin.rest)
        count = len(cut)
        self.passes = 0 if count else self.passes
        keys = np.random.Philox(key=np.array([self.seed, begin.window], np.uint64)).random_raw(count)
        order = np.argsort(keys, kind="stable")
        self.blocks = replace(cut, tokens=cut.tokens[order], marks=cut.marks[order])
        if self.marks[-1] is not begin:
            self.marks.append(begin)
        state = None if self.dataset is None else self.dataset.state_dict()
        self.next = Mark(begin.first + count, begin.window + 1, self.place, self.number, state, rest)

    def _files_before(self, mark: Mark) -> list[tuple[str, int]]:
        """(name, bytes) of the local files that the source of `mark` has given whole."""
        self._open_at(mark)
        files = self.dataset.files[: self.dataset.file] if isinstance(self.dataset, FileStream) else []
        return [(str(file), file.stat().st_size) for file in files if file.is_file()]

    def _compare(self, mark: Mark, read: str) -> None:
        """Keep the digest `read` in `mark`. Raises UserError, unless `accept`, if the mark holds another one."""
        before, mark.read = mark.read, read
        if before in (None, read):
            return
        changed = f"{', '.join(self.sources)}: the text has changed since the checkpoint was written"
        if not self.accept:
            raise UserError(f"{changed} (window {mark.window}): --accept-changes continues with the new one")
        print(f"{changed}; continuing with the new one", file=sys.stderr)

    def _packed(self, corpus: Corpus, rest: Rest) -> tuple[Packed, Rest]:
        """(the blocks of `corpus` behind `rest`, the rest of these). Whole documents leave none."""
        if self.data.padded:
            name = ", ".join(self.sources)
            self.named = self.named or name_long(corpus, self.data, f"{name}, in a window")
            may_be_none = self.passes < 2  # not after a whole pass without a block
            return packed_documents(corpus, self.data, self.tokenizer, name, may_be_none), ([], [])
        length = self.data.sequence_length
        tokens, marks = (
            np.concatenate([np.array(old, kind), new])
            for old, kind, new in zip(rest, (np.int32, np.uint8), (corpus.tokens, corpus.marks), strict=True)
        )
        end = len(tokens) // length * length
        cut = (part[:end].reshape(-1, length) for part in (tokens, marks))
        by_record = self.data.recurrences is not None
        blocks = Packed(*cut, separate=self.data.separate_documents, by_record=by_record)
        return blocks, (tokens[end:].tolist(), marks[end:].tolist())

    def _documents(self) -> Iterator[Any]:
        """The documents of one window: `data.window` of them."""
        passes, found = 0, 0
        self._open_at(self.next)
        while found < self.data.window:
            record = next(self.rows, None)
            if record is None:
                self.place, self.number = (self.place + 1) % len(self.sources), 0
                self._open(None)
                passes += self.place == 0
                self.passes += self.place == 0
                if passes == 2:  # a whole pass without a document
                    raise UserError(f"{', '.join(self.sources)}: no text in it")
                continue
            number = self.number
            self.number += 1
            source = self.sources[self.place]
            where = self.dataset.where if isinstance(self.dataset, FileStream) else f"{source} row {number}"
            document = reader_for(source, self.reader).document(record, where)
            if document:
                passes, found = 0, found + 1
                yield document

    def _open_at(self, mark: Mark) -> None:
        self.place, self.number = mark.source, mark.row
        if self.dataset is None:
            self._open(mark.state)

    def _open(self, state: dict[str, Any] | None) -> None:
        source = self.sources[self.place]
        with one_line_errors(source):
            self.dataset = stream_of(source, self.reader)
            if state is not None:
                self.dataset.load_state_dict(state)
        self.rows = _rows(self.dataset, source)


def _digest(corpus: Corpus, files: list[tuple[str, int]]) -> str:
    """Hash of the documents of a window, and of the `files` before it."""
    digest = hashlib.blake2b(json.dumps(files).encode(), digest_size=16)
    for array in (corpus.tokens, corpus.marks):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def first_blocks(data: Data, tokenizer: PreTrainedTokenizerBase) -> list[Packed]:
    """The first window of every streamed source. Raises UserError for a source that cannot be read."""
    streams = open_all(data, tokenizer, seed=0, checkpoint=None, behind=0).values()
    return [stream.first_window() for stream in streams]


def open_all(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    checkpoint: Path | None,
    behind: int,
    accept: bool = False,
) -> dict[int, Stream]:
    """The streams of `data` by their place in `data.parts()`, at the positions that `checkpoint` stores.

    behind, accept: as in `Stream`. A stream whose sources were others then begins anew.
    """
    file = checkpoint / MARKS if checkpoint else None
    stored = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    marks = {int(i): Mark(**fields) for i, fields in stored.items()}
    found: dict[int, Stream] = {}
    for i, (sources, streamed) in enumerate(zip(data.parts(), data.streamed(), strict=True)):
        if streamed:
            mark = marks.get(i)
            if mark and mark.sources not in (None, sources):  # other settings were accepted
                mark = None
            found[i] = Stream(sources, data, tokenizer, seed + i, mark, behind, accept)
    return found


def save_marks(streams: dict[int, Stream], taken: list[int], directory: Path) -> None:
    """Write into `directory` where each stream continues. `taken`: number of blocks used of each source."""
    if streams:
        (directory / MARKS).write_text(
            json.dumps({i: asdict(x.mark(taken[i])) | {"sources": x.sources} for i, x in streams.items()}),
            encoding="utf-8",
        )


class FileStream:
    """The records of `files` as a resumable stream, with the methods of a `datasets` stream.

    It yields the records of `files.records`, as a source that is read before training does.   strict: as there.
    where: place of the last record, for errors.
    """

    def __init__(self, files: list[Path], reader: Reader, strict: bool):
        self.files, self.reader, self.strict = files, reader, strict
        self.file, self.line, self.where = 0, 0, ""

    def __iter__(self) -> Iterator[Any]:
        options = (self.reader.field, self.reader.chat, self.strict, self.reader.reject)
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


def _rows(dataset: Any, source: str) -> Iterator[Any]:
    with one_line_errors(source):
        yield from dataset


def stream_of(source: str, reader: Reader) -> Any:
    """The stream of a generated task, of local files, of a saved dataset or of a hub dataset.

    A stream is iterable, with `state_dict` and `load_state_dict`. Raises UserError for any other source.
    """
    if tasks.is_task(source):
        return tasks.Rows(source)
    files = files_of(source, reader.split, reader.subset)
    if files is None:
        path = Path(source).expanduser()
        check_exists(source, path)
        if path.is_dir():
            return load_saved(source, path, reader.split).to_iterable_dataset()
        import datasets

        return datasets.load_dataset(source, reader.subset, split=reader.split, streaming=True)
    if not files:
        raise UserError(f"{source}: no files there")
    kinds = {TABLES.get(kind_of(file, strict=False), "") for file in files}
    if kinds == {""}:
        return FileStream(files, reader, strict=Path(source).expanduser().is_file())
    if len(kinds) != 1:
        found = ", ".join(sorted({kind_of(file, strict=False) or file.name for file in files}))
        raise UserError(f"{source}: a stream of parquet or arrow files cannot hold other files beside them: {found}")
    paths = [str(file) for file in files if not is_empty(file)]
    if not paths:
        raise UserError(f"{source}: no text in it")
    import datasets

    return datasets.load_dataset(kinds.pop(), data_files=paths, split="train", streaming=True)
