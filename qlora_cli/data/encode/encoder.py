"""From conversations to token ids and labels: render, tokenize, label, truncate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_cli.data.encode.labels import Labeller
from qlora_cli.data.encode.tokens import RowTokenizer
from qlora_cli.data.encode.truncate import (
    EncodedRow,
    LabelledRow,
    Truncate,
    join_rows,
    truncate_labelled,
    truncate_pair,
    truncate_row,
)
from qlora_cli.data.render.renderer import RenderedRow, Renderer
from qlora_cli.errors import DataError
from qlora_cli.types import IGNORE_INDEX, Conversation, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_CONTENT = "7654"
"""Content of an answer in which what the template writes around it is found."""


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row whose supervised tokens would be ambiguous."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Labelled:
    """The rows of one conversation, before truncation."""

    rows: list[LabelledRow]
    is_typed: bool
    """Its messages contain special tokens, which are encoded as plain text."""


class Encoder:
    """Turns conversations into tokens and labels, with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._renderer = Renderer(tokenizer)
        self._tokenizer = RowTokenizer(tokenizer)
        self._labeller = Labeller(tokenizer)
        self._decode = tokenizer.decode
        self._lead: str | None = None

    def encode(
        self,
        messages: list[Message],
        *,
        max_length: int,
        truncate: Truncate = "cut_end",
        train_on_all: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> EncodedRow:
        """Encode one row.

        Raises:
            DataError: its supervised tokens would be ambiguous.
        """
        row = Conversation(messages, tools=tools, train_on_all=train_on_all)
        [encoded] = self.encode_rows([row], max_length=max_length, truncate=truncate)
        if isinstance(encoded, RefusedRow):
            raise DataError(encoded.reason)
        return encoded

    def encode_rows(
        self, rows: list[Conversation], *, max_length: int, truncate: Truncate
    ) -> list[EncodedRow | RefusedRow]:
        """Encode each row, or give the reason why it has no labels.

        A preference row becomes two linked examples, its chosen and its rejected answer.
        """
        conversations = [one for row in rows for one in _conversations(row)]
        found = iter(self._label_all(conversations))
        limit = max_length, truncate

        def encode(row: Conversation) -> EncodedRow | RefusedRow:
            if row.rejected is not None:
                return _encode_pair(next(found), next(found), *limit)
            labelled = next(found)
            if isinstance(labelled, RefusedRow):
                return labelled
            if row.is_labelled:
                [one] = labelled.rows
                encoded = truncate_labelled(one, *limit)
            else:
                encoded = join_rows([truncate_row(one, *limit) for one in labelled.rows])
            return replace(encoded, is_typed=True) if labelled.is_typed else encoded

        return [encode(row) for row in rows]

    def _label_all(self, rows: list[Conversation]) -> list[_Labelled | RefusedRow]:
        rendered = [self._render(row) for row in rows]
        accepted = [found for found in rendered if not isinstance(found, RefusedRow)]
        plain = [one for found in accepted for one in found if not one.has_stand_ins]
        tokenized = iter(self._tokenizer.tokenize(plain))

        def label(row: Conversation, found: list[RenderedRow] | RefusedRow) -> Any:
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
            return _Labelled(labelled, has_stand_ins)

        return [label(row, found) for row, found in zip(rows, rendered, strict=True)]

    def to_prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> Prompt:
        """Encode what precedes the last supervised message, with that message as the reference.

        Raises:
            DataError: as `encode_prompt` and `reference`.
        """
        input_ids, reference = self.encode_prompt(messages, tools), self.reference(messages, tools)
        return Prompt(input_ids, reference, lead=self.lead(_supervised(messages)))

    def encode_prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Encode what precedes the last supervised message, with the generation prompt.

        Raises:
            DataError: nothing precedes it, or the chat template refuses.
        """
        rendered = self._renderer.render_prompt(Conversation(messages, tools=tools))
        return self._tokenizer.tokenize_prompt(rendered)

    def reference(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """Return the text that the model has to generate for the last supervised message.

        It is the content, unless the answer has tool calls or reasoning: these are text only in
        the words of the chat template. Like generated text, it has no special tokens.

        Raises:
            DataError: the template does not show what the model has to generate.
        """
        answer = _supervised(messages)
        return self._written(messages, tools) if _needs_template(answer) else answer.content

    def lead(self, answer: Message) -> str:
        """Return the text that the model generates before the content of an answer.

        GPT-OSS writes its channel there, and the word `final` is not a special token. White space
        and an empty block of reasoning are kept.
        """
        if answer.role != "assistant" or _needs_template(answer):
            return ""
        if self._lead is None:
            row = [Message("user", "?", train=False), Message("assistant", _CONTENT, train=True)]
            try:
                lead, content, _ = self._written(row, None).partition(_CONTENT)
            except DataError:  # the template may refuse this row and no other
                content = lead = ""
            is_text = content and lead.strip() and "</think>" not in lead
            self._lead = lead if is_text else ""
        return self._lead

    def _written(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """Return the last supervised message as the template writes it.

        Raises:
            DataError: as `reference`.
        """
        last = max(i for i, message in enumerate(messages) if message.train)
        answer = messages[last]
        row = [*(replace(message, train=False) for message in messages[:last]), answer]
        [found] = self._renderer.render_all(Conversation(row, tools=tools))
        [whole] = (
            [self._tokenizer.tokenize_stand_ins(found)]
            if found.has_stand_ins
            else self._tokenizer.tokenize([found])
        )
        labelled = self._labeller.label(whole, train_on_all=False)
        if labelled.straddles is not None:
            raise DataError(labelled.straddles)
        ids = [token for token in labelled.example.labels if token != IGNORE_INDEX]
        [(_, end)] = labelled.turn_ends
        text = str(self._decode(ids[: len(ids) - end.length], skip_special_tokens=True))
        if not text.strip():
            raise DataError(f"the chat template writes no text for the answer: {_named(answer)}")
        return text

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


def _conversations(row: Conversation) -> list[Conversation]:
    """Return the conversations of a row: two in a preference row."""
    if row.rejected is None:
        return [row]
    return [row, replace(row, messages=row.rejected, rejected=None)]


def _encode_pair(
    chosen: _Labelled | RefusedRow,
    rejected: _Labelled | RefusedRow,
    max_length: int,
    truncate: Truncate,
) -> EncodedRow | RefusedRow:
    both = {"chosen": chosen, "rejected": rejected}
    labelled: list[_Labelled] = []
    for name, found in both.items():
        if isinstance(found, RefusedRow):
            return RefusedRow(f"the {name} answer: {found.reason}")
        if len(found.rows) > 1:
            return RefusedRow(
                f"the {name} answer: the chat template writes its answers differently once the "
                "conversation continues; give it one answer, with those before it in the prompt"
            )
        labelled.append(found)
    (one,), (other,) = (found.rows for found in labelled)
    encoded = truncate_pair(one, other, max_length, truncate)
    return replace(encoded, is_typed=any(found.is_typed for found in labelled))


def _supervised(messages: list[Message]) -> Message:
    """Return the last supervised message."""
    return next(message for message in reversed(messages) if message.train)


def _needs_template(answer: Message) -> bool:
    """Tell if an answer has calls or reasoning, which are text only in the words of a template."""
    has_reasoning = answer.reasoning is not None or "</think>" in answer.content
    return answer.role == "assistant" and bool(answer.tool_calls or has_reasoning)


def _named(answer: Message) -> str:
    """Name what an answer without content holds."""
    calls = ", ".join(call.name for call in answer.tool_calls)
    return f"calls of {calls}" if calls else "its reasoning"
