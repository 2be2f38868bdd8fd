"""The page's routes, and the outputs that chunks are made of, without an engine. test_browser.py runs the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

from loopwise.model import RecurrentDepthConfig
from loopwise.serve.api.lanes import LaneConfig
from loopwise.serve.vllm.page.routes import FILES, FOLDER
from tests.helpers.serve_tiny import GROUPED, RETROFIT, source_config

ROUTER = {"kind": "token", "depths": 2, "kv": "first-recursion"}


def application(root: str = "", lanes: dict[str, Any] | None = None, **fields):
    """An application with the page's routes alone, and vLLM's authentication by the key `secret`.

    lanes: vLLM's additional_config of the lane engine; None for the fixed one.
    """
    from fastapi import FastAPI
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from loopwise.serve.vllm.page.routes import page_routes

    config = RecurrentDepthConfig(source_config=source_config("llama", **GROUPED), **{**RETROFIT, **fields})
    app = FastAPI(root_path=root)
    model = SimpleNamespace(hf_config=config, max_model_len=128, logits_processors=None)
    app.state.engine_client = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model, additional_config=lanes))
    app.router.routes.extend(page_routes())
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    return app


@pytest.mark.parametrize("root", ["", "/x"])
@pytest.mark.parametrize("prefix", ["", "/x"])
def test_files_need_no_key_and_the_settings_do(root, prefix):
    """Behind a proxy that strips `--root-path`, and behind one that does not."""
    pytest.importorskip("vllm")
    from starlette.testclient import TestClient

    with TestClient(application(root, num_recurrences=4)) as client:
        if prefix and not root:
            assert client.get(prefix + "/depth").status_code == 404
            return
        for path in ("/depth", *(f"/depth/{name}" for name in FILES)):
            reply = client.get(prefix + path)
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith(FILES.get(path.removeprefix("/depth/"), "text/html"))
            assert reply.headers["content-security-policy"].startswith("default-src 'self'; ")
            assert reply.headers["x-content-type-options"] == "nosniff"
        assert client.get(prefix + "/v1/depth").status_code == 401
        reply = client.get(prefix + "/v1/depth", headers={"Authorization": "Bearer secret"})
        assert (reply.json()["engine"], reply.json()["num_recurrences"]) == ("fixed", 4)
        assert client.get(prefix + "/depth/routes.py").status_code == 404


@pytest.mark.parametrize(
    ("engine", "fields", "policy", "routed"),
    [
        ("lanes", {}, "per-depth", None),
        ("lanes", {"kv_policy": "last-exited"}, "last-exited", None),
        ("fixed", {"kv_policy": "last-exited"}, "per-depth", None),  # which has a cache of every recurrence
        ("lanes", {"router": ROUTER, "injection": "none"}, None, "first-recursion"),
    ],
)
def test_the_settings_have_the_kv_policy_in_force(engine, fields, policy, routed):
    pytest.importorskip("vllm")
    from starlette.testclient import TestClient

    lanes = LaneConfig().flags()["additional_config"] if engine == "lanes" else None
    with TestClient(application(lanes=lanes, **fields)) as client:
        found = client.get("/v1/depth", headers={"Authorization": "Bearer secret"}).json()
    assert (found["engine"], found["kv_policy"], found["router_kv"]) == (engine, policy, routed)


class Addresses(HTMLParser):
    """All that a page loads or leads to, and inline code, which the page's policy forbids."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        self.inline += [name for name, _ in attrs if name == "style" or name.startswith("on")]
        self.inline += [tag] * (tag == "style" or (tag == "script" and "src" not in dict(attrs)))


def test_the_page_fetches_nothing_from_elsewhere():
    """Its addresses are relative, so that a prefix stays; a model's text never becomes HTML."""
    page = Addresses((FOLDER / "page.html").read_text())
    assert sorted(page.found) == ["depth/icon.svg", "depth/page.css", "depth/page.js", "metrics"]
    assert page.inline == []
    script = (FOLDER / "page.js").read_text()
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?:", script) == []
    assert not re.search(r"url\(|@import|https?:", (FOLDER / "page.css").read_text())


def test_outputs_that_a_slow_client_joins_keep_every_depth():
    """vLLM joins the outputs of a stream that wait: one chunk then has the tokens of both."""
    pytest.importorskip("vllm")
    import asyncio

    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from loopwise.serve.vllm.work import Tokens, Work

    rows = [[3, 0, 0], [1, 1, 1], [2, 3, 3], [4, 7, 7]]
    texts = ["a", "", "é"]  # no text for the last token, which ends the reply

    def output(ids: list[int], end: int, reason: str | None = None) -> RequestOutput:
        tokens: Any = Tokens(rows[:end], texts)
        made = CompletionOutput(0, "", ids, None, None, tokens, finish_reason=reason)
        return RequestOutput("x", None, [9], None, [made], reason is not None)

    collector = RequestOutputCollector(RequestOutputKind.DELTA, "x")

    async def outputs():
        collector.put(output([5], 1))
        yield await collector.get()
        collector.put(output([6, 7], 3))
        collector.put(output([8], 4, "stop"))
        yield await collector.get()

    work = Work(None, per_token=True, in_chunks=True)

    async def chunks() -> list[dict[str, Any]]:
        return [
            {"choices": [{"index": 0, "token_ids": list(one.outputs[0].token_ids)}]}
            async for one in work.follow(outputs(), 1)
        ]

    made = asyncio.run(chunks())
    hidden: dict[str, Any] = {"choices": [{"index": 0, "delta": {}}]}  # of reasoning that vLLM hides, it sends no ids
    work.add_to_chunk(hidden)
    assert hidden["choices"] == [{"index": 0, "delta": {}, "recurrences": [], "tokens": []}]
    for chunk in made:
        work.add_to_chunk(chunk)
    first, second = (chunk["choices"][0] for chunk in made)
    assert (first["token_ids"], first["recurrences"], first["tokens"]) == ([5], [3], ["a"])
    assert (second["token_ids"], second["recurrences"], second["tokens"]) == ([6, 7, 8], [1, 2, 4], ["", "é", ""])
    usage = work.usage(4)
    assert usage is not None
    assert usage["recurrences"]["per_token"] == [[3, 1, 2, 4]]
