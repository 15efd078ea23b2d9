"""Parse YAML into a tree of nodes with their places. Scalars stay text.

YAML 1.1 turns `no` into false and `2e-4` into text, and of two equal keys it keeps the last. This
module leaves types to the recipe's fields, and reports what YAML lets pass. PyYAML's events are
read directly: its composer, like that of ruamel.yaml, bounds neither depth nor aliases.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 10_000
"""Nodes after aliases are expanded: a few lines of nested aliases can expand to billions."""

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the root to a node."""


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """A file (or command-line option) with a line and a column, both from 1."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its place. Its text is one line, even if keys or values have several."""

    place: SourcePosition
    message: str

    def __str__(self) -> str:
        return " ".join(f"{self.place}  {self.message}".splitlines())


@dataclass(frozen=True, slots=True)
class Scalar:
    """A text. If not `plain`, it was quoted or a block, and never means a number."""

    text: str
    plain: bool
    place: SourcePosition

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    nodes: tuple[Node, ...]
    place: SourcePosition


@dataclass(frozen=True, slots=True)
class Entry:
    """The place and the value of a key."""

    place: SourcePosition
    node: Node


@dataclass(frozen=True, slots=True)
class Mapping:
    """Keys and their entries, in the order of the file."""

    entries: dict[str, Entry]
    place: SourcePosition
    unread: tuple[SourcePosition, ...] = ()
    """Places of values under a key that could not be read, which is reported already."""


Node = Scalar | Items | Mapping


@dataclass(frozen=True, slots=True)
class Tree:
    """The parsed document. `root` is None if `problems` left nothing usable."""

    root: Node | None
    problems: tuple[Problem, ...]


def dotted(path: KeyPath) -> str:
    """Format a path like `evaluation.tasks[0].type`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def read_tree(path: Path, source: str) -> Tree:
    """Parse a file; `source` is its name in places."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return _nothing(SourcePosition(source), "there is no such file")
    except IsADirectoryError:
        return _nothing(SourcePosition(source), "is a folder; give the YAML file in it")
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot hold
        return _nothing(SourcePosition(source), f"cannot be read: {error}")
    if len(data) > MAX_BYTES:
        return _nothing(
            SourcePosition(source), f"is larger than {MAX_BYTES >> 20} MiB, the limit for a recipe"
        )
    return _decode_and_parse(data, source)


def parse_tree(text: str, source: str, *, with_lines: bool = True) -> Tree:
    """Parse one YAML document. Without lines, every place is just `source`."""
    builder = _Builder(source, with_lines)
    try:
        root = builder.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except _FatalError as fatal:
        return Tree(None, (*builder.problems, fatal.problem))
    except yaml.MarkedYAMLError as error:
        problem = Problem(builder.place(error.problem_mark), _explain(error))
        return Tree(None, (*builder.problems, problem))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = _place_after(before, source) if with_lines else SourcePosition(source)
        return _nothing(place, f"the character U+{error.character:04X} is not allowed in YAML")
    return Tree(root, tuple(builder.problems))


def _nothing(place: SourcePosition, message: str) -> Tree:
    return Tree(None, (Problem(place, message),))


