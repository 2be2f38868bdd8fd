"""Verification of a written checkpoint: reloaded, against the source architecture's own model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ..errors import UserError
from ..model.source_layers import layer_list_name
from ..unroll import config_with_layers
from .plan import Plan
from .relax import merged
from .source import SourceWeights, empty_model
from .stream import streamed

TOLERANCE = 1e-4  # of logits; equality is bit for bit unless weights were averaged or relaxed
DEPTH = 4  # checked no deeper: every recurrence computes the same


def verify(
    directory: Path,
    plan: Plan,
    source_config: Any,
    weights: SourceWeights,
    dtype: torch.dtype | None,
    seed: int,
    relaxed: bool = False,
) -> float:
    """Largest difference between the logits of the checkpoint in `directory`, reloaded, and of a plain model of the
    source architecture in which the source's layers are written out.

    Both hold one module's weights at a time, and run in the checkpoint's dtype (with LoRA, which no two ways compute to
    the last bit, in float32) on two random sequences, one padded on the left. Checked at one recurrence, and where more
    are layers written out and nothing else, also at the plan's R (at most DEPTH). An injection is checked from the
    state that it starts to preserve: s_0 = e where `state_init` is `input`, else zeros; from the model's own state the
    logits must be finite. So they must with a router, and the comparison, as the source has none, is without it. Layers
    that started at random, and LoRA factors, are taken from the checkpoint. Raises UserError above TOLERANCE.
    """
    ids, mask = sample(source_config, seed)
    deep = min(plan.num_recurrences, DEPTH)
    from_input = plan.state_init == "input" and plan.injection != "add"
    state = None if from_input else torch.zeros(*ids.shape, source_config.hidden_size)
    worst = 0.0
    with reloaded(directory, torch.float32 if relaxed else None) as (model, written), torch.no_grad():
        at = plan.num_recurrences if model.config.router else deep
        own = model(ids, attention_mask=mask, num_recurrences=at, use_cache=False).logits
        if not own[mask.bool()].isfinite().all():
            raise UserError(
                f"verification failed: from its initial state ({plan.state_init}), at {at} recurrences, the model's "
                "logits are not finite; nothing was written"
            )
        model.config.router = None
        plain = plan.injection == "none" and not plan.recurrence_residual and plan.halting == "none"
        for depth in sorted({1, deep} if plain else {1}):
            reference = _written_out(plan, source_config, weights, written, dtype, depth, model.dtype)
            want = reference(ids, attention_mask=mask, use_cache=False)
            got = model(ids, attention_mask=mask, num_recurrences=depth, initial_state=state, use_cache=False)
            worst = max(worst, difference(got.logits, want.logits, mask, f"at {depth} recurrences the written model"))
    return worst


def difference(got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor, what: str, tolerance=TOLERANCE) -> float:
    """Largest difference of logits [B, T, V] where mask [B, T] is set. Raises UserError above `tolerance`, or NaN."""
    found = (got.float() - want.float())[mask.bool()].abs().max().item()
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
def reloaded(directory: Path, dtype: torch.dtype | None) -> Iterator[tuple[Any, SourceWeights]]:
    """The model of the checkpoint in `directory`, in `dtype` or its own, its weights read when used; and these."""
    config: Any = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        empty = empty_model(config)
    with SourceWeights(directory, empty) as weights:
        yield streamed(lambda: empty_model(config), weights.read, dtype or config.dtype), weights


def _written_out(
    plan: Plan,
    source_config: Any,
    weights: SourceWeights,
    written: SourceWeights,
    cast: torch.dtype | None,
    depth: int,
    dtype: torch.dtype,
) -> Any:
    """The source architecture with prelude, `depth` times the core, and coda as layers of its own."""
    places = written.config.order(depth)
    config = config_with_layers(source_config, [getattr(plan, part)[n] for part, n, _ in places])
    with torch.device("meta"):
        layers = layer_list_name(empty_model(config), config.num_hidden_layers) + "."
    relaxation = written.config.relaxation or {"rank": {}, "own": []}

    def kept(name: str) -> torch.Tensor:  # rounded as it was written, whatever type it is computed in
        tensor = weights.read(name)
        return tensor.to(cast) if cast else tensor

    def read(name: str) -> torch.Tensor:
        if not name.startswith(layers):
            return kept(name)
        number, _, suffix = name.removeprefix(layers).partition(".")
        part, n, d = places[int(number)]
        d = min(d, len(plan.stands_for) - 1)
        path = suffix.removesuffix(".weight")
        if part == "core" and suffix in relaxation["own"]:
            return kept(f"{layers}{plan.stands_for[d][n]}.{suffix}")
        tied = tied_weight(part, n, suffix)
        return merged(written, n, path, d, tied) if part == "core" and path in relaxation["rank"] else tied

    def tied_weight(part: str, n: int, suffix: str) -> torch.Tensor:
        parents = [f"{layers}{parent}.{suffix}" for parent in plan.parents[part][n]]
        if not parents:
            return written.read(f"{part}.{n}.{suffix}")
        if len(parents) == 1:
            return kept(parents[0])
        mean = torch.stack([weights.read(parent).float() for parent in parents]).mean(0)
        return mean.to(cast or weights.dtype(parents[0]))

    model = streamed(lambda: empty_model(config), read, dtype)
    if plan.recurrence_norm == "each":
        for number, (part, n, _) in enumerate(places):
            if part == "core" and n == len(plan.core) - 1:
                model.get_submodule(f"{layers}{number}").register_forward_hook(_normed(written.config.norm_eps))
    return model


def _normed(eps: float) -> Any:
    def hook(layer: nn.Module, args: tuple, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        normed = nn.functional.rms_norm(first, first.shape[-1:], None, eps)
        return (normed, *out[1:]) if isinstance(out, tuple) else normed

    return hook
