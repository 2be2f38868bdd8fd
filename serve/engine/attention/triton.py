"""Attention of rows at mixed depths as Triton kernels: the engine's backend on a GPU.

The kernels need no per-call metadata: they find pages and runs in `Rows` by themselves. Launches depend on the number
of rows and the width of the block tables alone, and nothing waits for the device.
Shapes: N rows, H query heads, K key-value heads, C head size, G = H / K, S splits of a context, m rows that are filled.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import Rows, clean

LANES = 64  # queries of a run times G that a program has, at most
TILE = 64  # keys that it reads at once, at most
BYTES = 16384  # bytes of keys, or of values, that it reads at once, and half of those of queries; small GPUs have room
SPAN, SPLITS = 512, 16  # a lone row's context is split: into so many keys at least, and so many programs at most

jit: Any = triton.jit  # kernels have attributes that its signature lacks
# Arguments that change from call to call, and are not worth another kernel each time.
_anyhow = {"do_not_specialize": ["rows"], "do_not_specialize_on_alignment": ["request", "position", "slot"]}


@jit
def _place(tables, width, who, at, where, slot_step, block_step, at_step, SIZE: tl.constexpr):
    """The offset in a cache, in elements, of position `at` of request `who` at slot `where`."""
    block = tl.load(tables + who * width + at // SIZE).to(tl.int64)
    return block * block_step + where.to(tl.int64) * slot_step + at % SIZE * at_step


@jit
def _rotated(x, c, cosines, at, real, ROTARY: tl.constexpr, HALVES: tl.constexpr):
    """The values x[c] of heads at positions `at`, where `real`, after rotary position embedding.

    Products are summed in float32 and rounded once. cosines [positions, ROTARY]: cosines, then sines.
    """
    own = tl.load(x + c, mask=real, other=0.0)
    if ROTARY:
        half: tl.constexpr = ROTARY // 2
        if HALVES:  # value n is turned with n + half
            first, angle = c < half, c % half
            other = tl.where(first, c + half, c - half)
        else:  # value 2 n is turned with 2 n + 1
            first, angle = c % 2 == 0, c // 2
            other = tl.where(first, c + 1, c - 1)
        turned = real & (c < ROTARY)
        line = cosines + at.to(tl.int64) * ROTARY + angle
        cos = tl.load(line, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(line + half, mask=turned, other=0.0).to(tl.float32)
        beside = tl.load(x + other, mask=turned, other=0.0).to(tl.float32)
        turn = own.to(tl.float32) * cos + tl.where(first, -beside, beside) * sin
        own = turn.to(own.dtype)
    return own


@jit(**_anyhow)
def _write(
    k, v, keys, values, cosines, request, position, slot, write, tables, width, slot_step, block_step, at_step,
    head_step, k_row, k_head, v_row, v_head, ROTARY: tl.constexpr, HALVES: tl.constexpr,
    SIZE: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Program (row, head): k, v [N, K, C] into the caches, k rotated where ROTARY > 0."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if write is not None and tl.load(write + row) == 0:
        return
    at, where = tl.load(position + row), tl.load(slot + row)
    place = _place(tables, width, tl.load(request + row), at, where, slot_step, block_step, at_step, SIZE)
    c = tl.arange(0, PADDED)
    to = place + head * head_step + c
    key = _rotated(k + row * k_row + head * k_head, c, cosines, at, c < C, ROTARY, HALVES)
    tl.store(keys + to, key, mask=c < C)
    tl.store(values + to, tl.load(v + row * v_row + head * v_head + c, mask=c < C), mask=c < C)


@jit
def _tile(
    sums, top, total, query, keys, values, line, there, back, scaling, softcap,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Add the keys and values at places `line` [TILE] to an online softmax: weighted sums [LANES, PADDED], greatest
    score and sum of weights [LANES]. `back` [LANES, TILE]: how far a key lies behind the query."""
    c = tl.arange(0, PADDED)
    k = tl.load(keys + line[None, :] + c[:, None], mask=there[None, :] & (c < C)[:, None], other=0.0)
    scores = tl.dot(query, k, input_precision="ieee") * scaling
    if CAPPED:  # softcap * tanh(scores / softcap)
        scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
    seen = (back >= 0) & there[None, :]
    if WINDOW:
        seen &= back < WINDOW
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    p, shrink = tl.exp(scores - base[:, None]), tl.exp(top - base)
    v = tl.load(values + line[:, None] + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
    sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return sums, higher, total * shrink + tl.sum(p, 1)


@jit
def _continues(request, position, slot, row, nth, who, where, at, there):
    """True for the rows `row` + nth, of those that are `there`, that belong to one run with `row`, which has position
    `at` of request `who` at slot `where`."""
    there &= tl.load(request + row + nth, mask=there, other=-1) == who
    there &= tl.load(slot + row + nth, mask=there, other=-1) == where
    return there & (tl.load(position + row + nth, mask=there, other=-1) == at + nth)


@jit(**_anyhow)
def _attend(
    out, tops, totals, q, keys, values, sinks, cosines, request, position, slot, tables, width, slot_step, block_step,
    at_step, head_step, rows, q_row, q_head, scaling, softcap,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr, SPAN: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr, ROTARY: tl.constexpr, HALVES: tl.constexpr,
    SIZE: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Program (row, key-value head, split): a run's queries from this row to the next position that QUERIES divides,
    with all their heads, so that they share keys and values. Programs of rows in between return at once. A lane is
    (query, head of the group). Queries are rotated where ROTARY > 0. Without splits (SPAN = 0) `out` is [N, H, C]; with
    them it is the weighted sum [N, H, S, C] of a split, and `tops`, `totals` [N, H, S] are its greatest score and its
    sum of weights."""
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    who, where = tl.load(request + row), tl.load(slot + row)
    at = tl.load(position + row).to(tl.int32)
    lane = tl.arange(0, LANES)
    nth, query_head = lane // GROUPS, head * GROUPS + lane % GROUPS
    mine, last = nth < 1, at
    if QUERIES > 1:
        if _continues(request, position, slot, row, -1, who, where, at, (row > 0) & (at % QUERIES != 0)):
            return
        mine = (nth < QUERIES - at % QUERIES) & (row + nth < rows)
        mine = _continues(request, position, slot, row, nth, who, where, at, mine)
        last = at + tl.max(tl.where(mine, nth, 0))

    c = tl.arange(0, PADDED)
    real = mine[:, None] & (c < C)[None, :]
    heads = q + (row + nth)[:, None] * q_row + query_head[:, None] * q_head
    query = _rotated(heads, c[None, :], cosines, (at + nth)[:, None], real, ROTARY, HALVES)
    top, total = tl.full([LANES], float("-inf"), tl.float32), tl.zeros([LANES], tl.float32)
    if sinks is not None:  # a key of this score, and no value, that the first split sees
        sink = tl.load(sinks + query_head, mask=mine, other=0.0).to(tl.float32)
        top, total = tl.where(split == 0, sink, top), total + 1
    sums = tl.zeros([LANES, PADDED], tl.float32)

    first, end = 0, last + 1
    if WINDOW:
        first = tl.maximum(at + 1 - WINDOW, 0) // TILE * TILE  # so that what a row adds up does not depend on its run
    if SPAN:
        first, end = tl.maximum(first, split * SPAN), tl.minimum(end, (split + 1) * SPAN)
    for start in range(first, end, TILE):
        key = start + tl.arange(0, TILE)
        there = key < end
        block = tl.load(tables + who * width + key // SIZE, mask=there, other=0).to(tl.int64)
        line = block * block_step + where.to(tl.int64) * slot_step + key % SIZE * at_step + head * head_step
        back = (at + nth)[:, None] - key[None, :]
        sums, top, total = _tile(
            sums, top, total, query, keys, values, line, there, back, scaling, softcap, WINDOW, CAPPED, C, PADDED
        )

    to = ((row + nth) * tl.num_programs(1) * GROUPS + query_head) * tl.num_programs(2) + split
    if SPAN:
        tl.store(tops + to, top, mask=mine)
        tl.store(totals + to, total, mask=mine)
    else:
        total = tl.where(mine, total, 1.0)  # other lanes may have seen nothing
        sums = sums / total[:, None]
    tl.store(out + to[:, None] * C + c[None, :], sums.to(out.dtype.element_ty), mask=real)


@jit
def _merge(out, sums, tops, totals, S: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Program (row, head): merge the softmaxes of its splits."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    c, split = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    top = tl.load(tops + row * S + split, mask=split < S, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))  # 0 where a split has seen nothing
    total = tl.sum(weight * tl.load(totals + row * S + split, mask=split < S, other=0.0), 0)
    real = (split < S)[:, None] & (c < C)[None, :]
    parts = tl.load(sums + (row * S + split)[:, None] * C + c[None, :], mask=real, other=0.0)
    whole = tl.sum(parts * weight[:, None], 0) / total  # pyright: ignore[reportOperatorIssue]
    tl.store(out + row * C + c, whole.to(out.dtype.element_ty), mask=c < C)


@jit(do_not_specialize_on_alignment=["request", "position", "slot"])
def _fill(
    caches, empty, request, position, slot, tables, width, slot_step, block_step, at_step, head_step, layer_step,
    value_step, SIZE: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Program (row, head, 2 layer + (0 keys, 1 values)): copy the row's slot to the next ones."""
    row, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at, where = tl.load(position + row), tl.load(slot + row)
    place = _place(tables, width, tl.load(request + row), at, where, slot_step, block_step, at_step, SIZE)
    c = tl.arange(0, PADDED)
    start = caches + layer // 2 * layer_step + layer % 2 * value_step + place + head * head_step + c
    values = tl.load(start, mask=c < C)
    for _ in range(tl.load(empty + row).to(tl.int32)):
        start += slot_step
        tl.store(start, values, mask=c < C)


Cache = tuple[Tensor, Tensor]  # keys, values [blocks, block size, K, C] of a layer at a slot


class Rotary(NamedTuple):
    """Rotary position embedding, which the kernels apply to queries and keys as they read them.

    cosines [positions, D], contiguous: D / 2 cosines, then as many sines; the first D values of a head are rotated.
    halves: value n is turned with n + D / 2, as in Llama; otherwise 2 n with 2 n + 1, as in GPT-J.
    """

    cosines: Tensor
    halves: bool


class Group(NamedTuple):
    """Core layers of one shape, whose caches are equally far apart, so that one launch fills them all.

    keys: those of the first layer.   layers: their number.   slot_step, value_step, layer_step: elements from a slot to
    the next, from keys to values, from a layer to the next.
    """

    keys: Tensor
    layers: int
    slot_step: int
    value_step: int
    layer_step: int


class TritonAttention:
    """The backend, with caches of every layer by slot; those of a layer's slots are equally far apart."""

    def __init__(
        self, shapes: list[tuple[int, int]], outer: int, slots: int, blocks: int, block_size: int, like: Tensor
    ):
        """`shapes`: (K, C) of every layer, of which the first `outer` are prelude and coda."""
        core = {  # by shape: [layers, 2, slots, blocks, block size, K, C]
            shape: like.new_zeros(shapes[outer:].count(shape), 2, slots, blocks, block_size, *shape)
            for shape in dict.fromkeys(shapes[outer:])
        }
        left = {shape: iter(caches.unbind()) for shape, caches in core.items()}
        whole = [
            next(left[shape]) if n >= outer else like.new_zeros(2, 1, blocks, block_size, *shape)
            for n, shape in enumerate(shapes)
        ]
        self.caches = [tuple(keys_and_values.flatten(1, 2).unbind()) for keys_and_values in whole]  # all slots
        self.take([list(zip(*keys_and_values, strict=True)) for keys_and_values in whole], outer)

    def take(self, slots: list[list[Cache]], outer: int) -> None:
        """Work on these caches, of every layer by slot. Raises ValueError for distances in memory that the kernels do
        not support."""
        self.slots, self.current = slots, None
        self.block_size = slots[0][0][0].shape[1]
        for keys, values in chain.from_iterable(slots):
            if keys.stride() != values.stride() or keys.stride(-1) != 1 or keys.shape[1] != self.block_size:
                raise ValueError(f"keys in steps of {keys.stride()} and values of {values.stride()}: must be the same")
        self.slot_steps = [_step(*(list(each) for each in zip(*layer, strict=True))) for layer in slots]
        self.groups = []
        shapes = [layer[0][0].shape[2:] for layer in slots]
        for shape in dict.fromkeys(shapes[outer:]):
            some = [n for n in range(outer, len(slots)) if shapes[n] == shape]
            caches = [slots[n][0] for n in some]
            slot_steps = {self.slot_steps[n] for n in some}
            if len(slot_steps) > 1:
                raise ValueError(
                    f"slots of core layers stand {sorted(slot_steps)} elements apart: all must be equally far"
                )
            value_step, layer_step = _step(*map(list, caches)), _step([keys for keys, _ in caches])
            self.groups.append(Group(caches[0][0], len(some), slot_steps.pop(), value_step, layer_step))
        device = slots[0][0][0].device
        self.device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def plan(self, rows: Rows) -> Rows:
        self.current = replace(
            rows, **{name: getattr(rows, name).contiguous() for name in ("request", "position", "slot")}
        )
        return self.current

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **facts: Any) -> Tensor:
        """As Attention's. A further fact, `rotary`: the Rotary of queries and keys that are not rotated yet."""
        rows, (keys, values) = self.current, self.slots[layer][0]
        assert rows is not None, "attention before a plan"
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        (n, heads, size), groups = k.shape, q.shape[1] // k.shape[1]
        padded = max(16, triton.next_power_of_2(size))
        fit = BYTES // (padded * k.element_size())
        tile, lanes = max(16, min(TILE, fit)), min(LANES, 2 * fit)
        where, tables = (rows.request, rows.position, rows.slot), rows.tables
        queries = 1 if rows.alone else max(1, lanes // groups)
        positions = tables.shape[1] * self.block_size
        span = max(SPAN, -(-positions // SPLITS)) if rows.alone else positions
        span = -(-span // tile) * tile
        splits = -(-positions // span)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sums, tops, totals = out, None, None
        if splits > 1:
            sums = torch.empty(*q.shape[:2], splits, size, dtype=torch.float32, device=q.device)
            tops, totals = torch.empty(2, *q.shape[:2], splits, dtype=torch.float32, device=q.device)
        strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
        pages = tables, tables.stride(0), self.slot_steps[layer], *keys.stride()[:3]
        sizes = {"SIZE": self.block_size, "C": size, "PADDED": padded}
        window, softcap = facts.get("sliding_window") or 0, facts.get("softcap") or 0.0
        rotary: Rotary | None = facts.get("rotary")
        cosines, halves = rotary or (None, True)
        sizes |= {"ROTARY": 0 if cosines is None else cosines.shape[1], "HALVES": halves}
        with self.device:
            _write[n, heads](k, v, keys, values, cosines, *where, rows.write, *pages, *strides, **sizes, num_warps=1)
            _attend[n, heads, splits](
                sums, tops, totals, q, keys, values, facts.get("sinks"), cosines, *where, *pages, n, q.stride(0),
                q.stride(1), facts["scaling"], softcap, WINDOW=window, CAPPED=softcap > 0, GROUPS=groups,
                QUERIES=queries, SPAN=span if splits > 1 else 0,
                LANES=max(16, triton.next_power_of_2(queries * groups)), TILE=tile, **sizes, num_stages=2,
            )  # fmt: skip
            if splits > 1:
                whole = {"C": size, "PADDED": padded, "S": splits, "SPLITS": triton.next_power_of_2(splits)}
                _merge[n, q.shape[1]](out, sums, tops, totals, **whole)
        return out

    def fill(self, plan: Rows, empty: Tensor, count: int | None = None) -> None:
        """As Attention.fill, from the cache."""
        where, tables = (plan.request, plan.position, plan.slot), (plan.tables, plan.tables.stride(0))
        with self.device:
            for keys, layers, slot_step, value_step, layer_step in self.groups:
                heads, size = keys.shape[2:]
                steps = slot_step, *keys.stride()[:3], layer_step, value_step
                _fill[len(empty), heads, 2 * layers](
                    keys, empty, *where, *tables, *steps,
                    SIZE=self.block_size, C=size, PADDED=triton.next_power_of_2(size), num_warps=1,
                )  # fmt: skip

    def clean(self, table: Tensor) -> None:
        for keys, values in chain.from_iterable(self.slots):
            clean(keys, table, [0])
            clean(values, table, [0])


def _step(*lines: list[Tensor]) -> int:
    """The distance of neighboring tensors in every line, in elements; 0 where no line has two.

    Raises ValueError where it differs.
    """
    steps = {
        int(b.storage_offset() - a.storage_offset()) if _storage(a) == _storage(b) else -1
        for line in lines
        for a, b in pairwise(line)
    }
    if len(steps) > 1 or min(steps, default=0) < 0:
        raise ValueError(f"caches stand {sorted(steps)} elements apart: all must be equally far")
    return steps.pop() if steps else 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
