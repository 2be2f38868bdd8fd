"""Time conditioning: equal to its formula, in any source architecture; trained, saved, the same with a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from loopwise.serve import Engine, Params
from tests.helpers.model import GREEDY, build, ids

NAMES = {"scale": ["input_layernorm", "post_attention_layernorm"], "gate": ["self_attn.o_proj", "mlp.down_proj"]}


def build_timed(**fields: Any) -> Any:
    model = build(time_conditioning={**NAMES, "frequencies": 8}, injection="none", **fields)
    for parameter in model.time_conditioning.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def waves(time: float) -> torch.Tensor:
    angles = torch.tensor([time * 10_000 ** (-n / 4) for n in range(4)])
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])


def by_hand(model: Any, tokens: torch.Tensor, recurrences: int) -> torch.Tensor:
    """The logits of a Llama, its core's layers spelled out."""
    llama, timed = model.source.model, model.time_conditioning
    x = llama.embed_tokens(tokens)
    rotary = llama.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    for layer in model.prelude:
        x = layer(x, attention_mask=None, position_embeddings=rotary)
    for r in range(recurrences):
        c = nn.functional.silu(timed.time(waves(r / recurrences)) + timed.step(waves(1 / recurrences)))
        for layer, factors in zip(model.core, timed.layers, strict=True):
            norms = [1 + factors.scale[name](c) for name in NAMES["scale"]]
            gates = [factors.gate[name.replace(".", "-")](c) for name in NAMES["gate"]]
            layer._forward_pre_hooks_with_kwargs.clear()
            saved = [(m, dict(m._forward_hooks)) for m in layer.modules()]
            for module, _ in saved:
                module._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
            h = layer.input_layernorm(x) * norms[0]
            x = x + gates[0] * layer.self_attn(h, attention_mask=None, position_embeddings=rotary)[0]
            x = x + gates[1] * layer.mlp(layer.post_attention_layernorm(x) * norms[1])
    for layer in model.coda:
        x = layer(x, attention_mask=None, position_embeddings=rotary)
    return model.source.lm_head(llama.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("recurrences", [1, 3])
def test_the_formula(recurrences):
    got = build_timed()(ids(), num_recurrences=recurrences).logits
    torch.testing.assert_close(got, by_hand(build_timed(), ids(), recurrences), rtol=0, atol=1e-5)
    assert (got - build(injection="none")(ids(), num_recurrences=recurrences).logits).abs().max() > 1e-2


@torch.no_grad()
def test_it_starts_as_none_and_is_saved(tmp_path):
    model = build_timed()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits, rtol=0, atol=1e-5)
    new = type(model)(model.config).eval()
    new.load_state_dict({k: v for k, v in model.state_dict().items() if "time_cond" not in k}, strict=False)
    plain = build(injection="none")
    plain.load_state_dict(new.state_dict(), strict=False)
    assert torch.equal(new(ids(), num_recurrences=3).logits, plain(ids(), num_recurrences=3).logits)


@torch.no_grad()
def test_rows_padding_cache_and_lanes():
    model, mask = build_timed(), torch.ones(2, 14, dtype=torch.long)
    rows = model(ids(), num_recurrences=torch.tensor([1, 4]), use_cache=False).logits
    for row, depth in enumerate((1, 4)):
        want = model(ids()[row : row + 1], num_recurrences=depth).logits[0]
        torch.testing.assert_close(rows[row], want, rtol=0, atol=1e-5)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "num_recurrences": 4, **GREEDY}
    cached = model.generate(ids(), **options)
    assert torch.equal(cached, model.generate(ids(), use_cache=False, **options))
    prompts, depths = [ids()[0, 5:].tolist(), ids()[1].tolist()], (4, 2)
    want = [
        model.generate(torch.tensor([p]), num_recurrences=d, **GREEDY) for p, d in zip(prompts, depths, strict=True)
    ]
    engine = Engine(model, max_num_seqs=2, max_model_len=40)
    count = want[0].shape[1] - len(prompts[0])
    replies = engine.generate(prompts, [Params(count, d, temperature=0, ignore_eos=True) for d in depths])
    for prompt, text, reply in zip(prompts, want, replies, strict=True):
        assert list(reply.tokens) == text[0, len(prompt) :].tolist()


def test_training():
    """Recurrences, or layers, that are recomputed in the backward pass meet their own factors again."""
    gradients = []
    for recomputes in ("nothing", "recurrences", "layers"):
        model = build_timed().train()
        model.checkpoint_recurrences = recomputes == "recurrences"
        if recomputes == "layers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(), labels=ids(), num_recurrences=3).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, want in gradients[0].items():
        assert want.any(), name
        assert all(torch.equal(other[name], want) for other in gradients[1:]), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scales": []}, "time_conditioning.scales is no field of a time conditioning: it has scale, gate"),
        ({"gate": "mlp"}, "time_conditioning.gate='mlp': a list of names of modules"),
        ({"frequencies": 7}, "time_conditioning.frequencies=7: an even integer"),
    ],
)
def test_wrong_fields_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        build(time_conditioning=given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": {"kind": "token"}, "max_recurrences": 3}, "a router goes with no .*time_conditioning"),
        ({"sharing": "sequence"}, "time_conditioning cannot"),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        build_timed(**fields)


def test_an_adapter_is_multiplied_with_its_module():
    """PEFT puts its own module around the linear one: merged, the model is the one that was trained."""
    from peft import LoraConfig, inject_adapter_in_model

    model = build_timed().eval()
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["o_proj", "down_proj"]), model)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        want = adapted(ids(), num_recurrences=2).logits
        plain = build_timed().eval()(ids(), num_recurrences=2).logits
        parts: list[Any] = list(adapted.modules())
        for part in parts:
            if hasattr(part, "merge") and hasattr(part, "lora_A"):
                part.merge()
        merged = adapted(ids(), num_recurrences=2).logits
    assert (want - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, want, rtol=0, atol=1e-4)


def test_modules_that_are_replaced_after_loading_keep_their_factors():
    """As quantisation replaces them."""
    model = build_timed().eval()
    with torch.no_grad():
        want = model(ids(), num_recurrences=2).logits
        for layer in model.core:
            new = nn.Linear(layer.mlp.down_proj.in_features, layer.mlp.down_proj.out_features, bias=False)
            new.load_state_dict(layer.mlp.down_proj.state_dict())
            layer.mlp.down_proj = new
        torch.testing.assert_close(model(ids(), num_recurrences=2).logits, want, rtol=0, atol=0)


def test_it_goes_with_no_relaxation():
    with pytest.raises(ValueError, match="time_conditioning goes with no relaxation"):
        build_timed(relaxation={"depths": 2, "rank": {"mlp.up_proj": 2}, "own": [], "dora": False})


def test_a_relaxed_layer_whose_linear_module_is_gone_is_refused():
    model = build(relaxation={"depths": 2, "rank": {"mlp.up_proj": 2}, "own": [], "dora": False}).eval()
    model.core[0].mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(ValueError, match=r"mlp.up_proj of a core layer was replaced by a Linear"):
        model(ids())
