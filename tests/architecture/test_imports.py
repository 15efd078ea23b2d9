"""Check who imports whom: a file may import its own folder and any folder below it in `ORDER`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qlora_cli"

ORDER = (
    "__main__", "__init__", "cli", "api", "compare",
    "train", "plan", "export", "inspect", "evaluate", "inference",
    "loop", "runs", "recipe",
    "tasks", "adapters", "models", "data", "objectives", "optim", "distributed",
    "kernels", "common", "_compat", "types", "errors",
)  # fmt: skip
"""From the command line down to the ground. Below `recipe`, nothing can see a whole recipe."""

FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full names of imported modules (for `from a import b`: a.b)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_units(path: Path) -> set[str]:
    names = [name.split(".") for name in imports(parse(path)) if name.startswith("qlora_cli.")]
    return {parts[1] if parts[1] in ORDER else "__init__" for parts in names}


def test_the_order_names_the_whole_package() -> None:
    assert len(FILES) > 150
    assert {unit(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_its_own_folder_and_those_below(path: Path) -> None:
    own = ORDER.index(unit(path))
    assert [name for name in imported_units(path) if ORDER.index(name) < own] == []


def load_time_graph() -> dict[str, set[str]]:
    """Map each file to the files that it loads; an import inside a function is none of them."""
    names = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in FILES}
    return {
        name: {found for full in imports(at_load_time(parse(path)))
               for found in (full, full.rpartition(".")[0]) if found in names and found != name}
        for name, path in names.items()
    }  # fmt: skip


def test_no_modules_import_each_other_in_a_circle() -> None:
    tuple(TopologicalSorter(load_time_graph()).static_order())  # raises CycleError


def test_no_file_loads_transformers_before_it_is_quiet() -> None:
    """`quiet_libraries` turns off the Hub's telemetry, and has to run first.

    A file that subclasses classes of PEFT loads it, and is itself imported inside functions.
    """
    loading = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in FILES
        for name in imports(at_load_time(parse(path)))
        if name.partition(".")[0] in ("transformers", "peft")
    }
    assert loading
    users = {name: found & loading for name, found in load_time_graph().items() if found & loading}
    assert not users, f"import these inside a function: {users}"


def test_only_distributed_knows_accelerate() -> None:
    users = {unit(p) for p in FILES if any("accelerate" in name for name in imports(parse(p)))}
    assert users == {"distributed"}


def at_load_time(tree: ast.Module) -> ast.Module:
    """Drop functions, and what only type checkers see."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.Module([node for node in kept if not isinstance(node, ast.If)], [])


def test_only_heads_names_transformers_auto_class_and_pefts_task_type() -> None:
    named = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.alias) and node.name.startswith("AutoModelFor"))
        or (isinstance(node, ast.Attribute) and node.attr.startswith("AutoModelFor"))
        or (isinstance(node, ast.Constant) and node.value in ("AutoModelForCausalLM", "CAUSAL_LM"))
    }
    assert named == {"models/heads.py"}
