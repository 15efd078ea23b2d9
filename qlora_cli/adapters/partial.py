"""Methods that train some of the base's own weights, and add none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.common.decoder import score_layer
from qlora_cli.common.untrusted_files import refuse_foreign
from qlora_cli.errors import ModelError
from qlora_cli.models.heads import SCORE_WEIGHT, refuse_missing_head

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qlora_cli.adapters.weight_edits import WeightEdits
    from qlora_cli.models.weight_names import WeightNames

TRAINED = "trained_weights.safetensors"
"""The file with the trained weights, under their names in the model."""


class Freeze(AdapterMethod):
    """Everything is frozen except the last layers and weights that a pattern names; no weight is
    added (as in Lee et al. 2019, https://arxiv.org/abs/1911.03090)."""

    trains_base: ClassVar[bool] = True
    type: Literal["freeze"] = "freeze"
    last_layers: int = Field(2, ge=0)
    """Number of layers, counted from the head, that are trained."""
    patterns: list[str] = Field([])
    """Regular expressions, searched for in the names of weights. Weights that match are trained
    too, such as `norm` or `lm_head`."""

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make the chosen weights trainable, in float32: bfloat16 loses small updates.

        Raises:
            ModelError: no weight matches, or a matching one is quantized.
        """
        return _train(model, self._chosen(model), method=self.type)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the trained weights."""
        _save(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Replace weights of the base by saved ones. `model` is changed in place.

        Raises:
            ModelError: they cannot be read, or belong to another model.
        """
        return _load(model, folder, method=self.type)

    def weight_edits(
        self, skeleton: PreTrainedModel, names: WeightNames, folder: Path
    ) -> WeightEdits:
        """Return the changes to the base: the trained weights are replaced."""
        return _weight_edits(skeleton, folder)

    def _chosen(self, model: PreTrainedModel) -> list[str]:
        """Return the names of the weights of the last layers, and of those that match a pattern."""
        number = model.config.get_text_config(decoder=True).num_hidden_layers
        if self.last_layers > number:
            raise ModelError(
                f"adapter.last_layers ({self.last_layers}): the model has {number} layers"
            )
        names = [*_weights(model)]
        last = rf"\.(layers|h|blocks)\.({'|'.join(map(str, range(number)[-self.last_layers :]))})\."
        chosen = [n for n in names if re.search(last, n)] if self.last_layers else []
        if self.last_layers and not chosen:
            raise ModelError(
                "adapter.last_layers: the names of this model's layers have no known number",
                hint="--set adapter.last_layers=0, and name the weights in adapter.patterns",
            )
        for pattern in self.patterns:
            chosen += _matching(pattern, names)
        if not chosen:
            raise ModelError(
                "adapter: nothing would be trained", hint="give adapter.last_layers or patterns"
            )
        return chosen


class BitFit(AdapterMethod):
    """Only the biases are trained (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199)."""

    trains_base: ClassVar[bool] = True
    type: Literal["bitfit"] = "bitfit"

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make every bias trainable, in float32: bfloat16 loses small updates.

        Raises:
            ModelError: the model has no biases.
        """
        names = [name for name in _weights(model) if name.rpartition(".")[2] == "bias"]
        if not names:
            raise ModelError(
                "adapter.type (bitfit) trains biases, and this model has none",
                hint="adapter.type freeze with patterns [norm] is the closest method for it; "
                "Qwen2, GPT-2 and OPT have biases",
            )
        return _train(model, names, method=self.type)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the trained weights."""
        _save(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Replace weights of the base by saved ones. `model` is changed in place.

        Raises:
            ModelError: they cannot be read, or belong to another model.
        """
        return _load(model, folder, method=self.type)

    def weight_edits(
        self, skeleton: PreTrainedModel, names: WeightNames, folder: Path
    ) -> WeightEdits:
        """Return the changes to the base: the trained weights are replaced."""
        return _weight_edits(skeleton, folder)


def _weights(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return all weights by name, a tied weight under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _train(model: PreTrainedModel, names: Iterable[str], *, method: str) -> PreTrainedModel:
    """Make the named weights and a head that scores rows trainable in float32; freeze the others.

    Args:
        method: `adapter.type`, for the message.

    Raises:
        ModelError: one of the weights is quantized.
    """
    from qlora_cli.adapters.layers.bias import keep_biases_unrounded

    weights, wanted = _weights(model), set(names)
    if score_layer(model) is not None:
        wanted.add(SCORE_WEIGHT)
    if quantized := sorted(name for name in wanted if not weights[name].is_floating_point()):
        raise ModelError(
            f"adapter.type ({method}) cannot train {quantized[0]}: quantized weights have no "
            "gradient",
            hint="--set quantization.type=none, or choose weights that stay unquantized: norms, "
            "biases, embedding and head",
        )
    model.requires_grad_(False)
    for name in wanted:
        weights[name].data = weights[name].data.float()
        weights[name].requires_grad_(True)
    keep_biases_unrounded(model, wanted)
    return model


def _save(model: nn.Module, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    trained = {
        # Tied weights have two names and one storage, which safetensors refuses.
        name: weight.detach().clone(memory_format=torch.contiguous_format)
        for name, weight in _weights(model).items()
        if weight.requires_grad
    }
    save_file(trained, folder / TRAINED, metadata={"format": "pt"})


def _load(model: PreTrainedModel, folder: Path, *, method: str) -> PreTrainedModel:
    from qlora_cli.adapters.saved_tensors import mismatch

    saved = _read(folder)
    weights = _weights(model)
    wrong = {
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in saved.items()
        if name not in weights or weights[name].shape != tensor.shape
    }
    if wrong:
        raise mismatch(folder, unexpected=wrong)
    _train(model, saved, method=method)
    for name, weight in _weights(model).items():
        if name in saved:
            weight.data.copy_(saved[name])
    refuse_missing_head(model, folder)
    return model


def _weight_edits(skeleton: PreTrainedModel, folder: Path) -> WeightEdits:
    from qlora_cli.adapters.weight_edits import ReplacedWeights

    refuse_foreign(folder)
    return ReplacedWeights(skeleton, folder / TRAINED)


def _matching(pattern: str, names: list[str]) -> list[str]:
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ModelError(
            f"adapter.patterns: {pattern!r} is not a valid regular expression: {error}"
        ) from error
    if not found:
        kinds = sorted({name.split(".")[-2] for name in names})
        raise ModelError(
            f"adapter.patterns: {pattern!r} matches no weight's name; the model has "
            f"{', '.join(kinds)}"
        )
    return found


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_foreign(folder)
    try:
        return load_file(folder / TRAINED)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder / TRAINED} cannot be read: {error}") from error
