"""What came out: base and tuned model on the same held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_cli._compat import quiet_libraries
from qlora_cli.build import Exam, load_base, measure, read_data, read_exam
from qlora_cli.data.batches import eval_batches
from qlora_cli.data.encode import read_chat_template
from qlora_cli.data.prepare import Prepared
from qlora_cli.errors import RecipeError
from qlora_cli.generate import answer
from qlora_cli.model.base import learn_to_stop, load_tokenizer
from qlora_cli.model_card import write_cards
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss
from qlora_cli.recipe import Recipe
from qlora_cli.recipe_file import load_recipe
from qlora_cli.run_folder import RunFolder, Weights, is_run
from qlora_cli.types import Example, Prompt
from qlora_cli.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")


def evaluate(target: Path, overrides: Sequence[str] = (), *, weights: Weights) -> dict[str, Any]:
    """Measure a run (base beside tuned) or the base model of a recipe.

    Args:
        target: a run folder or a recipe.
        weights: which of the run's weights.

    Returns:
        {"target", "weights", "rows", "supervised_tokens", "models": {"base": M, "tuned": M}}, where
        M is {"loss", "perplexity", "tasks": {type: {"score", "rows"}}}.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    run = RunFolder(target) if is_run(target) else None
    recipe = load_recipe(run.recipe if run else target, overrides).recipe
    trained = run.weights(weights) if run else None
    tokenizer = (
        load_tokenizer(trained, trust_remote_code=recipe.model.trust_remote_code)
        if trained
        else recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))
    )
    sources = recipe.data.evaluation_sources
    if not sources:
        raise RecipeError(
            f"{target} has no data.evaluation",
            hint="--set data.evaluation.path=held_out.jsonl (and data.evaluation.format if it is "
            "not messages)",
        )
    held_out = read_data("evaluation", recipe.data, sources, tokenizer)
    exam = read_exam(recipe, recipe.evaluation.tasks, tokenizer)

    world = World()
    dtype = world.compute_dtype(recipe.training.precision)
    model = load_base(recipe, dtype, world.device)
    learn_to_stop(model, held_out.stop_token_ids)
    examiner = Examiner(recipe, tokenizer, held_out, exam, dtype, world)
    models = {"base": examiner.examine("base", model)}
    if trained:
        models["tuned"] = examiner.examine("tuned", recipe.adapter.load(model, trained))
    report = {
        "target": str(target),
        "weights": weights if trained else None,
        "rows": len(held_out.examples),
        "supervised_tokens": held_out.num_supervised,
        "models": models,
    }
    if run and not overrides:
        # With overrides it is a measurement of something else, and belongs to whoever asked.
        run.update_record(evaluation=report)
        write_cards(run)
    return report


class Examiner:
    """Asks each model the same questions."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        held_out: Prepared,
        exam: Exam,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._held_out = held_out
        self._exam = exam
        self._dtype = dtype
        self._world = world

    def examine(self, name: str, model: Any) -> dict[str, Any]:
        """Loss, perplexity and the score of each task."""
        metrics = measure(
            TokenLoss(model, self._dtype),
            self._held_out,
            self._tokenizer,
            self._recipe.eval_batch_size,
            self._world,
        )
        log.info("%s: loss %.4f", name, metrics["eval_loss"])
        return {
            "loss": metrics["eval_loss"],
            "perplexity": metrics["eval_perplexity"],
            "tasks": self._tasks(name, model),
        }

    def _tasks(self, name: str, model: Any) -> dict[str, dict[str, Any]]:
        respondent = Respondent(model, self._recipe, self._tokenizer, self._dtype, self._world)
        results: dict[str, dict[str, Any]] = {}
        for task, questions in self._exam:
            log.info("%s: %s, %d questions", name, task.label, len(questions))
            outcomes = task.examine(respondent, questions)
            values = {
                key: np.array([outcome.values[key] for outcome in outcomes])
                for key in outcomes[0].values
            }
            measure, *_ = task.measures()
            results[task.label] = {
                "score": float(measure.aggregate(values)),
                "rows": len(outcomes),
            }
        return results


class Respondent:
    """A model that answers the questions of tasks, each question once."""

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._world = world
        self._written: dict[tuple[int, ...], str] = {}

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        """The greedy answer to each prompt."""
        keys = [tuple(prompt.input_ids) for prompt in prompts]
        new = {
            key: prompt
            for key, prompt in zip(keys, prompts, strict=True)
            if key not in self._written
        }
        answers = answer(
            self._model,
            list(new.values()),
            self._tokenizer,
            stop_token_ids=self._model.generation_config.eos_token_id,
            max_new_tokens=self._recipe.evaluation.max_new_tokens,
            batch_size=self._recipe.generation_batch_size,
            dtype=self._dtype,
            device=self._world.device,
        )
        self._written |= dict(zip(new, answers, strict=True))
        return [self._written[key] for key in keys]

    def log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """For each example, the sum of log p over its supervised tokens, in nats."""
        objective = TokenLoss(self._model, self._dtype)
        return [
            -float(
                evaluate_loss(
                    objective,
                    eval_batches(
                        [example], batch_size=1, pad_token_id=self._tokenizer.pad_token_id
                    ),
                    self._world.device,
                )[0]
            )
            for example in examples
        ]
