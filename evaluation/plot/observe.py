"""The tokens of a text, their depths and their states, as pictures show them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...find_source import find_model
from ...quiet import quiet
from ...trained import beyond_trained
from .recipe import Picture

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Tokens:
    """The tokens of a text.

    ids [T].   pieces [T]: the part of the text that each stands for; "" where a character takes several tokens, for all
    but the first.   gaps [T + 1]: the parts before each piece, and after the last, that no token stands for.
    """

    ids: list[int]
    pieces: list[str]
    gaps: list[str]


def tokens_of(text: str, tokenizer: Any) -> Tokens:
    """The tokens of `text`. Raises UserError for a tokenizer that does not know their places in it."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__}: a picture needs a fast tokenizer, which knows the tokens' places")
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces, gaps, end = [], [], 0
    for first, last in encoded["offset_mapping"]:
        gaps.append(text[end:first])
        pieces.append(text[max(first, end) : last])
        end = max(end, last)
    return Tokens(encoded["input_ids"], pieces, [*gaps, text[end:]])


@dataclass
class Depths:
    """depths [T]: recurrences of each token.   most: the greatest depth that one may have.   rule: in words.
    routed: a router has set them.
    """

    tokens: Tokens
    depths: list[int]
    most: int
    rule: str
    routed: bool


def depths(model: str, picture: Picture) -> Depths:
    """The tokens of the picture's text with the depths at which they leave. Raises UserError for bad settings."""
    quiet()
    from ...serve import Params
    from ...train.pretrained import load_config, load_tokenizer
    from ..exits.forced import ForcedEngine

    text, model = picture.content, str(find_model(model, picture.revision))
    config = load_config(model, None)
    if config.model_type != "recurrent_depth":
        raise UserError(f"{model}: a plain {config.model_type}; its tokens have no depths")
    tokens = tokens_of(text, load_tokenizer(model, None))
    deeper = (picture.num_recurrences or 0) > config.max_recurrences and not config.router
    engine = ForcedEngine(
        model,
        max_num_seqs=1,
        max_model_len=len(tokens.ids),
        kv_policy=picture.kv_policy,
        max_recurrences=picture.num_recurrences if deeper else None,
        tell=lambda line: print(f"loopwise: {line}", file=sys.stderr),
    )
    keys = ("num_recurrences", "min_recurrences", "exit_rule", "exit_threshold")
    params = Params(**{key: getattr(picture, key) for key in keys}, max_tokens=1, temperature=0.0, ignore_eos=True)
    request = engine.request(params)
    (found,) = engine.depths_of([tokens.ids], params)
    rule = f"{request.rule} at {request.threshold:g}" if request.rule != "fixed" else f"R = {request.num_recurrences}"
    rule = "router" if config.router else f"{rule}, kv_policy={engine.loop.state.policy.name}"
    return Depths(tokens, found, request.num_recurrences, rule, bool(config.router))


def _without_states(config: Any) -> str | None:
    """The kind of a model that has no states to draw, in words; None for one that has."""
    if config.model_type != "recurrent_depth":
        return f"plain {config.model_type} model"
    if config.router:
        return "routed model"
    return "model with sharing=sequence" if config.sharing == "sequence" else None


def states(model: str, picture: Picture) -> tuple[Tokens, Tensor, int | None]:
    """The tokens of the picture's text, their states s_1 .. s_R [R, T, D] in float32, and the greatest R of training.

    Prints a warning where R is beyond that of training, which is None where it is not recorded.
    """
    quiet()
    import torch

    from ...train.pretrained import load_config, load_model, load_tokenizer

    model = str(find_model(model, picture.revision))
    config = load_config(model, None)
    if kind := _without_states(config):
        raise UserError(f"{model}: a {kind} has no states of all tokens after each recurrence")
    tokens = tokens_of(picture.content, load_tokenizer(model, None))
    loaded: Any = load_model(model, None)
    with torch.no_grad():
        out = loaded.eval()(
            torch.tensor([tokens.ids]), num_recurrences=picture.num_recurrences, output_states=True, use_cache=False,
            logits_to_keep=1,
        )  # fmt: skip
    trained = config.trained_recurrences
    if warning := beyond_trained(trained, [len(out.states)]):
        print(warning, file=sys.stderr)
    return tokens, out.states[:, 0].float(), trained and trained["max"]
