"""Find tool calls that disagree with the tools and the results of their row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_cli.data.prepared.statistics import NAMED
from qlora_cli.types import Conversation, Message

NO_TOOLS = "rows that call tools, but declare none"
UNDECLARED = "rows that call a tool they do not declare"
INCOMPLETE = "rows with a call that lacks a required argument"
UNKNOWN_CALL = "rows with a tool result for an unknown call id"


class ToolCallAudit:
    """Counts rows by what is wrong with their tool calls, and keeps the first places of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, row: Conversation) -> None:
        """Count a row under each of its problems."""
        for problem in set(tool_call_problems(row)):
            self.counts[problem] += 1
            places = self.places.setdefault(problem, [])
            if len(places) < NAMED:
                places.append(row.place)


def tool_call_problems(row: Conversation) -> Iterator[str]:
    """Yield the problems of a row's tool calls, repeated if several calls have them."""
    required = {
        function["name"]: _required(function.get("parameters"))
        for function in (tool["function"] for tool in row.tools or [])
    }
    for messages in (row.messages, row.rejected or []):
        for message in messages:
            for call in message.tool_calls:
                if not required:
                    yield NO_TOOLS
                elif call.name not in required:
                    yield UNDECLARED
                elif not call.arguments.keys() >= required[call.name]:
                    yield INCOMPLETE
        if _has_unknown_call(messages):
            yield UNKNOWN_CALL


def _required(parameters: Any) -> set[str]:
    """Return the required keys of a function's JSON schema; none if it is not an object schema."""
    keys = parameters.get("required") if isinstance(parameters, dict) else None
    return {key for key in keys if isinstance(key, str)} if isinstance(keys, list) else set()


def _has_unknown_call(messages: Sequence[Message]) -> bool:
    """Tell if a tool's result names a call id that no call before it has."""
    called: set[str | None] = {None}
    for message in messages:
        if message.tool_call_id not in called:
            return True
        called.update(call.id for call in message.tool_calls)
    return False
