"""Two hundred damaged recipes: each must end with exit code 2, a place and a reason."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.cli import main
from qlora_cli.recipe.load import dump_recipe, load_recipe
from qlora_cli.recipe.yaml_parser import MAX_BYTES

NUM_RECIPES = 200

WHOLE = """\
model: {path: base, revision: main}
quantization: {type: nf4}
adapter: {type: lora, rank_pattern: {q_proj: 4}}
data:
  train: {path: rows.jsonl, format: {type: prompt_completion}}
  evaluation: {path: held_out.jsonl, format: {type: messages}}
training: {max_steps: 10}
optimizer: {type: adamw_8bit}
schedule: {type: cosine}
evaluation: {tasks: [{type: json_match}]}
output: {dir: run}
"""

Lines = list[str]
Mutator = Callable[[random.Random, Lines], str | bytes]
KINDS: dict[str, Mutator] = {}


def kind(mutator: Mutator) -> Mutator:
    KINDS[mutator.__name__] = mutator
    return mutator


def joined(lines: Lines) -> str:
    return "".join(f"{line}\n" for line in lines)


def pick(rng: random.Random, lines: Lines, pattern: str) -> int:
    """The number of some line that matches."""
    return rng.choice([i for i, line in enumerate(lines) if re.search(pattern, line)])


def put(rng: random.Random, lines: Lines, pattern: str, values: list[str]) -> str:
    """Another value in some line that matches."""
    i = pick(rng, lines, pattern)
    lines[i] = f"{lines[i].partition(':')[0]}: {rng.choice(values)}"
    return joined(lines)


NUMBER = r": [0-9][0-9.e+-]*$"
TRUTH = r": (true|false)$"
LEAF = r": \S"
SECTION = r"^[a-z]+:$"


@kind
def unknown_key(rng: random.Random, lines: Lines) -> str:
    # Any name will do beside q_proj, in rank_pattern.
    i = pick(rng, lines, r"^(?!.*q_proj).*: \S")
    indent = re.match(r"[ -]*", lines[i])
    lines.insert(i + 1, " " * len(indent[0] if indent else "") + f"zz{rng.randint(0, 99)}: 1")
    return joined(lines)


@kind
def misspelt_key(rng: random.Random, lines: Lines) -> str:
    # The names in rank_pattern are the user's own.
    i = pick(rng, lines, r"^ {,4}(?!q_proj)[a-z0-9_]{3,}:")
    lines[i] = re.sub(r"([a-z0-9])([a-z0-9_]+):", r"\2\1x:", lines[i], count=1)
    return joined(lines)


@kind
def key_twice(rng: random.Random, lines: Lines) -> str:
    i = pick(rng, lines, rf"^ *[a-z0-9_]+{LEAF}")
    lines.insert(i, lines[i])
    return joined(lines)


@kind
def section_twice(rng: random.Random, lines: Lines) -> str:
    return joined([*lines, lines[pick(rng, lines, SECTION)], "  x: 1"])


@kind
def words_for_a_number(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, NUMBER, ["ten", "1e", "1.2.3", "0x10", "1,5", "12 GB", "1:30", "--1"])


@kind
def quoted_number(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, NUMBER, ["'1'", '"0.5"', "|-\n        1"])


@kind
def number_out_of_bounds(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, NUMBER, ["-1", "-1e9", "-0.001", "-1_000"])


@kind
def number_not_finite(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, NUMBER, [".nan", "nan", ".inf", "-.inf", "1e999", "infinity"])


@kind
def no_truth_value(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, TRUTH, ["1", "0", "maybe", "'true'", "[true]", "~", "y"])


@kind
def list_for_a_value(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, rf"{NUMBER}|{TRUTH}|path:|dir:|type:", ["[1]", "[]", "[[x]]"])


@kind
def mapping_for_a_value(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, rf"{NUMBER}|{TRUTH}|path:|dir:|type:", ["{a: 1}", "{}"])


@kind
def mapping_for_a_list(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, r"(modules_to_save|trackers):", ["{a: 1}", "{}", "text", "5"])


@kind
def value_for_a_section(rng: random.Random, lines: Lines) -> str:
    i = pick(rng, lines, SECTION)
    rest = [j for j in range(i + 1, len(lines)) if re.match(SECTION, lines[j])]
    values = ["5", "text", "[]", "[a, b]", "true", "~", "''", ""]
    changed = f"{lines[i]} {rng.choice(values)}"
    return joined([*lines[:i], changed, *lines[rest[0] if rest else len(lines) :]])


@kind
def required_key_removed(rng: random.Random, lines: Lines) -> str:
    del lines[pick(rng, lines, r"^ +(path|dir|type):")]
    return joined(lines)


@kind
def cut_off(rng: random.Random, lines: Lines) -> str:
    return joined(lines[: rng.randint(1, lines.index("output:"))])


@kind
def no_such_choice(rng: random.Random, lines: Lines) -> str:
    pattern = r"(type|precision|attention|compute_dtype|quant_storage): "
    return put(rng, lines, pattern, ["best", "NF5", "lorra", "'bf 16'"])


@kind
def tab(rng: random.Random, lines: Lines) -> str:
    i = pick(rng, lines, r"^  \S")
    lines[i] = lines[i].replace("  ", "\t", 1)
    return joined(lines)


@kind
def wrong_indentation(rng: random.Random, lines: Lines) -> str:
    i = pick(rng, lines, r"^  [a-z]")
    lines[i] = rng.choice(["   ", " ", ""]) + lines[i].lstrip()
    return joined(lines)


@kind
def section_below_another(rng: random.Random, lines: Lines) -> str:
    i = pick(rng, lines[1:], SECTION) + 1
    end = next((j for j in range(i + 1, len(lines)) if re.match(SECTION, lines[j])), len(lines))
    moved = [f"  {line}" for line in lines[i:end]]
    return joined([lines[0], *moved, *lines[1:i], *lines[end:]])


@kind
def other_encoding(rng: random.Random, lines: Lines) -> bytes:
    encoding = rng.choice(["utf-16", "utf-32", "latin-1", "cp1252"])
    return joined(["# Übung", *lines]).encode(encoding)


@kind
def broken_bytes(rng: random.Random, lines: Lines) -> bytes:
    data = joined(lines).encode()
    i = rng.randrange(1, len(data))
    return data[:i] + rng.choice([b"\xff", b"\xc3\x28", b"\0", b"\x07", b"\xed\xa0\x80"]) + data[i:]


@kind
def nothing(rng: random.Random, lines: Lines) -> str:
    return rng.choice(["", "\n\n", "# a comment\n", "---\n", "~\n", "{}\n", "\ufeff"])


@kind
def no_mapping(rng: random.Random, lines: Lines) -> str:
    return rng.choice(["- a\n- b\n", "text\n", "5\n", "[]\n", joined([f"- {x}" for x in lines])])


@kind
def huge(rng: random.Random, lines: Lines) -> str:
    filler = rng.choice(["# comment\n", "x: 1\n", " "])
    return joined(lines) + filler * (MAX_BYTES // len(filler) + 1)


@kind
def many_values(rng: random.Random, lines: Lines) -> str:
    return joined([*lines, f"x: [{', '.join('1' for _ in range(20_000))}]"])


@kind
def never_closed(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, LEAF, ["[1, 2", "{a: 1", "'text", '"text', "[[["])


@kind
def second_document(rng: random.Random, lines: Lines) -> str:
    lines.insert(pick(rng, lines, SECTION) + rng.randint(0, 1), rng.choice(["---", "...\n---"]))
    return joined(["x: 1", *lines])


@kind
def tag(rng: random.Random, lines: Lines) -> str:
    tags = ["!!python/object/apply:os.system [exit]", "!!int 5", "!x y", "!!binary aGk=", "!!str 1"]
    return put(rng, lines, LEAF, tags)


@kind
def alias_of_nothing(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, LEAF, ["*x", "[*x]", "&x [*x]", "*.proj"])


@kind
def aliases_that_explode(rng: random.Random, lines: Lines) -> str:
    bomb = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    bomb += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12)]
    return joined([*lines, *bomb])


@kind
def merge_key(rng: random.Random, lines: Lines) -> str:
    lines.insert(pick(rng, lines, SECTION) + 1, "  <<: {x: 1}")
    return joined(lines)


@kind
def key_that_is_no_text(rng: random.Random, lines: Lines) -> str:
    keys = ["? [a]\n  : 1", "~: 1", "{a: 1}: 1", "? |-\n    a\n  : 1", "null: 1", "1: 2"]
    lines.insert(pick(rng, lines, SECTION) + 1, f"  {rng.choice(keys)}")
    return joined(lines)


@kind
def deep(rng: random.Random, lines: Lines) -> str:
    depth = rng.choice([50, 1_000, 100_000])
    return put(rng, lines, LEAF, ["[" * depth, "{a: " * depth, "[" * depth + "]" * depth])


@kind
def bad_extends(rng: random.Random, lines: Lines) -> str:
    values = ["none.yaml", "recipe.yaml", ".", "[a.yaml]", "", "{a: 1}", '"\\0"', "../", "x" * 300]
    return joined([f"extends: {rng.choice(values)}", *lines])


@kind
def character_that_cannot_be_kept(rng: random.Random, lines: Lines) -> str:
    return put(rng, lines, r"(path|dir|revision): ", ['"a\\0b"', '"\\ud800"', '"\\udcff"'])


@kind
def fields_that_disagree(rng: random.Random, lines: Lines) -> str:
    patterns = {r"^  epochs:": "1.5", r"^  micro_batch_size:": "7", r"trust_remote_code:": "true"}
    pattern = rng.choice(list(patterns))
    text = put(rng, lines, pattern, [patterns[pattern]])
    return text.replace("revision: main", "revision: null")


def damaged(number: int) -> tuple[str, str | bytes]:
    """A kind of damage, and a recipe with it. The same for each number, on every machine."""
    rng = random.Random(number)
    name, mutator = list(KINDS.items())[number % len(KINDS)]
    return name, mutator(rng, whole_lines())


def whole_lines() -> Lines:
    path = Path("whole.yaml")
    path.write_text(WHOLE, encoding="utf-8")
    return dump_recipe(load_recipe(path).recipe).splitlines()


def write(text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    Path("recipe.yaml").write_bytes(data)


def assert_explained(stderr: str) -> None:
    assert "Traceback" not in stderr
    assert "Input should" not in stderr
    first, *rest = stderr.removeprefix("error: ").splitlines()
    problems = rest if re.fullmatch(r"\d+ problems", first) else [first]
    assert problems
    num_lines = Path("recipe.yaml").read_bytes().count(b"\n") + 1
    for problem in problems:
        place = re.match(r"recipe\.yaml(?::(\d+):\d+)?  \S.{9,}", problem)
        assert place, problem
        assert int(place[1] or 1) <= num_lines + 1
        # Only a file that cannot be read as a whole has no line.
        assert place[1] or "is larger than" in problem


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_undamaged_recipe_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    write(joined(whole_lines()))
    with pytest.raises(SystemExit) as exit_:
        main(["validate", "recipe.yaml"])
    assert exit_.value.code == 0
    assert "nf4" in capsys.readouterr().out


def test_there_are_many_kinds_of_mutation() -> None:
    assert len(KINDS) >= 20


@pytest.mark.quick_every(5)
@pytest.mark.parametrize("number", range(NUM_RECIPES))
def test_damaged_recipes_are_explained(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    name, text = damaged(number)
    write(text)
    with pytest.raises(SystemExit) as exit_:
        main(["validate", "recipe.yaml"])
    output = capsys.readouterr()
    assert exit_.value.code == 2, name
    assert output.out == ""
    assert_explained(output.err)


@pytest.mark.parametrize("number", [0, 19, 33])
def test_a_subprocess_prints_the_same_errors(number: int) -> None:
    write(damaged(number)[1])
    command = [sys.executable, "-m", "qlora_cli", "validate", "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    assert done.returncode == 2
    assert done.stdout == ""
    assert_explained(done.stderr)
