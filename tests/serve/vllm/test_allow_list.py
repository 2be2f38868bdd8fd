"""All that vLLM accepts, as arguments, in requests and in the environment, has a place in Loopwise's lists."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loopwise.errors import UserError
from loopwise.serve.api.fields import FieldError
from loopwise.serve.vllm.arguments import (
    CONFIG,
    FIXED,
    HARMLESS,
    NESTED,
    PASSED,
    REASONS,
    VALUES,
    check_arguments,
    check_environment,
    check_value,
    check_vllm_config,
    group_of,
    parts,
)
from loopwise.serve.vllm.launch import ARGUMENTS, STARTUP, first_module
from loopwise.serve.vllm.requests import (
    BODY,
    REFUSED_BODY,
    REFUSED_SAMPLING,
    SAMPLING,
    UNREAD_BY_BEAMS,
    tokens_of,
    validate_beam_search,
    validate_body,
    validate_sampling,
    validate_tokens,
)
from loopwise.serve.vllm.routes import GENERATION, TOKENIZING
from loopwise.serve.vllm.routes import HARMLESS as HARMLESS_ROUTES
from loopwise.serve.vllm.routes import REFUSED as REFUSED_ROUTES

pytestmark = pytest.mark.xdist_group("vllm")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    """Every argument of vLLM's server, with its default."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = first_module(*ARGUMENTS).make_arg_parser(FlexibleArgumentParser())
    return {action.dest: action.default for action in parser._actions}


@needs_vllm
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "fixed"])
def test_every_argument_of_vllm_has_one_place(usual, lanes):
    """An argument of a new release fails here by name, until it is tried and has a place in `arguments`."""
    names = [name for argument, value in usual.items() for name in parts(argument, value)]
    assert [name for name in names if group_of(name, lanes) is None] == []
    assert not set(NESTED) & set(names)  # they are cut into their fields
    check_arguments(usual, usual, lanes)


def test_no_argument_has_two_places():
    counts = Counter(chain(PASSED, FIXED, REASONS, *HARMLESS.values()))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", [*REASONS, "worker_cls", "scheduler_cls", "load_format"])
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "fixed"])
def test_what_is_refused_is_refused_in_one_line_with_a_reason(name, lanes):
    with pytest.raises(UserError) as told:
        check_arguments({name: "something"}, {name: None}, lanes)
    why = VALUES[name][1] if name in VALUES else REASONS[name]
    flag = "--" + name.replace("_", "-")
    assert str(told.value) == f"{flag} something does not fit a recurrent-depth model: {why}"


def test_an_argument_that_nobody_knows_is_refused_where_it_is_set():
    check_arguments({"brand_new": 3}, {"brand_new": 3}, True)
    with pytest.raises(UserError, match=r"--brand-new 4 does not fit .*: it is not known to work with Loopwise yet"):
        check_arguments({"brand_new": 4}, {"brand_new": 3}, True)

    @dataclass
    class attention_config:
        backend: str | None = None
        brand_new: int = 0

    usual = {"attention_config": attention_config()}
    check_arguments({"attention_config": attention_config("FLASH_ATTN")}, usual, True)
    with pytest.raises(UserError, match=r"--attention-config.brand-new 1 does not fit .*: it is not known"):
        check_arguments({"attention_config": attention_config(None, 1)}, usual, False)


def test_the_lane_engine_alone_has_no_use_for_compilation():
    check_value("optimization_level", 1, lanes=False)
    with pytest.raises(UserError, match=r"--optimization-level 1 does not fit .* its own passes"):
        check_value("optimization_level", 1, lanes=True)


