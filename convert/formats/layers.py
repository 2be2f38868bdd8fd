"""Layer formulas that several formats share, for their references. Shapes: B batch, T tokens, D width, H heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Olmo2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .base import Known

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines [T, head size / 2]
Layer = Callable[[torch.Tensor, str], torch.Tensor]
TABLE = 0.01  # greatest difference of a stored rotary table from the computed one: bfloat16 rounds by 0.004


def rotary(source: LlamaConfig | Olmo2Config | Qwen3Config, length: int) -> Rotation:
    """Cosines and sines of positions 0 to `length` - 1, both times YaRN's scale of attention (arXiv 2309.00071, section
    3.4), which is 1 for other kinds."""
    config: Any = source
    embedding = LlamaRotaryEmbedding(config=config)
    frequencies = embedding.inv_freq
    assert isinstance(frequencies, torch.Tensor)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos() * embedding.attention_scaling, angles.sin() * embedding.attention_scaling


def rotary_table(base: float, head_dim: int, length: int) -> Known:
    """Cosines and sines [1, T, 1, head size / 2, 2] of positions 0 to `length` - 1, as Huginn and Parcae store them."""

    def values(_: object) -> torch.Tensor:
        frequencies = base ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        angles = torch.outer(torch.arange(length).double(), frequencies)[None, :, None]
        return torch.stack([angles.cos(), angles.sin()], -1)

    return Known(f"the rotary table of rope_base={base:g}", values, TABLE)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [.., D] over its root mean square, times weight [D]."""
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def named_layers(read: Callable[[str], torch.Tensor], eps: float) -> tuple[Layer, Layer]:
    """(RMS norm, linear layer without bias): functions of x [.., D] and the name of the layer."""

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        return rms_norm(x, read(f"{at}.weight"), eps)

    def linear(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.linear(x, read(f"{at}.weight"))

    return norm, linear


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    head_dim: int,
    rotation: Rotation,
    *,
    neighbors: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with rotary positions: queries [B, T, H head_dim], keys and values of as many or fewer heads -> the
    shape of the queries.

    Causal, or by `mask` [T, T], True where a row attends. Rotated pairs are `neighbors`, or half a head apart.
    """
    cos, sin = rotation
    q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (queries, keys, values))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbors else x.chunk(2, dim=-1)
        a, b = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        return torch.stack([a, b], -1).flatten(-2) if neighbors else torch.cat([a, b], -1)

    out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)
