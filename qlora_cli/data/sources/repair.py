"""Opt-in repairs of what conversations often contain (`data.repair`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from qlora_cli.data.formats.fields import is_given, shown
from qlora_cli.data.formats.turns import OTHER_ROLES, SameRoleError
from qlora_cli.types import Row

Repair = Literal["parse_json_strings", "role_names", "merge_same_role", "drop_trailing_user"]
"""In the order in which they are made."""

Turns = list[dict[str, Any]]


def repaired(row: Row, repairs: Sequence[Repair], counts: Counter[str]) -> Row:
    """Return a row with each column of turns repaired.

    Args:
        counts: is incremented for each repair that changed the row.
    """
    for repair in _REPAIRS:
        if repair not in repairs:
            continue
        changed = {name: _REPAIRS[repair](value) for name, value in row.items()}
        if changed != row:
            counts[repair] += 1
            row = changed
    return row


class RepairSearch:
    """Finds repairs that make bad rows usable.

    Bad rows of a file are much alike: repairs that helped a row are tried first on the next ones
    that the same repairs change. Trying each repair on each row would take longer than reading it.

    Args:
        is_usable: tells if a row can be read as a conversation.
    """

    def __init__(self, is_usable: Callable[[Row], bool]) -> None:
        self._is_usable = is_usable
        self._found: dict[tuple[Repair, ...], tuple[Repair, ...]] = {}
        """Repairs that change a row -> those of them that made such a row usable."""

    def helpful(self, row: Row) -> tuple[Repair, ...]:
        """Return repairs that make a row usable, without superfluous ones; () if there are none."""
        counts: Counter[str] = Counter()
        candidate = repaired(row, get_args(Repair), counts)
        changed = tuple(repair for repair in _REPAIRS if repair in counts)
        known = self._found.get(changed)
        if known is not None and known == changed:
            return changed if self._is_usable(candidate) else ()
        if known is not None and self._helps(row, known):
            return known
        if not changed or not self._is_usable(candidate):
            return ()
        self._found[changed] = self._fewest(row, changed)
        return self._found[changed]

    def _fewest(self, row: Row, needed: tuple[Repair, ...]) -> tuple[Repair, ...]:
        for repair in needed:
            others = tuple(other for other in needed if other != repair)
            if others and self._helps(row, others):
                needed = others
        return needed

    def _helps(self, row: Row, repairs: tuple[Repair, ...]) -> bool:
        return self._is_usable(repaired(row, repairs, Counter()))


def _is_turns(value: object) -> bool:
    """Tell if a value is a list of turns, in OpenAI's shape or in ShareGPT's."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


def _of_turns(change: Callable[[Turns], Turns]) -> Callable[[Any], Any]:
    return lambda value: change(value) if _is_turns(value) else value


def _parse_json_string(value: Any) -> Any:
    """Parse JSON text that is a list of turns; a text that is not stays."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if _is_turns(found) else value


def _rename_roles(turns: Turns) -> Turns:
    def renamed(turn: dict[str, Any]) -> dict[str, Any]:
        key = "role" if "role" in turn else "from"
        name = turn[key]
        known = OTHER_ROLES.get(name.strip().lower(), name) if isinstance(name, str) else name
        # ShareGPT's own names are read as they are.
        is_read = key == "from" and name in ("human", "gpt", "observation")
        return turn if known == name or is_read else {**turn, key: known}

    return [renamed(turn) for turn in turns]


def _merge_same_role(turns: Turns) -> Turns:
    """Join consecutive turns of one role that hold nothing but text."""
    merged: Turns = []
    for turn in turns:
        if merged and (joined := _joined(merged[-1], turn)) is not None:
            merged[-1] = joined
        else:
            merged.append(turn)
    return merged


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    if _obstacle(one, other) is not None:
        return None
    text = _keys(one)[1]
    return {**one, text: f"{one[text]}\n\n{other[text]}"}


def _keys(turn: dict[str, Any]) -> tuple[str, str]:
    """Return the keys of a turn's role and of its text."""
    return ("role", "content") if "role" in turn else ("from", "value")


def _obstacle(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return why two turns are not joined, and what to do instead; None if they can be."""
    role, text = _keys(one)
    roles = one.get(role), other.get(role)
    if roles[0] != roles[1] or not isinstance(roles[0], str):
        return f"their roles are written {roles[0]!r} and {roles[1]!r}; {_BY_HAND}"
    if roles[0].lower() in ("tool", "observation", "function", "function_call"):
        return f"each of role {roles[0]} is a call or a result of its own; {_BY_HAND}"
    # Calls, reasoning and marks belong to one turn.
    for turn, which in ((one, "the first"), (other, "the second")):
        more = [key for key in turn if key not in (role, text) and is_given(turn, key)]
        if more:
            return f"{which} has {', '.join(map(repr, more))}; {_BY_HAND}"
        if not isinstance(turn.get(text), str):
            return f"{which} has {text} {shown(turn.get(text))}, not text; {_BY_HAND}"
    return None


_BY_HAND = "make them one message in the data, or add the message that is missing between them"


def why_not_joined(row: Row, error: SameRoleError, repairs: Sequence[Repair]) -> str:
    """Say why `merge_same_role` does not join two messages; "" if it would.

    Args:
        error: of the row, after `repairs` were made.
    """
    turns: Any = row.get(error.field)
    at = error.index
    if not _is_turns(turns):
        is_on = "merge_same_role" in repairs
        return f"; merge_same_role joins only messages of one column; {_BY_HAND}" if is_on else ""
    obstacle = _obstacle(turns[at - 1], turns[at])
    return "" if obstacle is None else f"; merge_same_role does not join them, because {obstacle}"


def _drop_trailing_user(turns: Turns) -> Turns:
    kept = list(turns)
    while kept and kept[-1].get("role", kept[-1].get("from")) in ("user", "human"):
        kept.pop()
    return kept


_REPAIRS: dict[Repair, Callable[[Any], Any]] = {
    "parse_json_strings": _parse_json_string,
    "role_names": _of_turns(_rename_roles),
    "merge_same_role": _of_turns(_merge_same_role),
    "drop_trailing_user": _of_turns(_drop_trailing_user),
}
