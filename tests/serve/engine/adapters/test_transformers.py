"""Models of transformers in the engine's pieces: tokens and depths equal the oracle's."""

from __future__ import annotations

import pytest

from loopwise.serve import Engine
from loopwise.serve.engine import passes
from tests.helpers.engines import build, check, requests
from tests.helpers.model import RELAXED_PARTS, build_relaxed

# A norm of heads has rows before the heads in one family, after them in the other.
OF_HEADS = {"depths": 3, "rank": {"self_attn.q_proj": 4}, "own": ["self_attn.q_norm.weight"], "dora": False}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma3_text", {}),
        ("mistral", {}),
        ("gpt2", {}),
        ("gpt_neox", {"recurrence_norm": "each"}),
        ("olmo2", {"recurrence_norm": "last", "state_init": "normal", "state_std": 0.5}),
        ("qwen3_moe", {"injection": "add", "state_init": "zeros"}),
        ("gpt_oss", {"injection": "none"}),
        *((family, {"relaxation": OF_HEADS}) for family in ("qwen3", "gemma3_text")),
        ("qwen2", {"relaxation": {**OF_HEADS, "own": ["self_attn.q_proj.bias"], "dora": True}}),
    ],
)
def test_architectures(model_type, fields):
    check(build(model_type, **fields), "last-exited", *requests(4, 10, "last-exited", ["fixed", "latent-diff"]))


@pytest.mark.parametrize("model_type", list(RELAXED_PARTS))
@pytest.mark.parametrize(("dora", "prompts"), [(False, 4), (True, 4), (False, 1000)])
def test_relaxation_at_mixed_depths(model_type, dora, prompts, monkeypatch):
    """Prompts of at least `prompts` lanes run in passes without decoding lanes."""
    monkeypatch.setattr(passes, "PROMPT", prompts)
    model = build_relaxed(model_type, depths=3, dora=dora, num_recurrences=4)
    model.get_output_embeddings().weight.data *= 8  # fewer near-ties
    check(model, "last-exited", *requests(8, 12, "last-exited", ["fixed", "latent-diff"]))


@pytest.mark.parametrize("model_type", list(RELAXED_PARTS))
def test_a_second_engine_of_a_relaxed_model(model_type):
    """It takes what the first one changed in the layers back, and answers the same."""
    model = build_relaxed(model_type, depths=3, num_recurrences=4)
    model.get_output_embeddings().weight.data *= 8
    prompts, params = requests(4, 3, "last-exited", ["fixed"])
    sizes = {"max_num_seqs": 5, "max_model_len": 100, "kv_policy": "last-exited"}
    first, second = (Engine(model, **sizes).generate(prompts, params) for _ in range(2))
    assert [answer.tokens for answer in second] == [answer.tokens for answer in first]
