"""Evaluation tasks. To add one, write a module here and add its class to the union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qlora_cli.tasks.chrf import ChrF
from qlora_cli.tasks.classification import Classification
from qlora_cli.tasks.exact_match import ExactMatch
from qlora_cli.tasks.json_match import JsonMatch
from qlora_cli.tasks.loss import Loss
from qlora_cli.tasks.multiple_choice import MultipleChoice
from qlora_cli.tasks.numeric import Numeric
from qlora_cli.tasks.perplexity import Perplexity
from qlora_cli.tasks.rouge import Rouge

__all__ = [
    "ChrF",
    "Classification",
    "ExactMatch",
    "JsonMatch",
    "Loss",
    "MultipleChoice",
    "Numeric",
    "Perplexity",
    "Rouge",
    "TaskConfig",
]

TaskConfig = Annotated[
    ExactMatch
    | Numeric
    | JsonMatch
    | Rouge
    | ChrF
    | Loss
    | MultipleChoice
    | Classification
    | Perplexity,
    Field(discriminator="type"),
]
