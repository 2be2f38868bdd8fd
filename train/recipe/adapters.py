"""The section `adapters`: LoRA adapters."""

from __future__ import annotations

from pydantic import Field

from loopwise.recipe import Count, Number, Section

from .fields import Names


class Adapters(Section):
    """PEFT's LoRA adapters: trained instead of the model's own weights, and merged into them at the end."""

    rank: Count = Field(default=8, description="rank of the adapters")
    alpha: Number | None = Field(
        default=None, gt=0, description="the scale of the adapters is alpha / rank (default: alpha = rank)"
    )
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: Names | None = Field(
        default=None, min_length=1, description="names of linear modules (default: all linear modules of the layers)"
    )
