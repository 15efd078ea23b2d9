"""Where rows come from: local files and hub data sets."""

from qlora_cli.data.sources.rows import BadRows, LocatedRow, first_lines
from qlora_cli.data.sources.source import Portion, Source

__all__ = ["BadRows", "LocatedRow", "Portion", "Source", "first_lines"]
