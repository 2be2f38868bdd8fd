"""Fixtures of tests/train and tests/evaluation: a byte-level tokenizer, tiny models and a text, without downloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.train_tiny import llama_config, save_recurrent

WORDS = ["the", "core", "runs", "again", "while", "depth", "grows", "with", "every", "pass", "over", "one", "state"]


@pytest.fixture(scope="session")
def text() -> list[str]:
    """Documents whose loss a tiny model can lower in a few steps."""
    return [" ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(30 + i % 7)) for i in range(1, 121)]


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def plain(tmp_path_factory, tokenizer) -> Path:
    """A plain Llama of 4 layers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "plain"
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def recurrent(tmp_path_factory, tokenizer) -> Path:
    """A recurrent-depth model: prelude 1, core 2, coda 1 layers, linear injection."""
    return save_recurrent(tmp_path_factory.mktemp("models") / "recurrent", tokenizer)


@pytest.fixture(scope="session")
def noisy(tmp_path_factory, tokenizer) -> Path:
    """A recurrent-depth model with a random initial state and dropout, the random parts of a step."""
    path = tmp_path_factory.mktemp("models") / "noisy"
    return save_recurrent(path, tokenizer, {"attention_dropout": 0.1}, state_init="normal", state_std=0.5)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, text) -> Path:
    import json

    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in text))
    return path


@pytest.fixture(scope="session")
def command(corpus):
    """Arguments of a short run on the corpus: `command(model, out, "key=value", ...)`."""

    def arguments(model: Path, out: Path, *settings: str) -> list[str]:
        data = [f"data.train={corpus}", "data.sequence_length=32", "batch_size=4", "optimiser.learning_rate=3e-3"]
        return ["train", str(model), str(out), *data, *settings]

    return arguments
