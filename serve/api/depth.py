"""A request's depth: the request's own fields, then the model's defaults. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .fields import FieldError


class Exit(NamedTuple):
    """An exit rule, its threshold (None: the rule's own), and the recurrences before it may fire."""

    rule: str
    threshold: float | None
    minimum: int


@dataclass(frozen=True)
class Depth:
    """The depth of one request: at most `num_recurrences`; from `min_recurrences` on, the exit rule may end a position.

    prompt_exit: the rule ends prompt positions, too.   forced_depths: those of positions 0, 1, ..., in place of a rule.
    """

    num_recurrences: int
    min_recurrences: int
    rule: str
    threshold: float
    prompt_exit: bool
    forced_depths: list[int]

    @property
    def key(self) -> str:
        """Equal for requests whose prompts leave equal keys and values."""
        exits = f"{self.rule} {self.threshold} {self.min_recurrences}" if self.prompt_exit else ""
        return f"{self.num_recurrences} {exits} {self.forced_depths}"

    @property
    def full(self) -> bool:
        """True where generated positions have all recurrences, as a prompt's have."""
        return self.rule == "fixed" and not self.forced_depths


def exit_of(given: Mapping[str, Any], limit: int, default: Mapping[str, Any] | None) -> Exit:
    """The exit of a request with the fields `given`, at most `limit` recurrences deep. None counts as not given.

    `default` is the model's, the config's `exit`; its threshold goes with its rule alone. A default above `limit`
    counts as `limit`. Raises FieldError where the request itself gives a `min_recurrences` above `limit`.
    """
    default = default or {}
    rule = _first(given.get("exit_rule"), default.get("rule"), "fixed")
    threshold = given.get("exit_threshold")
    if threshold is None and rule == default.get("rule"):
        threshold = default.get("threshold")
    minimum = given.get("min_recurrences")
    check_minimum(minimum, limit)
    return Exit(rule, threshold, min(_first(default.get("min_recurrences"), 1), limit) if minimum is None else minimum)


def depth_of(given: Mapping[str, Any], num_recurrences: int, default: Mapping[str, Any] | None) -> Depth:
    """The depth of a request with the fields `given`, for a model of `num_recurrences` and the exit `default`.

    Raises FieldError as `exit_of` does. The one place where a request's defaults are filled in: the server, the plugin
    and the offline engine call it.
    """
    from ..engine.exits import RULES

    limit = _first(given.get("num_recurrences"), num_recurrences)
    rule, threshold, minimum = exit_of(given, limit, default)
    return Depth(
        num_recurrences=limit,
        min_recurrences=minimum,
        rule=rule,
        threshold=RULES[rule].threshold if threshold is None else float(threshold),
        prompt_exit=bool(given.get("prompt_exit")),
        forced_depths=list(given.get("trace") or ()),
    )


def check_minimum(minimum: int | None, limit: int) -> None:
    """Raises FieldError for a request's `minimum` above its `limit`."""
    if minimum is not None and minimum > limit:
        raise FieldError("min_recurrences", f"min_recurrences={minimum}: at most num_recurrences, which is {limit}")


def _first(*values: Any) -> Any:
    """The first of `values` that is not None."""
    return next(value for value in values if value is not None)
