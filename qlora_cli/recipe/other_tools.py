"""Keys of other tools: what they are called here, or what to do instead."""

from __future__ import annotations

OTHER_NAMES = {
    "lr": "learning_rate",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "load_in_4bit": "quantization.type",
    "load_in_8bit": "quantization.type",
    "dataset": "data.train.path",
    "train_on_inputs": "data.train.format",
    "seq_len": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "block_size": "max_length",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "max_norm": "max_grad_norm",
    "clip": "max_grad_norm",
    "lr_scheduler": "schedule.type",
    "lr_scheduler_type": "schedule.type",
    "warmup": "warmup_steps",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "output_dir": "output.dir",
    "report_to": "trackers",
    "attn_implementation": "attention",
    "early_stopping_patience": "patience",
    "eval_strategy": "eval_every",
    "evaluation_strategy": "eval_every",
    "flash_attention": "model.attention",
    "flash_attn": "model.attention",
    "gradient_clipping": "max_grad_norm",
    "lora_target_linear": "target_modules",
    "max_grad_value": "max_grad_norm",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "torch_compile": "kernels",
    "val_set_size": "evaluation_share",
    "val_size": "evaluation_share",
    "datasets": "data.train",
    "test_datasets": "data.evaluation",
    "eval_dataset": "data.evaluation",
    "bf16": "precision",
    "fp16": "precision",
    "tf32": "precision",
    "warmup_ratio": "warmup_steps",
}
"""Other tools' names for our keys, for "did you mean"."""

_METRICS = "metrics.jsonl of the run holds all metrics; output.trackers can add tensorboard"
_UPLOAD = "qlora uploads nothing; hf upload NAME runs/mine/last does"
_SHARDING = "torchrun starts a process for each device; weights are not sharded"
_PREFERENCE = "training is supervised; preference data can be previewed, but not trained on"
_LAYERS = "training.kernels chooses faster layers"
_TOKENS = "the vocabulary stays that of the base; adapter.trainable_token_indices trains its tokens"
_NO_PADDING = "rows are not padded where the model allows it, and sorted by length where not"

_BY_ADVICE = {
    _METRICS: (
        "comet_project_name", "mlflow_experiment_name", "mlflow_tracking_uri", "run_name",
        "use_comet", "use_wandb", "wandb_entity", "wandb_log_model", "wandb_mode", "wandb_name",
        "wandb_project", "wandb_run_id", "wandb_watch",
    ),
    _UPLOAD: ("hub_model_id", "hub_strategy", "hub_token", "push_to_hub"),
    _SHARDING: ("deepspeed", "fsdp", "fsdp_config", "tensor_parallel_size"),
    _PREFERENCE: ("dpo", "dpo_beta", "pref_beta", "pref_loss", "rl", "rl_beta", "stage"),
    _LAYERS: ("enable_liger_kernel", "liger_kernel", "use_liger_kernel", "use_unsloth"),
    _TOKENS: ("added_tokens_overrides", "resize_vocab", "special_tokens", "tokens"),
    _NO_PADDING: ("group_by_length", "pad_to_sequence_len"),
}  # fmt: skip

INSTEAD = {
    **{key: advice for advice, keys in _BY_ADVICE.items() for key in keys},
    "resume_from_checkpoint": "qlora train RECIPE --resume auto|STEP|PATH",
    "auto_resume_from_checkpoints": "qlora train RECIPE --resume auto",
    "neftune_noise_alpha": "noise on embeddings is not supported",
    "dataset_prepared_path": "prepared rows are cached in $QLORA_CACHE (qlora cache)",
    "unfrozen_parameters": "adapter: {type: freeze, patterns: [...]} trains chosen weights",
    "lora_modules_to_save": "adapter.modules_to_save",
    "gptq": "an adapter on GPTQ weights could not be merged; use quantization.type nf4",
    "overwrite_output_dir": "a run folder is never overwritten; choose another output.dir",
    "do_train": "qlora train trains",
    "do_eval": "qlora eval evaluates",
    "save_safetensors": "weights are always safetensors",
    "dataloader_num_workers": "data.workers sets the processes that prepare rows",
    "remove_unused_columns": "columns that the format does not name are ignored",
    "device_map": "qlora takes the first CUDA device, or the CPU; $CUDA_VISIBLE_DEVICES chooses",
}
"""Keys of other tools without a counterpart -> what to do instead."""
