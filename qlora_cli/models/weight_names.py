"""How a model names its weights, and how the files do: not always alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_cli.models.shards import Stored


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A stored matrix that is a part of one tensor of the model: [expert, start : start + rows]."""

    name: str
    """In the files."""
    whole: str
    """The tensor in the model, (experts, rows, columns)."""
    expert: int
    start: int
    rows: int


class WeightNames:
    """The names of both sides, each by the other.

    Args:
        skeleton: the model on the meta device.
        stored: the tensors of its files.
    """

    def __init__(self, skeleton: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        state = skeleton.state_dict()
        mapping = get_model_conversion_mapping(skeleton)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = skeleton.base_model_prefix
        self.live: dict[str, str] = {}
        """Stored name -> name in the model; itself, where the model has no such weight, but one
        that is put together from it."""
        self.stored: dict[str, str] = {}
        """The other way round."""
        self.pieces: dict[str, list[WeightPart]] = {}
        """Weight of the model -> the stored ones that it is put together from, if it is known
        which part of it each of them is."""
        parts: dict[str, list[tuple[str, str]]] = {}
        for name in stored:
            live, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if live not in state and name in state:
                live, pattern = rename_source_key(name, [], [], prefix, state)
            if pattern is not None:
                parts.setdefault(live, []).append((name, pattern))
                live = name
            self.live[name] = live
            self.stored[live] = name
        for target, source in skeleton.all_tied_weights_keys.items():
            self.stored.setdefault(target, self.stored.get(source, source))
        for whole, some in parts.items():
            [converter] = [one for one in converters if some[0][1] in one.source_patterns][:1]
            pieces = list(_pieces(whole, some, converter, stored))
            if _size(pieces) == (tuple(state[whole].shape[:2]) if whole in state else ()):
                self.pieces[whole] = pieces


def _pieces(
    whole: str, parts: list[tuple[str, str]], converter: Any, stored: Mapping[str, Stored]
) -> Iterator[WeightPart]:
    """The parts of a stack of experts, where it is one: of each expert, some matrices one below
    the other. Of anything else, nothing."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return
    start = 0
    for pattern in converter.source_patterns:
        number = re.escape(pattern).replace(r"\*", r"(\d+)")
        mine = {
            name: found
            for name, one in parts
            if one == pattern
            if (found := re.search(number, name))
        }
        rows = {stored[name].shape[0] for name in mine}
        if len(rows) != 1:
            return
        [height] = rows
        for name, found in mine.items():
            yield WeightPart(name, whole, int(found[1]), start, height)
        start += height


def _size(pieces: list[WeightPart]) -> tuple[int, ...]:
    """(experts, rows) of what pieces make together; nothing, if they leave a gap."""
    places = sorted({(piece.expert, piece.start, piece.rows) for piece in pieces})
    experts = 1 + max((piece.expert for piece in pieces), default=-1)
    rows = max((piece.start + piece.rows for piece in pieces), default=0)
    is_whole = len(places) == len(pieces) and sum(one[2] for one in places) == experts * rows
    return (experts, rows) if is_whole else ()
