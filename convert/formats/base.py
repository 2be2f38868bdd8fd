"""A checkpoint format: how it is recognized, where its tensors go, and the formulas of its authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...errors import UserError
from ...model import RecurrentDepthConfig
from ..raw import RawTensors

Transform = Callable[..., torch.Tensor]  # tensors on disk -> one tensor of the model
Read = Callable[[str], torch.Tensor]  # a tensor by its name on disk

# Recipe keys that an import takes: the depth and defaults of the model, never how layers recur.
RECIPE_KEYS = frozenset((
    "num_recurrences", "max_recurrences", "state_init", "dtype", "dequantize", "revision", "workers", "seed",
    "kv_policy", "exit",
))  # fmt: skip


class Known(NamedTuple):
    """The values of a tensor on disk that the import leaves out, as `values(read)` gives them, within `tolerance`.

    name: of these values, for error lines.
    """

    name: str
    values: Callable[[Read], torch.Tensor]
    tolerance: float = 0


@dataclass
class CheckpointMap:
    """A checkpoint on disk as a recurrent-depth model.

    fields: the keyword arguments of its RecurrentDepthConfig.
    tensors: name of a tensor of the model -> names on disk that it is made from (mostly one), and the transform.
    ignored: names on disk that have no tensor of their own, as copies and computed tables.
    known: of those, the ones that are refused if their values are others.
    notes: lines on what the model has and the import leaves out.
    """

    fields: dict[str, Any]
    tensors: dict[str, tuple[list[str], Transform]] = field(default_factory=dict[str, tuple[list[str], Transform]])
    ignored: set[str] = field(default_factory=set[str])
    known: dict[str, Known] = field(default_factory=dict[str, Known])
    notes: list[str] = field(default_factory=list[str])

    def copy(self, name: str, raw: str) -> None:
        """Take tensor `name` unchanged from `raw` on disk."""
        self.tensors[name] = ([raw], _unchanged)

    def rows(self, name: str, raw: str, parts: Sequence[int], which: int, order: torch.Tensor | None = None) -> None:
        """Take tensor `name` from rows of the fused matrix `raw` [sum(parts), in]: part number `which`, its rows in
        `order`. The transform raises UserError for a matrix with another number of rows."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            if len(tensor) != sum(parts):
                raise UserError(f"{raw} has {len(tensor)} rows; by the config it has {' + '.join(map(str, parts))}")
            part = tensor.split(list(parts))[which]
            return part if order is None else part[order]

        self.tensors[name] = ([raw], take)

    def leave_out(self, raw: str, known: Known) -> None:
        """Ignore the tensor `raw` on disk, which may be absent, if its values are the `known` ones."""
        self.ignored.add(raw)
        self.known[raw] = known

    def copy_head(self, tied: bool) -> None:
        """Take the language model head from `lm_head.weight`; a head that is tied to the embeddings is left out."""
        if tied:
            (embeddings,), _ = self.tensors["source.model.embed_tokens.weight"]
            self.leave_out("lm_head.weight", tied_to(embeddings))
        else:
            self.copy("source.lm_head.weight", "lm_head.weight")


def tied_to(embeddings: str) -> Known:
    """The values of a head that is tied to the tensor `embeddings` on disk."""

    def values(read: Read) -> torch.Tensor:
        return read(embeddings)

    return Known(f"{embeddings}, to which the head is tied", values)


def check_options(kind: str, fields: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Raise UserError, naming it, for a field of a `kind` checkpoint whose value is not the `known` one.

    A field that is left out, or None, has it. `layer_types` may name full attention alone.
    """
    for name, value in known.items():
        if fields.get(name, value) not in (value, None):
            raise UserError(f"a {kind} checkpoint with {name}={fields[name]!r} is not supported; it is {value!r}")
    if others := sorted({*(fields.get("layer_types") or ())} - {"full_attention"}):
        raise UserError(
            f"a {kind} checkpoint with {others[0]!r} in layer_types is not supported; all are full_attention"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, as reference formulas read it.

    config: the config of the imported model; its `source_config` describes the layers.
    fields: config.json of the checkpoint.
    names, read: its tensors by their names on disk; `read` gives float64.
    """

    config: RecurrentDepthConfig
    fields: dict[str, Any]
    names: set[str]
    read: Read


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


MapOf = Callable[[dict[str, Any], RawTensors], CheckpointMap]
Reference = Callable[[Checkpoint, torch.Tensor, int, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A public recurrent-depth checkpoint format.

    name: the name in messages and in loopwise.json.
    model_type: the one in its config.json.
    has, lacks: names on disk that tell it from other formats of that model_type.
    mapping(fields, raw): the checkpoint with config.json `fields` as a recurrent-depth model. A KeyError names a field
        that config.json lacks. Raises UserError for a variant that is not supported.
    reference(checkpoint, ids, depth, state): logits [B, T, V] for ids [B, T] at `depth` recurrences from `state`
        [B, T, D]; None where the model starts from the input. The formulas are the authors', and share no code with
        the model.
    recipe_keys: recipe keys that its import takes.
    """

    name: str
    model_type: str
    has: tuple[str, ...]
    mapping: MapOf
    reference: Reference
    lacks: tuple[str, ...] = ()
    recipe_keys: frozenset[str] = RECIPE_KEYS

    def mismatch(self, fields: dict[str, Any], names: set[str]) -> str | None:
        """The reason why a checkpoint with these config fields and tensors is of another format; None for a match."""
        if fields.get("model_type") != self.model_type:
            return f"model_type is not {self.model_type!r}"
        for wanted in self.has:
            if wanted not in names:
                return f"no {wanted}"
        for unwanted in self.lacks:
            if unwanted in names:
                return f"has {unwanted}"
        return None
