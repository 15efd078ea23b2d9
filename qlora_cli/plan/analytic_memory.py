"""What a step takes where the code of a model cannot be traced: the weights counted, the rest by a
formula.

What is held between steps, gradients and updates go by the shapes of the weights, which are known
without running the model; they are counted as in a trace. What the model computes is not. For that
there is the formula of Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198, section 4.1,
equation 1): each matrix keeps its input for the backward pass, and what comes out of it is the
input of something that keeps it. For a layer of GPT, with four times the width inside, that is

    activations of a layer = s b h (34 + 5 a s / h) bytes in 16 bit

    s tokens a row, b rows, h width, a heads

Here widths are those of the model's own matrices, which need not be GPT's, and normalization is in
32 bit, as transformers has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_cli.distributed.devices import Device
from qlora_cli.models.report import (
    count_base_weights,
    count_trained_weights,
    refuse_mostly_unquantized,
)
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP, dry_update, layers_of
from qlora_cli.plan.trace.libraries import load_libraries
from qlora_cli.plan.trace.memory_counter import (
    BATCH,
    GRADIENTS,
    HELD,
    LOAD,
    LOGITS,
    RECOMPUTED,
    SAVED,
    STATES,
    WORKSPACE,
    Count,
    Peak,
    Segment,
)
from qlora_cli.plan.trace.meta_model import load_traced, outline
from qlora_cli.plan.traced_memory import (
    GRANULARITY,
    Forecast,
    attention_option,
    in_plain_words,
    text_config,
)
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMULA = (SAVED, RECOMPUTED, LOGITS, BATCH, WORKSPACE)
"""Kinds of what is alive that go by it."""

SOURCE = "Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, equation 1"

RANGE = (0.25, 2.0)
"""What was traced of models that can be, as a share of what the formula says: the least and the
most (`benchmarks/plan_formula.md`)."""


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, as far as activations go by them."""

    values: float
    """Inputs and outputs of its matrices, for each token."""
    normed: int
    """Values that are normalized, for each token."""
    scored: int
    """Heads whose scores are kept; none where attention is one kernel."""
    widest: int
    """Input and output of its widest matrix."""
    largest: int
    """Weights of its largest matrix."""
    weights: float
    """Of the matrices that a token meets."""

    @classmethod
    def of(cls, layer: nn.Module, text: PretrainedConfig, *, scored: int) -> Layer:
        """Of a layer without data, before it is quantized.

        Of the experts in a mixture a token meets some, which the config says.
        """
        shapes = []
        for name, module in layer.named_modules():
            if isinstance(module, nn.Embedding):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    *stack, rows, columns = parameter.shape
                    share = _share_of_experts(text) if "expert" in f"{name}.{key}" else 1.0
                    shapes.append((share * math.prod(stack), rows, columns))
        return cls(
            values=sum(number * (rows + columns) for number, rows, columns in shapes),
            normed=sum(map(_normed, layer.modules())),
            scored=scored,
            widest=max((rows + columns for _, rows, columns in shapes), default=0),
            largest=max((rows * columns for _, rows, columns in shapes), default=0),
            weights=sum(number * rows * columns for number, rows, columns in shapes),
        )

    def kept(self, batch: Batch, size: int) -> int:
        """Bytes from the forward to the backward pass.

        Args:
            size: bytes of a number that is computed in.
        """
        tokens, length = batch.input_ids.numel(), batch.input_ids.shape[1]
        scores = self.scored * length * (4 + size)  # softmax in 32 bit, and as it is multiplied
        return round(tokens * (size * self.values + 4 * self.normed + scores))


def _share_of_experts(text: PretrainedConfig) -> float:
    values = text.to_dict()
    some = values.get("num_experts_per_tok")
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((values[name] for name in names if values.get(name)), None)
    return some / number if some and number else 1.0


def _normed(module: nn.Module) -> int:
    """Width of what a module normalizes: its own weights are one row."""
    own = list(module.parameters(recurse=False))
    return own[0].numel() if own and all(p.dim() == 1 for p in own) else 0


