"""Combine several LoRA adapters into one, by PEFT's methods.

PEFT combines adapters that are attached to a model, but uses only the shapes of the adapted
modules. So they are attached to modules of these shapes whose weights take no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor, nn

METHODS = {
    "linear": False,
    "cat": False,
    "svd": False,
    "ties": True,
    "ties_svd": True,
    "dare_linear": True,
    "dare_linear_svd": True,
    "dare_ties": True,
    "dare_ties_svd": True,
    "magnitude_prune": True,
    "magnitude_prune_svd": True,
}
"""PEFT's methods -> whether they drop a share of the values (`density`)."""

_MUST_AGREE = ("layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out", "bias")
"""Settings that the result takes from the first adapter, so they must agree in all."""

_PREFIX = "base_model.model."


def combine_adapters(
    adapters: Sequence[tuple[LoraConfig, dict[str, Tensor]]],
    weights: Sequence[float],
    *,
    method: str,
    density: float,
    rank: int | None,
    seed: int,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the settings and tensors of the combined adapter, whose scale is 1 everywhere.

    Args:
        adapters: settings and tensors of each.
        weights: one for each adapter.
        method: a key of `METHODS`.
        density: share of values that methods with dropping keep.
        rank: rank of the result for the `svd` methods; None takes the largest of the adapters'.
        seed: seed of random dropping.

    Raises:
        ModelError: the adapters cannot be combined in this way.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    _refuse(adapters)
    configs = [config for config, _ in adapters]
    names = [f"adapter_{i}" for i in range(len(adapters))]
    model: Any = None
    try:
        for name, (config, saved) in zip(names, adapters, strict=True):
            config = replace(config, init_lora_weights=True, task_type=None, inference_mode=True)
            if model is None:
                model = PeftModel(_skeleton(adapters), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            whole = {key: tensor.float() for key, tensor in saved.items()}
            set_peft_model_state_dict(model, whole, adapter_name=name)
        # The result takes its settings from the first adapter, and PEFT writes factors for a scale
        # of 1; with rsLoRA's alpha / sqrt(r) the scale would be another.
        model.peft_config[names[0]] = replace(model.peft_config[names[0]], use_rslora=False)
        torch.manual_seed(seed)
        model.base_model.add_weighted_adapter(
            names,
            list(weights),
            "combined",
            combination_type=method,
            svd_rank=rank,
            svd_full_matrices=False,
            density=density,
        )
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"--method {method}: PEFT refuses it: {error}") from error
    made = get_peft_model_state_dict(model, adapter_name="combined", save_embedding_layers=False)
    config = replace(
        model.peft_config["combined"],
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
        fan_in_fan_out=configs[0].fan_in_fan_out,
    )
    return config, {key: tensor.contiguous() for key, tensor in made.items()}


def write_adapter(config: LoraConfig, saved: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter into `folder`, in PEFT's format."""
    from safetensors.torch import save_file

    config.save_pretrained(str(folder))
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _refuse(adapters: Sequence[tuple[LoraConfig, dict[str, Tensor]]]) -> None:
    """Raise ModelError if the adapters cannot be combined by any method."""
    first = adapters[0][0]
    for config, _ in adapters:
        if config.use_dora:
            raise ModelError(
                "an adapter with use_dora (true) cannot be combined: PEFT's methods ignore its "
                "magnitudes"
            )
        if config.modules_to_save:
            raise ModelError(
                f"an adapter with modules_to_save ({', '.join(config.modules_to_save)}) cannot be "
                "combined: they are whole matrices, not updates"
            )
        for name in _MUST_AGREE:
            mine, other = getattr(first, name), getattr(config, name)
            if mine != other:
                raise ModelError(
                    f"adapters with different {name} ({mine} and {other}) cannot be combined"
                )


def _skeleton(adapters: Sequence[tuple[LoraConfig, dict[str, Tensor]]]) -> nn.Module:
    """Build a tree of the adapted modules, with the shapes that their factors imply."""
    from torch import nn

    root = nn.Module()
    for _, saved in adapters:
        for key, a in saved.items():
            path, _, factor = key.removeprefix(_PREFIX).partition(".lora_")
            if factor == "A.weight":
                b = saved[f"{_PREFIX}{path}.lora_B.weight"]
                _add_module(root, path, _linear(a.shape[1], b.shape[0]))
            elif factor == "embedding_A":
                b = saved[f"{_PREFIX}{path}.lora_embedding_B"]
                _add_module(root, path, _embedding(a.shape[1], b.shape[0]))
    return root


def _linear(num_in: int, num_out: int) -> nn.Module:
    import torch
    from torch import nn

    module = nn.Linear(1, 1, bias=False)
    module.in_features, module.out_features = num_in, num_out
    module.weight = nn.Parameter(torch.zeros(1).expand(num_out, num_in), requires_grad=False)
    return module


def _embedding(num: int, width: int) -> nn.Module:
    import torch
    from torch import nn

    module = nn.Embedding(1, 1)
    module.num_embeddings, module.embedding_dim = num, width
    module.weight = nn.Parameter(torch.zeros(1).expand(num, width), requires_grad=False)
    return module


def _add_module(root: nn.Module, path: str, leaf: nn.Module) -> None:
    from torch import nn

    *parents, name = path.split(".")
    module = root
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    if name not in module._modules:
        module.add_module(name, leaf)
