"""The processes of a run, as accelerate and torchrun describe them in the environment. No torch here."""

from __future__ import annotations

import os

LAUNCHERS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def is_worker() -> bool:
    """True if this process is one of several that accelerate or torchrun started."""
    return "RANK" in os.environ and count() > 1


def is_first() -> bool:
    """True for rank 0, and for a run in one process."""
    return os.environ.get("RANK", "0") == "0"


def count() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def layout() -> str:
    """The layout of this run's checkpoints: `whole`, or the launcher of `LAUNCHERS` that shards them."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "whole"
