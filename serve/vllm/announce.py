"""Lines printed before vLLM's engine starts, and after vLLM has checked its arguments."""

from __future__ import annotations

import sys


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
