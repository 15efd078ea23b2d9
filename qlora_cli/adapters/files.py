"""Read the two files of an adapter folder in PEFT's format. They are untrusted input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
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
"""The file with the tensors. Pickled files are never read."""

_OUTSIDE = (
    "megatron_config",
    "adapters",
    "tokenizer_name_or_path",
    "prompt_tuning_init_state_dict_path",
)
"""Settings that make PEFT import modules or open files named in the config."""

_NOT_SIZES = ("alpha", "seed", "prng_key")
"""Endings of the names of numbers that are not sizes of tensors."""
_SMALL = 64
"""Sizes up to this take a negligible amount of memory."""

_NAMES = ("target_modules", "exclude_modules")
_LISTS = ("modules_to_save", "target_parameters")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def read_config(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> PeftConfig:
    """Read the settings of an adapter.

    Args:
        shapes: shapes of its tensors. Ranks are limited by them: for a larger rank in the settings
            PEFT would only allocate memory for a tensor that is then missing.

    Raises:
        ModelError: they cannot be read, or name code or files outside of the folder.
    """
    from peft import PeftConfig

    from qlora_cli.adapters.layers.bottleneck import register

    register()
    refuse_foreign(folder)
    path = folder / CONFIG
    try:
        # Read here first: PEFT would look on the Hub for a missing file.
        settings = read_object(path)
        if named := [key for key in _OUTSIDE if settings.get(key)]:
            raise ValueError(
                f"{named[0]} names code or files outside of the folder: they are not opened"
            )
        _check_plain_types(settings)
        if settings.get("peft_type") == "LORA":
            _check_lora(settings)
        else:
            _check_sizes(settings, max((max(one) for one in shapes.values() if one), default=1))
        config: Any = PeftConfig.from_pretrained(str(folder))
    # PEFT does not check types: a wrong setting raises any kind of error, where it is first used.
    except Exception as error:
        raise ModelError(f"{path} cannot be read as the settings of an adapter: {error}") from error
    if config.peft_type == "LORA":
        largest = max((shape[0] for shape in shapes.values() if shape), default=1)
        config.r = min(config.r, largest)
        config.rank_pattern = {k: min(v, largest) for k, v in (config.rank_pattern or {}).items()}
        config.alpha_pattern = config.alpha_pattern or {}
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter.

    Raises:
        ModelError: the safetensors file is missing, or cannot be read.
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
    """Read the settings and tensors of an adapter.

    Raises:
        ModelError: a file is missing, or cannot be read.
    """
    saved = read_tensors(folder)
    return read_config(folder, {name: tuple(one.shape) for name, one in saved.items()}), saved


def refuse_slow_patterns(config: PeftConfig, modules: Iterable[str], folder: Path) -> None:
    """Refuse settings whose regular expressions take too long on the names of a model's modules.

    Raises:
        ModelError: matching takes more than half a second, or an expression is not valid.
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
        raise ModelError(f"{folder / CONFIG}: not a valid regular expression: {error}") from error


def _check_sizes(settings: Mapping[str, Any], largest: int) -> None:
    """Raise ValueError if a size is larger than any side of the tensors.

    PEFT would only allocate memory for a tensor that is then missing.
    """
    for key, value in settings.items():
        is_large = type(value) is int and value > max(largest, _SMALL)
        if is_large and not key.endswith(_NOT_SIZES):
            raise ValueError(f"{key} ({value}) is larger than any side of the tensors ({largest})")
    for key in _NAMES:
        _require(key, settings.get(key), _are_names)


def _check_plain_types(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a setting that PEFT declares as a switch or a number is something else.

    Null stands for the default, and a number may be written as 16 or 16.0.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    plain = {"bool": (bool,), "int": (int, float), "float": (int, float)}
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(settings.get("peft_type"))
    for one in fields(config) if config else ():
        # An annotation is a string in the modules that postpone its evaluation.
        allowed = plain.get(
            one.type if isinstance(one.type, str) else getattr(one.type, "__name__", "")
        )
        value = settings.get(one.name)
        if allowed and value is not None and type(value) not in allowed:
            raise ValueError(f"{one.name} ({value!r}) is not a valid setting of an adapter")


def _check_lora(settings: dict[str, Any]) -> None:
    """Raise ValueError if a setting that enters a computation has a wrong type or value."""
    _require("r", settings.get("r", 8), _is_rank)
    _require("lora_alpha", settings.get("lora_alpha", 8), _is_number)
    for key in _NAMES:
        _require(key, settings.get(key), _are_names)
    for key in _LISTS:
        _require(key, settings.get(key), lambda one: _are_names(one) and not isinstance(one, str))
    for key, is_value in zip(_PATTERNS, (_is_rank, _is_number), strict=True):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_value, pattern.values())):
            raise ValueError(f"{key} ({pattern!r}) is not a mapping of names to numbers")


def _require(key: str, value: Any, holds: Any) -> None:
    if not holds(value):
        raise ValueError(f"{key} ({value!r}) is not a valid setting of an adapter")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, str) or is_list
