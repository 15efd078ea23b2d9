"""Tasks that score what the model writes."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qlora_cli.errors import DataError, RecipeError
from qlora_cli.evaluate.bootstrap import value_columns
from qlora_cli.tasks import ChrF, ExactMatch, Numeric, Rouge
from qlora_cli.tasks.numeric import last_number
from qlora_cli.tasks.task import Outcome


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42.", "42"),
        ("The total is $1,234.50", "1234.5"),
        ("#### -3", "-3"),
        ("7 - 3 = 4", "4"),
        ("10-3", "3"),
        ("(-3)", "-3"),
        ("-$5", "-5"),
        ("it is −7", "-7"),
        ("1,234,567", "1234567"),
        ("1, 2", "2"),
        ("12,34", "34"),
        ("0.5", "0.5"),
        (".5", "0.5"),
        ("18.00 dollars", "18"),
        ("7%", "7"),
        ("in 2 boxes of 3", "3"),
        ("5,000,00", "0"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


def test_a_text_without_a_number_has_no_last_number() -> None:
    assert last_number("none at all.") is None
    assert last_number("") is None


def test_numeric_on_gsm8k() -> None:
    reference = "He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7"
    task = Numeric()
    assert task.score(reference, "3 + 4 is 7.0") == 1
    assert task.score(reference, "7 apples, not 8") == 0
    assert task.score(reference, "many") == 0
    marked = Numeric(pattern=r"#### (.+)")
    assert marked.score(reference, "so\n#### 7\nand 8") == 1
    assert marked.score(reference, "7") == 0
    assert marked.score("7", "#### 7") == 1
    with pytest.raises(DataError, match="needs a number in each reference"):
        task.score("seven", "7")


def test_numeric_tolerance() -> None:
    assert Numeric(tolerance=0.01).score("3.14", "3.15") == 1
    assert Numeric(tolerance=0.01).score("3.14", "3.16") == 0


@pytest.mark.parametrize(
    ("settings", "answer", "score"),
    [
        ({}, "new york", 0),
        ({"ignore_case": True}, "new york", 1),
        ({"ignore_punctuation": True}, "New York.", 1),
        ({"ignore_space": True}, " New\n  York ", 1),
        ({"anywhere": True}, "It is New York, I think", 1),
        ({"anywhere": True}, "It is York", 0),
        ({"pattern": r"Answer: (.*)"}, "Answer: Paris\nAnswer: New York\nDone.", 1),
        ({"pattern": r"Answer: (.*)"}, "New York", 0),
        ({"pattern": r"New \w+"}, "I say New York.", 1),
    ],
)
def test_exact_match_options(settings: dict[str, Any], answer: str, score: float) -> None:
    assert ExactMatch(**settings).score("New York", answer) == score


def test_a_reference_that_normalizes_to_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"the reference '\?!' is empty without what"):
        ExactMatch(ignore_punctuation=True, anywhere=True).score("?!", "whatever")


def test_an_invalid_pattern_is_refused_when_the_recipe_is_read(
    tiny_recipe: Callable[..., Any],
) -> None:
    with pytest.raises(ValidationError, match=r"'\(' is not a regular expression"):
        tiny_recipe(evaluation={"tasks": [{"type": "numeric", "pattern": "("}]})


def test_rouge_agrees_with_its_library() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    reference, answer = "the cats sat on the mat", "a cat sat on mats"
    for variant in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        for stem in (False, True):
            expected = RougeScorer([variant], use_stemmer=stem).score(reference, answer)[variant]
            assert Rouge(variant=variant, stem=stem).score(reference, answer) == expected.fmeasure
    # Longest common sequence "sat on": 2 of 5 and 2 of 6 words.
    assert Rouge().score(reference, answer) == pytest.approx(2 * 2 / (5 + 6))


def test_rouge_refuses_a_script_that_it_cannot_read() -> None:
    with pytest.raises(DataError, match="finds no word"):
        Rouge().score("Привет", "Привет")


PAIRS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("Привет, мир", "Привет мир"),
    ("a", ""),
    ("", "something"),
    ("exactly the same", "exactly the same"),
]


@pytest.mark.parametrize("settings", [{}, {"word_order": 2}, {"ignore_case": True}])
def test_chrf_agrees_with_sacrebleu(settings: dict[str, Any]) -> None:
    """Compare the score of each answer, and of all answers together."""
    from sacrebleu.metrics.chrf import CHRF

    task = ChrF(**settings)
    library = CHRF(6, task.word_order, lowercase=task.ignore_case)
    outcomes = [Outcome("", "", r, a, task.values(r, a)) for r, a in PAIRS]
    for outcome in outcomes:
        expected = library.sentence_score(outcome.answer, [outcome.reference]).score
        assert 100 * outcome.values["chrf"] == pytest.approx(expected)
    [measure] = task.measures()
    found = measure.aggregate(value_columns(outcomes))
    expected = library.corpus_score([a for _, a in PAIRS], [[r for r, _ in PAIRS]]).score
    assert 100 * float(found) == pytest.approx(expected)
    # The same for each of several resamples at once.
    rows = np.array([[0, 0, 1, 1, 4], [0, 1, 2, 3, 4]])
    both = measure.aggregate(
        {name: column[rows] for name, column in value_columns(outcomes).items()}
    )
    assert both[1] == pytest.approx(float(found))


def test_chrf_is_zero_without_common_ngrams() -> None:
    task = ChrF()
    [measure] = task.measures()
    outcome = Outcome("", "", "a", "", task.values("a", ""))
    assert measure.aggregate(value_columns([outcome])) == 0


@pytest.mark.parametrize(
    ("task", "module", "package"),
    [
        (Rouge(), "rouge_score.rouge_scorer", "rouge-score"),
        (ChrF(), "sacrebleu.metrics.chrf", "sacrebleu"),
    ],
)
def test_a_library_that_is_missing_is_named_with_what_to_install(
    task: Any, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from qlora_cli.tasks.chrf import _library
    from qlora_cli.tasks.rouge import _scorer

    for cached in (_library, _scorer):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=package) as caught:
        task.score("a", "a")
    assert caught.value.hint == 'pip install "qlora[scores]"'
