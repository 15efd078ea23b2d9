"""The model that a run started from: the reference of its objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_cli.adapters import LoRA
from qlora_cli.adapters.warm_start import load_initial_weights
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.adapter_folder import AdapterFolder


def start_of(recipe: Recipe, tuned: Any) -> Callable[[], AbstractContextManager[Any]] | None:
    """Return what switches a tuned model to the adapter that `adapter.init_from` names.

    Args:
        tuned: the model with its adapter.

    Returns:
        None if the objective has no reference, or the run started from the bare base.

    Raises:
        RecipeError: there is no adapter at `adapter.init_from` any more.
    """
    adapter = recipe.adapter
    if recipe.reference_mode is None or not isinstance(adapter, LoRA) or adapter.init_from is None:
        return None
    folder = AdapterFolder.find(Path(adapter.init_from)).folder

    @contextmanager
    def as_start() -> Iterator[Any]:
        trained = [weight for weight in tuned.parameters() if weight.requires_grad]
        kept = [weight.detach().clone() for weight in trained]
        load_initial_weights(tuned, folder)
        try:
            yield tuned
        finally:
            with torch.no_grad():
                for weight, before in zip(trained, kept, strict=True):
                    weight.copy_(before)

    return as_start
