"""The making of replies from the engine's outputs: its cost, and an exception in it."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from typing import Any

import numpy as np
import pytest

from tests.helpers.application import application

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_depths_of_a_long_stream_cost_the_same_at_every_token(monkeypatch):
    """They took a time that grew with the reply, on the loop of events: 10 s in all at 8,000 tokens."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState

    from loopwise.serve.vllm.work import Work, note_tokens

    for owner, name in ((IncrementalDetokenizer, "from_new_request"), (RequestState, "_new_completion_output")):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    note_tokens()
    count, took = 8000, []
    params = SamplingParams(
        max_tokens=count, output_kind=RequestOutputKind.DELTA, extra_args={"return_recurrences": True}, detokenize=False
    )
    request = EngineCoreRequest("a", [1], None, params, None, 0.0, None, None, None, external_req_id="a")
    processor = OutputProcessor(None, log_stats=False)
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
    processor.add_request(request, "a", queue=queue)
    depths = [number % 7 + 1 for number in range(count)]

    async def outputs():
        for number, depth in enumerate(depths):
            start = time.perf_counter()
            row = np.array([[depth, number, number]], dtype=np.int32)
            finished: Any = "length" if number == count - 1 else None
            processor.process_outputs([EngineCoreOutput("a", [5], routed_experts=row)])
            took.append(time.perf_counter() - start)
            one: Any = await queue.get()
            one.outputs[0].finish_reason = finished
            yield one

    work = Work(None, per_token=True, in_chunks=True)

    async def follow() -> list[int]:
        found = []
        async for one in work.follow(outputs(), 1):
            chunk: dict[str, Any] = {"choices": [{"index": 0, "token_ids": list(one.outputs[0].token_ids)}]}
            work.add_to_chunk(chunk)
            found += chunk["choices"][0]["recurrences"]
        return found

    assert asyncio.run(follow()) == depths
    usage = work.usage(count)
    assert usage is not None
    assert usage["recurrences"]["per_token"] == [depths]
    early, late = sorted(took[:1000])[500], sorted(took[-1000:])[500]
    assert late < 3 * early


@pytest.mark.parametrize("place", ["text", "log-probabilities", "depths"])
def test_an_exception_in_the_making_of_text_ends_its_request_alone(model, monkeypatch, capfd, place):
    """vLLM makes the text of all requests in one loop: an exception there ended the server."""
    import httpx
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.engine.output_processor import RequestState

    owner: Any
    owner, name = {
        "text": (BaseIncrementalDetokenizer, "update"),
        "log-probabilities": (LogprobsProcessor, "update_from_output"),
        "depths": (RequestState, "_new_completion_output"),
    }[place]
    made = getattr(owner, name)
    poisoned: set[int] = set()

    def fails(self, *args: Any, **kwargs: Any) -> Any:
        if id(self) in poisoned:
            raise ZeroDivisionError("secret")
        return made(self, *args, **kwargs)

    add = RequestState.from_new_request.__func__

    def from_new_request(cls, *args: Any, **kwargs: Any) -> Any:
        state = add(cls, *args, **kwargs)
        if state.temperature == 0.8125:
            part = {"text": state.detokenizer, "log-probabilities": state.logprobs_processor, "depths": state}[place]
            poisoned.add(id(part))
        return state

    async def check() -> None:
        async with application(model[0]) as app:
            monkeypatch.setattr(owner, name, fails)
            monkeypatch.setattr(RequestState, "from_new_request", classmethod(from_new_request))
            engine: Any = app.state.engine_client
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

                async def ask(**fields: Any) -> Any:
                    body = {"model": "tiny", "prompt": "a", "max_tokens": 9, "logprobs": 1, **fields}
                    return await asyncio.wait_for(client.post("/v1/completions", json=body), 30)

                first = await ask()
                assert first.status_code == 200, first.text
                clean = first.json()["choices"]
                for bad in ({"temperature": 0.8125}, {"temperature": 0.8125, "n": 3}):
                    replies = await asyncio.gather(ask(), ask(**bad), ask(), ask(**bad, stream=True), ask())
                    assert [reply.status_code for reply in replies] == [200, 500, 200, 200, 200]
                    assert all(reply.json()["choices"] == clean for reply in (replies[0], replies[2], replies[4]))
                    assert '"error"' in replies[3].text
                    assert "secret" not in replies[1].text + replies[3].text
                assert not engine.errored
                assert not engine.output_processor.request_states
                assert (await client.get("/health")).status_code == 200

    asyncio.run(check())
    assert "ends by an error" in (error := capfd.readouterr().err)
    assert "ZeroDivisionError: secret" in error
