"""Documents out of files, directories, globs and `datasets` sources."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopwise.errors import UserError

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


def documents(sources: list[str], text_field: str, split: str, subset: str | None) -> Iterator[str]:
    """The texts of all `sources`, in their order; empty ones are left out.

    Raises UserError for a source that does not exist, a file that is not UTF-8 text, a bad line (with file and line).
    Directories and globs leave out files that are not UTF-8 text: they often hold images or caches.
    """
    for source in sources:
        for text in _documents(source, text_field, split, subset):
            if text:
                yield text


def _documents(source: str, text_field: str, split: str, subset: str | None) -> Iterator[str]:
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path, text_field, strict=True)
    if path.is_dir() and not _is_dataset(path):
        return _files(source, sorted(_walk(path)), text_field)
    if any(character in source for character in "*?["):
        found = sorted(p for p in glob.iglob(str(path), recursive=True) if os.path.isfile(p))
        return _files(source, [Path(p) for p in found], text_field)
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix):
        raise UserError(f"{source}: no such file or directory")
    return _rows(_dataset(source, path, split, subset), source, text_field)


def _files(source: str, paths: list[Path], text_field: str) -> Iterator[str]:
    if not paths:
        raise UserError(f"{source}: no files there")
    for path in paths:
        yield from _file(path, text_field, strict=False)


def _walk(directory: Path) -> Iterator[Path]:
    for here, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith((".", "__pycache__"))]
        yield from (Path(here, name) for name in files if not name.startswith("."))


def _file(path: Path, text_field: str, strict: bool) -> Iterator[str]:
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _jsonl(path, text_field)
    elif path.suffix == ".json":
        yield from _json(path, text_field)
    elif path.suffix in TABLES:
        yield from _rows(_table(path), str(path), text_field)
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


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field(json.loads(line), f"{path}:{number}", text_field)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number + 1}: not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _json(path: Path, text_field: str) -> Iterator[str]:
    """The records of one array, or of one object a line, which some call .json too."""
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        yield from _jsonl(path, text_field)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    else:
        for number, record in enumerate(records if isinstance(records, list) else [records]):
            yield _field(record, f"{path} record {number}", text_field)


def _field(record: Any, where: str, text_field: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is an object with a field {text_field!r}, not a {type(record).__name__}")
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "no fields"
        raise UserError(f"{where}: no field {text_field!r} among {fields}; text_field names the one to use")
    if not isinstance(record[text_field], str):
        raise UserError(f"{where}: field {text_field!r} holds a {type(record[text_field]).__name__}, not text")
    try:
        record[text_field].encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {text_field!r} is not text: half a surrogate at {error.start}") from None
    return record[text_field]


def _is_dataset(directory: Path) -> bool:
    saved = ("dataset_info.json", "state.json", "dataset_dict.json")
    return any((directory / name).is_file() for name in saved)


def _table(path: Path) -> Any:
    # Read straight from the file: a copy in the user's cache would outlive the run.
    with tempfile.TemporaryDirectory() as cache, _told(str(path)):
        import datasets

        return datasets.load_dataset(
            TABLES[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
        )


def _dataset(source: str, path: Path, split: str, subset: str | None) -> Any:
    with _told(source):
        import datasets

        if not path.is_dir():
            return datasets.load_dataset(source, subset, split=split)
        dataset = datasets.load_from_disk(str(path))
        if not isinstance(dataset, datasets.DatasetDict):
            return dataset
        if split not in dataset:
            raise UserError(f"{source}: no split {split!r}; it has {', '.join(map(repr, dataset))}")
        return dataset[split]


def _rows(dataset: Any, source: str, text_field: str) -> Iterator[str]:
    if text_field not in dataset.column_names:
        _field(dict.fromkeys(dataset.column_names), source, text_field)
    number = 0
    for batch in dataset.select_columns(text_field).iter(1000):
        for text in batch[text_field]:
            yield _field({text_field: text}, f"{source} row {number}", text_field)
            number += 1


@contextmanager
def _told(source: str) -> Iterator[None]:
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
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: not readable as a file, a directory or a dataset ({told[0]})") from None
