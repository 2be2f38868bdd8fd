"""vLLM's own ways in, `vllm.LLM(MODEL)`, `vllm serve MODEL` and its server's module, get the lane engine unasked."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.helpers.serve_tiny import GROUPED, RETROFIT, generate, prompts, run_cases, save, source_config
from tests.helpers.serving import VLLM, Server, metric, serving

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
TOKENS = 8
MODULE = (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", "{folder}")
COMMAND = (*VLLM, "serve", "{folder}")
FLAGS = ("--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's directory, and the model, whose depth is 3."""
    folder = tmp_path_factory.mktemp("commands") / "tiny"
    return folder, save(folder, source_config("llama", **GROUPED), **RETROFIT, num_recurrences=3)


def test_llm_of_a_model_equals_transformers(model, tmp_path):
    """At the model's depth, and at a request's. Outputs have depths where a request asks for them."""
    folder, made = model
    fields: list[dict[str, Any]] = [{}, {"num_recurrences": 2, "return_recurrences": True}]
    case = {"folder": str(folder), "engine": {}, "prompts": prompts(5), "tokens": TOKENS, "fields": fields}
    (result,) = run_cases([case], tmp_path, "run_plain.py")
    assert "error" not in result, result["error"]
    assert result["worker"] == "loopwise.serve.vllm.worker.LaneWorker"
    for depth, tokens in zip((3, 2), result["tokens"], strict=True):
        assert tokens == [generate(made, prompt, depth, TOKENS).tokens for prompt in prompts(5)]
    assert result["depths"] == [[None] * 5, [[2] * TOKENS] * 5]


def post(server: Server, **body: Any) -> dict[str, Any]:
    body = {"prompt": prompts()[4], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **body}
    body |= {"return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(call, timeout=120))


def status(server: Server, path: str) -> int:
    try:
        return urllib.request.urlopen(server.url + path, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize("command", [MODULE, COMMAND], ids=["module", "vllm serve"])
def test_with_the_endpoint_plugin(model, command):
    """Fields at the top level, usage, metrics, the page, errors with the field's name, and the end on SIGTERM."""
    folder, made = model
    settings = json.dumps({"loopwise": {"max_recurrences": 6, "max_choices": 2}})
    with serving(folder, *FLAGS, "--additional-config", settings, command=command, VLLM_PLUGINS="loopwise") as server:
        reply = post(server, num_recurrences=2, return_recurrences=True)
        assert reply["choices"][0]["token_ids"] == generate(made, prompts()[4], 2, TOKENS).tokens
        assert reply["choices"][0].get("routed_experts") is None
        assert reply["usage"]["recurrences"] == {"mean": 2.0, "total": 2 * TOKENS, "per_token": [[2] * TOKENS]}
        assert "passes" in post(server)["usage"]
        assert metric(server, "loopwise:exit_depth_count") >= 2 * TOKENS
        assert status(server, "/depth") == 200
        for body, field in (({"num_recurrences": 7}, "num_recurrences"), ({"n": 3, "temperature": 1}, "n")):
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(server, **body)
            assert (caught.value.code, json.load(caught.value)["error"]["param"]) == (400, field)
        server.process.terminate()
        server.wait_for_end()


@pytest.mark.slow
def test_without_the_endpoint_plugin(model):
    """Lanes, and fields in `vllm_xargs`; no reply has more than vLLM's own fields, unless the request asks for it."""
    folder, made = model
    with serving(folder, *FLAGS, command=MODULE) as server:
        reply = post(server, vllm_xargs={"num_recurrences": 2})
        assert reply["choices"][0]["token_ids"] == generate(made, prompts()[4], 2, TOKENS).tokens
        assert reply["choices"][0].get("routed_experts") is None
        assert not {"recurrences", "passes"} & reply["usage"].keys()
        assert isinstance(post(server, vllm_xargs={"return_recurrences": 1})["choices"][0]["routed_experts"], str)
        assert status(server, "/depth") == 404
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, vllm_xargs={"num_recurrences": 9})
        assert caught.value.code == 400
