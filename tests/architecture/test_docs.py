"""Documentation is generated or executed: all recipes are loaded, all command lines parsed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic.fields import FieldInfo
from typer.main import get_command

from qlora_cli.adapters import AdapterConfig
from qlora_cli.cli import app
from qlora_cli.data.formats import FormatConfig
from qlora_cli.models.quantization import QuantizationConfig
from qlora_cli.objectives import ObjectiveConfig
from qlora_cli.optim.optimizers import OptimizerConfig
from qlora_cli.optim.schedules import ScheduleConfig
from qlora_cli.recipe.field_types import FieldType, key_paths, type_names
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks import TaskConfig
from tests.pages import BLOCKS, PAGES, ROOT, Block

CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))

MINIMAL = "model: {path: base}\ndata: {train: {path: rows.jsonl}}\noutput: {dir: run}\n"


RECIPES = [block for block in BLOCKS if block.language in ("yaml", "yml")]


@dataclass(frozen=True)
class CommandLine:
    """A call of qlora in a text."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where} {shlex.join(self.words)}"


def command_lines(where: str, text: str) -> Iterator[CommandLine]:
    # A quoted operator is an argument, which the lexer would not tell from an operator.
    for line in re.sub(r"'[|&;<>]+'", "X", text.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        yield from _calls(where, list(lexer))


def _calls(where: str, words: list[str]) -> Iterator[CommandLine]:
    """Split a line of shell at pipes, redirections and the like, and yield the calls."""
    calls: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("|&;<>"):
            calls.append([])
        else:
            calls[-1].append(word)
    for call in calls:
        while call and re.fullmatch(r"[A-Z_]+=.*", call[0]):
            call.pop(0)
        if call[:1] == ["qlora"]:
            yield CommandLine(where, tuple(call[1:]))


def commented(path: Path) -> str:
    """Return the commands in the comments of a recipe or script."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] for line in lines if re.match(r"#\s+qlora ", line))


SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell", "console")]
COMMANDS = [call for block in SHELL for call in command_lines(str(block), block.text)]
COMMANDS += [
    call for path in CONFIGS for call in command_lines(str(path.relative_to(ROOT)), commented(path))
]


def test_recipes_and_commands_are_found() -> None:
    assert len(CONFIGS) >= 25
    assert len(RECIPES) >= 18
    assert len(COMMANDS) >= 90
    assert any(call.where.startswith("configs/") for call in COMMANDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_in_configs_loads(path: Path) -> None:
    assert load_recipe(path).recipe.output.dir


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_every_recipe_on_a_page_loads(block: Block, tmp_path: Path) -> None:
    """A part of a recipe extends the shortest one."""
    (tmp_path / "minimal.yaml").write_text(MINIMAL, encoding="utf-8")
    text = re.sub(r"^extends: .*\n", "", block.text, flags=re.MULTILINE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: minimal.yaml\n{text}", encoding="utf-8")
    load_recipe(recipe)


@pytest.mark.parametrize("call", COMMANDS, ids=str)
def test_every_command_line_on_a_page_parses(call: CommandLine, tmp_path: Path) -> None:
    values = parse(list(call.words))
    for override in values.get("overrides") or ():
        assert override.partition("=")[0] in set(key_paths(Recipe))
    recipe = str(values.get("recipe", ""))
    if recipe.startswith("configs/"):
        load_recipe(ROOT / recipe, values["overrides"])


def parse(words: list[str]) -> dict[str, Any]:
    """Return the values of a command line, without running the command."""
    group: Any = get_command(app)
    while words and words[0] in ("-q", "--quiet", "-v", "--verbose"):
        words = words[1:]
    try:
        context = group.make_context("qlora", words)
        while hasattr(group, "commands"):
            name, *words = words
            group = group.commands[name]
            context = group.make_context(name, list(words), parent=context)
    except typer.Exit:  # --help, --version
        return {}
    return dict(context.params)


@pytest.mark.parametrize(
    "text",
    [
        "qlora trian recipe.yaml",
        "qlora train recipe.yaml --sett a=b",
        "qlora merge runs/x",
        "qlora adapters comb a b",
    ],
)
def test_a_wrong_command_line_is_detected(text: str) -> None:
    (call,) = command_lines("here", text)
    with pytest.raises(Exception, match=r"trian|sett|output|comb"):
        parse(list(call.words))


def test_calls_are_found_in_shell() -> None:
    text = "cd x && CUDA=1 qlora train a.yaml \\\n  --resume auto | tee log\n$ qlora schema > s"
    assert [call.words for call in command_lines("here", text)] == [
        ("train", "a.yaml", "--resume", "auto"),
        ("schema",),
    ]


INDEX = ROOT / "docs" / "README.md"


def links(page: Path) -> set[Path]:
    """Return the local files that a page links to."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def test_the_index_lists_every_page() -> None:
    pages = set((ROOT / "docs").rglob("*.md")) - {INDEX}
    assert len(pages) >= 20
    assert pages <= links(INDEX)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_local_files_exist(page: Path) -> None:
    assert not [target for target in links(page) if not target.exists()]


LISTED = [
    ("README.md", "adapter", AdapterConfig),
    ("README.md", "quantization", QuantizationConfig),
    ("README.md", "data.train.format", FormatConfig),
    ("README.md", "objective", ObjectiveConfig),
    ("README.md", "optimizer", OptimizerConfig),
    ("README.md", "evaluation.tasks", TaskConfig),
    ("docs/methods.md", "adapter", AdapterConfig),
    ("docs/optimizers.md", "optimizer", OptimizerConfig),
    ("docs/optimizers.md", "schedule", ScheduleConfig),
    ("docs/evaluation.md", "evaluation.tasks", TaskConfig),
]
"""Pages that list the types of a section."""


@pytest.mark.parametrize(
    ("page", "section", "union"), LISTED, ids=[f"{page}-{section}" for page, section, _ in LISTED]
)
def test_a_page_names_every_type_of_a_section(page: str, section: str, union: Any) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    variants = FieldType.of(FieldInfo.from_annotation(union)).sections
    missing = [
        name
        for name in (type_names(variant)[0] for variant in variants)
        if not any(f"`{name}`" in row for row in rows)
    ]
    assert variants
    assert not missing, f"{page}: add {', '.join(missing)} to the table of {section}.type"


def test_the_readmes_short_recipe_equals_the_quickstarts(tmp_path: Path) -> None:
    short = next(block for block in RECIPES if block.page.name == "README.md")
    (tmp_path / "recipe.yaml").write_text(short.text, encoding="utf-8")
    quickstart = load_recipe(ROOT / "configs" / "quickstart.yaml").recipe
    assert load_recipe(tmp_path / "recipe.yaml").recipe == quickstart
