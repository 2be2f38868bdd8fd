"""`loopwise serve MODEL [--recipe NAME|FILE] [key=value ...] [-- vLLM flags]`: vLLM's OpenAI server with our plugin."""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import nullcontext
from importlib.util import find_spec

from ..arguments import RecipeParser
from ..errors import UserError, missing
from ..find_source import find_model
from ..hub import is_hub_id
from ..recipe import load_recipe
from .api.generation_config import fields_of
from .checkpoint import check_config, check_tensors
from .defaults import choose
from .recipe import ServeRecipe
from .vllm.arguments import check_environment, refuse
from .vllm.launch import parse_arguments, run_server


def main(argv: list[str]) -> int:
    """Check the model, then serve until SIGTERM or Ctrl-C. Returns the exit code."""
    argv, flags = _split(argv)
    operands = {"model": "directory or hub id of a recurrent-depth checkpoint"}
    about = "Serve a recurrent-depth model behind vLLM's OpenAI-compatible API."
    parser = RecipeParser("serve", operands, ServeRecipe, about)
    parser.usage = "%(prog)s MODEL [--recipe NAME|FILE] [key=value ...] [-- vLLM flags]"
    parser.epilog = f"{parser.epilog}\n\nvLLM's flags, which win over keys: loopwise serve MODEL -- --help=all"
    args = parser.parse(argv)
    recipe = load_recipe(ServeRecipe, "serve", args.recipe, args.settings)
    if is_hub_id(args.model):
        recipe.name = recipe.name or args.model
    args.model = str(find_model(args.model, recipe.revision))
    facts = check_config(args.model)
    refuse({"quantization": facts.quantization})
    defaults = choose(facts, recipe)
    if find_spec("vllm") is None:
        raise missing("serving", "vLLM on Linux", "serve", " with an NVIDIA GPU, or make setup without one")
    elsewhere = any(flag.startswith(("--host", "--port", "--uds")) for flag in flags)
    check_environment(os.environ)
    fields_of(args.model)
    claim = None if elsewhere else _claim_port(recipe.host, recipe.port)
    with claim or nullcontext():
        check_tensors(args.model)
        arguments, given, lines = parse_arguments(args.model, defaults, recipe, flags)
        try:
            return run_server(arguments, given, lines, facts, defaults)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
                raise
            raise _address_error(arguments.host, arguments.port, error) from None


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """`argv` before and after the first `--`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _claim_port(host: str, port: int) -> socket.socket | None:
    """A claim on the address, held until the returned socket is closed; None where the system has no such claims.

    vLLM binds its socket before the engine starts and listens on it afterwards. In between, the kernel lets a second
    server bind too, which then never answers. So the address is also claimed by a name, one of Linux's abstract
    sockets, that another `loopwise serve` cannot have. Raises UserError for an address that cannot be used, before the
    half minute that an engine takes to start.
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
