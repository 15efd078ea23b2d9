"""Shims for bugs in libraries, each with its reason and the condition for its removal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module


def keep_4bit_weights_trainable(model: Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in an evaluation on a CPU with AVX512-BF16.

    `Linear4bit.forward` in eval mode, on an input without gradient, converts its weight for an
    inference kernel that has no backward, and never converts it back: in the training that follows
    no gradient passes that layer any more, and nothing says so. bitsandbytes 0.50 looks at a public
    attribute of each layer before it does this; we turn it off.

    Goes when `tests/unit/test_compat.py` fails because the gradients agree without it.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def restore_splitting(tokenizer: Any, gguf_file: Path) -> None:
    """Make the tokenizer of a GGUF file split text into words as the file specifies.

    transformers reads the vocabulary but not `tokenizer.ggml.pre`, and splits as GPT-2 does. For
    SmolLM, which takes every digit by itself, other tokens come of spaces before a number.

    Goes when `tests/e2e/test_demo_model.py` finds the right tokens without it.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


def forbid_hub_kernels() -> None:
    """Hide the package `kernels` from all libraries: with it they download code from the Hub.

    Where it is installed, importing bitsandbytes 0.50 on a CPU with AVX512-BF16 downloads
    "kernels-community/quantization-bitsandbytes" and runs what it gets, whatever paths are local.
    No setting prevents this. Remove it when there is one.
    """
    # None makes every import of the package fail; typeshed allows modules only.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def bound_product_caches() -> None:
    """Limit torch's cache of prepared matmuls on a CPU: each entry holds half a megabyte forever.

    A product in bfloat16 of a shape that was not seen before is prepared by oneDNN, and torch and
    oneDNN each keep the last 1,024 of them. Rows have many lengths, so a run would grow by 40 MB
    with each forward until some 600 MB are full. A layer needs no more than this many at a time.

    Goes when torch bounds them by bytes. Must run before the first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KEPT_PRODUCTS)


_KEPT_PRODUCTS = "128"


def avoid_cudnn_attention() -> None:
    """Keep torch from computing scaled dot-product attention by cuDNN.

    On Hopper and Blackwell cards torch 2.13 takes cuDNN before flash attention. Its backward pass
    returns NaN for some lengths with a mask (pytorch#196678), it computes wrong answers with few
    key-value heads (pytorch#193893), and it plans for each new length. A run has many lengths.

    Goes when both are closed, and `attention` in `scripts/gpu_check.py` passes without it.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def set_allocator() -> None:
    """Let torch's allocator on CUDA grow and join its segments.

    Without padding each micro-batch has another length, so a freed block rarely fits the next one.
    torch reads this when CUDA starts. A user's own setting wins.

    Goes when it is torch's default.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def quiet_libraries() -> None:
    """Keep the libraries' progress bars, notices and telemetry out of a clean run.

    Our own code checks and reports what matters (unmatched adapter keys, unquantized weights,
    casts). Must run before transformers is imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    forbid_hub_kernels()
    bound_product_caches()
    set_allocator()
    # Users cannot act on what these libraries log below the level of an error.
    for name in ("transformers", "peft", "accelerate", "datasets", "bitsandbytes", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch|accelerate)\b")

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
