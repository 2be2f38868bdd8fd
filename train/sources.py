"""Documents out of files, directories, globs and `datasets` sources."""

from __future__ import annotations

import glob
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopwise.errors import UserError, reason

from .chat import messages_of

NAMED = 10  # skipped records that are named one by one
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


@dataclass
class Reader:
    """How records become documents: the text in `field`, or with `chat` the conversation there.

    skip: a bad record is named on stderr and left out, where it would stop the run otherwise.
    """

    field: str = "text"
    split: str = "train"
    subset: str | None = None
    chat: bool = False
    skip: bool = False
    skipped: int = 0

    def take(self, record: Any, where: str) -> Any:
        """The document of a record: a text, a list of messages, or None where it was skipped."""
        try:
            value = _value(record, where, self.field)
            return (
                messages_of(value, f"{where}: field {self.field!r}") if self.chat else _text(value, where, self.field)
            )
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

    Raises UserError for a source that does not exist, a file that is not UTF-8 text, a bad line (with file and line).
    Directories and globs leave out files that are not UTF-8 text: they often hold images or caches.
    """
    for source in sources:
        for document in _documents(source, reader):
            if document:
                yield document


def _documents(source: str, reader: Reader) -> Iterator[Any]:
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path, reader, strict=True)
    files = files_of(source)
    if files is not None:
        return _files(source, files, reader)
    check_exists(source, path)
    return _rows(_dataset(source, path, reader.split, reader.subset), source, reader)


def check_exists(source: str, path: Path) -> None:
    """Raises UserError for what looks like a path, and is not there, rather than ask the hub for it."""
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix):
        raise UserError(f"{source}: no such file or directory")


def files_of(source: str) -> list[Path] | None:
    """The local files of a source, or None where it is a dataset."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir() and not is_dataset(path):
        return sorted(_walk(path))
    if any(character in source for character in "*?["):
        return [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p)]
    return None


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
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _jsonl(path, reader)
    elif path.suffix == ".json":
        yield from _json(path, reader)
    elif path.suffix in TABLES:
        yield from _rows(_table(path), str(path), reader)
    elif reader.chat:
        if strict:
            raise UserError(f"{path}: conversations are read from .jsonl, .json, .parquet, .arrow and datasets")
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            if strict:
                raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        else:
            if strict or "\0" not in text:
                yield text


def _jsonl(path: Path, reader: Reader) -> Iterator[Any]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if text.strip():
                        yield reader.take(json.loads(text), where)
                except json.JSONDecodeError as error:
                    reader.bad(UserError(f"{where}: not JSON ({error.msg} at column {error.colno})"))
                except UnicodeDecodeError as error:
                    reader.bad(UserError(f"{where}: not UTF-8 ({error.reason})"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _json(path: Path, reader: Reader) -> Iterator[Any]:
    """The records of one array, or of one object a line, which some call .json too."""
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        yield from _jsonl(path, reader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    else:
        for number, record in enumerate(records if isinstance(records, list) else [records]):
            yield reader.take(record, f"{path} record {number}")


def _value(record: Any, where: str, field: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is an object with a field {field!r}, not a {type(record).__name__}")
    if field not in record:
        fields = ", ".join(map(repr, record)) or "no fields"
        raise UserError(f"{where}: no field {field!r} among {fields}; text_field names the one to use")
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


def _table(path: Path) -> Any:
    # Read straight from the file: a copy in the user's cache would outlive the run.
    with tempfile.TemporaryDirectory() as cache, told(str(path)):
        import datasets

        return datasets.load_dataset(
            TABLES[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
        )


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
        _value(dict.fromkeys(dataset.column_names), source, reader.field)
    number = 0
    for batch in dataset.select_columns(reader.field).iter(1000):
        for value in batch[reader.field]:
            yield reader.take({reader.field: value}, f"{source} row {number}")
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
        raise UserError(f"{source}: needs the datasets library: pip install 'loopwise[train]'") from None
    except Exception as error:  # its own, pyarrow's, the hub's: they share no base class
        raise UserError(f"{source}: not readable as a file, a directory or a dataset ({reason(error)})") from None
