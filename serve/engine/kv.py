"""KV policies: which slots a recurrence reads and writes, and what happens to those that an exit leaves empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class KVPolicy:
    """One of RecurrentDepthConfig's policies, for at most `depths` recurrences. Depths count from 0 here.

    per-depth: a slot for every depth. A position that is read out early runs its other recurrences behind its
        successor, so every slot holds what it would at full depth: exits save latency, not work.
    last-exited: the same slots; those that an early exit leaves empty get the keys and values of the exit's depth.
    single: one slot, overwritten by every recurrence. A prompt runs in lockstep, all of it at every depth, so it
        attends at each depth to keys and values of that depth, and later tokens to those of its exit.
    first: one slot, of the first recurrence, read at every depth.
    routed: a slot for every depth, with keys and values of the tokens that a router sent there (see routing.py).
    modulo-k: depth mod k, overwritten; prompts as with `single`, exits before depth k as with `last-exited`.
    """

    name: str
    depths: int

    @property
    def slots(self) -> int:
        """Slots of a core layer."""
        if self.name in ("per-depth", "last-exited", "routed"):
            return self.depths
        return 1 if self.name in ("single", "first") else min(int(self.name.removeprefix("modulo-")), self.depths)

    @property
    def complete(self) -> bool:
        """Whether an exited position runs its other recurrences, too."""
        return self.name == "per-depth"

    @property
    def overwrites(self) -> bool:
        """Whether a slot is written by several recurrences: then prompts cannot be cut into chunks, and generated
        positions are replayed one by one."""
        return self.name not in ("per-depth", "last-exited", "routed", "first") and self.slots < self.depths

    def slot(self, depth: torch.Tensor) -> torch.Tensor:
        """Slot [N] that a recurrence at `depth` [N] reads and writes."""
        return depth if self.slots == self.depths else depth % self.slots

    @property
    def step(self) -> int | None:
        """How many slots a recurrence's lies behind the one's before, of the same position; None where that differs."""
        if self.slots == self.depths:
            return 1
        return 0 if self.name == "single" else None

    def writes(self, depth: torch.Tensor) -> torch.Tensor | None:
        """Whether [N] the recurrence writes; None: always."""
        return depth == 0 if self.name == "first" else None

    @property
    def fills(self) -> bool:
        """Whether an early exit leaves slots empty, which then get what was there last."""
        return not self.complete and self.slots > 1 and self.name != "routed"

    def empty(self, depth: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        """Slots [N] that an exit after `depth` recurrences leaves empty, of a request that may go to `limit`."""
        return (limit.clamp(max=self.slots) - depth).clamp(min=0)

    @property
    def shares(self) -> bool:
        """Whether a block of keys and values is what its positions and those before say, so that requests can share
        it. The places of a routed model's, which are packed, hold those of later positions, too."""
        return not self.overwrites and self.name != "routed"


def policy_of(config: Any, name: str | None = None, depths: int | None = None) -> KVPolicy:
    """Of a model with this RecurrentDepthConfig, or as named; a router has one of its own."""
    if config.router:
        name = "first" if config.router["kv"] == "first-recursion" else "routed"
    return KVPolicy(name or config.kv_policy, depths or config.max_recurrences)
