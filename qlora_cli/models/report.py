"""Count the weights that were loaded and those that are trained."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.common.formatting import size_text
from qlora_cli.errors import ModelError

log = logging.getLogger("qlora")

_SMALL = 0.25
"""A row of the head below this share of the median norm looks untrained. The smallest of the 49,152
rows of SmolLM2-135M has 0.57 of the median; untrained rows are near zero, or all the same."""

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WeightCounts:
    """The base weights as they are held in memory."""

    bytes_by_dtype: dict[str, int]
    """Bytes held in each dtype, including quantization constants."""
    num_weights: int
    """Weights of the model, as its paper counts them."""
    num_unquantized: int
    """How many of these are held in 16 or 32 bit."""
    unquantized_linear: dict[str, int]
    """Matrices other than embeddings and head that are not quantized: name -> weights."""
    linear_weights: int

    def summary(self) -> str:
        """Format one line for the log."""
        held = ", ".join(
            f"{size_text(size)} {dtype}" for dtype, size in self.bytes_by_dtype.items()
        )
        share = self.num_unquantized / self.num_weights
        unquantized = "" if share == 1 else f"; {share:.1%} unquantized"
        return f"base model: {self.num_weights:,} weights in {held}{unquantized}"


@dataclass(frozen=True)
class TrainedModules:
    """Trained modules of one name."""

    name: str
    num_modules: int
    num_weights: int


@dataclass(frozen=True)
class TrainedCounts:
    """The weights that are trained."""

    rows: list[TrainedModules]
    trained: int
    total: int

    def summary(self) -> str:
        """Format one line for the log."""
        share = self.trained / self.total
        return f"trained: {self.trained:,} of {self.total:,} weights ({share:.2%})"

    def table(self) -> str:
        """Format the trained weights by the name of their module."""
        width = max(len(row.name) for row in self.rows)
        return "\n".join(
            f"  {row.name:<{width}}  {row.num_modules:>5} modules  {row.num_weights:>13,} weights"
            for row in self.rows
        )


def held_bytes(model: Module, optimizer: Optimizer) -> dict[str, int]:
    """Return the bytes of each kind that training holds between steps."""
    import torch

    def size(tensors: Iterable[Tensor | None]) -> int:
        # Parameters may share their storage: a tied head is held once.
        storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    parameters = list(model.parameters())
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return {
        "base weights": size(p for p in parameters if not p.requires_grad),
        "trained weights": size(p for p in parameters if p.requires_grad),
        "gradients": size(p.grad for p in parameters),
        "optimizer": size(states),
    }


def count_weights(module: Module) -> dict[int, tuple[int, bool]]:
    """Return for the id of each parameter (number of weights, whether it is quantized).

    A packed 4-bit tensor holds two weights per byte (or more, depending on its storage dtype), so
    they are counted by the original shape, from its quantization state.
    """
    from bitsandbytes.nn import Int8Params, Params4bit

    counts = {}
    for parameter in module.parameters():
        if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
            counts[id(parameter)] = (parameter.quant_state.shape.numel(), True)
        else:
            counts[id(parameter)] = (parameter.numel(), isinstance(parameter, Int8Params))
    return counts


def _constants(parameter: Parameter) -> list[tuple[str, int]]:
    """Return dtype and bytes of the constants that quantization adds to a packed weight."""
    from bitsandbytes.nn import Int8Params, Params4bit

    if isinstance(parameter, Int8Params) and parameter.SCB is not None:
        return [(str(parameter.SCB.dtype), parameter.SCB.nbytes)]
    if not isinstance(parameter, Params4bit) or parameter.quant_state is None:
        return []
    state = parameter.quant_state
    tensors = [state.absmax]
    if state.nested:
        tensors += [state.state2.absmax, state.offset]
    return [(str(t.dtype), t.nbytes) for t in tensors]


def count_base_weights(model: PreTrainedModel) -> WeightCounts:
    """Count the weights of a freshly loaded base model."""
    from torch.nn import Embedding

    counts = count_weights(model)
    bytes_by_dtype: Counter[str] = Counter()
    for parameter in model.parameters():
        bytes_by_dtype[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
        for dtype, size in _constants(parameter):
            bytes_by_dtype[dtype.removeprefix("torch.")] += size
    head = model.get_output_embeddings()
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Embedding) or module is head
        for parameter in module.parameters()
    }
    linear = {n: p for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in spared}
    return WeightCounts(
        bytes_by_dtype=dict(bytes_by_dtype.most_common()),
        num_weights=sum(count for count, _ in counts.values()),
        num_unquantized=sum(count for count, quantized in counts.values() if not quantized),
        unquantized_linear={n: p.numel() for n, p in linear.items() if not counts[id(p)][1]},
        linear_weights=sum(counts[id(p)][0] for p in linear.values()),
    )


def refuse_mostly_unquantized(report: WeightCounts, max_share: float) -> None:
    """Refuse a quantized run that would hold much of the model in 16 bit, such as fused experts.

    Raises:
        ModelError: more than `max_share` of the linear weights are not quantized.
    """
    share = sum(report.unquantized_linear.values()) / max(1, report.linear_weights)
    if share <= max_share:
        return
    largest = sorted(report.unquantized_linear, key=report.unquantized_linear.__getitem__)[-5:]
    raise ModelError(
        f"quantization.type: {share:.0%} of the linear weights stayed unquantized "
        f"(at most {max_share:.0%} may): {', '.join(reversed(largest))}, ...",
        hint="this architecture keeps them in a form that bitsandbytes cannot quantize; "
        "use --set quantization.type=none",
    )


def count_trained_weights(model: Module) -> TrainedCounts:
    """Count the trained weights by the name of their module."""
    modules: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    seen: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = _owner(name)
        leaf = owner.rpartition(".")[2]
        weights[leaf] += parameter.numel()
        modules[leaf] += owner not in seen
        seen.add(owner)
    return TrainedCounts(
        rows=[TrainedModules(name, modules[name], weights[name]) for name in weights],
        trained=sum(weights.values()),
        total=sum(count for count, _ in count_weights(model).values()),
    )


def warn_of_untrained(model: PreTrainedModel, tokens: Mapping[str, int]) -> list[str]:
    """Warn of tokens that the model can hardly learn to write: their rows of the head are frozen
    and look as before any training.

    Args:
        model: with its adapter attached.
        tokens: text -> id of the tokens to check.

    Returns:
        The texts of the tokens that look untrained.
    """
    head = model.get_output_embeddings()
    if head is None or any(parameter.requires_grad for parameter in head.parameters()):
        return []
    found = [text for text, token_id in tokens.items() if _looks_untrained(head.weight, token_id)]
    if found:
        log.warning(
            "stop tokens: %s looks untrained in this base model, and the adapter does not train "
            "embeddings, so the tuned model may never stop; use the instruction-tuned model, or "
            "a data.chat_template that ends turns with a token that the base model knows",
            " ".join(found),
        )
    return found


def _looks_untrained(rows: Tensor, token_id: int) -> bool:
    """Tell whether a row is much smaller than most or equal to another, as at initialisation."""
    import torch

    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)  # (V,)
    norm = norms[token_id]
    if norm < _SMALL * norms.median():
        return True
    alike = torch.nonzero(norms == norm).flatten()
    return any(i != token_id and rows[i].equal(rows[token_id]) for i in alike.tolist())


def _owner(parameter_name: str) -> str:
    """Return the name of the base model's module that a (PEFT) parameter belongs to."""
    for mark in (".lora_", ".modules_to_save."):
        if mark in parameter_name:
            return parameter_name.split(mark)[0]
    return parameter_name.rpartition(".")[0]
