"""Huginn (arXiv 2502.05171): sandwich norms after the residual, rotary pairs of neighboring channels."""

from __future__ import annotations

from typing import Any

import torch

from ...model.configuration_sandwich import SandwichConfig
from ..raw import RawTensors
from . import raven
from .base import Checkpoint, CheckpointMap, Format


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a Huginn checkpoint. transformers rotates channels half a head apart, so rows are reordered."""
    layers = raven.layer_fields(fields)
    head_dim = layers["hidden_size"] // layers["num_attention_heads"]
    qk_bias = "transformer.prelude.0.attn.qk_bias" in raw.names()
    source = SandwichConfig(
        **layers,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("rope_base", raven.ROPE_BASE)},
        norm_after_residual=True,
        qk_bias=qk_bias,
        embedding_scale=raven.embedding_scale(fields),
    )
    norms = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "norm_3": "pre_feedforward_layernorm",
        "norm_4": "post_feedforward_layernorm",
    }
    order = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])
    result = raven.map_checkpoint(fields, source, head_dim, norms, order, qk_bias)
    result.fields["recurrence_norm"] = "last"
    return result


class Reference(raven.Reference):
    """The authors' formulas."""

    neighbors = True

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self.scale = checkpoint.config.hidden_size**0.5

    def block(self, x: torch.Tensor, at: str) -> torch.Tensor:
        x = self.norm(self.attention(self.norm(x, f"{at}norm_1"), at) + x, f"{at}norm_2")
        return self.norm(self.mlp(self.norm(x, f"{at}norm_3"), at) + x, f"{at}norm_4")

    def turn(self, q: torch.Tensor, k: torch.Tensor, at: str) -> tuple[torch.Tensor, torch.Tensor]:
        if not getattr(self.source, "qk_bias", False):
            return q, k
        bias = self.read(f"{at}attn.qk_bias").flatten(1)
        return q + bias[0], k + bias[1]

    def before_coda(self, s: torch.Tensor) -> torch.Tensor:
        return self.norm(s, "transformer.ln_f")


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas."""
    return Reference(checkpoint).logits(ids, depth, state)


FORMAT = Format("Huginn", raven.MODEL_TYPE, (f"{raven.BLOCK}norm_4.weight",), mapping, reference)
