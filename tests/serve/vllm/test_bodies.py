"""Bodies of requests: their size, the time that they take, what refusals repeat of them, and no status 500."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import importlib.util
import itertools
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from loopwise.serve.api.echo import brief
from loopwise.serve.api.fields import FIELDS, FieldError, parse_body, take_fields
from loopwise.serve.api.limits import HttpLimits
from loopwise.serve.vllm.guard import Guard, read_body
from loopwise.serve.vllm.requests import BODY, check_fields
from tests.helpers.application import application
from tests.helpers.fuzz import VALID, case, nested
from tests.helpers.repository import ROOT
from tests.helpers.serving import free_port

pytestmark = pytest.mark.xdist_group("vllm")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
MIB = 1 << 20


# ---- size and time --------------------------------------------------------------------------------------------------
def parts(*sizes: int) -> Callable:
    """A `receive` that gives a body in parts of these sizes."""
    left = iter(enumerate(sizes, 1))

    async def receive() -> dict[str, Any]:
        number, size = next(left)
        return {"type": "http.request", "body": bytes(size), "more_body": number < len(sizes)}

    return receive


def guarded(receive: Callable, limits: HttpLimits, length: int | None = None) -> tuple[int, str | int]:
    """Status, and error message or length of the body that came through, of a request to a guarded application."""
    sent = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        message = await receive()
        assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(Guard(app, [], limits)(scope, receive, send))
    start, body = sent
    text = json.loads(body["body"])
    return start["status"], text if start["status"] == 200 else text["error"]["message"]


def test_a_body_beyond_the_limit_is_413():
    limits = HttpLimits(max_body_mib=2)
    too_large = (413, "the body is larger than max_body_mib=2 of this server")
    assert guarded(parts(MIB, MIB), limits) == (200, 2 * MIB)
    assert guarded(parts(MIB, MIB, 1), limits) == too_large
    assert guarded(parts(), limits, length=2 * MIB + 1) == too_large  # not a byte of it is read
    assert HttpLimits().max_body_mib == 8


@pytest.mark.parametrize("arriving", [True, False])
def test_bodies_of_open_requests_have_a_limit_of_their_own(arriving):
    """16 x max_body_mib for what each has beyond 64 KiB, from its arrival to the end of the reply: vLLM keeps it."""

    async def check() -> None:
        statuses: list[int] = []
        end = asyncio.Event()

        async def app(scope: dict, receive: Callable, send: Callable) -> None:
            assert len((await receive())["body"]) == scope["size"]
            if scope["wait"] and not arriving:
                await end.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        guard = Guard(app, [], HttpLimits(max_body_mib=1))

        async def send(message: dict) -> None:
            if "status" in message:
                statuses.append(message["status"])

        async def ask(size: int, wait: bool = False) -> None:
            messages = iter([bytes(size), b""])

            async def receive() -> dict[str, Any]:
                body = next(messages)
                if not body and wait and arriving:
                    await end.wait()
                return {"type": "http.request", "body": body, "more_body": bool(body)}

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "size": size}
            scope["wait"] = wait
            await guard(scope, receive, send)

        many = [asyncio.ensure_future(ask(MIB, wait=True)) for _ in range(17)]
        await asyncio.sleep(0.01)
        await ask(MIB)
        assert statuses.pop() == 429
        await ask(1 << 16)
        assert statuses.pop() == 200
        end.set()
        await asyncio.gather(*many)
        assert statuses == [200] * 17
        for _ in range(20):
            await ask(MIB)
        assert statuses == [200] * 37
        assert guard.bodies.bytes == 0

    asyncio.run(check())


def test_a_body_that_does_not_come_is_408():
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.6)
        return {"type": "http.request", "body": b"a", "more_body": True}

    start = time.monotonic()
    assert guarded(receive, HttpLimits(body_seconds=1))[0] == 408
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("sizes", [[1 << 16] * 1024, [1] * 300_000], ids=["64 MiB", "single bytes"])
def test_a_body_is_read_in_linear_time(sizes):
    """64 MiB in parts of 64 KiB took 15 s while every part copied those before."""
    start = time.monotonic()
    body = asyncio.run(read_body(parts(*sizes)))
    assert body == bytes(sum(sizes))
    assert time.monotonic() - start < 3


@contextlib.contextmanager
def guard_server() -> Iterator[int]:
    """The port of uvicorn with a guarded application, in another process."""
    with guard_process() as (port, _):
        yield port


@contextlib.contextmanager
def guard_process() -> Iterator[tuple[int, int]]:
    """Its port, and the id of the process."""
    port = free_port()
    program = [sys.executable, "-m", "tests.helpers.run_guard", str(port)]
    process = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                latency(port, 1)
                break
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def latency(port: int, count: int) -> list[float]:
    """Seconds that each of `count` requests to /health took."""
    connection, took = HTTPConnection("127.0.0.1", port, timeout=30), []
    for _ in range(count):
        start = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        took.append(time.perf_counter() - start)
        time.sleep(0.005)
    connection.close()
    return took


@needs_vllm
@pytest.mark.parametrize("way", ["chunked", pytest.param("length", marks=pytest.mark.slow)])
def test_an_upload_does_not_delay_others(way):
    """64 MiB: each upload ends with 413, and /health answers as fast as without, but for 20 ms of 99 %."""
    delays = []
    with guard_server() as port:
        for _ in range(5):  # a busy machine delays by itself
            alone = statistics.quantiles(latency(port, 100), n=100)[98]
            command = [sys.executable, "-m", "tests.helpers.run_guard", str(port), way]
            upload = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            assert upload.stdout is not None
            assert upload.stdout.readline() == "started\n"
            beside = statistics.quantiles(latency(port, 100), n=100)[98]
            upload.kill()
            counted = upload.communicate()[0].splitlines()
            assert counted
            assert set(counted) == {"413"}
            delays.append(beside - alone)
            if delays[-1] < 0.02:
                break
    print(f"/health beside uploads: {min(delays) * 1e3:.1f} ms later at p99")
    assert min(delays) < 0.02


def most_memory(process: int) -> int:
    """The most memory that a process has had, in bytes."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", text)[0]) * 1024


