"""A source configuration for a chosen list of source layers: what a plain model of those layers would be."""

from __future__ import annotations

import copy
from typing import Any


def config_with_layers(source_config: Any, layers: list[int]) -> Any:
    """A copy of a transformers config whose layer n has the structure of the source's layer `layers[n]`.

    Every per-layer list (`layer_types`, `no_rope_layers`, ...) is carried over entry by entry; lists of token ids are
    none, whatever their length.
    """
    config = copy.deepcopy(source_config)
    count = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count and not name.startswith("_") and "token_id" not in name:
            setattr(config, name, [value[i] for i in layers])
    if hasattr(config, "attention_types"):  # GPT-Neo writes its types in runs, and reads them from there
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(layers)
    return config
