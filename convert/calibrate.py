"""Thresholds by which an expert-choice router takes its capacities, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..directory import new_file
from ..errors import UserError


def calibrate(model: str | Path, text: str) -> dict[str, Any]:
    """Set the thresholds of the router of the checkpoint `model` by the first tokens of file `text`; its new fields.

    Changes config.json. Raises UserError as `router_thresholds` does, and where config.json cannot be written.
    """
    path = Path(model).expanduser()
    router = router_thresholds(path, text, "TEXT ")
    write_fields(path / "config.json", {"router": router})
    return router


def router_thresholds(path: Path, text: str, label: str) -> dict[str, Any]:
    """The fields of the router of the checkpoint `path`, with thresholds by the first tokens of file `text`.

    As many tokens pass a threshold as the router's capacity takes. Recurrences are calibrated in order, as each chooses
    among the tokens of the one before. Raises UserError for a model without an expert-choice router, and, in which
    `label` precedes the name of the file, for a file that is no text, or too short.
    """
    import torch

    from .influence import text_tokens
    from .source_config import read_recurrent_config
    from .verify import reloaded

    config = read_recurrent_config(path)
    if not config.router or config.router["kind"] != "expert":
        raise UserError(f"{path} has no expert-choice router; there is nothing to calibrate")
    ids = text_tokens(path, config, text, label)
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
    return router


def router_table(router: dict[str, Any]) -> str:
    """Capacities and thresholds of a router's fields."""
    lines = [f"{'recurrence':>10} {'capacity':>9} {'threshold':>10}"]
    for r, (share, threshold) in enumerate(zip(router["capacity"], router["thresholds"], strict=True)):
        lines.append(f"{r + 1:>10} {share:>9.3g} {threshold:>10.4f}")
    return "\n".join(lines)


def write_fields(file: Path, fields: dict[str, Any]) -> None:
    """Replace `fields` of the config.json `file`. Raises UserError where it cannot be written."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    try:
        with new_file(file) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
