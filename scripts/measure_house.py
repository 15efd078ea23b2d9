"""Measure how easy the code is to enter, for one or more commits, as a Markdown table.

`python scripts/measure_house.py de772fc HEAD` checks each commit out next to this one and counts.
The stops of a value are listed by hand below; the script checks that each of them exists.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELATIVE_CLAUSE = re.compile(r"\s*(What|Whether|Of)\b")
IS_NO = re.compile(r"\b(is|are|was|were|has|have) no [a-z]+")
RECIPE = "model: {path: base}\ndata: {train: {path: rows.jsonl}}\noutput: {dir: run}\n"
REPEATS = 7

_READ_BEFORE = [
    "recipe_file.py:load_recipe", "yaml_tree.py:read_tree", "part_reader.py:read_part",
    "part_reader.py:_field", "part_reader.py:_value", "field_types.py:read", "train.py:_train",
]  # fmt: skip
_READ = [
    "recipe/load.py:load_recipe", "recipe/yaml_parser.py:read_tree",
    "recipe/validation.py:validate_tree", "recipe/validation.py:_plain",
    "recipe/field_types.py:convert",
]  # fmt: skip
STOPS: dict[str, dict[str, list[str]]] = {
    "optimizer.learning_rate": {
        "qlora_cli/keeper.py": [
            *_READ_BEFORE, "optim/optimizers.py:build", "optim/optimizers.py:_grouped",
            "optim/groups.py:group_parameters",
        ],
        "qlora_cli/loop/setup.py": [
            *_READ, "loop/setup.py:build_setup", "loop/setup.py:assemble", "optim/base.py:build",
            "optim/base.py:_grouped", "optim/groups.py:group_parameters",
        ],
    },
    "adapter.r": {
        "qlora_cli/keeper.py": [
            *_READ_BEFORE, "model/adapters/peft_method.py:attach",
            "model/adapters/lora.py:peft_config",
        ],
        "qlora_cli/loop/setup.py": [
            *_READ, "loop/setup.py:build_setup", "adapters/base.py:attach",
            "adapters/lora.py:peft_config",
        ],
    },
    "training.micro_batch_size": {
        "qlora_cli/keeper.py": [
            *_READ_BEFORE, "trial.py:settle_here", "fit.py:settle", "fit.py:with_changes",
            "estimate.py:read_rows", "recipe.py:rows_per_forward", "build.py:stream_batches",
            "data/batches.py:BatchStream",
        ],
        "qlora_cli/loop/setup.py": [
            *_READ, "train/preflight.py:resolve_auto",
            "plan/shrink_to_fit.py:resolve_micro_batch_size", "loop/setup.py:build_setup",
            "recipe/sections.py:fixed_micro_batch_size", "loop/setup.py:stream_batches",
            "data/batching/sampler.py:BatchStream",
        ],
    },
    "a row": {
        "qlora_cli/keeper.py": [
            "data/sources/source.py:conversations", "data/prepare.py:_encode",
            "data/workers.py:encode", "data/encode.py:_lay_out", "data/typed.py:mask",
            "data/layout.py:lay_out_all", "data/pattern.py:of", "data/layout.py:_make_pattern",
            "data/answers.py:find_answers", "data/template.py:render", "data/typed.py:tokenize",
            "data/encode.py:_label", "data/encode.py:cut", "data/store.py:SetWriter",
            "data/batches.py:BatchStream",
        ],
        "qlora_cli/loop/setup.py": [
            "data/sources/source.py:conversations", "data/prepared/prepare.py:_encode",
            "data/prepared/workers.py:encode", "data/encode/encoder.py:encode_rows",
            "data/render/renderer.py:render_all", "data/render/answer_spans.py:find_answers",
            "data/render/chat_template.py:render",
            "data/encode/tokens.py:tokenize", "data/encode/labels.py:label",
            "data/encode/truncate.py:truncate_row",
            "data/prepared/mmap_dataset.py:DatasetWriter", "data/batching/order.py:RowOrder",
            "data/batching/sampler.py:BatchStream", "data/batching/collate.py:concatenate_batch",
        ],
    },
}  # fmt: skip
"""Value -> a file that tells the version of the code -> the functions that hand the value on.

