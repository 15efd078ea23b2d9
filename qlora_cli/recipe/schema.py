"""The recipe: the parts' configs side by side, the sections without variants, and cross checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.adapters import AdapterConfig, LoRA
from qlora_cli.common.config import Config
from qlora_cli.data.config import Data
from qlora_cli.data.sources import Source
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.quantization import QuantizationConfig, Unquantized
from qlora_cli.objectives import ObjectiveConfig, Supervised
from qlora_cli.optim.families import AdamW
from qlora_cli.optim.optimizers import OptimizerConfig
from qlora_cli.optim.schedules import Constant, ScheduleConfig
from qlora_cli.tasks import Loss, TaskConfig
from qlora_cli.tasks.forgetting import GeneralText
from qlora_cli.tasks.task import Measure


def _refuse(problems: list[str]) -> None:
    """One line for each problem: the loader shows all of them, each with its place."""
    if problems:
        raise ValueError("\n".join(problems))


_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?[dhms])+")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


class SpikeDetection(Config):
    """What is done when the loss jumps and stays high."""

    factor: float = Field(3.0, gt=1)
    """A loss is high when it is above so many times the running median."""
    steps: int = Field(3, ge=1)
    """Steps in a row with a high loss that make a spike."""
    window: int = Field(50, ge=1)
    """Steps, high ones aside, of which the median is taken."""
    action: Literal["warn", "go_back"] = "warn"
    """`go_back` puts the last checkpoint in place, and passes over the rows since."""
    returns: int = Field(3, ge=1)
    """Stop when the run went back so often and jumps again."""


class Training(Config):
    """The loop. A batch is what one optimizer step learns from; a micro-batch is one forward."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Fixes adapter initialisation, order of rows and dropout."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training rows (give this or `max_steps`; neither means one pass)."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps (give this or `epochs`)."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step, over all devices."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Rows per forward, per device. `auto` is the largest divisor of `batch_size` of which
    `qlora plan` says that it fits the device (the free memory of a CPU); the run keeps it."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; null leaves them alone."""
    gradient_checkpointing: bool | Literal["mlp", "offload"] = True
    """What is computed again in the backward pass instead of being kept: all of a layer (true:
    little memory, about a third more time), its feed-forward half (`mlp`), or only what is cheap.
    `offload` is true with the inputs of layers on the host meanwhile: least memory of a CUDA card,
    and more time."""
    kernels: Literal["auto", "compiled", "fused", "plain"] = "auto"
    """Decoder layers as one function each (`fused`), also with compiled element-wise work
    (`compiled`), or as transformers has them (`plain`). `auto` compiles where a run is long enough
    to win that back."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Dtype to compute in; `auto` is bf16 where that is fast. Trained weights are fp32."""
    log_every: int = Field(1, ge=1)
    """Steps between two lines of the log."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between two evaluations; null evaluates before the first and after the last step."""
    tasks_every: int | None = Field(None, ge=1)
    """Steps between two rounds of `evaluation.tasks`; null leaves them to `qlora eval`."""
    patience: int | None = Field(None, ge=1)
    """Stop early after so many evaluations in a row without a better one; null never does."""
    save_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints; null saves after the last step alone."""
    max_bad_steps: int = Field(3, ge=1)
    """Stop after so many steps in a row whose loss or gradient is not finite. None is applied."""
    spike: SpikeDetection | None = None
    """What is done when the loss jumps; null does nothing."""

    stop_after: str | None = None
    """Save and end after the first step that is done so long after the start, such as `3h55m`
    (d, h, m, s): before a scheduler's limit. Leave time for a step and a save."""

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
        """Passes over the training rows; None when `max_steps` says how long to go on."""
        if self.max_steps is not None:
            return None
        return 1.0 if self.epochs is None else self.epochs

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.stop_after is not None and not _DURATION.fullmatch(self.stop_after):
            problems.append(
                f"training.stop_after ({self.stop_after}) is no length of time; it takes numbers "
                "with d, h, m or s, such as 3h55m"
            )
        if self.epochs is not None and self.max_steps is not None:
            problems.append(
                f"training.epochs ({self.epochs:g}) and training.max_steps ({self.max_steps}) "
                "are both given; give one of them"
            )
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            problems.append(
                f"training.batch_size ({self.batch_size}) must be a multiple of "
                f"training.micro_batch_size ({self.micro_batch_size})"
            )
        if self.spike and self.spike.action == "go_back" and self.save_every is None:
            problems.append(
                "training.spike.action (go_back) goes back to a checkpoint: give "
                "training.save_every too"
            )
        if self.patience is not None and self.eval_every is None and self.tasks_every is None:
            problems.append(
                f"training.patience ({self.patience}) counts evaluations: give training.eval_every "
                "too (or tasks_every)"
            )
        _refuse(problems)
        return self


