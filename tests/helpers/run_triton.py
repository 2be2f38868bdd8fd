"""The Triton kernels equal TorchAttention, on CPU tensors. test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from triton.runtime.interpreter import interpreter_builder

from loopwise.serve import Engine, offline
from loopwise.serve.engine.attention import triton as triton_attention
from loopwise.serve.engine.attention.base import Rows
from loopwise.serve.engine.attention.reference import TorchAttention
from loopwise.serve.engine.attention.triton import Rotary, TritonAttention
from tests.helpers.engines import RELAXED, build, requests

SLOTS, OUTER = 3, 1


class Pair:
    """Both backends with the same random caches: one layer outside the core, three in it, of two shapes."""

    def __init__(
        self, shape: tuple[int, int], size: int, width: int, count: int = 3, dtype: torch.dtype = torch.float32
    ):
        """Each of `count` requests has `width` blocks of `size` positions."""
        torch.manual_seed(0)
        self.shapes, self.dtype = [shape, shape, (1, 16), shape], dtype
        arguments = (self.shapes, OUTER, SLOTS, count * width + 2, size)
        self.want = TorchAttention(*arguments, torch.zeros(1))
        self.got = TritonAttention(*arguments, torch.zeros(1, dtype=dtype))
        for ours, theirs in zip(self.got.caches, self.want.caches, strict=True):
            for cache, other in zip(ours, theirs, strict=True):
                other.copy_(cache.copy_(torch.randn_like(other)))
        self.table = torch.randperm(count * width + 2, dtype=torch.int32)[: count * width].view(count, width)

    def rows(self, runs: list[tuple[int, int, int, int]], **facts: Any) -> Rows:
        """Rows of the runs (request, slot, first position, number of rows)."""
        table = [(request, slot, first + n) for request, slot, first, count in runs for n in range(count)]
        request, slot, position = torch.tensor(table).unbind(1)
        return Rows(self.table, request, position, slot, **facts)

    def check(self, rows: Rows, groups: int, tolerance: float = 1e-5, **facts: Any) -> None:
        """Outputs are equal within the tolerance: two layers, or all layers and a fill. Caches are equal bit for bit;
        within the tolerance where keys are rotated."""
        rotary = facts.pop("rotary", None)
        plans = self.want.plan(rows), self.got.plan(rows)
        n = len(rows.request)
        for layer in range(OUTER, len(self.shapes)) if rows.fills else (1, 2):
            heads, size = self.shapes[layer]
            q, k, v = (torch.randn(h, n, size).to(self.dtype).transpose(0, 1) for h in (heads * groups, heads, heads))
            more = {**facts, "scaling": 0.3, "sinks": torch.randn(heads * groups) if "sinks" in facts else None}
            turned = rotated(rotary, rows.position, q.float(), k.float()) if rotary else (q, k)
            queries, new = (t.to(self.dtype).float() for t in turned)
            want = self.want(layer, queries, new, v.float(), **more)
            got = self.got(layer, q, k, v, **more, rotary=rotary)
            assert got.dtype == self.dtype
            torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)
        self.same(tolerance if rotary else 0)
        if rows.fills:  # of rows at the least slot of their position; the slots above other rows are in use
            key = (rows.request * 10**6 + rows.position) * SLOTS + rows.slot
            least = torch.stack([~((key // SLOTS == one // SLOTS) & (key < one)).any() for one in key])
            some = least & (torch.rand(len(key)) < 0.8)
            empty = torch.randint(0, SLOTS, (len(key),)).minimum(SLOTS - 1 - rows.slot) * some
            assert len(set(empty.tolist())) > 1
            self.want.fill(plans[0], empty, int(empty.sum()))
            self.got.fill(plans[1], empty, int(empty.sum()))
            self.same(tolerance if rotary else 0)

    def same(self, tolerance: float = 0.0) -> None:
        for ours, theirs in zip(self.got.caches, self.want.caches, strict=True):
            for cache, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(cache.float(), other, atol=tolerance, rtol=tolerance)


def rotated(rotary: Rotary, position: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q [N, H, C], k [N, K, C] rotated by the code of transformers."""
    size = rotary.cosines.shape[1]
    tables = rotary.cosines[position].chunk(2, -1)  # [N, size / 2] each
    if rotary.halves:
        turn, tables = modeling_llama.apply_rotary_pos_emb, [torch.cat([t, t], -1) for t in tables]
    else:
        turn, tables = modeling_cohere.apply_rotary_pos_emb, [t.repeat_interleave(2, -1) for t in tables]
    turned = turn(q[..., :size], k[..., :size], *tables, unsqueeze_dim=1)
    return tuple(torch.cat([new, old[..., size:]], -1) for new, old in zip(turned, (q, k), strict=True))


