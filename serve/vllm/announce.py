"""Lines on stderr: those before vLLM's engine starts, once vLLM has checked its arguments, and those of its end."""

from __future__ import annotations

import contextlib
import sys


def say(line: str) -> None:
    """Print a `line` about the server's end, which goes on where nothing can be printed: the disk may be full."""
    with contextlib.suppress(OSError):
        print(f"loopwise: {line}", file=sys.stderr, flush=True)


def announce_at_start(lines: list[str]) -> None:
    """Print `lines`, once, when vLLM has made its configuration: it refuses most wrong arguments while it makes it, and
    nothing has started by then. Wraps `EngineArgs.create_engine_config`."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def create_engine_config(self, *args, **kwargs):
        config = create(self, *args, **kwargs)
        EngineArgs.create_engine_config = create
        for line in lines:
            print(f"loopwise: {line}", file=sys.stderr, flush=True)
        return config

    EngineArgs.create_engine_config = create_engine_config
