"""Nanbeige4.2 (arXiv 2607.22083): all layers of a Llama run `num_loops` times, the final norm after each of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from ...errors import UserError
from ..raw import RawTensors
from .base import Checkpoint, CheckpointMap, Format, check_options
from .layers import attend, named_layers, rotary
from .raven import rope_parameters

KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Options of the authors' code that are off in the model they released: biases, norms of queries and keys, n-gram
# embeddings, loops of the middle layers alone, shared keys, hyper-connections, attention over depth, weighted losses.
OFF = (
    "attention_bias", "mlp_bias", "qk_layernorm", "emb_neighbor_num", "insert_ngram_layer_idx",
    "ngram_insert_all_layers", "enable_double_loop_split", "loop_middle_layers", "loop_middle_repeats", "loop_share_kv",
    "mhc_diff_for_loop", "enable_hyper_connection", "enable_mhc", "enable_h_res_identity", "mhc_identity_nohresparam",
    "enable_depth_attention", "loop_loss_weights", "use_sliding_window",
)  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a Nanbeige4.2 checkpoint. Raises UserError for options that the released one leaves off, and for
    the models before it, which have no loops."""
    loops = fields.get("num_loops", 1)
    if type(loops) is not int or loops < 2:
        raise UserError(
            f"num_loops={loops!r}: a Nanbeige checkpoint that recurs has 2 loops or more; one without is a Llama: set "
            "model_type to 'llama' in its config.json, and convert it by a method"
        )
    rope = rope_parameters(fields)
    wrong = {name: fields[name] for name in OFF if fields.get(name)}
    if rope.get("rope_type", rope.get("type")) != "default":
        wrong["rope_scaling"] = rope
    if fields.get("hidden_act", "silu") != "silu":
        wrong["hidden_act"] = fields["hidden_act"]
    for name, value in wrong.items():
        raise UserError(f"a Nanbeige checkpoint with {name}={value!r} is not supported; Nanbeige4.2 leaves it off")
    check_options("Nanbeige", fields, {})
    given: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    given |= {"head_dim": fields.get("kv_channels")}  # the released config.json has the head size by both names
    given |= {key: fields[key] for key in KEYS if fields.get(key) is not None}
    source = LlamaConfig(**given, rope_parameters=rope)
    result = CheckpointMap(
        {
            "source_config": source,
            "core": list(range(source.num_hidden_layers)),
            "num_recurrences": loops,
            "trained_recurrences": {"mean": loops, "min": loops, "max": loops},
            "recurrence_norm": "none" if fields.get("skip_loop_final_norm") else "between",
        }
    )
    for n in range(source.num_hidden_layers):
        for name in (*NORMS, *MATRICES):
            result.copy(f"core.{n}.{name}.weight", f"model.layers.{n}.{name}.weight")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        result.copy(f"source.{name}", name)
    result.copy_head(tied=source.tie_word_embeddings)
    return result


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas. The state is not used: the first loop starts from the embeddings."""
    source, read = checkpoint.config.source_config, checkpoint.read
    assert isinstance(source, LlamaConfig)
    assert source.head_dim is not None
    rotation, head_dim = rotary(source, ids.shape[1]), source.head_dim
    norm, linear = named_layers(read, source.rms_norm_eps)
    x = read("model.embed_tokens.weight")[ids]
    skip = checkpoint.fields.get("skip_loop_final_norm")
    for loop in range(depth):
        for n in range(source.num_hidden_layers):
            at = f"model.layers.{n}."
            h = norm(x, f"{at}input_layernorm")
            q, k, v = (linear(h, f"{at}self_attn.{name}_proj") for name in "qkv")
            x = x + linear(attend(q, k, v, head_dim, rotation), f"{at}self_attn.o_proj")
            h = norm(x, f"{at}post_attention_layernorm")
            x = x + linear(
                F.silu(linear(h, f"{at}mlp.gate_proj")) * linear(h, f"{at}mlp.up_proj"), f"{at}mlp.down_proj"
            )
        if not skip or loop == depth - 1:
            x = norm(x, "model.norm")
    return linear(x, "model.embed_tokens" if source.tie_word_embeddings else "lm_head")


FORMAT = Format(
    "Nanbeige4.2",
    "nanbeige",
    has=("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"),
    mapping=mapping,
    reference=reference,
)
