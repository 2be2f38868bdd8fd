"""The weights of a checkpoint by their names in its transformers model, read one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..errors import UserError
from ..find_source import HubWeights
from ..gguf_source import find_gguf
from ..gguf_tensors import GgufTensors
from ..model import RecurrentDepthConfig
from .dtypes import FROM_SAFETENSORS
from .handle import Handle, open_files
from .pieces import Piece, Stored
from .quantised import Dequantised, Method, dtype_of
from .text_model import Whole

# Endings of tables that older transformers stored and newer ones compute.
TABLES = (
    "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".attn.bias", ".attn.causal_mask",
    ".attention.bias", "masked_bias",
)  # fmt: skip


def _natural_order(found: tuple[str, Handle, Path]) -> Any:
    """The sort key of a tensor on disk: its name, numbers by value."""
    return dot_natural_key(found[0])


@dataclass(frozen=True)
class Compared:
    """Comparisons of a source's values, which a process that opens it again need not make.

    same: as `repeats.equal_layers` gives it.   apart: tied tensors of which both are kept. None where not compared.
    """

    same: list[int] | None = None
    apart: list[str] | None = None


class SourceWeights:
    """The tensors of a checkpoint by their names in the transformers model. Use as a context manager.

    model: the model on the meta device, against which names and shapes are checked. Tensors that transformers renames
    or converts on loading (GPT-NeoX's head, the experts of a mixture in one tensor) are so here, by its own rules.
    whole: the multimodal model that the files hold, of which `model` is the text model; its other tensors are left out.
    method: the way in which the files are quantised.
    there: the weights on the hub, where `path` lacks them; None for files that lie here.
    apart: tied tensors that the files hold twice, with different values, by name. Where it is given, none is compared.
    left_out: names on disk of tensors that transformers' model leaves out, such as heads that predict further tokens.
    untied: True where the config ties embeddings and head, and the files hold two different ones. As in transformers,
    the files win.

    Raises UserError for missing, truncated or pickled weights, missing or unknown tensors, and wrong shapes.
    """

    def __init__(
        self,
        path: Path,
        model: PreTrainedModel,
        whole: Whole | None = None,
        method: Method | None = None,
        there: HubWeights | None = None,
        apart: list[str] | None = None,
    ):
        self._stack, self._model, self._whole, self._method = ExitStack(), model, whole, method
        self.there, gguf = there, None if there else find_gguf(path)
        if gguf:
            self.files, self._handles = [gguf], list[Handle]([GgufTensors(gguf, model)])
        else:
            self.files, self._handles = open_files(path, self._stack, there)
        self._loaded = whole.model if whole else model
        self._stored: dict[str, Stored] = {}
        self.left_out: list[str] = []
        self._expected: dict[str, torch.Tensor] = model.state_dict()
        self._in_files = set(self._loaded.state_dict())
        self._find_tensors()
        self.apart = self._drop_tied(apart)
        self.untied = bool(self.apart)
        tied = model.all_tied_weights_keys
        absent = [name for name in self._expected if name not in self._stored and name not in tied]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"{path}: the weights lack {absent[0]}{more}, which the config asks for")

    def _drop_tied(self, known: list[str] | None) -> list[str]:
        """Keep one of two tied tensors. Returns those that the config ties and that differ: both are kept.

        known: the same, where it is known.
        """
        apart: list[str] = []
        for target, tied in self._model.all_tied_weights_keys.items():
            if target in self._stored and tied not in self._stored:
                self._stored[tied] = self._stored.pop(target)
            elif target in self._stored:
                if known is None and not self.there:  # on the hub, both would be downloaded for this alone
                    equal = torch.equal(self.read(target), self.read(tied))
                else:
                    equal = target not in (known or [])
                if equal:
                    del self._stored[target]
                else:
                    apart.append(target)
        return apart

    def _find_tensors(self) -> None:
        """Find every tensor of the files in the model. Raises UserError for one that the model lacks, and that
        transformers does not leave out, and for pieces that do not make up their tensor."""
        ignored = self._loaded._keys_to_ignore_on_load_unexpected or ()  # pyright: ignore[reportPrivateUsage]
        mapping = get_model_conversion_mapping(self._loaded)
        renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in mapping if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        found = [(raw, handle, file) for handle, file in self._open_files() for raw in handle.keys()]  # noqa: SIM118
        for raw, handle, file in sorted(found, key=_natural_order):
            renamed, pattern = rename_source_key(raw, renamings, converters)
            loaded, stored, pattern = self._place(raw, renamed, pattern)
            if loaded is None:
                if raw.endswith(TABLES):
                    continue
                aside = self._predicts(raw) or (self._whole and not self._whole.is_text(renamed))
                if aside or any(re.search(rule, raw) or re.search(rule, renamed) for rule in ignored):
                    self.left_out.append(raw)
                    continue
                raise UserError(
                    f"{file}: tensor {raw} is not one of a {self._loaded.config.model_type} model of this config; if "
                    "it is not needed, load the model in transformers and save_pretrained it, which drops it"
                )
            name = self._whole.names.get(loaded) if self._whole else loaded
            if name is None:  # of another part than the text model
                continue
            self._check_stored(file, handle, raw, name if pattern is None else None)
            converter = by_pattern[pattern] if pattern is not None else None
            stored = name if converter or self._whole else stored
            entry = self._stored.setdefault(name, Stored(stored, loaded, converter, []))
            entry.pieces.append(Piece(handle, raw, pattern))
        for name, entry in self._stored.items():
            entry.check(self._loaded, self.shape(name))

    def _predicts(self, raw: str) -> bool:
        """True for a tensor of a layer after the last, which predicts further tokens (DeepSeek-V3, 2412.19437,
        section 2.2)."""
        count = getattr(self.config, "num_nextn_predict_layers", 0)
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", raw)
        return bool(layer) and isinstance(count, int) and 0 <= int(layer[1]) - self.config.num_hidden_layers < count

    def _place(self, raw: str, name: str, pattern: str | None) -> tuple[str | None, str, str | None]:
        """(the name in the model that the files hold, the name on disk, the converter's pattern) of tensor `raw`.

        name: its name by transformers' rules; old checkpoints leave the prefix out. None for one that the model lacks.
        """
        expected, prefix = self._in_files, self._loaded.base_model_prefix
        if name in expected:
            return name, raw, pattern
        if f"{prefix}.{name}" in expected:
            return f"{prefix}.{name}", f"{prefix}.{raw}", pattern
        return (raw, raw, None) if raw in expected else (None, raw, pattern)  # converted already

    def _open_files(self) -> Iterator[tuple[Handle, Path]]:
        """The open handle of every file; one for all files if quantised."""
        if self._method:
            yield Dequantised(self._handles, self._method, dtype_of(self._loaded.config)), self.files[0].parent
        else:
            yield from zip(self._handles, self.files, strict=True)

    def _check_stored(self, file: Path, handle: Handle, raw: str, name: str | None) -> None:
        """Raise UserError unless tensor `raw` is floating-point and has the shape of `name`, where that is given."""
        kind, shape = handle.get_slice(raw).get_dtype(), list(handle.get_slice(raw).get_shape())
        if kind not in FROM_SAFETENSORS:
            raise UserError(f"{file}: {raw} has type {kind}; convert the model to {', '.join(FROM_SAFETENSORS)} first")
        if name is not None and shape != self.shape(name):
            raise UserError(f"{file}: {raw} has shape {shape}; by the config it has {self.shape(name)}")

    def __enter__(self) -> SourceWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """The names of all tensors, in the model's order; of tied ones the first."""
        return [name for name in self._expected if name in self._stored]

    def is_parameter(self, name: str) -> bool:
        """True for a parameter, False for a buffer, as the bias of a router of experts that training balances."""
        module, _, last = name.rpartition(".")
        return isinstance(getattr(self._model.get_submodule(module), last), torch.nn.Parameter)

    def stored_name(self, name: str) -> str:
        """The name on disk, which transformers renames on loading for some architectures (GPT-NeoX: embed_out)."""
        return self._stored[name].name

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the model."""
        return self._model.config

    @property
    def recurrent_config(self) -> RecurrentDepthConfig:
        """The config of a recurrent-depth model, whose weights these are."""
        assert isinstance(self.config, RecurrentDepthConfig)
        return self.config

    def is_transposed(self, path: str) -> bool:
        """True where the linear module at `path` keeps its weight as [in, out] (GPT-2's Conv1D)."""
        return not isinstance(self._model.get_submodule(path), torch.nn.Linear)

    def shape(self, name: str) -> list[int]:
        """The shape of tensor `name` in the model; no values are read."""
        return list(self._expected[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of tensor `name`; of several pieces, the first's."""
        return self._stored[name].pieces[0].dtype()

    def read(self, name: str) -> torch.Tensor:
        """The values of tensor `name`; of tied ones, any. Raises UserError where its pieces do not make it up."""
        if name not in self._stored:
            name = self._model.all_tied_weights_keys[name]
        return self._stored[name].read(self._loaded, self.shape(name))
