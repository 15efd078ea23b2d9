"""Checks of whole training steps: what the host waits for, speed, memory and compiling."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from qlora_cli.kernels.kept_factors import keep_factors
from qlora_cli.plan.dry_run import STEP
from qlora_cli.plan.traced_memory import trace_memory
from qlora_cli.types import Batch
from scripts.gpu.bench import MIB, Bench
from scripts.gpu.training import Mode, Run, cut, random_batch, world_of

GIB = 2**30
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
PAGEABLE = ("Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH (Device -> Pageable)")


def waits(bench: Bench, mode: Mode, *, padded: bool = False) -> str:
    """Count what the host waits for in a step of two micro-batches.

    Expect one wait, which reads the loss before the update, and no copy from pageable memory, for
    which the host waits too. Padded rows only tell their number: transformers looks at their masks.
    """
    batches = [random_batch(cut(400, 4, seed), 250, pad=padded) for seed in (0, 1)]
    run = Run(bench, mode, [batches])
    wanted = "plain" if padded else mode.kernels
    assert run.setup.kernels == wanted, run.setup.kernels
    run.step()  # the first makes the optimizer's states and chooses kernels
    found: list[Any] = []
    if bench.is_cuda:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run.step()
    finally:
        if bench.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    messages = [str(one.message).partition("\n")[0] for one in found]
    told = [message for message in messages if "synchroniz" in message]
    calls = profiled_calls(bench, run)
    bench.note("waits", len(told))
    bench.note("calls", calls)
    figures = f"{len(told)} waits; " + (", ".join(f"{n} {k}" for k, n in calls.items()) or "none")
    bench.needs_card()
    if not padded:
        assert len(told) == 1, f"{figures}: {told}"
        # The one copy back is the loss.
        assert not calls.get(PAGEABLE[0]), figures
    return figures


def profiled_calls(bench: Bench, run: Run) -> dict[str, int]:
    """Count a step's calls that wait, and its copies from and to pageable memory."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.is_cuda
    with profile(activities=activities) as profiler:
        run.step()
    names = Counter(event.name for event in profiler.events())
    return {name: names[name] for name in (*WAITS, *PAGEABLE) if names[name]}


def step_batches(bench: Bench, number: int, *, is_varied: bool = False) -> list[list[Batch]]:
    """Return the batches of some steps, one micro-batch each, with different documents.

    Args:
        is_varied: with different numbers of tokens, too.
    """
    sizes = bench.sizes

    def tokens(step: int) -> int:
        return sizes.tokens - is_varied * step * sizes.tokens // (2 * number)

    return [
        [random_batch(cut(tokens(step), sizes.documents, step), sizes.vocabulary)]
        for step in range(number)
    ]


def speed(bench: Bench, mode: Mode) -> str:
    """Time steps of the large model. Expect finite losses; the figures are to be compared."""
    before = bench.start_memory()
    run = Run(bench, mode, step_batches(bench, bench.sizes.steps), model=bench.large_model())
    model_bytes = bench.peak_memory()[0] - before
    losses = [run.step()["loss"] for _ in range(2)]
    bench.start_memory()
    seconds = []
    for _ in range(bench.sizes.steps):
        bench.synchronize()
        started = time.perf_counter()
        losses.append(run.step()["loss"])
        bench.synchronize()
        seconds.append(time.perf_counter() - started)
    allocated, reserved = bench.peak_memory()
    assert all(torch.tensor(losses).isfinite()), losses
    rate = bench.note("tokens_per_second", bench.sizes.tokens / statistics.median(seconds))
    bench.note("layers", bench.sizes.layers)
    bench.note("step_seconds", seconds)
    bench.note("loading_bytes", model_bytes)
    bench.note("allocated_bytes", allocated - before)
    bench.note("reserved_bytes", reserved)
    return (
        f"{rate:,.0f} tokens/s with {bench.sizes.layers} layers; {allocated / GIB:.2f} GiB "
        f"allocated, {reserved / GIB:.2f} reserved"
    )


def compiled_steps(bench: Bench) -> str:
    """Compare steps with compiled layers with steps of fused ones, and count what is compiled.

    Expect losses within 1e-2, and nothing compiled after the second step, although each step has
    another number of tokens.
    """
    from torch._dynamo.utils import counters

    steps, graphs = step_batches(bench, 5, is_varied=True), []
    losses: dict[str, list[float]] = {}
    for kernels in ("fused", "compiled") if bench.is_cuda else ("fused", "fused"):
        run = Run(bench, Mode("nf4", kernels, True), steps, model=bench.large_model())
        assert run.setup.kernels == kernels, run.setup.kernels
        graphs = [counters["stats"]["unique_graphs"]]
        losses[kernels] = []
        for _ in steps:
            losses[kernels].append(run.step()["loss"])
            graphs.append(counters["stats"]["unique_graphs"])
    made = bench.note("graphs_by_step", [b - a for a, b in itertools.pairwise(graphs)])
    pairs = zip(*losses.values(), strict=True) if len(losses) > 1 else []
    off = max((abs(a - b) / abs(a) for a, b in pairs), default=0.0)
    text = bench.at_most(off, 1e-2, "relative difference of the loss")
    figures = f"{text}; graphs compiled in each step: {made}"
    bench.needs_card()
    assert not any(made[2:]), figures
    return figures


LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def launches(bench: Bench, mode: Mode) -> str:
    """Count the kernels that a layer launches, and time what the host does for it.

    Both are the difference between all layers and half of them, in a micro-batch that is not the
    first of its step. Operations are counted without a card in `benchmarks/launches.md`; one of
    them may launch several kernels. Expect at most 200 in compiled layers.
    """
    from torch.profiler import ProfilerActivity, profile

    batch = random_batch(cut(256, 4), bench.sizes.vocabulary)  # few tokens: the card is quick
    numbers = bench.sizes.layers // 2, bench.sizes.layers
    seconds, counts = [], []
    for number in numbers:
        run = Run(bench, mode, [[batch]], model=bench.large_model(number))

        def micro_batch(objective: Any = run.setup.objective) -> None:
            objective(batch.to(bench.device))[0].backward()

        with keep_factors():
            for _ in range(3):
                micro_batch()
            times = []
            for _ in range(5):
                bench.synchronize()
                started = time.perf_counter()
                micro_batch()
                times.append(time.perf_counter() - started)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.is_cuda
            with profile(activities=activities) as profiler:
                micro_batch()
                bench.synchronize()
        seconds.append(min(times))
        counts.append(sum(event.name in LAUNCHES for event in profiler.events()))
    layers = numbers[1] - numbers[0]
    launched = bench.note("launches_by_layer", (counts[1] - counts[0]) / layers)
    spent = bench.note("host_microseconds_by_layer", 1e6 * (seconds[1] - seconds[0]) / layers)
    figures = f"{launched:.0f} kernels and {spent:.0f} microseconds of the host by layer"
    bench.needs_card()
    assert 0 < launched <= (200 if mode.kernels == "compiled" else 400), figures
    return figures


def updates_are_used(bench: Bench) -> str:
    """Compare losses in training with those of layers that are not fused, after each update.

    The kernels of bitsandbytes' optimizers write to weights without torch's knowledge. Expect
    factors of LoRA that were made from the new weights: at most 2e-2 apart, and a lower loss.
    """
    import bitsandbytes.optim

    batch = random_batch(cut(400, 4), 250)
    run = Run(bench, Mode("nf4", "fused", True), [[batch, batch]])
    trained = [one for one in run.setup.model.parameters() if one.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-2)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    run.setup = replace(run.setup, optimizer=optimizer)
    losses, differences = [], []
    for _ in range(4):
        with torch.no_grad():  # takes the original layers
            loss, _ = run.setup.objective(batch.to(bench.device))
        losses.append(run.step()["loss"])
        plain = float(loss) / run.setup.objective.weight(batch)
        differences.append(abs(losses[-1] - plain) / plain)
    assert losses[-1] < losses[0], losses
    text = bench.at_most(max(differences), 2e-2, "relative difference of the loss")
    return f"{text}; loss {losses[0]:.3f} -> {losses[-1]:.3f}"


def plan_against_measured(bench: Bench, mode: Mode) -> str:
    """Compare the traced memory of a step with what is allocated and reserved.

    Expect the allocated peak within 5 % of the trace. What the card holds besides is the context
    and other programs: a plan allows 12 % and 800 MiB for it and for fragmentation.
    """
    before = bench.start_memory()
    steps = step_batches(bench, 1)
    run = Run(bench, mode, steps, model=bench.large_model())
    for _ in range(3):
        run.step()
    bench.start_memory()
    run.step()
    allocated, reserved = (peak - before for peak in bench.peak_memory())
    config, _ = run.recipe.model.read_config()
    trace = trace_memory(
        run.recipe, config, mode.dtype, device="cuda", steps=steps, held_out=None,
        kernels=mode.kernels,
    )  # fmt: skip
    counted = bench.note("counted_bytes", trace.peak(STEP)[1].total)
    bench.note("allocated_bytes", allocated)
    bench.note("reserved_bytes", reserved)
    figures = (
        f"counted {counted / MIB:,.0f} MiB, allocated {allocated / MIB:,.0f}, reserved "
        f"{reserved / MIB:,.0f}"
    )
    bench.needs_card()
    free, total = torch.cuda.mem_get_info()
    besides = bench.note("besides_bytes", total - free - torch.cuda.memory_reserved())
    figures += f"; besides on the card {besides / MIB:,.0f}"
    assert abs(allocated / counted - 1) <= 0.05, figures
    assert reserved + besides <= 1.12 * counted + 800 * MIB, figures
    return figures


