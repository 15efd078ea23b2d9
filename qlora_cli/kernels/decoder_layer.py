"""A Llama-style decoder layer as one autograd function with its own backward pass.

Autograd would record some forty operations, each with its own pass over memory and its own saved
tensors. Here matmuls of one input are merged (queries, keys and values; gate and up), element-wise
work is fused, each document attends only to itself, and the code chooses what it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_cli.kernels.attention import Attention, AttentionOutput, DocumentBoundaries
from qlora_cli.kernels.dropout import SeededDropout, draw_dropouts
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.kernels.fusible import why_not_fused
from qlora_cli.kernels.kept_factors import Factors, factors_of
from qlora_cli.kernels.lora_linear import (
    Projection,
    ProjectionPass,
    base_layer_of,
    unscaled_gradients,
)
from qlora_cli.kernels.rope import HeadTransform, choose_head_transform
from qlora_cli.kernels.shared_prefix import attend_shared, attend_shared_backward

Recompute = Literal["none", "mlp", "all"]
"""Recomputed in the backward pass: element-wise work only, the feed-forward half, or all."""


class FusedLayer(nn.Module):
    """A drop-in replacement for a decoder layer, with the same children and checkpoint names.

    Padding-free batches (`Batch.documents`) take the fused path. Everything else (evaluation,
    generation, padded rows; without varlen attention also documents longer than a
    sliding window) is computed by the original layer. If it trains that way with any recomputation,
    the whole layer is checkpointed.
    """

    def __init__(
        self, layer: nn.Module, recompute: Recompute, ops: Elementwise, attention: Attention
    ) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self._plain = (layer,)  # in a tuple, so that torch does not register its children twice
        self._parts = _LayerModules.of(layer, ops, attention)
        self._recompute = recompute
        self.train(layer.training)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """(1, T, D) -> (1, T, D), with transformers' arguments."""
        lengths = options.get("documents")
        if lengths is None or not self._parts.can_compute(lengths):
            return self._forward_plain(hidden_states, options)
        cos, sin = (part[0] for part in options["position_embeddings"])
        documents = DocumentBoundaries(lengths, options["cu_seq_lens_q"], options.get("shared"))
        trained = [weight for each in self._parts.projections for weight in each.trained()]
        # All tensors inside have their final dtype already. Compiled functions also depend on the
        # state of autocast, which is off in the backward pass.
        states = hidden_states.squeeze(0)  # the gradient of an index is copied into zeros
        with torch.autocast(hidden_states.device.type, enabled=False):
            # torch does not type `apply`.
            output: Tensor = _Layer.apply(  # type: ignore[no-untyped-call]  # torch is not typed here
                states, cos, sin, documents, self._parts, self._recompute, *trained
            )
        return output[None]

    def _forward_plain(self, hidden_states: Tensor, options: dict[str, Any]) -> Tensor:
        plain: Any = self._plain[0]
        if self._recompute == "none" or not (self.training and torch.is_grad_enabled()):
            output: Tensor = plain(hidden_states, **options)
            return output
        # Inside its tuple the layer is out of reach of transformers' own checkpointing.
        recomputed: Tensor = checkpoint(plain, hidden_states, use_reentrant=False, **options)
        return recomputed


def fuse_layers(
    model: nn.Module, recompute: Recompute, ops: Elementwise, attention: Attention
) -> int:
    """Replace the decoder layers that can be fused, and return their number.

    Args:
        model: the model with its adapter attached.
    """
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if why_not_fused(layer) is None
    ]
    for parent, name, layer in found:
        setattr(parent, name, FusedLayer(layer, recompute, ops, attention))
    return len(found)


def _window(attention: Any) -> int | None:
    """Return the sliding window: Qwen's layers have their own, Mistral's use the model's."""
    own = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(own, "sliding_window", None)
    return window


