"""Score a model on tasks: generated answers, likelihoods and divergence from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.common.progress import Progress
from qlora_cli.data.batching.sampler import eval_batches
from qlora_cli.distributed.world import World
from qlora_cli.evaluate.bootstrap import value_columns
from qlora_cli.inference.sampling import Sampling, TextGenerator
from qlora_cli.models.head_scores import score_rows
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.task import TaskItems
from qlora_cli.types import IGNORE_INDEX, Example, Prompt

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    Column = NDArray[float64]


class ModelScorer:
    """A model behind the `Scorer` protocol of tasks. It generates once for each distinct prompt.

    Args:
        name: name of the model in the log.
        as_base: switches a tuned model to its base for the length of a `with` block; None for a
            base itself.
        as_start: the same with the model that training started from, a base with an adapter after
            a warm start; None takes `as_base`.
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
        as_start: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.name = name
        self._as_base = as_base
        self._as_start = as_start or as_base
        self._model = model
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._world = world
        self._generated: dict[tuple[int, ...], str] = {}
        self._last: tuple[Sequence[Example], list[float]] = ([], [])
        """The last examples whose likelihoods were computed, and those."""

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the greedy answer to each prompt."""
        keys = [tuple(prompt.input_ids) for prompt in prompts]
        new = dict(zip(keys, prompts, strict=True))
        waiting = [key for key in new if key not in self._generated]
        progress = Progress(f"{self.name}: answers", len(waiting))
        generator = TextGenerator(
            self._model,
            self._tokenizer,
            self._model.generation_config.eos_token_id,
            self._dtype,
            self._world.device,
        )
        for index, found in generator.complete(
            [new[key] for key in waiting],
            Sampling(max_new_tokens=self._recipe.evaluation.max_new_tokens),
            batch_size=self._recipe.generation_batch_size,
        ):
            self._generated[waiting[index]] = found.text
            progress.add(1)
        return [self._generated[key] for key in keys]

    def reference_log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """Return the same for the model that training started from; for a base, its own."""
        if self._as_start is None:
            of, likelihoods = self._last
            return likelihoods if of is examples else self.log_likelihoods(examples)
        with self._as_start() as start:
            return self._log_likelihoods(start, examples)

    def log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """Return the sum of log p over the supervised tokens of each example, in nats."""
        self._last = examples, self._log_likelihoods(self._model, examples)
        return self._last[1]

    def _log_likelihoods(self, model: Any, examples: Sequence[Example]) -> list[float]:
        objective = TokenLoss(model, self._dtype)
        found = [0.0] * len(examples)
        # Examples that differ only in their last token share one forward pass, because no hidden
        # state depends on the last token. Options of one token are such examples.
        same: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(examples):
            same.setdefault(tuple(example.input_ids[:-1]), []).append(i)
        # If no two examples share a prefix, these are the batches of the evaluation during
        # training, so both compute exactly the same loss.
        order = sorted(same.values(), key=lambda group: (-len(examples[group[0]].labels), group))
        progress = Progress(f"{self.name}: likelihoods", len(examples))
        size = self._recipe.eval_batch_size
        with eval_mode(objective):
            for start in range(0, len(order), size):
                groups = order[start : start + size]
                indices = [i for group in groups for i in group]
                losses = self._losses(objective, examples, groups)
                for i, loss in zip(indices, losses, strict=True):
                    found[i] = -loss
                progress.add(len(indices))
        return found

    def _losses(
        self, objective: TokenLoss, examples: Sequence[Example], groups: Sequence[list[int]]
    ) -> list[float]:
        """Compute the loss of each example, with one row of the batch for each group."""
        [batch] = eval_batches(
            [examples[group[0]] for group in groups],
            batch_size=self._recipe.eval_batch_size,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        indices = [i for group in groups for i in group]
        rows = torch.tensor([row for row, group in enumerate(groups) for _ in group])
        labels = torch.full((len(indices), batch.labels.shape[1]), IGNORE_INDEX)  # (N, T)
        for at, i in enumerate(indices):
            labels[at, : len(examples[i].labels)] = torch.tensor(examples[i].labels)
        losses: list[float] = objective.of_labels(
            batch.to(self._world.device), labels, rows
        ).tolist()
        return losses

    def head_outputs(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return the outputs of a head that scores rows, for each example."""
        outputs: list[list[float]] = score_rows(
            self._model,
            examples,
            self._dtype,
            device=self._world.device,
            batch_size=self._recipe.eval_batch_size,
            pad_token_id=self._tokenizer.pad_token_id,
            name=f"{self.name}: rows",
        ).tolist()
        return outputs

    @torch.no_grad()
    def divergences(self, examples: Sequence[Example]) -> list[float]:
        """Return the sum of KL(base || model) over all positions of each example, in nats."""
        if self._as_base is None:
            return [0.0] * len(examples)
        progress = Progress(f"{self.name}: divergence from the base", len(examples))
        found = []
        # One at a time: a batch of distributions over a large vocabulary would fill the memory.
        for example in examples:
            ids = torch.tensor([example.input_ids], device=self._world.device)  # (1, T)
            q = self._log_probabilities(self._model, ids)
            with self._as_base() as base:
                p = self._log_probabilities(base, ids)
            found.append(float((p.exp() * (p - q)).sum(dtype=torch.float64)))
            progress.add(1)
        return found

    def _log_probabilities(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Compute log p of the next token at each position, (T, V) in float32."""
        is_mixed = self._dtype != torch.float32
        with eval_mode(model), torch.autocast(ids.device.type, self._dtype, enabled=is_mixed):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1)


def score_tasks(task_items: TaskItems, scorer: ModelScorer, world: World) -> dict[str, float]:
    """Compute the measures of all tasks, by name. Each rank scores its share of the items."""
    found: dict[str, float] = {}
    for task, items in task_items:
        mine = list(range(world.rank, len(items), world.size))
        # A rank without items scores the first one, to learn the names of the values.
        outcomes = task.evaluate(scorer, [items[i] for i in mine or [0]])
        values = {
            name: _gather(column[: len(mine)], mine, len(items), world)
            for name, column in value_columns(outcomes).items()
        }
        found |= {name: float(one.aggregate(values)) for name, one in task.named_measures()}
    return found


def _gather(values: Column, rows: list[int], number: int, world: World) -> Column:
    """Combine the values of the rows of each rank into the values of all rows, (n,)."""
    whole = torch.zeros(number, dtype=torch.float64)
    whole[rows] = torch.from_numpy(values)
    column: Column = world.sum(whole.to(world.device)).cpu().numpy()
    return column
