"""What a lane step tells the scheduler beside vLLM's own output."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class LaneOutput(ModelRunnerOutput):
    """`work`: of each token of each request, as `sampled_token_ids` has them, its recurrences, and the passes of the
    core and the lanes in them that the request has had by then since its prompt."""

    work: list[list[tuple[int, int, int]]] = field(default_factory=list)
