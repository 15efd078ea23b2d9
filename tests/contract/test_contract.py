"""Each method, each property: it holds, or is refused with the reason, as docs/contract.md says."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from qlora_cli.adapters import OFT
from tests.contract.page import PAGE, read, write
from tests.contract.properties import PROPERTIES, Case, Property
from tests.contract.subjects import CLASSES, SUBJECTS

TEXT = PAGE.read_text(encoding="utf-8")
SAID = read(TEXT)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def test_every_class_of_the_union_is_under_contract() -> None:
    assert {type(one.adapter) for one in SUBJECTS.values()} == set(CLASSES)


def test_the_example_of_a_method_is_the_method() -> None:
    page = (PAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```python\n{inspect.getsource(OFT)}```" in page


# PEFT warns of any adapter near tied weights; that they stay tied is what is shown.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
# PEFT warns of patterns that it makes itself.
@pytest.mark.filterwarnings("ignore:.*_pattern keys")
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_what_the_page_says_is_so(name: str, prop: Property, bases: Path, tmp_path: Path) -> None:
    said = SAID.get(name, {}).get(prop.name)
    found = prop.check(Case(SUBJECTS[name], bases, tmp_path))
    assert found == said, "docs/contract.md is old: python scripts/gen_contract.py"


def test_the_page_is_written_by_the_script_alone() -> None:
    assert list(SAID) == list(SUBJECTS)
    assert write(SAID) == TEXT
