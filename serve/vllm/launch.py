"""Starts vLLM's OpenAI server: its arguments, parsed and validated, then the server itself until it ends.

vLLM is imported inside the functions: `loopwise serve --help` and mistakes in a recipe must not wait for it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import UserError
from ...process import own_processes
from ...trained import beyond_trained
from ..api.lanes import LANES, SETTINGS
from ..api.limits import HttpLimits, check_depth
from ..checkpoint import Facts, load_tokenizer
from ..defaults import Defaults
from ..recipe import ServeRecipe
from .argument_errors import check_values, explained, parsed
from .arguments import check_arguments
from .configure import excluded, load_endpoint
from .exposure import check_exposure
from .startup import (
    SPACE,
    check_block_size,
    check_memory,
    compare_vocabularies,
    lacks_compiler,
    share_cores,
)
from .trusted import trusted_code

CPU_CACHE_BYTES = 2 << 30  # vLLM would take most of the machine's memory
# Modules of vLLM 0.33, and their names in earlier releases.
ARGUMENTS = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args")
STARTUP = ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils")


def parse_arguments(
    model: str, defaults: Defaults, recipe: ServeRecipe, flags: list[str]
) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    """vLLM's own arguments for `model`: its `flags` win over the recipe, and the recipe over vLLM's defaults.

    Returns the arguments, those of them that differ from the defaults, and lines to print when the server starts.
    Prints the names of the code that --trust-remote-code runs, before it runs. Sets variables of the environment that
    vLLM reads. Raises UserError for a flag that vLLM does not know, or that does not fit a recurrent-depth model.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    load_endpoint(os.environ)
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform

    arguments = first_module(*ARGUMENTS)
    first_module(*STARTUP).cli_env_setup()
    parser = _parser(arguments)
    vllm_defaults = {action.dest: action.default for action in parser._actions}
    unfit = _set_defaults(parser, model, defaults, recipe)
    args: Any = parser.parse_args(flags)
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    _set_engine(args, defaults, unfit)
    if args.model != model or args.model_tag is not None:
        raise UserError(f"vLLM flags name a model ({args.model_tag or args.model}); it stands before the --")
    _set_depth(args, defaults)
    lanes = defaults.engine == "lanes"
    if current_platform.is_cpu() and args.tensor_parallel_size > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", share_cores(args.tensor_parallel_size))
    check_arguments(vars(args), vllm_defaults, lanes)
    check_values(given)
    if current_platform.is_cpu() and args.block_size is not None:
        check_block_size(args.block_size)
    try:
        arguments.validate_parsed_serve_args(args)
    except (TypeError, ValueError, VLLMValidationError) as error:
        raise UserError(explained(error, given)) from None
    for line in trusted_code(args, model):  # before it runs
        print(f"loopwise: {line}", file=sys.stderr, flush=True)
    _check_tokenizer(args, model)
    exposure = check_exposure(args, defaults.http.open_metrics, os.environ)
    lines = [exposure, check_memory(args, defaults)]
    return args, given, [line for line in lines if line]


def first_module(*names: str) -> Any:
    """The first of the modules `names` that this release of vLLM has. Raises ModuleNotFoundError without any."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not (error.name and name.startswith(error.name)) or name == names[-1]:
                raise
    raise ModuleNotFoundError(", ".join(names))


def _parser(arguments: ModuleType) -> argparse.ArgumentParser:
    """vLLM's parser of its server's flags, whose errors are UserErrors."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message):
            raise UserError(f"vLLM: {parsed(message)}; its flags: loopwise serve MODEL -- --help=all")

    return arguments.make_arg_parser(Parser(prog="loopwise serve MODEL --"))


def _set_defaults(parser: argparse.ArgumentParser, model: str, defaults: Defaults, recipe: ServeRecipe) -> list[str]:
    """Give `parser` the recipe's values and those that the engine needs as defaults.

    Returns the names of vLLM's features that the model's KV policy excludes.
    """
    from vllm.platforms import current_platform

    parser.set_defaults(
        model=model,
        host=recipe.host,
        port=recipe.port,
        dtype=recipe.dtype,
        served_model_name=list(dict.fromkeys([recipe.name or Path(model).resolve().name, model])),
        shutdown_timeout=recipe.drain_seconds,
    )
    lanes = defaults.engine == "lanes"
    if current_platform.is_cpu():
        # The lane engine compiles one recurrence. The fixed engine compiles all, which takes minutes at every start.
        parser.set_defaults(enforce_eager=not lanes or lacks_compiler())
        if not os.environ.get(SPACE):
            parser.set_defaults(kv_cache_memory_bytes=CPU_CACHE_BYTES)
    unfit = [name for name, out in excluded(defaults.policy).items() if out] if lanes else []
    parser.set_defaults(**dict.fromkeys(unfit, False))
    return unfit


