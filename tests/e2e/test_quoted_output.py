"""Output quoted in the documentation is what the commands print.

A block is quoted output if the line before it is `<!-- quoted: NAME -->`. For each NAME there is a
function here that produces the text. `tests/pages.py` states which differences are allowed.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import exit_code, needs_model
from tests.pages import BLOCKS, ROOT, check_quote, mask_numbers

QUOTES = 7
"""Quoted blocks in all pages together."""
UNMARKED = {"evaluation.md", "serving.md", "cli.md"}
"""Pages with other text: a report of a long run, a Modelfile, generated help."""

QUOTED = {block.quoted: block for block in BLOCKS if block.quoted}

Printed = Callable[..., str]
"""Run a command in this process and return both of its outputs, standard output first."""


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Printed:
    """Run commands in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert exit_code(*arguments) == code
        output = capsys.readouterr()
        return output.out + output.err

    return run


def quote(name: str) -> str:
    return QUOTED[name].text


def test_each_quoted_block_has_a_test_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    missing = [name for name in QUOTED if f'quote("{name}")' not in source]
    assert not missing
    assert len(QUOTED) == QUOTES


def test_unmarked_text_blocks_are_listed() -> None:
    """A text block without a mark cannot be checked, so there are few of them."""
    unmarked = [block for block in BLOCKS if block.language == "text" and not block.quoted]
    assert {block.page.name for block in unmarked} <= UNMARKED


def test_recipe_errors(printed: Printed) -> None:
    Path("recipe.yaml").write_text(
        "model: {path: base}\n"
        "adapter:\n"
        "  type: lora\n"
        "  rank: 64\n"
        "data: {train: {path: rows.jsonl}}\n"
        "optimizer: {type: adamw, learning_rate: fast}\n"
        "output: {dir: run}\n"
    )
    check_quote(quote("recipe errors"), printed("validate", "recipe.yaml", code=2))


def test_bad_rows(printed: Printed, tiny_model: Path) -> None:
    Path("recipe.yaml").write_text(
        f"model: {{path: {tiny_model}}}\n"
        "data: {train: {path: support.jsonl}}\n"
        "output: {dir: run}\n"
    )
    row = (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "%s"}]}'
    )
    lines = [row % "Ho", (row % "Ho").replace("assistant", "humain"), row % "Adé"]
    rows = "\n".join(lines).encode("latin-1")
    Path("support.jsonl").write_bytes(rows)
    check_quote(quote("bad rows"), printed("-q", "preview", "recipe.yaml", code=2))


def test_exit_codes_in_the_documentation_match_help(printed: Printed) -> None:
    help_text = printed("--help")
    listed = help_text[help_text.index("Exit codes:") : help_text.index("Options:")]
    codes = dict(line.split(maxsplit=1) for line in listed.splitlines()[1:] if line.strip())
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    section = page[page.index("## Exit codes") :].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()]
    documented = {row[0]: row[1] for row in rows if row[0].isdigit()}
    assert documented == codes


@pytest.mark.slow
@needs_model
def test_preview_of_the_quickstart(printed: Printed) -> None:
    Path("models").symlink_to(ROOT / "models")
    make_data = [sys.executable, str(ROOT / "scripts" / "make_demo_data.py"), "--output", "demo"]
    subprocess.run(make_data, check=True, capture_output=True)
    check_quote(quote("preview"), printed("-q", "preview", str(ROOT / "configs/quickstart.yaml")))


@pytest.mark.slow
def test_plan_of_an_8b_recipe(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = "configs/llama-3.1-8b-qlora-24gb.yaml"
    check_quote(quote("plan"), printed("-q", "plan", recipe, "--device", "24GiB"))


def test_results_of_the_quickstart(printed: Printed, write_recipe: Callable[..., Path]) -> None:
    """Compare the form of the table on a tiny model; the figures are those of a real run."""
    recipe = write_recipe(
        training={"max_steps": 1},
        evaluation={"tasks": [{"type": "json_match"}], "max_new_tokens": 32},
        output={"dir": "runs/quickstart"},
    )
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    for row in rows:  # the task reads references as JSON
        row["messages"][-1]["content"] = json.dumps(row["messages"][-1]["content"])
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Path("runs/quickstart")
    printed("-q", "train", str(recipe))
    merge = ("-q", "merge", str(run), "--output", str(run / "merged"), "--no-logits")
    printed(*merge)
    for name, target in (("eval", run), ("eval-merged", run / "merged")):
        options = () if target == run else ("--recipe", str(recipe))
        report = printed("-q", "eval", str(target), *options, "--json")
        (run / f"{name}.json").write_text(report, encoding="utf-8")
    script = [sys.executable, str(ROOT / "scripts" / "results_table.py"), str(run)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    check_quote(mask_numbers(quote("quickstart")), mask_numbers(done.stdout))


@pytest.mark.slow
def test_the_tutorial(
    printed: Printed, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run all its commands, with a tiny model in place of the real one."""
    tutorial = [block for block in BLOCKS if block.page.name == "tutorial.md"]
    rows, recipe = (
        next(block.text for block in tutorial if block.language == language)
        for language in ("csv", "yaml")
    )
    examples = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    assert (examples / "tickets.csv").read_text(encoding="utf-8").startswith(rows)
    recipe, replaced = re.subn(r"path: models/\S+\.gguf", f"path: {tiny_model}", recipe)
    assert replaced == 1
    Path("tickets.yaml").write_text(recipe.replace("epochs: 6", "epochs: 1"), encoding="utf-8")

    output = {}
    for line in (
        line for block in tutorial if block.language == "bash" for line in block.text.splitlines()
    ):
        before, is_piped, command = line.rpartition(" | ")
        words = shlex.split(command)
        if words[0] != "qlora":
            continue
        if is_piped:
            monkeypatch.setattr(sys, "stdin", io.StringIO(f"{shlex.split(before)[1]}\n"))
        output[words[1]] = printed("-q", *words[1:])
    assert list(output) == ["preview", "train", "eval", "chat", "merge"]
    check_quote(mask_numbers(quote("tutorial evaluation")), mask_numbers(output["eval"]))
    check_quote(mask_numbers(quote("tutorial merge")), mask_numbers(output["merge"]))
    assert Path("models/tickets/config.json").is_file()


@pytest.mark.parametrize(
    ("quoted", "text", "is_same"),
    [
        ("a\n...\nd", "a\nb\nc\nd\n", True),
        ("a\n...\nd", "a\nd", True),
        ("a ... d", "a b c d", True),
        ("a", "a\nb", False),
        ("a\n...", "b\n", False),
        ("loss 0.5", "loss 0.6", False),
    ],
)
def test_quotes_are_compared(quoted: str, text: str, is_same: bool) -> None:
    if is_same:
        check_quote(quoted, text)
    else:
        with pytest.raises(AssertionError):
            check_quote(quoted, text)