@dataclass(frozen=True)
class _LayerModules:
    """The modules and sizes of a decoder layer, by their role in the computation."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norms: tuple[Any, Any]
    heads: int
    """Query heads."""
    kv_heads: int
    scale: float
    head_transform: HeadTransform
    attention: Attention
    ops: Elementwise

    @classmethod
    def of(cls, layer: Any, ops: Elementwise, attention: Attention) -> _LayerModules:
        attn, mlp = layer.self_attn, layer.mlp
        size = attn.head_dim
        heads, kv_heads = (
            base_layer_of(linear).out_features // size for linear in (attn.q_proj, attn.k_proj)
        )
        return cls(
            qkv=Projection.merging([attn.q_proj, attn.k_proj, attn.v_proj]),
            out=Projection([attn.o_proj]),
            gate_up=Projection.merging([mlp.gate_proj, mlp.up_proj]),
            down=Projection([mlp.down_proj]),
            norms=(layer.input_layernorm, layer.post_attention_layernorm),
            heads=heads,
            kv_heads=kv_heads,
            scale=attn.scaling,
            head_transform=choose_head_transform(attn, (heads, kv_heads), ops),
            attention=attention.for_heads(size, _window(attn)),
            ops=ops,
        )

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        return self.qkv, self.out, self.gate_up, self.down

    def can_compute(self, lengths: Sequence[int]) -> bool:
        """Return whether the fused path covers these documents.

        Attention has to cover them, and every LoRA update has to be active: PEFT can disable or
        merge them.
        """
        adapted = [linear for each in self.projections for linear in each.adapted]
        is_changed = any(each.disable_adapters or each.merged for each in adapted)
        return self.attention.covers(lengths) and not is_changed


@dataclass
class _SavedAttention:
    """Tensors of the attention half that the backward pass needs."""

    norm_factor: Tensor  # (T, 1)
    low_qkv: Tensor | None  # (T, R)
    qk: Tensor  # (T, H + K, E), as `HeadTransform.forward` returns it to be saved
    v: Tensor  # (T, K, E)
    attended: AttentionOutput
    low_out: Tensor | None  # (T, R)


@dataclass
class _SavedMlp:
    """Tensors of the feed-forward half that the backward pass needs."""

    low_gate_up: Tensor | None  # (T, R)
    gate_up: Tensor  # (T, 2 I)
    low_down: Tensor | None  # (T, R)


@dataclass
class _SavedLayer:
    """Tensors that a layer saves for its backward pass, in addition to its input."""

    attention: _SavedAttention
    middle: Tensor  # (T, D), between attention and feed-forward
    norm_factor: Tensor  # (T, 1) of the norm before the feed-forward half
    mlp: _SavedMlp | None


@dataclass(frozen=True)
class _Positions:
    """Positions and documents of the tokens of a micro-batch."""

    cos: Tensor  # (T, E)
    sin: Tensor  # (T, E)
    documents: DocumentBoundaries


class _LayerComputation:
    """Forward and backward of one layer on one micro-batch, with LoRA factors in its dtype."""

    def __init__(
        self,
        modules: _LayerModules,
        factors: Factors,
        dropouts: Sequence[SeededDropout | None],
        dtype: torch.dtype,
        positions: _Positions,
    ) -> None:
        self.modules, self.ops, self.positions = modules, modules.ops, positions
        self.qkv, self.out, self.gate_up, self.down = (
            ProjectionPass(linears, factor, dtype, dropout)
            for linears, factor, dropout in zip(modules.projections, factors, dropouts, strict=True)
        )

    def attention(self, hidden: Tensor) -> tuple[Tensor, _SavedAttention]:
        """Compute the attention update of `hidden` (T, D), and what its backward pass needs."""
        modules, positions, norm = self.modules, self.positions, self.modules.norms[0]
        normed, norm_factor = self.ops.rms_norm(hidden, norm.weight, norm.variance_epsilon)
        qkv, low_qkv = self.qkv.forward(normed)  # (T, (H + 2 K) E)
        states = qkv.unflatten(1, (modules.heads + 2 * modules.kv_heads, -1))  # (T, H + 2 K, E)
        qk, v = states[:, : -modules.kv_heads], states[:, -modules.kv_heads :]
        transformed, qk, v = modules.head_transform.forward(qk, v, positions.cos, positions.sin)
        q, k = transformed[:, : modules.heads], transformed[:, modules.heads :]
        attended = attend_shared(modules.attention, (q, k, v), positions.documents, modules.scale)
        update, low_out = self.out.forward(attended.output.flatten(1))
        return update, _SavedAttention(norm_factor, low_qkv, qk, v, attended, low_out)

    def attention_backward(
        self, grad: Tensor, hidden: Tensor, saved: _SavedAttention, *, needs_input_grad: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Compute the gradients of `hidden` (T, D), if needed, and of the LoRA weights."""
        norm = self.modules.norms[0]
        output = saved.attended.output  # (T, H, E)
        grad_low = self.out.backward_low(grad)
        out_grads = self.out.backward_update(grad, grad_low, output.flatten(1), saved.low_out)
        grad_output = self.out.backward_input(grad, grad_low)
        grad_qkv = self.qkv_backward(grad_output.view_as(output), saved)
        normed = self.ops.apply_rms_norm(hidden, saved.norm_factor, norm.weight)
        grad_low = self.qkv.backward_low(grad_qkv)
        qkv_grads = self.qkv.backward_update(grad_qkv, grad_low, normed, saved.low_qkv)
        if not needs_input_grad:
            return None, qkv_grads + out_grads
        grad_normed = self.qkv.backward_input(grad_qkv, grad_low)
        return (
            self.ops.rms_norm_backward(grad_normed, hidden, saved.norm_factor, norm.weight, grad),
            qkv_grads + out_grads,
        )

    def qkv_backward(self, grad: Tensor, saved: _SavedAttention) -> Tensor:
        """Compute the gradient of the qkv matmul (T, (H + 2 K) E) from attention's (T, H, E)."""
        modules, positions = self.modules, self.positions
        transform, cos, sin = modules.head_transform, positions.cos, positions.sin
        transformed = transform.recompute(saved.qk, cos, sin)  # (T, H + K, E)
        qkv = transformed[:, : modules.heads], transformed[:, modules.heads :], saved.v
        grad_q, grad_k, grad_v = attend_shared_backward(
            modules.attention,
            grad,
            qkv,
            saved.attended,
            positions.documents,
            modules.scale,
            self.ops,
        )
        grad_qk = torch.cat([grad_q, grad_k], 1)
        grad_qk = transform.backward(grad_qk, saved.qk, cos, sin)
        return torch.cat([grad_qk, grad_v], 1).flatten(1)

    def recompute(self, hidden: Tensor) -> _SavedLayer:
        """Compute again what the backward pass needs, without the feed-forward half."""
        norm = self.modules.norms[1]
        update, attention = self.attention(hidden)
        middle, _, norm_factor = self.ops.add_rms_norm(
            hidden, update, norm.weight, norm.variance_epsilon
        )
        return _SavedLayer(attention, middle, norm_factor, None)

    def mlp(self, normed: Tensor) -> tuple[Tensor, _SavedMlp]:
        """Compute the feed-forward update from the normed states (T, D)."""
        gate_up, low_gate_up = self.gate_up.forward(normed)  # (T, 2 I)
        update, low_down = self.down.forward(self.ops.swiglu(gate_up))
        return update, _SavedMlp(low_gate_up, gate_up, low_down)

    def mlp_backward(self, grad: Tensor, saved: _SavedLayer) -> tuple[Tensor, list[Tensor]]:
        """Compute the gradients of `saved.middle` (T, D) and of the LoRA weights.

        This is the peak of a layer, so each wide tensor is freed after its last use; `saved.mlp`
        is taken away.
        """
        norm = self.modules.norms[1]
        hidden, norm_factor, mlp, saved.mlp = saved.middle, saved.norm_factor, saved.mlp, None
        normed = self.ops.apply_rms_norm(hidden, norm_factor, norm.weight)
        if mlp is None:
            gate_up, low_gate_up = self.gate_up.forward(normed)
            low_down = None
        else:
            gate_up, low_gate_up, low_down = mlp.gate_up, mlp.low_gate_up, mlp.low_down
        grad_low = self.down.backward_low(grad)
        grad_activated = self.down.backward_input(grad, grad_low)
        grad_gate_up, activated = self.ops.swiglu_backward(grad_activated, gate_up)
        del gate_up, grad_activated, mlp
        low_down = self.down.low(activated) if low_down is None else low_down
        down_grads = self.down.backward_update(grad, grad_low, activated, low_down)
        del activated
        grad_low = self.gate_up.backward_low(grad_gate_up)
        gate_up_grads = self.gate_up.backward_update(grad_gate_up, grad_low, normed, low_gate_up)
        del normed
        grad_normed = self.gate_up.backward_input(grad_gate_up, grad_low)
        del grad_gate_up
        return (
            self.ops.rms_norm_backward(grad_normed, hidden, norm_factor, norm.weight, grad),
            gate_up_grads + down_grads,
        )


