"""What the lane engine inside vLLM is started with, and what a request's fields mean to it. Imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

LANES = "loopwise_lanes"  # key in vLLM's additional_config
MEASURED = -1  # of what the start measures


@dataclass(frozen=True)
class LaneConfig:
    """`ticks` of an engine step; `width`: lanes of a pass of the core beside prompts', 0 for no bound; an exit waits at
    most `coda_wait` ticks for others to be read out with, -1: as many as the load makes worth while. `decoder` of
    requests that name none, and `wave`: most positions of one request in flight; waves fill passes up to `budget`
    lanes, -1: as many as cost little, measured at the start. `compile`: passes of the core are compiled. `graphs`: on a
    GPU, ticks are CUDA graphs, whose attention is the engine's own."""

    ticks: int = 16
    width: int = 0
    coda_wait: int = 0
    decoder: str = "plain"
    wave: int = 8
    budget: int = 0
    compile: bool = True
    graphs: bool = True

    @classmethod
    def of(cls, vllm_config: Any) -> LaneConfig:
        return cls(**vllm_config.additional_config[LANES])

    def flags(self) -> dict[str, Any]:
        """vLLM's settings that start the lane engine, which builds on the first of vLLM's two model runners: the
        environment says so from now on, if it does not name one."""
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        return {
            "scheduler_cls": "loopwise.serve.vllm.scheduler.LaneScheduler",
            "worker_cls": "loopwise.serve.vllm.worker.LaneWorker",
            "additional_config": {LANES: asdict(self)},
            "async_scheduling": False,  # a step gives a request 0 to `ticks` tokens, which is not known beforehand
            "enforce_eager": True,  # vLLM's own forward does not run
        }


def is_lanes(vllm_config: Any) -> bool:
    """Whether vLLM was started with the lane engine."""
    return LANES in (vllm_config.additional_config or {})
