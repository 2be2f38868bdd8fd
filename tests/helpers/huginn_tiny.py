"""A tiny checkpoint in Huginn's format, whose weights are computed by integer arithmetic: nothing to store."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = Path(__file__).parents[1] / "convert" / "golden" / "huginn" / "config.json"
LAYERS = {"prelude": 2, "core_block": 2, "coda": 1}
WIDTH, INNER, VOCABULARY, HEADS = 32, 48, 64, 2


def spread(number: int, *shape: int, scale: float) -> torch.Tensor:
    """Numbers between -scale and scale, from integers alone."""
    index = torch.arange(1, torch.Size(shape).numel() + 1)
    return ((index * (index + 7919 + 26 * number) % 1009).double() / 504 - 1).mul(scale).float().view(shape)


def write(folder: Path) -> dict[str, torch.Tensor]:
    """Write config and weights. Returns the weights."""
    tensors, number = {}, 0

    def add(name: str, *shape: int, scale: float, around: float = 0.0) -> None:
        nonlocal number
        number += 1
        tensors[name] = around + spread(number, *shape, scale=scale)

    add("transformer.wte.weight", VOCABULARY, WIDTH, scale=0.3)
    add("transformer.adapter.weight", WIDTH, 2 * WIDTH, scale=0.3)
    tensors["transformer.adapter.weight"][:, :WIDTH] *= 0.5  # a contraction: states converge
    add("transformer.ln_f.weight", WIDTH, scale=0.1, around=1.0)
    for part, count in LAYERS.items():
        for n in range(count):
            name = f"transformer.{part}.{n}"
            for norm in range(1, 5):
                add(f"{name}.norm_{norm}.weight", WIDTH, scale=0.1, around=1.0)
            add(f"{name}.attn.Wqkv.weight", 3 * WIDTH, WIDTH, scale=0.3)
            add(f"{name}.attn.qk_bias", 2, 1, HEADS, WIDTH // HEADS, scale=0.1)
            add(f"{name}.attn.proj.weight", WIDTH, WIDTH, scale=0.3)
            add(f"{name}.mlp.fc.weight", 2 * INNER, WIDTH, scale=0.3)
            add(f"{name}.mlp.proj.weight", WIDTH, INNER, scale=0.3)
    config = json.loads(CONFIG.read_text())
    parts = ("prelude", "recurrent_block", "coda")
    config |= {f"n_layers_in_{part}": count for part, count in zip(parts, LAYERS.values(), strict=True)}
    config |= {"n_layers": sum(LAYERS.values()), "block_size": 128}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    return tensors
