"""Find the supervised turns in the text of a conversation, by rendering parts of it.

The row must begin, character for character, with the text that the model is given before the turn
when it generates (the earlier messages and the generation prompt). What follows must be what the
template writes for that turn when it is the last. If this does not hold, the conversation is
refused, not approximated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_cli.data.render.chat_template import ChatTemplate, TemplateRefused
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """A supervised turn, in characters of the text."""

    start: int
    """The place after the generation prompt."""
    end: int
    """The place after the content."""
    stop: int
    """The place where the token that ends the turn is expected: after white space, if any. Of
    several tokens that end it, the one at which generation ends."""


@dataclass(frozen=True, slots=True)
class RowAdditions:
    """Text that a row needs in addition to what the template writes, for some templates."""

    thought: bool = False
    """The generation prompt opens a reasoning block that the template removes from answers."""
    closing: str = ""
    """The end of the last turn, if the beginning of the next turn is what ends a turn."""


def write(template: ChatTemplate, conversation: Conversation, additions: RowAdditions) -> str:
    """Write the text of a row."""
    messages, tools = conversation.messages, conversation.tools
    if not additions.thought:
        return template.render(messages, tools) + additions.closing
    *before, answer = messages
    answer = _apart(answer)
    prompt = template.render(before, tools, prompting=True)
    turn = template.render([*before, answer], tools)
    thought = f"{answer.reasoning.strip()}\n" if answer.reasoning else "\n"
    rest = turn[_opening(prompt) :].lstrip()
    return f"{prompt}{thought}</think>\n\n{rest}{additions.closing}"


def find_additions(template: ChatTemplate, conversation: Conversation) -> RowAdditions:
    """Find what the row needs in addition to what the template writes."""
    messages, tools = conversation.messages, conversation.tools
    last = messages[-1]
    if last.role != "assistant" or not last.train or len(messages) == 1:
        return RowAdditions()
    prompt = template.render(messages[:-1], tools, prompting=True)
    text = template.render(messages, tools)
    opening = _opening(prompt)
    thought = (
        opening < len(prompt)
        and text.startswith(prompt[:opening])
        and not text.startswith("<think>", opening)
    )
    start = _common(prompt, template.render(messages[:-1], tools))
    closing = _closing(template, conversation, text, start=start, header=prompt[start:])
    return RowAdditions(thought, closing)


def find_answers(
    template: ChatTemplate, conversation: Conversation, text: str, additions: RowAdditions
) -> list[AnswerSpan]:
    """Find the supervised turns in the text that `write` returned.

    Raises:
        DataError: the supervised spans would be ambiguous, or the template leaves something out.
    """
    finder = _Finder(template, conversation, text, additions)
    finder.check_whole()
    return [finder.find(i) for i, message in enumerate(conversation.messages) if message.train]


class _Finder:
    def __init__(
        self, template: ChatTemplate, conversation: Conversation, text: str, additions: RowAdditions
    ) -> None:
        self._template = template
        self._messages = conversation.messages
        self._tools = conversation.tools
        self._text = text
        self._additions = additions

    def check_whole(self) -> None:
        """Raise DataError if the template omits something that the model should see."""
        if self._tools and self._render(self._messages, tools=False) == self._render(
            self._messages
        ):
            raise DataError(
                "the chat template omits the tools (data.chat_template may name one that "
                "writes them, such as configs/chat_templates/chatml-tools.jinja)"
            )
        for i, message in enumerate(self._messages):
            # Answers are checked one by one, and those that are not supervised may lose their
            # reasoning.
            if message.role != "assistant" and not _holds(self._text, message.content.strip()):
                raise DataError(f"{self._what(i)}: the chat template changes or omits its content")

    def find(self, i: int) -> AnswerSpan:
        if self._messages[i].role != "assistant":
            return self._find_other(i)
        what, text = self._what(i), self._text
        if i == 0:
            raise DataError(f"{what}: nothing precedes it, so the model would have no prompt")
        prompt = self._render(self._messages[:i], prompting=True)
        _check_prefix(prompt, text, f"{what}: its generation prompt")
        start, is_last = len(prompt), i == len(self._messages) - 1
        turn = text if is_last else self._render(self._messages[: i + 1])
        _check_prefix(prompt, turn, f"{what}: its generation prompt")
        end, stop = self._find_end(i, turn, start)
        stop_token = self._template.added_at(turn, stop)
        written = turn[start : end if stop_token is None else stop + len(stop_token)]
        if text.startswith(written, start):
            return AnswerSpan(start, end, stop if stop_token else _skip_space(text, end))
        # An empty reasoning block holds nothing of the data.
        shorter = re.sub(r"^\s*<think>\s*</think>\s*", "", written, count=1)
        if text.startswith(shorter, start):
            less = len(written) - len(shorter)
            return AnswerSpan(start, end - less, stop - less)
        raise DataError(
            f"{what}: the chat template writes it differently once the conversation continues, so "
            f"this is not what the model has to write: {_difference(written, text[start:])}"
        )

    def _find_end(self, i: int, turn: str, start: int) -> tuple[int, int]:
        """Find where the content of message `i` ends in its turn, and its stop token begins."""
        message = self._messages[i]
        if message.tool_calls:
            return self._find_end_of_calls(i, turn, start)
        content = (_apart(message) if self._has_thought(i) else message).content.strip()
        places = list(_occurrences(content, turn, start))
        if not places:
            raise DataError(f"{self._what(i)}: the chat template changes or omits its content")
        # The turn is the last, and the content is its end. What the template may write before it
        # (Qwen3: a reasoning block) may contain the same words followed by an added token; and a
        # template may end turns without a token of their own.
        stopped = [at for at in places if self._stops_at(turn, at + len(content))]
        at, direct = (stopped or places)[-1], _skip_space(turn, start)
        if at != direct and self._render(self._messages[:i]) == turn[:start]:
            raise DataError(
                f"{self._what(i)}: the chat template has no generation prompt, so the model would "
                f"have to write {turn[start:at]!r} by itself"
            )
        self._check_reasoning(i, turn[start:at])
        end = at + len(content)
        return end, self._find_stop(i, turn, end)

    def _find_stop(self, i: int, turn: str, end: int) -> int:
        """Find the token at which generation ends, in what the template writes after the content.

        That is EOS, if it ends this turn wherever it stands, or else the last of such tokens. What
        is written only after the last turn (Phi 3: an EOS after `<|end|>`) is none of them.
        """
        found = self._template.added_in(turn, end)
        if len(found) > 1 or (found and found[0] != _skip_space(turn, end)):
            kept = self._end_of_every_turn(i, turn)
            found = [place for place in found if self._end_of_token(turn, place) <= kept]
            eos = [place for place in found if self._template.is_eos_at(turn, place)]
            found = eos[:1] or found[-1:]
        return found[0] if found else _skip_space(turn, end)

    def _end_of_every_turn(self, i: int, turn: str) -> int:
        """Return where a turn ends if its conversation continues."""
        if self._additions.closing and i == len(self._messages) - 1:
            return len(turn)
        # A template may remove the reasoning once the conversation continues.
        last = replace(_apart(self._messages[i]), reasoning=None)
        bare = [*self._messages[:i], last]
        shorter = self._render(bare)
        try:
            longer = self._render([*bare, Message("user", "a", train=False)])
        except TemplateRefused:
            return len(turn)
        return len(turn) - (len(shorter) - _common(shorter, longer))

    def _end_of_token(self, text: str, at: int) -> int:
        token = self._template.added_at(text, at)
        assert token is not None
        return at + len(token)

    def _find_end_of_calls(self, i: int, turn: str, start: int) -> tuple[int, int]:
        """Find what is written after the calls, up to where the tool's answer would begin."""
        message = self._messages[i]
        answer = _answer_of_tool(message)
        try:
            longer = self._render([*self._messages[: i + 1], answer])
        except TemplateRefused:
            longer = turn
        same = self._template.added_over(turn, _common(turn, longer))
        values = list(_texts_of(message))
        if not all(_holds(turn[start:same], value) for value in values):
            same = len(turn)  # a tool's answer changes the turn before it (Qwen3)
        written = turn[start:same]
        self._check_reasoning(i, written)
        for value in values:
            if not _holds(written, value):
                raise DataError(
                    f"{self._what(i)}: the chat template omits {value!r} from its tool calls"
                )
        end = start + len(written.rstrip())
        stop = self._template.stop_before(turn, start, end)
        if stop is not None:
            return stop, stop
        return end, _skip_space(turn, end)

    def _find_other(self, i: int) -> AnswerSpan:
        """Find a turn that the model is not asked for: it begins with its content."""
        content = self._messages[i].content.strip()
        before = _common(self._render(self._messages[:i]), self._text) if i else 0
        places = list(_occurrences(content, self._text, before))
        if not content or not places:
            raise DataError(f"{self._what(i)}: the chat template shows none of its content")
        stopped = (at for at in places if self._stops_at(self._text, at + len(content)))
        at = next(stopped, places[0])
        end = at + len(content)
        return AnswerSpan(at, end, _skip_space(self._text, end))

    def _check_reasoning(self, i: int, written: str) -> None:
        reasoning = self._messages[i].reasoning
        if reasoning is not None and reasoning.strip() not in written:
            raise DataError(
                f"{self._what(i)}: the chat template omits its reasoning, which is supervised"
            )

    def _has_thought(self, i: int) -> bool:
        return self._additions.thought and i == len(self._messages) - 1

    def _stops_at(self, text: str, end: int) -> bool:
        token = self._template.added_at(text, _skip_space(text, end))
        return token is not None and not self._template.is_closing_tag(token, text[:end])

    def _render(
        self, messages: list[Message], *, prompting: bool = False, tools: bool = True
    ) -> str:
        return self._template.render(messages, self._tools if tools else None, prompting=prompting)

    def _what(self, i: int) -> str:
        return f"message {i + 1} ({self._messages[i].role})"


