"""Find the least harmful changes with which a recipe fits a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_cli.common.config import Config
from qlora_cli.common.report import ABSENT, Absent
from qlora_cli.data.prepared.tally import TooManyLost
from qlora_cli.distributed.devices import Target
from qlora_cli.errors import RecipeError
from qlora_cli.loop.run_data import RecipeData
from qlora_cli.optim.optimizers import lighter_twin
from qlora_cli.plan.estimate import MemoryEstimate, estimate, is_padding_free, largest_rows
from qlora_cli.plan.report import NO_GPU, OTHER_DEVICES
from qlora_cli.plan.rows import find_rows, read_available
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Changes = dict[str, Any]
"""Dotted key -> value."""
DataReader = Callable[[], RecipeData | None]
"""Returns the data of a recipe, or None if it is not available."""

_SHORTEST = 128


@dataclass(frozen=True)
class Fitted:
    """The recipe that a plan describes, and how it differs from the given one."""

    estimate: MemoryEstimate
    changes: Changes | Absent | None = ABSENT
    """The changes: empty if the recipe fits as it is, None if nothing suffices."""
    no_shorter: str | Absent = ABSENT
    """Why rows cannot be shorter, if that would lose too many answers."""


def shrink_to_fit(
    recipe: Recipe, config: PretrainedConfig, target: Target, read: DataReader
) -> Fitted:
    """Try changes in order of harm, and keep the smallest ones that suffice.

    1. `micro_batch_size` and 2. `gradient_checkpointing`: the result stays the same.
    3. `attention`: the result stays the same except for rounding.
    4. `quantization`: the base in 8, then in 4 bits; the adapter compensates.
    5. the optimizer: states in 8 bits, and on CUDA paged to the host when the card is full. The
       algorithm stays the same; an optimizer without such a version is not changed.
    6. `max_length`: rows are truncated, so the training data changes.

    Args:
        read: reads the data of the recipe.

    Returns:
        The changed recipe; the last attempt if nothing suffices.

    Raises:
        RecipeError: the memory size of the device is unknown.
    """
    if target.memory_bytes is None:
        raise RecipeError(
            f"--fit: the memory size of the device is unknown: {NO_GPU}", hint=OTHER_DEVICES
        )

    def tried(changes: Changes) -> MemoryEstimate:
        one = with_changes(recipe, changes)
        data = read_available(one) if "data.max_length" in changes else read()
        return estimate(one, config, target, largest_rows(one, config, target, data))

    found = tried({})
    if _fits(found):
        return Fitted(found, {})
    for changes in _levels(recipe, target):
        sizes = _micro_batch_sizes(recipe)
        smallest = {**changes, "training.micro_batch_size": 1}
        try:
            found = tried(smallest)
        except TooManyLost as error:
            if "data.max_length" not in changes:
                raise  # the unchanged recipe loses them
            length, why = changes["data.max_length"], str(error).splitlines()[0]
            return Fitted(found, None, f"data.max_length {length}: {why}")
        if not _fits(found):
            continue
        # The largest micro-batch that still fits is the fastest.
        for size in sizes:
            larger = {**changes, "training.micro_batch_size": size}
            if size > 1 and _fits(more := tried(larger)):
                return Fitted(more, _different(recipe, larger))
        return Fitted(found, _different(recipe, smallest))
    return Fitted(found, None)


def resolve_micro_batch_size(
    recipe: Recipe, config: PretrainedConfig, target: Target, read: DataReader
) -> Recipe:
    """Replace `training.micro_batch_size: auto` by a number.

    The number is the largest divisor of the batch that is certain to fit, or 1. A larger
    micro-batch never needs less memory, so the search is binary.

    Args:
        read: reads the data of the recipe; called at most once.

    Raises:
        RecipeError: the memory size of the device is unknown.
    """
    if recipe.training.micro_batch_size != "auto":
        return recipe
    if target.memory_bytes is None:
        raise RecipeError(
            "training.micro_batch_size: auto needs the memory size of the device, which is "
            f"unknown: {NO_GPU}",
            hint=f"{OTHER_DEVICES}; or give a number of rows",
        )
    batch = recipe.training.batch_size
    sizes = [size for size in range(1, max(1, batch // target.number) + 1) if batch % size == 0]
    tried = [with_changes(recipe, {"training.micro_batch_size": size}) for size in sizes]
    if len(tried) == 1:
        return tried[0]
    data, padding_free = read(), is_padding_free(recipe, config, target)

    def fits(one: Recipe) -> bool:
        rows = find_rows(one, data, padding_free=padding_free, gpus=target.number)
        return _fits(estimate(one, config, target, rows))

    low, high = 0, len(tried)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(tried[middle]):
            low = middle
        else:
            high = middle
    return tried[low]


def with_changes(recipe: Recipe, changes: Changes) -> Recipe:
    """Return the recipe with other values.

    A section whose `type` changes keeps the settings that the new type has too.
    """
    document = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *path, name = key.split(".")
        section = document
        for part in path:
            section = section[part]
        if name == "type" and section["type"] != value:
            known = _kind(path[0], value).model_fields
            kept = {k: v for k, v in section.items() if k in known}
            section.clear()
            section.update(kept)
        section[name] = value
    return Recipe.model_validate(document)


def _kind(section: str, name: str) -> type[Config]:
    """Find the class of a section with this `type`."""
    return FieldType.of(Recipe.model_fields[section]).variants[name]


def _levels(recipe: Recipe, target: Target) -> Iterator[Changes]:
    """Yield growing sets of changes, without the size of the micro-batch."""
    changes: Changes = {}
    yield dict(changes)
    kinds = [False, "mlp", True, "offload"]
    # Offloading is never proposed: its effect on the speed of a card has not been measured.
    for more in kinds[kinds.index(recipe.training.gradient_checkpointing) + 1 : -1]:
        changes["training.gradient_checkpointing"] = more
        yield dict(changes)
    if recipe.model.attention == "eager":
        changes["model.attention"] = "sdpa"
        yield dict(changes)
    refused = recipe.adapter.no_quantization
    if "int8" not in refused and not recipe.quantization.is_quantized:
        changes["quantization.type"] = "int8"
        yield dict(changes)
    if "nf4" not in refused and recipe.quantization.type not in ("nf4", "fp4"):
        changes["quantization.type"] = "nf4"
        yield dict(changes)
    if twin := lighter_twin(recipe.optimizer, pages=target.kind == "cuda"):
        changes["optimizer.type"] = twin
        yield dict(changes)
    length = recipe.data.max_length // 2
    while length >= _SHORTEST:
        changes["data.max_length"] = length
        yield dict(changes)
        length //= 2


def _micro_batch_sizes(recipe: Recipe) -> list[int]:
    """List the divisors of the batch, from the present size down."""
    settings = recipe.training
    sizes = range(settings.fixed_micro_batch_size, 0, -1)
    return [size for size in sizes if settings.batch_size % size == 0]


def _fits(found: MemoryEstimate) -> bool:
    return found.fits.verdict == "yes"


def _different(recipe: Recipe, changes: Changes) -> Changes:
    """Drop changes without effect, and repeat the settings of sections whose type changes.

    `--set optimizer.type=...` with another type replaces the section of the file and the settings
    in it.
    """
    before = recipe.model_dump(mode="json")
    after = with_changes(recipe, changes).model_dump(mode="json")
    found = {}
    for key, value in changes.items():
        section, name = key.split(".")
        if before[section][name] == value:
            continue
        found[key] = value
        if name == "type":
            defaults = _kind(section, value).model_validate({"type": value}).model_dump(mode="json")
            repeated = {k: v for k, v in after[section].items() if v != defaults[k]}
            found |= {f"{section}.{k}": v for k, v in repeated.items()}
    return found
