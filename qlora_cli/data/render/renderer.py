"""Render conversations as text, and find which characters are supervised.

Supervised spans are found from the structure of the conversation and never by searching for tokens:
`answer_spans.py` says how, and `render_cache.py` why one render per conversation is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.data.render.answer_spans import AnswerSpan, find_additions, find_answers, write
from qlora_cli.data.render.chat_template import ChatTemplate
from qlora_cli.data.render.render_cache import ShapeCache, Skeleton, TextPattern
from qlora_cli.data.render.special_tokens import StandIns
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as text."""

    text: str
    answers: list[AnswerSpan]
    is_verbatim: bool
    """True if no template was put around it, so BOS and EOS are still to be added."""
    contents: list[tuple[int, int]] | None = None
    """The spans of the text that came from the data (start and end, in order); None if unknown."""
    has_stand_ins: bool = False
    """True if special tokens in its messages were replaced by stand-ins (`special_tokens.py`)."""


class Renderer:
    """Turns messages into text, with the chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._stand_ins = StandIns(tokenizer)
        self._patterns: ShapeCache[TextPattern | None] = ShapeCache()
        self._groups: ShapeCache[list[list[int]]] = ShapeCache()

    def check_template(self) -> None:
        """Raise DataError if the tokenizer has no chat template, or a broken one."""
        self._template.check()

    def render_all(self, conversation: Conversation) -> list[RenderedRow]:
        """Render a conversation: several rows for templates that rewrite earlier answers.

        Special tokens in its messages become stand-ins.

        Raises:
            DataError: the chat template refuses, or the supervised spans would be ambiguous.
        """
        hidden = self._stand_ins.hide(conversation)
        rows = [self.render(row) for row in self.split(hidden or conversation)]
        return rows if hidden is None else [replace(row, has_stand_ins=True) for row in rows]

    def render_prompt(self, conversation: Conversation) -> RenderedRow:
        """Render what the model is given to generate the last supervised message.

        Special tokens in the messages become stand-ins.

        Raises:
            DataError: nothing precedes that message, or the chat template refuses.
        """
        hidden = self._stand_ins.hide(conversation)
        conversation = hidden or conversation
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message.train)
        if last == 0:
            raise DataError("the row begins with its answer, so it has no prompt")
        if messages[0].role == "text":
            text = "".join(message.content for message in messages[:last])
            return RenderedRow(text, [], is_verbatim=True)
        text = self._template.render(messages[:last], conversation.tools, prompting=True)
        return RenderedRow(text, [], is_verbatim=False, has_stand_ins=hidden is not None)

    def render(self, conversation: Conversation) -> RenderedRow:
        """Render one row as it is, and find its supervised spans.

        Raises:
            DataError: the chat template refuses, or the supervised spans would be ambiguous.
        """
        if conversation.messages[0].role == "text":
            return self._render_verbatim(conversation.messages)
        skeleton = Skeleton(conversation)
        pattern = self._pattern(skeleton)
        if pattern is not None:
            text = write(self._template, conversation, pattern.additions)
            match = pattern.match(text, skeleton.values)
            if match is not None and not self._template.looks_at(skeleton.values):
                return RenderedRow(text, pattern.answers(match), False, match.contents)
        additions = find_additions(self._template, conversation)
        text = write(self._template, conversation, additions)
        answers = find_answers(self._template, conversation, text, additions)
        match = None if pattern is None else pattern.match(text, skeleton.values)
        return RenderedRow(text, answers, False, None if match is None else match.contents)

    def split(self, conversation: Conversation) -> list[Conversation]:
        """Split a conversation into rows; into one, if one can hold all its answers.

        A template may write an answer differently once the conversation continues (DeepSeek removes
        its reasoning). As the last turn of a row, that answer is what the model has to write.
        """
        trained = [i for i, message in enumerate(conversation.messages) if message.train]
        roles = {conversation.messages[i].role for i in trained}
        is_last_only = trained == [len(conversation.messages) - 1]
        if is_last_only or roles != {"assistant"} or conversation.train_on_all:
            return [conversation]
        skeleton = Skeleton(conversation)
        is_plain = not self._template.looks_at(skeleton.values)
        if is_plain and self._pattern(skeleton) is not None:
            return [conversation]
        groups = self._groups.get(skeleton.shape) if is_plain else None
        if groups is None:
            groups = self._group(conversation, trained)
            if is_plain:
                self._groups[skeleton.shape] = groups
        if not groups:
            return [conversation]
        return [_only(conversation, group) for group in groups]

    def _group(self, conversation: Conversation, trained: list[int]) -> list[list[int]]:
        """Group the answers by the rows that hold them.

        Returns:
            [] for the conversation as it is: it holds all of them, or there is no way.
        """
        if self._is_exact(conversation):
            return []
        groups, left = [], trained
        while left:
            first = len(left) - 1
            if not self._is_exact(_only(conversation, left[first:])):
                return []  # rendering it gives the reason
            while first and self._is_exact(_only(conversation, left[first - 1 :])):
                first -= 1
            groups.append(left[first:])
            left = left[:first]
        return groups[::-1]

    def _pattern(self, skeleton: Skeleton) -> TextPattern | None:
        """The pattern of a shape; None if each of its rows has to be searched."""
        if skeleton.shape not in self._patterns:
            self._patterns[skeleton.shape] = self._make_pattern(skeleton)
        return self._patterns[skeleton.shape]

    def _make_pattern(self, skeleton: Skeleton) -> TextPattern | None:
        row = skeleton.conversation
        try:
            additions = find_additions(self._template, row)
            text = write(self._template, row, additions)
            answers = find_answers(self._template, row, text, additions)
        except DataError:
            return None  # perhaps only because of the words: each conversation is tried on its own
        return TextPattern(text, answers, additions, num_words=len(skeleton.values))

    def _is_exact(self, conversation: Conversation) -> bool:
        try:
            self.render(conversation)
        except DataError:
            return False
        return True

    def _render_verbatim(self, messages: list[Message]) -> RenderedRow:
        eos = self._tokenizer.eos_token
        if eos is None:
            raise DataError("the tokenizer has no end-of-text token, so verbatim text cannot end")
        text, answers, contents = "", [], []
        for message in messages:
            start, text = len(text), text + message.content
            contents.append((start, len(text)))
            # Text that brings its own end-of-text token does not get a second one.
            if message.train:
                answers.append(AnswerSpan(start, len(text), len(text.removesuffix(eos))))
        return RenderedRow(text, answers, True, contents)


def _only(conversation: Conversation, trained: list[int]) -> Conversation:
    """Cut a conversation after the last of these answers, and train on them only."""
    messages = [
        replace(message, train=i in trained)
        for i, message in enumerate(conversation.messages[: trained[-1] + 1])
    ]
    return replace(conversation, messages=messages)
