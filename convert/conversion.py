"""A conversion that is planned and not written yet: the base of conversion by recipe and of import."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..card import copy_licences
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from .generation import write_generation_config
from .hashes import hashing
from .journal import Journal, tensors_digest
from .pending import Pending
from .recipe import ConvertRecipe
from .shards import SHARD_BYTES, Shards
from .source import Compared
from .tokenizer import write_tokenizer
from .workers import Job, work
from .write import write_weights


@dataclass(frozen=True)
class Written:
    """Facts of the writing: sha256 of every weight file of the source, and a note on each file that was changed.

    errors: of the LoRA factors of each matrix, by its name `relaxation.N.PATH`.
    """

    hashes: dict[str, str]
    notes: list[str]
    errors: dict[str, float] = field(default_factory=dict[str, float])


class Conversion(ABC):
    """A conversion of the checkpoint in the directory `path`: call `write`, then `finish`, then `verify`.

    recipe: the recipe, settled.   config: the config of the output.
    pending: its tensors, in the order in which they are written.
    files: the weight files of the source.
    facts: the facts for loopwise.json that are known before anything is written.
    """

    def __init__(
        self,
        path: Path,
        recipe: ConvertRecipe,
        config: RecurrentDepthConfig,
        pending: list[Pending],
        files: list[Path],
        facts: dict[str, Any],
    ):
        self.path, self.recipe, self.config, self.pending = path, recipe, config, pending
        self.files, self.facts = files, facts

    def write(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        show_progress: bool,
        identity: dict[str, Any] | None = None,
    ) -> Written:
        """Write config, model files, tokenizer, generation config, licenses and weights into `directory`.

        identity: the facts that tell this conversion from others; weights that its journal in `directory` names are
        not made again. Without it, no journal is kept. Raises UserError for files of the source that cannot be carried
        over, and for values that are not finite.
        """
        self.check()
        journal = None
        if identity is not None:
            journal = Journal(directory, identity)
            journal.clear(Shards(self.pending, directory, SHARD_BYTES).files)
        save_config(self.config, directory)
        if tokenizer is not None:
            write_tokenizer(tokenizer, directory)
        notes = write_generation_config(self.path, directory)
        copy_licences(self.path, directory)
        several = None
        if self.recipe.workers > 1:
            tensors = tensors_digest(self.pending)
            job = Job(self.path, self.settled(), directory, SHARD_BYTES, tensors, self.compared())
            several = partial(work, job)
        with hashing(self.files) as hashes:
            errors = write_weights(self.pending, directory, show_progress, SHARD_BYTES, journal, several)
        return Written(hashes, notes, errors)

    def check(self) -> None:  # noqa: B027  most conversions keep all values
        """Raise UserError for a source whose values would not be kept. Called before a model file is written."""

    @property
    def bytes(self) -> int:
        """The size of the weight files that `write` makes; the others are small."""
        return Shards(self.pending, self.path, SHARD_BYTES).bytes

    def compared(self) -> Compared:
        """Comparisons of the source's values that were made."""
        return Compared()

    def settled(self) -> ConvertRecipe:
        """A recipe that gives this conversion without a measurement."""
        return self.recipe

    def finish(self, directory: Path, written: Written) -> dict[str, Any]:
        """Add the files to `directory` that need the others; facts that are known once weights are `written`."""
        return {}

    @abstractmethod
    def verify(self, directory: Path) -> dict[str, float]:
        """Compare the checkpoint in `directory` with the source: the largest difference of logits, by dtype.

        Raises UserError where the two differ by more than rounding.
        """


def save_config(config: RecurrentDepthConfig, directory: Path) -> None:
    """Write config.json, and the model files that load the checkpoint where loopwise is not installed."""
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(config)
    custom_object_save(model, directory, config=cast(Any, config))
    config.save_pretrained(directory)
