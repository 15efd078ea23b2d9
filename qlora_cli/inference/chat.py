"""Chat with a model: in a terminal, or line by line through a pipe."""

from __future__ import annotations

import io
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

from qlora_cli.common.standard_output import write_output
from qlora_cli.errors import DataError, QloraError, RecipeError
from qlora_cli.inference.sampling import Completion, Sampling
from qlora_cli.inference.session import BASE, InferenceSession, SessionModel, limit_sampling
from qlora_cli.types import Message

HELP = """\
/swap NAME        switch to another adapter; without a name, list them
/base             switch to the base model, without any adapter
/compare [TEXT]   send TEXT (or the last message again) to the base and to the current model; the
                  conversation itself does not change
/reset            clear the conversation
/help             show this help
/quit             end the chat (like Ctrl-D); Ctrl-C ends an answer
Start a message with two slashes to send one that begins with a slash."""

_MIN_WIDTH = 80
"""Terminal columns from which answers are shown side by side."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Input and output of a chat.

    Attributes:
        write: writes answers.
        note: writes everything else.
        is_strict: an error ends the chat, as scripts need.
        width: terminal columns; from 80 on, answers are shown side by side.
    """

    write: Callable[[str], None]
    note: Callable[[str], None]
    is_strict: bool
    as_json: bool = False
    width: int = 0


class Chat:
    """A conversation and the model that currently answers."""

    def __init__(
        self,
        session: InferenceSession,
        sampling: Sampling,
        settings: ChatSettings,
        system: str | None = None,
    ) -> None:
        self._session = session
        self._sampling = sampling
        self._settings = settings
        self._reader = session.reader(system)
        self._history: list[Message] = []
        self._turn = 0
        self.model = session.default
        self._commands: dict[str, Callable[[str], None]] = {
            "/swap": self._swap,
            "/base": self._switch_to_base,
            "/compare": self._compare,
            "/reset": self._reset,
            "/help": lambda _: settings.note(HELP),
        }

    def handle(self, line: str) -> bool:
        """Answer a message or run a command. Return False to end the chat.

        Raises:
            QloraError: in a strict chat, for anything that goes wrong.
            KeyboardInterrupt: in a strict chat.
        """
        line = line.strip()
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if not line.startswith("/") or line.startswith("//"):
                self._send(line.removeprefix("/") if line.startswith("//") else line)
            elif command in self._commands:
                self._commands[command](rest.strip())
            else:
                raise RecipeError(f"{command}: no such command", hint="/help lists them")
        except QloraError as error:
            if self._settings.is_strict:
                raise
            self._settings.note(f"{error}" + (f" ({error.hint})" if error.hint else ""))
        return True

    def _send(self, text: str) -> None:
        if not text:
            return
        message = Message("user", text, train=False)
        answer = self._answer(self.model, [*self._history, message], self._settings.write)
        # An answer that was interrupted before its first word does not join the conversation.
        if answer.text:
            self._history += [message, Message("assistant", answer.text, train=False)]
        self._write_json(self.model, text, answer)
        self._report_end(answer)

    def _compare(self, text: str) -> None:
        last = next((m.content for m in reversed(self._history) if m.role == "user"), "")
        before = self._history if text else self._history[:-2]
        text = text or last
        tuned = self._session.default if self.model.name == BASE else self.model
        base = self._session.models.get(BASE)
        if base is None or tuned.name == BASE:
            reason = "all weights were trained" if base is None else "there is no adapter"
            raise RecipeError(f"/compare: only one model is in memory: {reason}")
        if not text:
            raise RecipeError("/compare: there is no message yet", hint="/compare TEXT")
        messages = [*before, Message("user", text, train=False)]
        turn, models, answers = self._turn, [base, tuned], []
        for model in models:
            self._turn = turn  # both sample with the same seed
            answers.append(self._answer(model, messages, lambda _: None))
            self._write_json(model, text, answers[-1])
        if not self._settings.as_json:
            titles = [model.name for model in models]
            texts = [answer.text for answer in answers]
            self._settings.write(side_by_side(titles, texts, self._settings.width) + "\n")
        for answer in answers:
            self._report_end(answer)

    def _answer(
        self, model: SessionModel, messages: Sequence[Message], write: Callable[[str], None]
    ) -> Completion:
        prompt = self._session.prompt(model, self._reader.conversation(messages))
        sampling = limit_sampling(model, self._sampling, prompt)
        is_streamed = not self._settings.as_json
        with self._session.use(model) as generator:
            answer = generator.stream(
                prompt, sampling, turn=self._turn, write=write if is_streamed else lambda _: None
            )
        self._turn += 1
        if is_streamed:
            write("\n")
        is_full = sampling.max_new_tokens < self._sampling.max_new_tokens
        if answer.ended == "length" and is_full:
            self._settings.note("the context is full; /reset clears the conversation")
        return answer

    def _write_json(self, model: SessionModel, text: str, answer: Completion) -> None:
        if self._settings.as_json:
            line = {
                "model": model.name,
                "message": text,
                "answer": answer.text,
                "num_tokens": answer.num_tokens,
                "ended": answer.ended,
            }
            self._settings.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _report_end(self, answer: Completion) -> None:
        if answer.ended == "interrupted" and self._settings.is_strict:
            raise KeyboardInterrupt
        if answer.ended == "length" and answer.num_tokens == self._sampling.max_new_tokens:
            self._settings.note(f"cut off after {answer.num_tokens} tokens (--max-new-tokens)")

    def _swap(self, name: str) -> None:
        models = self._session.models
        if name and name not in models:
            raise RecipeError(f"/swap {name}: no such model; choose from {', '.join(models)}")
        if name:
            self.model = models[name]
        self._settings.note(
            ", ".join(f"{one} (current)" if one == self.model.name else one for one in models)
        )

    def _switch_to_base(self, _: str) -> None:
        if BASE not in self._session.models:
            raise RecipeError("/base: all weights were trained, so the base is not in memory")
        self._swap(BASE)

    def _reset(self, _: str) -> None:
        self._history.clear()
        self._settings.note("conversation cleared")


