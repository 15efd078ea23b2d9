"""Rewrite the weights of a model folder with one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.formatting import MIB, first_names
from qlora_cli.common.progress import Progress
from qlora_cli.common.safetensors_writer import bytes_of
from qlora_cli.errors import ModelError
from qlora_cli.models.shards import INDEX, Shards, StoredTensor, write_shard
from qlora_cli.runs.merge_report import UpdateReport

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_cli.adapters.weight_edits import WeightEdits
    from qlora_cli.export.dequantize import FakeQuantizer
    from qlora_cli.models.weight_names import WeightNames

log = logging.getLogger("qlora")

_CHUNK = 2**18
"""Number of values that are compared at a time."""
_MAX_NAMED = 5


class UnmappedWeights(ModelError):
    """Weights to change are stored in another form than the model has.

    Args:
        names: their names in the model.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"{first_names(names, _MAX_NAMED)}: the files store this in another form than the "
            "model, and it is not known which part is which; such a merge is not supported"
        )
        self.names = names


@dataclass(slots=True)
class MergeStatistics:
    """Running statistics of a merge. Sums of squares are over all updated weights together."""

    updated: int = 0
    """Weights with a nonzero update."""
    untrained: int = 0
    """Trainable weights with an update of zero."""
    requantized: int = 0
    """Weights without an update, written with their dequantized values."""
    copied: int = 0
    """Weights copied from the base bit for bit."""
    lost: list[str] = field(default_factory=list)
    """Matrices whose whole update is lost to rounding in the dtype of the files."""
    update: float = 0.0
    rounding: float = 0.0
    quantization: float = 0.0

    def report(self, *, is_quantized: bool) -> UpdateReport:
        """Return the figures of a merge in which at least one weight was updated."""
        norm = math.sqrt(self.update)
        return UpdateReport(
            updated=self.updated,
            untrained=self.untrained,
            requantized=self.requantized,
            copied=self.copied,
            norm=norm,
            rounding_error=math.sqrt(self.rounding) / norm,
            quantization_error=math.sqrt(self.quantization) / norm if is_quantized else None,
        )


@dataclass(frozen=True, slots=True)
class NewHead:
    """A head that scores rows, in a merged model."""

    shapes: dict[str, tuple[int, ...]]
    """Its weights that the base does not have. They are stored in float32."""
    replaced: frozenset[str]
    """Weights of the base's files that the merged model has no place for: the head that predicts
    tokens."""
    config: dict[str, Any]
    """Settings of the merged model's config."""


