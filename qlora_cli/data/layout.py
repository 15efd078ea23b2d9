"""A row as text, and which characters of it are learnt.

What is learnt is found from the structure of the conversation and never by searching for tokens:
the whole conversation is rendered once, and the text that the model is given before a turn when it
generates (the earlier messages and the generation prompt) must be the beginning of it, character
for character. What follows, up to the token that ends the turn, is what the model has to write.
A conversation for which that does not hold is refused and not approximated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Answer:
    """A learnt turn, in characters of the text."""

    start: int
    """After the generation prompt."""
    end: int
    """After the content."""
    stop: int
    """Where the token that ends the turn is due: after the white space that may follow."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A row as text."""

    text: str
    answers: list[Answer]
    is_verbatim: bool
    """No template was put around it, so BOS and EOS are still to be added."""
    contents: list[tuple[int, int]] | None = None
    """What of the text came from the data (start and end, in order); None if it cannot be told."""


class _Refused(DataError):
    """The chat template does not take this conversation."""


class Renderer:
    """Turns messages into text, with the chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._added_texts = tuple(token.content for token in added if token.content.strip())

    def check_template(self) -> None:
        """Raises DataError if the tokenizer has no chat template, or a broken one."""
        try:
            self._tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template, and the rows are conversations",
                hint="name one in data.chat_template, or use a format without roles: text, or "
                "prompt_completion with as_chat: false",
            ) from error
        # A template may refuse this conversation and take those of the rows: each is asked.
        with suppress(_Refused):
            self._render([Message("user", "a", train=False)])

    def lay_out(self, conversation: Conversation) -> Layout:
        """The text of a row, and what of it is learnt.

        Raises:
            DataError: the chat template refuses, or it cannot be told exactly what is learnt.
        """
        messages = conversation.messages
        if messages[0].role == "text":
            return self._lay_out_verbatim(messages)
        text = self._render(messages)
        learnt = [i for i, message in enumerate(messages) if message.train]
        return Layout(text, [self._find(messages, i, text) for i in learnt], is_verbatim=False)

    def lay_out_prompt(self, conversation: Conversation) -> Layout:
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
            return Layout(text, [], is_verbatim=True)
        return Layout(self._render(messages[:last], prompting=True), [], is_verbatim=False)

    def _lay_out_verbatim(self, messages: list[Message]) -> Layout:
        eos = self._tokenizer.eos_token
        if eos is None:
            raise DataError("the tokenizer has no end-of-text token, so verbatim text cannot end")
        text, answers, contents = "", [], []
        for message in messages:
            start, text = len(text), text + message.content
            contents.append((start, len(text)))
            # Text that brings its own end-of-text token does not get a second one.
            if message.train:
                answers.append(Answer(start, len(text), len(text.removesuffix(eos))))
        return Layout(text, answers, True, contents)

    def _find(self, messages: list[Message], i: int, text: str) -> Answer:
        what = f"message {i + 1} ({messages[i].role})"
        if i == 0:
            raise DataError(f"{what}: nothing before it, so the model has no prompt to write it")
        prompt = self._render(messages[:i], prompting=True)
        _check_prefix(prompt, text, f"{what}: the prompt that the model is given for it")
        end = self._find_end(messages, i, text, len(prompt), what)
        return Answer(len(prompt), end, _skip_space(text, end))

    def _find_end(self, messages: list[Message], i: int, text: str, start: int, what: str) -> int:
        """Where the content of message `i` ends in the text, if its turn begins at `start`."""
        content = messages[i].content.strip()
        direct = _skip_space(text, start)
        if text.startswith(content, direct) and self._stops_at(text, direct + len(content)):
            return direct + len(content)
        # The template writes something else first (Qwen3: an empty block of reasoning), or it ends
        # turns without a token of their own. Look no further than the end of this turn.
        turn = self._render(messages[: i + 1])
        _check_prefix(turn, text, f"{what}: the conversation up to it")
        places = list(_occurrences(content, turn, start))
        if not places:
            raise DataError(f"{what}: the chat template changes its content or leaves it out")
        stopped = (at for at in places if self._stops_at(text, at + len(content)))
        at = next(stopped, places[0])
        if at != direct and self._render(messages[:i]) == text[:start]:
            raise DataError(
                f"{what}: the chat template has no generation prompt, so the model would have to "
                f"write {text[start:at]!r} by itself"
            )
        return at + len(content)

    def _stops_at(self, text: str, end: int) -> bool:
        return text.startswith(self._added_texts, _skip_space(text, end))

    def _render(self, messages: list[Message], *, prompting: bool = False) -> str:
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompting
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"chat template, line {error.lineno}: {error.message}") from error
        # A template is a program of somebody else's: it may also add a number to a text.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise _Refused(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text


def _check_prefix(prefix: str, text: str, what: str) -> None:
    if text.startswith(prefix):
        return
    same = next(
        (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text)
    )
    raise DataError(
        f"{what} is not how the whole conversation begins, so it cannot be told exactly what to "
        f"learn: {prefix[same : same + 30]!r} there is {text[same : same + 30]!r} here"
    )


def _occurrences(part: str, text: str, start: int) -> Iterator[int]:
    at = text.find(part, start)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
