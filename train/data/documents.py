"""Documents out of files, directories, globs, `datasets` sources and generated tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loopwise.errors import UserError

from .. import tasks
from .files import no_field, records
from .reader import Reader
from .snapshot import kind_of
from .sources import check_exists, files_of
from .tables import TABLES, is_empty, load_dataset, load_table, one_line_errors

if TYPE_CHECKING:
    from datasets import Dataset


def documents(sources: list[str], reader: Reader) -> Iterator[Any]:
    """The documents of all `sources` in order, without empty ones.

    Raises UserError for a source that does not exist. Raises UserError for a named file that is not UTF-8 and for a bad
    record, unless the reader skips them. Directories and globs often hold images or caches, so their files that are not
    UTF-8 text are left out.
    """
    for source in sources:
        for document in _documents(source, reader):
            if document:
                yield document


def _documents(source: str, reader: Reader) -> Iterator[Any]:
    if tasks.is_task(source):
        return _generated(source, reader_for(source, reader))
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path, reader, strict=True)
    files = files_of(source, reader.split, reader.subset)
    if files is not None:
        return _files(source, files, reader)
    check_exists(source, path)
    return _rows(load_dataset(source, path, reader.split, reader.subset), source, reader)


def reader_for(source: str, reader: Reader) -> Reader:
    """`reader`, or for a generated task a copy that reads its conversations, with the chat template of tasks."""
    if not tasks.is_task(source):
        return reader
    settings = {"chat_template": tasks.CHAT_TEMPLATE, "task": tasks.name_of(source)}
    return replace(reader, field=tasks.MESSAGES, chat=True, **settings)


def _generated(source: str, reader: Reader) -> Iterator[Any]:
    for number, record in enumerate(tasks.parse(source).records()):
        yield reader.document(record, f"{source} record {number}")


def spread(count: int, most: int) -> Sequence[int]:
    """At most `most` of the numbers 0 .. `count` - 1, evenly spread."""
    return range(count) if count <= most else [i * count // most for i in range(most)]


def some_generated(sources: list[str], reader: Reader, most: int) -> Iterator[Any]:
    """The documents of `some_records` of generated tasks."""
    parsed = [tasks.parse(source) for source in sources]
    for i, number in some_records(parsed, most):
        record = parsed[i].record(number)
        yield reader_for(sources[i], reader).document(record, f"{sources[i]} record {number}")


def some_records(sources: list[tasks.Source], most: int) -> Iterator[tuple[int, int]]:
    """(place of the source, number of the record) of at most `most` records, shared among `sources` by their sizes.

    Records take the values of a parameter in turn. Those of a source follow each other, so that its groups differ by at
    most one record. A source begins where the one before it stopped, if it has as many records.
    """
    ends = list(accumulate(source.values["records"] for source in sources))
    taken = 0
    for i, (source, end) in enumerate(zip(sources, ends, strict=True)):
        count = end * min(most, ends[-1]) // ends[-1] - taken
        start = taken if taken + count <= source.values["records"] else 0
        yield from ((i, number) for number in range(start, start + count))
        taken += count


def _files(source: str, paths: list[Path], reader: Reader) -> Iterator[Any]:
    if not paths:
        raise UserError(f"{source}: no files there")
    for path in paths:
        yield from _file(path, reader, strict=False)


def _file(path: Path, reader: Reader, strict: bool) -> Iterator[Any]:
    if kind_of(path, strict) in TABLES:
        if is_empty(path):
            return
        yield from _rows(load_table(path), str(path), reader)
        return
    for _, where, record in records(path, reader.field, reader.chat, strict, reader.reject):
        yield reader.document(record, where)


def _rows(dataset: Dataset, source: str, reader: Reader) -> Iterator[Any]:
    if reader.field not in dataset.column_names:
        raise no_field(source, reader.field, dataset.column_names, reader.chat)
    present = [name for name in reader.columns if name in dataset.column_names]
    number = 0
    with one_line_errors(source):  # a row that cannot be decoded fails here
        for batch in dataset.select_columns(present).iter(1000):
            columns = cast(dict[str, list[Any]], batch)
            for values in zip(*(columns[name] for name in present), strict=True):
                yield reader.document(dict(zip(present, values, strict=True)), f"{source} row {number}")
                number += 1
