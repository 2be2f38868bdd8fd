"""Adapters on every kind of linear module: merged weights compute the same, and wrong targets are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from loopwise.errors import UserError
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.train import adapters
from loopwise.train.recipe import Adapters
from tests.helpers.tiny import source_config, source_model

# architecture: targets (None: the defaults). Conv1D, fused projections, experts in one parameter, subclasses.
KINDS: list[tuple[str, list[str] | None]] = [
    ("llama", None),
    ("gpt2", None),
    ("gpt2", ["c_attn", "c_proj", "c_fc"]),
    ("gpt_bigcode", None),
    ("gpt_neo", None),
    ("gpt_neox", None),
    ("bloom", None),
    ("falcon", None),
    ("mpt", None),
    ("phi3", ["qkv_proj", "gate_up_proj"]),
    ("mixtral", None),
    ("gpt_oss", None),
    ("qwen2_moe", None),
    ("granitemoe", None),
    ("opt", None),
]


def recurrent(arch: str) -> Any:
    keys = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 2, "injection": "linear"}
    return RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source_config(arch), **keys)).eval()


@pytest.mark.parametrize("make", [source_model, recurrent], ids=["plain", "recurrent"])
@pytest.mark.parametrize(("arch", "targets"), KINDS)
def test_merged_weights_compute_what_ran(arch, targets, make):
    torch.manual_seed(0)
    model = make(arch)
    merged = copy.deepcopy(model)
    keys = Adapters(rank=3, alpha=4.0, targets=targets)
    adapters.inject(model, keys, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
        ids = torch.arange(3, 15)[None]
        before = merged(ids, use_cache=False).logits
        live = model.eval()(ids, use_cache=False).logits
        state = adapters.merged(model.state_dict(), keys, adapters.transposed(model))
        merged.load_state_dict(state)
        after = merged(ids, use_cache=False).logits
    assert (live - before).abs().max() > 1e-2
    assert torch.allclose(after, live, atol=2e-4, rtol=1e-4)


def test_what_dora_norms_takes_no_adapter():
    """W + B A has another norm than W, by which the magnitudes were divided."""
    relaxation = {"rank": {"self_attn.q_proj": 2}, "depths": 2, "own": [], "dora": True}
    keys = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 2, "injection": "linear"}
    config = RecurrentDepthConfig(source_config=source_config("llama"), **keys, relaxation=relaxation)
    for targets in (None, ["q_proj"], ["self_attn.q_proj", "v_proj"]):
        with pytest.raises(UserError, match=r"^adapters: q_proj have LoRA with dora .*optimiser\.train=lora,norms"):
            adapters.inject(RecurrentDepthForCausalLM(config), Adapters(targets=targets), None)
    adapters.inject(RecurrentDepthForCausalLM(config), Adapters(targets=["v_proj"]), None)
    config.relaxation = {**relaxation, "dora": False}
    adapters.inject(RecurrentDepthForCausalLM(config), Adapters(targets=["q_proj"]), None)


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        ("mixtral", "gate_up_proj"),  # of experts: a parameter
        ("gpt_oss", "down_proj"),
        ("llama", "lm_head"),
        ("llama", "embed_tokens"),
        ("gpt2", "wte"),
        ("gpt2", "q_proj"),
        ("llama", "input_layernorm"),
    ],
)
def test_what_takes_no_adapter_is_named(arch, target):
    model = source_model(arch)
    good = "c_attn" if arch == "gpt2" else "q_proj"
    with pytest.raises(UserError, match=rf"adapters\.targets={target}: no linear module of a layer .* {good}"):
        adapters.inject(model, Adapters(targets=[good, target]), None)