def config_of(**fields: Any) -> Any:
    """As much of a VllmConfig as is looked at, with `fields` ("part_config.name") and vLLM's defaults elsewhere."""
    config = SimpleNamespace()
    for path, usual in CONFIG.values():
        place = config
        *parents, name = path.split(".")
        for part in parents:
            place.__dict__.setdefault(part, SimpleNamespace())
            place = getattr(place, part)
        setattr(place, name, fields.get(path, usual))
    return config


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("kv_transfer_config", object(), "--kv-transfer-config does not fit .* no connector moves"),
        ("ec_transfer_config", object(), "--ec-transfer-config does not fit"),
        ("weight_transfer_config", object(), "weights are loaded once"),
        ("watermark_config", object(), "second model runner"),
        ("lora_config", object(), "--enable-lora does not fit"),
        ("cache_config.kv_offloading_size", 2.0, "--kv-offloading-size 2.0"),
        ("parallel_config.data_parallel_size", 2, "--data-parallel-size 2"),
        ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size 2"),
        ("parallel_config.enable_dbo", True, "--enable-dbo does not fit"),
        ("model_config.enable_prompt_embeds", True, "a prompt is token ids"),
        ("model_config.enable_sleep_mode", True, "--enable-sleep-mode"),
        ("aux_output_config.enable_return_routed_experts", True, "the depths of tokens travel"),
        ("scheduler_config.watermark", 0.1, "--watermark 0.1"),
    ],
)
def test_those_who_start_vllm_themselves_hear_the_same(path, value, said):
    check_vllm_config(config_of(), True)
    with pytest.raises(UserError, match=said):
        check_vllm_config(config_of(**{path: value}), False)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS=other: without loopwise among them"),
        ("VLLM_DP_SIZE", "2", "VLLM_DP_SIZE=2 does not fit a recurrent-depth model: one engine serves it"),
        ("VLLM_BATCH_INVARIANT", "1", "VLLM_BATCH_INVARIANT=1 does not fit"),
        ("VLLM_USE_SIMPLE_KV_OFFLOAD", "1", "no connector moves"),
        ("VLLM_ENABLE_RESPONSES_API_STORE", "1", "replies that it keeps would fill the memory"),
    ],
)
def test_variables_that_change_the_engine_are_refused(name, value, said):
    with pytest.raises(UserError, match=said):
        check_environment({name: value})
    check_environment({"VLLM_PLUGINS": "loopwise,other", "VLLM_DP_SIZE": "1", "VLLM_BATCH_INVARIANT": "0"})


# ---- requests -------------------------------------------------------------------------------------------------------
@needs_vllm
def test_every_sampling_parameter_of_vllm_has_one_place():
    from vllm import SamplingParams

    names = SamplingParams.__struct_fields__
    assert [name for name in names if name not in SAMPLING and name not in REFUSED_SAMPLING] == []
    assert not SAMPLING & set(REFUSED_SAMPLING)
    validate_sampling(SamplingParams(temperature=0.5, logprobs=1, n=2), SamplingParams())


@needs_vllm
def test_every_field_of_a_body_has_one_place():
    known = {
        name
        for kinds in GENERATION.values()
        for module, kind in kinds
        for name in getattr(import_module(module), kind).model_fields
    }
    assert len(known) > 80
    assert [name for name in sorted(known) if name not in BODY and name not in REFUSED_BODY] == []
    assert not BODY & set(REFUSED_BODY)


@needs_vllm
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"watermarking": True}, "watermarking"),
        ({"routed_experts_prompt_start": 3}, "routed_experts_prompt_start"),
        ({"trace_decode_token_ids": [3]}, "trace_decode_token_ids"),
        ({"prompt_logprobs": 1, "prompt_logprob_start": 2}, "prompt_logprob_start"),
        ({"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}, "kv_transfer_params"),
        ({"stop": ["s"] * 65}, "stop"),
    ],
)
def test_sampling_parameters_that_no_engine_follows_are_named(fields, name):
    from vllm import SamplingParams

    with pytest.raises(FieldError) as told:
        validate_sampling(SamplingParams(**fields), SamplingParams())
    assert told.value.field == name
    assert re.match(f"{name}(=| has)", str(told.value))


@pytest.mark.parametrize("name", REFUSED_BODY)
def test_fields_of_a_body_that_no_engine_follows_are_named(name):
    for value in (None, *REFUSED_BODY[name][0]):
        validate_body({name: value}, {name})
    with pytest.raises(FieldError, match=f"{name}=.*: {REFUSED_BODY[name][1]}"):
        validate_body({name: True if name != "prompt_embeds" else "AAAA"}, {name})


def test_a_field_of_a_body_that_nobody_knows_is_refused():
    validate_body({"brand_new": None, "not_of_vllm": 3, "temperature": 0}, {"brand_new", "temperature"})
    with pytest.raises(FieldError, match="brand_new=1: it is not known to work with Loopwise yet"):
        validate_body({"brand_new": 1}, {"brand_new", "temperature"})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"top_k": 2**64}, "1.84e+19 in top_k: a whole number of at most 64 bits"),
        ({"repetition_detection": {"min_count": 2, "max_pattern_size": -(2**70)}}, "-1.18e+21 in repetition_detection"),
        ({"bad_words": ["cat", "\ud800"]}, "bad_words is not text: half a surrogate at 0"),
        ({"logit_bias": {"1\udfff": 1}}, "logit_bias is not text: half a surrogate at 1"),
        ({"structured_outputs": "x"}, "structured_outputs='x': an object"),
        ({"structured_outputs": [1]}, "structured_outputs=[1]: an object"),
        ({"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tools: {} is no function"),
    ],
)
def test_a_value_at_which_vllm_fails_is_named(body, said):
    """With status 500, and no word or one about Python, where the client is at fault."""
    with pytest.raises(FieldError) as told:
        validate_body(body, body)
    assert str(told.value).startswith(said)
    assert told.value.field == next(iter(body))


