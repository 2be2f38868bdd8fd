"""The public recurrent-depth checkpoints that can be imported: how each is recognised, and where its tensors go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from transformers import LlamaConfig, Olmo2Config

from ..errors import UserError
from ..model.configuration_sandwich import SandwichConfig
from . import mor
from .raw import Imported, RawTensors


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint: the model_type of its config.json, tensors that it has and that it has not, its reader."""

    name: str
    model_type: str
    has: tuple[str, ...]
    lacks: tuple[str, ...]
    read: Callable[[dict[str, Any], RawTensors], Imported]

    def mismatch(self, fields: dict[str, Any], names: set[str]) -> str | None:
        """Why a checkpoint is not of this kind, or None."""
        if fields.get("model_type") != self.model_type:
            return f"model_type is not {self.model_type!r}"
        for wanted in self.has:
            if wanted not in names:
                return f"no {wanted}"
        for unwanted in self.lacks:
            if unwanted in names:
                return f"has {unwanted}"
        return None


def recognise(fields: dict[str, Any], names: Iterable[str]) -> Format:
    """The format of a checkpoint with these config fields and tensors. Raises UserError where it is of none."""
    names = set(names)
    reasons = {kind.name: kind.mismatch(fields, names) for kind in FORMATS}
    for kind in FORMATS:
        if reasons[kind.name] is None:
            return kind
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"a checkpoint of model_type {fields['model_type']!r} with tensors of no known format ({tried})")


