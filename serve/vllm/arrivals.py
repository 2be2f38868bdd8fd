"""A word to the worker while a step runs: a request has come, and waits for the step to end.

A step of lanes has several ticks, as what lies between two steps takes longer than what lies between two ticks, and
whoever comes meanwhile would wait for all of them. vLLM's engine process hears of a request in a thread of its own,
while it waits for the worker; the worker asks after every tick.
"""

from __future__ import annotations

import functools
import mmap
import os

ARRIVALS = "LOOPWISE_ARRIVALS"  # environment variable: the file that processes of one server share


def share() -> str:
    """A file of this process for `arrivals`, which is there as long as the process is. Returns its name."""
    number = os.memfd_create("loopwise-arrivals")
    os.ftruncate(number, 16)
    return f"/proc/{os.getpid()}/fd/{number}"


class Arrivals:
    """How many requests have come, and how many of them had when the scheduler made the step that runs."""

    def __init__(self, name: str):
        with open(name, "r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")

    def come(self) -> None:
        self._numbers[0] += 1

    def begin_step(self) -> None:
        self._numbers[1] = self._numbers[0]

    def waiting(self) -> bool:
        return self._numbers[0] != self._numbers[1]


@functools.cache
def arrivals() -> Arrivals | None:
    """Of the server that this process belongs to; None without one."""
    name = os.environ.get(ARRIVALS)
    return Arrivals(name) if name else None


@functools.cache
def count_arrivals() -> None:
    """Let vLLM's engine, in this process, tell of every request as soon as it hears of it."""
    from vllm.v1.engine.core import EngineCore

    heard, shared = EngineCore.preprocess_add_request, arrivals()
    if shared is None:
        return

    @functools.wraps(heard)
    def preprocess_add_request(self, request):
        made = heard(self, request)
        shared.come()
        return made

    EngineCore.preprocess_add_request = preprocess_add_request
