"""The values of a request's fields, compared with what a served model offers. Imports nothing heavy."""

from __future__ import annotations

import difflib
import json
from typing import Any

from .decoders import DECODERS, LARGE, diffusion, history
from .depth import check_minimum
from .echo import brief
from .fields import FIELDS, FLAGS, LONGEST, FieldError, check_name, rename_fields
from .limits import Limits


def validate_fields(values: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """`values` by field, as vLLM's `extra_args` can hold them.

    Raises FieldError for a value that the model excludes.
    """
    for name, value in values.items():
        if name in FLAGS:
            if not isinstance(value, bool):
                raise FieldError(name, f"{name}={brief(value)}: true or false")
        elif name in ("num_recurrences", "min_recurrences"):
            _depth(name, value, limits.max_recurrences)
    if limits.fixed:
        return _check_fixed(values, limits)
    if limits.routed:
        _check_routed(values, limits)
    values = _check_decoder(dict(values), limits)
    most = values.get("num_recurrences", limits.num_recurrences)
    check_minimum(values.get("min_recurrences"), most)
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
            f"prompt_exit=True: exit_rule={rule!r} reads logits through this model's coda, and they depend on how a "
            f"prompt is cut into chunks; choose exit_rule from {', '.join(may)}",
        )
    if "trace" in values:
        _check_trace(values["trace"], values, most, limits.max_model_len)
    return {name: int(value) if name in FLAGS else value for name, value in values.items()}


def _check_fixed(values: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The fixed engine's `values`. Raises FieldError for one that asks for another depth than every request's."""
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
            f"{name}={brief(value)}: this server runs every request at num_recurrences={limits.num_recurrences} "
            "(engine=fixed); depth per request needs engine=lanes",
        )
    return {name: int(value) for name, value in values.items() if name == "return_recurrences"}


def _check_routed(values: dict[str, Any], limits: Limits) -> None:
    for name in ("min_recurrences", "exit_threshold", "prompt_exit", "trace"):
        if name in values:
            raise FieldError(name, f"{name}={brief(values[name])}: this model's router decides the depth of a token")
    if values.get("num_recurrences", limits.num_recurrences) != limits.num_recurrences:
        depth = values["num_recurrences"]
        raise FieldError(
            "num_recurrences", f"num_recurrences={depth}: this model's router has {limits.num_recurrences}"
        )


def _check_decoder(values: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """`values`, with `diffusion` as text: vLLM's extra arguments hold no objects. Raises FieldError for a decoder, or a
    field of one, that the model excludes."""
    decoder = values.get("decoder", limits.decoder)
    if not isinstance(decoder, str) or decoder not in DECODERS:
        raise FieldError("decoder", _nearest("decoder", decoder, DECODERS))
    if decoder in limits.unfit:
        raise FieldError("decoder", f"decoder={decoder!r}: {limits.unfit[decoder]}")
    least = 2 if decoder == "diffusion" else 1
    name, most = "max_in_flight", limits.max_in_flight
    in_flight = values.get(name, most)
    check_width(in_flight, decoder)
    in_flight = most if in_flight == "auto" else in_flight
    if isinstance(in_flight, bool) or not isinstance(in_flight, int) or not least <= in_flight <= most:
        auto = ", or 'auto'" if decoder != "diffusion" else ""
        rule = f"an integer from {least} to {most}, the server's {name}{auto}"
        raise FieldError(name, f"{name}={brief(in_flight)}: {rule}")
    if name in values and decoder == "plain":
        given = brief(values[name])
        raise FieldError(name, f"{name}={given}: decoder='plain' has one position in flight; use decoder='wave'")
    check_drafts(values, decoder, limits.max_recurrences)
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
    for name, most, of in (("inner", depth, "num_recurrences"), ("headway", in_flight, "max_in_flight")):
        if getattr(made, name) > most:
            raise FieldError("diffusion", f"diffusion.{name}={getattr(made, name)}: at most {of}, which is {most}")
    if isinstance(values.get("diffusion"), dict):
        values["diffusion"] = json.dumps(values["diffusion"])
    return values


def check_width(in_flight: Any, decoder: str) -> None:
    """Raises FieldError for a diffusion whose `max_in_flight` is "auto"."""
    if in_flight == "auto" and decoder == "diffusion":
        rule = "decoder='diffusion' needs a number, as its text depends on it"
        raise FieldError("max_in_flight", f"max_in_flight='auto': {rule}")


def check_drafts(values: dict[str, Any], decoder: str, most: int) -> None:
    """Raises FieldError for depths at which a wave drafts, in `values`, that are not depths of 1 to `most`, or that
    belong to another decoder. None and an empty tuple count as not given."""
    every, depths = values.get("draft_every"), values.get("draft_depths")
    given = [name for name in ("draft_every", "draft_depths") if values.get(name) not in (None, ())]
    if given and decoder != "wave":
        value = brief(values[given[0]])
        raise FieldError(given[0], f"{given[0]}={value}: belongs to decoder='wave', and the decoder is {decoder!r}")
    if len(given) == 2:
        raise FieldError("draft_depths", "draft_depths: give draft_every or draft_depths, not both")
    if "draft_every" in given and every != "auto" and (type(every) is not int or not 1 <= every <= most):
        rule = f"an integer from 1 to {most}, this model's max_recurrences, or 'auto'"
        raise FieldError("draft_every", f"draft_every={brief(every)}: {rule}")
    if "draft_depths" in given:
        listed: list[Any] = list(depths) if isinstance(depths, list | tuple) else []
        whole = bool(listed) and all(type(depth) is int and 1 <= depth <= most for depth in listed)
        if not whole or listed != sorted(set(listed)):
            rule = f"depths from 1 to {most}, this model's max_recurrences, in rising order"
            raise FieldError("draft_depths", f"draft_depths={brief(depths)}: a list of {rule}")


def validate_params(params: Any, limits: Limits) -> None:
    """Raises FieldError for a value in vLLM's sampling `params`, or their `extra_args`, that the model excludes."""
    given = rename_fields(getattr(params, "extra_args", None) or {})
    for name in given:
        if name not in FIELDS:
            check_name(name)
        elif name in FLAGS and isinstance(given[name], int) and given[name] in (0, 1):
            given[name] = bool(given[name])  # `validate_fields` makes numbers of flags
    validate_fields({name: value for name, value in given.items() if name in FIELDS}, limits)
    decoder = given.get("decoder", limits.decoder)
    if decoder == "diffusion" and (name := history(params)):
        raise FieldError(
            name,
            f"{name}={brief(getattr(params, name))}: decoder='diffusion' refines tokens together, so a token can "
            "neither wait for those before it nor have a log-probability; use decoder='plain' or 'wave'",
        )


def _depth(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise FieldError(name, f"{name}={brief(value)}: an integer from 1 to {most}, this model's max_recurrences")


def check_frozen(values: dict[str, Any]) -> None:
    """Raises FieldError for a field of `values` that sets exits, which decoder='diffusion' has none of."""
    for name in ("exit_rule", "exit_threshold", "min_recurrences", "prompt_exit", "trace"):
        if name in values and (name, values[name]) not in (("exit_rule", "fixed"), ("prompt_exit", False)):
            raise FieldError(
                name, f"{name}={brief(values[name])}: decoder='diffusion' freezes positions by diffusion.freeze"
            )


def check_threshold(value: Any, rule: str) -> None:
    """Raises FieldError for a `value` that the exit `rule` cannot have as threshold."""
    name = "exit_threshold"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGE:
        raise FieldError(name, f"{name}={brief(value)}: a finite number, below {LARGE}")
    if rule == "fixed":
        raise FieldError(name, f"{name}={brief(value)}: exit_rule='fixed' has no threshold")
    if value < 0:
        raise FieldError(name, f"{name}={brief(value)}: at least 0")
    if rule == "argmax-stability" and (value != int(value) or value < 1):
        raise FieldError(
            name, f"{name}={brief(value)}: exit_rule='argmax-stability' counts recurrences: an integer from 1"
        )
    if rule == "gate" and value > 1:
        raise FieldError(name, f"{name}={brief(value)}: exit_rule='gate' compares a probability: a number from 0 to 1")


def _check_trace(trace: Any, values: dict[str, Any], most: int, length: int | None) -> None:
    if not isinstance(trace, list) or not trace:
        raise FieldError(
            "trace", f"trace={brief(trace)}: a list of depths, one for every position from the prompt's first on"
        )
    if length is not None and len(trace) > length:
        raise FieldError("trace", f"trace has {len(trace)} depths: at most {length}, the positions of this server")
    for depth in () if set(map(type, trace)) == {int} and min(trace) >= 1 and max(trace) <= most else trace:
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= most:
            raise FieldError(
                "trace", f"trace holds {brief(depth)}: integers from 1 to num_recurrences, which is {most}"
            )
    for name in ("exit_rule", "exit_threshold", "min_recurrences", "prompt_exit"):
        if name in values:
            raise FieldError("trace", f"trace sets the depth of every position, so {name} cannot be given beside it")


def _nearest(field: str, value: Any, choices: tuple[str, ...]) -> str:
    short = isinstance(value, str) and len(value) <= LONGEST
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5) if short else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{field}={brief(value)}: {hint}choose from {', '.join(choices)}"
