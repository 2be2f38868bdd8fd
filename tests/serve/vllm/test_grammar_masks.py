"""Masks of grammars in lanes, compared with xgrammar's own."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.parametrize("vocabulary", [64, 100])
def test_a_mask_is_xgrammars(vocabulary):
    """Tokens of four rows, of which two have grammars; a third grammar's request has no row."""
    from vllm.v1.core.sched.output import GrammarOutput
    from xgrammar import apply_token_bitmask_inplace

    from loopwise.serve.vllm.grammar import mask_of

    draw = np.random.default_rng(0)
    bits = draw.integers(-(2**31), 2**31, (3, -(-vocabulary // 32)), dtype=np.int32)
    logits = torch.from_numpy(draw.normal(size=(4, vocabulary)).astype(np.float32))
    got, want = logits.clone(), logits.clone()
    mask = mask_of(GrammarOutput(["b", "gone", "a"], bits), {"a": 5, "b": 2, "c": 0}, torch.device("cpu"))
    mask(got, [0, 5, 2, 3])
    lines = torch.from_numpy(bits[[2, 2, 0, 0]])
    apply_token_bitmask_inplace(want, lines, vocab_size=vocabulary, indices=[1, 2])
    assert torch.equal(got, want)
    assert bool(got[1:3].isinf().any())


def test_without_grammars_no_token_is_masked():
    from loopwise.serve.vllm.grammar import mask_of

    logits = torch.zeros(2, 64)
    mask_of(None, {"a": 0}, torch.device("cpu"))(logits, [0, 1])
    assert not bool(logits.any())
