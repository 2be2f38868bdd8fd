"""Mixture-of-Recursions in the engine (arXiv 2507.10524): a lane stops where its router says so, and does no more work.

Keys and values of a recurrence are those of the tokens that took part in it. They stand packed: the n-th token of a
request that took part in recurrence r has place n at its slot, so that attention reads no gaps, and nothing is stored
for tokens that stopped before. Shapes: n lanes of a call, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .loop import Loop


class Routing:
    """What a model's router (model.router.Router) makes of the lanes of a loop."""

    def __init__(self, loop: Loop, router: Any):
        self.loop, self.router, self.fields = loop, router, router.fields
        lanes, rows = loop.lanes, len(loop.requests.limit)
        self.first = self.fields["kv"] == "first-recursion"
        self.count = torch.zeros(rows, self.fields["depths"], dtype=torch.long, device=loop.device)  # packed so far
        self.weight = torch.zeros(len(lanes.row), device=loop.device)  # token-choice: of the last recurrence's output
        self.origin = torch.zeros_like(lanes.s)  # token-choice: s_0
        self.chosen = torch.zeros(len(lanes.row), dtype=torch.bool, device=loop.device)  # expert-choice: for the first

    def admit(self, row: int) -> None:
        self.count[row] = 0

    def begin(self, where: torch.Tensor) -> None:
        """Lanes `where` [n] have their s_0: token-choice gives them their depth, expert-choice may end them here."""
        lanes, router = self.loop.lanes, self.router
        s = lanes.s[where]
        if self.fields["kind"] == "token":
            logits = router.logits(router.networks[0], s)
            gate = logits.softmax(-1) if self.fields["gate"] == "softmax" else logits.sigmoid()
            gate = gate * self.fields["alpha"]
            depth = (gate + router.bias.float()).argmax(-1)
            lanes.target[where] = depth + 1
            self.weight[where] = gate.gather(-1, depth[:, None]).squeeze(-1)
            self.origin[where] = s
            return
        lanes.target[where] = 0
        self.chosen[where] = chosen = self._passes(torch.zeros_like(where), s)
        if not self.first:
            out = where[~chosen]
            lanes.left[out], self.loop.unread = 0, True
            lanes.running[out], lanes.exited[out], lanes.waiting[out] = False, True, True

    def places(self, row: torch.Tensor, position: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """Where [n] keys and values of lanes that recur at `depth` [n] stand, lanes of a row in order of position."""
        if self.first:
            return position
        group = row * self.count.shape[1] + depth
        order = group.argsort(stable=True)
        ordered = group[order]
        first = torch.searchsorted(ordered, ordered)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first
        place = self.count[row, depth] + rank
        self.count.view(-1).index_add_(0, group, torch.ones_like(group))
        return place

    def combine(
        self, which: torch.Tensor, depth: torch.Tensor, before: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new states [n, D] of lanes that recurred at `depth` [n] from `before` to the core's y; which leave."""
        lanes = self.loop.lanes
        if self.fields["kind"] == "token":
            ends = depth + 1 == lanes.target[which]
            last = self.origin[which] + self.weight[which][:, None].to(y.dtype) * y
            return torch.where(ends[:, None], last, y), ends
        gate = getattr(torch, self.fields["gate"])(self._logits(self.router.networks, depth, before))
        after = before + (gate * self.fields["alpha"])[:, None].to(y.dtype) * y
        limit = self.loop.requests.limit[lanes.row[which]]
        stays = (depth + 1 < limit) & self._passes((depth + 1).clamp(max=self.fields["depths"] - 1), after)
        if self.first:
            alone = (depth == 0) & ~self.chosen[which]  # ran for its keys and values only
            after, stays = torch.where(alone[:, None], before, after), stays & ~alone
        return after, ~stays

    def recurrences(self, which: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """Of lanes that leave after `depth` [n] passes, how many of these changed their state."""
        if self.first and self.fields["kind"] == "expert":
            return torch.where(self.chosen[which], depth, 0)
        return depth

    def _passes(self, depth: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        networks = self.router.auxiliary if self.fields["auxiliary"] else self.router.networks
        thresholds = torch.tensor(self.fields["thresholds"], device=s.device)
        return torch.sigmoid(self._logits(networks, depth, s)) >= thresholds[depth]

    def _logits(self, networks: Any, depth: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """[n], each by the network of its own depth."""
        out = torch.zeros(len(s), device=s.device)
        for number, network in enumerate(networks):
            of = (depth == number).nonzero().squeeze(1)
            if len(of):
                out[of] = self.router.logits(network, s[of]).squeeze(-1)
        return out
