"""Trace the memory of a recipe's steps on tensors without data."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli.distributed.devices import Device
from qlora_cli.errors import ModelError
from qlora_cli.kernels.attention import PerDocumentAttention, VarlenAttention
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.models.report import (
    count_base_weights,
    count_trained_weights,
    refuse_mostly_unquantized,
)
from qlora_cli.plan.dry_run import dry_run, understands_documents
from qlora_cli.plan.trace.libraries import collect_new_garbage_only, load_libraries
from qlora_cli.plan.trace.memory_counter import (
    LOAD,
    CountedHostMemory,
    MemoryCounter,
    Peak,
    Segment,
)
from qlora_cli.plan.trace.meta_model import build_meta_model, load_traced
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GRANULARITY: dict[Device, int] = {"cpu": 1, "cuda": 512}
"""Allocation unit in bytes: CUDA's caching allocator uses multiples of 512."""


class UntraceableModel(ModelError):
    """The code of a model needs values, which traced tensors do not have.

    Args:
        model: name of its config's class.
        why: the module and what it does.
    """

    def __init__(self, model: str, why: str) -> None:
        super().__init__(
            f"model.path: the memory of {model} is unknown, because its code cannot be traced "
            f"without data: {why}",
            hint="let the run find out: qlora train tries the largest batches before its first "
            "step (with a number as training.micro_batch_size)",
        )


@dataclass(frozen=True)
class MemoryTrace:
    """The memory and work of a recipe, traced."""

    peaks: dict[Segment, Peak]
    flops: dict[str, int]
    """Floating-point operations of each stage."""
    host_bytes: int
    """Peak of host memory used in addition to the device."""
    num_layers: int
    traced_layers: tuple[int, ...]
    """Layers of the traced models; with fewer than `num_layers`, the rest is extrapolated."""
    base_weights: int
    trained_weights: int
    vocabulary_size: int
    kernels: Kernels
    products: int = 0
    """Distinct 16-bit matmuls, by shape and layout."""

    def peak(self, *stages: str) -> tuple[Segment, Peak]:
        """Find the segment with the largest peak, in these stages or in all."""
        found = [item for item in self.peaks.items() if not stages or item[0].stage in stages]
        return max(found, key=lambda item: item[1].total)


def trace_memory(
    recipe: Recipe,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    device: Device,
    steps: Sequence[Sequence[Batch]],
    held_out: Batch | None,
    kernels: Kernels = "fused",
) -> MemoryTrace:
    """Trace loading, some steps and an evaluation of a recipe.

    A model of many equal layers (or of a repeating pattern) is traced with few of them. Each layer
    adds the same to each moment of a step, so extrapolating is exact; a test compares it with a
    trace of all layers.

    Args:
        config: config of the base model.
        dtype: compute dtype; float32 means no autocast.
        steps: the micro-batches of the most demanding steps.
        held_out: the most demanding evaluation batch.
        kernels: kernels of the layers that support them.

    Raises:
        UntraceableModel: the model's code cannot be traced.
        ModelError: the recipe does not fit the model.
    """
    num_layers = text_config(config).num_hidden_layers
    load_libraries()

    def trace(size: int) -> MemoryTrace:
        short = _shortened(config, size)
        return _trace(recipe, short, dtype, device, steps, held_out, kernels)

    period = _period(text_config(config))
    if period is None or names_layers(recipe):
        return trace(num_layers)
    small = num_layers % period + 2 * period
    if small + period >= num_layers:
        return trace(num_layers)
    found = _extrapolate(trace(small), trace(small + period), num_layers, period)
    # The number of weights reveals a layer that differs from the others.
    head = recipe.objective.head
    whole = sum(p.numel() for p in build_meta_model(config, dtype, head).parameters())
    return found if found.base_weights == whole else trace(num_layers)


def _trace(
    recipe: Recipe,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: Device,
    steps: Sequence[Sequence[Batch]],
    held_out: Batch | None,
    kernels: Kernels,
) -> MemoryTrace:
    text = text_config(config)
    count = MemoryCounter(device, granularity=GRANULARITY[device], vocabulary_size=text.vocab_size)
    quantization = recipe.quantization
    options = attention_option(recipe)
    with refuse_untraceable(config), collect_new_garbage_only(), count:
        with count.stage(LOAD):
            base = load_traced(
                config,
                quantization.load_options(dtype),
                count,
                recipe.objective.head,
                **options,
            )
        weights = count_base_weights(base)
        refuse_mostly_unquantized(weights, quantization.max_unquantized)
        model = dry_run(
            base,
            recipe,
            count,
            ComputeOptions(dtype, kernels, _capabilities_of(device, dtype, count)),
            steps=steps,
            held_out=held_out,
        )
    return MemoryTrace(
        peaks=count.peaks,
        flops=dict(count.flops),
        host_bytes=count.host_bytes,
        num_layers=text.num_hidden_layers,
        traced_layers=(text.num_hidden_layers,),
        base_weights=weights.num_weights,
        trained_weights=count_trained_weights(model).trained,
        vocabulary_size=text.vocab_size,
        kernels=kernels,
        products=sum(_is_prepared(one) for one in count.products),
    )


def _capabilities_of(
    device: Device, dtype: torch.dtype, count: MemoryCounter
) -> DeviceCapabilities:
    """Return what a device supports. For cards without varlen attention, this takes more memory."""
    if device == "cpu":
        return DeviceCapabilities()
    attention = PerDocumentAttention() if dtype == torch.float32 else VarlenAttention()
    return DeviceCapabilities(attention, CountedHostMemory(count))


