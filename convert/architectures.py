"""Which source architectures are supported: those whose converted model is proven equal to its source by the tests."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from ..errors import UserError

SUPPORTED = """
arcee bloom cohere2 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text glm4 gpt2 gpt_neo gpt_neox gptj granite helium
llama ministral3 mistral mpt nemotron olmo2 olmo3 opt phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2
""".split()  # noqa: SIM905 (a table)


def check_supported(model_type: str) -> None:
    """Raise UserError, listing what is supported, for an architecture that is not."""
    if model_type not in SUPPORTED:
        raise UserError(f"architecture {model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")


def attention_types(source_config: Any) -> list[str]:
    """The attention type of every source layer: layers of different types are never tied."""
    return get_layer_types_and_kwargs(source_config)[0]
