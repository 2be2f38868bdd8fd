"""A logits processor of a user's, for vLLM's `logits_processors`."""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor


class Counts(LogitsProcessor):
    """The tokens of a request are its seed, and then one more each: by what it knows of the rows of a batch."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.size, self.rows = 0, {}

    @classmethod
    def validate_params(cls, sampling_params):
        if sampling_params.seed is None:
            raise ValueError("a seed is wanted")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert len(logits) == self.size
        for row, (first, output) in self.rows.items():
            kept = logits[row, first + len(output)].clone()
            logits[row] = float("-inf")
            logits[row, first + len(output)] = kept
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        if batch_update is None:
            return
        self.size = batch_update.batch_size
        for row in batch_update.removed:
            del self.rows[row]
        for row, params, _, output in batch_update.added:
            self.rows[row] = params.seed, output
        assert not batch_update.moved
