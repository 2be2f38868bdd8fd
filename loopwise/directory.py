"""Directories that are replaced whole: after a kill at any moment, the old or the new one exists."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .disk import allocated, checksum, free_bytes, naming, room, sync, sync_tree, system_error
from .errors import UserError
from .foreign import RUN_RECORD, entries, foreign_file
from .lock import RUN, locked, marker
from .version import __version__

RECORD = "loopwise.json"  # every command that makes a directory writes this file into it
LOCKED = re.compile(r"-[0-9a-f]{12}$")  # the end of a temporary directory's name, of a release that takes locks
OWN = ("files", "code", "weights", "unfinished", "marker")  # entries of a record that describe its directory alone
RUN_HEADER = "# loopwise "  # begins its first line, before release and command; a recipe written by hand lacks it


@contextmanager
def on_sigterm(handler: Callable[[int, object], None]) -> Iterator[None]:
    """A block in which SIGTERM calls `handler` as `signal.signal` does; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A block in which SIGTERM ends the command like Ctrl-C, so that unfinished output is removed."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with on_sigterm(stop):
        yield


def beside(out: Path, kind: str) -> Path:
    """A hidden sibling of `out` for this process. kind: `partial` for new output, `old` for replaced output."""
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}-{RUN}")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """A block in which no other process writes `out`. Raises UserError at once where one does.

    Commands enter it before they read their input, so that a second run is refused before its work.
    """
    with locked(place(out)):
        yield


def is_ours(directory: Path) -> bool:
    """True if `directory` holds Loopwise's record. Only such directories are ever replaced or removed."""
    if "loopwise" in record_of(directory):
        return True
    with suppress(OSError), open(directory / RUN_RECORD, encoding="utf-8", errors="replace") as file:
        return re.match(rf"{RUN_HEADER}\S+: loopwise train\b", file.readline(300)) is not None
    return False


def check_replaceable(out: Path, force: bool) -> None:
    """Raises UserError if `out` is a directory that may not be replaced.

    Without `force`: any directory that is not empty. With `force`: a directory that Loopwise did not make.
    """
    if not out.is_dir() or _empty(out):
        return
    ours = is_ours(out)
    if force and ours:
        check_nothing_foreign(out)
    if not force:
        choices = ", or replace it with --force" if ours else ""
        raise UserError(f"{out} is not empty; choose another directory{choices}")
    if not ours:
        raise UserError(
            f"{out}: --force replaces only what Loopwise wrote, and this directory has no {RECORD}; choose another one"
        )


def check_nothing_foreign(out: Path) -> None:
    """Raises UserError if `out`, which is ours, holds a file that Loopwise did not write."""
    if theirs := foreign_in(out):
        raise UserError(
            f"{out}: --force replaces only what Loopwise wrote, and not {theirs}; move that elsewhere, or choose "
            "another directory"
        )


def foreign_in(out: Path) -> str | None:
    """The first file of `out`, which is ours, that Loopwise did not write; None where there is none.

    Records of earlier releases list no files: all files count as ours there.
    """
    run, record = (out / RUN_RECORD).is_file(), record_of(out)
    if record.get("files") is None and (not run or (out / RECORD).exists()):
        return None
    return foreign_file(out, {*_listed(record), RECORD}, run)


def _listed(record: dict[str, Any]) -> list[str]:
    """The files that `record` lists; none where it has no list, as one that another program has changed."""
    files = record.get("files")
    return [*map(str, files)] if isinstance(files, list) else []


def not_listed(out: Path, names: Iterable[str]) -> list[str]:
    """Those of `names`, of files and folders in `out`, that stand there and that its record does not list."""
    record = record_of(out)
    if "loopwise" in record and "files" not in record:  # of an earlier release
        return []
    files = [*_listed(record), RECORD] if "loopwise" in record else []
    known = {name.partition("/")[0] for name in files}
    return [name for name in names if name not in known and os.path.lexists(out / name)]


def finish(directory: Path) -> None:
    """Add the names of all files in `directory` to its record, the sha256 of the model's code, and bytes and CRC-32 of
    the weights.

    Raises UserError for Python files that are not Loopwise's own.
    """
    record, own = record_of(directory), Path(__file__).parent / "model"
    code: dict[str, str] = {}
    for file in sorted(directory.rglob("*.py")):
        if not (own / file.name).is_file() or file.read_bytes() != (own / file.name).read_bytes():
            raise UserError(f"{file.name} is not Loopwise's own code, and no output carries any other; remove it")
        code[file.relative_to(directory).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if not file.is_dir())
    record |= {"code": code} if code else {}
    weights = {name: directory / name for name in names if name.endswith(".safetensors")}
    sums = {name: [file.stat().st_size, checksum(file)] for name, file in weights.items()}
    write_record(directory, {**record, "files": names, "weights": sums})


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the `record` of `directory`; at no moment, and on no full disk, it has half of one, or loses an earlier."""
    new = directory / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(directory / RECORD)


def record_of(directory: Path) -> dict[str, Any]:
    """The record in `directory`; empty without one that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    return {}


