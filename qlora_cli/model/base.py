"""The base model and its tokenizer."""

from __future__ import annotations

from typing import Literal

from qlora_cli.part import Part


class BaseModelConfig(Part):
    """Where the base model comes from."""

    path: str
    """Hub id, folder of safetensors, or GGUF file (dequantized when loaded)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; needs a pinned `revision`."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention back end; `auto` takes sdpa where the model has it."""
