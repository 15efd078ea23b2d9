"""Chat templates of real models: each is supervised exactly, or refused with the stored reason.

`python scripts/regen_templates.py` regenerates `templates.json`, and `python scripts/gen_docs.py`
the table in `docs/templates.md` from it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden.templates import GOLDEN, KINDS, folder, names, outcomes

KEPT: dict[str, dict[str, dict[str, Any]]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
FAMILIES = ("llama3", "qwen", "gemma", "phi3", "deepseek", "glm4moe", "gptoss", "cohere")

with_trl = pytest.mark.skipif(folder() is None, reason="trl is not installed")


def exact(*kinds: str) -> list[str]:
    return [
        name
        for name, kept in KEPT.items()
        if all(kept[kind]["outcome"] == "exact" for kind in kinds)
    ]


@with_trl
def test_every_template_has_a_stored_outcome() -> None:
    assert list(KEPT) == names()
    assert all(list(kept) == KINDS for kept in KEPT.values())


@pytest.mark.quick_every(2)
@with_trl
@pytest.mark.parametrize("name", KEPT)
def test_a_template_has_its_stored_outcome(name: str) -> None:
    assert outcomes(name) == KEPT[name]


def test_most_templates_and_all_well_known_ones_are_exact() -> None:
    found = exact("single", "multi")
    assert len([name for name in found if "," not in name]) >= 37
    assert len([name for name in found if "enable_thinking" in name]) == 4
    for family in FAMILIES:
        of_family = [name for name in KEPT if name.startswith(family)]
        assert of_family, family
        assert set(of_family) <= set(found), family
    assert exact("multi") == exact("multi", "early")
    assert len(exact("system")) >= 36
    assert len(exact("tools")) >= 22
    assert len(exact("reasoning")) >= 18


def test_a_refusal_has_its_reason() -> None:
    refused = [entry for kept in KEPT.values() for entry in kept.values() if "reason" in entry]
    assert refused
    assert all(len(entry["reason"]) > 20 for entry in refused)
