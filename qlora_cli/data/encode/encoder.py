"""From conversations to token ids and labels: render, tokenize, label, truncate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_cli.data.encode.labels import Labeller
from qlora_cli.data.encode.tokens import RowTokenizer
from qlora_cli.data.encode.truncate import EncodedRow, Truncate, join_rows, truncate_row
from qlora_cli.data.render.renderer import RenderedRow, Renderer
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row whose supervised tokens would be ambiguous."""

    reason: str


class Encoder:
    """Turns conversations into tokens and labels, with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._renderer = Renderer(tokenizer)
        self._tokenizer = RowTokenizer(tokenizer)
        self._labeller = Labeller(tokenizer)

    def encode(
        self,
        messages: list[Message],
        *,
        max_length: int,
        truncate: Truncate = "cut_end",
        train_on_all: bool = False,
    ) -> EncodedRow:
        """Encode one row.

        Raises:
            DataError: its supervised tokens would be ambiguous.
        """
        row = Conversation(messages, train_on_all=train_on_all)
        [encoded] = self.encode_rows([row], max_length=max_length, truncate=truncate)
        if isinstance(encoded, RefusedRow):
            raise DataError(encoded.reason)
        return encoded

    def encode_rows(
        self, rows: list[Conversation], *, max_length: int, truncate: Truncate
    ) -> list[EncodedRow | RefusedRow]:
        """Encode each row, or give the reason why it has no labels."""
        rendered = [self._render(row) for row in rows]
        accepted = [found for found in rendered if not isinstance(found, RefusedRow)]
        plain = [one for found in accepted for one in found if not one.has_stand_ins]
        tokenized = iter(self._tokenizer.tokenize(plain))

        def encode(row: Conversation, found: list[RenderedRow] | RefusedRow) -> Any:
            if isinstance(found, RefusedRow):
                return found
            has_stand_ins = any(one.has_stand_ins for one in found)
            try:
                whole = (
                    [self._tokenizer.tokenize_stand_ins(one) for one in found]
                    if has_stand_ins
                    else [next(tokenized) for _ in found]
                )
            except DataError as error:
                return RefusedRow(str(error))
            labelled = [self._labeller.label(o, train_on_all=row.train_on_all) for o in whole]
            encoded = join_rows([truncate_row(one, max_length, truncate) for one in labelled])
            return replace(encoded, is_typed=True) if has_stand_ins else encoded

        return [encode(row, found) for row, found in zip(rows, rendered, strict=True)]

    def to_prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> Prompt:
        """Encode what precedes the last supervised message, with the generation prompt.

        The content of that message is the reference.

        Raises:
            DataError: nothing precedes it, or the chat template refuses.
        """
        rendered = self._renderer.render_prompt(Conversation(messages, tools=tools))
        reference = next(message.content for message in reversed(messages) if message.train)
        return Prompt(self._tokenizer.tokenize_prompt(rendered), reference)

    def check_template(self) -> None:
        """Check the chat template once, and not in each row.

        Raises:
            DataError: it is missing or broken.
        """
        self._renderer.check_template()

    def _render(self, row: Conversation) -> list[RenderedRow] | RefusedRow:
        try:
            return self._renderer.render_all(row)
        except DataError as error:
            return RefusedRow(str(error))
