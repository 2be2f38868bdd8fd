"""Prompt tokens of a step: tokens x depth stay within the budget, and nobody waits for a long prompt's end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.serve.api.prompt_budget import PromptBudget

PROMPTS = st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 64)), min_size=1, max_size=9)


@given(PROMPTS, st.integers(1, 4096))
def test_tokens_times_depth_stay_within_the_budget(prompts, total):
    budget = PromptBudget(total, len(prompts))
    taken = [budget.take(tokens, depth) for tokens, depth in prompts]
    spent = sum(count * depth for count, (_, depth) in zip(taken, prompts, strict=True))
    assert all(0 <= count <= tokens for count, (tokens, _) in zip(taken, prompts, strict=True))
    assert spent <= max(total, prompts[0][1])  # the first has one token, however deep it is
    assert taken[0] >= 1


@pytest.mark.parametrize("depth", [1, 8, 32])
def test_a_short_prompt_starts_beside_a_long_one(depth):
    budget = PromptBudget(2048, 2)
    assert budget.take(8000, depth) == 1024 // depth
    assert budget.take(10, depth) == 10
    alone = PromptBudget(2048, 1)
    assert alone.take(8000, depth) == 2048 // depth
