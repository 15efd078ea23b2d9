"""Compare docs/architectures.md with what the tool does, architecture by architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from tests.architectures import (
    NOT_TRIED,
    REFUSED,
    RIGHT,
    WITH_IT,
    WRONG,
    architectures,
    examine,
    read,
    version,
)
from tests.conftest import mostly_slow

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version(version()),
    reason=f"docs/architectures.md is about transformers {version()}",
)
QUICK = ("llama", "gpt2", "mixtral", "mamba")


def test_the_page_lists_all_architectures() -> None:
    """If transformers has a new one, scripts/gen_architectures.py adds it."""
    assert list(read()) == architectures()


def test_no_architecture_is_wrong_and_most_are_right() -> None:
    found = [outcome.result for outcome in read().values()]
    assert set(found) <= {RIGHT, REFUSED, NOT_TRIED}
    assert WRONG not in found
    assert found.count(RIGHT) >= 70


def test_a_refusal_names_the_setting_to_write() -> None:
    refused = [outcome.reason for outcome in read().values() if outcome.result == REFUSED]
    assert refused
    assert [reason for reason in refused if "adapter." not in reason] == []


def test_the_recipe_that_a_hint_proposes_passes() -> None:
    refused = [outcome.reason for outcome in read().values() if outcome.result == REFUSED]
    assert [reason for reason in refused if not reason.endswith(f"{WITH_IT} {RIGHT}")] == []


@pytest.mark.filterwarnings("ignore")  # PEFT warns of layers that it treats specially
@pytest.mark.parametrize("name", mostly_slow(architectures(), *QUICK))
def test_an_architecture_does_what_the_page_says(name: str, tmp_path: Path) -> None:
    assert examine(name, tmp_path) == read()[name]