From the YAML file to the library's argument; for a row, to the micro-batch. Pydantic's own
functions are not counted.
"""


@dataclass(frozen=True)
class Code:
    """The package of one commit, parsed."""

    root: Path
    trees: dict[Path, ast.Module]

    def functions(self) -> Iterator[tuple[Path, ast.FunctionDef]]:
        """Yield each function and method with its file."""
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    yield path, node

    def docstrings(self) -> Iterator[str]:
        """Yield each docstring, and each string that documents the field above it."""
        for tree in self.trees.values():
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                for statement in body if isinstance(body, list) else []:
                    match statement:
                        case ast.Expr(ast.Constant(str(text))):
                            yield text

    def texts(self) -> Iterator[str]:
        """Yield each string and each comment."""
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
            lines = path.read_text(encoding="utf-8").splitlines()
            yield from (line.partition("#")[2] for line in lines if "# " in line)


def read_code(root: Path) -> Code:
    """Parse all modules of the package below a checkout."""
    files = sorted((root / "qlora_cli").rglob("*.py"))
    return Code(root, {path: ast.parse(path.read_text(encoding="utf-8")) for path in files})


def root_modules(code: Code) -> str:
    """Count the modules at the root of the package."""
    return str(len(list((code.root / "qlora_cli").glob("*.py"))))


def import_rule_lines(code: Code) -> str:
    """Count the lines of the tables that say who may import whom."""
    test = code.root / "tests" / "architecture" / "test_imports.py"
    names = {"FOUNDATION", "PARTS", "RECIPE", "STORIES", "TOLD", "ALLOWED", "ORDER"}
    lines = 0
    for node in ast.parse(test.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and names & {ast.unparse(name) for name in node.targets}:
            lines += (node.end_lineno or node.lineno) - node.lineno + 1
    return str(lines)


def longest_function(code: Code) -> str:
    """Find the function with the longest body; its docstring does not count."""
    lines, name = max((_body_lines(node), node.name) for _, node in code.functions())
    return f"{lines} (`{name}`)"


def long_functions(code: Code) -> str:
    """Count the functions of more than 60 lines."""
    return str(sum(_body_lines(node) > 60 for _, node in code.functions()))


def most_parameters(code: Code) -> str:
    """Find the longest parameter list; those of the command line are options."""
    found = [
        (_num_parameters(node), node.name)
        for path, node in code.functions()
        if "cli" not in path.relative_to(code.root / "qlora_cli").parts
    ]
    number, name = max(found)
    return f"{number} (`{name}`)"


def inheritance_depth(code: Code) -> str:
    """Find the class furthest below the base of all recipe sections (`Part`, now `Config`)."""
    bases: dict[str, list[str]] = {}
    for tree in code.trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).partition("[")[0] for base in node.bases]

    def depth(name: str) -> int:
        if name in ("Part", "Config") and "BaseModel" in bases.get(name, []):
            return 0
        above = [depth(base) for base in bases.get(name, []) if base != name]
        return max((level + 1 for level in above if level >= 0), default=-1)

    level, name = max((depth(name), name) for name in bases)
    return f"{level} (`{name}`)"


def long_files(code: Code) -> str:
    """Count the files of more than 400 lines, and name the longest."""
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in code.trees}
    longest = max(sizes, key=lambda path: sizes[path])
    number = sum(size > 400 for size in sizes.values())
    return f"{number} (longest {sizes[longest]}: `{longest.relative_to(code.root / 'qlora_cli')}`)"


def relative_docstrings(code: Code) -> str:
    """Count the docstrings that begin with a relative clause, and all docstrings."""
    texts = list(code.docstrings())
    return f"{sum(bool(RELATIVE_CLAUSE.match(text)) for text in texts)} of {len(texts):,}"


def is_no(code: Code) -> str:
    """Count the places that say "is no ..." in strings and comments."""
    return str(sum(len(IS_NO.findall(text)) for text in code.texts()))


def stops(code: Code) -> str:
    """List how many functions pass each value on, between the YAML and the library."""
    counts = []
    for value, versions in STOPS.items():
        marker = next(marker for marker in versions if (code.root / marker).is_file())
        for stop in versions[marker]:
            path, _, name = stop.partition(":")
            defined = re.compile(rf"\b(def|class) {re.escape(name)}\b|^{re.escape(name)}\b", re.M)
            text = (code.root / "qlora_cli" / path).read_text(encoding="utf-8")
            assert defined.search(text), f"{value}: {stop} does not exist"
        counts.append(f"{value} {len(versions[marker])}")
    return ", ".join(counts) or "not listed"


def start_up(code: Code, *arguments: str) -> str:
    """Time a command line as a whole process: the median of several, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        seconds = []
        for _ in range(REPEATS):
            started = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "qlora_cli", *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(code.root)},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            seconds.append(time.monotonic() - started)
    return f"{statistics.median(seconds):.2f}"


def _body_lines(node: ast.FunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def _num_parameters(node: ast.FunctionDef) -> int:
    names = [one.arg for one in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


MEASURES: dict[str, Callable[[Code], str]] = {
    "modules at the root": root_modules,
    "lines of the import rule's tables": import_rule_lines,
    "stops of a value": stops,
    "longest function (lines)": longest_function,
    "functions over 60 lines": long_functions,
    "most parameters": most_parameters,
    "deepest inheritance below the base section": inheritance_depth,
    "files over 400 lines": long_files,
    'docstrings that begin with "What", "Whether", "Of"': relative_docstrings,
    'places of "is no ..." and its kin': is_no,
    "`qlora --help` (s)": lambda code: start_up(code, "--help"),
    "`qlora validate` (s)": lambda code: start_up(code, "validate", "recipe.yaml"),
}


def measure(commit: str, folder: Path) -> dict[str, str]:
    """Take all measures of one commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(folder), commit], check=True)
    try:
        code = read_code(folder)
        return {name: take(code) for name, take in MEASURES.items()}
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> int:
    """Print the table."""
    commits = sys.argv[1:] or ["HEAD"]
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(commit, Path(folder) / f"{i}") for i, commit in enumerate(commits)]
    print(f"| measure | {' | '.join(commits)} |")
    print(f"|---|{'---|' * len(commits)}")
    for name in MEASURES:
        print(f"| {name} | {' | '.join(one[name] for one in found)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
