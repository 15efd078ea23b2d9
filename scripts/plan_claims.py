"""Write docs/claims.md: what is claimed of LoRA and QLoRA, and what `qlora plan` says of each.

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
# What is claimed of LoRA and QLoRA

Figures that are repeated everywhere, each with recipes and what `qlora plan` says of them: traced
steps of this program, without weights and without a card. Tensors are what the trace counts; the
process has a CUDA context, workspaces and what the allocator cannot use besides, as a range. Rows
are as long as `data.max_length` throughout. Whoever has a card can hold the figures against it:
`qlora train` sets what it takes beside the plan.
"""


@dataclass(frozen=True)
class Case:
    """A recipe under a claim."""

    what: str
    model: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim, the recipes that it is held against, and what is to be said."""

    claim: str
    cases: list[Case]
    verdict: Callable[[list[dict[str, Any]]], str]


L7, L65 = "meta-llama/Llama-2-7b-hf", "huggyllama/llama-65b"


Q_AND_V = {"target_modules": ["q_proj", "v_proj"]}


def lora(length: int, micro: int, r: int = 16, **more: Any) -> dict[str, Any]:
    """Settings of a run with an adapter."""
    return {
        "adapter": {"type": "lora", "r": r, **more.pop("adapter", {})},
        "data": {"train": {"path": "nowhere.jsonl"}, "max_length": length},
        "training": {"batch_size": 16, "micro_batch_size": micro, "max_steps": 1},
        **more,
    }


def qlora(length: int, micro: int, r: int = 16, **more: Any) -> dict[str, Any]:
    """The same on a base in NF4."""
    return lora(length, micro, r, quantization={"type": "nf4"}, **more)


def full(**more: Any) -> dict[str, Any]:
    """Settings of full fine-tuning, 512 tokens at a time."""
    settings = lora(512, 1, **more)
    return {**settings, "adapter": {"type": "full"}}


def gib(report: dict[str, Any]) -> float:
    """Tensors at the peak."""
    return float(report["peak"]["bytes"] / GIB)


def process(report: dict[str, Any]) -> tuple[float, float]:
    """The range of the process."""
    return report["process"]["low"] / GIB, report["process"]["high"] / GIB


def say_full(reports: list[dict[str, Any]]) -> str:
    wide, narrow, quantized = (r["peak"]["bytes"] / GB for r in reports)
    weights = reports[0]["model"]["weights"]
    low, high = (reports[2]["process"][end] / GB for end in ("low", "high"))
    return (
        f"84 GB are 12 bytes for each of {weights:,} weights and some more: weights and gradients "
        "in 16 bit, two states in 32 bit, without activations. This program trains weights in 32 "
        f"bit, which keeps small updates: {wide:.0f} GB, or {narrow:.0f} GB with states in 8 bit. "
        f"QLoRA takes {quantized:.1f} GB of tensors with 2,048 tokens at a time, and {low:.1f} to "
        f"{high:.1f} GB in all, so about 14 GB "
        + ('holds as "up to", and leaves room for more rows.' if high < 14 else "does not hold.")
    )


def say_range(low: float, high: float) -> Callable[[list[dict[str, Any]]], str]:
    """Of a claim that is a range, in GB."""

    def say(reports: list[dict[str, Any]]) -> str:
        ends = [(r["process"]["low"] / GB, r["process"]["high"] / GB) for r in reports]
        least, most = min(end[0] for end in ends), max(end[1] for end in ends)
        # The recipes are in the order of their tokens at a time.
        inside = sum(end[1] <= high for end in ends)
        if inside < len(ends):
            surely = ends[-1][0] > high
            words = f"{'does' if surely else 'may'} not hold for the largest of these recipes"
            words += f" ({inside} of {len(ends)} take less for sure)"
        elif least < low:
            words = f'holds for these recipes as "up to {high:.0f} GB"; less is enough'
        else:
            words = "holds for these recipes"
        return (
            f"The claim {words}: {least:.1f} to {most:.1f} GB for the process, against "
            f"{low:.0f} to {high:.0f} GB. What decides is how many tokens there are at a time."
        )

    return say


def say_65b(reports: list[dict[str, Any]]) -> str:
    parts = []
    for report, name in zip(reports, ("paged", "unpaged"), strict=True):
        low, high = process(report)
        fits = {"yes": "fits", "perhaps": "may fit", "no": "does not fit"}
        parts.append(
            f"with {name} states it {fits[report['fits']['verdict']]} ({gib(report):.1f} GiB of "
            f"tensors on the card, {low:.1f} to {high:.1f} GiB in all)"
        )
    return f"On a card of 48 GB (RTX A6000, 47.5 GiB): {'; '.join(parts)}."


def say_share(reports: list[dict[str, Any]]) -> str:
    shares = [r["model"]["trained_share"] for r in reports]
    few = sum(share < 0.002 for share in shares)
    return f"These recipes train {min(shares):.2%} to {max(shares):.2%} of the weights" + (
        f"; {few} of them fewer than is claimed." if few else "."
    )


def say_file(reports: list[dict[str, Any]]) -> str:
    sizes = [r["adapter_bytes"] / 10**6 for r in reports]
    return (
        f"From {min(sizes):,.0f} to {max(sizes):,.0f} MB, in 32 bit as they are written here: "
        "about 100 MB is the order for a 7B model and a small rank, and grows with the rank."
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
    """What the plan says."""
    settings = {"model": {"path": case.model}, "output": {"dir": "-"}, **case.settings}
    settings["training"] = {"precision": "bf16", **settings["training"]}
    return plan(Recipe.model_validate(settings), device=device)


def row(case: Case, report: dict[str, Any]) -> str:
    """A recipe and its figures as a row of a table."""
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
    """Plan all of them."""
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
