"""What a request may say about depth, checked before an engine sees it. Imports nothing heavy.

The fields stand at the top level of a request's body or inside its `vllm_xargs`; offline, in
`SamplingParams.extra_args`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from .decoders import DECODERS, LARGE, diffusion, history

FIELDS = (
    "num_recurrences", "min_recurrences", "exit_rule", "exit_threshold", "prompt_exit", "trace", "return_recurrences",
    "decoder", "wave", "diffusion",
)  # fmt: skip
FLAGS = ("prompt_exit", "return_recurrences")
CALLED = re.compile(  # num_recurrences, by others, and in papers
    r"((n|num|number_of)_?)?(loops?|depths?|recurrences?|recursions?|recurrent_(steps|depth))"
    r"|(n|num)_(steps|iterations)"
)
AT_START = ("kv_policy", "max_recurrences")
XARGS = "vllm_xargs"
UNREAD = ("extra_body", "extra_args", "sampling_params")  # what Python clients call them; a server ignores the names


class FieldError(ValueError):
    """A field of a request that cannot be had. The message names field, value, rule and choices."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Limits:
    """What a served model offers. `fixed`: every request runs at `num_recurrences`; no field can change that. `rule`
    and `decoder` are those of a request that names none, `wave` the most positions in flight; `unfit` decoders do not
    go with it, for a reason. `routed`: tokens have the depth that a router gives them. `prompt_rules` may end prompt
    tokens, too; None: all."""

    num_recurrences: int
    max_recurrences: int
    rules: tuple[str, ...]
    prompt_exit: bool
    fixed: bool = False
    rule: str = "fixed"
    decoder: str = "plain"
    wave: int = 8
    unfit: dict[str, str] = field(default_factory=dict)
    routed: bool = False
    prompt_rules: tuple[str, ...] | None = None


class Doubled(dict):
    """A JSON object in which the keys `twice` stand more than once; as in `dict`, the last one's value is there."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]


def parse(body: bytes) -> Any:
    """The JSON of a request's `body`, for `take`. Raises ValueError, or RecursionError, for what is none."""
    return json.loads(body, object_pairs_hook=lambda p: made if len(made := dict(p)) == len(p) else Doubled(p))


def take(body: dict[str, Any], known: Container[str] = ()) -> dict[str, Any]:
    """The depth fields of a request's `body`, removed from it; `known` are the names that the server itself knows.

    A field that is null counts as not given. Raises FieldError for a field that both places give, and differently; for
    one whose key stands twice, or that nothing reads where it stands; and for a name that is nearly one of ours.
    """
    values: dict[str, Any] = {}
    _check_doubled(body, XARGS)
    for place, names in ((body, known), (body.get(XARGS), ())):
        if not isinstance(place, dict):
            continue
        _check_doubled(place)
        for name in list(place):
            if name in FIELDS:
                value = place.pop(name)
                if value is None:
                    continue
                other = values.setdefault(name, value)
                unlike = isinstance(other, bool) != isinstance(value, bool)  # which are 0 and 1 to Python
                if other is not value and (other != value or unlike):
                    raise FieldError(name, f"{name} is {other!r} in the body, but {value!r} in {XARGS}")
                if isinstance(value, Doubled):
                    raise FieldError(name, f"{name}.{value.twice[0]} stands twice in the body: one value of it")
            elif name not in names:
                _check_name(name)
    _check_unread(body, known)
    return values


def _check_doubled(place: dict[str, Any], *more: str) -> None:
    for name in place.twice if isinstance(place, Doubled) else ():
        if name in FIELDS or name in more:
            raise FieldError(name, f"{name} stands twice in the body: one value of it")


def _check_unread(body: dict[str, Any], known: Container[str], names: tuple[str, ...] = UNREAD) -> None:
    """Raises FieldError for a depth field, or nearly one, in an object of one of these `names`."""
    for where in names:
        place = body.get(where)
        if not isinstance(place, dict):
            continue
        for name, value in place.items():
            if name in FIELDS and value is not None:
                raise FieldError(
                    name, f"{name} in {where!r} is not read: it stands at the top level of the body, or in its {XARGS}"
                )
            if name not in FIELDS and name not in known:
                _check_name(name)
        _check_unread(place, known, (*UNREAD, XARGS))


def check(values: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """`values` by field, as vLLM's `extra_args` can hold them. Raises FieldError where the model cannot do it."""
    for name, value in values.items():
        if name in FLAGS:
            if not isinstance(value, bool):
                raise FieldError(name, f"{name}={value!r}: true or false")
        elif name in ("num_recurrences", "min_recurrences"):
            _depth(name, value, limits.max_recurrences)
    if limits.fixed:
        return _check_fixed(values, limits)
    if limits.routed:
        _check_routed(values, limits)
    values = _check_decoder(dict(values), limits)
    most = values.get("num_recurrences", limits.num_recurrences)
    if values.get("min_recurrences", 1) > most:
        least = values["min_recurrences"]
        raise FieldError("min_recurrences", f"min_recurrences={least}: at most num_recurrences, which is {most}")
    if "exit_rule" in values and values["exit_rule"] not in limits.rules:
        raise FieldError("exit_rule", _nearest("exit_rule", values["exit_rule"], limits.rules))
    if "exit_threshold" in values:
        check_threshold(values["exit_threshold"], values.get("exit_rule", limits.rule))
    if values.get("prompt_exit") and not limits.prompt_exit:
        raise FieldError(
            "prompt_exit",
            "prompt_exit=True: this model's kv_policy is 'per-depth', which writes every depth of a prompt; it saves "
            "work with 'last-exited' only",
        )
    rule, may = values.get("exit_rule", limits.rule), limits.prompt_rules
    if values.get("prompt_exit") and may is not None and rule not in may:
        raise FieldError(
            "prompt_exit",
            f"prompt_exit=True: exit_rule={rule!r} reads logits through this model's coda, which says something else "
            f"where a prompt is cut into chunks; choose exit_rule from {', '.join(may)}",
        )
    if "trace" in values:
        _check_trace(values["trace"], values, most)
    return {name: int(value) if name in FLAGS else value for name, value in values.items()}


def _check_fixed(values: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Without lanes, only what asks for the depth that every request has."""
    for name, value in values.items():
        if name == "return_recurrences" or (name, value) in (
            ("num_recurrences", limits.num_recurrences),
            ("exit_rule", "fixed"),
            ("prompt_exit", False),
            ("decoder", "plain"),
        ):
            continue
        raise FieldError(
            name,
            f"{name}={value!r}: this server runs every request at num_recurrences={limits.num_recurrences} "
            "(engine=fixed); depth per request needs engine=lanes",
        )
    return {name: int(value) for name, value in values.items() if name == "return_recurrences"}


def _check_routed(values: dict[str, Any], limits: Limits) -> None:
    for name in ("min_recurrences", "exit_threshold", "prompt_exit", "trace"):
        if name in values:
            raise FieldError(name, f"{name}={values[name]!r}: the depth of a token is what this model's router says")
    if values.get("num_recurrences", limits.num_recurrences) != limits.num_recurrences:
        depth = values["num_recurrences"]
        raise FieldError(
            "num_recurrences", f"num_recurrences={depth}: this model's router has {limits.num_recurrences}"
        )


def _check_decoder(values: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """`values` with `diffusion` as text, since vLLM's extra arguments hold no objects."""
    decoder = values.get("decoder", limits.decoder)
    if not isinstance(decoder, str) or decoder not in DECODERS:
        raise FieldError("decoder", _nearest("decoder", decoder, DECODERS))
    if decoder in limits.unfit:
        raise FieldError("decoder", f"decoder={decoder!r}: {limits.unfit[decoder]}")
    least = 2 if decoder == "diffusion" else 1
    wave = values.get("wave", limits.wave)
    if isinstance(wave, bool) or not isinstance(wave, int) or not least <= wave <= limits.wave:
        raise FieldError("wave", f"wave={wave!r}: an integer from {least} to {limits.wave}, the server's wave")
    if "wave" in values and decoder == "plain":
        raise FieldError("wave", f"wave={wave}: decoder='plain' has one position in flight; decoder='wave'")
    if decoder != "diffusion":
        if "diffusion" in values:
            raise FieldError("diffusion", f"diffusion: belongs to decoder='diffusion', and the decoder is {decoder!r}")
        return values
    check_frozen(values)
    try:
        made = diffusion(values.get("diffusion", {}))
    except ValueError as error:
        raise FieldError("diffusion", f"diffusion{error}") from None
    depth = values.get("num_recurrences", limits.num_recurrences)
    for name, most, of in (("inner", depth, "num_recurrences"), ("headway", wave, "wave")):
        if getattr(made, name) > most:
            raise FieldError("diffusion", f"diffusion.{name}={getattr(made, name)}: at most {of}, which is {most}")
    if isinstance(values.get("diffusion"), dict):
        values["diffusion"] = json.dumps(values["diffusion"])
    return values


def check_params(params: Any, limits: Limits) -> None:
    """Raises FieldError where vLLM's sampling `params`, with their `extra_args`, want what the model cannot do."""
    given = dict(getattr(params, "extra_args", None) or {})
    for name in given:
        if name not in FIELDS:
            _check_name(name)
        elif name in FLAGS and isinstance(given[name], int) and given[name] in (0, 1):
            given[name] = bool(given[name])  # as `check` hands it on
    check({name: value for name, value in given.items() if name in FIELDS}, limits)
    decoder = given.get("decoder", limits.decoder)
    if decoder == "diffusion" and (name := history(params)):
        raise FieldError(
            name,
            f"{name}={getattr(params, name)!r}: decoder='diffusion' refines tokens together, so none can wait for "
            "those before it, or say how likely it was; decoder='plain' or 'wave'",
        )


def _depth(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise FieldError(name, f"{name}={value!r}: an integer from 1 to {most}, this model's max_recurrences")


def check_frozen(values: dict[str, Any]) -> None:
    """Raises FieldError for a field of `values` that would say when positions of a diffusion leave."""
    for name in ("exit_rule", "exit_threshold", "min_recurrences", "prompt_exit", "trace"):
        if name in values and (name, values[name]) not in (("exit_rule", "fixed"), ("prompt_exit", False)):
            raise FieldError(
                name, f"{name}={values[name]!r}: decoder='diffusion' freezes positions by diffusion.freeze"
            )


def check_threshold(value: Any, rule: str) -> None:
    """Raises FieldError for a `value` that is no threshold of the exit `rule`."""
    name = "exit_threshold"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGE:
        raise FieldError(name, f"{name}={value!r}: a finite number, below {LARGE}")
    if rule == "fixed":
        raise FieldError(name, f"{name}={value!r}: exit_rule='fixed' has no threshold")
    if value < 0:
        raise FieldError(name, f"{name}={value!r}: at least 0")
    if rule == "argmax-stability" and (value != int(value) or value < 1):
        raise FieldError(name, f"{name}={value!r}: exit_rule='argmax-stability' counts recurrences: an integer from 1")
    if rule == "gate" and value > 1:
        raise FieldError(name, f"{name}={value!r}: exit_rule='gate' compares a probability: a number from 0 to 1")


def _check_trace(trace: Any, values: dict[str, Any], most: int) -> None:
    if not isinstance(trace, list) or not trace:
        raise FieldError("trace", f"trace={trace!r}: a list, the depth of every position from the prompt's first on")
    for depth in trace:
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= most:
            raise FieldError("trace", f"trace holds {depth!r}: integers from 1 to num_recurrences, which is {most}")
    for name in ("exit_rule", "exit_threshold", "min_recurrences", "prompt_exit"):
        if name in values:
            raise FieldError("trace", f"trace says the depth of every position, so {name} cannot be given beside it")


def _nearest(field: str, value: Any, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{field}={value!r}: {hint}choose from {', '.join(choices)}"


def _check_name(name: str) -> None:
    """Raises FieldError for a `name` that is nearly one of ours, or means one: vLLM would ignore it."""
    if name in AT_START:
        raise FieldError(name, f"{name} is the server's, not a request's: loopwise serve MODEL {name}=...")
    called = ["num_recurrences"] if CALLED.fullmatch(name.lower()) else []
    if near := called or difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.8):
        raise FieldError(name, f"unknown field {name!r}: did you mean {near[0]!r}? The fields are {', '.join(FIELDS)}")
