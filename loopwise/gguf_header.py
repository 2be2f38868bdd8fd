"""The header of a GGUF file: its metadata and its table of tensors. Imports nothing heavy."""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, reason, shorten
from .input_files import check_regular

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
NOT_A_MODEL = {  # general.type -> error line
    "adapter": "a LoRA adapter; merge it into its model first",
    "mmproj": "the vision or audio part of a multimodal model; give the file of its text model",
    "imatrix": "an importance matrix of a quantisation; give the file of the model",
    "vocab": "a vocabulary without a model; give the file of the model",
}
TEXTS = ("general.architecture", "general.type", "tokenizer.ggml.model", "tokenizer.chat_template")
WHOLE = re.compile(r"split\.count|tokenizer\.ggml\.\w+_token_id")  # keys whose values are integers


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the table: `shape` in torch's order, `type` by ggml's numbers, `start` in bytes from the file's."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class Header:
    """The header of `file`. fields: metadata key -> value, for an array of strings its length."""

    file: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The architecture by llama.cpp's name, as `llama`."""
        return self.fields["general.architecture"]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture: `value("block_count")` is that of `llama.block_count`."""
        return self.fields.get(f"{self.architecture}.{key}", default)


def read_header(file: Path) -> Header:
    """The header of the GGUF model `file`; every tensor that it lists lies within the file.

    Raises UserError for a file that is no GGUF file, truncated, big-endian, one part of several, or no model.
    """
    check_regular(file)
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
            if start[:4] != b"GGUF" or len(start) < 8:
                raise UserError(f"{file}: not a GGUF file: it begins with {start[:4]!r}, not b'GGUF'")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(file, data)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: truncated or damaged: its header cannot be read ({reason(error)})") from None
    _check_model(header)
    return header


def _parse(file: Path, data: mmap.mmap) -> Header:
    """The header in `data`, the mapped file. Raises ValueError and struct.error for a damaged one."""
    version, tensor_count, field_count = struct.unpack_from("<IQQ", data, 4)
    if version & 0xFFFF == 0:
        raise UserError(f"{file}: a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise UserError(f"{file}: GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
    fields: dict[str, Any] = {}
    at = 24
    for _ in range(field_count):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        fields[key], at = _value(data, at + 4, kind)
    table, at = _table(data, at, tensor_count)
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin = -(-at // alignment) * alignment
    tensors = {name: StoredTensor(name, shape, kind, begin + offset) for name, (shape, kind, offset) in table.items()}
    for tensor in tensors.values():
        end = tensor.start + byte_count(file, tensor)
        if end > len(data):
            raise UserError(f"{file}: truncated: {tensor.name} ends at byte {end:,}, the file at {len(data):,}")
    return Header(file, fields, tensors)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    """The string at byte `at`, and the byte after it."""
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise ValueError(f"a text at byte {at:,} is {length:,} bytes long")
    return data[at + 8 : end].decode("utf-8"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """The metadata value of type `kind` at byte `at`, and the byte after it; for an array of strings its length."""
    if kind == STRING:
        return _string(data, at)
    if kind in SCALARS:
        form = struct.Struct("<" + SCALARS[kind])
        return form.unpack_from(data, at)[0], at + form.size
    if kind != ARRAY:
        raise ValueError(f"metadata of type {kind}")
    element, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if element in SCALARS:
        if at + count * struct.calcsize("<" + SCALARS[element]) > len(data):
            raise ValueError(f"an array at byte {at:,} has {count:,} entries")
        form = struct.Struct(f"<{count}{SCALARS[element]}")
        return list(form.unpack_from(data, at)), at + form.size
    if element != STRING:
        raise ValueError(f"metadata of type array of {element}")
    for _ in range(count):  # a vocabulary or its merges, which transformers' reader of tokenizers reads
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return count, at


def _table(data: mmap.mmap, at: int, count: int) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], int]:
    """The table of `count` tensors at byte `at`, name -> shape, type, offset; and the byte after it."""
    table: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, at = _string(data, at)
        (dims,) = struct.unpack_from("<I", data, at)
        if dims > 4:
            raise ValueError(f"{name} has {dims} dimensions")
        shape = struct.unpack_from(f"<{dims}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dims)
        at += 16 + 8 * dims
        if name in table:
            raise ValueError(f"{name} is there twice")
        table[name] = (shape[::-1], kind, offset)  # ggml counts the fastest dimension first, torch last
    return table, at


def byte_count(file: Path, tensor: StoredTensor) -> int:
    """The size of the tensor in the file, in bytes. Raises UserError for a type that cannot be dequantised."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(tensor.type)
        elements, size = GGML_QUANT_SIZES[kind]
        dequantize(numpy.zeros((1, size), numpy.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        name = kind.name if (kind := _known(tensor.type)) else f"number {tensor.type}"
        raise UserError(
            f"{file}: {tensor.name} is of type {name}, which cannot be dequantised; convert another quantisation "
            "of the model, such as Q8_0 or BF16"
        ) from None
    if tensor.shape and tensor.shape[-1] % elements:
        raise ValueError(f"{tensor.name} has rows of {tensor.shape[-1]}, no multiple of {elements}")
    return math.prod(tensor.shape) // elements * size


def _known(number: int) -> GGMLQuantizationType | None:
    """ggml's type of that number, None for a number that it lacks."""
    from gguf import GGMLQuantizationType

    return next((kind for kind in GGMLQuantizationType if kind == number), None)


def check_kind(file: Path, key: str, value: object, *kinds: type) -> None:
    """Raise UserError unless the metadata `value` is of one of these kinds (str, int, float)."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = "a text" if str in kinds else "a number" if float in kinds else "a whole number"
        raise UserError(f"{file}: {key} = {shorten(repr(value), 60)} of its metadata is not {wanted}")


def _check_model(header: Header) -> None:
    """Raise UserError unless the file holds one whole model."""
    file, fields = header.file, header.fields
    for key, value in fields.items():
        if key in TEXTS:
            check_kind(file, key, value, str)
        elif WHOLE.fullmatch(key):
            check_kind(file, key, value, int)
    if "general.architecture" not in fields:
        raise UserError(f"{file}: its metadata name no general.architecture, so it is no model")
    if (kind := fields.get("general.type", "model")) != "model":
        raise UserError(f"{file}: {NOT_A_MODEL.get(kind, f'a GGUF file of type {kind!r}, not a model')}")
    if fields.get("split.count", 1) > 1 or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", file.name):
        raise UserError(
            f"{file}: one part of a split model; join the parts first: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if not header.tensors:
        raise UserError(f"{file}: {NOT_A_MODEL['vocab']}")
