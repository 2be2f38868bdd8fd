"""`loopwise export MODEL OUT --unroll R`: a plain checkpoint of the source architecture, for any engine."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..directory import ended_by_sigterm
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
    parser.add_argument("--force", action="store_true", help="replace a non-empty OUT")
    parser.add_argument("--no-verify", action="store_true", help="skip the check against MODEL")
    args = parser.parse_args(argv)

    from ..quiet import quiet

    quiet()
    with ended_by_sigterm():
        difference = export(args.model, args.out, args.unroll, args.force, not args.no_verify, sys.stderr.isatty())
    verified = "not verified" if difference is None else f"verified, max |dlogit| {difference:.3g}"
    print(f"written: {args.out} ({verified})")
    return 0


def export(
    model: str | Path,
    out: str | Path,
    unroll: int,
    force: bool = False,
    check: bool = True,
    show_progress: bool = False,
) -> float | None:
    """Write `model` at R = `unroll` as layers prelude, R x core, coda of a plain model of the source architecture.

    Returns the largest difference in logits between the written model, reloaded, and `model` at that R; None
    without `check`. Raises UserError for what the source architecture cannot express: an injection, a state that does
    not start as the input.
    """
    import torch

    from ..model import RecurrentDepthForCausalLM
    from ..model.source_layers import layer_list_name
    from ..unroll import config_with_layers
    from .recipe import DEEPEST
    from .relax import at_depth
    from .source import SourceWeights, copy_carried, empty_model, read_recurrent_config
    from .write import Pending, new_directory, write_weights

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
            copy_carried(path, directory)
            write_weights(tensors, directory, show_progress)
            target.save_pretrained(directory)
            return _verify(path, directory, unroll, config) if check else None


def _verify(path: Path, directory: Path, unroll: int, config: Any) -> float:
    """Largest difference in logits between the two checkpoints. Raises UserError where it is more than rounding: with
    LoRA, of the merged weights."""
    import torch

    from .verify import TOLERANCE, difference, reloaded, sample

    dtype = torch.float32 if config.relaxation else None
    with reloaded(path, dtype) as (want, _), reloaded(directory, dtype) as (got, _), torch.no_grad():
        ids, mask = sample(config, seed=0)
        a = want(ids, attention_mask=mask, num_recurrences=unroll, use_cache=False).logits
        b = got(ids, attention_mask=mask, use_cache=False).logits
        tolerance = 0.0
        if config.relaxation:
            rounding = 8 * torch.finfo(config.dtype).eps * a.abs().max().item()
            tolerance = max(TOLERANCE, 0 if config.dtype == torch.float32 else rounding)
        return difference(b, a, mask, "the plain model", tolerance)
