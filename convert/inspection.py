"""`loopwise inspect MODEL [--json]`: layers of a recurrent-depth checkpoint, and the cost of its depth."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..active import active
from ..arguments import Parser
from ..directory import record_of
from ..errors import UserError, reason
from ..find_source import find_model
from ..trained import trained_at
from .plan import PARTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..model import RecurrentDepthConfig

DEPTHS = (1, 2, 4, 8, 16, 32)
MOST = 1e30  # steps, tokens or FLOPs of a run: a larger number in a record is no count


def main(argv: list[str]) -> int:
    """Parse, print. Returns the exit code."""
    parser = Parser(prog="loopwise inspect", description="Layers, parameters, KV bytes and FLOPs of a checkpoint.")
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of a recurrent-depth checkpoint")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a hub id (default: main)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)

    from ..quiet import quiet

    quiet()
    facts = inspect(args.model, args.revision)
    print(json.dumps(facts) if args.json else table(facts))
    return 0


def inspect(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Facts of the recurrent-depth checkpoint `model`, a directory, or a hub id at `revision`: without its weights.

    Raises UserError for anything else.

    parameters: unique ones, by part, and effective ones at each R (the core counted R times).
    kv_bytes_per_token: by KV policy and R, in the checkpoint's dtype.
    flops_per_token: of a forward pass, 2 for each parameter that multiplies: of experts, those that a token is sent to.
        Embedding look-ups and attention scores are left out, so that F(R) = F0 + R Fr.

    training: steps, tokens and FLOPs of the `loopwise train` that wrote the checkpoint; None if another command did, or
        an earlier release.
    effect: of the recurrences on that run's held-out data, as by `diagnosis.Effect.record`; None if it measured none.

    A router has its own policy. With one, both costs are means over tokens at its capacities (expert-choice), or
    upper bounds (token-choice).
    """
    from ..diagnosis import Effect
    from .source_config import read_recurrent_config

    path = find_model(model, revision, weights=False)
    record = record_of(path)
    config = read_recurrent_config(path)
    sizes = _sizes(config)
    core, outside = len(config.core), len(config.prelude) + len(config.coda)
    router = config.router or {}
    share = [
        0.0,
        *itertools.accumulate(router.get("capacity", [1.0] * config.max_recurrences)),
    ]  # mean depth of a token, by R
    depths = [r for r in DEPTHS if r <= config.max_recurrences]
    if config.num_recurrences not in depths:
        depths = sorted([*depths, config.num_recurrences])
    slot, total = _kv_bytes(config), sizes.counts["unique"]
    recurring = sizes.counts["core"] + sizes.counts["injection"]
    return {
        "model": str(model),
        "source": config.source_config.model_type,
        **{part: getattr(config, part) for part in PARTS},
        "injection": config.injection,
        "recurrence_norm": config.recurrence_norm,
        "recurrence_damping": config.recurrence_damping,
        "state_init": config.state_init,
        "router": config.router,
        "num_recurrences": config.num_recurrences,
        "max_recurrences": config.max_recurrences,
        "trained_recurrences": config.trained_recurrences,
        "training": _training(record),
        "effect": (effect := Effect.of(record.get("effect"))) and effect.record(),
        "parameters": {
            **sizes.counts,
            "effective": {r: total + (r - 1) * recurring for r in depths},
        },
        "kv_bytes_per_token": {
            policy: {r: round(slot * (outside + core * kept[r])) for r in depths}
            for policy, kept in _kept(config, share).items()
        },
        "flops_per_token": {r: round(2 * (sizes.once + sizes.each * share[r])) for r in depths},
    }


def _training(record: dict[str, Any]) -> dict[str, float] | None:
    """Steps, tokens and FLOPs of the run that a model of this `record` is from; None where it has no such numbers."""
    facts: dict[str, Any] = {name: record.get(name) for name in ("steps", "tokens", "flops")}
    return facts if all(isinstance(x, int | float) and 0 <= x < MOST for x in facts.values()) else None


def flops_per_token(config: PreTrainedConfig, depth: float | None) -> int | None:
    """FLOPs of a token's forward pass at `depth` recurrences, counted as by `inspect`.

    config: of a recurrent-depth model, or of a plain causal language model, whose `depth` is None. Returns None for a
    recurrent-depth model whose depth is unknown.
    """
    if config.model_type != "recurrent_depth":
        return round(2 * _plain_size(config))
    sizes = _sizes(cast("RecurrentDepthConfig", config))
    return None if depth is None else round(2 * (sizes.once + sizes.each * depth))


def _plain_size(config: PreTrainedConfig) -> float:
    """The number of parameters of a plain model that multiply."""
    import torch

    from ..model.source_layers import layer_list_name
    from .source_config import empty_model

    with torch.device("meta"):
        model = empty_model(config)
    layers = model.get_submodule(layer_list_name(model, config.num_hidden_layers))
    head = model.get_output_embeddings()
    head_size = 0 if head is None else head.get_parameter("weight").numel()
    return sum(active(config, name, parameter) for name, parameter in layers.named_parameters()) + head_size


class _Sizes(NamedTuple):
    """Numbers of parameters: `counts` of all and of each part; of those that multiply, `once` and at `each` depth."""

    counts: dict[str, int]
    once: float
    each: float


