"""A decoder layer of the Llama kind as one function with a backward pass of its own.

What autograd would record of such a layer is some forty operations, each with its own pass over
memory and its own saved tensors. Here products are merged (queries, keys and values share their
input; gate and up theirs), element-wise work is fused, each document attends to itself alone, and
what is kept for the backward pass is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_cli.kernels.attention import Attended, Attention, Documents
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.kernels.lora_linear import Factors, Projection, adapter_of, base_of
from qlora_cli.kernels.rope import Heads, heads_of

Recompute = Literal["none", "mlp", "all"]
"""What is computed again in the backward pass: nothing but element-wise work, the feed-forward
half, or the whole layer."""

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Transformers' classes that compute what `FusedLayer` does."""
_SILU = ("SiLUActivation", "SiLU")


class FusedLayer(nn.Module):
    """Takes the place of a decoder layer, and of its name in checkpoints: it has the same children.

    Training on documents that lie end to end (`Batch.documents`) goes the fused way. Everything
    else (evaluation, generation, padded rows, documents beyond a sliding window) is computed by the
    layer itself; if it is trained so, and anything is to be computed again, the whole layer is.
    """

    def __init__(
        self, layer: nn.Module, recompute: Recompute, ops: Elementwise, attention: Attention
    ) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self._plain = (layer,)  # in a tuple, so that its children are not found twice
        self._parts = _Parts.of(layer, ops, attention)
        self._recompute = recompute
        self.train(layer.training)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """(1, T, D) -> (1, T, D), with transformers' arguments."""
        lengths = options.get("documents")
        if lengths is None or not torch.is_grad_enabled() or not self._parts.can_do(lengths):
            return self._as_it_was(hidden_states, options)
        cos, sin = (part[0] for part in options["position_embeddings"])
        documents = Documents(lengths, options["cu_seq_lens_q"])
        trained = [weight for each in self._parts.projections for weight in each.trained()]
        # Everything inside has its dtype. And functions are compiled for the state of autocast too,
        # which is off in the backward pass.
        with torch.autocast(hidden_states.device.type, enabled=False):
            # torch leaves `apply` without types.
            output: Tensor = _Layer.apply(  # type: ignore[no-untyped-call]
                hidden_states[0], cos, sin, documents, self._parts, self._recompute, *trained
            )
        return output[None]

    def _as_it_was(self, hidden_states: Tensor, options: dict[str, Any]) -> Tensor:
        plain: Any = self._plain[0]
        if self._recompute == "none" or not (self.training and torch.is_grad_enabled()):
            output: Tensor = plain(hidden_states, **options)
            return output
        # Hidden in the tuple, it is not reached by what switches transformers' checkpointing on.
        again: Tensor = checkpoint(plain, hidden_states, use_reentrant=False, **options)
        return again


def fuse_layers(
    model: nn.Module, recompute: Recompute, ops: Elementwise, attention: Attention
) -> int:
    """Replace the decoder layers that can be computed as one function. Returns how many.

    Args:
        model: with its adapters attached.
    """
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if can_fuse(layer)
    ]
    for parent, name, layer in found:
        setattr(parent, name, FusedLayer(layer, recompute, ops, attention))
    return len(found)


def can_fuse(layer: nn.Module) -> bool:
    """Whether `FusedLayer` computes what this layer does."""
    if type(layer).__name__ not in _LAYERS or any(_is_other(one) for one in layer.modules()):
        return False
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    linears = [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]
    ours = {id(weight) for linear in linears if _is_plain(linear) for weight in linear.parameters()}
    return (
        all(_is_plain(linear) for linear in linears)
        and type(mlp.act_fn).__name__ in _SILU
        and attention.attention_dropout == 0
        and all(id(p) in ours for p in layer.parameters() if p.requires_grad)
        and len({base_of(linear).weight.device for linear in linears}) == 1
    )


