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
from .version import __version__

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
    """The siblings of `out` that killed processes left: ours or empty, and with a process's number in their names."""
    found = [path for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*")) if removable(path)]
    pids = [path.name.rpartition("-")[2] for path in found]
    return [path for path, pid in zip(found, pids, strict=True) if re.fullmatch("[0-9]+", pid) and not _alive(int(pid))]


def begin(partial: Path) -> None:
    """Make the directory `partial`, with a record: should this process be killed, a later one may remove it."""
    partial.mkdir(parents=True)
    (partial / RECORD).write_text(json.dumps({"loopwise": __version__, "unfinished": True}) + "\n", encoding="utf-8")


def settle(out: Path) -> None:
    """Put back (`old`) or remove (`partial`) what killed processes left beside `out`; living ones keep their own."""
    for stale in left_by_killed(out, "old"):
        restore(stale, out)
    for stale in left_by_killed(out, "partial"):
        remove(stale)


def restore(old: Path, out: Path) -> None:
    """`old` back to its place `out`; where something stands there, away, if it is ours or empty."""
    if not old.is_dir():
        return
    if not out.exists():
        old.rename(out)
    else:
        remove(old)


def remove(directory: Path) -> None:
    """Remove `directory` where it is ours or empty, and no link; its record goes last, should this be interrupted."""
    if not removable(directory):
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (RECORD, RUN_RECORD):
            path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def place(out: Path, source: Path | None = None) -> Path:
    """The place of `out`, links followed. Raises UserError where no directory can be made there, and where it lies in
    the directory `source`, which is read meanwhile, or holds it."""
    if str(out) in ("", "."):
        raise UserError(f"OUT is {str(out)!r}; name a directory to be made, it replaces what stands there")
    try:
        found, source = out.expanduser().resolve(), source and source.expanduser().resolve()
        # The name of a sibling may be too long, and a loop of links has no place.
        beside(found, "partial").exists()
        above = next(path for path in found.parents if path.exists())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
    if found.exists() and not found.is_dir():
        raise UserError(f"{out} is a file; give a directory for the output")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        rule = "nothing may be written there" if above.is_dir() else "that is no directory"
        raise UserError(f"the output {out} would be made in {above}, and {rule}; choose another directory")
    if source is None or not source.exists():  # a hub id
        return found
    if source.is_dir() and found.is_relative_to(source):
        raise UserError(f"the output {out} lies in the source {source}; choose another directory")
    if source.is_relative_to(found):
        raise UserError(f"the output {out} holds the source {source} and would replace it; choose another directory")
    return found


def check_new(out: Path, source: Path | None, force: bool) -> Path:
    """The place of `out`. Raises UserError where a new directory may not be made there, see `new_directory`."""
    found = place(out, source)
    if Path.cwd().is_relative_to(found):
        raise UserError(f"the output {out} holds the current directory and would replace it; choose another directory")
    check_replaceable(found, force)
    return found


def check_file(file: Path) -> None:
    """Raise UserError where `file` cannot be written, so that nobody measures for an hour to be told so."""
    file = file.expanduser()
    if file.is_dir():
        raise UserError(f"--out {file} is a directory; name a file")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: no such directory")
    if not os.access(file.parent if not file.exists() else file, os.W_OK):
        raise UserError(f"--out {file}: nothing may be written there")


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A temporary sibling of `file` that becomes `file` when the block ends well, and vanishes when it does not: a full
    disk leaves what stood there. What is no regular file, as /dev/stdout, is written to itself."""
    found = file.expanduser().resolve()
    if found.exists() and not found.is_file():
        yield file
        return
    partial = beside(found, "partial")
    try:
        yield partial
        partial.replace(found)
    finally:
        partial.unlink(missing_ok=True)


def system_error(error: Exception) -> str | None:
    """The system's reason for `error`, as a full disk; None for another error.

    The libraries in Rust that write weights and tokenizers raise errors of their own, which quote it.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"\(os error ([0-9]+)\)", str(error))
    return os.strerror(int(found[1])) if found else None


@contextmanager
def new_directory(out: Path, source: Path | None, force: bool) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the block ends well, and vanishes when it does not.

    `source` is the file or directory that is read meanwhile. With `force`, a directory of Loopwise's at `out` goes once
    the new one is complete; killed at any moment, one of the two is there, or is put back by the next call. Raises
    UserError where `out` is in the way (see `place` and `check_replaceable`), or the disk is full.
    """
    settle(place(out, source))  # first: it may put back what --force is to be asked for
    out = check_new(out, source, force)
    partial, old = beside(out, "partial"), beside(out, "old")
    try:
        begin(partial)
        yield partial
        check_replaceable(out, force)  # again: it may have been filled meanwhile
        if out.is_dir():
            out.rename(old)
        partial.rename(out)
    except Exception as error:
        if isinstance(error, UserError) or not (told := system_error(error)):
            raise
        raise UserError(f"cannot write {out}: {told}") from error
    finally:
        restore(old, out)
        remove(partial)


def removable(path: Path) -> bool:
    """True for a directory that is ours or empty, and no link."""
    return path.is_dir() and not path.is_symlink() and (is_ours(path) or _empty(path))


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
