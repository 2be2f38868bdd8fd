"""Configuration of the sandwich architecture."""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig


class SandwichConfig(LlamaConfig):
    r"""
    A Llama whose layers have a norm after attention and MLP too: the source architecture of Huginn (arXiv 2502.05171)
    and Ouro (arXiv 2510.25741), which transformers lacks.

    Args:
        norm_after_residual (`bool`): whether those norms stand after the residual addition (Huginn), or before (Ouro).
        qk_bias (`bool`): whether queries and keys have a bias.
        embedding_scale (`float`): factor on the embedded tokens.
    """

    model_type = "sandwich"

    norm_after_residual: bool = False
    qk_bias: bool = False
    embedding_scale: float = 1.0


AutoConfig.register("sandwich", SandwichConfig, exist_ok=True)
