"""A source checkpoint: found, checked, and read tensor by tensor from memory-mapped safetensors."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARRIED = (  # what travels from the source to the output beside the weights
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def find_source(source: str, revision: str | None) -> Path:
    """The local directory of `source`, a directory or a hub id. Raises UserError where there is neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub sources; {source} is a local directory")
        return path
    if path.exists():
        raise UserError(f"{source} is a file; give the directory of a checkpoint, or a hub id")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", *CARRIED]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: not found, gated, offline, no connection
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(f"{source}: no such directory, and the hub does not give it{at} ({reason})") from None


def read_config(path: Path) -> Any:
    """The transformers config of a source that can be converted. Raises UserError with the reason and the way out."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from .architectures import check_supported

    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is a PEFT adapter; merge it into its base model first (merge_and_unload), then convert"
        )
    fields = _config_fields(path)
    model_type = fields["model_type"]
    if model_type == "recurrent_depth":
        raise UserError(f"{path} is a recurrent-depth model already")
    if "quantization_config" in fields:
        raise UserError(f"{path} is quantised; convert the unquantised checkpoint, and quantise the result")
    if "text_config" in fields:
        raise UserError(f"{path} ({model_type}) is multimodal; save its text model on its own first, then convert that")
    if "auto_map" in fields and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{path} ({model_type}) needs remote code, which is not run; only transformers' own are converted"
        )
    check_supported(model_type)
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers' strict configs raise their own kinds
        raise UserError(f"{path / 'config.json'}: {str(error).strip().splitlines()[0]}") from None


def read_recurrent_config(path: Path) -> Any:
    """The config of a recurrent-depth checkpoint. Raises UserError for anything else."""
    from ..model import RecurrentDepthConfig

    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a recurrent-depth checkpoint")
    kind = _config_fields(path).get("model_type")
    if kind != "recurrent_depth":
        raise UserError(f"{path}: model_type is {kind!r}, not 'recurrent_depth'; loopwise convert makes one")
    return RecurrentDepthConfig.from_pretrained(path)


def _config_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path} has no config.json; give the directory of a transformers checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / 'config.json'}: not valid JSON ({error})") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError(f"{path / 'config.json'} has no model_type")
    return fields


def empty_model(config: Any) -> PreTrainedModel:
    """The transformers model of `config`; call it under `torch.device("meta")`."""
    return cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)


def copy_carried(path: Path, directory: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence."""
    for pattern in CARRIED:
        for file in sorted(path.glob(pattern)):
            if file.is_dir():  # chat templates may stand in a folder
                shutil.copytree(file, directory / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, directory / file.name)


class SourceWeights:
    """The tensors of a source by their names in the transformers model, read one at a time.

    `model` is the source model on the meta device: names and shapes are checked against it. Use as a context manager.
    Raises UserError for missing, truncated or pickled weights, missing or unknown tensors, and wrong shapes.
    """

    def __init__(self, path: Path, model: PreTrainedModel):
        self.files = _weight_files(path)
        self._stack, self._where, self._stored = ExitStack(), {}, {}
        expected, tied = model.state_dict(), set(model.all_tied_weights_keys)
        prefix, model_type = model.base_model_prefix, model.config.model_type  # old checkpoints leave the prefix out
        renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
        for file in self.files:
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None
            for raw in handle.keys():  # noqa: SIM118 (not a dict)
                name, stored = raw, raw
                for renaming in renamings:
                    name, _ = renaming.rename_source_key(name)
                if name not in expected:
                    name, stored = f"{prefix}.{name}", f"{prefix}.{raw}"
                if name in tied or _is_buffer(raw):
                    continue
                if name not in expected:
                    raise UserError(f"{file}: tensor {raw} is not one of a {model_type} model of this config")
                shape = list(handle.get_slice(raw).get_shape())
                if shape != list(expected[name].shape):
                    raise UserError(f"{file}: {raw} has shape {shape}; the config says {list(expected[name].shape)}")
                self._where[name] = (handle, raw)
                self._stored[name] = stored
        missing = [name for name in expected if name not in self._where and name not in tied]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{path}: tensor {missing[0]}{more} missing from the weights")

    def __enter__(self) -> SourceWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return list(self._where)

    def stored_name(self, name: str) -> str:
        """The name on disk, which transformers renames on loading for some architectures (GPT-NeoX: embed_out)."""
        return self._stored[name]

    def shape(self, name: str) -> list[int]:
        handle, raw = self._where[name]
        return list(handle.get_slice(raw).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        handle, raw = self._where[name]
        return _DTYPES[handle.get_slice(raw).get_dtype()]

    def read(self, name: str) -> torch.Tensor:
        handle, raw = self._where[name]
        return handle.get_tensor(raw)

    def hashes(self) -> dict[str, str]:
        """sha256 of every weight file."""
        result = {}
        for file in self.files:
            with open(file, "rb") as stream:
                result[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return result


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _is_buffer(name: str) -> bool:
    """Tables that older transformers stored and newer ones compute."""
    return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", "masked_bias"))


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise UserError(f"{path / INDEX}: not a safetensors index") from None
        files = [path / shard for shard in shards]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: missing, though {INDEX} names it")
        return files
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickled:
        raise UserError(
            f"{pickled[0]}: pickled weights can run code and are not read; load the model in transformers and "
            "save_pretrained it as safetensors"
        )
    raise UserError(f"{path} has a config but no weights ({WEIGHTS} or {INDEX})")
