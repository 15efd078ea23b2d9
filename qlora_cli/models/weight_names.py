"""Map the names of a model's weights to the names in its files, which can differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_cli.models.shards import StoredTensor


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A stored matrix that is the part [expert, start : start + rows] of a tensor of the model."""

    name: str
    """Name in the files."""
    whole: str
    """Name in the model of the whole tensor, (experts, rows, columns)."""
    expert: int
    start: int
    rows: int


class WeightNames:
    """Names in the files and names in the model, each found by the other.

    Args:
        skeleton: the model on the meta device.
        stored: the tensors of its files.
    """

    def __init__(self, skeleton: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
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
        self.in_model: dict[str, str] = {}
        """Name in the files -> name in the model. A tensor that is only a part of a weight of the
        model keeps its own name."""
        self.in_files: dict[str, str] = {}
        """Name in the model -> name in the files."""
        self.parts: dict[str, list[WeightPart]] = {}
        """Weight of the model -> the stored tensors that it is assembled from, where the place of
        each is known."""
        assembled: dict[str, list[tuple[str, str]]] = {}
        for name in stored:
            model_name, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if model_name not in state and name in state:
                model_name, pattern = rename_source_key(name, [], [], prefix, state)
            if pattern is not None:
                assembled.setdefault(model_name, []).append((name, pattern))
                model_name = name
            self.in_model[name] = model_name
            self.in_files[model_name] = name
        for target, source in skeleton.all_tied_weights_keys.items():
            self.in_files.setdefault(target, self.in_files.get(source, source))
        for whole, sources in assembled.items():
            [converter] = [one for one in converters if sources[0][1] in one.source_patterns][:1]
            parts = list(_parts(whole, sources, converter, stored))
            if _shape(parts) == (tuple(state[whole].shape[:2]) if whole in state else ()):
                self.parts[whole] = parts


def _parts(
    whole: str,
    sources: list[tuple[str, str]],
    converter: Any,
    stored: Mapping[str, StoredTensor],
) -> Iterator[WeightPart]:
    """Yield the parts of a stack of experts: one matrix per expert, or several stacked by rows.
    Yield nothing for a tensor that is assembled in another way.

    Args:
        sources: name in the files, and the pattern of the converter that it matches.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return
    start = 0
    for pattern in converter.source_patterns:
        number = re.escape(pattern).replace(r"\*", r"(\d+)")
        matches = {
            name: found
            for name, one in sources
            if one == pattern
            if (found := re.search(number, name))
        }
        heights = {stored[name].shape[0] for name in matches}
        if len(heights) != 1:
            return
        [rows] = heights
        for name, found in matches.items():
            yield WeightPart(name, whole, int(found[1]), start, rows)
        start += rows


def _shape(parts: list[WeightPart]) -> tuple[int, ...]:
    """Return (experts, rows) of the assembled tensor, or () if the parts leave a gap."""
    places = sorted({(part.expert, part.start, part.rows) for part in parts})
    experts = 1 + max((part.expert for part in parts), default=-1)
    rows = max((part.start + part.rows for part in parts), default=0)
    is_whole = len(places) == len(parts) and sum(one[2] for one in places) == experts * rows
    return (experts, rows) if is_whole else ()
