"""The head on a base model: the one place that names transformers' class and PEFT's task type.

A sequence classifier is transformers' `...ForSequenceClassification`: the decoder, and a linear
layer `score` that reads the hidden state of the last token of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.decoder import SCORE, score_layer
from qlora_cli.errors import ModelError
from qlora_cli.types import HeadSpec, Problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

SCORE_WEIGHT = f"{SCORE}.weight"

_PROBLEM_TYPES: dict[Problem, str] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""Problem -> transformers' name for it."""


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
SEQUENCE_CLASSIFIER = Head("AutoModelForSequenceClassification", "SEQ_CLS")
"""Scores a whole row."""


def head_kind(head: HeadSpec | None) -> Head:
    """Return the kind of a head; None is the one that predicts tokens."""
    return CAUSAL_LM if head is None else SEQUENCE_CLASSIFIER


def config_settings(head: HeadSpec | None) -> dict[str, Any]:
    """Return the settings of a model's config that describe its head, by transformers' names."""
    if head is None:
        return {}
    return {
        "id2label": dict(enumerate(head.labels)),
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "problem_type": _PROBLEM_TYPES[head.problem],
    }


def set_head(config: PretrainedConfig, head: HeadSpec | None) -> None:
    """Put the settings of a head into a config."""
    for name, value in config_settings(head).items():
        setattr(config, name, value)


def model_from_config(config: PretrainedConfig, head: HeadSpec | None, **options: Any) -> Any:
    """Build a model with a head from its config, without reading weights.

    A head that scores rows is in float32: it is small and trained, and rounding would gain nothing.

    Args:
        config: is changed: it gets the settings of the head.
        options: those of transformers' `from_config`.

    Raises:
        ModelError: transformers has no model of this architecture with the head.
    """
    refuse_without_class(config, head)
    set_head(config, head)
    model = head_kind(head).auto_class().from_config(config, **options)
    if head is not None:
        require_score(model).float()
    return model


def refuse_without_class(config: PretrainedConfig, head: HeadSpec | None) -> None:
    """Raise ModelError if transformers has no sequence classifier of this architecture."""
    if head is None:
        return
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    is_own = SEQUENCE_CLASSIFIER.auto_class_name in getattr(config, "auto_map", {})
    if type(config) not in CLASSES and not is_own:
        raise ModelError(
            f"objective: transformers has no sequence classifier for {config.model_type}, so it "
            "cannot get a head that scores rows",
            hint="choose a base of another architecture, such as Llama, Qwen, Mistral or Gemma",
        )


def require_score(model: PreTrainedModel) -> Any:
    """Return the head of a sequence classifier.

    Raises:
        ModelError: it is not one linear layer that is called `score`.
    """
    from torch import nn

    layer = score_layer(model)
    if type(layer) is nn.Linear and not hasattr(layer.bias, "shape"):
        return layer
    raise ModelError(
        f"objective: the head of {type(model).__name__} is not a plain linear layer without bias "
        f"called {SCORE!r}",
        hint="choose a base of another architecture, such as Llama, Qwen, Mistral or Gemma",
    )


def task_type(model: nn.Module) -> str:
    """Return PEFT's task type for a model."""
    return (CAUSAL_LM if score_layer(model) is None else SEQUENCE_CLASSIFIER).task_type


def add_placeholder(model: PreTrainedModel) -> None:
    """Fill the head with NaN: until it is trained or loaded, whatever it computes is seen."""
    import torch

    torch.nn.init.constant_(require_score(model).weight, float("nan"))


def lacks_head(model: nn.Module) -> bool:
    """Tell if the head of a model is still the placeholder; False for one that predicts tokens.

    Args:
        model: with or without PEFT's wrapper around the head.
    """
    layer = score_layer(model)
    if layer is None:
        return False
    active = [p for name, p in layer.named_parameters() if "original_module" not in name]
    return bool(active[0].isnan().any())


def refuse_missing_head(model: nn.Module, folder: Path) -> None:
    """Raise ModelError if loading a folder has not given the model its head."""
    if lacks_head(model):
        raise ModelError(
            f"{folder} lacks the head ({SCORE_WEIGHT}): it was trained without objective "
            "classify or reward, or the file is incomplete"
        )


def initialize_head(model: PreTrainedModel) -> None:
    """Draw the weights of a head that the base does not have, from torch's global generator."""
    import torch

    if lacks_head(model):
        std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
        torch.nn.init.normal_(require_score(model).weight, std=std)


def read_head(config: Mapping[str, Any]) -> HeadSpec | None:
    """Return the head that a model's config.json describes; None if it predicts tokens."""
    architectures = config.get("architectures") or [""]
    if not str(architectures[0]).endswith("ForSequenceClassification"):
        return None
    names = {int(key): str(label) for key, label in (config.get("id2label") or {}).items()}
    labels = tuple(names[i] for i in sorted(names)) or ("LABEL_0", "LABEL_1")
    known = {name: problem for problem, name in _PROBLEM_TYPES.items()}
    default: Problem = "regression" if len(labels) == 1 else "single"
    return HeadSpec(labels, known.get(config.get("problem_type") or "", default))


def refuse_other_labels(config: Mapping[str, Any], head: HeadSpec, folder: Path) -> None:
    """Raise ModelError if the head in a folder does not mean what the recipe's labels mean.

    A head that was saved without names for its labels fits any labels of the same number.
    """
    found = read_head(config)
    if found is None or found.labels == head.labels:
        return
    is_named = found.labels != tuple(f"LABEL_{i}" for i in range(len(found.labels)))
    if len(found.labels) == len(head.labels) and (not is_named or len(head.labels) == 1):
        return
    raise ModelError(
        f"model.path: the head in {folder} has the labels {', '.join(found.labels)}, and the "
        f"objective {', '.join(head.labels)}",
        hint="give objective.labels the same labels in the same order, or take a base without a "
        "head",
    )
