"""Methods beside each other through the command line: cells, one table, going on, failing."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from pydantic import TypeAdapter

from qlora_cli.compare.report import CompareReport
from qlora_cli.compare.text import comparison_text, tables
from tests.conftest import exit_code, output_of

NUMBER = {"type": ["number", "null"]}
ESTIMATES = {
    "type": ["object", "null"],
    "additionalProperties": {
        "type": "object",
        "properties": {"value": NUMBER, "low": NUMBER, "high": NUMBER},
        "required": ["value", "low", "high"],
        "additionalProperties": False,
    },
}
CELL: dict[str, Any] = {
    "name": {"type": "string"},
    "recipe": {"type": "string"},
    "method": {"type": ["string", "null"]},
    "settings": {"type": "object", "additionalProperties": {"type": "string"}},
    "status": {"enum": ["finished", "failed", "pruned", "waiting"]},
    "failure": {"type": ["object", "null"], "required": ["error", "hint"]},
    "run": {"type": ["string", "null"]},
    **dict.fromkeys(
        (
            "trained_weights", "total_weights", "trained_share", "steps", "tokens", "seconds",
            "tokens_per_second", "weights_bytes", "run_bytes",
        ),
        NUMBER,
    ),
    "memory": {
        "type": "object",
        "required": [
            "planned_tensor_bytes", "planned_process_bytes", "planned_kinds", "plan_error",
            "measured_bytes", "measured_tensor_bytes",
        ],
        "minProperties": 6,
        "maxProperties": 6,
    },
    "generation": {"type": ["object", "null"], "required": ["base", "tuned", "merged"]},
    "results": ESTIMATES,
    "differences": ESTIMATES,
    "base": {"type": ["string", "null"]},
    "from_base": ESTIMATES,
    "curve": {"type": "array", "items": {"required": ["step", "tokens", "seconds", "loss"]}},
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "folder": {"type": "string"},
        "first": {"type": ["string", "null"]},
        "varied": {"type": "array", "items": {"type": "string"}},
        "measures": {
            "type": "object",
            "additionalProperties": {"required": ["n", "is_share", "lower_is_better"]},
        },
        "bases": {"type": "object", "additionalProperties": ESTIMATES},
        "confidence": {"const": 0.95},
        "resamples": {"type": "integer"},
        "environment": {"type": "object"},
        "cells": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": CELL,
                "required": list(CELL),
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}
SCHEMA["required"] = list(SCHEMA["properties"])

GRID = ("--methods", "lora,nf4", "--vary", "adapter.r=2,0", "--vary",
        "lora:adapter.target_modules=all-linear,[nope]")  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a recipe and a comparison in which some cells fail."""
    folder = tmp_path_factory.mktemp("compared")
    write_recipe(folder, tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert exit_code("compare", "recipe.yaml", "--out", "out", *GRID, "-q") == 8
    return folder


def write_recipe(folder: Path, model: Path, **training: Any) -> None:
    turns = [
        {"role": "user", "content": "say <b> & two"},
        {"role": "assistant", "content": "two & <b>"},
    ]
    row = json.dumps({"messages": turns}) + "\n"
    (folder / "rows.jsonl").write_text(row * 8, encoding="utf-8")
    (folder / "text.jsonl").write_text(json.dumps({"text": "words and " * 20}) + "\n")
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": {"path": "rows.jsonl"}, "evaluation": {"path": "rows.jsonl", "limit": 4}},
        "training": {
            "max_steps": 2, "batch_size": 2, "micro_batch_size": 2, "precision": "fp32",
            "gradient_checkpointing": False, **training,
        },
        "evaluation": {
            "forgetting": {"path": "text.jsonl", "format": {"type": "text"}, "window": 32},
        },
        "output": {"dir": "unused"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "out/comparison.json").read_text("utf-8"))
    return report


def typed(report: dict[str, Any]) -> CompareReport:
    """Return the report as it was before it was written."""
    return TypeAdapter(CompareReport).validate_python(report)


@pytest.mark.slow
def test_every_cell_is_a_row_and_a_failed_one_has_its_reason(compared: Path) -> None:
    report = report_of(compared)
    jsonschema.validate(report, SCHEMA)
    cells = {cell["name"]: cell for cell in report["cells"]}
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "lora r=2 target_modules=all-linear": "finished",
        "lora r=2 target_modules=[nope]": "failed",
        "lora r=0 target_modules=all-linear": "failed",
        "lora r=0 target_modules=[nope]": "failed",
        "nf4 r=2": "finished",
        "nf4 r=0": "failed",
    }
    reason = cells["lora r=2 target_modules=[nope]"]["failure"]["error"]
    assert reason.startswith("adapter.target_modules: 'nope' matches no module of the model")
    assert "found 0; it takes a whole number (at least 1)" in cells["nf4 r=0"]["failure"]["error"]
    text = comparison_text(typed(report))
    assert all(f"{name}: failed: " in text for name in cells if cells[name]["status"] == "failed")


