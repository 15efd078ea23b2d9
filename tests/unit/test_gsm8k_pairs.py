"""Check the pairs made from GSM8K: one error, everything after it follows, and no other cue."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Scripts are not a package; they import each other from the folder that they are started in.
sys.path.insert(0, str(SCRIPTS))

import make_gsm8k_pairs as pairs  # noqa: E402  # found by the path above

SHELVES = (
    "There are 4 x 30 = <<4*30=120>>120 books on the shelves.\n"
    "With the 1,100 in boxes, she has 120 + 1,100 = <<120+1100=1220>>1,220 books.\n"
    "She sells half of the 1,220, so 1,220/2 = <<1220/2=610>>610 are left.\n"
    "#### 610"
)


@pytest.mark.parametrize(
    ("place", "wrong", "expected"),
    [
        (
            0,
            150,
            "There are 4 x 30 = 150 books on the shelves.\n"
            "With the 1,100 in boxes, she has 150 + 1,100 = 1,250 books.\n"
            "She sells half of the 1,250, so 1,250/2 = 625 are left.\n#### 625",
        ),
        (
            1,
            1240,
            "There are 4 x 30 = 120 books on the shelves.\n"
            "With the 1,100 in boxes, she has 120 + 1,100 = 1,240 books.\n"
            "She sells half of the 1,240, so 1,240/2 = 620 are left.\n#### 620",
        ),
        (
            2,
            611,
            "There are 4 x 30 = 120 books on the shelves.\n"
            "With the 1,100 in boxes, she has 120 + 1,100 = 1,220 books.\n"
            "She sells half of the 1,220, so 1,220/2 = 611 are left.\n#### 611",
        ),
    ],
)
def test_an_error_changes_all_that_follows_from_it(place: int, wrong: int, expected: str) -> None:
    found = pairs.with_error(SHELVES, place, Fraction(wrong))
    assert pairs.CALCULATION.sub("", found) == expected


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (1, 1221, "no longer a whole number"),
        (2, 610, "the final answer is still right"),
    ],
)
def test_an_error_that_shows_or_changes_nothing_is_refused(
    place: int, wrong: int, said: str
) -> None:
    with pytest.raises(pairs.Unusable, match=said):
        pairs.with_error(SHELVES, place, Fraction(wrong))


@pytest.mark.parametrize(
    ("solution", "said"),
    [
        ("No sums here.\n#### 3", "the last calculation is not the final answer"),
        ("2+2 = <<2+2=4>>4\n#### 5", "the last calculation is not the final answer"),
        ("2+2 = <<2+2=5>>5\n#### 5", "a calculation is wrong, or rounded"),
        ("10/3 = <<10/3=3.33>>3.33\n#### 3.33", "a calculation is wrong, or rounded"),
        ("x = <<x+1=5>>5\n#### 5", "cannot be computed"),
        ("1/0 = <<1/0=5>>5\n#### 5", "cannot be computed"),
        ("2+2 = <<2+2=4>>4", "the last calculation is not the final answer"),
        ("2+2 = <<2+2=4>>4\n#### four", "not a number"),
    ],
)
def test_a_solution_that_cannot_be_computed_again_is_left_out(solution: str, said: str) -> None:
    with pytest.raises(pairs.Unusable, match=said):
        pairs.calculations(solution)


def test_a_result_that_is_also_a_given_number_is_not_changed() -> None:
    row = {"question": "Is 120 more than 610, or 1,220?", "answer": SHELVES}
    with pytest.raises(pairs.Unusable, match="no error changes the answer"):
        pairs.as_pair(row, Random(0))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("He had 24, then 1,200 and 1,200.50.", ["24", "1,200", "1,200.50"]),
        ("$48/2 = 24.", ["48", "2", "24"]),
        (".5 of 2.5 at 20%", [".5", "2.5", "20"]),
        ("room A4, 10ml x3", ["10"]),
    ],
)
def test_numbers_are_found_in_prose(text: str, numbers: list[str]) -> None:
    assert pairs.NUMBER.findall(text) == numbers


def make_rows(number: int) -> list[pairs.Row]:
    """Make rows in the words of GSM8K, and one in seven that cannot be used."""
    return [
        {
            "question": f"A shop has boxes of {count} pens. How many pens are in 7 and 5 boxes?",
            "answer": (
                f"7 boxes hold 7*{count} = <<7*{count}={7 * count}>>{7 * count} pens.\n"
                f"5 boxes hold 5*{count} = <<5*{count}={5 * count}>>{5 * count} pens.\n"
                f"Together {7 * count}+{5 * count} = <<{7 * count}+{5 * count}={12 * count}>>"
                f"{12 * count} pens.\n#### {12 * count if count % 7 else 0}"
            ),
        }
        for count in range(20, 20 + number)
    ]


def write(folder: Path, name: str, rows: list[pairs.Row]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["make_gsm8k_pairs.py", *map(str, arguments)])
    pairs.main()


def test_pairs_differ_in_their_numbers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "gsm8k", "train.jsonl", make_rows(40))
    write(tmp_path / "gsm8k", "test.jsonl", make_rows(20))
    sizes = "--train", 20, "--held-out", 10
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        output = "--output", tmp_path / name, "--seed", seed
        run(monkeypatch, tmp_path / "gsm8k", *output, *sizes)

    rows = pairs.read(tmp_path / "one/train.jsonl")
    assert len(rows) == 20
    assert len(pairs.read(tmp_path / "one/held_out.jsonl")) == 10
    answers = {row["question"]: row["answer"] for row in make_rows(40)}
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        assert chosen == pairs.CALCULATION.sub("", answers[row["prompt"]])
        assert pairs.NUMBER.sub("#", chosen) == pairs.NUMBER.sub("#", rejected)
        assert abs(len(chosen) - len(rejected)) <= pairs.MAX_LENGTH_DIFFERENCE
        assert chosen.rpartition("#### ")[2] != rejected.rpartition("#### ")[2]
    feedback = pairs.read(tmp_path / "one/train-feedback.jsonl")
    assert [row["completion"] for row in feedback] == [
        row[answer] for row in rows for answer in ("chosen", "rejected")
    ]
    assert [row["label"] for row in feedback] == [True, False] * 20
    for file in ("train.jsonl", "held_out.jsonl"):
        first = (tmp_path / "one" / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == first
        assert (tmp_path / "other" / file).read_bytes() != first


def test_too_few_usable_rows_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "gsm8k", "train.jsonl", make_rows(7))
    with pytest.raises(SystemExit, match="only 6 of 7 rows make a pair; 8 are asked for"):
        run(monkeypatch, tmp_path / "gsm8k", "--output", tmp_path / "out", "--train", 8)
