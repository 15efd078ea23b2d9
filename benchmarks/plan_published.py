"""Compare the trace of a plan with published measurements of steps on GPUs.

    python benchmarks/plan_published.py

The steps are those of other tools (transformers' own loss, PEFT's preparation), built here of their
parts and traced without data by what `qlora plan` traces with, CUDA's kernels and allocator
included. Writes plan_published.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig

from qlora_cli._compat import quiet_libraries
from qlora_cli.models.known_configs import KNOWN
from qlora_cli.plan.trace.libraries import load_libraries
from qlora_cli.plan.trace.memory_counter import MemoryCounter
from qlora_cli.plan.trace.meta_model import load_traced
from qlora_cli.plan.trace.traced_tensor import TraceNewTensors

MIB = 2**20


@dataclass(frozen=True)
class Published:
    """A measurement, and the published settings of its step."""

    source: str
    card: str
    model: str
    rows: int
    length: int
    rank: int
    targets: tuple[str, ...]
    four_bit: bool
    checkpointing: bool
    mib: float
    """Measured memory."""


_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_FITCHECK = "fitcheck-llm 0.2.0, README: max_memory_allocated"
_PEFT = "PEFT method_comparison/MetaMathQA at 5d602fd: largest max_memory_reserved"

PUBLISHED = (
    *(
        Published(_FITCHECK, "T4", model, rows, length, 32, _QKVO, True, True, mib)
        for model, rows, length, mib in (
            ("TinyLlama/TinyLlama-1.1B", 2, 512, 1847),
            ("TinyLlama/TinyLlama-1.1B", 2, 1024, 2528),
            ("TinyLlama/TinyLlama-1.1B", 2, 2048, 3897),
            ("HuggingFaceTB/SmolLM2-1.7B", 4, 1024, 5281),
            ("Qwen/Qwen2.5-1.5B", 2, 1024, 6823),
        )
    ),
    *(
        Published(
            _PEFT, "L40S", "meta-llama/Llama-3.2-3B", 4, 768, rank, ("q_proj", "v_proj"),
            False, False, gb * 1e9 / MIB,
        )
        for rank, gb in ((32, 22.29), (64, 22.55))
    ),
)  # fmt: skip


def trace(one: Published) -> float:
    """Trace the MiB of tensors at the peak of the second step."""
    config = AutoConfig.for_model(**KNOWN[one.model])
    dtype = torch.float16 if one.four_bit else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if one.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    count = MemoryCounter("cuda", granularity=512, vocabulary_size=config.vocab_size)
    with count:
        with count.stage("load"):
            model: Any = load_traced(config, options, count)
            if one.four_bit:  # which holds all that is not quantized in float32
                model = prepare_model_for_kbit_training(
                    model, gradient_checkpointing_kwargs={"use_reentrant": False}
                )
            with TraceNewTensors():
                model = get_peft_model(
                    model, LoraConfig(r=one.rank, target_modules=list(one.targets))
                )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=True)
        ids = torch.ones(one.rows, one.length, dtype=torch.long)
        model.train()
        for _ in range(2):
            with count.stage("step"):
                # Kept until the next step, as a training loop that returns its outputs does.
                outputs = model(input_ids=ids, labels=ids, use_cache=False)
                outputs.loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    peak = max(p.total for s, p in count.peaks.items() if s.stage == "step")
    return peak / MIB


def page(rows: list[tuple[Published, float]]) -> str:
    """Write the comparison as a page."""
    lines = [
        "<!-- Written by benchmarks/plan_published.py; run that instead of editing. -->",
        "# Traced memory against published measurements",
        "",
        "Traced on a CPU, with the temporaries of CUDA's kernels and the allocator's granularity",
        "of 512 bytes. No constant is fitted. Settings that a source does not publish are the",
        "defaults of its tool. One of them was chosen among several, because it is not published:",
        "fitcheck's variant (PEFT's preparation, no autocast, outputs kept).",
        "",
        "The trace predicts `allocated` memory. `reserved` also includes memory that the allocator",
        "could not use. PEFT does not publish the longest batch of its runs, so the trace uses",
        "their limit of 768 tokens.",
        "",
        "| source | card | model | rows x tokens | r | predicted MiB | published MiB | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one, mib in rows:
        cells = [
            one.source, one.card, one.model, f"{one.rows} x {one.length}", str(one.rank),
            f"{mib:,.0f}", f"{one.mib:,.0f}", f"{mib / one.mib:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trace all steps."""
    quiet_libraries()
    load_libraries()
    rows = []
    for one in PUBLISHED:
        rows.append((one, trace(one)))
        print(one.model, one.rows, one.length, round(rows[-1][1]), round(one.mib), flush=True)
    Path(__file__).with_suffix(".md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
