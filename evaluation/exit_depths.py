"""The depth at which each token of a given text leaves, under the conditions of decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..serve import Engine, Params


def exit_depths(engine: Engine, texts: list[list[int]], params: Params) -> list[list[int]]:
    """Recurrences of every token of `texts`, lists of token ids, in an engine with a row for each text.

    The first token is a prompt, and runs to the end unless `params.prompt_exit`. The others follow as if they had been
    generated: each meets the keys and values that the ones before left at their exits. Raises UserError for `params`
    that the engine refuses.
    """
    import torch

    from ..serve.engine.loop import Prompt

    loop, request = engine.loop, engine.request(params)
    with torch.inference_mode():
        for row, ids in enumerate(texts):
            loop.admit(row, request)
            tokens = torch.tensor(ids, device=loop.state.device)
            loop.set_known_tokens(row, 1, tokens[1:])
            loop.prompt([Prompt(row, tokens[:1].cpu(), 0, True)])
            loop.step(torch.tensor([row], device=loop.state.device))
        rows = torch.arange(len(texts), device=loop.state.device)
        while bool((loop.state.requests.remaining[rows] > 0).any()):
            loop.step(rows)
        return [loop.release(row)[: len(ids)].tolist() for row, ids in enumerate(texts)]
