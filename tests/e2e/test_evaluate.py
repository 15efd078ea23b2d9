"""`qlora eval`, and tasks during training, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import exit_code, output_of, save_tiny_model

TASKS = [
    {"type": "exact_match"},
    {"type": "chrf", "name": "near"},
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_base_and_tuned_are_measured_with_intervals_and_their_answers_are_kept(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(evaluation={"tasks": TASKS, "max_new_tokens": 8})
    assert exit_code("train", recipe) == 0
    report = output_of(capsys, "eval", run)
    assert list(report["measures"]) == ["loss", "loss.perplexity", "exact_match", "near"]
    loss = report["differences"]["loss"]
    base, tuned = (report["models"][name]["loss"]["value"] for name in ("base", "tuned"))
    assert loss["value"] == pytest.approx(tuned - base)
    assert loss["low"] <= loss["value"] <= loss["high"] < 0
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"] == report

    records = lines(run / "answers.jsonl")
    assert [record["task"] for record in records] == (
        ["loss"] * 6 + ["exact_match"] * 6 + ["near"] * 6
    )
    record = records[12]
    assert set(record) == {"task", "row", "prompt", "reference", "models"}
    assert "say ab 1" in record["prompt"]
    assert record["reference"] == "ab"
    assert record["row"].endswith("rows.jsonl:1")
    assert set(record["models"]) == {"base", "tuned"}
    assert set(record["models"]["tuned"]) == {"answer", "chrf"}
    # Both tasks saw the same answers.
    assert record["models"]["tuned"]["answer"] == records[6]["models"]["tuned"]["answer"]
    # The figure is that of the records.
    scores = [one["models"]["tuned"]["exact_match"] for one in records[6:12]]
    assert report["models"]["tuned"]["exact_match"]["value"] == sum(scores) / 6


def test_the_table_shows_every_measure(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", write_recipe()) == 0
    capsys.readouterr()
    assert exit_code("eval", tmp_path / "run") == 0
    head, names, loss, perplexity = capsys.readouterr().out.splitlines()
    assert "95% intervals" in head
    assert names.split() == ["n", "base", "tuned", "tuned", "-", "base"]
    assert loss.startswith("loss ")
    assert loss.endswith("better")
    assert perplexity.startswith("loss.perplexity ")


@pytest.mark.slow
def test_two_models_are_compared_on_the_same_examples(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = {"tasks": TASKS[:1], "max_new_tokens": 4}
    for name, steps in (("short", 1), ("long", 6)):
        recipe = write_recipe(
            training={"max_steps": steps},
            evaluation=evaluation,
            output={"dir": str(tmp_path / name)},
        )
        assert exit_code("train", recipe) == 0
    short, long = tmp_path / "short", tmp_path / "long"
    alone = output_of(capsys, "eval", short)["models"]["tuned"]
    both = output_of(capsys, "eval", long, "--compare", short)
    assert list(both["models"]) == ["short", "long"]
    assert both["models"]["short"] == alone
    assert both["differences"]["loss"]["value"] < 0
    assert not (long / "answers.jsonl").exists(), "a comparison is kept where it is asked for"

    assert exit_code("merge", long, "--output", tmp_path / "merged") == 0
    records = tmp_path / "kept" / "records.jsonl"
    merged = output_of(capsys, "eval", long, "--compare", tmp_path / "merged", "--records", records)
    assert list(merged["models"]) == ["merged", "long"]
    assert merged["differences"]["loss"]["value"] == pytest.approx(0, abs=1e-4)
    assert merged["records"] == str(records)
    assert {record["task"] for record in lines(records)} == {"loss", "exact_match"}

    # The same run twice: nothing is different, and names tell them apart.
    again = tmp_path / "elsewhere" / "long"
    shutil.copytree(long, again)
    same = output_of(capsys, "eval", long, "--compare", again)
    assert list(same["models"]) == [str(again), str(long)]
    assert same["differences"]["loss"] == {"value": 0, "low": 0, "high": 0}


def test_per_token_measures_are_compared_only_between_equal_tokenizers(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from tests.conftest import make_tokenizer, save_tiny_model

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the cat and the hat"}\n{"text": "the end"}\n', encoding="utf-8")
    task = {"type": "perplexity", "data": {"path": str(text)}, "window": 64, "stride": 32}
    recipe = write_recipe(evaluation={"tasks": [task]})
    for name in ("bytes", "words"):
        tokenizer = make_tokenizer()
        if name == "words":
            tokenizer.add_tokens(["the", "and"])
        save_tiny_model(tmp_path / name, vocab_size=264)
        tokenizer.save_pretrained(tmp_path / name)
    compared = [tmp_path / "bytes", "--compare", tmp_path / "words", "--recipe", recipe]
    found = output_of(capsys, "eval", *compared, "--tasks", "perplexity")
    assert set(found["measures"]) == {"perplexity", "perplexity.bits_per_byte"}
    assert list(found["differences"]) == ["perplexity.bits_per_byte"]
    assert all(set(measures) == set(found["measures"]) for measures in found["models"].values())
    assert "different tokenizers" in caplog.text


def test_tasks_are_chosen_by_name_or_type(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(evaluation={"tasks": TASKS, "max_new_tokens": 4, "limit": 2})
    report = output_of(capsys, "eval", recipe, "--tasks", "near")
    assert list(report["models"]) == ["base"]
    assert list(report["measures"]) == ["near"]
    assert report["measures"]["near"]["n"] == 2
    assert report["differences"] == {}
    report = output_of(capsys, "eval", recipe, "--tasks", "rouge,loss")
    assert list(report["measures"]) == ["rouge", "loss", "loss.perplexity"]
    assert report["measures"]["loss"]["n"] == 6, "the limit is for questions alone"

    assert exit_code("eval", recipe, "--tasks", "rough") == 2
    assert "unknown task rough; the recipe has loss, exact_match, near" in capsys.readouterr().err


def test_greedy_answers_do_not_depend_on_the_batch(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(evaluation={"tasks": TASKS[:1], "max_new_tokens": 12})
    kept = []
    for size in (1, 2, 5):
        records = tmp_path / f"{size}.jsonl"
        output_of(
            capsys, "eval", recipe, "--tasks", "exact_match", "--records", records,
            "--set", f"evaluation.generation_batch_size={size}",
        )  # fmt: skip
        kept.append(records.read_bytes())
    assert kept[0] == kept[1] == kept[2]


def test_the_loss_does_not_depend_on_the_batch(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe()
    found = [
        output_of(capsys, "eval", recipe, "--set", f"evaluation.batch_size={size}")["models"]
        for size in (1, 2, 6)
    ]
    for models in found[1:]:
        assert models["base"]["loss"]["value"] == pytest.approx(
            found[0]["base"]["loss"]["value"], abs=1e-6
        )


def test_paths_that_cannot_be_evaluated_are_explained(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error(*arguments: object) -> str:
        capsys.readouterr()
        assert exit_code("eval", *arguments) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "holds neither a run nor a model (found: nothing)" in error(tmp_path / "empty")
    assert "no such file or folder" in error(tmp_path / "nowhere")
    found = error(tiny_model)
    assert "is a model folder, which has no evaluation data or tasks" in found
    assert "--recipe" in found

    recipe = write_recipe()
    assert "already has evaluation data and tasks" in error(recipe, "--recipe", recipe)

    # A run that died in its first steps.
    recipe = write_recipe(optimizer={"learning_rate": 1e30})
    assert exit_code("train", recipe) == 4
    found = error(tmp_path / "run")
    assert "the run ended before its first checkpoint" in found
    assert "--resume" not in found

    recipe = write_recipe(data={"evaluation": None})
    assert "there is nothing to evaluate" in error(recipe)
    assert "exact_match needs data.evaluation" in error(recipe, "--tasks", "exact_match")


def test_a_run_without_held_out_rows_is_not_sent_to_eval(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", write_recipe(data={"evaluation": None})) == 0
    assert "next: qlora merge" in capsys.readouterr().out
    assert "qlora eval" not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_result_worse_than_the_base_is_reported(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsure = save_tiny_model(tmp_path / "unsure", initializer_range=0.02)
    sections = {"model": {"path": str(unsure)}, "training": {"max_steps": 2}}
    assert exit_code("train", write_recipe(**sections, optimizer={"learning_rate": 1.0})) == 0
    capsys.readouterr()
    assert exit_code("eval", tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert "loss: tuned is worse than base" in shown.err
    assert "worse" in shown.out


def test_tasks_run_during_training_only_if_tasks_every_is_set(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """They also do not change the training."""
    logged = {}
    for name, training in (("never", {}), ("often", {"tasks_every": 2})):
        recipe = write_recipe(
            training={"max_steps": 5, "eval_every": 3, **training},
            adapter={"dropout": 0.1},
            evaluation={"tasks": TASKS, "max_new_tokens": 4},
            output={"dir": str(tmp_path / name)},
        )
        assert exit_code("train", recipe) == 0
        logged[name] = lines(tmp_path / name / "metrics.jsonl")
    asked = {
        name: [row["step"] for row in rows if "eval_near" in row] for name, rows in logged.items()
    }
    assert asked == {"never": [], "often": [0, 2, 4, 5]}
    curves = [[row["loss"] for row in rows if "loss" in row] for rows in logged.values()]
    assert curves[0] == curves[1]


def test_best_by_selects_the_best_weights(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        training={"max_steps": 6, "tasks_every": 2},
        evaluation={"tasks": TASKS, "max_new_tokens": 8, "best_by": "near"},
    )
    record = output_of(capsys, "train", recipe)
    values = {
        row["step"]: row["eval_near"]
        for row in lines(tmp_path / "run" / "metrics.jsonl")
        if row.get("step") and "eval_near" in row
    }
    best = max(values.values())
    assert record["best"]["by"] == "near"
    assert record["best"]["value"] == best
    assert record["best"]["step"] == next(step for step, value in values.items() if value == best)
    measured = output_of(capsys, "eval", tmp_path / "run", "--weights", "best", "--tasks", "near")
    assert measured["models"]["tuned"]["near"]["value"] == pytest.approx(best)


@pytest.mark.parametrize("settings", [{}, {"packing": True}])
def test_a_task_on_rows_of_its_own_is_enough(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
) -> None:
    """The answers during training (packed or not) and after it are the same."""
    data = {"path": str(tmp_path / "rows.jsonl"), "limit": 5}
    recipe = write_recipe(
        data={"evaluation": None, **settings},
        quantization={"type": "nf4"},
        training={"tasks_every": 2},
        evaluation={
            "tasks": [{"type": "chrf", "name": "own", "data": data}],
            "best_by": "own",
            "max_new_tokens": 6,
        },
    )
    record = output_of(capsys, "train", recipe)
    assert record["tasks"] == ["own"]
    assert record["best"]["by"] == "own"
    logged = [
        row["eval_own"]
        for row in lines(tmp_path / "run" / "metrics.jsonl")[1:]
        if "eval_own" in row
    ]
    report = output_of(capsys, "eval", tmp_path / "run")
    assert list(report["measures"]) == ["own"]
    assert report["measures"]["own"]["n"] == 5
    assert report["models"]["tuned"]["own"]["value"] == pytest.approx(logged[-1])


def stopping(write_recipe: Callable[..., Path], run: Path, **training: Any) -> Path:
    """A run that gets worse from the start: the held-out rows contradict the training rows."""
    held_out = run.parent / "other.jsonl"
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "QXZ" * 5}]
    held_out.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    return write_recipe(
        data={"evaluation": {"path": str(held_out)}},
        optimizer={"learning_rate": 3e-2},
        schedule={"type": "constant"},
        training={"max_steps": 30, "eval_every": 2, "patience": 2, "save_every": 3, **training},
        output={"dir": str(run), "keep_checkpoints": 20},
    )


def test_a_run_without_progress_stops_early_and_resumes_to_the_same_end(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    record = output_of(capsys, "train", stopping(write_recipe, whole))
    assert record["status"] == "finished"
    assert record["steps"] == record["best"]["step"] + 4 < 30
    rows = lines(whole / "metrics.jsonl")
    assert rows[-1]["step"] == record["steps"]
    assert (whole / "last").is_dir()
    assert (whole / "checkpoints" / f"step-{record['steps']:08d}").is_dir()

    # As after a kill between the best evaluation and the end.
    parts = tmp_path / "parts"
    recipe = stopping(write_recipe, parts)
    assert exit_code("train", recipe) == 0
    for path in (parts / "checkpoints").glob("step-*"):
        if path.name > f"step-{record['best']['step'] + 1:08d}":
            shutil.rmtree(path)
    assert any((parts / "checkpoints").iterdir())
    resumed = output_of(capsys, "train", recipe, "--resume", "auto")
    assert resumed["steps"] == record["steps"]
    assert resumed["best"] == record["best"]
    name = "best/adapter_model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()

    # With more patience it resumes from where it stopped.
    more = output_of(capsys, "train", recipe, "--resume", "auto", "--set", "training.patience=3")
    assert more["steps"] == record["best"]["step"] + 6


def test_best_by_cannot_change_on_resume(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        training={"max_steps": 2, "tasks_every": 2},
        evaluation={"tasks": TASKS, "max_new_tokens": 2},
    )
    assert exit_code("train", recipe) == 0
    assert exit_code("train", recipe, "--resume", "auto", "--set", "evaluation.best_by=near") == 2
    assert "evaluation.best_by: loss -> near" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"patience": 2}}, r"training\.patience \(2\) counts evaluations"),
        (
            {"training": {"patience": 2, "eval_every": 1}, "data": {"evaluation": None}},
            r"needs the loss on data\.evaluation, which is missing",
        ),
        ({"evaluation": {"best_by": "near"}}, r"not a measure of any task; it takes one of loss"),
        (
            {"evaluation": {"best_by": "near", "tasks": TASKS}},
            r"best_by \(near\) needs training\.tasks_every",
        ),
    ],
)
def test_settings_without_effect_are_refused(
    tiny_recipe: Callable[..., Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_recipe(**sections)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "general.txt"
    lines = [f"The river number {n} runs to the sea, and the sea is not full." for n in range(40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.quick_every(2)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_forgetting_is_measured_where_general_text_is_named(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
) -> None:
    recipe = write_recipe(
        adapter={"type": adapter},
        optimizer={"learning_rate": 3e-2 if adapter == "lora" else 3e-3},
        evaluation={"forgetting": {"path": str(text), "window": 64, "max_windows": 12}},
    )
    assert exit_code("train", recipe) == 0
    report = output_of(capsys, "eval", tmp_path / "run")
    assert list(report["measures"]) == [
        "loss", "loss.perplexity", "forgetting.perplexity", "kl",
    ]  # fmt: skip
    assert report["measures"]["forgetting.perplexity"]["n"] == 12
    base, tuned = report["models"]["base"], report["models"]["tuned"]
    assert base["kl"]["value"] == 0
    assert tuned["kl"]["value"] > tuned["kl"]["low"] > 0
    assert tuned["forgetting.perplexity"]["value"] != base["forgetting.perplexity"]["value"]

    # KL needs a base: a recipe does not compare with one, two runs do.
    assert "kl" not in output_of(capsys, "eval", recipe)["measures"]
    again = output_of(capsys, "eval", tmp_path / "run", "--compare", tmp_path / "run")
    assert again["models"][str(tmp_path / "run")]["kl"] == tuned["kl"]


def test_forgetting_is_warned_of(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A base that knows the general text, and is then taught something else."""
    rows = {"path": str(text), "format": {"type": "text"}}
    data = {"train": rows, "evaluation": None, "max_length": 96}
    knows = write_recipe(
        data=data,
        adapter={"type": "full"},
        optimizer={"learning_rate": 1e-2},
        training={"max_steps": 30},
        output={"dir": str(tmp_path / "first")},
    )
    assert exit_code("train", knows) == 0
    assert exit_code("merge", tmp_path / "first", "--output", tmp_path / "knows") == 0
    recipe = write_recipe(
        model={"path": str(tmp_path / "knows")},
        optimizer={"learning_rate": 5e-2},
        training={"max_steps": 10},
        evaluation={"forgetting": {"path": str(text), "window": 64}},
    )
    assert exit_code("train", recipe) == 0
    capsys.readouterr()
    assert exit_code("eval", tmp_path / "run", "--tasks", "forgetting") == 0
    shown = capsys.readouterr()
    assert "forgetting.perplexity: tuned is worse than base" in shown.err
    assert "lost some of what the base could do" in shown.err
    assert shown.out.rstrip().endswith("worse")


def test_too_little_general_text_is_refused_before_a_model_is_measured(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Not much.", encoding="utf-8")
    recipe = write_recipe(evaluation={"forgetting": {"path": str(short)}})
    assert exit_code("eval", recipe) == 2
    assert "has 9 tokens, which is less than two windows of 512" in capsys.readouterr().err


def test_tasks_by_likelihood_are_asked_in_training_and_of_the_run(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = tmp_path / "choices.jsonl"
    row = {"question": "say ab 1", "choices": ["ab", "cd"], "answer": 0, "text": "ab ab ab"}
    choices.write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    own = {"path": str(choices)}
    tasks = [
        {"type": "multiple_choice", "data": own},
        {"type": "classification"},
        {"type": "perplexity", "data": own},
    ]
    recipe = write_recipe(
        evaluation={"tasks": tasks, "best_by": "classification.macro_f1"},
        training={"tasks_every": 2},
    )
    assert exit_code("train", recipe) == 0
    report = output_of(capsys, "eval", tmp_path / "run")
    assert list(report["measures"]) == [
        "loss", "loss.perplexity", "multiple_choice", "multiple_choice.normalized",
        "classification", "classification.macro_f1", "perplexity", "perplexity.bits_per_byte",
    ]  # fmt: skip
    assert [report["measures"][name]["n"] for name in list(report["measures"])[2::2]] == [3, 6, 3]
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    asked = [line for line in metrics if "eval_classification.macro_f1" in line]
    last = asked[-1]["eval_classification.macro_f1"]
    tuned = report["models"]["tuned"]
    assert tuned["classification.macro_f1"]["value"] == pytest.approx(last)
    record = lines(tmp_path / "run" / "answers.jsonl")[6]["models"]["tuned"]
    assert set(record) == {"answer", "multiple_choice", "normalized"}
