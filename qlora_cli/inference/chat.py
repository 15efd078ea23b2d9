"""Talk to a model: at a terminal, or line by line through a pipe."""

from __future__ import annotations

import io
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest

from qlora_cli.errors import DataError, QloraError, RecipeError
from qlora_cli.inference.sampling import Answer, Sampling, stream
from qlora_cli.inference.session import BASE, InferenceSession, SessionModel, open_session
from qlora_cli.runs.run_folder import Weights
from qlora_cli.types import Message

HELP = """\
/swap NAME        let another adapter answer; without a name, list them
/base             let the base model answer, without any adapter
/compare [TEXT]   TEXT (or the last message again) to the base and to the one that answers now; the
                  conversation goes on as if it had not been asked
/reset            forget the conversation
/help             this
/quit             end (as Ctrl-D); Ctrl-C ends an answer
A message that begins with a slash is written with two."""

_MIN_WIDTH = 80
"""Columns of a terminal from which answers are put side by side."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How the chat shows itself.

    Attributes:
        write: puts out answers.
        note: puts out what is not said by a model.
        is_strict: an error ends the chat, as a script wants it.
        width: columns; answers are put side by side in no fewer than 80.
    """

    write: Callable[[str], None]
    note: Callable[[str], None]
    is_strict: bool
    as_json: bool = False
    width: int = 0


class Chat:
    """A conversation: what was said, and who answers now."""

    def __init__(
        self,
        session: InferenceSession,
        sampling: Sampling,
        manner: ChatSettings,
        system: str | None = None,
    ) -> None:
        self._speaker = session
        self._sampling = sampling
        self._manner = manner
        system = session.system if system is None else system
        self._start = [] if system is None else [Message("system", system, train=False)]
        self._said: list[Message] = []
        self._turn = 0
        self.voice = session.first
        self._commands: dict[str, Callable[[str], None]] = {
            "/swap": self._swap,
            "/base": self._to_base,
            "/compare": self._compare,
            "/reset": self._reset,
            "/help": lambda _: manner.note(HELP),
        }

    def take(self, line: str) -> bool:
        """Answer a message or follow a command. False ends the chat.

        Raises:
            QloraError: in a strict chat, whatever is wrong.
            KeyboardInterrupt: in a strict chat.
        """
        line = line.strip()
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if not line.startswith("/") or line.startswith("//"):
                self._say(line.removeprefix("/") if line.startswith("//") else line)
            elif command in self._commands:
                self._commands[command](rest.strip())
            else:
                raise RecipeError(f"{command}: no such command", hint="/help lists them")
        except QloraError as error:
            if self._manner.is_strict:
                raise
            self._manner.note(f"{error}" + (f" ({error.hint})" if error.hint else ""))
        return True

    def _say(self, text: str) -> None:
        if not text:
            return
        message = Message("user", text, train=False)
        answer = self._answer(self.voice, [*self._said, message], self._manner.write)
        # What was cut off before its first word is no answer to go on from.
        if answer.text:
            self._said += [message, Message("assistant", answer.text, train=False)]
        self._put_line(self.voice, text, answer)
        self._note_end(answer)

    def _compare(self, text: str) -> None:
        last = next((m.content for m in reversed(self._said) if m.role == "user"), "")
        before = self._said if text else self._said[:-2]
        text = text or last
        tuned = self._speaker.first if self.voice.name == BASE else self.voice
        base = self._speaker.voices.get(BASE)
        if base is None or tuned.name == BASE:
            reason = "the base's weights were trained" if base is None else "there is no adapter"
            raise RecipeError(f"/compare: only one model is in memory: {reason}")
        if not text:
            raise RecipeError("/compare: nothing was said yet", hint="/compare TEXT")
        messages = [*before, Message("user", text, train=False)]
        turn, voices, answers = self._turn, [base, tuned], []
        for voice in voices:
            self._turn = turn  # the same draws for both
            answers.append(self._answer(voice, messages, lambda _: None))
            self._put_line(voice, text, answers[-1])
        if not self._manner.as_json:
            titles = [voice.name for voice in voices]
            texts = [answer.text for answer in answers]
            self._manner.write(beside(titles, texts, self._manner.width) + "\n")
        for answer in answers:
            self._note_end(answer)

    def _answer(
        self, voice: SessionModel, messages: Sequence[Message], write: Callable[[str], None]
    ) -> Answer:
        prompt = self._speaker.prompt(voice, [*self._start, *messages])
        sampling, room = self._sampling, self._room(len(prompt.input_ids))
        if room is not None and room < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=room)
        is_streamed = not self._manner.as_json
        with self._speaker.speaking(voice) as model:
            answer = stream(
                model,
                prompt,
                voice.tokenizer,
                stop_token_ids=voice.stop_token_ids,
                sampling=sampling,
                turn=self._turn,
                dtype=self._speaker.dtype,
                device=self._speaker.device,
                write=write if is_streamed else lambda _: None,
            )
        self._turn += 1
        if is_streamed:
            write("\n")
        if answer.ended == "length" and sampling.max_new_tokens == room:
            self._manner.note("the context is full; /reset begins anew")
        return answer

    def _room(self, length: int) -> int | None:
        limit = self._speaker.context_length
        return None if limit is None else limit - length

    def _put_line(self, voice: SessionModel, text: str, answer: Answer) -> None:
        if self._manner.as_json:
            line = {
                "model": voice.name,
                "message": text,
                "answer": answer.text,
                "num_tokens": answer.num_tokens,
                "ended": answer.ended,
            }
            self._manner.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _note_end(self, answer: Answer) -> None:
        if answer.ended == "interrupted" and self._manner.is_strict:
            raise KeyboardInterrupt
        if answer.ended == "length" and answer.num_tokens == self._sampling.max_new_tokens:
            self._manner.note(f"cut off after {answer.num_tokens} tokens (--max-new-tokens)")

    def _swap(self, name: str) -> None:
        voices = self._speaker.voices
        if name and name not in voices:
            raise RecipeError(f"/swap {name}: there is {', '.join(voices)}")
        if name:
            self.voice = voices[name]
        self._manner.note(
            ", ".join(f"{one} (answers)" if one == self.voice.name else one for one in voices)
        )

    def _to_base(self, _: str) -> None:
        if BASE not in self._speaker.voices:
            raise RecipeError("/base: every weight was trained, so the base is not in memory")
        self._swap(BASE)

    def _reset(self, _: str) -> None:
        self._said.clear()
        self._manner.note("forgotten")


