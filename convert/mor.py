"""Import of Mixture-of-Recursions checkpoints (arXiv 2507.10524): where their tensors go, and what they compute.

Their config.json is a plain Llama's: how tokens are routed stands in the training configuration, and comes from the
recipe's `router`. Layers that recur stand under every recurrence's name, tied or not.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from ..errors import UserError
from .raw import Imported, RawTensors
from .reference import Read, attend, rotary_angles

EXPERT = "model.layers.1.block.0.self_attn.q_proj.weight"
TOKEN = "model.layers.1.block_list.0.0.self_attn.q_proj.weight"
_PARTS = [f"self_attn.{c}_proj.weight" for c in "qkvo"] + [f"mlp.{c}_proj.weight" for c in ("gate", "up", "down")]
_PARTS += ["input_layernorm.weight", "post_attention_layernorm.weight"]


def expert(fields: dict[str, Any], raw: RawTensors) -> Imported:
    names, places = raw.names(), _places(raw.names())
    imported = _layers(fields, raw, places)
    router: dict[str, Any] = {"kind": "expert", "inference": "topk", **_kv(fields)}
    imported.fields["router"] = router
    for r, router_at in enumerate(places.routers):
        router["network"] = _network(imported, names, f"router.networks.{r}", f"{router_at}mor_router.router")
        if any(name.startswith(f"{router_at}mlp_router.") for name in names):
            router["auxiliary"] = True
            _network(imported, names, f"router.auxiliary.{r}", f"{router_at}mlp_router.router")
    return imported


def token(fields: dict[str, Any], raw: RawTensors) -> Imported:
    names, places = raw.names(), _places(raw.names())
    imported, (at,) = _layers(fields, raw, places), places.routers
    network = _network(imported, names, "router.networks.0", f"{at}mor_router.router")
    imported.fields["router"] = {"kind": "token", "network": network, **_kv(fields)}
    if places.bias:
        imported.copy("router.bias", places.bias)
    else:
        imported.tensors["router.bias"] = ([], lambda: torch.zeros(len(places.blocks)))
    return imported


class _Places(NamedTuple):
    """Names up to the last dot: the layers of the ends, those of the core at every recurrence, and the routers."""

    prelude: list[str]
    blocks: list[list[str]]
    coda: list[str]
    routers: list[str]
    bias: str | None


def _places(names: set[str]) -> _Places:
    def present(pattern: str) -> list[str]:
        found: list[str] = []
        while f"{pattern.format(len(found))}{_PARTS[0]}" in names:
            found.append(pattern.format(len(found)))
        return found

    first = int("model.layers.0.block.0.self_attn.q_proj.weight" not in names)
    if TOKEN in names:
        recurrences = [at.rpartition("0.")[0] for at in present("model.layers.1.block_list.{}.0.")]
        routers, last = ["model.layers.1."], 2
    else:
        count = 0
        while f"model.layers.{first + count}.block.0.{_PARTS[0]}" in names:
            count += 1
        routers = [f"model.layers.{first + r}." for r in range(count)]
        recurrences, last = [f"{at}block." for at in routers], first + count
    bias = next((name for name in names if name.endswith(".router_bias")), None)
    width = len(present(f"{recurrences[0]}{{}}."))
    blocks = [[f"{at}{j}." for j in range(width)] for at in recurrences]
    return _Places(["model.layers.0."] * first, blocks, [f"model.layers.{last}."] * first, routers, bias)


def _layers(fields: dict[str, Any], raw: RawTensors, places: _Places) -> Imported:
    """Everything but the router."""
    prelude, blocks, coda = places[:3]
    depths, width = len(blocks), len(blocks[0])
    known = {key: value for key, value in fields.items() if key not in ("kv_sharing", "num_hidden_layers")}
    source: Any = LlamaConfig(**known, num_hidden_layers=len(prelude) + depths * width + len(coda))
    imported = Imported(
        {
            "source_config": source,
            "prelude": [0] * len(prelude),
            "core": list(range(len(prelude), len(prelude) + width)),
            "coda": [source.num_hidden_layers - 1] * len(coda),
            "num_recurrences": depths,
            "trained_recurrences": {"mean": depths, "min": depths, "max": depths},
        }
    )
    parts = [*_PARTS, *(part.replace("weight", "bias") for part in _PARTS if _has_bias(source, part))]
    for name, ends in {"prelude": prelude, "coda": coda}.items():
        for at, part in itertools.product(ends, parts):
            imported.copy(f"{name}.0.{part}", f"{at}{part}")
    for block, part in itertools.product(itertools.chain(*blocks), parts):
        if block + part not in raw.names():
            raise UserError(f"a Mixture-of-Recursions checkpoint has a tensor {block}{part}, and this one lacks it")
    own = [part for part in parts if not all(_tied(raw, [block[j] + part for block in blocks]) for j in range(width))]
    for j, part in itertools.product(range(width), parts):
        everywhere = [block[j] + part for block in blocks]
        if part in own:
            imported.tensors[f"relaxation.{j}.{part}"] = (everywhere, lambda *tensors: torch.stack(tensors))
        else:
            imported.copy(f"core.{j}.{part}", everywhere[0])
            imported.ignored.update(everywhere[1:])
    if own:
        imported.fields["relaxation"] = {"depths": depths, "rank": {}, "own": own}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        imported.copy(f"source.{name}", name)
    if source.tie_word_embeddings:
        imported.ignored.add("lm_head.weight")
    else:
        imported.copy("source.lm_head.weight", "lm_head.weight")
    return imported


def _has_bias(source: Any, part: str) -> bool:
    return "proj" in part and bool(source.attention_bias if "attn" in part else source.mlp_bias)


def _tied(raw: RawTensors, names: list[str]) -> bool:
    """Whether these tensors are equal."""
    first = raw.read(names[0])
    return all(torch.equal(first, raw.read(name)) for name in names[1:])


def _network(imported: Imported, names: set[str], ours: str, theirs: str) -> str:
    """Copy a router's network; which kind it is."""
    if f"{theirs}.0.weight" not in names:
        imported.copy(f"{ours}.weight", f"{theirs}.weight")
        return "linear"
    for layer in (0, 2):
        imported.copy(f"{ours}.{layer}.weight", f"{theirs}.{layer}.weight")
    return "mlp"


