"""What the formula for models that cannot be traced says of models that can.

    python -m benchmarks.plan_formula

No weights are needed. Writes plan_formula.md. The range of the last column's ratios is within
`RANGE` in `qlora_cli/plan/analytic_memory.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from qlora_cli._compat import quiet_libraries
from qlora_cli.data.batching.collate import full_batch
from qlora_cli.distributed.devices import Device
from qlora_cli.models.known_configs import KNOWN
from qlora_cli.plan.analytic_memory import FORMULA, RANGE, by_formula
from qlora_cli.plan.dry_run import STEP
from qlora_cli.plan.traced_memory import forecast
from qlora_cli.recipe.schema import Recipe

MIB = 2**20
MODELS = (
    "HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-2-7b-hf",
    "Qwen/Qwen3-4B", "google/gemma-2-2b", "microsoft/phi-2",
)  # fmt: skip
KINDS = (("nf4", "lora"), ("int8", "lora"), ("none", "lora"), ("none", "full"))
SHAPES = ((1, 512), (4, 1024))


class Case(NamedTuple):
    """What is compared."""

    model: str
    quantization: str
    adapter: str
    rows: int
    length: int
    checkpointing: bool
    attention: str
    device: Device


def cases() -> Iterator[Case]:
    """All of them."""
    for model, kind, shape, checkpointing in product(MODELS, KINDS, SHAPES, (True, False)):
        yield Case(model, *kind, *shape, checkpointing, "auto", "cuda")
    for kind, checkpointing in product(KINDS, (True, False)):
        yield Case(MODELS[1], *kind, 1, 512, checkpointing, "auto", "cpu")
        yield Case(MODELS[1], *kind, 1, 512, checkpointing, "eager", "cuda")


def compare(case: Case) -> tuple[int, int]:
    """Bytes of what the formula is for, by the trace and by the formula, in a step."""
    config = AutoConfig.for_model(**KNOWN[case.model])
    recipe = Recipe.model_validate(
        {
            "model": {"path": case.model, "attention": case.attention},
            "quantization": {"type": case.quantization},
            "adapter": {"type": case.adapter},
            "data": {"train": {"path": "-"}, "max_length": case.length},
            "training": {"kernels": "plain", "gradient_checkpointing": case.checkpointing},
            "output": {"dir": "-"},
        }
    )
    full = full_batch(case.rows, case.length, padding_free=False)
    options: dict[str, Any] = {"device": case.device, "steps": [[full, full]], "held_out": None}
    said = by_formula(recipe, config, torch.bfloat16, why="of a comparison", **options)
    traced = forecast(recipe, config, torch.bfloat16, kernels="plain", **options)
    kinds = next(p for s, p in said.peaks.items() if s.stage == STEP and s.part != "update").kinds
    stated = sum(size for kind, size in kinds.items() if kind in FORMULA)
    most = max(
        peak.total for s, peak in traced.peaks.items() if s.stage == STEP and s.part != "update"
    )
    return most - (sum(kinds.values()) - stated), stated


def page(found: list[tuple[Case, int, int]]) -> str:
    """The comparison as a page."""
    ratios = [traced / stated for _, traced, stated in found]
    lines = [
        "<!-- Written by benchmarks/plan_formula.py; run that instead of editing. -->",
        "# What the formula says of models that can be traced",
        "",
        "What a model computes in a step (activations, logits, workspace, batch) beside weights,",
        "gradients and states: by the trace, and by the formula that takes its place where the",
        "code of a model cannot be traced (`qlora_cli/plan/analytic_memory.py`). bfloat16, two",
        "micro-batches a step, transformers' own layers.",
        "",
        f"The trace is {min(ratios):.2f} to {max(ratios):.2f} times the formula; a plan takes "
        f"{RANGE[0]:g} to {RANGE[1]:g} times.",
        "",
        "```bash",
        "python -m benchmarks.plan_formula",
        "```",
        "",
        "| model | held | trained | rows x tokens | checkpointing | attention | device "
        "| traced MiB | formula MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (case, traced, stated), ratio in zip(found, ratios, strict=True):
        cells = [
            case.model, case.quantization, case.adapter, f"{case.rows} x {case.length}",
            "on" if case.checkpointing else "off", case.attention, case.device,
            f"{traced / MIB:,.0f}", f"{stated / MIB:,.0f}", f"{ratio:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare all of them."""
    quiet_libraries()
    found = []
    for case in cases():
        found.append((case, *compare(case)))
        print(*case, *found[-1][1:], round(found[-1][1] / found[-1][2], 3), flush=True)
    Path(__file__).with_suffix(".md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
