"""Depth over HTTP: a request's fields are validated, and its reply gets recurrences and passes.

One ASGI middleware around vLLM's application, inside all others. It relies on the shape of OpenAI's requests and
replies, and on `vllm_xargs`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..api.fields import FIELDS, OLD_FIELDS, FieldError, parse_body, take_fields
from ..api.validation import validate_fields
from .guard import read_body, refuse, replay, route
from .load import RETRY_AFTER, Load, ServerFull, check_choices, choices_of, copied
from .requests import DEEPEST, check_fields, check_holdable, validate_beam_search, validate_body
from .routes import GENERATION, REFUSED, TOKENIZING
from .shutdown import Ending
from .slow_clients import close_stalled
from .validation import served_limits
from .watchdog import Watchdog
from .work import Work

CHUNKED = ("/v1/completions", "/v1/chat/completions", "/invocations")  # whose streams have choices in their chunks
HEALTH = ("/health", "/ping")
WORK: ContextVar[Work | None] = ContextVar("loopwise_work", default=None)


class DepthFields:
    """ASGI middleware that validates depth fields, and completes usage.

    metrics: updates the lane engine's counters before a scrape; None for the fixed engine.   ending: the server's.
    watchdog: notices a hanging engine.   load: the choices of open requests.
    """

    def __init__(self, app: Callable, metrics: Callable | None, ending: Ending, watchdog: Watchdog, load: Load):
        self.app, self.metrics, self.ending, self.watchdog, self.load = app, metrics, ending, watchdog, load
        self.closing: asyncio.Task | None = None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        path = route(scope)
        if scope["type"] == "lifespan":  # the application starts, with its engine
            state = scope["app"].state
            self.watchdog.start(state.engine_client, self.ending)
            self.closing = asyncio.create_task(close_stalled(state.server.server_state.connections))
        if self.watchdog.hung and path in HEALTH:
            return await refuse(503, "ServiceUnavailableError", "vLLM's engine hangs", send)
        if scope["type"] == "http" and path == "/metrics" and self.metrics:
            await self.metrics(scope["app"].state.engine_client)
        if scope["type"] == "http" and path in REFUSED:
            return await refuse(400, "BadRequestError", f"{path}: {REFUSED[path]}", send)
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if path in GENERATION and self.ending.requested and not self.ending.dead:
            # vLLM would send an empty reply with status 200.
            return await refuse(503, "ServiceUnavailableError", "the server is shutting down", send)
        body = await read_body(receive) or b""
        try:
            fields = _parse(body)
            work = _completed(path, fields, scope["app"])
            choices = choices_of(path, fields) if fields is not None and path in GENERATION else 0
            check_choices(choices, self.load.limits)
            copies = copied(fields or {}, choices, self.load.limits)
        except FieldError as error:
            return await refuse(400, "BadRequestError", str(error), send, error.field)
        if work is not None:
            body = json.dumps(fields).encode()
            scope, send = _with_length(scope, body), Reply(send, work)
        text = 0
        if path in TOKENIZING:
            choices, text = 1, len(body)
        token, receive = WORK.set(work), replay(body, receive)
        del body, fields  # which may be large, while the request may take minutes
        try:
            with (
                self.load.admitted(choices, max_num_seqs(scope["app"])),
                self.load.texts.body() as tokenized,
                self.load.copies.body() as held,
            ):
                tokenized(text)
                held(copies)
                await self.app(scope, receive, send)
        except ServerFull as error:
            await refuse(429, "TooManyRequests", str(error), send, retry_after=RETRY_AFTER)
        finally:
            WORK.reset(token)


def max_num_seqs(app: Any) -> int:
    """The sequences that the engine of `app` runs at once."""
    return app.state.engine_client.vllm_config.scheduler_config.max_num_seqs


def _parse(body: bytes) -> Any:
    """The JSON object of a `body`; None where it is none: vLLM's message about that follows. Raises FieldError for
    values that are nested too deeply."""
    try:
        fields = parse_body(body)
    except RecursionError:
        raise FieldError("", f"the body is nested too deeply: at most {DEEPEST} levels") from None
    except ValueError:
        return None
    if not isinstance(fields, dict):
        check_holdable("the body", fields)
        return None
    return fields


def _completed(path: str, fields: dict[str, Any] | None, app: Any) -> Work | None:
    """The Work of a request to `path` that generates; its depth fields are put into `vllm_xargs` of `fields`.

    None where the request goes on as it came. Raises FieldError for a field that is refused.
    """
    if fields is None:
        return None
    if path not in GENERATION:
        check_fields(fields)
        return None
    limits = served_limits(app.state.engine_client.vllm_config)
    validate_body(fields, _known(path))
    if not GENERATION[path]:
        _refuse_fields(path, fields)
        return None
    values = validate_fields(take_fields(fields, _known(path)), limits)
    validate_beam_search(fields, values)
    work = _work_of(path, fields, values, limits.num_recurrences if limits.fixed else None)
    if values:
        given = fields.get("vllm_xargs")
        if given is not None and not isinstance(given, dict):
            return None
        fields["vllm_xargs"] = {**(given or {}), **values}
    return work


class Reply:
    """Sends a reply on, with `work` added to the usage in it: of the whole reply, or of an event of a stream."""

    def __init__(self, send: Callable, work: Work):
        self.send, self.work = send, work
        self.start: dict[str, Any] | None = None
        self.streams = False
        self.whole = b""

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self.streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self.streams or message["status"] != 200:
                self.streams = True
                return await self.send(message)
            self.start = message
            return None
        if message["type"] != "http.response.body":
            return await self.send(message)
        part = message.get("body", b"")
        if self.streams:
            if self.work.in_chunks or b'"usage":{' in part:
                part = b"\n\n".join(self._event(event) for event in part.split(b"\n\n"))
            return await self.send({**message, "body": part})
        self.whole += part
        if message.get("more_body"):
            return None
        assert self.start is not None, "a body before its head"
        body = self._with_usage(self.whole)
        headers = [(n, v) for n, v in self.start["headers"] if n.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.send({**self.start, "headers": headers})
        return await self.send({**message, "body": body})

    def _event(self, event: bytes) -> bytes:
        prefix = b"data: "
        if not event.startswith(prefix + b"{"):
            return event
        return prefix + self._with_usage(event.removeprefix(prefix))

    def _with_usage(self, text: bytes) -> bytes:
        """The JSON `text` of a reply or chunk, with recurrences in its usage, and in its choices where asked for."""
        reply = json.loads(text)
        if not isinstance(reply, dict):
            return text
        if self.streams and self.work.in_chunks:
            self.work.add_to_chunk(reply)
        usage = reply.get("usage")  # null where the client has disconnected
        if isinstance(usage, dict):
            tokens = usage.get("completion_tokens", usage.get("output_tokens"))
            usage.update(self.work.usage(tokens or 0) or {})
        return json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()


def _work_of(path: str, fields: dict[str, Any], values: dict[str, Any], fixed: int | None) -> Work:
    """The Work of a request with the depth fields `values`, and all others, `fields`.

    Where chunks of a stream get depths, vLLM is asked for token ids, too: they tell which tokens a chunk has.
    """
    asked, with_ids = bool(values.get("return_recurrences")), bool(fields.get("return_token_ids"))
    chat = "messages" in fields
    # vLLM leaves the text of a prompt that it echoes out where a completion has token ids.
    echoes = bool(fields.get("echo")) and not chat and not with_ids
    in_chunks = asked and bool(fields.get("stream")) and path in CHUNKED and not echoes
    if in_chunks:
        fields["return_token_ids"] = True
    return Work(fixed, asked, in_chunks, remove_ids=not with_ids)


def _refuse_fields(path: str, fields: dict[str, Any]) -> None:
    """Raises FieldError for a depth field in a body of route `path`, which has none."""
    if name := next((name for name in (*FIELDS, *OLD_FIELDS) if fields.get(name) is not None), None):
        those = ", ".join(path for path, kinds in GENERATION.items() if kinds)
        raise FieldError(name, f"{name}: {path} has no depth fields, and uses the server's defaults; use {those}")


def _known(path: str) -> set[str]:
    """The fields that vLLM reads in a body of route `path`."""
    from importlib import import_module

    return {field for module, name in GENERATION[path] for field in getattr(import_module(module), name).model_fields}


def _with_length(scope: dict, body: bytes) -> dict:
    """`scope` with the length of `body` in its headers."""
    headers = [(n, v) for n, v in scope["headers"] if n.lower() not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
