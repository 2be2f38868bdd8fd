"""Models and tokenizers from and to directories, with one clear line for what cannot be loaded."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from loopwise.checkpoint import config_fields, weight_files
from loopwise.errors import UserError, reason
from loopwise.gguf_source import find_gguf
from loopwise.model import RecurrentDepthConfig


def load_config(model: str, revision: str | None) -> Any:
    """The config of `model`, a directory or a hub id. Raises UserError where it is neither, or holds no weights."""
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub models; {model} is a local directory")
        config_fields(path)
        if find_gguf(path) is None:
            weight_files(path)
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{model}: no such model directory")
    with _told(model):
        config = AutoConfig.from_pretrained(model, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{model}: its weights are quantised and cannot be trained; start from the unquantised model")
    return config


def load_tokenizer(model: str, revision: str | None) -> Any:
    with _told(model):
        return AutoTokenizer.from_pretrained(model, revision=revision)


def load_model(model: str, revision: str | None = None) -> PreTrainedModel:
    """The causal language model in float32. Raises UserError for damaged or missing weights: none is left random."""
    gguf = find_gguf(Path(model))
    with _told(model):
        kind: dict[str, Any] = {"use_safetensors": True}
        if gguf:
            kind = {"gguf_file": gguf.name, "config": AutoConfig.from_pretrained(model)}
        result: Any = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=torch.float32, output_loading_info=True, **kind
        )
    loaded, info = result
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{model}: no weights for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    return loaded


def is_recurrent(config: Any) -> bool:
    return isinstance(config, RecurrentDepthConfig)


@contextmanager
def _told(model: str):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, the hub and safetensors share no base class
        raise UserError(f"{model}: cannot be loaded ({reason(error).rstrip('.')})") from error


def write_model(
    model: PreTrainedModel, tokenizer: Any, directory: Path, state: dict[str, torch.Tensor], dtype: str = "float32"
) -> None:
    """What loads and serves: weights (`state`, of `dtype`), config, generation config, tokenizer, chat template, remote
    code."""
    model.save_pretrained(directory, state_dict=state)
    tokenizer.save_pretrained(directory)
    config = directory / "config.json"  # which names the type of the model's own weights
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": dtype}, indent=2, sort_keys=True) + "\n")


def cast(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """`state` in another type; what is shared stays shared, and what are no numbers of that kind stay as they are."""
    made: dict[int, torch.Tensor] = {}
    for x in state.values():
        if id(x) not in made:
            made[id(x)] = x.to(getattr(torch, dtype)) if x.is_floating_point() else x
    return {name: made[id(x)] for name, x in state.items()}


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())
