"""The scripts can be read, explain themselves, and refuse what they cannot use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELL = sorted((ROOT / "scripts").glob("*.sh"))
COMMANDS = [path for path in SHELL if not path.name.startswith("_")]
PYTHON = ["get_demo_model.py", "make_demo_data.py", "results_table.py"]


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", **options)


def bash(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code after the shared helpers, with the `qlora` of `folder/bin` first on the path."""
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return run(
        "bash",
        "-c",
        f"set -euo pipefail; source '{ROOT / 'scripts' / '_env.sh'}'; {code}",
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
    )


def test_there_are_scripts() -> None:
    assert len(COMMANDS) >= 3


OTHERS = [ROOT / ".ci" / "run", ROOT / "benchmarks" / "race" / "environments.sh"]


@pytest.mark.parametrize("script", [*SHELL, *OTHERS], ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_shell_scripts_have_help_from_any_folder(script: Path, tmp_path: Path) -> None:
    assert os.access(script, os.X_OK)
    result = run(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert f"Usage: scripts/{script.name}" in result.stdout
    assert "xit code" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", PYTHON)
def test_python_scripts_have_help(script: str, tmp_path: Path) -> None:
    result = run(sys.executable, ROOT / "scripts" / script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "usage:" in result.stdout


def test_unknown_options_are_refused() -> None:
    unknown = run(ROOT / "scripts" / "quickstart.sh", "--modle", "x")
    assert unknown.returncode == 2
    assert "there is no --modle" in unknown.stderr
    assert run(ROOT / "scripts" / "quickstart.sh", "--model").returncode == 2
    assert run(ROOT / "scripts" / "train_eval_merge.sh").returncode == 2


def test_environments_of_the_race_are_made_outside_of_the_repository(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "race" / "environments.sh"
    inside = run(script, ROOT / "envs")
    assert (inside.returncode, "inside of the repository" in inside.stderr) == (2, True)
    unknown = run(script, tmp_path / "envs", "nobody")
    assert (unknown.returncode, "no such trainer: nobody" in unknown.stderr) == (2, True)
    assert run(script).returncode == 2
    assert not list(tmp_path.iterdir())
    assert not (ROOT / "envs").exists()


def test_a_wrong_demo_model_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    output.write_bytes(b"something else")
    script = ROOT / "scripts" / "get_demo_model.py"
    result = run(sys.executable, script, "--output", output)
    assert result.returncode == 1
    assert "sha256" in result.stderr
    assert "Traceback" not in result.stderr
    assert output.read_bytes() == b"something else"


@pytest.fixture
def fake_qlora(tmp_path: Path) -> Path:
    """A folder whose `qlora` writes down how it was called, and exits with $QLORA_EXIT."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "qlora"
    command.write_text('#!/bin/sh\necho "$@" >>calls\necho "{}"\nexit "${QLORA_EXIT:-0}"\n')
    command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("status", "checkpoints", "called"),
    [
        (None, False, "train recipe.yaml"),
        ("finished", True, None),
        ("training", True, "train recipe.yaml --resume auto"),
        ("training", False, "train recipe.yaml"),
    ],
)
def test_the_script_starts_or_resumes_training(
    fake_qlora: Path, status: str | None, checkpoints: bool, called: str | None
) -> None:
    run_folder = fake_qlora / "run"
    if status:
        run_folder.mkdir()
        (run_folder / "run.json").write_text(f'{{"status": "{status}"}}')
    if checkpoints:
        (run_folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert bash("train_once run recipe.yaml", fake_qlora).returncode == 0
    calls = fake_qlora / "calls"
    assert (calls.read_text().strip() if calls.exists() else None) == called
    # An interrupted run without a checkpoint is set aside, not lost.
    assert len(list(fake_qlora.glob("run.interrupted-*"))) == (
        status == "training" and not checkpoints
    )


def test_evaluation_is_written_whole_or_not_at_all(fake_qlora: Path) -> None:
    failed = bash("eval_once eval.json qlora eval run", fake_qlora, QLORA_EXIT="3")
    assert failed.returncode == 3
    assert not (fake_qlora / "eval.json").exists()
    assert bash("eval_once eval.json qlora eval run", fake_qlora).returncode == 0
    assert (fake_qlora / "eval.json").read_text() == "{}\n"


def test_exit_codes_pass_through_stages(fake_qlora: Path) -> None:
    result = bash("stage training train_once run recipe.yaml", fake_qlora, QLORA_EXIT="4")
    assert result.returncode == 4


def test_careless_text_is_found(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("fine\nthe " + "the cat\ntrailing \n")
    script = ROOT / "scripts" / "check_text.py"
    result = run(sys.executable, script, path, cwd=ROOT)
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 2
    path.write_text("fine\n")
    assert run(sys.executable, script, path, cwd=ROOT).returncode == 0
