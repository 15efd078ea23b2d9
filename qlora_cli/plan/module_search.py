"""Find the modules that an adapter has to leave out on a base that refuses it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_cli.adapters.peft_base import incompatible_module
from qlora_cli.errors import ModelError
from qlora_cli.plan.miniature_run import (
    RefusedMiniature,
    UncheckedModel,
    dry_run_miniature,
)
from qlora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger("qlora")

_MAX_KINDS = 24
"""Kinds of modules that are tried one by one, at most."""
_MAX_ROUNDS = 4
"""Sets of suspects that are left out one after the other, at most."""


def with_way_out(
    refusal: ModelError, recipe: Recipe, config: PretrainedConfig, folder: Path
) -> ModelError:
    """Return the refusal with a hint that was tried, if the adapter can leave modules out.

    Args:
        refusal: why the recipe cannot be trained, saved, loaded or merged.
        config: that of the real base.
        folder: where temporary files may lie.
    """
    excluded = _excluded(recipe)
    if excluded is None or (isinstance(refusal, RefusedMiniature) and refusal.names_way_out):
        return refusal
    search = _Search(recipe, config, folder, excluded)
    names, reason = search.follow(refusal)
    if not names:
        names, reason = search.try_each_kind()
    if names:
        hint = f"{reason}{': ' * bool(reason)}--set adapter.exclude_modules=[{','.join(names)}]"
    elif search.adapted:
        hint = (
            "no choice of modules was found with which it works, among "
            f"{', '.join(search.adapted)}; choose another adapter.type"
        )
    else:
        return refusal
    return ModelError(str(refusal), hint=hint)


def _excluded(recipe: Recipe) -> list[str] | None:
    """Return the modules that the adapter leaves out; None if it cannot name them in a list."""
    settings = recipe.adapter.model_dump(include={"exclude_modules"})
    if not settings or isinstance(settings["exclude_modules"], str):
        return None
    return list(settings["exclude_modules"] or [])


class _Search:
    """Dry runs of a recipe with fewer and fewer modules.

    Args:
        recipe: the recipe that is refused.
        excluded: modules that it leaves out.
    """

    def __init__(
        self, recipe: Recipe, config: PretrainedConfig, folder: Path, excluded: list[str]
    ) -> None:
        self._recipe, self._config, self._folder = recipe, config, folder
        self._excluded = excluded
        self.adapted: list[str] = []
        """Kinds of modules that the recipe adapts."""

    def follow(self, refusal: ModelError) -> tuple[list[str], str]:
        """Leave out what each refusal blames. Returns the modules, and the reason for the last."""
        names, reason = list(self._excluded), ""
        found: ModelError | None = refusal
        for _ in range(_MAX_ROUNDS):
            suspects, reason = self._suspects(found, reason)
            if not set(suspects) - set(names):
                return [], ""
            names = list(dict.fromkeys([*names, *suspects]))
            found = self._refusal_without(names)
            if found is None:
                return names, reason
        return [], ""

    def try_each_kind(self) -> tuple[list[str], str]:
        """Leave out one or all of the kinds of modules that do not work alone."""
        kinds = self.adapted
        if not 1 < len(kinds) <= _MAX_KINDS:
            return [], ""
        log.debug("looking for modules that can be adapted: %s", ", ".join(kinds))
        bad = [
            one
            for one in kinds
            if self._refusal_without([*self._excluded, *(k for k in kinds if k != one)])
        ]
        if len(bad) == len(kinds):
            return [], ""
        for some in (*([one] for one in bad), bad):
            names = [*self._excluded, *some]
            if not self._refusal_without(names):
                return names, f"it fails with {', '.join(some)}"
        return [], ""

    def _suspects(self, refusal: ModelError | None, reason: str) -> tuple[Sequence[str], str]:
        if isinstance(refusal, RefusedMiniature):
            self.adapted = self.adapted or list(refusal.blame.adapted)
            return refusal.blame.suspects, refusal.blame.reason
        module = incompatible_module(str(refusal))
        return ([module], reason) if module else ([], reason)

    def _refusal_without(self, names: Sequence[str]) -> ModelError | None:
        """Return why the recipe is refused without these modules; None if all steps pass."""
        adapter = self._recipe.adapter.model_copy(update={"exclude_modules": list(names)})
        recipe = self._recipe.model_copy(update={"adapter": adapter})
        with (
            torch.random.fork_rng(devices=[]),
            tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as folder,
        ):
            torch.default_generator.manual_seed(0)
            try:
                dry_run_miniature(recipe, self._config, Path(folder))
            except ModelError as error:
                return error
            except UncheckedModel as error:
                return ModelError(str(error))
        return None
