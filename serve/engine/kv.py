"""KV policies: the slots that a recurrence reads and writes, and the slots that an exit leaves empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...model.configuration_recurrent_depth import policy_slots


@dataclass(frozen=True)
class KVPolicy:
    """One of RecurrentDepthConfig's policies, for at most `depths` recurrences. Depths count from 0 here.

    per-depth: a slot for every depth. A position that is read out early runs its other recurrences behind its
        successor, so every slot holds its full-depth value: exits save latency, not work.
    last-exited: the same slots; those that an early exit leaves empty get the keys and values of the exit's depth.
    single: one slot, overwritten by every recurrence. A prompt runs in lockstep: at each depth it attends to keys and
        values of that depth. Later tokens attend to those of its exit.
    first: one slot, of the first recurrence, read at every depth.
    routed: a slot for every depth, with keys and values of the tokens that a router sent there (see routing.py).
    modulo-k: depth mod k, overwritten; prompts as with `single`, exits before depth k as with `last-exited`.
    """

    name: str
    depths: int

    @property
    def slots(self) -> int:
        """Slots of a core layer."""
        return self.depths if self.name == "routed" else policy_slots(self.name, self.depths)

    @property
    def complete(self) -> bool:
        """An exited position runs its other recurrences, too."""
        return self.name == "per-depth"

    @property
    def overwrites(self) -> bool:
        """Several recurrences write one slot. Then prompts cannot be cut into chunks, and generated positions are
        replayed one by one."""
        return self.name not in ("per-depth", "last-exited", "routed", "first") and self.slots < self.depths

    def slot(self, depth: Tensor) -> Tensor:
        """Slot [N] that a recurrence at `depth` [N] reads and writes."""
        return depth if self.slots == self.depths else depth % self.slots

    @property
    def step(self) -> int | None:
        """Slot stride between consecutive recurrences; None if not constant."""
        if self.slots == self.depths:
            return 1
        return 0 if self.name == "single" else None

    def writes(self, depth: Tensor) -> Tensor | None:
        """[N]: the recurrence writes its slot; None: it always does."""
        return depth == 0 if self.name == "first" else None

    @property
    def fills(self) -> bool:
        """An early exit leaves slots empty, which then get its last keys and values."""
        return not self.complete and self.slots > 1 and self.name != "routed"

    def empty(self, depth: Tensor, limit: Tensor) -> Tensor:
        """Slots [N] that an exit after `depth` [N] recurrences leaves empty, for requests with num_recurrences `limit`
        [N]."""
        return (limit.clamp(max=self.slots) - depth).clamp(min=0)

    @property
    def shares(self) -> bool:
        """The keys and values of a block depend on its positions and those before alone, so requests can share it. A
        routed model packs them: a block holds later positions, too."""
        return not self.overwrites and self.name != "routed"


def policy_of(config: Any, name: str | None = None, depths: int | None = None) -> KVPolicy:
    """The policy of a model with this RecurrentDepthConfig (or its fields), or the one called `name`; a router has one
    of its own."""
    if config.router:
        name = "first" if config.router["kv"] == "first-recursion" else "routed"
    return KVPolicy(name or config.kv_policy, depths or config.max_recurrences)