def start_body(port: int, head: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n")
    return connection


def chunk(size: int, zipped: bool = False) -> bytes:
    data = gzip.compress(bytes(size * 1000)) if zipped else bytes(size)
    return b"%x\r\n%s\r\n" % (len(data), data)


def statuses(connections: list[socket.socket], data: bytes, parts: int, end: bytes = b"0\r\n\r\n") -> Counter[str]:
    """Send `parts` times `data` to all connections in turn, then `end`; the statuses of the replies."""
    for connection in itertools.chain.from_iterable(itertools.repeat(connections, parts)):
        with contextlib.suppress(OSError):
            connection.sendall(data)
    found: Counter[str] = Counter()
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(end)
        with connection, contextlib.suppress(OSError):
            found[connection.recv(1000).split()[1].decode()] += 1
    return found


CHUNKED = b"Transfer-Encoding: chunked"
# Many clients at once: a head, a part, how many of it each client sends, and the statuses of the replies.
FLOODS: dict[str, tuple[bytes, bytes, int, set[str]]] = {
    "over the limit, no length": (CHUNKED, chunk(MIB), 10, {"413", "429"}),
    "over the limit, by length": (b"Content-Length: %d" % (1 << 40), bytes(1 << 16), 160, {"413"}),
    "below the limit": (CHUNKED, chunk(MIB), 7, {"200", "429"}),
    "compressed": (b"Content-Encoding: gzip\r\n" + CHUNKED, chunk(MIB, zipped=True), 4, {"200", "429"}),
    "after the reply": (CHUNKED, chunk(MIB), 60, {"413", "429"}),
}


@needs_vllm
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "below the limit")) for name in FLOODS]
)
def test_memory_is_flat_under_many_large_bodies(name):
    """48 clients at once, of 7 MiB and more. All bodies together may have 16 x 8 MiB, and buffers as much again."""
    head, part, count, expected = FLOODS[name]
    with guard_process() as (port, process):
        before = most_memory(process)
        clients = 8 if name == "after the reply" else 48
        end = b"" if "length" in name and "no length" not in name else b"0\r\n\r\n"
        found = statuses([start_body(port, head) for _ in range(clients)], part, count, end)
        grown = most_memory(process) - before
        print(f"{name}: {dict(found)}, {grown / MIB:.0f} MiB more")
        assert {*found} <= expected
        assert sum(found.values()) > 0
        assert grown < 2 * 16 * 8 * MIB
        assert max(latency(port, 20)) < 5
        small = start_body(port, b"Content-Length: 5")
        assert statuses([small], b"hello", 1, b"") == {"200": 1}


