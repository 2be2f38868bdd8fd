"""The section `objectives`: the terms of the training loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from loopwise.recipe import Count, Number, Section
from loopwise.unused import Unused

# Sections that choose the depths with a loss, of which a recipe has at most one.
DEPTHS = ("exits", "exit_gate", "nested", "progressive", "deep_supervision")


class Distillation(Section):
    """Divergence from a teacher's next-token distribution."""

    weight: Number = Field(default=1.0, gt=0, description="weight of the divergence, beside cross_entropy")
    teacher: str = Field(
        description="directory or hub id of the teacher, for example the source of the converted model"
    )
    revision: str | None = Field(default=None, description="revision of the teacher when it is a hub id")
    num_recurrences: Count | None = Field(
        default=None, description="R of a recurrent-depth teacher (default: the teacher's own)"
    )
    divergence: Literal["forward-kl", "reverse-kl"] = Field(
        default="forward-kl", description="KL(teacher || student) or KL(student || teacher)"
    )
    temperature: Number = Field(
        default=1.0, gt=0, description="temperature of both distributions; the divergence is multiplied by its square"
    )
    top_k: Count | None = Field(
        default=None,
        description="run the teacher once, before training, and keep its k most likely tokens on disk; the rest counts "
        "as one token (default: the teacher runs beside the model)",
    )


class Exits(Section):
    """A loss at every depth, not only at the last one."""

    weights: Literal["constant", "layerskip"] = Field(
        default="constant",
        description="constant: `intermediate` at every depth before the last, and 1 at the last (relaxed recursive "
        "transformers); layerskip: weights that grow with the depth and sum to 1",
    )
    intermediate: Number = Field(default=0.1, ge=0, description="weight of every depth before the last, for constant")
    scale: Number = Field(default=0.2, ge=0, le=1, description="LayerSkip's e_scale, for layerskip")
    target: Literal["labels", "final"] = Field(
        default="labels",
        description="target of the depths before the last: labels, or final for the last depth's distribution "
        "(forward KL, no gradient through the target)",
    )

    def unused(self) -> Iterator[Unused]:
        name, other = ("scale", "layerskip") if self.weights == "constant" else ("intermediate", "constant")
        why = f"it belongs to objectives.exits.weights={other}, not to {self.weights}"
        yield Unused(name, ("weights",), why)


class ExitGate(Section):
    """The expected loss under the exit gate, for a model that has one (Ouro, arXiv 2510.25741)."""

    stage: Literal["joint", "gate"] = Field(
        default="joint",
        description="joint: sum over depths of p_r loss_r - entropy H(p); gate: trains the gate only, on how much "
        "one more recurrence improves the loss",
    )
    entropy: Number = Field(default=0.1, ge=0, description="weight of the entropy at the first step, for joint")
    entropy_end: Number | None = Field(
        default=None, ge=0, description="weight of the entropy at the last step, for joint (default: entropy)"
    )
    slope: Number = Field(default=50.0, gt=0, description="k of sigmoid(k (improvement - threshold)), for gate")
    threshold: Number = Field(default=0.005, description="improvement that is worth another recurrence, for gate")

    def unused(self) -> Iterator[Unused]:
        joint = self.stage == "joint"
        for name in ("slope", "threshold") if joint else ("entropy", "entropy_end"):
            why = f"it belongs to objectives.exit_gate.stage={'gate' if joint else 'joint'}, not to {self.stage}"
            yield Unused(name, ("stage",), why)


class Progressive(Section):
    """Deep Thinking's progressive loss (arXiv 2202.05826): n recurrences without gradient, then k with, both random."""

    alpha: Number = Field(
        default=0.5, gt=0, le=1, description="weight of the loss after n + k <= R recurrences; the full R has the rest"
    )


class DeepSupervision(Section):
    """A loss at the end of each of several segments of the recurrences, between which the state is detached."""

    segments: Count = Field(
        ge=2, description="segments of equal length, at most R; the loss is the mean over their ends"
    )


class RouterLosses(Section):
    """Weights of the auxiliary losses of a mixture-of-recursions router."""

    auxiliary: Number = Field(
        default=0.001, ge=0, description="cross-entropy of predicting an expert-choice router's selection"
    )
    balancing: Number = Field(default=0.1, ge=0, description="sum of f_i P_i over the depths of a token-choice router")
    z_loss: Number = Field(default=0.0, ge=0, description="squared logsumexp of the router's logits")
    bias_step: Number = Field(
        default=0.0, ge=0, description="step of a token-choice router's bias towards balance (no loss term)"
    )


class Ponder(Section):
    """ACT's ponder cost, for a model with halting=act: recurrences until the halt, plus the remainder."""

    weight: Number = Field(default=0.01, gt=0, description="weight of the ponder cost")


class Objectives(Section):
    """The terms of the loss.

    cross_entropy and distillation make up the loss at one depth; exits, exit_gate, nested, progressive and
    deep_supervision choose the depths.
    """

    cross_entropy: Number = Field(default=1.0, ge=0, description="weight of the next-token cross-entropy")
    average: Literal["tokens", "blocks"] = Field(
        default="tokens",
        description="what counts alike in the loss: tokens with a target, or blocks. In a mixture with blocks, answers "
        "of a few tokens weigh as much as whole texts",
    )
    distillation: Distillation | None = None
    exits: Exits | None = None
    exit_gate: ExitGate | None = None
    nested: Count | None = Field(
        default=None,
        description="number of depths, drawn each step from 1 to R; their mean loss replaces the last (SortedNet)",
    )
    progressive: Progressive | None = None
    deep_supervision: DeepSupervision | None = None
    router: RouterLosses | None = None
    ponder: Ponder | None = None
    experts: Number = Field(
        default=0.0,
        ge=0,
        description="weight of the source's load-balancing loss, for mixtures of experts (transformers' "
        "router_aux_loss_coef), over the layers of all recurrences",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Objectives:
        ways = [name for name in DEPTHS if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{ways[0]} and {ways[1]} both weigh the depths: give one")
        if not self.cross_entropy and not self.distillation:
            raise ValueError("cross_entropy=0 leaves the loss empty; set distillation.teacher")
        return self
