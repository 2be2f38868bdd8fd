"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys

from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Shows each log record: loss, mean recurrences, learning rate and speed, or held-out losses by depth."""

    def __init__(self, steps: int):
        self.steps = steps
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        line = describe(logs)
        if not line:
            return
        if self.bar is None:
            print(f"step {state.global_step}/{self.steps}  {line}", flush=True)
        elif "loss" in logs:
            self.bar.set_postfix_str(line)
        else:
            self.bar.write(f"step {state.global_step}/{self.steps}  {line}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def describe(logs: dict[str, float]) -> str:
    """A log record in one line; "" for a record without a loss."""
    held_out = []
    for name, value in logs.items():
        if name.startswith("eval_loss"):
            at = name.removeprefix("eval_loss")
            share = logs.get(f"eval_accuracy{at}")
            right = "" if share is None else f" ({100 * share:.1f} % right)"
            held_out.append(f"R={at[2:]} {value:.4f}{right}" if at else f"{value:.4f}{right}")
    if held_out:
        return "held-out loss  " + "  ".join(held_out)
    if "loss" not in logs:
        return ""
    parts = [f"loss {logs['loss']:.4f}"]
    if "num_recurrences" in logs:
        parts.append(f"R {logs['num_recurrences']:.1f}")
    parts.append(f"lr {logs['learning_rate']:.2e}")
    parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{logs['flops_per_second'] / 1e9:,.1f} GFLOP/s")
    return "  ".join(parts)
