"""Retrofitted recurrence of a Llama (arXiv 2511.07384): two norms a layer, before attention and MLP."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from ..raw import RawTensors
from . import raven
from .base import Checkpoint, CheckpointMap, Format


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a retrofitted Llama."""
    head_dim = raven.head_dim(fields)
    layers = raven.layer_fields(fields)
    source = LlamaConfig(**layers, head_dim=head_dim, rope_parameters=raven.rope_parameters(fields))
    norms = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    return raven.map_checkpoint(fields, source, head_dim, norms)


class Reference(raven.Reference):
    """The authors' formulas."""

    def block(self, x: torch.Tensor, at: str) -> torch.Tensor:
        x = x + self.attention(self.norm(x, f"{at}norm_1"), at)
        return x + self.mlp(self.norm(x, f"{at}norm_2"), at)


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas."""
    return Reference(checkpoint).logits(ids, depth, state)


FORMAT = Format(
    "retrofitted Llama",
    raven.MODEL_TYPE,
    has=(f"{raven.BLOCK}norm_2.weight",),
    lacks=(f"{raven.BLOCK}norm_3.weight", f"{raven.BLOCK}attn.q_norm.weight", f"{raven.BLOCK}attn.qk_bias"),
    mapping=mapping,
    reference=reference,
)
