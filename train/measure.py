"""Held-out loss per token at one depth."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .data import Packed
from .losses import shifted


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token losses of labels [B, T] under logits [B, T, V], in float32."""
    targets = shifted(labels).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    blocks: Packed,
    num_recurrences: int | None,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    report: Callable[[int], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of losses of this rank's share of the blocks in float64, tokens that it predicted).

    num_recurrences: R, or None for a model without recurrence.   shard: (rank, ranks): every rank takes every
    `ranks`-th batch.   report: told the number of blocks after each batch.
    """
    model.eval()
    rank, ranks = shard
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    stride = ranks * batch_size
    for first in range(0, len(blocks), stride):
        # A rank without a batch left runs the first one and drops it: sharded weights are gathered by all ranks.
        mine = first + rank * batch_size < len(blocks)
        start = first + rank * batch_size if mine else 0
        rows = blocks.rows(range(start, min(start + batch_size, len(blocks))))
        batch = {name: torch.from_numpy(x).to(model.device) for name, x in rows.items()}
        labels = batch.pop("labels")
        options = {}
        if num_recurrences is not None:
            sequence_ids = torch.arange(start, start + len(labels), device=model.device)
            options = {"num_recurrences": num_recurrences, "sequence_ids": sequence_ids}
        logits = model(use_cache=False, **batch, **options).logits
        total += token_losses(logits, labels).cpu().double() * mine
        count += int((labels[:, 1:] != -100).sum()) * mine
        if report:
            report(len(labels))
    return total.to(model.device), torch.tensor(count, device=model.device)
