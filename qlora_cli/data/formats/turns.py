"""Read turns and tool calls of conversations, and check their order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qlora_cli.data.formats.fields import (
    as_list,
    as_object,
    as_text,
    is_given,
    parsed,
    path_of,
    refuse,
    shown,
    text_of,
    value_of,
)
from qlora_cli.errors import DataError
from qlora_cli.types import Message, Role, Row, ToolCall

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
OTHER_ROLES: dict[str, str] = {
    "human": "user",
    "prompter": "user",
    "question": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "answer": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
"""Names of roles in other tools, in lower case, which `data.repair: [role_names]` reads."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MARKS = ("train", "weight")
# A system prompt may be empty on purpose (some templates insert their own otherwise), and so may
# the answer of a tool.
_MAY_BE_EMPTY: tuple[Role, ...] = ("system", "tool")


class SameRoleError(DataError):
    """Two consecutive messages have the same role.

    Attributes:
        field: the column of the messages.
        index: the place of the second one.
    """

    def __init__(self, field: str, index: int, role: Role) -> None:
        super().__init__(f"field '{field}[{index}]': two messages of role {role} in a row")
        self.field = field
        self.index = index


def read_turns(turns: Sequence[tuple[str, Any]]) -> list[Message]:
    """Read turns in either shape, recognized by their keys: OpenAI's `role`, ShareGPT's `from`."""
    return [
        sharegpt_message(as_object(turn, where), where)
        if "from" in as_object(turn, where)
        else openai_message(turn, where)
        for where, turn in turns
    ]


def messages_of(row: Row, field: str, role: Literal["user", "assistant"]) -> list[Message]:
    """Read the turns in a column: messages, one message, or a text (one message of `role`)."""
    value: Any = value_of(row, field)
    if isinstance(value, str):
        return [Message(role, text_of(row, field), train=role == "assistant")]
    if isinstance(value, list):
        turns = as_list(value, field, "a list of messages")
        if not turns:
            raise DataError(f"field '{field}': got {shown(value)}, expected messages")
        return read_turns(turns)
    if not isinstance(value, Mapping):
        raise DataError(f"field '{field}': got {shown(value)}, expected text or messages")
    return read_turns([(field, value)])


def openai_message(turn: Mapping[str, Any], where: str) -> Message:
    """Read one turn in OpenAI's shape."""
    role = _role(turn, "role", where, ROLES)
    # Ignoring these would silently change what the model is trained on.
    refuse(turn, "function_call", "audio", "refusal", where=where)
    if role != "assistant":
        refuse(turn, "tool_calls", *_REASONING, where=where)
    if role != "tool":
        refuse(turn, "tool_call_id", where=where)
    calls = _tool_calls(turn, where) if is_given(turn, "tool_calls") else ()
    marked = _marked(turn, where)
    content = "" if calls and turn.get("content") is None else _content(turn, role, where, calls)
    return Message(
        role,
        content,
        train=role == "assistant" if marked is None else marked,
        reasoning=_reasoning(turn, where),
        tool_calls=calls,
        name=text_of(turn, "name", where) if role == "tool" and is_given(turn, "name") else None,
        tool_call_id=text_of(turn, "tool_call_id", where)
        if is_given(turn, "tool_call_id")
        else None,
        is_marked=marked is not None,
        ignored=_ignored(turn, "role", "content", *_OF_ROLE.get(role, ())),
    )


def sharegpt_message(turn: Mapping[str, Any], where: str) -> Message:
    """Read one turn in ShareGPT's shape; the value of `function_call` is JSON text."""
    role = _role(turn, "from", where, SHAREGPT_ROLES)
    refuse(turn, "tool_calls", *_REASONING, where=where)
    marked = _marked(turn, where)
    is_marked, train = marked is not None, role == "assistant" if marked is None else marked
    ignored = _ignored(turn, "from", "value")
    if turn["from"] != "function_call":
        content = text_of(turn, "value", where, may_be_empty=role in _MAY_BE_EMPTY)
        return Message(role, content, train=train, is_marked=is_marked, ignored=ignored)
    path = path_of(where, "value")
    calls = parsed(value_of(turn, "value", where), path)
    # A single call needs no list.
    entries = (
        as_list(calls, path, "a list of calls") if isinstance(calls, list) else [(path, calls)]
    )
    if not entries:
        raise DataError(f"field '{path}': it has no call")
    asked = tuple(_call(*entry) for entry in entries)
    return Message(role, "", train=train, tool_calls=asked, is_marked=is_marked, ignored=ignored)


def read_tools(row: Row, field: str = "tools") -> list[dict[str, Any]] | None:
    """Read the functions that the assistant may call, in OpenAI's shape; a list, or JSON text."""
    if not is_given(row, field):
        return None
    tools = []
    for where, entry in as_list(parsed(row[field], field), field, "a list of functions"):
        tool = dict(as_object(entry, where))
        # Many datasets leave out OpenAI's wrapping, which templates read.
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
        function = as_object(tool["function"], path_of(where, "function"))
        text_of(function, "name", path_of(where, "function"))
        tools.append(_without_nulls(tool))
    return tools or None


