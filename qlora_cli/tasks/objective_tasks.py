"""The loss of an objective on held-out rows, with what it measures besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qlora_cli.data.batching.links import Links
from qlora_cli.data.batching.mismatch import mismatched, rotated
from qlora_cli.data.config import Data
from qlora_cli.data.prepared.cache import load_or_prepare
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.data.sources import Source
from qlora_cli.objectives import KTO, Classify, ObjectiveConfig, Reward, Supervised
from qlora_cli.objectives.preference_settings import PairObjective
from qlora_cli.tasks.head_tasks import LabelTask, RewardTask
from qlora_cli.tasks.loss import Loss
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, Values, mean_of
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class LinkedItem:
    """A row with several examples: a pair, or an answer and the same prompt with another one."""

    place: str
    examples: tuple[Example, ...]
    values: tuple[float, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(example.input_ids) for example in self.examples)


class PairLoss(Task):
    """The loss of a preference objective per pair, and how often the chosen answer is preferred.

    `accuracy` and `margin` are about the rewards that the objective implies: relative to the
    reference, if it has one. A base that is its own reference has an accuracy of one half.
    `likelier` counts pairs whose chosen answer is more likely, and `likelier_per_token` those whose
    chosen answer is more likely per token.
    """

    type: Literal["loss"] = "loss"
    objective: ObjectiveConfig

    def measures(self) -> Sequence[Measure]:
        return [
            mean_of("loss", lower_is_better=True, is_share=False),
            mean_of("accuracy"),
            mean_of("margin", is_share=False),
            mean_of("likelier"),
            mean_of("likelier_per_token"),
            mean_of("logp_difference", is_share=False),
        ]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[LinkedItem]:
        """Prepare all pairs, as for training; `evaluation.limit` does not apply."""
        prepared, _ = load_or_prepare(sources, tokenizer, settings, objective=self.objective)
        return _items(prepared)

    def place_and_length(self, item: LinkedItem) -> tuple[str, int]:
        return item.place, item.longest

    def evaluate(self, scorer: Scorer, items: Sequence[LinkedItem]) -> list[Outcome]:
        import torch

        from qlora_cli.objectives.preference import PairLogProbs

        assert isinstance(self.objective, PairObjective)
        examples = [example for item in items for example in item.examples]
        scored = examples
        if (tail_weight := self.objective.tail_weight) != 1:
            scored = [*examples, *(head for item in items for head in _equally_long(item))]

        def log_probs(likelihoods: list[float]) -> Tensor:
            found = torch.tensor(likelihoods, dtype=torch.float64)
            whole, heads = found[: len(examples)], found[len(examples) :]
            return whole if not len(heads) else heads + tail_weight * (whole - heads)

        found = log_probs(scorer.log_likelihoods(scored))
        tokens = torch.tensor([float(e.num_supervised) for e in examples], dtype=torch.float64)
        reference = torch.zeros_like(found)
        if self.objective.reference_mode(trains_base=False) is not None:
            reference = log_probs(scorer.reference_log_likelihoods(scored))
        pairs = PairLogProbs(
            found[0::2], found[1::2], tokens[0::2], tokens[1::2], reference[0::2], reference[1::2]
        )
        terms = self.objective.terms_with_sft(pairs)
        margins = terms.chosen_rewards - terms.rejected_rewards
        difference = pairs.chosen - pairs.rejected
        columns = {
            "loss": terms.losses,
            "accuracy": (margins.sign() + 1) / 2,
            "margin": margins,
            "likelier": (difference.sign() + 1) / 2,
            "likelier_per_token": ((pairs.chosen_mean - pairs.rejected_mean).sign() + 1) / 2,
            "logp_difference": difference,
        }
        lists = {name: column.tolist() for name, column in columns.items()}
        return [
            Outcome(item.place, "", "", "", {name: lists[name][at] for name in lists})
            for at, item in enumerate(items)
        ]


class FeedbackTask(Task):
    """The loss of KTO per row, and how often the sign of a row's reward is that of its label."""

    type: Literal["loss"] = "loss"
    objective: KTO

    def measures(self) -> Sequence[Measure]:
        return [
            Measure("loss", self._loss, lower_is_better=True, is_share=False),
            mean_of("accuracy"),
            mean_of("margin", is_share=False),
        ]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[LinkedItem]:
        """Prepare all rows, each with its prompt and the answer of the row before it."""
        prepared, _ = load_or_prepare(sources, tokenizer, settings, objective=self.objective)
        items = _items(prepared)
        firsts = [item.examples[0] for item in items]
        others = rotated(range(len(items)), len(items))
        return [
            replace(item, examples=(first, _alone(mismatched(first, firsts[other]))))
            for item, first, other in zip(items, firsts, others, strict=True)
        ]

    def place_and_length(self, item: LinkedItem) -> tuple[str, int]:
        return item.place, item.longest

    def evaluate(self, scorer: Scorer, items: Sequence[LinkedItem]) -> list[Outcome]:
        examples = [example for item in items for example in item.examples]
        found = scorer.log_likelihoods(examples)
        reference = scorer.reference_log_likelihoods(examples)
        ratios = [one - other for one, other in zip(found, reference, strict=True)]
        outcomes = []
        for at, item in enumerate(items):
            sign = 1.0 if item.values[0] > 0 else -1.0
            margin = sign * self.objective.beta * ratios[2 * at]
            values = {
                "_ratio": ratios[2 * at],
                "_mismatched": ratios[2 * at + 1],
                "_sign": sign,
                "accuracy": 0.5 if margin == 0 else float(margin > 0),
                "margin": margin,
            }
            outcomes.append(Outcome(item.place, "", "", "", values))
        return outcomes

    def _loss(self, values: Values) -> NDArray[float64]:
        """Compute the mean loss; its divergence is estimated from the same rows."""
        import numpy as np

        settings, signs = self.objective, values["_sign"]
        divergence = np.maximum(values["_mismatched"].mean(-1, keepdims=True), 0.0)
        gains = 1 / (1 + np.exp(-signs * settings.beta * (values["_ratio"] - divergence)))
        weights = np.where(signs > 0, settings.desirable_weight, settings.undesirable_weight)
        losses: NDArray[float64] = (weights * (1 - gains)).mean(-1)
        return losses


