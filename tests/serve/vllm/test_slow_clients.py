"""Clients that do not read what they asked for: others get their places."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from loopwise.serve.api.limits import HttpLimits
from loopwise.serve.vllm.load import Load, ServerFull
from loopwise.serve.vllm.slow_clients import close_stalled
from tests.helpers.serving import free_port

pytestmark = pytest.mark.xdist_group("vllm")
needs_uvicorn = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="vLLM is not installed")
PATIENCE = 1.5


class Streams:
    """An application whose replies have `parts` times 64 KiB. ended: the paths of those that are over."""

    def __init__(self, parts: int):
        self.parts, self.load, self.ended = parts, Load(HttpLimits(max_queue=2)), []

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        path = scope["path"]
        try:
            with self.load.admitted(1, running=0):
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for _ in range(self.parts if path != "/short" else 1):
                    await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except ServerFull:
            await send({"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.ended.append(path)


def ask(port: int, path: str) -> socket.socket:
    """A connection that has asked for `path`, with a small buffer of its own."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return connection


def status(port: int) -> bytes:
    with ask(port, "/short") as connection:
        connection.settimeout(10)
        return connection.recv(12)


@needs_uvicorn
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_client_that_does_not_read_is_cut_off_and_a_slow_one_is_not(loop):
    """Two fill the queue, though all of their text is there. A third reads a little now and then, and stays."""
    import uvicorn
    import uvloop

    app, port = Streams(400), free_port()

    async def check() -> None:
        config = uvicorn.Config(app, port=port, http="httptools", lifespan="off", log_level="error")
        server: Any = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(close_stalled(server.server_state.connections, PATIENCE))
        slow, idle = ask(port, "/slow"), ask(port, "/idle")

        def drip() -> None:
            end = time.monotonic() + 3 * PATIENCE
            while time.monotonic() < end:
                assert slow.recv(1 << 12)
                time.sleep(0.05)

        dripping = asyncio.create_task(asyncio.to_thread(drip))
        await asyncio.sleep(0.3)
        assert await asyncio.to_thread(status, port) == b"HTTP/1.1 429"
        await dripping
        assert app.ended == ["/short", "/idle"]
        assert await asyncio.to_thread(status, port) == b"HTTP/1.1 200"
        slow.settimeout(10)
        assert slow.recv(1 << 12)
        with suppress(ConnectionResetError):
            while await asyncio.to_thread(idle.recv, 1 << 20):
                pass
        for connection in (slow, idle):
            connection.close()
        closing.cancel()
        server.should_exit = True
        await serving

    if loop == "uvloop":
        uvloop.run(check())
    else:
        asyncio.run(check())
