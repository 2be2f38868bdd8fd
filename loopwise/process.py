"""Processes that `loopwise serve` starts, vLLM's engine and its workers, end with it. Imports nothing heavy."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import Any

from .streams import tolerate

SERVER = "LOOPWISE_SERVER"  # environment variable: process id of the `loopwise serve` that vLLM's processes belong to


class _First:
    """Where it is unpickled, it calls `stop_with_server`, and leaves another one for that process's children."""

    def __reduce__(self) -> Any:
        return _start, ()


def _start() -> _First:
    tolerate()
    stop_with_server()
    return _First()


def own_processes() -> None:
    """Let the processes that this one spawns from now on call `stop_with_server` before they import anything else.

    vLLM's plugin calls it, too, but only after some ten seconds of imports. A process is unpickled in its child, and
    begins with the configuration that it has from its parent; multiprocessing has no public place for that.
    """
    os.environ[SERVER] = str(os.getpid())
    configuration: dict[str, Any] = getattr(multiprocessing.current_process(), "_config", {})
    configuration["loopwise"] = _First()


def is_server() -> bool:
    """True in the process of `loopwise serve`, which has called `own_processes`."""
    return os.environ.get(SERVER) == str(os.getpid())


def stop_with_server() -> None:
    """In a process that the server started: leave its process group, and end when its parent ends. Does nothing in
    other processes. Safe to call again.

    Ctrl-C in a terminal reaches a whole process group, and vLLM's workers end on it at once: open requests would fail
    instead of draining. vLLM's engine does not notice that a server was killed. The kernel's signal is SIGKILL: Python
    handles no other one while a step hangs. It comes for a parent that ends from now on, so the parent is looked at
    again, and the server: either may have ended before.
    """
    server = int(os.environ.get(SERVER) or os.getpid())
    if server == os.getpid() or sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    if parent == server and os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent or not _runs(server):
        os._exit(1)


def _runs(process: int) -> bool:
    """True where a process of this id runs; one that has ended and waits for its parent does not."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # /proc cannot be read
        return True
