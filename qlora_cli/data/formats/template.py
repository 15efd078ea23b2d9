"""Format written by the user: turns made from the columns of any flat row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from qlora_cli.common.config import Config
from qlora_cli.common.jinja_sandbox import OutOfTimeError, limited_time, refuse_endless
from qlora_cli.data.formats.fields import missing
from qlora_cli.errors import DataError, ModelError
from qlora_cli.types import Conversation, Message, Row, RowKind

if TYPE_CHECKING:
    from jinja2 import Template as JinjaTemplate


class TemplateFormat(Config):
    """Jinja texts over the columns of a row, one for each turn."""

    example: ClassVar[Row] = {"prompt": "The capital of France?", "completion": "Paris."}

    rows: ClassVar[RowKind] = "answers"
    type: Literal["template"] = "template"
    system: str | None = None
    """The system message."""
    user: str = "{{ prompt }}"
    """The user message; each column of the row is available by its name."""
    assistant: str = "{{ completion }}"
    """The answer, which is trained on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        for role, text in self._texts():
            try:
                check_template(text)
            except ValueError as error:
                problems.append(f"{role}: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def to_conversation(self, row: Row) -> Conversation:
        """Make a user and an assistant turn. The second is trained on."""
        return Conversation(
            [
                Message(role, rendered(role, text, row), train=role == "assistant")
                for role, text in self._texts()
            ]
        )

    @property
    def prompt_columns(self) -> list[str]:
        """The columns that the system message and the user message use."""
        texts = [text for role, text in self._texts() if role != "assistant"]
        return sorted({column for text in texts for column in _compiled(text).columns})

    def fixed_system(self) -> str | None:
        """Return the system message if it is the same for every row."""
        if self.system is None or _compiled(self.system).columns:
            return None
        return rendered("system", self.system, {})

    def _texts(self) -> list[tuple[Literal["system", "user", "assistant"], str]]:
        system = () if self.system is None else (("system", self.system),)
        return [*system, ("user", self.user), ("assistant", self.assistant)]


def check_template(text: str) -> None:
    """Raise ValueError if a text is not Jinja."""
    from jinja2 import TemplateSyntaxError

    try:
        # Before compilation, which evaluates constant expressions.
        refuse_endless(text, "the template")
        _compiled(text)
    except (ModelError, RecursionError) as error:
        raise ValueError(str(error)) from error
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the template: {error.message}") from error


def reads_column(name: str) -> bool:
    """Tell if `{{ name }}` reads the column of that name: not if it has blanks, or is a keyword."""
    text = f"{{{{ {name} }}}}"
    try:
        check_template(text)
        if _compiled(text).columns != {name}:
            return False
        return name.isidentifier() and rendered("user", text, {name: "a"}) == "a"
    except (ValueError, DataError):
        return False


@dataclass(frozen=True)
class _Compiled:
    template: JinjaTemplate
    columns: frozenset[str]
    """The columns that the text uses."""


@lru_cache(maxsize=64)
def _compiled(text: str) -> _Compiled:
    from jinja2 import StrictUndefined
    from jinja2.meta import find_undeclared_variables
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_checked, keep_trailing_newline=True
    )
    # Jinja's own filter is for HTML: it would escape "<".
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    columns = find_undeclared_variables(environment.parse(text)) - environment.globals.keys()
    return _Compiled(environment.from_string(text), frozenset(columns))


def _checked(value: Any) -> Any:
    """Refuse values whose Python spelling would end up in the training text."""
    if value is None:
        raise ValueError("null is not text")
    if isinstance(value, (list, tuple, dict)):
        raise ValueError(f"a {type(value).__name__} is not text; use its items, join or tojson")
    return value


def rendered(role: str, template: str, row: Row) -> str:
    """Render a template with the columns of a row.

    Raises:
        DataError: rendering fails, or (except for a system message) the text is empty.
    """
    from jinja2 import UndefinedError

    compiled = _compiled(template)
    columns = ", ".join(map(repr, sorted(compiled.columns)))
    field = f"field {columns} (in {role})" if columns else f"the template of {role}"
    try:
        with limited_time(field):
            text = compiled.template.render(row)
        text.encode("utf-8")
    except OutOfTimeError:
        raise
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        raise DataError(f"{field}: half of a surrogate pair ({character!r}) is not text") from error
    except UndefinedError as error:
        if absent := sorted(compiled.columns - row.keys()):
            raise DataError(f"field '{absent[0]}': {missing(absent[0], row)}") from error
        raise DataError(f"{field}: {error}") from error
    # Filters raise errors of any kind, and the cause is always the content of this row.
    except Exception as error:
        raise DataError(f"{field}: {error}") from error
    if "\0" in text:
        raise DataError(f"{field}: NUL (\\u0000) is not text")
    if role != "system" and not text.strip():
        raise DataError(f"{field}: empty")
    return text