@pytest.mark.slow
def test_a_cell_has_all_columns(compared: Path) -> None:
    report = report_of(compared)
    lora, nf4 = (cell for cell in report["cells"] if cell["status"] == "finished")
    assert report["first"] == lora["name"]
    assert lora["differences"] is None
    assert set(nf4["differences"]) == set(report["measures"]) >= {"loss", "forgetting.perplexity"}
    assert set(report["bases"]) == {lora["base"], nf4["base"]}
    assert lora["base"].startswith("none-")
    assert nf4["base"].startswith("nf4-")
    for cell in (lora, nf4):
        record = json.loads((compared / cell["run"] / "run.json").read_text("utf-8"))
        assert cell["trained_weights"] == record["trained_weights"]
        assert cell["trained_share"] == record["trained_weights"] / record["total_weights"]
        assert cell["memory"]["measured_bytes"] == record["peak_memory_bytes"]
        assert (
            sum(cell["memory"]["planned_kinds"].values())
            == (cell["memory"]["planned_tensor_bytes"])
        )
        for model in ("base", "tuned", "merged"):
            assert cell["generation"][model]["first_token_seconds"] > 0
            assert cell["generation"][model]["tokens_per_second"] > 0
        assert [point["tokens"] for point in cell["curve"]][-1] == record["tokens"]
        weights = compared / cell["run"] / "last/adapter_model.safetensors"
        assert cell["weights_bytes"] == weights.stat().st_size
    # Four bits take less than sixteen or more.
    kinds = [cell["memory"]["planned_kinds"] for cell in (lora, nf4)]
    assert sum(kinds[1].values()) < sum(kinds[0].values())


