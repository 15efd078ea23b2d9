"""Reports of `qlora eval`, and the statistics in them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_cli.common.report import ABSENT, Absent, Report
from qlora_cli.evaluate.bootstrap import Estimate, estimate_measure, value_columns
from qlora_cli.runs.run_folder import Weights
from qlora_cli.tasks.head_measures import confusion
from qlora_cli.tasks.head_tasks import LabelTask
from qlora_cli.tasks.task import Task, TaskOutcomes, Values

log = logging.getLogger("qlora")


@dataclass(frozen=True, slots=True)
class MeasureInfo(Report):
    """How to read a measure."""

    n: int
    """Number of examples."""
    is_share: bool
    """The value is a share, shown as a percentage."""
    lower_is_better: bool | None
    """Null if neither direction is better."""


@dataclass(frozen=True, slots=True)
class Summary(Report):
    """Measures of one or more models on the same examples."""

    models: dict[str, dict[str, Estimate]]
    """Model, then measure, then its estimate."""
    differences: dict[str, Estimate]
    """Measure -> second model minus first model, paired; empty for a single model."""
    measures: dict[str, MeasureInfo]
    """Measure -> how to read it."""


@dataclass(frozen=True, slots=True)
class ConfusionTable(Report):
    """Predictions of a classifier of one label per row, counted."""

    labels: list[str]
    """The labels, in the order of `counts`."""
    counts: list[list[int]]
    """For each label, the number of its rows for which each label is predicted."""


@dataclass(frozen=True, slots=True)
class EvaluationReport(Report):
    """Evaluation of one or two models on the same examples. run.json keeps it as `evaluation`."""

    target: str
    """The run, model folder or recipe that was evaluated."""
    compare: str | None
    """The model it was compared with; null for its base."""
    weights: Weights | None
    """Which weights of the run; null if nothing was trained."""
    models: dict[str, dict[str, Estimate]]
    """Model, then measure, then its estimate. The target is the last model."""
    differences: dict[str, Estimate]
    """Measure -> second model minus first model, paired; empty for a single model."""
    measures: dict[str, MeasureInfo]
    """Measure -> how to read it."""
    confidence: float
    """Confidence level of the intervals."""
    resamples: int
    """Number of bootstrap resamples."""
    records: str | None
    """File with prompts, references, answers and scores; null if none was written."""
    confusion: dict[str, ConfusionTable] | Absent = ABSENT
    """Model -> its predictions by label; only for a classifier of one label per row."""


def summarize(tasks: Sequence[Task], models: Mapping[str, TaskOutcomes]) -> Summary:
    """Estimate every measure of every model, and the difference of the second from the first.

    Models that read different rows have no differences. Models with different tokenizers have none
    in measures per token.
    """
    summary = Summary({model: {} for model in models}, {}, {})
    for task in tasks:
        outcomes = [found[task.label] for found in models.values()]
        rows = [[outcome.place for outcome in one] for one in outcomes]
        values = [value_columns(one) for one in outcomes]
        is_same = all(places == rows[0] for places in rows)
        is_same_text = is_same and all(_have_equal_tokens(values[0], one) for one in values)
        if not is_same:
            log.warning(
                "%s: no difference is given, because the models were not evaluated on the same "
                "rows; data.max_length may be too short for one of their tokenizers",
                task.label,
            )
        elif not is_same_text:
            log.warning(
                "%s: measures per token are not compared, because the models have different "
                "tokenizers",
                task.label,
            )
        for name, measure in task.named_measures():
            is_paired = is_same_text if measure.is_per_token else is_same
            groups = [values] if is_paired else [[one] for one in values]
            found = [estimate_measure(measure, group) for group in groups]
            singles = [one for single, _ in found for one in single]
            for model, estimate in zip(models, singles, strict=True):
                summary.models[model][name] = estimate
            for _, differences in found:
                for difference in differences:
                    summary.differences[name] = difference
            summary.measures[name] = MeasureInfo(
                len(rows[0]), measure.is_share, measure.lower_is_better
            )
    return summary


def confusion_tables(
    tasks: Sequence[Task], models: Mapping[str, TaskOutcomes]
) -> dict[str, ConfusionTable] | Absent:
    """Count the predictions of a classifier of one label per row, for each model."""
    for task in tasks:
        if isinstance(task, LabelTask) and task.objective.problem == "single":
            labels = task.objective.labels
            return {
                name: ConfusionTable(
                    labels, confusion(value_columns(outcomes[task.label]), len(labels))
                )
                for name, outcomes in models.items()
            }
    return ABSENT


def _have_equal_tokens(first: Values, second: Values) -> bool:
    """Tell whether each text has the same number of tokens for both models."""
    return "tokens" not in first or bool((first["tokens"] == second["tokens"]).all())


def warn_of_regressions(summary: Summary) -> None:
    """Log the tasks in which the second model is worse than the first, beyond chance."""
    warned = set()
    for name, difference in summary.differences.items():
        low, high = difference.low, difference.high
        task = name.partition(".")[0]
        if low is None or high is None or task in warned:
            continue
        lower_is_better = summary.measures[name].lower_is_better
        if lower_is_better is None or (low <= 0 if lower_is_better else high >= 0):
            continue
        warned.add(task)  # the other measures of the task come from the same answers
        first, second = summary.models
        log.warning(
            "%s: %s is worse than %s, %.4g against %.4g (difference %.4g to %.4g)%s",
            name,
            second,
            first,
            *(summary.models[model][name].value for model in (second, first)),
            low,
            high,
            _ADVICE if task == "forgetting" else "",
        )


_ADVICE = (
    ": it lost some of what the base could do. To keep more of it, train for fewer steps, lower "
    "optimizer.learning_rate or adapter.r, or add general rows to data.train"
)
