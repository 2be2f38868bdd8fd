"""The training loss of a micro-batch, from the recipe section `objectives`.

Every term is a sum over tokens, divided by the targets of the whole step, or by its blocks where these count alike. It
therefore depends neither on accumulation nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from loopwise.errors import UserError
from loopwise.model.some_logits import head_at

from . import losses
from .curriculum import Depth
from .recipe import DEPTHS, Objectives, Progressive
from .samplers import nested_depths, progressive_part
from .schedule import capacities, segment_ends

# Logits [B, T, V], or (ids, log-probabilities) [B, T, k] of the top k.
TeacherOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Targets(NamedTuple):
    """The targets of a micro-batch.

    ids [B, T]: the next token of every position, -100 for none.   valid [B, T]: True where there is one.   logits_at:
    `valid` if logits are computed there alone, else None. With it, ids, logits and teacher have one row of the N valid
    positions: [1, N] for [B, T].   weights [B, T]: what each position counts in the loss, None if all count 1.
    """

    ids: torch.Tensor
    valid: torch.Tensor
    logits_at: torch.Tensor | None
    teacher: TeacherOutput | None
    weights: torch.Tensor | None = None

    def weighed(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, one for each position [B, T] or for each target [1, N], times their weights."""
        if self.weights is None:
            return values
        return values * (self.weights if values.shape == self.valid.shape else self.weights[self.valid][None])

    @property
    def total(self) -> torch.Tensor:
        """The sum of the weights of all targets, a scalar."""
        return self.valid.sum() if self.weights is None else self.weights[self.valid].sum()


