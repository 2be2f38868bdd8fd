"""The recurrence itself: what runs in place of the source model's layers.

    e   = prelude(x)
    s_r = core_r(inject(s_{r-1}, e))        r = 1 .. R; a router leaves tokens out
    coda(s_R)

Shapes: B batch, T tokens of this call, D width, R recurrences.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from .call import Call, Place, with_given
from .halting import halting_weights
from .initial_state import initial_state
from .routed_rows import ChoiceSlot, FirstKeysAndValues, Rows, by_name
from .source_layers import DepthCache, Overwriting, with_slot


class Recurrence:
    """The part of a RecurrentDepthForCausalLM that its taps call; that one has the modules."""

    config: Any
    source: Any
    prelude: Any
    core: Any
    coda: Any
    injection: Any
    recurrence_norm: Any
    recurrence_encoding: Any
    halting_gate: Any
    exit_gate: Any
    router: Any
    training: bool
    checkpoint_recurrences: bool
    _call: Call | None

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

    def _read(self, s: torch.Tensor, call: Call) -> torch.Tensor:
        """The coda's end [B, T, D] for the state s."""
        if self.config.recurrence_norm == "last":
            s = self._final_norm(s)
        return self._run(self._places("coda"), s, call)

    def _recur(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """x [B, T, D], the embedded tokens -> coda(s_R) [B, T, D]; if `read_all_depths`, at every depth [R B, T, D]."""
        config, recurrences = self.config, range(call.num_recurrences)
        e = self._run(self._places("prelude"), x, call)
        s = with_given(initial_state(config, e, call.positions, call.sequence_ids), call)
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

    def _state_at(self, depth: int, call: Call) -> torch.Tensor:
        """What is read out at `depth`: the state, or with halting the mean of those up to it."""
        if self.config.halting == "act":
            return self._halted(call.states[:depth], call)
        return call.states[depth - 1] if len(call.states) >= depth else call.states[-1]

    def _recurrence(self, r: int, s: torch.Tensor, e: torch.Tensor, call: Call, **rows: Any) -> torch.Tensor:
        """Recurrence r, counted from 0, of s and e [B, T, D], or of some rows of them."""
        places, before = [self._core_place(j, r) for j in range(len(self.config.core))], s
        if self.config.recurrence_encoding == "sinusoidal":
            s = self.recurrence_encoding(s, call.positions, r + 1)
        s = self._run(places, self.injection(s, e), call, **rows)
        if self.config.recurrence_residual and r:
            s = s + before
        return self.recurrence_norm(s) if self.config.recurrence_norm == "each" else s

    def _kept(self, r: int, s: torch.Tensor, e: torch.Tensor, call: Call, **rows: Any) -> torch.Tensor:
        """`_recurrence`, of which training may keep s alone and run it again in the backward pass."""
        if self.checkpoint_recurrences and self.training and torch.is_grad_enabled():
            return cast(Any, checkpoint(self._recurrence, r, s, e, call, use_reentrant=False, **rows))
        return self._recurrence(r, s, e, call, **rows)

    def _halted(self, states: list[torch.Tensor], call: Call) -> torch.Tensor:
        """The mean of s_1, s_2, .. [B, T, D] under the halting gate; notes what it cost."""
        logits = torch.stack([self.halting_gate(s).squeeze(-1) for s in states])
        weights, call.ponder = halting_weights(logits, self.config.halting_epsilon)
        return torch.stack([w[..., None].to(s.dtype) * s for w, s in zip(weights, states, strict=True)]).sum(0)

    def _routed(self, r: int, s: torch.Tensor, e: torch.Tensor, call: Call) -> torch.Tensor:
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

    def _choice_slot(self, call: Call) -> ChoiceSlot:
        return ChoiceSlot(cast(Any, call.cache), self.config.num_hidden_layers - 1, call.past)

    def _exit_logits(self, states: list[torch.Tensor]) -> torch.Tensor:
        """The gate on the normed state, at every depth [R, B, T]: lambda_r is its sigmoid (arXiv 2510.25741)."""
        return torch.stack([self.exit_gate(self._final_norm(s)).squeeze(-1) for s in states])

    def _final_norm(self, s: torch.Tensor) -> torch.Tensor:
        return self.source.get_submodule("model.norm")(s)

    def _places(self, part: str) -> list[Place]:
        """The prelude or the coda, in the order in which it runs."""
        ids = getattr(self.config, part)
        first = 0 if part == "prelude" else len(self.config.prelude)
        return [Place(layer, ids[i], first + i) for i, layer in enumerate(getattr(self, part))]

    def _core_place(self, j: int, depth: int) -> Place:
        """Core layer j at `depth`, counted from 0."""
        config = self.config
        kept = depth % config.kv_slots(depth + 1)
        slot = len(config.prelude) + len(config.coda) + kept * len(config.core) + j
        return Place(self.core[j], config.core[j], slot, depth)

    def _run(
        self,
        places: list[Place],
        x: torch.Tensor,
        call: Call,
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
