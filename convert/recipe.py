"""The keys of a convert recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..recipe import Count, Integer, Integers, Number, Section


class Layers(Section):
    """Explicit source-layer ids, counted from 0."""

    prelude: Integers = Field([], description="source layers that run once, first")
    core: Integers = Field([], description="source layers that recur")
    coda: Integers = Field([], description="source layers that run once, last")


class ConvertRecipe(Section):
    """How a source becomes a recurrent-depth model."""

    method: Literal["recursive", "retrofit"] = Field(
        "retrofit", description="recursive (arXiv 2410.20672) ties all layers; retrofit (2511.07384) recurs a core"
    )
    loops: Count | None = Field(
        None, description="recursive: number of loops B; it divides the number of source layers"
    )
    init: Literal["stepwise", "average", "lower"] = Field(
        "stepwise", description="recursive: tied layers start as evenly spaced, averaged, or the first source layers"
    )
    sizes: Integers | None = Field(None, description="retrofit: P,C,D, the numbers of prelude, core and coda layers")
    layers: Layers | None = Field(None, description="retrofit: explicit layers instead of sizes")
    injection: Literal["none", "add", "linear"] | None = Field(
        None, description="how the prelude's output enters each recurrence (default: retrofit linear, recursive none)"
    )
    state_init: Literal["input", "zeros", "normal"] | None = Field(
        None, description="initial state (default: input, but zeros with injection=add, so that R=1 is the source)"
    )
    state_std: Number = Field(0.0087, gt=0, description="scale of state_init=normal")
    num_recurrences: Count | None = Field(None, description="R at inference (default: recursive loops, retrofit 4)")
    max_recurrences: Count | None = Field(
        None, description="greatest R that can be served (default: num_recurrences, at least 8)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the weights (default: the source's)"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub source (default: main)")
    seed: Integer = Field(0, ge=0, lt=2**63, description="of the normal initial state and of the tokens used to verify")

    @model_validator(mode="after")
    def _consistent(self) -> ConvertRecipe:
        if self.method == "recursive":
            if self.loops is None:
                raise ValueError("method=recursive needs loops=B, the number of times that the tied layers run")
            for key in ("sizes", "layers"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to method=retrofit; method=recursive takes loops and init")
        else:
            for key in ("loops", "init"):
                if key in self.model_fields_set and getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to method=recursive; method=retrofit takes sizes or layers")
            if (self.sizes is None) == (self.layers is None):
                raise ValueError("method=retrofit needs either sizes=P,C,D or layers.prelude, layers.core, layers.coda")
            if self.sizes is not None and (len(self.sizes) != 3 or min(self.sizes) < 0 or self.sizes[1] == 0):
                raise ValueError(f"sizes={self.sizes}: three counts P,C,D, none negative, with at least one core layer")
        return self
