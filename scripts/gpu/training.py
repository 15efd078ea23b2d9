"""The parts of a run that the checks use: model, gradients of one batch, and steps."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.data.batching.collate import concatenate_batch, pad_batch
from qlora_cli.distributed.world import World
from qlora_cli.kernels.attention import PerDocumentAttention
from qlora_cli.kernels.decoder_layer import FusedLayer
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fast_path import Checkpointing, ComputeOptions, loss_kernel, prepare_layers
from qlora_cli.loop.setup import Setup, assemble
from qlora_cli.loop.step import train_step
from qlora_cli.models.loading import load_base
from qlora_cli.models.packed_attention import attend_by_document, skip_masks
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.plan.dry_run import FixedBatches
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch, Example, TrainState
from scripts.gpu.bench import Bench


@dataclass(frozen=True)
class Mode:
    """How a model is held and computed with."""

    quantization: str = "nf4"
    kernels: Kernels = "plain"
    checkpointing: Checkpointing = False
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    by_document: bool = False
    """Attend document by document, as cards before Ampere do."""
    objective: str = "supervised"

    @property
    def name(self) -> str:
        """Name the mode in a table."""
        again = {True: "recomputed", False: "kept", "mlp": "mlp recomputed", "offload": "offload"}
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        learned = "" if self.objective == "supervised" else f", {self.objective}"
        return f"{self.quantization} {self.kernels}, {again[self.checkpointing]}{dropout}{learned}"

    def sections(self, rank: int = 16) -> dict[str, Any]:
        """Return the sections of a recipe for this mode."""
        return {
            "quantization": {"type": self.quantization},
            "objective": {"type": self.objective},
            "adapter": {"r": rank, "alpha": 2 * rank, "dropout": self.dropout},
            "training": {
                "gradient_checkpointing": self.checkpointing,
                "kernels": self.kernels,
                "seed": 1,
            },
        }

    def options(self, device: torch.device) -> ComputeOptions:
        """Return the options of a run in this mode."""
        capabilities = DeviceCapabilities.of(device, self.dtype)
        if self.by_document:
            capabilities = replace(capabilities, attention=PerDocumentAttention())
        return ComputeOptions(self.dtype, self.kernels, capabilities)


def world_of(bench: Bench) -> World:
    """Return the world of a run, which also configures CUDA."""
    return World("auto" if bench.is_cuda else "cpu")


def load(
    bench: Bench, recipe: Recipe, mode: Mode, *, padding_free: bool = True, is_new: bool = False
) -> tuple[Any, Any]:
    """Load the base and attach an adapter. Returns both.

    Args:
        is_new: a new adapter, whose updates are zero, so that half of the gradients are too.
    """
    gc.collect()
    world_of(bench)
    base = load_base(recipe.model, recipe.quantization, mode.dtype, bench.device)
    if padding_free:
        assert attend_by_document(base), base.config._attn_implementation
        skip_masks(base)
    torch.manual_seed(1)
    model = recipe.adapter.attach(base).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not is_new:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                parameter.copy_(0.02 * values)
    return base, model


def gradients(
    bench: Bench, mode: Mode, batch: Batch, *, model: Path | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Return the adapter's gradients for one batch without padding.

    Args:
        seed: that of dropout.
    """
    recipe = bench.recipe("gradients", model=model, **mode.sections(rank=8))
    base, adapted = load(bench, recipe, mode)
    options = mode.options(bench.device)
    found = prepare_layers(adapted, base, mode.checkpointing, options)
    number, layers = num_fused(adapted), base.config.num_hidden_layers
    expected = 0 if mode.kernels == "plain" else layers
    assert number == expected, f"{number} of {layers} layers are one function"
    assert found == (mode.kernels if expected else "plain"), found
    kernel = loss_kernel(found, bench.device, options, base.config.vocab_size)
    loss = TokenLoss(adapted, mode.dtype, kernel)
    torch.manual_seed(seed)
    loss(batch.to(bench.device))[0].backward()
    named = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    gradients = {
        # Fused layers have the same names as those of transformers.
        name: parameter.grad.detach().clone()
        for name, parameter in named
        if parameter.grad is not None
    }
    assert len(gradients) == len(named) == 14 * layers, f"{len(gradients)} gradients"
    return gradients


