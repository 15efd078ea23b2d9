"""The rows of a race: a file of conversations for us, and the same as tokens for the others.

Ours prepares and orders them. The others get the same tokens and labels in the same order, so each
step of every contestant trains on the same rows.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_cli.types import Example

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Rows:
    """Files with the rows of a race, and token counts of each step."""

    conversations: Path
    in_order: Path
    """Tokens and labels, in training order."""
    by_length: Path
    """The same, the longest of each step first."""
    lengths: list[list[int]]
    """Tokens of each row, step by step."""
    supervised: list[list[int]]
    """Supervised tokens of each row, step by step."""

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))


def gsm8k(folder: Path, number: int, name: str = "train.jsonl") -> list[Conversation]:
    """Read the first rows of a split as conversations of question and answer."""
    with (folder / name).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, number)]
    return [_conversation(row["question"], row["answer"]) for row in rows]


def of_length(
    folder: Path, model: Path, length: int, number: int, *, available: int = 2048
) -> list[Conversation]:
    """Make rows of about `length` tokens, half of them supervised, from words of GSM8K."""
    from qlora_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    turns = gsm8k(folder, available)
    questions, answers = (
        " ".join(turn[which]["content"] for turn in turns).split() for which in (0, 1)
    )

    def row(i: int) -> Conversation:
        # Each begins elsewhere.
        ask, answer = (words[i * len(words) // number :] * 2 for words in (questions, answers))

        def of_words(num_asked: int, num_answered: int) -> Conversation:
            return _conversation(" ".join(ask[:num_asked]), " ".join(answer[:num_answered]))

        def size(num_asked: int, num_answered: int) -> int:
            return len(
                tokenizer.apply_chat_template(of_words(num_asked, num_answered), return_dict=False)
            )

        half = fitting(lambda n: size(n, 0), length // 2)
        return of_words(half, fitting(lambda n: size(half, n), length))

    return [row(i) for i in range(number)]


def fitting(size_of: Callable[[int], int], most: int) -> int:
    """The largest n for which size_of(n) <= most, where size_of grows with n and at least as fast.

    A word is a token at least, so no more than `most` words fit into `most` tokens.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if size_of(middle) <= most:
            low = middle
        else:
            high = middle - 1
    return low


def write(
    conversations: Sequence[Conversation],
    folder: Path,
    model: Path,
    *,
    rows_per_step: int,
    max_length: int,
    seed: int,
) -> Rows:
    """Prepare the conversations as `qlora train` does, and write the files of a race.

    Args:
        folder: an empty one to write to.
        model: folder with the tokenizer.
    """
    path = folder / "conversations.jsonl"
    _write_lines(path, ({"messages": conversation} for conversation in conversations))
    examples = _prepare(path, model, max_length)
    steps = in_our_order(examples, rows_per_step=rows_per_step, seed=seed)
    sorted_steps = [sorted(step, key=lambda e: -len(e.input_ids)) for step in steps]
    files = folder / "in_order.jsonl", folder / "by_length.jsonl"
    for file, some in zip(files, (steps, sorted_steps), strict=True):
        _write_lines(
            file,
            ({"input_ids": e.input_ids, "labels": e.labels} for step in some for e in step),
        )
    return Rows(
        path,
        *files,
        lengths=[[len(e.input_ids) for e in step] for step in steps],
        supervised=[[e.num_supervised for e in step] for step in steps],
    )


def in_our_order(
    examples: Sequence[Example], *, rows_per_step: int, seed: int
) -> list[list[Example]]:
    """Return the examples of each step of one epoch, in the order of our batches."""
    from qlora_cli.data.batching.sampler import BatchStream

    stream = BatchStream(
        examples,
        batch_size=rows_per_step,
        micro_batch_size=1,
        seed=seed,
        epochs=1,
        pad_token_id=0,
    )
    return [
        [examples[i] for row in stream.rows(step) for i in row] for step in range(stream.num_steps)
    ]


def _prepare(path: Path, model: Path, max_length: int) -> list[Example]:
    from qlora_cli.data.config import Data
    from qlora_cli.data.prepared.prepare import prepare
    from qlora_cli.models.tokenizer import load_tokenizer

    settings = Data.model_validate({"train": {"path": str(path)}, "max_length": max_length})
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(settings.train_sources, load_tokenizer(model), settings, Path(folder))
        return [prepared.examples[i] for i in range(len(prepared.examples))]


def _conversation(question: str, answer: str) -> Conversation:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _write_lines(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
