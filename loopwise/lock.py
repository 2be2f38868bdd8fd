"""One writer of a directory at a time: a lock, and a marker that names its process.

The lock of OUT is the file `.OUT.lock` beside it, held by flock(2): the kernel frees it when the process ends, however
it ends, and in every container of the host. The file holds the marker. Where a file system has no such locks, the
marker decides: a process of this host that has ended gave the lock up; any other still holds it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
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

    wait: seconds for another process to leave. Makes the parent of `out`; removes the lock's file at the end. Raises
    UserError where another process is in such a block, and where no file can be made there.
    """
    if _held.get(out):
        _held[out] += 1
        try:
            yield
        finally:
            _held[out] -= 1
        return
    end = time.monotonic() + wait
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        while (handle := _take(lock_file(out))) is None:
            if time.monotonic() >= end:
                raise UserError(_busy(out))
            time.sleep(0.05)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error} ({lock_file(out).name})") from None
    _held[out] = 1
    try:
        yield
    finally:
        del _held[out]
        lock_file(out).unlink(missing_ok=True)  # while it is locked, so that nobody holds a lock of a removed file
        with suppress(OSError):  # of a disk that could not take our marker
            os.close(handle)


def _take(file: Path) -> int | None:
    """The open and locked `file`, with our marker in it; None where another process has it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(handle, file):
                os.close(handle)
                return None
            with suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == os.stat(file).st_ino:
                    _mark(handle, file)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has removed it meanwhile


def _mark(handle: int, file: Path) -> None:
    """Write our marker into the `file` that we have locked. Removes it where that fails, as on a full disk."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(marker()).encode(), 0)
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _lock(handle: int, file: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        mark = _read(file)
        return mark is None or mark.get("run") == RUN or has_ended(mark)
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """The marker in `file`; None without one."""
    with suppress(OSError, ValueError, RecursionError):
        mark = json.loads(file.read_text(encoding="utf-8"))
        return mark if isinstance(mark, dict) else None
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
