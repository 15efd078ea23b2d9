"""The grid of a comparison: cells from methods, keys and recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_cli.compare.compare import compare
from qlora_cli.compare.grid import Cell, CompareRequest, Grid, method_keys, method_names
from qlora_cli.errors import RecipeError
from qlora_cli.optim.optimizers import SGD
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.schema import Recipe

RECIPE = """\
model: {path: base}
adapter: {type: lora, r: 8, alpha: 16}
data: {train: {path: rows.jsonl}, evaluation: {path: rows.jsonl}}
output: {dir: run}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def cells(*recipes: Path, **asked: object) -> list[Cell]:
    # The options are of many types, which mypy cannot tell apart in one mapping.
    return Grid(CompareRequest(recipes, **asked), Path("out")).cells()  # type: ignore[arg-type]


def names(found: list[Cell]) -> list[str]:
    return [cell.name for cell in found]


def test_every_adapter_and_quantization_is_a_method() -> None:
    adapters = FieldType.of(Recipe.model_fields["adapter"]).variants
    quantizations = FieldType.of(Recipe.model_fields["quantization"]).variants
    assert set(method_names()) == {*adapters, *quantizations, "qlora"} - {"none"}
    assert method_keys("full") == ["quantization.type=none", "adapter.type=full"]
    assert method_keys("int8") == ["quantization.type=int8", "adapter.type=lora"]
    asked = r"--methods: unknown method loar \(did you mean lora\?\); choose from .*full, "
    with pytest.raises(RecipeError, match=asked):
        method_keys("loar")


def test_a_method_keeps_what_the_recipe_says_of_it(recipe: Path) -> None:
    full, lora, qlora = cells(recipe, methods=["full", "lora", "qlora"])
    assert full.recipe is not None
    assert full.recipe.adapter.type == "full"
    assert lora.recipe is not None
    assert (lora.recipe.adapter.r, lora.recipe.quantization.type) == (8, "none")
    assert qlora.recipe is not None
    assert (qlora.recipe.adapter.r, qlora.recipe.quantization.type) == (8, "nf4")
    assert qlora.recipe.quantization.double_quant
    assert lora.recipe.output.dir == "out/runs/lora"


def test_a_key_is_varied_for_the_methods_that_have_it(recipe: Path) -> None:
    found = cells(
        recipe,
        methods=["full", "lora", "nf4"],
        vary=["adapter.r=4,16", "nf4:quantization.double_quant=true,false"],
        learning_rates=["full=2e-5"],
        overrides=["adapter.alpha=2", "training.seed=3"],
    )
    assert names(found) == [
        "full", "lora r=4", "lora r=16", "nf4 r=4 double_quant=true",
        "nf4 r=4 double_quant=false", "nf4 r=16 double_quant=true", "nf4 r=16 double_quant=false",
    ]  # fmt: skip
    recipes = [cell.recipe for cell in found]
    rates = [one and one.optimizer.learning_rate for one in recipes]
    assert rates == [2e-5, *[2e-4] * 6]
    assert [one and one.training.seed for one in recipes] == [3] * 7
    assert [getattr(one and one.adapter, "alpha", None) for one in recipes] == [None, *[2] * 6]
    ranks = [getattr(one and one.adapter, "r", None) for one in recipes]
    assert ranks == [None, 4, 16, 4, 4, 16, 16]


def test_varied_lists_are_values_and_cells_have_distinct_names(recipe: Path) -> None:
    vary = ["adapter.target_modules=[q_proj,v_proj],all-linear,'.*(q|v)_proj','.*[qv]_proj'"]
    found = cells(recipe, vary=vary)
    targets = [cell.recipe and getattr(cell.recipe.adapter, "target_modules", 0) for cell in found]
    assert targets == [["q_proj", "v_proj"], "all-linear", ".*(q|v)_proj", ".*[qv]_proj"]
    assert len({cell.slug for cell in found}) == 4
    assert all(set("/[]'|* ").isdisjoint(cell.slug) for cell in found)


