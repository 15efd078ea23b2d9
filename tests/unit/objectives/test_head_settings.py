"""Labels of rows, and settings of heads."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_cli.errors import DataError
from qlora_cli.objectives import Classify, Reward
from qlora_cli.types import Conversation

LABELS = ["no", "maybe", "yes"]


def values(objective: Any, label: Any) -> tuple[float, ...]:
    found: tuple[float, ...] = objective.values_of(Conversation([], label=label))
    return found


@pytest.mark.parametrize(
    ("label", "index"), [("no", 0), ("yes", 2), (0, 0), (2, 2), (2.0, 2), ("1", 1)]
)
def test_a_label_is_a_name_or_an_index(label: Any, index: int) -> None:
    assert values(Classify(labels=LABELS), label) == (index,)


def test_a_number_that_is_a_name_is_not_an_index() -> None:
    assert values(Classify(labels=["2", "1", "0"]), 0) == (2,)
    assert values(Classify(labels=["false", "true"]), True) == (1,)


@pytest.mark.parametrize("label", ["No", "", 3, -1, 0.5, True, None, ("no",), float("nan"), "3"])
def test_another_label_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match="label: "):
        values(Classify(labels=LABELS), label)


@pytest.mark.parametrize(
    ("label", "found"),
    [((), (0, 0, 0)), (("yes", "no"), (1, 0, 1)), ("maybe", (0, 1, 0)), (("2",), (0, 0, 1))],
)
def test_a_row_has_any_number_of_labels(label: Any, found: tuple[float, ...]) -> None:
    assert values(Classify(labels=LABELS, problem="multi"), label) == found


@pytest.mark.parametrize(("label", "number"), [(1, 1.0), (-2.5, -2.5), ("0.25", 0.25)])
def test_a_number_is_read(label: Any, number: float) -> None:
    assert values(Classify(problem="regression"), label) == (number,)


@pytest.mark.parametrize("label", ["high", True, None, (), float("inf")])
def test_what_is_not_a_number_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"label: .* not a (finite )?number"):
        values(Classify(problem="regression"), label)


def test_a_pair_has_a_margin() -> None:
    assert Reward().values_of(Conversation([], margin=1.5)) == (1.5,)
    assert Reward().values_of(Conversation([])) == (0.0,)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "labels: 0 given; problem single needs at least 2"),
        ({"labels": ["a"]}, "labels: 1 given; problem single needs at least 2"),
        ({"labels": [], "problem": "multi"}, "problem multi needs at least 1"),
        ({"labels": ["a", "a"]}, "labels: 'a' is there twice"),
        ({"labels": ["a", ""]}, "labels: one of them is empty"),
        ({"labels": ["a", "b"], "problem": "regression"}, "predicts one number"),
        ({"labels": ["a", "b"], "class_weights": {"c": 1}}, "'c' is not one of labels"),
        ({"labels": ["a", "b"], "class_weights": {"a": 0}}, "'a' has 0; it takes a number above"),
        (
            {"problem": "regression", "class_weights": {"v": 2}},
            "class_weights: a number has no class",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        Classify(**settings)
