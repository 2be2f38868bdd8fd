"""The keys of `loopwise plot` for a picture of a model on a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from ...errors import UserError
from ...input_files import check_regular
from ...recipe import Count, Integer, Number, Section
from ...train.recipe.fields import once
from ...unused import Unused


class Picture(Section):
    """A model on a text."""

    text: str | None = Field(default=None, description="the text")
    file: str | None = Field(default=None, description="a file with the text, in place of text")
    num_recurrences: Count | None = Field(default=None, description="R (default: the model's)")
    min_recurrences: Count | None = Field(default=None, description="recurrences before the exit rule may fire")
    exit_rule: str | None = Field(
        default=None, description="when a token has recurred enough (default: the model's, or fixed)"
    )
    exit_threshold: Number | None = Field(default=None, description="of the exit rule (default: the rule's own)")
    kv_policy: str | None = Field(
        default=None, description="which recurrences keep keys and values (default: the model's)"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of MODEL when it is a hub id")
    tokens: Annotated[list[Annotated[Integer, Field(ge=0)]], AfterValidator(once)] | None = Field(
        default=None,
        min_length=1,
        description="states: positions of the tokens to follow, from 0 (default: six, not the first)",
    )

    @model_validator(mode="after")
    def _one_text(self) -> Picture:
        if (self.text is None) == (self.file is None):
            raise ValueError("give the text by text=... or by file=..., one of the two")
        if self.text is not None and not self.text:
            raise ValueError("text= is empty")
        return self

    def unused(self) -> Iterator[Unused]:
        if self.exit_rule == "fixed":
            for name in ("exit_threshold", "min_recurrences"):
                yield Unused(name, ("exit_rule",), "exit_rule is fixed, so all tokens run at the same depth")

    @property
    def content(self) -> str:
        """The text itself. Raises UserError for a file that is no text, or empty."""
        if self.text is not None:
            return self.text
        check_regular(Path(self.file or "").expanduser(), f"file={self.file}")
        try:
            text = Path(self.file or "").expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"file={self.file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"file={self.file}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None
        if not text:
            raise UserError(f"file={self.file}: it is empty")
        return text
