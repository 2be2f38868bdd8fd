"""Documents that are packed into one block attend to themselves alone: measured, not hoped for."""

from __future__ import annotations

from typing import Any

import torch

from loopwise.errors import UserError

from .pretrained import is_recurrent

SAME = 1e-4  # rounding is a hundredth of it, what another document changes a hundredfold
DOCUMENTS = (5, 7)  # tokens of each


@torch.no_grad()
def check(model: Any, name: str) -> None:
    """Raises UserError where `model`, on the CPU or elsewhere, reads of the document before in the same block.

    Many models of transformers tell documents apart by positions that start anew; others ignore positions in their
    masks, or read keys and values through a cache, where transformers does not look for documents.
    """
    training = model.training
    model.eval()
    try:
        if _difference(model) > SAME:
            raise UserError(
                f"data.separate_documents: in {name} ({_why(model.config)}) a document would see the one before it in "
                "the same block; set data.separate_documents=false"
            )
    finally:
        model.train(training)


def _difference(model: Any) -> float:
    """How far the logits of a document change with another one before it: the median over its tokens, as a share."""
    first, length = DOCUMENTS[0], sum(DOCUMENTS)
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(length, device=device)[None] * 7 + 3) % model.config.vocab_size
    places = torch.cat([torch.arange(n, device=device) for n in DOCUMENTS])[None]
    keys: dict[str, Any] = {"use_cache": False}
    router = getattr(model.config, "router", None)
    if is_recurrent(model.config) and router and router["kind"] == "expert":
        keys["router_capacity"] = [1.0] * router["depths"]  # all tokens run, so that masks alone are compared
    both = model(input_ids=ids, position_ids=places, **keys).logits[:, first:].float()
    alone = model(input_ids=ids[:, first:], **keys).logits.float()
    change = (both - alone).norm(dim=-1) / alone.norm(dim=-1).clamp(min=1e-9)
    return float(change.median())


def _why(config: Any) -> str:
    if not is_recurrent(config):
        return f"masks of {config.model_type} ignore positions"
    if config.kv_policy == "first":
        return "kv_policy=first reads keys and values through a cache"
    if config.router and config.router["kv"] == "first-recursion":
        return "router.kv=first-recursion reads keys and values through a cache"
    return f"masks of {config.source_config.model_type} ignore positions"
