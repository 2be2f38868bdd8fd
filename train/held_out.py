"""Held-out losses, right answers and states of a model during training, by recurrences.

Shapes: n blocks, B of a batch, T tokens, V vocabulary, R recurrences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from loopwise import diagnosis
from loopwise.diagnosis import Effect, States, state_sums

from .data import Answers, Packed
from .data.answers import accuracy
from .losses import cross_entropy, shifted

Depths = dict[int | None, "HeldOut"]  # by R; None for a plain model


@dataclass
class HeldOut:
    """A measurement of n blocks at one depth, in float64 on the CPU.

    losses [n]: sum of each block's losses, in nats.   tokens [n]: predicted tokens.   right [answers]: 1 for a right
    answer, each of whose tokens is the likeliest one. All are 0 where another rank has measured.
    """

    losses: torch.Tensor
    tokens: torch.Tensor
    right: torch.Tensor

    @property
    def loss(self) -> float:
        """Loss per token."""
        return float(self.losses.sum() / self.tokens.sum())


@torch.no_grad()
def held_out(
    model: PreTrainedModel,
    blocks: Packed,
    answers: Answers | None,
    num_recurrences: int | None,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    stopped: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Losses and right answers of this rank's share of `blocks`, and of the blocks of `answers` if it has others.

    num_recurrences: R, or None for a plain model.   shard: (rank, ranks); each rank takes every `ranks`-th batch.
    stopped: asked before each batch, in all ranks alike; True ends the measurement, which is None then. Sets the model
    to eval mode.
    """
    model.eval()
    count = len(answers.groups) if answers else 0
    found = HeldOut(*(torch.zeros(n, dtype=torch.float64) for n in (len(blocks), len(blocks), count)))
    alone = answers.alone if answers else None
    for batch in _batches(model, blocks, num_recurrences, batch_size, shard, stopped):
        if batch is None:
            return None
        own, logits, targets = batch
        found.losses[own] = cross_entropy(logits, targets).cpu().double().sum(1)
        found.tokens[own] = (targets != -100).sum(1).cpu().double()
        if answers and alone is None:
            _count_right(found.right, answers.numbers[own], logits, targets)
    if answers and alone is not None:
        size = batch_size * blocks.tokens.shape[1] // alone.tokens.shape[1]  # as many tokens
        for batch in _batches(model, alone, num_recurrences, size, shard, stopped, masked=True):
            if batch is None:
                return None
            own, logits, targets = batch
            _count_right(found.right, answers.numbers[own], logits, targets)
    return found


def _batches(
    model: PreTrainedModel,
    blocks: Packed,
    num_recurrences: int | None,
    batch_size: int,
    shard: tuple[int, int],
    stopped: Callable[[], bool],
    masked: bool = False,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor] | None]:
    """(places in `blocks`, logits [B, T, V], targets [B, T]) of this rank's batches, and None where it is stopped.

    masked: hide padding from the model. The other arguments are those of `held_out`.
    """
    rank, ranks = shard
    stride = ranks * batch_size
    for first in range(0, len(blocks), stride):
        if stopped():
            yield None
            return
        # A rank without a batch runs the first batch and drops it: all ranks must gather sharded weights.
        mine = first + rank * batch_size < len(blocks)
        start = first + rank * batch_size if mine else 0
        rows = range(start, min(start + batch_size, len(blocks)))
        batch = {name: torch.from_numpy(x).to(model.device) for name, x in blocks.rows(rows).items()}
        labels = batch.pop("labels")
        if masked:
            batch["attention_mask"] = torch.from_numpy(blocks.real(rows)).long().to(model.device)
        options = {}
        if num_recurrences is not None:
            sequence_ids = torch.arange(start, start + len(labels), device=model.device)
            options = {"num_recurrences": num_recurrences, "sequence_ids": sequence_ids}
        logits = model(use_cache=False, **batch, **options).logits
        if mine:
            yield slice(start, start + len(labels)), logits, shifted(labels)


def _count_right(right: torch.Tensor, numbers: np.ndarray, logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Set `right` [answers] for the answers of blocks with `numbers` [B, T], from logits [B, T, V], targets [B, T]."""
    predicted = torch.from_numpy(numbers[:, 1:].astype(np.int64))  # the logits at a position predict the next token
    wrong = (logits[:, :-1].argmax(-1) != targets[:, :-1]).cpu()
    right[predicted[predicted > 0] - 1] = 1
    right[predicted[(predicted > 0) & wrong] - 1] = 0


@torch.no_grad()
def states_of(model: PreTrainedModel, blocks: Packed, depth: int, count: int, device: torch.device) -> States:
    """The states of the tokens of `count` blocks at `depth` recurrences."""
    rows = range(min(count, len(blocks)))
    batch = blocks.rows(rows)
    inputs = {name: torch.from_numpy(x).to(device) for name, x in batch.items() if name != "labels"}
    sequence_ids = torch.arange(len(rows), device=device)
    keys = {"num_recurrences": depth, "sequence_ids": sequence_ids, "use_cache": False, "output_states": True}
    states = model(**inputs, **keys).states
    real = torch.from_numpy(blocks.real(rows)).to(device)
    return States.of(state_sums(states, real), int(real.sum()))


def metrics(found: Depths, answers: Answers | None, prefix: str) -> dict[str, float]:
    """`<prefix>_loss_r<R>`, and with answers `<prefix>_accuracy_r<R>` and `.._<group>`; of a plain model without R."""
    named: dict[str, float] = {}
    for recurrences, here in found.items():
        at = f"_r{recurrences}" if recurrences else ""
        named[f"{prefix}_loss{at}"] = here.loss
        if answers:
            name, shares = f"{prefix}_accuracy{at}", accuracy(answers.groups, here.right.bool().tolist())
            named[name] = shares["accuracy"]
            named |= {f"{name}_{group}": share["accuracy"] for group, share in shares["groups"].items()}
    return named


def state_logs(states: States | None) -> dict[str, float]:
    """`state_norm_r<r>` and `state_change_r<r>`; none without states."""
    if states is None:
        return {}
    norms = {f"state_norm_r{r}": x for r, x in enumerate(states.norm, 1)}
    return norms | {f"state_change_r{r}": x for r, x in enumerate(states.change, 2)}


def effect_of(found: Depths, states: States | None) -> Effect | None:
    """The effect of the recurrences; None for a plain model. states: at the most recurrences of `found`."""
    most, nothing = max(r or 0 for r in found), None
    if most >= 2 and (first := found.get(1)):
        sums = (x.numpy() for x in (first.losses, found[most].losses, first.tokens))
        _, _, nothing = diagnosis.gain(*sums)
    return Effect(most, nothing, states) if most else None
