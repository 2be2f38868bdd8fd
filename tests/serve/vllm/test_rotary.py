"""Layers leave rotary position embedding to the engine's kernels, or keep it. test_lanes.py tests what they compute."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("triton") is None:
    pytest.skip("vLLM or Triton is not installed", allow_module_level=True)

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from loopwise.serve.vllm.rotary import Unrotated, take_rotary

SIZE = 16


class Layer(nn.Module):
    """One head of attention, which does `between` with a query between rotation and attention."""

    def __init__(self, number: int, rotary: Any, between: Any = lambda q: q):
        super().__init__()
        self.inner: Any = nn.Module()
        self.inner.rotary_emb = rotary
        self.between, self.number = between, number
        self.attention: Any = None

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.clone(), x.clone(), x
        if self.inner.rotary_emb is not None:
            q, k = self.inner.rotary_emb(positions, q, k)
        views = (t.view(len(x), 1, SIZE) for t in (self.between(q), k, v))
        return x + self.attention()(self.number, *views).flatten(1)


@pytest.fixture(scope="module")
def rotary():
    def make(**scaling: Any) -> Any:
        return get_rope(SIZE, 64, True, {"rope_theta": 10000.0, **scaling}, dtype=torch.float32)

    with set_current_vllm_config(VllmConfig()):
        yield make


def parts_of(layers: list[Layer]) -> Any:
    """The parts of a model of these core layers."""
    parts: Any = SimpleNamespace(
        by_part={"prelude": [], "core": layers, "coda": []},
        config=SimpleNamespace(hidden_size=SIZE),
        needs_tokens=False,
        router=None,
        caches=layers,
        attention=None,
    )

    def run(part: str, x: torch.Tensor, positions: torch.Tensor, *_: Any) -> torch.Tensor:
        for layer in parts.by_part[part]:
            x = layer(positions, x)
        return x

    for layer in layers:
        layer.attention = lambda: parts.attention
    parts.layers = run
    return parts


def test_layers_that_change_nothing_behind_it(rotary):
    """Layers of one kind share an embedding; each gives up its own use of it."""
    shared, other = rotary(), rotary(rope_type="linear", factor=2.0)
    layers = [Layer(0, shared), Layer(1, shared), Layer(2, other)]
    found: Any = take_rotary(parts_of(layers), torch.float32, torch.device("cpu"))
    assert all(isinstance(layer.inner.rotary_emb, Unrotated) for layer in layers)
    assert all(turned.halves and turned.cosines.shape[1] == SIZE for turned in found)
    assert torch.equal(found[1].cosines, shared.cos_sin_cache)
    assert torch.equal(found[2].cosines, other.cos_sin_cache)
    assert not shared._forward_hooks


@pytest.mark.parametrize(
    "between", [lambda q: q * 1.0, lambda q: q.mul_(2), lambda q: nn.functional.rms_norm(q, [SIZE]), lambda q: q + 0]
)
def test_layers_that_change_it(rotary, between):
    layers = [Layer(0, rotary()), Layer(1, rotary(), between), Layer(2, None)]
    found = take_rotary(parts_of(layers), torch.float32, torch.device("cpu"))
    assert [turned is not None for turned in found] == [True, False, False]
    assert layers[1].inner.rotary_emb is rotary()


def test_layers_of_a_routed_model(rotary):
    """Their tokens attend at their places among the chosen ones."""
    parts = parts_of([Layer(0, rotary())])
    parts.router = nn.Linear(1, 1)
    assert take_rotary(parts, torch.float32, torch.device("cpu")) == [None]


def test_embeddings_of_other_kinds(rotary):
    """Their forward is another function of positions."""
    multimodal = rotary(rope_type="default", mrope_section=[2, 3, 3])
    assert multimodal.forward_native.__func__ is not rotary().forward_native.__func__
    layers = [Layer(0, multimodal), Layer(1, rotary())]
    found = take_rotary(parts_of(layers), torch.float32, torch.device("cpu"))
    assert [turned is not None for turned in found] == [False, True]
