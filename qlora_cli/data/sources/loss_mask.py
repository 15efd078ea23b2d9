"""Which turns of a conversation are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_cli.errors import DataError
from qlora_cli.types import Message, Role


def mark_trained_turns(
    messages: list[Message], *, roles: Sequence[Role], last_only: bool
) -> list[Message]:
    """The messages with `train` set by role and place.

    What a row says itself of a turn (`train: false`, `train: true`) stays so, and verbatim pieces
    and the prompts of a format are learnt as the format says.

    Raises:
        DataError: nothing is left to learn.
    """
    last = max((i for i, m in enumerate(messages) if m.role in roles), default=None)
    chosen = [
        _with_train(message, _is_learnt(message, roles, i == last or not last_only))
        for i, message in enumerate(messages)
    ]
    if not any(message.train for message in chosen):
        turns = "its last turn" if last_only else "any turn"
        raise DataError(f"nothing to learn in {turns} of {', '.join(roles)}")
    return chosen


def _is_learnt(message: Message, roles: Sequence[Role], is_due: bool) -> bool:
    if message.is_marked or message.role == "text":
        return message.train
    # An answer in the prompt of a row is none that is due.
    return is_due and message.role in roles and (message.train or message.role != "assistant")


def _with_train(message: Message, train: bool) -> Message:
    return message if message.train is train else replace(message, train=train)
