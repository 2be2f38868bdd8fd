"""The config: nothing of the source's files leaks into it, and nothing is saved that cannot be loaded."""

from __future__ import annotations

import json

import pytest

from loopwise.model import RecurrentDepthConfig
from tests.helpers.tiny import source_config


def build(model_type: str = "llama", **fields) -> RecurrentDepthConfig:
    given = {"source_config": source_config(model_type), "prelude": [0], "core": [1, 2], "coda": [3], "exit_gate": True}
    return RecurrentDepthConfig(**{**given, **fields})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source_config", None), ("prelude", [9]), ("prelude", [True]), ("core", []), ("core", ["1"]), ("coda", "3"),
        ("num_recurrences", 0), ("num_recurrences", 9), ("num_recurrences", 2.0), ("max_recurrences", -1),
        ("state_init", "ones"), ("state_std", "small"), ("state_std", float("nan")), ("state_std", -1.0),
        ("state_seed", 1.5), ("injection", "mix"), ("sharing", "all"), ("recurrence_norm", 3),
        ("recurrence_damping", 0), ("recurrence_damping", "half"), ("recurrence_damping", None),
        ("recurrence_residual", "yes"), ("recurrence_encoding", "rotary"), ("halting", "never"), ("halting_epsilon", 2),
        ("exit_gate", 1), ("relaxation", {"a": 1}), ("relaxation", {"depths": 0, "rank": {}, "own": []}),
        ("relaxation", {"depths": 2, "rank": {"x": "4"}, "own": []}), ("router", {"kind": "best"}),
        ("router", ["expert"]), ("kv_policy", "modulo-0"), ("exit", {"rule": "often"}),
        ("exit", {"rule": "kl", "threshold": "low"}),
        ("exit", {"rule": "kl", "min_recurrences": 99}), ("eos_token_id", "</s>"), ("bos_token_id", [0]),
        ("pad_token_id", 1.0), ("vocab_size", 0),
    ],
)  # fmt: skip
def test_a_wrong_value_set_by_attribute_is_not_saved(tmp_path, name, value):
    config = build()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=name) as error:
        config.save_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"max_recurrences": 0}, {"max_recurrences": 8}),  # 0 means the default
        ({"router": {"kind": "token"}, "max_recurrences": 1}, {"max_recurrences": 1}),
        ({"exit": {"rule": "gate", "threshold": 0.5}}, {"exit": {"rule": "gate", "threshold": 0.5}}),
        ({"eos_token_id": [1, 2], "pad_token_id": None}, {"eos_token_id": [1, 2], "pad_token_id": 2}),
        ({"relaxation": {"depths": 2, "rank": {"mlp.up_proj": 4}, "own": []}}, {"state_std": 0.0087}),
        ({"vocab_size": 400}, {"vocab_size": 400}),
    ],
)
def test_a_right_value_set_by_attribute_comes_back(tmp_path, fields, kept):
    config = build()
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    loaded = RecurrentDepthConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in kept} == kept


LEAKS = {
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "tokenizer_class": "LlamaTokenizerFast",
    "model_name": "qwen2",
    "transformers_weights": "other.safetensors",
    "a_field_of_their_own": 1,
}


def test_what_the_source_says_of_its_own_files_stays_there(tmp_path):
    config = build(source_config={**source_config("phi3").to_dict(), **LEAKS})
    assert {name: getattr(config, name, None) for name in LEAKS} == dict.fromkeys(LEAKS)
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (64, 1, 32)
    assert config.rope_parameters == config.source_config.rope_parameters
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {"AutoConfig": "configuration_recurrent_depth.RecurrentDepthConfig"}
    assert not saved["source_config"].keys() & LEAKS.keys() - {"a_field_of_their_own"}
    assert build("gpt2").hidden_size == 64  # n_embd there


@pytest.mark.parametrize("switch", ["output_attentions", "output_hidden_states", "output_router_logits"])
def test_switches_that_collect_outputs_of_layers_are_off(switch):
    source = source_config("mixtral", **{switch: True})
    assert getattr(source, switch)
    config = build(source_config=source)
    assert not getattr(config.source_config, switch)
    assert not getattr(config, switch)
