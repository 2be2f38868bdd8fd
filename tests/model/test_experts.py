"""Load balancing of a mixture of experts over recurrences, against transformers' model with the layers written out."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.model.modeling_source import causal_lm_class
from loopwise.unroll import config_with_layers
from tests.helpers.model import build, ids
from tests.helpers.tiny import ARCHITECTURES, named, source_config

# Others, such as DeepSeek-V3, have routers whose load transformers does not balance by a loss.
BALANCED = [
    kind
    for kind in ARCHITECTURES
    if "output_router_logits" in source_config(kind).to_dict()
    and "output_router_logits" in inspect.signature(causal_lm_class(source_config(kind)).forward).parameters
    and kind not in ("afmoe", "jetmoe")  # the first returns no such loss, the second one of its attention, too
]
FIELDS: dict[str, Any] = {
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
}


def models(kind: str, recurrences: int) -> tuple[Any, Any]:
    """A recurrent model of layers 1, 2 (core) and 3, and a plain one in which the core stands `recurrences` times."""
    source = source_config(kind, **FIELDS.get(kind, {}))
    fields = {"prelude": [], "core": [1, 2], "coda": [3], "injection": "none", "num_recurrences": recurrences}
    torch.manual_seed(0)
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source, **fields)).eval()
    layers = [*model.prelude, *([*model.core] * recurrences), *model.coda]
    config = config_with_layers(source, [*[1, 2] * recurrences, 3])
    plain = causal_lm_class(config)(config).eval()
    plain.load_state_dict(model.source.state_dict(), strict=False)
    for copied, layer in zip(plain.model.layers, layers, strict=True):
        copied.load_state_dict(layer.state_dict())
    return model, plain


@pytest.mark.parametrize("kind", named(BALANCED))
def test_router_logits_and_their_loss_are_those_of_the_layers_written_out(kind):
    model, plain = models(kind, 3)
    tokens, mask = ids(), torch.ones(2, 14, dtype=torch.long)
    mask[0, :4] = 0
    keys = {"input_ids": tokens, "attention_mask": mask, "labels": tokens, "output_router_logits": True}
    found, wanted = model(**keys, use_cache=False), plain(**keys, use_cache=False)
    assert len(found.router_logits) == len(wanted.router_logits) == 7
    for a, b in zip(found.router_logits, wanted.router_logits, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(found.aux_loss, wanted.aux_loss, atol=1e-5)
    assert found.aux_loss > 0
    assert torch.allclose(found.loss, wanted.loss, atol=1e-5)
    assert model(input_ids=tokens).router_logits is None


def test_experts_that_transformers_does_not_balance_are_refused():
    for kind in ("afmoe", "deepseek_v3", "jetmoe"):
        with pytest.raises(ValueError, match=f"this {kind} has no experts whose load it balances"):
            build(kind)(input_ids=ids(), output_router_logits=True, use_cache=False)


def test_every_kind_of_experts_is_tried():
    assert {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "flex_olmo", "gpt_oss"} <= {*BALANCED}


def test_gradients_reach_the_routers_of_every_layer():
    model = build("mixtral").train()
    tokens = ids()
    plain, balanced = (
        model(input_ids=tokens, labels=tokens, output_router_logits=on, use_cache=False) for on in (False, True)
    )
    assert torch.allclose(balanced.loss, plain.loss + model.config.router_aux_loss_coef * balanced.aux_loss)
    balanced.aux_loss.backward()
    gates = [p for name, p in model.named_parameters() if name.endswith("gate.weight") and "experts" not in name]
    assert len(gates) == 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gates)


@pytest.mark.parametrize("checkpointing", ["layer", "recurrence"])
def test_a_second_run_in_the_backward_pass_counts_once(checkpointing):
    model = build("mixtral").train()
    tokens = ids()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
        assert len(out.router_logits) == 8
        out.loss.backward()
        return [copy.deepcopy(p.grad) for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    if checkpointing == "layer":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.checkpoint_recurrences = True
    found = gradients()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_where_they_are_not_collected():
    tokens = ids()
    with pytest.raises(ValueError, match="this llama has no experts whose load it balances"):
        build()(tokens, output_router_logits=True)
    router = {"kind": "expert", "depths": 2}
    config = RecurrentDepthConfig(
        source_config=source_config("mixtral"), prelude=[0], core=[1], coda=[2], num_recurrences=2, router=router
    )
    for model, keys in (
        (RecurrentDepthForCausalLM(config).eval(), {"use_cache": False}),
        (build("mixtral"), {"output_depth_logits": True, "use_cache": False}),
    ):
        with pytest.raises(ValueError, match="output_router_logits goes with whole sequences"):
            model(tokens, output_router_logits=True, **keys)
    model = build("mixtral")
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="output_router_logits goes with whole sequences"):
        model(tokens[:, :1], past_key_values=cache, output_router_logits=True)
