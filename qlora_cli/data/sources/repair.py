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


def helpful_repairs(row: Row, is_usable: Callable[[Row], bool]) -> list[Repair]:
    """Return the fewest repairs that make a row usable; [] if they do not."""
    changed: Counter[str] = Counter()
    candidate = repaired(row, get_args(Repair), changed)
    if not changed or not is_usable(candidate):
        return []
    needed = [repair for repair in _REPAIRS if repair in changed]
    for repair in list(needed):
        others = [other for other in needed if other != repair]
        if is_usable(repaired(row, others, Counter())):
            needed = others
    return needed


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
