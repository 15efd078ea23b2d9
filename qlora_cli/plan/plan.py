"""Plan a run: trace its steps without weights, and report the memory and time that it needs."""

from __future__ import annotations

import time
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters import LoRA
from qlora_cli.distributed.devices import find_target
from qlora_cli.models.context import read_context
from qlora_cli.plan.estimate import estimate
from qlora_cli.plan.rows import assume_rows
from qlora_cli.plan.shrink_to_fit import resolve_micro_batch_size, shrink_to_fit
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.without_effect import settings_without_effect

METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"type": "full"}, "quantization": {"type": "none"}},
    "LoRA": {"quantization": {"type": "none"}},
    "8-bit LoRA": {"quantization": {"type": "int8"}},
    "QLoRA": {"quantization": {"type": "nf4"}},
    "bottleneck": {"adapter": {"type": "bottleneck"}, "quantization": {"type": "none"}},
}
LENGTHS = (512, 1024, 2048, 4096)


def plan_table(recipe: Recipe, *, device: str = "cuda") -> dict[str, Any]:
    """Compare the memory of training methods for one model, at several row lengths.

    Returns:
        {"methods": {method: {length: {"tensors", "low", "high", "verdict"}}}}, sizes in bytes.

    Raises:
        QloraError: a subclass for each kind of error, with its exit code.
    """
    quiet_libraries()
    target = find_target(device)
    config, source = recipe.model.read_config()
    document = recipe.model_dump(mode="json")
    # Learning rates of groups do not change memory, and match nothing in full training.
    document["optimizer"] |= {"groups": [], "lora_plus_ratio": None}
    if recipe.training.micro_batch_size == "auto":
        document["training"]["micro_batch_size"] = 1
    if not isinstance(recipe.adapter, LoRA):
        document["adapter"] = {"type": "lora"}
    methods: dict[str, dict[int, dict[str, Any]]] = {}
    for method, sections in METHODS.items():
        for length in LENGTHS:
            data = {**document["data"], "max_length": length}
            one = Recipe.model_validate({**document, **sections, "data": data})
            rows = assume_rows(one, "a table", padding_free=not one.adapter.no_packing)
            report = estimate(one, config, target, rows)
            methods.setdefault(method, {})[length] = {
                "tensors": report["peak"]["bytes"],
                **report["process"],
                "verdict": report["fits"]["verdict"],
            }
    return {
        "model": {"path": recipe.model.path, "dimensions": source},
        "device": {"name": target.name, "bytes": target.memory_bytes},
        "methods": methods,
    }


def plan(
    recipe: Recipe, *, device: str = "cuda", gpus: int = 1, fit: bool = False
) -> dict[str, Any]:
    """Plan a recipe. No weights are read and nothing is trained.

    Args:
        device: cpu, cuda, a memory size or the name of a card.
        gpus: number of devices that train together, each holding the whole model.
        fit: if the recipe does not fit, look for the least harmful changes with which it does. The
            report then describes the changed recipe, and lists them under "changes".

    Raises:
        QloraError: a subclass for each kind of error, with its exit code.
    """
    quiet_libraries()
    started = time.monotonic()
    target = find_target(device, gpus)
    config, source = recipe.model.read_config()
    is_auto = recipe.training.micro_batch_size == "auto"
    recipe = resolve_micro_batch_size(recipe, config, target)
    if fit:
        changes, report = shrink_to_fit(recipe, config, target)
        report["changes"] = changes
    else:
        report = estimate(recipe, config, target)
    report["micro_batch"] = {"rows": recipe.training.fixed_micro_batch_size, "is_auto": is_auto}
    report["model"] = {"path": recipe.model.path, "dimensions": source, **report["model"]}
    context = read_context(config.to_dict())
    report["context"] = context and context.length
    report["warnings"] = settings_without_effect(recipe, report["rows"]["steps"])
    report["seconds"] = round(time.monotonic() - started, 1)
    return report
