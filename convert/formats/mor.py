"""Mixture-of-Recursions (arXiv 2507.10524), with expert-choice and with token-choice routers.

config.json is a plain Llama's: the routing stands in the training configuration, and comes from the recipe's `router`.
Layers that recur stand under the names of every recurrence, tied or not. Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from ...errors import UserError
from ..raw import RawTensors
from .base import Checkpoint, CheckpointMap, Format
from .layers import attend, rotary

MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
FIRST = "self_attn.q_proj.weight"  # present in every layer
EXPERT = f"model.layers.1.block.0.{FIRST}"
TOKEN = f"model.layers.1.block_list.0.0.{FIRST}"


class Names(NamedTuple):
    """Beginnings of the names on disk: of the first and last layer, the core's at each recurrence, the routers."""

    prelude: list[str]
    core: list[list[str]]  # by recurrence, then by layer
    coda: list[str]
    routers: list[str]
    bias: str | None  # the whole name of a token-choice router's balancing bias


def find_names(names: set[str]) -> Names:
    """The names of a checkpoint with the tensors `names`."""
    first = int(f"model.layers.0.block.0.{FIRST}" not in names)
    if TOKEN in names:
        recurrences = [at.rpartition("0.")[0] for at in _present(names, "model.layers.1.block_list.{}.0.")]
        routers, last = ["model.layers.1."], 2
    else:
        count = 0
        while f"model.layers.{first + count}.block.0.{FIRST}" in names:
            count += 1
        routers = [f"model.layers.{first + r}." for r in range(count)]
        recurrences, last = [f"{at}block." for at in routers], first + count
    bias = next((name for name in names if name.endswith(".router_bias")), None)
    width = len(_present(names, f"{recurrences[0]}{{}}."))
    core = [[f"{at}{n}." for n in range(width)] for at in recurrences]
    return Names(["model.layers.0."] * first, core, [f"model.layers.{last}."] * first, routers, bias)


def _present(names: set[str], pattern: str) -> list[str]:
    """`pattern` with 0, 1, .. as far as the checkpoint has such layers."""
    found = itertools.takewhile(lambda at: f"{at}{FIRST}" in names, map(pattern.format, itertools.count()))
    return list(found)


