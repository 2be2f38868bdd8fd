"""From sums of losses to a result: means, standard errors, and the effect of the recurrences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import diagnosis
from ..diagnosis import standard_error
from .depths import Measured


def loss(losses: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """{"loss", "loss_error", "perplexity"} from sums of losses [n] over sequences with `tokens` [n] tokens."""
    mean = float(losses.sum() / tokens.sum())
    return {
        "loss": mean,
        "loss_error": standard_error(losses, tokens),
        "perplexity": math.exp(min(mean, 700)),
    }


def loop_effect(found: Measured) -> dict[str, Any]:
    """The effect of the recurrences.

    "num_recurrences": the most that were measured.   "gain": loss at R=1 minus the loss at that R.   "gain_error": its
    standard error, paired over sequences.   "changes_nothing": True if the gain is within two standard errors; None if
    unknown.   "state_norm", "state_change", "state_growth": of `States`, None without states.   "unbounded": the factor
    by which states grow in each recurrence, if they do so without bound.   "diagnosis": lines on what is wrong.
    """
    depths = [depth for depth in found.losses if depth is not None]
    top = max(depths)
    value = error = nothing = None
    if min(depths) < top:
        value, error, nothing = diagnosis.gain(found.losses[1], found.losses[top], found.tokens)
    states = found.states
    return {
        "num_recurrences": top,
        "gain": value,
        "gain_error": error,
        "changes_nothing": nothing,
        "state_norm": states and states.norm,
        "state_change": states and states.change,
        "state_growth": states and states.growth,
        "unbounded": states and states.unbounded,
        "diagnosis": diagnosis.lines(nothing, top, states),
    }
