"""Pairs, trained by TRL's DPOTrainer. Runs in an environment with TRL: `with_trl_dpo.py JOB`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lines import Lines, read_job, trainer_callback
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    job = read_job()
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    is_bf16 = job["precision"] == "bf16"
    config = DPOConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["rows_per_step"] // job["micro_batch"],
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="linear",
        beta=job["beta"],
        max_length=job["max_length"],
        bf16=is_bf16,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=job["seed"],
        **job["dpo"],
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.bfloat16 if is_bf16 else torch.float32
        ),
        args=config,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(
            r=job["r"],
            lora_alpha=job["alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    rows = [row for pair in trainer.train_dataset for row in both(pair)]
    callback = trainer_callback(Lines(job), rows, 2 * job["rows_per_step"])
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model(job["adapter"])


def both(pair: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Return tokens and labels of the two answers of a pair."""
    prompt = pair["prompt_ids"]
    return [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for answer in (pair["chosen_ids"], pair["rejected_ids"])
    ]


if __name__ == "__main__":
    main()
