"""Configuration of the sandwich architecture."""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig


class SandwichConfig(LlamaConfig):
    r"""
    A Llama whose layers also have a norm after attention and after the MLP. transformers lacks this source
    architecture of Huginn (arXiv 2502.05171) and Ouro (arXiv 2510.25741).

    Args:
        norm_after_residual (`bool`): True puts those norms after the residual addition (Huginn), False before it
            (Ouro).
        qk_bias (`bool`): a bias on queries and keys.
        embedding_scale (`float`): factor on the embedded tokens.
    """

    model_type = "sandwich"

    norm_after_residual: bool = False
    qk_bias: bool = False
    embedding_scale: float = 1.0


AutoConfig.register("sandwich", SandwichConfig, exist_ok=True)  # pyright: ignore[reportUnknownMemberType]
