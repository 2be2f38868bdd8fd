"""`loopwise.serve.Engine`: depth-wise batching without vLLM, on a transformers model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..caches import use_private_caches
from ..deprecated import SERVING, accept_old_names
from ..errors import UserError, unknown
from ..trained import beyond_trained
from .api.decoders import DECODERS, auto_width, drafts_of
from .api.depth import depth_of, exit_of
from .api.fields import FieldError
from .api.generation_config import APPLIED, fields_of, given, sampling_of, stop_ids, warning
from .api.lanes import AUTO, read_auto
from .api.limits import check_model, check_packed, check_policy, check_router
from .api.validation import check_drafts, check_frozen, check_threshold, check_width
from .checkpoint import check_tensors, load_tokenizer, read_fields
from .engine.adapters.transformers import TransformersParts
from .engine.admission import refusal, too_narrow
from .engine.attention import attention_for
from .engine.attention.reference import TorchAttention
from .engine.exits import RULES
from .engine.graphs import Record, on_cuda
from .engine.isolation import Faults
from .engine.kv import KVPolicy, policy_of
from .engine.loop import Loop, Prompt
from .engine.loop_config import LoopConfig
from .engine.request import MAX_STOPS, NEVER, Request
from .engine.sampling import Draws
from .memory import check_room, slot_bytes
from .params import NEUTRAL, PENALTIES, Completion, Params, check_kinds

BLOCK = 16  # positions in a block of the KV cache
POSITIONS = 1024  # default of max_model_len


@accept_old_names(SERVING)
class Engine:
    """Serves `model`: a directory, on the GPU if there is one, or a RecurrentDepthForCausalLM where it is.

    The model is the engine's from then on.

    max_num_seqs: requests that run at once.
    max_model_len: positions of each (default 1024, or as many as the model has).
    kv_policy, max_recurrences: KV policy, and the greatest depth of a request (default: the model's).
    passes_per_step: passes of the core in a step.
    max_lanes: most lanes of a pass beside prompts'; 0 for one for every request.
    coda_wait: passes that an exit waits at most for others to be read out with; "auto" or None: as many as the load
    makes worth while, measured now.
    max_num_batched_tokens: prompt tokens of a step.
    max_in_flight: most positions of a request in flight, which the decoders `wave` and `diffusion` need; "auto": as
    many as a wave can use.
    budget: lanes of a pass that waves may fill, 0 for no bound; "auto" or None: as many as add little time, measured
    now.
    dtype: type of weights and cache, for a directory (default: the checkpoint's).
    tokenizer: of a loaded model, for prompts and stops in words; a directory has its own.
    compile: compile passes of the core.
    cuda_graphs: on a GPU, replay passes of up to 256 lanes as CUDA graphs. The first pass of a size records its graph.
    At most 64 graphs are kept. They hold as much memory as the widest such pass needs, and a little for each.
    tell: gets, once each, a line about fields of generation_config.json that the engine ignores, and one about depths
    beyond those that the model was trained at.

    Keys and values are allocated for all of it. Raises UserError for a model that cannot be served so, and where memory
    lacks for its keys and values.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        kv_policy: str | None = None,
        max_recurrences: int | None = None,
        passes_per_step: int = 16,
        max_lanes: int = 0,
        coda_wait: int | Literal["auto"] | None = 0,
        max_num_batched_tokens: int = 512,
        max_in_flight: int | Literal["auto"] = 1,
        budget: int | Literal["auto"] | None = 0,
        dtype: str | None = None,
        compile: bool = False,
        cuda_graphs: bool = True,
        tell: Callable[[str], Any] = warnings.warn,
        tokenizer: Any = None,
    ):
        wait, lanes = read_auto(coda_wait), read_auto(budget)
        _check_least(1, max_num_seqs=max_num_seqs, max_model_len=max_model_len, max_recurrences=max_recurrences)
        _check_least(1, passes_per_step=passes_per_step, max_num_batched_tokens=max_num_batched_tokens)
        _check_least(0, max_lanes=max_lanes, coda_wait=wait, budget=lanes)
        self.tokenizer, self.tell, self.warned = tokenizer, tell, set[str]()
        self.faults = Faults()
        self.model, fields = self._load(model, dtype)
        self.config = config = self.model.config
        _check_config(config, kv_policy)
        self._defaults(fields)
        room = _positions(config, max_model_len)
        if config.router and max_recurrences not in (None, config.max_recurrences):
            raise UserError(
                f"max_recurrences={max_recurrences}: this model's router has {config.max_recurrences} recurrences"
            )
        policy = policy_of(config, kv_policy, max_recurrences)
        if reason := too_narrow(max_lanes, policy):
            raise UserError(reason)
        sizes = LoopConfig(
            max_num_seqs=max_num_seqs,
            max_model_len=room,
            num_blocks=-(-(room + 1) // BLOCK),
            max_num_batched_tokens=max(max_num_batched_tokens, room if policy.overwrites else 0),
            passes_per_step=passes_per_step,
            max_lanes=max_lanes,
            coda_wait=wait or 0,
            max_in_flight=auto_width(policy.depths, 1) if max_in_flight == "auto" else max_in_flight,
            compile=compile,
        )
        with torch.inference_mode():
            self.loop = self._make_loop(policy, sizes)
            self.draws = Draws(max_num_seqs, self.loop.state.device)
            self._prepare(cuda_graphs, wait, lanes)
        self.max_num_seqs, self.max_model_len, self.max_num_batched_tokens = max_num_seqs, room, max_num_batched_tokens

    def _load(self, model: Any, dtype: str | None) -> tuple[Any, dict[str, Any]]:
        """The model, loaded if it is a directory, and the fields of its generation_config.json.

        Sets the tokenizer of a directory. Raises UserError for files that cannot be loaded, and another kind of model.
        """
        fields: dict[str, Any] | None = None
        if isinstance(model, str | Path):
            from ..load import read_model

            read_fields(model)
            fields = fields_of(model)
            check_tensors(model)
            self.tokenizer = load_tokenizer(model)
            model = read_model(model, dtype=dtype or "auto").to("cuda" if torch.cuda.is_available() else "cpu")
        model = model.eval()
        if model.config.model_type != "recurrent_depth":
            raise UserError(f"model_type {model.config.model_type!r}: convert the model first (loopwise convert)")
        return model, given(model.generation_config.to_diff_dict()) if fields is None else fields

    def _make_loop(self, policy: KVPolicy, sizes: LoopConfig) -> Loop:
        """The loop around the model, with its keys and values. Raises UserError where memory lacks for these."""
        if sizes.compile:
            use_private_caches()
        config, like = self.config, self.model.get_input_embeddings().weight
        room, rows, blocks = sizes.max_model_len, sizes.max_num_seqs, sizes.num_blocks
        parts = TransformersParts(self.model, room + 1, policy.depths)
        weakref.finalize(self, parts.release)
        outer, shapes = len(config.prelude) + len(config.coda), parts.shapes()
        each = slot_bytes(shapes, outer, policy.slots, like.dtype.itemsize)
        check_room(each, policy, rows, room, like.device)
        parts.attention = attention = attention_for(like.device)(
            shapes, outer, policy.slots, rows * blocks, BLOCK, like.detach()
        )
        loop = Loop(
            parts,
            attention,
            policy,
            self._sample,
            sizes,
            dtype=like.dtype,
            device=like.device,
            reader=self._read_prompt,
        )
        table = torch.arange(rows * blocks, dtype=torch.int32, device=like.device)
        loop.set_block_tables(torch.arange(rows, device=like.device), slice(blocks), table.view(rows, blocks))
        return loop

    def _prepare(self, cuda_graphs: bool, wait: int | None, lanes: int | None) -> None:
        """Compile and record what steps run, and measure it where coda_wait or the budget of `lanes` is AUTO."""
        loop, device = self.loop, self.loop.state.device
        waits = isinstance(loop.forward.attention, TorchAttention)  # for the device, as no graph can
        if cuda_graphs and device.type == "cuda" and not waits:
            self._record(on_cuda(device))
        if loop.config.compile:
            loop.warm_up()
        costs = loop.measure() if AUTO in (wait, lanes) else None
        loop.schedule.costs = costs if wait is AUTO else None
        loop.eager_tick.budget = costs.knee() if costs and lanes is AUTO else lanes or 0

    def _defaults(self, fields: dict[str, Any]) -> None:
        """Set `defaults` of Params and the `stops` of every text by the fields of generation_config.json."""
        self.defaults = sampling_of(fields)
        self.stops = stop_ids(fields)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:  # as vLLM does
            self.stops.add(self.tokenizer.eos_token_id)
        self.stops = self.stops or stop_ids({"eos_token_id": self.config.eos_token_id})
        self._warn(warning(fields, APPLIED))

    def _warn(self, line: str | None) -> None:
        if line and line not in self.warned:
            self.warned.add(line)
            self.tell(line)

    def _record(self, record: Record) -> None:
        """Run from graphs made by `record`, as far as requests fit them."""
        self.loop.use_graphs(record)

    def request(self, params: Params) -> Request:
        """`params` in the engine's words. Raises UserError for values out of range."""
        config, policy = self.config, self.loop.state.policy
        if isinstance(params, Params):
            params = params.filled(self.defaults)
        check_kinds(params)
        if params.stop and self.tokenizer is None:
            raise UserError("stop: texts to stop at need the model's tokenizer; give stop_token_ids")
        depths = {"num_recurrences": params.num_recurrences, "min_recurrences": params.min_recurrences}
        if params.max_in_flight != "auto":
            _check_least(1, max_in_flight=params.max_in_flight)
        _check_least(1, **depths)
        _check_least(0, max_tokens=params.max_tokens)
        if params.decoder not in DECODERS:
            raise unknown("decoder", params.decoder, DECODERS)
        limit = params.num_recurrences or config.num_recurrences
        if not 1 <= limit <= policy.depths:
            more = "" if config.router or limit < 1 else f"; max_recurrences={limit} makes room for more"
            raise UserError(f"num_recurrences={limit}: this engine runs 1 to {policy.depths}{more}")
        try:
            rule = exit_of(vars(params), limit, config.exit).rule
            if rule not in RULES:
                raise unknown("exit_rule", rule, RULES)
            if rule == "gate" and not config.exit_gate:
                raise UserError("exit_rule='gate': this model has no exit gate")
            if params.decoder == "diffusion":
                check_frozen({name: value for name, value in vars(params).items() if value not in (None, ())})
            check_width(params.max_in_flight, params.decoder)
            check_drafts(vars(params), params.decoder, policy.depths)
            if params.exit_threshold is not None:
                check_threshold(params.exit_threshold, rule)
            depth = depth_of(vars(params), config.num_recurrences, config.exit)
        except FieldError as error:
            raise UserError(str(error)) from None
        if any(not 0 <= depth <= limit for depth in params.trace):
            raise UserError(f"trace: depths are 1 to num_recurrences={limit}, or 0 where the rule decides")
        if params.prompt_exit and policy.complete:
            raise UserError("prompt_exit saves nothing with kv_policy='per-depth', which needs every depth")
        self._warn(beyond_trained(config.trained_recurrences, [limit]))
        self._check_tokens(params.stop_token_ids, "in stop_token_ids")
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else self.stops)
        if len(stops) > MAX_STOPS:
            raise UserError(f"stop_token_ids: {len(stops)} tokens that stop, with the model's own; at most {MAX_STOPS}")
        request = Request(
            **vars(depth),
            max_tokens=params.max_tokens,
            stops=tuple(sorted(stops)),
            **self._decoder(params, limit),
            logprobs=params.logprobs,
            penalised=any(getattr(params, name) != NEUTRAL[name] for name in PENALTIES),
        )
        if reason := refusal(request, policy, config, self.loop.config.max_in_flight):
            raise UserError(reason)
        return request

    def _decoder(self, params: Params, limit: int) -> dict[str, Any]:
        """Fields of a Request of `limit` recurrences for the decoder of `params`. Raises UserError."""
        most = params.max_in_flight
        if params.decoder == "diffusion":
            return {"diffusion": replace(params.diffusion, max_in_flight=most)}
        if params.decoder == "plain":
            return {}
        every, depths = drafts_of(vars(params), 1, ())
        if most == "auto":
            most = min(self.loop.config.max_in_flight, auto_width(limit, every, depths))
        return {"max_in_flight": most, "draft_every": every, "draft_depths": depths}

    @torch.inference_mode()
    def generate(self, prompts: list[Any], params: Params | list[Params] | None = None) -> list[Completion]:
        """Continue `prompts` (texts or lists of token ids), each by its own or the same `params`.

        An exception in the work for one prompt ends that prompt alone (`Completion.error`). Raises UserError for
        prompts that are empty or too long, and for params out of range, before any work.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts={prompts!r}: a list of texts, or of lists of token ids")
        each = params if isinstance(params, list) else [params or Params()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} params for {len(prompts)} prompts")
        ids = [self._ids(prompt) for prompt in prompts]
        requests = [self.request(p) for p in each]
        each = [p.filled(self.defaults) for p in each]
        for tokens in ids:
            self._check_tokens(tokens, "in a prompt")
            if not 1 <= len(tokens) <= self.max_model_len:
                raise UserError(f"a prompt of {len(tokens)} tokens: this engine takes 1 to {self.max_model_len}")
        done = [Completion() for _ in prompts]
        running: dict[int, list[int]] = {}  # row -> [request, prompt tokens brought in]
        self.faults.clear()
        try:
            self._run(running, ids, each, requests, done)
        finally:
            for row in running:  # rows of requests that were broken off
                self.loop.release(row)
        if self.tokenizer is not None:
            for completion, p in zip(done, each, strict=True):
                try:
                    completion.text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
                except Exception as error:
                    completion.fail(error)
                for text in p.stop:
                    completion.text = completion.text.partition(text)[0]
        return done

    def _check_tokens(self, tokens: Any, where: str) -> None:
        """Raises UserError for the first of `tokens` that the model has no embedding for."""
        count = self.config.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < count]:
            raise UserError(
                f"token id {wrong[0]} {where}: the model has 0 to {count - 1}, a vocabulary of {count} tokens"
            )

    def _run(
        self,
        running: dict[int, list[int]],
        ids: list[list[int]],
        each: list[Params],
        requests: list[Request],
        done: list[Completion],
    ) -> None:
        queue = [n for n in range(len(ids)) if each[n].max_tokens][::-1]
        free = list(range(self.max_num_seqs))[::-1]
        while queue or running:
            while queue and free:
                row, number = free.pop(), queue.pop()
                running[row] = [number, 0]
                with self.faults.of(row):
                    self._admit(row, ids[number], each[number], requests[number])
                free += self._end_failed(running, done)
            if not running:
                continue
            self.loop.eager = bool(queue)
            self._step(running, ids, done, each)
            remaining = self.loop.state.requests.remaining.tolist()
            for row in [row for row, (number, at) in running.items() if at == len(ids[number])]:
                number, _ = running[row]
                completion, stopped = done[number], False
                with self.faults.of(row):
                    stopped = self._cut(completion, each[number].stop)
                if row not in self.faults and (stopped or remaining[row] == 0):
                    if stopped or (completion.tokens and completion.tokens[-1] in requests[number].stops):
                        completion.finish_reason = "stop"
                    completion.passes = int(self.loop.state.requests.passes[row])
                    completion.items = int(self.loop.state.requests.lane_passes[row])
                    self.loop.release(row)
                    free.append(row)
                    del running[row]
            free += self._end_failed(running, done)

    def _admit(self, row: int, prompt: list[int], params: Params, request: Request) -> None:
        """Give `row` to a request, for sampling and in the loop."""
        p = params
        sampling = self.draws.admit(row, p.temperature, max(p.top_k, 0), p.top_p, p.min_p, p.seed, p.choice)
        if request.penalised:
            self.draws.penalise(row, prompt, self.max_model_len, *(getattr(p, name) for name in PENALTIES))
        self.loop.admit(row, replace(request, sampling=sampling))

    def _end_failed(self, running: dict[int, list[int]], done: list[Completion]) -> list[int]:
        """End the requests that have a fault. Returns their rows."""
        rows = sorted(self.faults.keys() & running.keys())
        for row in rows:
            done[running.pop(row)[0]].fail(self.faults[row])
            self.loop.release(row)
        self.faults.clear()
        return rows

    def _cut(self, completion: Completion, stop: tuple[str, ...]) -> bool:
        """True if one of the texts `stop` is in `completion`, which then ends with the token that completes it."""

        def has_stop(count: int) -> bool:
            text = self.tokenizer.decode(completion.tokens[:count])  # pyright: ignore[reportOptionalMemberAccess]
            return any(one in text for one in stop)

        count = len(completion.tokens)
        if not stop or not has_stop(count):
            return False
        end = next(n for n in range(1, count + 1) if has_stop(n))
        del completion.tokens[end:], completion.depths[end:], completion.logprobs[end:]
        return True

    def _step(
        self, running: dict[int, list[int]], ids: list[list[int]], done: list[Completion], each: list[Params]
    ) -> None:
        """Bring prompts in as far as there are lanes, run a step, and collect what came of it."""
        loop, room = self.loop, self.max_num_batched_tokens
        prompts = []
        live = []
        for row in sorted(running):
            number, at = running[row]
            left = len(ids[number]) - at
            if left:
                take = min(left, room)
                if loop.state.policy.overwrites and take < left:  # prompts cannot be cut
                    take = left if not prompts else 0
                if not take:
                    continue
                tokens = torch.tensor(ids[number][at : at + take])
                prompts.append(Prompt(row, tokens, at, take == left))
                running[row][1] = at + take
                room -= take
            live.append(row)
        if prompts:
            loop.prompt(prompts)
        rows = torch.tensor(live, device=loop.state.device)
        loop.step(rows)
        for row, tokens, depths in zip(live, *loop.outputs(rows), strict=True):
            if row in self.faults:  # a token of this step is not its own
                continue
            number = running[row][0]
            completion = done[number]
            completion.tokens += tokens
            completion.depths += depths
            if tokens and (top := each[number].logprobs) is not None:
                completion.logprobs += loop.context.logprobs.of_row(row, len(tokens), top)

    def _sample(
        self, logits: torch.Tensor, best: torch.Tensor, row: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        draws = partial(self.draws, in_use=self.loop.work.in_use)
        return self.faults.sample(draws, logits, best, row, position)

    def _read_prompt(self, x: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> None:
        """Take the head's input [m, D] at prompt positions, of requests that want it: those of subclasses."""

    def _ids(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            try:
                return [int(token) for token in prompt]
            except (TypeError, ValueError):
                raise UserError(f"a prompt {prompt!r:.60}: a text, or a list of token ids") from None
        if self.tokenizer is None:
            raise UserError(
                "a prompt in words needs the model's tokenizer: give a directory that has one, or token ids"
            )
        return self.tokenizer(prompt)["input_ids"]


def _check_config(config: Any, kv_policy: str | None) -> None:
    """Raises UserError for a model of this `config` that cannot be served, or not with this KV policy."""
    check_model(vars(config), routed=True)
    if config.router:
        check_router(config.router, kv_policy)
        check_packed(config.router, config.source_config)
    if kv_policy is not None:
        check_policy(kv_policy)


def _positions(config: Any, max_model_len: int | None) -> int:
    """Positions of a request, by default as many as fit in POSITIONS. Raises UserError for more than the model has."""
    limit = getattr(config, "max_position_embeddings", None)
    room = min(max_model_len or POSITIONS, limit or NEVER)
    if max_model_len and room < max_model_len:
        raise UserError(f"max_model_len={max_model_len}: this model has {limit} positions")
    return room


def _check_least(least: int, **values: int | None) -> None:
    """Raises UserError where one of `values` that is not None is no integer, or below `least`."""
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < least):
            raise UserError(f"{name}={value!r}: an integer of {least} or more")
