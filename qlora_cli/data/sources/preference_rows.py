"""Recognize preference rows that a format for supervised data is asked to read."""

from __future__ import annotations

from qlora_cli.data.formats import FormatConfig, Preference, PromptCompletion
from qlora_cli.data.sources.rows import LocatedRow
from qlora_cli.errors import DataError
from qlora_cli.types import Row

_PROMPTS = ("prompt", "question", "instruction", "input", "query")
_NOT_TRAINED = (
    "a supervised objective trains on one answer to each prompt, and preference objectives (DPO, "
    "KTO, reward models) are not available in this version"
)


def refuse_labelled(located: LocatedRow, format: FormatConfig) -> None:
    """Refuse a row of KTO, which marks its completion as good or bad: it would be trained on.

    Raises:
        DataError: it is such a row.
    """
    reads_completion = isinstance(format, PromptCompletion) and (
        format.completion_field == "completion"
    )
    if reads_completion and _is_labelled(located.row):
        raise _refusal(located, "'prompt', 'completion' and 'label'", _LABEL_HINT)


def refuse_preferences(located: LocatedRow, format: FormatConfig) -> None:
    """Refuse a row that its format cannot read, if it is a preference row.

    Raises:
        DataError: it is such a row.
    """
    row = located.row
    if isinstance(format, Preference):
        return
    if _is_labelled(row):
        raise _refusal(located, "'prompt', 'completion' and 'label'", _LABEL_HINT)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise _refusal(located, "'chosen' and 'rejected'", _pair_hint(row))


_LABEL_HINT = (
    "to train on the good completions alone, keep the rows whose label is true; to train on all of "
    "them, rename the column with fields: {rating: label}"
)


def _is_labelled(row: Row) -> bool:
    label = row.get("label")
    is_truth = (
        label.strip().lower() in ("true", "false") if isinstance(label, str) else label in (0, 1)
    )
    return {"prompt", "completion"} <= row.keys() and is_truth


def _pair_hint(row: Row) -> str:
    pairs = Preference()
    try:
        pairs.to_conversation(row)
        settings = pairs.as_trainable(row)
    except DataError:
        prompt = next((name for name in _PROMPTS if row.get(name)), None)
        if prompt is None:
            return "qlora preview shows both answers with format: {type: preference}"
        settings = {
            "type": "prompt_completion",
            "prompt_field": prompt,
            "completion_field": "chosen",
        }
    written = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return f"to train on the chosen answers alone, give this source format: {{{written}}}"


def _refusal(located: LocatedRow, columns: str, hint: str) -> DataError:
    return DataError(f"{located.place}: a preference row ({columns}); {_NOT_TRAINED}", hint=hint)
