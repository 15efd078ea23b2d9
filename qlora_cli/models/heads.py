"""The head on a base model: the one place that names transformers' class and PEFT's task type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of model output."""

    auto_class_name: str
    """The class of transformers that loads models with this head."""
    task_type: str
    """PEFT's name for it."""

    def auto_class(self) -> Any:
        """Return transformers' class, with `from_pretrained` and `from_config`."""
        import transformers

        return getattr(transformers, self.auto_class_name)


CAUSAL_LM = Head("AutoModelForCausalLM", "CAUSAL_LM")
"""Predicts the next token."""
