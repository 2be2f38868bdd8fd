"""The books of requests beside the engine's loop: what a step writes grows with what is new in it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loopwise.serve import Engine
from loopwise.serve.api.lanes import LaneConfig
from loopwise.serve.engine.request import Request
from tests.helpers.engines import build

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def steps_of(split: int = 1) -> Any:
    """Steps of a loop for 3 requests of 127 positions, whose sampler does nothing."""
    from loopwise.serve.vllm.steps import LaneSteps

    loop = Engine(build(), max_num_seqs=3, max_model_len=127).loop
    sampler: Any = SimpleNamespace(release=lambda row: None)
    return LaneSteps(loop, sampler, SimpleNamespace(), build().config, LaneConfig(), split)  # pyright: ignore[reportArgumentType]


def held(name: str, row: int | None = None, prompt: list[int] | None = None, **fields: Any) -> Any:
    from vllm import SamplingParams

    from loopwise.serve.vllm.held import Held

    return Held(name, SamplingParams(**fields), prompt or [5, 6], row=row)


@pytest.mark.parametrize("split", [1, 2])
@torch.inference_mode()
def test_a_step_writes_new_blocks_alone(split):
    steps, sent = steps_of(split), []
    write, table = steps.loop.set_block_tables, steps.loop.state.requests.block_table
    steps.loop.set_block_tables = lambda *of: (sent.append(of[-1].numel()), write(*of))
    first, second = held("a", 2), held("b", 0)
    first.blocks = [7, 3]
    table[2] = 99  # of an earlier request
    steps._set_block_tables([first, second])
    blocks = [block * split + part for block in (7, 3) for part in range(split)]
    assert table[2].tolist() == blocks + [0] * (8 - 2 * split)
    first.blocks.append(1)
    second.blocks = [2]
    steps._set_block_tables([first, second])
    blocks += [split + part for part in range(split)]
    assert table[2].tolist() == blocks + [0] * (8 - 3 * split)
    assert table[0].tolist() == [2 * split + part for part in range(split)] + [0] * (8 - split)
    steps._set_block_tables([first, second])
    first.blocks, first.in_table = [4], 0  # preempted, and resumed
    steps._set_block_tables([first])
    assert table[2].tolist() == [4 * split + part for part in range(split)] + [0] * (8 - split)
    assert sent == [8, 8 + split, 8]


def test_a_preempted_request_alone_has_a_past(monkeypatch):
    from loopwise.serve.vllm import steps as module

    steps, made = steps_of(), []
    steps.free = [2]
    monkeypatch.setattr(module, "Past", lambda *of: made.append(of))
    steps.held = {name: held(name, row) for row, name in enumerate(("finished", "preempted"))}
    preempted = steps.held["preempted"]
    with torch.inference_mode():
        for row in range(2):
            steps.loop.admit(row, Request(4, forced_depths=[3, 2]), passes=9, lane_passes=11)
    known = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    gone = {"finished_req_ids": {"finished"}, "preempted_req_ids": {"preempted"}, "total_num_scheduled_tokens": 0}
    steps.execute(SimpleNamespace(**gone, scheduled_new_reqs=[], scheduled_cached_reqs=known))
    ((trace, passes, lanes),) = made
    assert (trace[:3], len(trace), passes, lanes) == ([3, 2, 0], 128, 9, 11)
    assert (list(steps.held.values()), preempted.row, sorted(steps.free)) == ([preempted], None, [0, 1, 2])


def test_a_prompt_becomes_a_tensor_once(monkeypatch):
    """However often the requests of a call change, which penalties make vLLM's sampler look at."""
    from vllm.v1.sample.logits_processor import LogitsProcessors

    from loopwise.serve.vllm.metadata import metadata_of

    requests = [held(str(n), prompt=[5 + n, 6, 7][: n + 1], presence_penalty=0.5) for n in range(3)]
    made, tensor = [], torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda values, *of, **more: (made.append(values), tensor(values, *of, **more))[1]
    )
    for some in (requests, requests[1:], requests[:2]):
        found = metadata_of(some, 50, LogitsProcessors(), torch.device("cpu"))
        most = max(len(one.prompt) for one in some)
        assert found.prompt_token_ids is not None
        assert found.prompt_token_ids.tolist() == [one.prompt + [50] * (most - len(one.prompt)) for one in some]
    assert [values for values in made if values in [one.prompt for one in requests]] == [one.prompt for one in requests]
