"""Chat templates of real models: each is supervised exactly, or refused with the stored reason.

`python scripts/regen_templates.py` regenerates the stored outcomes (its `--help` says how to get
the templates of axolotl and vLLM), and `python scripts/gen_docs.py` the tables in
`docs/templates.md` from them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.encode.truncate import EncodedRow
from qlora_cli.tasks.task import without_empty_reasoning
from tests.golden.templates import (
    GOLDEN,
    GOLDEN_PACKAGES,
    KINDS,
    conversations,
    folder,
    names,
    outcomes,
    packages,
    tokenizer_for,
)

Outcomes = dict[str, dict[str, dict[str, Any]]]

KEPT: Outcomes = json.loads(GOLDEN.read_text(encoding="utf-8"))
KEPT_PACKAGES: Outcomes = json.loads(GOLDEN_PACKAGES.read_text(encoding="utf-8"))
FAMILIES = ("llama3", "qwen", "gemma", "phi3", "deepseek", "glm4moe", "gptoss", "cohere")

with_trl = pytest.mark.skipif(folder() is None, reason="trl is not installed")
with_packages = pytest.mark.skipif(
    not packages(), reason="QLORA_TEMPLATES names no folder with templates of axolotl and vLLM"
)


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


ANSWERED = {
    "qwen2_5": 2,
    "qwen3": 8,
    "llama3_1": 2,
    "glm4moe": 8,
    "gptoss": 8,
    "lfm2_2_5": 8,
    "qwen3_5_think": 8,
    "deepseek_r1_distill": 6,
}
"""Templates, and a lower bound of the answers with calls or reasoning that they can write."""


@with_trl
@pytest.mark.parametrize("name", ANSWERED)
def test_the_reference_of_an_answer_is_the_text_that_the_model_learns_to_generate(
    name: str,
) -> None:
    tokenizer = tokenizer_for(name)
    encoder = Encoder(tokenizer)
    rows = [
        replace(row, messages=[*(replace(m, train=False) for m in row.messages[:i]), message])
        for kind in ("tools", "reasoning")
        if KEPT[name][kind]["outcome"] == "exact"
        for row in conversations(kind)
        for i, message in enumerate(row.messages)
        if message.tool_calls or message.reasoning
    ]
    assert len(rows) >= ANSWERED[name]
    for row in rows:
        [encoded] = encoder.encode_rows([row], max_length=2**20, truncate="drop")
        assert isinstance(encoded, EncodedRow)
        [end] = encoded.turn_ends
        prompt = encoder.encode_prompt(row.messages, row.tools)
        generated = encoded.example.input_ids[len(prompt) :]
        until = generated.index(end.token_ids[0]) if end.token_ids else len(generated)
        text = tokenizer.decode(generated[:until], skip_special_tokens=True)
        reference = encoder.reference(row.messages, row.tools)
        assert reference == text
        assert (row.messages[-1].reasoning or "") in reference
        assert all(call.name in reference for call in row.messages[-1].tool_calls)


LEADS = {"gptoss": "final", "muse_glimmer": " to=user"}
"""Templates that write words before a plain answer, besides special tokens and reasoning."""


@pytest.mark.quick_every(4)
@with_trl
@pytest.mark.parametrize("name", exact("single"))
def test_a_plain_answer_is_its_reference_after_the_lead(name: str) -> None:
    tokenizer = tokenizer_for(name)
    encoder = Encoder(tokenizer)
    for row in conversations("single"):
        [encoded] = encoder.encode_rows([row], max_length=2**20, truncate="drop")
        assert isinstance(encoded, EncodedRow)
        [end] = encoded.turn_ends
        prompt = encoder.to_prompt(row.messages)
        generated = encoded.example.input_ids[len(prompt.input_ids) :]
        until = generated.index(end.token_ids[0]) if end.token_ids else len(generated)
        text = tokenizer.decode(generated[:until], skip_special_tokens=True)
        assert prompt.lead == LEADS.get(name, "")
        assert text.startswith(prompt.lead)
        answer = without_empty_reasoning(text.removeprefix(prompt.lead))
        assert answer.strip() == prompt.reference.strip()


@with_packages
def test_every_template_of_the_packages_has_a_stored_outcome() -> None:
    assert list(KEPT_PACKAGES) == list(packages())
    assert all(list(kept) == KINDS for kept in KEPT_PACKAGES.values())


@pytest.mark.quick_every(2)
@with_packages
@pytest.mark.parametrize("name", KEPT_PACKAGES)
def test_a_template_of_the_packages_has_its_stored_outcome(name: str) -> None:
    assert outcomes(name) == KEPT_PACKAGES[name]


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
    every = [*KEPT.values(), *KEPT_PACKAGES.values()]
    refused = [entry for kept in every for entry in kept.values() if entry["outcome"] != "exact"]
    assert refused
    assert all(len(entry["reason"]) > 20 for entry in refused)
