"""A row as text, and which characters of it are learnt.

What is learnt is found from the structure of the conversation and never by searching for tokens;
`answers.py` says how, and `pattern.py` why one render of each conversation is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.data.render.answer_spans import AnswerSpan, find_additions, find_answers, write
from qlora_cli.data.render.chat_template import ChatTemplate
from qlora_cli.data.render.render_cache import MOST_SHAPES, Patterns, Skeleton, TextPattern
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
    """No template was put around it, so BOS and EOS are still to be added."""
    contents: list[tuple[int, int]] | None = None
    """What of the text came from the data (start and end, in order); None if it cannot be told."""


class Renderer:
    """Turns messages into text, with the chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._patterns = Patterns(self._make_pattern)
        self._groups: dict[str, list[list[int]]] = {}

    def check_template(self) -> None:
        """Raises DataError if the tokenizer has no chat template, or a broken one."""
        self._template.check()

    def render(self, conversation: Conversation) -> RenderedRow:
        """The text of a row, and what of it is learnt.

        Raises:
            DataError: the chat template refuses, or it cannot be told exactly what is learnt.
        """
        if conversation.messages[0].role == "text":
            return self._lay_out_verbatim(conversation.messages)
        skeleton = Skeleton(conversation)
        pattern = self._patterns.of(skeleton)
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

    def render_all(self, conversation: Conversation) -> list[RenderedRow]:
        """As `lay_out`, in more than one row for templates that rewrite answers later on.

        Raises:
            DataError: as `lay_out`.
        """
        return [self.render(row) for row in self.split(conversation)]

    def split(self, conversation: Conversation) -> list[Conversation]:
        """The rows that a conversation makes; one, if its answers can be learnt in one.

        A template may take the reasoning out of an answer once the conversation goes on. As the
        last turn of a row of its own it is what the model has to write.
        """
        learnt = [i for i, message in enumerate(conversation.messages) if message.train]
        roles = {conversation.messages[i].role for i in learnt}
        if len(learnt) < 2 or roles != {"assistant"} or conversation.train_on_all:
            return [conversation]
        skeleton = Skeleton(conversation)
        is_plain = not self._template.looks_at(skeleton.values)
        if is_plain and self._patterns.of(skeleton) is not None:
            return [conversation]
        groups = self._groups.get(skeleton.shape) if is_plain else None
        if groups is None:
            groups = self._group(conversation, learnt)
            if is_plain:
                if len(self._groups) == MOST_SHAPES:
                    self._groups.clear()
                self._groups[skeleton.shape] = groups
        if len(groups) == 1:
            return [conversation]
        return [_only(conversation, group) for group in groups]

    def _group(self, conversation: Conversation, learnt: list[int]) -> list[list[int]]:
        """The answers that can be learnt in one row together; all in one if there is no way."""
        if self._is_exact(conversation):
            return [learnt]
        groups, left = [], learnt
        while left:
            first = len(left) - 1
            if not self._is_exact(_only(conversation, left[first:])):
                return [learnt]  # whoever lays it out is told why
            while first and self._is_exact(_only(conversation, left[first - 1 :])):
                first -= 1
            groups.append(left[first:])
            left = left[:first]
        return groups[::-1]

    def render_prompt(self, conversation: Conversation) -> RenderedRow:
        """What the model is given to write the last learnt message.

        Raises:
            DataError: there is nothing before it, or the chat template refuses.
        """
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message.train)
        if last == 0:
            raise DataError("the row begins with what is to be learnt: there is no prompt")
        if messages[0].role == "text":
            text = "".join(message.content for message in messages[:last])
            return RenderedRow(text, [], is_verbatim=True)
        text = self._template.render(messages[:last], conversation.tools, prompting=True)
        return RenderedRow(text, [], is_verbatim=False)

    def _make_pattern(self, skeleton: Skeleton) -> TextPattern | None:
        row = skeleton.conversation
        try:
            additions = find_additions(self._template, row)
            text = write(self._template, row, additions)
            answers = find_answers(self._template, row, text, additions)
        except DataError:
            return None  # perhaps only because of the words: each conversation is asked itself
        return TextPattern(text, answers, additions, num_words=len(skeleton.values))

    def _is_exact(self, conversation: Conversation) -> bool:
        try:
            self.render(conversation)
        except DataError:
            return False
        return True

    def _lay_out_verbatim(self, messages: list[Message]) -> RenderedRow:
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


def _only(conversation: Conversation, learnt: list[int]) -> Conversation:
    """The conversation up to the last of these answers, with only them learnt."""
    messages = [
        replace(message, train=i in learnt)
        for i, message in enumerate(conversation.messages[: learnt[-1] + 1])
    ]
    return replace(conversation, messages=messages)
