from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.adapters import FullFineTune, LoRA
from qlora_cli.errors import RecipeError
from qlora_cli.models.quantization import FourBit, Int8
from qlora_cli.optim.families import AdamW
from qlora_cli.recipe.load import (
    MAX_EXTENDS,
    LoadedRecipe,
    dump_recipe,
    dump_with_origins,
    load_recipe,
)
from qlora_cli.recipe.yaml_parser import Scalar, parse_tree

Load = Callable[..., LoadedRecipe]

ENDS = "model: {path: base}\noutput: {dir: run}\n"
Problems = Callable[..., list[str]]


def lora(loaded: LoadedRecipe) -> LoRA:
    assert isinstance(loaded.recipe.adapter, LoRA)
    return loaded.recipe.adapter


def write(**texts: str) -> None:
    for name, text in texts.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")


# Values -------------------------------------------------------------------------------------------


def test_every_spelling_of_a_number_is_read_where_a_number_is_expected(
    load: Load, minimal: str
) -> None:
    recipe = load(
        minimal + "optimizer: {type: adamw, learning_rate: 2e-4, eps: 1E-5}\n"
        "training: {max_steps: 1_000, batch_size: 1e2, max_grad_norm: 1}\n"
    ).recipe
    assert isinstance(recipe.optimizer, AdamW)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.eps) == (2e-4, 1e-5)
    assert (recipe.training.max_steps, recipe.training.batch_size) == (1000, 100)
    assert recipe.training.max_grad_norm == 1.0


def test_words_and_numbers_are_text_where_text_is_expected(load: Load) -> None:
    recipe = load(
        "model: {path: no, revision: 123}\n"
        "data: {train: {path: yes, split: off}}\noutput: {dir: 2e-4}\n"
    ).recipe
    assert (recipe.model.path, recipe.model.revision) == ("no", "123")
    assert (recipe.data.train.path, recipe.data.train.split) == ("yes", "off")
    assert recipe.output.dir == "2e-4"


@pytest.mark.parametrize(("text", "value"), [("no", False), ("off", False), ("True", True)])
def test_yes_and_no_are_booleans_where_a_boolean_is_expected(
    load: Load, minimal: str, text: str, value: bool
) -> None:
    recipe = load(f"{minimal}training: {{gradient_checkpointing: {text}}}\n").recipe
    assert recipe.training.gradient_checkpointing is value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("all-linear", "all-linear"),
        ("[q_proj, 'v_proj', 5]", ["q_proj", "v_proj", "5"]),
        (".*_proj", ".*_proj"),
    ],
)
def test_target_modules_in_each_form(load: Load, minimal: str, text: str, value: object) -> None:
    loaded = load(f"{minimal}adapter: {{type: lora, target_modules: {text}}}\n")
    assert lora(loaded).target_modules == value


def test_null_and_rank_patterns_are_read(load: Load, minimal: str) -> None:
    loaded = load(
        minimal + "adapter: {type: lora, rank_pattern: {q_proj: 4, 1: 1e1}}\n"
        "training: {max_grad_norm: null, eval_every: }\n"
    )
    assert lora(loaded).rank_pattern == {"q_proj": 4, "1": 10}
    assert loaded.recipe.training.max_grad_norm is None
    assert loaded.recipe.training.eval_every is None


def test_aliases_are_read(load: Load) -> None:
    recipe = load(
        "model: {path: base}\noutput: {dir: run}\n"
        "data:\n  train: {path: a.jsonl, format: &f {type: text, field: body}}\n"
        "  evaluation: {path: b.jsonl, format: *f}\n"
    ).recipe
    assert recipe.data.evaluation is not None
    assert recipe.data.evaluation.format == recipe.data.train.format


