"""A real server over HTTP, from its start to SIGTERM."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.serve import Engine, Params
from tests.helpers.dashboard import missing, needs, queries
from tests.helpers.repository import ROOT
from tests.helpers.serve_tiny import VOCABULARY, change_config, generate, prompts
from tests.helpers.serving import Server, free_port, serving

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


ENDING = prompts()[5]  # which a token ends that generation_config.json alone names


@pytest.fixture(scope="module")
def server(model):
    """A server at R=3 in fp32. The last test of this file ends it. Its tokenizer knows more tokens than its model:
    `<extra0>` has a row in vLLM's padding, `<extra70>` has none; it was trained at up to 4 recurrences."""
    folder = model[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(71)])
    tokenizer.save_pretrained(folder)
    change_config(folder, trained_recurrences={"mean": 3, "min": 1, "max": 4})
    ends = [257, generate(model[1], ENDING, 3, 6).tokens[5]]
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": ends}))
    with serving(folder, "num_recurrences=3", "--", "--enable-scale-out") as started:
        yield started


def post(server, path: str, **body) -> dict:
    call = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(call, timeout=60))


def refusal(server, path: str, **body) -> dict:
    """The error object of a request that is answered with 400."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, path, **body)
    assert caught.value.code == 400
    return json.load(caught.value)["error"]


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 8}


def test_completion_equals_transformers(client, model):
    prompt = prompts()[4]
    reply = client.completions.create(
        **GREEDY, prompt=prompt, logprobs=1, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    want = generate(model[1], prompt, 3, 8)
    assert reply.choices[0].token_ids == want.tokens
    assert reply.choices[0].logprobs.token_logprobs == pytest.approx(want.logprobs, abs=1e-3)
    assert reply.usage.completion_tokens == 8


def test_streaming_says_the_same(client):
    request = {**GREEDY, "prompt": "def f(x):", "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**request).choices[0].text
    parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(parts) > 1
    assert "".join(parts) == whole


def test_chat_with_logprobs_and_streaming(client):
    request = {**GREEDY, "messages": [{"role": "user", "content": "hello"}], "extra_body": {"ignore_eos": True}}
    reply = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    assert reply.choices[0].message.role == "assistant"
    assert len(reply.choices[0].logprobs.content) == 8
    assert all(len(token.top_logprobs) == 2 for token in reply.choices[0].logprobs.content)
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**request, stream=True)]
    assert "".join(parts) == reply.choices[0].message.content


def test_models_and_metrics(client, server):
    assert next(m.id for m in client.models.list()) == "tiny"
    client.completions.create(**GREEDY, prompt=[1, 2], extra_body={"ignore_eos": True, "num_recurrences": 5})
    lines = urllib.request.urlopen(server.url + "/metrics", timeout=30).read().decode().splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(metrics['vllm:generation_tokens_total{engine="0",model_name="tiny"}']) >= 8
    assert float(metrics['loopwise:core_passes_total{model_name="tiny"}']) >= 5 * 8
    exits = [float(metrics[f'loopwise:exit_depth_bucket{{le="{n}.0",model_name="tiny"}}']) for n in (4, 5)]
    assert exits[1] - exits[0] >= 8
    assert float(metrics['loopwise:exit_depth_count{model_name="tiny"}']) >= 8
    for name in ("lanes_per_tick", "coda_batch_size"):
        assert float(metrics[f'loopwise:{name}_sum{{model_name="tiny"}}']) > 0


def test_series_of_the_dashboard_are_there(client, server):
    """Every series that a query of deploy/'s dashboard selects, with its labels, and rates of counters alone."""
    client.completions.create(**GREEDY, prompt=[1, 2], extra_body={"ignore_eos": True})
    text = urllib.request.urlopen(server.url + "/metrics", timeout=30).read().decode()
    assert missing({need for query in queries().values() for need in needs(query)}, text) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not installed")
