"""A reader turns records into documents: texts, or conversations encoded with the chat template."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopwise.errors import UserError

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
    instead of the tokenizer's.
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

    @property
    def columns(self) -> list[str]:
        """The columns of a table that are read."""
        more = [self.recurrences.field] if self.recurrences else []
        return list(dict.fromkeys([self.field, *(ARGUMENTS if self.chat else ()), *more]))

    def document(self, record: Any, where: str) -> Any:
        """The Document of a record, or None if the record was skipped. `where`: the record's place, for errors.

        Raises UserError for a bad record, unless `skip`.
        """
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
