"""GGUF files as sources: the file of a path, its config and tokenizer as a transformers directory, its tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import as_front, copy_licences, read_metadata
from .carried import CARD
from .checkpoint import INDEX, WEIGHTS
from .errors import UserError, reason
from .gguf_header import Header, read_header
from .hub import snapshot_of
from .input_files import check_regular

if TYPE_CHECKING:
    import numpy

# Tokens that end a turn or a message, of the families that are read: Llama 3, ChatML, Phi 3, Gemma.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

MOST_BASES = 100  # base models of one file that are looked at


def find_gguf(path: Path) -> Path | None:
    """The GGUF file of `path`: `path` itself, or the only one of a directory without safetensors; else None.

    Raises UserError for a directory with several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" or _is_gguf(path) else None
    if (path / WEIGHTS).exists() or (path / INDEX).exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} GGUF files ({', '.join(file.name for file in found)}); "
            f"give one of them, as {found[0]}"
        )
    return found[0] if found else None


def _is_gguf(file: Path) -> bool:
    """True for a file that begins as a GGUF file."""
    with open(file, "rb") as stream:
        return stream.read(4) == b"GGUF"


@contextmanager
def unpacked(path: Path) -> Generator[Path]:
    """`path` itself; for a GGUF file, a temporary directory with the files that transformers saves for a model.

    It holds config.json, generation_config.json, the tokenizer with its chat template, a link to the file, and its card
    and licences (see `_describe`). Raises UserError for a file that is no supported model; a UserError of the block
    names the file in place of the directory.
    """
    file = find_gguf(path)
    if file is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="loopwise-") as name:
        directory = Path(name)
        try:
            _describe(_unpack(file, directory), directory, path.is_dir())
            yield directory
        except UserError as error:
            text = str(error).replace(str(directory / _linked(file)), str(file)).replace(str(directory), str(file))
            raise UserError(text) from error


def _linked(file: Path) -> str:
    """The name of the link to `file`: some caches name files by a hash, without an ending."""
    return file.name if file.suffix == ".gguf" else f"{file.name}.gguf"


def _describe(header: Header, directory: Path, whole_folder: bool) -> None:
    """Write the card and the licences of a GGUF file into `directory`: those beside it, else a card of its metadata.

    whole_folder: the source is the directory of the file, not the file. Beside a file that lies anywhere, a card counts
    if it has metadata, and a licence with such a card: a licence alone may be that of other files.
    """
    folder = snapshot_of(header.file) or header.file.parent
    check_regular(folder / CARD)
    fields = read_metadata(folder / CARD)
    if fields or whole_folder or snapshot_of(header.file):
        copy_licences(folder, directory)
        link = str(fields.get("license_link", ""))
        if "://" not in link and (name := Path(link).name) and (directory / name).is_file():
            fields["license_link"] = name
    told = _metadata(header)
    if "license" in fields:
        told = {name: value for name, value in told.items() if not name.startswith("license")}
    (directory / CARD).write_text(as_front({**told, **fields}), encoding="utf-8")


def _metadata(header: Header) -> dict[str, Any]:
    """Licence and base models in the metadata of a GGUF file, in the fields of a model card; none that it lacks."""
    from huggingface_hub.constants import HUGGINGFACE_CO_URL_HOME

    names = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
    found = {to: header.fields.get(f"general.{name}") for name, to in names.items()}
    count = header.fields.get("general.base_model.count", 0)
    base: list[str] = []
    for n in range(min(count, MOST_BASES) if isinstance(count, int) else 0):
        address = header.fields.get(f"general.base_model.{n}.repo_url")
        if isinstance(address, str) and address.startswith(HUGGINGFACE_CO_URL_HOME):
            base.append(address.removeprefix(HUGGINGFACE_CO_URL_HOME).strip("/"))
    given = {name: value for name, value in found.items() if isinstance(value, str) and value}
    return {**(given if "license" in given else {}), **({"base_model": base} if base else {})}


def _unpack(file: Path, directory: Path) -> Header:
    """Write config, generation config and tokenizer of `file` into `directory`, and a link to it. Gives its header."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from .gguf_config import build_config

    header = read_header(file)
    link = directory / _linked(file)
    link.symlink_to(file.resolve())
    config = build_config(header, lambda name: read_tensor(header, name).ravel().tolist())
    if not isinstance(header.fields.get("tokenizer.ggml.model"), str):
        raise UserError(f"{file}: it holds no tokenizer; take the safetensors of the model")
    try:
        # This class takes tokenizer.json as it is. An architecture's own class, once loaded again, splits text its way.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, gguf_file=link.name, **_ends(header))
        tokenizer.save_pretrained(directory)
    except Exception as error:  # transformers and tokenizers share no base class for errors in a tokenizer
        raise UserError(f"{file}: no tokenizer can be made of it ({reason(error)})") from None
    config.save_pretrained(directory)
    generation = GenerationConfig.from_model_config(config)
    ends = _text_ends(header, tokenizer.get_vocab())
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.save_pretrained(directory)
    return header


def _text_ends(header: Header, vocabulary: dict[str, int]) -> list[int]:
    """The ids that end a text: eos, then those that end a turn or a message, by their key or by their name.

    An instruct model ends its turn with the latter. Many files have no key for it; llama.cpp finds it by its name too.
    """
    ids = [header.fields.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    found = dict.fromkeys([*ids, *(vocabulary.get(token) for token in TURN_ENDS)])
    return [token for token in found if isinstance(token, int) and 0 <= token < len(vocabulary)]


def _ends(header: Header) -> dict[str, Any]:
    """Settings of the tokenizer for tokens at either end of a text, which transformers' reader leaves out.

    By default a SentencePiece vocabulary begins texts with bos, as in llama.cpp.
    """
    default = {"bos": header.fields["tokenizer.ggml.model"] == "llama", "eos": False}
    found = {end: header.fields.get(f"tokenizer.ggml.add_{end}_token", default[end]) for end in default}
    return {f"add_{end}_token": True for end, wanted in found.items() if wanted}


def read_tensor(header: Header, name: str) -> numpy.ndarray[Any, Any]:
    """The values of tensor `name`, dequantised, a float32 array of its shape; no other tensor is read."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    tensor = header.tensors[name]
    kind = GGMLQuantizationType(tensor.type)
    elements, size = GGML_QUANT_SIZES[kind]
    rows = (*tensor.shape[:-1], tensor.shape[-1] // elements * size)
    data = numpy.memmap(header.file, mode="r", dtype=numpy.uint8, offset=tensor.start, shape=rows)
    values = dequantize(data, kind)
    return values if values.flags.writeable else values.copy()  # a view of the mapped file, of float32