def _set_engine(args: Any, defaults: Defaults, unfit: list[str]) -> None:
    """Put the engine and its settings into `args`, for the configuration hook. The server's limits go with them.

    Raises UserError for flags that contradict them, and for features in `unfit` that are on.
    """
    given = args.additional_config or {}
    for name in (LANES, SETTINGS):
        if name in given:
            raise UserError(f"--additional-config {name}: the keys of `loopwise serve` set it, as passes_per_step=16")
    for name in unfit:
        if getattr(args, name):
            policy = defaults.policy
            why = "overwritten: a prompt's chunks would read each other's last recurrence"
            why = why if policy.overwrites else "packed: a block holds keys and values of later positions, too"
            raise UserError(f"--{name.replace('_', '-')} does not fit kv_policy={policy.name}, whose slots are {why}")
    usual = asdict(HttpLimits())
    limits = {name: value for name, value in asdict(defaults.http).items() if value != usual[name]}
    args.additional_config = {**given, SETTINGS: {"engine": defaults.engine, **limits}}
    if defaults.engine == "lanes":  # it compiles its own core, in place of vLLM's forward
        lanes = replace(defaults.lanes, compile=not args.enforce_eager, graphs=not args.enforce_eager)
        args.additional_config |= lanes.flags()["additional_config"]
        args.enforce_eager = True


def _set_depth(args: Any, defaults: Defaults) -> None:
    """Put the server's fields of the model's config into `args.hf_overrides`. Raises UserError for other overrides."""
    for name in args.hf_overrides or {}:
        if name not in ("num_recurrences", "max_recurrences"):
            raise UserError(
                f"--hf-overrides {name}: it replaces num_recurrences and max_recurrences alone; kv_policy and exits "
                "are keys of `loopwise serve`, and all else stands in the model's config.json"
            )
    args.hf_overrides = defaults.config | (args.hf_overrides or {})
    check_depth(args.hf_overrides["num_recurrences"], args.hf_overrides["max_recurrences"])


def _check_tokenizer(args: Any, model: str) -> None:
    """Raises UserError where the server needs the tokenizer of `model`, and there is none or it cannot be loaded."""
    from_model = args.tokenizer in (None, model) and args.tokenizer_mode in ("auto", "hf")
    if not from_model or args.skip_tokenizer_init or vars(args).get("tokens_only"):
        return
    tokenizer = load_tokenizer(model, args.trust_remote_code)
    if tokenizer is None:
        raise UserError(
            f"{model}: has no tokenizer: name another's directory with '-- --tokenizer', or do without one with "
            "'-- --skip-tokenizer-init'"
        )
    compare_vocabularies(model, tokenizer)


def run_server(
    args: argparse.Namespace, given: dict[str, Any], lines: list[str], facts: Facts, defaults: Defaults
) -> int:
    """Run vLLM's server to its end. Returns the exit code.

    `lines` and the server's address are printed once vLLM has accepted `args`. Raises UserError for arguments that vLLM
    rejects, which names the one of `given` at fault, and OSError for an address that cannot be used.
    """
    import uvloop

    own_processes()
    name, scheme = args.served_model_name[0], "https" if args.ssl_certfile else "http"
    where = f"{scheme}://{args.host}:{args.port}"
    place = f"{where}/v1, and a page to try it at {where}/depth"
    place = f"the Unix socket {args.uds}, under /v1" if args.uds else place
    lines.append(f"{name} ({facts.architecture}) will be at {place}")
    lines.append(replace(defaults, config=defaults.config | args.hf_overrides).line())
    if line := beyond_trained(facts.trained_recurrences, [args.hf_overrides["num_recurrences"]]):
        lines.append(line)
    try:
        if uvloop.run(_run(args, lines)):
            print("loopwise: error: vLLM's engine died; the reason stands in the lines above", file=sys.stderr)
            return 1
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:  # vLLM's ways to refuse a configuration
        raise UserError(explained(error, given)) from error
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        print("loopwise: error: vLLM's engine did not start; the reason stands in the lines above", file=sys.stderr)
        return 1
    return 0


async def _run(args: argparse.Namespace, lines: list[str]) -> bool:
    """Run the server as `vllm serve` does after parsing; this one can be stopped while the engine starts.

    `lines` are printed before that. Returns True where it ended because the engine died. The `vllm` command itself
    cannot be used: it asks for the version of a distribution named "vllm", and the wheel for CPUs has another name.
    """
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import setup_server

    from .announce import announce_at_start
    from .endpoint import Endpoint

    def stop(number, frame):
        # vLLM's own handler raises KeyboardInterrupt, which vllm.utils.network_utils.zmq_socket_ctx swallows.
        raise SystemExit(128 + number)

    announce_at_start(lines)
    address, listener = setup_server(args, reuse_port=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the HTTP server installs handlers that drain
        signal.signal(number, stop)
    # After the engine has ended, only clients that do not read, or do not end their requests, can keep the server.
    await run_server_worker(address, listener, args, timeout_graceful_shutdown=max(args.shutdown_timeout, 1))
    return Endpoint.latest is not None and Endpoint.latest.ending.dead