def is_whole(out: Path) -> bool:
    """True for a directory of Loopwise's whose files are all there."""
    files = _listed(record_of(out))
    return bool(files) and all((out / name).is_file() for name in files)


def changed_weights(out: Path, thorough: bool) -> str | None:
    """The first weight file of `out` that is not as its record has it; None without one, and in an earlier release's.

    thorough: compare checksums, not only sizes.
    """
    sums = record_of(out).get("weights")
    for name, known in (sums if isinstance(sums, dict) else {}).items():
        file = out / name
        if not isinstance(known, list) or not file.is_file() or [file.stat().st_size] != known[:1]:
            return name
        if thorough and [checksum(file)] != known[1:]:
            return name
    return None


def left_by_killed(out: Path, kind: str) -> list[Path]:
    """Siblings of `out` that killed processes left: named as by `beside`, and ours or empty.

    The caller holds the lock of `out`, so no other process is at work on them. Earlier releases had no lock, and named
    them by a process id alone, which proves nothing in another container. Theirs are never deleted: only a directory
    that was to be replaced counts, as it can be put back.
    """
    found = []
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*")):
        name = re.fullmatch(r"([0-9]+)(-[0-9a-f]{12})?", path.name.rpartition(f".{kind}-")[2])
        if not name or not removable(path):
            continue
        if name[2][1:] != RUN if name[2] else kind == "old" and not _alive(int(name[1])):
            found.append(path)
    return found


def begin(partial: Path) -> None:
    """Make the directory `partial` with a record and the marker of this process, so that a later one may remove it."""
    partial.mkdir(parents=True)
    write_record(partial, _unfinished())


def take_over(left: Path, partial: Path) -> None:
    """Rename `left`, which a killed process left, to `partial`, with the marker of this process."""
    if left != partial:
        left.rename(partial)
    write_record(partial, _unfinished())


def _unfinished() -> dict[str, Any]:
    """The record of a directory that this process writes."""
    return {"loopwise": __version__, "unfinished": True, "marker": marker()}


def settle(out: Path, kept: Path | None = None) -> None:
    """Restore (`old`) or remove (`partial`) the siblings of `out` that killed processes left, all but `kept`."""
    for stale in left_by_killed(out, "old"):
        if not out.exists() or LOCKED.search(stale.name):
            restore(stale, out)
    for stale in left_by_killed(out, "partial"):
        if stale != kept:
            remove(stale)


def restore(old: Path, out: Path) -> None:
    """Rename `old` to `out`. If `out` exists, remove `old` instead, if it is ours or empty."""
    if not old.is_dir():
        return
    if not out.exists():
        old.rename(out)
    else:
        remove(old)


def remove(directory: Path, made: bool = False) -> None:
    """Remove `directory`, if it is ours or empty and not a link. Its record goes last, in case of an interruption.

    made: this process has made it, so it is ours even where its record could not be written.
    """
    if not (removable(directory) or (made and directory.is_dir() and not directory.is_symlink())):
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (RECORD, RUN_RECORD):
            path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def place(out: Path, source: Path | None = None) -> Path:
    """The resolved path of `out`.

    source: the input. Raises UserError if no directory can be made at `out`, and if one of the two lies in the other.
    """
    if str(out) in ("", "."):
        raise UserError(f"OUT is {str(out)!r}; name a directory to be made, it replaces what stands there")
    try:
        found, source = out.expanduser().resolve(), source and source.expanduser().resolve()
        # Raises for a sibling's name that is too long, and for a loop of links.
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
    """The resolved path of `out`. Raises UserError if `new_directory` may not make it."""
    found = place(out, source)
    if os.path.ismount(found):
        raise UserError(f"the output {out} is a mount point, which nothing can replace; name a directory inside it")
    if Path.cwd().is_relative_to(found):
        raise UserError(f"the output {out} holds the current directory and would replace it; choose another directory")
    check_replaceable(found, force)
    return found


