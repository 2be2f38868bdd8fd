"""Verification of a written checkpoint: reloaded, against the source architecture's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import UserError
from ..model import RecurrentDepthForCausalLM
from ..model.source_layers import layer_list_name
from ..unroll import config_with_layers
from .plan import Plan
from .source import SourceWeights, empty_model

TOLERANCE = 1e-4  # float32 logits; equality is bit for bit unless weights were averaged or cast


def verify(
    directory: Path, plan: Plan, source_config: Any, weights: SourceWeights, dtype: torch.dtype | None, seed: int
) -> float:
    """Largest difference between the logits (float32) of the checkpoint in `directory`, reloaded, and of a plain model
    of the source architecture in which the source's layers are written out.

    Checked at one recurrence, and without injection also at the plan's R, on two random sequences, one padded on the
    left. An injection is checked from the state that it starts to preserve: s_0 = e where `state_init` is `input`, else
    zeros. Raises UserError above TOLERANCE.
    """
    model = RecurrentDepthForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids, mask = sample(source_config, seed)
    from_input = plan.state_init == "input" and plan.injection != "add"
    state = None if from_input else torch.zeros(*ids.shape, source_config.hidden_size)
    worst = 0.0
    for depth in sorted({1, plan.num_recurrences} if plan.injection == "none" else {1}):
        reference = _written_out(plan, source_config, weights, dtype, depth)
        with torch.no_grad():
            want = reference(ids, attention_mask=mask).logits
            got = model(ids, attention_mask=mask, num_recurrences=depth, initial_state=state).logits
        difference = (got - want).abs()[mask.bool()].max().item()
        worst = max(worst, difference)
        if not difference <= TOLERANCE:  # NaN fails too
            raise UserError(
                f"verification failed: at {depth} recurrences the written model's logits differ from the source "
                f"layers' by {difference:.3g}, over {TOLERANCE:g}; nothing was written"
            )
    return worst


def sample(config: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and their mask, both [2, T]: the first sequence is padded on the left."""
    length = min(32, getattr(config, "max_position_embeddings", None) or 32)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return ids, mask


def _written_out(
    plan: Plan, source_config: Any, weights: SourceWeights, dtype: torch.dtype | None, depth: int
) -> PreTrainedModel:
    """The source architecture with prelude, `depth` times the core, and coda as layers of its own."""
    config = config_with_layers(source_config, plan.prelude + plan.core * depth + plan.coda)
    parents = plan.parents["prelude"] + plan.parents["core"] * depth + plan.parents["coda"]
    with no_init_weights():
        model = empty_model(config).float().eval()
    layers = layer_list_name(model, config.num_hidden_layers) + "."
    tied = set(model.all_tied_weights_keys)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name in tied:
                continue
            names = [name]
            if name.startswith(layers):
                n, _, suffix = name.removeprefix(layers).partition(".")
                names = [f"{layers}{parent}.{suffix}" for parent in parents[int(n)]]
            kind = dtype or weights.dtype(names[0])
            parameter.copy_(torch.stack([weights.read(n).float() for n in names]).mean(0).to(kind))
    model.tie_weights()
    return model
