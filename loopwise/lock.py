"""One writer of a directory at a time: a lock, and a marker that names its process.

The lock of OUT is the file `.OUT.lock` beside it, held by flock(2): the kernel frees it when the process ends, however
it ends, and in every container of the host. The file holds the marker. Where a file system has no such locks, whoever
makes the file has the lock, and the marker decides how long: a process of this host that has ended gave it up; any
other still holds it. A file of that name that holds something else is somebody's, and stays.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

if sys.platform != "win32":
    import fcntl

RUN = uuid.uuid4().hex[:12]  # of this process, in names of its temporary files
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # a file system without flock
OPENED = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
LONGEST = 1 << 16  # bytes of a lock's file that are read
_held: dict[Path, int] = {}  # how often this process has taken each lock


def marker() -> dict[str, Any]:
    """The facts that identify this process: a random id, host, the host's start, process id and the process's start."""
    return {
        "run": RUN,
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def has_ended(mark: Any) -> bool:
    """True if the process of a `marker` has ended, as far as this host can know: False for one of another host."""
    if not isinstance(mark, dict) or mark.get("host") != socket.gethostname() or not mark.get("boot"):
        return False
    if mark["boot"] != _boot():
        return True
    pid = mark.get("pid")
    return isinstance(pid, int) and _started(pid) != mark.get("started")


def lock_file(out: Path) -> Path:
    """The file whose lock guards `out`, an absolute path."""
    return out.with_name(f".{out.name}.lock")


@contextmanager
def locked(out: Path, wait: float = 0) -> Iterator[None]:
    """A block that no other process enters for `out`, an absolute path. This process may enter it again.

    wait: seconds for another process to leave. Makes the parent of `out`, which goes again at the end if it is empty;
    removes the lock's file at the end. Raises UserError where another process is in such a block, where the lock's file
    is no lock, and where no file can be made there.
    """
    if _held.get(out):
        _held[out] += 1
        try:
            yield
        finally:
            _held[out] -= 1
        return
    file, made = lock_file(out), list[Path]()
    try:
        handle = _enter(out, file, wait, made)
        _held[out] = 1
        try:
            yield
        finally:
            del _held[out]
            if (_read(file) or {}).get("run") == RUN:
                file.unlink(missing_ok=True)  # while it is locked, so that nobody holds a lock of a removed file
            with suppress(OSError):  # of a disk that could not take our marker
                os.close(handle)
    finally:
        for folder in made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _enter(out: Path, file: Path, wait: float, made: list[Path]) -> int:
    """The open and locked `file` of `out`. Adds the folders around it that it makes to `made`, the deepest first."""
    end, lost = time.monotonic() + wait, 0
    try:
        while True:
            try:
                _make(file.parent, made)
                if (handle := _take(file)) is not None:
                    return handle
            except FileNotFoundError:  # another process has just removed the empty folder that it had made
                lost += 1
                if lost < 20:
                    continue
                raise
            if time.monotonic() >= end:
                raise UserError(_busy(out))
            time.sleep(0.05)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error} ({file.name})") from None


def _make(folder: Path, made: list[Path]) -> None:
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            with suppress(FileExistsError):  # by another process
                path.mkdir()
                made.insert(0, path)


def _take(file: Path) -> int | None:
    """The open and locked `file`, with our marker in it; None where another process has it.

    Raises UserError for a file that is no lock.
    """
    while True:
        handle, new = _open(file)
        try:
            free = _lock(handle)
            if free is False:
                os.close(handle)
                return None
            mark = None if new else _check_lock(handle, file)
            if free is None and not new:
                if not has_ended(mark) or not _clear(file, mark or {}):
                    os.close(handle)
                    return None
            else:
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), os.stat(file)):
                        _mark(handle, file)
                        return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it has been removed, by its last holder or by us


def _open(file: Path) -> tuple[int, bool]:
    """(`file`, open to be read and written; True if this call has made it)."""
    while True:
        try:
            return os.open(file, OPENED | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            with suppress(FileNotFoundError):
                return os.open(file, OPENED), False


def _mark(handle: int, file: Path) -> None:
    """Write our marker into the `file` that we have locked. Removes it where that fails, as on a full disk."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(marker()).encode(), 0)
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _lock(handle: int) -> bool | None:
    """True once this process has the lock of the open file, False where another has it; None on a file system without
    locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _check_lock(handle: int, file: Path) -> dict[str, Any] | None:
    """The marker in the open `file`; None in an empty one. Raises UserError for a file with anything else in it."""
    regular = stat.S_ISREG(os.fstat(handle).st_mode)
    text = os.pread(handle, LONGEST, 0) if regular else b""
    mark = _parsed(text)
    if not regular or (text and mark is None):
        raise UserError(
            f"{file} has the name of Loopwise's lock, and is none; move it elsewhere, or choose another directory"
        )
    return mark


def _clear(file: Path, ended: dict[str, Any]) -> bool:
    """Remove the `file` of the process with the marker `ended`. False where another process is about to do so.

    The right to remove that one marker is a file too, which one process makes: by the time that a second one comes to
    it, `file` may be the lock of a third.
    """
    right = file.with_name(f"{file.name}-{ended['run']}")
    try:
        os.close(os.open(right, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        return False
    try:
        if _read(file) == ended:
            file.unlink(missing_ok=True)
    finally:
        right.unlink(missing_ok=True)
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """The marker in `file`; None without one."""
    with suppress(OSError):
        return _parsed(file.read_bytes()[:LONGEST]) if file.is_file() else None
    return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The marker that is `text`; None for any other."""
    with suppress(ValueError, RecursionError):
        mark = json.loads(text)
        if isinstance(mark, dict) and marker().keys() <= mark.keys() and re.fullmatch("[0-9a-f]{12}", str(mark["run"])):
            return mark
    return None


def _busy(out: Path) -> str:
    mark = _read(lock_file(out)) or {}
    who = f"process {mark.get('pid', '?')} on {mark.get('host', '?')}"
    return f"{out}: another run of Loopwise writes it ({who}); wait for its end, or choose another directory"


def _boot() -> str:
    """An id of the host's start; "" where the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _started(pid: int) -> str | None:
    """When process `pid` started, in the system's own unit; None where there is no such process, or no way to know."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = text.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None
