"""Logits at some positions only: the head, a large part of a small model, is not computed at the others.

Shapes: B batch, T tokens, D width, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def head_at(head: nn.Module | None, positions: torch.Tensor | None) -> Generator[None, None, None]:
    """A block in which `head` computes logits [1, N, V] at the N True entries of `positions` [B, T], row by row.

    head: a module of states [B, T, D]. None for `positions` changes nothing.
    """
    if head is None or positions is None:
        yield
        return
    places = positions.flatten().nonzero().squeeze(-1)

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1).index_select(0, places)[None], *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