def map_expert_choice(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a checkpoint with one router for each recurrence, and auxiliary routers where it has some."""
    present, names = raw.names(), find_names(raw.names())
    result = _map_layers(fields, raw, names)
    router: dict[str, Any] = {"kind": "expert", "inference": "topk", **_kv(fields)}
    result.fields["router"] = router
    for r, at in enumerate(names.routers):
        router["network"] = _map_network(result, present, f"router.networks.{r}", f"{at}mor_router.router")
        if any(name.startswith(f"{at}mlp_router.") for name in present):
            router["auxiliary"] = True
            _map_network(result, present, f"router.auxiliary.{r}", f"{at}mlp_router.router")
    return result


def map_token_choice(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a checkpoint with one router for all depths; a balancing bias that it lacks is zero."""
    names = find_names(raw.names())
    result, (at,) = _map_layers(fields, raw, names), names.routers
    network = _map_network(result, raw.names(), "router.networks.0", f"{at}mor_router.router")
    result.fields["router"] = {"kind": "token", "network": network, **_kv(fields)}
    if names.bias:
        result.copy("router.bias", names.bias)
    else:
        result.tensors["router.bias"] = ([], lambda: torch.zeros(len(names.core)))
    return result


def _map_layers(fields: dict[str, Any], raw: RawTensors, names: Names) -> CheckpointMap:
    """The map of everything but the routers. Raises UserError for a core layer without one of its tensors."""
    depths, width = len(names.core), len(names.core[0])
    known = {key: value for key, value in fields.items() if key not in ("kv_sharing", "num_hidden_layers")}
    source = LlamaConfig(**known, num_hidden_layers=len(names.prelude) + depths * width + len(names.coda))
    result = CheckpointMap(
        {
            "source_config": source,
            "prelude": [0] * len(names.prelude),
            "core": list(range(len(names.prelude), len(names.prelude) + width)),
            "coda": [source.num_hidden_layers - 1] * len(names.coda),
            "num_recurrences": depths,
            "trained_recurrences": {"mean": depths, "min": depths, "max": depths},
        }
    )
    parameters = [f"{name}.weight" for name in (*MATRICES, *NORMS)]
    parameters += [f"{name}.bias" for name in MATRICES if _has_bias(source, name)]
    for part, ends in {"prelude": names.prelude, "coda": names.coda}.items():
        for at, parameter in itertools.product(ends, parameters):
            result.copy(f"{part}.0.{parameter}", f"{at}{parameter}")
    for at, parameter in itertools.product(itertools.chain(*names.core), parameters):
        if at + parameter not in raw.names():
            raise UserError(f"a Mixture-of-Recursions checkpoint has a tensor {at}{parameter}, and this one lacks it")
    untied = [p for p in parameters if not all(_equal(raw, [core[n] + p for core in names.core]) for n in range(width))]
    for n, parameter in itertools.product(range(width), parameters):
        at_each_depth = [core[n] + parameter for core in names.core]
        if parameter in untied:
            result.tensors[f"relaxation.{n}.{parameter}"] = (at_each_depth, lambda *tensors: torch.stack(tensors))
        else:
            result.copy(f"core.{n}.{parameter}", at_each_depth[0])
            result.ignored.update(at_each_depth[1:])
    if untied:
        result.fields["relaxation"] = {"depths": depths, "rank": {}, "own": untied}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        result.copy(f"source.{name}", name)
    result.copy_head(tied=source.tie_word_embeddings)
    return result


def _has_bias(source: LlamaConfig, at: str) -> bool:
    return bool(source.attention_bias if "attn" in at else source.mlp_bias)


def _equal(raw: RawTensors, names: list[str]) -> bool:
    """True where these tensors are equal bit for bit."""
    first = raw.read(names[0])
    return all(torch.equal(first, raw.read(name)) for name in names[1:])


def _map_network(result: CheckpointMap, present: set[str], ours: str, theirs: str) -> str:
    """Map a router's network; its kind, `linear` or `mlp`."""
    if f"{theirs}.0.weight" not in present:
        result.copy(f"{ours}.weight", f"{theirs}.weight")
        return "linear"
    for layer in (0, 2):
        result.copy(f"{ours}.{layer}.weight", f"{theirs}.{layer}.weight")
    return "mlp"


def _kv(fields: dict[str, Any]) -> dict[str, str]:
    """The router's field `kv`, where it is not the default. Raises UserError for keys and values that are added up."""
    sharing = fields.get("kv_sharing") or {}
    if sharing.get("update_cache"):
        raise UserError(
            "kv_sharing.update_cache of this checkpoint is not supported: a recurrence would see keys and values of "
            "the first and its own"
        )
    return {"kv": "first-recursion"} if sharing.get("enable") else {}


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas: each sequence alone, all tokens computed, masks where some are out.

    The depth is the checkpoint's own, and the state is the prelude's output.
    """
    return torch.cat([_Reference(checkpoint, row).logits() for row in ids])


class _Reference:
    """The formulas for one sequence `ids` [T]."""

    def __init__(self, checkpoint: Checkpoint, ids: torch.Tensor):
        source, router = checkpoint.config.source_config, checkpoint.config.router
        assert isinstance(source, LlamaConfig)
        assert source.head_dim is not None
        assert router is not None
        self.source, self.router, self.read, self.ids = source, router, checkpoint.read, ids
        self.head_dim = source.head_dim
        self.names = find_names(checkpoint.names)
        self.rotation = rotary(source, len(ids))
        self.causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        self.first: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the first recurrence's keys and values

    def logits(self) -> torch.Tensor:
        """Logits [1, T, V]."""
        embedded = self.read("model.embed_tokens.weight")[self.ids][None]
        x = self.run(embedded, self.names.prelude, self.causal)
        x = self.token_choice(x) if self.router["kind"] == "token" else self.expert_choice(x)
        x = self.norm(self.run(x, self.names.coda, self.causal), "model.norm")
        return F.linear(
            x, self.read("model.embed_tokens.weight" if self.source.tie_word_embeddings else "lm_head.weight")
        )

    def token_choice(self, x: torch.Tensor) -> torch.Tensor:
        """All recurrences, each token to its own depth: x [1, T, D] -> [1, T, D]."""
        router, start = self.router, x
        scores = self.score(x / router["temperature"], f"{self.names.routers[0]}mor_router")
        gates = (scores.softmax(-1) if router["gate"] == "softmax" else scores.sigmoid()) * router["alpha"]
        depth = (gates + (self.read(self.names.bias) if self.names.bias else 0)).argmax(-1)
        weights = gates.gather(1, depth[:, None])
        for r in range(len(self.names.core)):
            y = self.recur(x, r, chosen := depth >= r)
            y = torch.where((depth == r)[:, None], start + weights * y, y)
            x = torch.where(chosen[:, None], y, x)
        return x

    def expert_choice(self, x: torch.Tensor) -> torch.Tensor:
        """All recurrences, each of the tokens that it chooses among those of the one before: [1, T, D] -> [1, T, D]."""
        router, length = self.router, len(self.ids)
        chosen = torch.ones(length, dtype=torch.bool)
        for r, at in enumerate(self.names.routers):
            scores = self.score(x / router["temperature"], f"{at}mor_router")
            weights = getattr(torch, router["gate"])(scores) * router["alpha"]
            if router["inference"] == "topk":
                count = min(max(1, int(router["capacity"][r] * length)), int(chosen.sum()))
                best = scores[:, 0].masked_fill(~chosen, -torch.inf).topk(count).indices
                chosen = torch.zeros_like(chosen).index_fill(0, best, True)
            else:
                scores = self.score(x, f"{at}mlp_router") if router["auxiliary"] else scores
                chosen = chosen & (scores[:, 0].sigmoid() >= router["thresholds"][r])
            y = x + weights * self.recur(x, r, chosen)
            x = torch.where(chosen[:, None], y, x)
        return x

    def score(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """The logits [T, 1 or R] of router `at` for x [1, T, D]."""
        if self.router["network"] == "linear":
            return x[0] @ self.read(f"{at}.router.weight").T
        return F.gelu(x[0] @ self.read(f"{at}.router.0.weight").T) @ self.read(f"{at}.router.2.weight").T

    def recur(self, x: torch.Tensor, r: int, chosen: torch.Tensor) -> torch.Tensor:
        """The core of recurrence r over all tokens x [1, T, D], of which the `chosen` [T] are keys."""
        mask = self.causal & chosen if self.router["kv"] == "recursion-wise" else self.causal
        return self.run(x, self.names.core[r], mask | torch.eye(len(self.ids), dtype=torch.bool), recurrent=True)

    def run(self, x: torch.Tensor, layers: list[str], mask: torch.Tensor, recurrent: bool = False) -> torch.Tensor:
        """Llama layers with attention by `mask` [T, T]: x [1, T, D] -> [1, T, D]."""
        for n, at in enumerate(layers):
            h = self.norm(x, f"{at}input_layernorm")
            q, k, v = (self.linear(h, f"{at}self_attn.{name}_proj") for name in "qkv")
            if recurrent and self.router["kv"] == "first-recursion":
                k, v = self.first.setdefault(n, (k, v))
            attended = attend(q, k, v, self.head_dim, self.rotation, mask=mask)
            x = x + self.linear(attended, f"{at}self_attn.o_proj")
            h = self.norm(x, f"{at}post_attention_layernorm")
            h = ACT2FN[self.source.hidden_act](self.linear(h, f"{at}mlp.gate_proj")) * self.linear(
                h, f"{at}mlp.up_proj"
            )
            x = x + self.linear(h, f"{at}mlp.down_proj")
        return x

    def norm(self, x: torch.Tensor, at: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.read(f"{at}.weight"), self.source.rms_norm_eps)

    def linear(self, x: torch.Tensor, at: str) -> torch.Tensor:
        bias = self.read(f"{at}.bias") if _has_bias(self.source, at) else None
        return F.linear(x, self.read(f"{at}.weight"), bias)


# config.json lacks the routing. All else is as trained.
RECIPE_KEYS = frozenset(("router", "dtype", "dequantize", "revision"))
EXPERT_CHOICE = Format("expert-choice MoR", "llama", (EXPERT,), map_expert_choice, reference, recipe_keys=RECIPE_KEYS)
TOKEN_CHOICE = Format("token-choice MoR", "llama", (TOKEN,), map_token_choice, reference, recipe_keys=RECIPE_KEYS)
