"""PEFT's LoRA layers with the sum in the order that keeps small updates (`lora_linear.py`).

PEFT creates them instead of its own through `LoraConfig._register_custom_module`. Anything other
than one plain update (DoRA, several adapters, a merged or disabled one) is computed by PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bit
from torch import Tensor, nn

from qlora_cli.kernels.four_bit import MAX_ROWS, has_product, multiply
from qlora_cli.kernels.lora_linear import (
    Projection,
    active_adapter_of,
    base_layer_of,
    unscaled_gradients,
)


class UpdateFirstLinear(PeftLinear):  # type: ignore[misc]  # PEFT is not typed
    """LoRA on a 16 or 32-bit layer."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        if args or options or not _has_one_update(self):
            plain: Tensor = super().forward(x, *args, **options)
            return plain
        return update_first(self, x)


class UpdateFirstLinear4bit(PeftLinear4bit):  # type: ignore[misc]  # as above
    """LoRA on a 4-bit layer."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        if args or options or not _has_one_update(self):
            plain: Tensor = super().forward(x, *args, **options)
            return plain
        return update_first(self, x)


class ScaleKeepingLinear8bit(PeftLinear8bit):  # type: ignore[misc]  # as above
    """PEFT's LoRA on an 8-bit layer, fixed so that DoRA does not lose the scales of the weight.

    DoRA dequantizes the weight in each forward pass. On a CPU, PEFT 0.21 then replaces the weight
    by a copy that looks freshly quantized (it has `CB`) but has no scales (`SCB`), and bitsandbytes
    would use the missing scales in the next forward pass. Remove this when
    `tests/unit/test_compat.py` fails because DoRA trains without it.
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.get_base_layer().weight
        if weight.SCB is None:
            weight.CB = None
        result: Tensor = super().forward(x, *args, **options)
        return result


def lora_layer_classes(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """Map classes of base layers to the LoRA classes that PEFT should create for them.

    For an 8-bit model, map only 8-bit layers: PEFT tests with `isinstance`, and they are also
    `nn.Linear`.
    """
    if any(isinstance(module, Linear8bitLt) for module in model.modules()):
        return {Linear8bitLt: ScaleKeepingLinear8bit}
    return {Linear4bit: UpdateFirstLinear4bit, nn.Linear: UpdateFirstLinear}


def update_first(layer: Any, x: Tensor) -> Tensor:
    """Compute a LoRA layer on `x` (..., in), in the autocast dtype if autocast is on."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.to(dtype)
    if multiplies_4_bit(layer, x.numel() // x.shape[-1], device):
        found = update_first_in_4_bit(layer, x.flatten(0, -2))
        return found.view(*x.shape[:-1], -1)
    dropped = layer.lora_dropout[active_adapter_of(layer)](x)
    linears = Projection([layer])
    y: Tensor = _UpdateFirst.apply(  # type: ignore[no-untyped-call]  # torch is not typed here
        x.flatten(0, -2), dropped.flatten(0, -2), linears, *linears.trained()
    )
    return y.view(*x.shape[:-1], -1)


def multiplies_4_bit(layer: Any, num_rows: int, device: str) -> bool:
    """Tell if a LoRA layer multiplies with its 4-bit weight as it is: few rows, without a gradient.

    On a CPU, results of such a kernel would depend on the machine.
    """
    return bool(
        device == "cuda"
        and 0 < num_rows <= MAX_ROWS
        and not torch.is_grad_enabled()
        and not layer.training  # no dropout
        and has_product(base_layer_of(layer))
    )


def update_first_in_4_bit(layer: Any, x: Tensor) -> Tensor:
    """Compute a LoRA layer on few rows `x` (T, in) without dequantizing its weight.

    Base product and update are added in float32 and rounded once, as `LoraFactors.forward` does.
    """
    name = active_adapter_of(layer)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.autocast(x.device.type, enabled=False):
        low = x.float() @ a.float().T
        y = multiply(x, base_layer_of(layer))
        return y.addmm_(low, b.float().T, alpha=layer.scaling[name]).to(x.dtype)


def _has_one_update(layer: Any) -> bool:
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
    """(T, in) -> (T, out). The update takes `dropped` as input, the base layer `x`."""

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
        of_update = unscaled_gradients(
            factors.backward_update(grad, grad_low, dropped, low), factors.scales
        )
        if not ctx.needs_input_grad[0]:
            return None, None, None, *of_update
        weight = linears.weight(dropped.dtype)
        if not ctx.has_dropout:
            return factors.backward_input(grad, grad_low, weight), None, None, *of_update
        assert grad_low is not None
        assert factors.a is not None
        return grad @ weight, grad_low @ factors.a, None, *of_update
