"""Whether a directory holds a recurrent-depth checkpoint that can be served, told before an engine starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import check_same_for_vllm, config_fields, read_json, weight_files
from ..errors import UserError, reason
from .api.architectures import vllm_architecture
from .api.limits import check_model

WANTED = "MODEL is a directory written by `loopwise convert` or `loopwise train`"
KINDS: dict[str, type | tuple] = {  # of config.json's fields; (kind, None): null, too
    "source_config": dict,
    "prelude": list,
    "core": list,
    "coda": list,
    "num_recurrences": int,
    "max_recurrences": int,
    "state_init": str,
    "state_std": float,
    "state_seed": int,
    "injection": str,
    "sharing": str,
    "recurrence_norm": str,
    "recurrence_residual": bool,
    "recurrence_encoding": str,
    "halting": str,
    "halting_epsilon": float,
    "exit_gate": bool,
    "relaxation": (dict, None),
    "router": (dict, None),
    "kv_policy": str,
    "exit": (dict, None),
    "trained_recurrences": (dict, None),
    "quantization_config": (dict, None),
}
EXIT_KINDS: dict[str, type | tuple] = {"rule": str, "threshold": (float, None), "min_recurrences": int}
SIZES = (  # of the source; not every architecture has all of them
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
SAID = {
    dict: "an object", list: "a list of integers", int: "an integer", float: "a number", str: "a string",
    bool: "true or false", None: "null",
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # one of them is there, if a tokenizer is


@dataclass
class Facts:
    """What a checkpoint's config says about serving it."""

    architecture: str
    num_recurrences: int
    max_recurrences: int
    kv_policy: str
    exit: dict[str, Any]
    exit_gate: bool
    sharing: str
    injection: str = "none"
    router: dict[str, Any] | None = None
    coda: list[int] | None = None
    trained_recurrences: dict[str, Any] | None = None
    quantization: str | None = None


def read_fields(model: str | Path) -> dict[str, Any]:
    """The fields of config.json in checkpoint directory `model`, each of its kind. Imports nothing heavy, so that
    mistakes show at once.

    Raises UserError, naming file and field, for no directory, no config, another kind of model, and wrong values.
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
    _check_kinds(f"{file}: ", fields, KINDS)
    _check_kinds(f"{file}: exit.", fields.get("exit") or {}, EXIT_KINDS)
    source = fields["source_config"]
    if not isinstance(source.get("model_type"), str):
        raise UserError(f"{file}: source_config.model_type={source.get('model_type')!r}: a string")
    for name in SIZES:
        value = source.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{file}: source_config.{name}={value!r}: an integer of 1 or more")
    return fields


def _check_kinds(where: str, fields: dict[str, Any], kinds: dict[str, type | tuple]) -> None:
    """Raises UserError for the first of `fields` that is not of its kind; its name follows upon `where`."""
    for name, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if name in fields and not any(_is_a(fields[name], one) for one in allowed):
            raise UserError(f"{where}{name}={fields[name]!r}: {' or '.join(SAID[one] for one in allowed)}")


def _is_a(value: Any, kind: type | None) -> bool:
    if kind is None or kind is float:
        return value is None if kind is None else type(value) in (int, float)
    return type(value) is kind and (kind is not list or all(type(part) is int for part in value))


def check_config(model: str) -> Facts:
    """What the config of checkpoint directory `model` says about serving it. Imports nothing heavy.

    Raises UserError as `read_fields` does, and for an architecture without vLLM layers.
    """
    config = read_fields(model)
    source = config["source_config"]
    vllm_architecture(source["model_type"])
    check_model(config, routed=True)
    depth = config.get("num_recurrences", 1)
    return Facts(
        architecture=source["model_type"],
        num_recurrences=depth,
        max_recurrences=config.get("max_recurrences") or max(8, depth),
        kv_policy=config.get("kv_policy", "per-depth"),
        exit=config.get("exit") or {},
        exit_gate=config.get("exit_gate", False),
        sharing=config.get("sharing", "cycle"),
        injection=config.get("injection", "none"),
        router=_router(Path(model) / "config.json", config.get("router"), depth),
        coda=config.get("coda"),
        trained_recurrences=config.get("trained_recurrences"),
        quantization=(config.get("quantization_config") or {}).get("quant_method"),
    )


def _router(file: Path, given: dict[str, Any] | None, depths: int) -> dict[str, Any] | None:
    from ..model.configuration_router import router_fields

    try:
        return router_fields({"depths": depths, **given}) if given else None
    except (TypeError, ValueError) as error:  # TypeError: numbers that are none
        raise UserError(f"{file}: {'router: ' if isinstance(error, TypeError) else ''}{error}") from None


def check_tensors(model: str | Path) -> None:
    """Raises UserError, naming file and tensor, unless a model can be built from the config of checkpoint `model`, and
    its safetensors files are whole and hold that model's tensors in their shapes, no others. Reads no weights."""
    from safetensors import safe_open

    from ..model import RecurrentDepthConfig
    from .completeness import Completeness

    folder = Path(model)
    files = weight_files(folder)
    check_same_for_vllm(folder, files)
    try:
        completeness = Completeness(RecurrentDepthConfig.from_pretrained(folder))
    except Exception as error:  # transformers and torch share no base class for what they find wrong with a config
        raise UserError(
            f"{folder / 'config.json'}: no recurrent-depth model can be built from it ({reason(error)})"
        ) from None
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                try:
                    completeness.see(name, tensors.get_slice(name).get_shape())
                except ValueError as error:
                    raise UserError(f"{file}: {error}") from None
    try:
        completeness.check()
    except ValueError as error:
        raise UserError(f"{model}: {error}") from None


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of checkpoint directory `model`; None if it brings none. Raises UserError, naming the file, for one
    that cannot be loaded."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

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
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers of transformers share no base class for what they find wrong with files
        raise UserError(f"{where}: cannot be loaded ({reason(error)})") from None
