"""The norm of the prelude's output, and the map of the last state: equal to their formulas, and the same in lanes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loopwise.serve import Engine, Params
from tests.helpers.model import GREEDY, build, embedded, ids

ENDS = {"prelude_norm": True, "state_projection": True}


def build_ends(**fields: Any) -> Any:
    model = build(injection="diagonal", state_init="zeros", **ENDS, **fields)
    nn.init.normal_(model.ends.norm)
    for parameter in (model.injection.step, model.injection.log_rate):
        nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def test_the_formulas():
    model, tokens = build_ends(), ids()
    llama, injection = model.source.model, model.injection
    x, run = embedded(model, tokens)
    e = run(model.prelude, x)
    e = e / (e.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * model.ends.norm
    dt = torch.log1p(injection.step.exp())
    s = torch.zeros_like(e)
    for _ in range(3):
        s = run(model.core, (-dt * injection.log_rate.exp()).exp() * s + dt * (e @ injection.weight.T))
    want = model.source.lm_head(llama.norm(run(model.coda, s @ model.ends.projection.T)))
    torch.testing.assert_close(model(tokens, num_recurrences=3).logits, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_lanes_and_a_cache():
    model, prompts = build_ends(), [ids()[0, 5:].tolist(), ids()[1].tolist()]
    engine_model = build_ends()
    texts = []
    for prompt in prompts:
        cached = model.generate(torch.tensor([prompt]), num_recurrences=3, **GREEDY)
        assert torch.equal(cached, model.generate(torch.tensor([prompt]), num_recurrences=3, use_cache=False, **GREEDY))
        texts.append(cached[0, len(prompt) :].tolist())
    engine = Engine(engine_model, max_num_seqs=2, max_model_len=40)
    replies = engine.generate(prompts, [Params(len(texts[0]), 3, temperature=0, ignore_eos=True)] * 2)
    assert [list(reply.tokens) for reply in replies] == texts


@torch.no_grad()
def test_a_projection_starts_as_the_identity_and_a_norm_with_ones():
    model = build(state_projection=True, prelude_norm=True)
    new = type(model)(model.config)
    assert torch.equal(new.ends.projection, torch.eye(64))
    assert torch.equal(new.ends.norm, torch.ones(64))
    model.ends.projection.copy_(torch.eye(64))
    plain = build(prelude_norm=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(ids()).logits, plain(ids()).logits)


def test_training():
    model = build_ends().train()
    model(ids(), labels=ids(), num_recurrences=2).loss.backward()
    for name in ("ends.norm", "ends.projection", "injection.step", "injection.log_rate", "injection.weight"):
        assert model.get_parameter(name).grad.any(), name


@pytest.mark.parametrize("name", ENDS)
def test_they_are_true_or_false(name):
    fields: dict[str, Any] = {name: 1}
    with pytest.raises(ValueError, match=f"{name}=1: True or False"):
        build(**fields)
