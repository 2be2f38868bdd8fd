"""transformers' Trainer with the recurrence curriculum, a loss per token of the whole step, and whole checkpoints.

Everything random is a function of (seed, optimiser step, micro-batch): recurrences, data order, dropout. So the result
depends neither on how a step's micro-batches are spread over ranks and accumulation, nor on interruptions.
Shapes: B blocks of a micro-batch, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import save_fsdp_optimizer
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from loopwise.errors import UserError
from loopwise.model.source_layers import layer_list_name

from . import adapters, optimisers, teacher
from .checkpoint import commit, partial_directory, prune, written
from .curriculum import Curriculum
from .data import Blocks, Mixture, Packed
from .losses import balanced_bias
from .measure import held_out_loss, parameter_costs, token_flops
from .objectives import Objective
from .pretrained import is_recurrent, write_model
from .progress import Progress
from .recipe import Train
from .recipe_objectives import Distillation
from .stream import Stream, save_marks

# DDP takes it from the Trainer by this name only.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


class Samples(Dataset):
    """All samples of a run in their order; sample g is a block and g itself, which tells `normal` states apart."""

    def __init__(
        self, blocks: Packed, streams: dict[int, Stream], order: Mixture, count: int, beside: dict[str, np.ndarray]
    ):
        self.blocks, self.streams, self.order, self.count, self.beside = blocks, streams, order, count, beside

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample: int) -> dict[str, Any]:
        source, place = self.order.where(sample)
        if source in self.streams:
            return {"sequence_ids": sample, **self.streams[source].row(place)}
        row = self.order[sample]
        kept = {name: array[row] for name, array in self.beside.items()}
        return {"sequence_ids": sample, **self.blocks.row(row), **kept}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """sequence_ids [B], input_ids and labels [B, T], and what else the samples have."""
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def arguments(recipe: Train, steps: int, out: Path, routed: bool) -> TrainingArguments:
    """The recipe in the Trainer's words. routed: whether the model has a router."""
    optimiser = recipe.optimiser
    schedule_options = {}
    if optimiser.schedule == "wsd":
        schedule_options = {"num_decay_steps": round(optimiser.decay * steps), "decay_type": "linear"}
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=optimiser.learning_rate,  # shown; the optimiser is made by `create_optimizer`
        lr_scheduler_type=SCHEDULES[optimiser.schedule],
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=round(optimiser.warmup * steps),
        max_grad_norm=optimiser.clip,
        bf16=recipe.precision == "bfloat16",
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 0,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every,
        report_to=recipe.report_to,
        disable_tqdm=True,  # progress is shown by train/progress.py
        log_level="error",
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        # Every parameter takes part in every step, but for the routers of recurrences that a step does not run.
        ddp_find_unused_parameters=routed,
        ddp_broadcast_buffers=False,  # rotary tables, equal everywhere
        dataloader_pin_memory=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else one process would wrap the model in nn.DataParallel
    return args


def prepare_model(model: Any, recipe: Train) -> None:
    """What the recipe changes in how `model` computes: checkpointing, compiled layers."""
    if recipe.gradient_checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.gradient_checkpointing == "recurrence" and is_recurrent(model.config):
        for layer in model.core:
            layer.gradient_checkpointing = False
        model.checkpoint_recurrences = True
    if recipe.compile == "layer":
        if is_recurrent(model.config):
            layers = [*model.prelude, *model.core, *model.coda]
        else:
            layers = model.get_submodule(layer_list_name(model, model.config.num_hidden_layers))
        for layer in layers:
            layer.compile(dynamic=False)


