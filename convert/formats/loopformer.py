"""LoopFormer (arXiv 2602.11451): all layers recur, conditioned on the time and the size of each step."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import UserError
from ...model.configuration_ungated import UngatedConfig
from ..raw import RawTensors
from .base import Checkpoint, CheckpointMap, Format, tied_to

LOOPS = 8  # R of the released models' training; config.json does not have it
FREQUENCIES = 256
NORMS = ["input_layernorm", "post_attention_layernorm"]
OUTPUTS = ["self_attn.o_proj", "mlp.down_proj"]
LINEARS = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
EPS = torch.finfo(torch.float32).eps
PREFIX = "gpt."  # of the released files; the authors' own code saves without


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a LoopFormer checkpoint. Raises UserError for a width that the heads do not divide."""
    width, heads, count, bias = fields["n_embd"], fields["n_head"], fields["n_layer"], bool(fields.get("bias"))
    if width % heads:
        raise UserError(f"n_head={heads} does not divide n_embd={width}")
    source = UngatedConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=width,
        intermediate_size=fields["intermediate_dim"],
        num_hidden_layers=count,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        hidden_act="gelu",
        max_position_embeddings=fields["block_size"],
        rms_norm_eps=EPS,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=True,
        learned_positions=True,
        norm_weights=False,
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=fields.get("eos_token_id"),
        pad_token_id=fields.get("pad_token_id"),
    )
    loops = fields.get("max_model_loops", LOOPS)
    result = CheckpointMap(
        {
            "source_config": source,
            "core": list(range(count)),
            "num_recurrences": loops,
            # Each step has the full number, and a shorter path of unequal steps.
            "trained_recurrences": {"mean": loops, "min": 1, "max": loops},
            "time_conditioning": {"scale": NORMS, "gate": OUTPUTS, "frequencies": FREQUENCIES},
        }
    )
    at = prefix(raw.names())
    result.copy("source.model.embed_tokens.weight", f"{at}transformer.wte.weight")
    result.copy("source.model.embed_positions.weight", f"{at}transformer.wpe.weight")
    result.copy("source.model.norm.weight", f"{at}transformer.norm_f.weight")
    for ours, theirs in (("time", "time_embedder"), ("step", "dt_embedder")):
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            result.copy(f"time_conditioning.{ours}.{name}", f"{at}{theirs}.mlp.{name}")
    for n in range(count):
        _map_layer(result, n, f"{at}transformer.h.blocks.{n}.", width, ("weight", "bias") if bias else ("weight",))
    for name in {"lm_head.weight", f"{at}lm_head.weight"}:
        result.leave_out(name, tied_to(f"{at}transformer.wte.weight"))
    return result


def _map_layer(result: CheckpointMap, n: int, theirs: str, width: int, kinds: tuple[str, ...]) -> None:
    """Add the tensors of layer n, whose names on disk begin with `theirs`."""
    for kind in kinds:
        for which, name in enumerate("qkv"):
            result.rows(f"core.{n}.self_attn.{name}_proj.{kind}", f"{theirs}attn.c_attn.{kind}", [width] * 3, which)
        for ours, name in LINEARS.items():
            result.copy(f"core.{n}.{ours}.{kind}", f"{theirs}{name}.{kind}")
    places = [("gate", name) for name in OUTPUTS] + [("scale", name) for name in NORMS]
    for which, (part, name) in enumerate(places):
        at = f"time_conditioning.layers.{n}.{part}.{name.replace('.', '-')}."
        for kind in ("weight", "bias"):
            result.rows(f"{at}{kind}", f"{theirs}adaLN_modulation.1.{kind}", [width] * 4, which)


def prefix(names: set[str]) -> str:
    """The beginning of the names on disk."""
    return PREFIX if f"{PREFIX}transformer.wte.weight" in names else ""


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas, in `depth` equal steps. The state is not used."""
    fields, names, length = checkpoint.fields, checkpoint.names, ids.shape[1]
    at, heads = prefix(names), fields["n_head"]
    norm = partial(F.rms_norm, normalized_shape=(fields["n_embd"],), eps=EPS)

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(f"{at}{name}")

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = f"{name}.bias"
        return F.linear(x, read(f"{name}.weight"), read(bias) if f"{at}{bias}" in names else None)

    def embedded(name: str, time: float) -> torch.Tensor:
        half = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES // 2) / (FREQUENCIES // 2)) * time
        return linear(F.silu(linear(torch.cat([half.cos(), half.sin()]), f"{name}.mlp.0")), f"{name}.mlp.2")

    wte = read("transformer.wte.weight")
    x = wte[ids] + read("transformer.wpe.weight")[:length]
    for step in range(depth):
        c = F.silu(embedded("time_embedder", step / depth) + embedded("dt_embedder", 1 / depth))
        for n in range(fields["n_layer"]):
            block = f"transformer.h.blocks.{n}."
            gate_attention, gate_mlp, scale_attention, scale_mlp = linear(c, f"{block}adaLN_modulation.1").chunk(4)
            qkv = linear(norm(x) * (1 + scale_attention), f"{block}attn.c_attn").chunk(3, -1)
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + gate_attention * linear(out, f"{block}attn.c_proj")
            h = F.gelu(linear(norm(x) * (1 + scale_mlp), f"{block}mlp.c_fc"))
            x = x + gate_mlp * linear(h, f"{block}mlp.c_proj")
    return F.linear(norm(x, weight=read("transformer.norm_f.weight")), wte)


FORMAT = Format("LoopFormer", "loopformer", has=(), mapping=mapping, reference=reference)
