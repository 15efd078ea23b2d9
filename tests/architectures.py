"""Train, save, load and merge a tiny random model of each architecture of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.models.base import load_model
from qlora_cli.plan.compatibility import check_model
from qlora_cli.plan.miniature_run import (
    UnattachedMiniature,
    UncheckedModel,
    dry_run_miniature,
)
from qlora_cli.plan.module_search import with_way_out
from qlora_cli.recipe.schema import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
TOLERANCE = 1e-4
"""Largest difference of a logit from PEFT's merge in float32, relative to the largest logit."""
RIGHT, REFUSED, WRONG, NOT_TRIED = "right", "refused", "wrong", "not tried"
WITH_IT = "with it:"
"""Comes before the outcome of the recipe that a refusal's hint proposes."""
_INPUT = torch.arange(1, 33)[None]  # (1, T)
_UNSET: dict[str, Any] = {
    "head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_topk": 2,
    "num_experts": 4, "n_group": 1, "topk_group": 1, "intermediate_size": 48,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_attention_heads": 4,
}  # fmt: skip
"""Values for settings that a default config leaves unset although its model needs them."""
_LONGEST = 400
"""Characters of a reason."""


@dataclass(frozen=True)
class Outcome:
    """The result of one architecture, and its reason."""

    result: str
    reason: str = ""


def architectures() -> list[str]:
    """Return the model types that transformers loads as causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(model_type: str, folder: Path) -> Outcome:
    """Train, save, load and merge a miniature, and compare the merge with PEFT's.

    If the refusal names modules to exclude, try again without them.
    """
    try:
        return _follow_hint(model_type, folder)
    # A user would see a traceback.
    except Exception as error:
        return Outcome(WRONG, _said(error))


def _follow_hint(model_type: str, folder: Path) -> Outcome:
    found = _examine(model_type, folder / "0", {})
    named = re.search(r"--set adapter\.exclude_modules=\[([\w.,]+)\]$", found.reason)
    if found.result != REFUSED or named is None:
        return found
    again = _examine(model_type, folder / "1", {"exclude_modules": named[1].split(",")})
    reason = f"{found.reason}; {WITH_IT} {again.result} {again.reason}".rstrip()
    return Outcome(REFUSED if again.result == RIGHT else WRONG, reason)


def _examine(model_type: str, folder: Path, adapter: Mapping[str, Any]) -> Outcome:
    first: Exception | None = None
    for number, unset in enumerate(({}, _UNSET)):
        place = folder / str(number)
        place.mkdir(parents=True)
        recipe = _recipe(place / "config", adapter)
        try:
            config = _config(model_type, unset)
            torch.manual_seed(0)
            dry_run_miniature(recipe, config, place)
            return _compare(place)
        except UnattachedMiniature as error:
            return _refusal(recipe, config, place) or Outcome(NOT_TRIED, _said(error))
        except ModelError as error:
            refusal = with_way_out(error, recipe, config, place)
            return Outcome(REFUSED, _plain(refusal).replace(f"{place}/", ""))
        # Default configs of transformers fail in any way.
        except Exception as error:
            first = first or error
    assert first is not None
    return Outcome(NOT_TRIED, re.sub(r"/\S*/(?=base)", "", _said(first)))


def _refusal(recipe: Recipe, config: Any, place: Path) -> Outcome | None:
    """Return the refusal of the whole base, if it is the base that the adapter does not fit."""
    config.save_pretrained(place / "config")
    try:
        check_model(recipe)
    except ModelError as error:
        return Outcome(REFUSED, _plain(error))
    return None


def _compare(folder: Path) -> Outcome:
    """Compare the merged model with PEFT's merge of the saved adapter."""
    from peft import PeftModel

    model: Any = load_model(folder / "base", dtype=torch.float32).eval()
    plain = _logits(model)
    adapted: Any = PeftModel.from_pretrained(model, folder / "saved")
    expected = _logits(adapted.merge_and_unload().eval())
    found = _logits(load_model(folder / "merged", dtype=torch.float32).eval())
    size = expected.abs().max()
    error, effect = (float((one - expected).abs().max() / size) for one in (found, plain))
    if not error <= TOLERANCE:
        return Outcome(WRONG, f"logits differ by {error:.0e} of the largest")
    if not effect >= 20 * TOLERANCE:
        return Outcome(WRONG, f"the adapter changes logits by only {effect:.0e} of the largest")
    return Outcome(RIGHT)


def _config(model_type: str, unset: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    values = vars(config.get_text_config(decoder=True))
    values.update({name: value for name, value in unset.items() if values.get(name, 0) is None})
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _recipe(base: Path, adapter: Mapping[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(base)},
            "adapter": {"type": "lora", "r": 4, **adapter},
            "data": {"train": {"path": "rows.jsonl"}, "max_length": 64},
            "output": {"dir": "run"},
        }
    )


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=_INPUT, use_cache=False).logits  # (1, T, V)
    return found.float()


def _said(error: Exception) -> str:
    """Return a reason: one line, without what differs between processes."""
    message = str(error)
    if not isinstance(error, UncheckedModel):
        message = f"{type(error).__name__}: {message}"
    sets = re.compile(r"\{('[^{}]*')\}")  # printed in any order
    text = sets.sub(lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", message)
    text = " ".join(text.split()).replace("|", "/").rstrip(":")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4].rstrip() + " ..."


def _plain(error: ModelError) -> str:
    return _said(UncheckedModel(str(error))) + (f"; {error.hint}" if error.hint else "")


_HEAD = """\
# Architectures

`python scripts/gen_architectures.py` writes this page, with transformers {version}. For each
architecture that `AutoModelForCausalLM` loads, a tiny random model with LoRA on all linear layers is
trained for a step, its adapter is changed at random, saved, loaded and merged, in float32 on a CPU.
These are the steps of `qlora validate --deep`. Tests compare every row with a new result.

| outcome | number | meaning |
|---|---|---|
| right | {right} | The loaded adapter gives the trained logits, and the merged model those of PEFT's `merge_and_unload`, to {tolerance:.0e} of the largest logit. |
| refused | {refused} | `qlora validate --deep`, `plan` and `train` refuse it, with this reason. |
| wrong | {wrong} | A fault: a crash, or a merge that differs from PEFT's. |
| not tried | {not_tried} | The default config of transformers gives no tiny model that runs, for this reason. Nothing is known; a real base can work. |

| architecture | outcome | reason |
|---|---|---|
"""  # noqa: E501  lines of a table


def write(outcomes: Mapping[str, Outcome]) -> str:
    """Return the page."""
    from transformers import __version__

    number = {
        name.replace(" ", "_"): sum(one.result == name for one in outcomes.values())
        for name in (RIGHT, REFUSED, WRONG, NOT_TRIED)
    }
    head = _HEAD.format(version=__version__, tolerance=TOLERANCE, **number)
    rows = (f"| {name} | {one.result} | {one.reason} |" for name, one in outcomes.items())
    return head + "\n".join(rows) + "\n"


@cache
def read() -> dict[str, Outcome]:
    """Return the outcomes that the page lists."""
    table = PAGE.read_text("utf-8").partition("| architecture |")[2].splitlines()[2:]
    rows = ([cell.strip() for cell in line.strip(" |").split("|")] for line in table)
    return {row[0]: Outcome(row[1], row[2] if len(row) > 2 else "") for row in rows}


def version() -> str:
    """Return the version of transformers that the page was written with."""
    found = re.search(r"with transformers ([\d.]+\d)", PAGE.read_text("utf-8"))
    assert found is not None
    return found[1]
