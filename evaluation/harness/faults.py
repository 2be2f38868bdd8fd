"""Errors of tasks out of files, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import UserError, reason


@contextmanager
def one_line(task: str) -> Iterator[None]:
    """A block in which lm-eval works on a `task` of a file, whose wrong keys it meets by any error.

    Raises UserError in their place. Those of the model, its engine and the system stay: RuntimeError, MemoryError and
    OSError.
    """
    try:
        yield
    except (UserError, RuntimeError, MemoryError, OSError):
        raise
    except Exception as error:
        raise UserError(f"task {task}: {type(error).__name__}: {reason(error)}") from error
