"""Tiny random source models, one for each supported architecture, and checkpoints of them on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import get_layer_types_and_kwargs

from loopwise.model.configuration_source import KEYS_ALONE, keeps_state
from tests.helpers.tiny_configs import ARCHITECTURES, SLOW, VOCAB


def source_config(model_type: str, **fields: Any) -> Any:
    """Config of a tiny model of that architecture: 6 layers, head size 32."""
    return AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], **fields})


def named(model_types: Iterable[str] = ARCHITECTURES, every: int = 1) -> list[Any]:
    """Parameters of a test by architecture, of which some are slow, and all but each `every`-th."""
    names = sorted({*model_types})
    slow = {name for number, name in enumerate(names) if name in SLOW or number % every}
    return [pytest.param(name, id=name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


def kinds(model_type: str) -> set[str]:
    """The attention types of its layers."""
    return set(get_layer_types_and_kwargs(source_config(model_type))[0])


def with_state() -> list[str]:
    """The architectures with layers that keep a state."""
    return [name for name in ARCHITECTURES if any(map(keeps_state, kinds(name)))]


def keeping_more() -> list[str]:
    """The architectures with layers that keep more than keys and values."""
    return [name for name in ARCHITECTURES if kinds(name) - {*KEYS_ALONE}]


def attention(config: Any) -> str | None:
    """The implementation that computes the architecture: transformers' sdpa leaves out the cap on attention scores."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def load_source(directory: Path) -> Any:
    """The plain model of a checkpoint."""
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention(config)).eval()


def source_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """A tiny model in float32 with weights large enough that every layer matters."""
    torch.manual_seed(seed)
    config = source_config(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention(config)).float().eval()
    for parameter in model.parameters():
        std = 0.08 if parameter.dim() > 1 else 0.2
        mean = 0.0 if parameter.dim() > 1 else parameter.data.mean().item()
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of VOCAB tokens with a chat template."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["def f(x):\n    return x + 1\n", "the cat sat on the mat\n"] * 8, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return fast


def save_source(directory: Path, model_type: str = "llama", seed: int = 0, shard: str = "5GB", **fields: Any) -> Path:
    """A tiny checkpoint with tokenizer, chat template and generation config in `directory`."""
    model = source_model(model_type, seed, **fields)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(directory, max_shard_size=shard)
    tokenizer().save_pretrained(directory)
    return directory
