"""Mixture-of-Recursions in the engine (arXiv 2507.10524): a lane leaves where its router decides so.

Keys and values of a recurrence are those of the tokens that took part in it. They stand packed: the n-th token of a
request that took part in recurrence r has place n at its slot. So attention reads no gaps, and tokens that left before
take no memory. Shapes: n lanes of a call, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...model.router import Router
from .state import State
from .transitions import routers


class Routing:
    """A model's router, with its memory of a State's lanes and rows."""

    def __init__(self, router: Router, state: State):
        self.router, self.fields = router, router.fields
        lanes, rows, device = state.lanes, len(state.requests.live), state.device
        self.first = self.fields["kv"] == "first-recursion"
        self.count = torch.zeros(rows, self.fields["depths"], dtype=torch.long, device=device)  # tokens packed so far
        self.weight = torch.zeros(len(lanes.row), device=device)  # token-choice: weight of the last recurrence's output
        self.origin = torch.zeros_like(lanes.s)  # token-choice: s_0
        self.chosen = torch.zeros(len(lanes.row), dtype=torch.bool, device=device)  # expert-choice: runs recurrence 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))

    def admit(self, row: int) -> None:
        """A request comes to `row`."""
        self.count[row] = 0

    def start(self, state: State, where: Tensor) -> None:
        """Lanes `where` [n] have their s_0: token-choice sets their depth, expert-choice may end them here."""
        s = state.lanes.s[where]
        if self.fields["kind"] == "token":
            logits = self.router.logits(self.router.networks[0], s)
            gate = logits.softmax(-1) if self.fields["gate"] == "softmax" else logits.sigmoid()
            gate = gate * self.fields["alpha"]
            depth = (gate + self.router.bias.float()).argmax(-1)
            routers.set_exit(state, where, depth + 1)
            self.weight[where] = gate.gather(-1, depth[:, None]).squeeze(-1)
            self.origin[where] = s
            return
        routers.set_exit(state, where, 0)
        self.chosen[where] = chosen = self._passes(torch.zeros_like(where), s)
        if not self.first:
            routers.exit_at_once(state, where[~chosen])

    def places(self, row: Tensor, position: Tensor, depth: Tensor) -> Tensor:
        """Places [n] of the keys and values of lanes that recur at `depth` [n]; a row's lanes in order of position."""
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

    def combine(self, state: State, which: Tensor, depth: Tensor, before: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Lanes `which` [n] recurred at `depth` [n] from `before` to the core's y. Returns their new states [n, D], and
        which of them leave [n]."""
        lanes = state.lanes
        if self.fields["kind"] == "token":
            ends = depth + 1 == lanes.exit_at[which]
            last = self.router.update(self.origin[which], y, self.weight[which][:, None])
            return torch.where(ends[:, None], last, y), ends
        gate = getattr(torch, self.fields["gate"])(self._logits(self.router.networks, depth, before))
        after = self.router.update(before, y, (gate * self.fields["alpha"])[:, None])
        limit = state.requests.num_recurrences[lanes.row[which]]
        stays = (depth + 1 < limit) & self._passes((depth + 1).clamp(max=self.fields["depths"] - 1), after)
        if self.first:
            alone = (depth == 0) & ~self.chosen[which]  # the lane ran for its keys and values only
            after, stays = torch.where(alone[:, None], before, after), stays & ~alone
        return after, ~stays

    def recurrences(self, which: Tensor, depth: Tensor) -> Tensor:
        """Recurrences [n] that changed the state of lanes `which` [n], which leave after `depth` [n] passes."""
        if self.first and self.fields["kind"] == "expert":
            return torch.where(self.chosen[which], depth, 0)
        return depth

    def _passes(self, depth: Tensor, s: Tensor) -> Tensor:
        """[n]: the router of `depth` [n] lets the state s [n, D] recur."""
        networks = self.router.auxiliary if self.fields["auxiliary"] else self.router.networks
        thresholds = torch.tensor(self.fields["thresholds"], device=s.device)
        return torch.sigmoid(self._logits(networks, depth, s)) >= thresholds[depth]

    def _logits(self, networks: nn.ModuleList, depth: Tensor, s: Tensor) -> Tensor:
        """Logits [n] of s [n, D], each by the network of its own `depth` [n]."""
        out = torch.zeros(len(s), device=s.device)
        for number, network in enumerate(networks):
            of = (depth == number).nonzero().squeeze(1)
            if len(of):
                out[of] = self.router.logits(network, s[of]).squeeze(-1)
        return out
