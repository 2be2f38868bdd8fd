"""Settings of the lane engine inside vLLM. Imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

LANES = "loopwise_lanes"  # key in vLLM's additional_config
MEASURED = -1  # of coda_wait and budget: measured at start-up


@dataclass(frozen=True)
class LaneConfig:
    """Settings of the lane engine.

    ticks: passes of the core in one step of vLLM's engine.
    width: lanes of a pass beside prompts'; 0 for no bound.
    coda_wait: ticks that an exit waits for others to be read out with; MEASURED: as many as pay off at the load.
    decoder: of requests that name none.
    wave: most positions of one request in flight.
    budget: lanes of a pass that waves may fill; 0 for no bound; MEASURED: as many as add little time.
    compile: compile passes of the core.
    graphs: on a GPU, run ticks as CUDA graphs, with the engine's own attention kernels.
    """

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
        """The settings in a VllmConfig. Raises KeyError for one of the fixed engine."""
        return cls(**vllm_config.additional_config[LANES])

    def flags(self) -> dict[str, Any]:
        """Arguments of vLLM that start the lane engine: `vllm.LLM(model, **LaneConfig().flags())`.

        It builds on the first of vLLM's two model runners: sets VLLM_USE_V2_MODEL_RUNNER=0, unless it is set already.
        """
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        return {
            "scheduler_cls": "loopwise.serve.vllm.scheduler.LaneScheduler",
            "worker_cls": "loopwise.serve.vllm.worker.LaneWorker",
            "additional_config": {LANES: asdict(self)},
            "async_scheduling": False,  # a step gives a request 0 to `ticks` tokens
            "enforce_eager": True,  # vLLM's own forward does not run
        }


def is_lanes(vllm_config: Any) -> bool:
    """True for a VllmConfig with the lane engine, False with the fixed one."""
    return LANES in (vllm_config.additional_config or {})
