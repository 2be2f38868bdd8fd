"""Held-out loss at one depth, convergence of the state, and the FLOPs of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .curriculum import Depth
from .data import Packed
from .losses import shifted
from .pretrained import is_recurrent
from .schedule import capacities


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token losses of labels [B, T] under logits [B, T, V]: a scalar, in nats and float32."""
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
    """(sum of the losses of this rank's share of `blocks` in nats, float64; number of predicted tokens), scalars.

    num_recurrences: R, or None for a plain model.   shard: (rank, ranks); each rank takes every `ranks`-th batch.
    report: called with the number of blocks after each batch. Sets the model to eval mode.
    """
    model.eval()
    rank, ranks = shard
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    stride = ranks * batch_size
    for first in range(0, len(blocks), stride):
        # A rank without a batch runs the first batch and drops it: all ranks must gather sharded weights.
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


@torch.no_grad()
def state_changes(
    model: PreTrainedModel, blocks: Packed, depth: int, count: int, device: torch.device
) -> dict[str, float]:
    """|s_r - s_{r-1}| / |s_r| for r = 2 .. `depth`, as `state_change_r<r>`: means over the tokens of `count` blocks."""
    rows = blocks.rows(range(min(count, len(blocks))))
    inputs = {name: torch.from_numpy(x).to(device) for name, x in rows.items() if name != "labels"}
    sequence_ids = torch.arange(len(rows["labels"]), device=device)
    keys = {"num_recurrences": depth, "sequence_ids": sequence_ids, "use_cache": False, "output_states": True}
    states = model(**inputs, **keys).states.float()
    change = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1).clamp(min=1e-9)
    return {f"state_change_r{r}": x for r, x in enumerate(change.mean((1, 2)).tolist(), 2)}


def parameter_costs(model: Any) -> tuple[int, int]:
    """(parameters that a token uses once, parameters that it uses in every recurrence), without the embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(p.numel() for p in model.parameters())
    if head is None or head.weight is not embeddings.weight:  # a tied matrix is used as the head
        total -= embeddings.weight.numel()
    recurring = 0
    if is_recurrent(model.config):
        recurring = sum(p.numel() for part in (model.core, model.injection) for p in part.parameters())
    return total - recurring, recurring


def token_flops(
    costs: tuple[int, int], depth: Depth | None, router: dict[str, Any] | None, step: int, warmup: int
) -> int:
    """Training FLOPs per token at `step`: 2 per parameter forward, 4 backward. Attention is left out.

    costs: from `parameter_costs`.   depth: None for a plain model.   router: the config field. An expert-choice router
    sends only the share of its capacity through a recurrence; `warmup`: steps of its capacity warm-up.
    """
    once, recurring = costs
    if depth is None:
        return 6 * (once + recurring)
    graded = depth.num_recurrences if depth.grad_recurrences is None else depth.grad_recurrences
    shares = [1.0] * depth.num_recurrences
    if router and router["kind"] == "expert":
        shares = capacities(router["capacity"], step, warmup)[: depth.num_recurrences]
    ungraded = depth.num_recurrences - graded
    return round(6 * once + recurring * (2 * sum(shares[:ungraded]) + 6 * sum(shares[ungraded:])))
