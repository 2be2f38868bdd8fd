"""A source checkpoint: found, checked, and read tensor by tensor from memory-mapped safetensors."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..carried import LICENCES, TOKENIZER_FILES
from ..checkpoint import config_fields, weight_files
from ..errors import UserError, reason
from ..gguf_source import find_gguf
from ..gguf_tensors import GgufTensors
from ..hub import not_found

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_source(source: str, revision: str | None) -> Path:
    """The local directory of `source`, a directory or a hub id; or the GGUF file that it names, as ID:FILE.gguf does.

    Raises UserError where there is none of these.
    """
    if not source:
        raise UserError("SOURCE is empty; give the directory of a checkpoint, a GGUF file, or a hub id")
    path = Path(source).expanduser()
    try:
        path.is_dir()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub sources; {source} is a local directory")
        return path
    if path.exists():
        if find_gguf(path) is None:
            raise UserError(f"{source} is a file, and no GGUF; give the directory of a checkpoint, or a hub id")
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub sources; {source} is a local file")
        return path
    repository, _, file = source.partition(":")
    if source.startswith(("/", ".", "~")) or repository.count("/") > 1:
        raise UserError(f"{source}: no such {'file' if source.endswith('.gguf') else 'directory'}")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if file.endswith(".gguf"):
            return Path(hf_hub_download(repository, file, revision=revision))
        patterns = ["*.json", "*.safetensors", *TOKENIZER_FILES, *LICENCES]
        path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns="*.py"))
        if any(path.glob("*.safetensors")):
            return path
        stored = HfApi().list_repo_files(source, revision=revision)
    except Exception as error:  # the hub client raises many kinds: not found, gated, offline, no connection
        raise not_found(source, error, revision) from None
    if files := [name for name in stored if name.endswith(".gguf")]:
        raise UserError(f"{source} holds GGUF files; name the one to take: {', '.join(f'{source}:{n}' for n in files)}")
    return path


def read_config(path: Path) -> Any:
    """The transformers config of a source that can be converted. Raises UserError with the reason and the way out."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from .architectures import check_supported

    fields = config_fields(path)
    model_type = fields["model_type"]
    if model_type == "recurrent_depth":
        raise UserError(f"{path} is a recurrent-depth model already")
    if fields.get("quantization_config") is not None:
        raise UserError(f"{path} is quantised; convert the unquantised checkpoint, and quantise the result")
    if fields.get("text_config") is not None:
        raise UserError(f"{path} ({model_type}) is multimodal; save its text model on its own first, then convert that")
    if "auto_map" in fields and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{path} ({model_type}) needs remote code, which is not run; only transformers' own are converted"
        )
    check_supported(model_type)
    if fields.get("scale_attn_by_inverse_layer_idx"):
        raise UserError(
            f"{path}: scale_attn_by_inverse_layer_idx scales attention by a layer's place, which a layer that recurs "
            "does not have; train the model without it first"
        )
    try:
        config = AutoConfig.from_pretrained(path)
        if config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers={config.num_hidden_layers}")
        with torch.device("meta"):
            empty_model(config)
    except Exception as error:  # transformers and torch share no base class for what they find wrong with a config
        raise UserError(
            f"{path / 'config.json'}: no {model_type} model can be built from it ({reason(error)})"
        ) from None
    return config


def read_recurrent_config(path: Path) -> Any:
    """The config of a recurrent-depth checkpoint. Raises UserError for anything else."""
    from ..model import RecurrentDepthConfig

    if (file := find_gguf(path) if path.exists() else None) and not (path / "config.json").exists():
        raise UserError(f"{file}: a GGUF file; turn it into a recurrent-depth model with `loopwise convert`")
    if not path.is_dir():
        what = "a file" if path.exists() else "no such directory"
        raise UserError(f"{path}: {what}; give the directory of a recurrent-depth checkpoint")
    kind = config_fields(path).get("model_type")
    if kind != "recurrent_depth":
        raise UserError(f"{path}: model_type is {kind!r}, not 'recurrent_depth'; loopwise convert makes one")
    return RecurrentDepthConfig.from_pretrained(path)


def empty_model(config: Any) -> PreTrainedModel:
    """The transformers model of `config`; call it under `torch.device("meta")`."""
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # transformers' sdpa leaves the cap out
    return cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)


@dataclass
class _Stored:
    """How one tensor of the model stands on disk: `pieces` are (safetensors file, name in it, pattern of `converter`).

    `name` is what it is called on disk, with the prefix that old checkpoints leave out.
    """

    name: str
    converter: WeightConverter | None
    pieces: list[tuple[Any, str, str | None]]


