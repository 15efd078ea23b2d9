"""Weights merged one at a time are those of PEFT's merge in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.merge_parity import BASES, VARIANTS, examine
from tests.conftest import mostly_slow

# PEFT rounds these updates to the base's 16 bit before it adds them; we add in float32.
ROUNDED_TWICE = (
    "LoRA on the embedding",
    "target_parameters (experts in one tensor)",
    "target_parameters (experts apart)",
    "target_parameters (Qwen2-MoE)",
    "all-linear (Mixtral)",
)
# PEFT adds an update of one of two tied matrices to both of them, which is not what was trained.
ONE_SIDE = ("LoRA on the embedding", "DoRA on the embedding", "LoRA on the head")
REFUSED = {
    "PiSSA": "init_lora_weights (pissa) changed the base",
    "OLoRA": "init_lora_weights (olora) changed the base",
}

# PEFT warns about some of the variants; here only the numbers matter.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.quick_every(2)
@pytest.mark.parametrize("base", ["none", "nf4"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize(
    "variant",
    mostly_slow([name for name in VARIANTS if name not in REFUSED], *[*VARIANTS][:4]),
)
def test_a_merge_equals_pefts_merge(variant: str, tied: bool, base: str, tmp_path: Path) -> None:
    found = examine(dict(VARIANTS[variant]), tmp_path, tied=tied, config=BASES[base])
    assert not found.note
    if tied and variant in ONE_SIDE:
        assert found.untied
        assert found.logits < 5e-3
        return
    # bfloat16 has 8 bits; two roundings in place of one change the last of them.
    assert found.difference <= (2**-7 if variant in ROUNDED_TWICE else 0.0)
    if variant not in ROUNDED_TWICE:
        assert found.equal == found.tensors
        # What rounding the sum to bfloat16 costs.
        assert found.logits < 5e-3


@pytest.mark.parametrize(("variant", "reason"), REFUSED.items())
def test_unmergeable_adapters_are_refused_with_the_reason(
    variant: str, reason: str, tmp_path: Path
) -> None:
    found = examine(dict(VARIANTS[variant]), tmp_path, tied=False, config=BASES["none"])
    assert reason in found.note
