"""Evaluation tasks. To add one: a file here, and its class in the union.

A task on rows of the user sees the data; nothing else of the parts.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qlora_cli.tasks.exact_match import ExactMatch
from qlora_cli.tasks.json_match import JsonMatch

TaskConfig = Annotated[ExactMatch | JsonMatch, Field(discriminator="type")]
