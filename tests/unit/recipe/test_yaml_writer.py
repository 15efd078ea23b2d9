from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import yaml

from qlora_cli.recipe.yaml_parser import Mapping, Scalar, parse_tree
from qlora_cli.recipe.yaml_writer import yaml_lines


def written(values: dict[str, Any]) -> str:
    return "".join(f"{line}\n" for line, _ in yaml_lines(values))


def test_the_written_layout_is_stable() -> None:
    values = {
        "a": {"b": 1, "c": [1, "x y"], "d": {}, "e": []},
        "f": [{"type": "g", "h": {"i": None}}, {"type": "j"}],
        "k": True,
    }
    text = """\
a:
  b: 1
  c: [1, x y]
  d: {}
  e: []
f:
  - type: g
    h:
      i: null
  - type: j
k: true
"""
    assert written(values) == text
    assert yaml.safe_load(text) == values


def test_each_leaf_knows_its_key() -> None:
    lines = list(yaml_lines({"a": {"b": [1, 2]}, "c": [{"d": 1}]}))
    assert lines == [
        ("a:", None),
        ("  b: [1, 2]", ("a", "b")),
        ("c:", None),
        ("  - d: 1", ("c", 0, "d")),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '"', "", " ", "no", "NO", "null", "~", "1", "1_0", "0x1", "1e5", ".inf", ".nan", "-", "- a",
        "a: b", "a #b", "#", "a:", "[a]", "{a", "*a", "&a", "!a", "|", ">", "%a", "@a", "`a", "'",
        "a\nb", "\ta", "a\\b", "a ", "é", "😀", "\u2028", "\x85", "\x07", "\ufeff", "\xa0", "?",
        "---", "...", "2024-01-01", "1:30", "=", "<<", "a,b", "org/model-1.5B", "/x/y.jsonl",
        "runs/a b (2)", "on", "none", "y", "? a",
    ],
)  # fmt: skip
def test_every_text_is_read_back_by_us_and_by_other_readers(text: str) -> None:
    line = written({"key": text, text: ["x", text]})
    assert line.count("\n") == 2
    assert yaml.safe_load(line) == {"key": text, text: ["x", text]}
    root = parse_tree(line, "r.yaml").root
    assert isinstance(root, Mapping)
    node = root.entries["key"].node
    assert isinstance(node, Scalar)
    assert node.text == text
    assert not node.is_null


def test_random_text_is_read_back() -> None:
    rng = random.Random(0)
    alphabet = "ab1 :#-'\"\\,[]{}&*!|>%@`~\n\t\x85\u2028\xa0é😀"
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
        assert yaml.safe_load(written({"key": text})) == {"key": text}


@pytest.mark.parametrize("value", [0.0, 1e-8, 2e-4, 1e16, 1e300, -1.5, 0.1, sys.float_info.min])
def test_written_numbers_are_numbers_in_yaml_1_1(value: float) -> None:
    read = yaml.safe_load(written({"key": value}))["key"]
    assert isinstance(read, float)
    assert read == value
