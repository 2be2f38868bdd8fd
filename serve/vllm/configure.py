"""Configuration hook: `vllm serve MODEL` and `vllm.LLM(MODEL)` get the lane engine for a recurrent-depth model.

vLLM calls `Hook` while it makes its configuration, before it chooses a worker and decides on asynchronous scheduling.
Users give settings as `--additional-config '{"loopwise": {"engine": "fixed"}}'`: keys of `loopwise serve`, which uses
the same hook. Imports of vLLM stand inside the functions.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, fields, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from ...emulated import advice
from ...errors import UserError
from ...process import is_server
from ...recipe import settled, validate
from ..api.architectures import vllm_architecture
from ..api.lanes import LANES, SETTINGS, LaneConfig, is_lanes
from ..api.limits import HttpLimits, check_model, check_packed
from ..checkpoint import facts_of
from ..defaults import Defaults, choose
from ..recipe import ServeRecipe
from .arguments import SCHEDULER, WORKER, check_environment, check_vllm_config
from .arrivals import ARRIVALS, share
from .startup import apply_generation_config, lacks_compiler
from .validation import PROCESSORS_READ, has_processors

if TYPE_CHECKING:
    from ..engine.kv import KVPolicy

NAME = "loopwise"  # of our plugins
ENDPOINTS = "vllm.endpoint_plugins"
# Groups of plugins that vLLM loads without VLLM_PLUGINS. Those of ENDPOINTS it loads for names in VLLM_PLUGINS alone.
GROUPS = (
    "vllm.general_plugins", "vllm.io_processor_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins"
)  # fmt: skip
# Keys of `loopwise serve` for which vLLM has arguments of its own.
OF_VLLM = {
    "host": "--host", "port": "--port", "dtype": "--dtype", "name": "--served-model-name", "revision": "--revision",
    "drain_seconds": "--shutdown-timeout",
}  # fmt: skip


class Hook:
    """The entry of recurrent-depth models in vLLM's MODELS_CONFIG_MAP. called: this process has configured one."""

    called: ClassVar[bool] = False

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        Hook.called = True
        configure(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: settings come with the whole configuration."""


def configure(vllm_config: Any) -> None:
    """Choose the engine for the model of `vllm_config`, and give it the engine's settings.

    Raises UserError for settings that contradict the model or each other, and for features of vLLM that are refused.
    """
    config = vllm_config.model_config.hf_config
    check_model(vars(config), routed=True)
    vllm_architecture(config.source_config.model_type)
    check_packed(config.router, config.source_config)
    recipe, report = read_settings(vllm_config)
    _check_beside_lanes(vllm_config.additional_config or {})
    chosen = None if is_lanes(vllm_config) else _choose(vllm_config, recipe, report)
    check_vllm_config(vllm_config, is_lanes(vllm_config))
    check_environment(os.environ, server=False)
    if is_lanes(vllm_config):
        if LaneConfig.of(vllm_config).decoder == "diffusion" and has_processors(vllm_config):
            raise UserError(f"decoder=diffusion: {PROCESSORS_READ}")
        use_lanes(vllm_config)
    apply_generation_config(vllm_config.model_config)
    setting = "dtype=float32" if is_server() else "--dtype float32"
    if line := advice(str(vllm_config.model_config.dtype), vllm_config.device_config.device_type, setting):
        print(f"loopwise: {line}", file=sys.stderr, flush=True)
    if chosen and not is_server():  # `loopwise serve` prints its own lines
        print(f"loopwise: {chosen.line()}", file=sys.stderr, flush=True)


def read_settings(vllm_config: Any) -> tuple[ServeRecipe, bool]:
    """The user's settings in `vllm_config`, and whether every output has the depths of its tokens.

    Raises UserError for unknown keys, wrong values, and keys for which vLLM has arguments.
    """
    where = f"--additional-config {SETTINGS}"
    given = (vllm_config.additional_config or {}).get(SETTINGS, {})
    if not isinstance(given, dict):
        raise UserError(f"{where}: {given!r}: an object, as {{'engine': 'fixed'}}")
    report = given.get("report", endpoint_is_loaded(os.environ))
    if not isinstance(report, bool):
        raise UserError(f"{where}: report={report!r}: true or false")
    if name := next((name for name in OF_VLLM if name in given), None):
        raise UserError(f"{where}: {name}: vLLM has an argument for it, {OF_VLLM[name]}")
    values = {name: value for name, value in given.items() if name != "report"}
    try:
        return validate(ServeRecipe, settled(ServeRecipe, values, [])), report
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_beside_lanes(given: dict[str, Any]) -> None:
    """Raises UserError for settings of users in an additional_config beside a whole LaneConfig, which wins."""
    if LANES not in given:
        return
    settings = {"engine": "lanes", **given.get(SETTINGS, {})}
    limits = {one.name for one in fields(HttpLimits)}
    for name, value in settings.items():
        if name not in limits and (name, value) != ("engine", "lanes"):
            raise UserError(
                f"--additional-config {SETTINGS}: {name}={value!r} has no effect beside {LANES}, the lane engine's "
                f"settings in full: leave {LANES} out, and give keys of `loopwise serve` alone"
            )


def http_limits(vllm_config: Any) -> HttpLimits:
    """The limits of the HTTP server in the settings of `vllm_config`."""
    recipe, _ = read_settings(vllm_config)
    return HttpLimits(**{one.name: getattr(recipe, one.name) for one in fields(HttpLimits)})


def endpoint_is_loaded(environment: Any) -> bool:
    """True where vLLM's HTTP server loads our endpoint plugin: VLLM_PLUGINS names it, and it is installed."""
    return NAME in environment.get("VLLM_PLUGINS", "").split(",") and any(entry_points(group=ENDPOINTS, name=NAME))


def load_endpoint(environment: Any) -> None:
    """Name our endpoint plugin in VLLM_PLUGINS, and with it those that vLLM loads without that variable.

    Raises UserError where it is not installed: the package's metadata are then older than its code.
    """
    if "VLLM_PLUGINS" not in environment:
        names = {entry.name for group in GROUPS for entry in entry_points(group=group)}
        environment["VLLM_PLUGINS"] = ",".join(sorted({NAME, *names}))
    if not endpoint_is_loaded(environment):
        raise UserError("this installation of loopwise is older than its code: run `make setup`, or pip install, again")


def _choose(vllm_config: Any, recipe: ServeRecipe, report: bool) -> Defaults:
    """Put the engine that fits model and `recipe` into `vllm_config`, and the depths of its requests."""
    model = vllm_config.model_config
    defaults = choose(facts_of(model.hf_config), recipe)
    for name, value in defaults.config.items():
        setattr(model.hf_config, name, value)
    if defaults.engine == "lanes":
        compiles = not model.enforce_eager and not _lacks_compiler()
        lanes = replace(defaults.lanes, compile=compiles, graphs=not model.enforce_eager, report=report)
        vllm_config.additional_config = {**(vllm_config.additional_config or {}), LANES: asdict(lanes)}
    return defaults


def _lacks_compiler() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and lacks_compiler()


def use_lanes(vllm_config: Any) -> None:
    """Give `vllm_config`, which has the lane engine's settings, its worker, its scheduler and what goes with them.

    Raises UserError for another worker or scheduler, and for asynchronous scheduling.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    for name, value, usual, ours in (
        ("worker_cls", parallel.worker_cls, "auto", WORKER),
        ("scheduler_cls", scheduler.scheduler_cls, None, SCHEDULER),
        ("async_scheduling", scheduler.async_scheduling, None, False),
    ):
        if value not in (usual, ours):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} does not fit engine=lanes; use engine=fixed")
    parallel.worker_cls, scheduler.scheduler_cls = WORKER, SCHEDULER
    scheduler.async_scheduling = False  # a step gives a request 0 to `passes_per_step` tokens
    vllm_config.model_config.enforce_eager = True  # vLLM's own forward does not run
    from ..engine.kv import policy_of  # which imports torch; `loopwise serve --help` does not

    policy = policy_of(vllm_config.model_config.hf_config)
    out = excluded(policy)
    on = {"enable_chunked_prefill": scheduler, "enable_prefix_caching": vllm_config.cache_config}
    if off := [name for name, where in on.items() if out[name] and getattr(where, name)]:
        print(f"loopwise: kv_policy={policy.name} turns off vLLM's {' and '.join(off)}", file=sys.stderr, flush=True)
    if out["enable_prefix_caching"]:
        vllm_config.cache_config.enable_prefix_caching = False
    if out["enable_chunked_prefill"]:
        if (most := scheduler.long_prefill_token_threshold) > 0:
            raise UserError(f"--long-prefill-token-threshold {most}: prompts run whole under kv_policy={policy.name}")
        scheduler.enable_chunked_prefill = False
        length = vllm_config.model_config.max_model_len
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, length)  # a prompt in one step
    if endpoint_is_loaded(os.environ) and sys.platform == "linux":  # a server's requests wait for no step's end
        os.environ[ARRIVALS] = share()


def excluded(policy: KVPolicy) -> dict[str, bool]:
    """vLLM's features, by argument: true for those that the KV `policy` excludes."""
    return {"enable_chunked_prefill": policy.overwrites, "enable_prefix_caching": not policy.shares}
