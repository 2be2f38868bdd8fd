"""Outcomes of `loopwise eval tasks=...`, question for question: against lm-eval's own `hf`, by engine, and served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.questions import DEPTHS, save_asked
from tests.helpers.serving import serving
from tests.helpers.train_tiny import run

COUNT = 200
TASKS = ("generated", "chosen")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A folder with the recurrent-depth model `model` and two tasks of COUNT questions about it."""
    return save_asked(tmp_path_factory.mktemp("many"), COUNT)


def outcomes(folder: Path, out: Path, *settings: str) -> dict[tuple[str, int], list[Any]]:
    """(prompt, response, score) of each question, by task and depth, and the file's scores checked against them."""
    tasks = ",".join(f"{folder}/{task}.yaml" for task in TASKS)
    depths = f"num_recurrences={','.join(map(str, DEPTHS))}"
    run(["eval", str(folder / "model"), f"tasks={tasks}", depths, "log_samples=true", "--out", str(out), *settings])
    found = {}
    for row in json.loads(out.read_text())["results"]:
        logged = sorted(row["logged"], key=lambda one: one["doc_id"])
        assert len(logged) == COUNT
        assert row["score"] == pytest.approx(sum(one["score"] for one in logged) / COUNT)
        found[row["task"], row["num_recurrences"]] = [(one["prompt"], one["response"], one["score"]) for one in logged]
    return found


def of_lm_eval(plain: Path, folder: Path) -> dict[str, list[Any]]:
    """The same of lm-eval's own `hf` on the plain model `plain`, by task."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments: dict[str, Any] = {"pretrained": str(plain), "dtype": "float32"}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options: dict[str, Any] = {"device": "cpu", "batch_size": 8, "task_manager": manager, "log_samples": True}
    there = Path.cwd()
    os.chdir(folder)  # lm-eval reads data files from the current directory
    try:
        done: Any = simple_evaluate(model="hf", model_args=arguments, tasks=[*TASKS], **options)
    finally:
        os.chdir(there)
    found = {}
    for task, metric in zip(TASKS, ("exact_match", "acc"), strict=True):
        logged = sorted(done["samples"][task], key=lambda one: one["doc_id"])
        responses = [one["filtered_resps"] for one in logged]
        found[task] = [
            (one["arguments"][0][0], [list(pair) for pair in many] if len(many) > 1 else many[0], one[metric])
            for one, many in zip(logged, responses, strict=True)
        ]
    return found


@pytest.mark.slow
def test_exported_models_in_lm_eval_answer_the_same(many, tmp_path):
    """200 questions of two kinds at three depths, with scores that are neither 0, 1 nor chance."""
    ours = outcomes(many, tmp_path / "ours.json")
    for depth in DEPTHS:
        plain = tmp_path / f"plain-{depth}"
        run(["export", str(many / "model"), str(plain), "--unroll", str(depth)])
        theirs = of_lm_eval(plain, many)
        for task, chance in zip(TASKS, (0.0, 0.25), strict=True):
            assert ours[task, depth] == theirs[task]
            score = sum(one[2] for one in theirs[task]) / COUNT
            assert chance + 0.1 < score < 0.9
    for task in TASKS:
        right = {depth: [one[2] for one in ours[task, depth]] for depth in DEPTHS}
        assert min(sum(a != b for a, b in zip(right[2], right[other], strict=True)) for other in (1, 4)) > COUNT / 20


@pytest.mark.slow
def test_engine_and_server_answer_as_transformers(many, tmp_path):
    """Generations are equal in float32; log-likelihoods of the server up to rounding."""
    pytest.importorskip("vllm")
    ours = outcomes(many, tmp_path / "ours.json")
    lanes = outcomes(many, tmp_path / "lanes.json", "engine=lanes")
    assert lanes == ours
    with serving(many / "model", "max_recurrences=4") as server:
        served = outcomes(many, tmp_path / "served.json", f"endpoint={server.url}/v1")
    for (task, depth), logged in served.items():
        if task == "generated":
            assert logged == ours[task, depth]
            continue
        for (prompt, pairs, score), (same, wanted, right) in zip(logged, ours[task, depth], strict=True):
            assert (prompt, score) == (same, right)
            assert [pair[0] for pair in pairs] == pytest.approx([pair[0] for pair in wanted], abs=1e-3)
    rows = json.loads((tmp_path / "served.json").read_text())["results"]
    assert [row["mean_recurrences"] for row in rows] == [*DEPTHS, *DEPTHS]


@pytest.mark.slow
def test_a_killed_measurement_goes_on_where_it_was(many, tmp_path):
    """SIGKILL, again and again, at other moments: every pair ends up in the file, whole files only."""
    out = tmp_path / "scores.json"
    tasks = ",".join(f"{many}/{task}.yaml" for task in TASKS)
    given = ["eval", str(many / "model"), f"tasks={tasks}", "num_recurrences=1,2,4", "batch_size=1", "--out", str(out)]
    seen = [0]
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-m", "loopwise", *given], stderr=subprocess.DEVNULL)
        while process.poll() is None and pairs(out) <= seen[-1]:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(pairs(out))
        if seen[-1] == 6:
            break
    assert seen == sorted(set(seen))
    assert seen[-1] == 6
    assert len(seen) > 3
    run(given)
    whole = json.loads(out.read_text())["results"]
    run([*given, "--force"])
    again = json.loads(out.read_text())["results"]
    assert [(row["task"], row["score"]) for row in whole] == [(row["task"], row["score"]) for row in again]


def pairs(out: Path) -> int:
    """Finished pairs in a file of results."""
    return len(json.loads(out.read_text())["results"]) if out.exists() else 0
