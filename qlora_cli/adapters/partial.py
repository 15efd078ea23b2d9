"""Some of the base's own weights are trained, and nothing is added to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.full import key_mismatch
from qlora_cli.common.untrusted_files import refuse_foreign
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qlora_cli.adapters.weight_edits import WeightEdits
    from qlora_cli.models.weight_names import WeightNames

TRAINED = "trained_weights.safetensors"
"""The file with the weights that were trained, under their names in the model."""


class _Partial(AdapterMethod):
    """Trains the weights that `chosen` names, in float32, and saves them alone."""

    trains_base: ClassVar[bool] = True

    def chosen(self, model: PreTrainedModel) -> list[str]:
        """Names of the weights that are trained, those of tied ones among them."""
        raise NotImplementedError

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make the chosen weights trainable, in float32: bfloat16 loses updates below its grid.

        Raises:
            ModelError: there are none, or they are quantized.
        """
        return self._train(model, self.chosen(model))

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write what is trained, and the model's config."""
        import torch
        from safetensors.torch import save_file

        trained = {
            # Tied weights have two names and one storage, which safetensors does not take.
            name: weight.detach().clone(memory_format=torch.contiguous_format)
            for name, weight in _weights(model).items()
            if weight.requires_grad
        }
        save_file(trained, folder / TRAINED, metadata={"format": "pt"})

    def weight_edits(
        self, skeleton: PreTrainedModel, names: WeightNames, folder: Path
    ) -> WeightEdits:
        """What a saved training changed in the base (`skeleton`: on the meta device)."""
        from qlora_cli.adapters.weight_edits import FullModelEdits

        refuse_foreign(folder)
        return FullModelEdits(skeleton, folder / TRAINED)

    def load(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Put saved weights in place of the base's. `model` itself is changed.

        Raises:
            ModelError: they cannot be read, or are of another model.
        """
        saved = _read(folder)
        weights = _weights(model)
        wrong = {
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in saved.items()
            if name not in weights or weights[name].shape != tensor.shape
        }
        if wrong:
            raise ModelError(key_mismatch(folder, set(), wrong))
        self._train(model, saved)
        for name, weight in _weights(model).items():
            if name in saved:
                weight.data.copy_(saved[name])
        return model

    def _train(self, model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
        from qlora_cli.adapters.layers.bias import keep_biases_unrounded

        weights, wanted = _weights(model), set(names)
        if held := sorted(name for name in wanted if not weights[name].is_floating_point()):
            raise ModelError(
                f"adapter.type ({self.type}) cannot train {held[0]}: quantized weights have no "
                "gradient",
                hint="--set quantization.type=none, or choose weights that stay unquantized: "
                "norms, biases, embedding and head",
            )
        model.requires_grad_(False)
        for name in wanted:
            weights[name].data = weights[name].data.float()
            weights[name].requires_grad_(True)
        keep_biases_unrounded(model, wanted)
        return model


class Freeze(_Partial):
    """All is frozen but the last layers, or what is named; no weight is added (as in Lee et al.
    2019, https://arxiv.org/abs/1911.03090)."""

    type: Literal["freeze"] = "freeze"
    last_layers: int = Field(2, ge=0)
    """Layers, counted from the head, all of whose weights are trained."""
    patterns: list[str] = Field([])
    """Regular expressions: weights in whose names one is found are trained too, such as `norm` or
    `lm_head`."""

    def chosen(self, model: PreTrainedModel) -> list[str]:
        """The weights of the last layers, and those that a pattern is found in."""
        number = model.config.get_text_config(decoder=True).num_hidden_layers
        if self.last_layers > number:
            raise ModelError(
                f"adapter.last_layers ({self.last_layers}): the model has {number} layers"
            )
        names = [*_weights(model)]
        last = rf"\.(layers|h|blocks)\.({'|'.join(map(str, range(number)[-self.last_layers :]))})\."
        found = [n for n in names if re.search(last, n)] if self.last_layers else []
        if self.last_layers and not found:
            raise ModelError(
                "adapter.last_layers: the layers of this model have no numbers that are known",
                hint="--set adapter.last_layers=0, and name the weights in adapter.patterns",
            )
        for pattern in self.patterns:
            found += _found(pattern, names)
        if not found:
            raise ModelError(
                "adapter: nothing would be trained", hint="give adapter.last_layers or patterns"
            )
        return found


class BitFit(_Partial):
    """The biases alone are trained (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199)."""

    type: Literal["bitfit"] = "bitfit"

    def chosen(self, model: PreTrainedModel) -> list[str]:
        """Every bias."""
        names = [name for name in _weights(model) if name.rpartition(".")[2] == "bias"]
        if not names:
            raise ModelError(
                "adapter.type (bitfit) trains biases, and this model has none",
                hint="adapter.type freeze with patterns [norm] trains what comes next to them; "
                "Qwen2, GPT-2 and OPT have biases",
            )
        return names


def _weights(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """All weights, tied ones by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _found(pattern: str, names: list[str]) -> list[str]:
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ModelError(f"adapter.patterns: {pattern!r} is no regular expression: {error}") from (
            error
        )
    if not found:
        kinds = sorted({name.split(".")[-2] for name in names})
        raise ModelError(
            f"adapter.patterns: {pattern!r} is found in no weight's name; the model has "
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
