"""Configs, tokenizers and models from a directory or the hub: the one place that loads them, for all commands.

Nothing of a model is run: no Python file, no kernel of the hub, no pickle. The only way round is
`loopwise serve MODEL -- --trust-remote-code`.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from .carried import SETTINGS, check_tokenizer_inside, refuse_code
from .checkpoint import ADAPTER, adapter_error, config_fields, read_json, weight_files
from .config_limits import check_layers_stored, check_values
from .errors import UserError, reason, shorten
from .find_source import SHORT, find_source, named, snapshot
from .input_files import check_entries

VOCABULARY, MOST_IDS = "tokenizer.json", 2**24
# Files whose auto_map names code. That of a recurrent-depth config.json names Loopwise's own, which is installed.
MAPPED = (SETTINGS, "processor_config.json", "preprocessor_config.json", "config.json")


def read_config(model: str | Path, revision: str | None = None) -> Any:
    """The transformers config of `model`, a directory or a hub id, which is downloaded.

    Raises UserError as `config_fields` does, and for a model that needs code of its own; errors of transformers and the
    hub for a hub id that they cannot read.
    """
    from transformers import AutoConfig

    from . import model as _registered  # noqa: F401  its config's class
    from .model import RecurrentDepthConfig

    local = Path(model).is_dir()
    fields = config_fields(Path(model)) if local else _hub_fields(str(model), revision)
    kind = fields.get("model_type")
    check_needs_no_code(fields, str(model))
    options: dict[str, Any] = {"revision": revision}
    try:
        if kind == RecurrentDepthConfig.model_type:
            return _without_code(RecurrentDepthConfig.from_pretrained(model, **options))
        return _without_code(AutoConfig.from_pretrained(model, trust_remote_code=False, **options))
    except Exception as error:  # the errors of configs about their fields share no base class
        if not local:
            raise
        raise UserError(
            f"{Path(model) / 'config.json'}: no {kind} config can be made of it ({reason(error)})"
        ) from None


def check_needs_no_code(fields: dict[str, Any], model: str) -> None:
    """Raises UserError if the config.json `fields` of `model` names code, and transformers has no such model."""
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type")
    if "auto_map" in fields and kind not in CONFIG_MAPPING:
        raise UserError(f"{model} ({kind}) needs remote code, which is not run; only transformers' own models are read")


def read_any_config(path: Path) -> Any:
    """The config in the directory `path`, of a type that transformers may lack, or none: it chooses a tokenizer."""
    from transformers import PreTrainedConfig

    try:
        return read_config(path)
    except (ValueError, OSError):
        return PreTrainedConfig.from_pretrained(path)


def read_tokenizer(model: str | Path, revision: str | None = None, trust: bool = False, **options: Any) -> Any:
    """The tokenizer of `model`, a directory or a hub id, as transformers chooses its class.

    trust: run its code.   options: of `AutoTokenizer.from_pretrained`. Raises UserError for a tokenizer with code of
    its own and for files that are not regular; errors of transformers and the hub for one that they cannot read.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path = Path(model)
    if path.is_dir():
        check_entries(path)
        check_tokenizer_inside(path)
        if (path / SETTINGS).is_file():
            read_json(path / SETTINGS)
        if (path / VOCABULARY).is_file():
            _check_ids(path / VOCABULARY)
    if not trust:
        refuse_code(get_tokenizer_config(str(model), revision=revision), path)
    return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust, **options)


def _check_ids(file: Path) -> None:
    """Raises UserError for an id in tokenizer.json, `file`, beyond all vocabularies: tokenizers reserve as many."""
    fields = read_json(file)
    model, added = fields.get("model"), fields.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens = {**vocabulary} if isinstance(vocabulary, dict) else {}
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            tokens[str(token.get("content"))] = token.get("id")
    if wrong := next((token for token, id in tokens.items() if isinstance(id, int) and id >= MOST_IDS), None):
        raise UserError(f"{file}: {shorten(repr(wrong), 80)} has the id {tokens[wrong]}; ids are below {MOST_IDS}")


def read_model(model: str | Path, revision: str | None = None, **options: Any) -> Any:
    """The causal language model `model`, a directory or a hub id, from safetensors.

    options: of `AutoModelForCausalLM.from_pretrained`. Raises as `read_config` does, and UserError for weights that are
    missing, truncated or pickled, or much fewer than the config describes; and for quantized ones, for some of which
    transformers would fetch a kernel of the hub, and run it.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(model, revision)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{model}: its weights are quantized, which only convert and serve read")
    path, on_hub = (Path(model), None) if Path(model).is_dir() else find_source(str(model), revision)
    if on_hub:
        on_hub.fetch()
    with named(str(model), path):
        files = weight_files(path)
        if config.model_type != "recurrent_depth":
            check_layers_stored(config_fields(path), path, files)
        _check_size(config, path, files)
    made = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, use_safetensors=True, **options)
    found = (made[0] if isinstance(made, tuple) else made).config
    found.name_or_path = str(model)
    _without_code(found)
    return made


def _check_size(config: Any, path: Path, files: list[Path]) -> None:
    """Raises UserError if the model of `config` has over twice as many parameters as its weights in `files`.

    transformers would make the others at random, of any size, before it names them.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        described = sum(x.numel() for x in AutoModelForCausalLM.from_config(config).parameters())
    stored = 0
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            stored += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if described > 2 * stored:
        raise UserError(f"{path}: config.json describes {described:,} parameters, and the weights have {stored:,}")


def code_of(path: Path) -> list[str]:
    """The Python files that run if the code of the checkpoint `path` is trusted, those of the hub by their repository.

    Files that these import count, too.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: dict[str, None] = {}
    for name in MAPPED:
        fields = read_json(path / name) if (path / name).is_file() else {}
        own = name == "config.json" and fields.get("model_type") == "recurrent_depth"  # the installed classes are used
        if own or not isinstance(fields.get("auto_map"), dict | list):
            continue
        code = fields["auto_map"]
        named = list(code.values()) if isinstance(code, dict) else code
        for reference in itertools.chain(*(each if isinstance(each, list) else [each] for each in named)):
            if not isinstance(reference, str):
                continue
            repository, _, place = reference.rpartition("--")
            file = path / f"{place.partition('.')[0]}.py"
            if repository:
                found[f"{file.name} of the hub's {repository}"] = None
                continue
            found[str(file)] = None
            if file.is_file():
                found |= dict.fromkeys(map(str, get_relative_import_files(file)))
    return list(found)


def _without_code(config: Any) -> Any:
    """`config` without the names of code in it, so that no output carries them on; saving adds Loopwise's own."""
    for part in filter(None, (config, vars(config).get("source_config"))):
        vars(part).pop("auto_map", None)
    return config


def _hub_fields(model: str, revision: str | None) -> dict[str, Any]:
    """config.json of the hub's `model`. Raises UserError for kernels of the hub, and for an adapter beside it.

    One listing of the files is asked for: transformers asks for each file, many times over where there is no network.
    """
    path = snapshot(model, revision, SHORT)
    if (path / ADAPTER).exists():
        raise adapter_error(model)
    fields = read_json(path / "config.json", f"{model}: the hub has it, but no config.json")
    check_values(fields, f"{model}: config.json")
    return fields
