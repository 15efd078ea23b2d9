"""The race's work by TRL's SFTTrainer. Runs in an environment with TRL: `with_trl.py JOB`."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from lines import Lines, packs_per_step, read_job, read_rows, trainer_callback
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job = read_job()
    rows = read_rows(job)
    options: dict[str, Any] = {"max_length": max(1024, job["max_length"])} | job["sft"]
    rows_per_step, micro_batch = job["rows_per_step"], job["micro_batch"]
    if options.get("packing"):
        # A row of the trainer is then a pack: one a forward, and about as many tokens in a step.
        rows_per_step = packs_per_step(rows, rows_per_step, options["max_length"])
        micro_batch = 1
    config = SFTConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows_per_step // micro_batch,
        num_train_epochs=1,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=job["seed"],
        **options,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        device_map={"": "cpu"},
        attn_implementation=job.get("attention"),
    )
    torch.manual_seed(job["seed"])  # the same adapter as everybody's
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(
            r=job["r"],
            lora_alpha=job["alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    if job.get("float32_adapter"):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    made = trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()
    trainer.add_callback(trainer_callback(Lines(job), made, rows_per_step))
    trainer.train()


if __name__ == "__main__":
    main()
