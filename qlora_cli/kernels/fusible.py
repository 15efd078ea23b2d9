"""Which decoder layers `FusedLayer` can replace, and why it cannot replace others."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_cli.kernels.elementwise import LayerConstants
from qlora_cli.kernels.lora_linear import active_adapter_of, base_layer_of

FUSIBLE = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Classes of transformers whose computation `FusedLayer` replaces."""
_SILU = ("SiLUActivation", "SiLU")


def why_not_fused(layer: nn.Module) -> str | None:
    """Return why `FusedLayer` would not compute the same as this layer; None if it would.

    The reason completes the sentence "it is not fused, because ...".
    """
    if type(layer).__name__ not in FUSIBLE:
        return f"{type(layer).__name__} is none of {', '.join(FUSIBLE)}"
    for module in layer.modules():
        if _is_other_adapter(module):
            return f"the adapter adds {type(module).__name__}"
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    linears = [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]
    for linear in linears:
        if reason := _why_not_plain(linear):
            return reason
    if len({_dropout_of(linear) for linear in linears if linear is not base_layer_of(linear)}) > 1:
        return "its adapters have different dropout"
    ours = {id(weight) for linear in linears for weight in linear.parameters()}
    if any(id(p) not in ours for p in layer.parameters() if p.requires_grad):
        return "weights other than those of LoRA are trained"
    if type(mlp.act_fn).__name__ not in _SILU:
        return f"its activation is {type(mlp.act_fn).__name__}"
    if attention.attention_dropout != 0:
        return f"the model's attention_dropout is {attention.attention_dropout}"
    if len({base_layer_of(linear).weight.device for linear in linears}) > 1:
        return "its weights are on several devices"
    return None


def fusible_constants(model: nn.Module) -> LayerConstants | None:
    """Return the constants of the first layer that `FusedLayer` can replace, if any."""
    for layer in model.modules():
        if why_not_fused(layer) is None:
            return _constants_of(layer)
    return None


def _constants_of(layer: Any) -> LayerConstants:
    attention, mlp = layer.self_attn, layer.mlp
    size = attention.head_dim
    gate = base_layer_of(mlp.gate_proj)
    heads, kv_heads = (
        base_layer_of(linear).out_features // size
        for linear in (attention.q_proj, attention.k_proj)
    )
    return LayerConstants(
        hidden=gate.in_features,
        feed_forward=gate.out_features,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        eps=layer.input_layernorm.variance_epsilon,
        scale=attention.scaling,
    )


def _is_other_adapter(module: nn.Module) -> bool:
    """Return whether this module belongs to an adapter other than LoRA on a linear layer."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
    from peft.tuners.lora.bnb import Linear8bitLt as LoraLinear8bit
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and not isinstance(
        module, LoraLinear | LoraLinear4bit | LoraLinear8bit
    )


def _dropout_of(linear: Any) -> float:
    """Return the rate of dropout of an adapter, also in evaluation mode."""
    return float(getattr(linear.lora_dropout[active_adapter_of(linear)], "p", 0.0))


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p < 1)


def _why_not_plain(linear: Any) -> str | None:
    """Return None for a 4, 16 or 32-bit linear layer, bare or with one plain LoRA update."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    base = base_layer_of(linear)
    if isinstance(base, Linear8bitLt):
        return "the base is in 8 bit"
    if type(base) not in (nn.Linear, Linear4bit):
        return f"it has a {type(base).__name__}"
    if any(weight.requires_grad for weight in base.parameters()):
        return "the weights of the base are trained"
    if base is linear:
        return None
    if len(linear.active_adapters) != 1:
        return "several adapters are active"
    name = active_adapter_of(linear)
    dropout = linear.lora_dropout[name]
    reasons = {
        "the adapter is a variant of LoRA, such as DoRA": bool(linear.lora_variant),
        "the adapter has biases": bool(linear.lora_bias[name]),
        f"the adapter has {type(dropout).__name__}": not _is_dropout(dropout),
        "its weights are stored transposed": bool(linear.fan_in_fan_out),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
