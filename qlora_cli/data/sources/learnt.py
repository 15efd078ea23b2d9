"""Which turns of a conversation are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_cli.errors import DataError
from qlora_cli.types import Message, Role


def choose_learnt(
    messages: list[Message], *, roles: Sequence[Role], last_only: bool
) -> list[Message]:
    """The messages with `train` set by role and place.

    What a row says itself (`train: false` in an answer, `train: true` in another turn) stays so,
    and verbatim pieces are learnt as their format says.

    Raises:
        DataError: nothing is left to learn.
    """
    last = max((i for i, m in enumerate(messages) if _is_due(m, roles)), default=None)
    chosen = [
        _with_train(message, _is_learnt(message, roles) and (i == last or not last_only))
        for i, message in enumerate(messages)
    ]
    if not any(message.train for message in chosen):
        turns = "its last turn" if last_only else "any turn"
        raise DataError(f"nothing to learn in {turns} of {', '.join(roles)}")
    return chosen


def _is_due(message: Message, roles: Sequence[Role]) -> bool:
    return message.role in roles or (message.train and message.role != "assistant")


def _is_learnt(message: Message, roles: Sequence[Role]) -> bool:
    return _is_due(message, roles) and (message.train or message.role != "assistant")


def _with_train(message: Message, train: bool) -> Message:
    return message if message.train is train else replace(message, train=train)