def beside(titles: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Texts in columns, if there is room for that; else one below the other."""
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
    target: str,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "last",
    adapters: Sequence[str] = (),
    system: str | None = None,
    sampling: Sampling,
    as_json: bool = False,
) -> None:
    """Talk on standard input and output, until the input or the user ends it.

    Raises:
        QloraError: the model cannot be loaded; or, in a pipe, whatever is wrong with a line.
    """
    is_terminal = sys.stdin.isatty()
    session = open_session(target, overrides, weights=weights, adapters=adapters)
    manner = ChatSettings(
        write=_write,
        note=lambda text: print(text, file=sys.stderr, flush=True),
        is_strict=not is_terminal,
        as_json=as_json,
        width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 0,
    )
    talk = Chat(session, sampling, manner, system)
    if session.is_plain:
        manner.note("no chat template: each message is continued as it is, without those before it")
    if is_terminal:
        manner.note(f"{', '.join(session.voices)}; {talk.voice.name} answers. /help, Ctrl-D ends")
    for line in _typed(manner) if is_terminal else _piped():
        if not talk.take(line):
            return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8: {error}") from error


def _typed(manner: ChatSettings) -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D."""
    # Importing it is all: input() then lets lines be edited and called back. Windows has none.
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            # A terminal may send bytes that are not UTF-8.
            yield input("> ").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        except EOFError:
            manner.note("")
            return
        except KeyboardInterrupt:
            manner.note("\n(Ctrl-D or /quit ends the chat)")
