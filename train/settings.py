"""The settings of a training run: the recipe, the model, OUT and the command-line options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import DIGEST
from .recipe import Train


@dataclass(frozen=True)
class Run:
    """One call of `loopwise train`.

    model: directory or hub id.   out: directory for the trained model and its checkpoints.   resume: continue from the
    newest sound checkpoint in `out`.   force: replace an earlier run in `out`.   accept_changes: resume although the
    settings differ.   processes: number of ranks.   layout: of the checkpoints, see `ranks.layout`.
    """

    model: str
    out: Path
    recipe: Train
    resume: bool = False
    force: bool = False
    accept_changes: bool = False
    processes: int = 1
    layout: str = "whole"

    @property
    def samples_per_step(self) -> int:
        """Blocks in one optimiser step, over all ranks and accumulated micro-batches."""
        return self.recipe.batch_size * self.recipe.gradient_accumulation * self.processes

    def facts(self, digest: str | None = None) -> dict[str, Any]:
        """The facts that must be equal for a resumed run to continue the original one. `digest`: of the data, if known.

        Ranks and accumulation count by their product. DeepSpeed shards the optimiser state for one number of ranks, so
        its layout includes that number.
        """
        keys = self.recipe.facts()
        keys["gradient_accumulation x processes"] = keys.pop("gradient_accumulation") * self.processes
        zero = self.layout.startswith("zero")
        keys["checkpoint layout"] = f"{self.layout} on {self.processes} processes" if zero else self.layout
        model = str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model
        facts = {"MODEL": model, "recipe": keys}
        return facts if digest is None else {**facts, DIGEST: digest}
