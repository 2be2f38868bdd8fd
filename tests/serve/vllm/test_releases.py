"""Names of vLLM that our code relies on, looked up in the files of the installed release and of the newest one.

The newest one has builds for GPUs alone. Its wheel is read and never run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopwise.serve.vllm.arguments import group_of
from loopwise.serve.vllm.launch import ARGUMENTS, STARTUP
from loopwise.serve.vllm.requests import BODY, REFUSED_BODY, REFUSED_SAMPLING, SAMPLING
from loopwise.serve.vllm.routes import GENERATION
from tests.helpers.vllm_names import Release, imports, relied_upon

NEWEST = "0.33.0"
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# Modules that one release alone has; `launch.first_module` takes the one that is there.
MOVED = {module for modules in (ARGUMENTS, STARTUP) for module in modules}
# Fields of EngineArgs that no flag sets.
NO_FLAGS = {"enable_mm_processor_stats", "mamba_config", "model_weights"}


@pytest.fixture(scope="module")
def installed() -> Release:
    spec: Any = importlib.util.find_spec("vllm")
    return Release(Path(spec.submodule_search_locations[0]).parent)


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> Release:
    """The release of LOOPWISE_VLLM_WHEEL, a file; otherwise NEWEST, which pip downloads."""
    folder = tmp_path_factory.mktemp("vllm")
    wheel = os.environ.get("LOOPWISE_VLLM_WHEEL")
    if not wheel:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform=manylinux_2_28_x86_64", f"--dest={folder}", f"vllm=={NEWEST}"]
        subprocess.run(command, check=True, timeout=1800)
        wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder, [name for name in files.namelist() if name.endswith(".py")])
    return Release(folder)


@needs_vllm
def test_every_name_is_in_the_installed_release(installed):
    check(installed)


@needs_vllm
def test_a_name_that_is_gone_is_found(installed):
    assert not installed.has("vllm.v1.engine.async_llm", "NoSuchClass")
    assert not installed.has("vllm.no_such_module", "AsyncLLM")
    assert "no_such_method" not in installed.attributes("AsyncLLM")


@pytest.mark.slow
def test_every_name_is_in_the_newest_release(newest):
    check(newest)


@pytest.mark.slow
def test_every_argument_and_field_of_the_newest_release_has_a_place(newest):
    """A new one is refused until then: "it is not known to work with Loopwise yet"."""
    module = next(name for name in ARGUMENTS if newest.file(name))
    engine, nested = "vllm.engine.arg_utils", {"attention_config": "AttentionConfig"}
    nested["structured_outputs_config"] = "StructuredOutputsConfig"
    arguments = newest.fields(engine, "EngineArgs") | newest.fields(engine, "AsyncEngineArgs")
    arguments |= newest.fields(module, "BaseFrontendArgs") | newest.fields(module, "FrontendArgs")
    for name, kind in nested.items():
        arguments |= {f"{name}.{field}" for field in newest.fields(f"vllm.config.{name.removesuffix('_config')}", kind)}
    arguments -= nested.keys() | NO_FLAGS
    assert len(arguments) > 300
    assert [name for name in sorted(arguments) if group_of(name, lanes=True) is None] == []
    parameters = newest.fields("vllm.sampling_params", "SamplingParams")
    assert parameters - SAMPLING - REFUSED_SAMPLING.keys() == set()
    bodies = {field for kinds in GENERATION.values() for place in kinds for field in newest.fields(*place)}
    assert bodies - BODY - REFUSED_BODY.keys() == set()


def check(release: Release) -> None:
    named = imports()
    assert len(named) > 60
    gone = {(module, name) for module, name in named if not release.has(module, name)}
    assert {pair for pair in gone if ".".join(pair) not in MOVED and pair[0] not in MOVED} == set()
    used = ((ARGUMENTS, ("make_arg_parser", "validate_parsed_serve_args")), (STARTUP, ("cli_env_setup",)))
    for modules, names in used:
        here = next(module for module in modules if release.file(module))
        assert [name for name in names if not release.has(here, name)] == []
    chains = relied_upon()
    assert len(chains) > 25
    assert {(kind, name) for kind, name in chains if name not in release.attributes(kind)} == set()


@needs_vllm
@pytest.mark.parametrize("failed", [set(), {}], ids=["0.32", "0.33"])
def test_a_request_fails_on_both_releases(failed):
    """The requests that vLLM's scheduler ends by an error are a set, then a dict of errors for the clients."""
    from loopwise.serve.vllm.scheduler import LaneScheduler

    scheduler: Any = SimpleNamespace(grammar_compile_error_reqs=failed)
    LaneScheduler._fail(scheduler, "a")
    LaneScheduler._fail(scheduler, "a")
    assert list(failed) == ["a"]
    assert not isinstance(failed, dict) or failed["a"] is None  # vLLM then ends it by its finish reason alone


@needs_vllm
def test_blocks_of_a_chunk_that_lost_its_place_are_forgotten(monkeypatch):
    """By priority, vLLM may preempt a request that it has scheduled, and whose blocks it has published, in one step."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from loopwise.serve.vllm.scheduler import LaneScheduler

    evicted, done = list[int](), list[Any]()
    manager = SimpleNamespace(get_block_ids=lambda name: ([4, 5, 6, 7],), evict_blocks=evicted.extend)
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda self, *args: done.append(args))
    scheduler: Any = LaneScheduler.__new__(LaneScheduler)
    scheduler.cache_config = SimpleNamespace(enable_prefix_caching=True)
    scheduler.kv_cache_manager, scheduler.block_size = manager, 16
    request: Any = SimpleNamespace(request_id="a", num_computed_tokens=35, num_output_tokens=0)
    scheduler._preempt_request(request, 1.0)
    assert sorted(evicted) == [6, 7]
    assert done == [(request, 1.0)]
