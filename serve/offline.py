"""`loopwise.serve.Engine`: depth-wise batching without vLLM, on a transformers model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, unknown
from ..model.configuration_recurrent_depth import KV_POLICIES
from .checkpoint import check_tensors, load_tokenizer, read_fields
from .engine.admission import refusal, too_narrow
from .engine.attention import TorchAttention, attention_for
from .engine.costs import measure
from .engine.diffusion import NEVER, Diffusion
from .engine.exits import RULES
from .engine.graphs import Graphs, Record, on_cuda
from .engine.kv import KVPolicy, policy_of
from .engine.lanes import MAX_STOPS, Request
from .engine.loop import Counts, Loop, Prompt
from .engine.masked import Masked
from .engine.sampling import Draws
from .engine.transformers import TransformersParts
from .vllm.decoders import DECODERS
from .vllm.fields import FieldError, check_frozen, check_threshold
from .vllm.lanes import MEASURED
from .vllm.limits import check_model, check_packed, check_router

BLOCK = 16  # positions in a block of the KV cache
POSITIONS = 1024  # of a request, unless told otherwise


@dataclass(frozen=True)
class Params:
    """How one prompt is to be continued.

    Depth: `num_recurrences` R (default the model's), `exit_rule` with `exit_threshold` (default the rule's own) from
    `min_recurrences` on; `prompt_exit` for prompt positions, too; `trace` forces the depths of positions 0, 1, ...
    Sampling: `temperature` 0 is greedy; the same `seed` gives the same tokens whatever else runs. `decoder="wave"` has
    up to `wave` positions in flight, for the same tokens; "diffusion" refines them together, as `diffusion` says.
    """

    max_tokens: int = 64
    num_recurrences: int | None = None
    min_recurrences: int | None = None
    exit_rule: str | None = None
    exit_threshold: float | None = None
    prompt_exit: bool = False
    trace: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    decoder: str = "plain"
    wave: int = 8
    diffusion: Diffusion = field(default_factory=Diffusion)


@dataclass
class Completion:
    """`tokens` generated, their `text`, and the recurrences (`depths`) of the position that gave each; whether a token
    that stops was the last ("stop"), or there was no room for more ("length")."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    passes: int = 0  # of the core, one after the other, since the prompt
    items: int = 0  # lanes in these passes; what is above the sum of the depths was in vain


