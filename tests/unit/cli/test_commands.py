"""Names that are not commands."""

from __future__ import annotations

import pytest
from typer.main import get_command

from qlora_cli.cli import app
from qlora_cli.cli.commands import _ELSEWHERE
from tests.conftest import exit_code


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("serve", "vLLM"),
        ("trian", "did you mean train?"),
        ("merg", "did you mean merge?"),
        ("evaluate", "qlora eval does that"),
        ("finetune", "qlora train does that"),
        ("quantize", "qlora export"),
        ("xyz", "the commands are train, rerun,"),
    ],
)
def test_an_unknown_command_says_what_it_may_have_meant(
    capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert exit_code(name, "recipe.yaml") == 2
    err = capsys.readouterr().err
    assert f"no command '{name}'" in err
    assert said in err
    assert name != "serve" or "did you mean" not in err


def test_unknown_commands_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("adapters", "lst") == 2
    assert "did you mean list?" in capsys.readouterr().err


def test_commands_of_other_tools_are_none_of_ours() -> None:
    # The app is a group, which has commands.
    assert not set(_ELSEWHERE) & set(get_command(app).commands)  # type: ignore[attr-defined]
