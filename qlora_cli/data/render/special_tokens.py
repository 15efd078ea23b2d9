"""Special tokens that somebody typed: text in a message is data and never control.

Before the template sees a conversation, each special token in it (such as `<|im_end|>`) is replaced
by a stand-in: private-use characters, as many as it has. Every special token in the rendered text
is then the template's own. When the text is tokenized the two change places: what was typed is put
back, and the template's tokens become stand-ins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_cli.data.render.chat_template import ChatTemplate
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TYPED, _CONTROL, _FILLER = 0xF0000, 0x100000, 0x10FFFD
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class StandIns:
    """Stand-ins for the special tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def hide(self, conversation: Conversation) -> Conversation | None:
        """Replace typed special tokens by stand-ins. Returns None if there are none.

        Raises:
            DataError: the conversation has private-use characters of its own.
        """
        if conversation.messages[0].role == "text":
            return None
        texts = "\n".join(_texts(conversation))
        if self.pattern.search(texts) is None:
            return None
        if private := _PRIVATE.search(texts):
            raise DataError(
                f"a special token and the private-use character U+{ord(private[0]):X} are in one "
                "conversation, so its text would be ambiguous"
            )
        return _map_texts(conversation, self._hide)

    def restore(self, text: str) -> str:
        """Put what was typed back into a rendered text."""
        for plain, stand_in in self._typed.items():
            text = text.replace(stand_in, plain)
        return text

    @cached_property
    def ids(self) -> dict[str, int]:
        """Special tokens, and other tokens that open or close turns, with their ids.

        Not all of the latter are called special: in DeepSeek's tokenizers `<｜User｜>` is not.
        """
        turns = ChatTemplate(self._tokenizer).turn_tokens()
        return {
            token.content: token_id
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.content.strip() and (token.special or token.content in turns)
        }

    @cached_property
    def control(self) -> dict[str, str]:
        """The stand-in for each special token that the template wrote."""
        return {text: _stand_in(_CONTROL + i, text) for i, text in enumerate(self.ids)}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any special token."""
        by_length = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    @cached_property
    def _typed(self) -> dict[str, str]:
        return {text: _stand_in(_TYPED + i, text) for i, text in enumerate(self.ids)}

    def _hide(self, text: str) -> str:
        return self.pattern.sub(lambda found: self._typed[found[0]], text)


def _stand_in(character: int, text: str) -> str:
    return chr(character) + chr(_FILLER) * (len(text) - 1)


def _texts(conversation: Conversation) -> Iterator[str]:
    """Yield all text from the data that a template may write."""
    yield from _strings(conversation.tools)
    for message in conversation.messages:
        yield message.content
        yield message.reasoning or ""
        yield message.name or ""
        yield message.tool_call_id or ""
        for call in message.tool_calls:
            yield from _strings([call.name, call.arguments, call.id])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])


def _map_texts(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    def changed(message: Message) -> Message:
        return replace(
            message,
            content=change(message.content),
            reasoning=_map(message.reasoning, change),
            name=_map(message.name, change),
            tool_call_id=_map(message.tool_call_id, change),
            tool_calls=tuple(
                replace(
                    call,
                    name=change(call.name),
                    arguments=_map(call.arguments, change),
                    id=_map(call.id, change),
                )
                for call in message.tool_calls
            ),
        )

    messages = [changed(message) for message in conversation.messages]
    return replace(conversation, messages=messages, tools=_map(conversation.tools, change))


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _map(item, change) for key, item in value.items()}
    return value
