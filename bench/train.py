"""Memory and speed of training: what a step keeps, what a recurrence costs, and Loopwise beside a plain torch loop.

    python -m bench.train [--width 256] [--tokens 256] [--batch 4] [--steps 24] [--pairs 7]

Prints activation bytes by R under truncated backpropagation, the time of a step by R with the line through it, and
tokens/s of `loopwise train` over tokens/s of a loop in plain torch on the same model, blocks and R: median and spread
of interleaved pairs, by the wall's clock and by the processors' (which other programs disturb less; on a GPU it says
little). Bytes are those that autograd keeps. Runs where torch finds its accelerator, else on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.train.curriculum import curriculum_of
from loopwise.train.data import Mixture, build
from loopwise.train.pretrained import load_model, load_tokenizer
from loopwise.train.recipe import Train
from loopwise.train.run import prepare, work
from loopwise.train.settings import Run

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
VOCABULARY = 4096


def make(folder: Path, width: int, tokens: int, samples: int) -> tuple[Path, Path]:
    """A random model of prelude 2, core 4, coda 2 layers, and a text of random words."""
    source = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=8,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=tokens,
        eos_token_id=0,
    )
    layers = {"prelude": [0, 1], "core": [2, 3, 4, 5], "coda": [6, 7], "injection": "linear"}
    torch.manual_seed(0)
    RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source, **layers)).save_pretrained(folder / "model")
    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    from tokenizers.pre_tokenizers import Whitespace

    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder / "model")
    drawn = np.random.default_rng(0).integers(1, VOCABULARY, samples * tokens + 1)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in drawn))
    return folder / "model", folder / "text.txt"


def activation_bytes(model: Any, ids: torch.Tensor, recurrences: int, backprop: int | None) -> int:
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = forward(model, ids, recurrences, backprop)
    loss.backward()
    return sum(sizes.values())


def forward(model: Any, ids: torch.Tensor, recurrences: int, backprop: int | None) -> torch.Tensor:
    out = model(ids, num_recurrences=recurrences, grad_recurrences=backprop, use_cache=False)
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def step_seconds(model: Any, ids: torch.Tensor, recurrences: int, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        synchronise()
        start = time.perf_counter()
        forward(model, ids, recurrences, None).backward()
        synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronise() -> None:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


class Clock(TrainerCallback):
    """Seconds of the second half of a run, on the wall and of this process's processors."""

    def __init__(self, steps: int):
        self.steps, self.at = steps, [(0.0, 0.0)] * 2

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(state.global_step)

    def tick(self, done: int) -> None:
        if done in (self.steps // 2, self.steps):
            synchronise()
            self.at = [self.at[1], (time.perf_counter(), time.process_time())]

    def seconds(self) -> list[float]:
        return [end - begin for begin, end in zip(*self.at, strict=True)]


def loopwise_speed(model: Path, text: Path, recipe: Train, out: Path) -> list[float]:
    """Seconds of the second half of a run: wall, processor."""
    clock = Clock(recipe.steps or 0)
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run(str(model), out, recipe)
        prepare(run)
        work(run, callbacks=[clock])
    return clock.seconds()


def plain_speed(model: Path, recipe: Train, folder: Path) -> list[float]:
    """Those of the same half in a loop without Trainer, accelerate or Loopwise's training."""
    blocks = build(recipe.data, load_tokenizer(str(model), None), folder)
    steps, size = recipe.steps or 0, recipe.batch_size
    assert recipe.recurrence is not None
    assert recipe.recurrence.mean is not None
    curriculum = curriculum_of(recipe.recurrence, recipe.recurrence.mean, steps, recipe.seed)
    order = Mixture(blocks.parts, recipe.data.mixture(), steps * size, recipe.seed)
    loaded: Any = load_model(str(model)).train()
    loaded = loaded.to(DEVICE)
    optimiser = torch.optim.AdamW(loaded.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    clock = Clock(steps)
    for step in range(steps):
        rows = [blocks.train.tokens[order[step * size + i]] for i in range(size)]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(DEVICE)
        depth = curriculum.at(step)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = forward(loaded, ids, depth.num_recurrences, depth.grad_recurrences)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        clock.tick(step + 1)
    return clock.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    print(
        f"device {DEVICE}, {torch.get_num_threads()} threads, width {args.width}, {args.batch} x {args.tokens} tokens"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, text = make(folder, args.width, args.tokens, args.batch * args.steps)
        loaded: Any = load_model(str(model)).train()
        loaded = loaded.to(DEVICE)
        ids = torch.randint(1, VOCABULARY, (args.batch, args.tokens), device=DEVICE)
        print("\nactivations kept for the backward pass, MiB")
        print(f"{'R':>4}  {'last 4 recurrences':>18}  {'all':>8}")
        for r in (4, 8, 16, 32):
            truncated, whole = (activation_bytes(loaded, ids, r, k) / 2**20 for k in (4, None))
            print(f"{r:>4}  {truncated:>18.1f}  {whole:>8.1f}")
        depths = [1, 2, 4, 8, 16]
        seconds = [step_seconds(loaded, ids, r) for r in depths]
        slope, base = np.polyfit(depths, seconds, 1)
        fit = 1 - np.var(np.array(seconds) - np.polyval([slope, base], depths)) / np.var(seconds)
        print("\nseconds of a step by R:", "  ".join(f"{r}: {s:.3f}" for r, s in zip(depths, seconds, strict=True)))
        print(f"line: {base:.3f} + {slope:.4f} R, R^2 {fit:.4f}")
        recipe = Train.model_validate(
            {
                "data": {"train": [str(text)], "sequence_length": args.tokens},
                "recurrence": {"mean": 4, "sampler": "poisson-lognormal", "backprop": 4, "schedule": "constant"},
                "optimiser": {"schedule": "constant", "warmup": 0},
                "steps": args.steps,
                "batch_size": args.batch,
                "log_every": args.steps // 2,
                "precision": "float32" if DEVICE.type == "cpu" else "bfloat16",
            }
        )
        ratios = []
        tokens = (args.steps - args.steps // 2) * args.batch * args.tokens
        for pair in range(args.pairs):
            ours = loopwise_speed(model, text, recipe, folder / f"out{pair}")
            plain = plain_speed(model, recipe, folder / f"tokens{pair}")
            ratios.append([p / o for o, p in zip(ours, plain, strict=True)])
            speeds = f"loopwise {tokens / ours[0]:,.0f} tokens/s, plain loop {tokens / plain[0]:,.0f}"
            print(f"pair {pair + 1}: {speeds}, ratio {ratios[-1][0]:.3f}, by processor time {ratios[-1][1]:.3f}")
        for name, found in zip(("ratio", "by processor time"), zip(*ratios, strict=True), strict=True):
            print(f"{name}: median {statistics.median(found):.3f}, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
