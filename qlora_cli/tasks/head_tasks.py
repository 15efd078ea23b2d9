"""Measure a head that scores rows on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qlora_cli.data.batching.links import Links
from qlora_cli.data.config import Data
from qlora_cli.data.prepared.cache import load_or_prepare
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.data.sources import Source
from qlora_cli.objectives import Classify, Reward
from qlora_cli.tasks.head_measures import auroc, f1, mean_over_labels, spearman
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, Values, mean_of
from qlora_cli.types import Example

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

_LOSS = mean_of("loss", lower_is_better=True, is_share=False)
_MAX_TEXT = 2000
"""Tokens of a row that records show."""


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """A row with a label, or the two rows of a pair."""

    place: str
    examples: tuple[Example, ...]
    text: str = ""
    """The first of them as text, for records."""


def scored_items(prepared: PreparedData) -> list[ScoredItem]:
    """Return the rows or pairs of prepared data, without their texts."""
    examples, links = prepared.examples, Links(prepared.examples)
    return [
        ScoredItem(examples.place(links[i][0]), tuple(examples[at] for at in links[i]))
        for i in range(len(links))
    ]


class HeadTask(Task):
    """The loss of an objective of a head on held-out rows, and its other measures."""

    type: Literal["loss"] = "loss"
    objective: Classify | Reward

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[ScoredItem]:
        """Prepare all rows, as for training; `evaluation.limit` does not apply."""
        prepared, _ = load_or_prepare(sources, tokenizer, settings, objective=self.objective)
        return [
            replace(item, text=str(tokenizer.decode(item.examples[0].input_ids[:_MAX_TEXT])))
            for item in scored_items(prepared)
        ]

    def place_and_length(self, item: ScoredItem) -> tuple[str, int]:
        return item.place, max(len(example.input_ids) for example in item.examples)

    def evaluate(self, scorer: Scorer, items: Sequence[ScoredItem]) -> list[Outcome]:
        import torch

        examples = [example for item in items for example in item.examples]
        outputs = torch.tensor(scorer.head_outputs(examples))  # (S, K)
        values = torch.tensor([item.examples[0].values for item in items])  # (L, n)
        terms = self.objective.terms(outputs, values)
        columns = {"loss": terms.losses, **terms.metrics, **self.columns(outputs, values)}
        lists = {name: column.double().tolist() for name, column in columns.items()}
        return [
            Outcome(item.place, item.text, *self.texts(lists, at), {n: lists[n][at] for n in lists})
            for at, item in enumerate(items)
        ]

    def columns(self, outputs: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Return further values of the rows, each (L,)."""
        raise NotImplementedError

    def texts(self, values: dict[str, list[float]], at: int) -> tuple[str, str]:
        """Return what a row says and what is predicted, for records."""
        raise NotImplementedError


class RewardTask(HeadTask):
    """The loss of a reward model per pair, and how often the chosen answer has the larger reward.

    A pair with equal rewards counts one half.
    """

    def measures(self) -> Sequence[Measure]:
        return [_LOSS, mean_of("accuracy"), mean_of("margin", is_share=False)]

    def columns(self, outputs: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"reward_chosen": outputs[0::2, 0], "reward_rejected": outputs[1::2, 0]}

    def texts(self, values: dict[str, list[float]], at: int) -> tuple[str, str]:
        is_right = values["reward_chosen"][at] > values["reward_rejected"][at]
        return "chosen", "chosen" if is_right else "rejected"


class LabelTask(HeadTask):
    """The loss of a classifier per row, and how well it predicts.

    For classes: the share of rows that are predicted right (for `multi`: with all their labels), F1
    and the area under the ROC curve, both averaged over the labels. For a number: the mean absolute
    error, and the rank correlation with the numbers in the rows.
    """

    objective: Classify

    def measures(self) -> Sequence[Measure]:
        if self.objective.problem == "regression":
            mae = mean_of("mae", lower_is_better=True, is_share=False)
            return [_LOSS, mae, Measure("spearman", self._spearman, is_share=False)]
        number = len(self.objective.labels)
        return [
            _LOSS,
            mean_of("accuracy"),
            Measure("macro_f1", mean_over_labels(f1, "_chosen", number)),
            Measure("auroc", mean_over_labels(auroc, "_score", number), is_share=False),
        ]

    def columns(self, outputs: Tensor, values: Tensor) -> dict[str, Tensor]:
        from torch.nn.functional import one_hot

        if self.objective.problem == "regression":
            return {"predicted": outputs[:, 0], "_label": values[:, 0]}
        number = outputs.shape[1]
        if self.objective.problem == "multi":
            chosen, labels = outputs > 0, values > 0
        else:
            chosen = one_hot(outputs.argmax(1), number)
            labels = one_hot(values[:, 0].long(), number)
            # The rank of a row among others is that of its probability, not of its logit.
            outputs = outputs.double().log_softmax(1)
        found: dict[str, Tensor] = {}
        for k in range(number):
            found |= {f"_score{k}": outputs[:, k], f"_chosen{k}": chosen[:, k]}
            found |= {f"_label{k}": labels[:, k]}
        return found

    def texts(self, values: dict[str, list[float]], at: int) -> tuple[str, str]:
        if self.objective.problem == "regression":
            return f"{values['_label'][at]:g}", f"{values['predicted'][at]:g}"
        known = self.objective.labels

        def names(column: str) -> str:
            return ", ".join(one for k, one in enumerate(known) if values[f"{column}{k}"][at])

        return names("_label"), names("_chosen")

    @staticmethod
    def _spearman(values: Values) -> NDArray[float64]:
        return spearman(values["predicted"], values["_label"])
