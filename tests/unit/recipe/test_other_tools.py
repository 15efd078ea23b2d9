"""Keys of other tools, YAML merge keys, and numbers of thousands of digits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qlora_cli.recipe.field_types import key_paths
from qlora_cli.recipe.other_tools import INSTEAD, OTHER_NAMES
from qlora_cli.recipe.schema import Recipe

KEYS = {key.rpartition(".")[2] for key in key_paths(Recipe)}

DATA = "data: {train: {path: rows.jsonl}}\noutput: {dir: run}\n"
LONG = "9" * 5000


@pytest.mark.parametrize("section", ["", "training."])
@pytest.mark.parametrize("key", ["wandb_project", "rl", "hub_model_id", "deepspeed", "run_name"])
def test_a_key_without_a_counterpart_says_what_to_do(
    problems: Callable[..., list[str]], minimal: str, section: str, key: str
) -> None:
    [line] = problems(minimal, f"{section}{key}=x")
    assert line.endswith(f"; instead: {INSTEAD[key]}")


def test_no_key_is_in_both_tables_or_ours() -> None:
    assert not set(INSTEAD) & (set(OTHER_NAMES) | KEYS)
    assert not set(OTHER_NAMES) & KEYS
    assert {name.rpartition(".")[2] for name in OTHER_NAMES.values()} <= KEYS | {"type"}


@pytest.mark.parametrize(
    "text",
    [
        f"defaults: &d {{path: base}}\nmodel: {{<<: *d}}\n{DATA}",
        f"model: {{<<: {{path: base}}}}\n{DATA}",
        f"<<: {{model: {{path: base}}}}\n{DATA}",
        f"model: {{path: base}}\nadapter: {{<<: {{type: lora}}, r: 8}}\n{DATA}",
        "model: {path: base}\ndata: {train: [{<<: {path: r.jsonl}}]}\noutput: {dir: run}\n",
        f"model: &m {{path: base}}\nadapter:\n  <<: [*m]\n{DATA}",
    ],
)
def test_a_merge_key_is_one_problem(problems: Callable[..., list[str]], text: str) -> None:
    [line] = problems(text)
    assert 'merge keys ("<<") are not supported; write the keys out' in line


def test_other_problems_beside_a_merge_key_are_reported(
    problems: Callable[..., list[str]],
) -> None:
    lines = problems(f"model: {{<<: {{path: base}}}}\nadapter: {{type: lora, rank: 8}}\n{DATA}")
    assert len(lines) == 2
    assert 'did you mean "r"?' in lines[1]


@pytest.mark.parametrize("number", [LONG, f"-{LONG}", f"1_{LONG}", f"{LONG}.5", f"0x{LONG}"])
@pytest.mark.parametrize("key", ["training.max_steps", "training.seed", "training.epochs"])
def test_a_number_of_thousands_of_digits_names_its_field(
    problems: Callable[..., list[str]], minimal: str, key: str, number: str
) -> None:
    [line] = problems(minimal, f"{key}={number}")
    assert f"  {key}: found " in line
    assert len(line) < 600


def test_zeros_in_front_are_not_counted(load: Callable[..., object], minimal: str) -> None:
    loaded = load(minimal, f"training.max_steps={'0' * 5000}12")
    # The fixture is typed as returning an object.
    assert loaded.recipe.training.max_steps == 12  # type: ignore[attr-defined]
