"""Mixture-of-Recursions (arXiv 2507.10524): routers that choose which tokens take part in a recurrence.

Expert-choice: s_r = s_{r-1} + w_r(s_{r-1}) core(s_{r-1}) for the tokens chosen for recurrence r, w_r(s) =
alpha gate(W_r s). Token-choice: s_R = s_0 + w_d(s_0) h_d with h_0 = s_0, h_r = core(h_{r-1}) for a token of depth d,
the argmax of W s_0. With `update="step"`, core(s) - s and h_d - s_0 are added in their place, so that a weight of 1 is
the recursion without a router. A token that is not chosen keeps its state. Tokens that were chosen attend to each other
(or, with `kv="first-recursion"`, to the first recurrence's keys and values of all tokens).

Shapes: B batch, T tokens of this call, D width, R recurrences, N chosen tokens (of the fullest sequence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from .configuration_router import check_capacity
from .damping import interpolate
from .routed_rows import Rows


@dataclass
class RouterOutputs(ModelOutput):
    """Scores and choices of a router, float32 and bool; entries that are no candidates mean nothing.

    logits [B, T, R]: of each recurrence's router (expert), or of the router of all depths (token).
    auxiliary_logits [B, T, R]: of the auxiliary routers, if there are any; their input carries no gradient.
    candidates [B, T, R]: the tokens that the recurrence chose among, without padding.
    selected [B, T, R]: the tokens that it ran; their sum over R is a token's depth.

    An objective for the choice is the binary cross-entropy of `logits[c]` (or `auxiliary_logits[c]`) and `selected[c]`,
    with c = candidates.
    """

    logits: torch.Tensor | None = None
    auxiliary_logits: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    selected: torch.Tensor | None = None


def _network(kind: str, width: int, out: int) -> nn.Module:
    """A network [.., width] -> [.., out], `linear` or `mlp`, without biases."""
    if kind == "linear":
        return nn.Linear(width, out, bias=False)
    return nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, out, bias=False))


class Router(nn.Module):
    """The networks of `config.router` (see `router_fields`): one for each recurrence (expert), or one for all (token).

    A token-choice router also holds `bias` [R], added to the probabilities where a depth is chosen and nowhere else:
    balancing without a loss moves it (arXiv 2408.15664).
    """

    def __init__(self, width: int, fields: dict[str, Any]):
        super().__init__()
        self.fields = fields
        expert = fields["kind"] == "expert"
        count, out = (fields["depths"], 1) if expert else (1, fields["depths"])
        self.networks = nn.ModuleList(_network(fields["network"], width, out) for _ in range(count))
        if fields.get("auxiliary"):
            self.auxiliary = nn.ModuleList(_network(fields["network"], width, out) for _ in range(count))
        if not expert:
            self.bias: torch.Tensor
            self.register_buffer("bias", torch.zeros(out))

    def reset_parameters(self, std: float) -> None:
        """Draw the networks from a normal distribution of standard deviation `std`, and set the bias to zero.

        With `update="step"` the last layer of each is zero: all logits are.
        """
        for parameter in self.parameters():
            init.normal_(parameter, std=std)
        if self.fields["update"] == "step":
            for network in [*self.networks, *getattr(self, "auxiliary", [])]:
                init.zeros_(list(network.parameters())[-1])
        if self.fields["kind"] == "token":
            init.zeros_(self.bias)

    def route(self, s: torch.Tensor, not_padding: torch.Tensor, topk: Sequence[float] | None) -> Routing:
        """The routing of one call from s_0 [B, T, D]; padding, False in not_padding [B, T], is never chosen.

        topk: capacities by which each recurrence of expert-choice takes the best tokens of the sequence; with None it
        takes those that pass its threshold.
        """
        if self.fields["kind"] == "token":
            return TokenChoice(self, s, not_padding)
        return ExpertChoice(self, s, not_padding, topk)

    def update(self, before: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The new state [..., D] of tokens with the state `before`, for which the core gave y: see the top.

        weight: [..., 1], w in float32.
        """
        weight = weight.to(y.dtype)
        return before + weight * y if self.fields["update"] == "add" else interpolate(before, y, weight)

    def logits(self, network: nn.Module, s: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, R or 1] for s [B, T, D], computed in the type of the weights: a choice amplifies rounding."""
        with torch.autocast(s.device.type, enabled=False):
            return network((s / self.fields["temperature"]).to(next(network.parameters()).dtype)).float()


class Routing:
    """The choices of one call. For each recurrence: `select`, run the core on the chosen rows, `combine`.

    initial: s_0 [B, T, D]. candidates, selected: [B, T] of each recurrence so far, see RouterOutputs.
    """

    def __init__(self, router: Router, s: torch.Tensor, not_padding: torch.Tensor):
        self.router, self.initial, self.not_padding = router, s, not_padding
        self.candidates: list[torch.Tensor] = []
        self.selected: list[torch.Tensor] = []

    def select(self, r: int, s: torch.Tensor) -> torch.Tensor:
        """True [B, T] for the tokens that recurrence r, counted from 0, runs, by states s [B, T, D]. Stores it."""
        raise NotImplementedError

    def combine(self, r: int, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The new states of `rows`, which had the states x and for which the core gave y, [B, N, D]."""
        raise NotImplementedError

    def outputs(self) -> RouterOutputs:
        """Scores and choices of all recurrences so far."""
        raise NotImplementedError


