"""Damped recurrence: equal to its formula, the same with a cache, and trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from loopwise.model.damping import Damping, interpolate
from tests.helpers.model import GREEDY, build, embedded, ids

FROM_THE_SECOND = (0.3, "1/R", "learned")  # one recurrence is not damped
DAMPINGS = (*FROM_THE_SECOND, "selective")


def build_damped(damping: float | str, **fields: Any) -> Any:
    model = build(recurrence_damping=damping, **fields)
    for parameter in model.damping.parameters():
        nn.init.normal_(parameter, std=1.0 if damping == "learned" else 0.5)
    return model


def by_hand(model: Any, tokens: torch.Tensor, recurrences: int) -> torch.Tensor:
    """The logits of a Llama without injection, spelled out with its modules and a plain causal mask."""
    llama, config = model.source.model, model.config
    x, run = embedded(model, tokens)
    s = run(model.prelude, x)
    for r in range(1, recurrences + 1):
        if config.recurrence_norm == "between" and r > 1:
            s = llama.norm(s)
        share = {
            "1/R": 1 / recurrences,
            "learned": 1 / (1 + torch.exp(-model.damping.weight)) if config.recurrence_damping == "learned" else 0,
        }.get(config.recurrence_damping, config.recurrence_damping)
        if r == 1 and config.recurrence_damping not in ("1/R", "selective"):
            share = 1
        new, gate = run(model.core, s), model.damping
        if config.recurrence_damping == "selective":
            rate = torch.log1p(torch.exp((new - s) @ gate.down.T @ gate.up.T + gate.bias)) * gate.log_rate.exp()
            share = torch.exp(-rate)
        s = (1 - share) * s + share * new
        if config.recurrence_norm == "each":
            s = model.recurrence_norm(s)
    return model.source.lm_head(llama.norm(run(model.coda, llama.norm(s) if config.recurrence_norm == "last" else s)))


@pytest.mark.parametrize("norm", ["none", "each", "between", "last"])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_formula(damping, norm):
    model = build_damped(damping, injection="none", recurrence_norm=norm)
    with torch.no_grad():
        for recurrences in (1, 2, 5):
            got = model(ids(), num_recurrences=recurrences).logits
            torch.testing.assert_close(got, by_hand(model, ids(), recurrences), rtol=0, atol=1e-5)
        assert (got - build(injection="none", recurrence_norm=norm)(ids(), num_recurrences=5).logits).abs().max() > 1e-3


@pytest.mark.parametrize("injection", ["none", "linear"])
@pytest.mark.parametrize("damping", FROM_THE_SECOND)
def test_one_recurrence_is_not_damped(damping, injection):
    model, plain = (build_damped(each, injection=injection) for each in (damping, 1.0))
    assert torch.equal(model(ids(), num_recurrences=1).logits, plain(ids(), num_recurrences=1).logits)
    assert [name for name in model.state_dict() if "damping" in name] == ["damping.weight"] * (damping == "learned")


def test_no_damping_is_no_arithmetic():
    before, after = torch.zeros(3, 4), torch.ones(3, 4)
    assert Damping(1.0, 4)(before, after, True, 3) is after


@pytest.mark.parametrize("kind", DAMPINGS)
def test_rows_of_their_own_depths(kind):
    """As a lane engine has them: [N] of both; rows without a request have R = 0."""
    damping = Damping(kind, 4)
    for parameter in damping.parameters():
        nn.init.normal_(parameter)
    before, after = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    started, recurrences = torch.tensor([False, True, True, False, True]), torch.tensor([1, 2, 3, 4, 0])
    got = damping(before, after, started, recurrences)
    assert got.isfinite().all()
    for n in range(4):
        want = damping(before[n], after[n], bool(started[n]), int(recurrences[n]))
        torch.testing.assert_close(got[n], want, rtol=0, atol=1e-6)
    assert torch.equal(got[0], after[0]) == (kind != "selective")
    assert damping.bfloat16()(before.bfloat16(), after.bfloat16(), started, recurrences).dtype == torch.bfloat16


def test_a_share_of_one_is_exact_and_has_a_gradient():
    before, after = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    share = torch.ones(5, requires_grad=True)
    got = interpolate(before, after, share)
    assert torch.equal(got, after)
    got.sum().backward()
    torch.testing.assert_close(share.grad, after - before)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_padding_and_cache_change_nothing(damping):
    model, mask = build_damped(damping), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "num_recurrences": 4, **GREEDY}
    cached = model.generate(ids(), **options)
    assert torch.equal(cached, model.generate(ids(), use_cache=False, **options))
    assert torch.equal(cached[:1, 14:], model.generate(ids()[:1, 5:], num_recurrences=4, **GREEDY)[:, 9:])


@pytest.mark.parametrize("damping", ["learned", "selective"])
def test_it_is_saved_and_starts_at_one_half(damping, tmp_path):
    model = build_damped(damping)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.recurrence_damping == damping
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    new, half = type(model)(model.config).damping, Damping(0.5, 64)
    before, after = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(new(before, after, True, 3), half(before, after, True, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"grad_recurrences": 1}])
@pytest.mark.parametrize("damping", ["learned", "selective"])
def test_training(damping, options):
    """Recomputed recurrences or not, whole or truncated backpropagation: the gradient is the formula's."""
    model, gradients = build_damped(damping, injection="none").train(), []
    for recomputes in (False, True):
        model.checkpoint_recurrences = recomputes
        model.zero_grad()
        model(ids(), labels=ids(), **options).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.core.parameters()])
        gradients[-1] += [parameter.grad.clone() for parameter in model.damping.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert (gradients[0][-1] != 0).all()
    if not options:
        model.zero_grad()
        logits = by_hand(model, ids(), 3)
        model.loss_function(logits=logits, labels=ids(), vocab_size=logits.shape[-1]).backward()
        for parameter, want in zip(list(model.damping.parameters())[::-1], gradients[0][::-1], strict=False):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-7)
    model.zero_grad()
    model(ids(), labels=ids(), num_recurrences=1).loss.backward()  # as data-parallel training needs it
    for parameter in model.damping.parameters():
        assert parameter.grad.any() == (damping == "selective")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"recurrence_damping": value}, f"recurrence_damping={value!r}") for value in (0, -0.5, 1.5, True, "2/R")),
        ({"recurrence_damping": float("nan")}, "a finite number or a string"),
        ({"recurrence_damping": 0.5, "sharing": "sequence", "injection": "none"}, "recurrence_damping cannot"),
        ({"recurrence_damping": "1/R", "recurrence_residual": True}, "with no recurrence_residual"),
        (
            {"recurrence_damping": 0.5, "router": {"kind": "token"}, "max_recurrences": 3, "injection": "none"},
            "goes with no router",
        ),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_rows_of_one_call_have_the_share_of_their_own_depth(damping):
    """Also with gradients, as data.recurrences trains them."""
    model = build_damped(damping)
    got = model(ids(), num_recurrences=torch.tensor([2, 4]), use_cache=False).logits
    if damping == "learned":
        got.sum().backward()
        assert model.damping.weight.grad.abs().min() > 0
    for row, depth in enumerate((2, 4)):
        want = model(ids()[row : row + 1], num_recurrences=depth, use_cache=False).logits
        torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_is_read_at_the_depth_at_which_it_was_filled():
    model = build_damped("1/R")
    cache = model(ids(), num_recurrences=4, use_cache=True).past_key_values
    model(ids()[:, :1], num_recurrences=4, past_key_values=cache)
    with pytest.raises(ValueError, match="the cache was filled at 4, and this model's states depend on R"):
        model(ids()[:, :1], num_recurrences=2, past_key_values=cache)
