"""Full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_cli.adapters.weight_edits import WeightEdits
    from qlora_cli.models.weight_names import WeightNames


class FullFineTune(AdapterMethod):
    """Every weight is trained."""

    type: Literal["full"] = "full"
    trains_base: ClassVar[bool] = True
    trains_all: ClassVar[bool] = True
    no_quantization: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("nf4", "fp4", "int8"), "quantized weights have no gradient"
    )

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make every weight trainable, in float32: bfloat16 loses small updates."""
        model.float().requires_grad_(True)
        return model

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the weights as an ordinary model folder."""
        from transformers import GenerationConfig

        if not model.can_generate():
            model.save_pretrained(folder)
            return
        settings = model.generation_config
        # transformers refuses to save some settings that it has loaded. The run writes them itself.
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = settings

    def load(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Replace the base's weights by saved ones. `model` is changed in place.

        Raises:
            ModelError: they cannot be read, or belong to another model.
        """
        import torch

        from qlora_cli.adapters.saved_tensors import mismatch
        from qlora_cli.common.untrusted_files import refuse_foreign, refuse_no_safetensors

        refuse_foreign(folder)
        refuse_no_safetensors(folder, str(folder))
        kind: Any = type(self.attach(model))
        try:
            # The files themselves may split a tensor of the model into several.
            saved, found = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        # Inconsistent settings raise any kind of error, wherever they are first used.
        except Exception as error:
            raise ModelError(f"{folder} does not fit the base model: {error}") from error
        missing = {*found["missing_keys"], *map(str, found["mismatched_keys"])}
        if missing or found["unexpected_keys"]:
            raise mismatch(folder, missing=missing, unexpected=found["unexpected_keys"])
        model.load_state_dict(saved.state_dict())
        return model

    def weight_edits(
        self, skeleton: PreTrainedModel, names: WeightNames, folder: Path
    ) -> WeightEdits:
        """Return the changes to the base: every weight is replaced."""
        from qlora_cli.adapters.weight_edits import ReplacedWeights

        return ReplacedWeights(skeleton, folder)
