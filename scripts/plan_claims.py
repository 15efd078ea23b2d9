"""Write docs/claims.md: compare common claims about LoRA and QLoRA with plans.

python scripts/plan_claims.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.plan.plan import plan
from qlora_cli.recipe.schema import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
GB, GIB = 10**9, 2**30

HEAD = """\
<!-- Written by scripts/plan_claims.py; run that instead of editing. -->
# Common claims about LoRA and QLoRA

These figures are repeated everywhere. Below each are recipes and their plans: traced steps of
`qlora`, without weights and without a GPU. Tensors are what the trace counts. The process adds a
CUDA context, workspaces and memory that the allocator cannot use, as a range. All rows have
`data.max_length` tokens. If you have a card, check a figure with `qlora train`, which logs the
measured memory next to the plan.
"""


@dataclass(frozen=True)
class Case:
    """A recipe that tests a claim."""

    what: str
    model: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim, the recipes that test it, and a function that writes the verdict."""

    claim: str
    cases: list[Case]
    verdict: Callable[[list[dict[str, Any]]], str]


L7, L65 = "meta-llama/Llama-2-7b-hf", "huggyllama/llama-65b"


Q_AND_V = {"target_modules": ["q_proj", "v_proj"]}


def lora(length: int, micro: int, r: int = 16, **more: Any) -> dict[str, Any]:
    """Make the settings of a LoRA run."""
    return {
        "adapter": {"type": "lora", "r": r, **more.pop("adapter", {})},
        "data": {"train": {"path": "nowhere.jsonl"}, "max_length": length},
        "training": {"batch_size": 16, "micro_batch_size": micro, "max_steps": 1},
        **more,
    }


def qlora(length: int, micro: int, r: int = 16, **more: Any) -> dict[str, Any]:
    """Make the settings of a LoRA run on a base in NF4."""
    return lora(length, micro, r, quantization={"type": "nf4"}, **more)


def full(**more: Any) -> dict[str, Any]:
    """Make the settings of full fine-tuning with 512 tokens per micro-batch."""
    settings = lora(512, 1, **more)
    return {**settings, "adapter": {"type": "full"}}


def gib(report: dict[str, Any]) -> float:
    """Return the peak of tensors in GiB."""
    return float(report["peak"]["bytes"] / GIB)


def process(report: dict[str, Any]) -> tuple[float, float]:
    """Return the range of the process in GiB."""
    return report["process"]["low"] / GIB, report["process"]["high"] / GIB


def say_full(reports: list[dict[str, Any]]) -> str:
    wide, narrow, quantized = (r["peak"]["bytes"] / GB for r in reports)
    weights = reports[0]["model"]["weights"]
    low, high = (reports[2]["process"][end] / GB for end in ("low", "high"))
    return (
        f"84 GB is a little more than 12 bytes for each of {weights:,} weights: weights and "
        "gradients in 16 bit and two states in 32 bit, without activations. `qlora` trains weights "
        f"in 32 bit, which keeps small updates: {wide:.0f} GB, or {narrow:.0f} GB with states in "
        f"8 bit. QLoRA takes {quantized:.1f} GB of tensors with 2,048 tokens per micro-batch, and "
        f"{low:.1f} to {high:.1f} GB for the process, so about 14 GB "
        + ("holds as an upper limit, with room for more rows." if high < 14 else "is too little.")
    )


def say_range(low: float, high: float) -> Callable[[list[dict[str, Any]]], str]:
    """Make the verdict of a claim that is a range in GB."""

    def say(reports: list[dict[str, Any]]) -> str:
        ends = [(r["process"]["low"] / GB, r["process"]["high"] / GB) for r in reports]
        least, most = min(end[0] for end in ends), max(end[1] for end in ends)
        # Recipes are in the order of their tokens per micro-batch.
        inside = sum(end[1] <= high for end in ends)
        if inside < len(ends):
            surely = ends[-1][0] > high
            words = f"{'does' if surely else 'may'} not hold for the largest of these recipes"
            words += f" ({inside} of {len(ends)} certainly take less)"
        elif least < low:
            words = f'holds for these recipes as "up to {high:.0f} GB"; less suffices'
        else:
            words = "holds for these recipes"
        return (
            f"The claim {words}: {least:.1f} to {most:.1f} GB for the process, against "
            f"{low:.0f} to {high:.0f} GB. The number of tokens per micro-batch decides."
        )

    return say