def num_fused(model: nn.Module) -> int:
    """Return how many layers of a model are one function."""
    return sum(isinstance(one, FusedLayer) for one in model.modules())


def random_batch(
    lengths: Sequence[int], vocabulary: int, seed: int = 0, *, pad: bool = False
) -> Batch:
    """Make a batch of random rows; the second half of each is supervised."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(1, min(vocabulary, 250), (length,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * (length // 2) + ids[length // 2 :]))
    return (pad_batch if pad else concatenate_batch)(examples, 0)


def random_pairs(
    lengths: Sequence[tuple[int, int, int]], vocabulary: int, seed: int = 0, *, shared: bool = True
) -> Batch:
    """Make a batch of random pairs without padding.

    Args:
        lengths: tokens of the prompt, of the chosen and of the rejected answer, for each pair.
        shared: the prompt of a pair is in the row once.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int) -> list[int]:
        found: list[int] = torch.randint(
            1, min(vocabulary, 250), (number,), generator=generator
        ).tolist()
        return found

    examples = []
    for prompt_length, *answers in lengths:
        prompt = draw(prompt_length)
        for at, length in enumerate(answers):
            answer = draw(length)
            labels = [-100] * prompt_length + answer
            prefix = prompt_length if at else 0
            examples.append(Example(prompt + answer, labels, is_linked=at > 0, prefix=prefix))
    return concatenate_batch(examples, 0, shares_prefixes=shared)


def cut(tokens: int, documents: int, seed: int = 0) -> list[int]:
    """Cut tokens into rows of different lengths, from a third of the mean to three times it."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(documents, generator=generator).square() * 2.7 + 0.3
    lengths = [int(w) for w in weights / weights.sum() * tokens]
    lengths[0] += tokens - sum(lengths)
    return lengths


def build(
    bench: Bench,
    mode: Mode,
    steps: Sequence[Sequence[Batch]],
    *,
    model: Path | None = None,
    is_new: bool = False,
) -> tuple[Recipe, Setup[Any]]:
    """Assemble a run in a mode, as `qlora train` does. Its batches are those of each step."""
    if not bench.is_cuda and mode.kernels == "compiled":  # compiling takes longer than all checks
        mode = replace(mode, kernels="fused")
    recipe = bench.recipe(
        "steps", model=model, optimizer={"learning_rate": 1e-4}, **mode.sections()
    )
    padding_free = bool(steps[0][0].documents)
    base, adapted = load(bench, recipe, mode, padding_free=padding_free, is_new=is_new)
    options = mode.options(bench.device)
    if not padding_free:  # fused layers pass padded rows to the original layers
        options = replace(options, kernels="plain")
    world, batches = world_of(bench), StepBatches(steps)
    setup = assemble(recipe, base, adapted, options, batches, world, max_steps=100)
    setup.objective.train()
    return recipe, setup


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of each step, over and over."""

    steps: Sequence[Sequence[Batch]]

    def micro_batches(self, step: int) -> list[Batch]:
        """Return those of a step."""
        return FixedBatches(self.steps[step % len(self.steps)]).micro_batches(step)


class Run:
    """Steps of an assembled run."""

    def __init__(self, bench: Bench, mode: Mode, steps: Sequence[Sequence[Batch]], **options: Any):
        self.recipe, self.setup = build(bench, mode, steps, **options)
        self.state = TrainState()

    def step(self) -> dict[str, float]:
        """Make a step, and return its metrics."""
        found = train_step(self.setup, self.recipe.training, self.state)
        self.state.step += 1
        return found
