"""What tasks share that let a model choose: of the options, it takes the likeliest."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.errors import DataError
from qlora_cli.tasks.task import Outcome, Scorer, Task
from qlora_cli.types import IGNORE_INDEX, Conversation, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Choice:
    """A question with its options."""

    place: str
    prompt: str
    options: list[str]
    answer: int
    """Which of the options is right."""
    examples: list[Example]
    """For each option: the prompt, and its tokens, which are supervised."""


class ChoiceTask(Task):
    """A task whose questions have options."""

    def examine(self, model: Scorer, questions: Sequence[Choice]) -> list[Outcome]:
        found = iter(model.log_likelihoods([e for q in questions for e in q.examples]))
        outcomes = []
        for question in questions:
            log_p = [next(found) for _ in question.options]
            chosen = question.options[log_p.index(max(log_p))]
            right = question.options[question.answer]
            values = self.values(question, log_p)
            outcomes.append(Outcome(question.place, question.prompt, right, chosen, values))
        return outcomes

    @abstractmethod
    def values(self, question: Choice, log_p: list[float]) -> dict[str, float]:
        """What is counted, given the log-likelihood of each option in nats."""


def encode_choice(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    before: list[Message],
    turn: Message,
    options: list[str],
    answer: int,
    place: str,
    *,
    separator: str = "",
) -> Choice:
    """The tokens of each option after what comes before, as in training but without their end.

    Args:
        turn: whose content an option takes the place of.
        separator: what precedes each option in it.

    Raises:
        DataError: it cannot be told exactly which tokens an option has.
    """
    examples = []
    for option in options:
        answered = replace(turn, content=separator + option)
        encoded = encoder.encode([*before, answered], max_length=sys.maxsize)
        if encoded.lost is not None:
            raise DataError(encoded.lost)
        examples.append(_without_end(encoded.example, encoded.turn_ends[-1].token_id))
    first = examples[0]
    start = next(i for i, label in enumerate(first.labels) if label != IGNORE_INDEX)
    prompt = str(tokenizer.decode(first.input_ids[:start]))
    return Choice(place, prompt, options, answer, examples)


def _without_end(example: Example, end: int | None) -> Example:
    """Up to the last token of the option; the same end after each would tell nothing of them."""
    last = max(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
    stop = last + 1 if end is None else last
    return Example(example.input_ids[:stop], example.labels[:stop])


def asked(conversation: Conversation) -> tuple[list[Message], Message]:
    """What precedes the last learnt turn of a row, and that turn.

    Raises:
        DataError: nothing precedes it.
    """
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.train), default=0)
    if last == 0:
        raise DataError("nothing precedes the answer, so nothing is asked")
    return [replace(message, train=False) for message in messages[:last]], messages[last]
