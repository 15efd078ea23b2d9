"""What the steps of a recipe take, traced on tensors without data."""

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
from qlora_cli.plan.trace.memory_counter import LOAD, Count, CountedHost, Peak, Segment
from qlora_cli.plan.trace.meta_model import load_traced, outline
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GRANULARITY: dict[Device, int] = {"cpu": 1, "cuda": 512}
"""CUDA's caching allocator hands out multiples of 512 bytes."""


class Untraceable(ModelError):
    """Code of a model asks for what tensors without data do not have.

    Args:
        model: whose code it is.
        why: in which module, and for what.
    """

    def __init__(self, model: str, why: str) -> None:
        super().__init__(
            f"model.path: the code of {model} cannot be traced without data: {why}",
            hint="nothing is estimated in its place; qlora train measures it instead: it tries the "
            "largest batches first",
        )
        self.why = why


@dataclass(frozen=True)
class Forecast:
    """What was traced."""

    peaks: dict[Segment, Peak]
    flops: dict[str, int]
    """Floating-point operations of each stage."""
    host_bytes: int
    """Most that was in the memory of the host, beside a device."""
    num_layers: int
    traced_layers: tuple[int, ...]
    """Of the models that were traced; where these have fewer layers, the rest was multiplied."""
    base_weights: int
    trained_weights: int
    vocabulary_size: int
    products: int = 0
    """Kinds of products in 16 bit, by shape and layout."""
    untraced: str = ""
    """Why the code of the model was not traced; empty if it was."""
    by_formula: tuple[str, ...] = ()
    """Kinds of what is alive that go by a formula (`formula.py`) then."""

    def peak(self, *stages: str) -> tuple[Segment, Peak]:
        """Where the most is alive, in these stages or in all."""
        found = [item for item in self.peaks.items() if not stages or item[0].stage in stages]
        return max(found, key=lambda item: item[1].total)


def forecast(
    recipe: Recipe,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    device: Device,
    steps: Sequence[Sequence[Batch]],
    held_out: Batch | None,
    kernels: Kernels = "fused",
) -> Forecast:
    """Trace loading, some steps and an evaluation of a recipe.

    A model of many equal layers (or of a few kinds in turn) is traced with few of them. What a
    layer adds to each moment of a step is the same for each, so multiplying is exact; a test holds
    it against the whole.

    Args:
        config: of the base model.
        dtype: what is computed in; float32 means no autocast.
        steps: the micro-batches of the most demanding steps.
        held_out: the most demanding batch of the evaluation.
        kernels: that the layers get, as far as they can be had.

    Raises:
        Untraceable: the model's code cannot be traced.
        ModelError: the recipe does not suit the model.
    """
    num_layers = text_config(config).num_hidden_layers
    load_libraries()

    def trace(size: int) -> Forecast:
        short = _shortened(config, size)
        return _trace(recipe, short, dtype, device, steps, held_out, kernels)

    period = _period(text_config(config))
    if period is None or _names_layers(recipe):
        return trace(num_layers)
    small = num_layers % period + 2 * period
    if small + period >= num_layers:
        return trace(num_layers)
    found = _stretched(trace(small), trace(small + period), num_layers, period)
    # Of a layer that differs from the others the model's size would tell.
    whole = sum(p.numel() for p in outline(config, dtype).parameters())
    return found if found.base_weights == whole else trace(num_layers)


def _trace(
    recipe: Recipe,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: Device,
    steps: Sequence[Sequence[Batch]],
    held_out: Batch | None,
    kernels: Kernels,
) -> Forecast:
    text = text_config(config)
    count = Count(device, granularity=GRANULARITY[device], vocabulary_size=text.vocab_size)
    quantization = recipe.quantization
    options = attention_option(recipe)
    with in_plain_words(config), collect_new_garbage_only(), count:
        with count.stage(LOAD):
            base = load_traced(config, quantization.load_options(dtype), count, **options)
        weights = count_base_weights(base)
        refuse_mostly_unquantized(weights, quantization.max_unquantized)
        model = dry_run(
            base,
            recipe,
            count,
            ComputeOptions(dtype, kernels, _means(device, dtype, count)),
            steps=steps,
            held_out=held_out,
        )
    return Forecast(
        peaks=count.peaks,
        flops=dict(count.flops),
        host_bytes=count.host_bytes,
        num_layers=text.num_hidden_layers,
        traced_layers=(text.num_hidden_layers,),
        base_weights=weights.num_weights,
        trained_weights=count_trained_weights(model).trained,
        vocabulary_size=text.vocab_size,
        products=sum(_is_prepared(one) for one in count.products),
    )


def _means(device: Device, dtype: torch.dtype, count: Count) -> DeviceCapabilities:
    """What a device has. Of a card that cannot attend to all documents at once, it is the more."""
    if device == "cpu":
        return DeviceCapabilities()
    attention = PerDocumentAttention() if dtype == torch.float32 else VarlenAttention()
    return DeviceCapabilities(attention, CountedHost(count))


