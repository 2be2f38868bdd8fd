"""A reader turns records into documents: texts, or conversations encoded with the chat template."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopwise.errors import UserError

from .. import tasks
from ..recipe import RecordRecurrences
from .chat import ARGUMENTS, Encoded, conversation_of, encode
from .files import no_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = 10  # skipped records that are named one by one


class Text(str):
    """A text whose record has a mean R of its own, `recurrences`."""

    recurrences = 0


Document = str | Encoded


@dataclass
class Reader:
    """Makes documents of records: the text in `field`, or with `chat` the conversation there.

    tokenizer: encodes conversations; not used for text.   skip: name a bad record on stderr and leave it out, instead
    of stopping.   recurrences: gives R of a record.   skipped: number of records left out so far.   chat_template: used
    instead of the tokenizer's.   task: name of the generated task that is read, whose characters must all be known.
    """

    field: str = "text"
    split: str = "train"
    subset: str | None = None
    chat: bool = False
    skip: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    recurrences: RecordRecurrences | None = None
    skipped: int = 0
    chat_template: str | None = None
    task: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns of a table that are read."""
        more = [self.recurrences.field] if self.recurrences else []
        return list(dict.fromkeys([self.field, *(ARGUMENTS if self.chat else ()), *more]))

    def document(self, record: Any, where: str) -> Any:
        """The Document of a record, or None if the record was skipped. `where`: the record's place, for errors.

        Raises UserError for a bad record, unless `skip`, and for a tokenizer that lacks a character of a task.
        """
        found = self._document(record, where)
        if self.task and found and (character := _unknown(found.ids, record[self.field], self.tokenizer)):
            raise UserError(
                f"task:{self.task}: the tokenizer has no token for {character!r}; use "
                f"{tasks.tokenizer_with(self.task, character)}"
            )
        return found

    def _document(self, record: Any, where: str) -> Any:
        try:
            value = _value(record, where, self.field, self.chat)
            if self.chat:
                conversation = conversation_of(record, self.field, where)
                found: Any = encode(conversation, self.tokenizer, where, self.chat_template)
            else:
                found = _text(value, where, self.field)
            if self.recurrences and (recurrences := _recurrences(self.recurrences, record, where)):
                found = found if self.chat else Text(found)
                found.recurrences = recurrences
            return found
        except UserError as error:
            self.reject(error)
            return None

    def reject(self, error: UserError) -> None:
        """Count a bad record and name it on stderr. Raises `error` unless `skip`."""
        if not self.skip:
            raise error
        self.skipped += 1
        if self.skipped <= NAMED:
            more = "; the next ones are not named" if self.skipped == NAMED else ""
            print(f"skipped {error}{more}", file=sys.stderr)


def _unknown(ids: list[int], messages: Any, tokenizer: Any) -> str | None:
    """The first character of `messages` that the tokenizer lacks; None if it has all tokens of them, `ids`."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown not in ids:
        return None
    text = "".join(message["content"] for message in messages)
    return next((c for c in text if unknown in tokenizer(c, add_special_tokens=False)["input_ids"]), text)


def _value(record: Any, where: str, field: str, chat: bool) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is an object with a field {field!r}, not a {type(record).__name__}")
    if field not in record:
        raise no_field(where, field, record, chat)
    return record[field]


def _recurrences(keys: RecordRecurrences, record: dict[str, Any], where: str) -> int:
    try:
        return keys.of(record)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} is not text: half a surrogate at {error.start}") from None
    return value
