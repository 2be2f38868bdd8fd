"""Hashes of the source's files, computed in a thread while the output is written."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

BUFFER_BYTES = 1 << 20


@contextmanager
def hashing(files: list[Path]) -> Generator[dict[str, str]]:
    """A dict that holds the sha256 of every file, by its name, once the block has ended.

    A thread reads the files meanwhile; an error in the block stops it. Raises OSError, after the block, for a file that
    cannot be read: a disk may give it at the next attempt.
    """
    result: dict[str, str] = {}
    stopped = threading.Event()
    failed: list[OSError] = []

    def work() -> None:
        try:
            for file in files:
                result[file.name] = _sha256(file, stopped)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield result
    except BaseException:
        stopped.set()
        raise
    finally:
        thread.join()
    if failed:
        error = failed[0]
        raise OSError(error.errno, f"{error.filename or 'the source'} cannot be read: {error.strerror}")


def _sha256(file: Path, stopped: threading.Event) -> str:
    """The sha256 of `file`, in hexadecimal; of a part of it once `stopped` is set."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES))
    with open(file, "rb", buffering=0) as stream:
        while (size := stream.readinto(buffer)) and not stopped.is_set():
            digest.update(buffer[:size])
    return digest.hexdigest()
