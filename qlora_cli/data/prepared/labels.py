"""Find answers that are labels, and labels that differ only in blanks or case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from qlora_cli.data.prepared.findings import Finding
from qlora_cli.data.prepared.statistics import NAMED
from qlora_cli.types import Conversation

_DIFFER = "rows whose label differs from another only in blanks or case"
WAY_OUT = (
    'write them alike, e.g. with format: {type: template, user: "{{ text }}", '
    'assistant: "{{ label | trim | lower }}"}'
)
_LONGEST = 64
"""Characters of a label; a longer answer is not one."""
_MOST = 200
"""Different answers of a classification; with more, the answers are not labels."""
_LEAST_ROWS = 2
"""Rows for each different answer on average; with fewer, the answers are not labels."""


class LabelCounter:
    """Counts the answers of rows, for as long as they may be labels."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._may_be_labels = True

    def add(self, row: Conversation) -> None:
        """Count the last supervised turn of a row."""
        if not self._may_be_labels:
            return
        answer = next((turn.content for turn in reversed(row.messages) if turn.train), None)
        if answer is None:
            return
        self._counts[answer] += 1
        self._may_be_labels = len(answer) <= _LONGEST and len(self._counts) <= _MOST

    def labels(self) -> dict[str, int]:
        """Return the number of rows with each label; {} if the answers are not labels."""
        is_few = self._counts.total() >= _LEAST_ROWS * len(self._counts)
        return dict(self._counts) if self._may_be_labels and is_few else {}


def find_label_variants(labels: Mapping[str, int], training: Mapping[str, int]) -> Finding | None:
    """Find rows whose label differs from a more common one only in blanks or case.

    Args:
        labels: the number of rows with each label.
        training: the same of the training rows, if `labels` are those of evaluation rows.
    """
    groups = label_variants(Counter(labels) + Counter(training))
    others = {
        label: group
        for group in groups
        for label in group.keys() & labels.keys() - {_common(group, training)}
    }
    if not others:
        return None
    number = sum(labels[label] for label in others)
    differing = [group for group in groups if group in others.values()]
    named = tuple(variants_text(group) for group in differing[:NAMED])
    return Finding(_DIFFER, number, sum(labels.values()), named, (WAY_OUT,))


def _common(group: Mapping[str, int], training: Mapping[str, int]) -> str:
    """Return the label that the others should be: the most common one of the training rows."""
    return max(group, key=lambda label: (training.get(label, 0), group[label]))


def label_variants(counts: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the groups of labels that differ only in blanks or case, the most common first.

    Args:
        counts: the number of rows with each label.
    """
    groups: dict[str, dict[str, int]] = {}
    for label, count in sorted(counts.items(), key=lambda item: -item[1]):
        groups.setdefault(plain_label(label), {})[label] = count
    return [group for group in groups.values() if len(group) > 1]


def plain_label(label: str) -> str:
    """Return a label without what readers overlook: blanks around it, runs of them, and case."""
    return " ".join(label.split()).casefold()


def variants_text(group: Mapping[str, int]) -> str:
    """Format labels with their rows: `'positive' (120), 'positive ' (3)`."""
    return ", ".join(f"{label!r} ({count:,})" for label, count in group.items())