def test_several_recipes(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("extends: mine.yaml\nadapter: {r: 2}\n", encoding="utf-8")
    found = cells(recipe, other, methods=["lora", "qlora"])
    assert names(found) == ["mine lora", "mine qlora", "other lora", "other qlora"]
    other.write_text("extends: mine.yaml\ntraining: {seed: 7}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine and other differ in training\.seed"):
        cells(recipe, other)
    assert len(cells(recipe, other, vary=["training.seed=0,1"])) == 4
    assert len(cells(recipe, other, overrides=["training.seed=0"])) == 2


def test_files_of_one_name_would_be_one_row(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "run" / recipe.name
    other.parent.mkdir()
    other.write_text(RECIPE.replace("r: 8", "r: 4"), encoding="utf-8")
    with pytest.raises(RecipeError, match="would both be named mine in the table"):
        cells(recipe, other)
    assert len(cells(recipe, recipe)) == 1


def test_a_key_may_be_one_of_the_type_that_another_override_chooses(recipe: Path) -> None:
    chosen = ["optimizer.momentum=0", "optimizer.type=sgd"]
    (cell,) = cells(recipe, overrides=chosen)
    assert cell.recipe is not None
    assert isinstance(cell.recipe.optimizer, SGD)
    assert cell.recipe.optimizer.momentum == 0
    # One of them alone would be refused: this optimizer takes no schedule that falls.
    recipe.write_text(f"{RECIPE}schedule: {{type: linear}}\n", encoding="utf-8")
    chosen = ["optimizer.type=schedule_free_adamw", "schedule.type=constant"]
    for order in (chosen, chosen[::-1]):
        (cell,) = cells(recipe, overrides=order)
        assert cell.recipe is not None, cell.error
        assert cell.recipe.schedule.type == "constant"
    full, lora = cells(recipe, methods=["full", "lora"], overrides=["adapter.r=2"])
    assert full.error is None
    assert lora.recipe is not None
    assert lora.recipe.adapter.model_dump()["r"] == 2


def test_an_invalid_recipe_is_a_cell_with_its_reason(recipe: Path) -> None:
    good, bad = cells(recipe, vary=["adapter.r=4,0"])
    assert good.error is None
    assert bad.recipe is None
    assert bad.error is not None
    assert "adapter.r: found 0; it takes a whole number (at least 1)" in bad.error


@pytest.mark.parametrize("values", ["0", "x,0", "-1,1.5,two"])
def test_invalid_cells_are_named_before_the_first_one_runs(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, values: str
) -> None:
    request = CompareRequest((recipe,), vary=(f"adapter.r={values}",))
    with caplog.at_level("INFO", logger="qlora"):
        compare(request, tmp_path / "out")
    before = caplog.text.partition("cell 1 of")[0]
    for value in values.split(","):
        assert f"r={value}: left out: " in before
        assert f"adapter.r: found {value}" in before or f'adapter.r: found "{value}"' in before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"vary": ["adapter.rank=4"]},
            "adapter.rank is not a recipe key (did you mean adapter.r",
        ),
        ({"vary": ["optimizer.lr=1e-3"]}, "(did you mean optimizer.learning_rate?)"),
        ({"vary": ["learning_rate=1e-3"]}, "(did you mean optimizer.learning_rate?)"),
        ({"vary": ["training.max_step=4"]}, "(did you mean training.max_steps?)"),
        ({"methods": ["lorra"]}, "unknown method lorra (did you mean lora?); choose from "),
        ({"overrides": ["adapter.rank=4"]}, "adapter.rank is not a recipe key"),
        ({"vary": ["adapter.r"]}, "needs the form"),
        ({"vary": ["adapter.r=[4"]}, "is not a list of values"),
        ({"vary": ["adapter.r=4..64"]}, "works only with --search"),
        ({"vary": ["adapter.r=64..4"]}, "from a smaller number to a larger"),
        ({"vary": ["lora:adapter.r=4"]}, "lora is not one of the compared methods"),
        (
            {"methods": ["full"], "vary": ["adapter.r=4"]},
            "none of the compared methods has the key adapter.r",
        ),
        (
            {"methods": ["lora"], "learning_rates": ["full=1"]},
            "full is not one of the compared methods",
        ),
        ({"methods": ["lora"], "learning_rates": ["lora"]}, "needs the form METHOD=NUMBER"),
        ({"methods": ["adapter"]}, "unknown method adapter; choose from "),
        (
            {"methods": ["full"], "overrides": ["adapter.r=4"]},
            "--set: none of the compared methods has the key adapter.r",
        ),
        ({"vary": ["adapter.r=4", "adapter.r=16"]}, "--vary: adapter.r is given twice"),
        (
            {"methods": ["lora"], "vary": ["adapter.r=4", "lora:adapter.r=16"]},
            "--vary: adapter.r is given twice",
        ),
        (
            {"methods": ["full"], "learning_rates": ["full=1", "full=2"]},
            "--learning-rate: full is given twice",
        ),
    ],
)
def test_invalid_arguments_are_refused_at_once(
    recipe: Path, asked: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        cells(recipe, **asked)
