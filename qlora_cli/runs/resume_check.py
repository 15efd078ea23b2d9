"""What a run depends on: whether to go on with it, or to repeat it, is still the same run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qlora_cli.common.hashing import hash_text
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.errors import RecipeError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run_folder import RunFolder, environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

# What may be different when a run is resumed: how long and how often, and what only reports.
_FREE = (
    "training.max_steps",
    "training.epochs",
    "training.log_every",
    "training.eval_every",
    "training.tasks_every",
    "training.patience",
    "training.save_every",
    "training.max_bad_steps",
    "training.stop_after",
    "data.audit.",
    "data.workers",
    "evaluation.",
    "output.",
)
_BOUND = ("evaluation.best_by",)
"""But not this: a checkpoint remembers the best value so far."""

SAFE = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.groups*.learning_rate",
    "optimizer.groups*.weight_decay",
    "schedule.*",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.max_grad_norm",
    "training.spike*",
    "model.path",
    "model.revision",
    "model.attention",
    "data.train*.path",
    "data.train*.revision",
    "data.train*.streaming",
    "data.evaluation*.path",
    "data.evaluation*.revision",
    "data.evaluation*.streaming",
    "data.chat_template",
)
"""What `--allow` takes: the state of the run means the same with another value. Paths are among
them because weights, tokenizer, template and rows are compared by what they hold."""

_NAMES = {
    "base": "the weights of model.path",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "training_rows": "the rows of data.train",
    "evaluation_rows": "the rows of data.evaluation",
}

Changes = dict[str, list[Any]]
"""What differs: name -> [old, new]."""


def take_fingerprint(
    base: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    learnt: PreparedData,
    held_out: PreparedData | None,
) -> dict[str, str | None]:
    """Sums of all that a run reads, wherever it lies.

    Args:
        base: what `identify` says of the base model.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "base": base["digest"],
        "tokenizer": hash_text(tokenizer.backend_tokenizer.to_str() + json.dumps(special)),
        "chat_template": hash_text(json.dumps(tokenizer.chat_template)),
        "training_rows": learnt.rows_digest,
        "evaluation_rows": None if held_out is None else held_out.rows_digest,
    }


def refuse_unsafe(allow: Sequence[str]) -> None:
    """Raises RecipeError if a key of `--allow` cannot be allowed."""
    for key in allow:
        if not any(fnmatchcase(key, safe) or safe == f"{key}.*" for safe in SAFE):
            raise RecipeError(
                f"--allow: {key} cannot be allowed: with another value it would be neither the old "
                f"run nor a new one; what can be is {', '.join(SAFE)}",
                hint="change it back, or start a new run in another output.dir",
            )


def refuse_changes(
    run: RunFolder, recipe: Recipe, now: Mapping[str, str | None], allow: Sequence[str] = ()
) -> Changes:
    """Going on with other data or another recipe would be neither the old run nor a new one.

    Args:
        now: the fingerprint as it would be.
        allow: keys of the recipe that may have another value, by `--allow`.

    Returns:
        What is different and may be.

    Raises:
        RecipeError: with what else changed, old -> new.
    """
    record = run.read_record()
    before = recorded_recipe(run)
    changes = compare(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    bound = {key: pair for key, pair in changes.items() if _is_bound(key)}
    refused = {key: pair for key, pair in bound.items() if not _is_allowed(key, allow)}
    others = compare_fingerprints(record, now)
    if refused or others:
        could = [key for key in refused if any(fnmatchcase(key, safe) for safe in SAFE)]
        way_out = " ".join(f"--allow {key}" for key in could)
        hint = "change it back, or start a new run in another output.dir"
        if could and not others and len(could) == len(refused):
            hint += f"; {way_out} goes on with the new values"
        lines = [f"{key}: {old} -> {new}" for key, (old, new) in {**refused, **others}.items()]
        raise RecipeError("\n".join(["--resume: the run was started otherwise", *lines]), hint=hint)
    for key, (old, new) in bound.items():
        log.warning("--allow %s: %s -> %s from here on", key, old, new)
    return {**changes, **_warn_of_environment(record)}


def compare_fingerprints(record: Mapping[str, Any], now: Mapping[str, str | None]) -> Changes:
    """What a run read and would not read now: in words, with the beginnings of the sums."""
    known = record["fingerprint"]
    return {
        _NAMES[name]: [_short(known[name]), _short(value)]
        for name, value in now.items()
        if known[name] != value
    }


def compare_environments(record: Mapping[str, Any]) -> Changes:
    """Which versions and what of the hardware are not those of a run's record."""
    now = environment()
    return compare({name: record.get(name) for name in now}, now)


def compare(old: object, new: object) -> Changes:
    """What differs between two JSON values, by dotted path."""
    before, after = _flat(old), _flat(new)
    return {
        key: [before.get(key), after.get(key)]
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    }


def _warn_of_environment(record: Mapping[str, Any]) -> Changes:
    changes = compare_environments(record)
    changes.pop("commit", None)  # of the user's own files, which have been compared
    if changes:
        told = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())
        log.warning("not what the run was started with: %s; last digits may differ", told)
    return changes


def recorded_recipe(run: RunFolder) -> Recipe:
    """As it was run: the file beside the record may have been edited since.

    Raises:
        RecipeError: the record is of a version that wrote none, or knew other keys.
    """
    record = run.read_record()
    try:
        return Recipe.model_validate(record["recipe"])
    except (KeyError, ValidationError) as error:
        raise RecipeError(
            f"{run.record}: the run was started by another version of qlora, whose record cannot "
            f"be compared ({type(error).__name__}: {str(error).splitlines()[0]})",
            hint="go on with the version that it names (packages.qlora), or start a new run",
        ) from error


def _is_bound(key: str) -> bool:
    return not key.startswith(_FREE) or key in _BOUND


def _is_allowed(key: str, allow: Sequence[str]) -> bool:
    return any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in allow)


def _flat(value: object, path: str = "") -> dict[str, Any]:
    """The values by their dotted path; sections in a list by their number."""
    if isinstance(value, dict):
        prefix = f"{path}." if path else ""
        return {k: v for key, item in value.items() for k, v in _flat(item, prefix + key).items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
        return {k: v for at, item in items for k, v in _flat(item, f"{path}[{at}]").items()}
    return {path: value}


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