class _Layer(torch.autograd.Function):
    """(T, D) -> (T, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: DocumentBoundaries,
        modules: _LayerModules,
        recompute: Recompute,
        *trained: Tensor,
    ) -> Tensor:
        factors = factors_of(modules, modules.projections, trained, hidden.dtype)
        dropouts = draw_dropouts([each.dropout_rate() for each in modules.projections])
        positions = _Positions(cos, sin, documents)
        layer = _LayerComputation(modules, factors, dropouts, hidden.dtype, positions)
        norm, states = modules.norms[1], hidden.detach()
        update, attention = layer.attention(states)
        middle, normed, norm_factor = modules.ops.add_rms_norm(
            states, update, norm.weight, norm.variance_epsilon
        )
        update, mlp = layer.mlp(normed)
        ctx.save_for_backward(hidden, cos, sin)
        ctx.documents, ctx.modules, ctx.factors = documents, modules, factors
        ctx.dropouts, ctx.saved_layer = dropouts, None
        if recompute != "all":
            saved_mlp = mlp if recompute == "none" else None
            ctx.saved_layer = _SavedLayer(attention, middle, norm_factor, saved_mlp)
        return middle + update

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, cos, sin = (tensor.detach() for tensor in ctx.saved_tensors)
        # The loss keeps `ctx` alive until the end of the step.
        saved, factors, ctx.saved_layer, ctx.factors = ctx.saved_layer, ctx.factors, None, None
        positions = _Positions(cos, sin, ctx.documents)
        layer = _LayerComputation(ctx.modules, factors, ctx.dropouts, hidden.dtype, positions)
        if saved is None:
            saved = layer.recompute(hidden)
        grad_middle, mlp_grads = layer.mlp_backward(grad, saved)
        grad_hidden, attention_grads = layer.attention_backward(
            grad_middle, hidden, saved.attention, needs_input_grad=ctx.needs_input_grad[0]
        )
        scales = [scale for each in factors for scale in each.scales]
        grads = unscaled_gradients([*attention_grads, *mlp_grads], scales)
        return grad_hidden, None, None, None, None, None, *grads
