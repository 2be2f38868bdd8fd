"""The tokenizer of a generated task: one token per character. And the chat template of all generated tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The messages of a record, one after the other, with every tokenizer: programs are no chats.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def tokenizer_with(name: str, character: str) -> str:
    """The tokenizer that has `character` of the task `name`, in words, for errors."""
    if character in TASKS[name].vocabulary:
        return f"the one of `loopwise init task:{name} OUT`"
    return "that of a pretrained model, as style=code is Python"


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the task `name`, with its chat template. Imports transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    task = TASKS[name]
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *task.vocabulary])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters = pre_tokenizers.Split("", "isolated")
    silent = [pre_tokenizers.Split(c, "removed") for c in task.silent]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*silent, characters])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
