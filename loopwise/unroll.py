"""A source configuration for a chosen list of source layers: what a plain model of those layers would be."""

from __future__ import annotations

import copy
from typing import Any


def config_with_layers(source_config: Any, layers: list[int]) -> Any:
    """A copy of a transformers config whose layer n has the structure of the source's layer `layers[n]`.

    Every per-layer list (`layer_types`, `no_rope_layers`, ...) is carried over entry by entry.
    """
    config = copy.deepcopy(source_config)
    for name, value in per_layer(config).items():
        setattr(config, name, [value[i] for i in layers])
    if getattr(config, "mlp_only_layers", None) is not None:  # layer ids, and every so many layers a mixture of experts
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        config.mlp_only_layers = [n for n, i in enumerate(layers) if i in dense or (i + 1) % step]
        config.decoder_sparse_step = 1
    if hasattr(config, "attention_types"):  # GPT-Neo writes its types in runs, and reads them from there
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(layers)
    return config


def per_layer(config: Any) -> dict[str, list]:
    """The lists of a transformers config that have one entry a layer. Lists of ids are none, whatever their length."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list)
        and len(value) == config.num_hidden_layers
        and not name.startswith("_")
        and "token_id" not in name
        and name not in ("mlp_only_layers", "architectures")
    }
