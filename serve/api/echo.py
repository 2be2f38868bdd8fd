"""Values of requests, as messages repeat them: at most 200 characters, and at the cost of these alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ECHO = 200


def brief(value: Any, limit: int = ECHO) -> str:
    """The repr of a JSON `value`, or its first characters where it has more than `limit`."""
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            return text[: limit - 3] + "..."
    return text


def cut(text: str, limit: int = ECHO) -> str:
    """`text`, or its first characters where it has more than `limit`."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _pieces(value: Any, limit: int) -> Iterator[str]:
    """The repr of `value` in pieces; each has little more than `limit` characters."""
    if isinstance(value, dict):
        for number, (name, inner) in enumerate(value.items()):
            yield (", " if number else "{") + repr(name[: limit + 1] if isinstance(name, str) else name) + ": "
            yield from _pieces(inner, limit)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield ", " if number else "["
            yield from _pieces(inner, limit)
        yield "]" if value else "[]"
    else:
        yield repr(value[: limit + 1] if isinstance(value, str) else value)
