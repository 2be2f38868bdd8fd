"""Replies to the questions of the data, from a server or from the lane engine, as a result of `loopwise eval`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..trained import is_beyond
from .answers import Sequences, accuracy
from .guess import guessing
from .recipe import Evaluate


@dataclass
class Replies:
    """The replies to all requests of one depth.

    right: True for each reply that equals its answer.   depths: mean recurrences per token of each, None if the server
    reports none.   tokens: sum over prompts and replies.   seconds: time of all requests together.   facts: more keys
    of the result.
    """

    right: list[bool]
    depths: list[float | None]
    tokens: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


def measured(
    model: str,
    recipe: Evaluate,
    sequences: Sequences,
    trained: dict[str, Any] | None,
    facts: dict[str, Any],
    ask: Callable[[dict[str, Any], Callable[[], object]], Replies],
) -> dict[str, Any]:
    """The result of `loopwise eval` for replies: without losses and "loop".

    trained: `trained_recurrences` of the model's config.   facts: who replies.   ask: the replies for given fields of
    the requests; calls its second argument after each reply.

    Each result and each group has "mean_recurrences" per token of its answers (None if unknown). Each result has
    "seconds" and "tokens_per_second", with prompts.
    """
    from tqdm import tqdm

    depths = recipe.num_recurrences or [None]
    results = []
    count = len(depths) * len(sequences.answers)
    with tqdm(total=count, desc="eval", unit="answer", disable=not sys.stderr.isatty()) as bar:
        for depth in depths:
            replies = ask({**recipe.request, **({"num_recurrences": depth} if depth else {})}, bar.update)
            result = {"num_recurrences": depth, "beyond_trained": is_beyond(trained, depth)}
            result |= accuracy(sequences, replies.right)
            result["mean_recurrences"] = _mean(replies.depths)
            for name, group in result["groups"].items():
                members = [d for a, d in zip(sequences.answers, replies.depths, strict=True) if a.group == name]
                group["mean_recurrences"] = _mean(members)
            result |= {"seconds": replies.seconds, "tokens_per_second": replies.tokens / replies.seconds}
            results.append(result | replies.facts)
    facts = {**facts, "request": recipe.request, "data": recipe.data, "group": recipe.group}
    counted: dict[str, Any] = {"records": len(sequences.ids), "answers": len(sequences.answers)}
    counted["guess"] = guessing(recipe, len(sequences.answers))
    return {"model": model, "trained_recurrences": trained, **facts, **counted, "results": results}


def _mean(depths: list[float | None]) -> float | None:
    known = [depth for depth in depths if depth is not None]
    return sum(known) / len(known) if len(known) == len(depths) else None
