"""Verification of a written checkpoint: reloaded, against the source architecture's own model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..errors import UserError
from ..model.source_layers import layer_list_name
from ..unroll import config_with_layers
from .plan import Plan
from .source import SourceWeights, empty_model
from .stream import streamed

TOLERANCE = 1e-4  # of logits; equality is bit for bit unless weights were averaged
DEPTH = 4  # checked no deeper: every recurrence computes the same


def verify(
    directory: Path, plan: Plan, source_config: Any, weights: SourceWeights, dtype: torch.dtype | None, seed: int
) -> float:
    """Largest difference between the logits of the checkpoint in `directory`, reloaded, and of a plain model of the
    source architecture in which the source's layers are written out.

    Both run in the checkpoint's dtype, holding one module's weights at a time, on two random sequences, one padded on
    the left. Checked at one recurrence, and without injection also at the plan's R (at most DEPTH). An injection is
    checked from the state that it starts to preserve: s_0 = e where `state_init` is `input`, else zeros; from the
    model's own state the logits must be finite. Raises UserError above TOLERANCE.
    """
    ids, mask = sample(source_config, seed)
    deep = min(plan.num_recurrences, DEPTH)
    from_input = plan.state_init == "input" and plan.injection != "add"
    state = None if from_input else torch.zeros(*ids.shape, source_config.hidden_size)
    worst = 0.0
    with reloaded(directory) as model, torch.no_grad():
        for depth in sorted({1, deep} if plan.injection == "none" else {1}):
            want = _written_out(plan, source_config, weights, dtype, depth, model.dtype)(ids, attention_mask=mask)
            got = model(ids, attention_mask=mask, num_recurrences=depth, initial_state=state, use_cache=False)
            worst = max(worst, difference(got.logits, want.logits, mask, f"at {depth} recurrences the written model"))
        own = model(ids, attention_mask=mask, num_recurrences=deep, use_cache=False).logits
        if not own[mask.bool()].isfinite().all():
            raise UserError(
                f"verification failed: from its initial state ({plan.state_init}), at {deep} recurrences, the model's "
                "logits are not finite; nothing was written"
            )
    return worst


def difference(got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor, what: str, tolerance=TOLERANCE) -> float:
    """Largest difference of logits [B, T, V] where mask [B, T] is set. Raises UserError above `tolerance`, or NaN."""
    found = (got - want)[mask.bool()].abs().max().item()
    if not found <= tolerance:
        raise UserError(
            f"verification failed: {what} has logits that differ by {found:.3g} from those expected, over "
            f"{tolerance:g}; nothing was written"
        )
    return found


def sample(config: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and their mask, both [2, T]: the first sequence is padded on the left."""
    length = min(32, getattr(config, "max_position_embeddings", None) or 32)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return ids, mask


@contextmanager
def reloaded(directory: Path) -> Iterator[Any]:
    """The model of the checkpoint in `directory`, in its dtype, its weights read as they are used."""
    config: Any = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        empty = empty_model(config)
    with SourceWeights(directory, empty) as weights:
        yield streamed(lambda: empty_model(config), weights.read, config.dtype)


def _written_out(
    plan: Plan, source_config: Any, weights: SourceWeights, cast: torch.dtype | None, depth: int, dtype: torch.dtype
) -> Any:
    """The source architecture with prelude, `depth` times the core, and coda as layers of its own."""
    config = config_with_layers(source_config, plan.prelude + plan.core * depth + plan.coda)
    parents = plan.parents["prelude"] + plan.parents["core"] * depth + plan.parents["coda"]
    with torch.device("meta"):
        layers = layer_list_name(empty_model(config), config.num_hidden_layers) + "."

    def read(name: str) -> torch.Tensor:
        names = [name]
        if name.startswith(layers):
            n, _, suffix = name.removeprefix(layers).partition(".")
            names = [f"{layers}{parent}.{suffix}" for parent in parents[int(n)]]
        if len(names) == 1:
            return weights.read(names[0])
        mean = torch.stack([weights.read(n).float() for n in names]).mean(0)
        return mean.to(cast or weights.dtype(names[0]))

    return streamed(lambda: empty_model(config), read, dtype)
