"""Data: sources -> rows -> messages -> examples -> batches. The section `data` of a recipe."""

from __future__ import annotations

from pydantic import Field

from qlora_cli.data.sources import Source
from qlora_cli.part import Part


class Data(Part):
    """What is learnt, and what it is measured on."""

    train: Source
    """Rows to learn from."""
    evaluation: Source | None = None
    """Rows held out, never learnt from."""
    max_length: int = Field(1024, ge=8)
    """Tokens per row; what is longer is cut at the end."""
    max_lost: float = Field(0.05, ge=0, le=1)
    """Share of rows that may be dropped because cutting left nothing to learn; above it, stop."""
    chat_template: str | None = None
    """Jinja file to use in place of the tokenizer's own chat template."""