def _closing(
    template: ChatTemplate, conversation: Conversation, text: str, *, start: int, header: str
) -> str:
    """Return the header of a next turn if nothing else ends the last one (GLM: `<|user|>`)."""
    if template.stop_before(text, start, len(text.rstrip())) is not None:
        return ""
    *before, last = conversation.messages
    # A template may remove the reasoning once the conversation continues.
    bare = [*before, replace(_apart(last), reasoning=None)]
    follows = _answer_of_tool(last) if last.tool_calls else Message("user", "a", train=False)
    try:
        shorter = template.render(bare, conversation.tools)
        longer = template.render([*bare, follows], conversation.tools)
    except TemplateRefused:
        return ""
    at = _skip_space(longer, len(shorter))
    token = template.added_at(longer, at)
    if token is None or not longer.startswith(shorter):
        return ""
    # A token that also opens answers (`<|im_start|>`) cannot mark the end of one.
    if _opens_answers(template, conversation, token, header):
        return ""
    return longer[len(shorter) : at + len(token)]


def _opens_answers(
    template: ChatTemplate, conversation: Conversation, token: str, header: str
) -> bool:
    """Return True if the token opens the answer that follows the header.

    The header may also hold the token that ends the question (`<|im_end|>`, which vLLM's ChatML
    omits after the last turn). A first turn alone does not contain that token.
    """
    if token not in header:
        return False
    try:
        return token in template.render(conversation.messages[:1], conversation.tools)
    except TemplateRefused:
        return True


