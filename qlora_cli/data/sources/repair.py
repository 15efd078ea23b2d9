"""Opt-in repairs of what conversations often contain (`data.repair`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from qlora_cli.data.formats.turns import OTHER_ROLES
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
    role, text = ("role", "content") if "role" in one else ("from", "value")
    texts = one.get(text), other.get(text)
    rest = [{k: v for k, v in turn.items() if k != text and v is not None} for turn in (one, other)]
    is_same = rest[0] == rest[1] and isinstance(one.get(role), str)
    if not is_same or one[role].lower() in ("tool", "observation", "function", "function_call"):
        return None
    # Calls, reasoning and marks belong to one turn.
    if rest[0].keys() != {role} or not all(isinstance(part, str) for part in texts):
        return None
    return {**one, text: "\n\n".join(part for part in texts if isinstance(part, str))}


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