def test_the_greatest_values_are_left_alone():
    validate_body({"seed": 2**64 - 1, "priority": -(2**63), "prompt": "caf\u00e9", "structured_outputs": {}}, {"seed"})
    validate_body({"tools": [{"name": "f"}], "tool_choice": {"type": "tool", "name": "f"}}, {"tools"})


@needs_vllm
@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"])
@pytest.mark.parametrize("token", [259, -1])
def test_no_parameter_names_a_token_beyond_the_embeddings(name, token):
    from vllm import SamplingParams

    fields: dict[str, Any] = {name: {token: 1.0} if name == "logit_bias" else [5, token]}
    params = SamplingParams(**fields)
    with pytest.raises(FieldError, match=f"token id {token} in {name}: this model has 0 to 258, a vocabulary of 259"):
        validate_tokens(tokens_of(params), 259)
    validate_tokens({"prompt": [0, 258], **tokens_of(SamplingParams(bad_words=["a"]))}, 259)


@needs_vllm
def test_beam_search_ignores_no_field():
    """Every field of `SamplingParams` in a body is read by vLLM's beam search, about the reply alone, or refused."""
    from vllm import SamplingParams

    read = {"n", "max_tokens", "ignore_eos", "temperature", "include_stop_str_in_output", "skip_special_tokens"}
    reply = {"logprobs", "prompt_logprobs", "logprob_token_ids", "spaces_between_special_tokens", "stream_interval"}
    known = set(SamplingParams.__struct_fields__) & BODY
    assert known - read - reply == set(UNREAD_BY_BEAMS) - {"response_format"}


@pytest.mark.parametrize("name", UNREAD_BY_BEAMS)
def test_what_beam_search_would_ignore_is_refused(name):
    for value in (None, *UNREAD_BY_BEAMS[name]):
        validate_beam_search({"use_beam_search": True, name: value}, [])
    validate_beam_search({name: 7}, ["exit_rule"])
    validate_beam_search({"use_beam_search": False, name: 7}, ["exit_rule"])
    with pytest.raises(FieldError, match=f"{name}=.*: cannot be given with use_beam_search, which ignores it") as told:
        validate_beam_search({"use_beam_search": True, name: 7}, [])
    assert told.value.field == name


@needs_vllm
def test_every_route_of_vllm_has_one_place(monkeypatch):
    """A route of a new release fails here by name, until it is tried and has a place in `routes`."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    flags = ["--enable-scale-out", "--tokens-only", "--enable-tokenizer-info-endpoint"]
    found = set()
    for more in ([], ["--enable-offline-docs"]):
        args = first_module(*ARGUMENTS).make_arg_parser(FlexibleArgumentParser()).parse_args([*flags, *more])
        found |= {getattr(route, "path", None) for route in build_app(args, ("generate",)).routes}
    assert {"/v1/completions", "/inference/v1/generate", "/sleep", "/v1/completions/render", "/tokenizer_info"} <= found
    assert found - set(GENERATION) - TOKENIZING - HARMLESS_ROUTES - set(REFUSED_ROUTES) == set()
    counts = Counter(chain(GENERATION, TOKENIZING, HARMLESS_ROUTES, REFUSED_ROUTES))
    assert [route for route, count in counts.items() if count > 1] == []


# ---- releases -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("places", [ARGUMENTS, STARTUP])
@pytest.mark.parametrize("which", [0, 1], ids=["0.33", "0.32"])
def test_modules_are_found_where_a_release_has_them(monkeypatch, places, which):
    for name in places:
        for n in range(1, name.count(".") + 1):
            package = ModuleType(name.rsplit(".", n)[0])
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.delitem(sys.modules, name, raising=False)
    here = ModuleType(places[which])
    monkeypatch.setitem(sys.modules, places[which], here)
    assert first_module(*places) is here


def test_a_module_that_fails_for_another_reason_says_so():
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        first_module("no_such_module_at_all.a", "no_such_module_at_all.b")
