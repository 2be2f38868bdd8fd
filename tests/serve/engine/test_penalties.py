"""Penalties in the engine equal those of transformers and vLLM. Without a request that has one, they cost nothing."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.serve import Engine, Params
from loopwise.serve.engine.sampling import Draws, penalise
from tests.helpers.engines import NEAR, build, requests
from tests.helpers.graph_ticks import compare_ticks
from tests.helpers.oracle import Oracle
from tests.helpers.tiny import VOCAB, tokenizer

KINDS: tuple[dict[str, float], ...] = (
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 2.0},
    {},
)


def penalised(params: list[Params]) -> list[Params]:
    return [replace(p, **KINDS[n % len(KINDS)]) for n, p in enumerate(params)]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_is_as_in_transformers_generate(penalty):
    model = build()
    prompts, _ = requests(41, 6, "per-depth", ["fixed"])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want, free = (
        [
            model.generate(torch.tensor([prompt]), repetition_penalty=p, **options)[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
        for p in (penalty, 1.0)
    )
    engine = Engine(model, max_num_seqs=3, max_model_len=100, passes_per_step=5)
    got = engine.generate(prompts, Params(20, ignore_eos=True, repetition_penalty=penalty))
    assert [done.tokens for done in got] == want
    assert sum(a != b for a, b in zip(want, free, strict=True)) >= 4


@pytest.mark.parametrize(
    ("policy", "wave"),
    [
        ("last-exited", 5),
        pytest.param("per-depth", 1, marks=pytest.mark.slow),
        pytest.param("per-depth", 5, marks=pytest.mark.slow),
        pytest.param("last-exited", 1, marks=pytest.mark.slow),
    ],
)
def test_every_request_has_its_own_at_its_own_depth(policy, wave):
    """Requests with and without penalties, of mixed lengths and depths, share an engine. Waves give the same tokens."""
    model = build(kv_policy=policy)
    prompts, params = requests(42, 24, policy, ["fixed", "latent-diff", "cosine"])
    params = penalised([replace(p, max_tokens=20) for p in params])
    oracle = Oracle(model)
    wanted = [oracle.generate(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    decoded = (
        [replace(p, decoder="wave", max_in_flight=n % wave + 1) for n, p in enumerate(params)] if wave > 1 else params
    )
    got = Engine(model, max_num_seqs=5, max_model_len=100, passes_per_step=3, max_in_flight=wave).generate(
        prompts, decoded
    )
    clear = [n for n, answer in enumerate(wanted) if answer.margin > NEAR]
    assert len(clear) >= 22
    assert [(got[n].tokens, got[n].depths) for n in clear] == [(wanted[n].tokens, wanted[n].depths) for n in clear]


def test_ticks_of_a_fixed_width_have_them_too():
    prompts, params = requests(43, 12, "last-exited", ["fixed", "latent-diff"])
    params = [replace(p, temperature=n % 2 / 2, top_k=n % 5, seed=n) for n, p in enumerate(penalised(params))]
    compare_ticks(build, prompts, params, kv_policy="last-exited")


def test_they_come_before_temperature_and_cuts():
    model = build()
    free = Params(12, ignore_eos=True, temperature=0.8, top_k=1, seed=3)  # top_k=1: the likeliest token
    engine = Engine(model, max_num_seqs=2, max_model_len=100)
    drawn, greedy = (
        engine.generate([[5, 6, 7]], replace(free, temperature=t, repetition_penalty=1.5)) for t in (0.8, 0.0)
    )
    assert drawn[0].tokens == greedy[0].tokens != engine.generate([[5, 6, 7]], free)[0].tokens


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_arithmetic_is_that_of_vllm():
    from vllm.model_executor.layers.utils import apply_penalties

    torch.manual_seed(0)
    logits, values = torch.randn(len(KINDS), VOCAB), torch.ones(3, len(KINDS))
    values[1:] = 0
    for n, kind in enumerate(KINDS):
        for at, name in enumerate(("repetition_penalty", "presence_penalty", "frequency_penalty")):
            values[at, n] = kind.get(name, values[at, n])
    prompt, generated = (torch.randint(VOCAB, (len(KINDS), n)) for n in (30, 50))
    zero = torch.zeros(len(KINDS), VOCAB)
    counts = [zero.scatter_add(1, ids, torch.ones(ids.shape)) for ids in (prompt, generated)]
    got = penalise(logits, counts[0] + counts[1], counts[1], *values)
    want = apply_penalties(logits.clone(), prompt, generated, values[1], values[2], values[0])
    torch.testing.assert_close(got, want)
    assert not torch.equal(got[0], logits[0])
    assert torch.equal(got[-1], logits[-1])


def test_penalties_cost_nothing_without_a_request_that_has_one(monkeypatch):
    engine = Engine(build(), max_num_seqs=2, max_model_len=100)

    def fail(*args: Any) -> Any:
        raise AssertionError("penalties without a request that has one")

    with monkeypatch.context() as patch:
        patch.setattr(Draws, "_penalised", fail)
        plain = engine.generate([[5, 6]], Params(5, ignore_eos=True, repetition_penalty=1.0, temperature=1.0))
        assert not len(engine.draws.tokens)
        failed = engine.generate([[5, 6]], Params(5, presence_penalty=0.1))[0]
        assert "without a request" in str(failed.error)
    engine.generate([[5, 6], [7]], Params(5, ignore_eos=True, presence_penalty=2.0))
    assert engine.draws.tokens.shape == (3, 101)
    assert (
        engine.generate([[5, 6]], Params(5, ignore_eos=True, temperature=1.0)) == plain
    )  # in a row that had a penalty before


def test_a_diffusion_has_none():
    engine = Engine(build(), max_num_seqs=1, max_model_len=50, max_in_flight=4)
    with pytest.raises(UserError, match="a penalty needs the tokens before, which decoder 'diffusion' still changes"):
        engine.generate([[5]], Params(3, decoder="diffusion", max_in_flight=4, frequency_penalty=0.5))


def test_the_file_and_the_keys_of_the_command(capsys, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"repetition_penalty": 1.4, "max_new_tokens": 12}))
    ids = torch.tensor([tokenizer()("the cat")["input_ids"]])
    results, want = [], []
    for penalty, keys in ((1.4, []), (1.0, ["repetition_penalty=1"])):
        assert main(["generate", str(tmp_path), "prompt=the cat", "details=true", "dtype=float32", *keys]) == 0
        results.append(json.loads(capsys.readouterr().out))
        out = model.generate(
            ids, max_new_tokens=12, do_sample=False, repetition_penalty=penalty, eos_token_id=1, pad_token_id=2
        )
        want.append(out[0, ids.shape[1] :].tolist())
    assert [one["tokens"] for one in results] == want
    assert want[0] != want[1]
    assert [one["sampling"]["repetition_penalty"] for one in results] == [1.4, 1.0]
    assert main(["generate", str(tmp_path), "prompt=a", "repetition_penalty=0"]) == 2
    assert "repetition_penalty" in capsys.readouterr().err