def test_one_source_and_a_list_of_them_are_read_and_written(load: Load) -> None:
    one = "{path: a.jsonl, learn_roles: [user, assistant]}"
    alone = load(f"{ENDS}data: {{train: {one}}}\n").recipe.data
    loaded = load(
        f"{ENDS}data:\n  train:\n    - {one}\n    - {{path: b.csv, fields: {{text: b}}}}\n"
    )
    both = loaded.recipe.data
    assert both.train_sources[0] == alone.train_sources[0]
    assert [source.path for source in both.train_sources] == ["a.jsonl", "b.csv"]
    assert loaded.origins["data.train[1].fields.text"] == "recipe.yaml:6"
    assert loaded.origins["data.train[1].format.type"] == "default"
    assert load(dump_recipe(loaded.recipe)).recipe == loaded.recipe


# Extends ------------------------------------------------------------------------------------------

BASE = """\
model: {path: base}
quantization: {type: int8, outlier_threshold: 3}
adapter: {type: lora, r: 4, modules_to_save: [lm_head, embed_tokens]}
data:
  train: {path: rows.jsonl, limit: 10}
output: {dir: run}
"""


def test_extends_merges_sections_and_replaces_lists(load: Load) -> None:
    load(BASE)  # moves to the working folder
    write(base=BASE)
    loaded = load(
        "extends: base.yaml\nadapter: {alpha: 8, modules_to_save: [lm_head]}\n"
        "data: {train: {limit: 20}}\n"
    )
    assert (lora(loaded).r, lora(loaded).alpha) == (4, 8)
    assert lora(loaded).modules_to_save == ["lm_head"]
    assert loaded.recipe.data.train.path == "rows.jsonl"
    assert loaded.recipe.data.train.limit == 20
    assert loaded.origins["adapter.r"] == "base.yaml:3"
    assert loaded.origins["adapter.alpha"] == "recipe.yaml:2"
    assert loaded.origins["data.train.limit"] == "recipe.yaml:3"


def test_another_type_replaces_the_section(load: Load) -> None:
    load(BASE)
    write(base=BASE)
    assert load("extends: base.yaml\nquantization: {type: nf4}\n").recipe.quantization == FourBit()
    same = load("extends: base.yaml\nquantization: {type: int8}\n").recipe.quantization
    assert same == Int8(outlier_threshold=3)


def test_extends_in_a_chain_and_from_other_folders(load: Load) -> None:
    load(BASE)
    Path("shared").mkdir()
    Path("shared/base.yaml").write_text(BASE, encoding="utf-8")
    Path("shared/middle.yaml").write_text("extends: base.yaml\nadapter: {r: 5}\n", encoding="utf-8")
    loaded = load("extends: shared/middle.yaml\nadapter: {alpha: 6}\n")
    assert (lora(loaded).r, lora(loaded).alpha) == (5, 6)
    assert loaded.origins["adapter.r"] == "middle.yaml:2"
    assert loaded.origins["model.path"] == "base.yaml:1"


def test_origins_distinguish_files_with_the_same_name(load: Load) -> None:
    load(BASE)
    Path("shared").mkdir()
    Path("shared/recipe.yaml").write_text(BASE, encoding="utf-8")
    loaded = load("extends: shared/recipe.yaml\nadapter: {r: 5}\n")
    assert loaded.origins["model.path"] == "shared/recipe.yaml:1"
    assert loaded.origins["adapter.r"] == "recipe.yaml:2"


def test_mistakes_in_a_base_are_placed_there(load: Load, problems: Problems) -> None:
    load(BASE)
    write(base=BASE + "training: {seed: x}\n")
    own, inherited = problems("extends: base.yaml\nadapter: {rank: 4}\n")
    assert own.startswith("recipe.yaml:2:11  adapter.rank: ")
    assert inherited.startswith('base.yaml:7:18  training.seed: found "x"; ')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: none.yaml\n", "recipe.yaml:1:10  extends: there is no file none.yaml"),
        ("extends: .\n", "recipe.yaml:1:10  extends: there is no file ."),
        ("extends: [a.yaml]\n", "recipe.yaml:1:10  extends: it takes the path of one YAML file"),
        ("extends:\n", "recipe.yaml:1:9  extends: it takes the path of one YAML file"),
        (
            "extends: recipe.yaml\n",
            "recipe.yaml:1:10  extends: recipe.yaml closes a cycle of recipes",
        ),
        ("training: {extends: a.yaml}\n", 'training has no "extends"'),
    ],
)
def test_bad_extends_is_refused_with_its_place(
    problems: Problems, minimal: str, text: str, expected: str
) -> None:
    (found,) = problems(text + minimal)
    assert expected in found


