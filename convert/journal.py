"""The journal of a conversion that is being written: the units that are finished, so that `--resume` can go on.

It is the file `unfinished.jsonl` in the unfinished directory. The first line describes the conversion, every further
one a unit whose values are in the files, with their checksums: values that a crash of the system lost are made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint import first_difference
from ..directory import RECORD
from ..errors import UserError
from .pending import Pending
from .shards import Done

JOURNAL = "unfinished.jsonl"


def goes_on(directory: Path, identity: dict[str, Any]) -> bool:
    """True where the unfinished `directory` has a journal of the conversion `identity`; False where it has none.

    Raises UserError where it is another conversion's.
    """
    lines = _lines(directory)
    if not lines:
        return False
    known = lines[0].get("conversion")
    if found := first_difference(known if isinstance(known, dict) else {}, json.loads(json.dumps(identity))):
        name, was, is_now = found
        raise UserError(
            f"--resume goes on with the conversion that was killed, and {name} was {was} and is {is_now}; make "
            "them equal, or leave --resume out and start anew"
        )
    return True


def describe(files: list[Path], config: dict[str, Any], tensors: list[Pending]) -> dict[str, Any]:
    """The part of a conversion's identity that comes from its source and its plan, not from the recipe.

    files: the source's weight files, told by size and time of change: their contents would take minutes to read.
    """
    facts = {file.name: file.stat() for file in files}
    return {
        "source": {name: {"bytes": stat.st_size, "changed": stat.st_mtime_ns} for name, stat in facts.items()},
        "config": _digest(json.dumps(config, sort_keys=True, default=str)),
        "tensors": tensors_digest(tensors),
    }


def tensors_digest(tensors: list[Pending]) -> str:
    """A checksum of the names, types and shapes of `tensors`."""
    return _digest(repr([(t.name, str(t.dtype), t.shape) for t in tensors]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _lines(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal in `directory`; none without one. A kill may cut the last line."""
    found: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in (directory / JOURNAL).read_text(encoding="utf-8").split("\n")[:-1]:
            found.append(json.loads(line))
    return found


class Journal:
    """The journal in `directory` of the conversion `identity`, which it begins where there is none.

    finished: units by the names of their tensors. Writing goes through `add`, from one process.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]):
        self.directory = directory
        lines = _lines(directory) or [{"conversion": identity}]
        self.finished: dict[tuple[str, ...], Done] = dict(_units(lines[1:]))
        new = directory / f"{JOURNAL}.new"  # the old one, less a cut line, to which nothing can be added
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        new.replace(directory / JOURNAL)

    def add(self, unit: list[Pending], done: Done) -> None:
        """Note that `unit` is written."""
        line = {"tensors": {t.name: sum_ for t, sum_ in zip(unit, done.checksums, strict=True)}, "error": done.error}
        with open(self.directory / JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def clear(self, kept: list[str]) -> None:
        """Remove every file of the directory but the journal, the record and the weight files `kept`."""
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (JOURNAL, RECORD, *kept) or path.is_symlink():
                path.unlink()


def _units(lines: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], Done]]:
    """The finished units of journal `lines`."""
    for line in lines:
        sums: dict[str, int] = line["tensors"]
        yield tuple(sums), Done(list(sums.values()), line["error"])
