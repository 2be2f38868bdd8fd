"""Graph ticks on the CPU: recorded as on a GPU, and compared with eager ticks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from loopwise.serve import Engine
from loopwise.serve.engine.costs import Costs
from loopwise.serve.engine.graphs import Record, on_cuda
from tests.helpers.engines import DAMPED, RELAXED

MODELS = {
    "huginn-like": {"recurrence_norm": "last", "state_init": "normal", "state_std": 0.5},
    "lora": {"relaxation": {**RELAXED, "own": [], "dora": False}, "recurrence_norm": "between"},
    "dora": {"relaxation": {**RELAXED, "own": [], "dora": True}, "recurrence_norm": "each"},
    "damped": DAMPED["1/R"],
}


def run_once(function: Callable[[], None]) -> Callable[[], Any]:
    """A recorder without a GPU: it runs `function` once, as CUDA graph capture does, and replays by a call."""
    function()
    return function


def recorder() -> Record:
    """The recorder of the GPU for tensors on one, else `run_once`."""
    device = torch.get_default_device()
    return on_cuda(device) if device.type == "cuda" else run_once


def runs_of(engine: Engine) -> Counter[tuple[str, int]]:
    """Runs of the graph ticks of `engine` from now on, also where no row is real: ("pass" or "read", rows) -> times.

    It must come before the first request, as what is recorded is seen no more.
    """
    tick, found = engine.loop.graph_tick, Counter[tuple[str, int]]()
    assert tick is not None
    assert not tick.replays

    def counting(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def run(every: torch.Tensor, *more: Any) -> None:
            found[name, len(every)] += bool(tick.graph.real.all())  # not while it is recorded
            function(every, *more)

        return run

    tick._pass, tick._read_out = counting("pass", tick._pass), counting("read", tick._read_out)
    return found


def compare_ticks(
    make: Callable[[], Any], prompts: list, params: Any, costs: Costs | None = None, **options: Any
) -> Engine:
    """Compare graph ticks with eager ticks: completions and the sum of lanes over all passes are equal.

    Returns the engine with graph ticks.
    """
    made = [
        Engine(make(), cuda_graphs=False, **{"max_num_seqs": 5, "max_model_len": 100, "passes_per_step": 7, **options})
        for _ in range(2)
    ]
    with torch.inference_mode():
        made[1]._record(recorder())
        made[1].loop.warm_up()
    for engine in made:
        engine.loop.schedule.costs = costs
    want, got = (engine.generate(prompts, params) for engine in made)
    assert got == want
    passes = [engine.loop.counts.passes for engine in made]
    assert sum(n * count for n, count in passes[0].items()) == sum(n * count for n, count in passes[1].items())
    assert made[1].loop.graph_tick is not None
    assert {kind for kind, *_ in made[1].loop.graph_tick.replays} == {"pass", "read"}
    return made[1]
