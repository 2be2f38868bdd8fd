"""The server's middleware and hooks in vLLM, without an engine."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest


@pytest.mark.parametrize("root", ["", "/x"])
@pytest.mark.parametrize("prefix", ["", "/x"])
def test_the_middleware_checks_every_path_that_leads_to_a_route(root, prefix):
    """With `--root-path /x`, the server answers behind a proxy that strips the prefix, and behind one that does not."""
    pytest.importorskip("vllm")
    from fastapi import FastAPI
    from starlette.responses import JSONResponse
    from starlette.testclient import TestClient

    from loopwise.serve.api.limits import HttpLimits
    from loopwise.serve.vllm.http import DepthFields, Ending
    from loopwise.serve.vllm.load import Load
    from loopwise.serve.vllm.watchdog import Watchdog

    app = FastAPI(root_path=root)
    config = SimpleNamespace(num_recurrences=4, max_recurrences=8)
    model = SimpleNamespace(hf_config=config)
    scheduler = SimpleNamespace(max_num_seqs=8)
    vllm_config = SimpleNamespace(model_config=model, scheduler_config=scheduler, additional_config=None)
    app.state.engine_client = SimpleNamespace(vllm_config=vllm_config)
    app.state.server = SimpleNamespace(server_state=SimpleNamespace(connections=set()))
    own = {"metrics": None, "ending": Ending(), "watchdog": Watchdog(0), "load": Load(HttpLimits())}
    app.add_middleware(cast(Any, DepthFields), **own)

    async def completions(request) -> JSONResponse:
        return JSONResponse({"heard": await request.json(), "usage": {"completion_tokens": 2}})

    app.add_route("/v1/completions", completions, methods=["POST"])
    with TestClient(app) as client:
        path = prefix + "/v1/completions"
        reply = client.post(path, json={"prompt": "a", "num_recurrences": 4})
        if prefix and not root:
            assert reply.status_code == 404
            return
        assert reply.json()["usage"]["recurrences"] == {"mean": 4.0, "total": 8}
        assert reply.json()["heard"] == {"prompt": "a"}
        for body, field in (
            ('{"num_recurrences": 3}', "num_recurrences"),
            ('{"extra_body": {"num_recurrences": 4}}', "num_recurrences"),
            ('{"sampling_params": {"n_loops": 4}}', "n_loops"),
            ('{"exit_rule": "fixed", "exit_rule": "fixed"}', "exit_rule"),
        ):
            reply = client.post(path, content=body)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_who_comes_while_a_step_runs_is_heard_of(monkeypatch):
    """By the worker, in another process, through the file that the server shares; until the next step is made."""
    pytest.importorskip("vllm")
    from vllm.v1.engine.core import EngineCore

    from loopwise.serve.vllm.arrivals import ARRIVALS, Arrivals, arrivals, count_arrivals, share

    monkeypatch.setenv(ARRIVALS, share())
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda self, request: (request, 0))
    for cached in (arrivals, count_arrivals):
        cached.cache_clear()
    try:
        count_arrivals()
        program = "import os, sys; from loopwise.serve.vllm.arrivals import *; print(arrivals().waiting())"

        def waiting() -> bool:
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            return {"True": True, "False": False}[done.stdout.strip()]

        assert not waiting()
        assert EngineCore.preprocess_add_request(cast(Any, None), cast(Any, "a")) == ("a", 0)
        assert waiting()
        cast(Arrivals, arrivals()).start_step()
        assert not waiting()
        monkeypatch.delenv(ARRIVALS)
        arrivals.cache_clear()
        assert arrivals() is None
        monkeypatch.setenv(ARRIVALS, "/nonexistent/fd/9")  # a sandbox that hides /proc/PID/fd
        arrivals.cache_clear()
        assert arrivals() is None
    finally:
        for cached in (arrivals, count_arrivals):
            cached.cache_clear()


def test_streams_end_when_the_engine_is_stopped():
    """Also where its handler of outputs is cancelled before it heard of that."""
    import asyncio

    pytest.importorskip("vllm")
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    from loopwise.serve.vllm.endpoint import end_streams
    from loopwise.serve.vllm.shutdown import Ending

    async def serve() -> None:
        handler, loop = asyncio.create_task(asyncio.sleep(1000)), asyncio.get_running_loop()
        engine: Any = SimpleNamespace(errored=False, output_handler=handler)
        engine.shutdown = lambda _=None: loop.call_soon_threadsafe(handler.cancel)
        stream = RequestOutputCollector(RequestOutputKind.DELTA, "a")
        engine.output_processor = processor = cast(Any, OutputProcessor.__new__(OutputProcessor))
        processor.request_states = {"a": SimpleNamespace(queue=stream)}
        end_streams(engine, ending := Ending())
        await loop.run_in_executor(None, engine.shutdown)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(stream.get(), 10)
        assert (ending.requested, ending.dead) == (True, False)

    asyncio.run(serve())


def test_a_full_disk_does_not_stop_the_end():
    """A signal's handler prints before it aborts requests."""
    program = "from loopwise.serve.vllm.announce import say; say('a line'); print('went on')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.stdout == "went on\n"


def test_the_endpoint_plugin_leaves_other_models_alone():
    """VLLM_PLUGINS may name it for a server of any model."""
    import asyncio

    pytest.importorskip("vllm")
    from fastapi import FastAPI
    from transformers import AutoConfig
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from loopwise.serve.vllm.endpoint import Endpoint

    endpoint, app = Endpoint(), FastAPI()
    assert isinstance(endpoint, EndpointPlugin)
    model = SimpleNamespace(hf_config=AutoConfig.for_model("llama"))
    engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    before = [*app.user_middleware], [*app.routes], dict(vars(engine))
    endpoint.attach_router(app)
    asyncio.run(endpoint.init_state(engine, app.state, cast(Any, None)))
    assert before == ([*app.user_middleware], [*app.routes], vars(engine))
