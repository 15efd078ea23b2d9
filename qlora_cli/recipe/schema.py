"""The recipe: the configs of all parts and sections side by side."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from qlora_cli.adapters import AdapterConfig, LoRA
from qlora_cli.common.config import Config
from qlora_cli.data.config import Data
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.quantization import QuantizationConfig, Unquantized
from qlora_cli.objectives import ObjectiveConfig, Supervised
from qlora_cli.objectives.settings import ReferenceMode
from qlora_cli.optim.families import AdamW
from qlora_cli.optim.optimizers import OptimizerConfig
from qlora_cli.optim.schedules import Constant, ScheduleConfig
from qlora_cli.recipe.rules import RECIPE_RULES, apply_rules
from qlora_cli.recipe.sections import Evaluation, Output, Training
from qlora_cli.tasks.objective_tasks import task_of
from qlora_cli.tasks.task import Measure
from qlora_cli.types import DeviceChoice

_ROWS_BEFORE_TRAINING = 1
"""Rows per forward pass that fit any device, where training has not resolved `auto`."""


class Recipe(Config):
    """One fine-tuning run."""

    model: BaseModelConfig
    """The base model."""
    quantization: QuantizationConfig = Unquantized()
    """Format of the base weights."""
    adapter: AdapterConfig = LoRA()
    """The adapter method: which weights are trained."""
    data: Data
    """Training and evaluation data, and their preparation."""
    objective: ObjectiveConfig = Supervised()
    """The loss that training minimizes."""
    training: Training = Training()
    """The training loop."""
    optimizer: OptimizerConfig = AdamW()
    """The optimizer."""
    schedule: ScheduleConfig = Constant()
    """The learning rate as a function of the step."""
    evaluation: Evaluation = Evaluation()
    """How the result is evaluated."""
    output: Output
    """The folder and files of the run."""
    device: DeviceChoice = "auto"
    """`auto` computes on the accelerator that torch finds, or else on the CPU. A machine with a GPU
    that torch cannot use is an error; `cpu` runs on the CPU all the same."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        apply_rules(RECIPE_RULES, self)
        return self

    @property
    def reference_mode(self) -> ReferenceMode | None:
        """When the reference of the objective is computed; None if it has none."""
        return self.objective.reference_mode(trains_base=self.adapter.trains_base)

    @property
    def measures(self) -> dict[str, Measure]:
        """The measures of an evaluation by name: the loss, and those of the tasks."""
        names = self.objective_measures
        found = task_of(self.objective).measures()
        own = {measure.name: measure for measure in found if measure.name in names}
        others = (named for task in self.evaluation.tasks for named in task.named_measures())
        return {**own, **dict(others)}

    @property
    def is_chosen_by_objective(self) -> bool:
        """The best weights are those by what the objective measures in each evaluation."""
        return self.evaluation.best_by in self.objective_measures

    @property
    def objective_measures(self) -> tuple[str, ...]:
        """The names of what the objective measures in each evaluation."""
        return ("loss", *self.objective.metrics)

    def is_over(self, step: int, best_step: int | None) -> bool:
        """Return whether `training.patience` evaluations have passed since the best one."""
        patience, every = self.training.patience, self.steps_between_evaluations
        if patience is None or best_step is None:
            return False
        assert every is not None, "checked when the recipe is read"
        return (step - best_step) // every >= patience

    @property
    def steps_between_evaluations(self) -> int | None:
        """Steps between two evaluations that `training.patience` counts."""
        settings = self.training
        every = settings.eval_every if self.is_chosen_by_objective else None
        return every or settings.tasks_every

    @property
    def eval_batch_size(self) -> int:
        """Rows per forward pass in evaluation of the loss."""
        return self.evaluation.batch_size or self._training_rows

    @property
    def generation_batch_size(self) -> int:
        """Prompts per batch in generation: without a backward pass, more fit than in training."""
        return self.evaluation.generation_batch_size or 4 * self._training_rows

    @property
    def _training_rows(self) -> int:
        """Rows per forward in training. A recipe with `auto` that was never trained says 1."""
        size = self.training.micro_batch_size
        return _ROWS_BEFORE_TRAINING if size == "auto" else size
