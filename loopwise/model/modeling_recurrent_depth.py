"""One recurrent-depth model for every source architecture.

    e   = prelude(embed(tokens))
    s_0 = initial_state(e)                  e is normed, with a prelude norm
    s_r = core_r(inject(s_{r-1}, e))        r = 1 .. R; with relaxation core_r differs from core, a router leaves
                                            tokens out, and damping shortens the step
    logits = head(norm(coda(s_R)))          coda(W s_R), with a state projection

The layers, embeddings, rotary tables, norms and head are the source architecture's own transformers modules.
Shapes: B batch, T tokens of this call, D width, R recurrences, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import can_return_tuple

from .call import Call, DepthLoss, Options, check_call, logical_positions, not_padding, recurrences_of
from .configuration_recurrent_depth import RecurrentDepthConfig
from .damping import Damping
from .ends import Ends
from .exit_gate import ExitGate
from .experts import collect_router_logits
from .injection import Injection
from .modeling_source import causal_lm_class
from .modeling_ungated import ValueEmbedding
from .output import RecurrentDepthOutput
from .recurrence import Recurrence
from .recurrence_encoding import RecurrenceEncoding
from .relaxation import Factors, Relaxation
from .router import Router, capacities
from .some_logits import head_at
from .source_layers import TUPLE_LAYERS, Tap, init_layer_buffers, layer_list_name, prepare_cache
from .time_conditioning import Factor, TimeConditioning

LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")  # keyword arguments for the loss alone


class RecurrentDepthForCausalLM(Recurrence, PreTrainedModel, GenerationMixin):
    r"""
    The model of a RecurrentDepthConfig. `prelude`, `core` and `coda` are layers of `source`, the source architecture's
    causal language model, whose own layer list holds taps. With `checkpoint_recurrences = True`, training recomputes
    each recurrence in the backward pass.

    Arguments of `forward` beyond those of transformers' causal language models:

        num_recurrences (`int` or `torch.LongTensor` [B], *optional*): R, at least 1; default `config.num_recurrences`.
            With a tensor, each row keeps its state after its own R. All rows are computed to the greatest R, so it
            saves no time. Needs `use_cache=False`.
        grad_recurrences (`int`, *optional*): number of last recurrences that carry gradient; default all (truncated
            backpropagation, arXiv 2502.05171 section 3.3).
        detach_after (`Sequence[int]`): recurrences, counted from 1, after which the state goes on without gradient: the
            ends of the segments of deep supervision (arXiv 2506.21734, 2510.04871). `depth_loss` at them has it.
        initial_state (`torch.FloatTensor` [B, S, D], *optional*): s_0 for the first S positions of the sequences,
            padding counted; positions beyond S start by `config.state_init`.
        sequence_ids (`torch.LongTensor` [B], *optional*): sequence numbers for `state_init="normal"`; default 0.
        output_states, output_depth_logits (`bool`): return `states` (and `exit_logits`), `depth_logits`. The latter
            runs the coda at every depth and so needs `use_cache=False`.
        output_router_logits (`bool`): of a mixture of experts, return `router_logits`, a tuple of [B T, experts] of
            every layer that ran, in order, and `aux_loss`, the source's load-balancing loss of them. With `labels` the
            loss includes it by the config's `router_aux_loss_coef`, as the source's does. Whole sequences only.
        depth_loss (`Callable`, *optional*), depth_loss_at (`Sequence[int]`): return `depth_losses`, `depth_loss(r,
            logits [B, T, V])` for every r of these depths, at most R. The logits of one depth are in memory at a time:
            they are made again in the backward pass. With an exit gate, `exit_logits` is returned too. Needs
            `use_cache=False`.
        logits_to_keep (`torch.BoolTensor` [B, T]): beside transformers' own forms, a mask. `logits`, and those that
            `depth_loss` gets, are then [1, N, V], at its N True positions row by row; the head runs at no other.
        router_capacity (`Sequence[float]`, *optional*): shares of the sequence that expert-choice takes, one for each
            recurrence, to be lowered from 1 in training. Default: the config's, in training and with
            `inference="topk"`; else thresholds decide.
    """

    config_class = RecurrentDepthConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__(config)
        source_config = config.source_config
        for name in ("_attn_implementation", "_experts_implementation"):
            setattr(source_config, name, getattr(config, name))
        self.source = causal_lm_class(source_config)(source_config)
        name = layer_list_name(self.source, source_config.num_hidden_layers)
        layers = list(self.source.get_submodule(name).children())
        as_tuple = source_config.model_type in TUPLE_LAYERS
        taps = [Tap(i, self._visit, as_tuple, layer) for i, layer in enumerate(layers)]
        self.source.set_submodule(name, nn.ModuleList(taps))
        taken: set[int] = set()

        def take(index: int) -> nn.Module:
            layer = layers[index]
            if index in taken:  # with the same config, by which implementations are chosen
                layer = copy.deepcopy(layer, {id(source_config): source_config})
            taken.add(index)
            return layer

        self.prelude = nn.ModuleList(take(i) for i in config.prelude)
        self.core = nn.ModuleList(take(i) for i in config.core)
        self.coda = nn.ModuleList(take(i) for i in config.coda)
        self.injection = Injection(config.injection, source_config.hidden_size)
        sizes = (source_config.hidden_size, config.norm_eps)
        self.ends = Ends(config.prelude_norm, config.state_projection, *sizes)
        self.damping = Damping(config.recurrence_damping, source_config.hidden_size)
        if config.recurrence_norm == "each":
            self.recurrence_norm = nn.RMSNorm(source_config.hidden_size, config.norm_eps)
        if config.recurrence_encoding == "sinusoidal":
            self.recurrence_encoding = RecurrenceEncoding(source_config.hidden_size)
        if config.halting == "act":
            self.halting_gate = nn.Linear(source_config.hidden_size, 1)
        if config.exit_gate:
            self.exit_gate = ExitGate(source_config.hidden_size, config.exit_gate_norm)
        if config.relaxation:
            self.relaxation = nn.ModuleList(Relaxation(layer, **config.relaxation) for layer in self.core)
        if config.time_conditioning:
            given: dict[str, Any] = {"scale": [], "gate": [], **config.time_conditioning}
            self.time_conditioning = TimeConditioning(self.core, source_config.hidden_size, **given)
        if config.router:
            self.router = Router(source_config.hidden_size, config.router)
        self._no_split_modules = self.source._no_split_modules
        self._is_stateful = self.source._is_stateful  # generate then proposes no tokens that it may have to take back
        self._call: Call | None = None
        self._collects_router_logits = False
        self.checkpoint_recurrences = False
        self.post_init()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """As transformers', with the implementations that the source's class supports."""
        source = causal_lm_class(self.config.source_config)
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
            setattr(self, name, getattr(source, name))
        if self.config.router:  # these two take no written-out masks
            self._supports_flash_attn = self._supports_flex_attn = False
        if attn_implementation is None and getattr(self.config, "attn_logit_softcapping", None):
            attn_implementation = "eager"  # transformers' sdpa leaves the cap on attention scores out
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def _can_set_experts_implementation(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """transformers' test of a class, for the source's: its layers have the experts."""
        return causal_lm_class(self.config.source_config)._can_set_experts_implementation()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module of ours so that the model equals its source; any other as the source does."""
        if isinstance(module, Injection):
            if module.kind in ("linear", "decayed", "diagonal"):
                width = module.weight.shape[0]
                init.copy_(module.weight, Injection.preserving_weight(module.kind, width, self.config.state_init))
                for name in ("decay", "log_rate", "step"):
                    if hasattr(module, name):
                        init.zeros_(getattr(module, name))
            elif module.kind == "gated":
                init.zeros_(module.weight)
                init.zeros_(module.bias)
        elif isinstance(module, Ends):
            if module.norm is not None:
                init.ones_(module.norm)
            if module.projection is not None:
                init.copy_(module.projection, torch.eye(len(module.projection)))
        elif isinstance(module, Factor):
            init.zeros_(module.weight)
            init.constant_(module.bias, module.start)
        elif isinstance(module, Factors):
            module.reset_parameters()
        elif isinstance(module, RecurrenceEncoding | Damping):
            for name, parameter in module.named_parameters():
                if name == "down":  # a product of two zeros would have no gradient
                    init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
                else:
                    init.zeros_(parameter)
        elif self.config.halting == "act" and module is self.halting_gate:
            init.zeros_(cast(Any, module).weight)
            init.zeros_(cast(Any, module).bias)
        elif isinstance(module, Router):
            module.reset_parameters(self.config.initializer_std)
        elif self.config.recurrence_norm == "each" and module is self.recurrence_norm:
            init.ones_(cast(Any, module).weight)
        else:
            self.source._init_weights(module)
            init_layer_buffers(module, self.config.source_config)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """As transformers'. Raises ValueError for `use_reentrant` where all layers of a recurrence share factors."""
        if self.config.time_conditioning and (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True goes through the factors of time_conditioning once more for every layer, and they "
                "are shared: use_reentrant=False"
            )
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.source.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.source.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.source.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.source.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers', with the value embeddings of the tokens that layers have for themselves."""
        made = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for module in self.modules():
            if isinstance(module, ValueEmbedding):
                self._get_resized_embeddings(module.embedding, made.num_embeddings, mean_resizing=mean_resizing)
        return made

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """The mask [B, T] unchanged: `forward` needs the padding, and the source makes the masks from it."""
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
        num_recurrences: int | torch.Tensor | None = None,
        grad_recurrences: int | None = None,
        initial_state: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        output_states: bool = False,
        output_depth_logits: bool = False,
        output_hidden_states: bool | None = None,
        output_router_logits: bool = False,
        depth_loss: DepthLoss | None = None,
        depth_loss_at: Sequence[int] = (),
        detach_after: Sequence[int] = (),
        router_capacity: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> RecurrentDepthOutput:
        """Logits [B, T, V] for ids [B, T] or embeddings [B, T, D], and more; see the class for the arguments.

        Raises ValueError for R < 1, a cache prefilled at a smaller depth, attentions (they are not collected), and for
        router logits of a source without experts, of routed recurrences or of part of a sequence.
        """
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions is not supported: a layer attends once for every recurrence")
        tokens = cast(torch.Tensor, input_ids if input_ids is not None else inputs_embeds)
        recurrences, rows = recurrences_of(num_recurrences, self.config.num_recurrences, tokens.shape[0])
        options = Options(
            recurrences, grad_recurrences, initial_state, sequence_ids, output_states, output_depth_logits, depth_loss,
            depth_loss_at, detach_after, rows, router_capacity,
        )  # fmt: skip
        check_call(self.config, options, cached=bool(use_cache) or past_key_values is not None, others=kwargs)
        use_cache, cache, capacity = self._settle_cache(options, use_cache, past_key_values)
        past = self._past(cache)
        if output_router_logits:
            self._collect_router_logits(output_depth_logits, past)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        positions = logical_positions(tokens, attention_mask, position_ids, past)
        call = Call(options, past, positions, cache, bool(hidden), output_router_logits, capacity)
        call.not_padding = not_padding(tokens, attention_mask) if self.config.router else None
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
            self._check_positions(logits_to_keep, tokens, output_depth_logits or labels is not None)
            call.logits_at, logits_to_keep = logits_to_keep, 0
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs |= {"position_ids": position_ids, "past_key_values": cache, "logits_to_keep": logits_to_keep, **kwargs}
        inputs |= {"use_cache": use_cache or cache is not None, "return_dict": True}
        out = self._run_source(call, {**inputs, **({"output_router_logits": True} if output_router_logits else {})})
        results = self._results(call, out, inputs)
        return RecurrentDepthOutput(
            loss=None if labels is None else self._loss(results, labels, loss_arguments),
            past_key_values=cache if use_cache else None,
            **results,
        )

    @staticmethod
    def _past(cache: Cache | None) -> int | torch.Tensor:
        """The number of cached positions; a tensor in a compiled call with a static cache."""
        past: Any = cache.get_seq_length() if cache is not None else 0
        if isinstance(past, torch.Tensor):  # a static cache adds to this very tensor as layers write into it
            return past.clone() if torch.compiler.is_compiling() else int(past)
        return past

    def _settle_cache(
        self, options: Options, use_cache: bool | None, cache: Cache | None
    ) -> tuple[bool, Cache | None, Sequence[float] | None]:
        """The call's use_cache, its cache, ready for the call, and the capacities of its router, where they decide.

        Raises ValueError where a cache, or recomputing, contradicts the config or the options.
        """
        config = self.config
        reads_first = bool(config.router and not config.has_choice_slot) or config.kv_policy == "first"
        if reads_first and self.training and (self.is_gradient_checkpointing or self.checkpoint_recurrences):
            raise ValueError(
                "gradient checkpointing runs a recurrence a second time without what it read of the first: "
                "router.kv='first-recursion', or kv_policy='first', does not go with it"
            )
        capacity = None
        if config.router:
            capacity = capacities(config.router, options.num_recurrences, options.router_capacity, self.training)
        if use_cache is None:
            reads_all = options.reads_depths or options.rows is not None
            in_config = getattr(config, "use_cache", None) and not self.training and not reads_all
            use_cache = cache is not None or (bool(in_config) and capacity is None)
        if capacity is not None and (use_cache or cache is not None):
            raise ValueError(
                "this router takes the best of the whole sequence (router.inference='topk'), so that a new token can "
                "change what earlier ones did, which a cache cannot: use_cache=False, or calibrate it to thresholds"
            )
        if (use_cache or reads_first) and cache is None:
            cache = DynamicCache(config=config)  # later recurrences read the first one's keys and values from it
        if cache is not None:
            prepare_cache(cache, config, options.num_recurrences)
        return bool(use_cache), cache, capacity

    def _check_positions(self, positions: torch.Tensor, tokens: torch.Tensor, needs_all: bool) -> None:
        """Raises ValueError for a mask `logits_to_keep` of another shape than the tokens, or where all are needed."""
        if positions.shape != tokens.shape[:2]:
            raise ValueError(f"logits_to_keep: a mask of shape {[*positions.shape]}, of tokens {[*tokens.shape[:2]]}")
        if needs_all:
            raise ValueError("a mask as logits_to_keep goes neither with labels nor with output_depth_logits")

    def _run_source(self, call: Call, inputs: dict[str, Any]) -> Any:
        """The output of the source's forward, whose last tap runs the recurrence of `call`."""
        at_end = None
        if call.keep_hidden:
            at_end = self.source.base_model.register_forward_hook(lambda _, __, out: call.hidden.append(out[0]))
        self._call = call
        try:
            with nullcontext() if call.logits_at is None else head_at(self.get_output_embeddings(), call.logits_at):
                return self.source(**inputs)
        finally:
            self._call = None
            if at_end:
                at_end.remove()

    def _results(self, call: Call, out: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The fields of the output of `call` but loss and cache, from the source's output `out` for `inputs`."""
        options, logits, depth_logits = call.options, out.logits, None
        if options.output_depth_logits:
            depth_logits = logits.unflatten(0, (options.num_recurrences, -1))
            logits = depth_logits[-1]
        ponder = call.ponder  # reading out the state at other depths overwrites it
        depth_losses = None if options.depth_loss is None else self._depth_losses(logits, call, inputs)
        return {
            "logits": logits,
            "hidden_states": tuple(call.hidden) if call.keep_hidden else None,
            "last_state": call.state,
            "states": torch.stack(call.states) if options.output_states else None,
            "exit_logits": self._exit_logits(call.states) if options.keep_states and self.config.exit_gate else None,
            "depth_logits": depth_logits,
            "depth_losses": depth_losses,
            "ponder": ponder,
            "router_outputs": call.routing.outputs() if call.routing else None,
            "router_logits": out.router_logits if call.keep_router_logits else None,
            "aux_loss": out.aux_loss if call.keep_router_logits else None,
        }

    def _loss(self, results: dict[str, Any], labels: torch.Tensor, arguments: dict[str, Any]) -> torch.FloatTensor:
        """The cross-entropy of labels [B, T], a mean over tokens, plus the experts' balancing loss, if asked for."""
        logits, balancing = results["logits"], results["aux_loss"]
        cross_entropy: Any = self.loss_function
        loss = cross_entropy(logits=logits, labels=labels, vocab_size=logits.shape[-1], **arguments)
        if balancing is not None:
            loss = loss + self.config.router_aux_loss_coef * balancing.to(loss.device)
        return loss

    def _collect_router_logits(self, reads_depths: bool, past: int | torch.Tensor) -> None:
        """Prepare the layers for a call that returns router logits of experts. Raises ValueError where there are none.

        reads_depths: True for `output_depth_logits`. past: number of cached positions.
        """
        if self.config.router or reads_depths or (not isinstance(past, torch.Tensor) and past):
            raise ValueError(
                "output_router_logits goes with whole sequences through all layers: not with a router that leaves "
                "tokens out, with output_depth_logits, or behind cached tokens"
            )
        if not self._collects_router_logits:
            collect_router_logits(self.source, [*self.prelude, *self.core, *self.coda])
            self._collects_router_logits = True

    def _depth_losses(self, logits: torch.Tensor, call: Call, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The results of `depth_loss` at every depth of `depth_loss_at`; `logits` [B, T, V] are those at the last."""
        last, at, loss = call.options.num_recurrences, call.options.depth_loss_at, call.options.depth_loss
        assert loss is not None
        losses = {last: loss(last, logits)} if last in at else {}
        arguments = {name: value for name, value in inputs.items() if name != "past_key_values"}

        def read_out(state: torch.Tensor, depth: int) -> torch.Tensor:
            reading = replace(call, state_to_read=state, layer_arguments={}, keep_hidden=False, cache=None)
            return loss(depth, self._run_source(reading, arguments).logits)

        for depth in at:
            if depth != last:
                losses[depth] = cast(Any, checkpoint(read_out, self._state_at(depth, call), depth, use_reentrant=False))
        return tuple(losses[depth] for depth in at)
