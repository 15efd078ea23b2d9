"""The changes that training made to the base's weights, without the model in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.errors import ModelError
from qlora_cli.models.heads import model_from_config
from qlora_cli.models.shards import Shards
from qlora_cli.models.weight_names import WeightNames
from qlora_cli.types import HeadSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ReadBase = Callable[[str], "Tensor"]
"""Reads the base's weight of a name (in the model), in float32."""


def build_skeleton(
    folder: Path, head: HeadSpec | None = None, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Build the model of a folder on the meta device: modules and names without values.

    Args:
        head: the head that scores rows; None is the one that predicts tokens.

    Raises:
        ModelError: its config cannot be used.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            skeleton: PreTrainedModel = model_from_config(
                config, head, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except ModelError:
        raise
    # Inconsistent settings raise any kind of error, wherever they are first used.
    except Exception as error:
        raise ModelError(f"model.path: {folder} cannot be read: {error}") from error
    skeleton.tie_weights()
    return skeleton


class WeightEdits(ABC):
    """The base's weights that training changed, with their new values."""

    names: set[str]
    """Weights, by their names in the model, that `apply` may change."""
    shapes: dict[str, tuple[int, ...]]
    """New shapes of weights that have another shape than in the base: the vocabulary has grown."""

    @abstractmethod
    def apply(self, name: str, read: ReadBase) -> Tensor:
        """Return the new value of a weight, in float32."""

    @abstractmethod
    def unused(self) -> set[str]:
        """Return the trained tensors that no call of `apply` has used so far."""


class ReplacedWeights(WeightEdits):
    """Saved weights that replace those of the base: full or partial fine-tuning.

    Args:
        skeleton: the base on the meta device.
        path: a model folder, or a file with some of its weights.
    """

    def __init__(self, skeleton: PreTrainedModel, path: Path) -> None:
        self._saved = Shards(path)
        self._names = WeightNames(skeleton, self._saved.tensors)
        self._used: set[str] = set()
        # A tied weight changes under each of its names.
        self.names = {
            live for live, stored in self._names.in_files.items() if stored in self._saved.tensors
        }
        self.shapes = {
            self._names.in_model[name]: stored.shape for name, stored in self._saved.tensors.items()
        }

    def apply(self, name: str, read: ReadBase) -> Tensor:
        stored = self._names.in_files[name]
        self._used.add(stored)
        return self._saved.read(stored).float()

    def unused(self) -> set[str]:
        return set(self._saved.tensors) - self._used