@dataclass(frozen=True)
class Sizes:
    """Of a model and its step."""

    layers: Sequence[Layer]
    width: int
    vocabulary: int
    size: int
    """Bytes of a number that is computed in."""
    stream: int
    """Bytes of a number between the layers."""
    is_quantized: bool
    kept_factor: float
    """Of products with quantized weights; so is the next."""
    held_share: float
    is_checkpointed: bool
    is_offloaded: bool
    """Whether what is kept of checkpointed layers is on the host."""
    cast: int
    """Bytes of the copies of trained weights in what is computed in."""
    trains_head: bool

    def kinds(self, batch: Batch) -> dict[str, int]:
        """What the formula says of the moment at which a backward pass begins in the last layer."""
        tokens = batch.input_ids.numel()
        kept = [layer.kept(batch, self.size) for layer in self.layers]
        each = [round(self.kept_factor * size) for size in kept]
        stream = self.stream * tokens * self.width
        saved = sum(each)
        if self.is_checkpointed:
            inputs = self.inputs(tokens) * (not self.is_offloaded)
            saved = round(self.held_share * sum(kept)) + inputs
        return {
            SAVED: saved + stream + self.cast,
            RECOMPUTED: max(each) if self.is_checkpointed else 0,
            # Those that predict something, and their gradient.
            LOGITS: 2 * self.size * batch.num_supervised * self.vocabulary,
            BATCH: 3 * 8 * tokens,
            # The gradient of a trained head is summed over chunks, in 32 bit.
            WORKSPACE: self._workspace(tokens)
            + 3 * 4 * self.width * self.vocabulary * self.trains_head,
        }

    def inputs(self, tokens: int) -> int:
        """Bytes of the inputs of all layers."""
        return len(self.layers) * self.stream * tokens * self.width

    def kinds_without_gradient(self, batch: Batch) -> dict[str, int]:
        """The same of an evaluation: one layer at a time."""
        tokens = batch.input_ids.numel()
        return {
            LOGITS: 2 * self.size * batch.num_supervised * self.vocabulary,
            BATCH: 3 * 8 * tokens,
            WORKSPACE: self._workspace(tokens) + self.cast,
        }

    def _workspace(self, tokens: int) -> int:
        """Gradients of the widest matrix' input and output, and a matrix that is dequantized."""
        widest = max(layer.widest for layer in self.layers)
        largest = max(layer.largest for layer in self.layers) * self.is_quantized
        return round(self.size * (self.kept_factor * tokens * widest + largest))

    def flops(self, batch: Batch, *, is_full: bool) -> int:
        """Two for each weight and token, as often as a matrix is multiplied: forward, back to its
        input, back to itself if it is trained, and forward once more if it is checkpointed."""
        times = 2 + is_full + self.is_checkpointed
        inside = sum(layer.weights for layer in self.layers) * batch.input_ids.numel()
        head = self.width * self.vocabulary * batch.num_supervised
        return round(2 * (times * inside + (2 + is_full) * head))


def by_formula(
    recipe: Recipe,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    device: Device,
    steps: Sequence[Sequence[Batch]],
    held_out: Batch | None,
    why: str,
) -> Forecast:
    """The same as `forecast`, of a model whose code cannot be traced.

    Args:
        why: it cannot.

    Raises:
        ModelError: the model cannot even be built without data, or does not suit the recipe.
    """
    text = text_config(config)
    options = attention_option(recipe)
    load_libraries()
    count = Count(device, granularity=GRANULARITY[device], vocabulary_size=text.vocab_size)
    with in_plain_words(config), count:
        with count.stage(LOAD):
            base = load_traced(config, recipe.quantization.load_options(dtype), count, **options)
        weights = count_base_weights(base)
        refuse_mostly_unquantized(weights, recipe.quantization.max_unquantized)
        model = dry_update(base, recipe, count)
    sizes = _sizes(recipe, config, dtype, model, device)
    peaks = {s: p for s, p in count.peaks.items() if s.stage == LOAD or s.part == "update"}
    update = next(peak for segment, peak in peaks.items() if segment.stage == STEP)
    held = {kind: update.kinds.get(kind, 0) for kind in HELD}
    gradients = update.kinds[GRADIENTS]

    def add(segment: Segment, kinds: dict[str, int]) -> None:
        peaks[segment] = Peak(sum(kinds.values()), kinds)

    first = {kind: size for kind, size in held.items() if kind != STATES}
    largest = max((batch for step in steps for batch in step), key=lambda b: b.input_ids.numel())
    with_gradients = {GRADIENTS: gradients, **sizes.kinds(largest)}
    add(Segment(FIRST, "backward", 0, None), {**first, **with_gradients})
    add(Segment(STEP, "backward", 0, None), {**held, **with_gradients})
    if held_out is not None:
        add(
            Segment(EVALUATION, "forward", 0, 0),
            {**held, **sizes.kinds_without_gradient(held_out)},
        )
    is_full = recipe.adapter.trains_base
    flops = sum(sizes.flops(batch, is_full=is_full) for step in steps for batch in step)
    return Forecast(
        peaks=peaks,
        flops={STEP: flops},
        host_bytes=sizes.is_offloaded * sizes.inputs(largest.input_ids.numel()),
        num_layers=text.num_hidden_layers,
        traced_layers=(),
        base_weights=weights.num_weights,
        trained_weights=count_trained_weights(model).trained,
        vocabulary_size=text.vocab_size,
        untraced=why,
        by_formula=FORMULA,
    )


def _sizes(
    recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, model: nn.Module, device: Device
) -> Sizes:
    text = text_config(config)
    shape = outline(config, dtype, **attention_option(recipe))
    is_eager = shape.config._attn_implementation == "eager"
    heads = text.num_attention_heads if is_eager else 0
    # Without a list of layers all of it is one, embeddings aside.
    layers = layers_of(shape) or [shape.get_decoder() or shape]
    trained = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    head = (text.vocab_size, text.hidden_size)
    return Sizes(
        layers=[Layer.of(layer, text, scored=heads) for layer in layers],
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        size=dtype.itemsize,
        stream=4 if recipe.adapter.trains_base else dtype.itemsize,
        is_quantized=recipe.quantization.is_quantized,
        kept_factor=recipe.quantization.kept_factor,
        held_share=recipe.quantization.held_share,
        is_checkpointed=bool(recipe.training.gradient_checkpointing),
        is_offloaded=recipe.training.gradient_checkpointing == "offload" and device == "cuda",
        cast=dtype.itemsize * sum(p.numel() for p in trained) * (dtype != torch.float32),
        trains_head=any(p.shape == head for p in trained),
    )
