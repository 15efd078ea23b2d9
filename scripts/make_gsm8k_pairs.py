"""Make preference pairs from GSM8K: a right solution, and the same one with an arithmetic error.

    python scripts/make_gsm8k_pairs.py GSM8K_FOLDER --output pairs

The error changes one intermediate result. All that follows from it is computed again, so the
final number is wrong, and the text stays the same apart from its numbers. The two solutions
differ in length by a few characters at most: length does not tell which one is right.

The same answers are written one by one too, each marked as good or bad, for KTO.

GSM8K_FOLDER holds `train.jsonl` and `test.jsonl`, with `question` and `answer`. Training pairs come
from the first file and held-out pairs from the second. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

Row = dict[str, str]

MAX_LENGTH_DIFFERENCE = 3
"""Characters that the rejected solution may be shorter or longer."""

TRIES = 20
"""Errors to draw for a solution before it is left out."""

CALCULATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\d)|(?<![\w.])\.\d+(?!\d)")

OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Unusable(Exception):
    """A solution, or an error in it, that does not make a pair."""


@dataclass(frozen=True)
class Calculation:
    """A calculation in a solution, such as `<<48/2=24>>`."""

    start: int
    end: int
    expression: str
    result: Fraction


def to_value(text: str) -> Fraction:
    """Read a number such as `1,200` or `.5`."""
    try:
        return Fraction(text.strip().replace(",", "").rstrip("."))
    except ValueError as error:
        raise Unusable(f"not a number: {text}") from error


def to_text(value: Fraction, like: str) -> str:
    """Write a number, with commas if `like` has any.

    Raises:
        Unusable: it is negative, or has more than two decimals.
    """
    if value < 0 or (value * 100).denominator != 1:
        raise Unusable(f"not a plain number: {value}")
    separator = "," if "," in like else ""
    if value.denominator == 1:
        return f"{value.numerator:{separator}}"
    text = f"{float(value):{separator}.2f}"
    return text.rstrip("0") if len(like.rpartition(".")[2]) != 2 else text


def evaluate(expression: str) -> Fraction:
    """Compute an expression of numbers, parentheses and + - * /."""
    try:
        return _evaluate(ast.parse(expression.replace(",", "").strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError) as error:
        raise Unusable(f"cannot be computed: {expression}") from error


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    raise Unusable("cannot be computed")


def calculations(solution: str) -> list[Calculation]:
    """Find the calculations of a solution.

    Raises:
        Unusable: it has none, one of them is wrong, or the last one is not the final answer.
    """
    body, mark, final = solution.rpartition("####")
    found = [
        Calculation(match.start(), match.end(), match[1], to_value(match[2]))
        for match in CALCULATION.finditer(body)
    ]
    if not mark or not found or found[-1].result != to_value(final):
        raise Unusable("the last calculation is not the final answer")
    if any(evaluate(one.expression) != one.result for one in found):
        raise Unusable("a calculation is wrong, or rounded")
    return found


def change(value: Fraction, random: Random) -> Fraction:
    """Return another number of as many digits: off by a little, by ten, or with one digit wrong."""
    if value.denominator != 1 or value < 2:
        raise Unusable("only whole results are changed")
    digits = str(value.numerator)
    at = random.randrange(len(digits))
    other = random.choice([d for d in "123456789" if d != digits[at]])
    wrong = random.choice(
        (
            value.numerator + random.choice((-2, -1, 1, 2)),
            value.numerator + random.choice((-10, 10)),
            int(digits[:at] + other + digits[at + 1 :]),
        )
    )
    if wrong < 1 or len(str(wrong)) != len(digits):
        raise Unusable("another number of digits")
    return Fraction(wrong)


def with_error(solution: str, place: int, wrong: Fraction) -> str:
    """Return the solution with another result at one calculation, and all that follows from it.

    Args:
        place: index of the calculation.

    Raises:
        Unusable: a number that follows is negative, no longer whole, or the same as before.
    """
    found = calculations(solution)
    changed = {found[place].result: wrong}
    if any(one.result in changed for one in found[:place]):
        raise Unusable("the result occurs earlier too")

    def renumber(text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            new = changed.get(to_value(match[0]))
            return match[0] if new is None else to_text(new, match[0])

        return NUMBER.sub(replace, text)

    pieces, last = [solution[: found[place].start]], found[place].end
    for one in found[place + 1 :]:
        # The text of this calculation, before its result is known: earlier results only.
        pieces.append(renumber(solution[last : one.start]))
        result = evaluate(renumber(one.expression))
        if result.denominator > one.result.denominator:
            raise Unusable("no longer a whole number")
        if result != one.result:
            if one.result in changed and changed[one.result] != result:
                raise Unusable("one number would become two")
            changed[one.result] = result
        last = one.end
    pieces.append(renumber(solution[last:]))
    if changed.get(found[-1].result) in (None, found[-1].result):
        raise Unusable("the final answer is still right")
    return "".join(pieces)


def as_pair(row: Row, random: Random) -> Row:
    """Make a pair from a row of GSM8K.

    Raises:
        Unusable: no error was found that changes the answer and not the length.
    """
    question, solution = row["question"].strip(), row["answer"].strip()
    given = {to_value(number) for number in NUMBER.findall(question)}
    # A result that is also a given number cannot be told from it in the text.
    places = [i for i, one in enumerate(calculations(solution)) if one.result not in given]
    right = CALCULATION.sub("", solution)
    for _ in range(TRIES if places else 0):
        place = random.choice(places)
        try:
            wrong = change(calculations(solution)[place].result, random)
            rejected = CALCULATION.sub("", with_error(solution, place, wrong))
        except Unusable:
            continue
        if abs(len(rejected) - len(right)) <= MAX_LENGTH_DIFFERENCE:
            return {"prompt": question, "chosen": right, "rejected": rejected}
    raise Unusable("no error changes the answer and not the length")


def make_pairs(rows: list[Row], number: int, random: Random) -> list[Row]:
    """Make `number` pairs from rows in random order; exit if there are too few usable rows."""
    pairs: list[Row] = []
    for row in random.sample(rows, len(rows)):
        if len(pairs) == number:
            break
        try:
            pairs.append(as_pair(row, random))
        except Unusable:
            continue
    if len(pairs) < number:
        sys.exit(f"only {len(pairs)} of {len(rows)} rows make a pair; {number} are asked for")
    return pairs


def read(path: Path) -> list[Row]:
    """Read the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_feedback(pairs: list[Row]) -> list[dict[str, str | bool]]:
    """Return the answers of pairs one by one, each marked as good or bad."""
    return [
        {"prompt": pair["prompt"], "completion": pair[answer], "label": answer == "chosen"}
        for pair in pairs
        for answer in ("chosen", "rejected")
    ]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one row per line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows written")


def main() -> None:
    """Write `train.jsonl` and `held_out.jsonl`, and the same answers one by one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gsm8k", type=Path, help="folder with train.jsonl and test.jsonl of GSM8K")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=1000, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=400, help="pairs to evaluate on")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other pairs")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    for source, name, number in (
        ("train", "train", options.train),
        ("test", "held_out", options.held_out),
    ):
        rows = read(options.gsm8k / f"{source}.jsonl")
        pairs = make_pairs(rows, number, Random(f"{name} {options.seed}"))
        write(options.output / f"{name}.jsonl", pairs)
        write(options.output / f"{name}-feedback.jsonl", as_feedback(pairs))


if __name__ == "__main__":
    main()
