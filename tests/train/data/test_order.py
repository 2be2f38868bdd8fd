"""The order of samples, and mixtures of sources."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.train.data import Mixture, Order


@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 5))
def test_order_passes_over_every_block(count, seed, epoch):
    order = Order(count, seed)
    seen = [order[epoch * count + i] for i in range(count)]
    assert sorted(seen) == list(range(count))
    assert [Order(count, seed)[epoch * count + i] for i in reversed(range(count))] == seen[::-1]


def test_order_shuffles_every_pass_anew():
    order = Order(50, 3)
    first, second = ([order[e * 50 + i] for i in range(50)] for e in (0, 1))
    assert first != second
    assert first != list(range(50))
    assert [Order(5, 0)[i] for i in range(10)] == [0, 2, 1, 4, 3, 3, 2, 4, 1, 0]  # a resumed run must find the same


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 50), st.integers(1, 400), st.data())
def test_a_mixture_takes_every_block_of_a_source_in_turn(parts, seed, count, data):
    weights = [data.draw(st.floats(0.1, 5)) for _ in parts]
    mixture = Mixture(parts, [(0.5, weights), (0.5, weights[::-1])], count, seed)
    rows = [mixture[g] for g in range(count)]
    assert rows == [Mixture(parts, [(0.5, weights), (0.5, weights[::-1])], count, seed)[g] for g in range(count)]
    begin = 0
    for size in parts:
        own = [row for row in rows if begin <= row < begin + size]
        for epoch in range(0, len(own), size):
            assert len(set(own[epoch : epoch + size])) == len(own[epoch : epoch + size])
        begin += size
    assert begin > max(rows)


def test_phases_follow_their_weights():
    mixture = Mixture([100, 100, 100], [(0.25, [1, 0, 0]), (0.75, [0, 3, 1])], 8000, 0)
    source = [mixture[g] // 100 for g in range(8000)]
    assert set(source[:2000]) == {0}
    assert set(source[2000:]) == {1, 2}
    assert source[2000:].count(1) / 6000 == pytest.approx(0.75, abs=0.02)


def test_one_source_is_as_before():
    assert [Mixture([7], [(1.0, [1.0])], 20, 3)[g] for g in range(20)] == [Order(7, 3)[g] for g in range(20)]
