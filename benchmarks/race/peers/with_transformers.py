"""The race's work by a plain loop of transformers and PEFT: `with_transformers.py JOB`.

In float32 it is the reference for the losses: the same 4-bit base, everything computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lines import Lines, read_job, read_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

Row = dict[str, list[int]]


def main() -> None:
    job = read_job()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    rows = read_rows(job)
    lines = Lines(job)
    model = build(job, dtype)
    lines.loaded(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    size = job["rows_per_step"]
    steps = [rows[at : at + size] for at in range(0, len(rows), size)]
    for number, step in enumerate(steps):
        num_supervised = sum(label != -100 for row in step for label in row["labels"][1:])
        loss = 0.0
        for micro_batch in chunks(step, job["micro_batch"]):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                micro_loss = loss_sum(model, micro_batch) / num_supervised
            micro_loss.backward()
            loss += micro_loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = job["learning_rate"] * (1 - number / len(steps))
        optimizer.step()
        optimizer.zero_grad()
        lines.step(loss, step)


def build(job: dict[str, Any], dtype: torch.dtype) -> Any:
    """Load the 4-bit base and attach a new float32 adapter."""
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        device_map={"": "cpu"},
    )
    torch.manual_seed(job["seed"])  # the same adapter as everybody's
    config = LoraConfig(
        r=job["r"],
        lora_alpha=job["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).train()


def chunks(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def loss_sum(model: Any, rows: list[Row]) -> torch.Tensor:
    """Sum the cross-entropy of the supervised tokens, with logits only at their positions."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask, labels = (
        torch.tensor([part(row) + [fill] * (width - len(row["input_ids"])) for row in rows])
        for part, fill in (
            (lambda row: row["input_ids"], 0),
            (lambda row: [1] * len(row["input_ids"]), 0),
            (lambda row: row["labels"], -100),
        )
    )  # each (B, T)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    base = model.get_base_model()
    hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    keep = targets != -100
    logits = base.lm_head(hidden[keep]).float()  # (N, V)
    return F.cross_entropy(logits, targets[keep], reduction="sum")


if __name__ == "__main__":
    main()
