"""The sections of a recipe that have no variants: training, evaluation, output."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.common.config import Config, UserPath
from qlora_cli.recipe.rules import TRAINING_RULES, apply_rules
from qlora_cli.tasks import TaskConfig
from qlora_cli.tasks.forgetting import GeneralText

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


class SpikeDetection(Config):
    """Action when the loss jumps and stays high."""

    factor: float = Field(3.0, gt=1)
    """A loss above this multiple of the running median is high."""
    steps: int = Field(3, ge=1)
    """Consecutive steps with a high loss that count as a spike."""
    window: int = Field(50, ge=1)
    """Window of normal steps for the running median."""
    action: Literal["warn", "go_back"] = "warn"
    """`go_back` restores the last checkpoint and skips the rows since."""
    returns: int = Field(3, ge=1)
    """Maximum number of rollbacks before the run stops."""


class Training(Config):
    """The training loop. A batch is one optimizer step; a micro-batch is one forward pass."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of adapter initialisation, row order and dropout."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training rows. Give this or `max_steps`; without both it is one pass."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step, over all devices."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Rows per forward pass and device. `auto` is the largest divisor of `batch_size` that
    `qlora plan` predicts to fit the device (on a CPU, its free memory). The run records it."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum gradient norm; larger gradients are scaled down. null turns clipping off."""
    gradient_checkpointing: bool | Literal["mlp", "offload"] = True
    """Activations that the backward pass recomputes instead of keeping: those of the whole layer
    (true: little memory, about a third more time), of its feed-forward half (`mlp`), or only of
    cheap operations (false). `offload` is true plus the layers' inputs in host memory: least GPU
    memory, and more time."""
    kernels: Literal["auto", "compiled", "fused", "plain"] = "auto"
    """`fused` runs each decoder layer as one function, `compiled` also compiles its element-wise
    work, and `plain` uses the layers of transformers. `auto` compiles if the run is long enough to
    gain more time than compiling takes."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Dtype of computation; `auto` is bf16 where that is fast. Trained weights are fp32."""
    log_every: int = Field(1, ge=1)
    """Steps between two log lines."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between two evaluations; null evaluates before the first and after the last step."""
    tasks_every: int | None = Field(None, ge=1)
    """Steps between two rounds of `evaluation.tasks`; null leaves tasks to `qlora eval`."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a new best one; null never stops early."""
    save_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints; null saves only after the last step."""
    max_bad_steps: int = Field(3, ge=1)
    """Stop after this many steps in a row with a loss or gradient that is not finite. Such steps
    never change the weights."""
    spike: SpikeDetection | None = None
    """Action when the loss jumps; null does nothing."""

    stop_after: str | None = None
    """Save and stop after the first step that ends this long after the start, such as `3h55m`
    (d, h, m, s). Use it to stop before a scheduler's time limit; allow time for a step and a
    save."""

    @property
    def stop_after_seconds(self) -> float | None:
        """`stop_after` in seconds."""
        if self.stop_after is None:
            return None
        parts = re.findall(r"([0-9.]+)([dhms])", self.stop_after)
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)

    @property
    def fixed_micro_batch_size(self) -> int:
        """`micro_batch_size`, where `auto` has been resolved to a number."""
        assert self.micro_batch_size != "auto", "resolved before anything is built"
        return self.micro_batch_size

    @property
    def passes(self) -> float | None:
        """Passes over the training rows; None when `max_steps` sets the length of the run."""
        if self.max_steps is not None:
            return None
        return 1.0 if self.epochs is None else self.epochs

    @model_validator(mode="after")
    def _check(self) -> Self:
        apply_rules(TRAINING_RULES, self)
        return self


class Evaluation(Config):
    """Evaluation of the model, in addition to its loss on `data.evaluation`."""

    tasks: list[TaskConfig] = Field([])
    """Tasks that `qlora eval` runs in addition to the loss."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows for tasks; the loss is always over all rows."""
    batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass for the loss; null takes `training.micro_batch_size` (1 where that is
    `auto` and nothing has been trained)."""
    generation_batch_size: int | None = Field(None, ge=1)
    """Prompts per batch in generation; null takes four times `training.micro_batch_size` (4 where
    that is `auto` and nothing has been trained)."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum tokens of a generated answer."""
    forgetting: GeneralText | None = None
    """General text with which `qlora eval` measures forgetting: the perplexity before and after
    training, and the divergence from the base (KL) on held-out prompts."""
    best_by: str = "loss"
    """Measure that selects a run's best weights: `loss`, a task's name, or one of its measures
    (`task.measure`)."""


class Output(Config):
    """Files that a run writes."""

    dir: UserPath = Field(min_length=1)
    """Folder of the run."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    trackers: list[Literal["tensorboard"]] = Field([])
    """Trackers in addition to the console and metrics.jsonl."""
