"""A tiny model that always writes one text: a thought, an answer and a call of a tool, each with its marks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .serve_tiny import GROUPED, RECURSIVE, VOCABULARY, save, source_config

CALL = '{"name": "f", "arguments": {"x": 1}}'
MARKS = ["<think>", "</think>", "<tool_call>", CALL, "</tool_call>"]  # tokens of their own
TEXT = f"<think>why</think>ok<tool_call>{CALL}</tool_call>"
MESSAGE = {"reasoning": "why", "content": "ok", "arguments": '{"x": 1}'}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}
FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1")


def save_chain(folder: Path) -> list[int]:
    """Save the model with its tokenizer. Returns the ids of TEXT, which it writes behind a chat, at any depth.

    Its layers add nothing, and each row of its head is the embedding of the token before, in a text of which no token
    stands twice.
    """
    source = source_config("llama", **GROUPED, vocab_size=VOCABULARY + len(MARKS))
    model: Any = save(folder, source, **RECURSIVE, injection="none", num_recurrences=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(MARKS)
    tokenizer.save_pretrained(folder)
    ids: list[int] = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1.0)
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        head.zero_()
        chain = [tokenizer(":")["input_ids"][-1], *ids, tokenizer.eos_token_id]
        for before, after in pairwise(chain):
            head[after] = embeddings[before]
    model.save_pretrained(folder)
    return ids
