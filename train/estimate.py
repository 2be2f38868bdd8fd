"""Memory of a rank, counted on fake tensors: nothing is allocated."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from . import adapters, compute, optimisers
from .curriculum import Depth
from .objectives import Objective
from .recipe import Train

# Tensors that each launcher shards over the ranks.
SPLIT = {
    "fsdp2": {"weights", "gradients", "optimiser"},
    "zero1": {"optimiser"},
    "zero2": {"gradients", "optimiser"},
    "zero3": {"weights", "gradients", "optimiser"},
}


def estimate(config: Any, recipe: Train, launcher: str | None, ranks: int, depth: Depth | None) -> dict[str, int]:
    """Bytes of a rank at `depth`, the deepest step, by kind: weights, gradients, optimiser, activations.

    Activations are the tensors that autograd saves for one micro-batch. Not counted: a distillation's teacher, the
    largest layer that sharding launchers gather, and temporary buffers of kernels.
    """
    with FakeTensorMode() as mode:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if recipe.adapters:
            adapters.inject(model, recipe.adapters, None)
        optimisers.freeze(model, recipe.optimiser, recipe.objectives, recipe.adapters is not None)
        compute.configure(model, recipe.gradient_checkpointing, recipe.compile)
        weights = sum(p.numel() for p in model.parameters()) * 4
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
        muon = sum(p.numel() for g in optimisers.groups(model, recipe.optimiser) if g["muon"] for p in g["params"]) * 4
        kept = _saved(model.train(), recipe, depth, mode)
    found = {"weights": weights, "gradients": learning, "optimiser": 2 * learning - muon}
    split = SPLIT.get(launcher or "", set())
    return {**{kind: -(-size // ranks) if kind in split else size for kind, size in found.items()}, "activations": kept}


def _saved(model: Any, recipe: Train, depth: Depth | None, mode: FakeTensorMode) -> int:
    """Bytes that autograd saves for the backward pass of one micro-batch, without weights."""
    shape = (recipe.batch_size, recipe.data.sequence_length)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[torch.UntypedStorage] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own and storage._cdata not in sizes:
            alive.append(storage)  # so that its address is not used again
            sizes[storage._cdata] = storage.nbytes()
        return x

    ids = torch.zeros(shape, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids, "sequence_ids": torch.zeros(shape[0], dtype=torch.int64)}
    teacher = (lambda _: torch.zeros(*shape, model.config.vocab_size)) if recipe.objectives.distillation else None
    objective = Objective(recipe.objectives, model.config, teacher, 1, 0, 0)
    objective.selects, objective.all_valid = False, True  # fake tensors have no values
    objective.draw = lambda seed, step, recurrences: (0, recurrences)
    low = torch.autocast("cpu", torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), low:
        objective(model, inputs, 0, depth, 1)
    return sum(sizes.values())


def table(found: dict[str, int]) -> str:
    """The estimate as a table."""
    rows = [*found.items(), ("in all", sum(found.values()))]
    return "\n".join(f"  {kind:<12}{size / 2**30:>9.3f} GiB" for kind, size in rows)
