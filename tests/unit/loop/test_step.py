"""A step uses only the contract of its objective, as a toy objective on pairs shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.loop.setup import Setup, assemble
from qlora_cli.loop.step import train_step
from qlora_cli.objectives.base import Objective, evaluate_objective
from qlora_cli.plan.dry_run import FixedBatches, SingleProcess
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.sections import Training
from qlora_cli.types import Batch, Example, TrainState


class PairLoss(Objective):
    """Prefer the first row of each pair to the second: -log sigmoid(margin of log p)."""

    unit: ClassVar[str] = "pairs"

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        margins = self._margins(batch)
        return -F.logsigmoid(margins).sum(), {"margin": margins.detach().sum()}

    def weight(self, batch: Batch) -> int:
        assert set(batch.links) <= {2}
        return len(batch.links)

    @torch.no_grad()
    def of_rows(self, batch: Batch) -> Tensor:
        losses = -F.logsigmoid(self._margins(batch)).double()
        return (losses / 2).repeat_interleave(2)  # half of a pair's loss for each of its rows

    def _margins(self, batch: Batch) -> Tensor:
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        chances = torch.log_softmax(logits[:, :-1].float(), -1)
        targets = batch.labels[:, 1:, None]
        scores = (chances.gather(-1, targets.clamp(min=0)) * (targets >= 0)).sum((1, 2))
        # The dummy row of a rank without rows is in no pair.
        scores = scores[: 2 * self.weight(batch)]
        return scores[0::2] - scores[1::2]  # (pairs,)


@dataclass
class TwoProcesses(SingleProcess):
    """Pretend that a second rank made the same step; count the sums over ranks."""

    sums: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.size = 2

    def sum(self, value: Tensor) -> Tensor:
        self.sums += 1
        return value * 2

    def sum_on_host(self, counts: Tensor) -> list[int]:
        return [2 * int(count) for count in counts]

    def no_sync(self, module: Any, *, last: bool) -> Any:
        return torch.enable_grad()


@pytest.fixture
def make_setup(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Setup[FixedBatches]]:
    recipe = tiny_recipe(schedule={"type": "constant"})

    def make(batches: list[Batch], world: Any = None) -> Setup[FixedBatches]:
        torch.manual_seed(0)
        options = recipe.quantization.load_options(torch.float32)
        base = recipe.model.load(options, torch.device("cpu"))
        model = recipe.adapter.attach(base)
        setup = assemble(
            recipe,
            base,
            model,
            ComputeOptions(torch.float32, "plain"),
            FixedBatches(batches),
            world or SingleProcess(),
            max_steps=2,
        )
        objective = PairLoss(model, torch.float32)
        return replace(setup, objective=objective, shared=objective)

    return make


def pairs(*indices: int) -> Batch:
    """Rows 2i and 2i + 1 of a fixed set, for each i."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 250, (8, 12), generator=generator)
    input_ids = torch.cat([rows[2 * i : 2 * i + 2] for i in indices])
    mask = torch.ones_like(input_ids)
    return Batch(input_ids, mask, input_ids.clone(), links=(2,) * len(indices))


SETTINGS = Training(batch_size=8, micro_batch_size=2)


def test_a_step_divides_by_the_weight_of_the_objective(
    make_setup: Callable[..., Setup[FixedBatches]],
) -> None:
    setup = make_setup([pairs(0, 1, 2, 3)])
    loss, sums = setup.objective(pairs(0, 1, 2, 3))
    metrics = train_step(setup, SETTINGS, TrainState())
    assert list(metrics) == ["loss", "grad_norm", "margin", "learning_rate", "pairs"]
    assert metrics["pairs"] == 4
    assert metrics["loss"] == pytest.approx(loss.item() / 4, rel=1e-6)
    assert metrics["margin"] == pytest.approx(float(sums["margin"]) / 4, rel=1e-5)
    assert train_step(setup, SETTINGS, TrainState(step=1))["loss"] < metrics["loss"]


def test_a_step_does_not_depend_on_micro_batching(
    make_setup: Callable[..., Setup[FixedBatches]],
) -> None:
    whole = train_step(make_setup([pairs(0, 1, 2, 3)]), SETTINGS, TrainState())
    cut = [pairs(0), pairs(1, 2), pairs(3)]
    assert train_step(make_setup(cut), SETTINGS, TrainState()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_sampler_keeps_pairs_together_for_the_objective(
    make_setup: Callable[..., Any], micro_batch_size: int
) -> None:
    stream = BatchStream(
        [
            Example([7 * i + n for n in range(5 + i)], [7 * i + n for n in range(5 + i)], i % 2 > 0)
            for i in range(8)
        ],
        batch_size=4,
        micro_batch_size=micro_batch_size,
        seed=0,
        epochs=None,
        pad_token_id=0,
    )
    setup = replace(make_setup([]), batches=stream)
    whole = [setup.objective(batch) for batch in stream.micro_batches(0)]
    metrics = train_step(setup, SETTINGS, TrainState())
    assert len(whole) == 4 // micro_batch_size
    assert metrics["pairs"] == 4
    assert metrics["loss"] == pytest.approx(sum(loss.item() for loss, _ in whole) / 4, rel=1e-6)


def test_metrics_are_added_up_over_ranks_with_the_loss(
    make_setup: Callable[..., Setup[FixedBatches]],
) -> None:
    alone = train_step(make_setup([pairs(0, 1)]), SETTINGS, TrainState())
    world = TwoProcesses()
    both = train_step(make_setup([pairs(0, 1)], world), SETTINGS, TrainState())
    assert world.sums == 1  # one exchange, and one wait of the host
    assert both["pairs"] == 2 * alone["pairs"]
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert both["margin"] == pytest.approx(alone["margin"], rel=1e-6)


def test_an_evaluation_uses_the_weight_too(
    make_setup: Callable[..., Setup[FixedBatches]],
) -> None:
    objective = make_setup([]).objective
    found = evaluate_objective(objective, [pairs(0, 1), pairs(2)], torch.device("cpu"))
    assert found["loss"] == pytest.approx(objective(pairs(0, 1, 2))[0].item() / 3, rel=1e-5)


def test_the_recipe_chooses_the_objective(tiny_recipe: Callable[..., Recipe]) -> None:
    assert tiny_recipe().objective.type == "supervised"
    assert tiny_recipe(objective={"type": "supervised"}) == tiny_recipe()
    with pytest.raises(ValidationError, match="objective"):
        tiny_recipe(objective={"type": "telepathy"})
