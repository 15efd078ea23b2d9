"""Compare the trace of a plan with published measurements of steps on GPUs.

    python benchmarks/plan_published.py

The steps of the first table are those of other tools (transformers' own loss, PEFT's preparation),
built here of their parts and traced without data by what `qlora plan` traces with, CUDA's kernels
and allocator included. The second table has steps of `qlora train` for work of which another tool
publishes its own memory. Writes plan_published.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig

from qlora_cli._compat import quiet_libraries
from qlora_cli.data.batching.collate import full_batch
from qlora_cli.kernels.selection import Kernels
from qlora_cli.models.known_configs import KNOWN
from qlora_cli.plan.dry_run import STEP
from qlora_cli.plan.trace.libraries import load_libraries
from qlora_cli.plan.trace.memory_counter import (
    BATCH,
    GRADIENTS,
    HELD,
    LOGITS,
    RECOMPUTED,
    SAVED,
    WORKSPACE,
    MemoryCounter,
    Peak,
)
from qlora_cli.plan.trace.meta_model import load_traced
from qlora_cli.plan.trace.traced_tensor import TraceNewTensors
from qlora_cli.plan.traced_memory import trace_memory
from qlora_cli.recipe.schema import Recipe

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


GIB = 2**30
_QVO_MLP = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TORCHTUNE = (("LoRA", "none", 16.2), ("QLoRA", "nf4", 7.4))
"""Methods, our quantization, and GiB in torchtune's README at 7d470bf: Llama 3.1 8B on a 4090, two
rows packed to 2,048 tokens, compiled. Its default recipes have rank 8 on these modules."""


def trace_ours(quantization: str, checkpointing: bool | str, kernels: Kernels) -> Peak:
    """Trace the peak of a step of `qlora train` for torchtune's work."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": "meta-llama/Llama-3.1-8B"},
            "quantization": {"type": quantization},
            "adapter": {"type": "lora", "r": 8, "target_modules": _QVO_MLP},
            "data": {"train": {"path": "rows.jsonl"}, "max_length": 2048, "packing": True},
            "training": {"gradient_checkpointing": checkpointing, "micro_batch_size": 2},
            "output": {"dir": "run"},
        }
    )
    found = trace_memory(
        recipe,
        AutoConfig.for_model(**KNOWN[recipe.model.path]),
        torch.bfloat16,
        device="cuda",
        steps=[[full_batch(2, 2048, padding_free=True)]],
        held_out=None,
        kernels=kernels,
    )
    return found.peak(STEP)[1]


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


def page(rows: list[tuple[Published, float]], ours: list[list[str]]) -> str:
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
    lines += [
        "",
        "## Steps of ours for the work of another tool",
        "",
        "torchtune's README (at 7d470bf) lists the memory of Llama 3.1 8B on a 4090, with two rows",
        "packed to 2,048 tokens, compiled. Its default recipes have rank 8 on the modules traced",
        "here. It does not say whether activations were offloaded: its LoRA step takes 1.2 GiB",
        "more than the weights (15.0 GiB), and the inputs of 32 layers alone take 1.0 GiB.",
        "`workspace` is what one layer holds while it runs, and `held` is weights and the",
        "optimizer's states.",
        "",
        "| method | `gradient_checkpointing` | `kernels` | held GiB | saved GiB | workspace GiB "
        "| planned GiB | published GiB | published / planned |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in ours),
        "",
        *_LEFT,
    ]
    return "\n".join(lines) + "\n"


_LEFT = """\
What a layer's backward pass holds at its peak (QLoRA, MiB; T tokens):

| tensor | `compiled` | `fused` | can it go? |
|---|---|---|---|
| gate and up, T x 28,672 | 224 | | `fused` overwrites them block by block. Compiled blocks were not tried. |
| gradient of gate and up | 224 | 224 | no |
| product of gate and up, and its gradient, T x 14,336 each | 224 | | freed here by `fused` |
| weights of gate and up, dequantized into one matrix | | 224 | Two products instead of one round their sum twice: other losses. |
| queries, keys, values and attention's output | 80 | 80 | They are recomputed; freeing them would compute them a third time. |
| other states and gradients, T x 4,096 each | 96 | 64 | no |
""".splitlines()  # noqa: E501  lines of a table


def main() -> None:
    """Trace all steps."""
    quiet_libraries()
    load_libraries()
    rows = []
    for one in PUBLISHED:
        rows.append((one, trace(one)))
        print(one.model, one.rows, one.length, round(rows[-1][1]), round(one.mib), flush=True)
    ours = []
    for (method, quantization, gib), checkpointing, kernels in product(
        TORCHTUNE, (True, "offload"), get_args(Kernels)
    ):
        peak = trace_ours(quantization, checkpointing, kernels)
        kinds = [
            sum(peak.kinds.get(kind, 0) for kind in group)
            for group in (HELD, (SAVED, RECOMPUTED), (WORKSPACE, LOGITS, GRADIENTS, BATCH))
        ]
        cells = [f"{size / GIB:.1f}" for size in (*kinds, peak.total)]
        name = str(checkpointing).lower()
        ours.append([method, name, kernels, *cells, f"{gib}", f"{gib * GIB / peak.total:.2f}"])
        print(*ours[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text(page(rows, ours), encoding="utf-8")


if __name__ == "__main__":
    main()