class ShardMerger:
    """Writes the base's files again, with the trained updates added to the weights."""

    def __init__(
        self,
        base: Shards,
        names: WeightNames,
        edits: WeightEdits,
        rounding: FakeQuantizer,
        tied: dict[str, str],
        *,
        as_trained: bool,
        head: NewHead | None = None,
    ) -> None:
        """
        Args:
            tied: tied weights by their names in the model: target -> source.
            as_trained: add to the quantized weights rather than to those of the files.
            as_trained: add to the quantized weights rather than to those of the files.
            head: takes the place of the head that predicts tokens.

        Raises:
            UnmappedWeights: a weight to change is assembled from several stored tensors.
        """
        self._base = base
        self._names = names
        self._edits = edits
        self._rounding = rounding
        self.is_as_trained = as_trained
        self._rounded = rounding.names if as_trained else set()
        self.statistics = MergeStatistics()
        self.head = head
        self._new = {} if head is None else head.shapes
        if unknown := sorted((edits.names | self._rounded) - set(names.in_files) - set(self._new)):
            raise UnmappedWeights(unknown)
        self.untied = {
            target
            for target, source in tied.items()
            if {target, source} & edits.names and not self._are_equal(target, source)
        }
        """Weights that were tied, and no longer are."""

    @property
    def dtype(self) -> str:
        """Dtype of most of the stored values."""
        sizes: Counter[str] = Counter()
        for stored in self._base.tensors.values():
            sizes[str(stored.torch_dtype).removeprefix("torch.")] += stored.size
        return sizes.most_common(1)[0][0]

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, if there are more than in the base; otherwise None."""
        changed = [
            rows
            for live, (rows, *_) in self._edits.shapes.items()
            if live not in self._new
            and rows != self._base.tensors[self._names.in_files[live]].shape[0]
        ]
        return max(changed, default=None)

    def report(self) -> UpdateReport:
        """Return what was done to the weights."""
        return self.statistics.report(is_quantized=bool(self._rounding.names))

    def layout(self) -> dict[Path, dict[str, StoredTensor]]:
        """Return the tensors of each file: those of the base, those that are no longer tied, and
        new ones."""
        files: dict[Path, dict[str, StoredTensor]] = {file: {} for file in self._base.files}
        for name, stored in self._base.tensors.items():
            if self.head is not None and name in self.head.replaced:
                continue
            files[stored.file][name] = self._resized(self._names.in_model[name], stored)
        for live in sorted(self.untied):
            source = self._base.tensors[self._names.in_files[live]]
            if live not in self._base.tensors:
                files[source.file][live] = self._resized(live, source)
        for live, shape in self._new.items():
            last = self._base.files[-1]
            files[last][live] = StoredTensor(last, "F32", shape, 0, 4 * math.prod(shape))
        return {file: tensors for file, tensors in files.items() if tensors}

    def write(self, folder: Path) -> dict[str, str]:
        """Write all files, with progress in the log. Returns the digest of each tensor.

        Raises:
            ModelError: a weight is not finite, or a trained tensor was not used.
        """
        layout = self.layout()
        total = sum(stored.size for tensors in layout.values() for stored in tensors.values())
        progress = Progress("merging, MiB written", total // MIB)
        digests: dict[str, str] = {}
        for file, tensors in layout.items():

            def pieces(name: str, tensors: dict[str, StoredTensor] = tensors) -> Iterator[Any]:
                yield from self._pieces(name, tensors[name])
                progress.add(tensors[name].size / MIB)

            metadata = self._base.metadata[file]
            digests |= write_shard(folder / file.name, tensors, metadata, pieces)
        if self._base.has_index:
            _write_index(folder / INDEX, layout)
        if unused := self._edits.unused():
            raise ModelError(
                f"{len(unused)} trained tensors do not belong to a weight of the base: "
                f"{first_names(sorted(unused), _MAX_NAMED)}"
            )
        return digests

    def verify(self, folder: Path, digests: dict[str, str]) -> None:
        """Read the written files back and check that all updates, and nothing else, are in them.

        Raises:
            ModelError: an update is missing or lost, or another weight has changed.
        """
        written = Shards(folder)
        layout = {
            name: stored for tensors in self.layout().values() for name, stored in tensors.items()
        }
        for name in sorted(set(layout) | set(written.tensors)):
            wanted, found = layout.get(name), written.tensors.get(name)
            if wanted is None or found is None:
                raise ModelError(f"{folder}: {name} is {'unexpected' if found else 'missing'}")
            if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
                raise ModelError(
                    f"{folder}: {name} is {found.dtype} {found.shape}, "
                    f"not {wanted.dtype} {wanted.shape}"
                )
            if written.digest(name) != digests[name]:
                raise ModelError(
                    f"{folder}: {name} is not what was written; the disk may be faulty"
                )
            if not self._is_touched(name) and self._base.digest(name) != digests[name]:
                raise ModelError(f"{folder}: {name} has changed, but has no update")
        statistics = self.statistics
        if statistics.lost:
            raise ModelError(
                f"{len(statistics.lost)} weights did not change: their updates are below the "
                f"precision of their dtype: {first_names(statistics.lost, _MAX_NAMED)}",
                hint="train for longer, or at a higher learning rate",
            )
        if not statistics.updated:
            raise ModelError("every update is zero: there is nothing to merge")

    def _live(self, name: str) -> str:
        return self._names.in_model.get(name, name)

    def _is_touched(self, name: str) -> bool:
        live = self._live(name)
        return live in self._edits.names | self._rounded or name not in self._base.tensors

    def _resized(self, live: str, stored: StoredTensor) -> StoredTensor:
        return stored.resized(self._edits.shapes.get(live, stored.shape))

    def _read(self, live: str) -> Tensor:
        """Read the weight that the update is added to, in its own dtype."""
        weight = self._base.read(self._names.in_files[live])
        return self._rounding(live, weight) if live in self._rounded else weight

    def _value(self, live: str) -> Tensor:
        if live in self._edits.names:
            return self._edits.apply(live, lambda name: self._read(name).float())
        return self._read(live)

    def _are_equal(self, target: str, source: str) -> bool:
        import torch

        dtype = self._base.tensors[self._names.in_files[source]].torch_dtype
        return torch.equal(self._value(target).to(dtype), self._value(source).to(dtype))

    def _pieces(self, name: str, stored: StoredTensor) -> Iterator[Any]:
        import torch

        live = self._live(name)
        if not self._is_touched(name):
            self.statistics.copied += 1
            yield from self._base.chunks(name)
            return
        value = self._value(live)
        written = value.to(stored.torch_dtype)
        if not bool(torch.isfinite(written).all()):
            raise ModelError(f"{name} is not finite after merging: the training went wrong")
        if tuple(written.shape) != stored.shape:
            raise ModelError(f"{name} would be {tuple(written.shape)}, not {stored.shape}")
        self._count(name, live, value, written)
        del value
        yield bytes_of(written)

    def _count(self, name: str, live: str, value: Tensor, written: Tensor) -> None:
        """Update the statistics with a weight that was not copied bit for bit."""
        statistics = self.statistics
        if live not in self._edits.names:
            if live in self._rounded:
                statistics.requantized += 1
            else:
                statistics.copied += 1
            return
        if live in self._new:
            statistics.updated += 1
            statistics.update += float(value.float().square().sum())
            return
        stored = self._base.read(self._names.in_files[live])
        base = self._rounding(live, stored) if live in self._rounded else stored
        update = _squares(value, base)
        if update == 0:
            statistics.untrained += 1
            return
        statistics.updated += 1
        statistics.update += update
        statistics.rounding += _squares(value, written)
        if live in self._rounding.names:
            rounded = base if live in self._rounded else self._rounding(live, stored)
            statistics.quantization += _squares(rounded, stored)
        if written.ndim > 1 and _squares(written, base.to(written.dtype)) == 0:
            statistics.lost.append(name)


def _squares(first: Tensor, second: Tensor) -> float:
    """Sum the squared differences over the rows that both have."""
    rows = min(len(first), len(second))
    flat = [tensor[:rows].reshape(-1) for tensor in (first, second)]
    pairs = zip(flat[0].split(_CHUNK), flat[1].split(_CHUNK), strict=True)
    return sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)


def _write_index(path: Path, layout: dict[Path, dict[str, StoredTensor]]) -> None:
    places = {name: file.name for file, tensors in layout.items() for name in tensors}
    size = sum(stored.size for tensors in layout.values() for stored in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
