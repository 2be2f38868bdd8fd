"""What a public recurrent checkpoint computes, from its own tensors: the formulas of its format and nothing else, to
verify an import against. Shapes: B batch, T tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Read = Callable[[str], torch.Tensor]  # a tensor by its name on disk, in float32


def logits(name: str, source: Any, fields: dict[str, Any], read: Read, ids, depth: int, state) -> torch.Tensor:
    """Logits [B, T, V] of a checkpoint of format `name` for ids [B, T] at `depth` recurrences from `state` [B, T, D].

    `source` is the config of its layers. Ouro has no state: it starts from the embedded tokens.
    """
    eps = source.rms_norm_eps
    head = "lm_head.weight"

    def norm(x: torch.Tensor, weight: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * read(weight)

    if name == "Ouro":
        embedded = "model.embed_tokens.weight"
        x = read(embedded)[ids]
        angles = rotary_angles(source, ids.shape[1])
        for _ in range(depth):
            for n in range(source.num_hidden_layers):
                p = f"model.layers.{n}."
                qkv = [
                    F.linear(norm(x, f"{p}input_layernorm.weight"), read(f"{p}self_attn.{c}_proj.weight"))
                    for c in "qkv"
                ]
                a = F.linear(attend(*qkv, source, angles), read(f"{p}self_attn.o_proj.weight"))
                x = x + norm(a, f"{p}input_layernorm_2.weight")
                h = norm(x, f"{p}post_attention_layernorm.weight")
                gate, up = (F.linear(h, read(f"{p}mlp.{part}_proj.weight")) for part in ("gate", "up"))
                x = x + norm(
                    F.linear(F.silu(gate) * up, read(f"{p}mlp.down_proj.weight")),
                    f"{p}post_attention_layernorm_2.weight",
                )
            x = norm(x, "model.norm.weight")
        return F.linear(x, read(embedded if source.tie_word_embeddings else head))

    huginn, olmo = name == "Huginn", name == "retrofitted OLMo"
    heads, kv = source.num_attention_heads, source.num_key_value_heads
    widths = [heads * source.head_dim, kv * source.head_dim, kv * source.head_dim]
    angles = rotary_angles(source, ids.shape[1])

    def attention(x: torch.Tensor, p: str) -> torch.Tensor:
        q, k, v = F.linear(x, read(f"{p}Wqkv.weight")).split(widths, dim=-1)
        if huginn and getattr(source, "qk_bias", False):
            bias = read(f"{p}qk_bias").flatten(1)
            q, k = q + bias[0], k + bias[1]
        if olmo:
            q, k = norm(q, f"{p}q_norm.weight"), norm(k, f"{p}k_norm.weight")
        return F.linear(attend(q, k, v, source, angles, huginn), read(f"{p}proj.weight"))

    def mlp(x: torch.Tensor, p: str) -> torch.Tensor:
        gate, up = F.linear(x, read(f"{p}fc.weight")).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, read(f"{p}proj.weight"))

    def block(x: torch.Tensor, p: str) -> torch.Tensor:
        n = [f"{p}norm_{i}.weight" for i in range(5)]
        if huginn:
            x = norm(attention(norm(x, n[1]), f"{p}attn.") + x, n[2])
            return norm(mlp(norm(x, n[3]), f"{p}mlp.") + x, n[4])
        if olmo:
            x = x + norm(attention(x, f"{p}attn."), n[1])
            return x + norm(mlp(x, f"{p}mlp."), n[2])
        x = x + attention(norm(x, n[1]), f"{p}attn.")
        return x + mlp(norm(x, n[2]), f"{p}mlp.")

    def run(x: torch.Tensor, part: str, size: str) -> torch.Tensor:
        for n in range(fields[f"n_layers_in_{size}"]):
            x = block(x, f"transformer.{part}.{n}.")
        return x

    scale = source.hidden_size**0.5 if huginn else (fields.get("init_values") or {}).get("embed_scale", 1.0)
    e = run(read("transformer.wte.weight")[ids] * scale, "prelude", "prelude")
    s = e if state is None else state
    for _ in range(depth):
        s = run(F.linear(torch.cat([s, e], -1), read("transformer.adapter.weight")), "core_block", "recurrent_block")
    s = norm(s, "transformer.ln_f.weight") if huginn else s
    x = norm(run(s, "coda", "coda"), "transformer.ln_f.weight")
    return F.linear(x, read("transformer.wte.weight" if source.tie_word_embeddings else head))


def rotary_angles(source: Any, length: int) -> torch.Tensor:
    """[T, head size / 2]"""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    frequencies: Any = LlamaRotaryEmbedding(config=source).inv_freq
    return torch.outer(torch.arange(length).float(), frequencies)


def attend(q, k, v, source: Any, angles: torch.Tensor, neighbours: bool = False, mask=None) -> torch.Tensor:
    """Attention, causal or by mask [T, T], with rotary positions: of neighbouring channels, or half a head apart."""
    heads = [t.unflatten(-1, (-1, source.head_dim)).transpose(1, 2) for t in (q, k, v)]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, dim=-1)
        a = pairs[0] * angles.cos() - pairs[1] * angles.sin()
        b = pairs[1] * angles.cos() + pairs[0] * angles.sin()
        return torch.stack([a, b], -1).flatten(-2) if neighbours else torch.cat([a, b], -1)

    out = F.scaled_dot_product_attention(
        rotate(heads[0]), rotate(heads[1]), heads[2], mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)
