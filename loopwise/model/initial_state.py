"""The initial state s_0, and its counter-based noise."""

from __future__ import annotations

import math

import torch

from .configuration_recurrent_depth import RecurrentDepthConfig

# Odd 64-bit multipliers of splitmix64 (Steele, Lea, Flood 2014), as signed integers: torch has no unsigned arithmetic.
_GOLDEN, _MIX1, _MIX2 = (m - (1 << 64) for m in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor, key: torch.Tensor | int) -> torch.Tensor:
    """One keyed splitmix64 round on int64: the output is a well-mixed function of (x, key)."""
    z = x * _GOLDEN + key
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def counter_bits(seed: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, width: int) -> torch.Tensor:
    """64 random bits for each of `width` channels, as int64 [..., width].

    A function of the integers (seed, sequence, position, channel) alone; the three tensors broadcast to [...].
    """
    channels = torch.arange(width, device=position.device)
    bits = _mix(seed.long(), 0)
    bits = _mix(sequence.long(), bits)
    bits = _mix(position.long(), bits)[..., None]
    return _mix(channels, bits)


def counter_normal(
    seed: int, sequence_ids: torch.Tensor, positions: torch.Tensor, width: int, cut: float = 3.0
) -> torch.Tensor:
    """Standard normal noise truncated at +-`cut`, a function of (seed, sequence, position, channel) alone.

    So batching, padding, caching and the number of ranks never change it. sequence_ids [B] and positions [B, T] are
    integers; the noise is float32 [B, T, width], on their device.
    """
    bits = counter_bits(
        torch.full_like(sequence_ids, seed, dtype=torch.int64)[:, None], sequence_ids[:, None], positions, width
    )
    uniform = (_shift(bits, 40).float() + 0.5) / (1 << 24)  # 24 bits: exact in float32, never 0 or 1
    low = 0.5 * math.erfc(cut / math.sqrt(2))
    return math.sqrt(2) * torch.erfinv(2 * (low + uniform * (1 - 2 * low)) - 1)


def initial_state(
    config: RecurrentDepthConfig, e: torch.Tensor, positions: torch.Tensor, sequence_ids: torch.Tensor | None
) -> torch.Tensor:
    """s_0 [B, T, D] for input e [B, T, D], by `config.state_init`; in the type of e.

    positions [B or 1, T] are within the sequences, padding not counted; sequence_ids [B] default to 0.
    """
    if config.state_init == "input":
        return e
    if config.state_init == "zeros":
        return torch.zeros_like(e)
    if sequence_ids is None:
        sequence_ids = positions.new_zeros(e.shape[0])
    noise = counter_normal(config.state_seed, sequence_ids, positions.expand(e.shape[:2]), e.shape[-1])
    return (noise * config.state_std).to(e.dtype)
