"""A source configuration for a chosen list of source layers: what a plain model of those layers would be."""

from __future__ import annotations

import copy
from typing import Any

# Lists of layer ids. (Most other lists of a config have one entry a layer.)
IDS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
# Lists of something else, whatever their length: classes, factors of the parts of a layer.
OTHERS = ("architectures", "mlp_multipliers", "ssm_multipliers", "mtp_layers_block_type")
LEADING_DENSE = ("first_k_dense_replace", "num_dense_layers")  # numbers of first layers, which have no experts


def config_with_layers(source_config: Any, layers: list[int]) -> Any:
    """A copy of a transformers config whose layer n has the structure of the source's layer `layers[n]`.

    Every per-layer list (`layer_types`, `no_rope_layers`, ...), list of layer ids and override of a layer is carried
    over entry by entry. Raises ValueError, naming the field, where a count or a period of layers cannot express the
    order.
    """
    config = copy.deepcopy(source_config)
    lists = per_layer(config)
    config.num_hidden_layers = len(layers)
    for name, value in lists.items():
        setattr(config, name, [value[i] for i in layers])
    for name in IDS:
        ids = getattr(config, name, None)
        if ids is not None:
            setattr(config, name, [n for n, i in enumerate(layers) if i in ids])
    if getattr(config, "mlp_only_layers", None) is not None:  # and every so many layers a mixture of experts
        step, dense = config.decoder_sparse_step, source_config.mlp_only_layers
        config.mlp_only_layers = [n for n, i in enumerate(layers) if i in dense or (i + 1) % step]
        config.decoder_sparse_step = 1
    for name in LEADING_DENSE:
        if name in vars(config) and getattr(config, "mlp_layer_types", None) is None:
            dense = [i < getattr(source_config, name) for i in layers]
            setattr(config, name, _span(name, dense, first=True)[1])
    if hasattr(config, "moe_layer_start_index"):
        start, end, step = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
        start, end = _span("moe_layer_start_index", [start <= i <= end and (i + 1) % step == 0 for i in layers])
        config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval = start, end - 1, 1
    if hasattr(config, "scale_depth"):  # MiniCPM divides it by the root of the number of layers
        config.scale_depth *= (len(layers) / source_config.num_hidden_layers) ** 0.5
    if hasattr(config, "attention_types"):  # GPT-Neo writes its types in runs, and reads them from there
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    if hasattr(config, "attn_layer_period") and _by_period(config) != [_by_period(source_config)[i] for i in layers]:
        raise ValueError(
            f"attn_layer_period={config.attn_layer_period}, expert_layer_period={config.expert_layer_period}: kinds of "
            "a plain model's layers repeat by these, and in this order they do not; let the core be whole periods"
        )
    if getattr(config, "is_heterogeneous", False):
        overrides = source_config._heterogeneity_spec.per_layer_overrides
        config.per_layer_config = {n: overrides[i] for n, i in enumerate(layers) if i in overrides}
    return config


def _by_period(config: Any) -> list[tuple[str, int]]:
    """(kind, number of experts) of every layer of Jamba."""
    return list(zip(config.layers_block_type, config.layers_num_experts, strict=True))


def _span(name: str, inside: list[bool], first: bool = False) -> tuple[int, int]:
    """(start, end) of the run of True in `inside`; `first`: it begins at 0. Without a True it is empty, at an
    end. Raises ValueError, naming the field `name`, where there are several runs."""
    if not any(inside):
        return (0, 0) if first else (len(inside), len(inside))
    count, start = sum(inside), 0 if first else inside.index(True)
    if not all(inside[start : start + count]):
        raise ValueError(
            f"{name}: a plain model has its layers without experts at its ends, and this order has some in between"
        )
    return start, start + count


def per_layer(config: Any) -> dict[str, list]:
    """The lists of a transformers config that have one entry a layer. Lists of ids are none, whatever their length."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list)
        and len(value) == config.num_hidden_layers
        and not name.startswith("_")
        and "token_id" not in name
        and name not in (*IDS, *OTHERS)
    }
