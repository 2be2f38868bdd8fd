"""A server whose engine hangs or dies, or that dies itself: it says so, ends, and leaves no process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.application import application
from tests.helpers.serving import Server

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


# ---- without an engine ----------------------------------------------------------------------------------------------
def test_a_hanging_engine_is_noticed_shown_and_killed(model, capsys):
    """It answered, then no longer does: its process here is a real one, that is stopped."""
    import httpx

    async def check(engine: subprocess.Popen) -> None:
        async with application(model[0], "hang_seconds=1") as app:
            core = app.state.engine_client.engine_core
            process = SimpleNamespace(pid=engine.pid, is_alive=lambda: engine.poll() is None)
            core.resources.engine_manager = SimpleNamespace(processes=[process])
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                started = asyncio.create_task(
                    app({"type": "lifespan"}, asyncio.Event().wait, lambda _: asyncio.sleep(0))
                )
                await asyncio.sleep(0.5)
                assert [(await client.get(path)).status_code for path in ("/health", "/ping")] == [200, 200]
                assert core.calls.count("is_scheduler_paused_async") == 1
                core.answers.clear()
                start = time.monotonic()
                while (await client.get("/health")).status_code == 200:
                    assert time.monotonic() - start < 1 + 5
                    await asyncio.sleep(0.1)
                assert (await client.get("/ping")).status_code == 503
                assert engine.poll() is None
                while engine.poll() is None:
                    assert time.monotonic() - start < 1 + 5 + 5
                    await asyncio.sleep(0.1)
                assert engine.returncode == -signal.SIGKILL
                started.cancel()

    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    engine.send_signal(signal.SIGSTOP)
    try:
        asyncio.run(check(engine))
    finally:
        engine.kill()
        engine.wait()
    assert "vLLM's engine has given no sign of life for hang_seconds=1; the server ends" in capsys.readouterr().err


def test_metrics_do_not_wait_for_the_engine():
    """Each scrape answers with the counts of before, and the engine has one question however many come."""
    from prometheus_client.registry import REGISTRY

    from loopwise.serve.vllm.metrics import DepthMetrics

    metrics, asked = DepthMetrics("tiny"), []

    async def hang(name: str) -> Any:
        asked.append(name)
        await asyncio.Event().wait()

    async def answer(name: str) -> Any:
        return [{"exits": [0, 1]}]

    async def check() -> None:
        await metrics.update(SimpleNamespace(errored=False, collective_rpc=answer))
        hanging = SimpleNamespace(errored=False, collective_rpc=hang)
        start = time.monotonic()
        await asyncio.gather(*(metrics.update(hanging) for _ in range(100)))
        await metrics.update(hanging)
        assert time.monotonic() - start < 3
        assert metrics.counts == {"exits": [0, 1]}
        assert asked == ["recurrence_counts"]

    try:
        asyncio.run(check())
    finally:
        REGISTRY.unregister(metrics)


SERVER = """
import multiprocessing, os, sys, time
from loopwise.process import own_processes
own_processes()
child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(100,))
child.start()
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("seconds", [0, 0.02, 0.1, 1.5])
def test_a_process_ends_with_its_server_from_its_first_moment_on(seconds):
    """The server may end before the process asks the kernel for a signal, or later. It imports nothing of ours."""
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    child = int(server.stdout.readline())
    start = time.monotonic()
    assert server.wait(30) == -signal.SIGKILL
    while alive(child):
        assert time.monotonic() - start < 10
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- a real server --------------------------------------------------------------------------------------------------
def members(server: Server) -> dict[int, str]:
    """Process ids and command lines of the server's session that have not ended."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == server.process.pid and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text()
    return found


def engine_of(server: Server) -> int | None:
    """The engine's process: vLLM names it so, at its start; before that, it is the one that is spawned."""
    children = {pid: line for pid, line in members(server).items() if pid != server.process.pid}
    named = [pid for pid, line in children.items() if "EngineCore" in line or "spawn_main" in line]
    return min(named, default=None)


