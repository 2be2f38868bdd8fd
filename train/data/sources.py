"""Documents out of files, directories, globs and `datasets` sources."""

from __future__ import annotations

import glob
import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from loopwise.errors import UserError, missing, reason
from loopwise.unused import Unused

from . import tasks
from .chat import ARGUMENTS, conversation_of, encode
from .files import no_field, records
from .snapshot import RECORDS, files_of_split, is_snapshot, kind_of

NAMED = 10  # skipped records that are named one by one
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # which `datasets` reads


@dataclass
class Reader:
    """How records become documents: the text in `field`, or with `chat` the conversation there, encoded by `tokenizer`.

    skip: a bad record is named on stderr and left out, where it would stop the run otherwise.
    """

    field: str = "text"
    split: str = "train"
    subset: str | None = None
    chat: bool = False
    skip: bool = False
    tokenizer: Any = None
    skipped: int = 0

    @property
    def columns(self) -> list[str]:
        """The columns that are read of a table."""
        return [self.field, *(ARGUMENTS if self.chat else ())]

    def take(self, record: Any, where: str) -> Any:
        """The document of a record: a text, an encoded conversation, or None where it was skipped."""
        try:
            value = _value(record, where, self.field, self.chat)
            if not self.chat:
                return _text(value, where, self.field)
            return encode(conversation_of(record, self.field, where), self.tokenizer, where)
        except UserError as error:
            self.bad(error)
            return None

    def bad(self, error: UserError) -> None:
        if not self.skip:
            raise error
        self.skipped += 1
        if self.skipped <= NAMED:
            more = "; the next ones are not named" if self.skipped == NAMED else ""
            print(f"skipped {error}{more}", file=sys.stderr)


def documents(sources: list[str], reader: Reader) -> Iterator[Any]:
    """The documents of all `sources`, in their order; empty ones are left out.

    Raises UserError for a source that does not exist and, unless the reader skips them, for a file that is not UTF-8
    text, and a bad line (with file and line). Directories and globs leave out files that are not UTF-8 text: they often
    hold images or caches.
    """
    for source in sources:
        for document in _documents(source, reader):
            if document:
                yield document


def _documents(source: str, reader: Reader) -> Iterator[Any]:
    if tasks.is_task(source):
        return _generated(source, of_source(source, reader))
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path, reader, strict=True)
    files = files_of(source, reader.split, reader.subset)
    if files is not None:
        return _files(source, files, reader)
    check_exists(source, path)
    return _rows(_dataset(source, path, reader.split, reader.subset), source, reader)


def of_source(source: str, reader: Reader) -> Reader:
    """`reader`, or of a generated task one that reads its conversations whatever the other sources are read for."""
    return replace(reader, field=tasks.MESSAGES, chat=True) if tasks.is_task(source) else reader


def _generated(source: str, reader: Reader) -> Iterator[Any]:
    for number, record in enumerate(tasks.parse(source).records()):
        yield reader.take(record, f"{source} record {number}")


def spread(count: int, most: int) -> Sequence[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return range(count) if count <= most else [i * count // most for i in range(most)]


def some_generated(sources: list[str], reader: Reader, most: int) -> Iterator[Any]:
    """At most `most` records of generated tasks, evenly spread over all of them, as documents."""
    parsed = [tasks.parse(source) for source in sources]
    ends = list(accumulate(task.values["records"] for task in parsed))
    for place in spread(ends[-1], most):
        i = bisect_right(ends, place)
        number = place - (ends[i - 1] if i else 0)
        yield of_source(sources[i], reader).take(parsed[i].record(number), f"{sources[i]} record {number}")


def check_exists(source: str, path: Path) -> None:
    """Raises UserError for what looks like a path, and is not there, rather than ask the hub for it."""
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix):
        raise UserError(f"{source}: no such file or directory")


def files_of(source: str, split: str = "train", subset: str | None = None) -> list[Path] | None:
    """The local files of a source, of one split where it has any, or None where it is a dataset or a generated task."""
    if tasks.is_task(source):
        return None
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir() and not is_dataset(path):
        files = sorted(_walk(path))
        if files and _has_splits(path, files):
            with told(source):
                return files_of_split(path, split, subset)
        return files
    if any(character in source for character in "*?["):
        return [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p)]
    return None


def _has_splits(path: Path, files: list[Path]) -> bool:
    with told(str(path)):
        return is_snapshot(path, files)


