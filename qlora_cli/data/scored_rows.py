"""Read the rows that a head scores: as in training, with or without a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.data.encode.encoder import Encoder, RefusedRow
from qlora_cli.data.formats import FormatConfig, Labelled, Preference
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Example, Row

if TYPE_CHECKING:
    from qlora_cli.data.encode.truncate import Truncate
    from qlora_cli.data.formats.labelled import Label

_COMPLETION = "completion"
_CONVERSATIONS = ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row to score, as tokens."""

    example: Example
    text: str
    """Content of its last message."""
    label: Label | None
    """The row's own label; None if it has none."""
    is_cut: bool
    """It was longer than the model was trained on."""


class ScoredRowReader:
    """Turn rows into tokens, in the form of the training rows.

    Args:
        formats: data formats that the model was trained on; [] if they are not known, for the
            columns `text`, `messages`, `conversations`, or `prompt` with or without `completion`.
        encoder: has the tokenizer of the model.
        max_length: tokens of a row; a longer one is cut.
        truncate: what is cut.
    """

    def __init__(
        self,
        formats: Sequence[FormatConfig],
        encoder: Encoder,
        *,
        max_length: int,
        truncate: Truncate,
    ) -> None:
        self._formats = formats
        self._encoder = encoder
        self._max_length = max_length
        # Each row gets a score, so none is left out, and none becomes several.
        self._truncate: Truncate = "cut_prompt" if truncate == "cut_prompt" else "cut_end"

    def read(self, row: Row | str) -> ScoredRow:
        """Encode a row, or a text alone.

        Raises:
            DataError: it has no content in any of the formats, or the chat template refuses it.
        """
        if isinstance(row, str):
            row = {_text_field(self._formats): row}
        conversation, label = self._conversation(row)
        [encoded] = self._encoder.encode_rows(
            [conversation], max_length=self._max_length, truncate=self._truncate
        )
        if isinstance(encoded, RefusedRow):
            raise DataError(encoded.reason)
        if not encoded.examples:
            raise DataError(encoded.lost or "nothing of the row is left")
        example, *_ = encoded.examples
        is_cut = encoded.length > len(example.input_ids)
        return ScoredRow(example, conversation.messages[-1].content, label, is_cut)

    def _conversation(self, row: Row) -> tuple[Conversation, Label | None]:
        problem: DataError | None = None
        is_answered = row.get(_COMPLETION) is not None
        for format in self._formats or [Preference() if is_answered else Labelled()]:
            try:
                if isinstance(format, Preference):
                    return _answered(row, format), None
                if isinstance(format, Labelled):
                    return _labelled(row, format)
            except DataError as error:
                problem = error
        raise problem or DataError("the run has no format whose rows can be scored")


def _text_field(formats: Sequence[FormatConfig]) -> str:
    """Return the column of a text alone."""
    named = [format.field for format in formats if isinstance(format, Labelled)]
    return next(filter(None, named), "text")


def _labelled(row: Row, format: Labelled) -> tuple[Conversation, Label | None]:
    """Read a row whose label may be missing."""
    if row.get(format.label_field) is not None:
        conversation = format.to_conversation(row)
        return conversation, conversation.label
    return format.to_conversation({**row, format.label_field: 0}), None


def _answered(row: Row, format: Preference) -> Conversation:
    """Read a prompt with one answer, or a whole conversation, for a reward model."""
    if row.get(_COMPLETION) is not None:
        answer = row[_COMPLETION]
    elif found := [name for name in _CONVERSATIONS if row.get(name) is not None]:
        answer = row[found[0]]
        row = {name: value for name, value in row.items() if name != found[0]}
    elif row.get(format.rejected_field) is not None:
        raise DataError(
            f"field '{format.rejected_field}': a row to score has one answer; qlora eval compares "
            "pairs"
        )
    elif row.get(format.chosen_field) is not None:
        answer = row[format.chosen_field]
    else:
        raise DataError(
            f"found {', '.join(map(repr, row)) or 'nothing'}; expected a prompt and a "
            f"'{_COMPLETION}', or whole conversations in 'messages' or 'conversations'"
        )
    pair = {**row, format.chosen_field: answer, format.rejected_field: answer}
    return replace(format.to_conversation(pair), rejected=None, margin=None)
