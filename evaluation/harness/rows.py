"""lm-eval's scores of one task, or of a group of tasks, as a row of the result."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate

from ...errors import UserError, reason
from ..recipe import Evaluate

SEED = 1234  # lm-eval's, of drawn examples and of sampling


def scores(lm: Any, task: Any, name: str, recipe: Evaluate) -> Any:
    """lm-eval's results of `task`. Raises UserError for what model, engine or server refuses."""
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    task.set_fewshot_seed(seed=SEED)
    try:
        return evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}},  # pyright: ignore[reportArgumentType]
            limit=recipe.limit,
            log_samples=recipe.log_samples,
            system_instruction=recipe.system_instruction,
            apply_chat_template=recipe.apply_chat_template,
            fewshot_as_multiturn=True,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"task {name}: {reason(error)}") from error
    except OSError as error:  # aiohttp's and requests' errors of a server that has gone
        if not recipe.endpoint:
            raise
        raise UserError(f"endpoint={recipe.endpoint}: task {name}: {reason(error)}") from error


def row(found: Any, name: str) -> dict[str, Any]:
    """The scores of task `name` in lm-eval's results `found`: metric, score, score_error, samples, metrics; logged."""
    metrics = {key: _plain(value) for key, value in found["results"][name].items() if "," in key}
    key = _first(metrics)
    facts = {
        **_score(metrics, key),
        "higher_is_better": found["higher_is_better"][name].get(key.partition(",")[0]),
        "samples": found["n-samples"][name]["effective"],
        "metrics": metrics,
    }
    if logged := (found.get("samples") or {}).get(name):
        of_filter = [sample for sample in logged if sample["filter"] == key.partition(",")[2]]
        facts["logged"] = [_logged(sample, key) for sample in of_filter]
    return facts


def group_row(group: Any, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row of an lm-eval `group`, as it aggregates the `rows` of its tasks, all at one depth. None if one lacks."""
    members = [task.task_name for task in group.get_all_tasks()]
    if any(name not in rows for name in members):
        return None
    of_task = {name: {**rows[name]["metrics"], "sample_len": rows[name]["samples"]} for name in members}
    metrics = {key: _plain(value) for key, value in group.aggregate(of_task).items() if "," in key}
    shared = ("baseline", "num_recurrences", "higher_is_better", "flops_per_token", "beyond_trained")
    return {
        "task": group.name,
        **_score(metrics, _first(metrics)),
        **{key: rows[members[0]][key] for key in shared},
        "samples": sum(rows[name]["samples"] for name in members),
        "metrics": metrics,
    }


def _first(metrics: dict[str, Any]) -> str:
    """The task's first metric, as `metric,filter`."""
    return next(key for key in metrics if "_stderr," not in key)


def _score(metrics: dict[str, Any], key: str) -> dict[str, Any]:
    """Metric, score and standard error of the metric `key`, `metric,filter`."""
    metric, _, kind = key.partition(",")
    error = metrics.get(f"{metric}_stderr,{kind}")
    return {"metric": key, "score": metrics[key], "score_error": error if isinstance(error, float) else None}


def _logged(sample: dict[str, Any], key: str) -> dict[str, Any]:
    """One question: its prompt, target, filtered response and score."""
    response = sample["filtered_resps"]
    return {
        "doc_id": sample["doc_id"],
        "prompt": str(sample["arguments"][0][0]),
        "target": _plain(sample["target"]),
        "response": _plain(response[0] if len(response) == 1 else response),
        "score": _plain(sample.get(key.partition(",")[0])),
    }


def _plain(value: Any) -> Any:
    """`value` as JSON holds it: numbers of numpy as Python's."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
