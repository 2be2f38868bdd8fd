"""How much a request, and all of them together, may ask for: choices (n x prompts), and bytes of their bodies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..api.fields import FieldError
from ..api.limits import HttpLimits

RETRY_AFTER = "5"  # seconds, as a header
SMALL = 1 << 16  # bytes of each body beside the common limit, so that large ones keep no small one out
INTEGER = TypeAdapter(int)
COPIES = 16  # times `max_body_mib`: the fields of all open requests, as the engine holds them for each choice


class ServerFull(Exception):
    """No such request is taken now: a 429 with this message."""


class Bodies:
    """Bodies that are in memory: beyond SMALL bytes of each, they have at most `most` bytes together.

    full: the message to one beyond that.
    """

    def __init__(self, most: int, full: str):
        self.most, self.full, self.bytes = most, full, 0

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """A block in which one body is in memory. It gets a function of the length so far, which raises ServerFull."""
        counted = 0

        def grow(length: int) -> None:
            nonlocal counted
            more = max(length - SMALL, 0) - counted
            if self.bytes + more > self.most:
                raise ServerFull(self.full)
            counted += more
            self.bytes += more

        try:
            yield grow
        finally:
            self.bytes -= counted


class Load:
    """Choices of the requests that are open. limits: of the server.   texts: the bodies that are only tokenized, which
    one thread does for all requests.   copies: the fields that the engine holds once for each choice."""

    def __init__(self, limits: HttpLimits):
        self.limits = limits
        self.open = 0
        full = f"the texts that are tokenized now take max_body_mib={limits.max_body_mib}: try later"
        self.texts = Bodies(limits.max_body_mib << 20, full)
        full = f"the fields of open requests, for each of their choices, take {COPIES} x max_body_mib: try later"
        self.copies = Bodies(COPIES * limits.max_body_mib << 20, full)

    @contextmanager
    def admitted(self, choices: int, running: int) -> Iterator[None]:
        """Count a request of so many `choices` while it is open, in an engine that runs so many at once.

        Raises ServerFull where more than `max_queue` would wait. A request alone is always taken.
        """
        if choices and self.open and self.open + choices > running + self.limits.max_queue:
            raise ServerFull(
                f"{self.open} choices are running or waiting: at most max_queue={self.limits.max_queue} wait"
            )
        self.open += choices
        try:
            yield
        finally:
            self.open -= choices


PROMPTS = {  # by route: the field with a request's prompts; elsewhere, a request has one
    "/v1/completions": "prompt",
    "/invocations": "prompt",
    "/v1/chat/completions/batch": "messages",
    "/generative_scoring": "items",
}


# Fields that the engine does not hold for each choice: prompts, which the prefix cache shares, or what becomes one.
PROMPT = frozenset(["prompt", "messages", "items", "token_ids", "documents"])


def choices_of(path: str, body: dict[str, Any]) -> int:
    """The sequences that a request with this `body` asks for; where vLLM will refuse the fields that tell it, any."""
    params = body.get("sampling_params") if path == "/inference/v1/generate" else body
    prompts = body.get(PROMPTS.get(path, ""))
    count = 1  # a list of numbers is one prompt, of tokens
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        count = len(prompts)
    return _count(params.get("n") if isinstance(params, dict) else 1) * count


def _count(n: Any) -> int:
    """`n` as vLLM reads it, by pydantic: text and floats of whole numbers count, too."""
    try:
        return max(INTEGER.validate_python(n), 1)
    except ValidationError:
        return 1


def copied(body: dict[str, Any], choices: int, limits: HttpLimits) -> int:
    """Bytes of the fields of `body`, beside its prompts, once for each of several `choices`: vLLM sends them so.

    Raises FieldError for more than `max_body_mib`.
    """
    if choices < 2:
        return 0
    size = len(json.dumps({name: value for name, value in body.items() if name not in PROMPT}))
    if size * choices > limits.max_body_mib << 20:
        raise FieldError(
            "n",
            f"n x prompts = {choices}: each takes a copy of the {size} bytes of fields beside the prompt, at most "
            f"max_body_mib={limits.max_body_mib} of this server together",
        )
    return size * choices


def check_choices(choices: int, limits: HttpLimits) -> None:
    """Raises FieldError for a request of more `choices` than the server allows."""
    if choices > limits.max_choices:
        raise FieldError("n", f"n x prompts = {choices}: at most max_choices={limits.max_choices} of this server")
