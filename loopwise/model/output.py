"""The output of a call of a recurrent-depth model.

Shapes: B batch, T tokens, D width, R recurrences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .router import RouterOutputs


@dataclass
class RecurrentDepthOutput(CausalLMOutputWithPast):
    """Fields beyond transformers', None where they were not asked for.

    last_state: s_R [B, T, D]; with halting, the mean of states that is read out.
    states: s_1 .. s_R [R, B, T, D].
    depth_logits: logits [R, B, T, V] read out after each recurrence.
    exit_logits: those of the exit gate [R, B, T], at each of `states`.
    depth_losses: results of the argument `depth_loss`, one for each depth of `depth_loss_at`.
    router_outputs: scores and choices of the router.
    ponder: with halting, the ponder cost [B, T] of each token.
    router_logits: of a mixture of experts, [B T, experts] of every layer that ran; aux_loss: their balancing loss.
    hidden_states, as transformers': inputs [B, T, D] of every layer that ran, then the normed end.
    """

    last_state: torch.Tensor | None = None
    states: torch.Tensor | None = None
    depth_logits: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    depth_losses: tuple[torch.Tensor, ...] | None = None
    router_outputs: RouterOutputs | None = None
    ponder: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None

    @property
    def state(self) -> torch.Tensor | None:
        """`last_state`. A property, as `generate` takes a field of this name for a cache."""
        return self.last_state