def test_prometheus_answers_the_dashboard(client, server, tmp_path):
    """Prometheus itself reads the server by deploy/'s configuration; every query has a number while requests run."""
    port = free_port()
    settings = (ROOT / "deploy/prometheus.yaml").read_text().replace("server:8000", server.url.removeprefix("http://"))
    (tmp_path / "prometheus.yaml").write_text(settings)
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("w") as log:
        prometheus = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
    try:
        end = time.monotonic() + 25
        while time.monotonic() < end:
            for body in ({}, {"decoder": "wave"}, {"decoder": "diffusion", "num_recurrences": 4}):
                client.completions.create(**GREEDY, prompt=[1, 2, 3], extra_body={"ignore_eos": True, **body})
            time.sleep(0.5)
        answers = {}
        for name, query in queries().items():
            address = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
            result = json.load(urllib.request.urlopen(address, timeout=30))["data"]["result"]
            answers[name] = [float(series["value"][1]) for series in result]
    finally:
        prometheus.terminate()
        prometheus.wait(30)
    assert {name: values for name, values in answers.items() if not any(map(math.isfinite, values))} == {}


@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
@pytest.mark.parametrize("depth", [1, 5])
def test_a_request_chooses_its_depth(client, model, depth, place):
    fields = {"num_recurrences": depth}
    more = {"ignore_eos": True, "return_token_ids": True, "return_recurrences": True}
    more |= fields if place == "body" else {"vllm_xargs": fields}
    reply = client.completions.create(**GREEDY, prompt=prompts()[3], n=1, extra_body=more)
    assert reply.choices[0].token_ids == generate(model[1], prompts()[3], depth, 8).tokens
    assert reply.usage.recurrences == {"mean": depth, "total": 8 * depth, "per_token": [[depth] * 8]}


@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
def test_a_request_chooses_its_decoder(client, model, server, place):
    """A wave gives the plain tokens in fewer passes, and so do parameters that read earlier tokens; usage tells."""
    prompt, usage = prompts()[3], {}
    want = generate(model[1], prompt, 3, 24).tokens
    for decoder in ("plain", "wave", "diffusion"):
        fields: dict = {"decoder": decoder} | ({"max_in_flight": 4} if decoder != "plain" else {})
        fields |= {"diffusion": {"inner": 1, "threshold": 1e-5}} if decoder == "diffusion" else {}
        more = {"ignore_eos": True, "return_token_ids": True, **(fields if place == "body" else {"vllm_xargs": fields})}
        reply = client.completions.create(**{**GREEDY, "max_tokens": 24}, prompt=prompt, extra_body=more)
        usage[decoder] = reply.usage.passes
        if decoder != "diffusion":
            assert reply.choices[0].token_ids == want
    plain = {"sequential": 69, "per_token": 3.0, "wave": 1.0, "items": 69, "wasted": 0}
    assert usage["plain"] == plain
    assert usage["wave"]["sequential"] < 69 <= usage["wave"]["items"] == 69 + usage["wave"]["wasted"]
    assert usage["diffusion"]["wave"] > 1
    for looks_back in (False, True):
        more = {"ignore_eos": True, "return_token_ids": True, "decoder": "wave"} | (
            {"min_tokens": 1} if looks_back else {}
        )
        reply = client.completions.create(**{**GREEDY, "max_tokens": 24}, prompt=prompt, logprobs=1, extra_body=more)
        assert reply.choices[0].token_ids == want
        assert len(reply.choices[0].logprobs.tokens) == 24
        assert (reply.usage.passes == plain) is looks_back  # log-probabilities alone keep the wave
    lines = urllib.request.urlopen(server.url + "/metrics", timeout=30).read().decode().splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    name = 'loopwise:{}_total{{decoder="{}",model_name="tiny"}}'
    assert float(metrics[name.format("sequential_passes", "wave")]) >= usage["wave"]["sequential"]
    assert float(metrics[name.format("decoded_tokens", "diffusion")]) >= 24
    assert "loopwise: waves fill a pass up to budget=" in server.log.read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"draft_every": 2},
        {"draft_depths": [1, 2], "max_in_flight": "auto"},
        {"draft_every": "auto", "vllm_xargs": {"max_in_flight": "auto"}},
        {"vllm_xargs": {"draft_depths": [2], "max_in_flight": 3}},
    ],
    ids=str,
)
def test_depths_at_which_a_wave_drafts_change_no_token(client, model, fields):
    more = {"ignore_eos": True, "return_token_ids": True, "decoder": "wave", **fields}
    reply = client.completions.create(**{**GREEDY, "max_tokens": 24}, prompt=prompts()[3], extra_body=more)
    assert reply.choices[0].token_ids == generate(model[1], prompts()[3], 3, 24).tokens
    # Drafts of random weights are wrong: plain decoding takes 69 passes. By coda_wait=auto an exit waits for one more.
    assert reply.usage.passes["sequential"] <= 96