def _is_other(module: nn.Module) -> bool:
    """Whether a method that is no LoRA of linear layers has put something of its own here."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and not isinstance(
        module, LoraLinear | LoraLinear4bit
    )


def _window(attention: Any) -> int | None:
    """Qwen's layers have their own, Mistral's that of the model."""
    own = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(own, "sliding_window", None)
    return window


def _is_plain(linear: Any) -> bool:
    """A linear layer in 4, 16 or 32 bit, alone or with one ordinary update."""
    from bitsandbytes.nn import Linear4bit

    base = base_of(linear)
    if type(base) not in (nn.Linear, Linear4bit) or any(p.requires_grad for p in base.parameters()):
        return False
    if base is linear:
        return True
    names = linear.active_adapters
    return (
        len(names) == 1
        and not linear.lora_variant
        and not linear.lora_bias[names[0]]
        and isinstance(linear.lora_dropout[adapter_of(linear)], nn.Identity)
        and not linear.fan_in_fan_out
    )


@dataclass(frozen=True)
class _Parts:
    """What a layer is made of, by its part in the computation."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norms: tuple[Any, Any]
    heads: int
    groups: int
    """Heads of keys and values."""
    scale: float
    window: int | None
    """How far back a token sees."""
    turn: Heads
    attention: Attention
    ops: Elementwise

    @classmethod
    def of(cls, layer: Any, ops: Elementwise, attention: Attention) -> _Parts:
        of_layer, mlp = layer.self_attn, layer.mlp
        size = of_layer.head_dim
        heads, groups = (
            base_of(linear).out_features // size for linear in (of_layer.q_proj, of_layer.k_proj)
        )
        return cls(
            qkv=Projection([of_layer.q_proj, of_layer.k_proj, of_layer.v_proj]),
            out=Projection([of_layer.o_proj]),
            gate_up=Projection([mlp.gate_proj, mlp.up_proj]),
            down=Projection([mlp.down_proj]),
            norms=(layer.input_layernorm, layer.post_attention_layernorm),
            heads=heads,
            groups=groups,
            scale=of_layer.scaling,
            window=_window(of_layer),
            turn=heads_of(of_layer, (heads, groups), ops),
            attention=attention.for_heads(size),
            ops=ops,
        )

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        return self.qkv, self.out, self.gate_up, self.down

    def can_do(self, lengths: Sequence[int]) -> bool:
        """Whether all of each document is in sight, and the updates (PEFT can switch them off, or
        merge them) take part."""
        adapted = [linear for each in self.projections for linear in each.adapted]
        is_seen = self.window is None or max(lengths) <= self.window
        return is_seen and not any(each.disable_adapters or each.merged for each in adapted)


@dataclass
class _Attention:
    """The attention half of a layer, as far as the backward pass asks for it."""

    factor: Tensor  # (T, 1) of the norm
    low: Tensor | None  # (T, R) of q, k, v
    qk: Tensor  # (T, H + K, E), as `Heads` keeps them
    v: Tensor  # (T, K, E)
    attended: Attended
    low_out: Tensor | None


@dataclass
class _Mlp:
    """The feed-forward half."""

    low: Tensor | None
    gate_up: Tensor  # (T, 2 I)
    low_down: Tensor | None


@dataclass(frozen=True)
class _Place:
    """Where the tokens of a micro-batch are."""

    cos: Tensor  # (T, E)
    sin: Tensor
    documents: Documents


