"""Whether a directory holds a recurrent-depth checkpoint that can be served, told before an engine starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import config_fields, weight_files
from ..errors import UserError
from .vllm.architectures import vllm_architecture
from .vllm.limits import check_model, refuse

WANTED = "MODEL is a directory written by `loopwise convert` or `loopwise train`"


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


def check_config(model: str) -> Facts:
    """Read the config.json of checkpoint directory `model`. Imports nothing heavy, so that mistakes show at once.

    Raises UserError for no directory, no config, another kind of model, an architecture without vLLM layers, quantised
    weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"{model}: no such directory; {WANTED}")
    config = config_fields(folder)
    kind = config.get("model_type")
    if kind != "recurrent_depth":
        raise UserError(
            f"{model}: model_type is {kind!r}, not 'recurrent_depth'; turn it into one with `loopwise convert`"
        )
    source = config.get("source_config") or {}
    vllm_architecture(source.get("model_type"))
    check_model(config, routed=True)
    refuse({"quantization": (config.get("quantization_config") or {}).get("quant_method")})
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
        router=_router(config.get("router"), depth),
        coda=config.get("coda"),
    )


def _router(given: dict[str, Any] | None, depths: int) -> dict[str, Any] | None:
    from ..model.configuration_router import router_fields

    try:
        return router_fields({"depths": depths, **given}) if given else None
    except ValueError as error:
        raise UserError(str(error)) from None


def check_tensors(model: str) -> None:
    """Raises UserError unless the safetensors files of checkpoint `model` are whole and hold its tensors, no others."""
    from safetensors import safe_open

    from ..model import RecurrentDepthConfig
    from .vllm.weights import Completeness

    folder = Path(model)
    names = []
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    try:
        completeness = Completeness(RecurrentDepthConfig.from_pretrained(folder))
        for name in names:
            completeness.see(name)
        completeness.check()
    except ValueError as error:
        raise UserError(f"{model}: {error}") from None
