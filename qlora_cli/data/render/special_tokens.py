"""Special tokens that somebody typed: text in a message is data and never control.

Before the template sees a conversation, each `<|im_end|>` and its kin in it is replaced by
characters of private use, as many as it has. So every special token in the rendered text is the
template's own. The two then change places: what was typed is put back, the template's tokens
become characters of private use, and a copy of the tokenizer in which the special tokens are named
by these characters takes the text apart. All else about it is as it was: normalizing, splitting,
merging, and the places in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_cli.data.render.chat_template import ChatTemplate
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_TYPED, _CONTROL, _FILLER = 0xF0000, 0x100000, 0x10FFFD
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class TypedSpecialTokens:
    """Tells the special tokens of the template from those in the words of a conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def mask(self, conversation: Conversation) -> Conversation | None:
        """The conversation with stand-ins for what was typed; None if nothing was.

        Raises:
            DataError: it has characters of private use of its own.
        """
        if conversation.messages[0].role == "text":
            return None
        said = "\n".join(_texts(conversation))
        if self._special.search(said) is None:
            return None
        if private := _PRIVATE.search(said):
            raise DataError(
                f"a special token and the character U+{ord(private[0]):X} of private use are in "
                "one conversation, so it cannot be told what is text"
            )
        return _map_texts(conversation, self._hide)

    def tokenize(self, text: str) -> tuple[str, list[int], list[tuple[int, int]]]:
        """What a rendered text with stand-ins says, its tokens, and their places in it.

        Raises:
            DataError: the tokens are not the template's own and no others.
        """
        due = [self._ids[found[0]] for found in self._special.finditer(text)]
        hidden = self._special.sub(lambda found: self._control[found[0]], text)
        encoding = self._twin.encode(_restore(hidden, self._typed), add_special_tokens=False)
        special = set(self._ids.values())
        if [token for token in encoding.ids if token in special] != due:
            raise DataError(
                "a special token in a message cannot be told from those of the chat template"
            )
        return _restore(text, self._typed), encoding.ids, encoding.offsets

    def _hide(self, text: str) -> str:
        return self._special.sub(lambda found: self._typed[found[0]], text)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The special tokens, and what else opens and closes turns.

        Not all of that is called special: in the tokenizers of DeepSeek `<｜User｜>` is not.
        """
        turns = ChatTemplate(self._tokenizer).turn_tokens()
        return {
            token.content: token_id
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.content.strip() and (token.special or token.content in turns)
        }

    @cached_property
    def _typed(self) -> dict[str, str]:
        return {text: _stand_in(_TYPED + i, text) for i, text in enumerate(self._ids)}

    @cached_property
    def _control(self) -> dict[str, str]:
        return {text: _stand_in(_CONTROL + i, text) for i, text in enumerate(self._ids)}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return _any_of(self._ids)

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer with other names for the special tokens."""
        from tokenizers import Tokenizer

        document = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in document["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        model = document["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(text): i for text, i in model["vocab"].items()}
        else:
            model["vocab"] = [[self._renamed(text), score] for text, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._renamed(model["unk_token"])
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not self._makes_special(pair)]
        twin = Tokenizer.from_str(json.dumps(document))
        twin.no_truncation()
        twin.no_padding()
        return twin

    def _renamed(self, text: str) -> str:
        return self._control.get(text, text)

    def _makes_special(self, pair: list[str] | str) -> bool:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        return not self._ids.keys().isdisjoint((left, right, left + right))


def _stand_in(character: int, text: str) -> str:
    return chr(character) + chr(_FILLER) * (len(text) - 1)


def _any_of(texts: dict[str, Any]) -> re.Pattern[str]:
    by_length = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


def _restore(text: str, stand_ins: dict[str, str]) -> str:
    for plain, stand_in in stand_ins.items():
        text = text.replace(stand_in, plain)
    return text


def _texts(conversation: Conversation) -> Iterator[str]:
    """All that came from the data and that a template may write."""
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
