"""Habits of vLLM's users: reasoning and tools on chat, /v1/responses, `vllm chat` and `vllm bench serve`."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.helpers.application import AnsweringCore, application
from tests.helpers.chain import FLAGS, MESSAGE, TOOL, save_chain
from tests.helpers.serving import VLLM, serving

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CHAT = {"model": "chain", "temperature": 0, "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
CHAT |= {"return_recurrences": True, "num_recurrences": 2}
RESPONSES = {"model": "chain", "temperature": 0, "input": "hi", "store": False, "num_recurrences": 2}
RESPONSES |= {"tools": [{"type": "function", "name": "f", **{"parameters": TOOL["function"]["parameters"]}}]}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The directory of a model that always writes the same, and the ids of its text."""
    folder = tmp_path_factory.mktemp("habits") / "chain"
    return folder, save_chain(folder)


def check_message(message: dict[str, Any]) -> None:
    (call,) = message["tool_calls"]
    assert (message["reasoning"], message["content"].strip()) == (MESSAGE["reasoning"], MESSAGE["content"])
    assert call["function"] == {"name": "f", "arguments": MESSAGE["arguments"]}


def joined(events: list[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
    """The message that the chunks of a chat's stream have in all, and the depths in them."""
    found: dict[str, Any] = {"reasoning": "", "content": "", "name": "", "arguments": ""}
    depths: list[int] = []
    for choice in (choice for event in events for choice in event["choices"]):
        delta = choice["delta"]
        depths += choice["recurrences"]
        for name in ("reasoning", "content"):
            found[name] += delta.get(name) or ""
        for call in delta.get("tool_calls") or ():
            for name in ("name", "arguments"):
                found[name] += call["function"].get(name) or ""
    return found, depths


def check_all(post: Any, count: int) -> None:
    """post: sends a body to a path, returns the reply's text.   count: tokens of the model's text."""
    reply = json.loads(post("/v1/chat/completions", CHAT))
    check_message(reply["choices"][0]["message"])
    assert reply["choices"][0].get("routed_experts") is None
    assert reply["usage"]["recurrences"]["per_token"] == [[2] * count]
    stream = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line.removeprefix("data: ") for line in post("/v1/chat/completions", stream).splitlines() if line]
    *events, last = [json.loads(line) for line in lines if line != "[DONE]"]
    message, depths = joined(events)
    assert message == {**MESSAGE, "name": "f"}
    assert depths == [2] * count
    assert last["usage"]["recurrences"]["total"] == 2 * count
    reply = json.loads(post("/v1/responses", RESPONSES))
    parts = {part["type"]: part for part in reply["output"]}
    assert parts["reasoning"]["content"][0]["text"] == MESSAGE["reasoning"]
    assert parts["message"]["content"][0]["text"].strip() == MESSAGE["content"]
    assert (parts["function_call"]["name"], parts["function_call"]["arguments"]) == ("f", MESSAGE["arguments"])
    assert reply["usage"]["recurrences"]["total"] == 2 * count


def test_reasoning_and_tools(chain, monkeypatch):
    """By vLLM's parsers, in whole replies, streams and responses: our middleware takes nothing from them."""
    import httpx

    folder, ids = chain
    monkeypatch.setattr(AnsweringCore, "text", tuple(ids))
    monkeypatch.setattr(AnsweringCore, "depth", 2)

    async def replies() -> dict[str, str]:
        async with (
            application(folder, flags=FLAGS) as app,
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
        ):
            bodies = {
                "/v1/chat/completions": CHAT,
                "stream": {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
                "/v1/responses": RESPONSES,
            }
            return {
                path: (await client.post("/v1/chat/completions" if path == "stream" else path, json=body)).text
                for path, body in bodies.items()
            }

    texts = asyncio.run(replies())
    check_all(lambda path, body: texts["stream" if body.get("stream") else path], len(ids))


def test_prompts_in_parts_are_refused(chain):
    """vLLM's streaming input: a request of lanes would never be given its second part, nor a token after it."""

    async def ask() -> None:
        from vllm import SamplingParams
        from vllm.engine.protocol import StreamingInput
        from vllm.sampling_params import RequestOutputKind

        async def parts() -> AsyncGenerator[StreamingInput]:
            for token in (5, 6):
                part: Any = {"prompt_token_ids": [token]}
                yield StreamingInput(part)

        params = SamplingParams(max_tokens=2, output_kind=RequestOutputKind.DELTA)
        async with application(chain[0]) as app, asyncio.timeout(60):
            async for _ in app.state.engine_client.generate(parts(), params, "grows"):
                pass

    with pytest.raises(ValueError, match=r"a prompt that comes in parts \(StreamingInput\)"):
        asyncio.run(ask())


@pytest.mark.slow
def test_a_server_with_parsers(chain):
    """The same with a real engine; and vLLM's own chat and benchmark against it."""
    import httpx

    folder, ids = chain
    with serving(folder, "--", "--enforce-eager", *FLAGS) as server:

        def post(path: str, body: dict[str, Any]) -> str:
            reply = httpx.post(server.url + path, json=body, timeout=120)
            assert reply.status_code == 200, reply.text
            return reply.text

        check_all(post, len(ids) + 1)  # and the token that ends a text
        named = {**CHAT, "tool_choice": {"type": "function", "function": {"name": "f"}}, "max_tokens": 200}
        (call,) = json.loads(post("/v1/chat/completions", named))["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "f"

        talk = [*VLLM, "chat", "--url", f"{server.url}/v1", "--quick", "hi"]
        done = subprocess.run(talk, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "".join(done.stdout.split("<think>")[1].split())[:13] == "why</think>ok"

        bench = {"base-url": server.url, "model": "chain", "tokenizer": str(folder), "num-prompts": "8"}
        bench |= {"random-input-len": "8", "random-output-len": "8", "backend": "openai"}
        flags = [f"--{name}={value}" for name, value in bench.items()]
        command = [*VLLM, "bench", "serve", *flags, "--ignore-eos", "--disable-tqdm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = {line.split(":")[0]: line.split(":")[1].strip() for line in done.stdout.splitlines() if ":" in line}
        assert (lines["Successful requests"], lines["Total generated tokens"]) == ("8", "64")
