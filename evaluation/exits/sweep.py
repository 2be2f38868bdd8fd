"""`loopwise eval exit_sweep=..`: every rule at thresholds that spread its mean depth, and fixed depths beside them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..answers import Sequences
from .bench import Bench, Decoding

MOST = 8  # fixed depths, where none are named
ALL = "all"


def sweep(
    model: Any, sequences: Sequences, decoding: Decoding, names: list[str], depths: list[int], count: int, size: int
) -> dict[str, Any]:
    """{"results": rows of fixed `depths`, "exits": {rule: rows by threshold}} of a recurrent-depth `model`.

    names: rules, or "all".   count: thresholds of each.   size: sequences at once. Rows are those of `Bench`.
    Raises UserError for a rule that the model lacks, and where no position may leave by a rule.
    """
    from tqdm import tqdm

    bench = Bench.open(model, sequences, decoding, size)
    rules = bench.rules if ALL in names else names
    for rule in rules:
        bench.check(rule)
    depths = sorted({*depths, decoding.num_recurrences}, reverse=True)  # full depth first: the others compare with it
    runs = len(depths) + len(rules) * (1 + count)
    with tqdm(total=runs * len(bench.spans), desc="eval", unit="answer", disable=not sys.stderr.isatty()) as bar:
        bench.report = bar.update
        thresholds = {rule: bench.saved(rule).thresholds(count) for rule in rules}
        fixed = [bench.fixed(depth) for depth in depths]
        exits = {rule: [bench.at(rule, threshold) for threshold in thresholds[rule]] for rule in rules}
    for rows in exits.values():
        rows.sort(key=lambda row: row["mean_recurrences"])
    return {"results": fixed[::-1], "exits": exits}


def spread_depths(num_recurrences: int) -> list[int]:
    """1 to `num_recurrences`, all of them or MOST, closer together where they are small."""
    found = np.geomspace(1, num_recurrences, MOST) if num_recurrences > MOST else np.arange(1, num_recurrences + 1)
    return sorted({round(depth) for depth in found.tolist()})
