"""Router logits of a mixture of experts, collected over every run of every layer.

The source's own forward computes the load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6) from
the outputs that transformers' hooks collect. Its layer list holds taps, so the hooks go to the layers that run
instead. A core layer then counts once for every recurrence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY  # pyright: ignore[reportPrivateUsage]


def balances_experts(source: PreTrainedModel, layers: Iterable[nn.Module]) -> bool:
    """True where the causal language model `source` returns `aux_loss`, and `layers` have the routers that it is of."""
    found = [(name, module) for layer in layers for name, module in layer.named_modules()]
    if not hasattr(source, "router_aux_loss_coef"):  # of JetMoe, attention has experts too, and the loss is of both
        return False
    return "output_router_logits" in inspect.signature(type(source).forward).parameters and any(
        isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name
        for recorder in _recorders(source)
        for name, module in found
    )


def collect_router_logits(source: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    """Hook `layers`, which run in the taps of `source`, for calls of it with output_router_logits=True.

    Raises ValueError for a source without experts.
    """
    if not balances_experts(source, layers):
        raise ValueError(f"output_router_logits: this {source.config.model_type} has no experts whose load it balances")
    tasks = [("router_logits", recorder) for recorder in _recorders(source)]
    for i, layer in enumerate(layers):
        output_capturing.recursively_install_hooks(layer, f"layers.{i}", tasks)


def _recorders(source: PreTrainedModel) -> list[output_capturing.OutputRecorder]:
    """transformers' descriptions of the modules of `source` whose router logits are collected."""
    tasks = _CAN_RECORD_REGISTRY.get(str(type(source.base_model))) or {}
    given = tasks.get("router_logits", [])
    return [
        recorder
        if isinstance(recorder, output_capturing.OutputRecorder)
        else output_capturing.OutputRecorder(target_class=recorder, index=1)
        for recorder in (given if isinstance(given, list) else [given])
    ]
