"""Formats: from a row of a source to a conversation. To add one, write a class and name it below.

A row that does not fit raises DataError with the name of the field; the caller adds file and line.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qlora_cli.data.formats.chat import Messages, ShareGpt
from qlora_cli.data.formats.feedback import Feedback
from qlora_cli.data.formats.flat import Alpaca, PromptCompletion, Text
from qlora_cli.data.formats.labelled import Labelled
from qlora_cli.data.formats.preference import Preference
from qlora_cli.data.formats.template import TemplateFormat

__all__ = [
    "Alpaca",
    "Feedback",
    "FormatConfig",
    "Labelled",
    "Messages",
    "Preference",
    "PromptCompletion",
    "ShareGpt",
    "TemplateFormat",
    "Text",
    "is_verbatim",
]

FormatConfig = Annotated[
    Messages
    | ShareGpt
    | Alpaca
    | PromptCompletion
    | Text
    | TemplateFormat
    | Preference
    | Feedback
    | Labelled,
    Field(discriminator="type"),
]


def is_verbatim(format: FormatConfig) -> bool:
    """Return True if rows of this format have no chat template."""
    return isinstance(format, Text) or (isinstance(format, PromptCompletion) and not format.as_chat)
