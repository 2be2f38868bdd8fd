"""A conversion that is planned and not written yet: the base of conversion by recipe and of import."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..carried import copy_licences
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from .generation import write_generation_config
from .hashes import hashing
from .tokenizer import write_tokenizer
from .write import Pending, write_weights


@dataclass(frozen=True)
class Written:
    """Facts of the writing: sha256 of every weight file of the source, and a note on each file that was changed."""

    hashes: dict[str, str]
    notes: list[str]


class Conversion(ABC):
    """A conversion of the checkpoint in the directory `path`: call `write`, then `finish`, then `verify`.

    config: the config of the output.
    pending: its tensors, in the order in which they are written.
    files: the weight files of the source.
    facts: the facts for loopwise.json that are known before anything is written.
    """

    def __init__(
        self,
        path: Path,
        config: RecurrentDepthConfig,
        pending: list[Pending],
        files: list[Path],
        facts: dict[str, Any],
    ):
        self.path, self.config, self.pending, self.files, self.facts = path, config, pending, files, facts

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase | None, show_progress: bool) -> Written:
        """Write config, model files, tokenizer, generation config, licenses and weights into `directory`.

        Raises UserError for files of the source that cannot be carried over, and for values that are not finite.
        """
        save_config(self.config, directory)
        if tokenizer is not None:
            write_tokenizer(tokenizer, directory)
        notes = write_generation_config(self.path, directory)
        copy_licences(self.path, directory)
        with hashing(self.files) as hashes:
            write_weights(self.pending, directory, show_progress)
        return Written(hashes, notes)

    def finish(self, directory: Path) -> dict[str, Any]:
        """Add the files to `directory` that need the others; facts that are known once weights are written."""
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
