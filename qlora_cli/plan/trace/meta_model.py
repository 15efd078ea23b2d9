"""A base model without its weights, held as loading would hold it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_cli._compat import keep_4bit_weights_trainable
from qlora_cli.models.heads import CAUSAL_LM
from qlora_cli.plan.trace.memory_counter import ADAPTER, CONSTANTS, QUANTIZED, UNQUANTIZED, Count
from qlora_cli.plan.trace.traced_tensor import TracedTensor, refuse_decisions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_traced(
    config: PretrainedConfig, load_options: dict[str, Any], count: Count, **options: Any
) -> PreTrainedModel:
    """What `from_pretrained` would return, of traced tensors; frozen, in training mode.

    Args:
        load_options: what `Nf4.load_options()` and its kin return.
        count: counts what loading takes; it knows afterwards what each tensor is.
        options: for the model's constructor, such as `attn_implementation`.
    """
    model = skeleton(config, load_options, **options)
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
    hold_model(model, count)
    for module in {model, model.get_decoder() or model}:
        refuse_decisions(module)
    return model


def outline(config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model on the meta device: modules and shapes."""
    with torch.device("meta"):
        model: PreTrainedModel = CAUSAL_LM.auto_class().from_config(config, dtype=dtype, **options)
    model.tie_weights()
    return model


def skeleton(
    config: PretrainedConfig, load_options: dict[str, Any], **options: Any
) -> PreTrainedModel:
    """The same, its layers replaced by quantized ones that hold nothing yet."""
    from transformers.quantizers.auto import AutoHfQuantizer

    model = outline(config, load_options["dtype"], **options)
    if quantization := load_options.get("quantization_config"):
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        quantizer.postprocess_model(model)
    return model


@torch.no_grad()
def _load(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A parameter as it is after its tensor was read from a file and, if it is to be, quantized."""
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
    """A class of parameters whose data are traced. PEFT goes by the name of the class."""
    if kind not in _KINDS:
        _KINDS[kind] = type(kind.__name__, (TracedTensor, kind), {"to": _stay})
    return _KINDS[kind]


def _stay(self: TracedTensor, *_: object, **__: object) -> TracedTensor:
    """Quantized weights are where they belong, and in their dtype."""
    return self


_KINDS: dict[type[nn.Parameter], type[TracedTensor]] = {}


def hold_model(model: nn.Module, count: Count) -> None:
    """Tell what each tensor of a model, real or traced, is there for."""
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
    """Sorts as transformers loads: by name, numbers by their size."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", name)]
