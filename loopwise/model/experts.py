"""Router logits of a mixture of experts, collected over every run of every layer.

The source's own forward computes the load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6) from
what transformers' hooks collect while it runs. Its layer list holds taps, so the hooks go to the layers that run
instead. A core layer then counts once for every recurrence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers.utils import output_capturing


def balances_experts(source: Any, layers: Iterable[nn.Module]) -> bool:
    """True where the causal language model `source` returns `aux_loss`, and routers of `layers` are what it is of."""
    found = [(name, module) for layer in layers for name, module in layer.named_modules()]
    return "output_router_logits" in inspect.signature(type(source).forward).parameters and any(
        isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name
        for recorder in _recorders(source)
        for name, module in found
    )


def collect_router_logits(source: Any, layers: Sequence[nn.Module]) -> None:
    """Let calls of `source` with output_router_logits=True collect those of `layers`, which run in its taps.

    Raises ValueError where there are no experts.
    """
    if not balances_experts(source, layers):
        raise ValueError(f"output_router_logits: this {source.config.model_type} has no experts whose load it balances")
    tasks = [("router_logits", recorder) for recorder in _recorders(source)]
    for i, layer in enumerate(layers):
        output_capturing.recursively_install_hooks(layer, f"layers.{i}", tasks)


def _recorders(source: Any) -> list[output_capturing.OutputRecorder]:
    tasks = output_capturing._CAN_RECORD_REGISTRY.get(str(type(source.base_model))) or {}
    given = tasks.get("router_logits", [])
    return [
        recorder
        if isinstance(recorder, output_capturing.OutputRecorder)
        else output_capturing.OutputRecorder(target_class=recorder, index=1)
        for recorder in (given if isinstance(given, list) else [given])
    ]
