"""The configuration hook: the engine and the settings of a model, by whichever way vLLM is started."""

from __future__ import annotations

import importlib.util
import json
import os
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopwise.errors import UserError
from loopwise.recipe import load_recipe
from loopwise.serve.api.lanes import LANES, SETTINGS, LaneConfig
from loopwise.serve.checkpoint import check_config
from loopwise.serve.defaults import choose
from loopwise.serve.recipe import ServeRecipe
from loopwise.serve.vllm import configure, validation
from loopwise.serve.vllm.arguments import CONFIG, SCHEDULER, WORKER
from loopwise.serve.vllm.arrivals import ARRIVALS
from tests.helpers.serve_tiny import GROUPED, RETROFIT, save, source_config

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
WAYS = ("loopwise serve", "vllm serve", "LLM")
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
# By argument: its value, and what is said about it. On the way in by `loopwise serve`, all are refused by our list.
REFUSED: dict[str, tuple[Any, str]] = {
    "kv_transfer_config": (CONNECTOR, "no connector moves"),
    "kv_offloading_size": (1.0, "no connector moves"),
    "enable_return_routed_experts": (True, "the depths of tokens travel in the field"),
    "decode_context_parallel_size": (2, "not cut among ranks"),
    "prefill_context_parallel_size": (2, "not cut among ranks"),
    "enable_dbo": (True, "not cut into micro-batches"),
    "watermark": (0.1, "--watermark 0.1"),
    "data_parallel_size": (2, "one engine serves it"),
    "enable_expert_parallel": (True, "no mixture of experts"),
    "pipeline_parallel_size": (2, "every recurrence would cross"),
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The hook and vLLM's platform set variables. Undone at the end."""
    before = dict(os.environ)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


def made(folder: Path, way: str = "LLM", **arguments: Any) -> Any:
    """vLLM's configuration for the model in `folder`, as that way in makes it. Starts nothing."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from loopwise.serve.vllm.launch import ARGUMENTS, first_module, parse_arguments

    if way == "LLM":
        return EngineArgs(str(folder), **arguments).create_engine_config()
    flags = []
    for name, value in arguments.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        flags += ["--" + name.replace("_", "-"), *([] if value is True else [text])]
    if way == "vllm serve":
        parser = first_module(*ARGUMENTS).make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(["--model", str(folder), *flags])
    else:
        recipe = load_recipe(ServeRecipe, "serve", None, [])
        args, _, _ = parse_arguments(str(folder), choose(check_config(str(folder)), recipe), recipe, flags)
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_gets_lanes(model, way):
    config = made(model[0], way)
    assert (config.parallel_config.worker_cls, config.scheduler_config.scheduler_cls) == (WORKER, SCHEDULER)
    assert config.scheduler_config.async_scheduling is False
    assert config.model_config.enforce_eager is True
    assert config.cache_config.enable_prefix_caching is True
    lanes = LaneConfig.of(config)
    assert lanes == LaneConfig(coda_wait=None, budget=None, report=way == "loopwise serve")
    hf = config.model_config.hf_config
    assert (hf.num_recurrences, hf.max_recurrences, hf.kv_policy) == (1, 8, "per-depth")
    assert hf.exit == {"rule": "fixed", "threshold": None, "min_recurrences": 1}
    # Only a server that takes depths off its outputs gets them unasked.
    assert (ARRIVALS in os.environ) is (way == "loopwise serve")


def test_the_endpoint_plugin_gets_depths(model, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "loopwise")
    assert LaneConfig.of(made(model[0], "vllm serve")).report is True
    assert os.path.exists(os.environ[ARRIVALS])
    monkeypatch.setattr(configure, "entry_points", lambda **_: ())  # an installation older than its code
    assert LaneConfig.of(made(model[0], "vllm serve")).report is False
    with pytest.raises(UserError, match="older than its code: run `make setup`"):
        configure.load_endpoint({})


def test_loopwise_serve_allows_the_plugins_that_vllm_would_load(monkeypatch):
    """VLLM_PLUGINS is one list for all groups; without it, vLLM loads all but endpoints."""
    installed = {"vllm.general_plugins": "a", "vllm.platform_plugins": "b", "vllm.endpoint_plugins": "c"}

    def entry_points(group: str, name: str | None = None) -> list[Any]:
        names = (
            {installed.get(group), "loopwise"}
            if group.endswith(("general_plugins", "endpoint_plugins"))
            else {installed.get(group)}
        )
        return [SimpleNamespace(name=one) for one in names if one and name in (None, one)]

    monkeypatch.setattr(configure, "entry_points", entry_points)
    configure.load_endpoint(environment := {})
    assert environment == {"VLLM_PLUGINS": "a,b,loopwise"}
    configure.load_endpoint(environment := {"VLLM_PLUGINS": "loopwise,x"})
    assert environment == {"VLLM_PLUGINS": "loopwise,x"}


@pytest.mark.parametrize("way", ["vllm serve", "LLM"])
def test_settings_are_keys_of_loopwise_serve(model, way):
    given = {"passes_per_step": 4, "num_recurrences": 5, "exit_rule": "cosine", "exit_threshold": 0.1, "report": True}
    config = made(model[0], way, additional_config={SETTINGS: given, "other": 1})
    lanes, hf = LaneConfig.of(config), config.model_config.hf_config
    assert (lanes.passes_per_step, lanes.report, hf.num_recurrences) == (4, True, 5)
    assert hf.exit == {"rule": "cosine", "threshold": 0.1, "min_recurrences": 1}
    assert config.additional_config["other"] == 1
    config = made(model[0], way, additional_config={SETTINGS: {"engine": "fixed", "num_recurrences": 2}})
    assert LANES not in config.additional_config
    assert config.scheduler_config.scheduler_cls is None
    assert config.model_config.hf_config.num_recurrences == 2
    assert made(model[0], way, hf_overrides={"num_recurrences": 7}).model_config.hf_config.num_recurrences == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"additional_config": {SETTINGS: {"engin": "fixed"}}}, "unknown recipe key 'engin': did you mean 'engine'"),
        ({"additional_config": {SETTINGS: {"port": 80}}}, "port: vLLM has an argument for it, --port"),
        ({"additional_config": {SETTINGS: {"report": 1}}}, "report=1: true or false"),
        ({"additional_config": {SETTINGS: "fixed"}}, "'fixed': an object, as {'engine': 'fixed'}"),
        ({"additional_config": {SETTINGS: {"num_recurrences": 9}}}, "this model is served at 1 to 8 recurrences"),
        (
            {"additional_config": {SETTINGS: {"engine": "fixed", "exit_rule": "cosine"}}},
            "the fixed engine has no exits",
        ),
        (
            {"additional_config": {**LaneConfig().flags()["additional_config"], SETTINGS: {"num_recurrences": 2}}},
            "num_recurrences=2 has no effect beside loopwise_lanes",
        ),
        (
            {"additional_config": {**LaneConfig().flags()["additional_config"], SETTINGS: {"engine": "fixed"}}},
            "engine='fixed' has no effect beside loopwise_lanes",
        ),
        ({"async_scheduling": True}, "--async-scheduling True does not fit engine=lanes; use engine=fixed"),
        ({"worker_cls": "a.B"}, "--worker-cls a.B does not fit engine=lanes"),
        ({"scheduler_cls": "a.B"}, "--scheduler-cls a.B does not fit engine=lanes"),
    ],
)
def test_wrong_settings_are_named(model, arguments, said):
    with pytest.raises(ValueError) as caught:
        made(model[0], **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_engine_does_is_refused_on_every_way_in(model, way, name):
    value, said = REFUSED[name]
    ranks = {"tensor_parallel_size": 2} if name == "decode_context_parallel_size" else {}  # vLLM cuts these ranks
    with pytest.raises(ValueError, match=said):
        made(model[0], way, **{name: value}, **ranks)


def test_all_that_is_checked_in_a_configuration_is_there(model):
    """A field that moves to another place in a later release would be checked no more."""
    config = made(model[0])
    found = {name: attrgetter(path)(config) for name, (path, _) in CONFIG.items()}
    assert found == {name: off for name, (_, off) in CONFIG.items()}


def test_the_environment_is_checked(model, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as a program with `LLM` may have it
    made(model[0])
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT=1 does not fit"):
        made(model[0])


def test_features_follow_the_kv_policy(model, capsys):
    """A policy that overwrites slots computes prompts whole, in one step, and shares no block. A line says so."""
    off = "kv_policy=single turns off vLLM's enable_chunked_prefill and enable_prefix_caching"
    lanes = {"enable_prefix_caching": True, **LaneConfig().flags()}
    made(model[0], hf_overrides={"kv_policy": "single"}, max_num_batched_tokens=256, max_model_len=512, **lanes)
    assert off in capsys.readouterr().err
    made(model[0], **lanes)
    assert "turns off" not in capsys.readouterr().err
    config = made(model[0], hf_overrides={"kv_policy": "single"}, max_num_batched_tokens=256, max_model_len=512)
    assert config.scheduler_config.enable_chunked_prefill is False
    assert config.cache_config.enable_prefix_caching is False
    assert config.scheduler_config.max_num_batched_tokens == 512
    with pytest.raises(ValueError, match="--long-prefill-token-threshold 64: prompts run whole under kv_policy=single"):
        made(model[0], hf_overrides={"kv_policy": "single"}, long_prefill_token_threshold=64)
    made(model[0], long_prefill_token_threshold=64)


def test_diffusion_is_no_default_beside_processors_of_users(model, monkeypatch):
    diffusion = {SETTINGS: {"decoder": "diffusion"}}
    shape = {"hf_overrides": {"num_recurrences": 4, "max_recurrences": 8}, "additional_config": diffusion}
    made(model[0], **shape)
    with pytest.raises(ValueError, match="decoder=diffusion: logits processors"):
        made(model[0], **shape, logits_processors=["tests.helpers.processors:Counts"])
    monkeypatch.setattr(validation, "_plugins", lambda: 1)
    with pytest.raises(ValueError, match="decoder=diffusion: logits processors"):
        made(model[0], **shape)


def test_a_model_without_a_recurrence_of_its_core_runs_at_one_depth(tmp_path):
    shape = {**RETROFIT, "injection": "none", "sharing": "sequence"}
    save(tmp_path / "m", source_config("llama", **GROUPED), **shape, num_recurrences=3)
    config = made(tmp_path / "m")
    assert LANES not in config.additional_config
    with pytest.raises(ValueError, match="engine=lanes: sharing='sequence' has no recurrence"):
        made(tmp_path / "m", additional_config={SETTINGS: {"engine": "lanes"}})


def test_generation_config_means_the_same_everywhere(tmp_path):
    save(tmp_path / "m", source_config("llama", **GROUPED), **RETROFIT)
    (tmp_path / "m" / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    for way in WAYS:
        assert made(tmp_path / "m", way).model_config.get_diff_sampling_param()["temperature"] == 0.0
        config = made(tmp_path / "m", way, override_generation_config={"temperature": 0.5})
        assert config.model_config.get_diff_sampling_param()["temperature"] == 0.5
