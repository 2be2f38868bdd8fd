"""Log-probabilities of prompt tokens, read where the loop's reader shows the head's input.

Shapes: m prompt positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from .held import Held
from .sampling import LaneSampler

AT_ONCE = 256  # positions: logits of a long prompt take memory


class PromptLogprobs:
    """Reads the log-probabilities of the prompts of `sampler`'s requests into them.

    mode: vLLM's logprobs_mode.   logits: x [n, D] -> [n, V].
    """

    def __init__(self, mode: str, sampler: LaneSampler, logits: Callable[[torch.Tensor], torch.Tensor]):
        self.mode, self.sampler, self.logits = mode, sampler, logits

    def __call__(self, x: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> None:
        """x [m, D] of prompt positions [m] in engine rows [m]: reads the log-probability of the next prompt token."""
        for r in row.unique().tolist():
            with self.sampler.faults.of(r):
                self.read(self.sampler.requests[r], x, position, row == r)

    def read(self, request: Held, x: torch.Tensor, position: torch.Tensor, mine: torch.Tensor) -> None:
        """As __call__, for the positions `mine` [m] of a request."""
        wanted = self._wanted(request)
        prompt = torch.tensor(request.prompt, device=x.device)
        if request.logprobs is None:
            request.logprobs = LogprobsTensors.empty_cpu(len(prompt) - 1, wanted + 1)
        at = (mine & (position < len(prompt) - 1)).nonzero().squeeze(1)
        for some in at.split(AT_ONCE) if len(at) else ():
            values = self.logits(x[some]).float()
            if self.mode not in ("raw_logits", "processed_logits"):
                values = Sampler.compute_logprobs(values)
            gathered = Sampler.gather_logprobs(values, wanted, prompt[position[some] + 1])
            for whole, part in zip(request.logprobs[:3], gathered[:3], strict=True):
                whole[position[some].cpu()] = part.to(whole.dtype).cpu()

    def take(self, requests: Iterable[Held]) -> dict[str, LogprobsTensors | None]:
        """Log-probabilities of those of `requests` whose prompts are through, once each, by name."""
        found: dict[str, LogprobsTensors | None] = {}
        for request in requests:
            if request.prompt_logprobs is not None and request.decoding:
                none = LogprobsTensors.empty_cpu(0, self._wanted(request) + 1)
                found[request.name] = none if request.logprobs is None else request.logprobs
                request.prompt_logprobs = request.logprobs = None
        return found

    def _wanted(self, request: Held) -> int:
        return self.sampler.vocabulary if request.prompt_logprobs == -1 else request.prompt_logprobs or 0
