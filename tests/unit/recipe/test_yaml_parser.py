from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from qlora_cli.recipe.yaml_parser import (
    MAX_BYTES,
    MAX_DEPTH,
    Items,
    Mapping,
    Node,
    Scalar,
    SourcePosition,
    dotted,
    parse_tree,
    read_tree,
)


def plain(node: Node | None) -> object:
    """The tree without its places."""
    if isinstance(node, Mapping):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, Items):
        return [plain(item) for item in node.nodes]
    assert isinstance(node, Scalar)
    return None if node.is_null else node.text


def problem(text: str) -> str:
    """The one problem of a text."""
    (found,) = parse_tree(text, "r.yaml").problems
    return str(found)


def test_scalars_stay_text() -> None:
    tree = parse_tree("a: 1e-5\nb: no\nc: [0x10, 'x', ~]\nd: {e: 2024-01-01}\n1: null\n", "r.yaml")
    assert tree.problems == ()
    expected = {"a": "1e-5", "b": "no", "c": ["0x10", "x", None], "d": {"e": "2024-01-01"}}
    assert plain(tree.root) == {**expected, "1": None}


def test_lines_and_columns_count_from_one() -> None:
    root = parse_tree("a: 1\nb:\n  - x\n  -  y\n", "r.yaml").root
    assert isinstance(root, Mapping)
    items = root.entries["b"].node
    assert isinstance(items, Items)
    assert root.entries["b"].place == SourcePosition("r.yaml", 2, 1)
    assert items.nodes[1].place == SourcePosition("r.yaml", 4, 6)
    assert str(items.nodes[1].place) == "r.yaml:4:6"


def test_quotes_and_blocks_are_not_plain() -> None:
    root = parse_tree("a: 'null'\nb: |-\n  5\nc: null\n", "r.yaml").root
    assert isinstance(root, Mapping)
    nodes = [entry.node for entry in root.entries.values()]
    assert [isinstance(node, Scalar) and node.plain for node in nodes] == [False, False, True]
    assert [isinstance(node, Scalar) and node.is_null for node in nodes] == [False, False, True]


def test_aliases_are_expanded_at_their_own_place() -> None:
    root = parse_tree("a: &x {b: [1, 2]}\nc: *x\n", "r.yaml").root
    assert plain(root) == {"a": {"b": ["1", "2"]}, "c": {"b": ["1", "2"]}}
    assert isinstance(root, Mapping)
    assert root.entries["c"].node.place == SourcePosition("r.yaml", 2, 4)


def test_aliases_cannot_grow_without_bound() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 10000 values" in problem("\n".join(lines))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3:1  a: is given twice, first in line 1"),
        ("a:\n  b: {c: 1, c: 2}\n", "r.yaml:2:13  a.b.c: is given twice, first in line 2"),
        ("- {x: 1, x: 1}\n", "r.yaml:1:10  [0].x: is given twice, first in line 1"),
        ("a: 1\n<<: {b: 2}\n", 'r.yaml:2:1  merge keys ("<<") are not supported'),
        ("a: !!python/object/apply:os.system [x]\n", "r.yaml:1:4  a: the tag !!python/object/"),
        ("a: !!int 5\n", "r.yaml:1:4  a: the tag !!int is not allowed"),
        ("? [a]\n: 1\n", "r.yaml:1:3  a key must be text"),
        ("a:\n  ~: 1\n", "r.yaml:2:3  a: a key must be text"),
        ("a: {{ x }}\n", 'a key must be text (text that begins with "{" needs quotes: "{{ x }}")'),
        ("a: *b\n", 'r.yaml:1:4  the alias "*b" has no complete anchor'),
        ("a: &b [*b]\n", 'r.yaml:1:8  the alias "*b" has no complete anchor'),
        ("a:\n\tb: 1\n", "r.yaml:2:1  not valid YAML: a tab"),
        ("a: [1, 2\n", "r.yaml:2:1  not valid YAML: a comma is missing"),
        ("a: 'x\n", "r.yaml:2:1  not valid YAML: a quote or bracket is never"),
        ("a: b: c\n", 'r.yaml:1:5  not valid YAML: unexpected ":": check'),
        ("a: 1\n  b: 2\n", 'r.yaml:2:4  not valid YAML: unexpected ":": check'),
        ("a: 1\nb\nc: 1\n", "r.yaml:3:1  not valid YAML: this line is not"),
        ("- a\nb: 1\n", "r.yaml:2:1  not valid YAML: unexpected line: check its"),
        ("a: @b\n", "r.yaml:1:4  not valid YAML: text that begins with this character"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1  a second document begins here"),
        ("a: \x07\n", "r.yaml:1:4  the character U+0007 is not allowed in YAML"),
        ('a: "\\0"\n', "r.yaml:1:4  a: contains a character that files"),
        ('a: "\\ud800"\n', "r.yaml:1:4  a: contains a character that files"),
        ("[" * 1000, f"r.yaml:1:{MAX_DEPTH + 2}  nested more than {MAX_DEPTH} deep"),
        ("[" * 200_000, "nested more than"),
    ],
)
def test_mistakes_that_yaml_accepts_are_reported(text: str, expected: str) -> None:
    assert expected in problem(text)