def free_for(out: Path) -> int:
    """The bytes that are free for `out`, an absolute path. Those that killed processes left of it count: they are taken
    over, or removed first."""
    own = beside(out, "partial")
    left = {*left_by_killed(out, "partial"), *([own] if removable(own) else [])}
    return free_bytes(out) + sum(allocated(path) for path in left)


def check_room(out: Path, needed: int) -> None:
    """Raises UserError where an output of `needed` bytes at `out` has no room, before it is begun."""
    if (free := free_for(place(out))) < needed:
        raise UserError(f"{out}: the output {room(needed, free)}; make room first, or choose another disk")


def check_file(file: Path) -> None:
    """Raises UserError if `file` cannot be written. Called before a long measurement."""
    file = file.expanduser()
    if file.is_dir():
        raise UserError(f"--out {file} is a directory; name a file")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: no such directory")
    if not os.access(file.parent if not file.exists() else file, os.W_OK):
        raise UserError(f"--out {file}: nothing may be written there")


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A block with a temporary sibling of `file`, which becomes `file` at the end. An error deletes it instead.

    A full disk therefore leaves the earlier file, as does one that takes the values and then loses them. A special
    file, like /dev/stdout, is written directly.
    """
    found = file.expanduser().resolve()
    if found.exists() and not found.is_file():
        yield file
        return
    partial = beside(found, "partial")
    try:
        with naming(file):
            yield partial
            sync(partial)
            partial.replace(found)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_directory(
    out: Path, source: Path | None, force: bool, goes_on: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A block with a temporary sibling of `out`, which becomes `out` at the end. An error removes it instead.

    source: the file or directory that the block reads.   force: replace a directory of ours at `out`. After a kill at
    any moment the old or the new directory exists, or the next call restores it.

    goes_on: the sibling begins as the one that a killed process left, where there is one of which it is true. Then an
    interruption or a full disk leaves the sibling for the next call; an error that would come again, a UserError,
    removes it. A ChildProcessError, for a process of the block's that was killed, leaves it in any case, as a kill of
    this process does. Raises UserError as `place`, `check_replaceable` and `goes_on` do, for a full disk, and at once
    where another process makes `out`.
    """
    with locked(place(out, source)):
        yield from _new_directory(out, source, force, goes_on)


def unfinished(out: Path, goes_on: Callable[[Path], bool]) -> Path | None:
    """The sibling of `out` that a killed process left, or this one, and of which `goes_on` is true; None without one.

    The caller holds the lock of `out`.
    """
    own = beside(out, "partial")
    left = [*left_by_killed(out, "partial"), *([own] if removable(own) else [])]
    return next((path for path in left if goes_on(path)), None)


def _new_directory(
    out: Path, source: Path | None, force: bool, goes_on: Callable[[Path], bool] | None
) -> Iterator[Path]:
    found = place(out, source)
    left = unfinished(found, goes_on) if goes_on else None
    settle(found, left)  # before the check, as it may restore a directory that needs --force
    out = check_new(out, source, force)
    partial, old = beside(out, "partial"), beside(out, "old")
    keep = made = False
    try:
        if left:
            take_over(left, partial)
        else:
            remove(partial)  # of an earlier call of this process
            made = not partial.exists()
            begin(partial)
        yield partial
        finish(partial)
        _sync_whole(partial, out)
        check_replaceable(out, force)  # again, as another process may have filled it
        if out.is_dir():
            out.rename(old)
        partial.rename(out)
        try:
            sync(out.parent)
        except OSError:
            out.rename(partial)
            raise
    except UserError:
        raise
    except BaseException as error:
        keep = (goes_on is not None or isinstance(error, ChildProcessError)) and is_ours(partial)
        if not isinstance(error, Exception) or not (message := system_error(error)):
            raise
        raise UserError(f"cannot write {out}: {message}{'; --resume goes on from here' * keep}") from error
    finally:
        restore(old, out)
        if not keep:
            remove(partial, made=made)


def _sync_whole(partial: Path, out: Path) -> None:
    """`sync_tree` of `partial`, which becomes `out`. Raises UserError where it fails: what has been written by then may
    be lost, though it can still be read, so nothing may go on from it."""
    try:
        sync_tree(partial)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def removable(path: Path) -> bool:
    """True for a directory that is ours or empty, and not a link."""
    return path.is_dir() and not path.is_symlink() and (is_ours(path) or _empty(path))


def _empty(directory: Path) -> bool:
    return not entries(directory)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # a process of another user, or not a process id
        return True
    return True
