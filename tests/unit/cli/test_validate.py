from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from qlora_cli import __version__
from qlora_cli.cli import app, main
from qlora_cli.errors import (
    EXIT_CODES,
    EXIT_DEADLINE,
    EXIT_DIFFERENT,
    EXIT_FAILED_CELLS,
    EXIT_SIGNAL,
    QloraError,
)

Run = Callable[..., tuple[int, str, str]]

RECIPE = """\
extends: base.yaml
adapter:
  type: lora
  r: 8
optimizer: {type: adamw, learning_rate: 2e-4}
"""
BASE = "model: {path: base}\ndata: {train: {path: rows.jsonl}}\noutput: {dir: run}\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in a folder with two recipes: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    Path("base.yaml").write_text(BASE, encoding="utf-8")
    Path("rows.jsonl").touch()

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *capsys.readouterr()

    return run


def test_validate_prints_every_value_with_its_origin(run: Run) -> None:
    code, out, err = run("validate", "recipe.yaml", "--set", "training.seed=7")
    assert (code, err) == (0, "")
    values = {line.split("  # ")[0].rstrip(): line.split("  # ")[-1] for line in out.splitlines()}
    assert values["  r: 8"] == "recipe.yaml:4"
    assert values["  path: base"] == "base.yaml:1"
    assert values["  seed: 7"] == "--set"
    assert values["  alpha: 32.0"] == "default"
    assert values["  learning_rate: 0.0002"] == "recipe.yaml:5"


def test_the_output_of_validate_is_a_recipe(run: Run) -> None:
    out = run("validate", "recipe.yaml")[1]
    Path("printed.yaml").write_text(out, encoding="utf-8")
    code, again, _ = run("validate", "printed.yaml", "--json")
    assert code == 0
    assert (
        json.loads(again)["recipe"]
        == json.loads(run("validate", "recipe.yaml", "--json")[1])["recipe"]
    )


def test_json_is_one_document_with_stable_keys(run: Run) -> None:
    code, out, err = run("validate", "--json", "recipe.yaml")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert set(report) == {"recipe", "origins"}
    assert report["recipe"]["adapter"]["r"] == 8
    assert report["origins"]["adapter.r"] == "recipe.yaml:4"


def test_an_error_is_text_on_stderr_and_exit_code_2(run: Run) -> None:
    code, out, err = run("validate", "recipe.yaml", "--json", "--set", "adapter.rank=8")
    assert (code, out) == (2, "")
    assert err.startswith('error: --set adapter.rank=8  adapter.rank: LoRA has no "rank"')
    assert err.count("\n") == 1


def test_several_problems_each_have_a_line_that_begins_with_the_place(run: Run) -> None:
    Path("recipe.yaml").write_text(RECIPE + "training: {seed: x}\nr: 1\n", encoding="utf-8")
    code, _, err = run("validate", "recipe.yaml")
    assert code == 2
    assert [line.split("  ")[0] for line in err.splitlines()] == [
        "error: 2 problems",
        "recipe.yaml:6:18",
        "recipe.yaml:7:1",
    ]


@pytest.mark.parametrize(
    ("objective", "kind", "said"),
    [
        ("supervised", "preference", "objective: {type: dpo} learns from such rows"),
        ("dpo", "messages", "a format that reads pairs"),
        ("kto", "preference", "a format that reads answers marked as good or bad"),
        ("reward", "feedback", "objective: {type: kto} learns from such rows"),
        ("simpo", "labelled", "objective: {type: classify} learns from such rows"),
    ],
)
def test_rows_of_another_kind_than_the_objective_needs_are_refused(
    run: Run, objective: str, kind: str, said: str
) -> None:
    sections = f"{{path: rows.jsonl, format: {{type: {kind}}}}}"
    code, _, err = run(
        "validate", "recipe.yaml", "--set", f"data.train={sections}",
        "--set", f"objective={{type: {objective}}}",
    )  # fmt: skip
    assert code == 2
    assert f"format.type ({kind}) reads" in err
    assert said in err


def test_a_missing_file(run: Run) -> None:
    assert run("validate", "none.yaml") == (2, "", "error: none.yaml  there is no such file\n")


@pytest.mark.parametrize(
    "arguments", [(), ("validat",), ("validate",), ("validate", "recipe.yaml", "--sett", "a=1")]
)
def test_a_wrong_command_line_is_exit_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert "Usage: qlora" in out + err


def test_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"qlora {__version__}\n", "")


def leaves(group: Any, name: str = "") -> dict[str, Any]:
    """The commands, those of groups among them, by their full names."""
    found: dict[str, Any] = {}
    for below, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= leaves(command, f"{name}{below} ")
        else:
            found[name + below] = command
    return found


COMMANDS = leaves(get_command(app))


def test_the_commands_stay_the_same() -> None:
    assert list(COMMANDS) == [
        "train", "rerun", "bench", "compare", "eval", "merge", "export", "chat", "generate",
        "predict", "validate", "preview", "plan", "cache", "schema",
        "adapters list", "adapters inspect", "adapters diff", "adapters combine",
    ]  # fmt: skip


