"""Who may import whom. Parts cannot import the recipe, so nobody can pass all of it around."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qlora_cli"

FOUNDATION = {
    "types", "errors", "part", "_compat", "cache_folder", "kernels", "tuners", "progress",
    "durable", "tensor_file", "interruption", "foreign", "jinja_limits", "secrets",
    "optimizer_state",
    "yaml_tree", "yaml_writer", "field_types", "part_reader",
}  # fmt: skip
PARTS = {
    "model", "data", "optim", "objectives", "tasks",
    "world", "checkpoint", "trackers", "run_folder", "room", "trace",
}  # fmt: skip
RECIPE = {"recipe", "recipe_file", "recipe_schema"}
STORIES = {
    "train", "evaluate", "harness", "merge", "generate", "chat", "adapter_tools", "adapter_combine",
    "plan", "preview",
    "export", "export_gguf", "rerun", "bench", "compare",
}  # fmt: skip
TOLD = {
    "speed", "loop", "guard", "build", "keeper", "fingerprint", "lineage", "generate", "bootstrap",
    "examinee", "model_card", "forecast", "formula", "rehearsal", "estimate", "fit",
    "trial",
}  # fmt: skip
"""What stories share."""

ALLOWED = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    **{part: FOUNDATION | {part} for part in PARTS},
    # A task asks about rows, which data reads.
    "tasks": FOUNDATION | {"tasks", "data"},
    "recipe": FOUNDATION | PARTS,
    "recipe_file": FOUNDATION | {"recipe"},
    "recipe_schema": FOUNDATION | {"recipe"},
    "report_text": set(),
    "plan_text": set(),
    "plan_page": {"plan_text"},
    "rehearsal": FOUNDATION | PARTS | {"recipe", "loop", "speed"},
    "forecast": FOUNDATION | PARTS | {"recipe", "rehearsal"},
    "formula": FOUNDATION | PARTS | {"recipe", "rehearsal", "forecast"},
    "estimate": FOUNDATION | PARTS | {"recipe", "build", "rehearsal", "forecast", "formula"},
    "fit": FOUNDATION | PARTS | {"recipe", "estimate"},
    "trial": FOUNDATION
    | PARTS
    | {"recipe", "estimate", "plan_text", "fit", "fingerprint", "run_folder"},
    "adapter_text": {"report_text"},
    "adapter_place": FOUNDATION | RECIPE | {"run_folder", "model"},
    "speaker": FOUNDATION | PARTS | RECIPE | {"build", "adapter_place"},
    "model_card": FOUNDATION | PARTS | RECIPE | {"report_text"},
    "view": FOUNDATION | {"data"},
    "preview_text": {"data", "view"},
    "preview_page": {"data", "view", "preview_text"},
    "speed": FOUNDATION | PARTS | {"recipe"},
    "guard": FOUNDATION | PARTS | {"recipe"},
    "loop": FOUNDATION | PARTS | {"recipe", "guard"},
    "build": FOUNDATION | PARTS | RECIPE,
    "keeper": FOUNDATION | PARTS | RECIPE | {"model_card"},
    "fingerprint": FOUNDATION | PARTS | RECIPE,
    "lineage": FOUNDATION | PARTS | RECIPE | {"adapter_place"},
    "bootstrap": FOUNDATION | {"tasks"},
    "examinee": FOUNDATION | PARTS | RECIPE | {"build", "bootstrap", "generate"},
    **dict.fromkeys(STORIES, FOUNDATION | PARTS | RECIPE | TOLD),
    "rerun": FOUNDATION | PARTS | RECIPE | TOLD | {"train"},
    "bench": FOUNDATION | PARTS | RECIPE | {"train"},
    "compare": FOUNDATION
    | PARTS
    | RECIPE
    | TOLD
    | {"compare", "train", "evaluate", "merge", "plan", "probes", "report_text", "plan_text"},
    "harness": FOUNDATION | PARTS | RECIPE | TOLD | {"evaluate"},
    "merge_proof": FOUNDATION | PARTS | RECIPE | {"build", "probes"},
    "merge": FOUNDATION | PARTS | RECIPE | {"build", "merge_proof", "model_card"},
    "generate": FOUNDATION | PARTS | {"speaker"},
    "chat": FOUNDATION | {"run_folder", "speaker", "generate"},
    "adapter_tools": FOUNDATION | PARTS | RECIPE | {"adapter_place"},
    "adapter_combine": FOUNDATION
    | PARTS
    | RECIPE
    | {"adapter_place", "adapter_text", "adapter_tools", "build", "evaluate", "bootstrap"},
    "export_gguf": FOUNDATION | PARTS | {"probes", "modelfile"},
    "modelfile": FOUNDATION | {"probes"},
    "export_4bit": FOUNDATION | PARTS | RECIPE | {"build", "probes"},
    "export": FOUNDATION | PARTS | {"export_gguf", "export_4bit"},
    "probes": set(),
    "plan": FOUNDATION | PARTS | RECIPE | TOLD | {"plan_page"},
    "preview": FOUNDATION | PARTS | RECIPE | {"build", "view", "preview_text", "preview_page"},
    "cli": FOUNDATION
    | RECIPE
    | STORIES
    | {"cli", "report_text", "adapter_text", "plan_text", "data", ""},
    "__main__": {"cli"},
    "": set(),
}
"""Unit -> units that it may import. A unit is a module or package of ours; "" is the root."""

HEAVY = {
    "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors",
    "numpy", "pandas", "pyarrow", "gguf", "tensorboard", "schedulefree",
}  # fmt: skip
LIGHT_PARTS = {"model", "data", "optim", "tasks"}
"""Parts whose settings are in the recipe: what reads recipes imports them."""

FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of imported modules (for `from a import b`: a.b, which may be a module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def at_import_time(tree: ast.Module) -> ast.Module:
    """Without functions, and without what only type checkers see."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    kept = [node for node in kept if not (isinstance(node, ast.If) and _is_typing(node.test))]
    return ast.Module(kept, [])


