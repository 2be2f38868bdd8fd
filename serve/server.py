"""`loopwise serve MODEL [--recipe NAME|FILE] [key=value ...] [-- vLLM flags]`: vLLM's OpenAI server with our plugin."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..arguments import RecipeParser
from ..errors import UserError, missing
from ..recipe import load_recipe
from ..trained import beyond_trained
from .checkpoint import Facts, check_config, check_tensors, load_tokenizer
from .defaults import Defaults, choose
from .generation_config import fields_of
from .recipe import ServeRecipe
from .startup import (
    SPACE,
    check_block_size,
    check_memory,
    compare_vocabularies,
    lacks_compiler,
    share_cores,
    take_generation_config,
)
from .vllm import SERVER
from .vllm.arguments import check_arguments, check_environment
from .vllm.arrivals import ARRIVALS, share
from .vllm.explained import check_values, explained, parsed
from .vllm.lanes import LANES
from .vllm.limits import check_depth

CPU_CACHE_BYTES = 2 << 30  # vLLM would take most of the machine's memory
# Modules of vLLM 0.33, and where they were before.
ARGUMENTS = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args")
STARTUP = ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils")


def main(argv: list[str]) -> int:
    """Check the model, then serve until SIGTERM or Ctrl-C. Returns the exit code."""
    argv, flags = _split(argv)
    operands = {"model": "directory of a recurrent-depth checkpoint"}
    about = "Serve a recurrent-depth model behind vLLM's OpenAI-compatible API."
    parser = RecipeParser("serve", operands, ServeRecipe, about)
    parser.usage = "%(prog)s MODEL [--recipe NAME|FILE] [key=value ...] [-- vLLM flags]"
    parser.epilog = f"{parser.epilog}\n\nvLLM's flags, which win over keys: loopwise serve MODEL -- --help=all"
    args = parser.parse(argv)
    recipe = load_recipe(ServeRecipe, "serve", args.recipe, args.settings)
    args.model = str(Path(args.model).expanduser())
    facts = check_config(args.model)
    defaults = choose(facts, recipe)
    if find_spec("vllm") is None:
        raise missing("serving", "vLLM on Linux", "serve", " with an NVIDIA GPU, or make setup without one")
    elsewhere = any(flag.startswith(("--host", "--port", "--uds")) for flag in flags)
    check_environment(os.environ)
    fields_of(args.model)
    claim = None if elsewhere else _claim_port(recipe.host, recipe.port)
    with claim or nullcontext():
        check_tensors(args.model)
        return _serve(*_vllm_arguments(args.model, defaults, recipe, flags), facts, defaults)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _claim_port(host: str, port: int) -> socket.socket | None:
    """Raises UserError where the address cannot be had, before half a minute is spent on an engine.

    vLLM binds its socket before the engine starts and listens on it afterwards; in between, the kernel lets a second
    server bind too, which then stays silent for ever. So the address is also claimed by a name, one of Linux's abstract
    sockets, that another `loopwise serve` cannot have until the returned socket is closed.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        if sys.platform != "linux":
            return None
        claim = socket.socket(socket.AF_UNIX)
        claim.bind(f"\0loopwise serve {host}:{port}")
        return claim
    except OSError as error:
        raise _address_error(host, port, error) from None


def _address_error(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} of {host} is in use; choose another with port=...")
    return UserError(f"cannot listen on {host}:{port} ({error.strerror or error})")


