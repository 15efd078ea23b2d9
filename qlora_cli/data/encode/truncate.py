"""Truncate a labelled row to `data.max_length`, in one of four ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qlora_cli.types import IGNORE_INDEX, Example

Truncate = Literal["drop", "cut_end", "cut_prompt", "split"]


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The end of a supervised turn."""

    token_ids: tuple[int, ...]
    """The added tokens that end it (most often one: `<|im_end|>`); () if something else follows."""
    length: int
    """Number of tokens from the first of them to the last."""
    text: str
    """The text that follows the content."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as token ids and labels."""

    examples: list[Example]
    """The training examples, none longer than `max_length`: several if the row was split, none if
    no supervised token is left."""
    length: int
    """Tokens before truncation; of the longest, if the conversation makes several rows."""
    turn_ends: list[TurnEnd]
    """The end of each supervised turn that was not cut."""
    num_answers: int
    """Supervised turns in the row."""
    lost: str | None = None
    """The reason if answers are lost, in whole or in part."""
    is_typed: bool = False
    """True if its messages contain special tokens, which are encoded as plain text."""
    is_saved_by_prompt: bool = False
    """True if it is too long, and `cut_prompt` would keep all of its answers."""

    @property
    def example(self) -> Example:
        """The only example."""
        [example] = self.examples
        return example

    @property
    def num_lost(self) -> int:
        """Supervised turns that were cut, in whole or in part."""
        return self.num_answers - len(self.turn_ends)


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A whole row as token ids and labels, before truncation."""

    example: Example
    turn_ends: list[tuple[int, TurnEnd]]
    """For each supervised turn, the number of tokens up to its end."""
    straddles: str | None
    """The reason if one token holds both the end of a prompt and the start of an answer."""
    is_verbatim: bool
    """True if the row has no chat template around it."""
    has_bos: bool
    """True if it begins with a BOS that truncation has to keep."""


def truncate_row(row: LabelledRow, max_length: int, truncate: Truncate) -> EncodedRow:
    """Truncate a row to `max_length` tokens, or split it into several rows of that length.

    Each split row begins with the last token of the row before it, because the token that follows
    could not be supervised otherwise.
    """
    length, num_answers = len(row.example.input_ids), len(row.turn_ends)
    if row.straddles is not None:
        return EncodedRow([], length, [], num_answers, row.straddles)
    reason = None
    spare = _surplus(row, max_length)
    if length <= max_length:
        examples, kept = [row.example], length
    # A piece of a conversation would have no beginning that says whose turn it is.
    elif truncate == "split" and row.is_verbatim:
        starts = range(0, length - 1, max_length - 1)
        examples, kept = [_piece(row.example, at, at + max_length) for at in starts], length
    elif truncate == "drop":
        examples, kept = [], 0
    else:
        surplus = spare if truncate == "cut_prompt" else 0
        examples, kept = [_cut(row, surplus, max_length)], max_length + surplus
    turn_ends = [end for after, end in row.turn_ends if after <= kept]
    examples = [example for example in examples if example.num_supervised]
    if len(turn_ends) < num_answers or not examples:
        what = f"{num_answers - len(turn_ends)} of {num_answers} answers cut"
        if not examples:
            what = "left out" if truncate == "drop" else f"{what}, nothing left to train on"
        reason = f"{length:,} tokens, data.max_length {max_length:,}: {what}"
    is_saved = 0 < length - max_length == spare
    return EncodedRow(examples, length, turn_ends, num_answers, reason, is_saved_by_prompt=is_saved)


def truncate_pair(
    chosen: LabelledRow, rejected: LabelledRow, max_length: int, truncate: Truncate
) -> EncodedRow:
    """Link the two answers of a pair. It is left out if one of them has more than `max_length`.

    `cut_prompt` cuts both by the same tokens of the prompt that they share.
    """
    length = max(len(row.example.input_ids) for row in (chosen, rejected))
    for row in (chosen, rejected):
        if row.straddles is not None:
            return EncodedRow([], length, [], 1, row.straddles)
    shared = _shared_prompt(chosen.example, rejected.example)
    surplus = max(0, length - max_length)
    spare = shared - chosen.has_bos - 1
    is_saved = 0 < surplus <= spare
    if surplus and not (is_saved and truncate == "cut_prompt"):
        what = f"{length:,} tokens, data.max_length {max_length:,}: the pair is left out"
        return EncodedRow([], length, [], 1, what, is_saved_by_prompt=is_saved)
    kept = [_cut(row, surplus, max_length) for row in (chosen, rejected)]
    if not all(example.num_supervised for example in kept):
        return EncodedRow([], length, [], 1, "an answer of the pair has no supervised token")
    second = replace(kept[1], is_linked=True, prefix=shared - surplus)
    return EncodedRow([kept[0], second], length, [chosen.turn_ends[-1][1]], 1)


def _shared_prompt(chosen: Example, rejected: Example) -> int:
    """Return the number of tokens that two examples share before the first supervised one."""
    for at, (one, other) in enumerate(zip(chosen.input_ids, rejected.input_ids, strict=False)):
        is_supervised = chosen.labels[at] != IGNORE_INDEX or rejected.labels[at] != IGNORE_INDEX
        if one != other or is_supervised:
            return at
    return min(len(chosen.input_ids), len(rejected.input_ids)) - 1


def truncate_labelled(row: LabelledRow, max_length: int, truncate: Truncate) -> EncodedRow:
    """Truncate a row with a label, and supervise its last token alone: there the label is read.

    What is cut is the end of the text (but not the token that ends it), or its beginning with
    `cut_prompt`. A text that is cut keeps its label, so it does not count as lost.
    """
    ids, length = row.example.input_ids, len(row.example.input_ids)
    if length > max_length and truncate == "drop":
        what = f"{length:,} tokens, data.max_length {max_length:,}: left out"
        return EncodedRow([], length, [], 1, what)
    if length > max_length and truncate == "cut_prompt":
        ids = [*ids[: row.has_bos], *ids[length - max_length + row.has_bos :]]
    elif length > max_length:
        ids = [*ids[: max_length - 1], ids[-1]]
    labels = [*[IGNORE_INDEX] * (len(ids) - 1), ids[-1]]
    return EncodedRow([Example(ids, labels)], length, [TurnEnd((), 0, "")], 1)


def join_rows(rows: list[EncodedRow]) -> EncodedRow:
    """Join the rows made from one conversation."""
    if len(rows) == 1:
        return rows[0]
    return EncodedRow(
        [example for row in rows for example in row.examples],
        max(row.length for row in rows),
        [end for row in rows for end in row.turn_ends],
        sum(row.num_answers for row in rows),
        next((row.lost for row in rows if row.lost is not None), None),
        is_saved_by_prompt=all(row.is_saved_by_prompt for row in rows if row.lost is not None),
    )


def _surplus(row: LabelledRow, max_length: int) -> int:
    """Tokens to cut from the prompt. One is left for the first token of the answer to follow."""
    supervised = (i for i, label in enumerate(row.example.labels) if label != IGNORE_INDEX)
    spare = next(supervised, 0) - row.has_bos - 1
    return max(0, min(spare, len(row.example.input_ids) - max_length))


def _cut(row: LabelledRow, count: int, max_length: int) -> Example:
    """Cut `count` tokens at the beginning, after the BOS, and what is too long at the end."""
    ids, labels, bos = row.example.input_ids, row.example.labels, int(row.has_bos)
    return Example(
        [*ids[:bos], *ids[bos + count :]][:max_length],
        [*labels[:bos], *labels[bos + count :]][:max_length],
    )


def _piece(example: Example, start: int, stop: int) -> Example:
    ids, labels = example.input_ids[start:stop], example.labels[start:stop]
    return Example(ids, labels if start == 0 else [IGNORE_INDEX, *labels[1:]])
