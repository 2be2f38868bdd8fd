"""The end of the server: open requests are drained, then aborted after a time, or on a second signal."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass
from typing import Any

from .announce import say
from .watchdog import kill_engine

GRACE = 3.0  # seconds between the abort of requests and the kill of processes that still run


@dataclass
class Ending:
    """The state of the server's end.

    requested: the engine's client has been asked to end.   dead: the engine had died before.
    app: the HTTP application, once vLLM has built it.   cutting: the task that aborts requests.
    """

    requested: bool = False
    dead: bool = False
    app: Any = None
    cutting: asyncio.Task | None = None

    def listen(self, engine: Any, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Abort the requests of `engine`, an AsyncLLM, on the next signal, or after `seconds`.

        vLLM's own handlers ignore a second signal. Also silences vLLM's error about the end of its engine.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._cut, engine, loop, "a second signal")
        if seconds:
            loop.call_later(seconds, self._cut, engine, loop, f"drain_seconds={seconds} is over")
        logging.getLogger(type(engine).__module__).addFilter(_is_news)

    def _cut(self, engine: Any, loop: asyncio.AbstractEventLoop, why: str) -> None:
        """Abort all requests, which ends their replies; the engine ends after its running step."""
        if self.cutting is not None:
            return
        say(f"{why}: open requests are cut off")
        self.cutting = loop.create_task(engine.abort(list(engine.output_processor.request_states), internal=True))
        loop.call_later(GRACE, self._force, engine)

    def _force(self, engine: Any) -> None:
        """Kill the engine's processes and close connections: for a long step, and for clients that do not read."""
        engine.output_handler.cancel()  # it would report the dead engine as an error
        kill_engine(engine)
        for connection in list(self.app.state.server.server_state.connections):
            connection.transport.abort()


def _is_news(record: logging.LogRecord) -> bool:
    return "output_handler failed" not in record.getMessage()
