"""Does the model find the right one of several options likeliest?"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.formats import Messages
from qlora_cli.data.formats.fields import as_list, as_text, parsed, value_of
from qlora_cli.data.formats.template import check_template, rendered
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError
from qlora_cli.tasks.choice import Choice, ChoiceTask, encode_choice
from qlora_cli.tasks.task import Measure, mean_of
from qlora_cli.types import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class MultipleChoice(ChoiceTask):
    """The likeliest option is the right one: by the sum of its tokens' log p, and by that sum over
    the bytes of the option, so that long options are not at a disadvantage (`normalized`).

    The texts are Jinja over the columns of a row.
    """

    type: Literal["multiple_choice"] = "multiple_choice"
    question: str = "{{ question }}"
    """What is asked."""
    options: str | list[str] = "choices"
    """Column that holds a list of texts; or the options themselves."""
    answer: str = "{{ answer }}"
    """The right option: its letter (A is the first), or its number from 0."""
    as_chat: bool = True
    """Put questions and options through the chat template, as a user and an assistant turn; if
    false, verbatim."""
    separator: str = " "
    """What stands between question and option in verbatim text."""
    system: str | None = None
    """System message put before each question (needs `as_chat`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        options = [] if isinstance(self.options, str) else self.options
        for text in (self.question, self.answer, *options):
            check_template(text)
        if len(options) == 1:
            raise ValueError("options names one; two are needed, or the name of a column")
        if self.data is not None and self.data.format != Messages():
            raise ValueError("data.format says nothing here: question, options and answer do")
        if self.system is not None and not self.as_chat:
            raise ValueError("system needs as_chat, which is false")
        return self

    def measures(self) -> Sequence[Measure]:
        return [mean_of("multiple_choice"), mean_of("normalized")]

    def questions(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[Choice]:
        encoder = Encoder(tokenizer)
        if self.as_chat:
            encoder.check_template()
        questions: list[Choice] = []
        for source in sources:
            bad = BadRows()
            for located in source.read(bad):
                if len(questions) == limit:
                    break
                try:
                    choice = self._choice(encoder, tokenizer, located.row, located.place)
                    questions.append(choice)
                except DataError as error:
                    bad.add(located.place, error)
            # To skip all rows would leave nothing, and not say why.
            bad.check(source.path, skip=settings.on_bad_row == "skip" and bool(questions))
        if not questions:
            raise DataError(f"{self.label}: no rows")
        return questions

    def values(self, question: Choice, log_p: list[float]) -> dict[str, float]:
        per_byte = [
            nats / len(option.encode())
            for nats, option in zip(log_p, question.options, strict=True)
        ]
        return {
            "multiple_choice": float(log_p.index(max(log_p)) == question.answer),
            "normalized": float(per_byte.index(max(per_byte)) == question.answer),
        }

    def _choice(
        self, encoder: Encoder, tokenizer: PreTrainedTokenizerFast, row: Row, place: str
    ) -> Choice:
        question = rendered("question", self.question, row)
        options = self._options(row)
        answer = _index(rendered("answer", self.answer, row).strip(), len(options))
        if not self.as_chat:
            before, turn = [Message("text", question, train=False)], Message("text", "", train=True)
            separator = self.separator
        else:
            system = [] if self.system is None else [Message("system", self.system, train=False)]
            before = [*system, Message("user", question, train=False)]
            turn, separator = Message("assistant", "", train=True), ""
        return encode_choice(
            encoder, tokenizer, before, turn, options, answer, place, separator=separator
        )

    def _options(self, row: Row) -> list[str]:
        if not isinstance(self.options, str):
            return [rendered("options", option, row) for option in self.options]
        found = parsed(value_of(row, self.options), self.options)
        options = [as_text(x, at) for at, x in as_list(found, self.options, "a list of texts")]
        if len(options) < 2:
            raise DataError(f"field '{self.options}': {len(options)} options, two are needed")
        return options


def _index(answer: str, number: int) -> int:
    """The option that a letter or a number names."""
    is_letter = len(answer) == 1 and answer in string.ascii_letters
    index = string.ascii_uppercase.index(answer.upper()) if is_letter else -1
    if answer.isascii() and answer.isdigit():
        index = int(answer)
    if not 0 <= index < number:
        raise DataError(f"answer {answer!r} names none of {number} options by letter or number")
    return index