def _vllm_arguments(
    model: str, defaults: Defaults, recipe: ServeRecipe, flags: list[str]
) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    """vLLM's own arguments: its `flags` win over the recipe, and the recipe over vLLM's defaults. Those of them that
    the flags name, and what there is to say when the server starts, stand beside them.

    Raises UserError for a flag that vLLM does not know or that does not fit a recurrent-depth model.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message):
            raise UserError(f"vLLM: {parsed(message)}; its flags: loopwise serve MODEL -- --help=all")

    arguments = first_module(*ARGUMENTS)
    first_module(*STARTUP).cli_env_setup()
    parser = arguments.make_arg_parser(Parser(prog="loopwise serve MODEL --"))
    usual = {action.dest: action.default for action in parser._actions}
    parser.set_defaults(
        model=model,
        host=recipe.host,
        port=recipe.port,
        dtype=recipe.dtype,
        served_model_name=list(dict.fromkeys([recipe.name or Path(model).resolve().name, model])),
        shutdown_timeout=recipe.drain_seconds,
    )
    lanes = defaults.lanes.flags() if defaults.engine == "lanes" else {}
    if current_platform.is_cpu():
        # Of lanes one recurrence is compiled; all of a fixed depth takes minutes at every start, if asked for.
        parser.set_defaults(enforce_eager=not lanes or lacks_compiler())
        if not os.environ.get(SPACE):
            parser.set_defaults(kv_cache_memory_bytes=CPU_CACHE_BYTES)
    if lanes and os.environ["VLLM_USE_V2_MODEL_RUNNER"] != "0":
        raise UserError("VLLM_USE_V2_MODEL_RUNNER must be 0: the lane engine builds on vLLM's first model runner")
    parser.set_defaults(**{name: value for name, value in lanes.items() if name != "additional_config"})
    unfit = []
    if lanes:
        policy = defaults.policy
        does_not = {"enable_chunked_prefill": policy.overwrites, "enable_prefix_caching": not policy.shares}
        unfit = [name for name, no in does_not.items() if no]
    parser.set_defaults(**dict.fromkeys(unfit, False))
    args: Any = parser.parse_args(flags)
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    if LANES in (args.additional_config or {}):
        raise UserError(f"--additional-config {LANES}: the keys of `loopwise serve` set it, as ticks=16")
    if lanes:  # whose core is compiled, instead of vLLM's own forward
        lanes = replace(defaults.lanes, compile=not args.enforce_eager, graphs=not args.enforce_eager).flags()
        args.enforce_eager = True
    for name, value in lanes.items():
        if name != "additional_config" and getattr(args, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} does not fit engine=lanes; use engine=fixed"
            )
    for name in unfit:
        if getattr(args, name):
            policy = defaults.policy
            why = "overwritten: a prompt's chunks would read each other's last recurrence"
            why = why if policy.overwrites else "packed: a block holds keys and values of later positions, too"
            raise UserError(f"--{name.replace('_', '-')} does not fit kv_policy={policy.name}, whose slots are {why}")
    args.additional_config = {**(args.additional_config or {}), **lanes.get("additional_config", {})}
    if args.model != model or args.model_tag is not None:
        raise UserError(f"vLLM flags name a model ({args.model_tag or args.model}); it stands before the --")
    for name in args.hf_overrides or {}:
        if name not in ("num_recurrences", "max_recurrences"):
            raise UserError(
                f"--hf-overrides {name}: it replaces num_recurrences and max_recurrences alone; kv_policy and exits "
                "are keys of `loopwise serve`, and all else stands in the model's config.json"
            )
    args.hf_overrides = defaults.config | (args.hf_overrides or {})
    check_depth(args.hf_overrides["num_recurrences"], args.hf_overrides["max_recurrences"])
    if current_platform.is_cpu() and args.tensor_parallel_size > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", share_cores(args.tensor_parallel_size))
    check_arguments({n: v for n, v in vars(args).items() if n not in lanes}, usual, bool(lanes))
    check_values(given)
    take_generation_config(args)
    if current_platform.is_cpu() and args.block_size is not None:
        check_block_size(args.block_size)
    try:
        arguments.validate_parsed_serve_args(args)
    except (TypeError, ValueError, VLLMValidationError) as error:
        raise UserError(explained(error, given)) from None
    own = args.tokenizer in (None, model) and args.tokenizer_mode in ("auto", "hf")
    wanted = own and not args.skip_tokenizer_init and not vars(args).get("tokens_only")
    tokenizer = load_tokenizer(model, args.trust_remote_code) if wanted else None
    if wanted and tokenizer is None:
        raise UserError(
            f"{model}: has no tokenizer: name another's directory with '-- --tokenizer', or do without one with "
            "'-- --skip-tokenizer-init'"
        )
    if tokenizer is not None:
        compare_vocabularies(model, tokenizer)
    memory = check_memory(args, defaults)
    return args, given, [memory] if memory else []


def first_module(*names: str) -> Any:
    """The first of the modules `names` that this release of vLLM has. Raises ModuleNotFoundError without any."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not (error.name and name.startswith(error.name)) or name == names[-1]:
                raise
    raise ModuleNotFoundError(", ".join(names))


def _serve(args: argparse.Namespace, given: dict[str, Any], lines: list[str], facts: Facts, defaults: Defaults) -> int:
    """Run vLLM's server to its end; `lines`, and where it will be, are said once vLLM has taken all of `args`. Returns
    the exit code; raises UserError for what vLLM finds wrong with them, naming the one of `given` that is at fault."""
    import uvloop

    os.environ[SERVER] = str(os.getpid())
    if defaults.engine == "lanes" and sys.platform == "linux":
        os.environ[ARRIVALS] = share()
    where = f"http://{args.host}:{args.port}/v1"
    lines.append(f"{args.served_model_name[0]} ({facts.architecture}) will be at {where}")
    lines.append(replace(defaults, config=defaults.config | args.hf_overrides).line())
    if line := beyond_trained(facts.trained_recurrences, [args.hf_overrides["num_recurrences"]]):
        lines.append(line)
    try:
        if uvloop.run(_run(args, lines)):
            print("loopwise: error: vLLM's engine died; the lines above tell why", file=sys.stderr)
            return 1
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
            raise
        raise _address_error(args.host, args.port, error) from None
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:  # vLLM's ways to refuse a configuration
        raise UserError(explained(error, given)) from error
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        print("loopwise: error: vLLM's engine did not start; the lines above tell why", file=sys.stderr)
        return 1
    return 0


async def _run(args: argparse.Namespace, lines: list[str]) -> bool:
    """Run the server as `vllm serve` does once it has parsed its arguments; this one can be stopped while the engine
    starts. `lines` are printed before that. Returns True where it ended because the engine died.

    The `vllm` command itself cannot be used: it asks for the version of a distribution named "vllm", and the wheel for
    CPUs has another name.
    """
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import setup_server

    from .vllm.http import install
    from .vllm.metrics import DepthMetrics
    from .vllm.starting import say_first

    def stop(number, frame):
        # vLLM's own handler raises KeyboardInterrupt, which vllm.utils.network_utils.zmq_socket_ctx swallows.
        raise SystemExit(128 + number)

    metrics = DepthMetrics(args.served_model_name[0]).update if LANES in args.additional_config else None
    ending = install(metrics)
    say_first(lines)
    address, listener = setup_server(args, reuse_port=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the HTTP server runs and brings handlers that drain
        signal.signal(number, stop)
    # Once the engine has ended, only clients that do not read, or do not end their requests, can keep the server.
    await run_server_worker(address, listener, args, timeout_graceful_shutdown=max(args.shutdown_timeout, 1))
    return ending.dead
