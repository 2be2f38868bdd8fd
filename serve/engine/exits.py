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


@dataclass
class Readings:
    """What the rules may look at: states before and after [n, D], and functions that compute exit-gate logits [n], and
    next-token logits [m, V] for lanes `which` [m] of the n."""

    before: torch.Tensor
    after: torch.Tensor
    gate: Callable[[], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]


class ExitRules:
    """The rules' memory of all lanes."""

    def __init__(self, lanes: int, vocabulary: int, device: torch.device):
        self.vocabulary = vocabulary
        self.entropy = torch.zeros(lanes, device=device)
        self.best = torch.zeros(lanes, dtype=torch.long, device=device)
        self.stable = torch.zeros(lanes, dtype=torch.long, device=device)
        self.stays = torch.zeros(lanes, device=device)  # chance of not having left yet
        self._log_p = torch.zeros(0, vocabulary, device=device)  # of lanes from 0 to the last that a rule read

    def begin(self, lanes: torch.Tensor, in_use: set[str]) -> None:
        """Forget what was known of `lanes` by the rules `in_use`: a position starts there."""
        if "gate" in in_use:
            self.stays.index_fill_(0, lanes, 1.0)
        if any(RULES[name].reads == "logits" for name in in_use):
            self.entropy.index_fill_(0, lanes, 100.0)
            self.best.index_fill_(0, lanes, -1)
            self.stable.index_fill_(0, lanes, 0)
            self._log_p[lanes[lanes < len(self._log_p)]] = -math.log(self.vocabulary)

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
                converged[which] = self._by_logits(lanes[which], rule[which], threshold[which], readings.logits(which))
        return converged

    def _by_logits(
        self, lanes: torch.Tensor, rule: torch.Tensor, threshold: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        p = logits.float().softmax(-1)
        entropy = -(p * (p + 1e-10).log()).sum(-1)
        changed = (entropy - self.entropy[lanes]).abs()
        self.entropy[lanes] = entropy

        best = p.argmax(-1)
        stable = torch.where(best == self.best[lanes], self.stable[lanes] + 1, 0)
        self.best[lanes], self.stable[lanes] = best, stable

        flat = rule == NUMBER["minp-kl"]
        floored = torch.where(p < 0.1 * p.amax(-1, keepdim=True), 1 / self.vocabulary, p)
        p = torch.where(flat[:, None], floored / floored.sum(-1, keepdim=True), p)
        log_p = p.log()
        more = int(lanes.max()) + 1 - len(self._log_p)
        if more > 0:
            self._log_p = torch.cat([self._log_p, p.new_full((more, self.vocabulary), -math.log(self.vocabulary))])
        old = self._log_p[lanes]
        divergence = torch.where(old.exp() > 0, old.exp() * (old - log_p), 0).sum(-1)
        self._log_p[lanes] = log_p

        return torch.where(
            rule == NUMBER["entropy-diff"],
            changed < threshold,
            torch.where(rule == NUMBER["argmax-stability"], stable >= threshold, divergence < threshold),
        )
