"""`loopwise calibrate MODEL TEXT`: thresholds by which an expert-choice router takes its capacities, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..directory import new_file
from ..errors import UserError


def main(argv: list[str]) -> int:
    """Parse, calibrate, print. Returns the exit code."""
    parser = Parser(
        prog="loopwise calibrate",
        description="Let an expert-choice router choose tokens by thresholds, which as many tokens of TEXT pass as its "
        "capacities take. Thresholds are causal, so the model can be cached and served. Changes MODEL's config.json.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a recurrent-depth checkpoint with a router")
    parser.add_argument("text", metavar="TEXT", help="a text file")
    args = parser.parse_args(argv)

    from ..quiet import quiet

    quiet()
    router = calibrate(args.model, args.text)
    print(f"{'recurrence':>10} {'capacity':>9} {'threshold':>10}")
    for r, (share, threshold) in enumerate(zip(router["capacity"], router["thresholds"], strict=True)):
        print(f"{r + 1:>10} {share:>9.3g} {threshold:>10.4f}")
    print(f"written: {args.model}/config.json (router.inference=threshold)")
    return 0


def calibrate(model: str | Path, text: str) -> dict[str, Any]:
    """Set the thresholds of the router of the checkpoint `model` by the first tokens of file `text`; its new fields.

    Changes config.json. Recurrences are calibrated in order, as each chooses among the tokens of the one before. Raises
    UserError for a model without an expert-choice router, and for a file that is no text, or too short.
    """
    import torch

    from .influence import text_tokens
    from .source_config import read_recurrent_config
    from .verify import reloaded

    path = Path(model).expanduser()
    config = read_recurrent_config(path)
    if not config.router or config.router["kind"] != "expert":
        raise UserError(f"{path} has no expert-choice router; there is nothing to calibrate")
    ids = text_tokens(path, config, text, "TEXT ")
    with reloaded(path) as (streamed, _), torch.no_grad():
        router = streamed.config.router or {}
        router["inference"] = "threshold"
        for r, share in enumerate(router["capacity"]):
            routed = streamed(ids, use_cache=False, logits_to_keep=1).router_outputs
            logits = routed.logits if routed.auxiliary_logits is None else routed.auxiliary_logits
            scores = logits[..., r][routed.candidates[..., r]].sigmoid().sort(descending=True).values
            taken = max(1, round(share * ids.numel()))
            # The threshold lies between two scores: rounding may undercut a token's own.
            router["thresholds"][r] = scores[taken - 1 : taken + 1].mean().item() if taken < len(scores) else 0.0
    _write_router(path / "config.json", router)
    return router


def _write_router(file: Path, router: dict[str, Any]) -> None:
    """Replace the field `router` of config.json. Raises UserError where `file` cannot be written."""
    fields = {**json.loads(file.read_text()), "router": router}
    try:
        with new_file(file) as partial:
            partial.write_text(json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
