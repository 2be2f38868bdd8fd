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
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.generic import can_return_tuple

from .call import Call, check_call, logical_positions, real_tokens
from .configuration_recurrent_depth import RecurrentDepthConfig
from .injection import Injection
from .modeling_sandwich import SandwichForCausalLM  # noqa: F401  registers it
from .output import RecurrentDepthOutput
from .recurrence import Recurrence
from .recurrence_encoding import RecurrenceEncoding
from .relaxation import Factors, Relaxation
from .router import Router, capacities
from .source_layers import TUPLE_LAYERS, Tap, layer_list_name, prepare_cache


class RecurrentDepthForCausalLM(Recurrence, PreTrainedModel, GenerationMixin):
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
        self._call: Call | None = None
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
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions is not supported: a layer attends once for every recurrence")
        check_call(
            config,
            recurrences,
            grad_recurrences,
            output_states,
            output_depth_logits,
            depth_loss,
            depth_loss_at,
            cached=bool(use_cache) or past_key_values is not None,
            others=kwargs,
        )
        read_depths = output_depth_logits or depth_loss is not None
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
        if isinstance(past, torch.Tensor):  # of a static cache, which adds to this very tensor as layers write into it
            past = past.clone() if torch.compiler.is_compiling() else int(past)
        self._call = call = Call(
            num_recurrences=recurrences,
            grad_recurrences=grad_recurrences,
            given_state=initial_state,
            past=past,
            positions=logical_positions(tokens, attention_mask, position_ids, past),
            sequence_ids=sequence_ids,
            cache=past_key_values,
            keep_states=output_states or depth_loss is not None,
            read_all_depths=output_depth_logits,
            keep_hidden=bool(output_hidden_states),
            capacity=capacity,
            real=real_tokens(tokens, attention_mask) if config.router else None,
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
        self, logits: torch.Tensor, call: Call, source_arguments: dict[str, Any], loss: Callable, at: Sequence[int]
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