def test_circular_and_endless_extends_are_refused(load: Load, problems: Problems) -> None:
    load(BASE)
    write(a="extends: b.yaml\n", b="extends: ./a.yaml\n")
    (found,) = problems("extends: a.yaml\n")
    assert found == "b.yaml:1:10  extends: ./a.yaml closes a cycle of recipes"
    write(**{f"r{i}": f"extends: r{i + 1}.yaml\n" for i in range(MAX_EXTENDS + 2)})
    (found,) = problems("extends: r0.yaml\n")
    assert f"more than {MAX_EXTENDS} recipes" in found


# Overrides ----------------------------------------------------------------------------------------


def test_overrides_are_typed_like_the_file(load: Load, minimal: str) -> None:
    loaded = load(
        minimal,
        "training.max_steps=1e2",
        "optimizer.learning_rate=2E-5",
        "adapter.target_modules=[q_proj, k_proj]",
        "model.path=no",
        "data.evaluation={path: held.jsonl}",
        "data.evaluation.limit=5",
        "training.max_grad_norm=",
    )
    recipe = loaded.recipe
    assert recipe.training.max_steps == 100
    assert recipe.optimizer.learning_rate == 2e-5
    assert lora(loaded).target_modules == ["q_proj", "k_proj"]
    assert recipe.model.path == "no"
    assert recipe.data.evaluation is not None
    assert (recipe.data.evaluation.path, recipe.data.evaluation.limit) == ("held.jsonl", 5)
    assert recipe.training.max_grad_norm is None
    assert loaded.origins["training.max_steps"] == "--set"
    assert loaded.origins["optimizer.type"] == "default"


def test_values_may_hold_an_equals_sign(load: Load, minimal: str) -> None:
    assert load(minimal, "output.dir=a=b=c").recipe.output.dir == "a=b=c"


def test_the_last_override_wins_over_the_file(load: Load) -> None:
    assert lora(load(BASE, "adapter.r=5", "adapter.r=6")).r == 6


@pytest.mark.parametrize(
    "overrides",
    [
        ("quantization.type=nf4", "quantization.double_quant=false"),
        ("quantization.double_quant=false", "quantization.type=nf4"),
        ("quantization={type: nf4, double_quant: false}",),
    ],
)
def test_overriding_the_type_replaces_the_section(load: Load, overrides: tuple[str, ...]) -> None:
    assert load(BASE, *overrides).recipe.quantization == FourBit(double_quant=False)
    assert (
        load(BASE, "adapter.type=full", "quantization.type=none").recipe.adapter == FullFineTune()
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rank=8", '--set adapter.rank=8  adapter.rank: LoRA has no "rank"'),
        ("adapter.r=x", '--set adapter.r=x  adapter.r: found "x"; it takes a whole number'),
        ("adapter.r='8'", "the quotes make it text, so remove them"),
        ("adapter.r", "--set adapter.r  must have the form section.key=value"),
        ("=8", "--set =8  must have the form section.key=value"),
        ("adapter..r=8", "--set adapter..r=8  must have the form section.key=value"),
        ("adapter=8", "--set adapter=8  adapter: found 8; it takes a section"),
        ("adapter.r.s=8", "--set adapter.r.s=8  adapter.r: found a mapping; it takes a whole"),
        ("adapter.r=[", "--set adapter.r=[  not valid YAML: "),
        ("adapter.r=!!int 8", "--set adapter.r=!!int 8  the tag !!int is not allowed"),
        (
            "extends=base.yaml",
            "--set extends=base.yaml  extends is only allowed at the top of a file",
        ),
        ("lr=1", "did you mean optimizer.learning_rate?"),
    ],
)
def test_bad_overrides_name_the_option(problems: Problems, override: str, expected: str) -> None:
    (found,) = problems(BASE, override)
    assert expected in found