def _answer_of_tool(message: Message) -> Message:
    call = message.tool_calls[-1]
    return Message("tool", "a", train=False, name=call.name, tool_call_id=call.id)


def _opening(prompt: str) -> int:
    """Return where a generation prompt opens a reasoning block; its end if it opens none."""
    found = re.search(r"<think>\s*$", prompt)
    return found.start() if found else len(prompt)


def _apart(message: Message) -> Message:
    """Move the reasoning at the beginning of a message's content, if any, to its own field."""
    before, tag, after = message.content.rpartition("</think>")
    if message.reasoning is not None or not tag:
        return message
    reasoning = before.strip().removeprefix("<think>").strip()
    return replace(message, content=after.lstrip(), reasoning=reasoning or None)


def _texts_of(message: Message) -> Iterator[str]:
    if message.content.strip():
        yield message.content.strip()
    for call in message.tool_calls:
        yield call.name
        yield from _leaves(call.arguments)


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, str):
        yield value


def _holds(text: str, value: str) -> bool:
    """Return True if the text contains the value, as it is or escaped as in JSON."""
    return value in text or json.dumps(value, ensure_ascii=False)[1:-1] in text


def _check_prefix(prefix: str, text: str, what: str) -> None:
    if not text.startswith(prefix):
        raise DataError(
            f"{what} is not a prefix of the rendered conversation, so the tokens to train on are "
            f"ambiguous: {_difference(prefix, text)}"
        )


def _difference(one: str, other: str) -> str:
    same = _common(one, other)
    return f"the prompt has {one[same : same + 30]!r}, the row {other[same : same + 30]!r}"


def _common(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _occurrences(part: str, text: str, start: int) -> Iterator[int]:
    at = text.find(part, start)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
