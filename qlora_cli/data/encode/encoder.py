"""From messages to tokens and labels. What is learnt is decided here and nowhere else."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qlora_cli.data.render.renderer import RenderedRow, Renderer
from qlora_cli.data.render.special_tokens import TypedSpecialTokens
from qlora_cli.errors import DataError
from qlora_cli.types import IGNORE_INDEX, Conversation, Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Truncate = Literal["drop", "cut_end", "cut_prompt", "split"]


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What stands where a learnt turn ends."""

    token_id: int | None
    """The added token (such as `<|im_end|>`) that ends it; None if something else follows."""
    text: str
    """The text that follows the content."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row in tokens."""

    examples: list[Example]
    """What is learnt from it, none of them longer than `max_length`. Several if it was split, none
    if nothing of it can be learnt."""
    length: int
    """Tokens before cutting; of the longest, if the conversation makes several rows."""
    turn_ends: list[TurnEnd]
    """The end of each learnt turn that was not cut."""
    num_answers: int
    """Learnt turns of the row."""
    lost: str | None = None
    """Why answers are lost, wholly or in part, if they are."""
    is_typed: bool = False
    """Whether special tokens were typed in its messages, and taken for plain text."""

    @property
    def example(self) -> Example:
        """The only one."""
        [example] = self.examples
        return example

    @property
    def num_lost(self) -> int:
        """Learnt turns that were cut away or cut short."""
        return self.num_answers - len(self.turn_ends)


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row of which it cannot be told exactly what is to be learnt."""

    reason: str


class Encoder:
    """Turns messages into tokens and labels, with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)
        self._typed = TypedSpecialTokens(tokenizer)
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._bos = _bos_that_is_added(tokenizer)

    def encode(
        self,
        messages: list[Message],
        *,
        max_length: int,
        truncate: Truncate = "cut_end",
        train_on_all: bool = False,
    ) -> EncodedRow:
        """Tokens and labels of one row.

        Raises:
            DataError: it cannot be told exactly what is to be learnt.
        """
        row = Conversation(messages, train_on_all=train_on_all)
        [encoded] = self.encode_rows([row], max_length=max_length, truncate=truncate)
        if isinstance(encoded, RefusedRow):
            raise DataError(encoded.reason)
        return encoded

    def encode_rows(
        self, rows: list[Conversation], *, max_length: int, truncate: Truncate
    ) -> list[EncodedRow | RefusedRow]:
        """Tokens and labels of each row, or why it has none."""
        laid_out = [self._lay_out(row) for row in rows]
        plain = (one for one in laid_out if isinstance(one, _LaidOut) and one.tokens is None)
        tokens = iter(self._tokenize([layout.text for one in plain for layout in one.layouts]))

        def encode(row: Conversation, found: _LaidOut) -> EncodedRow:
            of_row = found.tokens or [next(tokens) for _ in found.layouts]
            pairs = zip(found.layouts, of_row, strict=True)
            encoded = _joined(
                [
                    self._label(layout, *one, row.train_on_all).cut(max_length, truncate)
                    for layout, one in pairs
                ]
            )
            return encoded if found.tokens is None else replace(encoded, is_typed=True)

        return [
            found if isinstance(found, RefusedRow) else encode(row, found)
            for row, found in zip(rows, laid_out, strict=True)
        ]

    def to_prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> Prompt:
        """What precedes the last learnt message, with the generation prompt; and its content.

        Raises:
            DataError: nothing precedes it, or the chat template refuses.
        """
        row = Conversation(messages, tools=tools)
        masked = self._typed.mask(row)
        layout = self._renderer.render_prompt(masked or row)
        if masked is None:
            [(ids, _)] = self._tokenize([layout.text])
        else:
            _, ids, _ = self._typed.tokenize(layout.text)
        bos = self._missing_bos(ids) if layout.is_verbatim else []
        reference = next(message.content for message in reversed(messages) if message.train)
        return Prompt([*bos, *ids], reference)

    def check_template(self) -> None:
        """Raises DataError if the chat template is missing or broken: once, and not in each row."""
        self._renderer.check_template()

    def _lay_out(self, row: Conversation) -> _LaidOut | RefusedRow:
        try:
            masked = self._typed.mask(row)
            layouts = self._renderer.render_all(masked or row)
            if masked is None:
                return _LaidOut(layouts)
            tokenized = [self._typed.tokenize(layout.text) for layout in layouts]
        except DataError as error:
            return RefusedRow(str(error))
        return _LaidOut(
            [
                replace(layout, text=text)
                for layout, (text, _, _) in zip(layouts, tokenized, strict=True)
            ],
            [(ids, offsets) for _, ids, offsets in tokenized],
        )

    def _tokenize(self, texts: list[str]) -> list[_Tokens]:
        if not texts:
            return []
        encoding = self._tokenizer(
            texts,
            # The chat template writes the special tokens; a second BOS would come from here.
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))

    def _missing_bos(self, ids: list[int]) -> list[int]:
        """The BOS that verbatim text needs and does not bring."""
        return [] if self._bos is None or ids[:1] == [self._bos] else [self._bos]

    def _enclose(
        self, ids: list[int], offsets: list[tuple[int, int]], length: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Verbatim tokens with BOS (if the tokenizer adds one) and EOS, one of each."""
        bos, eos = self._missing_bos(ids), [self._tokenizer.eos_token_id]
        if ids[-1:] == eos:
            eos = []
        # The EOS is given the place after the last character, so that it is found there.
        places = [*((0, 0) for _ in bos), *offsets, *((length, length + 1) for _ in eos)]
        return [*bos, *ids, *eos], places

    def _label(
        self,
        layout: RenderedRow,
        ids: list[int],
        offsets: list[tuple[int, int]],
        train_on_all: bool,
    ) -> _Labelled:
        if layout.is_verbatim:
            ids, offsets = self._enclose(ids, offsets, len(layout.text))
        ends = [end for _, end in offsets]
        labels = list(ids) if train_on_all else [IGNORE_INDEX] * len(ids)
        turn_ends, straddles, bos = [], None, self._tokenizer.bos_token_id
        for answer in layout.answers:
            first, last = bisect_right(ends, answer.start), bisect_right(ends, answer.stop)
            is_stopped = last < len(ids) and ids[last] in self._added_ids
            after = last + 1 if is_stopped else bisect_right(ends, answer.end)
            labels[first:after] = ids[first:after]
            if (
                first < after
                and (start := _start(offsets, first)) < answer.start
                and not train_on_all
            ):
                straddles = _straddles(layout.text, answer.start, start, ends[first])
            follows = layout.text[answer.end : answer.end + 20]
            turn_ends.append((after, TurnEnd(ids[last] if is_stopped else None, follows)))
        return _Labelled(
            Example(ids, labels),
            turn_ends,
            straddles,
            is_verbatim=layout.is_verbatim,
            # Where BOS also opens every turn (ChatML), one left alone would open none.
            has_bos=ids[:1] == [bos] and bos not in ids[1:],
        )


_Tokens = tuple[list[int], list[tuple[int, int]]]
"""Tokens, and the places of each in the text."""


@dataclass(frozen=True, slots=True)
class _LaidOut:
    layouts: list[RenderedRow]
    tokens: list[_Tokens] | None = None
    """If these are not the ordinary ones of the text."""


def _joined(rows: list[EncodedRow]) -> EncodedRow:
    """What a conversation makes, as one."""
    if len(rows) == 1:
        return rows[0]
    return EncodedRow(
        [example for row in rows for example in row.examples],
        max(row.length for row in rows),
        [end for row in rows for end in row.turn_ends],
        sum(row.num_answers for row in rows),
        next((row.lost for row in rows if row.lost is not None), None),
    )


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A whole row, before it is cut."""

    whole: Example
    turn_ends: list[tuple[int, TurnEnd]]
    """Of each learnt turn, the number of tokens up to its end."""
    straddles: str | None
    is_verbatim: bool
    has_bos: bool

    def cut(self, max_length: int, truncate: Truncate) -> EncodedRow:
        """The row with no more than `max_length` tokens, or as several of that length.

        Of these, each begins with the last token of the one before it: what follows it could not
        be learnt otherwise.
        """
        length, num_answers = len(self.whole.input_ids), len(self.turn_ends)
        if self.straddles is not None:
            return EncodedRow([], length, [], num_answers, self.straddles)
        reason = None
        if length <= max_length:
            examples, kept = [self.whole], length
        # A piece of a conversation has no beginning that says who speaks.
        elif truncate == "split" and self.is_verbatim:
            starts = range(0, length - 1, max_length - 1)
            examples, kept = [self._piece(at, at + max_length) for at in starts], length
        elif truncate == "drop":
            examples, kept = [], 0
        else:
            without = self._surplus(max_length) if truncate == "cut_prompt" else 0
            examples, kept = [self._without(without, max_length)], max_length + without
        turn_ends = [end for after, end in self.turn_ends if after <= kept]
        examples = [example for example in examples if example.num_supervised]
        if len(turn_ends) < num_answers or not examples:
            cut = num_answers - len(turn_ends)
            what = f"{cut} of {num_answers} answers cut"
            if not examples:
                what = "left out" if truncate == "drop" else f"{what}, nothing left to learn"
            reason = f"{length:,} tokens, data.max_length {max_length:,}: {what}"
        return EncodedRow(examples, length, turn_ends, num_answers, reason)

    def _surplus(self, max_length: int) -> int:
        """Tokens to take from the prompt. One is left, for the first of the answer to follow."""
        learnt = (i for i, label in enumerate(self.whole.labels) if label != IGNORE_INDEX)
        spare = next(learnt, 0) - self.has_bos - 1
        return max(0, min(spare, len(self.whole.input_ids) - max_length))

    def _without(self, count: int, max_length: int) -> Example:
        """Without `count` tokens of the beginning (BOS is kept), and cut at the end."""
        ids, labels, bos = self.whole.input_ids, self.whole.labels, int(self.has_bos)
        return Example(
            [*ids[:bos], *ids[bos + count :]][:max_length],
            [*labels[:bos], *labels[bos + count :]][:max_length],
        )

    def _piece(self, start: int, stop: int) -> Example:
        ids, labels = self.whole.input_ids[start:stop], self.whole.labels[start:stop]
        return Example(ids, labels if start == 0 else [IGNORE_INDEX, *labels[1:]])


def _bos_that_is_added(tokenizer: PreTrainedTokenizerFast) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else None


def _start(offsets: list[tuple[int, int]], token: int) -> int:
    """First character of a token, white space before it included.

    Byte-level tokenizers may report offsets without the white space that a token holds; then a
    token that reaches back into the prompt would pass for one of the answer.
    """
    return min(offsets[token][0], offsets[token - 1][1] if token else 0)


def _straddles(text: str, start: int, first: int, last: int) -> str:
    # Dropped rather than learnt in part: in training the model would see one token where at
    # generation the prompt ends in another, and the answer may be nothing but this token.
    return (
        f"one token ({text[first:last]!r}) holds the end of the prompt ({text[first:start]!r}) and "
        f"the beginning of the answer ({text[start:last]!r}); white space there belongs to the "
        "beginning of a completion, and before the answer of a conversation to neither"
    )