def _is_prepared(product: tuple[Any, ...]) -> bool:
    """Whether it is a product of matrices in 16 bit, which oneDNN prepares on a CPU."""
    name, first, *_ = product
    return bool(name.removesuffix("_").endswith("mm") and first[0].itemsize == 2)


@contextmanager
def in_plain_words(config: PretrainedConfig) -> Iterator[None]:
    """Raises Untraceable where a model's code asks for what tensors without data do not have."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise Untraceable(type(config).__name__, f"{_culprit(e)}{said}") from e


def _culprit(error: Exception) -> str:
    """The innermost module of the model that was at work, as the beginning of a sentence."""
    modules = [
        frame.f_locals["self"]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(frame.f_locals.get("self"), torch.nn.Module)
    ]
    return f"in {type(modules[-1]).__name__}, " if modules else ""


def attention_option(recipe: Recipe) -> dict[str, Any]:
    """What the constructor of the model is told. Flash attention needs a package and a card; sdpa
    holds what it holds."""
    attention = recipe.model.attention
    named = {"auto": {}, "flash_attention_2": {"attn_implementation": "sdpa"}}
    return {
        "trust_remote_code": recipe.model.trust_remote_code,
        **named.get(attention, {"attn_implementation": attention}),
    }


def can_lie_end_to_end(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether examples need no padding, as far as the code of the model tells.

    `train` proves it with numbers too, which a trace has none of.
    """
    period = _period(text_config(config)) or text_config(config).num_hidden_layers
    load_libraries()
    with in_plain_words(config), Count() as count:
        options = attention_option(recipe)
        base = load_traced(_shortened(config, period), {"dtype": dtype}, count, **options)
        return understands_documents(base)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the language model."""
    text: PretrainedConfig = config.get_text_config(decoder=True)
    return text


def _per_layer(text: PretrainedConfig) -> dict[str, list[Any]]:
    """What a config says of each layer by itself."""
    return {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list) and len(value) == text.num_hidden_layers
    }


def _period(text: PretrainedConfig) -> int | None:
    """After how many layers their kinds begin again; None if they do not."""
    lists = _per_layer(text).values()
    for period in range(1, text.num_hidden_layers // 4 + 1):
        if all(a == b for kinds in lists for a, b in zip(kinds, kinds[period:], strict=False)):
            return period
    return None


def _names_layers(recipe: Recipe) -> bool:
    """Whether layers may differ in adapter or optimizer: by a pattern, or by a number.

    A name with a number may be that of one layer. Of PEFT's own settings, those that choose layers
    or modules count whatever they say.
    """
    adapter = recipe.adapter.model_dump(include=_CHOICES)
    named = [value for value in adapter.values() if value != "all-linear"]
    named += [group.match for group in recipe.optimizer.groups]
    settings = recipe.adapter.model_dump(include={"rank_pattern", "alpha_pattern"})
    own = recipe.adapter.model_dump(include={"config"}).get("config", {})
    settings |= {k: v for k, v in own.items() if "layers" in k or "pattern" in k or "modules" in k}
    return any(settings.values()) or any(character.isdigit() for character in str(named))


_CHOICES = {
    "target_modules", "exclude_modules", "feedforward_modules", "modules_to_save",
    "layers_to_transform", "last_layers", "patterns",
}  # fmt: skip
"""Settings of adapters that choose where they are."""


def _shortened(config: PretrainedConfig, size: int) -> PretrainedConfig:
    """The config of a model of fewer layers: the first ones."""
    short = copy.deepcopy(config)
    text = text_config(short)
    lists = _per_layer(text)
    for name, value in lists.items():
        setattr(text, name, value[:size])
    text.num_hidden_layers = size
    return short


def _stretched(small: Forecast, large: Forecast, num_layers: int, period: int) -> Forecast:
    """What a model of many layers takes, from two that differ by a period of layers.

    The most that is alive while a layer is at work grows by the same amount with each layer that
    the model has, and from layer to layer. So the first and the last ones say it all.
    """
    times = (num_layers - large.num_layers) // period

    def grown(less: int, more: int) -> int:
        return more + times * (more - less)

    def ends(found: Forecast) -> dict[Segment, tuple[int | None, Peak]]:
        """With places as their distance from the beginning, or (negative) from the end."""
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
        # Where two moments are alike, one may be the peak here and the other there: then a kind can
        # shrink by some kilobytes a layer.
        kinds = {n: max(0, grown(less.kinds.get(n, 0), peak.kinds.get(n, 0))) for n in names}
        if place is not None and place > 2 * period:
            place += 2 * (num_layers - large.num_layers)
        peaks[key._replace(place=place)] = Peak(sum(kinds.values()), kinds)
    return Forecast(
        peaks=peaks,
        flops={stage: grown(small.flops[stage], more) for stage, more in large.flops.items()},
        host_bytes=grown(small.host_bytes, large.host_bytes),
        num_layers=num_layers,
        traced_layers=(small.num_layers, large.num_layers),
        base_weights=grown(small.base_weights, large.base_weights),
        trained_weights=grown(small.trained_weights, large.trained_weights),
        vocabulary_size=large.vocabulary_size,
        products=max(small.products, large.products),
    )
