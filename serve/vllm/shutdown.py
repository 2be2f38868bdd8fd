"""How the server ends: open requests are drained, and cut off when the time for it is over, or on a second signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from dataclasses import dataclass
from typing import Any

GRACE = 3.0  # seconds between the cut and the end of what still runs then


@dataclass
class Ending:
    """Whether the engine's client was `told` to end, and whether the engine was `dead` already. `app` is the HTTP
    application, once it is there."""

    told: bool = False
    dead: bool = False
    app: Any = None
    cutting: asyncio.Task | None = None

    def listen(self, engine: Any, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """From now on, a signal ends the requests of `engine`, an AsyncLLM whose own handlers ignore a second one, as
        does the end of `seconds`; it may say no longer that its engine ends."""
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._cut, engine, loop, "a second signal")
        if seconds:
            loop.call_later(seconds, self._cut, engine, loop, f"drain_seconds={seconds} is over")
        logging.getLogger(type(engine).__module__).addFilter(_is_news)

    def _cut(self, engine: Any, loop: asyncio.AbstractEventLoop, why: str) -> None:
        """Abort all requests, whose replies end so; the engine ends after the step that it is in."""
        if self.cutting is not None:
            return
        print(f"loopwise: {why}: open requests are cut off", file=sys.stderr, flush=True)
        self.cutting = loop.create_task(engine.abort(list(engine.output_processor.request_states), internal=True))
        loop.call_later(GRACE, self._force, engine)

    def _force(self, engine: Any) -> None:
        """For a step that takes long, for clients that do not read replies, and for those that do not end requests."""
        from vllm.utils.system_utils import kill_process_tree

        engine.output_handler.cancel()  # which would wonder that the engine is dead
        manager = engine.engine_core.resources.engine_manager
        for process in manager.processes if manager else ():
            if process.is_alive():
                kill_process_tree(process.pid)
        for connection in list(self.app.state.server.server_state.connections):
            connection.transport.abort()


def _is_news(record: logging.LogRecord) -> bool:
    return "output_handler failed" not in record.getMessage()
