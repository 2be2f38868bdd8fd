"""What a lane step tells the scheduler beside vLLM's own output."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class LaneOutput(ModelRunnerOutput):
    """`depths`: of each request, the recurrences of each of its tokens, as `sampled_token_ids` has them."""

    depths: list[list[int]] = field(default_factory=list)
