"""Conversations through a tokenizer's chat template, with the tokens that the assistant says marked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from loopwise.errors import UserError, reason, shorten

Messages = list[dict[str, Any]]

# Fields of a record that go to the template beside its messages, as TRL hands them on.
ARGUMENTS = ("tools", "documents", "chat_template_kwargs")
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass
class Conversation:
    """messages: as transformers' chat templates take them.   arguments: of the template beside them."""

    messages: Messages
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Encoded:
    """A conversation's token ids, and which of them are learned. key: the text that tells it from others."""

    ids: list[int]
    said: list[bool]
    ended: bool  # whether EOS, which follows, is learned
    key: str


def conversation_of(record: dict[str, Any], name: str, where: str) -> Conversation:
    """The conversation in the field `name` of `record`, with its tools and what else the template is given.

    Raises UserError, which begins with `where`, for what is none, and for one in which the assistant says nothing.
    """
    messages = messages_of(record[name], f"{where}: field {name!r}")
    arguments: dict[str, Any] = {}
    for key in ARGUMENTS:
        value = record.get(key)
        if isinstance(value, str):  # tables hold what has no fixed columns as JSON
            try:
                value = json.loads(value) if value else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: field {key!r} is not JSON ({reason(error)})") from None
        if not value:
            continue
        kind = dict if key == "chat_template_kwargs" else list
        if not isinstance(value, kind):
            told = "an object" if kind is dict else "a list"
            raise UserError(f"{where}: field {key!r} is {told}, not a {type(value).__name__}")
        value = without_nulls(value)
        arguments.update(value if kind is dict else {key: value})
    for key in ("messages", "conversation", "tokenize", "add_generation_prompt", "return_dict", "chat_template"):
        if key in arguments:
            raise UserError(f"{where}: chat_template_kwargs names {key!r}, which training itself sets")
    return Conversation(messages, arguments)


def messages_of(value: Any, where: str) -> Messages:
    """`value`, checked: a list of {"role", "content"} with at least one of the assistant. Raises UserError.

    Text in parts is joined, and a field without a value left out, as tables have it for every field of any message.
    """
    if not isinstance(value, list) or not value:
        what = "an empty one" if value == [] else type(value).__name__
        raise UserError(f"{where}: a conversation is a list of messages, not {what}")
    found = []
    for number, message in enumerate(value):
        fields = without_nulls(message) if isinstance(message, dict) else {}
        fields["content"] = _content(fields.get("content"), f"{where}: message {number}")
        if not isinstance(fields.get("role"), str) or (fields["content"] is None and not fields.get("tool_calls")):
            raise UserError(f"{where}: message {number} lacks text in 'role' or 'content'")
        found.append(fields)
    if not any(message["role"] == "assistant" for message in found):
        raise UserError(f"{where}: no message of the assistant, so nothing to learn")
    return found


def _content(content: Any, where: str) -> str | None:
    if not isinstance(content, list):
        return content if content is None or isinstance(content, str) else None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}: a part of its content is {kind!r}, and only text can be learned from")
        texts.append(text)
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """`value` without the fields, at any depth, that hold null."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def encode(conversation: Conversation, tokenizer: Any, where: str) -> Encoded:
    """Token ids of a conversation, and which of them the assistant says.

    A template that marks them with {% generation %} is asked; else they are what a message of the assistant adds to the
    conversation so far with its generation prompt. Where the assistant has the last word, some stop token after it is
    learned: the template's own, or the EOS that ends every document.

    Raises UserError, which begins with `where`, for what the template refuses or does not mark.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise UserError("data.chat_field: the tokenizer has no chat template; set one, or use data.text_field")
    messages, arguments = conversation.messages, conversation.arguments
    try:
        if isinstance(template, dict):
            template = tokenizer.get_chat_template(None, arguments.get("tools"))
        if MARKED.search(template):
            ids, said = _marked(messages, tokenizer, arguments)
        else:
            ids, said = _compared(messages, tokenizer, arguments)
        key = json.dumps(messages if not arguments else [messages, arguments], default=str)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # a template is a program: it raises errors of its own, and any of Python's
        raise UserError(f"{where}: the chat template refuses it ({shorten(reason(error), 200)})") from None
    if not any(said):
        raise UserError(f"{where}: the chat template marks nothing as said by the assistant, so nothing to learn")
    ended = messages[-1]["role"] == "assistant" and _learn_to_stop(ids, said, tokenizer)
    return Encoded(ids, said, ended, key)


def _marked(messages: Messages, tokenizer: Any, arguments: dict[str, Any]) -> tuple[list[int], list[bool]]:
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
    )
    return list(out["input_ids"]), [bool(x) for x in out["assistant_masks"]]


def _compared(messages: Messages, tokenizer: Any, arguments: dict[str, Any]) -> tuple[list[int], list[bool]]:
    def render(until: int, prompt: bool = False) -> str:
        keys = {"tokenize": False, "add_generation_prompt": prompt, **arguments}
        return tokenizer.apply_chat_template(messages[:until], **keys) if until else ""

    text = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, prompt=True), render(i + 1)
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise UserError(
                    "this chat template changes earlier messages when later ones are added, so what the assistant says "
                    "cannot be told apart; mark it with {% generation %} in the template"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    said = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), said


def _learn_to_stop(ids: list[int], said: list[bool], tokenizer: Any) -> bool:
    """See that a stop token behind the assistant's last word is learned; returns whether that has to be the EOS.

    A template may end a turn with a token of its own, within what it marks or right behind, or with none.
    """
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    last = max(place for place, learned in enumerate(said) if learned)
    for place in range(last, -1, -1):
        if ids[place] in special:
            return False  # learned already
        if not said[place] or tokenizer.decode([ids[place]]).strip():
            break
    for place in range(last + 1, len(ids)):
        if ids[place] in special:
            said[place] = True
            return False
        if tokenizer.decode([ids[place]]).strip():
            return False  # the template goes on behind the assistant's last word: nothing there is to be learned
    return True
