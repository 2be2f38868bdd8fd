"""Replacing a directory so that, killed at any moment, the old or the new one is there."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

RECORD = "loopwise.json"  # every command that makes a directory leaves one in it
RUN_RECORD = "train_recipe.yaml"  # the record of a training run that has written no model yet
RUN_HEADER = "# loopwise "  # its first line goes on with the release and the command, unlike a recipe written by hand


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM, which ends a process where it stands, ends a command as Ctrl-C does: what was begun goes."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def beside(out: Path, kind: str) -> Path:
    """A hidden sibling of `out` for this process: `partial` for what is being made, `old` for what it replaces."""
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}")


def is_ours(directory: Path) -> bool:
    """True where Loopwise made `directory`: its record stands in it. Nothing else is ever replaced or removed."""
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and "loopwise" in record:
            return True
    with suppress(OSError), open(directory / RUN_RECORD, encoding="utf-8", errors="replace") as file:
        return re.match(rf"{RUN_HEADER}\S+: loopwise train\b", file.readline(300)) is not None
    return False


def check_replaceable(out: Path, force: bool) -> None:
    """Raise UserError where a directory stands at `out` that may not be replaced.

    Without `force` that is any directory but an empty one; with `force`, one that Loopwise did not make.
    """
    if not out.is_dir() or _empty(out):
        return
    ours = is_ours(out)
    if not force:
        choices = ", or replace it with --force" if ours else ""
        raise UserError(f"{out} is not empty; choose another directory{choices}")
    if not ours:
        raise UserError(
            f"{out}: --force replaces only what Loopwise wrote, and this directory has no {RECORD}; choose another one"
        )


def left_by_killed(out: Path, kind: str) -> list[Path]:
    """The siblings of `out` that killed processes left; a name without a process's number is not ours."""
    found = sorted(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"))
    pids = [path.name.rpartition("-")[2] for path in found]
    return [path for path, pid in zip(found, pids, strict=True) if re.fullmatch("[0-9]+", pid) and not _alive(int(pid))]


def settle(out: Path) -> None:
    """Put back (`old`) or remove (`partial`) what killed processes left beside `out`; living ones keep their own."""
    for stale in left_by_killed(out, "old"):
        restore(stale, out)
    for stale in left_by_killed(out, "partial"):
        shutil.rmtree(stale, ignore_errors=True)


def restore(old: Path, out: Path) -> None:
    """`old` back to its place `out`; where something stands there, away, if it is ours or empty."""
    if not old.is_dir():
        return
    if not out.exists():
        old.rename(out)
    elif is_ours(old) or _empty(old):
        shutil.rmtree(old, ignore_errors=True)


def _empty(directory: Path) -> bool:
    return not any(directory.iterdir())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process at all
        return True
    return True
