"""The section `optimiser`: trained roles, learning rates, weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from loopwise.recipe import Number, Section
from loopwise.unused import Unused

from .fields import Fraction, Pair, once

COOLDOWN = 0.2
Role = Literal[
    "embeddings", "head", "norms", "prelude", "core", "coda", "injection", "lora", "router", "gate", "adapters"
]
ROLES = get_args(Role)
Roles = Annotated[list[Role], AfterValidator(once)]


class Optimiser(Section):
    """The optimiser, the parameters it trains, and its learning-rate schedule."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="adamw; or muon for the matrices of layers and injection, and AdamW for the rest",
    )
    train: Roles | None = Field(
        default=None,
        min_length=1,
        description="roles of the trained parameters; all others are frozen (default: all): " + ", ".join(ROLES),
    )
    multipliers: dict[Role, Annotated[Number, Field(ge=0)]] | None = Field(
        default=None, description="learning-rate factors by role, as {embeddings: 0.1}"
    )
    learning_rate: Number = Field(default=1e-4, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="after warm-up: cosine or linear (both to 0), constant, or wsd (constant, then linear to 0)",
    )
    warmup: Fraction = Field(default=0.01, description="share of the steps with linear warm-up")
    cooldown: Fraction | None = Field(
        default=None, description=f"share of the steps with wsd's final decay (default: {COOLDOWN})"
    )
    weight_decay: Number = Field(default=0.01, ge=0, description="decoupled weight decay; none for norms and biases")
    betas: Pair = Field(default=(0.9, 0.95), description="AdamW's betas")
    clip: Number = Field(default=1.0, ge=0, description="largest gradient norm; larger ones are clipped (0: never)")
    muon_learning_rate: Number = Field(default=1e-3, gt=0, description="peak learning rate of Muon")
    muon_momentum: Number = Field(default=0.95, ge=0, lt=1, description="momentum of Muon")
    muon_adjust: Literal["original", "match_rms_adamw"] = Field(
        default="original",
        description="adjustment of Muon's learning rate to a matrix's shape: original, match_rms_adamw",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Optimiser:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas[0]},{self.betas[1]}: each at least 0 and below 1")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and cooldown={self.decay} together exceed the run")
        return self

    def unused(self) -> Iterator[Unused]:
        if self.schedule != "wsd":
            why = f"it belongs to optimiser.schedule=wsd, not to {self.schedule}"
            yield Unused("cooldown", ("schedule",), why)
        if self.kind != "muon":
            for name in ("muon_learning_rate", "muon_momentum", "muon_adjust"):
                yield Unused(name, ("kind",), f"it belongs to optimiser.kind=muon, not to {self.kind}")

    @property
    def decay(self) -> float:
        """Share of the steps in wsd's final decay."""
        if self.schedule != "wsd":
            return 0.0
        return COOLDOWN if self.cooldown is None else self.cooldown
