"""Choose the turns of a conversation to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_cli.errors import DataError
from qlora_cli.types import Message, Role


def mark_trained_turns(
    messages: list[Message], *, roles: Sequence[Role], last_only: bool
) -> list[Message]:
    """Set `train` on messages by role and position.

    A row's own mark on a turn (`train: false`, `train: true`) has priority. For verbatim pieces and
    prompts, the format has decided.

    Raises:
        DataError: no turn is left to train on.
    """
    last = max((i for i, m in enumerate(messages) if m.role in roles), default=None)
    chosen = [
        _with_train(message, _is_trained(message, roles, i == last or not last_only))
        for i, message in enumerate(messages)
    ]
    if not any(message.train for message in chosen):
        turns = "its last turn" if last_only else "any turn"
        raise DataError(f"nothing to train on in {turns} of {', '.join(roles)}")
    return chosen


def _is_trained(message: Message, roles: Sequence[Role], is_due: bool) -> bool:
    if message.is_marked or message.role == "text":
        return message.train
    # An answer in the prompt of a row is not one to train on.
    return is_due and message.role in roles and (message.train or message.role != "assistant")


def _with_train(message: Message, train: bool) -> Message:
    return message if message.train is train else replace(message, train=train)
