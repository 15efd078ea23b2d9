"""Apply the chat template of a tokenizer: conversations as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.jinja_sandbox import limited_time
from qlora_cli.common.user_paths import missing_path_hint
from qlora_cli.errors import DataError
from qlora_cli.types import Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = "Qz0zQ"
_DATE = date(2024, 7, 26)
"""Today's date for templates that ask for it (Llama 3.2, GPT-OSS). Rows must not depend on the day
they are prepared: a run resumed after midnight would see different ones. Llama's templates write
this date where they cannot ask."""
_DIRECTIVES = ("%-d", "%-m", "%a", "%A", "%b", "%B", "%d", "%m", "%y", "%Y", "%H", "%M", "%S")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class TemplateRefused(DataError):
    """The chat template refuses this conversation."""


class ChatTemplate:
    """Renders messages, under the keys that the template reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        by_length = sorted((text for text in added if text.strip()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    def check(self) -> None:
        """Raise DataError if the tokenizer has no chat template, or a broken one."""
        try:
            self._tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template, and the rows are conversations",
                hint="name one in data.chat_template, or use a format without roles: text, or "
                "prompt_completion with as_chat: false",
            ) from error
        # A template may refuse this conversation and accept those of the rows.
        with suppress(TemplateRefused):
            self.render([Message("user", "a", train=False)])

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompting: bool = False,
    ) -> str:
        """Render messages as text.

        Args:
            prompting: add the generation prompt.

        Raises:
            TemplateRefused: the template does not accept them.
            DataError: the template is broken.
        """
        turns = [self._turn(message, in_parts=self._takes_parts) for message in messages]
        return self._render(turns, tools, prompting)

    def added_at(self, text: str, at: int) -> str | None:
        """Return the added token (such as `<|im_end|>`) at a place in the text."""
        found = self._added.match(text, at)
        return found[0] if found else None

    def added_in(self, text: str, start: int) -> list[int]:
        """Return the places of the added tokens in a text, from `start` on."""
        return [found.start() for found in self._added.finditer(text, start)]

    def is_eos_at(self, text: str, at: int) -> bool:
        """Return True if the added token at a place is the tokenizer's EOS."""
        eos: str | None = self._tokenizer.eos_token
        return eos is not None and self.added_at(text, at) == eos

    def stop_before(self, text: str, start: int, end: int) -> int | None:
        """Find the added token that ends at `end` and may stop a turn that begins at `start`.

        Returns the place where the token begins. The closing tag of something in the turn
        (`</tool_call>`) is not a stop token.
        """
        *_, last = [None, *self._added.finditer(text, start, end)]
        if last is None or last.end() < end:
            return None
        return None if self.is_closing_tag(last[0], text[start:end]) else last.start()

    def is_closing_tag(self, token: str, before: str) -> bool:
        """Return True if a token closes a tag opened before (`</think>`) and not a turn."""
        opening = token.replace("</", "<", 1)
        return token.startswith("</") and opening in before and token != self._tokenizer.eos_token

    def added_over(self, text: str, at: int) -> int:
        """Return the place, or if it is inside an added token, where that token begins."""
        spans = (found.span() for found in self._added.finditer(text))
        return next((start for start, end in spans if start < at < end), at)

    def turn_tokens(self) -> set[str]:
        """Return the added tokens that open or close turns.

        Paired tags (`<think>`, `<tool_call>`) are not among them: an answer may contain its
        reasoning or its calls written out.

        Raises:
            DataError: the template is broken.
        """
        question, answer = Message("user", _PROBE, False), Message("assistant", _PROBE, False)
        found: set[str] = set()
        for turns, prompting in (([question], True), ([question, answer], False)):
            with suppress(TemplateRefused):
                text = self.render(turns, prompting=prompting)
                # The source has those of tools and of other roles.
                found.update(self._added.findall(f"{text}\n{self._source}"))
        return {token for token in found if not self._is_paired_tag(token)}

    def _is_paired_tag(self, token: str) -> bool:
        tag = re.fullmatch(r"</?([\w-]+)>", token)
        return tag is not None and all(
            self._added.fullmatch(each) for each in (f"<{tag[1]}>", f"</{tag[1]}>")
        )

    def looks_at(self, values: Sequence[str]) -> bool:
        """Return True if a value contains text that the template may test for: `</think>`."""
        return self._constants.search("\n".join(values)) is not None

    @cached_property
    def _source(self) -> str:
        source = self._tokenizer.get_chat_template()
        assert isinstance(source, str)
        return source

    @cached_property
    def _dated_source(self) -> str:
        """The template; if it reads the clock, after a macro that replaces the clock."""
        if "strftime_now" not in self._source:
            return self._source
        format_date = "".join(f"|replace('{x}','{_DATE.strftime(x)}')" for x in _DIRECTIVES)
        # The expression at the end keeps Jinja from trimming the beginning of the template.
        macro = f"{{% macro strftime_now(x) %}}{{{{ x{format_date} }}}}{{% endmacro %}}{{{{ '' }}}}"
        return macro + self._source

    @cached_property
    def _constants(self) -> re.Pattern[str]:
        import jinja2

        strings = (
            value[1:-1].replace("\\n", " ").split()
            for _, kind, value in jinja2.Environment().lex(self._source)
            if kind == "string"
        )
        # Words without markup occur in ordinary contents too, and no template tests for them.
        marks = {part for parts in strings for part in parts if len(part) > 2}
        marks = {part for part in marks if re.search(r"[<>\[\]|/]", part)}
        return re.compile("|".join(map(re.escape, sorted(marks))) or r"(?!)")

    @cached_property
    def _reasoning_keys(self) -> list[str]:
        named = [key for key in _REASONING_KEYS if re.search(rf"\b{key}\b", self._source)]
        return named or ["reasoning_content"]

    @cached_property
    def _takes_parts(self) -> bool:
        """True if contents have to be lists of parts, as templates for images require."""

        def shows(*, in_parts: bool) -> bool:
            try:
                turn = self._turn(Message("user", _PROBE, train=False), in_parts=in_parts)
                return _PROBE in self._render([turn], None, False)
            except TemplateRefused:
                return False

        return not shows(in_parts=False) and shows(in_parts=True)

    @cached_property
    def _takes_json(self) -> bool:
        """True if call arguments have to be JSON text: some templates append them to text."""
        call = Message(
            "assistant", "", False, tool_calls=(ToolCall("f", {"a": _PROBE}, "c00000000"),)
        )
        question = self._turn(Message("user", "a", train=False), in_parts=self._takes_parts)

        def shows(*, as_json: bool) -> bool:
            try:
                turn = self._turn(call, in_parts=self._takes_parts, as_json=as_json)
                return _PROBE in self._render([question, turn], None, False)
            except TemplateRefused:
                return False

        return not shows(as_json=False) and shows(as_json=True)

    def _turn(
        self, message: Message, *, in_parts: bool, as_json: bool | None = None
    ) -> dict[str, Any]:
        text = message.content
        turn: dict[str, Any] = {
            "role": message.role,
            "content": [{"type": "text", "text": text}] if in_parts else text,
        }
        if message.reasoning is not None:
            turn |= dict.fromkeys(self._reasoning_keys, message.reasoning)
        if message.tool_calls:
            as_json = self._takes_json if as_json is None else as_json
            turn["tool_calls"] = [_call(call, as_json=as_json) for call in message.tool_calls]
        optional = {"name": message.name, "tool_call_id": message.tool_call_id}
        return turn | {key: value for key, value in optional.items() if value is not None}

    def _render(self, turns: list[dict[str, Any]], tools: Any, prompting: bool) -> str:
        import jinja2

        try:
            with limited_time("the chat template"):
                text = self._tokenizer.apply_chat_template(
                    turns,
                    tools=tools,
                    tokenize=False,
                    chat_template=self._dated_source,
                    add_generation_prompt=prompting,
                )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"chat template, line {error.lineno}: {error.message}") from error
        # A template is somebody else's program: it may even add a number to a text.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise TemplateRefused(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text


def _call(call: ToolCall, *, as_json: bool) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False) if as_json else call.arguments
    shape = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return shape if call.id is None else {"id": call.id, **shape}


def read_chat_template(path: str | None) -> str | None:
    """Read the Jinja text of `data.chat_template`. Returns None if no file is named.

    Raises:
        DataError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        hint = missing_path_hint(path) if isinstance(error, FileNotFoundError) else None
        raise DataError(
            f"data.chat_template: {path}: {error.strerror or error}", hint=hint
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template: {path}: not UTF-8: {error}") from error
