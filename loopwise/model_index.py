"""Results of `loopwise eval --out` as `model-index`, by which the hub shows them on a model's page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .checkpoint import read_json
from .errors import UserError

MEASURES = ("loss", "perplexity", "accuracy")
NAMES = {"loss": "loss per token (nats)", "accuracy": "right answers"}


def read_results(file: Path) -> dict[str, Any]:
    """The result in `file`. Raises UserError where it holds no losses, answers or scores of `loopwise eval`."""
    result = read_json(file)
    rows = result.get("results")
    sound = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if not sound or not isinstance(result.get("model"), str) or not _entries(result):
        raise UserError(f"--metrics {file}: not a result of loopwise eval --out, with losses, answers or scores")
    return result


def model_index(name: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The value of `model-index` for the model `name`: an entry for each set of data, or task, of the `results`."""
    return [{"name": name, "results": [entry for result in results for entry in _entries(result)]}]


def _entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of one result: its data, or its tasks, with the measures at each depth."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["results"]:
        if row.get("baseline"):
            continue
        if isinstance(row.get("task"), str):
            data, kind = row["task"], str(row.get("metric", "score")).partition(",")[0]
            measures = {kind: row.get("score")}
        else:
            data, measures = _data(result), {kind: row.get(kind) for kind in MEASURES}
        for kind, value in measures.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(data, []).append(_metric(kind, value, row.get("num_recurrences")))
    return [
        {"task": {"type": "text-generation"}, "dataset": {"type": data, "name": data}, "metrics": metrics}
        for data, metrics in found.items()
    ]


def _metric(kind: str, value: float, depth: Any) -> dict[str, Any]:
    """One number, at `depth` recurrences."""
    name = NAMES.get(kind, kind)
    if not isinstance(depth, int):
        return {"type": kind, "value": value, "name": name}
    return {"type": kind, "value": value, "name": f"{name}, R={depth}", "args": {"num_recurrences": depth}}


def _data(result: dict[str, Any]) -> str:
    """The sources of a result: ids and tasks, and of local files the names alone."""
    if names := result.get("data_names"):
        return ", ".join(map(str, names))
    given = result.get("data")  # of an earlier release
    sources = [str(source) for source in (given if isinstance(given, list) else [given]) if source]
    return ", ".join(Path(one).name if Path(one).expanduser().exists() else one for one in sources) or "text"
