"""The endpoint plugin: what `loopwise serve` adds to vLLM's HTTP server, also where `vllm serve` starts it.

vLLM loads it where VLLM_PLUGINS names it. `loopwise serve` sets that variable.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any, ClassVar

from starlette.middleware import Middleware

from ...model import RecurrentDepthConfig
from ...process import is_server
from ..api.lanes import is_lanes
from .announce import say
from .configure import NAME, Hook, http_limits
from .exposure import check_exposure, keys_of, origins_of
from .guard import Guard
from .http import WORK, DepthFields
from .load import Load
from .metrics import DepthMetrics
from .page.routes import page_routes
from .shutdown import GRACE, Ending
from .templates import Templates, follow, render_elsewhere
from .trusted import without_model_script
from .validation import validate_request
from .watchdog import Watchdog
from .work import Work, note_tokens


class Endpoint:
    """One server's plugin, by vLLM's protocol `EndpointPlugin`. ending: the state of the server's end.

    latest: the one of this process's server.
    """

    name = NAME
    required_tasks = ("generate",)
    latest: ClassVar[Endpoint | None] = None

    def __init__(self):
        self.ending = Ending()
        Endpoint.latest = self

    def attach_router(self, app: Any) -> None:
        """Keep `app`, which vLLM is building. All else waits for the engine's client, which knows the model."""
        self.ending.app = app
        if Hook.called:
            without_model_script()
            render_elsewhere(Templates())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Add middlewares, page and metrics to the application, and follow its engine. Nothing for other models.

        `generate` validates the requests of all routes before a stream starts, and collects their work; `shutdown`
        drains, then ends open streams. Both are replaced in `engine_client`, an AsyncLLM, alone. vLLM's own
        `--middleware` would run outside of its authentication, and has no access to the engine's outputs. Raises
        UserError as `check_exposure` does.
        """
        config = engine_client.vllm_config
        if not isinstance(config.model_config.hf_config, RecurrentDepthConfig):
            return
        limits, app = http_limits(config), self.ending.app
        line = check_exposure(args, limits.open_metrics, os.environ)
        if line and not is_server():  # `loopwise serve` has printed it before
            say(line)
        metrics = DepthMetrics(config.model_config.served_model_name).update if is_lanes(config) else None
        fields: Any = Middleware(
            DepthFields, metrics=metrics, ending=self.ending, watchdog=Watchdog(limits.hang_seconds), load=Load(limits)
        )
        app.user_middleware.append(fields)  # the innermost
        keys, origins = keys_of(args, os.environ), origins_of(args, os.environ)
        guard: Any = Middleware(Guard, keys=keys, limits=limits, origins=origins)
        app.user_middleware.insert(0, guard)  # the outermost
        app.middleware_stack = None  # SageMaker's part of vLLM has built one; the first request builds it anew
        app.router.routes.extend(page_routes())
        note_tokens()
        follow(engine_client.renderer)
        follow_requests(engine_client)
        isolate_text(engine_client)
        end_streams(engine_client, self.ending)


def follow_requests(engine: Any) -> None:
    """Have `engine`, an AsyncLLM, validate every request, and collect its work."""
    generate = engine.generate

    def followed(prompt, sampling_params, request_id, **kwargs):
        validate_request(sampling_params, engine.vllm_config, prompt)
        work = WORK.get() or Work(None, False)  # removes the field that carries it from every reply
        stream = generate(prompt, sampling_params, request_id, **kwargs)
        return work.follow(stream, getattr(sampling_params, "n", 1) or 1)

    engine.generate = followed


def isolate_text(engine: Any) -> None:
    """Have an exception in the making of one request's text end that request alone: `engine`, an AsyncLLM, would die.

    Outputs are processed one by one. `generate` raises what is put into its queue, and aborts its request.
    """
    from vllm.v1.engine.exceptions import EngineGenerateError
    from vllm.v1.engine.output_processor import OutputProcessorOutput

    from .output import print_fault

    processor = engine.output_processor
    process = processor.process_outputs

    def isolated(outputs, *args, **kwargs):
        aborted: list[str] = []
        for output in outputs:
            state = processor.request_states.get(output.request_id)
            try:
                aborted += process([output], *args, **kwargs).reqs_to_abort
            except Exception as error:
                if state is None:  # no request is known to be at fault
                    raise
                print_fault(output.request_id, error)
                state.queue.put(EngineGenerateError())
                state.make_request_output = lambda *args, **kwargs: None  # its abort would make one, and might raise
        return OutputProcessorOutput([], aborted)  # outputs are in the queues of their requests

    processor.process_outputs = isolated


def end_streams(engine: Any, ending: Ending) -> None:
    """Have the end of `engine`, an AsyncLLM, end open streams, and be known to `ending`."""
    from vllm.v1.engine.exceptions import EngineDeadError

    shutdown = engine.shutdown

    def ended(timeout=None):
        handler = getattr(engine, "output_handler", None)
        loop = None if handler is None or handler.get_loop().is_closed() else handler.get_loop()
        if not ending.requested:
            if loop is not None:
                loop.call_soon_threadsafe(ending.listen, engine, loop, timeout)
            ending.dead = engine.errored
            ending.requested = True
        shutdown(timeout and timeout + 2 * GRACE)  # vLLM kills the engine after our own abort
        if loop is not None and not loop.is_closed():
            # The handler may have been cancelled before it noticed the engine's end. Open streams would then wait for
            # ever, and the HTTP server for them.
            loop.call_soon_threadsafe(engine.output_processor.propagate_error, EngineDeadError())

    engine.shutdown = ended
