"""`loopwise inspect MODEL [--json]`: what a recurrent-depth checkpoint is made of, and what its depth costs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..trained import trained_at

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

    `parameters`: unique, and effective at each R (the core counted R times). `kv_bytes_per_token`: by KV policy and R,
    in the checkpoint's dtype. `flops_per_token`: forward, 2 for each parameter that multiplies (of experts, those that
    a token is sent to; embedding look-ups and attention scores left out), so that F(R) = F0 + R Fr. With a router,
    which brings its own policy, both are means over tokens if each recurrence takes its capacity (expert-choice), or at
    most this (token-choice).
    """
    import torch

    from ..model import RecurrentDepthForCausalLM
    from .source import read_recurrent_config

    config = read_recurrent_config(Path(model).expanduser())
    with torch.device("meta"):
        meta: Any = RecurrentDepthForCausalLM(config)
    parts = {name: list(getattr(meta, name).named_parameters()) for name in ("prelude", "core", "coda", "injection")}
    counts = {part: sum(p.numel() for _, p in parameters) for part, parameters in parts.items()}
    used = {part: sum(_used(config, name, p) for name, p in parameters) for part, parameters in parts.items()}
    total = sum(p.numel() for p in meta.parameters())
    recurring = counts["core"] + counts["injection"]
    relaxation = sum(
        p[0].numel() for name, p in meta.named_parameters() if name.startswith("relaxation.")
    )  # one depth's
    head = meta.get_output_embeddings()
    head_size = 0 if head is None else head.weight.numel()
    fixed = 2 * (used["prelude"] + used["coda"] + head_size)
    every = 2 * (used["core"] + used["injection"] + relaxation)
    slot = _kv_bytes(config)
    core, outside = len(config.core), len(config.prelude) + len(config.coda)
    fields = config.router or {}
    share = [0.0, *itertools.accumulate(fields.get("capacity", [1.0] * config.max_recurrences))]  # of tokens, up to R
    policies = _kept(fields, share, config.kv_policy)
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
        "trained_recurrences": config.trained_recurrences,
        "parameters": {
            "unique": total,
            **counts,
            "effective": {r: total + (r - 1) * recurring for r in depths},
        },
        "kv_bytes_per_token": {
            policy: {r: round(slot * (outside + core * kept[r])) for r in depths} for policy, kept in policies.items()
        },
        "flops_per_token": {r: round(fixed + every * share[r]) for r in depths},
    }


def _used(config: Any, name: str, parameter: Any) -> float:
    """How many numbers of a layer's parameter take part in a token's pass: of experts, those of the chosen ones."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    routed = ".experts." in name or parameter.dim() == 3 or name.endswith(("up_embed.weight", "down_embed.weight"))
    return parameter.numel() * (config.num_experts_per_tok / experts if experts and routed else 1)


def _kept(router: dict[str, Any], share: list[float], own: str) -> dict[str, list[float]]:
    """How many depths of the core a token has in the cache after each number of recurrences, by KV policy."""
    one = [min(r, 1.0) for r in range(len(share))]
    if router:
        return {router["kv"]: one if router["kv"] == "first-recursion" else share}
    counts = {2, 4, 8} | ({int(own.removeprefix("modulo-"))} if own.startswith("modulo-") else set())
    modulo = {f"modulo-{k}": [min(r, float(k)) for r in range(len(share))] for k in sorted(counts)}
    return {"per-depth": share, "last-exited": share, "single": one, "first": one, **modulo}


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
    if getattr(config, "multi_query", False):  # GPT-BigCode and Falcon; the newer Falcon caches a copy for every head
        kv_heads = heads if getattr(config, "new_decoder_architecture", False) else 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = config.dtype.itemsize if config.dtype is not None else 4
    return 2 * kv_heads * width * size


def table(facts: dict[str, Any]) -> str:
    """The facts of `inspect` for people."""
    sizes = facts["parameters"]
    shown: dict[str, list[str]] = {}  # policies that keep the same in one column
    for policy, kept in facts["kv_bytes_per_token"].items():
        same = [name for name, other in shown.items() if facts["kv_bytes_per_token"][other[0]] == kept]
        policies = [*shown.pop(same[0]), policy] if same else [policy]
        shown[", ".join(policies)] = policies
    lines = [
        f"{facts['model']}: recurrent-depth {facts['source']}, R={facts['num_recurrences']} by default, "
        f"served up to {facts['max_recurrences']}",
        f"trained at {trained_at(trained) if (trained := facts['trained_recurrences']) else 'no recurrences known'}",
        *(
            f"{part:<9} layers {' '.join(map(str, facts[part])) or 'none':<28} {sizes[part]:>15,} parameters"
            for part in ("prelude", "core", "coda")
        ),
        f"injection {facts['injection']}, state {facts['state_init']} {'':<9} {sizes['injection']:>15,}",
        *([f"router {describe(facts['router'])}"] if facts["router"] else []),
        f"unique parameters {sizes['unique']:,}",
        "",
        f"{'':<39}KV bytes/token",
        f"{'R':>4} {'effective parameters':>21} {'GFLOP/token':>12} {' '.join(f'{name:>15}' for name in shown)}",
    ]
    for r, effective in sizes["effective"].items():
        kv = " ".join(
            f"{facts['kv_bytes_per_token'][policies[0]][r]:>{max(15, len(name))},}" for name, policies in shown.items()
        )
        lines.append(f"{r:>4} {effective:>21,} {facts['flops_per_token'][r] / 1e9:>12.4g} {kv}")
    return "\n".join(lines)
