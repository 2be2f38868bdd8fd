"""Work of a file that may not end, or may fill the memory: a chat template is a program of its author."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError

SECONDS = 10.0  # for the template on one conversation; those of published models take some milliseconds
BYTES = 2**31  # that it may add to the memory of this process
CHARACTERS = 2**24  # of the text that it makes: tokenizers take some 100 bytes for each, beyond all limits


class _OutOfTime(BaseException):
    """Not an Exception, which the libraries around a template catch."""


@contextmanager
def bounded(name: str, seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """A block that raises UserError, which begins with `name`, after `seconds`, or where it needs `size` more bytes.

    Time is limited in the main thread, as a signal ends the block; memory on Linux, while no GPU is in use: its driver
    reserves addresses of its own.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _less_memory(size):
            yield
    except _OutOfTime:
        raise UserError(f"{name} does not end within {seconds:g} s") from None
    except MemoryError:
        raise UserError(f"{name} needs more than {size / 2**30:g} GiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def check_text(name: str, text: str) -> str:
    """`text`. Raises UserError, which begins with `name`, if it has more than CHARACTERS characters."""
    if len(text) > CHARACTERS:
        raise UserError(f"{name} makes more than {CHARACTERS:,} characters of text")
    return text


@contextmanager
def _less_memory(size: int) -> Iterator[None]:
    """A block in which this process may take `size` bytes of addresses more than it has."""
    before = limit_memory(size)
    try:
        yield
    finally:
        if before is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, before)


def limit_memory(size: int) -> tuple[int, int] | None:
    """Let this process take at most `size` bytes of addresses more than it has. Returns the limits before.

    None: there is no such limit, on other systems than Linux, and where a GPU is in use.
    """
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or (torch is not None and torch.cuda.is_initialized()):
        return None
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(re.split(r"\s", file.read())[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, now + size) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    return soft, hard