def unused(sources: list[str], split: str, subset: str | None, prefix: str = "") -> Iterator[Unused]:
    """The keys, behind `prefix`, that are of no use to `sources`. Raises UserError for those that cannot be read."""
    splits = subsets = fields = named = local = False
    if prefix and all(map(tasks.is_task, sources)):
        yield Unused(f"{prefix}chat_field", (), "records of generated tasks are conversations in any case")
    for source in sources:
        if tasks.is_task(source):  # its parameters say all
            continue
        path = Path(source).expanduser()
        files = files_of(source, split, subset)
        snapshot = path.is_dir() and not is_dataset(path) and _has_splits(path, sorted(_walk(path)))
        hub = files is None and not path.exists()
        splits |= hub or snapshot or (path / "dataset_dict.json").is_file()
        subsets |= hub or snapshot
        local |= files is not None
        fields |= files is None or any(kind_of(file, strict=False) in RECORDS for file in files)
        named |= path.is_file()
    if not splits and all(map(tasks.is_task, sources)):
        yield Unused(f"{prefix}split", (), f"a generated task's stands in its source, as {sources[0]}")
    elif not splits:
        plain = "files, folders of files without splits, and single saved datasets"
        yield Unused(f"{prefix}split", (), f"{plain} have none; name the files of the split")
    if not subsets:
        yield Unused(f"{prefix}subset", (), "it belongs to datasets of the hub, or to folders with a dataset card")
    if not fields:
        yield Unused(f"{prefix}text_field", (), "text files and generated tasks have no fields")
    if not fields and not named:
        why = "texts of a folder that are not UTF-8 are left out in any case, and generated tasks have no bad records"
        yield Unused(f"{prefix}bad_records", (), why)
    if prefix and not local:
        yield Unused(f"{prefix}cache", (), "it keeps tokens of local files, and there are none")


def _files(source: str, paths: list[Path], reader: Reader) -> Iterator[Any]:
    if not paths:
        raise UserError(f"{source}: no files there")
    for path in paths:
        yield from _file(path, reader, strict=False)


def _walk(directory: Path) -> Iterator[Path]:
    for here, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith((".", "__pycache__"))]
        yield from (Path(here, name) for name in files if not name.startswith("."))


def _file(path: Path, reader: Reader, strict: bool) -> Iterator[Any]:
    if kind_of(path, strict) in TABLES:
        if is_empty(path):
            return
        yield from _rows(_table(path), str(path), reader)
        return
    for _, where, record in records(path, reader.field, reader.chat, strict, reader.bad):
        yield reader.take(record, where)


def _value(record: Any, where: str, field: str, chat: bool) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is an object with a field {field!r}, not a {type(record).__name__}")
    if field not in record:
        raise no_field(where, field, record, chat)
    return record[field]


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} is not text: half a surrogate at {error.start}") from None
    return value


def is_dataset(directory: Path) -> bool:
    saved = ("dataset_info.json", "state.json", "dataset_dict.json")
    return any((directory / name).is_file() for name in saved)


def is_empty(path: Path) -> bool:
    """True for a parquet file without rows, as the last part of a table may be: `datasets` fails on it."""
    if kind_of(path, strict=False) != ".parquet":
        return False
    with told(str(path)):
        from pyarrow import parquet

        return parquet.read_metadata(path).num_rows == 0


def _table(path: Path) -> Any:
    # Read straight from the file: a copy in the user's cache would outlive the run.
    with tempfile.TemporaryDirectory() as cache, told(str(path)):
        import datasets

        keys: dict[str, Any] = {"split": "train", "cache_dir": cache, "keep_in_memory": True}
        return datasets.load_dataset(TABLES[kind_of(path)], data_files=str(path), **keys)


def _dataset(source: str, path: Path, split: str, subset: str | None) -> Any:
    with told(source):
        import datasets

        return saved(source, path, split) if path.is_dir() else datasets.load_dataset(source, subset, split=split)


def saved(source: str, path: Path, split: str) -> Any:
    """The dataset that was saved in `path`. Raises UserError where it does not have that split."""
    import datasets

    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(f"{source}: no split {split!r}; it has {', '.join(map(repr, dataset))}")
    return dataset[split]


def _rows(dataset: Any, source: str, reader: Reader) -> Iterator[Any]:
    if reader.field not in dataset.column_names:
        raise no_field(source, reader.field, dataset.column_names, reader.chat)
    present = [name for name in reader.columns if name in dataset.column_names]
    number = 0
    with told(source):  # what cannot be decoded shows when it is read
        for batch in dataset.select_columns(present).iter(1000):
            for values in zip(*(batch[name] for name in present), strict=True):
                yield reader.take(dict(zip(present, values, strict=True)), f"{source} row {number}")
                number += 1


@contextmanager
def told(source: str) -> Iterator[None]:
    """Turns whatever `datasets` raises about `source` into one line."""
    try:
        import datasets

        datasets.disable_progress_bars()
        yield
    except UserError:
        raise
    except ImportError:
        raise missing(source, "the datasets library", "train") from None
    except Exception as error:  # its own, pyarrow's, the hub's: they share no base class
        raise UserError(f"{source}: not readable as a file, a directory or a dataset ({reason(error)})") from None
