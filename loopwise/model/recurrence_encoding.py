"""Encoding of position and recurrence: the coordinate embedding of Universal Transformers (arXiv 1807.03819)."""

from __future__ import annotations

import torch
from torch import nn


class RecurrenceEncoding(nn.Module):
    """s + weight * P_r(position), before recurrence r = 1, 2, ..:

        P_r(i)[2j] = sin(i / 10000^(2j/D)) + sin(r / 10000^(2j/D)),  P_r(i)[2j + 1] the same with cosines

    weight [D] starts at zero, so that a converted model still equals its source; the paper has ones.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, s: torch.Tensor, positions: torch.Tensor, recurrence: int) -> torch.Tensor:
        """s [B, T, D], positions [B or 1, T] within their sequences, `recurrence` counted from 1 -> [B, T, D]."""
        waves = self._waves(positions) + self._waves(torch.full_like(positions[:1, :1], recurrence))
        return s + self.weight * waves.to(s.dtype)

    def _waves(self, x: torch.Tensor) -> torch.Tensor:
        """Sines and cosines [.., D] of x [..], in float32."""
        width = self.weight.shape[0]
        pairs = torch.arange(0, width, 2, device=x.device, dtype=torch.float32)
        angles = x[..., None].float() * 10000.0 ** (-pairs / width)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :width]
