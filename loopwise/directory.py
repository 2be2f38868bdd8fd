"""Replacing a directory so that, killed at any moment, the old or the new one is there."""

from __future__ import annotations

import glob
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def settle(out: Path) -> None:
    """Put back (`old`) or remove (`partial`) what killed processes left beside `out`; living ones keep their own."""
    for kind in ("old", "partial"):
        for stale in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            if _alive(int(stale.name.rpartition("-")[2])):
                continue
            if kind == "old":
                restore(stale, out)
            else:
                shutil.rmtree(stale, ignore_errors=True)


def restore(old: Path, out: Path) -> None:
    """`old` back to its place `out`, or away where something stands there."""
    if old.is_dir() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process at all
        return True
    return True
