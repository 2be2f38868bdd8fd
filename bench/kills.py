"""SIGKILL at random moments over one run, and the weights at its end beside those of a run that nobody touched.

    python -m bench.kills [--kills 20] [--steps 400] [--seed 0] [--launcher ddp]

A third of the kills hit while a checkpoint is written, a third at any time of training, a third anywhere from the
start of the process on. Every restart says `--resume`. Prints each kill and what it left; exits 1 unless the final
weights and the state of the optimiser are equal, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM

MOMENTS = ("in a checkpoint", "in training", "from the start")


def make(folder: Path) -> tuple[Path, Path]:
    """A model that uses all that is random within a step (dropout, a random initial state), and a text."""
    vocabulary = 512
    source = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        attention_dropout=0.1,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    layers = {"prelude": [0], "core": [1, 2], "coda": [3], "injection": "linear", "state_init": "normal"}
    RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source, **layers)).save_pretrained(folder / "model")
    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder / "model")
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(f"w{draw.randrange(1, vocabulary)}" for _ in range(100_000)))
    return folder / "model", folder / "text.txt"


def start(arguments: list[str], out: Path) -> subprocess.Popen:
    resume = ["--resume"] if (out / "train_recipe.yaml").is_file() else []
    return subprocess.Popen(
        [sys.executable, "-m", "loopwise", *arguments, *resume], stdout=subprocess.DEVNULL, start_new_session=True
    )


def wait(process: subprocess.Popen, until, seconds: float = 1800) -> None:
    """Until `until()`, or the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not until():
        if time.monotonic() > deadline:
            raise TimeoutError("the run does not go on")
        time.sleep(0.001)


def newest(out: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*")), default=0)


def kill(arguments: list[str], out: Path, draw: random.Random) -> str:
    """Start the run, or go on with it, and SIGKILL it and its children at a random moment. Returns what it left."""
    started = time.time()
    process, began, moment = start(arguments, out), newest(out), draw.choice(MOMENTS)
    try:
        if moment == "from the start":
            time.sleep(draw.uniform(0, 15))
        else:
            wait(process, lambda: newest(out) > began)
            time.sleep(draw.uniform(0, 2))
        if moment == "in a checkpoint":
            wait(process, lambda: any(out.glob(".checkpoint-*.partial")))
            time.sleep(draw.uniform(0, 0.05))
        ended = process.poll()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.wait()
    if ended is not None:
        raise RuntimeError(f"the run ended by itself with {ended} after step {newest(out)}: give more --steps")
    # Of this start: what an earlier kill left is removed only once a run has begun.
    half = any(path.stat().st_mtime >= started for path in out.glob(".checkpoint-*.partial"))
    return f"{moment}: step {newest(out)}{', a checkpoint half written' if half else ''}"


def equal(one: object, two: object) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return one == two


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", help="as that of loopwise train, with 2 processes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, text = make(folder)
        settings = [f"data.train={text}", "data.sequence_length=64", "batch_size=4", f"steps={args.steps}"]
        settings += ["save_every=2", "recurrence.mean=3", "recurrence.sampler=poisson-lognormal"]
        settings += ["recurrence.backprop=2", "recurrence.schedule=linear", "log_every=100"]
        settings += ["--launcher", args.launcher, "--processes", "2"] if args.launcher else []
        killed, whole = folder / "killed", folder / "whole"
        draw = random.Random(args.seed)
        found = []
        for number in range(1, args.kills + 1):
            found.append(kill(["train", str(model), str(killed), *settings], killed, draw))
            print(f"kill {number}, {found[-1]}", flush=True)
        for out in (killed, whole):
            if start(["train", str(model), str(out), *settings], out).wait():
                return 1
        weights = equal(*(load_file(out / "model.safetensors") for out in (killed, whole)))
        last = f"checkpoint-{args.steps // 2 * 2}/optimizer.pt"
        states = equal(*(torch.load(out / last, weights_only=True) for out in (killed, whole)))
        left = [str(path) for path in killed.glob(".*")]
        half = sum("half written" in line for line in found)
        print(f"{args.kills} kills, {half} with a checkpoint half written, over {args.steps} steps")
        print(f"final weights bit-equal: {weights}; optimiser bit-equal: {states}; left behind: {left or 'nothing'}")
        return 0 if weights and states and not left else 1


if __name__ == "__main__":
    sys.exit(main())