def test_a_sampled_wave_is_the_plain_sample_in_every_choice(client):
    request = {**GREEDY, "max_tokens": 24, "temperature": 1, "top_p": 0.9, "seed": 5, "n": 3, "prompt": prompts()[2]}
    texts = []
    for decoder in ("plain", "wave"):
        reply = client.completions.create(**request, extra_body={"ignore_eos": True, "decoder": decoder})
        parts = client.completions.create(
            **{**request, "n": 1}, stream=True, extra_body={"ignore_eos": True, "decoder": decoder}
        )
        texts.append(([choice.text for choice in reply.choices], "".join(part.choices[0].text for part in parts)))
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) == 3


def test_usage_counts_the_recurrences_of_every_choice(client):
    prompt = prompts()[2]
    trace = [3] * len(prompt) + [1, 2, 3, 1, 1, 2, 3]
    depths = [3, *trace[len(prompt) :]]
    trace += [1] * (512 - len(trace))  # for positions that do not come
    more = {"ignore_eos": True, "trace": trace, "return_recurrences": True}
    request = {**GREEDY, "temperature": 1, "n": 2}
    usage = client.completions.create(**request, prompt=[prompt, prompt], extra_body=more).usage
    assert usage.recurrences == {"mean": 2.0, "total": 4 * 16, "per_token": [depths] * 4}
    assert usage.completion_tokens == 32
    request = {**GREEDY, "messages": [{"role": "user", "content": "hello"}], "extra_body": {"num_recurrences": 2}}
    assert client.chat.completions.create(**request).usage.recurrences["mean"] == 2


def test_streamed_usage_counts_recurrences(client):
    request = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    request["extra_body"] = {"ignore_eos": True, "exit_rule": "latent-diff", "exit_threshold": 10.0}
    chunks = list(client.completions.create(**request, prompt="abc"))
    assert chunks[-1].usage.recurrences["total"] == 3 + 7  # the prompt's last position runs at full depth
    assert chunks[-1].usage.completion_tokens == 8
    request["messages"] = [{"role": "user", "content": "hello"}]
    assert list(client.chat.completions.create(**request))[-1].usage.recurrences["total"] == 3 + 7