class Engine:
    """Serves `model`, a directory or a RecurrentDepthForCausalLM, which is the engine's from then on.

    `rows` requests run at once, each of at most `length` positions (default 1024, or as many as the model has);
    `kv_policy` and `max_recurrences` default to the model's. A pass of the core has at most `width` lanes beside
    prompts', 0: one for every row; an exit waits at most `coda_wait` ticks for others that are read out with it, -1: as
    many as the load makes worth while, measured now. `wave`: most positions of a request in flight, which the decoders
    `wave` and `diffusion` need.
    `cuda_graphs`: on a GPU, passes of the core of up to 256 lanes are replayed as CUDA graphs, which the host
    starts at once; the first pass of a size records it, and they hold as much memory as the widest such pass needs, and
    a little for each size. Raises UserError for a model that cannot be served so.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 16,
        length: int | None = None,
        kv_policy: str | None = None,
        max_recurrences: int | None = None,
        ticks: int = 16,
        width: int = 0,
        coda_wait: int = 0,
        prompt_lanes: int = 512,
        wave: int = 1,
        dtype: str | None = None,
        compile: bool = False,
        cuda_graphs: bool = True,
    ):
        _check_least(
            1, rows=rows, length=length, max_recurrences=max_recurrences, ticks=ticks, prompt_lanes=prompt_lanes
        )
        _check_least(0, width=width)
        _check_least(MEASURED, coda_wait=coda_wait)
        self.tokenizer = None
        if isinstance(model, str | Path):
            from transformers import AutoModelForCausalLM

            read_fields(model)
            check_tensors(model)
            self.tokenizer = load_tokenizer(model)
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype or "auto")
        self.model = model.eval()
        self.config = config = model.config
        if config.model_type != "recurrent_depth":
            raise UserError(f"model_type {config.model_type!r}: convert the model first (loopwise convert)")
        check_model(vars(config), routed=True)
        if config.router:
            check_router(config.router, kv_policy)
            check_packed(config.router, config.source_config)
        if kv_policy is not None:
            self._check_policy(kv_policy)
        limit = getattr(config, "max_position_embeddings", None)
        room = min(length or POSITIONS, limit or NEVER)
        if length and room < length:
            raise UserError(f"length={length}: this model has {limit} positions")
        policy = policy_of(config, kv_policy, max_recurrences)
        if reason := too_narrow(width, policy):
            raise UserError(reason)
        like = model.get_input_embeddings().weight
        with torch.inference_mode():
            parts = TransformersParts(model, room + 1)
            blocks = -(-(room + 1) // BLOCK)
            outer = len(config.prelude) + len(config.coda)
            parts.attention = attention = attention_for(like.device)(
                parts.shapes(), outer, policy.slots, rows * blocks, BLOCK, like.detach()
            )
            self.loop = Loop(
                parts,
                attention,
                policy,
                self._sample,
                rows=rows,
                length=room,
                blocks=blocks,
                prompt_lanes=max(prompt_lanes, room if policy.overwrites else 0),
                ticks=ticks,
                like=like.detach(),
                width=width,
                coda_wait=max(coda_wait, 0),
                wave=wave,
                compile=compile,
            )
            table = torch.arange(rows * blocks, dtype=torch.int32, device=like.device)
            self.loop.requests.table[:rows] = table.view(rows, blocks)
            self.draws = Draws(rows, like.device)
            if compile:
                self.loop.warm_up()
            if cuda_graphs and like.is_cuda and not isinstance(attention, TorchAttention):  # which waits for the device
                self._record(on_cuda(like.device), compile)
            if coda_wait == MEASURED:
                self.loop.costs = measure(self.loop)
                self.loop.counts = Counts()
        self.length, self.rows, self.prompt_lanes = room, rows, prompt_lanes

    def _record(self, record: Record, compile: bool = False) -> None:
        """Let the loop run from graphs."""
        self.loop.graphs = Graphs(self.loop, record)
        self.loop.masked = Masked(self.loop, record, compile=compile)
        if compile:
            self.loop.masked.warm_up()

    @staticmethod
    def _check_policy(name: str) -> None:
        try:
            ok = KVPolicy(name, 1).slots > 0 and name != "routed"
        except ValueError:
            ok = False
        if not ok:
            raise UserError(f"kv_policy={name!r}: choose from {', '.join(KV_POLICIES)}")

    def request(self, params: Params) -> Request:
        """`params` in the engine's words. Raises UserError for values out of range."""
        config, policy = self.config, self.loop.policy
        _check_kinds(params)
        depths = {"num_recurrences": params.num_recurrences, "min_recurrences": params.min_recurrences}
        _check_least(1, **depths, wave=params.wave)
        _check_least(0, max_tokens=params.max_tokens, top_k=params.top_k)
        if not params.temperature >= 0 or not 0 < params.top_p <= 1 or not 0 <= params.min_p <= 1:
            raise UserError(
                f"temperature={params.temperature}, top_p={params.top_p}, min_p={params.min_p}: temperature is 0 or "
                "more, top_p above 0 and up to 1, min_p from 0 to 1"
            )
        if params.decoder not in DECODERS:
            raise unknown("decoder", params.decoder, DECODERS)
        limit = params.num_recurrences or config.num_recurrences
        if not 1 <= limit <= policy.depths:
            raise UserError(f"num_recurrences={limit}: this engine runs 1 to {policy.depths}")
        default = config.exit or {}
        rule = params.exit_rule or default.get("rule", "fixed")
        if rule not in RULES:
            raise unknown("exit_rule", rule, RULES)
        if rule == "gate" and not config.exit_gate:
            raise UserError("exit_rule='gate': this model has no exit gate")
        threshold = params.exit_threshold
        try:
            if params.decoder == "diffusion":
                check_frozen({name: value for name, value in vars(params).items() if value not in (None, ())})
            if threshold is not None:
                check_threshold(threshold, rule)
        except FieldError as error:
            raise UserError(str(error)) from None
        if threshold is None:
            threshold = default.get("threshold") if rule == default.get("rule") else None
        least = params.min_recurrences or default.get("min_recurrences", 1)
        if not 1 <= least <= limit:
            raise UserError(f"min_recurrences={least}: from 1 to num_recurrences={limit}")
        if any(not 0 <= depth <= limit for depth in params.trace):
            raise UserError(f"trace: depths are 1 to num_recurrences={limit}, or 0 where the rule decides")
        if params.prompt_exit and policy.complete:
            raise UserError("prompt_exit saves nothing with kv_policy='per-depth', which needs every depth")
        stops = set(params.stop_token_ids)
        if not params.ignore_eos and config.eos_token_id is not None:
            stops |= set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
        if len(stops) > MAX_STOPS:
            raise UserError(f"stop_token_ids: {len(stops)} tokens that stop, with the model's own; at most {MAX_STOPS}")
        request = Request(
            limit=limit,
            minimum=least,
            rule=rule,
            threshold=RULES[rule].threshold if threshold is None else float(threshold),
            prompt_exit=params.prompt_exit,
            trace=list(params.trace),
            remaining=params.max_tokens,
            stops=tuple(sorted(stops)),
            wave=params.wave if params.decoder == "wave" else 1,
            diffusion=replace(params.diffusion, wave=params.wave) if params.decoder == "diffusion" else None,
        )
        if reason := refusal(self.loop, request):
            raise UserError(reason)
        return request

    @torch.inference_mode()
    def generate(self, prompts: list[Any], params: Params | list[Params] | None = None) -> list[Completion]:
        """Continue `prompts` (texts or lists of token ids), each by its own or the same `params`.

        Raises UserError for prompts that are empty or too long, and for params out of range, before any work.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts={prompts!r}: a list of texts, or of lists of token ids")
        each = params if isinstance(params, list) else [params or Params()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} params for {len(prompts)} prompts")
        ids = [self._ids(prompt) for prompt in prompts]
        requests = [self.request(p) for p in each]
        for tokens in ids:
            if wrong := [token for token in tokens if not 0 <= token < self.config.vocab_size]:
                raise UserError(f"token id {wrong[0]} in a prompt: the model has 0 to {self.config.vocab_size - 1}")
            if not 1 <= len(tokens) <= self.length:
                raise UserError(f"a prompt of {len(tokens)} tokens: this engine takes 1 to {self.length}")
        done = [Completion() for _ in prompts]
        running: dict[int, list[int]] = {}  # row -> [request, prompt tokens brought in]
        try:
            self._run(running, ids, each, requests, done)
        finally:
            for row in running:  # of what was broken off
                self.loop.release(row)
        if self.tokenizer is not None:
            for completion in done:
                completion.text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        return done

    def _run(
        self,
        running: dict[int, list[int]],
        ids: list[list[int]],
        each: list[Params],
        requests: list[Request],
        done: list[Completion],
    ) -> None:
        queue = [n for n in range(len(ids)) if each[n].max_tokens][::-1]
        free = list(range(self.rows))[::-1]
        while queue or running:
            while queue and free:
                row, number = free.pop(), queue.pop()
                p = each[number]
                sampling = self.draws.admit(row, p.temperature, p.top_k, p.top_p, p.min_p, p.seed, p.choice)
                self.loop.admit(row, replace(requests[number], sampling=sampling))
                running[row] = [number, 0]
            self.loop.eager = bool(queue)
            self._step(running, ids, done)
            remaining = self.loop.requests.remaining.tolist()
            for row in [row for row, (number, at) in running.items() if at == len(ids[number])]:
                if remaining[row] == 0:
                    number, _ = running[row]
                    completion = done[number]
                    if completion.tokens and completion.tokens[-1] in requests[number].stops:
                        completion.finish_reason = "stop"
                    completion.passes = int(self.loop.requests.ticks[row])
                    completion.items = int(self.loop.requests.items[row])
                    self.loop.release(row)
                    free.append(row)
                    del running[row]

    def _step(self, running: dict[int, list[int]], ids: list[list[int]], done: list[Completion]) -> None:
        """Bring prompts in as far as there are lanes, run a step, and collect what came of it."""
        loop, room = self.loop, self.prompt_lanes
        prompts = []
        live = []
        for row in sorted(running):
            number, at = running[row]
            left = len(ids[number]) - at
            if left:
                take = min(left, room)
                if loop.policy.overwrites and take < left:  # prompts cannot be cut
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
        loop.step(torch.tensor(live, device=loop.device))
        requests = loop.requests
        counts = requests.count.tolist()
        most = max(counts[row] for row in live)
        tokens, depths = (part[:, :most].tolist() for part in (requests.tokens, requests.depths))
        for row in live:
            completion, count = done[running[row][0]], counts[row]
            completion.tokens += tokens[row][:count]
            completion.depths += depths[row][:count]

    def _sample(
        self, logits: torch.Tensor, best: torch.Tensor, row: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        return self.draws(logits, best, row, position, self.loop.in_use)

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


def _check_kinds(params: Params) -> None:
    """Raises UserError where a field that is compared with numbers is of another kind."""
    if not isinstance(params, Params):
        raise UserError(f"params: {params!r:.60} is no Params")
    for name in ("temperature", "top_p", "min_p"):
        if type(value := getattr(params, name)) not in (int, float):
            raise UserError(f"{name}={value!r}: a number")
    for name in ("seed", "choice"):
        if type(value := getattr(params, name)) is not int:
            raise UserError(f"{name}={value!r}: an integer")
    for name in ("trace", "stop_token_ids"):
        for value in getattr(params, name):
            if type(value) is not int:
                raise UserError(f"{name}: {value!r} in it is no integer")


def _check_least(least: int, **values: int | None) -> None:
    """Raises UserError where one of `values` that is not None is no integer, or below `least`."""
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < least):
            raise UserError(f"{name}={value!r}: an integer of {least} or more")
