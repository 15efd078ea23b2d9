from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from qlora_cli.common.config import Config
from qlora_cli.recipe.field_types import FieldType, type_names
from qlora_cli.recipe.validation import validate_tree
from qlora_cli.recipe.yaml_parser import Mapping, parse_tree


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
    colours: list[Annotated[Red | Blue, Field(discriminator="type")]] = Field([Red()], min_length=1)
    maybe_red: Red | None = None
    auto: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    several: Red | list[Red] = Red()


def of(name: str) -> FieldType:
    return FieldType.of(Sample.model_fields[name])


def read(text: str) -> object:
    """Return the value of the one key in a YAML text; raise ValueError with the problems."""
    root = parse_tree(text, "sample.yaml").root
    assert isinstance(root, Mapping)
    result = validate_tree(Sample, root, other_names={})
    if result.config is None:
        raise ValueError("\n".join(map(str, result.problems)))
    (name,) = root.entries
    return getattr(result.config, name)


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
    value = read(f"{field}: {text}")
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
        ("name", "''"),
    ],
)
def test_other_text_is_refused(field: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: found .*; it takes "):
        read(f"{field}: {text}")


@pytest.mark.parametrize(("field", "text"), [("whole", "1"), ("number", "0.5"), ("truth", "true")])
def test_quoted_text_is_not_a_number(field: str, text: str) -> None:
    with pytest.raises(ValueError, match="the quotes make it text, so remove them"):
        read(f"{field}: '{text}'")


@pytest.mark.parametrize(("field", "text"), [("text", "1"), ("choice", "a"), ("either", "1")])
def test_quoted_text_is_text(field: str, text: str) -> None:
    assert read(f"{field}: '{text}'") == text


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
        ("auto", "auto, or a whole number (at least 1)"),
    ],
)
def test_a_field_type_is_described_in_words(field: str, words: str) -> None:
    assert of(field).words() == words


def test_variants_are_distinguished_by_type() -> None:
    assert of("colour").variants == {"red": Red, "blue": Blue}
    assert of("maybe_red").variants == {}
    assert type_names(Blue) == ("blue",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colours: []", "colours: found a list; it takes a list (of a section with a type, "),
        ("ranks: {a: 1}", "ranks.a: found 1; it takes a whole number (at least 2)"),
        ("auto: 0", "auto: found 0; it takes auto, or a whole number (at least 1)"),
        ("auto: [0]", "auto: found a list; it takes auto, or a whole number (at least 1)"),
        ("several: [{}, {depth: x}]", 'several[1].depth: found "x"; it takes a whole number'),
        ("several: {depth: x}", 'several.depth: found "x"; it takes a whole number'),
        ("several: {red: 1}", 'several.red: Red has no "red"; it takes type, depth'),
        ("colour: {type: red, red: {depth: 1}}", 'colour.red: Red has no "red"'),
        ("colour: red", 'colour: found "red"; it takes a section with a type, one of red, blue; '),
    ],
)
def test_pydantic_errors_become_one_message_with_the_path_in_the_file(
    text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=r"^sample\.yaml:") as error:
        read(text)
    (line,) = str(error.value).splitlines()
    assert message in line


def test_several_alternatives_accept_each_form() -> None:
    assert read("auto: auto") == "auto"
    assert read("auto: 2") == 2
    assert read("several: {depth: 2}") == Red(depth=2)
    assert read("several: [{depth: 2}, {}]") == [Red(depth=2), Red()]


def test_a_secret_is_reported_whatever_else_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match=r"^sample\.yaml:1:8  whole: holds a token") as error:
        read(f"whole: hf_{'a' * 20}")
    assert "\n" not in str(error.value)
