"""Tasks in which the model chooses the most likely of several options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.errors import DataError
from qlora_cli.tasks.task import Outcome, Scorer
from qlora_cli.types import IGNORE_INDEX, Conversation, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question and its options."""

    place: str
    prompt: str
    options: list[str]
    answer: int
    """Index of the correct option."""
    examples: list[Example]
    """One per option: the tokens of the prompt and of the option; the option's are supervised."""


def place_and_length(item: ChoiceItem) -> tuple[str, int]:
    """Return the location of an item, and the tokens of its prompt with the longest option."""
    return item.place, max(len(example.input_ids) for example in item.examples)


def evaluate_choices(
    scorer: Scorer,
    items: Sequence[ChoiceItem],
    values: Callable[[ChoiceItem, list[float]], dict[str, float]],
) -> list[Outcome]:
    """Choose the most likely option of each item.

    Args:
        values: the values of an item, given the log-likelihood of each option in nats.
    """
    found = iter(scorer.log_likelihoods([e for q in items for e in q.examples]))
    outcomes = []
    for item in items:
        log_p = [next(found) for _ in item.options]
        chosen = item.options[log_p.index(max(log_p))]
        right = item.options[item.answer]
        outcomes.append(Outcome(item.place, item.prompt, right, chosen, values(item, log_p)))
    return outcomes


def encode_choice(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Conversation,
    turn: Message,
    options: list[str],
    answer: int,
    place: str,
) -> ChoiceItem:
    """Encode each option after the prompt, as in training but without the end of the turn.

    Args:
        prompt: the turns before the answer, and the tools.
        turn: the turn to complete; each option is appended to its content.
        answer: index of the correct option.

    Raises:
        DataError: the tokens of an option are ambiguous.
    """
    examples = []
    for option in options:
        completed = replace(turn, content=turn.content + option)
        encoded = encoder.encode(
            [*prompt.messages, completed], max_length=sys.maxsize, tools=prompt.tools
        )
        if encoded.lost is not None:
            raise DataError(encoded.lost)
        examples.append(_without_end(encoded.example, encoded.turn_ends[-1].length))
    first = examples[0]
    start = next(i for i, label in enumerate(first.labels) if label != IGNORE_INDEX)
    text = str(tokenizer.decode(first.input_ids[:start]))
    return ChoiceItem(place, text, options, answer, examples)


def _without_end(example: Example, length: int) -> Example:
    """Cut the tokens that end the turn, which are the same for every option."""
    last = max(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
    stop = last + 1 - length
    return Example(example.input_ids[:stop], example.labels[:stop])


def split_at_answer(conversation: Conversation) -> tuple[Conversation, Message]:
    """Split a conversation into its prompt (with the tools) and its last supervised turn.

    Raises:
        DataError: there is no prompt.
    """
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.train), default=0)
    if last == 0:
        raise DataError("the row has no prompt: nothing precedes its answer")
    before = [replace(message, train=False) for message in messages[:last]]
    return replace(conversation, messages=before), messages[last]