def _kv(fields: dict[str, Any]) -> dict[str, str]:
    sharing = fields.get("kv_sharing") or {}
    if sharing.get("update_cache"):
        raise UserError(
            "kv_sharing.update_cache of this checkpoint is not supported: a recurrence would see keys and values of "
            "the first and its own"
        )
    return {"kv": "first-recursion"} if sharing.get("enable") else {}


def logits(source: Any, router: dict[str, Any], names: set[str], read: Read, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of such a checkpoint with the routing `router` for ids [B, T], by the formula: one sequence and
    one choice after another, every token computed and masks for what the others see."""
    places = _places(names)
    return torch.cat([_sequence(source, router, places, read, row) for row in ids])


def _sequence(source: Any, router: dict[str, Any], places: _Places, read: Read, ids: torch.Tensor) -> torch.Tensor:
    length = len(ids)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    angles = rotary_angles(source, length)
    first: dict[int, Any] = {}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], read(name), source.rms_norm_eps)

    def linear(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.linear(x, read(f"{at}.weight"), read(f"{at}.bias") if _has_bias(source, f"{at}.weight") else None)

    def run(x: torch.Tensor, layers: list[str], mask: torch.Tensor, recurrent: bool = False) -> torch.Tensor:
        for j, at in enumerate(layers):
            q, k, v = (linear(norm(x, f"{at}input_layernorm.weight"), f"{at}self_attn.{c}_proj") for c in "qkv")
            if recurrent and router["kv"] == "first-recursion":
                k, v = first.setdefault(j, (k, v))
            x = x + linear(attend(q, k, v, source, angles, mask=mask), f"{at}self_attn.o_proj")
            h = norm(x, f"{at}post_attention_layernorm.weight")
            h = ACT2FN[source.hidden_act](linear(h, f"{at}mlp.gate_proj")) * linear(h, f"{at}mlp.up_proj")
            x = x + linear(h, f"{at}mlp.down_proj")
        return x

    def score(x: torch.Tensor, at: str) -> torch.Tensor:
        if router["network"] == "linear":
            return x[0] @ read(f"{at}.router.weight").T
        return F.gelu(x[0] @ read(f"{at}.router.0.weight").T) @ read(f"{at}.router.2.weight").T

    def passed(x: torch.Tensor, r: int, chosen: torch.Tensor) -> torch.Tensor:
        mask = causal & chosen if router["kv"] == "recursion-wise" else causal
        return run(x, places.blocks[r], mask | torch.eye(length, dtype=torch.bool), recurrent=True)

    x = run(read("model.embed_tokens.weight")[ids][None], places.prelude, causal)
    chosen, start = torch.ones(length, dtype=torch.bool), x
    depth = weights = torch.zeros(length)
    if router["kind"] == "token":
        scores = score(x / router["temperature"], f"{places.routers[0]}mor_router")
        gates = (scores.softmax(-1) if router["gate"] == "softmax" else scores.sigmoid()) * router["alpha"]
        depth = (gates + (read(places.bias) if places.bias else 0)).argmax(-1)
        weights = gates.gather(1, depth[:, None])
    for r in range(len(places.blocks)):
        if router["kind"] == "token":
            y = passed(x, r, chosen := depth >= r)
            y = torch.where((depth == r)[:, None], start + weights * y, y)
        else:
            at = places.routers[r]
            scores = score(x / router["temperature"], f"{at}mor_router")
            weights = getattr(torch, router["gate"])(scores) * router["alpha"]
            if router["inference"] == "topk":
                count = min(max(1, int(router["capacity"][r] * length)), int(chosen.sum()))
                best = scores[:, 0].masked_fill(~chosen, -torch.inf).topk(count).indices
                chosen = torch.zeros_like(chosen).index_fill(0, best, True)
            else:
                scores = score(x, f"{at}mlp_router") if router["auxiliary"] else scores
                chosen = chosen & (scores[:, 0].sigmoid() >= router["thresholds"][r])
            y = x + weights * passed(x, r, chosen)
        x = torch.where(chosen[:, None], y, x)
    x = norm(run(x, places.coda, causal), "model.norm.weight")
    return F.linear(x, read("model.embed_tokens.weight" if source.tie_word_embeddings else "lm_head.weight"))