@pytest.mark.parametrize(
    "template", ["{{ x }}", "{% if x %}it's{% endif %}", 'Is "it": {{ x }}?', "{{ x }} \\ {{ y"]
)
def test_an_override_with_braces_is_shown_with_its_quotes(
    load: Load, problems: Problems, minimal: str, template: str
) -> None:
    key = "data.train.format.user"
    (found,) = problems(minimal, "data.train.format.type=template", f"{key}={template}")
    advice, option, command = found.partition("needs quotes: --set ")
    assert advice.endswith("text with {{ or {% ")
    assert option
    (quoted,) = shlex.split(command)
    root = parse_tree(quoted.removeprefix(f"{key}="), "--set").root
    assert isinstance(root, Scalar)
    assert root.text == template


def test_problems_of_file_and_overrides_come_together(problems: Problems) -> None:
    found = problems(BASE + "training: {seed: x}\n", "adapter.q=1", "nonsense", "adapter.r=0")
    assert [line.split("  ")[0] for line in found] == [
        "recipe.yaml:7:18",
        "--set adapter.q=1",
        "--set nonsense",
        "--set adapter.r=0",
    ]


def test_a_type_left_out_in_a_file_stays_missing(problems: Problems, minimal: str) -> None:
    (found,) = problems(minimal + "adapter: {alpha: 8}\n", "adapter.r=4")
    assert found.startswith("recipe.yaml:4:1  adapter.type: is missing")


# Origins and writing ------------------------------------------------------------------------------


def test_every_value_has_an_origin(load: Load) -> None:
    loaded = load(BASE, "adapter.r=9")
    assert loaded.origins["adapter.r"] == "--set"
    assert loaded.origins["adapter.type"] == "recipe.yaml:3"
    assert loaded.origins["adapter.alpha"] == "default"
    assert loaded.origins["adapter.modules_to_save"] == "recipe.yaml:3"
    assert loaded.origins["data.train.format.type"] == "default"
    text = dump_with_origins(loaded)
    values = [line for line in text.splitlines() if not line.endswith(":")]
    assert len(values) == len(loaded.origins)
    assert "  r: 9" in text
    assert "# --set" in next(line for line in values if line.startswith("  r: 9"))
    assert len({line.index("  # ") for line in values}) == 1


def test_a_written_recipe_round_trips(load: Load) -> None:
    loaded = load(
        BASE,
        'model.path="a\\u2028: #b"',
        "adapter.target_modules=^(a|b)[0-9]+\\.x$",
        "adapter.rank_pattern={a b: 3, '1': 2}",
        "data.evaluation={path: '123', format: {type: prompt_completion, system: \"x\\ny\"}}",
        "evaluation.tasks=[{type: json_match}, {type: exact_match}]",
        "optimizer.eps=1e-12",
    )
    assert load(dump_recipe(loaded.recipe)).recipe == loaded.recipe
    assert load(dump_with_origins(loaded)).recipe == loaded.recipe


def test_type_comes_first_in_a_section(load: Load, minimal: str) -> None:
    lines = dump_recipe(load(minimal).recipe).splitlines()
    for section in ("adapter:", "optimizer:", "schedule:", "quantization:"):
        assert lines[lines.index(section) + 1].startswith("  type: ")


def test_the_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(
        f"{path}:1:1  found a list; a recipe has the sections model,"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml:1:1  found nothing: the file is empty; a recipe has"),
        ("# only this\n", "recipe.yaml:1:1  found nothing: the file is empty; a recipe has"),
        ("text\n", "recipe.yaml:1:1  found text; a recipe has the sections model, "),
    ],
)
def test_files_that_are_not_recipes(problems: Problems, text: str, expected: str) -> None:
    (found,) = problems(text)
    assert found.startswith(expected)
