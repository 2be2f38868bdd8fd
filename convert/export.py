"""`loopwise export MODEL OUT --unroll R`: a plain checkpoint of the source architecture, for any engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..directory import RECORD, ended_by_sigterm, new_directory
from ..errors import UserError


def main(argv: list[str]) -> int:
    """Parse, export, print what was written and verified. Returns the exit code."""
    parser = Parser(
        prog="loopwise export",
        description="Write a recurrent-depth model at a fixed depth as a plain checkpoint of its source architecture.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a recurrent-depth checkpoint")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--unroll", metavar="R", type=int, required=True, help="recurrences to write out as layers")
    parser.add_argument("--force", action="store_true", help="replace an OUT that Loopwise wrote")
    parser.add_argument("--no-verify", action="store_true", help="skip the check against MODEL")
    args = parser.parse_args(argv)

    from ..quiet import quiet

    quiet()
    with ended_by_sigterm():
        found = export(args.model, args.out, args.unroll, args.force, not args.no_verify, sys.stderr.isatty())
    from .agreement import shown

    verified = f"verified, {shown(found)}" if found else "not verified"
    print(f"written: {args.out} ({verified})")
    return 0


def export(
    model: str | Path,
    out: str | Path,
    unroll: int,
    force: bool = False,
    check: bool = True,
    show_progress: bool = False,
) -> dict[str, float] | None:
    """Write `model` at R = `unroll` as layers prelude, R x core, coda of a plain model of the source architecture.

    Returns the largest difference in logits between the written model, reloaded, and `model` at that R, by the dtype
    in which both computed them; None without `check`. Raises UserError for what the source architecture cannot express:
    an injection, a state that does not start as the input.
    """
    import torch

    from loopwise.version import __version__

    from ..carried import copy_licences
    from ..model import RecurrentDepthForCausalLM
    from ..model.source_layers import layer_list_name
    from ..unroll import config_with_layers
    from .agreement import decisive
    from .generation import write_generation_config
    from .recipe import DEEPEST
    from .relax import at_depth
    from .source import SourceWeights, empty_model, read_recurrent_config
    from .tokenizer import load_tokenizer, write_tokenizer
    from .write import Pending, write_weights

    path = Path(model).expanduser()
    config = read_recurrent_config(path)
    if not 1 <= unroll <= DEEPEST:
        raise UserError(f"--unroll {unroll}: from 1 to {DEEPEST} recurrences")
    kind = config.source_config.model_type
    if config.injection != "none":
        raise UserError(
            f"{path} has injection={config.injection!r}, which mixes the input into every recurrence; a plain {kind} "
            "has no such layer, so it cannot be exported"
        )
    plain = {"recurrence_norm": "none", "recurrence_residual": False, "recurrence_encoding": "none", "halting": "none"}
    for name, without in plain.items():
        if (value := getattr(config, name)) != without:
            raise UserError(f"{path} has {name}={value!r}, and a plain {kind} no such thing; it cannot be exported")
    if config.router:
        raise UserError(
            f"{path} has a router, which leaves tokens out of recurrences; a plain {kind} runs every layer on every "
            "token, so it cannot be exported"
        )
    tokenizer = load_tokenizer(path)
    places = config.order(unroll)
    ids = [getattr(config, part)[n] for part, n, _ in places]
    target = config_with_layers(config.source_config, ids)
    with torch.device("meta"):
        recurrent, plain = RecurrentDepthForCausalLM(config), empty_model(target)
    layers = layer_list_name(plain, len(ids))
    with SourceWeights(path, recurrent) as weights:
        tensors = [
            Pending(
                weights.stored_name(name).removeprefix("source."),
                weights.dtype(name),
                weights.shape(name),
                partial(weights.read, name),
            )
            for name in weights.names()
            if name.startswith("source.")
        ]
        for number, (part, n, depth) in enumerate(places):
            for suffix, tensor in plain.get_submodule(f"{layers}.{number}").state_dict().items():
                make = partial(at_depth, weights, part, n, suffix, depth)
                tensors.append(Pending(f"{layers}.{number}.{suffix}", config.dtype, list(tensor.shape), make))
        target.dtype, target.architectures = config.dtype, [type(plain).__name__]
        with new_directory(Path(out), path, force) as directory:
            target.save_pretrained(directory)
            if tokenizer is not None:
                write_tokenizer(tokenizer, directory)
            notes = write_generation_config(path, directory)
            copy_licences(path, directory)
            write_weights(tensors, directory, show_progress)
            differences = _verify(path, directory, unroll, config, target, layers) if check else None
            facts = {
                "loopwise": __version__,
                "source": {"id": str(model)},
                "unroll": unroll,
                "notes": notes,
                "max_dlogit": decisive(differences) if differences else None,
                "max_dlogit_by_dtype": differences,
            }
            (directory / RECORD).write_text(json.dumps(facts, indent=2) + "\n")
    return differences


def _verify(path: Path, directory: Path, unroll: int, config: Any, target: Any, layers: str) -> dict[str, float]:
    """Largest difference in logits between the two checkpoints, by the dtype in which it was computed.

    Every tensor is compared with that of MODEL, a merged one with the merged weight rounded as on writing. Without LoRA
    the logits are to agree as `agreement` says. With it they do before merged weights are rounded; what is returned
    then is what that rounding does. Raises UserError where something else makes the two differ.
    """
    import torch

    from .agreement import Logits, agreement, in_double
    from .double import Double
    from .expected import check_config, check_equal
    from .relax import at_depth
    from .source import empty_model
    from .stream import streamed
    from .verify import reloaded, sample

    check_config(directory, target)
    ids, mask = sample(config, seed=0)
    places, what = config.order(unroll), f"the plain model and MODEL at {unroll} recurrences"

    def expected(weights: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
        if not name.startswith(f"{layers}."):
            return weights.read(f"source.{name}")
        number, _, suffix = name.removeprefix(f"{layers}.").partition(".")
        part, n, depth = places[int(number)]
        return at_depth(weights, part, n, suffix, depth, dtype)

    def run(model: Any, **options: int) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, attention_mask=mask, use_cache=False, **options).logits[mask.bool()]

    def logits(dtype: torch.dtype) -> Iterator[Logits]:
        with reloaded(path, dtype) as (model, _), reloaded(directory, dtype) as (plain, _):
            yield Logits(what, run(plain), run(model, num_recurrences=unroll))

    def unrounded(dtype: torch.dtype) -> Iterator[Logits]:
        with reloaded(path, dtype) as (model, weights):
            plain = streamed(lambda: empty_model(target), lambda name: expected(weights, name, dtype), dtype)
            yield Logits(f"{what}, before rounding,", run(plain), run(model, num_recurrences=unroll))

    with reloaded(path) as (_, weights), reloaded(directory) as (_, written):
        for name in written.names():
            want = expected(weights, name, torch.float32)
            inside = name.startswith(f"{layers}.")
            check_equal(name, written.read(name), want.to(config.dtype) if inside else want)
    if not config.relaxation:
        return agreement(logits, config.dtype)
    in_double(unrounded)
    with Double():
        (pair,) = logits(torch.float64)
    return {"float64": (pair.got - pair.want).abs().max().item()}
