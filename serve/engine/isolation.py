"""Faults of one request: an exception ends the request whose work raised it, and no other.

Shapes: m tokens to sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from .tick import Sampler


class Faults(dict[int, Exception]):
    """By row, the exception that its request ends with. The caller ends these requests after the step."""

    @contextmanager
    def of(self, row: int) -> Generator[None]:
        """Do the work of `row` alone. An exception ends here, and becomes the row's fault.

        Raises torch.AcceleratorError: then the device is lost, for all requests.
        """
        try:
            yield
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self.setdefault(row, error)

    def sample(self, sampler: Sampler, logits: Tensor, best: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """As `sampler` of logits [m, V]. Where it raises, it is called for every row alone. Those that raise again get
        the fault, and their likeliest tokens, `best` [m].

        `sampler` must leave no trace of a call that raises. Raises as `of` does, and whatever a graph's capture raises:
        there, rows cannot be told apart.
        """
        try:
            return sampler(logits, best, row, position)
        except torch.AcceleratorError:
            raise
        except Exception:
            rows = row.tolist()  # waits for the device, which a capture forbids
        tokens = best.clone()
        for one in dict.fromkeys(rows):
            mine = row == one
            with self.of(one):
                tokens[mine] = sampler(logits[mine], best[mine], row[mine], position[mine])
        return tokens
