"""Try some inputs of the fuzzer, and check that it notices faults. See `python -m tests.fuzz`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from qlora_cli.errors import RecipeError
from tests.fuzz import KINDS, HangError, Kind, deadline, fuzz

INPUTS = 25


@pytest.mark.parametrize("name", KINDS)
def test_no_input_ends_in_a_traceback_a_hang_or_a_write_elsewhere(
    tmp_path: Path, name: str
) -> None:
    outcome = fuzz(KINDS[name](tmp_path), INPUTS, number=0)
    assert outcome.counts.total() == INPUTS
    assert outcome.counts["read"] < INPUTS


@pytest.mark.parametrize("name", KINDS)
def test_valid_inputs_are_read(tmp_path: Path, name: str) -> None:
    kind = KINDS[name](tmp_path)
    for whole in kind.whole():
        kind.empty_folder()
        kind.attempt(whole)


class _Numbers(Kind):
    def whole(self) -> list[Any]:
        return [0]

    def inputs(self) -> st.SearchStrategy[Any]:
        return st.integers(0, 100)

    def attempt(self, drawn: Any) -> None:
        if drawn > 50:
            raise RecipeError("a number too large")


class _Traceback(_Numbers):
    def attempt(self, drawn: Any) -> None:
        if drawn > 90:
            raise KeyError("a bug")


class _WritesElsewhere(_Numbers):
    def attempt(self, drawn: Any) -> None:
        if drawn > 90:
            (self.root / "elsewhere").write_text("x", encoding="utf-8")


def test_the_fuzzer_counts(tmp_path: Path) -> None:
    counts = fuzz(_Numbers(tmp_path), 100, number=0).counts
    assert counts["read"] > 0
    assert counts["RecipeError"] > 0


@pytest.mark.parametrize(
    ("kind", "error"), [(_Traceback, KeyError), (_WritesElsewhere, AssertionError)]
)
def test_the_fuzzer_notices(tmp_path: Path, kind: type[Kind], error: type[Exception]) -> None:
    with pytest.raises(error):
        fuzz(kind(tmp_path), 200, number=0)


def test_the_fuzzer_notices_a_hang() -> None:
    with pytest.raises(HangError), deadline(0.05):
        time.sleep(5)
