"""Routes of the page, for vLLM's application.

The page's files need no key (`guard.OPEN`); what the page asks does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...api.decoders import DECODERS
from ...api.depth import depth_of
from ..validation import served_limits

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

FOLDER = Path(__file__).parent
FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
HEADERS = {
    # The browser runs and loads what this server sends as a file, and nothing that a model's text could bring along.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page, its files, and the served model's settings. Addresses in the page are relative, for `--root-path`."""
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route

    def sender(name: str, kind: str):
        async def send(request: Request) -> Response:
            return FileResponse(FOLDER / name, media_type=kind, headers=HEADERS)

        return send

    async def settings(request: Request) -> Response:
        return JSONResponse(depth_settings(request.app.state.engine_client.vllm_config))

    files = [Route(f"/depth/{name}", sender(name, kind)) for name, kind in FILES.items()]
    return [Route("/depth", sender("page.html", "text/html")), *files, Route("/v1/depth", settings)]


def depth_settings(vllm_config: Any) -> dict[str, Any]:
    """The depth fields that requests to an engine with this VllmConfig may have, and their defaults.

    engine: lanes or fixed.   trained_recurrences: of training, null where it is not recorded.
    kv_policy: of all requests; null for a routed model, which has `router_kv` instead.
    exit_rules: by name, the threshold of a request that gives none; null for `fixed`.
    decoders: by name, why the model excludes it; null for those that it allows.
    """
    config = vllm_config.model_config.hf_config
    limits = served_limits(vllm_config)
    depth, exits = limits.num_recurrences, getattr(config, "exit", None)
    thresholds = {name: depth_of({"exit_rule": name}, depth, exits).threshold for name in limits.rules}
    excluded: dict[str, str] = dict(limits.unfit)
    policy = "per-depth" if limits.fixed else config.kv_policy  # the fixed engine has a cache of every recurrence
    if limits.fixed:
        excluded |= dict.fromkeys(DECODERS[1:], "engine=fixed has none")
    return {
        "engine": "fixed" if limits.fixed else "lanes",
        "num_recurrences": depth,
        "max_recurrences": depth if limits.fixed or limits.routed else limits.max_recurrences,
        "trained_recurrences": getattr(config, "trained_recurrences", None),
        "routed": limits.routed,
        "kv_policy": None if limits.routed else policy,
        "router_kv": config.router["kv"] if limits.routed else None,
        "exit_rules": {name: None if name == "fixed" else value for name, value in thresholds.items()},
        "exit_rule": limits.rule,
        "decoders": {name: excluded.get(name) for name in DECODERS},
        "decoder": limits.decoder,
        "max_in_flight": limits.max_in_flight,
    }