class RecurrentTrainer(Trainer):
    """Trains `model` on `blocks` and `streams`; `curriculum` is None for a model without recurrence.

    `run` describes the run: it is kept in every checkpoint, and compared when one is resumed from.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        args: TrainingArguments,
        recipe: Train,
        blocks: Blocks,
        streams: dict[int, Stream],
        curriculum: Curriculum | None,
        run: dict[str, Any],
    ):
        distillation, device = recipe.objectives.distillation, args.device
        given, beside = None, {}
        if distillation and distillation.top_k:
            given = teacher.kept
            beside = self._precomputed(distillation, blocks, recipe, args)
        elif distillation:
            given = teacher.Teacher(distillation, device, recipe.precision, recipe.data.separate_documents)
        warmup = round(((recipe.recurrence and recipe.recurrence.capacity_warmup) or 0) * args.max_steps)
        self.objective = Objective(recipe.objectives, model.config, given, args.max_steps, recipe.seed, warmup)
        self.recipe, self.blocks, self.streams, self.curriculum, self.run = recipe, blocks, streams, curriculum, run
        self.trained, self.tokenizer = model, tokenizer
        self.out = self._output_directory = Path(str(args.output_dir))
        self.samples_per_step = recipe.batch_size * recipe.gradient_accumulation * args.world_size
        self._tied = {name: id(x) for name, x in model.named_parameters(remove_duplicate=False)}
        config = dict(vars(model.config))
        samples = args.max_steps * self.samples_per_step
        self.order = Mixture(blocks.parts, recipe.data.mixture(), samples, recipe.seed)
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=Samples(blocks.train, streams, self.order, samples, beside),
            eval_dataset=cast(Any, blocks.held_out),  # the Trainer only looks whether there is any: see `evaluate`
            callbacks=[Progress(args.max_steps)],
        )
        # The Trainer switches the cache off in the config, which is saved with the model; `compute_loss` asks for none.
        vars(model.config).pop("use_cache", None)
        vars(model.config).update(config)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True  # the Trainer shall count the step's targets
        self._micro_batch = (-1, 0)  # (step, micro-batches of it begun on this rank)
        if self.is_deepspeed_enabled and recipe.precision == "bfloat16":
            config: Any = cast(Any, self.accelerator.state.deepspeed_plugin).hf_ds_config.config
            # Weights stay in float32 as everywhere; DeepSpeed's own `bf16` would train bfloat16 ones.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self._since: tuple[int, float] | None = None  # step and time of the last log line
        self.evaluated: dict[str, float] = {}  # the last held-out losses, and their step
        self._costs = parameter_costs(model)
        self._stopping = False

    @staticmethod
    def _precomputed(keys: Distillation, blocks: Blocks, recipe: Train, args: TrainingArguments):
        """The teacher's top k beside the blocks: computed here, by all ranks, where that was not done yet."""
        with args.main_process_first(local=False):
            missing = not (blocks.directory / teacher.DONE).is_file()
            if missing and args.should_save:
                teacher.begin(keys, blocks)
        if missing:
            shard = (args.process_index, args.world_size)
            teacher.precompute(keys, blocks, args.device, recipe.precision, recipe.batch_size, shard)
            if args.world_size > 1:
                torch.distributed.barrier()
            if args.should_save:
                teacher.finish(blocks)
        return teacher.load(blocks)

    # The samples are already in order, and rank r of W takes micro-batches r, r + W, ... of them.
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(cast(Samples, self.train_dataset))

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = optimisers.build(model or self.trained, self.recipe.optimiser)
        return self.optimizer

    def _get_learning_rate(self):
        """That of AdamW without a multiplier, whatever stands in the first group."""
        scheduler = cast(Any, self.lr_scheduler)
        return scheduler.get_last_lr()[0] / scheduler.base_lrs[0] * self.recipe.optimiser.learning_rate

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.streams:
            epoch_iterator = iter(self._read(epoch_iterator, num_batches))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _read(self, micro_batches: Iterator[Any], count: int) -> list[Any]:
        """Those of the next step, read by all ranks before one computes. Raises UserError, in all of them, where a
        stream of one cannot be read on: after a checkpoint of the steps that are done, which took long."""
        found, told = [], None
        try:
            found = list(itertools.islice(micro_batches, count))
        except UserError as error:
            told = str(error)
        failed = torch.tensor(int(told is not None), device=self.args.device)
        if self.args.world_size > 1:
            failed = cast(torch.Tensor, self.accelerator.reduce(failed))
        if not failed:
            return found
        step = self.state.global_step
        if step:
            self.keep()
        told = told or "a stream of another process cannot be read on"
        kept = f"; checkpoint-{step} is written: mend the source, and --resume goes on from it" if step else ""
        raise UserError(f"{told}{kept}")

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step
        self._since = self._since or (step, time.perf_counter())
        done = self._micro_batch[1] if self._micro_batch[0] == step else 0
        self._micro_batch = (step, done + 1)
        # The same dropout for a micro-batch wherever and whenever it is computed.
        micro_batch = done * self.args.world_size + self.args.process_index
        torch.manual_seed(int(np.random.SeedSequence([self.recipe.seed, step, micro_batch]).generate_state(1)[0]))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert num_items_in_batch is not None, "the Trainer counts the labels of a step"
        assert not return_outputs, "held-out losses are measured by `evaluate`"
        if isinstance(num_items_in_batch, torch.Tensor):  # 0 where no block of the step has a label: its loss is 0
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        else:
            num_items_in_batch = max(num_items_in_batch, 1)
        step = self.state.global_step
        depth = self.curriculum.at(step) if self.curriculum else None
        # Gradients are averaged over ranks where they have to be summed. The factor is exact for 2, 4, 8, ... ranks.
        loss = self.objective(model, inputs, step, depth, num_items_in_batch) * self.args.world_size
        if self.is_deepspeed_enabled:  # it changes the weights within the backward pass: `_get_grad_norm` is too late
            self._check_finite(float(cast(Any, self.accelerator.reduce(loss.detach()))))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        # The norm is that of all ranks, so all stop together, before the weights change.
        self._check_finite(float(norm))
        return norm

    def _check_finite(self, value: float) -> None:
        if math.isfinite(value):
            return
        step = self.state.global_step
        depth = f" (num_recurrences={self.curriculum.at(step).num_recurrences})" if self.curriculum else ""
        first = step * self.samples_per_step
        raise UserError(
            f"step {step + 1}{depth}: the loss or its gradient is not finite, in samples {first} to "
            f"{first + self.samples_per_step - 1}; the weights of step {step} were not changed by it. Lower "
            "optimiser.learning_rate or optimiser.clip, or look at the data"
        )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled and self.curriculum:
            for layer in cast(Any, self.trained).core:
                layer.set_reshard_after_forward(False)  # else every recurrence gathers it again
        return prepared

    def stop(self) -> None:
        """Save and end training after this step, on all ranks."""
        self._stopping = True

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._balance()
        stopping = torch.tensor(int(self._stopping), device=self.args.device)
        # Ranks may hear of it at different steps.
        if self.args.world_size > 1:
            stopping = cast(torch.Tensor, self.accelerator.reduce(stopping))
        if stopping and self.state.global_step < self.args.max_steps:
            self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _balance(self) -> None:
        """Move a token-choice router's bias by one step, where the recipe asks for it: equal on all ranks."""
        counts, self.objective.chosen = self.objective.chosen, None
        if counts is not None:
            assert self.recipe.objectives.router is not None
            router = cast(Any, self.trained).router
            counts = cast(torch.Tensor, self.accelerator.reduce(counts))
            router.bias.copy_(balanced_bias(router.bias, counts, self.recipe.objectives.router.bias_step))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out loss at each depth of `recurrence.eval_at`, as `eval_loss_r<R>` (`eval_loss` without recurrence)."""
        held_out = self.blocks.held_out
        assert held_out is not None, "the recipe names held-out text"
        if self.evaluated.get("step") == self.state.global_step:
            return self.evaluated
        started = time.perf_counter()
        shard = (self.args.process_index, self.args.world_size)
        metrics: dict[str, float] = {}
        for recurrences in self.eval_at():
            name = f"{metric_key_prefix}_loss" + (f"_r{recurrences}" if recurrences else "")
            total, count = held_out_loss(self.trained, held_out, recurrences, self.recipe.batch_size, shard)
            metrics[name] = _sum(self, total) / _sum(self, count)
        self.log({**metrics, **self._state_changes()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._since:
            self._since = (self._since[0], self._since[1] + time.perf_counter() - started)
        self.evaluated = {**metrics, "step": self.state.global_step}
        return metrics

    @torch.no_grad()
    def _state_changes(self) -> dict[str, float]:
        """|s_r - s_{r-1}| / |s_r| of the first held-out blocks, a mean over tokens, as `state_change_r<r>`."""
        depth = max(r or 0 for r in self.eval_at())
        if depth < 2 or self.trained.config.sharing == "sequence":
            return {}
        held_out = cast(Packed, self.blocks.held_out)
        rows = held_out.rows(range(min(self.recipe.batch_size, len(held_out))))
        inputs = {name: torch.from_numpy(x).to(self.args.device) for name, x in rows.items() if name != "labels"}
        sequence_ids = torch.arange(len(rows["labels"]), device=self.args.device)
        keys = {"num_recurrences": depth, "sequence_ids": sequence_ids, "use_cache": False, "output_states": True}
        states = self.trained(**inputs, **keys).states.float()
        change = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1).clamp(min=1e-9)
        return {f"state_change_r{r}": x for r, x in enumerate(change.mean((1, 2)).tolist(), 2)}

    def eval_at(self) -> list[int | None]:
        if self.curriculum is None:
            return [None]
        chosen = self.recipe.recurrence.eval_at if self.recipe.recurrence else None
        router = getattr(self.trained.config, "router", None)
        least = self.curriculum.mean.end if router and router["kind"] == "token" else 1
        return list(chosen or sorted({least, self.curriculum.mean.end}))

    def log(self, logs, start_time=None):
        step = self.state.global_step
        if "loss" in logs and self._since:
            before, at = self._since
            now = time.perf_counter()
            steps = range(before, step)
            tokens = len(steps) * self.recipe.data.sequence_length * self.samples_per_step
            if self.curriculum:
                logs["num_recurrences"] = sum(self.curriculum.at(s).num_recurrences for s in steps) / len(steps)
            logs["tokens_per_second"] = tokens / (now - at)
            logs["flops_per_second"] = sum(map(self._flops, steps)) * tokens / len(steps) / (now - at)
            self._since = (step, now)
        if not self.streams:
            self.state.epoch = step * self.samples_per_step / len(self.blocks.train)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Of this micro-batch."""
        return inputs["input_ids"].numel() * self._flops(self.state.global_step)

    def _flops(self, step: int) -> int:
        """Of a token."""
        depth = self.curriculum.at(step) if self.curriculum else None
        return token_flops(self._costs, depth, self.objective.router, step, self.objective.capacity_warmup)

    def _get_output_dir(self, trial=None) -> str:
        return str(self._output_directory)

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
        self._output_directory = partial
        try:
            with written(partial, f"checkpoint-{step}"):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    taken = self.order.taken(step * self.samples_per_step)
                    save_marks(self.streams, taken, partial / f"checkpoint-{step}")
        finally:
            self._output_directory = self.out
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with written(partial, f"checkpoint-{step}"):
                commit(partial / f"checkpoint-{step}", self.out / f"checkpoint-{step}", self.run)
            prune(self.out, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir=None, _internal_call=False):
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
        """Leave a checkpoint of this step, unless there is one; every process calls this."""
        if not (self.out / f"checkpoint-{self.state.global_step}").is_dir():
            self._save_checkpoint(cast(Any, self.model))

    def told_all(self, said: str | None) -> str | None:
        """The message of the first process, in every process."""
        told = [said]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(told)
        return told[0]

    def full_state(self) -> dict[str, torch.Tensor]:
        """All weights in float32, in the first process (elsewhere nothing); every process calls this."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state: Any = self.accelerator.get_state_dict(self.model_wrapped) if sharded else self.trained.state_dict()
        if not self.args.should_save:
            return {}
        first: dict[int, torch.Tensor] = {}  # what is tied is written once
        return {name: first.setdefault(self._tied.get(name, id(x)), x) for name, x in state.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Nothing: a resumed run builds its model from the checkpoint, which checks for missing weights."""


def _sum(trainer: Trainer, value: torch.Tensor) -> float:
    """Over all ranks."""
    return cast(torch.Tensor, trainer.accelerator.reduce(value)).item()
