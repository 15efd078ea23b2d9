"""A contestant that is not ours, in a process of its own: `python -m scripts.gpu.race.peer JOB`.

Imports nothing of ours but the stopwatch, and each library only for the contestant that needs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from scripts.gpu.race.stopwatch import Rows, Stopwatch

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Run the job in a file, and write its result to the file that it names."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text(encoding="utf-8"))
    contestant = {"peft": with_peft, "trl": with_trl, "unsloth": with_unsloth}[job["kind"]]
    torch.manual_seed(0)
    result = contestant(job).result()
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def quantization(job: dict[str, Any]) -> Any:
    """Return the options of bitsandbytes for the base."""
    from transformers import BitsAndBytesConfig

    if job["quantization"] == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_base(job: dict[str, Any]) -> Any:
    """Load the base as transformers does."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        quantization_config=quantization(job),
        device_map={"": job["device"]},
        attn_implementation=job.get("attention"),
    )


def lora(job: dict[str, Any]) -> Any:
    """Return the settings of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=job["r"], lora_alpha=2 * job["r"], target_modules="all-linear", task_type="CAUSAL_LM"
    )


def with_peft(job: dict[str, Any]) -> Stopwatch:
    """Train by a loop of transformers and PEFT as their guides show it, on padded rows."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    if job.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    base = load_base(job)
    again = job["checkpointing"]
    options = {"use_reentrant": False}
    if job["quantization"] != "none":
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=again, gradient_checkpointing_kwargs=options
        )
    elif again:
        base.gradient_checkpointing_enable(options)
    model = get_peft_model(base, lora(job)).train()
    return loop(job, model, base.model)


def with_unsloth(job: dict[str, Any]) -> Stopwatch:
    """Train by Unsloth's model and layers, on padded rows."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=job["model"],
        max_seq_length=max(len(row["input_ids"]) for step in job["steps"] for row in step),
        load_in_4bit=job["quantization"] != "none",
        dtype=torch.bfloat16,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["r"],
        lora_alpha=2 * job["r"],
        lora_dropout=0,
        bias="none",
        target_modules=list(_LINEARS),
        use_gradient_checkpointing="unsloth" if job["checkpointing"] else False,
    )
    return loop(job, model.train(), model.get_base_model().model)


def loop(job: dict[str, Any], model: Any, decoder: Any) -> Stopwatch:
    """Make the steps of a plain loop: forward, backward, clip, AdamW."""
    device = torch.device(job["device"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    watch = Stopwatch(decoder, device, job["timed"])
    for step in range(watch.num_steps):
        batch = padded(job["steps"][step % len(job["steps"])])
        watch.begin()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.end(loss.item())
    return watch


def padded(rows: Rows) -> dict[str, torch.Tensor]:
    """Pad rows on the right, as the collator of transformers does."""
    width = max(len(row["input_ids"]) for row in rows)

    def fill(values: list[int], value: int) -> list[int]:
        return values + [value] * (width - len(values))

    ones = [[1] * len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([fill(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([fill(one, 0) for one in ones]),
        "labels": torch.tensor([fill(row["labels"], -100) for row in rows]),
    }


def with_trl(job: dict[str, Any]) -> Stopwatch:
    """Train by TRL's SFTTrainer without padding, with its own loss or Liger's kernels."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device, size = torch.device(job["device"]), len(job["steps"][0])
    base = load_base(job)
    watch = Stopwatch(base.model, device, job["timed"])
    order = [job["steps"][step % len(job["steps"])] for step in range(watch.num_steps)]
    trainer = SFTTrainer(
        base,
        SFTConfig(
            output_dir=job["folder"],
            per_device_train_batch_size=size,
            max_steps=watch.num_steps,
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            padding_free=True,
            max_length=None,
            gradient_checkpointing=job["checkpointing"],
            bf16=True,
            use_cpu=device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_liger_kernel=bool(job.get("liger")),
        ),
        train_dataset=Dataset.from_list([row for step in order for row in step]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=lora(job),
    )

    class Timed(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.end()

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if "loss" in more["logs"]:
                watch.losses.append(float(more["logs"]["loss"]))

    trainer.add_callback(Timed())
    trainer.train()
    return watch


if __name__ == "__main__":
    main()