class Objective:
    """The loss of one run, for a model with `config`.

    teacher: returns the TeacherOutput for the inputs of a micro-batch, at `logits_at` [B, T] if that is not None.
    steps: of the run.   capacity_warmup: steps.   chosen: tokens [R] of this step by depth, for `bias_step` of a
    token-choice router.   selects: False to compute the logits of all positions.   all_valid: True to take every
    position for one with a target.   draw: (n, k) of a progressive loss from (seed, step, R).
    """

    selects = True
    all_valid = False

    def __init__(
        self,
        objectives: Objectives,
        config: Any,
        teacher: Callable[[dict[str, Any]], TeacherOutput] | None,
        steps: int,
        seed: int,
        capacity_warmup: int,
    ):
        self.objectives, self.teacher, self.steps, self.seed = objectives, teacher, steps, seed
        self.capacity_warmup = capacity_warmup
        self.router: dict[str, Any] | None = getattr(config, "router", None)
        self.chosen: torch.Tensor | None = None
        self.draw: Callable[[int, int, int], tuple[int, int]] = progressive_part

    def depths(self, step: int, recurrences: int) -> list[int]:
        """The depths of a step whose logits enter the loss, in order."""
        wanted = self.objectives
        if wanted.exits or wanted.exit_gate:
            return list(range(1, recurrences + 1))
        if wanted.deep_supervision:
            return segment_ends(recurrences, wanted.deep_supervision.segments)
        if wanted.nested:
            return nested_depths(self.seed, step, recurrences, wanted.nested)
        return [recurrences]

    def passes(self, step: int, depth: Depth) -> list[tuple[float, Depth]]:
        """The calls of the model at `step`, whose curriculum is at `depth`: (weight of the loss, depth of the call)."""
        wanted = self.objectives.progressive
        if wanted is None:
            return [(1.0, depth)]
        before, after = self.draw(self.seed, step, depth.num_recurrences)
        graded = after if depth.grad_recurrences is None else min(after, depth.grad_recurrences)
        found = [(1 - wanted.alpha, depth), (wanted.alpha, Depth(before + after, graded))]
        return [(weight, one) for weight, one in found if weight]

    def __call__(
        self,
        model: Any,
        inputs: dict[str, Any],
        step: int,
        depth: Depth | None,
        targets_of_step: torch.Tensor | int,
    ) -> torch.Tensor:
        """The loss of a micro-batch: a scalar, summed over its targets and divided by `targets_of_step`.

        With objectives.average=blocks the targets of a block count 1 together, and `targets_of_step` is the number of
        blocks.

        inputs: input_ids, labels [B, T], sequence_ids [B], position_ids [B, T] if documents are separated, and
        num_recurrences [B] if rows have their own.   depth: None for a plain model. Adds to `chosen`.
        """
        batch = self._targets(inputs)
        keys = {name: inputs[name] for name in ("position_ids",) if name in inputs}
        if self.objectives.experts:
            keys["output_router_logits"] = True
        if depth is None:
            with head_at(getattr(model, "module", model).get_output_embeddings(), batch.logits_at):
                outputs = model(input_ids=inputs["input_ids"], use_cache=False, **keys)
            total = batch.weighed(self._plain(outputs.logits, batch)).sum() + self._experts(outputs, batch)
        else:
            found = [w * self._at_depth(model, inputs, step, x, batch, {**keys}) for w, x in self.passes(step, depth)]
            total = torch.stack(found).sum() if found[1:] else found[0]
        return total / targets_of_step

    def _at_depth(
        self, model: Any, inputs: dict[str, Any], step: int, depth: Depth, batch: Targets, keys: dict[str, Any]
    ) -> torch.Tensor:
        """The sum of the losses of a call at `depth`. keys: more arguments of the model."""
        at = self.depths(step, depth.num_recurrences)
        recurrences = at[-1]
        if depth.grad_recurrences is not None:
            keys["grad_recurrences"] = min(depth.grad_recurrences, recurrences)
        if self.router and self.capacity_warmup and self.router["kind"] == "expert":
            keys["router_capacity"] = capacities(self.router["capacity"], step, self.capacity_warmup)
        if len(at) > 1 or self.objectives.exit_gate:
            keys |= {"depth_loss": self._depth_loss(batch, recurrences), "depth_loss_at": at}
        if self.objectives.deep_supervision:
            keys["detach_after"] = at[:-1]
        if batch.logits_at is not None:
            keys["logits_to_keep"] = batch.logits_at
        outputs = model(
            input_ids=inputs["input_ids"],
            use_cache=False,
            num_recurrences=inputs.get("num_recurrences", recurrences),
            sequence_ids=inputs["sequence_ids"],
            **keys,
        )
        if outputs.depth_losses is None:
            total = batch.weighed(self._plain(outputs.logits, batch)).sum()
        else:
            total = self._at(batch.ids != -100, batch.weighed(self._of_depths(outputs, step, at, batch))).sum()
        return total + self._auxiliary(outputs, batch)

    def _targets(self, inputs: dict[str, Any]) -> Targets:
        """The targets of a micro-batch. Logits are computed at them alone where at most half of the positions have one.

        In other batches, such as those of text, little would be saved.
        """
        ids = losses.shifted(inputs["labels"])
        valid = ids != -100
        few = self.selects and 0 < int(valid.sum()) <= valid.numel() // 2
        logits_at = valid if few else None
        given = None
        if self.teacher is not None:
            with torch.no_grad():
                given = self.teacher({**inputs, "logits_at": logits_at})
        weights = None
        if self.objectives.average == "blocks":  # the targets of a block count 1 together
            weights = valid / valid.sum(1, keepdim=True).clamp(min=1)
        return Targets(ids[valid][None] if few else ids, valid, logits_at, given, weights)

    def _at(self, valid: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The `values` [B, T] of positions with a target: [N]."""
        return values if self.all_valid else values[valid]

    def _plain(self, logits: torch.Tensor, batch: Targets) -> torch.Tensor:
        """The loss of one depth per token [B, T]: cross-entropy and distillation. 0 for a token without a target."""
        wanted, targets, given = self.objectives, batch.ids, batch.teacher
        total: Any = 0.0
        if wanted.cross_entropy:
            total = wanted.cross_entropy * losses.cross_entropy(logits, targets)
        if wanted.distillation:
            keys = (wanted.distillation.temperature, wanted.distillation.divergence == "reverse-kl")
            if isinstance(given, tuple):
                apart = losses.by_chunks(lambda s, i, p: losses.top_k_divergence(s, i, p, *keys), logits, *given)
            else:
                apart = losses.by_chunks(lambda s, t: losses.divergence(s, t, *keys), logits, cast(torch.Tensor, given))
            total = total + wanted.distillation.weight * apart * (targets != -100)
        return total

    def _depth_loss(self, batch: Targets, last: int) -> Any:
        """The function that the model calls with the logits of every depth, the last depth first."""
        distils = self.objectives.exits is not None and self.objectives.exits.target == "final"
        final: list[torch.Tensor] = []

        def loss(depth: int, logits: torch.Tensor) -> torch.Tensor:
            if distils and depth != last:
                return losses.by_chunks(lambda s, t: losses.divergence(s, t, 1.0, False), logits, final[0])
            if distils:
                final.append(logits.detach())
            return self._plain(logits, batch)

        return loss

    def _of_depths(self, outputs: Any, step: int, at: list[int], batch: Targets) -> torch.Tensor:
        """The losses of all depths combined into one per token [B, T]."""
        wanted, found = self.objectives, outputs.depth_losses
        if wanted.exits:
            if wanted.exits.weights == "constant":
                weights = [wanted.exits.intermediate] * (len(at) - 1) + [1.0]
            else:
                weights = losses.layerskip_weights(len(at), wanted.exits.scale)
            return losses.weighted(found, weights)
        if not wanted.exit_gate:
            return losses.weighted(found, [1 / len(at)] * len(at))
        gate, logits = wanted.exit_gate, outputs.exit_logits
        if batch.logits_at is not None:
            logits = logits[:, batch.logits_at][:, None]
        if gate.stage == "gate":
            return losses.gate_loss(torch.stack(found), logits, gate.slope, gate.threshold)
        end = gate.entropy if gate.entropy_end is None else gate.entropy_end
        entropy = gate.entropy + (end - gate.entropy) * step / max(1, self.steps - 1)
        return losses.expected_loss(torch.stack(found), logits, entropy)

    def _auxiliary(self, outputs: Any, batch: Targets) -> Any:
        """The terms for ponder cost, routers and experts. A mean over tokens is added once per target."""
        wanted = self.objectives
        total: Any = 0.0
        if wanted.ponder:
            total = wanted.ponder.weight * self._at(batch.valid, batch.weighed(outputs.ponder)).sum()
        if wanted.router and self.router:
            total = total + batch.total * self._routing(outputs.router_outputs)
        return total + self._experts(outputs, batch)

    def _experts(self, outputs: Any, batch: Targets) -> Any:
        weight = self.objectives.experts
        return weight * batch.total * outputs.aux_loss if weight else 0.0

    def _routing(self, routed: Any) -> Any:
        weights = self.objectives.router
        assert weights is not None
        assert self.router is not None
        total: Any = 0.0
        if self.router["kind"] == "expert":
            logits = routed.logits if routed.auxiliary_logits is None else routed.auxiliary_logits
            if weights.auxiliary:
                total = weights.auxiliary * losses.router_prediction(logits, routed.selected, routed.candidates)
            if weights.z_loss:
                total = total + weights.z_loss * losses.z_loss(routed.logits[routed.candidates][:, None])
            return total
        depths = (routed.selected.sum(-1) - 1).clamp(min=0)
        if weights.balancing:
            probabilities = routed.logits.softmax(-1)
            total = weights.balancing * losses.balancing_loss(probabilities.flatten(0, 1), depths.flatten())
        if weights.z_loss:
            total = total + weights.z_loss * losses.z_loss(routed.logits)
        if weights.bias_step:
            counts = F.one_hot(depths.flatten(), routed.logits.shape[-1]).sum(0)
            self.chosen = counts if self.chosen is None else self.chosen + counts
        return total


def check(objectives: Objectives, config: Any, recurrent: bool) -> None:
    """Raises UserError for an objective that the model with `config` cannot compute."""
    if not recurrent:
        for name in (*DEPTHS, "router", "ponder"):
            if getattr(objectives, name) is not None:
                raise UserError(f"objectives.{name} belongs to recurrent-depth models; this is a {config.model_type}")
        return
    if objectives.exit_gate is not None and not config.exit_gate:
        raise UserError("objectives.exit_gate: this model has no exit gate; import one that has (Ouro)")
    if objectives.ponder is not None and config.halting != "act":
        raise UserError("objectives.ponder: this model's tokens do not halt; convert it with halting=act")
    if objectives.router is not None and not getattr(config, "router", None):
        raise UserError("objectives.router: this model has no router; convert it with method=mor")
    if config.sharing == "sequence":
        for name in DEPTHS:
            if getattr(objectives, name) is not None:
                raise UserError(
                    f"objectives.{name}: with sharing='sequence' the model has logits of the last depth only"
                )
    if objectives.deep_supervision is not None and config.halting == "act":
        raise UserError(
            "objectives.deep_supervision: with halting=act every depth is a mean of all states before it, which no "
            "segment has alone"
        )
    if objectives.progressive is not None:
        _check_progressive(objectives.progressive, config)


def _check_progressive(progressive: Progressive, config: Any) -> None:
    router = getattr(config, "router", None)
    if router and router["kind"] == "token":
        raise UserError(
            f"objectives.progressive: its calls have fewer recurrences, and this model's token-choice router runs "
            f"exactly {router['depths']}"
        )
    if progressive.alpha == 1 and config.injection == "none":
        raise UserError(
            "objectives.progressive.alpha=1: with injection='none', recurrences without gradient would leave the "
            "embeddings and the prelude of this model without gradient; lower alpha, or convert with injection=linear"
        )
