"""The worker's side of the lane engine: a step of vLLM is a step of the engine's loop.

vLLM keeps its books of requests: block tables, sampling parameters, tokens. The forward pass, sampling and the output
are the engine's. Everything goes in the order in which the scheduler lists requests, or is sorted: sets of names are
ordered differently in every process, and tensor-parallel ranks would reduce different rows.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsTensors
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from ..api.decoders import DECODERS, Decoder, decoder_of
from ..api.depth import depth_of
from ..api.lanes import AUTO, LaneConfig
from ..engine.attention.base import Attention
from ..engine.graphs import on_cuda, reserved_bytes
from ..engine.kv import policy_of
from ..engine.loop import Loop, Prompt
from ..engine.loop_config import LoopConfig
from ..engine.request import MAX_STOPS, Request
from .arrivals import arrivals
from .attention import PagedAttention
from .output import LaneOutput, print_fault
from .runner import RunnerAttributes, WorkerAttributes
from .sampling import LaneSampler


@dataclass
class Past:
    """The past of a preempted request: depths of its positions, passes of the core and lanes in them."""

    trace: list[int]
    passes: int = 0
    lanes: int = 0


class LaneSteps(RunnerAttributes):
    """The steps of the loop, in place of a model runner's forward pass. Mixed into vLLM's runners of each platform."""

    loop: Loop
    paged: type[PagedAttention] = PagedAttention

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """One kind for all layers: positions behind the newest need blocks that a window has left."""
        specs = super().get_kv_cache_spec()  # pyright: ignore[reportAttributeAccessIssue]
        names = ("block_size", "num_kv_heads", "head_size", "dtype")
        return {layer: FullAttentionSpec(**{n: getattr(spec, n) for n in names}) for layer, spec in specs.items()}

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(f"{len(kv_cache_config.kv_cache_groups)} groups of KV caches: lanes need one")
        self.parts = parts = self.model.parts
        self.depth_config = config = self.model.config
        self.lane_config = lanes = LaneConfig.of(self.vllm_config)
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        if [len(groups) for groups in self.attn_groups] != [1]:
            raise ValueError("lanes need one attention backend for all layers")
        parts.attention = self._attention(block_size)
        rows, mode = self.vllm_config.scheduler_config.max_num_seqs, self.model_config.logprobs_mode
        self.sampler_of_lanes = LaneSampler(mode, lambda: self.input_batch, self.requests, rows, self.device)
        self.loop = self._loop(self.device, parts.attention, self.sampler_of_lanes)
        if not isinstance(parts.attention, PagedAttention):  # which waits for the device
            record = on_cuda(self.device)
            self.loop.use_graphs(record)
        sampler = self.sampler_of_lanes
        sampler.known_tokens, sampler.in_use = self.loop.state.requests.known_tokens, self.loop.work.in_use
        self.loop.eager_tick.budget = lanes.budget or 0
        if shared := arrivals():  # a server's, whose replies and new requests must not wait
            self.loop.eager = True
        # Ranks would not hear of new requests in the same tick.
        arrived = shared.waiting if shared and get_tp_group().world_size == 1 else lambda: False
        self.cut = False  # a prompt's next tokens wait for the step to end
        self.loop.somebody_waits = lambda: self.cut or arrived()
        self.free = list(range(rows))[::-1]
        self.row: dict[str, int] = {}
        self.flying: set[str] = set()  # requests whose prompt is through
        self.sent: dict[str, int] = {}  # prompt tokens of requests that are replayed from their prompts
        self.history: dict[str, Past] = {}  # preempted requests
        self.exits = [0] * (config.max_recurrences + 1)
        self.decoder = torch.zeros(rows, dtype=torch.long, device=self.device)  # by row, a number in DECODERS
        self.counted = torch.zeros(rows, 2, dtype=torch.long, device=self.device)  # passes and lanes, by row
        self.work = torch.zeros(len(DECODERS), 3, dtype=torch.long, device=self.device)  # tokens, passes, lanes
        self.parked: Any = None

    def _loop(self, device: Any, attention: Any, sampler: Any) -> Loop:
        lanes, scheduler = LaneConfig.of(self.vllm_config), self.vllm_config.scheduler_config
        sizes = LoopConfig(
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            num_blocks=self.input_batch.block_table[0].get_cpu_tensor().shape[1],
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            passes_per_step=lanes.passes_per_step,
            max_lanes=lanes.max_lanes,
            coda_wait=lanes.coda_wait or 0,
            max_in_flight=lanes.max_in_flight,
            compile=lanes.compile,
        )
        parts, policy, reader = self.model.parts, policy_of(self.model.config), self._read_prompt
        return Loop(parts, attention, policy, sampler, sizes, dtype=self.dtype, device=device, reader=reader)

    def state_bytes(self) -> int:
        """Bytes of the loop's state: of its lanes and requests. The loop need not exist yet."""
        return self._loop("meta", None, None).nbytes

    def _attention(self, block_size: int) -> Attention:
        builder = self.attn_groups[0][0].get_metadata_builder()
        return self.paged(self.parts.caches, self.parts.outer, block_size, builder, self.lane_config.compile)

    def _records(self) -> bool:
        """Graphs are wanted, and no backend of vLLM's is asked for. Several ranks do without graphs, in which their
        all-reduce would have to be."""
        graphs, backend = LaneConfig.of(self.vllm_config).graphs, self.vllm_config.attention_config.backend
        return graphs and backend is None and get_tp_group().world_size == 1

    # ---- a step -------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Run one step of the loop with the requests of vLLM's SchedulerOutput.

        Releases the rows of finished and preempted requests, admits new requests to rows, sets block tables, and starts
        prompt tokens. Returns a LaneOutput: tokens [ragged] and their work. Returns None where grammars mask tokens,
        until `sample_tokens` samples them. An exception in the work for one request ends that request alone.
        """
        for name in sorted(scheduler_output.finished_req_ids):
            self._release(name)
            self.history.pop(name, None)
        for name in sorted(scheduler_output.preempted_req_ids or ()):
            if name in self.row:
                self.history[name] = self._release(name)
        self._update_states(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self.sampler_of_lanes.start_step()
        scheduled = scheduler_output.num_scheduled_tokens
        prompts = [self._take_in(name, count) for name, count in scheduled.items()]
        self.cut = any(prompt is not None and not prompt.wants_token for prompt in prompts)
        if names := [name for name in scheduled if name in self.row]:
            rows = torch.tensor([self.row[name] for name in names], device=self.device)
            batch = self.input_batch
            tables = batch.block_table[0].get_cpu_tensor()[[batch.req_id_to_index[name] for name in names]]
            self.loop.set_block_tables(rows, tables.to(self.device))
            if prompts := [prompt for prompt in prompts if prompt is not None]:
                self.loop.prompt(prompts)
            self.loop.step(rows)
        if self.loop.parked:  # vLLM brings the masks of their grammars with `sample_tokens`
            self.parked = scheduler_output
            return None
        return self._output(list(scheduled))

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample the tokens that wait for the masks in vLLM's GrammarOutput. Returns the LaneOutput of the step."""
        scheduler_output, self.parked = self.parked, None
        if scheduler_output is None:
            return None

        def mask(logits: torch.Tensor) -> None:
            if grammar_output is not None:
                apply_grammar_bitmask(scheduler_output, grammar_output, self.input_batch, logits)

        self.loop.resume(partial(self.sampler_of_lanes, mask=mask))
        return self._output(list(scheduler_output.num_scheduled_tokens))

    def take_draft_token_ids(self) -> None:
        return None

    def _take_in(self, name: str, count: int) -> Prompt | None:
        """Admit a request that has no row yet. Returns its prompt tokens as `_prompt` does.

        After an exception the request has no row.
        """
        faults, prompt = self.sampler_of_lanes.faults, None
        row = self.row[name] if name in self.row else self.free.pop()
        with faults.of(row):
            if name not in self.row:
                self._admit(name, row)
            prompt = self._prompt(name, count)
        if row in faults:
            print_fault(name, faults.pop(row))
            self.row[name] = row
            self._release(name)
        return prompt

    def _admit(self, name: str, row: int) -> None:
        state = self.requests[name]
        params, done = state.sampling_params, len(state.output_token_ids)
        assert params.max_tokens is not None, "vLLM sets it"
        depth = depth_of(params.extra_args or {}, self.depth_config.num_recurrences, self.depth_config.exit)
        past = self.history.pop(name, Past(depth.forced_depths))
        decoder = self._decoder(row, name)
        stops = {*(params.stop_token_ids or ()), *([] if params.eos_token_id is None else [params.eos_token_id])}
        self.loop.admit(
            row,
            Request(
                num_recurrences=depth.num_recurrences,
                min_recurrences=depth.min_recurrences,
                rule=depth.rule,
                threshold=depth.threshold,
                prompt_exit=depth.prompt_exit,
                forced_depths=past.trace if decoder.diffusion is None and not self.loop.routing else [],
                max_tokens=min(params.max_tokens - done, self.max_model_len - state.num_tokens),
                stops=tuple(sorted(stops)[:MAX_STOPS]),  # at others, the scheduler cuts what came after
                sampled_by_host=params.structured_outputs is not None,
                wants_prompt_logits=name in self.num_prompt_logprobs,
                sampling=self.sampler_of_lanes.sampling[row],
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
            known = torch.tensor(state.output_token_ids, dtype=torch.int32, device=self.device)
            start = len(state.prompt_token_ids)
            self.loop.set_known_tokens(row, start, known)
            self.sent[name] = min(state.num_computed_tokens, start - 1)
        self.row[name] = row

    def _decoder(self, row: int, name: str) -> Decoder:
        """The decoder of a request in `row`. A diffusion without a seed gets the request's own."""
        params, lanes = self.requests[name].sampling_params, self.lane_config
        decoder = decoder_of(params, lanes.decoder, lanes.max_in_flight, lanes.draft_every, lanes.draft_depths)
        self.sampler_of_lanes.admit(row, name, decoder.name)
        if decoder.diffusion and not decoder.diffusion.seed:
            seed = self.sampler_of_lanes.seed[row]
            decoder = replace(decoder, diffusion=replace(decoder.diffusion, seed=seed))
        return decoder

    def _release(self, name: str) -> Past:
        row = self.row.pop(name, None)
        if row is None:
            return Past([])
        self.free.append(row)
        self.flying.discard(name)
        self.sent.pop(name, None)
        requests = self.loop.state.requests
        return Past(self.loop.release(row).tolist(), int(requests.passes[row]), int(requests.lane_passes[row]))

    def _prompt(self, name: str, count: int) -> Prompt | None:
        """The known tokens that the scheduler wants computed; None for a request that decodes."""
        if name in self.flying:
            return None
        state, row = self.requests[name], self.row[name]
        first, tokens = state.num_computed_tokens, [*state.prompt_token_ids, *state.output_token_ids]
        last, prompt = first + count, len(state.prompt_token_ids)
        if last == len(tokens):
            self.flying.add(name)
        if self.loop.state.policy.overwrites and (first or last < len(tokens)):
            raise ValueError(f"kv_policy={self.loop.state.policy.name}: a prompt cannot be cut into chunks")
        if name in self.sent:  # generated positions follow by themselves, once vLLM expects tokens
            first, last = self.sent[name], prompt if name in self.flying else min(last, prompt - 1)
            self.sent[name] = max(first, last)
            if first >= last:
                return None
        return Prompt(row, torch.tensor(tokens[first:last]), first, name in self.flying, generated=prompt)

    def _output(self, scheduled: list[str]) -> LaneOutput:
        faults, names = self.sampler_of_lanes.faults, [name for name in scheduled if name in self.row]
        rows = torch.tensor([self.row[name] for name in names], dtype=torch.long, device=self.device)
        tokens, depths = self.loop.outputs(rows)
        spent = self._count(rows).tolist()
        for name, new, deep in zip(names, tokens, depths, strict=True):
            self.requests[name].output_token_ids.extend(new[self.sampler_of_lanes.appended.get(name, 0) :])
            for depth in deep:
                self.exits[min(depth, len(self.exits) - 1)] += 1  # a diffusion may go deeper
        failed = {name: True for name in names if self.row[name] in faults}
        for name in failed:
            print_fault(name, faults[self.row[name]])
        missing = [name for name in scheduled if name not in self.row]
        order, tokens = [*names, *missing], [*tokens, *([] for _ in missing)]
        work = [[(depth, *now) for depth in deep] for deep, now in zip(depths, spent, strict=True)]
        return LaneOutput(
            req_ids=order,
            req_id_to_index={name: number for number, name in enumerate(order)},
            sampled_token_ids=tokens,
            logprobs=self.sampler_of_lanes.lists(order, [len(new) for new in tokens]),
            prompt_logprobs_dict=self._prompt_logprobs([name for name in names if name not in failed]),
            work=[*work, *([] for _ in missing)],
            failed=failed | dict.fromkeys(missing, False),
        )

    def _count(self, rows: Any) -> torch.Tensor:
        """Passes and lanes [n, 2] that requests in `rows` [n] have had, which the counters then have, too."""
        requests = self.loop.state.requests
        spent = torch.stack([requests.passes[rows], requests.lane_passes[rows]], 1)
        new = torch.cat([requests.count[rows, None], spent - self.counted[rows]], 1)
        self.work.index_add_(0, self.decoder[rows], new)
        self.counted[rows] = spent
        return spent

    # ---- log-probabilities of prompts ---------------------------------------------------------------------------
    def _read_prompt(self, x: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> None:
        """x [m, D] of prompt positions [m] in engine rows [m]: reads the log-probability of the next prompt token."""
        for r in row.unique().tolist():
            with self.sampler_of_lanes.faults.of(r):
                self._read_prompt_of(r, x, row, position)

    def _read_prompt_of(self, r: int, x: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> None:
        """As `_read_prompt`, for engine row `r`."""
        name = self.sampler_of_lanes.name_of[r]
        state, wanted = self.requests[name], self.num_prompt_logprobs[name]
        prompt = torch.tensor(state.prompt_token_ids, device=x.device)
        at = (row == r) & (position < len(prompt) - 1)
        if state.in_progress_prompt_logprobs_cpu is None:
            state.in_progress_prompt_logprobs_cpu = LogprobsTensors.empty_cpu(len(prompt) - 1, wanted + 1)
        some_at = at.nonzero().squeeze(1)
        for some in some_at.split(256) if len(some_at) else ():  # logits of a long prompt take memory
            logprobs = self.loop.forward.logits(x[some]).float()
            if self.model_config.logprobs_mode not in ("raw_logits", "processed_logits"):
                logprobs = Sampler.compute_logprobs(logprobs)
            values = Sampler.gather_logprobs(logprobs, wanted, prompt[position[some] + 1])
            for whole, part in zip(state.in_progress_prompt_logprobs_cpu[:3], values[:3], strict=True):
                whole[position[some].cpu()] = part.to(whole.dtype).cpu()

    def _prompt_logprobs(self, names: list[str]) -> dict[str, LogprobsTensors | None]:
        """Log-probabilities of the requests whose prompts are through, once each."""
        found = {}
        for name in names if self.num_prompt_logprobs else ():
            if name in self.num_prompt_logprobs and name in self.flying:
                wanted = self.num_prompt_logprobs.pop(name)
                done = self.requests[name].in_progress_prompt_logprobs_cpu
                found[name] = LogprobsTensors.empty_cpu(0, wanted + 1) if done is None else done
                self.requests[name].in_progress_prompt_logprobs_cpu = None
        return found


def counts(runner: Any) -> dict[str, Any]:
    """Counts of tokens that left after n recurrences, of passes of core and coda with n lanes; by decoder,
    the tokens, passes and lanes of requests since their prompts; lanes that waves fill a pass up to."""

    def by_number(counter: Any) -> list[int]:
        return [counter[n] for n in range(max(counter, default=0) + 1)]

    done = runner.loop.counts
    found = {"exits": runner.exits, "lanes": by_number(done.passes), "codas": by_number(done.reads)}
    work = dict(zip(DECODERS, runner.work.tolist(), strict=True))
    return {**found, "decoders": work, "budget": runner.loop.eager_tick.budget}


# ---- platforms ------------------------------------------------------------------------------------------------------
class GpuLaneRunner(LaneSteps, GPUModelRunner):  # pyright: ignore[reportIncompatibleVariableOverride]
    def _attention(self, block_size: int) -> Attention:
        """The engine's own kernels, where graphs are recorded."""
        if not self._records():
            return super()._attention(block_size)
        from .triton_attention import PagedTriton  # which wants Triton

        return PagedTriton(self.parts.caches, self.parts.outer, block_size)

    def graph_bytes(self) -> int:
        """Bytes that graphs will hold, by an estimate."""
        rows, vocabulary = self.vllm_config.scheduler_config.max_num_seqs, self.model.config.vocab_size
        return reserved_bytes(rows, vocabulary) if self._records() else 0


class LaneWork(WorkerAttributes):
    """The part of a worker for lanes. Mixed into vLLM's workers of each platform."""

    runner: type[Any]

    def init_device(self) -> None:
        super().init_device()  # pyright: ignore[reportAttributeAccessIssue]
        if self.use_v2_model_runner:
            raise ValueError("the lane engine builds on vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
        if not isinstance(self.model_runner, self.runner):
            self.model_runner = self.runner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> Any:
        done = super().compile_or_warm_up_model()  # pyright: ignore[reportAttributeAccessIssue]
        runner: Any = self.model_runner
        loop, lanes = runner.loop, runner.lane_config
        # A packed matrix of vLLM's reads a tensor as it is finalized, which recurses without end while code is
        # compiled: what an engine before this one has left in cycles goes now.
        gc.collect()
        loop.warm_up()
        if loop.graph_tick:
            start = time.perf_counter()
            loop.graph_tick.record_common(((runner.depth_config.exit or {}).get("rule") or "fixed") != "fixed")
            made, seconds = loop.graph_tick.cache.captures, time.perf_counter() - start
            if made:
                print(f"loopwise: {made} CUDA graphs recorded in {seconds:.0f} s", file=sys.stderr, flush=True)
        if AUTO not in (lanes.budget, lanes.coda_wait):
            return done
        group: Any = get_tp_group()
        costs = loop.measure(group.broadcast_object)
        if lanes.budget is AUTO:
            loop.eager_tick.budget = costs.knee()
        if lanes.coda_wait is AUTO:
            loop.schedule.costs = costs
        if group.is_first_rank:
            at = ", ".join(f"{n}: {s * 1e3:.1f} + {costs.reads[n] * 1e3:.1f}" for n, s in costs.passes.items())
            budget = loop.eager_tick.budget
            waves = f"waves fill a pass up to budget={budget} lanes; " if lanes.budget is AUTO else ""
            print(f"loopwise: {waves}pass and read-out by lanes, in ms: {at}", file=sys.stderr, flush=True)
        return done

    def recurrence_counts(self) -> dict[str, Any]:
        return counts(self.model_runner)


class GpuLaneWorker(LaneWork, Worker):
    runner = GpuLaneRunner

    def _make_model_runner(self) -> GpuLaneRunner:
        return self.runner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        """Bytes for keys and values. The state of lanes and the graphs take some of them, unless the user set their
        number."""
        free, runner = super().determine_available_memory(), self.model_runner
        if self.cache_config.kv_cache_memory_bytes:
            return free
        return free - runner.state_bytes() - runner.graph_bytes()


if current_platform.is_cpu():  # these modules put what does nothing in the place of torch's streams and events
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    from .cpu_attention import PagedCPU

    class CpuLaneRunner(LaneSteps, CPUModelRunner):  # pyright: ignore[reportIncompatibleVariableOverride]
        paged = PagedCPU

    class CpuLaneWorker(LaneWork, CPUWorker):
        runner = CpuLaneRunner

    LaneWorker = CpuLaneWorker
else:
    LaneWorker = GpuLaneWorker
