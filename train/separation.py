"""A measurement that packed documents do not attend to each other."""

from __future__ import annotations

from typing import Any

import torch

from loopwise.errors import UserError
from loopwise.model.configuration_source import keeps_state

from .pretrained import is_recurrent

SAME = 1e-4  # rounding errors are 100 times smaller, the effect of another document 100 times larger
DOCUMENTS = (5, 7)  # tokens of the two documents


@torch.no_grad()
def check(model: Any, name: str) -> None:
    """Raises UserError if a document in `model` (called `name` in the error) sees the one before it in a block.

    Many transformers models separate documents by position ids that restart. Others ignore positions in their masks,
    or read keys and values through a cache, where transformers does not detect documents. Runs the model twice.
    """
    training = model.training
    model.eval()
    try:
        if _keeps_state(model.config) or _difference(model) > SAME:  # a state of little weight may grow in training
            raise UserError(
                f"data.separate_documents: in {name} ({_why(model.config)}) a document would see the one before it in "
                "the same block; set data.separate_documents=false"
            )
    finally:
        model.train(training)


def _difference(model: Any) -> float:
    """Relative change of a document's logits by another document before it: the median over its tokens."""
    first, length = DOCUMENTS[0], sum(DOCUMENTS)
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(length, device=device)[None] * 7 + 3) % model.config.vocab_size
    places = torch.cat([torch.arange(n, device=device) for n in DOCUMENTS])[None]
    keys: dict[str, Any] = {"use_cache": False}
    router = getattr(model.config, "router", None)
    if is_recurrent(model.config) and router and router["kind"] == "expert":
        keys["router_capacity"] = [1.0] * router["depths"]  # all tokens run, so that only masks differ
    both = model(input_ids=ids, position_ids=places, **keys).logits[:, first:].float()
    alone = model(input_ids=ids[:, first:], **keys).logits.float()
    change = (both - alone).norm(dim=-1) / alone.norm(dim=-1).clamp(min=1e-9)
    return float(change.median())


def _source(config: Any) -> Any:
    """The config of the layers."""
    return config.source_config if is_recurrent(config) else config


def _keeps_state(config: Any) -> bool:
    """True where a layer keeps a state of all tokens before, which position ids do not cut."""
    return any(map(keeps_state, getattr(_source(config), "layer_types", None) or ()))


def _why(config: Any) -> str:
    if _keeps_state(config):
        return f"layers of {_source(config).model_type} keep a state"
    if not is_recurrent(config):
        return f"masks of {config.model_type} ignore positions"
    if config.kv_policy == "first":
        return "kv_policy=first reads keys and values through a cache"
    if config.router and config.router["kv"] == "first-recursion":
        return "router.kv=first-recursion reads keys and values through a cache"
    return f"masks of {config.source_config.model_type} ignore positions"
