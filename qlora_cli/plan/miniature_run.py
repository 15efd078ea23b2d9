"""Dry-run an adapter on a miniature of a base: forward, backward, save, load and merge."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.data.batching.collate import full_batch
from qlora_cli.errors import ModelError, QloraError
from qlora_cli.export.merge import plan_merge
from qlora_cli.export.merge_shards import UnmappedWeights
from qlora_cli.kernels.cross_entropy import cross_entropy
from qlora_cli.models.base import load_model
from qlora_cli.models.heads import model_from_config
from qlora_cli.models.miniature import MAX_LAYERS, shrink_config
from qlora_cli.objectives.base import same
from qlora_cli.objectives.settings import ObjectiveSettings
from qlora_cli.plan.trace.meta_model import build_meta_model
from qlora_cli.plan.traced_memory import names_layers
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROW = 12
"""Tokens of the row."""
_VOCABULARY = 512
"""Tokens of the miniature, if the adapter names none beyond them."""
_MANY_LAYERS = 40
"""Layers of the miniature, at most, if the adapter names layers."""
_MAX_WEIGHTS = 20_000_000
"""Weights of the miniature. Some architectures have tables that no setting makes small."""
_MAX_ERROR = 1e-3
"""Largest difference of a logit after load and after merge, relative to the largest logit."""
_PLAIN: dict[str, Any] = {"dtype": torch.float32}


class UncheckedModel(Exception):
    """The miniature cannot be built or saved, or fails without the adapter: nothing is proved."""


class UnattachedMiniature(UncheckedModel):
    """The adapter cannot be put into the miniature. Its sizes or those of the base may be why."""


class RefusedMiniature(ModelError):
    """The miniature works alone, and a step with the adapter fails.

    Args:
        message: the step, and how it fails.
        blame: the modules that it may depend on.
        hint: the way out that the error itself names; the default is that of `blame`.
    """

    def __init__(self, message: str, blame: Blame, hint: str | None = None) -> None:
        super().__init__(message, hint or blame.hint)
        self.blame = blame
        self.names_way_out = hint is not None


@dataclass(frozen=True)
class Blame:
    """The modules that a failing step may depend on."""

    adapter: AdapterMethod
    adapted: tuple[str, ...]
    """Kinds of modules that have an adapter, by the last part of their names."""
    suspects: tuple[str, ...] = ()
    """Modules to leave out."""
    reason: str = ""
    """The fault of these modules."""

    @property
    def hint(self) -> str:
        """Say which setting chooses other weights; which ones work has to be tried."""
        if "exclude_modules" not in type(self.adapter).model_fields:
            return "choose another adapter.type, such as lora"
        return (
            "leave modules out with adapter.exclude_modules, or name others in "
            "adapter.target_modules"
        )


def dry_run_miniature(recipe: Recipe, config: PretrainedConfig, folder: Path) -> list[str]:
    """Take a row through forward, backward, save, load and merge. Returns the steps taken.

    Args:
        config: that of the real base.
        folder: an empty folder for the files of the miniature.

    Raises:
        RefusedMiniature: the base works alone, and a step with the adapter does not.
        UncheckedModel: the base does not work alone, or the adapter does not fit the miniature.
    """
    adapter, kind = recipe.adapter, str(config.model_type)
    head = recipe.objective.head
    subject = f"adapter.type ({adapter.type}) on {kind}"
    base = folder / "base"
    ids = torch.arange(1, _ROW + 1)[None]
    if recipe.model.trust_remote_code and getattr(config, "auto_map", None):
        raise UncheckedModel("its code comes with the model")
    try:
        model = _build_miniature(recipe, config, base)
        plain = _logits(model, ids)
        if not torch.equal(_logits(model, ids), plain) or not plain.isfinite().all():
            raise ValueError("its logits are not the same twice")
        again = load_model(base, head, **_PLAIN).requires_grad_(False)
        if not _difference(_logits(again, ids), plain) <= _MAX_ERROR:
            raise ValueError("its logits change when it is saved and loaded")
    # A shrunk config may break any model, and says nothing about the base.
    except Exception as error:
        raise UncheckedModel(_said(error)) from error
    try:
        adapted = adapter.attach(model)
    # The caller attaches the adapter to the whole base, and reports what fails there.
    except Exception as error:
        raise UnattachedMiniature(_said(error)) from error
    blame = Blame(adapter, _adapted_kinds(adapted))
    with _refusing(f"{subject}: training fails", blame, adapted):
        objective = recipe.objective.build(adapted, torch.float32, cross_entropy).train()
        batch = _batch(recipe.objective, ids)
        [prepared] = objective.prepare([batch], torch.device("cpu"), same)
        objective(prepared)[0].backward()
    if uncalled := _uncalled_layers(adapted):
        reason = f"the model does not call {', '.join(uncalled)} in training"
        blame = replace(blame, suspects=tuple(uncalled), reason=reason)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # many begin at zero, which would merge to nothing
                parameter += 0.05 * torch.randn_like(parameter)
    trained, saved = _logits(adapted, ids), folder / "saved"
    saved.mkdir()
    with _refusing(f"{subject}: saving fails", blame):
        adapter.save(adapted, saved)
    with _refusing(f"{subject}: what is saved cannot be loaded", blame):
        again = adapter.load(again, saved)
    if lost := _lost_layers(adapted, again):
        reason = f"the weights of {', '.join(lost)} are not found again"
        blame = replace(blame, suspects=tuple(lost), reason=reason)
    found = _logits(again, ids)
    _require_equal(found, trained, f"{subject}: what is loaded is not what was saved", blame)
    steps = ["forward", "backward", "save", "load"]
    if adapter.no_merge:
        return steps
    merged = folder / "merged"
    with _refusing(f"{subject}: it can be trained, but not merged", blame):
        _merge(recipe, base, saved, merged)
        found = _logits(load_model(merged, head, **_PLAIN), ids)
    _require_equal(found, trained, f"{subject}: the merged model is not the trained one", blame)
    return [*steps, "merge"]


def _batch(objective: ObjectiveSettings, ids: Tensor) -> Batch:
    """Return a batch of one row of the kind that the objective learns from."""
    full = full_batch(
        1,
        ids.shape[1],
        padding_free=False,
        link=objective.link_size,
        values=objective.example_values,
    )
    same_ids = ids.expand_as(full.input_ids).clone()
    labels = torch.where(full.labels == IGNORE_INDEX, full.labels, same_ids)
    return replace(full, input_ids=same_ids, labels=labels)


def _build_miniature(recipe: Recipe, config: PretrainedConfig, folder: Path) -> Any:
    """Write a miniature of the base with random weights, and load it."""
    tokens = recipe.adapter.model_dump(include={"trainable_token_indices"})
    named = [*tokens.get("trainable_token_indices", ()), 0]
    layers = _MANY_LAYERS if names_layers(recipe) else MAX_LAYERS
    if "last_layers" in type(recipe.adapter).model_fields:
        last = recipe.adapter.model_dump()["last_layers"]
        layers = MAX_LAYERS if last <= 2 else max(MAX_LAYERS + 1, last)
    vocab_size = max(_VOCABULARY, 1 + max(named))
    small = shrink_config(config, vocab_size=vocab_size, max_layers=layers)
    head = recipe.objective.head
    size = sum(
        parameter.numel() for parameter in build_meta_model(small, torch.float32, head).parameters()
    )
    if size > _MAX_WEIGHTS:
        raise ValueError(f"its miniature has {size:,} weights")
    model = model_from_config(small, head, dtype=torch.float32)
    model.save_pretrained(folder)
    return model.requires_grad_(False)


def _merge(recipe: Recipe, base: Path, saved: Path, folder: Path) -> None:
    plan = plan_merge(recipe.adapter, base, saved, _PLAIN, recipe.objective.head)
    folder.mkdir()
    plan.verify(folder, plan.write(folder))
    for file in base.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    if plan.untied:
        config = (folder / "config.json").read_text("utf-8")
        (folder / "config.json").write_text(
            config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'), "utf-8"
        )


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) of a model in evaluation mode."""
    was_training = model.training
    model.eval()
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    return logits


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of two logits, relative to the largest one."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def _require_equal(found: Tensor, wanted: Tensor, message: str, blame: Blame) -> None:
    error = _difference(found, wanted)
    if not error <= _MAX_ERROR:  # NaN too
        raise RefusedMiniature(
            f"{message}: on a miniature of the base, logits differ by {error:.1e} of their range",
            blame,
        )


