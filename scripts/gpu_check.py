"""Verify on a CUDA card what could not be verified on a CPU, and print a table.

Checks run in order of their value, and each prints its figures at once. All figures are written to
a JSON file, to be sent or compared. Nothing is downloaded: weights are random. `--minutes 10` ends
in that time and skips what no longer fits. `--device cpu` tests the script itself on a machine
without a card, on tiny sizes, and proves nothing about CUDA.

Exit status: 0 all checks passed, 1 at least one failed, 3 there is no CUDA card.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.gpu.report import Check

NO_CARD = 3


def checks() -> Iterator[Check]:
    """Yield all checks, the most valuable first."""
    yield from first_checks()
    yield from step_checks()
    yield from command_checks()
    yield from further_checks()
    yield from further_command_checks()


def first_checks() -> Iterator[Check]:
    """Yield the checks of attention and of gradients at real widths."""
    import torch

    from scripts.gpu import attention, gradient_checks, step_checks
    from scripts.gpu.report import Check

    yield Check("settings of a run on CUDA", 5, step_checks.settings_of_cuda)
    yield Check("attention: back end", 3, attention.back_end)
    yield Check("attention: new lengths", 15, attention.new_lengths)
    yield Check("attention: gradients with a mask", 3, attention.masked_gradients)
    for kind in ("nf4", "none"):
        run = partial(gradient_checks.real_widths, quantization=kind)
        yield Check(f"gradients at real widths, {kind}", 45, run)
    for dtype in (torch.bfloat16, torch.float16):
        for size in (64, 128):
            name = f"attention at once, {str(dtype).removeprefix('torch.')}, heads of {size}"
            yield Check(name, 4, partial(attention.varlen, dtype=dtype, size=size))
    windowed = partial(attention.varlen, dtype=torch.bfloat16, size=128, window=16)
    yield Check("attention at once, window of 16 tokens", 4, windowed)
    yield Check("attention without flash-attn", 5, attention.no_flash_attention_package)


def step_checks() -> Iterator[Check]:
    """Yield the checks of steps: speed, waits, compiling, memory."""
    from scripts.gpu import gradient_checks, preference_checks, step_checks
    from scripts.gpu.report import Check
    from scripts.gpu.training import Mode

    for mode in (
        Mode("nf4", "compiled", True), Mode("nf4", "fused", True), Mode("nf4", "plain", True),
        Mode("nf4", "compiled", True, dropout=0.05), Mode("none", "compiled", True),
        Mode("nf4", "compiled", "offload"), Mode("nf4", "compiled", False),
    ):  # fmt: skip
        run = partial(step_checks.speed, mode=mode)
        yield Check(f"speed: {mode.name}", 14, run)
    yield Check("compiled steps, and what is recompiled", 25, step_checks.compiled_steps)
    for mode in (Mode("nf4", "compiled", True), Mode("nf4", "fused", True)):
        run = partial(step_checks.launches, mode=mode)
        yield Check(f"launches: {mode.name}", 12, run)
    for mode in (Mode("nf4", "fused", True), Mode("nf4"), Mode("nf4", "fused", "offload")):
        yield Check(f"waits: {mode.name}", 5, partial(step_checks.waits, mode=mode))
    padded = partial(step_checks.waits, mode=Mode("nf4"), padded=True)
    yield Check("waits: padded rows", 5, padded)
    for mode in (Mode("nf4", "fused", True), Mode("none", "fused", False)):
        run = partial(step_checks.plan_against_measured, mode=mode)
        yield Check(f"plan and measured: {mode.name}", 15, run)
    yield Check("layers with dropout", 5, gradient_checks.dropout_layers)
    for mode in (
        Mode("nf4", "fused", True, objective="dpo"), Mode("none", "fused", False, objective="dpo"),
    ):  # fmt: skip
        name = mode.name
        yield Check(f"first loss: {name}", 8, partial(preference_checks.first_loss, mode=mode))
        run = partial(preference_checks.shared_prompts, mode=mode)
        yield Check(f"prompt once: {name}", 8, run)
    yield Check("updates of an 8-bit optimizer", 5, step_checks.updates_are_used)


def command_checks() -> Iterator[Check]:
    """Yield the commands as users run them."""
    from scripts.gpu import command_checks
    from scripts.gpu.report import Check

    for precision in ("bf16", "fp16"):
        run = partial(command_checks.command_train, kind="nf4", precision=precision)
        yield Check(f"qlora train, nf4 in {precision}", 20, run)
    yield Check("qlora train --resume, long documents", 50, command_checks.resume_is_close)
    yield Check("qlora train out of memory", 20, command_checks.out_of_memory)
    yield Check("qlora eval repeats the logged loss", 20, command_checks.eval_reproduces)
    yield Check("qlora generate", 40, command_checks.command_generate)
    run = partial(command_checks.merge_is_faithful, kind="nf4")
    yield Check("qlora merge, nf4", 25, run)


def further_checks() -> Iterator[Check]:
    """Yield the checks of bitsandbytes, of more memory, of generation, and small ones."""
    import torch

    from scripts.gpu import (
        attention,
        bitsandbytes_checks,
        command_checks,
        gradient_checks,
        step_checks,
    )
    from scripts.gpu.report import Check

    for kind in ("nf4", "fp4"):
        product = partial(bitsandbytes_checks.four_bit_product, kind=kind)
        yield Check(f"{kind}: product against dequantized", 3, product)
        values = partial(bitsandbytes_checks.four_bit_values, kind=kind)
        yield Check(f"{kind}: values as on the CPU", 3, values)
        merged = partial(bitsandbytes_checks.merged_weights, kind=kind)
        yield Check(f"{kind}: merged weights", 2, merged)
        few = partial(bitsandbytes_checks.few_rows, kind=kind)
        yield Check(f"{kind}: few rows without dequantizing", 3, few)
    yield Check("products of a model against the CPU's", 8, bitsandbytes_checks.products_of_a_model)
    yield Check("int8: product and gradient", 3, bitsandbytes_checks.eight_bit_product)
    yield Check("fragmentation", 30, step_checks.fragmentation)
    yield Check("fp16 without flash attention, as on a T4", 12, gradient_checks.without_flash)
    for number in (1, 16):
        run = partial(command_checks.generation, num_rows=number)
        yield Check(f"generation, {number} at once", 12, run)
    yield Check("noise of sampling", 2, command_checks.sampling_noise)
    yield Check("peak memory", 25, step_checks.memory_is_saved)
    yield Check("kernels of a step", 12, step_checks.kernels_of_a_step)
    for dtype in (torch.bfloat16, torch.float16):
        name = f"attention by document, {str(dtype).removeprefix('torch.')}"
        yield Check(name, 3, partial(attention.document_by_document, dtype=dtype))
    for kind in ("nf4", "int8", "none"):
        agree = partial(gradient_checks.checkpointing_agrees, kind=kind)
        yield Check(f"{kind}: gradients, checkpointed or not", 5, agree)
    for kind in ("nf4", "none"):
        fused = partial(gradient_checks.fused_agrees, kind=kind)
        yield Check(f"{kind}: layers as one function", 5, fused)
    offload = partial(gradient_checks.offload_agrees, kind="nf4")
    yield Check("inputs of layers on the host", 5, offload)
    for bits in (32, 8):
        paged = partial(bitsandbytes_checks.paged_optimizer, bits=bits)
        yield Check(f"paged AdamW, {bits} bit, resumed", 3, paged)


def further_command_checks() -> Iterator[Check]:
    """Yield the commands in all other types and precisions."""
    from scripts.gpu import command_checks
    from scripts.gpu.report import Check

    for kind, precision in (
        ("int8", "bf16"), ("none", "bf16"), ("fp4", "bf16"), ("nf4", "fp32"), ("int8", "fp16"),
        ("none", "fp16"),
    ):  # fmt: skip
        run = partial(command_checks.command_train, kind=kind, precision=precision)
        yield Check(f"qlora train, {kind} in {precision}", 20, run)
    for kind in ("int8", "none"):
        merge = partial(command_checks.merge_is_faithful, kind=kind)
        yield Check(f"qlora merge, {kind}", 45, merge)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, help="end in this time, and skip what is left")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE",
                        help="file for all figures (gpu_check.json)")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="WORD",
                        help="run the checks with one of these words in their name")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the checks and their seconds")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the checks that the command line asks for."""
    started = time.monotonic()
    options = parse(words)
    chosen = list(checks())
    if options.only:
        chosen = [one for one in chosen if any(word in one.name for word in options.only)]
        if not chosen:
            sys.exit(f"--only: no check has {' or '.join(options.only)} in its name; see --list")
    if options.list:
        print("\n".join(f"{one.seconds:4.0f} s  {one.name}" for one in chosen))
        print(f"{sum(one.seconds for one in chosen):4.0f} s together, estimated")
        return 0
    return run(options, chosen, started)


def run(options: argparse.Namespace, chosen: list[Check], started: float) -> int:
    """Run checks, and return the exit status."""
    import torch

    from qlora_cli._compat import quiet_libraries
    from scripts.gpu.bench import Bench, sizes_of
    from scripts.gpu.older_torch import support_older_torch
    from scripts.gpu.report import FAIL, NOT_HERE, PASS, SKIPPED, Report, print_machine, run_checks

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA card here (torch.cuda.is_available() is false): nothing was checked")
        return NO_CARD
    quiet_libraries()
    print_machine(device)
    if device.type == "cuda" and (changed := support_older_torch()):
        print(changed)
    report = Report(options.json, device, options.minutes, started)
    with tempfile.TemporaryDirectory(prefix="qlora-gpu-") as folder:
        deadline = None if options.minutes is None else started + 60 * options.minutes
        run_checks(Bench(Path(folder), device, sizes_of(device), deadline), chosen, report)
    failed = report.count(FAIL)
    print(
        f"\n{report.count(PASS)} passed, {failed} failed, {report.count(NOT_HERE)} need a card, "
        f"{report.count(SKIPPED)} skipped for want of time; figures in {options.json}"
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