class ExpertChoice(Routing):
    """Every recurrence chooses among the tokens of the one before."""

    def __init__(self, router: Router, s: torch.Tensor, not_padding: torch.Tensor, topk: Sequence[float] | None):
        super().__init__(router, s, not_padding)
        self.topk = topk
        self.logits: list[torch.Tensor] = []
        self.auxiliary: list[torch.Tensor] = []

    def select(self, r: int, s: torch.Tensor) -> torch.Tensor:
        router, fields = self.router, self.router.fields
        candidates = self.selected[-1] if self.selected else self.not_padding
        logits = router.logits(router.networks[r], s).squeeze(-1)
        self.logits.append(logits)
        if fields["auxiliary"]:
            self.auxiliary.append(router.logits(router.auxiliary[r], s.detach()).squeeze(-1))
        if self.topk is not None:
            counts = (self.not_padding.sum(1).double() * self.topk[r]).long().clamp(min=1)
            chosen = _best(logits.masked_fill(~candidates, -torch.inf), counts)
        else:
            deciding = self.auxiliary[-1] if self.auxiliary else logits
            chosen = torch.sigmoid(deciding) >= fields["thresholds"][r]
        self.candidates.append(candidates)
        self.selected.append(chosen & candidates)
        return self.selected[-1]

    def combine(self, r: int, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        gate = getattr(torch, self.router.fields["gate"])(self.logits[r]) * self.router.fields["alpha"]
        return self.router.update(x, y, rows.take(gate[..., None]))

    def outputs(self) -> RouterOutputs:
        return RouterOutputs(
            logits=torch.stack(self.logits, -1),
            auxiliary_logits=torch.stack(self.auxiliary, -1) if self.auxiliary else None,
            candidates=torch.stack(self.candidates, -1),
            selected=torch.stack(self.selected, -1),
        )


class TokenChoice(Routing):
    """Every token chooses its depth once, from s_0."""

    def __init__(self, router: Router, s: torch.Tensor, not_padding: torch.Tensor):
        super().__init__(router, s, not_padding)
        self.logits = router.logits(router.networks[0], s)
        gate = self.logits.softmax(-1) if router.fields["gate"] == "softmax" else self.logits.sigmoid()
        gate = gate * router.fields["alpha"]
        self.depth = (gate + router.bias.float()).argmax(-1)  # the last recurrence, counted from 0
        self.weight = gate.gather(-1, self.depth[..., None])

    def select(self, r: int, s: torch.Tensor) -> torch.Tensor:
        self.candidates.append(self.not_padding)
        self.selected.append(self.not_padding & (self.depth >= r))
        return self.selected[-1]

    def combine(self, r: int, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        ends = rows.take(self.depth[..., None]) == r
        last = self.router.update(rows.take(self.initial), y, rows.take(self.weight))
        return torch.where(ends, last, y)

    def outputs(self) -> RouterOutputs:
        return RouterOutputs(
            logits=self.logits, candidates=torch.stack(self.candidates, -1), selected=torch.stack(self.selected, -1)
        )


def _best(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """True [B, T] for the `counts` [B] greatest of scores [B, T]; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    among = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(among).scatter(1, order, among)


def capacities(
    fields: dict[str, Any], recurrences: int, given: Sequence[float] | None, training: bool
) -> Sequence[float] | None:
    """The capacities of a call that takes the best of the sequence; None where thresholds or tokens decide.

    given: capacities of the call, of an expert-choice router alone; default those of the router's `fields`, in training
    and with `inference="topk"`. Raises ValueError for a number of recurrences that the router lacks, and for capacities
    that are not shares in falling order.
    """
    expert = fields["kind"] == "expert"
    if recurrences > fields["depths"] or (recurrences < fields["depths"] and not expert):
        raise ValueError(
            f"num_recurrences={recurrences}: this model's {fields['kind']}-choice router has {fields['depths']}"
        )
    if given is not None:
        if not expert:
            raise ValueError("router_capacity is for expert-choice; every token of a token-choice router has its depth")
        check_capacity(list(given), fields["depths"])
        return given
    return fields["capacity"] if expert and (training or fields["inference"] == "topk") else None