class _Micro:
    """A layer in one micro-batch: its parts, with the updates in the dtype that is computed in."""

    def __init__(
        self, parts: _Parts, dtype: torch.dtype, trained: Sequence[Tensor], place: _Place
    ) -> None:
        self.parts, self.ops, self.dtype, self.place = parts, parts.ops, dtype, place
        rest = list(trained)
        factors = []
        for each in parts.projections:
            number = 2 * len(each.adapted)
            factors.append(each.factors(rest[:number], dtype))
            rest = rest[number:]
        self.qkv, self.out, self.gate_up, self.down = factors

    def forward(self, factors: Factors, linears: Projection, x: Tensor) -> tuple[Tensor, Any]:
        return factors.forward(x, linears.weight(self.dtype), linears.bias(self.dtype))

    def attention(self, hidden: Tensor) -> tuple[Tensor, _Attention]:
        """What attention adds to `hidden` (T, D)."""
        parts, place, norm = self.parts, self.place, self.parts.norms[0]
        normed, factor = self.ops.rms_norm(hidden, norm.weight, norm.variance_epsilon)
        qkv, low = self.forward(self.qkv, parts.qkv, normed)
        states = qkv.unflatten(1, (parts.heads + 2 * parts.groups, -1))
        qk, v = states[:, : -parts.groups], states[:, -parts.groups :]
        turned, qk, v = parts.turn.forward(qk, v, place.cos, place.sin)
        q, k = turned[:, : parts.heads], turned[:, parts.heads :]
        attended = parts.attention.forward(q, k, v, place.documents, parts.scale)
        update, low_out = self.forward(self.out, parts.out, attended.output.flatten(1))
        return update, _Attention(factor, low, qk, v, attended, low_out)

    def attention_backward(
        self, grad: Tensor, hidden: Tensor, kept: _Attention, *, is_asked: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of `hidden` (if it is asked for), and of the updates of qkv and out."""
        parts, norm = self.parts, self.parts.norms[0]
        output = kept.attended.output
        grad_low = self.out.backward_low(grad)
        of_out = self.out.backward_update(grad, grad_low, output.flatten(1), kept.low_out)
        grad_output = self.out.backward_input(grad, grad_low, parts.out.weight(self.dtype))
        grad_qkv = self.qkv_backward(grad_output.view_as(output), kept)
        normed = self.ops.rms_norm_again(hidden, kept.factor, norm.weight)
        grad_low = self.qkv.backward_low(grad_qkv)
        of_qkv = self.qkv.backward_update(grad_qkv, grad_low, normed, kept.low)
        if not is_asked:
            return None, of_qkv + of_out
        grad_normed = self.qkv.backward_input(grad_qkv, grad_low, parts.qkv.weight(self.dtype))
        return (
            self.ops.rms_norm_backward(grad_normed, hidden, kept.factor, norm.weight, grad),
            of_qkv + of_out,
        )

    def qkv_backward(self, grad: Tensor, kept: _Attention) -> Tensor:
        """Gradient of the product of queries, keys and values, from that of attention (T, H, E)."""
        parts, place = self.parts, self.place
        turned = parts.turn.again(kept.qk, place.cos, place.sin)
        grad_q, grad_k, grad_v = parts.attention.backward(
            grad,
            *(turned[:, : parts.heads], turned[:, parts.heads :], kept.v),
            kept.attended,
            place.documents,
            parts.scale,
            self.ops,
        )
        grad_qk = torch.cat([grad_q, grad_k], 1)
        grad_qk = parts.turn.backward(grad_qk, kept.qk, place.cos, place.sin)
        return torch.cat([grad_qk, grad_v], 1).flatten(1)

    def mlp(self, normed: Tensor) -> tuple[Tensor, _Mlp]:
        """What the feed-forward part adds, from the normed states (T, D)."""
        gate_up, low = self.forward(self.gate_up, self.parts.gate_up, normed)
        update, low_down = self.forward(self.down, self.parts.down, self.ops.swiglu(gate_up))
        return update, _Mlp(low, gate_up, low_down)

    def mlp_backward(
        self, grad: Tensor, hidden: Tensor, factor: Tensor, kept: _Mlp | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of `hidden` (T, D), before the norm, and of the updates."""
        parts, norm = self.parts, self.parts.norms[1]
        normed = self.ops.rms_norm_again(hidden, factor, norm.weight)
        if kept is None:
            gate_up, low = self.forward(self.gate_up, parts.gate_up, normed)
            kept = _Mlp(low, gate_up, None)
        grad_low = self.down.backward_low(grad)
        grad_activated = self.down.backward_input(grad, grad_low, parts.down.weight(self.dtype))
        grad_gate_up, activated = self.ops.swiglu_backward(grad_activated, kept.gate_up)
        low_down = self.down.low(activated) if kept.low_down is None else kept.low_down
        of_down = self.down.backward_update(grad, grad_low, activated, low_down)
        grad_low = self.gate_up.backward_low(grad_gate_up)
        of_gate_up = self.gate_up.backward_update(grad_gate_up, grad_low, normed, kept.low)
        weight = parts.gate_up.weight(self.dtype)
        grad_normed = self.gate_up.backward_input(grad_gate_up, grad_low, weight)
        return (
            self.ops.rms_norm_backward(grad_normed, hidden, factor, norm.weight, grad),
            of_gate_up + of_down,
        )


@dataclass
class _Kept:
    """What a layer holds from its forward to its backward pass, beside its input."""

    attention: _Attention
    middle: Tensor  # (T, D), between the halves
    factor: Tensor  # (T, 1) of the norm there
    mlp: _Mlp | None


class _Layer(torch.autograd.Function):
    """(T, D) -> (T, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents,
        parts: _Parts,
        recompute: Recompute,
        *trained: Tensor,
    ) -> Tensor:
        micro = _Micro(parts, hidden.dtype, trained, _Place(cos, sin, documents))
        norm, states = parts.norms[1], hidden.detach()
        update, attention = micro.attention(states)
        middle, normed, factor = parts.ops.add_rms_norm(
            states, update, norm.weight, norm.variance_epsilon
        )
        update, mlp = micro.mlp(normed)
        ctx.save_for_backward(hidden, cos, sin, *trained)
        ctx.documents, ctx.parts, ctx.kept = documents, parts, None
        if recompute != "all":
            ctx.kept = _Kept(attention, middle, factor, mlp if recompute == "none" else None)
        return middle + update

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, cos, sin, *trained = (saved.detach() for saved in ctx.saved_tensors)
        parts, kept, ctx.kept = ctx.parts, ctx.kept, None
        micro = _Micro(parts, hidden.dtype, trained, _Place(cos, sin, ctx.documents))
        if kept is None:
            norm = parts.norms[1]
            update, attention = micro.attention(hidden)
            middle, _, factor = parts.ops.add_rms_norm(
                hidden, update, norm.weight, norm.variance_epsilon
            )
            kept = _Kept(attention, middle, factor, None)
        grad_middle, of_mlp = micro.mlp_backward(grad, kept.middle, kept.factor, kept.mlp)
        kept.mlp = None  # the largest tensors of a layer: not held through what follows
        grad_hidden, of_attention = micro.attention_backward(
            grad_middle, hidden, kept.attention, is_asked=ctx.needs_input_grad[0]
        )
        return grad_hidden, None, None, None, None, None, *of_attention, *of_mlp
