"""Who may ask the server: every route with and without its key, and addresses that other machines reach."""

from __future__ import annotations

import asyncio
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from loopwise.errors import UserError
from loopwise.serve.vllm.exposure import check_exposure
from loopwise.serve.vllm.page.routes import FILES
from loopwise.serve.vllm.routes import GENERATION, REFUSED
from tests.helpers.application import application

pytestmark = pytest.mark.xdist_group("vllm")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

PAGE = {"/depth", *(f"/depth/{name}" for name in FILES)}
KEYS = {"none": {}, "wrong": {"Authorization": "Bearer guess"}, "right": {"Authorization": "Bearer secret"}}
BESIDE = ["/", "/nowhere", "/v1", "/v2/x", "//health", "/health/", "/health/../v1/models", "/metricsx", "/depth/x"]
BREAK = "%0A"  # a line break behind a path, over which the router reads


async def statuses(folder, *settings: str, flags: tuple[str, ...] = ()) -> dict[tuple[str, str, str], int]:
    """The status of each of the application's routes, and of paths beside them, by path, method and key."""
    import httpx

    found = {}
    async with application(folder, *settings, flags=("--api-key", "secret", *flags)) as app:
        routes = [(path, methods) for path, methods in walk(app.routes) if path]
        assert len(routes) > 40
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            broken = [(path + BREAK, methods) for path, methods in routes]
            for path, methods in [*routes, *broken, *((path, {"GET", "POST"}) for path in BESIDE)]:
                for method in methods | {"OPTIONS", "HEAD", "DELETE"}:
                    for key, headers in KEYS.items():
                        reply = await client.request(method, path.replace("{response_id}", "x"), headers=headers)
                        found[path, method, key] = reply.status_code
    return found


def walk(routes: Any) -> list[tuple[str | None, set[str]]]:
    """Paths and methods of `routes`, and of the routers in them."""
    found = []
    for route in routes:
        if inner := getattr(route, "effective_routes", None):
            found += walk(inner() if callable(inner) else inner)
        else:
            found.append((getattr(route, "path", None), set(getattr(route, "methods", None) or {"GET"})))
    return found


@needs_vllm
@pytest.mark.parametrize("open_metrics", [False, True])
def test_every_route_wants_the_key(model, monkeypatch, open_metrics):
    """The routes are those of the application, with every optional one. The open ones are listed here by name."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    settings = [f"open_metrics={str(open_metrics).lower()}"]
    flags = ("--enable-scale-out", "--enable-tokenizer-info-endpoint")
    found = asyncio.run(statuses(model[0], *settings, flags=flags))
    served = {path for path, _, _ in found}
    assert {*GENERATION, *REFUSED, *PAGE, "/metrics", "/tokenize", "/load", "/docs", "/server_info"} - served <= {
        "/v1/systemone", "/cohere/v2/chat", "/weight_checker", "/update_weight_version", "/start_draft_weight_update",
        "/release_kv_cache_memory", "/shutdown_weight_transfer_engine",
    }  # fmt: skip
    unguarded = {path for (path, _, key), status in found.items() if key != "right" and status != 401}
    assert unguarded == {"/health", "/ping", "/version", *PAGE} | ({"/metrics"} if open_metrics else set())
    assert {status for (path, _, key), status in found.items() if path in unguarded and key != "right"} <= {200, 405}
    assert not [at for at, status in found.items() if at[2] == "right" and status == 401]
    assert found["/metrics", "GET", "right"] == found["/v1/models", "GET", "right"] == 200
    assert found["/nowhere", "GET", "right"] == 404
    assert {status for (path, _, key), status in found.items() if path.endswith(BREAK) and key == "right"} == {404}


@needs_vllm
def test_another_site_learns_nothing_from_a_preflight(model):
    async def ask(flags: tuple[str, ...]) -> Any:
        import httpx

        headers = {"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
        async with (
            application(model[0], flags=("--api-key", "secret", *flags)) as app,
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
        ):
            return await client.options("/v1/completions", headers=headers)

    assert "access-control-allow-origin" not in asyncio.run(ask(())).headers
    assert asyncio.run(ask(("--allowed-origins", '["http://evil"]'))).headers["access-control-allow-origin"]


@needs_vllm
@pytest.mark.parametrize("kind", ["local", "key", "open"])
def test_a_page_whose_name_is_rebound_to_this_machine_is_refused(model, kind):
    """Its browser counts it as the server's own, so the answer could be read. It names no origin in its GETs."""
    cases = {  # (origin, host): refused by a local server without a key
        (None, "evil.example:8000"): True,
        (None, "evil.example"): True,
        (None, "evil.internal.example"): True,
        (None, "localhost:8000"): False,
        (None, "[::1]:8000"): False,
        (None, "127.0.0.1"): False,
        (None, "host.docker.internal:8000"): False,
        (None, "x"): False,  # of a local network: no site has a name without a dot
        (None, "10.0.0.7:8000"): False,
        ("http://10.0.0.7.evil.example", "10.0.0.7.evil.example"): True,
        (None, "friend.example"): False,
        (None, "friend.example:81"): True,
        (None, ""): False,  # no browser, but a balancer's HTTP/1.0
        ("http://evil.example:8000", "evil.example:8000"): True,
        ("http://evil.example", "127.0.0.1.evil.example"): True,
        ("http://localhost:8000", "localhost:8000"): False,
        ("http://127.0.0.1:8000", "127.0.0.1:8000"): False,
        ("http://[::1]:8000", "[::1]:8000"): False,
        ("http://friend.example", "friend.example"): False,
    }
    flags = {"local": (), "key": ("--api-key", "secret"), "open": ("--host", "0.0.0.0")}[kind]

    async def check() -> None:
        import httpx

        flag = ("--allowed-origins", '["http://friend.example"]')
        async with (
            application(model[0], flags=(*flags, *flag)) as app,
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
        ):
            for (origin, host), refused in cases.items():
                headers = {"Host": host, **KEYS["right"]} | ({"Origin": origin} if origin else {})
                reply = await client.get("/v1/models", headers=headers)
                assert reply.status_code == (403 if refused and kind == "local" else 200), (origin, host)

    asyncio.run(check())


