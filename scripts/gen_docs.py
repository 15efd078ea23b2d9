"""Write the generated pages of docs/, or check them: `python scripts/gen_docs.py [--check]`.

Exit status of `--check`: 0 if all are current, else 1.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from typer.main import get_command

from qlora_cli.cli import app
from qlora_cli.common.config import Config, field_docs
from qlora_cli.common.report import ABSENT, Report, key_of, report_docs
from qlora_cli.compare.report import CompareReport
from qlora_cli.evaluate.lm_eval import HarnessReport
from qlora_cli.evaluate.report import EvaluationReport
from qlora_cli.export.combine_report import CombineReport
from qlora_cli.export.report import ExportReport
from qlora_cli.inference.batch import GenerationReport
from qlora_cli.inspect.adapters import AdapterDifference, AdapterList, AdapterReport
from qlora_cli.inspect.preview import PreviewRow
from qlora_cli.plan.report import PlanReport, TableReport
from qlora_cli.recipe.field_types import FieldType, key_paths, type_names
from qlora_cli.recipe.messages import paths_of_key
from qlora_cli.recipe.other_tools import INSTEAD, OTHER_NAMES, OTHER_VALUES, TAKES
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.yaml_writer import yaml_lines
from qlora_cli.runs.merge_report import MergeReport

ROOT = Path(__file__).resolve().parent.parent
# The tests import this file from the root, and the command line runs it from its own folder.
sys.path.insert(0, str(ROOT))

from scripts.templates_page import templates_page  # noqa: E402

FOLDER = ROOT / "docs"

NOTE = "<!-- Written by scripts/gen_docs.py from the code; change that instead. -->"

RECIPE_HEAD = f"""\
{NOTE}
# The recipe

A recipe is one YAML file. The shortest:

```yaml
model: {{path: Qwen/Qwen2.5-0.5B-Instruct}}
data: {{train: {{path: rows.jsonl}}}}
output: {{dir: runs/first}}
```

A key that is not in these tables is an error. `qlora validate RECIPE` prints all values of a recipe
and the origin of each.

- **Types.** The key determines the type of its value: `2e-4`, `1E-5` and `1_000` are numbers if the
  key takes a number, and `no` and `123` are text if it takes text. Quoted values are always text.
- **Sections with a `type`** have several variants, each with its own keys. If you write such a
  section, give its `type`.
- **`extends: other.yaml`**, at the top of a recipe, builds on another recipe, which may extend a
  third. The path is relative to the recipe. Sections are merged key by key; lists and values are
  replaced, and so is a section whose `type` differs.
- **`--set section.key=value`**, on the command line, overrides the files by the same rules:
  `--set adapter.r=8`, `--set 'adapter.target_modules=[q_proj, v_proj]'`.
- **Editors** can check a recipe while you write it: run `qlora schema > recipe.schema.json`, and
  begin the recipe with `# yaml-language-server: $schema=recipe.schema.json`. The schema accepts one
  spelling of each value: `true` but not `yes`, and quotes around text that looks like a number.
"""

OTHER_TOOLS_HEAD = f"""\
{NOTE}
# Keys of other tools

This page lists keys of axolotl, LLaMA-Factory, TRL and transformers, and the recipe keys that
replace them. `qlora validate RECIPE` says the same for each key that it does not know.
"""

CLI_HEAD = f"""\
{NOTE}
# The command line
"""


JSON_HEAD = f"""\
{NOTE}
# The keys of --json

With `--json` a command prints one JSON document on standard output.
"""

JSON_REPORTS: dict[str, type[Report]] = {
    "qlora plan": PlanReport,
    "qlora plan --table": TableReport,
    "qlora compare": CompareReport,
    "qlora merge": MergeReport,
    "qlora export": ExportReport,
    "qlora eval": EvaluationReport,
    "qlora eval --harness": HarnessReport,
    "qlora preview": PreviewRow,
    "qlora generate": GenerationReport,
    "qlora adapters list": AdapterList,
    "qlora adapters inspect": AdapterReport,
    "qlora adapters diff": AdapterDifference,
    "qlora adapters combine": CombineReport,
}
"""Each command whose `--json` is documented, with its report. `qlora merge` writes it to
merge.json too."""

PIPE = "\\|"
"""A pipe in a cell of a table, inside code too, as GitHub's Markdown reads it."""

_JSON_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false"}

Sections = dict[tuple[type[Config], ...], str]
"""Config classes, and the name of the section of the page that lists their keys."""


