"""The two files of an adapter folder in PEFT's format, which somebody else may have written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.jinja_sandbox import limited_time
from qlora_cli.common.untrusted_files import read_object, refuse_foreign, refuse_no_safetensors
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""The file with the tensors; pickled ones are never read."""

_ELSEWHERE = (
    "megatron_config",
    "adapters",
    "tokenizer_name_or_path",
    "prompt_tuning_init_state_dict_path",
)
"""Settings for which PEFT imports a module, or opens files, that the config names."""

_NO_SIZES = ("alpha", "seed", "prng_key")
"""Endings of numbers by which PEFT makes no tensor."""
_SMALL = 64
"""No number up to it takes memory worth a word."""

_NAMES = ("target_modules", "exclude_modules")
_LISTS = ("modules_to_save", "target_parameters")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def read_config(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> PeftConfig:
    """The settings of an adapter.

    Args:
        shapes: of its tensors. No rank is larger than theirs, whatever the settings say: a rank
            that no tensor has would only make PEFT take memory for a module that is then missing.

    Raises:
        ModelError: they cannot be read, or name code or files elsewhere.
    """
    from peft import PeftConfig

    from qlora_cli.adapters.layers.bottleneck import register

    register()
    refuse_foreign(folder)
    path = folder / CONFIG
    try:
        # Before PEFT, which asks the hub for what it does not find.
        settings = read_object(path)
        if named := [key for key in _ELSEWHERE if settings.get(key)]:
            raise ValueError(f"{named[0]} names code or files elsewhere, which are not opened")
        if settings.get("peft_type") == "LORA":
            _check_lora(settings)
        else:
            _check_sizes(settings, max((max(one) for one in shapes.values() if one), default=1))
        config: Any = PeftConfig.from_pretrained(str(folder))
    # PEFT checks no types: what is wrong fails wherever it is used first.
    except Exception as error:
        raise ModelError(f"{path} cannot be read as the settings of an adapter: {error}") from error
    if config.peft_type == "LORA":
        largest = max((shape[0] for shape in shapes.values() if shape), default=1)
        config.r = min(config.r, largest)
        config.rank_pattern = {k: min(v, largest) for k, v in (config.rank_pattern or {}).items()}
        config.alpha_pattern = config.alpha_pattern or {}
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter.

    Raises:
        ModelError: there are none in safetensors, or they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_foreign(folder)
    if folder.is_dir():
        refuse_no_safetensors(folder, str(folder), [WEIGHTS])
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def read_adapter(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The settings and tensors of an adapter.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    saved = read_tensors(folder)
    return read_config(folder, {name: tuple(one.shape) for name, one in saved.items()}), saved


def refuse_slow_patterns(config: PeftConfig, modules: Iterable[str], folder: Path) -> None:
    """Refuse settings whose regular expressions take for ever on the names of a model's modules.

    Raises:
        ModelError: they do, or are none.
    """
    settings: Any = config
    found = [getattr(settings, name, None) for name in _NAMES]
    patterns = [one for one in found if isinstance(one, str) and one != "all-linear"]
    keys = [key for name in _PATTERNS for key in getattr(settings, name, None) or ()]
    patterns += [rf"(.*\.)?({key})$" for key in keys]
    try:
        with limited_time(f"{folder / CONFIG}: its regular expressions", seconds=0.5):
            for pattern in patterns:
                compiled = re.compile(pattern)
                for module in modules:
                    compiled.fullmatch(module)
    except re.error as error:
        raise ModelError(f"{folder / CONFIG}: no regular expression: {error}") from error


def _check_sizes(settings: Mapping[str, Any], largest: int) -> None:
    """Raises ValueError if a number says more than the tensors do.

    What PEFT makes of it would only take memory, for a module that is then missing.
    """
    for key, value in settings.items():
        is_large = type(value) is int and value > max(largest, _SMALL)
        if is_large and not key.endswith(_NO_SIZES):
            raise ValueError(f"{key} ({value}) is more than any side of the tensors ({largest})")
    for key in _NAMES:
        _require(key, settings.get(key), _are_names)


def _check_lora(settings: dict[str, Any]) -> None:
    """Raises ValueError if a setting that we or PEFT compute with is of another type."""
    _require("r", settings.get("r", 8), _is_rank)
    _require("lora_alpha", settings.get("lora_alpha", 8), _is_number)
    for key in _NAMES:
        _require(key, settings.get(key), _are_names)
    for key in _LISTS:
        _require(key, settings.get(key), lambda one: _are_names(one) and not isinstance(one, str))
    for key, is_value in zip(_PATTERNS, (_is_rank, _is_number), strict=True):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_value, pattern.values())):
            raise ValueError(f"{key} ({pattern!r}) is no mapping of names to numbers")


def _require(key: str, value: Any, holds: Any) -> None:
    if not holds(value):
        raise ValueError(f"{key} ({value!r}) is none that an adapter can have")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, str) or is_list
