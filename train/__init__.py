"""Retrain a model under a recurrence curriculum. `loopwise.train.run.train` trains.

`Curriculum` and the recipe sections need no torch.

    tasks/                generated tasks as data sources
    schedule.py           whole numbers that grow over a run
    samplers.py           random draws of a step
    recipe/               the recipe of `loopwise train`
    curriculum.py         R of every step, and how many recurrences carry gradient
    losses.py             losses on plain tensors
    objectives.py         the loss of a micro-batch
    data/                 text to packed blocks of tokens
    pretrained.py         models and tokenizers: loading and saving
    commits.py            commits of hub models, kept in OUT
    adapters.py           LoRA adapters
    optimisers.py         parameters by role, frozen roles, AdamW and Muon
    compute.py            gradient checkpointing and torch.compile
    separation.py         a check that packed documents do not see each other
    teacher.py            the teacher of a distillation
    held_out.py           held-out losses, right answers and states
    measure.py            FLOPs
    estimate.py           memory of a rank
    checkpoint.py         checkpoints that are whole or absent
    output.py             OUT: when it may be replaced
    settings.py           Run: model, OUT, recipe and options
    checks.py             checks of the settings
    fitting.py            checks of the recipe against the model
    ranks.py              the processes of a run
    agree.py              what all ranks hold alike: checkpoint and data
    progress.py           the progress bar and log lines
    speed.py              tokens per second
    samples.py            the samples of a run, in order
    arguments.py          transformers' TrainingArguments
    saving.py             CheckpointTrainer: whole checkpoints
    trainer.py            RecurrentTrainer: curriculum, loss, evaluation
    card.py               loopwise.json and the model card
    publish.py            the final model
    prepare.py            checks and tokenizing, once before training
    run.py                `train` in this process, `work` in every process
    watch.py              a process that ends a stopped rank
    launch.py             several processes: the side that starts them
    worker.py             several processes: one of them
    command.py            `loopwise train`
    init.py               `loopwise init`
"""

from .curriculum import Curriculum, Depth
from .recipe import Data, Optimiser, Recurrence, Train
from .schedule import Schedule

__all__ = ["Curriculum", "Data", "Depth", "Optimiser", "Recurrence", "Schedule", "Train"]