# Neighbors that differ by slot alone, by request, or by a gap of positions; positions at two depths; a table's end.
MIXED = [(0, 0, 5, 30), (0, 1, 7, 1), (0, 1, 9, 4), (1, 2, 0, 3), (1, 1, 3, 2), (2, 1, 5, 2), (2, 0, 58, 2)]
FEW = [(0, 0, 5, 9), (0, 1, 7, 1), (1, 2, 0, 2), (1, 1, 2, 2), (2, 1, 4, 1), (2, 1, 58, 2)]
FACTS = {
    "plain": {},
    "cap": {"softcap": 2.0, "sinks": True},
    "all": {"sliding_window": 7, "softcap": 3.0, "sinks": True},
}


@pytest.fixture(params=["forwards", pytest.param("backwards", marks=pytest.mark.slow)])
def programs(request, monkeypatch):
    """Programs run in either order; results must not depend on it."""
    builder = interpreter_builder
    plain = builder.set_grid_idx

    def from_the_end(*at: int) -> None:
        plain(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))

    if request.param == "backwards":
        monkeypatch.setattr(builder, "set_grid_idx", from_the_end)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("facts", list(FACTS))
def test_runs_at_mixed_depths(facts):
    pair = Pair((1, 24), size=4, width=15)
    pair.check(pair.rows(MIXED, fills=True), 3, **FACTS[facts])