def _raven(fields: dict[str, Any], norms: dict[str, str], source: Any, order: torch.Tensor | None) -> Imported:
    """What Huginn and the retrofitted models share: prelude, adapter, core_block, coda, ln_f, in Huginn's names."""
    sizes = [fields[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")]
    heads, kv = source.num_attention_heads, source.num_key_value_heads
    width, inner = heads * source.head_dim, kv * source.head_dim
    init = fields.get("init_values") or {}
    std = init.get("std", sqrt(2 / (5 * source.hidden_size)))
    scale = init.get("embed_scale", sqrt(source.hidden_size))
    imported = Imported(
        {
            "source_config": source,
            "prelude": list(range(sizes[0])),
            "core": list(range(sizes[0], sizes[0] + sizes[1])),
            "coda": list(range(sizes[0] + sizes[1], sum(sizes))),
            "num_recurrences": fields["mean_recurrence"],
            "trained_recurrences": _trained(fields),
            "injection": "linear",
            "state_init": "normal" if std else "zeros",
            "state_std": std * scale or 1.0,
        }
    )
    mode = fields.get("initial_state_mode", "random")
    if mode == "embed-init":
        imported.fields["state_init"] = "input"
    elif mode != "random":
        raise UserError(f"initial_state_mode={mode!r} of this checkpoint is not supported; random and embed-init are")
    rotary = None if order is None else lambda count: torch.cat([order + i * len(order) for i in range(count)])
    for part, theirs, size in zip(("prelude", "core", "coda"), ("prelude", "core_block", "coda"), sizes, strict=True):
        for n in range(size):
            ours, raw = f"{part}.{n}.", f"transformer.{theirs}.{n}."
            for name, norm in norms.items():
                imported.copy(f"{ours}{norm}.weight", f"{raw}{name}.weight")
            for which, count in enumerate((heads, kv, None)):
                rows = rotary(count) if rotary and count else None
                target = f"{ours}self_attn.{'qkv'[which]}_proj.weight"
                imported.rows(target, f"{raw}attn.Wqkv.weight", (width, inner, inner), which, rows)
            imported.copy(f"{ours}self_attn.o_proj.weight", f"{raw}attn.proj.weight")
            for which, target in enumerate(("gate_proj", "up_proj")):
                imported.rows(
                    f"{ours}mlp.{target}.weight", f"{raw}mlp.fc.weight", [source.intermediate_size] * 2, which
                )
            imported.copy(f"{ours}mlp.down_proj.weight", f"{raw}mlp.proj.weight")
            if getattr(source, "qk_bias", False):
                for which, name in enumerate(("q_proj", "k_proj")):

                    def bias(tensor: torch.Tensor, which: int = which) -> torch.Tensor:
                        if tensor.numel() != 2 * width:
                            raise UserError(f"a qk_bias has shape {list(tensor.shape)}; the config says 2 x {width}")
                        flat = tensor.reshape(2, -1)[which]
                        return flat if rotary is None else flat[rotary(heads)]

                    imported.tensors[f"{ours}self_attn.{name}.bias"] = ([f"{raw}attn.qk_bias"], bias)
    imported.copy("source.model.embed_tokens.weight", "transformer.wte.weight")
    imported.copy("source.model.norm.weight", "transformer.ln_f.weight")
    imported.copy("injection.weight", "transformer.adapter.weight")
    if source.tie_word_embeddings:
        imported.ignored.add("lm_head.weight")
    else:
        imported.copy("source.lm_head.weight", "lm_head.weight")
    imported.ignored.add("freqs_cis")
    return imported


def _trained(fields: dict[str, Any]) -> dict[str, int] | None:
    """The recurrences of training, from the mean of Huginn's sampler: 99.9 % of its draws are within 4 times the mean.
    Of another sampler nothing is known."""
    if not str(fields.get("sampling_scheme", "poisson-lognormal")).startswith("poisson-lognormal"):
        return None
    mean = fields["mean_recurrence"]
    return {"mean": mean, "min": 1, "max": max(8, 4 * mean)}


def _sizes(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Raven config that transformers' configs have too."""
    heads = fields.get("n_heads") or fields["num_attention_heads"]
    return {
        "vocab_size": fields.get("padded_vocab_size") or fields["vocab_size"],
        "hidden_size": fields["n_embd"],
        "intermediate_size": fields["intermediate_size"],
        "num_hidden_layers": sum(fields[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "rms_norm_eps": fields.get("norm_eps", 1e-6),
        "max_position_embeddings": fields.get("max_position_embeddings") or fields["block_size"],
        "tie_word_embeddings": bool(fields.get("tie_embeddings", fields.get("tie_word_embeddings", False))),
        "bos_token_id": fields.get("bos_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
        "pad_token_id": fields.get("pad_token_id"),
    }


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Of the retrofitted models: `rope_theta` and `rope_scaling` count; `rope_base` is a left-over of Huginn's."""
    if fields.get("rope_parameters"):
        return fields["rope_parameters"]
    scaling = fields.get("rope_scaling") or {"rope_type": "default"}
    return {**scaling, "rope_theta": fields.get("rope_theta", 10000.0)}


def _huginn(fields: dict[str, Any], raw: RawTensors) -> Imported:
    sizes = _sizes(fields)
    source: Any = SandwichConfig(
        **sizes,
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("rope_base", 50_000)},
        norm_after_residual=True,
        qk_bias="transformer.prelude.0.attn.qk_bias" in raw.names(),
        embedding_scale=(fields.get("init_values") or {}).get("embed_scale", sqrt(sizes["hidden_size"])),
    )
    norms = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "norm_3": "pre_feedforward_layernorm",
        "norm_4": "post_feedforward_layernorm",
    }
    # Huginn rotates neighbouring channels, transformers those half a head apart: the rows of q and k are put in order.
    order = torch.cat([torch.arange(0, source.head_dim, 2), torch.arange(1, source.head_dim, 2)])
    imported = _raven(fields, norms, source, order)
    imported.fields["recurrence_norm"] = "last"
    return imported


def _retrofitted_llama(fields: dict[str, Any], raw: RawTensors) -> Imported:
    head = fields.get("head_dim") or fields["n_embd"] // fields["n_heads"]
    source = LlamaConfig(**_sizes(fields), head_dim=head, rope_parameters=_rope(fields))
    return _raven(fields, {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}, source, None)


def _retrofitted_olmo(fields: dict[str, Any], raw: RawTensors) -> Imported:
    source: Any = Olmo2Config(**_sizes(fields), rope_parameters=_rope(fields))
    source.head_dim = fields.get("head_dim") or fields["n_embd"] // fields["n_heads"]
    norms = {"norm_1": "post_attention_layernorm", "norm_2": "post_feedforward_layernorm"}
    norms |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    return _raven(fields, norms, source, None)


def _ouro(fields: dict[str, Any], raw: RawTensors) -> Imported:
    if fields.get("use_sliding_window"):
        raise UserError("an Ouro checkpoint with use_sliding_window is not supported; the released ones have none")
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act", "tie_word_embeddings",
    )  # fmt: skip
    ids = [fields.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]
    if ids[0] == ids[1] and ids[1] in (0, None):  # as released; the tokenizer's are these
        ids = [1, 2, 0]
    tokens = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True))
    source = SandwichConfig(
        **{key: fields[key] for key in keys if fields.get(key) is not None}, **tokens, rope_parameters=_rope(fields)
    )
    steps = fields.get("total_ut_steps", 4)  # of training, too: its loss reads out every one of them
    imported = Imported(
        {
            "source_config": source,
            "core": list(range(source.num_hidden_layers)),
            "num_recurrences": steps,
            "trained_recurrences": {"mean": steps, "min": 1, "max": steps},
            "recurrence_norm": "between",
            "exit_gate": True,
        }
    )
    if (threshold := fields.get("early_exit_threshold", 1.0)) < 1:
        imported.fields["exit"] = {"rule": "gate", "threshold": threshold}
    norms = {
        "input_layernorm": "input_layernorm",
        "input_layernorm_2": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "post_attention_layernorm_2": "post_feedforward_layernorm",
    }
    matrices = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    for n in range(source.num_hidden_layers):
        for theirs, ours in {**norms, **dict(zip(matrices, matrices, strict=True))}.items():
            imported.copy(f"core.{n}.{ours}.weight", f"model.layers.{n}.{theirs}.weight")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        imported.copy(f"source.{name}", name)
    for name in ("weight", "bias"):
        imported.copy(f"exit_gate.{name}", f"model.early_exit_gate.{name}")
    if source.tie_word_embeddings:
        imported.ignored.add("lm_head.weight")
    else:
        imported.copy("source.lm_head.weight", "lm_head.weight")
    return imported


_BLOCK = "transformer.core_block.0."
FORMATS = (
    Format("Huginn", "huginn_raven", (f"{_BLOCK}norm_4.weight",), (), _huginn),
    Format(
        "retrofitted OLMo", "huginn_raven", (f"{_BLOCK}attn.q_norm.weight",), (f"{_BLOCK}norm_3.weight",),
        _retrofitted_olmo,
    ),
    Format(
        "retrofitted Llama", "huginn_raven", (f"{_BLOCK}norm_2.weight",),
        (f"{_BLOCK}norm_3.weight", f"{_BLOCK}attn.q_norm.weight", f"{_BLOCK}attn.qk_bias"), _retrofitted_llama,
    ),
    Format(
        "Ouro", "ouro", ("model.layers.0.input_layernorm_2.weight", "model.early_exit_gate.weight"), (), _ouro,
    ),
    Format("expert-choice MoR", "llama", (mor.EXPERT,), (), mor.expert),
    Format("token-choice MoR", "llama", (mor.TOKEN,), (), mor.token),
)  # fmt: skip
