"""Huginn's code base, model_type `huginn_raven`: the tensors and formulas that its checkpoints share.

Sources: Huginn (arXiv 2502.05171) and the retrofitted models (arXiv 2511.07384). Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Olmo2Config

from ...errors import UserError
from .base import Checkpoint, CheckpointMap, check_options
from .layers import Rotation, attend, rms_norm, rotary, rotary_table

MODEL_TYPE = "huginn_raven"
BLOCK = "transformer.core_block.0."
PARTS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}  # our names -> theirs in tensor names
ROPE_BASE = 50_000  # Huginn's
# Options that change the computation or add noise to it, with the one value of the released models.
FIXED: dict[str, Any] = {
    "injection_type": "linear", "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "bias": False,
    "test_time_noise": 0,
}  # fmt: skip
SIZES = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")


def layer_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json by their names in transformers' configs of the layers."""
    heads = fields.get("n_heads") or fields["num_attention_heads"]
    return {
        "vocab_size": fields.get("padded_vocab_size") or fields["vocab_size"],
        "hidden_size": fields["n_embd"],
        "intermediate_size": fields["intermediate_size"],
        "num_hidden_layers": sum(fields[size] for size in SIZES),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "rms_norm_eps": fields.get("norm_eps", 1e-6),
        "max_position_embeddings": fields.get("max_position_embeddings") or fields["block_size"],
        "tie_word_embeddings": bool(fields.get("tie_embeddings", fields.get("tie_word_embeddings", False))),
        "bos_token_id": fields.get("bos_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
        "pad_token_id": fields.get("pad_token_id"),
    }


def head_dim(fields: dict[str, Any]) -> int:
    """The head size of a retrofitted model."""
    return fields.get("head_dim") or fields["n_embd"] // fields["n_heads"]


def embedding_scale(fields: dict[str, Any]) -> float:
    """The factor on the embedded tokens, sqrt(D) unless config.json names one."""
    return (fields.get("init_values") or {}).get("embed_scale", sqrt(fields["n_embd"]))


def map_checkpoint(
    fields: dict[str, Any],
    source: LlamaConfig | Olmo2Config,
    head_dim: int,
    norms: dict[str, str],
    order: torch.Tensor | None = None,
    qk_bias: bool = False,
) -> CheckpointMap:
    """The map of a checkpoint with prelude, adapter, core block, coda and ln_f.

    norms: names of a layer's norms on disk -> in the model. order: order of the rows of a head's queries and keys in
    the model; None for the one on disk. Raises UserError for an unknown `initial_state_mode`, and for options that no
    released model has.
    """
    check_options("huginn_raven", fields, FIXED)
    result = CheckpointMap(model_fields(fields, source))
    for part, count in zip(PARTS, (fields[size] for size in SIZES), strict=True):
        for n in range(count):
            ours, theirs = f"{part}.{n}.", f"transformer.{PARTS[part]}.{n}."
            for name, norm in norms.items():
                result.copy(f"{ours}{norm}.weight", f"{theirs}{name}.weight")
            _map_matrices(result, source, head_dim, ours, theirs, order)
            if qk_bias:
                _map_biases(result, source.num_attention_heads, head_dim, ours, theirs, order)
    result.copy("source.model.embed_tokens.weight", "transformer.wte.weight")
    result.copy("source.model.norm.weight", "transformer.ln_f.weight")
    result.copy("injection.weight", "transformer.adapter.weight")
    result.copy_head(tied=source.tie_word_embeddings)
    if order is None:
        result.ignored.add("freqs_cis")
    else:
        result.leave_out("freqs_cis", rotary_table(fields.get("rope_base", ROPE_BASE), head_dim, fields["block_size"]))
    return result


def model_fields(fields: dict[str, Any], source: LlamaConfig | Olmo2Config) -> dict[str, Any]:
    """The fields of RecurrentDepthConfig. Raises UserError for an unknown `initial_state_mode`."""
    prelude, core, coda = (fields[size] for size in SIZES)
    init = fields.get("init_values") or {}
    std = init.get("std", sqrt(2 / (5 * source.hidden_size)))
    mode = fields.get("initial_state_mode", "random")
    if mode not in ("random", "embed-init"):
        raise UserError(f"initial_state_mode={mode!r} of this checkpoint is not supported; random and embed-init are")
    return {
        "source_config": source,
        "prelude": list(range(prelude)),
        "core": list(range(prelude, prelude + core)),
        "coda": list(range(prelude + core, prelude + core + coda)),
        "num_recurrences": fields["mean_recurrence"],
        "trained_recurrences": trained_recurrences(fields),
        "injection": "linear",
        "state_init": "input" if mode == "embed-init" else "normal" if std else "zeros",
        "state_std": std * init.get("embed_scale", sqrt(source.hidden_size)) or 1.0,
    }


def trained_recurrences(fields: dict[str, Any]) -> dict[str, int] | None:
    """The recurrences of training, from the mean of Huginn's sampler; None for another sampler.

    99.9 % of the sampler's draws are at most 4 times the mean.
    """
    if not str(fields.get("sampling_scheme", "poisson-lognormal")).startswith("poisson-lognormal"):
        return None
    mean = fields["mean_recurrence"]
    return {"mean": mean, "min": 1, "max": max(8, 4 * mean)}


def rope_parameters(fields: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of a retrofitted model or Ouro; `rope_base`, a left-over of Huginn's, does not count."""
    if fields.get("rope_parameters"):
        return fields["rope_parameters"]
    scaling = fields.get("rope_scaling") or {"rope_type": "default"}
    return {**scaling, "rope_theta": fields.get("rope_theta", 10000.0)}


def _map_matrices(
    result: CheckpointMap,
    source: LlamaConfig | Olmo2Config,
    head_dim: int,
    ours: str,
    theirs: str,
    order: torch.Tensor | None,
) -> None:
    """Add the matrices of one layer, `ours` and `theirs` being the beginnings of its names."""
    heads = (source.num_attention_heads, source.num_key_value_heads or source.num_attention_heads)
    widths = [heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim]
    orders = [_rows(order, heads[0]), _rows(order, heads[1]), None]
    for which, name in enumerate("qkv"):
        target = f"{ours}self_attn.{name}_proj.weight"
        result.rows(target, f"{theirs}attn.Wqkv.weight", widths, which, orders[which])
    result.copy(f"{ours}self_attn.o_proj.weight", f"{theirs}attn.proj.weight")
    for which, name in enumerate(("gate_proj", "up_proj")):
        inner = [source.intermediate_size] * 2
        result.rows(f"{ours}mlp.{name}.weight", f"{theirs}mlp.fc.weight", inner, which)
    result.copy(f"{ours}mlp.down_proj.weight", f"{theirs}mlp.proj.weight")


def _map_biases(
    result: CheckpointMap, heads: int, head_dim: int, ours: str, theirs: str, order: torch.Tensor | None
) -> None:
    """Add the biases of one layer's queries and keys, which are one tensor [2, 1, 1, heads, head_dim] on disk."""
    width, rows = heads * head_dim, _rows(order, heads)
    for which, name in enumerate(("q_proj", "k_proj")):

        def bias(tensor: torch.Tensor, which: int = which) -> torch.Tensor:
            if tensor.numel() != 2 * width:
                raise UserError(f"a qk_bias has shape {list(tensor.shape)}; by the config it has 2 x {width}")
            flat = tensor.reshape(2, -1)[which]
            return flat if rows is None else flat[rows]

        result.tensors[f"{ours}self_attn.{name}.bias"] = ([f"{theirs}attn.qk_bias"], bias)


def _rows(order: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """The order of all rows of `heads` heads, by that of one head."""
    return None if order is None else torch.cat([order + head * len(order) for head in range(heads)])


class Reference:
    """The formulas of a checkpoint; a format overrides `block` and, where they differ, the others."""

    neighbors = False  # rotary pairs: neighboring channels, or half a head apart

    def __init__(self, checkpoint: Checkpoint):
        source = checkpoint.config.source_config
        assert isinstance(source, LlamaConfig | Olmo2Config)
        self.source, self.fields, self.read = source, checkpoint.fields, checkpoint.read
        self.scale: float = (self.fields.get("init_values") or {}).get("embed_scale", 1.0)
        self.head_dim: int = checkpoint.config.source_config.head_dim
        self.rotation: Rotation  # set by `logits`

    def logits(self, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
        """Logits [B, T, V] of ids [B, T] at `depth` recurrences from `state` [B, T, D], else the prelude's end."""
        self.rotation = rotary(self.source, ids.shape[1])
        e = self.run(self.read("transformer.wte.weight")[ids] * self.scale, "prelude")
        s = e if state is None else state
        for _ in range(depth):
            s = self.run(F.linear(torch.cat([s, e], -1), self.read("transformer.adapter.weight")), "core")
        x = self.norm(self.run(self.before_coda(s), "coda"), "transformer.ln_f")
        head = "transformer.wte.weight" if self.source.tie_word_embeddings else "lm_head.weight"
        return F.linear(x, self.read(head))

    def block(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """The layer whose names begin with `at`: [B, T, D] -> [B, T, D]."""
        raise NotImplementedError

    def before_coda(self, s: torch.Tensor) -> torch.Tensor:
        """The coda's input for the last state s [B, T, D]."""
        return s

    def turn(self, q: torch.Tensor, k: torch.Tensor, at: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, T, heads head_dim] before they are rotated."""
        return q, k

    def run(self, x: torch.Tensor, part: str) -> torch.Tensor:
        """All layers of a part (prelude, core, coda) in order: [B, T, D] -> [B, T, D]."""
        for n in range(self.fields[dict(zip(PARTS, SIZES, strict=True))[part]]):
            x = self.block(x, f"transformer.{PARTS[part]}.{n}.")
        return x

    def norm(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """The RMS norm `at`."""
        return rms_norm(x, self.read(f"{at}.weight"), self.source.rms_norm_eps)

    def attention(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """The attention of layer `at`: [B, T, D] -> [B, T, D]."""
        source = self.source
        heads = (source.num_attention_heads, source.num_key_value_heads or source.num_attention_heads)
        widths = [heads[0] * self.head_dim, heads[1] * self.head_dim, heads[1] * self.head_dim]
        q, k, v = F.linear(x, self.read(f"{at}attn.Wqkv.weight")).split(widths, dim=-1)
        q, k = self.turn(q, k, at)
        out = attend(q, k, v, self.head_dim, self.rotation, neighbors=self.neighbors)
        return F.linear(out, self.read(f"{at}attn.proj.weight"))

    def mlp(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """The gated MLP of layer `at`: [B, T, D] -> [B, T, D]."""
        gate, up = F.linear(x, self.read(f"{at}mlp.fc.weight")).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.read(f"{at}mlp.proj.weight"))