def _sizes(config: RecurrentDepthConfig) -> _Sizes:
    """The sizes of the model of `config`, which is made on the meta device."""
    import torch

    from ..model import RecurrentDepthForCausalLM

    try:
        with torch.device("meta"):
            model = RecurrentDepthForCausalLM(config)
    except Exception as error:  # transformers and torch share no base class for errors in a config
        raise UserError(f"config.json: no recurrent-depth model can be built from it ({reason(error)})") from None
    parts = {part: list(model.get_submodule(part).named_parameters()) for part in (*PARTS, "injection")}
    counts = {part: sum(p.numel() for _, p in parameters) for part, parameters in parts.items()}
    used = {part: sum(active(config, name, p) for name, p in parameters) for part, parameters in parts.items()}
    relaxation = sum(p[0].numel() for name, p in model.named_parameters() if name.startswith("relaxation."))
    head = model.get_output_embeddings()
    head_size = 0 if head is None else head.get_parameter("weight").numel()
    return _Sizes(
        {"unique": sum(p.numel() for p in model.parameters()), **counts},
        once=used["prelude"] + used["coda"] + head_size,
        each=used["core"] + used["injection"] + relaxation,
    )


def _kept(config: RecurrentDepthConfig, share: list[float]) -> dict[str, list[float]]:
    """By KV policy, the depths of the core that a token has in the cache after each number of recurrences.

    share: the mean depth of a token after each number of recurrences.
    """
    from ..model.configuration_recurrent_depth import KV_POLICIES

    if config.router:
        return {config.router["kv"]: [min(r, 1.0) for r in range(len(share))] if config.kv_slots(2) == 1 else share}
    named = [policy for policy in KV_POLICIES if not policy.startswith("modulo")]
    counts = {2, 4, 8} | {int(k) for k in [config.kv_policy.removeprefix("modulo-")] if k.isdecimal()}
    kept: dict[str, list[float]] = {}
    for policy in [*named, *(f"modulo-{k}" for k in sorted(counts))]:
        other = copy.copy(config)
        other.kv_policy = policy
        kept[policy] = [float(other.kv_slots(r)) if r else 0.0 for r in range(len(share))]
    return kept


def describe(router: dict[str, Any]) -> str:
    """A router in a few words, from its fields in the config."""
    words = f"{router['kind']}-choice, {router['network']}, {router['alpha']:g} {router['gate']}, {router['kv']} KV"
    words += ", step" if router["update"] == "step" else ""
    if router["kind"] == "token":
        return words
    numbers = router["capacity"] if router["inference"] == "topk" else router["thresholds"]
    return f"{words}, {router['inference']} {', '.join(f'{number:.3g}' for number in numbers)}"


def _kv_bytes(config: RecurrentDepthConfig) -> int:
    """Bytes of one token's keys and values in one slot."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):  # GPT-BigCode and Falcon; the newer Falcon caches a copy a head
        kv_heads = heads if getattr(config, "new_decoder_architecture", False) else 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = getattr(config.dtype, "itemsize", 4)
    return 2 * kv_heads * width * size


def table(facts: dict[str, Any]) -> str:
    """The facts of `inspect` as tables of text."""
    from ..diagnosis import Effect

    sizes = facts["parameters"]
    columns: dict[str, list[str]] = {}  # title -> policies that keep the same
    for policy, kept in facts["kv_bytes_per_token"].items():
        same = [name for name, other in columns.items() if facts["kv_bytes_per_token"][other[0]] == kept]
        policies = [*columns.pop(same[0]), policy] if same else [policy]
        columns[", ".join(policies)] = policies
    training = facts["training"]
    lines = [
        f"{facts['model']}: recurrent-depth {facts['source']}, R={facts['num_recurrences']} by default, "
        f"served up to {facts['max_recurrences']}",
        f"trained at {trained_at(trained) if (trained := facts['trained_recurrences']) else 'no recurrences known'}",
        *(
            [f"last run: {training['steps']:,} steps, {training['tokens']:,} tokens, {training['flops']:.3g} FLOPs"]
            if training
            else []
        ),
        *(effect.lines() if (effect := Effect.of(facts["effect"])) else []),
        *(
            f"{part:<9} layers {' '.join(map(str, facts[part])) or 'none':<28} {sizes[part]:>15,} parameters"
            for part in PARTS
        ),
        f"injection {facts['injection']}, state {facts['state_init']} {'':<9} {sizes['injection']:>15,}",
        *([f"norm {norm}"] if (norm := facts["recurrence_norm"]) != "none" else []),
        *([f"damping {damping}"] if (damping := facts["recurrence_damping"]) != 1 else []),
        *([f"router {describe(facts['router'])}"] if facts["router"] else []),
        f"unique parameters {sizes['unique']:,}",
        "",
        f"{'':<39}KV bytes/token",
        f"{'R':>4} {'effective parameters':>21} {'GFLOP/token':>12} {' '.join(f'{name:>15}' for name in columns)}",
    ]
    for r, effective in sizes["effective"].items():
        kv = " ".join(
            f"{facts['kv_bytes_per_token'][policies[0]][r]:>{max(15, len(name))},}"
            for name, policies in columns.items()
        )
        lines.append(f"{r:>4} {effective:>21,} {facts['flops_per_token'][r] / 1e9:>12.4g} {kv}")
    return "\n".join(lines)