@contextmanager
def _refusing(message: str, blame: Blame, model: nn.Module | None = None) -> Iterator[None]:
    """Turn any error of a step that works without the adapter into a refusal.

    Args:
        model: base and adapter, to name the layer that fails.
    """
    try:
        yield
    # What PEFT and the model do with each other fails in any way.
    except Exception as error:
        layer = "" if model is None else _failing_layer(model, error)
        if layer:
            message = f"{message} in {layer}"
            blame = replace(blame, suspects=(layer.rpartition(".")[2],))
        if isinstance(error, UnmappedWeights):
            modules = {name.rpartition(".")[0].rpartition(".")[2] for name in error.names}
            blame = replace(blame, suspects=tuple(sorted(modules)))
        raise RefusedMiniature(
            f"{message}: {_said(error)} (found on a miniature of the base)",
            blame,
            error.hint if isinstance(error, QloraError) else None,
        ) from error


def _adapted_kinds(model: nn.Module) -> tuple[str, ...]:
    """Name the kinds of layers that PEFT has adapted."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [name for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)]
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def _failing_layer(model: nn.Module, error: Exception) -> str:
    """Name the layer of PEFT's in whose forward an error was raised; empty if there is none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    owners = [frame.f_locals.get("self") for frame in frames]
    layers = [owner for owner in owners if isinstance(owner, BaseTunerLayer)]
    names = [name for name, module in model.named_modules() if layers and module is layers[-1]]
    return names[0].removeprefix("base_model.model.") if names else ""


def _said(error: Exception) -> str:
    """Return the first line of an error's message, after its kind if it is not one of ours."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, QloraError) else f"{type(error).__name__}: {lines[0]}"


def _uncalled_layers(model: nn.Module) -> list[str]:
    """Name the layers of PEFT's that get no gradient: the model uses their weights by itself.

    Training ignores their update, but a merge would add it to the weights (`dt_proj` of Mamba).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    has_gradient: dict[str, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            leaf = name.rpartition(".")[2]
            trained = [one for one in module.parameters() if one.requires_grad]
            called = not trained or any(one.grad is not None for one in trained)
            has_gradient[leaf] = has_gradient.get(leaf, False) or called
    return sorted(leaf for leaf, called in has_gradient.items() if not called)


def _lost_layers(trained: nn.Module, loaded: nn.Module) -> list[str]:
    """Name the modules (with their parents') whose trained weights are not those loaded."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = dict(loaded.named_parameters())
    lost = set()
    for place, module in trained.named_modules():
        if isinstance(module, BaseTunerLayer):
            for name, weight in module.named_parameters(prefix=place):
                if weight.requires_grad and not torch.equal(weight, found.get(name, weight.new())):
                    lost.add(".".join(place.split(".")[-2:]))
    return sorted(lost)
