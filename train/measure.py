"""Held-out loss per token at one depth, and what training costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .curriculum import Depth, capacities
from .data import Packed
from .losses import shifted
from .pretrained import is_recurrent


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


def parameter_costs(model: Any) -> tuple[int, int]:
    """Parameters, outside the embeddings, that a token meets once, and those that it meets in every recurrence."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(p.numel() for p in model.parameters())
    if head is None or head.weight is not embeddings.weight:  # a tied matrix works as the head
        total -= embeddings.weight.numel()
    recurring = 0
    if is_recurrent(model.config):
        recurring = sum(p.numel() for part in (model.core, model.injection) for p in part.parameters())
    return total - recurring, recurring


def token_flops(costs: tuple[int, int], depth: Depth | None, router: dict[str, Any] | None, step: int, warmup: int):
    """FLOPs that a token costs in training at `step`: 2 a parameter forward, 4 more backward; attention is left out.

    costs: as `parameter_costs`.   depth: None for a plain model.   router: of an expert-choice model, which sends
    through a recurrence only the share of its capacity, `warmup` steps of warm-up counted.
    """
    once, recurring = costs
    if depth is None:
        return 6 * (once + recurring)
    graded = depth.num_recurrences if depth.grad_recurrences is None else depth.grad_recurrences
    shares = [1.0] * depth.num_recurrences
    if router and router["kind"] == "expert":
        shares = capacities(router["capacity"], step, warmup)[: depth.num_recurrences]
    free = depth.num_recurrences - graded
    return round(6 * once + recurring * (2 * sum(shares[:free]) + 6 * sum(shares[free:])))
