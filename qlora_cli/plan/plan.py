"""Know before you run: what a recipe takes on a device, traced step by step without any weights."""

from __future__ import annotations

import time
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters import LoRA
from qlora_cli.distributed.devices import find_target
from qlora_cli.plan.estimate import assume_rows, estimate
from qlora_cli.plan.shrink_to_fit import fit_to, resolve_micro_batch_size
from qlora_cli.recipe.schema import Recipe

METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"type": "full"}, "quantization": {"type": "none"}},
    "LoRA": {"quantization": {"type": "none"}},
    "8-bit LoRA": {"quantization": {"type": "int8"}},
    "QLoRA": {"quantization": {"type": "nf4"}},
    "bottleneck": {"adapter": {"type": "bottleneck"}, "quantization": {"type": "none"}},
}
LENGTHS = (512, 1024, 2048, 4096)


def plan_table(recipe: Recipe, *, device: str = "cuda") -> dict[str, Any]:
    """What the methods take for one model, with rows of several lengths throughout.

    Returns:
        {"methods": {method: {length: {"tensors", "low", "high", "verdict", "is_by_formula"}}},
        "untraced": why it goes by a formula, if it does}, sizes in bytes.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    target = find_target(device)
    config, source = recipe.model.read_config()
    document = recipe.model_dump(mode="json")
    # What of the adapter has a learning rate of its own takes the same memory, and in full training
    # there is no such thing.
    document["optimizer"] |= {"groups": [], "lora_plus_ratio": None}
    if recipe.training.micro_batch_size == "auto":
        document["training"]["micro_batch_size"] = 1
    if not isinstance(recipe.adapter, LoRA):
        document["adapter"] = {"type": "lora"}
    methods: dict[str, dict[int, dict[str, Any]]] = {}
    untraced = ""
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
                "is_by_formula": report["formula"] is not None,
            }
            untraced = untraced or (report["formula"] or {}).get("why", "")
    return {
        "model": {"path": recipe.model.path, "dimensions": source},
        "device": {"name": target.name, "bytes": target.memory_bytes},
        "methods": methods,
        "untraced": untraced,
    }


def plan(
    recipe: Recipe, *, device: str = "cuda", gpus: int = 1, fit: bool = False
) -> dict[str, Any]:
    """What a recipe takes. No weights are read and nothing is trained.

    Args:
        device: cpu, cuda, an amount of memory or the name of a card.
        gpus: how many of them train together, each with the whole model.
        fit: if it does not fit, look for the least harmful changes with which it does; the report
            is of the changed recipe then, and has them under "changes".

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    started = time.monotonic()
    target = find_target(device, gpus)
    config, source = recipe.model.read_config()
    is_auto = recipe.training.micro_batch_size == "auto"
    recipe = resolve_micro_batch_size(recipe, config, target)
    if fit:
        changes, report = fit_to(recipe, config, target)
        report["changes"] = changes
    else:
        report = estimate(recipe, config, target)
    report["micro_batch"] = {"rows": recipe.training.fixed_micro_batch_size, "is_auto": is_auto}
    report["model"] = {"path": recipe.model.path, "dimensions": source, **report["model"]}
    report["seconds"] = round(time.monotonic() - started, 1)
    return report
