"""LoopUS (arXiv 2605.11011): a Qwen3 whose middle layers recur, each recurrence damped by a selective gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen3Config

from ...errors import UserError
from ..raw import RawTensors
from .base import Checkpoint, CheckpointMap, Format, check_options
from .layers import attend, named_layers, rms_norm, rotary

PARTS = {"prelude": "encoder", "core": "reasoning", "coda": "decoder"}  # our names -> theirs
OLD = "plateau"  # the core's name in early checkpoints
LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
OTHERS = {  # {core} is the core's name
    "source.model.embed_tokens.weight": "encoder.embed_tokens.weight",
    "source.model.norm.weight": "decoder.norm.weight",
    "source.lm_head.weight": "decoder.lm_head.weight",
    "damping.down": "{core}.gate.dt_input_proj.weight",
    "damping.up": "{core}.gate.delta_proj.weight",
    "damping.bias": "{core}.gate.delta_proj.bias",
    "damping.log_rate": "{core}.gate.A_log",
    "exit_gate.norm.weight": "q_head.0.weight",
    "exit_gate.norm.bias": "q_head.0.bias",
    "exit_gate.weight": "q_head.1.weight",
    "exit_gate.bias": "q_head.1.bias",
}


def mapping(fields: dict[str, Any], raw: RawTensors) -> CheckpointMap:
    """The map of a LoopUS checkpoint. Raises UserError for another base model than Qwen3, and for wrong layers.

    The authors' halting rule `cdf` is the exit rule `gate`; their others are none of ours, and N recurrences run.
    """
    whole: dict[str, Any] = fields["base_config_dict"]
    base: dict[str, Any] = dict(whole.get("text_config") or whole)
    wrong = {key: base.get(key) for key in ("use_sliding_window", "attention_bias") if base.get(key)}
    if base.get("model_type") != "qwen3" or wrong:
        found = {"model_type": base.get("model_type"), **wrong}
        raise UserError(f"a LoopUS checkpoint with a base_config_dict of {found} is not supported; the base is a Qwen3")
    check_options("LoopUS", base, {})
    base["tie_word_embeddings"] = False  # the authors' code always unties the head
    source = Qwen3Config(**base)
    layers, loops = _layers(fields, source.num_hidden_layers), fields["N"]
    result = CheckpointMap(
        {
            "source_config": source,
            **layers,
            "num_recurrences": loops,
            "trained_recurrences": {"mean": (loops + 1) / 2, "min": 1, "max": loops},  # random ones were supervised
            "recurrence_damping": "selective",
            "exit_gate": True,
            "exit_gate_norm": "own",
        }
    )
    strategy, interval = fields.get("halting_strategy"), fields.get("q_eval_interval", 1)
    if strategy == "cdf" and interval == 1:
        result.fields["exit"] = {"rule": "gate", "threshold": fields["q_threshold"]}
    else:
        result.notes.append(
            f"halting_strategy={strategy}, q_eval_interval={interval} is no exit rule of loopwise: by default every "
            f"token runs {loops} recurrences"
        )
    core = _core_name(raw.names())
    for part, theirs in {**PARTS, "core": core}.items():
        for n in range(len(layers[part])):
            for name in LAYER:
                result.copy(f"{part}.{n}.{name}.weight", f"{theirs}.layers.{n}.{name}.weight")
    for name, theirs in OTHERS.items():
        result.copy(name, theirs.format(core=core))
    return result


def _layers(fields: dict[str, Any], count: int) -> dict[str, list[int]]:
    """The source layers of prelude, core and coda. A list [-n] of the authors' is layer n and all after it.

    Raises UserError unless each of `count` layers stands in one part.
    """

    def listed(name: str) -> list[int]:
        given = fields.get(name) or []
        return list(range(-given[0], count)) if len(given) == 1 and given[0] < 0 else sorted(given)

    encoder, decoder = listed("encoder_layer_indices"), listed("decoder_layer_indices")
    rest = [n for n in range(count) if n not in (*encoder, *decoder)]
    core = sorted(fields.get("reasoning_layer_indices") or rest)
    if sorted([*encoder, *core, *decoder]) != list(range(count)):
        raise UserError(
            f"encoder_layer_indices={encoder}, reasoning_layer_indices={core}, decoder_layer_indices={decoder}: each "
            f"of layers 0 to {count - 1} stands in one of them"
        )
    return {"prelude": encoder, "core": core, "coda": decoder}


def _core_name(names: set[str]) -> str:
    """The core's name in a checkpoint with tensors `names`."""
    return OLD if f"{OLD}.gate.A_log" in names else PARTS["core"]


def reference(checkpoint: Checkpoint, ids: torch.Tensor, depth: int, state: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, T, V] by the authors' formulas, without halting. The state is not used: the encoder gives it."""
    config, read, core = checkpoint.config, checkpoint.read, _core_name(checkpoint.names)
    source = config.source_config
    assert isinstance(source, Qwen3Config)
    rotation, head_dim, eps = rotary(source, ids.shape[1]), source.head_dim, source.rms_norm_eps
    norm, linear = named_layers(read, eps)

    def heads(x: torch.Tensor, at: str) -> torch.Tensor:
        return rms_norm(x.unflatten(-1, (-1, head_dim)), read(f"{at}.weight"), eps).flatten(-2)

    def run(x: torch.Tensor, part: str, count: int) -> torch.Tensor:
        for n in range(count):
            at = f"{part}.layers.{n}."
            q, k, v = (linear(norm(x, f"{at}input_layernorm"), f"{at}self_attn.{name}_proj") for name in "qkv")
            q, k = heads(q, f"{at}self_attn.q_norm"), heads(k, f"{at}self_attn.k_norm")
            x = x + linear(attend(q, k, v, head_dim, rotation), f"{at}self_attn.o_proj")
            h = norm(x, f"{at}post_attention_layernorm")
            gated = F.silu(linear(h, f"{at}mlp.gate_proj")) * linear(h, f"{at}mlp.up_proj")
            x = x + linear(gated, f"{at}mlp.down_proj")
        return x

    x = run(read("encoder.embed_tokens.weight")[ids], "encoder", len(config.prelude))
    gate = f"{core}.gate."
    for _ in range(depth):
        new = run(x, core, len(config.core))
        delta = linear(linear(new - x, f"{gate}dt_input_proj"), f"{gate}delta_proj") + read(f"{gate}delta_proj.bias")
        kept = torch.exp(-F.softplus(delta) * read(f"{gate}A_log").exp())
        x = kept * new + (1 - kept) * x
    return linear(norm(run(x, "decoder", len(config.coda)), "decoder.norm"), "decoder.lm_head")


FORMAT = Format("LoopUS", "lds", has=("q_head.1.weight",), mapping=mapping, reference=reference)