class SourceWeights:
    """The tensors of a source by their names in the transformers model, read one at a time.

    `model` is the source model on the meta device: names and shapes are checked against it. What transformers renames
    or converts on loading (GPT-NeoX's head, the experts of a mixture in one tensor) is renamed and converted here by
    the same rules. Use as a context manager.

    `untied` tells that the config ties embeddings and head, while the files hold two different ones; as in
    transformers, the files win. Raises UserError for missing, truncated or pickled weights, missing or unknown
    tensors, and wrong shapes.
    """

    def __init__(self, path: Path, model: PreTrainedModel):
        gguf = find_gguf(path)
        self.files = [gguf] if gguf else weight_files(path)
        self._stack, self._model, self._stored = ExitStack(), model, {}
        self._expected = expected = model.state_dict()
        self._find_tensors(model, expected)
        self.untied = False
        for target, tied in model.all_tied_weights_keys.items():
            if target in self._stored and tied not in self._stored:
                self._stored[tied] = self._stored.pop(target)
            elif target in self._stored and torch.equal(self.read(target), self.read(tied)):
                del self._stored[target]
            elif target in self._stored:
                self.untied = True
        absent = [name for name in expected if name not in self._stored and name not in model.all_tied_weights_keys]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"{path}: the weights lack {absent[0]}{more}, which the config asks for")

    def _find_tensors(self, model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
        prefix, mapping = model.base_model_prefix, get_model_conversion_mapping(model)
        renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in mapping if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        handles: list[Any] = [
            GgufTensors(file, model)
            if file.suffix == ".gguf"
            else self._stack.enter_context(safe_open(file, framework="pt"))
            for file in self.files
        ]
        raws = [(raw, handle, file) for handle, file in zip(handles, self.files, strict=True) for raw in handle.keys()]  # noqa: SIM118
        for raw, handle, file in sorted(raws, key=lambda found: dot_natural_key(found[0])):
            (name, pattern), stored = rename_source_key(raw, renamings, converters), raw
            if name not in expected and f"{prefix}.{name}" in expected:
                name, stored = f"{prefix}.{name}", f"{prefix}.{raw}"
            elif name not in expected and raw in expected:  # converted already
                name, pattern = raw, None
            if name not in expected:
                if _is_buffer(raw):
                    continue
                raise UserError(
                    f"{file}: tensor {raw} is not one of a {model.config.model_type} model of this config; if it is "
                    "not needed, load the model in transformers and save_pretrained it, which drops it"
                )
            kind = handle.get_slice(raw).get_dtype()
            if kind not in DTYPES:
                raise UserError(f"{file}: {raw} has type {kind}; convert the model to {', '.join(DTYPES)} first")
            shape = list(handle.get_slice(raw).get_shape())
            if pattern is None and shape != list(expected[name].shape):
                raise UserError(f"{file}: {raw} has shape {shape}; the config says {list(expected[name].shape)}")
            converter = by_pattern[pattern] if pattern is not None else None
            stored = name if converter else stored
            self._stored.setdefault(name, _Stored(stored, converter, [])).pieces.append((handle, raw, pattern))

    def __enter__(self) -> SourceWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """All tensors, in the model's order; of tied ones the first."""
        return [name for name in self._expected if name in self._stored]

    def stored_name(self, name: str) -> str:
        """The name on disk, which transformers renames on loading for some architectures (GPT-NeoX: embed_out)."""
        return self._stored[name].name

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self._model.config

    def is_transposed(self, path: str) -> bool:
        """Whether the linear module at `path` keeps its weight as [in, out] (GPT-2's Conv1D)."""
        return not isinstance(self._model.get_submodule(path), torch.nn.Linear)

    def shape(self, name: str) -> list[int]:
        return list(self._expected[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        handle, raw, _ = self._stored[name].pieces[0]
        return DTYPES[handle.get_slice(raw).get_dtype()]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`; of tied ones, any. Raises UserError where its parts do not make it up."""
        if name not in self._stored:
            name = self._model.all_tied_weights_keys[name]
        stored = self._stored[name]
        if stored.converter is None:
            handle, raw, _ = stored.pieces[0]
            return handle.get_tensor(raw)
        converter = copy.deepcopy(stored.converter)
        for handle, raw, pattern in stored.pieces:
            converter.add_tensor(name, raw, cast(str, pattern), cast(Any, handle.get_tensor(raw)))
        made: Any = converter.convert(name, model=self._model, config=self._model.config)[name]
        tensor = made[0] if isinstance(made, list) else made
        if list(tensor.shape) != self.shape(name):
            raise UserError(
                f"{stored.pieces[0][1]}, ...: make a tensor of shape {list(tensor.shape)}, not {self.shape(name)}"
            )
        return tensor


@contextmanager
def hashing(files: list[Path]) -> Iterator[dict[str, str]]:
    """sha256 of every file by its name, computed beside the block: they are there once it has ended.

    Raises UserError, after the block, for a file that cannot be read.
    """
    result: dict[str, str] = {}
    given_up = threading.Event()
    failed: list[OSError] = []

    def work() -> None:
        try:
            hash_all()
        except OSError as error:
            failed.append(error)

    def hash_all() -> None:
        buffer = memoryview(bytearray(1 << 20))
        for file in files:
            digest = hashlib.sha256()
            with open(file, "rb", buffering=0) as stream:
                while (size := stream.readinto(buffer)) and not given_up.is_set():
                    digest.update(buffer[:size])
            result[file.name] = digest.hexdigest()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield result
    except BaseException:
        given_up.set()
        raise
    finally:
        thread.join()
    if failed:
        raise UserError(f"{failed[0].filename or 'the source'} cannot be read: {failed[0].strerror}")


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _is_buffer(name: str) -> bool:
    """Tables that older transformers stored and newer ones compute."""
    return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", "masked_bias"))
