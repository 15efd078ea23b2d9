"""Format for texts and conversations with a label: a class, several classes, or a number."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qlora_cli.common.config import Config
from qlora_cli.data.formats.answers import not_supervised, with_system
from qlora_cli.data.formats.fields import as_list, as_text, missing, shown, text_of, value_of
from qlora_cli.data.formats.template import check_template, rendered
from qlora_cli.data.formats.turns import check_turns, messages_of, read_tools
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Row, RowKind

_CONTENTS = ("text", "messages", "conversations", "prompt")

Label = bool | float | str | tuple[str, ...]


class Labelled(Config):
    """A text or a conversation, and its `label` (for the objective `classify`).

    The content is in the column `text`, `messages`, `conversations` or `prompt`. A text is used
    verbatim; messages (OpenAI or ShareGPT) go through the chat template. The label is a text or
    number, or a list of texts for rows with any number of classes.
    """

    example: ClassVar[Row] = {"label": "geography", "text": "The capital of France is Paris."}

    rows: ClassVar[RowKind] = "labels"
    type: Literal["labelled"] = "labelled"
    field: str | None = None
    """Column that holds the text or the messages; null takes the one of the four above that the row
    has."""
    text: str | None = None
    """Jinja text over the columns of a row instead of one column, such as
    `{{ premise }} => {{ hypothesis }}`."""
    label_field: str = "label"
    """Column that holds the label."""
    as_chat: bool = False
    """Put a text through the chat template, as a user turn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text is not None:
            if self.field is not None:
                raise ValueError(
                    f"field ({self.field!r}) and text are both given; remove one of them"
                )
            try:
                check_template(self.text)
            except ValueError as error:
                raise ValueError(f"text: {error}") from error
        if self.field == self.label_field:
            raise ValueError(f"field and label_field are the same column ({self.field!r})")
        return self

    def to_conversation(self, row: Row) -> Conversation:
        """Read the content and the label.

        No turn has `train`: a head reads the last token of the row, and predicts no tokens.
        """
        label = self._label(row)
        if self.text is not None:
            return self._of_text(row, rendered("text", self.text, row), label)
        field = self._content_field(row)
        if isinstance(row.get(field), str):
            return self._of_text(row, text_of(row, field), label)
        messages = check_turns(with_system(row, messages_of(row, field, "user")), field)
        return Conversation(not_supervised(messages), tools=read_tools(row), label=label)

    def _of_text(self, row: Row, text: str, label: Label) -> Conversation:
        if not self.as_chat:
            return Conversation([Message("text", text, train=False)], label=label)
        turns = with_system(row, [Message("user", text, train=False)])
        return Conversation(turns, tools=read_tools(row), label=label)

    def _content_field(self, row: Row) -> str:
        if self.field is not None:
            return self.field
        given = [field for field in _CONTENTS if row.get(field) is not None]
        if len(given) > 1:
            raise DataError(
                f"field '{given[1]}': '{given[0]}' has a content too; name one of them in "
                "format.field"
            )
        if given:
            return given[0]
        if named := [field for field in _CONTENTS if field in row]:
            raise DataError(f"field '{named[0]}': got null, expected text or messages")
        others = ", ".join(_CONTENTS[1:])
        raise DataError(f"field 'text': {missing('text', row)}; also read: {others}")

    def _label(self, row: Row) -> Label:
        field = self.label_field
        value: Any = value_of(row, field)
        if isinstance(value, list):
            entries = as_list(value, field, "a list of labels")
            # Indices of classes stay whole numbers, written as text.
            names = tuple(
                str(entry) if type(entry) is int else as_text(entry, where)
                for where, entry in entries
            )
            if repeated := [name for name in names if names.count(name) > 1]:
                raise DataError(f"field '{field}': {repeated[0]!r} is in it twice")
            return names
        if isinstance(value, str):
            return as_text(value, field)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return value
        raise DataError(
            f"field '{field}': got {shown(value)}, expected a text, a number or a list of labels"
        )
