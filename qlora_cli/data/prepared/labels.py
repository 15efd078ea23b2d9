"""Find answers that are labels, and labels that differ only in blanks or case."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from qlora_cli.data.formats import PromptCompletion, TemplateFormat
from qlora_cli.data.formats.proposal import propose_template
from qlora_cli.data.prepared.findings import Finding
from qlora_cli.data.prepared.statistics import NAMED
from qlora_cli.data.sources import Source
from qlora_cli.types import BAD, GOOD, Conversation

_DIFFER = "rows whose label differs from another only in blanks or case"
WAY_OUT = "write them alike in the file"
_COLUMN = re.compile(r"\s*\{\{\s*(\w+)\s*\}\}\s*")
"""An answer that is one column, as it is."""
_LONGEST = 64
"""Characters of a label; a longer answer is not one."""
_MOST = 200
"""Different answers of a classification; with more, the answers are not labels."""
_NAMED = 10
"""Labels named with their numbers of rows."""
_USUAL_SHARE = 0.9
"""Share of rows with the most frequent label; with more, others are easily never predicted."""
_LEAST_ROWS = 2
"""Rows for each different answer on average; with fewer, the answers are not labels."""


class LabelCounter:
    """Counts the answers of rows, for as long as they may be labels."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._may_be_labels = True
        self._are_labels = False

    def add(self, row: Conversation) -> None:
        """Count the label of a row, or its last supervised turn if it has no label."""
        if not self._may_be_labels:
            return
        if row.label is not None:
            self._are_labels = True
            self._counts.update(_texts(row))
            self._may_be_labels = len(self._counts) <= _MOST
            return
        answer = next((turn.content for turn in reversed(row.messages) if turn.train), None)
        if answer is None:
            return
        self._counts[answer] += 1
        self._may_be_labels = len(answer) <= _LONGEST and len(self._counts) <= _MOST

    def labels(self) -> dict[str, int]:
        """Return the number of rows with each label; {} if the answers are not labels."""
        is_few = self._counts.total() >= _LEAST_ROWS * len(self._counts)
        return dict(self._counts) if self._may_be_labels and (is_few or self._are_labels) else {}


def _texts(row: Conversation) -> list[str]:
    """Return the label of a row as text; all of them, if it has several."""
    if isinstance(row.label, tuple):
        return list(row.label)
    if isinstance(row.label, bool) and not row.is_labelled:
        return [GOOD if row.label else BAD]
    if isinstance(row.label, bool):
        return [str(row.label).lower()]
    if isinstance(row.label, float) and row.label.is_integer():
        return [str(int(row.label))]
    return [str(row.label)]


def find_balance(labels: Mapping[str, int], num_rows: int, remark: str | None = None) -> Finding:
    """Describe how often each label is given.

    Args:
        labels: the number of rows with each label, at least one.
        remark: of the objective, on these numbers.
    """
    ranked = dict(sorted(labels.items(), key=lambda item: -item[1]))
    most = next(iter(ranked.values()))
    is_only = len(ranked) == 1 and num_rows > 1
    remedies = [remark] if remark else []
    if is_only:
        remedies.append("rows of other labels are missing: there is nothing to tell apart")
    return Finding(
        "rows of one label only" if is_only else "rows with the most frequent label",
        most,
        num_rows,
        tuple(variants_text({label: count}) for label, count in list(ranked.items())[:_NAMED]),
        tuple(remedies),
        len(ranked),
        is_usual=not remedies and most <= _USUAL_SHARE * num_rows,
    )


def find_label_variants(
    labels: Mapping[str, int],
    training: Mapping[str, int],
    sources: Sequence[Source] = (),
    section: str = "data.train",
) -> Finding | None:
    """Find rows whose label differs from a more common one only in blanks or case.

    Args:
        labels: the number of rows with each label.
        training: the same of the training rows, if `labels` are those of evaluation rows.
        sources: the sources of the rows.
        section: the key of the sources in the recipe.
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
    return Finding(
        _DIFFER,
        number,
        sum(labels.values()),
        named,
        (_remedy(differing, sources, section),),
        len(differing),
    )


def _remedy(groups: Sequence[Mapping[str, int]], sources: Sequence[Source], section: str) -> str:
    """Say how to write labels alike: in the file; blanks around them can be trimmed."""
    ways = {_trimming(source, section) for source in sources}
    has_blanks = any(label != label.strip() for group in groups for label in group)
    if not has_blanks or len(ways) != 1 or None in ways:
        return WAY_OUT
    return f"{WAY_OUT}; {ways.pop()} removes the blanks around them"


def _trimming(source: Source, section: str) -> str | None:
    """Return the recipe keys that trim the labels of a source; None if that takes more."""
    match source.format:
        case PromptCompletion(as_chat=True, system=None) as plain:
            return propose_template(
                plain.prompt_field,
                plain.completion_field,
                section=section,
                filters=" | trim",
                fields=source.fields,
            )
        case TemplateFormat() as template if found := _COLUMN.fullmatch(template.assistant):
            return f'{section}.format.assistant: "{{{{ {found[1]} | trim }}}}"'
        case _:
            return None


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