def _is_typing(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def ours(name: str) -> str | None:
    """The unit that a full name belongs to, if it is one of ours."""
    root, _, rest = name.partition(".")
    if root != "qlora_cli":
        return None
    first = rest.partition(".")[0]
    is_module = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if is_module else ""


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_all_of_the_package_is_looked_at() -> None:
    assert len(FILES) > 20
    assert {unit(path) for path in FILES} <= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_unit_imports_what_it_may(path: Path) -> None:
    found = {ours(name) for name in imports(parse(path))} - {None}
    assert found <= ALLOWED[unit(path)]


def test_the_command_line_imports_a_story_inside_its_command_alone() -> None:
    files = sorted((PACKAGE / "cli").glob("*.py"))
    assert len(files) > 4
    for path in files:
        found = {ours(name) for name in imports(at_import_time(parse(path)))}
        assert not found & (STORIES | PARTS | {"loop"}), path.name


def test_the_loop_knows_one_section_of_the_recipe() -> None:
    names = set(imports(parse(PACKAGE / "loop.py")))
    assert {name for name in names if "recipe" in name} == {"qlora_cli.recipe.schema.Training"}


# Kernels and tuners are torch through and through: parts import them where they import torch.
LIGHT_UNITS = (FOUNDATION - {"kernels", "tuners"}) | RECIPE | LIGHT_PARTS | {"cli"}
LIGHT = [path for path in FILES if unit(path) in LIGHT_UNITS]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_reads_recipes_imports_nothing_heavy(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(at_import_time(parse(path)))}
    assert not roots & HEAVY


def test_the_world_alone_knows_accelerate() -> None:
    users = {unit(p) for p in FILES if any("accelerate" in name for name in imports(parse(p)))}
    assert users <= {"world"}
