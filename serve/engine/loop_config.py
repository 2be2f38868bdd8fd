"""Sizes of a loop."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 256  # of a CUDA graph: wider passes keep the device busy without one


@dataclass(frozen=True)
class LoopConfig:
    """Sizes of a loop, in vLLM's words.

    max_num_seqs: resident requests.   max_model_len: positions of each.   num_blocks: KV blocks of each.
    max_num_batched_tokens: prompt tokens of a step.   passes_per_step: passes of the core in a step.
    max_lanes: decode lanes of a pass, 0 for no bound; the lanes nearest to their token go first.
    coda_wait: passes that an exit waits at most for others that are read out with it.
    max_in_flight: positions of one request in flight before its token.   compile: `Loop.warm_up` compiles the core.
    """

    max_num_seqs: int
    max_model_len: int
    num_blocks: int
    max_num_batched_tokens: int
    passes_per_step: int
    max_lanes: int = 0
    coda_wait: int = 0
    max_in_flight: int = 1
    compile: bool = False

    @property
    def most_read(self) -> int:
        """The most rows whose logits are held at once: those of all requests, and of waves no more than graphs have."""
        return max(self.max_num_seqs, min(self.max_num_seqs * self.max_in_flight, MAX_ROWS))
