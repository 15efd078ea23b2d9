"""Every key of the recipe that takes a path reads `~` and refuses `$NAME`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from qlora_cli.common.config import Config, UserPath
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.schema import Recipe

# mypy does not know the attributes of Annotated.
[_EXPANDED] = UserPath.__metadata__  # type: ignore[attr-defined]

PATHS = {
    "model.path": "model.path={}",
    "adapter.init_from": "adapter={{type: lora, init_from: '{}'}}",
    "data.train.path": "data.train.path={}",
    "data.evaluation.path": "data.evaluation={{path: '{}'}}",
    "data.chat_template": "data.chat_template={}",
    "evaluation.tasks.data.path": "evaluation.tasks=[{{type: exact_match, data: {{path: '{}'}}}}]",
    "evaluation.forgetting.path": "evaluation.forgetting={{path: '{}'}}",
    "output.dir": "output.dir={}",
}
"""Keys that take a path -> an override that sets one."""

NOT_PATHS = {
    "answer", "answer_field", "assistant", "best_by", "chosen_field", "completion_field",
    "delimiter", "exclude_modules", "feedforward_modules", "field", "format", "label_field",
    "margin_field", "match", "name", "options", "pattern", "prompt_field", "question",
    "rejected_field", "revision", "score_chosen_field", "score_rejected_field", "separator",
    "split", "stop_after", "system", "target_modules", "text", "type", "user",
}  # fmt: skip
"""Other keys that take text."""


def text_keys(section: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in section.model_fields.items():
        kind = FieldType.of(info)
        if str in kind.scalars:
            yield f"{prefix}{name}", info
        for below in kind.all_sections:
            yield from text_keys(below, f"{prefix}{name}.")


def is_path(info: FieldInfo) -> bool:
    return _EXPANDED in info.metadata or str(_EXPANDED) in str(info.annotation)


def test_every_key_that_takes_text_is_a_path_or_known_not_to_be() -> None:
    """A new key that takes text belongs into one of the two lists."""
    keys = dict(text_keys(Recipe))
    paths = {key for key, info in keys.items() if is_path(info)}
    assert paths == set(PATHS), f"list in PATHS, with an override: {sorted(paths ^ set(PATHS))}"
    new = {key.rpartition(".")[2] for key in keys if key not in PATHS} - NOT_PATHS
    assert not new, (
        f"list in NOT_PATHS, or declare as a UserPath and list in PATHS: {', '.join(sorted(new))}"
    )


@pytest.mark.parametrize("override", PATHS.values(), ids=PATHS)
def test_a_path_is_expanded_or_refused(
    load: Callable[..., LoadedRecipe],
    problems: Callable[..., list[str]],
    minimal: str,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    minimal += "schedule: {type: constant}\n"
    assert "/home/ann/x" in load(minimal, override.format("~/x")).recipe.model_dump_json()
    [problem] = problems(minimal, override.format("$SCRATCH/x"))
    assert "environment variables ($SCRATCH) are not read here" in problem


def test_extends_is_a_path_too(
    load: Callable[..., LoadedRecipe],
    problems: Callable[..., list[str]],
    minimal: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(minimal)  # writes recipe.yaml
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("base.yaml").write_text(minimal, encoding="utf-8")
    assert load("extends: ~/base.yaml\n").origins["model.path"] == "base.yaml:1"
    [problem] = problems("extends: $HOME/base.yaml\n")
    assert problem.startswith("recipe.yaml:1:10  extends: found")
