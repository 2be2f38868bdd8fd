"""Answers that the lane engine generates in this process, without a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import UserError
from .answers import Sequences
from .recipe import Evaluate
from .replies import Replies, measured


def evaluate(model: str, recipe: Evaluate, sequences: Sequences, loaded: Any) -> dict[str, Any]:
    """The result of `replies.measured` for `loopwise.serve.Engine`, with `recipe.batch_size` requests at once.

    loaded: the weights of `model`, which are the engine's from then on.

    Facts are "engine", "kv_policy" and "batch_size". Each result has "passes_per_token": passes of the
    core, one after the other, for a token behind the first of its answer (None for answers of one token). Raises
    UserError for a model or a request that the engine does not run.
    """
    config = loaded.config
    engine = _engine(loaded, recipe, sequences)
    facts = {"engine": "lanes", "kv_policy": recipe.kv_policy or config.kv_policy, "batch_size": recipe.batch_size}

    def ask(fields: dict[str, Any], report: Callable[[], object]) -> Replies:
        return _ask(engine, sequences, params_fields(fields), report)

    return measured(model, recipe, sequences, config.trained_recurrences, facts, ask)


def params_fields(request: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request as those of `Params`. Raises UserError for a wrong setting of diffusion."""
    from ..serve.api.decoders import diffusion

    if "diffusion" not in request:
        return dict(request)
    try:
        return {**request, "diffusion": diffusion(request["diffusion"])}
    except ValueError as error:
        raise UserError(f"request.diffusion{error}") from None


def positions_in_flight(request: dict[str, Any]) -> int:
    """`max_in_flight` of an engine for such requests."""
    return request.get("max_in_flight", 8) if "decoder" in request else 1


def _engine(loaded: Any, recipe: Evaluate, sequences: Sequences) -> Any:
    import torch

    from ..serve import Engine

    config = loaded.config
    deepest: int = max([int(config.max_recurrences), *map(int, recipe.num_recurrences or [])])
    return Engine(
        loaded.to(getattr(torch, recipe.precision)),
        max_num_seqs=min(recipe.batch_size, len(sequences.answers)),
        max_model_len=max(answer.last + 1 for answer in sequences.answers),
        kv_policy=recipe.kv_policy,
        max_recurrences=None if config.router else deepest,
        max_in_flight=positions_in_flight(recipe.request),
        tell=lambda line: None,  # `loopwise eval` has warned of depths beyond the trained ones
    )


def _ask(engine: Any, sequences: Sequences, fields: dict[str, Any], report: Callable[[], object]) -> Replies:
    """One greedy reply for every answer of `sequences`, of its length, after the true tokens before it."""
    from ..serve import Params

    prompts, wanted = [], []
    for answer in sequences.answers:
        ids = sequences.ids[answer.sequence].tolist()
        prompts.append(ids[: answer.first])
        wanted.append(ids[answer.first : answer.last + 1])
    params = [Params(max_tokens=len(tokens), temperature=0.0, **fields) for tokens in wanted]
    few = slice(engine.max_num_seqs)
    engine.generate(prompts[few], [replace(one, max_tokens=min(2, one.max_tokens)) for one in params[few]])  # warm-up
    start = time.monotonic()
    done = engine.generate(prompts, params)
    seconds = time.monotonic() - start
    for _ in done:
        report()
    later = sum(len(one.tokens) - 1 for one in done)
    return Replies(
        right=[one.tokens == tokens for one, tokens in zip(done, wanted, strict=True)],
        depths=[sum(one.depths) / len(one.depths) for one in done],
        tokens=sum(map(len, prompts)) + sum(len(one.tokens) for one in done),
        seconds=seconds,
        facts={"passes_per_token": sum(one.passes for one in done) / later if later > 0 else None},
    )
