"""Label tokens: which of them are supervised. This is decided here and nowhere else."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from qlora_cli.data.encode.tokens import TokenizedRow
from qlora_cli.data.encode.truncate import LabelledRow, TurnEnd
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Labeller:
    """Labels the tokens of rendered rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._bos = tokenizer.bos_token_id

    def label(self, tokenized: TokenizedRow, *, train_on_all: bool) -> LabelledRow:
        """Supervise the tokens of each answer and the token that ends it, or all tokens."""
        row, ids, offsets = tokenized.row, tokenized.ids, tokenized.offsets
        ends = [end for _, end in offsets]
        labels = list(ids) if train_on_all else [IGNORE_INDEX] * len(ids)
        turn_ends, straddles = [], None
        for answer in row.answers:
            first, last = bisect_right(ends, answer.start), bisect_right(ends, answer.stop)
            is_stopped = last < len(ids) and ids[last] in self._added_ids
            after = last + 1 if is_stopped else bisect_right(ends, answer.end)
            labels[first:after] = ids[first:after]
            if first < after and not train_on_all:
                start = _start(offsets, first)
                if start < answer.start:
                    straddles = _straddles(row.text, answer.start, start, ends[first])
            follows = row.text[answer.end : answer.end + 20]
            # Text that brings its own end-of-text token ends after it.
            begin = min(bisect_right(ends, answer.end), last)
            added = [i for i in range(begin, last + 1) if is_stopped and ids[i] in self._added_ids]
            length = after - added[0] if added else 0
            turn_ends.append((after, TurnEnd(tuple(ids[i] for i in added), length, follows)))
        return LabelledRow(
            Example(ids, labels),
            turn_ends,
            straddles,
            is_verbatim=row.is_verbatim,
            # Where BOS also opens every turn (ChatML), one left on its own would open none.
            has_bos=ids[:1] == [self._bos] and self._bos not in ids[1:],
        )


def _start(offsets: list[tuple[int, int]], token: int) -> int:
    """Return the first character of a token, including white space before it.

    Byte-level tokenizers may report offsets without the white space in a token. A token that
    reaches back into the prompt would then pass for a token of the answer.
    """
    return min(offsets[token][0], offsets[token - 1][1] if token else 0)


def _straddles(text: str, start: int, first: int, last: int) -> str:
    # The row is dropped rather than supervised in part: training would show the model one token
    # where at generation the prompt ends in another, and the answer may be only this token.
    return (
        f"one token ({text[first:last]!r}) holds the end of the prompt ({text[first:start]!r}) and "
        f"the beginning of the answer ({text[start:last]!r}); white space there belongs to the "
        "beginning of a completion, and before the answer of a conversation to neither"
    )
