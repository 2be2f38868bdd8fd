"""Losses, right answers and states of a model at several depths, in one pass if the model allows it.

Shapes: B batch, T tokens, K kept positions, D width, R recurrences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..diagnosis import States, state_sums
from ..train.losses import cross_entropy, shifted
from .answers import Sequences


@dataclass
class Measured:
    """The result of `measure`; a plain model has the depth None.

    losses: by depth, the sum of each sequence [n] float64, in nats.   tokens: learned tokens of each sequence [n].
    right: by depth, True for each right answer [answers].   states: None if the model lacks states of all tokens.
    """

    losses: dict[int | None, np.ndarray]
    tokens: np.ndarray
    right: dict[int | None, np.ndarray]
    states: States | None


def in_one_pass(config: Any) -> bool:
    """True if a run at R passes through the states of all runs at fewer recurrences, and can be read out there."""
    return not config.router and config.sharing != "sequence" and not config.depends_on_recurrences


@torch.no_grad()
def measure(
    model: Any,
    sequences: Sequences,
    depths: list[int] | None,
    tokens_per_batch: int,
    report: Callable[[int], object] | None = None,
) -> Measured:
    """Losses and right answers of `model` on `sequences`, at `depths` (None for a plain model).

    tokens_per_batch: most tokens in a batch, with padding.   report: called with the number of sequences after each
    batch. Sets the model to eval mode.
    """
    model.eval()
    count = len(sequences.ids)
    keys: list[int | None] = [None] if depths is None else [*depths]
    losses = {key: np.zeros(count) for key in keys}
    hits = {key: [np.zeros(0, bool)] * count for key in keys}
    sums, seen = torch.zeros(()), 0
    for rows in _batches(sequences, tokens_per_batch):
        batch, labels = _batch(sequences, rows, model.device)
        real = labels != _PADDING
        targets = shifted(labels.masked_fill(~real, -100))
        places = (targets != -100).any(0).nonzero().squeeze(1)
        if len(places) < targets.shape[1]:  # an answer is a small part of its record
            batch["logits_to_keep"] = places
        kept = targets[:, places]
        found, states = _run(model, batch, kept, depths)
        for key, (loss, right) in found.items():
            losses[key][rows] = loss.double().sum(1).cpu().numpy()
            whole = torch.ones_like(targets, dtype=torch.bool)
            whole[:, places] = right
            for row, of_row in zip(rows, whole.cpu().numpy(), strict=True):
                hits[key][row] = of_row
        if states is not None:
            sums = sums + state_sums(states, real)
            seen += int(real.sum())
        if report:
            report(len(rows))
    right = {
        # The logits at a position predict the next token.
        key: np.array([bool(of_key[a.sequence][a.first - 1 : a.last].all()) for a in sequences.answers], bool)
        for key, of_key in hits.items()
    }
    tokens = np.array([int(learned[1:].sum()) for learned in sequences.learned])
    return Measured(losses, tokens, right, States.of(sums, seen) if seen else None)


_PADDING = -101


def _batches(sequences: Sequences, tokens: int) -> list[list[int]]:
    """Batches of sequence numbers, sorted by length. tokens: most tokens in a batch, with padding."""
    order = sorted(range(len(sequences.ids)), key=lambda i: len(sequences.ids[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * len(sequences.ids[i]) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _batch(sequences: Sequences, rows: list[int], device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """(arguments of the model, labels [B, T]): -100 for tokens that do not count, `_PADDING` for padding."""
    length = max(len(sequences.ids[i]) for i in rows)
    ids, labels = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), _PADDING, np.int64)
    for place, i in enumerate(rows):
        own = sequences.ids[i]
        ids[place, : len(own)] = own
        labels[place, : len(own)] = np.where(sequences.learned[i], own, -100)
    marked = torch.from_numpy(labels).to(device)
    batch: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    if (labels == _PADDING).any():
        batch["attention_mask"] = (marked != _PADDING).long()
    batch["sequence_ids"] = torch.tensor(rows, device=device)
    return batch, marked


def _read(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[2, B, K] from logits [B, K, V]: losses of the targets, and 1 for a likeliest or missing target."""
    right = (logits.argmax(-1) == targets) | (targets == -100)
    return torch.stack([cross_entropy(logits, targets), right.float()])


def _run(
    model: Any, batch: dict[str, Any], targets: torch.Tensor, depths: list[int] | None
) -> tuple[dict[int | None, tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
    """({depth: (losses [B, K], right [B, K])}, states [R, B, T, D] of the deepest run; None if it lacks some)."""
    if depths is None:
        del batch["sequence_ids"]
        read = {None: _read(model(**batch).logits, targets)}
        states = None
    elif in_one_pass(model.config):
        out = model(
            **batch,
            num_recurrences=max(depths),
            depth_loss=lambda _, logits: _read(logits, targets),
            depth_loss_at=depths,
            output_states=True,
        )
        read, states = dict(zip(depths, out.depth_losses, strict=True)), out.states
    else:
        keeps = not model.config.router and model.config.sharing != "sequence"
        read, states = {}, None
        for depth in sorted(depths):
            out = model(**batch, num_recurrences=depth, output_states=keeps)
            read[depth], states = _read(out.logits, targets), out.states
    return {key: (both[0], both[1].bool()) for key, both in read.items()}, states
