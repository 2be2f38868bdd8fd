"""A tensor of a model as its files hold it: in one piece or, where transformers converts it, in several."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from ..errors import UserError, reason
from .dtypes import FROM_SAFETENSORS
from .handle import Handle


def converted(converter: WeightConverter, name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors by name that `converter`, which was given the pieces of `name`, makes by the config of `model`."""
    made: dict[str, Any] = converter.convert(name, model=model, config=model.config)
    return {one: value[0] if isinstance(value, list) else value for one, value in made.items()}


@dataclass
class Piece:
    """A tensor on disk. pattern: the pattern of the converter that its name matched, where it is converted."""

    handle: Handle
    raw: str
    pattern: str | None

    def dtype(self) -> torch.dtype:
        """The stored type."""
        return FROM_SAFETENSORS[self.handle.get_slice(self.raw).get_dtype()]

    def meta(self) -> torch.Tensor:
        """A tensor of its type and shape without values."""
        return torch.empty(self.handle.get_slice(self.raw).get_shape(), dtype=self.dtype(), device="meta")

    def read(self) -> torch.Tensor:
        """The values."""
        return self.handle.get_tensor(self.raw)


@dataclass
class Stored:
    """One tensor of the model as it stands on disk, in one piece or, with a converter, in several.

    name: its name on disk, with the prefix that old checkpoints leave out; the model's name where transformers converts
        it, or where the files hold another model around it.   loaded: its name in the model that the files hold.
    """

    name: str
    loaded: str
    converter: WeightConverter | None
    pieces: list[Piece]

    def check(self, holder: PreTrainedModel, shape: list[int]) -> None:
        """Raise UserError where the pieces do not make up a tensor of `shape`; no values are read."""
        if self.converter:
            self._make((piece.meta() for piece in self.pieces), holder, shape)

    def read(self, holder: PreTrainedModel, shape: list[int]) -> torch.Tensor:
        """The values, of `shape`. Raises UserError where the pieces do not make them up.

        holder: the model that the files hold, on the meta device.
        """
        return self._make((piece.read() for piece in self.pieces), holder, shape)

    def _make(self, values: Iterable[torch.Tensor], holder: PreTrainedModel, shape: list[int]) -> torch.Tensor:
        """The tensor from the `values` of its pieces."""
        if self.converter is None:
            return next(iter(values))
        converter = copy.deepcopy(self.converter)
        for piece, value in zip(self.pieces, values, strict=True):
            converter.add_tensor(self.loaded, piece.raw, cast(str, piece.pattern), cast(Any, value))
        try:
            tensor = converted(converter, self.loaded, holder)[self.loaded]
        except Exception as error:  # torch has no class of errors for shapes
            raise self._do_not_fit(shape, reason(error)) from None
        if list(tensor.shape) != shape:
            raise self._do_not_fit(shape, f"they make {list(tensor.shape)}")
        return tensor

    def _do_not_fit(self, shape: list[int], why: str) -> UserError:
        """The error of pieces that do not make up a tensor of `shape`: how many of which shape each pattern has."""
        assert self.converter is not None
        found = Counter((piece.pattern, str(list(piece.meta().shape))) for piece in self.pieces)
        counts = [f"{count} x {pattern} {size}" for (pattern, size), count in found.items()]
        lacking = [f"no {one}" for one in self.converter.source_patterns if one not in {key[0] for key in found}]
        return UserError(
            f"{self.pieces[0].raw}, ...: the files do not make up {self.name} of shape {shape}; they have "
            f"{', '.join(counts + lacking)} ({why})"
        )
