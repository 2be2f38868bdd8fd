"""The parameters that take part in a token's pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


def active(config: PreTrainedConfig, name: str, parameter: Tensor) -> float:
    """The numbers of a layer's `parameter` that take part in a token's pass: of experts, those of the chosen ones."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    routed = ".experts." in name or parameter.dim() == 3 or name.endswith(("up_embed.weight", "down_embed.weight"))
    return parameter.numel() * (getattr(config, "num_experts_per_tok", 0) / experts if experts and routed else 1)
