"""An exit threshold that is chosen on one half of the data, and checked on the other."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import UserError
from ..answers import Sequences
from .bench import Bench
from .choose import GRID, HALVINGS, choose
from .sweep import spread_depths


def halves(sequences: Sequences) -> tuple[Sequences, Sequences]:
    """Two halves at random, the same at every call. Raises UserError for a single sequence."""
    count = len(sequences.ids)
    if count < 2:
        raise UserError("data: one sequence, and a half of the data checks the other: give more, or shorter ones")
    order = np.random.default_rng(0).permutation(count)  # at random, as groups may take turns
    first, second = (sequences.some(sorted(part.tolist())) for part in np.array_split(order, 2))
    return first, second


def calibrate(bench: Bench, data: tuple[Sequences, Sequences], rule: str, budget: float) -> dict[str, Any]:
    """The curve of `rule` and its chosen threshold on the first half, and the check on the second.

    bench: of all data.   budget: nats a token that the loss may lie above full depth's. Returns the facts of
    `Decoding`, {"rule", "budget", "results": rows at fixed depths up to full depth, "exits": {rule: rows}, "chosen":
    row, "check": {"full": row, "chosen": row}}; rows are those of `Bench`. Raises UserError where no threshold stays
    within the budget.
    """
    from tqdm import tqdm

    first, second = (replace(bench, sequences=half) for half in data)
    top = bench.decoding.num_recurrences
    fewer = spread_depths(top)[:-1]  # full depth is measured first: the others compare with it
    runs = (2 + GRID + HALVINGS + len(fewer)) * len(first.spans) + 2 * len(second.spans)
    with tqdm(total=runs, desc="calibrate", unit="answer", disable=not sys.stderr.isatty()) as bar:
        first.report = second.report = bar.update
        full, chosen, curve = choose(first, rule, budget)
        fixed = [*map(first.fixed, fewer), full]
        check = {"full": second.fixed(top), "chosen": second.at(rule, chosen["threshold"])}
    found = {**vars(bench.decoding), "rule": rule, "budget": budget, "results": fixed, "exits": {rule: curve}}
    return {**found, "chosen": chosen, "check": check}