def side_by_side(titles: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Format texts in columns, or one below the other if the terminal is narrow."""
    if width < _MIN_WIDTH:
        return "\n".join(f"{title}: {text}" for title, text in zip(titles, texts, strict=True))
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [
        [title, "-" * each, *(line for part in text.split("\n") for line in _wrapped(part, each))]
        for title, text in zip(titles, texts, strict=True)
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{cell:<{each}}" for cell in row).rstrip() for row in rows)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def chat(
    session: InferenceSession,
    sampling: Sampling,
    *,
    system: str | None = None,
    as_json: bool = False,
) -> None:
    """Chat on standard input and output until the input or the user ends it.

    Raises:
        QloraError: in a pipe, for anything that is wrong with a line.
    """
    is_terminal = sys.stdin.isatty()
    settings = ChatSettings(
        write=write_output,
        note=lambda text: print(text, file=sys.stderr, flush=True),
        is_strict=not is_terminal,
        as_json=as_json,
        width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 0,
    )
    conversation = Chat(session, sampling, settings, system)
    if session.is_plain:
        settings.note("no chat template: each message is continued verbatim, without earlier ones")
    if is_terminal:
        settings.note(
            f"models: {', '.join(session.models)}; current: {conversation.model.name}. "
            "/help lists the commands, Ctrl-D ends the chat"
        )
    for line in _read_terminal(settings) if is_terminal else _read_pipe():
        if not conversation.handle(line):
            return


def _read_pipe() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8: {error}") from error


def _read_terminal(settings: ChatSettings) -> Iterator[str]:
    """Yield typed lines until Ctrl-D."""
    # Importing readline gives input() line editing and a history. Windows has no such module.
    with suppress(ImportError):
        import readline  # noqa: F401  imported for its effect on input()
    while True:
        try:
            # A terminal may send bytes that are not UTF-8.
            yield input("> ").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        except EOFError:
            settings.note("")
            return
        except KeyboardInterrupt:
            settings.note("\n(Ctrl-D or /quit ends the chat)")