# ---- what is refused, and how ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["", "vllm_xargs", "extra_body"])
@pytest.mark.parametrize("count", [65, 250, 100_000])
def test_unknown_names_are_refused_at_once(where, count):
    """Each is compared with all fields, at 90 us; 100,000 of them took 9 s."""
    many = {f"num_recurrence_{n}_of": 1 for n in range(count)}
    body: dict[str, Any] = {"prompt": "a", **({where: many} if where else many)}

    def check() -> None:
        check_fields(body)
        take_fields(body, {"prompt"})

    start = time.perf_counter()
    with pytest.raises(FieldError, match=r"fields that this server does not know: at most 64|fields: at most 256"):
        check()
    assert time.perf_counter() - start < 0.02


def test_few_unknown_names_pass_and_a_near_one_is_found_among_them():
    names = {f"other_{n}": n for n in range(60)}
    assert take_fields(dict(names)) == {}
    with pytest.raises(FieldError, match="did you mean 'num_recurrences'"):
        take_fields({**names, "num_recurences": 2})


def test_long_names_cost_nothing():
    start = time.perf_counter()
    assert take_fields({"num_recurrences" * 500_000: 1}) == {}
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    "value", [1, -2.5, None, True, "it's", "", [], {}, [1, [2, {"a": "b"}]], {"a": [None], "b": {"c": {}}}, 10**30]
)
def test_a_short_value_is_repeated_as_it_is(value):
    assert brief(value) == repr(value)
    assert brief(value, 5) == repr(value) if len(repr(value)) <= 5 else brief(value, 5) == repr(value)[:2] + "..."


@pytest.mark.parametrize("value", ["x" * 8 * MIB, [[1] * 99] * MIB, {"a": "b" * MIB}, {"a" * MIB: 1}, nested(900)])
def test_a_long_value_is_cut_at_the_cost_of_what_is_shown(value):
    start = time.perf_counter()
    assert len(brief(value)) == 200
    assert time.perf_counter() - start < 0.05


def test_deep_json_is_refused_by_depth():
    check_fields({"metadata": nested(95)})
    for value in (nested(101), nested(101, "{")):
        with pytest.raises(FieldError, match="metadata is nested too deeply: at most 100 levels"):
            check_fields({"metadata": value})
    with pytest.raises(RecursionError):
        parse_body(b"[" * 100_000)


def test_an_integer_of_any_size_is_refused():
    """No float holds the last one, by which the message would show it."""
    for number in (2**64, -(2**63) - 1, 10**400):
        with pytest.raises(FieldError, match="in seed: a whole number of at most 64 bits"):
            check_fields({"seed": number})


async def post(client: Any, path: str, body: bytes) -> Any:
    return await client.post(path, content=body, headers={"Content-Type": "application/json"})


