"""Clients that take nothing of their reply: the connection is closed, and the request ends as if they had left."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

PATIENCE = 120.0  # seconds; a stream that waits so long counts against `max_queue`, though its text may be finished


async def close_stalled(connections: Collection[Any], patience: float = PATIENCE) -> None:
    """Close each of uvicorn's `connections`, a set that changes, whose client takes no byte for `patience` seconds of
    those that wait for it. Runs until it is cancelled."""
    waiting: dict[Any, tuple[int, float]] = {}  # by connection: bytes, and since when they are as many
    while True:
        await asyncio.sleep(patience / 10)
        before, now = waiting, time.monotonic()
        waiting = {}
        for connection in list(connections):
            if count := unsent(connection.transport):
                last, since = before.get(connection, (0, now))
                waiting[connection] = count, since if count == last else now
                if now - waiting[connection][1] >= patience:
                    connection.transport.abort()


def unsent(transport: Any) -> int:
    """Bytes that wait for the client of `transport`, those in the kernel's queue too; 0 while that takes them."""
    count = transport.get_write_buffer_size()
    if not count:
        return 0
    with suppress(OSError, AttributeError):  # a system without the call: a client then seems to read in larger steps
        queue = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        count += struct.unpack("i", queue)[0]
    return count
