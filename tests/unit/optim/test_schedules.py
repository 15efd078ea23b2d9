import math
from typing import Any, get_args

import pytest
import torch
import transformers

from qlora_cli.optim.schedules import (
    Constant,
    Cosine,
    InverseRoot,
    Linear,
    Polynomial,
    ScheduleConfig,
    WarmupStableDecay,
)

CLASSES = get_args(get_args(ScheduleConfig)[0])


@pytest.mark.parametrize("config_class", CLASSES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 20])
def test_every_schedule_is_within_bounds_and_never_wastes_a_step(
    config_class, warmup_steps
) -> None:
    schedule = config_class(warmup_steps=warmup_steps)
    scales = [schedule.scale(step, 20) for step in range(20)]
    assert all(0 < scale <= 1 for scale in scales)
    assert scales[: warmup_steps + 1] == sorted(scales[: warmup_steps + 1])


@pytest.mark.parametrize("config_class", CLASSES)
def test_warmup_reaches_the_peak_at_its_last_step(config_class) -> None:
    schedule = config_class(warmup_steps=4)
    assert [schedule.scale(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_falls_in_equal_parts_and_stays_above_zero() -> None:
    scales = [Linear().scale(step, 10) for step in range(10)]
    assert scales == pytest.approx([1 - step / 10 for step in range(10)])


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_final_scale() -> None:
    schedule = Cosine(warmup_steps=10, final_scale=0.1)
    assert schedule.scale(60, 110) == pytest.approx(0.55)
    assert schedule.scale(109, 110) == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.99 * math.pi)))


def test_constant_does_not_change() -> None:
    assert {Constant().scale(step, 7) for step in range(50)} == {1.0}


STEPS, WARMUP = 50, 6

PAIRS = [
    (Constant(warmup_steps=WARMUP), "constant_with_warmup", {}),
    (Linear(warmup_steps=WARMUP), "linear", {}),
    (Cosine(warmup_steps=WARMUP), "cosine", {}),
    (Cosine(warmup_steps=WARMUP, final_scale=0.1), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    *(
        (
            WarmupStableDecay(
                warmup_steps=WARMUP, decay_share=0.3, decay=decay, final_scale=final_scale
            ),
            "warmup_stable_decay",
            {"num_decay_steps": 15, "decay_type": decay, "min_lr_ratio": final_scale},
        )
        for decay in ("linear", "cosine", "1-sqrt")
        for final_scale in (0.0, 0.2)
    ),
    (
        Polynomial(warmup_steps=WARMUP, power=3, final_scale=0.2),
        "polynomial",
        {"power": 3, "lr_end": 0.02},
    ),
    (InverseRoot(warmup_steps=WARMUP), "inverse_sqrt", {}),
    (InverseRoot(warmup_steps=WARMUP, timescale=9), "inverse_sqrt", {"timescale": 9}),
    (InverseRoot(), "inverse_sqrt", {"timescale": 10_000}),
]

TESTED_APART: dict[type[Any], str] = {}
"""Schedules that transformers does not have, and their tests."""


def test_each_schedule_is_compared_with_transformers() -> None:
    tested = {type(ours) for ours, _, _ in PAIRS} | set(TESTED_APART)
    new = [kind.__name__ for kind in CLASSES if kind not in tested]
    assert not new, (
        f"add {', '.join(new)} to PAIRS with the name that transformers has for it; without one, "
        "test some values by themselves, and name that test in TESTED_APART"
    )
    assert set(TESTED_APART.values()) <= set(globals())


@pytest.mark.parametrize(("ours", "name", "options"), PAIRS)
def test_after_warmup_each_schedule_equals_transformers(ours, name, options) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    theirs = transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=ours.warmup_steps,
        num_training_steps=STEPS,
        scheduler_specific_kwargs=options,
    )
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    scales = [ours.scale(step, STEPS) for step in range(STEPS)]
    assert scales[WARMUP:] == pytest.approx([rate / 0.1 for rate in rates[WARMUP:]], rel=1e-9)
    assert len(set(rates)) > 1
