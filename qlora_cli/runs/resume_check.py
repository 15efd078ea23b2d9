"""Compare a run with its record: is resuming or repeating it still the same run?"""

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

# These may change when a run is resumed: durations, intervals, and what only reports.
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
"""Exceptions from `_FREE`: a checkpoint records the best value so far."""

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
"""Keys that `--allow` accepts: the state of the run stays valid with another value. Paths are among
them because weights, tokenizer, template and rows are compared by content."""

_NAMES = {
    "base": "the weights of model.path",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "training_rows": "the rows of data.train",
    "evaluation_rows": "the rows of data.evaluation",
}

Changes = dict[str, list[Any]]
"""Differences: name -> [old, new]."""


def take_fingerprint(
    base: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    training: PreparedData,
    held_out: PreparedData | None,
) -> dict[str, str | None]:
    """Digests of everything that a run reads, independent of its location.

    Args:
        base: the identity of the base model, from `identify`.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "base": base["digest"],
        "tokenizer": hash_text(tokenizer.backend_tokenizer.to_str() + json.dumps(special)),
        "chat_template": hash_text(json.dumps(tokenizer.chat_template)),
        "training_rows": training.rows_digest,
        "evaluation_rows": None if held_out is None else held_out.rows_digest,
    }


def refuse_unsafe(allow: Sequence[str]) -> None:
    """Raise RecipeError if a key of `--allow` cannot be allowed."""
    for key in allow:
        if not any(fnmatchcase(key, safe) or safe == f"{key}.*" for safe in SAFE):
            raise RecipeError(
                f"--allow: {key} cannot be allowed: another value would make this a different "
                f"run; allowed are {', '.join(SAFE)}",
                hint="change it back, or start a new run in another output.dir",
            )


def refuse_changes(
    run: RunFolder, recipe: Recipe, now: Mapping[str, str | None], allow: Sequence[str] = ()
) -> Changes:
    """Refuse to resume a run with other data or settings; return the changes that are allowed.

    Args:
        now: the current fingerprint.
        allow: keys of the recipe that `--allow` lets change.

    Raises:
        RecipeError: with every other change, old -> new.
    """
    record = run.read_record()
    before = recorded_recipe(run)
    changes = compare(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    bound = {key: pair for key, pair in changes.items() if _is_bound(key)}
    refused = {key: pair for key, pair in bound.items() if not _is_allowed(key, allow)}
    others = compare_fingerprints(record, now)
    if refused or others:
        could = [key for key in refused if any(fnmatchcase(key, safe) for safe in SAFE)]
        options = " ".join(f"--allow {key}" for key in could)
        hint = "change it back, or start a new run in another output.dir"
        if could and not others and len(could) == len(refused):
            hint += f"; {options} resumes with the new values"
        lines = [f"{key}: {old} -> {new}" for key, (old, new) in {**refused, **others}.items()]
        raise RecipeError(
            "\n".join(["--resume: this differs from the start of the run", *lines]), hint=hint
        )
    for key, (old, new) in bound.items():
        log.warning("--allow %s: %s -> %s from now on", key, old, new)
    return {**changes, **_warn_of_environment(record)}


def compare_fingerprints(record: Mapping[str, Any], now: Mapping[str, str | None]) -> Changes:
    """Compare a recorded fingerprint with the current one; digests are shortened."""
    known = record["fingerprint"]
    return {
        _NAMES[name]: [_short(known[name]), _short(value)]
        for name, value in now.items()
        if known[name] != value
    }


def compare_environments(record: Mapping[str, Any]) -> Changes:
    """Compare the recorded versions and hardware with the current ones."""
    now = environment()
    return compare({name: record.get(name) for name in now}, now)


def compare(old: object, new: object) -> Changes:
    """Compare two JSON values by dotted path."""
    before, after = _flat(old), _flat(new)
    return {
        key: [before.get(key), after.get(key)]
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    }


def _warn_of_environment(record: Mapping[str, Any]) -> Changes:
    changes = compare_environments(record)
    changes.pop("commit", None)  # the user's own files have been compared already
    if changes:
        listed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())
        log.warning("changed since the start of the run: %s; last digits may differ", listed)
    return changes


def recorded_recipe(run: RunFolder) -> Recipe:
    """The recipe in run.json; recipe.yaml may have been edited since.

    Raises:
        RecipeError: another version of qlora wrote the record, without a recipe or with other keys.
    """
    record = run.read_record()
    try:
        return Recipe.model_validate(record["recipe"])
    except (KeyError, ValidationError) as error:
        raise RecipeError(
            f"{run.record}: the run was started by another version of qlora, whose record cannot "
            f"be compared ({type(error).__name__}: {str(error).splitlines()[0]})",
            hint="use the version that it names (packages.qlora), or start a new run",
        ) from error


def _is_bound(key: str) -> bool:
    return not key.startswith(_FREE) or key in _BOUND


def _is_allowed(key: str, allow: Sequence[str]) -> bool:
    return any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in allow)


def _flat(value: object, path: str = "") -> dict[str, Any]:
    """Values by dotted path; sections in a list have an index."""
    if isinstance(value, dict):
        prefix = f"{path}." if path else ""
        return {k: v for key, item in value.items() for k, v in _flat(item, prefix + key).items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
        return {k: v for at, item in items for k, v in _flat(item, f"{path}[{at}]").items()}
    return {path: value}


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
