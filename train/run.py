"""A training run: `train` in this process, and `work`, which every process of a run executes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loopwise.directory import claimed, ended_by_sigterm, on_sigterm
from loopwise.emulated import advice
from loopwise.errors import UserError
from loopwise.quiet import quiet

from . import ranks
from .agree import chosen, from_first
from .checkpoint import prune
from .data import blocks, stream
from .fitting import curriculum
from .output import TOKENS, discarded_unless_begun, remove_tokens
from .prepare import prepare
from .recipe import Train
from .settings import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from .trainer import RecurrentTrainer


def train(
    model: str,
    out: str | Path,
    recipe: Train,
    resume: bool = False,
    force: bool = False,
    accept_changes: bool = False,
) -> None:
    """Train `model` (a directory or hub id) into the directory `out`, in this process.

    resume, force, accept_changes: as in `Run`. Raises UserError for bad input, with nothing written, and for a loss
    that is not finite.
    """
    run = Run(model, Path(out), recipe, resume, force, accept_changes, ranks.count(), ranks.layout())
    with claimed(run.out), ended_by_sigterm():
        if prepare(run):
            with discarded_unless_begun(run.out):
                work(run)


def work(run: Run, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train in an OUT that `prepare` has made. Every process of a run calls this; the first one writes the final model.

    SIGTERM ends it: before the first step with nothing new, in training and in the last evaluation with a checkpoint,
    while the model is written with the model. Raises UserError for a loss that is not finite, for a stream that cannot
    be read on, for a full disk, and where the processes see different files in OUT.
    """
    with ended_by_sigterm():
        _work(run, callbacks)


def _work(run: Run, callbacks: Sequence[TrainerCallback]) -> None:
    quiet()
    checkpoint = chosen(run.out, run.resume)
    trainer, dtype = _trainer(run, checkpoint)
    for callback in callbacks:
        trainer.add_callback(callback)
    if trainer.args.should_save:
        from .publish import rehearse

        prune(run.out, run.recipe.keep_checkpoints)
        rehearse(trainer, run.model, run.out, dtype)
        print(_opening(trainer, checkpoint), flush=True)
        if line := advice(run.recipe.precision, trainer.args.device.type, "precision=float32"):
            print(line, file=sys.stderr, flush=True)
    with on_sigterm(lambda *_: trainer.stop()):  # clusters preempt with SIGTERM
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        written = trainer.state.global_step == trainer.args.max_steps and _finish(run, trainer, dtype)
    if not written and trainer.args.should_save:
        last = f"checkpoint-{trainer.state.global_step}"
        print(f"stopped by SIGTERM: {last} is written, --resume continues from it", flush=True)


def _load(run: Run, recipe: Train, checkpoint: Path | None, dtype: str) -> PreTrainedModel:
    """The model to train: frozen roles, adapters, gradient checkpointing and compilation are set.

    recipe: that of `run`, with commits as revisions. Raises UserError if the weights leave the range of `dtype`, or if
    the model cannot separate documents.
    """
    import torch

    from . import adapters, compute, optimisers, separation
    from .pretrained import load_model, overflow

    loaded = load_model(str(checkpoint)) if checkpoint else load_model(run.model, recipe.revision)
    if message := overflow(loaded.state_dict(), dtype):
        raise UserError(f"dtype={dtype}: {message}; choose dtype=bfloat16 or float32")
    if recipe.data.separate_documents:
        separation.check(loaded, run.model)
    if recipe.adapters:
        torch.manual_seed(recipe.seed)
        adapters.inject(loaded, recipe.adapters, checkpoint)
    compute.configure(loaded, recipe.gradient_checkpointing, recipe.compile)
    optimisers.freeze(loaded, recipe.optimiser, recipe.objectives, recipe.adapters is not None)
    return loaded


def _trainer(run: Run, checkpoint: Path | None) -> tuple[RecurrentTrainer, str]:
    """(the trainer of this process, the dtype of the final weights)."""
    from .arguments import arguments
    from .commits import kept
    from .pretrained import load_config, load_tokenizer
    from .trainer import RecurrentTrainer

    recipe = kept(run.model, run.recipe, run.out / TOKENS)
    data = blocks.load(run.out / TOKENS)
    config = load_config(run.model, recipe.revision)
    dtype = recipe.dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    loaded = _load(run, recipe, checkpoint, dtype)
    steps = recipe.steps or math.ceil((recipe.epochs or 1.0) * len(data.train) / run.samples_per_step)
    course = curriculum(config, recipe, steps)
    tokenizer = load_tokenizer(str(checkpoint or run.model), None if checkpoint else recipe.revision)
    # Two steps are more than is read ahead of the step after which a checkpoint is written.
    behind = 2 * run.samples_per_step
    streams = stream.open_all(recipe.data, tokenizer, recipe.seed, checkpoint, behind, run.accept_changes)
    facts = {**run.facts(data.digest), "mean recurrences": course.base if course else None}
    args = arguments(recipe, steps, run.out, routed=bool(getattr(config, "router", None)))
    return RecurrentTrainer(loaded, tokenizer, args, recipe, data, streams, course, facts), dtype


def _finish(run: Run, trainer: RecurrentTrainer, dtype: str) -> bool:
    """Measure held-out loss, merge adapters, write the final model, delete the tokens. Every process calls this.

    Returns False, after a checkpoint, if SIGTERM came before the model was begun. Raises UserError, after a checkpoint,
    if the weights have left the range of `dtype`.
    """
    from . import adapters
    from .pretrained import overflow
    from .publish import publish

    if run.recipe.data.held_out:
        trainer.evaluate()
    state = trainer.full_state()
    if run.recipe.adapters:
        state = adapters.merged(state, run.recipe.adapters, adapters.transposed(trainer.trained))
    if trainer.stopping():
        trainer.keep()
        return False
    if message := from_first(overflow(state, dtype)):
        trainer.keep()
        raise UserError(
            f"dtype={dtype}: after training, {message}; checkpoint-{trainer.state.global_step} is written: --resume "
            "with dtype=bfloat16 or float32 writes the model of it"
        )
    if trainer.args.should_save:
        publish(trainer, state, run.model, run.out, dtype)
        remove_tokens(run.out)
        for line in trainer.effect.lines() if trainer.effect else []:
            print(line)
        print(f"model written to {run.out}", flush=True)
    return True


def _opening(trainer: RecurrentTrainer, checkpoint: Path | None) -> str:
    data = trainer.blocks
    held_out = f", {data.held_out.size:,} held out" if data.held_out is not None else ""
    start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
    read = f"{data.train.size:,} tokens" if len(data.train) else "no tokens in memory"
    more = f" and {len(trainer.streams)} streamed" if trainer.streams else ""
    return f"train {trainer.args.max_steps} steps {start}: {read}{more}{held_out}"
