"""The weights of a GGUF file by the names and in the layouts of its transformers model, dequantised one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .gguf_config import ROPE_TABLES
from .gguf_header import read_header
from .gguf_source import read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # GPT-2's Conv1D


class GgufTensors:
    """The tensors of a GGUF file in float32, by the methods of safetensors' handles.

    llama.cpp's changes of layout are undone: rows of q and k in pairs (llama), 1 added to norms (gemma), transposed
    matrices (GPT-2). A tensor that the model lacks keeps the file's name.
    """

    def __init__(self, file: Path, model: PreTrainedModel):
        self._header = read_header(file)
        self._config = model.config
        named = _names(self._header.architecture, model)
        self._raw = {named.get(raw, raw): raw for raw in self._header.tensors if raw not in ROPE_TABLES}

    def keys(self) -> list[str]:
        """The names of all tensors, in file order."""
        return list(self._raw)

    def get_slice(self, name: str) -> _Slice:
        """The type and shape of tensor `name` in the model."""
        shape = list(self._header.tensors[self._raw[name]].shape)
        return _Slice(shape[::-1] if self._is_transposed(self._raw[name]) else shape)

    def get_tensor(self, name: str) -> torch.Tensor:
        """The values of tensor `name`, in the model's layout."""
        raw = self._raw[name]
        values = torch.from_numpy(read_tensor(self._header, raw))
        architecture = self._header.architecture
        if architecture == "llama" and (".attn_q." in raw or ".attn_k." in raw):
            config = self._config
            heads = config.num_attention_heads if ".attn_q." in raw else config.num_key_value_heads
            return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        if architecture in ("gemma2", "gemma3") and raw.endswith("norm.weight"):
            return values - 1
        return values.T.contiguous() if self._is_transposed(raw) else values

    def _is_transposed(self, raw: str) -> bool:
        """True for a matrix that the model keeps as [in, out]."""
        return self._header.architecture == "gpt2" and raw.endswith(_TRANSPOSED)


@dataclass
class _Slice:
    """The type and shape of a tensor."""

    shape: list[int]

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        return self.shape


def _names(architecture: str, model: PreTrainedModel) -> dict[str, str]:
    """Names in the file -> names in the model, for llama.cpp's name of an architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {}
    for name in model.state_dict():
        path, _, kind = name.rpartition(".")
        if raw := names.get_name(path):
            found[f"{raw}.{kind}"] = name
    return found
