"""Mixture-of-Recursions: equal to its formula token by token, causal where it says so, the same with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

from loopwise.model import RecurrentDepthConfig
from loopwise.model.configuration_router import router_fields
from tests.helpers import model as helpers
from tests.helpers.model import GREEDY, ids
from tests.helpers.tiny import source_config

EXPERT = {"kind": "expert", "thresholds": [0.45, 0.5, 0.5], "alpha": 0.7}
TOKEN = {"kind": "token"}
CAUSAL: dict[str, dict[str, Any]] = {
    "expert": EXPERT,
    "expert-auxiliary": {**EXPERT, "auxiliary": True, "network": "mlp", "gate": "tanh", "temperature": 2.0},
    "expert-first": {**EXPERT, "kv": "first-recursion"},
    "token": TOKEN,
    "token-sigmoid": {**TOKEN, "gate": "sigmoid", "alpha": 0.8, "network": "mlp"},
    "token-first": {**TOKEN, "kv": "first-recursion"},
}
TOPK: dict[str, dict[str, Any]] = {
    "topk": {**EXPERT, "inference": "topk", "capacity": [0.9, 0.6, 0.2]},
    "topk-first": {**EXPERT, "inference": "topk", "capacity": [0.9, 0.6, 0.2], "kv": "first-recursion"},
}
STEP: dict[str, dict[str, Any]] = {
    "expert-step": {**EXPERT, "update": "step", "alpha": 1.4},
    "token-step": {**TOKEN, "update": "step", "alpha": 1.5, "kv": "first-recursion"},
}
SOURCES = ("llama", "gemma3_text", "mistral", "gpt2", "gpt_neox", "gpt_neo", "bloom", "opt", "xglm")


def build(router: dict[str, Any], model_type: str = "llama", **fields: Any) -> Any:
    model = helpers.build(model_type, **{"injection": "none", "router": router, **fields})
    torch.manual_seed(1)
    for parameter in model.router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def by_hand(model: Any, tokens: torch.Tensor, topk: bool) -> torch.Tensor:
    """Logits [T, V] of one sequence [T], for a Llama: every token's choice by a loop, attention by an explicit mask."""
    llama, fields, count = model.source.model, model.config.router, len(tokens)
    x = llama.embed_tokens(tokens[None])
    rotary = llama.rotary_emb(x, torch.arange(count)[None])
    causal = torch.ones(count, count).tril().bool()
    first: dict[int, Any] = {}

    def run(layers: Any, x: torch.Tensor, mask: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        for j, layer in enumerate(layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (getattr(attention, f"{name}_proj")(normed).view(1, count, -1, 32) for name in "qkv")
            q, k = (t * rotary[0][:, :, None] + _rotated(t) * rotary[1][:, :, None] for t in (q, k))
            if depth is not None and fields["kv"] == "first-recursion":
                k, v = first.setdefault(j, (k, v))
            scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 32**0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            mixed = torch.einsum("bhqk,bkd->bqhd", weights.nan_to_num(), v[:, :, 0]).flatten(2)
            x = x + attention.o_proj(mixed)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x

    def score(network: nn.Module, s: torch.Tensor) -> torch.Tensor:
        return network(s / fields["temperature"])[0]

    s = run(model.prelude, x, causal)
    chosen, start = list(range(count)), s
    logits = gates = torch.zeros(count, fields["depths"])
    depths = [0] * count
    if fields["kind"] == "token":
        gate = getattr(torch, fields["gate"])
        logits = score(model.router.networks[0], s)
        gates = (gate(logits, -1) if fields["gate"] == "softmax" else gate(logits)) * fields["alpha"]
        depths = [int((gates[t] + model.router.bias).argmax()) for t in range(count)]
    for r in range(fields["depths"]):
        if fields["kind"] == "token":
            chosen = [t for t in range(count) if depths[t] >= r]
        else:
            logits = score(model.router.networks[r], s)[:, 0]
            by = score(model.router.auxiliary[r], s)[:, 0] if fields["auxiliary"] and not topk else logits
            best = sorted(chosen, key=lambda t: -by[t].item())
            best = best[: int(fields["capacity"][r] * count)]
            passing = [t for t in chosen if torch.sigmoid(by[t]) >= fields["thresholds"][r]]
            chosen = sorted(best) if topk else passing
        mask = causal.clone()
        if fields["kv"] == "recursion-wise":
            mask &= torch.tensor([t in chosen for t in range(count)])
        y = run(model.core, s, mask, depth=r)
        new = s.clone()
        for t in chosen:
            if fields["kind"] == "expert":
                weight = fields["alpha"] * getattr(torch, fields["gate"])(logits[t])
                new[0, t] = added(fields, s[0, t], weight, y[0, t])
            else:
                new[0, t] = added(fields, start[0, t], gates[t, r], y[0, t]) if depths[t] == r else y[0, t]
        s = new
    return model.source.lm_head(llama.norm(run(model.coda, s, causal)))[0]


def added(fields: dict[str, Any], s: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (1 - weight) * s + weight * y if fields["update"] == "step" else s + weight * y


def _rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


@pytest.mark.parametrize("name", [*CAUSAL, *TOPK, *STEP])
def test_the_formula(name):
    model = build({**CAUSAL, **TOPK, **STEP}[name])
    if "token" in name:
        model.router.bias[:] = torch.tensor([0.1, -0.1, 0.1])
    with torch.no_grad():
        out = model(ids(3), use_cache=False)
        for row, tokens in enumerate(ids(3)):
            torch.testing.assert_close(out.logits[row], by_hand(model, tokens, name in TOPK), rtol=0, atol=1e-5)
    shares = out.router_outputs.selected.float().mean((0, 1))
    assert shares[0] > shares[-1] > 0  # the routers do choose


@pytest.mark.parametrize("network", ["linear", "mlp"])
@pytest.mark.parametrize("kind", ["expert", "expert-sigmoid", "token", "token-sigmoid"])
def test_a_router_of_steps_starts_as_the_recursion_without_one(kind, network):
    """Bit for bit, where all tokens are chosen. Logits are zero: thresholds of one half let all pass; token-choice
    takes the first depth, or the one that its bias names."""
    choice, _, gate = kind.partition("-")
    fields: dict[str, Any] = {"injection": "none", "router": {"kind": choice, "update": "step", "network": network}}
    if gate:
        fields["router"]["gate"] = gate
    routed, plain = helpers.build(**fields), helpers.build(injection="none")
    routed.router.reset_parameters(0.02)  # the helper draws all matrices
    plain.load_state_dict({name: x for name, x in routed.state_dict().items() if not name.startswith("router.")})
    with torch.no_grad():
        for r in (1, 2, 3):
            depth = {"num_recurrences": r}
            if choice == "token":
                routed.router.bias[:] = torch.eye(3)[r - 1]
                depth = {}
            got = routed(ids(), **depth, use_cache=False)
            assert got.router_outputs.selected.sum(-1).eq(r).all()
            assert torch.equal(got.logits, plain(ids(), num_recurrences=r).logits)
        if choice == "token":
            routed.router.bias.zero_()
            assert torch.equal(routed(ids(), use_cache=False).logits, plain(ids(), num_recurrences=1).logits)
    routed.train()
    routed(ids(), labels=ids(), **({} if choice == "token" else {"router_capacity": [1, 1, 1]})).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in routed.router.parameters())


@pytest.mark.parametrize("depths", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
def test_weights_of_steps_are_one_at_the_start(depths):
    for given in ({"kind": "expert"}, {"kind": "token"}, {"kind": "token", "gate": "sigmoid"}):
        fields = router_fields({"depths": depths, "update": "step", **given})
        gates = torch.zeros(depths).softmax(-1) if fields["gate"] == "softmax" else torch.zeros(depths).sigmoid()
        assert (gates * fields["alpha"] == 1).all()
    assert router_fields({"kind": "expert", "depths": depths, "update": "step", "alpha": 0.5})["alpha"] == 0.5


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("model_type", SOURCES)
def test_causal_and_the_same_with_a_cache(name, model_type):
    model, tokens = build(CAUSAL[name], model_type), ids(length=20)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    with torch.no_grad():
        want = model(tokens, attention_mask=mask, use_cache=False)
        for ends in ([20], [9, 12, 13, 20], range(1, 21)):
            cache, begin = None, 0
            for end in ends:
                out = model(tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
                at = mask[:, begin:end].bool()
                torch.testing.assert_close(out.logits[at], want.logits[:, begin:end][at], rtol=0, atol=2e-5)
                assert torch.equal(out.router_outputs.selected, want.router_outputs.selected[:, begin:end])
                cache, begin = out.past_key_values, end
        alone = model(tokens[:1, 5:15], use_cache=False).logits
        if model_type not in ("gpt2", "gpt_neo", "xglm"):  # their learned positions count padding
            torch.testing.assert_close(want.logits[:1, 5:15], alone, rtol=0, atol=2e-5)
    assert want.router_outputs.selected.float().mean() < 1
    assert not want.router_outputs.selected[0, :5].any()


@pytest.mark.parametrize("name", TOPK)
def test_topk_takes_the_capacity_of_every_sequence_by_itself(name):
    model, tokens = build(TOPK[name]), ids(length=20)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    with torch.no_grad():
        out = model(tokens, attention_mask=mask)
        assert out.past_key_values is None
        assert out.router_outputs.selected.sum(1).tolist() == [[13, 9, 3], [18, 12, 4]]
        torch.testing.assert_close(out.logits[:1, 5:], model(tokens[:1, 5:]).logits, rtol=0, atol=1e-5)
        assert (model(tokens[:, :15]).logits - out.logits[:, :15])[1].abs().max() > 1e-3  # as in the paper: not causal
        uncached = model.generate(tokens, use_cache=False, attention_mask=mask, **GREEDY)
        assert uncached.shape == (2, 28)
        with pytest.raises(ValueError, match="use_cache=False, or calibrate"):
            model.generate(tokens, **GREEDY)


@pytest.mark.parametrize("name", ["expert", "expert-first", "token", "token-first"])
def test_generates_the_same_with_every_cache(name):
    model, tokens = build(CAUSAL[name], "mistral"), ids()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, **GREEDY}
    want = model.generate(**inputs, use_cache=False)
    assert torch.equal(want, model.generate(**inputs))
    looked_up = model.generate(tokens[1:], prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(looked_up, want[1:])
    for static_model in (
        model,
        build(CAUSAL[name], "llama", prelude=[]),
    ):  # with a window, and one that counts in tensors
        static = StaticCache(config=static_model.config, max_cache_len=32)
        want = static_model.generate(**inputs, use_cache=False)
        assert torch.equal(want, static_model.generate(**inputs, past_key_values=static))
    beams = [model.generate(**inputs, num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)


def test_only_the_chosen_tokens_are_computed():
    model, counts = build({**EXPERT, "capacity": [1.0, 0.5, 0.25]}).train(), []
    model.core[0].mlp.register_forward_hook(lambda _, args, out: counts.append(args[0].shape[1]))
    out = model(ids(length=16))
    assert counts == [16, 8, 4]
    assert out.router_outputs.candidates.sum(1).tolist() == [[16, 16, 8]] * 2
    counts.clear()
    model(ids(length=16), router_capacity=[1, 1, 0.75])
    assert counts == [16, 16, 12]
    model.eval()
    with torch.no_grad():  # one sequence, token by token: a token that is not chosen costs nothing
        counts.clear()
        cache = model(ids(1, 15)).past_key_values
        counts.clear()
        seen = model(ids(1, 16)[:, 15:], past_key_values=cache).router_outputs.selected.sum()
    assert len(counts) == seen < 3


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
@pytest.mark.parametrize("name", ["expert-auxiliary", "expert-first", "token", "token-first"])
def test_training(name, model_type):
    model = build(CAUSAL[name], model_type).train()
    mask = torch.ones_like(ids())
    mask[1, -4:] = 0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        if checkpointing and "first" in name:
            with pytest.raises(ValueError, match="does not go with it"):
                model(ids())
            break
        out = model(ids(), attention_mask=mask, labels=ids().masked_fill(mask == 0, -100))
        loss, routed = out.loss, out.router_outputs
        if routed.auxiliary_logits is not None:
            chosen = routed.selected[routed.candidates].float()
            loss = loss + nn.functional.binary_cross_entropy_with_logits(
                routed.auxiliary_logits[routed.candidates], chosen
            )
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients[0])
    for a, b in zip(*gradients, strict=True) if len(gradients) == 2 else ():
        assert torch.equal(a, b)


def test_saved_and_injected(tmp_path):
    model = build(EXPERT, injection="linear", recurrence_norm="each", state_init="zeros")
    with torch.no_grad():
        out = model(ids(), use_cache=False)
        torch.testing.assert_close(model(ids(), use_cache=True).logits, out.logits, rtol=0, atol=1e-5)
        assert torch.equal(model(ids(), num_recurrences=2).state, model(ids(), output_states=True).states[1])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.router == model.config.router
    assert torch.equal(again(ids(), use_cache=False).logits, out.logits)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kind": "both"}, "router.kind='both': choose from expert, token"),
        ({"kind": "expert", "capacity": [1.0, 0.5, 0.0]}, r"every capacity is in \(0, 1\]"),
        ({"kind": "expert", "capacity": [1.5, 0.5, 0.1]}, r"every capacity is in \(0, 1\]"),
        ({"kind": "expert", "capacity": [0.5, 0.6, 0.1]}, "none is above the one before"),
        ({"kind": "expert", "capacity": [1.0, 0.5]}, "3 numbers, one for each recurrence"),
        ({"kind": "expert", "thresholds": [0.5, 0.5, 2]}, r"numbers in \[0, 1\]"),
        ({"kind": "expert", "gate": "softmax"}, "choose from sigmoid, tanh"),
        ({"kind": "expert", "alpha": 0}, "router.alpha=0: a finite number above 0"),
        ({"kind": "expert", "update": "mix"}, "router.update='mix': choose from add, step"),
        ({"kind": "expert", "update": "step", "gate": "tanh"}, "its weights start at 0, and not at 1"),
        ({"kind": "token", "capacity": [1.0, 0.5, 0.1]}, "router.capacity is no field of a router of kind 'token'"),
        ({"kind": "token", "depths": 0}, "router.depths=0: an integer, at least 1"),
    ],
)
def test_bad_routers(router, message):
    fields: dict[str, Any] = {"core": [0, 1], "num_recurrences": 3}
    with pytest.raises(ValueError, match=message):
        RecurrentDepthConfig(source_config=source_config("llama"), router=router, **fields)


def test_bad_calls():
    expert, token = build(EXPERT), build(TOKEN)
    with pytest.raises(ValueError, match="num_recurrences=4: this model's expert-choice router has 3"):
        expert(ids(), num_recurrences=4)
    with pytest.raises(ValueError, match="num_recurrences=2: this model's token-choice router has 3"):
        token(ids(), num_recurrences=2)
    with pytest.raises(ValueError, match="router_capacity is for expert-choice"):
        token(ids(), router_capacity=[1, 1, 1])
    with pytest.raises(ValueError, match="every capacity is in"):
        expert(ids(), router_capacity=[1, 1, 0])
    with pytest.raises(ValueError, match="sharing='sequence'"):
        build(EXPERT, sharing="sequence")
