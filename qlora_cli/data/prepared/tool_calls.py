"""Find tool calls that disagree with the tools and the results of their row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from qlora_cli.data.prepared.statistics import NAMED
from qlora_cli.data.render.chat_template import ChatTemplate, TemplateRefused
from qlora_cli.types import Conversation, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_TOOLS = "rows that call tools, but declare none"
UNDECLARED = "rows that call a tool they do not declare"
INCOMPLETE = "rows with a call that lacks a required argument"
UNKNOWN_CALL = "rows with a tool result for an unknown call id"
WITHOUT_ID = "rows with a tool result without a call id"
REPEATED = "rows with two tool results for one call id"
UNANSWERED = "rows with a call that is never answered"
REORDERED = "rows with tool results in another order than their calls"


class ToolCallAudit:
    """Counts rows by what is wrong with their tool calls, and keeps the first places of each.

    Results in another order than their calls are counted where the chat template writes nothing
    that says which call each of them answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._template = ChatTemplate(tokenizer)
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, row: Conversation) -> None:
        """Count a row under each of its problems."""
        problems = set(tool_call_problems(row))
        if self._is_misleading(row):
            problems.add(REORDERED)
        for problem in problems:
            self.counts[problem] += 1
            places = self.places.setdefault(problem, [])
            if len(places) < NAMED:
                places.append(row.place)

    def _is_misleading(self, row: Conversation) -> bool:
        """Return True if a reader of the text takes a result for that of another call."""
        in_order = _in_order_of_calls(row.messages)
        if in_order == row.messages:
            return False
        try:
            text = self._template.render(in_order, row.tools)
        except TemplateRefused:
            return False  # a template that checks the ids
        return text == self._template.render(row.messages, row.tools)


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
        yield from _problems_of_ids(messages)
        for _, calls, results in _answered_calls(messages):
            yield from _problems_of_results(calls, results)


def _required(parameters: Any) -> set[str]:
    """Return the required keys of a function's JSON schema; none if it is not an object schema."""
    keys = parameters.get("required") if isinstance(parameters, dict) else None
    return {key for key in keys if isinstance(key, str)} if isinstance(keys, list) else set()


def _problems_of_ids(messages: Sequence[Message]) -> Iterator[str]:
    """Yield the problems of call ids, which a later turn of the conversation may use again."""
    called: Counter[str | None] = Counter()
    answered: Counter[str | None] = Counter()
    for message in messages:
        called.update(call.id for call in message.tool_calls)
        if message.tool_call_id is None:
            continue
        if not called[message.tool_call_id]:
            yield UNKNOWN_CALL
            continue
        answered[message.tool_call_id] += 1
        if answered[message.tool_call_id] > called[message.tool_call_id]:
            yield REPEATED


def _answered_calls(
    messages: Sequence[Message],
) -> Iterator[tuple[int, tuple[ToolCall, ...], list[Message]]]:
    """Yield the calls of each turn but the last, with the results after it and their place."""
    for start, message in enumerate(messages[:-1], start=1):
        if message.tool_calls:
            results = list(takewhile(lambda one: one.role == "tool", messages[start:]))
            yield start, message.tool_calls, results


def _problems_of_results(calls: Sequence[ToolCall], results: Sequence[Message]) -> Iterator[str]:
    ids: Counter[str | None] = Counter(call.id for call in calls if call.id is not None)
    # Rows without any ids tell calls apart by their order.
    if ids and any(result.tool_call_id is None for result in results):
        yield WITHOUT_ID
    matched = ids & Counter(result.tool_call_id for result in results)
    others = [result for result in results if result.tool_call_id not in ids]
    # A result with an unknown id, or without one, may answer any of the remaining calls.
    if matched.total() + len(others) < len(calls):
        yield UNANSWERED


def _in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """Give the results after each turn, in their order, the ids and names of its calls in theirs.

    A result with an unknown id, or without one, stays as it is.
    """
    changed = list(messages)
    for start, calls, results in _answered_calls(messages):
        order: dict[str | None, int] = {
            call.id: at for at, call in enumerate(calls) if call.id is not None
        }
        known = [at for at, result in enumerate(results) if result.tool_call_id in order]
        called = sorted(known, key=lambda at: order[results[at].tool_call_id])
        for at, source in zip(known, called, strict=True):
            taken = results[source]
            changed[start + at] = replace(
                results[at], tool_call_id=taken.tool_call_id, name=taken.name
            )
    return changed
