"""How much a request, and all of them together, may ask for: choices (n x prompts), running and waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..api.fields import FieldError
from ..api.limits import HttpLimits

RETRY_AFTER = "5"  # seconds, as a header


class QueueFull(Exception):
    """No request is taken now."""


class Load:
    """Choices of the requests that are open. limits: of the server."""

    def __init__(self, limits: HttpLimits):
        self.limits = limits
        self.open = 0

    @contextmanager
    def admitted(self, choices: int, running: int) -> Iterator[None]:
        """Count a request of so many `choices` while it is open, in an engine that runs so many at once.

        Raises QueueFull where more than `max_queue` would wait. A request alone is always taken.
        """
        if choices and self.open and self.open + choices > running + self.limits.max_queue:
            raise QueueFull(
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


def choices_of(path: str, body: dict[str, Any]) -> int:
    """The sequences that a request with this `body` asks for; where vLLM will refuse the fields that tell it, any."""
    params = body.get("sampling_params") if path == "/inference/v1/generate" else body
    prompts = body.get(PROMPTS.get(path, ""))
    count = 1  # a list of numbers is one prompt, of tokens
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        count = len(prompts)
    return _count(params.get("n") if isinstance(params, dict) else 1) * count


def _count(n: Any) -> int:
    """`n` as vLLM reads it: text and floats of whole numbers count, too."""
    try:
        return max(int(n), 1)
    except (TypeError, ValueError, OverflowError):
        return 1


def check_choices(choices: int, limits: HttpLimits) -> None:
    """Raises FieldError for a request of more `choices` than the server allows."""
    if choices > limits.max_choices:
        raise FieldError("n", f"n x prompts = {choices}: at most max_choices={limits.max_choices} of this server")
