"""Exit rules: when a lane has recurred enough. Shapes: n lanes of a tick, D width, V vocabulary.

The rules and their default thresholds are those of Huginn (arXiv 2502.05171, section 6 and its code), and Ouro's gate
(arXiv 2510.25741). A rule compares what a recurrence gave with what the one before gave; the first is compared with the
initial state, with a uniform distribution, or with an entropy of 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .lanes import Lanes


class Rule(NamedTuple):
    """`reads`: nothing, the state, the exit gate, or the logits. The last costs coda and head at every depth."""

    threshold: float
    reads: str


RULES = {
    "fixed": Rule(0.0, "nothing"),
    "latent-diff": Rule(0.03, "state"),  # |s - s'| / |s| below it
    "cosine": Rule(1e-3, "state"),  # 1 - cos(s, s') below it
    "gate": Rule(1.0, "gate"),  # chance of having left by now, at least it
    "entropy-diff": Rule(1e-3, "logits"),  # |H(p) - H(p')| below it
    "kl": Rule(1e-3, "logits"),  # KL(p' || p) below it
    "minp-kl": Rule(1e-5, "logits"),  # the same, of distributions flattened below a tenth of their maximum
    "argmax-stability": Rule(5.0, "logits"),  # recurrences in a row without a new best token, at least it
}
NAMES = tuple(RULES)
NUMBER = {name: number for number, name in enumerate(NAMES)}
SOME = 256  # lanes whose logits are looked at together: those of a long prompt take gigabytes


@dataclass
class Readings:
    """What the rules may look at: states before and after [n, D], and functions that compute exit-gate logits [n], what
    the head reads [m, D] of lanes `which` [m] of the n, and next-token logits [m, V] of that."""

    before: torch.Tensor
    after: torch.Tensor
    gate: Callable[[], torch.Tensor]
    read: Callable[[torch.Tensor], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]


class ExitRules:
    """The rules' memory of all `lanes`. A row has one at a time that is to leave by a rule, unless it runs waves
    (`alone` is false)."""

    def __init__(self, lanes: Lanes, alone: bool, vocabulary: int):
        count, own, device = len(lanes.row), lanes.own, lanes.row.device
        self.place = number = torch.arange(count, device=device)  # in _log_p
        if alone:
            self.place = torch.where(number < own, number // lanes.ring, number - own + own // lanes.ring)
        self.vocabulary = vocabulary
        self.entropy = torch.zeros(count, device=device)
        self.best = torch.zeros(count, dtype=torch.long, device=device)
        self.stable = torch.zeros(count, dtype=torch.long, device=device)
        self.stays = torch.zeros(count, device=device)  # chance of not having left yet
        self._log_p = torch.zeros(0, vocabulary, device=device)  # of places from 0 to the last that a rule compared

    def begin(self, lanes: torch.Tensor, in_use: set[str]) -> None:
        """Forget what was known of `lanes` by the rules `in_use`: a position starts there."""
        if "gate" in in_use:
            self.stays.index_fill_(0, lanes, 1.0)
        if any(RULES[name].reads == "logits" for name in in_use):
            self.entropy.index_fill_(0, lanes, 100.0)
            self.best.index_fill_(0, lanes, -1)
            self.stable.index_fill_(0, lanes, 0)
            place = self.place[lanes]
            self._log_p[place[place < len(self._log_p)]] = -math.log(self.vocabulary)

    def check(
        self, in_use: set[str], lanes: torch.Tensor, rule: torch.Tensor, threshold: torch.Tensor, readings: Readings
    ) -> torch.Tensor:
        """Whether each of `lanes` [n] has converged, by its `rule` [n] (a NUMBER) and `threshold` [n]. `in_use` names
        the rules that occur, so that no others are computed."""
        converged = torch.zeros(len(lanes), dtype=torch.bool, device=lanes.device)
        if in_use & {"latent-diff", "cosine"}:
            before, after = readings.before.float(), readings.after.float()
            lengths = after.norm(dim=-1)
            if "latent-diff" in in_use:
                moved = (after - before).norm(dim=-1) / lengths
                converged |= (rule == NUMBER["latent-diff"]) & (moved < threshold)
            if "cosine" in in_use:
                cosine = (after * before).sum(-1) / lengths / before.norm(dim=-1)
                converged |= (rule == NUMBER["cosine"]) & (1 - cosine < threshold)
        if "gate" in in_use:
            stays = self.stays[lanes] * (1 - torch.sigmoid(readings.gate().float()))
            self.stays.index_put_((lanes,), stays)
            converged |= (rule == NUMBER["gate"]) & (1 - stays >= threshold)
        if any(RULES[name].reads == "logits" for name in in_use):
            reads = torch.tensor([RULES[name].reads == "logits" for name in NAMES], device=rule.device)
            which = reads[rule].nonzero().squeeze(1)
            if len(which):
                for some, x in zip(which.split(SOME), readings.read(which).split(SOME), strict=True):
                    logits = readings.logits(x)
                    converged[some] = self._by_logits(in_use, lanes[some], rule[some], threshold[some], logits)
        return converged

    def _by_logits(
        self, in_use: set[str], lanes: torch.Tensor, rule: torch.Tensor, threshold: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        p = logits.float().softmax(-1)
        entropy = -(p * (p + 1e-10).log()).sum(-1)
        changed = (entropy - self.entropy[lanes]).abs()
        self.entropy[lanes] = entropy

        best = p.argmax(-1)
        stable = torch.where(best == self.best[lanes], self.stable[lanes] + 1, 0)
        self.best[lanes], self.stable[lanes] = best, stable

        converged = torch.where(rule == NUMBER["argmax-stability"], stable >= threshold, changed < threshold)
        if not in_use & {"kl", "minp-kl"}:
            return converged
        flat = rule == NUMBER["minp-kl"]
        if "minp-kl" in in_use:
            floored = torch.where(p < 0.1 * p.amax(-1, keepdim=True), 1 / self.vocabulary, p)
            p = torch.where(flat[:, None], floored / floored.sum(-1, keepdim=True), p)
        compares = flat | (rule == NUMBER["kl"])
        return torch.where(compares, self._divergence(lanes, p) < threshold, converged)

    def _divergence(self, lanes: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """KL [n] of distributions p [n, V] of lanes from those of the recurrence before."""
        log_p, place = p.log(), self.place[lanes]
        more = int(place.max()) + 1 - len(self._log_p)
        if more > 0:
            self._log_p = torch.cat([self._log_p, p.new_full((more, self.vocabulary), -math.log(self.vocabulary))])
        old = self._log_p[place]
        self._log_p[place] = log_p
        weight = old.exp()
        return torch.where(weight > 0, weight * (old - log_p), 0).sum(-1)
