"""The recurrence, which runs in place of the source model's layers.

    e   = prelude(x)
    s_r = core_r(inject(s_{r-1}, e))        r = 1 .. R; a router leaves tokens out, damping shortens the step
    coda(s_R)

Shapes: B batch, T tokens of this call, D width, R recurrences, N chosen tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .call import Call, Place, with_initial_state
from .configuration_recurrent_depth import RecurrentDepthConfig
from .damping import Damping
from .ends import Ends
from .exit_gate import ExitGate
from .halting import halting_weights
from .initial_state import initial_state
from .injection import Injection
from .recurrence_encoding import RecurrenceEncoding
from .recurrence_norm import norm_after, norm_at_end, norm_before
from .routed_rows import ChoiceSlot, FirstKeysAndValues, Rows, by_name
from .router import Router
from .source_layers import FINAL_NORM, DepthCache, Overwriting, with_slot
from .time_conditioning import TimeConditioning


class Selection(NamedTuple):
    """The tokens that a routed recurrence runs on. keys: [B, past + T], those that have keys and values; None: all."""

    rows: Rows
    keys: torch.Tensor | None


class Recurrence:
    """The part of a RecurrentDepthForCausalLM that its taps call. That class makes the modules, some by config."""

    config: RecurrentDepthConfig
    source: PreTrainedModel
    prelude: nn.ModuleList
    core: nn.ModuleList
    coda: nn.ModuleList
    injection: Injection
    ends: Ends
    damping: Damping
    recurrence_norm: nn.RMSNorm
    recurrence_encoding: RecurrenceEncoding
    time_conditioning: TimeConditioning
    halting_gate: nn.Linear
    exit_gate: ExitGate
    router: Router
    training: bool
    checkpoint_recurrences: bool
    _call: Call | None  # the running call

    def _visit(
        self, index: int, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The output of the tap at `index`: it stores the layer's arguments, and the last tap runs the recurrence."""
        call = self._call
        assert call is not None, "the source model ran outside of RecurrentDepthForCausalLM.forward"
        call.layer_arguments[index] = (args, kwargs)
        if index + 1 < self.config.source_config.num_hidden_layers:
            return hidden_states
        if call.state_to_read is not None:
            return self._read_out(call.state_to_read, call)
        return self._recur(hidden_states, call)

    def _recur(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """coda(s_R) [B, T, D] of the embedded tokens x [B, T, D]; or at every depth [R B, T, D].

        Writes the call's results: states, state, routing, ponder, hidden.
        """
        config, recurrences = self.config, call.options.num_recurrences
        e = self.ends.enter(self._run(self._places("prelude"), x, call))
        s = with_initial_state(initial_state(config, e, call.positions, call.options.sequence_ids), call)
        if config.router:
            assert call.not_padding is not None
            call.routing = self.router.route(s, call.not_padding, call.capacity)
        if config.sharing == "sequence":
            depths, layers = range(recurrences), range(len(config.core))
            call.states.append(self._run([self._core_place(n, r) for n in layers for r in depths], s, call))
        else:
            self._recur_in_cycles(s, e, call)
        if config.router and call.routing and call.cache is not None and config.has_choice_slot:
            self._choice_slot(call).add(call.routing.selected, config.router["depths"], s.dtype)
        ends = range(1, recurrences + 1) if call.options.output_depth_logits else [recurrences]
        read = [self._state_at(depth, call) for depth in ends]
        call.state = read[-1]
        return torch.cat([self._read_out(s, call) for s in read])

    def _recur_in_cycles(self, s: torch.Tensor, e: torch.Tensor, call: Call) -> None:
        """Append to `call.states` those that are needed of s_1 .. s_R, from s_0 and e [B, T, D]."""
        options, rows, graded = call.options, call.options.rows, call.options.grad_recurrences
        least = options.num_recurrences if rows is None else int(rows.min())
        without_grad = least - graded if graded else 0
        keep_all = options.keep_states or options.output_depth_logits or self.config.halting == "act"
        for r in range(options.num_recurrences):
            if rows is not None and graded and r:
                s = torch.where((rows == r + graded)[:, None, None], s.detach(), s)
            before = s
            with torch.no_grad() if r < without_grad else nullcontext():
                s = norm_before(self.config.recurrence_norm, s, self._final_norm, started=r > 0)
                s = self._routed_recurrence(r, s, e, call) if self.config.router else self._recompute(r, s, e, call)
            if rows is not None:
                s = torch.where((rows > r)[:, None, None], s, before)
            if keep_all or r + 1 == options.num_recurrences:
                call.states.append(s)
            if r + 1 in options.detach_after:
                s = s.detach()

    def _recurrence(
        self, r: int, s: torch.Tensor, e: torch.Tensor, call: Call, selection: Selection | None = None
    ) -> torch.Tensor:
        """Recurrence r, counted from 0, of s and e [B, T, D], or of the rows [B, N, D] of a selection."""
        places, before = [self._core_place(n, r) for n in range(len(self.config.core))], s
        if self.config.recurrence_encoding == "sinusoidal":
            s = self.recurrence_encoding(s, call.positions, r + 1)
        time, rows = None, call.options.rows
        recurrences = call.options.num_recurrences if rows is None else rows[:, None]  # a row's own R
        if self.config.time_conditioning:
            time = self.time_conditioning(r, recurrences, s.device)
        s = self._run(places, self.injection(s, e), call, selection, time)
        if self.config.recurrence_residual and r:
            s = s + before
        s = self.damping(before, s, r > 0, recurrences)
        return norm_after(self.config.recurrence_norm, s, self._own_norm)

    def _recompute(
        self, r: int, s: torch.Tensor, e: torch.Tensor, call: Call, selection: Selection | None = None
    ) -> torch.Tensor:
        """`_recurrence`; with `checkpoint_recurrences`, training recomputes it in the backward pass."""
        if self.checkpoint_recurrences and self.training and torch.is_grad_enabled():
            return cast(Any, checkpoint(self._recurrence, r, s, e, call, selection, use_reentrant=False))
        return self._recurrence(r, s, e, call, selection)

    def _routed_recurrence(self, r: int, s: torch.Tensor, e: torch.Tensor, call: Call) -> torch.Tensor:
        """Recurrence r of the tokens that the router chooses; the others keep their state."""
        routing, source = call.routing, self.config.source_config
        assert routing is not None
        selected = routing.select(r, s)
        if not self.config.has_choice_slot:  # the first recurrence runs all tokens, and the others read its slots
            selection = Selection(Rows(selected, r > 0, source), None)
        elif call.cache is None:
            selection = Selection(Rows(selected, True, source), selected)
        else:
            slot = self._choice_slot(call)
            selection = Selection(Rows(selected, False, source), slot.keys(r, selected))
            if call.past and not selected.any():
                slot.leave_out([self._core_place(n, r).slot for n in range(len(self.core))], s.shape[1])
                return s
        rows = selection.rows
        x = rows.take(s)
        y = self._recompute(r, x, rows.take(e), call, selection)
        return rows.put(s, routing.combine(r, x, y, rows))

    def _read_out(self, s: torch.Tensor, call: Call) -> torch.Tensor:
        """The output of the coda [B, T, D] for the state s [B, T, D]."""
        s = norm_at_end(self.config.recurrence_norm, s, self._final_norm)
        return self._run(self._places("coda"), self.ends.leave(s), call)

    def _state_at(self, depth: int, call: Call) -> torch.Tensor:
        """The state [B, T, D] that is read out at `depth`; with halting, the mean of those up to it."""
        if self.config.halting == "act":
            return self._halting_mean(call.states[:depth], call)
        return call.states[depth - 1] if len(call.states) >= depth else call.states[-1]

    def _halting_mean(self, states: list[torch.Tensor], call: Call) -> torch.Tensor:
        """The mean of s_1, s_2, .. [B, T, D] under the halting gate. Writes `call.ponder`."""
        logits = torch.stack([self.halting_gate(s).squeeze(-1) for s in states])
        weights, call.ponder = halting_weights(logits, self.config.halting_epsilon)
        return torch.stack([w[..., None].to(s.dtype) * s for w, s in zip(weights, states, strict=True)]).sum(0)

    def _exit_logits(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Logits [R, B, T] of the exit gate on the states: lambda_r is their sigmoid (arXiv 2510.25741)."""
        return torch.stack([self.exit_gate(s, self._final_norm) for s in states])

    def _final_norm(self, s: torch.Tensor) -> torch.Tensor:
        """The source's final norm of s [.., D]."""
        return self.source.get_submodule(FINAL_NORM)(s)

    def _own_norm(self, s: torch.Tensor) -> torch.Tensor:
        """The recurrence's own norm of s [.., D]; only models with recurrence_norm="each" have it."""
        return self.recurrence_norm(s)

    def _choice_slot(self, call: Call) -> ChoiceSlot:
        """The slot of the call's cache that holds the router's choices."""
        assert call.cache is not None
        return ChoiceSlot(call.cache, self.config.num_hidden_layers - 1, cast(int, call.past))

    def _places(self, part: str) -> list[Place]:
        """The layers of the prelude or the coda, in the order in which they run."""
        ids = getattr(self.config, part)
        first = 0 if part == "prelude" else len(self.config.prelude)
        return [Place(layer, ids[i], first + i) for i, layer in enumerate(getattr(self, part))]

    def _core_place(self, n: int, depth: int) -> Place:
        """Core layer n at `depth`, both counted from 0."""
        config = self.config
        kept = depth % config.kv_slots(depth + 1)
        slot = len(config.prelude) + len(config.coda) + kept * len(config.core) + n
        return Place(self.core[n], config.core[n], slot, depth)

    def _run(
        self,
        places: list[Place],
        x: torch.Tensor,
        call: Call,
        selection: Selection | None = None,
        time: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Layers in order, on x [B, T, D], or on the rows [B, N, D] of a selection. time: the core's conditioning."""
        for place in places:
            args, kwargs = call.layer_arguments[place.source_layer]
            if call.keep_hidden:
                call.hidden.append(x)
            if selection is not None:
                length = selection.rows.selected.shape[1]
                offset = call.cache.get_mask_sizes(length, place.slot)[1] if call.cache else 0
                named = by_name(place.layer, args, kwargs)
                args, kwargs = (), selection.rows.arguments(named, selection.keys, cast(int, call.past), offset)
            view = self._view(place, call, selection) if call.cache is not None else None
            kwargs = dict(zip(kwargs, with_slot(kwargs.values(), call.cache, view), strict=True))
            if self.config.relaxation and place.depth is not None:
                kwargs["depth"] = place.depth
            if time is not None:
                kwargs["time"] = time
            x = place.layer(x, *with_slot(args, call.cache, view), **kwargs)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def _view(self, place: Place, call: Call, selection: Selection | None) -> DepthCache:
        """The view of the call's cache for one run of a layer."""
        assert call.cache is not None
        depth = place.depth or 0
        reads_first = self.config.kv_policy == "first" and place.depth is not None
        if reads_first or (selection is not None and selection.keys is None):
            return FirstKeysAndValues(call.cache, place.slot, call.first_kv, first=depth == 0)
        if depth >= self.config.kv_slots(depth + 1):
            return Overwriting(call.cache, place.slot)
        return DepthCache(call.cache, place.slot)
