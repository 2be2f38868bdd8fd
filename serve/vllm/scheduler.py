"""vLLM's scheduler, for engine steps that give a request 0 to `passes_per_step` tokens.

As in vLLM, a request that decodes is scheduled with one token a step, and blocks are allocated some tokens ahead.
`update_from_output` accepts ragged lists of tokens and cuts them at a stop. Six things differ:

- Positions count as computed once their token is there.
- A block is published to the prefix cache only once every depth of its positions is written.
- Requests whose prompts leave different keys and values do not share blocks.
- The output carries the depths of tokens.
- Prompt tokens of a step are budgeted in tokens x depth.
- An exception in the work for one request ends that request, with vLLM's finish reason "error".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from ..api.decoders import Decoder
from ..api.depth import Depth, depth_of
from ..api.lanes import LaneConfig
from ..api.prompt_budget import PromptBudget
from ..engine.kv import policy_of
from .arrivals import arrivals, count_arrivals
from .output import LaneOutput, print_fault


class LaneScheduler(Scheduler):
    """vLLM's scheduler for the lane engine. Raises ValueError for settings that the KV policy excludes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.scheduler_config.async_scheduling:
            raise ValueError("async_scheduling: the number of tokens of a step of lanes is not known beforehand")
        self.config = config = self.vllm_config.model_config.hf_config
        self.policy_of_cache = policy = policy_of(config)
        chunked = self.scheduler_config.enable_chunked_prefill or self.cache_config.enable_prefix_caching
        if policy.overwrites and chunked:
            raise ValueError(
                f"kv_policy={policy.name} overwrites keys and values, so prompts are computed whole: "
                "enable_chunked_prefill=False, enable_prefix_caching=False"
            )
        if not policy.shares and self.cache_config.enable_prefix_caching:
            raise ValueError(
                "a router's keys and values are packed, which no block can share: enable_prefix_caching=False"
            )
        self.lanes = LaneConfig.of(self.vllm_config)
        count_arrivals()
        # The most passes of a step: prompts run to their end.
        self.longest = max(self.lanes.passes_per_step, config.max_recurrences) + 1
        self.num_lookahead_tokens = self.longest
        self.depths: dict[str, Depth] = {}
        self.decoders: dict[str, Decoder] = {}
        allocate = self.kv_cache_manager.allocate_slots

        def allocate_slots(request: Request, *args, **kwargs):
            decoder = self.decoders[request.request_id]
            kwargs["num_lookahead_tokens"] = decoder.ahead(self.longest, self.lanes.max_in_flight)
            # vLLM publishes blocks when it schedules their last position: its own forward completes it in the step.
            if request.num_output_tokens:
                kwargs["delay_cache_blocks"] = True
            return allocate(request, *args, **kwargs)

        self.kv_cache_manager.allocate_slots = allocate_slots
        accept = self.structured_output_manager.accept_tokens

        def accept_tokens(request: Request, *args, **kwargs) -> bool:
            try:
                return accept(request, *args, **kwargs)
            except Exception as error:
                print_fault(request.request_id, error)
                return False  # vLLM ends the request

        self.structured_output_manager.accept_tokens = accept_tokens

    def schedule(self, *args, **kwargs) -> SchedulerOutput:
        if shared := arrivals():
            shared.start_step()
        unread = sum(request.num_tokens - request.num_computed_tokens > 1 for request in self.running)
        self.budget = PromptBudget(self.max_num_scheduled_tokens, unread + self.get_request_counts()[1])
        return super().schedule(*args, **kwargs)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The tokens of a request that this step computes: vLLM lets a drafter shorten a chunk here, we have none.

        A prompt that must be computed whole is not cut.
        """
        if num_new_tokens <= 1 or not self.scheduler_config.enable_chunked_prefill:
            return num_new_tokens
        return self.budget.take(num_new_tokens, self.depths[request.request_id].num_recurrences)

    def add_request(self, request: Request) -> None:
        """Add a request, with its depth and decoder. Its depth becomes part of the hashes of its blocks."""
        params, name = request.sampling_params, request.request_id
        assert params is not None, "the lane engine generates text only"
        try:
            depth = depth_of(params.extra_args or {}, self.config.num_recurrences, self.config.exit)
            decoder = self.lanes.decoder_of(params, self.vllm_config.model_config.logprobs_mode)
        except Exception as error:
            depth, decoder = depth_of({}, self.config.num_recurrences, None), Decoder()
            self._fail(name, error)
        self.depths[name], self.decoders[name] = depth, decoder
        if self.cache_config.enable_prefix_caching:
            request.cache_salt = f"{request.cache_salt or ''} {depth.key}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def _free_request(self, request: Request, *args, **kwargs):
        self.depths.pop(request.request_id, None)
        self.decoders.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _preempt_request(self, request: Request, *args, **kwargs) -> None:
        """As vLLM's. A chunk that was scheduled in this step, and published then, does not run: its blocks are
        forgotten. (By priority, a request may lose its place after it was scheduled.)"""
        if self.cache_config.enable_prefix_caching:
            blocks = self.kv_cache_manager.get_block_ids(request.request_id)[0]
            self.kv_cache_manager.evict_blocks(set(blocks[request.num_computed_tokens // self.block_size :]))
        super()._preempt_request(request, *args, **kwargs)
        if request.num_output_tokens and not self._published_whole(request.request_id):
            request.skip_reading_prefix_cache = True  # a prompt's blocks hold the same tokens at full depth

    def _published_whole(self, name: str) -> bool:
        """True where generated positions leave the keys and values that the same tokens in a prompt leave.

        A complete policy writes all depths of the core, but a coda's keys are those of the depth of the exit.
        """
        if self.decoders[name].diffusion:
            return False
        return self.depths[name].full or (self.policy_of_cache.complete and not self.config.coda)

    def update_from_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, scheduler_output: SchedulerOutput, model_runner_output: LaneOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Advance requests by their tokens [ragged], attach `work` to the outputs, and publish blocks.

        Sets `num_computed_tokens` of requests that decode, before vLLM's own update. `work` travels in the field
        `routed_experts`, one row [3] of int32 a token, of requests that ask for it, or of all (`LaneConfig.report`).
        """
        self._drop_failed(scheduler_output, model_runner_output)
        index, tokens = model_runner_output.req_id_to_index, model_runner_output.sampled_token_ids
        decoding, reported = [], set[str]()
        for name in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(name)
            if request is None or request.is_finished():
                continue  # aborted while the step ran
            if name in self.grammar_compile_error_reqs:
                continue
            if self._reports(request):
                reported.add(name)
            if request.num_computed_tokens == request.num_tokens:  # not an inner chunk of a prompt
                request.num_computed_tokens += len(tokens[index[name]]) - 1  # the last token's position is in flight
                decoding.append((request, self.depths[name]))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            for output in client.outputs:
                if output.request_id in reported and output.new_token_ids:
                    work = model_runner_output.work[index[output.request_id]]
                    # The field has one row per token, which vLLM cuts and joins together with the tokens.
                    output.routed_experts = np.asarray(work[: len(output.new_token_ids)], dtype=np.int32)
        if self.cache_config.enable_prefix_caching:
            for request, depth in decoding:
                if not request.is_finished():
                    self._publish(request, depth)
        return outputs

    def _reports(self, request: Request) -> bool:
        """True where outputs of `request` have its work. vLLM's HTTP server writes the field that it travels in into
        replies, unless our endpoint plugin takes it off."""
        params = request.sampling_params
        return self.lanes.report or bool(params and (params.extra_args or {}).get("return_recurrences"))

    def _publish(self, request: Request, depth: Depth) -> None:
        """Publish blocks in which every depth of every position is written, with the values of a prompt."""
        done = request.num_computed_tokens
        prompt = min(request.num_prompt_tokens, done)
        if not self._published_whole(request.request_id):
            done = prompt
        elif not depth.full:  # positions behind the newest have recurrences left
            done = max(prompt, done - depth.num_recurrences)
        self.kv_cache_manager.cache_blocks(request, done)

    # ---- requests that fail ---------------------------------------------------------------------------------------
    def _fail(self, name: str, error: BaseException | None = None) -> None:
        """End a request by an error with the next outputs, as vLLM ends those whose grammar does not compile."""
        if error is not None:
            print_fault(name, error)
        failed: Any = self.grammar_compile_error_reqs  # a set; from 0.33, a dict of errors for clients
        failed.update({name: None} if isinstance(failed, dict) else {name})

    def _drop_failed(self, scheduler_output: SchedulerOutput, output: LaneOutput) -> None:
        """Fail the requests that failed in the worker, and drop the tokens of this step.

        Blocks are published when they are scheduled. Those of a request that did not run hold nothing: they are
        forgotten, and requests of the same step that share them fail, too.
        """
        empty, size = set[int](), self.block_size
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(name)
            if request is None or request.is_finished():
                continue
            blocks, ran = self.kv_cache_manager.get_block_ids(name)[0], output.failed.get(name, True)
            if not ran or not empty.isdisjoint(blocks):
                empty.update(blocks[(request.num_computed_tokens - count) // size :])
                self._fail(name, RuntimeError("its prompt begins as that of a request that failed") if ran else None)
            if name in output.failed:
                self._fail(name)
            if name in self.grammar_compile_error_reqs:
                output.sampled_token_ids[output.req_id_to_index[name]] = []
                output.prompt_logprobs_dict.pop(name, None)  # vLLM takes none without a token
        if empty and self.cache_config.enable_prefix_caching:
            self.kv_cache_manager.evict_blocks(empty)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """As vLLM's. A request whose grammar raises fails, and has no mask."""
        try:
            return super().get_grammar_bitmask(scheduler_output)
        except Exception as error:
            first = error
        good: dict[str, int] = {}
        for name, count in scheduler_output.num_scheduled_tokens.items():
            try:
                super().get_grammar_bitmask(replace(scheduler_output, num_scheduled_tokens={name: count}))
                good[name] = count
            except Exception as error:
                self._fail(name, error)
        if len(good) == len(scheduler_output.num_scheduled_tokens):
            raise first  # no request's alone
        return super().get_grammar_bitmask(replace(scheduler_output, num_scheduled_tokens=good))
