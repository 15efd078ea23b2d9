"""Errors of the Python interface show their hint in a traceback."""

from __future__ import annotations

import pickle
import traceback

import pytest

from qlora_cli.errors import (
    DataError,
    ModelError,
    OutOfMemory,
    QloraError,
    RecipeError,
    TrainingError,
)

KINDS = [QloraError, RecipeError, DataError, ModelError, TrainingError, OutOfMemory]


@pytest.mark.parametrize("kind", KINDS)
def test_a_traceback_ends_with_the_hint(kind: type[QloraError]) -> None:
    error = kind("rows.jsonl: no such file", hint="did you mean row.jsonl?")
    assert str(error) == "rows.jsonl: no such file"
    for one in (error, pickle.loads(pickle.dumps(error))):  # as from a worker process
        assert one.hint == "did you mean row.jsonl?"
        last = "".join(traceback.format_exception(one)).splitlines()[-2:]
        assert last == [
            f"qlora_cli.errors.{kind.__name__}: rows.jsonl: no such file",
            "hint: did you mean row.jsonl?",
        ]
    without = "".join(traceback.format_exception(kind("broken")))
    assert "hint" not in without