def _decode_and_parse(data: bytes, source: str) -> Tree:
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    for mark, name in (
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF32_BE, "UTF-32"),
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
    ):
        if data.startswith(mark):
            return _nothing(SourcePosition(source, 1, 1), f"the file is {name}; save it as UTF-8")
    try:
        return parse_tree(data.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        place = _place_after(error.object[: error.start].decode("utf-8"), source)
        found = error.object[error.start]
        return _nothing(place, f"the byte 0x{found:02x} is not UTF-8; save the file as UTF-8")


def _place_after(before: str, source: str) -> SourcePosition:
    return SourcePosition(source, before.count("\n") + 1, len(before) - before.rfind("\n"))


_EXPLAINED = (
    ("found character '\\t'", "a tab; indent YAML with spaces"),
    (
        "expected <block end>",
        'unexpected line: check its indentation, and look for a missing "-" or ":"',
    ),
    (
        "mapping values are not allowed",
        'unexpected ":": check the indentation, or put text that contains ": " in quotes',
    ),
    ("could not find expected ':'", 'this line is not "key: value"'),
    ("found unexpected end of stream", "a quote or bracket is never closed"),
    ("expected ',' or", "a comma is missing, or a bracket is never closed"),
    ("found character", "text that begins with this character needs quotes"),
    ("found undefined tag handle", "a tag; recipes take values without tags"),
)


def _explain(error: yaml.MarkedYAMLError) -> str:
    for start, words in _EXPLAINED:
        if str(error.problem).startswith(start):
            return f"not valid YAML: {words}"
    context = f" {error.context}" if error.context else ""
    return f"not valid YAML: {error.problem}{context}"


class _Mark(Protocol):
    """Either of PyYAML's two classes of marks; both count from 0."""

    line: int
    column: int


class _FatalError(Exception):
    """A problem after which the rest of the document cannot be parsed."""

    def __init__(self, place: SourcePosition, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(place, message)


@dataclass
class _Builder:
    """Builds nodes from parser events, within the limits."""

    source: str
    with_lines: bool
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, tuple[Node, int]] = field(default_factory=dict)
    num_nodes: int = 0

    def place(self, mark: _Mark | None) -> SourcePosition:
        if mark is None or not self.with_lines:
            return SourcePosition(self.source)
        return SourcePosition(self.source, mark.line + 1, mark.column + 1)

    def document(self, events: Iterator[Event]) -> Node:
        self.events = events
        next(events)  # start of the stream
        first = next(events)
        if isinstance(first, StreamEndEvent):
            return Scalar("", True, SourcePosition(self.source, 1, 1))
        root = self._node(next(events), ())
        next(events)  # end of the document
        if isinstance(more := next(events), DocumentStartEvent):
            message = "a second document begins here (---); a recipe has only one"
            raise _FatalError(self.place(more.start_mark), message)
        return root

    def _node(self, event: Event, path: KeyPath) -> Node:
        place = self.place(event.start_mark)
        self._count(1, place)
        if len(path) > MAX_DEPTH:
            raise _FatalError(place, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, AliasEvent):
            return self._alias(event, place)
        assert isinstance(event, NodeEvent)
        before = self.num_nodes
        node = self._fresh_node(event, path, place)
        if event.anchor is not None:
            self.anchors[event.anchor] = (node, self.num_nodes - before + 1)
        return node

    def _fresh_node(self, event: NodeEvent, path: KeyPath, place: SourcePosition) -> Node:
        assert isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._report(
                place, path, f"the tag {tag} is not allowed; recipes take values without tags"
            )
        if isinstance(event, ScalarEvent):
            if _UNWRITABLE.search(event.value):
                self._report(
                    place, path, "contains a character that files and file names cannot hold"
                )
            return Scalar(_UNWRITABLE.sub("", event.value), event.style is None, place)
        if isinstance(event, SequenceStartEvent):
            return self._items(path, place)
        return self._mapping(path, place)

    def _items(self, path: KeyPath, place: SourcePosition) -> Items:
        nodes: list[Node] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            nodes.append(self._node(event, (*path, len(nodes))))
        return Items(tuple(nodes), place)

    def _mapping(self, path: KeyPath, place: SourcePosition) -> Mapping:
        entries: dict[str, Entry] = {}
        unread: list[SourcePosition] = []
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self._node(event, path)
            name = self._key_name(key, path)
            event = next(self.events)
            value = self._node(event, (*path, name or "?"))
            if name is None:
                # The value of an alias was written where its anchor is.
                alias = event.anchor if isinstance(event, AliasEvent) else None
                unread.append(self.anchors[alias][0].place if alias else value.place)
            if name in entries:
                first = entries[name].place
                where = f", first in line {first.line}" if first.line else ""
                self._report(key.place, (*path, name), f"is given twice{where}")
            elif name is not None:
                entries[name] = Entry(key.place, value)
        return Mapping(entries, place, tuple(unread))

    def _key_name(self, key: Node, path: KeyPath) -> str | None:
        if not isinstance(key, Scalar) or key.is_null:
            braces = isinstance(key, Mapping)
            advice = ' (text that begins with "{" needs quotes: "{{ x }}")' if braces else ""
            self._report(key.place, path, f"a key must be text{advice}")
            return None
        if key.plain and key.text == "<<":
            message = 'merge keys ("<<") are not supported; write the keys out, or use extends'
            self._report(key.place, path, message)
            return None
        return key.text

    def _alias(self, event: AliasEvent, place: SourcePosition) -> Node:
        if event.anchor not in self.anchors:
            message = f'the alias "*{event.anchor}" has no complete anchor before it; '
            raise _FatalError(place, message + "text that starts with * needs quotes")
        node, size = self.anchors[event.anchor]
        self._count(size, place)
        return replace(node, place=place)

    def _count(self, nodes: int, place: SourcePosition) -> None:
        self.num_nodes += nodes
        if self.num_nodes > MAX_NODES:
            raise _FatalError(place, f"more than {MAX_NODES} values, the limit for a recipe")

    def _report(self, place: SourcePosition, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(place, f"{dotted(path)}: {message}" if path else message))
