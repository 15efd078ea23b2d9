"""The race's work by LLaMA-Factory. Runs in an environment with it: `with_llamafactory.py JOB`."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict
from lines import Lines, read_job, read_rows, trainer_callback
from llamafactory.train.tuner import run_exp


def main() -> None:
    job = read_job()
    rows = read_rows(job)
    tokens = Path(job["folder"]) / "tokens"
    made = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    DatasetDict({"train": Dataset.from_list(made)}).save_to_disk(str(tokens))
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "finetuning_type": "lora",
        "lora_rank": job["r"],
        "lora_alpha": job["alpha"],
        "lora_target": "all",
        "quantization_bit": 4,
        "quantization_type": "nf4",
        "double_quantization": True,
        # The rows come as tokens: no data set is read by name, and the template writes nothing.
        "dataset": "none",
        "tokenized_path": str(tokens),
        "template": "empty",
        "cutoff_len": job["max_length"],
        "disable_shuffling": True,
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["rows_per_step"] // job["micro_batch"],
        "num_train_epochs": 1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "linear",
        "bf16": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
        "output_dir": f"{job['folder']}/out",
        **job.get("arguments", {}),
    }
    run_exp(arguments, callbacks=[trainer_callback(Lines(job), rows, job["rows_per_step"])])


if __name__ == "__main__":
    main()
