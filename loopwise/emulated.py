"""Types of numbers that a processor multiplies in emulation."""

from __future__ import annotations


def advice(dtype: str, device: str, setting: str) -> str | None:
    """A line for who computes in `dtype` on a processor that has no units for it; None where all is well.

    dtype: as torch names it.   device: type of a torch device.   setting: what the line recommends, as `dtype=float32`.
    """
    import torch

    name = dtype.removeprefix("torch.")
    if device != "cpu" or name not in ("bfloat16", "float16"):
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX2":  # with AVX-512 bfloat16 is level; others were not measured
        return None
    return f"this CPU multiplies {name} in emulation: {setting} is 2 to 9 times as fast, with twice the memory"
