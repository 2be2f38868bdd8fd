"""The requests that vLLM has scheduled and not finished, kept by the messages of its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import LogprobsTensors


@dataclass
class Past:
    """The past of a preempted request: depths of its positions, passes of the core and lanes in them."""

    trace: list[int]
    passes: int = 0
    lanes: int = 0


@dataclass(eq=False)
class Held:
    """One request.

    prompt, output: token ids; output grows with every token that is certain.   blocks: its KV blocks, by vLLM's
    numbers.   computed: positions whose keys and values are there, as vLLM counts.   prompt_logprobs: how many are
    wanted of each prompt token; None once they are given.   logprobs: those found so far.

    The others hold while the request has a row: row: the engine's; None without one.   in_table: blocks that the row's
    block table has.   decoding: its known tokens are through.   sent: prompt tokens sent, where it is replayed from its
    prompt.   appended: tokens of this step that are in `output` already.

    past: of a preempted request.
    """

    name: str
    params: SamplingParams
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    prompt_logprobs: int | None = None
    logprobs: LogprobsTensors | None = None
    row: int | None = None
    in_table: int = 0
    decoding: bool = False
    sent: int | None = None
    appended: int = 0
    past: Past | None = None

    @cached_property
    def prompt_ids(self) -> torch.Tensor:
        """`prompt` as a tensor on the host."""
        return torch.tensor(self.prompt)

    @property
    def known(self) -> list[int]:
        """Tokens of prompt and text."""
        return [*self.prompt, *self.output]


def receive(held: dict[str, Held], step: SchedulerOutput) -> None:
    """Bring `held`, requests by name, to the state of a scheduler's `step`.

    vLLM sends a preempted request again in one of two ways: whole, as a new one, or as a known one with other blocks.
    It does the first where a configuration is made for its second model runner.
    """
    for new in step.scheduled_new_reqs:
        request = held.get(new.req_id)
        if request is None:
            params, prompt = new.sampling_params, new.prompt_token_ids
            assert params is not None, "the lane engine generates text only"
            assert prompt is not None, "a prompt is token ids"
            wanted = params.prompt_logprobs
            request = held[new.req_id] = Held(new.req_id, params, prompt, prompt_logprobs=wanted)
        request.computed, request.blocks, request.in_table = new.num_computed_tokens, [*new.block_ids[0]], 0
    known = step.scheduled_cached_reqs
    for name, blocks, computed in zip(known.req_ids, known.new_block_ids, known.num_computed_tokens, strict=True):
        request = held[name]
        request.computed = computed
        if name in known.resumed_req_ids:
            request.blocks, request.in_table = [], 0
        if blocks is not None:
            request.blocks += blocks[0]
