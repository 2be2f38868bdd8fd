"""Exit rules: a lane leaves once it has converged.

The rules and their default thresholds are those of Huginn (arXiv 2502.05171, section 6 and its code), and Ouro's gate
(arXiv 2510.25741). A rule compares the result of a recurrence with that of the one before. The first is compared with
the initial state, with a uniform distribution, or with an entropy of 100.
Shapes: n lanes of a pass, m lanes of a call, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward import Forward
from .readings import Earlier, LogitMemory, LogitReadings, StateReadings, floored
from .state import State


@dataclass(frozen=True)
class Rule:
    """An exit rule. threshold: its default.   reads: "nothing", "state", "gate" or "logits"; the last of these costs
    coda and head at every depth.   value: readings -> [m].   rises: it fires where the value has reached the threshold;
    the other rules fire below theirs.   compares: it reads the distribution of the recurrence before."""

    threshold: float
    reads: str
    value: Callable[[Any], Tensor]
    rises: bool = False
    compares: bool = False

    def fires(self, value: Tensor, threshold: Tensor) -> Tensor:
        """[m]: lanes with this value [m] leave at this threshold [m]."""
        return value >= threshold if self.rises else value < threshold


RULES: dict[str, Rule] = {
    "fixed": Rule(0.0, "nothing", lambda x: x),  # reads no value
    "latent-diff": Rule(0.03, "state", lambda x: x.relative_change),
    "cosine": Rule(1e-3, "state", lambda x: 1 - x.cosine),
    "gate": Rule(1.0, "gate", lambda stays: 1 - stays, rises=True),  # probability of having left by now
    "entropy-diff": Rule(1e-3, "logits", lambda x: x.entropy_change()),
    "kl": Rule(1e-3, "logits", lambda x: x.divergence(), compares=True),
    "minp-kl": Rule(1e-5, "logits", lambda x: x.divergence(floored), compares=True),
    "argmax-stability": Rule(5.0, "logits", lambda x: x.stable(), rises=True),
}
NAMES = tuple(RULES)
NUMBER = {name: number for number, name in enumerate(NAMES)}
# (rule, rows [m], positions [m], depths [m] counted from 0, values [m]) of lanes that the rule may end
Watch = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]
CHUNK = 256  # lanes whose logits are computed together: those of a long prompt take gigabytes


class ExitRules:
    """The exit rules in use, with their memory for all lanes of a State."""

    def __init__(self, state: State, forward: Forward):
        self.state, self.forward = state, forward
        lanes, rows = len(state.lanes.row), state.config.max_num_seqs
        self.by_logits = LogitMemory(lanes, rows, forward.parts.config.vocab_size, state.device)
        self.stays = torch.zeros(lanes, device=state.device)  # probability that the lane has not left yet
        self.in_use: set[str] = set()  # rules of resident requests that read something
        self.watch: Watch | None = None  # gets what the rules read, in eager ticks

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, with one distribution for each row."""
        return self.stays.nbytes + self.by_logits.nbytes

    def reading(self, kind: str) -> list[str]:
        """Rules in use that read "state", "gate" or "logits"."""
        return [name for name in NAMES if name in self.in_use and RULES[name].reads == kind]

    def use(self, names: Iterable[str]) -> None:
        """Resident requests have these rules, and no others; other names are ignored."""
        self.in_use = {name for name in names if name in RULES and RULES[name].reads != "nothing"}

    def start(self, lanes: Tensor) -> None:
        """Positions start in `lanes` [m]: forget the readings of the positions before."""
        if "gate" in self.in_use:
            self.stays.index_fill_(0, lanes, 1.0)
        if self.reading("logits"):
            self.by_logits.start(lanes)

    def converged(
        self, which: Tensor, row: Tensor, position: Tensor, depth: Tensor, before: Tensor, after: Tensor
    ) -> Tensor:
        """[n]: lanes `which` [n], in rows at positions [n], leave by their rules.

        They recurred at `depth` [n] from the states before to those after [n, D]. Writes the rules' memory; rules that
        read logits run coda and head.
        """
        state, forward = self.state, self.forward
        may_exit = (state.lanes.may_exit[which] > 0) & ~state.lanes.exited[which]
        rule = torch.where(may_exit, state.requests.rule[row], NUMBER["fixed"])
        threshold = state.requests.threshold[row]
        converged = torch.zeros(len(which), dtype=torch.bool, device=which.device)

        def fires(name: str, readings: Any, some: Tensor | slice = slice(None)) -> Tensor:
            value = RULES[name].value(readings)
            if self.watch:
                mine = rule[some] == NUMBER[name]
                self.watch(name, *(each[mine] for each in (row[some], position[some], depth[some], value)))
            return RULES[name].fires(value, threshold[some])

        if names := self.reading("state"):
            readings = StateReadings(before, after)
            for name in names:
                converged |= (rule == NUMBER[name]) & fires(name, readings)
        if "gate" in self.in_use:
            stays = self.stays[which] * (1 - torch.sigmoid(forward.parts.gate(after).float()))
            self.stays.index_put_((which,), stays)
            converged |= (rule == NUMBER["gate"]) & fires("gate", stays)
        if names := self.reading("logits"):
            numbers = torch.tensor([NUMBER[name] for name in names], device=rule.device)
            readers = torch.isin(rule, numbers).nonzero().squeeze(1)
            if len(readers):
                requests, compare = state.requests, [NUMBER[name] for name in names if RULES[name].compares]
                kept, none = (which < state.num_decode_lanes) & (requests.max_in_flight[row] == 1), depth == 0
                again = torch.isin(rule, rule.new_tensor(compare)) & ~kept & ~none
                x, old = torch.zeros_like(after), again.nonzero().squeeze(1)
                if len(old):  # first, as the coda's KV entries are those of the last read-out
                    x[old] = forward.read_out(before[old], row[old], position[old])
                new = forward.read_out(after[readers], row[readers], position[readers])
                for some, part in zip(readers.split(CHUNK), new.split(CHUNK), strict=True):
                    logits = forward.logits(part)
                    for name in names:
                        mine = (rule[some] == NUMBER[name]).nonzero().squeeze(1)
                        if len(lanes := some[mine]):
                            old = lanes[again[lanes]]
                            earlier = forward.logits(x[old]) if len(old) else logits[:0]
                            then = Earlier(row[lanes], kept[lanes], none[lanes], earlier)
                            readings = LogitReadings(self.by_logits, which[lanes], logits[mine], then)
                            converged[lanes] = fires(name, readings, lanes)
        return converged & (depth + 1 >= state.requests.min_recurrences[row])