def recipe_page() -> str:
    seen: Sections = {}
    sections = [
        line
        for name, info in Recipe.model_fields.items()
        for line in _section(name, info, field_docs(Recipe)[name], seen)
    ]
    return _joined([RECIPE_HEAD, *sections])


def _section(
    path: str, info: FieldInfo, about: str, seen: Sections, variants: Sequence[str] = ()
) -> Iterator[str]:
    """Render the keys of a section, by variant, and the sections below it.

    Args:
        variants: the types of the section above that have this one; empty for all of them.
    """
    parts = _parts(FieldType.of(info))
    if not parts:
        yield f"## `{path}`\n"
        yield f"{about} It takes {FieldType.of(info).words()}. Default: {_default(info)}.\n"
        return
    only = f" of {', '.join(f'`{name}`' for name in variants)}" if variants else ""
    yield f"{'#' * (path.count('.') + 2)} `{path}`{only}\n"
    yield f"{about} {_presence(info)}\n"
    if parts in seen:
        yield f"It has the same keys as {seen[parts]}.\n"
        return
    seen[parts] = f"`{path}`{only}"
    if len(parts) > 1:
        yield from (f"- `type: {_types(part)}`: {_about(part)}" for part in parts)
        yield ""
    yield from _tables(parts)
    for name, forms in _sections_below(parts).items():
        for below, about_it, owners in forms:
            some = owners if len(forms) > 1 else ()
            yield from _section(f"{path}.{name}", below, about_it, seen, some)


def _sections_below(
    parts: tuple[type[Config], ...],
) -> dict[str, list[tuple[FieldInfo, str, list[str]]]]:
    """Return each key that takes a section, in its different forms, with the types that have it.

    Variants may declare a key of the same name with another section, text or default.
    """
    below: dict[str, dict[tuple[Any, ...], tuple[FieldInfo, str, list[str]]]] = {}
    for part in parts:
        types = list(type_names(part)) if parts[1:] else []
        for name, info in part.model_fields.items():
            if sections := _parts(FieldType.of(info)):
                about = field_docs(part)[name]
                form = (sections, about, _presence(info))
                _, _, owners = below.setdefault(name, {}).setdefault(form, (info, about, []))
                owners += types
    return {name: list(forms.values()) for name, forms in below.items()}


def _parts(field_type: FieldType) -> tuple[type[Config], ...]:
    return field_type.sections or (_parts(field_type.item) if field_type.item else ())


