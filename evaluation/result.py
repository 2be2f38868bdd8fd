"""From sums of losses to a result: means, standard errors, and the effect of the recurrences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .depths import Measured

FEW = 8  # sequences; with fewer, a standard error is not reliable


def loss(losses: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """{"loss", "loss_error", "perplexity"} from sums of losses [n] over sequences with `tokens` [n] tokens."""
    mean = float(losses.sum() / tokens.sum())
    return {
        "loss": mean,
        "loss_error": standard_error(losses, tokens),
        "perplexity": math.exp(min(mean, 700)),
    }


def standard_error(sums: np.ndarray, tokens: np.ndarray) -> float | None:
    """Standard error of a mean per token over sequences, as a ratio of two means. None for a single sequence.

    sums, tokens [n]: each sequence's sum and number of tokens.
    """
    count = len(sums)
    if count < 2:
        return None
    residuals = sums - tokens * (sums.sum() / tokens.sum())
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / tokens.sum())


def loop_effect(found: Measured) -> dict[str, Any]:
    """The effect of the recurrences.

    "num_recurrences": the most that were measured.   "gain": loss at R=1 minus the loss at that R.   "gain_error": its
    standard error, paired over sequences.   "changes_nothing": True if the gain is within two standard errors; None if
    unknown.   "state_norm": |s_r| for r = 1, 2, ..   "state_change": |s_r - s_{r-1}| / |s_r| for r = 2, 3, ..
    """
    depths = [depth for depth in found.losses if depth is not None]
    top = max(depths)
    gain = error = nothing = None
    if min(depths) < top:
        difference = found.losses[1] - found.losses[top]
        gain = float(difference.sum() / found.tokens.sum())
        error = standard_error(difference, found.tokens)
        nothing = None if error is None or len(difference) < FEW else abs(gain) <= 2 * error
    return {
        "num_recurrences": top,
        "gain": gain,
        "gain_error": error,
        "changes_nothing": nothing,
        "state_norm": found.norm,
        "state_change": found.change,
    }
