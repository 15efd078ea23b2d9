"""Plan and measure one QLoRA step of a 7B-shaped model on this machine's CPU.

    python -m benchmarks.plan_7b

The weights are random. Each is made in 16 bits, quantized and dropped before the next, so the model
is never whole in 16 bits. Needs about 7 GiB of memory. Writes plan_7b.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plan_validation import (
    MIB,
    STAGES,
    error,
    peaks_of,
    predict,
    recipe_of,
    take,
    warm_up,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODEL, LENGTH = "meta-llama/Llama-2-7b-hf", 128
RUN: dict[str, Any] = {
    "model": MODEL, "quantization": "nf4", "adapter": "lora", "rows": 1, "length": LENGTH,
    "checkpointing": True, "optimizer": "adamw", "packing": False, "precision": "bf16",
    "kernels": "fused", "micro_batches": 1,
}  # fmt: skip


def make_quantized(config: PretrainedConfig, load_options: dict[str, Any]) -> PreTrainedModel:
    """Make a model of random weights as loading would; frozen, in training mode."""
    import torch
    from torch import nn

    from qlora_cli._compat import keep_4bit_weights_trainable
    from qlora_cli.plan.trace.meta_model import build_quantized_meta_model

    torch.manual_seed(0)
    model = build_quantized_meta_model(config, load_options)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            weight = torch.empty(parameter.shape, dtype=load_options["dtype"]).normal_(std=0.02)
            kind = type(parameter)
            made: Any = torch.Tensor._make_subclass(kind, weight)
            if kind is not nn.Parameter:
                made.__dict__.update(parameter.__dict__)
                made = made._quantize("cpu")
            module._parameters[key] = made
    # What is computed from the config alone was made without data.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    keep_4bit_weights_trainable(model)
    return model.train()


def page(found: dict[str, Any]) -> str:
    """Write the figures as a page."""
    rows = [
        f"| {stage} | {found['predicted'][stage] / MIB:,.1f} | {found['counted'][stage] / MIB:,.1f}"
        f" | {error(found, stage):+.4%} |"
        for stage in STAGES
    ]
    above = found["resident"] - max(found["predicted"].values())
    lines = [
        "<!-- Written by benchmarks/plan_7b.py; run that instead of editing. -->",
        "# One real step of a 7B-shaped model",
        "",
        f"{MODEL}'s dimensions with random weights, in NF4 with double quantization; LoRA on all",
        f"linear layers; one row of {LENGTH} tokens, checkpointing, AdamW. On a CPU.",
        "",
        "```bash",
        "python -m benchmarks.plan_7b",
        "```",
        "",
        "| stage | predicted MiB | counted MiB | error |",
        "|---|---|---|---|",
        *rows,
        "",
        f"The resident set rose by {found['resident'] / MIB:,.1f} MiB from the first weight to the",
        f"peak of the step: {above / MIB:+,.1f} MiB above the prediction, "
        f"{above / max(found['predicted'].values()):+.2%}.",
        f"The trace took {found['seconds_of_trace']} s.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the step, then plan it."""
    from qlora_cli._compat import quiet_libraries
    from qlora_cli.distributed.devices import find_target
    from qlora_cli.plan.estimate import compute_dtype
    from qlora_cli.plan.rows import assume_rows
    from qlora_cli.plan.trace.libraries import load_libraries

    quiet_libraries()
    load_libraries()
    recipe = recipe_of(RUN, MODEL)
    config, _ = recipe.model.read_config()
    dtype = compute_dtype(recipe, find_target("cpu"))
    rows = assume_rows(recipe, "a benchmark", padding_free=True)
    warm_up(RUN, dtype)
    resident, _, count = take(
        recipe, dtype, rows,
        load=lambda: make_quantized(config, recipe.quantization.load_options(dtype)),
    )  # fmt: skip
    found = {"resident": resident, "counted": peaks_of(count), **predict(recipe, dtype, rows)}
    text = page(found)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
