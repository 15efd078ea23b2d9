"""Check that each property holds for each method, or is refused, as docs/contract.md says."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest

from qlora_cli.adapters import HRA, OFT, Bottleneck, LoHa, LoRA
from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.peft_edits import MERGEABLE
from tests.contract.page import PAGE, read, write
from tests.contract.properties import PROPERTIES, Case, Property, fails_without_refusal
from tests.contract.subjects import CLASSES, SUBJECTS, Subject, select

TEXT = PAGE.read_text(encoding="utf-8")
EXPECTED = read(TEXT)

QUICK = ("lora", "full", "prompt")
"""One subject that adds weights, one that trains all, one with virtual tokens; the rest is slow."""
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SUBJECTS]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def test_every_class_of_the_union_is_under_contract() -> None:
    assert {type(one.adapter) for one in SUBJECTS.values()} == set(CLASSES)


def test_each_method_of_peft_can_be_merged_or_says_why_not(bases: Path, tmp_path: Path) -> None:
    """A new method is merged as a trial: the property `merged` decides if it stays in MERGEABLE."""
    merged = set()
    for subject in SUBJECTS.values():
        adapter = subject.adapter
        if "peft_config" in vars(type(adapter)) and not adapter.no_merge:
            config = adapter.peft_config(Case(subject, bases, tmp_path).load())
            merged.add(str(config.peft_type.value))
    new = merged - set(MERGEABLE)
    assert not new, (
        f"add {', '.join(sorted(new))} to MERGEABLE in qlora_cli/adapters/peft_edits.py; where the "
        "property `merged` then fails, give the method a `no_merge` with the reason instead"
    )


def test_rows_are_selected_by_name_or_type() -> None:
    assert select([]) == list(SUBJECTS)
    assert select(["prefix", "lora, one layer"]) == ["lora, one layer", "prefix"]
    assert select(["adalora", "bitfit"]) == ["adalora", "bitfit"]
    assert len(select(["bottleneck"])) > 1
    with pytest.raises(KeyError, match="'loar' is not a method; the methods are lora; "):
        select(["loar"])


def test_the_example_in_contributing_is_the_code() -> None:
    page = (PAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```python\n{inspect.getsource(OFT)}```" in page


# PEFT warns of adapters on models with tied weights; the property `tied` covers them.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
# PEFT warns of patterns that it writes itself.
@pytest.mark.filterwarnings("ignore:.*_pattern keys")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_the_contract_page_matches_the_outcomes(
    name: str, prop: Property, bases: Path, tmp_path: Path
) -> None:
    expected = EXPECTED.get(name, {}).get(prop.name)
    found = prop.check(Case(SUBJECTS[name], bases, tmp_path))
    assert found == expected, (
        f"docs/contract.md is not current: run python scripts/gen_contract.py {shlex.quote(name)}"
    )


@pytest.mark.parametrize(
    ("adapter", "is_wrong"),
    [
        (HRA(r=4), True),  # trains on the stored integers as if they were the weights
        (LoRA(r=4), False),
        (OFT(oft_block_size=8), False),
        (LoHa(r=4), False),
        (Bottleneck(size=4), False),
    ],
)
def test_a_wrong_result_on_an_int8_base_justifies_a_refusal(
    bases: Path, tmp_path: Path, adapter: AdapterMethod, is_wrong: bool
) -> None:
    assert fails_without_refusal(Case(Subject(adapter), bases, tmp_path), "int8") is is_wrong


@pytest.mark.parametrize("r", [3, 5, 7, 9, 31])
def test_an_odd_number_of_reflections_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=rf"r \({r}\) has to be even"):
        HRA(r=r)


def test_the_page_is_what_the_script_writes() -> None:
    changed = [name for name in SUBJECTS if name not in EXPECTED] or ["lora"]
    assert list(EXPECTED) == list(SUBJECTS), (
        "docs/contract.md has other rows than the tests: run "
        f"python scripts/gen_contract.py {shlex.join(changed)}"
    )
    assert write(EXPECTED) == TEXT
