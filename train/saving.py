"""A Trainer whose checkpoints are whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import save_fsdp_optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from . import adapters
from .checkpoint import commit, partial_directory, prune, written
from .data import Mixture, Stream
from .data.stream import save_marks
from .pretrained import write_model
from .recipe import Train


class CheckpointTrainer(Trainer):
    """Writes a checkpoint beside its place and renames it; a checkpoint loads as a model.

    The subclass sets all of these before it calls the constructor.   out: directory of the run.   run: facts that every
    checkpoint stores, see `Run.facts`.   trained: the model, unwrapped.   tied: storage of each parameter by name.
    """

    out: Path
    output_directory: Path  # `out`, or the partial checkpoint while one is written
    recipe: Train
    run: dict[str, Any]
    trained: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    streams: dict[int, Stream]
    order: Mixture
    samples_per_step: int
    tied: dict[str, int]

    def spent(self) -> dict[str, float]:
        """Steps, tokens and FLOPs of the whole run so far."""
        raise NotImplementedError

    def _get_output_dir(self, trial=None) -> str:
        return str(self.output_directory)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Without the Trainer's second copy of the weights, which `save_model` has gathered already.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_checkpoint(self, model, trial=None):
        step = self.state.global_step
        partial = partial_directory(self.out, step)
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.output_directory = partial
        try:
            with written(partial, f"checkpoint-{step}"):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    taken = self.order.taken(step * self.samples_per_step)
                    save_marks(self.streams, taken, partial / f"checkpoint-{step}")
        finally:
            self.output_directory = self.out
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with written(partial, f"checkpoint-{step}"):
                commit(partial / f"checkpoint-{step}", self.out / f"checkpoint-{step}", self.run, self.spent())
            prune(self.out, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the model, with adapters in a file of their own, into `output_dir`. Every process calls this."""
        state = self.full_state()
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.out)
        directory.mkdir(parents=True, exist_ok=True)
        if self.recipe.adapters:
            state, extra = adapters.split(state)
            adapters.save(extra, directory)
        write_model(self.trained, self.tokenizer, directory, state)

    def keep(self) -> None:
        """Write a checkpoint of this step, unless it exists. Every process calls this."""
        if not (self.out / f"checkpoint-{self.state.global_step}").is_dir():
            self._save_checkpoint(cast(Any, self.model))

    def full_state(self) -> dict[str, torch.Tensor]:
        """All weights in float32 in the first process, {} in the others. Every process calls this."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state: Any = self.accelerator.get_state_dict(self.model_wrapped) if sharded else self.trained.state_dict()
        if not self.args.should_save:
            return {}
        first: dict[int, torch.Tensor] = {}  # tied weights are written once
        return {name: first.setdefault(self.tied.get(name, id(x)), x) for name, x in state.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Nothing: a resumed run loads its model from the checkpoint before, with a check for missing weights."""
