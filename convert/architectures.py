"""Supported source architectures: the tests prove that their converted models equal their sources."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from ..errors import UserError
from ..model.source_layers import layer_list_name
from ..unroll import per_layer

SUPPORTED = """
arcee biogpt bloom codegen cohere cohere2 cwm doge ernie4_5 exaone4 falcon flex_olmo gemma gemma2 gemma3_text glm glm4
gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense jais2 llama
ministral ministral3 mistral mixtral mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma xglm
""".split()  # noqa: SIM905 (a table)


def check_supported(model_type: str) -> None:
    """Raise UserError, naming all that are supported, for another architecture."""
    if model_type not in SUPPORTED:
        raise UserError(f"architecture {model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """A name for the kind of every layer of the source `model`; only layers of one kind are tied.

    The kind is the attention type, the entries of the config's per-layer lists, and the shapes of the parameters
    (mixtures of experts often begin with dense layers).
    """
    config = model.config
    layers = list(model.get_submodule(layer_list_name(model, config.num_hidden_layers)).children())
    structures = [{(name, tensor.shape) for name, tensor in layer.state_dict().items()} for layer in layers]
    lists, kinds = per_layer(config), list[str]()
    for i, attention in enumerate(get_layer_types_and_kwargs(config)[0]):
        more = [f"{name}={value[i]}" for name, value in lists.items() if value[i] != attention]
        if structures[i] != structures[0]:
            more.append(f"parameters as layer {structures.index(structures[i])}")
        kinds.append(" ".join([attention, *more]))
    return kinds
