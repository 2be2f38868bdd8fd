"""The measured programs, in memory and in a file: a search that was killed goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...directory import check_file
from ...errors import UserError
from ..result_file import read_result, two_values, write_result

EVERY = 10  # seconds between two writes of the file


class Record:
    """The result of a search, and the file that it is kept in; None keeps nothing.

    facts: "settings", "model", a hash of the model ("fingerprint") and others; a file of another search is not
    continued.
    """

    def __init__(self, out: Path | None, facts: dict[str, Any]):
        self.out, self._unwritten, self._written = out, 0, time.monotonic()
        self.result: dict[str, Any] = {**facts, "programs": [], "tried": [], "questions": []}
        self.spent: dict[str, float] = {"seconds": 0, "layers_run": 0}  # by earlier calls
        self.spending: Callable[[], dict[str, float]] = lambda: {"seconds": 0, "layers_run": 0}  # by this one

    def resume(self) -> None:
        """Take over what the file holds. Raises UserError if other settings, or another model, gave it."""
        found = read(self.out) if self.out else None
        if found is None:
            return
        for name in ("fingerprint", "settings"):
            before, now = found.get(name), self.result[name]
            if before != now:
                why = _difference(before, now) if name == "settings" else "the model's files have changed"
                raise self._of_another(why)
        self.result |= {name: found[name] for name in ("programs", "tried", "questions", "data") if name in found}
        self.spent = {name: found.get(name, 0) for name in self.spent}

    def take_data(self, digest: str) -> None:
        """Note the hash of the data. Raises UserError if what was taken over is of other data.

        Earlier releases noted none.
        """
        if self.result.setdefault("data", digest) != digest:
            raise self._of_another("the text of the data has changed")

    def _of_another(self, why: str) -> UserError:
        return UserError(f"--out {self.out}: {why}; name another file, or start anew with --force")

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row of this kind: programs, tried, or questions."""
        self.result[kind].append(row)
        self._unwritten += 1
        if time.monotonic() - self._written > EVERY:
            self.write()

    def write_rest(self) -> None:
        """Write the rows that the file lacks, if there are some."""
        if self._unwritten:
            self.write()

    def write(self) -> None:
        """Add up what was spent, and replace the file. Raises UserError for a full disk."""
        now = self.spending()
        self.result |= {name: before + now[name] for name, before in self.spent.items()}
        self._unwritten, self._written = 0, time.monotonic()
        if self.out is None:
            return
        write_result(self.out, self.result)


def check_out(out: Path) -> None:
    """Raises UserError if `out` cannot be written, or is a file of another kind."""
    check_file(out)
    if out.is_file() and out.stat().st_size and read(out) is None:
        raise UserError(f"--out {out} exists and is not a result of loopwise search; name another file")


def read(out: Path) -> dict[str, Any] | None:
    """The result of a search in `out`; None where there is none."""
    return read_result(out, ("programs", "tried", "questions", "settings"))


def _difference(before: Any, now: dict[str, Any]) -> str:
    old = before if isinstance(before, dict) else {}
    name = next(name for name in {**old, **now} if old.get(name) != now.get(name))
    values = two_values(name, old, now)
    return f"it was searched with {name}={values[0]}, and now {name}={values[1]}"
