"""Notices that vLLM's engine hangs: /health turns 503, and the server ends with exit status 1, as when it dies."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from .announce import say

PERIOD = 2.0  # seconds between an engine's answer and the next question
SHOWN = 2.0  # seconds in which /health says so before the engine is killed
LEFT = 60.0  # seconds after which this process ends, where the dead engine did not end it


class Watchdog:
    """Asks the engine for a sign of life, which it gives between two steps.

    seconds: without an answer, after which the engine counts as hanging; 0: it is never asked.   hung: it hangs.
    """

    def __init__(self, seconds: int):
        self.seconds = seconds
        self.hung = False
        self.task: asyncio.Task | None = None

    def start(self, engine: Any, ending: Any) -> None:
        """Watch `engine`, an AsyncLLM, in the running event loop, until the server's `ending` is requested."""
        if self.seconds and self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._watch(engine, ending))

    async def _watch(self, engine: Any, ending: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        while not ending.requested and not engine.errored:
            answer = asyncio.ensure_future(engine.is_paused())
            done, _ = await asyncio.wait({answer}, timeout=self.seconds)
            if not done:  # this process may have been stopped, and the answer wait to be read
                done, _ = await asyncio.wait({answer}, timeout=0.5)
            if not done:
                answer.cancel()
                if not (ending.requested or engine.errored):
                    await self._end(engine)
            elif isinstance(answer.exception(), EngineDeadError):
                return  # which vLLM notices itself
            await asyncio.sleep(PERIOD)

    async def _end(self, engine: Any) -> None:
        """Kill the engine's processes. vLLM then ends open requests with an error, and the server."""
        self.hung = True
        say(f"error: vLLM's engine has given no sign of life for hang_seconds={self.seconds}; the server ends")
        await asyncio.sleep(SHOWN)
        kill_engine(engine)
        await asyncio.sleep(LEFT)
        os._exit(1)  # a process in a driver's call outlives its kill


def kill_engine(engine: Any) -> None:
    """Kill all processes of `engine`, an AsyncLLM."""
    from vllm.utils.system_utils import kill_process_tree

    manager = engine.engine_core.resources.engine_manager
    for process in manager.processes if manager else ():
        if process.is_alive():
            kill_process_tree(process.pid)