def test_no_option_is_removed() -> None:
    """Users' scripts rely on these options: removing one is a breaking change."""
    talk = {"--quiet", "--verbose", "-q", "-v"}
    speak = {"--adapter", "--system", "--temperature", "--top-p", "--top-k", "--max-new-tokens"}
    speak |= {"target", "--set", "--weights", "--seed", "--json", *talk}
    found = {
        name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        for name, command in COMMANDS.items()
    }
    assert found == {
        "train": {"recipe", "--set", "--resume", "--allow", "--no-cache", "--json", *talk},
        "rerun": {"run", "--output", "--json", *talk},
        "bench": {"recipe", "--set", "--steps", "--json", *talk},
        "compare": {
            "recipes",
            "--out",
            "--set",
            "--methods",
            "--vary",
            "--learning-rate",
            "--search",
            "--objective",
            "--generation",
            "--no-generation",
            "--json",
            *talk,
        },
        "plan": {
            "recipe",
            "--set",
            "--device",
            "--gpus",
            "--fit",
            "--table",
            "--html",
            "--json",
            *talk,
        },
        "eval": {
            "target",
            "--set",
            "--tasks",
            "--compare",
            "--harness",
            "--harness-path",
            "--harness-plain",
            "--recipe",
            "--records",
            "--weights",
            "--json",
            *talk,
        },
        "merge": {
            "run",
            "--output",
            "--set",
            "--base",
            "--logits",
            "--no-logits",
            "--gguf",
            "--weights",
            "--json",
            *talk,
        },
        "export": {"model", "--gguf", "--bnb-4bit", "--run", "--json", *talk},
        "chat": speak,
        "predict": {
            "target",
            "--rows",
            "--output",
            "--batch-size",
            "--delimiter",
            "--columns",
            "--set",
            "--weights",
            "--json",
            *talk,
        },
        "generate": {*speak, "--prompts", "--output", "--batch-size", "--delimiter", "--columns"},
        "adapters list": {"folder", "--json", *talk},
        "adapters inspect": {"adapter", "--json", *talk},
        "adapters diff": {"first", "second", "--json", *talk},
        "adapters combine": {
            "paths",
            "--output",
            "--method",
            "--weights",
            "--density",
            "--rank",
            "--seed",
            "--set",
            "--no-eval",
            "--json",
            *talk,
        },
        "validate": {"recipe", "--set", "--deep", "--json", *talk},
        "preview": {
            "recipe",
            "--set",
            "--rows",
            "--bad-rows",
            "--source",
            "--html",
            "--json",
            "--no-cache",
            *talk,
        },
        "cache": {"--clear", "--json", *talk},
        "schema": set(),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert f"Example:\n    qlora {command}" in out


def test_help_lists_all_exit_codes_and_commands(run: Run) -> None:
    out = run("--help")[1]
    for code, meaning in EXIT_CODES.items():
        assert f"\n    {code:<4} {meaning}\n" in out
    for command in COMMANDS:
        assert f"\n  {command.split()[0]} " in out


def test_each_exit_code_has_a_meaning() -> None:
    signals = (signal.SIGINT, signal.SIGTERM)
    used = {error.exit_code for error in (QloraError, *QloraError.__subclasses__())}
    used |= {EXIT_DEADLINE, EXIT_DIFFERENT, EXIT_FAILED_CELLS}
    assert {0, *used, *(EXIT_SIGNAL + number for number in signals)} == set(EXIT_CODES)


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        (("validate", "recipe.yaml"), logging.INFO),
        (("validate", "recipe.yaml", "-q"), logging.WARNING),
        (("-q", "validate", "recipe.yaml"), logging.WARNING),
        (("--quiet", "validate", "recipe.yaml"), logging.WARNING),
        (("validate", "-v", "recipe.yaml"), logging.DEBUG),
        (("-v", "validate", "recipe.yaml", "-q"), logging.WARNING),
    ],
)
def test_quiet_and_verbose_before_and_after_the_command(
    run: Run, arguments: tuple[str, ...], level: int
) -> None:
    assert run(*arguments)[0] == 0
    assert logging.getLogger("qlora").level == level


def test_names_beyond_ascii_in_an_ascii_environment(tmp_path: Path) -> None:
    recipe = tmp_path / "rezept-ü.yaml"
    (tmp_path / "rows.jsonl").touch()
    recipe.write_text(BASE.replace("base", "größe/モデル"), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_cli", "validate", str(recipe), "--set", "output.dir=é"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=tmp_path)
    out = done.stdout.decode("utf-8")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "größe/モデル" in out
    assert "é" in out
    assert "# rezept-ü.yaml:1" in out


def test_ctrl_c_is_exit_code_130_and_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    command = [sys.executable, "-m", "qlora_cli", "validate", str(recipe)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # The pipe opens when the command begins to read, and then makes it wait.
    # A job in the background, as tests may be, ignores the signal and so would its children.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, **pipes, **heeding) as process, recipe.open("wb"):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    said = b"stopped by Ctrl-C: nothing was kept of its result\n"
    assert (process.returncode, out, err) == (130, b"", said)
