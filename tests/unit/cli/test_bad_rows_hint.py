"""The hint of an error names the exact command that writes all bad rows."""

from __future__ import annotations

import pytest

from qlora_cli.cli.commands import with_recipe
from qlora_cli.data.sources.rows import LIST_ALL


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["train", "a.yaml"], "a.yaml"),
        (["plan", "--set", "data.max_length=9", "my a.yml"], "'my a.yml' --set data.max_length=9"),
        (["validate", "a.yaml", "--set=x=a b", "--deep"], "a.yaml '--set=x=a b'"),
        (["train", "--set", "x=b.yaml", "a.yaml"], "a.yaml --set x=b.yaml"),
        (["eval", "runs/mine"], "RECIPE"),
        ([], "RECIPE"),
    ],
)
def test_the_command_has_the_recipe_and_its_overrides(args: list[str], named: str) -> None:
    expected = f"qlora preview {named} --bad-rows bad.jsonl"
    assert with_recipe(LIST_ALL, args) == expected
