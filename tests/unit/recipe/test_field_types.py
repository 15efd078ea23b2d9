from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from qlora_cli.common.config import Config
from qlora_cli.recipe.field_types import FieldType, part_type


class Red(Config):
    type: Literal["red"] = "red"
    depth: int = 1


class Blue(Config):
    type: Literal["blue"] = "blue"


class Sample(Config):
    whole: int = Field(1, ge=1, lt=2**53)
    number: float = Field(0.5, gt=0, le=1)
    truth: bool = False
    text: str = ""
    name: str = Field("x", min_length=1)
    choice: Literal["a", "b"] = "a"
    maybe: int | None = Field(None, ge=1)
    either: int | str = 1
    targets: Literal["all"] | list[str] | str = "all"
    ranks: dict[str, Annotated[int, Field(ge=2)]] = Field({})
    colour: Annotated[Red | Blue, Field(discriminator="type")] = Red()
    colours: list[Annotated[Red | Blue, Field(discriminator="type")]] = Field([], min_length=1)
    maybe_red: Red | None = None


def of(name: str) -> FieldType:
    return FieldType.of(Sample.model_fields[name])


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("whole", "16", 16),
        ("whole", "1_000", 1000),
        ("whole", "1e3", 1000),
        ("whole", "2.0", 2),
        ("whole", "+7", 7),
        ("whole", "007", 7),
        ("whole", "9007199254740991", 2**53 - 1),
        ("number", "2e-4", 2e-4),
        ("number", "1E-5", 1e-5),
        ("number", ".5", 0.5),
        ("number", "1.", 1.0),
        ("number", "1", 1.0),
        ("truth", "true", True),
        ("truth", "No", False),
        ("truth", "OFF", False),
        ("text", "no", "no"),
        ("text", "123", "123"),
        ("text", "1e5", "1e5"),
        ("choice", "b", "b"),
        ("maybe", "3", 3),
        ("either", "5", 5),
        ("either", "five", "five"),
        ("targets", "all", "all"),
        ("targets", ".*_proj", ".*_proj"),
    ],
)
def test_plain_text_takes_the_type_of_its_field(field: str, text: str, expected: object) -> None:
    value = of(field).read(text, plain=True)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("whole", "0"),
        ("whole", "9007199254740992"),
        ("whole", "1.5"),
        ("whole", "1e-3"),
        ("whole", "x"),
        ("whole", "0x10"),
        ("whole", "1__0"),
        ("whole", "_1"),
        ("whole", "true"),
        ("whole", "9" * 5000),
        ("whole", "٣"),
        ("number", "0"),
        ("number", "1.1"),
        ("number", ".nan"),
        ("number", "nan"),
        ("number", "inf"),
        ("number", "-.inf"),
        ("number", "1e999"),
        ("number", "1:30"),
        ("number", "1,5"),
        ("truth", "1"),
        ("truth", "y"),
        ("truth", "tRUE"),
        ("choice", "A"),
        ("choice", "c"),
        ("name", ""),
    ],
)
def test_other_text_is_refused(field: str, text: str) -> None:
    assert of(field).read(text, plain=True) is None


@pytest.mark.parametrize(("field", "text"), [("whole", "1"), ("number", "0.5"), ("truth", "true")])
def test_quoted_text_is_no_number(field: str, text: str) -> None:
    assert of(field).read(text, plain=False) is None


@pytest.mark.parametrize(("field", "text"), [("text", "1"), ("choice", "a"), ("either", "1")])
def test_quoted_text_is_text(field: str, text: str) -> None:
    assert of(field).read(text, plain=False) == text


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("whole", "a whole number (at least 1, below 9007199254740992)"),
        ("number", "a number (above 0, at most 1)"),
        ("truth", "true or false"),
        ("text", "text"),
        ("name", "text (length at least 1)"),
        ("choice", "one of a, b"),
        ("maybe", "a whole number (at least 1), or null"),
        ("either", "a whole number, or text"),
        ("targets", "all, or text, or a list (of text)"),
        ("ranks", "a mapping (of names to a whole number (at least 2))"),
        ("colour", "a section with a type, one of red, blue"),
        ("colours", "a list (of a section with a type, one of red, blue) (length at least 1)"),
        ("maybe_red", "a section with the keys type, depth, or null"),
    ],
)
def test_words(field: str, words: str) -> None:
    assert of(field).words() == words


def test_variants_are_told_apart_by_type() -> None:
    assert of("colour").variants == {"red": Red, "blue": Blue}
    assert of("maybe_red").variants == {}
    assert part_type(Blue) == "blue"


def test_length_of_a_list() -> None:
    assert of("colours").within_bounds([Red()])
    assert not of("colours").within_bounds([])
