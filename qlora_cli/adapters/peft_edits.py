"""The changes that a saved PEFT adapter makes to the base's weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.adapters.files import WEIGHTS, read_config, refuse_slow_patterns
from qlora_cli.adapters.peft_modules import (
    changed_weights,
    is_incomplete,
    merge_module,
    outermost_modules,
    parameter_wrappers,
    restore_index_tables,
    with_values,
)
from qlora_cli.adapters.saved_tensors import grow_vocabulary, match_saved, refuse_changed_base
from qlora_cli.adapters.weight_edits import ReadBase, WeightEdits
from qlora_cli.common.untrusted_files import refuse_no_safetensors
from qlora_cli.errors import ModelError
from qlora_cli.models.shards import Shards

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qlora_cli.models.weight_names import WeightNames, WeightPart

MERGEABLE = (
    "ADALORA", "FOURIERFT", "HRA", "IA3", "LOHA", "LOKR", "LORA", "MISS", "OFT", "RANDLORA",
    "ROAD", "VERA",
)  # fmt: skip
"""PEFT types whose merge the contract tests compare with base plus adapter."""


class PeftEdits(WeightEdits):
    """A saved PEFT adapter. PEFT's own layer computes each update, one layer at a time.

    The adapter's config decides, not the recipe: it records how the adapter was trained.

    Args:
        skeleton: the base on the meta device. It is changed.
        names: names of the weights in the model and in the base's files.
        folder: the adapter.

    Raises:
        ModelError: the adapter does not fit the model, or its type cannot be merged.
    """

    def __init__(self, skeleton: PreTrainedModel, names: WeightNames, folder: Path) -> None:
        self._folder = folder
        refuse_no_safetensors(folder, str(folder), [WEIGHTS])
        self._saved = Shards(folder / WEIGHTS)
        self._used: set[str] = set()
        self._results: dict[str, Tensor] = {}
        shapes = {name: stored.shape for name, stored in self._saved.tensors.items()}
        config = _read_mergeable_config(folder, shapes)
        refuse_slow_patterns(config, [name for name, _ in skeleton.named_modules()], folder)
        self.shapes = grow_vocabulary(skeleton, shapes)
        self._base_names: dict[int, list[str]] = {}
        """Id of a parameter of the base -> its names, several where it is tied."""
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            self._base_names.setdefault(id(parameter), []).append(name)
        self._stored = set(names.in_files)
        """Weights that the base's files hold; a new head is not one of them."""
        buffers = {id(buffer): name for name, buffer in skeleton.named_buffers()}
        self._stored_buffers = {i: name for i, name in buffers.items() if name in names.in_files}
        """Id of a buffer of the base that its files hold, such as the bias of a router -> name."""
        self._computed_buffers = set(buffers) - set(self._stored_buffers)
        """Ids of buffers that the model computes, such as the scale of an embedding."""
        self._first_name = {name: same[0] for same in self._base_names.values() for name in same}
        adapted, matched = self._wrap(skeleton, config, shapes)
        self._sources = {key: saved[0] for key, saved in matched.items()}
        """Id of a parameter -> the saved tensor with its values."""
        self._replaced = {
            self._base_names[key][0]: saved
            for key, saved in self._sources.items()
            if key in self._base_names
        }
        """Weight of the base -> the saved tensor that replaces it."""
        self._modules = dict(outermost_modules(adapted.base_model.model))
        self._parts = dict(self._find_parts(names))
        """Stored matrix that is a part of one tensor in the model -> that part and its wrapper."""
        in_parts = {part.whole for part, _ in self._parts.values()}
        self._module_of = {
            weight: name
            for name, module in self._modules.items()
            for weight in changed_weights(name, module)
            if weight not in in_parts
        }
        replaced = {name for name, first in self._first_name.items() if first in self._replaced}
        self.names = set(self._module_of) | set(self._parts) | replaced
        self._mark_duplicates(matched)

    def apply(self, name: str, read: ReadBase) -> Tensor:
        def base(wanted: str) -> Tensor:
            saved = self._replaced.get(self._first_name.get(wanted, wanted))
            return read(wanted) if saved is None else self._read(saved)

        if name in self._parts:
            return read(name) + self._part_update(*self._parts[name])
        if name not in self._module_of:
            return base(name)
        if name not in self._results:
            self._merge(self._module_of[name], base)
        return self._results.pop(name)

    def unused(self) -> set[str]:
        return set(self._saved.tensors) - self._used

    def _read(self, saved: str) -> Tensor:
        self._used.add(saved)
        return self._saved.read(saved).float()

    def _wrap(
        self, skeleton: PreTrainedModel, config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Any, dict[int, list[str]]]:
        """Wrap the skeleton with PEFT, and match its parameters with the saved tensors."""
        from peft import get_peft_model

        # PEFT warns of tied weights. The merge compares them, and unties them where they differ.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                adapted = get_peft_model(skeleton, config)
            # PEFT does not check types: a wrong setting raises any error, where it is first used.
            except Exception as error:
                raise ModelError(f"{self._folder} does not fit the base model: {error}") from error
            return adapted, match_saved(adapted, shapes, set(self._base_names), self._folder)

    def _mark_duplicates(self, matched: dict[int, list[str]]) -> None:
        """Count as used what no merge reads: second copies of a tensor, and saved base weights in
        modules that are merged."""
        for key, (first, *others) in matched.items():
            for other in others:
                if self._saved.digest(other) != self._saved.digest(first):
                    raise ModelError(
                        f"{self._folder}: {first} and {other} differ, but are one tensor in the "
                        "model"
                    )
            self._used.update(others)
            if any(name in self._module_of for name in self._base_names.get(key, [])):
                self._used.add(first)

    def _find_parts(self, names: WeightNames) -> Iterator[tuple[str, tuple[WeightPart, Any]]]:
        """Yield the stored matrices that the model stacks in one tensor, with PEFT's wrapper.

        A module is merged here only if all its tensors can be: PEFT merges a module as a whole.
        Transposed tensors cannot, since they are not stacks of the stored matrices.
        """
        for name, module in self._modules.items():
            wrappers = {f"{name}.{one.parameter_name}": one for one in parameter_wrappers(module)}
            if all(
                whole in names.parts
                and not getattr(wrapper.get_base_layer(), "is_transposed", False)
                for whole, wrapper in wrappers.items()
            ):
                for whole, wrapper in wrappers.items():
                    yield from ((part.name, (part, wrapper)) for part in names.parts[whole])

    def _part_update(self, part: WeightPart, wrapper: Any) -> Tensor:
        """Return B A of one expert, or of some rows of it, (O, I): the others need no memory.

        PEFT orders the rows of A expert by expert, and the columns of B rank by rank.
        """
        a, b = (
            self._read(self._sources[id(factors["default"].weight)])
            for factors in (wrapper.lora_A, wrapper.lora_B)
        )
        rank = wrapper.r["default"]
        ranks = slice(part.expert * rank, (part.expert + 1) * rank)
        rows = b[part.start : part.start + part.rows, part.expert :: wrapper.num_experts]
        update: Tensor = rows @ a[ranks] * wrapper.scaling["default"]
        return update

    def _merge(self, name: str, base: ReadBase) -> None:
        """Let PEFT merge one module, whose weights have values only for as long as that takes."""
        module = self._modules[name]
        values = self._values_of(name, module, base)
        with with_values(module, values):
            values.clear()
            restore_index_tables(module)
            if is_incomplete(module, self._computed_buffers):
                raise ModelError(
                    f"PEFT's merge of {name} needs values that {self._folder} does not hold"
                )
            try:
                merged = merge_module(module)
            except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
                raise ModelError(f"PEFT cannot merge {name} of {self._folder}: {error}") from error
            for weight in changed_weights(name, module):
                value = merged.get_parameter(weight.removeprefix(f"{name}."))
                self._results[weight] = value.detach()

    def _values_of(self, name: str, module: nn.Module, base: ReadBase) -> dict[int, Tensor]:
        """Read the values of a module: id of a parameter or buffer -> its values."""
        values: dict[int, Tensor] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            key = id(tensor)
            if (saved := self._sources.get(key)) and key not in self._base_names:
                values[key] = self._read(saved)
            elif names := self._base_names.get(key):
                inside = [one for one in names if one.startswith(f"{name}.")]
                weight = (inside or names)[0]
                if weight in self._stored:
                    values[key] = base(weight)
            elif buffer := self._stored_buffers.get(key):
                values[key] = base(buffer)
        return values


def _read_mergeable_config(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> PeftConfig:
    """Read the adapter's config.

    Args:
        shapes: the shape of each tensor of the adapter.

    Raises:
        ModelError: it cannot be read, or its update is not an addition to the base's weights.
    """
    config: Any = read_config(folder, shapes)
    kind = str(config.peft_type.value)
    if kind not in MERGEABLE:
        raise ModelError(
            f"{folder} is a {kind} adapter; only {', '.join(MERGEABLE)} can be merged",
            hint="load it beside its base: qlora chat, or PEFT's AutoPeftModelForCausalLM",
        )
    refuse_changed_base(config, folder)
    if getattr(config, "layer_replication", None):
        raise ModelError(f"{folder}: layer_replication makes layers that the base does not have")
    # The saved values replace the initial ones, and nothing can be computed on the meta device.
    for key in ("init_lora_weights", "init_weights", "init_ia3_weights"):
        if hasattr(config, key):
            setattr(config, key, True)
    return config
