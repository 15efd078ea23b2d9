"""Dimensions of well-known models, so that `qlora plan` works without a network.

They are copied from the size settings of each model's `config.json`. All variants of a model (base,
instruct) share one entry.
"""

from __future__ import annotations

from typing import Any


def _sizes(
    hidden: int, feed: int, layers: int, heads: int, kv: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


def _config(kind: str, *sizes: int, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **_sizes(*sizes), **more}


_TIED = {"tie_word_embeddings": True}

KNOWN: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": _config("llama", 4096, 11008, 32, 32, 32, 32000),
    "huggyllama/llama-13b": _config("llama", 5120, 13824, 40, 40, 40, 32000),
    "huggyllama/llama-30b": _config("llama", 6656, 17920, 60, 52, 52, 32000),
    "huggyllama/llama-65b": _config("llama", 8192, 22016, 80, 64, 64, 32000),
    "meta-llama/Llama-2-7b-hf": _config("llama", 4096, 11008, 32, 32, 32, 32000),
    "meta-llama/Llama-2-13b-hf": _config("llama", 5120, 13824, 40, 40, 40, 32000),
    "meta-llama/Llama-2-70b-hf": _config("llama", 8192, 28672, 80, 64, 8, 32000),
    "meta-llama/Meta-Llama-3-8B": _config("llama", 4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Meta-Llama-3-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256),
    "meta-llama/Llama-3.1-8B": _config("llama", 4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Llama-3.1-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256),
    "meta-llama/Llama-3.1-405B": _config("llama", 16384, 53248, 126, 128, 8, 128256),
    "meta-llama/Llama-3.2-1B": _config("llama", 2048, 8192, 16, 32, 8, 128256, **_TIED),
    "meta-llama/Llama-3.2-3B": _config(
        "llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **_TIED
    ),
    "meta-llama/Llama-3.3-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256),
    "TinyLlama/TinyLlama-1.1B": _config("llama", 2048, 5632, 22, 32, 4, 32000),
    "HuggingFaceTB/SmolLM2-135M": _config("llama", 576, 1536, 30, 9, 3, 49152, **_TIED),
    "HuggingFaceTB/SmolLM2-360M": _config("llama", 960, 2560, 32, 15, 5, 49152, **_TIED),
    "HuggingFaceTB/SmolLM2-1.7B": _config("llama", 2048, 8192, 24, 32, 32, 49152, **_TIED),
    "HuggingFaceTB/SmolLM3-3B": _config("smollm3", 2048, 11008, 36, 16, 4, 128256, **_TIED),
    "mistralai/Mistral-7B-v0.1": _config(
        "mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096
    ),
    "mistralai/Mistral-7B-v0.3": _config(
        "mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None
    ),
    "mistralai/Mistral-Nemo-2407": _config(
        "mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128, sliding_window=None
    ),
    "mistralai/Mistral-Small-24B-2501": _config(
        "mistral", 5120, 32768, 40, 32, 8, 131072, head_dim=128, sliding_window=None
    ),
    "mistralai/Mixtral-8x7B-v0.1": _config(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "mistralai/Mixtral-8x22B-v0.1": _config(
        "mixtral", 6144, 16384, 56, 48, 8, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "Qwen/Qwen2.5-0.5B": _config("qwen2", 896, 4864, 24, 14, 2, 151936, **_TIED),
    "Qwen/Qwen2.5-1.5B": _config("qwen2", 1536, 8960, 28, 12, 2, 151936, **_TIED),
    "Qwen/Qwen2.5-3B": _config("qwen2", 2048, 11008, 36, 16, 2, 151936, **_TIED),
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-14B": _config("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "Qwen/Qwen2.5-32B": _config("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "Qwen/Qwen2.5-72B": _config("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "Qwen/Qwen3-0.6B": _config("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-1.7B": _config("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-4B": _config("qwen3", 2560, 9728, 36, 32, 8, 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-8B": _config("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "Qwen/Qwen3-14B": _config("qwen3", 5120, 17408, 40, 40, 8, 151936, head_dim=128),
    "Qwen/Qwen3-32B": _config("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128),
    "Qwen/Qwen3-30B-A3B": _config(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936,
        head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    ),
    "google/gemma-2-2b": _config("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256, **_TIED),
    "google/gemma-2-9b": _config("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, **_TIED),
    "google/gemma-2-27b": _config("gemma2", 4608, 36864, 46, 32, 16, 256000, head_dim=128, **_TIED),
    "google/gemma-3-1b": _config(
        "gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512, **_TIED
    ),
    "google/gemma-3-4b": _config(
        "gemma3_text", 2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024, **_TIED
    ),
    "google/gemma-3-12b": _config(
        "gemma3_text", 3840, 15360, 48, 16, 8, 262208, head_dim=256, sliding_window=1024, **_TIED
    ),
    "google/gemma-3-27b": _config(
        "gemma3_text", 5376, 21504, 62, 32, 16, 262208, head_dim=128, sliding_window=1024, **_TIED
    ),
    "microsoft/phi-2": _config(
        "phi", 2560, 10240, 32, 32, 32, 51200, partial_rotary_factor=0.4
    ),
    "microsoft/Phi-3-mini-4k": _config("phi3", 3072, 8192, 32, 32, 32, 32064, sliding_window=2047),
    "microsoft/phi-4": _config("phi3", 5120, 17920, 40, 40, 10, 100352, sliding_window=None),
    "allenai/OLMo-2-0425-1B": _config("olmo2", 2048, 8192, 16, 16, 16, 100352),
    "allenai/OLMo-2-1124-7B": _config("olmo2", 4096, 11008, 32, 32, 32, 100352),
    "allenai/OLMo-2-1124-13B": _config("olmo2", 5120, 13824, 40, 40, 40, 100352),
    "openai/gpt-oss-20b": _config(
        "gpt_oss", 2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32
    ),
    "openai/gpt-oss-120b": _config(
        "gpt_oss", 2880, 2880, 36, 64, 8, 201088, head_dim=64, num_local_experts=128
    ),
}  # fmt: skip
"""Hub id without a suffix for the variant -> settings of its config."""

_ENDINGS = ("-instruct", "-chat", "-base", "-it", "-pt", "-hf")


def find_known(path: str) -> tuple[str, dict[str, Any]] | None:
    """Find a model by its hub id, whatever its variant.

    Returns:
        Its name in the table and its settings, or None if it is not in the table.
    """
    by_name = {_bare(name): name for name in KNOWN}
    name = by_name.get(_bare(path))
    return None if name is None else (name, KNOWN[name])


def _bare(name: str) -> str:
    """Return the name in lower case, without its owner and without a suffix for the variant."""
    name = name.lower().removeprefix("unsloth/").removeprefix("nousresearch/")
    name = name.rpartition("/")[2]
    for ending in _ENDINGS * 2:
        name = name.replace(ending, "")
    return name.replace("meta-", "")
