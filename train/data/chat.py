"""Conversations through a tokenizer's chat template, with a mask of the assistant's tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loopwise.bounded import bounded, check_text
from loopwise.errors import UserError, reason, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]  # (first character, end) of each in a text
TEMPLATE = "the chat template"  # begins the messages of its limits

# Fields of a record that the template gets beside its messages, as in TRL.
ARGUMENTS = ("tools", "documents", "chat_template_kwargs")
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass
class Conversation:
    """messages: in the form of transformers' chat templates.   arguments: more arguments of the template."""

    messages: Messages
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Encoded:
    """A tokenized conversation.

    ids: token ids.   assistant_mask: True for each id in the loss.   learns_eos: True if the EOS that follows is in the
    loss.   key: text that identifies the conversation.   recurrences: mean R of the record, 0 for none.
    """

    ids: list[int]
    assistant_mask: list[bool]
    learns_eos: bool
    key: str
    recurrences: int = 0


def conversation_of(record: dict[str, Any], name: str, where: str) -> Conversation:
    """The conversation in the field `name` of `record`, with its tools and other template arguments.

    Raises UserError, which begins with `where`, for a malformed conversation or one without an assistant message.
    """
    messages = messages_of(record[name], f"{where}: field {name!r}")
    arguments: dict[str, Any] = {}
    for key in ARGUMENTS:
        value = record.get(key)
        if isinstance(value, str):  # tables store values without fixed columns as JSON
            try:
                value = json.loads(value) if value else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: field {key!r} is not JSON ({reason(error)})") from None
        if not value:
            continue
        kind = dict if key == "chat_template_kwargs" else list
        if not isinstance(value, kind):
            expected = "an object" if kind is dict else "a list"
            raise UserError(f"{where}: field {key!r} is {expected}, not a {type(value).__name__}")
        value = without_nulls(value)
        arguments.update(value if kind is dict else {key: value})
    for key in ("messages", "conversation", "tokenize", "add_generation_prompt", "return_dict", "chat_template"):
        if key in arguments:
            raise UserError(f"{where}: chat_template_kwargs names {key!r}, which training sets itself")
    return Conversation(messages, arguments)


def messages_of(value: Any, where: str) -> Messages:
    """`value` as messages: a list of {"role", "content"} with at least one assistant message.

    Text parts are joined. Fields that hold null are dropped: tables have every field in every message. Raises
    UserError, which begins with `where`, for any other value.
    """
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else type(value).__name__
        raise UserError(f"{where}: a conversation is a list of messages, not {found}")
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
            raise UserError(f"{where}: a part of its content is {kind!r}, and only text is supported")
        texts.append(text)
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """`value` without the fields that hold null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase | None,
    where: str,
    chat_template: str | None = None,
) -> Encoded:
    """Token ids of a conversation, and the mask of the assistant's tokens.

    chat_template: takes the place of the tokenizer's.

    The mask comes from {% generation %} in the template. Without it, an assistant message is the text that it adds to
    the conversation so far with its generation prompt. After a last message of the assistant one stop token is in the
    loss: the template's own, or the EOS that ends every document.

    Raises UserError, which begins with `where`, for a conversation that the template refuses or leaves unmarked.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if tokenizer is None or template is None:
        raise UserError("data.chat_field: the tokenizer has no chat template; set one, or use data.text_field")
    messages, arguments = conversation.messages, conversation.arguments
    given = {**arguments, "chat_template": chat_template} if chat_template else arguments
    try:
        if isinstance(template, dict):
            template = tokenizer.get_chat_template(None, arguments.get("tools"))
        # Tokens come afterwards: no signal ends a tokenizer's own code, and for want of memory it aborts the process.
        with bounded(TEMPLATE):
            marked = bool(MARKED.search(template))
            text, spans = (_by_marks if marked else _by_prefixes)(messages, tokenizer, given)
        ids, mask = (_with_marks if marked else _with_prefixes)(check_text(TEMPLATE, text), spans, tokenizer)
        key = json.dumps(messages if not arguments else [messages, arguments], default=str)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # a template is a program, which may raise any error
        raise UserError(f"{where}: the chat template refuses it ({shorten(reason(error), 200)})") from None
    if not any(mask):
        raise UserError(f"{where}: the chat template marks no tokens of the assistant, so nothing to learn")
    learns_eos = messages[-1]["role"] == "assistant" and _mark_stop(ids, mask, tokenizer)
    return Encoded(ids, mask, learns_eos, key)


def _by_marks(messages: Messages, tokenizer: Any, arguments: dict[str, Any]) -> tuple[str, Spans]:
    """The text of a conversation, and the places between {% generation %} and its end."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {**tokenizer.special_tokens_map, **arguments}
    given["chat_template"] = tokenizer.get_chat_template(arguments.get("chat_template"), arguments.get("tools"))
    made: Any = render_jinja_template(conversations=[messages], return_assistant_tokens_mask=True, **given)
    return made[0][0], made[1][0]


def _with_marks(text: str, spans: Spans, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of `text`, and those from the one that holds a span's first character to that of its last one, as
    transformers' `return_assistant_tokens_mask`."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = list(encoded["input_ids"]), []
    starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    bounds = np.array([(start, end - 1) for start, end in spans if end], np.int64).reshape(-1, 2)
    # The first token that ends behind a character holds it, unless the tokenizer has left the character out.
    found = np.searchsorted(np.maximum.accumulate(ends), bounds, side="right")
    held = (found < len(ids)) & (np.append(starts, 0)[found] <= bounds)
    for (first, last), (has_first, has_last) in zip(found.tolist(), held.tolist(), strict=True):
        if not has_first:
            break
        places.append((first, last + 1 if has_last and last else len(ids)))
    return ids, _covered(places, len(ids)).tolist()


def _by_prefixes(messages: Messages, tokenizer: Any, arguments: dict[str, Any]) -> tuple[str, Spans]:
    """The text of a conversation, and the places that each message of the assistant adds behind its prompt."""

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
                    "this chat template changes earlier messages when later ones are added, so the assistant's "
                    "tokens cannot be found; mark them with {% generation %} in the template"
                )
            spans.append((len(before), len(after)))
    return text, spans


def _with_prefixes(text: str, spans: Spans, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of `text`, and those that begin inside of a span."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    inside = _covered(spans, max([len(text) + 1, *(end for _, end in spans)]))
    return list(encoded["input_ids"]), inside[starts].tolist()


def _covered(spans: Spans, size: int) -> np.ndarray:
    """True [size] for the places that a span holds. The time is that of spans and places in sum, not their product."""
    edges = np.zeros(size + 1, np.int64)
    begin, end = np.array([span for span in spans if span[0] < span[1]], np.int64).reshape(-1, 2).T
    np.add.at(edges, begin, 1)
    np.subtract.at(edges, end, 1)
    return edges[:-1].cumsum() > 0


def _mark_stop(ids: list[int], mask: list[bool], tokenizer: Any) -> bool:
    """Add the stop token after the assistant's last message to `mask`. Returns True if only the EOS can be that token.

    A template may end a turn with its own token, inside of the marked span or right after it, or with none.
    """
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    last = max(place for place, learned in enumerate(mask) if learned)
    for place in range(last, -1, -1):
        if ids[place] in special:
            return False  # a stop token is already in the mask
        if not mask[place] or tokenizer.decode([ids[place]]).strip():
            break
    for place in range(last + 1, len(ids)):
        if ids[place] in special:
            mask[place] = True
            return False
        if tokenizer.decode([ids[place]]).strip():
            return False  # the template writes more text after the assistant's last message
    return True
