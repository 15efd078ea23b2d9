"""Sources of rows: local files and Hub datasets."""

from qlora_cli.data.sources.rows import BadRows, LocatedRow, counted, first_lines
from qlora_cli.data.sources.source import Portion, Source

__all__ = ["BadRows", "LocatedRow", "Portion", "Source", "counted", "first_lines"]
