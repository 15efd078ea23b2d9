"""Choose the most likely of several options."""

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
from qlora_cli.tasks.choice import ChoiceItem, encode_choice, evaluate_choices, place_and_length
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, mean_of
from qlora_cli.types import Conversation, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class MultipleChoice(Task):
    """The most likely option is the correct one.

    The score of an option is the sum of its tokens' log p. The measure `normalized` divides it by
    the bytes of the option, so that long options are not at a disadvantage. Texts are Jinja
    templates over the columns of a row.
    """

    type: Literal["multiple_choice"] = "multiple_choice"
    question: str = "{{ question }}"
    """Text of the question."""
    options: str | list[str] = "choices"
    """Name of a column that holds a list of texts, or the options themselves."""
    answer: str = "{{ answer }}"
    """The correct option: its letter (A is the first), or its number from 0."""
    as_chat: bool = True
    """Put question and option through the chat template as a user and an assistant turn; if false,
    use them verbatim."""
    separator: str = " "
    """Text between question and option if `as_chat` is false."""
    system: str | None = None
    """System message before each question (needs `as_chat`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        options = [] if isinstance(self.options, str) else self.options
        for text in (self.question, self.answer, *options):
            check_template(text)
        if len(options) == 1:
            raise ValueError("options: found one; give at least two, or the name of a column")
        if self.data is not None and self.data.format != Messages():
            raise ValueError("data.format has no effect: question, options and answer read the row")
        if self.system is not None and not self.as_chat:
            raise ValueError("system needs as_chat: true")
        return self

    def measures(self) -> Sequence[Measure]:
        return [mean_of("multiple_choice"), mean_of("normalized")]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[ChoiceItem]:
        encoder = Encoder(tokenizer)
        if self.as_chat:
            encoder.check_template()
        items: list[ChoiceItem] = []
        for source in sources:
            bad = BadRows()
            for located in source.read(bad):
                if len(items) == limit:
                    break
                try:
                    choice = self._choice(encoder, tokenizer, located.row, located.place)
                    items.append(choice)
                    bad.repaired.update(located.repaired)
                except DataError as error:
                    bad.add(located.place, error)
            # If every row is bad, raise: skipping all of them would hide the reason.
            bad.check(source.title, skip=settings.on_bad_row == "skip" and bool(items))
        if not items:
            raise DataError(f"{self.label}: no rows")
        return items

    def place_and_length(self, item: ChoiceItem) -> tuple[str, int]:
        return place_and_length(item)

    def evaluate(self, scorer: Scorer, items: Sequence[ChoiceItem]) -> list[Outcome]:
        return evaluate_choices(scorer, items, self._values)

    def _values(self, item: ChoiceItem, log_p: list[float]) -> dict[str, float]:
        per_byte = [
            nats / len(option.encode()) for nats, option in zip(log_p, item.options, strict=True)
        ]
        return {
            "multiple_choice": float(log_p.index(max(log_p)) == item.answer),
            "normalized": float(per_byte.index(max(per_byte)) == item.answer),
        }

    def _choice(
        self, encoder: Encoder, tokenizer: PreTrainedTokenizerFast, row: Row, place: str
    ) -> ChoiceItem:
        question = rendered("question", self.question, row)
        options = self._options(row)
        answer = _index(rendered("answer", self.answer, row).strip(), len(options))
        if not self.as_chat:
            before = [Message("text", question, train=False)]
            turn = Message("text", self.separator, train=True)
        else:
            system = [] if self.system is None else [Message("system", self.system, train=False)]
            before = [*system, Message("user", question, train=False)]
            turn = Message("assistant", "", train=True)
        prompt = Conversation(before)
        return encode_choice(encoder, tokenizer, prompt, turn, options, answer, place)

    def _options(self, row: Row) -> list[str]:
        if not isinstance(self.options, str):
            return [rendered("options", option, row) for option in self.options]
        found = parsed(value_of(row, self.options), self.options)
        options = [as_text(x, at) for at, x in as_list(found, self.options, "a list of texts")]
        if len(options) < 2:
            raise DataError(f"field '{self.options}': found {len(options)} options, needs two")
        return options


def _index(answer: str, number: int) -> int:
    """Return the index of the option that a letter or a number names."""
    is_letter = len(answer) == 1 and answer in string.ascii_letters
    index = string.ascii_uppercase.index(answer.upper()) if is_letter else -1
    if answer.isascii() and answer.isdigit() and len(answer) < 10:
        index = int(answer)
    if not 0 <= index < number:
        raise DataError(f"answer {answer!r} is not the letter or number of one of {number} options")
    return index
