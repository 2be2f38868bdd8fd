"""The settings of one request, as the engine takes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .diffusion_settings import DiffusionSettings

MAX_STOPS = 16  # stop tokens of a request
NEVER = 1 << 40  # a recurrence that no lane reaches, a position that no request reaches


@dataclass
class Request:
    """One request.

    num_recurrences: its greatest depth R.   min_recurrences: recurrences before its exit rule may fire.
    rule, threshold: an exit rule of exits.RULES.   prompt_exit: the rule may end prompt positions, too.
    forced_depths: depths of positions 0, 1, ...; 0 leaves a position to the rule. `Loop.release` returns such a list.
    max_tokens: tokens that it may generate.   stops: tokens that end it, at most MAX_STOPS.
    sampled_by_host: the caller samples every token between two steps (`Loop.resume`).
    max_in_flight: positions in flight with the decoder `wave`; 1 for plain decoding.
    draft_every, draft_depths: recurrences between their read-outs (0: by the engine), or else the depths of these.
    diffusion: settings of the decoder `diffusion`; None for another decoder.
    wants_prompt_logits: the loop's reader gets the head's input at every prompt position.
    sampling: "argmax"; "drawn" (by temperature) or "cut" (by top-k, top-p or min-p, too) on the device; or "host".
    penalised: logits depend on the tokens before.   logprobs: its tokens', and those of so many likeliest; None: none.
    """

    num_recurrences: int
    min_recurrences: int = 1
    rule: str = "fixed"
    threshold: float = 0.0
    prompt_exit: bool = False
    forced_depths: list[int] = field(default_factory=list)
    max_tokens: int = NEVER
    stops: tuple[int, ...] = ()
    sampled_by_host: bool = False
    max_in_flight: int = 1
    draft_every: int = 1
    draft_depths: tuple[int, ...] = ()
    diffusion: DiffusionSettings | None = None
    wants_prompt_logits: bool = False
    sampling: str = "host"
    penalised: bool = False
    logprobs: int | None = None
