"""Kinds of rows: recognize those that a format does not read, and tell which have one content."""

from __future__ import annotations

from itertools import takewhile

from qlora_cli.data.formats import Feedback, FormatConfig, Labelled, Preference, PromptCompletion
from qlora_cli.data.formats.answers import truth_of
from qlora_cli.data.formats.fields import is_given
from qlora_cli.data.sources.rows import LocatedRow
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Row, RowKind

_PROMPTS = ("prompt", "question", "instruction", "input", "query")
_READS = {
    "answers": "one answer to each prompt",
    "pairs": "two answers to each prompt",
    "feedback": "one answer and whether it is good",
    "labels": "a text and its label",
}


def refuse_unread_label(located: LocatedRow, format: FormatConfig) -> None:
    """Refuse a row of feedback if its format would read the answer and not the label.

    Raises:
        DataError: it is such a row.
    """
    row = located.row
    match format:
        case PromptCompletion(completion_field="completion"):
            is_unread = _is_feedback(row)
        case Labelled(field=None, text=None):
            is_unread = _is_feedback(row) and row.get("text") is None
        case _:
            is_unread = False
    if is_unread:
        raise _refuse_feedback(located, format)


def refuse_other_kind(located: LocatedRow, format: FormatConfig) -> None:
    """Refuse a row that its format cannot read, if it is a row of another kind.

    Raises:
        DataError: it is such a row.
    """
    row = located.row
    if format.rows != "feedback" and _is_feedback(row):
        raise _refuse_feedback(located, format)
    if format.rows != "pairs" and _is_pair(row):
        hint = _pair_hint(row, format)
        raise _refusal(located, "a preference row ('chosen' and 'rejected')", format, hint)


def refuse_without_answers(format: FormatConfig, path: str) -> None:
    """Refuse a format whose rows have no answer that a model should give.

    Raises:
        DataError: it is one for rows of feedback, or for labelled ones.
    """
    if format.rows in ("feedback", "labels"):
        raise DataError(
            f"{path}: format {format.type} reads {_READS[format.rows]}; expected rows with a "
            "prompt and its right answer",
            hint="name another format for these rows, such as prompt_completion or template",
        )


def content_of(conversation: Conversation, kind: RowKind) -> object:
    """Return the content of a row: equal for rows that differ only in unread columns.

    Answers to the same prompt that are compared or judged have the same content, so that a prompt
    is either trained on or held out.
    """
    turns = conversation.messages
    if kind in ("pairs", "feedback"):
        turns = list(takewhile(lambda turn: not turn.train, turns))
    said = [
        [turn.role, turn.content, turn.reasoning, [[c.name, c.arguments] for c in turn.tool_calls]]
        for turn in turns
    ]
    return [said, conversation.tools]


def _is_pair(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _is_feedback(row: Row) -> bool:
    return {"prompt", "completion"} <= row.keys() and truth_of(row, "label") is not None


def _refuse_feedback(located: LocatedRow, format: FormatConfig) -> DataError:
    hint = _way(Feedback(), "kto")
    if format.rows == "answers":
        hint += (
            "; to train on the good completions alone, keep the rows whose label is true; to train "
            "on all of them, rename the column with fields: {rating: label}"
        )
    what = "a row of feedback ('prompt', 'completion' and 'label')"
    return _refusal(located, what, format, hint)


def _pair_hint(row: Row, format: FormatConfig) -> str:
    pairs, plain = _reading(row)
    hint = _way(pairs, "dpo")
    if format.rows != "answers" or plain is None:
        return hint
    return (
        f"{hint}; to train on the chosen answers alone, give this source format: {_written(plain)}"
    )


def _reading(row: Row) -> tuple[Preference, dict[str, str] | None]:
    """Return the format that reads a pair, and the settings that read its chosen answer alone."""
    columns = [name for name in _PROMPTS[1:] if row.get(name)]
    for pairs in (Preference(), *(Preference(prompt_field=name) for name in columns)):
        try:
            pairs.to_conversation(row)
        except DataError:
            continue
        has_input = pairs.prompt_field == "instruction" and is_given(row, "input")
        return pairs, None if has_input else pairs.as_trainable(row)
    return Preference(), None


def _way(format: Preference | Feedback, objective: str) -> str:
    """Return the recipe keys that train on both answers, or on good and bad ones."""
    settings = {"type": format.type, **format.model_dump(exclude_defaults=True)}
    which = "both answers" if isinstance(format, Preference) else "good and bad answers"
    return (
        f"to train on {which}, give this source format: {_written(settings)} and the recipe "
        f"objective: {{type: {objective}}}"
    )


def _written(settings: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in settings.items()) + "}"


def _refusal(located: LocatedRow, what: str, format: FormatConfig, hint: str) -> DataError:
    reads = _READS[format.rows]
    return DataError(f"{located.place}: {what}; format {format.type} reads {reads}", hint=hint)
