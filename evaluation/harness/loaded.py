"""The models of a measurement, as lm-eval runs them: loaded here, or behind a server."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UserError
from ...train.pretrained import load_model, load_tokenizer
from ..endpoint import Endpoint
from ..recipe import Evaluate
from .lanes import LanesLM
from .models import LoopwiseLM


def load(name: str, path: str, config: Any, recipe: Evaluate, depths: list[int | None] | None) -> Any:
    """The model `name` as lm-eval runs it. path: its directory or hub id.   depths: to measure at; None: the baseline.

    Raises UserError for a model that cannot be loaded, and for a server that does not answer or refuses a depth.
    """
    revision = recipe.revision if depths else recipe.baseline_revision
    tokenizer = load_tokenizer(path, revision)
    if recipe.apply_chat_template and tokenizer.chat_template is None:
        raise UserError(f"apply_chat_template: the tokenizer of {name} has no chat template")
    if depths and recipe.endpoint:
        return _served(path, config, recipe, depths, tokenizer)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaded: Any = load_model(path, revision)
    loaded = loaded.to(device, getattr(torch, recipe.precision))
    arguments: dict[str, Any] = {"pretrained": loaded, "tokenizer": tokenizer, "batch_size": recipe.batch_size}
    if depths and recipe.engine == "lanes":
        deepest = max((depth for depth in depths if depth), default=None)
        return LanesLM(request=recipe.request, deepest=deepest, **arguments)
    return LoopwiseLM(**arguments)


def _served(path: str, config: Any, recipe: Evaluate, depths: list[int | None], tokenizer: Any) -> Any:
    """The client of the server at `recipe.endpoint`, after a trial of every depth. Raises UserError as the server."""
    from .served import ServedLM  # needs packages that only clients of servers need

    url = (recipe.endpoint or "").rstrip("/")
    server = Endpoint(url)
    for depth in depths:
        server.try_fields(tokenizer("a").input_ids, {**recipe.request, **({"num_recurrences": depth} if depth else {})})
    positions = [getattr(config, "max_position_embeddings", None), server.positions]
    return ServedLM(
        base_url=f"{url}/completions",
        model=server.name,
        tokenizer=path,
        revision=recipe.revision or "main",
        num_concurrent=recipe.batch_size,
        max_length=min((count for count in positions if count), default=2048),
        # As HFLM: the tokenizer's own special tokens, once; a chat template has them in its text.
        add_bos_token=not recipe.apply_chat_template,
        request=recipe.request,
    )
