"""Where rows come from: local files and hub data sets."""

from __future__ import annotations

from pydantic import Field

from qlora_cli.data.formats import FormatConfig, Messages
from qlora_cli.part import Part


class Source(Part):
    """Rows of one kind."""

    path: str
    """File (jsonl, json, csv, parquet, txt), folder of such files, or id of a hub data set."""
    format: FormatConfig = Messages()
    """How a row becomes messages."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows."""
