"""Element-wise work of a decoder layer, forward and backward, computed in float32.

`Elementwise.compiled()` returns the same functions through torch.compile, which fuses five to ten
passes over memory into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from qlora_cli.kernels.compiling import CompiledFunction, Function, TokenAxes


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square normalization (Zhang and Sennrich 2019, equation 4), as Llama rounds it.

    Args:
        hidden: (T, D)
        weight: (D,)

    Returns:
        The normed states (T, D) in the dtype of `hidden`, and the float32 factors (T, 1).
    """
    x = hidden.float()
    factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x * factor).to(hidden.dtype), factor


def add_rms_norm(
    hidden: Tensor, update: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `hidden + update`, and `rms_norm` of it."""
    total = hidden + update
    return total, *rms_norm(total, weight, eps)


def apply_rms_norm(hidden: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """Compute the normed states (T, D) from the factors that `rms_norm` returned."""
    return weight * (hidden.float() * factor).to(hidden.dtype)


def rms_norm_backward(
    grad: Tensor, hidden: Tensor, factor: Tensor, weight: Tensor, past: Tensor
) -> Tensor:
    """Compute the gradient of `hidden` (T, D) from the normed states', plus `past`."""
    return (_before_norm(grad, hidden, factor, weight) + past.float()).to(hidden.dtype)


def _before_norm(grad: Tensor, hidden: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of `hidden` in float32 from the normed states' alone."""
    normed = hidden.float() * factor
    grads = grad.float() * weight.float()
    shared = (grads * normed).mean(-1, keepdim=True)
    return (grads - normed * shared) * factor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021, equation 34), with heads halved as in Llama.

    With `-sin` this is its own backward pass.

    Args:
        states: (T, H, E)
        cos: (T, E) with equal halves, like `sin`.
    """
    half = states.shape[-1] // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    x, y = states[..., :half].float(), states[..., half:].float()
    return torch.cat([x * c - y * s, y * c + x * s], -1).to(states.dtype)


def norm_rotate(states: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply `rms_norm` to each head, then `rotate` (Qwen 3).

    Args:
        states: (T, H, E)
        weight: (H, E)
    """
    normed, _ = rms_norm(states, weight, eps)
    return rotate(normed, cos, sin)


def norm_rotate_backward(
    grad: Tensor, states: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """Compute the gradient of `states` (T, H, E) from that of the output of `norm_rotate`."""
    factor = torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + eps)
    return _before_norm(rotate(grad, cos, -sin), states, factor, weight).to(states.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up (Shazeer 2020, equation 6): (T, 2 I) -> (T, I)."""
    gate, up = (half.float() for half in gate_up.chunk(2, -1))
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient of `gate_up` (T, 2 I), and the output of `swiglu` again (T, I)."""
    gate, up = (half.float() for half in gate_up.chunk(2, -1))
    grads = grad.float()
    open_ = torch.sigmoid(gate)
    activated = gate * open_
    gate_grad = grads * up * (open_ + activated * (1 - open_))
    # Round each half before `cat`: the compiler then writes it in place, without a float32 copy.
    halves = [half.to(gate_up.dtype) for half in (gate_grad, grads * activated)]
    return torch.cat(halves, -1), (activated * up).to(gate_up.dtype)


def swiglu_by_blocks(gate_up: Tensor, *, values: int) -> Tensor:
    """Compute `swiglu` some rows at a time, so that few float32 values are alive at once.

    Args:
        values: results per block.
    """
    activated = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows in _blocks(activated, values):
        activated[rows] = swiglu(gate_up[rows])
    return activated


def swiglu_backward_by_blocks(
    grad: Tensor, gate_up: Tensor, *, values: int
) -> tuple[Tensor, Tensor]:
    """Compute `swiglu_backward` some rows at a time, and overwrite `gate_up` and `grad`.

    The float32 intermediates of all rows together would be the peak of a step.
    """
    for rows in _blocks(grad, values):
        gate_up[rows], grad[rows] = swiglu_backward(grad[rows], gate_up[rows])
    return gate_up, grad


def _blocks(states: Tensor, values: int) -> Iterator[slice]:
    step = max(1, values // states.shape[1])
    return (slice(first, first + step) for first in range(0, len(states), step))


def scores_backward(
    scores: Tensor, grad: Tensor, normalizer: Tensor, shared: Tensor, rows: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Recompute the causal softmax of `scores`, and compute their gradient, in `grad`'s dtype.

    Args:
        scores: (K, t, m) in float32, not scaled yet.
        grad: (K, t, m), gradient of the softmax.
        normalizer: (K, t), log-sum-exp of each row.
        shared: (K, t), the term that all scores of a row share in their gradient.
        rows: (t,), the position of each query among the m keys.
    """
    is_seen = torch.arange(scores.shape[-1], device=scores.device) <= rows[:, None]
    # `exp2` and an inline constant: torch 2.13 writes an `exp` that is used twice to memory, and
    # also a result of more than four tensors, as which a named constant counts.
    powers = (scores * scale - normalizer[..., None]) * 1.4426950408889634  # log2(e)
    weights = torch.where(is_seen, torch.exp2(powers), 0.0)
    of_scores = weights * (grad.float() - shared[..., None]) * scale
    return weights.to(grad.dtype), of_scores.to(grad.dtype)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Compute dot products along the last dimension in float32."""
    return (x.float() * y.float()).sum(-1)


_TOKEN_AXES: dict[str, TokenAxes] = {
    "rms_norm": {0: (0,)},
    "add_rms_norm": {0: (0,), 1: (0,)},
    "apply_rms_norm": {0: (0,), 1: (0,)},
    "rms_norm_backward": {0: (0,), 1: (0,), 2: (0,), 4: (0,)},
    "rotate": {0: (0,), 1: (0,), 2: (0,)},
    "norm_rotate": {0: (0,), 3: (0,), 4: (0,)},
    "norm_rotate_backward": {0: (0,), 1: (0,), 4: (0,), 5: (0,)},
    "swiglu": {0: (0,)},
    "swiglu_backward": {0: (0,), 1: (0,)},
    "scores_backward": {0: (1, 2), 1: (1, 2), 2: (1,), 3: (1,), 4: (0,)},
    "dot": {0: (2,), 1: (2,)},
}
"""Axes of the tokens in each function's arguments: T, and for attention t and m."""


@dataclass(frozen=True)
class LayerConstants:
    """Numbers of a decoder layer that are constants of its compiled functions."""

    hidden: int
    """D"""
    feed_forward: int
    """I"""
    heads: int
    """H"""
    kv_heads: int
    """K"""
    head_size: int
    """E"""
    eps: float
    """Added to the mean square in norms."""
    scale: float
    """Factor on the scores of attention."""


@dataclass(frozen=True)
class Elementwise:
    """The functions above, plain or compiled."""

    is_compiled: bool = False

    rms_norm: Callable[..., tuple[Tensor, Tensor]] = rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor, Tensor]] = add_rms_norm
    apply_rms_norm: Callable[..., Tensor] = apply_rms_norm
    rms_norm_backward: Callable[..., Tensor] = rms_norm_backward
    rotate: Callable[..., Tensor] = rotate
    norm_rotate: Callable[..., Tensor] = norm_rotate
    norm_rotate_backward: Callable[..., Tensor] = norm_rotate_backward
    swiglu: Callable[..., Tensor] = swiglu
    swiglu_backward: Callable[..., tuple[Tensor, Tensor]] = swiglu_backward
    """May overwrite its arguments."""
    scores_backward: Callable[..., tuple[Tensor, Tensor]] = scores_backward
    dot: Callable[..., Tensor] = dot

    @classmethod
    def in_blocks(cls, values: int) -> Elementwise:
        """Return the plain functions; the widest ones compute some rows at a time.

        Compiled functions do not need this: they have no intermediates in memory.

        Args:
            values: results per block (`DeviceCapabilities.block_values`).
        """
        return cls(
            swiglu=partial(swiglu_by_blocks, values=values),
            swiglu_backward=partial(swiglu_backward_by_blocks, values=values),
        )

    @classmethod
    def compiled(cls, by: Callable[[Function], Function] | None = None) -> Elementwise:
        """Return the functions through torch.compile, for any number of tokens.

        Each is compiled at its first use, and again for other constants.

        Args:
            by: replacement for torch.compile.
        """
        plain = cls()
        by = by or (lambda function: CompiledFunction(function, _TOKEN_AXES[function.__name__]))
        return cls(
            is_compiled=True,
            **{
                field.name: by(getattr(plain, field.name))
                for field in fields(cls)
                if field.name != "is_compiled"
            },
        )

    def try_out(
        self,
        device: torch.device,
        dtype: torch.dtype,
        constants: LayerConstants,
        *,
        norms_heads: bool = False,
    ) -> dict[str, Tensor]:
        """Run each function once, so that a failure to compile appears here and not in a step.

        Sizes and layouts are those of a small step: compiled code depends on constants and
        strides, and the number of rows decides whether a kernel uses threads.

        Args:
            norms_heads: whether the model normalises heads, so that those functions are compiled.

        Returns:
            All results, by function. They are the same for equal functions.
        """
        generator = torch.Generator(device).manual_seed(0)

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device, dtype=dtype)

        rows, heads, size = 512, constants.heads + constants.kv_heads, constants.head_size
        # Different tensors everywhere: functions are compiled again where two arguments are one.
        x, y, past = (rand(rows, constants.hidden) for _ in range(3))
        # A parameter, as in norms: functions are compiled again for a plain tensor.
        weight = nn.Parameter(rand(constants.hidden), requires_grad=False)
        done: dict[str, Tensor | tuple[Tensor, ...]] = {}
        done["rms_norm"] = _, factor = self.rms_norm(x, weight, constants.eps)
        done["add_rms_norm"] = self.add_rms_norm(x, y, weight, constants.eps)
        done["apply_rms_norm"] = self.apply_rms_norm(x, factor, weight)
        done["rms_norm_backward"] = self.rms_norm_backward(x, y, factor, weight, past)
        angles = rand(rows, size), rand(rows, size)
        # Queries and keys are a view of the wider output of their matmul; gradients are not.
        states, grads = (
            rand(rows, heads + constants.kv_heads, size)[:, :heads],
            rand(rows, heads, size),
        )
        if norms_heads:
            norm = rand(heads, size), constants.eps, *angles
            done["norm_rotate"] = self.norm_rotate(states, *norm)
            done["norm_rotate_backward"] = self.norm_rotate_backward(grads, states, *norm)
        else:
            done["rotate"] = self.rotate(states, *angles)
            done["rotate_backward"] = self.rotate(grads, *angles)
        gate_up = rand(rows, 2 * constants.feed_forward)
        done["swiglu"] = opened = self.swiglu(gate_up)
        done["swiglu_backward"] = self.swiglu_backward(opened.clone(), gate_up.clone())
        if device.type == "cpu":  # elsewhere attention has a backward pass of its own
            done |= self._try_attention(rand, constants, rows)
        return {
            f"{name} ({i})": one
            for name, found in done.items()
            for i, one in enumerate((found,) if isinstance(found, Tensor) else found)
        }

    def _try_attention(
        self, rand: Callable[..., Tensor], constants: LayerConstants, rows: int
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Run the functions of attention's backward pass, for a block of `rows // 4` queries."""
        kv_heads, shared_by = constants.kv_heads, constants.heads // constants.kv_heads
        # (T, H, E) as (K, H / K, T, E)
        states, grads = (
            rand(rows, constants.heads, constants.head_size)
            .unflatten(1, (kv_heads, shared_by))
            .permute(1, 2, 0, 3)
            for _ in range(2)
        )
        # No two sizes are equal, because compiled code may rely on it.
        shape = kv_heads, rows // 4 * shared_by, rows // 2 + 8
        normalizer, shared = (rand(*shape[:2]).float().clone() for _ in range(2))
        places = torch.arange(rows // 4).repeat(shared_by)
        return {
            "dot": self.dot(grads, states),
            "scores_backward": self.scores_backward(
                *(rand(*shape).float(), rand(*shape), normalizer, shared, places),
                constants.scale,
            ),
        }
