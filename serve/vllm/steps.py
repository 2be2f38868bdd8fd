"""The steps of the lane engine: a step of vLLM is a step of the engine's loop.

Everything goes in the order in which the scheduler lists requests, or is sorted: sets of names are ordered differently
in every process, and tensor-parallel ranks would reduce different rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from ..api.decoders import DECODERS, Decoder
from ..api.depth import depth_of
from ..api.lanes import LaneConfig
from ..engine.loop import Loop, Prompt
from ..engine.request import MAX_STOPS, Request
from .grammar import mask_of
from .held import Held, Past, receive
from .output import LaneOutput, print_fault
from .prompt_logprobs import PromptLogprobs
from .sampling import LaneSampler


class LaneSteps:
    """The steps of `loop`, and the requests in it.

    config: the model's.   split: blocks of the loop in a block of vLLM's scheduler.   reader: the loop's.
    arrived: a request waits for the step to end.
    """

    def __init__(
        self,
        loop: Loop,
        sampler: LaneSampler,
        reader: PromptLogprobs,
        config: Any,
        lanes: LaneConfig,
        split: int = 1,
        arrived: Callable[[], bool] = lambda: False,
    ):
        self.loop, self.sampler, self.reader, self.config, self.lanes = loop, sampler, reader, config, lanes
        sampler.known_tokens, sampler.in_use = loop.state.requests.known_tokens, loop.work.in_use
        sampler.records = loop.context.logprobs
        loop.eager_tick.budget = lanes.budget or 0
        self.cut = False  # a prompt's next tokens wait for the step to end
        loop.somebody_waits = lambda: self.cut or arrived()
        rows, device = loop.config.max_num_seqs, loop.state.device
        self.device, self.held = device, dict[str, Held]()
        self.free = list(range(rows))  # a heap: rows of a user's logits processors stay few
        self.split = torch.arange(split)
        self.exits = [0] * (config.max_recurrences + 1)
        self.decoder = torch.zeros(rows, dtype=torch.long, device=device)  # by row, a number in DECODERS
        self.counted = torch.zeros(rows, 2, dtype=torch.long, device=device)  # passes and lanes, by row
        self.work = torch.zeros(len(DECODERS), 3, dtype=torch.long, device=device)  # tokens, passes, lanes
        self.parked: list[Held] | None = None  # the requests of a step that waits for the masks of grammars

    # ---- a step -------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run one step of the loop with the requests of a scheduler's `step`.

        Releases the rows of finished and preempted requests, admits new requests to rows, sets block tables, and starts
        prompt tokens. Returns a LaneOutput: tokens [ragged] and their work. Returns None where grammars mask tokens,
        until `sample` samples them. An exception in the work for one request ends that request alone.
        """
        for name in sorted(step.finished_req_ids & self.held.keys()):
            self._release(self.held.pop(name))
        for name in sorted((step.preempted_req_ids or set()) & self.held.keys()):
            self._release(self.held[name], preempted=True)
        receive(self.held, step)
        if not step.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self.sampler.start_step()
        scheduled = [self.held[name] for name in step.num_scheduled_tokens]
        counts = step.num_scheduled_tokens.values()
        prompts = [self._take_in(request, count) for request, count in zip(scheduled, counts, strict=True)]
        self.cut = any(prompt is not None and not prompt.wants_token for prompt in prompts)
        if resident := [request for request in scheduled if request.row is not None]:
            self._set_block_tables(resident)
            if prompts := [prompt for prompt in prompts if prompt is not None]:
                self.loop.prompt(prompts)
            self.loop.step(torch.tensor([request.row for request in resident], device=self.device))
        if self.loop.parked:  # vLLM brings the masks of their grammars
            self.parked = scheduled
            return None
        return self._output(scheduled)

    @torch.inference_mode()
    def sample(self, grammars: GrammarOutput | None) -> LaneOutput | None:
        """Sample the tokens that wait for the masks of `grammars`. Returns the LaneOutput of the step."""
        scheduled, self.parked = self.parked, None
        if scheduled is None:
            return None
        rows = {request.name: request.row for request in scheduled if request.row is not None}
        self.loop.resume(partial(self.sampler, mask=mask_of(grammars, rows, self.device)))
        return self._output(scheduled)

    # ---- requests -------------------------------------------------------------------------------------------------
    def _take_in(self, request: Held, count: int) -> Prompt | None:
        """Admit a request that has no row yet. Returns its prompt tokens as `_prompt` does.

        After an exception the request has no row.
        """
        faults, prompt, admitted = self.sampler.faults, None, request.row is not None
        request.appended = 0
        if request.row is None:
            request.row = heapq.heappop(self.free)
        row = request.row
        with faults.of(row):
            if not admitted:
                self._admit(request, row)
            prompt = self._prompt(request, row, count)
        if row in faults:
            print_fault(request.name, faults.pop(row))
            self._release(request)
        return prompt

    def _admit(self, request: Held, row: int) -> None:
        params, done, config = request.params, len(request.output), self.config
        assert params.max_tokens is not None, "vLLM sets it"
        depth = depth_of(params.extra_args or {}, config.num_recurrences, config.exit)
        past, request.past = request.past or Past(depth.forced_depths), None
        decoder = self._decoder(request, row)
        stops = {*(params.stop_token_ids or ()), *([] if params.eos_token_id is None else [params.eos_token_id])}
        room = self.loop.config.max_model_len - len(request.prompt) - done
        self.loop.admit(
            row,
            Request(
                num_recurrences=depth.num_recurrences,
                min_recurrences=depth.min_recurrences,
                rule=depth.rule,
                threshold=depth.threshold,
                prompt_exit=depth.prompt_exit,
                forced_depths=past.trace if decoder.diffusion is None and not self.loop.routing else [],
                max_tokens=min(params.max_tokens - done, room),
                stops=tuple(sorted(stops)[:MAX_STOPS]),  # at others, the scheduler cuts what came after
                sampled_by_host=params.structured_outputs is not None,
                wants_prompt_logits=request.prompt_logprobs is not None,
                sampling=self.sampler.sampling[row],
                logprobs=self.sampler.noted.get(row),
                max_in_flight=decoder.max_in_flight,
                draft_every=decoder.draft_every,
                draft_depths=decoder.draft_depths,
                diffusion=decoder.diffusion,
            ),
            past.passes,
            past.lanes,
        )
        self.counted[row], self.decoder[row] = torch.tensor([past.passes, past.lanes]), DECODERS.index(decoder.name)
        if decoder.diffusion or self.loop.state.policy.overwrites:  # generated positions as they came
            known = torch.tensor(request.output, dtype=torch.int32, device=self.device)
            start = len(request.prompt)
            self.loop.set_known_tokens(row, start, known)
            request.sent = min(request.computed, start - 1)

    def _decoder(self, request: Held, row: int) -> Decoder:
        """The decoder of a request in `row`. A diffusion without a seed gets the request's own."""
        decoder = self.lanes.decoder_of(request.params, self.sampler.logprobs_mode)
        if decoder.name == "wave" and self.sampler.processors.any_of_users:  # which may read earlier tokens
            decoder = Decoder()
        self.sampler.admit(row, request, decoder.name)
        if decoder.diffusion and not decoder.diffusion.seed:
            decoder = replace(decoder, diffusion=replace(decoder.diffusion, seed=self.sampler.seed[row]))
        return decoder

    def _release(self, request: Held, preempted: bool = False) -> None:
        """Take a request's row back, if it has one. preempted: keep its past, as it will go on in another row."""
        row = request.row
        if row is None:
            return
        request.row, request.in_table, request.decoding, request.sent = None, 0, False, None
        heapq.heappush(self.free, row)
        self.sampler.release(row)
        trace, requests = self.loop.release(row), self.loop.state.requests
        if preempted:  # which waits for the device, and makes a list of all positions
            request.past = Past(trace.tolist(), int(requests.passes[row]), int(requests.lane_passes[row]))

    def _set_block_tables(self, resident: list[Held]) -> None:
        """Write the blocks that requests got since their last step into their rows' tables."""
        written = []
        for request in resident:
            if request.row is not None and request.in_table < len(request.blocks):
                new = torch.tensor(request.blocks[request.in_table :])
                blocks = (new[:, None] * len(self.split) + self.split).flatten()
                if not request.in_table:  # the rest of the table is vLLM's null block
                    blocks = torch.nn.functional.pad(blocks, (0, self.loop.config.num_blocks - len(blocks)))
                places = torch.arange(len(blocks)) + request.in_table * len(self.split)
                written.append(torch.stack([torch.full_like(places, request.row), places, blocks]))
                request.in_table = len(request.blocks)
        if written:
            rows, places, blocks = torch.cat(written, 1).to(self.device)
            self.loop.set_block_tables(rows, places, blocks.int())

    def _prompt(self, request: Held, row: int, count: int) -> Prompt | None:
        """The known tokens that the scheduler wants computed; None for a request that decodes."""
        if request.decoding:
            return None
        first, tokens = request.computed, request.known
        last, prompt = first + count, len(request.prompt)
        request.decoding = last == len(tokens)
        if self.loop.state.policy.overwrites and (first or last < len(tokens)):
            raise ValueError(f"kv_policy={self.loop.state.policy.name}: a prompt cannot be cut into chunks")
        if request.sent is not None:  # generated positions follow by themselves, once vLLM expects tokens
            first, last = request.sent, prompt if request.decoding else min(last, prompt - 1)
            request.sent = max(first, last)
            if first >= last:
                return None
        return Prompt(row, torch.tensor(tokens[first:last]), first, request.decoding, generated=prompt)

    # ---- the output -----------------------------------------------------------------------------------------------
    def _output(self, scheduled: list[Held]) -> LaneOutput:
        faults, requests = self.sampler.faults, [request for request in scheduled if request.row is not None]
        numbers = [request.row for request in requests if request.row is not None]
        rows = torch.tensor(numbers, dtype=torch.long, device=self.device)
        tokens, depths = self.loop.outputs(rows)
        spent = self._count(rows).tolist()
        for request, new, deep in zip(requests, tokens, depths, strict=True):
            request.output.extend(new[request.appended :])
            for depth in deep:
                self.exits[min(depth, len(self.exits) - 1)] += 1  # a diffusion may go deeper
        failed: dict[str, bool] = {}
        for request, row in zip(requests, numbers, strict=True):
            if row in faults:
                print_fault(request.name, faults[row])
                failed[request.name] = True
        missing = [request.name for request in scheduled if request.row is None]
        order, tokens = [*(request.name for request in requests), *missing], [*tokens, *([] for _ in missing)]
        work = [[(depth, *now) for depth in deep] for deep, now in zip(depths, spent, strict=True)]
        return LaneOutput(
            req_ids=order,
            req_id_to_index={name: number for number, name in enumerate(order)},
            sampled_token_ids=tokens,
            logprobs=self.sampler.lists(numbers, [len(new) for new in tokens]),
            prompt_logprobs_dict=self.reader.take(request for request in requests if request.name not in failed),
            work=[*work, *([] for _ in missing)],
            failed=failed | dict.fromkeys(missing, False),
        )

    def _count(self, rows: torch.Tensor) -> torch.Tensor:
        """Passes and lanes [n, 2] that requests in `rows` [n] have had, which the counters then have, too."""
        requests = self.loop.state.requests
        spent = torch.stack([requests.passes[rows], requests.lane_passes[rows]], 1)
        new = torch.cat([requests.count[rows, None], spent - self.counted[rows]], 1)
        self.work.index_add_(0, self.decoder[rows], new)
        self.counted[rows] = spent
        return spent

    def counts(self) -> dict[str, Any]:
        """Counts of tokens that left after n recurrences, of passes of core and coda with n lanes; by decoder,
        the tokens, passes and lanes of requests since their prompts; lanes that waves fill a pass up to."""

        def by_number(counter: Any) -> list[int]:
            return [counter[n] for n in range(max(counter, default=0) + 1)]

        done = self.loop.counts
        found = {"exits": self.exits, "lanes": by_number(done.passes), "codas": by_number(done.reads)}
        work = dict(zip(DECODERS, self.work.tolist(), strict=True))
        return {**found, "decoders": work, "budget": self.loop.eager_tick.budget}
