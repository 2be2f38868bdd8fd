"""A checkpoint directory to serve: its config, tensors and tokenizer, checked before an engine starts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint import check_same_for_vllm, config_fields, read_json, weight_files
from ..errors import UserError, reason
from .api.architectures import vllm_architecture
from .api.limits import check_model

WANTED = "MODEL is a directory written by `loopwise convert` or `loopwise train`"
SIZES = (  # fields of the source's config; not every architecture has all
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # a tokenizer has one of them


@dataclass
class Facts:
    """The fields of a checkpoint's config that serving depends on; those after the first are the config's own."""

    architecture: str
    num_recurrences: int
    max_recurrences: int
    kv_policy: str
    exit: dict[str, Any]
    exit_gate: bool
    sharing: str
    injection: str = "none"
    time_conditioning: dict[str, Any] | None = None
    router: dict[str, Any] | None = None
    coda: list[int] | None = None
    trained_recurrences: dict[str, Any] | None = None
    quantization: str | None = None


def read_fields(model: str | Path) -> dict[str, Any]:
    """The fields of config.json in checkpoint directory `model`, each of the kind that the configuration declares.

    Raises UserError, naming file and field, for no directory, no config, another kind of model, and wrong values. The
    first three are found without the import of transformers, so that these mistakes show at once.
    """
    folder = Path(model)
    if folder.suffix == ".gguf" and folder.is_file():
        raise UserError(f"{model}: a GGUF file; turn it into a recurrent-depth model with `loopwise convert`")
    if not folder.is_dir():
        raise UserError(f"{model}: no such directory; {WANTED}")
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        raise UserError(f"{files[0]}: a GGUF file; turn it into a recurrent-depth model with `loopwise convert`")
    fields = config_fields(folder)
    kind = fields["model_type"]
    if kind != "recurrent_depth":
        raise UserError(
            f"{model}: model_type is {kind!r}, not 'recurrent_depth'; turn it into one with `loopwise convert`"
        )
    file = folder / "config.json"
    if "source_config" not in fields:
        raise UserError(f"{file} has no source_config")
    _check_kinds(file, fields)
    source = fields["source_config"]
    if not isinstance(source.get("model_type"), str):
        raise UserError(f"{file}: source_config.model_type={source.get('model_type')!r}: a string")
    for name in SIZES:
        value = source.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{file}: source_config.{name}={value!r}: an integer of 1 or more")
    return fields


def _check_kinds(file: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for the first of `fields`, of config.json in `file`, that is not of its kind."""
    from ..model import RecurrentDepthConfig
    from ..model.configuration_fields import EXIT_FIELDS, check_fields

    for name, empty in (("source_config", False), ("quantization_config", True)):
        value = fields.get(name)
        if not (isinstance(value, dict) or (empty and value is None)):
            raise UserError(f"{file}: {name}={value!r}: an object{' or null' if empty else ''}")
    try:
        check_fields(fields, RecurrentDepthConfig.__annotations__)
        exit = {f"exit.{name}": value for name, value in (fields.get("exit") or {}).items()}
        check_fields(exit, {f"exit.{name}": kind for name, kind in EXIT_FIELDS.items()})
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def check_config(model: str) -> Facts:
    """The facts about serving in the config of checkpoint directory `model`.

    Raises UserError as `read_fields` does, and for an architecture without vLLM layers.
    """
    given = read_fields(model)
    from ..model import RecurrentDepthConfig
    from ..model.configuration_recurrent_depth import default_max_recurrences

    architecture = given["source_config"]["model_type"]
    vllm_architecture(architecture)
    check_model(given, routed=True)
    names = {field.name for field in fields(Facts)} & set(RecurrentDepthConfig.__annotations__)
    values: dict[str, Any] = {name: given.get(name, getattr(RecurrentDepthConfig, name, None)) for name in names}
    router = _router(Path(model) / "config.json", values["router"], values["num_recurrences"])
    values |= {"router": router, "exit": values["exit"] or {}}
    values["max_recurrences"] = values["max_recurrences"] or default_max_recurrences(values["num_recurrences"], router)
    quantization = (given.get("quantization_config") or {}).get("quant_method")
    return Facts(architecture=architecture, quantization=quantization, **values)


def facts_of(config: Any) -> Facts:
    """The facts about serving in a RecurrentDepthConfig. The method of quantised weights is vLLM's to find."""
    names = {field.name for field in fields(Facts)} & vars(config).keys()
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    values["exit"] = values["exit"] or {}
    return Facts(architecture=config.source_config.model_type, **values)


def _router(file: Path, given: dict[str, Any] | None, depths: int) -> dict[str, Any] | None:
    """All fields of the router that the config in `file` gives. Raises UserError for wrong ones."""
    from ..model.configuration_router import router_fields

    try:
        return router_fields({"depths": depths, **given}) if given else None
    except (TypeError, ValueError) as error:  # TypeError: of values that are no numbers
        raise UserError(f"{file}: {'router: ' if isinstance(error, TypeError) else ''}{error}") from None


def check_tensors(model: str | Path) -> None:
    """Compare the safetensors files of checkpoint directory `model` with the model of its config. Reads no weights.

    Raises UserError, naming file and tensor, for a config that no model can be built from, truncated files, and tensors
    that are missing, unexpected or of another shape.
    """
    from safetensors import safe_open

    from ..load import read_config
    from .completeness import Completeness

    folder = Path(model)
    files = weight_files(folder)
    check_same_for_vllm(folder, files)
    try:
        completeness = Completeness(read_config(folder))
    except Exception as error:  # the errors of transformers and torch about a config share no base class
        raise UserError(
            f"{folder / 'config.json'}: no recurrent-depth model can be built from it ({reason(error)})"
        ) from None
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                try:
                    completeness.count(name, tensors.get_slice(name).get_shape())
                except ValueError as error:
                    raise UserError(f"{file}: {error}") from None
    try:
        completeness.check_complete()
    except ValueError as error:
        raise UserError(f"{model}: {error}") from None


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of checkpoint directory `model`; None without one.

    Raises UserError, naming the file, for one that cannot be loaded.
    """
    from tokenizers import Tokenizer

    from ..load import read_tokenizer

    folder = Path(model)
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        return None
    for name in TOKENIZER:
        if (folder / name).is_file():
            read_json(folder / name)
    file = folder / TOKENIZER[0]
    where = str(file)
    try:
        if file.is_file():
            Tokenizer.from_file(where)
        where = f"{folder}: its tokenizer"
        return read_tokenizer(folder, trust=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # the errors of transformers' tokenizers share no base class
        raise UserError(f"{where}: cannot be loaded ({reason(error)})") from None
