"""Warm start: initialise a run from an existing adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.adapters import LoRA
from qlora_cli.adapters.files import WEIGHTS
from qlora_cli.adapters.warm_start import load_initial_weights
from qlora_cli.common.atomic_files import describe_file
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.adapter_folder import AdapterFolder

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class WarmStart:
    """The adapter that `adapter.init_from` names."""

    adapter: LoRA
    """The adapter's settings in the new run."""
    place: AdapterFolder

    def load_into(self, model: PeftModel) -> None:
        """Load its weights into the model.

        Raises:
            ModelError: it was trained with other settings, or does not fit tensor for tensor.
        """
        load_initial_weights(model, self.place.folder)

    def record(self) -> dict[str, Any]:
        """Return its name, the digest of its weights and its own parent, for the new record."""
        run = self.place.run
        return {
            "name": (self.place.folder if run is None else run.root).resolve().name,
            "weights": None if run is None else self.place.folder.name,
            "digest": describe_file(self.place.folder / WEIGHTS)["sha256"],
            "parent": None if run is None else run.read_record().get("parent"),
        }


def find_warm_start(recipe: Recipe, base: Mapping[str, str]) -> WarmStart | None:
    """Find the adapter that `adapter.init_from` names; None if the recipe names none.

    Args:
        base: the identity of the recipe's base model.

    Raises:
        RecipeError: there is no adapter at `adapter.init_from`.
        ModelError: it was trained on another base.
    """
    adapter = recipe.adapter
    if not isinstance(adapter, LoRA) or adapter.init_from is None:
        return None
    place = AdapterFolder.find(Path(adapter.init_from))
    place.check_base(recipe, base)
    return WarmStart(adapter, place)
