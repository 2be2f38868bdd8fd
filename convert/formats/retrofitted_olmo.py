"""Retrofitted recurrence of an OLMo 2 (arXiv 2511.07384): norms after attention and MLP, and of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Olmo2Config

from ..raw import RawTensors
from . import raven
from .base import Checkpoint, CheckpointMap, Format


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a retrofitted OLMo 2."""
    source: Any = Olmo2Config(**raven.layer_fields(fields), rope_parameters=raven.rope_parameters(fields))
    source.head_dim = raven.head_dim(fields)  # Olmo2Config declares none, and its model reads one
    norms = {"norm_1": "post_attention_layernorm", "norm_2": "post_feedforward_layernorm"}
    norms |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    return raven.map_checkpoint(fields, source, source.head_dim, norms)


class Reference(raven.Reference):
    """The authors' formulas."""

    def block(self, x: torch.Tensor, at: str) -> torch.Tensor:
        x = x + self.norm(self.attention(x, at), f"{at}norm_1")
        return x + self.norm(self.mlp(x, at), f"{at}norm_2")

    def turn(self, q: torch.Tensor, k: torch.Tensor, at: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm(q, f"{at}attn.q_norm"), self.norm(k, f"{at}attn.k_norm")


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas."""
    return Reference(checkpoint).logits(ids, depth, state)


FORMAT = Format(
    "retrofitted OLMo",
    raven.MODEL_TYPE,
    has=(f"{raven.BLOCK}attn.q_norm.weight",),
    lacks=(f"{raven.BLOCK}norm_3.weight",),
    mapping=mapping,
    reference=reference,
)
