"""transformers' Trainer with the recurrence curriculum, and a loss per token of the whole step.

Everything random is a function of (seed, optimiser step, micro-batch): recurrences, data order, dropout. The result
therefore depends neither on the split of a step over ranks and accumulation, nor on interruptions.
Shapes: B blocks of a micro-batch, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from loopwise.diagnosis import Effect
from loopwise.errors import UserError

from . import optimisers, teacher
from .curriculum import Curriculum, Depth
from .data import Blocks, Mixture, Stream
from .held_out import Depths, HeldOut, effect_of, held_out, metrics, state_logs, states_of
from .losses import balanced_bias
from .measure import parameter_costs, step_flops
from .objectives import Objective
from .progress import Progress
from .recipe import Distillation, Train
from .samples import Samples, collate
from .saving import CheckpointTrainer
from .speed import Speed

# DDP gets this argument from the Trainer under the deprecated name only.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


class RecurrentTrainer(CheckpointTrainer):
    """Trains `model` on `blocks` and `streams`. curriculum: None for a plain model.

    run: facts of the run, which every checkpoint stores and a resume compares.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
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
            given = teacher.stored
            beside = self._precomputed(distillation, blocks, recipe, args)
        elif distillation:
            given = teacher.Teacher(distillation, device, recipe.precision, recipe.data.separate_documents)
        warmup = round(((recipe.recurrence and recipe.recurrence.capacity_warmup) or 0) * args.max_steps)
        self.objective = Objective(recipe.objectives, model.config, given, args.max_steps, recipe.seed, warmup)
        self.recipe, self.blocks, self.streams, self.curriculum, self.run = recipe, blocks, streams, curriculum, run
        self.trained, self.tokenizer = model, tokenizer
        self.out = self.output_directory = Path(str(args.output_dir))
        self.samples_per_step = recipe.batch_size * recipe.gradient_accumulation * args.world_size
        self.tied = {name: id(x) for name, x in model.named_parameters(remove_duplicate=False)}
        config = dict(vars(model.config))
        samples = args.max_steps * self.samples_per_step
        self.order = Mixture(blocks.parts, recipe.data.mixture(), samples, recipe.seed)
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=Samples(blocks.train, streams, self.order, samples, beside, self._recurrences_of),
            eval_dataset=cast(Any, blocks.held_out),  # the Trainer only tests for None; `evaluate` reads the blocks
            callbacks=[Progress(args.max_steps)],
        )
        # The Trainer sets use_cache=False in the config, which is saved with the model; `compute_loss` passes it.
        vars(model.config).pop("use_cache", None)
        vars(model.config).update(config)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True  # the Trainer counts the step's targets
        self._micro_batch = (-1, 0)  # (step, micro-batches of it that this rank has begun)
        if self.is_deepspeed_enabled and recipe.precision == "bfloat16":
            deepspeed: Any = cast(Any, self.accelerator.state.deepspeed_plugin).hf_ds_config.config
            # Weights stay in float32, as with the other launchers; DeepSpeed's `bf16` would train bfloat16 weights.
            deepspeed["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self._speed = Speed()
        self._tokens: Any = 0  # of this rank since the last `store_flos`, without padding
        self._rows: list[tuple[float, int]] = []  # this rank's micro-batches since the last log: mean R, FLOPs
        self.evaluated: dict[str, float] = {}  # the last held-out losses and accuracies, and their step
        self.effect: Effect | None = None  # of the recurrences, in the last evaluation
        self._costs = parameter_costs(model)
        self._stopping = False

    @staticmethod
    def _precomputed(
        keys: Distillation, blocks: Blocks, recipe: Train, args: TrainingArguments
    ) -> dict[str, np.ndarray]:
        """The teacher's top k beside the blocks; all ranks compute it if it is not on the disk yet."""
        with args.main_process_first(local=False):
            missing = not (blocks.directory / teacher.DONE).is_file()
            if missing and args.should_save:
                teacher.allocate(keys, blocks)
        if missing:
            shard = (args.process_index, args.world_size)
            teacher.precompute(keys, blocks, args.device, recipe.precision, recipe.batch_size, shard)
            if args.world_size > 1:
                torch.distributed.barrier()
            if args.should_save:
                teacher.finish(blocks)
        return teacher.load(blocks)

    # The samples are already in order; rank r of W takes micro-batches r, r + W, ...
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(cast(Samples, self.train_dataset))

    def create_optimizer(self, model=None):
        """The optimiser of the recipe over the trained parameters."""
        if self.optimizer is None:
            self.optimizer = optimisers.build(model or self.trained, self.recipe.optimiser)
        return self.optimizer

    def _get_learning_rate(self):
        """The learning rate of AdamW without a multiplier, whichever group comes first."""
        scheduler = cast(Any, self.lr_scheduler)
        shares = (now / base for now, base in zip(scheduler.get_last_lr(), scheduler.base_lrs, strict=True) if base)
        return next(shares, 0.0) * self.recipe.optimiser.learning_rate

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step. Raises UserError, in all ranks, if a stream cannot be read on."""
        if self.streams:
            epoch_iterator = iter(self._read(epoch_iterator, num_batches))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _read(self, micro_batches: Iterator[Any], count: int) -> list[Any]:
        """The micro-batches of the next step, read by all ranks before any of them computes.

        Raises UserError in all ranks if a stream of one rank cannot be read on, after a checkpoint of the steps done.
        """
        found, message = [], None
        try:
            found = list(itertools.islice(micro_batches, count))
        except UserError as error:
            message = str(error)
        failed = torch.tensor(int(message is not None), device=self.args.device)
        if self.args.world_size > 1:
            failed = cast(torch.Tensor, self.accelerator.reduce(failed))
        if not failed:
            return found
        step = self.state.global_step
        if step:
            self.keep()
        message = message or "a stream of another process cannot be read on"
        kept = f"; checkpoint-{step} is written: mend the source, and --resume continues from it" if step else ""
        raise UserError(f"{message}{kept}")

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, forward and backward, with dropout seeded by (seed, step, micro-batch)."""
        step = self.state.global_step
        self._speed.start(step, self.state.num_input_tokens_seen)
        done = self._micro_batch[1] if self._micro_batch[0] == step else 0
        self._micro_batch = (step, done + 1)
        micro_batch = done * self.args.world_size + self.args.process_index
        torch.manual_seed(int(np.random.SeedSequence([self.recipe.seed, step, micro_batch]).generate_state(1)[0]))
        self._tokens += inputs["num_tokens"].sum() if "num_tokens" in inputs else inputs["input_ids"].numel()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch: a scalar, summed over its targets and divided by those of the whole step."""
        assert num_items_in_batch is not None, "the Trainer counts the labels of a step"
        assert not return_outputs, "held-out losses are measured by `evaluate`"
        if self.recipe.objectives.average == "blocks":
            num_items_in_batch = self.samples_per_step
        elif isinstance(num_items_in_batch, torch.Tensor):  # 0 if no block of the step has a label; the loss is 0 then
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        else:
            num_items_in_batch = max(num_items_in_batch, 1)
        step = self.state.global_step
        depth = self._depth(step, inputs)
        # Ranks average gradients, which must be summed instead. The factor is exact for 2, 4, 8, ... ranks.
        loss = self.objective(model, inputs, step, depth, num_items_in_batch) * self.args.world_size
        if self.is_deepspeed_enabled:  # it updates the weights within backward, before `_get_grad_norm`
            self._check_finite(float(cast(Any, self.accelerator.reduce(loss.detach()))))
        return loss

    def _recurrences_of(self, sample: int, mean: int) -> int:
        """R of a sample whose block has `mean`."""
        assert self.curriculum is not None
        return self.curriculum.of_sample(sample // self.samples_per_step, sample, mean)

    def _depth(self, step: int, inputs: dict[str, Any]) -> Depth | None:
        """The depth of a micro-batch: that of `step`, or the greatest of its rows. Notes the rows for the log."""
        rows = inputs.get("num_recurrences")
        if self.curriculum is None or rows is None:
            return self.curriculum and self.curriculum.at(step)
        backprop = self.curriculum.backprop
        depth = Depth(int(rows.max()), backprop and backprop.at(step))
        self._rows.append((float(rows.float().mean()), step_flops(self._costs, self.objective, step, depth)))
        return depth

    def _get_grad_norm(self, model, grad_norm=None):
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        # The norm covers all ranks, so that all stop together, before the weights change.
        self._check_finite(float(norm))
        return norm

    def _check_finite(self, value: float) -> None:
        if math.isfinite(value):
            return
        step = self.state.global_step
        depth = ""
        if self.curriculum and not self._rows:
            depth = f" (num_recurrences={self.curriculum.at(step).num_recurrences})"
        first = step * self.samples_per_step
        raise UserError(
            f"step {step + 1}{depth}: the loss or its gradient is not finite, in samples {first} to "
            f"{first + self.samples_per_step - 1}; the weights of step {step} are unchanged. Lower "
            "optimiser.learning_rate or optimiser.clip, or look at the data"
        )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled and self.curriculum:
            for layer in cast(Any, self.trained).core:
                layer.set_reshard_after_forward(False)  # else every recurrence gathers the weights again
        if not self.state.num_input_tokens_seen:  # earlier releases did not count, and had no padding
            places = self.recipe.data.sequence_length * self.samples_per_step
            self.state.num_input_tokens_seen = self.state.global_step * places
        return prepared

    def stop(self) -> None:
        """End training after this step, or the evaluation at once, with a checkpoint, on all ranks."""
        self._stopping = True

    def stopping(self) -> bool:
        """True if `stop` was called on any rank. Every process calls this, as ranks get a signal at different times."""
        return bool(self._sum_of_ranks(torch.tensor(int(self._stopping))))

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._balance()
        if self.stopping() and self.state.global_step < self.args.max_steps:
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # a scheduler grants little time after its signal
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _balance(self) -> None:
        """Move a token-choice router's bias by `bias_step`, equally on all ranks, if the recipe sets one."""
        counts, self.objective.chosen = self.objective.chosen, None
        if counts is not None:
            assert self.recipe.objectives.router is not None
            router = cast(Any, self.trained).router
            counts = cast(torch.Tensor, self.accelerator.reduce(counts))
            router.bias.copy_(balanced_bias(router.bias, counts, self.recipe.objectives.router.bias_step))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out loss per token in nats, `eval_loss_r<R>` for each R of `eval_at` (`eval_loss` for a plain model).

        With answers, also the shares of right ones, `eval_accuracy_r<R>`, and `eval_accuracy_r<R>_<group>`. Logs these
        and the states. Every process calls this. Does nothing if this step was evaluated. `stop` ends it, with {}.
        """
        blocks, answers = self.blocks.held_out, self.blocks.answers
        assert blocks is not None, "the recipe names held-out text"
        if self.evaluated.get("step") == self.state.global_step:
            return self.evaluated
        started = time.perf_counter()
        shard = (self.args.process_index, self.args.world_size)
        depths = self.eval_at()
        found: Depths = {}
        for recurrences in depths:
            here = held_out(self.trained, blocks, answers, recurrences, self.recipe.batch_size, shard, self.stopping)
            if here is None:
                return {}
            found[recurrences] = HeldOut(*map(self._sum_of_ranks, vars(here).values()))
        deepest, states = max(r or 0 for r in depths), None
        if deepest >= 2 and self.trained.config.sharing != "sequence":
            states = states_of(self.trained, blocks, deepest, self.recipe.batch_size, self.args.device)
        named = metrics(found, answers, metric_key_prefix)
        self.effect = effect_of(found, states)
        self.log({**named, **state_logs(states)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        self._speed.skip(time.perf_counter() - started)
        self.evaluated = {**named, "step": self.state.global_step}
        return named

    def _sum_of_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all ranks, on the CPU."""
        if self.args.world_size == 1:
            return value
        return cast(torch.Tensor, self.accelerator.reduce(value.to(self.args.device))).cpu()

    def eval_at(self) -> list[int | None]:
        """The recurrences that `evaluate` measures at; [None] for a plain model."""
        if self.curriculum is None:
            return [None]
        chosen = self.recipe.recurrence.eval_at if self.recipe.recurrence else None
        router = getattr(self.trained.config, "router", None)
        least = self.curriculum.mean.end if router and router["kind"] == "token" else 1
        return list(chosen or sorted({least, self.curriculum.mean.end}))

    def log(self, logs, start_time=None):
        """Log `logs`; to a training loss add the mean recurrences, tokens per second and FLOPs per second."""
        step = self.state.global_step
        if "loss" in logs and (lap := self._speed.lap(step, self.state.num_input_tokens_seen)):
            steps, tokens, seconds = lap
            places = len(steps) * self.recipe.data.sequence_length * self.samples_per_step  # with padding
            found = self._rows or [self._of_step(s) for s in steps]
            if self.curriculum:
                logs["num_recurrences"] = sum(r for r, _ in found) / len(found)
            logs["tokens_per_second"] = tokens / seconds
            logs["flops_per_second"] = sum(flops for _, flops in found) * places / len(found) / seconds
            self._rows = []
        if not self.streams:
            self.state.epoch = step * self.samples_per_step / len(self.blocks.train)
        super().log(logs, start_time)

    def store_flos(self) -> None:
        """Add the FLOPs and tokens since the last call to the state, of all ranks. Every process calls this."""
        super().store_flos()
        self.state.num_input_tokens_seen += int(self._sum_of_ranks(torch.as_tensor(self._tokens)))
        self._tokens = 0

    def spent(self) -> dict[str, float]:
        """Steps, tokens without padding and training FLOPs of the whole run up to the last `store_flos`."""
        state = self.state
        return {"steps": state.global_step, "tokens": state.num_input_tokens_seen, "flops": state.total_flos}

    def floating_point_ops(self, inputs) -> int:
        """FLOPs of this micro-batch, with those of padding."""
        _, flops = self._rows[-1] if self._rows else self._of_step(self.state.global_step)
        return inputs["input_ids"].numel() * flops

    def _of_step(self, step: int) -> tuple[int, int]:
        """(R, FLOPs per token) of `step`, whose rows have one R."""
        depth = self.curriculum.at(step) if self.curriculum else None
        return depth.num_recurrences if depth else 0, step_flops(self._costs, self.objective, step, depth)
