"""Evaluate a model while it trains, and keep its best weights."""

from __future__ import annotations

import math
from contextlib import nullcontext

from qlora_cli.common.signals import StopSignals
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.errors import Interrupted, TrainingError
from qlora_cli.evaluate.scorer import ModelScorer, score_tasks
from qlora_cli.loop.fit import is_due
from qlora_cli.loop.run_data import RunData
from qlora_cli.loop.setup import Batches, Setup, evaluation_batches
from qlora_cli.objectives.base import evaluate_objective
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.head_tasks import scored_items
from qlora_cli.tasks.objective_tasks import task_of
from qlora_cli.train.saver import CheckpointManager
from qlora_cli.types import TrainState


class RunEvaluator:
    """Evaluate the model of a run: its loss on the evaluation rows, and its tasks."""

    def __init__(
        self,
        setup: Setup[Batches],
        data: RunData,
        recipe: Recipe,
        saver: CheckpointManager,
        stop: StopSignals,
    ) -> None:
        self._setup = setup
        self._data = data
        self._recipe = recipe
        self._saver = saver
        self._stop = stop

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Evaluate, and keep the weights if they are the best so far.

        A signal ends the evaluation; the metrics are empty then, and a resumed run repeats it.

        Raises:
            TrainingError: the loss is not finite, or the weights cannot be written.
        """
        with self._saver.rescuing(state):
            try:
                # Several processes must not leave an evaluation at different points.
                is_alone = self._setup.world.size == 1
                with (
                    self._recipe.optimizer.evaluation_weights(self._setup.optimizer),
                    self._stop.at_once() if is_alone else nullcontext(),
                ):
                    metrics = {**self._measure_loss(), **self._run_tasks(state)}
            except Interrupted:
                return {}
            self._saver.keep_best(metrics, state)
            return metrics

    def _measure_loss(self) -> dict[str, float]:
        """Return loss and metrics, each the mean over what the objective's weight counts."""
        rows, world, objective = self._data.evaluation, self._setup.world, self._setup.objective
        if rows is None:
            return {}
        if self._recipe.objective.head is None:
            batches = evaluation_batches(self._recipe, rows, self._data.tokenizer, world)
            found = evaluate_objective(objective, batches, world.device, world.sum)
        else:
            found = self._measure_head(rows)
        loss = found["loss"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss on the evaluation rows is {loss}: the weights are useless"
            )
        if objective.has_perplexity:
            found["perplexity"] = math.exp(min(loss, 700.0))
        return {f"eval_{name}": value for name, value in found.items()}

    def _measure_head(self, rows: PreparedData) -> dict[str, float]:
        """Return the loss and the measures of a head; one that is not defined is left out."""
        task = task_of(self._recipe.objective)
        found = score_tasks([(task, scored_items(rows))], self._scorer(), self._setup.world)
        named = {measure.name: found[name] for name, measure in task.named_measures()}
        return {name: one for name, one in named.items() if name == "loss" or math.isfinite(one)}

    def _scorer(self) -> ModelScorer:
        setup = self._setup
        return ModelScorer(
            "tasks",
            setup.model,
            self._recipe,
            self._data.tokenizer,
            setup.objective.dtype,
            setup.world,
        )

    def _run_tasks(self, state: TrainState) -> dict[str, float]:
        """Run the tasks every `training.tasks_every` steps, and after the last one."""
        setup, every = self._setup, self._recipe.training.tasks_every
        is_last = state.step == setup.max_steps and every is not None
        if not (is_due(every, state.step) or is_last):
            return {}
        found = score_tasks(self._data.tasks, self._scorer(), setup.world)
        return {f"eval_{name}": value for name, value in found.items()}
