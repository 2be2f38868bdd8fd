"""As run_lanes.py, on the CPU with what lanes have on a GPU: the engine's Triton kernels, interpreted, on vLLM's cache,
and ticks of a fixed width, run as they would be recorded."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported

from collections.abc import Callable
from typing import Any

from loopwise.serve.vllm import worker
from tests.helpers import run_lanes
from tests.helpers.run_engines import main


def run_once(function: Callable[[], None]) -> Callable[[], Any]:
    function()
    return function


def run(case: dict) -> dict:
    worker.CpuLaneRunner._attention = worker.GpuLaneRunner._attention
    worker.on_cuda = lambda device: run_once
    runs: list[tuple[str, int]] = []
    worker.Masked = lambda *args, **kwargs: Noted(runs, *args, **kwargs)
    result = run_lanes.run(case)
    return {**result, "masked": len(runs)}


class Noted(worker.Masked):
    def __init__(self, runs: list, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.runs_of = runs

    def run(self, most: int) -> int:
        self.runs_of.append(most)
        return super().run(most)


if __name__ == "__main__":
    main(run)
