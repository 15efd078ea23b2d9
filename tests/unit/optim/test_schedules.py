import math
from typing import get_args

import pytest

from qlora_cli.optim.schedules import Constant, Cosine, Linear, ScheduleConfig

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
def test_warmup_reaches_the_full_rate_at_its_last_step(config_class) -> None:
    schedule = config_class(warmup_steps=4)
    assert [schedule.scale(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_falls_in_equal_parts_to_one_above_zero() -> None:
    scales = [Linear().scale(step, 10) for step in range(10)]
    assert scales == pytest.approx([1 - step / 10 for step in range(10)])


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_final_scale() -> None:
    schedule = Cosine(warmup_steps=10, final_scale=0.1)
    assert schedule.scale(60, 110) == pytest.approx(0.55)
    assert schedule.scale(109, 110) == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.99 * math.pi)))


def test_constant_stays() -> None:
    assert {Constant().scale(step, 7) for step in range(50)} == {1.0}
