"""Writes that reach the disk, checksums of files, and a disk's errors in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = 2**20  # bytes that are free where a write has just failed for want of room
CANNOT = (errno.EINVAL, errno.ENOTSUP)  # of file systems that do not wait for directories


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """A block that writes `file`: a system error in it has a number, and names a file.

    An open file's errors name none. numpy's have no number either, where a disk takes a part of an array.
    """
    try:
        yield
    except OSError as error:
        code = error.errno
        if code is None and type(error) is not OSError:  # of a network, say
            raise
        if code is None:
            code = errno.ENOSPC if shutil.disk_usage(file.parent).free < FULL else errno.EIO
        raise OSError(code, os.strerror(code), error.filename or str(file)) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk (fsync): some disks report errors only then."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """`sync` of all files and directories below `directory`, and of itself."""
    for path in directory.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(directory)


def free_bytes(place: Path) -> int:
    """The bytes that are free on the disk of `place`, which need not be there yet."""
    return shutil.disk_usage(next(path for path in (place, *place.absolute().parents) if path.exists())).free


def allocated(directory: Path) -> int:
    """The bytes of the disk that the files below `directory` take; a hole in a file takes none."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def in_units(size: int) -> str:
    """`size` in bytes as text in GiB, or in MiB below one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def room(needed: int, available: int) -> str:
    """Words on the bytes that an output needs, and on those that its disk has available."""
    return f"will take {in_units(needed)}, and {in_units(available)} are free there"


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def system_error(error: Exception) -> str | None:
    """The message of the system error behind `error`, like a full disk; None for any other error.

    Rust libraries that write weights and tokenizers quote it in errors of their own.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"\(os error ([0-9]+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
