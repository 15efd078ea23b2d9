"""Random models of a few small layers, and their loss and gradients on one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_cli._compat import keep_4bit_weights_trainable
from qlora_cli.kernels.attention import Attention, PerDocumentAttention
from qlora_cli.kernels.cross_entropy import CrossEntropy, cross_entropy
from qlora_cli.kernels.decoder_layer import FusedLayer, Recompute, fuse_layers
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.kernels.peft_lora_layers import lora_layer_classes
from qlora_cli.models.packed_attention import attend_by_document
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.types import Batch

DOCUMENTS = (7, 1, 40, 13)
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 90}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = Elementwise.in_blocks(200)  # a few rows of the tiny layers
BY_DOCUMENT = PerDocumentAttention()


def base(kind: str, folder: Path, dtype: torch.dtype, quantization: str) -> Any:
    """Make a random model and load it from files, because quantization happens on loading."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    configs = {
        "llama": LlamaConfig(**LAYERS, **HEADS),
        # Rows of whole blocks of 64, the block size of the 4-bit types.
        "llama-wide": LlamaConfig(
            **{**LAYERS, "hidden_size": 64, "intermediate_size": 128}, **HEADS
        ),
        "llama-bias-tied": LlamaConfig(
            **LAYERS, **HEADS, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        # Weights whose blocks of statistics are whole, as in real models, so that they are merged.
        "llama-merged": LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            vocab_size=90,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
        ),
        "llama-every-head": LlamaConfig(**LAYERS, num_attention_heads=4, num_key_value_heads=4),
        "mistral": MistralConfig(**LAYERS, **HEADS, sliding_window=None),
        "mistral-window": MistralConfig(**LAYERS, **HEADS, sliding_window=9),
        "qwen2": Qwen2Config(**LAYERS, **HEADS),
        # Its heads are together wider than the model, as in the real ones.
        "qwen3": Qwen3Config(**LAYERS, **HEADS, head_dim=16),
        "qwen3-bias-window": Qwen3Config(
            **LAYERS,
            **HEADS,
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,  # the second layer
        ),
    }
    if not folder.exists():
        torch.manual_seed(0)
        config = configs[kind]
        config.initializer_range = 0.2
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero otherwise, and then it would not matter
                torch.nn.init.normal_(parameter, std=0.2)
            if "q_norm" in name or "k_norm" in name:  # one otherwise
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        model.save_pretrained(folder)
    options: dict[str, Any] = {}
    if quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    keep_4bit_weights_trainable(model)
    attend_by_document(model)
    return model


def adapted(model: Any, *, ours: bool, **changes: Any) -> Any:
    """Attach an adapter whose update is not zero."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    if ours:
        config._register_custom_module(lora_layer_classes(model))
    model = get_peft_model(model, config).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            torch.nn.init.normal_(parameter, std=0.05 if "lora_B" in name else 0.3)
    return model


def batch() -> Batch:
    """Make a batch of concatenated, partly supervised examples."""
    torch.manual_seed(2)
    ids = torch.randint(0, 90, (1, sum(DOCUMENTS)))
    labels = ids.clone()
    labels[0, [0, 7, 8, 48]] = -100
    return Batch(ids, None, labels, DOCUMENTS)


def loss_and_gradients(
    model: Any, dtype: torch.dtype, loss_kernel: CrossEntropy = cross_entropy
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss, and the gradients by name."""
    loss, _ = TokenLoss(model, dtype, loss_kernel)(batch())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest distance of a gradient from its reference, relative to the norm."""
    assert found.keys() == expected.keys()
    assert len(found) > 0
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


def fused(
    model: Any,
    recompute: Recompute = "none",
    ops: Elementwise = PLAIN,
    attention: Attention = BY_DOCUMENT,
) -> Any:
    """Fuse the layers of a model."""
    assert fuse_layers(model, recompute, ops, attention) == 2
    assert sum(isinstance(module, FusedLayer) for module in model.modules()) == 2
    return model
