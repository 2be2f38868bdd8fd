"""Who can reach the server, and who may ask it: checked before it starts. Imports nothing heavy."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from ...errors import UserError

KEY = "VLLM_API_KEY"
DEV_MODE = "VLLM_SERVER_DEV_MODE"
PRIVATE = (".localhost", ".internal")  # ends of names that no site can have, as host.docker.internal


def keys_of(args: Any, environment: Mapping[str, str]) -> list[str]:
    """The keys that requests may have: those of `--api-key` in vLLM's `args`, otherwise VLLM_API_KEY."""
    return [key for key in (args.api_key or [environment.get(KEY)]) if key]


def check_exposure(args: Any, open_metrics: bool, environment: Mapping[str, str]) -> str | None:
    """A warning where everybody who reaches the server may use it; None where it has a key, or is local.

    args: vLLM's.   open_metrics: the recipe's. Raises UserError for routes of development on an address that other
    machines reach, and for an `open_metrics` that opens nothing.
    """
    keys = keys_of(args, environment)
    if open_metrics and not keys:
        raise UserError(f"open_metrics=true: without a key, /metrics is open already; set {KEY}, or leave it out")
    if args.uds or is_loopback(args.host):
        return None
    host = args.host or "0.0.0.0"  # vLLM's default
    if environment.get(DEV_MODE, "0") not in ("", "0"):
        raise UserError(
            f"{DEV_MODE}={environment[DEV_MODE]} with host={host}: its routes control the engine; serve them on "
            "host=127.0.0.1 alone"
        )
    if keys:
        return None
    return f"warning: host={host} without a key: everybody who reaches this machine may use the server; set {KEY}"


def is_loopback(host: str | None) -> bool:
    """True for an address of this machine alone. None, and names other than localhost, count as reachable."""
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_loopback
    except ValueError:
        return host == "localhost"


def origins_of(args: Any, environment: Mapping[str, str]) -> list[str] | None:
    """The origins of pages that a server of this machine alone and without a key answers, beside its own page.

    None: any, as the server has a key, or others reach it anyway, or no browser does (a Unix socket). args: vLLM's.
    """
    local = is_loopback(args.host) and not args.uds and not keys_of(args, environment)
    return args.allowed_origins if local else None


def is_foreign(origin: str, host: str, origins: list[str] | None) -> bool:
    """True for a request that may come from a page of another site, whose name is rebound to this machine's address.

    A browser then counts page and server as one site, and names no origin in its GETs: the name that it asked, `host`,
    decides. Each is "" where the request names none.   origins: from `origins_of`.
    """
    if origins is None or not host or {"*", origin} & {*origins} or host in (urlsplit(one).netloc for one in origins):
        return False
    name = (host.rpartition(":")[0] if re.search(r":\d*$", host) else host).strip("[]").lower().removesuffix(".")
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return False  # a page of that address is the server's own
    return "." in name and not name.endswith(PRIVATE)
