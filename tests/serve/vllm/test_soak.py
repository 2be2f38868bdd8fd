"""A server under thousands of requests, disconnects and bad bodies: nothing fails, leaks or is stuck."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from bench.soak import FLAGS, Load, judge, sample
from bench.soak import main as soak
from tests.helpers.serve_tiny import GROUPED, RETROFIT, save, source_config
from tests.helpers.serving import Server, metric, serving

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

REQUESTS, CLIENTS = 2000, 64


@pytest.mark.parametrize(
    ("seconds", "flat"), [(20, 1.15), pytest.param(600, 1.05, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_soak_of_mixed_load(seconds, flat, tmp_path):
    """`bench/soak.py` for 20 seconds, and for a sixth of an hour. Caches still fill in so short a time."""
    save(tmp_path / "tiny", source_config("llama", **GROUPED), **{**RETROFIT, "num_recurrences": 4})
    arguments = ["--seconds", str(seconds), "--clients", "16", "--flat", str(flat), "--out", str(tmp_path / "soak")]
    assert soak([str(tmp_path / "tiny"), *arguments]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["answers"]["200"] > found["answers"]["400"] > 0
    assert min(found["kinds"].values()) > 0
    assert found["preempted"] > 0
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_a_soak_sees_what_it_did_not_try():
    """A kind of request that is always refused, and a cache that is never full."""
    samples = [{"api": {"memory": 100, "files": 9}, "engine": {"memory": 100, "files": 9}}] * 20
    load = Load(0, 0, 100)
    load.answers.update({"200": 50, "400": 9, "left": 3})
    load.kinds.update(dict.fromkeys(load.kinds, 1))
    assert judge(samples, load, 1, 1.02) == []
    load.kinds["trace"] = 0
    assert judge(samples, load, 0, 1.02) == [
        "no answer 200 to a request of the kind: trace",
        "no request was preempted",
    ]


@pytest.mark.slow
def test_thousands_of_requests(tmp_path):
    """The soak's load, by its number: nothing is left behind in the engine."""
    shape = {**RETROFIT, "num_recurrences": 4, "kv_policy": "last-exited"}
    save(tmp_path / "m", source_config("llama", **GROUPED), **shape)
    with serving(tmp_path / "m", "--", *FLAGS) as server:
        process = psutil.Process(server.process.pid)

        def answered(count: int, seed: int) -> Counter[str]:
            load = Load(int(server.url.rpartition(":")[2]), seed, 100)
            asyncio.run(load.run(CLIENTS, lambda: load.number >= count))
            return load.answers

        def memory() -> int:
            return sum(part["memory"] for part in sample(process).values())

        answered(REQUESTS // 4, 1)  # caches fill
        before, answers = memory(), answered(REQUESTS, 2)
        server.wait_until(lambda: metric(server, "vllm:num_requests_running{") == 0, 60)
        print(dict(answers), f"memory {before / 2**20:.0f} MiB, then {memory() / 2**20:.0f} MiB")
        assert sum(answers.values()) >= REQUESTS
        assert {*answers} == {"200", "400", "left", "slow"}
        assert answers["200"] > REQUESTS / 2
        assert answers["400"] > REQUESTS / 20
        assert metric(server, "vllm:num_preemptions_total{") > 0
        assert metric(server, "vllm:num_requests_waiting{") == 0
        assert metric(server, "vllm:kv_cache_usage_perc{") == 0
        assert memory() < before * 1.05 + (32 << 20)


@pytest.mark.slow
def test_a_killed_engine_ends_the_server(tmp_path):
    save(tmp_path / "tiny", source_config("llama", **GROUPED), **RETROFIT)
    with serving(tmp_path / "tiny", "--", "--enforce-eager") as server:
        engine = next(
            int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and is_engine_of(server, entry)
        )
        os.kill(engine, signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert "loopwise: error: vLLM's engine died" in server.log.read_text()


def is_engine_of(server: Server, entry: Path) -> bool:
    try:
        session = (entry / "stat").read_text().rpartition(")")[2].split()[3]
        return int(session) == server.process.pid and "EngineCore" in (entry / "cmdline").read_text()
    except (OSError, IndexError):
        return False
