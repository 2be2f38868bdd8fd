"""Lets a running step end early when a new request is waiting.

A step of lanes has several ticks, because the work between two steps takes longer than that between two ticks. A new
request would wait for all of them. vLLM's engine process receives requests in a thread of its own while it waits for
the worker; the worker asks for new ones after every tick.
"""

from __future__ import annotations

import functools
import mmap
import os

ARRIVALS = "LOOPWISE_ARRIVALS"  # environment variable: the file that processes of one server share


def share() -> str:
    """Make the file that `arrivals` shares. It exists as long as this process. Returns its name."""
    number = os.memfd_create("loopwise-arrivals")
    os.ftruncate(number, 16)
    return f"/proc/{os.getpid()}/fd/{number}"


class Arrivals:
    """The number of requests received, and their number when the scheduler made the running step; in shared memory."""

    def __init__(self, name: str):
        with open(name, "r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")

    def add(self) -> None:
        """Count a request."""
        self._numbers[0] += 1

    def start_step(self) -> None:
        """The scheduler makes a step: no request waits for the one before."""
        self._numbers[1] = self._numbers[0]

    def waiting(self) -> bool:
        """True where a request has arrived since the scheduler made the running step."""
        return self._numbers[0] != self._numbers[1]


@functools.cache
def arrivals() -> Arrivals | None:
    """The arrivals of the server that this process belongs to.

    None without one, and in sandboxes that hide /proc/PID/fd: requests then wait for the end of a step.
    """
    name = os.environ.get(ARRIVALS)
    try:
        return Arrivals(name) if name else None
    except OSError:
        return None


@functools.cache
def count_arrivals() -> None:
    """Wrap vLLM's engine, in this process, so that it counts every request when it receives it."""
    from vllm.v1.engine.core import EngineCore

    original, shared = EngineCore.preprocess_add_request, arrivals()
    if shared is None:
        return

    @functools.wraps(original)
    def preprocess_add_request(self, request):
        made = original(self, request)
        shared.add()
        return made

    EngineCore.preprocess_add_request = preprocess_add_request
