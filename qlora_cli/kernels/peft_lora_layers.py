"""PEFT's LoRA layers, with the sum in the order that keeps small updates (`projection.py`).

PEFT makes them in place of its own through `LoraConfig._register_custom_module`. Whatever is not
one ordinary update (DoRA, several adapters, a merged or switched-off one) goes PEFT's way.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bit
from torch import Tensor, nn

from qlora_cli.kernels.lora_linear import Projection, adapter_of


class UpdateFirstLinear(PeftLinear):  # type: ignore[misc]  # PEFT is not typed
    """Beside a layer in 16 or 32 bit."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        if args or options or not _is_one_update(self):
            plain: Tensor = super().forward(x, *args, **options)
            return plain
        return update_first(self, x)


class UpdateFirstLinear4bit(PeftLinear4bit):  # type: ignore[misc]
    """Beside a layer in 4 bit."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        if args or options or not _is_one_update(self):
            plain: Tensor = super().forward(x, *args, **options)
            return plain
        return update_first(self, x)


class WithScales8bit(PeftLinear8bit):  # type: ignore[misc]
    """Beside a layer in 8 bit: PEFT's own, but that DoRA does not lose the scales of the weight.

    DoRA dequantizes the weight in each forward. On a CPU PEFT 0.21 then puts a copy in its place,
    which looks freshly quantized (it has `CB`) and has no scales (`SCB`): bitsandbytes would take
    them from there in the next forward, in place of those that it has in the layer's state. Goes
    when `tests/unit/test_compat.py` fails because DoRA trains without it.
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.get_base_layer().weight
        if weight.SCB is None:
            weight.CB = None
        result: Tensor = super().forward(x, *args, **options)
        return result


def layer_classes(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """For PEFT: class of a layer -> class of what takes its place.

    Of a model in 8 bit, for these layers alone: PEFT goes by `isinstance`, and they are linear ones
    too.
    """
    if any(isinstance(module, Linear8bitLt) for module in model.modules()):
        return {Linear8bitLt: WithScales8bit}
    return {Linear4bit: UpdateFirstLinear4bit, nn.Linear: UpdateFirstLinear}


def update_first(layer: Any, x: Tensor) -> Tensor:
    """What a LoRA layer gives for `x` (..., in), computed in the autocast dtype if there is one."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.to(dtype)
    dropped = layer.lora_dropout[adapter_of(layer)](x)
    linears = Projection([layer])
    # torch leaves `apply` without types.
    y: Tensor = _UpdateFirst.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, -2), dropped.flatten(0, -2), linears, *linears.trained()
    )
    return y.view(*x.shape[:-1], -1)


def _is_one_update(layer: Any) -> bool:
    names = layer.active_adapters
    return bool(
        not layer.disable_adapters
        and not layer.merged
        and len(names) == 1
        and names[0] in layer.lora_A
        and names[0] not in layer.lora_variant
        and not layer.lora_bias[names[0]]
        and not layer.fan_in_fan_out
    )


class _UpdateFirst(torch.autograd.Function):
    """(T, in) -> (T, out). The update sees `dropped`, the base layer `x`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, linears: Projection, *trained: Tensor
    ) -> Tensor:
        factors = linears.factors(trained, x.dtype)
        weight, bias = linears.weight(x.dtype), linears.bias(x.dtype)
        y, low = factors.forward(x, weight, bias, dropped)
        ctx.save_for_backward(dropped, low, *trained)
        ctx.linears, ctx.has_dropout = linears, dropped.data_ptr() != x.data_ptr()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dropped, low, *trained = ctx.saved_tensors
        linears: Projection = ctx.linears
        factors = linears.factors(trained, dropped.dtype)
        grad_low = factors.backward_low(grad)
        of_update = factors.backward_update(grad, grad_low, dropped, low)
        if not ctx.needs_input_grad[0]:
            return None, None, None, *of_update
        weight = linears.weight(dropped.dtype)
        if not ctx.has_dropout:
            return factors.backward_input(grad, grad_low, weight), None, None, *of_update
        assert grad_low is not None
        assert factors.a is not None
        return grad @ weight, grad_low @ factors.a, None, *of_update
