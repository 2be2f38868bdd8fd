"""vLLM's HTTP application as `loopwise serve` makes it, with an engine that answers every request at once.

All between HTTP and the engine's process is the server's own: arguments, routes, middleware, vLLM's checks of requests,
its detokenizer and replies. `AnsweringCore` stands in for the process and its queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from loopwise.recipe import load_recipe
from loopwise.serve.checkpoint import check_config
from loopwise.serve.defaults import choose
from loopwise.serve.recipe import ServeRecipe

TOKEN = 65


class AnsweringCore:
    """vLLM's client of an engine core. answers: cleared, requests and questions wait as at a hung engine.

    text: the tokens of its answers, cut at the request's `max_tokens`.   depth: of these tokens, in the outputs; None:
    outputs have no depths.
    """

    engine_ranks_managed = (0,)
    text: ClassVar[tuple[int, ...]] = (TOKEN, TOKEN)
    depth: ClassVar[int | None] = None

    def __init__(self, **_: Any):
        self.outputs: asyncio.Queue = asyncio.Queue()
        self.resources = SimpleNamespace(engine_dead=False, engine_manager=None)
        self.answers = asyncio.Event()
        self.answers.set()
        self.calls: list[str] = []

    async def get_output_async(self) -> Any:
        return await self.outputs.get()

    async def add_request_async(self, request: Any) -> None:
        """Answer with `text` in one output."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.outputs import LogprobsLists, LogprobsTensors

        await self.answers.wait()
        params = request.sampling_params
        tokens = list(self.text[: params.max_tokens])
        count = len(tokens)
        wide = (params.logprobs or len(params.logprob_token_ids or ())) + 1
        logprobs = LogprobsLists(
            np.full((count, wide), TOKEN), np.full((count, wide), -1.0), np.zeros(count, dtype=np.int64)
        )
        prompt = None
        if params.prompt_logprobs is not None:
            ids = torch.tensor(request.prompt_token_ids[1:], dtype=torch.int32)[:, None]
            prompt = LogprobsTensors(ids, -torch.ones(ids.shape), torch.ones(len(ids), dtype=torch.int32))
        output = EngineCoreOutput(
            request.request_id,
            tokens,
            new_prompt_logprobs_tensors=prompt,
            new_logprobs=None if params.logprobs is None and not params.logprob_token_ids else logprobs,
            finish_reason=FinishReason.LENGTH,
            routed_experts=None if self.depth is None else np.full((count, 3), self.depth, dtype=np.int32),
        )
        self.outputs.put_nowait(EngineCoreOutputs(outputs=[output]))

    async def _called(self, name: str, value: Any) -> Any:
        self.calls.append(name)
        await self.answers.wait()
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not name.endswith("_async"):
            raise AttributeError(name)
        values = {
            "get_supported_tasks_async": ("generate",),
            "is_scheduler_paused_async": False,
            "is_sleeping_async": False,
            "reset_prefix_cache_async": True,
            "collective_rpc_async": [{}],
        }
        return lambda *args, **kwargs: self._called(name, values.get(name))

    def shutdown(self, timeout: float | None = None) -> None:
        self.resources.engine_dead = True


@contextlib.asynccontextmanager
async def application(folder: Path, *settings: str, flags: tuple[str, ...] = ()) -> AsyncIterator[Any]:
    """The application of `loopwise serve FOLDER SETTINGS -- FLAGS`. Its `state.engine_client` is an AsyncLLM."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.renderers import hf
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.output_processor import RequestState

    from loopwise.serve.vllm import register
    from loopwise.serve.vllm.launch import parse_arguments

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (IncrementalDetokenizer, "from_new_request"),
            (RequestState, "_new_completion_output"),
            (hf, "safe_apply_chat_template"),
            (hf, "_try_extract_ast"),
            (hf, "_cached_resolve_chat_template_kwargs"),
            (hf, "_iter_nodes_assign_var_or_elems"),
        ):
            patch.setattr(owner, name, vars(owner)[name])  # as it was, at the end
        patch.setattr(EngineCoreClient, "make_async_mp_client", staticmethod(AnsweringCore))
        before = dict(os.environ)
        try:
            register()
            recipe = load_recipe(ServeRecipe, "serve", "exact", list(settings))
            defaults = choose(check_config(str(folder)), recipe)
            args, _, _ = parse_arguments(str(folder), defaults, recipe, ["--enforce-eager", *flags])
            engine: Any = AsyncLLM.from_vllm_config(AsyncEngineArgs.from_cli_args(args).create_engine_config())
            app = launcher.build_app(args, ("generate",), engine.model_config)
            await init_app_state(engine, app.state, args, ("generate",))
            app.state.server = SimpleNamespace(should_exit=False)
            yield app
            engine.output_handler.cancel()
        finally:
            os.environ.clear()
            os.environ.update(before)
