"""The recipe as transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from .recipe import Train

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def arguments(recipe: Train, steps: int, out: Path, routed: bool) -> TrainingArguments:
    """Arguments for a run of `steps` optimiser steps into `out`. routed: the model has a router."""
    optimiser = recipe.optimiser
    schedule_options = {}
    if optimiser.schedule == "wsd":
        schedule_options = {"num_decay_steps": round(optimiser.decay * steps), "decay_type": "linear"}
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=optimiser.learning_rate,  # for logs; `create_optimizer` builds the optimiser
        lr_scheduler_type=SCHEDULES[optimiser.schedule],
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=round(optimiser.warmup * steps),
        max_grad_norm=optimiser.clip,
        bf16=recipe.precision == "bfloat16",
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would hide a loss that is not finite
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 0,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every,
        report_to=recipe.report_to,
        disable_tqdm=True,  # train/progress.py shows the progress
        log_level="error",
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        # Only the routers of recurrences that a step does not run have no gradient in it.
        ddp_find_unused_parameters=routed,
        ddp_broadcast_buffers=False,  # rotary tables, equal on all ranks
        dataloader_pin_memory=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else a single process would wrap the model in nn.DataParallel
    return args