def say_65b(reports: list[dict[str, Any]]) -> str:
    parts = []
    for report, name in zip(reports, ("paged", "unpaged"), strict=True):
        low, high = process(report)
        fits = {"yes": "fits", "perhaps": "may fit", "no": "does not fit"}
        parts.append(
            f"with {name} states it {fits[report['fits']['verdict']]} ({gib(report):.1f} GiB of "
            f"tensors on the card, {low:.1f} to {high:.1f} GiB for the process)"
        )
    return f"On a card of 48 GB (RTX A6000, 47.5 GiB): {'; '.join(parts)}."


def say_share(reports: list[dict[str, Any]]) -> str:
    shares = [r["model"]["trained_share"] for r in reports]
    few = sum(share < 0.002 for share in shares)
    return f"These recipes train {min(shares):.2%} to {max(shares):.2%} of the weights" + (
        f"; {few} of them trains less than claimed." if few else "."
    )


def say_file(reports: list[dict[str, Any]]) -> str:
    sizes = [r["adapter_bytes"] / 10**6 for r in reports]
    return (
        f"Files take {min(sizes):,.0f} to {max(sizes):,.0f} MB here, in 32 bit. About 100 MB is "
        "the order of magnitude for a 7B model with a small rank, and the size grows with the rank."
    )


CLAIMS = [
    Claim(
        "Full fine-tuning of Llama-2-7B takes 84 GB, QLoRA about 14 GB.",
        [
            Case("full", L7, full()),
            Case("full, 8-bit states", L7, full(optimizer={"type": "adamw_8bit"})),
            Case("QLoRA", L7, qlora(2048, 1, r=64)),
        ],
        say_full,
    ),
    Claim(
        "A 7B model takes 16 to 24 GB with LoRA.",
        [
            Case("LoRA", L7, lora(512, 1)),
            Case("LoRA", L7, lora(1024, 4)),
            Case("LoRA", L7, lora(2048, 4)),
        ],
        say_range(16, 24),
    ),
    Claim(
        "A 7B model takes 8 to 16 GB with QLoRA.",
        [
            Case("QLoRA", L7, qlora(512, 1)),
            Case("QLoRA", L7, qlora(1024, 4)),
            Case("QLoRA", L7, qlora(2048, 4)),
        ],
        say_range(8, 16),
    ),
    Claim(
        "QLoRA trains a 65B model on one card of 48 GB.",
        [
            Case("QLoRA, paged", L65, qlora(512, 1, r=64, optimizer={"type": "paged_adamw_32bit"})),
            Case("QLoRA, unpaged", L65, qlora(512, 1, r=64)),
        ],
        say_65b,
    ),
    Claim(
        "Adapters have 0.2 to 5 % of the weights.",
        [
            Case("q and v", L7, qlora(512, 1, r=8, adapter=Q_AND_V)),
            Case("all linear layers", L7, qlora(512, 1, r=16)),
            Case("all linear layers", L7, qlora(512, 1, r=128)),
        ],
        say_share,
    ),
    Claim(
        "An adapter is a file of about 100 MB.",
        [
            Case("q and v", L7, qlora(512, 1, r=16, adapter=Q_AND_V)),
            Case("all linear layers", L7, qlora(512, 1, r=8)),
            Case("all linear layers", L7, qlora(512, 1, r=64)),
        ],
        say_file,
    ),
]  # fmt: skip


def report_of(case: Case, device: str = "RTX A6000") -> dict[str, Any]:
    """Plan a case."""
    settings = {"model": {"path": case.model}, "output": {"dir": "-"}, **case.settings}
    settings["training"] = {"precision": "bf16", **settings["training"]}
    return plan(Recipe.model_validate(settings), device=device).to_json()


def row(case: Case, report: dict[str, Any]) -> str:
    """Format a recipe and its figures as a row of a table."""
    low, high = process(report)
    settings, adapter = case.settings, case.settings["adapter"]
    rank = f"r {adapter['r']}" if "r" in adapter else ""
    shape = f"{settings['training']['micro_batch_size']} x {settings['data']['max_length']}"
    optimizer = settings.get("optimizer", {}).get("type", "adamw")
    cells = [
        case.what, case.model, shape, rank, optimizer, f"{gib(report):.2f}",
        f"{low:.1f} to {high:.1f}", f"{report['model']['trained_share']:.2%}",
        f"{report['adapter_bytes'] / 2**20:,.0f} MiB",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Plan all cases and write the page."""
    lines = [HEAD]
    for claim in CLAIMS:
        reports = [report_of(case) for case in claim.cases]
        lines += [
            f"## {claim.claim}\n",
            "| recipe | model | rows x tokens | rank | optimizer | tensors GiB | process GiB "
            "| trained | weights file |",
            "|---|---|---|---|---|---|---|---|---|",
            *(row(case, report) for case, report in zip(claim.cases, reports, strict=True)),
            "",
            claim.verdict(reports) + "\n",
        ]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