def task_of(objective: ObjectiveConfig) -> Task:
    """Return the task that measures the loss of an objective on `data.evaluation`."""
    if isinstance(objective, Supervised):
        return Loss()
    if isinstance(objective, Classify):
        return LabelTask(objective=objective)
    if isinstance(objective, Reward):
        return RewardTask(objective=objective)
    if isinstance(objective, KTO):
        return FeedbackTask(objective=objective)
    return PairLoss(objective=objective)


def _items(prepared: PreparedData) -> list[LinkedItem]:
    """Return the rows of a dataset with their examples."""
    examples, links = prepared.examples, Links(prepared.examples)
    return [
        LinkedItem(
            examples.place(links[i][0]),
            tuple(_alone(examples[at]) for at in links[i]),
            examples[links[i][0]].values,
        )
        for i in range(len(links))
    ]


def _equally_long(pair: LinkedItem) -> list[Example]:
    """Return the examples of a pair, each with as many supervised tokens as the shorter answer."""
    kept = min(example.num_supervised for example in pair.examples)
    return [replace(one, labels=_first_labels(one.labels, kept)) for one in pair.examples]


def _first_labels(labels: list[int], number: int) -> list[int]:
    """Keep the first supervised tokens. The first token of a row is not predicted."""
    places = [at for at, label in enumerate(labels) if at and label != IGNORE_INDEX]
    kept = set(places[:number])
    return [label if at in kept else IGNORE_INDEX for at, label in enumerate(labels)]


def _alone(example: Example) -> Example:
    """Return an example without its link, which batches of likelihoods would not keep."""
    return replace(example, is_linked=False, prefix=0)
