"""Fine-tune language models from one YAML recipe.

Start reading at `train/train.py`, then `loop/fit.py`.

From Python, `load` opens the result of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.common.version import __version__

if TYPE_CHECKING:
    from qlora_cli.api import Model
    from qlora_cli.runs.run_folder import Weights

__all__ = ["__version__", "load"]


def load(run: str | Path, *, weights: Weights = "last", overrides: Sequence[str] = ()) -> Model:
    """Load the model of a run, to generate text with it or to classify.

    Args:
        run: folder of a run, adapter or model; or a recipe, a GGUF file, a Hub id.
        weights: `last` (after the last step) or `best` (with the best evaluation).
        overrides: `section.key=value`, as with `--set`.

    Raises:
        QloraError: the model cannot be loaded (`qlora_cli.errors`).
    """
    from qlora_cli.api import load_model

    return load_model(str(run), weights=weights, overrides=overrides)
