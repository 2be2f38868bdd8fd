"""Records of local files: JSON, JSON lines, CSV, TSV, and texts, compressed or not."""

from __future__ import annotations

import csv
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from loopwise.errors import UserError, reason, shorten

from .snapshot import PACKED, kind_of

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST = 2**31 - 1  # characters in a cell; Python's default is 131,072

Reject = Callable[[UserError], None]  # raises the error, or reports the record that is left out


class Found(NamedTuple):
    """A record. number: its line, or its place in an array or table.   where: its place, for error messages."""

    number: int
    where: str
    record: Any


def records(path: Path, field: str, chat: bool, strict: bool, reject: Reject, after: int = 0) -> Iterator[Found]:
    """The records of a file after number `after`. A text file is one record, with its text in `field`.

    strict: the file is named by the user. Files of a folder are not: those that are not UTF-8 text are left out.
    chat: conversations are read, so text files are left out. Raises UserError for a file that cannot be read. A bad
    record goes to `reject`.
    """
    kind = kind_of(path, strict)
    if kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path, reject, after)
    elif kind == ".json":
        yield from _json(path, reject, after)
    elif kind in SEPARATORS:
        yield from _table(path, SEPARATORS[kind], field, chat, reject, after)
    elif chat and strict:
        raise UserError(f"{path}: conversations are read from .jsonl, .json, .parquet, .arrow and datasets")
    elif not chat and not after:
        text = _text_of(path, reject if strict else lambda error: None)
        if text is not None and (strict or "\0" not in text):
            yield Found(1, str(path), {field: text})


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its suffix. Raises UserError if that fails."""
    opener = PACKED.get(path.suffix.lower())
    try:
        with path.open("rb") if opener is None else import_module(opener).open(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or reason(error)}") from None


def _text_of(path: Path, reject: Reject) -> str | None:
    with _opened(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")  # as Python's text files do
    except UnicodeDecodeError as error:
        reject(UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"))
        return None


def _json_lines(path: Path, reject: Reject, after: int) -> Iterator[Found]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if number <= after:
                continue
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                reject(UserError(f"{where}: not UTF-8 ({error.reason})"))
            except (ValueError, RecursionError) as error:
                reject(UserError(f"{where}: {_not_json(error)}"))
            else:
                if text.strip():
                    yield Found(number, where, record)


def _json(path: Path, reject: Reject, after: int) -> Iterator[Found]:
    """The records of one array, or one object per line: some JSON-lines files have the suffix .json."""
    text = _text_of(path, reject)
    if text is None:
        return
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            reject(UserError(f"{path}: {_not_json(error)}"))
        else:
            yield from _json_lines(path, reject, after)
    else:
        for number, record in enumerate(found if isinstance(found, list) else [found]):
            if number >= after:
                yield Found(number + 1, f"{path} record {number}", record)


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at {f'line {error.lineno} ' if error.lineno > 1 else ''}column {error.colno})"
    # Python refuses integers of more than 4,300 digits, and nesting deeper than its stack.
    return "JSON that nests too deeply" if isinstance(error, RecursionError) else f"not JSON ({reason(error)})"


def _table(path: Path, separator: str, field: str, chat: bool, reject: Reject, after: int) -> Iterator[Found]:
    """The rows below the header as {column: text}; 007 and NA stay text.

    Raises UserError for a header without `field`.
    """
    csv.field_size_limit(LONGEST)
    with _opened(path) as file:
        # A byte that is not UTF-8 must not end the file: it becomes a surrogate, which `_wrong` finds.
        lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(lines, delimiter=separator, strict=True)
        header: list[str] = []
        while True:
            where, row = f"{path}:{rows.line_num + 1}", []
            try:
                row = next(rows)
                wrong = _wrong(row, header)
            except StopIteration:
                return
            except csv.Error as error:
                wrong = f"no row of a table ({error})"
            if wrong and not header:
                raise UserError(f"{where}: {wrong}")
            if wrong and rows.line_num > after:
                reject(UserError(f"{where}: {wrong}"))
            if wrong or not row:
                continue
            if header:
                if rows.line_num > after:
                    yield Found(rows.line_num, where, dict(zip(header, row, strict=False)))
            elif field in row:
                header = row
            else:
                raise no_field(where, field, row, chat)


def _wrong(row: list[str], header: list[str]) -> str | None:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    return f"{len(row)} cells, and the header has {len(header)}" if header and len(row) > len(header) else None


def no_field(where: str, field: str, fields: Iterable[str], chat: bool) -> UserError:
    """The error for a record or a table that has `fields` but not `field`, the value of text_field or chat_field."""
    found = shorten(", ".join(map(repr, fields)) or "no fields", 200)
    key = "chat_field" if chat else "text_field"
    return UserError(f"{where}: no field {field!r} among {found}; {key} names the one to use")