def _is_prepared(product: tuple[Any, ...]) -> bool:
    """Return whether this is a 16-bit matmul, which oneDNN prepares on a CPU."""
    name, first, *_ = product
    return bool(name.removesuffix("_").endswith("mm") and first[0].itemsize == 2)


@contextmanager
def refuse_untraceable(config: PretrainedConfig) -> Iterator[None]:
    """Raise UntraceableModel where the code of a model needs values."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UntraceableModel(type(config).__name__, f"{_culprit(e)}{said}") from e


def _culprit(error: Exception) -> str:
    """Name the innermost running module, as the beginning of a sentence."""
    modules = [
        frame.f_locals["self"]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(frame.f_locals.get("self"), torch.nn.Module)
    ]
    return f"in {type(modules[-1]).__name__}, " if modules else ""


def attention_option(recipe: Recipe) -> dict[str, Any]:
    """Return the attention options of the model's constructor.

    Flash attention needs a package and a card. It is traced as sdpa, which takes the same memory.
    """
    attention = recipe.model.attention
    named = {"auto": {}, "flash_attention_2": {"attn_implementation": "sdpa"}}
    return {
        "trust_remote_code": recipe.model.trust_remote_code,
        **named.get(attention, {"attn_implementation": attention}),
    }


def supports_padding_free(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Return whether the code of the model accepts concatenated examples.

    `train` also verifies it with numbers, which a trace does not have.
    """
    period = _period(text_config(config)) or text_config(config).num_hidden_layers
    load_libraries()
    with refuse_untraceable(config), MemoryCounter() as count:
        options = attention_option(recipe)
        base = load_traced(_shortened(config, period), {"dtype": dtype}, count, **options)
        return understands_documents(base)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the language model."""
    text: PretrainedConfig = config.get_text_config(decoder=True)
    return text


def _per_layer(text: PretrainedConfig) -> dict[str, list[Any]]:
    """Return the settings that a config lists per layer."""
    return {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list) and len(value) == text.num_hidden_layers
    }


def _period(text: PretrainedConfig) -> int | None:
    """Find after how many layers their kinds repeat; None if they do not."""
    lists = _per_layer(text).values()
    for period in range(1, text.num_hidden_layers // 4 + 1):
        if all(a == b for kinds in lists for a, b in zip(kinds, kinds[period:], strict=False)):
            return period
    return None


def names_layers(recipe: Recipe) -> bool:
    """Return whether adapter or optimizer may treat layers differently.

    A name with a digit may be that of one layer. PEFT's own settings that select layers or modules
    count whatever their value.
    """
    adapter = recipe.adapter.model_dump(include=_SELECTORS)
    named = [value for value in adapter.values() if value != "all-linear"]
    named += [group.match for group in recipe.optimizer.groups]
    settings = recipe.adapter.model_dump(include={"rank_pattern", "alpha_pattern"})
    own = recipe.adapter.model_dump(include={"config"}).get("config", {})
    settings |= {k: v for k, v in own.items() if "layers" in k or "pattern" in k or "modules" in k}
    return any(settings.values()) or any(character.isdigit() for character in str(named))


_SELECTORS = {
    "target_modules", "exclude_modules", "feedforward_modules", "modules_to_save",
    "layers_to_transform", "last_layers", "patterns",
}  # fmt: skip
"""Settings of adapters that select modules."""


def _shortened(config: PretrainedConfig, size: int) -> PretrainedConfig:
    """Return the config of a model with only the first layers."""
    short = copy.deepcopy(config)
    text = text_config(short)
    lists = _per_layer(text)
    for name, value in lists.items():
        setattr(text, name, value[:size])
    text.num_hidden_layers = size
    return short


def _extrapolate(
    small: MemoryTrace, large: MemoryTrace, num_layers: int, period: int
) -> MemoryTrace:
    """Extrapolate the memory of many layers from two traces that differ by one period of layers.

    The peak while a layer is running grows by the same amount with each layer of the model, and
    from layer to layer. So the first and the last layers determine all.
    """
    times = (num_layers - large.num_layers) // period

    def grown(less: int, more: int) -> int:
        return more + times * (more - less)

    def ends(found: MemoryTrace) -> dict[Segment, tuple[int | None, Peak]]:
        """Keep the peaks near both ends, with places relative to the beginning or the end (< 0)."""
        last, near = 2 * found.num_layers, 2 * period
        kept = {}
        for segment, peak in found.peaks.items():
            place = segment.place
            if place is not None and place > near:
                place -= last + 1
            if place is None or place >= -near:
                kept[segment._replace(place=place)] = segment.place, peak
        return kept

    peaks, before = {}, ends(small)
    for key, (place, peak) in ends(large).items():
        less = before[key][1]
        names = dict.fromkeys((*less.kinds, *peak.kinds))
        # Of two similar moments, one may be the peak in one trace and the other in the other. A
        # kind can then shrink by some kilobytes per layer.
        kinds = {n: max(0, grown(less.kinds.get(n, 0), peak.kinds.get(n, 0))) for n in names}
        if place is not None and place > 2 * period:
            place += 2 * (num_layers - large.num_layers)
        peaks[key._replace(place=place)] = Peak(sum(kinds.values()), kinds)
    return MemoryTrace(
        peaks=peaks,
        flops={stage: grown(small.flops[stage], more) for stage, more in large.flops.items()},
        host_bytes=grown(small.host_bytes, large.host_bytes),
        num_layers=num_layers,
        traced_layers=(small.num_layers, large.num_layers),
        base_weights=grown(small.base_weights, large.base_weights),
        trained_weights=grown(small.trained_weights, large.trained_weights),
        vocabulary_size=large.vocabulary_size,
        kernels=large.kernels,
        products=max(small.products, large.products),
    )