def check_order(messages: Sequence[Message], field: str) -> list[Message]:
    """Return the messages if their order is valid and the last one is an answer.

    Raises:
        DataError: they are not valid; the field is named.
    """
    checked = check_turns(messages, field)
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"field '{field}': no assistant message, so nothing to train on")
    if messages[-1].role != "assistant":
        raise DataError(
            f"field '{field}': ends with a message of role {messages[-1].role}, so its answer is "
            "missing"
        )
    if not any(message.train for message in messages):
        raise DataError(f"field '{field}': every answer has train: false, so nothing to train on")
    return checked


def check_turns(messages: Sequence[Message], field: str) -> list[Message]:
    """Return the messages if their order is valid; the last one may be of any role.

    Raises:
        DataError: it is not valid; the field is named.
    """
    waiting = 0  # calls that may still be answered
    before: Message | None = None
    for i, message in enumerate(messages):
        reason = _out_of_order(message, before, waiting)
        if reason is not None:
            raise DataError(f"field '{field}[{i}]': {reason}")
        if before is not None and message.role == before.role != "tool":
            raise SameRoleError(field, i, message.role)
        waiting = waiting - 1 if message.role == "tool" else len(message.tool_calls)
        before = message
    return list(messages)


def _out_of_order(message: Message, before: Message | None, waiting: int) -> str | None:
    if message.role == "system" and before is not None:
        return "a system message has to come first"
    if message.role == "tool" and waiting <= 0:
        return "a tool's answer without a call before it"
    return None


def _role(turn: Mapping[str, Any], key: str, where: str, roles: Mapping[str, Role]) -> Role:
    name = value_of(turn, key, where)
    # A list or an object as a role cannot be a dictionary key.
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        is_known = isinstance(name, str) and name.strip().lower() in OTHER_ROLES
        raise DataError(
            f"field '{path_of(where, key)}': got {shown(name)}, expected one of {', '.join(roles)}"
            f"{'; data.repair: role_names reads it' if is_known else ''}"
        )
    return role


def _content(turn: Mapping[str, Any], role: Role, where: str, calls: tuple[ToolCall, ...]) -> str:
    content = value_of(turn, "content", where)
    may_be_empty = role in _MAY_BE_EMPTY or bool(calls)
    path = path_of(where, "content")
    if not isinstance(content, list):
        return as_text(content, path, may_be_empty=may_be_empty)
    texts = []
    for at, entry in as_list(content, path, "text"):
        part = as_object(entry, at)
        kind = value_of(part, "type", at)
        if kind != "text":
            raise DataError(f"field '{at}.type': got {shown(kind)}, expected 'text'")
        texts.append(text_of(part, "text", at, may_be_empty=True))
    return as_text("".join(texts), path, may_be_empty=may_be_empty)


def _reasoning(turn: Mapping[str, Any], where: str) -> str | None:
    given = [key for key in _REASONING if is_given(turn, key)]
    if len({repr(turn[key]) for key in given}) > 1:
        raise DataError(f"field '{path_of(where, given[1])}': not the same as {given[0]}")
    return text_of(turn, given[0], where) if given else None


def _marked(turn: Mapping[str, Any], where: str) -> bool | None:
    """Return the turn's own mark, if any: `train`, or OpenAI's `weight` of 0 or 1."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"field '{where}.train': got {shown(train)}, expected true or false")
    if weight is None:
        return train
    # True and 1.0 both equal 1 in Python; the first is a mistake, the second a column of a table.
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"field '{where}.weight': got {shown(weight)}, expected 0 or 1")
    if train is not None and train != weight:
        raise DataError(f"field '{where}.weight': got {weight}, and train is {str(train).lower()}")
    return bool(weight)


_OF_ROLE: dict[Role, tuple[str, ...]] = {
    "assistant": ("tool_calls", *_REASONING),
    "tool": ("name", "tool_call_id"),
}
"""Keys that are read or refused only in turns of one role."""


def _ignored(turn: Mapping[str, Any], *read: str) -> tuple[str, ...]:
    return tuple(
        str(key) for key in turn if key not in read and key not in _MARKS and is_given(turn, key)
    )


def _tool_calls(turn: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    path = path_of(where, "tool_calls")
    calls = parsed(turn["tool_calls"], path)
    return tuple(_call(*entry) for entry in as_list(calls, path, "a list of calls"))


def _call(where: str, entry: object) -> ToolCall:
    """Read a call in OpenAI's shape, or without its wrapping."""
    call = as_object(entry, where)
    number = text_of(call, "id", where) if is_given(call, "id") else None
    if "function" in call:
        where = path_of(where, "function")
        call = as_object(call["function"], where)
    name, path = text_of(call, "name", where), path_of(where, "arguments")
    arguments = as_object(parsed(value_of(call, "arguments", where), path), path)
    # Check every text in it for surrogates.
    as_text(json.dumps(arguments, ensure_ascii=False, default=str), path)
    return ToolCall(name, dict(arguments), number)


def _without_nulls(value: Any) -> Any:
    # A table gives every function the parameters of all others, as nulls.
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