def fragmentation(bench: Bench) -> str:
    """Compare reserved with allocated memory over micro-batches of many different sizes.

    Expect less than 1.15 with expandable segments, which a run uses. Without them it only tells.
    """
    sizes = bench.sizes
    generator = torch.Generator().manual_seed(0)
    shares = (0.25 + 0.75 * torch.rand(sizes.varied, generator=generator)).tolist()
    steps = [
        [random_batch(cut(int(share * sizes.tokens), sizes.documents, seed), sizes.vocabulary)]
        for seed, share in enumerate(shares)
    ]
    ratios = {}
    for is_expandable in (False, True):
        if bench.is_cuda:
            set_allocator(bench, is_expandable)
        bench.start_memory()
        run = Run(bench, Mode("nf4", "fused", False), steps, model=bench.large_model())
        bench.start_memory()  # loading takes memory of its own
        for _ in steps:
            run.step()
        allocated, reserved = bench.peak_memory()
        ratios[is_expandable] = reserved / max(1, allocated)
        del run
    bench.note("reserved_by_allocated", ratios[True])
    bench.note("reserved_by_allocated_without_segments", ratios[False])
    figures = f"reserved/allocated {ratios[True]:.3f}, without segments {ratios[False]:.3f}"
    bench.needs_card()
    assert ratios[True] <= 1.15, figures
    return figures


def set_allocator(bench: Bench, is_expandable: bool) -> None:
    """Turn expandable segments on or off for memory that is taken from now on."""
    bench.start_memory()
    set_it = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    set_it = set_it or torch.cuda.memory._set_allocator_settings
    set_it(f"expandable_segments:{is_expandable}")


def memory_is_saved(bench: Bench) -> str:
    """Expect 4 bit, checkpointing and offload each to reduce the peak memory."""
    steps, peaks = step_batches(bench, 1), {}
    for name, mode in {
        "16 bit": Mode("none", checkpointing=True),
        "nf4": Mode("nf4", checkpointing=True),
        "kept": Mode("nf4"),
        "offload": Mode("nf4", checkpointing="offload"),
    }.items():
        before = bench.start_memory()
        run = Run(bench, mode, steps, model=bench.large_model())
        bench.start_memory()
        run.step()
        peaks[name] = (bench.peak_memory()[0] - before) / MIB
        del run
    bench.note("peaks_mib", peaks)
    figures = ", ".join(f"{name} {peak:,.0f} MiB" for name, peak in peaks.items())
    bench.needs_card()
    assert peaks["offload"] < peaks["nf4"] < min(peaks["16 bit"], peaks["kept"]), figures
    return figures


def settings_of_cuda(bench: Bench) -> str:
    """Expect the settings of a run: sums in float32, no cuDNN attention, a card torch supports.

    Expect also that a run records reserved memory beside allocated memory, and the random state of
    its own card only.
    """
    from qlora_cli.distributed.cuda import CudaState, runs_on
    from qlora_cli.runs.checkpoint import random_states

    world = world_of(bench)
    torch.ones(2**20, device=bench.device)
    matmul = torch.backends.cuda.matmul
    peak, states = world.peak_memory(), random_states()["cuda"]
    figures = bench.note("device", world.summary())
    bench.needs_card()
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert CudaState().has_card, "the driver's files are not where they were expected"
    capability = torch.cuda.get_device_capability(bench.device)
    assert runs_on(capability, torch.cuda.get_arch_list()), torch.cuda.get_arch_list()
    assert peak["reserved_memory_bytes"] >= peak["peak_memory_bytes"] > 0, peak
    assert len(states) == 1, f"{len(states)} random states"
    return figures


def kernels_of_a_step(bench: Bench) -> str:
    """Note the kernels of a compiled step that take the most time. There is nothing to expect."""
    from torch.profiler import ProfilerActivity, profile

    kernels = "compiled" if bench.is_cuda else "fused"
    run = Run(bench, Mode("nf4", kernels, True), step_batches(bench, 1), model=bench.large_model())
    for _ in range(2):
        run.step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.is_cuda
    with profile(activities=activities) as profiler:
        run.step()
        bench.synchronize()
    averages = profiler.key_averages()
    key = "self_device_time_total" if bench.is_cuda else "self_cpu_time_total"
    rows = sorted(averages, key=lambda row: -getattr(row, key))[:15]
    top = {row.key[:90]: [round(getattr(row, key) / 1000, 3), row.count] for row in rows}
    bench.note("milliseconds_and_calls", top)
    total = sum(getattr(row, key) for row in averages) / 1000
    name, (most, count) = next(iter(top.items()))
    return f"{total:,.1f} ms; most: {most:,.1f} ms in {count} calls of {name[:40]}"
