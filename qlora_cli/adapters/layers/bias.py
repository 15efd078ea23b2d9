"""Train the biases of quantized linear layers."""

from __future__ import annotations

from collections.abc import Iterable

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn


class TrainedBias(nn.Module):
    """A quantized linear layer whose bias is added to the layer's output.

    bitsandbytes rounds a bias in place to the dtype of the input, so a bias that is trained in
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
    """Wrap the quantized layers whose bias is trained, so that bitsandbytes does not round it.

    The biases keep their names. `model` is changed in place.

    Args:
        names: names of the trained weights.
    """
    for name in names:
        owner, _, leaf = name.rpartition(".")
        linear = model.get_submodule(owner)
        if leaf == "bias" and isinstance(linear, Linear4bit | Linear8bitLt):
            model.set_submodule(owner, TrainedBias(linear))
