"""Embedding and head of a model in pieces, as functions that are compiled each by itself.

Shapes: N rows of a call, D hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from .parts import Parts


def embed(parts: Parts, tokens: Tensor, positions: Tensor) -> Tensor:
    """As Parts.embed."""
    return parts.embed(tokens, positions)


def logits(parts: Parts, x: Tensor) -> Tensor:
    """As Parts.logits."""
    return parts.logits(x)


def head(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] for the head's input [N, D], and the likeliest tokens [N]."""
    logits = parts.logits(x)
    wide = logits.float() if logits.element_size() < 4 else logits  # bfloat16's own argmax is slow on a CPU
    return logits, wide.argmax(-1)
