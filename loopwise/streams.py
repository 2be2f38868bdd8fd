"""Standard output and error that end no command: a terminal lacks a character, or the disk behind a log is full."""

from __future__ import annotations

import io
import sys
from contextlib import suppress


class _Lossy(io.TextIOWrapper):
    """A text stream whose writes may fail: what cannot be written is lost."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def tolerate() -> None:
    """Let characters that a terminal lacks become `?`, and a stderr that cannot be written end no work.

    Lines on stderr are news about the work; stdout is its result, so an error there stays one. Safe to call again.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if type(sys.stderr) is io.TextIOWrapper:  # not a test's
        file = open(sys.stderr.fileno(), "wb", closefd=False)  # noqa: SIM115  as long as the process
        sys.stderr = _Lossy(file, sys.stderr.encoding, errors="replace", line_buffering=True)
