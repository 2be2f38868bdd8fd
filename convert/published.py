"""The tensors of a plain model as its checkpoints hold them: transformers renames and joins some of them on loading."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .pending import Pending
from .pieces import converted

# Architectures that transformers saves by other names than the published ones -> the difference, for a note.
OTHER_NAMES = {
    "kimi_linear": "layers without experts are named block_sparse_moe, as transformers saves them; published files of "
    "kimi_linear have mlp",
}

Part = tuple[str, Pending]  # (the pattern of a converter, a tensor of the model whose name matches it)


def published(model: PreTrainedModel, tensors: list[Pending]) -> list[Pending]:
    """`tensors`, those of `model` by its own names, by the names and in the pieces that `save_pretrained` writes.

    They are transformers' rules for loading, reversed: the experts of a mixture, one tensor of the model, are one for
    each expert and matrix. Pieces of one tensor are a group, made together, in up to twice the memory of that tensor.
    """
    rules = [
        rule for rule in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(rule, PrefixChange)
    ]
    reversed_rules = [rule.reverse_transform() for rule in reversed(rules)]
    renamings = [rule for rule in reversed_rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in reversed_rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: list[Pending] = []
    joined: dict[str, list[Part]] = {}
    for tensor in sorted(tensors, key=_natural_order):
        name, pattern = rename_source_key(tensor.name, renamings, converters, reverse=True)
        if pattern is None:
            found.append(replace(tensor, name=name))
        else:
            joined.setdefault(name, []).append((pattern, tensor))
    for name, parts in joined.items():
        found += _Pieces(model, by_pattern[parts[0][0]], name, parts).pending()
    return found


def _natural_order(tensor: Pending) -> Any:
    """The sort key of a tensor, as transformers sorts: its name, numbers by value."""
    return dot_natural_key(tensor.name)


class _Pieces:
    """The stored tensors that `converter` makes of tensors of the model; `name` is that of the first one.

    The values of all are made when one is asked for, and each is dropped when it was given.
    """

    def __init__(self, model: PreTrainedModel, converter: WeightConverter, name: str, parts: list[Part]):
        self._model, self._converter, self._name, self._parts = model, converter, name, parts
        self._made: dict[str, torch.Tensor] = {}

    def pending(self) -> list[Pending]:
        """The stored tensors; their names and shapes come from a conversion without values."""
        empty = self._convert(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        return [
            Pending(name, value.dtype, list(value.shape), partial(self._take, name), group=self._name)
            for name, value in empty.items()
        ]

    def _take(self, name: str) -> torch.Tensor:
        """The values of stored tensor `name`."""
        if name not in self._made:
            self._made = self._convert(lambda tensor: tensor.make().to(tensor.dtype))
        return self._made.pop(name)

    def _convert(self, values: Callable[[Pending], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors by name, made of the `values` of the model's."""
        converter = copy.deepcopy(self._converter)
        for pattern, tensor in self._parts:
            given: Any = values(tensor)
            converter.add_tensor(self._name, tensor.name, pattern, given)
            del given
        return converted(converter, self._name, self._model)
