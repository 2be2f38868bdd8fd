"""What a call of a recurrent-depth model gives back.

Shapes: B batch, T tokens, D width, R recurrences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .router import RouterOutputs


@dataclass
class RecurrentDepthOutput(CausalLMOutputWithPast):
    """`state` [B, T, D] is s_R. On request: `states` [R, B, T, D] is s_1 .. s_R, and `exit_logits` [R, B, T] the exit
    gate's at each; `depth_logits` [R, B, T, V] are the logits read out after each recurrence; `depth_losses` is what
    `depth_loss` made of them; `hidden_states` are the inputs of every layer that ran, then the normed end.
    `router_outputs` tell what a router scored and chose. With halting, `ponder` [B, T] is each token's ponder cost, and
    `state` the mean that is read out."""

    last_state: torch.Tensor | None = None
    states: torch.Tensor | None = None
    depth_logits: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    depth_losses: tuple[torch.Tensor, ...] | None = None
    router_outputs: RouterOutputs | None = None
    ponder: torch.Tensor | None = None

    @property
    def state(self) -> torch.Tensor | None:
        """s_R. No field of its own: `generate` takes one of this name for a cache."""
        return self.last_state
