"""Train a cell in one of three ways, and measure the result."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.addition_order.page import Cell, Record
from qlora_cli.adapters import LoRA
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.distributed.world import World, set_seed
from qlora_cli.kernels.lora_linear import base_weight
from qlora_cli.loop.setup import Setup
from qlora_cli.loop.step import train_step
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.packed_attention import attend_by_document
from qlora_cli.models.quantization import FourBit, Unquantized
from qlora_cli.models.report import count_trained_weights
from qlora_cli.objectives.base import evaluate_objective
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.optim.families import AdamW
from qlora_cli.optim.schedules import Linear
from qlora_cli.recipe.sections import Training
from qlora_cli.types import Batch, Example, StepHooks, TrainState

BASES = {"nf4": FourBit(), "none": Unquantized()}


@dataclass(frozen=True)
class Work:
    """Model weights and rows shared by the cells."""

    path: Path
    training: Sequence[Example]
    held_out: Sequence[Example]
    pad_token_id: int
    world: World

    def stream(self, cell: Cell) -> BatchStream:
        """Return the training batches of a cell, drawn by its seed; one batch per step."""
        return self._end_to_end(self.training, cell.rows_per_step, cell.seed)

    def held_out_batches(self, rows: int) -> list[Batch]:
        """Return all held-out rows in batches of `rows`."""
        stream = self._end_to_end(self.held_out, rows, seed=0)
        return [batch for step in range(stream.num_steps) for batch in stream.micro_batches(step)]

    def held_out_loss(self, objective: TokenLoss, cell: Cell) -> float:
        """Return the mean loss over the supervised tokens of the held-out rows."""
        batches = self.held_out_batches(cell.rows_per_step)
        return evaluate_objective(objective, batches, self.world.device)["loss"]

    def _end_to_end(self, examples: Sequence[Example], rows: int, seed: int) -> BatchStream:
        return BatchStream(
            examples,
            batch_size=rows,
            micro_batch_size=rows,
            seed=seed,
            epochs=1,
            pad_token_id=self.pad_token_id,
            padding=False,
        )


def run(way: str, cell: Cell, work: Work) -> Record:
    """Train a cell in one way, and measure the trained adapter."""
    model = build(way, cell, work.path)
    objective = TokenLoss(model, computes_in(way))
    stream = work.stream(cell)
    losses: list[float] = []
    kept: dict[str, float] = {}
    for step, loss in enumerate(losses_of(objective, stream, cell, work.world), start=1):
        losses.append(loss)
        if way != "float32" and step in (1, cell.steps):
            kept[str(step)] = share_kept(objective, work.held_out_batches(2)[0])
    own = work.held_out_loss(objective, cell)
    if way == "float32":
        return {"losses": losses, "held_out_own": own, "held_out_float32": own}
    reference = build("float32", cell, work.path)
    copy_adapter(model, reference)
    exact = work.held_out_loss(TokenLoss(reference, torch.float32), cell)
    return {"losses": losses, "held_out_own": own, "held_out_float32": exact, "kept": kept}


def measure_untrained(cell: Cell, work: Work) -> Record:
    """Measure the held-out loss of the base (a new adapter's update is zero)."""
    found = {}
    for name, way in (("held_out_own", "peft"), ("held_out_float32", "float32")):
        objective = TokenLoss(build(way, cell, work.path), computes_in(way))
        found[name] = work.held_out_loss(objective, cell)
    return found


def computes_in(way: str) -> torch.dtype:
    return torch.float32 if way == "float32" else torch.bfloat16


def build(way: str, cell: Cell, path: Path) -> PeftModel:
    """Load the base and attach a new adapter, the same one for all ways."""
    quantization: Any = BASES[cell.base]
    options = quantization.load_options(torch.bfloat16)
    base = BaseModelConfig(path=str(path)).load(options, torch.device("cpu"))
    if way == "float32":
        base = quantization.restore(base)
        base.requires_grad_(False)
    assert attend_by_document(base)
    set_seed(cell.seed)
    if way == "ours":
        model = LoRA(r=cell.r, alpha=2 * cell.r).attach(base)
    else:
        config = LoraConfig(
            r=cell.r, lora_alpha=2 * cell.r, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            # PEFT initialises adapters of a bfloat16 base on the bfloat16 grid.
            parameter.data = parameter.data.bfloat16().float()
    return model.train()


def losses_of(
    objective: TokenLoss, stream: BatchStream, cell: Cell, world: World
) -> Iterator[float]:
    """Train, and yield the loss of each step."""
    optimizer = AdamW(learning_rate=cell.learning_rate)
    setup = Setup(
        base=objective.model,
        model=objective.model,
        objective=objective,
        shared=objective,
        optimizer=optimizer.build(objective.named_parameters(), world.device),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        schedule=lambda step: Linear().scale(step, cell.steps),
        step_hooks=StepHooks(),
        batches=stream,
        kernels="plain",
        world=world,
        max_steps=cell.steps,
        trained=count_trained_weights(objective.model),
    )
    settings = Training(
        batch_size=cell.rows_per_step, micro_batch_size=cell.rows_per_step, max_steps=cell.steps
    )
    state = TrainState()
    while state.step < cell.steps:
        metrics = train_step(setup, settings, state)
        state.step += 1
        yield metrics["loss"]


def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    """Copy the adapter of one model to another."""
    trained = {name: p.data for name, p in source.named_parameters() if p.requires_grad}
    places = {name: p for name, p in target.named_parameters() if p.requires_grad}
    assert trained.keys() == places.keys()
    for name, parameter in places.items():
        parameter.data.copy_(trained[name])


@torch.no_grad()
def share_kept(objective: TokenLoss, batch: Batch) -> float:
    """Return the share of the update that reaches the layers' outputs: 1 is all, 0 is none.

    Mean over the layers of (y - x W^T) . u / (u . u), with output y and update u in float32.
    """
    shares: list[float] = []

    def look(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].bfloat16().float()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = x @ a.T @ b.T * layer.scaling["default"]
        product = nn.functional.linear(
            x, base_weight(layer.base_layer, torch.float32), layer.base_layer.bias
        )
        shares.append(float(((output.float() - product) * update).sum() / update.square().sum()))

    layers = [module for module in objective.modules() if hasattr(module, "lora_A")]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    objective(batch)
    for hook in hooks:
        hook.remove()
    return statistics.mean(shares)
