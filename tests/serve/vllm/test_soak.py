"""A server under thousands of requests, disconnects and bad bodies: nothing fails, leaks or is stuck."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.soak import main as soak
from tests.helpers.serve_tiny import GROUPED, RETROFIT, save, source_config
from tests.helpers.serving import Server, metric, serving

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

REQUESTS, CLIENTS = 2000, 64
BAD = [
    b"{",
    b"[]",
    b'"text"',
    b'{"model": "tiny"}',
    *(
        json.dumps({"model": "tiny", "prompt": "a", **fields}).encode()
        for fields in (
            {"num_recurrences": 0},
            {"num_recurrences": 1e9},
            {"exit_rule": {}},
            {"exit_threshold": float("nan")},
            {"exit_rule": "cosine", "exit_threshold": 1e300},
            {"trace": [[1]]},
            {"vllm_xargs": {"num_recurrences": "x"}},
            {"vllm_xargs": 3},
            {"exit_rules": "fixed"},
            {"max_tokens": -1},
        )
    ),
]


def good(draw: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": draw.randint(1, 40), "ignore_eos": True}
    body["prompt"] = [draw.randrange(256) for _ in range(draw.randint(1, 100))]
    body["num_recurrences"] = draw.randint(1, 8)
    body["stream"] = draw.random() < 0.5
    body |= draw.choice(
        ({}, {"exit_rule": "latent-diff", "exit_threshold": 0.5}, {"exit_rule": "kl"}, {"temperature": 1.0, "n": 2},
         {"logprobs": 2}, {"stop": ["a"]}, {"structured_outputs": {"regex": "[0-9]{2}"}}, {"prompt_exit": True},
         {"trace": [1] * 512})
    )  # fmt: skip
    return body


def resident(server: Server) -> int:
    """Bytes of memory that the server's processes hold."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            session = (entry / "stat").read_text().rpartition(")")[2].split()[3]
            if int(session) == server.process.pid:
                total += int((entry / "statm").read_text().split()[1]) * 4096
        except (OSError, ValueError, IndexError):
            continue
    return total


async def load(server: Server, count: int, seed: int) -> Counter[int]:
    """Send `count` requests from CLIENTS clients; how often each status came. 0: disconnected by us."""
    import aiohttp

    statuses: Counter[int] = Counter()
    left = list(range(count))

    async def client(session) -> None:
        while left:
            draw = random.Random((seed, left.pop()).__hash__())
            body = draw.choice(BAD) if draw.random() < 0.1 else json.dumps(good(draw)).encode()
            patience = draw.uniform(0.001, 0.5) if draw.random() < 0.2 else 300
            try:
                async with asyncio.timeout(patience):
                    headers = {"Content-Type": "application/json"}
                    async with session.post(server.url + "/v1/completions", data=body, headers=headers) as reply:
                        await reply.read()
                        statuses[reply.status] += 1
            except TimeoutError:
                assert patience < 300, "a request is stuck"
                statuses[0] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return statuses


@pytest.mark.parametrize(
    ("seconds", "flat"), [(36, 1.15), pytest.param(600, 1.05, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_soak_of_mixed_load(seconds, flat, tmp_path):
    """`bench/soak.py` for a hundredth of an hour, and for a sixth. Caches still fill in so short a time."""
    save(tmp_path / "tiny", source_config("llama", **GROUPED), **{**RETROFIT, "num_recurrences": 4})
    arguments = ["--seconds", str(seconds), "--clients", "16", "--flat", str(flat), "--out", str(tmp_path / "soak")]
    assert soak([str(tmp_path / "tiny"), *arguments]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["answers"]["200"] > found["answers"]["400"] > 0
    assert (tmp_path / "soak.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["last-exited"])
def test_thousands_of_requests(policy, tmp_path):
    shape = {**RETROFIT, "num_recurrences": 4, "kv_policy": policy}
    save(tmp_path / "tiny", source_config("llama", **GROUPED), **shape)
    flags = "--enforce-eager", "--max-num-seqs", "24", "--num-gpu-blocks-override", "60"
    with serving(tmp_path / "tiny", "--", *flags) as server:
        asyncio.run(load(server, REQUESTS // 4, 1))  # caches fill
        before = resident(server)
        statuses = asyncio.run(load(server, REQUESTS, 2))
        server.wait_until(lambda: metric(server, "vllm:num_requests_running{") == 0, 60)
        print(dict(statuses), f"memory {before / 2**20:.0f} MiB, then {resident(server) / 2**20:.0f} MiB")
        assert sum(statuses.values()) == REQUESTS
        assert {status for status in statuses if status >= 500} == set()
        assert statuses[200] > REQUESTS / 2
        assert statuses[400] > REQUESTS / 20
        assert metric(server, "vllm:num_requests_waiting{") == 0
        assert metric(server, "vllm:kv_cache_usage_perc{") == 0
        assert resident(server) < before * 1.05 + (32 << 20)


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
