"""How much requests may ask for: choices of one, of all that are open, and the length of a trace."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopwise.serve.api.fields import FieldError
from loopwise.serve.api.limits import HttpLimits, Limits
from loopwise.serve.api.validation import validate_fields
from loopwise.serve.vllm.http import DepthFields
from loopwise.serve.vllm.load import Load, ServerFull, check_choices, choices_of, copied
from loopwise.serve.vllm.routes import TOKENIZING
from loopwise.serve.vllm.shutdown import Ending
from loopwise.serve.vllm.watchdog import Watchdog
from tests.helpers.application import application

pytestmark = pytest.mark.xdist_group("vllm")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/v1/completions", {"prompt": "a"}, 1),
        ("/v1/completions", {"prompt": "a", "n": 5}, 5),
        ("/v1/completions", {"prompt": [1, 2, 3], "n": 5}, 5),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 5}, 10),
        ("/v1/completions", {"prompt": [[1], [2], [3]]}, 3),
        ("/v1/completions", {"prompt": [], "n": None}, 1),
        ("/v1/completions", {"n": "x"}, 1),
        ("/v1/completions", {"prompt": "a", "n": "7"}, 7),
        ("/v1/completions", {"prompt": "a", "n": 7.0}, 7),
        ("/v1/completions", {"prompt": "a", "n": "16384.0"}, 16384),
        ("/v1/completions", {"prompt": "a", "n": " 2_00.00 "}, 200),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 1e999, "messages": []}, 2),
        ("/v1/completions", {"prompt": "a", "n": -3}, 1),
        ("/v1/completions", {"prompt": "a", "n": 4, "use_beam_search": True}, 4),
        ("/v1/chat/completions", {"messages": [{}, {}, {}], "n": 2}, 2),
        ("/v1/chat/completions/batch", {"messages": [[{}], [{}]], "n": 2}, 4),
        ("/invocations", {"prompt": ["a"] * 7}, 7),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {"n": 6}}, 6),
        ("/generative_scoring", {"query": "a", "items": ["b"] * 9}, 9),
    ],
)
def test_choices_are_counted(path, body, count):
    assert choices_of(path, body) == count


def test_a_request_of_too_many_choices_is_refused():
    check_choices(128, HttpLimits())
    with pytest.raises(FieldError, match="n x prompts = 129: at most max_choices=128 of this server"):
        check_choices(129, HttpLimits())


def test_fields_that_the_engine_holds_for_each_choice_are_limited():
    limits, stops = HttpLimits(max_body_mib=1), ["x" * 10] * 1000
    assert copied({"prompt": "a" * (1 << 20), "stop": stops}, 1, limits) == 0
    body = {"prompt": "a" * (1 << 20), "documents": ["a" * (1 << 20)], "messages": ["a" * (1 << 20)], "stop": stops}
    assert copied(body, 50, limits) == 50 * len(json.dumps({"stop": stops}))
    with pytest.raises(FieldError, match=r"n x prompts = 128: each takes a copy of the 14010 bytes"):
        copied(body, 128, limits)


def test_the_queue_has_an_end_and_room_again():
    load = Load(HttpLimits(max_queue=3))
    with load.admitted(99, running=2):  # alone
        pass
    with load.admitted(2, running=2), load.admitted(3, running=2):
        with pytest.raises(ServerFull, match="5 choices are running or waiting: at most max_queue=3 wait"):
            load.admitted(1, running=2).__enter__()
        with load.admitted(0, running=2):  # a route that does not generate
            pass
    with pytest.raises(ValueError, match="x"), load.admitted(5, running=2):
        raise ValueError("x")
    assert load.open == 0


async def tokenizing(sizes: list[int], **limits: Any) -> dict[str, list[int]]:
    """By path: the statuses of requests with texts of these sizes, all at once, of an engine that runs one request."""
    statuses: dict[str, list[int]] = {}
    for path in (*sorted(TOKENIZING), "/abort_requests"):
        found, end = [], asyncio.Event()

        async def app(scope: dict, receive: Callable, send: Callable, end=end) -> None:
            await end.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        scheduler = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))
        state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=scheduler))
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "app": SimpleNamespace(state=state)}
        fields = DepthFields(app, None, Ending(), Watchdog(0), Load(HttpLimits(**limits)))

        async def ask(size: int, fields=fields, scope=scope, found=found) -> None:
            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": b'{"prompt": "%s"}' % (b"a" * size)}

            async def send(message: dict) -> None:
                found.extend([message["status"]] if "status" in message else [])

            await fields(scope, receive, send)

        asked = [asyncio.ensure_future(ask(size)) for size in sizes]
        await asyncio.sleep(0)
        end.set()
        await asyncio.gather(*asked)
        assert (fields.load.open, fields.load.texts.bytes) == (0, 0)
        statuses[path] = sorted(found)
    return statuses


def test_texts_that_are_only_tokenized_have_an_end():
    """One thread tokenizes for all, without a limit of vLLM's for these routes: a queue, and bytes of large ones."""
    mib = 1 << 20
    for sizes, limits, expected in (
        ([1] * 5, {"max_queue": 2}, [200] * 3 + [429] * 2),
        ([mib - 20] * 3, {"max_body_mib": 1}, [200] + [429] * 2),
        ([mib // 2] * 3, {"max_body_mib": 1}, [200] * 2 + [429]),
        ([1 << 15] * 90, {"max_body_mib": 1}, [200] * 90),
    ):
        found = asyncio.run(tokenizing(sizes, **limits))
        assert found.pop("/abort_requests") == [200] * len(sizes)  # ends requests, also of a full server
        assert found == dict.fromkeys(TOKENIZING, expected)


@pytest.mark.parametrize("length", [None, 512])
def test_a_trace_is_at_most_as_long_as_the_model(length):
    limits = Limits(4, 8, ("fixed",), prompt_exit=True, max_model_len=length)
    assert len(validate_fields({"trace": [4] * 512}, limits)["trace"]) == 512
    if length is None:  # offline, where a trace costs its own user
        assert validate_fields({"trace": [4] * 513}, limits)
        return
    with pytest.raises(FieldError, match="trace has 513 depths: at most 512, the positions of this server"):
        validate_fields({"trace": [4] * 513}, limits)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_vllm
@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_full_server_answers_429_and_goes_on(model, count):
    """The engine runs 4 of `count` requests, and 16 wait. The others are told at once when to come again."""
    import httpx

    async def check() -> None:
        async with application(model[0], "max_queue=16", flags=("--max-num-seqs", "4")) as app:
            core = app.state.engine_client.engine_core
            core.answers.clear()
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:

                async def ask(number: int) -> Any:
                    body = {"model": "tiny", "prompt": "a" * 100, "max_tokens": 2, "stream": number % 2 > 0}
                    return await client.post("/v1/completions", json=body)

                first = [asyncio.create_task(ask(n)) for n in range(10)]
                await asyncio.sleep(0.5)
                for task in first[:5]:  # who leaves is counted off
                    task.cancel()
                await asyncio.gather(*first[:5], return_exceptions=True)
                tasks = first[5:] + [asyncio.create_task(ask(n)) for n in range(count // 2)]
                while sum(task.done() for task in tasks) < len(tasks) - 20:
                    await asyncio.sleep(0.05)
                before = resident()
                more = [asyncio.create_task(ask(n)) for n in range(count - len(tasks) - 5)]
                await asyncio.wait(more, timeout=60)
                grown = resident() - before
                refused = [task.result() for task in tasks + more if task.done()]
                assert {reply.status_code for reply in refused} == {429}
                assert {reply.headers["retry-after"] for reply in refused} == {"5"}
                assert "at most max_queue=16 wait" in refused[0].json()["error"]["message"]
                assert grown < 32 << 20
                core.answers.set()
                statuses = Counter(reply.status_code for reply in await asyncio.gather(*tasks, *more))
                assert statuses == {200: 20, 429: len(tasks + more) - 20}
                assert (await ask(0)).status_code == 200

    asyncio.run(check())


@needs_vllm
def test_bodies_of_waiting_requests_are_bounded(model):
    """FastAPI keeps body and fields of a request until its reply has ended: 100 MB here, and 16 GiB of 8 MiB each."""
    import httpx

    async def check() -> None:
        async with application(model[0], "max_body_mib=2") as app:
            core = app.state.engine_client.engine_core
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

                async def ask(size: int) -> int:
                    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "user": "x" * size}
                    return (await client.post("/v1/completions", json=body)).status_code

                assert await ask(2_000_000) == 200
                core.answers.clear()
                large = [asyncio.create_task(ask(2_000_000)) for _ in range(50)]
                await asyncio.wait(large, timeout=60, return_when="FIRST_COMPLETED")
                small = [asyncio.create_task(ask(50_000)) for _ in range(20)]
                await asyncio.sleep(1)
                core.answers.set()
                assert Counter(await asyncio.gather(*large)) == {200: 17, 429: 33}  # 17 x 1.85 MiB in 16 x 2 MiB
                assert await asyncio.gather(*small) == [200] * 20
                assert await ask(2_000_000) == 200

                async def ask_for_choices() -> int:
                    """Each of the eight takes 180 kB with it to the engine."""
                    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 1, "n": 8}
                    body |= {"vllm_xargs": {"x": [1] * 60_000}}
                    return (await client.post("/v1/completions", json=body)).status_code

                core.answers.clear()
                waiting = [asyncio.create_task(ask_for_choices()) for _ in range(40)]
                await asyncio.wait(waiting, timeout=60, return_when="FIRST_COMPLETED")
                await asyncio.sleep(1)
                core.answers.set()
                assert Counter(await asyncio.gather(*waiting)) == {200: 24, 429: 16}  # 24 x 1.31 MiB in 16 x 2 MiB
                assert await ask_for_choices() == 200

    asyncio.run(check())


async def check_stops(client: Any) -> None:
    """The detokenizer searches all of them at every token: no route takes many. These have vLLM's own limit, 4."""
    chat, many = {"messages": [{"role": "user", "content": "a"}]}, ["x"] * 65
    for path, body in (
        ("/v1/completions", {"prompt": "a", "stop": many}),
        ("/v1/chat/completions", {**chat, "stop": many}),
        ("/v1/responses", {"input": "a", "stop": many}),
        ("/v1/messages", {**chat, "stop_sequences": many}),
    ):
        reply = await client.post(path, json={"model": "tiny", "max_tokens": 1, **body})
        assert reply.status_code == 400, (path, reply.text)
        assert "stop" in reply.text, path


@needs_vllm
def test_limits_are_400_over_http(model):
    import httpx

    async def check() -> None:
        async with application(model[0], "max_choices=4") as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                for fields, said in (
                    ({"n": 5}, "n x prompts = 5: at most max_choices=4 of this server"),
                    ({"prompt": ["a"] * 3, "n": 2}, "n x prompts = 6"),
                    ({"trace": [1] * 513}, "trace has 513 depths: at most 512, the positions of this server"),
                ):
                    reply = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", **fields})
                    assert reply.status_code == 400
                    assert said in reply.json()["error"]["message"]
                copies = {"n": 4, "temperature": 1, "vllm_xargs": {"x": [1] * 800_000}}
                reply = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", **copies})
                assert reply.status_code == 400
                assert "n x prompts = 4: each takes a copy of the 2400" in reply.json()["error"]["message"]
                await check_stops(client)
                body = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "trace": [1] * 512, "max_tokens": 1}
                assert (await client.post("/v1/completions", json={**body, "temperature": 1})).status_code == 200

    asyncio.run(check())
