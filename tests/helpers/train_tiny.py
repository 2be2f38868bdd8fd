"""Tiny models for training tests, and functions that start a run and read its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from loopwise.cli import main


def llama_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**sizes, **changes})


def save_recurrent(path: Path, tokenizer, source: dict | None = None, **changes) -> Path:
    import torch

    from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM

    torch.manual_seed(0)
    options = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 3, "injection": "linear"}
    config = RecurrentDepthConfig(source_config=llama_config(**(source or {})), **{**options, **changes})
    RecurrentDepthForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_for_all_commands(folder: Path, tokenizer) -> tuple[Path, Path, Path]:
    """A plain model, a recurrent one that can be exported and served, and a text, in `folder`."""
    from transformers import AutoModelForCausalLM

    text = folder / "text.txt"
    text.write_text("the core runs again while depth grows with every pass over one state " * 40)
    AutoModelForCausalLM.from_config(llama_config(eos_token_id=257)).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    recurrent = save_recurrent(folder / "recurrent", tokenizer, {"eos_token_id": 257}, injection="none")
    return folder / "plain", recurrent, text


def run(arguments: list[str]) -> None:
    assert main(arguments) == 0


def launched(arguments: list[str], launcher: str, processes: int = 2) -> subprocess.CompletedProcess:
    """`loopwise ARGUMENTS` in several processes, after its end."""
    more = ["--launcher", launcher, "--processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "loopwise", *arguments, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def history(out: Path, key: str = "loss") -> list[float]:
    records = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [record[key] for record in records if key in record]


RECURRENCE = [
    "recurrence.mean=3",
    "recurrence.schedule=1-sqrt",
    "recurrence.sampler=poisson-lognormal",
    "recurrence.backprop=2",
]
