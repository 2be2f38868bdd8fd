"""A short request beside a long prompt waits no longer because that prompt is deep."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.helpers.serve_tiny import GROUPED, RETROFIT, run_cases, save, source_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

BUDGET, DEEP, ROWS = 64, 32, 6
LONG = 512  # tokens: as many times the budget as 8k are of 1,024
SLOWER = 8  # times in seconds: many narrow passes cost more than one of as many lanes
WARM = 10  # short requests, after which all kernels have been met


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """The measurements of run_budget.py, by the depth of the long prompts."""
    folder = tmp_path_factory.mktemp("budget")
    source = source_config("llama", **{**GROUPED, "max_position_embeddings": 1024})
    save(folder / "model", source, **{**RETROFIT, "num_recurrences": 4, "max_recurrences": DEEP})
    common = {"folder": str(folder / "model"), "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}
    cases = [{**common, "depth": depth, "long": LONG, "budget": BUDGET, "shorts": 40} for depth in (1, DEEP)]
    done = run_cases(cases, folder, "run_budget.py")
    assert not [result["error"] for result in done if "error" in result]
    return dict(zip((1, DEEP), done, strict=True))


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def test_a_step_is_bounded_in_tokens_times_depth(results):
    """Passes of a step, and prompt lanes of all of them: the other lanes are those of requests that decode."""
    for depth, result in results.items():
        for passes, lanes in result["steps"]:
            assert passes <= max(depth, 8)
            assert lanes <= BUDGET + passes * ROWS + 8 * 4  # and a short prompt


def test_a_short_request_waits_at_most_twice_as_long(results):
    waits = {depth: p99(result["latency"]) for depth, result in results.items()}
    seconds = {depth: p99(result["seconds"][WARM:]) for depth, result in results.items()}
    print(f"p99 in lanes of passes: {waits}, in seconds: {seconds}")
    assert waits[DEEP] <= 2 * waits[1]
    assert seconds[DEEP] <= SLOWER * seconds[1]