@contextlib.asynccontextmanager
async def client_of(folder, *settings: str, flags: tuple[str, ...] = ()):
    import httpx

    async with application(folder, *settings, flags=flags) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            yield client


LONG = ["y" * 10**5, ["y" * 10**5], {"y" * 10**5: 1}, "[" * 10**5, 10**400, nested(99), nested(300), [7] * 10**5]


@needs_vllm
@pytest.mark.parametrize("values", [LONG[:1], pytest.param(LONG[1:], marks=pytest.mark.slow)], ids=["text", "others"])
def test_refusals_repeat_at_most_200_characters(model, values):
    """A long value in any field, on any route, gets a status below 500 and an answer below 4 kB."""

    async def check() -> None:
        async with client_of(model[0]) as client:
            for path, body in (VALID[0], VALID[8], ("/tokenize", VALID[-6][1])):
                names = {*BODY, *FIELDS} - {"prompt", "messages"} if path.startswith("/v1") else {"model", "prompt"}
                for name, value in itertools.product(sorted(names), values):
                    reply = await post(client, path, json.dumps({**body, name: value}).encode())
                    assert reply.status_code < 500, (path, name, reply.text[:500])
                    if reply.status_code >= 400:
                        assert len(reply.content) < 4096, (path, name, reply.text[:500])
                        assert "y" * 201 not in reply.text

    asyncio.run(check())


async def fuzz(folder, numbers: range) -> Counter[int]:
    """Statuses of fuzzed bodies. Raises AssertionError for a status of 500 and above, which names the case."""
    found: Counter[int] = Counter()
    flags = ("--enable-scale-out",)
    async with client_of(folder, flags=flags) as client:
        for number in numbers:
            path, body = case(number)
            reply = await asyncio.wait_for(post(client, path, body), 60)
            assert reply.status_code < 500 or reply.status_code in (501, 503), (number, path, body[:2000], reply.text)
            found[reply.status_code] += 1
    return found


@needs_vllm
@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_body_is_answered_with_500(model, count):
    found = asyncio.run(fuzz(model[0], range(count)))
    print(dict(found))
    assert found[200] > count / 20
    assert found[400] > count / 3


PIECES = [
    b"GET /health HTTP/1.1", b"POST /v1/completions HTTP/1.1", b"\r\n", b"\r\n\r\n", b"\n", b"Host: x\r\n", b" ",
    b"0\r\n\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n", b"zz\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00", b"{}",
    b"\x16\x03\x01\x02\x00", b"A" * 9000, b"X: " + b"y" * 70_000 + b"\r\n", b"Expect: 100-continue\r\n", b"\xff\xfe",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"GET http://[::1 HTTP/1.1\r\n\r\n", b"ffffffff\r\n",
]  # fmt: skip


HEADS = [
    b"POST /x HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n"
    for line in (b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: 50", b"Transfer-Encoding: chunked")
]


@needs_vllm
@pytest.mark.parametrize("count", [120, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_bytes_are_answered_with_500(count):
    """Wrong lengths, cut chunks, and bytes that are no HTTP, by connections that then close. Others are answered."""
    statuses: Counter[str] = Counter()
    with guard_server() as port:
        for number in range(count):
            draw = random.Random(number)
            sent = b"".join(draw.choice(PIECES) for _ in range(draw.randint(1, 12)))
            if number % 4 == 0:
                sent = HEADS[1] + b"hello"  # sound
            elif number % 4 < 3:  # a sound head, whose length or body may not be
                sent = draw.choice(HEADS) + sent
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, contextlib.suppress(OSError):
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while reply := connection.recv(1 << 16):
                    statuses.update(re.findall(r"HTTP/1\.1 (\d+)", reply.decode("latin-1")))
        assert max(latency(port, 20)) < 5
    print(dict(statuses))
    assert statuses["400"] > count / 10
    assert statuses["200"] >= count / 4
    assert not [status for status in statuses if status >= "500"]