@pytest.mark.slow
def test_figures_equal_those_of_qlora_eval(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(compared)
    nf4 = report_of(compared)["cells"][4]
    found = output_of(capsys, "eval", nf4["run"])
    assert found["models"]["tuned"] == nf4["results"] | {"kl": found["models"]["tuned"]["kl"]}
    assert found["differences"] == nf4["from_base"]
    assert nf4["results"]["kl"] == found["models"]["tuned"]["kl"]


@pytest.mark.slow
def test_finished_cells_are_not_run_again(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(compared)
    names = ("runs", "measured", "bases")
    files = [f for name in names for f in Path("out", name).rglob("*") if f.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    command = ["compare", "recipe.yaml", "--out", "out", "--methods", "nf4", "--vary"]
    page, text = Path("out/comparison.html").read_text("utf-8"), json.dumps(report_of(compared))
    report = output_of(capsys, *command, "adapter.r=2")
    assert [cell["name"] for cell in report["cells"]] == ["nf4 r=2"]
    assert {file: file.stat().st_mtime_ns for file in files} == before
    # Another recipe would be another comparison.
    assert exit_code(*command, "adapter.r=2", "--set", "adapter.alpha=3") == 2
    error = capsys.readouterr().err
    assert "out/runs/nf4-r=2 was run with other settings\nadapter.alpha: 32.0 -> 3.0" in error
    Path("out/comparison.html").write_text(page, encoding="utf-8")
    Path("out/comparison.json").write_text(text, encoding="utf-8")


class Page(HTMLParser):
    """Tags that are open, what refers elsewhere, and the cells of all tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.outside += [f"{tag} {k}" for k, _ in attrs if k in ("src", "href", "onload")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.mark.slow
def test_the_page_is_whole_and_says_what_the_json_says(compared: Path) -> None:
    text = (compared / "out/comparison.html").read_text("utf-8")
    report = report_of(compared)
    page = Page()
    page.feed(text)
    assert page.open == page.outside == []
    for word in ("<script", "@import", "url(", "http://", "https://"):
        assert word not in text
    assert "prefers-color-scheme: dark" in text
    assert page.cells == [
        cell for _, table in tables(typed(report)) for row in table for cell in row
    ]
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    titles = [plot.findtext("title") for plot in plots]
    assert titles[:3] == [
        "Training loss by tokens",
        "Training loss by seconds of training",
        "Peak memory: planned tensors by kind",
    ]
    assert len(plots) == 3 + len(report["measures"])
    for plot in plots:
        assert plot.get("role") == "img"
        assert plot.findtext("desc")
    done = [cell for cell in report["cells"] if cell["curve"]]
    lines = plots[0].findall("polyline")
    assert [line.findtext("title") for line in lines] == [cell["name"] for cell in done]
    for line, cell in zip(lines, done, strict=True):
        assert len(str(line.get("points")).split()) == len(cell["curve"])
    dots = [dot.findtext("title") for dot in plots[3].findall("circle")]
    values = [cell["results"]["loss"]["value"] for cell in done]
    assert [dot.partition(" [")[0] for dot in map(str, dots)] == [
        f"{c['name']}: {v:.3f}" for c, v in zip(done, values, strict=True)
    ]


@pytest.mark.slow
def test_an_interrupted_comparison_resumes(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM in the middle of the first run of two: it is saved, resumed, and the other begun."""
    write_recipe(tmp_path, tiny_model, max_steps=400)
    monkeypatch.chdir(tmp_path)
    command = ["compare", "recipe.yaml", "--out", "out", "--vary", "adapter.r=2,0"]
    # The run records the number that it is settled to, and is the same run still.
    command += ["--set", "training.micro_batch_size=auto"]
    metrics = Path("out/runs/r=2/metrics.jsonl")

    def interrupt() -> None:
        while not (metrics.is_file() and metrics.read_text("utf-8").count("\n") > 5):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert exit_code(*command) == 143
    first, second = report_of(tmp_path)["cells"]
    assert (first["status"], second["status"]) == ("waiting", "failed")
    record = json.loads((metrics.parent / "run.json").read_text("utf-8"))
    assert record["status"] == "training"
    step = len(first["curve"])
    assert 0 < step < 400
    assert exit_code(*command) == 8
    record = json.loads((metrics.parent / "run.json").read_text("utf-8"))
    assert [one["step"] for one in record["resumed"]] == [step]
    first, second = report_of(tmp_path)["cells"]
    assert (first["status"], second["status"]) == ("finished", "failed")
    assert [point["step"] for point in first["curve"]] == list(range(1, 401))


@pytest.mark.slow
def test_optuna_proposes_cells_and_prunes_runs(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    write_recipe(tmp_path, tiny_model, max_steps=400, eval_every=1)
    monkeypatch.chdir(tmp_path)
    vary = ["--vary", "optimizer.learning_rate=1e-5..1e-2", "--objective", "loss"]
    command = ["compare", "recipe.yaml", "--out", "out", "--set", "adapter.r=2", *vary]
    (short,) = output_of(capsys, *command, "--search", "1", "--set", "training.max_steps=2")[
        "cells"
    ]
    assert short["status"] == "finished"
    rate = float(short["settings"]["optimizer.learning_rate"])
    assert 1e-5 <= rate <= 1e-2
    study = optuna.load_study(
        study_name="loss", storage=JournalStorage(JournalFileBackend("out/study.log"))
    )
    (trial,) = study.trials
    assert trial.value == short["results"]["loss"]["value"]
    # Five that were better from the first step on: the sixth is pruned.
    for _ in range(5):
        study.add_trial(
            optuna.trial.create_trial(
                value=0.0,
                params=trial.params,
                distributions=trial.distributions,
                intermediate_values=dict.fromkeys(range(1, 401), 0.0),
            )
        )
    # The first cell has other settings now, and is not asked for again.
    write_recipe(tmp_path, tiny_model, max_steps=400, eval_every=1)
    assert exit_code(*command, "--search", "7", "-q") == 0
    _, pruned = report_of(tmp_path)["cells"]
    assert pruned["status"] == "pruned"
    assert 0 < len(pruned["curve"]) < 400
    assert study.trials[6].state == optuna.trial.TrialState.PRUNED
    # It has as many as were asked for.
    assert exit_code(*command, "--search", "7", "-q") == 0
    assert len(study.trials) == 7
    # Its trials are points of one space.
    capsys.readouterr()
    assert exit_code(*command, "--vary", "adapter.alpha=4,16", "--search", "8", "-q") == 2
    assert "the study in this folder has other" in capsys.readouterr().err
    assert len(study.trials) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "2"], "--search and --objective need each other"),
        (
            ["--search", "2", "--objective", "rouge"],
            "--objective: no measure rouge; choose from loss, ",
        ),
        (["--methods", "best"], "--methods: unknown method best; choose from "),
        (
            ["--set", "data.evaluation=null", "--set", "evaluation.forgetting=null"],
            "there is nothing",
        ),
    ],
)
def test_invalid_comparisons_are_refused_before_training(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    write_recipe(tmp_path, tiny_model)
    monkeypatch.chdir(tmp_path)
    assert exit_code("compare", "recipe.yaml", "--out", "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("out/runs").exists()
