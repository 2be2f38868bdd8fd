"""vLLM's logits processors, for the requests of one call of its sampler.

A processor knows a request by its row in a batch, and hears of requests that come and go. Rows of the engine never
move, so they are the rows of a user's processors. vLLM's own processors hear of every call's requests anew, which
spares them logits of all others. Shapes: m requests of a call, n rows of the engine, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    BatchUpdate,
    LogitsProcessor,
    LogitsProcessors,
    build_logitsprocs,
)

from .held import Held


class ByRow(LogitsProcessor):
    """A user's `processor`, which gets logits of `size` [n] engine rows, of which `rows` [m] are sampled."""

    def __init__(self, processor: LogitsProcessor):
        self.processor, self.rows, self.size = processor, torch.empty(0), 0

    def is_argmax_invariant(self) -> bool:
        return self.processor.is_argmax_invariant()

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self.processor.update_state(batch_update)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [m, V] -> [m, V]"""
        whole = logits.new_zeros(self.size, logits.shape[1])
        whole[self.rows] = logits
        return self.processor.apply(whole)[self.rows]


class Processors:
    """All processors of an engine, and the requests by engine row that they know.

    of_call: in vLLM's order, for its sampler.   any_of_users: there are some beside vLLM's own.
    """

    def __init__(self, vllm_config: Any, device: torch.device):
        given = tuple(vllm_config.model_config.logits_processors or ())
        made = [*build_logitsprocs(vllm_config, device, PIN_MEMORY, False, given).all]
        self.builtin = [one for one in made if type(one) in BUILTIN_LOGITS_PROCESSORS]
        self.users = [ByRow(one) for one in made if type(one) not in BUILTIN_LOGITS_PROCESSORS]
        self.of_call, self.any_of_users = LogitsProcessors([*self.builtin, *self.users]), bool(self.users)
        self.requests: dict[int, Held] = {}
        self.call: list[Held] = []  # the requests that vLLM's own processors know, after a call without an exception
        self.most = 0  # requests that they may know

    def add(self, row: int, request: Held) -> None:
        """`request` has come into engine row `row`."""
        self.requests[row] = request
        self._tell_users([], [(row, request.params, request.prompt, request.output)])

    def remove(self, row: int) -> None:
        """The request of engine row `row` has gone."""
        if self.requests.pop(row, None):
            self._tell_users([row], [])

    def _tell_users(self, removed: list[int], added: list[tuple]) -> None:
        size = max(self.requests, default=-1) + 1
        for processor in self.users:
            processor.update_state(BatchUpdate(size, removed, added, []))

    def start_call(self, requests: list[Held], rows: torch.Tensor) -> bool:
        """Prepare for logits of `requests`, in engine `rows` [m]. Returns True where they are those of the last
        call."""
        same, update = requests == self.call, None
        if not same:
            added = [(n, one.params, one.prompt, one.output) for n, one in enumerate(requests)]
            update = BatchUpdate(len(requests), range(len(requests), self.most), added, [])
            self.call, self.most = [], max(len(requests), self.most)
        for processor in self.builtin:
            processor.update_state(update)
        for processor in self.users:
            processor.rows, processor.size = rows, max(self.requests) + 1
            processor.update_state(None)  # vLLM does so once a step; lanes sample several times in one
        self.call, self.most = requests, len(requests)
        return same
