"""The outermost middleware: requests without the server's key, and bodies that are too large or too slow, end here."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..api.limits import HttpLimits
from .exposure import is_foreign
from .load import RETRY_AFTER, Bodies, ServerFull
from .page.routes import FILES

# Routes that need no key: those by which a balancer asks for the server's health, and the files of the page, whose
# requests have the user's key.
OPEN = frozenset(["/health", "/ping", "/version", "/depth", *(f"/depth/{name}" for name in FILES)])
METRICS = "/metrics"
BODIES = 16  # times `max_body_mib`: the bodies of all open requests, which are kept until the reply has ended
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # the router reads over a line break at the end, which our tables do not
MESSAGE = 1000  # characters of an error's message
LONG_WORD = re.compile(r"(\S{200})\S+")  # what a message repeats of a request
FOREIGN = (
    "a server of this machine alone and without a key answers no other host name, as pages of other sites may have it: "
    "set VLLM_API_KEY, or name its origin by --allowed-origins"
)
NO_KEY = "this server wants its key: Authorization: Bearer KEY"
NO_ROUTE = "no path of this server has a control character"


class Guard:
    """ASGI middleware. With `keys`, every path but those of OPEN needs one, also a path that leads nowhere.

    limits: of bodies; with `open_metrics`, /metrics needs no key.   origins: of pages that are answered, see
    `exposure.origins_of`.
    """

    def __init__(self, app: Callable, keys: Sequence[str], limits: HttpLimits, origins: list[str] | None = None):
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        self.app, self.limits, self.origins = app, limits, origins
        self.key = AuthenticationMiddleware(app, list(keys)) if keys else None
        self.open = OPEN | {METRICS} if limits.open_metrics else OPEN
        full = f"the bodies of open requests take {BODIES} x max_body_mib={limits.max_body_mib}: try later"
        self.bodies = Bodies(BODIES * limits.max_body_mib << 20, full)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        refusal = self._refusal(scope)
        if refusal and scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if refusal:
            return await refuse(*refusal, send)
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)
        with self.bodies.body() as grow:
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    whole = await self._whole(scope, receive, grow)
            except TimeoutError:
                seconds = self.limits.body_seconds
                message = f"the body did not arrive within body_seconds={seconds} of this server"
                return await refuse(408, "RequestTimeout", message, send, connection="close")
            except ServerFull as error:
                return await refuse(429, "TooManyRequests", str(error), send, retry_after=RETRY_AFTER)
            except ClientLeft:
                return None
            if whole is None:
                message = f"the body is larger than max_body_mib={self.limits.max_body_mib} of this server"
                return await refuse(413, "PayloadTooLarge", message, send)
            return await self.app(scope, whole, ShortErrors(send))

    async def _whole(self, scope: dict, receive: Callable, grow: Callable[[int], None]) -> Callable | None:
        """A `receive` that gives the whole body; None where it is too large. Raises ServerFull and ClientLeft."""
        most = self.limits.max_body_mib << 20
        if _length(scope) > most:
            return None
        body = await read_body(receive, most, grow)
        return None if body is None else replay(body, receive)

    def _refusal(self, scope: dict) -> tuple[int, str, str] | None:
        """Status, kind and message for a request that is refused by its head; None for all others."""
        if not self._allowed(scope):
            return 401, "AuthenticationError", NO_KEY
        headers = dict(scope["headers"])
        origin, host = (headers.get(name, b"").decode("latin-1") for name in (b"origin", b"host"))
        if is_foreign(origin, host, self.origins):
            return 403, "PermissionDeniedError", FOREIGN
        return (404, "NotFoundError", NO_ROUTE) if CONTROL.search(scope.get("path", "")) else None

    def _allowed(self, scope: dict) -> bool:
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        if self.key is None or route(scope) in self.open or self.key.verify_token(headers):
            return True
        # A browser asks without a key before it sends one to another site; the answer is CORSMiddleware's.
        return scope.get("method") == "OPTIONS" and {"origin", "access-control-request-method"} <= {*headers.keys()}


class ShortErrors:
    """Sends replies on, with the messages of errors cut to MESSAGE characters: some of vLLM's repeat a whole value."""

    def __init__(self, send: Callable):
        self.send = send
        self.start: dict[str, Any] | None = None
        self.body = bytearray()

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self.start = message
        elif self.start is None or message["type"] != "http.response.body":
            await self.send(message)
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_short(self.start, bytes(self.body))

    async def _send_short(self, start: dict[str, Any], body: bytes) -> None:
        if len(body) > MESSAGE:
            body = _short(body)
            headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            start = {**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})


def _short(body: bytes) -> bytes:
    """The JSON `body` of an error with all texts in it cut; other bodies as they are."""
    try:
        return json.dumps(_cut_all(json.loads(body))).encode()
    except ValueError:
        return body[:MESSAGE]


def _cut_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut_all(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cut_all(inner) for inner in value[:10]]
    return LONG_WORD.sub(r"\1...", value)[:MESSAGE] if isinstance(value, str) else value


def route(scope: dict) -> str:
    """The path that leads to a route, without `--root-path`, which a proxy may or may not have stripped."""
    path, root = scope.get("path", ""), scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(root + "/") else path


class ClientLeft(Exception):
    """A client has disconnected before its body was whole."""


def _length(scope: dict) -> int:
    """The length of a body that its headers name; 0 without one."""
    named = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(named) if named.isdigit() else 0


async def read_body(
    receive: Callable, most: int | None = None, grow: Callable[[int], None] | None = None
) -> bytes | None:
    """The whole body of a request; None where it has more than `most` bytes. Raises ClientLeft.

    grow: called with the length so far. The parts of a body may be single bytes, and millions: a bytearray grows by all
    of them in linear time.
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if most is not None and len(body) > most:
            return None
        if grow is not None:
            grow(len(body))
        more = message.get("more_body", False)
    return bytes(body)


def replay(body: bytes, receive: Callable) -> Callable:
    """A `receive` that returns `body`, which it forgets, then the messages of `receive`: the client's disconnect."""
    waiting = [body]

    async def replayed():
        return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

    return replayed


async def refuse(status: int, kind: str, message: str, send: Callable, field: str | None = None, **more: str) -> None:
    """Send an error object as vLLM does. more: headers, with _ for -."""
    error: dict[str, Any] = {"message": message, "type": kind, "param": field, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = {"content_type": "application/json", "content_length": str(len(body)), **more}
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
