"""As run_lanes.py, on the CPU with what lanes have on a GPU: the engine's Triton kernels, interpreted, on vLLM's cache,
and ticks of a fixed width, run as they would be recorded."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported

from typing import Any

from loopwise.serve.engine import loop
from loopwise.serve.engine.graph_tick import GraphTick
from loopwise.serve.engine.tick import TickReport
from loopwise.serve.vllm import rotary, runner
from tests.helpers import run_lanes
from tests.helpers.graph_ticks import run_once
from tests.helpers.run_engines import main


def run(case: dict) -> dict:
    of_lanes: Any = runner.LaneRunner
    of_lanes._records = lambda self: True
    runner.on_cuda = lambda device: run_once
    runs: list[tuple[str, int]] = []
    rotated, take = [], rotary.take_rotary
    rotary.take_rotary = lambda *args: rotated.extend(take(*args)) or rotated
    loop.GraphTick = lambda *args, **kwargs: Noted(runs, *args, **kwargs)
    result = run_lanes.run(case)
    rotary.take_rotary = take
    return {**result, "graph_ticks": len(runs), "rotated": [turned is not None for turned in rotated]}


class Noted(GraphTick):
    def __init__(self, runs: list, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.runs_of = runs

    def run(self, max_passes: int) -> TickReport:
        self.runs_of.append(max_passes)
        return super().run(max_passes)


if __name__ == "__main__":
    main(run)
