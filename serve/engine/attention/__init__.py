"""Attention of rows at mixed depths over a paged KV cache. In reading order:

base.py         rows of a call, the protocol of a backend, runs of queries
reference.py    the plain torch backend
triton.py       the Triton backend, for GPUs
"""

import torch


def attention_for(device: torch.device) -> type:
    """The backend for a device: Triton's kernels, which come with torch, on a GPU; torch's operations elsewhere."""
    if device.type == "cuda":
        from .triton import TritonAttention

        return TritonAttention
    from .reference import TorchAttention

    return TorchAttention