def arguments(host: str | None, *keys: str, uds: str | None = None) -> Any:
    return SimpleNamespace(host=host, api_key=list(keys) or None, uds=uds)


LOCAL = ["127.0.0.1", "127.8.8.8", "localhost", "::1"]
REACHABLE = ["0.0.0.0", "::", "10.0.0.5", "example.org", None, ""]


@pytest.mark.parametrize("host", LOCAL)
def test_this_machine_may_have_routes_of_development_and_no_key(host):
    assert check_exposure(arguments(host), False, {"VLLM_SERVER_DEV_MODE": "1"}) is None
    assert check_exposure(arguments(host), False, {}) is None


@pytest.mark.parametrize("host", REACHABLE)
def test_routes_of_development_are_refused_where_others_reach_them(host):
    with pytest.raises(
        UserError, match=f"VLLM_SERVER_DEV_MODE=1 with host={host or '0.0.0.0'}: .* host=127.0.0.1 alone"
    ):
        check_exposure(arguments(host, "secret"), False, {"VLLM_SERVER_DEV_MODE": "1"})
    for off in ({}, {"VLLM_SERVER_DEV_MODE": "0"}):
        assert check_exposure(arguments(host, "secret"), False, off) is None
    assert check_exposure(arguments(host, uds="/tmp/socket"), False, {"VLLM_SERVER_DEV_MODE": "1"}) is None


@pytest.mark.parametrize("host", REACHABLE)
def test_an_open_address_without_a_key_is_warned_of(host):
    line = check_exposure(arguments(host), False, {"VLLM_API_KEY": ""})
    assert line == (
        f"warning: host={host or '0.0.0.0'} without a key: everybody who reaches this machine may use the server; "
        "set VLLM_API_KEY"
    )
    assert check_exposure(arguments(host), False, {"VLLM_API_KEY": "secret"}) is None


def test_open_metrics_without_a_key_is_refused():
    with pytest.raises(UserError, match="open_metrics=true: without a key, /metrics is open already"):
        check_exposure(arguments("127.0.0.1"), True, {})
    assert check_exposure(arguments("127.0.0.1", "secret"), True, {}) is None


@needs_vllm
def test_the_server_warns_and_refuses_before_it_starts(model, monkeypatch):
    from loopwise.recipe import load_recipe
    from loopwise.serve.checkpoint import check_config
    from loopwise.serve.defaults import choose
    from loopwise.serve.recipe import ServeRecipe
    from loopwise.serve.vllm.launch import parse_arguments

    def lines(*flags: str) -> list[str]:
        recipe = load_recipe(ServeRecipe, "serve", "exact", ["host=0.0.0.0"])
        return parse_arguments(str(model[0]), choose(check_config(str(model[0])), recipe), recipe, list(flags))[2]

    assert lines()[0].startswith("warning: host=0.0.0.0 without a key")
    assert not lines("--host", "127.0.0.1")[0].startswith("warning")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    with pytest.raises(UserError, match=r"VLLM_SERVER_DEV_MODE=1 with host=0\.0\.0\.0"):
        lines()
