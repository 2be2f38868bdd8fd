"""Tensors of a checkpoint, counted off against those of its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM


class Watched(torch.Tensor):
    """A tensor that calls `read` at the first operation on it, and at every other."""

    read: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for each in args:
            if isinstance(each, cls):
                each.read()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Completeness:
    """The tensors of a checkpoint, compared with those that the transformers model of `config` saves."""

    def __init__(self, config: RecurrentDepthConfig):
        with torch.device("meta"):
            model = RecurrentDepthForCausalLM(config)
        self._tensors = dict(model.state_dict(keep_vars=True))
        self._seen: set[int] = set()
        self._read: set[int] = set()
        # transformers has renamed modules of some architectures since their first files, and saves the old names.
        self._changes = get_model_conversion_mapping(model)

    def watch(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The `tensor` called `name`, which counts as read at its first use: vLLM's implementations of some
        architectures ignore biases. Raises ValueError where the model has no such tensor."""
        number = self.count(name)
        watched = tensor.as_subclass(Watched)  # pyright: ignore[reportArgumentType]
        watched.read = lambda: self._read.add(number)
        return watched

    def count(self, name: str, shape: Sequence[int] | None = None) -> int:
        """Count off tensor `name`. Returns its number, the same for tied tensors.

        Raises ValueError where the model has no such tensor, or one of another `shape`.
        """
        key, whole = name, True
        for change in self._changes:
            key, matched = change.rename_source_key(key)
            whole &= matched is None or not isinstance(change, WeightConverter)  # which makes one tensor of several
        if key not in self._tensors:
            raise ValueError(f"unexpected tensor {name!r} in the checkpoint")
        wanted = list(self._tensors[key].shape)
        if shape is not None and whole and list(shape) != wanted:
            raise ValueError(f"tensor {name!r} has shape {list(shape)}; config.json implies {wanted}")
        number = id(self._tensors[key])  # tied tensors share it
        self._seen.add(number)
        return number

    def check_complete(self) -> None:
        """Raises ValueError, naming tensors that the checkpoint lacks."""
        if missing := self._without(self._seen):
            raise ValueError(f"the checkpoint lacks {missing}")

    def check_read(self) -> None:
        """Raises ValueError, naming tensors that vLLM's implementation ignores. All must have passed `watch`."""
        if unread := self._without(self._read):
            raise ValueError(f"vLLM's implementation of this architecture ignores {unread}")

    def _without(self, numbers: set[int]) -> str:
        """Names of the tensors without those of `numbers`: the first three, and the count of the others."""
        names = sorted(name for name, tensor in self._tensors.items() if id(tensor) not in numbers)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more
