"""A server without memory, without room for all requests, or without file descriptors: it ends or recovers."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import socket
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving import Server, metric, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
DEPTH, BLOCKS = 8, 20


def test_a_cache_too_small_ends_the_start(model):
    """One block holds no request: a line of ours at the end, exit code 1, and no process."""
    server = Server(model[0], "--", "--enforce-eager", "--num-gpu-blocks-override", "1")
    try:
        server.process.wait(240)
        assert server.wait_for_end() == 1
        errors = [line for line in server.log.read_text().splitlines() if line.startswith("loopwise: error: ")]
        assert errors == ["loopwise: error: vLLM's engine did not start; the reason stands in the lines above"]
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(model):
    """A cache that holds a few requests of the greatest depth, not all."""
    flags = "--enforce-eager", "--max-num-seqs", "24", "--num-gpu-blocks-override", str(BLOCKS)
    flags += "--max-model-len", "128", "--block-size", "32", "--no-enable-prefix-caching"
    with serving(model[0], f"max_recurrences={DEPTH}", "--", *flags) as server:
        yield server


def tokens(server: Server, number: int) -> list[int]:
    body: dict[str, Any] = {"model": "tiny", "prompt": [number + 1, *range(2, 20 + number % 7)], "max_tokens": 48}
    body |= {"num_recurrences": DEPTH, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    call = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=240) as reply:
        return json.loads(reply.read())["choices"][0]["token_ids"]


def test_all_requests_at_the_greatest_depth_finish_in_a_cache_for_some(server):
    """By preemption, and with the tokens that each gives alone."""
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda number: tokens(server, number), range(24)))
    assert metric(server, "vllm:num_preemptions_total{") > 0
    assert all(len(found) == 48 for found in together)
    assert together == [tokens(server, number) for number in range(24)]
    assert metric(server, "vllm:kv_cache_usage_perc{") == 0


def test_a_flood_of_connections_beyond_the_limit_of_files_passes(server):
    """None is answered while they last, perhaps; afterwards all are, and the process goes on."""
    process = server.process.pid
    before = len(list((Path("/proc") / str(process) / "fd").iterdir()))
    limits = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (before + 40, limits[1]))
    port = int(server.url.rsplit(":", 1)[1])
    flood = []
    try:
        for _ in range(300):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
            flood.append(connection)
        time.sleep(2)
    finally:
        for connection in flood:
            connection.close()
    assert server.process.poll() is None
    server.wait_until(server.healthy, 60)
    assert tokens(server, 3) == tokens(server, 3)
    after = len(list((Path("/proc") / str(process) / "fd").iterdir()))
    assert after <= before + 10
    resource.prlimit(process, resource.RLIMIT_NOFILE, limits)


PLACE = """
    exec 2>/dev/full
    mount --bind /tmp /tmp && mount -o remount,bind,ro /tmp || exit 9
    unset HOME LANG XDG_CACHE_HOME TMPDIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR VLLM_CACHE_ROOT
    export LC_ALL=C PYTHONPATH={path} PATH={programs}
"""


def test_it_serves_in_a_tight_place(model, tmp_path):
    """A read-only /tmp, no HOME, no compiler, an ASCII locale, and a log whose disk is full."""
    for name in ("lscpu", "sh"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    script = PLACE.format(programs=tmp_path, path=":".join(filter(None, sys.path)))
    server = Server(model[0], "--", "--max-model-len", "128", script=script)
    try:
        server.wait_until(server.healthy, 240)
        assert len(tokens(server, 1)) == 48
        server.process.terminate()
        assert server.wait_for_end() == 0
        assert "error" not in server.log.read_text()
    finally:
        server.kill()
