"""The output of a step of lanes: vLLM's, and the work of each token."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class LaneOutput(ModelRunnerOutput):
    """work: for each token in `sampled_token_ids` three numbers: its recurrences, then the request's passes of the core
    and the lanes in them, both counted since its prompt."""

    work: list[list[tuple[int, int, int]]] = field(default_factory=list)
