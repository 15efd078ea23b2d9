"""Ten steps of each of TRL's preference trainers, as references: `python trl_runs.py JOB.json`.

It imports nothing of this project, so that it can run in an environment of its own with TRL and
PEFT. The job names a model, an adapter to start from and the cases to train; the losses, tokens and
weights of each case go into a folder of its name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

KINDS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOConfig, DPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
    "cpo": (CPOConfig, CPOTrainer),
    "reward": (RewardConfig, RewardTrainer),
}

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")
"""Columns of token ids in the prepared rows of the trainers in `trl` itself."""


def recording(trainer: Any) -> Any:
    """Return the trainer class with the loss of each micro-batch in `losses`, not rounded."""

    class Recording(trainer):  # type: ignore[misc]  # chosen at run time
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses = [*getattr(self, "losses", []), loss.item()]
            return loss

    return Recording


def train(job: dict[str, Any], name: str, case: dict[str, Any]) -> None:
    """Train one case and write `result.json` and `weights.safetensors`.

    The reference of `"reference": "adapter"` is the adapter that training starts from; that of
    `"base"` is the base model.
    """
    config_class, trainer_class = KINDS[case["trainer"]]
    folder = Path(job["folder"]) / name
    args = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        adam_epsilon=job["eps"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_length=job["max_length"],
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **case["settings"],
    )
    rows = [json.loads(line) for line in Path(case["rows"]).read_text("utf-8").splitlines()]
    model = (
        AutoModelForSequenceClassification.from_pretrained(
            job["model"], dtype=torch.float32, num_labels=1
        )
        if case["trainer"] == "reward"
        else AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    )
    settings: dict[str, Any] = {}
    if case.get("reference") == "adapter":
        model = PeftModel.from_pretrained(model, case["adapter"], is_trainable=True)
    else:
        settings["peft_config"] = LoraConfig.from_pretrained(case["adapter"])
        settings["peft_config"].inference_mode = False
    trainer = recording(trainer_class)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        **settings,
    )
    if "peft_config" in settings:
        found = load_peft_weights(case["adapter"], device="cpu")
        loaded = set_peft_model_state_dict(trainer.model, found)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
    trainer.train()
    made = trainer.train_dataset
    seen = [column for column in made.column_names if column in COLUMNS]
    result = {"losses": trainer.losses, "rows": made.select_columns(seen).to_list() if seen else []}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    trained = {
        name: parameter.detach().contiguous()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    save_file(trained, folder / "weights.safetensors")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name, case in job["cases"].items():
        train(job, name, case)


if __name__ == "__main__":
    main()
