"""One recurrent-depth model for every source architecture.

    e   = prelude(embed(tokens))
    s_0 = initial_state(e)
    s_r = core_r(inject(s_{r-1}, e))        r = 1 .. R; relaxation makes core_r differ from core, and a router leaves
                                            tokens out
    logits = head(norm(coda(s_R)))

The layers, embeddings, rotary tables, norms and head are the source architecture's own transformers modules.
Shapes: B batch, T tokens of this call, D width, R recurrences, V vocabulary.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.generic import can_return_tuple

from .configuration_recurrent_depth import RecurrentDepthConfig
from .halting import halting_weights
from .initial_state import initial_state
from .injection import Injection
from .modeling_sandwich import SandwichForCausalLM  # noqa: F401  registers it
from .recurrence_encoding import RecurrenceEncoding
from .relaxation import Factors, Relaxation
from .routed_rows import ChoiceSlot, FirstKeysAndValues, Rows, by_name
from .router import Router, RouterOutputs, Routing, capacities
from .source_layers import TUPLE_LAYERS, DepthCache, Overwriting, Tap, layer_list_name, prepare_cache, with_slot


@dataclass
class RecurrentDepthOutput(CausalLMOutputWithPast):
    """`state` [B, T, D] is s_R. On request: `states` [R, B, T, D] is s_1 .. s_R, and `exit_logits` [R, B, T] the exit
    gate's at each; `depth_logits` [R, B, T, V] are the logits read out after each recurrence; `depth_losses` is what
    `depth_loss` made of them; `hidden_states` are the inputs of every layer that ran, then the normed end.
    `router_outputs` tell what a router scored and chose. With halting, `ponder` [B, T] is each token's ponder cost, and
    `state` the mean that is read out."""

    last_state: torch.Tensor | None = None
    states: torch.Tensor | None = None
    depth_logits: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    depth_losses: tuple[torch.Tensor, ...] | None = None
    router_outputs: RouterOutputs | None = None
    ponder: torch.Tensor | None = None

    @property
    def state(self) -> torch.Tensor | None:
        """s_R. No field of its own: `generate` takes one of this name for a cache."""
        return self.last_state


OPTIONS = (
    "num_recurrences", "grad_recurrences", "initial_state", "sequence_ids", "output_states", "output_depth_logits",
    "depth_loss", "depth_loss_at", "router_capacity",
)  # fmt: skip


class _Place(NamedTuple):
    """One run of a layer: which source layer's arguments and which key-value slot it gets."""

    layer: nn.Module
    source_layer: int
    slot: int
    depth: int | None = None  # of a core layer, counted from 0


@dataclass
class _Call:
    """What one forward call asks of the recurrence, and what it leaves behind."""

    num_recurrences: int
    grad_recurrences: int | None
    given_state: torch.Tensor | None
    past: int
    positions: torch.Tensor
    sequence_ids: torch.Tensor | None
    cache: Cache | None
    keep_states: bool
    read_all_depths: bool
    keep_hidden: bool
    read: torch.Tensor | None = None  # the state to read out, where nothing else shall run
    real: torch.Tensor | None = None  # [B, T], where a router: the tokens that are no padding
    capacity: Sequence[float] | None = None
    first_kv: dict[int, Any] = field(default_factory=dict)  # what the first recurrence wrote, where others read it
    routing: Routing | None = None
    state: torch.Tensor | None = None  # the one that is read out
    ponder: torch.Tensor | None = None
    layer_arguments: dict[int, tuple[tuple, dict]] = field(default_factory=dict)
    states: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)


class RecurrentDepthForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RecurrentDepthConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__(config)
        source_config = config.source_config
        source_config._attn_implementation = config._attn_implementation
        self.source = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(source_config)])(source_config)
        name = layer_list_name(self.source, source_config.num_hidden_layers)
        layers = list(self.source.get_submodule(name))
        as_tuple = source_config.model_type in TUPLE_LAYERS
        self.source.set_submodule(name, nn.ModuleList(Tap(i, self._visit, as_tuple) for i in range(len(layers))))
        taken: set[int] = set()

        def take(index: int) -> nn.Module:  # a layer that stands at two places has two sets of weights
            layer = copy.deepcopy(layers[index]) if index in taken else layers[index]
            taken.add(index)
            return layer

        self.prelude = nn.ModuleList(take(i) for i in config.prelude)
        self.core = nn.ModuleList(take(i) for i in config.core)
        self.coda = nn.ModuleList(take(i) for i in config.coda)
        self.injection = Injection(config.injection, source_config.hidden_size)
        if config.recurrence_norm == "each":
            self.recurrence_norm = nn.RMSNorm(source_config.hidden_size, config.norm_eps)
        if config.recurrence_encoding == "sinusoidal":
            self.recurrence_encoding = RecurrenceEncoding(source_config.hidden_size)
        if config.halting == "act":
            self.halting_gate = nn.Linear(source_config.hidden_size, 1)
        if config.exit_gate:
            self.exit_gate = nn.Linear(source_config.hidden_size, 1)
        if config.relaxation:
            self.relaxation = nn.ModuleList(Relaxation(layer, **config.relaxation) for layer in self.core)
        if config.router:
            self.router = Router(source_config.hidden_size, config.router)
        self._no_split_modules = self.source._no_split_modules
        self._call: _Call | None = None
        self.checkpoint_recurrences = False  # whether training recomputes each recurrence in the backward pass
        self.post_init()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs):
        source = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config.source_config)]  # it decides
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
            setattr(self, name, getattr(source, name))
        if self.config.router:  # it writes out masks, as these two do not take them
            self._supports_flash_attn = self._supports_flex_attn = False
        if attn_implementation is None and getattr(self.config, "attn_logit_softcapping", None):
            attn_implementation = "eager"  # transformers' sdpa leaves the cap out
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Injection):
            if module.kind == "linear":
                init.copy_(module.weight, Injection.preserving_weight(module.weight.shape[0], self.config.state_init))
            elif module.kind == "gated":
                init.zeros_(module.weight)
                init.zeros_(module.bias)
        elif isinstance(module, Factors):
            module.start()
        elif isinstance(module, RecurrenceEncoding):
            init.zeros_(module.weight)
        elif self.config.halting == "act" and module is self.halting_gate:
            init.zeros_(cast(Any, module).weight)
            init.zeros_(cast(Any, module).bias)
        elif isinstance(module, Router):
            module.start(self.config.initializer_std)
        elif self.config.recurrence_norm == "each" and module is self.recurrence_norm:
            init.ones_(cast(Any, module).weight)
        else:
            self.source._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.source.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.source.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.source.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.source.set_output_embeddings(new_embeddings)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Nothing ahead of `forward`: it needs to know which tokens are padding, and the source makes the masks."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_recurrences: int | None = None,
        grad_recurrences: int | None = None,
        initial_state: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        output_states: bool = False,
        output_depth_logits: bool = False,
        output_hidden_states: bool | None = None,
        depth_loss: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        depth_loss_at: Sequence[int] = (),
        router_capacity: Sequence[float] | None = None,
        **kwargs,
    ) -> RecurrentDepthOutput:
        r"""
        num_recurrences (`int`, *optional*): R, at least 1; default `config.num_recurrences`.
        grad_recurrences (`int`, *optional*): the last this many recurrences carry gradient, the earlier ones run
            without (truncated backpropagation, arXiv 2502.05171 section 3.3); default all.
        initial_state (`torch.FloatTensor` [B, S, D], *optional*): s_0 for the first S positions of the sequences,
            padding counted; positions beyond S start as `config.state_init` says.
        sequence_ids (`torch.LongTensor` [B], *optional*): tells sequences apart for `state_init="normal"`; default 0.
        output_states, output_depth_logits (`bool`): return `states` (and `exit_logits`), `depth_logits`. The latter
            runs the coda at every depth and so needs `use_cache=False`.
        depth_loss (`Callable`, *optional*), depth_loss_at (`Sequence[int]`): `depth_losses` becomes `depth_loss(r,
            logits [B, T, V])` for every r of these depths, at most R. R is read out first; the logits of the others are
            made one depth after the other, and again in the backward pass, so that they are never held together. With
            an exit gate, `exit_logits` is returned too. Needs `use_cache=False`.
        router_capacity (`Sequence[float]`, *optional*): expert-choice takes these shares of the sequence, one for each
            recurrence: to warm them up from 1 in training. Default: those of the config, in training and with
            `inference="topk"`; else thresholds decide.

        Raises ValueError for R < 1, for a cache prefilled at a smaller depth, for attentions (not collected).
        """
        config = self.config
        recurrences = config.num_recurrences if num_recurrences is None else num_recurrences
        for name, value in (("num_recurrences", recurrences), ("grad_recurrences", grad_recurrences)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: an integer, at least 1")
        for name in kwargs:  # what is no option of ours goes to the source, which ignores what it does not know
            if near := difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8):
                raise TypeError(f"forward() has no argument {name!r}: did you mean {near[0]!r}?")
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions is not supported: a layer attends once for every recurrence")
        read_depths = output_depth_logits or depth_loss is not None
        if config.sharing == "sequence" and (grad_recurrences or output_states or output_depth_logits):
            raise ValueError(
                "sharing='sequence' runs no recurrence of the whole core: it has no states or logits of each, and no "
                "grad_recurrences"
            )
        if read_depths and (use_cache or past_key_values is not None):
            name = "output_depth_logits" if output_depth_logits else "depth_loss"
            raise ValueError(f"{name} reads the coda at every depth, which no cache holds: use_cache=False")
        if any(not 1 <= depth <= recurrences for depth in depth_loss_at):
            raise ValueError(f"depth_loss_at={list(depth_loss_at)}: depths are 1 to num_recurrences={recurrences}")
        if config.sharing == "sequence" and any(depth != recurrences for depth in depth_loss_at):
            raise ValueError("sharing='sequence' has no depth but the last to read out")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        reuses = (config.router and not config.has_choice_slot) or config.kv_policy == "first"
        if reuses and self.training and (self.is_gradient_checkpointing or self.checkpoint_recurrences):
            raise ValueError(
                "gradient checkpointing runs a recurrence a second time without what it read of the first: "
                "router.kv='first-recursion', or kv_policy='first', does not go with it"
            )
        capacity = capacities(config.router, recurrences, router_capacity, self.training) if config.router else None
        if use_cache is None:
            in_config = getattr(config, "use_cache", True) and not self.training and not read_depths
            use_cache = past_key_values is not None or (in_config and capacity is None)
        if capacity is not None and (use_cache or past_key_values is not None):
            raise ValueError(
                "this router takes the best of the whole sequence (router.inference='topk'), so that a new token can "
                "change what earlier ones did, which a cache cannot: use_cache=False, or calibrate it to thresholds"
            )
        if (use_cache or reuses) and past_key_values is None:
            past_key_values = DynamicCache(config=config)  # what later recurrences read of the first passes through one
        if past_key_values is not None:
            prepare_cache(past_key_values, config, recurrences)
        tokens = input_ids if input_ids is not None else inputs_embeds
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._call = call = _Call(
            num_recurrences=recurrences,
            grad_recurrences=grad_recurrences,
            given_state=initial_state,
            past=past,
            positions=_logical_positions(tokens, attention_mask, position_ids, past),
            sequence_ids=sequence_ids,
            cache=past_key_values,
            keep_states=output_states or depth_loss is not None,
            read_all_depths=output_depth_logits,
            keep_hidden=bool(output_hidden_states),
            capacity=capacity,
            real=_real(tokens, attention_mask) if config.router else None,
        )
        at_end = (
            self.source.base_model.register_forward_hook(lambda _, __, out: call.hidden.append(out[0]))
            if output_hidden_states
            else None
        )
        loss_kwargs = {k: kwargs.pop(k) for k in ("num_items_in_batch", "shift_labels", "ignore_index") if k in kwargs}
        source_arguments = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache or past_key_values is not None,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        try:
            out = self.source(**source_arguments)
        finally:
            self._call = None
            if at_end:
                at_end.remove()
        logits, depth_logits = out.logits, None
        if output_depth_logits:
            depth_logits = logits.unflatten(0, (recurrences, -1))
            logits = depth_logits[-1]
        depth_losses, ponder = None, call.ponder
        if depth_loss is not None:
            depth_losses = self._depth_losses(logits, call, source_arguments, depth_loss, depth_loss_at)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs)
        return RecurrentDepthOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=cast(Any, tuple(call.hidden)) if output_hidden_states else None,
            last_state=call.state,
            states=torch.stack(call.states) if output_states else None,
            exit_logits=self._exit_logits(call.states) if call.keep_states and config.exit_gate else None,
            depth_logits=depth_logits,
            depth_losses=depth_losses,
            ponder=ponder,
            router_outputs=call.routing.outputs() if call.routing else None,
        )

    def _depth_losses(
        self, logits: torch.Tensor, call: _Call, source_arguments: dict[str, Any], loss: Callable, at: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        """`loss` of the logits at every depth of `at`; `logits` are those at the last."""
        last = call.num_recurrences
        losses = {last: loss(last, logits)} if last in at else {}

        def read_out(state: torch.Tensor, depth: int) -> torch.Tensor:
            self._call = replace(call, read=state, layer_arguments={}, keep_hidden=False, cache=None)
            try:
                return loss(depth, self.source(**{**source_arguments, "past_key_values": None}).logits)
            finally:
                self._call = None

        for depth in at:
            if depth != last:
                losses[depth] = checkpoint(read_out, self._state_at(depth, call), depth, use_reentrant=False)
        return tuple(losses[depth] for depth in at)

    def _visit(self, index: int, hidden_states: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """A tap was called: note the layer's arguments; at the last one, run the recurrence."""
        call = self._call
        assert call is not None, "the source model ran outside of RecurrentDepthForCausalLM.forward"
        call.layer_arguments[index] = (args, kwargs)
        if index + 1 < self.config.source_config.num_hidden_layers:
            return hidden_states
        if call.read is not None:
            return self._read(call.read, call)
        return self._recur(hidden_states, call)

    def _read(self, s: torch.Tensor, call: _Call) -> torch.Tensor:
        """The coda's end [B, T, D] for the state s."""
        if self.config.recurrence_norm == "last":
            s = self._final_norm(s)
        return self._run(self._places("coda"), s, call)

    def _recur(self, x: torch.Tensor, call: _Call) -> torch.Tensor:
        """x [B, T, D], the embedded tokens -> coda(s_R) [B, T, D]; if `read_all_depths`, at every depth [R B, T, D]."""
        config, recurrences = self.config, range(call.num_recurrences)
        e = self._run(self._places("prelude"), x, call)
        s = _with_given(initial_state(config, e, call.positions, call.sequence_ids), call)
        free = call.num_recurrences - (call.grad_recurrences or call.num_recurrences)
        keep = call.keep_states or call.read_all_depths or config.halting == "act"
        if config.router:
            call.routing = self.router.begin(s, cast(Any, call.real), call.capacity)
        if config.sharing == "sequence":
            s = self._run([self._core_place(j, r) for j in range(len(config.core)) for r in recurrences], s, call)
            call.states.append(s)
        else:
            for r in recurrences:
                with torch.no_grad() if r < free else nullcontext():
                    if r and config.recurrence_norm == "between":
                        s = self._final_norm(s)
                    s = self._routed(r, s, e, call) if config.router else self._kept(r, s, e, call)
                if keep or r + 1 == call.num_recurrences:
                    call.states.append(s)
        if call.routing and call.cache is not None and config.has_choice_slot:
            self._choice_slot(call).add(call.routing.selected, cast(Any, config.router)["depths"], s.dtype)
        ends = range(1, call.num_recurrences + 1) if call.read_all_depths else [call.num_recurrences]
        read = [self._state_at(depth, call) for depth in ends]
        call.state = read[-1]
        return torch.cat([self._read(s, call) for s in read])

    def _state_at(self, depth: int, call: _Call) -> torch.Tensor:
        """What is read out at `depth`: the state, or with halting the mean of those up to it."""
        if self.config.halting == "act":
            return self._halted(call.states[:depth], call)
        return call.states[depth - 1] if len(call.states) >= depth else call.states[-1]

    def _recurrence(self, r: int, s: torch.Tensor, e: torch.Tensor, call: _Call, **rows: Any) -> torch.Tensor:
        """Recurrence r, counted from 0, of s and e [B, T, D], or of some rows of them."""
        places, before = [self._core_place(j, r) for j in range(len(self.config.core))], s
        if self.config.recurrence_encoding == "sinusoidal":
            s = self.recurrence_encoding(s, call.positions, r + 1)
        s = self._run(places, self.injection(s, e), call, **rows)
        if self.config.recurrence_residual and r:
            s = s + before
        return self.recurrence_norm(s) if self.config.recurrence_norm == "each" else s

    def _kept(self, r: int, s: torch.Tensor, e: torch.Tensor, call: _Call, **rows: Any) -> torch.Tensor:
        """`_recurrence`, of which training may keep s alone and run it again in the backward pass."""
        if self.checkpoint_recurrences and self.training and torch.is_grad_enabled():
            return cast(Any, checkpoint(self._recurrence, r, s, e, call, use_reentrant=False, **rows))
        return self._recurrence(r, s, e, call, **rows)

    def _halted(self, states: list[torch.Tensor], call: _Call) -> torch.Tensor:
        """The mean of s_1, s_2, .. [B, T, D] under the halting gate; notes what it cost."""
        logits = torch.stack([self.halting_gate(s).squeeze(-1) for s in states])
        weights, call.ponder = halting_weights(logits, self.config.halting_epsilon)
        return torch.stack([w[..., None].to(s.dtype) * s for w, s in zip(weights, states, strict=True)]).sum(0)

    def _routed(self, r: int, s: torch.Tensor, e: torch.Tensor, call: _Call) -> torch.Tensor:
        """Recurrence r of the tokens that the router chooses; the others keep their state."""
        routing, source = cast(Any, call.routing), self.config.source_config
        selected = routing.select(r, s)
        if not self.config.has_choice_slot:  # all tokens have the first recurrence's keys and values, and it runs them
            rows, keys = Rows(selected, r > 0, source), None
        elif call.cache is None:
            rows, keys = Rows(selected, True, source), selected
        else:
            slot = self._choice_slot(call)
            rows, keys = Rows(selected, False, source), slot.keys(r, selected)
            if call.past and not selected.any():
                slot.leave_out([self._core_place(j, r).slot for j in range(len(self.core))], s.shape[1])
                return s
        x = rows.take(s)
        y = self._kept(r, x, rows.take(e), call, rows=rows, keys=keys)
        return rows.put(s, routing.combine(r, x, y, rows))

    def _choice_slot(self, call: _Call) -> ChoiceSlot:
        return ChoiceSlot(cast(Any, call.cache), self.config.num_hidden_layers - 1, call.past)

    def _exit_logits(self, states: list[torch.Tensor]) -> torch.Tensor:
        """The gate on the normed state, at every depth [R, B, T]: lambda_r is its sigmoid (arXiv 2510.25741)."""
        return torch.stack([self.exit_gate(self._final_norm(s)).squeeze(-1) for s in states])

    def _final_norm(self, s: torch.Tensor) -> torch.Tensor:
        return self.source.get_submodule("model.norm")(s)

    def _places(self, part: str) -> list[_Place]:
        """The prelude or the coda, in the order in which it runs."""
        ids = getattr(self.config, part)
        first = 0 if part == "prelude" else len(self.config.prelude)
        return [_Place(layer, ids[i], first + i) for i, layer in enumerate(getattr(self, part))]

    def _core_place(self, j: int, depth: int) -> _Place:
        """Core layer j at `depth`, counted from 0."""
        config = self.config
        kept = depth % config.kv_slots(depth + 1)
        slot = len(config.prelude) + len(config.coda) + kept * len(config.core) + j
        return _Place(self.core[j], config.core[j], slot, depth)

    def _run(
        self,
        places: list[_Place],
        x: torch.Tensor,
        call: _Call,
        rows: Rows | None = None,
        keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Layers in order, each with what the source passes to the source layer of that id, on a slot of its own; with
        `rows`, for those alone, which see the tokens in `keys`."""
        for place in places:
            args, kwargs = call.layer_arguments[place.source_layer]
            if call.keep_hidden:
                call.hidden.append(x)
            if rows is not None:
                offset = call.cache.get_mask_sizes(rows.selected.shape[1], place.slot)[1] if call.cache else 0
                args, kwargs = (), rows.arguments(by_name(place.layer, args, kwargs), keys, call.past, offset)
            view = None
            if call.cache is not None:
                view = DepthCache(call.cache, place.slot)
                depth = place.depth or 0
                reuses = self.config.kv_policy == "first" and place.depth is not None
                if reuses or (rows is not None and keys is None):
                    view = FirstKeysAndValues(call.cache, place.slot, call.first_kv, first=depth == 0)
                elif depth >= self.config.kv_slots(depth + 1):
                    view = Overwriting(call.cache, place.slot)
            kwargs = dict(zip(kwargs, with_slot(kwargs.values(), call.cache, view), strict=True))
            if self.config.relaxation and place.depth is not None:
                kwargs["depth"] = place.depth
            x = place.layer(x, *with_slot(args, call.cache, view), **kwargs)
            x = x[0] if isinstance(x, tuple) else x
        return x


def _logical_positions(tokens, attention_mask, position_ids, past: int) -> torch.Tensor:
    """Positions [B or 1, T] of this call's tokens within their sequences, left padding not counted."""
    length = tokens.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if position_ids is not None:
        return position_ids
    return torch.arange(past, past + length, device=tokens.device)[None]


def _real(tokens, attention_mask) -> torch.Tensor:
    """Which of this call's tokens [B, T] are no padding."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask[:, -tokens.shape[1] :].bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _with_given(s: torch.Tensor, call: _Call) -> torch.Tensor:
    """s [B, T, D] with the rows that the caller's initial state covers replaced."""
    if call.given_state is None or call.given_state.shape[1] <= call.past:
        return s
    given = call.given_state[:, call.past : call.past + s.shape[1]].to(s)
    return torch.cat([given, s[:, given.shape[1] :]], dim=1)
