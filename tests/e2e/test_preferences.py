"""Train on pairs and on feedback, through the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import exit_code, mostly_slow, output_of
from tests.e2e.test_bad_numbers import ODD, damaged_base

Run = Callable[..., list[dict[str, Any]]]


def write_pairs(path: Path, number: int = 12) -> None:
    """Write pairs of uneven length."""
    rows = [
        {
            "prompt": f"Say {'a ' * (at % 5)}number",
            "chosen": f"{at} is one" + " and more" * (at % 3),
            "rejected": "no " * (1 + at % 4),
        }
        for at in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_feedback(path: Path, number: int = 12) -> None:
    """Write good and bad answers of uneven length."""
    rows = [
        {
            "prompt": f"Say {'a ' * (at % 5)}number",
            "completion": f"{at} is one" + " and more" * (at % 3),
            "label": at % 3 > 0,
        }
        for at in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(write_recipe: Callable[..., Path], tmp_path: Path) -> Run:
    """Train on pairs or on feedback, and return the lines of metrics.jsonl."""
    write_pairs(tmp_path / "pairs.jsonl")
    write_feedback(tmp_path / "feedback.jsonl")

    def train(name: str, *, code: int = 0, options: tuple[str, ...] = (), **sections: Any) -> Any:
        is_feedback = sections.get("objective", {}).get("type") == "kto"
        file, kind = ("feedback", "feedback") if is_feedback else ("pairs", "preference")
        source = {"path": str(tmp_path / f"{file}.jsonl"), "format": {"type": kind}}
        training = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
        recipe = write_recipe(
            objective=sections.pop("objective", {"type": "dpo"}),
            data={"train": source, "evaluation": source, **sections.pop("data", {})},
            training=training | sections.pop("training", {}),
            output={"dir": str(tmp_path / name)},
            **sections,
        )
        assert exit_code("train", recipe, *options) == code
        if code:
            return []
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return train


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Return the training losses."""
    return [line["loss"] for line in lines if "loss" in line]


def test_before_the_first_step_model_and_reference_are_one(run: Run) -> None:
    first, *_, last = run("run", adapter={"type": "lora", "dropout": 0.1})
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (first["eval_accuracy"], first["eval_margin"]) == (0.5, 0.0)
    assert last["eval_loss"] != first["eval_loss"]
    assert {"eval_logp_chosen", "eval_logp_rejected", "eval_kl"} <= last.keys()


TIMED = ("tokens_per_second", "peak_memory_bytes")

PAIR_OBJECTIVES: list[dict[str, Any]] = [
    {"type": "dpo"},
    {"type": "dpo", "loss": "hinge"},
    {"type": "dpo", "loss": "ipo", "sft_weight": 0.5},
    {"type": "dpo", "label_smoothing": 0.1, "ld_alpha": 0.5},
    {"type": "orpo"},
    {"type": "simpo"},
]
OBJECTIVES = [*PAIR_OBJECTIVES, {"type": "kto", "desirable_weight": 0.7}]


def name_of(objective: dict[str, Any]) -> str:
    """Name an objective by its settings."""
    return "-".join(str(value) for value in objective.values())


@pytest.mark.parametrize(
    "objective", mostly_slow(OBJECTIVES, OBJECTIVES[0], OBJECTIVES[-1]), ids=name_of
)
def test_a_step_does_not_depend_on_how_it_is_cut(run: Run, objective: dict[str, Any]) -> None:
    cuts: dict[str, dict[str, Any]] = {
        "4x1": {"training": {"micro_batch_size": 1}},
        "2x2": {"training": {"micro_batch_size": 2}},
        "1x4": {"training": {"micro_batch_size": 4}},
        "padded": {"model": {"attention": "eager"}},
    }
    found = {name: run(name, objective=objective, **cut) for name, cut in cuts.items()}
    wanted = losses(found.pop("4x1"))
    for lines in found.values():
        assert losses(lines) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_packed_rows_have_the_losses_of_separate_ones(run: Run, kind: str) -> None:
    one_row = {"batch_size": 1, "micro_batch_size": 1}
    if kind == "kto":  # which needs steps of several rows: each holds three examples
        one_row = {"batch_size": 4, "micro_batch_size": 1}
    packing = {"packing": True, "max_length": 200 if kind == "kto" else 2048}
    packed = run("packed", objective={"type": kind}, data=packing, training=one_row)
    all_rows = {"batch_size": 12, "micro_batch_size": 12}
    apart = run("apart", objective={"type": kind}, training=all_rows)
    if kind == "dpo":
        assert losses(packed) == pytest.approx(losses(apart), rel=1e-5)
    else:  # the answers of other rows are others
        assert packed[0]["eval_loss"] == pytest.approx(apart[0]["eval_loss"], rel=1e-5)
        assert all(math.isfinite(loss) for loss in losses(packed))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_precomputed_reference_is_the_live_one_to_the_last_bit(
    run: Run, tmp_path: Path, kind: str
) -> None:
    found = {}
    for mode in ("live", "precomputed"):
        for _ in range(2):  # the second run takes what the first one kept
            name = f"{mode}{len(found)}"
            objective = {"type": kind, "reference": mode}
            run(name, objective=objective, training={"max_steps": 6}, adapter={"dropout": 0.1})
            weights = (tmp_path / name / "last" / "adapter_model.safetensors").read_bytes()
            lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            values = [json.loads(line) for line in lines]
            known = [{k: v for k, v in one.items() if k not in TIMED} for one in values]
            found[name] = weights, known
    wanted = found.pop("live0")
    assert all(one == wanted for one in found.values())


@pytest.mark.parametrize("mode", ["live", "precomputed"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_resumed_run_repeats_the_whole_one(
    run: Run, tmp_path: Path, kind: str, mode: str
) -> None:
    settings: dict[str, Any] = {"objective": {"type": kind, "reference": mode}}
    whole = run("whole", training={"max_steps": 4, "save_every": 2}, **settings)
    run("cut", training={"max_steps": 4, "save_every": 2}, **settings)
    resumed = run(
        "cut",
        training={"max_steps": 4, "save_every": 2},
        options=("--resume", "2"),
        **settings,
    )
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    files = [tmp_path / name / "last" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_pairs_are_trained_on_quantized_bases(run: Run, quantization: str) -> None:
    lines = run("run", quantization={"type": quantization}, training={"precision": "bf16"})
    assert lines[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert len(losses(lines)) == 3


def test_full_training_computes_its_reference_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    lines = run("run", adapter={"type": "full"})
    assert lines[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert "reference: 48 rows computed" in caplog.text


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "dpo"},
        {"type": "dpo", "ld_alpha": 0.3, "sft_weight": 0.2},
        {"type": "simpo"},
        {"type": "kto"},
    ],
    ids=name_of,
)
def test_an_evaluation_repeats_the_last_figures_of_the_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: dict[str, Any]
) -> None:
    *_, last = run("run", objective=objective)
    report = output_of(capsys, "eval", tmp_path / "run")
    tuned, base = report["models"]["tuned"], report["models"]["base"]
    for name, key in {
        "loss": "loss",
        "accuracy": "loss.accuracy",
        "margin": "loss.margin",
    }.items():
        assert tuned[key]["value"] == pytest.approx(last[f"eval_{name}"], rel=1e-5, abs=1e-6)
    if objective == {"type": "dpo"}:
        assert base["loss"]["value"] == pytest.approx(math.log(2), abs=1e-7)
        assert base["loss.accuracy"]["value"] == 0.5
    low = report["differences"]["loss.margin"]["low"]
    assert low is not None


def test_after_a_warm_start_the_reference_is_base_and_adapter(
    run: Run,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    supervised = write_recipe(output={"dir": str(tmp_path / "sft")})
    assert exit_code("train", supervised) == 0
    adapter = {"init_from": str(tmp_path / "sft")}
    whole = run("dpo", adapter=adapter, training={"save_every": 2})
    assert whole[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    tuned = output_of(capsys, "eval", tmp_path / "dpo")["models"]["tuned"]
    assert tuned["loss.margin"]["value"] == pytest.approx(whole[-1]["eval_margin"], rel=1e-4)
    resumed = run("dpo", adapter=adapter, training={"save_every": 2}, options=("--resume", "2"))
    assert losses(resumed)[-1] == losses(whole)[-1]


def test_the_best_weights_are_chosen_by_the_accuracy_of_pairs(run: Run, tmp_path: Path) -> None:
    settings = {"training": {"eval_every": 1}, "evaluation": {"best_by": "accuracy"}}
    lines = run("run", **settings)
    best = max(line["eval_accuracy"] for line in lines[1:] if "eval_accuracy" in line)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["best"]["by"] == "accuracy"
    assert record["best"]["value"] == best


def test_feedback_needs_steps_of_several_rows(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"batch_size": 1, "micro_batch_size": 1}
    with pytest.raises(ValueError, match=r"batch_size .1. is too small for objective.type .kto"):
        run("run", objective={"type": "kto"}, training=one)


def test_feedback_takes_odd_steps_and_a_last_step_of_one_row(run: Run) -> None:
    odd = {"batch_size": 11, "micro_batch_size": 11, "max_steps": None, "epochs": 1}
    lines = run("run", objective={"type": "kto"}, training=odd)
    assert len(losses(lines)) == 2
    assert all(math.isfinite(loss) for loss in losses(lines))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_evaluation_set_may_have_one_row(run: Run, tmp_path: Path, kind: str) -> None:
    (write_feedback if kind == "kto" else write_pairs)(tmp_path / "one.jsonl", 1)
    source = {
        "path": str(tmp_path / "one.jsonl"),
        "format": {"type": "feedback" if kind == "kto" else "preference"},
    }
    lines = run("run", objective={"type": kind}, data={"evaluation": source})
    assert math.isfinite(lines[-1]["eval_loss"])


def test_rows_of_another_kind_are_refused_by_name(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", objective={"type": "supervised"}, code=2)
    said = capsys.readouterr().err
    assert "format.type (preference) reads pairs of a chosen and a rejected answer" in said
    assert "objective: {type: dpo}" in said


@pytest.mark.parametrize(
    "objective", mostly_slow(OBJECTIVES, OBJECTIVES[0], OBJECTIVES[-1]), ids=name_of
)
def test_a_nan_in_an_answer_is_not_applied_and_its_row_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: dict[str, Any]
) -> None:
    kind = "feedback" if objective["type"] == "kto" else "pairs"
    rows = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
    rows[4]["completion" if kind == "feedback" else "rejected"] += ODD
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {
        "path": str(bad),
        "format": {"type": "feedback" if kind == "feedback" else "preference"},
    }
    lines = run(
        "run",
        objective=objective,
        model={"path": str(damaged_base(tmp_path))},
        data={"train": source, "evaluation": None},
        training={"max_steps": 3, "batch_size": 4, "micro_batch_size": 4},
    )
    assert sum(line["loss"] is None for line in lines if "loss" in line) == 1
    named = capsys.readouterr().err.split("not applied; rows: ")[1].splitlines()[0]
    assert f"{bad}:5" in named
    saved = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_falling_chosen_answers_are_warned_of_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run("run", objective={"type": "dpo", "max_fall": 1e-3}, training={"max_steps": 6})
    said = [line for line in caplog.messages if "nats less likely than at the start" in line]
    rising = "eval_logp_chosen"
    assert len(said) <= 1
    lines = run("again", objective={"type": "simpo", "max_fall": 1e-3, "gamma": 5.0})
    fell = any(line[rising] < lines[0][rising] - 1e-3 for line in lines if rising in line)
    assert fell == any("nats less likely" in line for line in caplog.messages[len(said) :])


@pytest.mark.slow
@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[-1]], ids=name_of)
def test_two_ranks_equal_one_rank(run: Run, tmp_path: Path, objective: dict[str, Any]) -> None:
    # 12 rows in steps of 5: the last step is short, and one rank has fewer rows in it.
    steps = {"batch_size": 5, "micro_batch_size": 1, "max_steps": None, "epochs": 1}
    alone = run("run", objective=objective, training=steps)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_addr", "127.0.0.1", "--master_port", "0", "--standalone",
        "-m", "qlora_cli", "train", str(tmp_path / "recipe.yaml"),
        "--set", f"output.dir={tmp_path / 'two'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "two" / "metrics.jsonl").read_text(encoding="utf-8")
    together = [json.loads(line) for line in text.splitlines()]
    for name in ("loss", "eval_loss", "accuracy", "margin"):
        expected = [line[name] for line in alone if name in line]
        assert expected
        found = [line[name] for line in together if name in line]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_objectives_are_compared_on_the_same_pairs(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", training={"max_steps": 1})
    report = output_of(
        capsys, "compare", tmp_path / "recipe.yaml", "--out", tmp_path / "compared",
        "--vary", "objective.type=dpo,orpo,simpo",
    )  # fmt: skip
    assert [cell["status"] for cell in report["cells"]] == ["finished"] * 3
    assert all("loss.likelier" in cell["results"] for cell in report["cells"])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_micro_batch_is_chosen_and_a_plan_made_to_fit(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run("run", objective={"type": kind}, training={"micro_batch_size": "auto"})
    recorded = (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    assert "micro_batch_size: 4" in recorded
    report = output_of(capsys, "plan", tmp_path / "recipe.yaml", "--fit", "--device", "24GiB")
    assert report["fits"]["verdict"] == "yes"
    kinds = report["peak"]["kinds"]
    assert kinds["reference weights"] == kinds["trained weights"]
