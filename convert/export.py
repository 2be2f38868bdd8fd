"""`loopwise export MODEL OUT --unroll R`: a plain checkpoint of the source architecture, for any engine."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Parser
from ..directory import check_room, claimed, ended_by_sigterm, new_directory, record_of, write_record
from ..errors import UserError
from ..find_source import commit_of, find_model
from ..push import add_options, check_target, push
from .finished import check_done
from .recipe import DEEPEST

if TYPE_CHECKING:
    from ..model import RecurrentDepthConfig


def main(argv: list[str]) -> int:
    """Parse, export, print the directory and the result of verification. Returns the exit code."""
    parser = Parser(
        prog="loopwise export",
        description="Write a recurrent-depth model at a fixed depth as a plain checkpoint of its source architecture.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of a recurrent-depth checkpoint")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--unroll", metavar="R", type=int, required=True, help="recurrences to write out as layers")
    parser.add_argument("--force", action="store_true", help="replace an OUT that Loopwise wrote")
    parser.add_argument("--no-verify", action="store_true", help="skip the check against MODEL")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a hub id (default: main)")
    add_options(parser)
    args = parser.parse_args(argv)
    out = Path(args.out).expanduser()
    with ended_by_sigterm(), claimed(out):
        target = check_target(args, args.model, out)
        if target and _is_done(args, out):
            print(f"{out}: whole, and from the same model at the same depth; nothing is made again")
        else:
            _export(args)
        if target:
            push(target, out)
    return 0


def _is_done(args: argparse.Namespace, out: Path) -> bool:
    """True where OUT holds what the command line `args` makes. Raises UserError where it is another output."""
    if args.force or not record_of(out):
        return False
    model = find_model(args.model, args.revision, weights=False)
    check_done(out, args.model, model, {"unroll": args.unroll}, not args.no_verify)
    return True


def _export(args: argparse.Namespace) -> None:
    """Export by the command line `args`; print the directory and the result of verification."""
    from ..quiet import quiet
    from .agreement import in_words

    quiet()
    check, bar = not args.no_verify, sys.stderr.isatty()
    found = export(args.model, args.out, args.unroll, args.force, check, bar, args.revision)
    verified = f"verified, {in_words(found)}" if found else "not verified"
    print(f"written: {args.out} ({verified})", flush=True)


def export(
    model: str | Path,
    out: str | Path,
    unroll: int,
    force: bool = False,
    check: bool = True,
    show_progress: bool = False,
    revision: str | None = None,
) -> dict[str, float] | None:
    """Write the checkpoint `model` at R = `unroll` as a plain model of the source architecture into `out`.

    model: a directory, or a hub id at `revision`. The layers of `out` are prelude, R x core, coda, with LoRA merged.
    `out` appears complete or not at all. Returns the largest difference of logits between the written model, reloaded,
    and `model` at that R, by the dtype in which both computed them; None without `check`. Raises UserError for a model
    that the source architecture cannot express.
    """
    from loopwise.version import __version__

    from ..card import copy_licences
    from ..carried import CARD
    from .agreement import decisive
    from .card import export_card
    from .generation import write_generation_config
    from .hashes import hashing
    from .shards import Shards
    from .source_config import read_recurrent_config
    from .tokenizer import load_tokenizer, write_tokenizer
    from .unrolled import Unrolled
    from .write import write_weights

    path = find_model(model, revision)
    config = read_recurrent_config(path)
    if not 1 <= unroll <= DEEPEST:
        raise UserError(f"--unroll {unroll}: from 1 to {DEEPEST} recurrences")
    check_expressible(Path(model), config, unroll)
    tokenizer = load_tokenizer(path)
    with Unrolled(path, config, unroll) as unrolled, ExitStack() as stack:
        check_room(Path(out), Shards(unrolled.pending, path).bytes)
        directory = stack.enter_context(new_directory(Path(out), path, force))
        unrolled.config.save_pretrained(directory)
        if tokenizer is not None:
            write_tokenizer(tokenizer, directory)
        notes = [*write_generation_config(path, directory), *unrolled.notes]
        copy_licences(path, directory)
        with hashing(unrolled.weights.files) as hashes:
            write_weights(unrolled.pending, directory, show_progress)
        differences = unrolled.verify(directory) if check else None
        facts = {
            "loopwise": __version__,
            "source": {"id": str(model), "revision": commit_of(path), "sha256": hashes},
            "unroll": unroll,
            "notes": notes,
            "max_dlogit": decisive(differences) if differences else None,
            "max_dlogit_by_dtype": differences,
        }
        write_record(directory, facts)
        (directory / CARD).write_text(export_card(facts, unrolled.config, path, directory), encoding="utf-8")
    return differences


def check_expressible(path: Path, config: RecurrentDepthConfig, unroll: int) -> None:
    """Raise UserError where a plain model of the source architecture cannot compute the checkpoint at `path` at R =
    `unroll`. The error names the engines that run it as it is."""
    try:
        _check_plain(path, config, unroll)
    except UserError as error:
        raise UserError(
            f"{error}; `loopwise serve` and transformers (trust_remote_code=True) run it as it is"
        ) from None


def _check_plain(path: Path, config: RecurrentDepthConfig, unroll: int) -> None:
    """Raise UserError for the first part of the model that a plain one lacks."""
    from ..model.configuration_source import OWN  # imports transformers

    kind = config.source_config.model_type
    if kind in OWN:
        raise UserError(f"{path} has {kind} layers, and transformers has no such model, so it cannot be exported")
    if config.injection != "none":
        raise UserError(
            f"{path} has injection={config.injection!r}, which mixes the input into every recurrence; a plain {kind} "
            "has no such layer, so it cannot be exported"
        )
    plain = {"recurrence_norm": "none", "recurrence_residual": False, "recurrence_encoding": "none", "halting": "none"}
    plain |= {"prelude_norm": False, "state_projection": False, "time_conditioning": None}
    if config.recurrence_norm == "between":
        del plain["recurrence_norm"]
        if unroll > 1:
            raise UserError(
                f"{path} has recurrence_norm='between': a norm stands between two recurrences, and a plain {kind} "
                "has none there; --unroll 1 exports it"
            )
    for name, without in plain.items():
        if (value := getattr(config, name)) != without:
            raise UserError(f"{path} has {name}={value!r}, and a plain {kind} no such thing; it cannot be exported")
    if unroll > 1 and config.kv_policy not in ("per-depth", "last-exited"):
        raise UserError(
            f"{path} has kv_policy={config.kv_policy!r}: recurrences share keys and values, and each layer of a plain "
            f"{kind} has its own; --unroll 1 exports it"
        )
    if config.recurrence_damping != 1 and (unroll > 1 or config.recurrence_damping == "selective"):
        raise UserError(
            f"{path} has recurrence_damping={config.recurrence_damping}: each recurrence takes a share of the state "
            f"before, and a plain {kind} has no such step"
            + ("" if config.recurrence_damping == "selective" else "; --unroll 1 exports it")
        )
    if config.router:
        raise UserError(
            f"{path} has a router, which leaves tokens out of recurrences; a plain {kind} runs every layer on every "
            "token, so it cannot be exported"
        )
