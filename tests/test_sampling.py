"""The table of sampling settings: what conversion carries, transformers samples by, and every engine takes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from loopwise.convert.generation import savable
from loopwise.errors import UserError
from loopwise.sampling import RESPELT, SETTINGS, check_setting, end_tokens, greatest_id
from loopwise.serve.api.generation_config import sampling_of, stop_ids
from tests.helpers.tiny import source_model, tokenizer

# Values at the bounds of each rule, and beyond.
HOLDS: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-3, 1, 2, 0.7],
    "top_k": [-1, 0, 1, 50],
    "top_p": [1e-6, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 0.5, 1, 1.0],
    "repetition_penalty": [0.5, 1, 2, 1.3],
    "presence_penalty": [-2, 0, 0.5, 2],
    "frequency_penalty": [-2, 0, 0.5, 2],
}
FAILS: dict[str, list[Any]] = {
    "temperature": [-0.1, float("inf"), float("nan"), "1", True],
    "top_k": [-2, 1.0, "1", True],
    "top_p": [0, 0.0, 1.1, "1", True],
    "min_p": [-0.1, 1.1, "0", False],
    "repetition_penalty": [0, -1, float("inf"), "1", True],
    "presence_penalty": [-2.1, 2.1, "0", False],
    "frequency_penalty": [-2.1, 2.1, "0", False],
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return source_model("llama")


def test_every_setting_is_walked():
    assert set(SETTINGS) == set(HOLDS) == set(FAILS)
    assert all(value in HOLDS[name] for name, value in RESPELT)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in HOLDS for value in HOLDS[name]])
@pytest.mark.parametrize("sample", [None, True])
def test_what_conversion_carries_is_what_every_engine_takes(name, value, sample, model, tmp_path):
    check_setting(name, value)
    given = {name: value} | ({} if sample is None else {"do_sample": sample})
    fields, _ = savable(given)
    GenerationConfig.from_dict(fields).save_pretrained(tmp_path)
    prompt = torch.tensor([[3, 5, 7]])
    model.generate(prompt, max_new_tokens=2, generation_config=GenerationConfig.from_dict(fields), pad_token_id=0)
    asked, carried = sampling_of(given), sampling_of(fields)
    if carried.get("temperature") == 0:  # the rest is without effect
        asked, carried = (said.get("temperature") for said in (asked, carried))
    elif sample is None:
        carried.pop("temperature", None)
        asked.pop("temperature", None)
    assert carried == asked
    if importlib.util.find_spec("vllm"):
        from vllm import SamplingParams

        SamplingParams(**{name: value for name, value in fields.items() if name in SETTINGS})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in FAILS for value in FAILS[name]])
def test_what_no_engine_takes_is_refused_and_not_carried(name, value):
    with pytest.raises(UserError, match=f"^{name}="):
        check_setting(name, value)
    with pytest.raises(UserError, match=f"^{name}="):
        sampling_of({name: value})
    fields, (note,) = savable({name: value})
    assert fields == {}
    assert note == f"generation_config.json: {name} left out: {name}={value!r}: {SETTINGS[name][1]}"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0}, {"do_sample": False}),
        ({"top_k": -1, "do_sample": True}, {"top_k": 0, "do_sample": True}),  # without, transformers takes the best 50
        ({"temperature": 2, "do_sample": True}, {"temperature": 2.0, "do_sample": True}),  # it wants a float
    ],
)
def test_what_transformers_spells_otherwise_is_respelt_and_said(given, kept):
    fields, (note,) = savable(given)
    assert fields == kept
    assert {name: type(value) for name, value in fields.items()} == {name: type(value) for name, value in kept.items()}
    assert "which means the same to transformers" in note


@pytest.mark.parametrize("ends", ["</s>", 1.0, [[1]], True, [1, None]])
def test_end_tokens_are_ids_everywhere(ends):
    for read in (
        end_tokens,
        lambda ends: stop_ids({"eos_token_id": ends}),
        lambda ends: savable({"eos_token_id": ends}),
    ):
        with pytest.raises(UserError, match="a token id, or a list of them"):
            read(ends)
    assert end_tokens([2, -1]) == [2, -1]
    assert end_tokens(None) == []


def test_the_greatest_id_counts_added_tokens():
    made = tokenizer()
    greatest = greatest_id(made)
    made.add_tokens(["<new>"])
    assert greatest_id(made) == made.convert_tokens_to_ids("<new>") == greatest + 1