def test_all_problems_of_a_tree_are_found() -> None:
    tree = parse_tree("a: 1\na: 2\nb: !x 1\nc: {d: 1, d: 2}\n", "r.yaml")
    assert [p.place.line for p in tree.problems] == [2, 3, 4]
    assert tree.root is not None


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_utf8_is_read_with_or_without_a_mark(tmp_path: Path, mark: bytes) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(mark + "a: Grüße 😀\r\nb: 1\r\n".encode())
    tree = read_tree(file, "r.yaml")
    assert plain(tree.root) == {"a": "Grüße 😀", "b": "1"}
    assert isinstance(tree.root, Mapping)
    assert tree.root.entries["a"].place == SourcePosition("r.yaml", 1, 1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a: 1\n".encode("utf-16"), "r.yaml:1:1  the file is UTF-16; save it as UTF-8"),
        ("a: 1\n".encode("utf-32"), "r.yaml:1:1  the file is UTF-32; save it as UTF-8"),
        ("a: 1\nb: é\n".encode("latin-1"), "r.yaml:2:4  the byte 0xe9 is not UTF-8"),
        ("# é\nb: ".encode() + b"\xff\n", "r.yaml:2:4  the byte 0xff is not UTF-8"),
        (b"a: 1\nb: \0\n", "r.yaml:2:4  the character U+0000 is not allowed"),
        (b"#" * (MAX_BYTES + 1), "r.yaml  is larger than 1 MiB"),
    ],
)
def test_other_bytes_are_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(data)
    (found,) = read_tree(file, "r.yaml").problems
    assert str(found).startswith(expected)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    messages = [
        str(read_tree(path, "r.yaml").problems[0])
        for path in (tmp_path / "none.yaml", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b")
    ]
    assert messages[0] == "r.yaml  there is no such file"
    assert messages[1] == "r.yaml  is a folder; give the YAML file in it"
    assert all(message.startswith("r.yaml  cannot be read: ") for message in messages[2:])


def test_empty_documents_are_null() -> None:
    for text in ("", "# nothing\n", "---\n", "~\n"):
        assert plain(parse_tree(text, "r.yaml").root) is None


def test_overrides_have_no_lines() -> None:
    tree = parse_tree("{a: 1, a: 2}", "--set x", with_lines=False)
    assert str(tree.problems[0]) == "--set x  a: is given twice"


def test_a_problem_is_one_line() -> None:
    assert problem('"a\\nb": 1\n"a\\nb": 2\n') == "r.yaml:2:1  a b: is given twice, first in line 1"


def test_key_paths_are_written_with_dots() -> None:
    assert dotted(("evaluation", "tasks", 0, "type")) == "evaluation.tasks[0].type"
    assert dotted(()) == ""
