"""Layers that keep more than keys and values: a state, or an indexer's keys, for every layer and depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.helpers.model import GREEDY, build, ids
from tests.helpers.tiny import keeping_more, named, with_state

ONE_BY_ONE = {"jamba"}  # its layers are wrong in transformers for several tokens behind a state
KINDS = ["lfm2", "qwen3_5_text"]  # a convolution's inputs, and a recurrent state beside them


@pytest.mark.parametrize("model_type", named([*keeping_more(), "deepseek_v3", "gemma4_text"]))
def test_tokens_behind_a_cache_are_those_of_a_full_pass(model_type):
    model = build(model_type, core=[1, 2], coda=[3, 5])
    mask = torch.ones(2, 14, dtype=torch.long)
    if model_type != "minimax_m3_vl_text":  # chooses blocks of slots, which padding shifts in transformers, too
        mask[0, :5] = 0
    places, seen = (mask.cumsum(1) - 1).clamp(min=0), mask.bool()  # Bamba counts none of its own behind a cache
    sizes = [6, *[1] * 8] if model_type in ONE_BY_ONE else [6, 4, *[1] * 4]
    with torch.no_grad():
        for recurrences in (3, 10):  # deeper than max_recurrences, too
            keys = {"num_recurrences": recurrences, "use_cache": True}
            whole = model(ids(), attention_mask=mask, position_ids=places, **{**keys, "use_cache": False}).logits
            parts, cache, end = list[torch.Tensor](), None, 0
            for part, at in zip(ids().split(sizes, dim=1), places.split(sizes, dim=1), strict=True):
                end += part.shape[1]
                out = model(part, attention_mask=mask[:, :end], position_ids=at, past_key_values=cache, **keys)
                cache = out.past_key_values
                parts.append(out.logits)
            most = whole[seen].abs().max().item()  # recurrences without a norm let rounding grow
            torch.testing.assert_close(torch.cat(parts, 1)[seen], whole[seen], rtol=0, atol=5e-4 * most)


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}])
def test_ways_of_generating_do_not_depend_on_the_cache(model_type, options):
    model = build(model_type)
    without = {name: value for name, value in options.items() if name != "cache_implementation"}
    wanted = model.generate(ids(), use_cache=False, **GREEDY, **without)
    assert torch.equal(model.generate(ids(), **GREEDY, **options), wanted)


STATEFUL = {*with_state()} - {"lfm2", "lfm2_moe", "inkling_text"}  # a convolution's inputs can be cut, a state cannot


@pytest.mark.parametrize("depth", [3, 10])  # deeper than max_recurrences, too
@pytest.mark.parametrize("by", ["prompt", "model"])
@pytest.mark.parametrize("model_type", named([*with_state(), "gemma3_text"]))
def test_proposed_tokens_are_taken_back_or_refused(model_type, by, depth):
    """By looking up the prompt, and by a smaller model, here of another seed: as in transformers."""
    model, prompt = build(model_type, core=[1, 2], coda=[3, 5]), ids(1, 6).repeat(1, 2)
    model.config.num_recurrences = depth
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if by == "model":
        options = {"assistant_model": build(model_type, core=[1, 2], coda=[3, 5])}
        for parameter in options["assistant_model"].parameters():  # so that it is right now and then
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if model_type in STATEFUL:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(prompt, **GREEDY, **options)
    else:
        wanted = model.generate(prompt, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(prompt, **GREEDY, **options), wanted)


@pytest.mark.parametrize("layers", [{"core": [2, 3]}, {"prelude": [2], "core": [0, 1]}])  # with attention, and without
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_state_is_read_no_deeper_than_every_call_before(layers, kind):
    model, one = build("qwen3_5_text", **layers), ids()[:, :1]
    cache = kind(config=model.config, **({"max_cache_len": 32} if kind is StaticCache else {}))
    with torch.no_grad():
        model(ids(), past_key_values=cache, num_recurrences=3)
        model(one, past_key_values=cache, num_recurrences=2)
        with pytest.raises(ValueError, match="only up to depth 2"):
            model(one, past_key_values=cache, num_recurrences=3)
        model(one, past_key_values=cache, num_recurrences=2)
        cache.reset()
        again = model(ids(), past_key_values=cache, num_recurrences=3).logits
        torch.testing.assert_close(again, model(ids(), num_recurrences=3, use_cache=False).logits, rtol=0, atol=1e-4)


def test_caches_and_layers_without_a_place_for_a_state_are_refused():
    model = build("qwen3_5_text")
    with pytest.raises(ValueError, match="make it with config=model"):
        model(ids(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"no attention layer \(0 linear_attention\)"):
        build("qwen3_5_text", prelude=[0], core=[1], coda=[3])
