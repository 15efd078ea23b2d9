"""Biases that are trained beside quantized weights."""

from __future__ import annotations

from collections.abc import Iterable

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn


class TrainedBias(nn.Module):
    """A quantized linear layer and its bias, which is added to what the layer gives.

    Left to bitsandbytes, a bias is rounded in place to the dtype of the input: what is trained in
    float32 would lose its updates in the first forward.
    """

    def __init__(self, linear: Linear4bit | Linear8bitLt) -> None:
        super().__init__()
        self.bias = linear.bias
        self.linear = linear
        linear.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.linear(x)
        bias: Tensor = self.bias
        return y + bias.to(y.dtype)


def keep_biases_unrounded(model: nn.Module, names: Iterable[str]) -> None:
    """Take the biases among these weights out of the hands of bitsandbytes. They keep their names.

    Args:
        names: of what is trained. `model` is changed.
    """
    for name in names:
        owner, _, leaf = name.rpartition(".")
        linear = model.get_submodule(owner)
        if leaf == "bias" and isinstance(linear, Linear4bit | Linear8bitLt):
            model.set_submodule(owner, TrainedBias(linear))