@pytest.mark.parametrize(("heads", "groups", "size", "block"), [(2, 1, 16, 16), (1, 7, 20, 3)])
def test_heads_and_blocks_of_odd_sizes_and_rows_in_any_order(heads, groups, size, block):
    pair = Pair((heads, size), size=block, width=-(-60 // block))
    rows = pair.rows(FEW)
    order = torch.randperm(len(rows.request))
    shuffled = replace(rows, request=rows.request[order], position=rows.position[order], slot=rows.slot[order])
    pair.check(shuffled, groups, sliding_window=1)


@pytest.mark.parametrize("alone", [False, True])
def test_rows_that_do_not_write(alone):
    pair = Pair((2, 24), size=4, width=15)
    rows = pair.rows([(1, 0, 12, 1), (0, 2, 40, 1), (2, 1, 3, 1)] if alone else FEW, alone=alone)
    some = torch.arange(len(rows.request)) % 3 == 1
    pair.check(replace(rows, write=some), 2)
    pair.check(replace(rows, write=some & ~some), 2)


@pytest.mark.parametrize("facts", [{}, {"sliding_window": 300, "softcap": 2.0, "sinks": True}])
def test_a_context_in_splits(facts):
    """Rows end in each of three splits, and at a border. Windows begin in the second split."""
    pair = Pair((1, 24), size=16, width=70, count=5)
    runs = [(0, 0, 0, 1), (1, 2, 511, 1), (2, 1, 512, 1), (3, 1, 900, 1), (4, 0, 1119, 1)]
    pair.check(pair.rows(runs, alone=True, fills=True), 2, **facts)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize(("alone", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_queries_and_keys_are_rotated(halves, alone, dtype):
    """A part of each head is rotated, by tables in the type of the model."""
    pair = Pair((2, 24), size=4, width=15, dtype=dtype)
    rows = pair.rows([(1, 0, 12, 1), (0, 2, 40, 1), (2, 1, 0, 1)] if alone else FEW, alone=alone, fills=True)
    angles = torch.rand(60, 6) * 6
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], -1).to(dtype), halves)
    pair.check(rows, 3, 1e-5 if dtype == torch.float32 else 2**-9, rotary=rotary, sliding_window=9)


@pytest.mark.parametrize("alone", [False, True])
def test_half_precision_rounds_weights_and_outputs_alone(alone):
    """The test leaves out bfloat16: the interpreter multiplies bfloat16 matrices as integers."""
    pair = Pair((1, 24), size=16, width=36, dtype=torch.float16)
    rows = pair.rows([(0, 0, 560, 1), (1, 2, 30, 1), (2, 0, 7, 1)] if alone else FEW, alone=alone)
    pair.check(rows, 2, 2**-10, softcap=20.0, sinks=True)


@pytest.mark.parametrize(
    ("model_type", "policy", "decoder"),
    [
        ("gpt_oss", "last-exited", "plain"),
        pytest.param("gemma2", "per-depth", "wave", marks=pytest.mark.slow),
        pytest.param("gpt2", "first", "plain", marks=pytest.mark.slow),
    ],
)
def test_the_engine_generates_the_same_tokens(model_type, policy, decoder, monkeypatch):
    """Models with windows, sinks or softcap; rows exit early, and a request has several lanes."""
    prompts, params = requests(14, 4, policy, ["fixed", "latent-diff"], depth=3)
    params = [replace(p, max_tokens=min(p.max_tokens, 3), decoder=decoder, max_in_flight=2) for p in params]
    answers = []
    for backend in (TorchAttention, TritonAttention):
        monkeypatch.setattr(offline, "attention_for", lambda device, backend=backend: backend)
        model = build(model_type, injection="none" if model_type == "gpt_oss" else "linear")
        engine = Engine(model, max_num_seqs=2, max_model_len=60, kv_policy=policy, passes_per_step=3, max_in_flight=2)
        assert isinstance(engine.loop.forward.attention, backend)
        answers.append([(c.tokens, c.depths, c.passes) for c in engine.generate(prompts, params)])
    assert answers[0] == answers[1]
    assert len({depth for _, depths, _ in answers[0] for depth in depths}) > 1


class NoHost(TorchDispatchMode):
    """Refuses operations that wait for a GPU: values read by the host, shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "repeat_interleave", "equal")
        if name in waits or any(t is not None and t.dtype == torch.bool for t in indices):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_no_host_refuses_operations_that_wait():
    ones = torch.ones(3)
    for look in (lambda: int(ones[0]), lambda: ones.nonzero(), lambda: ones[ones > 0], lambda: bool(ones.any())):
        with pytest.raises(AssertionError, match="waits"), NoHost():
            look()


@pytest.mark.parametrize(
    ("kind", "policy", "lora"),
    [
        ("padded", "per-depth", False),
        pytest.param("padded", "last-exited", True, marks=pytest.mark.slow),
        ("graph-tick", "last-exited", True),
        pytest.param("graph-tick", "single", False, marks=pytest.mark.slow),
    ],
)
def test_recorded_graphs_never_wait_and_give_the_same_tokens(kind, policy, lora, monkeypatch):
    """Every replay launches the same kernels as the recording, with the same grids and arguments."""
    monkeypatch.setattr(offline, "attention_for", lambda device: TritonAttention)
    fields = {"relaxation": {**RELAXED, "own": [], "dora": True}, "recurrence_norm": "each"} if lora else {}
    prompts, params = requests(15, 4, policy, ["fixed", "latent-diff"], depth=3)
    params = [replace(p, max_tokens=min(p.max_tokens, 3), temperature=n % 2) for n, p in enumerate(params)]
    launched: list[Any] = []
    for name in ("_write", "_attend", "_merge"):
        kernel = getattr(triton_attention, name)
        monkeypatch.setattr(triton_attention, name, RecordedKernel(kernel, launched))
    answers, replays = [], 0
    for graphs in (False, True):
        engine = Engine(build(**fields), max_num_seqs=3, max_model_len=60, kv_policy=policy, passes_per_step=3)

        def record(function: Any) -> Any:
            first: list[Any] = []

            def run() -> None:
                nonlocal replays
                launched.clear()
                with NoHost():
                    function()
                replays += bool(first)
                first[:] = first or launched
                assert launched == first

            run()
            return run

        if graphs:
            with torch.inference_mode():
                if kind == "padded":
                    engine.loop.use_graphs(record, ticks=False)
                else:
                    engine.loop.use_graphs(record, max_rows=0)
        answers.append([(c.tokens, c.depths) for c in engine.generate(prompts, params)])
    assert answers[0] == answers[1]
    assert replays > 3
    assert len(launched) > 2


class RecordedKernel:
    """A kernel that records its launches: grids and arguments, for tensors the shape and strides."""

    def __init__(self, kernel: Any, launched: list[Any]):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = [(tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in args]
            self.launched.append((grid, arguments, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch
