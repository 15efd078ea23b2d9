"""Test what an estimate takes from the device and the length of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_cli.distributed.devices import find_target
from qlora_cli.errors import RecipeError
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP
from qlora_cli.plan.estimate import predict_kernels, trace_recipe
from qlora_cli.plan.plan import plan
from qlora_cli.plan.report import MatmulRate
from qlora_cli.plan.rows import assume_rows
from qlora_cli.plan.text import plan_text
from qlora_cli.plan.trace.memory_counter import (
    ADAPTER,
    BUCKETS,
    GRADIENTS,
)
from qlora_cli.recipe.schema import Recipe


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_several_devices_hold_gradient_buckets(
    tiny_recipe: Callable[..., Recipe], micro_batch_size: int
) -> None:
    """In place of the gradients, once the last micro-batch of a step has some."""
    settings = {"batch_size": 8, "micro_batch_size": micro_batch_size}
    recipe = tiny_recipe(adapter={"type": "full"}, training=settings)
    config, _ = recipe.model.read_config()
    target = find_target("T4", 2)
    rows = assume_rows(recipe, "a test", padding_free=False)
    rows = replace(rows, steps=[[rows.steps[0][0]] * (4 // micro_batch_size)])
    alone = trace_recipe(recipe, config, replace(target, number=1), rows).peaks
    shared = trace_recipe(recipe, config, target, rows).peaks
    assert shared.keys() == alone.keys()
    for segment, peak in shared.items():
        before = alone[segment]
        assert peak.total == sum(peak.kinds.values())
        if segment.stage not in (FIRST, STEP, EVALUATION):
            assert peak == before
            continue
        assert peak.kinds[BUCKETS] == peak.kinds[ADAPTER]
        if segment.part == "update":
            assert peak.total == before.total
        elif micro_batch_size == 2:
            assert peak.total == before.total + peak.kinds[BUCKETS]
        elif segment.part == "backward":
            assert peak.total <= before.total + peak.kinds[BUCKETS]
            assert peak.kinds[GRADIENTS] == 0


def test_predicted_kernels_depend_on_the_length_of_the_run(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_cli.kernels.selection.has_compiler", lambda _: True)
    recipe = tiny_recipe()
    config, _ = recipe.model.read_config()
    target = find_target("cpu")
    rows = assume_rows(recipe, "a test", padding_free=True)

    def kernels(tokens: int | None, wanted: str = "auto") -> str:
        one = tiny_recipe(training={"kernels": wanted})
        return predict_kernels(one, config, target, replace(rows, tokens=tokens))

    assert kernels(1000) == "fused"
    assert kernels(10**12) == "compiled"
    assert kernels(None) == "fused"
    assert kernels(10**12, "plain") == "plain"
    assert kernels(1, "compiled") == "compiled"


def test_explicit_bf16_is_refused_for_a_card_without_it(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(training={"precision": "bf16"})
    with pytest.raises(RecipeError, match="bf16 is not available on T4"):
        plan(recipe, device="T4")
    assert plan(recipe, device="A10").fits.verdict == "yes"


def test_duration_is_bounded_by_compute_and_bandwidth(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    def seconds(size: int) -> tuple[float, float]:
        recipe = tiny_recipe(
            model={"path": "meta-llama/Llama-3.2-1B"},
            data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 8},
            training={"batch_size": 8, "micro_batch_size": size, "max_steps": 10},
            quantization={"type": "none"},
        )
        report = plan(recipe, device="H100")
        assert report.rate == MatmulRate(flops=989e12, used=(0.15, 0.45), is_measured=False)
        assert "15% to 45% of" in plan_text(report)
        assert report.seconds_of_training is not None
        return report.seconds_of_training

    # Rows of eight tokens are little to compute: the weights are read once more for each.
    for one, two in zip(seconds(1), seconds(2), strict=True):
        assert one == pytest.approx(2 * two)


@pytest.mark.parametrize(
    ("device", "gpus", "train", "steps", "said"),
    [
        ("H100", 1, "nowhere.jsonl", None, "\n10,000,000 tokens take about "),
        ("H100", 1, "rows.jsonl", None, "\n10,000,000 tokens take about "),
        ("A100", 4, "nowhere.jsonl", None, "\n10,000,000 tokens take about "),
        ("H100", 1, "nowhere.jsonl", 1, "; training takes under a second, at"),
        ("H100", 1, "nowhere.jsonl", 20_000, "; training takes about"),
        ("24GiB", 1, "nowhere.jsonl", None, None),
        ("24GiB", 1, "nowhere.jsonl", 20, None),
    ],
)
def test_a_known_card_has_a_duration_and_a_speed(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    device: str,
    gpus: int,
    train: str,
    steps: int | None,
    said: str | None,
) -> None:
    recipe = tiny_recipe(
        model={"path": "meta-llama/Llama-3.2-1B"},
        data={"train": {"path": str(tmp_path / train)}, "evaluation": None},
        training={"max_steps": steps},
    )
    report = plan(recipe, device=device, gpus=gpus)
    assert (report.tokens_per_second is None) == (said is None)
    assert "tokens per second" in plan_text(report) or said is None
    assert (said or "FLOP") in plan_text(report)
    assert (
        '; for the duration, name a card, such as --device "RTX 4090"' in plan_text(report)
    ) == (said is None)
    assert " 0 s" not in plan_text(report)
    for width, is_joined in ((96, False), (97, True), (192, True)):
        rows = replace(report.rows, micro_batches=[[(1, width), (2, 90)]], longest=96)
        line = f"1 x {width}, 2 x 90 tokens ({'rows joined without padding, ' * is_joined}from "
        assert line in plan_text(replace(report, rows=rows))
    if report.tokens_per_second and report.seconds_of_training:
        slow, fast = report.tokens_per_second
        assert report.rows.tokens is not None
        assert report.seconds_of_training == pytest.approx(
            (report.rows.tokens / fast, report.rows.tokens / slow)
        )
