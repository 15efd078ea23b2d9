"""Talking to runs through the command line, and combining what they trained."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qlora_cli.cli import main
from tests.conftest import save_tiny_model

LOGITS = """
import sys, torch
from qlora_cli.inference.session import open_session
session = open_session(sys.argv[1])
with torch.no_grad(), session.use(session.default) as generator:
    torch.save(generator.model(input_ids=torch.arange(5, 45)[None]).logits, sys.argv[2])
"""


def qlora(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Run a command in this process; what it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert (caught.value.code or 0) == code, printed.err
    return printed.out if code == 0 else printed.err


@pytest.fixture
def runs(
    tiny_recipe: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> list[Path]:
    """Two runs over one base in NF4."""
    folders = []
    for i, rate in enumerate([1e-2, 3e-2]):
        folder = tmp_path / f"run-{i}"
        made = tiny_recipe(
            output={"dir": str(folder)},
            training={"seed": i},
            optimizer={"learning_rate": rate},
            quantization={"type": "nf4"},
        )
        path = tmp_path / f"recipe-{i}.yaml"
        path.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)), "utf-8")
        qlora(capsys, "train", path)
        folders.append(folder)
    return folders


@pytest.mark.slow
def test_two_runs_swapped_in_one_process_answer_as_in_separate_processes(
    runs: list[Path], tmp_path: Path
) -> None:
    from qlora_cli.inference.session import open_session

    session = open_session(str(runs[0]), adapters=[f"other={runs[1]}"])
    swapped = {}
    for name in ("other", "tuned", "other", "tuned"):
        with torch.no_grad(), session.use(session.models[name]) as generator:
            swapped[name] = generator.model(input_ids=torch.arange(5, 45)[None]).logits
    for name, run in zip(("tuned", "other"), runs, strict=True):
        out = tmp_path / f"{name}.pt"
        subprocess.run([sys.executable, "-c", LOGITS, run, out], check=True, capture_output=True)
        assert torch.equal(torch.load(out), swapped[name]), name
    assert not torch.equal(swapped["tuned"], swapped["other"])


def test_a_chat_through_a_pipe(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "say ab 2\n\n/base\nsay ab 2\n/swap other\n/reset\nsay ab 2\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    arguments = ("--adapter", f"other={runs[1]}", "--max-new-tokens", 8, "--json")
    said = [json.loads(line) for line in qlora(capsys, "chat", runs[0], *arguments).splitlines()]
    assert [one["model"] for one in said] == ["tuned", "base", "other"]
    assert {one["message"] for one in said} == {"say ab 2"}


def test_errors_in_piped_input_end_the_chat(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/swop\nho\n"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["chat", str(runs[0]), "--max-new-tokens", "8", "--json"])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert len(printed.out.splitlines()) == 1
    assert "error: /swop: no such command\nhint: /help lists them" in printed.err


@pytest.mark.slow
def test_all_prompts_of_a_file_are_answered_in_order(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "say " + "ab " * n} for n in (1, 9, 4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for size in (1, 3):
        out = tmp_path / f"answers-{size}.jsonl"
        options = ["--batch-size", size, "--max-new-tokens", 9, "--json"]
        printed = qlora(
            capsys, "generate", runs[0], "--prompts", prompts, "--output", out, *options
        )
        assert json.loads(printed)["prompts"] == 3
        found.append([json.loads(line) for line in out.read_text("utf-8").splitlines()])
    assert found[0] == found[1]
    assert [line["prompt"] for line in found[0]] == [row["prompt"] for row in rows]
    error = qlora(capsys, "generate", runs[0], "--prompts", prompts, "--output", out, code=2)
    assert "exists" in error


@pytest.mark.slow
def test_adapters_are_listed_inspected_compared_and_combined(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = json.loads(qlora(capsys, "adapters", "list", tmp_path, "--json"))["adapters"]
    assert {Path(one["path"]).parent.name for one in listed} == {"run-0", "run-1"}
    assert {one["r"] for one in listed} == {4}

    found = json.loads(qlora(capsys, "adapters", "inspect", runs[0], "--json"))
    assert len(found["modules"]) == 14
    assert set(found["layers"]) == {"0", "1"}
    assert all(1 <= module["effective_rank"] <= 4 for module in found["modules"])
    assert "effective rank" in qlora(capsys, "adapters", "inspect", runs[0])

    same = json.loads(qlora(capsys, "adapters", "diff", runs[0], runs[0], "--json"))
    assert same["cosine"] == pytest.approx(1)
    assert same["distance"] < 1e-9
    other = json.loads(qlora(capsys, "adapters", "diff", *runs, "--json"))
    assert other["cosine"] < 0.9
    assert "cosine" in qlora(capsys, "adapters", "diff", *runs)

    made = tmp_path / "made"
    options = ["--method", "linear", "--weights", "1,0", "--output", made]
    report = json.loads(qlora(capsys, "adapters", "combine", *runs, *options, "--json"))
    assert report["error"] < 1e-6
    like = json.loads(qlora(capsys, "adapters", "diff", runs[0], made, "--json"))
    assert like["distance"] < 1e-6
    assert "exists" in qlora(capsys, "adapters", "combine", *runs, *options, code=2)

    names = ["run-0", "run-1", "made"]
    assert [list(one["models"]) for one in report["evaluations"]] == [
        [names[0], names[2]],
        [names[1], names[2]],
    ]
    loss = {
        path.name: json.loads(qlora(capsys, "eval", path, "--json"))["models"]["tuned"]["loss"][
            "value"
        ]
        for path in (*runs, made)
    }
    assert loss[names[2]] == pytest.approx(loss[names[0]], abs=1e-5)
    # What `eval` says, all on the questions of the first.
    for one in report["evaluations"]:
        for name, measures in one["models"].items():
            assert measures["loss"]["value"] == pytest.approx(loss[name], abs=1e-6)

    proof = json.loads(qlora(capsys, "merge", made, "--output", tmp_path / "merged", "--json"))
    assert proof["kl"] < 0.02


@pytest.mark.slow
def test_forgetting_alone_is_enough_to_measure_what_was_combined(
    runs: list[Path], tmp_path: Path
) -> None:
    from qlora_cli.export.combine_adapters import CombineOptions, combine

    text = tmp_path / "general.txt"
    text.write_text("some lines of general text\n" * 20, encoding="utf-8")
    settings = [
        "data.evaluation=null",
        "evaluation.tasks=[]",
        f"evaluation.forgetting={{path: {text}, window: 64}}",
    ]
    report = combine(runs, tmp_path / "made", CombineOptions("linear"), settings)
    assert [list(one.measures) for one in report.evaluations] == [
        ["forgetting.perplexity"],
        ["forgetting.perplexity"],
    ]


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    other = save_tiny_model(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    error = qlora(capsys, "chat", other, "--adapter", f"a={runs[0]}", code=3)
    assert "has other weights" in error


def test_chat_accepts_runs_recipes_adapters_and_models(
    tiny_recipe: Callable[..., Any],
    runs: list[Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from qlora_cli.inference.session import open_session

    recipe = tmp_path / "full.yaml"
    made = tiny_recipe(output={"dir": str(tmp_path / "full")}, adapter={"type": "full"})
    recipe.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)), "utf-8")
    qlora(capsys, "train", recipe)
    alone = tmp_path / "alone"
    shutil.copytree(runs[0] / "last", alone)
    models = {
        name: list(open_session(str(path)).models)
        for name, path in {
            "run": runs[0],
            "weights of a run": runs[0] / "best",
            "adapter": alone,
            "recipe": recipe,
            "full": tmp_path / "full",
            "model": tiny_model,
        }.items()
    }
    assert models == {
        "run": ["base", "tuned"],
        "weights of a run": ["base", "tuned"],
        "adapter": ["base", "tuned"],
        "recipe": ["base"],
        "full": ["tuned"],
        "model": ["base"],
    }
    error = qlora(capsys, "chat", tiny_model, "--set", "quantization.type=nf5", code=2)
    assert "nf5" in error
