"""Models and tokenizers: loading and saving, with an error of one line for those that cannot be loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loopwise.checkpoint import config_fields, weight_files
from loopwise.errors import UserError, reason
from loopwise.gguf_source import find_gguf
from loopwise.gguf_tensors import GgufTensors
from loopwise.hub import check_may_be_hub_id, not_found
from loopwise.load import read_config, read_model, read_tokenizer
from loopwise.model import RecurrentDepthConfig
from loopwise.model.configuration_source import clear_source_settings


def load_config(model: str, revision: str | None) -> Any:
    """The config of `model`, a directory or a hub id.

    revision: of the hub id. Raises UserError for an unknown model, for a directory without weights, and for quantized
    weights. Downloads the config of a hub model.
    """
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub models; {model} is a local directory")
        config_fields(path)
        if find_gguf(path) is None:
            weight_files(path)
    check_may_be_hub_id(model)
    with _one_line_errors(model, revision):
        config = read_config(model, revision)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{model}: its weights are quantized and cannot be trained; start from the unquantized model")
    return config


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, a directory or a hub id, with its chat template.

    revision: of the hub id. Remote code is never run. Reads only local files for a directory; downloads the tokenizer
    files of a hub model into the hub's cache. Raises UserError for an unknown model, for files that cannot be loaded,
    and for a tokenizer with code of its own (`auto_map`).
    """
    with _one_line_errors(model, revision):
        return read_tokenizer(model, revision)


def load_model(model: str, revision: str | None = None) -> PreTrainedModel:
    """The causal language model `model` (directory, GGUF file or hub id) in float32, on the CPU.

    revision: of the hub id. Downloads a hub model. Raises UserError for damaged or missing weights, so that no weight
    is left at its random initial value.
    """
    file = find_gguf(Path(model))
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    with _one_line_errors(model, revision):
        if file:
            config = read_config(model)
            with torch.device("meta"):
                empty: Any = AutoModelForCausalLM.from_config(config)
            tensors = GgufTensors(file, empty)
            values = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            result: Any = type(empty).from_pretrained(None, config=config, state_dict=values, **options)
        else:
            result = read_model(model, revision, **options)
    loaded, info = result
    if not is_recurrent(loaded.config):
        # output_router_logits stays: a plain mixture of experts can run with it, and another trainer may need it.
        clear_source_settings(loaded.config, collecting=("output_attentions", "output_hidden_states"))
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{model}: no weights for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    return loaded


def is_recurrent(config: Any) -> bool:
    """True for the config of a recurrent-depth model."""
    return isinstance(config, RecurrentDepthConfig)


@contextmanager
def _one_line_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn every error about `model` at `revision` into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, the hub and safetensors share no base class
        if not Path(model).exists():
            raise not_found(model, error, revision) from error
        raise UserError(f"{model}: cannot be loaded ({reason(error).rstrip('.')})") from error


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state: dict[str, torch.Tensor],
    dtype: str = "float32",
) -> None:
    """Write a complete checkpoint: weights (`state`, of `dtype`), configs, tokenizer, chat template, model code.

    The generation config keeps its loaded values. transformers refuses to save some that it loads, like a temperature
    without do_sample, and engines read them.
    """
    generation = model.generation_config
    try:
        if generation is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(directory, state_dict=state)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")
    tokenizer.save_pretrained(directory)
    config = directory / "config.json"  # save_pretrained wrote the dtype of `model`, not of `state`
    fields = {**json.loads(config.read_text(encoding="utf-8")), "dtype": dtype}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def smallest(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """The smallest tensor of `state`, in `dtype`, to write a checkpoint almost without weights."""
    name = min(state, key=lambda name: (state[name].numel(), name))
    return cast({name: state[name].detach().clone()}, dtype)


def overflow(state: dict[str, torch.Tensor], dtype: str) -> str | None:
    """A message with the first tensor of `state` that leaves the range of `dtype`, and its value; None if none does.

    Values that are not finite already do not count.
    """
    most = torch.finfo(getattr(torch, dtype)).max
    for name, x in state.items():
        if not x.is_floating_point() or not x.numel():
            continue
        low, high = (end.item() for end in x.detach().aminmax())
        worst = max(-low, high)
        if most < worst < math.inf and torch.tensor(worst, dtype=x.dtype).to(getattr(torch, dtype)).isinf():
            value = high if high == worst else low
            return f"{name} holds {value:g}, and {dtype} ends at {most:g}"
    return None


def cast(state: dict[str, torch.Tensor], dtype: str, kept: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """`state` with floating-point tensors in `dtype`, others unchanged. Tensors that are shared stay shared.

    kept: parts of names of tensors that stay as they are: transformers' `_keep_in_fp32_modules_strict`.
    """
    kept, made = [*kept], dict[int, torch.Tensor]()
    for name, x in state.items():
        if id(x) not in made:
            changed = x.is_floating_point() and not any(part in name for part in kept)
            made[id(x)] = x.to(getattr(torch, dtype)) if changed else x
    return {name: made[id(x)] for name, x in state.items()}


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters())
