"""The config of a source or of a recurrent-depth checkpoint, read and checked, and the empty model of a config."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .. import load
from ..checkpoint import config_fields, weight_files
from ..config_limits import check_layers_stored
from ..errors import UserError, reason
from ..gguf_source import find_gguf
from ..model import RecurrentDepthConfig
from ..unroll import config_with_layers
from .architectures import CANNOT, NOT_YET, check_fields, check_supported
from .text_model import is_multimodal, text_config, whole_model


@dataclass
class Source:
    """A source's config and what is around it.

    config: of the decoder that is converted.   whole: the multimodal model around it, on the meta device; None for a
    plain source.
    """

    config: PreTrainedConfig
    whole: PreTrainedModel | None


def read_source(path: Path) -> Source:
    """The configs of a source in the directory `path` that can be converted. Raises UserError for any other."""
    fields = config_fields(path)
    model_type = fields["model_type"]
    if model_type == "recurrent_depth":
        raise UserError(f"{path} is a recurrent-depth model already")
    load.check_needs_no_code(fields, str(path))
    if model_type not in CONFIG_MAPPING or model_type in NOT_YET or model_type in CANNOT:
        check_supported(model_type)
    try:
        config = load.read_config(path)
        whole = whole_model(config) if is_multimodal(config) else None
        source = Source(text_config(whole) if whole else config, whole)
        check_supported(source.config.model_type)
        check_fields(source.config, path)
        if source.config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers={source.config.num_hidden_layers}")
        check_layers_stored(fields, path, _stored(path))
        with torch.device("meta"):
            empty_model(source.config)
    except UserError:
        raise
    except Exception as error:  # transformers and torch share no base class for errors in a config
        raise UserError(
            f"{path / 'config.json'}: no {model_type} model can be built from it ({reason(error)})"
        ) from None
    return source


def _stored(path: Path) -> list[Path]:
    """The weight files of the directory `path`; none where they are not all there, as for a hub's before it is read."""
    with suppress(UserError):
        return weight_files(path)
    return []


def read_recurrent_config(path: Path) -> RecurrentDepthConfig:
    """The config of the recurrent-depth checkpoint in the directory `path`. Raises UserError for anything else."""
    if (file := find_gguf(path) if path.exists() else None) and not (path / "config.json").exists():
        raise UserError(f"{file}: a GGUF file; turn it into a recurrent-depth model with `loopwise convert`")
    if not path.is_dir():
        found = "a file" if path.exists() else "no such directory"
        raise UserError(f"{path}: {found}; give the directory of a recurrent-depth checkpoint")
    kind = config_fields(path).get("model_type")
    if kind != "recurrent_depth":
        raise UserError(f"{path}: model_type is {kind!r}, not 'recurrent_depth'; loopwise convert makes one")
    return load.read_config(path)


def written_out(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """The config of a plain model whose layers are those of `config` by these ids, in this order. Raises UserError,
    naming the field, where the architecture has no such model."""
    try:
        return config_with_layers(config, layers)
    except ValueError as error:
        raise UserError(f"this order of {config.model_type} layers cannot be written out ({error})") from None


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The transformers causal language model of `config`, with attention that computes its architecture.

    Call it under `torch.device("meta")` for a model without memory.
    """
    if getattr(config, "attn_logit_softcapping", None):
        # transformers' sdpa leaves the cap on attention scores out.
        config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    return cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)
