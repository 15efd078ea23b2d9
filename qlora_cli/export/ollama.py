"""Write a Modelfile for Ollama, which needs the chat template in a language of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from qlora_cli.common.jinja_sandbox import limited_time
from qlora_cli.evaluate.divergence import without_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turns = Sequence[tuple[str, str]]
"""Role and content of each turn."""
Render = Callable[[Turns], str]

_SYSTEM, _USER, _ANSWER, _LAST = "sys1x", "ask2x", "answer3x", "last4x"


@dataclass(frozen=True)
class TurnTemplate:
    """Text around the turns of a conversation that ends with a question."""

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    """Includes the start of the answer."""
    after_answer: str
    default_system: str | None

    def render(self, turns: Turns) -> str:
        """Render a conversation as Ollama does with the template of `text`."""
        if self.default_system is not None and turns[0][0] != "system":
            turns = [("system", self.default_system), *turns]
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_user, self.after_user),
            "assistant": ("", self.after_answer),
        }
        return "".join(around[role][0] + said + around[role][1] for role, said in turns)

    def text(self, gguf_file: str, stops: Sequence[str]) -> str:
        """Return the text of the Modelfile."""
        lines = [
            f"FROM ./{gguf_file}",
            'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}'
            f"{self.before_system}{{{{ .Content }}}}{self.after_system}"
            '{{ else if eq .Role "user" }}'
            f"{self.before_user}{{{{ .Content }}}}{self.after_user}"
            '{{ else if eq .Role "assistant" }}'
            f'{{{{ .Content }}}}{self.after_answer}{{{{ end }}}}{{{{ end }}}}"""',
        ]
        if self.default_system is not None:
            lines.append(f'SYSTEM """{self.default_system}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in stops]
        return "\n".join([*lines, ""])


def modelfile(
    tokenizer: PreTrainedTokenizerFast, gguf_file: str, stop_token_ids: Sequence[int]
) -> str | None:
    """Write a Modelfile, with which Ollama renders conversations as the chat template does.

    Returns:
        None if there is no template, or it is not a plain sequence of turns.
    """
    if not tokenizer.chat_template:
        return None

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        is_asked = turns[-1][0] == "user"
        with limited_time("the chat template"):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=is_asked
            )
        return without_begin(tokenizer, str(text))  # Ollama adds the begin token by itself

    try:
        pieces = _pieces(render)
    except (TemplateError, ValueError):
        return None
    if pieces is None:
        return None
    return pieces.text(gguf_file, tokenizer.convert_ids_to_tokens(list(stop_token_ids)))


def _pieces(render: Render) -> TurnTemplate | None:
    """Split a rendered conversation into the texts around its turns, and check them on others.

    Raises:
        ValueError, TemplateError: it cannot be split.
    """
    whole = render([("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER), ("user", _LAST)])
    before_system, rest = _cut(whole, _SYSTEM)
    to_user, rest = _cut(rest, _USER)
    after_user, rest = _cut(rest, _ANSWER)
    to_last, end = _cut(rest, _LAST)
    _, after_answer = _cut(render([("user", _USER), ("assistant", _ANSWER)]), _ANSWER)
    before_user = to_last.removeprefix(after_answer)
    after_system = to_user.removesuffix(before_user)
    alone = render([("user", _USER)])
    default = None
    if alone != before_user + _USER + end:
        default = alone.removesuffix(after_system + before_user + _USER + end)
        default = default.removeprefix(before_system)
    pieces = TurnTemplate(
        before_system, after_system, before_user, after_user, after_answer, default
    )
    conversations: list[Turns] = [
        [("user", "Hi.")],
        [("system", "Be brief."), ("user", "Hi.")],
        [("user", "Hi."), ("assistant", "Hello!"), ("user", "And?")],
        [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"), ("user", "E")],
        [("system", "S"), ("user", "A\n\nb"), ("assistant", "c"), ("user", "D?")],
    ]
    is_same = all(pieces.render(turns) == render(turns) for turns in conversations)
    said = "".join([before_system, to_user, after_user, to_last, default or ""])
    return pieces if is_same and "{{" not in said and '"""' not in said else None


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(f"{mark} is not in it")
    return before, after
