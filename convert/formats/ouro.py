"""Ouro (arXiv 2510.25741): all layers recur, with the final norm between recurrences and an exit gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...model.configuration_sandwich import SandwichConfig
from ..raw import RawTensors
from .base import Checkpoint, CheckpointMap, Format, check_options
from .layers import attend, named_layers, rotary
from .raven import rope_parameters

KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act", "tie_word_embeddings",
)  # fmt: skip
NORMS = {
    "input_layernorm": "input_layernorm",
    "input_layernorm_2": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_attention_layernorm_2": "post_feedforward_layernorm",
}
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of an Ouro checkpoint. Raises UserError for windows and biases; the released ones have none."""
    check_options("Ouro", fields, {"use_sliding_window": False, "attention_bias": False, "mlp_bias": False})
    source = SandwichConfig(
        **{key: fields[key] for key in KEYS if fields.get(key) is not None},
        **special_tokens(fields),
        rope_parameters=rope_parameters(fields),
    )
    steps = fields.get("total_ut_steps", 4)  # in training, too: its loss reads out all of them
    result = CheckpointMap(
        {
            "source_config": source,
            "core": list(range(source.num_hidden_layers)),
            "num_recurrences": steps,
            "trained_recurrences": {"mean": steps, "min": 1, "max": steps},
            "recurrence_norm": "between",
            "exit_gate": True,
        }
    )
    threshold = fields.get("early_exit_threshold")  # null in config.json: no exits
    if threshold is not None and threshold < 1:
        result.fields["exit"] = {"rule": "gate", "threshold": threshold}
    for n in range(source.num_hidden_layers):
        for theirs, ours in {**NORMS, **{name: name for name in MATRICES}}.items():
            result.copy(f"core.{n}.{ours}.weight", f"model.layers.{n}.{theirs}.weight")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        result.copy(f"source.{name}", name)
    for name in ("weight", "bias"):
        result.copy(f"exit_gate.{name}", f"model.early_exit_gate.{name}")
    result.copy_head(tied=source.tie_word_embeddings)
    return result


def special_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    """The special tokens of config.json; where begin and end are one id, as released, those of the tokenizer."""
    bos, eos, pad = (fields.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    if bos == eos and eos in (0, None):
        bos, eos, pad = 1, 2, 0
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas. The state is not used: Ouro starts from the embedded tokens."""
    source, read = checkpoint.config.source_config, checkpoint.read
    assert isinstance(source, SandwichConfig)
    assert source.head_dim is not None
    rotation, head_dim = rotary(source, ids.shape[1]), source.head_dim
    norm, linear = named_layers(read, source.rms_norm_eps)
    x = read("model.embed_tokens.weight")[ids]
    for _ in range(depth):
        for n in range(source.num_hidden_layers):
            at = f"model.layers.{n}."
            h = norm(x, f"{at}input_layernorm")
            q, k, v = (linear(h, f"{at}self_attn.{name}_proj") for name in "qkv")
            attended = linear(attend(q, k, v, head_dim, rotation), f"{at}self_attn.o_proj")
            x = x + norm(attended, f"{at}input_layernorm_2")
            h = norm(x, f"{at}post_attention_layernorm")
            h = F.silu(linear(h, f"{at}mlp.gate_proj")) * linear(h, f"{at}mlp.up_proj")
            x = x + norm(linear(h, f"{at}mlp.down_proj"), f"{at}post_attention_layernorm_2")
        x = norm(x, "model.norm")
    return linear(x, "model.embed_tokens" if source.tie_word_embeddings else "lm_head")


FORMAT = Format(
    "Ouro",
    "ouro",
    has=("model.layers.0.input_layernorm_2.weight", "model.early_exit_gate.weight"),
    mapping=mapping,
    reference=reference,
)
