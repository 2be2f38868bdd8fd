"""Decoders: positions of a request one by one, as an exact wave, or by diffusion. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .echo import brief, cut
from .fields import rename_fields

if TYPE_CHECKING:
    from ..engine.diffusion_settings import DiffusionSettings

DECODERS = ("plain", "wave", "diffusion")
MOST_AUTO = 32  # positions in flight that max_in_flight=auto gives
ENGINE_MODE = "raw_logprobs"  # vLLM's default logprobs_mode
LARGE = 1 << 43  # above every number of a diffusion, and every threshold
# vLLM's sampling parameters that read earlier tokens, or are reported token by token: the values that turn them off.
HISTORY: dict[str, tuple] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_tokens": (0, None),
    "bad_words": ([], None),
    "structured_outputs": (None,),
    "logprobs": (None,),
    "logprob_token_ids": ([], None),
    "thinking_token_budget": (None,),
}


@dataclass(frozen=True)
class Decoder:
    """The decoder of a request.

    max_in_flight: most positions in flight of a wave; 1 for plain decoding.   draft_every, draft_depths: the depths at
    which a wave drafts (0: as the engine finds best); the second counts where it is not empty.   diffusion: its
    settings; None without.
    """

    max_in_flight: int = 1
    draft_every: int = 1
    draft_depths: tuple[int, ...] = ()
    diffusion: DiffusionSettings | None = None

    @property
    def name(self) -> str:
        return "diffusion" if self.diffusion else "wave" if self.max_in_flight > 1 else "plain"

    def ahead(self, passes: int, max_in_flight: int) -> int:
        """Positions beyond the newest token's that a step of `passes` may reach, in an engine that allows
        `max_in_flight`. A wave starts one position a pass."""
        return self.diffusion.ahead(passes, max_in_flight) if self.diffusion else passes + self.max_in_flight


def auto_width(depth: int, every: int, depths: tuple[int, ...] = ()) -> int:
    """`max_in_flight` where it is "auto", for requests of `depth` recurrences that draft so: the positions that start
    before the first of them is through."""
    return max(1, min(-(-depth // min(depths, default=every or 1)), MOST_AUTO))


def drafts_of(given: Mapping[str, Any], every: int, depths: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """`draft_every` (0 for "auto") and `draft_depths` of a request with the fields `given`; `every` and `depths` are
    the defaults. None and an empty list count as not given."""
    if given.get("draft_depths"):
        return 1, tuple(given["draft_depths"])
    own = given.get("draft_every")
    return (every, depths) if own is None else (0 if own == "auto" else own, ())


def decoder_of(
    params: Any,
    decoder: str,
    max_in_flight: int,
    every: int = 1,
    depths: tuple[int, ...] = (),
    logprobs_mode: str = "",
) -> Decoder:
    """The decoder of a request with vLLM's sampling `params`.

    The others are the server's defaults: `every` and `depths` are its draft_every and draft_depths. A wave whose
    parameters read earlier tokens is decoded plainly, which gives the same tokens. logprobs_mode: as in `history`.
    """
    given = rename_fields(params.extra_args or {}, None)  # validation has warned
    name, most = given.get("decoder", decoder), given.get("max_in_flight", max_in_flight)
    if name == "diffusion":
        return Decoder(diffusion=replace(diffusion(given.get("diffusion", {})), max_in_flight=most))
    if name != "wave" or history(params, logprobs_mode) is not None:
        return Decoder()
    every, depths = drafts_of(given, every, depths)
    if most == "auto":
        most = min(max_in_flight, auto_width(given.get("num_recurrences", LARGE), every, depths))
    return Decoder(most, every, depths)


def history(params: Any, logprobs_mode: str = "") -> str | None:
    """The first of vLLM's sampling `params` for which the caller samples one token after the other; None without one.

    logprobs_mode: vLLM's. By its default the engine computes log-probabilities beside its tokens, of up to `MOST`
    likeliest ones: they are those of the model's own logits.
    """
    from ..engine.logprobs import MOST

    by_engine = logprobs_mode == ENGINE_MODE and 0 <= (getattr(params, "logprobs", None) or 0) <= MOST
    given = (name for name, off in HISTORY.items() if getattr(params, name, None) not in off)
    return next((name for name in given if not (by_engine and name == "logprobs")), None)


def diffusion(given: dict[str, Any] | str) -> DiffusionSettings:
    """The settings in the field `diffusion`, an object or its JSON text. Raises ValueError, naming field and rule."""
    from ..engine.diffusion_settings import DiffusionSettings

    kinds = {f.name: type(f.default) for f in fields(DiffusionSettings) if f.name != "max_in_flight"}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):  # no JSON, or JSON in many brackets
            given = str(given)
    if not isinstance(given, dict):
        raise ValueError(f"={brief(given)}: an object of {', '.join(kinds)}")
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f".{cut(name)}: no such field; they are {', '.join(kinds)}")
        kind = kinds[name]
        wanted = (int, float) if kind is float else kind
        large = isinstance(value, int | float) and not abs(value) < LARGE
        if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool) or large:
            rule = {int: "an integer", float: "a finite number", bool: "true or false", str: "a name"}[kind]
            raise ValueError(f".{name}={brief(value)}: {rule}")
    made = DiffusionSettings(**given)
    if mistake := made.mistake():
        raise ValueError(f".{mistake}")
    return made
