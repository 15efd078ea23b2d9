"""From messages to tokens and labels. What is learnt is decided here and nowhere else."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_cli.data.layout import Layout, Renderer
from qlora_cli.data.sources import BadRows, Source, first_lines
from qlora_cli.errors import DataError
from qlora_cli.types import IGNORE_INDEX, Conversation, Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

MIN_STOPPED = 0.99
"""Least share of learnt turns that end in a token to stop at; with fewer, the model runs on."""

_BATCH = 256

T = TypeVar("T")


def read_chat_template(path: str | None) -> str | None:
    """The Jinja text of `data.chat_template`, or None where none is named.

    Raises:
        DataError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.chat_template: {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template: {path}: not UTF-8: {error}") from error


@dataclass(frozen=True, slots=True)
class Prepared:
    """The examples of a source, and what became of its rows."""

    examples: list[Example]
    stop_token_ids: list[int]
    """Tokens that end the learnt turns: what generation has to stop at."""
    num_rows: int
    """Rows read."""
    num_lost: int
    """Rows dropped because nothing was left to learn."""
    num_truncated: int
    """Rows cut at `max_length`; the lost ones among them."""
    num_tokens: int
    num_supervised: int
    digest: str
    """sha256 of the source."""
    stops: list[str]
    """The stop tokens as text."""

    def summary(self) -> str:
        """One line for the log."""
        longest = max(len(example.input_ids) for example in self.examples)
        return (
            f"{self.num_rows:,} rows ({self.num_truncated:,} cut, {self.num_lost:,} dropped), "
            f"{self.num_tokens:,} tokens, {self.num_supervised / self.num_tokens:.1%} of them "
            f"learnt, longest row {longest:,}; turns end with {' '.join(self.stops)}"
        )

    def record(self) -> dict[str, Any]:
        """All but the examples, for the record of the run."""
        names = [field.name for field in fields(self) if field.name != "examples"]
        return {name: getattr(self, name) for name in names}


def prepare(
    source: Source, tokenizer: PreTrainedTokenizerFast, *, max_length: int, max_lost: float
) -> Prepared:
    """Read, format and tokenize all rows of a source.

    Args:
        max_length: tokens per row; what is longer is cut at the end.
        max_lost: share of rows that may be dropped because nothing is left to learn.

    Raises:
        DataError: no rows, bad rows (all are counted), too many lost rows, or turns that do not
            end in a token to stop at.
    """
    rows = _conversations(source)
    encoded = Encoder(tokenizer).encode_rows(rows, max_length=max_length, path=source.path)
    _check_lost(encoded, rows, max_lost, source.path)
    kept = [row for row in encoded if row.lost is None]
    _check_stops(kept, source.path)
    stop_token_ids = sorted(
        {end.token_id for row in kept for end in row.turn_ends if end.token_id is not None}
    )
    return Prepared(
        examples=[row.example for row in kept],
        stop_token_ids=stop_token_ids,
        num_rows=len(encoded),
        num_lost=len(encoded) - len(kept),
        num_truncated=sum(row.length > max_length for row in encoded),
        num_tokens=sum(len(row.example.input_ids) for row in kept),
        num_supervised=sum(row.example.num_supervised for row in kept),
        digest=source.digest(),
        stops=[str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in stop_token_ids],
    )


def join(prepared: list[Prepared]) -> Prepared:
    """Several sources as one."""
    stop_token_ids = {token_id for one in prepared for token_id in one.stop_token_ids}
    return Prepared(
        examples=[example for one in prepared for example in one.examples],
        stop_token_ids=sorted(stop_token_ids),
        num_rows=sum(one.num_rows for one in prepared),
        num_lost=sum(one.num_lost for one in prepared),
        num_truncated=sum(one.num_truncated for one in prepared),
        num_tokens=sum(one.num_tokens for one in prepared),
        num_supervised=sum(one.num_supervised for one in prepared),
        digest=sha256(" ".join(one.digest for one in prepared).encode()).hexdigest(),
        stops=sorted({stop for one in prepared for stop in one.stops}),
    )


def prepare_prompts(source: Source, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """A prompt and its reference for each row of a source.

    Raises:
        DataError: no rows, or bad rows (all are counted).
    """
    return Encoder(tokenizer).to_prompts(_conversations(source), path=source.path)


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What stands where a learnt turn ends."""

    token_id: int | None
    """The added token (such as `<|im_end|>`) that ends it; None if something else follows."""
    text: str
    """The text that follows the content."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row in tokens, cut to `max_length`."""

    example: Example
    length: int
    """Tokens before cutting."""
    turn_ends: list[TurnEnd]
    """The end of each learnt turn that was not cut."""
    lost: str | None
    """Why the row is not to be learnt from, if it is not."""


class Encoder:
    """Turns messages into tokens and labels, with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._bos = _bos_that_is_added(tokenizer)

    def encode(self, messages: list[Message], *, max_length: int) -> Encoded:
        """Tokens and labels of one row.

        Raises:
            DataError: it cannot be told exactly what is to be learnt.
        """
        [encoded] = self._encode([self._renderer.lay_out(Conversation(messages))], max_length)
        return encoded

    def to_prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> Prompt:
        """What precedes the last learnt message, with the generation prompt; and its content.

        Raises:
            DataError: nothing precedes it, or the chat template refuses.
        """
        layout = self._renderer.lay_out_prompt(Conversation(messages, tools=tools))
        [(ids, _)] = self._tokenize([layout.text])
        bos = self._missing_bos(ids) if layout.is_verbatim else []
        reference = next(message.content for message in reversed(messages) if message.train)
        return Prompt([*bos, *ids], reference)

    def encode_rows(self, rows: list[Conversation], *, max_length: int, path: str) -> list[Encoded]:
        """Tokens and labels of the rows of a source.

        Raises:
            DataError: the chat template is missing or broken, or rows of which it cannot be told
                exactly what is to be learnt (all are counted).
        """
        self._check_template(rows)
        layouts = _each(rows, self._renderer.lay_out, path)
        batches = (layouts[at : at + _BATCH] for at in range(0, len(layouts), _BATCH))
        return [encoded for batch in batches for encoded in self._encode(batch, max_length)]

    def to_prompts(self, rows: list[Conversation], *, path: str) -> list[Prompt]:
        """A prompt for each row of a source.

        Raises:
            DataError: the chat template is missing or broken, or rows without a prompt (all are
                counted).
        """
        self._check_template(rows)
        return _each(rows, lambda row: self.to_prompt(row.messages, row.tools), path)

    def _check_template(self, rows: list[Conversation]) -> None:
        if any(row.messages[0].role != "text" for row in rows):
            self._renderer.check_template()

    def _encode(self, layouts: list[Layout], max_length: int) -> list[Encoded]:
        tokens = self._tokenize([layout.text for layout in layouts])
        return [
            self._label(layout, ids, offsets, max_length)
            for layout, (ids, offsets) in zip(layouts, tokens, strict=True)
        ]

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
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
        self, layout: Layout, ids: list[int], offsets: list[tuple[int, int]], max_length: int
    ) -> Encoded:
        if layout.is_verbatim:
            ids, offsets = self._enclose(ids, offsets, len(layout.text))
        starts, ends = _extents(offsets)
        labels = [IGNORE_INDEX] * len(ids)
        turn_ends, lost = [], None
        for answer in layout.answers:
            first, last = bisect_right(ends, answer.start), bisect_right(ends, answer.stop)
            is_stopped = last < len(ids) and ids[last] in self._added_ids
            after = last + 1 if is_stopped else bisect_right(ends, answer.end)
            labels[first:after] = ids[first:after]
            if first < after and starts[first] < answer.start:
                lost = _straddles(layout.text, answer.start, starts[first], ends[first])
            if after <= max_length:
                follows = layout.text[answer.end : answer.end + 20]
                turn_ends.append(TurnEnd(ids[last] if is_stopped else None, follows))
        example = Example(ids[:max_length], labels[:max_length])
        if lost is None and example.num_supervised == 0:
            lost = f"{len(ids):,} tokens, cut at max_length {max_length:,} before the answer"
        return Encoded(example, len(ids), turn_ends, lost)


def _conversations(source: Source) -> list[Conversation]:
    bad = BadRows()
    conversations = list(source.conversations(bad))
    bad.check(source.path)
    return conversations


def _each(rows: list[Conversation], work: Callable[[Conversation], T], path: str) -> list[T]:
    """`work` done for each row; the rows that it refuses are reported together."""
    bad, results = BadRows(), []
    for row in rows:
        try:
            results.append(work(row))
        except DataError as error:
            bad.add(row.place, error)
    bad.check(path)
    return results


def _check_lost(
    encoded: list[Encoded], rows: list[Conversation], max_lost: float, path: str
) -> None:
    pairs = zip(rows, encoded, strict=True)
    lost = [f"{row.place}: {result.lost}" for row, result in pairs if result.lost is not None]
    if not lost:
        return
    message = f"{path}: {len(lost):,} of {len(encoded):,} rows cannot be learnt from"
    if len(lost) > max_lost * len(encoded) or len(lost) == len(encoded):
        raise DataError(
            f"{message}; data.max_lost allows {max_lost:.1%}\n{first_lines(lost)}",
            hint="raise data.max_length, shorten or repair the rows, or raise data.max_lost",
        )
    log.warning("%s and are dropped\n%s", message, first_lines(lost))


def _check_stops(encoded: list[Encoded], path: str) -> None:
    turn_ends = [end for row in encoded for end in row.turn_ends]
    if not turn_ends:
        log.warning("%s: every row is cut, so the model never learns where to stop", path)
    unstopped = Counter(end.text for end in turn_ends if end.token_id is None)
    if unstopped.total() > (1 - MIN_STOPPED) * len(turn_ends):
        [(follows, _)] = unstopped.most_common(1)
        raise DataError(
            f"{path}: {unstopped.total():,} of {len(turn_ends):,} learnt turns end in no added "
            f"token, so the tuned model would not know where to stop; after the content comes "
            f"{follows!r}",
            hint="name a template in data.chat_template that ends assistant turns with a special "
            "token of the tokenizer",
        )


def _bos_that_is_added(tokenizer: PreTrainedTokenizerFast) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else None


def _extents(offsets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """First and last character (exclusive) of each token, white space before it included.

    Byte-level tokenizers may report offsets without the white space that a token holds; then a
    token that reaches back into the prompt would pass for one of the answer.
    """
    ends = [end for _, end in offsets]
    starts = [min(start, before) for (start, _), before in zip(offsets, [0, *ends], strict=False)]
    return starts, ends


def _straddles(text: str, start: int, first: int, last: int) -> str:
    # Dropped rather than learnt in part: in training the model would see one token where at
    # generation the prompt ends in another, and the answer may be nothing but this token.
    return (
        f"one token ({text[first:last]!r}) holds the end of the prompt ({text[first:start]!r}) and "
        f"the beginning of the answer ({text[start:last]!r}); white space there belongs to the "
        "beginning of a completion, and before the answer of a conversation to neither"
    )
