"""Configuration of the ungated architecture."""

from __future__ import annotations

from dataclasses import field

from transformers import AutoConfig, LlamaConfig


class UngatedConfig(LlamaConfig):
    r"""
    A Llama whose MLP has no gate: down(act(up x)). transformers lacks this source architecture of Parcae
    (arXiv 2604.12946) and LoopFormer (arXiv 2602.11451).

    Args:
        learned_positions (`bool`): learned position embeddings are added to the tokens', in place of rotary positions.
        qk_norm (`bool`): queries and keys of each head are divided by their root mean square, without a weight.
        norm_weights (`bool`): the norms of the layers have weights; the final norm always has one.
        value_embeddings (`list[bool]`): for each layer, True if it adds embeddings of the tokens to its values, by a
            gate for each head. Empty: none does.
    """

    model_type = "ungated"

    learned_positions: bool = False
    qk_norm: bool = False
    norm_weights: bool = True
    value_embeddings: list[bool] = field(default_factory=list[bool])


AutoConfig.register("ungated", UngatedConfig, exist_ok=True)  # pyright: ignore[reportUnknownMemberType]
