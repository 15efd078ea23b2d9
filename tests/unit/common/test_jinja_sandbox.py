"""Templates of others: no way out of the sandbox, and an end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.common.jinja_sandbox import OutOfTimeError, limited_time, refuse_endless
from qlora_cli.data.render.chat_template import ChatTemplate
from qlora_cli.data.sources import BadRows
from qlora_cli.errors import DataError, ModelError, QloraError
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.types import Message
from tests.conftest import exit_code, make_tokenizer

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('x') }}",
    "{{ (messages|attr('__class__')).__name__ }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ '{0.__class__.__base__}'.format(1) }}",
    "{{ messages.clear() }}",
    "{% for x in range(10000000) %}{% endfor %}",
]
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{% for a in range(9999) %}{{ x }}{% endfor %}{% endmacro %}"
    "{% for a in range(99999) %}{% set x = f('a') %}{% endfor %}",
)


def render(template: str) -> str:
    return ChatTemplate(make_tokenizer(template)).render([Message("user", "a", train=False)])


@pytest.mark.parametrize("template", ESCAPES)
def test_an_escape_from_the_sandbox_is_an_error(template: str) -> None:
    with pytest.raises(DataError, match="refuses the conversation"):
        render(template)


@pytest.mark.parametrize("template", ENDLESS)
def test_an_endless_loop_is_stopped(template: str) -> None:
    started = time.process_time()
    with pytest.raises(OutOfTimeError, match="the chat template: not finished after 2 s"):
        render(template)
    assert time.process_time() - started < 5


def test_an_endless_recursion_is_an_error() -> None:
    with pytest.raises(DataError):
        render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")


@pytest.mark.parametrize(
    "template", ["{{ 10**10**10 }}", "{% generation %}{% endgeneration %}a\n{{ 2 ** x }}"]
)
def test_a_power_is_refused_before_jinja_computes_it(tmp_path: Path, template: str) -> None:
    with pytest.raises(ModelError, match=r"a power \(\*\*\)"):
        refuse_endless(template, "x")
    make_tokenizer(template).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the chat template in .*a power"):
        load_tokenizer(tmp_path)


def test_expressions_without_powers_are_accepted() -> None:
    refuse_endless("a ** b {{ '**' }} {# ** #} {{ 2 * 3 }}", "x")
    refuse_endless("{{ not jinja", "x")  # told when it is used


def test_a_time_limit_ends_with_its_block_and_has_no_effect_in_threads() -> None:
    with limited_time("x", 0.05):
        pass
    ended = time.process_time() + 0.2
    while time.process_time() < ended:
        pass

    def work() -> None:
        with limited_time("x", 0.01):
            found.append(1)

    found: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1]


@pytest.mark.parametrize("template", [ENDLESS[0], ESCAPES[0], "{{ 10**10**10 }}"])
def test_a_hostile_template_ends_a_command_with_an_error(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    template: str,
) -> None:
    path = tmp_path / "hostile.jinja"
    path.write_text(template, encoding="utf-8")
    recipe = write_recipe(data={"chat_template": str(path)})
    started = time.process_time()
    assert exit_code("preview", recipe) in (2, 3)
    assert time.process_time() - started < 10
    error = capsys.readouterr().err
    assert "error: " in error
    assert "Traceback" not in error


@pytest.mark.parametrize("template", [ENDLESS[0], "{{ 10**10**10 }}", ESCAPES[0]])
def test_a_hostile_format_of_rows_ends_with_an_error(
    template: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    override = f"data.train.format={json.dumps({'type': 'template', 'user': template})}"

    def read() -> None:
        source = load("extends: base.yaml", override).recipe.data.train_sources[0]
        list(source.conversations(BadRows()))

    with pytest.raises(QloraError):
        read()


@pytest.fixture(autouse=True)
def _base(tmp_path: Path) -> None:
    from tests.unit.conftest import MINIMAL

    (tmp_path / "base.yaml").write_text(MINIMAL, encoding="utf-8")
