"""Universal Transformers and AbbIE: encoding, residual and halting, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from loopwise.model.halting import halting_weights
from tests.helpers.model import GREEDY, build, ids


def encoding(position: int, recurrence: int, width: int) -> list[float]:
    values = []
    for channel in range(width):
        wave = math.cos if channel % 2 else math.sin
        frequency = 10000 ** (-(channel - channel % 2) / width)
        values.append(wave(position * frequency) + wave(recurrence * frequency))
    return values


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("encoded", [False, True])
def test_the_formula(residual, encoded):
    model = build(
        injection="none", recurrence_residual=residual, recurrence_encoding="sinusoidal" if encoded else "none"
    )
    tokens = ids()
    llama = model.source.model
    with torch.no_grad():
        if encoded:
            assert not model.recurrence_encoding.weight.any()  # at first nothing
            torch.nn.init.normal_(model.recurrence_encoding.weight)
        x = llama.embed_tokens(tokens)
        rotary = llama.rotary_emb(x, torch.arange(14)[None])

        def run(layers, x):
            for layer in layers:
                x = layer(x, attention_mask=None, position_embeddings=rotary)
            return x

        s = run(model.prelude, x)
        for r in (1, 2, 3):
            before = s
            if encoded:
                waves = torch.tensor([encoding(i, r, 64) for i in range(14)])
                s = s + model.recurrence_encoding.weight * waves
            s = run(model.core, s)
            if residual and r > 1:
                s = s + before
        want = model.source.lm_head(llama.norm(run(model.coda, s)))
        torch.testing.assert_close(model(tokens).logits, want, rtol=0, atol=2e-5)
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[:, :3] = 0
        padded = model(torch.cat([tokens[:, :3], tokens], 1), attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(padded, want, rtol=0, atol=2e-5)
    assert torch.equal(model.generate(tokens, **GREEDY), model.generate(tokens, use_cache=False, **GREEDY))


def test_halting_weights_token_by_token():
    logits = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0)) - 0.5
    weights, ponder = halting_weights(logits, 0.01)
    for b in range(2):
        for t in range(7):
            total, want, r = 0.0, [0.0] * 5, 0
            for r, h in enumerate(torch.sigmoid(logits[:, b, t]).tolist()):
                if total + h >= 0.99 or r == 4:
                    want[r] = 1 - total
                    break
                want[r] = h
                total += h
            assert weights[:, b, t].tolist() == pytest.approx(want, abs=1e-6)
            assert ponder[b, t].item() == pytest.approx(r + 1 + want[r], abs=1e-5)


def test_halting_reads_out_the_weighted_mean():
    model = build(injection="none", halting="act", num_recurrences=4)
    torch.nn.init.normal_(model.halting_gate.weight, std=1.0)
    tokens = ids()
    with torch.no_grad():
        out = model(tokens, output_states=True, output_depth_logits=True)
        gates = torch.stack([model.halting_gate(s).squeeze(-1) for s in out.states])
        weights, ponder = halting_weights(gates, 0.01)
        assert torch.equal(out.ponder, ponder)
        assert len(set(ponder.flatten().long().tolist())) > 1  # tokens do halt at different depths
        torch.testing.assert_close(out.state, (weights[..., None] * out.states).sum(0))
        for r in (1, 2, 3):
            torch.testing.assert_close(
                out.depth_logits[r - 1], model(tokens, num_recurrences=r).logits, rtol=0, atol=2e-5
            )
        assert torch.equal(model(tokens, num_recurrences=1).state, out.states[0])
    assert torch.equal(model.generate(tokens, **GREEDY), model.generate(tokens, use_cache=False, **GREEDY))
    model.train()
    model(tokens).ponder.mean().backward()
    assert model.halting_gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"halting": "pondernet"}, "choose from none, act"),
        ({"recurrence_encoding": "learned"}, "choose from none, sinusoidal"),
        ({"halting": "act", "halting_epsilon": 1.0}, "halting_epsilon=1.0: a number between 0 and 1"),
        ({"recurrence_residual": True, "sharing": "sequence"}, "recurrence_residual cannot"),
        ({"halting": "act", "router": {"kind": "token"}}, "a router goes with no"),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        build(injection="none", **fields)
