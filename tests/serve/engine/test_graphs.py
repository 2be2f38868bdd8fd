"""Passes padded to fixed sizes and replayed from static tensors, on the CPU: CUDA graphs without CUDA."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.serve import Engine, Params
from loopwise.serve.engine.attention.base import Rows
from loopwise.serve.engine.diffusion_settings import DiffusionSettings
from loopwise.serve.engine.graphs import TRIES, Graphs, padded
from tests.helpers.engines import RELAXED, ROUTERS, build, build_routed, requests
from tests.helpers.graph_ticks import MODELS, recorder
from tests.helpers.tiny import VOCAB


def random_numbers(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def engine(model: Any, most: int | None, **options: Any) -> Engine:
    """An engine with graphs of up to `most` rows, or without graphs for None. Its caches hold random values."""
    made = Engine(model, max_num_seqs=5, max_model_len=100, passes_per_step=3, cuda_graphs=False, **options)
    with torch.inference_mode():
        generator = random_numbers(0)
        for cache in caches(made):
            cache.normal_(generator=generator)
        if most is not None:
            made.loop.use_graphs(recorder(), most, ticks=False)
    return made


def caches(of: Engine) -> list[torch.Tensor]:
    return [cache for layer in of.loop.forward.attention.caches for cache in layer]  # pyright: ignore[reportAttributeAccessIssue]


def compare(
    make: Callable[[], Any], prompts: list, params: Any, most: int = 256, wide: bool = True, **options: Any
) -> Engine:
    """Completions are the same with graphs and without. Caches are the same, bit for bit where nothing was written.

    Returns the engine with graphs.
    """
    plain, ours = engine(make(), None, **options), engine(make(), most, **options)
    blank = [cache.clone() for cache in caches(plain)]
    want, got = plain.generate(prompts, params), ours.generate(prompts, params)
    assert got == want
    written = 0
    for before, a, b in zip(blank, caches(plain), caches(ours), strict=True):
        untouched = (a == before).flatten(2).all(-1)
        assert torch.equal(b[untouched], before[untouched])
        torch.testing.assert_close(b, a, atol=2e-4, rtol=2e-4)
        written += int((~untouched).sum())
    assert written
    passes = ours.loop.counts.passes
    assert passes == plain.loop.counts.passes
    assert ours.loop.eager_tick.passes.graphs is not None
    if wide:
        assert {size for size, _ in ours.loop.eager_tick.passes.graphs.replays} == {
            padded(n) for n in passes if n <= most
        }
    assert any(padded(n) > n for n in passes if n <= most)
    return ours


POLICIES = ("per-depth", "last-exited", "single", "first", "modulo-2")


def cases() -> list[Any]:
    """Every kind under every policy; fast is one kind a policy."""
    return [
        pytest.param(policy, kind, marks=[] if (place - number) % 4 == 0 else pytest.mark.slow)
        for number, policy in enumerate(POLICIES)
        for place, kind in enumerate(MODELS)
    ]


@pytest.mark.parametrize(("policy", "kind"), cases())
def test_policies_and_exit_rules(policy, kind):
    prompts, params = requests(21, 10, policy, ["fixed", "latent-diff", "cosine", "kl"])
    done = compare(lambda: build(**MODELS[kind]), prompts, params, wide=kind == "huginn-like", kv_policy=policy)
    graphs = done.loop.eager_tick.passes.graphs
    assert graphs is not None
    assert len({size for size, _ in graphs.replays}) > 3
    assert {alone for _, alone in graphs.replays} == {False, True}
    assert all(getattr(plan, "rows", plan).alone == alone for (_, alone), plan in graphs.plans.items())


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_waves_and_diffusion_beside_plain_requests(policy):
    model = lambda: build(**MODELS["lora"])  # noqa: E731
    prompts, params = requests(22, 9, policy, ["fixed", "latent-diff"])
    params = [replace(p, max_tokens=9) for p in params]
    for n in range(0, 9, 3):
        params[n] = replace(params[n], decoder="wave", max_in_flight=5)
        params[n + 1] = Params(
            9, 4, ignore_eos=True, decoder="diffusion", diffusion=DiffusionSettings(inner=2, threshold=0.5)
        )
    compare(model, prompts, params, wide=False, kv_policy=policy, max_in_flight=6, max_lanes=13)


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_routed_models(kind):
    draw = random.Random(23)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 4, 9)))] for _ in range(7)]
    compare(lambda: build_routed(kind), prompts, Params(10, ignore_eos=True), max_num_batched_tokens=20)


def test_passes_beyond_the_most_run_without():
    prompts, params = requests(24, 8, "last-exited", ["fixed", "latent-diff"])
    done = compare(build, prompts, params, most=16, kv_policy="last-exited")
    assert max(done.loop.counts.passes) > 16


def test_sizes():
    want = {
        1: 1,
        2: 2,
        3: 4,
        4: 4,
        5: 8,
        8: 8,
        9: 16,
        16: 16,
        17: 24,
        57: 64,
        64: 64,
        65: 96,
        96: 96,
        97: 128,
        256: 256,
    }
    assert {n: padded(n) for n in want} == want


def call(graphs: Graphs, n: int, write: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """Run a pass of `n` rows, at positions 3, 4, ... of all requests."""
    generator = random_numbers(seed)
    s, e = torch.randn(2, n, graphs.s.shape[1], generator=generator)
    at = torch.arange(n)
    request, position, depth = at % 5, at // 5 + 3, at % 3
    order = (request * 4 + depth).argsort(stable=True)
    request, position, depth = request[order], position[order], depth[order]
    rows = Rows(graphs.forward.block_table, request, position, depth, write)
    plan, out = graphs(rows, s, e, position, depth > 0, torch.full_like(depth, 3), depth)
    assert not plan.rows.position[n:].any(), "what nobody asked for reads one key"
    graphs.forward.attention.fill(plan, (depth == 1).long(), int((depth == 1).sum()))
    return out


@torch.inference_mode()
def test_an_earlier_and_larger_pass_changes_nothing():
    used, fresh = (engine(build(), 256, kv_policy="last-exited") for _ in range(2))
    used_graphs, fresh_graphs = (made.loop.eager_tick.passes.graphs for made in (used, fresh))
    assert used_graphs is not None
    assert fresh_graphs is not None
    first = call(used_graphs, 16, seed=1)
    kept = first.clone()
    for ours, theirs in zip(caches(used), caches(fresh), strict=True):
        theirs.copy_(ours)
    before = [cache.clone() for cache in caches(used)]
    for n, write in ((11, None), (9, torch.arange(9) % 2 == 0), (3, None), (1, None)):
        assert torch.equal(call(used_graphs, n, write), call(fresh_graphs, n, write))
        assert all(torch.equal(a, b) for a, b in zip(caches(used), caches(fresh), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(caches(used), before, strict=True))
    assert torch.equal(first, kept), "a result is not overwritten by later passes"
    assert list(used_graphs.replays) == [(16, False), (4, False), (1, False)]


@torch.inference_mode()
def test_rows_that_pad_write_nothing():
    """No slot changes in a pass whose real rows do not write."""
    made = engine(build(), 256, kv_policy="last-exited")
    graphs = made.loop.eager_tick.passes.graphs
    assert graphs is not None
    before = [cache.clone() for cache in caches(made)]
    at = torch.tensor([4, 0, 2])
    for _ in range(2):
        s, e = torch.randn(2, 3, graphs.s.shape[1])
        graphs(Rows(made.loop.forward.block_table, at, at, at * 0, at < 0, True), s, e, at, at > 0, at + 1, at * 0)
    assert all(torch.equal(a, b) for a, b in zip(caches(made), before, strict=True))


def test_a_pass_that_cannot_be_recorded_runs_without():
    def refuse(function: Callable[[], None]) -> Callable[[], Any]:
        function()
        raise RuntimeError("it waits")

    prompts, params = requests(25, 6, "single", ["fixed", "latent-diff"])
    made = engine(build(), None, kv_policy="single")
    with torch.inference_mode():
        made.loop.use_graphs(refuse, ticks=False)
    graphs = made.loop.eager_tick.passes.graphs
    assert graphs is not None
    with pytest.warns(
        UserWarning, match="CUDA graph capture failed at .* lanes; such passes run without a graph: it waits"
    ) as warned:
        got = made.generate(prompts, params)
    assert len(warned) == len(graphs.replays) == TRIES
    assert got == engine(build(), None, kv_policy="single").generate(prompts, params)


def test_parameters_per_depth_are_not_for_graphs():
    made = engine(build(relaxation={**RELAXED, "dora": False}), 256)
    made.generate([[5, 6, 7]], Params(3, 4, ignore_eos=True))
    assert made.loop.eager_tick.passes.graphs is not None
    assert not made.loop.eager_tick.passes.graphs.replays
