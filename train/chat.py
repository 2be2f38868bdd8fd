"""Conversations through a tokenizer's chat template, with the tokens that the assistant says marked."""

from __future__ import annotations

from typing import Any

from loopwise.errors import UserError

Messages = list[dict[str, Any]]


def messages_of(value: Any, where: str) -> Messages:
    """`value`, checked: a list of {"role", "content"} with at least one of the assistant. Raises UserError."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: a conversation is a list of messages, not {type(value).__name__}")
    for number, message in enumerate(value):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise UserError(f"{where}: message {number} lacks text in 'role' or 'content'")
    if not any(message["role"] == "assistant" for message in value):
        raise UserError(f"{where}: no message of the assistant, so nothing to learn")
    return value


def encode(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says.

    A template that marks them with {% generation %} is asked; else they are what a message of the assistant adds to the
    conversation so far with its generation prompt. Raises UserError where the template does not allow that.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise UserError("data.chat_field: the tokenizer has no chat template; set one, or use data.text_field")
    if "{% generation %}" in template or "{%- generation %}" in template:
        out = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), [bool(x) for x in out["assistant_masks"]]
    text = _render(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = _render(tokenizer, messages[:i], prompt=True), _render(tokenizer, messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise UserError(
                    "data.chat_field: this chat template changes earlier messages when later ones are added, so what "
                    "the assistant says cannot be told apart; mark it with {% generation %} in the template"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    said = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], said


def _render(tokenizer: Any, messages: Messages, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) if messages else ""