def stream(server, path: str, **body) -> list[dict]:
    """The chunks of a streamed reply that is asked for its recurrences; the last one has its usage."""
    body = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}, "return_recurrences": True, **body}
    call = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    lines = urllib.request.urlopen(call, timeout=60).read().decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def joined(chunks: list[dict]) -> dict[int, tuple[list[int], str, str]]:
    """By choice of a stream: depths, texts of tokens, and text, put together from its chunks."""
    found: dict[int, tuple[list[int], str, str]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert len(choice["recurrences"]) == len(choice["tokens"])
            depths, tokens, text = found.get(choice["index"], ([], "", ""))
            more = choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            found[choice["index"]] = depths + choice["recurrences"], tokens + "".join(choice["tokens"]), text + more
    return found


LETTERS = [*range(32, 58), *range(64, 90)]  # ids of tokens that are a letter each


@pytest.mark.parametrize("decoder", ["plain", "wave"])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/invocations"])
def test_chunks_have_the_depths_of_their_tokens(server, path, choices, decoder):
    """Those that the request forces, and that its usage has, for every choice of every prompt."""
    chat = path.endswith("/chat/completions")
    asked = {"messages": [{"role": "user", "content": "hello"}]} if chat else {"prompt": [prompts()[2]] * 2}
    trace = [1, 2, 3, 3, 2, 2] * 80
    more = {"ignore_eos": True, "trace": trace, "decoder": decoder, "n": choices, "temperature": 1, "max_tokens": 20}
    chunks = stream(server, path, **asked, **more)
    usage, found = chunks[-1]["usage"], joined(chunks)
    length = usage["prompt_tokens"] // (1 if chat else 2)
    assert [found[index][0] for index in sorted(found)] == usage["recurrences"]["per_token"]
    assert usage["recurrences"]["per_token"] == [[3, *trace[length : length + 19]]] * choices * (1 if chat else 2)
    assert all(tokens == text for _, tokens, text in found.values())
    sizes = [len(choice["recurrences"]) for chunk in chunks for choice in chunk["choices"]]
    assert max(sizes) > 1  # a step gives several tokens
    places = [place for chunk in chunks for place in (chunk, *chunk["choices"])]
    assert not any(place.get(name) for place in places for name in ("token_ids", "prompt_token_ids"))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_chunks_whose_text_is_held_back_have_the_depths_of_their_tokens(server, path):
    """vLLM holds text back that a stop string may begin in, and cuts the string off: its tokens are there at once."""
    asked = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    asked |= {"allowed_token_ids": LETTERS, "ignore_eos": True, "max_tokens": 40, "return_token_ids": True, "seed": 3}
    asked |= {"exit_rule": "latent-diff", "exit_threshold": 0.95, "temperature": 2.0}
    asked.pop("messages" if path == "/v1/completions" else "prompt")
    ((_, tokens, whole),) = joined(stream(server, path, **asked)).values()
    assert len(whole) == len(tokens) == 40
    stop = whole[18:22]
    end = whole.index(stop)
    chunks = stream(server, path, **asked, stop=[stop])
    ((depths, tokens, text),) = joined(chunks).values()
    assert (text, tokens) == (whole[:end], whole[: end + 4])
    assert chunks[-1]["usage"]["recurrences"]["per_token"] == [depths]
    assert len(depths) == chunks[-1]["usage"]["completion_tokens"] == end + 4
    assert len(set(depths)) > 1
    ids = [choice.get("token_ids") or [] for chunk in chunks for choice in chunk["choices"]]
    assert [len(one) for one in ids] == [len(c["recurrences"]) for chunk in chunks for c in chunk["choices"]]


def test_chunks_without_a_place_for_depths_stay_as_they_are(server):
    """Chunks of requests that do not ask, of prompts that are echoed, and of routes whose streams have no choices."""
    for more in ({"return_recurrences": False}, {"echo": True}):
        chunks = stream(server, "/v1/completions", prompt="abc", **more)
        assert not any({"recurrences", "tokens"} & {*c} for chunk in chunks for c in chunk["choices"])
        assert chunks[-1]["usage"]["recurrences"]["mean"] == 3
    assert chunks[0]["choices"][0]["text"].startswith("abc")
    for path, asked in (
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
    ):
        kinds = [event["type"] for event in stream(server, path, **asked)]
        assert kinds[-1] in ("message_stop", "response.completed")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_recurrences", 9, "an integer from 1 to 8"),
        ("num_recurrences", True, "an integer from 1 to 8"),
        ("num_recurrences", "3", "an integer from 1 to 8"),
        ("min_recurrences", 4, "at most num_recurrences, which is 3"),
        ("exit_rule", "latentdiff", "did you mean 'latent-diff'?"),
        ("exit_rule", "gate", "choose from fixed, latent-diff"),
        ("exit_threshold", float("nan"), "a finite number"),
        ("prompt_exit", True, "kv_policy is 'per-depth'"),
        ("trace", [0], "integers from 1 to num_recurrences, which is 3"),
        ("num_recurences", 3, "did you mean 'num_recurrences'?"),
        ("decoder", "waves", "did you mean 'wave'?"),
        ("max_in_flight", 4, "decoder='plain' has one position in flight"),
        ("diffusion", {"inner": 2}, "belongs to decoder='diffusion'"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
def test_bad_depth_fields_are_400_and_named(server, path, place, field, value, said):
    fields = {field: value}
    body = {**GREEDY, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    body |= fields if place == "body" else {"vllm_xargs": fields}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["code"], error["param"], error["type"]) == (400, 400, field, "BadRequestError")
    assert said in error["message"]


def test_an_old_field_is_taken_and_warned_of_once(server):
    """In a server's log, too, however many requests have it."""

    def ask(body: dict) -> dict:
        text = json.dumps({**GREEDY, "prompt": "a", "decoder": "wave", **body}).encode()
        request = urllib.request.Request(server.url + "/v1/completions", text, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=60))

    assert all(ask(body)["usage"]["passes"] for body in ({"wave": 4}, {"vllm_xargs": {"wave": 4}}, {"wave": 2}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask({"wave": 4, "max_in_flight": 4})
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["param"]) == (400, "max_in_flight")
    assert "'wave' and 'max_in_flight' are two names of one value" in error["message"]
    warned = [line for line in server.log.read_text().splitlines() if "deprecated since loopwise" in line]
    assert warned == ["loopwise: warning: request field 'wave' is deprecated since loopwise 0.2.0: use 'max_in_flight'"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/invocations", "/v1/chat/completions/batch"])
@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
def test_other_routes_take_the_fields_too(server, path, place):
    def post(**fields):
        body = {"model": "tiny", "input": "a", "messages": [{"role": "user", "content": "a"}]}
        if path.endswith("batch"):
            body["messages"] = [body["messages"]] * 3
        body |= {
            "max_output_tokens": 2,
            "max_tokens": 2,
            "ignore_eos": True,
            **(fields if place == "body" else {"vllm_xargs": fields}),
        }
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(call, timeout=60))

    usage = post(num_recurrences=2)["usage"]
    tokens = 6 if path.endswith("batch") else 2
    assert usage.get("output_tokens", usage.get("completion_tokens")) == tokens
    assert usage["recurrences"] == {"mean": 2.0, "total": 2 * tokens}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(exit_rule="nonsense")
    assert caught.value.code == 400
    assert "choose from fixed, latent-diff" in json.load(caught.value)["error"]["message"]


@pytest.mark.parametrize("path", ["/generative_scoring", "/inference/v1/generate"])
def test_routes_without_a_place_for_depth_say_so(server, path):
    def post(**fields):
        body = {"model": "tiny", "query": "a", "items": ["b"], "label_token_ids": [5, 6], **fields}
        body |= {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(call, timeout=60))

    assert post(num_recurrences=None)
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(num_recurrences=2)
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["param"]) == (400, "num_recurrences")
    assert f"{path} has no depth fields" in error["message"]
    assert "use /v1/completions, " in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_no_reply_shows_the_field_that_depths_travel_in(server, stream):
    """vLLM answers with `routed_experts` of models that have experts, on every route that has a place for it."""
    sampling = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body = {"token_ids": [1, 2, 3], "sampling_params": sampling, "stream": stream}
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(server.url + "/inference/v1/generate", json.dumps(body).encode(), headers)
    said = urllib.request.urlopen(call, timeout=60).read().decode()
    lines = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: {")]
    choices = [choice for part in (lines if stream else [said]) for choice in json.loads(part)["choices"]]
    assert sum(len(choice["token_ids"]) for choice in choices) == 4
    assert {choice.get("routed_experts") for choice in choices} == {None}


@pytest.mark.parametrize(
    ("field", "value"), [("stop_token_ids", [9999]), ("logit_bias", {"9999": 1.0}), ("stop", ["a"]), ("top_k", 5)]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_beam_search_ignores_is_400_and_named(server, path, field, value):
    beams = {**GREEDY, "use_beam_search": True, "n": 2, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    assert len(post(server, path, **beams)["choices"]) == 2
    error = refusal(server, path, **beams, **{field: value})
    assert error["param"] == field
    assert error["message"].endswith("cannot be given with use_beam_search, which ignores it")


def test_a_route_that_would_harm_the_engine_is_400(server):
    assert refusal(server, "/scale_elastic_ep", new_data_parallel_size=2)["message"].startswith("/scale_elastic_ep: ")


def test_who_comes_shortens_the_step_that_runs(server, client):
    """A step of 16 ticks gives a request of 3 recurrences 5 tokens or 6."""

    def chunks() -> Iterator[int]:
        body = {**GREEDY, "prompt": [1, 2, 3], "max_tokens": 200, "extra_body": {"ignore_eos": True}}
        options = {"include_usage": True, "continuous_usage_stats": True}
        told = [0]
        for chunk in client.completions.create(**body, stream=True, stream_options=options):
            if chunk.usage.completion_tokens > told[-1]:
                told.append(chunk.usage.completion_tokens)
                yield told[-1] - told[-2]

    assert {*list(chunks())[1:-1]} == {5, 6}
    for _ in range(4):  # a busy machine may read the chunks only after the server has made them all
        sizes = []
        for size in chunks():
            sizes.append(size)
            client.completions.create(**{**GREEDY, "max_tokens": 1}, prompt=[4, 5])
        assert sum(sizes) == 200
        if min(sizes[1:-1]) < 5:
            return
    raise AssertionError("no step was shortened")


def test_a_client_that_leaves_is_no_error(server):
    body = json.dumps({**GREEDY, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(server.url).port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(0.3)

    def ended() -> bool:
        with urllib.request.urlopen(server.url + "/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        assert not [line for line in lines if line.startswith("http_requests_total") and 'status="5xx"' in line]
        return any(line.startswith("vllm:num_requests_running{") and line.endswith(" 0.0") for line in lines)

    server.wait_until(ended, 60)
    assert ended()  # whatever the reply became is counted by now


def test_prompts_are_scored(client, model):
    """As evaluation by log-likelihood asks: echo the prompt with its log-probabilities."""
    prompt = prompts()[3]
    reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=1)
    with torch.no_grad():
        logits = model[1](torch.tensor([prompt]), num_recurrences=3).logits[0].log_softmax(-1)
    want = logits[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    assert reply.choices[0].logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(want.tolist(), abs=1e-3)


def test_wrong_requests_are_4xx(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**GREEDY, "model": "other"}, prompt="a")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{**GREEDY, "max_tokens": 10_000}, prompt="a")


def test_a_model_may_be_named_by_its_path(client, model):
    assert [m.id for m in client.models.list()] == ["tiny", str(model[0])]
    assert client.completions.create(**{**GREEDY, "model": str(model[0])}, prompt="a").choices[0].text


def test_generation_config_means_the_same_on_every_path(server, model):
    """Stop tokens that it alone names, and `do_sample=false`: the server, the offline engine and transformers."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model[0], dtype=torch.float32).eval()
    out = loaded.generate(torch.tensor([ENDING]), max_new_tokens=20, num_recurrences=3, pad_token_id=258)
    want = out[0, len(ENDING) :].tolist()
    assert len(want) <= 6
    (offline,) = Engine(model[0], dtype="float32").generate([ENDING], Params(20, 3))
    body = {"model": "tiny", "prompt": ENDING, "max_tokens": 20, "return_token_ids": True}
    (served,) = post(server, "/v1/completions", **body)["choices"]
    assert served["token_ids"] == offline.tokens == want
    assert served["finish_reason"] == offline.finish_reason == "stop"
    (on,) = post(server, "/v1/completions", **body, ignore_eos=True)["choices"]
    assert on["token_ids"] == generate(model[1], ENDING, 3, 20).tokens


def check_tokens_beyond_the_model(server) -> None:
    """Whatever names a token without an embedding is a 400 that says so, and the next request is answered."""
    small = {"model": "tiny", "max_tokens": 2, "temperature": 0}
    several: dict = {"n": 2, "stream": True, "temperature": 1}
    chat = [{"role": "user", "content": "the <extra70> cat"}]
    asked = [
        *(("/v1/completions", {"prompt": f"the <extra{n}> cat"}, VOCABULARY + n) for n in (0, 70)),
        *(("/v1/completions", {"prompt": [5, token]}, token) for token in (VOCABULARY, 329, 10_000)),
        ("/v1/completions", {"prompt": ["a", "<extra0>"], **several}, VOCABULARY),
        ("/v1/completions", {"prompt": "a<extra1>", "echo": True, "logprobs": 1}, VOCABULARY + 1),
        ("/v1/chat/completions", {"messages": chat}, VOCABULARY + 70),
        ("/v1/chat/completions", {"messages": chat, **several}, VOCABULARY + 70),
        ("/v1/messages", {"messages": chat}, VOCABULARY + 70),
        ("/v1/responses", {"input": "<extra0>"}, VOCABULARY),
        *(
            ("/v1/completions", {"prompt": "a", name: [VOCABULARY], "logprobs": 1}, VOCABULARY)
            for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")
        ),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [329], "min_tokens": 2}, 329),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(VOCABULARY): 5}}, VOCABULARY),
        ("/v1/completions", {"prompt": "a", "bad_words": ["<extra70>"]}, 329),
    ]
    for path, fields, token in asked:
        error = refusal(server, path, **(small | fields))
        message = error["error"]["message"] if "error" in error else error["message"]
        assert f"token id {token} in " in message, (path, fields, message)
        assert f"a vocabulary of {VOCABULARY} tokens" in message
        assert post(server, "/v1/completions", **small, prompt="a")["usage"]["completion_tokens"] <= 2


def test_no_token_beyond_the_embeddings_reaches_the_engine(server):
    assert f"the tokenizer has ids up to 329, the model a vocabulary of {VOCABULARY} tokens" in server.log.read_text()
    check_tokens_beyond_the_model(server)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_embeds", "AAAA"),
        ("kv_transfer_params", {"do_remote_decode": True}),
        ("thinking_token_budget", 3),
        ("watermarking", True),
        ("routed_experts_prompt_start", 1),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_fields_that_no_engine_follows_are_400_and_named(server, path, field, value):
    error = refusal(server, path, **GREEDY, prompt="a", messages=[{"role": "user", "content": "a"}], **{field: value})
    assert error["param"] == field
    assert error["message"].startswith(f"{field}=")


def test_a_text_that_repeats_itself_ends(server):
    """Though the step that it repeats itself in gives it more tokens."""
    more = {"ignore_eos": True, "return_token_ids": True, "allowed_token_ids": [65], "max_tokens": 30}
    more["repetition_detection"] = {"max_pattern_size": 1, "min_count": 3}
    (choice,) = post(server, "/v1/completions", **(GREEDY | more), prompt="a")["choices"]
    assert (choice["token_ids"], choice["finish_reason"]) == ([65] * 3, "repetition")


def test_depths_beyond_training_are_warned_of_once(server):
    for _ in range(2):
        post(server, "/v1/completions", **GREEDY, prompt="a", num_recurrences=6)
    said = "loopwise: warning: num_recurrences=6: this model was trained at 1 to 4 recurrences (mean 3), and not beyond"
    assert server.log.read_text().count(said) == 1


def check_chunks_of_the_fixed_engine(server) -> None:
    """Every token has the model's depth, in chunks and in /v1/depth, which the page reads."""
    for path, asked in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        ((depths, tokens, text),) = joined(stream(server, path, **asked, ignore_eos=True)).values()
        assert (depths, tokens) == ([1] * 8, text)
    settings = json.load(urllib.request.urlopen(server.url + "/v1/depth", timeout=60))
    assert (settings["engine"], settings["num_recurrences"], settings["max_recurrences"]) == ("fixed", 1, 1)


@pytest.mark.parametrize("to_group", [False, True], ids=["sigterm", "ctrl-c"])
def test_drains_and_leaves_no_process(request, to_group, server, model):
    """SIGTERM to the server, or Ctrl-C as a terminal sends it, to all its processes: open requests are answered."""
    if to_group:
        server = Server(model[0], "engine=fixed", "--", "--enforce-eager")  # compiling takes half a minute
        request.addfinalizer(server.kill)
        server.wait_until(server.healthy, 240)
        check_tokens_beyond_the_model(server)
        check_chunks_of_the_fixed_engine(server)
    body = {**GREEDY, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    call = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    lines, begun = [], threading.Event()

    def read():
        with urllib.request.urlopen(call, timeout=60) as reply:
            for line in reply:
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    assert any("EngineCore" in process for process in server.processes())
    if to_group:
        os.killpg(server.process.pid, signal.SIGINT)
    else:
        server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises(urllib.error.HTTPError) as refused:  # later ones are not
        urllib.request.urlopen(call, timeout=60)
    error = json.load(refused.value)["error"]
    assert (refused.value.code, error["code"], error["message"]) == (503, 503, "the server is shutting down")
    assert server.wait_for_end() == 0
    reader.join()
    events = [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    usage = json.loads(events[-2])["usage"]
    assert usage["completion_tokens"] == 400
    assert usage["recurrences"]["mean"] == (1 if to_group else 3)  # the model's, and that of the first server
    assert "leaked" not in server.log.read_text()


def check_deeper_than_the_config(server, model) -> None:
    """A request at 13 recurrences of a model whose config says 8, on a server that has room for 16."""
    loaded = AutoModelForCausalLM.from_pretrained(model[0], dtype=torch.float32, max_recurrences=16).eval()
    body = {"ignore_eos": True, "return_token_ids": True, "num_recurrences": 13}
    (served,) = post(server, "/v1/completions", **GREEDY, prompt=prompts()[3], **body)["choices"]
    assert served["token_ids"] == generate(loaded, prompts()[3], 13, 8).tokens
    each = (3 + 2 * 16) * 2 * 2 * 32 * 4  # slots, keys and values, heads, head size, bytes of a float32
    assert f"{each / 1024:.3g} KiB of keys and values a token at max_recurrences=16" in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [300, 1])
def test_a_second_signal_or_the_end_of_the_drain_cuts_it_short(request, model, seconds):
    """Replies end with what there is, and so does the server, whatever its clients do; no process is left."""
    deep = ["num_recurrences=8", "max_recurrences=16", "passes_per_step=1"]
    server = Server(model[0], *deep, f"drain_seconds={seconds}", "--", "--enforce-eager")
    request.addfinalizer(server.kill)
    server.wait_until(server.healthy, 240)
    check_deeper_than_the_config(server, model)
    body = {**GREEDY, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 16}
    slow = {"temperature": 1, "repetition_penalty": 1.1, "logprobs": 5}  # which the host looks at for every token
    text = json.dumps(body | slow).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    address = "127.0.0.1", urllib.parse.urlsplit(server.url).port
    with socket.create_connection(address, 60) as stuck, socket.create_connection(address, 60) as client:
        stuck.sendall(head.encode() + b"\r\n\r\n{")  # and no more
        client.sendall(head.encode() + b"\r\n\r\n" + text)
        heard = b""
        while not all(b'"index":%d,' % n in heard for n in range(16)):
            heard += client.recv(1 << 20)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        start = time.monotonic()
        if seconds > 1:
            server.process.send_signal(signal.SIGINT)
        while part := client.recv(1 << 20):
            heard += part
        assert server.wait_for_end() == 0
    assert time.monotonic() - start < 15
    assert heard.count(b'"finish_reason":"abort"') == 16
    assert b"data: [DONE]" in heard
    log = server.log.read_text()
    assert ("a second signal: open requests are cut off" in log) == (seconds > 1)
    assert "Traceback" not in log
