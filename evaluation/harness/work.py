"""Tokens, recurrences and seconds of a model's requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Work:
    """The work of a model for the requests of one task.

    tokens: of prompts and answers, without padding.   counted: tokens whose recurrences are known, `spent` all their
    recurrences.   computed: recurrences of the core that ran for them, those of tokens that were dropped included;
    None where that is `spent`.   seconds: time in the model's calls.
    """

    tokens: int = 0
    counted: int = 0
    spent: float = 0.0
    computed: float | None = None
    seconds: float = 0.0

    def add(self, tokens: int, depth: float | None, counted: int | None = None) -> None:
        """Count `tokens`, of which `counted` (default: all) ran `depth` recurrences each. depth: None for unknown."""
        self.tokens += tokens
        if depth is not None:
            counted = tokens if counted is None else counted
            self.counted += counted
            self.spent += depth * counted

    @property
    def mean_recurrences(self) -> float | None:
        """Mean recurrences of a token; None where no token's are known."""
        return self.spent / self.counted if self.counted else None

    @property
    def mean_computed(self) -> float | None:
        """Mean recurrences that were computed for a token."""
        return self.mean_recurrences if self.computed is None else self.computed / max(self.counted, 1)

    @property
    def seconds_per_token(self) -> float | None:
        return self.seconds / self.tokens if self.tokens else None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A block whose duration is added to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
