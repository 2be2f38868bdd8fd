"""A logits processor of a user's, for vLLM's `logits_processors`."""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

ONLY = 65


class Only(LogitsProcessor):
    """No other token than ONLY."""

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        kept = logits[:, ONLY].clone()
        logits.fill_(float("-inf"))
        logits[:, ONLY] = kept
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass
