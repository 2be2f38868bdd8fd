"""Request fields about depth: their names, and how they are read from a request's body. Imports nothing heavy.

The fields stand at the top level of a request's body or inside its `vllm_xargs`; offline, in
`SamplingParams.extra_args`. `validation.py` compares their values with a model.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Container
from typing import Any

from ...deprecated import SERVING, current_name, old_names, print_warning, rename, two_names
from ...errors import UserError
from .echo import brief, cut

FIELDS = (
    "num_recurrences", "min_recurrences", "exit_rule", "exit_threshold", "prompt_exit", "trace", "return_recurrences",
    "decoder", "max_in_flight", "draft_every", "draft_depths", "diffusion",
)  # fmt: skip
# Value and meaning of every field, for the reference of the documentation.
ABOUT: dict[str, tuple[str, str]] = {
    "num_recurrences": (
        "integer, 1 to max_recurrences",
        "R, the most recurrences of a token; without it the server's default",
    ),
    "min_recurrences": ("integer, 1 to num_recurrences", "recurrences before the exit rule may fire"),
    "exit_rule": ("name", "test after which a token needs no more recurrences"),
    "exit_threshold": ("number, at least 0", "threshold of the rule; without it the rule's own"),
    "prompt_exit": (
        "true or false",
        "the rule ends prompt tokens, too; not with kv_policy=per-depth, and not by a rule that reads logits in a "
        "model with a coda",
    ),
    "trace": (
        "list of integers",
        "depth of every position, from the prompt's first on, in place of a rule; for measurements",
    ),
    "return_recurrences": (
        "true or false",
        "list the depth of every token in usage, beside the mean; in a stream also in its chunks",
    ),
    "decoder": ("plain, wave or diffusion", "way in which tokens are decoded"),
    "max_in_flight": (
        "integer, up to the server's, or auto",
        "most positions in flight, with decoder wave or diffusion; auto: as many as a wave can use",
    ),
    "draft_every": (
        "integer, 1 to max_recurrences, or auto",
        "recurrences between two read-outs of a wave's position; auto: by measured acceptance and load",
    ),
    "draft_depths": ("list of integers", "depths at which a wave's position is read out, in place of draft_every"),
    "diffusion": ("object", "settings of decoder=diffusion"),
}
OLD_FIELDS = old_names(SERVING, FIELDS)  # accepted: old name -> today's name
FLAGS = ("prompt_exit", "return_recurrences")
ALIASES = re.compile(  # names of num_recurrences in other programs, and in papers
    r"((n|num|number_of)_?)?(loops?|depths?|recurrences?|recursions?|recurrent_(steps|depth))"
    r"|(n|num)_(steps|iterations)"
)
SERVER_KEYS = ("kv_policy", "max_recurrences")
XARGS = "vllm_xargs"
KIND = "request field"  # in messages about old names
UNREAD = ("extra_body", "extra_args", "sampling_params")  # names in Python clients; a server ignores them
LONGEST = 32  # characters of a name that can be nearly one of ours
MOST_UNKNOWN = 64  # names in a body that nobody reads: each is compared with all of ours
MESSAGE = 1000  # characters of a refusal


class FieldError(ValueError):
    """A field of a request that is refused. The message names field, value, rule and choices.

    Both are cut: a client chooses the length of names and values. Messages repeat values by `echo.brief`.
    """

    def __init__(self, field: str, message: str):
        super().__init__(cut(message, MESSAGE))
        self.field = cut(field)


def rename_fields(values: dict[str, Any], warn: Callable[[str], object] | None = print_warning) -> dict[str, Any]:
    """A copy of `values` with today's names of fields; `warn` is that of `loopwise.deprecated.rename`.

    Raises FieldError where both names of one field have a value. A null counts as not given.
    """
    twice = {new for old, new in OLD_FIELDS.items() if old in values and new in values}
    given = {n: v for n, v in values.items() if v is not None or OLD_FIELDS.get(n, n) not in twice}
    try:
        return rename(given, SERVING, FIELDS, KIND, warn)
    except UserError as error:
        raise FieldError(min(twice), str(error)) from None


class Doubled(dict):
    """A JSON object in which the keys `twice` stand more than once; it holds the last value, as `dict` does."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]


def parse_body(body: bytes) -> Any:
    """The JSON of a request's `body`, for `take_fields`. Raises ValueError, or RecursionError, for invalid JSON."""
    return json.loads(body, object_pairs_hook=lambda p: made if len(made := dict(p)) == len(p) else Doubled(p))


def take_fields(body: dict[str, Any], known: Container[str] = ()) -> dict[str, Any]:
    """The depth fields of a request's `body`, removed from it; `known` are the names that vLLM's server reads.

    A field that is null counts as not given. An old name becomes today's, with one warning line in a process.
    Raises FieldError for:
    - a field with different values at the two places, or under its old and its new name,
    - a field whose key stands twice, or that stands where it is not read,
    - a name that is nearly one of ours, or more than MOST_UNKNOWN names that nobody reads.
    """
    values: dict[str, Any] = {}
    unknown: list[str] = []
    spelled: dict[str, str] = {}  # today's name -> the name in the body
    _check_doubled(body, XARGS)
    for place, names in ((body, known), (body.get(XARGS), ())):
        if not isinstance(place, dict):
            continue
        _check_doubled(place)
        for name in list(place):
            if name in FIELDS or name in OLD_FIELDS:
                value, new = place.pop(name), OLD_FIELDS.get(name, name)
                if value is None:
                    continue
                if (first := spelled.setdefault(new, name)) != name:
                    raise FieldError(new, two_names(first if name == new else name, new, KIND))
                other = values.setdefault(new, value)
                unlike = isinstance(other, bool) != isinstance(value, bool)  # which are 0 and 1 to Python
                if other is not value and (other != value or unlike):
                    raise FieldError(name, f"{name} is {brief(other)} in the body, but {brief(value)} in {XARGS}")
                if isinstance(value, Doubled):
                    raise FieldError(name, f"{name}.{cut(value.twice[0])} stands twice in the body: give one value")
            elif name not in names:
                unknown.append(name)
    unknown += _check_unread(body, known)
    check_names(unknown)
    for name in spelled.values():
        current_name(name, SERVING, FIELDS, KIND)  # warns
    return values


def check_names(names: list[str]) -> None:
    """Raises FieldError where one of `names`, which nobody reads, is nearly one of ours, or where they are many."""
    if len(names) > MOST_UNKNOWN:
        raise FieldError(names[0], f"{len(names)} fields that this server does not know: at most {MOST_UNKNOWN}")
    for name in names:
        check_name(name)


def check_name(name: str) -> None:
    """Raises FieldError for a `name` that is nearly one of FIELDS, or an alias of one: vLLM would ignore it."""
    if name in SERVER_KEYS:
        raise FieldError(name, f"{name} is the server's, not a request's: loopwise serve MODEL {name}=...")
    if len(name) <= LONGEST and (meant := _meant(name.lower())):
        raise FieldError(name, f"unknown field {name!r}: did you mean {meant!r}? The fields are {', '.join(FIELDS)}")


@functools.lru_cache(1024)  # every prompt of a request has its names
def _meant(name: str) -> str | None:
    """The field that `name` nearly is; None where it is far from all."""
    alias_of = ["num_recurrences"] if ALIASES.fullmatch(name) else []
    near = alias_of or difflib.get_close_matches(name, (*FIELDS, *OLD_FIELDS), n=1, cutoff=0.8)
    return OLD_FIELDS.get(near[0], near[0]) if near else None


def _check_doubled(place: dict[str, Any], *more: str) -> None:
    for name in place.twice if isinstance(place, Doubled) else ():
        if name in FIELDS or name in OLD_FIELDS or name in more:
            raise FieldError(name, f"{name} stands twice in the body: give one value")


def _check_unread(body: dict[str, Any], known: Container[str], names: tuple[str, ...] = UNREAD) -> list[str]:
    """Raises FieldError for a depth field in an object with one of these `names`. Returns the unknown names in it."""
    unknown = []
    for where in names:
        place = body.get(where)
        if not isinstance(place, dict):
            continue
        for name, value in place.items():
            ours = name in FIELDS or name in OLD_FIELDS
            if ours and value is not None:
                raise FieldError(
                    name, f"{name} in {where!r} is not read: put it at the top level of the body, or in its {XARGS}"
                )
            if not ours and name not in known:
                unknown.append(name)
        unknown += _check_unread(place, known, (*UNREAD, XARGS))
    return unknown
