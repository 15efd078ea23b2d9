"""Checks of bitsandbytes: 4-bit and 8-bit products, and paged optimizers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qlora_cli.kernels.four_bit import MAX_ROWS, multiply
from qlora_cli.kernels.lora_linear import base_weight
from qlora_cli.kernels.merged_weight import merge_weights
from qlora_cli.models.product_check import check_products
from qlora_cli.optim.base import load_states
from scripts.gpu.bench import Bench, relative_error

_SHAPE = (768, 1024)


def four_bit_product(bench: Bench, kind: str) -> str:
    """Compare Linear4bit with a product by the dequantized weight, for one token and many.

    Expect rounding only: 1e-2 in bfloat16, 2e-3 in float16, 1e-4 in float32.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    worst = 0.0
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)):
        layer = Linear4bit(
            1024, 768, bias=False, compute_dtype=dtype, quant_type=kind, compress_statistics=True
        )
        layer = layer.to(bench.device)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        for tokens in (1, 7, 2048):
            x = torch.randn(tokens, 1024, device=bench.device, dtype=dtype)
            with torch.no_grad():
                error = relative_error(layer(x), x.float() @ weight.T)
            bench.at_most(error, tolerance, f"{dtype}, {tokens} tokens: relative error")
            worst = max(worst, error)
    return f"relative error {worst:.1e}"


def few_rows(bench: Bench, kind: str) -> str:
    """Compare the product of generation with that of the dequantized weight, and time both.

    Expect rounding only, and at most the time of dequantizing for all rows up to the limit.
    """
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    width = 4096 if bench.is_cuda else 256
    layer = Linear4bit(
        width, width, bias=False, compute_dtype=torch.bfloat16, quant_type=kind,
        compress_statistics=True,
    ).to(bench.device)  # fmt: skip
    times, worst = {}, 0.0
    for rows in (1, 4, 7, 14, MAX_ROWS):
        x = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)
        with torch.no_grad():
            found = multiply(x, layer)
            expected = x.float() @ base_weight(layer, torch.float32).T
            worst = max(worst, relative_error(found, expected))
            times[rows] = [
                milliseconds(bench, lambda x=x: multiply(x, layer)),  # type: ignore[misc]
                milliseconds(bench, lambda x=x: x @ base_weight(layer, x.dtype).T),  # type: ignore[misc]
            ]
    bench.note("rows: milliseconds in 4 bit, dequantized", times)
    figures = (
        bench.at_most(worst, 1e-2, "relative error")
        + "; "
        + ", ".join(
            f"{rows} rows {ours:.3f} ms (dequantized {plain:.3f})"
            for rows, (ours, plain) in times.items()
        )
    )
    bench.needs_card()
    assert all(ours <= plain for ours, plain in times.values()), figures
    return figures


def milliseconds(bench: Bench, run: Callable[[], object]) -> float:
    """Return the mean time of a call, without the first ones."""
    for _ in range(3):
        run()
    number = 50 if bench.is_cuda else 3
    bench.synchronize()
    started = time.perf_counter()
    for _ in range(number):
        run()
    bench.synchronize()
    return 1000 * (time.perf_counter() - started) / number


def products_of_a_model(bench: Bench) -> str:
    """Run the check of each run on the products of its model, in all dtypes. Expect no refusal."""
    from qlora_cli.models.loading import load_base

    for kind in ("nf4", "fp4", "int8"):
        recipe = bench.recipe("products", quantization={"type": kind})
        base = load_base(recipe.model, recipe.quantization, torch.bfloat16, bench.device)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if kind != "int8" or dtype != torch.float32:
                check_products(base, dtype)
    return "nf4, fp4 and int8 agree with the CPU"


def four_bit_values(bench: Bench, kind: str) -> str:
    """Expect the same values from a weight quantized on the GPU and on the CPU, up to ties."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(_SHAPE)
    here, there = (
        dequantize_4bit(*quantize_4bit(weight.to(d), quant_type=kind, compress_statistics=True))
        for d in (bench.device, torch.device("cpu"))
    )
    differing = float(((here.cpu() - there).abs() > 1e-3 * there.abs().max()).float().mean())
    return bench.at_most(differing, 1e-3, "share of values that differ")


def merged_weights(bench: Bench, kind: str) -> str:
    """Expect weights that were moved into one tensor to have the same values, bit for bit."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layers = [
        Linear4bit(1024, out, bias=False, quant_type=kind, compress_statistics=True)
        .to(torch.bfloat16)
        .to(bench.device)
        for out in (1024, 256, 256)
    ]
    expected = torch.cat([base_weight(layer, torch.bfloat16) for layer in layers])
    merged = merge_weights(layers)
    assert merged is not None, "they are not merged"
    each = torch.cat([base_weight(layer, torch.bfloat16) for layer in layers])
    differing = max(
        float((found != expected).float().mean()) for found in (merged.dequantize(), each)
    )
    return bench.at_most(differing, 0.0, "share of values that differ")


def eight_bit_product(bench: Bench) -> str:
    """Compare LLM.int8 and a gradient through it with float32. Expect 5e-2 at most."""
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    plain = nn.Linear(1024, 768, bias=False)
    layer = Linear8bitLt(1024, 768, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(bench.device)
    x = torch.randn(64, 1024, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    weight = plain.weight.to(bench.device)
    error = relative_error(y.detach(), x.detach().float() @ weight.T)
    y.float().sum().backward()
    assert x.grad is not None
    gradient_error = relative_error(x.grad, weight.sum(0).expand_as(x))
    return bench.at_most(max(error, gradient_error), 5e-2, "relative error")


def on_host(value: Any) -> Any:
    """Copy a value to the host if it is a tensor, as a checkpoint does."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def paged_optimizer(bench: Bench, bits: int) -> str:
    """Compare twenty steps of the paged optimizer with the unpaged one.

    Expect equal weights, states in shared memory, and the same after the state is loaded again,
    as a resumed run does.
    """
    import bitsandbytes.optim

    bench.needs_card()
    names = {32: ("PagedAdamW32bit", "AdamW32bit"), 8: ("PagedAdamW8bit", "AdamW8bit")}[bits]
    results = []
    for name in names:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(512, 1024, device=bench.device))
        optimizer = getattr(bitsandbytes.optim, name)([weight], lr=1e-2)
        target = torch.randn_like(weight)
        for step in range(20):
            if step == 10:
                saved = tree_map(on_host, optimizer.state_dict())
                optimizer = getattr(bitsandbytes.optim, name)([weight], lr=1e-2)
                load_states(optimizer, saved)
            optimizer.zero_grad()
            nn.functional.mse_loss(weight, target, reduction="sum").backward()
            optimizer.step()
        results.append(weight.detach())
        # Only paged tensors carry the mark.
        is_paged = hasattr(optimizer.state[weight]["state1"], "is_paged")
        assert is_paged == name.startswith("Paged"), f"{name}: states are paged: {is_paged}"
    error = bench.at_most(relative_error(*results), 1e-6, "relative difference")
    return f"states are paged, also after loading them; {error}"