def _tables(parts: tuple[type[Config], ...]) -> Iterator[str]:
    """Render one table for all variants with the same keys."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for part in parts:
        kinds.setdefault(tuple(_rows(part)), []).append(f"`{_types(part)}`" if parts[1:] else "")
    for rows, names in kinds.items():
        if not rows:
            yield f"{', '.join(names)}: no other keys.\n"
            continue
        if parts[1:]:
            yield f"{', '.join(names)}:\n"
        yield from ["| key | takes | default | meaning |", "|---|---|---|---|", *rows, ""]


def _rows(part: type[Config]) -> Iterator[str]:
    docs = field_docs(part)
    for name, info in part.model_fields.items():
        if name == "type":
            continue
        field_type = FieldType.of(info)
        takes = (
            f"a section (below){', or null' * field_type.nullable}"
            if _parts(field_type)
            else field_type.words()
        )
        if _parts(field_type) and field_type.item:
            takes = f"{'a section, or ' * bool(field_type.sections)}a list of sections (below)"
        cells = [f"`{name}`", takes, _default(info), " ".join(docs[name].split())]
        yield f"| {' | '.join(cell.replace('|', PIPE) for cell in cells)} |"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, Config):
        name = getattr(default, "type", None)
        return f"`{{type: {name}}}`" if name else ""
    (line, _), *_ = yaml_lines({"x": default})
    return f"`{line.removeprefix('x: ')}`"


def _presence(info: FieldInfo) -> str:
    default = _default(info)
    if default == "required":
        return "Required."
    return f"Default: {default}." if "type" in default else "Optional."


def _types(part: type[Config]) -> str:
    return "`, `".join(type_names(part))


def _about(part: type[Any]) -> str:
    return " ".join((inspect.getdoc(part) or "").split())


def other_tools_page() -> str:
    paths = list(key_paths(Recipe))
    names = sorted(OTHER_NAMES.items())
    return _joined(
        [
            OTHER_TOOLS_HEAD,
            "| key | in a recipe | which takes |",
            "|---|---|---|",
            *(
                f"| `{key}` | `{paths_of_key(ours, paths)[0]}` | {TAKES.get(key, '')} |"
                for key, ours in names
            ),
            "",
            "## Values",
            "",
            "| value | in a recipe |",
            "|---|---|",
            *(f"| `{value}` | `{ours}` |" for value, ours in sorted(OTHER_VALUES.items())),
            "",
            "## Keys without a counterpart",
            "",
            "| key | instead |",
            "|---|---|",
            *(f"| `{key}` | {text.replace('|', PIPE)} |" for key, text in sorted(INSTEAD.items())),
        ]
    )


def cli_page() -> str:
    return _joined([CLI_HEAD, *_commands("qlora", get_command(app))])


def _commands(name: str, command: Any) -> Iterator[str]:
    """Render a command and its subcommands."""
    yield from _command(name, command)
    for below, one in getattr(command, "commands", {}).items():
        yield from _commands(f"{name} {below}", one)


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
    yield f"## `{' '.join([name, *arguments])}`\n"
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        # The mark of a paragraph that keeps its lines.
        if not paragraph.startswith("\b\n"):
            yield f"{paragraph}\n"
            continue
        title, lines = paragraph[2:].split("\n", 1)
        language = "bash" if title == "Example:" else "text"
        yield f"{title}\n\n```{language}\n{textwrap.dedent(lines)}\n```\n"
    if command.params:
        yield from ["| option | meaning |", "|---|---|", *map(_option, command.params), ""]


def _option(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"| `{parameter.metavar}` | {parameter.help} |"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    value = f" `{parameter.metavar.replace('|', PIPE)}`" if parameter.metavar else ""
    notes = ["Required."] * parameter.required
    if parameter.metavar and isinstance(parameter.default, str):
        notes.append(f"Default: {parameter.default}.")
    about = " ".join([parameter.help, *notes]).replace("|", PIPE)
    return f"| {names}{value} | {about} |"


def json_page() -> str:
    lines = [JSON_HEAD]
    for command, report in JSON_REPORTS.items():
        lines += [f"## `{command} --json`\n", *_report(report, "")]
    return _joined(lines)


def _report(report: type[Report], path: str) -> Iterator[str]:
    """Render the keys of a report as a table, and those of the reports in it."""
    yield f"{_about(report)}\n"
    yield from ["| key | value | meaning |", "|---|---|---|"]
    docs, types = report_docs(report), get_type_hints(report)
    for name, text in docs.items():
        assert text, f"{report.__name__}.{name} has no docstring"
        yield f"| `{key_of(name)}` | {_json_type(types[name])} | {' '.join(text.split())} |"
    yield ""
    for name in docs:
        for below, more in _reports_in(types[name]):
            place = f"{path}{key_of(name)}{more}"
            yield f"### `{place}`\n"
            yield from _report(below, f"{place}.")


def _reports_in(kind: Any) -> Iterator[tuple[type[Report], str]]:
    """Yield the report classes within a type, each with its path."""
    if isinstance(kind, type) and issubclass(kind, Report):
        yield kind, ""
    more = {Sequence: "[]", list: "[]", tuple: "[]", Mapping: ".*", dict: ".*"}
    for one in get_args(kind):
        for below, rest in _reports_in(one):
            yield below, more.get(get_origin(kind), "") + rest


def _json_type(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _JSON_TYPES:
        return _JSON_TYPES[kind]
    if isinstance(kind, type) and issubclass(kind, Report):
        return "object (below)"
    if kind is NoneType:
        return "null"
    if kind is Any:
        return "any"
    if origin is Literal:
        return "absent" if inner == (ABSENT,) else ", ".join(f"`{one}`" for one in inner)
    if origin in (Sequence, list, tuple):
        return f"list of {_json_type(inner[0])}"
    if origin in (Mapping, dict):
        return f"object; each value: {_json_type(inner[1])}"
    assert origin in (Union, UnionType), kind
    return " or ".join(_json_type(one) for one in inner)


def _joined(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    pages = {
        "reference/recipe.md": recipe_page(),
        "reference/cli.md": cli_page(),
        "reference/other-tools.md": other_tools_page(),
        "reference/json.md": json_page(),
        "templates.md": _joined(templates_page()),
    }
    old = [name for name, text in pages.items() if not _is_current(FOLDER / name, text)]
    if sys.argv[1:] == ["--check"]:
        for name in old:
            print(f"docs/{name} is not current: run python scripts/gen_docs.py")
        return 1 if old else 0
    for name in old:
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(pages[name], encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
