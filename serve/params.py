"""What `loopwise.serve.Engine` is asked for each prompt, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError
from ..sampling import SETTINGS, check_setting
from .engine.diffusion import Diffusion

UNSAID: Any = None


@dataclass(frozen=True)
class Params:
    """How one prompt is to be continued.

    Depth: `num_recurrences` R (default the model's), `exit_rule` with `exit_threshold` (default the rule's own) from
    `min_recurrences` on; `prompt_exit` for prompt positions, too; `trace` forces the depths of positions 0, 1, ...
    Sampling: `temperature` 0 is greedy; the same `seed` gives the same tokens whatever else runs. Penalties are vLLM's:
    `repetition_penalty` (1 is none) is on tokens of prompt and text, and transformers', too; `presence_penalty` and
    `frequency_penalty` (0) are on tokens of the text alone. What of these, of `max_tokens`, `temperature`, `top_k`,
    `top_p` and `min_p` is None, the model's generation_config.json says; where it says nothing, 64 tokens, greedy,
    nothing cut, no penalty. `decoder="wave"` has up to `wave` positions in flight, for the same tokens;
    "diffusion" refines them together, as `diffusion` says.
    """

    max_tokens: int = UNSAID
    num_recurrences: int | None = None
    min_recurrences: int | None = None
    exit_rule: str | None = None
    exit_threshold: float | None = None
    prompt_exit: bool = False
    trace: tuple[int, ...] = ()
    temperature: float = UNSAID
    top_k: int = UNSAID
    top_p: float = UNSAID
    min_p: float = UNSAID
    repetition_penalty: float = UNSAID
    presence_penalty: float = UNSAID
    frequency_penalty: float = UNSAID
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    decoder: str = "plain"
    wave: int = 8
    diffusion: Diffusion = field(default_factory=Diffusion)

    def filled(self, defaults: dict[str, Any]) -> Params:
        """These, with what is None taken from `defaults`, then from NEUTRAL."""
        return replace(self, **{n: v for n, v in (NEUTRAL | defaults).items() if getattr(self, n) is None})


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
NEUTRAL: dict[str, Any] = {
    "max_tokens": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


@dataclass
class Completion:
    """`tokens` generated, their `text`, and the recurrences (`depths`) of the position that gave each; whether a token
    that stops was the last ("stop"), or there was no room for more ("length")."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    passes: int = 0  # of the core, one after the other, since the prompt
    items: int = 0  # lanes in these passes; what is above the sum of the depths was in vain


def check_kinds(params: Params) -> None:
    """Raises UserError where a setting of the sampling is out of range, or a field that is compared with numbers is of
    another kind."""
    if not isinstance(params, Params):
        raise UserError(f"params: {params!r:.60} is no Params")
    for name in SETTINGS:
        check_setting(name, getattr(params, name))
    for name in ("seed", "choice"):
        if type(value := getattr(params, name)) is not int:
            raise UserError(f"{name}={value!r}: an integer")
    for name in ("trace", "stop_token_ids"):
        for value in getattr(params, name):
            if type(value) is not int:
                raise UserError(f"{name}: {value!r} in it is no integer")
