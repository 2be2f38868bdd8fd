"""`loopwise inspect MODEL [--json]`: what a recurrent-depth checkpoint is made of, and what its depth costs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from ..arguments import Parser

DEPTHS = (1, 2, 4, 8, 16, 32)


def main(argv: list[str]) -> int:
    """Parse, print. Returns the exit code."""
    parser = Parser(prog="loopwise inspect", description="Layers, parameters, KV bytes and FLOPs of a checkpoint.")
    parser.add_argument("model", metavar="MODEL", help="directory of a recurrent-depth checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)

    from ..quiet import quiet

    quiet()
    facts = inspect(args.model)
    print(json.dumps(facts) if args.json else table(facts))
    return 0


def inspect(model: str | Path) -> dict[str, Any]:
    """Facts of the recurrent-depth checkpoint directory `model`. Raises UserError where it is none.

    `parameters`: unique, and effective at each R (the core counted R times). `kv_bytes_per_token` at each R: a depth
    has its own keys and values, in the checkpoint's dtype. `flops_per_token`: forward, 2 for each parameter that
    multiplies (embedding look-ups and attention scores left out), so that F(R) = F0 + R Fr. With a router both are
    means over tokens, if each recurrence takes its capacity (expert-choice), or at most this (token-choice).
    """
    import torch

    from ..model import RecurrentDepthForCausalLM
    from .source import read_recurrent_config

    config = read_recurrent_config(Path(model).expanduser())
    with torch.device("meta"):
        meta: Any = RecurrentDepthForCausalLM(config)
    counts = {
        name: sum(p.numel() for p in getattr(meta, name).parameters())
        for name in ("prelude", "core", "coda", "injection")
    }
    total = sum(p.numel() for p in meta.parameters())
    recurring = counts["core"] + counts["injection"]
    head = meta.get_output_embeddings()
    head_size = 0 if head is None else head.weight.numel()
    fixed = 2 * (counts["prelude"] + counts["coda"] + head_size)
    slot = _kv_bytes(config)
    core, outside = len(config.core), len(config.prelude) + len(config.coda)
    fields = config.router or {}
    share = [0.0, *itertools.accumulate(fields.get("capacity", [1.0] * config.max_recurrences))]  # of tokens, up to R
    kept = [min(r, 1) for r in range(len(share))] if fields.get("kv") == "first-recursion" else share
    depths = [r for r in DEPTHS if r <= config.max_recurrences]
    if config.num_recurrences not in depths:
        depths = sorted([*depths, config.num_recurrences])
    return {
        "model": str(model),
        "source": config.source_config.model_type,
        "prelude": config.prelude,
        "core": config.core,
        "coda": config.coda,
        "injection": config.injection,
        "state_init": config.state_init,
        "router": config.router,
        "num_recurrences": config.num_recurrences,
        "max_recurrences": config.max_recurrences,
        "parameters": {
            "unique": total,
            **counts,
            "effective": {r: total + (r - 1) * recurring for r in depths},
        },
        "kv_bytes_per_token": {r: round(slot * (outside + core * kept[r])) for r in depths},
        "flops_per_token": {r: round(fixed + 2 * recurring * share[r]) for r in depths},
    }


def describe(router: dict[str, Any]) -> str:
    """A router in a few words."""
    words = f"{router['kind']}-choice, {router['network']}, {router['alpha']:g} {router['gate']}, {router['kv']} KV"
    if router["kind"] == "token":
        return words
    numbers = router["capacity"] if router["inference"] == "topk" else router["thresholds"]
    return f"{words}, {router['inference']} {', '.join(f'{number:.3g}' for number in numbers)}"


def _kv_bytes(config: Any) -> int:
    """Bytes of one token's keys and values in one slot."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = config.dtype.itemsize if config.dtype is not None else 4
    return 2 * kv_heads * width * size


def table(facts: dict[str, Any]) -> str:
    """The facts of `inspect` for people."""
    sizes = facts["parameters"]
    lines = [
        f"{facts['model']}: recurrent-depth {facts['source']}, R={facts['num_recurrences']} by default, "
        f"served up to {facts['max_recurrences']}",
        *(
            f"{part:<9} layers {' '.join(map(str, facts[part])) or 'none':<28} {sizes[part]:>15,} parameters"
            for part in ("prelude", "core", "coda")
        ),
        f"injection {facts['injection']}, state {facts['state_init']} {'':<9} {sizes['injection']:>15,}",
        *([f"router {describe(facts['router'])}"] if facts["router"] else []),
        f"unique parameters {sizes['unique']:,}",
        "",
        f"{'R':>4} {'effective parameters':>21} {'GFLOP/token':>12} {'KV bytes/token':>15}",
    ]
    for r, effective in sizes["effective"].items():
        flops, kv = facts["flops_per_token"][r] / 1e9, facts["kv_bytes_per_token"][r]
        lines.append(f"{r:>4} {effective:>21,} {flops:>12.4g} {kv:>15,}")
    return "\n".join(lines)
