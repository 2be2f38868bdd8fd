"""Layers that differ between depths: equal to a plain model with every depth's weights merged and written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from tests.helpers.model import GREEDY, RELAXED_PARTS, build_relaxed, ids
from tests.helpers.tiny import source_config, source_model

LAYERS = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}


def written_out(model: Any, model_type: str, depths: list[int]) -> Any:
    """A plain source model: prelude, the core at each of `depths`, coda."""
    rank, own = RELAXED_PARTS[model_type]
    count = {"gpt2": "n_layer"}.get(model_type, "num_hidden_layers")
    plain = source_model(model_type, **{count: 2 + 2 * len(depths)})
    layers = plain.get_submodule(LAYERS[model_type])
    weights = {name.removeprefix("source."): w for name, w in model.state_dict().items() if name.startswith("source.")}
    plain.load_state_dict(weights, strict=False)
    layers[0].load_state_dict(model.prelude[0].state_dict())
    layers[-1].load_state_dict(model.coda[0].state_dict())
    for place, (depth, j) in enumerate((d, j) for d in depths for j in (0, 1)):
        merged = dict(model.core[j].state_dict())
        relaxation = model.relaxation[j]
        for path in own:
            merged[path] = relaxation.get_parameter(path)[depth]
        for path in rank:
            factors = relaxation.get_submodule(path)
            change = factors.lora_B[depth] @ factors.lora_A[depth]
            weight = merged[f"{path}.weight"]
            if model_type == "gpt2":
                weight = weight.T
            weight = weight + change
            if factors.dora_magnitude is not None:
                weight = weight / weight.norm(dim=1, keepdim=True) * factors.dora_magnitude[depth][:, None]
            merged[f"{path}.weight"] = weight.T if model_type == "gpt2" else weight
        layers[1 + place].load_state_dict(merged)
    return plain


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model_type", sorted(RELAXED_PARTS))
def test_equals_the_merged_weights_written_out(model_type, dora):
    model = build_relaxed(model_type, dora=dora)
    with torch.no_grad():
        for recurrences in (1, 2, 4):  # beyond the last depth, the last one's weights
            depths = [min(r, 1) for r in range(recurrences)]
            want = written_out(model, model_type, depths)(ids()).logits
            torch.testing.assert_close(model(ids(), num_recurrences=recurrences).logits, want, rtol=0, atol=2e-5)
        cached = model.generate(ids(), num_recurrences=3, **GREEDY)
        assert torch.equal(cached, model.generate(ids(), num_recurrences=3, use_cache=False, **GREEDY))


def test_gradient_checkpointing_changes_no_gradient():
    model = build_relaxed().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_saved_and_copied(tmp_path):
    model = build_relaxed(dora=True)
    model.save_pretrained(tmp_path)
    want = model(ids()).logits
    for again in (copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(again(ids()).logits, want)
    copied = copy.deepcopy(model)
    copied.relaxation[0].self_attn.q_proj.lora_B.data.zero_()
    assert torch.equal(model(ids()).logits, want)
    assert not torch.equal(copied(ids()).logits, want)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_relaxation_changes_nothing(dora):
    options: dict[str, Any] = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 3}
    rank, own = RELAXED_PARTS["llama"]
    relaxation: dict[str, Any] = {"depths": 2, "rank": rank, "own": own, "dora": dora}
    models: list[Any] = []
    for relaxed in (None, relaxation):
        torch.manual_seed(0)
        config = RecurrentDepthConfig(source_config=source_config("llama"), **options, relaxation=relaxed)
        models.append(RecurrentDepthForCausalLM(config).eval())
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    for j in (0, 1):
        for path in own:
            models[1].relaxation[j].get_parameter(path).data[:] = models[0].core[j].get_parameter(path).data
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids()).logits, models[0](ids()).logits, rtol=0, atol=1e-5)


def test_sequence_sharing_repeats_each_layer():
    options: dict[str, Any] = {"core": [1, 2], "prelude": [0], "coda": [3], "sharing": "sequence", "num_recurrences": 2}
    torch.manual_seed(0)
    model: Any = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source_config("llama"), **options)).eval()
    plain = source_model("llama")
    for layer, one in zip(
        plain.model.layers,
        [model.prelude[0], *(model.core[j] for j in (0, 0, 1, 1)), model.coda[0]],
        strict=True,
    ):
        layer.load_state_dict(one.state_dict())
    weights = {name.removeprefix("source."): w for name, w in model.state_dict().items() if name.startswith("source.")}
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, plain(ids()).logits)
        cached = model.generate(ids(), num_recurrences=3, **GREEDY)
        assert torch.equal(cached, model.generate(ids(), num_recurrences=3, use_cache=False, **GREEDY))
    with pytest.raises(ValueError, match="no states"):
        model(ids(), output_states=True)
