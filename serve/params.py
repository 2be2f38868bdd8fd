"""Params and Completion: the request and the result of one prompt in `loopwise.serve.Engine`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..deprecated import SERVING, accept_old_names
from ..errors import UserError
from ..sampling import SETTINGS, check_setting
from .engine.diffusion_settings import DiffusionSettings
from .engine.logprobs import MOST, TokenLogprobs

UNSET: Any = None  # the default is in generation_config.json


@accept_old_names(SERVING)
@dataclass(frozen=True)
class Params:
    """The settings for one prompt.

    Depth: `num_recurrences` R (default the model's). From `min_recurrences` on, `exit_rule` with `exit_threshold`
    (default the rule's own) may end a position; with `prompt_exit` also one of the prompt. `trace` forces the depths of
    positions 0, 1, ...

    Sampling: `temperature` 0 is greedy. The same `seed` gives the same tokens whatever else runs. `choice` numbers
    the samples of one seed. Penalties are vLLM's: `repetition_penalty` (1: off) is on tokens of prompt and text, as in
    transformers; `presence_penalty` and `frequency_penalty` (0: off) are on tokens of the text alone.

    Where `max_tokens` or a sampling setting is None, the model's generation_config.json has the default; without one it
    is 64 tokens, greedy, nothing cut, no penalty.

    `logprobs`: log-probabilities of each token and of that many likeliest ones (0 to 20), by the logits as they are.

    Ends: a token of `stop_token_ids`; the model's own, unless `ignore_eos`; the token that completes a text of `stop`.
    That text, and what follows it, is not in `Completion.text`.

    Decoder: "plain"; "wave", with the same tokens; "diffusion", which refines positions together, with the settings
    `diffusion`. Both have up to `max_in_flight` positions in flight; "auto": as many as a wave can use. A position of a
    wave is read out after every `draft_every` recurrences (default 1; "auto": by measured acceptance and load), or at
    `draft_depths`, and at its exit.
    """

    max_tokens: int = UNSET
    num_recurrences: int | None = None
    min_recurrences: int | None = None
    exit_rule: str | None = None
    exit_threshold: float | None = None
    prompt_exit: bool = False
    trace: tuple[int, ...] = ()
    temperature: float = UNSET
    top_k: int = UNSET
    top_p: float = UNSET
    min_p: float = UNSET
    repetition_penalty: float = UNSET
    presence_penalty: float = UNSET
    frequency_penalty: float = UNSET
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    decoder: str = "plain"
    max_in_flight: int | Literal["auto"] = 8
    draft_every: int | Literal["auto"] | None = None
    draft_depths: tuple[int, ...] = ()
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def filled(self, defaults: dict[str, Any]) -> Params:
        """A copy in which None is replaced by the value in `defaults`, then by the one in NEUTRAL."""
        return replace(self, **{n: v for n, v in (NEUTRAL | defaults).items() if getattr(self, n) is None})


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
NEUTRAL: dict[str, Any] = {
    "max_tokens": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


@dataclass
class Completion:
    """The continuation of one prompt.

    tokens, text: the generated ones.   depths: recurrences of the position that gave each token.
    logprobs: log-probabilities of the tokens, where they were asked for.
    finish_reason: "stop" after a stop token or a stop text, "length" after the last allowed token, "error" after an
    exception in the work for this prompt, whose tokens may be cut short.   error: that exception, in words.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    passes: int = 0  # passes of the core since the prompt, one after the other
    items: int = 0  # lanes in these passes; those above the sum of the depths were wasted
    error: str | None = None

    def fail(self, error: Exception) -> None:
        """End by an exception."""
        self.finish_reason, self.error = "error", f"{type(error).__name__}: {error}"


def check_kinds(params: Params) -> None:
    """Raises UserError for a sampling setting out of range, and for a number of the wrong kind."""
    if not isinstance(params, Params):
        raise UserError(f"params: {params!r:.60} is no Params")
    for name in SETTINGS:
        check_setting(name, getattr(params, name))
    for name in ("seed", "choice"):
        if type(value := getattr(params, name)) is not int:
            raise UserError(f"{name}={value!r}: an integer")
    if params.logprobs is not None and (type(params.logprobs) is not int or not 0 <= params.logprobs <= MOST):
        raise UserError(f"logprobs={params.logprobs!r}: an integer from 0 to {MOST}")
    if params.logprobs is not None and params.decoder == "diffusion":
        raise UserError(
            f"logprobs={params.logprobs}: decoder='diffusion' refines tokens together, so a token has no "
            "log-probability; use decoder='plain' or 'wave'"
        )
    for name in ("trace", "stop_token_ids"):
        for value in getattr(params, name):
            if type(value) is not int:
                raise UserError(f"{name}: {value!r} in it is no integer")
    if isinstance(params.stop, str) or not all(isinstance(text, str) and text for text in params.stop):
        raise UserError(f"stop={params.stop!r}: a tuple of texts, none of them empty")