class Evaluation(Config):
    """How the model is measured, beside its loss on `data.evaluation`."""

    tasks: list[TaskConfig] = Field([])
    """What is asked of the model beside the loss, by `qlora eval`."""
    limit: int | None = Field(None, ge=1)
    """Ask only about the first rows; the loss is always over all of them."""
    batch_size: int | None = Field(None, ge=1)
    """Rows per forward for the loss; null takes `training.micro_batch_size` (1 where that is `auto`
    and nothing has been trained)."""
    generation_batch_size: int | None = Field(None, ge=1)
    """Prompts answered at once; null takes four times `training.micro_batch_size` (4 where that is
    `auto` and nothing has been trained)."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest generated answer."""
    forgetting: GeneralText | None = None
    """General text: `qlora eval` then tells what was lost, by its perplexity before and after, and
    by the divergence from the base (KL) on held-out prompts."""
    best_by: str = "loss"
    """What decides which weights of a run are the best: `loss`, or the name of a task (of one of
    its measures: `task.measure`)."""


class Output(Config):
    """What is written, and where."""

    dir: str = Field(min_length=1)
    """Folder of the run."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    trackers: list[Literal["tensorboard"]] = Field([])
    """Besides the console and metrics.jsonl."""


_ROWS_BEFORE_TRAINING = 1
"""Rows per forward that fit any device, where `auto` has not been resolved by training."""

_OWN_TASKS = ("loss", "forgetting", "kl")
"""What `qlora eval` measures without being told to."""


class Recipe(Config):
    """One fine-tuning run."""

    model: BaseModelConfig
    """The base model."""
    quantization: QuantizationConfig = Unquantized()
    """How the base weights are held."""
    adapter: AdapterConfig = LoRA()
    """What is trained."""
    data: Data
    """What is learnt."""
    objective: ObjectiveConfig = Supervised()
    """What training minimizes."""
    training: Training = Training()
    """The loop."""
    optimizer: OptimizerConfig = AdamW()
    """The optimizer."""
    schedule: ScheduleConfig = Constant()
    """The learning rate over the steps."""
    evaluation: Evaluation = Evaluation()
    """How the result is measured."""
    output: Output
    """Where it is written."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if reason := self.adapter.no_quantization.get(self.quantization.type):
            problems.append(
                f"adapter.type ({self.adapter.type}) cannot train quantization.type "
                f"({self.quantization.type}): {reason}; use "
                "quantization.type none, or adapter.type lora"
            )
        if self.data.packing and self.adapter.no_packing:
            problems.append(
                f"adapter.type ({self.adapter.type}) cannot train on data.packing (true): "
                f"{self.adapter.no_packing}; use data.packing false"
            )
        if self.optimizer.is_schedule_free and self.adapter.no_averaging:
            problems.append(
                f"adapter.type ({self.adapter.type}) and optimizer.type ({self.optimizer.type}) do "
                f"not go together: {self.adapter.no_averaging}; use optimizer.type adamw"
            )
        held_by, held = self.quantization.held_in
        if self.training.precision == "fp32" and held in ("bfloat16", "float16"):
            problems.append(
                f"training.precision (fp32) and quantization.{held_by} ({held}) do not mix: "
                "weights of 16 bit are multiplied in 16 bit; use training.precision auto, or "
                f"quantization.{held_by} auto"
            )
        if self.optimizer.is_schedule_free and self.schedule.decays:
            problems.append(
                f"optimizer.type ({self.optimizer.type}) averages the weights in place of a "
                f"schedule.type ({self.schedule.type}) that falls; use schedule.type constant "
                "(with warm-up, if you like)"
            )
        tasks = self.evaluation.tasks
        if not self.data.evaluation_sources and any(task.data is None for task in tasks):
            problems.append("evaluation.tasks needs data.evaluation: rows to answer")
        names = [*_OWN_TASKS, *(task.label for task in tasks)]
        if twice := {name for name in names if names.count(name) > 1}:
            problems.append(
                f"evaluation.tasks: {', '.join(sorted(twice))} is there twice; give one of them "
                f"another name ({', '.join(_OWN_TASKS)} are there by themselves)"
            )
        if self.evaluation.best_by not in self.measures:
            problems.append(
                f"evaluation.best_by ({self.evaluation.best_by}) is no measure of a task; it takes "
                f"one of {', '.join(self.measures)}"
            )
        elif self.evaluation.best_by != "loss" and self.training.tasks_every is None:
            problems.append(
                f"evaluation.best_by ({self.evaluation.best_by}) needs training.tasks_every: a "
                "task is not asked during training otherwise"
            )
        elif (
            self.training.patience is not None
            and self.evaluation.best_by == "loss"
            and not self.data.evaluation_sources
        ):
            problems.append(
                f"training.patience ({self.training.patience}) goes by the loss on "
                "data.evaluation, which is missing"
            )
        problems += self._weights_without_effect()
        _refuse(problems)
        return self

    def _weights_without_effect(self) -> Iterator[str]:
        """Rows that are measured are each read once, whatever their weight says."""
        held_out, asked = self.data.evaluation, self.evaluation.tasks
        several = held_out if isinstance(held_out, list) else []
        sources: dict[str, Source | None] = {
            **({} if isinstance(held_out, list) else {"data.evaluation": held_out}),
            **{f"data.evaluation[{i}]": source for i, source in enumerate(several)},
            **{f"evaluation.tasks[{i}].data": task.data for i, task in enumerate(asked)},
            "evaluation.forgetting": self.evaluation.forgetting,
        }
        for name, source in sources.items():
            if source is not None and source.weight != 1:
                yield (
                    f"{name}.weight ({source.weight:g}) would change nothing: rows that are "
                    "measured are each read once; leave it out, or give it to a source in "
                    "data.train"
                )

    @property
    def measures(self) -> dict[str, Measure]:
        """What a model is measured by, by its name: the loss, and all that tasks count."""
        tasks = [Loss(), *self.evaluation.tasks]
        return {name: measure for task in tasks for name, measure in task.named_measures()}

    def is_over(self, step: int, best_step: int | None) -> bool:
        """Whether `training.patience` is at its end: so many evaluations since the best one."""
        settings = self.training
        every = settings.eval_every if self.evaluation.best_by == "loss" else None
        every = every or settings.tasks_every
        if settings.patience is None or best_step is None:
            return False
        assert every is not None, "checked when the recipe is read"
        return (step - best_step) // every >= settings.patience

    @property
    def eval_batch_size(self) -> int:
        """Rows per forward when the loss is measured."""
        return self.evaluation.batch_size or self._training_rows

    @property
    def generation_batch_size(self) -> int:
        """Prompts answered at once: without a backward pass more of them fit than in training."""
        return self.evaluation.generation_batch_size or 4 * self._training_rows

    @property
    def _training_rows(self) -> int:
        """Rows per forward in training. A recipe with `auto` that was never trained says 1."""
        size = self.training.micro_batch_size
        return _ROWS_BEFORE_TRAINING if size == "auto" else size