def gone(server: Server, seconds: float) -> bool:
    """True once no process of the server is left, within so many seconds."""
    end = time.monotonic() + seconds
    while members(server) and time.monotonic() < end:
        server.process.poll()
        time.sleep(0.1)
    return not members(server)


def ask(server: Server, stream: bool, replies: list) -> threading.Thread:
    """A request for 400 tokens, whose reply, or error, is put into `replies`."""
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 450, "ignore_eos": True, "stream": stream, "n": 4}
    body |= {"temperature": 1, "num_recurrences": 8}
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), headers)

    def run() -> None:
        try:
            with urllib.request.urlopen(call, timeout=120) as reply:
                replies.append((reply.status, reply.read().decode()))
        except urllib.error.HTTPError as error:
            replies.append((error.code, error.read().decode()))
        except OSError as error:
            replies.append((0, repr(error)))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_an_engine_that_stops_or_dies_ends_the_server(request, model, way, busy):
    """/health turns 503, /metrics answers, open requests end with an error, and the exit status is 1."""
    server = Server(model[0], "hang_seconds=5", "passes_per_step=1", "--", "--enforce-eager")
    request.addfinalizer(server.kill)
    server.wait_until(server.healthy, 240)
    replies: list = []
    threads = [ask(server, n % 4 > 0, replies) for n in range(8)] if busy else []
    time.sleep(1.0)
    engine = engine_of(server)
    assert engine is not None
    assert not replies
    os.kill(engine, way)
    start = time.monotonic()
    if way == signal.SIGSTOP:
        urllib.request.urlopen(server.url + "/metrics", timeout=3).read()
        while health(server) == 200:
            time.sleep(0.1)
        noticed = time.monotonic() - start
        assert health(server) == 503
        print(f"SIGSTOP noticed after {noticed:.1f} s")
        assert noticed < 5 + 5
    assert server.process.wait(60) == 1
    print(f"ended after {time.monotonic() - start:.1f} s")
    assert gone(server, 10)
    for thread in threads:
        thread.join(60)
    assert len(replies) == len(threads)
    for status, text in replies:
        if status == 200:
            events = [line for line in text.splitlines() if line.startswith("data: ")]
            assert any('"error"' in event for event in events[-2:]), events[-2:]
        assert status in (200, 500), text
    log = server.log.read_text()
    assert "loopwise: error: vLLM's engine died" in log
    assert ("has given no sign of life for hang_seconds=5" in log) == (way == signal.SIGSTOP)


def health(server: Server) -> int:
    try:
        return urllib.request.urlopen(server.url + "/health", timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code


def kill_at(request, folder: Path, of_engine: bool, seconds: float) -> None:
    """Kill the server, or its engine, so many seconds after its first appearance; 25 and more: under requests."""
    server = Server(folder, "--", "--enforce-eager")
    request.addfinalizer(server.kill)
    if seconds >= 25:
        server.wait_until(server.healthy, 240)
        for _ in range(4):
            ask(server, True, [])
        time.sleep(seconds - 25)
    elif of_engine:
        server.wait_until(lambda: engine_of(server) is not None, 120)
        time.sleep(seconds)
    else:
        time.sleep(seconds)
    victim = engine_of(server) if of_engine else server.process.pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    if of_engine:
        assert server.process.wait(60) == 1, server.log.read_text()[-2000:]
    assert gone(server, 10), members(server)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.3, 1, 2, 3, 5, 7, 9, 25, 26])
def test_a_killed_engine_leaves_no_process(request, model, seconds):
    kill_at(request, model[0], True, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 1.5, 3, 5, 7, 9, 12, 16, 25, 26])
def test_a_killed_server_leaves_no_process(request, model, seconds):
    kill_at(request, model[0], False, seconds)


def test_a_server_killed_as_its_engine_starts_leaves_no_process(request, model):
    """The moment at which nothing has asked for the kernel's signal yet."""
    server = Server(model[0], "--", "--enforce-eager")
    request.addfinalizer(server.kill)
    server.wait_until(lambda: engine_of(server) is not None, 120)
    server.process.kill()
    assert gone(server, 10), members(server)
