"""A model under examination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli.common.progress import Progress
from qlora_cli.data.batching.sampler import eval_batches
from qlora_cli.distributed.world import World
from qlora_cli.evaluate.bootstrap import columns
from qlora_cli.inference.sampling import Sampling, answers
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.task import TaskPrompts
from qlora_cli.types import IGNORE_INDEX, Example, Prompt

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    Column = NDArray[float64]


class ModelScorer:
    """A model that answers the questions of tasks (`Examinee`), each question once.

    Args:
        name: of the model, for the log.
        as_base: gives the base of a tuned model for a while; None for a base itself.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        dtype: torch.dtype,
        world: World,
        as_base: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.name = name
        self._as_base = as_base
        self._model = model
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._world = world
        self._written: dict[tuple[int, ...], str] = {}

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        """The greedy answer to each prompt."""
        keys = [tuple(prompt.input_ids) for prompt in prompts]
        new = dict(zip(keys, prompts, strict=True))
        waiting = [key for key in new if key not in self._written]
        progress = Progress(f"{self.name}: answers", len(waiting))
        for index, found in answers(
            self._model,
            [new[key] for key in waiting],
            self._tokenizer,
            stop_token_ids=self._model.generation_config.eos_token_id,
            sampling=Sampling(max_new_tokens=self._recipe.evaluation.max_new_tokens),
            batch_size=self._recipe.generation_batch_size,
            dtype=self._dtype,
            device=self._world.device,
        ):
            self._written[waiting[index]] = found.text
            progress.add(1)
        return [self._written[key] for key in keys]

    def log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """For each example, the sum of log p over its supervised tokens, in nats."""
        objective = TokenLoss(self._model, self._dtype)
        was_training = objective.training
        objective.eval()
        found = [0.0] * len(examples)
        # Options of one token differ in the last alone, which no state depends on: one forward.
        same: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(examples):
            same.setdefault(tuple(example.input_ids[:-1]), []).append(i)
        # Where no two rows begin alike, the very batches of the training's evaluation, so that it
        # finds the very same loss.
        order = sorted(same.values(), key=lambda group: (-len(examples[group[0]].labels), group))
        progress = Progress(f"{self.name}: likelihoods", len(examples))
        size = self._recipe.eval_batch_size
        for start in range(0, len(order), size):
            groups = order[start : start + size]
            [batch] = eval_batches(
                [examples[group[0]] for group in groups],
                batch_size=size,
                pad_token_id=self._tokenizer.pad_token_id,
            )
            indices = [i for group in groups for i in group]
            rows = torch.tensor([row for row, group in enumerate(groups) for _ in group])
            labels = torch.full((len(indices), batch.labels.shape[1]), IGNORE_INDEX)
            for at, i in enumerate(indices):
                labels[at, : len(examples[i].labels)] = torch.tensor(examples[i].labels)
            losses = objective.of_labels(batch.to(self._world.device), labels, rows)
            for i, loss in zip(indices, losses.tolist(), strict=True):
                found[i] = -loss
            progress.add(len(indices))
        objective.train(was_training)
        return found

    @torch.no_grad()
    def divergences(self, examples: Sequence[Example]) -> list[float]:
        """For each example, the sum over all positions of KL(base || model), in nats."""
        if self._as_base is None:
            return [0.0] * len(examples)
        progress = Progress(f"{self.name}: divergence from the base", len(examples))
        found = []
        # One by one: the distributions of a batch over a large vocabulary would fill the memory.
        for example in examples:
            ids = torch.tensor([example.input_ids], device=self._world.device)  # (1, T)
            q = self._log_probabilities(self._model, ids)
            with self._as_base() as base:
                p = self._log_probabilities(base, ids)
            found.append(float((p.exp() * (p - q)).sum(dtype=torch.float64)))
            progress.add(1)
        return found

    def _log_probabilities(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Of the next token at each position, (T, V) in float32."""
        was_training = model.training
        model.eval()
        with torch.autocast(ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        model.train(was_training)
        return torch.log_softmax(logits.float(), -1)


def ask(exam: TaskPrompts, scorer: ModelScorer, world: World) -> dict[str, float]:
    """The measures of all tasks by their names. Each rank asks a share of the questions."""
    found: dict[str, float] = {}
    for task, questions in exam:
        mine = list(range(world.rank, len(questions), world.size))
        # A rank with nothing to ask still learns the names of the values.
        outcomes = task.examine(scorer, [questions[i] for i in mine or [0]])
        values = {
            name: _of_all(column[: len(mine)], mine, len(questions), world)
            for name, column in columns(outcomes).items()
        }
        found |= {name: float(one.aggregate(values)) for name, one in task.named_measures()}
    return found


def _of_all(values: Column, rows: list[int], number: int, world: World) -> Column:
    """The values of all ranks (n,), from those of the rows of this one."""
    whole = torch.zeros(number, dtype=torch.float64)
    whole[rows] = torch.from_numpy(values)
    column: Column = world.sum(whole.to(world.device)).cpu().numpy()
    return column
