"""Build a base model without weights, with the tensors that loading would create."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_cli._compat import keep_4bit_weights_trainable
from qlora_cli.common.decoder import decoder_of
from qlora_cli.models.heads import model_from_config
from qlora_cli.plan.trace.memory_counter import (
    ADAPTER,
    CONSTANTS,
    QUANTIZED,
    UNQUANTIZED,
    MemoryCounter,
)
from qlora_cli.plan.trace.traced_tensor import TracedTensor, refuse_decisions
from qlora_cli.types import HeadSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_traced(
    config: PretrainedConfig,
    load_options: dict[str, Any],
    count: MemoryCounter,
    head: HeadSpec | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a model of traced tensors as `from_pretrained` would; frozen, in training mode.

    Args:
        load_options: the result of `FourBit.load_options()` or another quantization's.
        count: counts the memory of loading, and the kind of each tensor afterwards.
        head: the head that scores rows; None is the one that predicts tokens.
        options: options of the model's constructor, such as `attn_implementation`.
    """
    model = build_quantized_meta_model(config, load_options, head, **options)
    made: dict[int, nn.Parameter] = {}  # tied weights are one
    for _, module in sorted(model.named_modules(), key=lambda item: _natural(item[0])):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _load(parameter, load_options["dtype"])
            module._parameters[key] = made[id(parameter)]
            count.hold(*_held(module._parameters[key]))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = TracedTensor(buffer)
    model.requires_grad_(False)
    keep_4bit_weights_trainable(model)
    model.train()
    count_model(model, count)
    for module in {model, decoder_of(model) or model}:
        refuse_decisions(module)
    return model


def build_meta_model(
    config: PretrainedConfig, dtype: torch.dtype, head: HeadSpec | None = None, **options: Any
) -> PreTrainedModel:
    """Build a model on the meta device: modules and shapes.

    Args:
        head: the head that scores rows; None is the one that predicts tokens.
        options: those of the model's constructor.
    """
    own = copy.deepcopy(config)  # `from_config` writes the dtype into it
    with torch.device("meta"):
        model: PreTrainedModel = model_from_config(own, head, dtype=dtype, **options)
    model.tie_weights()
    return model


def build_quantized_meta_model(
    config: PretrainedConfig,
    load_options: dict[str, Any],
    head: HeadSpec | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Build a model on the meta device whose layers are quantized ones, still empty."""
    from transformers.quantizers.auto import AutoHfQuantizer

    model = build_meta_model(config, load_options["dtype"], head, **options)
    if quantization := load_options.get("quantization_config"):
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        quantizer.postprocess_model(model)
    return model


@torch.no_grad()
def _load(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Make a parameter as it is after reading it from a file and quantizing it if required."""
    from bitsandbytes.nn import Int8Params, Params4bit

    kind = type(parameter)
    if kind is nn.Parameter:
        return nn.Parameter(TracedTensor(parameter.data), requires_grad=False)
    assert issubclass(kind, Params4bit | Int8Params), kind
    read: Any = _traced_kind(kind)(torch.empty_like(parameter.data, dtype=dtype))
    read.__dict__.update(parameter.__dict__)
    quantized: nn.Parameter = read._quantize("cpu")
    return quantized


def _traced_kind(kind: type[nn.Parameter]) -> type[TracedTensor]:
    """Make a parameter class with traced data and the same name, which PEFT checks."""
    if kind not in _KINDS:
        _KINDS[kind] = type(kind.__name__, (TracedTensor, kind), {"to": _stay})
    return _KINDS[kind]


def _stay(self: TracedTensor, *_: object, **__: object) -> TracedTensor:
    """Ignore `to`: quantized weights keep their device and dtype."""
    return self


_KINDS: dict[type[nn.Parameter], type[TracedTensor]] = {}


def count_model(model: nn.Module, count: MemoryCounter) -> None:
    """Assign a kind to each tensor of a model, real or traced."""
    for parameter in model.parameters():
        count.hold(*_held(parameter))
        count.hold(_constants(parameter), CONSTANTS)
    count.hold(model.buffers(), UNQUANTIZED)


def _held(parameter: nn.Parameter) -> tuple[list[Tensor], str]:
    from bitsandbytes.nn import Int8Params, Params4bit

    if parameter.requires_grad:
        return [parameter], ADAPTER
    is_quantized = isinstance(parameter, Params4bit | Int8Params)
    return [parameter], QUANTIZED if is_quantized else UNQUANTIZED


def _constants(parameter: nn.Parameter) -> Iterator[Tensor | None]:
    from bitsandbytes.nn import Int8Params, Params4bit

    if isinstance(parameter, Int8Params):
        yield parameter.SCB
    elif isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        state = parameter.quant_state
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)


def _natural(name: str) -> list[tuple[int, str | int]]:
    """Sort key in the order in which transformers loads: by name, with numbers by value."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", name)]
